"""What engines gain: one call of a denoiser, every candidate in turn, in one process.

    python benchmarks/engines.py [--networks digits-unet,ddpm-cifar10,dit,sd,faces64] [--batch 1,16] [--threads 1]
                                 [--rows 1] [--weights 8] [--asymmetric] [--attention] [--candidates ...] [--peers ...]
                                 [--steps 0] [--repeats 10] [--json FILE] [--keep ROWS] [--table PAGE]

Networks have random weights (digits-unet: the shipped ones; faces64: those of `../shared`), weights rounded to the
nearest, ranges by minimum and maximum over one batch. With `--rows 8` every activation quantizer has eight parameter
sets, of slightly different scales and zero points. `--asymmetric` takes weights with zero points: those of
8 bits need nine in a graph. `--attention` quantizes the matmuls of attention, too. Candidates run one after another in
every round, in an order that is rotated; the figures are medians, and ratios are medians of the ratios within a round,
to torch's float32. With one thread the time is the process's CPU time, which other processes do not disturb much; with
more it is the wall clock. `int8_peak` is what an int8 matrix product reaches in the same rounds, in 1e9 operations a
second: where another core of the same machine computes, it may fall to a half, and int8 candidates with it, while
torch's float32 does not. `relative_error` is that of one prediction to full precision, `int8_layers` what the engine's
graph reports. `--steps N` also times a whole sampling of N steps, in ratio to N calls.

`--keep ROWS` appends what was measured of each network and batch to a file, as soon as it is; a line that is there
already is not measured again. `--table PAGE` measures nothing and puts those rows into a page.

`int8-bf16-inside` is `int8-bf16` with the zero points of activations left inside its operators.

`--peers` adds other packages' candidates: nncf (post-training int8 in OpenVINO), ort-f32, ort-int8 (ONNX Runtime
and its own static quantization), torchao (dynamic int8), quanto (int8 weights and activations). Each needs its package.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

CANDIDATES = (
    "torch-f32", "torch-bf16", "simulated", "openvino-f32", "openvino-bf16", "int8-f32", "int8-bf16", "onednn"
)  # fmt: skip
"""Others are torch-compile-bf16, which needs a C++ compiler, and int8-bf16-inside."""

PEERS = {
    "nncf": "nncf",
    "ort-f32": "onnxruntime",
    "ort-int8": "onnxruntime",
    "torchao": "torchao",
    "quanto": "optimum-quanto",
}
"""Candidate -> what pip installs for it."""

NETWORKS = ("digits-unet", "ddpm-cifar10", "dit", "sd", "faces64")


def main() -> None:
    arguments = _arguments()
    if arguments.table is not None:
        write_table(arguments.keep, arguments.table)
        return
    torch.set_num_threads(arguments.threads)
    header = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "openvino", *_peers(arguments.peers))},
        "threads": arguments.threads,
    }
    results = []
    for name in arguments.networks:
        for batch in map(int, arguments.batch):
            asked = setting(name, batch, arguments)
            if asked in map(setting_of, kept(arguments.keep)):
                continue
            found = measure(name, batch, arguments)
            results.append(found)
            if arguments.keep is not None:
                with arguments.keep.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(header | found) + "\n")
    document = header | {"results": results}
    text = json.dumps(document, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


def _peers(names: list[str]) -> list[str]:
    """The packages behind these candidates."""
    return list(dict.fromkeys(PEERS[name] for name in names))


SETTING = ("machine", "network", "batch", "threads", "rows", "weights", "asymmetric", "attention", "steps")
"""What a row is of, beside its candidates."""


def setting(name: str, batch: int, arguments: argparse.Namespace) -> tuple[Any, ...]:
    """What will be measured, and by which candidates."""
    own = {**vars(arguments), "machine": machine(), "network": name, "batch": batch}
    return (*(own[key] for key in SETTING), frozenset([*arguments.candidates, *arguments.peers]))


def setting_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return (*(row[key] for key in SETTING), frozenset(row["candidates"]))


def kept(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ENTRIES = (
    "torch-f32", "torch-bf16", "torch-compile-bf16", "openvino-f32", "openvino-bf16", "nncf", "ort-f32", "ort-int8",
    "torchao", "quanto", "simulated", "onednn", "int8-bf16-inside", "int8-f32", "int8-bf16",
)  # fmt: skip
"""Columns of the table, ours last."""


def write_table(rows: Path | None, page: Path) -> None:
    """Ratios to torch's float32 and errors of all kept rows, between the markers of a page."""
    from results import put

    found = kept(rows)
    if not found:
        raise SystemExit(f"--keep {rows} has no rows: measure some with it first.")
    found.sort(
        key=lambda row: (row["threads"], NETWORKS.index(row["network"]), row["batch"], -row["weights"], row["rows"])
    )
    lines = []
    for where in sorted({(row["machine"], row["date"], row["threads"]) for row in found}, key=str):
        own = [row for row in found if (row["machine"], row["date"], row["threads"]) == where]
        names = [name for name in ENTRIES if any(name in row["candidates"] for row in own)]
        known = {name: text for row in own for name, text in row["versions"].items()}
        versions = ", ".join(f"{name} {text}" for name, text in known.items())
        threads = "1 thread, CPU time" if where[2] == 1 else f"{where[2]} threads, wall clock"
        lines += [f"{where[0]}; {threads}; {versions}; {where[1]}.", ""]
        lines += [f"| network | batch | bits | rows | torch-f32 ms | {' | '.join(names[1:])} | int8 peak |"]
        lines += ["|" + "---|" * (len(names) + 5)]
        lines += [_line(row, names, _ratio) + f" {row['int8_peak']} |" for row in own]
        lines += ["", "Relative error of one prediction to full precision, in per cent:", ""]
        errors = [name for name in names if name in LOSSY]
        lines += [f"| network | batch | bits | rows | {' | '.join(errors)} |", "|" + "---|" * (len(errors) + 4)]
        lines += [_line(row, ["", *errors], _error) for row in own if row["batch"] == 1 and not row["steps"]]
        lines += [""]
    put(page, "\n".join(lines).rstrip(), "<!-- table engines -->", "<!-- /table engines -->")


