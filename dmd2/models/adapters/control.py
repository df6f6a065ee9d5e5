"""Images that guide a Stable Diffusion UNet: ControlNet (Zhang et al. 2023), T2I-Adapter (Mou et al. 2023)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_map

from dmd2.diffusion.noise import per_image
from dmd2.models.stable_diffusion.codec import LATENT_CHANNELS
from dmd2.models.stable_diffusion.text import TextCondition
from dmd2.models.stable_diffusion.unet import Control
from dmd2.runtime.compiled import Compiler
from dmd2.runtime.errors import UserError, shown
from dmd2.runtime.files import read_object
from dmd2.runtime.loading import build_network, load_network, of_diffusers, weight_files
from dmd2.runtime.offload import upload

SCALE = 0.8
"""of what is added to the UNet's activations: that of DMD2's own example, which uses SDXL's canny adapter"""
KINDS = ("ControlNetModel", "T2IAdapter", "ControlNetUnionModel")
TASKS = (
    ("openpose", "pose"),
    ("depth",),
    ("scribble", "hed", "softedge", "teed"),
    ("canny", "lineart", "mlsd", "edges"),
    ("normal",),
    ("segment", "segmentation"),
    ("tile",),
    ("repaint", "inpaint"),
)
"""of a ControlNet Union (xinsir's, for SDXL), by number: which one is meant, its folder's name says"""
MUST_FIT = (
    "block_out_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)
"""of a ControlNet's settings and the UNet's"""


@dataclass(frozen=True, eq=False)
class ControlModel:
    """A `ControlNetModel`, `ControlNetUnionModel` or `T2IAdapter` of diffusers, in the UNet's dtype."""

    network: Any
    device: torch.device
    """where it runs"""
    task: int | None = None
    """what a union's images are, see `TASKS`"""
    compiler: Compiler | None = None
    """allow `recording()`, see `dmd2.runtime.compiled`"""

    @property
    def is_adapter(self) -> bool:
        return self.network.config.get("downscale_factor") is not None

    @property
    def unit(self) -> int:
        """In pixels: the sides of a control image must be multiples of it."""
        if self.is_adapter:
            return int(self.network.config.downscale_factor)
        return int(2 ** (len(self.network.config.conditioning_embedding_out_channels) - 1))

    @property
    def channels(self) -> int:
        """Channels of a control image: 3, or 1 for a grey one."""
        config = self.network.config
        return int(config.in_channels if self.is_adapter else config.conditioning_channels)

    def guide(
        self, image: Tensor, timesteps: Sequence[int], scale: float = SCALE, part: float | None = None
    ) -> Control:
        """The function that makes the UNet follow a control image. See `StableDiffusion.features`.

        Args:
            image: uint8 (3, H, W), as large as the generated one: edges, depth, …, as the network was trained.
                For a network of one channel it is turned grey.
            timesteps: of the steps, descending.
            scale: 0 is no guidance.
            part: the first ⌊part · steps⌋ steps are guided, at least one. By default all with a ControlNet, half of
                them with a T2I-Adapter, as in DMD2's example. In the others what it adds is 0.

        Raises:
            UserError: the sides are no multiples of `unit`.
        """
        height, width = image.shape[-2:]
        if height % self.unit or width % self.unit:
            raise UserError(
                f"control_image: {width}x{height}; this control takes sides that are multiples of {self.unit} pixels"
            )
        if part is None:
            part = 0.5 if self.is_adapter else 1.0
        count = max(1, int(part * len(timesteps)))
        if self.channels == 1:
            image = grey(image)
        values = (upload(image[None], self.device).float() / 255).to(next(self.network.parameters()).dtype)
        residuals = self._adapter(values, scale) if self.is_adapter else self._control_net(values, scale)

        if count >= len(timesteps):
            return residuals

        def control(x: Tensor, timestep: Tensor, cond: TextCondition) -> dict[str, Any]:
            # Whether this step is guided is decided where the timestep is: asking for it would make the host wait.
            guided = timestep >= timesteps[count - 1]
            return tree_map(
                lambda added: added * per_image(guided, added).to(added.dtype), residuals(x, timestep, cond)
            )

        return control

    def _control_net(self, values: Tensor, scale: float) -> Control:
        chosen = None
        if self.task is not None:
            chosen = values.new_zeros(1, self.network.config.num_control_type)
            chosen[0, self.task] = 1

        def residuals(x: Tensor, timestep: Tensor, cond: TextCondition) -> dict[str, Any]:
            given = values.expand(len(x), -1, -1, -1)
            of_task = None if chosen is None else chosen.expand(len(x), -1)
            outputs = self._run(x, timestep, cond.context, given, cond.pooled, cond.time_ids, of_task)
            # Outside of the network, that one record serves every scale. A union of one task scales its outputs, too.
            *down, middle = (output * scale for output in outputs)
            return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

        return residuals

    @cached_property
    def _run(self) -> Any:
        """The network as a function of tensors, prepared if that is wanted: an adapter's, or a ControlNet's."""

        def run(*given: Any) -> tuple[Tensor, ...]:
            if self.is_adapter:
                return tuple(self.network(*given))
            down, middle = self._call(*given)
            return (*down, middle)

        return run if self.compiler is None else self.compiler(run, blocks=self.network)

    def _call(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        given: Any,
        pooled: Tensor | None,
        ids: Tensor | None,
        chosen: Tensor | None,
    ) -> Any:
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": ids}
        of_task: dict[str, Any] = {}
        if chosen is not None:
            given, of_task = [given], {"control_type": chosen, "control_type_idx": [self.task]}
        return self.network(
            x,
            timestep,
            context,
            controlnet_cond=given,
            conditioning_scale=1.0,
            **of_task,
            added_cond_kwargs=added,
            return_dict=False,
        )

    def _adapter(self, values: Tensor, scale: float) -> Control:
        states = [state * scale for state in self._run(values)]  # they depend on the image alone

        def residuals(x: Tensor, timestep: Tensor, cond: TextCondition) -> dict[str, Any]:
            # A list of its own each time: the UNet empties it.
            return {"down_intrablock_additional_residuals": [s.expand(len(x), -1, -1, -1) for s in states]}

        return residuals


def grey(image: Tensor) -> Tensor:
    """uint8 (3, H, W) → (1, H, W): ITU-R 601 luma, to the bit that of Pillow's mode "L". Grey stays as it is."""
    red, green, blue = image.int()
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).byte()[None]


