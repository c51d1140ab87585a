"""Equal average bits, chosen in different ways: the final drift on seeds that no calibration has seen.

    python benchmarks/bits.py run [--model faces64] [--bits 4 3] [--methods rtn accuquant]
    python benchmarks/bits.py run --activations 4 --free weights activations --bits 4 --json benchmarks/bits-time.jsonl
    python benchmarks/bits.py run --quick --json runs/bits-quick.jsonl
    python benchmarks/bits.py table --into docs/bits.md

Variants, all with the average bits of `uniform`, first and last layer at 8 bits as there:

    uniform        the same bits in every other layer
    mse            least sum of mean squared errors of the layers' own outputs
    relative_mse   the same, relative to the outputs
    incoherent     least final drift to first order, errors of steps independent
    final          least final drift to first order (`stepquant quantize --target`, without measured changes)
    refined        the same with measured changes (`--target` as it is)
    steps          as final, activations with bits of their own in each of `--step-groups` groups of timesteps

Activations stay in floating point unless `--activations` says otherwise, so that nothing but the bits of weights
differs. With `--free activations` their bits are chosen too (or alone), at the average of `uniform`; `steps` needs it.
`run` appends one line per (bits, method, variant, calibration seed) and skips what is there, so it can be killed and
started again. Lines of other settings stay in the file; `table` shows those that agree with the last line. `--quick` is
one seed, few images: minutes on one core, and differences of a few per cent mean nothing there.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from faces64_model import open_by_name

from stepquant.allocator import tune_allocator
from stepquant.calibrate.allocation import Allocate, allocated
from stepquant.calibrate.sensitivity import final_drift
from stepquant.calibrate.stages import Record, calibration_seeds
from stepquant.calibrate.trajectory import Trajectory, record, seal
from stepquant.evaluate.features import weights_identity
from stepquant.methods import METHODS
from stepquant.model.families import find_denoiser
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import Plan, quantized_layers
from stepquant.recipe import Job, Recipe
from stepquant.run import Run

VARIANTS = ("uniform", "mse", "relative_mse", "incoherent", "final", "refined", "steps")
EVALUATION_SEED = 1000
STEPS = {"digits-unet": 20, "faces64": 12}
QUICK: dict[str, Any] = {
    "seeds": [0],
    "bits": [4],
    "methods": ["rtn"],
    "variants": ["uniform", "final", "mse", "relative_mse", "steps"],
    "images": 16,
    "samples": 8,
    "batch": 4,
    "sensitivity": 4,
    "projections": 4,
    "refine": 0,
}


def settings(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """What the method's function takes beside bits."""
    activations = None if args.activations >= 16 else args.activations
    common: dict[str, Any] = {"samples": args.samples, "batch": args.batch, "activations": activations}
    if method == "rtn":
        return common
    if method != "accuquant":
        raise SystemExit(f"--methods: rtn or accuquant, found {method!r}")
    windows = {
        "layer_rounding": True,
        "block_iterations": 0,
        "together": 4,
        "window": 5 if args.model != "faces64" else 3,
    }
    return common | windows | {"iterations": args.iterations, "lr_weights": 1e-2, "lr_scales": 1e-2}


def recipe_of(
    args: argparse.Namespace, method: str, variant: str, bits: int, weights: float, activations: float
) -> Recipe:
    """weights, activations: average bits of `uniform`."""
    recipe = METHODS[method](weights=bits, **settings(args, method))
    if variant == "uniform":
        return recipe
    return allocated(
        recipe,
        weight_bits=weights if "weights" in args.free else None,
        activation_bits=activations if "activations" in args.free else None,
        step_groups=args.step_groups if variant == "steps" else 1,
        score="final" if variant in ("refined", "steps") else variant,
        samples=args.sensitivity,
        projections=args.projections,
        held_out=args.batch,
        refine=args.refine if variant == "refined" else 0,
    )


def average_bits(plan: Plan, denoiser: torch.nn.Module) -> float:
    """Average bits of the weights of all quantized layers; none of them is in floating point here, or 32 count."""
    sizes = {name: x.weight.numel() for name, x in quantized_layers(denoiser).items() if isinstance(x, QuantizedLayer)}
    spent = sum(
        count * (32 if (spec := plan[name].weight if name in plan else None) is None else spec.bits)
        for name, count in sizes.items()
    )
    return spent / sum(sizes.values())


