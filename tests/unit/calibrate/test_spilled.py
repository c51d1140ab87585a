"""Trajectories and caches on disk: the same bits as in memory, and nothing left in memory or on disk."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from stepquant.api import quantize
from stepquant.calibrate import reconstruct, split
from stepquant.calibrate.captured import Column, RowsOnDisk
from stepquant.calibrate.qdrop import QDrop
from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
from stepquant.calibrate.spilled import Shelf, StepsOnDisk, spilled
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
from stepquant.calibrate.trajectory import Trajectory, record, replay, seal, state_at
from stepquant.calibrate.trajectory_files import load_trajectories, save_trajectories
from stepquant.calibrate.window_fitting import FitWindows
from stepquant.errors import CalibrationError
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.recipe import Job, Recipe
from stepquant.run import Run
from tiny import TinyNet

SCHEDULERS = {
    "ddim": DDIMScheduler(),
    "dpm": DPMSolverMultistepScheduler(),
    "unipc": UniPCMultistepScheduler(),
    "pndm": PNDMScheduler(skip_prk_steps=True),
    "heun": HeunDiscreteScheduler(),
    "ancestral": EulerAncestralDiscreteScheduler(),
}


def tiny_pipe(scheduler: Any = None) -> DenoiserPipeline:
    torch.manual_seed(0)
    return DenoiserPipeline(TinyNet().eval(), copy.deepcopy(scheduler or DDIMScheduler()), (2, 4, 4))


def two_trajectories(pipe: Any, steps: int = 5) -> list[Trajectory]:
    found = record(pipe, pipe.denoiser, seeds=(3, 1, 4), steps=steps, batch_size=2, run=Run())
    return [seal(trajectory) for trajectory in found]


def assert_same(one: Trajectory, other: Trajectory) -> None:
    assert len(one.steps) == len(other.steps)
    assert (one.seeds, one.form, one.fingerprint) == (other.seeds, other.form, other.fingerprint)
    for a, b in zip(one.steps, other.steps, strict=True):
        assert (a.index, a.draws_globally) == (b.index, b.draws_globally)
        for name in ("sample", "guided", "next_sample"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        first, second = state_at(one, a.index).history, state_at(other, a.index).history
        assert first.keys() == second.keys()
        assert all(torch.equal(first[path], second[path]) for path in first)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_on_disk_replay_to_the_same_bits(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipe(SCHEDULERS[name])
    kept, shelf = two_trajectories(pipe), Shelf()
    away = [spilled(trajectory, tmp_path / f"{n}.safetensors", shelf) for n, trajectory in enumerate(kept)]
    other: Any = copy.deepcopy(pipe.denoiser)
    other.out.weight.data *= 1.1
    # The second trajectory, of another batch size, has the first one's schedulers with a memory of its own.
    for here, there in zip(kept, away, strict=True):
        assert isinstance(there.steps, StepsOnDisk)
        assert_same(here, there)
        with torch.no_grad():
            for denoiser in (pipe.denoiser, other):
                expected = [state.sample for state in replay(denoiser, here, 0, len(here.steps))]
                found = [state.sample for state in replay(denoiser, there, 0, len(there.steps))]
                assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    save_trajectories(tmp_path / "folder", away)
    for here, there in zip(kept, load_trajectories(tmp_path / "folder", pipe.scheduler), strict=True):
        assert_same(here, there)


def test_what_nobody_uses_is_not_mapped(tmp_path: Path) -> None:
    pipe = tiny_pipe()
    (trajectory, _), shelf = two_trajectories(pipe, steps=12), Shelf()
    path = (tmp_path / "t.safetensors").resolve()
    away = spilled(trajectory, path, shelf)

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    assert mappings() == 0
    assert len([step.index for step in away.steps]) == 12
    assert 0 < mappings() <= 4
    held = [step.sample for step in away.steps]
    assert mappings() >= 12  # they are mapped, not copied
    del held
    shelf.recent.clear()
    assert mappings() == 0


def test_indexing_is_a_sequences(tmp_path: Path) -> None:
    (trajectory, _) = two_trajectories(tiny_pipe())
    steps = spilled(trajectory, tmp_path / "t.safetensors", Shelf()).steps
    assert steps[-1].index == 4
    assert [step.index for step in steps[1:3]] == [1, 2]
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        steps[5]


RECIPES = {
    "blocks": (RoundBlocks(iterations=4, batch=4, together=2), ScaleBlocks(iterations=4, batch=4)),
    "drop": (RoundBlocks(iterations=4, batch=4, qdrop=QDrop(), layer_weight=0.1),),
    "plain prefix": (RoundBlocks(iterations=4, batch=4, quantized_prefix=False, layer_weight=0.1),),
    "windows": (FitWindows(2, iterations=4),),
    "weight scales": (FitWindows(2, iterations=4, learn_weights=False, lr_weight_scales=1e-2),),
}


def recipe_of(*stages: Any, samples: int = 6, batch: int = 4) -> Recipe:
    ranges = (FitWeightRanges("minmax"), FitInputRanges("minmax", batch=4))
    return Recipe("test", (Record(samples, batch), Select(), Place(3, 6), *ranges, *stages))


def ended(name: str, run: Run, resume: bool = False) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    made = quantize(
        tiny_pipe(DPMSolverMultistepScheduler()), recipe_of(*RECIPES[name]), steps=5, run=run, resume=resume
    )
    figures = [{key: value for key, value in entry.items() if key != "seconds"} for entry in made.figures]
    return made.pipe.denoiser.state_dict(), figures


def assert_equal(one: Any, other: Any) -> None:
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1] == other[1]


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_with_little_memory_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    expected = ended(name, Run())
    assert_equal(expected, ended(name, Run(max_memory=0)))
    assert_equal(expected, ended(name, Run(max_memory=0, work=tmp_path / "work")))
    assert not (tmp_path / "work" / "spill").exists()


def test_a_killed_run_goes_on_with_any_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ended("blocks", Run())
    run = Run(max_memory=0, work=tmp_path / "work")

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reconstruct, "fit_unit", killed)
        with pytest.raises(KeyboardInterrupt):
            ended("blocks", run)
    (tmp_path / "work" / "spill").mkdir()
    (tmp_path / "work" / "spill" / "left.safetensors").write_bytes(b"by kill -9")
    again = replace(run, max_memory=None)
    with monkeypatch.context() as patch:
        patch.setattr(reconstruct, "fit_unit", killed)
        with pytest.raises(KeyboardInterrupt):
            ended("blocks", again, resume=True)
    assert not (tmp_path / "work" / "spill").exists()
    assert_equal(expected, ended("blocks", run, resume=True))


def test_only_one_recorded_batch_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def counting(trajectory: Trajectory, *args: Any) -> Trajectory:
        known.append(weakref.ref(trajectory.steps[1].sample))
        alive.append(sum(one() is not None for one in known))
        return spilled(trajectory, *args)

    monkeypatch.setattr(split, "spilled", counting)
    gc.disable()  # what waits for a search of cycles is in memory
    try:
        quantize(tiny_pipe(), recipe_of(samples=8, batch=2), steps=3, run=Run(max_memory=0))
    finally:
        gc.enable()
    assert alive == [1, 1, 1, 1]


def test_caches_beyond_the_limit_and_only_those_are_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[type]] = []
    fit = reconstruct.fit_unit

    def spy(job: Job, unit: Any, cache: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([type(cache.outputs[0]), type(cache.args[0])])
        return fit(job, unit, cache, *args, **kwargs)

    monkeypatch.setattr(reconstruct, "fit_unit", spy)
    recipe = recipe_of(RoundBlocks(iterations=1, batch=4))
    # 18 entries are 5 batches of 4. conv: [2, 4, 4] -> [4, 4, 4]; out: [4, 4, 4] -> [4, 4, 2]; outputs come first.
    both = 5 * 4 * 4 * (4 * 4 * 4 + 4 * 4 * 2)
    for limit, expected in (
        (0, [[RowsOnDisk, RowsOnDisk]] * 2),
        (both - 1, [[Tensor, RowsOnDisk]] * 2),
        (both, [[Tensor, Tensor]] * 2),
    ):
        seen.clear()
        quantize(tiny_pipe(), recipe, steps=3, run=Run(max_memory=limit))
        assert seen == expected, limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_rows_on_disk_are_the_rows(dtype: torch.dtype, tmp_path: Path) -> None:
    parts = [torch.randn(n, 3, 5, generator=torch.Generator().manual_seed(n)).mul(9).to(dtype) for n in (4, 4, 1)]
    disk, memory = Column(tmp_path), Column(None)
    for part in parts:
        disk.add(part.mT.contiguous().mT, len(part))  # strides do not matter
        memory.add(part, len(part))
    rows, expected = disk.joined(), memory.joined()
    assert isinstance(rows, RowsOnDisk)
    assert (rows.shape, rows.bytes) == ((9, 3, 5), expected.numel() * expected.element_size())
    chosen = torch.tensor([8, 0, 0, 3])
    rows.expect(chosen)
    for _ in range(2):
        assert torch.equal(rows[chosen], expected[chosen])
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("folder", [True, False])
def test_what_is_not_one_row_a_sample_is_kept_once(folder: bool, tmp_path: Path) -> None:
    where = tmp_path if folder else None
    shared, mask, none = Column(where), Column(where), Column(where)
    table = torch.arange(12).reshape(4, 3)
    for rows in (4, 2):  # four entries look like four samples, until there are two samples
        shared.add(table, rows)
        mask.add(torch.tensor(3.0), rows)
        none.add(None, rows)
    assert shared.joined() is table
    assert float(mask.joined()) == 3.0
    assert none.joined() is None


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stepquant.calibrate.spilled.save_file", full)
    with pytest.raises(OSError, match=r"trajectory-00000.safetensors"):
        quantize(tiny_pipe(), recipe_of(), steps=3, run=Run(max_memory=0, work=tmp_path / "work"))


def test_a_unit_that_does_not_run_is_named() -> None:
    net: Any = tiny_pipe().denoiser
    net.idle = torch.nn.Linear(1, 1)
    call: Any = ((torch.zeros(1, 2, 4, 4), torch.tensor(1.0)), {})
    with pytest.raises(CalibrationError, match="idle did not run"):
        list(reconstruct._captured(net, ["conv", "idle"], [(0, call)], True))
    assert not net.conv._forward_hooks
