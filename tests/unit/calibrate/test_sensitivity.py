"""Sensitivities against brute force: shift a layer's output by a tiny multiple of its error and sample to the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from torch import Tensor, nn

from stepquant.calibrate.sensitivity import (
    Item,
    Probe,
    _directions,
    _per_image,
    final_drift,
    final_scores,
    output_scores,
)
from stepquant.calibrate.stages import Place
from stepquant.calibrate.trajectory import Trajectory, record, replay, seal
from stepquant.errors import CalibrationError
from stepquant.evaluate.drift import measure_drift
from stepquant.model.layer import Matmul
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import WeightQuantizer
from stepquant.numerics.affine import fake_quantize
from stepquant.numerics.spec import weight_at
from stepquant.recipe import Job
from stepquant.run import Run

STEPS = 4
EPSILON = 1e-6
PROJECTIONS = 3


class Net(nn.Module):
    """A convolution, a time embedding of one row for the whole batch, and a matmul, for samples [B, 2, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Conv2d(2, 6, 3, padding=1)
        self.time = nn.Linear(4, 6)
        self.mix = Matmul("scores")
        self.outer = nn.Conv2d(6, 2, 1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        t = torch.as_tensor(timestep).to(sample.dtype).reshape(1, 1) / 1000
        phase = self.time(torch.cat([t, t.square(), torch.sin(5 * t), torch.cos(3 * t)], 1))  # [1, 6]
        hidden = torch.tanh(self.inner(sample) + phase[..., None, None])
        rows = hidden.flatten(2)  # [B, 6, 16]
        mixed = self.mix(torch.softmax(rows @ rows.transpose(1, 2), -1), rows)
        return self.outer(hidden + mixed.reshape_as(hidden))


@dataclass
class Case:
    trajectory: Trajectory
    net: Net
    probe: Probe


def case(scheduler: Any) -> Case:
    net = Net().double()
    pipe = DenoiserPipeline(net, scheduler, (2, 4, 4))
    trajectory = seal(record(pipe, net, seeds=(3, 1), steps=STEPS, batch_size=8, run=Run())[0])
    job = Job(pipe, net, copy.deepcopy(net), Run(), STEPS, {}, {"trajectories": [trajectory]})
    Place(weights=8, activations=8, ends="same", softmax_bits=None).run(job)
    probe = Probe(job.denoiser, job.handed["plan"], "minmax")
    probe.observe([trajectory], Run())
    return Case(trajectory, net, probe)


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def layer_errors(tested: Case, item: Item, bits: int) -> list[Tensor]:
    """What the candidate does to its layer's output at the full-precision input, call by call."""
    layer = getattr(tested.net, item.layer)
    scheme, probe = tested.probe.plan[item.layer], tested.probe
    other = copy.deepcopy(layer)
    errors: list[Tensor] = []

    def rounded(attribute: str, spec: Any, x: Tensor) -> Tensor:
        spec = replace(spec, bits=bits)
        return fake_quantize(x, probe.input_params(item.layer, attribute, spec), spec)

    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        if item.operand == "weights":
            spec = weight_at(scheme.weight, bits)
            other.weight.data = WeightQuantizer(spec, probe.weight_params(item.layer, spec))(module.weight.data)
            errors.append(other(*args) - output)
        elif len(args) == 1:
            errors.append(module.forward(rounded("input_quantizer", scheme.input, args[0])) - output)
        else:  # first order: one operand at a time
            left, right = args
            errors.append(rounded("input_quantizer", scheme.input, left) @ right - output)
            errors[-1] += left @ rounded("second_quantizer", scheme.second, right) - output

    calls = [call for step in tested.trajectory.steps for call in step.calls]
    with torch.no_grad(), hooked(layer, hook):
        for call in calls:
            tested.net(*call.args, **call.kwargs)
    return errors


def derivative(tested: Case, item: Item, errors: list[Tensor]) -> Tensor:
    """d x_T / d epsilon, [B, 2, 4, 4], where the layer's output in call k is moved by epsilon errors[k]."""
    ends = []
    for sign in (1.0, -1.0):
        shifts = iter(errors)

        def hook(_m: Any, _a: Any, output: Tensor, sign: float = sign, shifts: Iterator[Tensor] = shifts) -> Tensor:
            return output + sign * EPSILON * next(shifts)

        with torch.no_grad(), hooked(getattr(tested.net, item.layer), hook):
            *_, state = replay(tested.net, tested.trajectory, 0, len(tested.trajectory.steps))
        ends.append(state.sample)
    return (ends[0] - ends[1]) / (2 * EPSILON)


def unit_vectors(tested: Case) -> Tensor:
    """[J, B, 32] by the definition: normal draws of the run's stream, of unit length for every image."""
    generator = Run().generator("projections", 0)
    drawn = torch.randn(PROJECTIONS, 2, 2, 4, 4, generator=generator, dtype=torch.float64).flatten(2)
    return drawn / drawn.norm(dim=2, keepdim=True)


ITEMS = [
    Item("inner", "weights", (2, 4)),
    Item("inner", "activations", (3,)),
    Item("time", "weights", (2, 3)),
    Item("time", "activations", (2,)),
    Item("mix", "activations", (2, 5)),
    Item("outer", "weights", (3,)),
]


@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=False), DDIMScheduler(), PNDMScheduler()])
def test_scores_are_derivatives_of_the_whole_sampling(scheduler: Any) -> None:
    tested = case(scheduler)
    vectors = unit_vectors(tested)
    final, incoherent, _ = final_scores(tested.probe, [tested.trajectory], ITEMS, projections=PROJECTIONS, run=Run())
    for item in ITEMS:
        for bits in item.bits:
            errors = layer_errors(tested, item, bits)
            assert final[item][bits] > 1e-9  # far above what rounding does to the difference below

            def score(kept: list[Tensor], item: Item = item) -> float:
                along = (vectors * derivative(tested, item, kept).flatten(1)).sum(2)  # [J, B]
                if item.layer == "time":  # one row for the batch: no output per image
                    along = along.sum(1, keepdim=True).expand(-1, 2) / 2**0.5
                return float(along.square().mean())

            alone = [
                score([error if place == k else torch.zeros_like(error) for place, error in enumerate(errors)])
                for k in range(len(errors))
            ]
            assert final[item][bits] == pytest.approx(score(errors), rel=1e-5), (item, bits)
            assert incoherent[item][bits] == pytest.approx(sum(alone), rel=1e-5), (item, bits)
            if item.operand == "weights":  # or the two scores could be mistaken for one another
                assert final[item][bits] != pytest.approx(incoherent[item][bits], rel=1e-2)


