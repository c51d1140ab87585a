"""Methods of the literature. Each file is one paper and exports one function that returns a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepquant.calibrate.aligned import AlignLayers
from stepquant.calibrate.allocation import Allocate
from stepquant.calibrate.balance import BalanceChannels, RotateChannels
from stepquant.calibrate.bias_correction import CorrectBiases
from stepquant.calibrate.compensation import Compensate
from stepquant.calibrate.density_variety import SelectDensityVariety
from stepquant.calibrate.drawn import SelectDrawn
from stepquant.calibrate.dynamic import DynamicInputs
from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.group_search import SearchGroups
from stepquant.calibrate.informative import SelectInformative
from stepquant.calibrate.low_rank import AddLowRank
from stepquant.calibrate.noise_correction import CorrectNoise
from stepquant.calibrate.outlier_token import KeepFirstToken
from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
from stepquant.calibrate.refine_low_rank import RefineLowRank
from stepquant.calibrate.softmax_levels import ChooseSoftmaxLevels
from stepquant.calibrate.split_shortcuts import SplitShortcuts
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
from stepquant.calibrate.step_bits import ChooseStepBits
from stepquant.calibrate.temporal_block import FitStepRanges, RoundOtherBlocks, RoundTemporalBlock
from stepquant.calibrate.timestep_net import LearnStepSizes
from stepquant.calibrate.walked_correction import CorrectProgressively
from stepquant.calibrate.walked_ranges import FitRangesProgressively
from stepquant.calibrate.window_fitting import FitWindows
from stepquant.methods import accuquant as _accuquant
from stepquant.methods import adp_dm as _adp_dm
from stepquant.methods import baseline as _baseline
from stepquant.methods import cec as _cec
from stepquant.methods import combined as _combined
from stepquant.methods import d2_dpm as _d2_dpm
from stepquant.methods import eda_dm as _eda_dm
from stepquant.methods import gac as _gac
from stepquant.methods import layerwise as _layerwise
from stepquant.methods import lsgquant as _lsgquant
from stepquant.methods import mixdq as _mixdq
from stepquant.methods import pcr as _pcr
from stepquant.methods import pqd as _pqd
from stepquant.methods import ptq4dit as _ptq4dit
from stepquant.methods import ptq4dm as _ptq4dm
from stepquant.methods import ptqd as _ptqd
from stepquant.methods import q_diffusion as _q_diffusion
from stepquant.methods import svdquant as _svdquant
from stepquant.methods import tac as _tac
from stepquant.methods import tcaq_dm as _tcaq_dm
from stepquant.methods import tdq as _tdq
from stepquant.methods import tfmq_dm as _tfmq_dm
from stepquant.methods import vidit_q as _vidit_q
from stepquant.recipe import Recipe, Stage

__all__ = ["ADD_ONS", "METHODS", "MODULES", "PRESETS", "STAGES"]

MODULES: dict[str, Any] = {
    "rtn": _baseline,
    "layerwise": _layerwise,
    "q_diffusion": _q_diffusion,
    "ptq4dm": _ptq4dm,
    "pqd": _pqd,
    "eda_dm": _eda_dm,
    "pcr": _pcr,
    "gac": _gac,
    "tfmq_dm": _tfmq_dm,
    "tdq": _tdq,
    "adp_dm": _adp_dm,
    "tcaq_dm": _tcaq_dm,
    "ptq4dit": _ptq4dit,
    "vidit_q": _vidit_q,
    "svdquant": _svdquant,
    "lsgquant": _lsgquant,
    "mixdq": _mixdq,
    "accuquant": _accuquant,
    "cec": _cec,
    "ptqd": _ptqd,
    "d2_dpm": _d2_dpm,
    "tac": _tac,
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
        Allocate,
        SplitShortcuts,
        FitWeightRanges,
        FitInputRanges,
        CorrectBiases,
        RoundLayers,
        RoundBlocks,
        ScaleBlocks,
        FitWindows,
        SelectInformative,
        SelectDrawn,
        SelectDensityVariety,
        FitRangesProgressively,
        SearchGroups,
        DynamicInputs,
        BalanceChannels,
        RotateChannels,
        AddLowRank,
        RefineLowRank,
        AlignLayers,
        ChooseSoftmaxLevels,
        RoundTemporalBlock,
        RoundOtherBlocks,
        FitStepRanges,
        LearnStepSizes,
        KeepFirstToken,
        ChooseStepBits,
        CorrectNoise,
        CorrectProgressively,
        Compensate,
    )
}
