"""The quality table: every method at every bit setting, on held-out seeds, over several calibration seeds.

    python benchmarks/results.py run [--bits W4A8,W4A4] [--methods "rtn;rtn+cec"] [--part 1/2] [--json FILE]
    python benchmarks/results.py table --into docs/results.md
    python benchmarks/results.py pages --folder docs/methods
    python benchmarks/results.py memory [--methods "rtn;rtn+cec"]
    python benchmarks/results.py grid [--methods "rtn;combined"] [--bits W4A8] --into FILE.png

`run` appends one line per (bits, method, calibration seed) and skips what is there, so it can be killed and started
again, and several parts can run side by side. Lines of other weights, revisions, budgets or numbers of images stay in
the file; `table` shows those of the present revision that agree with the last line. The rows that the pages show are in
`benchmarks/results.jsonl`, part of the repository. Every learning method gets the same number of network evaluations
(`--evaluations`, forward passes of one image; a backward pass counts as two). `--model faces64` needs weights that are
not part of the repository, and has its own, smaller numbers (`CASES`).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from faces64_model import field_colours, open_by_name

from stepquant.allocator import tune_allocator
from stepquant.api import Quantized, compensate, quantize, sample
from stepquant.calibrate import ranges
from stepquant.calibrate.aligned import AlignLayers
from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.trajectory import record, seal
from stepquant.checkpoint import TENSORS_NAME
from stepquant.evaluate.drift import measure_drift
from stepquant.evaluate.features import DigitFeatures, weights_identity
from stepquant.evaluate.frechet import FeatureStatistics, frechet_distance
from stepquant.evaluate.images import to_grid
from stepquant.evaluate.paired import PairedMetrics
from stepquant.methods import ADD_ONS, METHODS, PRESETS
from stepquant.model.correction import correction_of
from stepquant.model.families import find_denoiser
from stepquant.numerics.spec import parse_bits
from stepquant.recipe import Recipe
from stepquant.run import Run

REVISIONS = {"W8A8": 3}
"""By bits, `REVISION` if not named. Goes up with every entry under "Numbers changed" of CHANGELOG.md that these rows
would show: older rows differ. W8A8: 1 had zero points in all weights."""

REVISION = 2
"""1 (W8A8: 2) had ranges of activations whose search counted the extremes a thousand times too much."""

BLOCKWISE = ("q_diffusion", "gac", "ptq4dm", "pqd", "eda_dm", "pcr", "tfmq_dm")
"""Methods that round weights block by block: one revision more, because blocks were captured in fours, of which three
did not see what the rounding before them did. So are variants of others with blocks in their name."""

SCALED = ("q_diffusion", "gac")
"""Methods that learn activation scales block by block: one revision more, because they learn by differences, where they
are not told to do so straight through."""

IN_PARTS = ("faces64",)
"""Models with layers of more than 6,000 inputs to an output: one revision more for what rounds layers from Gram
matrices, which left these layers rounded to nearest (23 % of the weights of faces64)."""

OLDER = 'Of an older revision (CHANGELOG.md, "Numbers changed"): not measured again yet.'

ROWS = Path(__file__).with_suffix(".jsonl")
MOST_BITS = 8
EVALUATION_SEED = 1000


@dataclass(frozen=True)
class Case:
    """What a model is calibrated with and judged on."""

    steps: int = 20
    samples: int = 64
    """Images of calibration, and `batch` of them at a time."""
    batch: int = 8
    judged: int = 32
    """Images on which a method compares what it made with what it had."""
    evaluations: int = 8000
    """Of the network, for learning by gradients; `--evaluations` has another number."""
    images: int = 128
    """Held out, and `drift_images` of them for drift; `--images` has another number."""
    drift_images: int = 64
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the pipeline's call. Classes follow from the seeds."""


CASES = {
    "digits-dit": Case(arguments={"guidance_scale": 1.5}),
    "faces64": Case(steps=12, samples=8, batch=4, judged=8, evaluations=2400, images=16, drift_images=8),
}
"""Where a model has its own."""


def case_of(model: str) -> Case:
    return CASES.get(model, Case())


ACCUQUANT: dict[str, Any] = {
    "gradient": "identity",
    "window": 5,
    "learn_weights": False,
    "lr_weight_scales": 2e-3,
    "rows": "step",
    "free_run": 1.0,
    "correct_biases": True,
    "judged": 32,
}
"""As the presets quick and standard have it."""

