"""The OpenVINO engine: the whole denoiser as one int8 graph, compiled for the processor at hand.

Layers run on the checkpoint's own levels, scales and zero points (see `engines.graph`), and everything between them in
float32 or bfloat16. A graph is made at the first call, from what the denoiser is called with, and kept on disk.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import logging
import os
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepquant._version import __version__
from stepquant.engines import graph
from stepquant.engines.graph import BIN, Lowered, Outputs, export, lower, tensors_of
from stepquant.engines.row_tables import join_row_tables_
from stepquant.engines.stand_in import changes, no_change
from stepquant.engines.waves import WAVE, take_waves_
from stepquant.engines.zero_points import take_zero_points_
from stepquant.errors import EngineError, SpecError
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.surgery import quantized_layers

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["GraphDenoiser", "OpenVINOEngine", "cache_folder", "content_of", "usable"]

logger = logging.getLogger(__name__)

# Each compiled shape holds its own copy of the weights.
KEPT_SHAPES = 4

NO_VNNI = (
    "This processor has no VNNI instructions, without which int8 sums overflow at 16 bits: it runs as simulated "
    "arithmetic inside the graph."
)
FLOAT_MATMUL = "OpenVINO multiplies attention's operands, rounded to their levels, in floating point inside the graph."


CACHE_LIMIT = "STEPQUANT_CACHE_GB"
"""Environment variable: the most that graphs may take on the disk, in units of 10^9 bytes."""

DEFAULT_CACHE_GB = 20.0


def cache_folder() -> Path:
    """Where graphs are kept: `$XDG_CACHE_HOME/stepquant`, or `~/.cache/stepquant`."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "stepquant"


@dataclass(frozen=True)
class OpenVINOEngine:
    """Runs a denoiser as one int8 graph on the CPU.

    precision: of what is not int8. "bf16" is faster on processors that have it, but rounds activations to 8 bits of
        mantissa before they are quantized: its results differ from simulated ones by more than float32 rounding. Scales
        of rows keep 16 bits. Sines and cosines of the inputs, as in timestep embeddings, stay float32.
    cache: folder for graphs, None for `cache_folder()`. Denoisers that diffusers does not know are not kept there:
        nothing says when their code changes. Where it cannot be written, the graphs that it has are used, and others
        are kept for as long as the module lives, with a warning.
    """

    precision: Literal["f32", "bf16"] = "f32"
    cache: Path | None = None
    name: str = "openvino"

    def __post_init__(self) -> None:
        if self.precision not in ("f32", "bf16"):
            raise SpecError(f"precision must be 'f32' or 'bf16', found {self.precision!r}.")

    def refuses(self, layer: QuantizedLayer | QuantizedMatmul, device: torch.device) -> str | None:
        """Why the layer does not run on integers. It runs inside the graph all the same."""
        if device.type not in ("cpu", "meta"):
            return f"OpenVINO runs on the CPU, and the layer is on {device}."
        reason = _missing() or graph.refusal(layer)
        if reason is not None:
            return reason
        if isinstance(layer, QuantizedMatmul):
            return FLOAT_MATMUL
        return None if has_vnni() else NO_VNNI

    def compile(self, denoiser: nn.Module) -> GraphDenoiser:
        """A module that is called as the denoiser is. The graph is made at its first call.

        Raises EngineError if OpenVINO is missing, the processor lacks the precision, or the denoiser is not quantized.
        """
        core = _core()
        if self.precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineError(
                "This processor has no bfloat16 arithmetic: use precision='f32', or the engine openvino by name."
            )
        if any(tensor.device.type != "cpu" for tensor in denoiser.parameters()):
            raise EngineError("OpenVINO runs on the CPU, and the denoiser is elsewhere: load it with device='cpu'.")
        device = torch.device("cpu")
        reasons = {name: self.refuses(layer, device) for name, layer in quantized_layers(denoiser).items()}
        short = self.precision == "bf16"
        lowered = lower(denoiser, graph.refusal if has_vnni() else _simulated_layer, short=short)
        if not has_vnni():
            logger.warning("%s Expect no gain over engine='simulated'.", NO_VNNI)
        content = content_of(denoiser)
        digest = _digest(denoiser, content, short)
        return GraphDenoiser(
            denoiser,
            lowered,
            {name: reason for name, reason in reasons.items() if reason is not None},
            self.precision,
            None if digest is None else self._kept_under(digest),
            content,
        )

    def _kept_under(self, digest: str) -> Path | None:
        """The denoiser's folder in the cache, None where the user has no home."""
        try:
            return (self.cache or cache_folder()) / self.name / digest
        except RuntimeError as error:
            logger.warning("Graphs are not kept: %s Set XDG_CACHE_HOME, or give OpenVINOEngine(cache=...).", error)
            return None


