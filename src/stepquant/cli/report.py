"""`stepquant report`: one HTML page about one or several checkpoints, from the evaluations kept beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from stepquant import api
from stepquant.cli.console import Settings, interruptible, progress_for, stdout_console
from stepquant.cli.evaluate import evaluate_and_keep
from stepquant.cli.outputs import read_evaluation, read_origin, refuse_existing
from stepquant.cli.work import Sampling, device_named, prepare
from stepquant.evaluate.arguments import first_of
from stepquant.evaluate.source import PipelineSource, open_source
from stepquant.inspection import inspect_checkpoint
from stepquant.run import Run

__all__ = ["report", "write_page"]

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
    overwrite: bool = False,
) -> None:
    """Write the page; checkpoints without an evaluation are evaluated first."""
    refuse_existing(out, overwrite=overwrite)
    device, batch_size = device_and_batch
    results = []
    for checkpoint in checkpoints:
        found = read_evaluation(checkpoint)
        if found is None:
            sampling = Sampling(seeds, batch_size=batch_size, device=device, engine="simulated")
            found = evaluate_and_keep(checkpoint, sampling, settings)
        results.append(found)
    write_page(checkpoints, results, out, settings, (device, batch_size))
    if not settings.quiet:
        stdout_console().print(f"The report is {out}.")


def write_page(
    checkpoints: Sequence[Path],
    results: Sequence[Mapping[str, Any]],
    out: Path,
    settings: Settings,
    device_and_batch: tuple[str, int],
) -> dict[str, Any]:
    """Sample the images to show, write the page, and return the images (see `report.page.Images`)."""
    from stepquant.report.page import Origin, write_report  # matplotlib is slow to import

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

    name, batch_size = device_and_batch
    prepare(settings)
    device = device_named(name)
    first = results[0]
    seeds = [int(seed) for seed in first["images"]["seeds"]][:_IMAGES]
    arguments = first_of(first.get("arguments", {}), int(first["n"]), len(seeds))
    if arguments is None:
        return {"seeds": seeds, "candidates": [], "notes": [_NOT_KEPT]}
    common: dict[str, Any] = {"seeds": seeds, "steps": int(first["steps"]), "batch_size": batch_size}
    common["arguments"] = arguments
    progress = progress_for(settings)
    reference = open_source(str(first["against"]), device=device, engine="simulated", schedule="nearest")
    found: dict[str, Any] = {"seeds": seeds, "candidates": [], "rows": []}
    with interruptible("The report was not written; evaluations that were finished are kept."):
        walks = None
        if isinstance(reference, PipelineSource):
            found["reference"] = api.sample(reference.pipe, progress=progress, **common)
            walks = Walks(
                reference.pipe, seeds=seeds, steps=common["steps"], run=Run(progress=progress), arguments=arguments
            )
        else:
            found["reference"] = reference.images(seeds, steps=None, arguments={})
            found["notes"] = ["No films and no errors of layers: the reference is a folder of images."]
        for checkpoint in checkpoints:
            pipe = api.load(checkpoint, device=device, engine="simulated", schedule="nearest")
            found["candidates"].append(api.sample(pipe, progress=progress, **common))
            found["rows"].append(rows_over_time(pipe))
            if walks is not None:
                walks.add(pipe)
    return found if walks is None else found | walks.found()
