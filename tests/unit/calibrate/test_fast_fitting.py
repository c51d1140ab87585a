"""What makes fitting faster leaves its result: each part against the formulas written one operation at a time."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tiny
from stepquant.api import quantize
from stepquant.calibrate import reconstruct, rounding
from stepquant.calibrate.captured import Column, RowsOnDisk, taken
from stepquant.calibrate.qdrop import QDrop
from stepquant.calibrate.reconstruct import Fit, RoundBlocks, fit_unit, reconstruction_loss, soft_roundings
from stepquant.calibrate.rounding import GAMMA, ZETA, SoftRounding, adam, candidates_kept, soften_
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.surgery import Unit, quantized_layers
from stepquant.numerics.affine import Levels, QParams, choose_qparams, fake_quantize, range_of
from stepquant.numerics.spec import QuantSpec, scheme_for
from stepquant.recipe import Job, Recipe
from stepquant.run import Run

FILE = Path(__file__).parents[3] / "benchmarks" / "first_reconstruction.py"
SAMPLES = 6


@pytest.fixture(scope="module")
def first() -> Any:
    """The straightforward implementation that the benchmark measures."""
    spec = importlib.util.spec_from_file_location("first_reconstruction", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["first_reconstruction"] = module
    spec.loader.exec_module(module)
    return module


def clipped_rounding(
    spec: QuantSpec, layout: torch.memory_format = torch.contiguous_format
) -> tuple[SoftRounding, Tensor]:
    """Some weights lie beyond both ends of the range, some roundings are decided, some are not."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 4, 3, 3, generator=draw).contiguous(memory_format=layout)
    low, high = range_of(weight, spec)
    soft = SoftRounding(WeightQuantizer(spec, choose_qparams(0.5 * low, 0.6 * high, spec)), weight)
    with torch.no_grad():
        soft.alpha.copy_(3 * torch.randn(soft.alpha.shape, generator=draw))
    return soft, weight


def wide(soft: SoftRounding) -> tuple[Tensor, Tensor]:
    """alpha in float64, and h of it."""
    alpha = soft.alpha.detach().double().requires_grad_()
    return alpha, torch.clamp(torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)


SPECS = [QuantSpec(4, "channel"), QuantSpec(3, "group", group_size=12), QuantSpec(4, "tensor", symmetric=True)]


