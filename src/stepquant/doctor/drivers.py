"""Which layers drive the drift: an estimate for all of them from one reverse pass, and the truth for a few.

With y_K the quantized final state, x_K the full-precision one, n the values of an image and B the images,

    D = 1/B sum over images of  |y_K - x_K| / sqrt(n)                          the final drift, as in `evaluate.drift`

Let layer l be called in step k with input u, f_l be its full-precision and q_l its quantized form. Its own error is

    delta_{l,k} = q_l(u) - f_l(u)

and its contribution is the derivative of D along that error, taken at the quantized trajectory:

    c_{l,k} = < dD / d(output of l in step k), delta_{l,k} >       c_l = sum over k of c_{l,k}

so -h c_l is what D changes by if a part h of the layer's error is taken away, for small h. D is homogeneous in its
argument, so where the trajectories are close the c_l add up to D, and c_l / D is the layer's share. Restoring the
whole layer is h = 1, which is a first-order estimate: `restored_drift` measures it.

The gradient comes from the adjoint recursion of `calibrate.final_state`: steps are taken last one first, each with its
network graph built anew, so that one graph is in memory, with one error tensor beside each layer's output in it. The
prediction that a correction remembers is a part of the state here, so it has an adjoint like the solver's tensors.

Quantizers are differentiated straight through (`numerics.affine.fake_quantize`): 1 inside the range, 0 outside. Layers
of engines and of other software have no such gradient. Then it is taken at the full-precision trajectory, through the
full-precision network (`at="full_precision"`): the same to first order in the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepquant.calibrate.final_state import Adjoints, final_differences, final_drifts, final_states
from stepquant.calibrate.own_errors import Pairs, alone, clock_following, still
from stepquant.calibrate.trajectory import State, Trajectory, follow, predict, state_at
from stepquant.doctor.layers import swapped
from stepquant.errors import EvaluationError
from stepquant.model.correction import StepCorrection

__all__ = ["Driver", "Expansion", "contributions", "drift", "final_states", "restored_drift"]

Expansion = Literal["quantized", "full_precision"]
"""The trajectory at which the drift is differentiated."""

_REMEMBERED = "the prediction that the correction remembers"
"""Its name in the history of a state; no path of a scheduler's tensor has blanks."""


@dataclass(frozen=True)
class Driver:
    """A layer's part in the final drift.

    estimate: c_l, in units of the drift. share: c_l / D; negative where the layer's error cancels that of others.
    by_step: c_{l,k}.
    restored: the final drift with this layer in full precision, measured; None where it was not.
    """

    layer: str
    estimate: float
    share: float
    by_step: tuple[float, ...]
    restored: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "by_step": list(self.by_step)}


def drift(ends: Sequence[Tensor], trajectories: Sequence[Trajectory]) -> float:
    """D of final states; root mean square over an image, mean over images."""
    return float(final_drifts(ends, trajectories).mean())


def _gradients(ends: Sequence[Tensor], trajectories: Sequence[Trajectory]) -> list[Tensor]:
    """dD / dy_K by trajectory; 0 for an image without drift."""
    images = sum(len(end) for end in ends)
    found = []
    for end, row in zip(ends, final_differences(ends, trajectories), strict=True):
        norm = row.norm(dim=1, keepdim=True)
        unit = torch.where(norm > 0, row / norm.clamp_min(1e-300), torch.zeros_like(row))
        found.append((unit / (row.shape[1] ** 0.5 * images)).reshape(end.shape).to(end.dtype))
    return found


def contributions(
    candidate: nn.Module,
    reference: nn.Module,
    pairs: Pairs,
    trajectories: Sequence[Trajectory],
    *,
    correction: StepCorrection | None = None,
    at: Expansion = "quantized",
    done: Callable[[int], None] = lambda _images: None,
) -> dict[str, list[float]]:
    """c_{l,k} of every paired layer: name -> one value for each step.

    correction: what the candidate's scheduler applies. With `at="full_precision"` it is left out of the gradient.
    done: called with the number of images after each step.

    Costs three network evaluations an image and step, beside the free run, and every paired layer once more. Raises
    EvaluationError if the candidate's final state is not finite.
    """
    ends = final_states(candidate, trajectories, correction)
    if not all(bool(torch.isfinite(end).all()) for end in ends):
        raise EvaluationError(
            "The candidate's final state is not finite, so its drift has no gradient: repair the first layer that is "
            "not finite."
        )
    sums = {name: [0.0] * len(trajectories[0].steps) for name in pairs}
    running = candidate if at == "quantized" else reference
    with still(candidate, reference):
        for trajectory, adjoint in zip(trajectories, _gradients(ends, trajectories), strict=True):
            visited = _visit(running, trajectory, correction if at == "quantized" else None)
            _last_step_first(running, candidate, reference, pairs, visited, adjoint, sums, done)
    return sums


