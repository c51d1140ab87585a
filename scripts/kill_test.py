#!/usr/bin/env python
"""Kill `stepquant quantize`, `evaluate` and `compensate` again and again, go on with `--resume`, and compare.

    .venv/bin/python scripts/kill_test.py --kills 50

A process that has imported everything is forked for each run, so a run costs seconds; the kills are SIGKILL all the
same. They come in two ways: at random times, and right after a file or folder was renamed (counted, so that every place
where a run commits to something is hit), which times alone would hardly ever meet. Compared are all bytes of the
checkpoint but the date, the settings, the figures but the seconds, and the evaluation, with those of undisturbed runs;
and that nothing else is left.

Exits with 1 and says what differs if a run does not end as the undisturbed one did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONG = """
method: accuquant
preset: quick
weights: 4
activations: 8
steps: 4
seed: 3
calibration_samples: 2
options: {batch: 2, window: 2, block_iterations: 1, iterations: 21}
"""
"""Every stage of the method, and one state kept inside its longest, after the twentieth iteration."""

SHORT = LONG.replace("steps: 4", "steps: 2").replace("window: 2", "window: 1")
"""With --short, and with a model of fewer layers."""

PATIENCE = 300.0
"""Seconds after which a run counts as stuck."""


def main() -> int:
    """Returns the exit status."""
    options = parsed()
    import_everything()
    with tempfile.TemporaryDirectory(prefix="stepquant-kill-") as name:
        folder = Path(name)
        make_model(folder, short=options.short)
        tasks: list[Task] = [Quantize(folder), Compensate(folder)]
        if not options.short:
            tasks.insert(1, Evaluate(folder))
        for task in tasks:
            chance = random.Random(options.seed)
            took = undisturbed(task)
            print(f"{task.name}, undisturbed: {took:.1f} s")
            kills = timed(task, options.kills, took, chance)
            print(f"{task.name}, {kills} kills at random times: the same bytes and figures")
            kills = counted(task, options.renames, chance)
            print(f"{task.name}, {kills} kills after a rename: the same bytes and figures")
    return 0


class Task(ABC):
    """A command, what it leaves, and what an undisturbed run left.

    arguments: of the command. files: what is there after it, beside the checkpoint.
    """

    name: str
    arguments: tuple[str, ...]
    files: tuple[str, ...]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected: dict[str, Any] = {}

    @abstractmethod
    def contents(self) -> dict[str, Any]:
        """All that it leaves, by name, without what may differ."""

    @abstractmethod
    def clear(self) -> None:
        """Make room for the next run."""


class Quantize(Task):
    """May differ: the date and the seconds."""

    name = "quantize"
    arguments = ("quantize", "model", "-o", "out", "--config", "run.yaml", "--resume", "--quiet")
    files = ("out", "out.figures.jsonl", "out.run.yaml")

    def contents(self) -> dict[str, Any]:
        """The checkpoint's bytes, the settings and the figures."""
        return checkpoint_of(self.folder / "out") | {"settings": (self.folder / "out.run.yaml").read_text()}

    def clear(self) -> None:
        """Remove the checkpoint and what is beside it."""
        shutil.rmtree(self.folder / "out")
        for name in self.files[1:]:
            (self.folder / name).unlink()


class Evaluate(Task):
    """Of the checkpoint that `Quantize` left last. May differ: the date."""

    name = "evaluate"
    arguments = ("evaluate", "out", "--seeds", "1000-1023", "--batch-size", "4", "--resume", "--quiet")
    files = (*Quantize.files, "out.evaluation.json")

    def contents(self) -> dict[str, Any]:
        """The results."""
        found: dict[str, Any] = json.loads((self.folder / "out.evaluation.json").read_text())
        del found["date"]
        return found

    def clear(self) -> None:
        """Remove the results."""
        (self.folder / "out.evaluation.json").unlink()


class Compensate(Task):
    """Of the checkpoint that `Quantize` left last. May differ: the date and the seconds."""

    name = "compensate"
    arguments = (
        *("compensate", "out", "-o", "corrected", "--calibration-samples", "4", "--batch-size", "2"),
        *("--resume", "--quiet"),
    )

    @property
    def files(self) -> tuple[str, ...]:
        """What the tasks before have left stays."""
        made = ("corrected", "corrected.figures.jsonl", "corrected.compensate.json")
        return (*(name for name in Evaluate.files if (self.folder / name).exists()), *made)

    def contents(self) -> dict[str, Any]:
        """The checkpoint's bytes, the settings and the figures."""
        settings = (self.folder / "corrected.compensate.json").read_text()
        return checkpoint_of(self.folder / "corrected") | {"settings": settings}

    def clear(self) -> None:
        """Remove the corrected checkpoint and what is beside it."""
        shutil.rmtree(self.folder / "corrected")
        for name in ("corrected.figures.jsonl", "corrected.compensate.json"):
            (self.folder / name).unlink()


