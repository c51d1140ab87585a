"""The oneDNN engine: every layer equals its integers up to the rounding of the last few float operations."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integer_layers import ALONE, assert_alone, assert_exact, exact, quantized
from torch import nn

from stepquant.api import load, quantize
from stepquant.checkpoint import save_checkpoint
from stepquant.engines import onednn
from stepquant.engines.base import choose, pack_
from stepquant.engines.integers import MOST_TERMS
from stepquant.engines.onednn import OneDnnEngine, OneDnnLayer
from stepquant.errors import CheckpointError, EngineError
from stepquant.inspection import inspect_checkpoint
from stepquant.methods.baseline import rtn
from stepquant.model.layer import Geometry, QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import DynamicQuantizer, InputQuantizer, WeightQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.affine import QParams
from stepquant.numerics.spec import QuantSpec, scheme_for
from tiny import quantize_, tiny_pipe, tiny_unet

CPU = torch.device("cpu")
# Only what needs the processor is skipped without one; refusals are tested everywhere.
needs_vnni = pytest.mark.skipif(onednn.unavailable() is not None, reason=str(onednn.unavailable()))

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 7), (3, 12)),
    "linear of images": (lambda: nn.Linear(12, 7, bias=False), (3, 5, 2, 12)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3, padding=1), (3, 6, 9, 7)),
    "pointwise": (lambda: nn.Conv2d(6, 10, 1), (3, 6, 5, 4)),
    "strided": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=False), (3, 6, 9, 7)),
    "uneven": (lambda: nn.Conv2d(6, 4, (3, 5), stride=(2, 1), padding=(0, 4), dilation=(1, 2)), (3, 6, 9, 7)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), (3, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=2, groups=6), (3, 6, 5, 5)),
    "same": (lambda: nn.Conv2d(6, 4, 3, padding="same", dilation=2), (3, 6, 7, 7)),
    "same, uneven": (lambda: nn.Conv2d(6, 4, (2, 3), padding="same"), (3, 6, 7, 7)),
    "reflected": (lambda: nn.Conv2d(6, 4, 3, padding=2, padding_mode="reflect"), (3, 6, 7, 5)),
    "circular": (lambda: nn.Conv2d(6, 4, 3, padding=(1, 2), padding_mode="circular"), (3, 6, 7, 5)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, padding=1, stride=2), (3, 6, 11)),
    "conv1d, same": (lambda: nn.Conv1d(6, 10, 4, padding="same", groups=2), (3, 6, 11)),
}


@pytest.fixture(autouse=True)
def _nothing_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny layers, so that tests are quick."""
    for limit in ("LEAST_CONV_WEIGHTS", "LEAST_LINEAR_WEIGHTS", "LEAST_PRODUCTS"):
        monkeypatch.setattr(onednn, limit, 0)


@needs_vnni
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own, of the simulation
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_geometry_and_every_row(name: str, bits: int) -> None:
    make, shape = LAYERS[name]
    layer = quantized(make(), QuantSpec(bits, "channel"))
    packed = OneDnnLayer(layer)
    assert torch.equal(packed.weight, layer.weight)
    x = torch.randn(shape) * 2
    outputs = []
    for timestep in (0.0, 1.0, 3.0):
        layer.input_quantizer.clock.set(timestep)  # type: ignore[union-attr,operator]
        assert_exact(layer, packed, x)
        outputs.append(packed(x))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@needs_vnni
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_every_bit_width(bits: int, symmetric: bool, kind: str) -> None:
    make, shape = LAYERS[kind]
    weight = QuantSpec(bits, "channel", symmetric=symmetric)
    layer = quantized(make(), weight, QuantSpec(bits, symmetric=symmetric))
    assert_exact(layer, OneDnnLayer(layer), torch.randn(shape) * 2)  # wider than the range: levels are clipped


@needs_vnni
@pytest.mark.parametrize(
    ("weight", "given"),
    [
        (QuantSpec(8, "tensor"), QuantSpec(8)),
        (QuantSpec(4, "tensor", symmetric=True), QuantSpec(8, nonnegative=True)),
        (QuantSpec(8, "channel"), QuantSpec(6, nonnegative=True)),
    ],
)
def test_other_granularities_and_inputs_without_a_sign(weight: QuantSpec, given: QuantSpec) -> None:
    for kind in ("linear", "conv2d"):
        make, shape = LAYERS[kind]
        layer = quantized(make(), weight, given)
        assert_exact(layer, OneDnnLayer(layer), torch.randn(shape).abs())


