"""Activation ranges of every step, each observed behind the steps that are quantized already.

For k = 0 .. S - 1, noise first, with x^_k the quantized model's own state before step k:

    observe      the inputs of every layer at (x^_k, t_k), activations in full precision, weights quantized
    freeze       scale and zero point of step k
    go on        x^_{k+1} = one step of the sampler from x^_k, now with step k's activations quantized

So the ranges of a step see the error that all steps before it have left, as they will when the model samples. States
are kept from step to step, so this takes 2 S - 1 calls of the network for each batch of images. Running the
half-quantized model from the noise anew for every step, as the paper describes it, takes S (S + 1) / 2.

Some steps may have more bits ("activation relaxing"): the last share of them, next to the image, or the first.

Source: Tang et al. 2024 (PCR, arXiv:2311.06322), progressive calibration and activation relaxing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from stepquant.calibrate.ranges import Observer, RangeRule, observing
from stepquant.calibrate.reconstruct import clocked
from stepquant.calibrate.trajectory import State, Step, Trajectory, advance, predict, state_at
from stepquant.errors import CalibrationError, SpecError, nearest
from stepquant.model.clock import StepClock
from stepquant.model.quantizer import DynamicQuantizer, InputQuantizer
from stepquant.model.surgery import operand_specs, quantized_layers
from stepquant.numerics.affine import QParams
from stepquant.numerics.spec import LayerScheme, QuantSpec, RowSpec, row_spec
from stepquant.recipe import Figures, Job

__all__ = ["FitRangesProgressively", "RelaxedEnd", "relaxed_steps"]

RelaxedEnd = Literal["image", "noise"]
"""Which end of sampling has more bits: its last steps, which make the details, or its first."""

_KEPT = "steps"


def relaxed_steps(steps: int, share: float, end: RelaxedEnd) -> range:
    """The steps that have more bits: the nearest whole number to this share of them."""
    count = round(share * steps)
    return range(count) if end == "noise" else range(steps - count, steps)


@dataclass(frozen=True)
class FitRangesProgressively:
    """Give every timestep activation ranges of its own, observed along the quantized model's own trajectory.

    rule: as for weights.
    samples: images to walk with, the first recorded ones, whole batches of them.
    relaxed: share of the steps whose activations have `relaxed_bits` where they would have fewer, at `relaxed_end`.
        Beyond 8 bits no engine runs integers.

    A timestep that comes several times (PNDM's first steps, the second calls of Heun) has one row of parameters, from
    its first time: it is frozen when it comes again, and it is relaxed if that first time is.
    """

    rule: RangeRule = "minmax"
    samples: int = 256
    relaxed: float = 0.0
    relaxed_bits: int = 10
    relaxed_end: RelaxedEnd = "image"

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})
    replaces_input_quantizers: ClassVar[bool] = True

    @property
    def sets_row_bits(self) -> bool:
        """Whether some timesteps get more bits than others."""
        return self.relaxed > 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise SpecError(f"FitRangesProgressively needs at least one sample, found {self.samples}.")
        if not 0 <= self.relaxed < 1:
            raise SpecError(f"relaxed is a share of the steps, from 0 to below 1, found {self.relaxed}.")
        if self.relaxed_end not in get_args(RelaxedEnd):
            raise SpecError(
                f"relaxed_end must be 'image' or 'noise', found {self.relaxed_end!r}."
                f"{nearest(str(self.relaxed_end), get_args(RelaxedEnd))}"
            )
        row_spec(QuantSpec(8), self.relaxed_bits)  # checks the bits early

    def run(self, job: Job) -> Figures:
        walk = _Walk.begin(self, job)
        steps = len(walk.trajectories[0].steps)
        first = walk.resume()
        with (
            job.run.progress.track("Calibrating step by step", steps) as advanced,
            torch.no_grad(),
        ):
            advanced(first)
            for index in range(first, steps):
                walk.calibrate(index)
                if index + 1 < steps:
                    walk.advance(index)
                walk.keep(index + 1)
                advanced(1)
        return {
            "rows": int(walk.frozen.sum()),
            "relaxed_rows": int(walk.relaxed.sum()),
            "images": walk.images,
            "evaluations": walk.evaluations,
        }


@dataclass
class _Walk:
    """Where the quantized model has come to, and which timesteps are frozen.

    states: of each trajectory, before the next step.
    frozen `[bins]`: bool, timestep bins whose parameters are final. relaxed `[bins]`: bool, those of more bits.
    """

    stage: FitRangesProgressively
    job: Job
    clock: StepClock
    trajectories: list[Trajectory]
    states: list[State]
    frozen: Tensor
    relaxed: Tensor
    evaluations: int = 0

    @classmethod
    def begin(cls, stage: FitRangesProgressively, job: Job) -> _Walk:
        chosen: list[Trajectory] = []
        for trajectory in job.handed["trajectories"]:
            if sum(one.images for one in chosen) < stage.samples:
                chosen.append(trajectory)
        layers = quantized_layers(job.denoiser)
        for name, scheme in _plan(job).items():
            for attribute, spec in operand_specs(scheme):
                setattr(layers[name], attribute, DynamicQuantizer(spec) if spec.dynamic else None)
        clock: StepClock = clocked(job.denoiser)
        states = [state_at(trajectory, 0) for trajectory in chosen]
        nothing = torch.zeros(clock.bins, dtype=torch.bool)
        walk = cls(stage, job, clock, chosen, states, nothing, nothing.clone())
        walk._relax()
        return walk

    def _relax(self) -> None:
        """Which timesteps have more bits: those that come first in a relaxed step."""
        steps = self.trajectories[0].steps
        more = relaxed_steps(len(steps), self.stage.relaxed, self.stage.relaxed_end)
        for index in reversed(range(len(steps))):
            self.relaxed[self._bins(steps[index])] = index in more

    @property
    def images(self) -> int:
        return sum(trajectory.images for trajectory in self.trajectories)

    def calibrate(self, index: int) -> None:
        """Observe step `index` and freeze the timesteps in it that are new."""
        new = [at for at in self._bins(self.trajectories[0].steps[index]) if not self.frozen[at]]
        if not new:
            return
        plan = _plan(self.job)
        with observing(self.job.denoiser, plan, self.clock, self.job.run.generator("progressive", index)) as observers:
            for trajectory, state in zip(self.trajectories, self.states, strict=True):
                predict(self.job.denoiser, trajectory, index, state)
                self._count(trajectory.steps[index])
        for (name, attribute), observer in observers.items():
            spec = dict(operand_specs(plan[name]))[attribute]
            for at in new:
                self._freeze(name, attribute, spec, observer, at)
        self.frozen[new] = True

    def _freeze(self, name: str, attribute: str, spec: QuantSpec, observer: Observer, at: int) -> None:
        layer = quantized_layers(self.job.denoiser)[name]
        row_of_bin = torch.full((self.clock.bins,), -1)
        row_of_bin[at] = 0
        own = self._spec_at(spec, at)
        params = observer.params(own, row_of_bin, self.stage.rule, f"The {attribute} of {name} at timestep bin {at}")
        quantizer = getattr(layer, attribute)
        if quantizer is None:
            # Rows of timesteps still to come begin as this one; each is fitted before it is used.
            table = QParams(params.scale.repeat(self.clock.bins), params.zero_point.repeat(self.clock.bins))
            quantizer = self._table(spec, table)
            setattr(layer, attribute, quantizer)
        quantizer.scale[at] = params.scale.item()
        quantizer.zero_point[at] = params.zero_point.item()

    def _spec_at(self, spec: QuantSpec, at: int) -> RowSpec:
        """Of the row of a timestep bin."""
        return row_spec(spec, max(spec.bits, self.stage.relaxed_bits) if self.relaxed[at] else spec.bits)

    def _table(self, spec: QuantSpec, params: QParams) -> InputQuantizer:
        rows = torch.arange(self.clock.bins)
        bits = [self._spec_at(spec, at).bits for at in rows.tolist()]
        return InputQuantizer(spec, self.clock, params, rows, bits=bits).to(self.clock.edges.device)

    def advance(self, index: int) -> None:
        """Take step `index` with the quantized model."""
        for number, trajectory in enumerate(self.trajectories):
            self.states[number] = advance(self.job.denoiser, trajectory, index, self.states[number])
            self._count(trajectory.steps[index])

    def _count(self, step: Step) -> None:
        self.evaluations += sum(call.prediction.shape[0] for call in step.calls)

    def _bins(self, step: Step) -> list[int]:
        """The timestep bins of a step's calls, each once."""
        found: dict[int, None] = {}
        for call in step.calls:
            clock = self.clock
            value = call.kwargs[clock.argument] if clock.argument in call.kwargs else call.args[clock.position]
            clock.set(torch.as_tensor(value))
            found |= dict.fromkeys(clock.bin.tolist())
        return list(found)

    def _quantizers(self) -> dict[str, tuple[Any, str, QuantSpec]]:
        """(layer, attribute, spec) of every static activation quantizer, by `layer.attribute`."""
        layers = quantized_layers(self.job.denoiser)
        return {
            f"{name}.{attribute}": (layers[name], attribute, spec)
            for name, scheme in _plan(self.job).items()
            for attribute, spec in operand_specs(scheme)
            if not spec.dynamic
        }

    def keep(self, index: int) -> None:
        """Write what the steps from `index` on depend on."""
        if self.job.keeper is None:
            return
        tensors: dict[str, Tensor] = {"frozen": self.frozen}
        for key, (layer, attribute, _) in self._quantizers().items():
            tensors[f"scale.{key}"] = getattr(layer, attribute).scale
            tensors[f"zero_point.{key}"] = getattr(layer, attribute).zero_point
        for number, state in enumerate(self.states):
            tensors[f"state.{number}"] = state.sample
            tensors |= {f"history.{number}.{path}": value for path, value in state.history.items()}
        self.job.keeper.save(_KEPT, tensors, {"index": index, "evaluations": self.evaluations})

    def resume(self) -> int:
        """Go on from what is kept; returns the step to begin with."""
        kept = self.job.keeper.load(_KEPT) if self.job.keeper else None
        if kept is None:
            return 0
        tensors, meta = kept
        device = self.states[0].sample.device
        self.frozen = tensors["frozen"]
        for key, (layer, attribute, spec) in self._quantizers().items():
            params = QParams(tensors[f"scale.{key}"], tensors[f"zero_point.{key}"])
            setattr(layer, attribute, self._table(spec, params))
        self.states = [self._state(tensors, number, device) for number in range(len(self.states))]
        self.evaluations = int(meta["evaluations"])
        return int(meta["index"])

    def _state(self, tensors: Mapping[str, Tensor], number: int, device: torch.device) -> State:
        prefix = f"history.{number}."
        history = {name.removeprefix(prefix): value.to(device) for name, value in tensors.items() if prefix in name}
        return State(tensors[f"state.{number}"].to(device), history)


def _plan(job: Job) -> dict[str, LayerScheme]:
    """The plan, without the layers that are left in floating point."""
    plan: dict[str, LayerScheme] = job.handed["plan"]
    if not plan:
        raise CalibrationError("The plan quantizes no layer: run the stage Place before this one.")
    return plan
