"""The engine that `auto` takes: a graph where the processor and the checkpoint fit it, and never an error for it."""

from __future__ import annotations

import copy
import gc
import json
import logging
import pickle
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import nn

from stepquant.api import load
from stepquant.checkpoint import save_checkpoint
from stepquant.cli.main import main
from stepquant.engines import openvino as engine_module
from stepquant.engines.automatic import AutomaticDenoiser
from stepquant.engines.base import automatic, place
from stepquant.errors import EngineError, ModelError
from stepquant.inspection import inspect_checkpoint
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.spec import LayerScheme, QuantSpec, scheme_for
from tiny import TinyNet, quantize_, sampled, small_unet, tiny_pipe

needs_vnni = pytest.mark.skipif(not engine_module.has_vnni(), reason="elsewhere auto is simulated")

SAMPLE = (2, 2, 4, 4)

SHORT = engine_module.has_vnni() and engine_module.has_bf16()
NAME = "openvino-bf16" if SHORT else "openvino"
"""The engine by name that `auto` is on this processor."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seen(caplog: pytest.LogCaptureFixture, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, logger="stepquant")
    monkeypatch.setenv("XDG_CACHE_HOME", cache)


def net(scheme: LayerScheme | None = None) -> Any:
    return quantize_(TinyNet(), scheme, ends="same")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def automatic_of(simulated: nn.Module) -> AutomaticDenoiser:
    placed, _ = place(simulated, "auto")
    assert isinstance(placed, AutomaticDenoiser)
    return placed


@needs_vnni
@pytest.mark.parametrize(
    "short", [pytest.param(True, marks=pytest.mark.skipif(not SHORT, reason="no bfloat16")), False]
)
def test_a_supported_denoiser_becomes_the_graph_and_the_log_says_so(
    short: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepquant.engines.base.has_bf16", lambda: short)
    simulated, name = net(), "openvino-bf16" if short else "openvino"
    by_name: Any = place(copy.deepcopy(simulated), name)[0]
    assert by_name.precision == ("bf16" if short else "f32")
    gone = weakref.ref(simulated)
    placed: Any
    ran: Any
    ran, placed = place(simulated)
    del simulated
    assert {placement.engine for placement in placed.values()} == {"openvino"}
    assert f"Engine {name!r}: it runs all 2 layers with quantized weights and inputs on integers." in caplog.text
    assert gone() is not None
    x = torch.randn(SAMPLE)
    with torch.no_grad():
        for timestep in (0, 600):
            assert torch.equal(ran(x, timestep), by_name(x, timestep))
    assert gone() is None, "the simulated denoiser is still in memory"
    assert ran.runtime_precisions() == by_name.runtime_precisions() != {}
    assert warnings_of(caplog) == []


FLOAT_INPUTS = "there is no layer whose weight and input are both quantized"


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (scheme_for(4, None), FLOAT_INPUTS),
        (scheme_for(None, 8), FLOAT_INPUTS),
        (LayerScheme(QuantSpec(4, "channel"), QuantSpec(8, "token", dynamic=True)), "found at run time"),
        (LayerScheme(QuantSpec(4, "group", group_size=2), QuantSpec(8)), "several scales in an output channel"),
    ],
)
def test_other_schemes_are_simulated_and_the_log_says_why(
    scheme: LayerScheme, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    simulated = net(scheme)
    ran, placed = place(simulated)
    assert ran is simulated
    assert {placement.engine for placement in placed.values()} == {"simulated"}
    if engine_module.has_vnni() or reason == FLOAT_INPUTS:
        assert f"Engine 'simulated': {reason if reason == FLOAT_INPUTS else 'OpenVINO does not run'}" in caplog.text
        assert reason in caplog.text
    if reason == FLOAT_INPUTS or not engine_module.has_vnni():
        assert warnings_of(caplog) == []
    else:
        (warning,) = warnings_of(caplog)
        assert "runs as simulated arithmetic: the time of the full-precision layers" in warning
        assert "does not run 2 of the 2 layers" in warning
        assert reason in warning


class WideNet(nn.Module):
    """Layers of 54, 108 and 8 weights, called as `TinyNet`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1, bias=False)

    def forward(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.relu(self.second(torch.relu(self.first(sample)))))
        return found


def wide_net(*dynamic: str) -> Any:
    """Of these layers, the range of the input is found at run time."""
    made: Any = quantize_(WideNet(), None, ends="same")
    other: Any = quantize_(
        WideNet(), LayerScheme(QuantSpec(4, "channel"), QuantSpec(8, "token", dynamic=True)), ends="same"
    )
    for name in dynamic:
        made.get_submodule(name).input_quantizer = other.get_submodule(name).input_quantizer
    return made


