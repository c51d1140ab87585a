"""The smallest pipeline, against diffusers' own."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor, nn

from stepquant.errors import SpecError, UnsupportedPipeline
from stepquant.model.pipeline import (
    DenoiserPipeline,
    arguments_of_batch,
    check_call,
    refusal_explained,
    with_labels,
)


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.scale * sample


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_samples_as_diffusers_pipeline_does() -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    theirs = DDIMPipeline(unet, DDIMScheduler())
    theirs.set_progress_bar_config(disable=True)
    ours = DenoiserPipeline(unet, DDIMScheduler(), (3, 8, 8))
    settings = {"batch_size": 2, "eta": 1.0, "num_inference_steps": 3, "output_type": "np"}
    expected = theirs(generator=generators(1, 2), **settings).images
    np.testing.assert_array_equal(ours(generator=generators(1, 2), **settings).images, expected)
    single = theirs(generator=generators(1)[0], **settings).images
    np.testing.assert_array_equal(ours(generator=generators(1)[0], **settings).images, single)


def test_an_image_depends_on_its_own_generator_only() -> None:
    pipe = DenoiserPipeline(Half(), EulerDiscreteScheduler(), (1, 4, 4))
    both = pipe(batch_size=2, generator=generators(5, 6), num_inference_steps=3, output_type="latent").images
    alone = pipe(batch_size=1, generator=generators(6), num_inference_steps=3, output_type="latent").images
    assert torch.equal(both[1:], alone)


def test_output_types() -> None:
    pipe = DenoiserPipeline(Half(), FlowMatchEulerDiscreteScheduler(), (3, 4, 4))
    pipe.set_progress_bar_config(disable=True)

    def images(output_type: str) -> object:
        return pipe(batch_size=2, generator=generators(5, 6), num_inference_steps=2, output_type=output_type).images  # type: ignore[arg-type]

    array, tensor, pictures, latent = (images(kind) for kind in ("np", "pt", "pil", "latent"))
    assert array.shape == (2, 4, 4, 3)
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    np.testing.assert_array_equal(np.asarray(pictures[0]), (array[0] * 255).round().astype(np.uint8))
    assert torch.equal((latent / 2 + 0.5).clamp(0, 1), tensor)
    gray = DenoiserPipeline(Half(), DDIMScheduler(), (1, 4, 4))
    assert gray(num_inference_steps=1, output_type="pil").images[0].mode == "L"


def test_predictions_in_an_object_and_dtypes() -> None:
    class Wrapped(Half):
        def forward(self, sample: Tensor, timestep: Tensor) -> SimpleNamespace:  # type: ignore[override]
            return SimpleNamespace(sample=super().forward(sample, timestep))

    pipe = DenoiserPipeline(Wrapped(), DDIMScheduler(), (1, 4, 4)).to(torch.float64)
    assert pipe.dtype == torch.float64
    assert pipe.device == torch.device("cpu")
    images = pipe(num_inference_steps=2, output_type="latent").images
    assert images.dtype == torch.float64


def test_max_timestep_leaves_out_leading_steps() -> None:
    """The cosine schedule of 300 steps, whose first alpha_bar is almost 0."""
    seen: list[int] = []

    class Watching(Half):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            seen.append(int(timestep))
            return super().forward(sample, timestep)

    scheduler = DDIMScheduler(num_train_timesteps=300, beta_schedule="squaredcos_cap_v2")
    DenoiserPipeline(Watching(), scheduler, (1, 4, 4), max_timestep=290)(num_inference_steps=50)
    assert seen == list(range(288, -1, -6))
    with pytest.raises(SpecError, match="EulerDiscreteScheduler walks a table"):
        DenoiserPipeline(Half(), EulerDiscreteScheduler(), (1, 4, 4), max_timestep=290)(num_inference_steps=5)
    with pytest.raises(SpecError, match="leaves none"):
        DenoiserPipeline(Half(), scheduler, (1, 4, 4), max_timestep=-1)(num_inference_steps=5)


def test_misuse_is_named() -> None:
    pipe = DenoiserPipeline(Half(), DDIMScheduler(), (1, 4, 4))
    with pytest.raises(SpecError, match="2 generators were given for batch_size=3"):
        pipe(batch_size=3, generator=generators(1, 2))
    with pytest.raises(SpecError, match="output_type is 'png'"):
        pipe(output_type="png")  # type: ignore[arg-type]

    class Wrong(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=3)

    with pytest.raises(SpecError, match="returned SimpleNamespace"):
        DenoiserPipeline(Wrong(), DDIMScheduler(), (1, 4, 4))(num_inference_steps=1)


def test_what_has_an_entry_for_each_image_is_cut_with_the_images() -> None:
    embeddings, one = torch.arange(12.0).reshape(4, 3), torch.tensor(2.0)
    arguments = {
        "prompt": list("abcd"),
        "prompt_embeds": embeddings,
        "timesteps": [9, 7, 5, 3],
        "scale": one,
        "size": [8],
    }
    found = arguments_of_batch(arguments, slice(1, 3), 4)
    assert found.pop("prompt_embeds").equal(embeddings[1:3])
    assert found == {"prompt": ["b", "c"], "timesteps": [9, 7, 5, 3], "scale": one, "size": [8]}


def test_a_prompt_for_all_images_is_repeated_for_each() -> None:
    arguments = {"prompt": "a cat", "negative_prompt": "grey", "height": 8, "scheduler": "x"}
    found = arguments_of_batch(arguments, slice(4, 8), 6)
    assert found == {"prompt": ["a cat"] * 2, "negative_prompt": ["grey"] * 2, "height": 8, "scheduler": "x"}
    counted = {"prompt": "a cat", "num_images_per_prompt": 2}
    assert arguments_of_batch(counted, slice(0, 2), 2) == counted


class Classes:
    """The call of a pipeline that must be told classes, as `DiTPipeline` has it."""

    def __init__(self, labels: dict[str, int] | None = None, config: dict[str, int] | None = None) -> None:
        self.labels = labels
        if config is not None:
            self.transformer = SimpleNamespace(config=config)

    def __call__(self, class_labels: list[int], guidance_scale: float = 4.0) -> None: ...


def test_a_pipeline_that_must_be_told_classes_gets_them_from_the_seeds() -> None:
    named = Classes({"cat": 0, "kitten": 0, "dog": 1, "cow": 2})
    assert with_labels(named, {"guidance_scale": 1.0}, [3, 4, 8]) == {"guidance_scale": 1.0, "class_labels": [0, 1, 2]}
    assert with_labels(Classes(config={"num_embeds_ada_norm": 5}), {}, [3, 7]) == {"class_labels": [3, 2]}
    assert with_labels(named, {"class_labels": [1]}, [3]) == {"class_labels": [1]}


class OptionalClasses:
    """`ConsistencyModelPipeline`: a class-conditional network without labels gets some that no generator decides."""

    def __init__(self, classes: int | None) -> None:
        self.unet = SimpleNamespace(config={"num_class_embeds": classes})

    def __call__(self, class_labels: list[int] | None = None) -> None: ...


def test_labels_that_a_pipeline_would_draw_by_itself_come_from_the_seeds_too() -> None:
    assert with_labels(OptionalClasses(4), {}, [3, 9]) == {"class_labels": [3, 1]}
    assert with_labels(OptionalClasses(4), {"class_labels": [0, 0]}, [3, 9]) == {"class_labels": [0, 0]}
    assert with_labels(OptionalClasses(None), {}, [3, 9]) == {}


def test_other_pipelines_get_no_classes() -> None:
    assert with_labels(DenoiserPipeline(Half(), DDIMScheduler(), (1, 4, 4)), {}, [3]) == {}


def test_a_pipeline_that_does_not_say_how_many_classes_there_are_is_refused() -> None:
    with pytest.raises(UnsupportedPipeline, match="Classes needs class_labels"):
        with_labels(Classes(), {}, [3])


def test_a_class_that_there_is_not_is_named() -> None:
    conditional = OptionalClasses(4)
    for labels in ([0, 4], torch.tensor([4]), 4, -1):
        with pytest.raises(SpecError, match=r"class_labels must be from 0 to 3, found (4|-1)"):
            check_call(conditional, {"class_labels": labels}, 4)
    for fine in ([0, 3], torch.tensor([3]), 0, None):
        check_call(conditional, {"class_labels": fine}, 4)
    check_call(OptionalClasses(None), {"class_labels": [9]}, 4)
    transformer = Classes(config={"num_embeds_ada_norm": 5})
    check_call(transformer, {"class_labels": [5]}, 4)  # no class, as guidance has it
    with pytest.raises(SpecError, match="from 0 to 4, found 6"):
        check_call(transformer, {"class_labels": [6]}, 4)


def test_arguments_that_no_call_can_take_are_named() -> None:
    conditional = OptionalClasses(4)
    with pytest.raises(SpecError, match=r"class_labels must be whole numbers from 0 to 3, found 'abc'"):
        check_call(conditional, {"class_labels": "abc"}, 4)
    guided = DDIMPipeline(Half(), DDIMScheduler())
    with pytest.raises(SpecError, match="generator is not among the arguments: each image's seed decides it"):
        check_call(guided, {"generator": 1}, 4)
    for value in ("nan", math.nan):
        with pytest.raises(SpecError, match="eta must be a number, found"):
            check_call(guided, {"eta": value}, 4)


def test_one_label_is_for_all_images_and_lists_have_one_each() -> None:
    assert arguments_of_batch({"class_labels": 3}, slice(1, 3), 4) == {"class_labels": [3, 3]}
    for name, value in (("class_labels", [3]), ("prompt", ["a", "b"])):
        with pytest.raises(SpecError, match=rf"{name} has {len(value)} entries for 4 images: give one each"):
            arguments_of_batch({name: value}, slice(0, 2), 4)


def test_what_a_pipeline_says_against_its_prompts_is_explained() -> None:
    explained = r"Half refuses the call: Provide `prompt`\. Prompts are given by --prompts"
    with pytest.raises(SpecError, match=explained), refusal_explained(Half()):
        raise ValueError("Provide `prompt`.")
    for error in (ValueError("shapes differ"), SpecError("a prompt that we refused")):
        with pytest.raises(type(error), match=str(error)), refusal_explained(Half()):
            raise error


def test_more_steps_than_the_scheduler_has_are_refused() -> None:
    def pipe(scheduler: Any) -> DenoiserPipeline:
        return DenoiserPipeline(Half(), scheduler, (1, 4, 4))

    check_call(pipe(DDIMScheduler(num_train_timesteps=10)), {}, 10)
    with pytest.raises(SpecError, match=r"steps must be at most 10 with the pipeline's DDIMScheduler, found 11"):
        check_call(pipe(DDIMScheduler(num_train_timesteps=10)), {}, 11)
    # Timesteps between those of training are no fault of the caller's.
    check_call(pipe(FlowMatchEulerDiscreteScheduler(num_train_timesteps=10)), {}, 11)
