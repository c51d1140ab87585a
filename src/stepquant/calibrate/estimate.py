"""What a run will take, from one image that is sampled in a few steps and from what the recipe says.

trajectories   samples * (first step + (steps - 1) * further step)     bytes of tensors that are new in a step
caches         entries * (outputs of the units that are captured together + inputs of one of them)
kept           entries * outputs of units that later ones read, of both networks
time           evaluations of the network * time of one
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibrate.balance import BalanceChannels
from stepquant.calibrate.bias_correction import CorrectBiases
from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.offload import blocks_in_turn
from stepquant.calibrate.prefix import IN_MEMORY, Flow, flow_of, most_kept
from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks, output_tensors
from stepquant.calibrate.spilled import names_in
from stepquant.calibrate.split_shortcuts import SplitShortcuts
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select, calibration_seeds
from stepquant.calibrate.steps import DenoiserCall, cached_tensors
from stepquant.calibrate.trajectory import Trajectory, record, seal
from stepquant.calibrate.trajectory_files import packed
from stepquant.calibrate.window_fitting import FitWindows
from stepquant.model.pipeline import arguments_of_batch
from stepquant.model.surgery import quantizable, units_of
from stepquant.recipe import Job, Recipe, Stage
from stepquant.run import Run

__all__ = ["Costs", "Estimate", "estimated", "largest_inputs"]

_PROBE_STEPS = 5
"""The first step of a trajectory keeps what is the same in all steps. Solvers of up to fourth order are past their
beginning after so many. The two steps before the last stand for the others: Heun's are of two kinds in turn, and some
solvers end without a new sample.
"""


@dataclass(frozen=True)
class Estimate:
    """Bytes and time, of the whole calibration. Activations, gradients and optimizers of a mini-batch are not counted.

    network: bytes of the denoiser. There are two, the quantized one and the full-precision one.
    recording: bytes of all trajectories; batch: of those that are recorded at a time.
    caches: bytes of the largest group of units that is fitted together.
    kept: bytes of what final units have returned, so as not to run them again, in main memory up to `IN_MEMORY`.
    seconds: of the evaluations of the network in stages whose number is known, at the speed of the full-precision
        network, one image at a time.
    uncounted: other stages; their time comes on top.
    outside, block: bytes of the denoiser outside of the blocks that `Run.offload` brings in turn, and of the largest
        one. All of it counts as outside if it has no such blocks.
    """

    network: int
    recording: int
    batch: int
    caches: int
    seconds: float
    uncounted: tuple[str, ...]
    outside: int = 0
    block: int = 0
    kept: int = 0

    def memory(self, max_memory: int | None) -> int:
        """Bytes in main memory, or on the device, for `Run.max_memory`."""
        return 2 * self.network + self._data(max_memory) + self._kept_in_memory(max_memory)

    def at_home(self, max_memory: int | None) -> int:
        """Bytes in main memory in a run with `Run.offload`."""
        return 2 * self.network + self._kept_in_memory(max_memory)

    def on_device(self, max_memory: int | None) -> int:
        """Bytes on the device in a run with `Run.offload`."""
        return 2 * self.outside + self.block + self._data(max_memory)

    def _kept_in_memory(self, max_memory: int | None) -> int:
        return min(self.kept, IN_MEMORY) if max_memory is None else 0

    def _data(self, max_memory: int | None) -> int:
        if max_memory is None:
            return self.recording + self.caches
        return max(self.batch, min(self.caches, max_memory))

    def disk(self, max_memory: int | None) -> int:
        """Bytes on disk: trajectories, the model twice while it is replaced, and caches and outputs beyond a limit."""
        spilled = max_memory is not None and self.caches > max_memory
        kept = self.kept - self._kept_in_memory(max_memory)
        return self.recording + 2 * self.network + (self.caches if spilled else 0) + kept


def estimated(job: Job, recipe: Recipe) -> Estimate | None:
    """Samples one image in a few steps, and calls the denoiser once more. None for a recipe that records nothing.

    The job stays as it is. Raises as `record` and `seal` do, so what cannot be calibrated shows here.
    """
    recording = next((stage for stage in recipe.stages if isinstance(stage, Record)), None)
    if recording is None:
        return None
    probe = _Probe.of(job, recording.samples)
    costs = Costs.of(recipe, steps=probe.steps, rows=probe.rows, inputs=largest_inputs(job.full_precision))
    assert costs is not None
    evaluations = [(stage, costs.evaluations(stage)) for stage in recipe.stages]
    network = _bytes_of(job.full_precision)
    blocks = [_bytes_of(block) for block in blocks_in_turn(job.full_precision).values()]
    whole = probe.first_bytes + (probe.steps - 1) * probe.further_bytes
    return Estimate(
        network=network,
        recording=recording.samples * whole,
        batch=min(recording.samples, recording.batch) * whole,
        caches=max((probe.caches(stage, costs.entries) for stage in recipe.stages), default=0),
        seconds=probe.seconds / probe.rows * sum(count for _, count in evaluations if count is not None),
        uncounted=tuple(dict.fromkeys(type(stage).__name__ for stage, count in evaluations if count is None)),
        outside=network - sum(blocks),
        block=max(blocks, default=0),
        kept=max((probe.kept(stage, costs.entries) for stage in recipe.stages), default=0),
    )


@dataclass(frozen=True)
class Costs:
    """What decides how often the network runs.

    recording: of the recipe. entries: calibration entries, chosen: the steps they are of; at most, where they are not
        chosen by `Select`.
    steps: that the scheduler makes. rows: of the network's calls in a step (two with guidance).
    inputs: of each reconstruction unit, as `largest_inputs` has them.
    """

    recording: Record
    entries: int
    chosen: int
    steps: int
    rows: int
    inputs: tuple[int, ...]

    @classmethod
    def of(cls, recipe: Recipe, *, steps: int, rows: int, inputs: tuple[int, ...]) -> Costs | None:
        """None for a recipe that records nothing."""
        recording = next((stage for stage in recipe.stages if isinstance(stage, Record)), None)
        if recording is None:
            return None
        chosen, images = steps, recording.samples
        for stage in recipe.stages:
            if isinstance(stage, Select):
                every = stage.every if stage.steps is None else max(1, steps // stage.steps)
                chosen, images = -(-steps // every), min(recording.samples, stage.samples_per_step or recording.samples)
        return cls(recording, chosen * images * rows, chosen, steps, rows, inputs)

    def evaluations(self, stage: Stage) -> float | None:
        """Rows that go through the network in a stage, a backward pass counted as two; None where that is not known."""
        if isinstance(stage, Record):
            return stage.samples * self.steps * self.rows
        if isinstance(stage, Place | SplitShortcuts):
            return self.rows
        if isinstance(stage, Select | FitWeightRanges):
            return 0
        if isinstance(stage, FitInputRanges):
            return stage.observed(self.entries, self.chosen)
        if isinstance(stage, BalanceChannels):
            return min(stage.samples, self.entries)
        if isinstance(stage, CorrectBiases):
            recorded = self.recording
            return stage.evaluations_for(
                images=recorded.samples, batch=recorded.batch, steps=self.steps, rows=self.rows
            )
        if isinstance(stage, RoundLayers):
            return stage.passes(self.inputs) * min(stage.samples, self.entries) / 2
        if isinstance(stage, RoundBlocks | ScaleBlocks):
            return stage.evaluations_for(self.entries)
        if isinstance(stage, FitWindows):
            recorded = self.recording
            return self.rows * stage.evaluations_for(images=recorded.samples, batch=recorded.batch, steps=self.steps)
        return None


def largest_inputs(denoiser: nn.Module) -> tuple[int, ...]:
    """How many inputs an output of each reconstruction unit's largest layer has, in the order of `named_modules`."""
    layers = quantizable(denoiser)
    weights = {name: getattr(layer, "weight", None) for name, layer in layers.items()}
    inputs = {name: 0 if weight is None else weight[0].numel() for name, weight in weights.items()}
    return tuple(max(inputs[name] for name in unit.layers) for unit in units_of(denoiser, list(layers)))


