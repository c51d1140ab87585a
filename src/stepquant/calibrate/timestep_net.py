"""Activation step sizes that a small network computes from the timestep, learnt and then written down as a table.

Every quantizer has a network f of its own:

    e(t)  = [sin(t w_j), cos(t w_j)],   w_j = 10000^(-j / J),  j = 0 .. J - 1                     e [2 J]
    f(t)  = W_L relu( .. relu(W_1 e(t) + b_1) .. ) + b_L                                          a scalar
    s(t)  = s_0 softplus(f(t)) ,   b_L = log(e - 1) and W_L = 0 at first, so that s(t) = s_0
    x_hat = s(t) (clamp(round(x / s(t)) + z, qmin, qmax) - z)

and all of them are learnt together, straight through the rounding, so that the denoiser's prediction stays:

    min over all f of   mean over images and timesteps of  || prediction(x_t, t) - prediction_fp(x_t, t) ||_2^2

In the end s(t) is computed once for every timestep of the schedule: an ordinary `InputQuantizer` with a row for each.

Source: So et al. 2023 (TDQ, arXiv:2306.02316). Constants of ours are marked.
"""

from __future__ import annotations

import copy
import fnmatch
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from stepquant.calibrate.layer_inputs import check_patterns
from stepquant.calibrate.reconstruct import (
    adam_state,
    clocked,
    load_adam_state_,
    readers_of_sample,
    reconstruction_loss,
)
from stepquant.calibrate.rounding import cosine
from stepquant.calibrate.select import CalibrationSet, inputs
from stepquant.calibrate.steps import prediction_of
from stepquant.calibrate.trajectory import Trajectory
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.clock import StepClock
from stepquant.model.families import make_attention_explicit_
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import quantizable, quantized_layers
from stepquant.numerics.affine import QParams, fake_quantize
from stepquant.recipe import Figures, Job

__all__ = ["LearnStepSizes", "TimestepScale", "embedded"]

LONGEST = 10_000.0
"""Ratio of the longest to the shortest period of the embedding, as in the denoisers' own. Ours."""

SPAN = 1000.0
"""Timesteps are scaled so that the largest has this magnitude: flow models count them from 0 to 1. Ours."""

UNIT = math.log(math.e - 1)
"""softplus of this is 1."""

KEEP_EVERY = 100
"""Iterations between two states written for resuming."""

MOST_LOSSES = 200
"""In the figures, evenly spread over the iterations."""


def embedded(timesteps: Tensor, frequencies: int) -> Tensor:
    """e(t) of timesteps `[N]`, float32 `[N, 2 J]`."""
    times = timesteps.double()
    times = times * (SPAN / times.abs().amax().clamp(min=1e-12))
    rates = LONGEST ** (-torch.arange(frequencies, dtype=torch.float64) / frequencies)
    angles = times[:, None].cpu() * rates
    return torch.cat([angles.sin(), angles.cos()], 1).float()


