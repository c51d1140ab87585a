"""What the page needs of the way from noise to image: films of clean predictions, and errors layer by layer.

A few seeds are recorded with the full-precision pipeline, once. Each candidate then walks from the same noise, and its
layers are compared at the recorded inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepquant.calibrate.trajectory import Trajectory, record, seal
from stepquant.errors import EvaluationError, StepquantError
from stepquant.evaluate.clean_samples import clean_samples
from stepquant.evaluate.dtypes import in_own_dtype
from stepquant.evaluate.layer_errors import layer_errors
from stepquant.model.correction import correction_of
from stepquant.model.families import find_denoiser, several_denoisers
from stepquant.model.pipeline import arguments_of_batch
from stepquant.report.strips import ticks
from stepquant.run import Run

__all__ = ["Walks"]

SEEDS = 3
"""Films on the page; errors of layers are measured along the same trajectories."""

FRAMES = 20
"""Steps of a film that are shown; of longer schedules evenly spread ones."""


class Walks:
    """Full-precision trajectories of a few seeds, and what candidates made of them; one candidate at a time."""

    def __init__(
        self,
        reference: Any,
        *,
        seeds: Sequence[int],
        steps: int,
        run: Run,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Record the first `SEEDS` of the seeds.

        arguments: of the pipeline's call for all seeds.

        What cannot be measured is left out, and a note says which and why: a pipeline that cannot be replayed, a
        prediction type that says nothing about the clean sample, a candidate whose layers do not run one by one.
        """
        self._reference = reference
        self._seeds = list(seeds)[:SEEDS]
        self._run = run
        self._notes: list[str] = []
        self._trajectories: list[Trajectory] = []
        self._exact: Tensor | None = None
        self._clean: list[Tensor] = []
        self._errors: list[dict[str, Any] | None] = []
        _, self._full_precision = find_denoiser(reference)
        if correction_of(reference.scheduler) is not None:
            self._notes.append("No films and no errors of layers: the reference corrects its own predictions.")
            return
        if several_denoisers(reference):
            names = " and ".join(several_denoisers(reference))
            self._notes.append(f"No films and no errors of layers: the pipeline switches between {names}.")
            return
        try:
            recorded = record(
                reference,
                self._full_precision,
                seeds=self._seeds,
                steps=steps,
                batch_size=SEEDS,
                arguments=arguments_of_batch(arguments or {}, slice(0, SEEDS), len(seeds)),
                run=run,
            )
            self._trajectories = [seal(trajectory) for trajectory in recorded]
        except (StepquantError, ValueError) as error:  # diffusers refuses arguments with a ValueError
            self._notes.append(f"No films and no errors of layers: {error}")
            return
        try:
            self._exact = _clean(self._full_precision, self._trajectories, None)
        except (StepquantError, ValueError) as error:
            self._notes.append(f"No films: {error}")

    def add(self, pipe: Any) -> None:
        """Let a candidate walk."""
        if not self._trajectories:
            return
        _, denoiser = find_denoiser(pipe)
        walking = in_own_dtype(denoiser, self._full_precision)
        with self._run.progress.track("Walking beside full precision", 2) as advance:
            if self._exact is not None:
                try:
                    self._clean.append(_clean(walking, self._trajectories, correction_of(pipe.scheduler)))
                except (StepquantError, ValueError) as error:
                    self._exact = None  # films stand beside one another: all candidates or none
                    self._notes.append(f"No films: {error}")
            advance(1)
            try:
                if walking is not denoiser:
                    raise EvaluationError("the layers compute in another dtype than those of full precision.")
                self._errors.append(layer_errors(denoiser, self._full_precision, self._trajectories).to_dict())
            except (StepquantError, ValueError) as error:
                self._errors.append(None)
                self._notes.append(f"No errors of layers: {error}")
            advance(1)

    def found(self) -> dict[str, Any]:
        """`films`, `layer_errors` and `notes` of `report.page.Images`, in the order in which candidates were added."""
        result: dict[str, Any] = {"notes": list(self._notes)}
        if not self._trajectories:
            return result
        result["layer_errors"] = list(self._errors)
        if self._exact is not None and self._exact.ndim != 5:
            shape = list(self._exact.shape[2:])
            result["notes"].append(f"No films: samples have shape {shape} for one image, expected [C, H, W].")
        elif self._exact is not None:
            steps = self._trajectories[0].steps
            timesteps = [float(torch.as_tensor(step.timestep).reshape(-1)[0]) for step in steps]
            pixels = _shows_pixels(self._reference, self._exact)
            result["films"], note = _films(self._exact, self._clean, timesteps, self._seeds, pixels=pixels)
            result["notes"] += note
        return result


def _clean(denoiser: Any, trajectories: Sequence[Trajectory], correction: Any) -> Tensor:
    """`[steps, images, C, ...]` over the images of all trajectories."""
    return torch.cat([clean_samples(denoiser, trajectory, correction) for trajectory in trajectories], dim=1)


def _shows_pixels(pipe: Any, clean: Tensor) -> bool:
    """Whether a sample is an image: a pipeline with a decoder samples latents."""
    decoder = any(getattr(pipe, name, None) is not None for name in ("vae", "vqvae", "movq"))
    return not decoder and clean.shape[2] in (1, 3)


def _films(
    exact: Tensor, clean: Sequence[Tensor], timesteps: list[float], seeds: list[int], *, pixels: bool
) -> tuple[dict[str, Any], list[str]]:
    """`report.page.Films`, and what must be said about it."""
    places, notes = ticks(len(timesteps), FRAMES), []
    exact, clean = exact[places], [walk[places] for walk in clean]
    low, high = torch.tensor(-1.0), torch.tensor(1.0)
    if not pixels:
        channels = 3 if exact.shape[2] >= 3 else 1
        exact, clean = exact[:, :, :channels], [walk[:, :, :channels] for walk in clean]
        low, high = exact.amin(dim=(3, 4), keepdim=True), exact.amax(dim=(3, 4), keepdim=True)
        notes.append(
            f"Films show latents, not images: their first {channels} channels, each between the least and the largest "
            "value of full precision."
        )

    def seen(walk: Tensor) -> Tensor:
        return ((walk - low) / (high - low).clamp_min(1e-12)).clamp(0.0, 1.0)

    return {
        "seeds": seeds,
        "timesteps": [timesteps[place] for place in places],
        "reference": seen(exact),
        "candidates": [seen(walk) for walk in clean],
    }, notes
