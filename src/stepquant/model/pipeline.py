"""The smallest sampling pipeline: any torch denoiser, any scheduler that speaks diffusers' language.

    x_0     = init_noise_sigma * z,   z ~ N(0, 1)
    x_{k+1} = scheduler.step(denoiser(scheduler.scale_model_input(x_k, t_k), t_k), t_k, x_k)

It is for models that have no diffusers pipeline of their own: the demo models, research code, tests.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stepquant.errors import SpecError, StepquantError, UnsupportedPipeline, nearest

__all__ = [
    "DenoiserPipeline",
    "Generators",
    "PipelineOutput",
    "arguments_of_batch",
    "check_call",
    "refusal_explained",
    "step_arguments",
    "with_labels",
]

OutputType = Literal["np", "pil", "pt", "latent"]
Generators = torch.Generator | Sequence[torch.Generator] | None


SCHEDULE_ARGUMENTS = ("timesteps", "sigmas")
"""Arguments of pipelines that have one entry for each step: with as many steps as images they must not be cut."""


STEP_ARGUMENTS = ("guidance_scale", "true_cfg_scale", "guidance_rescale", "eta")
"""Arguments of pipelines that change what a step makes of the network's output."""


_GIVEN_BY_US = {"generator": "each image's seed", "num_inference_steps": "the number of steps"}


def step_arguments(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, float]:
    """The `STEP_ARGUMENTS` that a call with these arguments has, defaults included, as far as they are numbers.

    Pipelines take an `eta` for schedulers that have no use for it: it counts with those that have.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    found = {name: arguments.get(name, accepted[name].default) for name in STEP_ARGUMENTS if name in accepted}
    if "eta" in found and "eta" not in inspect.signature(pipe.scheduler.step).parameters:
        del found["eta"]
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def check_call(pipe: Any, arguments: Mapping[str, Any], steps: int) -> None:
    """Raise SpecError for an argument that the pipeline's call does not take or that is decided elsewhere, a class that
    there is not, and more steps than its scheduler has.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    for name in () if anything else arguments:
        if name not in accepted:
            raise SpecError(f"{type(pipe).__name__} takes no argument {name!r}.{nearest(name, accepted)}")
    for name, instead in _GIVEN_BY_US.items():
        if name in arguments:
            raise SpecError(f"{name} is not among the arguments: {instead} decides it.")
    for name in STEP_ARGUMENTS:
        value = arguments.get(name)
        if isinstance(value, str) or (isinstance(value, float) and math.isnan(value)):
            raise SpecError(f"{name} must be a number, found {value!r}.")
    _check_labels(pipe, arguments.get("class_labels"))
    trained = getattr(getattr(getattr(pipe, "scheduler", None), "config", None), "num_train_timesteps", None)
    # Some schedulers divide the way more finely than training did; those that cannot say so.
    if trained is not None and steps > int(trained) and not any(name in arguments for name in SCHEDULE_ARGUMENTS):
        try:
            copy.deepcopy(pipe.scheduler).set_timesteps(steps)
        except ValueError as error:
            name = type(pipe.scheduler).__name__
            raise SpecError(f"steps must be at most {trained} with the pipeline's {name}, found {steps}.") from error


def _check_labels(pipe: Any, labels: Any) -> None:
    """A class that there is not would end deep inside an embedding."""
    classes = _classes(pipe)
    numbers = labels if isinstance(labels, list) else [labels]
    if not classes or labels is None:
        return
    if any(isinstance(one, str | float) for one in numbers):
        raise SpecError(f"class_labels must be whole numbers from 0 to {classes - 1}, found {labels!r}.")
    if not all(isinstance(one, int | Tensor) for one in numbers):
        return
    # A transformer has one class more: none, for guidance.
    end = classes + (1 if hasattr(pipe, "transformer") else 0)
    for label in (value for one in numbers for value in torch.as_tensor(one).reshape(-1).tolist()):
        if not 0 <= label < end:
            raise SpecError(f"class_labels must be from 0 to {classes - 1}, found {label}.")


@contextmanager
def refusal_explained(pipe: Any) -> Iterator[None]:
    """Inside, what a pipeline says against its prompts (diffusers' `check_inputs`) is a SpecError that says where they
    are given.
    """
    try:
        yield
    except ValueError as error:
        if isinstance(error, StepquantError) or "prompt" not in str(error):
            raise
        raise SpecError(
            f"{type(pipe).__name__} refuses the call: {str(error).rstrip('.')}. Prompts are given by --prompts FILE or "
            "--argument prompt='a cat', in Python by `arguments`."
        ) from error


