"""The tensors of a quantized denoiser and how a checkpoint holds each of them. docs/format.md has the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from stepquant.errors import CheckpointError, nearest
from stepquant.manifest import MANIFEST_NAME, DenoiserIdentity
from stepquant.model.clock import StepClock
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import InputQuantizer, LogQuantizer, WeightQuantizer
from stepquant.model.transform import InputTransform
from stepquant.numerics.packing import pack, packed_bytes, unpack
from stepquant.numerics.spec import QuantSpec
from stepquant.storage import Entry

__all__ = [
    "Dtypes",
    "Slot",
    "check_entries",
    "check_value",
    "decode_",
    "dtype_named",
    "dtype_text",
    "encoded",
    "restore_weight_",
    "slots_of",
]

Role = Literal["levels", "weight_scale", "weight_zero", "input_scale", "input_zero", "choice", "rows", "edges", "plain"]


@dataclass(frozen=True)
class Slot:
    """One tensor of the denoiser and how the file holds it.

    module, attribute: where it is. spec: of the quantizer it belongs to. rows: of an activation quantizer.
    """

    module: nn.Module
    attribute: str
    role: Role
    spec: QuantSpec | None = None
    rows: int = 1

    @property
    def tensor(self) -> Tensor:
        value: Tensor = getattr(self.module, self.attribute)
        return value

    @property
    def stored(self) -> tuple[torch.dtype | None, tuple[int, ...]]:
        """Dtype and shape in the file. None stands for the tensor's own dtype or a narrower one that loses nothing."""
        if self.role == "levels":
            assert self.spec is not None
            return torch.uint8, (packed_bytes(self.tensor.numel(), self.spec.bits),)
        wide = isinstance(self.module, InputQuantizer) and max(self.module.bits, default=0) > 8
        dtypes = {
            "weight_zero": torch.uint8,
            "input_zero": torch.int32 if wide else torch.uint8,
            "choice": torch.uint8,
            "rows": torch.uint8 if self.rows <= 256 else torch.int32,
            "plain": None,
        }
        return dtypes.get(self.role, torch.float32), tuple(self.tensor.shape)

    @property
    def levels(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest level of the quantizer, as whole numbers that broadcast against the tensor."""
        if isinstance(self.module, InputQuantizer):
            levels = [(spec.qmin, spec.qmax) for spec in self.module.row_specs]
            ends = torch.tensor(levels, dtype=torch.int32, device="cpu")
            low, high = ends.reshape(-1, *(1,) * (self.tensor.ndim - 1), 2).unbind(-1)
            return low, high
        assert self.spec is not None
        return torch.tensor(self.spec.qmin, device="cpu"), torch.tensor(self.spec.qmax, device="cpu")


def slots_of(denoiser: nn.Module) -> dict[str, Slot]:
    """Every tensor that a checkpoint holds, by its name in the state dict; a tensor with two names has its first."""
    found: dict[str, Slot] = {}
    seen: set[int] = set()
    for prefix, module in denoiser.named_modules():
        hidden = module._non_persistent_buffers_set
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            slot = None if tensor is None or attribute in hidden else _slot(module, attribute)
            if slot is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{prefix}.{attribute}" if prefix else attribute] = slot
    return found


def _slot(module: nn.Module, attribute: str) -> Slot | None:
    if isinstance(module, QuantizedLayer) and attribute == "weight" and module.weight_quantizer is not None:
        quantizer = module.weight_quantizer
        assert isinstance(quantizer, WeightQuantizer)
        return Slot(module, attribute, "levels", quantizer.spec)
    if isinstance(module, WeightQuantizer):
        return Slot(module, attribute, "weight_scale" if attribute == "scale" else "weight_zero", module.spec)
    if isinstance(module, InputTransform):
        return Slot(module, attribute, "input_scale")
    if isinstance(module, InputQuantizer | LogQuantizer):
        if attribute == "row_of_bin":
            # With one row the table is all zeros.
            return Slot(module, attribute, "rows", module.spec, module.rows) if module.rows > 1 else None
        roles: dict[str, Role] = {"scale": "input_scale", "zero_point": "input_zero", "logarithmic": "choice"}
        return Slot(module, attribute, roles[attribute], module.spec, module.rows)
    if isinstance(module, StepClock):
        return Slot(module, attribute, "edges")
    return Slot(module, attribute, "plain")


def encoded(name: str, slot: Slot) -> Tensor:
    """The tensor as the file holds it. Raises CheckpointError if it could not be loaded again."""
    tensor = slot.tensor.detach().cpu()
    if slot.role == "levels":
        return _packed_levels(name, slot)
    if slot.role == "plain":
        return _narrowed(tensor)
    if slot.role in ("weight_zero", "input_zero"):
        low, high = slot.levels
        if not bool((tensor == tensor.round()).all()) or not bool(((tensor >= low) & (tensor <= high)).all()):
            raise CheckpointError(f"{name}: the zero point is not a level from {int(low.min())} to {int(high.max())}.")
        tensor = tensor - low
    dtype, _ = slot.stored
    encoded = tensor.to(dtype)
    check_value(name, slot, encoded)
    return encoded


def _packed_levels(name: str, slot: Slot) -> Tensor:
    layer = slot.module
    assert isinstance(layer, QuantizedLayer)
    quantizer, spec = layer.weight_quantizer, slot.spec
    assert isinstance(quantizer, WeightQuantizer)
    assert spec is not None
    with torch.no_grad():
        levels = quantizer.levels(layer.weight)
        weight = layer.weight if layer.on_grid else quantizer(layer.weight)
        if not torch.equal(quantizer.restore(levels).to(weight.dtype), weight):
            raise CheckpointError(
                f"{name} does not lie on the grid of its quantizer: something changed the weight or its scales after "
                "the layer was hardened."
            )
    return pack(levels.cpu().to(torch.int64) - spec.qmin, spec.bits)


def _narrowed(tensor: Tensor) -> Tensor:
    """A float32 tensor in float16 or bfloat16 if every bit comes back, otherwise as it is."""
    if tensor.dtype != torch.float32:
        return tensor
    for dtype in (torch.float16, torch.bfloat16):
        narrow = tensor.to(dtype)
        if torch.equal(narrow.float().view(torch.int32), tensor.contiguous().view(torch.int32)):
            return narrow
    return tensor


def check_value(name: str, slot: Slot, stored: Tensor) -> None:
    """Range checks on a tensor as the file holds it."""
    if slot.role in ("weight_scale", "input_scale"):
        if not bool(torch.isfinite(stored).all()):
            raise CheckpointError(f"{name}: a scale is NaN or infinite.")
        if not bool((stored > 0).all()):
            raise CheckpointError(f"{name}: a scale is {float(stored.min())}; scales are greater than 0.")
    elif slot.role in ("weight_zero", "input_zero"):
        assert slot.spec is not None
        low, high = (end.to(stored.device) for end in slot.levels)
        last = (high - low).expand(stored.shape)
        outside = (stored > last) | (stored < 0)
        if bool(outside.any()):
            raise CheckpointError(
                f"{name}: zero point {int(stored[outside][0])} is out of range, the last level is "
                f"{int(last[outside][0])}."
            )
        fixed = (-low if slot.spec.symmetric else torch.zeros_like(low)).expand(stored.shape)
        if (slot.spec.symmetric or slot.spec.nonnegative) and not bool((stored == fixed).all()):
            raise CheckpointError(
                f"{name}: the zero point of a symmetric or nonnegative quantizer is {int(fixed[stored != fixed][0])}."
            )
    elif slot.role == "choice":
        if stored.numel() and int(stored.max()) > 1:
            raise CheckpointError(f"{name}: {int(stored.max())} is no choice; it is 0 or 1.")
    elif slot.role == "rows":
        if stored.numel() and not 0 <= int(stored.min()) <= int(stored.max()) < slot.rows:
            raise CheckpointError(
                f"{name}: rows from {int(stored.min())} to {int(stored.max())}, but the quantizer has {slot.rows} rows."
            )
    elif slot.role == "edges" and not (bool(torch.isfinite(stored).all()) and bool((stored[1:] > stored[:-1]).all())):
        raise CheckpointError(f"{name}: the borders of the timestep bins are not finite and ascending.")


def decode_(slot: Slot, stored: Tensor, dtype: torch.dtype) -> None:
    """Put a stored tensor into its slot. dtype: of a plain tensor or weight."""
    if slot.role == "levels":
        # Restored by `restore_weight_`, once the scales are there.
        return
    if slot.role in ("weight_zero", "input_zero"):
        value = stored.float() + slot.levels[0].to(stored.device)
    elif slot.role == "plain":
        value = stored.to(dtype)
    else:
        value = stored.to(slot.tensor.dtype)
    slot.tensor.data = value


def restore_weight_(slot: Slot, stored: Tensor, dtype: torch.dtype) -> None:
    """Weights of a layer from its packed levels and the quantizer that `decode_` filled, in this dtype."""
    layer, spec = slot.module, slot.spec
    assert isinstance(layer, QuantizedLayer)
    assert isinstance(layer.weight_quantizer, WeightQuantizer)
    assert spec is not None
    levels = unpack(stored, spec.bits, layer.weight.numel()).float() + spec.qmin
    layer.weight.data = layer.weight_quantizer.restore(levels.reshape(layer.weight.shape)).to(dtype)
    layer.on_grid = True


def check_entries(path: Path, slots: Mapping[str, Slot], entries: Mapping[str, Entry], dtypes: Dtypes) -> None:
    """Names, dtypes and shapes of a file against those of the model."""
    for name in slots:
        if name not in entries:
            raise CheckpointError(f"{path} lacks tensor {name!r}.")
    for name, entry in entries.items():
        if name not in slots:
            raise CheckpointError(f"{path} has tensor {name!r}, which the model does not.{nearest(name, slots)}")
        dtype, shape = slots[name].stored
        if entry.shape != shape:
            raise CheckpointError(f"{path}, {name}: shape {list(entry.shape)}, expected {list(shape)}.")
        allowed = {dtype}
        if dtype is None:
            own = dtypes.of(name)
            allowed = {own, torch.float16, torch.bfloat16} if own == torch.float32 else {own}
        if entry.dtype not in allowed:
            raise CheckpointError(
                f"{path}, {name}: dtype {entry.dtype}, expected {' or '.join(sorted(map(str, allowed)))}."
            )


class Dtypes:
    """Dtype of each tensor of the model: one for all, and those that differ."""

    def __init__(self, identity: DenoiserIdentity) -> None:
        self.default = dtype_named(identity.dtype)
        self._others = {name: dtype_named(text) for name, text in identity.dtypes.items()}

    def of(self, name: str) -> torch.dtype:
        return self._others.get(name, self.default)


def dtype_named(text: str) -> torch.dtype:
    """`"float16"` -> torch.float16. Raises CheckpointError for any other text."""
    found = getattr(torch, text, None) if text.isidentifier() else None
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{MANIFEST_NAME}: there is no dtype {text!r}.")
    return found


def dtype_text(dtype: torch.dtype) -> str:
    """torch.float16 -> "float16"."""
    return str(dtype).removeprefix("torch.")
