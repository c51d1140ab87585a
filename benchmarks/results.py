"""The quality table: every method at every bit setting, on held-out seeds, over several calibration seeds.

    python benchmarks/results.py run --json runs/results.jsonl [--bits W4A8,W4A4] [--methods rtn,...] [--part 1/2]
    python benchmarks/results.py table --json runs/results.jsonl --into docs/results.md

`run` appends one line per (bits, method, calibration seed) and skips what is there, so it can be killed and started
again, and several parts can run side by side. Lines of other weights, budgets or numbers of images stay in the file;
`table` shows those that agree with the last line. Every learning method gets the same number of network evaluations
(`--evaluations`, forward passes of one image; a backward pass counts as two).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from stepquant.allocator import tune_allocator
from stepquant.api import open_model, quantize, sample
from stepquant.calibrate.trajectory import record, seal
from stepquant.evaluate.drift import measure_drift
from stepquant.evaluate.features import DigitFeatures, weights_identity
from stepquant.evaluate.frechet import FeatureStatistics, frechet_distance
from stepquant.evaluate.paired import PairedMetrics
from stepquant.methods import METHODS
from stepquant.model.correction import CorrectedScheduler
from stepquant.model.families import find_denoiser
from stepquant.numerics.spec import parse_bits
from stepquant.run import Run

STEPS = 20
SAMPLES = 64
BATCH = 8
EVALUATION_SEED = 1000
DRIFT_IMAGES = 64

BITS = ("W8A8", "W4A8", "W6A6", "W4A4", "W3A6")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "q_diffusion": ("q_diffusion", {}),
    **{
        f"accuquant {gradient} M={window}": ("accuquant", {"gradient": gradient, "window": window})
        for gradient in ("identity", "exact", "per_step")
        for window in (5, 2, 10, 20, 1)
    },
}

LR_WEIGHTS = 1e-2
"""Adam's rate for rounding variables, the same for all methods: few iterations need a higher one than the papers'."""


def settings(variant: str, evaluations: int) -> dict[str, Any]:
    """Keyword arguments of a variant that spends `evaluations` on learning."""
    method, options = VARIANTS[variant]
    common = {"samples": SAMPLES, "batch": BATCH, "samples_per_step": 8}
    if method == "rtn":
        return common
    if method == "q_diffusion":
        # Two thirds for rounding, one third for scales; an iteration is 3 * batch evaluations. The passes that capture
        # inputs come on top and are reported.
        iterations = evaluations // (3 * BATCH)
        return common | {
            "iterations_weights": iterations * 2 // 3,
            "iterations_activations": iterations // 3,
            "lr_weights": LR_WEIGHTS,
            "lr_activations": 5e-3,
            "together": 4,
        }
    # A third for block-wise rounding, two thirds for windows.
    passes = 3 if options["gradient"] == "per_step" else 4
    return (
        common
        | options
        | {
            "block_iterations": evaluations // 3 // (3 * BATCH),
            "block_lr": LR_WEIGHTS,
            "iterations": evaluations * 2 // 3 // (passes * BATCH * options["window"]),
            "lr_weights": LR_WEIGHTS,
            "lr_scales": 1e-2,
            "together": 4,
        }
    )


class Reference:
    """The full-precision side, computed once."""

    def __init__(self, model: str, images: int) -> None:
        self.pipe = open_model(model)
        self.seeds = list(range(EVALUATION_SEED, EVALUATION_SEED + images))
        self.features = DigitFeatures()
        self.images = sample(self.pipe, seeds=self.seeds, steps=STEPS, batch_size=32)
        _, denoiser = find_denoiser(self.pipe)
        self.weights = weights_identity(denoiser)[:12]
        recorded = record(self.pipe, denoiser, seeds=self.seeds[:DRIFT_IMAGES], steps=STEPS, batch_size=32, run=Run())
        self.trajectories = [seal(trajectory) for trajectory in recorded]

    def statistics(self, images: torch.Tensor) -> FeatureStatistics:
        found = FeatureStatistics(self.features.dim)
        found.update(self.features(images))
        return found

    def compare(self, pipe: Any) -> dict[str, float]:
        images = sample(pipe, seeds=self.seeds, steps=STEPS, batch_size=32)
        paired = PairedMetrics()
        paired.update(images, self.images)
        result = paired.result()
        _, denoiser = find_denoiser(pipe)
        scheduler = pipe.scheduler
        correction = scheduler.correction if isinstance(scheduler, CorrectedScheduler) else None
        drift = measure_drift(denoiser, self.trajectories, correction)
        data = FeatureStatistics.from_moments(*self.features.data_statistics())
        own = self.statistics(images)
        return {
            "psnr": result.psnr.mean,
            "ssim": result.ssim.mean,
            "mae": result.mae.mean,
            "frechet_to_fp": frechet_distance(own, self.statistics(self.images)),
            "frechet_to_data": frechet_distance(own, data),
            "drift_final": drift.accumulated[-1],
            "coherent": drift.coherent[-1],
            "incoherent": drift.incoherent[-1],
        }


def run(args: argparse.Namespace) -> None:
    tune_allocator()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    part, parts = map(int, args.part.split("/"))
    wanted = [
        (bits, variant, seed)
        for bits in args.bits.split(",")
        for seed in map(int, args.seeds.split(","))
        for variant in args.methods.split(",")
    ]
    reference = Reference(args.model, args.images)
    for number, (bits, variant, seed) in enumerate(wanted):
        if number % parts != part - 1 or done(args, reference, bits, variant, seed):
            continue
        began = time.perf_counter()
        weights, activations = parse_bits(bits)
        options = settings(variant, args.evaluations)
        recipe = METHODS[VARIANTS[variant][0]](weights=weights, activations=activations, **options)
        quantized = quantize(reference.pipe, recipe, steps=STEPS, run=Run(seed=seed))
        row = {
            "bits": bits,
            "method": variant,
            "seed": seed,
            "budget": args.evaluations,
            "model": args.model,
            "weights": reference.weights,
            "steps": STEPS,
            "n": args.images,
            "evaluation_seeds": [reference.seeds[0], reference.seeds[-1]],
            "evaluations": sum(figures.get("evaluations", 0) for figures in quantized.figures),
            "options": options,
            "seconds": round(time.perf_counter() - began, 1),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
            "torch": torch.__version__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            **reference.compare(quantized.pipe),
        }
        with args.json.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            bits,
            variant,
            seed,
            {key: round(row[key], 4) for key in ("psnr", "frechet_to_fp", "drift_final")},
            flush=True,
        )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def done(args: argparse.Namespace, reference: Reference, bits: str, variant: str, seed: int) -> bool:
    key = (bits, variant, seed, args.evaluations, args.images, reference.weights)
    names = ("bits", "method", "seed", "budget", "n", "weights")
    return any(tuple(row[name] for name in names) == key for row in rows_of(args.json))


def table(args: argparse.Namespace) -> None:
    """Mean and half range over calibration seeds, as Markdown between the markers of a page."""
    rows = rows_of(args.json)
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in ("weights", "budget", "n", "model"))]
    lines = [
        "| bits | method | seeds | PSNR dB | Frechet to full precision | final drift | evaluations |",
        "|---|---|---|---|---|---|---|",
    ]
    for bits in BITS:
        for variant in VARIANTS:
            group = [row for row in rows if row["bits"] == bits and row["method"] == variant]
            if group:
                cells = [spread([row[key] for row in group]) for key in ("psnr", "frechet_to_fp", "drift_final")]
                cost = round(statistics.mean(row["evaluations"] for row in group))
                lines.append(f"| {bits} | {variant} | {len(group)} | {' | '.join(cells)} | {cost} |")
    first = rows[0]
    note = (
        f"Model {first['model']} (weights {first['weights']}), DDIM {first['steps']} steps, "
        f"n = {first['n']} images of seeds {first['evaluation_seeds'][0]}-{first['evaluation_seeds'][1]}, "
        f"{first['machine']}, torch {first['torch']}, {first['date']}."
    )
    page = args.into.read_text()
    begin, end = "<!-- table -->", "<!-- /table -->"
    head, rest = page.split(begin)
    _, tail = rest.split(end)
    args.into.write_text(head + begin + "\n" + note + "\n\n" + "\n".join(lines) + "\n" + end + tail)


def spread(values: list[float]) -> str:
    """`mean ± half the range`, or the value where there is one."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("run")
    first.add_argument("--model", default="digits-unet")
    first.add_argument("--bits", default=",".join(BITS))
    first.add_argument("--methods", default=",".join(VARIANTS))
    first.add_argument("--seeds", default="0,1,2")
    first.add_argument("--evaluations", type=int, default=8000)
    first.add_argument("--images", type=int, default=128)
    first.add_argument("--part", default="1/1")
    first.add_argument("--json", type=Path, default=Path("runs/results.jsonl"))
    second = commands.add_parser("table")
    second.add_argument("--json", type=Path, default=Path("runs/results.jsonl"))
    second.add_argument("--into", type=Path, default=Path("docs/results.md"))
    args = parser.parse_args()
    run(args) if args.command == "run" else table(args)


if __name__ == "__main__":
    main()
