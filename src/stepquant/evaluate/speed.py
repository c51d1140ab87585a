"""How long one call of a quantized denoiser takes by each engine, beside full precision in the same rounds."""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.api import sample
from stepquant.engines.base import choose, engines, with_precision
from stepquant.errors import EngineError, EvaluationError
from stepquant.model.families import find_denoiser, several_denoisers
from stepquant.model.surgery import quantized_layers
from stepquant.run import Progress, SilentProgress

__all__ = ["first_call", "measure_speed"]

_WARM = 2
"""Calls before the first round: the first makes a graph."""


class _Captured(BaseException):
    """Ends a sampling at its first call; no Exception, which pipelines might catch."""


def first_call(
    pipe: Any, *, steps: int, arguments: Mapping[str, Any], seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the pipeline hands its denoiser at the first step of one image, positional and by name."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def capture(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Captured

    _, denoiser = find_denoiser(pipe)
    handle = denoiser.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        sample(pipe, seeds=[seed], steps=steps, arguments=dict(arguments))
    except _Captured:
        pass
    finally:
        handle.remove()
    if not found:
        raise EvaluationError(f"{type(pipe).__name__} did not call its denoiser: there is nothing to time.")
    return found[0]


@torch.no_grad()
def measure_speed(
    reference: Any,
    load: Callable[[str], Any],
    *,
    steps: int,
    arguments: Mapping[str, Any] | None = None,
    rounds: int = 9,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time of one call of the denoiser, one image, by every engine that takes a layer of it.

    reference: the full-precision pipeline. load: opens the checkpoint with an engine; called for one engine after the
    other, so that two denoisers are in memory at a time. In each of `rounds` both are called once, and a ratio is of
    these two: above 1 the engine is faster than full precision. Wall clock.

    Returns `engines` (name -> milliseconds, reference_milliseconds, ratio, all medians, and the quartiles low and high
    of the ratio; or `failed`, why there is no figure), machine, threads, device and date. Raises EvaluationError for a
    pipeline with several denoisers.
    """
    if several_denoisers(reference):
        raise EvaluationError(
            f"{type(reference).__name__} switches between several denoisers: the time of one call says little."
        )
    args, kwargs = first_call(reference, steps=steps, arguments=arguments or {})
    _, exact = find_denoiser(reference)
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    names = _timed(find_denoiser(load("simulated"))[1], device)
    found: dict[str, Any] = {}
    with (progress or SilentProgress()).track("Timing engines", len(names)) as advance:
        for name in names:
            try:
                found[name] = _beside(exact, find_denoiser(load(name))[1], args, kwargs, device, rounds)
            except EngineError as error:
                found[name] = {"failed": str(error)}
            advance(1)
    return {
        "schema": 1,
        "engines": found,
        "rounds": rounds,
        "device": str(device),
        "machine": _machine(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _timed(denoiser: nn.Module, device: torch.device) -> list[str]:
    """The names of "simulated" and of the engines that run a layer of this denoiser on the device."""
    layers = quantized_layers(denoiser).values()
    names = [
        name
        for name in engines()
        if name == "simulated" or any(name not in choose(layer, device).refusals for layer in layers)
    ]
    short = with_precision("openvino")
    if "openvino" in names and short != "openvino":
        names.insert(names.index("openvino") + 1, short)
    return names


def _beside(
    exact: nn.Module,
    denoiser: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    device: torch.device,
    rounds: int,
) -> dict[str, float]:
    pair = exact, denoiser
    for _ in range(_WARM):
        for module in pair:
            module(*args, **kwargs)
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for module, taken in zip(pair, times, strict=True):
            _wait(device)
            began = time.perf_counter()
            module(*args, **kwargs)
            _wait(device)
            taken.append(time.perf_counter() - began)
    ratios = [slow / fast for slow, fast in zip(*times, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    return {
        "milliseconds": 1e3 * statistics.median(times[1]),
        "reference_milliseconds": 1e3 * statistics.median(times[0]),
        "ratio": ratio,
        "low": low,
        "high": high,
    }


def _machine(device: torch.device) -> str:
    """What computes, as it calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
