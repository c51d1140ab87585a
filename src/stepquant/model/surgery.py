"""From rules to a plan, from a plan to a quantized model, and from a model to its reconstruction units."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepquant.errors import ModelError, SpecError, nearest, no_layer_matches
from stepquant.model.families import block_classes, end_layers
from stepquant.model.layer import Matmul, QuantizedLayer, QuantizedMatmul, geometry_of
from stepquant.numerics.affine import grouped
from stepquant.numerics.spec import LayerScheme, QuantSpec, finer_at_8

__all__ = [
    "Ends",
    "Plan",
    "Rule",
    "Unit",
    "check_finite",
    "dtype_of",
    "execution_order",
    "make_plan",
    "quantizable",
    "quantized_layers",
    "standard_rules",
    "swap_layers_",
    "units_of",
]

Plan = dict[str, LayerScheme]
"""Full layer name -> scheme. The only thing about layer choice that a checkpoint stores."""

Ends = Literal["8bit", "same", "full"]
"""First and last layer: both tensors at 8 bits, like every other layer, or in floating point."""


@dataclass(frozen=True)
class Rule:
    """Layers whose full name matches `pattern` (shell wildcards) get `scheme`. Of several matches the last one wins."""

    pattern: str
    scheme: LayerScheme


@dataclass(frozen=True)
class Unit:
    """What one reconstruction fits: a module of the denoiser and its quantized layers in order of execution."""

    name: str
    layers: tuple[str, ...]


def quantizable(denoiser: nn.Module) -> dict[str, Any]:
    """Every layer that can be quantized, by full name.

    Linear, Conv1d, Conv2d (not subclasses that compute something else, and nothing inside `nn.MultiheadAttention`,
    which reads its projections' weights directly) and `Matmul`.
    """
    inside_mha = {
        id(child)
        for module in denoiser.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    plain: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return {
        name: module
        for name, module in denoiser.named_modules()
        if id(module) not in inside_mha
        and (
            isinstance(module, Matmul)
            or any(isinstance(module, kind) and type(module).forward is kind.forward for kind in plain)
        )
    }


def scheme_fitting(scheme: LayerScheme, module: nn.Module) -> LayerScheme:
    """Adapt a scheme for ordinary layers to a matmul: no weight, both operands like an input, softmax nonnegative."""
    if not isinstance(module, Matmul):
        return replace(scheme, second=None)
    spec = scheme.input
    if spec is None or spec.dynamic:
        return replace(scheme, weight=None, second=spec)
    left = replace(spec, symmetric=False, nonnegative=True) if module.role == "values" else spec
    return LayerScheme(weight=None, input=left, second=spec)


def standard_rules(
    scheme: LayerScheme,
    layers: list[str],
    *,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    sensitive: Iterable[str] = (),
) -> list[Rule]:
    """The rules that a bit setting stands for.

    layers: quantizable layers in order of execution.
    ends: what happens to the first and last layer, and to those that are `sensitive`.
    softmax_bits: bits of the softmax output; None means as every other activation.
    """
    if ends not in ("8bit", "same", "full"):
        raise SpecError(
            f"ends must be '8bit', 'same' or 'full', found {ends!r}.{nearest(str(ends), ('8bit', 'same', 'full'))}"
        )
    rules = [Rule("*", scheme)]
    if softmax_bits is not None and scheme.input is not None and any(name.endswith("values") for name in layers):
        # The left operand is the softmax output; its quantizer is widened in `make_plan`'s adaptation.
        softmax = replace(scheme.input, bits=max(softmax_bits, scheme.input.bits))
        rules += [
            Rule(name, LayerScheme(input=softmax, second=scheme.input)) for name in layers if name.endswith("values")
        ]
    if ends == "same":
        return rules
    eight = LayerScheme(
        weight=None if scheme.weight is None else finer_at_8(scheme.weight),
        input=None if scheme.input is None else replace(scheme.input, bits=max(8, scheme.input.bits)),
    )
    kept = (*sensitive, *end_layers(layers))
    return rules + [Rule(name, eight if ends == "8bit" else LayerScheme()) for name in kept]


def make_plan(denoiser: nn.Module, rules: Sequence[Rule]) -> Plan:
    """Resolve rules to one scheme per layer. Every rule must match something; layers left in float are not listed."""
    layers = quantizable(denoiser)
    if not layers:
        raise ModelError(f"{type(denoiser).__name__} has no Linear, Conv1d, Conv2d or Matmul layer to quantize.")
    chosen: Plan = {}
    for rule in rules:
        matches = fnmatch.filter(layers, rule.pattern)
        if not matches:
            raise SpecError(no_layer_matches(rule.pattern, layers, kind="quantizable layers"))
        for name in matches:
            module, scheme = layers[name], rule.scheme
            explicit = isinstance(module, Matmul) and scheme.second is not None
            fitted = scheme_fitting(scheme, module)
            chosen[name] = replace(fitted, second=scheme.second) if explicit else fitted
    for name, scheme in chosen.items():
        if scheme.weight is not None:
            try:
                grouped(torch.empty(layers[name].weight.shape, device="meta"), scheme.weight)
            except SpecError as error:
                raise SpecError(f"Layer {name}: {error}") from None
    return {name: scheme for name, scheme in chosen.items() if scheme.quantizes}


def swap_layers_(denoiser: nn.Module, plan: Mapping[str, LayerScheme]) -> None:
    """Put quantized layers in the place of those in the plan; their quantizers are still empty.

    A layer that sits in several places is swapped in all of them.
    """
    layers = quantizable(denoiser)
    swapped: dict[int, nn.Module] = {}
    for name in plan:
        if name not in layers:
            raise ModelError(
                f"The plan names layer {name!r}, which {type(denoiser).__name__} does not have.{nearest(name, layers)}"
            )
        module = layers[name]
        if isinstance(module, Matmul):
            swapped[id(module)] = QuantizedMatmul(module.role)
        else:
            bias = None if module.bias is None else module.bias.detach()
            swapped[id(module)] = QuantizedLayer(geometry_of(module), module.weight.detach(), bias)
    for parent in list(denoiser.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and id(child) in swapped:
                parent._modules[key] = swapped[id(child)]


def quantized_layers(denoiser: nn.Module) -> dict[str, QuantizedLayer | QuantizedMatmul]:
    """Every quantized layer by full name."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, QuantizedLayer | QuantizedMatmul)
    }


