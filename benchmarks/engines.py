"""What engines gain: one call of a denoiser, every candidate in turn, in one process.

    python benchmarks/engines.py [--networks digits-unet,ddpm-cifar10,dit] [--batch 1,16] [--threads 1] [--rows 1]
                                 [--weights 8] [--candidates ...] [--repeats 10] [--json FILE]

Networks have random weights (digits-unet: the shipped ones), weights rounded to the nearest, ranges by minimum and
maximum over one batch. With `--rows 8` every activation quantizer has eight parameter sets, of slightly different
scales and zero points. Candidates run one after another in every round, in an order that is rotated; the figures are
medians, and ratios are medians of the ratios within a round, to torch's float32. With one thread the time is the
process's CPU time, which other processes do not disturb much; with more it is the wall clock. `relative_error` is that
of one prediction to full precision, `int8_layers` what the engine's graph reports.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CANDIDATES = ("torch-f32", "torch-bf16", "simulated", "openvino-f32", "int8-f32", "int8-bf16", "onednn")


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    results = [
        measure(network, batch, arguments) for network in arguments.networks for batch in map(int, arguments.batch)
    ]
    document = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "openvino", "onnx")},
        "threads": arguments.threads,
        "results": results,
    }
    text = json.dumps(document, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = {"type": lambda text: text.split(",")}
    parser.add_argument("--networks", default=["digits-unet", "ddpm-cifar10", "dit"], **words)
    parser.add_argument("--batch", default=["1", "16"], **words)
    parser.add_argument("--candidates", default=list(CANDIDATES), **words)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--weights", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def network(name: str, batch: int) -> tuple[Any, dict[str, Tensor]]:
    """A denoiser and what to call it with."""
    from diffusers import DiTTransformer2DModel, UNet2DModel

    torch.manual_seed(0)
    timestep = torch.full((batch,), 500)
    if name == "digits-unet":
        from stepquant.api import open_model

        net = open_model("digits-unet").unet.eval()
        return net, {
            "sample": torch.randn(batch, 1, net.config.sample_size, net.config.sample_size),
            "timestep": timestep,
        }
    if name == "ddpm-cifar10":
        net = UNet2DModel(
            sample_size=32,
            layers_per_block=2,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
        ).eval()
        return net, {"sample": torch.randn(batch, 3, 32, 32), "timestep": timestep}
    if name == "dit":
        net = DiTTransformer2DModel(
            num_attention_heads=6, attention_head_dim=64, num_layers=12, sample_size=32, in_channels=4, out_channels=4
        ).eval()
        labels = torch.zeros(batch, dtype=torch.int64)
        return net, {"hidden_states": torch.randn(batch, 4, 32, 32), "timestep": timestep, "class_labels": labels}
    raise SystemExit(f"There is no network {name!r}, only digits-unet, ddpm-cifar10, dit.")


def quantized(net: nn.Module, call: dict[str, Tensor], weights: int, rows: int) -> nn.Module:
    """The network in simulated form, ranges from one call."""
    from stepquant.model.clock import StepClock, attach_clock
    from stepquant.model.layer import QuantizedLayer
    from stepquant.model.quantizer import InputQuantizer, WeightQuantizer
    from stepquant.model.surgery import make_plan, quantizable, quantized_layers, standard_rules, swap_layers_
    from stepquant.numerics.affine import QParams, choose_qparams, range_of
    from stepquant.numerics.spec import scheme_for

    net = copy.deepcopy(net)
    plan = make_plan(net, standard_rules(scheme_for(weights, 8), list(quantizable(net))))
    swap_layers_(net, plan)
    clock = StepClock(torch.linspace(0, 1000, 8)[1:])
    layers = quantized_layers(net)
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _module, args, name=name: seen.__setitem__(name, args[0].detach()))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        net(**call)
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        assert isinstance(layer, QuantizedLayer)
        spec, source = plan[name].weight, plan[name].input
        assert spec is not None
        assert source is not None
        layer.weight_quantizer = WeightQuantizer(spec, choose_qparams(*range_of(layer.weight, spec), spec))
        layer.harden_()
        wider = torch.linspace(1, 1.05, rows)
        table = choose_qparams(seen[name].min() * wider, seen[name].max() * wider, source)
        moved = (table.zero_point + torch.arange(rows) % 2).clamp(source.qmin, source.qmax)
        layer.input_quantizer = InputQuantizer(source, clock, QParams(table.scale, moved), torch.arange(8) % rows)
    attach_clock(net, clock)
    return net.requires_grad_(False).eval()


def candidates(net: nn.Module, simulated: nn.Module, call: dict[str, Tensor], names: list[str]) -> dict[str, Any]:
    """Modules to call, without those that are not there."""
    from stepquant.engines.base import engines, pack_
    from stepquant.engines.openvino import OpenVINOEngine

    found: dict[str, Any] = {}
    for name in names:
        if name == "torch-f32":
            found[name] = net
        elif name == "torch-bf16":
            found[name] = nn.Module.to(copy.deepcopy(net), torch.bfloat16)
        elif name == "simulated":
            found[name] = simulated
        elif name == "openvino-f32":
            found[name] = _openvino_float(net, call)
        elif name.startswith("int8-"):
            found[name] = OpenVINOEngine("bf16" if name == "int8-bf16" else "f32").compile(simulated)
        elif name in engines():
            found[name] = copy.deepcopy(simulated)
            pack_(found[name], name)
        else:
            raise SystemExit(f"There is no candidate {name!r}.")
    return found


def _openvino_float(net: nn.Module, call: dict[str, Tensor]) -> Any:
    """OpenVINO's own conversion of the full-precision network, at this shape."""
    import openvino

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, *values: Tensor) -> Tensor:
            return self.net(**dict(zip(call, values, strict=True)), return_dict=False)[0]

    model = openvino.convert_model(Plain(), example_input=tuple(call.values()))
    model.reshape({port: list(value.shape) for port, value in zip(model.inputs, call.values(), strict=True)})
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run(**arguments: Tensor) -> tuple[Tensor]:
        result = request.infer([value.numpy() for value in arguments.values()], share_inputs=True)
        return (torch.from_numpy(result[0].copy()),)

    return run


