"""The foreign model of the project: an unconditional diffusion model of drawn faces as a plain torch module.

Weights: `../shared/models/faces64_u8.safetensors` (wangjia184/diffusion_model, MIT; described in the README beside it):
64x64 RGB, 63.2 million parameters, epsilon prediction, 300 training steps, cosine schedule. No class of diffusers is
involved but the scheduler.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from stepquant.api import open_model
from stepquant.evaluate.features import Features, ModuleFeatures
from stepquant.model.layer import Matmul
from stepquant.model.pipeline import DenoiserPipeline

__all__ = ["WEIGHTS", "Faces64", "faces64_pipeline", "field_colours", "load_faces64", "open_by_name"]

WEIGHTS = Path(__file__).resolve().parents[2] / "shared" / "models" / "faces64_u8.safetensors"

WIDTHS = (64, 128, 256, 512)
ATTENTION_FROM = 2
"""Levels 2 and 3, 16x16 and 8x8, have attention."""

TRAINING_STEPS = 300
LAST_SAFE_TIMESTEP = 290
"""alpha_bar at t = 299 is about 3e-9: deterministic DDIM would divide by its root."""


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels, eps=1e-3)


class Residual(nn.Module):
    """h = conv1(silu(norm1(x))) + temb(e);  conv2(silu(norm2(h))) + skip(x)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.temb = nn.Linear(256, outputs)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x: [B, inputs, H, W]; e: [B or 1, 256], after its silu."""
        h = self.conv1(F.silu(self.norm1(x))) + self.temb(e)[:, :, None, None]
        found: Tensor = self.conv2(F.silu(self.norm2(h))) + self.skip(x)
        return found


class SelfAttention(nn.Module):
    """y = norm(x);  y + proj(softmax(q k^T / sqrt(c)) v), one head. The residual adds the normalised input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj = (nn.Linear(channels, channels) for _ in range(4))
        self.scores, self.values = Matmul("scores"), Matmul("values")

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        y = self.norm(x).reshape(batch, channels, -1).transpose(1, 2)  # [B, H * W, C]
        weights = torch.softmax(self.scores(self.q(y), self.k(y).transpose(1, 2)) / math.sqrt(channels), dim=-1)
        y = y + self.proj(self.values(weights, self.v(y)))
        return y.transpose(1, 2).reshape(batch, channels, height, width)


class Down(nn.Module):
    """Half the side: pad right and bottom, convolve with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return found


class Up(nn.Module):
    """Twice the side: repeat every pixel, convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return found


class Stage(nn.ModuleList):
    """Modules that run one after the other; residual blocks are given the time embedding too."""

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        for module in self:
            x = module(x, e) if isinstance(module, Residual) else module(x)
        return x


def _block(inputs: int, outputs: int, level: int) -> Stage:
    attention = [SelfAttention(outputs)] if level >= ATTENTION_FROM else []
    return Stage([Residual(inputs, outputs), *attention])


class Faces64(nn.Module):
    """Called as `Faces64(sample, timestep)`: [B, 3, 64, 64] in [-1, 1] and 0..299 -> epsilon [B, 3, 64, 64]."""

    stepquant_blocks = ("Residual", "SelfAttention")

    def __init__(self) -> None:
        super().__init__()
        self.t1, self.t2 = nn.Linear(256, 256), nn.Linear(256, 256)
        self.conv_in = nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skips = WIDTHS[0], [WIDTHS[0]]
        for level, width in enumerate(WIDTHS):
            for _ in range(2):
                self.down.append(_block(channels, width, level))
                channels = width
                skips.append(channels)
            if level < len(WIDTHS) - 1:
                self.down.append(Stage([Down(channels)]))
                skips.append(channels)
        self.mid = Stage([Residual(channels, channels), SelfAttention(channels), Residual(channels, channels)])
        for level, width in reversed(list(enumerate(WIDTHS))):
            for _ in range(3):
                self.up.append(_block(channels + skips.pop(), width, level))
                channels = width
            if level > 0:
                self.up.append(Stage([Up(channels)]))
        self.norm_out, self.conv_out = _norm(channels), nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).to(sample.dtype)
        angles = t[:, None] * torch.exp(-math.log(10_000) / 127 * torch.arange(128, device=t.device, dtype=t.dtype))
        e = F.silu(self.t2(F.silu(self.t1(torch.cat([angles.sin(), angles.cos()], dim=1)))))
        h = self.conv_in(sample)
        skips = [h]
        for block in self.down:
            h = block(h, e)
            skips.append(h)
        h = self.mid(h, e)
        for block in self.up:
            if isinstance(block[0], Residual):
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, e)
        found: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return found


def load_faces64(path: Path = WEIGHTS) -> Faces64:
    """The model with its weights, `q * scale + min` of each 8-bit tensor. Raises FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: faces64 needs weights that are not part of this repository.")
    stored = load_file(path)
    names = [name for name in stored if not name.endswith((".scale", ".min"))]
    weights = {name: stored[name].float() * stored[f"{name}.scale"] + stored[f"{name}.min"] for name in names}
    model = Faces64()
    model.load_state_dict(weights)
    return model.eval()


def faces64_pipeline(denoiser: nn.Module) -> DenoiserPipeline:
    """Deterministic DDIM from t <= 290 on the model's schedule."""
    scheduler = DDIMScheduler(
        num_train_timesteps=TRAINING_STEPS, beta_schedule="squaredcos_cap_v2", clip_sample=True, set_alpha_to_one=True
    )
    return DenoiserPipeline(denoiser, scheduler, (3, 64, 64), max_timestep=LAST_SAFE_TIMESTEP)


def open_by_name(name: str, weights: Path | None = None) -> Any:
    """`faces64`, which needs weights that are not shipped, or what `open_model` takes."""
    if name != "faces64":
        return open_model(name)
    return faces64_pipeline(load_faces64(WEIGHTS if weights is None else weights))


def field_colours() -> Features:
    """What Fréchet distances of these images see: colours averaged over 4 x 4 fields, 48 numbers."""
    fields = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten()).eval()
    return ModuleFeatures(fields, "colours of 4 x 4 fields", dim=48)
