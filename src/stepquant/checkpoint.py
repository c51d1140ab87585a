"""Save a quantized pipeline and load it again. docs/format.md describes the folder.

Levels are bit-packed, everything else is kept exactly, and loading checks every field before it is used: a loaded model
computes bit for bit what the saved one computed, or there is a CheckpointError that says what is wrong.
"""

from __future__ import annotations

import copy
import glob
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from torch import nn

from stepquant._version import __version__
from stepquant.errors import CheckpointError, ModelError, SpecError, UnsupportedPipeline, nearest
from stepquant.manifest import (
    MANIFEST_NAME,
    ComponentIdentity,
    DenoiserIdentity,
    Manifest,
    PipelineIdentity,
    config_hash,
    group_layers,
    needed_version,
    read_manifest,
    write_manifest,
)
from stepquant.model.assembly import assemble_, describe
from stepquant.model.clock import clock_of
from stepquant.model.components import (
    bounded_modules,
    build_denoiser,
    build_pipeline,
    class_identity,
    json_config,
    keeps_float32,
    load_component,
    save_component,
)
from stepquant.model.correction import (
    CORRECTION_FIELDS,
    OPTIONAL_FIELDS,
    CorrectedScheduler,
    StepCorrection,
    correction_of,
)
from stepquant.model.layer import QuantizedLayer
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.surgery import check_finite, operand_specs, quantized_layers
from stepquant.pretrained import INDEX_NAME, attach_, refuse_adapters, stock_config
from stepquant.slots import (
    Dtypes,
    Slot,
    check_entries,
    check_value,
    decode_,
    dtype_named,
    dtype_text,
    encoded,
    restore_weight_,
    slots_of,
)
from stepquant.storage import (
    Entry,
    TensorFile,
    checksum,
    errors_name,
    open_tensors,
    read_header,
    write_tensors,
)

__all__ = [
    "CORRECTION_PREFIX",
    "TENSORS_NAME",
    "check_folder",
    "load_checkpoint",
    "replacing",
    "save_checkpoint",
    "saved_scheduler",
    "skeleton",
]

TENSORS_NAME = "stepquant.safetensors"
CORRECTION_PREFIX = "stepquant_correction"

# Far above any schedule. The tables that assembling allocates grow with it.
MAX_BINS = 65_536
MAX_FILES = 10_000
# Two bits become 32. Tables of positions, which are not stored, take a few megabytes.
MAX_EXPANSION = 16
MAX_BUFFER_BYTES = 256_000_000