@dataclass(frozen=True)
class _Visited:
    """A free run: the state before every step, with the prediction that a correction remembers.

    remembered: for each step the number of the step whose prediction the correction is given; None for none.
    """

    trajectory: Trajectory
    correction: StepCorrection | None
    states: list[State]
    remembered: list[int | None]

    def step(self, running: nn.Module, index: int, state: State) -> State:
        """The state after step `index`; differentiable in the state."""
        trajectory, history = self.trajectory, dict(state.history)
        before = history.pop(_REMEMBERED, None)
        inside = State(state.sample, history)
        guided = predict(running, trajectory, index, inside)
        corrected = guided
        if self.correction is not None:
            assert trajectory.form is not None
            sample = trajectory.form.carried(state.sample)
            corrected = self.correction.apply(guided, trajectory.steps[index].timestep, sample, before)
        after = follow(trajectory, index, inside, corrected, self.correction)
        source = self.remembered[index + 1] if index + 1 < len(self.remembered) else None
        if source is None:
            return after
        # Where the timestep is repeated, what was remembered before is remembered still.
        kept = guided if source == index else before
        assert kept is not None
        return State(after.sample, {**after.history, _REMEMBERED: kept})


@torch.no_grad()
def _visit(running: nn.Module, trajectory: Trajectory, correction: StepCorrection | None) -> _Visited:
    visited = _Visited(trajectory, correction, [state_at(trajectory, 0)], _remembered(trajectory, correction))
    for index in range(len(trajectory.steps) - 1):
        visited.states.append(visited.step(running, index, visited.states[-1]))
    return visited


def _remembered(trajectory: Trajectory, correction: StepCorrection | None) -> list[int | None]:
    """The step whose prediction a correction uses in each step: the last one at the timestep before."""
    count = len(trajectory.steps)
    if correction is None or correction.previous is None:
        return [None] * count
    rows = [correction.row(step.timestep) for step in trajectory.steps]
    found: list[int | None] = [None]
    for index in range(1, count):
        found.append(index - 1 if rows[index] != rows[index - 1] else found[-1])
    return found


def _last_step_first(
    running: nn.Module,
    candidate: nn.Module,
    reference: nn.Module,
    pairs: Pairs,
    visited: _Visited,
    adjoint: Tensor,
    sums: Mapping[str, list[float]],
    done: Callable[[int], None],
) -> None:
    adjoints = Adjoints([adjoint])
    for index in reversed(range(len(visited.states))):

        def step(state: State, index: int = index) -> tuple[State, list[Tensor]]:
            with _tapped(running, candidate, reference, pairs, index, sums) as leaves:
                return visited.step(running, index, state), leaves

        adjoints.pull(visited.states[index], step, inner=index > 0)
        done(len(visited.states[index].sample))


@contextmanager
def _tapped(
    running: nn.Module,
    candidate: nn.Module,
    reference: nn.Module,
    pairs: Pairs,
    index: int,
    sums: Mapping[str, list[float]],
) -> Iterator[list[Tensor]]:
    """Inside, back-propagation through a paired layer's output adds <gradient, own error> to its sum of the step.

    Gives the leaves for which gradients must be asked, so that it gets there.
    """
    leaves: list[Tensor] = []
    handles = []
    for name, (exact, quantized) in pairs.items():
        tapped = quantized if running is candidate else exact
        hook = _tap(name, exact, quantized, sums[name], index, leaves)
        handles.append(tapped.register_forward_hook(hook, with_kwargs=True))
    try:
        if running is candidate:
            yield leaves
        else:
            with clock_following(reference, candidate):
                yield leaves
    finally:
        for handle in handles:
            handle.remove()


def _tap(
    name: str, exact: nn.Module, quantized: nn.Module, row: list[float], index: int, leaves: list[Tensor]
) -> Callable[[nn.Module, Any, Any, Any], Tensor]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise EvaluationError(f"{name} returns {type(output).__name__}, expected a tensor: leave the layer out.")
        with torch.no_grad():
            other = alone(quantized if module is exact else exact, args, kwargs)
            error = other - output if module is exact else output - other
        # A single zero, spread: the gradient of the output comes by the hook and is gone after it. What depends on the
        # timestep only is in the graph by it, too, and its error counts like any other.
        leaf = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        leaves.append(leaf)
        shift = leaf.expand_as(output)

        def add(gradient: Tensor) -> None:
            row[index] += float((gradient * error).sum(dtype=torch.float64))

        shift.register_hook(add)  # type: ignore[no-untyped-call]
        return output + shift

    return hook


@torch.no_grad()
def restored_drift(
    candidate: nn.Module,
    exact: Mapping[str, nn.Module],
    trajectories: Sequence[Trajectory],
    correction: StepCorrection | None = None,
) -> float:
    """The final drift with these layers in full precision: a free run of its own. The candidate is put back.

    exact: full-precision layers by name.
    """
    with ExitStack() as stack:
        for name, layer in exact.items():
            stack.enter_context(swapped(candidate, name, layer))
        return drift(final_states(candidate, trajectories, correction), trajectories)
