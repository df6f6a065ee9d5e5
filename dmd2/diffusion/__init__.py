"""The mathematics: the protocols of denoiser and codec, noise levels, samplers. Nothing here knows a network."""