def load_control(folder: Path, device: torch.device, dtype: torch.dtype, unet: Any = None) -> ControlModel:
    """A ControlNet or T2I-Adapter in diffusers' layout (config.json beside safetensors), frozen.

    Args:
        unet: settings of the UNet that it will guide, as a mapping; None if it will guide none.

    Raises:
        UserError: there is none, it is damaged, or made for another UNet.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"control {folder}: expected a folder with a config.json, a ControlNet's or T2I-Adapter's")
    config = read_object(path)
    name = config.get("_class_name")
    if name not in KINDS:
        raise UserError(f"{path}: describes a {shown(name)}; expected one of {', '.join(KINDS)}")
    weights, task = folder / "diffusion_pytorch_model.safetensors", None
    if name == "ControlNetModel" and (tasks := _tasks_in(weights)):  # xinsir's unions say that they are plain ones
        name, config = "ControlNetUnionModel", config | {"num_control_type": tasks}
    kind = of_diffusers(name)
    network = build_network(kind, path, config)
    if name == "T2IAdapter":
        _check_adapter(path, network, unet)
    else:
        _check_control_net(path, network.config, unet)
    if name == "ControlNetUnionModel":
        task = _task(folder, network.config.num_control_type)
    network = load_network(kind, weights, device, dtype, config)
    return ControlModel(network.to(memory_format=torch.channels_last), device, task)


def _check_adapter(path: Path, network: Any, unet: Any) -> None:
    channels = network.config.in_channels
    if channels not in (1, 3):
        raise UserError(f"{path}: images of {channels} channels; expected 1 or 3")
    if unet is None:
        return
    side = 8 * network.config.downscale_factor
    try:
        states = network(torch.empty(1, channels, side, side, device="meta"))
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: describes no T2IAdapter ({shown(error)})") from error
    found, wanted = [state.shape[1] for state in states], list(unet["block_out_channels"])
    if found not in (wanted, [*wanted, wanted[-1]]):  # the last for the UNet's middle
        raise UserError(f"{path}: made for another UNet: gives {found} channels; this one's blocks have {wanted}")


def _check_control_net(path: Path, config: Any, unet: Any) -> None:
    if config["conditioning_channels"] not in (1, 3):
        raise UserError(f"{path}: images of {config['conditioning_channels']} channels; expected 1 or 3")
    if config["in_channels"] != LATENT_CHANNELS:
        raise UserError(f"{path}: {config['in_channels']} latent channels; expected {LATENT_CHANNELS}")
    if unet is None:
        return
    for key in MUST_FIT:
        own, wanted = config.get(key), unet.get(key)
        own, wanted = ([*value] if isinstance(value, tuple | list) else value for value in (own, wanted))
        if own != wanted:
            raise UserError(f"{path}: made for another UNet: {key} is {shown(own)}; this one's is {shown(wanted)}")


def _tasks_in(weights: Path) -> int:
    """The number of tasks of a ControlNet Union; 0 for weights of another kind, and for none that can be read."""
    with suppress(SafetensorError, UserError), safe_open(weight_files(weights)[0], "pt") as file:
        if "task_embedding" in file.keys():  # noqa: SIM118
            return int(file.get_slice("task_embedding").get_shape()[0])
    return 0  # what is wrong will be said when they are loaded


def _task(folder: Path, count: int) -> int:
    words = set(re.findall("[a-z]+", folder.name.lower()))
    found = [number for number, names in enumerate(TASKS[:count]) if words & set(names)]
    if len(found) != 1:
        names = ", ".join(names[0] for names in TASKS[:count])
        raise UserError(
            f"control {folder}: a ControlNet Union, whose folder's name must say what its images are: expected one "
            f"of {names} in it"
        )
    return found[0]
