"""Tables and sentences on standard output."""

from __future__ import annotations

import copy
import inspect
import re
import shlex
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rich.table import Column, Table

from stepquant.cli.console import duration, stderr_console, stdout_console, write_json
from stepquant.cli.seeds import format_seeds
from stepquant.errors import SpecError, nearest

if TYPE_CHECKING:
    from stepquant.config import Resolved
    from stepquant.recipe import Job

__all__ = [
    "bytes_text",
    "complain_of_gates",
    "plan_of",
    "show_compensated",
    "show_inspection",
    "show_methods",
    "show_plan",
    "show_quantized",
    "show_results",
]

_METRIC_NAMES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "mae": "mean absolute error",
    "lpips": "LPIPS",
    "clip_score": "CLIP score",
    "frechet_to_fp": "Frechet distance to full precision",
    "frechet_to_data": "Frechet distance to real data",
    "sfid_to_fp": "sFID to full precision",
    "kid_to_fp": "KID to full precision",
    "inception_score": "Inception score",
    "drift_final": "drift after the last step",
    "cosine_final": "cosine of the final samples",
    "noise_level": "noise level of the final samples",
    "white_point_shift": "shift of the white point",
}


@runtime_checkable
class Planning(Protocol):
    """A stage that decides which layers are quantized and how."""

    def plan(self, denoiser: Any) -> Mapping[str, Any]:
        """Full layer name -> `LayerScheme`."""
        ...


@runtime_checkable
class Counting(Protocol):
    """A stage that knows beforehand what it will cost."""

    def evaluations(self, job: Job) -> int:
        """Calls of the network for one image; a backward pass counts as two."""
        ...


def plan_of(resolved: Resolved) -> dict[str, Any]:
    """What a run would do, as plain data: settings, stages and, where the model is at hand, layers and cost."""
    data: dict[str, Any] = {"settings": resolved.to_dict(), "stages": resolved.recipe.to_dict()["stages"]}
    pipe = _local_model(resolved.model, resolved.scheduler)
    if pipe is None:
        return data | {"note": f"{resolved.model} is not on this machine, so layers and cost are not shown."}
    from stepquant.model.families import find_denoiser
    from stepquant.model.pipeline import check_call
    from stepquant.recipe import Checked, Job
    from stepquant.run import Run

    check_call(pipe, resolved.arguments, resolved.steps)
    denoiser = find_denoiser(pipe, resolved.denoiser)[1]
    stages = resolved.recipe.stages
    job = Job(pipe, denoiser, denoiser, Run(seed=resolved.seed), resolved.steps, resolved.arguments, stages=stages)
    # Planning may rebuild attention layers, so it gets a network of its own.
    plans = [stage.plan(copy.deepcopy(denoiser)) for stage in stages if isinstance(stage, Planning)]
    for stage, entry in zip(stages, data["stages"], strict=True):
        if isinstance(stage, Counting):
            entry["evaluations"] = stage.evaluations(job)
        if isinstance(stage, Checked):
            stage.check(job)
    layers = {name: _scheme_bits(scheme) for plan in plans for name, scheme in plan.items()}
    return data | {"layers": layers}


def _local_model(model: str, scheduler: Mapping[str, Any]) -> Any:
    """The pipeline if it can be opened without fetching anything, else None."""
    from stepquant import api

    if "/" in model and not Path(model).exists():
        return None
    return api.open_model(model, scheduler=scheduler)


def _scheme_bits(scheme: Any) -> dict[str, Any]:
    """Bits of each tensor, and those of activations over time where a plan has them."""
    specs = {"weight": scheme.weight, "input": scheme.input, "second": scheme.second}
    over_time = [{"bits": entry.bits, "until": entry.until} for entry in getattr(scheme, "over_time", ())]
    found = {name: None if spec is None else spec.bits for name, spec in specs.items()}
    return found | ({"over_time": over_time} if over_time else {})


