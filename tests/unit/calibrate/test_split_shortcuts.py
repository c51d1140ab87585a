"""Split shortcuts: where they are found, what they compute, and that everything behind knows them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from stepquant.calibrate.split_shortcuts import LEAST_GROUP, SplitShortcuts, shortcut_splits
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, LayerRule, Place, Record, Select
from stepquant.checkpoint import load_checkpoint, save_checkpoint
from stepquant.engines.base import choose
from stepquant.errors import CheckpointError, SpecError
from stepquant.inspection import inspect_checkpoint
from stepquant.model.assembly import assemble_, describe
from stepquant.model.clock import StepClock
from stepquant.model.layer import QuantizedLayer, geometry_of
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import quantizable, quantized_layers
from stepquant.numerics.affine import QParams, choose_qparams, fake_quantize
from stepquant.numerics.spec import QuantSpec
from stepquant.recipe import Job
from stepquant.run import Run
from stepquant.storage import write_summed
from tiny import quantize_, tiny_unet

STEPS = 3
SHORTCUTS = {
    # Decoder blocks of (8, 16) channels: hidden state beside skip connection.
    "up_blocks.0.resnets.0.conv_shortcut": (16, 16),
    "up_blocks.0.resnets.1.conv_shortcut": (16, 8),
    "up_blocks.1.resnets.0.conv_shortcut": (16, 8),
    "up_blocks.1.resnets.1.conv_shortcut": (8, 8),
}


def job_of(**options: Any) -> Job:
    unet = tiny_unet()
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    job = Job(pipe, unet, copy.deepcopy(unet).requires_grad_(False), Run(), STEPS)
    for stage in (Record(samples=2, batch=2), Select(), Place(**options)):
        stage.run(job)
    return job


def finished(**options: Any) -> Job:
    job = job_of(**options)
    for stage in (SplitShortcuts(), FitWeightRanges(), FitInputRanges()):
        stage.run(job)
    return job


def test_shortcuts_of_the_decoder_are_found_in_one_call() -> None:
    unet = tiny_unet()
    calls: list[int] = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    found = shortcut_splits(unet, list(quantizable(unet)), (torch.randn(1, 1, 8, 8), 10), {})
    assert found == {name: parts[0] for name, parts in SHORTCUTS.items()}
    assert calls == [1]
    for name, (hidden, skip) in SHORTCUTS.items():
        assert unet.get_submodule(name).in_channels == hidden + skip
    # The encoder's shortcut, from 8 to 16 channels, reads one tensor.
    assert "down_blocks.1.resnets.0.conv_shortcut" in dict(unet.named_modules())


def test_networks_with_prompts_and_resampling_in_their_blocks() -> None:
    """Concatenations pass through the resampling of a block before its shortcut."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    text = torch.randn(1, 3, 8)
    found = shortcut_splits(unet, list(quantizable(unet)), (torch.randn(1, 2, 8, 8), 10, text), {})
    assert {name: (at, unet.get_submodule(name).in_channels - at) for name, at in found.items()} == SHORTCUTS
    up = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    ).eval()
    found = shortcut_splits(up, list(quantizable(up)), (torch.randn(1, 1, 8, 8), 10), {})
    assert found == {name: parts[0] for name, parts in SHORTCUTS.items()}


