"""How near the int8 graph is to what the machine can do: peaks, floors of networks, achieved fractions, the gap.

    python benchmarks/limits.py [--networks ddpm-cifar10,dit] [--batch 1] [--threads 1] [--weights 8] [--asymmetric]
                                [--precision f32] [--rounds 9] [--json FILE]

    peaks      operations (2 for each multiplication) per second of the fastest matrix product that torch has for int8,
               bfloat16 and float32, over a few shapes; bytes per second of reading and of copying 256 MB.
    floor      the larger of two times: all products at the peak of their type (layers int8, attention in
               `--precision`); and every byte that must move, at the reading rate: weights once, each layer's input as
               int8 and its output in `--precision` once.
    achieved   floor / time of one call of the graph. Peaks and call are timed in turns, and the fraction is the median
               over rounds: on a machine whose cores are shared, the peak itself falls to a half while others compute.
    gap        where a call's time goes: its parts' shares are those of OpenVINO's own (wall) clock. int8 layers beyond
               their floor, attention with what is fused between layers (its own floor included), changes of layout,
               normalisation, the rest.

With one thread times are the process's CPU time, with more the wall clock.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from engines import machine, network, quantized
from torch import Tensor, nn

SHAPES = ((256, 1024, 1024), (1024, 1024, 1024), (1024, 384, 1536))
"""Rows, inputs and outputs of the products whose best is the peak."""

MEGABYTES = 256

KINDS = {
    "Convolution": "layers",
    "FullyConnected": "layers",
    "FullyConnectedQuantizedLegacy": "layers",
    "Subgraph": "attention and fused elementwise operators",
    "MatMul": "attention and fused elementwise operators",
    "Softmax": "attention and fused elementwise operators",
    "Eltwise": "attention and fused elementwise operators",
    "FakeQuantize": "attention and fused elementwise operators",
    "Reorder": "changes of layout and type",
    "Transpose": "changes of layout and type",
    "Convert": "changes of layout and type",
    "Concat": "changes of layout and type",
    "Pad": "changes of layout and type",
    "MVN": "normalisation",
}
"""OpenVINO's node types -> what the report calls them."""


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    document: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "openvino")},
        "threads": arguments.threads,
        "results": [],
    }
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    peaks = Peaks(clock)
    for name in arguments.networks:
        for batch in arguments.batch:
            document["results"].append(measure(name, batch, arguments, peaks, clock))
            print(json.dumps(document["results"][-1]), file=sys.stderr, flush=True)
    document["peaks"] = peaks.summary()
    text = json.dumps(document, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=["ddpm-cifar10", "dit"], type=lambda text: text.split(","))
    parser.add_argument("--batch", default=[1], type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", type=int, default=8)
    parser.add_argument("--asymmetric", action="store_true", help="weights with zero points")
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32", help="of what is not int8")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Peaks:
    """The fastest products and the memory. rounds: type -> one figure of every round, operations or bytes a second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.rounds: dict[str, list[float]] = {}
        self._products = [(2.0 * m * k * n, _products(m, k, n)) for m, k, n in SHAPES]
        self._source = torch.ones(MEGABYTES << 18)
        self._target = torch.empty_like(self._source)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """One round."""
        found: dict[str, float] = {}
        for operations, products in self._products:
            for kind, run in products.items():
                found[kind] = max(found.get(kind, 0.0), operations / self._least(run, 8))
        size = self._source.numel() * 4
        found["read"] = size / self._least(self._source.sum, 2)
        found["copy"] = 2 * size / self._least(lambda: self._target.copy_(self._source), 2)
        for kind, figure in found.items():
            self.rounds.setdefault(kind, []).append(figure)
        return found

    def _least(self, run: Callable[[], Any], repeats: int) -> float:
        times = []
        for _ in range(repeats):
            began = self.clock()
            run()
            times.append(self.clock() - began)
        return max(min(times), 1e-9)

    def summary(self) -> dict[str, Any]:
        """In 1e9 operations or bytes a second."""
        return {
            kind: {"best": round(max(values) / 1e9, 1), "median": round(statistics.median(values) / 1e9, 1)}
            for kind, values in self.rounds.items()
        }


def _products(m: int, k: int, n: int) -> dict[str, Callable[[], Any]]:
    """The product `[m, k] @ [k, n]` in every type."""
    x, w = torch.randn(m, k), torch.randn(n, k)
    short_x, short_w = x.bfloat16(), w.bfloat16()
    levels = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8).t()
    # oneDNN's own float32 product, where torch has it under this private name: F.linear may go to a slower library.
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return {
        "int8": lambda: torch._int_mm(levels, weight),
        "bf16": lambda: F.linear(short_x, short_w),
        "f32": lambda: F.linear(x, w) if onednn is None else onednn(x, w, None, "none", [], ""),
    }


def work(net: nn.Module, call: dict[str, Tensor], precision: str) -> dict[str, float]:
    """Operations of a call's layers and of its other products (attention), and the bytes that must move for layers."""
    from stepquant.model.families import make_attention_explicit_
    from stepquant.model.layer import Matmul
    from stepquant.model.surgery import quantizable

    net = copy.deepcopy(net)
    make_attention_explicit_(net)
    found = {"layers": 0.0, "attention": 0.0, "bytes": 0.0}
    wide = 2 if precision == "bf16" else 4

    def count(module: Any, args: Any, output: Tensor) -> None:
        if isinstance(module, Matmul):
            found["attention"] += 2.0 * output.numel() * args[0].shape[-1]
            return
        found["layers"] += 2.0 * output.numel() * module.weight[0].numel()
        found["bytes"] += module.weight.numel() + args[0].numel() + wide * output.numel()

    for module in quantizable(net).values():
        module.register_forward_hook(count)
    with torch.no_grad():
        net(**call)
    return found


def measure(
    name: str, batch: int, arguments: argparse.Namespace, peaks: Peaks, clock: Callable[[], float]
) -> dict[str, Any]:
    from stepquant.allocator import tune_allocator

    tune_allocator()
    net, call = network(name, batch)
    simulated = quantized(net, call, arguments.weights, 1, asymmetric=arguments.asymmetric)
    counted = work(net, call, arguments.precision)
    run, request = _compiled(simulated, call, arguments.precision)
    fractions, times, floors, shares = [], [], [], []
    for number in range(arguments.rounds + 1):
        rates = peaks.measure()
        began = clock()
        run()
        taken = clock() - began
        if number == 0:
            continue
        layers = counted["layers"] / rates["int8"]
        floor = max(layers + counted["attention"] / rates[arguments.precision], counted["bytes"] / rates["read"])
        times.append(taken)
        floors.append(floor)
        fractions.append(floor / taken)
        shares.append(_gap(request, layers, taken))
    return {
        "network": name,
        "batch": batch,
        "weights": arguments.weights,
        "asymmetric": arguments.asymmetric,
        "precision": arguments.precision,
        "gigaoperations": {kind: round(counted[kind] / 1e9, 2) for kind in ("layers", "attention")},
        "megabytes": round(counted["bytes"] / 1e6, 1),
        "milliseconds": round(1e3 * statistics.median(times), 2),
        "floor_milliseconds": round(1e3 * statistics.median(floors), 2),
        "achieved": round(statistics.median(fractions), 3),
        "gap_milliseconds": {
            kind: round(1e3 * statistics.median(share.get(kind, 0.0) for share in shares), 2)
            for kind in sorted({kind for share in shares for kind in share})
        },
    }


def _compiled(simulated: nn.Module, call: dict[str, Tensor], precision: Any) -> tuple[Callable[[], None], Any]:
    """The engine's graph at this shape, as something to run, and its request, with OpenVINO's clocks on."""
    from stepquant.engines import openvino as engine

    engine._core().set_property("CPU", {"PERF_COUNT": True})
    denoiser = engine.OpenVINOEngine(precision).compile(simulated)

    def run() -> None:
        with torch.no_grad():
            denoiser(**call)

    run()
    (graph,) = denoiser._compiled.values()
    return run, graph.request


def _gap(request: Any, layers_floor: float, taken: float) -> dict[str, float]:
    """Seconds of the last call, which took `taken`, by kind of work; those of layers less their floor."""
    found: dict[str, float] = {}
    for node in request.get_profiling_info():
        kind = KINDS.get(node.node_type, "other")
        found[kind] = found.get(kind, 0.0) + node.real_time.total_seconds()
    share = taken / sum(found.values())
    found = {kind: share * seconds for kind, seconds in found.items()}
    return {"layers beyond their floor": found.pop("layers", 0.0) - layers_floor, **found}


if __name__ == "__main__":
    main()
