"""The model card of a checkpoint: `README.md` with the metadata that the Hugging Face hub reads, and what was measured.

Everything comes from the checkpoint and from the evaluation beside it. Paths of the machine that made it are left out:
a card is for publishing.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from stepquant.report.comparable import reference_words

__all__ = ["card_of", "hub_id"]

_NAMES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "mae": "mean absolute error of pixels in [0, 1]",
    "lpips": "LPIPS",
    "clip_score": "CLIP score",
    "frechet_to_fp": "Fréchet distance to full precision",
    "frechet_to_data": "Fréchet distance to real data",
    "sfid_to_fp": "sFID to full precision",
    "kid_to_fp": "KID to full precision",
    "drift_final": "RMS distance of the last sample from full precision's",
    "cosine_final": "cosine between the last sample and full precision's",
}
"""Metrics whose key does not read as a name."""

_SHOWN = {"value", "low", "high", "unit", "reference_value"}

_CARD = """# {name}

{sentence}

## Use

```python
{code}
```

{remarks}

## Measured

{measured}

## Made

{made}
"""


def card_of(
    description: Mapping[str, Any],
    *,
    name: str,
    identity: str,
    results: Mapping[str, Any] | None = None,
    license: str | None = None,
    base_model: str | None = None,
    bibtex: str = "",
) -> str:
    """The text of a card.

    description: what `inspect_checkpoint` says. name: of the model, its title. identity: SHA-256 of the manifest,
        which holds those of all tensors.
    results: an evaluation of schema 1, None if there is none. license: identifier of the hub, such as "apache-2.0".
    base_model: id of the full-precision model on the hub, None if it has none.
    bibtex: of the method.
    """
    text = _CARD.format(
        name=name,
        sentence=_sentence(description, base_model),
        code=_code(description),
        remarks=_remarks(description, license),
        measured=_measured(results),
        made=_made(description, identity, bibtex),
    )
    return f"---\n{_metadata(description, base_model, license)}\n---\n\n{text}"


def hub_id(text: Any) -> str | None:
    """The text if it has the form of an id on the hub, owner/name; paths and shipped models are none."""
    found = isinstance(text, str) and re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", text)
    return str(text) if found else None


def _metadata(description: Mapping[str, Any], base: str | None, license: str | None) -> str:
    from huggingface_hub import ModelCardData

    pipeline = description["manifest"]["pipeline"]
    diffusers = pipeline["library"] == "diffusers"
    data = ModelCardData(
        base_model=base,
        library_name="diffusers" if diffusers else "stepquant",
        license=license,
        pipeline_tag=_task(description["manifest"]),
        tags=["stepquant", "quantized", "post-training-quantization", *(["diffusers"] if diffusers else [])],
        base_model_relation=None if base is None else "quantized",
    )
    return str(data.to_yaml())


def _task(manifest: Mapping[str, Any]) -> str | None:
    """The hub's word for what the pipeline does, where its parts tell."""
    components, name = manifest["pipeline"]["components"], manifest["pipeline"]["class_name"]
    if "Img2Img" in name or "Inpaint" in name:
        return "image-to-image"
    if any(part.startswith("tokenizer") for part in components):
        return "text-to-video" if "3D" in manifest["denoiser"]["class_name"] else "text-to-image"
    return "unconditional-image-generation" if name in ("DDIMPipeline", "DDPMPipeline", "LDMPipeline") else None


def _sentence(description: Mapping[str, Any], base: str | None) -> str:
    manifest = description["manifest"]
    made_of = base or PurePath(str(description.get("base_model") or "a model that the checkpoint does not name")).name
    of = f"[{made_of}](https://huggingface.co/{made_of})" if base else made_of
    return (
        f"`{manifest['pipeline']['class_name']}` of {of} with its {manifest['denoiser']['name']} quantized by "
        f"stepquant {description['stepquant']} after training: {_bits(description['layers'])}. "
        f"{description['bytes']:,} bytes in all files; the network's file is {description['ratio']:.3f} of its size in "
        "float32."
    )


def _bits(layers: Iterable[Mapping[str, Any]]) -> str:
    """`"20 layers W4 A8, 3 layers W8 A8"`, most layers first."""
    counts = Counter(_bits_of(layer["bits"]) for layer in layers)
    return ", ".join(f"{count} layer{'s' * (count > 1)} {bits}" for bits, count in counts.most_common())


def _bits_of(bits: Mapping[str, Any]) -> str:
    letters = (("weight", "W"), ("input", "A"), ("second", "A"))
    return " ".join(f"{letter}{bits[key]}" for key, letter in letters if bits.get(key) is not None) or "float"


def _code(description: Mapping[str, Any]) -> str:
    manifest, steps = description["manifest"], _steps(description)
    lines = ["import stepquant  # pip install stepquant"]
    if manifest["pipeline"]["library"] == "diffusers" and manifest.get("correction") is None:
        lines += [
            "from diffusers import DiffusionPipeline",
            "",
            'pipe = DiffusionPipeline.from_pretrained("OWNER/NAME")',
        ]
    elif manifest["pipeline"]["library"] == "diffusers":
        lines += [
            "from huggingface_hub import snapshot_download",
            "",
            'pipe = stepquant.load(snapshot_download("OWNER/NAME"))',
        ]
    else:
        lines += [
            "from huggingface_hub import snapshot_download",
            "",
            'pipe = stepquant.load(snapshot_download("OWNER/NAME"), denoiser=...)  # the float module, of its class',
        ]
    task = _task(manifest) or ""
    given = '"a photo of a lighthouse", ' if task.startswith("text-to") else ""
    if manifest["pipeline"]["class_name"] == "DiTPipeline" or manifest["denoiser"]["config"].get("num_class_embeds"):
        given = "class_labels=[0], "
    return "\n".join([*lines, f"images = pipe({given}num_inference_steps={steps})"])


