"""The temporal block: found, and run by itself, against whole calls of the network; its loss; ranges of every step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tiny
import tiny_dit
import tiny_pipelines
from stepquant.calibrate.ranges import SAMPLE_MARGIN
from stepquant.calibrate.stages import FitWeightRanges, Place, Select
from stepquant.calibrate.temporal_block import (
    FitStepRanges,
    RoundOtherBlocks,
    RoundTemporalBlock,
    settled,
    temporal_layers,
    trace,
)
from stepquant.calibrate.trajectory import record, seal
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.layer import QuantizedLayer
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.surgery import quantizable, quantized_layers
from stepquant.recipe import Job
from stepquant.run import Run

STEPS = 4


def job_of(pipe: Any, denoiser: nn.Module, *, samples: int = 2, batch: int = 2, **place: Any) -> Job:
    """Recorded, placed and rounded to nearest."""
    recorded = record(pipe, denoiser, seeds=range(samples), steps=STEPS, batch_size=batch, run=Run())
    job = Job(pipe, denoiser, copy.deepcopy(denoiser), Run(), STEPS)
    job.handed["trajectories"] = [seal(trajectory) for trajectory in recorded]
    for stage in (Select(), Place(**place), FitWeightRanges("minmax")):
        stage.run(job)
    return job


def unet_job(**options: Any) -> Job:
    unet = tiny.tiny_unet()
    return job_of(DenoiserPipeline(unet, DDIMScheduler(), (1, 8, 8)), unet, **options)


@contextmanager
def outputs_of(network: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """The output of each layer in the calls that follow."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda _m, _a, output: found.__setitem__(name, output.detach())

    handles = [network.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def linear(network: nn.Module) -> list[str]:
    return [name for name, layer in quantizable(network).items() if isinstance(layer, nn.Linear)]


def by_perturbation(network: nn.Module, call: Any, at: str) -> set[str]:
    """Linear layers whose input changes with the timestep and not with the sample: the definition."""

    def inputs_of(sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        handles = [
            network.get_submodule(name).register_forward_pre_hook(lambda _m, a, n=name: found.__setitem__(n, a[0]))
            for name in linear(network)
        ]
        args, kwargs = (sample, *call.args[1:]), dict(call.kwargs)
        if at in kwargs:
            kwargs[at] = timestep
        else:
            args = (sample, timestep, *call.args[2:])
        with torch.no_grad():
            network(*args, **kwargs)
        for handle in handles:
            handle.remove()
        return found

    sample, time = call.args[0], torch.tensor(500)
    first, other = inputs_of(sample, time), inputs_of(sample.flip(-1) + 1, time)
    later = inputs_of(sample, torch.tensor(20))
    return {
        name for name in first if torch.equal(first[name], other[name]) and not torch.equal(first[name], later[name])
    }


def test_a_unets_block_is_the_embedding_and_all_projections() -> None:
    job = unet_job()
    names = temporal_layers(job)
    call = job.handed["trajectories"][0].steps[0].calls[0]
    assert set(names) == by_perturbation(job.full_precision, call, "timestep")
    assert names[:2] == ["time_embedding.linear_1", "time_embedding.linear_2"]
    projections = [name for name in quantizable(job.full_precision) if name.endswith("time_emb_proj")]
    assert sorted(names[2:]) == sorted(projections)
    block = trace(job.full_precision, names, call.args, call.kwargs, ("timestep", 1))
    assert [name for name, _ in block.targets] == names[2:]  # the embedding's own outputs are not compared


def test_a_transformers_block_has_its_modulations() -> None:
    dit = tiny_dit.TinyDiT()
    sample = torch.randn(2, 2, 4, 4)
    names = linear(dit)
    block = trace(dit, names, (sample, torch.tensor(10)), {}, ("timestep", 1))
    modulations = [name for name in names if name.endswith("norm1.linear")]
    assert set(modulations) < set(block.layers)
    assert {name for name, _ in block.targets} >= set(modulations)
    assert not any("attn" in name or ".ff." in name for name in block.layers)


def test_text_and_its_projections_are_no_part_of_it() -> None:
    unet = tiny_pipelines.text_unet()
    call = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }
    block = trace(unet, linear(unet), (), call, ("timestep", 1))
    assert not any("attn" in name for name in block.layers)
    assert any(name.endswith("time_emb_proj") for name in block.layers)


class Labelled(nn.Module):
    """A label's embedding is added to that of the time between two layers, and a projection is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(2, 6)
        self.second = nn.Linear(6, 6)
        self.projection = nn.Linear(6, 4)
        self.label = nn.Linear(3, 6)
        self.outer = nn.Conv2d(4, 4, 1)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        t = timestep.reshape(-1, 1).to(sample.dtype) / 1000
        hidden = self.second(torch.tanh(self.first(torch.cat([t, t.square()], 1))))
        hidden = hidden + self.label(label)
        one, two = (hidden * 2).chunk(2, 1)
        mixed = torch.cat([two, one], 1)
        y = self.outer(sample + self.projection(mixed)[..., None, None])
        return y * self.projection(torch.relu(mixed))[..., None, None]


def test_running_the_block_is_running_the_network() -> None:
    net, other = Labelled(), Labelled()
    other.load_state_dict({name: value + 0.1 for name, value in net.state_dict().items()})
    other.label.load_state_dict(net.label.state_dict())  # no part of the block: labels keep their embedding
    call = (torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999]), torch.randn(3, 3))
    names = ["first", "second", "projection", "label"]
    block = trace(net, names, call, {}, ("timestep", 1))
    assert block.layers == ("first", "second", "projection")
    assert [name for name, _ in block.targets] == ["projection", "projection"]
    for network, found in (
        (net, [wanted for _, wanted in block.targets]),
        (other, block.run(dict(other.named_modules()))),
    ):
        seen: list[Tensor] = []
        handle = network.projection.register_forward_hook(lambda _m, _a, y, s=seen: s.append(y))
        network(*call)
        handle.remove()
        assert all(torch.equal(a, b) for a, b in zip(found, seen, strict=True))


def test_the_gradient_through_the_block_is_that_through_the_network() -> None:
    net = Labelled().double()
    call = (torch.randn(3, 4, 2, 2).double(), torch.tensor([0, 500, 999]), torch.randn(3, 3).double())
    block = trace(net, ["first", "second", "projection"], call, {}, ("timestep", 1))
    pushes = [torch.randn_like(wanted) for _, wanted in block.targets]
    parameters = [p for n, p in net.named_parameters() if n.split(".")[0] in ("first", "second", "projection")]
    seen: list[Tensor] = []
    handle = net.projection.register_forward_hook(lambda _m, _a, y: seen.append(y))
    net(*call)
    handle.remove()
    found = block.run(dict(net.named_modules()))
    one, two = (
        torch.autograd.grad(sum((y * push).sum() for y, push in zip(ys, pushes, strict=True)), parameters)
        for ys in (found, seen)
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


def test_the_block_is_rounded_for_its_outputs_and_nothing_else_changes() -> None:
    job = unet_job(weights=3)
    names = temporal_layers(job)
    before = {name: layer.weight.clone() for name, layer in weighted(job).items()}
    figures = RoundTemporalBlock(iterations=100, batch=4, lr=3e-2, round_weight=1e-4).run(job)
    assert figures["layers"] == names
    assert figures["losses"]["after"] < 0.8 * figures["losses"]["before"]
    after = weighted(job)
    changed = [name for name in before if not torch.equal(before[name], after[name].weight)]
    assert changed
    assert set(changed) <= set(names)
    # The loss is that of whole calls of the network: the projections of all four timesteps.
    outputs = [name for name in names if name.endswith("time_emb_proj")]
    total = 0.0
    for step in job.handed["trajectories"][0].steps:
        call = step.calls[0]
        found: list[dict[str, Tensor]] = []
        for network in (job.denoiser, job.full_precision):
            with outputs_of(network, outputs) as seen, torch.no_grad():
                network(*call.args, **call.kwargs)
            found.append(dict(seen))
        total += sum(float((found[0][n] - found[1][n]).square().sum(1).mean()) for n in outputs)
    assert figures["losses"]["after"] == pytest.approx(total / STEPS, rel=1e-4)


def weighted(job: Job) -> dict[str, QuantizedLayer]:
    return {name: x for name, x in quantized_layers(job.denoiser).items() if isinstance(x, QuantizedLayer)}


def test_the_other_blocks_leave_it_alone() -> None:
    job = unet_job(weights=3)
    names = temporal_layers(job)
    before = {name: layer.weight.clone() for name, layer in weighted(job).items()}
    figures = RoundOtherBlocks(iterations=5, batch=4, lr=1e-1, together=4).run(job)
    assert figures["settled"] == names
    after = weighted(job)
    assert all(torch.equal(before[name], after[name].weight) for name in names)
    assert any(not torch.equal(before[name], after[name].weight) for name in before if name not in names)
    assert all(after[name].weight_quantizer is not None and after[name].on_grid for name in names)


def test_only_hardened_weights_are_settled() -> None:
    job = unet_job()
    layer = weighted(job)["time_embedding.linear_1"]
    layer.on_grid = False
    with (
        pytest.raises(CalibrationError, match=r"time_embedding\.linear_1 is not on its grid"),
        settled(job.denoiser, ["time_embedding.linear_1"]),
    ):
        pass


@pytest.mark.parametrize("rule", ["ema", "minmax"])
def test_ranges_of_every_step_by_hand(rule: Any) -> None:
    job = unet_job(samples=6, batch=2, weights=8, activations=8, ends="same")
    name = "down_blocks.0.resnets.0.conv1"
    inputs: dict[int, list[tuple[float, float]]] = {}
    layer = weighted(job)[name]
    for trajectory in job.handed["trajectories"]:
        for step in trajectory.steps:
            handle = layer.register_forward_pre_hook(
                lambda _m, a, k=step.index: inputs.setdefault(k, []).append((float(a[0].min()), float(a[0].max())))
            )
            with torch.no_grad():
                job.denoiser(*step.calls[0].args, **step.calls[0].kwargs)
            handle.remove()
    FitStepRanges(rule=rule).run(job)
    quantizer: Any = layer.input_quantizer
    assert quantizer.rows == STEPS
    for index, step in enumerate(job.handed["trajectories"][0].steps):
        first, *others = inputs[index]
        low, high = first
        for a, b in others:
            if rule == "ema":
                low, high = 0.95 * low + 0.05 * a, 0.95 * high + 0.05 * b
            else:
                low, high = min(low, a), max(high, b)
        quantizer.clock.set(torch.as_tensor(step.timestep))
        assert float(quantizer.current(torch.zeros(1)).scale) == pytest.approx((high - low) / 255, rel=1e-5)
    reader: Any = weighted(job)["conv_in"].input_quantizer
    samples = torch.cat([trajectory.steps[0].calls[0].args[0] for trajectory in job.handed["trajectories"]])
    noise = (samples.max() - samples.min()) * (1 + SAMPLE_MARGIN) / 255
    reader.clock.set(torch.as_tensor(job.handed["trajectories"][0].steps[0].timestep))
    assert float(reader.current(torch.zeros(1)).scale) == pytest.approx(float(noise), rel=1e-5)


def test_ranges_of_the_temporal_block_alone() -> None:
    job = unet_job(samples=4)
    FitStepRanges(layers="temporal", rule="mse").run(job)
    names = temporal_layers(job)
    rows = {name: layer.input_quantizer for name, layer in weighted(job).items()}
    assert all((quantizer is not None) == (name in names) for name, quantizer in rows.items())
    assert {quantizer.rows for quantizer in rows.values() if quantizer is not None} == {STEPS}  # type: ignore[union-attr]


def test_settings_are_checked() -> None:
    with pytest.raises(SpecError, match="layers must be one of temporal, all, found 'time'"):
        FitStepRanges(layers="time")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="rule must be one of ema, minmax, mse"):
        FitStepRanges(rule="max")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="at least one sample"):
        FitStepRanges(samples=0)
    with pytest.raises(SpecError, match="images of RoundTemporalBlock"):
        RoundTemporalBlock(images=0)
    with pytest.raises(SpecError, match="keep_rounding must be from 0 to 1"):
        RoundTemporalBlock(keep_rounding=2)
