"""The cross-schedule study: calibrated at 20 steps of DDIM, sampled with other steps and solvers.

    python benchmarks/schedules.py run [--work runs/schedules] [--bits W6A6] [--images 64] [--methods "rtn;..."]
    python benchmarks/schedules.py table --into docs/results.md

What a method may keep about time: nothing (`rtn`; `layerwise, one row`), a row of ranges for every step (`layerwise`,
`combined`), rows of groups of timesteps (`adp_dm`), corrections of steps (`layerwise+cec`). Each is calibrated once and
then sampled everywhere with `load(..., schedule="nearest")`, which lets a timestep use what belongs to the nearest
calibrated one; `(off)` is the same checkpoint without its corrections. Every figure is against the full-precision model
with the same solver, steps and seeds.

Lines are kept in `benchmarks/schedules.jsonl`, part of the repository, and checkpoints in the work folder: a killed run
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from stepquant.allocator import tune_allocator
from stepquant.api import load, open_model, quantize, sample
from stepquant.config import resolve
from stepquant.evaluate.features import DigitFeatures, weights_identity
from stepquant.evaluate.frechet import FeatureStatistics, frechet_distance
from stepquant.evaluate.paired import PairedMetrics
from stepquant.model.correction import CorrectedScheduler, correction_of
from stepquant.model.families import find_denoiser
from stepquant.run import Run

CALIBRATED_STEPS = 20
EVALUATION_SEED = 1000

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "rtn, a row per step": ("rtn", {"rows": "step"}),
    "layerwise, one row": ("layerwise", {"rows": "shared"}),
    "layerwise": ("layerwise", {}),
    "layerwise+cec": ("layerwise+cec", {}),
    "adp_dm": ("adp_dm", {}),
    "combined": ("combined", {}),
}

Schedule = tuple[str, int, float]
SCHEDULES: tuple[Schedule, ...] = (
    *(("DDIM", steps, 0.0) for steps in (10, 20, 50)),
    *(("DPM-Solver++", steps, 0.0) for steps in (10, 20, 50)),
    ("DDIM", 20, 1.0),
)


def scheduler_of(schedule: Schedule, pipe: Any) -> Any:
    """A scheduler of this kind with the noise schedule of the pipeline's own."""
    kind, _, eta = schedule
    config = {
        key: pipe.scheduler.config[key] for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    }
    if kind == "DPM-Solver++":
        return DPMSolverMultistepScheduler(**config, timestep_spacing="trailing", final_sigmas_type="zero")
    scheduler = DDIMScheduler(**config, clip_sample=False, timestep_spacing="trailing")
    if eta:  # most pipelines have no argument of this name
        scheduler.step = functools.partial(scheduler.step, eta=eta)
    return scheduler


def images_of(pipe: Any, schedule: Schedule, seeds: list[int]) -> torch.Tensor:
    pipe.scheduler = scheduler_of(schedule, pipe)
    return sample(pipe, seeds=seeds, steps=schedule[1], batch_size=32)


def candidates(
    args: argparse.Namespace, name: str
) -> Iterator[tuple[str, Callable[[Schedule, list[int]], torch.Tensor]]]:
    """The checkpoint of a method, with its corrections and, if it has any, without."""
    folder = args.work / f"{args.bits}-{name}".replace(", ", "-").replace(" ", "-")
    if not folder.exists():
        method, options = METHODS[name]
        settings = {"model": args.model, "method": method, "preset": args.preset, "options": options}
        weights, activations = (int(part) for part in args.bits[1:].split("A"))
        resolved = resolve(settings | {"weights": weights, "activations": activations, "steps": CALIBRATED_STEPS})
        quantize(
            open_model(args.model), resolved.recipe, steps=CALIBRATED_STEPS, run=Run(), base_model=args.model
        ).save(folder)
    pipe = load(folder, engine="simulated", schedule="nearest")
    correction = correction_of(pipe.scheduler)
    if correction is None:
        yield name, lambda schedule, seeds: images_of(pipe, schedule, seeds)
        return

    def corrected(schedule: Schedule, seeds: list[int]) -> torch.Tensor:
        pipe.scheduler = CorrectedScheduler(scheduler_of(schedule, pipe), correction)
        return sample(pipe, seeds=seeds, steps=schedule[1], batch_size=32)

    yield name, corrected
    yield f"{name} (off)", lambda schedule, seeds: images_of(pipe, schedule, seeds)


