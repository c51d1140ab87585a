"""The parts of a pipeline by class name: naming, saving and rebuilding them without executing anything from a file.

Classes are looked up in diffusers' and transformers' own public namespaces only. Everything else is "plain": its module
is never imported, and the caller passes the object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from safetensors.torch import load_file
from torch import nn

from stepquant.errors import CheckpointError
from stepquant.model.plain_json import parse_json

__all__ = [
    "bounded_modules",
    "build_denoiser",
    "build_pipeline",
    "class_identity",
    "json_config",
    "keeps_float32",
    "load_component",
    "save_component",
]

MAX_COUNT = 1_000_000
"""The largest whole number in a scheduler's configuration; schedules have a thousand timesteps."""

MAX_MODULES = 1_000_000
"""Modules of a component beside the denoiser; the largest have some thousand."""

MAX_BUFFER_VALUES = 64_000_000
"""Values of buffers that a configuration determines and no file holds."""


def class_identity(value: Any) -> tuple[Literal["diffusers", "transformers", "plain"], str]:
    """Library and class name: `("diffusers", "UNet2DModel")`, or `("plain", "module.Class")`."""
    kind = type(value)
    libraries: tuple[Literal["diffusers", "transformers"], ...] = ("diffusers", "transformers")
    for library in libraries:
        inside = kind.__module__.split(".")[0] == library
        if inside and getattr(sys.modules[library], kind.__name__, None) is kind:
            return library, kind.__name__
    return "plain", f"{kind.__module__}.{kind.__qualname__}"


def json_config(value: Any) -> dict[str, Any]:
    """A diffusers object's configuration as JSON values, without private entries and where it was loaded from, and
    without what it says about quantization, which is the manifest's business.
    """
    text: dict[str, Any] = json.loads(value.to_json_string())
    return {key: entry for key, entry in text.items() if not key.startswith("_") and key != "quantization_config"}


def _public_class(library: str, class_name: str, base: str) -> Any:
    """A class of the library's namespace that is a subclass of the library's `base`."""
    if library == "transformers":
        try:
            import transformers as namespace
        except ImportError:
            raise CheckpointError(
                f"{class_name} comes from transformers, which is not installed: pip install transformers"
            ) from None
    else:
        namespace = diffusers
    found = getattr(namespace, class_name, None) if class_name.isidentifier() else None
    if not isinstance(found, type) or (library == "diffusers" and not issubclass(found, getattr(diffusers, base))):
        raise CheckpointError(f"{library} {namespace.__version__} has no {base} named {class_name!r}.")
    return found


@contextmanager
def bounded_modules(limit: int) -> Iterator[None]:
    """Stop any construction that makes more than `limit` submodules: a configuration may ask for a billion layers."""
    made = 0

    def count(_module: nn.Module, _name: str, _child: nn.Module | None) -> None:
        nonlocal made
        made += 1
        if made > limit:
            raise CheckpointError(
                f"The configuration asks for more than {limit} modules; the file has nowhere near as many."
            )

    handle = nn.modules.module.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def build_denoiser(class_name: str, config: Mapping[str, Any], device: str) -> nn.Module:
    """A diffusers model of this configuration with meaningless weights. The global random stream is left alone."""
    kind = _public_class("diffusers", class_name, "ModelMixin")
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            model: nn.Module = kind.from_config(dict(config))
    except CheckpointError:
        raise
    except Exception as error:  # a constructor given a damaged configuration can raise anything
        raise CheckpointError(f"{class_name} cannot be built from the saved configuration: {error}") from error
    return model.eval()


def save_component(value: Any, folder: Path) -> None:
    """Save by diffusers' or transformers' own means, in safetensors."""
    folder.mkdir()
    if isinstance(value, diffusers.SchedulerMixin):
        config = {"_class_name": type(value).__name__, **json_config(value)}
        (folder / "scheduler_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    elif isinstance(value, nn.Module):
        value.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
    else:
        value.save_pretrained(folder)
    _forget_origin(folder / "config.json")


def _forget_origin(path: Path) -> None:
    """Take the path that a component was loaded from out of its configuration: equal parts must give equal bytes."""
    if path.is_file():
        config = json.loads(path.read_bytes())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_component(folder: Path, library: str, class_name: str) -> Any:
    """Rebuild what `save_component` wrote. Reads safetensors and JSON, never pickles, never the network."""
    try:
        if (folder / "scheduler_config.json").is_file():
            kind = _public_class(library, class_name, "SchedulerMixin")
            config = parse_json((folder / "scheduler_config.json").read_bytes())
            _refuse_huge_numbers(folder, config)
            return kind.from_config({key: value for key, value in config.items() if not key.startswith("_")})
        kind = _public_class(library, class_name, "ConfigMixin")
        options: dict[str, Any] = {"local_files_only": True}
        if issubclass(kind, nn.Module):
            options |= {"use_safetensors": True}
            if library == "diffusers":
                options |= {"low_cpu_mem_usage": False}
                _refuse_more_than_there_is(folder, kind)
                if keeps_float32(kind):
                    return _as_stored(folder, kind)
        return kind.from_pretrained(str(folder), **options)
    except CheckpointError:
        raise
    except Exception as error:  # third-party loaders given damaged files can raise anything
        raise CheckpointError(f"{folder} cannot be loaded as {library}'s {class_name}: {error}") from error


def keeps_float32(model: Any) -> bool:
    """Whether parts of this model, or of this class, stay in float32 when the rest is cast."""
    return bool(getattr(model, "_keep_in_fp32_modules", None))


def _as_stored(folder: Path, kind: Any) -> nn.Module:
    """A model whose tensors have the dtypes of the files. diffusers would cast them, and needs accelerate for it."""
    model = build_denoiser(kind.__name__, parse_json((folder / "config.json").read_bytes()), "cpu")
    tensors = {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    model.load_state_dict(tensors, assign=True)
    return model


def _refuse_huge_numbers(folder: Path, config: Any) -> None:
    """A scheduler makes tables of `num_train_timesteps` and other counts before anybody could compare them."""
    for key, value in config.items():
        if isinstance(value, int) and abs(value) > MAX_COUNT:
            raise CheckpointError(
                f"{folder / 'scheduler_config.json'}: {key} is {value}; no schedule needs more than {MAX_COUNT}."
            )


def _refuse_more_than_there_is(folder: Path, kind: Any) -> None:
    """A component's configuration must not ask for a larger model than its weight files hold."""
    files = list(folder.glob("*.safetensors"))
    held = sum(file.stat().st_size for file in files)
    with bounded_modules(MAX_MODULES):
        bones = build_denoiser(kind.__name__, parse_json((folder / "config.json").read_bytes()), "meta")
    asked = sum(tensor.numel() for tensor in (*bones.parameters(), *bones.buffers()))
    # One byte a value is the smallest dtype of weights; buffers that are not stored are small.
    if asked > held + MAX_BUFFER_VALUES:
        raise CheckpointError(
            f"{folder}: the configuration asks for {asked} values, and the weight files have {held} bytes."
        )


def build_pipeline(class_name: str, components: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """A diffusers pipeline of these components."""
    kind = _public_class("diffusers", class_name, "DiffusionPipeline")
    try:
        return kind(**components, **arguments)
    except Exception as error:
        raise CheckpointError(f"{class_name} cannot be built from its components: {error}") from error
