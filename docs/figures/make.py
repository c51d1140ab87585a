"""The figures of docs/how_it_works.md.

    python docs/figures/make.py measure     # minutes: samples, quantizes and writes measured.json
    python docs/figures/make.py draw        # seconds: measured.json -> the SVG files beside it

Two figures are schematic and need no numbers; the others show what `measure` found, and what it was measured on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

HERE = Path(__file__).parent
MEASURED = HERE / "measured.json"

MODEL = "digits-unet"
BITS = (4, 8)
STEPS = 20
EVALUATION_SEED = 1000

FULL, QUANTIZED, CORRECTED, GREY = "#1b6f9c", "#c4501b", "#3c8d40", "#8a8a8a"


def measure(args: argparse.Namespace) -> None:
    """Sample, quantize, correct; only curves are kept."""
    import torch

    from stepquant.api import compensate, open_model, quantize, sample
    from stepquant.calibrate.trajectory import record, seal
    from stepquant.evaluate.drift import measure_drift
    from stepquant.methods import METHODS
    from stepquant.model.correction import correction_of
    from stepquant.run import Run

    pipe = open_model(args.model)
    denoiser = pipe.unet.eval()
    seeds = list(range(EVALUATION_SEED, EVALUATION_SEED + args.images))
    largest = _largest_inputs(denoiser, lambda: sample(pipe, seeds=seeds, steps=args.steps, batch_size=len(seeds)))
    recorded = record(pipe, denoiser, seeds=seeds, steps=args.steps, batch_size=len(seeds), run=Run())
    trajectories = [seal(trajectory) for trajectory in recorded]
    recipe = METHODS["rtn"](weights=BITS[0], activations=BITS[1], samples=args.samples, batch=8, every=2)
    rounded = quantize(pipe, recipe, steps=args.steps, run=Run())
    corrected = compensate(rounded.pipe, pipe, steps=args.steps, samples=args.samples, batch=8, run=Run())
    without = measure_drift(rounded.pipe.unet, trajectories)
    with_correction = measure_drift(corrected.pipe.unet, trajectories, correction_of(corrected.pipe.scheduler))
    document = {
        "command": "python docs/figures/make.py measure",
        "model": args.model,
        "bits": "W{}A{}".format(*BITS),
        "steps": args.steps,
        "seeds": [seeds[0], seeds[-1]],
        "samples": args.samples,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "drift": _rounded(without.to_dict()),
        "corrected": _rounded(with_correction.to_dict()),
        "chosen": corrected.figures[-1]["chosen"],
        "largest_inputs": _rounded(_three(largest)),
    }
    args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _largest_inputs(denoiser: Any, run: Callable[[], object]) -> dict[str, list[float]]:
    """Largest absolute value that enters each convolution and linear layer, call by call."""
    from torch import nn

    found: dict[str, list[float]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, args: found.setdefault(name, []).append(float(args[0].abs().max()))

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _three(largest: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The layers whose inputs change most, as the median layer's do, and least over the steps."""
    ordered = sorted(largest, key=lambda name: -max(largest[name]) / min(largest[name]))
    return {name: largest[name] for name in (ordered[0], ordered[len(ordered) // 2], ordered[-1])}


def _rounded(curves: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {name: [float(f"{value:.4g}") for value in curve] for name, curve in curves.items()}


def chain(axes: Axes, _measured: Mapping[str, Any]) -> None:
    """Schematic: one error a step, carried on."""
    exact = [1.0, 0.86, 0.74, 0.64, 0.56, 0.5]
    off = [0.0, 0.03, 0.075, 0.13, 0.19, 0.26]
    steps = range(len(exact))
    axes.plot(steps, exact, "o-", color=FULL, label="full precision")
    axes.plot(steps, [a + b for a, b in zip(exact, off, strict=True)], "o-", color=QUANTIZED, label="quantized")
    for step in range(len(exact) - 1):
        landed = exact[step + 1] + 0.035
        axes.annotate(
            "", (step + 1, landed), (step, exact[step]), arrowprops={"arrowstyle": "->", "ls": ":", "color": GREY}
        )
    axes.annotate("", (5.12, exact[-1] + off[-1]), (5.12, exact[-1]), arrowprops={"arrowstyle": "<->", "color": GREY})
    axes.text(5.2, exact[-1] + off[-1] / 2, "drift", va="center", color=GREY)
    axes.set(xticks=list(steps), xticklabels=["noise", *["step"] * 4, "image"], yticks=[], xlim=(-0.3, 5.9))
    axes.legend(frameon=False, loc="upper right")
    axes.set_title("Schematic: dotted, one quantized step from the full-precision state")


def windows(axes: Axes, _measured: Mapping[str, Any]) -> None:
    """Schematic: four windows of five steps."""
    exact = [1.0 - 0.72 * (step / 20) ** 0.8 for step in range(21)]
    axes.plot(range(21), exact, color=FULL, label="recorded, full precision")
    for start in range(0, 20, 5):
        axes.axvspan(start, start + 5, color=GREY, alpha=0.18 if (start // 5) % 2 else 0.06, lw=0)
        walked = [exact[start + step] + 0.004 * step**1.9 for step in range(6)]
        axes.plot(range(start, start + 6), walked, color=QUANTIZED, label="simulated, quantized" if not start else None)
        ends = (exact[start + 5], walked[-1])
        axes.plot([start + 5] * 2, ends, color="black", lw=2, label="what the loss sees" if not start else None)
    axes.set(xlabel="sampling step", yticks=[], xticks=range(0, 21, 5), xlim=(0, 20.3))
    axes.legend(frameon=False, loc="upper right")
    axes.set_title("Schematic: windows of 5 steps, each from the recorded state")


def drift(axes: Axes, measured: Mapping[str, Any]) -> None:
    """Measured: error of single steps, their sums, and what is there."""
    curves = measured["drift"]
    steps = range(1, len(curves["one_step"]) + 1)
    axes.plot(steps, curves["coherent"], "--", color=GREY, label="all errors in one direction (coherent)")
    axes.plot(steps, curves["accumulated"], color=QUANTIZED, lw=2, label="drift that is there")
    axes.plot(steps, curves["incoherent"], ":", color=GREY, label="independent errors (incoherent)")
    axes.plot(steps, curves["one_step"], color=FULL, label="error of this step alone")
    axes.set(xlabel="sampling step", ylabel="RMS of the sample", xlim=(1, len(steps)), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper left")
    axes.set_title(_caption(measured, "round to nearest"))


def rows(axes: Axes, measured: Mapping[str, Any]) -> None:
    """Measured: how the inputs of three layers change over the steps."""
    for (name, largest), color in zip(measured["largest_inputs"].items(), (QUANTIZED, FULL, GREY), strict=True):
        axes.plot(range(1, len(largest) + 1), largest, color=color, label=name)
    axes.set(xlabel="sampling step", ylabel="largest |input|", xlim=(1, measured["steps"]), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize="small")
    axes.set_title(f"{measured['model']} in full precision: layers that change most, median, least")


def correction(axes: Axes, measured: Mapping[str, Any]) -> None:
    """Measured: drift with and without a correction of every step."""
    steps = range(1, measured["steps"] + 1)
    axes.plot(steps, measured["drift"]["accumulated"], color=QUANTIZED, label="round to nearest")
    label = "the same with a correction of every step"
    axes.plot(steps, measured["corrected"]["accumulated"], color=CORRECTED, label=label)
    axes.set(xlabel="sampling step", ylabel="drift, RMS of the sample", xlim=(1, len(steps)), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper left")
    axes.set_title(_caption(measured, "corrected predictions"))


def _caption(measured: Mapping[str, Any], what: str) -> str:
    first, last = measured["seeds"]
    return f"{measured['model']}, {measured['bits']}, {what}, n = {last - first + 1}"


FIGURES: dict[str, Callable[[Axes, Mapping[str, Any]], None]] = {
    "chain": chain,
    "drift": drift,
    "rows": rows,
    "windows": windows,
    "correction": correction,
}


def draw(args: argparse.Namespace) -> None:
    """One SVG a figure, with text as text and no date, so that drawing again changes nothing."""
    measured = json.loads(args.json.read_text(encoding="utf-8"))
    args.into.mkdir(parents=True, exist_ok=True)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "stepquant", "font.size": 10, "axes.titlesize": 10}
    with mpl.rc_context(settings):
        for name, function in FIGURES.items():
            figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
            axes.spines[["top", "right"]].set_visible(False)
            function(axes, measured)
            figure.savefig(args.into / f"{name}.svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("measure")
    first.add_argument("--model", default=MODEL)
    first.add_argument("--steps", type=int, default=STEPS)
    first.add_argument("--images", type=int, default=16)
    first.add_argument("--samples", type=int, default=16, help="images to calibrate on")
    second = commands.add_parser("draw")
    second.add_argument("--into", type=Path, default=HERE)
    for command in (first, second):
        command.add_argument("--json", type=Path, default=MEASURED)
    args = parser.parse_args(arguments)
    {"measure": measure, "draw": draw}[args.command](args)


if __name__ == "__main__":
    main()