@needs_vnni
@pytest.mark.parametrize("kind", ALONE)
def test_one_sample_without_a_batch(kind: str) -> None:
    make, shape = ALONE[kind]
    layer = quantized(make())
    assert_alone(layer, OneDnnLayer(layer), torch.randn(shape))


@needs_vnni
def test_ties_are_rounded_as_in_the_simulation() -> None:
    layer = quantized(nn.Linear(64, 3), QuantSpec(4, "channel"))
    x = (torch.arange(128.0) - 64.5).reshape(2, 64) * layer.input_quantizer.scale[0]  # type: ignore[index,operator]
    assert_exact(layer, OneDnnLayer(layer), x)


@needs_vnni
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1d"])
def test_batches_with_mixed_timesteps(bits: int, kind: str) -> None:
    make, shape = LAYERS[kind]
    layer = quantized(make(), QuantSpec(bits, "channel"))
    packed, clock = OneDnnLayer(layer), layer.input_quantizer.clock  # type: ignore[union-attr]
    clock.set(torch.tensor([3.0, 0.0, 1.0]))  # type: ignore[operator]
    assert_exact(layer, packed, torch.randn(shape))
    assert_exact(layer, packed, torch.randn(6, *shape[1:]))  # two parts of each sample
    clock.set(torch.tensor([0.0, 2.0, 0.0]))  # type: ignore[operator]  # other bins, but the same row
    x = torch.randn(shape)
    assert_exact(layer, packed, x)
    mixed = packed(x)
    clock.set(0.0)  # type: ignore[operator]
    assert torch.equal(mixed, packed(x))


@needs_vnni
def test_other_shapes_and_layouts_of_the_same_layer() -> None:
    layer = quantized(nn.Conv2d(6, 10, 3, padding=1))
    packed = OneDnnLayer(layer)
    for size in range(3, 3 + 2 * onednn.MOST_SHAPES):
        assert_exact(layer, packed, torch.randn(1, 6, size, 4))
    assert len(packed._cache["packed"]) == onednn.MOST_SHAPES
    last = torch.randn(2, 6, 3, 4).contiguous(memory_format=torch.channels_last)
    assert_exact(layer, packed, last)
    assert_exact(layer, packed, torch.randn(2, 12, 3, 4)[:, ::2])


@needs_vnni
def test_copies_pickles_and_state_dicts() -> None:
    layer = quantized(nn.Conv2d(6, 10, 3, padding=1))
    packed, x = OneDnnLayer(layer), torch.randn(2, 6, 5, 5)
    before = packed(x)
    copied = copy.deepcopy(packed)
    assert copied.input_quantizer.clock is not packed.input_quantizer.clock
    assert torch.equal(copied(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(packed))(x), before)
    other = OneDnnLayer(quantized(nn.Conv2d(6, 10, 3, padding=1)))
    assert not torch.equal(other(x), before)  # and fills its cache, which loading must empty
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), before)


@needs_vnni
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_bfloat16_modules_return_bfloat16_of_the_same_integers(bits: int, kind: str) -> None:
    make, shape = LAYERS[kind]
    layer = quantized(make(), QuantSpec(bits, "channel"))
    layer.bias = nn.Parameter(layer.bias.bfloat16().float(), requires_grad=False)  # type: ignore[union-attr]
    x = torch.randn(shape).bfloat16()
    packed = OneDnnLayer(layer)
    packed(x.float())
    packed.to(torch.bfloat16)
    assert packed.input_quantizer.scale.dtype == torch.float32
    found = packed(x)
    assert found.dtype == torch.bfloat16
    expected, size = exact(layer, x.float())
    # One more rounding, to eight bits.
    bound = 8 * 2.0**-24 * size + 2.0**-8 * expected.abs()
    assert bool(((found.double() - expected).abs() <= bound).all())
    assert packed.half()(x.half()).dtype == torch.float16


@needs_vnni
def test_small_calls_of_linear_layers_are_the_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = quantized(nn.Linear(64, 64))
    packed = OneDnnLayer(layer)
    monkeypatch.setattr(onednn, "LEAST_PRODUCTS", 16 * 64 * 64)
    few, many = torch.randn(15, 64), torch.randn(16, 64)
    assert torch.equal(packed(few), layer(few))
    assert "packed" not in packed._cache
    assert_exact(layer, packed, many)
    assert "packed" in packed._cache
    layer.input_quantizer.clock.set(torch.tensor([0.0, 1.0, 3.0]))  # type: ignore[union-attr,operator]
    assert torch.equal(packed(few), layer(few))
    monkeypatch.setattr(onednn, "MOST_WEIGHTS_IN_FLOAT", 64 * 64 - 1)
    assert_exact(layer, packed, few)


