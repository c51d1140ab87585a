from __future__ import annotations

import math

import pytest

from stepquant.errors import SpecError
from stepquant.evaluate.compare import METRICS
from stepquant.evaluate.gates import Gate, check_gates, parse_gates


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("psnr<28", Gate("psnr", "<", 28.0)),
        (" frechet_to_fp >= 2e-1 ", Gate("frechet_to_fp", ">=", 0.2)),
        ("kid_to_fp>-0.5", Gate("kid_to_fp", ">", -0.5)),
        ("ssim<=.9", Gate("ssim", "<=", 0.9)),
    ],
)
def test_what_is_understood(text: str, gate: Gate) -> None:
    assert parse_gates([text], METRICS) == (gate,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psnr", "A gate looks like psnr<28"),
        ("psnr=28", "A gate looks like psnr<28"),
        ("psnr<28dB", "'28dB' is not a number"),
        ("psnr<nan", "'nan' is not a number"),
        ("frechet_to_pf>2", "Did you mean 'frechet_to_fp'"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_gates(["ssim<1", text], METRICS)


@pytest.mark.parametrize(
    ("sign", "fails"), [("<", [True, False, False]), ("<=", [True, True, False]), (">", [False, False, True]),
                        (">=", [False, True, True])],
)  # fmt: skip
def test_a_gate_fails_where_it_is_true(sign: str, fails: list[bool]) -> None:
    gates = parse_gates([f"psnr{sign}28"], METRICS)
    found = [check_gates(gates, {"psnr": {"value": value}})[0]["failed"] for value in (27.0, 28.0, 29.0)]
    assert found == fails


def test_what_was_not_measured_fails() -> None:
    gates = parse_gates(["lpips>0.1", "psnr<28"], METRICS)
    assert check_gates(gates, {"psnr": {"value": math.nan}}) == [
        {"gate": "lpips>0.1", "value": None, "failed": True},
        {"gate": "psnr<28", "value": None, "failed": True},
    ]


@pytest.mark.parametrize("text", ["psnr<30.0001234", "frechet_to_fp>1234567", "kid_to_fp>1e-09", "psnr<28"])
def test_a_gate_is_named_by_the_bound_that_was_given(text: str) -> None:
    assert check_gates(parse_gates([text], METRICS), {})[0]["gate"] == text
