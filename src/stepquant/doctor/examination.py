"""The examination: sample a few images, look at every layer on the way, and say what is wrong and what to do.

    free run        the pipeline samples as it is; every layer is looked at                    (`health`, `weights`)
    own errors      each layer alone beside its original, on full-precision states             (`cosines`)
    estimate        what each layer contributes to the final drift, one reverse pass           (`drivers`)
    restored        the same for the layers that count most, measured                          (`drivers`)
    all restored    whether the drift comes from the layers at all, where it is too large      (`drivers`)

All but the first need the full-precision model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.api import sampled
from stepquant.calibrate.final_state import final_states
from stepquant.calibrate.own_errors import reference_of, still
from stepquant.calibrate.stages import LayerRule
from stepquant.calibrate.trajectory import Trajectory, record, seal
from stepquant.doctor.advice import as_yaml, plain_rules, rules_for
from stepquant.doctor.cosines import LayerError, layer_errors
from stepquant.doctor.drivers import Driver, Expansion, contributions, drift, restored_drift
from stepquant.doctor.findings import KINDS, Finding, Thresholds
from stepquant.doctor.health import MOST_NAMED, ChannelSpread, Health, watching
from stepquant.doctor.layers import differing_modules, other_parts, paired_layers
from stepquant.doctor.weights import other_parameters, static_findings
from stepquant.errors import SpecError
from stepquant.model.correction import StepCorrection, correction_of
from stepquant.model.families import find_denoiser, several_denoisers
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.schedule import ScheduleFingerprint
from stepquant.model.surgery import dtype_of, quantizable, quantized_layers
from stepquant.run import Run

__all__ = ["SCHEMA", "Diagnosis", "examine"]

SCHEMA = 1

TOP = 3
"""Layers that are restored and measured: each costs a sampling run."""

NEARLY_LINEAR = 0.5
"""Estimates of all layers add up to the drift where errors are small. If what is missing or too much is a larger part
of the drift than this, the order of the layers is still a guide, but no share is to be taken at its word."""


@dataclass(frozen=True)
class Diagnosis:
    """What an examination found.

    findings: faults, those that explain others first; empty if nothing is wrong.
    layers: each layer's own error by step; empty without a full-precision model.
    drivers: each layer's part in the final drift, the largest first; empty without one.
    drift: D of `doctor.drivers`. relative_drift: D over the root mean square of the full-precision final states. None
        without a full-precision model, or if the final state is not finite.
    expansion: where the drift was differentiated for `drivers`; None without drivers.
    rules: what to change in the settings.
    notes: what could not be looked at, and why.
    """

    findings: tuple[Finding, ...]
    layers: tuple[LayerError, ...]
    drivers: tuple[Driver, ...]
    drift: float | None
    relative_drift: float | None
    expansion: Expansion | None
    rules: tuple[LayerRule, ...]
    seeds: tuple[int, ...]
    steps: int
    thresholds: Thresholds
    notes: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def yaml(self) -> str:
        """The rules as the key `rules` of `run.yaml`; empty if there are none."""
        return as_yaml(self.rules) if self.rules else ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values of schema 1."""
        return {
            "schema": SCHEMA,
            "healthy": self.healthy,
            "findings": [finding.to_dict() for finding in self.findings],
            "layers": [layer.to_dict() for layer in self.layers],
            "drivers": [driver.to_dict() for driver in self.drivers],
            "drift": self.drift,
            "relative_drift": self.relative_drift,
            "expansion": self.expansion,
            "rules": plain_rules(self.rules),
            "seeds": list(self.seeds),
            "steps": self.steps,
            "thresholds": asdict(self.thresholds),
            "notes": list(self.notes),
        }


