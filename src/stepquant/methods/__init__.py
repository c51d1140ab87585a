"""Methods of the literature. Each file is one paper and exports one function that returns a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepquant.calibrate.compensation import Compensate
from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.group_search import SearchGroups
from stepquant.calibrate.informative import SelectInformative
from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
from stepquant.calibrate.window_fitting import FitWindows
from stepquant.methods import accuquant as _accuquant
from stepquant.methods import adp_dm as _adp_dm
from stepquant.methods import baseline as _baseline
from stepquant.methods import cec as _cec
from stepquant.methods import combined as _combined
from stepquant.methods import gac as _gac
from stepquant.methods import q_diffusion as _q_diffusion
from stepquant.recipe import Recipe, Stage

__all__ = ["ADD_ONS", "METHODS", "MODULES", "PRESETS", "STAGES"]

MODULES: dict[str, Any] = {
    "rtn": _baseline,
    "q_diffusion": _q_diffusion,
    "gac": _gac,
    "adp_dm": _adp_dm,
    "accuquant": _accuquant,
    "cec": _cec,
    "combined": _combined,
}

METHODS: dict[str, Callable[..., Recipe]] = {name: getattr(module, name) for name, module in MODULES.items()}

ADD_ONS: dict[str, Callable[..., tuple[Stage, ...]]] = {
    name: module.add_on for name, module in MODULES.items() if hasattr(module, "add_on")
}
"""What can follow another method, as in `q_diffusion+cec`: stages that need nothing but a quantized model."""

PRESETS: dict[str, dict[str, dict[str, object]]] = {name: module.PRESETS for name, module in MODULES.items()}

STAGES: dict[str, type[Any]] = {
    stage.__name__: stage
    for stage in (
        Record,
        Select,
        Place,
        FitWeightRanges,
        FitInputRanges,
        RoundLayers,
        RoundBlocks,
        ScaleBlocks,
        FitWindows,
        SelectInformative,
        SearchGroups,
        Compensate,
    )
}
