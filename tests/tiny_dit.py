"""The smallest transformer denoiser of diffusers, and a pipeline for it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn

from stepquant.model.pipeline import DenoiserPipeline


class TinyDiT(nn.Module):
    """A DiT of two blocks with one class, for samples [B, 2, 4, 4].

    Channel 3 of every block's input is thirty times as large as the others: the outliers that methods for transformers
    are made for.
    """

    stepquant_blocks = ("BasicTransformerBlock",)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=2,
            out_channels=2,
            num_layers=2,
            norm_num_groups=2,
            sample_size=4,
            patch_size=1,
            num_embeds_ada_norm=4,
        )
        for module in self.transformer.modules():
            # Modulations start at zero, which would make blocks that do nothing.
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        with torch.no_grad():
            self.transformer.pos_embed.proj.weight[3] *= 30
        self.eval()

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        labels = torch.zeros(len(sample), dtype=torch.int64, device=sample.device)
        result: Tensor = self.transformer(sample, timestep=times, class_labels=labels).sample
        return result


def tiny_dit_pipe() -> DenoiserPipeline:
    return DenoiserPipeline(TinyDiT(), DDIMScheduler(), sample_shape=(2, 4, 4))
