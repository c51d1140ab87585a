"""Inputs that a coverage-guided fuzzer found (scripts/fuzz.py), replayed: each ends well or in the right error."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "tests" / "hostile" / "corpus"


def fuzz_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "scripts" / "fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FUZZ = fuzz_script()


@pytest.mark.parametrize("target", list(FUZZ.TARGETS))
def test_replay(target: str, tmp_path: Path) -> None:
    inputs = sorted((CORPUS / target).iterdir())
    assert len(inputs) >= 10
    for path in inputs:
        began = time.process_time()
        FUZZ.TARGETS[target](path.read_bytes(), tmp_path)
        assert time.process_time() - began < 10, path


@pytest.mark.parametrize("target", list(FUZZ.TARGETS))
def test_the_real_input_is_not_refused(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the fuzzer would only ever see the first check."""

    class OtherError(Exception):
        pass

    monkeypatch.setattr("stepquant.errors.CheckpointError", OtherError)
    monkeypatch.setattr("stepquant.errors.SpecError", OtherError)
    FUZZ.TARGETS[target]((CORPUS / target / "real").read_bytes(), tmp_path)
