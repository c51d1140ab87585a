"""Units that return several tensors: all are fitted, and none counts for more because it is longer or larger."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
import tiny_pipelines
from stepquant.calibrate import reconstruct
from stepquant.calibrate.captured import Column
from stepquant.calibrate.reconstruct import Fit, balanced, fit_unit, output_tensors, sample_losses, soft_roundings
from stepquant.calibrate.rounding import soften_
from stepquant.errors import CalibrationError
from stepquant.model.surgery import Unit, quantized_layers
from stepquant.numerics.spec import scheme_for
from stepquant.recipe import Job
from stepquant.run import Run

SAMPLES = 6


class Joint(nn.Module):
    """Text `[B, 3, 6]` and image `[B, 5, 6]`; the image reads the text, as in a joint attention."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.text, self.image = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        mixed = torch.tanh(self.both(text))
        return self.text(mixed), 30 * self.image(image + mixed.mean(1, keepdim=True))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.block = Joint()

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        text, image = self.block(sample[:, :3], sample)
        return text.mean() + image


UNIT = Unit("block", ("block.both", "block.text", "block.image"))


def joint_job() -> tuple[Job, reconstruct._Cache, dict[str, Any]]:
    full_precision = Net().requires_grad_(False)
    denoiser = tiny.quantize_(copy.deepcopy(full_precision), scheme_for(3, None), ends="same")
    weights = dict(full_precision.named_modules())
    layers = quantized_layers(denoiser)
    for name, layer in layers.items():
        soften_(layer, weights[name].weight, 0.0)
    draw = torch.Generator().manual_seed(7)
    args = tuple(torch.randn(SAMPLES, length, 6, generator=draw) for length in (3, 5))
    shifted = tuple(value + 0.1 for value in args)
    cache = reconstruct._Cache(shifted, {}, full_precision.block(*args), torch.zeros(SAMPLES, dtype=torch.int64))
    return Job(None, full_precision, denoiser, Run(), 5), cache, soft_roundings(layers)