LOSSY = ("nncf", "ort-int8", "torchao", "quanto", "simulated", "int8-bf16-inside", "int8-f32", "int8-bf16")


def _line(row: dict[str, Any], names: list[str], cell: Callable[[dict[str, Any], str], str]) -> str:
    key = "sampling_milliseconds" if row["steps"] else "milliseconds"
    first = row["candidates"].get("torch-f32", {}).get(key, "")
    bits = f"W{row['weights']}A8" + (", attention" if row["attention"] else "")
    bits += f", {row['steps']} steps" if row["steps"] else ""
    cells = [cell(row, name) if name in row["candidates"] else "" for name in names[1:]]
    head = [row["network"], row["batch"], bits, row["rows"], *([first] if names[0] else [])]
    return "| " + " | ".join(map(str, [*head, *cells])) + " |"


def _ratio(row: dict[str, Any], name: str) -> str:
    """Of a whole sampling, if that was measured."""
    own, base = (row["candidates"].get(one, {}) for one in (name, "torch-f32"))
    if row["steps"]:
        return f"{base['sampling_milliseconds'] / own['sampling_milliseconds']:.2f}"
    return f"{own['times_torch_f32']:.2f}"


def _error(row: dict[str, Any], name: str) -> str:
    return f"{100 * row['candidates'][name]['relative_error']:.1f}"