@needs_vnni
def test_small_calls_in_floating_point_are_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onednn, "LEAST_PRODUCTS", 1 << 20)
    layer = quantized(nn.Linear(256, 256))
    remark = choose(layer, CPU).remarks["onednn"]
    assert remark.startswith("With fewer than 16 rows at a call, such as timestep embeddings, it runs as simulated")
    assert "keeps 262144 bytes of float32 weights" in remark
    packed = OneDnnLayer(layer)
    packed(torch.randn(15, 256))
    assert "packed" not in packed._cache
    assert packed._cache["weight"].nbytes == 262144
    packed(torch.randn(16, 256))
    assert "packed" in packed._cache
    assert choose(quantized(nn.Conv2d(256, 256, 1)), CPU).remarks == {}
    assert choose(quantized(nn.Linear(1024, 1024)), CPU).remarks == {}
    assert choose(with_input(None), CPU).remarks == {}

    pipe, denoiser = tiny_pipe()
    save_checkpoint(tmp_path / "q", pipe=pipe, denoiser_name="unet", denoiser=denoiser, base_model="", created="")
    layers = {found["name"]: found["remarks"] for found in inspect_checkpoint(tmp_path / "q")["layers"]}
    assert set(layers["time_embedding.linear_1"]) == {"onednn"}
    assert layers["conv_in"] == {}
    caplog.set_level("INFO", logger="stepquant")
    pack_(denoiser, "onednn")
    assert "layers run some calls otherwise. time_embedding.linear_1, for one: With fewer than" in caplog.text


@needs_vnni
def test_gradients_are_refused_instead_of_lost() -> None:
    packed = OneDnnLayer(quantized(nn.Linear(12, 7)))
    x = torch.randn(2, 12, requires_grad=True)
    with pytest.raises(EngineError, match=r"has no gradient.*no_grad"):
        packed(x)
    with torch.no_grad():
        assert packed(x).shape == (2, 7)
    with torch.inference_mode():
        assert packed(x).shape == (2, 7)


def linear() -> QuantizedLayer:
    return quantized(nn.Linear(12, 8))


def with_weight(quantizer: nn.Module | None) -> QuantizedLayer:
    layer = linear()
    layer.weight_quantizer = quantizer
    return layer


def with_input(quantizer: nn.Module | None) -> QuantizedLayer:
    layer = linear()
    layer.input_quantizer = quantizer
    return layer


def not_hardened() -> QuantizedLayer:
    layer = linear()
    layer.on_grid = False
    return layer


def by_channel() -> QuantizedLayer:
    layer = linear()
    params = QParams(torch.ones(1, 12), torch.zeros(1, 12))
    clock = layer.input_quantizer.clock  # type: ignore[union-attr]
    layer.input_quantizer = InputQuantizer(QuantSpec(8, "channel"), clock, params)  # type: ignore[arg-type]
    return layer


def long() -> QuantizedLayer:
    return quantized(nn.Linear(MOST_TERMS + 1, 1))


GROUPED = WeightQuantizer(QuantSpec(4, "group", group_size=2), QParams(torch.ones(8, 6, 1), torch.zeros(8, 6, 1)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: QuantizedMatmul("scores"), "It is a matmul of two activations"),
        (lambda: with_weight(None), "Its weight is not quantized."),
        (lambda: with_weight(nn.Identity()), "a Identity, which only calibration has"),
        (lambda: with_weight(GROUPED), "a scale for each group of inputs"),
        (not_hardened, "has not been hardened"),
        (lambda: with_input(None), "Its input is not quantized."),
        (
            lambda: with_input(DynamicQuantizer(QuantSpec(8, "channel_token", symmetric=True, dynamic=True))),
            "a scale for each channel",
        ),
        (by_channel, "a scale for each channel"),
        (long, f"It sums {MOST_TERMS + 1} products"),
    ],
)
def test_refusals(make: Callable[[], Any], reason: str) -> None:
    layer = make()
    assert reason in (OneDnnEngine().refuses(layer, CPU) or "")
    if isinstance(layer, QuantizedLayer):
        with pytest.raises(EngineError, match="cannot be packed"):
            OneDnnLayer(layer)


