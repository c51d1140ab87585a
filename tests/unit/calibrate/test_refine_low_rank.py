"""LSGQuant's parts: ranges of channels and tokens, sensitivity tiers, and refinement of weight and branch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepquant.api import Quantized, load, quantize, sample
from stepquant.calibrate.balance import RotateChannels
from stepquant.calibrate.dynamic import DynamicInputs
from stepquant.calibrate.layer_inputs import output_error, rounded_inputs
from stepquant.calibrate.low_rank import AddLowRank
from stepquant.calibrate.refine_low_rank import RefineLowRank, refine_layer_, sensitivity_of, tier_of
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.engines.base import choose
from stepquant.errors import CalibrationError, SpecError
from stepquant.methods.baseline import start
from stepquant.model.layer import LowRankBranch, QuantizedLayer, geometry_of
from stepquant.model.quantizer import DynamicQuantizer, WeightQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.model.transform import InputTransform
from stepquant.numerics.affine import choose_qparams, range_of
from stepquant.numerics.spec import QuantSpec
from stepquant.recipe import Recipe
from stepquant.run import Run
from tiny_dit import TinyDiT, tiny_dit_pipe

STEPS = 3
BOTH = QuantSpec(4, "channel_token", symmetric=True, dynamic=True)
FF = "transformer.transformer_blocks.0.ff.net.0.proj"
TIME = "transformer.transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"


# ---- ranges of channels and tokens


def by_hand(x: Tensor, bits: int) -> Tensor:
    """The paper's formulas for one sample `[N, C]`, in float64, one value at a time."""
    most = 2 ** (bits - 1) - 1
    wide = x.double()
    found = torch.empty_like(wide)
    s = [float(wide[:, c].abs().max()) for c in range(x.shape[1])]
    for n in range(len(x)):
        d = max(abs(float(wide[n, c])) / s[c] for c in range(x.shape[1]))
        for c in range(x.shape[1]):
            q = max(-most, min(most, round(most * (float(wide[n, c]) / s[c]) / d)))
            found[n, c] = q / most * d * s[c]
    return found


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 3, 4, 6)])
def test_it_is_the_papers_quantizer(bits: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(-3, 2, shape[-1]) * torch.rand(*shape[:-1], 1)
    found = DynamicQuantizer(QuantSpec(bits, "channel_token", symmetric=True, dynamic=True))(x)
    for own, rounded in zip(x, found, strict=True):
        torch.testing.assert_close(
            rounded.reshape(-1, shape[-1]).double(), by_hand(own.reshape(-1, shape[-1]), bits), rtol=1e-5, atol=1e-9
        )


def test_samples_of_a_batch_do_not_depend_on_one_another() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 6, 4) * torch.tensor([1.0, 100.0]).reshape(2, 1, 1)
    quantizer = DynamicQuantizer(BOTH)
    assert torch.equal(quantizer(x)[:1], quantizer(x[:1]))


def test_loud_channels_cost_the_others_nothing() -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 16, 8)
    loud = x * torch.where(torch.arange(8) == 3, 1000.0, 1.0)
    quantizer = DynamicQuantizer(BOTH)
    torch.testing.assert_close(quantizer(loud)[..., :3], quantizer(x)[..., :3])
    per_token = DynamicQuantizer(QuantSpec(4, "token", dynamic=True))
    assert float(per_token(loud)[..., :3].abs().max()) == 0


@pytest.mark.parametrize("shape", [(3, 8), (3, 1, 8)])
def test_a_single_token_has_no_channel_scales(shape: tuple[int, ...]) -> None:
    """They would be the token itself, in full precision."""
    torch.manual_seed(3)
    x = torch.randn(shape)
    found = DynamicQuantizer(BOTH)(x)
    assert float((found - x).abs().max()) > 1e-2
    assert len(found[0].unique()) <= 15
    scale = x.abs().amax(-1, keepdim=True) / 7
    torch.testing.assert_close(found, torch.round(x / scale) * scale)


def test_zeros_stay_zeros_and_half_precision_stays_half() -> None:
    x = torch.zeros(2, 3, 4)
    assert torch.equal(DynamicQuantizer(BOTH)(x), x)
    half = torch.randn(2, 3, 4, dtype=torch.float16)
    assert DynamicQuantizer(BOTH)(half).dtype == torch.float16


def test_gradients_pass_straight_through() -> None:
    torch.manual_seed(4)
    x = torch.randn(2, 5, 4, requires_grad=True)
    up = torch.randn(2, 5, 4)
    (DynamicQuantizer(BOTH)(x) * up).sum().backward()
    torch.testing.assert_close(x.grad, up)


