"""run.yaml, --set and recipes from someone who means harm: a SpecError in little time, whatever they say."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepquant.config import RunConfig, apply_overrides, load_config, parse_yaml, resolve
from stepquant.errors import SpecError
from stepquant.methods import STAGES
from stepquant.recipe import recipe_from_dict

PATIENCE = 10.0
"""Seconds for what should take milliseconds: the machine may be busy, and the bombs below would take years."""


@contextmanager
def soon() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < PATIENCE


def lol(levels: int, form: str) -> str:
    """Each line refers ten times to the line before: ten to the power of `levels` values."""
    lines = ["a0: &a0 [x]" if form == "list" else "a0: &a0 {x: 1}"]
    for level in range(1, levels + 1):
        inside = ", ".join([f"*a{level - 1}"] * 10)
        value = f"[{inside}]" if form == "list" else f"{{<<: [{inside}], y{level}: 1}}"
        lines.append(f"a{level}: &a{level} {value}")
    return "\n".join(lines)


BOMBS = {
    "a billion values by aliases": lol(9, "list"),
    "a billion values by merging": lol(9, "mapping"),
    "a list inside itself": "a: &a [*a]",
    "a mapping inside itself": "a: &a {b: *a}",
    "a key inside itself": "&a {*a : 1}",
    "deep lists": "a: " + "[" * 100_000,
    "deep mappings": "{a: " * 50_000,
    "deep dashes": "- " * 100_000,
    "deep questions": "? " * 100_000,
    "a number of a million digits": "steps: " + "9" * 200_000,
    "a number in base 60": "steps: " + "1:" * 50_000 + "1",
    "many anchors": "\n".join(f"a{n}: &b{n} 1" for n in range(30_000)),
    "not closed": "a: 'x" + "y" * 200_000,
    "tabs": "\t" * 200_000,
    "a document of its own each": "--- a\n" * 40_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path: Path, name: str) -> None:
    (tmp_path / "run.yaml").write_text(BOMBS[name])
    with soon(), pytest.raises(SpecError, match=r"run\.yaml"):
        resolve(load_config(tmp_path / "run.yaml"), source="run.yaml", flags={"model": "m"})


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {marker}']",
        "!!python/object/new:os.system ['touch {marker}']",
        "!!python/name:os.system",
        "!!python/module:os",
        "model: !!python/object/apply:subprocess.check_output [['touch', '{marker}']]",
        "model: !include {marker}",
        "model: !!map [1]",
        "steps: !!int x",
        "steps: !!float [1]",
        "when: 2001-99-99",
        "%TAG ! tag:yaml.org,2002:python/\n--- !name:os.system",
    ],
)
def test_tags_execute_nothing(tmp_path: Path, text: str) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(SpecError):
        resolve(parse_yaml(text.replace("{marker}", str(marker)), source="run.yaml"), flags={"model": "m"})
    assert not marker.exists()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a word for a number": ({"steps": "20"}, "steps: expected a valid integer"),
    "true for a number": ({"steps": True}, "steps: expected a valid integer"),
    "a fraction": ({"steps": 2.5}, "steps: expected a valid integer"),
    "not a number": ({"steps": float("nan")}, "steps: expected a valid integer"),
    "infinite": ({"seed": float("inf")}, "seed: expected a valid integer"),
    "negative": ({"steps": -1}, "steps: expected 1 or more, found -1"),
    "zero": ({"steps": 0}, "steps: expected 1 or more, found 0"),
    "a seed below zero": ({"seed": -(2**70)}, "seed: expected 0 or more"),
    "bits by the billion": ({"weights": 10**30}, "weights: expected 2 to 8 bits"),
    "a list for a mapping": ({"options": [1]}, "options: expected an object"),
    "a mapping for a list": ({"rules": {"pattern": "*"}}, "rules: expected a valid array"),
    "a number for a name": ({"method": 3}, "method: expected a valid string"),
    "a path for a name": ({"method": "../../etc/passwd"}, "There is no method '../../etc/passwd'"),
    "dunder for a name": ({"method": "__class__"}, "There is no method '__class__'"),
    "dunder for an option": ({"options": {"__class__": 1}}, "has no option '__class__'"),
    "a path for a preset": ({"preset": "../x"}, "has no preset '../x'"),
    "an unknown key": ({"surprise": 1}, "surprise: there is no such key"),
    "the same twice": ({"weights": 4, "options": {"weights": 4}}, "are the same setting"),
    "an add-on many times": ({"method": "rtn" + "+cec" * 1000}, "cannot follow another method"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values(name: str) -> None:
    data, message = WRONG[name]
    with soon(), pytest.raises(SpecError, match=message):
        resolve({"model": "m", **data})


RECIPES: dict[str, tuple[Any, str]] = {
    "stages are a number": ({"stages": 5}, "stages: expected a list of stages, found 5"),
    "stages are a word": ({"stages": "Record"}, "stages: expected a list of stages, found 'Record'"),
    "stages are a mapping": ({"stages": {"stage": "Record"}}, "stages: expected a list of stages"),
    "a stage is nothing": ({"stages": [None]}, r"stages\[0\]: expected settings such as"),
    "a stage is a word": ({"stages": ["Record"]}, r"stages\[0\]: expected settings such as .*found 'Record'"),
    "a stage is a list of pairs": ({"stages": [[["stage", "Record"]]]}, r"stages\[0\]: expected settings such as"),
    "a kind is a list": ({"stages": [{"stage": ["Record"]}]}, r"stages\[0\]\.stage: there is no stage"),
    "a kind is a mapping": ({"stages": [{"stage": {"a": 1}}]}, r"stages\[0\]\.stage: there is no stage"),
    "a kind is missing": ({"stages": [{}]}, r"stages\[0\]\.stage: there is no stage None"),
    "a kind is a module": ({"stages": [{"stage": "os.system"}]}, r"there is no stage 'os\.system'"),
    "an unknown setting": ({"stages": [{"stage": "Record", "__init__": 1}]}, r"Record has no setting '__init__'"),
    "a wrong type": ({"stages": [{"stage": "Record", "samples": "many"}]}, r"stages\[0\]\.samples: "),
    "a key too many": ({"stages": [], "import": "os"}, "A recipe has the keys name and stages"),
    "no stages": ({"name": "x"}, "A recipe has the keys name and stages"),
    "needs that nobody meets": ({"stages": [{"stage": "FitInputRanges"}]}, "needs .*, which no stage before it gives"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    data, message = RECIPES[name]
    with pytest.raises(SpecError, match=message):
        recipe_from_dict(data, STAGES)
    with pytest.raises(SpecError):
        resolve({"model": "m", "recipe": data})


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        load_config(tmp_path / "loop.yaml")
    with soon(), pytest.raises(SpecError, match="has 262145 bytes"):
        load_config("/dev/zero")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)
KEYS = st.sampled_from(sorted(RunConfig.model_fields))
QUICKLY = settings(max_examples=150, deadline=5_000, database=None)


@QUICKLY
@given(data=st.dictionaries(KEYS | st.text(max_size=8), PLAIN, max_size=4))
def test_any_values_of_known_keys(data: dict[str, Any]) -> None:
    try:
        resolve(data)
    except SpecError:
        return


@QUICKLY
@given(
    data=st.fixed_dictionaries(
        {
            "stages": st.lists(
                st.dictionaries(
                    st.sampled_from(["stage", "samples", "batch", "rules", "weights", "every", "window"]),
                    PLAIN | st.sampled_from(sorted(STAGES)),
                    max_size=4,
                ),
                max_size=3,
            )
        }
    )
)
def test_any_settings_of_known_stages(data: dict[str, Any]) -> None:
    try:
        recipe_from_dict(data, STAGES)
    except SpecError:
        return


@QUICKLY
@given(text=st.text(alphabet=st.sampled_from(list("{}[]:,-?&*!|>'\"%@`#<~ \n\tab01.")), max_size=60))
def test_any_text_as_yaml(text: str) -> None:
    try:
        parse_yaml(text, source="text")
    except SpecError:
        return


@QUICKLY
@given(overrides=st.lists(st.text(max_size=20) | st.from_regex(r"[a-z_.0-9]{1,12}=.{0,8}", fullmatch=True), max_size=3))
def test_any_override(overrides: list[str]) -> None:
    data = {"rules": [{"pattern": "*", "weights": 4}], "options": {"batch": 2}}
    try:
        apply_overrides(data, overrides)
    except SpecError:
        return


@settings(max_examples=100, deadline=5_000, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_any_bytes_as_a_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(data)
    try:
        load_config(tmp_path / "run.yaml")
    except SpecError:
        return
