"""Runs by several processes, forked from one that has imported everything: `python tests/together.py FOLDER`.

Leaves what they made in the folder, and `results.json` with how they ended. `reliability/test_processes.py` looks at
both.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

COUNTS = (1, 2, 4)
PATIENCE = 300.0
"""Seconds after which processes count as stuck."""

SETTINGS = """
method: accuquant
preset: quick
weights: 4
activations: 8
steps: 2
calibration_samples: 6
options: {batch: 4, window: 2, block_iterations: 2, iterations: 22}
"""


def main(folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    import stepquant.api
    import stepquant.cli.evaluate  # noqa: F401

    make_model(folder)
    results: dict[str, Any] = {}
    for count in COUNTS[:2]:
        results[f"quantize {count}"] = run(folder, count, command("quantize", "model", "-o", f"out{count}", *QUANTIZE))
    for count in COUNTS:
        evaluation = ("out1", "--seeds", "1000-1010", "--batch-size", "4", "--json", f"evaluation{count}.json")
        results[f"evaluate {count}"] = run(folder, count, command("evaluate", *evaluation))
        images = ("out1", "-o", f"images{count}", "--seeds", "0-6", "--batch-size", "2", "--grid", *EXACT)
        results[f"sample {count}"] = run(folder, count, command("sample", *images))
        results[f"library {count}"] = run(folder, count, lambda: library())
    for count in COUNTS[1:]:
        results[f"gradients {count}"] = run(folder, count, lambda: gradients())
    results |= failures(folder)
    (folder / "results.json").write_text(json.dumps(results))


QUANTIZE = ("--config", "run.yaml", "--quiet")
EXACT = ("--engine", "simulated")


def failures(folder: Path) -> dict[str, Any]:
    """Runs that one process spoils, and what is left of them."""
    results: dict[str, Any] = {}
    fresh = command("quantize", "model", "-o", "broken", *QUANTIZE)
    results["all fail"] = run(folder, 2, command("quantize", "model", "-o", "out1", *QUANTIZE))
    results["wrong usage"] = run(folder, 2, command("quantize", "model", "--no-such-option"))
    results["not split"] = run(folder, 2, command("inspect", "out1"))
    results["one fails"] = run(folder, 2, spoilt(fresh, "stepquant.calibrate.split", "record", rank=1, how=complain))
    results["one is killed"] = run(folder, 2, spoilt(fresh, "stepquant.calibrate.split", "record", rank=1, how=die))
    resumed = command("quantize", "model", "-o", "resumed", *QUANTIZE, "--resume")
    spoiling = spoilt(resumed, "stepquant.calibrate.window_fitting", "annealed_beta", rank=1, how=die, after=20)
    results["killed late"] = run(folder, 2, spoiling)
    results["work is kept"] = sorted(path.name for path in (folder / "resumed.work").glob("*"))
    results["resumed"] = run(folder, 2, resumed)
    return results


def make_model(folder: Path) -> None:
    """`folder/model`, a UNet of some thousand parameters, and `folder/run.yaml`."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
        norm_num_groups=4,
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder / "model")
    (folder / "run.yaml").write_text(SETTINGS)


def command(*arguments: str) -> Callable[[], None]:
    """What a process does that the command line has started."""

    def work() -> None:
        from stepquant.cli.main import main as stepquant

        stepquant(arguments)

    return work


