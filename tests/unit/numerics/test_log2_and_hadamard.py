"""Levels at powers of two, and rotations of channels."""

from __future__ import annotations

import math

import pytest
import torch

from stepquant.errors import SpecError
from stepquant.numerics.hadamard import block_size, check_block, rotated
from stepquant.numerics.log2 import dequantize_log2, fake_quantize_log2, quantize_log2
from stepquant.numerics.spec import QuantSpec

FOUR = QuantSpec(4, nonnegative=True, logarithmic=True)


def test_log2_levels_by_hand() -> None:
    spec, scale = QuantSpec(2, nonnegative=True, logarithmic=True), torch.tensor([0.5])
    # The borders are at 0.5 * 2^-0.5, 2^-1.5, 2^-2.5: 0.354, 0.177, 0.088; what is below the last is 0.
    x = torch.tensor([2.0, 0.5, 0.36, 0.35, 0.18, 0.17, 0.09, 0.08, 0.0])
    assert quantize_log2(x, scale, spec).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    expected = [0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0, 0.0]
    assert fake_quantize_log2(x, scale, spec).tolist() == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_log2_level_is_a_power_of_two_and_a_fixed_point(bits: int) -> None:
    spec = QuantSpec(bits, nonnegative=True, logarithmic=True)
    scale, levels = torch.tensor([1.5]), torch.arange(2.0**bits)
    values = dequantize_log2(levels, scale, spec)
    exact = [1.5 * 2.0**-q for q in range(2**bits - 1)] + [0.0]
    # What float32 cannot hold is 0.
    assert (
        values.tolist()
        == torch.tensor(exact, dtype=torch.float64)
        .where(torch.tensor(exact, dtype=torch.float64) > 2**-126, values.double())
        .tolist()
    )
    assert torch.equal(fake_quantize_log2(values, scale, spec), values)


def test_log2_takes_the_nearest_exponent() -> None:
    x = torch.rand(1000, dtype=torch.float64)
    found = fake_quantize_log2(x, torch.ones(1), FOUR)
    candidates = torch.tensor([2.0**-q for q in range(15)], dtype=torch.float64)
    distance = (x[:, None].log2() - candidates.log2()).abs()
    nearest = candidates[distance.argmin(1)]
    assert torch.equal(found, torch.where(x.log2() < -14.5, torch.zeros_like(x), nearest))


def test_the_gradient_of_log2_passes_inside_and_stops_outside() -> None:
    x = torch.tensor([3.0, 1.2, 0.4, 2.0**-15.6, 0.0], requires_grad=True)
    fake_quantize_log2(x, torch.ones(1), FOUR).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0, 0]
    half = fake_quantize_log2(torch.tensor([0.3], dtype=torch.float16), torch.ones(1), FOUR)
    assert (half.dtype, half.item()) == (torch.float16, 0.25)


@pytest.mark.parametrize(
    "options",
    [{}, {"nonnegative": True, "dynamic": True}, {"nonnegative": True, "granularity": "channel"}],
)
def test_only_nonnegative_static_tensors_have_log2_levels(options: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="Levels at powers of two are for static tensors"):
        QuantSpec(4, logarithmic=True, **options)  # type: ignore[arg-type]


def test_blocks_of_widths_that_are_no_power_of_two() -> None:
    assert [block_size(width) for width in (1, 7, 12, 64, 320, 1152)] == [1, 1, 4, 64, 64, 128]
    check_block(12, 4)
    check_block(12, 2)
    for size in (1, 0, -2, 3, 6, 8):
        with pytest.raises(SpecError, match=rf"divides the 12 channels \(2 to 4\), found {size}"):
            check_block(12, size)


@pytest.mark.parametrize(("channels", "size"), [(2, 2), (12, 4), (16, 16), (24, 2)])
def test_rotation_is_a_product_with_hadamard_blocks(channels: int, size: int) -> None:
    # H[i, j] = (-1)^(number of ones of i & j): the closed form of Sylvester's matrices.
    hadamard = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])
    matrix = torch.block_diag(*[hadamard.double() / math.sqrt(size)] * (channels // size))
    x = torch.randn(3, 5, channels, dtype=torch.float64)
    torch.testing.assert_close(rotated(x, size), x @ matrix)
    torch.testing.assert_close(rotated(rotated(x, size), size), x)  # its own inverse
    torch.testing.assert_close(rotated(x, size).norm(dim=-1), x.norm(dim=-1))
