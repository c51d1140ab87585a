"""Scores of timesteps against their formulas, and calibration sets that follow them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tiny
from stepquant.calibrate.informative import (
    SelectInformative,
    TimestepChooser,
    bottleneck_features,
    check_choose,
    count_scores,
    median_kernel,
    mmd_scores,
    mmd_squared,
    ucb_scores,
)
from stepquant.calibrate.select import at_steps, inputs
from stepquant.calibrate.trajectory import Trajectory, record, seal
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.recipe import Job
from stepquant.run import Run

STEPS = 5


class TimedNet(nn.Module):
    """Samples [B, 2, 4, 4]; the bottleneck knows the timestep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv_in = nn.Conv2d(2, 4, 3, padding=1)
        self.mid_block = nn.Conv2d(4, 3, 1)
        self.conv_out = nn.Conv2d(3, 2, 1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return self.conv_out(self.mid_block(torch.tanh(self.conv_in(sample)) * (1 + timestep / 500)))


def recorded(denoiser: nn.Module, seeds: int = 4, batch: int = 2) -> tuple[DenoiserPipeline, list[Trajectory]]:
    pipe = DenoiserPipeline(denoiser, DDIMScheduler(clip_sample=False), (2, 4, 4))
    trajectories = record(pipe, denoiser, seeds=range(seeds), steps=STEPS, batch_size=batch, run=Run())
    return pipe, [seal(trajectory) for trajectory in trajectories]


def test_the_papers_score_by_hand() -> None:
    entropy = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    scores = ucb_scores(entropy, torch.tensor([2.0, 0.0]))
    assert scores.tolist() == [1 + 1.5 / 3, 1 + 1.5]


def test_the_public_codes_score_by_hand() -> None:
    entropy = torch.full((3, 10), math.log(8))
    scores = count_scores(entropy, torch.arange(10.0), 8)
    assert scores[7:].tolist() == [-math.inf] * 3  # the noisiest 30 %
    torch.testing.assert_close(scores[:7], 3 * math.log(8) / 8 - 2 * torch.arange(7.0))


def points(count: int, width: int = 3) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def test_mmd_is_that_of_the_two_samples() -> None:
    """The biased estimate of Gretton et al. 2012, eq. 5, from pairs of points, with repeated ones."""
    features = points(6)
    kernel = median_kernel(features)
    chosen, every = [0, 0, 4], list(range(6))

    def mean(one: list[int], other: list[int]) -> float:
        return sum(float(kernel[i, j]) for i in one for j in other) / (len(one) * len(other))

    expected = mean(chosen, chosen) - 2 * mean(chosen, every) + mean(every, every)
    share = torch.tensor([2.0, 0, 0, 0, 1, 0], dtype=torch.float64) / 3
    found = mmd_squared(kernel, share, torch.full((6,), 1 / 6, dtype=torch.float64))
    assert float(found) == pytest.approx(expected, abs=1e-12)
    # The score of a candidate is that of the set with the candidate.
    scores = mmd_scores(kernel, torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=torch.float64))
    assert float(scores[0]) == pytest.approx(-expected, abs=1e-12)


def test_the_kernel_has_the_median_distance_as_bandwidth() -> None:
    kernel = median_kernel(torch.tensor([[0.0], [1.0], [3.0]]))  # distances 1, 2, 3
    assert float(kernel[0, 1]) == pytest.approx(math.exp(-1 / 8))
    assert float(kernel[0, 2]) == pytest.approx(math.exp(-9 / 8))
    assert torch.equal(kernel.diagonal(), torch.ones(3, dtype=torch.float64))
    assert bool((median_kernel(torch.zeros(4, 2)) == 1).all())


