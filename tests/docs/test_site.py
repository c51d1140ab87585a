"""The site builds without a warning, and what its pages point to in the repository is there."""

from __future__ import annotations

import ast
import json
import logging
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from doc_blocks import ROOT

DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"
FAQ = (DOCS / "faq.md").read_text(encoding="utf-8")


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_the_site_builds_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("material", reason="the site needs mkdocs-material: pip install stepquant[docs]")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mkdocs")
    logger.addHandler(handler)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    finally:
        logger.removeHandler(handler)
    assert warnings == []
    home = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "demo.png" in home
    assert (tmp_path / "demo.png").is_file()
    for page in DOCS.rglob("*.md"):
        place = page.relative_to(DOCS).with_suffix("")
        built = place.parent if place.name in ("index", "README") else place
        assert (tmp_path / built / "index.html").is_file(), page
    fetched = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', home)
    assert fetched == [], "a reader's browser would load these from elsewhere"


def test_every_page_is_in_the_navigation_or_in_the_table_of_methods() -> None:
    listed = set(_strings(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    table = re.findall(r"\]\((\w+\.md)\)", (DOCS / "methods" / "README.md").read_text(encoding="utf-8"))
    listed |= {f"methods/{name}" for name in table}
    found = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert found - listed == set()


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [text for part in parts for text in _strings(part)]


def answers() -> list[tuple[str, str]]:
    """Question and answer."""
    parts = re.split(r"^### (.+)$", FAQ, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def test_the_ten_most_frequent_questions_come_first() -> None:
    first = FAQ.split("## The ten most frequent\n")[1].split("\n## ")[0]
    assert len(re.findall(r"^### ", first, re.MULTILINE)) == 10
    assert len(answers()) >= 25


@pytest.mark.parametrize(("question", "answer"), answers(), ids=[question for question, _ in answers()])
def test_an_answer_names_its_proof_and_the_proof_is_there(question: str, answer: str) -> None:
    _, shown, rest = answer.partition("Shown by: ")
    assert shown, f"{question} has no proof"
    proofs = re.findall(r"`([^`]+)`", rest.partition("**Not yet:**")[0].partition("\n## ")[0])
    assert proofs
    for proof in proofs:
        path, _, function = proof.partition("::")
        if proof.startswith("python "):
            path = proof.split()[1]
        assert (ROOT / path).is_file(), proof
        if function:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, proof


def curves_of(svg: str) -> list[list[float]]:
    """Coordinates of every drawn line of at least five points."""
    lines = [re.findall(r"-?[\d.]+", path) for path in re.findall(r'<path d="(M [^"]+)"', svg)]
    return [[float(number) for number in line] for line in lines if len(line) >= 10]


def test_figures_are_drawn_from_what_was_measured(tmp_path: Path) -> None:
    """Every figure that a page shows comes out of the script, with the numbers of measured.json in it."""
    script = runpy.run_path(str(FIGURES / "make.py"))
    script["main"](["draw", "--into", str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in FIGURES.glob("*.svg")}
    shown = re.findall(r"!\[[^\]]+\]\(figures/(\w+\.svg)\)", (DOCS / "how_it_works.md").read_text(encoding="utf-8"))
    assert set(shown) == drawn
    measured = json.loads((FIGURES / "measured.json").read_text(encoding="utf-8"))
    for name in drawn:
        text = (FIGURES / name).read_text(encoding="utf-8")
        assert len(text) < 50_000
        committed, fresh = curves_of(text), curves_of((tmp_path / name).read_text(encoding="utf-8"))
        assert [len(curve) for curve in committed] == [len(curve) for curve in fresh]
        for one, other in zip(committed, fresh, strict=True):
            # In points of a figure 500 wide: fonts of another version of matplotlib move the axes a little.
            assert one == pytest.approx(other, abs=5), f"{name} is not what make.py draws: draw it again"
        assert ("Schematic" in text) != (measured["model"] in text), f"{name} says neither or both"


def test_measured_curves_keep_the_definitions_of_drift() -> None:
    measured = json.loads((FIGURES / "measured.json").read_text(encoding="utf-8"))
    for side in ("drift", "corrected"):
        curves = measured[side]
        assert {len(curves[name]) for name in ("one_step", "accumulated", "coherent", "incoherent")} == {
            measured["steps"]
        }
        total, squares = 0.0, 0.0
        for error, coherent, incoherent in zip(
            curves["one_step"], curves["coherent"], curves["incoherent"], strict=True
        ):
            total, squares = total + error, squares + error**2
            assert coherent == pytest.approx(total, rel=1e-2)
            # A mean over images of roots, not a root of means: near, and not above it.
            assert incoherent == pytest.approx(squares**0.5, rel=0.1)
    assert len(measured["largest_inputs"]) == 3


def test_the_script_measures_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler

    import tiny

    DDIMPipeline(tiny.tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "model")
    script = runpy.run_path(str(FIGURES / "make.py"))
    found = tmp_path / "measured.json"
    few = ["--steps", "2", "--images", "2", "--samples", "3", "--json", str(found)]
    script["main"](["measure", "--model", str(tmp_path / "model"), *few])
    script["main"](["draw", "--json", str(found), "--into", str(tmp_path / "drawn")])
    old = json.loads((FIGURES / "measured.json").read_text(encoding="utf-8"))
    assert json.loads(found.read_text(encoding="utf-8")).keys() == old.keys()
    assert len(list((tmp_path / "drawn").glob("*.svg"))) == len(list(FIGURES.glob("*.svg")))
