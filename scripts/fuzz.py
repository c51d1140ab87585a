#!/usr/bin/env python
"""Coverage-guided fuzzing of what reads foreign bytes: manifests, tensor headers, run.yaml and recipes.

atheris is no dependency of stepquant and has wheels for few versions of Python: install it into an environment of its
own that sees this one's packages.

    python3.11 -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris
    PYTHONPATH=src:$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])') \\
        /tmp/fuzz/bin/python scripts/fuzz.py manifest --seconds 600

An input that ends in anything but the right error, or takes more than ten seconds or two gigabytes, is a finding and is
written to `crash-*` or `timeout-*`. tests/hostile/corpus keeps inputs that reached new code, and test_corpus.py beside
it replays them. New ones go to a folder of their own (--found), from where the interesting ones are copied by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests" / "hostile" / "corpus"


def read_a_manifest(data: bytes, folder: Path) -> None:
    """`stepquant.json`."""
    from stepquant.errors import CheckpointError
    from stepquant.manifest import read_manifest

    (folder / "stepquant.json").write_bytes(data)
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return
    _ = manifest.structure, manifest.shapes


def read_a_header(data: bytes, folder: Path) -> None:
    """A safetensors file, of which every tensor is read."""
    from stepquant.errors import CheckpointError
    from stepquant.storage import open_tensors

    path = folder / "stepquant.safetensors"
    path.write_bytes(data)
    try:
        with open_tensors(path) as file:
            for name in file.entries:
                file.checksum(name)
                file.read(name)
    except CheckpointError:
        return


def read_settings(data: bytes, folder: Path) -> None:
    """`run.yaml`, resolved to a recipe."""
    from stepquant.config import load_config, resolve
    from stepquant.errors import SpecError

    (folder / "run.yaml").write_bytes(data)
    try:
        resolve(load_config(folder / "run.yaml"), flags={"model": "m"})
    except SpecError:
        return


def read_a_recipe(data: bytes, _folder: Path) -> None:
    """A recipe as JSON, as it stands in manifests and work folders."""
    from stepquant.errors import SpecError
    from stepquant.methods import STAGES
    from stepquant.model.plain_json import parse_json
    from stepquant.recipe import recipe_from_dict

    try:
        value = parse_json(data)
    except ValueError:
        return
    if isinstance(value, dict):
        try:
            recipe_from_dict(value, STAGES)
        except SpecError:
            return


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "manifest": read_a_manifest,
    "header": read_a_header,
    "settings": read_settings,
    "recipe": read_a_recipe,
}


def write_seeds(folder: Path) -> None:
    """Real inputs to start from."""
    import torch
    from safetensors.torch import save

    from stepquant.methods import METHODS

    for name in TARGETS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "header" / "real").write_bytes(save({"a": torch.ones(2, 3), "b": torch.zeros(0, dtype=torch.uint8)}))
    (folder / "settings" / "real").write_text(
        "model: m\nmethod: accuquant\nweights: 4\nrules:\n- {pattern: '*', weights: 8}\noptions: {window: 2}\n"
    )
    recipe = {"name": "r", "stages": METHODS["rtn"]().to_dict()["stages"]}
    (folder / "recipe" / "real").write_text(json.dumps(recipe))
    (folder / "settings" / "recipe").write_text(json.dumps({"model": "m", "recipe": recipe}))


def main() -> None:
    """Fuzz one target."""
    parser = argparse.ArgumentParser(description="Fuzz what reads foreign bytes; see the head of this file.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--found", type=Path, help="folder for inputs that reach new code; a temporary one if missing")
    options = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=["stepquant", "yaml"]):
        import stepquant.config
        import stepquant.manifest
        import stepquant.methods
        import stepquant.storage  # noqa: F401
    target = TARGETS[options.target]
    folder = Path(tempfile.mkdtemp(prefix="stepquant-fuzz-"))
    found = options.found or folder / "found"
    found.mkdir(parents=True, exist_ok=True)
    arguments = [f"-max_total_time={options.seconds}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=8192"]
    arguments += [f"-dict={CORPUS / 'words.dict'}", str(found), str(CORPUS / options.target)]
    atheris.Setup([sys.argv[0], *arguments], lambda data: target(data, folder))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
