"""The end of sampling and what moves it: final states, their drift, and derivatives by one pass backwards.

With y_K the final sample of a free run and x_K the recorded full-precision one, n the values of an image,

    final drift of an image = |y_K - x_K| / sqrt(n)

`Adjoints` is the adjoint recursion of `calibrate.windows` for J quantities Q_j of the final sample at once, and with
leaves that somebody puts into the graph of each step (a zero that is added to a layer's output has the derivative with
respect to that output as its gradient):

    lambda_jk = (dF_k / d state)^T lambda_j,k+1        dQ_j / d leaf = (dF_k / d leaf)^T lambda_j,k+1

Steps are taken last one first, each with its graph built anew, so that one step's graph is in memory. The solver's
cached tensors have adjoints of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from stepquant.calibrate.trajectory import State, Trajectory, replay
from stepquant.errors import CalibrationError
from stepquant.model.correction import Corrector, StepCorrection

__all__ = ["Adjoints", "final_differences", "final_drifts", "final_states"]

Step = Callable[[State], tuple[State, Sequence[Tensor]]]
"""State before a step -> the state after it, and the leaves that were put into the graph on the way."""


@torch.no_grad()
def final_states(
    denoiser: nn.Module,
    trajectories: Sequence[Trajectory],
    correction: StepCorrection | None = None,
    *,
    done: Callable[[int], None] = lambda _images: None,
) -> list[Tensor]:
    """Where the denoiser ends from the recorded noise, running freely, one `[B, C, ...]` for each trajectory.

    correction: what the denoiser's scheduler applies. done: called with the number of images after each trajectory.
    """
    ends = []
    for trajectory in trajectories:
        corrector = None if correction is None else Corrector(correction)
        for state in replay(denoiser, trajectory, 0, len(trajectory.steps), correct=corrector):
            last = state
        ends.append(last.sample)
        done(trajectory.batch)
    return ends


def final_differences(ends: Sequence[Tensor], trajectories: Sequence[Trajectory]) -> list[Tensor]:
    """y_K - x_K, `[B, n]` float64 for each trajectory."""
    return [
        (end.detach().double() - trajectory.steps[-1].next_sample.double()).flatten(1)
        for end, trajectory in zip(ends, trajectories, strict=True)
    ]


def final_drifts(ends: Sequence[Tensor], trajectories: Sequence[Trajectory]) -> Tensor:
    """Final drift of every image of all trajectories, `[N]` float64 on the CPU.

    The mean is what `evaluate.drift` gives as the last of `accumulated`. Raises CalibrationError without trajectories.
    """
    if not trajectories:
        raise CalibrationError("There are no trajectories to measure the final drift on; record some first.")
    return torch.cat([row.square().mean(1).sqrt().cpu() for row in final_differences(ends, trajectories)])


class Adjoints:
    """dQ_j / d state for j = 1 .. J, on the way from the last step to the first.

    of_sample: J tensors like the sample. of_history: J times path -> tensor; only what has an influence.
    """

    def __init__(self, of_final: Sequence[Tensor]) -> None:
        """of_final: dQ_j / dx_K, like the final sample."""
        self.of_sample = list(of_final)
        self.of_history: list[Mapping[str, Tensor]] = [{} for _ in of_final]

    def pull(self, before: State, step: Step, *, inner: bool = True) -> list[list[Tensor | None]]:
        """Go from behind a step to before it. Returns dQ_j / d leaf, for each j and leaf; None where there is none.

        before: the state at which the step is differentiated. inner: False for the first step of all, before which
        nobody asks for an adjoint.
        """
        sample = before.sample.detach().requires_grad_(inner)
        history = {path: value.detach().requires_grad_(inner) for path, value in before.history.items()}
        with torch.enable_grad():
            after, leaves = step(State(sample, history))
        wanted = [*leaves, *((sample, *history.values()) if inner else ())]
        found: list[list[Tensor | None]] = []
        for j in range(len(self.of_sample)):
            gradients = self._gradients(j, after, wanted)
            found.append(gradients[: len(leaves)])
            if inner:
                of_sample, *others = gradients[len(leaves) :]
                self.of_sample[j] = torch.zeros_like(sample) if of_sample is None else of_sample
                pairs = zip(history, others, strict=True)
                self.of_history[j] = {path: gradient for path, gradient in pairs if gradient is not None}
        return found

    def _gradients(self, j: int, after: State, wanted: Sequence[Tensor]) -> list[Tensor | None]:
        outputs, given = [after.sample], [self.of_sample[j]]
        for path, value in after.history.items():
            if path in self.of_history[j]:
                outputs.append(value)
                given.append(self.of_history[j][path])
        differentiable = [place for place, value in enumerate(outputs) if value.requires_grad]
        if not differentiable or not wanted:
            return [None] * len(wanted)
        gradients = torch.autograd.grad(
            [outputs[place] for place in differentiable],
            wanted,
            [given[place] for place in differentiable],
            retain_graph=j < len(self.of_sample) - 1,
            allow_unused=True,
        )
        return list(gradients)
