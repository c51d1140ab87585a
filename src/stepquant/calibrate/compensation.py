"""The stage that corrects every step's guided prediction: several ways to fit it, and a choice on images held out.

The estimators are in `calibrate.correction_fit`. A candidate's figure is the root mean square of the held-out images'
final error in the free run. Ours, and from no paper: the strengths of the ridge that are tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from stepquant.calibrate.correction_fit import REGRESSORS, RIDGE, Estimator, Fitted, Problem, Regressor
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.correction import StepCorrection
from stepquant.recipe import Figures, Job

__all__ = ["AS_IT_IS", "Compensate", "EstimatorChoice", "Regressor", "candidates"]

EstimatorChoice = Literal["auto", "bias", "scale", "free_run", "closed_loop", "trajectory", "regression"]

AS_IT_IS = "as it is"
"""In figures, the candidate that is the model with the correction that it has already."""

MIDDLE_RIDGE, STRONG_RIDGE = 1e-2, 1e-1
"""Further strengths that "auto" tries where several regressors may be almost the same. Ours."""


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
class Compensate:
    """Fit a correction of every step's guided prediction to the recorded trajectories.

    estimator: "auto" tries several, each shrunk in steps where it does not carry over to held-out images, and takes the
        best on them, which may be no correction. A named one is taken as it is.
    regressors: of "regression"; None is prediction, sample and one. gamma: of "scale".
    ridge: of a named estimator; None is `RIDGE`.
    shared: one coefficient for all channels instead of one each.
    held_out: every how manyth image is held out.

    It goes last in a recipe: it corrects the model as it finds it. Corrections do not stack: one that the job has been
    handed ("correction") is judged on the same held-out images, "auto" keeps it where nothing is better, and else it is
    replaced. Source: see `methods.cec`.
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
        problem = Problem.of(
            job.denoiser,
            job.full_precision,
            job.handed["trajectories"],
            shared=self.shared,
            held_out=self.held_out,
        )
        automatic = self.estimator == "auto"
        tried = candidates(one_step_solver=problem.one_step_solver) if automatic else (self._named(),)
        own: StepCorrection | None = job.handed.get("correction")
        search = _Search(problem, tried, job, own, shrink=automatic)
        search.run()
        best = search.best(may_be_none=automatic)
        if automatic and search.own_wins(best):
            return self._figures(search, AS_IT_IS, [1.0] * len(problem.rows.timesteps)) | {"own": "kept"}
        if best is not None and not math.isfinite(search.found[best].held_out_rms):
            raise CalibrationError(
                f"The quantized chain leaves the finite numbers with the correction {tried[best].label}: raise the "
                'ridge, or let estimator="auto" choose.'
            )
        chosen = None if best is None else search.found[best]
        job.handed["correction"] = None if chosen is None else chosen.correction
        kept = [1.0] * len(problem.rows.timesteps) if chosen is None else list(chosen.kept)
        figures = self._figures(search, "none" if best is None else tried[best].label, kept)
        return figures if own is None else figures | {"own": "removed" if best is None else "replaced"}

    def _figures(self, search: _Search, chosen: str, kept: list[float]) -> Figures:
        return {
            "chosen": chosen,
            "candidates": search.report(),
            "kept": kept,
            "evaluations": search.evaluations(),
        }


class _Search:
    """The candidates of one run of the stage, one after the other; what is done is kept.

    own: the correction that the model has already. as_it_is: its final error on the held-out images.
    """

    def __init__(
        self, problem: Problem, tried: Sequence[Estimator], job: Job, own: StepCorrection | None, *, shrink: bool
    ) -> None:
        self.problem = problem
        self.tried = tried
        self.job = job
        self.own = own
        self.shrink = shrink
        self.uncorrected: float | None = None
        self.as_it_is: float | None = None
        self.found: list[Fitted] = []

    def run(self) -> None:
        self._resume()
        total = self.passes() * len(self.problem.rows.of_step)
        with self.job.run.progress.track("Fitting corrections", total) as advance:
            self.problem.advance = advance
            if self.uncorrected is None:
                self.uncorrected = self.problem.walk(self.problem.table())
                self._keep()
            if self.own is not None and self.as_it_is is None:
                self.as_it_is = self.problem.judge(self.own)
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

    def own_wins(self, best: int | None) -> bool:
        """Whether neither the best candidate nor no correction does better than the one that is there."""
        assert self.uncorrected is not None
        if self.as_it_is is None or not self.as_it_is < self.uncorrected:
            return False
        return best is None or self.as_it_is <= self.found[best].held_out_rms

    def report(self) -> list[dict[str, Any]]:
        """Every candidate's held-out final error, also relative to that without correction; null if it diverged."""
        assert self.uncorrected is not None
        labelled = [("none", self.uncorrected)]
        labelled += [] if self.as_it_is is None else [(AS_IT_IS, self.as_it_is)]
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
        """Every candidate has its own, as has what is judged alone, but those at the recorded samples are shared."""
        at_recorded = sum(estimator.name in ("bias", "scale") for estimator in self.tried)
        judged = 1 if self.own is None else 2
        return judged + sum(estimator.passes() for estimator in self.tried) - max(0, at_recorded - 1)

    def evaluations(self) -> int:
        """Of the network, in rows of its calls."""
        return self.passes() * sum(trajectory.evaluations for trajectory in self.problem.trajectories)

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
        meta = {"uncorrected": repr(self.uncorrected), "done": done}
        if self.as_it_is is not None:
            meta["as_it_is"] = repr(self.as_it_is)
        self.job.keeper.save("compensation", tensors or {"none": torch.zeros(1)}, meta)

    def _resume(self) -> None:
        kept = self.job.keeper.load("compensation") if self.job.keeper else None
        if kept is None:
            return
        tensors, meta = kept
        self.uncorrected = float(meta["uncorrected"])
        self.as_it_is = float(meta["as_it_is"]) if "as_it_is" in meta else None
        for number, (rms, shares) in enumerate(meta["done"]):
            own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{number}.")}
            self.found.append(Fitted(StepCorrection(**own), float(rms), tuple(shares)))
