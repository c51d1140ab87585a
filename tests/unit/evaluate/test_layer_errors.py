"""Errors of layers against hand-made layers, and against the quantized layer called at the recorded input."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor, nn

from stepquant.calibrate.trajectory import Trajectory, record, seal
from stepquant.errors import EvaluationError
from stepquant.evaluate.layer_errors import layer_errors
from stepquant.model.clock import clock_of
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.surgery import quantized_layers
from stepquant.run import Run
from tiny import TinyNet, tiny_pipe


def trajectories(denoiser: nn.Module, steps: int = 3) -> list[Trajectory]:
    pipe = DenoiserPipeline(denoiser, EulerDiscreteScheduler(), (2, 4, 4))
    found = record(pipe, denoiser, seeds=[0, 1, 2], steps=steps, batch_size=2, run=Run())
    return [seal(trajectory) for trajectory in found]


def relative(found: list[Tensor], exact: list[Tensor]) -> float:
    one, other = (torch.cat(each).detach().double() for each in (found, exact))
    return float((one - other).norm() / other.norm())


def test_errors_alone_and_inside_are_those_of_the_formula() -> None:
    full_precision = TinyNet()
    candidate = copy.deepcopy(full_precision)
    with torch.no_grad():
        candidate.conv.weight += 0.03 * torch.randn_like(candidate.conv.weight)
        candidate.out.weight *= 1.1
    recorded = trajectories(full_precision)
    found = layer_errors(candidate, full_precision, iter(recorded))
    assert found.timesteps == [float(step.timestep) for step in recorded[0].steps]
    assert list(found.made) == list(found.carried) == ["conv", "out"]
    assert found.made["out"] == pytest.approx([0.1] * 3, rel=1e-5)
    assert found.made["conv"] == found.carried["conv"]  # nothing stands before it
    for step in range(3):
        inputs = [trajectory.steps[step].calls[0].args[0] for trajectory in recorded]
        with torch.no_grad():
            exact_conv = [full_precision.conv(x) for x in inputs]
            conv = [candidate.conv(x) for x in inputs]
            exact, inside = ([net(x, 0) for x in inputs] for net in (full_precision, candidate))
        assert found.made["conv"][step] == pytest.approx(relative(conv, exact_conv), rel=1e-5)
        assert found.carried["out"][step] == pytest.approx(relative(inside, exact), rel=1e-5)


def test_a_quantized_layer_is_measured_with_the_parameters_of_its_step() -> None:
    pipe, candidate = tiny_pipe()
    (recorded,) = (seal(found) for found in record(pipe, pipe.unet, seeds=[0, 1], steps=5, batch_size=2, run=Run()))
    before = {name: module.processor for name, module in pipe.unet.named_modules() if hasattr(module, "processor")}
    found = layer_errors(candidate, pipe.unet, [recorded])
    layers = quantized_layers(candidate)
    assert set(found.made) == set(layers)
    assert any(name.endswith("processor.scores") for name in layers)
    clock = clock_of(candidate)
    assert clock is not None
    assert len(set(layers["conv_in"].input_quantizer.row_of_bin.tolist())) > 1  # type: ignore[union-attr, operator]
    for step in recorded.steps:
        clock.set(step.timestep)
        exact = pipe.unet.conv_in(step.sample)
        assert found.made["conv_in"][step.index] == pytest.approx(
            relative([layers["conv_in"](step.sample)], [exact]), rel=1e-4
        )
    json.dumps(found.to_dict(), allow_nan=False)
    # The full-precision network has its own attention again.
    after = {name: module.processor for name, module in pipe.unet.named_modules() if hasattr(module, "processor")}
    assert {name: id(value) for name, value in after.items()} == {name: id(value) for name, value in before.items()}
    assert not pipe.unet._forward_hooks


def test_a_copy_has_no_error_and_nan_is_named_by_its_layer() -> None:
    full_precision = TinyNet()
    recorded = trajectories(full_precision)
    same = layer_errors(copy.deepcopy(full_precision), full_precision, recorded)
    assert same.made == same.carried == {"conv": [0.0] * 3, "out": [0.0] * 3}
    broken = copy.deepcopy(full_precision)
    with torch.no_grad():
        broken.conv.weight[0] = torch.nan
    found = layer_errors(broken, full_precision, recorded)
    assert found.made == {"conv": [None] * 3, "out": [0.0] * 3}
    assert found.carried["out"] == [None] * 3


class Renamed(nn.Module):
    """TinyNet under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyNet()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.inner(sample, timestep)


class Skipping(TinyNet):
    """Never calls its convolution."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.out(sample.repeat(1, 2, 1, 1).movedim(1, -1)).movedim(-1, 1)


def test_networks_that_cannot_be_compared_are_refused() -> None:
    full_precision = TinyNet()
    recorded = trajectories(full_precision)
    with pytest.raises(EvaluationError, match="Renamed has none of the layers of TinyNet"):
        layer_errors(Renamed(), full_precision, recorded)
    with pytest.raises(EvaluationError, match="conv does not run the same way"):
        layer_errors(Skipping(), full_precision, recorded)
    with pytest.raises(EvaluationError, match="at least one trajectory"):
        layer_errors(full_precision, full_precision, [])
    with pytest.raises(EvaluationError, match="one length; got 3 and 2"):
        layer_errors(full_precision, full_precision, [*recorded, *trajectories(full_precision, steps=2)])
    assert not any(module._forward_hooks for module in full_precision.modules())
