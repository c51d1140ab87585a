"""Blocks in main memory, brought to the device in turn: the same bits, and never the whole network at once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from typer.testing import CliRunner

from stepquant import api
from stepquant.calibrate import offload
from stepquant.calibrate.offload import blocks_in_turn, brought, is_offloaded, offloaded
from stepquant.calibrate.offloadable import refuse_offload
from stepquant.cli.commands import app
from stepquant.errors import CalibrationError, ModelError, SpecError, UnsupportedPipeline
from stepquant.methods import METHODS, PRESETS
from stepquant.model.families import find_denoiser
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.recipe import Job, Recipe
from stepquant.run import Run
from tiny import TinyNet
from tiny_pipelines import FAMILIES

CPU = torch.device("cpu")
BLOCKS, STEPS = 8, 3


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        self.register_buffer("offset", torch.linspace(-0.1, 0.1, width))

    offset: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = hidden + self.narrow(torch.tanh(self.wide(self.norm(hidden) + self.offset)))
        return found


class Stack(nn.Module):
    """A denoiser of equal blocks, for samples [B, 2, 4, 4]; almost all of it is in blocks."""

    stepquant_blocks = ("Block",)

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(2, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(BLOCKS))
        self.leave = nn.Linear(width, 2)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        moment = torch.as_tensor(timestep, device=sample.device).reshape(-1, 1, 1) / 1000
        hidden = self.enter(sample.flatten(2).mT) + moment.to(sample)
        for block in self.blocks:
            hidden = block(hidden)
        found: Tensor = self.leave(hidden).mT.reshape(sample.shape)
        return found


def bytes_of(*modules: nn.Module) -> int:
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass
class Counted:
    """Bytes of the copies on the device that are alive, by their storages, whoever holds them."""

    known: list[tuple[StorageWeakRef, int]] = field(default_factory=list)
    most: int = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.known = [(alive, size) for alive, size in self.known if not alive.expired()]
        self.known.append((StorageWeakRef(storage), storage.nbytes()))
        self.most = max(self.most, sum(size for _, size in self.known))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    found, copied = Counted(), offload._copied

    def counting(tensor: Tensor, device: torch.device) -> Tensor:
        result = copied(tensor, device)
        if device is not offload.HOME:  # the same device here, and another object
            found.add(result)
        return result

    monkeypatch.setattr(offload, "_copied", counting)
    return found


def gradients(network: nn.Module, sample: Tensor) -> list[Tensor]:
    """Of the sample and of all parameters, for a loss behind two evaluations of the network."""
    sample = sample.clone().requires_grad_(True)
    network.zero_grad(set_to_none=True)
    network(network(sample, 700.0), 300.0).square().sum().backward()
    found = [sample.grad, *(parameter.grad for parameter in network.parameters())]
    assert all(gradient is not None for gradient in found)
    return [gradient.clone() for gradient in found if gradient is not None]


def test_gradients_through_the_whole_network_are_the_same(counted: Counted) -> None:
    network = Stack().double()
    sample = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    expected = gradients(network, sample)
    pipe = DenoiserPipeline(network, DDIMScheduler(), (2, 4, 4))
    with offloaded(pipe, network, CPU):
        found = gradients(network, sample)
        assert all(parameter.grad is not None for parameter in network.blocks.parameters())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # The graph of two evaluations was in memory, its weights were not.
    assert 0 < counted.most <= bytes_of(network.blocks[0])


def test_a_graph_that_kept_the_copies_would_be_counted(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle of the test above can fail."""
    monkeypatch.setattr(offload._InTurn, "_fetching", lambda *_: nullcontext())
    network = Stack()
    with offloaded(DenoiserPipeline(network, DDIMScheduler(), (2, 4, 4)), network, CPU):
        gradients(network, torch.randn(3, 2, 4, 4))
    assert counted.most > bytes_of(network) / 2


