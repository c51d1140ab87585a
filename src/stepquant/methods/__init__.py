"""Methods of the literature. Each file is one paper and exports one function that returns a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
from stepquant.methods import accuquant as _accuquant
from stepquant.methods import baseline as _baseline
from stepquant.methods import q_diffusion as _q_diffusion
from stepquant.recipe import Recipe

__all__ = ["METHODS", "MODULES", "PRESETS", "STAGES"]

MODULES: dict[str, Any] = {"rtn": _baseline, "q_diffusion": _q_diffusion, "accuquant": _accuquant}

METHODS: dict[str, Callable[..., Recipe]] = {
    "rtn": _baseline.rtn,
    "q_diffusion": _q_diffusion.q_diffusion,
    "accuquant": _accuquant.accuquant,
}

PRESETS: dict[str, dict[str, dict[str, object]]] = {name: module.PRESETS for name, module in MODULES.items()}

STAGES: dict[str, type[Any]] = {
    stage.__name__: stage
    for stage in (
        Record,
        Select,
        Place,
        FitWeightRanges,
        FitInputRanges,
        RoundBlocks,
        ScaleBlocks,
        _accuquant.AccuQuantWindows,
    )
}
