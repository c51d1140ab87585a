"""Allocation: the integer program against exhaustive search, budgets, planted layers, plans, and resuming."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor, nn
from typer.testing import CliRunner

import tiny
from stepquant.api import Quantized, quantize
from stepquant.calibrate.allocation import Allocate, allocated, levelled, parse_target, solve
from stepquant.calibrate.stages import LayerRule, Place
from stepquant.cli.commands import app
from stepquant.config import dump, load_config, resolve
from stepquant.errors import CalibrationError, SpecError
from stepquant.inspection import inspect_checkpoint
from stepquant.methods import METHODS, STAGES
from stepquant.model.assembly import describe
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.recipe import Recipe, recipe_from_dict
from stepquant.run import Run

STEPS = 3
QUICK: dict[str, Any] = {"samples": 2, "projections": 2, "held_out": 2, "refine": 0, "bits": (2, 4, 8)}


def rtn(*, samples: int = 4, activations: int | None = 8, **settings: Any) -> Recipe:
    base = METHODS["rtn"](samples=samples, batch=2, ranges="minmax", weights=4, activations=activations, ends="same")
    return allocated(base, **{**QUICK, **settings})


class Chain(nn.Module):
    """Two convolutions of the same shape. `loud` has an output 30 times that of `quiet`, but hardly any effect."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.loud = nn.Conv2d(2, 2, 3, padding=1)
        self.quiet = nn.Conv2d(2, 2, 3, padding=1)
        self.loud.weight.data *= 30

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return 1e-3 * self.loud(sample) + self.quiet(sample)


def chain_pipe() -> DenoiserPipeline:
    return DenoiserPipeline(Chain().eval(), DDIMScheduler(clip_sample=False), (2, 6, 6))


def figures_of(quantized: Quantized) -> dict[str, Any]:
    (found,) = [entry for entry in quantized.figures if entry["stage"] == "Allocate"]
    return found


