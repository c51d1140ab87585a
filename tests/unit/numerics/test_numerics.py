"""The arithmetic, against numbers worked out by hand and against torch's own fake-quantize."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import SpecError
from stepquant.numerics.affine import (
    QParams,
    choose_qparams,
    dequantize,
    fake_quantize,
    from_groups,
    grouped,
    quantize,
    range_of,
)
from stepquant.numerics.packing import pack, unpack
from stepquant.numerics.spec import LayerScheme, QuantSpec, parse_bits, scheme_for


def test_asymmetric_by_hand() -> None:
    # Range [-1, 2] at 2 bits: scale 3 / 3 = 1, zero point 1, levels 0 to 3.
    spec = QuantSpec(2)
    params = choose_qparams(torch.tensor([-1.0]), torch.tensor([2.0]), spec)
    assert (params.scale.item(), params.zero_point.item()) == (1.0, 1.0)
    x = torch.tensor([-5.0, -1.0, -0.5, 0.0, 0.5, 0.6, 1.5, 2.0, 9.0])
    levels = quantize(x, params, spec)
    assert levels.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 3]  # ties go to the even neighbour of x / scale
    assert dequantize(levels, params).tolist() == [-1, -1, 0, 0, 0, 1, 2, 2, 2]


def test_symmetric_by_hand() -> None:
    # Levels -4 to 3 at 3 bits. Range [-4, 6]: scale max(4 / 4, 6 / 3) = 2.
    spec = QuantSpec(3, symmetric=True)
    params = choose_qparams(torch.tensor([-4.0]), torch.tensor([6.0]), spec)
    assert (params.scale.item(), params.zero_point.item()) == (2.0, 0.0)
    assert quantize(torch.tensor([-9.0, -4.0, 1.0, 3.0, 6.0, 7.5]), params, spec).tolist() == [-4, -2, 0, 2, 3, 3]


def test_nonnegative_by_hand() -> None:
    spec = QuantSpec(8, nonnegative=True)
    params = choose_qparams(torch.tensor([0.0]), torch.tensor([0.51]), spec)
    assert params.scale.item() == pytest.approx(0.002)
    assert params.zero_point.item() == 0


def test_ranges_are_widened_to_contain_zero_and_never_collapse() -> None:
    params = choose_qparams(torch.tensor([3.0, 0.0]), torch.tensor([6.0, 0.0]), QuantSpec(2))
    assert params.scale[0].item() == 2.0
    assert params.zero_point.tolist() == [0.0, 0.0]
    assert fake_quantize(torch.zeros(2), params, QuantSpec(2)).tolist() == [0.0, 0.0]


def test_groups_by_hand() -> None:
    weight = torch.arange(12.0).reshape(2, 6)
    spec = QuantSpec(4, "group", group_size=3)
    assert grouped(weight, spec).shape == (2, 2, 3)
    low, high = range_of(weight, spec)
    assert low.flatten().tolist() == [0, 3, 6, 9]
    assert high.flatten().tolist() == [2, 5, 8, 11]
    assert torch.equal(from_groups(grouped(weight, spec), weight.shape), weight)
    assert grouped(weight, QuantSpec(4)).shape == (1, 12)
    with pytest.raises(SpecError, match="group_size 4 does not divide the 6 weights"):
        grouped(weight, QuantSpec(4, "group", group_size=4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_in_float32(dtype: torch.dtype) -> None:
    spec, params = QuantSpec(8), QParams(torch.tensor(0.013), torch.tensor(100.0))
    x = torch.randn(1000).to(dtype)
    assert torch.equal(quantize(x, params, spec), quantize(x.float(), params, spec))
    assert fake_quantize(x, params, spec).dtype == dtype


@pytest.mark.parametrize("spec", [QuantSpec(2), QuantSpec(4), QuantSpec(8), QuantSpec(8, symmetric=True)])
def test_torch_is_the_oracle_of_the_forward_pass(spec: QuantSpec) -> None:
    x = torch.randn(4096)
    params = choose_qparams(x.min() * 0.7, x.max() * 0.7, spec)
    ours = fake_quantize(x, params, spec)
    oracle = torch.fake_quantize_per_tensor_affine(
        x, params.scale.item(), int(params.zero_point.item()), spec.qmin, spec.qmax
    )
    # torch multiplies by 1 / scale where we divide: a tie in a million may fall to the other side.
    assert (torch.isclose(ours, oracle, atol=1e-6).float().mean()) > 0.999


@pytest.mark.parametrize("spec", [QuantSpec(2), QuantSpec(4), QuantSpec(8, symmetric=True)])
def test_gradients_follow_the_formula_and_torch(spec: QuantSpec) -> None:
    x = torch.randn(512, dtype=torch.float32)
    params = choose_qparams(x.min() * 0.6, x.max() * 0.6, spec)
    upstream = torch.randn(512)

    ours_x, ours_scale = x.clone().requires_grad_(), params.scale.clone().requires_grad_()
    fake_quantize(ours_x, QParams(ours_scale, params.zero_point), spec).backward(upstream)

    # The straight-through estimator written with autograd operations.
    plain_x, plain_scale = x.clone().requires_grad_(), params.scale.clone().requires_grad_()
    ratio = plain_x / plain_scale
    rounded = ratio + (ratio.round() - ratio).detach()
    levels = (rounded + params.zero_point).clamp(spec.qmin, spec.qmax)
    ((levels - params.zero_point) * plain_scale).backward(upstream)
    torch.testing.assert_close(ours_x.grad, plain_x.grad)
    torch.testing.assert_close(ours_scale.grad, plain_scale.grad, rtol=1e-4, atol=1e-4)

    oracle_x, oracle_scale = x.clone().requires_grad_(), params.scale.reshape(1).clone().requires_grad_()
    zero_point = params.zero_point.reshape(1).clone()
    torch._fake_quantize_learnable_per_tensor_affine(
        oracle_x, oracle_scale, zero_point, spec.qmin, spec.qmax, 1.0
    ).backward(upstream)
    torch.testing.assert_close(ours_x.grad, oracle_x.grad)
    assert oracle_scale.grad is not None
    torch.testing.assert_close(ours_scale.grad, oracle_scale.grad.reshape(()), rtol=1e-3, atol=1e-3)


def test_scale_gradients_have_the_scale_shape_per_channel() -> None:
    spec = QuantSpec(4, "channel")
    x = torch.randn(3, 7, requires_grad=True)
    params = choose_qparams(*range_of(x.detach(), spec), spec)
    scale = params.scale.clone().requires_grad_()
    fake_quantize(x, QParams(scale, params.zero_point), spec).square().sum().backward()
    assert scale.grad is not None
    assert scale.grad.shape == (3, 1)
    one = params.scale[1:2].clone().requires_grad_()
    fake_quantize(x[1:2].detach(), QParams(one, params.zero_point[1:2]), spec).square().sum().backward()
    torch.testing.assert_close(scale.grad[1:2], one.grad)


def test_packing_by_hand() -> None:
    # Three bits, levels 1, 2, 3: 001 at bit 0, 010 at bit 3, 011 at bit 6 -> 0b11010001, 0b0.
    assert pack(torch.tensor([1, 2, 3]), 3).tolist() == [0b11010001, 0]
    assert pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([3, 0, 1, 2, 3]), 2).tolist() == [0b10010011, 0b11]
    assert pack(torch.tensor([255, 7]), 8).tolist() == [255, 7]
    # Five bits, levels 31, 1: 11111 at bit 0, 00001 at bit 5 -> 0b00111111, 0b0.
    assert pack(torch.tensor([31, 1]), 5).tolist() == [0b00111111, 0]
    assert pack(torch.empty(0), 4).tolist() == []


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(SpecError, match="from -1 to 3 do not fit into 2"):
        pack(torch.tensor([-1, 3]), 2)
    with pytest.raises(SpecError, match="3 levels of 4 bits take 2 bytes of uint8, found 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, 3)
    with pytest.raises(SpecError, match=r"found 2 of torch\.int32"):
        unpack(torch.zeros(2, dtype=torch.int32), 4, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "from 2 to 8, found 1"),
        ({"bits": 9}, "from 2 to 8, found 9"),
        ({"bits": True}, "found True"),
        ({"bits": 4.0}, "found 4.0"),
        ({"bits": 4, "granularity": "row"}, "found 'row'"),
        ({"bits": 4, "granularity": "group"}, "group_size goes with"),
        ({"bits": 4, "group_size": 8}, "group_size goes with"),
        ({"bits": 4, "granularity": "group", "group_size": 0}, "at least 1"),
        ({"bits": 4, "symmetric": True, "nonnegative": True}, "wastes half"),
        ({"bits": 4, "granularity": "token"}, "needs dynamic=True"),
    ],
)
def test_specs_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        QuantSpec(**settings)  # type: ignore[arg-type]


def test_bit_settings() -> None:
    assert parse_bits("W4A8") == (4, 8)
    assert parse_bits(" w4a32 ") == (4, None)
    assert parse_bits("W16A16") == (None, None)
    with pytest.raises(SpecError, match="looks like 'W4A8'"):
        parse_bits("4/8")
    assert scheme_for(4, None) == LayerScheme(weight=QuantSpec(4, "channel"))
    assert not scheme_for(None, None).quantizes
    assert (QuantSpec(4).qmin, QuantSpec(4).qmax) == (0, 15)
    assert (QuantSpec(4, symmetric=True).qmin, QuantSpec(4, symmetric=True).qmax) == (-8, 7)
