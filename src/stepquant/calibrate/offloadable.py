"""Which recipes run with their denoiser's blocks in main memory (`Run.offload`)."""

from __future__ import annotations

from stepquant.calibrate.balance import BalanceChannels
from stepquant.calibrate.bias_correction import CorrectBiases
from stepquant.calibrate.compensation import Compensate
from stepquant.calibrate.dynamic import DynamicInputs
from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.noise_correction import CorrectNoise
from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
from stepquant.calibrate.split_shortcuts import SplitShortcuts
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
from stepquant.calibrate.window_fitting import FitWindows
from stepquant.errors import SpecError
from stepquant.recipe import Recipe
from stepquant.run import Run

__all__ = ["refuse_offload"]

_STAGES = (
    Record,
    Select,
    Place,
    SplitShortcuts,
    FitWeightRanges,
    FitInputRanges,
    DynamicInputs,
    BalanceChannels,
    CorrectBiases,
    RoundLayers,
    RoundBlocks,
    ScaleBlocks,
    FitWindows,
    CorrectNoise,
    Compensate,
)
"""They call networks as a whole, and bring to the device what else they compute with there (`offload.brought`)."""


def refuse_offload(recipe: Recipe, run: Run) -> None:
    """Raise SpecError, before anything is done, for a run with `offload` that would not end well."""
    if run.offload is None:
        return
    if run.processes.count > 1:
        raise SpecError(
            f"Offload is for one process, found {run.processes.count}: each would hold both networks in main memory. "
            "Start one process, or calibrate without offload."
        )
    unable = [type(stage).__name__ for stage in recipe.stages if not isinstance(stage, _STAGES)]
    if unable:
        raise SpecError(
            f"{', '.join(dict.fromkeys(unable))} of recipe {recipe.name!r} needs the whole network on the device: "
            "calibrate without offload, or with rtn, layerwise, q_diffusion, accuquant, cec, or "
            "combined without low_rank."
        )