def test_a_weight_off_its_grid_is_an_error() -> None:
    layer = linear()
    layer.weight.data += 1e-3
    with pytest.raises(EngineError, match="does not lie on the grid"):
        OneDnnLayer(layer)


@needs_vnni
def test_small_layers_and_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear()
    assert OneDnnEngine().refuses(layer, CPU) is None
    assert OneDnnEngine().refuses(layer, torch.device("cuda")) == "The layer is on cuda; oneDNN runs on the CPU."
    monkeypatch.undo()
    assert "It has 96 weights; below 8192, calling" in (OneDnnEngine().refuses(layer, CPU) or "")
    conv = quantized(nn.Conv2d(4, 8, 3))
    assert "It has 288 weights; below 2048, calling" in (OneDnnEngine().refuses(conv, CPU) or "")


def test_layers_on_meta_are_judged_without_their_tensors() -> None:
    layer = linear().to("meta")
    assert OneDnnEngine().refuses(layer, CPU) == onednn.unavailable()


def found_unavailable(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, value: Any) -> str:
    monkeypatch.setattr(target, name, value)
    onednn.unavailable.cache_clear()
    try:
        return OneDnnEngine().refuses(linear(), CPU) or ""
    finally:
        monkeypatch.undo()
        onednn.unavailable.cache_clear()


def test_processors_without_vnni_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no AVX-512 VNNI" in found_unavailable(monkeypatch, torch.cpu, "_is_vnni_supported", lambda: False)


@needs_vnni
def test_missing_changed_and_wrong_operators_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(*arguments: Any) -> Any:
        return torch.ops.onednn.qconv2d_of_tomorrow

    def changed(*arguments: Any) -> Any:
        return torch.ops.onednn.qlinear_pointwise(*arguments[:3])

    right = onednn._linear

    def wrong(*arguments: Any) -> torch.Tensor:
        return right(*arguments) + 1e-3

    assert "no usable int8 operators of oneDNN" in found_unavailable(monkeypatch, onednn, "_conv", renamed)
    assert "no usable int8 operators of oneDNN" in found_unavailable(monkeypatch, onednn, "_linear", changed)
    assert "give wrong numbers" in found_unavailable(monkeypatch, onednn, "_linear", wrong)
    assert onednn.unavailable() is None


@needs_vnni
def test_refused_layers_stay_simulated() -> None:
    denoiser = quantize_(tiny_unet(), scheme_for(4, 8))
    placed = pack_(denoiser, "onednn")
    by_engine = {name: place.engine for name, place in placed.items()}
    assert set(by_engine.values()) == {"onednn", "simulated"}
    for name, engine in by_engine.items():
        assert (engine == "onednn") == ("onednn" not in placed[name].refusals)
        assert isinstance(denoiser.get_submodule(name), OneDnnLayer) == (engine == "onednn")
    assert {name for name, engine in by_engine.items() if engine == "simulated"} == {
        name for name, layer in quantized_layers(denoiser).items() if isinstance(layer, QuantizedMatmul)
    }
    assert choose(QuantizedLayer(Geometry("linear"), torch.ones(2, 2), None), CPU, "onednn").engine == "simulated"


@needs_vnni
@pytest.mark.parametrize("bits", [4, 8])
def test_a_whole_network_is_as_far_from_full_precision_as_the_simulation(bits: int, tmp_path: Path) -> None:
    pipe, _ = tiny_pipe()
    quantized = quantize(pipe, rtn(weights=bits, activations=8, samples=2, batch=2), steps=4)
    quantized.save(tmp_path / "q")
    found = load(tmp_path / "q", engine="onednn")
    assert any(isinstance(module, OneDnnLayer) for module in found.unet.modules())
    # Flipped ties make equal networks drift apart, so whole networks are only compared by their error.
    sample, errors = torch.randn(8, 1, 8, 8), {"onednn": 0.0, "simulated": 0.0}
    with torch.no_grad():
        for timestep in (0, 250, 750):
            wanted = pipe.unet(sample, timestep).sample
            for name, unet in (("onednn", found.unet), ("simulated", quantized.pipe.unet)):
                errors[name] += float((unet(sample, timestep).sample - wanted).square().mean())
    assert 0.7 < errors["onednn"] / errors["simulated"] < 1.4
    images = found(batch_size=2, num_inference_steps=4, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    assert bool(torch.from_numpy(images).isfinite().all())
    with pytest.raises(CheckpointError, match="packed by an engine"):
        type(quantized)(**{**vars(quantized), "pipe": found}).save(tmp_path / "again")