PAPERS: dict[str, Any] = {
    "free_run": 0.0,
    "rows": "shared",
    "learn_weights": True,
    "lr_weight_scales": 0.0,
    "correct_biases": False,
    "judged": 0,
}
"""AccuQuant as the paper has it, as far as it says."""

STATIC: dict[str, Any] = {
    "balance": True,
    "rows": "step",
    "learn_weights": False,
    "lr_weight_scales": 2e-3,
    "free_run": 1.0,
    "judged": 32,
}
"""`combined` as its presets have it: ranges of activations fitted beforehand."""

AS_THEY_ARE = ", weight scales as they are"
KEPT: dict[str, Any] = {"lr_weight_scales": 0.0}
"""Windows learn the scales of activations alone."""

BLOCKS: dict[str, Any] = {"blocks": 2 / 3}
"""Two thirds of the budget go to block-wise rounding, before the windows."""

BRANCHED: dict[str, Any] = STATIC | {"low_rank": 8}
"""The same with a branch of low rank beside every weight."""

FEW_SAMPLES: dict[str, Any] = {"rounds": 2, "focus": 12}
"""A search of 2 * (20 + 12) mini-batches of 8 samples, of which the choice of timesteps decides 24."""

CORRECTIONS: dict[str, dict[str, Any]] = {
    "bias": {"estimator": "bias"},
    "scale": {"estimator": "scale"},
    "scale, gamma 1": {"estimator": "scale", "gamma": 1},
    "free run": {"estimator": "free_run"},
    "closed loop": {"estimator": "closed_loop"},
    "trajectory": {"estimator": "trajectory"},
    "regression": {"estimator": "regression"},
    "auto": {"estimator": "auto"},
}
"""Estimators of corrections, by the end of a variant's name."""

STRAIGHT = ", straight-through scales"

ROWS_FIRST = "q_diffusion, layers first, a row per step"

BY_BLOCKS: dict[str, dict[str, Any]] = {
    "q_diffusion": {},
    "q_diffusion, layers first": {"layer_rounding": True},
    ROWS_FIRST: {"layer_rounding": True, "rows": "step"},
}

UNET_METHODS = ("ptq4dm", "pqd", "eda_dm", "pcr", "tfmq_dm", "tdq", "tcaq_dm")
TRANSFORMER_METHODS = ("svdquant", "ptq4dit", "vidit_q", "mixdq", "lsgquant")
"""Methods around the seeds, by what they are made for; all of them run on both models."""

