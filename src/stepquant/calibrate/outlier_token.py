"""Keeping the first token of a prompt out of the quantizers of the layers that read the text.

    y_0 = W x_bos + b      computed once, in full precision            x_bos [C]: the same in every prompt
    y_i = Q(W) Q(x_i) + b  for the other tokens, i >= 1

Source: Zhao et al. 2024 (MixDQ, arXiv:2405.17873), BOS-aware quantization. `model.first_token` is what is left of it
at run time.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepquant.calibrate.trajectory import Trajectory
from stepquant.errors import SpecError
from stepquant.model.first_token import FirstToken, is_near
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import quantized_layers
from stepquant.recipe import Figures, Job

__all__ = ["KeepFirstToken", "first_token_of", "text_readers"]

TEXT = "encoder_hidden_states"
"""diffusers' name for the argument of a denoiser that holds the embedded prompt, `[B, T, C]`."""


def _text_of(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The embedded prompts of a call; None for a denoiser that is given none."""
    names = list(inspect.signature(denoiser.forward).parameters)
    found = kwargs.get(TEXT)
    if found is None and TEXT in names and len(args) > names.index(TEXT):
        found = args[names.index(TEXT)]
    return found if isinstance(found, Tensor) and found.ndim == 3 else None


@torch.no_grad()
def text_readers(
    denoiser: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[str]:
    """Those of `names` whose input is the embedded prompt as it is; found by one call."""
    text = _text_of(denoiser, args, kwargs)
    if text is None:
        return []
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            given = inputs[0]
            if name not in found and given.shape == text.shape and (given is text or torch.equal(given, text)):
                found.append(name)

        return hook

    handles = [denoiser.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    try:
        denoiser(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def first_token_of(denoiser: nn.Module, trajectories: Sequence[Trajectory]) -> tuple[Tensor | None, str]:
    """The token `[C]` that every recorded prompt begins with, or None and why there is none.

    Zeros do not count: some pipelines put them in the place of an empty prompt.
    """
    rows: list[Tensor] = []
    for trajectory in trajectories:
        for call in trajectory.steps[0].calls:
            text = _text_of(denoiser, call.args, call.kwargs)
            if text is None:
                return None, "The model is not given embedded prompts."
            if text.shape[1] < 2:
                return None, "The prompts have a single token."
            rows.append(text[:, 0].detach())
    tokens = torch.cat(rows)
    tokens = tokens[tokens.abs().amax(1) > 0]
    if not len(tokens):
        return None, "All prompts are zero."
    different = int((~is_near(tokens, tokens[0])).sum())
    if different:
        return None, f"{different} of {len(tokens)} recorded prompts begin with another token than the first."
    return tokens[0], ""


@dataclass(frozen=True)
class KeepFirstToken:
    """Let the token that all prompts begin with pass by the quantizers of the layers that read the prompts.

    layers: shell patterns of layer names; of those that match, the linear layers whose input is the embedded prompt
        itself are taken. These are the keys and values of cross attention in diffusers' U-Nets.

    A model without prompts, or whose prompts do not all begin alike (encoders without a token for the beginning), keeps
    its layers; the figures say why. Ranges must be fitted afterwards.
    """

    layers: tuple[str, ...] = ("*to_k", "*to_v")

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    """`Allocate` may have one inside, and a nested dataclass ignores unknown keys otherwise."""

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        if not self.layers:
            raise SpecError("layers names no layer whose first token is to be kept: give patterns, ('*',) for all.")

    def run(self, job: Job) -> Figures:
        trajectories: list[Trajectory] = job.handed["trajectories"]
        token, reason = first_token_of(job.full_precision, trajectories)
        if token is None:
            return {"layers": [], "left_because": reason, "evaluations": 0}
        layers = quantized_layers(job.denoiser)
        linear = [
            name
            for name in job.handed["plan"]
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.layers)
            and isinstance(layers[name], QuantizedLayer)
            and layers[name].geometry.kind == "linear"  # type: ignore[union-attr]
        ]
        call = trajectories[0].steps[0].calls[0]
        found = text_readers(job.full_precision, linear, call.args, call.kwargs)
        for name in found:
            layer = layers[name]
            assert isinstance(layer, QuantizedLayer)
            with torch.no_grad():
                output = job.full_precision.get_submodule(name)(token.to(layer.weight.dtype)[None])[0]
            layer.first_token = FirstToken(token.to(layer.weight.dtype), output)
        reason = "" if found else "No layer of this name reads the embedded prompts."
        return {"layers": found, "left_because": reason, "evaluations": call.prediction.shape[0]}