def _bits_text(bits: Any, row_bits: Mapping[str, Sequence[int]] | None = None) -> str:
    """`{"weight": 4, "input": 8}` -> "W4 A8"; the second operand of a matmul is another A. row_bits: of operands whose
    bits change over time, as in "W4 A4-8".
    """
    if not isinstance(bits, Mapping):
        return str(bits)
    letters = {"weight": "W", "input": "A", "second": "A"}
    spans = {name: f"{min(each)}-{max(each)}" for name, each in (row_bits or {}).items()}
    parts = [
        f"{letters.get(name, name + ' ')}{spans.get(name, value)}" for name, value in bits.items() if value is not None
    ]
    return " ".join(parts) or "float"


def _names(header: str) -> Column:
    """A column of names that are never cut short: people copy them."""
    return Column(header, overflow="fold")


def show_plan(plan: Mapping[str, Any]) -> None:
    """Settings, stages and layers."""
    console = stdout_console()
    settings = plan["settings"]
    name = settings.get("method") or "a recipe of its own"
    console.print(f"{settings['model']} with {name}, {settings['steps']} steps, seed {settings['seed']}")
    stages = Table("stage", "settings", title="Stages", title_justify="left")
    counted = any("evaluations" in stage for stage in plan["stages"])
    if counted:
        stages.add_column("network evaluations", justify="right")
    for stage in plan["stages"]:
        told = {key: value for key, value in stage.items() if key not in ("stage", "evaluations")}
        row = [stage["stage"], ", ".join(f"{key}={value}" for key, value in told.items())]
        stages.add_row(*row, *([f"{stage['evaluations']:,}" if "evaluations" in stage else ""] if counted else []))
    console.print(stages)
    layers = plan.get("layers")
    if layers:
        table = Table(_names("layer"), "bits", title=f"{len(layers)} quantized layers", title_justify="left")
        for layer, bits in layers.items():
            over_time = [entry["bits"] for entry in bits.get("over_time", ())]
            plain = {name: value for name, value in bits.items() if name != "over_time"}
            table.add_row(layer, _bits_text(plain, {"input": over_time, "second": over_time} if over_time else None))
        console.print(table)
    if "note" in plan:
        console.print(plan["note"])


def show_quantized(
    out: Path, resolved: Resolved, description: Mapping[str, Any], figures: Iterable[Mapping[str, Any]]
) -> None:
    """What `quantize` made, how long it took, and what to type next."""
    console = stdout_console()
    table = Table("stage", "time", title_justify="left")
    seconds = 0.0
    figures = list(figures)
    allocated = [figure for figure in figures if "layer_bytes" in figure]
    for figure in figures:
        table.add_row(str(figure.get("stage", "")), duration(float(figure.get("seconds", 0.0))))
        seconds += float(figure.get("seconds", 0.0))
    console.print(table)
    size = f" of {bytes_text(description['bytes'])}" if "bytes" in description else ""
    console.print(f"{out} is a checkpoint{size}, made in {duration(seconds)}.")
    for figure in allocated:
        console.print(
            f"Its layers have {bytes_text(figure['layer_bytes'])} as a budget counts them; the rest is norms, "
            "embeddings, further rows over time, descriptions and other parts of the pipeline."
        )
    console.print(f"Its settings are in {out}.run.yaml.")
    shown = shlex.quote(str(out))
    prompts = " --prompts FILE" if "prompt" in resolved.arguments else ""
    console.print(f"Next: stepquant sample {shown} -o images --grid    or: stepquant evaluate {shown}{prompts}")
    if resolved.preset == "quick":
        console.print("The preset was quick: --preset standard takes longer and loses less.")


def show_finished(out: Path) -> None:
    """`--resume` where the checkpoint is complete."""
    stdout_console().print(f"{out} is complete: nothing was left to do.")


