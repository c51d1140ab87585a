"""Tell diffusers about stepquant's checkpoints once diffusers is imported.

`import stepquant` must stay quick, so it cannot import diffusers. If that is there already, it is told at once;
otherwise when it imports its table of quantizers, by a finder that takes itself away again.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_with_diffusers"]

TABLE = "diffusers.quantizers.auto"


class _Loader:
    """Runs the module as its own loader does, and registers stepquant in it."""

    def __init__(self, inside: Any) -> None:
        self._inside = inside

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._inside.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self._inside.exec_module(module)
        _register()


class _Finder:
    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


def _register() -> None:
    # It registers itself. Its own import may be what brings diffusers in, and then it does so when it is complete.
    importlib.import_module("stepquant.pretrained")


def register_with_diffusers() -> None:
    """Now if diffusers has its table of quantizers, otherwise as soon as it imports it."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
