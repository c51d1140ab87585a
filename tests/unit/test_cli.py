"""The commands: what they refuse, write and say. The library behind them is replaced by fakes."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from stepquant.calibrate.estimate import Estimate
from stepquant.cli import compensate, evaluate, report, views, work
from stepquant.cli.arguments import bytes_named
from stepquant.cli.commands import app
from stepquant.cli.console import BarProgress, LineProgress, duration, json_text
from stepquant.cli.main import arranged, main
from stepquant.cli.seeds import format_seeds, parse_seeds
from stepquant.errors import ModelError, SpecError
from stepquant.evaluate.images import save_png
from stepquant.manifest import PipelineIdentity
from stepquant.numerics.spec import LayerScheme, scheme_for
from stepquant.recipe import Recipe
from stepquant.work_folder import OtherRun

SEEDS = list(range(1000, 1004))


class FakePipe:
    """Has a denoiser, for the plan."""

    def __init__(self) -> None:
        self.unet = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1))

    def __call__(self, batch_size: int = 1, num_inference_steps: int = 50) -> Any: ...


class FakeWalks:
    """Fakes walk nowhere."""

    def __init__(self, _reference: Any, **_options: Any) -> None: ...

    def add(self, _pipe: Any) -> None: ...

    def found(self) -> dict[str, Any]:
        return {"notes": ["No films."]}


def fake_speed(_reference: Any, load: Callable[[str], Any], **_options: Any) -> dict[str, Any]:
    load("openvino")
    times = {"milliseconds": 2.0, "reference_milliseconds": 5.0, "ratio": 2.5, "low": 2.0, "high": 3.0}
    where = {
        "rounds": 9,
        "device": "cpu",
        "machine": "a machine",
        "threads": 1,
        "torch": "2.13.0",
        "date": "2026-01-02",
    }
    return {"schema": 1, "engines": {"openvino": times}, **where}


@dataclass
class FakeQuantized:
    figures: tuple[dict[str, Any], ...] = ({"stage": "Record", "seconds": 61.0}, {"stage": "Place", "seconds": 0.5})

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        a_checkpoint(folder)


@dataclass
class Library:
    """What the fakes were asked, and how they shall answer."""

    calls: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    failure: BaseException | None = None

    def asked(self, name: str) -> list[Mapping[str, Any]]:
        return [arguments for called, arguments in self.calls if called == name]

    def open_model(self, model: str, *, device: Any = None, scheduler: Any = None) -> FakePipe:
        self.calls.append(("open_model", {"model": model, **({"scheduler": scheduler} if scheduler else {})}))
        if model == "digits-unte":
            raise ModelError("There is no model 'digits-unte'. Did you mean 'digits-unet'?")
        return FakePipe()

    def open_base(self, model: str, _checkpoint: Path, *, device: Any = None) -> FakePipe:
        return self.open_model(model, device=device)

    def open_any(self, source: str, **options: Any) -> tuple[FakePipe, str]:
        self.calls.append(("open_any", {"source": source, **options}))
        return FakePipe(), "checkpoint" if Path(source).exists() else "model"

    def load(self, folder: Path, **options: Any) -> FakePipe:
        self.calls.append(("load", {"folder": folder, **options}))
        return FakePipe()

    def estimate(self, pipe: Any, recipe: Any, **options: Any) -> Estimate:
        self.calls.append(("estimate", {"recipe": recipe, **options}))
        return Estimate(
            network=10**6, recording=2 * 10**9, batch=10**8, caches=3 * 10**9, seconds=75.0, uncounted=("Compensate",)
        )

    def quantize(self, pipe: Any, recipe: Any, **options: Any) -> FakeQuantized:
        self.calls.append(("quantize", {"recipe": recipe, **options}))
        if self.failure is not None:
            (options["run"].work / "stages.json").write_text("[]")
            raise self.failure
        with options["run"].progress.track("Working", 2) as advance:
            advance(2)
        return FakeQuantized()

    def sample(self, pipe: Any, *, seeds: list[int], **options: Any) -> torch.Tensor:
        self.calls.append(("sample", {"seeds": seeds, **options}))
        return torch.rand(len(seeds), 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def compare(self, candidate: Any, against: Any, *, seeds: list[int], steps: int, **options: Any) -> dict[str, Any]:
        self.calls.append(("evaluate", {"seeds": seeds, "steps": steps, **options}))
        return {
            "schema": 1,
            "candidate": "",
            "against": "",
            "n": len(seeds),
            "seeds": [seeds[0], seeds[-1]],
            "steps": steps,
            "scheduler": "DDIMScheduler",
            "features": None,
            "metrics": {"psnr": {"value": 31.5, "low": 30.0, "high": 33.0, "unit": "dB"}},
            "drift": {},
            "images": {"seeds": seeds[:8]},
            "notes": ["No Frechet distances here."],
            "command": "",
            "versions": {"torch": "2"},
            "machine": "fake",
            "date": "2026-01-02",
        }


def a_checkpoint(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "stepquant.json").write_text("{}")
    return folder


def describe(folder: Path) -> dict[str, Any]:
    layer = {"name": "conv_in", "bits": {"weight": 8, "input": 8}, "bytes": 90, "engine": "reference", "refusals": {}}
    return {"base_model": "digits-unet", "schedule": {"steps": 20}, "bytes": 1234, "layers": [layer]}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    fake = Library()
    for name in ("open_model", "open_base", "open_any", "load", "estimate", "quantize", "sample"):
        monkeypatch.setattr(work.api, name, getattr(fake, name))
    monkeypatch.setattr(evaluate, "compare", fake.compare)
    for module in (work, evaluate, compensate, report):
        monkeypatch.setattr(module, "inspect_checkpoint", describe)
    monkeypatch.setattr("stepquant.inspection.inspect_checkpoint", describe)
    monkeypatch.setattr(work, "tune_allocator", lambda: True)
    monkeypatch.setattr("stepquant.report.groups.rows_over_time", lambda _pipe: ([], torch.zeros(0, 1), [0.0]))
    monkeypatch.setattr("stepquant.report.walks.Walks", FakeWalks)
    monkeypatch.setattr(report, "measure_speed", fake_speed)
    return fake


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command as a user does; exit status, standard output and standard error."""

    def once(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = exit_.value.code
        return (code if isinstance(code, int) else 0), out, err

    return once


def test_help_comes_without_torch() -> None:
    code = (
        "import sys\nfrom stepquant.cli import main\n"
        "try:\n    main(['quantize', '--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'torch', 'diffusers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "quantize",
        "sample",
        "evaluate",
        "compensate",
        "report",
        "doctor",
        "allocate",
        "inspect",
        "methods",
        "check",
        "demo",
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output) > 200


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("quantize", ["combined", "4", "8", "20", "standard"]),
        ("evaluate", ["those of the images, else 1000-1255"]),
        ("sample", ["auto"]),
    ],
)
def test_help_says_what_is_taken_by_default(command: str, defaults: list[str]) -> None:
    """In brackets, which rich takes for markup."""
    shown = CliRunner().invoke(app, [command, "--help"]).output
    text = " ".join(shown.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    for default in defaults:
        assert f"default: {default}" in text, default


def test_ctrl_c_is_told_wherever_it_comes(
    run: Run, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(work.api, "open_model", interrupted)
    monkeypatch.setattr(work.api, "open_any", interrupted)
    for words in (("quantize", "digits-unet", "-o", tmp_path / "x"), ("sample", "digits-unet", "-o", tmp_path / "y")):
        status, out, err = run(*words)
        assert (status, out) == (130, "")
        assert err.strip().endswith("Interrupted.")


def test_version(run: Run) -> None:
    status, out, _ = run("--version")
    assert (status, out.split()[0]) == (0, "stepquant")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["quantize", "digits-unet"], ["sample", "m", "-o", "x", "--seeds", "3-1"], ["report"], ["--nope"]],
)
def test_wrong_usage_exits_with_2(run: Run, library: Library, arguments: list[str]) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert "Traceback" not in err
    assert library.calls == []