@needs_vnni
def test_a_graph_is_taken_for_most_of_the_weights(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not run on integers is simulated inside, in float32 whatever the processor multiplies."""
    monkeypatch.setattr("stepquant.engines.base.has_bf16", lambda: True)
    mixed = wide_net("first")
    chosen, reason = automatic(quantized_layers(mixed))
    assert chosen == "openvino"
    assert "runs 2 of the 3 layers with quantized weights and inputs on integers, which have 68 % of the w" in reason
    assert "Not first, for one:" in reason
    assert automatic(quantized_layers(wide_net("second")))[0] == "simulated"
    assert automatic(quantized_layers(wide_net("first", "last")))[0] == "openvino"
    ran, placed = place(copy.deepcopy(mixed))
    assert {name: placement.engine for name, placement in placed.items()} == {
        "first": "simulated",
        "second": "openvino",
        "last": "openvino",
    }
    assert "Engine 'openvino': it runs 2 of the 3 layers" in caplog.text
    assert warnings_of(caplog) == []
    x = torch.randn(SAMPLE)
    with torch.no_grad():
        expected = mixed(x, 600)
        assert (ran(x, 600) - expected).norm() < 0.02 * expected.norm()  # a flipped level or two
    assert ran.precision == "f32"
    assert "i8" in str(ran.runtime_precisions()).lower() or "u8" in str(ran.runtime_precisions()).lower()


@needs_vnni
def test_a_hook_keeps_the_denoiser_simulated() -> None:
    """A graph would not call it."""
    mixed = wide_net()
    mixed.last.register_forward_hook(lambda *_: None)
    chosen, reason = automatic(quantized_layers(mixed))
    assert chosen == "simulated"
    assert "last, for one: It has a forward hook" in reason


@needs_vnni
def test_refused_layers_with_most_weights_decide_and_float_layers_do_not() -> None:
    mixed = net()
    mixed.conv.input_quantizer = net(scheme_for(4, None)).conv.input_quantizer
    assert mixed.conv.input_quantizer is None
    assert automatic(quantized_layers(mixed))[0] == "openvino"
    dynamic = net(LayerScheme(QuantSpec(4, "channel"), QuantSpec(8, "token", dynamic=True)))
    mixed.conv.input_quantizer = dynamic.conv.input_quantizer
    chosen, reason = automatic(quantized_layers(mixed))
    assert chosen == "simulated"
    assert "does not run 1 of the 2 layers with quantized weights and inputs on integers. conv, for one:" in reason
    assert automatic({}) == ("simulated", FLOAT_INPUTS)


def test_a_processor_without_vnni(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(engine_module, "has_vnni", lambda: False)
    simulated = net()
    assert place(simulated)[0] is simulated
    assert "Engine 'simulated': OpenVINO does not run 2 of the 2 layers" in caplog.text
    assert "no VNNI" in caplog.text
    assert warnings_of(caplog) == []


def no_such_operation(*_: Any, **__: Any) -> Any:
    raise EngineError("TinyNet cannot be exported as a graph: no such operation.")


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise MemoryError


@needs_vnni
@pytest.mark.parametrize("where", ["export", "lower"])
@pytest.mark.parametrize(
    ("failure", "told"), [(no_such_operation, "no such operation"), (out_of_memory, "MemoryError")]
)
def test_without_a_graph_it_is_simulated_after_one_warning(
    where: str, failure: Any, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulated = net()
    ran = automatic_of(copy.deepcopy(simulated))
    asked: list[int] = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        return failure(*args, **kwargs)

    monkeypatch.setattr(engine_module, where, fails)
    x = torch.randn(SAMPLE)
    with torch.no_grad():
        for timestep in (0, 600, 600):
            assert torch.equal(ran(x, timestep), simulated(x, timestep))
    assert len(asked) == 1
    (warning,) = warnings_of(caplog)
    assert told in warning
    assert "runs as simulated arithmetic instead" in warning
    with pytest.raises((EngineError, MemoryError)), torch.no_grad():  # by name there is nothing to fall back on
        place(copy.deepcopy(simulated), "openvino")[0](x, 0)


@needs_vnni
@pytest.mark.parametrize("failure", [no_such_operation, out_of_memory])
@pytest.mark.parametrize("where", ["_compile", "_graph"])
def test_without_a_graph_for_later_shapes_torch_takes_them(
    where: str, failure: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipeline that runs goes on running, with one warning, and does not look for the graph at every step."""
    simulated = net()
    ran = automatic_of(copy.deepcopy(simulated))
    asked: list[int] = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        return failure(*args, **kwargs)

    x, wide, wider = torch.randn(SAMPLE), torch.randn(2, 2, 6, 4), torch.randn(2, 2, 8, 4)
    mixed = torch.tensor([0, 600])
    with torch.no_grad():
        ran(x, 0)
        monkeypatch.setattr(engine_module.GraphDenoiser, where, fails)
        for sample in (wide, wide, x, wider):
            for timestep in (0, 600, mixed):
                expected = simulated(sample, timestep)
                assert (ran(sample, timestep) - expected).norm() < 0.02 * expected.norm()  # a flipped level or two
        with pytest.raises(RuntimeError, match="channels"):
            ran(torch.randn(2, 5, 4, 4), 0)
        with pytest.raises(EngineError, match="on meta"):
            ran(torch.empty(SAMPLE, device="meta"), 0)
    assert len(asked) in (
        5,
        6,
    )  # once for each of two shapes with two kinds of timesteps, x with mixed ones, a wrong call
    (warning,) = warnings_of(caplog)
    assert "could not take a call of other shapes. It runs in torch instead" in warning
    with pytest.raises(EngineError, match="no gradients"):
        ran(wide.requires_grad_(), 0)


@needs_vnni
def test_a_wrong_call_decides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ran = automatic_of(net())
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="channels"):
            ran(torch.randn(2, 5, 4, 4), 0)
        with pytest.raises(ModelError, match="without its timestep"):
            ran(no_such_argument=1)
        ran(torch.randn(SAMPLE), 0)
    assert ran.runtime_precisions() != {}, "it is a graph"
    assert warnings_of(caplog) == []


