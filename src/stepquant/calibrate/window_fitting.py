"""Fitting the whole network through windows of simulated denoising steps: rounding or weight scales, and activation
scales, together.

Source: Lee et al. 2025 (AccuQuant); what is ours is listed in `stepquant.methods.accuquant`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from stepquant.calibrate.judging import Judge, judged_images
from stepquant.calibrate.reconstruct import (
    adam_state,
    clamp_scales_,
    load_adam_state_,
    readers_of_sample,
    soft_roundings,
    soften_all_,
)
from stepquant.calibrate.rounding import (
    ScaleGradient,
    SoftRounding,
    adam,
    annealed_beta,
    check_scale_gradient,
    cosine,
    fix_scales_,
    harden_soft_,
    input_scales,
    materialised,
    relative_groups,
)
from stepquant.calibrate.split import row_by_row
from stepquant.calibrate.trajectory import State, Trajectory, replay
from stepquant.calibrate.weight_scales import closed_scale_, learnt_scale_, rescale_
from stepquant.calibrate.windows import GradientMode, equal_windows, expected_steps, window_gradient, windows_of
from stepquant.errors import CalibrationError, SpecError, nearest
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import InputQuantizer, WeightQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.recipe import Figures, Job

__all__ = ["FitWindows"]

KEEP_EVERY = 20
"""Iterations between two states written for resuming."""


@dataclass(frozen=True)
class FitWindows:
    """Learn rounding or weight scales, and activation scales, of the whole network through windows of simulated steps.

    window: steps per window, M, at most all of them; ignored if `windows` gives the length of each window, noise first.
    gradient: identity (the paper), exact, or per_step.
    iterations: windows drawn, each on one recorded mini-batch.
    lr_weights, lr_scales: Adam's rates; that of scales is relative to the mean over each quantizer's rows
        (`relative_groups`) and decays to 0 by a cosine.
    learn_weights: False keeps the rounding and learns scales only.
    lr_weight_scales: Adam's rate of the weights' scales, one factor for each output channel, for weights whose rounding
        stays; decays to 0 by a cosine. 0 leaves them as they are. Not with learn_weights.
    keep_rounding: where rounding starts, from 0 (the full-precision fraction) to 1 (the present rounding).
    settle: share of the iterations at the end that learns scales only, behind hard weights.
    free_run: share of windows that start from the quantized model's own state.
    scale_gradient: of activation scales, "straight" as in the public code of others, or "difference"
        (`relative_groups`).
    judged: recorded images to sample before and after, at least (`Judge.of`). What was learnt is kept if it leaves less
        error in the final samples, half of it (the geometric mean of old and new scales) if that does, and else
        nothing; where rounding learns, all or nothing. 0 keeps it unseen, as the paper does.
    """

    window: int = 5
    windows: tuple[int, ...] | None = None
    gradient: GradientMode = "identity"
    iterations: int = 3_000
    lr_weights: float = 1e-3
    lr_scales: float = 4e-3
    learn_weights: bool = True
    lr_weight_scales: float = 0.0
    keep_rounding: float = 0.6
    round_weight: float = 0.01
    warmup: float = 0.2
    settle: float = 0.2
    free_run: float = 0.0
    judged: int = 0
    scale_gradient: ScaleGradient = "straight"

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        modes = ("identity", "exact", "per_step")
        if self.gradient not in modes:
            raise SpecError(
                f"gradient must be one of {', '.join(modes)}, found {self.gradient!r}."
                f"{nearest(str(self.gradient), modes)}"
            )
        if self.window < 1 or self.iterations < 0 or any(length < 1 for length in self.windows or ()):
            raise SpecError(
                "window and every length in windows must be at least 1 and iterations at least 0, found "
                f"{self.window}, {self.windows} and {self.iterations}."
            )
        for name, value in (("lr_weights", self.lr_weights), ("lr_scales", self.lr_scales)):
            if not 0 < value < math.inf:
                raise SpecError(f"{name} of FitWindows must be above 0, found {value}.")
        if not 0 <= self.lr_weight_scales < math.inf:
            raise SpecError(f"lr_weight_scales of FitWindows must be at least 0, found {self.lr_weight_scales}.")
        if self.lr_weight_scales and self.learn_weights:
            raise SpecError(
                "Windows learn either the rounding of weights or their scales: set learn_weights=False or "
                "lr_weight_scales=0."
            )
        if self.round_weight < 0:
            raise SpecError(f"round_weight of FitWindows must be at least 0, found {self.round_weight}.")
        check_scale_gradient("FitWindows", self.scale_gradient)
        if self.judged < 0:
            raise SpecError(f"judged of FitWindows must be at least 0, found {self.judged}.")
        for name, value in (
            ("keep_rounding", self.keep_rounding),
            ("warmup", self.warmup),
            ("settle", self.settle),
            ("free_run", self.free_run),
        ):
            if not 0 <= value <= 1:
                raise SpecError(f"{name} must lie in [0, 1], found {value}.")

    def check(self, job: Job) -> None:
        """Window lengths that cannot add up to the steps. Some schedulers make more calls than steps (Heun, PNDM), and
        image to image walks a part of them. Timesteps that the caller gives are counted once they are recorded.
        """
        if self.windows is None:
            return
        least, most = expected_steps(job)
        if not least <= sum(self.windows) <= most:
            raise SpecError(
                f"windows {list(self.windows)} cover {sum(self.windows)} steps, but {job.steps} are sampled: their "
                "lengths must add up to the scheduler's steps."
            )

    def evaluations_for(self, *, images: int, batch: int, steps: int) -> float:
        """Of the network, to be expected. images: recorded in mini-batches of `batch`, each of so many steps."""
        lengths = self.windows or equal_windows(steps, min(self.window, steps))
        starts = [sum(lengths[:number]) for number in range(len(lengths))]
        before, passes = (0, 3) if self.gradient == "per_step" else (1, 4)
        drawn, walked = sum(lengths) / len(lengths), self.free_run * sum(starts) / len(starts)
        judged = 2 * judged_images(self.judged, images=images, batch=batch) * steps
        return self.iterations * min(images, batch) * (passes * drawn - before + walked) + judged

    def run(self, job: Job) -> Figures:
        trajectories: list[Trajectory] = job.handed["trajectories"]
        steps = len(trajectories[0].steps)
        windows = windows_of(self.windows or equal_windows(steps, min(self.window, steps)), steps)
        fitting = _Fitting.begin(self, job)
        if not fitting.soft and not fitting.scales and not fitting.factors:
            raise SpecError(
                "FitWindows has nothing to learn: neither weights nor activations are quantized by learnable "
                "parameters. Give it weights or activations of 2 to 8 bits, or set learn_weights or lr_weight_scales."
            )
        first = fitting.resume()
        history: list[list[float]] = fitting.history
        with job.run.progress.track(f"Fitting windows, {self.gradient} gradient", self.iterations) as advance:
            advance(first)
            for iteration in range(first, self.iterations):
                generator = job.run.generator("accuquant", iteration)
                number = int(torch.randint(len(windows), (1,), generator=generator))
                trajectory = trajectories[int(torch.randint(len(trajectories), (1,), generator=generator))]
                free = bool(torch.rand(1, generator=generator) < self.free_run)
                loss = fitting.iterate(iteration, trajectory, windows[number], free)
                history.append([number, loss])
                if (iteration + 1) % KEEP_EVERY == 0:
                    fitting.keep(iteration + 1)
                advance(1)
        fitting.finish()
        kept: Figures = {}
        judging = 0
        if self.judged:
            judge = Judge.of(job, self.judged)
            kept = {"share": fitting.keep_what_helps_(judge), "candidates": judge.report("share")}
            judging = judge.evaluations
        # A forward and a backward pass (worth two) of each step; identity and exact run all but the last once before.
        before, passes = (0, 3) if self.gradient == "per_step" else (len(history), 4)
        rows = trajectories[0].evaluations // steps  # of a step: two an image with guidance
        drawn = sum(windows[int(number)][1] - windows[int(number)][0] for number, _ in history)
        # A free-run start walks from the noise to the window, forward only.
        walked = self.free_run * sum(windows[int(number)][0] for number, _ in history)
        return {
            "windows": [list(window) for window in windows],
            "losses": history,
            "evaluations": round(rows * (passes * drawn - before + walked)) + judging,
            **kept,
        }


@dataclass(frozen=True)
class _Learnt:
    """Copies of activation scales, of hard weights whose rounding learns, and of weights' scales, by name."""

    scales: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]
    weight_scales: Mapping[str, torch.Tensor]

    def towards(self, other: _Learnt, share: float) -> _Learnt:
        """This one at 0, the other at 1, between them geometric means of the scales."""
        if share in (0.0, 1.0):
            return other if share else self

        def between(own: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: scale ** (1 - share) * others[name] ** share for name, scale in own.items()}

        return _Learnt(
            between(self.scales, other.scales), self.weights, between(self.weight_scales, other.weight_scales)
        )


