"""Bits for every layer under a budget, by what they do to the final state of sampling.

A stage in front of the others: `Allocate` stands where `Place` stood in a recipe, finds the bits, and places.

1. Sensitivity: the squared final drift s_ic of every candidate c for every item i (a layer's weight, or its
   activations, in all steps or in a group of them), to first order (`calibrate.sensitivity`).
2. Choice: x_ic in {0, 1}, an integer program (scipy's `milp`, HiGHS):

       minimise   sum_ic s_ic x_ic     subject to   sum_c x_ic = 1 for every i,   sum_ic cost_ic x_ic <= budget

   where the cost is bits times elements for an average, or bytes. With a bound on the drift, bytes are minimised under
   sum_ic s_ic x_ic <= bound^2.
3. Refinement: pairs of changes (one item up, one down, still within the budget) that the prediction can hardly tell
   apart from the solution are tried: the network rounded to nearest with them runs freely on recorded images that the
   sensitivities have not seen. A bound on the drift is verified in the same way, and moved until it holds.
4. With `beside_uniform`: the same bits in every free layer, as many as the budget has room for, are measured in the
   same way, and taken unless the solution is better.

What counts:
- Average bits of weights are weighted by their number, over all layers that can be quantized, the first and last ones
  too. A weight left in floating point counts with the bits of its dtype.
- Average bits of activations are weighted by the values that enter the layers in one evaluation of one image: what a
  device moves. Both operands of a matmul of attention have the same bits. Bits over time are averaged over the steps.
- Bytes are those that the checkpoint's layers take: levels, scales, zero points, biases, one row of activation ranges
  (or one for each group of timesteps).
- Fixed, but counted: the first and last layer unless `ends="same"`, layers that match a rule of the user, and the
  matmul behind the softmax unless `softmax_bits` is null.

Sums of items neglect that errors of different items may add up; more bits never score worse (an estimate that says so
is noise, and is levelled).
"""

from __future__ import annotations

import copy
import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from stepquant.calibrate.bit_costs import Choice, Costs, Problem, costs_of
from stepquant.calibrate.decoupled import decoupled_scores
from stepquant.calibrate.integer_program import solve
from stepquant.calibrate.judging import clearly_less
from stepquant.calibrate.outlier_token import KeepFirstToken
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.reconstruct import clocked
from stepquant.calibrate.sensitivity import (
    SCORES,
    Item,
    Probe,
    Score,
    Scores,
    final_drift,
    final_scores,
    output_scores,
)
from stepquant.calibrate.stages import FitWeightRanges, LayerRule, Place, Record
from stepquant.calibrate.step_groups import BitsUntil, Timeline
from stepquant.calibrate.trajectory import Trajectory
from stepquant.errors import CalibrationError, SpecError, nearest
from stepquant.model.families import end_layers, make_attention_explicit_
from stepquant.model.layer import Matmul
from stepquant.model.surgery import Plan, quantizable
from stepquant.numerics.spec import LayerScheme
from stepquant.recipe import Figures, Job, Recipe

__all__ = ["Allocate", "Choice", "allocated", "parse_target", "solve"]

_FLOAT_BITS = 32
"""Of layers that stay as they are."""

_EVERYTHING: dict[str, Any] = {"weights": 8, "activations": 8, "ends": "same", "softmax_bits": None, "rules": ()}
"""Settings of `Place` under which every operand of every layer is quantized."""

MEASURED_BEYOND = 8.0
"""A bound on the drift that failed is divided, and one that held multiplied, by at most this much at a time. Ours."""


def parse_target(text: str | float) -> tuple[float, float | None]:
    """`"4.5bit"` or 4.5 -> (4.5, None); `"W4.5A6"` -> (4.5, 6.0): average bits of weights and of activations."""
    found = re.fullmatch(r"\s*(?:(\d+(?:\.\d+)?)\s*(?:bits?)?|[wW](\d+(?:\.\d+)?)[aA](\d+(?:\.\d+)?))\s*", str(text))
    if not found:
        raise SpecError(f"A target looks like 4.5bit (average bits of weights) or W4.5A6, found {text!r}.")
    weights = float(found[1] or found[2])
    return weights, None if found[3] is None else float(found[3])