@pytest.fixture(params=["whole", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that are worked on as a whole, and in parts of which the last is smaller."""
    if request.param == "in pieces":
        monkeypatch.setattr(rounding, "AT_ONCE", 50)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_soft_weights_and_their_gradient_follow_the_formula(
    spec: QuantSpec, kept: bool, layout: torch.memory_format
) -> None:
    soft, weight = clipped_rounding(spec, layout)
    upstream = torch.randn(weight.shape).contiguous(memory_format=layout)
    if kept:
        with candidates_kept([soft]):
            found = soft(weight)
    else:
        found = soft(weight)
    found.backward(upstream)
    alpha, h = wide(soft)
    params = soft.quantizer.params
    levels = torch.clamp(soft.floor.double() + h + params.zero_point.double(), spec.qmin, spec.qmax)
    expected = ((levels - params.zero_point.double()) * params.scale.double()).reshape(weight.shape)
    expected.backward(upstream.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    assert soft.alpha.grad is not None
    assert alpha.grad is not None
    torch.testing.assert_close(soft.alpha.grad.double(), alpha.grad, rtol=1e-4, atol=1e-6)
    untouched = alpha.grad == 0
    assert 10 < int(untouched.sum()) < alpha.numel() - 10  # both cases are there
    assert bool((soft.alpha.grad[untouched] == 0).all())


def test_a_decided_rounding_is_the_hard_one_bit_by_bit() -> None:
    soft, weight = clipped_rounding(SPECS[0])
    with torch.no_grad():
        soft.alpha.copy_(torch.where(soft.alpha >= 0, 9.0, -9.0))
    assert torch.equal(soft(weight), soft.rounded(weight))


def test_candidates_are_kept_no_longer_than_asked() -> None:
    soft, _ = clipped_rounding(SPECS[0])
    before = set(soft.state_dict())
    with candidates_kept([soft]):
        assert soft.kept is not None
        assert set(soft.state_dict()) == before
    assert soft.kept is None

    def interrupted() -> None:
        with candidates_kept([soft]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert soft.kept is None


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("beta", [20.0, 7.3, 2.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_regulariser_and_its_gradient_follow_the_formula(beta: float, layout: torch.memory_format) -> None:
    soft, _ = clipped_rounding(SPECS[0], layout)
    before = torch.randn_like(soft.alpha)
    soft.alpha.grad = before.clone()
    soft.regularise_(beta, 0.3)
    alpha, h = wide(soft)
    expected = (1 - (2 * h - 1).abs().pow(beta)).sum()
    (0.3 * expected).backward()
    assert float(soft.regulariser(beta).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert alpha.grad is not None
    torch.testing.assert_close(soft.alpha.grad.double(), before.double() + alpha.grad, rtol=1e-4, atol=1e-6)
    untouched = alpha.grad == 0
    assert 10 < int(untouched.sum()) < alpha.numel() - 10
    assert torch.equal(soft.alpha.grad[untouched], before[untouched])


def test_the_regulariser_alone_makes_a_gradient() -> None:
    soft, _ = clipped_rounding(SPECS[0])
    soft.regularise_(7.3, 0.3)
    assert soft.alpha.grad is not None
    with torch.no_grad():
        soft.alpha.zero_()  # h = 1/2, where the regulariser is flat: log(0) is no NaN
    soft.alpha.grad = None
    soft.regularise_(7.3, 0.3)
    assert torch.equal(soft.alpha.grad, torch.zeros_like(soft.alpha))


def test_second_derivatives_are_refused_where_candidates_are_kept() -> None:
    soft, weight = clipped_rounding(SPECS[0])
    with candidates_kept([soft]):
        (first,) = torch.autograd.grad(soft(weight).square().sum(), soft.alpha, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()
    (first,) = torch.autograd.grad(soft(weight).square().sum(), soft.alpha, create_graph=True)
    first.sum().backward()
    assert soft.alpha.grad is not None


def test_adam_takes_the_steps_of_torchs_plain_one() -> None:
    starts = [torch.randn(5, 7), torch.randn(3)]
    made: list[list[Tensor]] = []
    for optimizer_of in (lambda groups: adam(groups), lambda groups: torch.optim.Adam(groups, foreach=False)):
        parameters = [nn.Parameter(start.clone()) for start in starts]
        optimizer = optimizer_of([{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.01, 0.3), strict=True)])
        draw = torch.Generator().manual_seed(1)
        for _ in range(20):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            optimizer.step()
        made.append([parameter.detach() for parameter in parameters])
    for one, other, start in zip(*made, starts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert float((one - start).abs().min()) > 1e-4


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 7, 3), (4, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_follows_the_formula(norm: float, shape: tuple[int, ...], weighted: bool) -> None:
    found, wanted = torch.randn(shape, requires_grad=True), torch.randn(shape)
    weights = torch.tensor([0.5, 2.0, 1.0, 0.5]) if weighted else None
    loss = reconstruction_loss(found, wanted, norm, weights)
    loss.backward()  # type: ignore[no-untyped-call]
    plain = found.detach().double().requires_grad_()
    each = (plain - wanted.double()).abs().pow(norm).sum(1).reshape(4, -1).mean(1)
    expected = (each * (1.0 if weights is None else weights.double())).mean()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(found.grad.double(), plain.grad, rtol=1e-4, atol=1e-6)


def test_rows_are_taken_by_position(tmp_path: Path) -> None:
    value, chosen = torch.randn(5, 2, 3), torch.tensor([4, 0, 4, 2])
    column = Column(tmp_path)
    column.add(value, 5)
    on_disk = column.joined()
    assert isinstance(on_disk, RowsOnDisk)
    for rows in (value, on_disk):
        assert torch.equal(taken(rows, chosen), torch.stack([value[4], value[0], value[4], value[2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_several_bits_have_the_gradients_of_each_alone(dtype: torch.dtype) -> None:
    """Levels as tensors go another way than levels as numbers."""
    x = (3 * torch.randn(2, 50)).to(dtype)
    specs = [QuantSpec(3, symmetric=True), QuantSpec(5, symmetric=True)]
    scales, zero = torch.tensor([[0.5], [0.1]]), torch.zeros(2, 1)
    ends = Levels(*(torch.tensor([[float(getattr(s, end))] for s in specs]) for end in ("qmin", "qmax")))
    upstream = torch.randn(2, 50).to(dtype)
    both_x, both_scale = x.clone().requires_grad_(), scales.clone().requires_grad_()
    fake_quantize(both_x, QParams(both_scale, zero), ends).backward(upstream)
    assert both_x.grad is not None
    assert both_scale.grad is not None
    assert both_x.grad.dtype == dtype
    for row, spec in enumerate(specs):
        one_x, one_scale = x[row : row + 1].clone().requires_grad_(), scales[row : row + 1].clone().requires_grad_()
        fake_quantize(one_x, QParams(one_scale, zero[:1]), spec).backward(upstream[row : row + 1])
        assert one_x.grad is not None
        assert one_scale.grad is not None
        assert torch.equal(both_x.grad[row : row + 1], one_x.grad)
        torch.testing.assert_close(both_scale.grad[row : row + 1], one_scale.grad)
        assert 0 < int((one_x.grad == 0).sum()) < 50


class Block(nn.Module):
    """Convolutions, a norm and a linear layer, as a residual block has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.time = nn.Linear(3, 6)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.first(torch.nn.functional.silu(self.norm(x))) + self.time(time)[:, :, None, None]
        found: Tensor = x + self.second(torch.nn.functional.silu(hidden))
        return found


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.block = Block()

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        found: Tensor = self.block(sample, torch.zeros(len(sample), 3))
        return found


UNIT = Unit("block", ("block.first", "block.second", "block.time"))


def block_job() -> tuple[Job, reconstruct._Cache, dict[str, SoftRounding], dict[str, Tensor]]:
    full_precision = Net().requires_grad_(False)
    denoiser = tiny.quantize_(copy.deepcopy(full_precision), scheme_for(3, None), ends="same")
    weights = {name: module.weight for name, module in full_precision.named_modules() if hasattr(module, "weight")}
    draw = torch.Generator().manual_seed(7)
    args = torch.randn(SAMPLES, 4, 5, 5, generator=draw), torch.randn(SAMPLES, 3, generator=draw)
    outputs = (full_precision.block(*args),)
    cache = reconstruct._Cache(args, {}, outputs, torch.zeros(SAMPLES, dtype=torch.int64))
    job = Job(None, full_precision, denoiser, Run(), 5)
    for name, layer in quantized_layers(denoiser).items():
        soften_(layer, weights[name], 0.0)  # type: ignore[arg-type]
    return job, cache, soft_roundings(quantized_layers(denoiser)), weights


def test_a_unit_is_fitted_as_by_the_straightforward_implementation(first: Any) -> None:
    job, cache, soft, weights = block_job()
    found = fit_unit(job, UNIT, cache, Fit(40, 4, 0.02, 2.0, 0.01, 0.2), soft=soft, stream=("t", 1))

    twin, same, _, _ = block_job()
    layers: dict[str, Any] = dict(quantized_layers(twin.denoiser))
    plain: dict[str, SoftRounding] = {}
    for name, layer in layers.items():
        plain[name] = layer.weight_quantizer = first.PlainRounding(layer.weight_quantizer.quantizer, weights[name])
    start = {name: one.alpha.detach().clone() for name, one in plain.items()}
    expected = first.fit(twin, UNIT, same, list(plain.values()), 40, 4, 0.02, ("t", 1))
    assert found["before"] == pytest.approx(expected["before"], rel=1e-4)
    assert found["after"] == pytest.approx(expected["after"], rel=1e-3)
    assert expected["after"] != pytest.approx(expected["before"], rel=0.05)
    assert list(soft) == list(plain)
    for name, one in soft.items():
        expected_alpha = plain[name].alpha.detach()
        moved = float((expected_alpha - start[name]).abs().max())
        assert moved > 0.1
        torch.testing.assert_close(one.alpha.detach(), expected_alpha, rtol=0, atol=moved / 100)
        assert torch.equal(one.rounded(weights[name]), plain[name].rounded(weights[name]))


@pytest.mark.parametrize("qdrop", [None, QDrop()])
def test_how_many_units_are_captured_together_changes_nothing(qdrop: QDrop | None) -> None:
    def rounded(together: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        pipe = DenoiserPipeline(tiny.TinyNet().eval(), DDIMScheduler(), (2, 4, 4))
        blocks = RoundBlocks(iterations=100, batch=4, lr=0.3, together=together, qdrop=qdrop)
        begin = (Record(8, 4), Select(), Place(2, 4), FitWeightRanges("minmax"), FitInputRanges("minmax"))
        return quantize(pipe, Recipe("test", (*begin, blocks)), steps=3).pipe.denoiser.state_dict()

    alone, together = rounded(1), rounded(2)
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[name], together[name]) for name in alone)
