"""What `auto` puts in a denoiser's place where it has chosen a graph: a graph if one can be made, else the simulation.

Graphs are made at the first call, from what the denoiser is called with, and that may fail: an operation that has no
graph, an argument that is no tensor, no memory, no space on the disk. By name (`engine="openvino"`) that is an error;
nobody has asked for `auto`, so it must not break a pipeline that runs without it.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from stepquant.engines.openvino import GraphDenoiser, OpenVINOEngine, content_of
from stepquant.engines.stand_in import changes, no_change
from stepquant.errors import EngineError
from stepquant.model.clock import keep_float32

__all__ = ["AutomaticDenoiser"]

logger = logging.getLogger(__name__)


class AutomaticDenoiser(nn.Module):
    """A simulated denoiser that becomes a graph at its first call: same call, same `config`, `dtype` and the rest.

    The first call on the CPU makes the graph and lets go of the simulated denoiser; until then both are in memory, and
    from then on there are no gradients and no other devices (EngineError says so). If that call fails as a graph and
    not as a simulation, a warning names the reason and the denoiser stays simulated: so does one whose first call asks
    for gradients. Before, it can be moved and cast; calls on another device, and those that torch.compile traces, are
    simulated and decide nothing.

    Methods that change the denoiser (`enable_freeu`) are refused once there is a graph. Before, they reach it and it
    stays simulated, with a warning: a graph could not follow the next change.

    It has no parameters and cannot be saved. Adapters are refused in every state: diffusers switches them on and off by
    the denoiser's class, which is another one here.
    """

    def __init__(self, simulated: nn.Module, engine: OpenVINOEngine) -> None:
        super().__init__()
        # Neither is registered: whoever looks for layers must find none, in either state, instead of other names.
        self._hold(simulated)
        # Two threads with the first call would make the graph twice.
        self._deciding = threading.RLock()
        self._engine = engine
        self._stays_simulated = False
        # Shapes for which there is no graph though there is one for others: looking for it takes long.
        self._without: set[str] = set()
        self._told_of_device = False
        dtype = next((p.dtype for p in simulated.parameters() if p.is_floating_point()), torch.float32)
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)
        self.train(False)

    _present: nn.Module
    _like: Tensor

    def _hold(self, present: nn.Module) -> None:
        """Put the simulated denoiser or the graph here: one attribute, which other threads read at any moment."""
        object.__setattr__(self, "_present", present)

    @property
    def _simulated(self) -> nn.Module | None:
        """The simulated denoiser, None once there is a graph."""
        present = self._present
        return None if isinstance(present, GraphDenoiser) else present

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock, which copies and pickles make anew."""
        return {name: value for name, value in self.__dict__.items() if name != "_deciding"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_deciding": threading.RLock()})  # type: ignore[no-untyped-call]

    @property
    def content(self) -> str:
        """`content_of` the denoiser that it was made from: the same before and after there is a graph."""
        present = self._present
        return present.content if isinstance(present, GraphDenoiser) else content_of(present)

    @property
    def precision(self) -> str:
        return self._engine.precision

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    def __getattr__(self, name: str) -> Any:
        """What pipelines read of their denoiser: its configuration, its embeddings' sizes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not before there is anything to ask, as while a copy is made, and nothing that Python asks for itself.
            if "_present" not in self.__dict__ or name.startswith("__"):
                raise
        present = self._present
        value = getattr(present, name)
        if isinstance(present, GraphDenoiser) or not changes(present, name, value):
            return value

        def called(*args: Any, **kwargs: Any) -> Any:
            if any(word in name for word in ("adapter", "lora", "attn_procs")):
                raise _no_adapters()
            if name.startswith(("save_", "push_")):
                raise no_change(present, f"{name}()")
            return self._change(f"{name}()", name, *args, **kwargs)

        return called

    def __setattr__(self, name: str, value: Any) -> None:
        present = self.__dict__.get("_present")
        own = name in self.__dict__ or name in self.__dict__.get("_buffers", ()) or hasattr(type(self), name)
        if present is None or own or not hasattr(present, name):
            super().__setattr__(name, value)
        else:
            self._change(f"Setting {name}", "__setattr__", name, value)

    def _change(self, what: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the simulated denoiser, which stays one."""
        with self._deciding:
            present = self._present
            if isinstance(present, GraphDenoiser):
                return getattr(present, method)(*args, **kwargs)  # which refuses
            if not self._stays_simulated:
                self._stays_simulated = True
                logger.warning(
                    "%s changes the denoiser, which stays simulated arithmetic for that, in the time of full precision "
                    "or more. To run it as a graph, load the checkpoint with engine='simulated', change it, and "
                    "compile it then: place(pipe.unet, 'openvino') of stepquant.engines.base.",
                    what,
                )
            return getattr(present, method)(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of the simulated denoiser; nothing once there is a graph."""
        return self._present.state_dict(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the simulated denoiser. A graph stays where and what it is, and its next call says so."""
        if self._simulated is not None:
            self._simulated.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def half(self) -> Self:
        """As the simulated denoiser: diffusers refuses to cast quantized models."""
        if self._simulated is not None:
            self._simulated.half()
        return super().half()

    def float(self) -> Self:
        """As the simulated denoiser: diffusers refuses to cast quantized models."""
        if self._simulated is not None:
            self._simulated.float()
        return super().float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self._simulated is None:
            keep_float32(self, fn)
            return self
        # torch has not annotated it.
        simulated, own = cast(Any, self._simulated), cast(Any, super())
        simulated._apply(fn, recurse)
        own._apply(fn, recurse)
        return self

    def add_adapter(self, *_: Any, **__: Any) -> None:
        """Raises EngineError."""
        raise _no_adapters()

    def load_lora_adapter(self, *_: Any, **__: Any) -> None:
        """Raises EngineError."""
        raise _no_adapters()

    def load_attn_procs(self, *_: Any, **__: Any) -> None:
        """Raises EngineError."""
        raise _no_adapters()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        present = self._present
        if isinstance(present, GraphDenoiser):
            return self._later(present, *args, **kwargs)
        if self._stays_simulated or torch.compiler.is_compiling() or self._elsewhere():
            return present(*args, **kwargs)
        del present
        with self._deciding:
            if not self._stays_simulated and self._simulated is not None:
                return self._first(*args, **kwargs)
        return self(*args, **kwargs)  # another thread has decided meanwhile

    def _later(self, graph: GraphDenoiser, *args: Any, **kwargs: Any) -> Any:
        """A call once there is a graph: by the graph of its shapes, or by torch if there is none."""
        arguments = graph.checked(*args, **kwargs)
        shapes = repr(_outline(arguments))
        if shapes not in self._without:
            try:
                return graph(*args, **kwargs)
            except Exception as error:
                # As at the first call: if this raises as well it is the call that is wrong.
                found = graph.in_torch(*args, **kwargs)
                if not self._without:
                    logger.warning(
                        "Engine 'openvino' could not take a call of other shapes. It runs in torch instead, in the "
                        "time of full precision or more, and so do all for which that happens: %s",
                        str(error) or type(error).__name__,
                    )
                self._without.add(shapes)
                return found
        return graph.in_torch(*args, **kwargs)

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        """The call that decides."""
        simulated = self._present
        try:
            graph = self._engine.compile(simulated)
            found = graph(*args, **kwargs)
        except Exception as error:  # the denoiser's own code runs while a graph is made, and can raise anything
            # If this raises as well it is the call that is wrong, and the next one may be right.
            found = simulated(*args, **kwargs)
            self._stays_simulated = True
            logger.warning(
                "Engine 'openvino' could not take the denoiser, which runs as simulated arithmetic instead, in the "
                "time of full precision or more: %s",
                str(error) or type(error).__name__,
            )
            return found
        self._hold(graph)
        del simulated
        # A diffusers model refers to itself, so it would stay in memory until somebody collects.
        gc.collect()
        return found

    def _elsewhere(self) -> bool:
        """Whether the denoiser has been moved from the CPU; says so once."""
        device = self.device
        if device.type == "cpu":
            return False
        if not self._told_of_device:
            logger.info("Engine 'simulated': the denoiser has been moved to %s, and OpenVINO runs on the CPU.", device)
            self._told_of_device = True
        return True

    def extra_repr(self) -> str:
        return f"runs={type(self._present).__name__}"


def _outline(value: Any) -> Any:
    """What decides which graph a call needs."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, dict):
        return {key: _outline(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_outline(entry) for entry in value]
    return value if isinstance(value, bool | int | float | str) else type(value)


def _no_adapters() -> EngineError:
    return EngineError(
        "Adapters do not go onto a denoiser that may run as a graph: load the checkpoint with engine='simulated'."
    )
