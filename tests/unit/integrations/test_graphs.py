"""Exported graphs compute what the simulation computes, with the timestep as an ordinary input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch
from torch import Tensor, nn

import doc_blocks
from stepquant.checkpoint import save_checkpoint
from stepquant.engines.openvino import FLOAT_MATMUL, has_vnni
from stepquant.errors import EngineError, SpecError
from stepquant.integrations.graphs import export_onnx, export_openvino
from stepquant.model.correction import CorrectedScheduler, StepCorrection
from stepquant.model.layer import LowRankBranch
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.schedule import ScheduleFingerprint
from stepquant.model.transform import InputTransform
from stepquant.numerics.affine import choose_qparams, range_of
from stepquant.numerics.spec import LayerScheme, QuantSpec
from tiny import quantize_, small_unet, tiny_unet

pytestmark = pytest.mark.skipif(not has_vnni(), reason="int8 layers need a processor with VNNI")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        result: Tensor = self.conv(sample)
        return result


def run(path: Path, sample: Tensor, timestep: int, **others: Tensor) -> Tensor:
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    labels = {name: tensor.numpy() for name, tensor in others.items()}
    found = compiled({"sample": sample.numpy(), "timestep": np.array([timestep]), **labels})
    return torch.from_numpy(found[0].copy())


@pytest.mark.parametrize(("export", "suffix"), [(export_onnx, ".onnx"), (export_openvino, ".xml")])
def test_graphs_compute_the_simulation_and_choose_rows_by_the_timestep(
    export: Any, suffix: str, tmp_path: Path
) -> None:
    asymmetric = LayerScheme(QuantSpec(8, "channel"), QuantSpec(8))
    net = quantize_(Net(), asymmetric, ends="same")
    inputs = {"sample": torch.zeros(2, 2, 4, 4), "timestep": torch.tensor([0])}
    path = tmp_path / "folder" / f"net{suffix}"
    written = export(net, path, inputs=inputs)
    assert written.path == path
    assert (written.inputs, written.outputs) == (("sample", "timestep"), ("output",))
    assert written.float_layers == {}
    assert any("a batch must be at one timestep" in note for note in written.notes)
    assert any("take nine" in note for note in written.notes)
    slow = [note for note in written.notes if "ONNX Runtime runs convolutions in floating point" in note]
    assert ["can be slower than its float32" in note and "export_openvino" in note for note in slow] == [True] * len(
        slow
    )
    assert len(slow) == (suffix == ".onnx")
    for batch, timestep in ((1, 0), (3, 600), (3, 999)):
        sample = torch.randn(batch, 2, 4, 4)
        assert torch.allclose(run(path, sample, timestep), net(sample, timestep), rtol=1e-5, atol=1e-5)
    with pytest.raises(SpecError, match="of that name already"):
        export(net, path, inputs=inputs)
    with pytest.raises(SpecError, match=f"must end in {suffix}"):
        export(net, tmp_path / "net.bin", inputs=inputs)


class OneLayer(nn.Module):
    """A layer of eight channels, by the shape of its input."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 3, padding=1) if len(shape) == 4 else nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        result: Tensor = self.layer(sample)
        return result


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (2, 5, 8), (2, 8)], ids=["convolution", "tokens", "vectors"])
@pytest.mark.parametrize(("scaled", "block"), [(False, None), (True, None), (False, 8), (True, 8)])
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_batch_gets_what_the_simulation_computes(
    shape: tuple[int, ...], scaled: bool, block: int | None, branch: bool, rows: int, bits: int, tmp_path: Path
) -> None:
    """The batch is free in exported graphs, and OpenVINO then joins other operators than for the engine's fixed one."""
    net = OneLayer(shape)
    layer: Any = net.layer
    weight = layer.weight.detach().clone()
    quantize_(net, LayerScheme(QuantSpec(4, "channel"), QuantSpec(bits)), rows=rows, ends="same")
    layer = net.layer
    if scaled or block is not None:
        scale = torch.linspace(0.5, 3, 8) if scaled else None
        layer.input_transform = InputTransform(8, layer.geometry.channel_axis, scale=scale, block=block)
        layer.weight.data = layer.folded(weight)
        spec = layer.weight_quantizer.spec
        layer.weight_quantizer = WeightQuantizer(spec, choose_qparams(*range_of(layer.weight, spec), spec))
        layer.on_grid = False
        layer.harden_()
    if branch:
        down = 0.1 * torch.randn(2, *layer.weight.shape[1:])
        layer.branch = LowRankBranch(layer.geometry, down, 0.1 * torch.randn(8, 2))
    inputs = {"sample": torch.zeros(shape), "timestep": torch.tensor([0])}
    written = export_onnx(net, tmp_path / "net.onnx", inputs=inputs)
    core = openvino.Core()
    compiled = core.compile_model(str(written.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch, timestep in ((1, 0), (3, 600)):
        sample = torch.randn(batch, *shape[1:])
        given = {"sample": sample.numpy(), "timestep": np.array([timestep])}
        # A graph with one row has no use for the timestep.
        found = compiled({name: given[name] for place in compiled.inputs for name in place.names & given.keys()})
        with torch.no_grad():
            expected = net(sample, timestep)
        assert (torch.from_numpy(found[0].copy()) - expected).norm() < 1e-4 * expected.norm()


def test_a_unet_needs_no_inputs_and_a_correction_lies_beside_the_graph(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    net = quantize_(tiny_unet())
    correction = StepCorrection.identity(torch.tensor([3.0, 1.0]), 1)
    pipe = DenoiserPipeline(net, CorrectedScheduler(DDIMScheduler(), correction), (1, 8, 8))
    written = export_onnx(pipe, tmp_path / "unet.onnx")
    graph = onnx.load(written.path).graph
    onnx.checker.check_model(str(written.path))
    levels = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert len(levels) >= 50
    assert written.outputs == ("output.sample",)
    assert written.correction == tmp_path / "unet.correction.json"
    assert json.loads(written.correction.read_text())["timesteps"] == [3.0, 1.0]
    sample = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        expected = net(sample, 500).sample
    assert (run(written.path, sample, 500) - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(("export", "suffix"), [(export_onnx, ".onnx"), (export_openvino, ".xml")])
def test_nothing_of_an_earlier_export_stays_beside_a_new_one(
    export: Any, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its correction would be applied to the new graph's predictions."""
    from diffusers import DDIMScheduler

    net, path = quantize_(Net(), ends="same"), tmp_path / f"net{suffix}"
    inputs = {"sample": torch.zeros(2, 2, 4, 4), "timestep": torch.tensor([0])}
    correction = StepCorrection.identity(torch.tensor([3.0, 1.0]), 1)
    corrected = DenoiserPipeline(net, CorrectedScheduler(DDIMScheduler(), correction), (2, 4, 4))
    export(corrected, path, inputs=inputs)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert "net.correction.json" in before

    def fails(*_: Any, **__: Any) -> Any:
        raise EngineError("no graph")

    with monkeypatch.context() as patch:
        patch.setattr("stepquant.integrations.graphs.export", fails)
        with pytest.raises(EngineError, match="no graph"):
            export(net, path, inputs=inputs, overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    written = export(net, path, inputs=inputs, overwrite=True)
    assert written.correction is None
    assert {file.name for file in tmp_path.iterdir()} == {*before} - {"net.correction.json"}
    for name in before:
        for file in tmp_path.iterdir():
            file.unlink()
        (tmp_path / name).write_text("{}")
        with pytest.raises(SpecError, match=rf"has {name} of that name already: .*overwrite=True"):
            export(net, path, inputs=inputs)
        assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_unet_that_is_told_classes_takes_their_labels(tmp_path: Path) -> None:
    net = quantize_(tiny_unet(num_class_embeds=10))
    written = export_onnx(net, tmp_path / "unet.onnx")
    assert written.inputs == ("sample", "timestep", "class_labels")
    sample, labels = torch.randn(3, 1, 8, 8), torch.tensor([4, 0, 9])
    found = run(written.path, sample, 500, class_labels=labels)
    with torch.no_grad():
        expected = net(sample, 500, class_labels=labels).sample
        others = net(sample, 500, class_labels=labels.flip(0)).sample
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert (others - expected).norm() > 0.02 * expected.norm()


def test_inputs_that_are_needed_are_asked_for(tmp_path: Path) -> None:
    net = quantize_(Net())
    with pytest.raises(SpecError, match="What a Net is called with is not known"):
        export_onnx(net, tmp_path / "net.onnx")
    with pytest.raises(SpecError, match="must have the timestep argument 'timestep', found sample"):
        export_onnx(net, tmp_path / "net.onnx", inputs={"sample": torch.zeros(1, 2, 4, 4)})


def test_the_sampling_loop_of_the_docs_applies_a_correction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of docs/engines.md as it stands, against the scheduler that the library corrects itself."""
    from diffusers import DDIMScheduler

    (block,) = [block for block in doc_blocks.blocks_of("docs/engines.md") if "compile_model" in block.text]
    monkeypatch.chdir(tmp_path)
    net = tiny_unet(num_class_embeds=10)
    net.register_to_config(sample_size=32)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(20)
    identity = StepCorrection.identity(scheduler.timesteps, 1)
    tables = {name: torch.rand(20, 1) for name in ("gain", "carry", "offset", "previous", "shift")}
    correction = dataclasses.replace(identity, **tables)
    scheduler.save_pretrained("digits-w8a8/scheduler")
    corrected = CorrectedScheduler(scheduler, correction)
    written = export_openvino(DenoiserPipeline(quantize_(net), corrected, (1, 32, 32)), "digits.xml")
    assert written.correction == Path("digits.correction.json")

    torch.manual_seed(3)
    names: dict[str, Any] = {}
    exec(compile(block.text, "docs/engines.md", "exec"), names)

    torch.manual_seed(3)
    sample = torch.randn(16, 1, 32, 32)
    corrected.set_timesteps(20)
    for t in corrected.timesteps:
        found = run(Path("digits.xml"), sample, int(t), class_labels=torch.arange(16) % 10)
        sample = corrected.step(found, t, sample).prev_sample
    assert bool(sample.isfinite().all())
    torch.testing.assert_close(names["sample"], sample, rtol=1e-4, atol=1e-4)


def test_fractional_timesteps_are_not_cut_off(tmp_path: Path) -> None:
    """The graph's timestep is int64 only where the schedule, or the one of the calibration, has whole numbers."""
    from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler

    net, euler = quantize_(small_unet()), EulerDiscreteScheduler()
    pipes = {type(made).__name__: DenoiserPipeline(net, made, (1, 8, 8)) for made in (DDIMScheduler(), euler)}
    pipes["edm"] = DenoiserPipeline(net, EDMEulerScheduler(), (1, 8, 8))
    kinds = {}
    for name, pipe in pipes.items():
        written = export_openvino(pipe, tmp_path / f"{name}.xml")
        kinds[name] = openvino.Core().read_model(written.path).input("timestep").element_type.get_type_name()
    assert kinds == {"DDIMScheduler": "i64", "EulerDiscreteScheduler": "i64", "edm": "f32"}
    euler.set_timesteps(7)
    schedule = ScheduleFingerprint.of(euler, steps=7, guidance="none").to_dict()
    pipe = DenoiserPipeline(net, EulerDiscreteScheduler(), (1, 8, 8))
    save_checkpoint(
        tmp_path / "q", pipe=pipe, denoiser_name="denoiser", denoiser=net, base_model="", created="", schedule=schedule
    )
    written = export_openvino(tmp_path / "q", tmp_path / "q.xml")
    assert openvino.Core().read_model(written.path).input("timestep").element_type.get_type_name() == "f32"


def test_what_runs_in_floating_point_or_takes_more_space_is_said(tmp_path: Path) -> None:
    net = nn.Module.to(quantize_(tiny_unet()), torch.float16)
    written = export_onnx(net, tmp_path / "unet.onnx")
    matmuls = [name for name, reason in written.float_layers.items() if reason == FLOAT_MATMUL]
    assert len(matmuls) == len(written.float_layers) > 0
    weights = [tensor for tensor in onnx.load(written.path).graph.initializer if tensor.data_type == 3]
    assert any(f"{len(matmuls)} matmuls of attention" in note for note in written.notes)
    assert any(
        note.endswith("layers have weights of fewer than 8 bits, which take a byte each in the graph.")
        and len(weights) >= int(note.split()[0]) > 40
        for note in written.notes
    )
    assert "What is float16 in the denoiser is float32 in the graph." in written.notes


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("no space on the disk")])
def test_a_folder_that_cannot_be_written_is_named(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(openvino, "save_model", full)
    inputs = {"sample": torch.zeros(2, 2, 4, 4), "timestep": torch.tensor([0])}
    with pytest.raises(EngineError, match=rf"could not be written to {tmp_path}: .*(No|no) space.*Choose another"):
        export_openvino(quantize_(Net(), ends="same"), tmp_path / "net.xml", inputs=inputs)
    assert list(tmp_path.iterdir()) == []