@torch.no_grad()
def average_activation_bits(denoiser: torch.nn.Module, reference: Trajectory) -> float:
    """Average bits of what enters the layers in one call, and over the steps; 32 count where nothing is quantized."""
    call, sizes = reference.steps[0].calls[0], dict[str, int]()
    layers = quantized_layers(denoiser)

    def count(name: str) -> Any:
        return lambda _module, inputs: sizes.update({name: sum(x.numel() for x in inputs)})

    handles = [layer.register_forward_pre_hook(count(name)) for name, layer in layers.items()]
    denoiser(*call.args, **call.kwargs)
    for handle in handles:
        handle.remove()
    spent = 0.0
    for name, size in sizes.items():
        quantizer = layers[name].input_quantizer
        if not isinstance(quantizer, InputQuantizer):
            spent += 32 * size
            continue
        rows = quantizer.row_of_bin.tolist()  # every step has a bin of its own with the shipped schedulers
        spent += size * sum(quantizer.bits[row] for row in rows) / len(rows)
    return spent / sum(sizes.values())


def quantized(
    pipe: Any, denoiser: torch.nn.Module, recipe: Recipe, recorded: list[Trajectory], seed: int, steps: int
) -> Job:
    """Run a recipe on trajectories that are recorded already."""
    job = Job(pipe, denoiser, copy.deepcopy(denoiser).requires_grad_(False), Run(seed=seed), steps)
    job.handed["trajectories"] = recorded
    job.handed["figures"] = []
    for stage in recipe.stages:
        if not isinstance(stage, Record):
            found = stage.run(job)
            job.handed["figures"] += [found] if isinstance(stage, Allocate) else []
    for layer in quantized_layers(job.denoiser).values():
        if isinstance(layer, QuantizedLayer):
            layer.harden_()
    return job


def run(args: argparse.Namespace) -> None:
    tune_allocator()
    torch.set_num_threads(args.threads)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    if "activations" not in args.free:
        args.variants = [variant for variant in args.variants if variant != "steps"]
    elif args.activations >= 16:
        raise SystemExit("--free activations needs --activations of 2 to 8: their average is the budget.")
    pipe, steps = open_by_name(args.model, args.weights), args.steps or STEPS.get(args.model, 20)
    _, denoiser = find_denoiser(pipe)
    denoiser.eval()
    identity = weights_identity(denoiser)[:12]
    seeds = list(range(EVALUATION_SEED, EVALUATION_SEED + args.images))

    def record_all(chosen: list[int], batch: int) -> list[Trajectory]:
        found = record(pipe, denoiser, seeds=chosen, steps=steps, batch_size=min(batch, len(chosen)), run=Run())
        return [seal(trajectory) for trajectory in found]

    reference: list[Trajectory] = []
    for seed in args.seeds:
        recorded: list[Trajectory] = []
        for bits in args.bits:
            for method in args.methods:
                average = of_activations = 0.0
                for variant in dict.fromkeys(["uniform", *args.variants]):
                    place = {
                        "model": args.model,
                        "weights": identity,
                        "bits": f"W{bits}A{args.activations}",
                        "method": method,
                        "variant": variant,
                        "seed": seed,
                        "n": args.images,
                        "steps": steps,
                        "samples": args.samples,
                        "sensitivity": [args.sensitivity, args.projections, args.refine],
                        "iterations": 0 if method == "rtn" else args.iterations,
                        "free": args.free,
                        "step_groups": args.step_groups if variant == "steps" else 1,
                    }
                    known = next((row for row in rows_of(args.json) if place.items() <= row.items()), None)
                    if known is None:
                        recorded = recorded or record_all(calibration_seeds(seed, args.samples), args.batch)
                        reference = reference or record_all(seeds, 16)
                        began = time.perf_counter()
                        recipe = recipe_of(args, method, variant, bits, average, of_activations)
                        job = quantized(pipe, denoiser, recipe, recorded, seed, steps)
                        seconds = time.perf_counter() - began
                        known = place | measured(job, reference, seconds)
                        with args.json.open("a") as file:
                            file.write(json.dumps(known) + "\n")
                    if variant == "uniform":
                        average, of_activations = known["average_bits"], known["average_activation_bits"]
                    shown = f"{known['drift_final']:.4f} ± {known['standard_error']:.4f}"
                    print(known["bits"], method, f"{variant:12}", f"seed {seed}  drift {shown}", flush=True)


