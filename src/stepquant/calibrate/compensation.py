"""Corrections of the guided prediction, fitted in closed form to recorded trajectories, and chosen on images held out.

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

Held-out images take part in every run but in no fit. A candidate's figure is the root mean square of their final error
in the free run. Ours, and from no paper: the ridge, its strengths, the split, and the shrinking of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stepquant.calibrate.propagation import step_coefficients
from stepquant.calibrate.step_rows import StepRows
from stepquant.calibrate.trajectory import (
    State,
    Trajectory,
    follow,
    predict,
    scheduler_output,
    state_at,
)
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.correction import StepCorrection
from stepquant.recipe import Figures, Job

__all__ = [
    "RIDGE",
    "Compensate",
    "Estimator",
    "EstimatorChoice",
    "EstimatorName",
    "Fitted",
    "Regressor",
    "candidates",
    "fit",
]

Regressor = Literal["prediction", "sample", "one", "previous"]

EstimatorName = Literal["bias", "scale", "free_run", "closed_loop", "trajectory", "regression"]

EstimatorChoice = Literal["auto", "bias", "scale", "free_run", "closed_loop", "trajectory", "regression"]

REGRESSORS: tuple[Regressor, ...] = ("prediction", "sample", "one", "previous")

RIDGE = 1e-3
"""Default strength, relative to the sum of a regressor's squares. Ours."""

MIDDLE_RIDGE, STRONG_RIDGE = 1e-2, 1e-1
"""Further strengths that "auto" tries where several regressors may be almost the same. Ours."""

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


def candidates(*, one_step_solver: bool) -> tuple[Estimator, ...]:
    """What "auto" tries.

    Not `bias`, which every regression on `one` contains; nor `free_run` and `closed_loop`: `trajectory` asks for more
    at half their cost.
    """
    scales = [Estimator("scale")] + ([Estimator("scale", gamma=1)] if one_step_solver else [])
    return (
        *scales,
        Estimator("trajectory"),
        Estimator("regression", ("prediction", "sample", "one")),
        Estimator("regression", ("prediction", "sample", "one"), STRONG_RIDGE),
        Estimator("regression", ("prediction", "one", "previous")),
        Estimator("regression", REGRESSORS, MIDDLE_RIDGE),
    )


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
    problem = _Problem.of(denoiser, full_precision, trajectories, shared=shared, held_out=held_out)
    return problem.fit(estimator, shrink=shrink)


@dataclass(frozen=True)
class Compensate:
    """Fit a correction of every step's guided prediction to the recorded trajectories.

    estimator: "auto" tries several, each shrunk in steps where it does not carry over to held-out images, and takes the
        best on them, which may be no correction. A named one is taken as it is.
    regressors: of "regression"; None is prediction, sample and one. gamma: of "scale".
    ridge: of a named estimator; None is `RIDGE`.
    shared: one coefficient for all channels instead of one each.
    held_out: every how manyth image is held out.

    It goes last in a recipe: it corrects the model as it finds it. Source: see `methods.cec`.
    """

    estimator: EstimatorChoice = "auto"
    regressors: tuple[Regressor, ...] | None = None
    gamma: Literal[0, 1] = 0
    ridge: float | None = None
    shared: bool = False
    held_out: int = 4

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"correction"})

    def __post_init__(self) -> None:
        if self.held_out < 2:
            raise SpecError(f"held_out must be 2 or more (every second image), found {self.held_out}.")
        if self.estimator != "auto":
            self._named()
        elif self.regressors is not None or self.gamma or self.ridge is not None:
            raise SpecError(
                'regressors, gamma and ridge belong to a named estimator; "auto" tries its own. Name one, or leave '
                "them out."
            )

    def _named(self) -> Estimator:
        assert self.estimator != "auto"
        regressors = self.regressors or ()
        if self.estimator == "regression" and self.regressors is None:
            regressors = ("prediction", "sample", "one")
        return Estimator(self.estimator, regressors, RIDGE if self.ridge is None else self.ridge, self.gamma)

    def run(self, job: Job) -> Figures:
        problem = _Problem.of(
            job.denoiser,
            job.full_precision,
            job.handed["trajectories"],
            shared=self.shared,
            held_out=self.held_out,
        )
        automatic = self.estimator == "auto"
        tried = candidates(one_step_solver=problem.one_step_solver) if automatic else (self._named(),)
        search = _Search(problem, tried, job, shrink=automatic)
        search.run()
        best = search.best(may_be_none=automatic)
        if best is not None and not math.isfinite(search.found[best].held_out_rms):
            raise CalibrationError(
                f"The quantized chain leaves the finite numbers with the correction {tried[best].label}: raise the "
                'ridge, or let estimator="auto" choose.'
            )
        chosen = None if best is None else search.found[best]
        job.handed["correction"] = None if chosen is None else chosen.correction
        return {
            "chosen": "none" if best is None else tried[best].label,
            "candidates": search.report(),
            "kept": [1.0] * len(problem.rows.timesteps) if chosen is None else list(chosen.kept),
            "evaluations": search.evaluations(),
        }


