"""Tiny, randomly initialised pipelines of every family, built from configurations: no hub, no text encoders.

A pipeline that takes prompts is called with embeddings instead; its text encoder is None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

BATCH = 2
"""Images in one call: embeddings have as many rows."""


@dataclass(frozen=True)
class Family:
    """How to build a tiny pipeline and how to call it.

    build: a new pipeline, the same weights every time.
    arguments: of the pipeline's call for BATCH images, made anew every time.
    needs_transformers: diffusers defines the pipeline's class only beside transformers.
    """

    build: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]] = field(default=dict)
    needs_transformers: bool = True


def seeded(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Any:
    """A module with weights that depend on nothing but the call. Zeros are replaced, or nothing would be computed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build(*args, **kwargs).eval()
        for parameter in module.parameters():
            if not bool(parameter.any()):
                parameter.data.normal_(std=0.1)
    return module


def tokens(length: int, width: int, seed: int = 7) -> Tensor:
    """Embeddings [BATCH, length, width]."""
    return torch.randn(BATCH, length, width, generator=torch.Generator().manual_seed(seed))


def pooled(width: int, seed: int = 11) -> Tensor:
    """Embeddings [BATCH, width]."""
    return torch.randn(BATCH, width, generator=torch.Generator().manual_seed(seed))


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vae(latent_channels: int = 4, **options: Any) -> Any:
    """Two levels: images are twice as large as latents."""
    return seeded(
        diffusers.AutoencoderKL,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=16,
        **options,
    )


def plain_unet(channels: int = 3, **options: Any) -> Any:
    """UNet2DModel for samples [B, channels, 8, 8]."""
    return seeded(
        diffusers.UNet2DModel,
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        **options,
    )


def text_unet(channels: int = 4, **options: Any) -> Any:
    """UNet2DConditionModel for latents [B, channels, 8, 8] and embeddings of width 16."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
        **options,
    }
    return seeded(diffusers.UNet2DConditionModel, **settings)


def ddim() -> Any:
    return _quiet(diffusers.DDIMPipeline(plain_unet(), diffusers.DDIMScheduler()))


def ddpm() -> Any:
    return _quiet(diffusers.DDPMPipeline(plain_unet(), diffusers.DDPMScheduler()))


def consistency() -> Any:
    unet = plain_unet(num_class_embeds=4)
    return _quiet(diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler()))


def ldm() -> Any:
    vq = seeded(
        diffusers.VQModel,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=3,
        norm_num_groups=2,
        num_vq_embeddings=16,
        sample_size=16,
    )
    return _quiet(diffusers.LDMPipeline(vqvae=vq, unet=plain_unet(), scheduler=diffusers.DDIMScheduler()))


def dit() -> Any:
    transformer = seeded(
        diffusers.DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
    )
    return _quiet(diffusers.DiTPipeline(transformer, vae(), diffusers.DDIMScheduler()))


def _stable_diffusion(kind: str, unet: Any, scheduler: Any, **more: Any) -> Any:
    parts: dict[str, Any] = {
        "vae": vae(),
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet,
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        **more,
    }
    return _quiet(getattr(diffusers, kind)(**parts))


def _sd_scheduler() -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )


def sd15() -> Any:
    return _stable_diffusion("StableDiffusionPipeline", text_unet(), _sd_scheduler())


def img2img() -> Any:
    return _stable_diffusion("StableDiffusionImg2ImgPipeline", text_unet(), _sd_scheduler())


def inpaint(channels: int = 9) -> Any:
    """With a UNet made for inpainting (9 channels: latents, mask, masked image), or an ordinary one (4)."""
    return _stable_diffusion("StableDiffusionInpaintPipeline", text_unet(channels), _sd_scheduler())


def controlnet() -> Any:
    unet = text_unet()
    control = seeded(diffusers.ControlNetModel.from_unet, unet, conditioning_embedding_out_channels=(4, 4))
    return _stable_diffusion("StableDiffusionControlNetPipeline", unet, _sd_scheduler(), controlnet=control)


def lcm() -> Any:
    return _stable_diffusion(
        "LatentConsistencyModelPipeline", text_unet(time_cond_proj_dim=8), diffusers.LCMScheduler()
    )


def turbo() -> Any:
    """One to four steps, no guidance, noise drawn in every step."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    return _stable_diffusion("StableDiffusionPipeline", text_unet(), scheduler)


def sdxl() -> Any:
    unet = text_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading"),
        add_watermarker=False,
    )
    return _quiet(pipe)


