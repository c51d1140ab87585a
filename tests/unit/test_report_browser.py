"""The page in a real browser: nothing overflows, all pictures load, the slider works, and dark is dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_report import a_whole_page

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on the path"),
]

PROBE = """
<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter((part) =>
    part.getBoundingClientRect().right > innerWidth + 1 && !part.closest(".scroll"));
  const narrow = [...document.querySelectorAll("td, th")].filter((part) =>
    part.checkVisibility() && part.innerText.trim().length > 3 && part.getBoundingClientRect().width < 24);
  const tile = document.querySelector(".tile");
  const cut = () => getComputedStyle(tile.querySelector(".over")).clipPath;
  const slider = document.querySelector(".slider input");
  const before = cut();
  slider.value = 100;
  slider.dispatchEvent(new Event("input"));
  const after = cut();
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  tile.click();
  const held = cut();
  tile.click();
  const found = {
    width: innerWidth,
    scrolls: document.documentElement.scrollWidth,
    wide: wide.map((part) => part.outerHTML.slice(0, 80)),
    narrow: narrow.map((part) => part.outerHTML.slice(0, 80)),
    broken: [...document.images].filter((image) => !image.complete || image.naturalWidth === 0).length,
    images: document.images.length,
    tiles: document.querySelectorAll(".tile .over").length,
    ink: getComputedStyle(document.body).color,
    paper: getComputedStyle(document.body).backgroundColor,
    label: getComputedStyle(document.querySelector(".plots svg text, .plots svg g[id*=text] g")).fill,
    before, after, held,
  };
  const kept = document.createElement("pre");
  kept.id = "probe";
  kept.textContent = JSON.stringify(found);
  parent.document.body.append(kept);
});
</script>
"""


def chromium(*options: str) -> str:
    """Standard output of one run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(a_whole_page("rtn-w4a8", "a-rather-long-name-of-a-checkpoint-w4a8"), encoding="utf-8")
    return path


def probed(page: Path, width: int, *, dark: bool) -> dict[str, Any]:
    """What the page says about itself when it is shown at this width."""
    inside = escape(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"))
    # In a frame, because a window of Chromium is at least 500 pixels wide.
    frame = f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{inside}"></iframe>'
    outside = page.with_name(f"frame-{width}-{dark}.html")
    outside.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{frame}</body>', encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    text = chromium(scheme, "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom", outside.as_uri())
    (found,) = re.findall(r'<pre id="probe">(.*?)</pre>', text, flags=re.DOTALL)
    data: dict[str, Any] = json.loads(unescape(found))
    return data


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2.2)."""
    channels = np.asarray([int(value) for value in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_can_be_read(page: Path, width: int, dark: bool) -> None:
    found = probed(page, width, dark=dark)
    assert found["width"] == width
    assert found["scrolls"] <= width
    assert found["wide"] == []
    assert found["narrow"] == []
    assert found["broken"] == 0
    assert found["images"] > 50
    # WCAG asks for 4.5 of text.
    assert contrast(found["ink"], found["paper"]) > 7
    assert contrast(found["label"], found["paper"]) > 4.5
    assert (luminance(found["paper"]) < 0.1) == dark
    # The slider and a press lay full precision over the other images.
    assert found["tiles"] == 16
    assert found["before"] == "inset(0px 100% 0px 0px)"
    assert found["after"] in ("inset(0px)", "inset(0px 0% 0px 0px)")
    assert found["held"] == "none"


def test_dark_and_light_pictures_differ(page: Path, tmp_path: Path) -> None:
    means = []
    for scheme in (0, 1):
        path = tmp_path / f"{scheme}.png"
        chromium(
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=800,600",
            f"--screenshot={path}",
            page.as_uri(),
        )
        means.append(float(np.asarray(Image.open(path).convert("L")).mean()))
    assert means[0] < 80
    assert means[1] > 160


def test_the_page_prints(page: Path, tmp_path: Path) -> None:
    """On a few pages, with what folds open: a printed page has no pointer."""
    path = tmp_path / "page.pdf"
    chromium(f"--print-to-pdf={path}", "--no-pdf-header-footer", page.as_uri())
    pages = len(re.findall(rb"/Type\s*/Page\b", path.read_bytes()))
    assert 3 < pages < 30
