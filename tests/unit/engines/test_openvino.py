"""The OpenVINO engine: integers of the checkpoint, layer by layer, and the whole denoiser as a module of a pipeline."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import gc
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from stepquant.checkpoint import save_checkpoint
from stepquant.engines import openvino as engine_module
from stepquant.engines.base import choose, engines, pack_, place
from stepquant.engines.graph import GraphLayer, lower, refusal, tensors_of
from stepquant.engines.openvino import FLOAT_MATMUL, GraphDenoiser, OpenVINOEngine, cache_folder
from stepquant.errors import EngineError, ModelError, SpecError, UnknownEngine
from stepquant.model.clock import StepClock, attach_clock
from stepquant.model.first_token import FirstToken
from stepquant.model.layer import LowRankBranch, Matmul, QuantizedLayer
from stepquant.model.quantizer import DynamicQuantizer, InputQuantizer, LogQuantizer, WeightQuantizer
from stepquant.model.surgery import quantized_layers, swap_layers_
from stepquant.model.transform import InputTransform
from stepquant.numerics.affine import QParams, choose_qparams, range_of
from stepquant.numerics.spec import LayerScheme, QuantSpec, scheme_for
from tiny import quantize_, sampled, small_unet, tiny_unet

pytestmark = pytest.mark.skipif(not engine_module.has_vnni(), reason="int8 layers need a processor with VNNI")

WEIGHT = QuantSpec(4, "channel")


class OneLayer(nn.Module):
    """A denoiser of a single layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        result: Tensor = self.layer(sample)
        return result