def levelled(scores: Mapping[int, float]) -> dict[int, float]:
    """Scores that do not rise with the bits: each the largest of its own and those of more bits."""
    found: dict[int, float] = {}
    worst = 0.0
    for bits in sorted(scores, reverse=True):
        worst = max(worst, scores[bits])
        found[bits] = worst
    return {bits: found[bits] for bits in sorted(found)}


@dataclass(frozen=True)
class Allocate:
    """Find bits for every layer under a budget, and place quantized layers accordingly.

    place: what to place where nothing is allocated, and the policy for first and last layer and the softmax.
    weight_bits: average bits of weights; "place" is what `place` alone has. max_bytes: bytes of the checkpoint's
        layers. max_drift: final drift, as `stepquant evaluate` gives it, of the network rounded to nearest. One of the
        three, or none with activation_bits.
    activation_bits: average bits of activations; None leaves them as `place` has them.
    step_groups: consecutive groups of timesteps, as equal as possible, whose activations have bits of their own; 1
        gives a layer the same bits in all steps. The average counts every step the same.
    bits: candidates beside full precision, which groups of timesteps cannot have.
    score: "final", "incoherent", "mse", "relative_mse" or "decoupled", see `calibrate.sensitivity`.
    samples: recorded images for the sensitivities, up to whole mini-batches. projections: random vectors for each.
    held_out: recorded images to measure on, the last ones, up to whole mini-batches; never those above.
    refine: changes of the solution to measure. measured_runs: the most for `max_drift`.
    beside_uniform: whether to measure equal bits for all as well, and to take them unless the solution's drift is less
        by more than a standard error. On the images of the sensitivities where no other mini-batch was recorded.
    ranges: rule of weight and activation ranges, as for the stages behind.
    first_token: keep the first token of prompts out of quantizers while bits are found, as the same stage behind this
        one does; with the score "decoupled" only, which samples with the layers as they will be.
    """

    place: Place
    weight_bits: float | Literal["place"] | None = None
    activation_bits: float | None = None
    step_groups: int = 1
    max_bytes: int | None = None
    max_drift: float | None = None
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    score: Score = "final"
    samples: int = 16
    projections: int = 4
    held_out: int = 16
    refine: int = 8
    measured_runs: int = 6
    ranges: RangeRule = "mse"
    first_token: KeepFirstToken | None = None
    beside_uniform: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories"})
    gives: ClassVar[frozenset[str]] = frozenset({"model", "plan"})

    def __post_init__(self) -> None:
        budgets = {"weight_bits": self.weight_bits, "max_bytes": self.max_bytes, "max_drift": self.max_drift}
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) > 1 or (not given and self.activation_bits is None):
            raise SpecError(
                "An allocation needs one budget: average bits of weights (target), max_bytes or max_drift; found "
                f"{' and '.join(given) or 'none'}."
            )
        if isinstance(self.weight_bits, str) and (self.weight_bits != "place" or self.place.weights is None):
            raise SpecError(
                'weight_bits must be a number, or "place" where Place has bits for weights; found '
                f"{self.weight_bits!r} with weights={self.place.weights} there."
            )
        for name, value in {**budgets, "activation_bits": self.activation_bits}.items():
            if value is not None and not isinstance(value, str) and not (math.isfinite(value) and value > 0):
                raise SpecError(f"{name} must be a positive number, found {value}.")
        for name, value in {"weight_bits": self.weight_bits, "activation_bits": self.activation_bits}.items():
            if value is not None and not isinstance(value, str) and value > _FLOAT_BITS:
                raise SpecError(f"{name} must be at most {_FLOAT_BITS}, which is floating point, found {value:g}.")
        if not self.bits or any(not 2 <= bits <= 8 for bits in self.bits) or sorted(set(self.bits)) != [*self.bits]:
            raise SpecError(f"Candidate bits must be from 2 to 8, each once and ascending, found {list(self.bits)}.")
        if self.score not in SCORES:
            raise SpecError(f"score: there is none named {self.score!r}.{nearest(self.score, SCORES)}")
        if self.max_drift is not None and self.score not in ("final", "incoherent"):
            raise SpecError(
                f"max_drift needs a score in units of the final state, final or incoherent, not {self.score}."
            )
        if self.first_token is not None and self.score != "decoupled":
            raise SpecError(f"first_token of Allocate goes with the score decoupled, not with {self.score}.")
        if self.step_groups < 1:
            raise SpecError(f"step_groups must be at least 1, found {self.step_groups}.")
        if self.step_groups > 1 and self.activation_bits is None:
            raise SpecError(
                "step_groups gives groups of timesteps activation bits of their own, but there is no budget for the "
                "bits of activations: ask for an average of both, such as target W4A6."
            )
        if self.step_groups > 1 and self.score == "decoupled":
            raise SpecError(
                "The score decoupled samples with one layer quantized in all steps, so it says nothing about groups of "
                "them: leave step_groups at 1, or choose another score, such as final."
            )
        if self.beside_uniform and (self.max_bytes is not None or self.max_drift is not None):
            raise SpecError(
                "beside_uniform compares plans of the same average bits: give weight_bits or activation_bits as the "
                "budget, or leave it off."
            )
        counts = {"samples": self.samples, "projections": self.projections, "held_out": self.held_out}
        if min(counts.values()) < 1 or self.refine < 0 or self.measured_runs < 1:
            raise SpecError(f"{counts} and measured_runs must be at least 1, refine at least 0.")

    @property
    def plans_row_bits(self) -> bool:
        """Whether some layer is to have bits over time."""
        return self.step_groups > 1 or self.place.plans_row_bits

    def check(self, job: Job) -> None:
        """What is bound to fail, before anything is recorded: too few mini-batches, budgets that no choice of weights
        can keep, and all that `Place` checks.
        """
        for stage in job.stages:
            if isinstance(stage, Record):
                self._check_mini_batches(stage.mini_batches)
        self.place.check(job)
        denoiser, problem = self._unrun_problem(job)
        costs = costs_of(problem, denoiser, {})
        self._check_budgets(replace(problem, items=tuple(i for i in problem.items if i.operand == "weights")), costs)

    def _unrun_problem(self, job: Job) -> tuple[nn.Module, Problem]:
        """What is free, as far as the network tells before anything has run, and the copy that was looked at."""
        denoiser = copy.deepcopy(job.full_precision)
        base = self.place.plan(denoiser)  # makes attention explicit
        full = replace(self.place, **_EVERYTHING).plan(denoiser)
        return denoiser, self._problem(denoiser, full, base)

    def evaluations(self, job: Job) -> int:
        """Network evaluations in images, a backward pass as two: what `--dry-run` shows."""
        weights = len(self.bits) if self._weights_are_free else 0
        own = 2 + 2 * self.projections + weights if self.score in ("final", "incoherent") else 2 + 2 * len(self.bits)
        if self.score == "decoupled":
            own = 1 + len(self.bits) * len(self._unrun_problem(job)[1].items)
        runs = self.measured_runs if self.max_drift is not None else self.refine + 1 if self.refine else 0
        if self.beside_uniform:
            runs = max(runs, 1) + 1
        return job.steps * (self.samples * own + self.held_out * (runs + 1))

    def run(self, job: Job) -> Figures:
        problem, probe, used, held, evaluations = self._prepare(job)
        costs = costs_of(problem, probe.denoiser, probe.elements, probe.sample_rows())
        self._check_budgets(problem, costs)
        scores, spent = self._scores(job, probe, used, problem)
        scores = {item: levelled(values) for item, values in scores.items()}
        meter = _Meter(problem, probe, held, job)
        if self.max_drift is not None:
            choice = self._bounded(problem, scores, costs, meter)
        else:
            choice = self._refined(self._chosen(problem, scores, costs), scores, costs, meter)
        beside: dict[str, object] | None = None
        if self.beside_uniform:
            choice, beside = self._beside_uniform(choice, problem, costs, meter)
        rules = _rules(problem, choice, self.place)
        found = replace(self.place, rules=(*rules, *self.place.rules)).run(job)
        return {
            **found,
            "weight_bits": round(costs.average("weights", choice), 6),
            "activation_bits": round(costs.average("activations", choice), 6),
            "layer_bytes": costs.total_bytes(choice),
            "checkpoint_bytes": costs.total_bytes(choice) + costs.beside_bytes,
            "predicted_drift": math.sqrt(_total(scores, choice)) if self.score in ("final", "incoherent") else None,
            "measured_drift": meter.drift_of(choice),
            "measured": meter.rows,
            **({"beside_uniform": beside} if beside else {}),
            "rules": [asdict(rule) for rule in rules],
            "scores": {_key(item): dict(values) for item, values in scores.items()},
            **({"until": list(problem.until)} if problem.until else {}),
            "evaluations": evaluations + spent + meter.evaluations,
        }

    def _prepare(self, job: Job) -> tuple[Problem, Probe, list[Trajectory], list[Trajectory], int]:
        """The problem, the network to probe, trajectories for sensitivities and to measure on, and evaluations."""
        trajectories: list[Trajectory] = job.handed["trajectories"]
        used, held = _split(trajectories, self.samples, self.held_out)
        self._check_mini_batches(len(trajectories))
        # Placing everything on a copy that is thrown away says which layers run, in which order, with which specs.
        plans = []
        for place in (self.place, replace(self.place, **_EVERYTHING)):
            copied = copy.deepcopy(job.full_precision)
            shadow = Job(job.pipe, job.full_precision, copied, job.run, job.steps, job.arguments)
            shadow.handed["trajectories"] = trajectories
            place.run(shadow)
            plans.append(shadow.handed["plan"])
        base, full = plans
        if self.first_token is not None:
            self.first_token.run(shadow)
        timeline = Timeline.of(clocked(shadow.denoiser), trajectories)
        until = timeline.split(self.step_groups)
        probe = Probe(shadow.denoiser, full, self.ranges, until)
        evaluations = probe.observe([*used, *held], job.run)
        if self.beside_uniform and not held:
            held = used
        floating = copy.deepcopy(job.full_precision)
        make_attention_explicit_(floating)
        problem = replace(self._problem(floating, full, base), until=until, timeline=timeline)
        return problem, probe, used, held, evaluations

    def _problem(self, denoiser: nn.Module, full: Plan, base: Plan) -> Problem:
        """What is free in a network whose attention is explicit. The layers of `full` are in order of execution."""
        order = list(full)
        layers = quantizable(denoiser)
        fixed = {name for rule in self.place.rules for name in fnmatch.filter(order, rule.pattern)}
        if self.place.ends != "same":
            fixed |= set(end_layers(order))
        items = []
        for name in order:
            module = layers[name]
            if name in fixed:
                continue
            if not isinstance(module, Matmul) and self._weights_are_free:
                items.append(Item(name, "weights", self.bits))
            behind_softmax = isinstance(module, Matmul) and module.role == "values"
            if self.activation_bits is not None and not (behind_softmax and self.place.softmax_bits is not None):
                groups = range(self.step_groups) if self.step_groups > 1 else (None,)
                items += [Item(name, "activations", self.bits, group) for group in groups]
        if not items:
            raise SpecError("There is nothing to allocate: rules and ends leave no layer free.")
        weights = {name: module.weight.detach() for name, module in layers.items() if not isinstance(module, Matmul)}
        return Problem(tuple(order), full, base, tuple(items), weights)

    @property
    def _weights_are_free(self) -> bool:
        return any(budget is not None for budget in (self.weight_bits, self.max_bytes, self.max_drift))

    def _check_budgets(self, problem: Problem, costs: Costs) -> None:
        """Raise SpecError with the smallest budget that is possible."""
        least: Choice = {item: item.bits[0] for item in problem.items}
        for operand, asked in self._averages(problem, costs).items():
            found = costs.average(operand, least)
            if any(i.operand == operand for i in problem.items) and found > asked + 1e-9:
                raise SpecError(
                    f"An average of {asked:g} bits for {operand} is not possible: with {self.bits[0]} bits in every "
                    f"layer that is free to choose it is {found:.4g}. Ask for at least that much, or free more layers "
                    "(ends: same, fewer rules)."
                )
        if self.max_bytes is not None and costs.total_bytes(least) > self.max_bytes:
            raise SpecError(
                f"{self.max_bytes} bytes for the layers are not possible: the least is {costs.total_bytes(least)}, "
                f"with {self.bits[0]} bits in every layer that is free to choose, and about "
                f"{costs.total_bytes(least) + costs.beside_bytes} for the denoiser's part of the checkpoint."
            )

    def _averages(self, problem: Problem, costs: Costs) -> dict[str, float]:
        """Operand -> the average of bits that was asked for."""
        found = {"weights": self.weight_bits, "activations": self.activation_bits}
        if self.weight_bits == "place":
            found["weights"] = costs.average("weights", _equal(problem, "weights", self.place.weights))
        return {operand: float(asked) for operand, asked in found.items() if asked is not None}

    def _check_mini_batches(self, count: int) -> None:
        """Raise SpecError if `_split` would leave none to measure on."""
        if count > 1 or not (self.refine or self.max_drift is not None):
            return
        without = "" if self.max_drift is not None else ", or give refine=0 (--set allocation.refine=0)"
        raise SpecError(
            "Measuring allocations takes recorded images that the sensitivities have not seen, but there is only 1 "
            f"mini-batch: record more samples than one batch holds, use a smaller batch{without}."
        )

    def _scores(self, job: Job, probe: Probe, used: list[Trajectory], problem: Problem) -> tuple[Scores, int]:
        if self.score in ("final", "incoherent"):
            coherent, incoherent, spent = final_scores(
                probe, used, problem.items, projections=self.projections, run=job.run, keeper=job.keeper
            )
            return coherent if self.score == "final" else incoherent, spent
        if self.score == "decoupled":
            return decoupled_scores(probe, used, problem.items, run=job.run, keeper=job.keeper)
        mse, relative, spent = output_scores(probe, used, problem.items, run=job.run)
        return mse if self.score == "mse" else relative, spent

    def _limits(self, problem: Problem, costs: Costs) -> list[tuple[list[list[float]], float]]:
        """Costs of all items' candidates and budgets."""
        limits: list[tuple[list[list[float]], float]] = []
        for operand, asked in self._averages(problem, costs).items():
            fixed, elements = costs.fixed[operand]
            own = [
                [costs.bits(item, bits) if item.operand == operand else 0.0 for bits in item.candidates]
                for item in problem.items
            ]
            limits.append((own, asked * elements - fixed))
        if self.max_bytes is not None:
            limits.append((_bytes(problem, costs), float(self.max_bytes - costs.fixed_bytes)))
        return limits

    def _chosen(self, problem: Problem, scores: Scores, costs: Costs, bound: float | None = None) -> Choice:
        """The solution under the budgets, or of the fewest bytes with a predicted drift of at most `bound`."""
        objective = [
            [0.0 if bits is None else scores[item][bits] for bits in item.candidates] for item in problem.items
        ]
        limits = self._limits(problem, costs)
        if bound is None:
            places = solve(objective, limits)
        else:
            places = solve(_bytes(problem, costs), [*limits, (objective, bound**2)])
        return {item: item.candidates[place] for item, place in zip(problem.items, places, strict=True)}

    def _fits(self, problem: Problem, costs: Costs, choice: Choice) -> bool:
        averages = self._averages(problem, costs)
        return all(costs.average(operand, choice) <= asked + 1e-9 for operand, asked in averages.items()) and (
            self.max_bytes is None or costs.total_bytes(choice) <= self.max_bytes
        )

    def _refined(self, choice: Choice, scores: Scores, costs: Costs, meter: _Meter) -> Choice:
        """Keep those of the most doubtful changes that lower the measured drift by more than a standard error."""
        if not self.refine:
            return choice
        problem = meter.problem
        present = meter.measure(choice, "the solution")
        doubtful = _doubtful(choice, scores, lambda trial: self._fits(problem, costs, trial))
        for change in list(islice(doubtful, self.refine)):
            trial = {**choice, **change}
            if not self._fits(problem, costs, trial):  # an earlier change took the room
                continue
            found = meter.measure(trial, _told(choice, change))
            gain = present - found
            if float(gain.mean()) > float(gain.std()) / math.sqrt(len(gain)):
                choice, present = trial, found
                meter.rows[-1]["kept"] = True
        return choice

    def _beside_uniform(
        self, choice: Choice, problem: Problem, costs: Costs, meter: _Meter
    ) -> tuple[Choice, dict[str, object]]:
        """The better of the solution and of equal bits for all that is free, and what was measured.

        A sum of what single layers do to the end does not see that their errors cancel or add up when all are rounded,
        so the least sum may sample worse than no choice at all.
        """
        uniform: Choice = {}
        bits: dict[str, int] = {}
        for operand, asked in self._averages(problem, costs).items():
            own = self.place.weights if operand == "weights" else self.place.activations
            known = sorted({*self.bits, *(() if own is None else (own,))}, reverse=True)
            equal = [(one, _equal(problem, operand, one)) for one in known]
            # Some fit: `_check_budgets` has refused what the fewest bits cannot keep.
            bits[operand], part = next(one for one in equal if costs.average(operand, one[1]) <= asked + 1e-9)
            uniform.update(part)
        rows = len(meter.rows)
        present = meter.measure(choice, "the solution")
        others = meter.measure(uniform, "the same bits everywhere")
        better = clearly_less(present, others)
        meter.rows[rows if better else rows + 1]["kept"] = True
        return choice if better else uniform, {
            "bits": bits,
            "drift": float(others.mean()),
            "solution_drift": float(present.mean()),
            "kept": "solution" if better else "uniform",
        }

    def _bounded(self, problem: Problem, scores: Scores, costs: Costs, meter: _Meter) -> Choice:
        """Fewest bytes whose measured drift keeps `max_drift`, by bisection of the bound on the predicted drift."""
        wanted = self.max_drift
        assert wanted is not None
        bound, held, failed = wanted, 0.0, math.inf
        best: Choice | None = None
        least = math.inf
        for _ in range(self.measured_runs):
            trial = self._chosen(problem, scores, costs, bound)
            drift = float(meter.measure(trial, f"predicted drift of at most {bound:.4g}").mean())
            least = min(least, drift)
            if drift <= wanted:
                held = bound
                best = trial
                meter.rows[-1]["kept"] = True
            else:
                failed = bound
            if best is trial and all(bits == item.bits[0] for item, bits in trial.items()):
                break  # nothing is smaller
            if held and math.isfinite(failed):
                bound = math.sqrt(held * failed)
            else:  # drift grows about as its prediction does, until it saturates
                step = wanted / max(drift, 1e-300)
                low, high = (2.0, MEASURED_BEYOND) if held else (1 / MEASURED_BEYOND, 0.5)
                bound *= min(max(step, low), high)
        if best is None:
            raise CalibrationError(
                f"No allocation of {self.measured_runs} that were measured keeps the final drift at or below "
                f"{wanted:g}; the least was {least:.4g}. What is not free to choose may drift that much already: raise "
                "max_drift or the bits of activations, or measured_runs."
            )
        return best


