"""How fast block reconstruction runs, and which error and drift each way of starting reaches in how much time.

    python benchmarks/calibration.py [--model digits-unet] [--samples 8] [--batch 8] [--iterations 0 20 60 180 540]
                                     [-o runs/calibration]

Everything is compared with `benchmarks/first_reconstruction.py`, block-wise rounding as straightforward as it can be
written, as it was in the first version; it runs in a process whose allocator is as it was. Times are processor times
(waiting for other work on the machine costs none), taken in turns.

    speed    iterations per second over all units, captures left out; medians, and ratios to "first" of the same round.
             same_result = median over the units of the relative difference between the losses at the end of two fits,
             of "first" and this one; seed_noise = the same between two fits of "first" with other mini-batches.
    ways     a whole stage, captures counted: weights are rounded with blocks for each number of iterations, starting
             from nearest rounding or from `RoundLayers`, in float32 and in bfloat16. 0 iterations is the start itself.
             "layers, biases" corrects biases afterwards, as the presets of `combined` and `accuquant` do.
             error = mean squared difference of the prediction to full precision, drift = relative difference of the
             images at the end, activations in floating point, over images that calibrate nothing. Speed-up = time that
             "first" needs for the same error or drift (between measured points on a logarithmic scale) / own time;
             "first" has it as soon as it was there, even if a longer run ends above. Where it never came so far, the
             time of its longest run takes the place and the speed-up is a lower bound.

With `-o` every measurement is written as it is made, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import math
import multiprocessing
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

FIRST = "first"
FORMS = ("float32", "bfloat16")
BIASES = ", biases"
WAYS = (("nearest", FIRST), *itertools.product(("nearest", "layers", f"layers{BIASES}"), FORMS))
"""Where blocks start from, and what fits them."""

FIGURES = ("error", "drift")


def main() -> None:
    arguments = _arguments()
    document = _begun(arguments)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, context, _prepare, (arguments, False)) as first,
        ProcessPoolExecutor(1, context, _prepare, (arguments, True)) as now,
    ):
        workers = {FIRST: first, **dict.fromkeys(FORMS, now)}
        for number in range(len(document["rounds"]), arguments.rounds):
            turns = (FIRST, *FORMS) if number % 2 else (*FORMS[::-1], FIRST)
            document["rounds"].append({form: workers[form].submit(_round, form, number).result() for form in turns})
            _write(arguments, document)
        done = {(found["start"], found["compute"], found["iterations"]) for found in document["ways"]}
        for iterations, (start, form) in itertools.product(sorted({0, *arguments.iterations}), WAYS):
            repeats_start = iterations == 0 and form == "bfloat16"
            if repeats_start or (start, form, iterations) in done:
                continue
            document["ways"].append(workers[form].submit(_way, start, form, iterations).result())
            print(document["ways"][-1], file=sys.stderr, flush=True)
            _write(arguments, document)
    document["speed"] = _speeds(document["rounds"])
    _speed_up(document["ways"])
    _write(arguments, document)
    print(_table(document))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-unet", help="shipped model, diffusers folder or hub id")
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="images that calibrate; as many again measure")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps that are recorded")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--iterations", type=int, nargs="+", default=[0, 20, 60, 180, 540], help="of a block")
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--layer-samples", type=int, default=64, help="samples of RoundLayers")
    parser.add_argument("--together", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4, help="timed turns of the speed measurement")
    parser.add_argument("--timed", type=int, default=20, help="iterations of each unit in a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="folder for calibration.json and calibration.md")
    arguments = parser.parse_args()
    if arguments.samples % arguments.batch:
        parser.error(f"--samples must be whole batches of {arguments.batch}, found {arguments.samples}.")
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2, for the noise between two seeds.")
    return arguments


def _begun(arguments: argparse.Namespace) -> dict[str, Any]:
    """What an earlier call has measured with the same settings, or an empty document."""
    settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "rounds", "iterations")}
    path = None if arguments.output is None else arguments.output / "calibration.json"
    if path is not None and path.exists():
        document: dict[str, Any] = json.loads(path.read_text())
        if document.get("settings") != settings:
            sys.exit(f"{path} was measured with {document.get('settings')}, not {settings}: choose another folder.")
        return document
    command = " ".join(["python", *sys.argv])
    return {"command": command, **_machine(arguments), "settings": settings, "rounds": [], "ways": []}


def _write(arguments: argparse.Namespace, document: dict[str, Any]) -> None:
    if arguments.output is None:
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    partial = arguments.output / "calibration.json.part"
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(arguments.output / "calibration.json")
    if "speed" in document:
        (arguments.output / "calibration.md").write_text(_table(document) + "\n")


_PREPARED: dict[str, Any] = {}
"""Of a worker: the arguments and the job, and what rounds of the speed measurement share."""


def _prepare(arguments: argparse.Namespace, tuned: bool) -> None:
    """Begin a worker: a job with weights rounded to nearest, of whose recorded images half calibrate."""
    import torch

    from stepquant.allocator import tune_allocator
    from stepquant.api import open_model
    from stepquant.calibrate.stages import FitWeightRanges, Place, Record, Select
    from stepquant.model.families import find_denoiser
    from stepquant.recipe import Job
    from stepquant.run import Run

    torch.set_num_threads(arguments.threads)
    if tuned:
        tune_allocator()
    pipe = open_model(arguments.model)
    _, full_precision = find_denoiser(pipe)
    full_precision.eval()
    job = Job(pipe, full_precision, copy.deepcopy(full_precision).requires_grad_(False), Run(), arguments.steps)
    record = Record(2 * arguments.samples, arguments.batch)
    place = Place(weights=arguments.weights, activations=None)
    for stage in (record, Select(samples_per_step=arguments.samples), place, FitWeightRanges()):
        stage.run(job)
    _PREPARED.update(arguments=arguments, job=job)


def _copied(job: Any) -> Any:
    """The job with a denoiser of its own."""
    from stepquant.recipe import Job

    return Job(
        job.pipe, job.full_precision, copy.deepcopy(job.denoiser), job.run, job.steps, job.arguments, dict(job.handed)
    )


def _round(form: str, number: int) -> dict[str, Any]:
    """Every unit fitted for a few iterations: processor time of an iteration of each, and its loss afterwards."""
    import first_reconstruction
    import torch

    from stepquant.calibrate.reconstruct import Fit, fit_unit, without_input_quantizers

    arguments = _PREPARED["arguments"]
    job, units = _opened(form == FIRST)
    found: dict[str, Any] = {}
    for unit, cache, soft in units:
        start = {name: rounding.alpha.detach().clone() for name, rounding in soft.items()}

        def fitted(iterations: int, unit: Any = unit, cache: Any = cache, soft: Any = soft) -> dict[str, Any]:
            stream = ("benchmark", number)
            if form == FIRST:
                roundings = list(soft.values())
                return first_reconstruction.fit(
                    job, unit, cache, roundings, iterations, arguments.batch, arguments.lr, stream
                )
            fit = Fit(iterations, arguments.batch, arguments.lr, 2.0, 0.01, 0.2, compute=form)  # type: ignore[arg-type]
            return fit_unit(job, unit, cache, fit, soft=soft, stream=stream)

        def reset(soft: Any = soft, start: Any = start) -> None:
            with torch.no_grad():
                for name, rounding in soft.items():
                    rounding.alpha.copy_(start[name])

        with without_input_quantizers(job.denoiser):
            fitted(2)  # warms up
            reset()
            began = time.process_time()
            losses = fitted(arguments.timed)
            seconds = (time.process_time() - began) / arguments.timed
        reset()
        found[unit.name] = {"seconds": seconds, "loss": losses["after"]}
    return found


def _opened(plain: bool) -> tuple[Any, list[tuple[Any, Any, Any]]]:
    """A job whose weights are to be rounded, and its units with their caches and roundings; made once."""
    import first_reconstruction

    from stepquant.calibrate import reconstruct
    from stepquant.calibrate.reconstruct import soft_roundings, soften_all_
    from stepquant.model.layer import QuantizedLayer
    from stepquant.model.surgery import quantized_layers, units_of

    key = f"plain={plain}"
    if key not in _PREPARED:
        job = _copied(_PREPARED["job"])
        batches = reconstruct._batches_of(job, job.handed["calibration"], _PREPARED["arguments"].batch)
        bins = reconstruct._bins_of(job.denoiser, batches)
        units = units_of(job.denoiser, list(job.handed["plan"]))
        names = [unit.name for unit in units]
        caches = dict(reconstruct._caches(job.denoiser, job.full_precision, names, batches, bins, True))
        layers = {n: x for n, x in quantized_layers(job.denoiser).items() if isinstance(x, QuantizedLayer)}
        if plain:
            first_reconstruction.soften_all_(job)
        else:
            soften_all_(job, layers, keep=0.0)
        soft = [soft_roundings({name: layers[name] for name in unit.layers if name in layers}) for unit in units]
        opened = [(unit, caches[unit.name], own) for unit, own in zip(units, soft, strict=True) if own]
        _PREPARED[key] = job, opened
    return _PREPARED[key]  # type: ignore[no-any-return]


def _speeds(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Iterations per second and, beside it, whether the result is the same."""

    def seconds(form: str, number: int) -> float:
        return sum(float(unit["seconds"]) for unit in rounds[number][form].values())

    def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
        return statistics.median(abs(other[unit]["loss"] / one[unit]["loss"] - 1) for unit in one if one[unit]["loss"])

    numbers = range(len(rounds))
    noise = [apart(rounds[n][FIRST], rounds[n + 1][FIRST]) for n in numbers[:-1]]
    return {
        form: {
            "iterations_per_second": statistics.median(len(rounds[n][form]) / seconds(form, n) for n in numbers),
            "ratio": statistics.median(seconds(FIRST, n) / seconds(form, n) for n in numbers),
            "ratios": [seconds(FIRST, n) / seconds(form, n) for n in numbers],
            "same_result": statistics.median(apart(rounds[n][FIRST], rounds[n][form]) for n in numbers),
            "seed_noise": statistics.median(noise),
        }
        for form in (FIRST, *FORMS)
    }


