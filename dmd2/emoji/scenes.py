"""Emoji scenes: endless captioned images for the embedded model, composed from weights/emoji/emoji.zip.

A scene is one emoji, somewhere inside the frame, turned a little, on one flat colour. How freely, how large and of
which groups is said by the zip itself, in its `scenes.json` (`SceneSettings`). Every batch is a pure function of
(seed, step), so a resumed run sees exactly the scenes that it would have seen.
"""

import hashlib
import io
import json
import math
import random
import re
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from dmd2.runtime.errors import DataError

Split = Literal["seen", "held-out", "all", "every"]

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (247, 247, 247),
    "black": (16, 16, 16),
    "red": (215, 35, 40),
    "orange": (245, 135, 25),
    "yellow": (250, 220, 60),
    "green": (50, 165, 75),
    "blue": (45, 100, 220),
    "purple": (125, 55, 175),
    "pink": (250, 160, 200),
}
JITTER = 6  # a scene's background differs from the table by up to this much per channel
SUPERSAMPLING = 2
CHUNK = 16  # scenes composed at once: what the processor's cache likes
MOST_SIDE = 512  # of a stored glyph, which is square
SETTINGS = "scenes.json"
HELD_OUT_ONE_IN = 20  # (emoji, background) pairs that "seen" batches never show
EMPTY_CAPTIONS = 0.10  # what classifier-free guidance learns the unconditional score from
KIND_CAPTIONS = 0.25  # "a fruit" instead of "a red apple"
BACKGROUND_CAPTIONS = 0.50
ALIASES = 0.3  # of the captions that name the emoji, how many use an alias, where there is one

# The first template of each table is the plain one, used where nothing is left to chance.
WITH_BACKGROUND = (
    "{a} on {a_colour} background",
    "{thing}, {colour} background",
    "a picture of {a} on {colour}",
    "{a} on {colour}",
    "{a} in front of {a_colour} background",
    "{colour} background, {thing}",
)
WITHOUT_BACKGROUND = ("{a}", "{thing}", "a picture of {a}", "an emoji of {a}", "{thing} emoji")

# Nouns that take no article although they do not look like a plural.
UNCOUNTED = re.compile(
    r"\b(bacon|badminton|beer|bowling|bread|broccoli|butter|candy|cheese|coffee|corn|custard|fire|food|garlic|milk"
    r"|ping pong|popcorn|salad|salt|seafood|soap|soccer|spaghetti|sushi|tennis|thread|yarn)$"
)
SINGULAR_S = re.compile(r"(ss|us|rhinoceros)$")  # ends in s, but is one thing
SPOKEN_AN = re.compile(r"e(?!uro)|[aio]|u(?!ni|fo|ti)|hour")  # begins with a vowel when spoken

# How CLIP's tokenizer splits lower-case text, before it merges bytes into tokens.
CLIP_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+")


Share = Annotated[float, Field(gt=0, le=1)]


class SceneSettings(BaseModel):
    """`scenes.json` of a zip of emoji. What it leaves out, or a zip without one, is as in the first of these zips."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: Annotated[int, Field(ge=8, le=MOST_SIDE, multiple_of=8)] = 64
    """pixels along a side of a scene"""
    scale: tuple[Share, Share] = (0.8, 0.95)
    """the emoji's longer side, from … to, as a fraction of the frame"""
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 6.0
    """how far it turns at most either way"""
    shift: Annotated[float, Field(ge=0, le=1)] = 0.1
    """how far it lies from the middle at most, as a fraction of the frame, along each side"""
    mirrored: bool = False
    """whether half of the scenes show the emoji's mirror image"""
    groups: tuple[str, ...] = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")
    """Unicode groups whose emoji are learned"""


@dataclass(frozen=True)
class Scenes:
    """One batch of B images with everything that is known about them."""

    images: Tensor
    """uint8 (B, 3, size, size), RGB"""
    captions: list[str]
    """lower case; some are empty"""
    emoji: Tensor
    """int64 (B,), an index into `EmojiScenes.names`"""
    background: Tensor
    """int64 (B,), an index into `list(BACKGROUNDS)`"""