def test_greedy_mmd_visits_clusters_in_proportion() -> None:
    features = torch.tensor([[0.0], [0.01], [0.02], [5.0], [5.01], [5.02]])
    chooser = TimestepChooser("mmd", 6, 6, median_kernel(features))
    picks = [chooser.next(torch.Generator()) for _ in range(6)]
    assert [pick // 3 for pick in picks[:2]] in ([0, 1], [1, 0])
    assert sum(chooser.counts[:3]) == sum(chooser.counts[3:]) == 3


def test_choosers() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = TimestepChooser("uniform", 4, 6)
    assert [uniform.next(generator) for _ in range(6)] == [0, 0, 1, 2, 2, 3]
    assert uniform.counts == [2, 1, 2, 1]
    sparse = TimestepChooser("uniform", 10, 2)
    assert [sparse.next(generator) for _ in range(2)] == [0, 5]

    entropy = torch.full((2, 4), 2.0)
    ucb = TimestepChooser("ucb", 4, 9)
    # Equal entropies: in turn, from the cleanest. Then the bonus of a second visit is worth 0.75, less than 1.
    assert [ucb.next(generator, entropy, 8) for _ in range(4)] == [0, 1, 2, 3]
    entropy[:, 2] += 1.0
    assert ucb.next(generator, entropy, 8) == 2
    assert ucb.counts == [1, 1, 2, 1]

    count = TimestepChooser("count", 4, 9)
    assert [count.next(generator, entropy, 8) for _ in range(3)] == [2, 0, 1]
    random = TimestepChooser("random", 4, 9)
    drawn = [random.next(torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert set(drawn) == {0, 1, 2, 3}
    assert random.counts == [drawn.count(number) for number in range(4)]


def test_features_are_the_pooled_bottleneck() -> None:
    net = TimedNet()
    _, trajectories = recorded(net)
    found = bottleneck_features(net, trajectories[0])
    assert found.shape == (STEPS, 3)
    for number, step in enumerate(trajectories[0].steps):
        (call,) = step.calls
        hidden = torch.tanh(net.conv_in(call.args[0])) * (1 + call.args[1] / 500)
        torch.testing.assert_close(found[number], net.mid_block(hidden).mean((0, 2, 3)).double())
    assert not net.mid_block._forward_hooks


def test_without_a_middle_block_the_middle_unit_is_taken() -> None:
    net = tiny.TinyNet()  # a convolution, then a linear layer, whose output is [B, 4, 4, 2]
    _, trajectories = recorded(net)
    found = bottleneck_features(net, trajectories[0])
    call = trajectories[0].steps[1].calls[0]
    torch.testing.assert_close(found[1], net(call.args[0], call.args[1]).movedim(1, -1).mean((0, 2, 3)).double())


def select(stage: SelectInformative, net: nn.Module) -> tuple[Job, dict[str, Any]]:
    pipe, trajectories = recorded(net)
    job = Job(pipe, net, net, Run(), STEPS, handed={"trajectories": trajectories})
    return job, stage.run(job)


def test_select_uniform_and_weights_of_images_that_come_again() -> None:
    job, figures = select(SelectInformative("uniform", rounds=10, batch=3), TimedNet())
    chosen = job.handed["calibration"]
    # Four images in two trajectories; each step is chosen twice, so six picks of four images.
    assert figures == {"samples": 4 * STEPS, "counts": [2] * STEPS, "evaluations": 0}
    weights = dict(zip(chosen.entries, chosen.weights, strict=True))
    for step in range(STEPS):
        assert [weights[number, step, row] for number, row in ((0, 0), (0, 1), (1, 0), (1, 1))] == [2, 2, 1, 1]


def test_select_mmd_counts_steps_from_the_noise() -> None:
    net = TimedNet()
    job, figures = select(SelectInformative("mmd", rounds=3, batch=1), net)
    kernel = median_kernel(bottleneck_features(net, job.handed["trajectories"][0]))
    counts = torch.zeros(STEPS, dtype=torch.float64)
    for _ in range(3):
        counts[int(mmd_scores(kernel, counts).argmax())] += 1
    assert figures["counts"] == counts.int().tolist()
    assert figures["evaluations"] == 2 * STEPS
    assert {step for _, step, _ in job.handed["calibration"].entries} == set(counts.nonzero().flatten().tolist())
    args, _ = inputs(job.handed["trajectories"], job.handed["calibration"], [0])
    assert args[0].shape == (1, 2, 4, 4)


def test_at_steps_refuses_what_is_not_recorded() -> None:
    _, trajectories = recorded(TimedNet())
    assert at_steps(trajectories, [(1, 3), (1, 3), (0, 0)]).entries == ((1, 1, 1), (0, 0, 0))
    for pick in ((1, 4), (5, 0), (0, -1)):
        with pytest.raises(CalibrationError, match="not recorded: there are 4 images"):
            at_steps(trajectories, [pick])


def test_settings_are_checked() -> None:
    with pytest.raises(SpecError, match=r"ucb, count, mmd, random, uniform, found 'ubc'. Did you mean"):
        check_choose("ubc")
    with pytest.raises(SpecError, match="mmd, random, uniform, found 'ucb'"):
        SelectInformative("ucb")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="rounds and batch of at least 1, found 0, 4"):
        SelectInformative(rounds=0, batch=4)


class JointBlock(nn.Module):
    """Returns the text first, as diffusers' joint blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return self.text(encoder_hidden_states), self.image(hidden_states)


class JointNet(nn.Module):
    def __init__(self, by_name: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.mid_block, self.by_name = JointBlock(), by_name

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        tokens, text = sample.flatten(2).mT, torch.ones(len(sample), 3, 2)
        named = {"hidden_states": tokens, "encoder_hidden_states": text}
        _, image = self.mid_block(**named) if self.by_name else self.mid_block(tokens, text)
        return image.mT.reshape(sample.shape)


@pytest.mark.parametrize("by_name", [True, False])
def test_features_of_a_joint_block_are_the_images(by_name: bool) -> None:
    net = JointNet(by_name)
    _, trajectories = recorded(net)
    found = bottleneck_features(net, trajectories[0])
    for features, step in zip(found, trajectories[0].steps, strict=True):
        torch.testing.assert_close(features.float(), step.guided.mean((0, 2, 3)))


def test_halves_of_a_guidance_in_separate_calls_both_count() -> None:
    net = TimedNet()
    _, trajectories = recorded(net)
    (call,) = trajectories[0].steps[0].calls
    other = replace(call, args=(2 * call.args[0], *call.args[1:]))
    steps = [replace(step, calls=(*step.calls, other)) for step in trajectories[0].steps]
    guided = replace(trajectories[0], steps=tuple(steps))
    plain, toward = (
        bottleneck_features(net, replace(guided, steps=tuple(replace(s, calls=(s.calls[half],)) for s in steps)))
        for half in (0, 1)
    )
    torch.testing.assert_close(bottleneck_features(net, guided), (plain + toward) / 2)
    job = Job(None, net, net, Run(), STEPS, handed={"trajectories": [guided]})
    assert SelectInformative("mmd", rounds=2, batch=1).run(job)["evaluations"] == 4 * STEPS
