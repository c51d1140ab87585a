"""The search of timestep groups: its objective, what it learns, and that it can be interrupted."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, EDMEulerScheduler
from torch import Tensor, nn

import tiny
import tiny_pipelines
from stepquant.api import Quantized, load, quantize, sample
from stepquant.calibrate import group_search
from stepquant.calibrate.group_search import SearchGroups, _Search
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, LayerRule, Place, Record, Select
from stepquant.calibrate.timestep_groups import TimestepGroups
from stepquant.errors import SpecError, UnsupportedPipeline
from stepquant.methods import STAGES
from stepquant.methods.adp_dm import PRESETS, adp_dm
from stepquant.model.assembly import describe
from stepquant.model.layer import QuantizedLayer
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.recipe import Job, Recipe, recipe_from_dict
from stepquant.run import Run
from tiny import Interrupt

STEPS = 4


class LoudNet(nn.Module):
    """Samples [B, 2, 4, 4]. The inner activation is 30 times larger for t >= 500 than below."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Conv2d(2, 6, 3, padding=1)
        self.outer = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        time = torch.as_tensor(timestep).to(sample.dtype).reshape(-1, 1, 1, 1)
        gain = torch.where(time >= 500, 30.0, 1.0)
        return self.outer(torch.tanh(self.inner(sample)) * gain) / gain


def pipe_of(net: nn.Module | None = None, scheduler: Any = None) -> DenoiserPipeline:
    return DenoiserPipeline(net or LoudNet(), scheduler or DDIMScheduler(clip_sample=False), (2, 4, 4))


def recipe_of(activations: int | None = 4, samples: int = 4, **search: Any) -> Recipe:
    beginning = (
        Record(samples, 2),
        Select(),
        Place(8, activations, ends="same"),
        FitWeightRanges("minmax"),
        FitInputRanges("minmax"),
    )
    return Recipe("search", (*beginning, SearchGroups(**search)))


def job_before_the_search(recipe: Recipe, pipe: Any) -> Job:
    job = Job(pipe, pipe.denoiser, copy.deepcopy(pipe.denoiser).requires_grad_(False), Run(), STEPS)
    for stage in recipe.stages[:-1]:
        stage.run(job)
    return job


@pytest.mark.parametrize("granularity", ["timestep", "timestep+channel"])
@pytest.mark.parametrize("target", ["noise", "full_precision"])
def test_an_update_descends_the_written_objective(granularity: Any, target: Any) -> None:
    pipe = pipe_of()
    recipe = recipe_of(groups=3, granularity=granularity, target=target, entropy=0.7, lr=0.0, lr_logits=0.0)
    search = _Search.begin(recipe.stages[-1], job_before_the_search(recipe, pipe))  # type: ignore[arg-type]
    trajectory = search.job.handed["trajectories"][0]
    for module in search.searching.values():
        for row in module.shares.logits:
            row.data.normal_()
    loss = search._update(trajectory, 1, Run().generator("a"))
    found = [parameter.grad for parameter in search._variables().values()]

    step = trajectory.steps[1]
    alpha_bar = pipe.scheduler.alphas_cumprod[int(step.timestep)]
    image = trajectory.steps[-1].next_sample
    noise = torch.randn(image.shape, generator=Run().generator("a"))
    x_t = alpha_bar.sqrt() * image + (1 - alpha_bar).sqrt() * noise
    wanted = noise if target == "noise" else pipe.denoiser(x_t, step.timestep).detach()
    error = search.job.denoiser(x_t, step.timestep) - wanted
    task = error.square().sum((1, 2, 3)).mean()
    assert loss == pytest.approx(float(task.detach()), rel=1e-5)
    here = int(search.job.denoiser.stepquant_clock.bin)
    entropy = torch.zeros(())
    for module in search.searching.values():
        share = module.shares.logits[here].softmax(0)
        each = -share * share.log()
        entropy = entropy + (each.sum() if granularity == "timestep" else each.mean())
    variables = list(search._variables().values())
    expected = torch.autograd.grad(task + 0.7 * entropy, variables, allow_unused=True)
    used = 0
    for name, one, other in zip(search._variables(), found, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            used += int(other.any())
    assert used >= 2 * (4 if granularity == "timestep" else 1)


def searched(**search: Any) -> tuple[Quantized, dict[str, Any]]:
    quantized = quantize(pipe_of(), recipe_of(**search), steps=STEPS)
    return quantized, quantized.figures[-1]


def prediction_error(quantized: Quantized) -> float:
    """Mean squared error of the prediction over timesteps, on fresh noise."""
    net = LoudNet()
    x = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(7))
    errors = [(quantized.pipe.denoiser(x, t) - net(x, t)).square().mean() for t in (0, 250, 500, 750)]
    return float(torch.stack(errors).mean().detach())


