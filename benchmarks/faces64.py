"""Calibrate a model that diffusers does not know, save it, load it again, and compare samples on held-out seeds.

    python benchmarks/faces64.py --method accuquant --weights 4 --activations 8 --steps 40 --samples 8 \\
        --iterations 20 -o runs/faces64

Writes into the folder:

    checkpoint/     what `Quantized.save` wrote; the samples below come from it, loaded with `denoiser=Faces64()`
    faces64.png     above: full precision, below: quantized, same seeds
    faces64.json    PSNR, mean absolute error, drift per step, seconds of every stage, command and versions

On one core a full-precision image takes about 0.2 s a step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from faces64_model import WEIGHTS, Faces64, faces64_pipeline, load_faces64
from torch import Tensor

from stepquant.allocator import tune_allocator
from stepquant.api import load, quantize, sample
from stepquant.calibrate.trajectory import record, seal
from stepquant.cli.seeds import parse_seeds
from stepquant.evaluate.drift import measure_drift
from stepquant.evaluate.images import to_grid
from stepquant.evaluate.paired import PairedMetrics
from stepquant.methods import METHODS
from stepquant.recipe import Recipe
from stepquant.run import Run


def main() -> None:
    arguments = _arguments()
    tune_allocator()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    pipe = faces64_pipeline(load_faces64(arguments.model))
    began = time.perf_counter()
    quantized = quantize(pipe, _recipe(arguments), steps=arguments.steps, run=Run(seed=arguments.seed))
    calibration_seconds = time.perf_counter() - began
    quantized.save(arguments.output / "checkpoint", overwrite=True)
    candidate = load(arguments.output / "checkpoint", denoiser=Faces64(), engine="simulated")

    seeds = list(arguments.seeds)
    reference, drift = _reference_and_drift(pipe, candidate.denoiser, seeds, arguments.steps)
    images = sample(candidate, seeds=seeds, steps=arguments.steps, batch_size=len(seeds))
    paired = PairedMetrics()
    paired.update(images, reference)
    to_grid(torch.cat([reference, images]), columns=len(seeds)).save(arguments.output / "faces64.png")
    document = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {arguments.threads} thread(s)",
        "versions": {name: version(name) for name in ("stepquant", "torch", "diffusers")},
        "model": str(arguments.model),
        "setting": f"{arguments.method} W{arguments.weights}A{arguments.activations}, {arguments.steps} steps of DDIM",
        "seeds": seeds,
        "paired": asdict(paired.result()),
        "drift": drift,
        "calibration_seconds": round(calibration_seconds, 1),
        "stages": [_short(figures) for figures in quantized.figures],
        "checkpoint_bytes": sum(
            path.stat().st_size for path in (arguments.output / "checkpoint").rglob("*") if path.is_file()
        ),
    }
    (arguments.output / "faces64.json").write_text(json.dumps(document, indent=1) + "\n")
    found = paired.result()
    print(
        f"{document['setting']}, seeds {seeds[0]}..{seeds[-1]}: PSNR {found.psnr.mean:.2f} dB "
        f"[{found.psnr.low:.2f}, {found.psnr.high:.2f}], final drift {drift['accumulated'][-1]:.4f} (RMS), "
        f"calibrated in {calibration_seconds:.0f} s"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--method", default="accuquant", choices=list(METHODS))
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--activations", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=8, help="calibration images")
    parser.add_argument("--batch", type=int, default=4, help="mini-batch of calibration")
    parser.add_argument("--iterations", type=int, default=20, help="windows (accuquant), mini-batches a unit")
    parser.add_argument("--block-iterations", type=int, default=0, help="block-wise rounding before the windows")
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--gradient", default="identity", choices=("identity", "exact", "per_step"))
    parser.add_argument("--every", type=int, default=4, help="range search and blocks look at every n-th step")
    parser.add_argument("--seeds", type=parse_seeds, default=list(range(16)), help="held-out, for example 0-15")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/faces64"))
    return parser.parse_args()


def _recipe(arguments: argparse.Namespace) -> Recipe:
    own: dict[str, dict[str, Any]] = {
        "q_diffusion": {
            "iterations_weights": arguments.iterations,
            "iterations_activations": arguments.iterations,
            "lr_weights": 1e-2,
        },
        "accuquant": {
            "iterations": arguments.iterations,
            "block_iterations": arguments.block_iterations,
            "block_lr": 1e-2,
            "lr_weights": 1e-2,
            "window": arguments.window,
            "gradient": arguments.gradient,
        },
    }
    return METHODS[arguments.method](
        weights=arguments.weights,
        activations=arguments.activations,
        samples=arguments.samples,
        batch=arguments.batch,
        every=arguments.every,
        **own.get(arguments.method, {}),
    )


def _reference_and_drift(pipe: Any, candidate: Any, seeds: list[int], steps: int) -> tuple[Tensor, dict[str, Any]]:
    """Full-precision images [N, 3, 64, 64] in [0, 1] and the candidate's drift, from one recording."""
    recorded = record(pipe, pipe.denoiser, seeds=seeds, steps=steps, batch_size=len(seeds), run=Run())
    trajectories = [seal(trajectory) for trajectory in recorded]
    images = torch.cat([trajectory.steps[-1].next_sample for trajectory in trajectories])
    return (images / 2 + 0.5).clamp(0, 1), measure_drift(candidate, trajectories).to_dict()


def _short(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if isinstance(value, int | float | str)}


if __name__ == "__main__":
    main()
