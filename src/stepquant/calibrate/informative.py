"""Which timesteps are worth calibrating on: entropy with an exploration bonus, or a match of distributions.

Source: Wang et al. 2023 (APQ-DM, arXiv:2305.18723), structural risk minimisation over timesteps, and its public code.

    ucb     t* = argmax_t  H_t + eta / (N_t + 1)                   the paper, eta = 1.5
    count   t* = argmax_t  sum over layers of H_t / G - w_N N_t    the public code, w_N = 2
    mmd     t* = argmin_t  MMD^2(chosen and t, all timesteps)      the term that the bonus of the paper stands for

H_t is the entropy of the search's shares at timestep t, N_t how often t was chosen. MMD is the maximum mean discrepancy
between the chosen timesteps and all of them, over features of the network's bottleneck, phi(t):

    MMD^2(p, q) = (p - q)^T K (p - q),   K_ij = exp(-||phi(i) - phi(j)||^2 / (2 m^2)),   m the median distance

`random` and `uniform` are baselines. Timesteps are counted from the image: 0 is the cleanest one, and ties go to the
lowest number, as in the public code.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from stepquant.calibrate.reconstruct import output_tensors
from stepquant.calibrate.select import at_steps
from stepquant.calibrate.trajectory import Trajectory, seen_in_steps
from stepquant.errors import SpecError, nearest
from stepquant.model.surgery import execution_order, quantizable, units_of
from stepquant.recipe import Figures, Job

__all__ = [
    "Choose",
    "SelectInformative",
    "TimestepChooser",
    "bottleneck_features",
    "check_choose",
    "count_scores",
    "median_kernel",
    "mmd_scores",
    "mmd_squared",
    "ucb_scores",
]

Choose = Literal["ucb", "count", "mmd", "random", "uniform"]

UCB_BONUS = 1.5
"""eta (Wang et al. 2023)."""

COUNT_PENALTY = 2.0
"""w_N of the public code's score."""

NOISIEST_SKIPPED = 0.3
"""Share of the timesteps, from the noise, that the public code's score never chooses: 30 of 100."""


def check_choose(choose: str, allowed: Sequence[str] = get_args(Choose)) -> None:
    """Raise SpecError unless `choose` is one of the allowed ways."""
    if choose not in allowed:
        raise SpecError(f"choose must be one of {', '.join(allowed)}, found {choose!r}.{nearest(str(choose), allowed)}")


def ucb_scores(entropy: Tensor, counts: Tensor) -> Tensor:
    """H_t + eta / (N_t + 1), `[N]`. entropy `[L, N]` in nats: the mean over the L layers counts, so that it keeps the
    scale of one layer, for which eta was given.
    """
    return entropy.mean(0) + UCB_BONUS / (counts + 1)


def count_scores(entropy: Tensor, counts: Tensor, groups: int) -> Tensor:
    """sum over layers of H_t / G - w_N N_t, `[N]`. entropy `[L, N]` in nats; the noisiest timesteps get -inf."""
    scores = entropy.sum(0) / groups - COUNT_PENALTY * counts
    kept = len(scores) - int(NOISIEST_SKIPPED * len(scores))
    return torch.cat([scores[:kept], torch.full_like(scores[kept:], -torch.inf)])


def median_kernel(features: Tensor) -> Tensor:
    """RBF kernel `[N, N]` of features `[N, F]`, bandwidth the median distance of two different timesteps, float64."""
    features = features.double()
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    between = distances[~torch.eye(len(features), dtype=torch.bool, device=features.device)]
    median = float(between.median()) if len(between) else 0.0
    return torch.exp(-(distances**2) / (2 * (median or 1.0) ** 2))


