"""One process at a time, stages that commit at once, disks that are full or read-only, and damage that is named."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from stepquant import checkpoint, work_folder
from stepquant.api import open_model, quantize
from stepquant.calibrate.stages import Place, Record
from stepquant.cli.main import main
from stepquant.errors import CalibrationError, SpecError
from stepquant.methods import METHODS
from stepquant.recipe import Job, Recipe
from stepquant.run import Run
from stepquant.work_folder import hold
from tiny import small_unet

QUICK = ("--method", "rtn", "--steps", "2", "--calibration-samples", "2", "--set", "batch=2", "--quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model") / "model"
    DDIMPipeline(small_unet(), DDIMScheduler()).save_pretrained(folder)
    return folder


Stepquant = Callable[..., tuple[int, str]]


@pytest.fixture
def stepquant(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Stepquant:
    """One command in this process: exit status, and what it said."""
    monkeypatch.setattr("stepquant.cli.work.tune_allocator", lambda: True)

    def once(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, captured.out + captured.err

    return once


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def another_process_holds(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is in `hold` of the folder until it is killed. Like `hold`, but without importing torch."""
    code = (
        "import json, os, socket, sys\n"
        "from filelock import FileLock\n"
        f"lock = FileLock({str(folder / 'lock')!r}); lock.acquire()\n"
        f"json.dump({{'process': os.getpid(), 'machine': 'm'}}, open({str(folder / 'owner.json')!r}, 'w'))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_processes_in_one_folder(model: Path, stepquant: Stepquant, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.work"
    with another_process_holds(work) as other:
        (work / "run.yaml").write_text("model: x\n")
        before = contents(work)
        for more in ((), ("--resume",), ("--overwrite",)):
            status, said = stepquant("quantize", model, "-o", out, *QUICK, *more)
            assert status == 2
            assert f"Process {other.pid} on m is at work in {work}" in said.replace("\n", " ")
            assert contents(work) == before
        pipe = DDIMPipeline(small_unet(), DDIMScheduler())
        with pytest.raises(SpecError, match=f"Process {other.pid} on m is at work"):
            quantize(pipe, METHODS["rtn"](samples=2, batch=2), steps=2, run=Run(work=work))
        assert not out.exists()
    # The kernel gives the lock of a killed process back.
    assert stepquant("quantize", model, "-o", out, *QUICK, "--resume")[0] == 0
    assert not work.exists()


def test_a_hold_may_be_nested_and_ends(tmp_path: Path) -> None:
    with hold(tmp_path), hold(tmp_path):
        assert json.loads((tmp_path / "owner.json").read_text())["process"] == os.getpid()
    with another_process_holds(tmp_path), pytest.raises(SpecError), hold(tmp_path):
        pass
    with suppress(KeyError), hold(tmp_path):
        raise KeyError
    with hold(tmp_path):
        pass


@dataclass(frozen=True)
class Shift:
    """Adds to every bias: running it twice on its own result shows."""

    amount: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset({"model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def run(self, job: Job) -> dict[str, Any]:
        with torch.no_grad():
            job.denoiser.conv_in.bias += self.amount
        return {"sum": float(job.denoiser.conv_in.bias.sum())}


class Killed(BaseException):
    """Stands for SIGKILL at one place in the code."""


@pytest.mark.parametrize("place", ["before stages.json", "after stages.json"])
def test_a_stage_that_is_killed_while_it_commits(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    """Its results are written but it is not known to have finished: it starts from what it was given, once."""
    rtn = METHODS["rtn"](samples=2, batch=2)
    recipe = Recipe("shifted", (*rtn.stages[:2], *rtn.stages[2:], Shift(1.0), Shift(2.0)))
    expected = quantize(open_model(str(model)), recipe, steps=2)
    write, armed = work_folder._write_text, [True]

    def killing(path: Path, text: str) -> None:
        last = path.name == "stages.json" and json.loads(text)[-1]["stage"] == "Shift" and armed[0]
        if last and place == "before stages.json":
            armed[0] = False
            raise Killed
        write(path, text)
        if last:
            armed[0] = False
            raise Killed

    monkeypatch.setattr(work_folder, "_write_text", killing)
    run = Run(work=tmp_path / "work")
    with pytest.raises(Killed):
        quantize(open_model(str(model)), recipe, steps=2, run=run)
    found = quantize(open_model(str(model)), recipe, steps=2, run=run, resume=True)
    assert torch.equal(found.pipe.unet.conv_in.bias, expected.pipe.unet.conv_in.bias)
    assert [entry.get("sum") for entry in found.figures] == [entry.get("sum") for entry in expected.figures]
    models = sorted(path.name for path in (tmp_path / "work").glob("model-*"))
    last = len(recipe.stages) - 1
    assert models == [f"model-{last:02d}.json", f"model-{last:02d}.safetensors"], "what is outlived is removed"


@pytest.mark.parametrize("place", ["save", "dump", "remove_work"])
def test_a_run_that_is_killed_around_its_end(
    model: Path, stepquant: Stepquant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    """After the checkpoint is complete, `--resume` only does what is left, and says so the second time."""
    from stepquant.cli import outputs, work

    out = tmp_path / "out"
    where = outputs if place == "remove_work" else work
    original = getattr(where, place, None)
    if place == "save":
        from stepquant.api import Quantized

        original = Quantized.save
        monkeypatch.setattr(Quantized, "save", lambda *a, **k: (original(*a, **k), (_ for _ in ()).throw(Killed()))[1])
    else:

        def killing(*arguments: Any) -> None:
            if place == "remove_work" or Path(arguments[1]).name == "out.run.yaml":
                raise Killed
            original(*arguments)  # type: ignore[misc]

        monkeypatch.setattr(where, place, killing)
    with pytest.raises(Killed):
        main(["quantize", str(model), "-o", str(out), *QUICK])
    monkeypatch.undo()
    monkeypatch.setattr("stepquant.cli.work.tune_allocator", lambda: True)
    assert (tmp_path / "out.work").is_dir()
    complete = contents(out)
    status, said = stepquant("quantize", model, "-o", out, *QUICK)
    assert (status, "--overwrite" in said) == (2, True)
    status, said = stepquant("quantize", model, "-o", out, *QUICK, "--weights", 8, "--resume")
    assert (status, "--overwrite" in said) == (2, True), "the checkpoint of other settings is not this run's"
    for _ in range(2):
        status, said = stepquant("quantize", model, "-o", out, *QUICK[:-1], "--resume")
        assert (status, "is complete: nothing was left to do" in said.replace("\n", " ")) == (0, True), said
        assert contents(out) == complete
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.figures.jsonl", "out.run.yaml"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("run.json", "{"), ("stages.json", "[1, 2]"), ("plan-02.json", "[]"), ("model-*.json", ""), ("model-*.s*", "x")],
)
def test_damage_in_a_work_folder_is_named(model: Path, tmp_path: Path, name: str, text: str) -> None:
    class Stop(Shift):
        def run(self, job: Job) -> dict[str, Any]:
            raise Killed

    stages = METHODS["rtn"](samples=2, batch=2).stages
    run, recipe = Run(work=tmp_path / "work"), Recipe("stopped", (*stages, Stop()))
    with pytest.raises(Killed):
        quantize(open_model(str(model)), recipe, steps=2, run=run)
    (path,) = (tmp_path / "work").glob(name)
    path.write_text(text)
    with pytest.raises(CalibrationError, match=r"is damaged or missing .*Remove .*work and start anew") as error:
        quantize(open_model(str(model)), recipe, steps=2, run=run, resume=True)
    assert path.with_suffix("").name in str(error.value)


def test_the_shape_of_what_a_stage_may_give() -> None:
    """Only what the folder can keep: this list and the stages' must not drift apart."""
    from stepquant.methods import STAGES

    given = set().union(*(stage.gives for stage in STAGES.values()))
    assert given <= set(work_folder._KEPT)
    assert {"model", "plan"} <= Place.gives
    # Trajectories have no number in their name, so no stage may change those of another.
    assert not [name for name, stage in STAGES.items() if "trajectories" in stage.gives & stage.needs]
    assert "trajectories" in Record.gives


def no_space(*_arguments: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["stage", "checkpoint", "settings"])
def test_a_full_disk_leaves_what_was_there(
    model: Path, stepquant: Stepquant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    out = tmp_path / "out"
    assert stepquant("quantize", model, "-o", out, *QUICK)[0] == 0
    (tmp_path / "out.evaluation.json").write_text("{}")
    before = contents(out)
    with monkeypatch.context() as full:
        if what == "stage":
            full.setattr(work_folder, "save_file", no_space)
        elif what == "checkpoint":
            full.setattr(checkpoint, "write_tensors", no_space)
        else:
            full.setattr("stepquant.cli.work.dump", no_space)
        status, said = stepquant("quantize", model, "-o", out, *QUICK, "--overwrite", "--weights", 8)
    assert status == 1
    assert "No space left on device" in said
    if what != "settings":
        named = {"stage": "out.work", "checkpoint": str(out)}[what]
        assert named in said.replace("\n", "")
    assert contents(out) == before
    assert (tmp_path / "out.evaluation.json").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".partial", ".old", ".removed"))]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs, where root can mount one; otherwise the test is skipped."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("mounting a file system takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a file system takes root")
def test_a_small_disk_that_fills(model: Path, stepquant: Stepquant, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    # A run takes about 400 kB of work folder; the disk is grown until one fits, so every writer meets the end.
    with mounted(disk, "size=4m"):
        assert stepquant("quantize", model, "-o", disk / "out", *QUICK)[0] == 0
        before = contents(disk / "out")
        outcomes = []
        for free in (4, 40, 120, 250, 4000):
            used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*") if path.is_file()) // 1024
            subprocess.run(["mount", "-o", f"remount,size={used + free}k", str(disk)], check=True)
            status, said = stepquant("quantize", model, "-o", disk / "out", *QUICK, "--overwrite", "--weights", 8)
            outcomes.append(status)
            if status == 0:
                break
            assert "No space left on device" in said, said
            assert str(disk) in said
            assert contents(disk / "out") == before
        assert outcomes[0] == 1
        assert outcomes[-1] == 0
        assert contents(disk / "out") != before


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no such permissions")
def test_a_folder_that_cannot_be_written(model: Path, stepquant: Stepquant, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    if os.geteuid() == 0:
        with mounted(disk, "ro,size=1m"):
            refuses_to_write(model, stepquant, disk)
    else:
        disk.mkdir()
        disk.chmod(0o555)
        refuses_to_write(model, stepquant, disk)


def refuses_to_write(model: Path, stepquant: Stepquant, disk: Path) -> None:
    status, said = stepquant("quantize", model, "-o", disk / "out", *QUICK)
    assert status == 2
    assert f"Error: {disk / 'out'} cannot be written: {disk} is read-only for this user." in said
    status, said = stepquant("quantize", model, "-o", disk / "out", *QUICK, "--log-file", disk / "log")
    assert status == 1
    assert f"{disk / 'log'}: " in said
    assert list(disk.iterdir()) == []


def test_what_killed_processes_left_is_tidied(model: Path, stepquant: Stepquant, tmp_path: Path) -> None:
    """Killed between the two renames of a replacement, the old checkpoint is aside under another name."""
    out = tmp_path / "out"
    assert stepquant("quantize", model, "-o", out, *QUICK)[0] == 0
    before = contents(out)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = checkpoint._HOST
    aside, half = (tmp_path / f".out.{host}-{ended.pid}.{kind}" for kind in ("old", "partial"))
    foreign = tmp_path / f".out.elsewhere-{ended.pid}.partial"
    running = tmp_path / f".out.{host}-{os.getppid()}.partial"
    out.rename(aside)
    for folder in (half, foreign, running):
        folder.mkdir()
    checkpoint._tidy_after_killed(out)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.glob(".out.*")) == sorted([foreign.name, running.name])
