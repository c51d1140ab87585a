"""How fast block reconstruction runs, and what rounding error each way of starting reaches in how much time.

    python benchmarks/calibration.py [--model digits-unet] [--samples 8] [--batch 8] [--iterations 0 20 60 180]
                                     [-o runs/calibration]

Two questions, each answered within one process, in processor time (waiting for other work on the machine costs none):

    speed    iterations per second of `fit_unit` on every second unit, in float32 and in bfloat16, taken in turns;
             medians, and ratios to float32 of the same round.
    loss     weights are rounded with `RoundBlocks` for each number of iterations, starting from nearest rounding or
             from `RoundLayers`, in float32 and in bfloat16. 0 iterations is the start itself. error = mean squared
             difference of the prediction to full precision, activations in floating point, over inputs that calibrate
             nothing. speed-up = time that blocks in float32 from nearest rounding need for the same error (between
             measured points on a logarithmic scale) / own time.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import math
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

FORMS = ("float32", "bfloat16")


def main() -> None:
    arguments = _arguments()
    import torch

    from stepquant.allocator import tune_allocator

    torch.set_num_threads(arguments.threads)
    tune_allocator()
    job = _prepared(arguments)
    document: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), **_machine(arguments)}
    document["speed"] = _speeds(arguments, job)
    document["loss"] = _losses(arguments, job)
    table = _table(document)
    print(table)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "calibration.json").write_text(json.dumps(document, indent=1) + "\n")
        (arguments.output / "calibration.md").write_text(table + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-unet", help="shipped model, diffusers folder or hub id")
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="images that calibrate; as many again measure the error")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps that are recorded")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--iterations", type=int, nargs="+", default=[0, 20, 60, 180], help="of a block")
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--layer-samples", type=int, default=64, help="samples of RoundLayers")
    parser.add_argument("--together", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of the speed measurement")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="folder for calibration.json and calibration.md")
    return parser.parse_args()


def _prepared(arguments: argparse.Namespace) -> Any:
    """A job with weights rounded to nearest; half of the recorded images calibrate."""
    from stepquant.api import open_model
    from stepquant.calibrate.stages import FitWeightRanges, Place, Record, Select
    from stepquant.model.families import find_denoiser
    from stepquant.recipe import Job
    from stepquant.run import Run

    pipe = open_model(arguments.model)
    _, full_precision = find_denoiser(pipe)
    full_precision.eval()
    job = Job(pipe, full_precision, copy.deepcopy(full_precision).requires_grad_(False), Run(), arguments.steps)
    record = Record(2 * arguments.samples, arguments.batch)
    place = Place(weights=arguments.weights, activations=None)
    for stage in (record, Select(samples_per_step=arguments.samples), place, FitWeightRanges()):
        stage.run(job)
    return job


def _copied(job: Any) -> Any:
    """The job with a denoiser of its own."""
    from stepquant.recipe import Job

    return Job(
        job.pipe, job.full_precision, copy.deepcopy(job.denoiser), job.run, job.steps, job.arguments, dict(job.handed)
    )


def _speeds(arguments: argparse.Namespace, job: Any) -> dict[str, Any]:
    """Iterations per second of every form on every second unit."""
    from stepquant.calibrate import reconstruct
    from stepquant.calibrate.reconstruct import Fit, fit_unit, soft_roundings, soften_all_
    from stepquant.model.layer import QuantizedLayer
    from stepquant.model.surgery import quantized_layers, units_of

    job = _copied(job)
    layers = {n: x for n, x in quantized_layers(job.denoiser).items() if isinstance(x, QuantizedLayer)}
    soften_all_(job, layers, keep=0.0)
    batches = reconstruct._batches_of(job, job.handed["calibration"], arguments.batch)
    bins = reconstruct._bins_of(job.denoiser, batches)
    seconds: dict[str, list[float]] = {form: [0.0] * arguments.rounds for form in FORMS}
    fitted, iterations = 0, 20
    for unit in units_of(job.denoiser, list(job.handed["plan"]))[1:-1:2]:
        soft = soft_roundings({name: layers[name] for name in unit.layers if name in layers})
        if not soft:
            continue
        fitted += 1
        cache = reconstruct._caches(job.denoiser, job.full_precision, [unit.name], batches, bins, True)[unit.name]
        for number in range(-1, arguments.rounds):
            for form in FORMS if number % 2 else FORMS[::-1]:
                fit = Fit(iterations, arguments.batch, 1e-3, 2.0, 0.01, 0.2, compute=form)  # type: ignore[arg-type]
                began = time.process_time()
                fit_unit(job, unit, cache, fit, soft=soft, stream=("benchmark", number))
                if number >= 0:  # the first round only warms up
                    seconds[form][number] += time.process_time() - began
    return {
        form: {
            "iterations_per_second": fitted * iterations / statistics.median(seconds[form]),
            "ratio": statistics.median(wide / own for wide, own in zip(seconds["float32"], seconds[form], strict=True)),
        }
        for form in FORMS
    }


def _losses(arguments: argparse.Namespace, prepared: Any) -> list[dict[str, Any]]:
    from stepquant.calibrate.gram import RoundLayers
    from stepquant.calibrate.reconstruct import RoundBlocks

    results: list[dict[str, Any]] = []
    for start, form in itertools.product(("nearest", "layers"), FORMS):
        for iterations in arguments.iterations:
            if form != "float32" and not iterations:
                continue
            job = _copied(prepared)
            began = time.process_time()
            if start == "layers":
                RoundLayers(arguments.layer_samples, arguments.batch, arguments.together).run(job)
            if iterations:
                RoundBlocks(
                    iterations,
                    arguments.batch,
                    arguments.lr,
                    together=arguments.together,
                    keep_rounding=0.6 if start == "layers" else 0.0,
                    compute=form,  # type: ignore[arg-type]
                ).run(job)
            seconds = time.process_time() - began
            found = {"start": start, "compute": form, "iterations": iterations, "seconds": seconds}
            results.append({**found, "error": _error(arguments, job)})
            print(results[-1], file=sys.stderr, flush=True)
    plain = [r for r in results if r["start"] == "nearest" and r["compute"] == "float32"]
    for result in results:
        wanted = _time_to(plain, result["error"])
        result["speed_up"] = None if wanted is None or not result["seconds"] else wanted / result["seconds"]
    return results


def _error(arguments: argparse.Namespace, job: Any) -> float:
    """Mean squared difference of the prediction to full precision on the images that do not calibrate."""
    import torch

    from stepquant.calibrate.select import at_steps, inputs

    images = range(arguments.samples, 2 * arguments.samples)
    chosen = at_steps(job.handed["trajectories"], list(itertools.product(range(job.steps), images)))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(chosen), arguments.batch):
            positions = range(start, min(start + arguments.batch, len(chosen)))
            args, kwargs = inputs(job.handed["trajectories"], chosen, positions)
            found, wanted = (_tensor(net(*args, **kwargs)) for net in (job.denoiser, job.full_precision))
            total += float((found - wanted).square().flatten(1).mean(1).sum())
    return total / len(chosen)


def _tensor(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", output)


def _time_to(plain: list[dict[str, Any]], error: float) -> float | None:
    """Seconds after which blocks from nearest rounding have this error; None if they never had."""
    for before, after in itertools.pairwise(plain):
        low, high = after["error"], before["error"]
        if low <= error <= high and low < high:
            share = math.log(high / error) / math.log(high / low)
            return float(before["seconds"] + share * (after["seconds"] - before["seconds"]))
    return None


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
        "setting": f"W{arguments.weights}, {arguments.samples} images of {arguments.steps} steps, "
        f"batch {arguments.batch}",
    }


def _table(document: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    lines = [
        f"`{document['command']}`",
        "",
        f"{document['date']}, {document['machine']}; {versions}. {document['model']}, {document['setting']}.",
        "",
        "| compute | iterations per second | ratio |",
        "|---|---|---|",
    ]
    lines += [
        f"| {form} | {found['iterations_per_second']:.1f} | {found['ratio']:.2f} |"
        for form, found in document["speed"].items()
    ]
    lines += ["", "| start | compute | iterations | seconds | error | speed-up |", "|---|---|---|---|---|---|"]
    for result in document["loss"]:
        gain = "" if result["speed_up"] is None else f"{result['speed_up']:.2f}"
        cells = (result["start"], result["compute"], result["iterations"], f"{result['seconds']:.1f}")
        lines.append(f"| {' | '.join(map(str, cells))} | {result['error']:.3e} | {gain} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