def _copied(layers: Mapping[str, QuantizedLayer]) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}


@dataclass
class _Fitting:
    """The variables and optimizers of one run of the stage.

    denoiser: the job's; with several processes each runs a part of a mini-batch's rows.
    factors: of weights whose scales learn, by layer name.
    before: what learns as it was. None where nobody judges.
    """

    stage: FitWindows
    job: Job
    denoiser: nn.Module
    layers: Mapping[str, QuantizedLayer]
    soft: dict[str, SoftRounding]
    scales: dict[str, InputQuantizer]
    factors: dict[str, nn.Parameter]
    least: dict[str, torch.Tensor]
    weight_optimizer: torch.optim.Adam | None
    scale_optimizer: torch.optim.Adam | None
    history: list[list[float]]
    before: _Learnt | None = None

    @classmethod
    def begin(cls, stage: FitWindows, job: Job) -> _Fitting:
        every = quantized_layers(job.denoiser)
        layers = {name: layer for name, layer in every.items() if isinstance(layer, QuantizedLayer)}
        scales = input_scales(every, readers_of_sample(job))
        weights = _copied(layers) if stage.judged and stage.learn_weights else {}
        if stage.learn_weights:
            soften_all_(job, layers, keep=stage.keep_rounding)
        soft = soft_roundings(layers)
        factors: dict[str, nn.Parameter] = {}
        if stage.lr_weight_scales:
            quantized = {n: x for n, x in layers.items() if isinstance(x.weight_quantizer, WeightQuantizer)}
            factors = {name: learnt_scale_(layer) for name, layer in quantized.items()}
        groups = relative_groups(scales, stage.lr_scales, stage.scale_gradient)
        if factors:
            rate = stage.lr_weight_scales
            groups.append({"params": list(factors.values()), "lr": rate, "base_lr": rate})
        fitting = cls(
            stage=stage,
            job=job,
            denoiser=row_by_row(job),
            layers=layers,
            soft=soft,
            scales=scales,
            factors=factors,
            least={name: quantizer.scale.detach() / 10 for name, quantizer in scales.items()},
            weight_optimizer=adam([s.alpha for s in soft.values()], stage.lr_weights) if soft else None,
            scale_optimizer=adam(groups) if groups else None,
            history=[],
        )
        if stage.judged:
            fitting.before = fitting._learnt(weights)  # rounding is open by now
        return fitting

    def _learnt(self, weights: Mapping[str, torch.Tensor]) -> _Learnt:
        """Copies of what learns. weights: hard ones, where rounding does."""
        return _Learnt(
            {name: quantizer.scale.detach().clone() for name, quantizer in self.scales.items()},
            weights,
            {name: self._weight_scale(name).clone() for name in self.factors},
        )

    def _weight_scale(self, name: str) -> torch.Tensor:
        quantizer = self.layers[name].weight_quantizer
        assert isinstance(quantizer, WeightQuantizer)
        return quantizer.scale

    @property
    def soft_iterations(self) -> int:
        if self.scale_optimizer is None:
            return self.stage.iterations  # behind hard weights there would be nothing left to learn
        return round(self.stage.iterations * (1 - self.stage.settle))

    def iterate(self, iteration: int, trajectory: Trajectory, window: tuple[int, int], free: bool) -> float:
        """One window: gradients, then one step of both optimizers."""
        if iteration >= self.soft_iterations:
            self._harden()
        start, stop = window
        state = self._free_run(trajectory, start) if free else None
        optimizers = [o for o in (self.weight_optimizer, self.scale_optimizer) if o is not None]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        with materialised(self.layers):
            loss = window_gradient(self.denoiser, trajectory, start, stop, mode=self.stage.gradient, state=state)
        learnt = [*(s.alpha for s in self.soft.values()), *(q.scale for q in self.scales.values())]
        learnt += self.factors.values()
        self.job.run.processes.sum_([parameter.grad for parameter in learnt if parameter.grad is not None])
        self._regularise(iteration)
        if self.scale_optimizer is not None:
            for group in self.scale_optimizer.param_groups:
                group["lr"] = group["base_lr"] * cosine(iteration / self.stage.iterations)
        for optimizer in optimizers:
            optimizer.step()
        clamp_scales_(self.scales, self.least)
        with torch.no_grad():
            for factor in self.factors.values():
                factor.clamp_(min=0.1)
        return loss

    def _free_run(self, trajectory: Trajectory, start: int) -> State | None:
        with torch.no_grad(), materialised(self.layers):
            states = list(replay(self.denoiser, trajectory, 0, start))
        return states[-1] if states else None

    def _regularise(self, iteration: int) -> None:
        beta = annealed_beta(iteration / max(1, self.soft_iterations), self.stage.warmup)
        if beta is None or not self.soft:
            return
        for rounding in self.soft.values():
            rounding.regularise_(beta, self.stage.round_weight)

    def _harden(self) -> None:
        for name in self.soft:
            harden_soft_(self.layers[name])
        self.soft = {}
        self.weight_optimizer = None

    def finish(self) -> None:
        """Round and scale for good and stop asking for gradients."""
        self._harden()
        for name in self.factors:
            closed_scale_(self.layers[name])
        fix_scales_(self.scales)

    def keep_what_helps_(self, judge: Judge) -> float:
        """The share of what was learnt that stays: 1, 0.5 or 0, the first of them that leaves less error than 0."""
        before = self.before
        assert before is not None
        after = self._learnt(_copied(self.layers) if self.stage.learn_weights else {})
        shares = (1.0,) if self.stage.learn_weights else (1.0, 0.5)
        with self.job.run.progress.track("Judging the windows", (1 + len(shares)) * judge.images) as advance:
            self._put_(before)
            judge.sample(0.0, advance)
            kept = 0.0
            for share in shares:
                self._put_(before.towards(after, share))
                judge.sample(share, advance)
                if judge.better(share, 0.0):
                    kept = share
                    break
            advance((1 + len(shares) - len(judge.errors)) * judge.images)
        if not judge.finite(kept):
            raise CalibrationError(
                "The quantized network leaves the finite numbers along the recorded trajectories, with what windows "
                "have learnt and without: give it more bits, or set judged=0 and look at the checkpoint with "
                "`stepquant doctor`."
            )
        self._put_(before.towards(after, kept))
        return kept

    def _put_(self, learnt: _Learnt) -> None:
        with torch.no_grad():
            for name, scale in learnt.scales.items():
                self.scales[name].scale.copy_(scale)
            for name, weight in learnt.weights.items():
                self.layers[name].weight.copy_(weight)
            for name, scale in learnt.weight_scales.items():
                rescale_(self.layers[name], scale)

    def keep(self, iteration: int) -> None:
        """Write everything that the rest of the stage depends on."""
        if self.job.keeper is None:
            return
        tensors = {f"alpha.{name}": rounding.alpha.detach() for name, rounding in self.soft.items()}
        tensors |= {f"scale.{name}": quantizer.scale.detach() for name, quantizer in self.scales.items()}
        if not self.soft and self.stage.learn_weights:
            tensors |= {f"weight.{name}": layer.weight.detach() for name, layer in self.layers.items()}
        tensors |= {f"factor.{name}": factor.detach() for name, factor in self.factors.items()}
        for prefix, optimizer in (("weights", self.weight_optimizer), ("scales", self.scale_optimizer)):
            if optimizer is not None:
                tensors |= {f"{prefix}.{name}": value for name, value in adam_state(optimizer).items()}
        self.job.keeper.save("windows", tensors, {"iteration": iteration, "history": self.history})

    def resume(self) -> int:
        """Continue from the last kept state; returns the iteration to begin with."""
        kept = self.job.keeper.load("windows") if self.job.keeper else None
        if kept is None:
            return 0
        tensors, meta = kept
        self.history.extend(meta["history"])
        iteration = int(meta["iteration"])
        with torch.no_grad():
            for name, quantizer in self.scales.items():
                quantizer.scale.copy_(tensors[f"scale.{name}"])
            for name, factor in self.factors.items():
                factor.copy_(tensors[f"factor.{name}"])
            for name, rounding in self.soft.items():
                if f"alpha.{name}" in tensors:
                    rounding.alpha.copy_(tensors[f"alpha.{name}"])
        if any(name.startswith("weight.") for name in tensors):
            self._harden()
            for name, layer in self.layers.items():
                layer.weight.data.copy_(tensors[f"weight.{name}"])
        for prefix, optimizer in (("weights.", self.weight_optimizer), ("scales.", self.scale_optimizer)):
            if optimizer is not None:
                load_adam_state_(
                    optimizer, {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
                )
        return iteration
