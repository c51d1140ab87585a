"""Clock, quantizers, layers, surgery, explicit attention and assembly."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from stepquant.errors import ModelError, SpecError
from stepquant.model.assembly import assemble_, describe
from stepquant.model.clock import StepClock, attach_clock, clock_of, edges_between
from stepquant.model.families import ExplicitAttention, make_attention_explicit_, timestep_argument
from stepquant.model.layer import Geometry, Matmul, QuantizedLayer, geometry_of
from stepquant.model.quantizer import DynamicQuantizer, InputQuantizer, WeightQuantizer
from stepquant.model.surgery import (
    Rule,
    check_finite,
    execution_order,
    make_plan,
    quantizable,
    standard_rules,
    swap_layers_,
    units_of,
)
from stepquant.numerics.affine import QParams, choose_qparams
from stepquant.numerics.spec import LayerScheme, QuantSpec, scheme_for
from tiny import TinyNet, quantize_, tiny_unet

# ---- clock


def test_bins_by_hand() -> None:
    clock = StepClock(edges_between(torch.tensor([0, 100, 300, 100])))
    assert clock.edges.tolist() == [50.0, 200.0]
    assert clock.bins == 3
    for timestep, wanted in ((0, 0), (50, 0), (51, 1), (200.0, 1), (torch.tensor(999), 2)):
        clock.set(timestep)
        assert clock.bin.tolist() == [wanted]
    clock.set(torch.tensor([999, 0, 60]))
    assert clock.bin.tolist() == [2, 0, 1]


def test_one_timestep_has_one_bin() -> None:
    clock = StepClock(edges_between(torch.tensor([500])))
    clock.set(3)
    assert (clock.bins, clock.bin.tolist()) == (1, [0])


def test_the_hook_of_a_copy_sets_the_clock_of_the_copy() -> None:
    one = quantize_(TinyNet())
    other = copy.deepcopy(one)
    other(torch.randn(1, 2, 4, 4), timestep=999)
    assert (int(clock_of(one).bin), int(clock_of(other).bin)) == (0, 4)  # type: ignore[union-attr]
    assert other.conv.input_quantizer.clock is clock_of(other)
    with pytest.raises(ModelError, match="without its timestep argument 'timestep'"):
        one(torch.randn(1, 2, 4, 4))
    with pytest.raises(ModelError, match="already has a step clock"):
        attach_clock(one, StepClock(torch.tensor([1.0])))


@pytest.mark.parametrize("cast", [lambda model: model.half(), lambda model: model.to(torch.bfloat16)])
def test_half_precision_keeps_scales_and_borders_in_float32(cast: Any) -> None:
    quantized = quantize_(TinyNet(), LayerScheme(QuantSpec(4, "channel"), QuantSpec(8)))
    before = {key: value.clone() for key, value in quantized.state_dict().items() if "quantizer" in key}
    edges = quantized.stepquant_clock.edges.clone()
    cast(quantized)
    assert quantized.conv.weight.dtype in (torch.float16, torch.bfloat16)
    assert quantized.stepquant_clock.edges.dtype == torch.float32
    assert torch.equal(quantized.stepquant_clock.edges, edges)
    for key, value in quantized.state_dict().items():
        if "quantizer" in key:
            assert value.dtype == before[key].dtype
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_a_batch_of_mixed_timesteps_equals_one_by_one(rows: int) -> None:
    # In double precision: in float32 a batched convolution rounds otherwise, and one flipped level changes the image.
    unet = nn.Module.to(quantize_(tiny_unet(), rows=rows), torch.float64)
    sample, timesteps = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 999, 300, 600])
    with torch.no_grad():
        mixed = unet(sample, timesteps).sample
        single = torch.cat([unet(sample[i : i + 1], timesteps[i]).sample for i in range(4)])
    torch.testing.assert_close(mixed, single, rtol=0, atol=1e-9)


def test_timestep_argument_is_found() -> None:
    assert timestep_argument(tiny_unet()) == ("timestep", 1)
    assert timestep_argument(TinyNet()) == ("timestep", 1)
    with pytest.raises(ModelError, match="no timestep argument"):
        timestep_argument(nn.Linear(1, 1))


# ---- quantizers


def test_each_sample_uses_its_own_row() -> None:
    clock, spec = StepClock(torch.tensor([500.0])), QuantSpec(8)
    quantizer = InputQuantizer(spec, clock, QParams(torch.tensor([1.0, 10.0]), torch.zeros(2)), torch.tensor([0, 1]))
    clock.set(torch.tensor([0, 999]))
    assert quantizer(torch.full((2, 1), 14.0)).flatten().tolist() == [14.0, 10.0]
    # Attention heads are folded into the batch: sample-major, two heads each.
    assert quantizer(torch.full((4, 1), 14.0)).flatten().tolist() == [14.0, 14.0, 10.0, 10.0]
    clock.set(999)
    assert quantizer(torch.full((2, 1), 14.0)).flatten().tolist() == [10.0, 10.0]


def test_quantizers_refuse_specs_of_another_kind() -> None:
    clock, params = StepClock(torch.tensor([500.0])), QParams(torch.ones(1), torch.zeros(1))
    with pytest.raises(SpecError, match="one scale per tensor"):
        InputQuantizer(QuantSpec(8, "token", dynamic=True), clock, params)
    with pytest.raises(SpecError, match="each of the 2 bins, found 3"):
        InputQuantizer(QuantSpec(8), clock, params, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(SpecError, match="per tensor or per token"):
        DynamicQuantizer(QuantSpec(8))


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(4, "tensor"),
        QuantSpec(4, "channel"),
        QuantSpec(3, "group", group_size=9),
        QuantSpec(8, "channel", symmetric=True),
    ],
)
def test_levels_restore_the_weight_on_its_grid(spec: QuantSpec) -> None:
    from stepquant.numerics.affine import range_of

    weight = torch.randn(4, 2, 3, 3)
    quantizer = WeightQuantizer(spec, choose_qparams(*range_of(weight, spec), spec))
    on_grid = quantizer(weight)
    levels = quantizer.levels(on_grid)
    assert levels.dtype == torch.int16
    assert spec.qmin <= int(levels.min()) <= int(levels.max()) <= spec.qmax
    assert torch.equal(levels, quantizer.levels(weight))
    assert torch.equal(quantizer.restore(levels), on_grid)


def test_a_dynamic_quantizer_takes_the_range_of_each_sample_and_token() -> None:
    x = torch.tensor([[[0.0, 1.0], [0.0, 100.0]], [[0.0, 7.0], [-3.0, 0.0]]])
    token = DynamicQuantizer(QuantSpec(2, "token", dynamic=True))(x)
    torch.testing.assert_close(token, x)
    sample = DynamicQuantizer(QuantSpec(2, dynamic=True))(x)
    torch.testing.assert_close(sample[0], torch.tensor([[0.0, 0.0], [0.0, 100.0]]))
    assert torch.equal(sample[1:], DynamicQuantizer(QuantSpec(2, dynamic=True))(x[1:]))


# ---- layers


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (3, 5, 6)),
        (nn.Linear(6, 4, bias=False), (2, 6)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding="same", groups=2), (2, 4, 7, 7)),
        (nn.Conv2d(4, 6, 3, padding="valid", dilation=2), (2, 4, 7, 7)),
        (nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode="reflect"), (2, 4, 7, 7)),
        (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 7)),
    ],
)
def test_a_layer_without_quantizers_computes_what_the_float_layer_does(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    quantized = QuantizedLayer(geometry_of(layer), layer.weight.detach(), layer.bias)
    torch.testing.assert_close(quantized(x), layer(x))
    assert quantized.in_features == shape[1 if layer.weight.ndim > 2 else -1]


def test_a_layer_quantizes_both_operands() -> None:
    layer = QuantizedLayer(Geometry("linear"), torch.tensor([[1.4, -1.4]]), None)
    layer.weight_quantizer = WeightQuantizer(QuantSpec(4, symmetric=True), QParams(torch.ones(1, 1), torch.zeros(1, 1)))
    layer.input_quantizer = InputQuantizer(
        QuantSpec(8), StepClock(torch.empty(0)), QParams(torch.tensor([2.0]), torch.tensor([0.0]))
    )
    assert layer(torch.tensor([[4.9, 3.1]])).item() == (1 * 4 - 1 * 4)
    assert layer(torch.tensor([[4.9, 0.9]])).item() == 4
    layer.harden_()
    assert layer.on_grid
    assert layer.weight.tolist() == [[1.0, -1.0]]
    assert layer(torch.tensor([[4.9, 0.9]])).item() == 4
    soft = QuantizedLayer(Geometry("linear"), torch.zeros(1, 1), None)
    soft.weight_quantizer = nn.Identity()
    with pytest.raises(ModelError, match="still holds Identity"):
        soft.harden_()


def test_only_known_layers_have_a_geometry() -> None:
    with pytest.raises(ModelError, match="found GroupNorm"):
        geometry_of(nn.GroupNorm(1, 1))


# ---- surgery


def test_rules_last_one_wins_and_each_must_match() -> None:
    unet = tiny_unet()
    make_attention_explicit_(unet)
    plan = make_plan(unet, [Rule("*", scheme_for(4, 8)), Rule("conv_*", LayerScheme())])
    assert "conv_in" not in plan
    assert plan["mid_block.resnets.0.conv1"] == scheme_for(4, 8)
    values = plan["mid_block.attentions.0.processor.values"]
    assert values.weight is None
    assert values.input == QuantSpec(8, nonnegative=True)
    assert values.second == QuantSpec(8)
    with pytest.raises(SpecError, match=r"'convin' matches none of the \d+ quantizable layers. Did you mean 'conv_in'"):
        make_plan(unet, [Rule("convin", scheme_for(4, 8))])
    with pytest.raises(SpecError, match=r"Layer conv_in: group_size 7 does not divide the 9 weights"):
        make_plan(unet, [Rule("conv_in", LayerScheme(QuantSpec(4, "group", group_size=7)))])
    with pytest.raises(ModelError, match="has no Linear"):
        make_plan(nn.GroupNorm(1, 1), [Rule("*", scheme_for(4, 8))])


def test_standard_rules_keep_the_ends_at_eight_bits() -> None:
    unet = tiny_unet()
    names = list(quantizable(unet))
    eight = LayerScheme(QuantSpec(8, "channel"), QuantSpec(8))
    for ends, wanted in (("8bit", eight), ("same", scheme_for(4, 4)), ("full", None)):
        plan = make_plan(unet, standard_rules(scheme_for(4, 4), names, ends=ends))  # type: ignore[arg-type]
        assert plan.get("conv_in") == plan.get("conv_out") == wanted


def test_weights_of_eight_bits_have_a_zero_point_at_the_ends_only() -> None:
    unet = tiny_unet()
    names = list(quantizable(unet))
    plan = make_plan(unet, standard_rules(scheme_for(8, 8), names))
    found = {name for name, scheme in plan.items() if scheme.weight is not None and not scheme.weight.symmetric}
    assert found == {"conv_in", "conv_out"}
    # What was asked for otherwise stays so, at the ends too.
    for weight in (QuantSpec(4, "channel", symmetric=True), QuantSpec(8, "tensor", symmetric=True)):
        plan = make_plan(unet, standard_rules(LayerScheme(weight, QuantSpec(8)), names))
        assert plan["conv_out"].weight == replace(weight, bits=8)
    grouped = standard_rules(scheme_for(4, 8, 3), names)[-1].scheme
    assert grouped.weight == QuantSpec(8, "group", group_size=3)


def test_standard_rules_say_what_they_know() -> None:
    unet = tiny_unet()
    names = list(quantizable(unet))
    with pytest.raises(SpecError, match=r"ends must be .* found '8bits'.*Did you mean '8bit'"):
        standard_rules(scheme_for(4, 4), names, ends="8bits")  # type: ignore[arg-type]


def test_a_layer_in_two_places_is_swapped_in_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 2)
            self.two = self.one

    net = Twice()
    swap_layers_(net, {"one": scheme_for(4, 8)})
    assert isinstance(net.one, QuantizedLayer)
    assert net.one is net.two
    with pytest.raises(ModelError, match="'three', which Twice does not have"):
        swap_layers_(net, {"three": scheme_for(4, 8)})


def test_subclasses_and_multihead_attention_are_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.ModuleDict({"own": Scaled(2, 2), "mha": nn.MultiheadAttention(2, 1), "plain": nn.Linear(2, 2)})
    assert set(quantizable(net)) == {"plain"}


def test_nan_weights_are_named() -> None:
    unet = tiny_unet()
    check_finite(unet)
    unet.conv_out.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"conv_out\.weight of UNet2DModel holds 9 of 72 values"):
        check_finite(unet)


def test_order_and_units_follow_execution() -> None:
    unet = tiny_unet()
    order = execution_order(unet, list(quantizable(unet)), (torch.randn(1, 1, 8, 8), 5), {})
    assert order[:3] == ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in"]
    assert order[-1] == "conv_out"
    units = units_of(unet, order)
    assert [layer for unit in units for layer in unit.layers if unit.name == layer] == [
        name for name in order if name in ("conv_in", "conv_out") or "sampler" in name
    ]
    assert sorted(layer for unit in units for layer in unit.layers) == sorted(order)


# ---- explicit attention


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_num_groups": 2, "residual_connection": True, "rescale_output_factor": 2.0, "bias": True},
        {"scale_qk": True, "upcast_softmax": True},
    ],
)
def test_explicit_attention_equals_diffusers(processor: Any, options: dict[str, Any]) -> None:
    attention = Attention(query_dim=8, heads=2, dim_head=4, processor=processor(), **options).eval()
    explicit = copy.deepcopy(attention)
    assert make_attention_explicit_(explicit) == []
    assert isinstance(explicit.processor, ExplicitAttention)
    inputs: list[tuple[Tensor, dict[str, Any]]] = [(torch.randn(2, 5, 8), {})]
    if "norm_num_groups" in options:
        inputs.append((torch.randn(2, 8, 3, 3), {}))
    mask = F.pad(torch.zeros(2, 1, 3), (0, 2), value=-10_000.0)
    inputs.append((torch.randn(2, 5, 8), {"attention_mask": mask}))
    for sample, extra in inputs:
        with torch.no_grad():
            torch.testing.assert_close(explicit(sample, **extra), attention(sample, **extra), rtol=1e-6, atol=1e-6)


def test_queries_and_keys_are_normalized() -> None:
    attention = Attention(query_dim=8, heads=2, dim_head=4, qk_norm="layer_norm", processor=AttnProcessor2_0()).eval()
    nn.init.normal_(attention.norm_q.weight)
    explicit = copy.deepcopy(attention)
    make_attention_explicit_(explicit)
    sample = torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(explicit(sample), attention(sample), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("processor", "options"), [(AttnProcessor, {"qk_norm": "layer_norm"}), (AttnProcessor2_0, {"scale_qk": False})]
)
def test_processors_that_ignore_what_the_attention_says_are_left(processor: Any, options: dict[str, Any]) -> None:
    attention = Attention(query_dim=8, heads=2, dim_head=4, processor=processor(), **options)
    assert make_attention_explicit_(nn.ModuleDict({"inner": attention})) == ["inner"]


def test_explicit_cross_attention_equals_diffusers() -> None:
    attention = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4, cross_attention_norm="layer_norm")
    explicit = copy.deepcopy(attention)
    make_attention_explicit_(explicit)
    sample, context = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    with torch.no_grad():
        torch.testing.assert_close(
            explicit(sample, encoder_hidden_states=context),
            attention(sample, encoder_hidden_states=context),
            rtol=1e-6,
            atol=1e-6,
        )


def test_explicit_attention_gets_the_time_embedding() -> None:
    """`spatial_norm` needs `temb`, and diffusers drops what the signature of the processor's call does not name."""
    attention = Attention(query_dim=32, heads=2, dim_head=4, spatial_norm_dim=4, processor=AttnProcessor()).eval()
    explicit = copy.deepcopy(attention)
    make_attention_explicit_(explicit)
    sample, temb = torch.randn(2, 32, 3, 3), torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(explicit(sample, temb=temb), attention(sample, temb=temb), rtol=1e-6, atol=1e-6)


