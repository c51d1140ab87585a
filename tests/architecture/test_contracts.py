"""What holds of the source as a whole: directions of imports, public names, and what a shipped file may not hold."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import stepquant

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "stepquant"
FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    """`src/stepquant/model/clock.py` -> "stepquant.model.clock"."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def described_as(path: Path) -> str:
    return str(path.relative_to(SOURCE.parent))


def module_of(path: Path) -> ModuleType:
    return importlib.import_module(name_of(path))


WITH_NAMES = [path for path in FILES if re.search(r"^__all__ = ", path.read_text(encoding="utf-8"), re.MULTILINE)]


def test_import_contracts_hold() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
    assert "0 kept" not in done.stdout


@pytest.mark.parametrize("statement", ["import stepquant", "import stepquant.errors, stepquant.config, stepquant.cli"])
def test_heavy_packages_wait_until_they_are_needed(statement: str) -> None:
    code = f"import sys; {statement}; print(sorted({{'torch', 'diffusers', 'matplotlib', 'scipy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_help_comes_without_torch() -> None:
    """Each command's help, in one process; `tests/unit/test_cli.py` looks at what the texts say."""
    commands = ["", "quantize", "sample", "evaluate", "report", "inspect", "methods", "check", "demo"]
    code = f"""
import sys
from stepquant.cli import main
for command in {commands!r}:
    try:
        main([*command.split(), "--help"])
    except SystemExit as stop:
        assert stop.code == 0, command
    assert not {{"torch", "diffusers", "matplotlib", "scipy"}} & set(sys.modules), command
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_module_with_definitions_names_what_is_public() -> None:
    silent = [
        described_as(path)
        for path in FILES
        if path not in WITH_NAMES
        and any(
            isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            for node in ast.parse(path.read_text(encoding="utf-8")).body
        )
    ]
    assert silent == []


def rank(name: str) -> tuple[int, str]:
    """The order of ruff's RUF022: constants, then classes, then all else, each by the alphabet."""
    if name.isupper() and not name.startswith("__"):
        return (0, name)
    return (1 if name[:1].isupper() else 2, name)


@pytest.mark.parametrize("path", WITH_NAMES, ids=name_of)
def test_public_names_are_sorted_and_exist(path: Path) -> None:
    module = module_of(path)
    names: list[str] = module.__all__
    assert names == sorted(set(names), key=rank)
    assert [name for name in names if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", WITH_NAMES, ids=name_of)
def test_public_functions_and_classes_say_what_they_do(path: Path) -> None:
    module = module_of(path)
    objects: dict[str, Any] = {name: getattr(module, name) for name in module.__all__}
    undescribed = [
        name
        for name, thing in objects.items()
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and not described(thing)
    ]
    assert undescribed == []


def described(thing: Any) -> bool:
    """Has a docstring of its own; the signature that `dataclass` writes there is none."""
    text = (vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__) or ""
    return bool(text.strip()) and not text.startswith(f"{thing.__name__}(")


def test_the_package_offers_what_the_readme_uses() -> None:
    assert {"open_model", "quantize", "load", "sample", "METHODS", "Recipe", "Run"} <= set(stepquant.__all__)
    assert set(dir(stepquant)) == set(stepquant.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = stepquant.quantise
    assert described(stepquant)
    for function in stepquant.METHODS.values():
        assert described(function)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_library_does_not_print(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"] == []


def test_nothing_that_is_shipped_leads_out_of_the_package() -> None:
    texts = [path for path in SOURCE.rglob("*") if path.suffix in (".py", ".md", ".json", ".yaml", ".html", ".css")]
    assert len(texts) > len(FILES)
    assert [described_as(path) for path in texts if "../shared" in path.read_text(encoding="utf-8")] == []