def test_projections_estimate_the_mean_square() -> None:
    tested = case(DDIMScheduler())
    error = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    directions = torch.stack(_directions(tested.trajectory, 4000, Run(), 0))
    estimate = (directions * error).flatten(2).sum(2).square().mean(0)
    # The relative standard error of a mean of 4000 squares is about sqrt(2 / 4000) = 2 %.
    torch.testing.assert_close(estimate, error.flatten(1).square().mean(1), rtol=0.1, atol=0)


def test_rows_of_a_batch_go_to_their_images() -> None:
    products = torch.arange(12.0).reshape(1, 12)
    # Guidance: rows 0 1 2 | 3 4 5 are two halves of three images; heads: two parts of each row side by side.
    rows = [0 + 1, 2 + 3, 4 + 5, 6 + 7, 8 + 9, 10 + 11]
    expected = [[rows[0] + rows[3], rows[1] + rows[4], rows[2] + rows[5]]]
    assert _per_image(products, 6, 3).tolist() == expected
    together = _per_image(torch.tensor([[6.0]]), 3, 3)
    assert float(together.square().sum()) == pytest.approx(36.0)


def test_output_scores_are_the_layers_own_errors() -> None:
    tested = case(DDIMScheduler())
    mse, relative, _ = output_scores(tested.probe, [tested.trajectory], ITEMS, run=Run())
    calls = [call for step in tested.trajectory.steps for call in step.calls]
    for item in (ITEMS[0], ITEMS[1], ITEMS[3]):
        outputs: list[Tensor] = []
        with torch.no_grad(), hooked(getattr(tested.net, item.layer), lambda _m, _a, y, o=outputs: o.append(y)):
            for call in calls:
                tested.net(*call.args, **call.kwargs)
        for bits in item.bits:
            errors = torch.cat(layer_errors(tested, item, bits))
            assert mse[item][bits] == pytest.approx(float(errors.square().mean()), rel=1e-9)
            energy = float(torch.cat(outputs).square().mean())
            assert relative[item][bits] == pytest.approx(mse[item][bits] / energy, rel=1e-9)
    (mix,) = [item for item in ITEMS if item.layer == "mix"]
    assert mse[mix][5] < 0.1 * mse[mix][2]


def test_installing_a_plan_and_taking_it_out_again() -> None:
    tested = case(DDIMScheduler())
    probe, call = tested.probe, tested.trajectory.steps[1].calls[0]
    before = probe.denoiser(*call.args, **call.kwargs)
    assert torch.equal(before, tested.net(*call.args, **call.kwargs))
    plan = {"inner": replace(probe.plan["inner"], weight=replace(probe.plan["inner"].weight, bits=3), input=None)}
    probe.install(plan)
    by_hand = copy.deepcopy(tested.net)
    spec = plan["inner"].weight
    by_hand.inner.weight.data = WeightQuantizer(spec, probe.weight_params("inner", spec))(tested.net.inner.weight.data)
    assert torch.equal(probe.denoiser(*call.args, **call.kwargs), by_hand(*call.args, **call.kwargs))
    assert not torch.equal(before, by_hand(*call.args, **call.kwargs))
    drift = final_drift(probe.denoiser, [tested.trajectory], lambda _done: None)
    assert float(drift.mean()) == pytest.approx(measure_drift(by_hand, [tested.trajectory]).accumulated[-1], rel=1e-12)
    probe.install(probe.plan)
    assert not torch.equal(probe.denoiser(*call.args, **call.kwargs), before)
    probe.install({})
    assert torch.equal(probe.denoiser(*call.args, **call.kwargs), before)


def test_observed_elements_are_those_of_one_image() -> None:
    elements = case(DDIMScheduler()).probe.elements
    assert elements == {"inner": 2 * 16, "time": 2.0, "mix": 36 + 6 * 16, "outer": 6 * 16}


def test_drift_needs_trajectories() -> None:
    with pytest.raises(CalibrationError, match="record some first"):
        final_drift(Net(), [], lambda _done: None)
