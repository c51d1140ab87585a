"""Running a network up to a unit without running again what cannot change before it.

Blocks are fitted one after another, each on inputs behind those that were fitted before. Running the network anew for
each of n blocks costs n / 2 runs over the calibration set. Here units that are final return what they returned, so that
it is one run, and outputs are kept only while a unit that is not final still reads them: in main memory, also those of
a GPU, and in files where they are many.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from stepquant.storage import errors_name

__all__ = ["IN_MEMORY", "Flow", "Prefix", "flow_of", "most_kept"]

logger = logging.getLogger(__name__)

IN_MEMORY = 8_000_000_000
"""Bytes of outputs in main memory, of both networks together. More of them are files."""


@dataclass(frozen=True)
class Flow:
    """Which units' outputs reach which unit without going through another, in one forward call.

    reads: by unit, those whose outputs it reads.
    bound: units that must run: called twice or not at all, with outputs that are no plain tensors or not their own, or
        with an effect on tensors that were there before.
    seen: units of whose outputs Python reads values between units; they are always kept.
    """

    reads: Mapping[str, frozenset[str]]
    bound: frozenset[str]
    seen: frozenset[str]

    def needed(self, running: Iterable[str]) -> frozenset[str]:
        """Units whose outputs are read when these, and the bound ones, run."""
        return self.seen.union(*(self.reads[unit] for unit in {*running, *self.bound}))


def flow_of(network: nn.Module, units: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Flow:
    """Follow the outputs of units through one call of the network.

    All units are bound if it has operators that cannot be watched.
    """
    watch = _Watch(units)
    handles = [
        handle
        for unit in units
        for handle in (
            network.get_submodule(unit).register_forward_pre_hook(watch.entering(unit)),
            network.get_submodule(unit).register_forward_hook(watch.leaving(unit)),
        )
    ]
    try:
        with torch.no_grad(), watch:
            network(*args, **kwargs)
    except NotImplementedError as error:  # operators of higher order, such as flex attention, know no modes
        logger.info("Final blocks are run again for every block that is fitted: %s", error)
        return Flow(dict.fromkeys(units, frozenset()), frozenset(units), frozenset())
    finally:
        for handle in handles:
            handle.remove()
    uncalled = {unit for unit, count in watch.calls.items() if count != 1}
    return Flow({unit: frozenset(found) for unit, found in watch.reads.items()}, watch.bound | uncalled, watch.seen)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes for every tensor the units that it comes from. What happens within a unit is that unit's."""

    def __init__(self, units: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = dict.fromkeys(units, 0)
        self.reads: dict[str, set[str]] = {unit: set() for unit in units}
        self.bound: frozenset[str] = frozenset()
        self.seen: frozenset[str] = frozenset()
        self._origins: Any = WeakTensorKeyDictionary()
        self._running: list[tuple[str, set[int]]] = []
        """Units within one another, each with the storages that it has made in this call."""

    def entering(self, unit: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            self.calls[unit] += 1
            self._running.append((unit, set()))

        return hook

    def leaving(self, unit: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            _, own = self._running.pop()
            plain = all(isinstance(leaf, Tensor | int | float | str | None) for leaf in tree_leaves(output))
            if not plain or any(_storage(tensor) not in own for tensor in _tensors(output)):
                self.bound |= {unit}
            for tensor in _tensors(output):
                self._origins[tensor] = frozenset({unit})

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        empty: frozenset[str] = frozenset()
        given, written = list(_tensors((args, kwargs))), list(_written(func, args, kwargs))
        origins = empty.union(*(self._origins.get(tensor, empty) for tensor in given))
        if self._running:
            unit, own = self._running[-1]
            self.reads[unit] |= origins
            if any(_storage(tensor) not in own for tensor in written):
                self.bound |= {unit}
            own |= {_storage(tensor) for tensor in _tensors(result)} - {_storage(tensor) for tensor in given}
        elif origins:
            outputs = [*_tensors(result), *written]
            for tensor in outputs:
                self._origins[tensor] = origins
            if not outputs:  # a number that Python goes on with
                self.seen |= origins
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Arguments that an operator changes."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[number] if number < len(args) else kwargs.get(argument.name))


@dataclass(frozen=True)
class _Kept:
    """A tensor as it was: strides too, by which some operators choose how they compute.

    value: None if it was dropped. device: where it was. The rest are numbers, not a tensor without memory: a small one
    in the place of each large one that goes would leave main memory in pieces.
    """

    value: Tensor | Path | None
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor, path: Path | None) -> _Kept:
        """path: a file that it goes to instead of main memory."""
        value = tensor.detach().to("cpu", copy=True)
        kept = cls(value if path is None else path, value.shape, value.stride(), value.dtype, tensor.device)
        if path is not None:
            raw = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
            with errors_name(path.parent):
                raw.numpy().tofile(path)
        return kept

    @property
    def bytes(self) -> int:
        return 0 if self.value is None else self.shape.numel() * self.dtype.itemsize

    def fetched(self) -> Tensor:
        """A tensor that may be written to. Zeros if it was dropped: nothing that counts is computed from them."""
        if self.value is None:
            empty = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
            return empty.zero_()
        if isinstance(self.value, Tensor):
            return self.value.to(self.device, copy=True)
        # Mapped until it is copied, so that nothing of it is in memory twice.
        mapped: Any = torch.UntypedStorage.from_file(str(self.value), False, self.value.stat().st_size)
        value: Tensor = torch.empty(0, dtype=self.dtype).set_(mapped, 0, self.shape, self.strides)
        return value.to(self.device, copy=True)

    def dropped(self) -> _Kept:
        if isinstance(self.value, Path):
            self.value.unlink()
        return replace(self, value=None)


class Prefix:
    """A network over a calibration set, of which final units are not run again.

    All batches must go the same way through the network: the first shows who reads what.

    order: of the units that are fitted, as they are executed.
    fixed: whether nothing of the network changes; else units are final once later ones are asked for.
    memory: bytes of outputs in main memory. folder: makes an empty one for files with the rest, asked for once;
        whoever made it removes it.
    """

    def __init__(
        self,
        network: nn.Module,
        order: Sequence[str],
        fixed: bool,
        *,
        memory: int,
        folder: Callable[[], Path],
    ) -> None:
        self._network, self._order, self._fixed, self._memory = network, list(order), fixed, memory
        self._place = {unit: number for number, unit in enumerate(self._order)}
        self._flow: Flow | None = None
        self._kept: dict[tuple[str, int], Any] = {}
        self._dropped: set[tuple[str, int]] = set()
        self._make_folder, self._files = folder, itertools.count()
        self._folder: Path | None = None
        self._in_memory = 0

    @property
    def bytes(self) -> int:
        """That are kept now, in memory and in files."""
        return sum(leaf.bytes for leaf in tree_leaves(list(self._kept.values())) if isinstance(leaf, _Kept))

    @contextmanager
    def ready(
        self, number: int, wanted: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[None]:
        """Inside, the network may be called once with batch `number`, to see what the wanted units are called with.

        args, kwargs: of that call.
        """
        if self._flow is None:
            self._flow = flow_of(self._network, self._order, args, kwargs)
        begin = min(self._place[unit] for unit in wanted)
        needed = self._flow.needed(self._order[begin:])
        # The unit before the first wanted one has not run since it is final, and reads what those after it may not.
        self._drop(number, needed | self._flow.needed([u for u in self._order if (u, number) not in self._kept]))
        handles, patched = [], []
        for unit in self._order:
            if unit in self._flow.bound or not (self._fixed or self._place[unit] < begin):
                continue
            module = self._network.get_submodule(unit)
            if (unit, number) in self._kept:
                patched.append((module, vars(module).get("forward")))
                vars(module)["forward"] = self._answer(unit, number)
            else:
                handles.append(module.register_forward_hook(self._keeping(unit, number, unit in needed)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, own in patched:
                del vars(module)["forward"]
                if own is not None:
                    vars(module)["forward"] = own

    def _answer(self, unit: str, number: int) -> Any:
        def forward(*_args: Any, **_kwargs: Any) -> Any:
            return _mapped(_Kept, _Kept.fetched, self._kept[unit, number])

        return forward

    def _keeping(self, unit: str, number: int, needed: bool) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._kept[unit, number] = _mapped(Tensor, self._put, output)
            if not needed:
                self._drop(number, frozenset(self._order) - {unit})

        return hook

    def _put(self, tensor: Tensor) -> _Kept:
        size = tensor.numel() * tensor.element_size()
        if self._in_memory + size <= self._memory:
            self._in_memory += size
            return _Kept.of(tensor, None)
        if self._folder is None:
            self._folder = self._make_folder()
        return _Kept.of(tensor, self._folder / f"{next(self._files)}.raw")

    def _forget(self, kept: _Kept) -> _Kept:
        self._in_memory -= kept.bytes if isinstance(kept.value, Tensor) else 0
        return kept.dropped()

    def _drop(self, number: int, needed: frozenset[str]) -> None:
        """Of a batch, forget the values of outputs that only final units read."""
        for unit in self._order:
            key = unit, number
            if key in self._kept and unit not in needed and key not in self._dropped:
                self._kept[key] = _mapped(_Kept, self._forget, self._kept[key])
                self._dropped.add(key)


def _mapped(kind: type[Any], change: Callable[[Any], Any], values: Any) -> Any:
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, kind) else leaf, values)


def most_kept(flow: Flow, outputs: Mapping[str, int], together: int, fixed: bool) -> int:
    """Bytes that a `Prefix` keeps at most, of outputs of so many bytes; `together` units are asked for at a time."""
    order = list(outputs)
    most = 0
    for begin in range(0, len(order), together):
        # What is kept at the end of a call: of a network that changes, without the units that were asked for.
        there = order[: begin + together] if fixed else order[:begin]
        running = order[begin:] if fixed else order[max(0, begin - together) :]
        most = max(most, sum(outputs[unit] for unit in flow.needed(running) - flow.bound if unit in there))
    return most
