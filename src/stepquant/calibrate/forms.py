"""How a pipeline makes the denoiser's inputs from the sample, and the scheduler's model output from the predictions.

A pipeline is code that we do not read. What it does around the denoiser is one of a few well-known things, so each
is a small value here that can be checked against a recording, bit by bit:

    none                         guided = p
    classifier-free guidance     guided = base + scale * (toward - base)         (Ho and Salimans 2022, eq. 6)
    rescaled guidance            guided = phi * g * std(c) / std(g) + (1 - phi) * g     (Lin et al. 2024, eqs. 15-16)
    doubled latents              DiT: classifier-free guidance of the first channels, of both halves of doubled latents

base and toward are halves of a doubled batch or predictions of separate calls. A learned variance is dropped or
carried along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stepquant.calibrate.conditioning import Arguments, Linked, conditions, find_linked
from stepquant.calibrate.places import Slot, at, named, rebuilt, with_value
from stepquant.calibrate.steps import Step, copy_sharing
from stepquant.errors import CalibrationError, UnsupportedPipeline

__all__ = [
    "ClassifierFreeGuidance",
    "DoubledLatentsGuidance",
    "Form",
    "Guidance",
    "NoGuidance",
    "find_form",
    "form_from_dict",
    "scaled_sample",
]


class Guidance(Protocol):
    """From the predictions of one step's calls to the scheduler's model output; differentiable."""

    @property
    def name(self) -> str:
        """As the schedule fingerprint says it."""
        ...

    def combine(self, predictions: Sequence[Tensor], batch: int) -> Tensor:
        """predictions: one per call [k * batch, C', ...] -> guided [batch, C, ...]."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the key "kind"."""
        ...


@dataclass(frozen=True)
class NoGuidance:
    """guided = the first `channels` channels of the only prediction; None keeps all (a learned variance is dropped)."""

    channels: int | None = None

    @property
    def name(self) -> str:
        return "none"

    def combine(self, predictions: Sequence[Tensor], batch: int) -> Tensor:  # noqa: ARG002 - the protocol's
        (prediction,) = predictions
        return _head(prediction, self.channels)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "none", **asdict(self)}


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """guided = p_base + scale * (p_toward - p_base), then rescaled to the standard deviation of the conditional
    prediction.

    base, toward: 0 or 1, which piece; pieces are the batch-sized parts of all calls' predictions, in order.
        Pipelines that write c + (w - 1) * (c - u) have the conditional piece as base and a negative scale.
    rescale: phi of Lin et al.; 0 leaves it out.
    channels: guide only the first ones; None guides all.
    rest: piece whose other channels are appended (DeepFloyd appends the conditional variance); None drops them.
    """

    base: int
    toward: int
    scale: float
    rescale: float = 0.0
    channels: int | None = None
    rest: int | None = None

    @property
    def weight(self) -> float:
        """The guidance scale as users know it: guided = u + weight * (c - u)."""
        return self.scale if self.scale >= 0 else 1 - self.scale

    @property
    def name(self) -> str:
        rescaled = f", rescale={self.rescale:g}" if self.rescale else ""
        return f"cfg({self.weight:.6g}{rescaled})"

    def combine(self, predictions: Sequence[Tensor], batch: int) -> Tensor:
        pieces = _pieces(predictions, batch)
        base, toward = (_head(pieces[which], self.channels) for which in (self.base, self.toward))
        guided = base + self.scale * (toward - base)
        if self.rescale:
            guided = _rescaled(guided, toward if self.scale >= 0 else base, self.rescale)
        if self.rest is None or self.channels is None:
            return guided
        return torch.cat([guided, pieces[self.rest][:, self.channels :]], dim=1)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "cfg", **asdict(self)}


@dataclass(frozen=True)
class DoubledLatentsGuidance:
    """DiT's guidance: the pipeline carries the latents twice, and guides the first `channels` channels of both
    halves alike.

    half   = base + scale * (toward - base)     over the halves of prediction[:, :channels]
    guided = cat([half, half])                  with prediction[:, channels:] appended if `keep_rest`
    """

    base: int
    toward: int
    scale: float
    channels: int
    keep_rest: bool

    @property
    def name(self) -> str:
        return f"cfg({self.scale if self.scale >= 0 else 1 - self.scale:.6g}, doubled latents)"

    def combine(self, predictions: Sequence[Tensor], batch: int) -> Tensor:  # noqa: ARG002 - the protocol's
        (prediction,) = predictions
        halves = prediction[:, : self.channels].chunk(2, dim=0)
        base, toward = halves[self.base], halves[self.toward]
        half = base + self.scale * (toward - base)
        guided = torch.cat([half, half], dim=0)
        return torch.cat([guided, prediction[:, self.channels :]], dim=1) if self.keep_rest else guided

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "doubled", **asdict(self)}


