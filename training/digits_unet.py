"""Train `digits-unet`, the diffusion model that stepquant ships.

A class-conditional `UNet2DModel` of diffusers (32x32x1, epsilon prediction, 1000 training steps, linear betas) on
MNIST, padded from 28 to 32 pixels and scaled to [-1, 1]. Cosine decay, and an exponential moving average of the
weights, which is what gets exported. It learns from a larger network under classifier-free guidance (distillation:
Meng et al., CVPR 2023, stage one, with one weight), so that one call a step is enough. Four runs, each from what others
exported (`python $T --work runs/NAME --export runs/NAME/model`, with the same `--levels` and `--unconditional`):

    T=training/digits_unet.py
    python $T --work runs/any --levels 4 --unconditional
    python $T --work runs/told --levels 4 --init runs/any/model --steps 1900 --lr 7e-3 --ema 0.997
    python $T --work runs/guided --levels 4 --init runs/told/model --teacher runs/told/model --guide runs/any/model \\
        --steps 700 --lr 3e-3 --ema 0.99
    python $T --work runs/digits-unet --init runs/before --teacher runs/guided/model --steps 1200 --lr 7e-3 --ema 0.995
    python $T --work runs/digits-unet --export src/stepquant/assets/digits-unet

The larger network begins with its input (`carry_sample`) and learns fast, but everything that it carries passes a
single channel, which few bits spoil; the shipped one has no such channel. `runs/before` is the one shipped before,
without labels: src/stepquant/assets/digits-unet at commit b21b0ea. Without `--init` the last run begins with torch's
own weights.

The state is written every `--save-every` iterations, so a killed run continues where it stopped: run the same command
again. `--compile` is worth its minutes, and on a CPU a process for each core is faster than one with a thread for
each: `OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 $T ... --compile`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler, UNet2DModel
from loop import (
    TRAIN_TIMESTEPS,
    build_optimizers,
    fit,
    join_processes,
    load_images,
    load_labels,
    own_part,
    parser_of,
    scaled,
    stratified,
    use_plain_attention,
)

CLASSES, SHAPE = 10, (1, 32, 32)

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


# By number of levels: channels of each, and groups of the norms.
LEVELS = {3: ((32, 64, 128), 16), 4: ((32, 64, 128, 128), 8)}


def build_unet(levels: int = 3, *, conditional: bool = True) -> UNet2DModel:
    """Attention from 8x8 pixels on."""
    channels, groups = LEVELS[levels]
    model = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=channels,
        norm_num_groups=groups,
        down_block_types=("DownBlock2D",) * 2 + ("AttnDownBlock2D",) * (levels - 2),
        up_block_types=("AttnUpBlock2D",) * (levels - 2) + ("UpBlock2D",) * 2,
        attention_head_dim=32,
        num_class_embeds=CLASSES if conditional else None,
    )
    if conditional:
        # So that labels begin as a small part of the embedding that they are added to.
        torch.nn.init.normal_(model.class_embedding.weight, std=0.02)
    return model


# The layers that carry the sample past the network at the start, which AdamW moves: Muon's steps are of the same size
# whatever the gradient, and would lose what is carried before the rest has learnt anything.
CARRYING = ("conv_in", "conv_out", "up_blocks.3.resnets.1.conv_shortcut")
# Nor is a table of labels a matrix whose rows mean anything together.
NOT_MATRICES = (*CARRYING, "class_embedding")


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


class TrainingSet:
    """All images, by label, for the posterior over them. Where labels are not told, all have the same."""

    def __init__(self, path: Path, *, conditional: bool) -> None:
        self.images = scaled(load_images(path).flatten(1))  # [N, h * w]
        self.labels = load_labels(path)
        if not conditional:
            self.labels.zero_()
        self._images = [self.images[self.labels == label] for label in range(CLASSES)]
        self._halved = [images.square().sum(1) / 2 for images in self._images]

    def posterior_mean(self, noisy: torch.Tensor, level: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """E[image | noisy, label] under the uniform distribution over the images of each label.

        Args:
            noisy: `[n, 1, h, w]`; `level` is its cumulative product of alphas, `[n, 1, 1, 1]`; labels: `[n]`.
        """
        flat, level, mean = noisy.flatten(1), level.flatten(1), torch.empty_like(noisy).flatten(1)
        for label in labels.unique().tolist():
            own = labels == label
            images, share = self._images[label], level[own]
            logits = (share.sqrt() * (flat[own] @ images.T) - share * self._halved[label]) / (1 - share)
            mean[own] = logits.softmax(1) @ images
        return mean.view_as(noisy)


@torch.no_grad()
def begin_from(model: UNet2DModel, folder: Path) -> None:
    """Take the weights of an exported network over; a table of labels that it lacks stays as it is."""
    found = UNet2DModel.from_pretrained(folder / "unet", dtype=torch.float32).state_dict()
    left = [name for name in model.load_state_dict(found, strict=False).missing_keys if "class_embedding" not in name]
    if left:
        raise ValueError(f"{folder} holds another network: it has no {', '.join(left[:3])}")


def told(labels: torch.Tensor, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """What the network is called with beside sample and timestep."""
    return {} if args.unconditional else {"class_labels": labels.to(args.device)}


class Teacher:
    """What a frozen network with labels predicts, or gives under guidance by one without (Ho and Salimans 2022, eq. 6).

    e = e_c + w (e_c - e_u): e_c of `--teacher`, e_u of `--guide`; w is `--guidance`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.weight = args.guidance
        self._teacher = self._opened(args, args.teacher)
        self._guide = None if args.guide is None else self._opened(args, args.guide)

    @staticmethod
    def _opened(args: argparse.Namespace, folder: Path) -> UNet2DModel:
        net = UNet2DModel.from_pretrained(folder / "unet", dtype=torch.float32).eval().requires_grad_(False)
        if args.device == "cpu":
            use_plain_attention(net)
        net.to(args.device, memory_format=torch.channels_last)
        return torch.compile(net) if args.compile else net

    @torch.no_grad()
    def __call__(self, noisy: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(noisy.device.type, torch.bfloat16):
            with_label = self._teacher(noisy, timestep, class_labels=labels).sample.float()
            if self._guide is None:
                return with_label
            without = self._guide(noisy, timestep).sample.float()
        return with_label + self.weight * (with_label - without)


def train(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    join_processes()
    device = torch.device(args.device)
    data = TrainingSet(args.data, conditional=not args.unconditional)
    torch.manual_seed(args.seed)
    model = build_unet(args.levels, conditional=not args.unconditional)
    if args.init:
        begin_from(model, args.init)
    elif args.levels == 4 and not args.plain_start:
        carry_sample(model)
    if device.type == "cpu":
        use_plain_attention(model)
    model.to(device, memory_format=torch.channels_last)
    alpha_bar = build_scheduler().alphas_cumprod
    forward = torch.compile(model) if args.compile else model
    teacher = Teacher(args) if args.teacher else None

    def losses_of(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(data.images), (args.batch,), generator=generator)
        drawn = np.interp(stratified(args.batch, generator), DRAWN_SHARE, DRAWN_BELOW)
        noise = own_part(torch.randn(args.batch, *SHAPE, generator=generator))
        chosen = own_part(chosen)
        clean, labels = data.images[chosen].view(-1, *SHAPE), data.labels[chosen]
        timestep = own_part(torch.from_numpy(drawn)).long().clamp(max=TRAIN_TIMESTEPS - 1)
        level = alpha_bar[timestep].view(-1, 1, 1, 1)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        far = timestep >= MEAN_FROM
        inputs = noisy.to(device, memory_format=torch.channels_last), timestep.to(device)
        if teacher is None:
            mean = data.posterior_mean(noisy[far], level[far], labels[far])
            noise[far] = (noisy[far] - level[far].sqrt() * mean) / (1 - level[far]).sqrt()
            target = noise.to(device)
        else:
            # Nearer to the image the label is plain to see, and the drawn noise teaches better. The whole batch goes
            # through the other networks: its size is fixed, and so compiled once.
            taught = teacher(*inputs, labels.to(device))
            target = torch.where(far.view(-1, 1, 1, 1).to(device), taught, noise.to(device))
        with torch.autocast(device.type, torch.bfloat16):
            prediction = forward(*inputs, **told(labels, args)).sample
        ratio = level / (1 - level)
        weight = (ratio.clamp(LOWEST_RATIO, HIGHEST_RATIO) / ratio).clamp(max=HIGHEST_WEIGHT).to(device)
        loss = (weight * (prediction.float() - target).square()).mean()
        return loss, loss

    fit(
        model,
        build_optimizers(model, args.optimizer, args.lr, NOT_MATRICES),
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
    model = build_unet(args.levels, conditional=not args.unconditional)
    model.load_state_dict(state["ema"])
    # diffusers' only pipeline that hands labels to a `UNet2DModel`; it takes any scheduler.
    pipeline = ConsistencyModelPipeline(unet=model.half(), scheduler=build_scheduler())
    pipeline.save_pretrained(args.export)
    print(f"exported step {state['step']} to {args.export}")


@torch.no_grad()
def compare(args: argparse.Namespace, count: int = 256) -> None:
    """Squared error of the predicted image on test images, beside that of the mean posterior over the training set.

    The second is the best that copying training images can do: a network above it has not learnt what there is.
    """
    model = UNet2DModel.from_pretrained(args.compare / "unet", dtype=torch.float32).eval()
    data = TrainingSet(args.data, conditional=not args.unconditional)
    generator = torch.Generator().manual_seed(args.seed)
    test, labels = load_images(args.data, "test"), load_labels(args.data, "test")
    chosen = torch.randperm(len(test), generator=generator)[:count]
    clean, labels = scaled(test[chosen]), labels[chosen]
    if args.unconditional:
        labels.zero_()
    for timestep in range(100, TRAIN_TIMESTEPS, 100):
        level = build_scheduler().alphas_cumprod[timestep].view(1, 1, 1, 1)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        predicted = (noisy - (1 - level).sqrt() * model(noisy, timestep, **told(labels, args)).sample) / level.sqrt()
        mean = data.posterior_mean(noisy, level.expand(count, 1, 1, 1), labels)
        errors = [(found - clean).square().mean().item() for found in (predicted, mean)]
        print(f"t = {timestep}: network {errors[0]:.4f}, training set {errors[1]:.4f}")


def judge(args: argparse.Namespace) -> None:
    """Fréchet distance of samples to the training images, and how many the classifier reads as what they should be."""
    from stepquant.api import open_model, sample
    from stepquant.evaluate.features import DigitFeatures
    from stepquant.evaluate.frechet import FeatureStatistics, frechet_distance

    seeds = range(1000, 1000 + args.count)
    images = sample(open_model(str(args.judge)), seeds=seeds, steps=20, batch_size=32)
    features = DigitFeatures()
    found = FeatureStatistics(features.dim)
    found.update(features(images))
    distance = frechet_distance(found, FeatureStatistics.from_moments(*features.data_statistics()))
    right = (features.logits(images).argmax(1) == torch.tensor(seeds) % CLASSES).float().mean().item()
    print(f"n = {args.count}, 20 steps: Frechet distance to the training images {distance:.1f}, read right {right:.4f}")


def main() -> None:
    parser = parser_of(__doc__, work="runs/digits-unet", steps=4400, batch=96, ema=0.999, lr=1e-2)
    parser.add_argument("--levels", type=int, choices=(3, 4), default=3, help="3: the shipped network; 4: its teacher")
    parser.add_argument("--plain-start", action="store_true", help="begin with torch's own weights: see `carry_sample`")
    parser.add_argument("--unconditional", action="store_true", help="tell the network no labels")
    parser.add_argument("--teacher", type=Path, help="learn what the network of this pipeline, with labels, predicts")
    parser.add_argument("--guide", type=Path, help="with --teacher guided by this pipeline, without labels")
    parser.add_argument("--guidance", type=float, default=3.0, help="weight of the difference of --teacher and --guide")
    parser.add_argument("--init", type=Path, help="begin with the weights of the pipeline in this folder")
    parser.add_argument("--compare", type=Path, help="only measure the pipeline in this folder on test images")
    parser.add_argument("--judge", type=Path, help="only measure samples of the pipeline with labels in this folder")
    parser.add_argument("--count", type=int, default=1024, help="how many samples --judge draws")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    args = parser.parse_args()
    if (args.guide and not args.teacher) or (args.teacher and args.unconditional):
        parser.error("--guide goes with --teacher, and --teacher without --unconditional")
    if args.compare:
        compare(args)
    elif args.judge:
        judge(args)
    elif args.export:
        export(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
