"""What several processes share of a calibration: the recording, the rows of mini-batches, and the result of a stage.

    recorded    each process records every n-th batch, and all of them end with all trajectories
    SplitRows   each process runs the denoiser on some rows of a mini-batch, and all of them get all rows
    agree_      after a stage, every process goes on with the first one's model

With one process nothing is split, and nothing here costs anything.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibrate.spilled import Shelf, spilled
from stepquant.calibrate.steps import prediction_of
from stepquant.calibrate.trajectory import Trajectory, record, seal
from stepquant.calibrate.trajectory_files import packed, unpacked
from stepquant.errors import CalibrationError
from stepquant.model.families import network_beside
from stepquant.model.pipeline import arguments_of_batch
from stepquant.processes import Processes
from stepquant.recipe import Job
from stepquant.run import Run

__all__ = ["SplitRows", "agree_", "kept", "recorded", "row_by_row"]


def recorded(job: Job, seeds: Sequence[int], *, batch_size: int) -> list[Trajectory]:
    """Sealed trajectories of the full-precision pipeline, in the order of the seeds; one for each `batch_size` of them.

    Batches are the same for any number of processes. What the others have recorded arrives in the form of files, so
    with several processes every one has what a resumed run has. With `job.spill` each batch goes to disk before the
    next one is recorded.
    Raises as `record` and `seal` do, and CalibrationError for trajectories that cannot be packed.
    """
    processes = job.run.processes
    if processes.count == 1 and job.spill is None:
        found = record(
            job.pipe,
            job.full_precision,
            seeds=seeds,
            steps=job.steps,
            batch_size=batch_size,
            arguments=job.arguments,
            run=job.run,
        )
        return [seal(trajectory) for trajectory in found]

    def one(batch: slice) -> Trajectory:
        (trajectory,) = record(
            job.pipe,
            job.full_precision,
            seeds=seeds[batch],
            steps=job.steps,
            batch_size=batch_size,
            arguments=arguments_of_batch(job.arguments, batch, len(seeds)),
            run=Run(seed=job.run.seed),
        )
        return seal(trajectory)

    def message(batch: slice) -> tuple[str, dict[str, Tensor]]:
        entry, tensors = packed(one(batch))
        return json.dumps(entry), tensors

    def from_all() -> Iterator[Trajectory]:
        for entry, tensors in processes.in_turn(message, batches):
            yield unpacked(json.loads(entry), tensors, job.pipe.scheduler, network)

    batches = [slice(start, min(start + batch_size, len(seeds))) for start in range(0, len(seeds), batch_size)]
    network = network_beside(job.pipe)
    with job.run.progress.track("record trajectories", len(seeds)) as done:
        arriving = map(one, batches) if processes.count == 1 else from_all()

        def counted() -> Iterator[Trajectory]:
            for batch in batches:
                yield next(arriving)
                done(batch.stop - batch.start)

        return kept(job, counted())


def kept(job: Job, trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """The trajectories, on disk if the job says so (`Job.spill`): each is written before the next one is asked for."""
    if job.spill is None:
        return list(trajectories)
    found: list[Trajectory] = []
    shelf, arriving = Shelf(), iter(trajectories)
    while (trajectory := next(arriving, None)) is not None:
        path = job.spill.folder / f"trajectory-{len(found):05d}.safetensors"
        found.append(spilled(trajectory, path, shelf))
        del trajectory  # or there would be two of them while the next one is made
    return found


class SplitRows(nn.Module):
    """A denoiser whose rows are run by several processes, each its part; every process gets the predictions of all.

    The result and the gradient with respect to the sample are those of the whole batch, on all processes. The
    gradients of parameters are those of this process's rows: their sum over the processes is that of the whole batch.
    Which arguments have rows is told as in `calibrate.select`: tensors with as many as the sample has.
    """

    def __init__(self, denoiser: nn.Module, processes: Processes) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.processes = processes
        self._sample = next(iter(inspect.signature(denoiser.forward).parameters))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """`[B', C', ...]`, the prediction for all rows. Raises CalibrationError if the first argument is no tensor."""
        sample = args[0] if args else kwargs.get(self._sample)
        if not isinstance(sample, Tensor) or sample.ndim < 2:
            raise CalibrationError(
                f"{type(self.denoiser).__name__} was called without a batch of samples in {self._sample!r}, its first "
                "argument, so its rows cannot be split between processes: calibrate in one process."
            )
        rows = _Rows(self.processes, sample.shape[0])

        def take(value: Any) -> Any:
            if isinstance(value, Tensor):
                return rows.take(value)
            if isinstance(value, Mapping):
                return {key: take(item) for key, item in value.items()}
            return type(value)([take(item) for item in value]) if isinstance(value, list | tuple) else value

        prediction = prediction_of(self.denoiser(*take(args), **take(kwargs)))
        found: Tensor = _Gathered.apply(prediction, rows)  # type: ignore[no-untyped-call]
        return found


def row_by_row(job: Job) -> nn.Module:
    """The job's denoiser, with its rows split where there are several processes."""
    processes = job.run.processes
    return job.denoiser if processes.count == 1 else SplitRows(job.denoiser, processes)


class _Rows:
    """Which of `total` rows are whose: equally many each, the last row again where they do not suffice."""

    def __init__(self, processes: Processes, total: int) -> None:
        self.total, self._processes = total, processes
        self._each = -(-total // processes.count)
        self._start = processes.rank * self._each
        self._own = torch.arange(self._start, self._start + self._each).clamp_max(total - 1)

    def take(self, value: Tensor) -> Tensor:
        """The own rows of a value that has rows; a value that has none as it is."""
        if value.ndim == 0 or value.shape[0] != self.total:
            return value
        if value.requires_grad and torch.is_grad_enabled():
            found: Tensor = _Taken.apply(value, self)  # type: ignore[no-untyped-call]
            return found
        return self.own(value)

    def own(self, whole: Tensor) -> Tensor:
        return whole[self._own.to(whole.device)]

    def own_gradient(self, whole: Tensor) -> Tensor:
        """0 for a row that only fills up."""
        missing = self._each * self._processes.count - self.total
        filled = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
        return filled[self._start : self._start + self._each]

    def whole(self, own: Tensor) -> Tensor:
        return self._processes.all_rows(own)[: self.total]


class _Taken(torch.autograd.Function):
    """Own rows of a tensor that every process has; its gradient is put together from all processes."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        return rows.own(whole)

    @staticmethod
    def backward(ctx: Any, own: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.whole(own), None


class _Gathered(torch.autograd.Function):
    """All rows from the own ones; every process has the gradient of all and takes its own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        return rows.whole(own)

    @staticmethod
    def backward(ctx: Any, whole: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.own_gradient(whole), None


def agree_(job: Job, given: Collection[str]) -> None:
    """After a stage that gave these nouns: every process takes the first one's model.

    Stages that are not split are computed by every process. They end alike on machines of one kind; on different ones
    they may not, and models that drift apart would be averaged into something else.
    Raises SpecError if the processes chose different samples or plans, or their models have different tensors.
    """
    processes = job.run.processes
    if processes.count == 1:
        return
    for noun in ("calibration", "plan"):
        if noun in given:
            processes.check_same(f"results for {noun}", job.handed[noun])
    if "model" in given:
        state: Callable[[], dict[str, Tensor]] = job.denoiser.state_dict
        kinds = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in state().items()}
        processes.check_same("tensors in the model", kinds)
        processes.take_first_(state())