BITS = ("W8A8", "W4A8", "W6A6", "W4A4", "W3A6")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "rtn, a row per step": ("rtn", {"rows": "step"}),
    "layerwise, one row": ("layerwise", {"rows": "shared", "correct_biases": False}),
    "layerwise, biases as they are": ("layerwise", {"correct_biases": False}),
    "layerwise": ("layerwise", {}),
    "layerwise+ptqd": ("layerwise+ptqd", {}),
    "layerwise+d2_dpm": ("layerwise+d2_dpm", {}),
    "layerwise+tac": ("layerwise+tac", {}),
    "rtn+ptqd": ("rtn+ptqd", {}),
    "rtn+d2_dpm": ("rtn+d2_dpm", {}),
    "rtn+tac": ("rtn+tac", {}),
    "rtn+tac, gains at the input": ("rtn+tac", {"correction": {"target": "input"}}),
    **{name: ("q_diffusion", options) for name, options in BY_BLOCKS.items()},
    **{
        name + STRAIGHT: ("q_diffusion", options | {"scale_gradient": "straight"})
        for name, options in BY_BLOCKS.items()
    },
    **{method: (method, {}) for method in (*UNET_METHODS, *TRANSFORMER_METHODS)},
    **{f"{method}, one row": (method, {"rows": "shared"}) for method in ("ptq4dm", "pqd", "eda_dm", "tcaq_dm")},
    f"{ROWS_FIRST}, scales as searched": ("q_diffusion", BY_BLOCKS[ROWS_FIRST] | {"iterations_activations": 0}),
    **{
        f"{name}, corrected by {estimator}": (f"{method}+cec", options | {"correction": CORRECTIONS[estimator]})
        for name, method, options, estimators in (
            ("rtn", "rtn", {}, CORRECTIONS),
            ("q_diffusion", "q_diffusion", {}, ("auto",)),
            ("accuquant identity M=5", "accuquant", ACCUQUANT, ("auto",)),
            ("combined", "combined", STATIC, ("auto",)),
        )
        for estimator in estimators
    },
    "gac, layers first": ("gac", {"layer_rounding": True}),
    "gac, layers first, a row per step": ("gac", {"layer_rounding": True, "rows": "step"}),
    "adp_dm, layers first": ("adp_dm", {"rounding": "layers"}),
    **{
        f"adp_dm, layers first, timesteps by {choose}": ("adp_dm", {"rounding": "layers", "choose": choose})
        for choose in ("count", "mmd", "random")
    },
    **{
        f"adp_dm, layers first, 512 samples{name}": ("adp_dm", {"rounding": "layers"} | FEW_SAMPLES | options)
        for name, options in (("", {}), (", timesteps by random", {"choose": "random"}))
    },
    **{
        f"accuquant {gradient} M={window}{extra}": (
            "accuquant",
            ACCUQUANT | {"gradient": gradient, "window": window} | options,
        )
        for extra, options in (
            ("", {}),
            (AS_THEY_ARE, KEPT),
            (", blocks first", BLOCKS),
            (f", blocks first{AS_THEY_ARE}", BLOCKS | KEPT),
        )
        for gradient in ("identity", "exact", "per_step")
        for window in (5, 2, 10, 20, 1)
    },
    "accuquant identity M=5, biases as they are": ("accuquant", ACCUQUANT | {"correct_biases": False}),
    "accuquant identity M=5, unjudged": ("accuquant", ACCUQUANT | {"judged": 0}),
    "accuquant identity M=5, from full precision": ("accuquant", ACCUQUANT | {"free_run": 0.0}),
    "accuquant identity M=5, scales by differences": ("accuquant", ACCUQUANT | {"scale_gradient": "difference"}),
    "accuquant identity M=5, one row": ("accuquant", ACCUQUANT | {"rows": "shared"}),
    "accuquant identity M=5, rounding too": ("accuquant", ACCUQUANT | KEPT | {"learn_weights": True}),
    "accuquant identity M=5, the paper's": ("accuquant", ACCUQUANT | PAPERS),
    "svdquant, static": ("svdquant", {"dynamic": False}),
    "svdquant, rank 8": ("svdquant", {"rank": 8}),
    "combined": ("combined", STATIC),
    **{f"combined M={window}": ("combined", STATIC | {"window": window}) for window in (1, 2, 10)},
    "combined, scales by differences": ("combined", STATIC | {"scale_gradient": "difference"}),
    f"combined{AS_THEY_ARE}": ("combined", STATIC | KEPT),
    "combined, blocks first": ("combined", STATIC | BLOCKS),
    f"combined, blocks first{AS_THEY_ARE}": ("combined", STATIC | BLOCKS | KEPT),
    "combined, blocks first, without windows": ("combined", STATIC | BLOCKS | {"window_iterations": 0}),
    "combined without windows": ("combined", STATIC | {"window_iterations": 0}),
    "combined without biases": ("combined", STATIC | {"correct_biases": False}),
    "combined without windows and biases": ("combined", STATIC | {"window_iterations": 0, "correct_biases": False}),
    "combined without rows": ("combined", STATIC | {"rows": "shared"}),
    "combined without layer rounding": ("combined", STATIC | {"layer_rounding": False}),
    "combined without balance": ("combined", STATIC | {"balance": False}),
    "combined, dynamic": ("combined", STATIC | {"dynamic": True, "balance": False, "window_iterations": 0}),
    "combined, rank 8": ("combined", BRANCHED),
    "combined, rank 8, without windows": ("combined", BRANCHED | {"window_iterations": 0}),
    "combined, rank 8, without balance": ("combined", BRANCHED | {"window_iterations": 0, "balance": False}),
    "combined, rank 8, without biases": ("combined", BRANCHED | {"window_iterations": 0, "correct_biases": False}),
    "combined, rank 8, without rows": ("combined", BRANCHED | {"window_iterations": 0, "rows": "shared"}),
    "combined, rank 32, without windows": ("combined", BRANCHED | {"window_iterations": 0, "low_rank": 32}),
    "combined with a row per window": ("combined", STATIC | {"rows": "window", "row_windows": (5, 5, 5, 5)}),
    "combined with row groups": ("combined", STATIC | {"rows": "groups"}),
    "combined with blocks": (
        "combined",
        STATIC | {"block_iterations": 222, "block_lr": 1e-2, "scale_iterations": 111, "scale_lr": 5e-3},
    ),
    "combined with weighted blocks": ("combined", STATIC | {"block_iterations": 100, "sample_weights": True}),
    "combined with block scales": ("combined", STATIC | {"scale_iterations": 100}),
}
DEFAULT = (
    "rtn",
    "rtn+cec",
    "layerwise",
    "layerwise+cec",
    "q_diffusion",
    "q_diffusion, layers first",
    *(f"accuquant {gradient} M=5" for gradient in ("identity", "exact", "per_step")),
    "accuquant identity M=5+cec",
    "combined",
)
CORRECTION: dict[str, Any] = {"estimator": "regression", "regressors": ("prediction", "sample", "one")}
"""What "+cec" fits, after any variant: the name of a variant followed by it is a variant too."""

