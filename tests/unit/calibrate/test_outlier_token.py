"""Which layers read a prompt that begins with a known token, and what keeping it out of their quantizers does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tiny_pipelines
from stepquant.api import Quantized, load, quantize, sample
from stepquant.calibrate import allocation
from stepquant.calibrate.allocation import Allocate
from stepquant.calibrate.outlier_token import KeepFirstToken, first_token_of, text_readers
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, LayerRule, Place, Select
from stepquant.calibrate.steps import DenoiserCall, Step
from stepquant.calibrate.trajectory import Trajectory
from stepquant.errors import SpecError
from stepquant.methods import METHODS
from stepquant.model.assembly import describe
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import quantized_layers
from stepquant.recipe import Job
from stepquant.run import Run

STEPS = 2
READERS = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
]


def prompts(seed: int = 7, *, start: float = 40.0) -> Tensor:
    """[2, 5, 16] that begin with the same token, of large channels."""
    text = tiny_pipelines.tokens(5, 16, seed)
    text[:, 0] = start * torch.linspace(-1, 1, 16)
    return text


def trajectory_of(*texts: Tensor | None) -> Trajectory:
    """A trajectory of one step whose calls had these prompts; nothing else of it is looked at."""
    call = {"timestep": torch.tensor(10)}
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    calls = tuple(DenoiserCall((x,), {**call, "encoder_hidden_states": text}, x) for text in texts)
    step = Step(0, x, 10, calls, x, x, None, {}, None)
    fields = dict.fromkeys(Trajectory.__dataclass_fields__)
    return Trajectory(**{**fields, "steps": (step,), "seeds": (0, 1)})  # type: ignore[arg-type]


def job_of(*texts: Tensor | None, **place: Any) -> Job:
    unet = tiny_pipelines.text_unet()
    job = Job(None, unet, copy.deepcopy(unet), Run(), 1)
    job.handed["trajectories"] = [trajectory_of(*texts)]
    for stage in (Select(), Place(**place), FitWeightRanges("minmax")):
        stage.run(job)
    return job


def test_the_readers_are_keys_and_values_of_cross_attention() -> None:
    job = job_of(prompts())
    call = job.handed["trajectories"][0].steps[0].calls[0]
    names = [name for name, layer in quantized_layers(job.denoiser).items() if isinstance(layer, QuantizedLayer)]
    found = text_readers(job.denoiser, names, call.args, call.kwargs)
    assert sorted(found) == sorted(name for name in names if name.endswith(("attn2.to_k", "attn2.to_v")))
    assert set(READERS) <= set(found)
    assert KeepFirstToken().run(job)["layers"] == [name for name in job.handed["plan"] if name in found]


def test_the_first_token_has_its_full_precision_output_and_leaves_the_range_to_others() -> None:
    job = job_of(prompts(), prompts(8))
    plain = copy.deepcopy(job)
    KeepFirstToken().run(job)
    for one in (job, plain):
        FitInputRanges("minmax").run(one)
    text = prompts(9)
    for name in READERS:
        layer, beside = (quantized_layers(one.denoiser)[name] for one in (job, plain))
        exact = job.full_precision.get_submodule(name)(text).detach()
        found = layer(text).detach()
        torch.testing.assert_close(found[:, 0], exact[:, 0], rtol=1e-5, atol=1e-5)
        assert float(layer.input_quantizer.scale) < 0.2 * float(beside.input_quantizer.scale)  # type: ignore[union-attr, arg-type]
        seen = torch.cat([prompts()[:, 1:], prompts(8)[:, 1:]])
        wide = float(seen.max() - seen.min())
        assert float(layer.input_quantizer.scale) == pytest.approx(wide / 255, rel=1e-5)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ((None,), "not given embedded prompts"),
        ((tiny_pipelines.tokens(5, 16),), "1 of 2 recorded prompts begin with another token"),
        ((prompts(), prompts(start=20.0)), "2 of 4 recorded prompts begin with another token"),
        ((prompts()[:, :1],), "a single token"),
        ((torch.zeros(2, 5, 16),), "All prompts are zero"),
    ],
)
def test_prompts_without_such_a_token(texts: tuple[Tensor | None, ...], reason: str) -> None:
    token, found = first_token_of(tiny_pipelines.text_unet(), [trajectory_of(*texts)])
    assert token is None
    assert reason in found


def test_empty_prompts_and_a_little_noise_do_not_matter() -> None:
    noisy = prompts(8)
    noisy[:, 0] *= 1.01
    token, _ = first_token_of(tiny_pipelines.text_unet(), [trajectory_of(torch.zeros(2, 5, 16), prompts(), noisy)])
    assert token is not None
    assert torch.equal(token, prompts()[0, 0])


def test_models_without_prompts_keep_their_layers() -> None:
    job = job_of(tiny_pipelines.tokens(5, 16))
    figures = KeepFirstToken().run(job)
    assert figures["layers"] == []
    assert "another token" in figures["left_because"]
    assert all(x.first_token is None for x in quantized_layers(job.denoiser).values() if isinstance(x, QuantizedLayer))
    job = job_of(prompts())
    assert "No layer of this name" in KeepFirstToken(layers=("*time*",)).run(job)["left_because"]
    with pytest.raises(SpecError, match="names no layer"):
        KeepFirstToken(layers=())


def test_allocation_keeps_it_only_with_the_score_that_samples() -> None:
    with pytest.raises(SpecError, match="score decoupled, not with final"):
        Allocate(Place(), weight_bits=4, first_token=KeepFirstToken())


def pipe_of() -> tuple[Any, dict[str, Any]]:
    pytest.importorskip("transformers", reason="diffusers defines this pipeline only beside transformers")
    arguments = {
        "prompt_embeds": prompts(7),
        "negative_prompt_embeds": prompts(8),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
    }
    return tiny_pipelines.sd15(), arguments


FEW = tuple(LayerRule(pattern, 4, 6) for pattern in ("*resnets*", "*attn1*", "*ff*", "up*", "down*"))
"""Leaves bits to be chosen for the middle's cross attention and a few more layers: sampling with each takes time."""


