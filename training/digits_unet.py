"""Train `digits-unet`, the diffusion model that stepquant ships.

A `UNet2DModel` of diffusers (32x32x1, epsilon prediction, 1000 training steps, linear betas) on MNIST, padded from
28 to 32 pixels and scaled to [-1, 1]. Cosine decay, and an exponential moving average of the weights, which is
what gets exported. The state is written every `--save-every` iterations, so a killed run continues where it stopped:
run the same command again.

    python training/digits_unet.py --data ../shared/data/mnist.npz --work runs/digits-unet
    python training/digits_unet.py --work runs/digits-unet --export src/stepquant/assets/digits-unet
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor

TRAIN_TIMESTEPS = 1000

# Weight of the squared error of the predicted image: the signal-to-noise ratio between these bounds, which are ours.
# Errors at low noise count less than under Min-SNR (Hang et al. 2023, upper bound 5), those at high noise more (it has
# no lower bound): what digit it becomes is decided far from the image.
# `HIGHEST_WEIGHT` bounds what the lower bound does to the noise error that is trained on.
LOWEST_RATIO, HIGHEST_RATIO = 0.25, 1.0
HIGHEST_WEIGHT = 100.0

# Which share of the draws lies below which timestep: most of them between 200 and 800, for the same reason.
DRAWN_SHARE, DRAWN_BELOW = (0.0, 0.15, 0.85, 1.0), (0.0, 200.0, 800.0, 1000.0)


# From this timestep on the target is the mean of the posterior over the training set, not the one image drawn: the same
# minimum with less gradient noise (Stable Target Field, Xu, Tong and Jaakkola, ICLR 2023, with the whole set as the
# reference batch). Below it the posterior is nearly the drawn image.
MEAN_FROM = 550


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
        norm_num_groups=16,
    )


def use_plain_attention(model: torch.nn.Module) -> None:
    """Two batched products and a softmax: on a CPU the fused attention's gradient costs more over so few tokens."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def begin_from(model: UNet2DModel, folder: Path) -> None:
    """Take over the weights of an earlier export. One with a level less gives all but the coarsest level's."""
    earlier = UNet2DModel.from_pretrained(folder / "unet", dtype=torch.float32)
    state, missing = earlier.state_dict(), len(model.up_blocks) - len(earlier.up_blocks)
    if missing:
        block = re.compile(r"^up_blocks\.(\d+)")
        state = {block.sub(lambda m: f"up_blocks.{int(m[1]) + missing}", key): value for key, value in state.items()}
    new = model.load_state_dict(state, strict=not missing).missing_keys
    print(f"{len(state)} tensors from {folder}, {len(new)} new", flush=True)


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=TRAIN_TIMESTEPS, clip_sample=False, timestep_spacing="trailing")


def load_images(path: Path) -> torch.Tensor:
    """MNIST's training images, uint8 `[60000, 1, 32, 32]`."""
    images = np.load(path)["train_x"]
    return torch.nn.functional.pad(torch.from_numpy(images), (2, 2, 2, 2))[:, None]


def learning_rate(step: int, total: int, peak: float, warmup: int = 200) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def posterior_mean(noisy: torch.Tensor, level: torch.Tensor, data: torch.Tensor, halved: torch.Tensor) -> torch.Tensor:
    """E[image | noisy] under the uniform distribution over `data`.

    Args:
        noisy: `[n, 1, h, w]`; `level` is its cumulative product of alphas, `[n, 1, 1, 1]`.
        data: all images, `[N, h * w]`; `halved` is half of their squared norms, `[N]`.
    """
    flat, level = noisy.flatten(1), level.flatten(1)
    logits = (level.sqrt() * (flat @ data.T) - level * halved) / (1 - level)
    return (logits.softmax(1) @ data).view_as(noisy)