class _Meter:
    """Measures the final drift of the network rounded to nearest, on held-out images; remembers what it measured."""

    def __init__(self, problem: Problem, probe: Probe, held: list[Trajectory], job: Job) -> None:
        self.problem, self.probe, self.held, self.job = problem, probe, held, job
        self.rows: list[dict[str, object]] = []
        self.evaluations = 0
        self._known: dict[tuple[int | None, ...], Tensor] = {}

    def measure(self, choice: Choice, what: str) -> Tensor:
        """Final drift of each held-out image."""
        key = tuple(choice[item] for item in self.problem.items)
        if key not in self._known:
            self.probe.install(self.problem.plan(choice))
            images = sum(trajectory.batch for trajectory in self.held)
            with self.job.run.progress.track("Measuring an allocation", images) as done:
                self._known[key] = final_drift(self.probe.denoiser, self.held, done)
            self.evaluations += sum(
                call.prediction.shape[0] for one in self.held for step in one.steps for call in step.calls
            )
        found = self._known[key]
        self.rows.append({"what": what, "drift": float(found.mean()), "kept": False})
        return found

    def drift_of(self, choice: Choice) -> float | None:
        """Of a choice that was measured; None if it was not."""
        found = self._known.get(tuple(choice[item] for item in self.problem.items))
        return None if found is None else float(found.mean())


