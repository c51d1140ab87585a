"""Whether images of the engines are as far from full precision as simulated ones: Fréchet distance, PSNR.

    python benchmarks/engine_images.py [--model digits-unet|faces64] [--weights 8] [--n 512] [--json FILE]

One checkpoint (method `rtn` with a row per step), sampled by every engine and by full precision at the same held-out
seeds. Printed for each engine: Fréchet distance to the full-precision images of all n, and of each quarter of the
seeds (mean and spread: what other seeds change); the mean difference to "simulated" over the quarters, with its
standard error; PSNR to full precision, and to the simulated images.

A tie that is rounded the other way changes an image for good, so no engine's images equal the simulated ones.
"simulated, other batch" is what the same arithmetic in another order does: mini-batches of another size.

Features: the shipped digit features; for faces64 (`../shared`) colours averaged over 4 x 4 fields, 48 numbers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from faces64_model import Faces64, faces64_pipeline, field_colours, load_faces64
from torch import Tensor, nn

from stepquant.allocator import tune_allocator
from stepquant.api import load, open_model, quantize, sample
from stepquant.evaluate.features import DigitFeatures, Features
from stepquant.evaluate.frechet import FeatureStatistics, frechet_distance
from stepquant.evaluate.paired import PairedMetrics
from stepquant.methods import METHODS
from stepquant.run import Run

FIRST_SEED = 1000
PARTS = 4
FULL, SIMULATED, REORDERED = "full precision", "simulated", "simulated, other batch"
ENGINES = ("openvino", "openvino-bf16", "onednn")


def main() -> None:
    args = _arguments()
    tune_allocator()
    torch.set_num_threads(args.threads)
    pipe, features, denoiser = _opened(args.model)
    recipe = METHODS["rtn"](weights=args.weights, activations=8, samples=8, batch=8, rows="step")
    images: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    seeds = list(range(FIRST_SEED, FIRST_SEED + args.n))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        quantize(pipe, recipe, steps=args.steps, run=Run(seed=args.seed)).save(made)
        for name in (FULL, SIMULATED, REORDERED, *args.engines):
            engine = SIMULATED if name == REORDERED else name
            candidate = pipe if name == FULL else load(made, engine=engine, denoiser=denoiser)
            size = max(1, args.batch_size // 4) if name == REORDERED else args.batch_size
            began = time.perf_counter()
            images[name] = sample(candidate, seeds=seeds, steps=args.steps, batch_size=size)
            seconds[name] = round(time.perf_counter() - began, 1)
            print(f"{name}: {seconds[name]} s", file=sys.stderr, flush=True)
    document = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {args.threads} thread(s), torch {torch.__version__}",
        "model": args.model,
        "bits": f"W{args.weights}A8",
        "steps": args.steps,
        "calibration seed": args.seed,
        "n": args.n,
        "features": features.name,
        "engines": _compared(images, features),
        "seconds": seconds,
    }
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(_table(document))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-unet", choices=("digits-unet", "faces64"))
    parser.add_argument("--weights", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--n", type=int, default=512, help="held-out seeds")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.n < 2 * PARTS:
        parser.error(f"--n must be at least {2 * PARTS}, found {args.n}.")
    return args


def _opened(model: str) -> tuple[Any, Features, nn.Module | None]:
    """The full-precision pipeline, what sees its images, and the denoiser that `load` needs for plain modules."""
    if model == "digits-unet":
        return open_model(model), DigitFeatures(), None
    return faces64_pipeline(load_faces64()), field_colours(), Faces64()


def _compared(images: dict[str, Tensor], features: Features) -> dict[str, Any]:
    seen = {name: features(found) for name, found in images.items()}

    def distance(name: str, chosen: slice) -> float:
        sides = []
        for side in (name, FULL):
            gathered = FeatureStatistics(features.dim)
            gathered.update(seen[side][chosen])
            sides.append(gathered)
        return frechet_distance(*sides)

    n = len(images[FULL])
    size = n // PARTS
    quarters = [slice(part * size, (part + 1) * size) for part in range(PARTS)]
    ours = [distance(SIMULATED, quarter) for quarter in quarters]
    found = {}
    for name in images:
        if name == FULL:
            continue
        parts = [distance(name, quarter) for quarter in quarters]
        apart = [one - other for one, other in zip(parts, ours, strict=True)]
        found[name] = {
            "frechet_to_fp": distance(name, slice(0, n)),
            "quarters": {"mean": statistics.mean(parts), "deviation": statistics.stdev(parts)},
            "to_simulated": {"mean": statistics.mean(apart), "error": statistics.stdev(apart) / math.sqrt(PARTS)},
            "psnr_to_fp": _psnr(images[name], images[FULL]),
            "psnr_to_simulated": None if name == SIMULATED else _psnr(images[name], images[SIMULATED]),
        }
    return found


def _psnr(images: Tensor, others: Tensor) -> float:
    paired = PairedMetrics()
    paired.update(images, others)
    return paired.result().psnr.mean


def _table(document: dict[str, Any]) -> str:
    lines = [
        "{model} {bits}, {steps} steps, n = {n}, {features}".format(**document),
        "",
        "| engine | Fréchet to full precision | quarters | less simulated | PSNR | PSNR to simulated |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in document["engines"].items():
        quarters, apart, own = found["quarters"], found["to_simulated"], found["psnr_to_simulated"]
        other = "" if own is None else f"{apart['mean']:+.2g} ± {apart['error']:.1g}"
        distances = f"{found['frechet_to_fp']:.3g} | {quarters['mean']:.3g} ± {quarters['deviation']:.2g} | {other}"
        lines.append(f"| {name} | {distances} | {found['psnr_to_fp']:.1f} | {'' if own is None else f'{own:.1f}'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
