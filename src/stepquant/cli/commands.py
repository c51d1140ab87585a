"""The commands and their options. What a command does is in `work`, `views` and `demo`; here is what a user types."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from stepquant._version import __version__
from stepquant.cli.console import Settings
from stepquant.cli.seeds import parse_seeds

__all__ = ["app"]

app = typer.Typer(
    name="stepquant",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Start with `stepquant demo`: a few minutes on two cores, no network.",
)

Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write JSON to FILE, or with - to the screen.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Engine = Annotated[
    str,
    typer.Option(
        help="What computes the quantized layers. auto: simulated, the arithmetic of the calibration; openvino: the "
        "whole denoiser as one int8 graph; onednn: int8 layers."
    ),
]
Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--argument", metavar="KEY=VALUE", help="Handed to the pipeline's call, e.g. prompt='a cat'. May be repeated."
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Images sampled at once; changes speed and memory, not the images.")]
Schedule = Annotated[
    Literal["strict", "nearest"],
    typer.Option(
        help="With other steps than the checkpoint's: strict refuses, nearest takes the nearest timestep's values."
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stepquant {__version__}")
        raise typer.Exit


@app.callback()
def common(
    ctx: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress. May stand after the command too.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Tracebacks and log messages. May stand after the command too.")
    ] = False,
    version: Annotated[  # noqa: ARG001 - its callback has done it all
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Quantize diffusion models after training, and see what was lost, step by step."""
    ctx.obj = replace(ctx.obj or Settings(), quiet=quiet, debug=debug)


