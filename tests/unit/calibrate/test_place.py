"""Bits of the softmax output, and what they do to a plan."""

from __future__ import annotations

import pytest

import tiny
from stepquant.calibrate.stages import Place
from stepquant.errors import SpecError
from stepquant.numerics.spec import LayerScheme


def softmaxes(**settings: int | None) -> list[LayerScheme]:
    plan = Place(**settings).plan(tiny.tiny_unet())  # type: ignore[arg-type]
    found = [scheme for name, scheme in plan.items() if name.endswith("values")]
    assert len(found) == 4
    return found


@pytest.mark.parametrize(("bits", "expected"), [(8, 8), (6, 6), (2, 4), (None, 4)])
def test_the_softmax_output_has_bits_of_its_own(bits: int | None, expected: int) -> None:
    for scheme in softmaxes(activations=4, softmax_bits=bits):
        assert scheme.input is not None
        assert scheme.second is not None
        assert (scheme.input.bits, scheme.second.bits) == (expected, 4)
        assert scheme.input.nonnegative


def test_sixteen_bits_leave_only_the_softmax_output_in_floating_point() -> None:
    for scheme in softmaxes(activations=4, softmax_bits=16):
        assert scheme.input is None
        assert scheme.second is not None
        assert scheme.second.bits == 4
    for scheme in softmaxes(activations=8, weights=4, softmax_bits=16):
        assert scheme.input is None
    plan = Place(activations=None, softmax_bits=16).plan(tiny.tiny_unet())
    assert not any(name.endswith(("values", "scores")) for name in plan)


def test_other_bits_of_the_softmax_output_are_refused() -> None:
    for bits in (1, 9, 12, 32):
        with pytest.raises(SpecError, match=f"from 2 to 8, or null, found {bits} .16 leaves"):
            Place(softmax_bits=bits)
