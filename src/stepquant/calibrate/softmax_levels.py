"""Levels at powers of two or evenly spaced, chosen for the softmax output of every attention and group of timesteps.

    likelihood:  log2 if the mean log-likelihood of a power law is above that of an exponential
                 power law    p(x) = (a - 1) / x0 * (x / x0)^-a         a = 1 + 1 / mean ln(x / x0)
                 exponential  p(x) = l exp(-l (x - x0))                 l = 1 / mean (x - x0)
                 over the values of at least x0, the 1st percentile of those above 0
    error:       log2 if mean |x - x_hat|^2.4 is less

The maximum likelihoods have closed forms: for the power law ln((a - 1) / x0) - a mean ln(x / x0), for the exponential
ln(l) - 1.

Source: TCAQ-DM (arXiv:2412.16700), distribution-aware quantization. Which distribution the power law is compared with,
where its tail begins and the number of groups are ours; "error" is ours altogether.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stepquant.calibrate.ranges import SHRINK_NORM, Observer, RangeRule, fit_range
from stepquant.calibrate.reconstruct import clocked
from stepquant.calibrate.select import inputs
from stepquant.calibrate.stages import Select, planned, row_of_bins
from stepquant.calibrate.windows import expected_steps
from stepquant.errors import CalibrationError, SpecError, nearest
from stepquant.model.families import several_denoisers
from stepquant.model.layer import QuantizedMatmul
from stepquant.model.quantizer import InputQuantizer, LogQuantizer
from stepquant.model.surgery import Plan, quantized_layers
from stepquant.numerics.affine import fake_quantize
from stepquant.numerics.log2 import fake_quantize_log2
from stepquant.numerics.spec import QuantSpec
from stepquant.recipe import Figures, Job

__all__ = ["ChooseSoftmaxLevels", "LevelChoice", "power_law_gain"]

LevelChoice = Literal["likelihood", "error"]
CHOICES = ("likelihood", "error")

TAIL = 0.01
"""Where the tail begins: this quantile of the values above 0."""


def power_law_gain(x: Tensor) -> float:
    """Mean log-likelihood of the best power law less that of the best exponential, over the tail of x >= 0.

    0 if the values above 0 are all the same. See the module.
    """
    positive = x[x > 0].double()
    if not len(positive):
        return 0.0
    start = positive.kthvalue(max(1, round(TAIL * len(positive)))).values
    tail = positive[positive >= start]
    logs, excess = float((tail / start).log().mean()), float((tail - start).mean())
    if logs <= 0 or excess <= 0:
        return 0.0
    exponent = 1 + 1 / logs
    power_law = math.log((exponent - 1) / float(start)) - exponent * logs
    exponential = -math.log(excess) - 1
    return power_law - exponential


@dataclass(frozen=True)
class ChooseSoftmaxLevels:
    """Give every attention's softmax output a table of `groups` rows, each with the kind of levels that suits it.

    bits: of the softmax output; None keeps those of the plan.
    groups: equal parts of the sampling steps, each with a row of its own; no more than there are steps. Where all of
        them choose even levels, a quantizer that has these already, with at least as many rows, stays as it is.
    choose: how, as above. samples: calibration samples to watch, batch of them at a time. rule: for uniform rows.

    Watches the quantized model, after `FitInputRanges`. Layers whose softmax output is not quantized, or whose range is
    dynamic, are left as they are.
    """

    bits: int | None = None
    groups: int = 1
    choose: LevelChoice = "likelihood"
    samples: int = 256
    batch: int = 32
    rule: RangeRule = "mse"

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})
    replaces_input_quantizers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.choose not in CHOICES:
            raise SpecError(
                f"choose must be one of {', '.join(CHOICES)}, found {self.choose!r}.{nearest(self.choose, CHOICES)}"
            )
        if self.bits is not None:
            QuantSpec(self.bits)  # checks the bits early
        for name in ("groups", "samples", "batch"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} of ChooseSoftmaxLevels must be at least 1, found {getattr(self, name)}.")

    def check(self, job: Job) -> None:
        """Groups of steps that calibration leaves out show before anything is recorded, where the steps are known."""
        selects = [stage for stage in job.stages if isinstance(stage, Select)]
        least, most = expected_steps(job)
        if len(selects) != 1 or least != most or len(several_denoisers(job.pipe)) > 1:
            return
        plan = planned(job) or {}
        if not any(name.endswith("values") and one.weight is None and one.input for name, one in plan.items()):
            return  # no softmax output is quantized
        every = selects[0].stride(least)
        seen = range(0, least, every)
        first = 0
        for group, length in enumerate(self._windows(least), 1):
            if not any(first <= step < first + length for step in seen):
                raise SpecError(
                    f"groups={self.groups} of ChooseSoftmaxLevels divides {least} steps, but calibration sees only "
                    f"{len(seen)} of them (one in {every}), and none in group {group}: take at most {len(seen)} "
                    "groups, or every=1."
                )
            first += length

    def run(self, job: Job) -> Figures:
        clock = clocked(job.denoiser)
        layers = _softmax_layers(job)
        if not layers:
            return {"layers": {}, "evaluations": 0}
        seen, count = self._watch(job, layers)
        rows = row_of_bins(clock, job.handed["trajectories"], self._windows(len(job.handed["trajectories"][0].steps)))
        figures: dict[str, Any] = {}
        for name, (layer, before) in layers.items():
            bits = before.spec.bits if self.bits is None else self.bits
            spec = QuantSpec(bits, nonnegative=True, logarithmic=True)
            scales, chosen = [], []
            for row in range(int(rows.max()) + 1):
                bins = [b for b in (rows == row).nonzero().flatten().tolist() if b in seen[name].seen]
                if not bins:
                    raise CalibrationError(
                        f"The softmax output of {name} saw no calibration sample in group {row}: choose calibration "
                        "steps in every group, or fewer groups."
                    )
                largest = max(seen[name].extremes[b][1] for b in bins)
                values = torch.cat([part for b in bins for part in seen[name].seen[b]])
                scale, logarithmic = self._row(values, largest, bits)
                scales.append(scale)
                chosen.append(logarithmic)
            figures[name] = chosen
            finer = isinstance(before, InputQuantizer) and before.spec.bits == bits and before.rows >= len(chosen)
            if any(chosen) or not finer:
                quantizer = LogQuantizer(spec, clock, torch.stack(scales), torch.tensor(chosen), rows)
                layer.input_quantizer = quantizer.to(clock.edges.device)
        return {"layers": figures, "evaluations": count}

    def _windows(self, steps: int) -> tuple[int, ...]:
        groups = min(self.groups, steps)
        ends = [round(steps * number / groups) for number in range(groups + 1)]
        return tuple(after - before for before, after in itertools.pairwise(ends))

    def _watch(self, job: Job, layers: dict[str, Any]) -> tuple[dict[str, Observer], int]:
        clock, chosen = clocked(job.denoiser), job.handed["calibration"]
        count = min(self.samples, len(chosen))
        spread = torch.linspace(0, len(chosen) - 1, count).round().long().tolist()
        observers = {name: Observer(clock, job.run.generator("softmax", name)) for name in layers}

        def notes(observer: Observer) -> Any:
            return lambda _module, args: (observer(args[0]), None)[1]

        handles = [layers[name][0].register_forward_pre_hook(notes(one)) for name, one in observers.items()]
        try:
            with torch.no_grad(), job.run.progress.track("Watching softmax outputs", count) as advance:
                for start in range(0, count, self.batch):
                    positions = spread[start : start + self.batch]
                    args, kwargs = inputs(job.handed["trajectories"], chosen, positions)
                    job.denoiser(*args, **kwargs)
                    advance(len(positions))
        finally:
            for handle in handles:
                handle.remove()
        return observers, count

    def _row(self, values: Tensor, most: float, bits: int) -> tuple[Tensor, bool]:
        """Scale, and whether the levels lie at powers of two. values: drawn from those seen; most: the largest."""
        spec = QuantSpec(bits, nonnegative=True)
        uniform = fit_range(values.reshape(1, -1), spec, self.rule, values.new_tensor([[0.0, most]]))
        # The largest value is a level; a softmax output that is 0 throughout has no size.
        largest = values.new_tensor(most if most > 0 else 1.0)
        if self.choose == "likelihood":
            logarithmic = power_law_gain(values) > 0
        else:
            powers = fake_quantize_log2(values, largest, QuantSpec(bits, nonnegative=True, logarithmic=True))
            even = fake_quantize(values.reshape(1, -1), uniform, spec).flatten()
            errors = [(values - found).abs().pow(SHRINK_NORM).mean() for found in (powers, even)]
            logarithmic = bool(errors[0] < errors[1])
        return (largest if logarithmic else uniform.scale.reshape(())), logarithmic


def _softmax_layers(job: Job) -> dict[str, tuple[QuantizedMatmul, InputQuantizer | LogQuantizer]]:
    plan: Plan = job.handed["plan"]
    layers = quantized_layers(job.denoiser)
    found = {}
    for name in plan:
        layer = layers[name]
        if isinstance(layer, QuantizedMatmul) and layer.role == "values":
            quantizer = layer.input_quantizer
            if isinstance(quantizer, InputQuantizer | LogQuantizer):
                found[name] = (layer, quantizer)
    return found
