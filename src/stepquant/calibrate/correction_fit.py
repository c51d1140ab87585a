"""Corrections of the guided prediction, fitted in closed form to recorded trajectories.

With eps_q the quantized denoiser's guided prediction in step k and x^ the sample that it sees, a correction subtracts
what a few regressors foretell of its error:

    corrected = eps_q - sum_j w_j phi_j,      phi out of  prediction: eps_q   sample: x^   one: 1
                                                          previous: eps_q at the timestep before

The coefficients of a step and channel are a ridge regression over images and pixels, in float64:

    w = argmin  sum (b (y - sum_j w_j phi_j))^2 + ridge * sum_j w_j^2 sum (b phi_j)^2

so `ridge` is relative to each regressor's own size. The estimators differ in the inputs x^ and in the error y:

    bias          one          x^ of the full-precision trajectory             y = eps_q(x^) - eps(x^),   b = 1
    scale         prediction   x^ of the full-precision trajectory             y = eps_q(x^) - eps(x^),   b = 1
    free_run      prediction   x^ of the quantized trajectory                  y = eps_q(x^) - eps(x^),   b = 1
    closed_loop   prediction   x^ reached with the earlier steps corrected     y = eps_q(x^) - eps(x^),   b = 1
    trajectory    prediction   x^ reached with the earlier steps corrected     b y = F_k(x^; eps_q) - x_{k+1}
    regression    as asked     x^ reached with the earlier steps corrected     b y = F_k(x^; eps_q) - x_{k+1}

F_k is the scheduler's step with its history, x_{k+1} the recorded full-precision sample, b = dF_k/d eps elementwise, so
that the last two take clipping and multistep solvers as they are (one Gauss-Newton step where F_k is not affine). The
recursion of the error that this rests on is in `calibrate.propagation`.

`scale` with gamma = 1 also subtracts the error that the step before has left, carried along by the solver alone:

    corrected_k = eps_q,k - K_k eps_q,k - (a_k b_{k-1} / b_k) K_{k-1} eps_q,k-1

Held-out images take part in every run but in no fit. Ours, and from no paper: the ridge, the split, and the shrinking
of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from stepquant.calibrate.propagation import step_coefficients
from stepquant.calibrate.step_rows import StepRows
from stepquant.calibrate.trajectory import (
    State,
    Trajectory,
    advance,
    follow,
    predict,
    scheduler_output,
    state_at,
)
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.correction import Corrector, StepCorrection

__all__ = [
    "REGRESSORS",
    "RIDGE",
    "Estimator",
    "EstimatorName",
    "Fitted",
    "Moments",
    "Problem",
    "Regressor",
    "fit",
    "held_out_images",
]

Regressor = Literal["prediction", "sample", "one", "previous"]

EstimatorName = Literal["bias", "scale", "free_run", "closed_loop", "trajectory", "regression"]

REGRESSORS: tuple[Regressor, ...] = ("prediction", "sample", "one", "previous")

RIDGE = 1e-3
"""Default strength, relative to the sum of a regressor's squares. Ours."""

_SINGLE: dict[str, tuple[Regressor, ...]] = {
    "bias": ("one",),
    "scale": ("prediction",),
    "free_run": ("prediction",),
    "closed_loop": ("prediction",),
    "trajectory": ("prediction",),
}


