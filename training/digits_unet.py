"""Train `digits-unet`, the diffusion model that stepquant ships.

A `UNet2DModel` of diffusers (32x32x1, epsilon prediction, 1000 training steps, linear betas) on MNIST, padded from
28 to 32 pixels and scaled to [-1, 1]. Cosine decay, and an exponential moving average of the weights, which is
what gets exported. The state is written every `--save-every` iterations, so a killed run continues where it stopped:
run the same command again. On a CPU a process for each core is faster than one with a thread for each:

    python training/digits_unet.py --data ../shared/data/mnist.npz --work runs/digits-unet --compile
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 training/digits_unet.py --work runs/digits-unet --compile
    python training/digits_unet.py --work runs/digits-unet --export src/stepquant/assets/digits-unet
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from loop import (
    TRAIN_TIMESTEPS,
    build_optimizers,
    fit,
    join_processes,
    load_images,
    own_part,
    parser_of,
    scaled,
    stratified,
    use_plain_attention,
)

# Weight of the squared error of the predicted image: the signal-to-noise ratio between these bounds, which are ours.
# Errors at low noise count less than under Min-SNR (Hang et al. 2023, upper bound 5), those at high noise more (it has
# no lower bound): what digit it becomes is decided far from the image.
# `HIGHEST_WEIGHT` bounds what the lower bound does to the noise error that is trained on.
LOWEST_RATIO, HIGHEST_RATIO = 0.25, 1.0
HIGHEST_WEIGHT = 100.0

# Which share of the draws lies below which timestep: most of them between 200 and 700, for the same reason.
DRAWN_SHARE, DRAWN_BELOW = (0.0, 0.15, 0.85, 1.0), (0.0, 200.0, 700.0, 1000.0)


# From this timestep on the target is the mean of the posterior over the training set, not the one image drawn: the same
# minimum with less gradient noise (Stable Target Field, Xu, Tong and Jaakkola, ICLR 2023, with the whole set as the
# reference batch). Below it the posterior is nearly the drawn image.
MEAN_FROM = 300


def build_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
    )


# The layers that carry the sample past the network at the start, which AdamW moves: Muon's steps are of the same size
# whatever the gradient, and would lose what is carried before the rest has learnt anything.
CARRYING = ("conv_in", "conv_out", "up_blocks.3.resnets.1.conv_shortcut")


@torch.no_grad()
def carry_sample(model: UNet2DModel, ballast: float = 4.0) -> None:
    """Set the first channels of the last layers so that the prediction begins as the noisy sample itself.

    Far from the image a prediction of noise is nearly its input, and an error of it counts 1 / sqrt(alpha_bar) times in
    the predicted image (25 at timestep 800). A U-Net without a connection from input to output has to learn that copy,
    through a norm that takes the scale away and a SiLU, and learns it slowly: compare `--plain-start`. Both are undone
    here: channels x and -x pass as silu(x) - silu(-x) = x, and beside constants of +-`ballast` in their group the norm
    hardly depends on x. What the network learns is the difference.
    """
    width = model.conv_in.out_channels
    if width // model.conv_norm_out.num_groups < 4:
        raise ValueError("carrying the sample takes a group of at least 4 channels in the last norm")
    model.conv_in.weight[0], model.conv_in.bias[0] = 0.0, 0.0
    model.conv_in.weight[0, 0, 1, 1] = 1.0
    # The last block of the way up reads what it made so far and, from channel `width` on, what `conv_in` gave.
    last = model.up_blocks[-1].resnets[-1]
    last.conv_shortcut.weight[:4], last.conv2.weight[:4], last.conv2.bias[:4] = 0.0, 0.0, 0.0
    last.conv_shortcut.weight[0, width], last.conv_shortcut.weight[1, width] = 1.0, -1.0
    last.conv_shortcut.bias[:4] = torch.tensor([0.0, 0.0, ballast, -ballast])
    model.conv_norm_out.weight[:2] = ((1 + ballast**2) / 2) ** 0.5
    model.conv_norm_out.weight[2:4] = 0.0
    model.conv_out.weight.mul_(0.1)
    model.conv_out.weight[:, :4], model.conv_out.bias[:] = 0.0, 0.0
    model.conv_out.weight[0, 0, 1, 1], model.conv_out.weight[0, 1, 1, 1] = 1.0, -1.0


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=TRAIN_TIMESTEPS, clip_sample=False, timestep_spacing="trailing")


def posterior_mean(noisy: torch.Tensor, level: torch.Tensor, data: torch.Tensor, halved: torch.Tensor) -> torch.Tensor:
    """E[image | noisy] under the uniform distribution over `data`.

    Args:
        noisy: `[n, 1, h, w]`; `level` is its cumulative product of alphas, `[n, 1, 1, 1]`.
        data: all images, `[N, h * w]`; `halved` is half of their squared norms, `[N]`.
    """
    flat, level = noisy.flatten(1), level.flatten(1)
    logits = (level.sqrt() * (flat @ data.T) - level * halved) / (1 - level)
    return (logits.softmax(1) @ data).view_as(noisy)


def train(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    join_processes()
    device = torch.device(args.device)
    images = load_images(args.data)
    data = scaled(images.flatten(1))
    halved = data.square().sum(1) / 2
    torch.manual_seed(args.seed)
    model = build_unet()
    if not args.plain_start:
        carry_sample(model)
    if device.type == "cpu":
        use_plain_attention(model)
    model.to(device, memory_format=torch.channels_last)
    alpha_bar = build_scheduler().alphas_cumprod
    forward = torch.compile(model) if args.compile else model

    def losses_of(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(images), (args.batch,), generator=generator)
        drawn = np.interp(stratified(args.batch, generator), DRAWN_SHARE, DRAWN_BELOW)
        noise = torch.randn(args.batch, *images.shape[1:], generator=generator)
        clean, noise = data[own_part(chosen)].view(-1, *images.shape[1:]), own_part(noise)
        timestep = own_part(torch.from_numpy(drawn)).long().clamp(max=TRAIN_TIMESTEPS - 1)
        level = alpha_bar[timestep].view(-1, 1, 1, 1)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        target, far = noise.clone(), timestep >= MEAN_FROM
        mean = posterior_mean(noisy[far], level[far], data, halved)
        target[far] = (noisy[far] - level[far].sqrt() * mean) / (1 - level[far]).sqrt()
        noisy = noisy.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            prediction = forward(noisy, timestep.to(device)).sample
        ratio = level / (1 - level)
        weight = (ratio.clamp(LOWEST_RATIO, HIGHEST_RATIO) / ratio).clamp(max=HIGHEST_WEIGHT).to(device)
        loss = (weight * (prediction.float() - target.to(device)).square()).mean()
        return loss, loss

    fit(
        model,
        build_optimizers(model, args.optimizer, args.lr, CARRYING),
        losses_of,
        args.work / "state.pt",
        steps=args.steps,
        lr=args.lr,
        seed=args.seed,
        save_every=args.save_every,
        ema=args.ema,
    )


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights as a diffusers pipeline in float16."""
    state = torch.load(args.work / "state.pt", map_location="cpu", weights_only=True)
    model = build_unet()
    model.load_state_dict(state["ema"])
    pipeline = DDIMPipeline(unet=model.half(), scheduler=build_scheduler())
    pipeline.save_pretrained(args.export)
    print(f"exported step {state['step']} to {args.export}")


