"""diffusers' own `from_pretrained` and `save_pretrained` for quantized denoisers.

diffusers looks a checkpoint's `quantization_config` up in two dictionaries (`diffusers.quantizers.auto`). Importing
this module puts stepquant's classes there, and `import stepquant` sees to it (`integrations.registration`), so that

    DiffusionPipeline.from_pretrained(folder), UNet2DModel.from_pretrained(folder, subfolder="unet"), AutoModel...

open what stepquant saved, and what was opened can be saved again by `save_pretrained`, sharded or as a variant.

The structure (which layers, which bits) is in the component's `config.json`, the tensors are encoded as docs/format.md
says. Three things of `stepquant.load` have no place there: checksums are not compared, engines are not chosen, and the
schedule is not guarded, so that every timestep uses the parameters of the nearest calibrated one. A step correction
belongs to the scheduler; a checkpoint with one is refused.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Self, TypeVar

import diffusers
import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from stepquant.errors import CheckpointError, ModelError, SpecError
from stepquant.manifest import (
    FORMAT_VERSION,
    LayerGroup,
    Manifest,
    group_layers,
    manifest_json,
    needed_version,
    structure_of,
)
from stepquant.model.assembly import ClockStructure, Structure, assemble_, describe
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import quantized_layers
from stepquant.slots import Slot, check_value, decode_, encoded, restore_weight_, slots_of

__all__ = ["INDEX_NAME", "METHOD", "StepquantConfig", "StepquantQuantizer", "attach_", "stock_config"]

METHOD = "stepquant"
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"
"""Where diffusers looks which file of a component's folder holds a tensor."""

_KEYS = ("format_version", "clock", "explicit_attention", "layers", "correction")
_CLOCK = TypeAdapter(ClockStructure)
_GROUPS = TypeAdapter(tuple[LayerGroup, ...])

T = TypeVar("T")

log = logging.getLogger(__name__)


def _checked(kind: TypeAdapter[T], value: Any) -> T:
    """JSON values as what they stand for, or a CheckpointError that says where they are wrong."""
    try:
        return kind.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"quantization_config of stepquant, {where}: {first['msg']}.") from None


class _Method(StrEnum):
    """diffusers asks the method for its `value`."""

    STEPQUANT = METHOD


class StepquantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a component: what of the manifest is needed to rebuild its modules.

    values: the keys `format_version`, `clock`, `explicit_attention`, `layers` and, with a step correction,
        `correction`, as in the manifest. Nothing else goes here: diffusers sends short configurations to the hub.
    Raises CheckpointError for missing or unknown keys, another version, and values of another type.
    """

    def __init__(self, **values: Any) -> None:
        self.quant_method = _Method.STEPQUANT
        unknown, missing = sorted(set(values) - {*_KEYS}), sorted({*_KEYS[:4]} - set(values))
        if unknown or missing:
            raise CheckpointError(
                f"quantization_config of stepquant has the unknown keys {unknown} and lacks {missing}. Save the "
                "checkpoint again with this version of stepquant."
            )
        version = values["format_version"]
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise CheckpointError(
                f"quantization_config has format version {version!r}; this stepquant reads versions 1 to "
                f"{FORMAT_VERSION}. Install the version that wrote it."
            )
        self.values = values
        self.structure()

    def structure(self) -> Structure:
        """Clock, layers and attention as `assemble_` needs them."""
        explicit = bool(self.values["explicit_attention"])
        return structure_of(_checked(_CLOCK, self.values["clock"]), self.groups(), explicit_attention=explicit)

    def groups(self) -> tuple[LayerGroup, ...]:
        """The layers, with the shapes of their weights."""
        return _checked(_GROUPS, self.values["layers"])

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From `config.json`. `quant_method` says which class reads it, and is no setting."""
        config = cls(**{key: value for key, value in config_dict.items() if key != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` holds it."""
        values: dict[str, Any] = json.loads(json.dumps(self.values))
        return {"quant_method": METHOD, **values}

    def to_diff_dict(self) -> dict[str, Any]:
        """diffusers prints configurations by this name, and does not define it."""
        return self.to_dict()

    def __repr__(self) -> str:
        layers = sum(len(group["layers"]) for group in self.values["layers"])
        return f"StepquantConfig(layers={layers}, format_version={self.values['format_version']})"

    @classmethod
    def of(cls, denoiser: nn.Module) -> Self:
        """The configuration of a quantized denoiser. Raises ModelError if it is not quantized or not hardened."""
        structure = describe(denoiser)
        shapes = {
            name: tuple(layer.weight.shape) if isinstance(layer, QuantizedLayer) else ()
            for name, layer in quantized_layers(denoiser).items()
        }
        groups = group_layers(structure, shapes)
        return cls(
            format_version=needed_version(groups),
            clock=_CLOCK.dump_python(structure.clock, mode="json"),
            explicit_attention=structure.explicit_attention,
            layers=_GROUPS.dump_python(groups, mode="json", exclude_defaults=True),
        )


def stock_config(manifest: Manifest) -> dict[str, Any]:
    """What a component's `config.json` says about its quantization, as JSON values.

    Raises CheckpointError if adapters are attached: a checkpoint has no place for them, and could not be loaded.
    """
    refuse_adapters(sorted({name.split(_ADAPTED)[0] for name in manifest.checksums if _ADAPTED in name}))
    values = manifest_json(manifest)
    return {"quant_method": METHOD, **{key: values[key] for key in _KEYS if values.get(key) is not None}}


class StepquantQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Takes part in diffusers' loading and saving of one denoiser.

    model: the denoiser that it belongs to; it is known once its modules have been swapped.
    """

    requires_calibration = True
    use_keep_in_fp32_modules = True
    required_packages = ("accelerate",)

    def __init__(self, quantization_config: StepquantConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise SpecError(
                "stepquant has to look at the model's sampling before it can quantize, so from_pretrained cannot do "
                "it: open the full-precision pipeline and call stepquant.quantize(pipe, recipe, steps=...)."
            )
        super().__init__(quantization_config, **kwargs)
        self.model: nn.Module | None = None
        self._slots: dict[str, Slot] = {}
        self._levels: dict[str, tuple[Tensor, torch.dtype]] = {}
        self._read: set[str] = set()

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def supports_parallel_loading(self) -> bool:
        """Levels are put aside while files are read, so one file at a time."""
        return False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Raise ImportError without accelerate, and CheckpointError for what this way of loading cannot do."""
        from diffusers.utils import is_accelerate_available

        if not is_accelerate_available():
            raise ImportError(
                "diffusers loads quantized models with accelerate only: pip install accelerate. "
                "stepquant.load(folder) does without."
            )
        if self.quantization_config.values.get("correction") is not None:
            raise CheckpointError(
                "The checkpoint has a step correction, which is a part of its scheduler and which from_pretrained "
                "would drop. Open it with stepquant.load(folder)."
            )
        if isinstance(device_map, Mapping) and len({str(device) for device in device_map.values()}) > 1:
            raise CheckpointError(
                f"A quantized denoiser is loaded onto one device, and device_map spreads it over {dict(device_map)}. "
                "Load it onto one, and move parts to the CPU afterwards with pipe.enable_model_cpu_offload()."
            )

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:  # noqa: ARG002
        """Tables that files leave out because they hold one value."""
        return [key for key in missing_keys if key in self._slots]

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:  # noqa: ARG002
        """Swap the layers of a model without memory. What files leave out is on the CPU and has its value."""
        structure = self.quantization_config.structure()
        try:
            assemble_(model, structure)
        except (ModelError, SpecError) as error:
            raise CheckpointError(
                f"The layers of quantization_config do not fit {type(model).__name__}: {error}"
            ) from error
        shapes = {name: shape for group in self.quantization_config.groups() for name, shape in group.layers.items()}
        for name, layer in quantized_layers(model).items():
            shape = tuple(layer.weight.shape) if isinstance(layer, QuantizedLayer) else ()
            if shapes[name] != shape:
                raise CheckpointError(
                    f"{name}: quantization_config declares weight shape {list(shapes[name])}, the model has "
                    f"{list(shape)}."
                )
        model.requires_grad_(False)
        _refuse_undoing_(model)
        self.model = model
        self._slots = slots_of(model)

    def check_if_quantized_param(
        self,
        model: nn.Module,  # noqa: ARG002
        param_value: Tensor,  # noqa: ARG002
        param_name: str,
        *_: Any,
        **__: Any,
    ) -> bool:
        """All tensors are ours: diffusers would cast scales to the dtype of the weights."""
        return param_name in self._slots

    def check_quantized_param_shape(self, param_name: str, current: Tensor, loaded: Tensor) -> bool:  # noqa: ARG002
        """Raise CheckpointError for a tensor that is not as files hold it."""
        _, shape = self._slots[param_name].stored
        if tuple(loaded.shape) != shape:
            raise CheckpointError(f"{param_name}: shape {list(loaded.shape)}, expected {list(shape)}.")
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str | int | None,
        state_dict: Mapping[str, Tensor],
        unexpected_keys: list[str] | None = None,  # noqa: ARG002
        dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        """Decode one tensor of a file.

        param_value: cast to the dtype that was asked for, which is right for tensors that are stored as they are, and
            only for those. state_dict: as in the file.
        """
        slot, stored = self._slots[param_name], state_dict[param_name]
        self._read.add(param_name)
        self.check_quantized_param_shape(param_name, slot.tensor, stored)
        expected, _shape = slot.stored
        if expected is not None and stored.dtype != expected:
            raise CheckpointError(f"{param_name}: dtype {stored.dtype}, expected {expected}.")
        check_value(param_name, slot, stored)
        device = torch.device("cpu" if target_device is None else target_device)
        wanted = param_value.dtype
        if slot.role == "levels":
            kept = not {*param_name.split(".")}.isdisjoint(getattr(model, "_keep_in_fp32_modules", None) or ())
            wanted = torch.float32 if dtype is None or kept else dtype
        if slot.tensor.is_meta:
            _give_memory(slot, wanted)
        if slot.role == "levels":
            self._levels[param_name] = (stored, wanted)
        else:
            decode_(slot, stored, wanted)
        slot.tensor.data = slot.tensor.data.to(device)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:  # noqa: ARG002
        """Weights from their levels, now that all scales are there. diffusers only warns of tensors that are not."""
        left = sorted(set(self._slots) - self._read)
        if left:
            raise CheckpointError(f"The checkpoint lacks {len(left)} tensors of the model, the first is {left[0]!r}.")
        for name, (stored, dtype) in self._levels.items():
            slot = self._slots[name]
            restore_weight_(slot, stored.to(slot.tensor.device), dtype)
        self._levels, self._slots = {}, {}
        device = next(model.parameters()).device
        for buffer in (*model.buffers(),):
            buffer.data = buffer.data.to(device)
        if any(
            rows > 1 for layer in self.quantization_config.structure().layers.values() for rows in layer.rows.values()
        ):
            log.warning(
                "This checkpoint has parameters of its own for parts of the schedule. from_pretrained does not compare "
                "schedules: sample with the steps of the calibration, or open it with stepquant.load, which refuses "
                "others."
            )

    def get_state_dict_and_metadata(
        self,
        state_dict: Mapping[str, Tensor],  # noqa: ARG002
        safe_serialization: bool = False,  # noqa: ARG002
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors as files hold them. Raises CheckpointError if something changed the layers since."""
        assert self.model is not None
        _refuse_changed(self.model, self.quantization_config)
        return {name: encoded(name, slot) for name, slot in slots_of(self.model).items()}, {}


def _give_memory(slot: Slot, dtype: torch.dtype) -> None:
    """An empty CPU tensor in the place of one without memory."""
    empty = torch.empty(slot.tensor.shape, dtype=dtype)
    if slot.attribute in slot.module._parameters:
        slot.module._parameters[slot.attribute] = nn.Parameter(empty, requires_grad=False)
    else:
        slot.module._buffers[slot.attribute] = empty


_ADAPTED = ".base_layer."
"""In the name of a tensor whose layer has an adapter around it."""


def refuse_adapters(layers: Sequence[str]) -> None:
    """Raise CheckpointError if these layers have adapters (peft): they would be saved without, under other names."""
    if layers:
        raise CheckpointError(
            f"{len(layers)} layers have adapters, the first is {layers[0]}. Save the adapters on their own "
            "(pipe.save_lora_weights) and the quantized model without them (pipe.unload_lora_weights()), or make them "
            "part of its weights first (pipe.fuse_lora(), then pipe.unload_lora_weights())."
        )


def _refuse_changed(denoiser: nn.Module, config: StepquantConfig) -> None:
    refuse_adapters([name for name, module in denoiser.named_modules() if hasattr(module, "base_layer")])
    try:
        found = StepquantConfig.of(denoiser)
    except ModelError as error:
        raise CheckpointError(f"The quantized layers have been changed, so they cannot be saved: {error}") from error
    if found.structure() != config.structure():
        raise CheckpointError(
            "The quantized layers are not those that the model was quantized with (an engine has packed them, or "
            "they were replaced): save the model before that, or copy the checkpoint."
        )


# Methods of diffusers' models that would run attention in floating point without a word, and what each of them does.
_UNDOING = {
    "fuse_qkv_projections": "makes new layers in floating point of the quantized ones",
    "set_attention_slice": "replaces the quantized attention by one in floating point",
    "set_attn_processor": "replaces the quantized attention by one in floating point",
    "set_default_attn_processor": "replaces the quantized attention by one in floating point",
    "set_use_memory_efficient_attention_xformers": "replaces the quantized attention by one in floating point",
}


def _refuse_undoing_(model: nn.Module) -> None:
    """Make the methods that would undo the quantization raise instead, on this instance and its copies."""
    for name in _UNDOING:
        if hasattr(type(model), name):
            # A partial of a module-level function: copies and pickles keep it.
            setattr(model, name, functools.partial(_refuse_undoing, name))


def _refuse_undoing(name: str, *_: Any, **__: Any) -> None:
    raise ModelError(
        f"{name} {_UNDOING[name]}, so it is not allowed on a quantized model. Leave it out; before quantizing it is "
        "allowed unless it changes the names of layers."
    )


def attach_(denoiser: nn.Module) -> None:
    """Make `save_pretrained` of a quantized denoiser, alone and in a pipeline, write what `from_pretrained` reads.

    Does nothing to a module that is not one of diffusers' models.
    """
    if not isinstance(denoiser, diffusers.ModelMixin):
        return
    config = StepquantConfig.of(denoiser)
    quantizer = StepquantQuantizer(config)
    quantizer.model = denoiser
    denoiser.register_to_config(quantization_config=config)
    _refuse_undoing_(denoiser)
    model: Any = denoiser
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, config.quant_method


# Importing this module is what `import stepquant` has done once diffusers is there.
auto.AUTO_QUANTIZER_MAPPING[METHOD] = StepquantQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = StepquantConfig