class _Search:
    """The candidates of one run of the stage, one after the other; what is done is kept."""

    def __init__(self, problem: _Problem, tried: Sequence[Estimator], job: Job, *, shrink: bool) -> None:
        self.problem = problem
        self.tried = tried
        self.job = job
        self.shrink = shrink
        self.uncorrected: float | None = None
        self.found: list[Fitted] = []

    def run(self) -> None:
        self._resume()
        total = self.passes() * len(self.problem.rows.of_step)
        with self.job.run.progress.track("Fitting corrections", total) as advance:
            self.problem.advance = advance
            if self.uncorrected is None:
                self.uncorrected = self.problem.walk(self.problem.table())
                self._keep()
            for estimator in self.tried[len(self.found) :]:
                self.found.append(self._fitted(estimator))
                self._keep()

    def _fitted(self, estimator: Estimator) -> Fitted:
        try:
            return self.problem.fit(estimator, shrink=self.shrink)
        except CalibrationError:
            if len(self.tried) == 1:
                raise
            # One of several whose normal equations overflow is a candidate that loses, not the end of the run.
            return Fitted(self.problem.table().correction(), math.inf, (1.0,) * len(self.problem.rows.timesteps))

    def best(self, *, may_be_none: bool) -> int | None:
        """Number of the candidate with the smallest held-out error; None if nothing is better than no correction."""
        assert self.uncorrected is not None
        errors = [fitted.held_out_rms for fitted in self.found]
        best = min(range(len(errors)), key=errors.__getitem__)
        return None if may_be_none and not errors[best] < self.uncorrected else best

    def report(self) -> list[dict[str, Any]]:
        """Every candidate's held-out final error, also relative to that without correction; null if it diverged."""
        assert self.uncorrected is not None
        labelled = [("none", self.uncorrected)]
        labelled += [(e.label, f.held_out_rms) for e, f in zip(self.tried, self.found, strict=True)]
        comparable = math.isfinite(self.uncorrected) and self.uncorrected > 0
        return [
            {
                "candidate": label,
                "held_out_rms": rms if math.isfinite(rms) else None,
                "relative": rms / self.uncorrected if comparable and math.isfinite(rms) else None,
            }
            for label, rms in labelled
        ]

    def passes(self) -> int:
        """Every candidate has its own, but those at the recorded samples are shared."""
        at_recorded = sum(estimator.name in ("bias", "scale") for estimator in self.tried)
        return 1 + sum(estimator.passes() for estimator in self.tried) - max(0, at_recorded - 1)

    def evaluations(self) -> int:
        """Of the network, in images."""
        return self.problem.images * len(self.problem.rows.of_step) * self.passes()

    def _keep(self) -> None:
        if self.job.keeper is None:
            return
        tensors = {
            f"{number}.{name}": table
            for number, fitted in enumerate(self.found)
            for name, table in fitted.correction.tables().items()
        }
        done = [[repr(fitted.held_out_rms), list(fitted.kept)] for fitted in self.found]
        # safetensors holds no empty file
        self.job.keeper.save(
            "compensation", tensors or {"none": torch.zeros(1)}, {"uncorrected": repr(self.uncorrected), "done": done}
        )

    def _resume(self) -> None:
        kept = self.job.keeper.load("compensation") if self.job.keeper else None
        if kept is None:
            return
        tensors, meta = kept
        self.uncorrected = float(meta["uncorrected"])
        for number, (rms, shares) in enumerate(meta["done"]):
            own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{number}.")}
            self.found.append(Fitted(StepCorrection(**own), float(rms), tuple(shares)))


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
class _Moments:
    """Sums over images and pixels for one step, float64: products of the regressors `[C, 4, 4]`, regressors times error
    `[C, 4]`. Errors and regressors are weighted as the estimator says.
    """

    products: Tensor
    crossed: Tensor

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(self.products + other.products, self.crossed + other.crossed)

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