def made(method: str, run: Run | None = None, *, resume: bool = False) -> Quantized:
    pipe, arguments = pipe_of()
    options = {"sensitivity_samples": 2} if method == "mixdq" else {}
    recipe = METHODS[method](
        weights=4, activations=6, samples=2, batch=2, ranges="minmax", ends="same", rules=FEW, **options
    )
    with pytest.MonkeyPatch.context() as patch:
        # The program's bits in any case: on two images of an untrained network equal bits are as good.
        patch.setattr(allocation, "clearly_less", lambda _errors, _others: True)
        return quantize(pipe, recipe, steps=STEPS, arguments=arguments, run=run, resume=resume)


@pytest.fixture(scope="module")
def mixed() -> Quantized:
    return made("mixdq")


def images_of(pipe: Any) -> Tensor:
    return torch.as_tensor(sample(pipe, seeds=[1, 2], steps=STEPS, arguments=pipe_of()[1]))


def test_bits_are_allocated_and_first_tokens_kept(mixed: Quantized) -> None:
    figures = {entry["stage"]: entry for entry in mixed.figures}
    assert figures["Allocate"]["beside_uniform"]["bits"] == {"weights": 4}
    assert figures["Allocate"]["weight_bits"] <= 4
    assert len({rule["weights"] for rule in figures["Allocate"]["rules"]}) > 1
    assert set(READERS) <= set(figures["KeepFirstToken"]["layers"])


def test_keeping_the_first_token_is_better_than_rounding_it() -> None:
    """With nothing quantized but what the keys and values of the text are computed from."""
    exact = images_of(pipe_of()[0])
    rules = (LayerRule("*", None, None), LayerRule("*attn2.to_k", None, 4), LayerRule("*attn2.to_v", None, 4))
    common: dict[str, Any] = {"weights": None, "activations": 4, "samples": 2, "batch": 2, "rules": rules}
    for seed in range(3):
        errors = []
        for method in ("mixdq", "rtn"):
            pipe, arguments = pipe_of()
            recipe = METHODS[method](**common)
            quantized = quantize(pipe, recipe, steps=STEPS, arguments=arguments, run=Run(seed=seed))
            errors.append(float((images_of(quantized.pipe) - exact).square().mean()))
        assert errors[0] < 0.2 * errors[1], errors


def test_mixdq_is_saved_and_loaded(mixed: Quantized, tmp_path: Path) -> None:
    mixed.save(tmp_path / "q")
    loaded = load(tmp_path / "q", engine="simulated")
    assert describe(loaded.unet) == describe(mixed.pipe.unet)
    assert torch.equal(images_of(loaded), images_of(mixed.pipe))


def test_a_resumed_run_has_it(mixed: Quantized, tmp_path: Path) -> None:
    """The work folder restores a model with first tokens."""

    def killed(self: Any, job: Job) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FitInputRanges, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            made("mixdq", Run(work=tmp_path))
    resumed = made("mixdq", Run(work=tmp_path), resume=True)
    one, other = (quantized.pipe.unet.state_dict() for quantized in (mixed, resumed))
    assert any("first_token" in name for name in one)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_network_that_takes_prompts_by_position() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_k = nn.Linear(16, 3)
            self.to_v = nn.Linear(16, 3)

        def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor) -> Tensor:
            return sample + self.to_k(encoder_hidden_states).mean() + self.to_v(encoder_hidden_states * 1.0).mean()

    assert text_readers(Net(), ["to_k", "to_v"], (torch.randn(2, 3), 1, prompts()), {}) == ["to_k", "to_v"]
    assert text_readers(Net(), ["to_k"], (torch.randn(2, 3), DDIMScheduler, prompts()[0]), {}) == []