class EmojiScenes:
    """Composes scenes from a zip of emoji, as `scripts/build-emoji` writes it.

    An emoji always lies inside the frame: one that would not fit once turned is shrunk until it does. Training uses
    the emoji of the settings' groups.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        settings, entries, self._glyphs = _read(Path(path))  # glyphs: uint8 (N, 4, side, side), premultiplied RGBA
        self.size = size or settings.size
        self.scale, self.rotation_degrees = settings.scale, settings.rotation_degrees
        self.shift, self.mirrored = settings.shift, settings.mirrored
        self._reach = _reach(self._glyphs[:, 3] > 8)
        self.names = [spoken(entry["name"]) for entry in entries]
        self.kinds = [spoken(entry["kind"]) for entry in entries]
        self.aliases = [
            [alias for alias in dict.fromkeys(map(spoken, entry["aliases"])) if alias != name]
            for entry, name in zip(entries, self.names, strict=True)
        ]
        learned = torch.tensor([entry["group"] in settings.groups for entry in entries])[:, None]
        held_out = [[_hashes_out(name, colour) for colour in BACKGROUNDS] for name in self.names]
        self._held_out = torch.tensor(held_out)  # bool (N, backgrounds)
        self._pairs: dict[Split, Tensor] = {
            "seen": (~self._held_out & learned).nonzero(),
            "held-out": (self._held_out & learned).nonzero(),
            "all": learned.expand_as(self._held_out).nonzero(),
            "every": torch.ones_like(self._held_out).nonzero(),
        }

    def __len__(self) -> int:
        """The number of emoji."""
        return len(self.names)

    def glyphs(self, side: int) -> Tensor:
        """float (N, 4, side, side): the emoji's images, premultiplied RGBA in [0, 255], brought to `side` pixels."""
        return F.interpolate(self._glyphs.float(), size=(side, side), mode="area")

    def is_held_out(self, emoji: Tensor, background: Tensor) -> Tensor:
        """bool (B,): which of these int64 (B,) pairs "seen" batches never show. Names alone decide."""
        return self._held_out[emoji, background]

    def pairs(self, split: Split) -> Tensor:
        """int64 (P, 2): the (emoji, background) pairs of a split.

        "seen" and "held-out" are of the learned emoji, "all" is both, "every" is of all emoji in the file.
        """
        return self._pairs[split]

    def batch(self, n: int, *, seed: int, step: int, split: Split = "seen", freedom: float = 1.0) -> Scenes:
        """`n` scenes, uniform over the split's pairs; always the same for the same arguments.

        `freedom` in [0, 1] narrows position, size and rotation: at 0 each emoji sits still in the middle.
        """
        pairs = self._pairs[split]
        if len(pairs) == 0:
            raise ValueError(f"the split {split!r} of these {len(self)} emoji has no (emoji, background) pair")
        generator = _generator("pairs", seed, step)
        emoji, background = pairs[torch.randint(len(pairs), (n,), generator=generator)].unbind(1)
        return self.captioned(emoji, background, seed=seed, step=step, freedom=freedom)

    def captioned(
        self,
        emoji: Tensor,
        background: Tensor,
        *,
        seed: int,
        step: int = 0,
        plain: bool = False,
        freedom: float = 1.0,
    ) -> Scenes:
        """Scenes of these int64 (B,) emoji and backgrounds; `plain` captions name both, always alike."""
        rng = random.Random(f"captions {seed} {step}")
        captions = [
            self.caption(e, b, None if plain else rng)
            for e, b in zip(emoji.tolist(), background.tolist(), strict=True)
        ]
        images = self._compose(emoji, background, freedom, _generator("pictures", seed, step))
        return Scenes(images, captions, emoji, background)

    def caption(self, emoji: int, background: int, rng: random.Random | None = None) -> str:
        """A caption chosen with `rng`; without one, the plain "a red apple on a blue background"."""
        colour = list(BACKGROUNDS)[background]
        if rng is None:
            return _fill(WITH_BACKGROUND[0], self.names[emoji], colour)
        sort = rng.random()
        if sort < EMPTY_CAPTIONS:
            return ""
        names_emoji = sort >= EMPTY_CAPTIONS + KIND_CAPTIONS
        names_background = rng.random() < BACKGROUND_CAPTIONS / (1 - EMPTY_CAPTIONS)
        thing = self.names[emoji] if names_emoji else self.kinds[emoji]
        if names_emoji and self.aliases[emoji] and rng.random() < ALIASES:
            thing = rng.choice(self.aliases[emoji])
        template = rng.choice(WITH_BACKGROUND if names_background else WITHOUT_BACKGROUND)
        return _fill(template, thing, colour)

    def _compose(self, emoji: Tensor, background: Tensor, freedom: float, generator: torch.Generator) -> Tensor:
        """uint8 (B, 3, size, size). Frame and glyph coordinates both run from -1 to 1, x right and y down."""
        n = len(emoji)
        draws = torch.rand(5, n, generator=generator)
        u_scale, u_angle, _, u_x, u_y = 0.5 + freedom * (draws - 0.5)
        mirrored = self.mirrored & (draws[2] < 0.5 * freedom)
        jitter = torch.randint(-JITTER, JITTER + 1, (n, 3), generator=generator)

        # A glyph point g shows at frame point f = centre + scale * rotate(mirror(g)).
        scale = self.scale[0] + (self.scale[1] - self.scale[0]) * u_scale
        angle = self.rotation_degrees * (2 * u_angle - 1)

        # How far the turned glyph reaches right, down, left and up of its centre; if too far, shrink it.
        towards = torch.tensor([0.0, 90.0, 180.0, 270.0]) - angle[:, None]
        towards = torch.where(mirrored[:, None], 180 - towards, towards)
        reach = self._reach[emoji[:, None], towards.round().long() % 360]
        scale = torch.minimum(scale, 2 / torch.maximum(reach[:, 0] + reach[:, 2], reach[:, 1] + reach[:, 3]))
        right, down, left, up = (reach * scale[:, None]).unbind(1)
        room_x, room_y = (2 - left - right) / 2, (2 - up - down) / 2  # either way from the middle
        x = (left - right) / 2 + (2 * u_x - 1) * room_x.clamp(max=2 * self.shift)
        y = (up - down) / 2 + (2 * u_y - 1) * room_y.clamp(max=2 * self.shift)

        # grid_sample wants the inverse: g = mirror(rotate⁻¹((f - centre) / scale)).
        cos, sin = torch.cos(torch.deg2rad(angle)) / scale, torch.sin(torch.deg2rad(angle)) / scale
        inverse = torch.stack([cos, sin, -sin, cos], dim=1).view(n, 2, 2)
        shift = -inverse @ torch.stack([x, y], dim=1)[:, :, None]
        inverse = torch.cat([inverse, shift], dim=2)
        inverse[:, 0] *= torch.where(mirrored, -1.0, 1.0)[:, None]

        colours = torch.tensor(list(BACKGROUNDS.values()))[background]
        ground = (colours + jitter).clamp(0, 255).float()[:, :, None, None]
        chunks = zip(emoji.split(CHUNK), inverse.split(CHUNK), ground.split(CHUNK), strict=True)
        return torch.cat([self._paint(*chunk) for chunk in chunks])

    def _paint(self, emoji: Tensor, inverse: Tensor, ground: Tensor) -> Tensor:
        """uint8 (b, 3, size, size): glyphs through (b, 2, 3) inverse maps, over (b, 3, 1, 1) colours."""
        fine = self.size * SUPERSAMPLING
        grid = F.affine_grid(inverse, [len(emoji), 4, fine, fine], align_corners=False)
        glyphs = F.grid_sample(self._glyphs[emoji].float(), grid, mode="bilinear", align_corners=False)
        glyphs = F.avg_pool2d(glyphs, SUPERSAMPLING)
        images = glyphs[:, :3] + ground * (1 - glyphs[:, 3:] / 255)
        return images.round().clamp(0, 255).to(torch.uint8)