def machine() -> str:
    """The processor, and the instructions that decide here."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return f"{platform.system()} {platform.machine()}"
    found = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in found.items()}
    flags = [
        flag for flag in fields.get("flags", "").split() if flag.endswith(("vnni", "bf16", "amx_int8", "amx_tile"))
    ]
    name = fields.get("model name", platform.machine())
    return f"{name} ({', '.join(flags) or 'no VNNI'}), {platform.system()} {platform.machine()}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = {"type": lambda text: text.split(",")}
    parser.add_argument("--networks", default=["digits-unet", "ddpm-cifar10", "dit"], **words)
    parser.add_argument("--batch", default=["1", "16"], **words)
    parser.add_argument("--candidates", default=list(CANDIDATES), **words)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--weights", type=int, default=8)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--peers", default=[], **words)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="file of rows to append to")
    parser.add_argument("--table", type=Path, help="page to put the rows of --keep into")
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
            "class_labels": torch.arange(batch) % net.config.num_class_embeds,
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
    if name == "sd":
        from diffusers import UNet2DConditionModel

        net = UNet2DConditionModel(
            sample_size=32,
            layers_per_block=1,
            block_out_channels=(128, 256, 512),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=512,
            attention_head_dim=8,
        ).eval()
        states = torch.randn(batch, 77, 512)
        return net, {"sample": torch.randn(batch, 4, 32, 32), "timestep": timestep, "encoder_hidden_states": states}
    if name == "faces64":
        from faces64_model import WEIGHTS, load_faces64

        if not WEIGHTS.is_file():
            raise SystemExit(f"faces64 needs {WEIGHTS}: leave it out of --networks.")
        return load_faces64(), {"sample": torch.randn(batch, 3, 64, 64), "timestep": timestep.clamp(max=150)}
    raise SystemExit(f"There is no network {name!r}, only {', '.join(NETWORKS)}.")


def quantized(
    net: nn.Module,
    call: dict[str, Tensor],
    weights: int,
    rows: int,
    *,
    asymmetric: bool = False,
    attention: bool = False,
) -> nn.Module:
    """The network in simulated form, ranges from one call. The matmuls of attention only with `attention`."""
    from stepquant.model.clock import StepClock, attach_clock
    from stepquant.model.families import make_attention_explicit_
    from stepquant.model.quantizer import InputQuantizer, WeightQuantizer
    from stepquant.model.surgery import (
        make_plan,
        operand_specs,
        quantizable,
        quantized_layers,
        standard_rules,
        swap_layers_,
    )
    from stepquant.numerics.affine import QParams, choose_qparams, range_of
    from stepquant.numerics.spec import scheme_for

    net = copy.deepcopy(net)
    if attention:
        make_attention_explicit_(net)
    scheme = scheme_for(weights, 8)
    if asymmetric:
        scheme = replace(scheme, weight=replace(scheme.weight, symmetric=False))
    plan = make_plan(net, standard_rules(scheme, list(quantizable(net))))
    if not attention:
        plan = {name: layer for name, layer in plan.items() if layer.weight is not None}
    swap_layers_(net, plan)
    clock = StepClock(torch.linspace(0, 1000, 8)[1:])
    layers = quantized_layers(net)
    seen: dict[str, tuple[Tensor, ...]] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _module, args, name=name: seen.__setitem__(name, args))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        net(**call)
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        spec = plan[name].weight
        if spec is not None:
            layer.weight_quantizer = WeightQuantizer(spec, choose_qparams(*range_of(layer.weight, spec), spec))
            layer.harden_()
        for x, (attribute, source) in zip(seen[name], operand_specs(plan[name]), strict=True):
            wider = torch.linspace(1, 1.05, rows)
            table = choose_qparams(x.min() * wider, x.max() * wider, source)
            moved = table.zero_point
            if not source.symmetric and not source.nonnegative:
                moved = (moved + torch.arange(rows) % 2).clamp(source.qmin, source.qmax)
            quantizer = InputQuantizer(source, clock, QParams(table.scale, moved), torch.arange(8) % rows)
            setattr(layer, attribute, quantizer)
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
        elif name == "torch-compile-bf16":
            found[name] = torch.compile(nn.Module.to(copy.deepcopy(net), torch.bfloat16))
        elif name.startswith("openvino-"):
            found[name] = _openvino_request(_converted(net, call), call, name.removeprefix("openvino-"))
        elif name in PEERS:
            found[name] = _peer(name, net, call)
        elif name == "int8-bf16-inside":
            found[name] = _zero_points_inside(OpenVINOEngine("bf16").compile(simulated))
        elif name.startswith("int8-"):
            found[name] = OpenVINOEngine("bf16" if name == "int8-bf16" else "f32").compile(simulated)
        elif name in engines():
            found[name] = copy.deepcopy(simulated)
            pack_(found[name], name)
        else:
            raise SystemExit(f"There is no candidate {name!r}.")
    return found


def _zero_points_inside(module: nn.Module) -> Callable[..., Any]:
    """The graph as it was before zero points were taken out of its operators."""
    from stepquant.engines import openvino

    def run(**call: Tensor) -> Any:
        with mock.patch.object(openvino, "take_zero_points_", return_value={}):
            return module(**call)

    return run


class _Plain(nn.Module):
    """The network as a function of tensors."""

    def __init__(self, net: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.net, self.names = net, names
        self.eval()  # torch's exporter puts what it was given back into the mode that it was in, the network with it

    def forward(self, *values: Tensor) -> Tensor:
        return _first(self.net(**dict(zip(self.names, values, strict=True))))


def _first(output: Any) -> Tensor:
    """The prediction of a network of diffusers, or of a plain one."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def _converted(net: nn.Module, call: dict[str, Tensor]) -> Any:
    """OpenVINO's own conversion of the full-precision network, at this shape."""
    import openvino

    model = openvino.convert_model(_Plain(net, tuple(call)), example_input=tuple(call.values()))
    model.reshape({port: list(value.shape) for port, value in zip(model.inputs, call.values(), strict=True)})
    return model