@dataclass(frozen=True)
class _Probe:
    """One image.

    steps: that the scheduler will make. rows: of the denoiser's calls in a step (two with guidance).
    first_bytes, further_bytes: what the first step and each other one adds to a trajectory.
    units: bytes of the inputs and of the output of each unit for one row, in order of execution. flow: between them.
    seconds: of a step.
    """

    steps: int
    rows: int
    first_bytes: int
    further_bytes: int
    units: dict[str, tuple[int, int]]
    flow: Flow
    seconds: float

    @classmethod
    def of(cls, job: Job, samples: int) -> _Probe:
        short = min(_PROBE_STEPS, job.steps)
        began = time.perf_counter()
        (found,) = record(
            job.pipe,
            job.full_precision,
            seeds=calibration_seeds(job.run.seed, 1),
            steps=short,
            batch_size=1,
            arguments=arguments_of_batch(job.arguments, slice(0, 1), samples),
            run=Run(seed=job.run.seed),
        )
        seconds = time.perf_counter() - began
        trajectory = seal(found)
        count = len(trajectory.steps)
        new = _new_bytes(trajectory)
        typical = new[1:-1][-2:] or new[1:]
        calls = trajectory.steps[0].calls
        units = _unit_bytes(job.full_precision, calls[0])
        return cls(
            # Solvers of second order call the scheduler twice a step (Heun), others once more at the start (PNDM).
            steps=count + (job.steps - short) * round(count / short),
            rows=sum(call.prediction.shape[0] for call in calls),
            first_bytes=new[0],
            further_bytes=-(-sum(typical) // max(1, len(typical))),
            units=units,
            flow=flow_of(job.full_precision, list(units), calls[0].args, calls[0].kwargs),
            seconds=seconds / count,
        )

    def caches(self, stage: Stage, entries: int) -> int:
        """Bytes of the largest caches that a stage has at a time."""
        if not isinstance(stage, RoundBlocks | ScaleBlocks):
            return 0
        # What a group keeps from the full-precision network, and the inputs of one unit at a time from the quantized.
        quantized = isinstance(stage, RoundBlocks) and stage.quantized_prefix
        plain = not quantized or stage.fit.float_inputs
        kept = [(inputs if plain else 0) + output for inputs, output in self.units.values()]
        given = [inputs if quantized else 0 for inputs, _ in self.units.values()]
        ends = [min(first + stage.together, len(kept)) for first in range(0, len(kept), stage.together)]
        largest = (
            sum(kept[unit:end]) + given[unit]
            for first, end in itertools.pairwise((0, *ends))
            for unit in range(first, end)
        )
        return entries * max(largest, default=0)

    def kept(self, stage: Stage, entries: int) -> int:
        """Bytes of units' outputs that a stage keeps at most, so as not to run the units again."""
        if not isinstance(stage, RoundBlocks | ScaleBlocks):
            return 0
        outputs = {unit: output for unit, (_, output) in self.units.items()}
        most = most_kept(self.flow, outputs, stage.together, fixed=True)
        if isinstance(stage, RoundBlocks) and stage.quantized_prefix:
            most += most_kept(self.flow, outputs, 1, fixed=False)
        return entries * most


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_of(module: nn.Module) -> int:
    return sum(map(_bytes, (*module.parameters(), *module.buffers())))


def _new_bytes(trajectory: Trajectory) -> list[int]:
    """Bytes of the tensors that each step keeps and no step before it, solver's memory included."""
    entry, tensors = packed(trajectory)
    known = {id(tensor) for tensor in tensors.values()}
    seen: set[str] = set()
    found = []
    for step, encoded in zip(trajectory.steps, entry["steps"], strict=True):
        names = set(names_in(list(encoded.values()))) - seen
        seen |= names
        history = cached_tensors(step.scheduler, step.sample.shape).values()
        own = {id(tensor): tensor for tensor in history if id(tensor) not in known}
        known |= set(own)
        found.append(sum(_bytes(tensors[name]) for name in names) + sum(map(_bytes, own.values())))
    return found


@torch.no_grad()
def _unit_bytes(denoiser: nn.Module, call: DenoiserCall) -> dict[str, tuple[int, int]]:
    """What `_Probe.units` says."""
    found: dict[str, tuple[int, int]] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
            outputs = output_tensors(output)
            rows = outputs[0].shape[0]
            values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
            given = sum(_bytes(value) for value in values if value.shape[0] == rows)
            found.setdefault(name, (given // rows, sum(map(_bytes, outputs)) // rows))

        return hook

    units = units_of(denoiser, list(quantizable(denoiser)))
    handles = [denoiser.get_submodule(u.name).register_forward_hook(note(u.name), with_kwargs=True) for u in units]
    try:
        denoiser(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found