def complain() -> None:
    from stepquant.errors import CalibrationError

    raise CalibrationError("A cosmic ray came through the roof.")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def spoilt(
    work: Callable[[], None], module: str, name: str, *, rank: int, how: Callable[[], None], after: int = 0
) -> Callable[[], None]:
    """`work`, in which a function of a module goes wrong in one process, after so many calls."""

    def spoilt_work() -> None:
        if os.environ["RANK"] == str(rank):
            holder = importlib.import_module(module)
            before, left = getattr(holder, name), after

            def broken(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    how()
                return before(*args, **kwargs)

            setattr(holder, name, broken)
        work()

    return spoilt_work


def run(folder: Path, count: int, work: Callable[[], None]) -> dict[str, Any]:
    """Fork so many processes as a launcher starts them: their exit statuses, what they printed, and seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    started = [_forked(folder, rank, count, port, work) for rank in range(count)]
    statuses = [_ended(process, began + PATIENCE) for process in started]
    logs = [(folder / f"log{rank}").read_text() for rank in range(count)]
    return {"statuses": statuses, "logs": logs, "seconds": time.monotonic() - began}


def _forked(folder: Path, rank: int, count: int, port: int, work: Callable[[], None]) -> int:
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        os.chdir(folder)
        if count > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        log = os.open(f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return 0


def _ended(process: int, deadline: float) -> int | None:
    """Exit status, negative for a signal; None for one that had to be ended."""
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None
        time.sleep(0.005)


def library() -> None:
    """Images, and a calibration stage by stage, as Python calls them; `library{count}.safetensors` and `.json`."""
    from safetensors.torch import save_file

    from stepquant.api import load, sample
    from stepquant.processes import joined, leave

    processes = joined()
    images = sample(load("out1", engine="simulated"), seeds=range(7), steps=2, batch_size=3, processes=processes)
    processes.check_same("images", images.numpy().tobytes())
    tensors, figures = calibrated()
    if processes.first:
        save_file({"images": images, **tensors}, f"library{processes.count}.safetensors")
        Path(f"library{processes.count}.json").write_text(json.dumps(figures))
    processes.wait()
    leave()


class Kept:
    """A keeper in memory: what stages keep inside is what they have learnt, before it is rounded."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}

    def save(self, name: str, tensors: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        self.tensors |= {f"{name}.{key}": value.detach().clone() for key, value in tensors.items()}

    def load(self, name: str) -> None:
        return None


def calibrated() -> tuple[dict[str, Any], list[Any]]:
    """What is recorded, what stages have learnt by the end, and the figures of all stages."""
    from stepquant.api import open_model
    from stepquant.calibrate.bias_correction import CorrectBiases
    from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks, without_input_quantizers
    from stepquant.calibrate.split import agree_
    from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
    from stepquant.calibrate.window_fitting import FitWindows
    from stepquant.processes import joined
    from stepquant.recipe import Job
    from stepquant.run import Run

    processes = joined()
    pipe = open_model("model")
    full_precision = pipe.unet.eval()
    job = Job(pipe, full_precision, copy.deepcopy(full_precision), Run(processes=processes), 2)
    figures, tensors = [], {}
    for stage in (Record(6, 4), Select(), Place(4, 8), FitWeightRanges(), FitInputRanges()):
        figures.append(stage.run(job))
    recorded = {f"recorded.{n}": one.steps[-1].next_sample for n, one in enumerate(job.handed["trajectories"])}
    tensors |= recorded | {f"placed.{name}": tensor for name, tensor in job.denoiser.state_dict().items()}
    # Each from the same model: the rounding of a learnt weight can turn on the last bit of what was learnt before.
    stages: tuple[tuple[Any, bool], ...] = (
        (RoundBlocks(iterations=3, batch=5, lr=1e-2, warmup=0.0, together=100), False),
        (ScaleBlocks(iterations=3, batch=5, together=100), False),
        # A level of an activation turns on the last bit, too: two iterations, the second behind the first one's steps.
        (FitWindows(window=2, iterations=2, gradient="exact", lr_weights=1e-2, warmup=0.0), False),
        # Without levels of activations a fit is smooth and may be compared for longer.
        (FitWindows(window=2, iterations=20, gradient="exact", lr_weights=1e-2, warmup=0.0), True),
        # Judged on mini-batches that the processes share: they must choose alike.
        (FitWindows(window=2, iterations=2, learn_weights=False, lr_weight_scales=1e-2, judged=6), False),
        (CorrectBiases(samples=6, judged=6), False),
    )
    for stage, smooth in stages:
        keeper = Kept()
        own = replace(job, denoiser=copy.deepcopy(job.denoiser), handed=dict(job.handed), keeper=keeper)
        with without_input_quantizers(own.denoiser) if smooth else nullcontext():
            figures.append(stage.run(own))
        agree_(own, stage.gives)
        state = own.denoiser.state_dict()
        processes.check_same("models", {name: tensor.numpy().tobytes() for name, tensor in state.items()})
        tensors |= {f"{type(stage).__name__}.{key}": value for key, value in keeper.tensors.items()}
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, figures


def gradients() -> None:
    """Gradients of windows whose rows are split are those of the whole mini-batch, in float64."""
    import torch
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    import tiny
    from stepquant.calibrate.split import SplitRows
    from stepquant.calibrate.trajectory import record, seal
    from stepquant.calibrate.windows import window_gradient
    from stepquant.model.pipeline import DenoiserPipeline
    from stepquant.processes import joined, leave
    from stepquant.run import Run

    processes = joined()
    for scheduler in (DDIMScheduler(clip_sample=False), DPMSolverMultistepScheduler(solver_order=2)):
        torch.manual_seed(0)
        exact = tiny.TinyNet().double()
        pipe = DenoiserPipeline(exact, scheduler, sample_shape=(2, 4, 4))
        (trajectory,) = (seal(one) for one in record(pipe, exact, seeds=range(3), steps=4, batch_size=3, run=Run()))
        student = copy.deepcopy(exact)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        for mode in ("identity", "exact", "per_step"):
            whole, whole_loss = _gradient(window_gradient, student, student, trajectory, mode)
            split, loss = _gradient(window_gradient, SplitRows(student, processes), student, trajectory, mode)
            alone = [gradient.clone() for gradient in split]
            processes.sum_(split)
            assert abs(loss - whole_loss) < 1e-12 * abs(whole_loss), (mode, loss, whole_loss)
            for one, other, own in zip(split, whole, alone, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))
                assert not torch.allclose(own, other, rtol=1e-3), "nothing was split"
    processes.wait()
    leave()


def _gradient(window_gradient: Any, denoiser: Any, student: Any, trajectory: Any, mode: str) -> tuple[list[Any], float]:
    student.zero_grad(set_to_none=True)
    loss = window_gradient(denoiser, trajectory, 0, len(trajectory.steps), mode=mode)
    return [parameter.grad.clone() for parameter in student.parameters()], loss


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