class TimestepScale(nn.Module):
    """Stands in a static quantizer's place while its step sizes are learnt.

    net: f. features `[N, 2 J]`: e(t) of every timestep bin. quantizer: the one whose step sizes s_0 it starts from;
        each of its rows keeps its zero point.
    """

    features: Tensor

    def __init__(
        self, quantizer: InputQuantizer, features: Tensor, *, layers: int, width: int, generator: torch.Generator
    ) -> None:
        """layers: linear layers of f, at least 2. width: of the hidden ones. generator: draws the first weights."""
        super().__init__()
        object.__setattr__(self, "quantizer", quantizer)  # not a part: its buffers are not learnt
        self.register_buffer("features", features, persistent=False)
        sizes = [features.shape[1], *[width] * (layers - 1), 1]
        # Without torch's own initialisation, which would draw from its global generator.
        linear: list[nn.Linear] = []
        for before, after in itertools.pairwise(sizes):
            linear.append(skip_init(nn.Linear, before, after))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for one in linear[:-1]:
                # He et al. 2015, drawn from our own stream.
                one.weight.copy_(torch.randn(one.weight.shape, generator=generator) * (2 / one.in_features) ** 0.5)
                one.bias.zero_()
            linear[-1].weight.zero_()
            linear[-1].bias.fill_(UNIT)
        self.net = nn.ModuleList(linear)
        self.to(features.device)

    quantizer: InputQuantizer

    def factors(self, bins: Tensor) -> Tensor:
        """s(t) / s_0 at timestep bins `[K]`."""
        hidden = self.features.index_select(0, bins)
        for number, one in enumerate(self.net):
            hidden = one(F.relu(hidden) if number else hidden)
        return F.softplus(hidden[:, 0])

    def scales(self, bins: Tensor) -> Tensor:
        """s(t) at timestep bins `[K]`."""
        return self.quantizer.scale[self.quantizer.row_of_bin[bins]] * self.factors(bins)

    def forward(self, x: Tensor) -> Tensor:
        bins = self.quantizer.clock.bin
        scale, zero_point = self.scales(bins), self.quantizer.zero_point[self.quantizer.row_of_bin[bins]]
        if len(bins) > 1:
            # Heads or frames may have been folded into the batch: each sample's parameters repeat for its parts.
            parts, shape = x.shape[0] // len(bins), (-1, *(1,) * (x.ndim - 1))
            scale, zero_point = (v.repeat_interleave(parts).reshape(shape) for v in (scale, zero_point))
        return fake_quantize(x, QParams(scale, zero_point), self.quantizer.spec)

    @torch.no_grad()
    def tabulated(self) -> InputQuantizer:
        """The plain quantizer that is saved: a row for every timestep bin."""
        clock: StepClock = self.quantizer.clock
        bins = torch.arange(clock.bins, device=self.features.device)
        zero_point = self.quantizer.zero_point[self.quantizer.row_of_bin[bins]]
        params = QParams(self.scales(bins), zero_point)
        if not bool((torch.isfinite(params.scale) & (params.scale > 0)).all()):
            raise CalibrationError(
                f"Learnt step sizes range from {float(params.scale.min())} to {float(params.scale.max())}: lower lr of "
                "LearnStepSizes."
            )
        return InputQuantizer(self.quantizer.spec, clock, params, bins).to(self.features.device)


@dataclass(frozen=True)
class LearnStepSizes:
    """Learn step sizes as functions of the timestep, for all quantized activations together, and tabulate them.

    Starts from the ranges that are there (`FitInputRanges`). Weights must be hard.

    layers: shell patterns of layer names; others keep their ranges. Quantizers per channel, with ranges found at run
        time or with bits that change over time do too, and those that read the sample itself.
    iterations: mini-batches of `batch` calibration samples, of mixed timesteps. lr: Adam's, with cosine decay to 0.
    depth, width, frequencies: L, hidden units, and J of the networks.
    """

    layers: tuple[str, ...] = ("*",)
    iterations: int = 5_000
    batch: int = 32
    lr: float = 1e-3
    depth: int = 4
    width: int = 64
    frequencies: int = 32

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})
    replaces_input_quantizers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("batch", 1), ("depth", 2), ("width", 1), ("frequencies", 1)):
            if getattr(self, name) < least:
                raise SpecError(f"{name} of LearnStepSizes must be at least {least}, found {getattr(self, name)}.")
        if not self.lr > 0:
            raise SpecError(f"lr of LearnStepSizes must be positive, found {self.lr}.")
        if not self.layers:
            raise SpecError("layers names no layer to learn: give patterns, ('*',) for all layers.")

    def check(self, job: Job) -> None:
        """Patterns that match nothing show before anything is recorded."""
        copied = copy.deepcopy(job.full_precision)
        make_attention_explicit_(copied)
        check_patterns(self.layers, quantizable(copied))

    def run(self, job: Job) -> Figures:
        learning = self._begin(job)
        layers = quantized_layers(job.denoiser)
        parameters = {
            f"{name}.{attribute}.{key}": parameter
            for (name, attribute), module in learning.items()
            for key, parameter in module.named_parameters()
        }
        optimizer = torch.optim.Adam(list(parameters.values()), lr=self.lr)
        first, losses = _resumed(job, parameters, optimizer)
        chosen: CalibrationSet = job.handed["calibration"]
        weights = torch.tensor(chosen.weights, dtype=torch.float64)
        evaluations = 3 * min(self.batch, len(chosen)) * self.iterations  # a backward pass counts as two
        with job.run.progress.track("Learning step sizes over time", self.iterations) as advance:
            for place, module in learning.items():
                setattr(layers[place[0]], place[1], module)
            advance(first)
            for iteration in range(first, self.iterations):
                generator = job.run.generator("step sizes", iteration)
                drawn = torch.multinomial(
                    weights, min(self.batch, len(chosen)), replacement=True, generator=generator
                ).tolist()
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * cosine(iteration / self.iterations)
                loss = _prediction_loss(job, chosen, drawn)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                found = float(loss.detach())
                if not math.isfinite(found):
                    raise CalibrationError(
                        f"Learning step sizes left the finite numbers at iteration {iteration}: lower lr."
                    )
                if iteration % -(-self.iterations // MOST_LOSSES) == 0:
                    losses.append(found)
                if (iteration + 1) % KEEP_EVERY == 0:
                    _keep(job, parameters, optimizer, iteration + 1, losses)
                advance(1)
        spread = {}
        for (name, attribute), module in learning.items():
            hard = module.tabulated()
            setattr(layers[name], attribute, hard)
            spread[f"{name}.{attribute}"] = float(hard.scale.max() / hard.scale.min())
        return {"quantizers": len(learning), "spread": spread, "losses": losses, "evaluations": evaluations}

    def _begin(self, job: Job) -> dict[tuple[str, str], TimestepScale]:
        """A network for every static quantizer that is to be learnt; nothing is in place yet."""
        layers = quantized_layers(job.denoiser)
        check_patterns(self.layers, layers)
        clock: StepClock = clocked(job.denoiser)
        features = embedded(_timesteps(job, clock), self.frequencies).to(clock.edges.device)
        readers = readers_of_sample(job)
        found: dict[tuple[str, str], TimestepScale] = {}
        for name, layer in layers.items():
            if name in readers or not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.layers):
                continue
            for attribute in ("input_quantizer", "second_quantizer"):
                quantizer = getattr(layer, attribute, None)
                if not isinstance(quantizer, InputQuantizer) or quantizer.row_bits is not None:
                    continue
                if quantizer.spec.granularity == "tensor":
                    found[name, attribute] = TimestepScale(
                        quantizer,
                        features,
                        layers=self.depth,
                        width=self.width,
                        generator=job.run.generator("timestep net", name, attribute),
                    )
        if not found:
            raise SpecError(
                "LearnStepSizes has nothing to learn: no layer that matches has a static activation quantizer per "
                "tensor. Give the activations 2 to 8 bits, or put FitInputRanges before."
            )
        return found


