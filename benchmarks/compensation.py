"""What a step correction costs when sampling: the same pipeline with and without it, paired in one process.

    python benchmarks/compensation.py [--model digits-unet] [--steps 20] [--batch 16] [--pairs 5] [-o runs/compensation]

Every pair samples the same seeds three times: without, with, without. The cost of the pair is the middle time over the
mean of its neighbours, minus 1, so that drift of the machine's speed cancels. The median over pairs is reported, and
beside it the same figure of runs that differ in nothing (`noise`: first over last of the two without). The correction
has every term, the prediction before included, and changes nothing in value. The network is the full-precision one, in
the arithmetic of torch, which is faster than simulated quantization: the share of a correction is largest there.

`seconds_per_call` times the correction alone on tensors of the same shape, which a busy machine disturbs less:
`share_of_a_step` is that over the time of a step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    arguments = _arguments()
    document = {"command": " ".join(["python", *sys.argv]), **_machine(arguments), **measure(arguments)}
    text = json.dumps(document, indent=1)
    print(text)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "compensation.json").write_text(text + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-unet", help="shipped model, diffusers folder or hub id")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="folder for compensation.json")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from stepquant.allocator import tune_allocator
    from stepquant.api import open_model, sample

    tune_allocator()
    torch.set_num_threads(arguments.threads)
    pipe = open_model(arguments.model)
    plain, corrected = pipe.scheduler, _corrected(pipe.scheduler, arguments.steps)

    def seconds(scheduler: Any) -> float:
        pipe.scheduler = scheduler
        began = time.perf_counter()
        sample(pipe, seeds=range(arguments.batch), steps=arguments.steps, batch_size=arguments.batch)
        return time.perf_counter() - began

    seconds(plain)
    costs, noise, alone = [], [], []
    for _ in range(arguments.pairs):
        first, middle, last = seconds(plain), seconds(corrected), seconds(plain)
        costs.append(2 * middle / (first + last) - 1)
        noise.append(first / last - 1)
        alone += [first, last]
    per_step, per_call = statistics.median(alone) / arguments.steps, _seconds_per_call(pipe, corrected, arguments)
    return {
        "cost": statistics.median(costs),
        "noise": statistics.median(map(abs, noise)),
        "costs": costs,
        "seconds_per_step": per_step,
        "seconds_per_call": per_call,
        "share_of_a_step": per_call / per_step,
    }


def _corrected(scheduler: Any, steps: int) -> Any:
    """The scheduler behind a stand-in with a correction of all terms that changes no value."""
    import copy

    import torch

    from stepquant.model.correction import CorrectedScheduler, StepCorrection

    inner = copy.deepcopy(scheduler)
    inner.set_timesteps(steps)
    identity = StepCorrection.identity(inner.timesteps.float(), 1)
    return CorrectedScheduler(inner, replace(identity, previous=torch.zeros_like(identity.gain)))


def _seconds_per_call(pipe: Any, corrected: Any, arguments: argparse.Namespace) -> float:
    """Median time of one correction; tensors of the shape that the pipeline samples."""
    import torch

    from stepquant.model.correction import Corrector
    from stepquant.model.families import find_denoiser

    config = find_denoiser(pipe)[1].config
    shape = (arguments.batch, config["in_channels"], config["sample_size"], config["sample_size"])
    guided, latent = torch.randn(shape), torch.randn(shape)
    times = []
    for _ in range(20):
        corrector = Corrector(corrected.correction)
        for timestep in corrected.correction.timesteps:
            began = time.perf_counter()
            corrector(guided, timestep, latent)
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{names[0] if names else platform.machine()}, {arguments.threads} thread(s)",
        "versions": {name: version(name) for name in ("stepquant", "torch", "diffusers")}
        | {"python": platform.python_version()},
        "setting": f"{arguments.model}, batch {arguments.batch}, {arguments.steps} steps, {arguments.pairs} pairs",
    }


if __name__ == "__main__":
    main()