def _openvino_request(model: Any, call: dict[str, Tensor], precision: str) -> Any:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run(**arguments: Tensor) -> tuple[Tensor]:
        result = request.infer([arguments[name].numpy() for name in call], share_inputs=True)
        return (torch.from_numpy(result[0].copy()),)

    return run


def _peer(name: str, net: nn.Module, call: dict[str, Tensor]) -> Any:
    """Another package's form of the network, calibrated by itself on the one batch that our ranges come from."""
    try:
        if name == "nncf":
            import nncf

            model = _converted(net, call)
            data = nncf.Dataset([[value.numpy() for value in call.values()]])
            return _openvino_request(nncf.quantize(model, data, subset_size=1), call, "f32")
        if name.startswith("ort-"):
            return _onnxruntime(net, call, int8=name == "ort-int8")
        changed = copy.deepcopy(net)
        if name == "torchao":
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(changed, Int8DynamicActivationInt8WeightConfig())
            return changed
        from optimum.quanto import Calibration, freeze, qint8, quantize

        quantize(changed, weights=qint8, activations=qint8)
        with torch.no_grad(), Calibration():
            changed(**call)
        freeze(changed)
        return changed
    except ImportError as error:
        raise SystemExit(
            f"The candidate {name!r} needs another package: pip install {PEERS[name]} ({error})"
        ) from error


