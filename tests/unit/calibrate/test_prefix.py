"""Units that are final are not run again, and what is captured behind them is the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, SD3Transformer2DModel
from torch import Tensor, nn

from stepquant.api import estimate, quantize
from stepquant.calibrate import reconstruct
from stepquant.calibrate.prefix import Flow, Prefix, _Kept, flow_of, most_kept
from stepquant.calibrate.qdrop import QDrop
from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
from stepquant.model.surgery import quantizable, units_of
from stepquant.recipe import Recipe
from stepquant.run import Run
from tiny import tiny_unet

STAGES: dict[str, RoundBlocks | ScaleBlocks] = {
    "round": RoundBlocks(iterations=3, batch=4, lr=0.3, together=2),
    "both inputs": RoundBlocks(iterations=3, batch=4, lr=0.3, qdrop=QDrop(), layer_weight=0.1),
    "full-precision prefix": RoundBlocks(iterations=3, batch=4, lr=0.3, quantized_prefix=False),
    "scale": ScaleBlocks(iterations=3, batch=4, together=2),
}
STEPS = 3


def pipe_of(net: Any) -> Any:
    pipe = DDIMPipeline(net, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def recipe_of(stage: Any) -> Recipe:
    begin = (Record(8, 4), Select(), Place(3, 6), FitWeightRanges("minmax"), FitInputRanges("minmax"))
    return Recipe("test", (*begin, stage))


@pytest.mark.parametrize("name", STAGES)
def test_results_are_those_of_running_everything_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> dict[str, Tensor]:
        state: dict[str, Tensor] = quantize(
            pipe_of(tiny_unet()), recipe_of(STAGES[name]), steps=STEPS
        ).pipe.unet.state_dict()
        return state

    kept = made()
    monkeypatch.setattr(reconstruct._Prefixes, "of", classmethod(lambda _cls, _job, _units: nullcontext()))
    again = made()
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[key], again[key]) for key in kept)


def test_every_unit_runs_once_a_batch_and_network(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: Counter[tuple[bool, str]] = Counter()
    ready = Prefix.ready

    def counted(self: Prefix, number: int, wanted: Any, args: Any, kwargs: Any) -> Any:
        if self._flow is None:  # after the call that follows the flow
            self._flow = flow_of(self._network, self._order, args, kwargs)
            for unit in self._order:
                hook: Any = lambda *_, key=(self._fixed, unit): runs.update([key])  # noqa: E731
                if "resnets" in unit:
                    self._network.get_submodule(f"{unit}.conv1").register_forward_hook(hook)
        return ready(self, number, wanted, args, kwargs)

    monkeypatch.setattr(Prefix, "ready", counted)
    monkeypatch.setattr(reconstruct, "fit_unit", lambda *_, **__: {})
    quantize(pipe_of(tiny_unet()), recipe_of(STAGES["round"]), steps=STEPS)
    assert {fixed for fixed, _ in runs} == {True, False}
    plain = [count for (fixed, _), count in runs.items() if fixed]
    assert set(plain) == {2 * STEPS}  # batches
    # The last ones of the quantized network are captured, and nothing behind them is.
    assert max(count for (fixed, _), count in runs.items() if not fixed) == 2 * STEPS


def test_with_little_memory_outputs_are_files_that_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[int] = []
    fit = reconstruct.fit_unit

    def counted(job: Any, *args: Any, **options: Any) -> Any:
        files.append(len(list(job.spill.folder.rglob("stepquant-outputs-*/*.raw"))))
        return fit(job, *args, **options)

    recipe = recipe_of(STAGES["round"])
    expected = quantize(pipe_of(tiny_unet()), recipe, steps=STEPS).pipe.unet.state_dict()
    monkeypatch.setattr(reconstruct, "fit_unit", counted)
    run = Run(max_memory=0, work=tmp_path / "work")
    found = quantize(pipe_of(tiny_unet()), recipe, steps=STEPS, run=run).pipe.unet.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert max(files) > 0
    assert files[-1] < max(files)
    assert not list(tmp_path.rglob("*.raw"))


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, 4).transpose(1, 2),
        torch.randn(3, 1).expand(3, 5),
        torch.randn(8)[2:],
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(3).half(),
        torch.empty(0, 3),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}",
)
def test_tensors_come_back_as_they_were(tensor: Tensor, on_disk: bool, tmp_path: Path) -> None:
    kept = _Kept.of(tensor, tmp_path / "0.raw" if on_disk else None)
    found, again = kept.fetched(), kept.fetched()
    assert torch.equal(found, tensor)
    assert found.dtype == tensor.dtype
    assert found.stride() == tensor.to("cpu", copy=True).stride()
    assert found.data_ptr() != again.data_ptr() or not tensor.numel()
    assert kept.bytes == tensor.numel() * tensor.element_size()
    empty = kept.dropped()
    assert empty.bytes == 0
    assert torch.equal(empty.fetched(), torch.zeros_like(tensor))
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_written_name_the_place(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        _Kept.of(torch.ones(3), tmp_path / "gone" / "0.raw")


@pytest.mark.parametrize("name", STAGES)
def test_no_more_is_kept_than_estimated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, list[int]] = {}
    ready, made = Prefix.ready, []

    def measured(self: Prefix, number: int, wanted: Any, args: Any, kwargs: Any) -> Any:
        made.append(self)  # so that no other has its id
        kept.setdefault(id(self), []).append(self.bytes)
        return ready(self, number, wanted, args, kwargs)

    monkeypatch.setattr(Prefix, "ready", measured)
    recipe = recipe_of(STAGES[name])
    found = estimate(pipe_of(tiny_unet()), recipe, steps=STEPS)
    assert found is not None
    quantize(pipe_of(tiny_unet()), recipe, steps=STEPS)
    most = sum(max(sizes) for sizes in kept.values())
    assert 0.7 * found.kept < most <= found.kept
    assert found.memory(None) == 2 * found.network + found.recording + found.caches + found.kept
    assert found.disk(10**9) - found.disk(None) == found.kept
    assert found.at_home(None) - found.at_home(0) == found.kept


def test_skips_of_a_unet_are_kept_until_they_are_read() -> None:
    net = tiny_unet()
    order: list[str] = []  # as executed
    handles = [
        net.get_submodule(unit.name).register_forward_hook(lambda *_, name=unit.name: order.append(name))
        for unit in units_of(net, list(quantizable(net)))
    ]
    net(torch.randn(2, 1, 8, 8), torch.tensor(3))
    for handle in handles:
        handle.remove()
    flow = flow_of(net, order, (torch.randn(2, 1, 8, 8), torch.tensor(3)), {})
    assert not flow.bound
    assert not flow.seen
    assert flow.reads["conv_out"] == {"up_blocks.1.resnets.1"}
    assert flow.reads["up_blocks.1.resnets.1"] == {"time_embedding", "up_blocks.1.resnets.0", "conv_in"}
    last = flow.needed(order[order.index("up_blocks.1.resnets.1") :])
    assert last == {"time_embedding", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1", "conv_in"}
    outputs = dict.fromkeys(order, 1)
    assert most_kept(flow, outputs, 1, fixed=False) < len(order) / 1.5


def nowhere() -> Path:
    raise AssertionError("writes files")


@torch.no_grad()
def test_what_does_not_fit_into_memory_is_in_files(tmp_path: Path) -> None:
    net, x = Chain(lambda x: x), torch.ones(2, 4)
    prefix = Prefix(net, ["first", "second"], True, memory=2 * 4 * 4, folder=lambda: tmp_path)
    for number in range(3):
        with prefix.ready(number, ["second"], (x + number,), {}):
            net(x + number)
    assert len(list(tmp_path.iterdir())) == 2
    assert prefix.bytes == 3 * 2 * 4 * 4
    for number in range(3):
        with prefix.ready(number, ["second"], (x + number,), {}):
            assert torch.equal(net.first(x), nn.functional.linear(x + number, net.first.weight, net.first.bias))


class Chain(nn.Module):
    """Two linear layers, and what a test does with the output of the first."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(4, 4), nn.Linear(4, 4), between

    def forward(self, sample: Tensor, timestep: Any = None) -> Tensor:
        found: Tensor = self.second(self.between(self.first(sample)))
        return found