@pytest.mark.parametrize(
    "options",
    [
        {"target": "full_precision"},
        {"target": "full_precision", "harden": "average", "choose": "mmd"},
        {"target": "full_precision", "granularity": "timestep+channel", "harden": "average", "choose": "count"},
    ],
)
def test_loud_and_quiet_timesteps_get_ranges_of_their_own(options: dict[str, Any]) -> None:
    quantized, figures = searched(rounds=12, groups=4, lr_logits=0.3, entropy=0.05, **options)
    outer = quantized.pipe.denoiser.outer.input_quantizer
    assert isinstance(outer, InputQuantizer)
    of_timestep = outer.scale[outer.row_of_bin].reshape(4, -1).mean(1)
    assert figures["timesteps"] == [0.0, 250.0, 500.0, 750.0]
    assert float(of_timestep[2:].min()) > 5 * float(of_timestep[:2].max())
    shared = quantize(pipe_of(), Recipe("shared", recipe_of().stages[:-1]), steps=STEPS)
    assert prediction_error(quantized) < 0.7 * prediction_error(shared)
    assert figures["rounds"][-1]["entropy"] < figures["rounds"][0]["entropy"] < math.log(4)


@pytest.mark.parametrize("granularity", ["timestep", "timestep+channel"])
def test_a_prior_starts_at_the_observed_range(granularity: Any) -> None:
    quantized, _ = searched(rounds=0, prior=3.0, groups=4, granularity=granularity, ranges="minmax")
    outer = quantized.pipe.denoiser.outer.input_quantizer
    of_timestep = outer.scale[outer.row_of_bin].reshape(4, -1).mean(1)
    assert float(of_timestep[2:].min()) > 10 * float(of_timestep[:2].max())
    undecided, _ = searched(rounds=0, groups=4, granularity=granularity, ranges="minmax")
    outer = undecided.pipe.denoiser.outer.input_quantizer
    if granularity == "timestep":
        assert outer.rows == 1  # the narrowest range for all: nothing is known yet


def test_figures_count_rounds_and_evaluations() -> None:
    _, figures = searched(rounds=6, focus=2, choose="uniform")
    assert figures["counts"] == [2, 1, 2, 1]
    assert [entry["timestep"] for entry in figures["rounds"]] == [0.0, 0.0, 250.0, 500.0, 500.0, 750.0]
    assert figures["quantizers"] == 2
    assert set(figures["rows"]) == {"inner.input_quantizer", "outer.input_quantizer"}
    # Observing both images at every step, then 4 + 2 updates a round, each forward and backward on 2 images.
    assert figures["evaluations"] == 2 * STEPS + 6 * (STEPS + 2) * 2 * 3
    _, figures = searched(rounds=1, focus=0, target="full_precision", choose="mmd")
    assert figures["evaluations"] == 2 * STEPS + 2 * STEPS + STEPS * 2 * 4


def test_only_matching_layers_are_searched() -> None:
    quantized, figures = searched(rounds=1, layers=("out*",))
    assert set(figures["rows"]) == {"outer.input_quantizer"}
    before = quantize(pipe_of(), Recipe("shared", recipe_of().stages[:-1]), steps=STEPS).pipe.denoiser
    assert torch.equal(quantized.pipe.denoiser.inner.input_quantizer.scale, before.inner.input_quantizer.scale)
    assert quantized.pipe.denoiser.inner.input_quantizer.rows == 1


