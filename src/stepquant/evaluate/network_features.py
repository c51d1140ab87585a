"""What features of a published network have in common: how images reach it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepquant.errors import EvaluationError
from stepquant.evaluate.features import Extracted, three_channels, weights_identity
from stepquant.evaluate.images import check_images

__all__ = ["NetworkFeatures"]


class NetworkFeatures:
    """Features of a module that turns images `[B, 3, size, size]` in [0, 1] into `Extracted`.

    Subclasses say what it is called, how many features it gives and which side it takes.
    """

    name: str
    dim: int
    size: int

    def __init__(self, module: nn.Module, *, device: torch.device | str = "cpu") -> None:
        """module: with its weights; it is put into evaluation mode."""
        self._module = module.eval().requires_grad_(False).to(device)
        self._device = device
        self.identity = weights_identity(module)

    def __call__(self, images: Tensor) -> Tensor:
        """Features `[B, dim]` of images `[B, 1 or 3, size, size]`; grey ones count as RGB."""
        return self.extract(images).features

    @torch.no_grad()
    def extract(self, images: Tensor) -> Extracted:
        """Raises EvaluationError: another size, other channels, or values outside [0, 1]."""
        check_images(images, what="Images")
        if tuple(images.shape[2:]) != (self.size, self.size):
            raise EvaluationError(
                f"{self.name} got images of shape {tuple(images.shape)}: resize them to {self.size} x {self.size}."
            )
        found: Extracted = self._module(three_channels(images).float().to(self._device))
        return found
