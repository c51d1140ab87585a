"""stepquant: post-training quantization of diffusion models that looks at the whole way from noise to image."""