def _onnxruntime(net: nn.Module, call: dict[str, Tensor], *, int8: bool) -> Any:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Once(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: list[Any] = [{key: value.numpy() for key, value in call.items()}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    with tempfile.TemporaryDirectory(prefix="stepquant-") as folder:
        path = Path(folder) / "plain.onnx"
        with torch.no_grad():
            torch.onnx.export(
                _Plain(net, tuple(call)),
                tuple(call.values()),
                str(path),
                dynamo=False,
                opset_version=18,
                input_names=list(call),
            )
        if int8:
            quantize_static(str(path), str(path.with_name("int8.onnx")), Once(), per_channel=True)
            path = path.with_name("int8.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait by spinning would count as work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    taken = {port.name for port in session.get_inputs()}

    def run(**arguments: Tensor) -> tuple[Tensor]:
        values = {name: value.numpy() for name, value in arguments.items() if name in taken}
        return (torch.from_numpy(session.run(None, values)[0]),)

    return run


def _sampled(module: Any, call: dict[str, Tensor], steps: int, dtype: torch.dtype) -> None:
    """A whole sampling by DDIM, from the call's first argument."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=300)
    scheduler.set_timesteps(steps)
    first, *_ = call
    state = call[first]
    for timestep in scheduler.timesteps:
        now = {**call, first: state.to(dtype), "timestep": torch.full_like(call["timestep"], int(timestep))}
        prediction = _first(module(**now)).float()
        state = scheduler.step(prediction[:, : state.shape[1]], timestep, state).prev_sample


def measure(name: str, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    from stepquant.allocator import tune_allocator

    tune_allocator()
    net, call = network(name, batch)
    simulated = quantized(
        net, call, arguments.weights, arguments.rows, asymmetric=arguments.asymmetric, attention=arguments.attention
    )
    modules = candidates(net, simulated, call, [*arguments.candidates, *arguments.peers])
    clock: Callable[[], float] = time.process_time if arguments.threads == 1 else time.perf_counter
    halved = {key: value.bfloat16() if value.is_floating_point() else value for key, value in call.items()}
    times: dict[str, list[float]] = {key: [] for key in modules}
    samplings: dict[str, list[float]] = {key: [] for key in modules}
    peak: list[float] = []
    results: dict[str, Tensor] = {}
    names = list(modules)
    left, right = (torch.randint(-128, 128, (1024, 1024), dtype=torch.int8) for _ in range(2))
    with torch.no_grad():
        for number in range(arguments.repeats + 1):
            for key in names[number % len(names) :] + names[: number % len(names)]:
                short = key in ("torch-bf16", "torch-compile-bf16")
                taken, output = _timed(clock, lambda key=key, short=short: modules[key](**(halved if short else call)))
                results[key] = _first(output).float()
                if not number:  # the first round compiles and warms up
                    continue
                times[key].append(taken)
                if arguments.steps:
                    dtype = torch.bfloat16 if short else torch.float32
                    given = halved if short else call
                    whole = lambda key=key, given=given, dtype=dtype: _sampled(  # noqa: E731
                        modules[key], given, arguments.steps, dtype
                    )
                    samplings[key].append(_timed(clock, whole)[0])
            products = [_timed(clock, lambda: torch._int_mm(left, right.t()))[0] for _ in range(4)]
            peak.append(2 * 1024**3 / max(min(products), 1e-9))
        exact = _first(net(**call))
    found: dict[str, Any] = {}
    for key, values in times.items():
        base = times.get("torch-f32", values)
        entry = {
            "milliseconds": round(1000 * statistics.median(values), 2),
            "quartiles": [round(1000 * value, 2) for value in _quartiles(values)],
            "times_torch_f32": round(statistics.median(a / b for a, b in zip(base, values, strict=True)), 2),
            "relative_error": float((results[key] - exact).norm() / exact.norm()),
        }
        if samplings[key]:
            entry["sampling_milliseconds"] = round(1000 * statistics.median(samplings[key]), 2)
            entry["sampling_over_calls"] = round(
                statistics.median(a / b for a, b in zip(samplings[key], values, strict=True)) / arguments.steps, 3
            )
        precisions = getattr(modules[key], "runtime_precisions", dict)()
        if precisions:
            entry["int8_layers"] = sum(value in ("u8", "i8") for value in precisions.values())
        found[key] = entry
        print(name, batch, key, entry, file=sys.stderr)
    return {
        "network": name, "batch": batch, "rows": arguments.rows, "weights": arguments.weights,
        "asymmetric": arguments.asymmetric, "attention": arguments.attention, "steps": arguments.steps,
        "int8_peak": round(statistics.median(peak) / 1e9), "candidates": found,
    }  # fmt: skip


def _timed(clock: Callable[[], float], run: Callable[[], Any]) -> tuple[float, Any]:
    began = clock()
    output = run()
    return clock() - began, output


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


if __name__ == "__main__":
    main()