def allocated(recipe: Recipe, **settings: object) -> Recipe:
    """The recipe with `Allocate(**settings)` in the place of its `Place`, at the recipe's own rule for ranges.

    Raises SpecError for a recipe without `Place`.
    """
    places = [number for number, stage in enumerate(recipe.stages) if isinstance(stage, Place)]
    if len(places) != 1:
        raise SpecError(f"Recipe {recipe.name!r} has {len(places)} stages Place, expected one to allocate bits for.")
    place = recipe.stages[places[0]]
    rules = [stage.rule for stage in recipe.stages if isinstance(stage, FitWeightRanges)]
    own = {"place": place, **({"ranges": rules[0]} if rules else {}), **settings}
    stages = list(recipe.stages)
    stages[places[0]] = Allocate(**own)  # type: ignore[arg-type]
    return Recipe(recipe.name, tuple(stages))


def _split(trajectories: list[Trajectory], samples: int, held_out: int) -> tuple[list[Trajectory], list[Trajectory]]:
    """First mini-batches with `samples` images and last ones with `held_out`; held-out images give way first."""
    used: list[Trajectory] = []
    for trajectory in trajectories[: max(1, len(trajectories) - 1)]:
        if sum(len(one.seeds) for one in used) < samples:
            used.append(trajectory)
    held: list[Trajectory] = []
    for trajectory in reversed(trajectories[len(used) :]):
        if sum(len(one.seeds) for one in held) < held_out:
            held.insert(0, trajectory)
    return used, held


