"""Adapters (LoRA) on quantized layers, through peft's and diffusers' own calls.

    y = quantized(x) + s B (A x)                       attached
    y = quantized'(x),  quantized' of W + s B A        fused

The adapter reads the layer's own input, before any transform and quantizer, and computes in floating point. So
`pipe.load_lora_weights`, `add_adapter`, `set_adapters`, `delete_adapters` and `unload_lora_weights` do on a quantized
model what they do on any other. Adapters are saved with `pipe.save_lora_weights`; `save_lora_adapter` of a denoiser
casts the model first, which diffusers forbids for quantized ones.

`fuse_lora` makes the adapter a part of the quantized weight. The full-precision weight is not at hand, so the target is
the quantized weight plus the adapter, in the coordinates that the layer's transform gave it:

    W' = W + fold(s B A)

Every group of weights that shares a scale takes the stored scale or one searched for W', whichever is closer to W'.
Ranges of activations stay as calibrated. `unfuse_lora` brings the weights of before back, bit for bit.

A step of a coarse grid swallows what is smaller than half of it. How much of an adapter is lost in a layer,

    lost = |Q(W') - W'|^2 / |W' - W|^2,

lies between 0 and 1, as W itself is on a grid that is tried. Fusing raises ModelError where it is more than
`MOST_LOST`: in a layer of few bits, fusing would quietly leave the adapter out.

Only plain LoRA: DoRA and the other variants, and initialisations that change the base weight, need the
full-precision weight and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora import model as lora_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from stepquant.calibrate.ranges import fit_range
from stepquant.errors import ModelError
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import WeightQuantizer
from stepquant.numerics.affine import QParams, dequantize, grouped, quantize

__all__ = ["MOST_LOST", "register_with_peft"]

MOST_LOST = 0.5
"""Of an adapter's squared norm in one layer. Ours: at half of it, the images are as near to those without it."""

_HARMLESS_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the base weight as it is."""


@dataclass
class _Fused:
    """What a layer was before adapters were fused, and what it stands for now.

    weight, bias, scale, zero_point: of before; None where the layer has none. target: float32 weight that the present
    one was quantized from.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None
    target: Tensor

    @classmethod
    def of(cls, layer: QuantizedLayer) -> _Fused:
        quantizer = layer.weight_quantizer
        scale, zero_point = None, None
        if isinstance(quantizer, WeightQuantizer):
            scale, zero_point = quantizer.scale.clone(), quantizer.zero_point.clone()
        bias = None if layer.bias is None else layer.bias.data.clone()
        weight = layer.weight.data.clone()
        return cls(weight, bias, scale, zero_point, weight.float())

    def restore_(self, layer: QuantizedLayer) -> None:
        """Put the layer back as it was, wherever it has been moved to since."""
        device = layer.weight.device
        layer.weight.data = self.weight.to(device)
        if layer.bias is not None and self.bias is not None:
            layer.bias.data = self.bias.to(device)
        quantizer = layer.weight_quantizer
        if isinstance(quantizer, WeightQuantizer) and self.scale is not None and self.zero_point is not None:
            quantizer.scale.copy_(self.scale)
            quantizer.zero_point.copy_(self.zero_point)


_Base: Any = BaseTunerLayer  # peft is typed in part


