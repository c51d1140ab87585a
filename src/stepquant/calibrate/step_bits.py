"""Activation bits by timestep: as few as keep the quantization noise below the noise of the step itself.

With eps_k the recorded guided prediction of step k and delta_{k,b} the error of the quantized one for the same sample,
activations at b bits:

    SNR_Q(k, b) = sum eps_k^2 / sum delta_{k,b}^2,    SNR_F(k) = alpha_k^2 / sigma_k^2         x_k = alpha x_0 + sigma z
    bits of step k = the fewest b with SNR_Q(k, b) > SNR_F(k), otherwise the most

Steps next to the noise thus have few bits and those next to the image many. Of networks that predict something else
(the image, v, a velocity) eps is what the prediction makes of the sample, see `calibrate.noising`.

Source: He et al. 2023 (PTQD, arXiv:2305.10657), step-aware mixed precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stepquant.calibrate.noising import check_noise_prediction, noise_predicted, noise_scales
from stepquant.calibrate.ranges import Observer, RangeRule, observing
from stepquant.calibrate.reconstruct import clocked
from stepquant.calibrate.select import inputs
from stepquant.calibrate.stages import planned
from stepquant.calibrate.steps import Step
from stepquant.calibrate.trajectory import Trajectory, predict, state_at
from stepquant.errors import SpecError
from stepquant.model.clock import StepClock
from stepquant.model.families import end_layers, sensitive_layers
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import Ends, execution_order, operand_specs, quantizable, quantized_layers
from stepquant.numerics.affine import QParams
from stepquant.numerics.spec import LayerScheme, QuantSpec, row_spec
from stepquant.recipe import Figures, Job

__all__ = ["ChooseStepBits", "fewest_bits"]

Operand = tuple[str, str]
"""Layer and attribute of an activation quantizer."""


@dataclass(frozen=True)
class ChooseStepBits:
    """Give the activations of every timestep bits by its signal-to-noise ratio, and fit ranges for them.

    bits: to choose from, ascending. Activations that were placed at the first of them change, all others (ends,
        softmax) stay.
    ends, softmax_bits: those of `Place`. Ends and softmax that they keep at 8 bits stay where `bits` begin with 8, too.
    rule, samples, batch: of the ranges, as in `FitInputRanges`.
    images: recorded images that the ratios are measured on, the first ones, whole batches of them.

    It goes behind `FitInputRanges`, whose ranges the other activations keep. Weights do not change.
    """

    bits: tuple[int, ...] = (4, 8)
    rule: RangeRule = "mse"
    samples: int = 256
    batch: int = 32
    images: int = 64
    ends: Ends = "8bit"
    softmax_bits: int | None = 8

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "model", "plan"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})
    replaces_input_quantizers: ClassVar[bool] = True
    sets_row_bits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.bits) < 2 or list(self.bits) != sorted(set(self.bits)):
            raise SpecError(f"bits are two or more numbers to choose from, ascending, found {list(self.bits)}.")
        for bits in self.bits:
            row_spec(QuantSpec(8), bits)  # checks the number
        if min(self.samples, self.batch, self.images) < 1:
            raise SpecError(
                f"samples, batch and images must be at least 1, found {self.samples}, {self.batch} and {self.images}."
            )

    def check(self, job: Job) -> None:
        """Predictions that do not say which noise they mean, and bits that no activation is placed at, show before
        anything is recorded.
        """
        check_noise_prediction(job.pipe.scheduler)
        plan = planned(job)
        if plan is None:
            return
        specs = [spec for scheme in plan.values() for _, spec in operand_specs(scheme)]
        if not any(spec.bits == self.bits[0] and not spec.dynamic for spec in specs):
            raise self._nothing_placed()

    def run(self, job: Job) -> Figures:
        clock: StepClock = clocked(job.denoiser)
        operands = self._operands(job)
        observers, observed = self._observed(job, clock, operands)
        judged = self._judged(job)
        steps = len(judged[0].steps)
        ratios: dict[int, list[float]] = {}
        with job.run.progress.track("Choosing bits of steps", len(self.bits) * steps * len(judged)) as advance:
            for bits in self.bits:
                one_row = torch.zeros(clock.bins, dtype=torch.int64)
                self._put_(job, clock, operands, observers, one_row, (bits,))
                ratios[bits] = _signal_to_noise(job, judged, advance)
        forward = [_forward_ratio(step) for step in judged[0].steps]
        chosen = fewest_bits(ratios, forward)
        bits_of_bin = _by_bin(clock, judged[0], chosen)
        used = tuple(bits for bits in self.bits if bits in bits_of_bin)
        row_of_bin = torch.tensor([used.index(bits) for bits in bits_of_bin])
        self._put_(job, clock, operands, observers, row_of_bin, used)
        return {
            "bits": chosen,
            "average": sum(chosen) / len(chosen),
            "signal_to_noise": {str(bits): _for_json(values) for bits, values in ratios.items()},
            "forward_signal_to_noise": _for_json(forward),
            "operands": len(operands),
            "evaluations": observed + len(self.bits) * sum(trajectory.evaluations for trajectory in judged),
        }

    def _operands(self, job: Job) -> dict[Operand, QuantSpec]:
        """The activations whose bits change."""
        plan: dict[str, LayerScheme] = job.handed["plan"]
        kept = self._kept(job) if self.bits[0] == QuantSpec.most_bits else set()
        found = {
            (name, attribute): spec
            for name, scheme in plan.items()
            for attribute, spec in operand_specs(scheme)
            if spec.bits == self.bits[0]
            and (name, attribute) not in kept
            and isinstance(_quantizer(job, name, attribute), InputQuantizer)
        }
        if not found:
            raise self._nothing_placed()
        return found

    def _nothing_placed(self) -> SpecError:
        return SpecError(
            f"No static activation was placed at {self.bits[0]} bits, the first of the bits {list(self.bits)}: "
            f"quantize with activations={self.bits[0]}, or name other bits."
        )

    def _kept(self, job: Job) -> set[Operand]:
        """What is at 8 bits for the sake of its place, and at 8 cannot be told from the others by its bits."""
        call = job.handed["trajectories"][0].steps[0].calls[0]
        layers = {**quantizable(job.denoiser), **quantized_layers(job.denoiser)}
        order = execution_order(job.denoiser, layers, call.args, call.kwargs)
        found: set[Operand] = set()
        if self.softmax_bits is not None:
            found |= {(name, "input_quantizer") for name in order if name.endswith("values")}
        if self.ends != "same":
            kept = (*end_layers(order), *sensitive_layers(job.denoiser, order))
            found |= {(name, attribute) for name in kept for attribute in ("input_quantizer", "second_quantizer")}
        return found

    def _observed(
        self, job: Job, clock: StepClock, operands: Mapping[Operand, QuantSpec]
    ) -> tuple[dict[Operand, Observer], int]:
        """What was seen of every operand, and how many images."""
        chosen = job.handed["calibration"]
        count = min(self.samples, len(chosen))
        spread = torch.linspace(0, len(chosen) - 1, count).round().long().tolist()
        with (
            observing(job.denoiser, job.handed["plan"], clock, job.run.generator("step bits")) as observers,
            job.run.progress.track("Observing activations", count) as advance,
            torch.no_grad(),
        ):
            for start in range(0, count, self.batch):
                positions = spread[start : start + self.batch]
                args, kwargs = inputs(job.handed["trajectories"], chosen, positions)
                job.denoiser(*args, **kwargs)
                advance(len(positions))
        return {operand: observers[operand] for operand in operands}, count

    def _judged(self, job: Job) -> list[Trajectory]:
        chosen: list[Trajectory] = []
        for trajectory in job.handed["trajectories"]:
            if sum(one.images for one in chosen) < self.images:
                chosen.append(trajectory)
        return chosen

    def _put_(
        self,
        job: Job,
        clock: StepClock,
        operands: Mapping[Operand, QuantSpec],
        observers: Mapping[Operand, Observer],
        row_of_bin: Tensor,
        bits: tuple[int, ...],
    ) -> None:
        """Quantizers with a row for each of `bits`, every row fitted on what was seen in its own timestep bins."""
        layers = quantized_layers(job.denoiser)
        for (name, attribute), spec in operands.items():
            rows = [
                observers[name, attribute].params(
                    row_spec(spec, own),
                    torch.where(row_of_bin == row, 0, -1),
                    self.rule,
                    f"The {attribute} of {name} at {own} bits",
                )
                for row, own in enumerate(bits)
            ]
            params = QParams(torch.cat([row.scale for row in rows]), torch.cat([row.zero_point for row in rows]))
            quantizer = InputQuantizer(spec, clock, params, row_of_bin, bits=bits).to(clock.edges.device)
            setattr(layers[name], attribute, quantizer)


def fewest_bits(ratios: Mapping[int, Sequence[float]], forward: Sequence[float]) -> list[int]:
    """Of every step, the fewest bits whose ratio is above the forward process's, otherwise the most.

    ratios: bits -> SNR_Q of every step. forward: SNR_F of every step.
    """
    ascending = sorted(ratios)
    return [
        next((bits for bits in ascending if ratios[bits][index] > least), ascending[-1])
        for index, least in enumerate(forward)
    ]


def _for_json(values: Sequence[float]) -> list[float | None]:
    """null for a ratio to nothing."""
    return [value if math.isfinite(value) else None for value in values]


def _quantizer(job: Job, name: str, attribute: str) -> object:
    return getattr(quantized_layers(job.denoiser)[name], attribute)


@torch.no_grad()
def _signal_to_noise(job: Job, trajectories: Sequence[Trajectory], advance: Callable[[int], None]) -> list[float]:
    """SNR_Q of every step with the quantizers that are in place."""
    signal, noise = ([0.0] * len(trajectories[0].steps) for _ in range(2))
    for trajectory in trajectories:
        for index, step in enumerate(trajectory.steps):
            guided = predict(job.denoiser, trajectory, index, state_at(trajectory, index))
            exact, found = (noise_predicted(step, one.double()) for one in (step.guided, guided))
            signal[index] += float(exact.square().sum())
            noise[index] += float((found - exact).square().sum())
            advance(1)
    return [one / other if other > 0 else math.inf for one, other in zip(signal, noise, strict=True)]


def _forward_ratio(step: Step) -> float:
    """SNR_F of a recorded step."""
    alpha, sigma = noise_scales(step)
    return (alpha / sigma) ** 2 if sigma > 0 else math.inf


def _by_bin(clock: StepClock, trajectory: Trajectory, bits_of_step: Sequence[int]) -> list[int]:
    """Bits of every timestep bin: those of the first step that comes to it, or to the bin nearest to it."""
    found: dict[int, int] = {}
    for step, bits in zip(trajectory.steps, bits_of_step, strict=True):
        for call in step.calls:
            value = call.kwargs[clock.argument] if clock.argument in call.kwargs else call.args[clock.position]
            clock.set(torch.as_tensor(value))
            for at in clock.bin.tolist():
                found.setdefault(at, bits)
    return [found[min(found, key=lambda other: abs(other - at))] for at in range(clock.bins)]