def vocabulary(scenes: EmojiScenes) -> list[str]:
    """Every word that a caption may contain, sorted; words as CLIP's tokenizer splits them."""
    texts = [*WITH_BACKGROUND, *WITHOUT_BACKGROUND, "a an", *BACKGROUNDS, *scenes.names, *scenes.kinds]
    texts += [alias for aliases in scenes.aliases for alias in aliases]
    return sorted({word for text in texts for word in CLIP_WORD.findall(re.sub(r"{\w+}", " ", text))})


def spoken(name: str) -> str:
    """A name as captions say it: lower case, no accents, only letters, digits, spaces and "'"."""
    name = unicodedata.normalize("NFKD", name.replace("\u2019", "'")).lower()
    name = "".join(letter for letter in name if not unicodedata.combining(letter))
    return " ".join(re.sub(r"[^\w']|_", " ", name).split())


def with_article(thing: str) -> str:
    """ "a red apple", "an owl", "cherries", "popcorn": `thing` as the object of a sentence."""
    head = re.split(" of | with ", thing)[0]
    plural = head.endswith("s") and not SINGULAR_S.search(head)
    if plural or UNCOUNTED.search(head):
        return thing
    return f"{'an' if SPOKEN_AN.match(thing) else 'a'} {thing}"


def _fill(template: str, thing: str, colour: str) -> str:
    return template.format(a=with_article(thing), thing=thing, a_colour=with_article(colour), colour=colour)


