"""What single layers see in the full-precision model: sampled patches, and the peaks of every channel over time.

For stages that fit a layer for its own output.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepquant.calibrate.patches import columns, transformed_patches
from stepquant.calibrate.ranges import RangeRule, fit_range, weight_params
from stepquant.calibrate.reconstruct import float_layers
from stepquant.calibrate.select import CalibrationSet, inputs
from stepquant.errors import CalibrationError, SpecError, no_layer_matches
from stepquant.model.layer import Geometry, QuantizedLayer, geometry_of
from stepquant.model.quantizer import DynamicQuantizer, WeightQuantizer
from stepquant.model.surgery import Plan, quantized_layers
from stepquant.numerics.affine import fake_quantize
from stepquant.numerics.spec import QuantSpec
from stepquant.recipe import Job

__all__ = [
    "LayerInputs",
    "captured",
    "check_patterns",
    "chosen_layers",
    "output_error",
    "refit_",
    "rounded_inputs",
]


@dataclass
class LayerInputs:
    """What a layer saw.

    patches: `[N, K]`, a random subset, of all calibration samples alike.
    peaks: step -> largest magnitude of every input channel at that step, `[C]`.
    means: `[N, C]`, mean of every input channel over the positions of each calibration sample.
    """

    patches: Tensor
    peaks: dict[int, Tensor]
    means: Tensor

    @property
    def peak(self) -> Tensor:
        """The largest magnitude of every channel over all steps, `[C]`."""
        return torch.stack(list(self.peaks.values())).amax(0)


@dataclass
class _Seen:
    geometry: Geometry
    kernel: tuple[int, ...]
    generator: torch.Generator
    share: int
    parts: list[Tensor] = field(default_factory=list)
    peaks: dict[int, Tensor] = field(default_factory=dict)
    means: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, steps: Sequence[int]) -> None:
        """x: the layer's input, of one sample for each of `steps`, or of several (heads, frames) for each."""
        x = x.detach().float()
        last = x if self.geometry.kind == "linear" else x.movedim(1, -1)
        by_sample = last.reshape(len(steps), -1, last.shape[-1])
        largest = by_sample.abs().amax(1)
        self.means.append(by_sample.mean(1))
        each = len(x) // len(steps)
        for number, step in enumerate(steps):
            before = self.peaks.get(step)
            peak = largest[number]
            self.peaks[step] = peak if before is None else torch.maximum(before, peak)
            found = columns(self.geometry, self.kernel, x[number * each : (number + 1) * each])[0].mT
            take = torch.randint(len(found), (min(self.share, len(found)),), generator=self.generator)
            self.parts.append(found[take.to(found.device)])


def check_patterns(patterns: Sequence[str], layers: Iterable[str]) -> None:
    """Raise SpecError for a pattern that matches none of these names."""
    names = list(layers)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise SpecError(no_layer_matches(pattern, names))


def chosen_layers(job: Job, patterns: Sequence[str]) -> dict[str, QuantizedLayer]:
    """Linear layers and convolutions without groups that match a pattern, in order of execution.

    Raises SpecError for a pattern that matches no layer.
    """
    plan: Plan = job.handed["plan"]
    check_patterns(patterns, plan)
    layers = quantized_layers(job.denoiser)
    found = {}
    for name in plan:
        layer = layers[name]
        matches = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        if matches and isinstance(layer, QuantizedLayer) and layer.geometry.groups == 1:
            found[name] = layer
    return found


def captured(
    job: Job, names: Sequence[str], *, stage: str, samples: int, batch: int, patches: int, of_step: int = 0
) -> tuple[dict[str, LayerInputs], int]:
    """What layers of the full-precision model see, and the evaluations that it took. Layers that never run are missing.

    samples: calibration samples, spread evenly over the calibration set; `of_step` times as many as there are steps in
        it, if that is more. patches: about so many for each layer. stage: names the random stream.
    """
    if not names:
        return {}, 0
    chosen: CalibrationSet = job.handed["calibration"]
    count = min(max(samples, of_step * len({step for _, step, _ in chosen.entries})), len(chosen))
    spread = torch.linspace(0, len(chosen) - 1, count).round().long().tolist()
    modules = dict(job.full_precision.named_modules())
    seen: dict[str, _Seen] = {}
    for name in names:
        module: Any = modules[name]
        kernel = tuple(module.weight.shape[2:])
        seen[name] = _Seen(geometry_of(module), kernel, job.run.generator(stage, name), -(-patches // count))
    steps: list[int] = []

    def adds(one: _Seen) -> Any:
        return lambda _module, args: one.add(args[0], steps)

    handles = [modules[name].register_forward_pre_hook(adds(one)) for name, one in seen.items()]
    try:
        with torch.no_grad(), job.run.progress.track("Watching layers", count) as advance:
            for start in range(0, count, batch):
                positions = spread[start : start + batch]
                steps[:] = [chosen.entries[position][1] for position in positions]
                args, kwargs = inputs(job.handed["trajectories"], chosen, positions)
                job.full_precision(*args, **kwargs)
                advance(len(positions))
    finally:
        for handle in handles:
            handle.remove()
    found = {
        name: LayerInputs(torch.cat(one.parts), one.peaks, torch.cat(one.means))
        for name, one in seen.items()
        if one.parts
    }
    return found, count


def rounded_inputs(patches: Tensor, spec: QuantSpec | None) -> Tensor:
    """Patches on the grid of a quantizer whose range is that of these patches (a token: of each patch).

    Scales of channels are those of all patches, as if they were one sample.
    """
    if spec is None:
        return patches
    if spec.granularity == "channel_token":
        return DynamicQuantizer(spec).forward(patches[None])[0]
    if spec.granularity == "token":
        return DynamicQuantizer(spec).forward(patches)
    flat = patches.reshape(1, -1)
    plain = QuantSpec(spec.bits, symmetric=spec.symmetric, nonnegative=spec.nonnegative)
    return fake_quantize(flat, fit_range(flat, plain, "minmax"), plain).reshape(patches.shape)


def output_error(layer: QuantizedLayer, patches: Tensor, full_precision: Tensor, spec: QuantSpec | None) -> float:
    """Squared error of a layer's output, mean over patches, as it is now and with its input rounded as `spec` says.

    patches: `[N, K]` of the layer's input before the transform. full_precision: the original weight.
    """
    wide = full_precision.float()
    x = transformed_patches(layer.input_transform, patches)
    found = rounded_inputs(x, spec) @ layer.weight.detach().float().flatten(1).T
    if layer.branch is not None:
        found = found + x @ layer.branch.product().float().flatten(1).T
    return float((found - patches @ wide.flatten(1).T).square().sum() / len(patches))


def refit_(layer: QuantizedLayer, full_precision: Tensor, rule: RangeRule) -> None:
    """Give the layer the weight that its transform and branch leave it, rounded to nearest on new ranges."""
    quantizer = layer.weight_quantizer
    target = layer.folded(full_precision)
    layer.weight.data = target.clone()
    if quantizer is None:
        return
    if not isinstance(quantizer, WeightQuantizer):
        raise CalibrationError("Only hardened layers can be transformed: run the stage FitWeightRanges before.")
    params = weight_params(target, quantizer.spec, rule)
    layer.weight_quantizer = WeightQuantizer(quantizer.spec, params).to(layer.weight.device)
    layer.on_grid = False
    layer.harden_()


def originals(job: Job, layers: dict[str, QuantizedLayer]) -> dict[str, Tensor]:
    """Full-precision weights of layers, by name."""
    return float_layers(job.full_precision, list(layers))
