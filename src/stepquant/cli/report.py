"""`stepquant report`: one HTML page about one or several checkpoints, from the evaluations kept beside them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from stepquant import api
from stepquant.cli.console import Settings, interruptible, json_text, progress_for, replace_text, stdout_console
from stepquant.cli.evaluate import evaluate_and_keep
from stepquant.cli.outputs import read_evaluation, read_origin, refuse_existing, refuse_unwritable_file, speed_path
from stepquant.cli.work import Sampling, device_named, prepare
from stepquant.errors import SpecError
from stepquant.evaluate.arguments import first_of
from stepquant.evaluate.source import PipelineSource, open_source
from stepquant.evaluate.speed import measure_speed
from stepquant.inspection import inspect_checkpoint
from stepquant.manifest import read_manifest
from stepquant.run import Run

__all__ = ["keep_speed", "report", "write_page"]

_IMAGES = 8
"""The first seeds that are shown, of each checkpoint."""

_NOT_KEPT = (
    "No images: they were made with arguments that the evaluation only names, such as tensors or pictures. "
    "`stepquant sample` makes images with the same arguments."
)


def report(
    checkpoints: Sequence[Path],
    out: Path,
    seeds: list[int],
    settings: Settings,
    device_and_batch: tuple[str, int],
    *,
    speed: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the page; checkpoints without an evaluation are evaluated first. speed: time the engines, too."""
    refuse_existing(out, overwrite=overwrite)
    refuse_unwritable_file(out)
    from stepquant.report.comparable import refuse_other_references

    device, batch_size = device_and_batch
    kept = [read_evaluation(checkpoint) for checkpoint in checkpoints]
    refuse_other_references([found for found in kept if found is not None])  # before anything is sampled
    for checkpoint, found in zip(checkpoints, kept, strict=True):
        if found is None:
            _refuse_without_prompts(checkpoint)
    results = []
    for checkpoint, found in zip(checkpoints, kept, strict=True):
        if found is None:
            sampling = Sampling(seeds, batch_size=batch_size, device=device, engine="simulated")
            found = evaluate_and_keep(checkpoint, sampling, settings)
        results.append(found)
    if speed:
        for checkpoint, found in zip(checkpoints, results, strict=True):
            keep_speed(checkpoint, found, settings, device)
    write_page(checkpoints, results, out, settings, (device, batch_size))
    if not settings.quiet:
        stdout_console().print(f"The report is {out}.")


def keep_speed(checkpoint: Path, result: Mapping[str, Any], settings: Settings, name: str) -> None:
    """Time the engines on what the evaluation called the pipeline with, and keep it beside the checkpoint."""
    prepare(settings)
    device = device_named(name)
    reference = open_source(
        str(result["against"]), device=device, candidate=checkpoint, engine="simulated", schedule="nearest"
    )
    if not isinstance(reference, PipelineSource):
        raise SpecError(
            f"{checkpoint} was compared with a folder of images, and --speed needs a model to compare with: "
            f"stepquant evaluate {checkpoint} --against MODEL"
        )
    arguments = first_of(result.get("arguments", {}), int(result["n"]), 1)
    if arguments is None:
        raise SpecError(
            f"{checkpoint} was evaluated with arguments that are not kept, such as tensors or pictures: --speed cannot "
            "call its pipeline. Leave --speed out."
        )
    with interruptible("Engines were not timed; evaluations that were finished are kept."):
        found = measure_speed(
            reference.pipe,
            lambda engine: _loaded(checkpoint, result, device, engine),
            steps=int(result["steps"]),
            arguments=arguments,
            progress=progress_for(settings),
        )
    replace_text(speed_path(checkpoint), json_text(found) + "\n")


def _refuse_without_prompts(checkpoint: Path) -> None:
    """Refuse to evaluate a checkpoint whose pipeline needs prompts, which this command does not take."""
    if not (checkpoint / "model_index.json").is_file():  # no pipeline of diffusers
        return
    import diffusers

    name = read_manifest(checkpoint).pipeline.class_name
    pipeline = getattr(diffusers, name, None)
    if pipeline is not None and "prompt" in inspect.signature(pipeline.__call__).parameters:
        raise SpecError(
            f"{checkpoint} has not been evaluated, and {name} needs prompts: evaluate it first: "
            f"stepquant evaluate {checkpoint} --prompts FILE"
        )


