"""Inpainting with an ordinary UNet: after every step the pipeline writes the known part of the picture into the sample.

    x_{k+1} = m y_k + (1 - m) c_k,   m in {0, 1}

y_k is what the scheduler returned, c_k the known latents with the noise of the next timestep, and m the mask: 1 where
something is to be painted. c_k does not depend on the sample, so replay takes it from the recording, and m is where
the recorded sample of a step is what the step before it returned.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from stepquant.calibrate.steps import Step
from stepquant.errors import UnsupportedPipeline

__all__ = ["painted_positions"]


def painted_positions(steps: Sequence[Step]) -> Tensor | None:
    """m of the module's docstring, bool `[B, 1, ...]`; None for a single step, after which nothing is to be seen.

    Raises UnsupportedPipeline if it is not the same after every step, or if nothing of an image is left to the sampler:
    then the change may depend on the sample.
    """
    found: Tensor | None = None
    for before, after in itertools.pairwise(steps):
        if before.next_sample.shape != after.sample.shape or after.sample.ndim < 3:
            raise UnsupportedPipeline(
                f"The pipeline writes into the sample after step {before.index}, and samples of shape "
                f"{tuple(after.sample.shape)} have no positions. Calibrate the text-to-image pipeline."
            )
        # All channels of a position are painted or known together, so a value that is equal by chance does not matter.
        same = (before.next_sample == after.sample).all(dim=1, keepdim=True)
        if found is not None and not torch.equal(same, found):
            raise UnsupportedPipeline(
                f"The pipeline changes other positions of the sample after step {before.index} than after step 0, so "
                "it is not a mask that is written over with the known picture. Calibrate the text-to-image pipeline."
            )
        found = same
    if found is not None and not bool(found.flatten(1).any(dim=1).all()):
        raise UnsupportedPipeline(
            "The pipeline changes every position of the sample after every step: its mask is empty, or something else "
            "(a callback) changes the sample too. Calibrate with masks that leave something to paint, and without it."
        )
    return found
