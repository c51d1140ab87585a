"""Compare two folders of images at equal seeds, and fail if too much was lost.

    python examples/evaluate_two_folders.py REFERENCE CANDIDATE --fail-if "psnr<28"

Images are PNG files named by their seeds, `000017.png` or `sample-17.png`; whatever software sampled them. Without
folders two are made from the shipped model: with all its steps, and with half of them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import stepquant
from stepquant.evaluate.compare import METRICS, evaluate
from stepquant.evaluate.gates import check_gates, parse_gates
from stepquant.evaluate.images import save_png
from stepquant.evaluate.source import ImageFolder


def sample_into(folder: Path, *, model: str, steps: int, seeds: Sequence[int]) -> None:
    """One PNG a seed."""
    images = stepquant.sample(stepquant.open_model(model), seeds=seeds, steps=steps)
    for image, seed in zip(images, seeds, strict=True):
        save_png(image, folder, seed=seed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, nargs="?")
    parser.add_argument("candidate", type=Path, nargs="?")
    parser.add_argument("--fail-if", action="append", default=[], metavar="GATE", help="such as 'psnr<28'")
    parser.add_argument("--model", default="digits-unet", help="what to sample where no folders are given")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=16)
    args = parser.parse_args(arguments)
    gates = parse_gates(args.fail_if, METRICS)

    with tempfile.TemporaryDirectory() as made:
        reference, candidate = args.reference or Path(made, "reference"), args.candidate or Path(made, "candidate")
        seeds = list(range(1000, 1000 + args.images))
        if args.reference is None:
            sample_into(reference, model=args.model, steps=args.steps, seeds=seeds)
        if args.candidate is None:
            sample_into(candidate, model=args.model, steps=max(1, args.steps // 2), seeds=seeds)
        first, second = ImageFolder(reference), ImageFolder(candidate)
        results = evaluate(second, first, seeds=first.seeds, steps=None)

    for name, metric in results["metrics"].items():
        print(f"{name:18} {metric['value']:.3f}")
    for note in results["notes"]:
        print("note:", note)
    failed = [gate for gate in check_gates(gates, results["metrics"]) if gate["failed"]]
    for gate in failed:
        print("failed:", gate["gate"])
    return 3 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