def weight_bits(quantized: Quantized) -> dict[str, int | None]:
    return {rule["pattern"]: rule["weights"] for rule in figures_of(quantized)["rules"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4.5bit", (4.5, None)), ("4 bits", (4.0, None)), (4.5, (4.5, None)), ("W4.5A6", (4.5, 6.0)), ("3", (3.0, None))],
)
def test_targets(text: str | float, expected: tuple[float, float | None]) -> None:
    assert parse_target(text) == expected


@pytest.mark.parametrize("text", ["", "four", "W4", "4.5byte", "-3bit", "W4A"])
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(SpecError, match=r"A target looks like 4\.5bit"):
        parse_target(text)


@pytest.mark.parametrize("seed", range(12))
def test_the_integer_program_against_all_choices(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = [3, 4, 2, 3]
    # Like scores: over many orders of magnitude.
    objective = [(10 ** (-8 * torch.rand(n, generator=generator, dtype=torch.float64))).tolist() for n in counts]
    costs = [torch.randint(1, 1000, (n,), generator=generator).double().tolist() for n in counts]
    others = [torch.randint(0, 9, (n,), generator=generator).double().tolist() for n in counts]
    limits = [(costs, 1500.0), (others, 16.0)]

    def total(values: list[list[float]], places: Any) -> float:
        return sum(row[place] for row, place in zip(values, places, strict=True))

    feasible = [
        places
        for places in itertools.product(*(range(n) for n in counts))
        if all(total(values, places) <= budget for values, budget in limits)
    ]
    if not feasible:
        with pytest.raises(CalibrationError, match="within the budget"):
            solve(objective, limits)
        return
    found = solve(objective, limits)
    assert tuple(found) in feasible
    assert total(objective, found) == pytest.approx(min(total(objective, places) for places in feasible), rel=1e-5)


def test_a_budget_that_is_met_exactly_is_met() -> None:
    rows = [[1.0, 0.1], [1.0, 0.2]]
    costs = [[4e6, 8e6], [4e6 + 1, 8e6 + 1]]
    assert solve(rows, [(costs, 12e6 + 1)]) == [1, 0]
    assert solve(rows, [(costs, 12e6 + 0.5)]) == [0, 0]  # less by half an element, far inside the solver's tolerance


def test_more_bits_never_score_worse() -> None:
    assert levelled({2: 4.0, 3: 0.5, 4: 1.0, 5: 0.0}) == {2: 4.0, 3: 1.0, 4: 1.0, 5: 0.0}


def test_a_layer_gets_bits_for_what_it_does_to_the_end_not_to_its_output() -> None:
    found = {
        score: weight_bits(quantize(chain_pipe(), rtn(weight_bits=5.0, score=score), steps=STEPS))
        for score in ("final", "mse")
    }
    assert found["final"] == {"loud": 2, "quiet": 8}
    assert found["mse"] == {"loud": 8, "quiet": 2}


def least_of(error: Exception) -> int:
    return int(str(error).split("the least is ")[1].split(",")[0])


def test_impossible_budgets_name_the_smallest_before_anything_is_recorded() -> None:
    with pytest.raises(SpecError, match=r"average of 1.5 bits for weights is not possible: .* it is 2\."):
        quantize(chain_pipe(), rtn(weight_bits=1.5), steps=STEPS)
    pipe = chain_pipe()
    pipe.denoiser.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(SpecError, match=r"50 bytes for the layers are not possible: the least is \d+") as caught:
        quantize(pipe, rtn(max_bytes=50), steps=STEPS)
    # The ranges of the layer that reads the sample take more once it is known which layer that is.
    with pytest.raises(SpecError, match=r"not possible: the least is \d+") as later:
        quantize(chain_pipe(), rtn(max_bytes=least_of(caught.value)), steps=STEPS)
    least = least_of(later.value)
    made = quantize(chain_pipe(), rtn(max_bytes=least), steps=STEPS)
    assert set(weight_bits(made).values()) == {2}
    assert figures_of(made)["layer_bytes"] == least
    with pytest.raises(SpecError, match=f"least is {least}"):
        quantize(chain_pipe(), rtn(max_bytes=least - 1), steps=STEPS)


def test_impossible_activations_are_found_once_their_sizes_are_known() -> None:
    with pytest.raises(SpecError, match=r"average of 1\.5 bits for activations is not possible"):
        quantize(chain_pipe(), rtn(weight_bits=4.0, activation_bits=1.5), steps=STEPS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one budget"),
        ({"weight_bits": 4.0, "max_bytes": 10}, "weight_bits and max_bytes"),
        ({"max_drift": -1.0}, "max_drift must be a positive number"),
        ({"weight_bits": 40.0}, "weight_bits must be at most 32, which is floating point, found 40"),
        ({"weight_bits": 4.0, "bits": (4, 2)}, "ascending"),
        ({"weight_bits": 4.0, "bits": (4, 16)}, "from 2 to 8"),
        ({"weight_bits": 4.0, "score": "mes"}, "Did you mean 'mse'"),
        ({"max_drift": 1.0, "score": "mse"}, "needs a score in units of the final state"),
        ({"weight_bits": 4.0, "projections": 0}, "at least 1"),
        ({"weight_bits": "placed"}, "weight_bits must be a number, or \"place\" .*'placed' with weights=4"),
        ({"weight_bits": "place", "place": Place(None, 8)}, "'place' with weights=None"),
        ({"max_bytes": 10, "beside_uniform": True}, "same average bits"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Allocate(**{"place": Place(), **settings})


def test_measuring_needs_images_of_its_own() -> None:
    pipe = chain_pipe()
    pipe.denoiser.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(
        SpecError, match=r"only 1 mini-batch: record more samples .*, use a smaller batch, or give refine"
    ):
        quantize(pipe, rtn(samples=2, weight_bits=4.0, refine=1), steps=STEPS)
    # A bound on the drift is always measured, so refine=0 would not help.
    with pytest.raises(SpecError, match=r"only 1 mini-batch: .*, use a smaller batch\.$"):
        quantize(pipe, rtn(samples=2, max_drift=1.0), steps=STEPS)
    quantize(chain_pipe(), rtn(samples=2, weight_bits=4.0, refine=0), steps=STEPS)
    quantize(chain_pipe(), rtn(samples=3, weight_bits=4.0, refine=1), steps=STEPS)  # the second has one image


def test_too_few_mini_batches_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepquant.cli.work.tune_allocator", lambda: True)
    DDIMPipeline(tiny.tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "model")
    target = [
        "--target",
        "4.5bit",
        "--preset",
        "quick",
        "--method",
        "rtn",
        "--steps",
        "2",
        "--calibration-samples",
        "1",
    ]
    for name, made in (("allocate", "plan.yaml"), ("quantize", "out")):
        command = [name, str(tmp_path / "model"), "-o", str(tmp_path / made), *target]
        for extra in ([], ["--dry-run"]):
            found = CliRunner().invoke(app, [*command, *extra])
            assert isinstance(found.exception, SpecError)
            assert "only 1 mini-batch" in str(found.exception)
            assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def unet_allocation() -> Quantized:
    torch.set_num_threads(1)
    base = METHODS["rtn"](samples=4, batch=2, ranges="minmax", rules=(LayerRule("mid_block.*", 3, 5),))
    recipe = allocated(base, **{**QUICK, "weight_bits": 4.5, "activation_bits": 6.0, "refine": 2})
    return quantize(tiny.tiny_pipe()[0], recipe, steps=STEPS)


def test_a_checkpoint_has_the_bits_and_bytes_that_were_promised(unet_allocation: Quantized, tmp_path: Path) -> None:
    found = figures_of(unet_allocation)
    unet_allocation.save(tmp_path / "out")
    layers = {layer["name"]: layer for layer in inspect_checkpoint(tmp_path / "out")["layers"]}
    sizes = {name: torch.tensor(layer["shape"]).prod().item() for name, layer in layers.items() if layer["shape"]}
    assert all(layers[name]["weight_bits"] is not None for name in sizes)  # or the sums below would be others
    average = sum(sizes[name] * layers[name]["weight_bits"] for name in sizes) / sum(sizes.values())
    assert found["weight_bits"] == pytest.approx(average, abs=1e-6)
    assert 4.3 < found["weight_bits"] <= 4.5
    assert 5.0 < found["activation_bits"] <= 6.0
    assert found["layer_bytes"] == sum(layer["bytes"] for layer in layers.values())
    files = [tmp_path / "out" / "stepquant.json", *(tmp_path / "out" / "unet").iterdir()]
    assert found["checkpoint_bytes"] == pytest.approx(sum(file.stat().st_size for file in files), rel=0.05)
    for rule in found["rules"]:
        own = layers[rule["pattern"]]
        assert (own["weight_bits"], own["input_bits"]) == (rule["weights"], rule["activations"]), rule
    assert len({layers[name]["weight_bits"] for name in sizes}) > 1


def test_ends_rules_and_softmax_stay_as_they_were_asked_for(unet_allocation: Quantized) -> None:
    schemes = {name: layer.scheme for name, layer in describe(unet_allocation.pipe.unet).layers.items()}
    named = {rule["pattern"] for rule in figures_of(unet_allocation)["rules"]}
    for name, scheme in schemes.items():
        if name in ("conv_in", "conv_out"):
            assert (scheme.weight.bits, scheme.input.bits) == (8, 8)
        elif name.startswith("mid_block."):
            assert scheme.input.bits == 5
        elif name.endswith("values"):
            assert (scheme.input.bits, scheme.second.bits) == (8, 8)
        else:
            assert name in named
            continue
        assert name not in named


def test_a_change_is_kept_only_if_it_measures_better(unet_allocation: Quantized) -> None:
    found = figures_of(unet_allocation)
    first, *changes = found["measured"]
    kept = [row["drift"] for row in changes if row["kept"]]
    assert len(changes) <= 2
    assert found["measured_drift"] == (kept[-1] if kept else first["drift"])
    assert [first["drift"], *kept] == sorted([first["drift"], *kept], reverse=True)


@pytest.mark.parametrize(("score", "kept"), [("mse", "uniform"), ("final", "solution")])
@pytest.mark.parametrize("samples", [4, 2])  # with images to measure on, and on those of the sensitivities
def test_equal_bits_are_taken_unless_the_solution_samples_better(score: str, kept: str, samples: int) -> None:
    """The error of its output says that `loud` needs bits, which in the end costs all that `quiet` does."""
    recipe = rtn(samples=samples, weight_bits=5.0, activations=None, score=score, beside_uniform=True)
    quantized = quantize(chain_pipe(), recipe, steps=STEPS)
    found = figures_of(quantized)
    beside = found["beside_uniform"]
    assert (beside["kept"], beside["bits"]) == (kept, {"weights": 4})
    assert (beside["solution_drift"] < beside["drift"]) == (kept == "solution")
    assert found["measured_drift"] == min(beside["solution_drift"], beside["drift"])
    assert [row["kept"] for row in found["measured"]] == [kept == "solution", kept == "uniform"]
    expected = {"loud": 2, "quiet": 8} if kept == "solution" else {"loud": 4, "quiet": 4}
    assert weight_bits(quantized) == expected
    assert {name: layer.scheme.weight.bits for name, layer in describe(quantized.pipe.denoiser).layers.items()} == (  # type: ignore[union-attr]
        expected
    )


def test_equal_bits_need_not_be_a_candidate() -> None:
    base = METHODS["rtn"](samples=4, batch=2, ranges="minmax", weights=5, activations=None, ends="same")
    recipe = allocated(base, **{**QUICK, "weight_bits": "place", "score": "mse", "beside_uniform": True})
    quantized = quantize(chain_pipe(), recipe, steps=STEPS)
    found = figures_of(quantized)
    assert found["beside_uniform"]["bits"] == {"weights": 5}
    assert weight_bits(quantized) == {"loud": 5, "quiet": 5}
    assert found["weight_bits"] == 5
    assert found["layer_bytes"] == figures_of(quantize(chain_pipe(), _fixed_at(5), steps=STEPS))["layer_bytes"]


def _fixed_at(bits: int) -> Recipe:
    return rtn(weight_bits=float(bits), activations=None, bits=(bits,))


def test_the_budget_of_the_place_counts_what_it_keeps_at_8_bits() -> None:
    """The bits that `rtn` has at the same settings, so that equal bits are within the budget."""
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    base = METHODS["rtn"](samples=4, batch=2, ranges="minmax", weights=4)
    recipe = allocated(base, **{**QUICK, "weight_bits": "place", "score": "mse", "beside_uniform": True})
    found = figures_of(quantize(pipe, recipe, steps=STEPS))
    plain = describe(quantize(pipe, base, steps=STEPS).pipe.unet).layers
    sizes = {name: module.weight.numel() for name, module in pipe.unet.named_modules() if hasattr(module, "weight")}
    placed = {name: layer.scheme.weight.bits for name, layer in plain.items() if layer.scheme.weight is not None}
    average = sum(sizes[name] * bits for name, bits in placed.items()) / sum(sizes[name] for name in placed)
    assert average > 4
    assert average - 0.1 < found["weight_bits"] <= average + 1e-6
    assert found["beside_uniform"]["bits"] == {"weights": 4}


def test_a_bound_on_the_drift_is_measured() -> None:
    drifts = {}
    for bound in (0.5, 0.02):
        found = figures_of(
            quantize(chain_pipe(), rtn(max_drift=bound, activations=None, bits=(2, 3, 4, 5, 6, 7, 8)), steps=STEPS)
        )
        assert found["measured_drift"] <= bound
        assert len(found["measured"]) <= 6
        drifts[bound] = found["layer_bytes"]
    assert drifts[0.5] < drifts[0.02]
    with pytest.raises(CalibrationError, match=r"keeps the final drift at or below 1e-09; the least was"):
        quantize(chain_pipe(), rtn(max_drift=1e-9, activations=2), steps=STEPS)


def test_the_stage_is_plain_data() -> None:
    recipe = rtn(weight_bits=4.5, activation_bits=6.0)
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict())), STAGES) == recipe
    with pytest.raises(SpecError, match="0 stages Place"):
        allocated(Recipe("none", recipe.stages[:1]), weight_bits=4.0)


def test_a_killed_allocation_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    base = METHODS["rtn"](samples=6, batch=2, ends="same")
    recipe = allocated(base, **{**QUICK, "samples": 4, "weight_bits": 5.0, "refine": 2})
    straight = quantize(chain_pipe(), recipe, steps=STEPS)
    progress = tiny.Interrupt("Sensitivity", STEPS + 2)  # in the second mini-batch
    with pytest.raises(KeyboardInterrupt):
        quantize(chain_pipe(), recipe, steps=STEPS, run=Run(work=tmp_path, progress=progress))
    assert list(tmp_path.glob("partial-*-sensitivity-0*"))
    resumed = quantize(chain_pipe(), recipe, steps=STEPS, run=Run(work=tmp_path), resume=True)
    strip = lambda found: {key: value for key, value in found.items() if key != "seconds"}  # noqa: E731
    assert strip(figures_of(resumed)) == strip(figures_of(straight))


SETTINGS: Mapping[str, Any] = {
    "method": "rtn",
    "steps": STEPS,
    "calibration_samples": 4,
    "options": {"batch": 2, "ranges": "minmax"},
    "allocation": {"samples": 2, "projections": 2, "held_out": 2, "refine": 1, "bits": [2, 4, 8]},
}


def test_run_yaml_with_a_budget_comes_back(tmp_path: Path) -> None:
    first = resolve({"model": "digits-unet", **SETTINGS, "target": "W4.5A6"}, flags={"seed": 3})
    stage = first.recipe.stages[2]
    assert isinstance(stage, Allocate)
    assert (stage.weight_bits, stage.activation_bits, stage.ranges, stage.bits) == (4.5, 6.0, "minmax", (2, 4, 8))
    dump(first, tmp_path / "run.yaml")
    again = resolve(load_config(tmp_path / "run.yaml"))
    assert (again.recipe, again.to_dict()) == (first.recipe, first.to_dict())
    other = resolve(load_config(tmp_path / "run.yaml"), flags={"max_bytes": 1000})  # the command line's budget wins
    assert (other.recipe.stages[2].weight_bits, other.recipe.stages[2].max_bytes) == (None, 1000)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"target": "4bit", "max_bytes": 10}, "run.yaml: target and max_bytes are budgets of the same bits"),
        ({"allocation": {"refine": 2}}, "allocation: goes with a budget"),
        ({"target": "4bit", "allocation": {"refin": 2}}, r"allocation.refin: there is no such option. Did you mean"),
        ({"target": "4bit", "allocation": {"refine": "2"}}, "allocation.refine: expected a valid integer"),
        ({"target": "four"}, "A target looks like"),
    ],
)
def test_mistakes_in_a_budget(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve({"model": "digits-unet", "method": "rtn", **data})


def test_a_plan_is_a_run_that_gives_the_same_bits(tmp_path: Path) -> None:
    model, plan, config = tmp_path / "model", tmp_path / "plan.yaml", tmp_path / "settings.yaml"
    DDIMPipeline(tiny.tiny_unet(), DDIMScheduler()).save_pretrained(model)
    config.write_text(json.dumps(SETTINGS))  # JSON is YAML
    command = ["allocate", str(model), "-o", str(plan), "--config", str(config), "--target", "4.5bit"]
    for name in ("allocate", "quantize"):
        planned = CliRunner().invoke(app, [name, *command[1:], "--dry-run"])
        assert planned.exit_code == 0, planned.output
        assert "Allocate" in planned.output
        assert not plan.exists()
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "bits a weight" in done.output
    data = load_config(plan)
    assert "target" not in data
    checked = CliRunner().invoke(app, ["check", str(plan)])
    assert checked.exit_code == 0, checked.output

    from stepquant.api import open_model

    planned_run, direct = (
        resolve(data),
        resolve({"model": str(model), **SETTINGS, "target": "4.5bit"}),
    )
    schemes = [
        {
            name: layer.scheme
            for name, layer in describe(
                quantize(open_model(str(model)), run.recipe, steps=run.steps, run=Run(seed=run.seed)).pipe.unet
            ).layers.items()
        }
        for run in (planned_run, direct)
    ]
    assert schemes[0] == schemes[1]
    assert len({scheme.weight.bits for scheme in schemes[0].values() if scheme.weight is not None}) > 1
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1
