"""Our figures beside those of torch-fidelity and clean-fid, on the same features and images.

Both packages import torchvision, which stepquant does not need. So what they give is kept in `peers.json` beside this
file: our figures are always compared with those, and where a package can be imported, so are the kept figures and ours,
in full, with what it gives now. `python tests/unit/evaluate/test_peers.py` writes the file where both are installed
(CONTRIBUTING.md has the commands).

torchmetrics is always installed: what is compared with it is in `test_distributions.py` and `test_frechet.py`. sFID has
no peer here, ADM's evaluator defines it: its spatial features are compared, its distance is the Fréchet distance.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from stepquant.evaluate.distributions import inception_score, kernel_distance, precision_recall
from stepquant.evaluate.frechet import FeatureStatistics, frechet_distance
from stepquant.evaluate.inception import InceptionFeatures, InceptionV3
from stepquant.evaluate.protocol import PROTOCOLS, resize_tensorflow1

KEPT = Path(__file__).with_name("peers.json")
PACKAGES = ("torch-fidelity", "clean-fid", "torch", "torchvision", "numpy", "scipy", "pillow")
FIDELITY, CLEAN = PROTOCOLS["torch-fidelity"], PROTOCOLS["clean"]
NETWORK = 23_885_392
"""Numbers in the state dict of Inception-v3."""

Figures = dict[str, Tensor]
"""Float64, of any shape."""


@dataclass(frozen=True)
class Drawn:
    """An input. Uniform numbers, because a seed gives the same ones on every machine."""

    kind: Literal["features", "levels", "uniform"]
    shape: tuple[int, ...]
    seed: int

    def tensor(self) -> Tensor:
        """features: float32, correlated, with a mean of their own. levels: uint8. uniform: float32 in [0, 1)."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind == "levels":
            return torch.randint(0, 256, self.shape, generator=generator, dtype=torch.uint8)
        if self.kind == "uniform":
            return torch.rand(self.shape, generator=generator)
        mixing = torch.rand(self.shape[1], self.shape[1], generator=generator, dtype=torch.float64)
        rows = torch.rand(self.shape, generator=generator, dtype=torch.float64)
        return ((2 * rows - 1) @ (6 * mixing - 3) + 0.5 * self.seed).float()


@dataclass(frozen=True)
class Comparison:
    """One function of a peer's beside ours, both of the drawn inputs.

    allowed: relative * |expected| + absolute, for every number.
    """

    module: str
    inputs: tuple[Drawn, ...]
    ours: Callable[..., Figures]
    theirs: Callable[..., Figures]
    relative: float = 1e-4
    absolute: float = 0.0

    def tensors(self) -> list[Tensor]:
        return [drawn.tensor() for drawn in self.inputs]

    def differences(self, found: Figures, expected: Figures, part: float = 1.0) -> Figures:
        """What is farther from the expected figures than that part of the tolerance: found and expected."""
        assert found.keys() == expected.keys()
        far = {}
        for name, wanted in expected.items():
            assert found[name].shape == wanted.shape, name
            close = (found[name] - wanted).abs() <= part * (self.relative * wanted.abs() + self.absolute)
            if not bool(close.all()):
                far[name] = torch.stack([found[name][~close], wanted[~close]])
        return far


def figures(**named: Any) -> Figures:
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in named.items()}


def statistics(rows: Tensor) -> FeatureStatistics:
    found = FeatureStatistics(rows.shape[1])
    for batch in rows.split(16):
        found.update(batch)
    return found


def our_frechet_distance(candidate: Tensor, reference: Tensor) -> Figures:
    return figures(distance=frechet_distance(statistics(candidate), statistics(reference)))


def frechet_distance_of_torch_fidelity(theirs: Any, candidate: Tensor, reference: Tensor) -> Figures:
    moments = [theirs.fid_features_to_statistics(rows.double()) for rows in (candidate, reference)]
    found = theirs.fid_statistics_to_metric(*moments, verbose=False)
    return figures(distance=found["frechet_inception_distance"])