class Joins(nn.Module):
    """Concatenations that are split, and others that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.moved, self.resized = (nn.Conv2d(5, 4, 1) for _ in range(3))
        self.three, self.other_axis, self.changed, self.plain, self.twice = (nn.Conv2d(5, 4, 1) for _ in range(5))
        self.wide = nn.Conv2d(5, 4, 3, padding=1)
        self.line = nn.Linear(5, 4)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        a, b = sample[:, :2], sample[:, 2:]
        joined = torch.concat(tensors=(a, b), dim=-3)
        y = self.two(joined) + self.moved(torch.cat([a, b], 1).contiguous().to(torch.float32))
        resized = torch.nn.functional.interpolate(torch.cat([b, a], dim=1), scale_factor=2.0)
        y = y + self.resized(resized)[..., ::2, ::2] + self.wide(joined) + self.changed(joined * 2)
        y = y + self.three(torch.cat([a, b[:, :1], b[:, 1:]], 1)) + self.plain(sample)
        y = y + self.other_axis(torch.cat([sample, sample], 2))[:, :, : y.shape[2]]
        y = y + self.line(torch.cat([a, b], 1).movedim(1, -1)).movedim(-1, 1)
        return y + self.twice(joined) + self.twice(torch.cat([b, a], 1))


def test_only_pointwise_convolutions_that_read_two_parts_are_split() -> None:
    found = shortcut_splits(Joins(), list(quantizable(Joins())), (torch.randn(1, 5, 4, 4), 0), {})
    assert found == {"two": 2, "moved": 2, "resized": 3}


@pytest.mark.parametrize(("kind", "shape"), [(nn.Conv2d, (2, 5, 3, 3)), (nn.Conv1d, (2, 5, 7))])
def test_the_two_parts_are_rounded_by_themselves(kind: Any, shape: tuple[int, ...]) -> None:
    """Against two partial convolutions, each with its own quantizer."""
    torch.manual_seed(0)
    conv = kind(5, 4, 1).requires_grad_(False)
    clock = StepClock(torch.empty(0))
    layer = QuantizedLayer(geometry_of(conv), conv.weight.detach(), conv.bias.detach())
    layer.split_input_(2)
    specs = QuantSpec(4), QuantSpec(3)
    x = torch.randn(shape)
    x[:, 2:] *= 20
    parts = zip((x[:, :2], x[:, 2:]), specs, strict=True)
    params = [choose_qparams(part.min(), part.max(), spec) for part, spec in parts]
    layer.input_quantizer = InputQuantizer(specs[0], clock, params[0])
    layer.second_quantizer = InputQuantizer(specs[1], clock, params[1])
    operate: Callable[..., Tensor] = torch.nn.functional.conv2d if x.ndim == 4 else torch.nn.functional.conv1d
    expected = operate(fake_quantize(x[:, :2], params[0], specs[0]), conv.weight[:, :2], conv.bias)
    expected = expected + operate(fake_quantize(x[:, 2:], params[1], specs[1]), conv.weight[:, 2:])
    torch.testing.assert_close(layer(x), expected)
    # One quantizer for both has steps of the wide part: the narrow part is lost.
    layer.split, layer.second_quantizer = None, None
    both = choose_qparams(x.min(), x.max(), specs[0])
    layer.input_quantizer = InputQuantizer(specs[0], clock, both)
    assert float((layer(x) - expected).abs().max()) > 1e-2


def test_ranges_rounding_and_scales_are_of_each_part() -> None:
    job = job_of(weights=4, activations=8)
    figures = SplitShortcuts().run(job)
    assert figures["splits"] == {name: parts[0] for name, parts in SHORTCUTS.items()}
    assert figures["evaluations"] == 2
    for stage in (FitWeightRanges("minmax"), FitInputRanges("minmax")):
        stage.run(job)
    layers = quantized_layers(job.denoiser)
    seen: dict[str, list[Tensor]] = {}
    handles = [
        job.denoiser.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen.setdefault(name, []).append(args[0])
        )
        for name in SHORTCUTS
    ]
    with torch.no_grad():
        for step in job.handed["trajectories"][0].steps:
            for call in step.calls:
                job.denoiser(*call.args, **call.kwargs)
    for handle in handles:
        handle.remove()
    for name, (hidden, skip) in SHORTCUTS.items():
        layer: Any = layers[name]
        assert job.handed["plan"][name].second == job.handed["plan"][name].input
        assert (layer.split, layer.in_features) == (hidden, hidden + skip)
        parts = torch.cat(seen[name]).split([hidden, skip], 1)
        for quantizer, part in zip((layer.input_quantizer, layer.second_quantizer), parts, strict=True):
            # Ranges were observed behind the same weights, but with activations in full precision.
            low = (quantizer.spec.qmin - quantizer.zero_point) * quantizer.scale
            high = (quantizer.spec.qmax - quantizer.zero_point) * quantizer.scale
            torch.testing.assert_close(high - low, (part.max() - part.min()).reshape(1), rtol=0.1, atol=0)
        # No group of weights has channels of both parts.
        groups = layer.weight_quantizer.scale.shape[1]
        assert groups > 1
        assert hidden % ((hidden + skip) // groups) == 0


def test_groups_that_were_asked_for_do_not_straddle_the_two_parts() -> None:
    """12 divides the 24 channels of a shortcut, of which 16 are hidden state."""
    name = "up_blocks.0.resnets.1.conv_shortcut"
    for asked, expected in ((12, 8), (8, 8), (4, 4)):
        job = job_of()
        scheme = job.handed["plan"][name]
        job.handed["plan"][name] = replace(scheme, weight=replace(scheme.weight, granularity="group", group_size=asked))
        SplitShortcuts().run(job)
        assert job.handed["plan"][name].weight.group_size == expected


def test_weights_may_stay_whole() -> None:
    job = job_of()
    SplitShortcuts(weights=False).run(job)
    assert {job.handed["plan"][name].weight.granularity for name in SHORTCUTS} == {"channel"}

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(2, 9, 3, padding=1)
            self.joined = nn.Conv2d(16, 2, 1)
            self.last = nn.Conv2d(2, 2, 1)

        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            hidden = self.first(sample)
            result: Tensor = self.last(self.joined(torch.cat([hidden, hidden[:, :7]], 1)))
            return result

    net = Odd()
    job = Job(DenoiserPipeline(net, DDIMScheduler(), (2, 4, 4)), net, copy.deepcopy(net), Run(), 2)
    for stage in (Record(samples=1, batch=1), Select(), Place(ends="same")):
        stage.run(job)
    figures = SplitShortcuts().run(job)
    assert (figures["splits"], figures["weights_left_whole"]) == ({"joined": 9}, ["joined"])
    assert job.handed["plan"]["joined"].weight.granularity == "channel"
    assert LEAST_GROUP > 1


def test_what_is_not_quantized_is_not_split() -> None:
    job = job_of(rules=(LayerRule("up_blocks.0.*", 4, None),))
    assert list(SplitShortcuts().run(job)["splits"]) == [name for name in SHORTCUTS if name.startswith("up_blocks.1")]


def test_a_checkpoint_keeps_them_and_engines_say_no(tmp_path: Path) -> None:
    job = finished()
    save_checkpoint(
        tmp_path / "q", pipe=job.pipe, denoiser_name="unet", denoiser=job.denoiser, base_model="", created=""
    )
    loaded, manifest = load_checkpoint(tmp_path / "q")
    assert manifest.format_version == 2
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.unet(x, 100).sample, job.denoiser(x, 100).sample)
    told = {layer["name"]: layer for layer in inspect_checkpoint(tmp_path / "q")["layers"]}
    for name in SHORTCUTS:
        layer: Any = loaded.unet.get_submodule(name)
        assert layer.split == SHORTCUTS[name][0]
        refusals = choose(layer, torch.device("cpu")).refusals
        assert "one for each part of a concatenation" in refusals["reference"]
        assert {"int_mm", "onednn", "openvino", "reference", "weight_only"} <= set(refusals)
        assert told[name]["bits"] == {"weight": 4, "input": 8, "second": 8}
        assert told[name]["additions"] == ["an input in two parts"]
        # The activation alone is reason enough.
        layer.weight_quantizer.scale = layer.weight_quantizer.scale[:, :1]
        layer.weight_quantizer.spec = QuantSpec(4, "channel")
        for engine in ("int_mm", "openvino"):
            assert "one for each part" in choose(layer, torch.device("cpu")).refusals[engine]


def test_graphs_hold_them_as_simulated_arithmetic() -> None:
    """Exported and run by OpenVINO, with one table of parameters for each part."""
    from stepquant.engines import openvino as engine_module
    from stepquant.engines.base import place

    if not engine_module.has_vnni():
        pytest.skip("int8 layers need a processor with VNNI")

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shortcut = nn.Conv2d(5, 4, 1)

        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            result: Tensor = self.shortcut(torch.cat([sample[:, :2], 20 * sample[:, 2:]], 1))
            return result

    torch.manual_seed(0)
    net = quantize_(Joined(), ends="same")
    net.shortcut.split_input_(2)
    own = net.shortcut.input_quantizer
    wide = QParams(20 * own.scale, own.zero_point)
    net.shortcut.second_quantizer = InputQuantizer(own.spec, own.clock, wide, own.row_of_bin)
    placed, where = place(net, "openvino")
    assert "one for each part" in where["shortcut"].refusals["openvino"]
    x, timesteps = torch.randn(3, 5, 4, 4), torch.tensor([0, 300, 999])
    with torch.no_grad():
        expected = net(x, timesteps)
        torch.testing.assert_close(placed(x, timesteps), expected, rtol=1e-4, atol=1e-4)
        net.shortcut.second_quantizer = own
        assert float((net(x, timesteps) - expected).abs().max()) > 1


def test_half_finished_models_with_splits_are_rebuilt() -> None:
    """Work folders store a model right after its layers were split, without any quantizer."""
    job = job_of()
    SplitShortcuts().run(job)
    again = tiny_unet()
    assemble_(again, describe(job.denoiser))
    assert describe(again) == describe(job.denoiser)
    assert again.get_submodule(next(iter(SHORTCUTS))).split == 16


DAMAGE: dict[str, tuple[Any, str]] = {
    "at nothing": (0, "cannot be split at channel 0"),
    "at the end": (32, "cannot be split at channel 32"),
    "negative": (-1, "cannot be split at channel -1"),
    "text": ("8", "split"),
    "true": (True, "split"),
    "gone": (None, "has one input, but its scheme has two"),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    job, folder = finished(), tmp_path_factory.mktemp("split") / "q"
    save_checkpoint(folder, pipe=job.pipe, denoiser_name="unet", denoiser=job.denoiser, base_model="", created="")
    return folder


def edited(pristine: Path, folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    shutil.copytree(pristine, folder)
    data = json.loads((folder / "stepquant.json").read_text())
    change(data["layers"])
    write_summed(folder / "stepquant.json", json.dumps(data))
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_splits_are_refused(damage: str, pristine: Path, tmp_path: Path) -> None:
    value, message = DAMAGE[damage]

    def change(layers: list[dict[str, Any]]) -> None:
        group = next(group for group in layers if "up_blocks.0.resnets.0.conv_shortcut" in group["layers"])
        group["split"] = value

    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(edited(pristine, tmp_path / "q", change))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("time_embedding.linear_1", "Only the input of a convolution without groups"),
        ("mid_block.attentions.0.processor.scores", "is a matmul, which has two operands"),
    ],
)
def test_layers_that_have_no_parts(layer: str, message: str, pristine: Path, tmp_path: Path) -> None:
    def change(layers: list[dict[str, Any]]) -> None:
        next(group for group in layers if layer in group["layers"])["split"] = 2

    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(edited(pristine, tmp_path / "q", change))


def test_grouped_convolutions_are_not_split() -> None:
    conv = nn.Conv2d(4, 4, 1, groups=2)
    layer = QuantizedLayer(geometry_of(conv), conv.weight.detach(), None)
    with pytest.raises(SpecError, match="without groups"):
        layer.split_input_(2)
