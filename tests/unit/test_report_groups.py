"""Which rows a hardened model uses, and their picture."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from stepquant.errors import EvaluationError
from stepquant.model.clock import clock_of
from stepquant.model.surgery import quantized_layers
from stepquant.report.groups import bin_timesteps, groups_svg, rows_chosen
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


def test_the_picture_names_layers_and_timesteps_and_nothing_else() -> None:
    rows = torch.tensor([[0, 1, 2], [0, 0, 0], [1, 1, 0]])
    names = ["conv_<1>$x$", "alone", "mid.conv"]
    text = groups_svg("Chosen & kept", names, rows, [0.0, 475.0, 950.0])
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    drawn = re.findall(r"<!-- (.*?) -->", text)
    assert "mid.conv" in drawn
    assert "alone" not in drawn  # one row only
    assert drawn.index("950") < drawn.index("475") < drawn.index("0")  # noise on the left
    assert text.count("<image ") == 1
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"shape \[2, 3\], for 1 names and 3 timesteps"):
        groups_svg("", ["a"], torch.ones(2, 3, dtype=torch.int64), [1.0, 2.0, 3.0])
    with pytest.raises(EvaluationError, match="nothing to show"):
        groups_svg("", ["a"], torch.zeros(1, 2, dtype=torch.int64), [1.0, 2.0])


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


def test_the_same_rows_give_the_same_bytes() -> None:
    rows = torch.tensor([[0, 1, 2]])
    assert groups_svg("a", ["b"], rows, [1.0, 2.0, 3.0]) == groups_svg("a", ["b"], rows, [1.0, 2.0, 3.0])
