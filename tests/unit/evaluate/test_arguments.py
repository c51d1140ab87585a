"""What a result says about a pipeline's arguments, and getting those of a few images back from it."""

from __future__ import annotations

import torch

from stepquant.evaluate.arguments import first_of, plain_arguments


def test_lists_with_an_entry_for_each_image_are_cut_and_others_kept() -> None:
    given = {"prompt": ["a", "b", "c"], "guidance_scale": 3.5, "sigmas": [1.0, 0.5], "negative_prompt": "none"}
    found = first_of(plain_arguments(given), images=3, count=2)
    assert found == {"prompt": ["a", "b"], "guidance_scale": 3.5, "sigmas": [1.0, 0.5], "negative_prompt": "none"}


def test_what_is_only_named_does_not_come_back() -> None:
    for value in (torch.zeros(3), {"scale": torch.zeros(2)}, [object()]):
        plain = plain_arguments({"guidance_scale": 2.0, "extra": value})
        assert first_of(plain, images=3, count=2) is None
    assert first_of({}, images=3, count=2) == {}