class Muon(torch.optim.Muon):
    """torch's Muon, which takes matrices only, with convolutions as `[out, in * kh * kw]`; rates as for AdamW."""

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float) -> None:
        self.shaped = list(parameters)
        self.matrices = [torch.nn.Parameter(parameter.detach().flatten(1).clone()) for parameter in self.shaped]
        super().__init__(self.matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for parameter, matrix in zip(self.shaped, self.matrices, strict=True):
            matrix.copy_(parameter.flatten(1))
            matrix.grad = parameter.grad.flatten(1)
        super().step()
        for parameter, matrix in zip(self.shaped, self.matrices, strict=True):
            parameter.copy_(matrix.view_as(parameter))


def build_optimizers(
    model: torch.nn.Module, kind: str, lr: float, ends: tuple[str, ...] = ("conv_in", "conv_out")
) -> list[torch.optim.Optimizer]:
    """AdamW for everything; or Muon for the matrices and convolutions inside, AdamW for `ends`, norms and biases."""
    named = list(model.named_parameters())
    inner = [p for name, p in named if kind == "muon" and p.ndim > 1 and not any(end in name for end in ends)]
    chosen = {id(parameter) for parameter in inner}
    others = [parameter for _, parameter in named if id(parameter) not in chosen]
    adam = torch.optim.AdamW(others, lr=lr, weight_decay=1e-3, betas=(0.9, 0.99))
    return [adam, Muon(inner, lr)] if inner else [adam]


def save_state(path: Path, state: dict[str, object]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def train(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    images = load_images(args.data)
    data = images.flatten(1).float() / 127.5 - 1
    halved = data.square().sum(1) / 2
    torch.manual_seed(args.seed)
    model = build_unet()
    if args.init:
        begin_from(model, args.init)
    if device.type == "cpu":
        use_plain_attention(model)
    model.to(device, memory_format=torch.channels_last)
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizers = build_optimizers(model, args.optimizer, args.lr)
    generator = torch.Generator().manual_seed(args.seed)
    start = 0
    state_path = args.work / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        ema, start = state["ema"], state["step"]
        generator.set_state(state["generator"].cpu())
        print(f"resumed at step {start}", flush=True)
    alpha_bar = build_scheduler().alphas_cumprod
    forward = torch.compile(model) if args.compile else model
    began, losses = time.time(), []
    for step in range(start, args.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
        chosen = torch.randint(len(images), (args.batch,), generator=generator)
        clean = data[chosen].view(-1, *images.shape[1:])
        # Stratified timesteps: one from each of `batch` equal parts of the range. Same mean loss, less variance.
        jitter = (torch.arange(args.batch) + torch.rand(args.batch, generator=generator)) / args.batch
        timestep = torch.from_numpy(np.interp(jitter, DRAWN_SHARE, DRAWN_BELOW)).long().clamp(max=TRAIN_TIMESTEPS - 1)
        noise = torch.randn(clean.shape, generator=generator)
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
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(args.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                ema[name].lerp_(value, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            spent = time.time() - began
            row = {"step": step + 1, "loss": float(np.mean(losses[-50:])), "seconds": round(spent, 1)}
            with (args.work / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_state(
                state_path,
                {
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "ema": ema,
                    "step": step + 1,
                    "generator": generator.get_state(),
                },
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
    data = load_images(args.data).flatten(1).float() / 127.5 - 1
    halved = data.square().sum(1) / 2
    test = torch.nn.functional.pad(torch.from_numpy(np.load(args.data)["test_x"]), (2, 2, 2, 2))[:, None]
    generator = torch.Generator().manual_seed(args.seed)
    clean = test[torch.randperm(len(test), generator=generator)[:count]].float() / 127.5 - 1
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--work", type=Path, default=Path("runs/digits-unet"))
    parser.add_argument("--init", type=Path, help="begin with the weights of this pipeline folder (an earlier export)")
    parser.add_argument("--export", type=Path, help="write the pipeline here instead of training")
    parser.add_argument("--compare", type=Path, help="only measure the pipeline in this folder on test images")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if args.compare:
        compare(args)
    elif args.export:
        export(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
