"""Progressive calibration against running the half-quantized model from the noise for every step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler
from torch import Tensor, nn

import tiny
from stepquant.calibrate.ranges import fit_range
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
from stepquant.calibrate.trajectory import replay, state_at
from stepquant.calibrate.walked_ranges import FitRangesProgressively, RelaxedEnd, relaxed_steps
from stepquant.errors import SpecError
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import operand_specs, quantized_layers
from stepquant.numerics.affine import QParams
from stepquant.numerics.spec import row_spec
from stepquant.recipe import Job
from stepquant.run import Run

STEPS = 5
SCHEDULERS = [DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, HeunDiscreteScheduler]


class TimedNet(tiny.TinyNet):
    """Activations grow over the steps, so that every step needs a range of its own."""

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return super().forward(sample * (2 - torch.as_tensor(timestep).reshape(-1, 1, 1, 1) / 1000), timestep)


def placed(scheduler: Any = DDIMScheduler, activations: int = 3, images: int = 4) -> Job:
    """Two trajectories of two images, weights of 3 bits, activations without ranges."""
    torch.manual_seed(2)
    net = TimedNet()
    pipe = DenoiserPipeline(net, scheduler(), (2, 4, 4))
    job = Job(pipe, net, copy.deepcopy(net).requires_grad_(False), Run(), STEPS)
    for stage in (
        Record(samples=images, batch=2),
        Select(),
        Place(weights=3, activations=activations, ends="same"),
        FitWeightRanges(),
    ):
        stage.run(job)
    return job


def tables(denoiser: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (layer.input_quantizer.scale, layer.input_quantizer.zero_point)
        for name, layer in quantized_layers(denoiser).items()
    }


def noting(values: list[Tensor]) -> Any:
    """A hook that adds what goes into a layer."""
    return lambda _module, args: values.append(args[0].flatten())


def naive(job: Job, bits: list[int] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """The paper's loop: for every step, run from the noise with the steps before it quantized, and look at that step.

    By min and max of what goes into each layer, noted by hooks. Timesteps that come again keep their first range.
    bits: of each step's activations; None: those of the plan.
    """
    denoiser, trajectories, plan = job.denoiser, job.handed["trajectories"], job.handed["plan"]
    clock = denoiser.stepquant_clock
    layers = quantized_layers(denoiser)
    found: dict[str, dict[int, QParams]] = {name: {} for name in layers}
    own: dict[int, int] = {}

    def install(*, active: bool) -> None:
        for name, layer in layers.items():
            if not active or not found[name]:
                layer.input_quantizer = None
                continue
            rows = [found[name].get(at, next(iter(found[name].values()))) for at in range(clock.bins)]
            params = QParams(*(torch.cat([part.reshape(-1) for part in parts]) for parts in zip(*rows, strict=True)))
            spec = dict(operand_specs(plan[name]))["input_quantizer"]
            each = [own.get(at, spec.bits) for at in range(clock.bins)]
            layer.input_quantizer = InputQuantizer(spec, clock, params, torch.arange(clock.bins), bits=each)

    for index in range(len(trajectories[0].steps)):
        install(active=True)
        with torch.no_grad():
            states = [[state_at(one, 0), *replay(denoiser, one, 0, index)][-1] for one in trajectories]
        install(active=False)
        seen: dict[str, list[Tensor]] = {name: [] for name in layers}
        handles = [layer.register_forward_pre_hook(noting(seen[name])) for name, layer in layers.items()]
        with torch.no_grad():
            for one, state in zip(trajectories, states, strict=True):
                list(replay(denoiser, one, index, index + 1, state))
        for handle in handles:
            handle.remove()
        at = int(clock.bin)
        for name in layers:
            spec = dict(operand_specs(plan[name]))["input_quantizer"]
            own.setdefault(at, spec.bits if bits is None else bits[index])
            found[name].setdefault(at, fit_range(torch.cat(seen[name]), row_spec(spec, own[at]), "minmax"))
    install(active=True)
    return tables(denoiser)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_it_is_the_naive_loop_at_a_fraction_of_its_calls(scheduler: Any) -> None:
    job, twin = placed(scheduler), placed(scheduler)
    calls: list[int] = []
    handle = job.denoiser.register_forward_hook(lambda _module, args, _output: calls.append(len(args[0])))
    figures = FitRangesProgressively().run(job)
    handle.remove()
    expected = naive(twin)
    for name, (scale, zero_point) in tables(job.denoiser).items():
        torch.testing.assert_close(scale, expected[name][0])
        assert torch.equal(zero_point, expected[name][1])
    steps = job.handed["trajectories"][0].steps
    timesteps = {float(step.timestep) for step in steps}
    assert figures["rows"] == len(timesteps)
    # Every timestep is observed once, and every step but the last is taken, by two batches.
    assert len(calls) == 2 * (len(timesteps) + len(steps) - 1)
    assert figures["evaluations"] == sum(calls) == 2 * len(calls)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, HeunDiscreteScheduler])
def test_pndm_and_heun_repeat_timesteps_here(scheduler: Any) -> None:
    """Otherwise the test above would not cover what it says."""
    steps = placed(scheduler).handed["trajectories"][0].steps
    assert len(steps) > len({float(step.timestep) for step in steps}) >= STEPS


def test_each_step_has_its_range_along_the_quantized_trajectory() -> None:
    job = placed(activations=2)
    FitRangesProgressively().run(job)
    walked = tables(job.denoiser)["conv"][0]
    FitInputRanges("minmax", windows=(1,) * STEPS).run(job)
    quantizer = job.denoiser.conv.input_quantizer
    recorded = quantizer.scale[quantizer.row_of_bin]  # of bins, which count from the image
    torch.testing.assert_close(walked[-1], recorded[-1])  # both start from the same noise
    assert float((walked[:-1] / recorded[:-1] - 1).abs().max()) > 5e-3
    assert len(walked.unique()) == STEPS


def test_only_as_many_images_as_asked_for() -> None:
    job = placed(images=6)
    assert FitRangesProgressively(samples=3).run(job)["images"] == 4  # whole batches of two
    with pytest.raises(SpecError, match="at least one sample"):
        FitRangesProgressively(samples=0)


@pytest.mark.parametrize(
    ("steps", "share", "end", "expected"),
    [(50, 0.2, "image", range(40, 50)), (50, 0.05, "noise", range(2)), (5, 0.0, "image", range(5, 5))],
)
def test_a_share_of_the_steps_at_one_end_is_relaxed(steps: int, share: float, end: RelaxedEnd, expected: range) -> None:
    assert relaxed_steps(steps, share, end) == expected


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
@pytest.mark.parametrize(("end", "bits"), [("image", 10), ("noise", 6)])
def test_relaxed_steps_have_their_bits_and_walk_with_them(scheduler: Any, end: RelaxedEnd, bits: int) -> None:
    job, twin = placed(scheduler), placed(scheduler)
    figures = FitRangesProgressively(relaxed=0.4, relaxed_bits=bits, relaxed_end=end).run(job)
    steps = len(job.handed["trajectories"][0].steps)
    more = range(round(0.4 * steps)) if end == "noise" else range(steps - round(0.4 * steps), steps)
    expected = naive(twin, [bits if index in more else 3 for index in range(steps)])
    for name, (scale, zero_point) in tables(job.denoiser).items():
        torch.testing.assert_close(scale, expected[name][0])
        assert torch.equal(zero_point, expected[name][1])
        found, oracle = (quantized_layers(one.denoiser)[name].input_quantizer for one in (job, twin))
        assert found.bits == oracle.bits
        assert figures["relaxed_rows"] == found.bits.count(bits) > 0
        assert found.spec.bits == 3


def test_layers_of_more_bits_are_not_relaxed() -> None:
    job = placed(activations=8)
    FitRangesProgressively(relaxed=0.4, relaxed_bits=6).run(job)
    assert job.denoiser.conv.input_quantizer.row_bits is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relaxed": 1.0}, "a share of the steps"),
        ({"relaxed": -0.1}, "a share of the steps"),
        ({"relaxed_bits": 17}, "from 2 to 16"),
        ({"relaxed_end": "images"}, "'image' or 'noise'"),
    ],
)
def test_shares_and_bits_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        FitRangesProgressively(**options)


class Memory:
    """Keeps in memory, and presses Ctrl-C after a number of steps."""

    def __init__(self, stop: int) -> None:
        self.kept: Any = None
        self.left = stop

    def save(self, _name: str, values: Any, meta: Any) -> None:
        self.kept = ({name: value.clone() for name, value in values.items()}, dict(meta))
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def load(self, _name: str) -> Any:
        return self.kept


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
def test_an_interrupted_walk_goes_on_where_it_was(scheduler: Any) -> None:
    whole, broken = placed(scheduler), placed(scheduler)
    stage = FitRangesProgressively(relaxed=0.4)
    figures = stage.run(whole)
    broken.keeper = Memory(stop=3)
    with pytest.raises(KeyboardInterrupt):
        stage.run(broken)
    resumed = placed(scheduler)
    resumed.keeper = broken.keeper
    taken: list[int] = []
    resumed.denoiser.register_forward_hook(lambda _module, args, _output: taken.append(len(args[0])))
    assert stage.run(resumed) == figures
    assert 0 < sum(taken) < figures["evaluations"]
    for name, (scale, zero_point) in tables(resumed.denoiser).items():
        assert torch.equal(scale, tables(whole.denoiser)[name][0])
        assert torch.equal(zero_point, tables(whole.denoiser)[name][1])
        assert 10 in quantized_layers(resumed.denoiser)[name].input_quantizer.bits