def _way(start: str, form: str, iterations: int) -> dict[str, Any]:
    """Round all weights; how long it took and how good they are."""
    import first_reconstruction

    from stepquant.calibrate.bias_correction import CorrectBiases
    from stepquant.calibrate.gram import RoundLayers
    from stepquant.calibrate.reconstruct import RoundBlocks

    arguments, job = _PREPARED["arguments"], _copied(_PREPARED["job"])
    batch, together = arguments.batch, arguments.together
    began = time.process_time()
    if start.startswith("layers"):
        RoundLayers(arguments.layer_samples, batch, together).run(job)
    if iterations and form == FIRST:
        first_reconstruction.round_blocks(job, iterations, batch, arguments.lr)
    elif iterations:
        keep = 0.6 if start.startswith("layers") else 0.0
        compute: Any = form
        blocks = RoundBlocks(iterations, batch, arguments.lr, together=together, keep_rounding=keep, compute=compute)
        blocks.run(job)
    if start.endswith(BIASES):
        every = job.handed["trajectories"]
        job.handed["trajectories"] = every[: arguments.samples // batch]  # the others measure
        CorrectBiases(batch=batch, judged=arguments.samples).run(job)
        job.handed["trajectories"] = every
    seconds = time.process_time() - began
    found = {"start": start, "compute": form, "iterations": iterations, "seconds": seconds}
    return {**found, "error": _error(job), "drift": _drift(job)}


def _error(job: Any) -> float:
    """Mean squared difference of the prediction to full precision on the images that do not calibrate."""
    import torch

    from stepquant.calibrate.select import at_steps, inputs

    samples, batch = _PREPARED["arguments"].samples, _PREPARED["arguments"].batch
    places = list(itertools.product(range(job.steps), range(samples, 2 * samples)))
    chosen = at_steps(job.handed["trajectories"], places)
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(chosen), batch):
            positions = range(start, min(start + batch, len(chosen)))
            args, kwargs = inputs(job.handed["trajectories"], chosen, positions)
            found, wanted = (_tensor(net(*args, **kwargs)) for net in (job.denoiser, job.full_precision))
            total += float((found - wanted).square().flatten(1).mean(1).sum())
    return total / len(chosen)


