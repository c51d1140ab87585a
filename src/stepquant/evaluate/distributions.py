"""Figures of whole sets of images, from their features: KID, Inception score, precision and recall.

The Fréchet distance is in `evaluate.frechet`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.protocol import Protocol

__all__ = ["PrecisionRecall", "Spread", "inception_score", "kernel_distance", "precision_recall"]

_ROWS = 1024
"""Rows of a block of distances: keeps n x n values out of memory."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over `parts` subsets or splits (of n, not n - 1), each of at most `size` images."""

    mean: float
    std: float
    parts: int
    size: int


@dataclass(frozen=True)
class PrecisionRecall:
    """precision: share of candidates that lie among the reference. recall: share of references among candidates."""

    precision: float
    recall: float


def kernel_distance(candidate: Tensor, reference: Tensor, protocol: Protocol, *, paired: bool = False) -> Spread:
    """Squared maximum mean discrepancy, unbiased, with k(x, y) = (x . y / D + 1)^3: "KID" with Inception features.

        mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean over i, j of k(x_i, y_j)

    Bińkowski et al. 2018, section 4. It is unbiased, so it may be below 0, and it is averaged over random subsets. With
    no more images than a subset has there is one "subset", all of them.

    paired: x_i and y_i belong to the same seed. The sum above would not be unbiased then: k(x_i, y_i) is large because
    the images are alike, so it goes far below 0 and prefers other sets to the reference itself. These terms are left
    out (i != j in the third mean, too: Gretton et al. 2012, equation 4), both sides have the same subsets, and equal
    sets are at 0.

    candidate, reference: `[N, D]`, `[M, D]`. Raises EvaluationError: fewer than two images, other numbers of features,
    or pairs of sets of other sizes.
    """
    _check(candidate, reference, least=2, what="KID")
    if paired and len(candidate) != len(reference):
        raise EvaluationError(f"KID of pairs needs as many images on both sides: {len(candidate)}, {len(reference)}.")
    size = min(protocol.subset_size, len(candidate), len(reference))
    if size == len(candidate) == len(reference):
        return Spread(_discrepancy(candidate, reference, paired=paired), 0.0, 1, size)
    rng = protocol.rng()
    found = []
    for _ in range(protocol.subsets):
        ours = torch.from_numpy(rng.choice(len(candidate), size, replace=False))
        theirs = ours if paired else torch.from_numpy(rng.choice(len(reference), size, replace=False))
        found.append(_discrepancy(candidate[ours], reference[theirs], paired=paired))
    return _spread(found, size)


def _discrepancy(one: Tensor, other: Tensor, *, paired: bool) -> float:
    """Of two sets of equal size, float64."""
    one, other = one.double(), other.double()
    n = len(one)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        product: Tensor = a @ b.T / a.shape[1] + 1
        return product * product * product  # much faster than a power

    def apart(matrix: Tensor) -> float:
        return float(matrix.sum() - matrix.trace()) / (n * (n - 1))

    between = kernel(one, other)
    within = apart(kernel(one, one)) + apart(kernel(other, other))
    return within - 2 * (apart(between) if paired else float(between.sum()) / n**2)


def inception_score(logits: Tensor, protocol: Protocol) -> Spread:
    """exp of the mean Kullback-Leibler divergence of p(y | image) from p(y), over splits of the images.

    Salimans et al. 2016. The name is that of the network that it was defined with; any classifier's logits will do.

    logits: `[N, K]`. Raises EvaluationError: fewer images than splits.
    """
    n = len(logits)
    if n < max(protocol.splits, 1):
        raise EvaluationError(f"An Inception score of {protocol.splits} splits needs as many images, got n = {n}.")
    if protocol.shuffled:
        logits = logits[torch.from_numpy(protocol.rng().permutation(n))]
    if protocol.splits:
        edges = [index * n // protocol.splits for index in range(protocol.splits + 1)]
    else:
        edges = [*range(0, n, protocol.split_size), n]
    log_p = logits.double().log_softmax(dim=1)
    scores = []
    for start, stop in itertools.pairwise(edges):
        part = log_p[start:stop]
        p = part.exp()
        divergence = (p * (part - p.mean(dim=0, keepdim=True).log())).sum(dim=1)
        scores.append(float(divergence.mean().exp()))
    return _spread(scores, max(stop - start for start, stop in itertools.pairwise(edges)))


def precision_recall(candidate: Tensor, reference: Tensor, protocol: Protocol) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2).

    A set's manifold is the union of balls around its images, each as wide as the distance to the k-th nearest other
    image. Precision is the share of candidates in the reference's manifold, recall the share of references in the
    candidate's.

    candidate, reference: `[N, D]`, `[M, D]`. Raises EvaluationError: not more than k images in either.
    """
    least = protocol.neighbours + 1
    _check(candidate, reference, least=least, what=f"Precision and recall with k = {protocol.neighbours}")
    ours, theirs = candidate.double(), reference.double()
    radii = {"ours": _radii(ours, protocol.neighbours), "theirs": _radii(theirs, protocol.neighbours)}
    return PrecisionRecall(
        precision=_share_inside(ours, theirs, radii["theirs"]),
        recall=_share_inside(theirs, ours, radii["ours"]),
    )


def _radii(points: Tensor, k: int) -> Tensor:
    """`[N]`, squared distance to the k-th nearest other point."""
    found = []
    for start in range(0, len(points), _ROWS):
        block = _squared_distances(points[start : start + _ROWS], points)
        rows = torch.arange(len(block))
        block[rows, start + rows] = torch.inf  # not itself; a copy of it counts
        found.append(block.kthvalue(k, dim=1).values)
    return torch.cat(found)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = 0
    for start in range(0, len(points), _ROWS):
        block = _squared_distances(points[start : start + _ROWS], centres)
        inside += int((block <= radii).any(dim=1).sum())
    return inside / len(points)


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """`[N, M]` float64; exactly 0 for equal points, on which whether a point lies in a ball of radius 0 depends."""
    norms = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    found = norms - 2 * rows @ columns.T
    # Far above the rounding of the product, far below what float32 features can tell apart.
    return torch.where(found < 1e-12 * norms, torch.zeros_like(found), found)


def _check(candidate: Tensor, reference: Tensor, *, least: int, what: str) -> None:
    if candidate.shape[1] != reference.shape[1]:
        raise EvaluationError(
            f"{what} was asked for of {candidate.shape[1]} and of {reference.shape[1]} features: use the same for both."
        )
    n = min(len(candidate), len(reference))
    if n < least:
        raise EvaluationError(f"{what} needs at least {least} images, got n = {n}.")


def _spread(values: list[float], size: int) -> Spread:
    found = torch.tensor(values, dtype=torch.float64)
    return Spread(float(found.mean()), float(found.std(correction=0)), len(values), size)
