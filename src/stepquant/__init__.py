"""stepquant: post-training quantization of diffusion models that looks at the whole way from noise to image.

import stepquant

pipe = stepquant.open_model("digits-unet")
recipe = stepquant.METHODS["combined"](weights=4, activations=8, **stepquant.PRESETS["combined"]["standard"])
stepquant.quantize(pipe, recipe, steps=20).save("digits-w4a8")
images = stepquant.sample(stepquant.load("digits-w4a8"), seeds=range(16), steps=20)
"""

from __future__ import annotations

import importlib
from typing import Any

from stepquant._version import __version__
from stepquant.integrations.registration import register_with_diffusers

# Resolved on first use: importing torch takes a second, and `stepquant --help` needs none of it.
_HOMES = {
    "METHODS": "stepquant.methods",
    "PRESETS": "stepquant.methods",
    "DenoiserPipeline": "stepquant.model.pipeline",
    "Quantized": "stepquant.api",
    "Recipe": "stepquant.recipe",
    "Run": "stepquant.run",
    "StepquantError": "stepquant.errors",
    "compensate": "stepquant.api",
    "load": "stepquant.api",
    "open_model": "stepquant.api",
    "quantize": "stepquant.api",
    "sample": "stepquant.api",
    "use_beta_timesteps_": "stepquant.model.beta_schedule",
}

__all__ = [
    "METHODS",
    "PRESETS",
    "DenoiserPipeline",
    "Quantized",
    "Recipe",
    "Run",
    "StepquantError",
    "__version__",
    "compensate",
    "load",
    "open_model",
    "quantize",
    "sample",
    "use_beta_timesteps_",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stepquant' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


register_with_diffusers()
