"""A torch module that diffusers has never seen, sampled by one of its schedulers.

    python examples/own_denoiser.py --out own-w4a8

All that stepquant asks of a denoiser is `denoiser(sample, timestep) -> prediction`. The module here has random weights:
what it shows is the way, not the images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import stepquant


class Denoiser(nn.Module):
    """Two convolutions around a multilayer perceptron over channels, told the time. Samples are [B, 1, H, W]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.leave = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = torch.as_tensor(timestep, dtype=sample.dtype, device=sample.device).reshape(-1, 1) / 1000
        hidden = self.enter(sample) + self.time(time)[:, :, None, None]
        return self.leave(hidden + self.mix(hidden.movedim(1, -1)).movedim(-1, 1))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("own-w4a8"), help="folder to make for the checkpoint")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=16, help="images to calibrate on")
    parser.add_argument("--iterations", type=int, default=40, help="of AccuQuant's windows")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    pipe = stepquant.DenoiserPipeline(Denoiser(), DDIMScheduler(), sample_shape=(1, 16, 16))

    recipe = stepquant.METHODS["accuquant"](
        weights=4,
        activations=8,
        samples=args.samples,
        batch=8,
        window=2,
        iterations=args.iterations,
        lr_weights=1e-2,
        block_iterations=0,
    )
    quantized = stepquant.quantize(pipe, recipe, steps=args.steps)
    quantized.save(args.out)

    # A class of your own is not looked up by name: pass an instance, whatever its weights are. The arithmetic of the
    # calibration gives the same bits; without `engine` it may be a faster one.
    loaded = stepquant.load(args.out, denoiser=Denoiser(), engine="simulated")
    before = stepquant.sample(quantized.pipe, seeds=range(4), steps=args.steps)
    after = stepquant.sample(loaded, seeds=range(4), steps=args.steps)
    print("the loaded checkpoint samples the same bits:", torch.equal(before, after))


if __name__ == "__main__":
    main()