@needs_vnni
def test_gradients(caplog: pytest.LogCaptureFixture) -> None:
    """The simulation's if they are asked for first, and an error once there is a graph."""
    simulated, x = net(), torch.randn(SAMPLE, requires_grad=True)
    (expected,) = torch.autograd.grad(simulated(x, 0).square().sum(), x)
    asked, ran = automatic_of(copy.deepcopy(simulated)), automatic_of(copy.deepcopy(simulated))
    (found,) = torch.autograd.grad(asked(x, 0).square().sum(), x)
    assert torch.equal(found, expected)
    assert ["no gradients" in warning for warning in warnings_of(caplog)] == [True]
    with torch.no_grad():
        ran(x, 0)
    with pytest.raises(EngineError, match=r"no gradients.*engine='simulated'"):
        ran(x, 0)


@needs_vnni
def test_other_devices(caplog: pytest.LogCaptureFixture) -> None:
    """Before the first call on the CPU it moves as the simulated one; afterwards the message says what to do."""
    ran = automatic_of(net())
    assert ran.to("meta") is ran
    assert (ran.device.type, ran.conv.weight.device.type) == ("meta", "meta")
    for _ in range(2):
        assert ran(torch.empty(SAMPLE, device="meta"), torch.tensor(0, device="meta")).device.type == "meta"
    assert caplog.text.count("has been moved to meta, and OpenVINO runs on the CPU") == 1
    ran = automatic_of(net())
    with torch.no_grad():
        ran(torch.randn(SAMPLE), 0)
        with pytest.raises(EngineError, match=r"argument sample is on meta: load the checkpoint with engine='simul"):
            ran.to("meta")(torch.empty(SAMPLE, device="meta"), 0)
    assert warnings_of(caplog) == []


@needs_vnni
def test_the_dtype_is_that_of_the_simulated_denoiser_before_and_after() -> None:
    ran = automatic_of(net().half())
    assert ran.dtype == torch.float16
    cast = automatic_of(net()).half()
    assert cast.dtype == cast.conv.weight.dtype == torch.float16
    assert cast.float().dtype == torch.float32
    x = torch.randn(SAMPLE).half()
    with torch.no_grad():
        assert ran(x, 0).dtype == ran.dtype == torch.float16
        assert ran.float()(x, 0).dtype == ran.dtype == torch.float16, "a graph cannot be cast"


