"""Content and quality: SSIM against torchmetrics, and scores against quantizing one layer by hand and sampling."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from stepquant.calibrate import decoupled
from stepquant.calibrate.decoupled import decoupled_scores, dissimilarity, noise_to_signal
from stepquant.calibrate.sensitivity import Item, Probe
from stepquant.calibrate.stages import Place
from stepquant.calibrate.trajectory import Trajectory, record, replay, seal
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import WeightQuantizer
from stepquant.numerics.affine import fake_quantize
from stepquant.recipe import Job
from stepquant.run import Run

STEPS = 3


def windowed(x: Tensor, y: Tensor, size: int) -> float:
    """SSIM of one channel by the formula, window by window (variances with 1 / n)."""
    span = float(y.max() - y.min())
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    found = []
    for i in range(x.shape[0] - size + 1):
        for j in range(x.shape[1] - size + 1):
            a, b = x[i : i + size, j : j + size], y[i : i + size, j : j + size]
            covariance = ((a - a.mean()) * (b - b.mean())).mean()
            top = (2 * a.mean() * b.mean() + c1) * (2 * covariance + c2)
            bottom = (a.mean() ** 2 + b.mean() ** 2 + c1) * (a.var(correction=0) + b.var(correction=0) + c2)
            found.append(float(top / bottom))
    return sum(found) / len(found)


def test_dissimilarity_by_the_formula() -> None:
    y = torch.randn(2, 1, 13, 12, dtype=torch.float64)
    x = y + 0.3 * torch.randn_like(y)
    expected = [1 - windowed(one[0], other[0], 11) for one, other in zip(x, y, strict=True)]
    torch.testing.assert_close(dissimilarity(x, y), torch.tensor(expected, dtype=torch.float64))
    small = dissimilarity(x[..., :4, :4], y[..., :4, :4])  # one window of the state's size
    assert float(small[0]) == pytest.approx(1 - windowed(x[0, 0, :4, :4], y[0, 0, :4, :4], 4))


def test_dissimilarity_is_near_that_of_the_literature() -> None:
    y = torch.rand(1, 3, 32, 32)
    x = (y + 0.1 * torch.randn(1, 3, 32, 32)).clamp(0, 1)
    usual = 1 - float(structural_similarity_index_measure(x, y, data_range=float(y.max() - y.min())))
    assert float(dissimilarity(x, y)) == pytest.approx(usual, rel=0.15)  # windows without weights
    assert float(dissimilarity(y, y)) == pytest.approx(0, abs=1e-12)


def test_shapes_of_video_and_tokens() -> None:
    video = torch.randn(2, 3, 4, 12, 12)
    other = video + 0.1 * torch.randn_like(video)
    flat = dissimilarity(other.flatten(1, 2), video.flatten(1, 2))
    torch.testing.assert_close(dissimilarity(other, video), flat)
    tokens = torch.randn(2, 20, 3)
    moved = tokens.roll(1, 1)
    torch.testing.assert_close(dissimilarity(moved, tokens), dissimilarity(moved.mT[..., None], tokens.mT[..., None]))


def test_noise_to_signal_is_the_inverse_of_the_sqnr() -> None:
    wanted = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert noise_to_signal(wanted + torch.tensor([[0.0, 1.0], [2.0, 0.0]]), wanted).tolist() == [1 / 25, 1.0]


def test_of_small_errors_both_are_relative_squares() -> None:
    """1 - SSIM is |e|^2 / (2 |x - mean|^2) to leading order: why the two scores may be added."""
    generator = torch.Generator().manual_seed(0)
    wanted, error = (torch.randn(1, 1, 11, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    wanted, error = 100 * (wanted - wanted.mean()), error - error.mean()
    span = float(wanted.max() - wanted.min())
    constant = 2 * 121 * (0.03 * span) ** 2 / 2  # c2 in units of the sums below
    expected = float(error.square().sum() / (2 * wanted.square().sum() + constant))
    assert float(dissimilarity(wanted + 1e-2 * error, wanted)) == pytest.approx(1e-4 * expected, rel=1e-3)


class Net(nn.Module):
    """A convolution and a feed-forward layer of diffusers' name, for samples [B, 2, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Conv2d(2, 4, 3, padding=1)
        self.block = nn.ModuleDict({"ff": nn.ModuleDict({"net": nn.Linear(4, 4)})})
        self.outer = nn.Conv2d(4, 2, 1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        hidden = torch.tanh(self.inner(sample)) + torch.as_tensor(timestep).to(sample.dtype) / 1000
        feed: Any = self.block["ff"]
        result: Tensor = self.outer(hidden + feed["net"](hidden.movedim(1, -1)).movedim(-1, 1))
        return result


CONTENT = "block.ff.net"


def case() -> tuple[Net, Probe, Trajectory]:
    net = Net().double()
    pipe = DenoiserPipeline(net, DDIMScheduler(), (2, 4, 4))
    trajectory = seal(record(pipe, net, seeds=(3, 1), steps=STEPS, batch_size=8, run=Run())[0])
    job = Job(pipe, net, copy.deepcopy(net), Run(), STEPS, {}, {"trajectories": [trajectory]})
    Place(weights=8, activations=8, ends="same", softmax_bits=None).run(job)
    probe = Probe(job.denoiser, job.handed["plan"], "minmax")
    probe.observe([trajectory], Run())
    return net, probe, trajectory


ITEMS = [
    Item("inner", "weights", (2, 4)),
    Item(CONTENT, "weights", (2, 5)),
    Item(CONTENT, "activations", (3,)),
    Item("outer", "activations", (2, 6)),
]


def test_scores_are_those_of_sampling_with_one_layer_quantized() -> None:
    net, probe, trajectory = case()
    found, evaluations = decoupled_scores(probe, [trajectory], ITEMS, run=Run())
    assert evaluations == 2 * STEPS * 7
    expected: dict[Item, dict[int, float]] = {}
    for item in ITEMS:
        expected[item] = {}
        for bits in item.bits:
            other = copy.deepcopy(net)
            layer = other.get_submodule(item.layer)
            if item.operand == "weights":
                spec = replace(probe.plan[item.layer].weight, bits=bits)  # type: ignore[type-var]
                assert spec is not None
                quantizer = WeightQuantizer(spec, probe.weight_params(item.layer, spec))
                layer.weight.data = quantizer(layer.weight.data)
            else:
                spec = replace(probe.plan[item.layer].input, bits=bits)  # type: ignore[type-var]
                assert spec is not None
                params = probe.input_params(item.layer, "input_quantizer", spec)
                layer.register_forward_pre_hook(lambda _m, a, p=params, s=spec: (fake_quantize(a[0], p, s),))
            with torch.no_grad():
                *_, state = replay(other, trajectory, 0, STEPS)
            measure = dissimilarity if item.layer == CONTENT else noise_to_signal
            expected[item][bits] = float(measure(state.sample, trajectory.steps[-1].next_sample).mean())
    for item, scores in expected.items():
        assert found[item] == pytest.approx(scores, rel=1e-9), item
        assert all(value > 0 for value in scores.values())
    call = trajectory.steps[0].calls[0]
    with torch.no_grad():  # nothing is left in the network
        left = probe.denoiser(*call.args, **call.kwargs)
        torch.testing.assert_close(left, net(*call.args, **call.kwargs), rtol=0, atol=1e-14)


def test_it_goes_on_where_it_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}

    class Keeper:
        def save(self, name: str, tensors: Any, meta: Any) -> None:
            kept[name] = copy.deepcopy((tensors, meta))

        def load(self, name: str) -> Any:
            return kept.get(name)

    _, probe, trajectory = case()
    expected, _ = decoupled_scores(probe, [trajectory], ITEMS, run=Run())
    measured: Any = vars(decoupled)["_measured"]
    calls: list[str] = []

    def interrupting(*args: Any, **options: Any) -> float:
        calls.append("")
        if len(calls) == 4:  # within the second item
            raise KeyboardInterrupt
        found: float = measured(*args, **options)
        return found

    monkeypatch.setattr(decoupled, "_measured", interrupting)
    with pytest.raises(KeyboardInterrupt):
        decoupled_scores(probe, [trajectory], ITEMS, run=Run(), keeper=Keeper())
    found, _ = decoupled_scores(probe, [trajectory], ITEMS, run=Run(), keeper=Keeper())
    assert found == expected
    assert len(calls) == 4 + 5