def test_quantize_leaves_a_checkpoint_and_its_settings(run: Run, library: Library, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, text, _ = run("quantize", "digits-unet", "-o", out, "--method", "rtn", "--steps", "7", "--seed", "3")
    assert status == 0
    assert "1 min 2 s" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.figures.jsonl", "out.run.yaml"]
    assert "method: rtn" in (tmp_path / "out.run.yaml").read_text()
    asked = library.asked("quantize")[0]
    assert (asked["steps"], asked["run"].seed, asked["base_model"], asked["resume"]) == (7, 3, "digits-unet", False)


def test_quantize_tells_the_bytes_of_the_layers_from_those_of_the_files(
    run: Run, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated = {"stage": "Allocate", "seconds": 0.5, "layer_bytes": 1000, "checkpoint_bytes": 1200}
    monkeypatch.setattr(work.api, "quantize", lambda *_, **__: FakeQuantized((allocated,)))
    _, out, _ = run("quantize", "digits-unet", "-o", tmp_path / "out")
    assert "is a checkpoint of 1.23 kB" in out
    assert "Its layers have 1.00 kB as a budget counts them" in out


def test_quantize_for_machines(run: Run, library: Library, tmp_path: Path) -> None:
    status, out, _ = run("quantize", "digits-unet", "-o", tmp_path / "out", "--json")
    assert status == 0
    assert json.loads(out)["bytes"] == 1234


def test_settings_come_from_file_then_set_then_options(run: Run, library: Library, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: digits-unet\nmethod: rtn\nsteps: 5\nweights: 8\nactivations: 8\n")
    command = ["quantize", "-o", tmp_path / "out", "--config", config, "--set", "steps=6", "--set", "every=2"]
    assert run(*command, "--weights", "3")[0] == 0
    asked = library.asked("quantize")[0]
    recipe = json.dumps(asked["recipe"].to_dict())
    assert asked["steps"] == 6
    assert '"every": 2' in recipe
    assert '"weights": 3' in recipe


def test_an_existing_output_is_refused_before_any_work(run: Run, library: Library, tmp_path: Path) -> None:
    out = a_checkpoint(tmp_path / "out")
    status, _, err = run("quantize", "digits-unet", "-o", out)
    assert status == 2
    assert "--overwrite" in err
    assert library.calls == []
    assert run("quantize", "digits-unet", "-o", out, "--overwrite")[0] == 0


def test_overwrite_spares_what_is_no_checkpoint(run: Run, library: Library, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    status, _, err = run("quantize", "digits-unet", "-o", tmp_path / "photos", "--overwrite")
    assert status == 2
    assert "no checkpoint of stepquant" in err
    assert library.calls == []


def test_a_new_checkpoint_drops_the_old_evaluation(run: Run, library: Library, tmp_path: Path) -> None:
    out = a_checkpoint(tmp_path / "out")
    (tmp_path / "out.evaluation.json").write_text("{}")
    run("quantize", "digits-unet", "-o", out, "--overwrite")
    assert not (tmp_path / "out.evaluation.json").exists()


def test_ctrl_c_leaves_a_folder_to_resume(run: Run, library: Library, tmp_path: Path) -> None:
    library.failure = KeyboardInterrupt()
    status, _, err = run("quantize", "digits-unet", "-o", tmp_path / "out")
    assert status == 130
    assert "out.work" in err.replace("\n", "")
    assert "--resume" in err
    library.failure = None
    status, _, err = run("quantize", "digits-unet", "-o", tmp_path / "out")
    assert status == 2
    assert "--resume" in err
    assert run("quantize", "digits-unet", "-o", tmp_path / "out", "--resume")[0] == 0
    assert library.asked("quantize")[-1]["resume"] is True
    assert not (tmp_path / "out.work").exists()


def test_what_a_run_that_failed_leaves_is_told_once(
    run: Run, library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another run's work folder says what to do by itself; the advice to correct the setting would contradict it."""
    told = "correct the setting and go on with --resume"
    for failure, times in ((SpecError("this setting is wrong."), 1), (OtherRun("the folder holds another run."), 0)):
        library.failure = KeyboardInterrupt()
        run("quantize", "digits-unet", "-o", tmp_path / "out", "--overwrite")
        library.failure = failure
        caplog.clear()
        status, _, err = run("quantize", "digits-unet", "-o", tmp_path / "out", "--resume")
        assert status == 2
        assert str(failure) in err.replace("\n", " ")
        assert caplog.text.count(told) == times


def test_overwrite_starts_an_interrupted_run_anew(run: Run, library: Library, tmp_path: Path) -> None:
    library.failure = KeyboardInterrupt()
    run("quantize", "digits-unet", "-o", tmp_path / "out")
    library.failure = None
    assert run("quantize", "digits-unet", "-o", tmp_path / "out", "--overwrite")[0] == 0
    assert library.asked("quantize")[-1]["resume"] is False


def test_a_foreign_work_folder_is_not_deleted(run: Run, library: Library, tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    status, _, err = run("quantize", "digits-unet", "-o", tmp_path / "out", "--overwrite")
    assert status == 2
    assert "no work folder" in err
    assert (tmp_path / "out.work").is_dir()


def test_failures_are_one_sentence(run: Run, library: Library, tmp_path: Path) -> None:
    status, _, err = run("quantize", "digits-unte", "-o", tmp_path / "out")
    assert (status, err) == (1, "Error: There is no model 'digits-unte'. Did you mean 'digits-unet'?\n")
    assert list(tmp_path.iterdir()) == []
    status, _, err = run("quantize", "digits-unet", "-o", tmp_path / "out", "--method", "acuquant")
    assert status == 2
    assert "Did you mean 'accuquant'?" in err
    assert list(tmp_path.iterdir()) == []


def test_the_unexpected_is_one_line_unless_debug(run: Run, library: Library, tmp_path: Path) -> None:
    library.failure = RuntimeError("it broke\nin many lines")
    status, _, err = run("quantize", "digits-unet", "-o", tmp_path / "out")
    assert status == 1
    assert err.startswith("Error: RuntimeError: it broke (")
    assert "--debug" in err
    with pytest.raises(RuntimeError, match="it broke"):
        main(["quantize", "digits-unet", "-o", str(tmp_path / "out"), "--resume", "--debug"])


def test_a_dry_run_touches_nothing(run: Run, library: Library, tmp_path: Path) -> None:
    status, out, _ = run("quantize", "digits-unet", "-o", tmp_path / "out", "--dry-run", "--preset", "quick")
    assert status == 0
    assert "FitWindows" in out
    assert "About 5.00 GB of memory" in out
    assert "1 min 15 s and the time of Compensate." in " ".join(out.split())
    assert "Nothing was written." in out
    assert list(tmp_path.iterdir()) == []
    assert library.asked("quantize") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), ("7 kB", 7000), ("12B", 12)],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert bytes_named(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1GB", "8 GX", "1e3", "GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="Expected a size such as 8GB"):
        bytes_named(text)


def test_max_memory_reaches_the_run_and_the_estimate(run: Run, library: Library, tmp_path: Path) -> None:
    command = ["quantize", "digits-unet", "-o", tmp_path / "out", "--max-memory", "1GB"]
    status, out, _ = run(*command, "--dry-run")
    assert status == 0
    assert "About 1.00 GB of memory" in out  # two networks of 1 MB are in it
    assert "5.00 GB of disk" in out  # 2 GB are recorded, 3 GB of caches do not fit
    assert run(*command)[0] == 0
    assert library.asked("quantize")[0]["run"].max_memory == 10**9


@dataclass(frozen=True)
class Placing:
    """A stage that tells its plan and its cost."""

    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()

    def plan(self, denoiser: nn.Module) -> dict[str, LayerScheme]:
        return {"0": scheme_for(4, 8)}

    def evaluations(self, job: Any) -> int:
        return 1000 * int(job.steps)

    def run(self, job: Any) -> dict[str, Any]:
        return {}


def test_the_plan_has_layers_and_cost_where_stages_tell_them(
    run: Run, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepquant.methods.METHODS", {"placing": lambda: Recipe("placing", (Placing(),))})
    monkeypatch.setattr("stepquant.methods.PRESETS", {})
    command = ["quantize", "digits-unet", "-o", tmp_path / "out", "--method", "placing", "--dry-run"]
    status, out, _ = run(*command)
    assert status == 0
    assert "W4 A8" in out
    assert "20,000" in out
    assert json.loads(run(*command, "--json")[1])["layers"] == {"0": {"weight": 4, "input": 8, "second": None}}


def test_check_prints_the_plan_or_the_mistake(run: Run, library: Library, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: digits-unet\nmethod: accuquant\noptions: {windw: 2}\n")
    status, _, err = run("check", config)
    assert status == 2
    assert "options.windw: accuquant has no option 'windw'. Did you mean 'window'?" in err.replace("\n", " ")
    config.write_text("model: someone/else\nmethod: rtn\n")
    status, out, _ = run("check", config, "--json")
    plan = json.loads(out)
    assert status == 0
    assert plan["settings"]["weights"] == 4
    assert plan["stages"][0]["stage"] == "Record"
    assert "not on this machine" in plan["note"]
    assert library.calls == []


def test_outputs_that_cannot_be_written_are_refused_before_any_work(run: Run, library: Library, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked").symlink_to(tmp_path)
    for command in (("sample", "digits-unet", "-o"), ("quantize", "digits-unet", "--method", "rtn", "-o")):
        for out, why in (("file/out", "is no folder"), ("dangling", "link")):
            status, _, err = run(*command, tmp_path / out)
            assert status == 2
            assert why in err.replace("\n", " ")
    status, _, err = run("quantize", "digits-unet", "--method", "rtn", "--overwrite", "-o", tmp_path / "linked")
    assert status == 2
    assert "Name the folder itself" in err.replace("\n", " ")
    assert library.calls == []


@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "digits-unet", "--method", "rtn", "-o"),
        ("allocate", "digits-unet", "--target", "4", "-o"),
        ("compensate", "digits-unet", "--against", "digits-unet", "-o"),
    ],
    ids=lambda command: command[0],
)
def test_json_that_cannot_be_written_is_refused_before_the_work(
    run: Run, library: Library, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "file").touch()
    for target, why in ((tmp_path, "is a folder"), (tmp_path / "file" / "a.json", "is no folder")):
        status, _, err = run(*command, tmp_path / "out", "--json", target)
        assert status == 2
        assert why in err.replace("\n", " ")
    assert library.calls == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_engine_that_there_is_not_is_refused_for_models_too(run: Run, library: Library, tmp_path: Path) -> None:
    status, _, err = run("sample", "digits-unet", "-o", tmp_path / "out", "--engine", "opnvino")
    assert status == 2
    assert "Did you mean 'openvino'?" in err
    assert library.calls == []


def test_interrupted_while_a_class_is_made_is_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python 3.11 has it: Ctrl-C within `__set_name__` comes out as a RuntimeError."""

    def importing(*_args: Any) -> None:
        raise RuntimeError("Error calling __set_name__") from KeyboardInterrupt()

    monkeypatch.setattr(views, "show_methods", importing)
    assert run("methods")[0] == 130


@pytest.mark.parametrize("count", ["", "abc"])
def test_a_world_size_that_is_no_number_is_none(run: Run, monkeypatch: pytest.MonkeyPatch, count: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    assert run("methods", "rtn")[0] == 0


def test_sample_names_images_by_seed(run: Run, library: Library, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    status, _, _ = run("sample", "digits-unet", "-o", folder, "--seeds", "0-2,17", "--grid", "--argument", "eta=0.5")
    assert status == 0
    assert sorted(p.name for p in folder.iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
        "000017.png",
        "grid.png",
    ]
    asked = library.asked("sample")[0]
    assert (asked["seeds"], asked["steps"], asked["arguments"]) == ([0, 1, 2, 17], 20, {"eta": 0.5})
    assert run("sample", "digits-unet", "-o", folder)[0] == 2
    assert run("sample", "digits-unet", "-o", folder, "--overwrite", "--steps", "5")[0] == 0
    assert library.asked("sample")[-1]["steps"] == 5
    assert library.asked("open_any")[0]["engine"] == "auto"


def test_evaluate_shows_and_keeps(run: Run, library: Library, tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path / "c")
    status, out, _ = run("evaluate", checkpoint, "--seeds", "1000-1003")
    assert status == 0
    assert "31.5 dB" in out
    assert "30 to 33" in out
    kept = json.loads((tmp_path / "c.evaluation.json").read_text())
    assert (kept["candidate"], kept["against"]) == (str(checkpoint), "digits-unet")
    assert kept["command"] == f"stepquant evaluate {checkpoint} --seeds 1000-1003"
    assert library.asked("evaluate")[0]["steps"] == 20
    assert kept["engine"] == "simulated"
    assert run("evaluate", checkpoint, "--seeds", "1000-1003", "--engine", "openvino", "--overwrite")[0] == 0
    assert json.loads((tmp_path / "c.evaluation.json").read_text())["engine"] == "openvino"
    assert [asked["engine"] for asked in library.asked("load")] == ["simulated", "openvino"]


def test_evaluate_for_machines_prints_nothing_but_json(run: Run, library: Library, tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path / "c")
    status, out, _ = run("evaluate", checkpoint, "--seeds", "1000-1003", "--json", "-", "--against", "other")
    assert status == 0
    assert json.loads(out)["against"] == "other"
    run("evaluate", checkpoint, "--seeds", "1000-1003", "--json", tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["schema"] == 1


def test_report_evaluates_only_what_is_missing(run: Run, library: Library, tmp_path: Path) -> None:
    one, two = a_checkpoint(tmp_path / "one"), a_checkpoint(tmp_path / "two")
    run("evaluate", one, "--seeds", "1000-1003")
    status, _, _ = run("report", one, two, "-o", tmp_path / "r.html", "--seeds", "1000-1003")
    assert status == 0
    assert len(library.asked("evaluate")) == 2
    assert "31.5 dB" in (tmp_path / "r.html").read_text()
    assert {asked["engine"] for asked in library.asked("load")} == {"simulated"}
    status, _, err = run("report", one, "-o", tmp_path / "r.html")
    assert status == 2
    assert "--overwrite" in err


def evaluated(run: Run, folder: Path, *options: str, **changes: Any) -> Path:
    """A checkpoint with an evaluation, changed."""
    run("evaluate", a_checkpoint(folder), "--seeds", "1000-1003", *options)
    path = folder.with_name(folder.name + ".evaluation.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_report_samples_each_checkpoint_with_its_own_steps(run: Run, library: Library, tmp_path: Path) -> None:
    one, two = evaluated(run, tmp_path / "one"), evaluated(run, tmp_path / "two", "--steps", "10")
    status, _, err = run("report", one, two, "-o", tmp_path / "r.html")
    assert status == 0, err
    assert [asked["steps"] for asked in library.asked("sample")] == [20, 20, 10]
    page = (tmp_path / "r.html").read_text()
    assert "not ranked" in page
    assert "images have 20 steps, those of two with 10" in page
    assert "No films and no errors of layers: the evaluations have different numbers of steps." in page


def test_report_refuses_other_references_before_anything_is_sampled(run: Run, library: Library, tmp_path: Path) -> None:
    one, two = evaluated(run, tmp_path / "one"), evaluated(run, tmp_path / "two", against="other")
    status, _, err = run("report", one, two, a_checkpoint(tmp_path / "three"), "-o", tmp_path / "r.html")
    assert status == 1
    assert f"stepquant evaluate {two} --against digits-unet --seeds 1000-1003 --steps 20" in err.replace("\n", " ")
    assert len(library.asked("evaluate")) == 2
    assert library.asked("sample") == []


def test_report_loads_the_other_denoiser_or_says_that_it_is_gone(run: Run, library: Library, tmp_path: Path) -> None:
    other = a_checkpoint(tmp_path / "other")
    one = evaluated(run, tmp_path / "one", onto=str(other))
    library.calls.clear()
    assert run("report", one, "-o", tmp_path / "r.html")[0] == 0
    assert [asked["folder"] for asked in library.asked("load")] == [other, one]
    assert "onto" in library.asked("load")[1]
    library.calls.clear()
    one = evaluated(run, tmp_path / "one", onto=str(tmp_path / "gone"))
    status, _, err = run("report", one, "-o", tmp_path / "r.html", "--overwrite")
    assert status == 0, err
    assert library.asked("sample") == []
    assert "/gone, which is gone." in (tmp_path / "r.html").read_text()


def test_report_names_a_damaged_evaluation(run: Run, library: Library, tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path / "c")
    (tmp_path / "c.evaluation.json").write_text("{")
    status, _, err = run("report", checkpoint, "-o", tmp_path / "r.html")
    assert status == 1
    assert "is damaged" in err


def test_kept_results_are_shown_though_a_figure_was_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    kept = Library().compare(None, None, seeds=SEEDS, steps=2) | {"against": "c", "reference_kind": "checkpoint"}
    kept["metrics"] = {"drift_final": {"value": None}, "frechet_to_fp": {"value": 1.5}}
    views.show_results(kept)
    out = capsys.readouterr().out
    assert "not finite" in out
    assert "Frechet distance to the reference" in out


def test_json_has_null_for_what_is_not_finite(
    run: Run, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = library.compare

    def broken(*sources: Any, **options: Any) -> dict[str, Any]:
        results = whole(*sources, **options)
        flat = {"white_point": {"candidate": [[math.nan, 0.5], [0.5, 0.5]], "reference": [[0.5, 0.5], [0.5, 0.4]]}}
        results["metrics"]["drift_final"] = {"value": math.nan}
        return results | {"drift": {"timesteps": [9, 1], "accumulated": [0.1, math.inf], "flat_field": flat}}

    monkeypatch.setattr(evaluate, "compare", broken)

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    checkpoint = a_checkpoint(tmp_path / "c")
    status, out, _ = run("evaluate", checkpoint, "--seeds", "1000-1003", "--json")
    assert status == 0
    results = json.loads(out, parse_constant=refuse)
    assert results["metrics"]["drift_final"]["value"] is None
    assert results["drift"]["accumulated"] == [0.1, None]
    assert results["drift"]["flat_field"]["white_point"]["candidate"][0] == [None, 0.5]
    assert run("report", checkpoint, "-o", tmp_path / "r.html")[0] == 0
    assert json_text({"a": (1, math.inf), 1: {"b": Path("x")}}) == '{"a": [1, null], "1": {"b": "x"}}'


def test_inspect(run: Run, library: Library, tmp_path: Path) -> None:
    status, out, _ = run("inspect", a_checkpoint(tmp_path / "c"))
    assert status == 0
    assert "conv_in" in out
    assert "1.23 kB" in out
    assert "W8 A8" in out
    assert json.loads(run("inspect", tmp_path / "c", "--json")[1])["bytes"] == 1234


def test_methods(run: Run) -> None:
    status, out, _ = run("methods")
    assert status == 0
    assert {"rtn", "q_diffusion", "accuquant"} <= set(out.split())
    status, out, _ = run("methods", "accuquant")
    assert status == 0
    for wanted in ("Differs from the paper", "@inproceedings", "window", "--preset quick"):
        assert wanted in out
    listed = {method["name"]: method for method in json.loads(run("methods", "--json")[1])}
    assert {"rtn", "accuquant"} <= listed.keys()
    assert (listed["ptqd"]["year"], listed["ptqd"]["source"]) == ("2023", "arXiv:2305.10657")
    ours = {"rtn", "layerwise", "combined"}
    assert {name for name, method in listed.items() if not (method["year"] and method["source"])} <= ours
    status, _, err = run("methods", "rtn+cec")
    assert status == 2
    assert "rtn followed by cec: `stepquant methods` explains each" in err.replace("\n", " ")
    status, _, err = run("methods", "acuquant")
    assert status == 2
    assert "Did you mean 'accuquant'?" in err


def test_report_times_engines_when_asked_and_shows_it_again(run: Run, library: Library, tmp_path: Path) -> None:
    one, page = a_checkpoint(tmp_path / "one"), tmp_path / "r.html"
    run("report", one, "-o", page, "--seeds", "1000-1003")
    assert "Speed was not measured" in page.read_text()
    assert run("report", one, "-o", page, "--speed", "--overwrite")[0] == 0
    assert "2.50 times" in page.read_text()
    assert library.asked("load")[-2]["engine"] == "openvino"
    assert run("report", one, "-o", page, "--overwrite")[0] == 0
    assert "2.50 times" in page.read_text()
    (tmp_path / "images").mkdir()
    save_png(torch.zeros(1, 8, 8), tmp_path / "images", seed=1000)
    kept = json.loads((tmp_path / "one.evaluation.json").read_text())
    (tmp_path / "one.evaluation.json").write_text(json.dumps(kept | {"against": str(tmp_path / "images")}))
    status, _, err = run("report", one, "-o", page, "--speed", "--overwrite")
    assert status == 2
    assert "was compared with a folder of images, and --speed needs a model" in " ".join(err.split())


def test_demo_does_each_part_once(run: Run, library: Library, tmp_path: Path) -> None:
    status, out, _ = run("demo", "-o", tmp_path / "demo")
    assert status == 0
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo" / "report.html").is_file()
    assert (tmp_path / "demo" / "samples" / "full-precision" / "001000.png").is_file()
    assert "2.50 times" in (tmp_path / "demo" / "report.html").read_text()
    assert [path.name for path in (tmp_path / "demo").glob("*.speed.json")] == ["accuquant-w4a8.speed.json"]
    assert str(tmp_path / "demo" / "report.html") in out
    calls = len(library.calls)
    assert "made before" not in out
    status, out, _ = run("demo", "-o", tmp_path / "demo")
    assert status == 0
    assert "rtn-w4a8 and accuquant-w4a8 had been made before" in out.replace("\n", " ")
    assert len(library.calls) == calls


def test_demo_goes_on_after_ctrl_c(run: Run, library: Library, tmp_path: Path) -> None:
    library.failure = KeyboardInterrupt()
    assert run("demo", "-o", tmp_path / "demo")[0] == 130
    library.failure = None
    assert run("demo", "-o", tmp_path / "demo")[0] == 0
    assert [call["resume"] for call in library.asked("quantize")] == [False, True, False]


def test_a_device_that_is_not_there(run: Run, library: Library, tmp_path: Path) -> None:
    for name in ("abacus", "cuda:99"):
        status, _, err = run("sample", "digits-unet", "-o", tmp_path / "x", "--device", name)
        assert status == 2
        assert name in err


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-3,20", [0, 1, 2, 3, 20]), ("7", [7]), (" 1 - 2 , 9", [1, 2, 9]), ("5-5", [5])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds
    assert parse_seeds(format_seeds(seeds)) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "1,,2", "1-3,2", "0-99999999", "9" * 30])
def test_seeds_that_make_no_sense(text: str) -> None:
    from typer import BadParameter

    with pytest.raises(BadParameter):
        parse_seeds(text)


def test_options_of_all_commands_may_stand_anywhere() -> None:
    assert arranged(["demo", "-q", "--debug"]) == (["-q", "--debug", "demo"], True)
    assert arranged(["inspect", "c", "--json"]) == (["inspect", "c", "--json", "-"], False)
    assert arranged(["inspect", "--json", "f", "c"]) == (["inspect", "--json", "f", "c"], False)
    assert arranged(["sample", "--", "--debug"]) == (["sample", "--", "--debug"], False)


def test_lines_of_progress_come_at_most_every_30_seconds() -> None:
    now, lines = [0.0], []
    progress = LineProgress(lines.append, clock=lambda: now[0])
    with progress.track("Fitting", 100) as advance:
        for _ in range(100):
            now[0] += 1.0
            advance(1)
    assert lines == [
        "Fitting: 30 of 100, 1 min 10 s left",
        "Fitting: 60 of 100, 40 s left",
        "Fitting: 90 of 100, 10 s left",
    ]


def test_bars_may_lie_inside_one_another() -> None:
    console = Console(record=True, width=100, force_terminal=True, file=io.StringIO(), markup=False)
    progress = BarProgress(console)
    with progress.track("outer [x]", 2) as outer, progress.track("inner", 1) as inner:
        inner(1)
        outer(2)
    assert "outer [x]: done in 0 s" in console.export_text()


def test_durations() -> None:
    assert [duration(seconds) for seconds in (3.4, 75, 7300)] == ["3 s", "1 min 15 s", "2 h 1 min"]


def test_report_names_the_command_for_a_pipeline_of_prompts(
    run: Run, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = a_checkpoint(tmp_path / "one"), a_checkpoint(tmp_path / "two")
    (two / "model_index.json").write_text("{}")
    identity = PipelineIdentity("diffusers", "StableDiffusionPipeline", {}, {})
    monkeypatch.setattr(report, "read_manifest", lambda _folder: SimpleNamespace(pipeline=identity))
    status, _, err = run("report", one, two, "-o", tmp_path / "r.html")
    assert status == 2
    assert f"evaluate it first: stepquant evaluate {two} --prompts FILE" in err.replace("\n", " ")
    assert library.calls == []


def test_report_writes_into_a_new_folder_or_refuses_before_any_work(run: Run, library: Library, tmp_path: Path) -> None:
    one = a_checkpoint(tmp_path / "one")
    (tmp_path / "file").write_text("")
    status, _, err = run("report", one, "-o", tmp_path / "file" / "r.html")
    assert (status, library.calls) == (2, [])
    assert "is no folder" in err.replace("\n", " ")
    assert run("report", one, "-o", tmp_path / "new" / "r.html", "--seeds", "1000-1003")[0] == 0
    assert (tmp_path / "new" / "r.html").is_file()


@pytest.mark.parametrize(
    ("chosen", "relative", "word"),
    [
        ("regression", 0.8, None),
        ("regression", 1.02, "no better"),
        ("none", 1.0, "Nothing was better than no correction"),
    ],
)
def test_a_correction_that_gains_nothing_is_told(
    capsys: pytest.CaptureFixture[str], chosen: str, relative: float, word: str | None
) -> None:
    rows = [
        {"candidate": "none", "held_out_rms": 0.1, "relative": 1.0},
        {"candidate": "regression", "held_out_rms": 0.1 * relative, "relative": relative},
    ]
    views.show_compensated("a", Path("b"), [{"seconds": 1.0, "candidates": rows, "chosen": chosen}], "")
    said = capsys.readouterr().out
    for phrase in ("no better", "Nothing was better than no correction"):
        assert (phrase in said) is (phrase == word)
    assert "stack" not in said


@pytest.mark.parametrize(
    ("chosen", "own", "wanted"),
    [
        ("as it is", "kept", ["Nothing was better than a as it is: b keeps", "do not stack"]),
        (
            "regression",
            "replaced",
            ["b is a with the correction regression", "that a has is replaced", "It was better"],
        ),
        ("none", "removed", ["b is a without one", "The correction that a has is removed"]),
    ],
)
def test_what_becomes_of_a_correction_that_was_there_is_told(
    capsys: pytest.CaptureFixture[str], chosen: str, own: str, wanted: list[str]
) -> None:
    rows = [
        {"candidate": "none", "held_out_rms": 0.1, "relative": 1.0},
        {"candidate": "as it is", "held_out_rms": 0.08, "relative": 0.8},
        {"candidate": "regression", "held_out_rms": 0.09, "relative": 0.9},
    ]
    figures = [{"seconds": 1.0, "candidates": rows, "chosen": chosen, "own": own}]
    views.show_compensated("a", Path("b"), figures, "")
    said = capsys.readouterr().out
    assert "80.0 %" in said
    for phrase in wanted:
        assert phrase in said