LR_WEIGHTS = 1e-2
"""Adam's rate for rounding variables, the same for all methods: few iterations need a higher one than the papers'."""


def settings(variant: str, evaluations: int, case: Case) -> dict[str, Any]:
    """Keyword arguments of a variant that spends `evaluations` on learning by gradients.

    A block-wise iteration costs 3 * batch (forward 1, backward 2, once through all units), and so does an iteration
    over one denoising step; the window gradients that recompute cost 4 * batch a step. Passes that capture the inputs
    of layers and blocks come on top, and are in the table.

    Methods that are not named below have their quick preset with the table's samples, and `iterations` of the budget.

    AccuQuant and `combined` round layers from Gram matrices and spend all of it on windows, or ("blocks first") two
    thirds on blocks and one third on windows. What a variant of `combined` adds (row groups, weighted blocks, block
    scales) comes on top of the budget; `evaluations` has it.
    """
    whole, given = VARIANTS[variant]
    method = whole.partition("+")[0]
    options = {name: value for name, value in given.items() if name not in ("blocks", "correction")}
    if options.get("judged"):
        options["judged"] = case.judged
    common = {"samples": case.samples, "batch": case.batch, "samples_per_step": 8}
    iterations = evaluations // (3 * case.batch)
    if method in ("rtn", "layerwise"):
        return common | options | ({} if method == "rtn" else {"together": 4})
    if method in ("q_diffusion", "gac"):
        # Two thirds for rounding, one third for scales; all for rounding where scales do not learn.
        own = {
            "iterations_weights": iterations if options.get("iterations_activations") == 0 else iterations * 2 // 3,
            "iterations_activations": iterations // 3,
            "lr_weights": LR_WEIGHTS,
            "lr_activations": 5e-3,
            "together": 4,
        }
        own |= {"meta_iterations": 5, "lr_samples": 5e-2} if method == "gac" else {}
        return common | own | options
    if method == "adp_dm":
        # A round of the search walks along all steps and 4 times along one.
        rounds = max(1, evaluations // (3 * case.batch * (case.steps + 4)))
        searching = {"rounds": rounds, "lr_logits": 0.2, "prior": 2.0, "target": "full_precision"}
        return common | searching | {"together": 4} | options
    if method not in ("accuquant", "combined"):
        own = PRESETS[method]["quick"] | {"samples": case.samples}
        return own | ({"iterations": iterations} if "iterations" in own else {}) | options
    share = given.get("blocks", 0)
    blocks = {"block_iterations": int(share * iterations), "block_lr": LR_WEIGHTS}
    learning = {"lr_weights": LR_WEIGHTS, "lr_scales": 1e-2, "together": 4} | blocks
    evaluations = round((1 - share) * evaluations)
    if method == "combined":
        own = {"scale_iterations": 0, "search_rounds": 4, "compensation": False, "sample_weights": False}
        window = options.get("window", 5)
        own |= {"window": window, "window_iterations": _windows(evaluations, window, 4, options["free_run"], case)}
        return common | learning | own | options
    passes = 3 if options["gradient"] == "per_step" else 4
    iterations = _windows(evaluations, options["window"], passes, options["free_run"], case)
    windows = {"layer_rounding": True, "iterations": iterations}
    return common | learning | windows | options


def _windows(evaluations: int, window: int, passes: int, free_run: float, case: Case) -> int:
    """Iterations of windows: a free-run start walks from the noise, forward only, half of the steps on average."""
    return int(evaluations / (case.batch * (passes * window + free_run * (case.steps - window) / 2)))


def recipe_of(variant: str, weights: int | None, activations: int | None, options: Mapping[str, Any]) -> Recipe:
    """The recipe of a variant; the part of its method behind a plus is an add-on, with the variant's `correction`."""
    whole, given = VARIANTS[variant]
    method, _, extra = whole.partition("+")
    recipe = METHODS[method](weights=weights, activations=activations, **options)
    return recipe.then(*ADD_ONS[extra](**given.get("correction", {}))) if extra else recipe


class Reference:
    """The full-precision side, computed once."""

    def __init__(self, model: str, images: int) -> None:
        began = time.perf_counter()
        self.pipe, self.case = open_by_name(model), case_of(model)
        self.seeds = list(range(EVALUATION_SEED, EVALUATION_SEED + images))
        self.features = field_colours() if model == "faces64" else DigitFeatures()
        self.images = self.sampled(self.pipe)
        _, denoiser = find_denoiser(self.pipe)
        self.weights = weights_identity(denoiser)[:12]
        recorded = record(
            self.pipe,
            denoiser,
            seeds=self.seeds[: self.case.drift_images],
            steps=self.case.steps,
            batch_size=32,
            arguments=self.case.arguments,
            run=Run(),
        )
        self.trajectories = [seal(trajectory) for trajectory in recorded]
        self.frechet_to_data = self.to_data(self.statistics(self.images))
        self.seconds = time.perf_counter() - began

    def sampled(self, pipe: Any) -> torch.Tensor:
        case = self.case
        return sample(pipe, seeds=self.seeds, steps=case.steps, batch_size=32, arguments=case.arguments)

    def statistics(self, images: torch.Tensor) -> FeatureStatistics:
        found = FeatureStatistics(self.features.dim)
        found.update(self.features(images))
        return found

    def to_data(self, own: FeatureStatistics) -> float | None:
        """The Fréchet distance to real images; None where there are none at hand."""
        if not isinstance(self.features, DigitFeatures):
            return None
        return frechet_distance(own, FeatureStatistics.from_moments(*self.features.data_statistics()))

    def compare(self, pipe: Any) -> dict[str, float | None]:
        images = self.sampled(pipe)
        paired = PairedMetrics()
        paired.update(images, self.images)
        result = paired.result()
        _, denoiser = find_denoiser(pipe)
        drift = measure_drift(denoiser, self.trajectories, correction_of(pipe.scheduler))
        own = self.statistics(images)
        return {
            "psnr": result.psnr.mean,
            "ssim": result.ssim.mean,
            "mae": result.mae.mean,
            "frechet_to_fp": frechet_distance(own, self.statistics(self.images)),
            "frechet_to_data": self.to_data(own),
            "drift_final": drift.accumulated[-1],
            "coherent": drift.coherent[-1],
            "incoherent": drift.incoherent[-1],
        }


def run(args: argparse.Namespace) -> None:
    tune_allocator()
    if args.searched_sample_range:
        ranges.SAMPLE_MARGIN_BITS = MOST_BITS + 1
        args.json = args.json.with_suffix(".searched-range.jsonl")
    if args.clipped is not None:
        ranges.CLIPPED = args.clipped
        args.json = args.json.with_suffix(f".clipped-{args.clipped:g}.jsonl")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    part, parts = map(int, args.part.split("/"))
    asked = args.methods.split(";")
    bases = list(dict.fromkeys(variant.removesuffix("+cec") for variant in asked))
    wanted = [
        (bits, base, seed)
        for seed in map(int, args.seeds.split(","))
        for bits in args.bits.split(",")
        for base in bases
    ]
    case = case_of(args.model)
    args.evaluations, args.images = args.evaluations or case.evaluations, args.images or case.images
    reference = Reference(args.model, args.images)
    for number, (bits, base, seed) in enumerate(wanted):
        variants = [name for name in (base, f"{base}+cec") if name in asked]
        if number % parts != part - 1 or all(done(args, reference, bits, name, seed) for name in variants):
            continue
        began = time.perf_counter()
        weights, activations = parse_bits(bits)
        options = settings(base, args.evaluations, case)
        recipe = recipe_of(base, weights, activations, options)
        options |= {key: value for key, value in VARIANTS[base][1].items() if key == "correction"}
        quantized = quantize(reference.pipe, recipe, steps=case.steps, arguments=case.arguments, run=Run(seed=seed))
        spent, pipe = _evaluations(quantized.figures), quantized.pipe
        seconds = time.perf_counter() - began
        share = share_of_bytes(quantized, reference)
        kept = ("strength", "share")  # how far biases were corrected, and what stayed of the windows
        chosen = {name: entry[name] for entry in quantized.figures for name in kept if name in entry}
        for name in variants:
            if name.endswith("+cec"):
                began = time.perf_counter()
                fitted = compensate(
                    pipe,
                    reference.pipe,
                    steps=case.steps,
                    samples=case.samples,
                    batch=16,
                    arguments=case.arguments,
                    run=Run(seed=seed),
                    **CORRECTION,
                )
                spent, pipe = spent + _evaluations(fitted.figures), fitted.pipe
                options = options | {"cec": CORRECTION}
                seconds += time.perf_counter() - began
            if not done(args, reference, bits, name, seed):
                place = {"bits": bits, "method": name, "seed": seed, "budget": args.evaluations}
                place["bytes"] = share
                place |= chosen
                cost = {"evaluations": spent, "seconds": round(seconds, 1), "options": options}
                _keep(args, reference, place | cost, pipe)


def _evaluations(figures: Sequence[Mapping[str, Any]]) -> int:
    return sum(entry.get("evaluations", 0) for entry in figures)


def share_of_bytes(quantized: Quantized, reference: Reference) -> float:
    """Of the checkpoint's tensors, beside the denoiser's in float32."""
    _, denoiser = find_denoiser(reference.pipe)
    with tempfile.TemporaryDirectory() as folder:
        quantized.save(Path(folder) / "made")
        (file,) = Path(folder).rglob(TENSORS_NAME)
        return file.stat().st_size / (4 * sum(tensor.numel() for tensor in denoiser.parameters()))


def _keep(args: argparse.Namespace, reference: Reference, row: dict[str, Any], pipe: Any) -> None:
    """Measure a pipeline and append its line."""
    row = row | {
        "model": args.model,
        "weights": reference.weights,
        "revision": revision_of(row["bits"], row["method"], args.model),
        "steps": reference.case.steps,
        "arguments": reference.case.arguments,
        "n": args.images,
        "evaluation_seeds": [reference.seeds[0], reference.seeds[-1]],
        "reference_frechet_to_data": reference.frechet_to_data,
        "reference_seconds": round(reference.seconds, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **reference.compare(pipe),
    }
    with args.json.open("a") as file:
        file.write(json.dumps(row) + "\n")
    shown = {key: round(row[key], 4) for key in ("psnr", "frechet_to_fp", "drift_final")}
    print(row["bits"], row["method"], row["seed"], shown, flush=True)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [{"revision": 1} | json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def done(args: argparse.Namespace, reference: Reference, bits: str, variant: str, seed: int) -> bool:
    key = (bits, variant, seed, args.evaluations, args.images, reference.weights)
    key += (revision_of(bits, variant, args.model),)
    names = ("bits", "method", "seed", "budget", "n", "weights", "revision")
    return any(tuple(row[name] for name in names) == key for row in rows_of(args.json))


def table(args: argparse.Namespace) -> None:
    """All rows of a model, between the markers of a page."""
    rows = current(args.json, args.model)
    if not rows:
        raise SystemExit(f"{args.json} has no rows of {args.model}: run `results.py run --model {args.model}` first.")
    first = rows[0]
    note = f"{conditions(first)}, {first['date']}."
    body = "\n".join((note, "", *lines_of(rows, variants())))
    put(args.into, body, f"<!-- table {args.model} -->", f"<!-- /table {args.model} -->")


def current(path: Path, model: str) -> list[dict[str, Any]]:
    """A model's rows of the present revision that agree with the last in weights, budget and number of images."""
    rows = [
        row
        for row in rows_of(path)
        if row["model"] == model and row["revision"] == revision_of(row["bits"], row["method"], model)
    ]
    return [row for row in rows if all(row[name] == rows[-1][name] for name in ("weights", "budget", "n"))]


def revision_of(bits: str, variant: str, model: str) -> int:
    base = variant.removesuffix("+cec")
    method, options = VARIANTS.get(base, ("", {}))
    blockwise = "blocks" in base or method in BLOCKWISE
    differences = method in SCALED and options.get("scale_gradient") != "straight"
    in_parts = model in IN_PARTS and rounds_layers(base)
    return REVISIONS.get(bits, REVISION) + blockwise + differences + in_parts


@functools.cache
def rounds_layers(variant: str) -> bool:
    """Whether a variant, without add-ons, rounds layers from Gram matrices. False for one that there is no more."""
    if variant not in VARIANTS:
        return False
    case = Case()
    stages = recipe_of(variant, 4, 8, settings(variant, case.evaluations, case)).stages
    return any(isinstance(stage, RoundLayers | AlignLayers) for stage in stages)


def conditions(row: Mapping[str, Any]) -> str:
    return (
        f"Model {row['model']} (weights {row['weights']}), DDIM {row['steps']} steps, "
        + "".join(f"{name} {value}, " for name, value in row.get("arguments", {}).items())
        + f"n = {row['n']} images of seeds {row['evaluation_seeds'][0]}-{row['evaluation_seeds'][1]}, "
        f"{row['machine']}, torch {row['torch']}"
    )


def variants() -> list[str]:
    return [name + extra for name in VARIANTS for extra in ("", "+cec")]


def lines_of(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """A Markdown table of these variants: mean and half range over calibration seeds.

    Evaluations are those of the row that was measured last: they depend on the code, results do not.
    """
    lines = [
        "| bits | method | seeds | PSNR dB | SSIM | Fréchet to full precision | final drift | evaluations | bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for bits in BITS:
        for variant in names:
            group = [row for row in rows if row["bits"] == bits and row["method"] == variant]
            if group:
                cells = [
                    spread([row[key] for row in group]) for key in ("psnr", "ssim", "frechet_to_fp", "drift_final")
                ]
                cost = round(group[-1]["evaluations"])
                sizes = [row["bytes"] for row in group if "bytes" in row]
                size = f"{statistics.mean(sizes):.3f}" if sizes else ""
                lines.append(f"| {bits} | {variant} | {len(group)} | {' | '.join(cells)} | {cost} | {size} |")
    return lines


def put(page: Path, body: str, begin: str, end: str) -> None:
    """Replace what is between two markers of a page."""
    head, rest = page.read_text().split(begin)
    _, tail = rest.split(end)
    page.write_text(head + begin + "\n" + body + "\n" + end + tail)


def pages(args: argparse.Namespace) -> None:
    """The rows of each method on its page, at the bits at which it was measured, beside those of its baselines.

    What a page has of another model than `--model` stays there, and so does what has no rows of the present revision,
    with a word that says so.
    """
    known = set(variants())
    found = [row for row in current(args.json, args.model) if row["method"] in known]
    for page in sorted(args.folder.glob("*.md")):
        if "<!-- figures -->" not in page.read_text():
            continue
        there = page.read_text().split("<!-- figures -->")[1].split("<!-- /figures -->")[0].strip()
        parts = {part.split(" (")[0]: "Model " + part for part in ("\n\n" + there).split("\n\nModel ")[1:]}
        own = {row["method"] for row in found if page.stem in methods_of(row["method"])}
        bits = {row["bits"] for row in found if row["method"] in own}
        shown = [row for row in found if row["bits"] in bits and row["method"] in own | baselines(own)]
        if shown:
            note = f"{conditions(shown[0])}, {shown[0]['date']}."
            parts[args.model] = "\n".join((note, "", *lines_of(shown, variants())))
        elif args.model in parts and OLDER not in parts[args.model]:
            first, _, rest = parts[args.model].partition("\n")
            parts[args.model] = f"{first} {OLDER}\n{rest}"
        ordered = [parts[model] for model in ("digits-unet", "digits-dit", "faces64") if model in parts]
        put(page, "\n\n".join(ordered) or "Not measured yet.", "<!-- figures -->", "<!-- /figures -->")


def methods_of(variant: str) -> set[str]:
    """The method and the add-ons of a variant."""
    base = variant.removesuffix("+cec")
    return {*VARIANTS[base][0].split("+"), *(("cec",) if base != variant else ())}


def baselines(names: set[str]) -> set[str]:
    """Round to nearest, layers alone, each variant without its correction, and what a method is built on."""
    bases = {name.partition("+")[0].partition(", corrected")[0] for name in names}
    built_on = {"gac": ROWS_FIRST, "adp_dm": "rtn, a row per step", "accuquant": f"{ROWS_FIRST}, scales as searched"}
    return {"rtn", "layerwise", *bases, *(base for name, base in built_on.items() if any(name in one for one in bases))}


def grid(args: argparse.Namespace) -> None:
    """A picture: images of full precision, and of each method below them, at equal seeds."""
    tune_allocator()
    weights, activations = parse_bits(args.bits)
    case = case_of(args.model)
    reference = Reference(args.model, args.images)
    rows = [reference.images]
    for variant in args.methods.split(";"):
        recipe = recipe_of(variant, weights, activations, settings(variant, args.evaluations or case.evaluations, case))
        quantized = quantize(
            reference.pipe, recipe, steps=case.steps, arguments=case.arguments, run=Run(seed=args.seed)
        )
        rows.append(reference.sampled(quantized.pipe))
        print(variant, reference.compare(quantized.pipe), flush=True)
    picture = to_grid(torch.cat(rows), args.images)
    picture = picture.convert("L") if reference.images.shape[1] == 1 else picture
    picture.resize((2 * picture.width, 2 * picture.height), 0).save(args.into, optimize=True)


def memory(args: argparse.Namespace) -> None:
    """Largest resident set of a short calibration, above that with the model opened and sampled, in MiB."""
    for variant in args.methods.split(";"):
        command = [sys.executable, __file__, "memory-of", "--methods", variant, "--model", args.model]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(variant, finished.stdout.split()[-1], flush=True)


def memory_of(args: argparse.Namespace) -> None:
    pipe, variant, case = open_by_name(args.model), args.methods, case_of(args.model)
    sample(pipe, seeds=list(range(case.batch)), steps=2, batch_size=case.batch)
    base = variant.removesuffix("+cec")
    # Long enough for every stage to reach its peak; iterations after the first do not add to it.
    recipe = recipe_of(base, 4, 8, settings(base, 1500, case))
    recipe = recipe if base == variant else recipe.then(*ADD_ONS["cec"](**CORRECTION))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    quantize(pipe, recipe, steps=case.steps, run=Run())
    print(round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def spread(values: list[float]) -> str:
    """`mean ± half the range`, or the value where there is one."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("run")
    first.add_argument("--model", default="digits-unet")
    first.add_argument("--bits", default=",".join(BITS))
    first.add_argument("--methods", default=";".join(DEFAULT))
    first.add_argument("--seeds", default="0,1,2")
    first.add_argument("--evaluations", type=int, help="of the network, for learning by gradients")
    first.add_argument("--images", type=int, help="held out")
    first.add_argument("--part", default="1/1")
    first.add_argument("--json", type=Path, default=ROWS)
    second = commands.add_parser("table")
    first.add_argument(
        "--searched-sample-range",
        action="store_true",
        help="search the range of the layer that reads the sample like any other, into a file of its own",
    )
    first.add_argument(
        "--clipped", type=float, help="how much a clipped value counts (ranges.CLIPPED), into a file of its own"
    )
    second.add_argument("--model", default="digits-unet")
    second.add_argument("--json", type=Path, default=ROWS)
    second.add_argument("--into", type=Path, default=Path("docs/results.md"))
    fourth = commands.add_parser("pages")
    fourth.add_argument("--json", type=Path, default=ROWS)
    fourth.add_argument("--model", default="digits-unet")
    fourth.add_argument("--folder", type=Path, default=Path("docs/methods"))
    fifth = commands.add_parser("grid")
    fifth.add_argument("--model", default="digits-unet")
    fifth.add_argument("--bits", default="W4A8")
    fifth.add_argument("--methods", default="rtn;q_diffusion;accuquant identity M=5;combined")
    fifth.add_argument("--seed", type=int, default=0)
    fifth.add_argument("--evaluations", type=int, help="of the network, for learning by gradients")
    fifth.add_argument("--images", type=int, default=16)
    fifth.add_argument("--into", type=Path, required=True)
    for name in ("memory", "memory-of"):
        third = commands.add_parser(name)
        third.add_argument("--model", default="digits-unet")
        third.add_argument("--methods", default=";".join(DEFAULT))
    args = parser.parse_args()
    known = {"run": run, "table": table, "pages": pages, "grid": grid, "memory": memory, "memory-of": memory_of}
    known[args.command](args)


if __name__ == "__main__":
    main()
