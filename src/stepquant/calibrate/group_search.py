"""The stage that lets every timestep choose its activation quantizers. Formulas: `calibrate.timestep_groups`."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stepquant.calibrate.forms import scaled_sample
from stepquant.calibrate.informative import (
    Choose,
    TimestepChooser,
    bottleneck_features,
    check_choose,
    median_kernel,
)
from stepquant.calibrate.noising import check_drawn_noise_target, noise_scales, noise_target, noisy
from stepquant.calibrate.ranges import SAMPLE_MARGIN_BITS, Observer, RangeRule, observing
from stepquant.calibrate.reconstruct import adam_state, clocked, load_adam_state_, readers_of_sample
from stepquant.calibrate.stages import Place
from stepquant.calibrate.steps import Step, copy_sharing, prediction_of
from stepquant.calibrate.timestep_groups import (
    ChannelBuckets,
    ChannelObserver,
    Harden,
    Searching,
    TimestepGroups,
    check_harden,
)
from stepquant.calibrate.trajectory import Trajectory
from stepquant.errors import CalibrationError, SpecError, UnsupportedPipeline, nearest, no_layer_matches
from stepquant.model.assembly import channel_axis
from stepquant.model.clock import StepClock
from stepquant.model.families import FIRST_LAYERS, make_attention_explicit_
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import Plan, operand_specs, quantizable, quantized_layers
from stepquant.numerics.spec import QuantSpec
from stepquant.recipe import Figures, Job

__all__ = ["Granularity", "SearchGroups", "Target"]

Granularity = Literal["timestep", "timestep+channel"]
Target = Literal["noise", "full_precision"]

KEEP_EVERY = 4
"""Rounds between two states written for resuming."""


@dataclass(frozen=True)
class SearchGroups:
    """Give every timestep one of several parameter sets of each activation, chosen by gradient (Wang et al. 2023).

    A round chooses a timestep t* (`choose`), takes a mini-batch of recorded images x_0, and makes one update at every
    recorded step, then `focus` more at t*, each on x_t = alpha_t x_0 + sigma_t eps with a new eps per image:

        J = mean over images of || target - prediction(x_t, t) ||^2 + entropy * (sum over layers of the shares' entropy)

    Then every timestep keeps one parameter set. Weights must be hard.

    groups: parameter sets of a layer, G.
    granularity: "timestep" (the paper: G learnt triples per tensor), or "timestep+channel" (the public code: ranges
        from buckets of channels, shares per channel, a scale per timestep and channel). Matmuls, which have no channels
        that a scale could go with, are searched per tensor either way.
    layers: shell patterns of the layers to search; others keep their quantizers.
    entropy: lambda. 0.8 in the paper; 1.0 in the public code, where the entropy is a mean over groups and channels.
    target: the drawn noise (in the scheduler's prediction type), or the full-precision model's prediction.
    harden: "argmax" (the paper) or "average" (the public code).
    choose: see `calibrate.informative`.
    lr: Adam's rate of the triples, relative to each scale, and for bounds to the number of levels. lr_logits: of alpha.
    ranges: how the range of a timestep is observed, for the first triples.
    prior: logit with which every timestep favours, at first, the parameter set nearest to its observed range; 0 is the
        paper's constant start, which needs more rounds: untouched shares choose the narrowest range.
    """

    groups: int = 8
    granularity: Granularity = "timestep"
    layers: tuple[str, ...] = ("*",)
    rounds: int = 64
    focus: int = 4
    entropy: float = 0.8
    target: Target = "noise"
    harden: Harden = "argmax"
    choose: Choose = "ucb"
    lr: float = 1e-3
    lr_logits: float = 5e-2
    ranges: RangeRule = "mse"
    prior: float = 0.0

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})
    replaces_input_quantizers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("granularity", self.granularity, ("timestep", "timestep+channel")),
            ("target", self.target, ("noise", "full_precision")),
        ):
            if value not in allowed:
                raise SpecError(
                    f"{name} must be {' or '.join(allowed)}, found {value!r}.{nearest(str(value), allowed)}"
                )
        check_harden(self.harden)
        check_choose(self.choose)
        if self.groups < 1 or self.rounds < 0 or self.focus < 0:
            raise SpecError(
                "groups must be at least 1, rounds and focus at least 0, found "
                f"{self.groups}, {self.rounds} and {self.focus}."
            )
        if min(self.entropy, self.lr, self.lr_logits, self.prior) < 0:
            raise SpecError(
                "entropy, lr, lr_logits and prior must not be negative, found "
                f"{self.entropy}, {self.lr}, {self.lr_logits} and {self.prior}."
            )
        if not self.layers:
            raise SpecError("layers names no layer to search: give patterns, ('*',) for all layers.")

    def check(self, job: Job) -> None:
        """Patterns that match nothing, layers of which none can be searched, and targets that the scheduler does not
        define show before recording.
        """
        if self.target == "noise":
            check_drawn_noise_target(job.pipe.scheduler)
        copied = copy.deepcopy(job.full_precision)
        make_attention_explicit_(copied)
        matching = self._matching(list(quantizable(copied)))
        for stage in job.stages:
            if isinstance(stage, Place):
                self._check_plan(stage.plan(copy.deepcopy(job.full_precision)), matching)

    def _check_plan(self, plan: Plan, matching: list[str]) -> None:
        """Raise SpecError where no layer that matches will have a quantizer to search."""
        found = [name for name in matching if name in plan and operand_specs(plan[name])]
        if not found:
            raise SpecError(
                f"SearchGroups has nothing to search: the activations of {_shown(matching)} are in floating point. "
                "Give them 2 to 8 bits (--activations, or a rule), or choose a method that can do without, "
                "such as q_diffusion."
            )
        # Layers of other names are seen to read the sample once the network runs.
        reader = next((name for name in FIRST_LAYERS if name in plan), None)
        spec = plan[found[0]].input
        if found == [reader] and spec is not None and spec.bits >= SAMPLE_MARGIN_BITS:
            raise SpecError(
                f"SearchGroups has nothing to search: layers={list(self.layers)} matches {reader} alone, which reads "
                "the sample and has a range of its own in every step. Name other layers, or leave the option out to "
                "search all of them."
            )

    def _matching(self, names: list[str]) -> list[str]:
        """The names that match one of the patterns. Every pattern must match something."""
        for pattern in self.layers:
            if not fnmatch.filter(names, pattern):
                raise SpecError(no_layer_matches(pattern, names, option="layers"))
        return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.layers)]

    def run(self, job: Job) -> Figures:
        _check_ends_at_the_image(job.handed["trajectories"][0])
        search = _Search.begin(self, job)
        first = search.resume()
        with job.run.progress.track("Searching timestep groups", self.rounds) as advance:
            advance(first)
            for number in range(first, self.rounds):
                search.round(number)
                if (number + 1) % KEEP_EVERY == 0:
                    search.keep(number + 1)
                advance(1)
        return search.finish()


@dataclass
class _Search:
    """The variables and the optimizer of one run of the stage."""

    stage: SearchGroups
    job: Job
    searching: dict[tuple[str, str], Searching]
    steps_of_bin: list[int]
    timesteps: list[float]
    scales: list[tuple[float, float]]
    chooser: TimestepChooser
    optimizer: torch.optim.Adam
    evaluations: int
    history: list[dict[str, float]]

    @classmethod
    def begin(cls, stage: SearchGroups, job: Job) -> _Search:
        trajectory: Trajectory = job.handed["trajectories"][0]
        places = _places(stage, job)
        searching = _start(stage, job, places, trajectory)
        rows = sum(call.prediction.shape[0] for step in trajectory.steps for call in step.calls)
        clock = clocked(job.denoiser)
        bins = [_bin_of(clock, step) for step in trajectory.steps]
        kernel = None
        if stage.choose == "mmd":
            features = bottleneck_features(job.full_precision, trajectory)
            kernel = median_kernel(features[[bins.index(number) for number in range(clock.bins)]])
            rows += trajectory.evaluations
        layers = quantized_layers(job.denoiser)
        for (name, attribute), module in searching.items():
            setattr(layers[name], attribute, module)
        return cls(
            stage=stage,
            job=job,
            searching=searching,
            steps_of_bin=[bins.index(number) for number in range(clock.bins)],
            timesteps=[_timestep_of(clock, trajectory.steps[bins.index(number)]) for number in range(clock.bins)],
            scales=[noise_scales(step) for step in trajectory.steps],
            chooser=TimestepChooser(stage.choose, clock.bins, stage.rounds, kernel),
            optimizer=torch.optim.Adam(_parameter_groups(stage, searching)),
            evaluations=rows,
            history=[],
        )

    def round(self, number: int) -> None:
        """Choose a timestep, then one update at every step and `focus` more at the chosen one."""
        trajectories: list[Trajectory] = self.job.handed["trajectories"]
        trajectory = trajectories[number % len(trajectories)]
        entropy = torch.stack([module.shares.entropy() for module in self.searching.values()])
        chosen = self.chooser.next(self.job.run.generator("groups", "choose", number), entropy, self.stage.groups)
        visits = [*range(len(trajectory.steps)), *[self.steps_of_bin[chosen]] * self.stage.focus]
        generator = self.job.run.generator("groups", number)
        losses = [self._update(trajectory, index, generator) for index in visits]
        self.history.append(
            {
                "timestep": self.timesteps[chosen],
                "entropy": float(torch.stack([m.shares.entropy().mean() for m in self.searching.values()]).mean()),
                "loss": sum(losses) / len(losses),
            }
        )

    def _update(self, trajectory: Trajectory, index: int, generator: torch.Generator) -> float:
        """One step of Adam at one recorded step of the trajectory; returns the task loss."""
        self.optimizer.zero_grad(set_to_none=True)
        rows, loss, bins = 0, torch.zeros(()), set()
        for args, kwargs, wanted in self._mini_batch(trajectory, index, generator):
            found = prediction_of(self.job.denoiser(*args, **kwargs))[:, : wanted.shape[1]]
            bins |= set(clocked(self.job.denoiser).bin.tolist())
            # In float32 or wider: a sum over latents leaves float16.
            wide = torch.promote_types(found.dtype, torch.float32)
            own = (found.to(wide) - wanted.to(wide)).square().sum()
            loss = loss.to(own) + own
            rows += len(found)
        loss = loss / rows
        if not bool(torch.isfinite(loss)):
            raise CalibrationError(
                f"The search left the finite numbers at step {index}: lower lr and lr_logits of SearchGroups."
            )
        entropy = torch.stack([module.penalty(sorted(bins)) for module in self.searching.values()]).sum()
        (loss + self.stage.entropy * entropy).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        for module in self.searching.values():
            module.project_()
        # A backward pass is worth two; the full-precision target is one forward pass more.
        self.evaluations += rows * (4 if self.stage.target == "full_precision" else 3)
        return float(loss.detach())

    def _mini_batch(
        self, trajectory: Trajectory, index: int, generator: torch.Generator
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
        """Arguments and target of each of the step's calls, on the trajectory's images with new noise."""
        step, form = trajectory.steps[index], trajectory.form
        if form is None:
            raise CalibrationError("The trajectory is not sealed. Call seal(trajectory) first.")
        image = form.carried(trajectory.steps[-1].next_sample)
        drawn = torch.randn(image.shape, generator=generator).to(image)
        noise = form.carried(drawn)
        scheduler = copy_sharing(step.scheduler, {})
        sample = noisy(image, noise, self.scales[index]).to(image.dtype)
        sample = scaled_sample(scheduler, sample, step.timestep, scaled=form.scaled)
        for (args, kwargs), call in zip(form.inputs(sample, step, trajectory.network), step.calls, strict=True):
            if self.stage.target == "noise":
                wanted = noise_target(scheduler, image, noise, self.scales[index])
                # With guidance, one call may hold the batch twice: both halves predict the same noise.
                halves = call.prediction.shape[0] // len(wanted)
                wanted = wanted.repeat(halves, *[1] * (wanted.ndim - 1))
            else:
                with torch.no_grad():
                    # A learnt variance, in the channels behind, is not compared.
                    wanted = prediction_of(self.job.full_precision(*args, **kwargs))[:, : image.shape[1]]
            yield args, kwargs, wanted

    def finish(self) -> Figures:
        """Put plain quantizers in place and say what happened."""
        rows, layers = {}, quantized_layers(self.job.denoiser)
        for (name, attribute), module in self.searching.items():
            hard = module.hardened(self.stage.harden)
            setattr(layers[name], attribute, hard)
            rows[f"{name}.{attribute}"] = hard.rows
        return {
            "quantizers": len(self.searching),
            "per_channel": sum(isinstance(module, ChannelBuckets) for module in self.searching.values()),
            "rows": rows,
            "timesteps": self.timesteps,
            "counts": self.chooser.counts,
            "rounds": self.history,
            "evaluations": self.evaluations,
        }

    def _variables(self) -> dict[str, Tensor]:
        return {
            f"{name}.{attribute}.{key}": parameter
            for (name, attribute), module in self.searching.items()
            for key, parameter in module.named_parameters()
        }

    def keep(self, done: int) -> None:
        """Write everything that the rest of the stage depends on."""
        if self.job.keeper is None:
            return
        tensors = {name: parameter.detach() for name, parameter in self._variables().items()}
        meta = {
            "round": done,
            "history": self.history,
            "counts": self.chooser.counts,
            "evaluations": self.evaluations,
        }
        self.job.keeper.save("groups", tensors | adam_state(self.optimizer), meta)

    def resume(self) -> int:
        """Continue from the last kept state; returns the round to begin with."""
        kept = self.job.keeper.load("groups") if self.job.keeper else None
        if kept is None:
            return 0
        tensors, meta = kept
        with torch.no_grad():
            for name, parameter in self._variables().items():
                parameter.copy_(tensors[name])
        load_adam_state_(self.optimizer, tensors)
        self.history, self.chooser.counts = list(meta["history"]), list(meta["counts"])
        self.evaluations = int(meta["evaluations"])
        return int(meta["round"])


def _shown(names: list[str]) -> str:
    """ "a, b and 5 more"."""
    first = ", ".join(names[:2])
    return first if len(names) <= 2 else f"{first} and {len(names) - 2} more"


def _check_ends_at_the_image(trajectory: Trajectory) -> None:
    """Raise UnsupportedPipeline if steps follow those of the denoiser: what these lead to is no clean image then."""
    last = trajectory.steps[-1]
    own, final = float(torch.as_tensor(last.timestep)), float(last.scheduler.timesteps[-1])
    if own != final:
        raise UnsupportedPipeline(
            f"SearchGroups makes noisy samples of clean images, and the steps of this denoiser end at timestep {own:g} "
            f"while the pipeline goes on to {final:g}: what they lead to is still noisy. Use a method without a search "
            "of timestep groups, or search the denoiser of the last steps."
        )


def _timestep_of(clock: StepClock, step: Step) -> float:
    """What the denoiser was given as timestep."""
    call = step.calls[0]
    value = call.kwargs[clock.argument] if clock.argument in call.kwargs else call.args[clock.position]
    return float(torch.as_tensor(value).reshape(-1)[0])


def _bin_of(clock: StepClock, step: Step) -> int:
    clock.set(_timestep_of(clock, step))
    return int(clock.bin)


def _places(stage: SearchGroups, job: Job) -> dict[tuple[str, str], InputQuantizer]:
    """The static quantizers to search, by layer and attribute."""
    layers = quantized_layers(job.denoiser)
    found: dict[tuple[str, str], InputQuantizer] = {}
    readers = readers_of_sample(job)
    for name in stage._matching(list(layers)):
        if name in readers:
            continue
        for attribute in ("input_quantizer", "second_quantizer"):
            quantizer = getattr(layers[name], attribute, None)
            if isinstance(quantizer, InputQuantizer):
                found[name, attribute] = quantizer
    if not found:
        raise SpecError(
            "SearchGroups has nothing to search: no layer that matches has a static activation quantizer. Give the "
            "activations 2 to 8 bits, or put FitInputRanges before. What reads the sample is not searched: it has a "
            "range of its own in every step."
        )
    return found


def _start(
    stage: SearchGroups, job: Job, places: Mapping[tuple[str, str], InputQuantizer], trajectory: Trajectory
) -> dict[tuple[str, str], Searching]:
    """Observe every recorded step behind the quantized weights, and make what will sit in the quantizers' places."""
    plan: Plan = job.handed["plan"]
    clock, layers = clocked(job.denoiser), quantized_layers(job.denoiser)
    axes: dict[tuple[str, str], int] = {}
    for name, attribute in places:
        layer = layers[name]
        if stage.granularity == "timestep+channel" and isinstance(layer, QuantizedLayer):
            axes[name, attribute] = channel_axis(layer)
    by_channel = {place: ChannelObserver(clock, axis) for place, axis in axes.items()}
    with observing(job.denoiser, plan, clock, job.run.generator("groups", "ranges")) as observers, torch.no_grad():
        for (name, attribute), observer in by_channel.items():
            setattr(layers[name], attribute, observer)
        for step in trajectory.steps:
            for call in step.calls:
                job.denoiser(*call.args, **call.kwargs)
    found: dict[tuple[str, str], Searching] = {}
    for place, quantizer in places.items():
        spec = plan[place[0]].input if place[1] == "input_quantizer" else plan[place[0]].second
        assert spec is not None
        if place in by_channel:
            low, high = by_channel[place].ranges()
            found[place] = ChannelBuckets(
                spec, clock, low, high, stage.groups, channel_axis=axes[place], prior=stage.prior
            )
        else:
            low, high = _observed_ranges(
                observers[place], clock.bins, spec, stage.ranges, f"The {place[1]} of {place[0]}"
            )
            found[place] = TimestepGroups(spec, clock, low, high, stage.groups, prior=stage.prior)
        found[place].to(quantizer.scale.device)
    return found


def _observed_ranges(
    observer: Observer, bins: int, spec: QuantSpec, rule: RangeRule, where: str
) -> tuple[Tensor, Tensor]:
    """Range of every bin, `[N]` each."""
    scale, zero_point = observer.params(spec, torch.arange(bins), rule, where)
    return (spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale


def _parameter_groups(stage: SearchGroups, searching: Mapping[Any, Searching]) -> list[dict[str, Any]]:
    """Adam's groups: scales relative to their size, bounds relative to the number of levels, all logits alike."""
    groups: list[dict[str, Any]] = []
    for module in searching.values():
        if isinstance(module, TimestepGroups):
            groups.append({"params": [module.scale], "lr": stage.lr * float(module.scale.detach().mean())})
            levels = module.spec.qmax - module.spec.qmin
            groups.append({"params": [module.low, module.high], "lr": stage.lr * levels})
    logits = [row for module in searching.values() for row in module.shares.logits]
    return [*groups, {"params": logits, "lr": stage.lr_logits}]