def checkpoint_of(root: Path) -> dict[str, Any]:
    """The bytes of a checkpoint but its date, and its figures but their seconds."""
    found: dict[str, Any] = {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }
    manifest = json.loads(found["stepquant.json"])
    del manifest["created"], found["stepquant.json.sha256"]
    lines = root.with_name(f"{root.name}.figures.jsonl").read_text().splitlines()
    figures = [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]
    return found | {"stepquant.json": manifest, "figures": figures}


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Kill quantize at many points; see the head of this file.")
    parser.add_argument("--kills", type=int, default=50, help="kills at random times")
    parser.add_argument("--renames", type=int, default=50, help="kills right after a rename")
    parser.add_argument(
        "--short", action="store_true", help="a smaller model, without evaluate: for continuous integration"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    return parser.parse_args()


def import_everything() -> None:
    """What a run imports, once. One thread, so that forking is safe and sums are always divided alike."""
    import torch

    torch.set_num_threads(1)
    import stepquant.api
    import stepquant.cli.compensate
    import stepquant.cli.evaluate  # noqa: F401


def make_model(folder: Path, *, short: bool) -> None:
    """`folder/model`, a UNet of some thousand parameters, and `folder/run.yaml`."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,  # SSIM has no place for its window in 8 x 8 pixels
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,) if short else (8, 16),
        down_block_types=("DownBlock2D",) if short else ("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("UpBlock2D",) if short else ("AttnUpBlock2D", "UpBlock2D"),
        add_attention=not short,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder / "model")
    (folder / "run.yaml").write_text(SHORT if short else LONG)


def started(task: Task, *, kill_after: int | None = None) -> int:
    """Fork a process that runs the command; its number.

    kill_after: the process kills itself after that many renames.
    """
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        os.chdir(task.folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if kill_after is not None:
            die_after_renames(kill_after)
        from stepquant.cli.main import main as stepquant

        stepquant(task.arguments)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    finally:
        os._exit(status)
    return 0


def die_after_renames(count: int) -> None:
    """SIGKILL this process when it has renamed `count` files or folders."""
    left = count

    def counting(rename: Callable[..., Any]) -> Callable[..., Any]:
        def renamed(path: Path, target: Path) -> Any:
            nonlocal left
            result = rename(path, target)
            # The note of who has the lock is written by every process and is no part of the work.
            if Path(target).name != "owner.json":
                left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return renamed

    for name in ("rename", "replace"):
        setattr(Path, name, counting(getattr(Path, name)))


def ended(process: int, within: float) -> int | None:
    """Exit status of the process, negative for a signal; None if it is still running after so many seconds."""
    deadline = time.monotonic() + within
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def undisturbed(task: Task) -> float:
    """Run once without a kill; seconds."""
    began = time.monotonic()
    if ended(started(task), PATIENCE) != 0:
        raise SystemExit(f"The undisturbed run failed:\n{(task.folder / 'log').read_text()}")
    took = time.monotonic() - began
    task.expected = task.contents()
    return took


def timed(task: Task, kills: int, took: float, chance: random.Random) -> int:
    """Kill at random times until there were so many kills and the last run is done; the number of kills."""
    done = 0
    while done < kills:
        task.clear()
        while True:
            process = started(task)
            status = ended(process, chance.uniform(0, 1.1 * took) if done < kills else PATIENCE)
            if status is not None:
                break
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            done += 1
        compare(task, status)
    return done


def counted(task: Task, kills: int, chance: random.Random) -> int:
    """Kill after a few renames, again and again, until there were so many kills; the number of kills."""
    done = 0
    while done < kills:
        task.clear()
        while True:
            status = ended(started(task, kill_after=chance.randint(1, 6) if done < kills else None), PATIENCE)
            if status != -signal.SIGKILL:
                break
            done += 1
        compare(task, status)
    return done


def compare(task: Task, status: int | None) -> None:
    """Compare what a run has left with what the undisturbed one left."""
    if status != 0:
        raise SystemExit(f"A resumed run ended with {status}:\n{(task.folder / 'log').read_text()}")
    found, expected = task.contents(), task.expected
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if different:
        raise SystemExit(f"A resumed run left something else: {', '.join(different)}.")
    left = {path.name for path in task.folder.iterdir()} - {"model", "run.yaml", "log"}
    if left != set(task.files):
        raise SystemExit(f"A resumed run left more or less than it should: {', '.join(sorted(left))}.")


if __name__ == "__main__":
    sys.exit(main())