def _steps(description: Mapping[str, Any]) -> Any:
    return (description.get("schedule") or {}).get("steps", 20)


def _remarks(description: Mapping[str, Any], license: str | None) -> str:
    schedule = description.get("schedule") or {}
    lines = []
    if schedule:
        lines.append(
            f"Calibrated for {schedule['steps']} steps of `{schedule['scheduler']}`, guidance {schedule['guidance']}. "
            "Sample with the same; `stepquant.load` refuses other steps."
        )
    if description["manifest"].get("correction") is not None:
        lines.append("It has a correction of the sampling steps, which `from_pretrained` would drop and so refuses.")
    lines.append(
        "`stepquant.load` runs it as one int8 graph where processor and checkpoint allow that, else in simulated "
        "arithmetic, as `from_pretrained` does: see stepquant's docs/engines.md."
    )
    if license is None:
        lines.append("License: that of the full-precision model.")
    return "\n".join(f"- {line}" for line in lines)


def _measured(results: Mapping[str, Any] | None) -> str:
    if results is None:
        return "Nothing has been measured yet: `stepquant evaluate CHECKPOINT`, and make the card again."
    # null stands for a figure that was not finite.
    figures = {
        key: entry
        for key, entry in results["metrics"].items()
        if isinstance(entry, Mapping) and entry.get("value") is not None
    }
    words = reference_words(results)
    exact = " in full precision" if words == "full precision" else ""
    lines = [
        f"Against {_public(str(results['against']))}{exact} at equal seeds: {results['n']} images, seeds "
        f"{_seeds(results['seeds'])}, {results['steps']} steps of {results['scheduler']}.",
        "",
        "| metric | value | 95 % interval | remarks |",
        "|---|---|---|---|",
        *(_row(key, entry, words) for key, entry in figures.items()),
        "",
    ]
    if results.get("features"):
        lines.append(f"Distances of distributions use the features of {results['features']}.")
    lines += [f"{note}" for note in results.get("notes", ())]
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    lines += ["", f"`{_public_command(str(results['command']))}`, {results['date']}, {versions}, {results['machine']}."]
    return "\n".join(lines)


def _row(key: str, entry: Mapping[str, Any], words: str) -> str:
    """words: what the reference is called."""
    value = f"{_number(entry['value'])} {entry.get('unit', '')}".strip()
    low, high = entry.get("low"), entry.get("high")
    interval = "" if low is None or high is None else f"{_number(low)} to {_number(high)}"
    remarks = [f"{name.replace('_', ' ')} {_number(found)}" for name, found in entry.items() if _is_remark(name, found)]
    if entry.get("reference_value") is not None:
        remarks.insert(0, f"{words} {_number(entry['reference_value'])}")
    name = _NAMES.get(key, key.replace("_", " ")).replace("full precision", words)
    return f"| {name} | {value} | {interval} | {', '.join(remarks)} |"


def _is_remark(name: str, value: Any) -> bool:
    return name not in _SHOWN and isinstance(value, int | float | str) and not isinstance(value, bool)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _seeds(seeds: Any) -> str:
    """Both ends, as an evaluation has them."""
    return f"{seeds[0]} to {seeds[-1]}" if isinstance(seeds, list) and seeds else str(seeds)


def _public(text: str) -> str:
    """A hub id or a shipped model as it is; of a path only the name."""
    return text if hub_id(text) and not text.startswith((".", "~")) else PurePath(text).name or text


def _public_command(command: str) -> str:
    """The command without the folders of this machine: of every path, only its name."""
    words = []
    for word in shlex.split(command):
        key, equals, value = word.rpartition("=")
        path = value.lstrip("@")
        # A relative path of two names looks like a hub id; a name alone does no harm either.
        shown = PurePath(path).name if path.startswith(("/", "~", "./", "../")) or path.count("/") > 1 else value
        words.append(f"{key}{equals}{shown}")
    return shlex.join(words)


def _made(description: Mapping[str, Any], identity: str, bibtex: str) -> str:
    manifest = description["manifest"]
    recipe, run = manifest.get("recipe") or {}, manifest.get("run") or {}
    stages = [str(stage.get("stage")) for stage in recipe.get("stages", []) if isinstance(stage, Mapping)]
    lines = [f"- method: {recipe.get('name', 'not known')}"]
    if stages:
        lines.append(f"- stages: {', '.join(stages)}")
    if "seed" in run:
        lines.append(f"- seed: {run['seed']}")
    lines += [
        f"- date: {description['created']}",
        f"- versions: stepquant {description['stepquant']}, torch {description['torch']}, "
        f"diffusers {description['diffusers']}",
        f"- SHA-256 of `stepquant.json`, which holds those of all tensors: `{identity}`",
    ]
    if bibtex:
        lines += ["", "```bibtex", bibtex.strip(), "```"]
    return "\n".join(lines)
