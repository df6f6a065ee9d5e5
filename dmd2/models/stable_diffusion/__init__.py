"""SD 1.5 and SDXL: UNet, text encoders, latents; their folders, single files, downloads and conversions."""
