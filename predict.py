"""Cog's front door: inputs in, files out. What happens in between is `dmd2.service.images`.

Cog reads this file without running it: inputs have literal defaults and bounds, and plain types.
"""

import logging
import os
from typing import AsyncIterator, Iterator, Optional

from cog import BaseRunner, Input, Path, concurrent, streaming

from dmd2.inference.request import ImageRequest
from dmd2.runtime.errors import BriefFormatter
from dmd2.service.cog.bridge import begun, in_this_context
from dmd2.service.images import ImageService, OutputImage


class Predictor(BaseRunner):
    """Generates with the DMD2 students of one folder of weights, in one step or four."""

    def setup(self, weights: Optional[Path] = None) -> None:
        """Loads everything once. `weights`: what Cog makes of COG_WEIGHTS; DMD2_WEIGHTS comes before it."""
        handler = logging.StreamHandler()
        handler.setFormatter(BriefFormatter("%(levelname)s %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        self.service = ImageService(os.environ.get("DMD2_WEIGHTS") or weights)
        if any(self.service.uncompiled.values()):
            counts = ", ".join(f"{name} {count}" for name, count in self.service.uncompiled.items())
            logging.warning("set-up: not all of it runs compiled: %s", counts)

    @streaming
    @concurrent(max=32)
    async def run(
        self,
        prompt: str = Input(
            description="What to show. Beyond the text encoder's window it is read in parts; at most 1500 tokens.",
            min_length=1,
            max_length=5000,
        ),
        negative_prompt: str = Input(
            description="Inert, accepted for compatibility: a distilled model generates without guidance.", default=""
        ),
        width: Optional[int] = Input(
            description="Pixels, a multiple of 8. Empty: the weights' own size (SDXL: 1024, emoji: 128).",
            ge=16,
            le=2048,
            default=None,
        ),
        height: Optional[int] = Input(description="Pixels, as width.", ge=16, le=2048, default=None),
        aspect_ratio: Optional[str] = Input(
            description="Instead of width and height: this shape, in about as many pixels as the weights' own size.",
            choices=["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"],
            default=None,
        ),
        image: Optional[Path] = Input(
            description="Image to begin with (PNG, JPEG, WebP), by https or data URL; width and height follow it.",
            regex=r"^(https://|data:)",
            default=None,
        ),
        mask: Optional[Path] = Input(
            description="Light, or a hole in an opaque image, where image is painted anew. Resized to image.",
            regex=r"^(https://|data:)",
            default=None,
        ),
        prompt_strength: float = Input(
            description="How much of image goes: 1 is all. Four steps know 0.25, 0.5, 0.75 and 1 and round down.",
            ge=0.01,
            le=1,
            default=0.8,
        ),
        lora_weights: Optional[str] = Input(
            description="LoRAs, by spaces or commas: https URL, owner/name of the hub, name. Each may end in :scale.",
            max_length=2000,
            default=None,
        ),
        lora_scale: float = Input(
            description="Of all LoRAs that name no scale of their own.", ge=-4, le=4, default=1
        ),
        control_image: Optional[Path] = Input(
            description="Image whose lines (or depth, …) are followed, as the control was trained for.",
            regex=r"^(https://|data:)",
            default=None,
        ),
        control: Optional[str] = Input(
            description="Name of one of the weights' own ControlNets or T2I-Adapters. Empty: the only one.",
            max_length=100,
            default=None,
        ),
        control_scale: float = Input(description="How much control_image counts.", ge=0, le=2, default=0.8),
        num_outputs: int = Input(description="How many images.", ge=1, le=4, default=1),
        num_inference_steps: Optional[int] = Input(
            description="Each is a distilled model of its own: 1 is faster, 4 better. Empty: the most there is.",
            choices=[1, 4],
            default=None,
        ),
        guidance_scale: float = Input(
            description="Inert, accepted for compatibility: guidance is distilled into the model.",
            ge=0,
            le=20,
            default=0,
        ),
        seed: Optional[int] = Input(
            description="Of the first image; image i has seed + i. Empty: random (see the metrics and the log).",
            ge=0,
            le=4294967295,
            default=None,
        ),
        output_format: str = Input(description="Of the files.", choices=["webp", "jpg", "png"], default="webp"),
        output_quality: int = Input(description="Of webp and jpg; png is lossless.", ge=1, le=100, default=80),
        disable_safety_checker: bool = Input(
            description="Do not check the images. Only where the operator allows it.", default=False
        ),
        previews: bool = Input(
            description="Also show rough images of the steps before the last, as they are made; for SSE clients.",
            default=False,
        ),
    ) -> AsyncIterator[Path]:
        """Generates images and hands over each as soon as it is encoded."""
        asked = {name: value for name, value in locals().items() if name != "self"}
        if negative_prompt or guidance_scale:
            print(
                "negative_prompt and guidance_scale have no effect: the model is distilled to generate without them"
            )
        request = ImageRequest(**asked)
        # Not `yield`: see dmd2/service/cog/bridge.py.
        return in_this_context(self._files(await begun(self.service.generate(request))))

    def _files(self, images: Iterator[OutputImage]) -> Iterator[Path]:
        seconds: dict[str, float] = {}
        shown = 0
        finished = 0
        for image in images:
            if image.step is not None and image.path is not None:  # a preview
                yield Path(image.path)
                continue
            finished += 1
            if finished == 1:
                print(f"seed: {image.seed}")
                self.record_metric("seed", image.seed)
                self.record_metric("batch_size", image.batch_size)
                for name, count in self.service.uncompiled.items():
                    self.record_metric(name, count)
            seconds = {stage: max(time, seconds.get(stage, 0.0)) for stage, time in image.seconds.items()}
            shown += image.path is not None
            self.record_metric("seconds", seconds)
            self.record_metric("image_count", shown)
            if image.path is None:
                print(f"the image with seed {image.seed} was withheld by the safety checker")
            else:
                yield Path(image.path)
        if not shown:
            raise ValueError("every image was withheld by the safety checker; try another prompt or seed")

    def healthcheck(self) -> bool:
        """False once the device is gone: the server must be restarted (see scripts/entrypoint)."""
        return self.service.alive
