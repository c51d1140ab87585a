"""The page stands for itself, says the numbers, and takes any name."""

from __future__ import annotations

import hashlib
import html
import html.parser
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepquant.errors import EvaluationError
from stepquant.report.comparable import reference_words, refuse_other_references
from stepquant.report.figures import comparison_picture, difference, fitted, levels
from stepquant.report.layers import error_map
from stepquant.report.losses import loss_plots, weighting_rows
from stepquant.report.page import render_report, write_report
from stepquant.report.verdict import BORDERS, CLOSE, VISIBLE, verdict

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&{{ 7*7 }}$_x$"


def a_result(candidate: str = "runs/digits-w4a8", scale: float = 1.0) -> dict[str, Any]:
    steps = range(20)
    one = [scale * 0.01 * (1 + n / 20) for n in steps]
    coherent = [sum(one[: n + 1]) for n in steps]
    incoherent = [math.sqrt(sum(value**2 for value in one[: n + 1])) for n in steps]
    return {
        "schema": 1,
        "candidate": candidate,
        "against": "digits-unet",
        "n": 64,
        "seeds": [1000, 1063],
        "steps": 20,
        "scheduler": "DDIMScheduler",
        "features": "digits 1234abcd",
        "metrics": {
            "psnr": {"value": 24.1234 / scale, "low": 23.5 / scale, "high": 24.75 / scale, "unit": "dB"},
            "ssim": {"value": 0.9321, "low": 0.92, "high": 0.94, "unit": ""},
            "mae": {"value": 0.01234 * scale, "low": 0.011, "high": 0.013, "unit": ""},
            "frechet_to_fp": {"value": 3.4567 * scale},
            "drift_final": {"value": 0.1717 * scale},
        },
        "drift": {
            "timesteps": [950 - 50 * n for n in steps],
            "one_step": one,
            "accumulated": [0.8 * value for value in coherent],
            "coherent": coherent,
            "incoherent": incoherent,
            "cosine": [1 - 0.01 * value for value in coherent],
            "consecutive_cosine": [0.5] * 19,
        },
        "images": {"seeds": list(range(1000, 1008))},
        "notes": ["frechet_to_data: there is no real data for this model."],
        "command": "stepquant evaluate runs/digits-w4a8 --seeds 1000-1063",
        "versions": {"stepquant": "0.1.0", "torch": "2.13.0"},
        "machine": "2 cores",
        "date": "2026-01-02",
    }


def an_inspection(base: str = "digits-unet") -> dict[str, Any]:
    layers = [
        {
            "name": f"down_blocks.{n}.conv",
            "bits": {"weight": 8 if n == 0 else 4, "input": 8},
            "bytes": 1000 + 7000 * n,
            "engine": "reference",
            "refusals": {"onednn": "needs 8-bit weights"},
        }
        for n in range(6)
    ]
    kinds = {"levels": 1_000_000, "weight_scales": 0, "manifest": 234_567}
    manifest = {
        "run": {"seed": 7, "stages": [{"stage": "Record", "evaluations": 640}]},
        "base_config_hash": "c0ffee",
        "checksums": {"conv.weight": "aa", "conv.bias": "bb"},
    }
    return {
        "base_model": base,
        "checksum": "deadbeef",
        "bytes": 1_234_567,
        "bytes_by_kind": kinds,
        "ratio": 0.1404,
        "manifest": manifest,
        "layers": layers,
    }