def test_one_iteration_follows_the_gradient_of_both_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of each output over the squares of what it should be, by autograd; gradient descent stands in for Adam."""
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    job, cache, soft = joint_job()
    twin, same, twin_soft = joint_job()
    found = fit_unit(job, UNIT, cache, Fit(1, SAMPLES, 1.0, 2.0), soft=soft, stream=("t", 1))

    powers = [float(output.double().square().sum(1).mean()) for output in same.outputs]  # type: ignore[union-attr]
    assert powers[1] > 50 * powers[0]
    chosen = torch.randint(SAMPLES, (SAMPLES,), generator=twin.run.generator("blocks", "t", 1))

    def loss_of(rows: Tensor) -> Tensor:
        made = twin.denoiser.block(*(value[rows] for value in same.args))
        errors = [(one - other[rows]).square().sum(1).mean() for one, other in zip(made, same.outputs, strict=True)]
        return sum(powers) / 2 * (errors[0] / powers[0] + errors[1] / powers[1]) / 2

    assert found["before"] == pytest.approx(float(loss_of(torch.arange(SAMPLES)).detach()), rel=1e-5)
    loss_of(chosen).backward()  # type: ignore[no-untyped-call]
    for name, rounding in twin_soft.items():
        moved = soft[name].alpha.detach() - rounding.alpha.detach()
        torch.testing.assert_close(moved, -rounding.alpha.grad, rtol=1e-4, atol=1e-6)
        assert float(moved.abs().max()) > 1e-3, name


def test_a_single_output_is_its_own_loss() -> None:
    loss = torch.tensor(2.5)
    assert balanced([loss], [1.0]) is loss
    _, cache, _ = joint_job()
    single = reconstruct._Cache(cache.args, {}, cache.outputs[:1], cache.bins)
    assert single.powers(2.0, 4) == [1.0]


def test_losses_are_balanced() -> None:
    """The second output is a hundred times stronger: equal relative errors count alike."""
    assert float(balanced([torch.tensor(0.1), torch.tensor(10.0)], [1.0, 100.0])) == pytest.approx(50.5 * 0.1)
    by_sample = balanced([torch.tensor([0.1, 0.2]), torch.tensor([0.0, 20.0])], [1.0, 100.0])
    torch.testing.assert_close(by_sample, 50.5 * torch.tensor([0.05, 0.2]))
    assert float(balanced([torch.tensor(0.5), torch.tensor(1.0)], [0.0, 4.0])) == pytest.approx((0.5 + 2 / 4) / 2)


@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_powers_are_those_of_all_samples_wherever_they_lie(norm: float, tmp_path: Path) -> None:
    _, cache, _ = joint_job()
    columns = [Column(tmp_path) for _ in cache.outputs]
    for column, output in zip(columns, cache.outputs, strict=True):
        assert isinstance(output, Tensor)
        column.add(output, SAMPLES)
    on_disk = reconstruct._Cache(cache.args, {}, tuple(column.joined() for column in columns), cache.bins)
    expected = [float(sample_losses(torch.zeros_like(y), y, norm).mean()) for y in cache.outputs]  # type: ignore[arg-type]
    assert cache.powers(norm, 4) == pytest.approx(expected, rel=1e-6)
    assert on_disk.powers(norm, 4) == cache.powers(norm, 4)


def test_outputs_of_units() -> None:
    states, others = torch.zeros(2, 3), torch.ones(2, 1)
    assert output_tensors(states) == (states,)
    assert [id(one) for one in output_tensors((None, states))] == [id(states)]  # the last block of SD3
    made = output_tensors({"a": [states, None], "b": (torch.ones(5, 3), others, torch.ones(2, dtype=torch.int64))})
    assert [id(one) for one in made] == [id(states), id(others)]
    with pytest.raises(CalibrationError, match="NoneType without a floating-point tensor"):
        output_tensors(None)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_blocks_of_diffusers_learn_from_text_and_image(family: str) -> None:
    """One step without a regulariser moves the rounding of every layer, also of those that only the image passes."""
    pytest.importorskip("transformers", reason="diffusers defines this pipeline only beside transformers")
    net = tiny_pipelines.FAMILIES[family].build().transformer.requires_grad_(False)
    denoiser = tiny.quantize_(copy.deepcopy(net), scheme_for(3, None), ends="same")
    name = "transformer_blocks.0"
    layers = {k: v for k, v in quantized_layers(denoiser).items() if k.startswith(name + ".")}
    modules = dict(net.named_modules())
    for key, layer in layers.items():
        soften_(layer, modules[key].weight, 0.0)
    call = {
        "hidden_states": tiny_pipelines.tokens(16, 16) if family == "flux" else torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": tiny_pipelines.tokens(5, 16),
        "pooled_projections": tiny_pipelines.pooled(12),
        "timestep": torch.tensor([0.5, 0.5]),
    }
    if family == "flux":
        call |= {"guidance": torch.ones(2), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    caches = dict(reconstruct._caches(denoiser, net, [name], [((), call)], torch.zeros(2, dtype=torch.int64), True))
    assert [tuple(output.shape) for output in caches[name].outputs] == [(2, 5, 16), (2, 16, 16)]
    soft = soft_roundings(layers)
    before = {key: rounding.alpha.detach().clone() for key, rounding in soft.items()}
    job = Job(None, net, denoiser, Run(), 5)
    fit_unit(job, Unit(name, tuple(layers)), caches[name], Fit(1, 2, 0.1, 2.0), soft=soft, stream=("t", 1))
    assert {key.removeprefix(name + ".") for key in soft} >= {"attn.to_q", "ff.net.2", "ff_context.net.2"}
    still = [key for key, rounding in soft.items() if torch.equal(rounding.alpha.detach(), before[key])]
    assert still == []
