"""The smallest quantized models and pipelines that still have every part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from stepquant.model.clock import StepClock, attach_clock, edges_between
from stepquant.model.families import make_attention_explicit_
from stepquant.model.quantizer import DynamicQuantizer, InputQuantizer, WeightQuantizer
from stepquant.model.surgery import (
    make_plan,
    operand_specs,
    quantizable,
    quantized_layers,
    standard_rules,
    swap_layers_,
)
from stepquant.numerics.affine import choose_qparams, range_of
from stepquant.numerics.spec import LayerScheme, scheme_for


def tiny_unet(seed: int = 0, *, num_class_embeds: int | None = None) -> UNet2DModel:
    """A UNet of 50 thousand parameters with attention, for samples [B, 1, 8, 8]; with labels if there are classes."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=num_class_embeds,
    ).eval()


class TinyNet(nn.Module):
    """A denoiser that diffusers does not know: one convolution, one linear layer, for samples [B, 2, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.out = nn.Linear(4, 2, bias=False)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        hidden = torch.tanh(self.conv(sample)).movedim(1, -1)
        return self.out(hidden).movedim(-1, 1)


def small_unet() -> UNet2DModel:
    """Two blocks and no attention, with random weights: its graph is made quickly."""
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        add_attention=False,
    )
    return net.eval()


def quantize_(
    denoiser: Any, scheme: LayerScheme | None = None, *, rows: int = 3, steps: int = 5, **options: Any
) -> Any:
    """Quantize in place, every activation quantizer with a table of `rows` different rows, and harden."""
    scheme = scheme_for(4, 8) if scheme is None else scheme
    make_attention_explicit_(denoiser)
    plan = make_plan(denoiser, standard_rules(scheme, list(quantizable(denoiser)), **options))
    swap_layers_(denoiser, plan)
    clock = StepClock(edges_between(torch.linspace(0, 999, steps)))
    attach_clock(denoiser, clock)
    for name, layer in quantized_layers(denoiser).items():
        spec = plan[name].weight
        if spec is not None:
            layer.weight_quantizer = WeightQuantizer(spec, choose_qparams(*range_of(layer.weight, spec), spec))
            layer.harden_()
        for attribute, spec in operand_specs(plan[name]):
            wide = torch.linspace(1, 3, rows)
            table = choose_qparams(-wide, wide, spec)
            static = not spec.dynamic
            setattr(
                layer,
                attribute,
                InputQuantizer(spec, clock, table, torch.arange(steps) % rows) if static else DynamicQuantizer(spec),
            )
    return denoiser.requires_grad_(False).eval()


def tiny_pipe() -> tuple[DDIMPipeline, UNet2DModel]:
    """A pipeline with its full-precision denoiser, and the quantized denoiser."""
    unet = tiny_unet()
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe, quantize_(copy.deepcopy(unet))


def sampled(pipe: Any, steps: int = 5, **arguments: Any) -> Any:
    """Images of two seeds."""
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipe(batch_size=2, generator=generators, num_inference_steps=steps, output_type="np", **arguments).images


class Interrupt:
    """A progress that presses Ctrl-C at the given tick of the tracks with this name."""

    def __init__(self, what: str, tick: int) -> None:
        self.what = what
        self.left = tick
        self.fired = False

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        def advance(done: int) -> None:
            if self.what not in what or done == 0 or self.fired:
                return
            self.left -= 1
            if self.left == 0:
                self.fired = True
                raise KeyboardInterrupt

        yield advance