def _equal(problem: Problem, operand: str, bits: int | None) -> Choice:
    """The same bits for all that is free of an operand."""
    return {item: bits for item in problem.items if item.operand == operand}


def _bytes(problem: Problem, costs: Costs) -> list[list[float]]:
    return [[float(costs.bytes[item][bits]) for bits in item.candidates] for item in problem.items]


def _total(scores: Scores, choice: Choice) -> float:
    return sum(0.0 if bits is None else scores[item][bits] for item, bits in choice.items())


def _doubtful(choice: Choice, scores: Scores, fits: Callable[[Choice], bool]) -> Iterator[Choice]:
    """Changes of one or two items by one candidate each that the budget allows, the least decided prediction first.

    Decided means: the predicted change of the sum, relative to what the two items contribute before and after.
    """

    def score(item: Item, bits: int | None) -> float:
        return 0.0 if bits is None else scores[item][bits]

    ups: list[tuple[Item, int | None]] = []
    downs: list[tuple[Item, int | None]] = []
    for item, bits in choice.items():
        known = item.candidates
        place = known.index(bits)
        ups += [(item, known[place + 1])] if place + 1 < len(known) else []
        downs += [(item, known[place - 1])] if place else []
    found: list[tuple[float, Choice]] = []
    for up, more in ups:
        for down, less in downs:
            if up == down or up.operand != down.operand:
                continue
            terms = [score(up, more), -score(up, choice[up]), score(down, less), -score(down, choice[down])]
            weight = sum(abs(term) for term in terms)
            if weight > 0:
                found.append((abs(sum(terms)) / weight, {up: more, down: less}))
    found.sort(key=lambda entry: entry[0])
    for _, change in found:
        if fits({**choice, **change}):  # of many changes few are asked for
            yield change