@needs_vnni
def test_copies_and_pickles_in_both_states() -> None:
    ran, x = automatic_of(net()), torch.randn(SAMPLE)
    before = [copy.deepcopy(ran), pickle.loads(pickle.dumps(ran))]
    with torch.no_grad():
        expected = ran(x, 600)
        for other in (*before, copy.deepcopy(ran), pickle.loads(pickle.dumps(ran))):
            assert isinstance(other, AutomaticDenoiser)
            assert torch.equal(other(x, 600), expected)


@needs_vnni
def test_what_torch_compile_traces_is_simulated() -> None:
    simulated = net()
    ran, x = automatic_of(copy.deepcopy(simulated)), torch.randn(SAMPLE)
    with torch.no_grad():
        compiled: Any = torch.compile(ran, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, torch.tensor(600)), simulated(x, torch.tensor(600)))
    torch._dynamo.reset()


def small_pipe() -> tuple[DDIMPipeline, UNet2DModel]:
    """A pipeline with a quantized denoiser of two blocks, whose graph is made quickly; and that denoiser."""
    quantized = quantize_(small_unet())
    return quiet(DDIMPipeline(quantized, DDIMScheduler())), quantized


def saved(made: Path, pipe: DDIMPipeline, denoiser: UNet2DModel) -> Path:
    save_checkpoint(made, pipe=pipe, denoiser_name="unet", denoiser=denoiser, base_model="", created="2026-01-01")
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return saved(tmp_path_factory.mktemp("auto") / "q", *small_pipe())


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@needs_vnni
def test_inspection_says_what_auto_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for short, name in ((True, "openvino-bf16"), (False, "openvino")):
        monkeypatch.setattr("stepquant.engines.base.has_bf16", lambda short=short: short)
        assert inspect_checkpoint(folder)["default_engine"] == name
    monkeypatch.setattr(engine_module, "has_vnni", lambda: False)
    assert inspect_checkpoint(folder)["default_engine"] == "simulated"


@needs_vnni
def test_load_takes_it_and_simulated_gives_the_bits_of_before(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe, _ = small_pipe()
    found = {engine: quiet(load(folder, engine=engine)) for engine in ("simulated", NAME, "auto")}
    assert isinstance(found["auto"].unet, AutomaticDenoiser)
    assert f"Engine {NAME!r}: it runs all" in caplog.text
    images = {engine: sampled(loaded) for engine, loaded in found.items()}
    assert (images["simulated"] == sampled(pipe)).all()
    assert (images["auto"] == images[NAME]).all()
    assert images["auto"].shape == images["simulated"].shape
    unet = found["auto"].unet
    assert (unet.config.sample_size, unet.dtype, unet.device) == (8, torch.float32, torch.device("cpu"))
    assert found["auto"].to("cpu").unet is unet
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = unet.no_such_thing


@needs_vnni
def test_what_only_the_simulated_pipeline_does_is_refused(folder: Path, tmp_path: Path) -> None:
    pipe = load(folder)
    for _ in range(2):
        for call in ("add_adapter", "load_lora_adapter", "load_attn_procs"):
            with pytest.raises(EngineError, match=r"Adapters.*engine='simulated'"):
                getattr(pipe.unet, call)({})
        for held in (pipe, load(folder, engine="openvino")):
            with pytest.raises(EngineError, match=r"save the pipeline without it.*engine='simulated'"):
                held.save_pretrained(tmp_path / "again")
        with pytest.raises(ValueError, match="quantized model"):
            load(folder).unet.half()
        sampled(quiet(pipe), steps=1)
    assert not (tmp_path / "again").exists()
    load(folder, engine="simulated").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "unet").is_dir()


def test_inspect_says_what_auto_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, quantized = tiny_pipe()
    folder, layers = saved(tmp_path / "q", pipe, quantized), quantized_layers(quantized)

    def engines_of() -> dict[str, str]:
        return {layer["name"]: layer["engine"] for layer in inspect_checkpoint(folder)["layers"]}

    assert set(engines_of()) == set(layers)
    monkeypatch.setattr(engine_module, "has_vnni", lambda: True)
    expected = {
        name: "openvino" if isinstance(layer, QuantizedLayer) else "simulated" for name, layer in layers.items()
    }
    assert engines_of() == expected
    assert {*expected.values()} == {"openvino", "simulated"}
    monkeypatch.setattr(engine_module, "has_vnni", lambda: False)
    assert set(engines_of().values()) == {"simulated"}