class _OverQuantized(_Base):  # type: ignore[misc]
    """What the layers for Linear, Conv1d and Conv2d share; it stands before peft's own class of the kind.

    peft makes an adapter's matrices by looking at a float layer. It is shown one of the same geometry that shares the
    quantized layer's tensors.
    """

    base_layer: Any

    def __init__(self, base_layer: QuantizedLayer, adapter_name: str, *, config: Any, **options: Any) -> None:
        self._fused: _Fused | None = None
        self._name: str = options.get("target_name") or "A layer"
        super().__init__(_float_twin(base_layer), adapter_name, config=config, **options)
        self.base_layer = base_layer

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """None but plain LoRA."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **options: Any) -> None:
        """Add an adapter. Raises ModelError for what is no plain LoRA."""
        if config.init_lora_weights not in _HARMLESS_STARTS:
            raise ModelError(
                f"{self._name}: init_lora_weights={config.init_lora_weights!r} takes a part out of the weight, which "
                "is quantized here. Use it before quantizing, or start with init_lora_weights=True."
            )
        with self._shown_as_float():
            try:
                super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)
            except ValueError as error:
                if "variant" not in str(error):
                    raise
                raise ModelError(
                    f"{self._name} is quantized, and only plain LoRA goes onto quantized layers, not DoRA or another "
                    f"variant that needs the full-precision weight ({error}). Fuse the adapter before quantizing."
                ) from error

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s B A, in the shape of the weight."""
        with self._shown_as_float():
            delta: Tensor = super().get_delta_weight(adapter)
        return delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002
        """Make adapters a part of the quantized weight.

        safe_merge: as peft's layers have it. Here, nothing is ever changed before all is known to be finite.
        Raises ModelError if the layer is no longer in simulated form, if its geometry does not allow it, if values are
        not finite, or if most of the adapters would be lost; the layer is then as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        layer = self.get_base_layer()
        self._refuse_unfusable(layer)
        fused = _Fused.of(layer) if self._fused is None else self._fused
        target, bias = fused.target.clone(), None if layer.bias is None else layer.bias.data.clone()
        for name in names:
            delta = self.get_delta_weight(name).float().to(target.device)
            target += delta if layer.input_transform is None else layer.input_transform.fold(delta)
            if self.lora_bias.get(name):
                if bias is None:
                    raise ModelError(f"{self._name} has no bias, so adapter {name!r} with lora_bias cannot be fused.")
                own: Any = self.lora_B[name]
                bias += (own.bias * self.scaling[name]).to(bias)
        if not bool(torch.isfinite(target).all()) or (bias is not None and not bool(torch.isfinite(bias).all())):
            raise ModelError(f"{self._name}: adapters {names} hold values that are NaN or infinite.")
        self._put_(layer, fused, target)
        if bias is not None:
            layer.bias.data = bias
        fused.target = target
        self._fused = fused
        self.merged_adapters.extend(names)

    def _put_(self, layer: QuantizedLayer, fused: _Fused, target: Tensor) -> None:
        """The target as the layer's weight, on its grid if it has one."""
        quantizer = layer.weight_quantizer
        if not isinstance(quantizer, WeightQuantizer):
            layer.weight.data = target.to(layer.weight.dtype)
            return
        assert fused.scale is not None
        assert fused.zero_point is not None
        device = target.device
        params = _nearest_grid(target, quantizer, QParams(fused.scale.to(device), fused.zero_point.to(device)))
        levels = quantize(grouped(target, quantizer.spec), params, quantizer.spec)
        weight = dequantize(levels, params).reshape(target.shape)
        change = float((target - fused.weight.to(target)).square().sum())
        lost = float((weight - target).square().sum()) / change if change else 0.0
        if lost > MOST_LOST:
            raise ModelError(
                f"{self._name}: its {quantizer.spec.bits}-bit grid would swallow {lost:.0%} of the adapter (at most "
                f"{MOST_LOST:.0%} may be lost). Leave the adapter unfused, or fuse it into the full-precision model "
                "and quantize that. unfuse_lora() takes back what this call has fused in other layers."
            )
        quantizer.scale.copy_(params.scale)
        quantizer.zero_point.copy_(params.zero_point)
        layer.weight.data = weight.to(layer.weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """The quantized weights of before the first adapter was fused, bit for bit."""
        if self._fused is None:
            return
        layer = self.get_base_layer()
        if not isinstance(layer, QuantizedLayer):
            raise ModelError(f"{self._name} has been packed by an engine since its adapters were fused: load it again.")
        self._fused.restore_(layer)
        self._fused = None
        self.merged_adapters.clear()

    def _refuse_unfusable(self, layer: Any) -> None:
        if not isinstance(layer, QuantizedLayer):
            raise ModelError(
                f"{self._name} is a {type(layer).__name__}: an engine has packed it, so adapters cannot be fused. Fuse "
                "them before the model is given to an engine."
            )
        if layer.weight.is_meta:
            raise ModelError(
                f"The weight of {self._name} is offloaded, so adapters cannot be fused into it. Fuse them before "
                "offloading."
            )
        if layer.first_token is not None:
            raise ModelError(
                f"{self._name} gives the first token an output that was stored beside the weight, without adapters. "
                "Leave the adapter unfused, or fuse it into the full-precision model and quantize that."
            )
        geometry = layer.geometry
        if geometry.groups != 1 or geometry.padding_mode != "zeros" or any(step != 1 for step in geometry.dilation):
            raise ModelError(
                f"{self._name} is a convolution with groups, dilation or padding other than zeros, for which an "
                "adapter is no change of its weight. Leave the adapter unfused."
            )

    @contextmanager
    def _shown_as_float(self) -> Iterator[None]:
        """Inside, the base layer is a float layer of the same geometry."""
        held = self.base_layer
        if not isinstance(held, QuantizedLayer):
            yield
            return
        self.base_layer = _float_twin(held)
        try:
            yield
        finally:
            self.base_layer = held


def _float_twin(layer: QuantizedLayer) -> nn.Module:
    """A float layer of the same geometry with the same weight and bias."""
    geometry, biased = layer.geometry, layer.bias is not None
    if geometry.kind == "linear":
        twin: Any = nn.Linear(layer.in_features, layer.out_features, bias=biased, device="meta")
    else:
        kind: Any = nn.Conv1d if geometry.kind == "conv1d" else nn.Conv2d
        twin = kind(
            layer.in_features,
            layer.out_features,
            tuple(layer.weight.shape[2:]),
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups,
            bias=biased,
            padding_mode=geometry.padding_mode,
            device="meta",
        )
    twin.weight, twin.bias = layer.weight, layer.bias
    return twin  # type: ignore[no-any-return]


def _nearest_grid(target: Tensor, quantizer: WeightQuantizer, stored: QParams) -> QParams:
    """For each group of weights, the stored parameters or those searched for the target: the ones closer to it."""
    view, spec = grouped(target, quantizer.spec), quantizer.spec
    found = fit_range(target, spec, "mse")

    def error(params: QParams) -> Tensor:
        return (dequantize(quantize(view, params, spec), params) - view).square().sum(-1, keepdim=True)

    better = error(found) < error(stored)
    return QParams(
        torch.where(better, found.scale, stored.scale), torch.where(better, found.zero_point, stored.zero_point)
    )


class _QuantizedLinear(_OverQuantized, lora.Linear):  # type: ignore[misc, unused-ignore]
    """An adapter on a quantized Linear."""


class _QuantizedConv1d(_OverQuantized, lora.Conv1d):  # type: ignore[misc, unused-ignore]
    """An adapter on a quantized Conv1d."""


class _QuantizedConv2d(_OverQuantized, lora.Conv2d):  # type: ignore[misc, unused-ignore]
    """An adapter on a quantized Conv2d."""


_KINDS: dict[str, Any] = {"linear": _QuantizedLinear, "conv1d": _QuantizedConv1d, "conv2d": _QuantizedConv2d}


def _create(original: Any, lora_config: Any, adapter_name: str, target: nn.Module, **options: Any) -> Any:
    """peft's own `_create_new_module` for all layers but ours."""
    if not isinstance(target, QuantizedLayer):
        return original(lora_config, adapter_name, target, **options)
    return _KINDS[target.geometry.kind](target, adapter_name, config=lora_config, **options)


class _Creator:
    """Stands in the place of `LoraModel._create_new_module`, which peft has no way to extend from outside.

    peft's `_register_custom_module` is per configuration, and diffusers makes the configurations itself.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(self, lora_config: Any, adapter_name: str, target: nn.Module, **options: Any) -> Any:
        return _create(self.original, lora_config, adapter_name, target, **options)


def register_with_peft() -> None:
    """Tell peft's LoRA about quantized layers; a second call does nothing."""
    current = lora_model.LoraModel.__dict__["_create_new_module"]
    original = current.__func__ if isinstance(current, staticmethod) else current
    if not isinstance(original, _Creator):
        kind: Any = lora_model.LoraModel
        kind._create_new_module = staticmethod(_Creator(original))


register_with_peft()
