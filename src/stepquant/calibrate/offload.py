"""A network whose blocks are in main memory and come to the device in turn.

What lies outside of the blocks, and the block with the first parameter (pipelines ask that one where the network is),
stays on the device, and so do activations. A block's tensors are copied there when the block is called, and the copies
are gone when it returns:

    on the device at a time     outside + one block          forward
                                outside + one weight         backward, beside the graph

Autograd keeps a reference to the tensor at home where it would keep a copy, and fetches the weight again when its turn
comes; gradients of parameters arrive at home. So the whole network can be differentiated without ever being on the
device.

Why not diffusers' group offloading or accelerate's hooks: the first exchanges `param.data`, which autograd's graph then
sees (wrong gradients without an error), and from disk brings back what was there before a stage rounded it; with the
second, the graph keeps every block on the device.

On a CPU blocks are copied within main memory. That serves nobody but tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from stepquant.errors import CalibrationError, ModelError, SpecError, UnsupportedPipeline
from stepquant.model.families import block_classes, other_denoisers
from stepquant.model.layer import QuantizedLayer
from stepquant.recipe import Job

__all__ = ["blocks_in_turn", "brought", "is_offloaded", "offloaded", "released_", "settle_"]

HOME = torch.device("cpu")


def blocks_in_turn(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The blocks that come in turn, by name: the outermost ones, without the one that has the first parameter.

    Nor any that is a single layer: a quantized one will take its place.
    """
    classes = block_classes(denoiser)
    first = next((name for name, _ in denoiser.named_parameters()), "")
    found: dict[str, nn.Module] = {}
    for name, module in denoiser.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and type(module).__name__ in classes and not inside and any(module.children()):
            found[name] = module
    return {name: block for name, block in found.items() if not first.startswith(f"{name}.")}


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; differentiable, so that a gradient finds its way home."""
    return tensor.to(device, copy=True)


@dataclass(frozen=True)
class _Saved:
    """What the graph keeps of a block's tensor: where it is at home, and which view of it was used."""

    home: Tensor
    version: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def fetched(self, device: torch.device) -> Tensor:
        if self.home._version != self.version:
            raise CalibrationError(
                "A block's tensor was changed between the forward and the backward pass that needs it."
            )
        return _copied(self.home.detach(), device).as_strided(self.size, self.stride, self.offset)


