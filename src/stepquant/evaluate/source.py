"""What is evaluated: a pipeline that can be sampled, or a folder of images that somebody has sampled already.

Both give images by seed, so that any two can be compared pair by pair.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from stepquant import api
from stepquant.engines.automatic import AutomaticDenoiser
from stepquant.engines.openvino import GraphDenoiser
from stepquant.errors import EvaluationError, SpecError
from stepquant.evaluate.features import weights_identity
from stepquant.evaluate.images import check_png, other_images, paths_by_seed, png_files, read_png
from stepquant.manifest import MANIFEST_NAME, read_manifest
from stepquant.model.correction import correction_of
from stepquant.model.schedule import ScheduleFingerprint, chooses_timesteps, guarded_by

__all__ = ["ImageFolder", "PipelineSource", "Source", "as_source", "check_same_schedule", "open_source"]


class Source(Protocol):
    """Images by seed."""

    @property
    def name(self) -> str:
        """What the user called it; in messages and results."""
        ...

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of what the images come from. Figures of different identities must not be mixed."""
        ...

    @property
    def seeds(self) -> list[int] | None:
        """The seeds that there are, ascending; None where any can be sampled."""
        ...

    def images(self, seeds: Sequence[int], *, steps: int | None, arguments: Mapping[str, Any]) -> Tensor:
        """Float32 `[B, C, H, W]`, or videos `[B, frames, C, H, W]`, in [0, 1] on the CPU, one for each seed.

        arguments: of the pipeline's call.
        """
        ...


