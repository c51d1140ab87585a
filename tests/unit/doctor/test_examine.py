"""Planted faults of every kind: each is found, with its layer and step; nothing is found where nothing is wrong."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor, nn

import tiny
from stepquant.api import open_model, quantize, sample, with_denoiser
from stepquant.calibrate.stages import LayerRule
from stepquant.doctor import Diagnosis, Finding, Thresholds, examine
from stepquant.doctor.advice import as_yaml, rules_for
from stepquant.doctor.findings import KINDS, Sightings
from stepquant.doctor.health import Health, watching
from stepquant.doctor.weights import clipping_losses
from stepquant.engines.base import place
from stepquant.errors import SpecError
from stepquant.methods.baseline import rtn
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import DynamicQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.affine import QParams
from stepquant.numerics.spec import QuantSpec
from tiny_pipelines import FAMILIES

STEPS = 4
SEEDS = (0, 1, 2)


class Net(nn.Module):
    """Three convolutions and a layer for the timestep, for samples [B, 2, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.enter = nn.Conv2d(2, 8, 3, padding=1)
        self.time = nn.Linear(4, 8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.leave = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        phase = torch.as_tensor(timestep).reshape(-1, 1).to(sample) / 1000 * torch.tensor([1.0, 2.0, 4.0, 8.0])
        hidden = self.enter(sample) + self.time(torch.sin(phase))[:, :, None, None]
        return self.leave(nn.functional.silu(self.middle(nn.functional.silu(hidden))))


def pipeline(net: nn.Module) -> DenoiserPipeline:
    return DenoiserPipeline(net, DDIMScheduler(prediction_type="sample"), (2, 8, 8))


@pytest.fixture(scope="module")
def exact() -> DenoiserPipeline:
    return pipeline(Net().eval())


@pytest.fixture(scope="module")
def quantized(exact: DenoiserPipeline) -> DenoiserPipeline:
    recipe = rtn(weights=8, activations=8, samples=8, batch=8, ends="same")
    pipe: DenoiserPipeline = quantize(exact, recipe, steps=STEPS).pipe
    return pipe


@pytest.fixture
def patient(quantized: DenoiserPipeline) -> Any:
    return with_denoiser(quantized, "denoiser", copy.deepcopy(quantized.denoiser))


def examined(pipe: Any, against: Any = None, **options: Any) -> Diagnosis:
    return examine(pipe, against, **{"seeds": SEEDS, "steps": STEPS, "batch_size": 2, **options})


def the(diagnosis: Diagnosis, kind: str) -> Finding:
    found = [finding for finding in diagnosis.findings if finding.kind == kind]
    assert len(found) == 1, diagnosis.findings
    return found[0]


def layers(pipe: Any) -> dict[str, Any]:
    return dict(quantized_layers(pipe.denoiser))


def from_step(quantizer: Any, first: int, **changed: float) -> None:
    """Change a quantizer from a step on. Bins count upwards with the timestep."""
    scale, zero_point = quantizer.scale[quantizer.row_of_bin], quantizer.zero_point[quantizer.row_of_bin]
    scale[: STEPS - first] *= changed.get("scale", 1.0)
    zero_point[: STEPS - first] += changed.get("zero_point", 0.0)
    quantizer.scale, quantizer.zero_point, quantizer.row_of_bin = scale, zero_point, torch.arange(STEPS)


# Faults of quantized models: what is done to a model, and which kind, layer and step must be named.


def nan_weight(net: Any) -> None:
    net.middle.weight.data[0, 0, 0, 0] = torch.nan


def nan_from_step_2(net: Any) -> None:
    from_step(net.middle.input_quantizer, 2, scale=float("nan"))


def saturated_from_step_1(net: Any) -> None:
    from_step(net.leave.input_quantizer, 1, scale=0.001)


def clipped_from_step_2(net: Any) -> None:
    quantizer = net.enter.input_quantizer
    from_step(quantizer, 2, scale=0.4, zero_point=0.0)


def coarse_from_step_3(net: Any) -> None:
    from_step(net.middle.input_quantizer, 3, scale=200.0)


def dead_channel(net: Any) -> None:
    net.middle.weight.data[3] = 0


def outlier(net: Any) -> None:
    net.enter.weight.data[2] *= 300


def large_for_float16(net: Any) -> None:
    net.middle.weight.data *= 3e5
    assert net.middle.weight.abs().max() < 65504


def large_weight(net: Any) -> None:
    net.middle.weight.data[0, 0, 0, 0] = 1e5


def no_scale_left(net: Any) -> None:
    net.middle.weight_quantizer.scale[1] = 1e-8
    net.middle.weight.data[1] = 0


def scale_of_row(net: Any) -> None:
    net.leave.input_quantizer.scale[0] = 0.0


def narrow_weight(net: Any) -> None:
    harden(net.middle, 0.2)


def wide_weight(net: Any) -> None:
    harden(net.middle, 20.0)


def harden(layer: Any, factor: float) -> None:
    """The weight of the full-precision layer, on a grid of another scale."""
    layer.weight_quantizer.scale *= factor
    layer.weight.data = layer.weight_quantizer(Net().middle.weight.data)


def another_weight(net: Any) -> None:
    net.middle.weight.data = torch.randn_like(net.middle.weight)


QUANTIZED_FAULTS: list[tuple[Callable[[Any], None], str, str, int | None]] = [
    (nan_weight, "not_finite_weight", "middle", None),
    (nan_weight, "not_finite", "middle", 0),
    (nan_from_step_2, "not_finite", "middle", 2),
    (nan_from_step_2, "degenerate_scale", "middle", None),
    (saturated_from_step_1, "saturation", "leave", 1),
    (clipped_from_step_2, "clipping", "enter", 2),
    (coarse_from_step_3, "unused_levels", "middle", 3),
    (coarse_from_step_3, "low_cosine", "middle", 3),
    (dead_channel, "dead_channels", "middle", 0),
    (outlier, "outlier_channels", "middle", 0),
    (large_for_float16, "float16_overflow", "middle", 0),
    (no_scale_left, "degenerate_scale", "middle", None),
    (scale_of_row, "degenerate_scale", "leave", None),
    (narrow_weight, "weight_clipping", "middle", None),
    (wide_weight, "unused_weight_levels", "middle", None),
    (another_weight, "low_cosine", "middle", 0),
]


@pytest.mark.parametrize(
    ("plant", "kind", "layer", "step"), QUANTIZED_FAULTS, ids=[f"{f[0].__name__}-{f[1]}" for f in QUANTIZED_FAULTS]
)
def test_a_planted_fault_is_found_in_its_layer_and_step(
    patient: Any, exact: Any, plant: Callable[[Any], None], kind: str, layer: str, step: int | None
) -> None:
    plant(patient.denoiser)
    diagnosis = examined(patient, exact, top=0)
    finding = the(diagnosis, kind)
    assert (finding.layer, finding.step) == (layer, step)
    assert finding.severity == KINDS[kind].severity
    assert finding.advice
    json.dumps(diagnosis.to_dict(), allow_nan=False)


def test_every_kind_has_a_planted_fault() -> None:
    elsewhere = {"black_image", "constant_image", "drives_drift", "drift_elsewhere", "spread_drift"}
    assert {fault[1] for fault in QUANTIZED_FAULTS} | elsewhere == set(KINDS)


def test_what_is_said_of_dead_channels_is_how_many_and_which(patient: Any) -> None:
    patient.denoiser.middle.weight.data[[1, 4]] = 0
    finding = the(examined(patient), "dead_channels")
    assert (finding.value, finding.threshold) == (2, 0)
    assert finding.what.endswith("1, 4.")


def test_the_layer_that_drives_the_drift_is_named_and_its_share_is_measured(patient: Any, exact: Any) -> None:
    another_weight(patient.denoiser)
    diagnosis = examined(patient, exact, top=1)
    finding = the(diagnosis, "drives_drift")
    assert finding.layer == "middle" == diagnosis.drivers[0].layer
    restored = diagnosis.drivers[0].restored
    assert restored is not None
    assert diagnosis.drift is not None
    assert finding.value == pytest.approx((diagnosis.drift - restored) / diagnosis.drift)
    assert finding.value > 0.9
    assert [driver.restored for driver in diagnosis.drivers[1:]] == [None] * 3


def test_estimates_that_do_not_add_up_are_called_so(patient: Any, exact: Any, quantized: Any) -> None:
    patient.denoiser.leave.weight.data *= 100
    notes = examined(patient, exact, top=0).notes
    assert [note for note in notes if "add up to" in note]
    assert examined(quantized, exact, top=0).notes == ()


def unet_pipe(net: nn.Module) -> DDIMPipeline:
    pipe = DDIMPipeline(net, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def quantized_unet() -> tuple[Any, Any]:
    exact = unet_pipe(tiny.tiny_unet())
    return exact, quantize(exact, rtn(weights=8, activations=8, samples=2, batch=2), steps=3).pipe


@pytest.mark.parametrize("factor", [0.2, -1.0])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_drift_that_comes_from_a_norm_is_an_error_that_names_it(
    quantized_unet: tuple[Any, Any], factor: float, is_quantized: bool
) -> None:
    exact, eight = quantized_unet
    sick = copy.deepcopy(eight.unet if is_quantized else exact.unet)
    norm = "down_blocks.0.resnets.0.norm1"
    sick.get_submodule(norm).weight.data *= factor
    sick.get_submodule("conv_norm_out").weight.data *= factor
    pipe = with_denoiser(eight, "unet", sick) if is_quantized else unet_pipe(sick)
    diagnosis = examine(pipe, exact, seeds=[5, 6], steps=3, top=1)
    assert not diagnosis.healthy
    found = [finding for finding in diagnosis.findings if finding.kind == "drift_elsewhere"]
    assert {finding.layer for finding in found} == {norm, "conv_norm_out"}
    assert {finding.severity for finding in found} == {"error"}
    assert (found[0].value or 0) > 0.1
    assert diagnosis.relative_drift == found[0].value or is_quantized
    assert norm not in [rule.pattern for rule in diagnosis.rules]


def test_drift_that_no_module_accounts_for_is_an_error_of_its_own(exact: Any) -> None:
    class Darker(Net):
        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            return 0.5 * super().forward(sample, timestep)

    finding = the(examined(pipeline(Darker().eval()), exact), "drift_elsewhere")
    assert (finding.layer, finding.severity) == (None, "error")
    assert "no other module" in finding.what


def test_drift_of_all_layers_together_is_a_finding_though_none_stands_out(patient: Any, exact: Any) -> None:
    for layer in layers(patient).values():
        layer.weight.data *= 1.3
    diagnosis = examined(patient, exact, top=0)
    assert (diagnosis.relative_drift or 0) > 0.1
    assert the(diagnosis, "spread_drift").value == diagnosis.relative_drift


def black(net: Any) -> None:
    net.leave.weight.data.zero_()
    net.leave.bias.data.fill_(-5)


def grey(net: Any) -> None:
    net.leave.weight.data.zero_()
    net.leave.bias.data.zero_()


@pytest.mark.parametrize(
    ("plant", "kind"), [(black, "black_image"), (grey, "constant_image"), (nan_weight, "black_image")]
)
def test_images_without_content_are_found_in_an_ordinary_pipeline(plant: Callable[[Any], None], kind: str) -> None:
    pipe = pipeline(Net().eval())
    plant(pipe.denoiser)
    finding = the(examined(pipe), kind)
    assert (finding.layer, finding.value) == (None, 0)
    assert "3 of 3 seeds" in finding.what
    assert finding.what.endswith("0, 1, 2.")


@pytest.mark.parametrize(
    ("plant", "kind", "layer", "step"),
    [
        (nan_weight, "not_finite", "middle", 0),
        (dead_channel, "dead_channels", "middle", 0),
        (large_for_float16, "float16_overflow", "middle", 0),
        (large_weight, "float16_overflow", "middle", None),
    ],
)
def test_faults_of_an_ordinary_pipeline_need_no_quantizer(
    plant: Callable[[Any], None], kind: str, layer: str, step: int | None
) -> None:
    pipe = pipeline(Net().eval())
    plant(pipe.denoiser)
    found = [(finding.kind, finding.layer, finding.step) for finding in examined(pipe).findings]
    assert (kind, layer, step) in found


def test_where_a_residual_overflows_its_block_is_named_and_not_its_layers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor, timestep: Any) -> Tensor:
            return self.conv(x) * 1e6

    finding = the(examined(pipeline(Block())), "float16_overflow")
    assert finding.layer == ""


def test_a_denoiser_without_layers_is_examined_as_a_whole_and_that_is_said(exact: Any) -> None:
    """As one that an engine has compiled."""

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            object.__setattr__(self, "inside", exact.denoiser)

        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            return 0.9 * self.inside(sample, timestep)

    diagnosis = examined(pipeline(Graph()), exact)
    assert (diagnosis.layers, diagnosis.drivers, diagnosis.rules) == ((), (), ())
    assert (diagnosis.drift or 0) > 0
    assert any("only the denoiser as a whole" in note for note in diagnosis.notes)
    assert any("none to blame" in note for note in diagnosis.notes)


def test_channels_that_are_dead_in_full_precision_are_no_fault_of_the_quantized_model(patient: Any) -> None:
    original = pipeline(Net().eval())
    dead_channel(original.denoiser)
    dead_channel(patient.denoiser)
    assert "dead_channels" not in {finding.kind for finding in examined(patient, original).findings}


def test_a_single_value_outside_of_the_range_counts_by_its_size(patient: Any) -> None:
    """One of a thousand values, none, ten and a hundred ranges away."""
    seen = []
    quantizer = patient.denoiser.middle.input_quantizer
    health = Health(patient.denoiser, Thresholds())
    for size in (0.0, 10.0, 100.0):
        x = torch.linspace(0, 1, 1000)
        x[500] = x[500] + size * quantizer.scale[0] * 255
        health.see_quantizer("middle", "input", quantizer, x)
        seen.append([(finding.kind, finding.value) for finding in health.findings()])
    cut = float(x[500] - (255 - quantizer.zero_point[0]) * quantizer.scale[0])
    assert seen[0] == []
    assert seen[2] == [("clipping", seen[2][0][1])]
    assert seen[2][0][1] == seen[1][0][1]  # of the same step the first sighting is kept
    health = Health(patient.denoiser, Thresholds())
    health.see_quantizer("middle", "input", quantizer, x)
    assert health.findings()[0].value == pytest.approx(cut / float(x.norm()), rel=1e-3)


def test_a_range_of_run_time_shows_outliers_too(patient: Any) -> None:
    patient.denoiser.middle.input_quantizer = DynamicQuantizer(QuantSpec(8, dynamic=True))
    outlier(patient.denoiser)
    assert the(examined(patient), "outlier_channels").layer == "middle"


def test_outliers_of_a_model_that_is_not_quantized_are_a_note() -> None:
    pipe = pipeline(Net().eval())
    outlier(pipe.denoiser)
    diagnosis = examined(pipe)
    assert (diagnosis.findings, diagnosis.rules) == ((), ())
    (note,) = [note for note in diagnosis.notes if note.startswith("If you quantize")]
    assert "the inputs of middle have channels" in note


def test_an_input_of_one_row_an_image_has_no_outliers(patient: Any) -> None:
    """The size of a channel of a timestep's embedding is that of one value."""
    health = Health(patient.denoiser, Thresholds())
    x = torch.ones(2, 8)
    x[:, 3] = 1000
    health.see_call((torch.zeros(2, 2, 8, 8),))
    health.see_outliers("time", -1, x)
    assert health.findings() == []
    health.see_outliers("tokens", -1, x[:, None].expand(2, 4, 8))
    assert [finding.layer for finding in health.findings()] == ["tokens"]


def test_outliers_show_where_most_channels_are_zero(patient: Any) -> None:
    health = Health(patient.denoiser, Thresholds())
    x = torch.zeros(2, 16, 4, 4)
    health.see_outliers("nothing", -3, x)
    x[:, :5] = 1.0
    health.see_outliers("alike", -3, x)
    assert health.findings() == []
    x[:, 2] = 100.0
    health.see_outliers("sparse", -3, x)
    (finding,) = health.findings()
    assert (finding.layer, finding.value) == ("sparse", 100)
    assert "channel 2 reaches up to 100 times" in finding.what


@pytest.mark.parametrize("model", ["digits-unet", "digits-dit"])
def test_the_shipped_models_are_healthy(model: str) -> None:
    diagnosis = examine(open_model(model), seeds=[1000, 1001], steps=4)
    assert diagnosis.findings == ()
    assert (diagnosis.healthy, diagnosis.rules) == (True, ())


def test_nothing_is_found_where_nothing_is_wrong(exact: Any, quantized: Any) -> None:
    for pipe in (exact, quantized):
        diagnosis = examined(pipe, exact)
        assert diagnosis.findings == ()
        assert (diagnosis.healthy, diagnosis.rules, diagnosis.yaml()) == (True, (), "")
    assert [layer.layer for layer in diagnosis.layers] == ["enter", "time", "middle", "leave"]
    assert all(min(layer.cosine) > 0.999 for layer in diagnosis.layers)
    assert {driver.layer for driver in diagnosis.drivers} == {"enter", "time", "middle", "leave"}
    assert 0 < (diagnosis.relative_drift or 0) < 0.1


def test_nothing_is_found_in_a_healthy_unet_with_attention() -> None:
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    eight = quantize(pipe, rtn(weights=8, activations=8, samples=2, batch=2, ranges="minmax"), steps=3).pipe
    before = {name: tensor.clone() for name, tensor in eight.unet.state_dict().items()}
    assert examine(pipe, seeds=[5, 6], steps=3).findings == ()
    diagnosis = examine(eight, pipe, seeds=[5, 6], steps=3, top=1)
    assert diagnosis.findings == ()
    assert any("processor.values" in layer.layer for layer in diagnosis.layers)
    assert diagnosis.expansion == "quantized"
    # Both pipelines are as they were.
    assert all(torch.equal(tensor, before[name]) for name, tensor in eight.unet.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pipe.unet.parameters())
    assert "step" not in vars(eight.scheduler)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())
    assert sum(len(module._forward_pre_hooks) for module in eight.unet.modules()) == 1  # the step clock


def test_layers_of_an_engine_are_compared_though_they_have_no_gradient(patient: Any, exact: Any) -> None:
    another_weight(patient.denoiser)
    patient.denoiser.middle.weight.data = patient.denoiser.middle.weight_quantizer(patient.denoiser.middle.weight.data)
    patient.denoiser, _ = place(patient.denoiser, "reference")
    diagnosis = examined(patient, exact)
    assert diagnosis.expansion == "full_precision"
    assert the(diagnosis, "drives_drift").layer == "middle"
    assert any("run in an engine" in note for note in diagnosis.notes)
    assert [rule.pattern for rule in diagnosis.rules] == ["middle"]


def test_thresholds_decide_what_is_a_fault(quantized: Any, exact: Any) -> None:
    strict = Thresholds(cosine=0.999999, drift=0.0, driver=0.01)
    kinds = {finding.kind for finding in examined(quantized, exact, thresholds=strict).findings}
    assert kinds == {"low_cosine", "drives_drift"}
    assert Thresholds.of(["cosine=0.5", "drift=1e-3"]) == Thresholds(cosine=0.5, drift=1e-3)
    with pytest.raises(SpecError, match="Did you mean 'cosine'"):
        Thresholds.of(["cosin=0.5"])
    with pytest.raises(SpecError, match="must be a number, found 'high'"):
        Thresholds.of(["cosine=high"])
    with pytest.raises(SpecError, match="finite"):
        Thresholds(cosine=float("nan"))


@pytest.mark.parametrize(
    ("kinds", "bits", "wanted"),
    [
        (["clipping"], (4, 4), (4, 8)),
        (["clipping"], (4, 8), (4, None)),
        (["weight_clipping"], (4, 8), (8, 8)),
        (["low_cosine"], (4, 4), (8, 8)),
        (["weight_clipping", "saturation"], (4, 8), (8, None)),
        (["degenerate_scale", "clipping"], (4, 4), (None, None)),
    ],
)
def test_a_rule_raises_the_bits_of_the_tensor_at_fault(
    exact: Any, kinds: list[str], bits: tuple[int, int], wanted: tuple[int | None, int | None]
) -> None:
    recipe = rtn(weights=bits[0], activations=bits[1], samples=2, batch=2, ends="same")
    net = quantize(exact, recipe, steps=STEPS).pipe.denoiser
    findings = [Finding.of(kind, "", layer="middle") for kind in kinds]
    (rule,) = rules_for(findings, net, ["enter", "middle"])
    assert (rule.pattern, rule.weights, rule.activations) == ("middle", *wanted)
    assert yaml.safe_load(as_yaml([rule])) == {
        "rules": [{"pattern": "middle", "weights": wanted[0], "activations": wanted[1]}]
    }


def test_what_no_bits_can_mend_gets_no_rule() -> None:
    net = Net()
    findings = [
        Finding.of("dead_channels", "", layer="middle"),  # of a layer that is not quantized
        Finding.of("float16_overflow", "", layer="middle"),
        Finding.of("black_image", ""),
        Finding.of("not_finite", "", layer=""),  # the network as a whole
    ]
    assert rules_for(findings, net, ["enter", "middle"]) == ()


def test_of_a_fault_seen_in_several_batches_the_first_step_is_kept() -> None:
    seen = Sightings()
    seen.see("clipping", "a", 3, 0.3, 0.1, "third")
    seen.see("clipping", "b", 3, 0.5, 0.1, "other")
    seen.see("clipping", "a", 1, 0.2, 0.1, "first")
    seen.see("clipping", "a", 3, 0.4, 0.1, "third again")
    one, two = seen.findings()
    assert (one.layer, one.step, one.value, one.what, one.steps) == ("a", 1, 0.2, "first", 2)
    assert (two.layer, two.step, two.steps) == ("b", 3, 1)


def test_what_a_quantizer_cuts_off_by_hand() -> None:
    """Levels 0 to 3 of scale 1 and zero point 1 hold -1 to 2: of -4, -1.4, 0.25 and 3 two are outside."""
    x = torch.tensor([-4.0, -1.4, 0.25, 3.0])
    share, lost, rounded = clipping_losses(x, QParams(torch.tensor([1.0]), torch.tensor([1.0])), QuantSpec(2))
    norm = float(x.norm())
    assert share == 0.5
    assert lost == pytest.approx((3**2 + 1) ** 0.5 / norm)
    assert rounded == pytest.approx((0.4**2 + 0.25**2) ** 0.5 / norm)
    assert clipping_losses(torch.zeros(3), QParams(torch.ones(1), torch.zeros(1)), QuantSpec(2)) == (0, 0, 0)


def test_pipelines_of_other_schedules_are_refused(exact: Any) -> None:
    other = DenoiserPipeline(exact.denoiser, DDIMScheduler(), (2, 8, 8))
    with pytest.raises(SpecError, match="prediction_type"):
        examined(other, exact)
    with pytest.raises(SpecError, match="0 seeds"):
        examined(exact, seeds=[])


def test_memory_does_not_grow_with_images(quantized: Any) -> None:
    """Tensors that are alive after sampling, with the hooks still in place: a hook that kept activations would show."""

    def alive(images: int) -> int:
        with watching(quantized.denoiser, quantized.scheduler, Thresholds()) as health:
            sample(quantized, seeds=range(images), steps=STEPS, batch_size=2)
            gc.collect()
            assert health.findings() == []
            return sum(thing.numel() for thing in gc.get_objects() if type(thing) is Tensor)

    assert alive(2) == alive(8)


def test_a_rule_keeps_the_group_size_of_the_weight(exact: Any) -> None:
    net = quantize(exact, rtn(weights=4, activations=4, group_size=2, samples=2, batch=2), steps=STEPS).pipe.denoiser
    (rule,) = rules_for([Finding.of("clipping", "", layer="middle")], net, ["middle"])
    assert rule == LayerRule("middle", 4, 8, group_size=2)
    assert yaml.safe_load(as_yaml([rule]))["rules"][0]["group_size"] == 2
    (rule,) = rules_for([Finding.of("degenerate_scale", "", layer="middle")], net, ["middle"])
    assert rule == LayerRule("middle", None, None)


@pytest.mark.parametrize("plant", ["decoder", None])
def test_a_fault_of_another_part_than_the_denoiser_is_named(plant: str | None) -> None:
    family = FAMILIES["sd15"]
    pipe = family.build()
    if plant is not None:
        pipe.vae.decoder.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] = torch.nan
    diagnosis = examine(pipe, seeds=[0, 1], steps=2, batch_size=2, arguments=family.arguments())
    assert not any(module._forward_hooks for module in pipe.vae.modules())
    found = [(finding.kind, finding.layer, finding.step) for finding in diagnosis.findings]
    assert diagnosis.rules == ()
    if plant is None:
        assert found == []
        return
    layer = "vae.decoder.mid_block.resnets.0.conv1"
    assert found == [("not_finite_weight", layer, None), ("not_finite", layer, None), ("black_image", None, None)]


