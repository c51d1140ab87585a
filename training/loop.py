"""What the scripts that train the shipped diffusion models share: data, optimizers, and the loop itself."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from diffusers.models.attention_processor import Attention, AttnProcessor

TRAIN_TIMESTEPS = 1000


def parser_of(
    description: str | None, *, work: str, steps: int, batch: int, ema: float, lr: float = 1e-3
) -> argparse.ArgumentParser:
    """The options that every script has; the rest are its defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--work", type=Path, default=Path(work))
    parser.add_argument("--export", type=Path, help="write the pipeline here instead of training")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--ema", type=float, default=ema)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    return parser


def load_images(path: Path, split: str = "train") -> torch.Tensor:
    """MNIST's images, uint8 `[N, 1, 32, 32]`."""
    images = np.load(path)[f"{split}_x"]
    return torch.nn.functional.pad(torch.from_numpy(images), (2, 2, 2, 2))[:, None]


def load_labels(path: Path, split: str = "train") -> torch.Tensor:
    """Which digit each image is, int64 `[N]`."""
    return torch.from_numpy(np.load(path)[f"{split}_y"]).long()


def scaled(images: torch.Tensor) -> torch.Tensor:
    """Bytes as numbers in [-1, 1]."""
    return images.float() / 127.5 - 1


def stratified(count: int, generator: torch.Generator) -> torch.Tensor:
    """A number from each of `count` equal parts of [0, 1]. For timesteps: the same mean loss, with less variance."""
    return (torch.arange(count) + torch.rand(count, generator=generator)) / count


def own_part(drawn: torch.Tensor) -> torch.Tensor:
    """This process's part of what every process drew alike for the whole batch; all of it where there is one process.

    So the batch and the random numbers are the same whatever the number of processes.
    """
    if not torch.distributed.is_initialized():
        return drawn
    return drawn[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def join_processes() -> None:
    """Be one of the processes that `torchrun` started, if it did."""
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group("gloo")


@torch.no_grad()
def average_gradients(model: torch.nn.Module) -> None:
    """The mean over all processes, as one message."""
    if not torch.distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    together = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(together)
    together /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def use_plain_attention(model: torch.nn.Module) -> None:
    """Two batched products and a softmax: on a CPU the fused attention's gradient costs more over so few tokens."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


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


def learning_rate(step: int, total: int, peak: float, warmup: int = 200) -> float:
    """Linear up, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def save_state(path: Path, state: dict[str, object]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def fit(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    losses_of: Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]],
    path: Path,
    *,
    steps: int,
    lr: float,
    seed: int,
    save_every: int,
    ema: float | None = None,
    named: tuple[str, str] = ("step", "loss"),
) -> None:
    """Minimise a loss for `steps` iterations, or for those that are left: the state is in `path`.

    losses_of: what to minimise and what to log, which draws from the generator that it is given; of several processes,
        each takes `own_part` of what it draws, and gradients are averaged.
    ema: decay of an average of the weights, kept in the state; None keeps none.
    named: what the iteration and the logged value are called in `log.jsonl`, which is beside the state.
    """
    averaged = None if ema is None else {name: value.detach().clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    start = 0
    if path.exists():
        state = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
        model.load_state_dict(state["model"])
        # A lone optimizer's state was kept under another name before there was this module.
        states = state["optimizers"] if "optimizers" in state else [state["optimizer"]]
        for optimizer, kept in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(kept)
        averaged, start = state.get("ema"), state["step"]
        generator.set_state(state["generator"].cpu())
        print(f"resumed at {named[0]} {start}", flush=True)
    writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    began, logged = time.time(), []
    for step in range(start, steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
        loss, value = losses_of(generator)
        model.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if averaged is not None:
            average_(averaged, model, min(ema, (step + 1) / (step + 10)))
        logged.append(value.item())
        if writes and (step + 1) % 50 == 0:
            mean, spent = float(np.mean(logged[-50:])), round(time.time() - began, 1)
            with (path.parent / "log.jsonl").open("a") as log:
                log.write(json.dumps({named[0]: step + 1, named[1]: mean, "seconds": spent}) + "\n")
        if writes and ((step + 1) % save_every == 0 or step + 1 == steps):
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step + 1,
                "generator": generator.get_state(),
            }
            save_state(path, state if averaged is None else {**state, "ema": averaged})


@torch.no_grad()
def average_(averaged: dict[str, torch.Tensor], model: torch.nn.Module, decay: float) -> None:
    """Move the average towards the model."""
    for name, value in model.state_dict().items():
        averaged[name].lerp_(value, 1 - decay)
