"""Spend a budget of bits where the final image needs them, and see which layers got them.

python examples/bits_under_a_target.py --bits 4.5
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import stepquant
from stepquant.calibrate.allocation import allocated


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-unet", help="shipped model, diffusers folder, or hub id")
    parser.add_argument("--bits", type=float, default=4.5, help="average bits of a weight")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=8, help="images to record; half of them are held out")
    parser.add_argument("--projections", type=int, default=1, help="random vectors for each image")
    args = parser.parse_args(arguments)

    pipe = stepquant.open_model(args.model)
    half = max(1, args.samples // 2)
    rounding = stepquant.METHODS["rtn"](activations=8, samples=args.samples, batch=half, ranges="minmax")
    recipe = allocated(
        rounding,
        weight_bits=args.bits,
        bits=(2, 3, 4, 6, 8),
        samples=half,
        held_out=half,
        projections=args.projections,
        refine=2,
    )
    quantized = stepquant.quantize(pipe, recipe, steps=args.steps)

    figures = next(entry for entry in quantized.figures if entry["stage"] == "Allocate")
    print(f"{figures['weight_bits']:.2f} bits a weight, predicted drift {figures['predicted_drift']:.4f}")
    for rule in sorted(figures["rules"], key=lambda rule: rule["weights"] or 16, reverse=True):
        print(f"  {rule['weights'] or 16:2} bits  {rule['pattern']}")


if __name__ == "__main__":
    main()