def flow_between(between: Callable[[Tensor], Tensor]) -> Flow:
    return flow_of(Chain(between), ["first", "second"], (torch.ones(2, 4),), {})


def test_what_python_reads_between_units_stays() -> None:
    flow = flow_between(lambda x: x * float(x.sum()))
    assert flow.seen == {"first"}
    assert flow.needed([]) == {"first"}
    assert flow_between(lambda x: x * x.sum()).seen == frozenset()


@torch.no_grad()
def test_a_network_that_cannot_be_watched_is_run_again(caplog: pytest.LogCaptureFixture) -> None:
    def shy(x: Tensor) -> Tensor:
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise NotImplementedError("no rule for this mode")
        return x + 1

    net, x, runs = Chain(shy), torch.ones(2, 4), []
    prefix = Prefix(net, ["first", "second"], True, memory=10**9, folder=nowhere)
    expected = net(x)
    net.first.register_forward_hook(lambda *_: runs.append(1))
    with caplog.at_level("INFO"):
        for _ in range(2):
            with prefix.ready(0, ["second"], (x,), {}):
                assert torch.equal(net(x), expected)
    assert len(runs) == 3  # once to be watched
    assert prefix.bytes == 0
    assert "no rule for this mode" in caplog.text


def test_units_with_effects_or_several_calls_always_run() -> None:
    class Within(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.add_(1))

    class Same(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            super().forward(input)
            return input

    class Thing:
        pass

    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            thing: Any = Thing()
            thing.value = super().forward(input)
            return thing

    class Elsewhere(nn.Linear):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.register_buffer("seen", torch.zeros(2, 4))

        def forward(self, input: Tensor) -> Tensor:
            seen: Any = self.seen
            seen.copy_(input)
            return super().forward(input).relu_()

    for kind in (Within, Same, Elsewhere):
        net = Chain(lambda x: x)
        net.second = kind(4, 4)
        assert flow_of(net, ["first", "second"], (torch.ones(2, 4),), {}).bound == {"second"}
    net = Chain(lambda x: x.value)  # type: ignore[attr-defined]
    net.first = Odd(4, 4)
    assert flow_of(net, ["first", "second"], (torch.ones(2, 4),), {}).bound == {"first"}
    net = Chain(lambda x: x)
    net.second = net.first
    twice = flow_of(net, ["first"], (torch.ones(2, 4),), {})
    assert twice.bound == {"first"}


@torch.no_grad()
def test_an_answer_may_be_written_to_and_the_module_is_put_back() -> None:
    net = Chain(lambda x: x.mul_(2))
    own = net.first.forward
    vars(net.first)["forward"] = lambda x: own(x) + 1  # somebody else's
    theirs = vars(net.first)["forward"]
    prefix, x = Prefix(net, ["first", "second"], False, memory=10**9, folder=nowhere), torch.ones(2, 4)
    expected = net(x)
    for _ in range(3):
        with prefix.ready(0, ["second"], (x,), {}):
            assert torch.equal(net(x), expected)
        assert vars(net.first)["forward"] is theirs
    assert prefix.bytes == 2 * 4 * 4
    assert not net.first._forward_hooks
    # Another batch has outputs of its own.
    with prefix.ready(1, ["second"], (x + 1,), {}):
        assert torch.equal(net(x + 1), net.second(2 * theirs(x + 1)))


def test_joint_blocks_are_kept_whole() -> None:
    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()
    order = [unit.name for unit in units_of(net, list(quantizable(net)))]
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 3, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([500.0, 500.0]),
    }
    blocks = [name for name in order if name.startswith("transformer_blocks")]
    assert len(blocks) == 3
    runs: list[int] = []
    given: list[list[Tensor]] = []
    net.get_submodule(f"{blocks[0]}.ff").register_forward_hook(lambda *_: runs.append(1))
    net.get_submodule(blocks[2]).register_forward_pre_hook(
        lambda _module, _args, kwargs: given.append([kwargs["hidden_states"], kwargs["encoder_hidden_states"]]),
        with_kwargs=True,
    )
    prefix = Prefix(net, order, True, memory=10**9, folder=nowhere)
    for _ in range(2):
        with torch.no_grad(), prefix.ready(0, order[:1], (), call):
            net(**call)
    assert len(runs) == 2  # to follow the flow, and once for what it returns
    assert len(given) == 3
    for found in given[1:]:
        assert all(torch.equal(one, other) for one, other in zip(given[0], found, strict=True))
    assert prefix._flow is not None
    assert blocks[0] in prefix._flow.reads[blocks[1]]