def examine(
    pipe: Any,
    against: Any = None,
    *,
    seeds: Sequence[int] = (1000, 1001, 1002, 1003),
    steps: int = 20,
    batch_size: int = 4,
    top: int = TOP,
    thresholds: Thresholds | None = None,
    arguments: Mapping[str, Any] | None = None,
    run: Run | None = None,
) -> Diagnosis:
    """Find out what is wrong with a pipeline, and which layers to blame; both pipelines stay as they were.

    pipe: any pipeline that can be sampled, quantized or not, by whomever.
    against: the full-precision pipeline of the same model, with the same scheduler settings.
    seeds: a few; errors of layers hardly differ between images. The samples of their trajectories are in memory.
    top: layers to restore for certain, those with the largest estimated contribution to the drift.
    arguments: what the pipelines are called with beside seeds and steps.

    Raises SpecError for schedules that differ, and what `record` and `seal` raise for an `against` that cannot be
    replayed.
    """
    seeds, run, limits = list(seeds), run or Run(), thresholds or Thresholds()
    if not seeds or batch_size < 1 or steps < 1 or top < 0:
        raise SpecError(
            "An examination needs seeds, and steps and batch_size of at least 1 and top of at least 0, found "
            f"{len(seeds)} seeds, steps={steps}, batch_size={batch_size}, top={top}."
        )
    _, denoiser = find_denoiser(pipe)
    common: dict[str, Any] = {"seeds": seeds, "steps": steps, "batch_size": batch_size, "arguments": arguments}
    compared = None if against is None else _Comparison.of(pipe, denoiser, against, common, run)
    with still(denoiser):
        health, images = _free_run(pipe, denoiser, limits, common, run)
        originals = {} if compared is None else {name: exact for name, (exact, _) in compared.pairs.items()}
        findings = [
            *static_findings(denoiser, originals, limits),
            *other_parameters(other_parts(pipe, denoiser)),
            *health.findings(),
            *_images(images, seeds, limits),
        ]
        if compared is None:
            findings += _dead(health, {}, limits)
            known = list(quantizable(denoiser) | quantized_layers(denoiser))
            blame = _Blame()
        else:
            blame = compared.blame(limits, top, run)
            findings += [*_dead(health, blame.spreads, limits), *blame.findings]
            known = list(quantizable(compared.reference))
    notes = [*_notes(denoiser, health, compared), *blame.notes]
    ordered = sorted(findings, key=lambda finding: list(KINDS).index(finding.kind))
    return Diagnosis(
        findings=tuple(ordered),
        layers=tuple(blame.layers),
        drivers=tuple(blame.drivers),
        drift=blame.drift,
        relative_drift=blame.relative,
        expansion=blame.expansion,
        rules=rules_for(ordered, denoiser, known),
        seeds=tuple(seeds),
        steps=steps,
        thresholds=limits,
        notes=tuple(notes),
    )


def _free_run(
    pipe: Any, denoiser: nn.Module, limits: Thresholds, common: Mapping[str, Any], run: Run
) -> tuple[Health, Tensor]:
    """Sample with every layer looked at; the images' smallest and largest value and their mean, `[N, 3]`."""
    rows = []
    with watching(denoiser, pipe.scheduler, limits, other_parts(pipe, denoiser)) as health:
        for images in sampled(pipe, progress=run.progress, **common):
            health.step = 0
            flat = images.flatten(1).double()
            rows.append(torch.stack([flat.amin(1), flat.amax(1), flat.mean(1)], dim=1))
    return health, torch.cat(rows)


def _images(rows: Tensor, seeds: Sequence[int], limits: Thresholds) -> list[Finding]:
    """rows: as `_free_run` gives them."""
    black: list[int] = []
    constant: list[int] = []
    spreads: list[float] = []
    for seed, (low, high, mean) in zip(seeds, rows.tolist(), strict=True):
        spread = high - low
        finite = math.isfinite(spread)
        if finite and spread > limits.image_spread:
            continue
        spreads.append(spread if finite else 0.0)
        (black if not finite or mean <= limits.image_spread else constant).append(seed)
    found = []
    for kind, chosen, how in (
        ("black_image", black, "black, or hold NaN, which is saved as black"),
        ("constant_image", constant, "of one colour"),
    ):
        if chosen:
            what = f"The images of {len(chosen)} of {len(seeds)} seeds are {how}: {', '.join(map(str, chosen[:8]))}."
            found.append(Finding.of(kind, what, value=max(spreads), threshold=limits.image_spread))
    return found


