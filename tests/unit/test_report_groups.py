"""Which rows a hardened model uses, and the strips that show rows, errors and films."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from stepquant.errors import EvaluationError
from stepquant.model.clock import clock_of
from stepquant.model.surgery import quantized_layers
from stepquant.report.groups import bin_timesteps, rows_chosen
from stepquant.report.layers import row_map
from stepquant.report.strips import MISSING, film_uri, log_places, strip_uri, ticks
from tiny import TinyNet, quantize_, tiny_unet


def test_rows_are_those_that_the_quantizers_use() -> None:
    denoiser = quantize_(tiny_unet(), rows=3, steps=5)
    names, rows = rows_chosen(denoiser)
    assert rows.shape == (len(names), 5)
    assert len(set(names)) == len(names) > 20
    assert any(name.endswith("scores (second)") for name in names)
    layers = quantized_layers(denoiser)
    layers["conv_in"].input_quantizer.row_of_bin[:] = torch.tensor([2, 2, 0, 1, 1])  # type: ignore[union-attr, index, operator]
    names, rows = rows_chosen(denoiser)
    assert rows[names.index("conv_in")].tolist() == [2, 2, 0, 1, 1]
    assert rows[names.index("conv_out")].tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(EvaluationError, match="TinyNet has no step clock"):
        rows_chosen(TinyNet())


def test_strips_show_which_row_is_used_when() -> None:
    several, alone = torch.tensor([[0, 1, 2], [0, 0, 0], [1, 1, 0]]), torch.zeros(2, 3, dtype=torch.int64)
    names, timesteps = ["conv", "alone", "mid.conv"], [0.0, 475.0, 950.0]
    found = row_map([(names, several, timesteps), (names[:2], alone, timesteps)])
    assert found is not None
    assert [row["name"] for row in found["rows"]] == ["conv", "mid.conv"]  # "alone" keeps to one row everywhere
    assert found["labels"] == [["950", "475", "0"]] * 2  # noise on the left
    conv, mid = found["rows"][0]["cells"], found["rows"][1]["cells"]
    assert conv[0]["title"] == "rows 2 1 0"
    assert (conv[0]["rows"], conv[1]["rows"]) == (3, 1)
    assert conv[0]["strip"] == strip_uri([1.0, 0.5, 0.0])
    assert mid[0]["strip"] == strip_uri([0.0, 1.0, 1.0])
    assert mid[1] is None
    assert row_map([(names[:2], alone, timesteps)]) is None


def test_bits_over_time_have_a_strip_of_their_own() -> None:
    rows = torch.tensor([[0, 1, 1], [0, 1, 2]])
    inspection = {"layers": [{"name": "mix", "row_bits": {"second": (3, 8)}}, {"name": "conv", "row_bits": {}}]}
    names, timesteps = ["mix (second)", "conv"], [0.0, 475.0, 950.0]
    found = row_map([(names, rows, timesteps)], [inspection])
    assert found is not None
    assert found["bits"]
    (mix,), (conv,) = (row["cells"] for row in found["rows"])
    assert mix["bits"] == {"strip": strip_uri([1.0, 1.0, 0.0]), "told": "A3-8", "title": "bits 8 8 3"}
    assert conv["bits"] is None
    plain = row_map([(names, rows, timesteps)])
    assert plain is not None
    assert not plain["bits"]


def test_cells_are_coloured_from_dark_to_bright_and_missing_ones_stand_out() -> None:
    pixels = decoded(strip_uri([0.0, 0.5, 1.0, None]))
    assert pixels.shape == (1, 4, 3)
    brightness = pixels[0, :3].astype(int).sum(axis=1)
    assert brightness[0] < brightness[1] < brightness[2]
    assert tuple(pixels[0, 3]) == MISSING
    with pytest.raises(EvaluationError, match="at least one cell"):
        strip_uri([])


def test_places_on_a_logarithmic_scale() -> None:
    assert log_places([1.0, 10.0, 100.0, 1e-9, 1e9, None], 1.0, 100.0) == [0.0, 0.5, 1.0, 0.0, 1.0, None]
    assert log_places([3.0], 3.0, 3.0) == [0.0]


def test_films_are_frames_side_by_side_and_large_frames_are_scaled_down() -> None:
    frames = torch.stack([torch.full((1, 4, 4), level) for level in (0.0, 0.4, 1.0)])
    assert decoded(film_uri(frames))[2].tolist() == [0] * 4 + [102] * 4 + [255] * 4
    assert decoded(film_uri(torch.zeros(2, 3, 256, 128))).shape == (96, 2 * 48, 3)


def decoded(address: str) -> np.ndarray:
    """The pixels behind a data address."""
    kind, _, data = address.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize(("count", "most", "expected"), [(1, 5, [0]), (4, 9, [0, 1, 2, 3]), (11, 3, [0, 5, 10])])
def test_ticks_have_both_ends(count: int, most: int, expected: list[int]) -> None:
    assert ticks(count, most) == expected


def test_bins_are_named_by_the_timesteps_that_fall_into_them() -> None:
    denoiser = quantize_(tiny_unet(), rows=3, steps=5)
    edges = clock_of(denoiser).edges  # type: ignore[union-attr]
    inside = torch.cat([edges - 1, edges[-1:] + 1])
    assert bin_timesteps(denoiser, inside.flip(0).repeat(2)) == inside.tolist()
    # A schedule that leaves bins out, or has several timesteps in one, names none of them.
    assert bin_timesteps(denoiser, inside[1:]) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert bin_timesteps(denoiser, torch.cat([inside, inside[:1] - 1])) == [0.0, 1.0, 2.0, 3.0, 4.0]
    with pytest.raises(EvaluationError, match="TinyNet has no step clock"):
        bin_timesteps(TinyNet(), inside)
