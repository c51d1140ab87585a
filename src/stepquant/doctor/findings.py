"""What the doctor can find: kinds of faults, from which value on each counts as one, and what to do about it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from stepquant.errors import SpecError, nearest

__all__ = ["FLOAT16_MAX", "KINDS", "Finding", "KindOfFinding", "Remedy", "Severity", "Sightings", "Thresholds"]

Severity = Literal["error", "warning"]
"""error: images are broken or will be. warning: quality is lost, or another dtype would break them."""

Remedy = Literal["none", "weights", "activations", "both", "float"]
"""What a rule in the settings can do for the layer: more bits for one or both of its tensors, or full precision."""

FLOAT16_MAX = 65504.0
"""The largest finite float16."""


@dataclass(frozen=True)
class Thresholds:
    """From which value on something counts as a fault. All are decisions of stepquant, not of a paper.

    clipped_loss: a quantizer clips if the root mean square of what it cuts off is more than this part of that of the
        tensor, and more than what rounding costs inside the range. A tenth: as much as four bits lose by rounding. More
        than rounding: a range of least squared error never has that. How many values are cut off does not matter: one
        pixel outside of the first layer's range, which the network does not see growing, is enough to lose an image.
    saturated_share: a quantizer that clips saturates if more than this share of the values lies outside of its range.
        Half: the range is another tensor's.
    used_levels: an activation that varies should reach over at least so many levels. 4 are those of two bits, the
        fewest that stepquant offers; of two bits half of the levels are enough.
    used_range: so much of the levels should be reached by the weights of a scale (0 counts as reached). A quarter:
        two bits are wasted.
    outlier_ratio: largest magnitude of a channel over the median of all channels that are not zero. At 32 the median
        channel is left with 8 of 256 levels where all share one scale.
    outlier_loss: outlier channels of a quantized tensor count if rounding to its levels, in a range that holds them,
        loses more than this part of the norm of the other channels. 0.3 is the error of a cosine of 0.95, as below.
    dead_spread: a channel is dead if it varies less than this part of the layer's median channel. 1e-6: ten times
        float32's rounding.
    image_spread: an image is constant if its values lie within this. 1/255: one level of an 8-bit image.
    cosine: least cosine of a layer's output with full precision, at equal inputs. 0.95 stands for an error of a third
        of the output; 4-bit weights alone stay above 0.98.
    drift: the final state's error, relative to the state, from which on single layers are blamed. Below a tenth, images
        look alike.
    driver: the share of this error that must vanish if one layer is restored, to blame the layer. A tenth: of less one
        would have to restore dozens.
    """

    clipped_loss: float = 0.1
    saturated_share: float = 0.5
    used_levels: float = 4
    used_range: float = 0.25
    outlier_ratio: float = 32.0
    outlier_loss: float = 0.3
    dead_spread: float = 1e-6
    image_spread: float = 1 / 255
    cosine: float = 0.95
    drift: float = 0.1
    driver: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not math.isfinite(value) or value < 0:
                raise SpecError(f"The threshold {name} must be a finite number of at least 0, found {value!r}.")

    @classmethod
    def of(cls, texts: Iterable[str]) -> Thresholds:
        """The defaults with `NAME=VALUE` put in. Raises SpecError for a name or a number that is none."""
        given: dict[str, float] = {}
        known = [field.name for field in dataclasses.fields(cls)]
        for text in texts:
            name, _, value = text.partition("=")
            if name not in known:
                raise SpecError(
                    f"There is no threshold {name!r}, only {', '.join(known)}; write it as in cosine=0.9."
                    f"{nearest(name, known)}"
                )
            try:
                given[name] = float(value)
            except ValueError:
                raise SpecError(f"The threshold {name} must be a number, found {value!r}.") from None
        return cls(**given)


@dataclass(frozen=True)
class KindOfFinding:
    """What all findings of a kind share. advice: what to do, as a sentence."""

    severity: Severity
    remedy: Remedy
    advice: str


KINDS: Mapping[str, KindOfFinding] = {
    "not_finite_weight": KindOfFinding(
        "error", "none", "Load or download the weights again; quantize again if they come from a checkpoint."
    ),
    "not_finite": KindOfFinding(
        "error", "float", "Sample in bfloat16 or float32. If that does not help, keep this layer in full precision."
    ),
    "black_image": KindOfFinding(
        "error", "none", "Look at the first layer that is not finite; without one, at the decoder and its dtype."
    ),
    "constant_image": KindOfFinding("error", "none", "Look at the layers that saturate or drive the drift."),
    "degenerate_scale": KindOfFinding(
        "error", "float", "Quantize again; keep this layer in full precision if it stays."
    ),
    "saturation": KindOfFinding(
        "error", "activations", "Calibrate again, on the steps and arguments that you sample with; or give more bits."
    ),
    "unused_levels": KindOfFinding(
        "error", "activations", "Calibrate again: the range is far too wide; or give more bits."
    ),
    "clipping": KindOfFinding(
        "warning",
        "activations",
        "Widen the range (--set ranges=minmax), give more bits, or more rows over time if only some steps clip.",
    ),
    "weight_clipping": KindOfFinding("warning", "weights", "Give the weight more bits, or fit its range again."),
    "unused_weight_levels": KindOfFinding(
        "warning", "weights", "Fit the range of the weight again: it is too wide; or give more bits."
    ),
    "dead_channels": KindOfFinding(
        "warning",
        "both",
        "Give the layer more bits; if they are dead in full precision too, the model itself has them.",
    ),
    "outlier_channels": KindOfFinding(
        "warning", "activations", "Keep the activation in full precision, or move the outliers into the weight."
    ),
    "float16_overflow": KindOfFinding("warning", "none", "Sample in bfloat16 or float32, never in float16."),
    "drift_elsewhere": KindOfFinding(
        "error",
        "none",
        "No bits mend it: load or convert the model again. Where no module is named, compare the two models' settings, "
        "dtypes and step corrections.",
    ),
    "low_cosine": KindOfFinding("warning", "both", "Give the layer more bits."),
    "drives_drift": KindOfFinding("warning", "both", "Give the layer more bits."),
    "spread_drift": KindOfFinding(
        "warning", "none", "Give all layers more bits, take a stronger method, or raise --top to measure more layers."
    ),
}
"""Kinds of findings, those that explain others first."""


@dataclass(frozen=True)
class Finding:
    """One fault.

    layer: full name of the module in the denoiser, or behind the name of another part of the pipeline (`vae.decoder`);
        None for images.
    step: the first sampling step at which it is there, 0 at the noise end; of `drives_drift` the one that contributes
        most. None for what does not depend on steps, and for other parts than the denoiser.
    value, threshold: what was measured there, and from where on it is a fault. None where there is no number.
    steps: number of steps at which it was seen; 0 for what does not depend on steps.
    what: a sentence.
    """

    severity: Severity
    kind: str
    layer: str | None
    step: int | None
    value: float | None
    threshold: float | None
    what: str
    advice: str
    steps: int = 0

    @classmethod
    def of(
        cls,
        kind: str,
        what: str,
        *,
        layer: str | None = None,
        step: int | None = None,
        value: float | None = None,
        threshold: float | None = None,
        steps: int = 0,
    ) -> Finding:
        """A finding with its kind's severity and advice."""
        about = KINDS[kind]
        plain = None if value is None or not math.isfinite(value) else value
        return cls(about.severity, kind, layer, step, plain, threshold, what, about.advice, steps)

    @property
    def remedy(self) -> Remedy:
        """What a rule can do for the layer."""
        return KINDS[self.kind].remedy

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass
class _Sighting:
    step: int
    value: float
    what: str
    steps: set[int]


class Sightings:
    """Faults seen at steps, merged by kind and layer: memory does not grow with images, calls or batches."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[_Sighting, float | None]] = {}

    def see(self, kind: str, layer: str, step: int, value: float, threshold: float | None, what: str) -> None:
        """Note a fault. Its first step is kept, with the value that was seen there first."""
        known = self._seen.get((kind, layer))
        if known is None:
            self._seen[kind, layer] = (_Sighting(step, value, what, {step}), threshold)
            return
        sighting = known[0]
        sighting.steps.add(step)
        if step < sighting.step:
            sighting.step, sighting.value, sighting.what = step, value, what

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._seen

    def findings(self) -> list[Finding]:
        """In the order in which they were first seen."""
        return [
            Finding.of(
                kind,
                seen.what,
                layer=layer,
                step=seen.step,
                value=seen.value,
                threshold=threshold,
                steps=len(seen.steps),
            )
            for (kind, layer), (seen, threshold) in self._seen.items()
        ]
