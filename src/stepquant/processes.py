"""Several processes that do one run together: who does what, and how they tell one another.

`accelerate launch` and `torchrun` start them, accelerate joins them, and torch.distributed carries what they say: NCCL
between GPUs, gloo between CPUs and for everything that is no tensor on a GPU. Nothing here knows what is calculated.

The rule that makes results independent of the number of processes: work is dealt out in whole batches that are the same
for any number of processes, results come back in the order of the batches, and what is summed over them is summed in
that order. Sums that are only made in parts (gradients) are equal up to the rounding of another order.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from stepquant.errors import SpecError, StepquantError

__all__ = ["ALONE", "Part", "Processes", "first_to_tell", "joined", "leave", "on_device"]

T = TypeVar("T")
Item = TypeVar("Item")

MEETING = timedelta(minutes=10)
"""How long processes wait for the last one to be started."""

WAITING = timedelta(hours=12)
"""How long they wait for what one of them does alone. One that dies is noticed at once, so this may be long."""

_BUCKET = 1 << 24
"""Elements of gradients that are summed at a time: few messages, and no second copy of all gradients."""

_TOLD = "stepquant/told"


@dataclass(frozen=True)
class Part:
    """The rows start .. stop - 1 of `total` rows: one process's part of a mini-batch. It may be empty."""

    start: int
    stop: int
    total: int

    @property
    def share(self) -> float:
        """Of the whole, in [0, 1]."""
        return (self.stop - self.start) / self.total

    def of(self, rows: Tensor) -> Tensor:
        """The part of `rows`; the first of them where the part is empty, so that there is something to run."""
        return rows[self.start : self.stop] if self.stop > self.start else rows[:1]


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them. Every process must make the same calls in the same order.

    rank: number of this process. count: of all. local: number of this one on its machine, which is that of its GPU.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes have come here."""
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, on all of them; values must be picklable, their tensors on the CPU."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _others_there(self):
            torch.distributed.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, which alone calls it, on all of them. As for `gather`."""
        if self.count == 1:
            return make()
        found: list[Any] = [make() if self.first else None]
        with _others_there(self):
            torch.distributed.broadcast_object_list(found, src=0)
        made: T = found[0]
        return made

    def in_turn(self, work: Callable[[Item], T], items: Sequence[Item]) -> Iterator[T]:
        """`work` of every item, in order, on all processes; each does every `count`-th item.

        With several processes the results must be picklable, and their tensors come back on the CPU.
        """
        if self.count == 1:
            yield from map(work, items)
            return
        for start in range(0, len(items), self.count):
            own = start + self.rank
            result = on_device(work(items[own]), "cpu") if own < len(items) else None
            yield from self.gather(result)[: len(items) - start]  # type: ignore[misc]

    def part(self, total: int) -> Part:
        """This process's rows of `total`: consecutive, and as many as the others' up to one."""
        return Part(self.rank * total // self.count, (self.rank + 1) * total // self.count, total)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the processes, the same bits on all of them."""
        if self.count == 1:
            return
        with torch.no_grad():
            for bucket in _buckets(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                with _others_there(self):
                    torch.distributed.all_reduce(flat)
                for tensor, summed in zip(bucket, torch.split(flat, [each.numel() for each in bucket]), strict=True):
                    tensor.copy_(summed.reshape(tensor.shape))

    def all_rows(self, own: Tensor) -> Tensor:
        """Tensors of one shape from all processes, one after the other along the first axis. No gradients."""
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.count)]
        with _others_there(self):
            torch.distributed.all_gather(parts, own.detach().contiguous())
        return torch.cat(parts)

    def take_first_(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace every tensor by that of the first process, bit for bit."""
        if self.count == 1:
            return
        with torch.no_grad():
            for tensor in tensors.values():
                # As bytes: gloo knows neither bool nor float8.
                bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                if bits.numel():
                    with _others_there(self):
                        torch.distributed.broadcast(bits, src=0)
                    tensor.copy_(bits.view(tensor.dtype).reshape(tensor.shape))

    def check_same(self, what: str, value: object) -> None:
        """Raise SpecError if the processes have different values of something; of mappings, it names the keys."""
        for rank, found in enumerate(self.gather(value)):
            if found != value:
                keys = sorted(
                    str(key) for key in {*value, *found} if value.get(key) != found.get(key)
                ) if isinstance(value, Mapping) and isinstance(found, Mapping) else []  # fmt: skip
                which = f" ({', '.join(keys)})" if keys else ""
                raise SpecError(
                    f"Process {rank} and process {self.rank} of {self.count} have different {what}{which}: start all "
                    "of them with the same command, versions and files."
                )


ALONE = Processes()
"""A run in one process."""


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type and device, together of at most about `_BUCKET` elements."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(known.numel() for known in bucket) + tensor.numel() > _BUCKET
        if bucket and (full or (bucket[0].dtype, bucket[0].device) != (tensor.dtype, tensor.device)):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def _others_there(processes: Processes) -> Iterator[None]:
    """Inside, what goes wrong means that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise StepquantError(
            f"Process {processes.rank} of {processes.count} waited for the others, and one of them has ended (killed, "
            f"or out of memory?): {(str(error).splitlines() or [''])[0]}"
        ) from error


def on_device(value: Any, device: torch.device | str) -> Any:
    """Nested lists, tuples and mappings with every tensor on the device; other values as they are."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: on_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([on_device(item, device) for item in value])
    return value


def joined() -> Processes:
    """The processes that a launcher has started, joined on the first call; `ALONE` without a launcher.

    Raises SpecError if accelerate is not installed, and StepquantError if the others do not come.
    """
    return _join() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ALONE


@functools.cache
def _store() -> tuple[Any, int, int]:
    """The store that the launcher's processes share, rank and count."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, count = next(rendezvous("env://", timeout=MEETING))
    except (RuntimeError, ValueError) as error:
        raise StepquantError(
            f"The processes of the launcher did not meet: {error}. Start stepquant with `accelerate launch -m "
            "stepquant ...`, or unset WORLD_SIZE."
        ) from error
    return store, rank, count


@functools.cache
def _join() -> Processes:
    try:
        from accelerate import PartialState  # type: ignore[import-untyped]
    except ImportError:
        raise SpecError("Several processes need accelerate: pip install accelerate") from None
    # These take the group of their import as a default argument. Imported later (diffusers does), they would keep it
    # and its threads beyond `leave`, and such a thread ends the interpreter with SIGABRT when it lets go of a tensor
    # while that shuts down.
    import torch.distributed.fsdp
    import torch.distributed.nn

    store, rank, count = _store()
    gpu = torch.cuda.is_available()
    with _others_there(Processes(rank, count)):
        state = PartialState(
            cpu=not gpu,
            backend="cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=torch.distributed.distributed_c10d.PrefixStore("stepquant/group", store),
            rank=rank,
            world_size=count,
            timeout=WAITING,
        )
    return Processes(state.process_index, state.num_processes, state.local_process_index)


def first_to_tell() -> bool:
    """Whether this process is the first of its run that says why it ends; the others would say the same, or less.

    Where the processes have not met, the first of every machine says it.
    """
    if not _join.cache_info().currsize:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return int(_store()[0].add(_TOLD, 1)) == 1
    except RuntimeError:  # the process that keeps the store is gone, and it has said why
        return False


def leave() -> None:
    """Part from the others, at the end of a run that went well."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