@dataclass(frozen=True)
class Estimator:
    """One way to fit a correction; see the module's docstring.

    regressors: of "regression" only; the others have their own.
    gamma: of "scale" only; 1 needs a one-step solver.
    ridge: at least 0.
    """

    name: EstimatorName
    regressors: tuple[Regressor, ...] = ()
    ridge: float = RIDGE
    gamma: int = 0

    def __post_init__(self) -> None:
        if self.name not in (*_SINGLE, "regression"):
            raise SpecError(f"estimator must be one of {', '.join((*_SINGLE, 'regression'))}, found {self.name!r}.")
        if self.name == "regression" and not self.regressors:
            raise SpecError(f"regression needs regressors: one or more of {', '.join(REGRESSORS)}.")
        if self.name != "regression" and self.regressors:
            raise SpecError(
                f"regressors belong to the estimator regression, found {list(self.regressors)} with {self.name}."
            )
        if len(set(self.regressors)) != len(self.regressors) or set(self.regressors) - set(REGRESSORS):
            raise SpecError(
                f"regressors must be different ones of {', '.join(REGRESSORS)}, found {list(self.regressors)}."
            )
        if self.gamma not in (0, 1) or (self.gamma and self.name != "scale"):
            raise SpecError(f"gamma must be 0, or 1 with the estimator scale, found {self.gamma} with {self.name}.")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise SpecError(f"ridge must be 0 or more, found {self.ridge}.")

    @property
    def used(self) -> tuple[Regressor, ...]:
        """The regressors that are fitted."""
        return self.regressors or _SINGLE[self.name]

    @property
    def label(self) -> str:
        """In words, for figures."""
        parts: list[str] = [self.name]
        if self.regressors:
            parts.append("on " + ", ".join(self.regressors))
        if self.gamma:
            parts.append("with gamma 1")
        return f"{' '.join(parts)}; ridge {self.ridge:g}"

    @property
    def sequential(self) -> bool:
        """Whether a step is fitted on what the corrected steps before it lead to."""
        return self.name in ("closed_loop", "trajectory", "regression")

    def passes(self) -> int:
        """Runs of a network over all steps and images that the fit takes, the run that judges it included."""
        return {"bias": 2, "scale": 2, "free_run": 3, "closed_loop": 2}.get(self.name, 1)


@dataclass(frozen=True)
class Fitted:
    """A correction and what it is worth.

    held_out_rms: final error of the held-out images in the free run with the correction; infinite if it diverges.
    kept: share of the fitted correction that each row keeps after shrinking, 1 where nothing was shrunk.
    """

    correction: StepCorrection
    held_out_rms: float
    kept: tuple[float, ...]


def fit(
    denoiser: nn.Module,
    trajectories: Sequence[Trajectory],
    estimator: Estimator,
    *,
    full_precision: nn.Module,
    shared: bool = False,
    held_out: int = 4,
    shrink: bool = False,
) -> Fitted:
    """Fit one estimator to sealed full-precision trajectories of one schedule.

    shared: one coefficient for all channels. held_out: every how manyth image is held out.
    shrink: towards no correction, in steps where it makes the held-out images' own step error larger.

    Raises CalibrationError for fewer than two images or schedules that differ, and if the coefficients are not finite;
    UnsupportedPipeline if predictions and samples differ in shape.
    """
    problem = Problem.of(denoiser, full_precision, trajectories, shared=shared, held_out=held_out)
    return problem.fit(estimator, shrink=shrink)


@dataclass
class _Table:
    """A correction that is being written, row by row, float32 on the CPU."""

    timesteps: Tensor
    gain: Tensor
    carry: Tensor
    offset: Tensor
    previous: Tensor

    def put(self, row: int, weights: Tensor) -> None:
        """weights `[C, 4]`: of `REGRESSORS`, what is subtracted."""
        if not bool(torch.isfinite(weights.float()).all()):
            raise CalibrationError(
                f"The correction of timestep {float(self.timesteps[row]):g} is not finite: the quantized chain has "
                "left the finite numbers. Raise the ridge or choose another estimator."
            )
        prediction, sample, one, previous = weights.unbind(dim=1)
        self.gain[row], self.carry[row] = 1 - prediction, -sample
        self.offset[row], self.previous[row] = -one, -previous

    def correction(self, row: int | None = None) -> StepCorrection:
        """All rows, or one as a correction of its own."""
        rows = slice(None) if row is None else slice(row, row + 1)
        previous = self.previous[rows].clone() if bool((self.previous[rows] != 0).any()) else None
        gain, carry, offset = (table[rows].clone() for table in (self.gain, self.carry, self.offset))
        return StepCorrection(self.timesteps[rows].clone(), gain, carry, offset, torch.zeros_like(gain), previous)


