"""How activation scales learn: what the gradient of a scale says, and that blocks end nearer by following it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from stepquant.calibrate import reconstruct
from stepquant.calibrate.reconstruct import Fit, ScaleBlocks, fit_unit
from stepquant.calibrate.rounding import DIFFERENCE, fix_scales_, input_scales, relative_groups
from stepquant.calibrate.window_fitting import FitWindows
from stepquant.errors import SpecError
from stepquant.methods import METHODS
from stepquant.model.surgery import Unit, quantized_layers
from stepquant.numerics.affine import Levels, QParams, choose_qparams, fake_quantize
from stepquant.numerics.spec import QuantSpec, scheme_for
from stepquant.recipe import Job
from stepquant.run import Run

SPEC = QuantSpec(8)


def of_silu() -> tuple[Tensor, QParams]:
    """Values of which many lie at the least that SiLU gives, a little below the lowest level."""
    x = F.silu(1.5 * torch.randn(200_000, generator=torch.Generator().manual_seed(0)) - 1)
    return x, choose_qparams(torch.tensor([-0.2785]), torch.tensor([8.1]), SPEC)


def error(x: Tensor, params: QParams, difference: float = 0.0) -> Tensor:
    return (fake_quantize(x, params, SPEC, difference=difference) - x).square().mean()


def gradient(x: Tensor, params: QParams, difference: float) -> float:
    scale = params.scale.clone().requires_grad_()
    error(x, QParams(scale, params.zero_point), difference).backward()
    assert scale.grad is not None
    return float(scale.grad)


def test_the_difference_is_the_slope_and_straight_through_is_not() -> None:
    x, params = of_silu()

    def slope(share: float) -> float:
        above, below = (error(x, QParams(params.scale * (1 + s), params.zero_point)) for s in (share, -share))
        return float((above - below) / (2 * share * params.scale))

    # To a fifth: values that cross a border between levels count with the error that they have now.
    assert slope(DIFFERENCE) < -0.01
    assert gradient(x, params, DIFFERENCE) == pytest.approx(slope(DIFFERENCE), rel=0.2)
    straight = gradient(x, params, 0.0)
    # Inside the range it is always 2 error^2 / scale: smaller scales are better.
    assert straight > 0.005


def test_even_values_have_the_same_gradient_either_way() -> None:
    x = 8 * torch.rand(200_000, generator=torch.Generator().manual_seed(1))
    params = choose_qparams(torch.tensor([0.0]), torch.tensor([7.0]), SPEC)  # some are clipped
    assert gradient(x, params, DIFFERENCE) == pytest.approx(gradient(x, params, 0.0), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_channel_and_row_has_its_own_difference(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(2, 50, generator=torch.Generator().manual_seed(2))).to(dtype)
    specs = [QuantSpec(3, symmetric=True), QuantSpec(5, symmetric=True)]
    scales, zero = torch.tensor([[0.5], [0.1]]), torch.zeros(2, 1)
    ends = Levels(*(torch.tensor([[float(getattr(s, end))] for s in specs]) for end in ("qmin", "qmax")))
    both, given = scales.clone().requires_grad_(), x.clone().requires_grad_()
    fake_quantize(given, QParams(both, zero), ends, difference=0.05).sum().backward()
    assert both.grad is not None
    assert given.grad is not None
    assert given.grad.dtype == dtype
    for row, spec in enumerate(specs):
        above, below = (
            fake_quantize(x[row].float(), QParams(scales[row] * (1 + s), zero[row]), spec).double().sum()
            for s in (0.05, -0.05)
        )
        assert float(both.grad[row]) == pytest.approx(float((above - below) / (0.1 * scales[row])), rel=1e-3)


class Block(nn.Module):
    """SiLU before a convolution, as every residual block has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(F.silu(x))
        return found


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.block = Block()

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        found: Tensor = self.block(sample)
        return found


@pytest.mark.parametrize("seed", range(3))
def test_a_block_ends_nearer_by_differences(seed: int) -> None:
    full_precision = Net().requires_grad_(False)
    x = 1.5 * torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) - 1

    def fitted(**choice: Any) -> dict[str, float]:
        denoiser = tiny.quantize_(copy.deepcopy(full_precision), scheme_for(8, 8), ends="same")
        (layer,) = quantized_layers(denoiser).values()
        quantizer: Any = layer.input_quantizer
        quantizer.scale.fill_(float(of_silu()[1].scale))
        quantizer.zero_point.fill_(float(of_silu()[1].zero_point))
        quantizer.row_of_bin.zero_()
        cache = reconstruct._Cache((x,), {}, (full_precision.block(x),), torch.zeros(16, dtype=torch.int64))
        fit, scales = Fit(100, 16, 5e-3, 2.4, **choice), input_scales(quantized_layers(denoiser))
        job = Job(None, full_precision, denoiser, Run(), 5)
        found = fit_unit(job, Unit("block", ("block.conv",)), cache, fit, scales=scales, stream=("t", 1))
        assert not quantizer.scale.requires_grad
        assert "difference" not in vars(quantizer)
        return found

    found, straight = (fitted(scale_gradient=choice) for choice in ("difference", "straight"))
    assert found["after"] < 0.9 * found["before"]
    assert found["after"] < 0.9 * straight["after"]


def test_scales_learn_until_they_are_fixed() -> None:
    denoiser = tiny.quantize_(tiny.small_unet())
    scales = input_scales(quantized_layers(denoiser))
    relative_groups(scales, 0.1, "difference")
    assert {quantizer.difference for quantizer in scales.values()} == {DIFFERENCE}
    relative_groups(scales, 0.1, "straight")
    assert {quantizer.difference for quantizer in scales.values()} == {0.0}
    fix_scales_(scales)
    for quantizer in scales.values():
        assert not quantizer.scale.requires_grad
        assert "difference" not in vars(quantizer)


def test_the_gradient_is_a_setting() -> None:
    for stage in (ScaleBlocks, FitWindows):
        wrong: Any = "strait"
        with pytest.raises(SpecError, match=rf"scale_gradient of {stage.__name__}.*'strait'.*Did you mean 'straight'"):
            stage(scale_gradient=wrong)
    options = {"accuquant": {"scale_iterations": 3}, "combined": {"scale_iterations": 3}, "q_diffusion": {}}
    for name, more in options.items():
        recipe = METHODS[name](scale_gradient="straight", **more)
        learning = [stage for stage in recipe.stages if isinstance(stage, ScaleBlocks | FitWindows)]
        assert learning
        assert {stage.scale_gradient for stage in learning} == {"straight"}