def _dead(health: Health, exact: Mapping[str, ChannelSpread], limits: Thresholds) -> list[Finding]:
    """Dead channels that are not dead in full precision, too."""
    found = []
    for name, channels in health.dead_channels().items():
        already = set(exact[name].dead(limits.dead_spread)) if name in exact else set()
        dead = [channel for channel in channels if channel not in already]
        if dead:
            shown = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
            what = f"{len(dead)} output channels never vary: {shown}."
            found.append(Finding.of("dead_channels", what, layer=name, step=0, value=len(dead), threshold=0))
    return found


def _notes(denoiser: nn.Module, health: Health, compared: _Comparison | None) -> list[str]:
    notes = []
    if health.broken > 1:
        notes.append(f"{health.broken} modules gave values that are not finite; the first of them is named.")
    if outliers := health.outliers():
        shown = ", ".join(str(finding.layer) for finding in outliers[:MOST_NAMED])
        more = f" and {len(outliers) - MOST_NAMED} more" if len(outliers) > MOST_NAMED else ""
        notes.append(
            f"If you quantize this model: the inputs of {shown}{more} have channels up to "
            f"{max(finding.value or 0.0 for finding in outliers):.3g} times as large as the median channel. Keep these "
            "activations in full precision, or move the outliers into the weight."
        )
    if compared is None:
        notes.append("Without the full-precision model there are no errors of layers and no drift.")
    if not health.outputs:
        notes.append(
            "No linear layer or convolution was seen running, only the denoiser as a whole: examine the checkpoint "
            "with the engine simulated."
        )
    packed = [
        name
        for name, module in denoiser.named_modules()
        if hasattr(module, "input_quantizer") and not isinstance(module, QuantizedLayer | QuantizedMatmul)
    ]
    if packed:
        notes.append(
            f"{len(packed)} layers run in an engine, where quantizers cannot be looked at: examine the checkpoint with "
            "the engine simulated, too."
        )
    return notes