def frechet_distance_of_clean_fid(theirs: Any, candidate: Tensor, reference: Tensor) -> Figures:
    rows = [features.double().numpy() for features in (candidate, reference)]
    moments = [(each.mean(axis=0), np.cov(each, rowvar=False)) for each in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an argument of scipy's that is going away
        return figures(distance=float(theirs.frechet_distance(*moments[0], *moments[1])))


def our_kernel_distance(candidate: Tensor, reference: Tensor, *, size: int) -> Figures:
    found = kernel_distance(candidate, reference, replace(FIDELITY, subsets=6, subset_size=size))
    return figures(mean=found.mean, std=found.std)


def kernel_distance_of_torch_fidelity(theirs: Any, candidate: Tensor, reference: Tensor, *, size: int) -> Figures:
    """The same subsets, by the same seed."""
    found = theirs.kid_features_to_metric(
        candidate.double(), reference.double(), kid_subsets=6, kid_subset_size=size, kid_kernel="poly",
        kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=FIDELITY.seed,
        verbose=False,
    )  # fmt: skip
    return figures(mean=found["kernel_inception_distance_mean"], std=found["kernel_inception_distance_std"])


def our_kernel_distance_of_pairs(candidate: Tensor, reference: Tensor) -> Figures:
    return figures(mean=kernel_distance(candidate, reference, FIDELITY, paired=True).mean)


def kernel_distance_of_pairs_of_torch_fidelity(theirs: Any, candidate: Tensor, reference: Tensor) -> Figures:
    x, y = candidate.double().numpy(), reference.double().numpy()
    settings = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    products = [theirs.kernel_poly(a, b, **settings) for a, b in ((x, x), (x, y), (y, y))]
    return figures(mean=float(theirs.mmd2(*products, mmd_est="u-statistic")))


def our_kernel_distance_of_clean(candidate: Tensor, reference: Tensor, *, size: int) -> Figures:
    return figures(mean=kernel_distance(candidate, reference, replace(CLEAN, subsets=6, subset_size=size)).mean)


def kernel_distance_of_clean_fid(theirs: Any, candidate: Tensor, reference: Tensor, *, size: int) -> Figures:
    before = np.random.get_state()
    np.random.seed(CLEAN.seed)
    try:  # it draws from its second argument first, as ours does from the candidate
        found = theirs.kernel_distance(
            reference.double().numpy(), candidate.double().numpy(), num_subsets=6, max_subset_size=size
        )
    finally:
        np.random.set_state(before)
    return figures(mean=float(found))


def our_inception_score(logits: Tensor) -> Figures:
    found = inception_score(logits, FIDELITY)
    return figures(mean=found.mean, std=found.std)


def inception_score_of_torch_fidelity(theirs: Any, logits: Tensor) -> Figures:
    """The same shuffle, by the same seed."""
    found = theirs.isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=FIDELITY.seed)
    return figures(mean=found["inception_score_mean"], std=found["inception_score_std"])


def overlapping(candidate: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Moved so that neither set covers the other."""
    return 0.8 * (candidate - 0.5), reference - 1.0


def our_precision_recall(candidate: Tensor, reference: Tensor) -> Figures:
    found = precision_recall(*overlapping(candidate, reference), FIDELITY)
    return figures(precision=found.precision, recall=found.recall)


def precision_recall_of_torch_fidelity(theirs: Any, candidate: Tensor, reference: Tensor) -> Figures:
    rows = [features.double() for features in overlapping(candidate, reference)]
    found = theirs.prc_features_to_metric(
        *rows, prc_neighborhood=FIDELITY.neighbours, prc_batch_size=100, save_cpu_ram=False, verbose=False
    )
    return figures(precision=found["precision"], recall=found["recall"])


def our_tensorflow1_resize(images: Tensor, *, size: int) -> Figures:
    return figures(images=resize_tensorflow1(images.float(), size))


def resize_of_torch_fidelity(theirs: Any, images: Tensor, *, size: int) -> Figures:
    found = theirs.interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(size, size), align_corners=False)
    return figures(images=found)


def our_clean_resize(images: Tensor) -> Figures:
    return figures(images=CLEAN.prepare(images.float() / 255, 299) * 255)


def resize_of_clean_fid(theirs: Any, images: Tensor) -> Figures:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an argument of Pillow's that is going away
        resize = theirs.build_resizer("clean")
        found = np.stack([resize(image.movedim(0, -1).numpy()) for image in images])
    return figures(images=torch.from_numpy(found).movedim(-1, 1))


def network(numbers: Tensor) -> InceptionV3:
    """Inception-v3 with weights from uniform numbers: the published ones are not needed for this."""
    with torch.device("meta"):
        module = InceptionV3()
    state = dict(module.state_dict())
    taken = 0
    for name, old in state.items():
        if not old.is_floating_point():
            state[name] = torch.zeros(old.shape, dtype=old.dtype)  # batches that batch norm has seen
            continue
        drawn = numbers[taken : taken + old.numel()].view(old.shape)
        taken += old.numel()
        if name.endswith(("bn.weight", "running_var")):
            state[name] = drawn + 0.5
        else:  # Kaiming's bound for what feeds a rectifier
            state[name] = (2 * drawn - 1) * (math.sqrt(6 / old[0].numel()) if old.ndim > 1 else 0.2)
    assert taken == len(numbers)
    module.load_state_dict(state, assign=True)
    return module


def our_inception(images: Tensor, numbers: Tensor) -> Figures:
    found = InceptionFeatures(network(numbers)).extract(FIDELITY.prepare(images.float() / 255, 299))
    return figures(features=found.features, logits=found.logits, spatial=found.spatial)


def inception_of_torch_fidelity(theirs: Any, images: Tensor, numbers: Tensor) -> Figures:
    """From 8-bit images to features, logits, and the features of sFID, which it has but does not return."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        torch.save(network(numbers).state_dict(), weights)
        other = theirs.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
        )
    spatial = []
    other.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _given, gave: spatial.append(gave[:, :7].flatten(1)))
    features, logits = other(images)
    return figures(features=features, logits=logits, spatial=spatial[0])


