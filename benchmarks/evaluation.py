"""Where an evaluation's time goes: sampling, measuring and drift, of the shipped model at W8A8.

    python benchmarks/evaluation.py [--n 64] [--steps 20] [--batch-size 64] [--engine auto] [--json FILE]

Printed: seconds and shares. "metrics" is everything that is done with images once they are there: paired figures with
their intervals, features and all distances of distributions. "drift" samples again, at most 64 seeds, step by step, so
its share shrinks with the number of images.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

from stepquant.allocator import tune_allocator
from stepquant.api import load, open_model, quantize
from stepquant.evaluate.compare import evaluate
from stepquant.methods import METHODS
from stepquant.run import Run

FIRST_SEED = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=64, help="images of each side")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--engine", default="simulated", help="what runs the quantized model")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tune_allocator()
    pipe = open_model("digits-unet")
    recipe = METHODS["rtn"](weights=8, activations=8, samples=8, batch=8)
    with tempfile.TemporaryDirectory() as folder:
        quantize(pipe, recipe, steps=args.steps, run=Run()).save(Path(folder) / "w8a8")
        candidate = load(Path(folder) / "w8a8", engine=args.engine)
    began = time.perf_counter()
    results = evaluate(
        candidate, pipe, seeds=range(FIRST_SEED, FIRST_SEED + args.n), steps=args.steps, batch_size=args.batch_size
    )
    wall = time.perf_counter() - began
    seconds = results["seconds"]
    whole = sum(seconds.values())
    for name, spent in seconds.items():
        print(f"{name:<9} {spent:9.2f} s {100 * spent / whole:6.2f} %")
    print(f"{'wall':<9} {wall:9.2f} s for {args.n} images of each side, {args.steps} steps")
    if args.json is not None:
        document = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
            "n": args.n,
            "steps": args.steps,
            "engine": args.engine,
            "seconds": {**seconds, "wall": round(wall, 3)},
            "shares": {name: spent / whole for name, spent in seconds.items()},
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
