"""The pass backwards against autograd through the unrolled run, and layers beside their originals, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

from stepquant.calibrate.final_state import Adjoints, final_drifts, final_states
from stepquant.calibrate.own_errors import beside, products
from stepquant.calibrate.trajectory import State, Trajectory, advance, record, seal, state_at
from stepquant.errors import CalibrationError, EvaluationError
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.run import Run
from tiny import TinyNet

STEPS = 5
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "unipc": lambda: UniPCMultistepScheduler(),
    "pndm": lambda: PNDMScheduler(skip_prk_steps=True),
}


class Shifted(nn.Module):
    """The network with something added to what it returns."""

    def __init__(self, net: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.net, self.shift = net, shift

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return self.net(sample, timestep) + self.shift


def recorded(scheduler: Any, net: nn.Module) -> Trajectory:
    pipe = DenoiserPipeline(net, scheduler, (2, 4, 4))
    (found,) = record(pipe, net, seeds=[0, 1], steps=STEPS, batch_size=2, run=Run())
    return seal(found)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_several_quantities_by_one_pass(scheduler: str) -> None:
    """PNDM and UniPC remember predictions, so a shift of one acts in later steps, too."""
    net = TinyNet().double().requires_grad_(False)
    trajectory = recorded(SCHEDULERS[scheduler](), net)
    count = len(trajectory.steps)
    weights = torch.randn(3, *trajectory.steps[0].sample.shape, dtype=torch.float64)

    shifts = [torch.zeros(2, 2, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    state = state_at(trajectory, 0)
    for index, shift in enumerate(shifts):
        state = advance(Shifted(net, shift), trajectory, index, state)
    expected = [torch.autograd.grad((weight * state.sample).sum(), shifts, retain_graph=True) for weight in weights]

    assert sum(float(gradient.norm()) > 0 for gradient in expected[0]) >= STEPS - 1  # PNDM leaves one out

    adjoints = Adjoints(list(weights))
    for index in reversed(range(count)):

        def step(before: State, index: int = index) -> tuple[State, list[Tensor]]:
            leaf = torch.zeros(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
            return advance(Shifted(net, leaf), trajectory, index, before), [leaf]

        found = adjoints.pull(state_at(trajectory, index), step, inner=index > 0)
        for j in range(3):
            (gradient,) = found[j]
            assert gradient is not None
            assert torch.allclose(gradient, expected[j][index], rtol=1e-9, atol=1e-12)


def test_a_leaf_without_influence_has_no_gradient() -> None:
    net = TinyNet().double().requires_grad_(False)
    trajectory = recorded(DDIMScheduler(), net)
    adjoints = Adjoints([torch.ones(2, 2, 4, 4, dtype=torch.float64)])
    unused = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def step(before: State) -> tuple[State, list[Tensor]]:
        return advance(net, trajectory, 0, before), [unused]

    assert adjoints.pull(state_at(trajectory, 0), step) == [[None]]
    assert adjoints.pull(state_at(trajectory, 0), step, inner=False) == [[None]]


def test_final_drifts_are_by_image() -> None:
    net = TinyNet().double()
    trajectory = recorded(DDIMScheduler(), net)
    seen: list[int] = []
    (end,) = final_states(net, [trajectory], done=seen.append)
    assert seen == [2]
    assert torch.equal(end, trajectory.steps[-1].next_sample)
    moved = end.clone()
    moved[1] += 0.5
    assert final_drifts([moved], [trajectory]).tolist() == pytest.approx([0.0, 0.5])
    with pytest.raises(CalibrationError, match="no trajectories"):
        final_drifts([], [])


def test_layers_beside_their_originals() -> None:
    exact, other = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.randn(5, 3)
    seen: list[tuple[str, list[float]]] = []
    other.register_forward_hook(lambda *_: pytest.fail("hooks of the candidate's layer are left out"))
    with beside({"one": (exact, other)}, lambda name, _, q, f: seen.append((name, products(q, f).tolist()))):
        exact(x)
    exact(x)
    q, f = other.forward(x).double(), exact(x).double()
    sums = [float(one.detach().sum()) for one in (q * f, q * q, f * f, (q - f) ** 2)]
    assert [name for name, _ in seen] == ["one"]
    assert seen[0][1] == pytest.approx(sums, rel=1e-9)
    with (
        beside({"one": (exact, nn.Linear(3, 4))}, lambda *_: None),
        pytest.raises(EvaluationError, match="one gives Tensor unlike full precision"),
    ):
        exact(x)
