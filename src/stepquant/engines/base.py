"""Engines: ways to run a quantized layer. An engine says which layers it refuses, and packs the others.

Engines are chosen per layer, so a model may run on several. `simulated` refuses nothing and is what remains where every
other engine has refused. Graph engines take the whole denoiser instead; layers that they refuse run as simulated
arithmetic inside the graph.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from stepquant.engines.int_mm import IntMmEngine
from stepquant.engines.onednn import OneDnnEngine
from stepquant.engines.openvino import OpenVINOEngine
from stepquant.engines.reference import ReferenceEngine
from stepquant.errors import EngineError, nearest
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.surgery import quantized_layers

__all__ = ["Engine", "GraphEngine", "Placement", "SimulatedEngine", "choose", "engines", "pack_", "place"]

logger = logging.getLogger(__name__)

Layer = QuantizedLayer | QuantizedMatmul


class Engine(Protocol):
    """One way to run layers. name: what users call it."""

    @property
    def name(self) -> str: ...

    def refuses(self, layer: Layer, device: torch.device) -> str | None:
        """Why this engine cannot run the layer on the device, as a sentence, or None if it can."""
        ...

    def pack(self, layer: Layer) -> nn.Module:
        """A module that runs the layer. Only called for layers that are not refused."""
        ...


@runtime_checkable
class GraphEngine(Protocol):
    """A way to run a whole denoiser."""

    @property
    def name(self) -> str: ...

    def refuses(self, layer: Layer, device: torch.device) -> str | None:
        """Why the layer does not run on integers in the graph, as a sentence, or None if it does."""
        ...

    def compile(self, denoiser: nn.Module) -> nn.Module:
        """A module that is called as the denoiser is."""
        ...


@dataclass(frozen=True)
class Placement:
    """Where a layer runs. refusals: why every engine that cannot run it cannot."""

    engine: str
    refusals: Mapping[str, str]


@dataclass(frozen=True)
class SimulatedEngine:
    """Leaves layers as they are: weights in floating point on their grid, inputs rounded and scaled back."""

    name: str = "simulated"

    def refuses(self, layer: Layer, device: torch.device) -> str | None:  # noqa: ARG002
        return None

    def pack(self, layer: Layer) -> nn.Module:
        return layer


def engines() -> dict[str, Engine | GraphEngine]:
    """Every engine by name."""
    known: tuple[Engine | GraphEngine, ...] = (
        SimulatedEngine(),
        ReferenceEngine(),
        OpenVINOEngine(),
        OneDnnEngine(),
        IntMmEngine(),
    )
    return {engine.name: engine for engine in known}


# The engines that `auto` asks, in order: the fastest that does not refuse. `reference` trades time for memory and is
# only used by name: it unpacks every weight on every call. So is `int_mm`, until it has been run on a GPU.
AUTO_ORDER = ("simulated",)


def choose(layer: Layer, device: torch.device, engine: str = "auto") -> Placement:
    """The engine that runs a layer. Whoever is asked for by name and refuses, hands over to `simulated`.

    Raises EngineError for an unknown engine.
    """
    if engine != "auto":
        _known(engine)
    answers = {name: known.refuses(layer, device) for name, known in engines().items()}
    refusals = {name: reason for name, reason in answers.items() if reason is not None}
    order = AUTO_ORDER if engine == "auto" else (engine, "simulated")
    return Placement(next(name for name in order if name not in refusals), refusals)


def pack_(denoiser: nn.Module, engine: str = "auto") -> dict[str, Placement]:
    """Put packed layers in the place of the denoiser's quantized ones. Returns where each layer runs.

    engine: a name of `engines()`, or "auto". Layers that it refuses stay simulated.
    A packed model runs but cannot be saved or calibrated: keep the checkpoint.
    Where it refuses every layer, a warning says why and what that costs.
    """
    if engine != "auto":
        _known(engine)
    layers = quantized_layers(denoiser)
    placed = {name: choose(layer, _device_of(layer), engine) for name, layer in layers.items()}
    found = engines()
    packed: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        runs = found[placed[name].engine]
        if isinstance(runs, GraphEngine):
            raise EngineError(f"Engine {runs.name!r} runs whole denoisers, not layers: use place() or load().")
        packed[id(layer)] = runs.pack(layer)
    for parent in list(denoiser.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and id(child) in packed:
                parent._modules[key] = packed[id(child)]
    _warn_of_none(engine, placed)
    return placed


def place(denoiser: nn.Module, engine: str | GraphEngine = "auto") -> tuple[nn.Module, dict[str, Placement]]:
    """The module that runs the denoiser, and where each of its layers runs.

    engine: as for `pack_`, which changes the denoiser itself; or a graph engine, by name or with its settings, which
        returns another module.
    """
    runs = _known(engine) if isinstance(engine, str) and engine != "auto" else engine
    if not isinstance(runs, GraphEngine):
        return denoiser, pack_(denoiser, runs if isinstance(runs, str) else runs.name)
    placed = {name: choose(layer, _device_of(layer), runs.name) for name, layer in quantized_layers(denoiser).items()}
    compiled = runs.compile(denoiser)
    _warn_of_none(runs.name, placed)
    return compiled, placed


def _warn_of_none(engine: str, placed: Mapping[str, Placement]) -> None:
    """Say so if the engine that was asked for takes no layer at all: nothing runs faster then."""
    if engine == "auto" or not placed or any(placement.engine == engine for placement in placed.values()):
        return
    reasons = Counter(placement.refusals[engine] for placement in placed.values())
    text = " ".join(f"({count}) {reason}" for reason, count in reasons.most_common())
    logger.warning(
        "Engine %r takes none of the %d quantized layers. They run as simulated arithmetic: the time of the "
        "full-precision layers, and that of rounding their inputs besides. Layers and reasons: %s",
        engine,
        len(placed),
        text,
    )


def _known(name: str) -> Engine | GraphEngine:
    found = engines()
    if name not in found:
        names = ("auto", *found)
        raise EngineError(f"There is no engine {name!r}, only {', '.join(names)}.{nearest(name, names)}")
    return found[name]


def _device_of(layer: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