@dataclass(frozen=True)
class Moments:
    """Sums over images and pixels for one step, float64: products of the regressors `[C, 4, 4]`, regressors times error
    `[C, 4]`. Errors and regressors are weighted as the estimator says.
    """

    products: Tensor
    crossed: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.products + other.products, self.crossed + other.crossed)

    def solved(self, regressors: Sequence[Regressor], ridge: float) -> Tensor:
        """The weights `[C, 4]` of the ridge regression; 0 for regressors that are not asked for, or always 0."""
        chosen = [REGRESSORS.index(name) for name in regressors]
        products, crossed = self.products[:, chosen][:, :, chosen], self.crossed[:, chosen]
        sizes = products.diagonal(dim1=1, dim2=2).sqrt()  # [C, p]
        inverse = torch.where(sizes > 0, 1 / sizes, torch.zeros_like(sizes))
        # Regressors of length 1: the ridge means the same for all of them, and so does the solver's tolerance.
        scaled = products * inverse[:, :, None] * inverse[:, None, :]
        scaled = scaled + ridge * torch.eye(len(chosen), dtype=scaled.dtype)
        if not bool(torch.isfinite(scaled).all()):
            return torch.full_like(self.crossed, math.nan)
        fitted = torch.linalg.pinv(scaled, hermitian=True) @ (crossed * inverse)[:, :, None]
        weights = torch.zeros_like(self.crossed)
        weights[:, chosen] = fitted[:, :, 0] * inverse
        return weights

    def share_to_keep(self, weights: Tensor) -> float:
        """1 if the weights lessen these images' squared error, otherwise the best share of them in [0, 1]."""
        foretold = float(torch.einsum("cp,cpq,cq->", weights, self.products, weights))  # sum of p^2
        common = float((weights * self.crossed).sum())  # sum of p y; the squared error changes by foretold - 2 common
        if not foretold > 2 * common:
            return 1.0
        return max(0.0, common / foretold)


@dataclass
class _Chain:
    """Where one trajectory's run has come, and what it remembers of its predictions (as `Corrector` does)."""

    trajectory: Trajectory
    held: Tensor
    state: State
    row: int | None = None
    latest: Tensor | None = None
    before: Tensor | None = None

    def remember(self, row: int, guided: Tensor) -> None:
        if row != self.row:
            self.before = self.latest
        self.row, self.latest = row, guided

    def painted(self, images: Tensor) -> Tensor | None:
        """The positions of some images, bool `[B]`, that the pipeline leaves to the sampler; None for all."""
        return None if self.trajectory.painted is None else self.trajectory.painted[images]