def _tensor(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", output)


def _drift(job: Any) -> float:
    """|x_quantized - x| / |x| at the end of sampling, of the images that do not calibrate."""
    import torch

    from stepquant.calibrate.trajectory import replay

    arguments = _PREPARED["arguments"]
    apart = size = 0.0
    with torch.no_grad():
        for trajectory in job.handed["trajectories"][arguments.samples // arguments.batch :]:
            steps = len(trajectory.steps)
            wanted = trajectory.steps[steps - 1].next_sample.double()
            found = [state.sample for state in replay(job.denoiser, trajectory, 0, steps)][-1].double()
            apart, size = apart + float((found - wanted).square().sum()), size + float(wanted.square().sum())
    return math.sqrt(apart / size)


def _speed_up(ways: list[dict[str, Any]]) -> None:
    """Put to every way how much sooner it reached its error and drift than the straightforward implementation."""
    plain = sorted((way for way in ways if way["compute"] == FIRST), key=lambda way: int(way["iterations"]))
    for way, figure in itertools.product(ways, FIGURES):
        wanted, reached = _time_to(plain, figure, way[figure])
        started = way["iterations"] or way["start"] != "nearest"
        way[f"speed_up_{figure}"] = {"ratio": wanted / way["seconds"], "lower_bound": not reached} if started else None


def _time_to(plain: list[dict[str, Any]], figure: str, value: float) -> tuple[float, bool]:
    """Seconds after which the straightforward way was this good; those of its longest run if it never was."""
    if plain[0][figure] <= value:
        return float(plain[0]["seconds"]), True
    for before, after in itertools.pairwise(plain):
        # The first to be as good: what precedes it is not.
        low, high = after[figure], before[figure]
        if low <= value:
            share = math.log(high / value) / math.log(high / low)
            return float(before["seconds"] + share * (after["seconds"] - before["seconds"])), True
    return float(plain[-1]["seconds"]), False


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
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
        "| compute | iterations per second | ratio | same result | seed noise |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {form} | {found['iterations_per_second']:.1f} | {found['ratio']:.2f} | {found['same_result']:.1e} "
        f"| {found['seed_noise']:.1e} |"
        for form, found in document["speed"].items()
    ]
    lines += [
        "",
        "| start | compute | iterations | seconds | error | drift | speed-up to this error | to this drift |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in document["ways"]:
        gains = [
            "" if gain is None else f"{'> ' if gain['lower_bound'] else ''}{gain['ratio']:.2f}"
            for gain in (way[f"speed_up_{figure}"] for figure in FIGURES)
        ]
        cells = (way["start"], way["compute"], way["iterations"], f"{way['seconds']:.1f}", f"{way['error']:.3e}")
        lines.append(f"| {' | '.join(map(str, cells))} | {way['drift']:.4f} | {' | '.join(gains)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