def test_tensors_meet_on_one_device() -> None:
    """With fake tensors, for which torch checks devices without having them. Backward would need a real one."""
    device = torch.device("cuda", 0)

    def places(module: nn.Module) -> set[torch.device]:
        return {tensor.device for tensor in (*module.parameters(), *module.buffers())}

    with FakeTensorMode(), torch.no_grad():
        network = Stack()
        for outside in (network.enter, network.leave):
            for name, parameter in [*outside.named_parameters()]:
                setattr(outside, name, nn.Parameter(torch.empty(parameter.shape, device=device)))
        sample = torch.empty(3, 2, 4, 4, device=device)
        with pytest.raises(RuntimeError, match="device"):
            network(sample, 1.0)
        for block in blocks_in_turn(network).values():
            block.forward = offload._InTurn(block, device)
        found = network(sample, torch.empty((), device=device))
        assert found.device == device
        assert places(network.blocks) == {CPU}
        assert places(network.enter) == {device}


def test_what_is_put_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is not there, so that every tensor at home would have to be put there."""
    device, network = torch.device("meta"), Stack()
    put: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(offload, "_put_", lambda tensor, device: put.append((id(tensor), device)))

    def all_of(*modules: nn.Module) -> set[tuple[int, torch.device]]:
        return {(id(tensor), device) for module in modules for tensor in (*module.parameters(), *module.buffers())}

    pipe = DenoiserPipeline(network, DDIMScheduler(), (2, 4, 4))
    pipe.components = {"denoiser": network, "text": (text := nn.Linear(2, 2)), "scheduler": pipe.scheduler}
    with offloaded(pipe, network, device):
        assert {*put} == all_of(network.enter, network.leave, text)
        put.clear()
        with brought(Job(pipe, network, network, Run(offload=device), 1), network.blocks[2].wide):
            assert {*put} == all_of(network.blocks[2].wide)
            put.clear()
        assert {(where, device) for where, _ in put} == all_of(network.blocks[2].wide)
        assert {where for _, where in put} == {CPU}


def test_a_weight_that_changes_under_the_graph_is_an_error() -> None:
    network = Stack()
    with offloaded(DenoiserPipeline(network, DDIMScheduler(), (2, 4, 4)), network, CPU):
        loss = network(torch.randn(1, 2, 4, 4, requires_grad=True), 5.0).sum()
        with torch.no_grad():
            network.blocks[3].wide.weight.mul_(2)
        with pytest.raises(CalibrationError, match="changed between"):
            loss.backward()


def test_a_deep_copy_brings_its_own_blocks() -> None:
    network = Stack()
    sample = torch.randn(1, 2, 4, 4)
    with torch.no_grad(), offloaded(DenoiserPipeline(network, DDIMScheduler(), (2, 4, 4)), network, CPU):
        expected = network(sample, 1.0)
        other = copy.deepcopy(network)
        other.blocks[0].wide.weight.zero_()
        assert torch.equal(network(sample, 1.0), expected)
        assert not torch.equal(other(sample, 1.0), expected)
        assert is_offloaded(other)
        assert not is_offloaded(offload.released_(other))


def test_the_block_with_the_first_parameter_stays() -> None:
    found = blocks_in_turn(nn.Sequential(Stack(), nn.Linear(1, 1)))
    assert found == {}  # the classes are an attribute of the denoiser itself
    assert [*blocks_in_turn(Stack())] == [f"blocks.{number}" for number in range(BLOCKS)]
    alone = Stack()
    del alone.enter
    assert [*blocks_in_turn(alone)] == [f"blocks.{number}" for number in range(1, BLOCKS)]
    alone.stepquant_blocks = ("Linear",)
    assert blocks_in_turn(alone) == {}  # a quantized layer will be put in the place of each


@pytest.mark.parametrize("family", ["ddim", "dit", "sd15", "sdxl", "sd3", "flux", "pixart", "sana", "wan"])
def test_most_of_each_family_is_in_blocks(family: str) -> None:
    pipe = FAMILIES[family].build()
    _, denoiser = find_denoiser(pipe)
    blocks = blocks_in_turn(denoiser)
    assert blocks
    first = next(name for name, _ in denoiser.named_parameters())
    assert not any(first.startswith(f"{name}.") for name in blocks)


# name -> method, its options: each with another way of going through the network
RECIPES: dict[str, Callable[[], Recipe]] = {
    "rtn": lambda: METHODS["rtn"](samples=4, batch=2),
    "layerwise": lambda: METHODS["layerwise"](samples=4, batch=2, together=2),
    "q_diffusion": lambda: METHODS["q_diffusion"](
        samples=4, batch=2, iterations_weights=3, iterations_activations=2, samples_per_step=2
    ),
    "accuquant": lambda: METHODS["accuquant"](samples=4, batch=2, window=2, iterations=3, block_iterations=2, judged=2),
    "cec": lambda: METHODS["cec"](samples=4, batch=2, estimator="regression"),
    "combined": lambda: METHODS["combined"](
        samples=4,
        batch=2,
        balance=True,
        rows="step",
        block_iterations=0,
        scale_iterations=0,
        window=2,
        window_iterations=2,
        learn_weights=False,
        lr_weight_scales=1e-2,
        judged=2,
        estimator="regression",
    ),
}


def pipe_of_blocks() -> DenoiserPipeline:
    return DenoiserPipeline(Stack().eval(), DDIMScheduler(), (2, 4, 4))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def made(recipe: Recipe, run: Run, folder: Path, **options: Any) -> dict[str, bytes]:
    api.quantize(pipe_of_blocks(), recipe, steps=STEPS, run=run, **options).save(folder)
    return files(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_the_checkpoint_has_the_same_bytes(name: str, counted: Counted, tmp_path: Path) -> None:
    recipe = RECIPES[name]()
    expected = made(recipe, Run(), tmp_path / "whole")
    assert counted.most == 0
    assert made(recipe, Run(offload=CPU), tmp_path / "in-turn") == expected
    network = Stack()
    # Two networks; in RoundBlocks a block has rounding variables and levels beside its weights.
    assert 0 < counted.most < bytes_of(network) / 2
    if name in ("rtn", "layerwise", "cec"):
        assert counted.most < 1.5 * bytes_of(network.blocks[0])
    if name == "q_diffusion":
        found = made(recipe, Run(offload=CPU, max_memory=0, work=tmp_path / "work"), tmp_path / "on-disk")
        assert found == expected


def test_the_pipeline_is_as_it_was() -> None:
    pipe = pipe_of_blocks()
    before = copy.deepcopy(pipe.denoiser.state_dict())
    made_of_it = api.quantize(pipe, RECIPES["rtn"](), steps=STEPS, run=Run(offload=CPU))
    for network in (pipe.denoiser, made_of_it.pipe.denoiser):
        assert not is_offloaded(network)
        assert not any("forward" in vars(module) for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.denoiser.state_dict().items())


def test_an_error_leaves_the_pipeline_as_it_was() -> None:
    pipe = pipe_of_blocks()
    with offloaded(pipe, pipe.denoiser, CPU):
        assert is_offloaded(pipe.denoiser)
    with pytest.raises(ZeroDivisionError), offloaded(pipe, pipe.denoiser, CPU):
        raise ZeroDivisionError
    assert not is_offloaded(pipe.denoiser)


@pytest.mark.parametrize(("stage", "before", "after"), [(3, None, CPU), (5, CPU, None), (5, CPU, CPU)])
def test_a_killed_run_goes_on_with_offload_or_without(
    stage: int,
    before: torch.device | None,
    after: torch.device | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counted: Counted,
) -> None:
    recipe = RECIPES["accuquant"]()
    expected = made(recipe, Run(), tmp_path / "whole")

    def finished(number: int, _: Any) -> None:
        if number == stage:
            raise KeyboardInterrupt

    run = Run(work=tmp_path / "work", offload=before, finished=finished)
    with pytest.raises(KeyboardInterrupt):
        api.quantize(pipe_of_blocks(), recipe, steps=STEPS, run=run)
    monkeypatch.setattr(counted, "most", 0)
    again = Run(work=tmp_path / "work", offload=after)
    assert made(recipe, again, tmp_path / "resumed", resume=True) == expected
    assert (counted.most > 0) == (after is not None)


def test_what_cannot_be_offloaded_is_refused_before_the_start() -> None:
    pipe, rtn = pipe_of_blocks(), RECIPES["rtn"]()
    seen: list[Any] = []
    pipe.denoiser.register_forward_hook(lambda *_: seen.append(1))

    def refused(error: type[Exception], text: str, recipe: Recipe = rtn, given: Any = pipe, **options: Any) -> None:
        for call in (api.quantize, api.estimate):
            with pytest.raises(error, match=text):
                call(given, recipe, steps=STEPS, run=Run(offload=CPU, **options))

    refused(SpecError, "one process", processes=SimpleNamespace(count=2))
    refused(SpecError, "AddLowRank of recipe 'svdquant' needs the whole network", METHODS["svdquant"]())
    refused(ModelError, "no blocks", given=DenoiserPipeline(TinyNet().eval(), DDIMScheduler(), (2, 4, 4)))
    moved = pipe_of_blocks()
    moved.denoiser.to("meta")
    with pytest.raises(SpecError, match="begin in main memory"), offloaded(moved, moved.denoiser, CPU):
        pass
    hooked = pipe_of_blocks()
    hooked.denoiser.blocks[0]._hf_hook = object()
    refused(UnsupportedPipeline, "offloaded by diffusers or accelerate", given=hooked)
    if not torch.cuda.is_available():
        with pytest.raises(SpecError, match="cannot be brought to cuda"):
            api.quantize(pipe, rtn, steps=STEPS, run=Run(offload=torch.device("cuda")))
    assert not seen


@pytest.mark.parametrize("name", ["rtn", "layerwise", "q_diffusion", "accuquant", "cec", "combined"])
@pytest.mark.parametrize("preset", ["quick", "standard", "full"])
def test_methods_that_may_be_offloaded(name: str, preset: str) -> None:
    refuse_offload(METHODS[name](**PRESETS[name][preset]), Run(offload=CPU))


def test_without_offload_every_method_may_run() -> None:
    for name in METHODS:
        refuse_offload(METHODS[name](), Run())


def test_the_estimate_counts_what_stays_and_the_largest_block() -> None:
    pipe = pipe_of_blocks()
    found = api.estimate(pipe, RECIPES["rtn"](), steps=STEPS, run=Run(offload=CPU))
    assert found is not None
    assert found.block == bytes_of(pipe.denoiser.blocks[0])
    assert found.outside == bytes_of(pipe.denoiser.enter, pipe.denoiser.leave)
    assert found.network == found.outside + BLOCKS * found.block
    without = replace(found, recording=0, batch=0, caches=0)
    assert without.on_device(None) == without.on_device(0) == 2 * found.outside + found.block
    assert without.memory(None) == 2 * found.network
    assert found.on_device(None) == without.on_device(None) + found.recording


def test_from_the_command_line(tmp_path: Path) -> None:
    common = ["quantize", "digits-dit", "--method", "rtn", "--steps", "2", "--calibration-samples", "2"]
    common += ["--device", "cpu", "--offload"]
    out = tmp_path / "out"
    target = tmp_path / "plan.json"
    invoked = CliRunner().invoke(app, [*common, "-o", str(out), "--dry-run", "--json", str(target)])
    assert invoked.exit_code == 0, invoked.output
    assert "on the device" in invoked.output
    estimate = json.loads(target.read_text())["estimate"]
    assert estimate["memory_bytes"] == 2 * estimate["network_bytes"]
    assert 0 < estimate["device_bytes"] < estimate["network_bytes"]
    assert not out.exists()
    invoked = CliRunner().invoke(app, [*common, "-o", str(out)])
    assert invoked.exit_code == 0, invoked.output
    assert (out / "stepquant.json").is_file()