def test_an_unknown_processor_is_left_and_named() -> None:
    class Own:
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden_states

    net = nn.ModuleDict({"inner": Attention(query_dim=8, heads=2, dim_head=4, processor=Own())})
    assert make_attention_explicit_(net) == ["inner"]
    assert not any(isinstance(module, Matmul) for module in net.modules())


# ---- assembly


@pytest.mark.parametrize(
    "scheme",
    [
        scheme_for(4, 8),
        scheme_for(None, 4),
        LayerScheme(QuantSpec(3, "group", group_size=3, symmetric=True), QuantSpec(8, "token", dynamic=True)),
    ],
)
def test_a_described_model_is_assembled_again(scheme: LayerScheme) -> None:
    options: dict[str, Any] = {"ends": "same"} if scheme.weight and scheme.weight.group_size else {}
    net = nn.ModuleDict({"a": nn.Linear(6, 6)}) if options else tiny_unet()
    if options:
        swap_layers_(net, {"a": scheme})
        attach_clock(net, StepClock(torch.tensor([5.0])))
        net["a"].weight_quantizer = WeightQuantizer(
            scheme.weight,  # type: ignore[arg-type]
            QParams(torch.ones(6, 2, 1), torch.zeros(6, 2, 1)),
        )
        net["a"].input_quantizer = DynamicQuantizer(scheme.input)  # type: ignore[arg-type]
        again: Any = nn.ModuleDict({"a": nn.Linear(6, 6)})
    else:
        quantize_(net, scheme)
        again = tiny_unet(seed=1)
    structure = describe(net)
    assemble_(again, structure)
    assert describe(again) == structure
    again.load_state_dict(net.state_dict())
    if not options:
        for layer in (module for module in again.modules() if isinstance(module, QuantizedLayer)):
            layer.on_grid = layer.weight_quantizer is not None
        sample = torch.randn(2, 1, 8, 8)
        assert torch.equal(again(sample, 300).sample, net(sample, 300).sample)


def test_what_is_not_hardened_has_no_structure() -> None:
    net = quantize_(TinyNet())
    net.conv.input_quantizer = nn.Identity()
    with pytest.raises(ModelError, match="The input of conv holds Identity, which is only for calibration"):
        describe(net)
    with pytest.raises(ModelError, match="no step clock"):
        describe(TinyNet())