def show_compensated(candidate: str, out: Path, figures: Sequence[Mapping[str, Any]], further: str) -> None:
    """What `compensate` tried, what it took, and what to type next. further: what `evaluate` needs beside the name."""
    console = stdout_console()
    fitted = figures[-1]
    table = Table(_names("candidate"), "final error on held-out images", "of that without correction")
    for row in fitted["candidates"]:
        error, relative = row["held_out_rms"], row["relative"]
        table.add_row(
            row["candidate"],
            "diverged" if error is None else f"{error:.4g}",
            "" if relative is None else f"{100 * relative:.1f} %",
        )
    console.print(table)
    seconds = sum(float(figure["seconds"]) for figure in figures)
    own = fitted.get("own")
    if own == "kept":
        console.print(
            f"Nothing was better than {candidate} as it is: {out} keeps the correction that it has. Corrections do not "
            "stack, so another one would have replaced it."
        )
    elif fitted["chosen"] == "none":
        console.print(f"Nothing was better than no correction, so {out} is {candidate} without one.")
    else:
        console.print(f"{out} is {candidate} with the correction {fitted['chosen']}, made in {duration(seconds)}.")
    if own in ("replaced", "removed"):
        console.print(
            f"The correction that {candidate} has is {own}: corrections do not stack."
            + (f" It could not be judged here. {fitted['own_not_judged']}" if "own_not_judged" in fitted else "")
        )
    errors = {row["candidate"]: row["held_out_rms"] for row in fitted["candidates"]}
    chosen, before = errors.get(fitted["chosen"]), errors.get("as it is")
    gained = next((row["relative"] for row in fitted["candidates"] if row["candidate"] == fitted["chosen"]), None)
    if own == "replaced" and chosen is not None and before is not None and before <= chosen:
        console.print("It was better on the held-out images. The default estimator, auto, keeps it then.")
    elif gained is not None and gained >= 1 and fitted["chosen"] != "none":
        console.print(
            "It makes the held-out images no better. The default estimator, auto, takes none then; more "
            "--calibration-samples may help."
        )
    console.print(f"Next: stepquant evaluate {shlex.quote(str(out))}{further}")
    console.print(f"and compare with: stepquant evaluate {shlex.quote(candidate)}{further}")


def bytes_text(count: int) -> str:
    """1_230_000 -> "1.23 MB"."""
    number = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.2f} {unit}"
        number /= 1000
    return ""


def show_results(results: Mapping[str, Any]) -> None:
    """The metrics of one evaluation."""
    console = stdout_console()
    steps = "" if results["steps"] is None else f" {results['steps']} steps ({results['scheduler']}),"
    console.print(
        f"{results['candidate']} beside {results['against']}: {results['n']} images,{steps} seeds "
        f"{_seeds_text(results)}"
    )
    if results.get("features"):
        console.print(f"Features: {results['features']}, protocol {results.get('protocol', 'as-sampled')}")
    from stepquant.report.comparable import reference_words

    words = reference_words(results)
    table = Table("metric", "value", "95 % interval")
    for key, metric in results["metrics"].items():
        name = _METRIC_NAMES.get(key, key).replace("full precision", words)
        if metric.get("value") is None:  # as a kept evaluation has what was not finite
            table.add_row(name, "not finite", "")
            continue
        unit = f" {metric['unit']}" if metric.get("unit") else ""
        low, high = metric.get("low"), metric.get("high")
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        beside = f" ({words} {metric['reference_value']:.4g})" if metric.get("reference_value") is not None else ""
        table.add_row(name, f"{metric['value']:.4g}{unit}{beside}", interval)
    console.print(table)
    for note in results.get("notes", []):
        console.print(f"Note: {note}")


def complain_of_gates(failed: Sequence[Mapping[str, Any]]) -> None:
    """One line on standard error for each gate that did not hold."""
    console = stderr_console()
    for gate in failed:
        found = "it was not measured" if gate["value"] is None else f"it is {gate['value']:.6g}"
        console.print(f"Failed: {gate['gate']} ({found})", style="red", soft_wrap=True)


def _seeds_text(results: Mapping[str, Any]) -> str:
    """Consecutive seeds are stored by their ends."""
    seeds = results["seeds"]
    return f"{seeds[0]}-{seeds[1]}" if len(seeds) < results["n"] else format_seeds(seeds)


