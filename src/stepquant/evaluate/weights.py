"""Files with weights that stepquant does not ship: read without running anything that is in them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stepquant.errors import EvaluationError

__all__ = ["MissingWeights", "fill_", "read_weights"]


class MissingWeights(EvaluationError):  # noqa: N818 - reads as a sentence where it is raised
    """A file of weights that is not there; the message says what to download. Other figures do not need it."""


def read_weights(
    path: Path, *, what: str, download: str, sha256: str = "", then: str = "give its path"
) -> dict[str, Tensor]:
    """Tensors by name of a `.safetensors` file, or of a state dict that torch wrote (`weights_only`).

    what: the network, in messages. download: where the published file is. then: what to do with it.
    sha256: how the published file's hash begins; empty for a file that is told by its contents.

    Raises MissingWeights if there is no such file, EvaluationError for another file or a damaged one.
    """
    if not path.is_file():
        raise MissingWeights(f"{path} is not there. Download {download} and {then}.")
    if sha256:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(sha256):
            raise EvaluationError(
                f"{path} is not the published file of {what}: its SHA-256 begins with {found[:8]}, expected {sha256}. "
                f"Download {download} again."
            )
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EvaluationError(f"{path} cannot be read as weights of {what}: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise EvaluationError(f"{path} holds no state dict, expected the weights of {what}.")
    return tensors


def fill_(module: nn.Module, tensors: dict[str, Tensor], *, path: Path, what: str) -> None:
    """Load tensors into a module. Raises EvaluationError naming what is missing, unknown or of another shape."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    # A counter that batch norms keep while they train; older files lack it.
    expected = {name: shape for name, shape in expected.items() if not name.endswith("num_batches_tracked")}
    wrong = sorted(name for name in {*expected, *found} if name in expected and expected[name] != found.get(name))
    unknown = sorted(name for name in found if name not in expected and not name.endswith("num_batches_tracked"))
    if wrong or unknown:
        example = (wrong or unknown)[0]
        raise EvaluationError(
            f"{path} does not hold the weights of {what}: {len(wrong)} tensors are missing or have another shape and "
            f"{len(unknown)} are unknown, for example {example}: expected {expected.get(example)}, found "
            f"{found.get(example)}."
        )
    module.load_state_dict(tensors, strict=False)
