"""What a run will take, before it starts: for the log and for `--dry-run`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepquant import api
from stepquant.cli.arguments import ready, recorded_images
from stepquant.cli.console import duration
from stepquant.cli.views import bytes_text
from stepquant.config import Resolved
from stepquant.run import Run

__all__ = ["estimate_of", "sentence"]


def estimate_of(pipe: Any, resolved: Resolved, max_memory: int | None, offload: Any = None) -> dict[str, Any] | None:
    """Bytes and seconds as plain data; None for a recipe that records nothing. Samples one image in a few steps.

    offload: as for `Run`; "device_bytes" is only there with it, and "memory_bytes" is then main memory.
    """
    found = api.estimate(
        pipe,
        resolved.recipe,
        steps=resolved.steps,
        run=Run(seed=resolved.seed, max_memory=max_memory, offload=offload),
        arguments=ready(resolved.arguments, recorded_images(resolved) or 1),
        denoiser=resolved.denoiser,
    )
    if found is None:
        return None
    where = {"memory_bytes": found.memory(max_memory)}
    if offload is not None:
        where = {"memory_bytes": found.at_home(max_memory), "device_bytes": found.on_device(max_memory)}
    return {
        **where,
        "disk_bytes": found.disk(max_memory),
        "recording_bytes": found.recording,
        "cache_bytes": found.caches,
        "network_bytes": found.network,
        "seconds": found.seconds,
        "uncounted_stages": list(found.uncounted),
    }


def sentence(found: Mapping[str, Any]) -> str:
    """The estimate in words."""
    memory = f"{bytes_text(found['memory_bytes'])} of memory"
    if "device_bytes" in found:
        memory = (
            f"{bytes_text(found['memory_bytes'])} of main memory and {bytes_text(found['device_bytes'])} on the device"
        )
    text = (
        f"About {memory} beside activations and optimizers, "
        f"{bytes_text(found['disk_bytes'])} of disk, {duration(found['seconds'])}"
    )
    others = ", ".join(found["uncounted_stages"])
    return f"{text} and the time of {others}." if others else f"{text}."