def has_vnni() -> bool:
    """Whether the processor multiplies int8 into 32-bit sums."""
    known = getattr(torch.cpu, "_is_vnni_supported", None)
    if known is not None and known():
        return True
    # That asks for the AVX-512 form only; newer client processors have the AVX form.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("avx_vnni"):
        return True
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx_vnni" in info.read_text(encoding="utf-8", errors="replace").split()


def has_bf16() -> bool:
    """Whether OpenVINO has bfloat16 and the processor multiplies it: others imitate it, and take longer."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # of all processors with AMX, too
    return known is not None and known() and "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _simulated_layer(layer: QuantizedLayer | QuantizedMatmul) -> str | None:
    return NO_VNNI if isinstance(layer, QuantizedLayer) else graph.refusal(layer)


@functools.cache
def _core() -> Any:
    return _openvino().Core()


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise EngineError(f"The engine 'openvino' needs OpenVINO: pip install openvino ({error})") from error
    return openvino


def _missing() -> str | None:
    """Why OpenVINO cannot be used, with the command that installs it, or None."""
    try:
        _openvino()
    except EngineError as error:
        return f"{error}."
    return None


def usable() -> bool:
    """Whether this machine runs layers on integers in OpenVINO."""
    return _missing() is None and has_vnni()


def content_of(denoiser: nn.Module) -> str:
    """SHA-256 (hex) of a denoiser's tensors and of how its layers are quantized: what a graph no longer shows."""
    layers = [(name, repr(layer), _specs(layer)) for name, layer in quantized_layers(denoiser).items()]
    digest = hashlib.sha256(json.dumps(layers).encode())
    for name, tensor in sorted(denoiser.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _digest(denoiser: nn.Module, content: str, short: bool = False) -> str | None:
    """Hash of everything that decides the graph, or None for a denoiser with code that has no version."""
    config = getattr(denoiser, "config", None)
    settings = _settings(denoiser)
    if not type(denoiser).__module__.startswith("diffusers.") or config is None or settings is None:
        return None
    import openvino

    # The others are diffusers' notes: where it was loaded from, and which values are defaults, in the order of a set.
    own = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    facts = [
        [__version__, torch.__version__, openvino.__version__, _version_of("diffusers"), has_vnni()],
        [type(denoiser).__qualname__, json.loads(json.dumps(own, default=repr)), settings],
        [content, FORM, short],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


FORM = 4
"""Of graphs; goes up when the same denoiser makes another one. 3 had strides in convolutions with kernels of one."""

VERSIONED = frozenset({"diffusers", "stepquant", "torch"})
"""Packages whose version is part of a graph's hash."""


def _settings(denoiser: nn.Module) -> list[list[Any]] | None:
    """Class and plain attributes of every part and of its attention processor, which methods such as `enable_freeu` set
    without a trace in configuration or tensors. None where one's code is of another package or was replaced, or where a
    hook adds to it.
    """
    found: list[list[Any]] = []
    for name, module in denoiser.named_modules():
        # Hooks of the denoiser itself, such as the clock's, are no part of the graph.
        hooked = module is not denoiser and (module._forward_hooks or module._forward_pre_hooks)
        if "forward" in vars(module) or hooked:
            return None
        for part in (module, vars(module).get("processor")):
            if part is None:
                continue
            kind = type(part)
            if kind.__module__.partition(".")[0] not in VERSIONED and part is not denoiser:
                return None
            plain = {key: repr(value) for key, value in vars(part).items() if key != "training" and _is_plain(value)}
            found.append([name, f"{kind.__module__}.{kind.__qualname__}", plain])
    return found


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a word or the like, whose repr is the same in every process."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _specs(layer: nn.Module) -> list[str]:
    """What decides a layer's arithmetic beside its tensors."""
    own = [repr((getattr(child, "spec", None), getattr(child, "row_bits", None))) for child in layer.children()]
    return [*own, repr(getattr(layer, "split", None)), repr(getattr(layer, "geometry", None))]


def _version_of(package: str) -> str:
    from importlib.metadata import version

    return version(package)


@dataclass(frozen=True)
class _Compiled:
    """request: of OpenVINO. inputs: the names that the graph takes.

    waves: the request that computes its inputs `WAVE + i` from the same inputs; None if it has none.
    constants: inputs of the graph that never change, by name.
    """

    model: Any
    request: Any
    waves: Any | None
    inputs: tuple[str, ...]
    outputs: Outputs
    constants: Mapping[str, Any]


class GraphDenoiser(nn.Module):
    """A denoiser that runs as a compiled graph: same call, same `config`, `dtype` and other attributes.

    refusals: why layers do not run on integers, by name; the others do.
    content: `content_of` the denoiser that it was made from.

    A call with other shapes compiles another graph; the last four are kept. The batch may change without a new export.
    Threads are those that torch is set to when a shape is first called. Images of one batch may be at different
    timesteps: where these fall into different bins, the batch runs once for every bin.
    Threads may share one: their calls take turns.
    It has no parameters and no gradients, and cannot be saved: keep the checkpoint.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        lowered: Lowered,
        refusals: Mapping[str, str],
        precision: str,
        cache: Path | None,
        content: str,
    ) -> None:
        super().__init__()
        self.refusals = dict(refusals)
        self.precision = precision
        self.content = content
        # Not registered: casting or moving the pipeline must not reach the graph's source.
        object.__setattr__(self, "_lowered", lowered)
        # A request holds one call's inputs and outputs, so calls of several threads take turns.
        self._lock = threading.RLock()
        self._cache = cache
        self._temporary: Path | None = None
        self._use: Any | None = None
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()
        self._static: set[str] = set()
        self._signature = inspect.signature(denoiser.forward)
        self._dtype = next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), torch.float32)
        self._layers = tuple(quantized_layers(denoiser))
        self._switches = any(isinstance(m, graph.GraphInput) and m.several for m in lowered.module.modules()) or any(
            getattr(quantizer, "rows", 1) > 1
            for layer in quantized_layers(lowered.module).values()
            for quantizer in layer.children()
        )
        self.train(False)

    _lowered: Lowered

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        """What pipelines read of their denoiser: its configuration, its embeddings' sizes.

        Methods that change or save it raise EngineError when they are called.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            lowered = self.__dict__.get("_lowered")
            if lowered is None:
                raise
        value = getattr(lowered.module, name)
        if not changes(lowered.module, name, value):
            return value

        # Not raised at once: diffusers asks components whether they have methods that it then does not call.
        def refused(*_: Any, **__: Any) -> Any:
            raise no_change(lowered.module, f"{name}()")

        return refused

    def __setattr__(self, name: str, value: Any) -> None:
        lowered = self.__dict__.get("_lowered")
        own = name in self.__dict__ or hasattr(type(self), name)
        if lowered is not None and not own and hasattr(lowered.module, name):
            raise no_change(lowered.module, f"Setting {name}")
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphDenoiser:
        """A copy that compiles anew: compiled graphs cannot be copied."""
        other: GraphDenoiser = object.__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(self.__dict__)
        other._temporary, other._compiled, other._lock = None, OrderedDict(), threading.RLock()
        other._use = None
        other._static = set(self._static)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """As for copies."""
        state = {**self.__dict__, "_temporary": None, "_use": None, "_compiled": OrderedDict()}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_lock": threading.RLock()})  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.checked(*args, **kwargs)
        tensors, form = tensors_of(arguments)

        def run(numbers: list[int]) -> tuple[Outputs, list[tuple[Tensor, ...]]]:
            compiled = self._compiled_for(tensors, form)
            return compiled.outputs, [_infer(compiled, tensors, number) for number in numbers]

        return self._by_bin(arguments, run)

    def in_torch(self, *args: Any, **kwargs: Any) -> Any:
        """What the graph computes, without one: by the module that graphs are made from. Slow."""
        arguments = _in_float32(self.checked(*args, **kwargs))
        module, clock = self._lowered.module, self._lowered.clock

        def run(numbers: list[int]) -> tuple[Outputs, list[tuple[Tensor, ...]]]:
            found = []
            for number in numbers:
                clock.bin = torch.tensor([number])
                # Not called: the original's hook would set the clock for each image.
                with graph.plain_arithmetic():
                    found.append(Outputs.of(module.forward(**arguments)))
            return found[0][0], [tensors for _, tensors in found]

        return self._by_bin(arguments, run)

    def checked(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of a call by name. Raises EngineError where no graph, of whatever shape, could take it."""
        arguments = self._arguments(args, kwargs)
        for name, tensor in _tensors_in(arguments):
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise EngineError(
                    "A graph has no gradients: call it under torch.no_grad(), or load the checkpoint with "
                    "engine='simulated'."
                )
            if tensor.device.type != "cpu":
                raise EngineError(
                    f"OpenVINO runs on the CPU, and argument {name} is on {tensor.device}: load the checkpoint with "
                    "engine='simulated' to run it there."
                )
        return arguments

    def _by_bin(
        self, arguments: Mapping[str, Any], run: Callable[[list[int]], tuple[Outputs, list[tuple[Tensor, ...]]]]
    ) -> Any:
        """What the denoiser returns, of `run`, which gives the results of the whole batch for each bin."""
        clock = self._lowered.clock
        bins = torch.bucketize(arguments[clock.argument].detach().reshape(-1).float(), clock.edges)
        distinct = torch.unique(bins).tolist() if self._switches else [0]
        with self._lock:
            outputs, results = run(distinct)
        merged = results[0]
        for number, result in zip(distinct[1:], results[1:], strict=True):
            merged = tuple(
                torch.where((bins == number).reshape(-1, *[1] * (new.ndim - 1)), new, old)
                for old, new in zip(merged, result, strict=True)
            )
        return outputs.build(tuple(self._cast(result) for result in merged))

    def _cast(self, result: Tensor) -> Tensor:
        return result.to(self._dtype) if result.is_floating_point() else result

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = self._signature.bind(*args, **kwargs)
        arguments: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                raise EngineError(f"The denoiser takes *{name}, which a graph cannot name: use engine='simulated'.")
            arguments |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        clock = self._lowered.clock
        if clock.argument not in arguments:
            raise EngineError(f"The denoiser was called without its timestep argument {clock.argument!r}.")
        arguments[clock.argument] = torch.as_tensor(arguments[clock.argument])
        return arguments

    def _compiled_for(self, tensors: Mapping[str, Tensor], form: Any) -> _Compiled:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        threads = torch.get_num_threads()
        key = json.dumps([form, shapes, [str(tensor.dtype) for tensor in tensors.values()], threads])
        if key in self._compiled:
            self._compiled.move_to_end(key)
            return self._compiled[key]
        batch = next((tensor.shape[0] for tensor in tensors.values() if tensor.ndim), 1)
        batched = tuple(name for name, tensor in tensors.items() if tensor.ndim and tensor.shape[0] == batch)
        found: tuple[Any, Outputs] | None = None
        if key not in self._static:
            found = self._reshaped(*self._graph(tensors, form, batched), shapes, batch)
        if found is None:
            logger.info("The graph holds on to a batch size, so it is exported for %d images.", batch)
            self._static.add(key)
            found = self._reshaped(*self._graph(tensors, form, ()), shapes, None)
        assert found is not None
        model, outputs = found
        inputs = tuple(_name_of(port, {*shapes, BIN}) for port in model.inputs)
        try:
            apart = take_waves_(model) if self.precision == "bf16" else None
            join_row_tables_(model, BIN)
            constants = take_zero_points_(model)
        except (RuntimeError, MemoryError) as error:
            raise EngineError(f"OpenVINO could not rewrite the graph: {_brief(error)}") from error
        compiled, request = self._compile(model, threads, self.precision)
        waves = None if apart is None else self._compile(apart, threads, "f32")[1]
        if self._use is not None:
            # What OpenVINO keeps of compiled graphs counts too.
            limit = cache_limit()
            with contextlib.suppress(OSError):
                prune(self._folder().parent, limit)
        self._compiled[key] = _Compiled(compiled, request, waves, inputs, outputs, constants)
        while len(self._compiled) > KEPT_SHAPES:
            self._compiled.popitem(last=False)
        return self._compiled[key]

    def _folder(self) -> Path:
        if self._cache is not None:
            return self._cache
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="stepquant-"))
            weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        return self._temporary

    def _hold_cache(self, folder: Path) -> OSError | None:
        """Mark the folder as in use while this module lives. Returns why that cannot be done."""
        if self._use is None:
            try:
                self._use = in_use(folder)
            except OSError as error:
                return error
            weakref.finalize(self, self._use.close)
        return None

    def _graph(self, tensors: Mapping[str, Tensor], form: Any, batched: tuple[str, ...]) -> tuple[Path, Outputs]:
        """The graph's file, from the cache if it is there and whole."""
        shapes = {
            name: [str(tensor.dtype), *(["batch"] if name in batched else tensor.shape[:1]), *tensor.shape[1:]]
            for name, tensor in tensors.items()
        }
        name = hashlib.sha256(json.dumps([form, shapes]).encode()).hexdigest()[:32]
        folder = self._folder()
        closed = self._hold_cache(folder) if self._cache is not None else None
        known = _kept(folder, name)
        if known is not None:
            return folder / f"{name}.xml", known
        if closed is not None:
            logger.warning(
                "Graphs cannot be kept in %s: %s. They are made in a temporary folder, and anew by the next process. "
                "Choose another folder: OpenVINOEngine(cache=...).",
                folder,
                closed,
            )
            self._cache = None
            folder = self._folder()
        # With two images nothing is taken for a broadcast axis.
        example = {
            key: tensor[:1].expand(2, *tensor.shape[1:]) if key in batched and len(tensor) < 2 else tensor
            for key, tensor in tensors.items()
        }
        arguments = _in_float32(graph.filled(form, example))
        limit = cache_limit()
        try:
            outputs = _write(self._lowered, arguments, batched, folder, name)
            if self._cache is not None:
                # Another process may write and remove there meanwhile; the graph is complete.
                with contextlib.suppress(OSError):
                    prune(folder.parent, limit)
            return folder / f"{name}.xml", outputs
        except OSError as error:
            raise EngineError(
                f"The graph could not be written to {folder}: {error}. Choose another folder: "
                "OpenVINOEngine(cache=...)."
            ) from error

    def _reshaped(
        self, path: Path, outputs: Outputs, shapes: dict[str, Any], batch: int | None
    ) -> tuple[Any, Outputs] | None:
        """The graph with these shapes, None if it does not follow the batch."""
        try:
            model = _core().read_model(str(path))
        except (RuntimeError, MemoryError) as error:
            raise EngineError(f"OpenVINO could not open the graph in {path}: {_brief(error)}") from error
        wanted = {**shapes, BIN: [1]}
        try:
            model.reshape({port: wanted[_name_of(port, wanted)] for port in model.inputs})
        except RuntimeError as error:
            if batch is None:
                raise EngineError(f"OpenVINO does not take the graph in {path}: {_brief(error)}") from error
            return None
        for port in model.outputs:
            shape = port.partial_shape
            if batch is not None and not (shape.is_static and len(shape) and shape[0].get_length() == batch):
                return None
        return model, outputs

    def _compile(self, model: Any, threads: int, precision: str) -> tuple[Any, Any]:
        """The compiled graph and a request to run it."""
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Threads tied to cores would wait for whoever else is tied to them.
            "ENABLE_CPU_PINNING": False,
            # Otherwise float linear layers get int8 inputs of OpenVINO's own choice.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
        if self._use is not None:  # OpenVINO fails where it cannot write
            settings["CACHE_DIR"] = str(self._folder() / "compiled")
        try:
            compiled = _core().compile_model(model, "CPU", settings)
            return compiled, compiled.create_infer_request()
        except (RuntimeError, MemoryError) as error:
            raise EngineError(
                f"OpenVINO could not compile the denoiser: {_brief(error)} Free memory, use a smaller batch, or run "
                "the layers in torch: engine='simulated'."
            ) from error

    def runtime_precisions(self) -> dict[str, str]:
        """In what each layer's operator runs in the graph last used, as OpenVINO reports it: "u8", "i8", "f32", "bf16".

        A layer with several operators gets the widest. Layers that OpenVINO has folded into others and does not name
        are missing. Empty before the first call.
        """
        with self._lock:
            if not self._compiled:
                return {}
            latest = next(reversed(self._compiled.values()))
        found: dict[str, str] = {}
        for node in latest.model.get_runtime_model().get_ordered_ops():
            info = {key: str(value.astype(str)) for key, value in node.get_rt_info().items() if key in _RUNTIME_KEYS}
            if info.get("layerType") not in ("Convolution", "FullyConnected", "MatMul", "Subgraph"):
                continue
            for original in info.get("originalLayersNames", "").split(","):
                path, _, operator = original.rpartition("/")
                if operator.startswith("Dequantization") and info["layerType"] != "Subgraph":
                    # An integer operator without a zero point: only the scale behind it has kept its name.
                    path, _, operator = path.rpartition("/")
                layer = _layer_at(path, self._layers)
                if layer is None or operator.split("_")[0] not in ("Conv", "MatMul"):
                    continue
                precision = info.get("runtimePrecision", "unknown")
                if found.get(layer, "u8") in ("u8", "i8"):
                    found[layer] = precision
        return found

    def extra_repr(self) -> str:
        return (
            f"precision={self.precision}, {len(self._layers) - len(self.refusals)} of {len(self._layers)} layers int8"
        )


def _tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested arguments, among whatever else."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors_in(entry, f"{name}.{key}" if name else str(key))


def _in_float32(value: Any) -> Any:
    """Nested arguments with their floating-point tensors in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _in_float32(entry) for key, entry in value.items()}
    return type(value)(map(_in_float32, value)) if type(value) in (list, tuple) else value


_RUNTIME_KEYS = ("layerType", "originalLayersNames", "runtimePrecision")


def _layer_at(path: str, layers: Collection[str]) -> str | None:
    """The layer that an operator's path in the graph belongs to.

    The path has the modules that were being called, `/mid_block/attentions.0/processor/to_q` for
    `mid_block.attentions.0.to_q`: the layer's name is in it, in order, and its last part ends it.
    """
    called = path.strip("/").replace("/", ".").split(".")

    def runs(layer: str) -> bool:
        parts, rest = layer.split("."), iter(called)
        return parts[-1] == called[-1] and all(part in rest for part in parts)

    return max((layer for layer in layers if runs(layer)), key=len, default=None)


def _name_of(port: Any, names: Collection[str]) -> str:
    """The argument that an input of the graph is for. OpenVINO adds names of what it has simplified away."""
    own: set[str] = set(port.names)
    return next(name for name in names if name in own)


def _infer(compiled: _Compiled, tensors: Mapping[str, Tensor], number: int) -> tuple[Tensor, ...]:
    values: dict[str, Any] = {}
    for name in compiled.inputs:
        if name == BIN:
            values[name] = torch.tensor([number]).numpy()
        else:
            tensor = tensors[name].detach()
            values[name] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
    try:
        if compiled.waves is not None:
            found = compiled.waves.infer(values, share_inputs=True)
            values |= {f"{WAVE}{place}": value for place, value in enumerate(found.to_tuple())}
        found = compiled.request.infer({**values, **compiled.constants}, share_inputs=True)
    except (RuntimeError, MemoryError) as error:
        raise EngineError(f"OpenVINO could not run the denoiser: {_brief(error)}") from error
    return tuple(torch.from_numpy(found[port].copy()) for port in compiled.model.outputs)


def _kept(folder: Path, name: str) -> Outputs | None:
    """What a kept graph returns, None if there is none or it is not what was written."""
    try:
        about = json.loads((folder / f"{name}.json").read_bytes())
        for suffix, expected in about["sums"].items():
            if _sum(folder / f"{name}{suffix}") != expected:
                logger.warning("The graph %s in the cache is damaged and is made again.", folder / name)
                return None
        return Outputs(about["outputs"]["kind"], tuple(about["outputs"]["fields"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(
    lowered: Lowered, arguments: Mapping[str, Any], batched: tuple[str, ...], folder: Path, name: str
) -> Outputs:
    """Export, turn into OpenVINO's own format, and put into the folder, the description last."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        source = partial / "graph.onnx"
        outputs = export(lowered, arguments, source, bin_inside=False, batched=batched)
        try:
            model = _core().read_model(str(source))
        except RuntimeError as error:
            raise EngineError(
                f"OpenVINO cannot read the denoiser's graph: {_brief(error)} Run the layers in torch: "
                "engine='simulated'."
            ) from error
        try:
            _openvino().save_model(model, str(partial / f"{name}.xml"), compress_to_fp16=False)
        except RuntimeError as error:  # as for a full disk
            raise OSError(_brief(error).removesuffix(".")) from error
        sums = {suffix: _sum(partial / f"{name}{suffix}") for suffix in (".bin", ".xml")}
        about = {"sums": sums, "outputs": asdict(outputs)}
        (partial / f"{name}.json").write_text(json.dumps(about), encoding="utf-8")
        for suffix in (".bin", ".xml", ".json"):
            (partial / f"{name}{suffix}").replace(folder / f"{name}{suffix}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return outputs


def cache_limit() -> int:
    """Bytes that the graphs of all denoisers may take. Raises EngineError for a limit that is no number."""
    given = os.environ.get(CACHE_LIMIT, "")
    try:
        limit = float(given or DEFAULT_CACHE_GB)
        if not limit >= 0:
            raise ValueError
    except ValueError:
        raise EngineError(
            f"{CACHE_LIMIT} must be a number of gigabytes, 0 or more, found {given!r}: correct it, or leave it out for "
            f"{DEFAULT_CACHE_GB:g}."
        ) from None
    return round(limit * 1e9) if limit < 1e9 else 1 << 62


IN_USE = ".in-use"


def in_use(folder: Path) -> Any:
    """Mark a denoiser's folder as used now, and as in use as long as the returned file is open."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        mark = (folder / IN_USE).open("a+b")
        if fcntl is not None:
            fcntl.flock(mark, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):
            os.utime(folder / IN_USE)
            if os.path.samestat(os.fstat(mark.fileno()), (folder / IN_USE).stat()):
                return mark
        mark.close()  # the folder was removed between opening and locking


def prune(root: Path, limit: int) -> None:
    """Remove the folders of denoisers that were used least recently until the rest takes no more than `limit` bytes.

    Folders that a process has in use stay, however large. Where the system has no `flock` nothing is removed.
    """
    if fcntl is None:
        return
    sizes = {folder: _size(folder) for folder in root.iterdir() if folder.is_dir()}
    total = sum(sizes.values())
    for folder in sorted(sizes, key=_last_use):
        if total <= limit:
            return
        try:
            with (folder / IN_USE).open("a+b") as mark:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Renamed first: who opens the folder meanwhile finds none, or a new one, never a half.
                gone = Path(tempfile.mkdtemp(prefix=".gone-", dir=root)) / folder.name
                folder.rename(gone)
        except OSError:  # in use, or another process removes it
            continue
        shutil.rmtree(gone.parent, ignore_errors=True)
        total -= sizes[folder]
        logger.info("Removed the graphs in %s, which were used least recently: %s is full.", folder, CACHE_LIMIT)


def _last_use(folder: Path) -> float:
    mark = folder / IN_USE
    try:
        return (mark if mark.exists() else folder).stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):  # unlike rglob, it passes over a folder that vanishes
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(place) / name).stat().st_size
    return total


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _brief(error: BaseException) -> str:
    """The last line of OpenVINO's message, which says what is wrong; the others say where in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return text if text.endswith(".") else text + "."
