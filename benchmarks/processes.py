"""How much faster several processes are than one, in sampling and in the stages of a calibration that are split.

    python benchmarks/processes.py [--model digits-unet] [--counts 1 2] [--rounds 3] [-o runs/processes]

Runs are paired: every round starts each number of processes once, one after the other, and a speed-up is that of its
own round, so that other work on the machine hits both. Each process has one thread, so a machine needs as many free
cores as processes. Times are those of the first process, between barriers, without imports and the opening of models.

    speed-up     time of one process / time of several
    efficiency   speed-up / number of processes

Figures of images and calibration are not compared here: tests/reliability/test_processes.py does that.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

STAGES = ("Record", "RoundBlocks", "ScaleBlocks", "FitWindows")


def main() -> None:
    arguments = _arguments()
    if arguments.worker is not None:
        _work(arguments)
        return
    rounds = []
    for number in range(arguments.rounds):
        rounds.append({count: _measured(arguments, count) for count in arguments.counts})
        print(f"round {number + 1} of {arguments.rounds}: {rounds[-1]}", file=sys.stderr, flush=True)
    document = {"command": " ".join(["python", *sys.argv]), **_machine(), "rounds": rounds}
    table = _table(rounds, arguments.counts)
    print(table)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "processes.json").write_text(json.dumps(document, indent=1) + "\n")
        (arguments.output / "processes.md").write_text(table + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--model", default="digits-unet")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2], help="numbers of processes; the first is 1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=5, help="of blocks and of windows")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.counts[0] != 1:
        parser.error("the first of --counts must be 1")
    return arguments


def _measured(arguments: argparse.Namespace, count: int) -> dict[str, float]:
    """Seconds of one run by so many processes."""
    with tempfile.TemporaryDirectory(prefix="stepquant-benchmark-") as folder:
        result = Path(folder) / "result.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
        same = [f"--{name}={getattr(arguments, name)}" for name in ("model", "images", "batch", "steps", "iterations")]
        command = [sys.executable, *launcher, str(Path(__file__).resolve()), *same, f"--worker={result}"]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        found: dict[str, float] = json.loads(result.read_text())
    return found


def _work(arguments: argparse.Namespace) -> None:
    """One of the processes of a run."""
    import torch

    from stepquant.allocator import tune_allocator
    from stepquant.api import open_model, quantize, sample
    from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
    from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
    from stepquant.calibrate.window_fitting import FitWindows
    from stepquant.processes import joined, leave
    from stepquant.recipe import Recipe
    from stepquant.run import Run

    torch.set_num_threads(1)
    tune_allocator()
    processes, pipe = joined(), open_model(arguments.model)
    common: dict[str, Any] = {"steps": arguments.steps, "batch_size": arguments.batch, "processes": processes}
    sample(pipe, seeds=range(arguments.batch), **{**common, "steps": 2})
    processes.wait()
    began = time.perf_counter()
    sample(pipe, seeds=range(arguments.images), **common)
    processes.wait()
    seconds = {"sample": time.perf_counter() - began}
    recipe = Recipe(
        "benchmark",
        (
            Record(arguments.images, arguments.batch),
            Select(every=5, samples_per_step=arguments.batch),
            Place(4, 8),
            FitWeightRanges("minmax"),
            FitInputRanges("minmax"),
            RoundBlocks(arguments.iterations, arguments.batch, together=8),
            ScaleBlocks(arguments.iterations, arguments.batch, together=8),
            FitWindows(min(5, arguments.steps), iterations=arguments.iterations),
        ),
    )
    made = quantize(pipe, recipe, steps=arguments.steps, run=Run(processes=processes))
    seconds |= {entry["stage"]: entry["seconds"] for entry in made.figures if entry["stage"] in STAGES}
    if processes.first:
        arguments.worker.write_text(json.dumps(seconds))
    processes.wait()
    leave()


def _table(rounds: list[dict[int, dict[str, float]]], counts: list[int]) -> str:
    lines = ["| work | processes | seconds | speed-up | of rounds | efficiency |", "|---|---|---|---|---|---|"]
    for work in ("sample", *STAGES):
        for count in counts:
            seconds = statistics.median(found[count][work] for found in rounds)
            ratios = sorted(found[1][work] / found[count][work] for found in rounds)
            faster = statistics.median(ratios)
            spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
            lines.append(f"| {work} | {count} | {seconds:.2f} | {faster:.2f} | {spread} | {faster / count:.2f} |")
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
