"""Train `digits-dit`: a small autoencoder of handwritten digits and a class-conditional transformer on its latents.

The transformer, latent, guided and class-conditional counterpart of `digits-unet`, in diffusers' `DiTPipeline`: an
`AutoencoderKL` (32x32x1 to 8x8x4) and a `DiTTransformer2DModel` (64 tokens, v prediction, 1000 training steps) on
MNIST, padded from 28 to 32 pixels. The label is left out in a tenth of the draws, for classifier-free guidance.
The autoencoder is trained first. State is written every `--save-every` iterations: run the same command again after
an interruption.

    python training/digits_dit.py --data ../shared/data/mnist.npz --work runs/digits-dit
    python training/digits_dit.py --work runs/digits-dit --export src/stepquant/assets/digits-dit

Class 1000 of `DiTPipeline` means "no label", so the tables of labels have 1001 rows, of which eleven are used.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from loop import (
    TRAIN_TIMESTEPS,
    build_optimizers,
    fit,
    load_images,
    load_labels,
    parser_of,
    save_state,
    scaled,
    stratified,
    use_plain_attention,
)

NO_LABEL = 1000
DROPPED_LABELS = 0.1

# Weight of the divergence from the prior beside the squared error, both means over their elements: enough to keep
# latents near the unit scale and smooth, little enough for sharp digits. Ours.
KL_WEIGHT = 1e-3


def build_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def build_transformer() -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=8,
        patch_size=1,
        num_embeds_ada_norm=NO_LABEL,
    )
    # Blocks begin as the identity and the output as zero (Peebles and Xie 2023, section 3.2); diffusers does not do it.
    zero = [block.norm1.linear for block in model.transformer_blocks] + [model.proj_out_2]
    for layer in zero:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    return model


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )


def train_autoencoder(args: argparse.Namespace, data: torch.Tensor) -> AutoencoderKL:
    """data: `[N, 1, 32, 32]` in [-1, 1]."""
    torch.manual_seed(args.seed)
    model = build_autoencoder().to(args.device, memory_format=torch.channels_last)

    def losses_of(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        images = data[torch.randint(len(data), (args.batch,), generator=generator)].to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            posterior = model.encode(images).latent_dist
            spread = torch.randn(posterior.mean.shape, generator=generator).to(args.device) * posterior.std
            decoded = model.decode(posterior.mean + spread).sample
        error = (decoded.float() - images).square().mean()
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        return error + KL_WEIGHT * divergence, error

    fit(
        model,
        [torch.optim.AdamW(model.parameters(), lr=args.autoencoder_lr, weight_decay=1e-4)],
        losses_of,
        args.work / "autoencoder.pt",
        steps=args.autoencoder_steps,
        lr=args.autoencoder_lr,
        seed=args.seed,
        save_every=args.save_every,
        named=("autoencoder", "squared_error"),
    )
    return model.cpu().eval().requires_grad_(False)


@torch.no_grad()
def encoded(args: argparse.Namespace, model: AutoencoderKL, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents of all images, `[N, 4, 8, 8]` each; computed once."""
    path = args.work / "latents.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        return kept["mean"], kept["std"]
    found = [model.encode(part).latent_dist for part in data.split(500)]
    mean, std = torch.cat([part.mean for part in found]), torch.cat([part.std for part in found])
    save_state(path, {"mean": mean, "std": std})
    return mean, std


def train_transformer(
    args: argparse.Namespace, latents: tuple[torch.Tensor, torch.Tensor], labels: torch.Tensor, scale: float
) -> None:
    torch.manual_seed(args.seed)
    # Evaluation mode: each block would drop labels by itself, and the others would still know them.
    model = build_transformer().to(args.device).eval()
    if args.device == "cpu":
        use_plain_attention(model)
    alpha_bar = build_scheduler().alphas_cumprod
    forward = torch.compile(model) if args.compile else model
    mean, std = latents

    def losses_of(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(mean), (args.batch,), generator=generator)
        noise = torch.randn((2, args.batch, *mean.shape[1:]), generator=generator)
        clean = scale * (mean[chosen] + std[chosen] * noise[0])
        timestep = (stratified(args.batch, generator) * TRAIN_TIMESTEPS).long().clamp(max=TRAIN_TIMESTEPS - 1)
        dropped = torch.rand(args.batch, generator=generator) < DROPPED_LABELS
        label = torch.where(dropped, NO_LABEL, labels[chosen])
        level = alpha_bar[timestep].view(-1, 1, 1, 1)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise[1]
        target = (level.sqrt() * noise[1] - (1 - level).sqrt() * clean).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            prediction = forward(
                noisy.to(args.device), timestep=timestep.to(args.device), class_labels=label.to(args.device)
            ).sample
        loss = (prediction.float() - target).square().mean()
        return loss, loss

    fit(
        model,
        build_optimizers(model, "muon", args.lr, ("pos_embed", "proj_out", "embedding_table", "timestep_embedder")),
        losses_of,
        args.work / "transformer.pt",
        steps=args.steps,
        lr=args.lr,
        seed=args.seed,
        save_every=args.save_every,
        ema=args.ema,
        named=("transformer", "loss"),
    )


def train(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    data = scaled(load_images(args.data))
    labels = load_labels(args.data)
    autoencoder = train_autoencoder(args, data)
    mean, std = encoded(args, autoencoder, data)
    train_transformer(args, (mean, std), labels, _scale(mean, std))


def _scale(mean: torch.Tensor, std: torch.Tensor) -> float:
    """What brings latents to unit variance: diffusers' `scaling_factor`."""
    return float((mean.var() + std.square().mean()).rsqrt())


def export(args: argparse.Namespace) -> None:
    """Write the pipeline in float16: the averaged transformer, and the autoencoder with its scaling factor."""
    autoencoder, transformer = build_autoencoder(), build_transformer()
    autoencoder.load_state_dict(torch.load(args.work / "autoencoder.pt", weights_only=True)["model"])
    latents = torch.load(args.work / "latents.pt", weights_only=True)
    autoencoder.register_to_config(scaling_factor=_scale(latents["mean"], latents["std"]))
    state = torch.load(args.work / "transformer.pt", map_location="cpu", weights_only=True)
    transformer.load_state_dict(state["ema"])
    names = {digit: str(digit) for digit in range(10)}
    pipeline = DiTPipeline(transformer.half(), autoencoder.half(), build_scheduler(), id2label=names)
    pipeline.register_to_config(id2label=names)  # the pipeline itself forgets it when it is saved
    pipeline.save_pretrained(args.export)
    print(f"exported step {state['step']} to {args.export}")


def main() -> None:
    parser = parser_of(__doc__, work="runs/digits-dit", steps=12000, batch=128, ema=0.998)
    parser.add_argument("--autoencoder-steps", type=int, default=3000)
    parser.add_argument("--autoencoder-lr", type=float, default=2e-3)
    args = parser.parse_args()
    if args.export:
        export(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