def save_checkpoint(
    folder: Path | str,
    *,
    pipe: Any,
    denoiser_name: str,
    denoiser: nn.Module,
    base_model: str,
    created: str,
    schedule: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a checkpoint folder and return its manifest. Equal arguments give equal bytes.

    pipe: a diffusers pipeline or a DenoiserPipeline; a `CorrectedScheduler` in it is saved with its correction.
    denoiser: the quantized and hardened denoiser that belongs in `pipe`'s place `denoiser_name`.
    base_model: what was quantized, in words or as a model id. created: a date; nothing reads the clock.
    schedule: `ScheduleFingerprint.to_dict()`. recipe, run, quality: provenance, JSON values.
    overwrite: replace a checkpoint that is there. The old one goes only after the new one is complete.

    Raises CheckpointError if the folder exists, if it is to be overwritten but is no checkpoint, if a part of the
    pipeline cannot be saved, or if a layer is another one than its configuration builds; ModelError if the model is not
    hardened or holds NaN.
    """
    target = Path(folder)
    _check_target(target, overwrite)
    _refuse_packed(denoiser)
    refuse_adapters([name for name, module in denoiser.named_modules() if hasattr(module, "base_layer")])
    check_finite(denoiser)
    structure = describe(denoiser)
    _refuse_second(pipe, denoiser_name)
    scheduler = pipe.scheduler
    correction = correction_of(scheduler)
    tensors = {name: encoded(name, slot) for name, slot in slots_of(denoiser).items()}
    if correction is not None:
        tensors |= {f"{CORRECTION_PREFIX}.{name}": table for name, table in correction.tables().items()}
    layers = quantized_layers(denoiser)
    shapes = {
        name: tuple(layer.weight.shape) if isinstance(layer, QuantizedLayer) else () for name, layer in layers.items()
    }
    identity = _denoiser_identity(denoiser_name, denoiser)
    groups = group_layers(structure, shapes)
    manifest = Manifest(
        format_version=2 if correction is not None and correction.additions else needed_version(groups),
        stepquant=__version__,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        created=created,
        base_model=base_model,
        base_config_hash=config_hash(identity.config),
        denoiser=identity,
        pipeline=_pipeline_identity(pipe, denoiser_name),
        clock=structure.clock,
        explicit_attention=structure.explicit_attention,
        layers=groups,
        correction=None if correction is None else (correction.gain.shape[0], correction.gain.shape[1]),
        schedule=None if schedule is None else dict(schedule),
        recipe=dict(recipe or {}),
        run=dict(run or {}),
        quality=dict(quality or {}),
        checksums={name: checksum(tensor) for name, tensor in tensors.items()},
    )
    _refuse_changed(denoiser, skeleton(manifest, tensors=len(tensors)))
    with replacing(target) as partial:
        _write_parts(partial, pipe, manifest)
        write_tensors(partial / denoiser_name / TENSORS_NAME, tensors)
        write_manifest(partial / MANIFEST_NAME, manifest)
    return manifest


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists already: choose another folder or pass overwrite=True.")
    if not (target / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{target} is not a stepquant checkpoint, so overwrite=True does not remove it.")


def _refuse_packed(denoiser: nn.Module) -> None:
    """A layer packed by an engine has no simulated weight any more."""
    for name, module in denoiser.named_modules():
        if not isinstance(module, QuantizedLayer) and isinstance(
            module._modules.get("weight_quantizer"), WeightQuantizer
        ):
            raise CheckpointError(
                f"{name} is packed by an engine: save the model before packing, or copy the checkpoint."
            )


def _refuse_second(pipe: Any, denoiser_name: str) -> None:
    """Quantized parts beside the denoiser would be saved as what they are not."""
    for name, part in _components(pipe).items():
        if name != denoiser_name and isinstance(part, nn.Module) and clock_of(part) is not None:
            raise CheckpointError(
                f"{name} is quantized too, and a checkpoint holds one quantized denoiser: save {denoiser_name} and "
                f"{name} from pipelines in which the other one is in full precision. pipe.save_pretrained(folder) "
                "saves both, for diffusers' from_pretrained."
            )


def _refuse_changed(denoiser: nn.Module, built: nn.Module | None) -> None:
    """Layers changed after construction, such as convolutions made circular, would be loaded as they were built."""
    found, expected = _operators(denoiser), {} if built is None else _operators(built)
    for name, operator in expected.items():
        if found.get(name, operator) != operator:
            raise CheckpointError(
                f"{name} is {found[name]}, and the configuration builds {operator}: a loaded model would compute "
                "something else. Change it back before saving, and again after loading."
            )


def _operators(model: nn.Module) -> dict[str, str]:
    """What each layer with a geometry is beside its tensors, by name, as text."""
    return {
        name: repr(module.geometry) if isinstance(module, QuantizedLayer) else repr(module)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }


def _denoiser_identity(name: str, denoiser: nn.Module) -> DenoiserIdentity:
    library, class_name = class_identity(denoiser)
    config: dict[str, Any] = {}
    if library == "diffusers":
        config = json_config(denoiser)
    plain = {key: slot.tensor.dtype for key, slot in slots_of(denoiser).items() if slot.role in ("plain", "levels")}
    default = next((dtype for dtype in plain.values() if dtype.is_floating_point), torch.float32)
    others = {key: dtype_text(dtype) for key, dtype in plain.items() if dtype != default}
    where: Literal["diffusers", "plain"] = "diffusers" if library == "diffusers" else "plain"
    return DenoiserIdentity(name, where, class_name, config, dtype_text(default), others)


def _pipeline_identity(pipe: Any, denoiser_name: str) -> PipelineIdentity:
    parts = {name: part for name, part in _components(pipe).items() if name != denoiser_name}
    components = {name: _component_identity(part) for name, part in sorted(parts.items())}
    if isinstance(pipe, DenoiserPipeline):
        arguments = {"sample_shape": list(pipe.sample_shape), "max_timestep": pipe.max_timestep}
        return PipelineIdentity("stepquant", "DenoiserPipeline", arguments, components)
    library, class_name = class_identity(pipe)
    if library != "diffusers":
        raise CheckpointError(
            f"{class_name} is not a pipeline of diffusers, so it could not be rebuilt: save its denoiser and scheduler "
            "in a stepquant.DenoiserPipeline."
        )
    known = {*components, denoiser_name}
    arguments = {key: value for key, value in pipe.config.items() if not key.startswith("_") and key not in known}
    return PipelineIdentity("diffusers", class_name, json.loads(json.dumps(arguments)), components)


def _components(pipe: Any) -> dict[str, Any]:
    """The pipeline's parts by name, a corrected scheduler without its correction."""
    parts = (
        {"denoiser": pipe.denoiser, "scheduler": pipe.scheduler}
        if isinstance(pipe, DenoiserPipeline)
        else {**pipe.components}
    )
    scheduler = parts.get("scheduler")
    if isinstance(scheduler, CorrectedScheduler):
        parts["scheduler"] = scheduler.uncorrected
    return parts


def _component_identity(part: Any) -> ComponentIdentity | None:
    if part is None:
        return None
    library, class_name = class_identity(part)
    dtype = next((tensor.dtype for tensor in part.parameters()), None) if isinstance(part, nn.Module) else None
    return ComponentIdentity(library, class_name, None if dtype is None else dtype_text(dtype))


def _write_parts(folder: Path, pipe: Any, manifest: Manifest) -> None:
    """Everything of the folder that is not ours, in diffusers' layout."""
    identity = manifest.denoiser
    (folder / identity.name).mkdir()
    if identity.library == "diffusers":
        config = {"_class_name": identity.class_name, **identity.config, "quantization_config": stock_config(manifest)}
        _write_json(folder / identity.name / "config.json", config)
        names = [name for name in manifest.checksums if not name.startswith(CORRECTION_PREFIX + ".")]
        places = {"metadata": {}, "weight_map": dict.fromkeys(sorted(names), TENSORS_NAME)}
        _write_json(folder / identity.name / INDEX_NAME, places)
    parts = _components(pipe)
    index: dict[str, Any] = {"_class_name": manifest.pipeline.class_name, "_diffusers_version": manifest.diffusers}
    for name, component in manifest.pipeline.components.items():
        index[name] = [None, None] if component is None else [component.library, component.class_name]
        if component is not None and component.library != "plain":
            save_component(parts[name], folder / name)
    if manifest.pipeline.library == "diffusers":
        index[identity.name] = [identity.library, identity.class_name]
        _write_json(folder / "model_index.json", index | manifest.pipeline.arguments)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n", encoding="utf-8")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A sibling folder to write into; it takes the target's place once the body has ended well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _tidy_after_killed(target)
    # Processes of other machines may share the disk, so a process number alone would not do.
    own = f".{target.name}.{_HOST}-{os.getpid()}"
    partial, old = target.with_name(f"{own}.partial"), target.with_name(f"{own}.old")
    shutil.rmtree(partial, ignore_errors=True)
    with errors_name(target):
        partial.mkdir()
        try:
            yield partial
            if target.exists():
                target.rename(old)
            try:
                partial.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    shutil.rmtree(old, ignore_errors=True)


_HOST = re.sub(r"[^A-Za-z0-9]", "-", socket.gethostname())


def _tidy_after_killed(target: Path) -> None:
    """Remove what killed processes of this machine left; a checkpoint that one had just put aside is put back."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.{_HOST}-*"):
        found = re.fullmatch(r"(\d+)\.(partial|old)", path.name.removeprefix(f".{target.name}.{_HOST}-"))
        # A number of our own is that of a process before us: containers give the same one each time.
        if found is None or (int(found[1]) != os.getpid() and _is_running(int(found[1]))):
            continue
        if found[2] == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    """Whether there is a process of this number; when in doubt there is one."""
    if os.name != "posix":
        return True  # there, signal 0 would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def load_checkpoint(
    folder: Path | str, *, denoiser: nn.Module | None = None, components: Mapping[str, Any] | None = None
) -> tuple[Any, Manifest]:
    """The pipeline with its quantized denoiser, on the CPU, and the manifest.

    denoiser: the float module, of the class and shapes that were quantized, for a denoiser that diffusers does not
        know. It is copied; its weights do not matter.
    components: other parts that diffusers and transformers do not know, or that should replace the saved ones.

    Raises CheckpointError for every kind of damage, naming the file and tensor. Nothing from the folder is executed.
    """
    root = Path(folder)
    check_folder(root)
    manifest = read_manifest(root)
    path = _inside(root, manifest.denoiser.name, TENSORS_NAME)
    entries = read_header(path)
    _check_listed(path, manifest, entries)
    _check_declared(path, manifest, entries)
    dtypes = Dtypes(manifest.denoiser)
    bones = skeleton(manifest, tensors=len(entries))
    model_entries = {name: entry for name, entry in entries.items() if not name.startswith(CORRECTION_PREFIX + ".")}
    if bones is not None:
        _check_shapes(path, manifest, bones)
        check_entries(path, slots_of(bones), model_entries, dtypes)
        _check_size(path, bones)
    with open_tensors(path) as file:
        _check_sums(file, manifest)
        model = _quantized_model(manifest, denoiser, len(entries))
        _check_shapes(path, manifest, model)
        slots = slots_of(model)
        check_entries(path, slots, model_entries, dtypes)
        _fill_(slots, file, dtypes)
        attach_(model)
        correction = _read_correction(file, manifest)
    return _rebuilt_pipeline(root, manifest, model, correction, components or {}), manifest


def check_folder(root: Path) -> None:
    """Refuse links that lead out of the folder, and folders that are something else."""
    if not root.is_dir():
        raise CheckpointError(f"There is no folder {root}.")
    inside = root.resolve()
    for count, path in enumerate(root.rglob("*"), start=1):
        if count > MAX_FILES:
            raise CheckpointError(f"{root} holds more than {MAX_FILES} files: it is not a checkpoint.")
        if path.is_symlink() and not _leads(path).is_relative_to(inside):
            raise CheckpointError(
                f"{path} is a link that leads out of the checkpoint. Copy the folder with its links resolved (cp -rL)."
            )
        if not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{path} is neither a file nor a folder: reading a pipe or a device might never end.")


def _leads(link: Path) -> Path:
    """Where a link ends. Python 3.11 and 3.12 refuse one that leads to itself, later versions return it."""
    try:
        return link.resolve()
    except (OSError, RuntimeError):
        raise CheckpointError(f"{link} is a link that leads to itself.") from None


def _inside(root: Path, *parts: str) -> Path:
    path = root.joinpath(*parts)
    if not path.is_file():
        raise CheckpointError(f"{root} lacks the file {'/'.join(parts)}.")
    return path


def _check_listed(path: Path, manifest: Manifest, entries: Mapping[str, Entry]) -> None:
    for name in manifest.checksums:
        if name not in entries:
            raise CheckpointError(f"{path} lacks tensor {name!r}, which the manifest lists.")
    for name in entries:
        if name not in manifest.checksums:
            raise CheckpointError(f"{path} has tensor {name!r}, which the manifest does not list.")


def _check_declared(path: Path, manifest: Manifest, entries: Mapping[str, Entry]) -> None:
    """Sizes that assembling allocates must be backed by tensors of the file."""
    bins, edges = manifest.clock.bins, entries.get("stepquant_clock.edges")
    if edges is None:
        raise CheckpointError(f"{path} lacks tensor 'stepquant_clock.edges'.")
    if not 1 <= bins <= MAX_BINS or edges.shape != (bins - 1,):
        raise CheckpointError(
            f"{path}: the manifest declares {bins} timestep bins (1 to {MAX_BINS}), and there are borders of shape "
            f"{list(edges.shape)}."
        )
    for name, layer in manifest.structure.layers.items():
        per_channel = {key for key, spec in operand_specs(layer.scheme) if spec.granularity == "channel"}
        for attribute, rows in layer.rows.items():
            scale = entries.get(f"{name}.{attribute}.scale")
            axes = 2 if attribute in per_channel else 1
            if scale is None or len(scale.shape) != axes or scale.shape[0] != rows or rows < 1:
                found = None if scale is None else list(scale.shape)
                raise CheckpointError(
                    f"{path}, {name}.{attribute}.scale: shape {found}, but the manifest declares {rows} rows."
                )
        if layer.rank is not None:
            down = entries.get(f"{name}.branch.down")
            if down is None or down.shape[:1] != (layer.rank,) or layer.rank < 1:
                shape = None if down is None else list(down.shape)
                raise CheckpointError(
                    f"{path}, {name}.branch.down: shape {shape}, but the manifest declares rank {layer.rank}."
                )


def _check_size(path: Path, bones: nn.Module) -> None:
    """Buffers that a configuration determines are not in the file, so the file says nothing about their size."""
    asked = sum(tensor.numel() * tensor.element_size() for tensor in (*bones.parameters(), *bones.buffers()))
    allowed = MAX_EXPANSION * path.stat().st_size + MAX_BUFFER_BYTES
    if asked > allowed:
        raise CheckpointError(
            f"{path}: the configuration asks for a model of {asked} bytes; the file has {path.stat().st_size}, which "
            f"justifies {allowed}."
        )


def _check_sums(file: TensorFile, manifest: Manifest) -> None:
    for name, expected in manifest.checksums.items():
        if file.checksum(name) != expected:
            raise CheckpointError(
                f"{file.path}, {name}: the checksum differs from the manifest's; the tensor was damaged or edited."
            )


def skeleton(manifest: Manifest, *, tensors: int) -> nn.Module | None:
    """The quantized denoiser without memory (on the meta device); None for a class that diffusers does not know.

    tensors: how many the file holds; a configuration that asks for a much larger model is refused.
    """
    if manifest.denoiser.library != "diffusers":
        return None
    return _assembled(
        manifest,
        lambda: build_denoiser(manifest.denoiser.class_name, manifest.denoiser.config, "meta"),
        tensors,
        "meta",
    )


def _quantized_model(manifest: Manifest, given: nn.Module | None, tensors: int) -> nn.Module:
    identity = manifest.denoiser
    if given is not None:
        expected, found = identity.class_name.split(".")[-1], type(given).__name__
        if expected != found:
            raise CheckpointError(f"The checkpoint's denoiser is a {identity.class_name}, and denoiser= is a {found}.")
        if clock_of(given) is not None:
            raise CheckpointError("denoiser= has been quantized already: pass the full-precision module.")
        return _assembled(manifest, lambda: _cast(copy.deepcopy(given).cpu(), identity.dtype).eval(), tensors, "cpu")
    if identity.library != "diffusers":
        raise CheckpointError(
            f"The checkpoint's denoiser is a {identity.class_name}, which diffusers does not know. Build one and "
            "pass it as denoiser=."
        )

    def build() -> nn.Module:
        return _cast(build_denoiser(identity.class_name, identity.config, "cpu"), identity.dtype)

    return _assembled(manifest, build, tensors, "cpu")


def _cast(model: nn.Module, dtype: str) -> nn.Module:
    """Cast as the saved module was cast: its parameters, and the buffers that its configuration determines."""
    # Not `model.to`: diffusers overrides it and warns, although this gives back the dtypes that were there.
    return nn.Module.to(model, dtype_named(dtype))


def _assembled(manifest: Manifest, build: Callable[[], nn.Module], tensors: int, device: str) -> nn.Module:
    # Modules without tensors (activations, lists, quantizers) outnumber those with, but not by this much.
    with bounded_modules(10_000 + 20 * tensors):
        model = build()
        try:
            with torch.device(device) if device != "cpu" else nullcontext():
                assemble_(model, manifest.structure)
        except (ModelError, SpecError) as error:
            raise CheckpointError(
                f"The layers of {MANIFEST_NAME} do not fit {manifest.denoiser.class_name}: {error}"
            ) from error
    return model


def _check_shapes(path: Path, manifest: Manifest, model: nn.Module) -> None:
    for name, layer in quantized_layers(model).items():
        shape = tuple(layer.weight.shape) if isinstance(layer, QuantizedLayer) else ()
        if manifest.shapes[name] != shape:
            raise CheckpointError(
                f"{path}, {name}: the manifest declares weight shape {list(manifest.shapes[name])}, the model has "
                f"{list(shape)}."
            )


def _fill_(slots: Mapping[str, Slot], file: TensorFile, dtypes: Dtypes) -> None:
    for name, slot in slots.items():
        if slot.role != "levels":
            stored = file.read(name)
            check_value(f"{file.path}, {name}", slot, stored)
            decode_(slot, stored, dtypes.of(name))
    for name, slot in slots.items():
        if slot.role == "levels":
            restore_weight_(slot, file.read(name), dtypes.of(name))


def _read_correction(file: TensorFile, manifest: Manifest) -> StepCorrection | None:
    names = {name: f"{CORRECTION_PREFIX}.{name}" for name in ("timesteps", *CORRECTION_FIELDS, *OPTIONAL_FIELDS)}
    present = {name for name in file.entries if name.startswith(CORRECTION_PREFIX + ".")}
    names = {name: key for name, key in names.items() if name not in OPTIONAL_FIELDS or key in present}
    if present != (set(names.values()) if manifest.correction is not None else set()):
        raise CheckpointError(
            f"{file.path}: the manifest declares correction {manifest.correction}, found {sorted(present)}."
        )
    if manifest.correction is None:
        return None
    try:
        correction = StepCorrection(**{name: file.read(key) for name, key in names.items()})
    except SpecError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    if tuple(correction.gain.shape) != manifest.correction:
        raise CheckpointError(
            f"{file.path}: the correction has shape {list(correction.gain.shape)}, the manifest declares "
            f"{list(manifest.correction)}."
        )
    if manifest.format_version < 2 and correction.additions:
        raise CheckpointError(
            f"{file.path}: the correction has {correction.additions[0]}, which format version "
            f"{manifest.format_version} does not have; the manifest has been edited."
        )
    return correction


def _rebuilt_pipeline(
    root: Path, manifest: Manifest, model: nn.Module, correction: StepCorrection | None, given: Mapping[str, Any]
) -> Any:
    saved = manifest.pipeline
    for name in given:
        if name not in saved.components:
            raise CheckpointError(
                f"components: the pipeline has no component {name!r}.{nearest(name, saved.components)}"
            )
    parts = {name: _part(root, name, part, given) for name, part in saved.components.items()}
    if saved.library == "diffusers":
        pipe = build_pipeline(saved.class_name, {**parts, manifest.denoiser.name: model}, saved.arguments)
    else:
        pipe = _plain_pipeline(manifest, model, parts)
    if correction is not None:
        try:
            pipe.scheduler = CorrectedScheduler(pipe.scheduler, correction)
        except UnsupportedPipeline as error:
            raise CheckpointError(f"{root}: {error}") from error
    return pipe


def saved_scheduler(folder: Path | str) -> Any:
    """The scheduler of a checkpoint, without its correction and its guard; None if diffusers does not know its class.

    Raises CheckpointError for a damaged folder.
    """
    root = Path(folder)
    check_folder(root)
    identity = read_manifest(root).pipeline.components.get("scheduler")
    if identity is None or identity.library == "plain":
        return None
    return _part(root, "scheduler", identity, {})


def _part(root: Path, name: str, part: ComponentIdentity | None, given: Mapping[str, Any]) -> Any:
    if name in given:
        return given[name]
    if part is None:
        return None
    if part.library == "plain":
        raise CheckpointError(
            f"The pipeline's {name} is a {part.class_name}, which diffusers does not know. Build one and pass it in "
            f"components={{{name!r}: ...}}."
        )
    if not (root / name).is_dir():
        raise CheckpointError(f"{root} lacks the folder {name} of the pipeline's {part.class_name}.")
    value = load_component(root / name, part.library, part.class_name)
    if not isinstance(value, nn.Module) or part.dtype is None or keeps_float32(value):
        return value
    return _cast(value, part.dtype)


def _plain_pipeline(manifest: Manifest, model: nn.Module, parts: Mapping[str, Any]) -> DenoiserPipeline:
    arguments = manifest.pipeline.arguments
    shape, last = arguments.get("sample_shape"), arguments.get("max_timestep")
    if (
        not isinstance(shape, list)
        or len(shape) != 3
        or not all(type(size) is int and size > 0 for size in shape)
        or (last is not None and type(last) is not int)
        or set(parts) != {"scheduler"}
    ):
        raise CheckpointError(f"{MANIFEST_NAME}, pipeline: not the arguments of a DenoiserPipeline: {arguments}.")
    return DenoiserPipeline(model, parts["scheduler"], (shape[0], shape[1], shape[2]), max_timestep=last)