class _InTurn:
    """Stands in the place of a block's `forward`. A deep copy of the block gets one of its own.

    resident: the block's tensors are on the device already (`brought`).
    """

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self.block, self.device = block, device
        self.resident = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.block).forward
        if self.resident:
            return forward(self.block, *args, **kwargs)
        with self._here():
            return forward(self.block, *args, **kwargs)

    @contextmanager
    def _here(self) -> Iterator[None]:
        """Inside, the block holds copies on the device in the place of its tensors."""
        copies: dict[int, Tensor] = {}
        homes: dict[int, Tensor] = {}
        replaced: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for module in _called(self.block):
                stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
                for store in stores:
                    for name, home in store.items():
                        if home is None or home.device != HOME:
                            continue
                        if id(home) not in copies:
                            copies[id(home)] = _copied(home, self.device)
                            homes[_storage(copies[id(home)])] = home
                        replaced.append((store, name, home))
            for store, name, home in replaced:
                store[name] = copies[id(home)]
            with self._fetching(homes):
                yield
        finally:
            for store, name, home in replaced:
                store[name] = home

    @contextmanager
    def _fetching(self, homes: dict[int, Tensor]) -> Iterator[None]:
        """Inside, the graph keeps what is at home instead of copies.

        homes: storage of a copy -> the tensor at home.
        """
        if not torch.is_grad_enabled():
            yield
            return

        def pack(tensor: Tensor) -> Tensor | _Saved:
            home = homes.get(_storage(tensor))
            if home is None or home.dtype != tensor.dtype:
                return tensor
            return _Saved(home, home._version, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

        def unpack(kept: Tensor | _Saved) -> Tensor:
            return kept.fetched(self.device) if isinstance(kept, _Saved) else kept

        with saved_tensors_hooks(pack, unpack):
            yield


def _called(block: nn.Module) -> list[nn.Module]:
    """The modules of a block without the weight quantizers that no forward call asks: the weight is rounded already."""
    idle = {
        id(part)
        for layer in block.modules()
        if isinstance(layer, QuantizedLayer) and layer.on_grid and layer.weight_quantizer is not None
        for part in layer.weight_quantizer.modules()
    }
    return [module for module in block.modules() if id(module) not in idle]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _in_turn(module: nn.Module) -> _InTurn | None:
    found = vars(module).get("forward")
    return found if isinstance(found, _InTurn) else None


def is_offloaded(network: nn.Module) -> bool:
    """Whether its blocks come in turn."""
    return any(_in_turn(module) for module in network.modules())


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers that the modules themselves hold."""
    found = [
        tensor
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]
    return [*{id(tensor): tensor for tensor in found}.values()]


def _outside(network: nn.Module) -> list[nn.Module]:
    """The modules that are in no block that comes in turn."""
    inside = {id(part) for module in network.modules() if _in_turn(module) for part in module.modules()}
    return [module for module in network.modules() if id(module) not in inside]


def _put_(tensor: Tensor, device: torch.device) -> None:
    """In place, so that whoever holds the tensor has it where it is now. Its gradient is spent and stays behind."""
    tensor.grad = None
    tensor.data = _copied(tensor.data, device)


def _move_(tensors: Iterable[Tensor], device: torch.device) -> None:
    for tensor in tensors:
        if tensor.device != device:
            _put_(tensor, device)


def settle_(network: nn.Module, device: torch.device) -> None:
    """Move a network to the device; of an offloaded one only what stays there, the blocks go home."""
    if not is_offloaded(network):
        network.to(device)
        return
    outside = _outside(network)
    known = {id(module) for module in outside}
    _move_(_tensors(module for module in network.modules() if id(module) not in known), HOME)
    _move_(_tensors(outside), device)


def released_(network: nn.Module) -> nn.Module:
    """The network, wholly at home and without anything of what this file put in it."""
    for module in network.modules():
        if _in_turn(module):
            del module.forward
    _move_(_tensors(network.modules()), HOME)
    return network


@contextmanager
def offloaded(pipe: Any, denoiser: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Inside, the pipeline runs on the device and the blocks of its denoisers come there in turn; None changes nothing.

    Other networks of the pipeline (text encoders, a ControlNet) are wholly on the device inside. Afterwards everything
    is where it was.
    Raises SpecError if there is no such device or a network is not in main memory, ModelError for a network without
    known blocks, UnsupportedPipeline for one that another library offloads.
    """
    if device is None:
        yield
        return
    device = _present(device)
    networks = [denoiser, *other_denoisers(pipe, denoiser)]
    others = [part for part in getattr(pipe, "components", {}).values() if isinstance(part, nn.Module)]
    others = [part for part in others if not any(part is network for network in networks)]
    for network in (*networks, *others):
        _refuse_unfit(network)
    blocks = [block for network in networks for block in _blocks_of(network)]
    try:
        for block in blocks:
            block.forward = _InTurn(block, device)
        for network in networks:
            settle_(network, device)
        for part in others:
            _move_(_tensors(part.modules()), device)
        yield
    finally:
        for network in (*networks, *others):
            released_(network)


def _blocks_of(network: nn.Module) -> list[nn.Module]:
    found = [*blocks_in_turn(network).values()]
    if not found:
        raise ModelError(
            f"{type(network).__name__} has no blocks that could come to the device in turn (offload): none of its "
            "modules is of a class that diffusers repeats (_repeated_blocks). Name them in an attribute of the "
            'network, stepquant_blocks = ("MyBlock",), or calibrate without offload.'
        )
    return found


def _present(device: torch.device) -> torch.device:
    """The device with its number."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise SpecError(f"Blocks cannot be brought to {device} (offload): {error}") from None


def _refuse_unfit(network: nn.Module) -> None:
    kind = type(network).__name__
    for module in network.modules():
        if any(hasattr(module, name) for name in ("_hf_hook", "_diffusers_hook")):
            raise UnsupportedPipeline(
                f"{kind} is offloaded by diffusers or accelerate already. Open the pipeline without, in main memory; "
                "offload does the rest."
            )
        if "forward" in vars(module):
            raise UnsupportedPipeline(
                f"The `forward` of a {type(module).__name__} in {kind} has been replaced by something else, so its "
                "block cannot come to the device in turn (offload)."
            )
    away = next((tensor.device for tensor in _tensors(network.modules()) if tensor.device != HOME), None)
    if away is not None:
        raise SpecError(
            f"{kind} is on {away}, and with offload networks begin in main memory: open the pipeline without a device."
        )


@contextmanager
def brought(job: Job, module: nn.Module) -> Iterator[None]:
    """Inside, a block of the quantized denoiser, or a layer of it, is on the device, to be fitted there.

    The tensors are the same objects, so what is done to them stays; on leaving they are at home again, without
    gradients. Nothing happens in a run without offload, or to what stays on the device.
    """
    device = job.run.offload
    if device is None or not any(tensor.device == HOME for tensor in _tensors(module.modules())):
        yield
        return
    with ExitStack() as stack:
        for part in module.modules():
            turn = _in_turn(part)
            if turn is not None:
                turn.resident = True
                stack.callback(setattr, turn, "resident", False)
        for tensor in _tensors(module.modules()):
            _put_(tensor, device)
        try:
            yield
        finally:
            # What has been put into the module meanwhile goes home too.
            for tensor in _tensors(module.modules()):
                _put_(tensor, HOME)