class Net(nn.Module):
    """One convolution, one linear layer, for samples `[B, 2, 4, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.out = nn.Linear(4, 2, bias=False)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        hidden = torch.tanh(self.conv(sample)).permute(0, 2, 3, 1)
        result: Tensor = self.out(hidden).permute(0, 3, 1, 2)
        return result


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = Matmul("scores")

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        result: Tensor = self.scores(sample, sample.transpose(-1, -2))
        return result


def table(spec: QuantSpec, rows: int, *, moving: bool = True) -> QParams:
    """Different scales, and different zero points if `moving` (and the spec has any)."""
    top = torch.linspace(1, 3, rows)
    return choose_qparams(-top * (torch.linspace(0.3, 1.5, rows) if moving else 0.5), top, spec)


def one_layer(layer: nn.Module, weight: QuantSpec, source: QuantSpec, rows: int = 1, *, moving: bool = True) -> Any:
    """A quantized, hardened network of one layer, with a clock of five bins."""
    net = OneLayer(layer)
    swap_layers_(net, {"layer": LayerScheme(weight, source)})
    clock = StepClock(torch.tensor([100.0, 200.0, 300.0, 400.0]))
    attach_clock(net, clock)
    quantized = net.layer
    assert isinstance(quantized, QuantizedLayer)
    quantized.weight_quantizer = WeightQuantizer(weight, choose_qparams(*range_of(quantized.weight, weight), weight))
    quantized.input_quantizer = InputQuantizer(
        source, clock, table(source, rows, moving=moving), torch.arange(5) % rows
    )
    quantized.harden_()
    return net.requires_grad_(False).eval()


def integers(net: Any, x: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """The layer by its definition in float64, from integer levels; and the size of its sum without cancellation."""
    layer = net.layer
    quantizer, source = layer.weight_quantizer, layer.input_quantizer
    q = quantizer.levels(layer.weight).double().reshape(len(layer.weight), -1)
    weight = ((q - quantizer.zero_point.reshape(-1, 1)) * quantizer.scale.reshape(-1, 1)).reshape(layer.weight.shape)
    scale, zero_point = source.scale[row].double(), source.zero_point[row].double()
    levels = (torch.round(x.double() / scale) + zero_point).clamp(source.spec.qmin, source.spec.qmax)
    grid = (levels - zero_point) * scale
    bias = None if layer.bias is None else layer.bias.double()
    size = layer.geometry.apply(grid.abs(), weight.abs(), None if bias is None else bias.abs())
    return layer.geometry.apply(grid, weight, bias), size


def off_borders(shape: tuple[int, ...], source: InputQuantizer, row: int) -> Tensor:
    """Random inputs, some out of range, none within float32 rounding of the border between two levels."""
    scale = source.scale[row]
    levels = torch.randint(-300, 300, shape) if source.spec.bits == 8 else torch.randint(-30, 30, shape)
    return (levels + (torch.rand(shape) - 0.5) * 0.9) * scale


LAYERS = {
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 7)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 9)),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, padding="same", groups=2, bias=False), (2, 8, 6, 6)),
    "even": (lambda: nn.Conv2d(4, 4, 4, padding="same", dilation=2), (2, 4, 9, 9)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)),
    "strided pointwise": (lambda: nn.Conv2d(6, 8, 1, stride=2), (2, 6, 7, 8)),
    "linear": (lambda: nn.Linear(12, 7), (2, 5, 12)),
}


def check_layer(net: Any, shape: tuple[int, ...], *, int8: bool = True) -> None:
    compiled = OpenVINOEngine().compile(net)
    assert compiled.refusals == {}
    for timestep, bin_ in ((50, 0), (150, 1), (450, 4)):
        row = int(net.layer.input_quantizer.row_of_bin[bin_])
        x = off_borders(shape, net.layer.input_quantizer, row)
        expected, size = integers(net, x, row)
        with torch.no_grad():
            found, simulated = compiled(x, timestep), net(x, timestep)
        # float32 rounding of scales, products and the shift by a zero point; a wrong level would be some 1e-3.
        assert ((found - expected).abs() <= 4e-6 * size + 1e-6).all()
        assert ((simulated - expected).abs() <= 4e-6 * size + 1e-6).all()
    if int8:
        assert compiled.runtime_precisions()["layer"] in ("u8", "i8")


@pytest.mark.parametrize(("scaled", "block"), [(True, None), (False, 4), (True, 2)])
@pytest.mark.parametrize("kind", ["conv", "strided", "even", "circular", "conv1d", "linear"])
def test_transforms_and_branches_run_around_the_integers(kind: str, scaled: bool, block: int | None) -> None:
    build, shape = LAYERS[kind]
    torch.manual_seed(1)
    net = one_layer(build(), QuantSpec(4, "channel"), QuantSpec(8), rows=3)
    layer = net.layer
    block = None if block is None or layer.in_features % block else block
    scale = torch.linspace(0.5, 3, layer.in_features) if scaled or block is None else None
    layer.input_transform = InputTransform(layer.in_features, layer.geometry.channel_axis, scale=scale, block=block)
    down = 0.3 * torch.randn(2, *layer.weight.shape[1:])
    layer.branch = LowRankBranch(layer.geometry, down, 0.3 * torch.randn(layer.out_features, 2))
    net.requires_grad_(False)
    compiled = OpenVINOEngine().compile(net)
    assert compiled.refusals == {}
    x = torch.randn(shape)
    for timestep in (50, 150, 450):
        with torch.no_grad():
            found, expected = compiled(x, timestep), net(x, timestep)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert compiled.runtime_precisions()["layer"] in ("u8", "i8")


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_compute_the_checkpoints_integers_and_switch_rows(kind: str) -> None:
    build, shape = LAYERS[kind]
    # Rows with their own zero points: the form with most parts.
    check_layer(one_layer(build(), WEIGHT, QuantSpec(8), rows=3), shape, int8=kind != "grouped")


@pytest.mark.parametrize(
    ("weight", "source", "rows", "moving"),
    [
        (QuantSpec(8, "channel"), QuantSpec(8), 1, False),
        (QuantSpec(8, "channel"), QuantSpec(8), 3, True),
        (QuantSpec(8, "channel", symmetric=True), QuantSpec(8, symmetric=True), 1, False),
        (QuantSpec(2, "channel"), QuantSpec(4), 1, False),
        (QuantSpec(3, "tensor", symmetric=True), QuantSpec(4), 3, True),
        (QuantSpec(7, "tensor"), QuantSpec(6, symmetric=True), 3, False),
        (QuantSpec(5, "channel"), QuantSpec(8), 3, False),
        (QuantSpec(6, "group", group_size=54), QuantSpec(8, nonnegative=True), 2, False),
    ],
)
def test_schemes(weight: QuantSpec, source: QuantSpec, rows: int, moving: bool) -> None:
    build, shape = LAYERS["conv"]
    net = one_layer(build(), weight, source, rows, moving=moving)
    check_layer(net, shape)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
def test_runtime_precisions_have_layers_with_and_without_zero_points(kind: str, symmetric: bool, rows: int) -> None:
    build, shape = LAYERS[kind]
    weight, source = QuantSpec(8, "channel", symmetric=True), QuantSpec(8, symmetric=symmetric)
    check_layer(one_layer(build(), weight, source, rows, moving=False), shape)


def test_asymmetric_weights_of_8_bits_take_two_operators_where_they_need_nine_bits() -> None:
    layer = nn.Linear(6, 4, bias=False)
    layer.weight.data[:2] = torch.tensor([-0.1, 0.9, 0.3, 0.0, 0.5, 0.7])  # q - z reaches beyond 127
    layer.weight.data[2:] = torch.tensor([-1.28, 1.27, 0.3, 0.0, 0.5, 0.7])
    net = one_layer(layer, QuantSpec(8, "channel"), QuantSpec(8))
    low = lower(net).module.layer
    assert isinstance(low, GraphLayer)
    assert low.rest is not None
    assert (low.rest != 0).tolist() == [True, True, False, False]
    check_layer(net, (2, 5, 6))
    symmetric = one_layer(nn.Linear(6, 4), QuantSpec(8, "channel", symmetric=True), QuantSpec(8))
    assert lower(symmetric).module.layer.rest is None


def test_matmuls_run_on_levels_and_say_that_their_product_is_float() -> None:
    net = Product()
    swap_layers_(net, {"scores": LayerScheme(None, QuantSpec(8), QuantSpec(8))})
    clock = StepClock(torch.tensor([100.0, 200.0]))
    attach_clock(net, clock)
    for attribute in ("input_quantizer", "second_quantizer"):
        quantizer = InputQuantizer(QuantSpec(8), clock, table(QuantSpec(8), 3), torch.arange(3))
        setattr(net.scores, attribute, quantizer)
    compiled, placed = place(net, "openvino")
    assert placed["scores"].refusals["openvino"] == FLOAT_MATMUL
    x = torch.randn(2, 3, 4)
    for timestep in (0, 150, 999):
        expected = net(x, timestep)
        assert torch.allclose(compiled(x, timestep), expected, rtol=1e-5, atol=1e-5)
    assert compiled.runtime_precisions() == {"scores": "f32"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(cache: Path) -> tuple[Any, Any, GraphDenoiser]:
    torch.manual_seed(0)
    full = tiny_unet()
    simulated = quantize_(copy.deepcopy(full), scheme_for(8, 8))
    compiled, _ = place(simulated, OpenVINOEngine(cache=cache))
    assert isinstance(compiled, GraphDenoiser)
    return full, simulated, compiled


def test_a_whole_denoiser_is_as_far_from_full_precision_as_the_simulation(whole: Any) -> None:
    full, simulated, compiled = whole
    torch.manual_seed(1)
    sample = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for timestep in (0, torch.tensor(500)):
            exact = full(sample, timestep).sample
            engine, expected = compiled(sample, timestep).sample, simulated(sample, timestep).sample
            error = (engine - exact).norm() / exact.norm()
            assert 0.5 < error / ((expected - exact).norm() / exact.norm()) < 2
            # A flipped level avalanches, but far less than a wrong row would.
            assert (engine - expected).norm() < 0.3 * (expected - exact).norm()
        assert (compiled(sample, 0).sample - compiled(sample, 999).sample).norm() > 1e-3
    precisions = compiled.runtime_precisions()
    for name, layer in quantized_layers(simulated).items():
        assert precisions[name] == ("u8" if isinstance(layer, QuantizedLayer) else "f32")


def test_the_module_looks_like_the_denoiser(whole: Any) -> None:
    full, _, compiled = whole
    assert compiled.config is not None
    assert compiled.config.sample_size == full.config.sample_size
    assert (compiled.dtype, compiled.device) == (torch.float32, torch.device("cpu"))
    assert list(compiled.state_dict()) == []
    assert compiled.conv_in.out_channels == 8
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = compiled.no_such_thing
    sample = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        output = compiled(sample, timestep=3)
        assert type(output) is type(full(sample, 3))
        assert torch.equal(copy.deepcopy(compiled)(sample, 3).sample, output.sample)


def conditioned_unet() -> Any:
    """A small UNet of the kind that FreeU is for."""
    return quantize_(
        UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()
    )  # fmt: skip


@pytest.fixture(scope="module")
def freed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A cache that has the graph of a network, the graph, and that network with another setting."""
    torch.manual_seed(0)
    cache, net = tmp_path_factory.mktemp("freed"), conditioned_unet()
    compiled = OpenVINOEngine(cache=cache).compile(net)
    with torch.no_grad():
        compiled(**guided_call())
    changed = copy.deepcopy(net)
    changed.mid_block.resnets[0].output_scale_factor = 0.25
    return cache, compiled, changed