def test_patches_count_as_one_sample() -> None:
    torch.manual_seed(5)
    patches = torch.randn(9, 4) * torch.tensor([1.0, 50.0, 0.1, 3.0])
    torch.testing.assert_close(rounded_inputs(patches, BOTH).double(), by_hand(patches, 4), rtol=1e-5, atol=1e-9)


def test_such_specs_are_symmetric_and_of_run_time() -> None:
    for options in ({"dynamic": True}, {"symmetric": True}, {}):
        with pytest.raises(SpecError, match="channel_token"):
            QuantSpec(4, "channel_token", **options)


# ---- sensitivity


def test_sensitivity_by_hand() -> None:
    # Channel means of three samples: variances 8/3 and 0.
    assert sensitivity_of(torch.tensor([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0]])) == pytest.approx(4 / 3)
    assert sensitivity_of(torch.tensor([[3.0, 5.0]])) == 0
    assert [tier_of(value) for value in (0.0, 0.001, 0.0011, 0.075, 0.076)] == [
        "frozen", "frozen", "light", "light", "free",
    ]  # fmt: skip


# ---- refinement


def layer_with_branch(kind: str, *, block: int | None = 4) -> tuple[QuantizedLayer, Tensor, Tensor]:
    """A hardened layer of 3 bits with a transform and a branch, its full-precision weight, and patches."""
    torch.manual_seed(6)
    module: Any = nn.Linear(8, 12) if kind == "linear" else nn.Conv2d(8, 12, 3)
    weight = module.weight.detach().clone()
    layer = QuantizedLayer(geometry_of(module), weight.clone(), module.bias.detach())
    layer.input_transform = InputTransform(8, layer.geometry.channel_axis, scale=torch.linspace(0.5, 2, 8), block=block)
    size = weight[0].numel()
    down, up = 0.1 * torch.randn(2, *weight.shape[1:]), 0.1 * torch.randn(12, 2)
    layer.branch = LowRankBranch(layer.geometry, down.half().float(), up.half().float())
    target = layer.folded(weight)
    spec = QuantSpec(3, "channel")
    layer.weight.data = target
    layer.weight_quantizer = WeightQuantizer(spec, choose_qparams(*range_of(target, spec), spec))
    layer.harden_()
    patches = torch.randn(400, size) @ torch.randn(size, size) / size**0.5
    return layer, weight, patches


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_refinement_lowers_the_error_on_inputs_it_has_not_seen(kind: str) -> None:
    layer, weight, patches = layer_with_branch(kind)
    fresh = patches[300:]
    before = output_error(layer, fresh, weight, None)
    figures = refine_layer_(
        layer, weight, patches[:300], None, iterations=200, lr_levels=0.02, lr_branch=1e-2, until_converged=False
    )
    assert figures["iterations"] == 200
    assert figures["after"] < 0.9 * figures["before"]
    assert output_error(layer, fresh, weight, None) < 0.95 * before
    # The layer is as a checkpoint needs it.
    quantizer: Any = layer.weight_quantizer
    assert layer.on_grid
    assert torch.equal(quantizer.restore(quantizer.levels(layer.weight)), layer.weight)
    assert layer.branch is not None
    for part in (layer.branch.down, layer.branch.up):
        assert torch.equal(part.half().float(), part)
    held = patches[:300][torch.arange(300) % 4 == 3]
    assert output_error(layer, held, weight, None) == pytest.approx(figures["after"], rel=1e-4)


def test_a_state_that_is_worse_is_not_taken() -> None:
    layer, weight, patches = layer_with_branch("linear")
    twin = copy.deepcopy(layer)
    figures = refine_layer_(
        layer, weight, patches, None, iterations=3, lr_levels=1e3, lr_branch=1e3, until_converged=False
    )
    assert figures["after"] == figures["before"]
    for name, tensor in twin.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor)


def test_converged_layers_stop() -> None:
    layer, weight, patches = layer_with_branch("linear")
    figures = refine_layer_(
        layer, weight, patches, None, iterations=5_000, lr_levels=0.0, lr_branch=0.0, until_converged=True
    )
    assert figures["iterations"] == 50


def test_the_gradient_is_that_of_the_output() -> None:
    """One step of Adam moves each value by its rate against the sign of the gradient, here by autograd in float64."""
    layer, weight, patches = layer_with_branch("linear", block=None)
    quantizer: Any = layer.weight_quantizer
    fit = patches[torch.arange(len(patches)) % 4 != 3].double()
    assert layer.branch is not None
    assert layer.input_transform is not None
    down, up = (part.detach().double().requires_grad_() for part in (layer.branch.down, layer.branch.up))
    x = fit / layer.input_transform.scale.double()
    found = x @ layer.weight.double().T + x @ down.T @ up.T
    (found - fit @ weight.double().T).square().sum().backward()
    before = layer.branch.down.detach().clone()
    refine_layer_(layer, weight, patches, None, iterations=1, lr_levels=0.0, lr_branch=1e-2, until_converged=False)
    moved = layer.branch.down.detach() - before
    size = 1e-2 * before.square().mean().sqrt()
    large = down.grad.abs() > 1e-3 * down.grad.abs().max()
    assert torch.equal(moved.sign()[large], -down.grad.sign()[large].float())
    torch.testing.assert_close(moved[large].abs(), size.expand(int(large.sum())), rtol=0.05, atol=0)
    assert quantizer.scale.grad is None


