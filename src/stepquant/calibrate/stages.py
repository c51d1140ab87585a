"""The stages that every recipe begins with: record, choose samples, place quantizers, fit ranges."""

from __future__ import annotations

import copy
import fnmatch
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from stepquant.calibrate.offload import brought
from stepquant.calibrate.ranges import RangeRule, observing, weight_params
from stepquant.calibrate.reconstruct import clocked, rounding_targets
from stepquant.calibrate.select import inputs, uniform
from stepquant.calibrate.split import recorded
from stepquant.calibrate.step_groups import BitsUntil, TimedScheme, Timeline, check_over_time, timed, timed_quantizer
from stepquant.calibrate.trajectory import Trajectory
from stepquant.calibrate.windows import windows_of
from stepquant.errors import SpecError
from stepquant.model.clock import StepClock, attach_clock, edges_between
from stepquant.model.families import make_attention_explicit_, sensitive_layers, timestep_argument
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import DynamicQuantizer, InputQuantizer, WeightQuantizer
from stepquant.model.surgery import (
    Ends,
    Rule,
    execution_order,
    make_plan,
    operand_specs,
    quantizable,
    quantized_layers,
    standard_rules,
    swap_layers_,
)
from stepquant.numerics.spec import LayerScheme, scheme_for
from stepquant.recipe import Figures, Job

__all__ = [
    "CALIBRATION_SEED",
    "FitInputRanges",
    "FitWeightRanges",
    "LayerRule",
    "Place",
    "Record",
    "Select",
    "calibration_seeds",
    "planned",
]

CALIBRATION_SEED = 1_000_000
"""Calibration noise seeds start here, evaluations below: the two never share an image."""


def calibration_seeds(seed: int, samples: int) -> list[int]:
    """Noise seeds of a calibration run; disjoint between run seeds for up to 10 000 samples."""
    start = CALIBRATION_SEED + 10_000 * seed
    return list(range(start, start + samples))