@app.command()
def quantize(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder to make for the checkpoint.")],
    model: Annotated[
        str | None,
        typer.Argument(help="digits-unet (shipped), a folder in diffusers format, or a hub id."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="See `stepquant methods`.  [default: accuquant]")] = None,
    weights: Annotated[
        int | None, typer.Option(help="Bits of weights, 2 to 8; 16 leaves them alone.  [default: 4]")
    ] = None,
    activations: Annotated[
        int | None, typer.Option(help="Bits of activations, 2 to 8; 16 leaves them alone.  [default: 8]")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps to calibrate for.  [default: 20]")] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(min=1, help="Images sampled to calibrate on.  [default: the preset's]")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="quick, standard or full: time against quality.  [default: standard]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="run.yaml", help="Settings from a file; options given here win over it.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any setting by its path in run.yaml, e.g. window=2. May be repeated."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Root of all random numbers.  [default: 0]")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.  [default: auto]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    overwrite: Overwrite = False,
    json_: Json = None,
) -> None:
    """Calibrate a low-bit checkpoint of a diffusion model.

    Example: stepquant quantize digits-unet -o digits-w4a8 --weights 4 --activations 8 --preset quick
    """
    from stepquant.cli import work

    flags = {
        "model": model,
        "method": method,
        "weights": weights,
        "activations": activations,
        "steps": steps,
        "calibration_samples": calibration_samples,
        "preset": preset,
        "seed": seed,
        "device": device,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    request = work.QuantizeRequest(out, config, tuple(set_ or ()), given, resume=resume, overwrite=overwrite)
    if dry_run:
        work.show_plan(request, _settings(ctx), json_)
    else:
        work.quantize(request, _settings(ctx), json_)


@app.command()
def sample(
    ctx: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="MODEL_OR_CHECKPOINT", help="What `quantize` takes or what it wrote.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the images, one PNG a seed.")],
    seeds: Annotated[str, typer.Option(help="Such as 0-15,20; an image depends on its seed only.")] = "0-15",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps.  [default: the checkpoint's, or 20]")
    ] = None,
    engine: Engine = "auto",
    device: Device = "auto",
    batch_size: Batch = 16,
    grid: Annotated[bool, typer.Option("--grid", help="Also write all images in one picture, grid.png.")] = False,
    argument: Arguments = None,
    schedule: Schedule = "strict",
    overwrite: Overwrite = False,
) -> None:
    """Sample images from a model or a checkpoint.

    Example: stepquant sample digits-w4a8 -o images --seeds 0-15 --grid
    """
    from stepquant.cli import work

    sampling = work.Sampling(parse_seeds(seeds), steps, batch_size, tuple(argument or ()), engine, device, schedule)
    work.sample(source, out, sampling, _settings(ctx), grid=grid, overwrite=overwrite)


@app.command()
def evaluate(
    ctx: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="What `quantize` wrote.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The full-precision model.  [default: the one that was quantized]"),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Such as 1000-1255; calibration never uses these.")] = "1000-1255",
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps.  [default: the checkpoint's]")] = None,
    engine: Engine = "auto",
    device: Device = "auto",
    batch_size: Batch = 16,
    argument: Arguments = None,
    schedule: Schedule = "strict",
    json_: Json = None,
) -> None:
    """Measure what was lost: paired with the full-precision model at equal seeds, image by image and step by step.

    The result is also kept as CHECKPOINT.evaluation.json, where `stepquant report` finds it.
    """
    from stepquant.cli import work

    sampling = work.Sampling(parse_seeds(seeds), steps, batch_size, tuple(argument or ()), engine, device, schedule)
    work.evaluate(checkpoint, against, sampling, _settings(ctx), json_)


@app.command()
def compensate(
    ctx: typer.Context,
    candidate: Annotated[Path, typer.Argument(help="A checkpoint that `quantize` wrote; it stays as it is.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder to make for the new checkpoint.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The full-precision model.  [default: the one that was quantized]"),
    ] = None,
    estimator: Annotated[
        str,
        typer.Option(
            help="How to fit: auto tries several and takes the best on images held out, or nothing if nothing helps. "
            "Or one of bias, scale, free_run, closed_loop, trajectory, regression."
        ),
    ] = "auto",
    calibration_samples: Annotated[int, typer.Option(min=2, help="Images sampled to fit on.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Root of all random numbers.")] = 0,
    device: Device = "auto",
    batch_size: Batch = 16,
    argument: Arguments = None,
    overwrite: Overwrite = False,
    json_: Json = None,
) -> None:
    """Correct what quantization does to every sampling step of a finished checkpoint; no weight changes.

    The full-precision model is sampled once more, and a few numbers for each step and channel are fitted so that the
    quantized model follows it. They are kept in the new checkpoint and cost next to nothing when sampling. They hold
    for the checkpoint's own number of steps. Fit again after any change of the model.

    Models that other software has quantized go through Python: stepquant.api.compensate(pipe, full_precision_pipe).

    Example: stepquant compensate digits-w4a8 -o digits-w4a8-cec
    """
    from stepquant.cli import work

    request = work.CompensateRequest(
        candidate, out, against, estimator, calibration_samples, seed, device, batch_size, tuple(argument or ())
    )
    work.compensate(request, _settings(ctx), json_, overwrite=overwrite)


@app.command()
def report(
    ctx: typer.Context,
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT...", help="One or several, shown side by side.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The page to write.")] = Path("report.html"),
    seeds: Annotated[str, typer.Option(help="Evaluated where a checkpoint has no evaluation yet.")] = "1000-1063",
    device: Device = "auto",
    batch_size: Batch = 16,
    overwrite: Overwrite = False,
) -> None:
    """Write one HTML page about one or several checkpoints: figures, drift curves, images, layers.

    Uses the evaluations that `stepquant evaluate` kept; a checkpoint without one is evaluated first.
    """
    from stepquant.cli import work

    work.report(checkpoints, out, parse_seeds(seeds), _settings(ctx), (device, batch_size), overwrite=overwrite)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="What `quantize` wrote.")],
    json_: Json = None,
) -> None:
    """Show what a checkpoint holds: its manifest, bits and bytes by layer, and which engine takes which layer."""
    from stepquant.cli import views
    from stepquant.cli.console import write_json
    from stepquant.inspection import inspect_checkpoint

    description = inspect_checkpoint(checkpoint)
    if json_ is not None:
        write_json(description, json_)
    if json_ != "-":
        views.show_inspection(description)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Tell everything about this one.")] = None,
    json_: Json = None,
) -> None:
    """List the methods, or explain one: formulas, options, what differs from the paper, and how to cite it."""
    from stepquant.cli import views

    views.show_methods(name, json_)


@app.command()
def check(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="run.yaml", help="The file to check.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As for `quantize`. May be repeated.")
    ] = None,
    json_: Json = None,
) -> None:
    """Check a run.yaml and print the plan that it stands for; touch nothing."""
    from stepquant.cli import work

    work.show_plan(work.QuantizeRequest(None, config, tuple(set_ or ()), {}), _settings(ctx), json_)


@app.command()
def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for everything.")] = Path("demo"),
) -> None:
    """Quantize the shipped model with AccuQuant beside round-to-nearest, compare the two, and write a report.

    A few minutes on two cores. Parts that are done already are kept: after Ctrl-C the same command goes on.
    """
    from stepquant.cli import demo as demonstration

    demonstration.run(out, _settings(ctx))


def _settings(ctx: typer.Context) -> Settings:
    settings: Any = ctx.obj
    return settings if isinstance(settings, Settings) else Settings()