@final
class PipelineSource:
    """A pipeline. `pipe` is the caller's own, and stays as it was."""

    def __init__(self, pipe: Any, name: str = "", *, checkpoints: Sequence[Path] = ()) -> None:
        """checkpoints: the folders that it was loaded from, if it was.

        name: what opens it. If it is left empty, it is that of the class, and `named` is False.
        """
        self.pipe = pipe
        self.name = name or type(pipe).__name__
        self.named = bool(name)
        self._checkpoints = tuple(checkpoints)

    @property
    def identity(self) -> str:
        """Of a checkpoint, hash of its tensors' checksums; otherwise of all weights.

        Always of the scheduler, and of the classes of all layers: engines replace them.
        """
        digest = hashlib.sha256()
        modules = sorted(_modules(self.pipe).items())
        for folder in self._checkpoints:
            digest.update(json.dumps(read_manifest(folder).checksums, sort_keys=True).encode())
        if not self._checkpoints:
            for name, module in modules:
                digest.update(f"{name}:{_content(module)}".encode())
        for _, module in modules:
            digest.update("|".join(type(layer).__qualname__ for layer in module.modules()).encode())
        scheduler = ScheduleFingerprint.of(self.pipe.scheduler, steps=0, guidance="")
        chosen = chooses_timesteps(self.pipe.scheduler)
        digest.update(
            json.dumps([scheduler.scheduler, scheduler.config, *([chosen] if chosen else [])], sort_keys=True).encode()
        )
        correction = correction_of(self.pipe.scheduler)
        for key, table in sorted({} if correction is None else correction.tables().items()):
            digest.update(key.encode())
            digest.update(table.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def seeds(self) -> list[int] | None:
        return None

    @property
    def calibrations(self) -> tuple[Mapping[str, Any], ...]:
        """How it was calibrated, as in manifests; empty for a pipeline that stepquant did not make."""
        return api.calibrations_of(self.pipe)

    def images(self, seeds: Sequence[int], *, steps: int | None, arguments: Mapping[str, Any]) -> Tensor:
        if steps is None:
            raise EvaluationError(f"{self.name} has to be sampled: say with how many steps.")
        (images,) = api.sampled(self.pipe, seeds=seeds, steps=steps, batch_size=len(seeds), arguments=arguments)
        return images

    def schedule(self, steps: int) -> ScheduleFingerprint:
        """What it would sample on, without guidance, which is the arguments' business.

        Raises SpecError for a checkpoint of another number of steps.
        """
        scheduler = copy.deepcopy(self.pipe.scheduler)
        try:
            scheduler.set_timesteps(steps)
        except SpecError:
            calibrated = guarded_by(scheduler)
            if calibrated is None or calibrated.steps != steps:
                raise
            # The pipeline's call gives timesteps of its own, which the guard compares when it samples. The settings
            # are left to compare.
        except (TypeError, ValueError):
            # Schedulers that shift by the image's size take more arguments from the pipeline: compare settings only.
            scheduler = self.pipe.scheduler
        return ScheduleFingerprint.of(scheduler, steps=steps, guidance="")


def _content(module: nn.Module) -> str:
    """What a network computes with. Of a graph, which has no state, what it was made from."""
    if isinstance(module, AutomaticDenoiser | GraphDenoiser):
        return f"{module.content}:{module.precision}"
    return weights_identity(module)


def _modules(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline by name."""
    parts = getattr(pipe, "components", None) or vars(pipe)
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


@final
class ImageFolder:
    """PNG files whose names carry the seed, as `stepquant sample` writes them: 000017.png, or sample-17.png.

    The picture of all images, grid.png, is passed over.
    """

    def __init__(self, folder: Path) -> None:
        """Raises EvaluationError: no folder, no PNG files, a name without one seed, a seed that is there twice."""
        self._paths = paths_by_seed(folder)
        self.name = str(folder)
        self._shape: tuple[int, ...] | None = None
        self._first = self._paths[min(self._paths)]

    @property
    def identity(self) -> str:
        """Hash of the names and bytes of all files."""
        digest = hashlib.sha256()
        for seed, path in sorted(self._paths.items()):
            digest.update(f"{seed}:{hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
        return digest.hexdigest()

    @property
    def seeds(self) -> list[int] | None:
        return sorted(self._paths)

    def path_of(self, seed: int) -> Path:
        """The file of a seed that there is."""
        return self._paths[seed]

    def check(self, seeds: Sequence[int]) -> tuple[int, ...]:
        """Look at every file of these seeds without decoding its pixels. Returns the shape of all, `[C, H, W]`.

        Raises EvaluationError naming the file: damaged, another size or other channels than the first.
        """
        for seed in seeds:
            self._check_shape(self._paths[seed], check_png(self._paths[seed]))
        return self._shape or check_png(self._first)

    def images(self, seeds: Sequence[int], *, steps: int | None, arguments: Mapping[str, Any]) -> Tensor:  # noqa: ARG002
        """Raises EvaluationError naming the file: not readable, another size or other channels than the first."""
        found = []
        for seed in seeds:
            image = read_png(self._paths[seed])
            self._check_shape(self._paths[seed], tuple(image.shape))
            found.append(image)
        return torch.stack(found).float() / 255

    def _check_shape(self, path: Path, shape: tuple[int, ...]) -> None:
        if self._shape is None:
            self._shape = check_png(self._first)
        if shape != self._shape:
            raise EvaluationError(f"{path} is {shape}, but {self._first.name} is {self._shape} [C, H, W].")


def as_source(thing: Any) -> Source:
    """A source (anything with a method `images`) as it is; anything else is taken for a pipeline."""
    # Not isinstance of a protocol: that would ask for the identity, which reads every weight.
    if callable(getattr(thing, "images", None)):
        source: Source = thing
        return source
    return PipelineSource(thing)


def open_source(
    text: str,
    *,
    device: torch.device | str | None = None,
    onto: Path | None = None,
    scheduler: Mapping[str, Any] | None = None,
    candidate: Path | str | None = None,
    **options: Any,
) -> PipelineSource | ImageFolder:
    """A checkpoint of stepquant, a diffusers folder, a folder of images, a shipped model or a hub id.

    onto: the checkpoint of the pipeline's other denoiser, for a checkpoint. options: of `api.load`, for a checkpoint;
        the engine is "simulated" unless one is named.
    scheduler: of a model, another one than its own, as for `api.open_model`. Checkpoints and images have theirs.
    candidate: what a model is to be compared with; without `scheduler` it samples with that of a checkpoint.
    Raises EvaluationError for a folder that is none of these, ModelError or CheckpointError for one that is damaged.
    """
    path = Path(text)
    options = {"engine": "simulated"} | options
    if (path / MANIFEST_NAME).is_file():
        other = None if onto is None else api.load(onto, **options)
        folders = (path,) if onto is None else (path, onto)
        return PipelineSource(api.load(path, device=device, onto=other, **options), text, checkpoints=folders)
    if path.is_dir() and not (path / "model_index.json").is_file():
        if not png_files(path):
            raise EvaluationError(
                f"{text} is not a stepquant checkpoint, a diffusers folder or a folder of images: it has neither "
                f"{MANIFEST_NAME} nor model_index.json nor PNG files.{other_images(path)}"
            )
        return ImageFolder(path)
    if candidate is not None and not scheduler:
        return PipelineSource(api.open_base(text, candidate, device=device), text)
    return PipelineSource(api.open_model(text, device=device, scheduler=scheduler), text)


def check_same_schedule(candidate: PipelineSource, against: PipelineSource, steps: int) -> None:
    """Raise EvaluationError, naming both, if they would not sample on the same schedule."""
    found = against.schedule(steps).differences(candidate.schedule(steps))
    if found:
        raise EvaluationError(
            f"{candidate.name} and {against.name} do not sample on the same schedule. Of {candidate.name}: "
            f"{' '.join(found)} Give both the same scheduler, or sample each into a folder and compare the folders."
        )
