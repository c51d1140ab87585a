"""An estimate on paper: what calibrating SDXL and Flux would take on one GPU and on several. Nothing of it is run.

    python benchmarks/paper_estimate.py [--flops 200e12] [--slowdown 2] [--processes 8] [--measure digits-unet]

Counted: the multiplications and additions of one evaluation (both are a FLOP), by torch's counter on networks of the
published configurations without memory; their weights, blocks and reconstruction units; the evaluations of a recipe, by
the code of `quantize --dry-run`.

Assumed, all of them options: FLOP/s that a GPU achieves, how many times longer a quantized evaluation in simulated
arithmetic takes than a full-precision one, the speed between GPUs and that from main memory.

    T(N) = c * (E_split / N + E_whole) + I * 2 (N - 1) / N * V / b        c = FLOPs of a row * slowdown / FLOP per s

E: rows through the network, a backward pass counted as two, in work that several processes share and in work that each
does. Recording is in full precision, so without the slowdown. I: iterations of windows that learn weights, V: bytes of
their gradients, 4 for a weight, b: between two GPUs. Left out: arithmetic that is not the network's (Gram matrices,
descents, range search, Adam), messages of blocks, loading, text encoders.

Offload, one process: blocks of 2 bytes a weight come once for each call of the network, and once more for its backward
pass, which is counted as two: at most so much moves. Blocks that are fitted stay on the device meanwhile.

--measure times one evaluation of a small network here, and says how many FLOP/s that is and what simulated arithmetic
costs, so that the two first assumptions can be compared with something.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stepquant.calibrate.estimate import Costs, largest_inputs
from stepquant.calibrate.offload import blocks_in_turn
from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
from stepquant.calibrate.stages import Record
from stepquant.calibrate.window_fitting import FitWindows
from stepquant.methods import METHODS, PRESETS
from stepquant.recipe import Recipe, Stage

STEPS, SAMPLES = 20, 64
WEIGHT_BYTES = 2
SPLIT = (Record, RoundBlocks, ScaleBlocks, FitWindows)


@dataclass(frozen=True)
class Network:
    """flops: of one row. rows: of a step, for one image. outside, block: weights beside the blocks, of the largest.

    inputs: of each reconstruction unit (`largest_inputs`).
    """

    name: str
    rows: int
    flops: int
    weights: int
    outside: int
    block: int
    inputs: tuple[int, ...]

    @classmethod
    def of(cls, name: str, rows: int, build: Callable[[], nn.Module], call: Callable[[], dict[str, Any]]) -> Network:
        with torch.device("meta"), torch.no_grad():
            network = build().eval()
            flops = flops_of(network, call())
        blocks = [weights_of(block) for block in blocks_in_turn(network).values()]
        weights = weights_of(network)
        return cls(name, rows, flops, weights, weights - sum(blocks), max(blocks), largest_inputs(network))


def flops_of(network: nn.Module, call: dict[str, Any]) -> int:
    """Of one call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(**call)
    return int(counter.get_total_flops())


def weights_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def sdxl() -> Network:
    """stabilityai/stable-diffusion-xl-base-1.0 at 1024 x 1024, with guidance."""
    from diffusers import UNet2DConditionModel

    return Network.of(
        "SDXL",
        2,
        lambda: UNet2DConditionModel(
            sample_size=128,
            in_channels=4,
            out_channels=4,
            layers_per_block=2,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            transformer_layers_per_block=[1, 2, 10],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        lambda: {
            "sample": torch.empty(1, 4, 128, 128),
            "timestep": torch.empty(()),
            "encoder_hidden_states": torch.empty(1, 77, 2048),
            "added_cond_kwargs": {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)},
        },
    )


def flux() -> Network:
    """black-forest-labs/FLUX.1-dev at 1024 x 1024, whose guidance is an input, with 512 tokens of text."""
    from diffusers import FluxTransformer2DModel

    return Network.of(
        "Flux",
        1,
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        lambda: {
            "hidden_states": torch.empty(1, 4096, 64),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "img_ids": torch.empty(4096, 3),
            "txt_ids": torch.empty(512, 3),
            "guidance": torch.empty(1),
        },
    )


def recipes() -> dict[str, Recipe]:
    """layerwise and accuquant at preset quick, with more samples than it has, and what is longest."""
    found = {f"{name} quick": METHODS[name](**PRESETS[name]["quick"] | {"samples": SAMPLES}) for name in METHODS_QUICK}
    return {**found, "q_diffusion full": METHODS["q_diffusion"](**PRESETS["q_diffusion"]["full"])}


METHODS_QUICK = ("layerwise", "accuquant")


@dataclass(frozen=True)
class Budget:
    """Rows through the network. recorded: in full precision. split, whole: shared by processes and not, quantized.

    learnt: iterations of windows that learn weights. moved: calls of the network, at most, that bring all blocks.
    """

    recorded: float = 0
    split: float = 0
    whole: float = 0
    learnt: int = 0
    moved: float = 0

    @classmethod
    def of(cls, recipe: Recipe, network: Network, steps: int = STEPS) -> Budget:
        costs = Costs.of(recipe, steps=steps, rows=network.rows, inputs=network.inputs)
        assert costs is not None
        total = cls()
        for stage in recipe.stages:
            total = total.plus(stage, costs)
        return total

    def plus(self, stage: Stage, costs: Costs) -> Budget:
        """With one more stage. Raises TypeError for one whose evaluations are not known."""
        count = costs.evaluations(stage)
        if count is None:
            raise TypeError(f"The evaluations of {type(stage).__name__} are not known beforehand.")
        kind = "recorded" if isinstance(stage, Record) else "split" if isinstance(stage, SPLIT) else "whole"
        learnt = stage.iterations if isinstance(stage, FitWindows) and stage.learn_weights else 0
        return dataclasses.replace(
            self,
            **{kind: getattr(self, kind) + count},
            learnt=self.learnt + learnt,
            moved=self.moved + whole_passes(stage, costs, count),
        )