@dataclass
class Problem:
    """What every estimator works on.

    rows: the correction's rows. held: for each trajectory, which images of the batch are held out, bool `[B]`.
    """

    denoiser: nn.Module
    full_precision: nn.Module
    trajectories: Sequence[Trajectory]
    rows: StepRows
    held: list[Tensor]
    advance: Callable[[int], None] = field(default=lambda _done: None)
    _teacher: list[tuple[Moments, Moments]] | None = None

    @classmethod
    def of(
        cls,
        denoiser: nn.Module,
        full_precision: nn.Module,
        trajectories: Sequence[Trajectory],
        *,
        shared: bool,
        held_out: int,
    ) -> Problem:
        return cls(
            denoiser=denoiser,
            full_precision=full_precision,
            trajectories=trajectories,
            rows=StepRows.of(trajectories, full_precision, shared=shared),
            held=held_out_images(trajectories, held_out),
        )

    @property
    def one_step_solver(self) -> bool:
        """Whether no step remembers anything of the steps before."""
        first = self.trajectories[0]
        return not any(state_at(first, index).history for index in range(len(first.steps)))

    def table(self) -> _Table:
        """The correction that changes nothing."""
        shape = (len(self.rows.timesteps), self.rows.channels)
        zeros = [torch.zeros(shape) for _ in range(3)]
        return _Table(self.rows.timesteps.clone(), torch.ones(shape), *zeros)

    @torch.no_grad()
    def fit(self, estimator: Estimator, *, shrink: bool) -> Fitted:
        table, kept = self.table(), [1.0] * len(self.rows.timesteps)
        if estimator.sequential:
            error = self.walk(table, estimator, kept if shrink else None)
        else:
            self._write(table, estimator, kept if shrink else None)
            error = self.walk(table)
        return Fitted(table.correction(), error, tuple(kept))

    @torch.no_grad()
    def walk(self, table: _Table, estimator: Estimator | None = None, kept: list[float] | None = None) -> float:
        """Sample with the table's corrections and return the final error of the held-out images.

        estimator: fits each row when it is first met, and writes it into the table.
        kept: shrinks, and is told what is left.
        """
        chains = self._chains()
        fitted: set[int] = set()
        for index, row in enumerate(self.rows.of_step):
            guided = [predict(self.denoiser, chain.trajectory, index, chain.state) for chain in chains]
            for chain, prediction in zip(chains, guided, strict=True):
                chain.remember(row, prediction)
            if estimator is not None and row not in fitted and index not in self.rows.idle:
                table.put(row, self._weights(estimator, self._met(chains, index, estimator), row, kept))
                fitted.add(row)
            correction = table.correction(row)
            for chain, prediction in zip(chains, guided, strict=True):
                step = chain.trajectory.steps[index]
                given = correction.apply(prediction, step.timestep, chain.state.sample, chain.before)
                chain.state = follow(chain.trajectory, index, chain.state, given)
            self.advance(1 + (estimator is not None and estimator.name == "closed_loop"))
        return self._final_error(chains)

    @torch.no_grad()
    def judge(self, correction: StepCorrection) -> float:
        """Final error of the held-out images with a correction that is there already, its noise and shift included."""
        chains = self._chains()
        correctors = [Corrector(correction) for _ in chains]
        for index in range(len(self.rows.of_step)):
            for chain, corrector in zip(chains, correctors, strict=True):
                chain.state = advance(self.denoiser, chain.trajectory, index, chain.state, corrector)
            self.advance(1)
        return self._final_error(chains)

    def _chains(self) -> list[_Chain]:
        return [
            _Chain(trajectory, held, state_at(trajectory, 0))
            for trajectory, held in zip(self.trajectories, self.held, strict=True)
        ]

    def _final_error(self, chains: Sequence[_Chain]) -> float:
        """Root mean square over the held-out images' values."""
        squares = [
            self.rows.by_channel(
                (chain.state.sample.double() - chain.trajectory.steps[-1].next_sample.double())[chain.held].square(),
                chain.painted(chain.held),
            ).flatten()
            for chain in chains
        ]
        mean = float(torch.cat(squares).mean())
        return math.sqrt(mean) if math.isfinite(mean) else math.inf

    def _met(self, chains: Sequence[_Chain], index: int, estimator: Estimator) -> tuple[Moments, Moments]:
        """Moments of one step at the samples that the chains have come to: of the fitted images, and the held-out."""
        total: tuple[Moments, Moments] | None = None
        for chain in chains:
            assert chain.latest is not None
            if estimator.name in ("trajectory", "regression"):
                error, weight = _trajectory_error(chain, index)
            else:
                exact = predict(self.full_precision, chain.trajectory, index, chain.state)
                error, weight = chain.latest.double() - exact.double(), None
            total = _added(total, self._moments(chain, chain.state.sample, error, weight))
        assert total is not None
        return total

    def _weights(
        self, estimator: Estimator, moments: tuple[Moments, Moments], row: int, kept: list[float] | None
    ) -> Tensor:
        train, held = moments
        weights = train.solved(estimator.used, estimator.ridge)
        if kept is not None and bool(torch.isfinite(weights).all()):
            kept[row] = held.share_to_keep(weights)
            weights = kept[row] * weights
        return weights

    def _moments(self, chain: _Chain, sample: Tensor, error: Tensor, weight: Tensor | None) -> tuple[Moments, Moments]:
        """Of the chain's fitted images, and of its held-out ones. error: already weighted."""
        assert chain.latest is not None
        before = torch.zeros_like(chain.latest) if chain.before is None else chain.before
        regressors = [chain.latest, sample, torch.ones_like(chain.latest), before]
        values = torch.stack([regressor.double() for regressor in regressors])  # [4, B, C, ...]
        if weight is not None:
            values = values * weight.double()
        found = []
        for rows in (~chain.held, chain.held):
            own = chain.painted(rows)
            design = torch.stack([self.rows.by_channel(regressor[rows], own) for regressor in values], dim=1)
            target = self.rows.by_channel(error[rows], own)  # [C, N], design [C, 4, N]
            products = design @ design.mT
            found.append(Moments(products.cpu(), (design @ target[:, :, None])[:, :, 0].cpu()))
        return found[0], found[1]

    def _write(self, table: _Table, estimator: Estimator, kept: list[float] | None) -> None:
        """All rows of an estimator whose inputs do not depend on earlier corrections."""
        if estimator.name == "free_run":
            collected = self._collected(free=True)
        else:
            if self._teacher is None:
                self._teacher = self._collected(free=False)
            collected = self._teacher
        weights = [self._weights(estimator, moments, row, kept) for row, moments in enumerate(collected)]
        if estimator.gamma:
            weights = self._with_the_step_before(weights)
        for row, own in enumerate(weights):
            table.put(row, own)

    def _collected(self, *, free: bool) -> list[tuple[Moments, Moments]]:
        """Moments of every row, over all its visits, at recorded samples or along the uncorrected free run."""
        collected: dict[int, tuple[Moments, Moments]] = {}
        chains = self._chains()
        for index, row in enumerate(self.rows.of_step):
            for chain in chains:
                state = chain.state if free else state_at(chain.trajectory, index)
                guided = predict(self.denoiser, chain.trajectory, index, state)
                chain.remember(row, guided)
                exact = chain.trajectory.steps[index].guided
                if free:
                    exact = predict(self.full_precision, chain.trajectory, index, state)
                    chain.state = follow(chain.trajectory, index, state, guided)
                error = guided.double() - exact.double()
                collected[row] = _added(collected.get(row), self._moments(chain, state.sample, error, None))
            self.advance(2 if free else 1)
        return [collected[row] for row in range(len(self.rows.timesteps))]

    def _with_the_step_before(self, weights: list[Tensor]) -> list[Tensor]:
        """gamma = 1: the weights of `previous` that follow from those of `prediction`."""
        coefficients = step_coefficients(self.trajectories[0])
        own: dict[int, tuple[float, float]] = {}
        for index, row in enumerate(self.rows.of_step):
            if index not in self.rows.idle:
                own.setdefault(row, coefficients[index])
        prediction, previous = REGRESSORS.index("prediction"), REGRESSORS.index("previous")
        result = [tensor.clone() for tensor in weights]
        for row in range(1, len(weights)):
            if row in own and row - 1 in own and own[row][1] != 0:
                a, b = own[row]
                result[row][:, previous] = a * own[row - 1][1] / b * weights[row - 1][:, prediction]
        return result