def _generator(purpose: str, seed: int, step: int) -> torch.Generator:
    digest = hashlib.sha256(f"{purpose} {seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _hashes_out(name: str, colour: str) -> bool:
    digest = hashlib.sha256(f"{name} on {colour}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def _reach(opaque: Tensor) -> Tensor:
    """float32 (N, 360): how far each bool (N, side, side) shape reaches from its centre, by degree.

    0 is right, 90 down. In half sides, and a tenth of a pixel more for directions between two degrees.
    """
    side = opaque.shape[-1]
    edges = torch.linspace(-1, 1, side + 1)
    columns = torch.arange(side).expand(opaque.shape)
    first = edges[torch.where(opaque, columns, side).amin(2).clamp(max=side)]  # (N, SIDE), left edge by row
    last = edges[torch.where(opaque, columns + 1, 0).amax(2)]
    angles = torch.arange(360) * (math.pi / 180)
    cos, sin = torch.cos(angles), torch.sin(angles)
    farthest = torch.full((len(opaque), 360), -2.0)
    for row in range(side):
        x = torch.where(cos > 0, last[:, row, None], first[:, row, None])
        y = torch.where(sin > 0, edges[row + 1], edges[row])
        here = x * cos + y * sin
        farthest = torch.maximum(farthest, torch.where(opaque[:, row].any(1)[:, None], here, -2.0))
    return farthest + 0.2 / side


def _read(path: Path) -> tuple[SceneSettings, Sequence[dict[str, Any]], Tensor]:
    """The settings, the lines of metadata.jsonl and the glyphs, uint8 (N, 4, side, side), premultiplied RGBA."""
    expected = "expected the zip that scripts/build-emoji writes"
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot be read as a zip ({error}); {expected}", path) from error
    except (KeyError, TypeError, ValueError) as error:
        reason = error.args[0] if error.args else error
        raise DataError(f"{reason}; {expected}", path) from error


def _read_archive(archive: zipfile.ZipFile) -> tuple[SceneSettings, list[dict[str, Any]], Tensor]:
    present = set(archive.namelist())
    settings = SceneSettings()
    if SETTINGS in present:
        try:
            settings = SceneSettings.model_validate_json(archive.read(SETTINGS))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{SETTINGS}: {'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from error
    if "metadata.jsonl" not in present:
        raise ValueError("metadata.jsonl is missing")
    entries: list[dict[str, Any]] = []
    glyphs: list[Tensor] = []
    for number, line in enumerate(archive.read("metadata.jsonl").decode("utf-8-sig").splitlines(), start=1):
        try:
            entry = json.loads(line)
            file_name = entry["file_name"]
            _ = entry["name"], entry["kind"], entry["aliases"], entry["group"]
        except (ValueError, KeyError, TypeError) as error:
            fields = "file_name, name, kind, aliases and group"
            raise ValueError(f"metadata.jsonl line {number} is not a JSON object with {fields}") from error
        if file_name not in present:
            raise ValueError(f"{file_name}, named in metadata.jsonl line {number}, is missing")
        try:
            image = Image.open(io.BytesIO(archive.read(file_name)))
            image.load()
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file_name} is not a readable image") from error
        side = glyphs[0].shape[-1] if glyphs else min(image.width, MOST_SIDE)
        if image.size != (side, side) or image.mode != "RGBA":
            found = f"{image.mode} {image.width} x {image.height}"
            raise ValueError(f"{file_name} is {found}, not RGBA {side} x {side}")
        entries.append(entry)
        glyphs.append(torch.from_numpy(np.array(image.convert("RGBa"))).permute(2, 0, 1))
    if not entries:
        raise ValueError("metadata.jsonl names no image")
    return settings, entries, torch.stack(glyphs).contiguous()
