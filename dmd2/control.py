"""Pictures that guide a Stable Diffusion UNet: ControlNet (Zhang et al. 2023), T2I-Adapter (Mou et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2.errors import UserError, shown
from dmd2.fileio import read_object
from dmd2.stable_diffusion import Control, TextCondition

SCALE = 0.8
"""of what is added to the UNet's activations: that of DMD2's own example, which uses SDXL's canny adapter"""
KINDS = ("ControlNetModel", "T2IAdapter")


@dataclass(frozen=True, eq=False)
class ControlModel:
    """A `ControlNetModel` or a `T2IAdapter` of diffusers, in the UNet's dtype."""

    network: Any
    device: torch.device
    """where it runs"""

    @property
    def is_adapter(self) -> bool:
        return self.network.config.get("downscale_factor") is not None

    @property
    def unit(self) -> int:
        """Pixels. Sides of the pictures that it takes are multiples of it."""
        if self.is_adapter:
            return int(self.network.config.downscale_factor)
        return int(2 ** (len(self.network.config.conditioning_embedding_out_channels) - 1))

    def guide(
        self, picture: Tensor, timesteps: Sequence[int], scale: float = SCALE, part: float | None = None
    ) -> Control:
        """What makes the UNet follow a picture. See `StableDiffusion.features`.

        Args:
            picture: uint8 (3, H, W), as large as what is drawn: edges, depth, what the network was trained with.
            timesteps: of the steps, descending.
            scale: 0 is no guidance.
            part: the first ⌊part · steps⌋ steps are guided, at least one. By default all with a ControlNet, half of
                them with a T2I-Adapter, as in DMD2's example.

        Raises:
            UserError: the sides are no multiples of `unit`.
        """
        height, width = picture.shape[-2:]
        if height % self.unit or width % self.unit:
            raise UserError(
                f"control_image: {width}x{height}; this control takes sides that are multiples of {self.unit} pixels"
            )
        if part is None:
            part = 0.5 if self.is_adapter else 1.0
        last = timesteps[max(1, int(part * len(timesteps))) - 1]
        values = (picture[None].to(self.device).float() / 255).to(next(self.network.parameters()).dtype)
        residuals = self._adapter(values, scale) if self.is_adapter else self._control_net(values, scale)

        def control(x: Tensor, timestep: Tensor, cond: TextCondition) -> dict[str, Any]:
            # The steps of a batch are those of each of its pictures.
            return residuals(x, timestep, cond) if int(timestep[0]) >= last else {}

        return control

    def _control_net(self, values: Tensor, scale: float) -> Control:
        def residuals(x: Tensor, timestep: Tensor, cond: TextCondition) -> dict[str, Any]:
            added = None if cond.pooled is None else {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
            down, middle = self.network(
                x,
                timestep,
                cond.context,
                controlnet_cond=values.expand(len(x), -1, -1, -1),
                conditioning_scale=scale,
                added_cond_kwargs=added,
                return_dict=False,
            )
            return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

        return residuals

    def _adapter(self, values: Tensor, scale: float) -> Control:
        states = [state * scale for state in self.network(values)]  # they depend on the picture alone

        def residuals(x: Tensor, timestep: Tensor, cond: TextCondition) -> dict[str, Any]:
            # A list of its own each time: the UNet empties it.
            return {"down_intrablock_additional_residuals": [s.expand(len(x), -1, -1, -1) for s in states]}

        return residuals


def load_control(folder: Path, device: torch.device, dtype: torch.dtype) -> ControlModel:
    """A ControlNet or T2I-Adapter in diffusers' layout (config.json beside safetensors), frozen.

    Raises:
        UserError: there is none, or it is damaged.
    """
    import diffusers

    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"control {folder}: expected a folder with a config.json, a ControlNet's or T2I-Adapter's")
    name = read_object(path).get("_class_name")
    if name not in KINDS:
        raise UserError(f"{path}: describes a {shown(name)}; expected one of {', '.join(KINDS)}")
    try:
        network = getattr(diffusers, name).from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"control {folder}: {str(error).strip().partition(chr(10))[0]}") from error
    network.requires_grad_(False).eval()
    return ControlModel(network.to(device, memory_format=torch.channels_last), device)
