"""A method is a function that returns a recipe: stages in order. Here is one with a stage of its own.

    python examples/write_a_method.py

The stage takes the mean error of every layer's output, which rounding has moved, out of the bias (Nagel et al. 2019,
"Data-Free Quantization through Weight Equalization and Bias Correction", section 4.2). Everything else is there
already: record, select, place, ranges.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import stepquant
from stepquant.calibrate.select import inputs
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
from stepquant.evaluate.compare import evaluate
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import quantized_layers
from stepquant.recipe import Figures, Job, Recipe


@dataclass(frozen=True)
class CorrectBiases:
    """Move every layer's bias so that its own error has mean 0 over calibration samples.

    samples: calibration samples to look at, spread evenly.
    """

    samples: int = 64

    # What must have been handed on by earlier stages, and what this one changes: a recipe in which they do not meet
    # cannot be built.
    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def run(self, job: Job) -> Figures:
        chosen = job.handed["calibration"]
        count = min(self.samples, len(chosen))
        positions = torch.linspace(0, len(chosen) - 1, count).round().long().tolist()
        args, kwargs = inputs(job.handed["trajectories"], chosen, positions)
        layers = {
            name: layer
            for name, layer in quantized_layers(job.denoiser).items()
            if isinstance(layer, QuantizedLayer) and layer.bias is not None
        }
        with job.run.progress.track("Correcting biases", count) as advance:
            changes = _mean_errors(job.full_precision, layers, args, kwargs)
            advance(count)
        for name, change in changes.items():
            layers[name].bias.data -= change
        largest = max(float(change.abs().max()) for change in changes.values())
        return {"layers": len(changes), "largest_change": largest, "evaluations": 2 * count}


@torch.no_grad()
def _mean_errors(
    full_precision: nn.Module, layers: Mapping[str, QuantizedLayer], args: Any, kwargs: Any
) -> dict[str, Tensor]:
    """Mean over all positions of each layer's own error, `[O]`: quantized less full precision, at the same input.

    The input is that of full precision. Errors that earlier layers hand on are theirs to correct.
    """
    found: dict[str, Tensor] = {}

    def hook(name: str, layer: QuantizedLayer) -> Any:
        def compare(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            error = layer(args[0]) - out
            found[name] = error.movedim(layer.geometry.channel_axis, 0).flatten(1).mean(dim=1)

        return compare

    modules = dict(full_precision.named_modules())
    handles = [modules[name].register_forward_hook(hook(name, layer)) for name, layer in layers.items()]
    try:
        full_precision(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def bias_corrected(*, weights: int | None = 4, activations: int | None = 8, samples: int = 16) -> Recipe:
    """Round to nearest, then put every layer's mean output back."""
    return Recipe(
        "bias_corrected",
        (
            Record(samples=samples, batch=8),
            Select(samples_per_step=8),
            Place(weights=weights, activations=activations),
            FitWeightRanges("mse"),
            FitInputRanges("mse"),
            CorrectBiases(),
        ),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-unet", help="shipped model, diffusers folder, or hub id")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=16, help="images to calibrate on")
    parser.add_argument("--images", type=int, default=16, help="images to evaluate on")
    args = parser.parse_args(arguments)

    pipe = stepquant.open_model(args.model)
    quantized = stepquant.quantize(pipe, bias_corrected(samples=args.samples), steps=args.steps)
    for figures in quantized.figures:
        print(f"{figures['stage']:16} {figures['seconds']:6.1f} s")
    results = evaluate(quantized.pipe, pipe, seeds=range(1000, 1000 + args.images), steps=args.steps)
    print(f"PSNR {results['metrics']['psnr']['value']:.2f} dB")


if __name__ == "__main__":
    main()