def guided_call() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=generator),
    }


def test_a_kept_graph_is_not_taken_for_other_settings(freed: Any) -> None:
    cache, plain, changed = freed
    with torch.no_grad():
        expected = changed(**guided_call()).sample
        found = OpenVINOEngine(cache=cache).compile(changed)(**guided_call()).sample
        other = plain(**guided_call()).sample
    assert (found - expected).norm() < 0.1 * (other - expected).norm()


def test_a_denoiser_with_freeu_has_no_graph_and_is_not_given_the_plain_one(freed: Any) -> None:
    cache, _, changed = freed
    changed = copy.deepcopy(changed)
    changed.mid_block.resnets[0].output_scale_factor = 1.0
    changed.enable_freeu(0.5, 0.2, 2.0, 2.5)
    with pytest.raises(EngineError, match=r"cannot be exported.*fft"), torch.no_grad():
        OpenVINOEngine(cache=cache).compile(changed)(**guided_call())


def test_what_decides_a_graph_is_in_its_hash() -> None:
    def digest(net: Any, short: bool = False) -> str | None:
        return engine_module._digest(net, "", short)

    net = conditioned_unet()
    known = digest(net)
    assert known is not None
    assert digest(copy.deepcopy(net)) == known
    assert digest(net, short=True) != known  # scales of rows are written otherwise

    def changed(change: Any) -> str | None:
        other = copy.deepcopy(net)
        change(other)
        return digest(other)

    assert changed(lambda other: setattr(other.mid_block.resnets[0], "output_scale_factor", 2.0)) != known
    assert changed(lambda other: setattr(other.conv_act, "forward", torch.tanh)) is None


def test_settings_of_attention_processors_count() -> None:
    class Own(AttnProcessor2_0):
        """A processor of the user's."""

    full, scaled = tiny_unet(), AttnProcessor2_0()
    known = engine_module._settings(full)
    scaled.scale = 2.0
    attention = next(module for module in full.modules() if hasattr(module, "processor"))
    attention.processor = AttnProcessor2_0()
    assert engine_module._settings(full) == known
    attention.processor = scaled
    assert engine_module._settings(full) not in (known, None)
    attention.processor = Own()
    assert engine_module._settings(full) is None


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("enable_freeu", (0.5, 0.2, 2.0, 2.5)),
        ("disable_freeu", ()),
        ("set_attn_processor", (AttnProcessor2_0(),)),
        ("fuse_qkv_projections", ()),
        ("unfuse_qkv_projections", ()),
        ("save_pretrained", ("nowhere",)),
        ("push_to_hub", ("nobody/nothing",)),
        ("add_adapter", ({},)),
        ("load_lora_adapter", ({},)),
        ("register_to_config", ()),
    ],
)
def test_methods_that_change_or_save_the_denoiser_are_refused(freed: Any, name: str, arguments: Any) -> None:
    _, compiled, _ = freed
    before = engine_module._settings(compiled._lowered.module)
    assert hasattr(compiled, name)
    with pytest.raises(EngineError, match=rf"{name}\(\) would not reach the graph.*engine='simulated'"):
        getattr(compiled, name)(*arguments)
    assert engine_module._settings(compiled._lowered.module) == before
    assert not Path("nowhere").exists()


