"""The commands and their options. What a command does is in `work`, `views` and `demo`; here is what a user types."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from stepquant._version import __version__
from stepquant.cli.console import Interrupted, Settings
from stepquant.cli.logs import log_to
from stepquant.cli.seeds import parse_seeds

__all__ = ["app"]


class _Commands(TyperGroup):
    """Ctrl-C is told: Typer would end without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("Interrupted.") from None


app = typer.Typer(
    name="stepquant",
    cls=_Commands,
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
        help="What computes the quantized layers. simulated: the arithmetic of the calibration, bit for bit; openvino: "
        "the whole denoiser as one int8 graph, for CPUs; openvino-bf16: the same with its float parts in bfloat16, on "
        "processors that have it; onednn: int8 layers; auto: openvino-bf16 or openvino where processor and checkpoint "
        "fit it, else simulated. `stepquant inspect` says which."
    ),
]
MeasuredEngine = Annotated[
    str,
    typer.Option(
        help="What computes the quantized layers. Figures are those of simulated, the definition of the result; name "
        "openvino, openvino-bf16, onednn, ... to measure what another engine makes of it."
    ),
]
Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--argument",
        metavar="KEY=VALUE",
        help="Handed to the pipeline's call, e.g. guidance_scale=5 or negative_prompt='blurred'. May be repeated. "
        "KEY=@FILE takes a line of a text file for each image, or a picture for all.",
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Prompts, one a line, repeated if there are more images; neutral is a list that is shipped.",
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Images sampled at once; changes speed and memory, not the images.")]
Schedule = Annotated[
    Literal["strict", "nearest"],
    typer.Option(
        help="With other steps than the checkpoint's: strict refuses, nearest takes the nearest timestep's values."
    ),
]

SchedulerName = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="NAME",
        help="Sample the model with another scheduler of diffusers: ddim, euler, dpm++, unipc, ... or its class. "
        "NAME,KEY=VALUE,... with other settings; KEY=VALUE alone sets those of the model's own.",
    ),
]

