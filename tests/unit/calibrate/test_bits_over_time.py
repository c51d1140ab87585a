"""Bits over time: how they are written, the ranges they get, and that the search finds which steps need them."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor, nn
from typer.testing import CliRunner

import tiny
from stepquant.api import Quantized, load, open_model, quantize
from stepquant.calibrate.allocation import Allocate, allocated, solve
from stepquant.calibrate.ranges import observing
from stepquant.calibrate.reconstruct import clocked
from stepquant.calibrate.sensitivity import (
    Item,
    Probe,
    _directions,
    _products,
    final_drift,
    final_scores,
    output_scores,
)
from stepquant.calibrate.stages import LayerRule, Place
from stepquant.calibrate.step_groups import BitsUntil, TimedScheme, Timeline, check_over_time
from stepquant.calibrate.trajectory import Trajectory, record, seal
from stepquant.cli.commands import app
from stepquant.cli.views import plan_of
from stepquant.config import dump, load_config, resolve
from stepquant.errors import SpecError
from stepquant.inspection import inspect_checkpoint
from stepquant.methods import METHODS, STAGES
from stepquant.model.assembly import describe
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.recipe import Job, Recipe, recipe_from_dict
from stepquant.run import Run

STEPS = 4
TIMES = (0.0, 250.0, 500.0, 750.0)
"""Of `DDIMScheduler` with four steps, in the order of the clock's bins."""
HALVES = (BitsUntil(8, 500.0), BitsUntil(3))


class Pair(nn.Module):
    """Two convolutions. `early` matters while the timestep is above 400, `late` below."""

    def __init__(self, faint: float = 0.02) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.faint = faint
        self.early = nn.Conv2d(2, 2, 3, padding=1)
        self.late = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        noisy = torch.as_tensor(timestep).reshape(-1)[0] > 400
        hidden = 0.5 * sample
        return self.early(hidden) * (1.0 if noisy else self.faint) + self.late(hidden) * (self.faint if noisy else 1.0)


def pair_pipe(faint: float = 0.02) -> DenoiserPipeline:
    return DenoiserPipeline(Pair(faint).eval(), DDIMScheduler(clip_sample=False), (2, 6, 6))


def recorded(pipe: DenoiserPipeline, seeds: tuple[int, ...] = (3, 1)) -> list[Trajectory]:
    return [seal(one) for one in record(pipe, pipe.denoiser, seeds=seeds, steps=STEPS, batch_size=2, run=Run())]


def rtn(activations: int | None = 8, rules: tuple[LayerRule, ...] = (), **options: Any) -> Recipe:
    common: dict[str, Any] = {"samples": 4, "batch": 2, "ranges": "minmax", "ends": "same"}
    return METHODS["rtn"](weights=8, activations=activations, rules=rules, **common, **options)


def quantizer_of(quantized: Quantized, name: str) -> InputQuantizer:
    found = quantized_layers(quantized.pipe.denoiser)[name].input_quantizer
    assert isinstance(found, InputQuantizer)
    return found


