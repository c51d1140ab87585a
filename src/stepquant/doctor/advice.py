"""From findings to rules: which layers to give more bits, in the form of `run.yaml`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml
from torch import nn

from stepquant.calibrate.stages import LayerRule
from stepquant.doctor.findings import Finding
from stepquant.doctor.layers import bits_of

__all__ = ["as_yaml", "plain_rules", "rules_for"]


def rules_for(findings: Iterable[Finding], denoiser: nn.Module, known: Iterable[str]) -> tuple[LayerRule, ...]:
    """One rule for each layer that has a finding which bits can mend, in the order of `known`.

    A tensor below 8 bits gets 8, one of 8 bits is left in floating point. known: the layers that rules may name.
    """
    modules = dict(denoiser.named_modules())
    asked: dict[str, set[str]] = {}
    for finding in findings:
        if finding.layer is None or finding.layer not in modules or finding.remedy == "none":
            continue
        own_fault = finding.kind == "dead_channels" and bits_of(modules[finding.layer]) == (None, None)
        if not own_fault:  # channels of a layer that is not quantized: no bits bring them back
            asked.setdefault(finding.layer, set()).add(finding.remedy)
    rules = []
    for name in known:
        if name not in asked:
            continue
        wanted = asked[name]
        weights, activations = bits_of(modules[name])
        if "float" in wanted:
            weights = activations = None
        if wanted & {"weights", "both"}:
            weights = _more(weights)
        if wanted & {"activations", "both"}:
            activations = _more(activations)
        # A rule without a group size would give the weight a scale a channel, which is coarser.
        spec = getattr(getattr(modules[name], "weight_quantizer", None), "spec", None)
        group_size = None if weights is None else getattr(spec, "group_size", None)
        rules.append(LayerRule(_literal(name), weights, activations, group_size))
    return tuple(rules)


def _more(bits: int | None) -> int | None:
    return 8 if bits is not None and bits < 8 else None


def _literal(name: str) -> str:
    """A pattern that matches this name only."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def plain_rules(rules: Iterable[LayerRule]) -> list[dict[str, Any]]:
    """Rules as values of `run.yaml`; null is floating point."""
    return [
        {"pattern": rule.pattern, "weights": rule.weights, "activations": rule.activations}
        | ({} if rule.group_size is None else {"group_size": rule.group_size})
        for rule in rules
    ]


def as_yaml(rules: Iterable[LayerRule]) -> str:
    """The key `rules` of `run.yaml`."""
    return yaml.safe_dump({"rules": plain_rules(rules)}, sort_keys=False, allow_unicode=True)