@dataclass(frozen=True)
class Record:
    """Record the full-precision pipeline on `samples` calibration seeds, `batch` at a time.

    `batch` is also the mini-batch of every stage that walks along trajectories.
    """

    samples: int = 256
    batch: int = 16

    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset({"trajectories"})

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch < 1:
            raise SpecError(f"Record needs samples and batch of at least 1, found {self.samples} and {self.batch}.")

    @property
    def mini_batches(self) -> int:
        """How many it records; the last may be smaller."""
        return -(-self.samples // self.batch)

    def run(self, job: Job) -> Figures:
        seeds = calibration_seeds(job.run.seed, self.samples)
        job.handed["trajectories"] = recorded(job, seeds, batch_size=min(self.batch, self.samples))
        trajectories: list[Trajectory] = job.handed["trajectories"]
        evaluations = sum(trajectory.evaluations for trajectory in trajectories)
        return {
            "samples": self.samples,
            "seeds": [seeds[0], seeds[-1]],
            "steps": len(trajectories[0].steps),
            "evaluations": evaluations,
        }


@dataclass(frozen=True)
class Select:
    """Calibrate on every `every`-th recorded step, `samples_per_step` samples each (None: all).

    steps: S of the paper instead of `every`: the stride is T // S for T recorded steps, so where S does not divide T
        there are a few more than S, as in the public code.
    Source: Li et al. 2023 (Q-Diffusion), timestep-aware calibration: strided steps, the first n samples; of guided
    pipelines both halves of each sample.
    """

    every: int = 1
    samples_per_step: int | None = None
    steps: int | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories"})
    gives: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def __post_init__(self) -> None:
        if self.every < 1 or (self.samples_per_step is not None and self.samples_per_step < 1):
            raise SpecError(
                "every and samples_per_step of Select must be at least 1, found "
                f"{self.every} and {self.samples_per_step}."
            )
        if self.steps is not None and (self.steps < 1 or self.every != 1):
            raise SpecError(
                f"Select takes `every` or at least one of `steps`, found every={self.every} and steps={self.steps}."
            )

    def stride(self, steps: int) -> int:
        """Every how many of so many recorded steps calibrate."""
        return self.every if self.steps is None else max(1, steps // self.steps)

    def run(self, job: Job) -> Figures:
        trajectories: list[Trajectory] = job.handed["trajectories"]
        every = self.stride(len(trajectories[0].steps))
        chosen = uniform(trajectories, every=every, samples_per_step=self.samples_per_step)
        job.handed["calibration"] = chosen
        return {"samples": len(chosen)}


@dataclass(frozen=True)
class LayerRule:
    """Layers that match `pattern` get these bits (None: floating point). Later rules win over earlier ones.

    activations: bits, or bits over time from noise to image, see `calibrate.step_groups`.
    """

    pattern: str
    weights: int | None
    activations: int | tuple[BitsUntil, ...] | None
    group_size: int | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    """A nested dataclass ignores unknown keys otherwise."""

    def __post_init__(self) -> None:
        if isinstance(self.activations, tuple):
            check_over_time(self.activations)

    def scheme(self) -> LayerScheme:
        """With the most bits where they change over time."""
        activations = self.activations
        if isinstance(activations, tuple):
            activations = max(entry.bits for entry in activations)
        return scheme_for(self.weights, activations, self.group_size)


FLOATING_SOFTMAX = 16
"""The value of `softmax_bits` that leaves the softmax output in floating point."""


@dataclass(frozen=True)
class Place:
    """Resolve bits and rules to a plan and put quantized layers in place.

    weights, activations: bits of every layer; None is floating point.
    ends: first and last layer at 8 bits ("8bit"), like the others ("same") or in floating point ("full"). Layers whose
        precision diffusers itself keeps (`families.sensitive_layers`) go with them.
    softmax_bits: at least this many bits for the softmax output in attention; None treats it like any activation, 16
        leaves it in floating point (Q-Diffusion's setting for Stable Diffusion; levels have 8 bits at most).
    rules: exceptions by layer name.
    """

    weights: int | None = 4
    activations: int | None = 8
    ends: Ends = "8bit"
    softmax_bits: int | None = 8
    group_size: int | None = None
    rules: tuple[LayerRule, ...] = ()

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    """`Allocate` has one inside, and a nested dataclass ignores unknown keys otherwise."""

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories"})
    gives: ClassVar[frozenset[str]] = frozenset({"model", "plan"})

    def __post_init__(self) -> None:
        LayerRule("*", self.weights, self.activations, self.group_size).scheme()  # checks the bits early
        if self.softmax_bits not in (None, 2, 3, 4, 5, 6, 7, 8, FLOATING_SOFTMAX):
            raise SpecError(
                f"softmax_bits must be from 2 to 8, or null, found {self.softmax_bits} ({FLOATING_SOFTMAX} leaves the "
                "softmax output in floating point)."
            )

    @property
    def plans_row_bits(self) -> bool:
        """Whether some layer is to have bits over time."""
        return any(isinstance(rule.activations, tuple) for rule in self.rules)

    def run(self, job: Job) -> Figures:
        trajectories: list[Trajectory] = job.handed["trajectories"]
        floating = make_attention_explicit_(job.denoiser)
        call = trajectories[0].steps[0].calls[0]
        order = execution_order(job.denoiser, list(quantizable(job.denoiser)), call.args, call.kwargs)
        plan = self._resolve(job.denoiser, order)
        idle = [name for name in plan if name not in order]
        plan = {name: plan[name] for name in order if name in plan}  # in order of execution
        swap_layers_(job.denoiser, plan)
        timesteps = torch.cat([_denoiser_timesteps(job, step.calls) for step in trajectories[0].steps])
        argument, position = timestep_argument(job.full_precision)
        clock = StepClock(edges_between(timesteps), argument, position)
        attach_clock(job.denoiser, clock.to(next(job.full_precision.parameters()).device))
        _check_timesteps(plan, clocked(job.denoiser), trajectories)
        job.denoiser.requires_grad_(False)
        job.handed["plan"] = plan
        return {"layers": len(plan), "attention_left_in_float": floating, "layers_that_never_ran": idle}

    def _resolve(self, denoiser: torch.nn.Module, order: list[str]) -> dict[str, LayerScheme]:
        base = LayerRule("*", self.weights, self.activations, self.group_size).scheme()
        floating = self.softmax_bits == FLOATING_SOFTMAX
        rules = standard_rules(
            base,
            order,
            ends=self.ends,
            softmax_bits=None if floating else self.softmax_bits,
            sensitive=sensitive_layers(denoiser, order),
        )
        if floating and base.input is not None:
            rules += [Rule(name, LayerScheme(second=base.input)) for name in order if name.endswith("values")]
        plan = make_plan(denoiser, [*rules, *(Rule(rule.pattern, rule.scheme()) for rule in self.rules)])
        for name, scheme in plan.items():
            last = next((rule for rule in reversed(self.rules) if fnmatch.filter([name], rule.pattern)), None)
            if last is not None and isinstance(last.activations, tuple):
                plan[name] = timed(scheme, last.activations)
        return plan

    def check(self, job: Job) -> None:
        """Patterns that match nothing and group sizes that do not divide show before anything is recorded."""
        self.plan(copy.deepcopy(job.full_precision))

    def plan(self, denoiser: torch.nn.Module) -> dict[str, LayerScheme]:
        """What `run` would place, without running the model (layers in order of registration). Changes `denoiser`."""
        make_attention_explicit_(denoiser)
        return self._resolve(denoiser, list(quantizable(denoiser)))


def planned(job: Job) -> dict[str, LayerScheme] | None:
    """What the recipe is going to place, before anything has run; None where activations' bits are yet to be found."""
    for stage in job.stages:
        inner = stage if isinstance(stage, Place) else getattr(stage, "place", None)
        if isinstance(inner, Place) and getattr(stage, "activation_bits", None) is None:
            return inner.plan(copy.deepcopy(job.full_precision))
    return None


def _check_timesteps(plan: dict[str, LayerScheme], clock: StepClock, trajectories: list[Trajectory]) -> None:
    """Raise SpecError for bits over time that do not fit the timesteps of the recording."""
    timeline = Timeline.of(clock, trajectories)
    for name, scheme in plan.items():
        if isinstance(scheme, TimedScheme):
            timeline.groups_of(scheme.until, f"The bits over time of {name}")


def _denoiser_timesteps(job: Job, calls: tuple[object, ...]) -> torch.Tensor:
    """What the denoiser was given as timestep in the calls of one step, as a flat float64 tensor."""
    argument, position = timestep_argument(job.full_precision)
    found = []
    for call in calls:
        kwargs, args = call.kwargs, call.args  # type: ignore[attr-defined]
        value = kwargs[argument] if argument in kwargs else args[position]
        found.append(torch.as_tensor(value).detach().cpu().double().reshape(-1))
    return torch.cat(found)


@dataclass(frozen=True)
class FitWeightRanges:
    """Scale and zero point of every weight, and rounding to nearest.

    rule: "minmax", or "mse" for the best of 80 shrunk ranges (Q-Diffusion's public code, p = 2.4).
    """

    rule: RangeRule = "mse"

    needs: ClassVar[frozenset[str]] = frozenset({"model", "plan"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def run(self, job: Job) -> Figures:
        plan: dict[str, LayerScheme] = job.handed["plan"]
        layers = quantized_layers(job.denoiser)
        named = [name for name, scheme in plan.items() if scheme.weight is not None]
        weights = rounding_targets(job, named)
        with job.run.progress.track("Fitting weight ranges", len(named)) as advance:
            for name in named:
                layer, spec = layers[name], plan[name].weight
                assert isinstance(layer, QuantizedLayer)
                assert spec is not None
                with brought(job, layer):
                    weight = weights[name].to(layer.weight.device)
                    params = weight_params(weight, spec, self.rule)
                    layer.weight_quantizer = WeightQuantizer(spec, params).to(weight.device)
                    layer.weight.data = weight.to(layer.weight.dtype, copy=True)
                    layer.on_grid = False
                    layer.harden_()
                advance(1)
        return {"layers": len(named)}


LEAST_IN_ROW = 8
"""Calibration samples behind the range of a single step."""


@dataclass(frozen=True)
class FitInputRanges:
    """First scale and zero point of every activation, observed behind the already quantized weights.

    rule: as for weights, and narrower ranges are tried too (`ranges.FURTHER_CANDIDATES`).
    samples: calibration samples to observe, spread evenly over the calibration set; with a row for every step
        `LEAST_IN_ROW` times as many as there are steps, if that is more.
    windows: lengths of consecutive windows of steps, noise first, that get a row of parameters each; "step" gives
        every timestep that calibration saw a row, and others that of the next noisier; None is one row for all.
        Rows are divided where the plan has the bits of a layer change.
    """

    rule: RangeRule = "mse"
    samples: int = 256
    batch: int = 32
    windows: tuple[int, ...] | Literal["step"] | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "model", "plan"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})
    replaces_input_quantizers: ClassVar[bool] = True
    follows_planned_bits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.windows, str) and self.windows != "step":
            raise SpecError(f'windows must be lengths such as (5, 5, 5, 5), "step" or None, found {self.windows!r}.')

    def observed(self, entries: int, steps: int) -> int:
        """Of so many entries of the calibration set, in so many steps, how many go through the network."""
        least = LEAST_IN_ROW * steps if self.windows == "step" else 0
        return min(max(self.samples, least), entries)

    def run(self, job: Job) -> Figures:
        plan: dict[str, LayerScheme] = job.handed["plan"]
        clock, chosen = clocked(job.denoiser), job.handed["calibration"]
        count = self.observed(len(chosen), len({step for _, step, _ in chosen.entries}))
        spread = torch.linspace(0, len(chosen) - 1, count).round().long().tolist()
        generator = job.run.generator("ranges")
        with (
            observing(job.denoiser, plan, clock, generator) as observers,
            job.run.progress.track("Observing activations", count) as advance,
            torch.no_grad(),
        ):
            for start in range(0, count, self.batch):
                positions = spread[start : start + self.batch]
                args, kwargs = inputs(job.handed["trajectories"], chosen, positions)
                job.denoiser(*args, **kwargs)
                advance(len(positions))
        windows = None if self.windows == "step" else self.windows
        row_of_bin = row_of_bins(clock, job.handed["trajectories"], windows)
        layers = quantized_layers(job.denoiser)
        timeline = Timeline.of(clock, job.handed["trajectories"])
        with job.run.progress.track("Fitting activation ranges", len(observers)) as advance:
            for name, scheme in plan.items():
                for attribute, spec in operand_specs(scheme):
                    if spec.dynamic:
                        if isinstance(scheme, TimedScheme):
                            raise SpecError(
                                f"{name} is to have bits over time, which its ranges, found at run time, cannot have: "
                                "give its rule one number of bits."
                            )
                        setattr(layers[name], attribute, DynamicQuantizer(spec))
                        continue
                    seen = observers[name, attribute]
                    if isinstance(scheme, TimedScheme):
                        base = None if self.windows == "step" else row_of_bin
                        where = f"The {attribute} of {name}"
                        quantizer = timed_quantizer(seen, scheme, spec, timeline, base, self.rule, where)
                        setattr(layers[name], attribute, quantizer)
                        advance(1)
                        continue
                    own = self.windows == "step" or seen.keeps_sample(spec)
                    rows = seen.own_rows() if own else row_of_bin
                    params = seen.params(spec, rows, self.rule, f"The {attribute} of {name}")
                    quantizer = InputQuantizer(spec, clock, params, rows).to(clock.edges.device)
                    setattr(layers[name], attribute, quantizer)
                    advance(1)
        rows_each = clock.bins if self.windows == "step" else len(self.windows or (0,))
        return {"rows": rows_each, "evaluations": count}


def row_of_bins(clock: StepClock, trajectories: list[Trajectory], windows: tuple[int, ...] | None) -> torch.Tensor:
    """Which row every timestep bin uses when each window has a row of its own, `[N]` int64."""
    rows = torch.zeros(clock.bins, dtype=torch.int64)
    if windows is None:
        return rows
    steps = trajectories[0].steps
    for row, (start, stop) in enumerate(windows_of(windows, len(steps))):
        for step in steps[start:stop]:
            for call in step.calls:
                value = call.kwargs[clock.argument] if clock.argument in call.kwargs else call.args[clock.position]
                clock.set(torch.as_tensor(value))
                rows[clock.bin.cpu()] = row
    return rows
