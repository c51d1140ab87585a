"""The page stands for itself, says the numbers, and takes any name."""

from __future__ import annotations

import html.parser
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepquant.errors import EvaluationError
from stepquant.report.figures import comparison_picture, difference, levels
from stepquant.report.page import render_report, write_report

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
            "psnr": {"value": 24.1234 / scale, "low": 23.5, "high": 24.75, "unit": "dB"},
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
    return {"base_model": base, "checksum": "deadbeef", "bytes": 1_234_567, "layers": layers}


def some_images(candidates: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    reference = draw.random((8, 1, 16, 16), dtype=np.float32)
    noisy = [(reference + 0.05 * draw.standard_normal(reference.shape)).clip(0, 1) for _ in range(candidates)]
    return {"seeds": list(range(1000, 1008)), "reference": reference, "candidates": noisy}


def a_page(*names: str) -> str:
    results = [a_result(name, scale=1.0 + n) for n, name in enumerate(names)]
    return render_report(results, some_images(len(names)), [an_inspection() for _ in names])


class _Addresses(html.parser.HTMLParser):
    """Collects what the page would load, its scripts, and whether tags are balanced."""

    VOID = frozenset({"meta", "img", "br", "link"})

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
    page = a_page("a", "b")
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in parsed(page).loads)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "<!DOCTYPE svg" not in page


def test_tags_are_balanced_and_ids_are_unique() -> None:
    page = a_page("a", "b")
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
        "weight 4, input 8",
        "needs 8-bit weights",
        "1007",
    ]
    for text in [*wanted, "stepquant evaluate runs/digits-w4a8 --seeds 1000-1063", "deadbeef", "torch 2.13.0"]:
        assert text in page, text


def test_the_best_checkpoint_is_named() -> None:
    assert "a is closest to full precision: 24.12 dB" in a_page("x/a", "x/b")


def test_no_checkpoint_is_called_the_closest_of_equals() -> None:
    page = render_report([a_result("a"), a_result("b")], some_images(2), [an_inspection(), an_inspection()])
    assert "is closest" not in page


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
    page = render_report([a_result()], some_images(1), [inspection])
    assert parsed(page).scripts == 1
    assert "{{ 7*7 }}" in page


def test_what_was_not_measured_is_left_out_or_said_so() -> None:
    without = a_result("b")
    del without["metrics"]["frechet_to_fp"]
    without["drift"] = {}
    page = render_report([a_result("a"), without], some_images(2), [an_inspection(), an_inspection()])
    assert "not measured" in page
    assert "Fréchet distance to real data" not in page


def test_nothing_measured_at_all_is_still_a_page() -> None:
    result = a_result() | {"metrics": {}, "drift": {}}
    assert "nothing could be measured" in render_report([result], some_images(1), [an_inspection()])


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


def test_rows_over_time_are_shown_where_there_are_several() -> None:
    one, several = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[0, 1, 1], [0, 0, 0]])
    layers, timesteps = ["first", "second"], [0.0, 500.0, 950.0]
    images = some_images(2) | {"rows": [(layers, one, timesteps), (layers, several, timesteps)]}
    page = render_report([a_result("a"), a_result("b")], images, [an_inspection(), an_inspection()])
    assert "Activation parameters over time: b" in page
    assert "Activation parameters over time: a" not in page
