"""Bits that a stage has given to timesteps are not dropped by a later stage without a word."""

from __future__ import annotations

from typing import Any

import pytest

from stepquant.calibrate.aligned import AlignLayers
from stepquant.calibrate.group_search import SearchGroups
from stepquant.calibrate.softmax_levels import ChooseSoftmaxLevels
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
from stepquant.calibrate.step_bits import ChooseStepBits
from stepquant.calibrate.temporal_block import FitStepRanges
from stepquant.calibrate.timestep_net import LearnStepSizes
from stepquant.calibrate.walked_ranges import FitRangesProgressively
from stepquant.errors import SpecError
from stepquant.recipe import Recipe

BEFORE = (Record(), Select(), Place(), FitWeightRanges(), FitInputRanges())
REPLACING = (
    FitInputRanges(),
    SearchGroups(),
    ChooseSoftmaxLevels(),
    FitStepRanges(),
    LearnStepSizes(),
    AlignLayers(),
    FitRangesProgressively(),
)


@pytest.mark.parametrize("replacing", REPLACING, ids=lambda stage: type(stage).__name__)
@pytest.mark.parametrize("setting", [ChooseStepBits((6, 8)), FitRangesProgressively(relaxed=0.5)], ids=["snr", "pcr"])
def test_a_stage_that_would_drop_bits_of_timesteps_is_refused(setting: Any, replacing: Any) -> None:
    name, other = type(replacing).__name__, type(setting).__name__
    with pytest.raises(SpecError, match=f"Stage 7 of recipe 'own', {name}, makes .* that {other} has set"):
        Recipe("own", (*BEFORE, setting, replacing))
    Recipe("own", (*BEFORE, replacing, setting))


def test_without_bits_of_timesteps_nothing_is_lost() -> None:
    Recipe("own", (*BEFORE, FitRangesProgressively(relaxed=0.0), FitInputRanges()))
