"""Windows of denoising steps: the loss at a window's end and its gradient, with one network graph in memory.

A window is the steps start .. stop-1 of a recorded trajectory. Both chains begin at the full-precision state x_start;
the loss compares the quantized chain's sample at the end with the recorded one:

    L = mean over images of  || x~_stop - x_stop ||^2

Gradient modes (derived in docs/methods/accuquant.md):

- `exact`: the adjoint recursion  lambda_j = (dF_j/dx)^T lambda_{j+1}, each step's graph recomputed when its turn comes.
  Solvers that remember earlier predictions (DPM-Solver++, PNDM, UniPC) pass the adjoints of their cached tensors along
  in the same way, so the result is the gradient of the unrolled chain.
- `identity`: lambda_{j+1} = lambda_M for every step (the paper's approximation); cached predictions count as constants.
- `per_step`: each step is pulled to the recorded sample after it, from the quantized chain's own detached state; one
  pass. A different objective (truncated back-propagation), the strong cheap baseline.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

import torch
from torch import Tensor, nn

from stepquant.calibrate.trajectory import State, Trajectory, advance, replay, state_at
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.pipeline import SCHEDULE_ARGUMENTS
from stepquant.recipe import Job

__all__ = [
    "GradientMode",
    "equal_windows",
    "expected_steps",
    "unrolled_loss",
    "window_gradient",
    "window_loss",
    "windows_of",
]

GradientMode = Literal["identity", "exact", "per_step"]


def expected_steps(job: Job) -> tuple[int, float]:
    """The least and the most steps that a recording can have, as far as is known before it is made.

    Some schedulers make more calls than steps (Heun, PNDM), and image to image walks a part of them. Timesteps that the
    caller gives are counted once they are recorded.
    """
    if any(name in job.arguments for name in SCHEDULE_ARGUMENTS):
        return 1, math.inf
    scheduler = copy.deepcopy(getattr(job.pipe, "scheduler", None))
    most = math.inf
    if scheduler is not None:
        with suppress(Exception):  # one that wants more than a number of steps is known once it has sampled
            getattr(scheduler, "uncorrected", scheduler).set_timesteps(job.steps)
            most = len(scheduler.timesteps)
    return (1 if "strength" in job.arguments else job.steps), most


def equal_windows(steps: int, length: int) -> tuple[int, ...]:
    """Lengths of disjoint windows that cover `steps`. A remainder shortens the last window, the one near the image."""
    if not 1 <= length <= steps:
        raise SpecError(f"A window has from 1 to {steps} steps here, found {length}.")
    full, rest = divmod(steps, length)
    return (length,) * full + ((rest,) if rest else ())


def windows_of(lengths: Sequence[int], steps: int) -> list[tuple[int, int]]:
    """(start, stop) of consecutive windows. Their lengths must add up to the number of recorded steps."""
    if any(length < 1 for length in lengths) or sum(lengths) != steps:
        raise SpecError(
            f"Window lengths must be positive and add up to the {steps} scheduler steps of the recording, found "
            f"{list(lengths)} with sum {sum(lengths)}. Some schedulers (PNDM, Heun) make more calls than steps."
        )
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    return list(itertools.pairwise(borders))


def window_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance of two batches of samples, summed over an image, averaged over images: a scalar.

    The sum matters where the loss meets a rounding regulariser of fixed weight: a mean over pixels would be drowned.
    """
    return (found - wanted).square().sum() / len(found)


def _loss_adjoint(found: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
    """The window loss and its gradient with respect to `found`."""
    difference = (found - wanted).detach()
    loss = float(window_loss(found.detach(), wanted))
    if not torch.isfinite(difference).all():
        raise CalibrationError(
            "The quantized chain left the finite numbers inside a window: lower the learning rates or shorten the "
            "windows."
        )
    return loss, 2 * difference / len(difference)


def window_gradient(
    denoiser: nn.Module,
    trajectory: Trajectory,
    start: int,
    stop: int,
    *,
    mode: GradientMode,
    state: State | None = None,
) -> float:
    """Add the gradient of one window's loss to the `.grad` of everything in the denoiser that requires it.

    state: where the quantized chain begins; None is the full-precision state.
    Returns the loss at the window's end (in every mode, so that modes can be compared).
    """
    begin = state_at(trajectory, start) if state is None else state
    wanted = state_at(trajectory, stop).sample
    if mode == "per_step":
        return _per_step(denoiser, trajectory, start, stop, begin)
    if mode not in ("identity", "exact"):
        raise SpecError(f"gradient must be identity, exact or per_step, found {mode!r}.")
    with torch.no_grad():
        # The state before every step of the quantized chain. The last step runs only once, below, with its graph.
        states = [begin, *replay(denoiser, trajectory, start, stop - 1, begin)]
    return _last_step_first(denoiser, trajectory, start, states, wanted, exact=mode == "exact")


def _last_step_first(
    denoiser: nn.Module, trajectory: Trajectory, start: int, states: list[State], wanted: Tensor, *, exact: bool
) -> float:
    """Back-propagate through one step after the other, each step's graph gone before the next one is built.

    exact: the adjoint of each step is that of sample and solver history behind it; otherwise that of the window's end.
    """
    loss, adjoint = 0.0, None
    of_history: dict[str, Tensor] = {}
    for index in range(start + len(states) - 1, start - 1, -1):
        inner = exact and index > start  # nothing asks for the gradient of the window's start
        before = states[index - start]
        sample = before.sample.detach().requires_grad_(inner)
        history = {path: value.detach().requires_grad_(inner) for path, value in before.history.items()}
        after = advance(denoiser, trajectory, index, State(sample, history))
        if adjoint is None:
            loss, adjoint = _loss_adjoint(after.sample, wanted)
        outputs, adjoints = [after.sample], [adjoint]
        for path, value in after.history.items():
            if path in of_history and value.requires_grad:
                outputs.append(value)
                adjoints.append(of_history[path])
        torch.autograd.backward(outputs, adjoints)
        if inner:
            assert sample.grad is not None
            adjoint = sample.grad
            of_history = {path: value.grad for path, value in history.items() if value.grad is not None}
    return loss


def _per_step(denoiser: nn.Module, trajectory: Trajectory, start: int, stop: int, state: State) -> float:
    for index in range(start, stop):
        after = advance(denoiser, trajectory, index, state)
        wanted = state_at(trajectory, index + 1).sample
        loss, adjoint = _loss_adjoint(after.sample, wanted)
        torch.autograd.backward(after.sample, adjoint)
        state = State(after.sample.detach(), {path: value.detach() for path, value in after.history.items()})
    return loss


def unrolled_loss(
    denoiser: nn.Module, trajectory: Trajectory, start: int, stop: int, state: State | None = None
) -> Tensor:
    """The window loss with the whole graph in memory: oracle of `exact`, baseline of the memory benchmark."""
    current = state_at(trajectory, start) if state is None else state
    for index in range(start, stop):
        current = advance(denoiser, trajectory, index, current)
    return window_loss(current.sample, state_at(trajectory, stop).sample)