def _added(one: tuple[Moments, Moments] | None, other: tuple[Moments, Moments]) -> tuple[Moments, Moments]:
    return other if one is None else (one[0] + other[0], one[1] + other[1])


def _trajectory_error(chain: _Chain, index: int) -> tuple[Tensor, Tensor]:
    """F_k(x^; eps_q) - x_{k+1} and dF_k/d eps elementwise, both `[B, C, ...]`, float64."""
    assert chain.latest is not None
    with torch.enable_grad():
        guided = chain.latest.detach().requires_grad_()
        found = scheduler_output(chain.trajectory, index, chain.state, guided)
        (slope,) = torch.autograd.grad(found.sum(), guided)
    return found.detach().double() - chain.trajectory.steps[index].next_sample.double(), slope.double()


def held_out_images(trajectories: Sequence[Trajectory], every: int) -> list[Tensor]:
    """Which rows of each trajectory's batch are held out; the last image if there are fewer than `every`."""
    images = [trajectory.images for trajectory in trajectories]
    total, start, masks = sum(images), 0, []
    if total < 2:
        raise CalibrationError(
            f"A correction is fitted to some images and judged on others; {total} was recorded. Record at least two."
        )
    for count, trajectory in zip(images, trajectories, strict=True):
        numbers = start + torch.arange(trajectory.batch) % count
        held = (numbers + 1) % every == 0 if total >= every else numbers == total - 1
        masks.append(held.to(trajectory.steps[0].sample.device))
        start += count
    return masks