def arguments_of_batch(arguments: Mapping[str, Any], batch: slice, count: int) -> dict[str, Any]:
    """The arguments of a pipeline's call for some of `count` images.

    Lists of `count` entries (prompts, class labels) and tensors of `count` rows (prompt embeddings) are cut. A class
    label that is one number is repeated, and a prompt that is one text, since pipelines make as many images as there
    are prompts, unless `num_images_per_prompt` says how many. Everything else is for all images. Raises SpecError for
    labels or prompts of another number.
    """
    rows = len(range(*batch.indices(count)))
    alone = "num_images_per_prompt" not in arguments

    def part(name: str, value: Any) -> Any:
        if isinstance(value, str) and alone and name.startswith(("prompt", "negative_prompt")):
            return [value] * rows
        if name == "class_labels" and isinstance(value, int):
            return [value] * rows
        if name in ("class_labels", "prompt") and isinstance(value, list) and alone and len(value) != count:
            raise SpecError(f"{name} has {len(value)} entries for {count} images: give one each, or one for all.")
        cut = isinstance(value, list | Tensor) and _rows(value) == count and name not in SCHEDULE_ARGUMENTS
        return value[batch] if cut else value

    return {name: part(name, value) for name, value in arguments.items()}


def with_labels(pipe: Any, arguments: Mapping[str, Any], seeds: Sequence[int]) -> Mapping[str, Any]:
    """The arguments, and for a pipeline whose denoiser is told classes `class_labels`: seed modulo their number.

    So that seeds alone make images, all classes alike often. Labels among the arguments stay. Without them some
    pipelines refuse the call (DiT), and others draw labels that no generator decides (ConsistencyModelPipeline).
    """
    wanted = inspect.signature(pipe.__call__).parameters.get("class_labels")
    if wanted is None or "class_labels" in arguments:
        return arguments
    classes = _classes(pipe)
    if classes:
        return {**arguments, "class_labels": [seed % classes for seed in seeds]}
    if wanted.default is inspect.Parameter.empty:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} needs class_labels and does not say how many classes there are: pass them in "
            "`arguments`."
        )
    return arguments


def _classes(pipe: Any) -> int:
    """How many classes a pipeline says that its denoiser knows; 0 if it does not, or the denoiser is told none."""
    named = len(set((getattr(pipe, "labels", None) or {}).values()))
    if named:
        return named
    for part, key in _CLASSES_IN:
        config = getattr(getattr(pipe, part, None), "config", {})
        if config.get(key):
            return int(config[key])
    return 0


_CLASSES_IN = (("transformer", "num_embeds_ada_norm"), ("transformer", "num_classes"), ("unet", "num_class_embeds"))
"""Where a denoiser's configuration says how many classes there are."""


def _rows(value: list[Any] | Tensor) -> int | None:
    return None if isinstance(value, Tensor) and value.ndim == 0 else len(value)


@dataclass(frozen=True)
class PipelineOutput:
    """What a call of the pipeline returns.

    images: "np": float32 array [B, H, W, C] in [0, 1]; "pil": list of images; "pt": tensor [B, C, H, W] in [0, 1];
        "latent": tensor [B, C, H, W] as the last step left it.
    """

    images: Any