def _timesteps(job: Job, clock: StepClock) -> Tensor:
    """The recorded timestep of every bin, `[N]`."""
    found: dict[int, float] = {}
    for step in job.handed["trajectories"][0].steps:
        for call in step.calls:
            value = call.kwargs[clock.argument] if clock.argument in call.kwargs else call.args[clock.position]
            times = torch.as_tensor(value).reshape(-1).double().cpu()
            clock.set(times)
            found |= dict(zip(clock.bin.tolist(), times.tolist(), strict=True))
    return torch.tensor([found[number] for number in range(clock.bins)], dtype=torch.float64)


def _prediction_loss(job: Job, chosen: CalibrationSet, positions: Sequence[int]) -> Tensor:
    """Squared error of the denoiser's prediction of some calibration samples against the recorded one."""
    trajectories: list[Trajectory] = job.handed["trajectories"]
    args, kwargs = inputs(trajectories, chosen, positions)
    wanted = torch.cat([_recorded(trajectories, *chosen.entries[position]) for position in positions])
    found = prediction_of(job.denoiser(*args, **kwargs))
    return reconstruction_loss(found, wanted.to(found))


def _recorded(trajectories: Sequence[Trajectory], number: int, step: int, row: int) -> Tensor:
    """What the full-precision model predicted for an entry of a calibration set, `[1, ...]`."""
    for call in trajectories[number].steps[step].calls:
        if row < call.prediction.shape[0]:
            return call.prediction[row : row + 1]
        row -= call.prediction.shape[0]
    raise CalibrationError(f"The calibration set names a row of step {step} that is not recorded.")


def _keep(
    job: Job, parameters: Mapping[str, Tensor], optimizer: torch.optim.Adam, done: int, losses: Sequence[float]
) -> None:
    if job.keeper is not None:
        tensors = {name: parameter.detach() for name, parameter in parameters.items()}
        meta: dict[str, Any] = {"iteration": done, "losses": list(losses)}
        job.keeper.save("step-sizes", tensors | adam_state(optimizer), meta)


def _resumed(job: Job, parameters: Mapping[str, Tensor], optimizer: torch.optim.Adam) -> tuple[int, list[float]]:
    """Go on from the last kept state: the iteration to begin with, and the losses before it."""
    kept = job.keeper.load("step-sizes") if job.keeper else None
    if kept is None:
        return 0, []
    tensors, meta = kept
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    load_adam_state_(optimizer, tensors)
    return int(meta["iteration"]), list(meta["losses"])
