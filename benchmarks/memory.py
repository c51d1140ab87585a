"""How main memory grows with samples, steps and layers while a model is calibrated, with and without `max_memory`.

    python benchmarks/memory.py [--samples 16] [--steps 10] [--layers 4] [-o runs/memory]

Every run is a process of its own: a small convolutional network on 64x64 images, and a recipe that records, and fits
ranges, blocks and windows. Runs are the base, 4 times its samples, twice its steps and twice its layers.

    memory   largest anonymous memory of the process (RssAnon of /proc/self/status, every few milliseconds) above what
             it has when torch is loaded and the network is built. Pages of mapped files are not in it: the system takes
             them back when it needs memory.
    growth   memory of the run, libraries included, relative to the base's

Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

RUNS = {"base": (1, 1, 1), "4x samples": (4, 1, 1), "2x steps": (1, 2, 1), "2x layers": (1, 1, 2)}
MODES = {"in memory": None, "max_memory=0": 0}


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        _work(arguments)
        return
    results = []
    for mode, limit in MODES.items():
        for run, (samples, steps, layers) in RUNS.items():
            sizes = {
                "samples": samples * arguments.samples,
                "steps": steps * arguments.steps,
                "layers": layers * arguments.layers,
            }
            results.append({"mode": mode, "run": run, **sizes, **_measured(sizes, limit)})
            print(results[-1], file=sys.stderr, flush=True)
    document = {"command": " ".join(["python", *sys.argv]), **_machine(), "results": results}
    table = _table(results)
    print(table)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "memory.json").write_text(json.dumps(document, indent=1) + "\n")
        (arguments.output / "memory.md").write_text(table + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measured(sizes: dict[str, int], limit: int | None) -> dict[str, int]:
    """Bytes of one run."""
    command = [sys.executable, __file__, "--worker", *(f"--{name}={value}" for name, value in sizes.items())]
    command += [] if limit is None else [f"--limit={limit}"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(finished.stdout.splitlines()[-1])
    return found


def _work(arguments: argparse.Namespace) -> None:
    """One run."""
    import torch
    from diffusers import DDIMScheduler

    from stepquant.allocator import tune_allocator
    from stepquant.api import quantize
    from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
    from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
    from stepquant.calibrate.window_fitting import FitWindows
    from stepquant.model.pipeline import DenoiserPipeline
    from stepquant.recipe import Recipe
    from stepquant.run import Run

    tune_allocator()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = Recipe(
        "benchmark",
        (
            Record(arguments.samples, 4),
            Select(),
            Place(4, 8),
            FitWeightRanges("minmax"),
            FitInputRanges("minmax", samples=32, batch=8),
            RoundBlocks(iterations=5, batch=8, together=2),
            ScaleBlocks(iterations=5, batch=8, together=2),
            FitWindows(2, iterations=5),
        ),
    )
    pipe = DenoiserPipeline(_network(arguments.layers), DDIMScheduler(), (3, 64, 64))
    with tempfile.TemporaryDirectory(prefix="stepquant-benchmark-") as folder, _Watch() as watch:
        quantize(pipe, recipe, steps=arguments.steps, run=Run(work=Path(folder) / "w", max_memory=arguments.limit))
    print(json.dumps({"before": watch.before, "peak": watch.peak}))


def _network(layers: int) -> Any:
    """`layers` convolutions between 3 channels and 3 channels, each a unit of its own."""
    from torch import Tensor, nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [3, *[8] * (layers - 1), 3]
            self.convolutions = nn.ModuleList(
                nn.Conv2d(given, made, 3, padding=1) for given, made in itertools.pairwise(widths)
            )

        def forward(self, sample: Tensor, timestep: Any) -> Tensor:  # noqa: ARG002
            for number, convolution in enumerate(self.convolutions):
                sample = convolution(sample if number == 0 else sample.tanh())
            return sample

    return Network().eval()


class _Watch:
    """The largest anonymous memory of this process inside, in bytes."""

    def __enter__(self) -> _Watch:
        self.before = self.peak = _anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.003):
            self.peak = max(self.peak, _anonymous())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _anonymous() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def _table(results: list[dict[str, Any]]) -> str:
    lines = ["| calibration | run | samples | steps | layers | memory, MB | growth |", "|---|---|---|---|---|---|---|"]
    base = {result["mode"]: result["peak"] for result in results if result["run"] == "base"}
    for result in results:
        own = (result["peak"] - result["before"]) / 1e6
        growth = 100 * (result["peak"] / base[result["mode"]] - 1)
        sizes = " | ".join(str(result[name]) for name in ("samples", "steps", "layers"))
        lines.append(f"| {result['mode']} | {result['run']} | {sizes} | {own:.0f} | {growth:+.1f} % |")
    return "\n".join(lines)


def _machine() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": version("torch"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


if __name__ == "__main__":
    main()