def run(args: argparse.Namespace) -> None:
    tune_allocator()
    args.work.mkdir(parents=True, exist_ok=True)
    reference, features = open_model(args.model), DigitFeatures()
    weights = weights_identity(find_denoiser(reference)[1])[:12]
    seeds = list(range(EVALUATION_SEED, EVALUATION_SEED + args.images))
    wanted: dict[Schedule, torch.Tensor] = {}
    for method in args.methods.split(";"):
        for name, images in candidates(args, method):
            for schedule in SCHEDULES:
                key = [name, *schedule, args.bits, weights, args.images]
                if any(row["key"] == key for row in rows_of(args.json)):
                    continue
                if schedule not in wanted:
                    wanted[schedule] = images_of(reference, schedule, seeds)
                found = images(schedule, seeds)
                paired = PairedMetrics()
                paired.update(found, wanted[schedule])
                row = {
                    "key": key,
                    "name": name,
                    "schedule": schedule,
                    "bits": args.bits,
                    "model": args.model,
                    "weights": weights,
                    "n": args.images,
                    "preset": args.preset,
                    "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
                    "torch": torch.__version__,
                    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                    "psnr": paired.result().psnr.mean,
                    "frechet_to_fp": frechet_distance(
                        statistics_of(features, found), statistics_of(features, wanted[schedule])
                    ),
                }
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(name, schedule, round(row["psnr"], 2), round(row["frechet_to_fp"], 1), flush=True)


def statistics_of(features: DigitFeatures, images: torch.Tensor) -> FeatureStatistics:
    found = FeatureStatistics(features.dim)
    found.update(features(images))
    return found


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(args: argparse.Namespace) -> None:
    """PSNR and Fréchet distance, methods by schedules, as Markdown between the markers of a page."""
    rows = rows_of(args.json)
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in ("weights", "bits", "n", "preset"))]
    by_place = {(row["name"], tuple(row["schedule"])): row for row in rows}
    titles = [f"{kind} {steps}" + (f", eta {eta:g}" if eta else "") for kind, steps, eta in SCHEDULES]
    last = rows[-1]
    lines = [
        f"{last['model']} (weights {last['weights']}), {last['bits']}, preset {last['preset']}, calibrated at "
        f"{CALIBRATED_STEPS} steps of DDIM with seed 0; n = {last['n']} images from seed {EVALUATION_SEED}; "
        f"{last['machine']}, torch {last['torch']}, {last['date']}. PSNR in dB / Fréchet distance to full precision.",
        "",
        "| method | " + " | ".join(titles) + " |",
        "|---|" + "---|" * len(titles),
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [by_place.get((name, schedule)) for schedule in SCHEDULES]
        lines.append(
            f"| {name} | "
            + " | ".join("" if row is None else f"{row['psnr']:.2f} / {row['frechet_to_fp']:.0f}" for row in cells)
            + " |"
        )
    from results import put

    put(args.into, "\n".join(lines), "<!-- schedules -->", "<!-- /schedules -->")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("run")
    first.add_argument("--model", default="digits-unet")
    first.add_argument("--bits", default="W6A6")
    first.add_argument("--preset", default="quick")
    first.add_argument("--methods", default=";".join(METHODS))
    first.add_argument("--images", type=int, default=64)
    first.add_argument("--work", type=Path, default=Path("runs/schedules"))
    second = commands.add_parser("table")
    second.add_argument("--into", type=Path, default=Path("docs/results.md"))
    for command in (first, second):
        command.add_argument("--json", type=Path, default=Path(__file__).with_name("schedules.jsonl"))
    args = parser.parse_args()
    run(args) if args.command == "run" else table(args)


if __name__ == "__main__":
    main()