@torch.no_grad()
def measured(job: Job, reference: list[Trajectory], seconds: float) -> dict[str, Any]:
    drift = final_drift(job.denoiser, reference, lambda _done: None)
    figures = job.handed["figures"]
    return {
        "drift_final": float(drift.mean()),
        "standard_error": float(drift.std() / len(drift) ** 0.5),
        "average_bits": average_bits(job.handed["plan"], job.denoiser) if not figures else figures[0]["weight_bits"],
        "average_activation_bits": average_activation_bits(job.denoiser, reference[0]),
        "predicted_drift": figures[0]["predicted_drift"] if figures else None,
        "measured": figures[0]["measured"] if figures else None,
        "rules": {rule["pattern"]: [rule["weights"], rule["activations"]] for rule in figures[0]["rules"]}
        if figures
        else None,
        "seconds": round(seconds, 1),
        "evaluation_seeds": [EVALUATION_SEED, EVALUATION_SEED + sum(one.batch for one in reference) - 1],
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Lines of the file; those from before activations could be free have these settings."""
    before = {"free": ["weights"], "step_groups": 1, "average_activation_bits": None}
    return [before | json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(args: argparse.Namespace) -> None:
    """Mean and half range over calibration seeds, as Markdown; with `--into` between the markers of that page."""
    lines = list(lines_of(rows_of(args.json)))
    if args.into is None:
        print("\n".join(lines))
        return
    from results import put

    put(args.into, "\n".join(lines), f"<!-- {args.marker} -->", f"<!-- /{args.marker} -->")


def lines_of(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The rows that agree with the last in their settings."""
    last = rows[-1]
    same = ("model", "weights", "n", "steps", "samples", "sensitivity", "free")
    rows = [row for row in rows if all(row[name] == last[name] for name in same)]
    yield "| bits | method | variant | bits of weights | of activations | seeds | final drift | predicted |"
    yield "|---|---|---|---|---|---|---|---|"
    for bits, method in dict.fromkeys((row["bits"], row["method"]) for row in rows):
        for variant in VARIANTS:
            group = [row for row in rows if (row["bits"], row["method"], row["variant"]) == (bits, method, variant)]
            if not group:
                continue
            average = statistics.mean(row["average_bits"] for row in group)
            foretold = [row["predicted_drift"] for row in group if row["predicted_drift"] is not None]
            activations = [row["average_activation_bits"] for row in group]
            told = "" if None in activations or min(activations) >= 16 else f"{statistics.mean(activations):.3f}"
            cells = [f"{average:.3f}", told, str(len(group)), spread([row["drift_final"] for row in group])]
            yield f"| {bits} | {method} | {variant} | {' | '.join(cells)} | {spread(foretold) if foretold else ''} |"
    yield ""
    yield (
        f"{last['model']} (weights {last['weights']}), {last['steps']} steps, n = {last['n']} images of seeds "
        f"{last['evaluation_seeds'][0]}-{last['evaluation_seeds'][1]}, {last['samples']} calibration images, "
        f"{last['sensitivity'][0]} of them with {last['sensitivity'][1]} vectors each for sensitivities, "
        f"{last['machine']}, torch {last['torch']}, {last['date']}."
    )


def spread(values: list[float]) -> str:
    """`mean ± half the range`, or the value where there is one."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {(max(values) - min(values)) / 2:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("run")
    first.add_argument("--model", default="digits-unet", help="digits-unet, faces64, or what open_model takes")
    first.add_argument("--weights", type=Path, help="weights of faces64")
    first.add_argument("--bits", type=int, nargs="+", default=[4, 3], help="of uniform; its average is the budget")
    first.add_argument("--activations", type=int, default=16, help="2 to 8, or 16 for floating point")
    first.add_argument(
        "--free", nargs="+", default=["weights"], choices=["weights", "activations"], help="whose bits are chosen"
    )
    first.add_argument("--step-groups", type=int, default=4, help="groups of timesteps of the variant steps")
    first.add_argument("--methods", nargs="+", default=["rtn"])
    first.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    first.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration")
    first.add_argument("--images", type=int, default=64, help="held-out images to measure on")
    first.add_argument("--samples", type=int, default=64, help="calibration images")
    first.add_argument("--batch", type=int, default=16)
    first.add_argument("--sensitivity", type=int, default=16, help="calibration images for sensitivities")
    first.add_argument("--projections", type=int, default=4)
    first.add_argument("--refine", type=int, default=8, help="measured changes of the variant refined")
    first.add_argument("--iterations", type=int, default=50, help="windows of accuquant")
    first.add_argument("--steps", type=int, help="sampling steps")
    first.add_argument("--threads", type=int, default=1)
    first.add_argument("--quick", action="store_true")
    first.add_argument("--json", type=Path, default=Path(__file__).with_name("bits.jsonl"))
    second = commands.add_parser("table")
    second.add_argument("--json", type=Path, default=Path(__file__).with_name("bits.jsonl"))
    second.add_argument("--into", type=Path, help="page to put the table into")
    second.add_argument("--marker", default="table", help="name of the place on that page")
    args = parser.parse_args()
    if args.command == "run" and args.quick:
        vars(args).update(QUICK)
    {"run": run, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