def whole_passes(stage: Stage, costs: Costs, count: float) -> float:
    """Calls of the whole network among a stage's evaluations; those that fit a block only run this block."""
    if isinstance(stage, RoundBlocks | ScaleBlocks):
        one, two = (dataclasses.replace(stage, iterations=number) for number in (1, 2))
        captures = 2 * one.evaluations_for(costs.entries) - two.evaluations_for(costs.entries)
        return captures / stage.batch
    if isinstance(stage, Record | FitWindows):
        return count / (costs.recording.batch * costs.rows)
    return math.ceil(count / getattr(stage, "batch", costs.rows))


def table_of_networks(networks: list[Network]) -> str:
    lines = [
        "| network | weights | TFLOP of a row | rows of a step | units | on the device with `--offload` | without |",
        "|---|---|---|---|---|---|---|",
    ]
    for network in networks:
        offloaded = WEIGHT_BYTES * (2 * network.outside + network.block) / 1e9
        lines.append(
            f"| {network.name} | {network.weights / 1e9:.2f} billion | {network.flops / 1e12:.2f} | {network.rows} | "
            f"{len(network.inputs)} | {offloaded:.2f} GB | {2 * WEIGHT_BYTES * network.weights / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def table_of_times(networks: list[Network], arguments: argparse.Namespace) -> str:
    several = arguments.processes
    lines = [
        f"| network | recipe | rows recorded | rows shared | rows not shared | 1 GPU | {several} GPUs | speed-up | "
        "moved with `--offload` | time of that |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for network in networks:
        row = network.flops / arguments.flops
        for name, recipe in recipes().items():
            budget = Budget.of(recipe, network)

            def seconds(count: int, budget: Budget = budget, row: float = row, network: Network = network) -> float:
                shared = (budget.recorded + arguments.slowdown * budget.split) / count
                messages = budget.learnt * 2 * (count - 1) / count * 4 * network.weights / arguments.between
                return row * (shared + arguments.slowdown * budget.whole) + messages

            moved = budget.moved * WEIGHT_BYTES * (network.weights - network.outside)
            lines.append(
                f"| {network.name} | {name} | {budget.recorded:,.0f} | {budget.split:,.0f} | {budget.whole:,.0f} | "
                f"{_time(seconds(1))} | {_time(seconds(several))} | {seconds(1) / seconds(several):.2f} | "
                f"{moved / 1e12:.1f} TB | {_time(moved / arguments.bus)} |"
            )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def measured(model: str) -> str:
    """FLOP/s of one evaluation here, and what simulated arithmetic costs."""
    from stepquant.api import open_model, quantize, sample
    from stepquant.model.families import find_denoiser

    pipe = open_model(model)
    _, full_precision = find_denoiser(pipe)
    seen: dict[str, Any] = {}

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(args=args, kwargs=kwargs)

    made = quantize(pipe, METHODS["rtn"](samples=2, batch=2), steps=2)
    _, quantized = find_denoiser(made.pipe)
    handle = full_precision.register_forward_pre_hook(note, with_kwargs=True)
    sample(pipe, seeds=[0], steps=1)
    handle.remove()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        full_precision(*seen["args"], **seen["kwargs"])
    flops = counter.get_total_flops()
    plain, simulated = [], []
    with torch.no_grad():
        for _ in range(20):
            for network, times in ((full_precision, plain), (quantized, simulated)):
                began = time.perf_counter()
                network(*seen["args"], **seen["kwargs"])
                times.append(time.perf_counter() - began)
    seconds = statistics.median(plain)
    slower = statistics.median(one / other for one, other in zip(simulated, plain, strict=True))
    return (
        f"{model} here, {torch.get_num_threads()} threads: {flops / 1e6:.1f} MFLOP, {1e3 * seconds:.2f} ms an "
        f"evaluation, {flops / seconds / 1e9:.2f} GFLOP/s; W4A8 in simulated arithmetic takes {slower:.2f} times as "
        "long."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--flops", type=float, default=200e12, help="FLOP/s that a GPU achieves (assumed)")
    parser.add_argument("--slowdown", type=float, default=2.0, help="of simulated arithmetic (assumed)")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--between", type=float, default=100e9, help="bytes/s between two GPUs (assumed)")
    parser.add_argument("--bus", type=float, default=10e9, help="bytes/s from main memory to a GPU (assumed)")
    parser.add_argument("--measure", metavar="MODEL", help="also time one evaluation of a small model here")
    arguments = parser.parse_args()
    networks = [sdxl(), flux()]
    print(table_of_networks(networks), table_of_times(networks, arguments), sep="\n\n")
    if arguments.measure:
        print(f"\n{measured(arguments.measure)}")


if __name__ == "__main__":
    main()
