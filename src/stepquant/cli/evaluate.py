"""`stepquant evaluate`: measure a candidate against its reference, keep the results beside it, and check the gates."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stepquant.cli import views
from stepquant.cli.console import (
    Interrupted,
    Settings,
    interruptible,
    progress_for,
    stderr_console,
    stdout_console,
    write_json,
)
from stepquant.cli.outputs import evaluation_path, refuse_unwritable_json
from stepquant.cli.work import (
    Sampling,
    base_model_of,
    device_named,
    fitted_steps,
    prepare,
    refuse_onto_a_model,
    steps_of,
)
from stepquant.errors import SpecError, StepquantError
from stepquant.evaluate.clip import ClipScore
from stepquant.evaluate.compare import DISTRIBUTIONS, METRICS, NotFiniteImages
from stepquant.evaluate.compare import evaluate as compare
from stepquant.evaluate.features import Features
from stepquant.evaluate.folder import discard
from stepquant.evaluate.gates import Gate, check_gates, parse_gates
from stepquant.evaluate.lpips import DOWNLOADS, Lpips
from stepquant.evaluate.named_features import features_named
from stepquant.evaluate.source import ImageFolder, PipelineSource, Source, open_source
from stepquant.evaluate.weights import MissingWeights
from stepquant.inspection import inspect_checkpoint
from stepquant.manifest import MANIFEST_NAME
from stepquant.processes import joined
from stepquant.run import Run

__all__ = ["Measuring", "evaluate", "evaluate_and_keep", "measure"]

logger = logging.getLogger(__name__)

_EVALUATED = range(1000, 1256)
"""Seeds of an evaluation that names none and compares no folder of images."""


@dataclass(frozen=True)
class Measuring:
    """What `evaluate` measures beside the defaults, and what it does with what is there already.

    features: "digits", "inception" (with or without "=FILE"), "mobilenetv2=FILE" or "none"; None takes the shipped
        ones where they fit.
    protocol: a preset of `evaluate.protocol`. lpips: weights of its backbone. clip: folder or hub id of a CLIP
        model. gates: such as "psnr<28".
    """

    features: str | None = None
    protocol: str | None = None
    lpips: Path | None = None
    clip: str | None = None
    gates: tuple[str, ...] = ()
    resume: bool = False
    overwrite: bool = False
    allow_calibration_seeds: bool = False


def evaluate(
    candidate: str,
    against: str | None,
    sampling: Sampling,
    measuring: Measuring,
    settings: Settings,
    json_target: str | None,
) -> bool:
    """Evaluate, keep the result beside the candidate, and show it. Returns whether all gates held."""
    gates = parse_gates(measuring.gates, METRICS)
    refuse_unwritable_json(json_target)
    processes = joined()
    try:
        results = measure(candidate, against, sampling, settings, measuring)
    except NotFiniteImages as error:
        if processes.first:
            _write_broken(error, gates, json_target)
        if not gates:
            raise
        if processes.first:
            stderr_console().print(f"Error: {error}", style="red", soft_wrap=True)
            views.complain_of_gates(check_gates(gates, {}))
        return False
    if gates:
        results["gates"] = check_gates(gates, results["metrics"])
    failed = [gate for gate in results.get("gates", []) if gate["failed"]]
    if not processes.first:
        return not failed
    kept = _keep(results, Path(candidate))
    # Also where nothing could be kept, as of a shipped model: it is finished, and would pass for one that was not.
    discard(_evaluation_work(candidate))
    if json_target is not None:
        write_json(results, json_target)
    if json_target != "-" and not settings.quiet:
        views.show_results(results)
        if kept:
            use = " for `stepquant report`" if _is_checkpoint(candidate) else ""  # it takes nothing else
            stdout_console().print(f"Kept as {evaluation_path(Path(candidate))}{use}.")
    views.complain_of_gates(failed)
    return not failed


def _write_broken(error: NotFiniteImages, gates: Sequence[Gate], json_target: str | None) -> None:
    """Write what there is of an evaluation without figures; nobody has seen that its gates hold, so they fail."""
    results = {**error.results, **({"gates": check_gates(gates, {})} if gates else {})}
    if json_target is not None:
        write_json(results, json_target)


def measure(
    candidate: str | Path,
    against: str | None,
    sampling: Sampling,
    settings: Settings,
    measuring: Measuring | None = None,
) -> dict[str, Any]:
    """Results of schema 1. candidate and against: whatever `evaluate.source.open_source` opens.

    against None: the model that the candidate, a checkpoint then, was made from.
    """
    measuring = measuring or Measuring()
    prepare(settings)
    device = device_named(sampling.device)
    options: dict[str, Any] = {"device": device, "engine": sampling.engine, "schedule": sampling.schedule}
    options["scheduler"] = sampling.scheduler
    if sampling.onto is not None:
        refuse_onto_a_model(str(candidate))
    # Before the pipelines: opening them may take minutes, and a mistyped path is seen at once.
    features, lpips, clip, remarks = _networks(measuring, device)
    source = open_source(str(candidate), onto=sampling.onto, **options)
    base = against or base_model_of(Path(candidate), _description(candidate))
    checkpoints = [name for name in (str(candidate), base) if _is_checkpoint(name)]
    if sampling.scheduler and not any(_is_model(name) for name in (str(candidate), base)):
        raise SpecError(
            f"--scheduler is for models, and neither {candidate} nor {base} is one: checkpoints sample with the "
            "scheduler that they were calibrated for, and images are there already."
        )
    reference = open_source(base, candidate=candidate, **options)
    seeds = sampling.seeds or source.seeds or reference.seeds or list(_EVALUATED)
    arguments = sampling.pipeline_arguments(len(seeds))
    kind = "images" if isinstance(reference, ImageFolder) else "checkpoint" if base in checkpoints else "model"
    named = {
        "candidate": str(Path(candidate)),
        "against": base,
        "reference_kind": kind,
        # What ran checkpoints; models and folders of images have no engine.
        "engine": sampling.engine if checkpoints else None,
        "command": settings.command,
        **({} if sampling.onto is None else {"onto": str(sampling.onto)}),
    }
    work, processes = _evaluation_work(candidate), joined()
    if measuring.overwrite:  # only now: what was mistyped has been refused by here, and costs nothing that was measured
        processes.from_first(lambda: discard(work))
    with (
        _evaluation_kept(work) if processes.first else nullcontext(),
        interruptible(f"What is measured so far is in {work}; go on with the same command and --resume."),
    ):
        try:
            results = compare(
                source,
                reference,
                seeds=seeds,
                steps=_common_steps(sampling, (source, reference)),
                batch_size=sampling.batch_size,
                run=Run(
                    work=work if os.access(work.parent, os.W_OK) else None,
                    progress=progress_for(settings),
                    processes=processes,
                ),
                arguments=arguments,
                features=features,
                protocol=measuring.protocol,
                lpips=lpips,
                clip=clip,
                resume=measuring.resume,
                remarks=remarks,
                allow_calibration_seeds=measuring.allow_calibration_seeds,
            )
        except NotFiniteImages as error:
            error.results |= named
            raise
    return results | named


def _is_checkpoint(source: str | Path) -> bool:
    return (Path(source) / MANIFEST_NAME).is_file()


def _is_model(source: str) -> bool:
    """Whether this is neither a checkpoint nor a folder of images."""
    folder = Path(source)
    return not folder.is_dir() or ((folder / "model_index.json").is_file() and not _is_checkpoint(folder))


def _description(source: str | Path) -> dict[str, Any]:
    """What a checkpoint holds; nothing for any other source."""
    return inspect_checkpoint(Path(source)) if _is_checkpoint(source) else {}


def _common_steps(sampling: Sampling, sources: Iterable[Source]) -> int | None:
    """Steps as asked for, else of the first checkpoint or correction, else 20; None if there is nothing to sample."""
    pipelines = [source for source in sources if source.seeds is None]
    if sampling.steps is not None or not pipelines:
        return sampling.steps
    for source in pipelines:
        if found := _description(source.name):
            return steps_of(found)
        if isinstance(source, PipelineSource) and (steps := fitted_steps(source.pipe)):
            return steps
    return 20


def _networks(
    measuring: Measuring, device: Any
) -> tuple[Features | Literal["shipped", "none"], Lpips | None, ClipScore | None, list[str]]:
    """Networks whose weights the user named. One whose file is not there is a remark: other figures do not need it.

    The remarks are told at once. Raises SpecError for a gate on a figure whose network is not there.
    """
    features: Features | Literal["shipped", "none"] = "shipped"
    lpips, clip, remarks = None, None, []
    if measuring.features == "none":
        features = "none"
        _refuse_gates(measuring, DISTRIBUTIONS, "--features none leaves out the distances of distributions.")
    elif measuring.features is not None:
        try:
            features = features_named(measuring.features, device=device)
        except MissingWeights as error:
            features = "none"
            remarks.append(f"No distances of distributions (FID and the like): {error}")
            _refuse_gates(measuring, DISTRIBUTIONS, error)
    if measuring.lpips is None:
        how = " or ".join(f"{url} ({kind})" for kind, url in DOWNLOADS.items())
        _refuse_gates(measuring, ("lpips",), f"LPIPS needs --lpips FILE. Download {how} and give its path.")
    else:
        try:
            lpips = Lpips(measuring.lpips, device=device)
        except MissingWeights as error:
            remarks.append(f"No LPIPS: {error}")
            _refuse_gates(measuring, ("lpips",), error)
    if measuring.clip is None:
        _refuse_gates(measuring, ("clip_score",), "The CLIP score needs --clip MODEL and prompts.")
    else:
        try:
            clip = ClipScore.from_pretrained(measuring.clip, device=device)
        except MissingWeights as error:
            remarks.append(f"No CLIP score: {error}")
            _refuse_gates(measuring, ("clip_score",), error)
    for remark in remarks:
        said = f"{remark} All other figures are computed."
        logger.warning("%s", said, extra={"told": True})
        stderr_console().print(f"Note: {said}", soft_wrap=True)
    return features, lpips, clip, remarks


def _refuse_gates(measuring: Measuring, figures: Sequence[str], why: object) -> None:
    """Raise SpecError if a gate is on one of these figures: they will not be measured, so it is bound to fail."""
    found = [str(gate) for gate in parse_gates(measuring.gates, METRICS) if gate.metric in figures]
    if found:
        raise SpecError(f"--fail-if {found[0]}: this figure cannot be measured. {why} Or leave out the gate.")


def _evaluation_work(candidate: str | Path) -> Path:
    """`CANDIDATE.evaluation.work`; of a model that is no folder here, in the current one."""
    path = Path(candidate)
    beside = path if path.exists() else Path(str(candidate).replace("/", "--"))
    return evaluation_path(beside).with_suffix(".work")


@contextmanager
def _evaluation_kept(work: Path) -> Iterator[None]:
    """Leave nothing of an evaluation that cannot go on as it is, or has nothing to go on from.

    What was there before stays, and so does what an interruption or a lack of memory has left.
    """
    before = work.exists()
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        if not before and (isinstance(error, StepquantError) or not any(work.glob("*.safetensors"))):
            discard(work)
        raise


def evaluate_and_keep(checkpoint: Path, sampling: Sampling, settings: Settings) -> dict[str, Any]:
    """Evaluate against the model that was quantized, and keep the result beside the checkpoint.

    Goes on with what an interruption left.
    """
    results = measure(checkpoint, None, sampling, settings, Measuring(resume=True))
    _keep(results, checkpoint)
    discard(_evaluation_work(checkpoint))
    return results


def _keep(results: Mapping[str, Any], candidate: Path) -> bool:
    """Write the results beside the candidate; a place where nothing can be written is no reason to lose them."""
    if not candidate.is_dir():  # a shipped model or a hub id has no place of its own
        return False
    # Beside itself a checkpoint is perfect, which `report` must not take for what quantizing has cost.
    if _is_checkpoint(candidate) and Path(results["against"]).resolve() == candidate.resolve():
        return False
    try:
        write_json(results, str(evaluation_path(candidate)))
    except OSError:
        return False
    return True