@dataclass
class _Problem:
    """What every estimator works on.

    rows: the correction's rows. held: for each trajectory, which images of the batch are held out, bool `[B]`.
    """

    denoiser: nn.Module
    full_precision: nn.Module
    trajectories: Sequence[Trajectory]
    rows: StepRows
    held: list[Tensor]
    advance: Callable[[int], None] = field(default=lambda _done: None)
    _teacher: list[tuple[_Moments, _Moments]] | None = None

    @classmethod
    def of(
        cls,
        denoiser: nn.Module,
        full_precision: nn.Module,
        trajectories: Sequence[Trajectory],
        *,
        shared: bool,
        held_out: int,
    ) -> _Problem:
        return cls(
            denoiser=denoiser,
            full_precision=full_precision,
            trajectories=trajectories,
            rows=StepRows.of(trajectories, shared=shared),
            held=_held_out(trajectories, held_out),
        )

    @property
    def images(self) -> int:
        return sum(trajectory.batch for trajectory in self.trajectories)

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

    def _chains(self) -> list[_Chain]:
        return [
            _Chain(trajectory, held, state_at(trajectory, 0))
            for trajectory, held in zip(self.trajectories, self.held, strict=True)
        ]

    def _final_error(self, chains: Sequence[_Chain]) -> float:
        """Root mean square over the held-out images' values."""
        squares = [
            (chain.state.sample.double() - chain.trajectory.steps[-1].next_sample.double())[chain.held].square()
            for chain in chains
        ]
        mean = float(torch.cat([square.flatten() for square in squares]).mean())
        return math.sqrt(mean) if math.isfinite(mean) else math.inf

    def _met(self, chains: Sequence[_Chain], index: int, estimator: Estimator) -> tuple[_Moments, _Moments]:
        """Moments of one step at the samples that the chains have come to: of the fitted images, and the held-out."""
        total: tuple[_Moments, _Moments] | None = None
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
        self, estimator: Estimator, moments: tuple[_Moments, _Moments], row: int, kept: list[float] | None
    ) -> Tensor:
        train, held = moments
        weights = train.solved(estimator.used, estimator.ridge)
        if kept is not None and bool(torch.isfinite(weights).all()):
            kept[row] = held.share_to_keep(weights)
            weights = kept[row] * weights
        return weights

    def _moments(
        self, chain: _Chain, sample: Tensor, error: Tensor, weight: Tensor | None
    ) -> tuple[_Moments, _Moments]:
        """Of the chain's fitted images, and of its held-out ones. error: already weighted."""
        assert chain.latest is not None
        before = torch.zeros_like(chain.latest) if chain.before is None else chain.before
        regressors = [chain.latest, sample, torch.ones_like(chain.latest), before]
        values = torch.stack([regressor.double() for regressor in regressors])  # [4, B, C, ...]
        if weight is not None:
            values = values * weight.double()
        found = []
        for rows in (~chain.held, chain.held):
            design = torch.stack([self.rows.by_channel(regressor[rows]) for regressor in values], dim=1)  # [C, 4, N]
            target = self.rows.by_channel(error[rows])  # [C, N]
            products = design @ design.mT
            found.append(_Moments(products.cpu(), (design @ target[:, :, None])[:, :, 0].cpu()))
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

    def _collected(self, *, free: bool) -> list[tuple[_Moments, _Moments]]:
        """Moments of every row, over all its visits, at recorded samples or along the uncorrected free run."""
        collected: dict[int, tuple[_Moments, _Moments]] = {}
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


def _added(one: tuple[_Moments, _Moments] | None, other: tuple[_Moments, _Moments]) -> tuple[_Moments, _Moments]:
    return other if one is None else (one[0] + other[0], one[1] + other[1])


def _trajectory_error(chain: _Chain, index: int) -> tuple[Tensor, Tensor]:
    """F_k(x^; eps_q) - x_{k+1} and dF_k/d eps elementwise, both `[B, C, ...]`, float64."""
    assert chain.latest is not None
    with torch.enable_grad():
        guided = chain.latest.detach().requires_grad_()
        found = scheduler_output(chain.trajectory, index, chain.state, guided)
        (slope,) = torch.autograd.grad(found.sum(), guided)
    return found.detach().double() - chain.trajectory.steps[index].next_sample.double(), slope.double()


def _held_out(trajectories: Sequence[Trajectory], every: int) -> list[Tensor]:
    """Which rows of each trajectory's batch are held out; the last image if there are fewer than `every`."""
    images = [
        trajectory.batch // 2 if trajectory.form is not None and trajectory.form.doubled else trajectory.batch
        for trajectory in trajectories
    ]
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