def mmd_squared(kernel: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """MMD^2 of two distributions `[..., N]` over the kernel's N points: `[...]`."""
    difference = (one - other).to(kernel.dtype)
    return torch.einsum("...i,ij,...j->...", difference, kernel, difference)


def mmd_scores(kernel: Tensor, counts: Tensor) -> Tensor:
    """For each timestep, minus the MMD^2 between the chosen ones with it and all, `[N]`."""
    with_one_more = counts + torch.eye(len(counts), dtype=kernel.dtype)
    chosen = with_one_more / with_one_more.sum(1, keepdim=True)
    return -mmd_squared(kernel, chosen, torch.full_like(chosen, 1 / len(counts)))


@dataclass
class TimestepChooser:
    """Chooses a timestep in every round and counts.

    total: number of timesteps, N. rounds: how many will be chosen ("uniform" spreads them).
    kernel: `[N, N]`, for "mmd" only.
    """

    choose: Choose
    total: int
    rounds: int
    kernel: Tensor | None = None
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * self.total

    def next(self, generator: torch.Generator, entropy: Tensor | None = None, groups: int = 1) -> int:
        """The timestep of this round, 0 .. N - 1. entropy `[L, N]` in nats, for "ucb" and "count"."""
        chosen = self._next(generator, entropy, groups)
        self.counts[chosen] += 1
        return chosen

    def _next(self, generator: torch.Generator, entropy: Tensor | None, groups: int) -> int:
        if self.choose == "random":
            return int(torch.randint(self.total, (1,), generator=generator))
        if self.choose == "uniform":
            return sum(self.counts) * self.total // self.rounds % self.total
        counts = torch.tensor(self.counts, dtype=torch.float64)
        if self.choose == "mmd":
            assert self.kernel is not None
            scores = mmd_scores(self.kernel.cpu(), counts)
        else:
            assert entropy is not None
            entropy = entropy.detach().cpu().double()
            scores = ucb_scores(entropy, counts) if self.choose == "ucb" else count_scores(entropy, counts, groups)
        return int(scores.argmax())


def bottleneck_features(denoiser: nn.Module, trajectory: Trajectory) -> Tensor:
    """phi of every recorded step, `[steps, F]`, noise first: the bottleneck's output, averaged over space and images.

    The bottleneck is `mid_block` where there is one (UNets), otherwise the block in the middle of the execution
    (transformers). Of several outputs it is the one in the shape of the input `hidden_states`: joint blocks return the
    text, too. Costs one forward pass per call of every step.
    """
    call = trajectory.steps[0].calls[0]
    name = "mid_block"
    if name not in dict(denoiser.named_modules()):
        units = units_of(denoiser, execution_order(denoiser, list(quantizable(denoiser)), call.args, call.kwargs))
        name = units[len(units) // 2].name
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        output = _image_of(module, args, kwargs, returned)
        # [B, F, *spatial] of convolutions, [B, T, F] of transformers, [B, F].
        inner = (1,) if output.ndim == 3 else tuple(range(2, output.ndim))
        found.append((output.mean(inner) if inner else output).double())

    handle = denoiser.get_submodule(name).register_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            return torch.stack([rows.mean(0) for rows in seen_in_steps(denoiser, trajectory, name, found)])
    finally:
        handle.remove()


def _image_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Tensor:
    """Of what a block returned, the first tensor in the shape of its `hidden_states`, or else the first tensor."""
    outputs = output_tensors(returned)
    inputs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    shape = getattr(inputs.get("hidden_states"), "shape", None)
    return next((output for output in outputs if output.shape == shape), outputs[0])


@dataclass(frozen=True)
class SelectInformative:
    """Calibrate on timesteps chosen one after the other, `batch` images at each.

    choose: "mmd" (the chosen timesteps look like all of them to the network), "random" or "uniform". The scores of the
        paper need the entropies of a search and are settings of `SearchGroups`.
    rounds: timesteps to choose; one that comes again counts with other images, or, once all were used, more.
    """

    choose: Literal["mmd", "random", "uniform"] = "mmd"
    rounds: int = 64
    batch: int = 16

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories"})
    gives: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def __post_init__(self) -> None:
        check_choose(self.choose, ("mmd", "random", "uniform"))
        if self.rounds < 1 or self.batch < 1:
            raise SpecError(
                f"SelectInformative needs rounds and batch of at least 1, found {self.rounds}, {self.batch}."
            )

    def run(self, job: Job) -> Figures:
        trajectories: list[Trajectory] = job.handed["trajectories"]
        steps = len(trajectories[0].steps)
        kernel, evaluations = None, 0
        if self.choose == "mmd":
            # Timesteps are counted from the image, steps from the noise.
            kernel = median_kernel(bottleneck_features(job.full_precision, trajectories[0]).flip(0))
            evaluations = trajectories[0].evaluations
        chooser = TimestepChooser(self.choose, steps, self.rounds, kernel)
        images = sum(trajectory.images for trajectory in trajectories)
        used: dict[int, int] = {}
        picks: list[tuple[int, int]] = []
        for number in range(self.rounds):
            step = steps - 1 - chooser.next(job.run.generator("informative", number))
            first = used.get(step, 0)
            picks += [(step, image % images) for image in range(first, first + self.batch)]
            used[step] = first + self.batch
        chosen = at_steps(trajectories, picks)
        job.handed["calibration"] = chosen
        return {"samples": len(chosen), "counts": chooser.counts[::-1], "evaluations": evaluations}
