"""A candidate beside its reference: paired metrics, distances of distributions, drift.

Batches of images go through every measurement and are dropped. What they leave, a few numbers and features an image, is
kept in the work folder of the run, so an evaluation that was interrupted goes on where it was.
"""

from __future__ import annotations

import datetime
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor

from stepquant._version import __version__
from stepquant.calibrate.trajectory import record, seal
from stepquant.errors import CalibrationError, EvaluationError, ModelError, SpecError
from stepquant.evaluate.arguments import plain_arguments
from stepquant.evaluate.clip import ClipScore, prompts_for
from stepquant.evaluate.distributions import Spread, inception_score, kernel_distance, precision_recall
from stepquant.evaluate.drift import drift_curves, flat_field, summary
from stepquant.evaluate.dtypes import in_own_dtype, whole_float32
from stepquant.evaluate.features import DigitFeatures, Features, extract, input_size
from stepquant.evaluate.folder import EvaluationFolder, evaluation_folder
from stepquant.evaluate.frechet import FeatureStatistics, frechet_distance
from stepquant.evaluate.images import check_images, not_finite, to_uint8
from stepquant.evaluate.lpips import Lpips
from stepquant.evaluate.paired import SSIM_WINDOW, Interval, intervals, paired_columns
from stepquant.evaluate.protocol import Protocol, protocol_named
from stepquant.evaluate.seeds import refuse_calibration_seeds
from stepquant.evaluate.source import ImageFolder, PipelineSource, Source, as_source, check_same_schedule
from stepquant.model.correction import correction_of
from stepquant.model.families import find_denoiser, several_denoisers
from stepquant.model.pipeline import arguments_of_batch
from stepquant.run import Run

__all__ = ["METRICS", "SCHEMA", "NotFiniteImages", "evaluate", "features_for"]

SCHEMA = 1
DRIFT_SEEDS = 64
"""Drift is measured on at most this many of the seeds: it takes three more samplings of each."""

DISTRIBUTIONS = (
    "frechet_to_fp",
    "frechet_to_data",
    "sfid_to_fp",
    "kid_to_fp",
    "inception_score",
    "precision",
    "recall",
)
"""Those of `METRICS` that need features."""

METRICS = (
    "psnr",
    "ssim",
    "mae",
    "lpips",
    "clip_score",
    *DISTRIBUTIONS,
    "drift_final",
    "cosine_final",
    "noise_level",
    "white_point_shift",
)
"""Every key that `metrics` of a result may have."""


class NotFiniteImages(EvaluationError):  # noqa: N818 - says what was found
    """Images with NaN or infinity: there is nothing to compare.

    results: those of `evaluate`, without figures and with this error's message as a note.
    """

    results: dict[str, Any]


_Features = Features | Literal["shipped", "none"]


def features_for(images: Tensor) -> Features | None:
    """The shipped features that fit these images: digits for 32x32 single-channel ones, otherwise none."""
    return DigitFeatures() if tuple(images.shape[1:]) == (1, 32, 32) else None