def sets(candidates: int, references: int, *, dim: int = 7) -> tuple[Drawn, Drawn]:
    return Drawn("features", (candidates, dim), 1), Drawn("features", (references, dim), 2)


def comparisons() -> Iterator[tuple[str, Comparison]]:
    yield (
        "Fréchet distance, torch-fidelity",
        Comparison("torch_fidelity.metric_fid", sets(60, 45), our_frechet_distance, frechet_distance_of_torch_fidelity),
    )
    yield (
        "Fréchet distance, clean-fid",
        Comparison("cleanfid.fid", sets(60, 45), our_frechet_distance, frechet_distance_of_clean_fid),
    )
    for size in (12, 40):
        yield (
            f"KID of {size}, torch-fidelity",
            Comparison(
                "torch_fidelity.metric_kid",
                sets(50, 40),
                partial(our_kernel_distance, size=size),
                partial(kernel_distance_of_torch_fidelity, size=size),
            ),
        )
        yield (
            f"KID of {size}, clean-fid",
            Comparison(
                "cleanfid.fid",
                sets(50, 40),
                partial(our_kernel_distance_of_clean, size=size),
                partial(kernel_distance_of_clean_fid, size=size),
            ),
        )
    yield (
        "KID of pairs, torch-fidelity",
        Comparison(
            "torch_fidelity.metric_kid",
            sets(50, 50),
            our_kernel_distance_of_pairs,
            kernel_distance_of_pairs_of_torch_fidelity,
        ),
    )
    for n in (40, 47):
        logits = (Drawn("features", (n, 7), 1),)
        yield (
            f"Inception score of {n}, torch-fidelity",
            Comparison("torch_fidelity.metric_isc", logits, our_inception_score, inception_score_of_torch_fidelity),
        )
    yield (
        "precision and recall, torch-fidelity",
        Comparison(
            "torch_fidelity.metric_prc",
            sets(60, 45, dim=3),
            our_precision_recall,
            precision_recall_of_torch_fidelity,
            relative=1e-6,
        ),
    )
    for rows, columns, size in ((20, 32, 45), (45, 31, 20)):
        yield (
            f"{rows} x {columns} to {size} x {size}, torch-fidelity",
            Comparison(
                "torch_fidelity.interpolate_compat_tensorflow",
                (Drawn("levels", (2, 3, rows, columns), rows),),
                partial(our_tensorflow1_resize, size=size),
                partial(resize_of_torch_fidelity, size=size),
                absolute=1e-3,
            ),
        )
    for rows, columns in ((40, 64), (320, 301), (700, 299)):
        yield (
            f"{rows} x {columns} to 299 x 299, clean-fid",
            Comparison(
                "cleanfid.resize",
                (Drawn("levels", (1, 3, rows, columns), rows),),
                our_clean_resize,
                resize_of_clean_fid,
                absolute=1e-3,
            ),
        )
    yield (
        "Inception-v3, torch-fidelity",
        Comparison(
            "torch_fidelity.feature_extractor_inceptionv3",
            (Drawn("levels", (2, 3, 40, 48), 40), Drawn("uniform", (NETWORK,), 3)),
            our_inception,
            inception_of_torch_fidelity,
            relative=5e-5,
            absolute=1e-4,  # features are 5 in the mean square; a rectifier leaves many near 0
        ),
    )


COMPARISONS = dict(comparisons())


