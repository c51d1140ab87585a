"""Train `digit-classifier`, the network whose features the shipped Fréchet distances use.

`stepquant.evaluate.features.DigitClassifier` on MNIST, padded from 28 to 32 pixels, values in [0, 1]. AdamW, one-cycle
learning rate, random shifts, turns, scales, noise and contrast, and an exponential moving average of the weights, which
is what gets exported. No label smoothing: it pulls the features of a class onto one point (Müller et al. 2019, figure
1), and a Fréchet distance should still see how images of one class differ.

The state is written every `--save-every` iterations, and every draw is derived from the seed and the iteration, so a
killed run continues where it stopped, as if it had not stopped: run the same command again.

One thread is fastest where other work is running: set OMP_NUM_THREADS=1.

    python training/digit_classifier.py --data ../shared/data/mnist.npz --work runs/digit-classifier
    python training/digit_classifier.py --work runs/digit-classifier --export src/stepquant/assets/digit-classifier
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from stepquant.evaluate.features import DigitClassifier, weights_identity
from stepquant.evaluate.frechet import FeatureStatistics, frechet_distance

SUBSETS = (256, 1024, 4096)


def load_split(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 `[N, 1, 32, 32]` and labels int64 `[N]` of `train` or `test`."""
    with np.load(path) as archive:
        images, labels = archive[f"{split}_x"], archive[f"{split}_y"]
    return functional.pad(torch.from_numpy(images), (2, 2, 2, 2))[:, None], torch.from_numpy(labels).long()