class Guided:
    """A pipeline with classifier-free guidance over a doubled batch and a learnt variance."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser
        self.scheduler = DDIMScheduler(clip_sample=False)

    @torch.no_grad()
    def __call__(self, *, batch_size: int, num_inference_steps: int, generator: list[torch.Generator]) -> Any:
        x = torch.cat([torch.randn(1, 2, 4, 4, generator=one) for one in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        label = torch.cat([torch.zeros(batch_size), torch.ones(batch_size)])
        for timestep in self.scheduler.timesteps:
            without, toward = self.denoiser(torch.cat([x, x]), timestep, label=label)[:, :2].chunk(2)
            x = self.scheduler.step(without + 2.5 * (toward - without), timestep, x).prev_sample
        return x


class LabelledNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Conv2d(2, 6, 3, padding=1)
        self.outer = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Any, label: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(sample) + label[:, None, None, None]))


@pytest.mark.parametrize("target", ["noise", "full_precision"])
def test_both_halves_of_a_guided_batch_are_matched(target: Any) -> None:
    pipe: Any = Guided(LabelledNet())
    recipe = recipe_of(groups=2, rounds=1, focus=0, target=target)
    job = job_before_the_search(recipe, pipe)
    search = _Search.begin(recipe.stages[-1], job)  # type: ignore[arg-type]
    trajectory = job.handed["trajectories"][0]
    ((args, kwargs, wanted),) = search._mini_batch(trajectory, 2, Run().generator("b"))
    assert args[0].shape == wanted.shape == (4, 2, 4, 4)
    assert torch.equal(args[0][:2], args[0][2:])
    assert kwargs["label"].tolist() == [0, 0, 1, 1]
    if target == "noise":
        assert torch.equal(wanted[:2], wanted[2:])
        assert abs(float(wanted.mean())) < 0.6
    else:
        torch.testing.assert_close(wanted, pipe.denoiser(*args, **kwargs)[:, :2].detach())
    search.round(0)
    assert search.evaluations == 4 * STEPS + STEPS * 4 * (3 if target == "noise" else 4)


@pytest.mark.parametrize("granularity", ["timestep", "timestep+channel"])
def test_an_interrupted_search_goes_on_to_the_same_bytes(
    granularity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_search, "KEEP_EVERY", 2)
    recipe = recipe_of(rounds=5, granularity=granularity, choose="random", lr_logits=0.5)
    whole = quantize(pipe_of(), recipe, steps=STEPS)
    with pytest.raises(KeyboardInterrupt):
        quantize(pipe_of(), recipe, steps=STEPS, run=Run(work=tmp_path, progress=Interrupt("Searching", 3)))
    kept = list(tmp_path.glob("partial-*groups*"))
    assert len(kept) == 1
    resumed = quantize(pipe_of(), recipe, steps=STEPS, run=Run(work=tmp_path), resume=True)
    found, expected = resumed.pipe.denoiser.state_dict(), whole.pipe.denoiser.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    without = [{key: value for key, value in one.figures[-1].items() if key != "seconds"} for one in (resumed, whole)]
    assert without[0] == without[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "timestep+channel", "harden": "average", "choose": "count", "entropy": 1.0},
        {"rounding": "nearest", "choose": "random", "target": "full_precision", "groups": 2},
    ],
)
def test_the_method_hardens_saves_and_loads(options: dict[str, Any], tmp_path: Path) -> None:
    recipe = adp_dm(samples=2, batch=2, rounds=1, focus=1, block_iterations=2, **{"groups": 3, **options})
    quantized = quantize(pipe_of(), recipe, steps=STEPS)
    denoiser = quantized.pipe.denoiser
    describe(denoiser)
    assert not any(tensor.requires_grad for tensor in (*denoiser.parameters(), *denoiser.buffers()))
    assert not any(isinstance(module, TimestepGroups) for module in denoiser.modules())
    quantized.save(tmp_path / "q")
    loaded = load(tmp_path / "q", denoiser=LoudNet(), engine="simulated")
    for t in (0, 400, torch.tensor([10, 900])):
        x = torch.randn(2, 2, 4, 4)
        assert torch.equal(loaded.denoiser(x, t), denoiser(x, t))
    packed = load(tmp_path / "q", denoiser=LoudNet(), engine="reference")
    found, expected = (sample(pipe, seeds=[1, 2], steps=STEPS) for pipe in (packed, quantized.pipe))
    assert torch.equal(found, expected)
    channel = options.get("granularity") == "timestep+channel"
    outer = quantized_layers(loaded.denoiser)["outer"]
    assert isinstance(outer, QuantizedLayer)
    assert isinstance(outer.input_quantizer, InputQuantizer)
    assert outer.input_quantizer.scale.shape[1:] == ((6,) if channel else ())


def test_presets_and_recipes_are_plain_data() -> None:
    for preset in PRESETS.values():
        recipe = adp_dm(**preset)  # type: ignore[arg-type]
        assert recipe_from_dict(recipe.to_dict(), STAGES) == recipe
    for rounding, expected in (("nearest", set()), ("layers", {"RoundLayers"}), ("reconstruct", {"RoundBlocks"})):
        names = {type(stage).__name__ for stage in adp_dm(rounding=rounding).stages}  # type: ignore[arg-type]
        assert names & {"RoundLayers", "RoundBlocks"} == expected
    with pytest.raises(SpecError, match="2 to 8"):
        adp_dm(weights=9)
    with pytest.raises(SpecError, match="nearest, layers, reconstruct, found 'neares'"):
        adp_dm(rounding="neares")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "channel"}, "granularity must be timestep or timestep"),
        ({"target": "image"}, "target must be noise or full_precision, found 'image'"),
        ({"harden": "max"}, "harden must be argmax or average"),
        ({"choose": "best"}, "choose must be one of"),
        ({"groups": 0}, "groups must be at least 1, rounds and focus at least 0, found 0, 64 and 4"),
        ({"entropy": -1.0}, "must not be negative, found -1.0"),
        ({"prior": -1.0}, "must not be negative, .*and -1.0"),
        ({"layers": ()}, "names no layer"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        SearchGroups(**settings)


def test_what_cannot_work_shows_before_recording() -> None:
    def refused(message: str, pipe: Any = None, **search: Any) -> None:
        with pytest.raises(SpecError, match=message):
            quantize(pipe or pipe_of(), recipe_of(samples=10**9, **search), steps=STEPS)

    refused(r"pattern 'conv\*' of layers matches none of the 2 layers", layers=("inner", "conv*"))
    refused("full_precision", pipe=pipe_of(scheduler=EDMEulerScheduler()))
    with pytest.raises(SpecError, match=r"the activations of inner, outer are in floating point.*--activations"):
        quantize(pipe_of(), recipe_of(activations=None, samples=10**9), steps=STEPS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": None}, r"activations of conv_in, .* and \d+ more are in floating point"),
        ({"layers": ("conv_in",)}, r"layers=\['conv_in'\] matches conv_in alone, which reads the sample"),
        ({"layers": ("conv_out",), "ends": "full"}, "activations of conv_out are in floating point"),
        ({"layers": ("*foo*",)}, r"none of the \d+ layers. The first is 'conv_in'. `stepquant quantize --dry-run`"),
    ],
)
def test_adp_dm_says_before_anything_is_recorded_that_it_has_nothing_to_search(
    options: dict[str, Any], message: str
) -> None:
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler(clip_sample=False))
    with pytest.raises(SpecError, match=message):
        quantize(pipe, adp_dm(samples=10**9, **options), steps=STEPS)


def test_the_layer_that_reads_the_sample_is_searched_where_it_has_no_margin() -> None:
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler(clip_sample=False))
    few: dict[str, Any] = {"samples": 2, "batch": 2, "rounds": 1, "groups": 2, "rounding": "nearest"}
    made = quantize(pipe, adp_dm(**few, activations=4, ends="same", layers=("conv_in",)), steps=STEPS)
    assert made.figures[-1]["quantizers"] == 1
    rules = (LayerRule("conv_out", None, 4),)
    made = quantize(pipe, adp_dm(**few, activations=None, rules=rules), steps=STEPS)
    assert list(made.figures[-1]["rows"]) == ["conv_out.input_quantizer"]


def test_the_loss_is_summed_beyond_the_range_of_float16() -> None:
    """8549 a sample times 16 samples is more than float16 holds."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            found: Tensor = self.last(torch.tanh(self.first(sample.half()))) + 3
            return found

    net = Half().half()
    search = SearchGroups(rounds=1, groups=2, focus=1)
    stages = (Record(16, 16), Select(), Place(None, 8, ends="same"), FitInputRanges("minmax"), search)
    pipe = DenoiserPipeline(net, DDIMScheduler(clip_sample=False), (2, 64, 64))
    made = quantize(pipe, Recipe("half", stages), steps=2)
    assert all(math.isfinite(entry["loss"]) for entry in made.figures[-1]["rounds"])


def test_steps_that_end_before_the_image_are_refused() -> None:
    """The sample after the first expert's steps is still noisy, and would be taken for a clean one."""
    pipe, arguments = tiny_pipelines.wan(experts=2), tiny_pipelines.FAMILIES["wan"].arguments()

    def searched(denoiser: str) -> Quantized:
        return quantize(
            pipe,
            recipe_of(samples=2, rounds=0, groups=2, layers=("*ffn*",)),
            steps=4,
            arguments={**arguments, "guidance_scale_2": 2.0},
            denoiser=denoiser,
        )

    with pytest.raises(UnsupportedPipeline, match="end at timestep 900 while the pipeline goes on to 500"):
        searched("transformer")
    assert searched("transformer_2").figures[-1]["quantizers"] > 0
