"""What is shipped: a wheel and an sdist that are whole, small and typed, and a command that answers at once."""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

from stepquant._version import __version__

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel(built: Path) -> None:
    (path,) = built.glob("*.whl")
    assert path.name == f"stepquant-{__version__}-py3-none-any.whl"
    assert path.stat().st_size < 30_000_000
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        source = {
            str(file.relative_to(ROOT / "src"))
            for file in (ROOT / "src" / "stepquant").rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        }
        assert {name for name in names if not name.startswith(f"stepquant-{__version__}.dist-info/")} == source
        assert "stepquant/py.typed" in names
        assert any(name.startswith("stepquant/assets/digits-unet/") for name in names)
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "stepquant = stepquant.cli:main" in wheel.read(entry).decode()
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        head = email.message_from_bytes(wheel.read(metadata))
    assert head["Requires-Python"] == ">=3.11"
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(
        head.get_all("Classifier", [])
    )
    assert {"openvino", "onnx", "gpu", "eval", "dev"} <= set(head.get_all("Provides-Extra", []))
    plain = {text.split(">")[0] for text in head.get_all("Requires-Dist", []) if "extra ==" not in text}
    assert {"torch", "diffusers", "openvino", "onnx", "filelock"} <= plain, "the CPU engine works out of the box"


def test_the_sdist(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    assert path.stat().st_size < 30_000_000
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "src/stepquant/py.typed", "tests/conftest.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "runs", "demo", "build", ".git/"))]


def test_every_import_is_a_dependency() -> None:
    """What the package imports is in pyproject.toml by itself, not by way of another package."""
    import ast

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [
        *declared["dependencies"],
        *(text for extra in declared["optional-dependencies"].values() for text in extra),
    ]
    known = {text.split(">")[0].split("=")[0].lower() for text in listed}
    names = {"yaml": "pyyaml", "PIL": "pillow", "jinja2": "jinja2", "importlinter": "import-linter"}
    imported: dict[str, str] = {}
    for path in (ROOT / "src" / "stepquant").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            imported |= {module.split(".")[0]: str(path.relative_to(ROOT)) for module in modules}
    outside = {name: where for name, where in imported.items() if name not in sys.stdlib_module_names}
    del outside["stepquant"]
    assert {name: where for name, where in outside.items() if names.get(name, name).lower() not in known} == {}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quantize", "--help"]])
def test_the_command_answers_at_once(arguments: list[str]) -> None:
    """No torch, and little time; measured as CPU time, since other tests may have the machine."""
    code = (
        "import sys, time\n"
        "from stepquant.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as stop:\n"
        "    heavy = {'torch', 'diffusers', 'numpy', 'scipy', 'matplotlib', 'openvino'} & set(sys.modules)\n"
        "    print(stop.code, sorted(heavy), time.process_time())\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, heavy, seconds = done.stdout.splitlines()[-1].replace("[]", "none").split()
    assert (status, heavy) == ("0", "none")
    assert float(seconds) < 1.5, f"{time.monotonic() - began:.1f} s by the clock"


def test_the_package_says_its_version_without_torch() -> None:
    code = "import sys, stepquant; print(stepquant.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [__version__, "False"]