def sd3() -> Any:
    transformer = seeded(
        diffusers.SD3Transformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.0),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return _quiet(pipe)


def flux(**options: Any) -> Any:
    transformer = seeded(
        diffusers.FluxTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
        **options,
    )
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.0),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    return _quiet(pipe)


def pixart() -> Any:
    transformer = seeded(
        diffusers.PixArtTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae(),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    return _quiet(pipe)


def sana() -> Any:
    transformer = seeded(
        diffusers.SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        mlp_ratio=2.0,
        sample_size=8,
        patch_size=1,
    )
    autoencoder = seeded(
        diffusers.AutoencoderDC,
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    pipe = diffusers.SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    return _quiet(pipe)


def wan(experts: int = 1) -> Any:
    """Video; with two experts, the second takes over below a timestep: in the later half of two or four steps."""

    def expert() -> Any:
        return seeded(
            diffusers.WanTransformer3DModel,
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )

    autoencoder = seeded(
        diffusers.AutoencoderKLWan,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    second = expert() if experts == 2 else None
    if second is not None:
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.mul_(1.1)
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=expert(),
        transformer_2=second,
        boundary_ratio=0.8 if experts == 2 else None,
    )
    return _quiet(pipe)


def _prompt(length: int = 5, width: int = 16) -> dict[str, Any]:
    return {
        "prompt_embeds": tokens(length, width, 7),
        "negative_prompt_embeds": tokens(length, width, 8),
        "guidance_scale": 3.0,
    }


def _masked(length: int = 5, width: int = 12) -> dict[str, Any]:
    ones = torch.ones(BATCH, length, dtype=torch.int64)
    return {
        **_prompt(length, width),
        "prompt_attention_mask": ones,
        "negative_prompt_attention_mask": ones,
        "negative_prompt": None,
        "height": 16,
        "width": 16,
        "use_resolution_binning": False,
    }


def _image() -> Tensor:
    return torch.rand(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def _mask() -> Tensor:
    mask = torch.zeros(BATCH, 1, 16, 16)
    mask[..., 8:] = 1
    return mask


FAMILIES: dict[str, Family] = {
    "ddim": Family(ddim, needs_transformers=False),
    "ddpm": Family(ddpm, needs_transformers=False),
    "consistency": Family(consistency, needs_transformers=False),
    "ldm": Family(ldm, needs_transformers=False),
    "dit": Family(dit, lambda: {"class_labels": [1, 2], "guidance_scale": 3.0}, needs_transformers=False),
    "sd15": Family(sd15, lambda: {**_prompt(), "height": 16, "width": 16}),
    "img2img": Family(img2img, lambda: {**_prompt(), "image": _image(), "strength": 0.6}),
    "inpaint": Family(
        inpaint,
        lambda: {**_prompt(), "image": _image(), "mask_image": _mask(), "height": 16, "width": 16, "strength": 1.0},
    ),
    "inpaint-unet": Family(
        lambda: inpaint(channels=4),
        lambda: {**_prompt(), "image": _image(), "mask_image": _mask(), "height": 16, "width": 16, "strength": 1.0},
    ),
    "controlnet": Family(controlnet, lambda: {**_prompt(), "image": _image()}),
    "lcm": Family(lcm, lambda: {"prompt_embeds": tokens(5, 16), "guidance_scale": 4.0, "height": 16, "width": 16}),
    "turbo": Family(turbo, lambda: {"prompt_embeds": tokens(5, 16), "guidance_scale": 0.0}),
    "sdxl": Family(
        sdxl,
        lambda: {
            **_prompt(),
            "pooled_prompt_embeds": pooled(16),
            "negative_pooled_prompt_embeds": pooled(16, 12),
            "height": 16,
            "width": 16,
        },
    ),
    "sd3": Family(
        sd3,
        lambda: {
            **_prompt(),
            "pooled_prompt_embeds": pooled(12),
            "negative_pooled_prompt_embeds": pooled(12, 12),
            "height": 16,
            "width": 16,
        },
    ),
    "flux": Family(
        flux,
        lambda: {
            "prompt_embeds": tokens(5, 16),
            "pooled_prompt_embeds": pooled(12),
            "guidance_scale": 3.5,
            "height": 16,
            "width": 16,
        },
    ),
    "pixart": Family(pixart, _masked),
    "sana": Family(sana, lambda: {**_masked(), "height": 32, "width": 32, "complex_human_instruction": None}),
    "wan": Family(wan, lambda: {**_prompt(), "height": 32, "width": 32, "num_frames": 5}),
}
