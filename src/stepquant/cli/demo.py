"""The demo: the shipped model at W4A8, AccuQuant beside round-to-nearest, from nothing to a report.

Every part leaves a file or folder, and a part whose output is there already is not done again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepquant.cli import work
from stepquant.cli.console import Settings, duration, stdout_console
from stepquant.cli.evaluate import evaluate_and_keep
from stepquant.cli.outputs import clear_work, read_evaluation, speed_path, work_folder
from stepquant.cli.report import keep_speed, write_page
from stepquant.cli.views import show_results
from stepquant.config import resolve

__all__ = ["run"]

_MODEL = "digits-unet"
_STEPS = 20
_EVALUATED = list(range(1000, 1128))


@dataclass(frozen=True)
class _Candidate:
    """One checkpoint of the demo. settings: as in `run.yaml`."""

    folder: str
    label: str
    settings: Mapping[str, Any]


_CANDIDATES = (
    _Candidate("rtn-w4a8", "round to nearest", {"method": "rtn", "preset": "quick"}),
    _Candidate("accuquant-w4a8", "AccuQuant", {"method": "accuquant", "preset": "quick"}),
)


def run(folder: Path, settings: Settings) -> None:
    """Do what is not done yet, and say where everything is."""
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    kept = [candidate.folder for candidate in _CANDIDATES if (folder / candidate.folder).exists()]
    for candidate in _CANDIDATES:
        _quantize(folder / candidate.folder, candidate, settings)
    checkpoints = [folder / candidate.folder for candidate in _CANDIDATES]
    results = [_evaluated(checkpoint, settings) for checkpoint in checkpoints]
    _pages(folder, checkpoints, results, settings)
    if settings.quiet:
        return
    for result in results:
        show_results(result)
    console = stdout_console()
    console.print(f"Done in {duration(time.monotonic() - started)}.")
    if kept:
        console.print(f"{' and '.join(kept)} had been made before; remove {folder} to begin anew.")
    console.print(f"  report       {folder / 'report.html'}")
    console.print(f"  picture      {folder / 'demo.png'}")
    console.print(f"  images       {folder / 'samples'}")
    for checkpoint in checkpoints:
        console.print(f"  checkpoint   {checkpoint}")


def _quantize(out: Path, candidate: _Candidate, settings: Settings) -> None:
    if out.exists():
        return
    resume = work_folder(out).is_dir()
    clear_work(work_folder(out), resume=resume, overwrite=False)
    data = {"model": _MODEL, "weights": 4, "activations": 8, "steps": _STEPS, **candidate.settings}
    work.run_quantize(resolve(data, source="demo"), out, settings, resume=resume)


def _evaluated(checkpoint: Path, settings: Settings) -> dict[str, Any]:
    found = read_evaluation(checkpoint)
    if found is not None:
        return found
    return evaluate_and_keep(checkpoint, work.Sampling(_EVALUATED, steps=_STEPS, engine="simulated"), settings)


def _pages(folder: Path, checkpoints: list[Path], results: list[dict[str, Any]], settings: Settings) -> None:
    """Report, picture and sample images; made together, because they show the same images."""
    from stepquant.report.figures import comparison_picture

    picture = folder / "demo.png"
    names = ["full-precision", *(candidate.folder for candidate in _CANDIDATES)]
    made = [folder / "report.html", *(folder / "samples" / name / "grid.png" for name in names), picture]
    if all(path.exists() for path in made):
        return
    if not speed_path(checkpoints[-1]).exists():  # the others have the same layers
        keep_speed(checkpoints[-1], results[-1], settings, "auto")
    images = write_page(checkpoints, results, folder / "report.html", settings, ("auto", 16))
    rows = {"full precision": images["reference"]}
    rows |= {entry.label: found for entry, found in zip(_CANDIDATES, images["candidates"], strict=True)}
    for name, found in zip(names, rows.values(), strict=True):
        work.write_images(found, images["seeds"], folder / "samples" / name, grid=True)
    picture.write_bytes(comparison_picture(rows, images["seeds"]))
