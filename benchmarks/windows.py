"""Peak memory and time of one AccuQuant iteration against the window length M, beside naive unrolling.

    python benchmarks/windows.py [--model digits-unet] [--lengths 1 2 5 10 20] [--learn scales] [-o runs/windows]

Every (mode, M) runs in a process of its own, in two phases:

    memory   peak = most bytes that torch's allocator had handed out during an iteration, above what it had before it,
             added up from the profiler's allocation events. The same on every run. The resident set says less: it
             also holds what the C library keeps of freed blocks.
    time     per step = time of an iteration / M / time of one forward pass of the same quantized network without
             gradients. With the allocator as calibration sets it. Forward passes are timed between the iterations and
             both are medians, so that other work on the machine hits them alike.

What learns beside the scales of activations: `--learn scales`, one factor for each output channel of every weight, as
in the presets quick and standard; `--learn rounding`, the paper's rounding variables. There, an iteration computes the
soft weights once, runs the window, and takes the gradient back to them, and from M = 2 on there is one more buffer, as
many bytes as the weights: the gradient of the soft weights, to which every step adds. An iteration begins with the
gradient buffers of an earlier one in place.

`naive` is `unrolled_loss(...).backward()`, the whole window's graph in memory. `free_run` is `identity` behind a walk
of the quantized model from the noise to the window's start, in the middle of the schedule; its steps are those of the
walk and of the window together.

The exit status is 1 if memory of one of our modes grows by more than 5 % from the shortest to the longest window, or if
a denoising step costs more than 4.5 forward passes. What the shortest window lacks in buffers counts as growth, too.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODES = ("identity", "exact", "per_step", "free_run", "naive")
MOST_GROWTH, MOST_FORWARDS = 1.05, 4.5


def main() -> None:
    arguments = _arguments()
    if arguments.only is not None:
        print(json.dumps(_measure(arguments, arguments.only, arguments.lengths[0])))
        return
    results = []
    for mode in arguments.modes:
        for length in arguments.lengths:
            results.append(_in_fresh_process(arguments, mode, length))
            print(_line(results[-1]), file=sys.stderr, flush=True)
    document = {"command": " ".join(["python", *sys.argv]), **_machine(arguments), "results": results}
    document["verdict"] = _verdict(results)
    table = _table(document)
    print(table)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "windows.json").write_text(json.dumps(document, indent=1) + "\n")
        (arguments.output / "windows.md").write_text(table + "\n")
    missed = document["verdict"]["missed"]
    if missed:
        sys.exit("Missed: " + "; ".join(missed))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-unet", help="shipped model, diffusers folder or hub id")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps that are recorded")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 5, 10, 20], help="window lengths M")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--learn", choices=("scales", "rounding"), default="scales", help="what learns of weights")
    parser.add_argument("--batch", type=int, default=16, help="images in the mini-batch")
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--activations", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="timed iterations; the first of all is not timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="folder for windows.json and windows.md")
    parser.add_argument("--only", choices=MODES, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_fresh_process(arguments: argparse.Namespace, mode: str, length: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", mode, "--lengths", str(length)]
    for name in ("model", "steps", "learn", "batch", "weights", "activations", "repeats", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def _measure(arguments: argparse.Namespace, mode: str, length: int) -> dict[str, Any]:
    """One (mode, M) in this process."""
    import torch

    from stepquant.allocator import tune_allocator

    torch.set_num_threads(arguments.threads)
    denoiser, trajectory = _prepared(arguments)
    length = min(length, len(trajectory.steps))
    start = (len(trajectory.steps) - length) // 2 if mode == "free_run" else 0
    iteration, forward = _iteration(denoiser, trajectory, mode, start, length), _forward(denoiser, trajectory)
    iteration()
    peak = _peak_during(iteration)
    tune_allocator()
    times, forwards = [], []
    for _ in range(1 + arguments.repeats):
        marks = [time.perf_counter()]
        for work in (forward, iteration, forward):
            work()
            marks.append(time.perf_counter())
        first, middle, last = (after - before for before, after in itertools.pairwise(marks))
        times.append(middle)
        forwards += [first, last]
    seconds, one_forward = statistics.median(times[1:]), statistics.median(forwards[2:])
    return {
        "mode": mode,
        "M": length,
        "peak_bytes": peak,
        "seconds": seconds,
        "seconds_forward": one_forward,
        "forwards_per_step": seconds / (start + length) / one_forward,
    }


def _prepared(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """A quantized denoiser with everything live that learns, and one recorded mini-batch."""
    from stepquant.api import open_model
    from stepquant.calibrate.reconstruct import soften_all_
    from stepquant.calibrate.rounding import input_scales
    from stepquant.calibrate.weight_scales import learnt_scale_
    from stepquant.methods import METHODS
    from stepquant.model.families import find_denoiser
    from stepquant.model.surgery import quantized_layers
    from stepquant.recipe import Job
    from stepquant.run import Run

    pipe = open_model(arguments.model)
    _, full_precision = find_denoiser(pipe)
    full_precision.eval()
    job = Job(pipe, full_precision, copy.deepcopy(full_precision).requires_grad_(False), Run(), arguments.steps)
    recipe = METHODS["rtn"](
        weights=arguments.weights,
        activations=arguments.activations,
        samples=arguments.batch,
        batch=arguments.batch,
        ranges="minmax",  # which ranges changes neither memory nor time
    )
    for stage in recipe.stages:
        stage.run(job)
    if arguments.learn == "rounding":
        soften_all_(job, _weighted_layers(job.denoiser), keep=0.6)
    else:
        for layer in _weighted_layers(job.denoiser).values():
            learnt_scale_(layer)
    for quantizer in input_scales(quantized_layers(job.denoiser)).values():
        quantizer.scale.requires_grad_(True)
    return job.denoiser, job.handed["trajectories"][0]


def _weighted_layers(denoiser: Any) -> dict[str, Any]:
    from stepquant.model.layer import QuantizedLayer
    from stepquant.model.surgery import quantized_layers

    return {name: layer for name, layer in quantized_layers(denoiser).items() if isinstance(layer, QuantizedLayer)}


def _soft_layers(denoiser: Any) -> dict[str, Any]:
    """Layers whose rounding learns."""
    from stepquant.calibrate.rounding import SoftRounding

    layers = _weighted_layers(denoiser)
    return {name: layer for name, layer in layers.items() if isinstance(layer.weight_quantizer, SoftRounding)}


def _iteration(denoiser: Any, trajectory: Any, mode: str, start: int, length: int) -> Callable[[], None]:
    """What a stage does per iteration, without the optimizer: the walk, weights once, the window, gradients."""
    import torch

    from stepquant.calibrate.rounding import materialised
    from stepquant.calibrate.trajectory import replay
    from stepquant.calibrate.windows import unrolled_loss, window_gradient

    layers, stop = _weighted_layers(denoiser), start + length

    def walked() -> Any:
        with torch.no_grad(), materialised(layers):
            states = list(replay(denoiser, trajectory, 0, start))
        return states[-1] if states else None

    def iteration() -> None:
        if mode == "naive":
            with materialised(layers):
                unrolled_loss(denoiser, trajectory, start, stop).backward()
            return
        state = walked() if mode == "free_run" else None
        gradient: Any = "identity" if mode == "free_run" else mode
        with materialised(layers):
            window_gradient(denoiser, trajectory, start, stop, mode=gradient, state=state)

    return iteration


def _forward(denoiser: Any, trajectory: Any) -> Callable[[], None]:
    """One forward pass of the quantized network on the same mini-batch, weights computed beforehand as above."""
    import torch

    from stepquant.calibrate.rounding import materialised

    layers, call = _soft_layers(denoiser), trajectory.steps[0].calls[0]

    def forward() -> None:
        with torch.no_grad():
            denoiser(*call.args, **call.kwargs)

    with materialised(layers):
        hard = {name: layer.weight for name, layer in layers.items()}

    def with_weights() -> None:
        kept = {name: layers[name].weight for name in hard}
        for name in hard:
            layers[name].weight, layers[name].on_grid = hard[name], True
        try:
            forward()
        finally:
            for name in hard:
                layers[name].weight, layers[name].on_grid = kept[name], False

    return with_weights


def _peak_during(work: Callable[[], None]) -> int:
    """Bytes by which torch's CPU allocations grew at most while `work` ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_time = sorted(events, key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in in_time))


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{names[0] if names else platform.machine()}, {arguments.threads} thread(s)",
        "versions": {name: version(name) for name in ("stepquant", "torch", "diffusers")}
        | {"python": platform.python_version()},
        "model": arguments.model,
        "setting": f"W{arguments.weights}A{arguments.activations}, batch {arguments.batch}, {arguments.steps} steps, "
        f"{arguments.learn} of weights",
    }