def test_what_pipelines_read_and_call_of_a_graph_is_there(freed: Any) -> None:
    _, compiled, _ = freed
    assert compiled.config.cross_attention_dim == 8
    assert compiled.encoder_hid_proj is None
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.processor" in compiled.attn_processors
    assert compiled.get_time_embed(torch.zeros(2, 4, 8, 8), torch.tensor(3)).shape == (2, 8)
    with pytest.raises(EngineError, match=r"Setting encoder_hid_proj would not reach"):
        compiled.encoder_hid_proj = None
    compiled.own = 1
    assert compiled.eval() is compiled


@pytest.mark.parametrize("kind", ["openvino", "auto"])
def test_two_threads_get_their_own_images(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    net = quantize_(Net(), ends="same")
    shared: Any = place(net, kind)[0]
    alone = OpenVINOEngine(precision=shared.precision).compile(copy.deepcopy(net))
    # Two shapes, so that threads meet in the cache of compiled graphs and in one request.
    samples = [torch.randn(1 + number // 2, 2, 4, 4) for number in range(4)]
    with torch.no_grad():
        expected = [alone(sample, 5) for sample in samples]
    made: list[int] = []
    compiles = GraphDenoiser._compile

    def counted(self: GraphDenoiser, *args: Any) -> Any:
        made.append(1)
        return compiles(self, *args)

    monkeypatch.setattr(GraphDenoiser, "_compile", counted)
    barrier = threading.Barrier(len(samples))

    def work(number: int) -> int:
        torch.set_num_threads(1)
        barrier.wait()
        with torch.no_grad():
            return sum(not torch.equal(shared(samples[number], 5), expected[number]) for _ in range(300))

    with ThreadPoolExecutor(len(samples)) as pool:
        assert list(pool.map(work, range(len(samples)))) == [0] * len(samples)
    assert len(made) == 2


def test_graphs_are_kept_and_damaged_ones_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path
    simulated = quantize_(small_unet())
    compiled = OpenVINOEngine(cache=cache).compile(simulated)
    sample = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = compiled(sample, 3).sample
    exported: list[Path] = []
    original = engine_module.export

    def count(lowered: Any, arguments: Any, path: Path, **options: Any) -> Any:
        exported.append(path)
        return original(lowered, arguments, path, **options)

    monkeypatch.setattr(engine_module, "export", count)
    engine = OpenVINOEngine(cache=cache)
    with torch.no_grad():
        again = engine.compile(copy.deepcopy(simulated))(sample, 3).sample
    assert torch.equal(again, expected)
    assert exported == []
    other = copy.deepcopy(simulated)
    other.conv_in.bias += 1
    with torch.no_grad():
        assert not torch.equal(engine.compile(other)(sample, 3).sample, expected)
    assert len(exported) == 1
    for path in cache.rglob("*.bin"):
        content = path.read_bytes()
        path.unlink()  # a graph that runs has the file mapped
        path.write_bytes(content[:-1] + b"\xff")
    with torch.no_grad():
        assert torch.equal(engine.compile(simulated)(sample, 3).sample, expected)
    assert len(exported) == 2
    assert not list(cache.rglob(".partial-*"))


def test_kept_graphs_are_found_in_other_processes(tmp_path: Path) -> None:
    """diffusers notes defaults in the order of a set, which is another one in every process."""
    script = """
import torch
from pathlib import Path
from stepquant.engines.openvino import OpenVINOEngine
from tiny import quantize_, tiny_unet
torch.manual_seed(0)
print(OpenVINOEngine(cache=Path("cache")).compile(quantize_(tiny_unet()))._cache)
"""
    found = set()
    for seed in ("1", "2"):
        paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        found.add(run.stdout.strip().splitlines()[-1])
    (path,) = found
    assert Path(path).parent == Path("cache/openvino")
    net = quantize_(small_unet())
    known = engine_module._digest(net, "")
    net._internal_dict = FrozenDict({**net.config, "_name_or_path": "elsewhere", "_use_default_values": ["act_fn"]})
    assert engine_module._digest(net, "") == known
    net._internal_dict = FrozenDict({**net.config, "act_fn": "gelu"})
    assert engine_module._digest(net, "") != known


def test_the_cache_keeps_below_its_limit_and_what_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "openvino"
    marks = {}
    for number, name in enumerate("abcd"):
        marks[name] = engine_module.in_use(root / name)
        (root / name / "graph.bin").write_bytes(bytes(1000))
        os.utime(root / name / engine_module.IN_USE, (number, number))
    for name in "abd":
        marks[name].close()
    engine_module.prune(root, 4000)
    assert {path.name for path in root.iterdir()} == {*"abcd"}
    engine_module.prune(root, 3000)
    assert {path.name for path in root.iterdir()} == {*"bcd"}
    engine_module.in_use(root / "b").close()  # now the last that was used
    engine_module.prune(root, 2500)
    assert {path.name for path in root.iterdir()} == {*"bc"}
    engine_module.prune(root, 0)
    assert {path.name for path in root.iterdir()} == {"c"}
    marks["c"].close()
    monkeypatch.setenv("STEPQUANT_CACHE_GB", "1e-6")
    net, x = quantize_(small_unet()), torch.randn(1, 1, 8, 8)
    compiled = OpenVINOEngine(cache=tmp_path).compile(net)
    with torch.no_grad():
        expected = compiled(x, 5).sample
        assert [path.name for path in root.iterdir()] == [compiled._cache.name]  # type: ignore[union-attr]
        engine_module.prune(root, 0)
        assert torch.equal(copy.deepcopy(compiled)(x, 5).sample, expected)
    del compiled
    gc.collect()
    engine_module.prune(root, 0)
    assert list(root.iterdir()) == []
    monkeypatch.setenv("STEPQUANT_CACHE_GB", "much")
    with pytest.raises(EngineError, match=r"STEPQUANT_CACHE_GB must be a number of gigabytes, 0 or more, found 'much'"):
        engine_module.cache_limit()
    monkeypatch.delenv("STEPQUANT_CACHE_GB")
    assert engine_module.cache_limit() == 20_000_000_000


def test_what_openvino_compiles_counts_against_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = OpenVINOEngine(cache=tmp_path).compile(quantize_(small_unet()))
    other = tmp_path / "openvino" / "other"
    other.mkdir(parents=True)
    (other / "graph.bin").write_bytes(bytes(1000))
    os.utime(other, (1, 1))
    original, sizes = engine_module.prune, []

    def seen(root: Path, limit: int) -> None:
        sizes.append(sum("compiled" in path.parts for path in root.rglob("*")))
        original(root, limit)

    monkeypatch.setattr(engine_module, "prune", seen)
    with torch.no_grad():
        compiled(torch.randn(1, 1, 8, 8), 5)
    assert sizes[0] == 0
    assert sizes[-1] > 0


def test_another_process_that_cleans_the_cache_costs_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanished(*_: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory")

    net, sample = quantize_(small_unet()), torch.randn(1, 1, 8, 8)
    monkeypatch.setattr(engine_module, "prune", vanished)
    with torch.no_grad():
        expected = OpenVINOEngine(cache=tmp_path / "other").compile(net)(sample, 5).sample
        assert torch.equal(OpenVINOEngine(cache=tmp_path).compile(net)(sample, 5).sample, expected)


def test_a_kept_graph_that_cannot_be_opened_is_an_error_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: Any) -> Any:
        raise RuntimeError("Unable to read the model")

    net, sample = quantize_(small_unet()), torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        OpenVINOEngine(cache=tmp_path).compile(net)(sample, 5)
    compiled = OpenVINOEngine(cache=tmp_path).compile(net)
    monkeypatch.setattr(engine_module, "_core", lambda: SimpleNamespace(read_model=damaged))
    with torch.no_grad(), pytest.raises(EngineError, match=r"could not open the graph in .*\.xml: Unable to read"):
        compiled(sample, 5)


def test_a_graph_that_cannot_be_rewritten_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> Any:
        raise MemoryError("bad allocation")

    compiled = OpenVINOEngine(cache=tmp_path).compile(quantize_(small_unet()))
    monkeypatch.setattr(engine_module, "take_zero_points_", too_large)
    with torch.no_grad(), pytest.raises(EngineError, match="could not rewrite the graph: bad allocation"):
        compiled(torch.randn(1, 1, 8, 8), 5)


def test_vnni_of_client_processors_is_known_without_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    for known in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: {"avx_vnni": known}, raising=False)
        assert engine_module.has_vnni() == known


def no_writing(*_: Any) -> Any:
    raise PermissionError(13, "Permission denied")


def test_a_cache_that_cannot_be_written_is_read_and_otherwise_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    net, sample = quantize_(small_unet()), torch.randn(2, 1, 8, 8)
    engine = OpenVINOEngine(cache=tmp_path)
    with torch.no_grad():
        expected = engine.compile(net)(sample, 3).sample
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(engine_module, "in_use", no_writing)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(engine_module, "export", None)
        assert torch.equal(engine.compile(net)(sample, 3).sample, expected)
    assert caplog.messages == []
    net.conv_in.bias += 1
    with torch.no_grad():
        assert (engine.compile(net)(sample, 3).sample - net(sample, 3).sample).norm() < 0.1 * expected.norm()
    (message,) = caplog.messages
    assert "Permission denied" in message
    assert "temporary folder" in message
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    net, sample = quantize_(small_unet()), torch.randn(2, 1, 8, 8)

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("Exception\nno space on the disk")

    for module, name, failure in ((torch.onnx, "export", None), (openvino, "save_model", full)):

        def fails(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(module, name, failure or fails)
            with pytest.raises(EngineError, match=rf"could not be written to {tmp_path}.*[nN]o space.*another folder"):
                OpenVINOEngine(cache=tmp_path).compile(net)(sample, 3)


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert OpenVINOEngine().compile(quantize_(small_unet()))._cache is None
    (message,) = caplog.messages
    assert "Could not determine home directory. Set XDG_CACHE_HOME" in message


def test_the_callers_autocast_is_no_part_of_a_graph(tmp_path: Path) -> None:
    net, sample = quantize_(small_unet()), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = OpenVINOEngine().compile(net)(sample, 3).sample
        compiled = OpenVINOEngine(cache=tmp_path).compile(net)
        torched = compiled.in_torch(sample, 3).sample
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(sample, 3).sample, expected)
            assert torch.equal(compiled.in_torch(sample, 3).sample, torched)


def test_geometry_and_hooks_decide_a_graph() -> None:
    net = quantize_(small_unet())
    content = engine_module.content_of(net)
    known = engine_module._digest(net, content)
    assert known is not None
    hooked = copy.deepcopy(net)
    handle = hooked.conv_norm_out.register_forward_hook(lambda _module, _args, output: 2 * output)
    assert engine_module._digest(hooked, content) is None
    handle.remove()
    hooked.conv_norm_out.register_forward_pre_hook(lambda _module, args: args)
    assert engine_module._digest(hooked, content) is None
    net.conv_in.geometry = dataclasses.replace(net.conv_in.geometry, padding_mode="circular")
    assert engine_module.content_of(net) != content


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_with_the_inputs_own_values_is_int8_too(mode: str, rows: int) -> None:
    layer = nn.Conv2d(32, 32, 3, stride=(1, 2), padding=(1, 2), padding_mode=mode)
    check_layer(one_layer(layer, QuantSpec(8, "channel"), QuantSpec(8), rows), (2, 32, 9, 8))


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "stepquant"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "stepquant"


def test_batches_threads_and_the_number_of_kept_shapes() -> None:
    net = quantize_(Net())
    compiled = OpenVINOEngine().compile(net)
    with torch.no_grad():
        for batch in (1, 2, 3):
            sample = torch.randn(batch, 2, 4, 4)
            assert torch.allclose(compiled(sample, 5), net(sample, 5), rtol=1e-4, atol=1e-5)
        folder = compiled._folder()
        assert len(list(folder.glob("*.xml"))) == 1  # one graph for every batch
        threads = [item.model.get_property("INFERENCE_NUM_THREADS") for item in compiled._compiled.values()]
        assert threads == [1, 1, 1]
        torch.set_num_threads(2)
        compiled(sample, 5)
        latest = next(reversed(compiled._compiled.values()))
        assert latest.model.get_property("INFERENCE_NUM_THREADS") == min(2, len(os.sched_getaffinity(0)))
        assert len(compiled._compiled) == 4
        torch.set_num_threads(1)
        for batch in (4, 5):
            compiled(torch.randn(batch, 2, 4, 4), 5)
    assert len(compiled._compiled) == engine_module.KEPT_SHAPES


class HoldsOn(nn.Module):
    """Its graph has the batch that it was traced with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        result: Tensor = self.layer(sample) + torch.arange(int(sample.shape[0])).tolist()[-1] * torch.ones(
            int(sample.shape[0]), 1
        )
        return result


def test_a_graph_that_holds_on_to_its_batch_is_exported_for_each() -> None:
    net = quantize_(HoldsOn(), ends="same")
    compiled = OpenVINOEngine().compile(net)
    with torch.no_grad():
        for batch in (3, 4):
            sample = torch.randn(batch, 4)
            assert torch.allclose(compiled(sample, 5), net(sample, 5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "sentence"),
    [
        (scheme_for(None, 8), "weight is not quantized"),
        (scheme_for(4, None), "input is not quantized"),
        (LayerScheme(QuantSpec(4, "group", group_size=2), QuantSpec(8)), "several scales in an output channel"),
        (LayerScheme(WEIGHT, QuantSpec(8, "token", dynamic=True)), r"found at run time \(DynamicQuantizer\)"),
    ],
)
def test_refused_layers_run_inside_the_graph_all_the_same(scheme: LayerScheme, sentence: str) -> None:
    net = quantize_(Net(), scheme, ends="same")
    compiled, placed = place(net, "openvino")
    for name in ("conv", "out"):
        assert placed[name].engine == "simulated"
        assert sentence.replace("\\", "") in placed[name].refusals["openvino"]
    sample = torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        for timestep in (0, 600):
            assert torch.allclose(compiled(sample, timestep), net(sample, timestep), rtol=1e-4, atol=1e-5)
    assert set(compiled.runtime_precisions().values()) == {"f32"}


def test_scales_per_input_channel_are_refused() -> None:
    net = quantize_(Net(), ends="same")
    spec = QuantSpec(8, "channel")
    params = QParams(torch.rand(3, 2) + 0.01, torch.full((3, 2), 100.0))
    rows = torch.arange(5) % 3
    net.conv.input_quantizer = InputQuantizer(spec, net.stepquant_clock, params, rows, channel_axis=-3)
    compiled, placed = place(net, "openvino")
    assert "scale per channel" in placed["conv"].refusals["openvino"]
    assert placed["out"].engine == "openvino"
    sample = torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        for timestep in (0, 600, torch.tensor([0, 600])):
            assert torch.allclose(compiled(sample, timestep), net(sample, timestep), rtol=1e-4, atol=1e-5)


def split_input(net: Any) -> None:
    spec, clock = QuantSpec(8), net.stepquant_clock
    net.conv.split_input_(1)
    rows = torch.arange(5) % 2
    for attribute, wide in (("input_quantizer", 0.5), ("second_quantizer", 2.5)):
        params = choose_qparams(torch.tensor([-wide, -2 * wide]), torch.tensor([wide, 2 * wide]), spec)
        setattr(net.conv, attribute, InputQuantizer(spec, clock, params, rows))


def first_token(net: Any) -> None:
    net.tokens.first_token = FirstToken(torch.tensor([9.0, -7.0, 8.0, 6.0]), torch.tensor([1.0, 2.0]))


def levels_at_powers_of_two(net: Any) -> None:
    spec = QuantSpec(8, nonnegative=True, logarithmic=True)
    scale, chosen = torch.tensor([0.8, 0.01]), torch.tensor([True, False])
    net.tokens.input_quantizer = LogQuantizer(spec, net.stepquant_clock, scale, chosen, torch.arange(5) % 2)


def channels_and_tokens(net: Any) -> None:
    net.tokens.input_quantizer = DynamicQuantizer(QuantSpec(8, "channel_token", symmetric=True, dynamic=True))


class ConvolutionAndTokens(nn.Module):
    """The other layers of a network with one that no kernel runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.plain, self.tokens = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        hidden = torch.sigmoid(self.plain(torch.tanh(self.conv(sample)))).flatten(2).transpose(1, 2)
        known = torch.tensor([9.0, -7.0, 8.0, 6.0]).expand(len(sample), 1, -1)
        result: Tensor = self.tokens(torch.cat([known, hidden], 1))
        return result


@pytest.mark.parametrize(
    ("changed", "make"),
    [
        ("conv", split_input),
        ("tokens", first_token),
        ("tokens", levels_at_powers_of_two),
        ("tokens", channels_and_tokens),
    ],
)
def test_layers_that_no_kernel_runs_are_simulated_beside_others(changed: str, make: Any) -> None:
    torch.manual_seed(0)
    net = quantize_(ConvolutionAndTokens(), ends="same")
    make(net)
    compiled, placed = place(net, "openvino")
    assert {name for name, placement in placed.items() if placement.engine == "simulated"} == {changed}
    with torch.no_grad():
        for batch in (1, 3):
            sample = torch.randn(batch, 2, 4, 4)
            for timestep in (0, 300, 600, torch.arange(batch) * 400):
                expected = net(sample, timestep)
                assert torch.allclose(compiled(sample, timestep), expected, rtol=1e-3, atol=1e-4)
    assert compiled.runtime_precisions().get(changed, "f32") == "f32"
    assert compiled.runtime_precisions()["plain"] in ("u8", "i8")


def test_a_processor_without_vnni(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    net = quantize_(Net(), ends="same")
    monkeypatch.setattr(engine_module, "has_vnni", lambda: False)
    assert "no VNNI" in choose(net.conv, torch.device("cpu"), "openvino").refusals["openvino"]
    compiled = OpenVINOEngine().compile(net)
    assert "no VNNI" in caplog.text
    with torch.no_grad():
        sample = torch.randn(2, 2, 4, 4)
        assert torch.allclose(compiled(sample, 0), net(sample, 0), rtol=1e-4, atol=1e-5)
    assert set(compiled.runtime_precisions().values()) == {"f32"}


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "openvino":
            raise ImportError("No module named 'openvino'")
        return original(name, *args, **kwargs)

    engine_module._core.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EngineError, match="pip install openvino"):
        OpenVINOEngine().compile(quantize_(Net()))


class Moves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        hidden: Tensor = self.layer(sample.movedim(1, -1)).movedim(-1, 1)
        return hidden.movedim((-1, 1), (1, -2)).movedim(0, 0)


def test_axes_may_be_moved_by_negative_numbers() -> None:
    """torch's exporter writes these as they are, and OpenVINO does not take them."""
    net = quantize_(Moves(), ends="same", rows=1)
    compiled = OpenVINOEngine().compile(net)
    sample = torch.randn(2, 3, 4, 5)
    with torch.no_grad():
        expected = net(sample, 0)
        assert expected.shape == (2, 5, 3, 4)
        assert torch.allclose(compiled(sample, 0), expected, rtol=1e-5, atol=1e-5)


class Sorts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        result: Tensor = torch.linalg.svdvals(self.layer(sample))
        return result


def test_what_cannot_be_exported_is_named_and_the_graph_is_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """Not on stdout above all, where commands write JSON."""
    compiled = OpenVINOEngine().compile(quantize_(Sorts(), ends="same"))
    switch = torch._C._jit_set_onnx_log_enabled
    with pytest.raises(EngineError, match=r"Sorts cannot be exported as a graph: .*svd.*engine='simulated'"):
        compiled(torch.randn(3, 4), 0)
    assert capfd.readouterr() == ("", "")
    assert torch._C._jit_set_onnx_log_enabled is switch


def test_two_denoisers_may_be_exported_at_the_same_time() -> None:
    """torch's exporter keeps its state in globals."""
    nets = [quantize_(Net(), ends="same") for _ in range(3)]
    compiled, sample = [OpenVINOEngine().compile(net) for net in nets], torch.randn(2, 2, 4, 4)

    def call(graph: GraphDenoiser) -> Any:
        torch.set_num_threads(1)
        with torch.no_grad():
            return graph(sample, 5)

    with ThreadPoolExecutor(len(nets)) as pool:
        for net, found in zip(nets, pool.map(call, compiled), strict=True):
            assert torch.allclose(found, net(sample, 5), rtol=1e-4, atol=1e-5)


def test_what_the_module_refuses() -> None:
    net = quantize_(Net())
    compiled = OpenVINOEngine().compile(net)
    sample = torch.randn(2, 2, 4, 4)
    with pytest.raises(EngineError, match="no gradients"):
        compiled(sample.requires_grad_(), 0)
    with pytest.raises(EngineError, match="argument sample is on meta"):
        compiled(torch.empty(2, 2, 4, 4, device="meta"), 0)
    with pytest.raises(EngineError, match="is a Linear: a graph takes tensors"):
        tensors_of({"a": [nn.Linear(1, 1)]})
    with pytest.raises(EngineError, match="has no quantized layers"):
        OpenVINOEngine().compile(Net())
    with pytest.raises(SpecError, match="'f32' or 'bf16', found 'f16'"):
        OpenVINOEngine("f16")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="runs whole denoisers"):
        pack_(net, "openvino")
    net.out.weight.data += 1e-3
    with pytest.raises(EngineError, match="weight of out does not lie on the grid"):
        OpenVINOEngine().compile(net)
    net.out.on_grid = False
    assert refusal(net.out) == "Its weight has not been hardened."
    with pytest.raises(ModelError, match="has not been quantized"):
        save_checkpoint(
            Path("nowhere"), pipe=None, denoiser_name="unet", denoiser=compiled, base_model="", created="",
            schedule=None, recipe={}, run={},
        )  # fmt: skip


def test_bf16_is_an_option() -> None:
    if "BF16" not in engine_module._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("the processor has no bfloat16")
    net = quantize_(Net(), ends="same", rows=1)
    compiled = OpenVINOEngine("bf16").compile(net)
    sample = torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        found, expected = compiled(sample, 0), net(sample, 0)
    assert found.dtype == torch.float32
    assert 1e-6 < (found - expected).norm() / expected.norm() < 0.1
    assert set(compiled.runtime_precisions().values()) <= {"u8", "i8"}


class Timed(nn.Module):
    """Shows the embedding of its timestep: the sample is added to a linear layer of it."""

    def __init__(self) -> None:
        super().__init__()
        self.time_proj = Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.layer = nn.Linear(32, 32)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        timesteps = timestep.expand(len(sample))
        result: Tensor = sample + self.layer(self.time_proj(timesteps))
        return result


def test_bf16_tells_neighbouring_timesteps_apart() -> None:
    """Their angles are the same in bfloat16, which has every fourth number from 512 on."""
    if "BF16" not in engine_module._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("the processor has no bfloat16")
    torch.manual_seed(0)
    net = quantize_(Timed(), ends="same", rows=1)
    short, exact = OpenVINOEngine("bf16").compile(net), OpenVINOEngine().compile(net)
    sample = torch.zeros(2, 32)
    with torch.no_grad():
        for first, second in ((998, 1000), (996, 997), (511, 512)):
            found, expected = (
                graph(sample, torch.tensor(first)) - graph(sample, torch.tensor(second)) for graph in (short, exact)
            )
            assert expected.norm() > 0.1
            assert (found - expected).norm() < 0.05 * expected.norm()
    assert len(short._compiled) == 1
    assert short.runtime_precisions()["layer"] in ("u8", "i8")


def test_half_precision_goes_in_and_comes_out() -> None:
    net = quantize_(Net().half(), ends="same")
    compiled = OpenVINOEngine().compile(net)
    sample = torch.randn(2, 2, 4, 4).half()
    with torch.no_grad():
        found = compiled(sample, 0)
        assert found.dtype == compiled.dtype == torch.float16
        expected = net(sample, 0).float()
        assert (found.float() - expected).norm() / expected.norm() < 0.02


def test_a_pipeline_samples_with_it(whole: Any) -> None:
    full, simulated, compiled = whole
    pipe = DDIMPipeline(full, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    exact = sampled(pipe)
    pipe.unet = simulated
    expected = sampled(pipe)
    pipe.unet = compiled
    found = sampled(pipe)
    assert found.shape == exact.shape
    assert abs(found - expected).mean() < 0.5 * abs(expected - exact).mean()


def test_bfloat16_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Core:
        capabilities = ("FP32", "BF16")

        def get_property(self, *_names: str) -> Any:
            return self.capabilities

    monkeypatch.setattr(engine_module, "_core", Core)
    found, placed = place(quantize_(Net(), ends="same"), "openvino-bf16")
    assert isinstance(found, GraphDenoiser)
    assert found.precision == "bf16"
    assert placed["conv"].engine == "openvino"
    assert "openvino-bf16" not in engines()  # a setting: layers are refused for the same reasons
    Core.capabilities = ("FP32",)
    with pytest.raises(EngineError, match=r"no bfloat16 arithmetic: use .* the engine openvino by name"):
        place(quantize_(Net(), ends="same"), "openvino-bf16")
    with pytest.raises(UnknownEngine, match=r"Did you mean 'openvino-bf16'\?"):
        place(quantize_(Net(), ends="same"), "openvino-bf17")


def test_it_is_an_engine_by_name() -> None:
    assert isinstance(engines()["openvino"], OpenVINOEngine)
    net = quantize_(Net(), ends="same")
    assert choose(net.conv, torch.device("cpu"), "openvino").engine == "openvino"
    assert choose(net.conv, torch.device("cpu")).engine == "simulated"
    assert "on cuda" in choose(net.conv, torch.device("cuda"), "openvino").refusals["openvino"]
    assert json.dumps(tensors_of({"a": [1, (None, "b")], "c": {"d": torch.zeros(1)}})[1])