def some_images(candidates: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    reference = draw.random((8, 1, 16, 16), dtype=np.float32)
    noisy = [(reference + 0.05 * draw.standard_normal(reference.shape)).clip(0, 1) for _ in range(candidates)]
    return {"seeds": list(range(1000, 1008)), "reference": reference, "candidates": noisy}


def a_walk(candidates: int) -> dict[str, Any]:
    """Films, errors of layers and rows over time."""
    film = torch.rand(4, 2, 1, 8, 8)
    timesteps = [900.0, 600.0, 300.0, 0.0]
    made = {"conv_in": [0.1, 0.2, 0.1, 0.2], "conv_out": [0.01, 0.02, 0.4, 0.01]}
    carried = {"conv_in": [0.1, 0.2, 0.1, 0.2], "conv_out": [0.3, 0.3, None, 0.3]}
    table = (["conv_in", "conv_out"], torch.tensor([[0, 1, 1], [0, 0, 0]]), [0.0, 500.0, 950.0])
    return {
        "films": {"seeds": [1, 2], "timesteps": timesteps, "reference": film, "candidates": [film / 2] * candidates},
        "layer_errors": [{"timesteps": timesteps, "made": made, "carried": carried}] * candidates,
        "rows": [table] * candidates,
        "notes": ["Something could not be shown."],
    }


A_WEIGHTING = {
    "validation_loss": [1.0, 0.9],
    "matching": [-0.1, -0.2],
    "cosine": [0.125, 0.375],
    "effective_samples": 30.25,
    "mass": [0.5, 0.3, 0.2],
    "mass_of_steps": {"0": 0.5, "1": 0.3, "2": 0.2},
}
SEARCHED = [
    {"timestep": timestep, "entropy": entropy, "loss": 1.0}
    for timestep, entropy in ((999.0, 2.0), (0.0, 1.5), (0.0, None))
]


def an_origin() -> dict[str, Any]:
    stages = [
        {"stage": "Record", "seconds": 1.25, "evaluations": 640, "seeds": [0, 31]},
        {"stage": "Round", "seconds": 2.0, "losses": {f"layer{n}": {"before": 1.0, "after": 0.5} for n in range(5)}},
        {"stage": "Weigh", "losses": {"<mid>": {"before": 1.0, "after": 0.5, "weighting": A_WEIGHTING}}},
        {"stage": "SearchGroups", "rounds": SEARCHED, "counts": [1, 0, 2], "timesteps": [999.0, 500.0, 0.0]},
        {"stage": "Fit", "windows": [[0, 5], [5, 10]], "losses": [[0, 1.0], [1, 2.0], [0, 0.5], [1, 0.0]]},
    ]
    times = {"milliseconds": 1.5, "reference_milliseconds": 3.375, "ratio": 2.25, "low": 2.125, "high": 2.5}
    speed = {
        "schema": 1,
        "date": "2026-01-02",
        "machine": "a machine",
        "device": "cpu",
        "threads": 1,
        "torch": "2.13.0",
        "rounds": 9,
        "engines": {"openvino": times, "openvino-bf16": times | {"ratio": 4.5}, "onednn": {"failed": "No memory."}},
    }
    return {"figures": stages, "settings": "model: <m>\n", "settings_file": "runs/a.run.yaml", "speed": speed}


def a_whole_page(*names: str, **changes: Any) -> str:
    """With everything that a page can show."""
    results = [a_result(name, scale=1.0 + n) for n, name in enumerate(names)]
    images = some_images(len(names)) | a_walk(len(names)) | changes
    origins: list[Any] = [an_origin() for _ in names]
    command = "stepquant report " + " ".join(names)
    return render_report(results, images, [an_inspection() for _ in names], origins=origins, command=command)


def a_page(*names: str) -> str:
    results = [a_result(name, scale=1.0 + n) for n, name in enumerate(names)]
    return render_report(results, some_images(len(names)), [an_inspection() for _ in names])


class _Addresses(html.parser.HTMLParser):
    """Collects what the page would load, its scripts, and whether tags are balanced."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.scripts = 0
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for key, value in attrs:
            if key in ("src", "href", "data-other", "xlink:href", "srcset", "action"):
                self.loads.append(value or "")
            if key.startswith("on"):
                self.handlers.append(key)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(page: str) -> _Addresses:
    parser = _Addresses()
    parser.feed(page)
    parser.close()
    return parser


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = a_whole_page("a", "b")
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in parsed(page).loads)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "<!DOCTYPE svg" not in page


def test_tags_are_balanced_and_ids_are_unique() -> None:
    page = a_whole_page("a", "b")
    assert parsed(page).open == []
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_page_says_the_numbers_the_command_and_the_layers(tmp_path: Path) -> None:
    write_report([a_result()], some_images(1), [an_inspection()], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    wanted = [
        "24.12 dB",
        "0.9321",
        "3.457",
        "23.5 to 24.75",
        "1.23 MB",
        "14.0 % of the float32 denoiser",
        "5 × W4 A8",
        "6: needs 8-bit weights",
        "1007",
        "c0ffee",
        hashlib.sha256(b"conv.bias bb\nconv.weight aa\n").hexdigest(),
    ]
    for text in [*wanted, "stepquant evaluate runs/digits-w4a8 --seeds 1000-1063", "deadbeef", "torch 2.13.0"]:
        assert text in page, text


def test_every_part_has_its_place_in_order() -> None:
    page = a_whole_page("a", "b")
    parts = ["images", "figures", "films", "drift", "errors", "bytes", "rows", "calibration", "engines", "again"]
    places = [page.index(f'<h2 id="{part}">') for part in parts]
    assert places == sorted(places)
    searched = ("a: SearchGroups rounds", "a: SearchGroups entropy", "entropy of the shares", "timestep chosen")
    for wanted in ("a: Round losses", "a: Fit losses", "steps 5 to 9", *searched):
        assert f"<!-- {wanted} -->" in page, wanted
    for wanted in (
        "runs/a.run.yaml",
        "model: &lt;m&gt;",
        "stepquant report a b",
        "Something could not be shown",
    ):
        assert wanted in page, wanted


def test_speed_stands_with_its_engine() -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", a_whole_page("a", "b")))
    assert text.count("2.25 times 2.12 to 2.50, 1.5 ms instead of 3.38") == 2
    assert "openvino-bf16 4.50 times" in text
    assert "no figure: No memory." in text
    assert "Speed of b: medians over 9 rounds of one call each, wall clock; cpu, a machine, 1 thread, torch" in text


@pytest.mark.parametrize(
    ("key", "values", "marked"),
    [
        ("inception_score", (9.5, 12.0), "9.5"),  # full precision has 10
        ("inception_score", (9.5, 10.25), "10.25"),
        ("clip_score", (9.0, 11.0), None),  # as far from full precision
        ("kid_to_fp", (0.5, 0.25), "0.25"),
        ("precision", (0.5, 0.75), "0.75"),
    ],
)
def test_the_best_value_is_marked(key: str, values: tuple[float, float], marked: str | None) -> None:
    results = [a_result(name) for name in ("a", "b")]
    for result, value in zip(results, values, strict=True):
        result["metrics"] = {key: {"value": value, "reference_value": 10.0}}
    page = render_report(results, some_images(2), [an_inspection()] * 2)
    found = re.findall(r'<span class="best">([0-9.]+)', page)
    assert found == ([] if marked is None else [marked])


def test_what_is_not_there_leaves_no_empty_part() -> None:
    page = a_page("a")
    for part in ("films", "errors", "rows"):
        assert f'id="{part}"' not in page
        assert f'href="#{part}"' not in page
    assert "No losses" in page
    assert "Speed was not measured: <code>stepquant report --speed</code> does." in page


def test_without_a_script_every_image_stands_in_a_row_of_its_own() -> None:
    page = a_page("a")
    assert "<noscript>" in page
    shown = page[: page.index("<script>")]
    assert shown.count('alt="full precision, seed') == shown.count('alt="a, seed') == 8
    assert 'class="over"' not in shown


def test_unknown_metrics_and_curves_are_shown_as_they_are() -> None:
    result = a_result("a")
    result["metrics"]["novel_distance"] = {"value": 0.25, "low": 0.2, "high": 0.3, "preset": "clean", "n": 64}
    result["metrics"]["bare"] = 3
    result["metrics"]["unmeasured"] = {"value": None}
    result["flat_field"] = {"timesteps": [2, 1], "white_point": [0.5, 0.6], "words": ["x", "y"]}
    result["protocol"] = {"resize": "bicubic"}
    page = render_report([result], some_images(1), [an_inspection()])
    for wanted in ("novel distance", "0.2 to 0.3", "preset: clean", "bare", "bicubic", "protocol resize"):
        assert wanted in page, wanted
    assert "<!-- Flat field: white point -->" in page
    assert "unmeasured" not in page


def test_what_all_metrics_share_is_said_once_and_hashes_are_short() -> None:
    result = a_result("a")
    for key, entry in result["metrics"].items():
        entry |= {"reference": "ab" * 32, "n": 32 if key == "drift_final" else 64}
    result["metrics"]["frechet_to_fp"]["feature_identity"] = "cd" * 32
    page = render_report([result], some_images(1), [an_inspection()])
    assert page.count("ab" * 32) == 1
    assert "n: 32" in page
    assert "feature identity: " + "cd" * 6 in page
    assert "cd" * 7 not in page


def test_the_flat_field_is_drawn_beside_full_precision() -> None:
    result = a_result("a")
    steps = len(result["drift"]["timesteps"])
    result["drift"]["flat_field"] = {
        "noise_level": {"candidate": [0.2] * steps, "reference": [0.1] * steps},
        "white_point": {"candidate": [[0.5, 0.1]] * steps, "reference": [[0.4, 0.3]] * steps},
    }
    page = render_report([result], some_images(1), [an_inspection()])
    assert "<!-- Flat field: noise level -->" in page
    assert "<!-- full precision -->" in page
    assert "<!-- Flat field: shift of the white point -->" in page


@pytest.mark.parametrize(
    ("psnr", "words"),
    [
        ({"value": 22.0, "low": 21.0, "high": 23.0}, "a gives images that are visibly different (22 dB"),
        ({"value": 29.4, "low": 28.6, "high": 30.2}, "a is on the border of visible differences (29.4 dB"),
        ({"value": 35.0, "low": 34.0, "high": 36.0}, "a gives images that are close, with differences that show"),
        ({"value": 40.5, "low": 39.0, "high": 42.0}, "a is on the border of hardly any difference"),
        ({"value": 40.0}, "a gives images that can hardly be told from full precision's (40 dB"),
        ({"value": 30.0, "low": 30.0, "high": 31.0}, "a gives images that are close"),
    ],
)
def test_the_verdict_is_in_words_by_stated_borders(psnr: dict[str, float], words: str) -> None:
    (sentence,) = verdict(["a"], [{"psnr": psnr, "drift_final": {"value": 0.125}}])
    assert sentence.startswith(words)
    assert "drift 0.125 RMS" in sentence
    assert f"{VISIBLE:g} dB" in BORDERS
    assert f"{CLOSE:g} dB" in BORDERS


def test_the_best_checkpoint_is_named() -> None:
    page = a_page("x/a", "x/b")
    assert "a is closest to full precision: it gives images that are visibly different (24.12 dB" in page
    assert '<p class="also">b gives images that are visibly different (12.06 dB' in page


def test_overlapping_intervals_name_no_winner() -> None:
    ours = {"psnr": {"value": 25.0, "low": 24.0, "high": 26.0}}
    theirs = {"psnr": {"value": 24.5, "low": 23.5, "high": 25.5}}
    sentences = verdict(["a", "b", "c"], [theirs, ours, {"psnr": {"value": 10.0, "low": 9.0, "high": 11.0}}])
    assert sentences[0] == "The 95 % intervals of b and a overlap: neither is called the closer one."
    assert [sentence[0] for sentence in sentences[1:]] == ["b", "a", "c"]


def test_without_psnr_the_next_metric_that_all_have_decides() -> None:
    metrics = [{"drift_final": {"value": 0.3}}, {"drift_final": {"value": 0.1}, "frechet_to_fp": {"value": 2.0}}]
    assert verdict(["a", "b"], metrics)[0].startswith("b is closest to full precision: it has drift 0.1 RMS")


def test_no_checkpoint_is_called_the_closest_of_equals() -> None:
    page = render_report([a_result("a"), a_result("b")], some_images(2), [an_inspection(), an_inspection()])
    assert "is closest" not in page
    assert "a and b are equally close" in page


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("seeds", [2000, 2063], "seeds (1000-1063 for a, 2000-2063 for b)"),
        ("n", 32, "n (64 for a, 32 for b)"),
        ("steps", 10, "steps (20 for a, 10 for b)"),
        ("scheduler", "DPMSolver", "scheduler (DDIMScheduler for a, DPMSolver for b)"),
        ("arguments", {"eta": 1.0}, 'arguments ({} for a, {"eta": 1.0} for b)'),
        ("features", "inception 5678", "features (digits 1234abcd for a, inception 5678 for b)"),
        ("protocol", "clean", "protocol (as-sampled for a, clean for b)"),
    ],
)
def test_evaluations_that_differ_are_shown_but_not_ranked(key: str, value: Any, told: str) -> None:
    alike = {"arguments": {}, "protocol": "as-sampled"}
    ours, theirs = a_result("x/a") | alike, a_result("x/b", scale=2.0) | alike
    page = render_report([ours, theirs], some_images(2), [an_inspection()] * 2)
    assert 'class="best"' in page
    assert "a is closest" in page
    page = html.unescape(render_report([ours, theirs | {key: value}], some_images(2), [an_inspection()] * 2))
    assert 'class="best"' not in page
    assert "is closest" not in page
    assert '<p class="verdict warning">The checkpoints are not ranked: their evaluations differ in ' in page
    assert told in page


def test_features_of_one_metric_count_too() -> None:
    ours, theirs = a_result("a"), a_result("b", scale=2.0)
    for result, identity in ((ours, "alex"), (theirs, "vgg")):
        result["metrics"]["lpips"] = {"value": 0.1, "feature_identity": identity}
    page = render_report([ours, theirs], some_images(2), [an_inspection()] * 2)
    assert "differ in features or protocol of lpips." in page


def test_different_references_are_refused_with_the_command_that_repairs_it() -> None:
    ours, theirs = a_result("runs/a"), a_result("runs/b") | {"against": "other", "steps": 10}
    wanted = "stepquant evaluate runs/b --against digits-unet --seeds 1000-1063 --steps 10"
    with pytest.raises(EvaluationError, match="runs/b was evaluated against other") as refused:
        render_report([ours, theirs], some_images(2), [an_inspection()] * 2)
    assert wanted in str(refused.value)
    # The hash decides where there is one.
    for result, identity in ((ours, "aa"), (theirs, "aa")):
        result["metrics"]["psnr"]["reference"] = identity
    refuse_other_references([ours, theirs])
    theirs["against"], theirs["metrics"]["psnr"]["reference"] = "digits-unet", "bb"
    with pytest.raises(EvaluationError, match="when that had other weights"):
        refuse_other_references([ours, theirs])


def test_a_reference_that_is_a_checkpoint_is_not_called_full_precision(tmp_path: Path) -> None:
    results = [a_result(name, scale=1.0 + n) | {"reference_kind": "checkpoint"} for n, name in enumerate("ab")]
    flat = {"noise_level": {"candidate": [0.5] * 20, "reference": [0.4] * 20}}
    results[0]["drift"]["flat_field"] = flat
    notes = {"notes": ["Between the least and the largest value of full precision."]}
    page = render_report(results, some_images(2) | a_walk(2) | notes, [an_inspection()] * 2)
    assert "full precision" not in page.replace("The script lays full precision over the others.", "")
    assert "full-precision" not in page
    assert "a is closest to the reference" in page
    (tmp_path / "stepquant.json").write_text("{}")
    assert reference_words(a_result() | {"against": str(tmp_path)}) == "the reference"
    assert reference_words(a_result()) == "full precision"


def test_errors_of_layers_are_ranked_and_broken_ones_come_first() -> None:
    entry = {
        "timesteps": [9.0, 1.0],
        "made": {"small": [0.01, 0.01], "large": [0.1, 0.3], "broken": [0.2, None]},
        "carried": {"small": [0.02, 0.02], "large": [0.2, 0.2], "broken": [None, None]},
    }
    found = error_map([entry, None])
    assert found is not None
    assert found["worst"] == [[("broken", None), ("large", pytest.approx(0.2)), ("small", pytest.approx(0.01))], None]
    assert [row["name"] for row in found["rows"]] == ["small", "large", "broken"]
    assert found["rows"][0]["cells"][1] is None
    assert found["rows"][2]["cells"][0]["title"] == "broken: alone not finite"
    assert found["high"] == 0.3
    assert error_map([None]) is None
    assert error_map([]) is None


def test_losses_of_unknown_shape_are_left_out() -> None:
    broken = [{"stage": "Fit", "losses": [1.0, None, 0.5]}, {"stage": "Two", "losses": [[0, 1.0], [0, None]]}]
    assert len(loss_plots("a", broken, "#123456")) == 2  # what was not finite is a gap
    assert loss_plots("a", [{"stage": "Fit", "losses": [None, None]}], "#123456") == []
    stages = [{"stage": "New", "losses": "none", "loss": [[1, 2, 3]], "history": [], "rounds": [{"loss": 1.0}]}]
    assert [re.findall(r"<!-- (New.*|a: .*?) -->", plot)[-1] for plot in loss_plots("a", stages, "#123456")] == [
        "a: New rounds"
    ]


def test_entropy_has_a_plot_where_rounds_choose_timesteps() -> None:
    def titles(rounds: Any) -> list[str]:
        plots = loss_plots("a", [{"stage": "S", "rounds": rounds}], "#123456")
        return [re.findall(r"<!-- (a: .*?) -->", plot)[-1] for plot in plots]

    assert titles(SEARCHED) == ["a: S rounds", "a: S entropy"]
    assert titles([{"timestep": 1.0, "loss": 1.0}]) == ["a: S rounds"]
    assert titles([{"entropy": 1.0, "loss": 1.0}, {"timestep": 1.0, "loss": 1.0}]) == ["a: S rounds"]
    assert titles([{"timestep": 1.0, "entropy": 0.5}]) == ["a: S entropy"]
    marks = loss_plots("a", [{"stage": "S", "rounds": SEARCHED}], "#123456")[1].count("<use")
    fewer = loss_plots("a", [{"stage": "S", "rounds": SEARCHED[:2]}], "#123456")[1].count("<use")
    assert marks > fewer


def test_learnt_sample_weights_have_a_table() -> None:
    page = a_whole_page("a")
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "&lt;mid&gt; 30.2 0.125 0.375 50.0 30.0 20.0" in text
    assert "effective samples" in text
    stages: list[dict[str, Any]] = [{"stage": "Round", "losses": {"a": {"before": 1.0, "after": 0.5}}}, {"losses": [1]}]
    assert weighting_rows(stages) == []
    assert "effective samples" not in a_page("a")
    broken = {"weighting": {"effective_samples": None, "cosine": [None, 0.5], "mass": [math.nan]}}
    assert weighting_rows([{"losses": {"b": broken}}]) == [
        {"unit": "b", "effective_samples": None, "cosine": None, "percent": []}
    ]


@pytest.mark.parametrize("where", ["candidate", "against", "features", "command", "machine", "scheduler"])
def test_hostile_names_stay_text(where: str) -> None:
    result = a_result()
    result[where] = HOSTILE
    page = parsed(render_report([result], some_images(1), [an_inspection(HOSTILE)]))
    assert page.scripts == 1
    assert page.handlers == []
    assert page.open == []


def test_hostile_layer_names_stay_text() -> None:
    inspection = an_inspection()
    inspection["layers"][0]["name"] = HOSTILE
    walk = a_walk(1)
    walk["layer_errors"][0]["made"][HOSTILE] = walk["layer_errors"][0]["carried"][HOSTILE] = [0.1] * 4
    page = render_report([a_result()], some_images(1) | walk, [inspection])
    assert parsed(page).scripts == 1
    assert parsed(page).open == []
    assert "{{ 7*7 }}" in page


def test_what_was_not_measured_is_left_out_or_said_so() -> None:
    without = a_result("b")
    del without["metrics"]["frechet_to_fp"]
    without["drift"] = {}
    page = render_report([a_result("a"), without], some_images(2), [an_inspection(), an_inspection()])
    assert "not measured" in page
    assert "Fréchet distance to real data" not in page


def test_without_images_the_page_says_so(tmp_path: Path) -> None:
    images: Any = {"seeds": [1, 2], "candidates": [], "notes": ["No images: told why."]}
    write_report([a_result()], images, [an_inspection()], tmp_path / "report.html", origins=[an_origin()])
    page = (tmp_path / "report.html").read_text()
    assert "There are no images on this page" in page
    assert "No images: told why." in page
    assert "data-exact" not in page.split("<script")[0]


def test_nothing_measured_at_all_is_still_a_page() -> None:
    result = a_result() | {"metrics": {}, "drift": {}}
    assert "has no figure that says how close it is" in render_report([result], some_images(1), [an_inspection()])


def test_broken_images_are_shown_black() -> None:
    images = np.full((1, 1, 2, 2), np.nan, dtype=np.float32)
    assert (levels(images) == 0).all()


def test_difference_is_grey_where_equal() -> None:
    image = np.full((1, 1, 2, 2), 0.3, dtype=np.float32)
    assert (levels(difference(image, image)) == 128).all()
    assert (levels(difference(image + 0.1, image)) > 128).all()


def test_mistakes_are_refused() -> None:
    with pytest.raises(EvaluationError, match="at least one"):
        render_report([], some_images(0), [])
    with pytest.raises(EvaluationError, match="schema 2"):
        render_report([a_result() | {"schema": 2}], some_images(1), [an_inspection()])
    with pytest.raises(EvaluationError, match="one inspection"):
        render_report([a_result()], some_images(1), [])


def test_comparison_picture_is_a_png_of_all_rows() -> None:
    images = some_images(1)
    data = comparison_picture(
        {"full precision": images["reference"], "_$odd": images["candidates"][0]}, images["seeds"]
    )
    assert data.startswith(b"\x89PNG")


def test_parts_of_different_lengths_are_refused() -> None:
    for part in ("rows", "layer_errors"):
        with pytest.raises(EvaluationError, match=f"{part} of a report has 1 entries for 2 evaluations"):
            a_whole_page("a", "b", **{part: a_walk(1)[part]})
    with pytest.raises(EvaluationError, match="films of a report has 1"):
        a_whole_page("a", "b", films=a_walk(1)["films"])


def test_large_images_are_scaled_down() -> None:
    assert fitted(np.zeros((1024, 512, 3), dtype=np.uint8)).shape == (512, 256, 3)
    assert fitted(np.zeros((600, 600, 1), dtype=np.uint8)).shape == (512, 512, 1)
    small = np.zeros((512, 4, 1), dtype=np.uint8)
    assert fitted(small) is small


def test_a_page_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "report.html"
    page.write_text("before")

    def full(self: Path, _target: Any) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_report([a_result()], some_images(1), [an_inspection()], page)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert page.read_text() == "before"
