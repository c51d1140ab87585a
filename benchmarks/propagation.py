"""Which formula foretells the error at the end of sampling: `calibrate.propagation` on the shipped and a foreign model.

    python benchmarks/propagation.py [--model digits-unet|faces64] [--bits W8A8,W4A8] [--images 16] [--json FILE]

Round to nearest, DDIM, images of held-out seeds. Printed: the ratio of the foretold to the actual final error, and the
cosine between the two, for each treatment of the denoiser's Jacobian J (see the module for the formulas).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from faces64_model import open_by_name

from stepquant.allocator import tune_allocator
from stepquant.api import quantize
from stepquant.calibrate.propagation import MODES, propagate
from stepquant.calibrate.trajectory import record, seal
from stepquant.methods import METHODS
from stepquant.model.families import find_denoiser
from stepquant.numerics.spec import parse_bits
from stepquant.run import Run

EVALUATION_SEED = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-unet", help="shipped model, diffusers folder, or faces64")
    parser.add_argument("--bits", default="W8A8,W4A8")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--calibration-images", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tune_allocator()
    pipe = open_by_name(args.model)
    _, full_precision = find_denoiser(pipe)
    full_precision.eval()
    seeds = list(range(EVALUATION_SEED, EVALUATION_SEED + args.images))
    recorded = record(pipe, full_precision, seeds=seeds, steps=args.steps, batch_size=args.batch, run=Run())
    trajectories = [seal(trajectory) for trajectory in recorded]
    results = []
    for bits in args.bits.split(","):
        weights, activations = parse_bits(bits)
        recipe = METHODS["rtn"](
            weights=weights, activations=activations, samples=args.calibration_images, batch=args.batch, every=2
        )
        _, denoiser = find_denoiser(quantize(pipe, recipe, steps=args.steps, run=Run()).pipe)
        found = propagate(denoiser, trajectories, full_precision=full_precision)
        results.append({"bits": bits, **found.to_dict()})
        print(_line(args, results[-1]), flush=True)
    if args.json is not None:
        document = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
            "model": args.model,
            "steps": args.steps,
            "seeds": [seeds[0], seeds[-1]],
            "results": results,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n")


def _line(args: argparse.Namespace, result: dict[str, Any]) -> str:
    actual = result["actual"][-1]
    parts = [
        f"{mode} {result['foretold'][mode][-1] / actual:.2f} (cosine {result['cosine_with_actual'][mode][-1]:.2f})"
        for mode in MODES
    ]
    return (
        f"| {args.model} | {result['bits']} | {args.steps} | {args.images} | {actual:.3f} | " + " | ".join(parts) + " |"
    )


if __name__ == "__main__":
    main()