def _key(item: Item) -> str:
    """In the figures: `layer.operand`, and the number of the group of timesteps."""
    return f"{item.layer}.{item.operand}" + ("" if item.group is None else f".{item.group + 1}")


def _told(choice: Choice, change: Choice) -> str:
    """What a change does, in words."""

    def name(bits: int | None) -> str:
        return "full" if bits is None else str(bits)

    return ", ".join(f"{item} {name(choice[item])} to {name(bits)}" for item, bits in change.items())


def _rules(problem: Problem, choice: Choice, place: Place) -> tuple[LayerRule, ...]:
    """One rule for every layer of which something was chosen, in order of execution."""
    by_layer: dict[str, dict[str, int | tuple[BitsUntil, ...] | None]] = {}
    for item, bits in choice.items():
        by_layer.setdefault(item.layer, {})[item.operand] = bits
    for layer, over_time in problem.over_time(choice).items():
        by_layer[layer]["activations"] = over_time
    rules = []
    for name in problem.order:
        if name not in by_layer:
            continue
        scheme = problem.base.get(name, LayerScheme())
        weights = by_layer[name].get("weights", None if scheme.weight is None else scheme.weight.bits)
        assert not isinstance(weights, tuple)
        activations = by_layer[name].get("activations", None if scheme.input is None else scheme.input.bits)
        rules.append(LayerRule(name, weights, activations, None if weights is None else place.group_size))
    return tuple(rules)