Denoiser = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which denoiser, of a pipeline that switches between two: transformer or transformer_2 (Wan 2.2). Each "
        "gets a checkpoint of its own.",
    ),
]
Onto = Annotated[
    Path | None,
    typer.Option(
        metavar="CHECKPOINT",
        help="The checkpoint of the pipeline's other denoiser: both are then quantized.",
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
    log_file: Annotated[
        Path | None,
        typer.Option(
            "--log-file",
            metavar="FILE",
            help="Append what happens to FILE, one JSON object a line. May stand after the command too.",
        ),
    ] = None,
    version: Annotated[  # noqa: ARG001 - its callback has done it all
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Quantize diffusion models after training, and see what was lost, step by step."""
    ctx.obj = replace(ctx.obj or Settings(), quiet=quiet, debug=debug)
    if log_file is not None:
        log_to(log_file)
        logging.getLogger(__name__).info("stepquant %s: %s", __version__, ctx.obj.command)


Target = Annotated[
    str | None,
    typer.Option(
        metavar="BITS",
        help="Choose bits by layer: 4.5bit is the average of weights, W4.5A6 that of weights and of activations.",
    ),
]
MaxBytes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Choose bits by layer: the layers have at most this many bytes. The checkpoint is larger by norms, "
        "embeddings and descriptions; the output says both.",
    ),
]
MaxDrift = Annotated[
    float | None,
    typer.Option(min=0.0, help="Choose bits by layer: the fewest bytes with at most this final drift, measured."),
]


@app.command()
def quantize(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder to make for the checkpoint.")],
    model: Annotated[
        str | None,
        typer.Argument(help="digits-unet or digits-dit (shipped), a folder in diffusers format, or a hub id."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="See `stepquant methods`.  \\[default: combined]")] = None,
    weights: Annotated[
        int | None, typer.Option(help="Bits of weights, 2 to 8; 16 or 32 leaves them alone.  \\[default: 4]")
    ] = None,
    activations: Annotated[
        int | None, typer.Option(help="Bits of activations, 2 to 8; 16 or 32 leaves them alone.  \\[default: 8]")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps to calibrate for.  \\[default: 20]")] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(min=1, help="Images sampled to calibrate on.  \\[default: the preset's]")
    ] = None,
    target: Target = None,
    max_bytes: MaxBytes = None,
    max_drift: MaxDrift = None,
    preset: Annotated[
        str | None, typer.Option(help="quick, standard or full: time against quality.  \\[default: standard]")
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
    seed: Annotated[int | None, typer.Option(min=0, help="Root of all random numbers.  \\[default: 0]")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.  \\[default: auto]")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Such as 8GB: what is recorded stays on disk, and of what is cached no more than this is in memory. "
            "Changes nothing in the result.",
        ),
    ] = None,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="Keep the denoiser's blocks in main memory and bring them to the GPU in turn: slower, for models that "
            "do not fit.",
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and what it would take, and do nothing.")
    ] = False,
    overwrite: Overwrite = False,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write what the stages measure there, for TensorBoard.")
    ] = None,
    denoiser: Denoiser = None,
    scheduler: SchedulerName = None,
    prompts: Prompts = None,
    argument: Arguments = None,
    json_: Json = None,
) -> None:
    """Calibrate a low-bit checkpoint of a diffusion model.

    Example: stepquant quantize digits-unet -o digits-w4a8 --weights 4 --activations 8 --preset quick
    """
    from stepquant.cli import work
    from stepquant.cli.arguments import bytes_named, parsed

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
        "target": target,
        "max_bytes": max_bytes,
        "max_drift": max_drift,
        "denoiser": denoiser,
        "scheduler": scheduler,
    }
    given: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    if argument or prompts:
        given["arguments"] = parsed(_with_prompts(argument, prompts))
    request = work.QuantizeRequest(
        out,
        config,
        tuple(set_ or ()),
        given,
        resume=resume,
        overwrite=overwrite,
        tensorboard=tensorboard,
        max_memory=None if max_memory is None else bytes_named(max_memory),
        offload=offload,
    )
    if dry_run:
        work.show_plan(request, _settings(ctx), json_, measured=True)
    else:
        work.quantize(request, _settings(ctx), json_)


@app.command()
def allocate(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="plan.yaml", help="File to write.")],
    model: Annotated[
        str | None,
        typer.Argument(help="digits-unet or digits-dit (shipped), a folder in diffusers format, or a hub id."),
    ] = None,
    target: Target = None,
    max_bytes: MaxBytes = None,
    max_drift: MaxDrift = None,
    method: Annotated[
        str | None, typer.Option(help="What `quantize` will use with the plan.  \\[default: combined]")
    ] = None,
    activations: Annotated[
        int | None, typer.Option(help="Bits of activations where they are not allocated.  \\[default: 8]")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps to calibrate for.  \\[default: 20]")] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(min=1, help="Images sampled to calibrate on.  \\[default: the preset's]")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="quick, standard or full.  \\[default: standard]")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="run.yaml", help="Settings from a file; options given here win over it.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any setting by its path in run.yaml, e.g. allocation.refine=0. May be repeated.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Root of all random numbers.  \\[default: 0]")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.  \\[default: auto]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an allocation that was interrupted.")] = False,
    denoiser: Denoiser = None,
    scheduler: SchedulerName = None,
    overwrite: Overwrite = False,
    json_: Json = None,
) -> None:
    """Choose bits for every layer by what they do to the final image, and write them as a plan to edit.

    `quantize` does the same with the same options. Here the result is a run.yaml with one rule a layer.

    Example: stepquant allocate digits-unet -o plan.yaml --target 4.5bit
    """
    from stepquant.cli import allocate as allocation
    from stepquant.cli import work

    flags = {
        "model": model,
        "method": method,
        "activations": activations,
        "steps": steps,
        "calibration_samples": calibration_samples,
        "preset": preset,
        "seed": seed,
        "device": device,
        "target": target,
        "max_bytes": max_bytes,
        "max_drift": max_drift,
        "denoiser": denoiser,
        "scheduler": scheduler,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    request = work.QuantizeRequest(out, config, tuple(set_ or ()), given, resume=resume, overwrite=overwrite)
    if dry_run:
        work.show_plan(request, _settings(ctx), json_)
    else:
        allocation.allocate(request, _settings(ctx), json_)


@app.command()
def sample(
    ctx: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="MODEL_OR_CHECKPOINT", help="What `quantize` takes or what it wrote.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the images, one PNG a seed.")],
    seeds: Annotated[str, typer.Option(help="Such as 0-15,20; an image depends on its seed only.")] = "0-15",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps.  \\[default: the checkpoint's, or 20]")
    ] = None,
    engine: Engine = "auto",
    device: Device = "auto",
    batch_size: Batch = 16,
    grid: Annotated[bool, typer.Option("--grid", help="Also write all images in one picture, grid.png.")] = False,
    prompts: Prompts = None,
    argument: Arguments = None,
    scheduler: SchedulerName = None,
    schedule: Schedule = "strict",
    onto: Onto = None,
    overwrite: Overwrite = False,
) -> None:
    """Sample images from a model or a checkpoint.

    Example: stepquant sample digits-w4a8 -o images --seeds 0-15 --grid
    """
    from stepquant.cli import work

    given = _with_prompts(argument, prompts)
    sampling = work.Sampling(
        parse_seeds(seeds), steps, batch_size, given, engine, device, schedule, onto, _chosen(scheduler)
    )
    work.sample(source, out, sampling, _settings(ctx), grid=grid, overwrite=overwrite)


@app.command()
def evaluate(
    ctx: typer.Context,
    candidate: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, a diffusers folder, a hub id, or a folder of PNG images named by their seeds."
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="REFERENCE",
            help="The full-precision side: the same choice.  \\[default: the model that the checkpoint was made from]",
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Such as 1000-1255.  \\[default: those of the images, else 1000-1255]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps.  \\[default: the checkpoint's, or 20]")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[=FILE]",
            help="For FID and the like: digits, inception[=FILE], mobilenetv2=FILE, none.  "
            "\\[default: digits where they fit]",
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="clean, torch-fidelity, adm or as-sampled: rounding, resizing, splits.  \\[default: by the features]"
        ),
    ] = None,
    lpips: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights of torchvision's AlexNet or VGG-16, for LPIPS.")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="CLIP model for the CLIP score: a folder, or a hub id in the local cache."),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option("--fail-if", metavar="GATE", help="Exit status 3 if so, e.g. 'psnr<28'. May be repeated."),
    ] = None,
    engine: MeasuredEngine = "simulated",
    device: Device = "auto",
    batch_size: Batch = 16,
    prompts: Prompts = None,
    argument: Arguments = None,
    scheduler: SchedulerName = None,
    schedule: Schedule = "strict",
    onto: Onto = None,
    allow_calibration_seeds: Annotated[
        bool, typer.Option("--allow-calibration-seeds", help="Also evaluate on seeds that were calibrated on.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an evaluation that was interrupted.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew where an evaluation was interrupted.")
    ] = False,
    json_: Json = None,
) -> None:
    """Measure what was lost: paired with the full-precision model at equal seeds, image by image and step by step.

    The result is also kept as CANDIDATE.evaluation.json, where `stepquant report` finds it.

    Example: stepquant evaluate digits-w4a8 --fail-if "psnr<28" --fail-if "frechet_to_fp>2"
    """
    from stepquant.cli import evaluate as evaluation
    from stepquant.cli import work

    given = _with_prompts(argument, prompts)
    sampling = work.Sampling(
        [] if seeds is None else parse_seeds(seeds),
        steps,
        batch_size,
        given,
        engine,
        device,
        schedule,
        onto,
        _chosen(scheduler),
    )
    measuring = evaluation.Measuring(
        features,
        protocol,
        lpips,
        clip,
        tuple(fail_if or ()),
        resume=resume,
        overwrite=overwrite,
        allow_calibration_seeds=allow_calibration_seeds,
    )
    if not evaluation.evaluate(candidate, against, sampling, measuring, _settings(ctx), json_):
        raise typer.Exit(3)


@app.command()
def compensate(
    ctx: typer.Context,
    candidate: Annotated[
        str,
        typer.Argument(
            help="A checkpoint that `quantize` wrote, or a diffusers folder or hub id of a model that other software "
            "has quantized; it stays as it is."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder to make for the corrected model.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The full-precision model.  \\[default: the one a checkpoint was made from]"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps to fit for.  \\[default: those of a checkpoint]")
    ] = None,
    estimator: Annotated[
        str,
        typer.Option(
            help="How to fit: auto tries several and takes the best on images held out, or nothing if nothing helps. "
            "Or one of bias, scale, free_run, closed_loop, trajectory, regression."
        ),
    ] = "auto",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Of the fit: regressors=\\[prediction, one], gamma=1, ridge=0, shared=true, held_out=4. May be "
            "repeated.",
        ),
    ] = None,
    calibration_samples: Annotated[int, typer.Option(help="Images sampled to fit on, 2 or more.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Root of all random numbers.")] = 0,
    device: Device = "auto",
    batch_size: Batch = 16,
    argument: Arguments = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a fit that was interrupted.")] = False,
    overwrite: Overwrite = False,
    json_: Json = None,
) -> None:
    """Correct what quantization does to every sampling step of a finished model; no weight changes.

    The full-precision model is sampled once more, and a few numbers for each step and channel are fitted so that the
    quantized model follows it. They are kept in OUT and cost next to nothing when sampling. They hold for one number of
    steps. Fit again after any change of the model.

    Corrections do not stack. One that the model has already, of tac, ptqd, d2_dpm, cec or of this command, is judged on
    the same images: auto keeps it where nothing is better, and otherwise the new one replaces it.

    The form of the paper is --estimator scale --set gamma=1 --set ridge=0.

    Of a model that other software has quantized, OUT is a copy of its folder with the correction beside it. stepquant's
    commands and stepquant.open_model sample it corrected; diffusers alone opens it without. What only Python opens goes
    through stepquant.compensate(pipe, full_precision_pipe, steps=N).

    Example: stepquant compensate digits-w4a8 -o digits-w4a8-cec

    Example: stepquant compensate sd15-nf4 --against sd15 --steps 20 -o sd15-nf4-cec --argument prompt="a cat"
    """
    from stepquant.cli import compensate as compensation

    request = compensation.CompensateRequest(
        candidate,
        out,
        against,
        steps,
        estimator,
        calibration_samples,
        seed,
        device,
        batch_size,
        tuple(argument or ()),
        tuple(set_ or ()),
        resume,
    )
    compensation.compensate(request, _settings(ctx), json_, overwrite=overwrite)


@app.command()
def report(
    ctx: typer.Context,
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT...", help="One or several, shown side by side.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The page to write.")] = Path("report.html"),
    seeds: Annotated[str, typer.Option(help="Evaluated where a checkpoint has no evaluation yet.")] = "1000-1063",
    speed: Annotated[
        bool,
        typer.Option(
            "--speed",
            help="Time one call of the denoiser by every engine that takes a layer of it, beside full precision. Later "
            "reports show it again.",
        ),
    ] = False,
    device: Device = "auto",
    batch_size: Batch = 16,
    overwrite: Overwrite = False,
) -> None:
    """Write one HTML page about one or several checkpoints: figures, drift curves, images, layers, engines.

    Uses the evaluations that `stepquant evaluate` kept; a checkpoint without one is evaluated first, in simulated
    arithmetic, which also makes the images of the page. Measure another engine with `stepquant evaluate --engine`.
    """
    from stepquant.cli import report as page

    page.report(
        checkpoints,
        out,
        parse_seeds(seeds),
        _settings(ctx),
        (device, batch_size),
        speed=speed,
        overwrite=overwrite,
    )


@app.command()
def doctor(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT_OR_PIPELINE", help="What `quantize` takes or what it wrote."),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The full-precision model, or none to compare with nothing.  \\[default: the one that was quantized]",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="A few, such as 1000-1003; calibration never uses these.")] = "1000-1003",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps.  \\[default: the checkpoint's, or 20]")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Layers to restore to full precision one by one, to be sure.")] = 3,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="When to call it a fault, e.g. cosine=0.9. May be repeated."),
    ] = None,
    patch: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write settings for `quantize --config` that mend what was found."),
    ] = None,
    engine: MeasuredEngine = "simulated",
    device: Device = "auto",
    batch_size: Batch = 4,
    argument: Arguments = None,
    schedule: Schedule = "strict",
    overwrite: Overwrite = False,
    json_: Json = None,
) -> None:
    """Say what is wrong with a checkpoint or a pipeline: which layer, from which step on, and what to do about it.

    Looks at every layer while a few images are sampled: NaN, values outside of quantizers' ranges, dead and outlier
    channels, what float16 cannot hold, black images. With the full-precision model also which layers are far from it,
    and which ones drive the error of the final image. Python: stepquant.doctor.examine.

    Example: stepquant doctor digits-w4a8 --patch mended.yaml
    """
    from stepquant.cli import doctor as examination
    from stepquant.cli import work

    sampling = work.Sampling(parse_seeds(seeds), steps, batch_size, tuple(argument or ()), engine, device, schedule)
    request = examination.DoctorRequest(source, against, sampling, top, tuple(threshold or ()), patch, overwrite)
    examination.doctor(request, _settings(ctx), json_)


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
def card(
    ctx: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="What `quantize` wrote.")],
    name: Annotated[str | None, typer.Option(help="Title of the card.  \\[default: the folder's name]")] = None,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="ID",
            help="As the hub writes it, e.g. apache-2.0.  \\[default: what the card of a local base model says]",
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="The full-precision model on the hub.  \\[default: if it came from there]"
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model card into a checkpoint's folder: how to use it, what was measured, how it was made.

    Takes the figures that `stepquant evaluate` kept. The folder can then be published as it is.

    Example: stepquant card digits-w4a8 --license apache-2.0
    """
    from stepquant.cli import card as cards

    request = cards.CardRequest(checkpoint, name, license_, base_model, overwrite)
    cards.card(request, _settings(ctx))


@app.command()
def export(
    ctx: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="What `quantize` wrote.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="OUT", help="Folder for torchao-int8, file.safetensors, file.onnx or file.xml."
        ),
    ],
    format_: Annotated[
        Literal["torchao-int8", "comfyui", "onnx", "openvino"],
        typer.Option(
            "--format",
            help="torchao-int8: a pipeline that diffusers loads without stepquant. comfyui: the network of Stable "
            "Diffusion 1, 2, XL, Flux or Wan, with int8 weights. onnx, openvino: the network alone, of UNet2DModel; "
            "others through Python, stepquant.integrations.graphs.",
        ),
    ],
    json_: Json = None,
) -> None:
    """Write a checkpoint in a format that other programs run, and say what is lost.

    Example: stepquant export digits-w4a8 -o digits.onnx --format onnx
    """
    from stepquant.cli import export as exports

    exports.export(checkpoint, out, format_, _settings(ctx), json_)


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


def _with_prompts(arguments: list[str] | None, prompts: str | None) -> tuple[str, ...]:
    """--prompts FILE is short for --argument prompt=@FILE."""
    return (*(arguments or ()), *([] if prompts is None else [f"prompt=@{prompts}"]))


def _chosen(scheduler: str | None) -> dict[str, Any] | None:
    from stepquant.config import scheduler_choice

    return None if scheduler is None else scheduler_choice(scheduler, "--scheduler")


def _settings(ctx: typer.Context) -> Settings:
    settings: Any = ctx.obj
    return settings if isinstance(settings, Settings) else Settings()
