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

The gradient comes from the adjoint recursion of `calibrate.windows`: steps are taken last one first, each with its
network graph built anew, so that one graph is in memory, with one error tensor beside each layer's output in it. The
solver's cached tensors and the prediction that a correction remembers have adjoints of their own.

Quantizers are differentiated straight through (`numerics.affine.fake_quantize`): 1 inside the range, 0 outside. Layers
of engines and of other software have no such gradient. Then it is taken at the full-precision trajectory, through the
full-precision network (`at="full_precision"`): the same to first order in the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepquant.calibrate.trajectory import State, Trajectory, follow, predict, replay, state_at
from stepquant.doctor.layers import clock_following, still, swapped
from stepquant.errors import EvaluationError
from stepquant.model.correction import Corrector, StepCorrection

__all__ = ["Driver", "Expansion", "contributions", "drift", "final_states", "restored_drift"]

Expansion = Literal["quantized", "full_precision"]
"""The trajectory at which the drift is differentiated."""

Pairs = Mapping[str, tuple[nn.Module, nn.Module]]
"""Name -> (full-precision layer, the candidate's)."""


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


@torch.no_grad()
def final_states(
    denoiser: nn.Module, trajectories: Sequence[Trajectory], correction: StepCorrection | None = None
) -> list[Tensor]:
    """Where the denoiser ends from the recorded noise, running freely, one `[B, C, ...]` for each trajectory."""
    ends = []
    for trajectory in trajectories:
        corrector = None if correction is None else Corrector(correction)
        for state in replay(denoiser, trajectory, 0, len(trajectory.steps), correct=corrector):
            last = state
        ends.append(last.sample)
    return ends


def drift(ends: Sequence[Tensor], trajectories: Sequence[Trajectory]) -> float:
    """D of final states; root mean square over an image, mean over images."""
    rows = [_difference(end, trajectory) for end, trajectory in zip(ends, trajectories, strict=True)]
    return float(torch.cat([row.square().mean(1).sqrt() for row in rows]).mean())


def _difference(end: Tensor, trajectory: Trajectory) -> Tensor:
    """y_K - x_K, `[B, n]` float64."""
    return (end.detach().double() - trajectory.steps[-1].next_sample.double()).flatten(1)


def _gradients(ends: Sequence[Tensor], trajectories: Sequence[Trajectory]) -> list[Tensor]:
    """dD / dy_K by trajectory; 0 for an image without drift."""
    images = sum(len(end) for end in ends)
    found = []
    for end, trajectory in zip(ends, trajectories, strict=True):
        row = _difference(end, trajectory)
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
    """A free run: the state before every step, and the predictions that a correction remembers.

    remembered: for each step the number of the step whose prediction the correction is given; None for none.
    """

    trajectory: Trajectory
    correction: StepCorrection | None
    states: list[State]
    guided: list[Tensor]
    remembered: list[int | None]

    def step(self, running: nn.Module, index: int, state: State, before: Tensor | None) -> tuple[Tensor, State]:
        """Prediction of step `index` and the state after it; differentiable in state and `before`."""
        trajectory = self.trajectory
        guided = predict(running, trajectory, index, state)
        corrected = guided
        if self.correction is not None:
            assert trajectory.form is not None
            sample = trajectory.form.carried(state.sample)
            corrected = self.correction.apply(guided, trajectory.steps[index].timestep, sample, before)
        return guided, follow(trajectory, index, state, corrected)


@torch.no_grad()
def _visit(running: nn.Module, trajectory: Trajectory, correction: StepCorrection | None) -> _Visited:
    visited = _Visited(trajectory, correction, [state_at(trajectory, 0)], [], _remembered(trajectory, correction))
    for index in range(len(trajectory.steps)):
        source = visited.remembered[index]
        before = None if source is None else visited.guided[source]
        guided, after = visited.step(running, index, visited.states[-1], before)
        visited.guided.append(guided)
        visited.states.append(after)
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
    of_history: dict[str, Tensor] = {}
    of_guided: dict[int, Tensor] = {}
    for index in reversed(range(len(visited.trajectory.steps))):
        state = visited.states[index]
        sample = state.sample.detach().requires_grad_(True)
        history = {path: value.detach().requires_grad_(True) for path, value in state.history.items()}
        source = visited.remembered[index]
        before = None if source is None else visited.guided[source].detach().requires_grad_(True)
        with torch.enable_grad(), _tapped(running, candidate, reference, pairs, index, sums):
            guided, after = visited.step(running, index, State(sample, history), before)
            outputs, adjoints = [after.sample], [adjoint]
            for path, value in after.history.items():
                if path in of_history and value.requires_grad:
                    outputs.append(value)
                    adjoints.append(of_history[path])
            if index in of_guided:
                outputs.append(guided)
                adjoints.append(of_guided.pop(index))
            torch.autograd.backward(outputs, adjoints)
        assert sample.grad is not None
        adjoint = sample.grad
        of_history = {path: value.grad for path, value in history.items() if value.grad is not None}
        if source is not None and before is not None and before.grad is not None:
            of_guided[source] = of_guided[source] + before.grad if source in of_guided else before.grad
        done(len(sample))


@contextmanager
def _tapped(
    running: nn.Module,
    candidate: nn.Module,
    reference: nn.Module,
    pairs: Pairs,
    index: int,
    sums: Mapping[str, list[float]],
) -> Iterator[None]:
    """Inside, back-propagation through a paired layer's output adds <gradient, own error> to its sum of the step."""
    handles = []
    for name, (exact, quantized) in pairs.items():
        tapped = quantized if running is candidate else exact
        handles.append(tapped.register_forward_hook(_tap(name, exact, quantized, sums[name], index), with_kwargs=True))
    try:
        if running is candidate:
            yield
        else:
            with clock_following(reference, candidate):
                yield
    finally:
        for handle in handles:
            handle.remove()


def _tap(
    name: str, exact: nn.Module, quantized: nn.Module, row: list[float], index: int
) -> Callable[[nn.Module, Any, Any, Any], Tensor]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise EvaluationError(f"{name} returns {type(output).__name__}, expected a tensor: leave the layer out.")
        with torch.no_grad():
            if module is exact:
                error = _alone(quantized, args, kwargs) - output
            else:
                error = output - _alone(exact, args, kwargs)
        # What depends on the timestep only is outside of the graph, and its error counts like any other.
        tapped = output if output.requires_grad else output.detach().requires_grad_(True) * 1

        def add(gradient: Tensor) -> None:
            row[index] += float((gradient * error).sum(dtype=torch.float64))

        tapped.register_hook(add)  # type: ignore[no-untyped-call]
        return tapped

    return hook


def _alone(layer: nn.Module, args: Any, kwargs: Any) -> Tensor:
    """One layer's output, without any hook that was put on it."""
    result: Tensor = layer.forward(*args, **kwargs)
    return result


@torch.no_grad()
def restored_drift(
    candidate: nn.Module,
    name: str,
    exact: nn.Module,
    trajectories: Sequence[Trajectory],
    correction: StepCorrection | None = None,
) -> float:
    """The final drift with layer `name` in full precision: a free run of its own. The candidate is put back."""
    with swapped(candidate, name, exact):
        return drift(final_states(candidate, trajectories, correction), trajectories)