@dataclass(frozen=True)
class Form:
    """How the denoiser's inputs and the scheduler's model output are made.

    scaled: the pipeline calls `scheduler.scale_model_input`.
    slots: for each call of a step, where the sample stands.
    doubled: the pipeline carries its latents twice, and writes the first half over the second before each step (DiT).
    linked: where the outputs of a network beside the denoiser go (ControlNet); None if there is none.
    """

    scaled: bool
    slots: tuple[Slot, ...]
    doubled: bool
    guidance: Guidance
    linked: Linked | None = None

    def carried(self, sample: Tensor) -> Tensor:
        """The sample [B, C, ...] as the pipeline takes it into the next step; differentiable."""
        if not self.doubled:
            return sample
        half = sample[: sample.shape[0] // 2]
        return torch.cat([half, half])

    def inputs(self, sample_scaled: Tensor, step: Step, network: nn.Module | None = None) -> list[Arguments]:
        """Arguments of each of the step's calls, with the sample [B, C, ...] in the recorded one's place;
        differentiable.

        What stands beside the sample (timesteps, labels, embeddings) is as it was recorded, but for what the network
        beside the denoiser computes from the sample.
        """
        inputs = []
        for slot, call in zip(self.slots, step.calls, strict=True):
            recorded = at(call.args, call.kwargs, slot)
            sample = rebuilt(sample_scaled, recorded)
            if sample is None:
                raise CalibrationError(
                    f"Step {step.index}: a sample of shape {tuple(sample_scaled.shape)} does not fit where "
                    f"{tuple(recorded.shape)} was recorded; replay samples of the trajectory's own shape."
                )
            inputs.append(with_value(call.args, call.kwargs, slot, sample))
        return inputs if self.linked is None else self.linked.filled(inputs, sample_scaled, step, network)

    def combine(self, step: Step, predictions: Sequence[Tensor]) -> Tensor:
        """predictions, one for each of the step's calls -> guided [B, C, ...]; differentiable."""
        return self.guidance.combine(predictions, step.sample.shape[0])

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        found = {
            "scaled": self.scaled,
            "slots": [list(slot) for slot in self.slots],
            "doubled": self.doubled,
            "guidance": self.guidance.to_dict(),
        }
        return found if self.linked is None else {**found, "linked": self.linked.to_dict()}


def form_from_dict(values: Mapping[str, Any]) -> Form:
    """The inverse of `Form.to_dict`. Raises CalibrationError for an unknown kind of guidance or keys that do not
    fit.
    """
    kinds: dict[str, Callable[..., Guidance]] = {
        "none": NoGuidance,
        "cfg": ClassifierFreeGuidance,
        "doubled": DoubledLatentsGuidance,
    }
    try:
        arguments = dict(values["guidance"])
        guidance = kinds[arguments.pop("kind")](**arguments)
        slots = tuple((str(where), which) for where, which in values["slots"])
        linked = Linked.from_dict(values["linked"]) if "linked" in values else None
        return Form(bool(values["scaled"]), slots, bool(values["doubled"]), guidance, linked)
    except (KeyError, TypeError, ValueError) as error:
        raise CalibrationError(
            f"The stored form of a trajectory is damaged: {dict(values)!r}. Record again."
        ) from error


def scaled_sample(scheduler: Any, sample: Tensor, timestep: Any, *, scaled: bool) -> Tensor:
    """The sample as the pipeline scales it for the denoiser. Schedulers remember that they were asked, so pass a
    copy.
    """
    scale = getattr(scheduler, "scale_model_input", None) if scaled else None
    if scale is None:
        return sample
    result = scale(sample, timestep)
    assert isinstance(result, Tensor)
    return result


def find_form(steps: Sequence[Step]) -> Form:
    """The smallest form that reproduces all recorded inputs and model outputs.

    A difference of 0.0 is looked for first; if the guidance scale cannot be recovered to its last bit, a difference
    of a few roundings is let pass. Raises UnsupportedPipeline naming the step that differs most under the closest form.
    """
    _check_call_counts(steps)
    guidance = _find_guidance(steps)
    closest = _Closest("the denoiser's input cannot be rebuilt from the sample")
    for scaled in (True, False):
        scaled_samples = [_recorded_scaled(step, scaled=scaled) for step in steps]

        def find_slots(calls: Sequence[Sequence[Any]], samples: Sequence[Tensor] = scaled_samples) -> Slots | None:
            return _find_slots(calls, samples, closest)

        slots = find_slots([step.calls for step in steps])
        if slots is not None:
            linked = find_linked(steps, slots, find_slots)
            _check_conditions(steps, slots, linked)
            return Form(scaled, slots, isinstance(guidance, DoubledLatentsGuidance), guidance, linked)
    raise closest.error()


class _Closest:
    """Remembers the attempt that came closest, for the error message."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._step = 0
        self._difference = math.inf

    def see(self, differences: Sequence[float]) -> None:
        worst = max(range(len(differences)), key=differences.__getitem__)
        if differences[worst] < self._difference:
            self._step, self._difference = worst, differences[worst]

    def error(self) -> UnsupportedPipeline:
        how_much = (
            "no known form fits its shapes"
            if math.isinf(self._difference)
            else (f"the closest known form differs by {self._difference:.3g} at step {self._step}")
        )
        return UnsupportedPipeline(
            f"This pipeline cannot be replayed: {self._what}; {how_much}. Known forms are no guidance, "
            "classifier-free guidance "
            "(doubled batch, separate calls, rescaled, DiT's doubled latents) and a learned variance. Calibrate "
            "without the "
            "pipeline's extra guidance, or with a recipe of layer- and block-wise stages, which need no replay."
        )


def _check_call_counts(steps: Sequence[Step]) -> None:
    for step in steps:
        if len(step.calls) != len(steps[0].calls):
            raise UnsupportedPipeline(
                f"Step {step.index} makes {len(step.calls)} calls of the denoiser and step 0 makes "
                f"{len(steps[0].calls)}; a guidance that "
                "is switched off on the way cannot be replayed. Use it on all steps or on none."
            )


def _recorded_scaled(step: Step, *, scaled: bool) -> Tensor:
    with torch.no_grad():
        return scaled_sample(copy_sharing(step.scheduler, {}), step.sample, step.timestep, scaled=scaled)


Slots = tuple[Slot, ...]


def _find_slots(calls: Sequence[Sequence[Any]], samples: Sequence[Tensor], closest: _Closest) -> Slots | None:
    """Where the sample stands in each call of a step. calls: of every step; samples: scaled, of every step."""
    slots = []
    for number in range(len(calls[0])):
        for slot in _candidate_slots(calls[0][number], samples[0]):
            differences = [
                _input_difference(own[number], slot, sample) for own, sample in zip(calls, samples, strict=True)
            ]
            closest.see(differences)
            if max(differences) == 0.0:
                slots.append(slot)
                break
        else:
            return None
    return tuple(slots)


def _candidate_slots(call: Any, sample: Tensor) -> Iterator[Slot]:
    for slot, value in named(call.args, call.kwargs):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == sample.ndim:
            yield slot


def _input_difference(call: Any, slot: Slot, sample: Tensor) -> float:
    recorded = at(call.args, call.kwargs, slot)
    found = rebuilt(sample, recorded) if isinstance(recorded, Tensor) else None
    return math.inf if found is None else _difference(found, recorded)


def _check_conditions(steps: Sequence[Step], slots: Sequence[Slot], linked: Linked | None) -> None:
    """Refuse inputs beside the sample that follow it and are not linked: replay would leave them as recorded."""
    known = set() if linked is None else {(call, path) for call, path, _, _ in linked.places}
    for number, slot in enumerate(slots):
        first = conditions(steps[0], number, slot)
        for step in steps:
            for path, tensor in conditions(step, number, slot).items():
                if (number, path) in known:
                    continue
                before = first.get(path)
                if before is None or before.shape != tensor.shape or not torch.equal(before, tensor):
                    raise UnsupportedPipeline(
                        f"The denoiser's argument {path!r} changes from step 0 to step {step.index}, so it may "
                        "depend on the sample, and replay could not rebuild it. Calibrate the denoiser without it."
                    )


def _find_guidance(steps: Sequence[Step]) -> Guidance:
    closest = _Closest("the model output given to the scheduler cannot be rebuilt from the predictions")
    for candidates in (_plain, _doubled, _classifier_free, _rescaled_candidates):
        found = _best(candidates(steps), steps, closest)
        if found is not None:
            return found
    raise closest.error()


def _best(candidates: Sequence[Guidance], steps: Sequence[Step], closest: _Closest) -> Guidance | None:
    """The first candidate with difference 0.0, else the closest one within rounding, else None."""
    within: list[tuple[float, int]] = []
    for number, candidate in enumerate(candidates):
        differences = [_guided_difference(candidate, step) for step in steps]
        if max(differences) == 0.0:
            return candidate
        closest.see(differences)
        if all(found <= _rounding(step) for found, step in zip(differences, steps, strict=True)):
            within.append((max(differences), number))
    return candidates[min(within)[1]] if within else None


def _guided_difference(guidance: Guidance, step: Step) -> float:
    with torch.no_grad():
        guided = guidance.combine([call.prediction for call in step.calls], step.sample.shape[0])
    return _difference(guided, step.guided) if guided.shape == step.guided.shape else math.inf


def _rounding(step: Step) -> float:
    """A few roundings of the largest number in play. Half precision gets only one: its roundings would hide a lot."""
    epsilon = torch.finfo(step.guided.dtype).eps
    largest = max(float(tensor.abs().max()) for tensor in (step.guided, *(call.prediction for call in step.calls)))
    return (16 if epsilon < 1e-6 else 1) * epsilon * largest


def _plain(steps: Sequence[Step]) -> list[Guidance]:
    if len(steps[0].calls) != 1:
        return []
    prediction, guided = steps[0].calls[0].prediction, steps[0].guided
    if prediction.shape == guided.shape:
        return [NoGuidance()]
    return [NoGuidance(guided.shape[1])] if _has_variance(prediction, guided) else []


def _doubled(steps: Sequence[Step]) -> list[Guidance]:
    step = steps[0]
    if len(step.calls) != 1 or step.calls[0].prediction.shape[0] != step.guided.shape[0] or step.guided.shape[0] % 2:
        return []
    channels = step.sample.shape[1]
    keep_rest = step.guided.shape[1] > channels
    pieces = [_halves(step.calls[0].prediction[:, :channels]) for step in steps]
    targets = [_halves(step.guided[:, :channels])[0] for step in steps]
    candidates: list[Guidance] = []
    for base, toward in ((1, 0), (0, 1)):
        fitted = _fit_scale([(pair[base], pair[toward], target) for pair, target in zip(pieces, targets, strict=True)])
        candidates += [DoubledLatentsGuidance(base, toward, scale, channels, keep_rest) for scale in _tidy(fitted)]
    return candidates


def _classifier_free(steps: Sequence[Step]) -> list[Guidance]:
    pairs = _all_pieces(steps)
    if pairs is None:
        return []
    candidates: list[Guidance] = []
    for channels, rest in _channel_choices(steps[0], pairs[0][0]):
        for base, toward in ((0, 1), (1, 0)):
            fitted = _fit_scale(
                [
                    (_head(pair[base], channels), _head(pair[toward], channels), _head(step.guided, channels))
                    for pair, step in zip(pairs, steps, strict=True)
                ]
            )
            candidates += [ClassifierFreeGuidance(base, toward, scale, 0.0, channels, rest) for scale in _tidy(fitted)]
    # The exact reading with a positive scale comes first, so that it wins over its mirror image.
    return sorted(candidates, key=lambda guidance: isinstance(guidance, ClassifierFreeGuidance) and guidance.scale < 0)


def _channel_choices(step: Step, piece: Tensor) -> list[tuple[int | None, int | None]]:
    """(channels to guide, piece that lends the rest), the simplest first."""
    channels = step.sample.shape[1]
    if step.guided.shape[1] == piece.shape[1]:
        return [(None, None)] + ([(channels, 1), (channels, 0)] if piece.shape[1] > channels else [])
    return [(step.guided.shape[1], None)]


def _rescaled_candidates(steps: Sequence[Step]) -> list[Guidance]:
    """Both unknowns in closed form: each image's guided = lambda * (u + w (c - u)) = alpha u + beta c is linear in
    alpha, beta.

    Then w = beta / (alpha + beta), and lambda = alpha + beta = 1 + phi * (std(c) / std(g) - 1) gives phi.
    """
    pairs = _all_pieces(steps)
    if pairs is None or pairs[0][0].shape != steps[0].guided.shape:
        return []
    candidates: list[Guidance] = []
    for base, toward in ((0, 1), (1, 0)):
        rows = [
            row
            for pair, step in zip(pairs, steps, strict=True)
            for row in zip(pair[base].double(), pair[toward].double(), step.guided.double(), strict=True)
        ]
        for scale in _tidy(_median([_fit_weight(*row) for row in rows])):
            fitted = _median([_fit_rescale(*row, scale) for row in rows])
            candidates += [ClassifierFreeGuidance(base, toward, scale, phi) for phi in _tidy(fitted) if phi != 0.0]
    return candidates


def _fit_weight(base: Tensor, toward: Tensor, guided: Tensor) -> float | None:
    """w of one image, float64."""
    design = torch.stack([base.flatten(), toward.flatten()], dim=1)
    alpha, beta = torch.linalg.lstsq(design, guided.flatten()[:, None]).solution.flatten().tolist()
    return None if abs(alpha + beta) < 1e-12 else beta / (alpha + beta)


def _fit_rescale(base: Tensor, toward: Tensor, guided: Tensor, scale: float) -> float | None:
    """phi of one image for a known scale, float64."""
    unscaled = base + scale * (toward - base)
    factor = float((unscaled * guided).sum() / unscaled.square().sum().clamp_min(1e-300))
    ratio = float(toward.std() / unscaled.std().clamp_min(1e-300))
    return None if abs(ratio - 1) < 1e-6 else (factor - 1) / (ratio - 1)


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None and math.isfinite(value))
    return known[len(known) // 2] if known else None


def _rescaled(guided: Tensor, conditional: Tensor, phi: float) -> Tensor:
    """Lin et al. 2024, eqs. 15 and 16, in the order of operations of diffusers' `rescale_noise_cfg`."""
    axes = list(range(1, conditional.ndim))
    ratio = conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return phi * (guided * ratio) + (1 - phi) * guided


def _fit_scale(terms: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float | None:
    """Least squares for the scale in target = base + scale * (toward - base), float64; None if base and toward are
    the same.
    """
    above = below = 0.0
    for base, toward, target in terms:
        if not base.shape == toward.shape == target.shape:
            return None
        direction = toward.double() - base.double()
        above += float((direction * (target.double() - base.double())).sum())
        below += float(direction.square().sum())
    return above / below if below > 0 else None


def _tidy(value: float | None) -> list[float]:
    """The value and the round numbers next to it: what a user typed is almost always a short decimal."""
    if value is None or not math.isfinite(value):
        return []
    close = [round(value, digits) for digits in range(7)]
    kept = [candidate for candidate in close if abs(candidate - value) <= 1e-4 * max(1.0, abs(value))]
    return list(dict.fromkeys([*kept, value]))


def _all_pieces(steps: Sequence[Step]) -> list[list[Tensor]] | None:
    """For each step the two batch-sized pieces of its predictions; None if there are not two."""
    pieces = []
    for step in steps:
        batch = step.sample.shape[0]
        predictions = [call.prediction for call in step.calls]
        if sum(prediction.shape[0] for prediction in predictions) != 2 * batch:
            return None
        pieces.append(_pieces(predictions, batch))
    return pieces if all(len(pair) == 2 and pair[0].shape == pair[1].shape for pair in pieces) else None


def _pieces(predictions: Sequence[Tensor], batch: int) -> list[Tensor]:
    return [piece for prediction in predictions for piece in torch.split(prediction, batch)]


def _halves(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.chunk(2, dim=0)


def _head(tensor: Tensor, channels: int | None) -> Tensor:
    return tensor if channels is None else tensor[:, :channels]


def _has_variance(prediction: Tensor, guided: Tensor) -> bool:
    """The prediction has more channels than the scheduler was given, and is like it otherwise."""
    return (
        prediction.ndim == guided.ndim
        and prediction.shape[1] > guided.shape[1]
        and prediction.shape[:1] + prediction.shape[2:] == guided.shape[:1] + guided.shape[2:]
    )


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())
