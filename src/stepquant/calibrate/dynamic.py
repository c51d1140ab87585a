"""Activation ranges that are taken from each tensor at run time, instead of ranges fitted to calibration samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from stepquant.calibrate.layer_inputs import check_patterns, chosen_layers
from stepquant.model.surgery import Plan, quantizable
from stepquant.numerics.spec import Granularity, QuantSpec
from stepquant.recipe import Figures, Job

__all__ = ["DynamicInputs"]


@dataclass(frozen=True)
class DynamicInputs:
    """Plan dynamic quantizers for the inputs of layers; `FitInputRanges` puts them in place.

    Linear layers get a range per token, convolutions one per sample: the last axis of an image is no token. Operands of
    matmuls keep their static ranges; the softmax output is within [0, 1] whatever the input.

    layers: patterns of names. Layers with groups, and those whose input is not quantized, are left as they are.
    channels: linear layers get a scale for each channel of a sample beside that of each token (`DynamicQuantizer`).
    """

    layers: tuple[str, ...] = ("*",)
    channels: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"plan"})

    def check(self, job: Job) -> None:
        """Patterns that match nothing show before anything is recorded."""
        check_patterns(self.layers, quantizable(job.full_precision))

    def run(self, job: Job) -> Figures:
        plan: Plan = dict(job.handed["plan"])
        changed = 0
        for name, layer in chosen_layers(job, self.layers).items():
            spec = plan[name].input
            if spec is not None and not spec.dynamic:
                linear = layer.geometry.kind == "linear"
                granularity: Granularity = "tensor" if not linear else "channel_token" if self.channels else "token"
                found = QuantSpec(spec.bits, granularity, symmetric=granularity == "channel_token", dynamic=True)
                plan[name] = replace(plan[name], input=found)
                changed += 1
        job.handed["plan"] = plan
        return {"layers": changed, "evaluations": 0}