# How they are written.


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((), "found an empty one"),
        ((BitsUntil(8, 500.0),), "the last holds for the rest"),
        ((BitsUntil(8), BitsUntil(4)), "says until which timestep it holds"),
        ((BitsUntil(8, float("nan")), BitsUntil(4)), "says until which timestep it holds"),
        ((BitsUntil(8, 500.0), BitsUntil(4, 700.0), BitsUntil(5, 600.0), BitsUntil(4)), "must fall"),
        ((BitsUntil(8, 500.0), BitsUntil(4, 500.0), BitsUntil(4)), "must fall"),
        ((BitsUntil(8, 500.0), BitsUntil(9)), "bits must be a whole number from 2 to 8, found 9"),
    ],
)
def test_bits_over_time_that_make_no_sense(entries: tuple[BitsUntil, ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_over_time(entries)
    with pytest.raises(SpecError, match=message):
        rtn(rules=(LayerRule("*", 4, entries),))


def test_groups_of_timesteps_that_fall_and_rise() -> None:
    falling = Timeline(TIMES, True, (0.25,) * 4)
    assert falling.groups_of((500.0,)) == (1, 1, 0, 0)  # until is inclusive; bins count from the image
    assert falling.groups_of((499.0, 100.0)) == (2, 1, 0, 0)
    rising = Timeline(TIMES, False, (0.1, 0.2, 0.3, 0.4))
    assert rising.groups_of((500.0,)) == (0, 0, 0, 1)
    assert rising.shares((500.0,)) == pytest.approx((0.6, 0.4))
    with pytest.raises(SpecError, match=r"go from 750 to 0, so the ends must fall too, found 100, 500"):
        falling.groups_of((100.0, 500.0))
    with pytest.raises(SpecError, match=r"so the ends must rise too"):
        rising.groups_of((500.0, 100.0))
    with pytest.raises(SpecError, match=r"entry 2 of 3, behind 600 and until 502, has no timestep"):
        falling.groups_of((600.0, 502.0))
    with pytest.raises(SpecError, match=r"entry 1 of 2, at the beginning and until 900"):
        falling.groups_of((900.0,))


def test_groups_are_as_equal_as_possible() -> None:
    timeline = Timeline(TIMES, True, (0.25,) * 4)
    assert timeline.split(1) == ()
    assert timeline.split(2) == (375.0,)
    assert timeline.groups_of(timeline.split(4)) == (3, 2, 1, 0)
    assert Timeline(TIMES, False, (0.25,) * 4).split(2) == (375.0,)
    with pytest.raises(SpecError, match="5 groups of timesteps are not possible: this run has 4 timesteps"):
        timeline.split(5)


def test_a_rule_with_bits_over_time_gives_rows_of_those_bits_and_of_their_own_ranges() -> None:
    pipe = pair_pipe()
    found = quantizer_of(quantize(pipe, rtn(rules=(LayerRule("late", 4, HALVES),)), steps=STEPS), "late")
    of_bin = [found.bits[row] for row in found.row_of_bin.tolist()]
    assert of_bin == [3, 3, 8, 8]
    # The oracle: what the layer is given, from the recorded calls themselves.
    recording = record(pipe, pipe.denoiser, seeds=range(1_000_000, 1_000_004), steps=STEPS, batch_size=2, run=Run())
    for times, bits in (((750.0, 500.0), 8), ((250.0, 0.0), 3)):
        inputs = torch.cat(
            [
                0.5 * (call.args[0] if call.args else call.kwargs["sample"]).flatten()
                for one in recording
                for step in one.steps
                for call in step.calls
                if float(step.timestep) in times
            ]
        )
        (row,) = {found.row_of_bin.tolist()[TIMES.index(time)] for time in times}
        span = float(inputs.max() - inputs.min())
        assert float(found.scale[row]) == pytest.approx(span / (2**bits - 1), rel=1e-4)


def test_rows_for_every_step_are_divided_too() -> None:
    recipe = rtn(rows="step", rules=(LayerRule("late", 4, HALVES),))
    made = quantize(pair_pipe(), recipe, steps=STEPS)
    found = quantizer_of(made, "late")
    assert found.rows == 4
    assert [found.bits[row] for row in found.row_of_bin.tolist()] == [3, 3, 8, 8]
    plain = quantizer_of(quantize(pair_pipe(), rtn(rows="step"), steps=STEPS), "late")
    for at in (2, 3):  # 8 bits as without a rule
        row, other = int(found.row_of_bin[at]), int(plain.row_of_bin[at])
        assert float(found.scale[row]) == float(plain.scale[other])


def test_later_rules_win_over_bits_in_time() -> None:
    rules = (LayerRule("*", 4, HALVES), LayerRule("late", 4, 5), LayerRule("early", 4, None))
    made = quantize(pair_pipe(), rtn(rules=rules), steps=STEPS)
    assert quantizer_of(made, "late").bits == (5,)
    assert quantized_layers(made.pipe.denoiser)["early"].input_quantizer is None


def test_ends_that_no_timestep_belongs_to_are_an_error_that_names_the_layer() -> None:
    rule = LayerRule("late", 4, (BitsUntil(8, 900.0), BitsUntil(4)))
    with pytest.raises(SpecError, match=r"The bits over time of late: entry 1 of 2.*has no timestep.*750 to 0"):
        quantize(pair_pipe(), rtn(rules=(rule,)), steps=STEPS)


def test_methods_that_find_ranges_in_their_own_way_refuse() -> None:
    with pytest.raises(SpecError, match=r"FitRangesProgressively.*would drop the bits over time that Place has"):
        METHODS["pcr"](rules=(LayerRule("*", 4, HALVES),))
    with pytest.raises(SpecError, match=r"would drop the bits over time that Allocate has planned"):
        allocated(METHODS["pcr"](), weight_bits=4.0, activation_bits=5.0, step_groups=2)
    allocated(METHODS["pcr"](), weight_bits=4.0, activation_bits=5.0)  # as before


def test_saved_and_loaded(tmp_path: Path) -> None:
    made = quantize(tiny.tiny_pipe()[0], rtn(rules=(LayerRule("mid_block.*", 4, HALVES),)), steps=STEPS)
    made.save(tmp_path / "out")
    layers = {layer["name"]: layer for layer in inspect_checkpoint(tmp_path / "out")["layers"]}
    mixed = [name for name, layer in layers.items() if layer["row_bits"]]
    assert mixed
    assert all(name.startswith("mid_block.") for name in mixed)
    back = load(tmp_path / "out", engine="simulated")
    assert describe(back.unet).layers == describe(made.pipe.unet).layers


def test_a_killed_run_goes_on_with_the_bits_that_were_planned(tmp_path: Path) -> None:
    recipe = rtn(rules=(LayerRule("late", 4, HALVES),))
    with pytest.raises(KeyboardInterrupt):
        quantize(
            pair_pipe(),
            recipe,
            steps=STEPS,
            run=Run(work=tmp_path, progress=tiny.Interrupt("Observing activations", 1)),
        )
    found = quantize(pair_pipe(), recipe, steps=STEPS, run=Run(work=tmp_path), resume=True)
    assert sorted(quantizer_of(found, "late").bits) == [3, 8]
    assert quantizer_of(found, "early").bits == (8,)


# Settings.


RULE = {"pattern": "*", "weights": 4, "activations": [{"bits": 8, "until": 500}, {"bits": 4}]}


def test_run_yaml_with_bits_over_time_comes_back(tmp_path: Path) -> None:
    first = resolve({"model": "digits-unet", "method": "rtn", "rules": [RULE]})
    place = next(stage for stage in first.recipe.stages if isinstance(stage, Place))
    assert place.rules == (LayerRule("*", 4, (BitsUntil(8, 500), BitsUntil(4))),)
    dump(first, tmp_path / "run.yaml")
    again = resolve(load_config(tmp_path / "run.yaml"))
    assert (again.recipe, again.to_dict()) == (first.recipe, first.to_dict())
    assert recipe_from_dict(json.loads(json.dumps(first.recipe.to_dict())), STAGES) == first.recipe


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        ("4", r"rules\.0\.activations: expected 2 to 8 bits, a list such as \[\{bits: 8, until: 700\}"),
        ([4, 8], r"rules\.0\.activations\.0: expected bits and until.*found 4"),
        ([{"until": 3}], r"rules\.0\.activations\.0: expected bits and until"),
        ([{"bits": 8, "untl": 3}, {"bits": 4}], r"activations\.0\.untl: there is no such key\. Did you mean 'until'"),
        ([{"bits": 16, "until": 3}, {"bits": 4}], r"activations\.0\.bits: expected 2 to 8 bits, found 16"),
        ([{"bits": 8, "until": "half"}, {"bits": 4}], r"activations\.0\.until: expected a timestep, found 'half'"),
        ([{"bits": 8}, {"bits": 4}], r"rules\.0\.activations: Of bits over time every entry but the last says"),
    ],
)
def test_mistakes_in_a_rule(activations: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve({"model": "digits-unet", "method": "rtn", "rules": [{**RULE, "activations": activations}]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 4.0, "step_groups": 0}, "step_groups must be at least 1"),
        ({"weight_bits": 4.0, "step_groups": 2}, "no budget for the bits of activations"),
        ({"activation_bits": 4.0, "step_groups": 2, "score": "decoupled"}, "says nothing about groups"),
    ],
)
def test_groups_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Allocate(Place(), **settings)