class DenoiserPipeline:
    """Samples from a denoiser that is called as `denoiser(sample, timestep)`.

    denoiser: returns the prediction as a tensor, or in an object with an attribute `sample`.
    scheduler: one of diffusers', or anything with `set_timesteps`, `timesteps` and `step`.
    sample_shape: (C, H, W) of one image.
    max_timestep: leave out the scheduler's timesteps above this one, as cosine schedules need where alpha_bar is so
        close to 0 that dividing by its root blows up. Fewer steps are run then than were asked for. It suits
        schedulers that find the previous timestep from the current one (DDIM computes t - T // n, DDPM likewise);
        those that keep a table by step index are refused.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: Any,
        sample_shape: tuple[int, int, int],
        *,
        max_timestep: int | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.sample_shape = tuple(sample_shape)
        self.max_timestep = max_timestep

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return _first_floating(self.denoiser).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the denoiser's parameters; the noise is drawn in it."""
        return _first_floating(self.denoiser).dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the denoiser as `nn.Module.to` does."""
        self.denoiser.to(*args, **kwargs)
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Accepted because diffusers' pipelines have it; this pipeline shows no bar."""

    @torch.no_grad()
    def __call__(
        self,
        *,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        output_type: OutputType = "np",
    ) -> PipelineOutput:
        """Sample `batch_size` images.

        generator: one for the whole batch, or one per image; on whatever device, the noise is moved to the denoiser's.
        eta: handed to the scheduler if its `step` takes it (DDIM: 0 is deterministic, 1 has DDPM's variance).

        Raises SpecError if the numbers of generators and images differ, for an unknown `output_type`, and if
        `max_timestep` does not go with the scheduler.
        """
        if output_type not in ("np", "pil", "pt", "latent"):
            raise SpecError(f"output_type is {output_type!r}; expected 'np', 'pil', 'pt' or 'latent'.")
        generators = _as_generators(generator, batch_size)
        self._set_timesteps(num_inference_steps)
        sample = self._noise(batch_size, generators) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        extra = self._step_arguments(eta, generators)
        scale = getattr(self.scheduler, "scale_model_input", _unscaled)
        for timestep in self.scheduler.timesteps:
            prediction = _tensor_of(self.denoiser(scale(sample, timestep), timestep))
            sample = self.scheduler.step(prediction, timestep, sample, **extra).prev_sample
        return PipelineOutput(_images(sample, output_type))

    def _set_timesteps(self, steps: int) -> None:
        self.scheduler.set_timesteps(steps, device=self.device)
        if self.max_timestep is None:
            return
        if any(getattr(self.scheduler, name, None) is not None for name in ("sigmas", "ets")):
            raise SpecError(
                f"max_timestep={self.max_timestep} was given, but {type(self.scheduler).__name__} walks a table by "
                "step index, "
                "from which no leading steps can be left out. Use DDIM or DDPM, or leave max_timestep away."
            )
        timesteps = self.scheduler.timesteps
        kept = timesteps[timesteps <= self.max_timestep]
        if len(kept) == 0:
            raise SpecError(
                f"max_timestep={self.max_timestep} leaves none of the {len(timesteps)} timesteps, the smallest is "
                f"{int(min(timesteps))}."
            )
        self.scheduler.timesteps = kept

    def _noise(self, batch: int, generators: list[torch.Generator] | torch.Generator | None) -> Tensor:
        """Standard normal noise [B, C, H, W]; with one generator per image, image i depends on generator i only."""
        if isinstance(generators, list):
            rows = [self._draw(1, generator) for generator in generators]
            return torch.cat(rows).to(self.device)
        return self._draw(batch, generators).to(self.device)

    def _draw(self, rows: int, generator: torch.Generator | None) -> Tensor:
        device = self.device if generator is None else generator.device
        return torch.randn((rows, *self.sample_shape), generator=generator, device=device, dtype=self.dtype)

    def _step_arguments(self, eta: float, generators: list[torch.Generator] | torch.Generator | None) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        offered = {"eta": eta, "generator": generators}
        return {name: value for name, value in offered.items() if name in accepted}


def _as_generators(generator: Generators, batch: int) -> list[torch.Generator] | torch.Generator | None:
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    generators = list(generator)
    if len(generators) != batch:
        raise SpecError(f"{len(generators)} generators were given for batch_size={batch}; give one, or one per image.")
    return generators


def _first_floating(module: nn.Module) -> Tensor:
    """A tensor that tells the module's device and dtype; a module without any is taken to be float32 on the CPU."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor
    return torch.empty(0)


def _unscaled(sample: Tensor, timestep: Any) -> Tensor:  # noqa: ARG001 - stands in for scale_model_input
    return sample


def _tensor_of(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output.sample
    if not isinstance(found, Tensor):
        raise SpecError(
            f"The denoiser returned {type(output).__name__}; expected a tensor or an object with a tensor `sample`."
        )
    return found


def _images(sample: Tensor, output_type: OutputType) -> Any:
    """[B, C, H, W] in [-1, 1] -> what was asked for."""
    if output_type == "latent":
        return sample
    images = (sample / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.cpu().permute(0, 2, 3, 1).float().numpy()
    if output_type == "np":
        return array
    levels = (array * 255).round().astype(np.uint8)
    return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in levels]
