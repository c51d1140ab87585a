from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

import tiny
from stepquant.api import sample
from stepquant.engines.automatic import AutomaticDenoiser
from stepquant.engines.base import place
from stepquant.engines.openvino import OpenVINOEngine
from stepquant.errors import EvaluationError, ModelError
from stepquant.evaluate.images import save_png
from stepquant.evaluate.source import ImageFolder, PipelineSource, as_source, check_same_schedule, open_source
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.numerics.spec import scheme_for


def a_pipe(seed: int = 0) -> DenoiserPipeline:
    torch.manual_seed(seed)
    return DenoiserPipeline(tiny.TinyNet(), DDIMScheduler(), (2, 4, 4))


def test_a_pipeline_gives_the_images_of_sample() -> None:
    pipe = a_pipe()
    source = as_source(pipe)
    assert (source.name, source.seeds) == ("DenoiserPipeline", None)
    found = source.images([3, 5], steps=4, arguments={"eta": 0.5})
    assert torch.equal(found, sample(pipe, seeds=[3, 5], steps=4, arguments={"eta": 0.5}))
    assert not torch.equal(found, sample(pipe, seeds=[3, 5], steps=4))
    with pytest.raises(EvaluationError, match="how many steps"):
        source.images([3], steps=None, arguments={})


def test_identity_of_a_graph_follows_what_it_was_made_from() -> None:
    """A graph has no state of its own; by its class alone, figures of two checkpoints would be mixed on resuming."""
    pytest.importorskip("openvino")
    found = {}
    for seed in (0, 1):
        unet = tiny.quantize_(tiny.tiny_unet(seed), scheme_for(8, 8))
        by_name, _ = place(copy.deepcopy(unet), "openvino")
        for name, network in (("openvino", by_name), ("auto", AutomaticDenoiser(unet, OpenVINOEngine()))):
            pipe = SimpleNamespace(unet=network, scheduler=DDIMScheduler())
            found[seed, name] = PipelineSource(pipe).identity
            # The same in the middle of a run, when there is a graph: the run that goes on has to know it again.
            with torch.no_grad():
                network(torch.randn(1, 1, 8, 8), 500)
            assert PipelineSource(pipe).identity == found[seed, name]
    assert len(set(found.values())) == 4


def test_identity_follows_weights_scheduler_and_layers() -> None:
    pipe = a_pipe()
    same = PipelineSource(copy.deepcopy(pipe), "another name")
    assert PipelineSource(pipe).identity == same.identity
    changed = copy.deepcopy(pipe)
    changed.denoiser.out.weight.data[0, 0] += 1e-6
    slower = copy.deepcopy(pipe)
    slower.scheduler = DDIMScheduler(beta_end=0.03)
    other = copy.deepcopy(pipe)
    other.denoiser.act = torch.nn.Tanh()
    identities = {PipelineSource(one).identity for one in (pipe, changed, slower, other)}
    assert len(identities) == 4


def test_a_folder_gives_images_by_seed(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (3, 3, 5, 4)).float() / 255
    for seed, image in zip((9, 2, 30), images, strict=True):
        save_png(image, tmp_path, seed=seed)
    source = ImageFolder(tmp_path)
    assert (source.name, source.seeds) == (str(tmp_path), [2, 9, 30])
    found = source.images([30, 9], steps=None, arguments={})
    assert torch.equal(found, images[[2, 0]])
    before = source.identity
    save_png(images[0], tmp_path, seed=2)
    assert ImageFolder(tmp_path).identity != before
    save_png(images[1], tmp_path, seed=2)
    assert ImageFolder(tmp_path).identity == before


def test_files_of_a_folder_are_named_in_errors(tmp_path: Path) -> None:
    for seed in range(3):
        save_png(torch.rand(1, 6, 6), tmp_path, seed=seed)
    Image.new("L", (5, 6)).save(tmp_path / "000001.png")
    with pytest.raises(EvaluationError, match=r"000001\.png is \(1, 6, 5\), but 000000\.png is \(1, 6, 6\)"):
        ImageFolder(tmp_path).images([1, 2], steps=None, arguments={})
    path = tmp_path / "000002.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(EvaluationError, match=r"000002\.png cannot be read"):
        ImageFolder(tmp_path).images([2], steps=None, arguments={})


def test_what_can_be_opened(tmp_path: Path) -> None:
    DDIMPipeline(tiny.tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "model")
    opened = open_source(str(tmp_path / "model"))
    assert isinstance(opened, PipelineSource)
    assert opened.name == str(tmp_path / "model")
    save_png(torch.rand(1, 6, 6), tmp_path / "images", seed=1)
    assert isinstance(open_source(str(tmp_path / "images")), ImageFolder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="empty is not a stepquant checkpoint, a diffusers folder or a folder of"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="Did you mean 'digits-unet'"):
        open_source("digits-unte")


def test_schedules_that_differ() -> None:
    def source(name: str, scheduler: object) -> PipelineSource:
        return PipelineSource(DenoiserPipeline(tiny.TinyNet(), scheduler, (2, 4, 4)), name)

    reference = source("reference", DDIMScheduler())
    check_same_schedule(source("ours", DDIMScheduler()), reference, 4)
    with pytest.raises(EvaluationError, match=r"ours and reference do not .* beta_end is 0\.03 instead of 0\.02"):
        check_same_schedule(source("ours", DDIMScheduler(beta_end=0.03)), reference, 4)
    with pytest.raises(EvaluationError, match="scheduler is EulerDiscreteScheduler instead of DDIMScheduler"):
        check_same_schedule(source("ours", EulerDiscreteScheduler()), reference, 4)


def test_schedulers_that_want_more_are_compared_by_their_settings() -> None:
    def source(shift: float) -> PipelineSource:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=True)
        return PipelineSource(DenoiserPipeline(tiny.TinyNet(), scheduler, (2, 4, 4)))

    check_same_schedule(source(1.0), source(1.0), 4)
    with pytest.raises(EvaluationError, match="shift is 2"):
        check_same_schedule(source(2.0), source(1.0), 4)


def test_a_folder_whose_files_are_named_in_upper_case(tmp_path: Path) -> None:
    save_png(torch.rand(1, 4, 4), tmp_path, seed=17).rename(tmp_path / "000017.PNG")
    assert open_source(str(tmp_path)).seeds == [17]