def excerpt(found: Figures) -> Figures:
    """What is kept: of images 9 places of each axis, of vectors 101, ends included, and the norm of all there is."""
    kept = {}
    for name, values in found.items():
        some = values
        for axis, length in enumerate(values.shape):
            count = min(length, 9 if values.ndim > 2 else 101)
            places = [index * (length - 1) // max(count - 1, 1) for index in range(count)]
            some = some.index_select(axis, torch.tensor(places))
        kept[name] = some.flatten()
        if values.ndim:
            kept[f"norm of {name}"] = values.norm().reshape(1)
    return kept


def fingerprint(drawn: Drawn, values: Tensor) -> dict[str, Any]:
    """How an input was drawn and what came of it, so that other inputs are not taken for other figures."""
    every = values.double()
    return {
        "kind": drawn.kind,
        "shape": list(drawn.shape),
        "seed": drawn.seed,
        "mean": float(every.mean()),
        "norm": float(every.norm()),
    }


def kept(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))["comparisons"][name]
    return found


def kept_figures(name: str) -> Figures:
    return {key: torch.tensor(values, dtype=torch.float64) for key, values in kept(name)["figures"].items()}


def imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except Exception as error:  # torchvision for another torch raises RuntimeError
            pytest.skip(f"{name} cannot be imported: {error!r}")


def test_every_comparison_has_its_figures() -> None:
    assert list(json.loads(KEPT.read_text(encoding="utf-8"))["comparisons"]) == list(COMPARISONS)


@pytest.mark.parametrize("name", COMPARISONS)
def test_our_figures_are_those_kept_of_the_peer(name: str) -> None:
    comparison = COMPARISONS[name]
    tensors = comparison.tensors()
    for drawn, values, peer_had in zip(comparison.inputs, tensors, kept(name)["inputs"], strict=True):
        found = fingerprint(drawn, values)
        assert [found[key] for key in ("mean", "norm")] == pytest.approx([peer_had[key] for key in ("mean", "norm")])
        assert found | {"mean": 0, "norm": 0} == peer_had | {"mean": 0, "norm": 0}
    assert comparison.differences(excerpt(comparison.ours(*tensors)), kept_figures(name)) == {}


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_peer_still_gives_the_kept_figures_and_in_full_ours(name: str) -> None:
    comparison = COMPARISONS[name]
    module = imported(comparison.module)
    tensors = comparison.tensors()
    theirs = comparison.theirs(module, *tensors)
    assert comparison.differences(excerpt(theirs), kept_figures(name), part=0.1) == {}
    assert comparison.differences(comparison.ours(*tensors), theirs) == {}


@pytest.mark.parametrize("name", COMPARISONS)
def test_kept_figures_can_tell_a_difference(name: str) -> None:
    """A fifth of a thousandth is outside the tolerance, and no figure is that of a trivial case."""
    figures_of_peer = kept_figures(name)
    for key, values in figures_of_peer.items():
        others = figures_of_peer | {key: values * (1 + 2e-4)}
        assert list(COMPARISONS[name].differences(others, figures_of_peer)) == [key]
        assert len(values) == 1 or float(values.std()) > 0.01 * float(values.abs().mean())
    if name.startswith("precision"):
        precision, recall = (float(figures_of_peer[key]) for key in ("precision", "recall"))
        assert 0 < recall < precision < 1


def test_a_peer_that_cannot_be_imported_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_peer.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, why in (("broken_peer", "RuntimeError.*nms"), ("peer_that_is_not_there", "ModuleNotFoundError")):
        with pytest.raises(pytest.skip.Exception, match=why):
            imported(name)


def write() -> None:
    """What the peers give now, into the file."""
    found: dict[str, Any] = {
        "about": {
            "command": "python tests/unit/evaluate/test_peers.py",
            "written": date.today().isoformat(),
            "versions": {package: version(package) for package in PACKAGES},
        },
        "comparisons": {},
    }
    for name, comparison in COMPARISONS.items():
        tensors = comparison.tensors()
        theirs = excerpt(comparison.theirs(importlib.import_module(comparison.module), *tensors))
        found["comparisons"][name] = {
            "module": comparison.module,
            "inputs": [fingerprint(*each) for each in zip(comparison.inputs, tensors, strict=True)],
            "figures": {key: [float(f"{value:.8g}") for value in values] for key, values in theirs.items()},
        }
    text = json.dumps(found, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda numbers: json.dumps(json.loads(numbers[0])), text)  # a list is one line
    KEPT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write()
