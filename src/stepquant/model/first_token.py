"""A first token that a layer's quantizers never see, because what the layer makes of it is known beforehand.

The text encoders of latent diffusion models begin every prompt with the same token, and with causal attention nothing
behind it changes what it becomes: one vector for all prompts, far larger than any other token. In a layer that reads
the text it would take the whole range of the input quantizer. Its output `W token + b` is computed once, in full
precision.

Source: Zhao et al. 2024 (MixDQ, arXiv:2405.17873), BOS-aware quantization.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepquant.errors import SpecError

__all__ = ["NEAR", "FirstToken", "is_near"]

NEAR = 0.05
"""How far from the known token a first token may be, relative to the known token's length, and still be taken for it.

Room for a text encoder in half precision; another token is about as far away as it is long. Ours.
"""


def is_near(tokens: Tensor, known: Tensor) -> Tensor:
    """Which of `tokens` `[..., C]` are the known one `[C]`, `[..., 1]` bool."""
    wide = known.float()
    near: Tensor = (tokens.float() - wide).norm(dim=-1, keepdim=True) <= NEAR * wide.norm()
    return near


class FirstToken(nn.Module):
    """The known first token of a layer's input, and what the full-precision layer makes of it.

    token `[C]`, output `[O]`: parameters, so they have the model's dtype. Raises SpecError for other shapes.
    """

    def __init__(self, token: Tensor, output: Tensor) -> None:
        super().__init__()
        if token.ndim != 1 or output.ndim != 1:
            raise SpecError(
                f"A first token is [C] and its output [O], found {list(token.shape)} and {list(output.shape)}."
            )
        self.token = nn.Parameter(token.detach().clone(), requires_grad=False)
        self.output = nn.Parameter(output.detach().clone(), requires_grad=False)

    def forward(self, first: Tensor, otherwise: Tensor) -> Tensor:
        """The output of first tokens `[B, 1, C]`: the known one, or `otherwise` `[B, 1, O]` in the rows of others.

        Some pipelines put zeros in the place of an empty prompt's embedding, so a row may begin with something else.
        """
        return torch.where(is_near(first, self.token), self.output.to(otherwise.dtype), otherwise)