# Sensitivities.


def probe_of(pipe: DenoiserPipeline, trajectories: list[Trajectory], until: tuple[float, ...]) -> Probe:
    job = Job(pipe, pipe.denoiser, copy.deepcopy(pipe.denoiser), Run(), STEPS, {}, {"trajectories": trajectories})
    Place(weights=8, activations=8, ends="same", softmax_bits=None).run(job)
    probe = Probe(job.denoiser, job.handed["plan"], "minmax", until)
    probe.observe(trajectories, Run())
    return probe


def test_contributions_of_groups_add_up_to_those_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pair_pipe(faint=0.7)
    trajectories = recorded(pipe)
    probe = probe_of(pipe, trajectories, (700.0, 500.0, 100.0))  # each step is a group
    # With equal ranges, so that the errors are the same ones.
    monkeypatch.setattr(
        probe, "quantizer", lambda name, attribute, spec, _group: Probe.quantizer(probe, name, attribute, spec)
    )
    whole = [Item(name, "activations", (2, 4)) for name in ("early", "late")]
    parts = [replace(item, group=group) for item in whole for group in range(STEPS)]
    directions = _directions(trajectories[0], 3, Run(), 0)
    steps = {
        len(items): torch.stack(list(_products(probe, trajectories[0], items, directions, 2)))
        for items in (whole, parts)
    }  # [S, items, bits, J, images]
    by_step = steps[len(parts)].reshape(STEPS, 2, STEPS, 2, 3, 2)
    torch.testing.assert_close(by_step.sum(2), steps[len(whole)], rtol=1e-12, atol=0)
    for at, group in itertools.product(range(STEPS), range(STEPS)):  # the last step comes first
        assert bool(by_step[at, :, group].abs().sum() > 0) == (group == STEPS - 1 - at)

    final, incoherent, _ = final_scores(probe, trajectories, [*whole, *parts], projections=3, run=Run())
    mse, relative, _ = output_scores(probe, trajectories, [*whole, *parts], run=Run())
    for item, bits in itertools.product(whole, (2, 4)):
        own = [part for part in parts if part.layer == item.layer]
        for scores in (incoherent, mse, relative):
            assert sum(scores[part][bits] for part in own) == pytest.approx(scores[item][bits], rel=1e-9)
        # A group of one step has nothing to cancel.
        assert [final[part][bits] for part in own] == pytest.approx([incoherent[part][bits] for part in own])