def write_page(
    checkpoints: Sequence[Path],
    results: Sequence[Mapping[str, Any]],
    out: Path,
    settings: Settings,
    device_and_batch: tuple[str, int],
) -> dict[str, Any]:
    """Sample the images to show, write the page, and return the images (see `report.page.Images`)."""
    from stepquant.report.comparable import refuse_other_references
    from stepquant.report.page import Origin, write_report  # matplotlib is slow to import

    refuse_other_references(results)
    descriptions = [inspect_checkpoint(checkpoint) for checkpoint in checkpoints]
    origins = [cast(Origin, read_origin(checkpoint)) for checkpoint in checkpoints]
    images = _images_for(checkpoints, results, settings, device_and_batch)
    found = [dict(result) for result in results]
    write_report(found, images, descriptions, out, origins=origins, command=settings.command)
    return images


def _images_for(
    checkpoints: Sequence[Path],
    results: Sequence[Mapping[str, Any]],
    settings: Settings,
    device_and_batch: tuple[str, int],
) -> dict[str, Any]:
    """The same few seeds of the reference and of every checkpoint, and the way of each from noise to image
    (see `report.page.Images`).
    """
    from stepquant.report.groups import rows_over_time  # matplotlib is slow to import
    from stepquant.report.walks import Walks

    first = results[0]
    seeds = [int(seed) for seed in first["images"]["seeds"]][:_IMAGES]
    arguments = first_of(first.get("arguments", {}), int(first["n"]), len(seeds))
    if arguments is None:
        return {"seeds": seeds, "candidates": [], "notes": [_NOT_KEPT]}
    gone = [str(result["onto"]) for result in results if result.get("onto") and not Path(result["onto"]).is_dir()]
    if gone:
        note = f"No images: the evaluation had the pipeline's other denoiser from {gone[0]}, which is gone."
        return {"seeds": seeds, "candidates": [], "notes": [note]}
    name, batch_size = device_and_batch
    prepare(settings)
    device = device_named(name)
    progress = progress_for(settings)
    common: dict[str, Any] = {"seeds": seeds, "batch_size": batch_size, "arguments": arguments, "progress": progress}
    steps = [int(result["steps"]) for result in results]
    notes = _of_images(checkpoints, results, steps)
    reference = open_source(
        str(first["against"]), device=device, candidate=checkpoints[0], engine="simulated", schedule="nearest"
    )
    found: dict[str, Any] = {"seeds": seeds, "candidates": [], "rows": [], "notes": notes}
    with interruptible("The report was not written; evaluations that were finished are kept."):
        walks = None
        if isinstance(reference, PipelineSource):
            found["reference"] = api.sample(reference.pipe, steps=steps[0], **common)
            if len(set(steps)) == 1:
                run = Run(progress=progress)
                walks = Walks(reference.pipe, seeds=seeds, steps=steps[0], run=run, arguments=arguments)
            else:
                notes.append("No films and no errors of layers: the evaluations have different numbers of steps.")
        else:
            found["reference"] = reference.images(seeds, steps=None, arguments={})
            notes.append("No films and no errors of layers: the reference is a folder of images.")
        for checkpoint, result, own in zip(checkpoints, results, steps, strict=True):
            pipe = _loaded(checkpoint, result, device)
            found["candidates"].append(api.sample(pipe, steps=own, **common))
            found["rows"].append(rows_over_time(pipe))
            if walks is not None:
                walks.add(pipe)
    if walks is None:
        return found
    walked = walks.found()
    return {**found, **walked, "notes": [*notes, *walked["notes"]]}


def _loaded(checkpoint: Path, result: Mapping[str, Any], device: Any, engine: str = "simulated") -> Any:
    """The checkpoint as it was evaluated, with the other denoiser of `--onto`."""
    onto = result.get("onto")
    other = {} if onto is None else {"onto": api.load(Path(onto), engine="simulated", schedule="nearest")}
    return api.load(checkpoint, device=device, engine=engine, schedule="nearest", **other)


def _of_images(checkpoints: Sequence[Path], results: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> list[str]:
    """What must be said about the images of evaluations that differ."""
    notes = []
    other = [f"{path.name} with {own}" for path, own in zip(checkpoints, steps, strict=True) if own != steps[0]]
    if other:
        notes.append(
            f"The reference's images have {steps[0]} steps, those of {', '.join(other)}: their differences hold what "
            "the steps change, too."
        )
    if any(result.get("arguments", {}) != results[0].get("arguments", {}) for result in results):
        notes.append(f"All images are made with the arguments that {checkpoints[0].name} was evaluated with.")
    return notes