def _verdict(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Largest over smallest peak of each mode, the dearest step of ours, and which limits they miss."""
    found: dict[str, Any] = {}
    missed = []
    for mode in MODES:
        peaks = [result["peak_bytes"] for result in results if result["mode"] == mode]
        if peaks:
            growth = found[f"{mode}_peak_growth"] = max(peaks) / min(peaks)
            if mode != "naive" and growth > MOST_GROWTH:
                missed.append(f"the peak of {mode} grows {growth:.3f} times, expected {MOST_GROWTH} at most")
    ours = [result["forwards_per_step"] for result in results if result["mode"] != "naive"]
    if ours:
        dearest = found["dearest_step_of_ours_in_forwards"] = max(ours)
        if dearest > MOST_FORWARDS:
            missed.append(f"a step costs {dearest:.2f} forward passes, expected {MOST_FORWARDS} at most")
    return {**found, "missed": missed}


def _line(result: dict[str, Any]) -> str:
    return (
        f"{result['mode']:>9} M={result['M']:<3} peak {result['peak_bytes'] / 2**20:8.1f} MiB   "
        f"{result['seconds']:7.2f} s   {result['forwards_per_step']:5.2f} forwards per step"
    )


def _table(document: dict[str, Any]) -> str:
    results = document["results"]
    lengths = sorted({result["M"] for result in results})
    by_place = {(result["mode"], result["M"]): result for result in results}
    modes = [mode for mode in MODES if any(result["mode"] == mode for result in results)]

    def rows(cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [
            f"| {mode} | " + " | ".join(cell(by_place[mode, length]) for length in lengths) + " |" for mode in modes
        ]

    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    head = ["| M | " + " | ".join(map(str, lengths)) + " |", "|---|" + "---|" * len(lengths)]
    return "\n".join(
        [
            f"`{document['command']}`",
            "",
            f"{document['date']}, {document['machine']}; {versions}. {document['model']}, {document['setting']}.",
            "",
            "Peak memory of one iteration above the memory before it, MiB:",
            "",
            *head,
            *rows(lambda result: f"{result['peak_bytes'] / 2**20:.1f}"),
            "",
            "Time per denoising step, in forward passes of the same quantized network:",
            "",
            *head,
            *rows(lambda result: f"{result['forwards_per_step']:.2f}"),
        ]
    )


if __name__ == "__main__":
    main()
