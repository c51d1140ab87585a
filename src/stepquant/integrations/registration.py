"""Tell diffusers and peft about stepquant once they are imported.

`import stepquant` must stay quick, so it can import neither. Each has one module in which stepquant has to be known:
diffusers its table of quantizers, peft its LoRA model. If that module is there already, stepquant registers at once;
otherwise when it is imported, by a finder that takes itself away again.
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
LORA = "peft.tuners.lora.model"

_REGISTERING = {TABLE: "stepquant.pretrained", LORA: "stepquant.integrations.adapters"}
"""Module of the other library -> ours that registers itself in it when it is imported."""


class _Loader:
    """Runs the module as its own loader does, and registers stepquant in it."""

    def __init__(self, inside: Any, name: str) -> None:
        self._inside = inside
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._inside.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self._inside.exec_module(module)
        _register(self._name)


class _Finder:
    def __init__(self, wanted: str) -> None:
        self.wanted = wanted

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if name != self.wanted:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, name)  # type: ignore[assignment]
        return spec


def _register(name: str) -> None:
    # Ours registers itself. Its own import may be what brings the other library in, and then it does so when it is
    # complete.
    importlib.import_module(_REGISTERING[name])


def _register_once_there(name: str) -> None:
    if name in sys.modules:
        _register(name)
    elif not any(isinstance(finder, _Finder) and finder.wanted == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name))


def register_with_diffusers() -> None:
    """Now where diffusers' table of quantizers and peft's LoRA, with which diffusers loads adapters, are there;
    otherwise as soon as they are imported. Without peft nothing happens for it.
    """
    _register_once_there(TABLE)
    _register_once_there(LORA)