def test_a_group_is_judged_with_its_own_ranges() -> None:
    pipe = pair_pipe()
    trajectories = recorded(pipe)
    probe = probe_of(pipe, trajectories, (500.0,))
    spec = probe.plan["late"].input
    assert spec is not None
    clock = clocked(probe.denoiser)
    with observing(probe.denoiser, probe.plan, clock, Run().generator("other")) as observers:
        for step in trajectories[0].steps[:2]:
            for call in step.calls:
                probe.denoiser(*call.args, **call.kwargs)
    wanted = observers["late", "input_quantizer"].params(spec, torch.zeros(STEPS, dtype=torch.int64), "minmax", "")
    assert float(probe.quantizer("late", "input_quantizer", spec, 0).scale) == pytest.approx(float(wanted.scale))
    assert float(probe.quantizer("late", "input_quantizer", spec).scale) > float(wanted.scale)


# The search.


def searched(pipe: DenoiserPipeline, activations: float = 5.0, **settings: Any) -> Quantized:
    own: dict[str, Any] = {"samples": 2, "held_out": 2, "projections": 4, "refine": 0, "bits": (2, 4, 8)}
    return quantize(pipe, allocated(rtn(), activation_bits=activations, **{**own, **settings}), steps=STEPS)


def figures_of(quantized: Quantized) -> dict[str, Any]:
    (found,) = [entry for entry in quantized.figures if entry["stage"] == "Allocate"]
    return found