def dtype_of(network: nn.Module) -> torch.dtype | None:
    """That of the first parameter in floating point; None for a compiled graph, which has none."""
    return next((own.dtype for own in network.parameters() if own.is_floating_point()), None)


def execution_order(denoiser: nn.Module, names: Iterable[str], args: Any, kwargs: Any) -> list[str]:
    """`names` in the order in which their modules first run in one forward call, without those that do not run."""
    order: list[str] = []
    wanted, modules = set(names), dict(denoiser.named_modules())

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            if name not in order:
                order.append(name)

        return hook

    handles = [modules[name].register_forward_pre_hook(note(name)) for name in wanted]
    try:
        with torch.no_grad():
            denoiser(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return order


def units_of(denoiser: nn.Module, order: Sequence[str]) -> list[Unit]:
    """Reconstruction units in order of execution: the outermost blocks, and every layer that lies outside of a block.

    order: quantized layers in order of execution.
    """
    classes = block_classes(denoiser)
    blocks = [name for name, module in denoiser.named_modules() if name and type(module).__name__ in classes]

    def unit_name(layer: str) -> str:
        around = [block for block in blocks if layer.startswith(block + ".")]
        return min(around, key=len) if around else layer

    members: dict[str, list[str]] = {}
    for layer in order:
        members.setdefault(unit_name(layer), []).append(layer)
    return [Unit(name, tuple(layers)) for name, layers in members.items()]


def check_finite(denoiser: nn.Module) -> None:
    """Raise ModelError naming the first parameter or buffer that holds NaN or infinity."""
    named: list[tuple[str, Tensor]] = [*denoiser.named_parameters(), *denoiser.named_buffers()]
    for name, tensor in named:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{name} of {type(denoiser).__name__} holds {bad} of {tensor.numel()} values that are NaN or infinite. "
                "Reload or repair the model before quantizing it."
            )


def operand_specs(scheme: LayerScheme) -> list[tuple[str, QuantSpec]]:
    """The activation quantizers that a scheme asks for: attribute name of the layer and spec."""
    found = (("input_quantizer", scheme.input), ("second_quantizer", scheme.second))
    return [(attribute, spec) for attribute, spec in found if spec is not None]
