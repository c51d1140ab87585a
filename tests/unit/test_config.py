"""run.yaml: typos with path and nearest name, wrong types, bombs, overrides, and the way back."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from stepquant.config import apply_overrides, dump, load_config, resolve
from stepquant.errors import SpecError
from stepquant.recipe import Figures, Job, Recipe, Stage


@dataclass(frozen=True)
class Exception_:  # noqa: N801
    """Stands for a rule by layer name."""

    pattern: str
    weights: int | None
    activations: int | None


@dataclass(frozen=True)
class Do:
    """A stage that remembers what it was told."""

    weights: int | None = None
    activations: int | None = None
    samples: int = 0
    window: int = 0
    rate: float = 0.0
    gradient: str = ""
    shape: tuple[int, ...] = ()
    rules: tuple[Exception_, ...] = ()
    softmax_bits: int | None = None

    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()

    def run(self, job: Job) -> Figures:
        return {}


def combined(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 64,
    window: int = 4,
    rate: float = 1e-3,
    gradient: Literal["identity", "exact", "per_step"] = "identity",
    shape: tuple[int, ...] = (1, 2),
    rules: tuple[Exception_, ...] = (),
    softmax_bits: int | None = 8,
) -> Recipe:
    return Recipe("combined", (Do(weights, activations, samples, window, rate, gradient, shape, rules, softmax_bits),))


def rtn(*, weights: int | None = 4, activations: int | None = 8) -> Recipe:
    return Recipe("rtn", (Do(weights, activations),))


def cec(*, estimator: Literal["auto", "scale"] = "auto", gamma: int = 0) -> tuple[Stage, ...]:
    return (Do(window=gamma, gradient=estimator),)


@pytest.fixture(autouse=True)
def _methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType("stepquant.methods")
    module.METHODS = {"combined": combined, "rtn": rtn}  # type: ignore[attr-defined]
    module.PRESETS = {"combined": {"quick": {"samples": 8}, "standard": {}, "full": {"samples": 256}}, "rtn": {}}  # type: ignore[attr-defined]
    module.PRESETS["cec"] = {"quick": {"samples": 8, "gamma": 2}}  # type: ignore[attr-defined]
    module.ADD_ONS = {"cec": cec}  # type: ignore[attr-defined]
    module.STAGES = {"Do": Do}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stepquant.methods", module)
    return iter(())


def stage(data: dict[str, Any], **flags: Any) -> Do:
    found = resolve({"model": "digits-unet", **data}, flags=flags).recipe.stages[0]
    assert isinstance(found, Do)
    return found


def test_preset_then_file_then_command_line() -> None:
    assert stage({"preset": "quick"}).samples == 8
    assert stage({"preset": "quick", "calibration_samples": 16}).samples == 16
    assert stage({"preset": "quick", "calibration_samples": 16}, calibration_samples=32).samples == 32
    assert stage({"preset": "full"}, preset="quick").samples == 8


def test_defaults() -> None:
    resolved = resolve({"model": "digits-unet"})
    assert (resolved.method, resolved.preset, resolved.steps, resolved.seed) == ("combined", "standard", 20, 0)
    assert resolved.device == "auto"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"options": {"windw": 2}},
            r"run.yaml: options.windw: combined has no option 'windw'. Did you mean 'window'\?",
        ),
        ({"wieghts": 4}, r"run.yaml: wieghts: there is no such key. Did you mean 'weights'\?"),
        ({"rules": [{"patern": "*"}]}, r"run.yaml: rules.0.(patern|pattern): "),
        ({"method": "combind"}, r"no method 'combind'. Did you mean 'combined'\?"),
        ({"preset": "quik"}, r"no preset 'quik'.* Did you mean 'quick'\?"),
        ({"method": "rtn", "options": {"window": 2}}, r"run.yaml: options.window: rtn has no option 'window'"),
        ({"weights": "four"}, r"run.yaml: weights: expected a valid integer, found 'four' \(str\)"),
        ({"weights": 4.5}, r"run.yaml: weights: expected a valid integer, found 4.5 \(float\)"),
        ({"weights": True}, r"run.yaml: weights: expected a valid integer, found True \(bool\)"),
        ({"weights": 9}, r"run.yaml: weights: expected 2 to 8 bits, or 16 or 32 .* found 9"),
        ({"rules": [{"pattern": "*", "weights": 1}]}, r"run.yaml: rules.0.weights: expected 2 to 8 bits"),
        ({"options": {"window": "2"}}, r"run.yaml: options.window: expected a valid integer, found '2' \(str\)"),
        (
            {"options": {"gradient": "exat"}},
            r"options.gradient: expected 'identity', 'exact' or 'per_step', found 'exat'",
        ),
        ({"options": {"shape": [1, "x"]}}, r"run.yaml: options.shape.1: expected a valid integer"),
        ({"ends": "9bit"}, r"run.yaml: ends: expected '8bit', 'same' or 'full', found '9bit'"),
        ({"steps": 0}, r"steps: expected 1 or more, found 0"),
        ({"seed": 10**15}, r"seed: expected 900000000000000 or less, found 1000000000000000"),
        ({"weights": 4, "options": {"weights": 4}}, r"weights and options.weights are the same setting"),
    ],
)
def test_mistakes_say_where_they_are(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve({"model": "digits-unet", **data})


def test_a_mistake_of_the_command_line_says_so() -> None:
    with pytest.raises(SpecError, match="command line: weights: expected 2 to 8 bits"):
        resolve({"model": "digits-unet"}, flags={"weights": 12})


def test_there_must_be_a_model() -> None:
    with pytest.raises(SpecError, match="no model"):
        resolve({})


@pytest.mark.parametrize("bits", [16, 32, None])
def test_floating_point_has_three_spellings(bits: int | None) -> None:
    assert stage({"activations": bits}).activations is None


def test_values_take_the_annotated_type() -> None:
    done = stage({"options": {"rate": 1, "shape": [3, 4]}, "softmax_bits": None})
    assert done.shape == (3, 4)
    assert isinstance(done.rate, float)
    assert done.softmax_bits is None


def test_rules_become_what_the_method_takes() -> None:
    rules = [{"pattern": "*.to_q", "weights": 8, "activations": 16}]
    assert stage({"rules": rules}).rules == (Exception_("*.to_q", 8, None),)


@pytest.mark.parametrize("key", ["method", "preset"])
def test_a_written_recipe_excludes_a_method(key: str) -> None:
    data = {"model": "m", "recipe": [{"stage": "Do", "window": 3}]}
    assert resolve(data).recipe.stages == (Do(window=3),)
    with pytest.raises(SpecError, match=f"command line: {key}: goes with a method"):
        resolve(data, flags={key: "rtn"})
    with pytest.raises(SpecError, match=r"run.yaml: weights: goes with a method"):
        resolve(data | {"weights": 4})


def test_a_typo_in_a_written_recipe_has_a_path() -> None:
    with pytest.raises(SpecError, match=r"run.yaml: recipe: stages\[0\].windw: Do has no setting 'windw'"):
        resolve({"model": "m", "recipe": {"stages": [{"stage": "Do", "windw": 3}]}})


def test_overrides_reach_everywhere() -> None:
    data = {"model": "m", "options": {"rate": 0.1}, "rules": [{"pattern": "*", "weights": 4}]}
    changed = apply_overrides(data, ["options.window=2", "gradient=exact", "steps=5", "rules.0.weights=8", "seed=3"])
    assert changed == {
        "model": "m",
        "options": {"rate": 0.1, "window": 2, "gradient": "exact"},
        "rules": [{"pattern": "*", "weights": 8}],
        "steps": 5,
        "seed": 3,
    }
    assert data == {"model": "m", "options": {"rate": 0.1}, "rules": [{"pattern": "*", "weights": 4}]}


@pytest.mark.parametrize("override", ["window", "=3", "a..b=1", "steps.x=1", "rules.7.weights=4", "window=[1"])
def test_overrides_that_make_no_sense(override: str) -> None:
    with pytest.raises(SpecError, match="--set"):
        apply_overrides({"steps": 3, "rules": []}, [override])


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(9), "more than 20000 values when its aliases"),
        ("a: &a [*a]", "refers to itself"),
        ("[" * 5000, "nested too deeply|not valid YAML"),
        ("a" * 300_000, "has 300000 bytes"),
        ("weights: 4\nweights: 8", "line 2: the key 'weights' is there twice"),
        ("on: 1", "line 1: a key must be text"),
        ("? [a]\n: 1", "a key must be text"),
        ("a: [1", "not valid YAML: .* in line"),
        ("a: !!python/object/apply:os.system [echo]", "not valid YAML"),
        ("a: 2024-13-99", "a value that YAML cannot read"),
        ("- a\n- b", "expected keys and values"),
    ],
)
def test_hostile_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_config(write(tmp_path, text))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(SpecError, match="UTF-8"):
        load_config(tmp_path / "bytes.yaml")


def test_an_empty_file_and_harmless_aliases(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == {}
    assert load_config(write(tmp_path, "rules: [&r {pattern: a}, *r]")) == {"rules": [{"pattern": "a"}] * 2}


def test_what_is_dumped_resolves_to_the_same_recipe(tmp_path: Path) -> None:
    data = {
        "model": "digits-unet",
        "preset": "quick",
        "weights": 16,
        "options": {"window": 2, "shape": [5]},
        "rules": [{"pattern": "*", "weights": 3, "activations": 4}],
        "arguments": {"prompt": "a cat"},
    }
    first = resolve(data, flags={"seed": 7})
    dump(first, tmp_path / "run.yaml")
    again = resolve(load_config(tmp_path / "run.yaml"))
    assert again.recipe == first.recipe
    assert again.to_dict() == first.to_dict()


def test_a_written_recipe_is_dumped_too(tmp_path: Path) -> None:
    first = resolve({"model": "m", "recipe": [{"stage": "Do", "window": 3}]})
    dump(first, tmp_path / "run.yaml")
    assert resolve(load_config(tmp_path / "run.yaml")).recipe == first.recipe


def test_an_extra_follows_a_method_with_settings_of_its_own() -> None:
    data = {"model": "digits-unet", "method": "combined+cec", "options": {"cec": {"estimator": "scale"}}}
    resolved = resolve(data, flags=apply_overrides({}, ["cec.gamma=1", "window=7"]))
    base, extra = resolved.recipe.stages
    assert isinstance(base, Do)
    assert isinstance(extra, Do)
    assert (base.window, extra.window, extra.gradient) == (7, 1, "scale")
    assert resolved.recipe.name == "combined+cec"
    assert resolve(resolved.to_dict()).recipe == resolved.recipe


def test_an_extra_takes_from_the_preset_what_it_knows() -> None:
    base, extra = resolve({"model": "m", "method": "combined+cec", "preset": "quick"}).recipe.stages
    assert isinstance(base, Do)
    assert isinstance(extra, Do)
    assert (base.samples, extra.samples, extra.window) == (8, 0, 2)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("rtn+cecc", {}, "Did you mean 'cec'"),
        ("rtn+cec+cec", {}, "once each"),
        ("rtn+combined", {}, "cannot follow another method"),
        ("rtn+cec", {"cec": {"estimatr": "scale"}}, r"options\.cec\.estimatr: .*Did you mean 'estimator'"),
        ("rtn+cec", {"cec": 3}, r"options\.cec: expected the settings of cec, found 3"),
        ("rtn", {"cec": {"estimator": "scale"}}, "rtn has no option 'cec'"),
    ],
)
def test_an_extra_that_does_not_fit_is_named(method: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve({"model": "digits-unet", "method": method, "options": options})