@torch.no_grad()
def compare(args: argparse.Namespace, count: int = 256) -> None:
    """Squared error of the predicted image on test images, beside that of the mean posterior over the training set.

    The second is the best that copying training images can do: a network above it has not learnt what there is.
    """
    model = UNet2DModel.from_pretrained(args.compare / "unet", dtype=torch.float32).eval()
    data = scaled(load_images(args.data).flatten(1))
    halved = data.square().sum(1) / 2
    test = load_images(args.data, "test")
    generator = torch.Generator().manual_seed(args.seed)
    clean = scaled(test[torch.randperm(len(test), generator=generator)[:count]])
    for timestep in range(100, TRAIN_TIMESTEPS, 100):
        level = build_scheduler().alphas_cumprod[timestep].view(1, 1, 1, 1)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        predicted = (noisy - (1 - level).sqrt() * model(noisy, timestep).sample) / level.sqrt()
        errors = [
            (found - clean).square().mean().item() for found in (predicted, posterior_mean(noisy, level, data, halved))
        ]
        print(f"t = {timestep}: network {errors[0]:.4f}, training set {errors[1]:.4f}")


def main() -> None:
    parser = parser_of(__doc__, work="runs/digits-unet", steps=4400, batch=96, ema=0.999, lr=1e-2)
    parser.add_argument("--plain-start", action="store_true", help="begin with torch's own weights: see `carry_sample`")
    parser.add_argument("--compare", type=Path, help="only measure the pipeline in this folder on test images")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    args = parser.parse_args()
    if args.compare:
        compare(args)
    elif args.export:
        export(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