def test_the_first_part_that_breaks_is_named(patient: Any) -> None:
    """The text encoder runs before the denoiser's first step, the decoder after its last one."""
    health, bad = Health(patient.denoiser, Thresholds()), torch.tensor([torch.nan])
    layer = nn.Linear(1, 1)
    health.step = 2
    health.see_other("vae.conv", layer, (), bad)
    health.step = 0
    health.see_other("text_encoder.layer", layer, (), (bad, torch.zeros(1)))
    health.see_output("middle", layer, (), bad)
    assert [(finding.layer, finding.step) for finding in health.findings()] == [("text_encoder.layer", None)]
    health = Health(patient.denoiser, Thresholds())
    health.see_other("text_encoder.mask", layer, (), (torch.zeros(1), torch.tensor([-torch.inf])))
    assert health.findings() == []


def test_outliers_of_a_quantized_tensor_count_by_what_they_cost_the_others(patient: Any) -> None:
    """One of 8 channels is 40 times as large: a level of 256 is 80 / 255, which leaves an error of a seventh."""
    x = torch.linspace(-1, 1, 1001).repeat(2, 8, 1).movedim(1, -1).clone()
    x[..., 2] *= 40
    health = Health(patient.denoiser, Thresholds())
    health.see_outliers("fine", -1, x, 256)
    assert health.findings() == []
    health.see_outliers("coarse", -1, x, 64)
    (finding,) = health.findings()
    assert (finding.kind, finding.layer) == ("outlier_channels", "coarse")
    assert finding.value == pytest.approx(40)
    level = 80 / 63
    others = x[..., 0]
    lost = float((others - level * torch.round(others / level)).norm() / others.norm())
    assert f"rounding costs the others {100 * lost:.0f} % of their norm" in finding.what


def test_pipelines_of_other_dtypes_are_refused(exact: Any) -> None:
    other = pipeline(copy.deepcopy(exact.denoiser).double())
    with pytest.raises(SpecError, match="denoiser is float64, the full-precision one float32: load both"):
        examined(other, exact)