def test_only_hardened_layers_with_a_branch() -> None:
    layer, weight, patches = layer_with_branch("linear")
    layer.branch = None
    with pytest.raises(CalibrationError, match="AddLowRank"):
        refine_layer_(layer, weight, patches, None, iterations=1, lr_levels=0, lr_branch=0, until_converged=False)
    for options in ({"light": 0}, {"patches": 3}, {"lr_levels": -1.0}):
        with pytest.raises(SpecError):
            RefineLowRank(**options)  # type: ignore[arg-type]


# ---- the stages together


def ran(*stages: Any, **options: Any) -> Quantized:
    place = Place(4, 4, ends="same", rules=options.pop("rules", ()))
    beginning = start(Select(), place, samples=2, batch=2, ranges="minmax")
    return quantize(tiny_dit_pipe(), Recipe("test", (*beginning, *stages)), steps=STEPS, run=Run(), **options)


PARTS = (DynamicInputs(channels=True), RotateChannels(), AddLowRank(rank=2, refits=2))


def test_tiers_and_errors_of_a_transformer(tmp_path: Path) -> None:
    quantized = ran(*PARTS, RefineLowRank(light=5, most=60), FitInputRanges("minmax"))
    figures = next(entry for entry in quantized.figures if entry["stage"] == "RefineLowRank")
    assert len(figures["layers"]) > 5
    tiers = {entry["tier"]: entry["iterations"] for entry in figures["layers"].values()}
    assert "free" in tiers
    for entry in figures["layers"].values():
        assert entry["tier"] == tier_of(entry["sensitivity"])
        assert entry["after"] <= entry["before"]
        assert entry["iterations"] == 5 if entry["tier"] == "light" else entry["iterations"] <= 60
    layers: Any = quantized_layers(quantized.pipe.denoiser)
    assert layers[FF].input_quantizer.spec == BOTH
    assert layers["transformer.pos_embed.proj"].input_quantizer.spec == QuantSpec(4, dynamic=True)
    refusals = choose(layers[FF], torch.device("cpu")).refusals
    assert {"onednn", "int_mm", "openvino"} <= set(refusals)

    quantized.save(tmp_path / "q")
    text = (tmp_path / "q" / "stepquant.json").read_text()
    assert '"format_version": 2' in text
    assert '"granularity":"channel_token"' in text
    loaded = load(tmp_path / "q", denoiser=TinyDiT(seed=1), engine="simulated")
    images = [torch.as_tensor(sample(pipe, seeds=[1, 2], steps=STEPS)) for pipe in (quantized.pipe, loaded)]
    assert torch.equal(*images)


def test_sensitivities_are_those_of_the_layers_inputs() -> None:
    """Against means taken by hooks over the recorded calls."""
    quantized = ran(*PARTS, RefineLowRank(light=1, most=1))
    figures = next(entry for entry in quantized.figures if entry["stage"] == "RefineLowRank")["layers"]
    from stepquant.calibrate.stages import Record
    from stepquant.recipe import Job

    pipe = tiny_dit_pipe()
    job = Job(pipe, pipe.denoiser, copy.deepcopy(pipe.denoiser), Run(), STEPS)
    Record(samples=2, batch=2).run(job)
    seen: dict[str, list[Tensor]] = {FF: [], TIME: []}
    for name, means in seen.items():
        pipe.denoiser.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, means=means: means.append(args[0].reshape(len(args[0]), -1, args[0].shape[-1]).mean(1))
        )
    with torch.no_grad():
        for step in job.handed["trajectories"][0].steps:
            for call in step.calls:
                pipe.denoiser(*call.args, **call.kwargs)
    for name, means in seen.items():
        expected = torch.cat(means).var(0, unbiased=False).mean()
        assert figures[name]["sensitivity"] == pytest.approx(float(expected), rel=1e-4), name


def test_layers_without_a_branch_are_left_alone() -> None:
    quantized = ran(*PARTS, RefineLowRank(light=1, most=1), rules=(LayerRule("*.ff.*", None, 4),))
    figures = next(entry for entry in quantized.figures if entry["stage"] == "RefineLowRank")["layers"]
    assert figures
    assert not any(".ff." in name for name in figures)
