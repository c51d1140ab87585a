"""Quantize the shipped model, write a checkpoint, open it again and measure what was lost.

python examples/quantize_shipped_model.py --out digits-w4a8
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import stepquant
from stepquant.evaluate.compare import evaluate


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-unet", help="shipped model, diffusers folder, or hub id")
    parser.add_argument("--out", type=Path, default=Path("digits-w4a8"), help="folder to make for the checkpoint")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=16, help="images to calibrate on")
    parser.add_argument("--images", type=int, default=16, help="images to evaluate on")
    args = parser.parse_args(arguments)

    pipe = stepquant.open_model(args.model)

    # Layers are rounded for their own outputs: the learning-free part of `combined`.
    recipe = stepquant.METHODS["combined"](
        weights=4,
        activations=8,
        samples=args.samples,
        batch=8,
        samples_per_step=4,
        together=4,
        sample_weights=False,
        block_iterations=0,
        scale_iterations=0,
        window_iterations=0,
        compensation=False,
    )
    stepquant.quantize(pipe, recipe, steps=args.steps, base_model=args.model).save(args.out)

    # Figures are those of the definition; engines compute the same up to float32 rounding.
    loaded = stepquant.load(args.out, engine="simulated")
    seeds = range(1000, 1000 + args.images)
    results = evaluate(loaded, pipe, seeds=seeds, steps=args.steps)
    for name, metric in results["metrics"].items():
        print(f"{name:18} {metric['value']:.3f}")
    print(f"drift step by step: {[round(value, 3) for value in results['drift']['accumulated']]}")


if __name__ == "__main__":
    main()
