"""Correct a model that something else has quantized, without touching its weights.

    python examples/correct_foreign_model.py

`stepquant.compensate` takes any two pipelines of one model. Here the other software is four lines that round every
weight to 4 bits; it might as well be torchao, bitsandbytes or a kernel of your own.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import stepquant
from stepquant.evaluate.compare import evaluate


def round_weights_(denoiser: nn.Module, bits: int) -> None:
    """The other software: every output channel to 2^bits - 1 levels around zero, activations left alone."""
    for module in denoiser.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.data
            scale = weight.flatten(1).abs().amax(dim=1).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
            scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
            weight.copy_((weight / scale).round() * scale)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-unet", help="shipped model, diffusers folder, or hub id")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=8, help="images to fit on")
    parser.add_argument("--images", type=int, default=8, help="images to evaluate on")
    args = parser.parse_args(arguments)

    pipe = stepquant.open_model(args.model)
    foreign = copy.deepcopy(pipe)
    round_weights_(foreign.unet, bits=4)

    # "auto" tries several corrections and keeps the best on images held out, or none.
    made = stepquant.compensate(foreign, pipe, steps=args.steps, samples=args.samples, batch=4)
    print("chosen:", made.figures[-1]["chosen"])

    seeds = range(1000, 1000 + args.images)
    for label, candidate in (("as it came", foreign), ("corrected", made.pipe)):
        metrics: dict[str, Any] = evaluate(candidate, pipe, seeds=seeds, steps=args.steps)["metrics"]
        print(f"{label:12} PSNR {metrics['psnr']['value']:.2f} dB, final drift {metrics['drift_final']['value']:.4f}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
