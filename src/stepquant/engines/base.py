"""Engines: ways to run a quantized layer. An engine says which layers it refuses, and packs the others.

Engines are chosen per layer, so a model may run on several. `simulated` refuses nothing and is what remains where every
other engine has refused. Graph engines take the whole denoiser instead; layers that they refuse run as simulated
arithmetic inside the graph. `auto` chooses once for the whole denoiser (`automatic`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from stepquant.engines.automatic import AutomaticDenoiser
from stepquant.engines.graph import refused_for_hooks
from stepquant.engines.int_mm import IntMmEngine
from stepquant.engines.onednn import OneDnnEngine
from stepquant.engines.openvino import OpenVINOEngine, has_bf16, usable
from stepquant.engines.reference import ReferenceEngine
from stepquant.engines.weight_only import WeightOnlyEngine
from stepquant.errors import EngineError, UnknownEngine, nearest
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.surgery import quantized_layers

__all__ = [
    "Engine",
    "GraphEngine",
    "Placement",
    "SimulatedEngine",
    "automatic",
    "check_name",
    "choose",
    "engines",
    "pack_",
    "place",
]

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


@runtime_checkable
class RemarkingEngine(Protocol):
    """An engine that does not run every call of a layer in the way that its name says."""

    def remark(self, layer: Layer) -> str | None:
        """Which calls of the layer run otherwise, as a sentence, or None. Only asked of layers that are not refused."""
        ...


@dataclass(frozen=True)
class Placement:
    """Where a layer runs. refusals: why every engine that cannot run it cannot.

    remarks: of engines that can, what they run otherwise than by their name.
    """

    engine: str
    refusals: Mapping[str, str]
    remarks: Mapping[str, str]


@dataclass(frozen=True)
class SimulatedEngine:
    """Leaves layers as they are: weights in floating point on their grid, inputs rounded and scaled back."""

    name: str = "simulated"

    def refuses(self, layer: Layer, device: torch.device) -> str | None:  # noqa: ARG002
        return None

    def pack(self, layer: Layer) -> nn.Module:
        return layer


_SHORT = "openvino-bf16"

MOSTLY = 0.5
"""Share of weights that must run on integers for `auto` to take a graph: a choice of ours, not measured."""


def engines() -> dict[str, Engine | GraphEngine]:
    """Every engine by name."""
    known: tuple[Engine | GraphEngine, ...] = (
        SimulatedEngine(),
        ReferenceEngine(),
        OpenVINOEngine(),
        OneDnnEngine(),
        IntMmEngine(),
        WeightOnlyEngine(),
    )
    return {engine.name: engine for engine in known}


def automatic(layers: Mapping[str, Layer]) -> tuple[str, str]:
    """The engine that `auto` takes for a denoiser with these quantized layers, and why, as a clause.

    "openvino" if there are layers whose weight and input are both quantized, and OpenVINO runs those with half of their
    weights or more (`MOSTLY`) on integers; so never without VNNI or elsewhere than on the CPU. "simulated" in every
    other case, and where a layer has a hook, which a graph would not call. Layers with a floating-point weight or
    input, and the matmuls of attention, are not asked about: they run in floating point in both. The other engines are
    used by name only: `reference` trades time for memory, `onednn` is for denoisers that have no graph, and `int_mm`
    and `weight_only` have not been run on a GPU.

    `with_precision` says in what the graph computes the rest.
    """
    engine = OpenVINOEngine()
    wanted = _quantized_throughout(layers)
    if not wanted:
        return "simulated", "there is no layer whose weight and input are both quantized"
    refusals = {name: engine.refuses(layer, _device_of(layer)) for name, layer in wanted.items()}
    refused = {name: reason for name, reason in refusals.items() if reason is not None}
    if not refused:
        return engine.name, f"it runs all {len(wanted)} layers with quantized weights and inputs on integers"
    name, reason = next(iter(refused.items()))
    share = 1 - _weights_of(refused, wanted) / _weights_of(wanted, wanted)
    if share < MOSTLY or any(refused_for_hooks(layer) is not None for layer in layers.values()):
        return (
            "simulated",
            f"OpenVINO does not run {len(refused)} of the {len(wanted)} layers with quantized weights and inputs on "
            f"integers. {name}, for one: {reason}",
        )
    return (
        engine.name,
        f"it runs {len(wanted) - len(refused)} of the {len(wanted)} layers with quantized weights and inputs on "
        f"integers, which have {100 * share:.0f} % of the weights. Not {name}, for one: {reason}",
    )


def _weights_of(names: Iterable[str], layers: Mapping[str, QuantizedLayer]) -> int:
    return sum(layers[name].weight.numel() for name in names)


def with_precision(name: str, layers: Mapping[str, Layer] | None = None) -> str:
    """What `auto` takes on this processor, by name: "openvino-bf16" for "openvino" where it multiplies bfloat16.

    What a graph computes in floating point is in bfloat16 then, as OpenVINO has it by default, unless some of these
    layers run as simulated arithmetic inside the graph: in bfloat16, their inputs would be rounded to other levels. By
    name, "openvino" is in float32 and "openvino-bf16" in bfloat16.
    """
    if name != OpenVINOEngine.name or not has_bf16():
        return name
    engine = OpenVINOEngine()
    simulated = _quantized_throughout(layers or {}).values()
    return name if any(engine.refuses(layer, _device_of(layer)) for layer in simulated) else _SHORT


def choose(layer: Layer, device: torch.device, engine: str = "simulated") -> Placement:
    """Where a layer runs if this engine is taken. One that refuses hands over to `simulated`.

    Raises UnknownEngine for one that there is not.
    """
    _known(engine)
    found = engines()
    hooked = refused_for_hooks(layer)
    answers = {
        name: known.refuses(layer, device) if hooked is None or isinstance(known, SimulatedEngine) else hooked
        for name, known in found.items()
    }
    refusals = {name: reason for name, reason in answers.items() if reason is not None}
    said = {
        name: known.remark(layer)
        for name, known in found.items()
        if isinstance(known, RemarkingEngine) and name not in refusals
    }
    remarks = {name: remark for name, remark in said.items() if remark is not None}
    return Placement("simulated" if engine in refusals else engine, refusals, remarks)


def pack_(denoiser: nn.Module, engine: str = "simulated") -> dict[str, Placement]:
    """Put packed layers in the place of the denoiser's quantized ones. Returns where each layer runs.

    engine: a name of `engines()`. Layers that it refuses stay simulated.
    A packed model runs but cannot be saved or calibrated: keep the checkpoint.
    Where it refuses every layer, a warning says why and what that costs.
    """
    _known(engine)
    layers, placed = quantized_layers(denoiser), _placements(denoiser, engine)
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
    partly = [name for name, placement in placed.items() if engine == placement.engine and engine in placement.remarks]
    if partly:
        logger.info(
            "Engine %r: %d layers run some calls otherwise. %s, for one: %s",
            engine,
            len(partly),
            partly[0],
            placed[partly[0]].remarks[engine],
        )
    return placed


def place(denoiser: nn.Module, engine: str | GraphEngine = "auto") -> tuple[nn.Module, dict[str, Placement]]:
    """The module that runs the denoiser, and where each of its layers runs.

    engine: a name as for `pack_`, which changes the denoiser itself; a graph engine, by name ("openvino-bf16" is the
        one with `precision="bf16"`) or with its settings, which returns another module; or "auto", which is the one
        that `automatic` says. Its graph is tried at the first call, and the denoiser stays simulated if there is none
        (`AutomaticDenoiser`).
    """
    if engine == "auto":
        return _placed_automatically(denoiser)
    runs = _by_name(engine) if isinstance(engine, str) else engine
    if not isinstance(runs, GraphEngine):
        return denoiser, pack_(denoiser, runs.name)
    placed = _placements(denoiser, runs.name)
    compiled = runs.compile(denoiser)
    _warn_of_none(runs.name, placed)
    return compiled, placed


def _placed_automatically(denoiser: nn.Module) -> tuple[nn.Module, dict[str, Placement]]:
    layers = quantized_layers(denoiser)
    chosen, reason = automatic(layers)
    name = with_precision(chosen, layers)
    engine = OpenVINOEngine(precision="bf16" if name == _SHORT else "f32")
    logger.info("Engine %r: %s.", name, reason.removesuffix("."))
    placed = _placements(denoiser, chosen)
    wanted = _quantized_throughout(layers).values()
    # Where the machine is the reason, that is the same for all checkpoints, and nothing to warn of.
    if chosen == "simulated" and wanted and usable() and all(_device_of(layer).type == "cpu" for layer in wanted):
        logger.warning(
            "The denoiser runs as simulated arithmetic: the time of the full-precision layers, and that of rounding "
            "their inputs besides. %s",
            reason,
        )
    return denoiser if chosen == "simulated" else AutomaticDenoiser(denoiser, engine), placed


def _quantized_throughout(layers: Mapping[str, Layer]) -> dict[str, QuantizedLayer]:
    """Those whose weight and input are both quantized."""
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, QuantizedLayer) and None not in (layer.weight_quantizer, layer.input_quantizer)
    }


def _placements(denoiser: nn.Module, engine: str) -> dict[str, Placement]:
    return {name: choose(layer, _device_of(layer), engine) for name, layer in quantized_layers(denoiser).items()}


def _warn_of_none(engine: str, placed: Mapping[str, Placement]) -> None:
    """Say so if the engine that was asked for takes no layer at all: nothing runs faster then."""
    if not placed or any(placement.engine == engine for placement in placed.values()):
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


def check_name(name: str) -> None:
    """Raise UnknownEngine for a name that `place` does not know."""
    if name != "auto":
        _by_name(name)


def _by_name(name: str) -> Engine | GraphEngine:
    """An engine, or one with a setting that has a name of its own."""
    return OpenVINOEngine(precision="bf16") if name == _SHORT else _known(name, ("auto", *engines(), _SHORT))


def _known(name: str, names: Sequence[str] = ()) -> Engine | GraphEngine:
    """names: all that the caller takes, for the message, if they are more than those of engines."""
    found = engines()
    if name not in found:
        names = names or tuple(found)
        raise UnknownEngine(f"There is no engine {name!r}, only {', '.join(names)}.{nearest(name, names)}")
    return found[name]


def _device_of(layer: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