@dataclass
class _Setting:
    """What one evaluation is asked for, and the sentences that go with its result."""

    candidate: Source
    against: Source
    seeds: list[int]
    steps: int | None
    batch_size: int
    arguments: Mapping[str, Any]
    features: _Features
    protocol: str | None
    lpips: Lpips | None
    clip: ClipScore | None
    notes: list[str] = field(default_factory=list)
    extractor: Features | None = None
    """Found at the first images, if the shipped one is to be taken."""

    def batches(self, count: int) -> list[slice]:
        """Of the first `count` seeds."""
        return [slice(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]

    def arguments_of(self, batch: slice) -> dict[str, Any]:
        """What has one entry for each seed is cut with the seeds."""
        return arguments_of_batch(self.arguments, batch, len(self.seeds))

    def rules(self) -> Protocol:
        """The protocol, once the features are known."""
        return protocol_named(self.protocol, None if self.extractor is None else input_size(self.extractor))

    def choose_extractor(self, shape: Sequence[int]) -> None:
        """For images `[C, H, W]`."""
        if self.extractor is None and self.features != "none":
            shipped = features_for(torch.empty(0, *shape)) if self.features == "shipped" else None
            self.extractor = shipped if isinstance(self.features, str) else self.features

    @property
    def folders(self) -> list[ImageFolder]:
        """Sides that are folders of 8-bit images: both sides are rounded then, or equal images would not be equal."""
        return [source for source in (self.candidate, self.against) if isinstance(source, ImageFolder)]

    def identity(self) -> dict[str, Any]:
        """What must be the same for an evaluation to go on."""
        return {
            "candidate": self.candidate.identity,
            "against": self.against.identity,
            "seeds": self.seeds,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "arguments": plain_arguments(self.arguments),
            "features": self.features if isinstance(self.features, str) else self.features.identity,
            "protocol": self.protocol,
            "lpips": None if self.lpips is None else self.lpips.identity,
            "clip": None if self.clip is None else self.clip.identity,
            "stepquant": __version__,
        }


def evaluate(
    candidate: Any,
    against: Any,
    *,
    seeds: Sequence[int],
    steps: int | None,
    batch_size: int = 16,
    features: _Features | None = None,
    arguments: Mapping[str, Any] | None = None,
    run: Run | None = None,
    protocol: str | None = None,
    lpips: Lpips | None = None,
    clip: ClipScore | None = None,
    resume: bool = False,
    remarks: Sequence[str] = (),
    allow_calibration_seeds: bool = False,
) -> dict[str, Any]:
    """Compare two sources of images on equal seeds; JSON values of schema 1.

    candidate, against: pipelines, or what `evaluate.source` makes (folders of images).
    steps: of sampling; None where both sides are folders.
    features: for the distances of distributions; None or "shipped" takes the shipped ones where they fit the images.
    protocol: a preset of `evaluate.protocol`; None takes the one that fits the features.
    clip: for the CLIP score, where `arguments` hold the prompts.
    run: its work folder, if it has one, keeps what is measured; `resume` goes on with it. The caller removes it. Its
        processes take turns with the batches; figures are made from them in order, so they are the same for any number
        of processes.
    remarks: sentences about figures that the caller could not provide for; they go before the notes.
    allow_calibration_seeds: whether seeds may be among those that either side was calibrated on, as far as a pipeline
        of `quantize`, `compensate` or `load` says it, or the folder that diffusers has opened one from. Images of these
        look better than others.

    Figures that cannot be measured are left out, and `notes` says why. Raises EvaluationError for two sources that
    cannot be compared (sizes, channels, schedules, seeds) and for images that are not in [0, 1], NotFiniteImages for
    images with NaN or infinity; SpecError for settings that make no sense.
    """
    run = run or Run()
    setting = _Setting(
        as_source(candidate), as_source(against), list(seeds), steps, batch_size, dict(arguments or {}),
        "shipped" if features is None else features, protocol, lpips, clip, list(remarks),
    )  # fmt: skip
    _check(setting)
    if not allow_calibration_seeds:
        _refuse_calibration_seeds(setting)
    if len(setting.folders) == 1:
        (folder_side,) = setting.folders
        setting.notes.append(
            f"Both sides are rounded to 8 bits before every figure, because {folder_side.name} holds 8-bit images."
        )
    identity = setting.identity()
    processes = run.processes
    processes.check_same("evaluations", identity)
    # The folder of another process than the first stays empty.
    try:
        with evaluation_folder(run.work if processes.first else None, identity, resume=resume) as folder:
            shape = _collect(setting, folder, run)
            began = time.perf_counter()
            metrics = processes.from_first(lambda: _metrics(setting, folder, shape))
            distances = time.perf_counter() - began
            curves = _drift(setting, folder, run)
            drift = _drift_results(setting, curves, metrics)
            seconds = processes.from_first(lambda: _seconds(setting, folder, distances, curves))
    except NotFiniteImages as error:
        setting.notes.append(f"No figures: {error}")
        error.results = _results(setting, identity, {}, {}, {})
        raise
    results = _results(setting, identity, metrics, drift, seconds)
    return processes.from_first(lambda: results)


def _results(
    setting: _Setting,
    identity: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
    drift: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """JSON values of schema 1."""
    provenance = {
        "n": len(setting.seeds),
        "seeds": _seeds_text(setting.seeds),
        "reference": identity["against"],
        "candidate": identity["candidate"],
    }
    extractor = setting.extractor
    return {
        "schema": SCHEMA,
        "candidate": "",
        "against": "",
        "n": len(setting.seeds),
        "seeds": _seeds(setting.seeds),
        "steps": setting.steps,
        "scheduler": _scheduler(setting),
        "arguments": identity["arguments"],
        "features": None if extractor is None else f"{extractor.name} ({extractor.identity[:12]})",
        "protocol": None if extractor is None else setting.rules().name,
        "metrics": {name: {**provenance, **metrics[name]} for name in METRICS if name in metrics},
        "drift": drift,
        "images": {"seeds": setting.seeds[:8]},
        "notes": setting.notes,
        "seconds": seconds,
        "command": " ".join(sys.argv),
        "versions": {"stepquant": __version__, **{name: version(name) for name in ("torch", "diffusers")}},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _check(setting: _Setting) -> None:
    """What can be known before anything is sampled."""
    if not setting.seeds or setting.batch_size < 1:
        raise SpecError(
            f"An evaluation needs at least one seed and a batch size of at least 1, found {len(setting.seeds)} seeds "
            f"and {setting.batch_size}."
        )
    if setting.features not in ("shipped", "none") and isinstance(setting.features, str):
        raise SpecError(f"features must be 'shipped', 'none' or an extractor, found {setting.features!r}.")
    protocol_named(setting.protocol, None)
    if setting.clip is not None:
        prompts_for(setting.arguments, len(setting.seeds))
    for source in (setting.candidate, setting.against):
        there = source.seeds
        missing = [] if there is None else sorted(set(setting.seeds) - set(there))
        if there is not None and missing:
            raise EvaluationError(
                f"{source.name} has no images of {len(missing)} of the {len(setting.seeds)} seeds, the first of them "
                f"{missing[0]}. It has {_seeds_text(there)}."
            )
        if isinstance(source, PipelineSource) and setting.steps is None:
            raise EvaluationError(f"{source.name} has to be sampled: say with how many steps.")
    # A damaged file must not end an evaluation that has sampled for hours.
    shapes = [folder.check(setting.seeds) for folder in setting.folders]
    if len(shapes) == 2:
        _check_equal_shapes(setting, setting.seeds[0], *shapes)
    candidate, against, steps = setting.candidate, setting.against, setting.steps
    if isinstance(candidate, PipelineSource) and isinstance(against, PipelineSource) and steps is not None:
        check_same_schedule(candidate, against, steps)


def _refuse_calibration_seeds(setting: _Setting) -> None:
    for source in (setting.candidate, setting.against):
        for calibration in source.calibrations if isinstance(source, PipelineSource) else ():
            refuse_calibration_seeds(setting.seeds, calibration, name=source.name)


def _seeds(seeds: Sequence[int]) -> list[int]:
    """[first, last] of consecutive seeds, otherwise all of them."""
    consecutive = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return [seeds[0], seeds[-1]] if consecutive and len(seeds) > 1 else list(seeds)


def _seeds_text(seeds: Sequence[int]) -> str:
    """[0, 1, 2, 9] -> "0-2,9"."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1][1:] = [seed]
        else:
            runs.append([seed])
    return ",".join("-".join(map(str, ends)) for ends in runs)


def _scheduler(setting: _Setting) -> str | None:
    for source in (setting.against, setting.candidate):
        if isinstance(source, PipelineSource):
            return type(source.pipe.scheduler).__name__
    return None


def _name(batch: slice) -> str:
    return f"images-{batch.start:09d}"


def _drift_name(batch: slice) -> str:
    return f"drift-{batch.start:09d}"


def _shape_in(folder: EvaluationFolder, batch: slice) -> tuple[int, ...]:
    return tuple(folder.load(_name(batch), "shape")["shape"].tolist())


def _collect(setting: _Setting, folder: EvaluationFolder, run: Run) -> tuple[int, ...]:
    """Measure every batch of images that is not measured yet. Returns the shape of the images, `[C, H, W]`."""
    batches = setting.batches(len(setting.seeds))

    def known() -> tuple[list[slice], tuple[int, ...] | None]:
        there = [batch for batch in batches if _name(batch) in folder]
        return [batch for batch in batches if batch not in there], _shape_in(folder, there[0]) if there else None

    missing, shape = run.processes.from_first(known)
    with run.progress.track("Evaluating", len(setting.seeds)) as advance:
        advance(len(setting.seeds) - sum(batch.stop - batch.start for batch in missing))
        measured = run.processes.in_turn(lambda batch: _measure(setting, batch, shape), missing)
        for batch, found in zip(missing, measured, strict=True):
            if isinstance(found, str):
                raise NotFiniteImages(found)
            own = tuple(found["shape"].tolist())
            _check_shape(setting, batch, own, shape)
            shape = own
            if run.processes.first:
                folder.save(_name(batch), found)
            advance(batch.stop - batch.start)
    assert shape is not None  # there is at least one seed
    setting.choose_extractor(shape[-3:])
    return shape


def _check_equal_shapes(setting: _Setting, seed: int, ours: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    """Raise EvaluationError, which names the file of this seed of a folder, for images of different shapes."""
    if ours == theirs:
        return
    sides = (setting.candidate, setting.against)
    names = [
        f"{side.name} ({side.path_of(seed).name})" if isinstance(side, ImageFolder) else side.name for side in sides
    ]
    advice = "Give two sources of the same size and channels."
    if setting.folders and ours[-2:] == theirs[-2:]:
        advice = "Convert the files of one folder (Pillow: convert('RGB') or convert('L')), or sample both sides alike."
    elif setting.folders:
        advice = "Sample both sides at the same size: resized images would change every figure."
    raise EvaluationError(
        f"{names[0]} and {names[1]} give images of different shapes: {list(ours)} and {list(theirs)} [C, H, W]. "
        f"{advice}"
    )


def _check_shape(setting: _Setting, batch: slice, ours: tuple[int, ...], shape: tuple[int, ...] | None) -> None:
    """Raise EvaluationError for images of another shape than those before."""
    if shape not in (None, ours):
        raise EvaluationError(
            f"{setting.candidate.name} gives images of {list(ours)} for seeds {_seeds_text(setting.seeds[batch])} and "
            f"of {list(shape or ())} before them."
        )


def _measure(setting: _Setting, batch: slice, shape: tuple[int, ...] | None) -> dict[str, Tensor] | str:
    """What one batch leaves: `pairs.*` `[B]`, and of both sides `features`, `logits`, `spatial`, `clip`.

    Of images that are not finite a sentence: the other processes must hear of it, too.
    """
    began = time.perf_counter()
    seeds, arguments = setting.seeds[batch], setting.arguments_of(batch)
    images = {}
    for side, source in (("candidate", setting.candidate), ("reference", setting.against)):
        images[side] = source.images(seeds, steps=setting.steps, arguments=arguments)
        if broken := not_finite(images[side]):
            model = source.name if isinstance(source, PipelineSource) and source.named else "MODEL"
            return (
                f"{broken} of {len(seeds)} images of {source.name}, seeds {_seeds_text(seeds)}, hold NaN or infinite "
                f"values. `stepquant doctor {model}` names the layer that they come from."
            )
        check_images(_pictures(images[side]), what=f"Images of {source.name}, seeds {_seeds_text(seeds)},")
    sampled = time.perf_counter()
    ours, theirs = (tuple(images[side].shape[1:]) for side in ("candidate", "reference"))
    _check_equal_shapes(setting, seeds[0], ours, theirs)
    images = {side: _pictures(found) for side, found in images.items()}
    if setting.folders:
        images = {side: to_uint8(found).float() / 255 for side, found in images.items()}
    _check_shape(setting, batch, ours, shape)
    setting.choose_extractor(ours[-3:])
    lpips = setting.lpips if setting.lpips is not None and min(ours[-2:]) >= setting.lpips.smallest else None
    with whole_float32():
        pairs = paired_columns(images["candidate"], images["reference"], lpips)
        found = {f"pairs.{name}": _of_each(column, len(seeds)) for name, column in pairs.items()}
        # A video is identical if all its frames are.
        found["pairs.identical"] = found["pairs.identical"].floor()
        if setting.extractor is not None:
            rules, size = setting.rules(), input_size(setting.extractor)
            for side in images:
                extracted = extract(setting.extractor, rules.prepare(images[side], size))
                for part in ("features", "logits", "spatial"):
                    value = getattr(extracted, part)
                    if value is not None:
                        found[f"{side}.{part}"] = value
        prompts = None if setting.clip is None else prompts_for(setting.arguments, len(setting.seeds))
        if setting.clip is not None and prompts is not None:
            for side in images:
                each = [prompt for prompt in prompts[batch] for _ in range(_frames(ours))]
                found[f"{side}.clip"] = _of_each(setting.clip(images[side], each), len(seeds))
    spent = torch.tensor([[sampled - began, time.perf_counter() - sampled]], dtype=torch.float64)
    return found | {"shape": torch.tensor(ours), "seconds": spent}


def _pictures(images: Tensor) -> Tensor:
    """Images as they are; the frames of videos `[N, frames, C, H, W]` one after the other, `[N * frames, C, H, W]`."""
    return images.flatten(0, 1) if images.ndim == 5 else images


def _frames(shape: Sequence[int]) -> int:
    """Of one video `[frames, C, H, W]`; 1 for an image `[C, H, W]`."""
    return shape[0] if len(shape) == 4 else 1


def _of_each(column: Tensor, count: int) -> Tensor:
    """`[count * frames]` -> `[count]`, the mean over each one's frames."""
    return column.reshape(count, -1).mean(dim=1)


def _column(setting: _Setting, folder: EvaluationFolder, name: str) -> Tensor | None:
    """One tensor of all batches, joined; None where there is none."""
    parts = [folder.load(_name(batch), name).get(name) for batch in setting.batches(len(setting.seeds))]
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _required(setting: _Setting, folder: EvaluationFolder, name: str) -> Tensor:
    column = _column(setting, folder, name)
    assert column is not None
    return column


def _metrics(setting: _Setting, folder: EvaluationFolder, shape: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Everything but drift, from what all batches left."""
    metrics = _paired(setting, folder, shape)
    metrics |= _clip_score(setting, folder)
    return metrics | _distributions(setting, folder, shape)


def _as_json(interval: Interval, n: int) -> dict[str, Any]:
    """One image says nothing about how images differ, so it has no interval."""
    return {"value": interval.mean} | ({"low": interval.low, "high": interval.high} if n > 1 else {})


def _paired(setting: _Setting, folder: EvaluationFolder, shape: Sequence[int]) -> dict[str, dict[str, Any]]:
    identical = int(_required(setting, folder, "pairs.identical").sum())
    columns = {name: _column(setting, folder, f"pairs.{name}") for name in ("psnr", "ssim", "mae", "lpips")}
    found = intervals({name: column for name, column in columns.items() if column is not None})
    metrics = {name: _as_json(interval, len(setting.seeds)) for name, interval in found.items()}
    metrics["psnr"] |= {"unit": "dB", "identical": identical}
    small = f"{shape[-2]} x {shape[-1]}"
    if len(shape) == 4:
        setting.notes.append(
            f"The samples are videos of {shape[0]} frames: figures of pairs are means over each video's frames, and "
            "distances of distributions take every frame for an image."
        )
    if "ssim" not in metrics:
        setting.notes.append(f"No SSIM: its window is {SSIM_WINDOW} x {SSIM_WINDOW} pixels, the images are {small}.")
    if setting.lpips is not None:
        if "lpips" in metrics:
            metrics["lpips"] |= {"features": setting.lpips.name, "feature_identity": setting.lpips.identity}
        else:
            least = setting.lpips.smallest
            setting.notes.append(
                f"No LPIPS: {setting.lpips.name} needs {least} x {least} pixels, the images are {small}."
            )
    return metrics


def _clip_score(setting: _Setting, folder: EvaluationFolder) -> dict[str, dict[str, Any]]:
    if setting.clip is None:
        return {}
    ours, theirs = (_column(setting, folder, f"{side}.clip") for side in ("candidate", "reference"))
    if ours is None or theirs is None:
        setting.notes.append("No CLIP score: it needs the prompts as text: give --argument prompt='...'.")
        return {}
    found = intervals({"clip_score": ours.double()})["clip_score"]
    return {
        "clip_score": {
            **_as_json(found, len(setting.seeds)),
            "reference_value": float(theirs.double().mean()),
            "features": setting.clip.name,
            "feature_identity": setting.clip.identity,
        }
    }


def _seconds(
    setting: _Setting, folder: EvaluationFolder, distances: float, curves: Sequence[Mapping[str, Tensor]]
) -> dict[str, float]:
    """Seconds of sampling (or of reading images), of measuring them, and of drift, which samples again.

    What an earlier process has measured counts with the time that it took there.
    """
    sampling, images = _required(setting, folder, "seconds").sum(dim=0).tolist()
    drift = sum(float(rows["seconds"]) for rows in curves)
    return {"sampling": round(sampling, 3), "metrics": round(images + distances, 3), "drift": round(drift, 3)}


def _distributions(setting: _Setting, folder: EvaluationFolder, shape: Sequence[int]) -> dict[str, dict[str, Any]]:
    extractor, n, notes = setting.extractor, len(setting.seeds) * _frames(shape), setting.notes
    if extractor is None:
        if setting.features != "none":
            notes.append(
                f"No Frechet distances: no shipped features fit these images {list(shape)}. Give --features, or "
                "features=ModuleFeatures(...)."
            )
        return {}
    if n < 2:
        notes.append("No Frechet distances: they need at least two images.")
        return {}
    rules = setting.rules()
    if shape[-3] == 1 and input_size(extractor) is not None:
        notes.append(f"The images are grey; {extractor.name} saw them as RGB with three equal channels.")
    metrics = _frechet(setting, folder, extractor)
    candidate, reference = (_required(setting, folder, f"{side}.features") for side in ("candidate", "reference"))
    metrics["kid_to_fp"] = _spread(kernel_distance(candidate, reference, rules, paired=True), "subset")
    if n > rules.neighbours:
        found = precision_recall(candidate, reference, rules)
        for name in ("precision", "recall"):
            metrics[name] = {"value": getattr(found, name), "neighbours": rules.neighbours}
    else:
        notes.append(f"No precision and recall: they need at least {rules.neighbours + 1} images.")
    metrics |= _scores(setting, folder, rules)
    beside = {"features": extractor.name, "feature_identity": extractor.identity, "protocol": rules.name}
    return {name: {**figures, **beside} for name, figures in metrics.items()}


def _spread(spread: Spread, part: str) -> dict[str, Any]:
    return {"value": spread.mean, "std": spread.std, f"{part}s": spread.parts, f"{part}_size": spread.size}


def _scores(setting: _Setting, folder: EvaluationFolder, rules: Protocol) -> dict[str, dict[str, Any]]:
    """Inception scores of both sides, where the features have logits."""
    ours, theirs = (_column(setting, folder, f"{side}.logits") for side in ("candidate", "reference"))
    if ours is None or theirs is None:
        return {}
    if len(ours) < max(rules.splits, 1):
        setting.notes.append(f"No Inception score: {rules.splits} splits need at least {rules.splits} images.")
        return {}
    found = _spread(inception_score(ours, rules), "split")
    return {"inception_score": {**found, "reference_value": inception_score(theirs, rules).mean}}


def _frechet(setting: _Setting, folder: EvaluationFolder, extractor: Features) -> dict[str, dict[str, Any]]:
    """Fréchet distances to the reference and, where the features know it, to data; sFID likewise."""
    statistics: dict[str, FeatureStatistics] = {}
    for batch in setting.batches(len(setting.seeds)):
        for name, value in folder.load(_name(batch), ".features", ".spatial").items():
            statistics.setdefault(name, FeatureStatistics(value.shape[1])).update(value)
    candidate, reference = statistics["candidate.features"], statistics["reference.features"]
    found: dict[str, dict[str, Any]] = {"frechet_to_fp": {"value": frechet_distance(candidate, reference)}}
    if candidate.rank_deficient:
        setting.notes.append(
            f"Frechet distances of {candidate.n} images over {extractor.dim} features are badly biased: use more seeds."
        )
    if isinstance(extractor, DigitFeatures):
        data = FeatureStatistics.from_moments(*extractor.data_statistics())
        found["frechet_to_data"] = {
            "value": frechet_distance(candidate, data),
            "reference_value": frechet_distance(reference, data),
        }
    else:
        setting.notes.append(f"No Frechet distance to data: {extractor.name} has no data statistics.")
    if "candidate.spatial" in statistics:
        ours, theirs = statistics["candidate.spatial"], statistics["reference.spatial"]
        found["sfid_to_fp"] = {"value": frechet_distance(ours, theirs), "spatial_features": ours.dim}
        if ours.rank_deficient:
            setting.notes.append(f"sFID of {ours.n} images over {ours.dim} spatial features is badly biased.")
    return found


def _drift(setting: _Setting, folder: EvaluationFolder, run: Run) -> list[dict[str, Tensor]]:
    """Curves of every batch, and the timesteps; empty, with a note, where the two cannot be followed step by step.

    Of several processes only the first has them.
    """
    candidate, against, steps = setting.candidate, setting.against, setting.steps
    if not isinstance(candidate, PipelineSource) or not isinstance(against, PipelineSource) or steps is None:
        setting.notes.append("No drift: it needs two pipelines that can be sampled, and a side is a folder of images.")
        return []
    if correction_of(against.pipe.scheduler) is not None:
        setting.notes.append(f"No drift: {against.name} corrects its own predictions, so its steps cannot be replayed.")
        return []
    if several_denoisers(against.pipe):
        names = " and ".join(several_denoisers(against.pipe))
        setting.notes.append(f"No drift: {against.name} switches between {names}, which are not followed step by step.")
        return []
    try:
        _, quantized = find_denoiser(candidate.pipe)
        _, full_precision = find_denoiser(against.pipe)
    except ModelError as error:
        setting.notes.append(f"No drift: {error}")
        return []
    quantized = in_own_dtype(quantized, full_precision)
    count = min(len(setting.seeds), DRIFT_SEEDS)
    batches = setting.batches(count)

    def curves_of(batch: slice) -> dict[str, Tensor] | str:
        """Why there are none, if so: the other processes must hear of it too."""
        began = time.perf_counter()
        try:
            trajectory = seal(
                *record(
                    against.pipe,
                    full_precision,
                    seeds=setting.seeds[batch],
                    steps=steps,
                    batch_size=setting.batch_size,
                    arguments=setting.arguments_of(batch),
                    run=Run(seed=run.seed),
                )
            )
            timesteps = torch.tensor([float(step.timestep) for step in trajectory.steps], dtype=torch.float64)
            found = drift_curves(quantized, trajectory, correction_of(candidate.pipe.scheduler))
        except (ModelError, CalibrationError) as error:
            return str(error)
        spent = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        return {"timesteps": timesteps, "seconds": spent, **found}

    missing = run.processes.from_first(lambda: [batch for batch in batches if _drift_name(batch) not in folder])
    with run.progress.track("Drift", count) as advance:
        advance(count - sum(batch.stop - batch.start for batch in missing))
        for batch, found in zip(missing, run.processes.in_turn(curves_of, missing), strict=True):
            if isinstance(found, str):
                setting.notes.append(f"No drift: {found}")
                return []
            if run.processes.first:
                folder.save(_drift_name(batch), found)
            advance(batch.stop - batch.start)
    return [folder.load(_drift_name(batch)) for batch in batches] if run.processes.first else []


def _drift_results(
    setting: _Setting, curves: Sequence[Mapping[str, Tensor]], metrics: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The curves as JSON values; their last values go to `metrics`."""
    if not curves:
        return {}
    drift = summary(curves)
    seeds = setting.seeds[: min(len(setting.seeds), DRIFT_SEEDS)]
    beside = {"n": len(seeds), "seeds": _seeds_text(seeds)}
    metrics["drift_final"] = {"value": drift.accumulated[-1], "unit": "RMS of the sample", **beside}
    final = torch.cat([rows["cosine"][-1] for rows in curves])
    metrics["cosine_final"] = {**_as_json(intervals({"cosine": final})["cosine"], len(final)), **beside}
    found: dict[str, Any] = {"timesteps": curves[0]["timesteps"].tolist(), **drift.to_dict()}
    flat = flat_field(curves)
    if not flat:
        setting.notes.append("No flat-field test: the samples are no pictures.")
        return found
    noise, white = flat["noise_level"], flat["white_point"]
    unit = {"unit": "of the sample", **beside}
    metrics["noise_level"] = {"value": noise["candidate"][-1], "reference_value": noise["reference"][-1], **unit}
    ours, theirs = (torch.tensor(white[side][-1], dtype=torch.float64) for side in ("candidate", "reference"))
    # torch's maximum is NaN if any value is; Python's depends on their order.
    metrics["white_point_shift"] = {"value": float((ours - theirs).abs().max()), **unit}
    return {**found, "flat_field": flat}
