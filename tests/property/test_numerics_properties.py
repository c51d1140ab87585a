"""What must hold for every tensor and every spec."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepquant.numerics.affine import QParams, choose_qparams, fake_quantize, quantize
from stepquant.numerics.packing import pack, packed_bytes, unpack
from stepquant.numerics.spec import QuantSpec

numbers = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
specs = st.builds(
    lambda bits, kind: QuantSpec(bits, symmetric=kind == "symmetric", nonnegative=kind == "nonnegative"),
    st.integers(2, 8),
    st.sampled_from(["asymmetric", "symmetric", "nonnegative"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=40), specs)
def test_error_is_at_most_half_a_step_in_range(values: list[float], spec: QuantSpec) -> None:
    x = torch.tensor(values)
    x = x.abs() if spec.nonnegative else x
    params = choose_qparams(x.min(), x.max(), spec)
    error = (fake_quantize(x, params, spec) - x).abs()
    # Rounding the zero point moves the range by up to half a step, so an end of it may be clamped by that much more.
    allowed = params.scale * (0.5 if spec.symmetric or spec.nonnegative else 1.0)
    inside = quantize(x, params, spec)
    interior = (inside > spec.qmin) & (inside < spec.qmax)
    slack = 1e-5 * x.abs().max() + 1e-7
    assert bool((error <= allowed + slack).all())
    assert bool((error[interior] <= params.scale / 2 + slack).all())


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=40), st.floats(2**-10, 100, width=32), specs, st.data())
def test_idempotent_and_zero_is_exact(values: list[float], scale: float, spec: QuantSpec, data: st.DataObject) -> None:
    zero_point = data.draw(st.integers(spec.qmin, spec.qmax))
    params = QParams(torch.tensor(scale), torch.tensor(float(zero_point)))
    once = fake_quantize(torch.tensor(values), params, spec)
    assert torch.equal(fake_quantize(once, params, spec), once)
    assert fake_quantize(torch.zeros(1), params, spec).item() == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.data())
def test_unpack_undoes_pack(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    levels = torch.tensor(values, dtype=torch.int64)
    packed = pack(levels, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(len(values), bits)
    assert unpack(packed, bits, len(values)).tolist() == values
    # The stream is one little-endian number, lowest level first.
    wanted = sum(level << (bits * place) for place, level in enumerate(values))
    assert int.from_bytes(bytes(packed.tolist()), "little") == wanted
