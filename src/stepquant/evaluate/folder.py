"""What a killed evaluation needs to go on: a file for every batch that is finished.

    evaluation.json     what is evaluated and how; another evaluation is refused
    NAME.safetensors    figures and features of one batch, never images

Files are written beside their place and renamed, so they are there whole or not at all. The figures of an evaluation
are computed from these files alone, so a resumed one ends with the same.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepquant.errors import EvaluationError, SpecError

__all__ = ["EvaluationFolder", "discard", "evaluation_folder"]

_MARK = "evaluation.json"


class EvaluationFolder:
    """Tensors by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name."""
        partial = self._path(name).with_suffix(".partial")
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, partial)
        partial.replace(self._path(name))

    def load(self, name: str, *ends: str) -> dict[str, Tensor]:
        """What was kept under a name: the tensors whose own names end so, or all. Nothing else is read.

        Raises EvaluationError for a damaged file.
        """
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys() if not ends or key.endswith(ends)}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise EvaluationError(f"{path} is damaged ({error}): remove the folder and start anew.") from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@contextmanager
def evaluation_folder(
    folder: Path | None, identity: Mapping[str, Any], *, resume: bool = False
) -> Iterator[EvaluationFolder]:
    """The folder of an evaluation; one that vanishes afterwards if none is given.

    identity: JSON values that must be the same for an evaluation to be continued.
    Raises SpecError if the folder holds something and `resume` is not set, or another evaluation.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="stepquant-evaluation-") as temporary:
            yield EvaluationFolder(Path(temporary))
        return
    wanted = json.loads(json.dumps(dict(identity)))
    mark = folder / _MARK
    if mark.is_file():
        if not resume:
            raise SpecError(
                f"{folder} holds an evaluation that was interrupted. Go on with it (--resume, resume=True), or start "
                "anew (--overwrite, or remove the folder)."
            )
        _check_same(folder, _identity_in(mark), wanted)
    elif folder.exists() and any(folder.iterdir()):
        raise SpecError(f"{folder} is no work folder of an evaluation: move it away first.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        partial = mark.with_suffix(".partial")
        partial.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        partial.replace(mark)
    yield EvaluationFolder(folder)


def _identity_in(mark: Path) -> dict[str, Any]:
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{mark} is damaged ({error}): remove the folder and start anew.") from error
    return found if isinstance(found, dict) else {}


def _check_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if different:
        raise SpecError(
            f"{folder} holds another evaluation: {', '.join(different)} differ. Go on with the settings of that one, "
            "or start anew (--overwrite, or remove the folder)."
        )


def discard(folder: Path) -> None:
    """Remove the work folder of an evaluation, if there is one. Raises SpecError for any other folder."""
    if not folder.exists():
        return
    if not (folder / _MARK).is_file():
        raise SpecError(f"{folder} is no work folder of an evaluation: move it away first.")
    shutil.rmtree(folder)