def chosen(quantized: Quantized) -> dict[str, list[int]]:
    return {
        rule["pattern"]: [entry["bits"] for entry in rule["activations"]] for rule in figures_of(quantized)["rules"]
    }


def test_steps_that_matter_get_the_bits() -> None:
    found = searched(pair_pipe(), step_groups=2)
    assert chosen(found) == {"early": [8, 2], "late": [2, 8]}
    assert figures_of(found)["activation_bits"] == pytest.approx(5.0)
    assert figures_of(found)["until"] == [375.0]
    assert [quantizer_of(found, "early").bits[row] for row in quantizer_of(found, "early").row_of_bin] == [2, 2, 8, 8]

    def drift(quantized: Quantized) -> float:
        reference = recorded(pair_pipe(), (7, 8, 9, 10))
        return float(final_drift(quantized.pipe.denoiser, reference, lambda _done: None).mean())

    alone = searched(pair_pipe(), step_groups=1)
    assert figures_of(alone)["activation_bits"] == pytest.approx(5.0, abs=1.0)
    assert drift(found) < 0.5 * drift(alone)


def test_the_search_against_every_choice() -> None:
    """Two layers and two groups: all 81 choices are measured, and ours is the best or next to it."""
    pipe = pair_pipe(faint=0.3)
    trajectories = recorded(pipe, tuple(range(16)))
    found = quantize(
        pipe,
        allocated(
            METHODS["rtn"](weights=None, activations=8, samples=4, batch=2, ranges="minmax", ends="same"),
            activation_bits=5.0, step_groups=2, samples=2, held_out=2, refine=0, bits=(2, 4, 8), projections=8,
        ),
        steps=STEPS,
    )  # fmt: skip
    probe = probe_of(pipe, trajectories, (375.0,))
    spec = probe.plan["early"].input
    assert spec is not None
    drifts: dict[tuple[int, ...], float] = {}
    for bits in itertools.product((2, 4, 8), repeat=4):
        if sum(bits) / 4 > 5.0:
            continue
        plan: dict[str, Any] = {
            name: TimedScheme(input=spec, over_time=(BitsUntil(first, 375.0), BitsUntil(second)))
            for name, (first, second) in (("early", bits[:2]), ("late", bits[2:]))
        }
        probe.install(plan)
        drifts[bits] = float(final_drift(probe.denoiser, trajectories, lambda _done: None).mean())
    own = chosen(found)
    ours = drifts[*own["early"], *own["late"]]
    ranked = sorted(drifts.values())
    assert ours <= 1.1 * ranked[0]
    assert ours < 0.6 * drifts[4, 4, 4, 4]  # or every choice would pass


