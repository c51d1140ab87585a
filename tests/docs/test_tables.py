"""Tables of the documentation are what the benchmarks make of the rows that are committed beside them."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are in the repository only")


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["digits-unet", "faces64"])
def test_results(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`results.py table` and `results.py pages` have nothing to change."""
    results = benchmark("results", monkeypatch)
    docs = shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("figures", "*.png"))
    given = argparse.Namespace(
        json=BENCHMARKS / "results.jsonl", model=model, into=docs / "results.md", folder=docs / "methods"
    )
    results.table(given)
    results.pages(given)
    stale = [
        str(page.relative_to(docs)) for page in docs.rglob("*.md") if page.read_text() != of_repository(page, docs)
    ]
    assert not stale


def test_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = benchmark("engines", monkeypatch)
    page = Path(shutil.copy(ROOT / "docs" / "performance.md", tmp_path))
    engines.write_table(BENCHMARKS / "engines.jsonl", page)
    assert page.read_text() == (ROOT / "docs" / "performance.md").read_text()


def test_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedules = benchmark("schedules", monkeypatch)
    page = Path(shutil.copy(ROOT / "docs" / "results.md", tmp_path))
    schedules.table(argparse.Namespace(json=BENCHMARKS / "schedules.jsonl", into=page))
    assert page.read_text() == (ROOT / "docs" / "results.md").read_text()


def test_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = benchmark("bits", monkeypatch)
    page = Path(shutil.copy(ROOT / "docs" / "bits.md", tmp_path))
    bits.table(argparse.Namespace(json=BENCHMARKS / "bits.jsonl", into=page, marker="table"))
    bits.table(argparse.Namespace(json=BENCHMARKS / "bits-time.jsonl", into=page, marker="table time"))
    bits.table(argparse.Namespace(json=BENCHMARKS / "bits-faces64.jsonl", into=page, marker="table faces64"))
    assert page.read_text() == (ROOT / "docs" / "bits.md").read_text()


def of_repository(page: Path, docs: Path) -> str:
    return (ROOT / "docs" / page.relative_to(docs)).read_text()
