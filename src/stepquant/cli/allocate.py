"""`stepquant allocate`: bits for every layer under a budget, as a file that people edit and `quantize` takes.

What a killed run needs to go on is in `PLAN.work`, as for `quantize`: the recording, and the sensitivities of every
mini-batch that is finished.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import yaml

from stepquant import api
from stepquant.calibrate.allocation import Allocate
from stepquant.cli.arguments import ready, recorded_images
from stepquant.cli.console import Settings, interruptible, progress_for, replace_text, stdout_console, write_json
from stepquant.cli.outputs import (
    WORK_MARK,
    clear_work,
    refuse_existing,
    refuse_unwritable_json,
    remove_work,
    work_folder,
)
from stepquant.cli.work import QuantizeRequest, device_named, kept_if_worth_it, prepare
from stepquant.config import Resolved, dump
from stepquant.errors import SpecError
from stepquant.recipe import Recipe
from stepquant.run import Run
from stepquant.work_folder import hold

__all__ = ["allocate", "plan_settings"]

_OVER_TIME = (
    "# Activations with a list have bits over time, noise first: those of an entry until its timestep, inclusive, and "
    "those\n# of the last one for the rest."
)


def allocate(request: QuantizeRequest, settings: Settings, json_target: str | None) -> None:
    """Find the bits, write the plan, and say what it promises."""
    out = request.out
    if out is None:
        raise SpecError("There is no file to write to: give -o plan.yaml.")
    if out.is_dir():
        raise SpecError(f"{out} is a folder, expected a file such as plan.yaml.")
    refuse_existing(out, overwrite=request.overwrite)
    refuse_unwritable_json(json_target)
    resolved = request.resolved()
    if not resolved.budget:
        raise SpecError("There is no budget to allocate under: give --target, --max-bytes or --max-drift.")
    work = work_folder(out)
    with hold(work) if (work / WORK_MARK).is_file() else nullcontext():
        clear_work(work, resume=request.resume, overwrite=request.overwrite)
    prepare(settings)
    pipe = api.open_model(resolved.model, device=device_named(resolved.device), scheduler=resolved.scheduler)
    with (
        hold(work),
        kept_if_worth_it(work),
        interruptible(f"What is done so far is in {work}; go on with the same command and --resume."),
    ):
        if not (work / WORK_MARK).exists():
            dump(resolved, work / WORK_MARK)
        found = api.quantize(
            pipe,
            _beginning(resolved.recipe),
            steps=resolved.steps,
            run=Run(seed=resolved.seed, work=work, progress=progress_for(settings)),
            arguments=ready(resolved.arguments, recorded_images(resolved) or 1),
            resume=request.resume,
            denoiser=resolved.denoiser,
        ).figures[-1]
        replace_text(out, _plan_text(resolved, found))
        remove_work(work)
    if json_target is not None:
        write_json({"plan": str(out), **found}, json_target)
    if json_target != "-" and not settings.quiet:
        console = stdout_console()
        console.print(f"{out} has bits for {len(found['rules'])} layers: {_summary(found)}.")
        console.print(f"Edit its rules if you like. Next: stepquant quantize --config {shlex.quote(str(out))} -o OUT")


def plan_settings(resolved: Resolved, rules: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings in the form of `run.yaml`, with the rules that were found in the place of the budget.

    Rules that were given come last, so that they still win.
    """
    data = {key: value for key, value in resolved.to_dict().items() if key not in resolved.budget}
    found = [
        {
            "pattern": rule["pattern"],
            "weights": 16 if rule["weights"] is None else rule["weights"],
            "activations": _activations(rule["activations"]),
            **({} if rule.get("group_size") is None else {"group_size": rule["group_size"]}),
        }
        for rule in rules
    ]
    return {**data, "rules": [*found, *(data.get("rules") or [])]}


def _activations(bits: Any) -> Any:
    """Bits of a rule as `run.yaml` has them: 16 for floating point, and a list of bits over time without nulls."""
    if isinstance(bits, int) or bits is None:
        return 16 if bits is None else bits
    return [{key: value for key, value in dict(entry).items() if value is not None} for entry in bits]


def _beginning(recipe: Recipe) -> Recipe:
    """The stages up to the allocation, and of those only the ones that it needs."""
    place = next(number for number, stage in enumerate(recipe.stages) if isinstance(stage, Allocate))
    needed = set(recipe.stages[place].needs)
    kept = [recipe.stages[place]]
    for stage in reversed(recipe.stages[:place]):
        if stage.gives & needed:
            needed |= stage.needs
            kept.insert(0, stage)
    return Recipe("allocate", tuple(kept))


def _summary(found: Mapping[str, Any]) -> str:
    parts = [
        f"{found['weight_bits']:.3g} bits a weight",
        f"{found['activation_bits']:.3g} bits an activation",
        f"{found['layer_bytes']:,} bytes of layers (about {found['checkpoint_bytes']:,} as a checkpoint)",
    ]
    if found["predicted_drift"] is not None:
        parts.append(f"predicted drift {found['predicted_drift']:.3g}")
    if found["measured_drift"] is not None:
        parts.append(f"measured {found['measured_drift']:.3g} with everything rounded to nearest")
    return ", ".join(parts)


def _plan_text(resolved: Resolved, found: Mapping[str, Any]) -> str:
    data = plan_settings(resolved, found["rules"])
    budget = ", ".join(f"{key} {value}" for key, value in resolved.budget.items() if key != "allocation")
    head = [
        f"# Bits for {budget}: {_summary(found)}.",
        "# The drift is the root mean square of the change of the final sample, from what was free to choose.",
        "# Rules are tried in order and the last that matches wins. 16 leaves a tensor in floating point.",
        *([_OVER_TIME] if found.get("until") else []),
        "# `stepquant check` shows what this file stands for, `stepquant quantize --config` takes it.",
    ]
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=160)
    return "\n".join(head) + "\n" + text