def measure(name: str, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    from stepquant.allocator import tune_allocator

    tune_allocator()
    net, call = network(name, batch)
    simulated = quantized(net, call, arguments.weights, arguments.rows)
    modules = candidates(net, simulated, call, arguments.candidates)
    clock: Callable[[], float] = time.process_time if arguments.threads == 1 else time.perf_counter
    halved = {key: value.bfloat16() if value.is_floating_point() else value for key, value in call.items()}
    times: dict[str, list[float]] = {key: [] for key in modules}
    results: dict[str, Tensor] = {}
    names = list(modules)
    with torch.no_grad():
        for number in range(arguments.repeats + 1):
            for key in names[number % len(names) :] + names[: number % len(names)]:
                began = clock()
                output = modules[key](**(halved if key == "torch-bf16" else call))
                if number:  # the first round compiles and warms up
                    times[key].append(clock() - began)
                results[key] = output[0].float() if isinstance(output, tuple) else output.sample.float()
        exact = net(**call).sample
    found: dict[str, Any] = {}
    for key, values in times.items():
        base = times.get("torch-f32", values)
        entry = {
            "milliseconds": round(1000 * statistics.median(values), 2),
            "quartiles": [round(1000 * value, 2) for value in _quartiles(values)],
            "times_torch_f32": round(statistics.median(a / b for a, b in zip(base, values, strict=True)), 2),
            "relative_error": float((results[key] - exact).norm() / exact.norm()),
        }
        precisions = getattr(modules[key], "runtime_precisions", dict)()
        if precisions:
            entry["int8_layers"] = sum(value in ("u8", "i8") for value in precisions.values())
        found[key] = entry
        print(name, batch, key, entry, file=sys.stderr)
    return {
        "network": name, "batch": batch, "rows": arguments.rows, "weights": arguments.weights, "candidates": found
    }  # fmt: skip


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


if __name__ == "__main__":
    main()