def test_measured_changes_and_promised_bits_and_bytes(tmp_path: Path) -> None:
    found = quantize(
        tiny.tiny_pipe()[0],
        allocated(
            rtn(), weight_bits=4.5, activation_bits=5.0, step_groups=3, samples=2, held_out=2, projections=1,
            refine=8, bits=(2, 4, 8),
        ),
        steps=STEPS,
    )  # fmt: skip
    figures = figures_of(found)
    assert any(" in group " in row["what"] for row in figures["measured"][1:])
    found.save(tmp_path / "out")
    layers = {layer["name"]: layer for layer in inspect_checkpoint(tmp_path / "out")["layers"]}
    assert figures["layer_bytes"] == sum(layer["bytes"] for layer in layers.values())
    # The average over steps and over what enters the layers, from the quantizers themselves.
    sizes: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda _module, args: sizes.update({name: sum(x.numel() for x in args)})

    for name, layer in quantized_layers(found.pipe.unet).items():
        layer.register_forward_pre_hook(count(name))
    found.pipe.unet(torch.zeros(1, 1, 8, 8), 1)
    spent = 0.0
    for name, layer in quantized_layers(found.pipe.unet).items():
        quantizer = layer.input_quantizer
        spent += sizes[name] * sum(quantizer.bits[row] for row in quantizer.row_of_bin.tolist()) / STEPS
    if not any(name.endswith("values") for name in sizes):  # there, operands differ where the softmax has 8 bits
        pytest.fail("a network with attention was meant")
    assert figures["activation_bits"] == pytest.approx(spent / sum(sizes.values()), abs=1e-6)
    assert 4.5 < figures["activation_bits"] <= 5.0


def test_a_plan_on_disk_states_them_and_gives_the_same_model(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, plan = tmp_path / "model", tmp_path / "plan.yaml"
    DDIMPipeline(tiny.tiny_unet(), DDIMScheduler()).save_pretrained(model)
    options = [
        "--target", "W5A5", "--steps", str(STEPS), "--method", "rtn", "--calibration-samples", "4",
        "--set", "options.batch=2", "--set", "options.ranges=minmax", "--set", "allocation.samples=2",
        "--set", "allocation.held_out=2", "--set", "allocation.projections=1", "--set", "allocation.refine=0",
        "--set", "allocation.bits=[2, 4, 8]", "--set", "allocation.step_groups=2",
    ]  # fmt: skip
    done = CliRunner().invoke(app, ["allocate", str(model), "-o", str(plan), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = plan.read_text()
    assert "bits over time" in text
    data = load_config(plan)
    lists = [rule["activations"] for rule in data["rules"]]
    assert [set(entry) for entry in lists[0]] == [{"bits", "until"}, {"bits"}]
    assert any(entries[0]["bits"] != entries[1]["bits"] for entries in lists)
    checked = CliRunner().invoke(app, ["check", str(plan)])
    assert checked.exit_code == 0, checked.output
    low, high = sorted(entry["bits"] for entry in next(one for one in lists if one[0]["bits"] != one[1]["bits"]))
    planned = CliRunner().invoke(app, ["quantize", "--config", str(plan), "-o", str(tmp_path / "out"), "--dry-run"])
    assert f"A{low}-{high}" in planned.output, planned.output
    run = resolve(data)
    layers = plan_of(run)["layers"]
    made = quantize(open_model(str(model)), run.recipe, steps=run.steps, run=Run(seed=run.seed))
    for rule in data["rules"]:
        quantizer = quantized_layers(made.pipe.unet)[rule["pattern"]].input_quantizer
        assert isinstance(quantizer, InputQuantizer)
        assert [entry["bits"] for entry in layers[rule["pattern"]]["over_time"]] == [
            entry["bits"] for entry in rule["activations"]
        ]
        by_bin = [quantizer.bits[row] for row in quantizer.row_of_bin.tolist()]
        assert by_bin == [rule["activations"][1]["bits"]] * 2 + [rule["activations"][0]["bits"]] * 2


def test_the_solver_writes_nothing_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS does, for programs like these, and it would break `--json`."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        scores = 10 ** (-8 * torch.rand(120, 7, generator=generator, dtype=torch.float64))
        sizes = (10 ** (3 * torch.rand(120, generator=generator))).tolist()
        objective = scores.sort(1, descending=True).values.tolist()
        solve(objective, [([[size * bits for bits in range(2, 9)] for size in sizes], sum(sizes) * 4.4)])
    assert capfd.readouterr().out == ""