@needs_vnni
def test_inspect_says_why_layers_that_openvino_takes_are_simulated(tmp_path: Path) -> None:
    pipe, quantized = small_pipe()
    other = quantize_(small_unet(), LayerScheme(QuantSpec(4, "channel"), QuantSpec(8, "token", dynamic=True)))
    found_at_run_time = next(
        layer.input_quantizer
        for layer in quantized_layers(other).values()
        if layer.input_quantizer is not None and layer.input_quantizer.spec.dynamic
    )
    quantized_throughout = [name for name, layer in quantized_layers(quantized).items() if layer.input_quantizer]
    first, *others = quantized_throughout
    quantized_layers(quantized)[first].input_quantizer = found_at_run_time
    inspected = inspect_checkpoint(saved(tmp_path / "one", pipe, quantized))
    layers = {layer["name"]: layer for layer in inspected["layers"]}
    assert inspected["default_engine"] == "openvino"
    assert layers[first]["engine"] == "simulated"
    assert "found at run time" in layers[first]["refusals"]["openvino"]
    assert {layers[name]["engine"] for name in others} == {"openvino"}
    assert not any("auto" in layer["remarks"] for layer in layers.values())

    for name in quantized_throughout[:-1]:
        quantized_layers(quantized)[name].input_quantizer = found_at_run_time
    inspected = inspect_checkpoint(saved(tmp_path / "most", pipe, quantized))
    layers = {layer["name"]: layer for layer in inspected["layers"]}
    assert inspected["default_engine"] == "simulated"
    assert {layer["engine"] for layer in layers.values()} == {"simulated"}
    assert not any("auto" in layers[name]["remarks"] for name in quantized_throughout[:-1])
    last = layers[quantized_throughout[-1]]
    assert "openvino" not in last["refusals"]
    count = len(quantized_throughout)
    assert f"does not run {count - 1} of the {count} layers" in last["remarks"]["auto"]
    assert f"{first}, for one: " in last["remarks"]["auto"]


@needs_vnni
def test_changes_reach_the_denoiser_before_there_is_a_graph_and_are_refused_after(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unet, simulated = load(folder).unet, load(folder, engine="simulated").unet
    call = {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor(500)}
    for changed in (unet, simulated):
        changed.set_attention_backend("native")
        changed.resnet_scale = 1  # the denoiser has no such thing, so it is not one of its settings
        changed.sample_size = 4
    (warning,) = (record.getMessage() for record in caplog.records if record.name.endswith("engines.automatic"))
    assert "set_attention_backend() changes the denoiser, which stays simulated arithmetic" in warning
    with torch.no_grad():
        assert torch.equal(unet(**call).sample, simulated(**call).sample)
        assert torch.equal(unet(**call).sample, simulated(**call).sample)
    assert unet._simulated.sample_size == 4
    unet = load(folder).unet
    with pytest.raises(EngineError, match=r"save_pretrained\(\) would not reach the graph.*engine='simulated'"):
        unet.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        unet(**call)
    for name in ("set_attention_backend", "save_pretrained"):
        with pytest.raises(EngineError, match=rf"{name}\(\) would not reach the graph.*engine='simulated'"):
            getattr(unet, name)(tmp_path / "again")
    with pytest.raises(EngineError, match="Setting sample_size"):
        unet.sample_size = 4
    assert not (tmp_path / "again").exists()


def test_without_the_package_inspect_and_auto_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, quantized = small_pipe()
    folder = saved(tmp_path / "q", pipe, quantized)
    monkeypatch.setattr(engine_module, "has_vnni", lambda: True)
    monkeypatch.setitem(sys.modules, "openvino", None)
    for layer in inspect_checkpoint(folder)["layers"]:
        assert layer["engine"] == "simulated"
        assert "pip install openvino" in layer["refusals"]["openvino"]
    assert not isinstance(load(folder).unet, AutomaticDenoiser)
    assert "Engine 'simulated': OpenVINO does not run" in caplog.text
    assert "pip install openvino" in caplog.text
    assert warnings_of(caplog) == []


@needs_vnni
def test_the_command_sample_takes_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepquant.cli.work.tune_allocator", lambda: True)
    log = tmp_path / "log.jsonl"
    for options, told in ((("--engine", "simulated"), []), ((), [f"Engine {NAME!r}"])):
        log.unlink(missing_ok=True)
        words = ["sample", folder, "-o", tmp_path / "images", "--seeds", "1", "--steps", "1", "-q", "--overwrite"]
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in (*words, "--log-file", log, *options)])
        assert stop.value.code == 0
        messages = [json.loads(line)["message"] for line in log.read_text().splitlines()]
        assert [message[: message.index(":")] for message in messages if message.startswith("Engine")] == told
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["000001.png"]
    gc.collect()
