"""DMD2 of a text-to-image model as one would first write it down, for `scripts/bench train` to compare with.

Nothing is shared and nothing precomputed: prompts and images are encoded in every step, both updates generate images
of their own, the GAN looks at them in passes of its own, through the whole network, guidance is two passes, and what
needs no gradient runs in fp32. Only passes with gradients are in the lower precision, as autocast has it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import LCMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from dmd2.models.stable_diffusion.folder import load_tokenizer, load_vae
from dmd2.runtime.loading import load_network
from dmd2.training.discriminators.head import ClassifierHead
from dmd2.training.methods.dmd2 import DM_RANGE, Dmd2Recipe
from dmd2.weights.manifest import read_manifest

WEIGHTS = "diffusion_pytorch_model.safetensors"


class PlainDmd2:
    """A teacher's folder and a recipe for it, with images (N, 3, H, W) in [-1, 1] and a caption for each."""

    def __init__(
        self, weights: Path, recipe: Dmd2Recipe, images: Tensor, captions: list[str], dtype: torch.dtype | None
    ) -> None:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        manifest = read_manifest(weights)
        assert manifest.teacher is not None, "a teacher's folder"
        self.device = images.device
        self.recipe, self.images, self.captions, self.dtype = recipe, images, captions, dtype
        self.size = manifest.native_size
        self.two = manifest.family == "sdxl"
        cpu_float = self.device, torch.float32
        kinds = [CLIPTextModel, CLIPTextModelWithProjection][: 1 + self.two]
        names = ["text_encoder", "text_encoder_2"][: 1 + self.two]
        self.encoders = [
            load_network(kind, weights / name / "model.safetensors", *cpu_float)
            for kind, name in zip(kinds, names, strict=True)
        ]
        self.tokenizers = [load_tokenizer(weights / name.replace("text_encoder", "tokenizer")) for name in names]
        self.vae = load_vae(weights / "vae", *cpu_float)
        self.teacher = load_network(UNet2DConditionModel, weights / manifest.teacher.subfolder / WEIGHTS, *cpu_float)
        self.teacher.to(memory_format=torch.contiguous_format)  # as diffusers loads it
        self.student = copy.deepcopy(self.teacher).requires_grad_(True)
        self.fake = copy.deepcopy(self.teacher).requires_grad_(True)
        self.average = copy.deepcopy(self.student).requires_grad_(False) if recipe.loop.ema_decay else None
        self.caught: dict[str, Tensor] = {}
        self.exit = 0
        self.fake.mid_block.register_forward_hook(lambda module, given, out: self.caught.update(middle=out))
        channels = self.fake.config.block_out_channels
        side = self.size[1] // self._factor() // 2 ** (len(channels) - 1)
        self.head = ClassifierHead(channels[-1], side).to(self.device) if recipe.gan_critic else None
        critic = [*self.fake.parameters(), *(self.head.parameters() if self.head else ())]
        self.groups = {"generator": list(self.student.parameters()), "critic": critic}
        betas = 0.9, recipe.beta2
        self.optimizers = {
            "generator": torch.optim.AdamW(self.groups["generator"], lr=recipe.lr, betas=betas),
            "critic": torch.optim.AdamW(critic, lr=recipe.lr_critic, betas=betas),
        }
        scheduler = LCMScheduler.from_pretrained(weights / "scheduler")
        self.velocity = scheduler.config.prediction_type == "v_prediction"
        self.alphas = scheduler.alphas_cumprod.to(self.device)

    def networks(self) -> list[nn.Module]:
        """Whose passes are not counted as overhead."""
        heads = [self.head] if self.head is not None else []
        return [self.student, self.teacher, self.fake, self.vae, *self.encoders, *heads]

    def step(self, number: int, phase: Callable[[str], Any]) -> None:
        """One step; `phase` is called with the name of what begins."""
        phase("data")
        torch.manual_seed(number)
        # As the project draws it, so that both roll out equally far.
        drawn = torch.randint(len(self.recipe.timesteps), (1,), generator=torch.Generator().manual_seed(number))
        self.exit = int(drawn)
        n = self.recipe.loop.batch_size
        rows = torch.randint(len(self.captions), (n,)).tolist()
        cond, uncond = self.encode(rows), self.nothing(n)
        real = self.encode_images(rows) if self.head is not None else None
        if number % self.recipe.generator_every == 0:
            phase("generator")
            self._update("generator", self.generator_loss(cond, uncond))
        phase("critic")
        self._update("critic", self.critic_loss(cond, real))
        if self.average is not None:
            phase("average")
            decay = self.recipe.loop.ema_decay
            with torch.no_grad():
                for kept, value in zip(self.average.parameters(), self.student.parameters(), strict=True):
                    kept.mul_(decay).add_(value, alpha=1 - decay)

    def generator_loss(self, cond: dict[str, Any], uncond: dict[str, Any]) -> Tensor:
        x = self.generate(cond, gradient=True)
        with torch.no_grad():
            low, high = (round(part * len(self.alphas)) for part in DM_RANGE)
            t = torch.randint(low, high, (len(x),), device=self.device)
            noisy = self.noised(x, t, torch.randn_like(x))
            with_text = self.x0(self.teacher, noisy, t, cond)
            without = self.x0(self.teacher, noisy, t, uncond)
            gradient = self.gradient(x, without, with_text, self.x0(self.fake, noisy, t, cond))
        loss = 0.5 * F.mse_loss(x, (x - gradient).detach())
        if self.head is not None:
            loss = loss + self.recipe.gan_generator * F.softplus(-self.logits(x, cond)).mean()
        return loss

    def gradient(self, x: Tensor, without: Tensor, with_text: Tensor, fake: Tensor) -> Tensor:
        """DMD's (eqs. 7 and 8), of three x0 predictions."""
        real = without + self.recipe.guidance_scale * (with_text - without)
        return torch.nan_to_num((fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True))

    def critic_loss(self, cond: dict[str, Any], real: Tensor | None) -> Tensor:
        with torch.no_grad():
            x = self.generate(cond, gradient=False)
        t, noise = torch.randint(len(self.alphas), (len(x),), device=self.device), torch.randn_like(x)
        noisy = self.noised(x, t, noise)
        with self.low():
            output = self.fake(noisy, t, return_dict=False, **cond)[0].float()
        alpha, sigma = self.of(t)
        loss = F.mse_loss(output, alpha * noise - sigma * x if self.velocity else noise)
        if self.head is not None and real is not None:
            judged = F.softplus(self.logits(x, cond)).mean() + F.softplus(-self.logits(real, cond)).mean()
            loss = loss + self.recipe.gan_critic * judged
        return loss

    def generate(self, cond: dict[str, Any], *, gradient: bool) -> Tensor:
        """x0 of the step's exit; earlier ones, and all without `gradient`, in fp32."""
        timesteps = self.recipe.timesteps
        last = self.exit
        n = self.recipe.loop.batch_size
        width, height = (side // self._factor() for side in self.size)
        shape = n, self.teacher.config.in_channels, height, width
        x = torch.randn(shape, device=self.device)
        for i, timestep in enumerate(timesteps[: last + 1]):
            t = torch.full((n,), timestep, device=self.device)
            with torch.set_grad_enabled(gradient and i == last):
                x0 = self.x0(self.student, x, t, cond, low=gradient and i == last)
            if i < last:
                later = torch.full((n,), timesteps[i + 1], device=self.device)
                x = self.noised(x0, later, torch.randn_like(x0))
        return x0

    def x0(self, unet: Any, x: Tensor, t: Tensor, cond: dict[str, Any], *, low: bool = False) -> Tensor:
        with self.low(low):
            output = unet(x, t, return_dict=False, **cond)[0].float()
        alpha, sigma = self.of(t)
        return alpha * x - sigma * output if self.velocity else (x - sigma * output) / alpha

    def logits(self, x0: Tensor, cond: dict[str, Any]) -> Tensor:
        assert self.head is not None
        t = torch.randint(len(self.alphas), (len(x0),), device=self.device)
        with self.low():
            self.fake(self.noised(x0, t, torch.randn_like(x0)), t, return_dict=False, **cond)
        found: Tensor = self.head(self.caught.pop("middle").float())
        return found

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        alpha, sigma = self.of(t)
        return alpha * x0 + sigma * noise

    def of(self, t: Tensor) -> tuple[Tensor, Tensor]:
        squared = self.alphas[t].reshape(-1, 1, 1, 1)
        return squared.sqrt(), (1 - squared).sqrt()

    def low(self, on: bool = True) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=on and self.dtype is not None)

    @torch.no_grad()
    def encode(self, rows: list[int] | None, n: int = 1) -> dict[str, Any]:
        """What the UNet is called with beside x and t, for the captions in these rows; without, for n empty ones."""
        texts = [self.captions[i] for i in rows] if rows is not None else [""] * n
        states: list[Tensor] = []
        added = None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            length = tokenizer.model_max_length
            ids = tokenizer(
                texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).input_ids
            out = encoder(ids.to(self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2] if self.two else out.last_hidden_state)
            if self.two and "text_embeds" in out:
                width, height = self.size
                ids_of_size = torch.tensor([[height, width, 0, 0, height, width]] * len(texts), device=self.device)
                added = {"text_embeds": out.text_embeds, "time_ids": ids_of_size.float()}
        return {"encoder_hidden_states": torch.cat(states, dim=-1), "added_cond_kwargs": added}

    def nothing(self, n: int) -> dict[str, Any]:
        """What guidance leads away from."""
        cond = self.encode(None, n)
        if self.two:
            cond["encoder_hidden_states"].zero_()
            cond["added_cond_kwargs"]["text_embeds"].zero_()
        return cond

    @torch.no_grad()
    def encode_images(self, rows: list[int]) -> Tensor:
        out = self.vae.encode(self.images[rows])
        latents = out.latents if hasattr(out, "latents") else out.latent_dist.mean
        found: Tensor = latents * getattr(self.vae.config, "scaling_factor", 1.0)
        return found

    def _factor(self) -> int:
        return 2 ** (
            len(getattr(self.vae.config, "encoder_block_out_channels", self.vae.config.block_out_channels)) - 1
        )

    def _update(self, name: str, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.groups[name], self.recipe.loop.max_grad_norm or float("inf"))
        self.optimizers[name].step()
        # The generator's loss leaves gradients in the fake score, too: its GAN goes through it.
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