@dataclass(frozen=True)
class _Blame:
    """What the comparison with full precision gave."""

    findings: Sequence[Finding] = ()
    layers: Sequence[LayerError] = ()
    drivers: Sequence[Driver] = ()
    spreads: Mapping[str, ChannelSpread] = field(default_factory=dict)
    drift: float | None = None
    relative: float | None = None
    expansion: Expansion | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Comparison:
    """The two networks, the layers in which they differ, and the full-precision trajectories."""

    candidate: nn.Module
    reference: nn.Module
    pairs: Mapping[str, tuple[nn.Module, nn.Module]]
    trajectories: Sequence[Trajectory]
    correction: StepCorrection | None

    @classmethod
    def of(cls, pipe: Any, candidate: nn.Module, against: Any, common: Mapping[str, Any], run: Run) -> _Comparison:
        # Of a pipeline that switches between two, the one in which the candidate is quantized.
        _, full_precision = find_denoiser(against, find_denoiser(pipe)[0] if several_denoisers(against) else None)
        _check_same_dtype(candidate, full_precision)
        with still(full_precision):
            trajectories = [seal(one) for one in record(against, full_precision, run=run, **common)]
            reference = reference_of(full_precision)
        _check_same_schedule(pipe, trajectories[0])
        pairs = paired_layers(reference, candidate)
        return cls(candidate, reference, pairs, trajectories, correction_of(pipe.scheduler))

    def blame(self, limits: Thresholds, top: int, run: Run) -> _Blame:
        """Errors of layers, final drift, and who drives it."""
        if not self.pairs:
            return self._without_layers(limits)
        images = sum(trajectory.batch for trajectory in self.trajectories) * len(self.trajectories[0].steps)
        with run.progress.track("Comparing layers", images) as done:
            layers, spreads = layer_errors(self.candidate, self.reference, self.pairs, self.trajectories, done=done)
        findings = _low_cosines(layers, limits)
        ends = final_states(self.candidate, self.trajectories, self.correction)
        if not all(bool(torch.isfinite(end).all()) for end in ends):
            note = "The final state is not finite, so nothing can be said about which layers drive the drift."
            return _Blame(findings, layers, (), spreads, notes=[note])
        found, relative = self._drift(ends)
        expansion = self._expansion()
        with run.progress.track("Differentiating the drift", images) as done:
            by_step = contributions(
                self.candidate,
                self.reference,
                self.pairs,
                self.trajectories,
                correction=self.correction,
                at=expansion,
                done=done,
            )
        drivers = self._restored(_drivers(by_step, found), found, top, run)
        if relative > limits.drift:
            with run.progress.track("Restoring all layers", 1) as done:
                exact = {name: layer for name, (layer, _) in self.pairs.items()}
                left = restored_drift(self.candidate, exact, self.trajectories, self.correction) / found * relative
                done(1)
            driving = _driving(drivers, found, limits)
            if left > limits.drift:
                findings += self._elsewhere(left, limits)
            elif not driving:
                findings.append(_spread(relative, limits, len(self.pairs)))
            findings += driving
        notes = []
        together = math.fsum(driver.share for driver in drivers)
        if abs(together - 1) > NEARLY_LINEAR and relative > limits.drift:
            notes.append(
                f"The estimated shares add up to {100 * together:.0f} % instead of 100 %: the trajectories are too far "
                "apart for a first-order estimate. Rely on what was measured; raise top to measure more layers."
            )
        return _Blame(findings, layers, drivers, spreads, found, relative, expansion, notes)

    def _without_layers(self, limits: Thresholds) -> _Blame:
        ends = final_states(self.candidate, self.trajectories, self.correction)
        finite = all(bool(torch.isfinite(end).all()) for end in ends)
        found, relative = self._drift(ends) if finite else (None, None)
        note = "No layer that both have computes anything else than in full precision, so there is none to blame."
        beyond = relative is not None and relative > limits.drift
        findings = self._elsewhere(relative, limits) if relative is not None and beyond else []
        return _Blame(findings, drift=found, relative=relative, notes=[note])

    def _elsewhere(self, left: float, limits: Thresholds) -> list[Finding]:
        """Drift that stays with all layers in full precision: a finding for each other module that differs.

        left: this drift, relative to the sample. If no module differs, one finding of the sampling as a whole.
        """
        layers = "With all layers in full precision" if self.pairs else "Though no layer differs,"
        what = f"{layers} the final drift is {100 * left:.3g} % of the sample"
        modules = differing_modules(self.reference, self.candidate)
        if not modules:
            what += ", and no other module that both have holds other numbers."
            return [Finding.of("drift_elsewhere", what, value=left, threshold=limits.drift)]
        return [
            Finding.of(
                "drift_elsewhere",
                f"{what}; this module's own parameters or buffers differ from full precision's by "
                + (f"{100 * value:.3g} %." if math.isfinite(value) else "more than their size, or in shape."),
                layer=name,
                value=left,
                threshold=limits.drift,
            )
            for name, value in modules.items()
        ]

    def _drift(self, ends: Sequence[Tensor]) -> tuple[float, float]:
        found = drift(ends, self.trajectories)
        exact = torch.cat([one.steps[-1].next_sample.double().flatten(1) for one in self.trajectories])
        norm = float(exact.square().mean(1).sqrt().mean())
        return found, found / norm if norm > 0 else math.inf

    def _expansion(self) -> Expansion:
        """At the quantized trajectory if all layers are stepquant's own, whose gradients are known."""
        simulated = all(isinstance(layer, QuantizedLayer | QuantizedMatmul) for _, layer in self.pairs.values())
        return "quantized" if simulated else "full_precision"

    def _restored(self, drivers: Sequence[Driver], found: float, top: int, run: Run) -> list[Driver]:
        """The first `top` drivers with a measured drift; of these the one that saves most comes first."""
        chosen = list(drivers[:top]) if found > 0 else []
        measured = []
        with run.progress.track("Restoring layers", len(chosen)) as done:
            for driver in chosen:
                exact = {driver.layer: self.pairs[driver.layer][0]}
                left = restored_drift(self.candidate, exact, self.trajectories, self.correction)
                measured.append(replace(driver, restored=left))
                done(1)
        return [*sorted(measured, key=lambda driver: driver.restored or 0.0), *drivers[len(chosen) :]]