def show_inspection(description: Mapping[str, Any]) -> None:
    """Manifest fields that fit on a line, then one row a layer."""
    console = stdout_console()
    for key, value in description.items():
        if isinstance(value, str):
            console.print(f"{key}: {value}")
    schedule = description.get("schedule") or {}
    if schedule:
        console.print(f"schedule: {schedule.get('steps')} steps of {schedule.get('scheduler', 'an unknown scheduler')}")
    ratio = f", {description['ratio']:.3f} of the float32 denoiser" if "ratio" in description else ""
    console.print(f"size: {bytes_text(description['bytes'])}{ratio}")
    for kind, count in (description.get("bytes_by_kind") or {}).items():
        console.print(f"  {kind.replace('_', ' ')}: {bytes_text(count)}")
    table = Table(_names("layer"), "bits", "bytes", "engine", "why not a faster one")
    for layer in description["layers"]:
        said = {**(layer.get("refusals") or {}), **(layer.get("remarks") or {})}
        why = "; ".join(f"{engine}: {reason}" for engine, reason in said.items())
        bits = _bits_text(layer["bits"], layer.get("row_bits"))
        table.add_row(layer["name"], bits, f"{layer['bytes']:,}", str(layer.get("engine") or ""), why)
    console.print(table)


def show_methods(name: str | None, json_target: str | None) -> None:
    """The list of methods, or everything about one."""
    from stepquant.methods import ADD_ONS, METHODS

    if name is not None and name not in METHODS:
        parts = name.split("+")
        if len(parts) > 1 and parts[0] in METHODS and all(part in ADD_ONS for part in parts[1:]):
            raise SpecError(f"{name} is {' followed by '.join(parts)}: `stepquant methods` explains each by itself.")
        raise SpecError(f"There is no method {name!r}.{nearest(name, METHODS)} `stepquant methods` lists them.")
    described = {key: _method(key) for key in ([name] if name else METHODS)}
    if json_target is not None:
        write_json(described[name] if name else list(described.values()), json_target)
    if json_target == "-":
        return
    if name:
        _show_method(described[name])
        return
    table = Table("method", "year", "source", "what it is")
    for key, method in described.items():
        # The year has a column of its own.
        table.add_row(key, method["year"] or "", method["source"] or "", re.sub(r" \(\d{4}\)", "", method["summary"]))
    console = stdout_console()
    console.print(table)
    console.print("`stepquant methods NAME` explains one.")
    extras = ", ".join(ADD_ONS)
    console.print(f"Can follow any other, as in --method q_diffusion+{next(iter(ADD_ONS))}: {extras}.")
    console.print(
        "Beta sampling (2024) draws calibration timesteps: --set timesteps=beta with ptq4dm and pqd. As a schedule: "
        "--scheduler dpm++,timesteps=beta."
    )


def _method(name: str) -> dict[str, Any]:
    from stepquant.methods import METHODS, PRESETS

    function = METHODS[name]
    hints = typing.get_type_hints(function)
    module = sys.modules[function.__module__]
    explanation = inspect.cleandoc(module.__doc__ or "")
    return {
        "name": name,
        "summary": explanation.partition("\n")[0],
        "year": _first(r"year\s*=\s*\{(\d{4})\}", str(getattr(module, "BIBTEX", ""))),
        "source": _first(r"(arXiv:\d{4}\.\d{5})", explanation),
        "explanation": explanation,
        "options": [
            {"name": option.name, "type": _type_text(hints[option.name]), "default": _plain_default(option.default)}
            for option in inspect.signature(function).parameters.values()
        ],
        "presets": dict(PRESETS.get(name, {})),
        "bibtex": str(getattr(module, "BIBTEX", "")),
    }


def _first(pattern: str, text: str) -> str | None:
    """The first group of the first match."""
    found = re.search(pattern, text)
    return found.group(1) if found else None


def _type_text(hint: Any) -> str:
    """`Literal["8bit", "same"]` -> "8bit or same", `int | None` -> "int or None"."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_text(part) for part in typing.get_args(hint))
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) in (tuple, list, Sequence):
        return f"list of {_type_text(typing.get_args(hint)[0])}"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _plain_default(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _show_method(method: Mapping[str, Any]) -> None:
    console = stdout_console()
    console.print(method["explanation"])
    table = Table("option", "type", "default", title="Options (--set option=value)", title_justify="left")
    for option in method["options"]:
        table.add_row(option["name"], option["type"], str(option["default"]))
    console.print()
    console.print(table)
    for preset, overrides in method["presets"].items():
        console.print(f"--preset {preset}: " + ", ".join(f"{key}={value}" for key, value in overrides.items()))
    if method["bibtex"]:
        console.print()
        console.print(method["bibtex"].strip())