def stream(*name: int) -> torch.Generator:
    """A generator of its own for each tuple of integers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(name).generate_state(1, np.uint64)[0] >> 1))


def batch_indices(step: int, *, count: int, batch: int, seed: int) -> Tensor:
    """Indices of one iteration: epochs are permutations, the last incomplete batch of each is dropped."""
    per_epoch = count // batch
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(count, generator=stream(seed, 0, epoch))
    return order[position * batch : (position + 1) * batch]


def warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 12 degrees, scale by up to 10 %, shift by up to 2.4 pixels; `[B, 1, 32, 32]` float."""
    turn, stretch, right, down = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = turn * math.radians(12), 1 + 0.1 * stretch
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # affine_grid's unit is half the image: 0.15 of 16 pixels.
    affine = torch.stack([cos, -sin, right * 0.15, sin, cos, down * 0.15], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def soil(images: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of up to 0.2, a background of up to 0.1, ink of 80 to 100 %; weak ones are the most frequent.

    Without it the features of a digit change completely at noise of 0.05, which nobody sees, because the background of
    every image of MNIST is exactly 0. The distance would then measure the background of a generated image only.
    """
    noise, background, ink = torch.rand(3, len(images), 1, 1, 1, generator=generator).square()
    floor = 0.1 * background
    faded = floor + (1 - 0.2 * ink - floor) * images
    return (faded + 0.2 * noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def learning_rate(step: int, total: int, peak: float) -> float:
    """One cycle: linear up over the first 15 %, half a cosine down to zero."""
    warmup = max(1, int(0.15 * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def save_state(path: Path, state: dict[str, object]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


@torch.no_grad()
def average_(ema: dict[str, Tensor], model: torch.nn.Module, decay: float) -> None:
    """Move the average towards the model; counters (integers) are copied."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)
        else:
            ema[name].copy_(value)


def train(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    images, labels = load_split(args.data, "train")
    steps = args.epochs * (len(images) // args.batch)
    settings = {"seed": args.seed, "epochs": args.epochs, "batch": args.batch, "lr": args.lr, "ema_decay": args.ema}
    torch.manual_seed(args.seed)
    model = DigitClassifier().to(memory_format=torch.channels_last).train()
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-2)
    state_path = args.work / "state.pt"
    start = 0
    if state_path.exists():
        state = torch.load(state_path, map_location="cpu", weights_only=True)
        changed = [name for name, value in settings.items() if state[name] != value]
        if changed:
            raise SystemExit(f"{state_path} was started with other values of {changed}: remove it or use those.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start = state["ema"], state["step"]
        print(f"resumed at step {start}", flush=True)
    began, losses = time.time(), []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr)
        chosen = batch_indices(step, count=len(images), batch=args.batch, seed=args.seed)
        generator = stream(args.seed, 1, step)
        seen = soil(warp(images[chosen].float() / 255, generator), generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(seen.contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(logits.float(), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average_(ema, model, min(args.ema, (step + 1) / (step + 10)))
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            row = {"step": step + 1, "loss": float(np.mean(losses[-50:])), "seconds": round(time.time() - began, 1)}
            with (args.work / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step + 1}
            save_state(state_path, {**state, **settings})


def rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As they are stored: float16, counters as they are, in the usual order of memory."""
    halves = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    return {name: value.contiguous() for name, value in halves.items()}


@torch.no_grad()
def outputs(model: DigitClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features `[N, 64]` and predicted digits `[N]` of uint8 images."""
    features = torch.cat([model.features(batch.float() / 255) for batch in images.split(500)])
    return features, model.classify(torch.relu(features)).argmax(dim=1)


def statistics_of(features: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics


def floors(train_features: Tensor, test_features: Tensor, *, seed: int, repeats: int) -> dict[str, object]:
    """Fréchet distances between sets of real images: no generator can be expected below them."""
    count = len(train_features)
    every = statistics_of(train_features)
    orders = [torch.randperm(count, generator=stream(seed, 2, repeat)) for repeat in range(repeats)]
    halves = [
        frechet_distance(
            statistics_of(train_features[order[: count // 2]]), statistics_of(train_features[order[count // 2 :]])
        )
        for order in orders
    ]
    found: dict[str, object] = {
        "train_against_test": frechet_distance(every, statistics_of(test_features)),
        "train_halves": summary(halves),
    }
    for size in SUBSETS:
        distances = [frechet_distance(every, statistics_of(train_features[order[:size]])) for order in orders]
        found[f"train_subset_{size}_against_train"] = summary(distances)
    # Same sizes, images that training has not seen: what a perfect generator of new digits would get.
    for size in SUBSETS:
        picks = [torch.randperm(len(test_features), generator=stream(seed, 3, r))[:size] for r in range(repeats)]
        distances = [frechet_distance(every, statistics_of(test_features[pick])) for pick in picks]
        found[f"test_subset_{size}_against_train"] = summary(distances)
    return found


def summary(values: list[float]) -> dict[str, float | int]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)), "repeats": len(values)}


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights in float16, the statistics of the training images, and what was measured."""
    state = torch.load(args.work / "state.pt", map_location="cpu", weights_only=True)
    weights = rounded(state["ema"])
    model = DigitClassifier()
    model.load_state_dict(weights)
    model.eval()
    train_images, train_labels = load_split(args.data, "train")
    test_images, test_labels = load_split(args.data, "test")
    train_features, train_digits = outputs(model, train_images)
    test_features, test_digits = outputs(model, test_images)
    train_right = int((train_digits == train_labels).sum())
    test_right = int((test_digits == test_labels).sum())
    mean, cov, n = statistics_of(train_features).moments()
    config = {
        "name": "digit-classifier",
        "class": "stepquant.evaluate.features.DigitClassifier",
        "identity": weights_identity(model),
        "features": DigitClassifier.FEATURES,
        "data": "MNIST, converted from the PNG files of rasbt/mnist-pngs; padded to 32x32, values in [0, 1]",
        "training": {key: state[key] for key in ("seed", "epochs", "batch", "lr", "ema_decay", "step")},
        "accuracy": {
            "test_correct": test_right,
            "test_n": len(test_labels),
            "train_correct": train_right,
            "train_n": len(train_labels),
        },
        "floors": floors(train_features, test_features, seed=state["seed"], repeats=args.repeats),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    args.export.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, args.export / "model.safetensors")
    safetensors.torch.save_file(
        {"mean": mean, "cov": cov, "n": torch.tensor(n)}, args.export / "data_statistics.safetensors"
    )
    (args.export / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{test_right} of {len(test_labels)} test images right; exported step {state['step']} to {args.export}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--work", type=Path, default=Path("runs/digit-classifier"))
    parser.add_argument("--export", type=Path, help="write the weights and statistics here instead of training")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=10, help="random subsets for each Fréchet floor")
    args = parser.parse_args()
    if args.export:
        export(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