def _check_same_dtype(candidate: nn.Module, reference: nn.Module) -> None:
    """Layers of both are called with the same tensors."""
    ours, theirs = dtype_of(candidate), dtype_of(reference)
    if None not in (ours, theirs) and ours != theirs:
        raise SpecError(
            f"The pipeline's denoiser is {str(ours).removeprefix('torch.')}, the full-precision one "
            f"{str(theirs).removeprefix('torch.')}: load both in one dtype."
        )


def _check_same_schedule(pipe: Any, recorded: Trajectory) -> None:
    """What the pipeline's scheduler would do must be what was recorded, up to guidance, the arguments' business."""
    expected = recorded.fingerprint
    own = copy.deepcopy(pipe.scheduler)
    args, kwargs = recorded.schedule_arguments
    own.set_timesteps(*args, **kwargs)
    found = expected.differences(ScheduleFingerprint.of(own, steps=expected.steps, guidance=expected.guidance))
    if found:
        raise SpecError(
            f"The pipeline does not sample on the schedule of the full-precision one: {' '.join(found)} Give both the "
            "same scheduler."
        )


def _low_cosines(layers: Iterable[LayerError], limits: Thresholds) -> list[Finding]:
    found = []
    for layer in layers:
        low = [step for step, cosine in enumerate(layer.cosine) if cosine < limits.cosine]
        if low:
            worst = min(low, key=lambda step: layer.cosine[step])
            what = (
                f"At equal inputs the output's cosine with full precision is {layer.cosine[low[0]]:.4f}, at worst "
                f"{layer.cosine[worst]:.4f} in step {worst}."
            )
            found.append(
                Finding.of(
                    "low_cosine",
                    what,
                    layer=layer.layer,
                    step=low[0],
                    value=layer.cosine[low[0]],
                    threshold=limits.cosine,
                    steps=len(low),
                )
            )
    return found


def _drivers(by_step: Mapping[str, Sequence[float]], found: float) -> list[Driver]:
    """The largest estimate first."""
    drivers = [
        Driver(name, math.fsum(row), math.fsum(row) / found if found > 0 else 0.0, tuple(row))
        for name, row in by_step.items()
    ]
    return sorted(drivers, key=lambda driver: -driver.estimate)


def _driving(drivers: Iterable[Driver], found: float, limits: Thresholds) -> list[Finding]:
    findings = []
    for driver in drivers:
        if driver.restored is None or found - driver.restored <= limits.driver * found:
            continue
        saved = (found - driver.restored) / found
        step = max(range(len(driver.by_step)), key=driver.by_step.__getitem__)
        what = (
            f"With this layer alone in full precision the final drift is {driver.restored:.4g} instead of {found:.4g}; "
            f"most of it comes from step {step}."
        )
        findings.append(
            Finding.of("drives_drift", what, layer=driver.layer, step=step, value=saved, threshold=limits.driver)
        )
    return findings


def _spread(relative: float, limits: Thresholds, layers: int) -> Finding:
    what = (
        f"The final drift is {100 * relative:.3g} % of the sample. It goes with all {layers} layers in full precision, "
        "but no single one that was measured accounts for a share of it."
    )
    return Finding.of("spread_drift", what, value=relative, threshold=limits.drift)
