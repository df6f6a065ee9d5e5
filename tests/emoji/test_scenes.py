"""Emoji scenes: pure in (seed, step), honest captions, held-out pairs kept out, and the zip beneath."""

import io
import json
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from dmd2.emoji.scenes import (
    BACKGROUNDS,
    CLIP_WORD,
    HELD_OUT_ONE_IN,
    JITTER,
    SETTINGS,
    EmojiScenes,
    spoken,
    vocabulary,
    with_article,
)

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "weights" / "emoji" / "emoji.zip"
BUILD = ROOT / "scripts" / "build-emoji"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIDE = 96  # of a stored glyph
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")


def image(colour: tuple[int, int, int, int], shape: str) -> bytes:
    image = Image.new("RGBA", (SIDE, SIDE))
    generate = ImageDraw.Draw(image)
    (generate.rectangle if shape == "square" else generate.ellipse)((0, 0, SIDE - 1, SIDE - 1), fill=colour)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def write_zip(path: Path, *, without: str = "", **settings: object) -> Path:
    """Four emoji of one grey each, which no background comes close to."""
    lines = [
        {
            "file_name": "emoji/1.png",
            "name": "red apple",
            "kind": "fruit",
            "aliases": ["apple"],
            "group": "Food & Drink",
        },
        {"file_name": "emoji/2.png", "name": "Owl", "kind": "bird", "aliases": [], "group": "Animals & Nature"},
        {
            "file_name": "emoji/3.png",
            "name": "cherries",
            "kind": "fruit",
            "aliases": ["pi\u00f1ata"],
            "group": "Food & Drink",
        },
        {
            "file_name": "emoji/4.png",
            "name": "T-Rex",
            "kind": "reptile",
            "aliases": ["t rex"],
            "group": "Animals & Nature",
        },
    ]
    files = {"metadata.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode()}
    for number, shape in enumerate(("square", "circle", "circle", "square"), start=1):
        files[f"emoji/{number}.png"] = image((128, 128, 128, 255), shape)
    if settings:
        files[SETTINGS] = json.dumps(settings).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            if name != without:
                archive.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> EmojiScenes:
    return EmojiScenes(write_zip(tmp_path_factory.mktemp("emoji") / "tiny.zip"))


@pytest.fixture(scope="module")
def committed() -> EmojiScenes:
    return EmojiScenes(COMMITTED)


def test_a_batch_is_a_pure_function_of_seed_and_step(committed: EmojiScenes) -> None:
    torch.manual_seed(0)
    random.seed(0)
    torch_state, random_state = torch.get_rng_state(), random.getstate()
    first = committed.batch(20, seed=3, step=5)
    committed.batch(20, seed=3, step=6)
    again = EmojiScenes(COMMITTED).batch(20, seed=3, step=5)
    assert torch.equal(first.images, again.images) and first.captions == again.captions
    assert torch.equal(first.emoji, again.emoji) and torch.equal(first.background, again.background)
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == random_state
    for seed, step in ((3, 6), (4, 5), (5, 3)):
        assert not torch.equal(first.images, committed.batch(20, seed=seed, step=step).images)


def test_a_batch_of_scenes_has_the_documented_shapes_and_types(tiny: EmojiScenes) -> None:
    scenes = tiny.batch(37, seed=0, step=0)
    assert scenes.images.shape == (37, 3, 64, 64) and scenes.images.dtype == torch.uint8
    assert len(scenes.captions) == 37
    assert scenes.emoji.shape == scenes.background.shape == (37,)
    assert scenes.emoji.dtype == scenes.background.dtype == torch.int64


def test_held_out_pairs_are_one_in_twenty_and_never_seen(committed: EmojiScenes) -> None:
    emoji, background = committed.pairs("every").unbind(1)
    held_out = committed.is_held_out(emoji, background)
    assert len(emoji) == len(committed) * len(BACKGROUNDS)
    assert held_out.float().mean().item() == pytest.approx(1 / HELD_OUT_ONE_IN, abs=0.01)
    held_out_of_each = held_out.view(len(committed), len(BACKGROUNDS)).sum(1)
    assert held_out_of_each.max() <= len(BACKGROUNDS) // 2, "every emoji keeps most backgrounds"
    for step in range(4):
        seen = committed.batch(500, seed=1, step=step)
        assert not committed.is_held_out(seen.emoji, seen.background).any()
        held = committed.batch(50, seed=1, step=step, split="held-out")
        assert committed.is_held_out(held.emoji, held.background).all()


def test_held_out_pairs_depend_on_names_alone(tiny: EmojiScenes, committed: EmojiScenes) -> None:
    here, there = tiny.names.index("red apple"), committed.names.index("red apple")
    colours = torch.arange(len(BACKGROUNDS))
    ours = tiny.is_held_out(torch.full_like(colours, here), colours)
    theirs = committed.is_held_out(torch.full_like(colours, there), colours)
    assert torch.equal(ours, theirs)


def test_scenes_are_uniform_over_the_pairs(tiny: EmojiScenes) -> None:
    scenes = [tiny.batch(400, seed=0, step=step, split="all") for step in range(9)]
    pairs = torch.cat([batch.emoji * len(BACKGROUNDS) + batch.background for batch in scenes])
    counts = pairs.bincount(minlength=4 * len(BACKGROUNDS))  # 100 expected of each, standard deviation 10
    assert counts.min() > 55 and counts.max() < 145


def test_captions_name_emoji_background_and_aliases_as_often_as_documented(committed: EmojiScenes) -> None:
    rng = random.Random(0)
    pairs = [(rng.randrange(len(committed)), rng.randrange(len(BACKGROUNDS))) for _ in range(4000)]
    captions = [committed.caption(emoji, background, rng) for emoji, background in pairs]
    named = [said(committed, *pair, text) for pair, text in zip(pairs, captions, strict=True)]
    share = {
        "background": sum(background for _, background in named) / 4000,
        "empty": captions.count("") / 4000,
        "emoji": sum(emoji for emoji, _ in named) / 4000,
    }
    assert share["background"] == pytest.approx(0.50, abs=0.04)
    assert share["empty"] == pytest.approx(0.10, abs=0.02)
    assert share["emoji"] == pytest.approx(0.65, abs=0.04)  # the other quarter names the kind only


def said(scenes: EmojiScenes, emoji: int, background: int, text: str) -> tuple[bool, bool]:
    """Whether a caption names the emoji, and whether the background."""
    padded = f" {text.replace(',', ' ,')} "
    names = [scenes.names[emoji], *scenes.aliases[emoji]]
    return any(f" {name} " in padded for name in names), f" {list(BACKGROUNDS)[background]} " in padded


def test_captions_name_the_emoji_or_its_kind(committed: EmojiScenes) -> None:
    scenes = committed.batch(600, seed=2, step=0)
    for text, emoji, background in zip(scenes.captions, scenes.emoji, scenes.background, strict=True):
        assert text == text.lower() and re.fullmatch(r"[a-z0-9', ]*", text), text
        assert "  " not in text and text == text.strip()
        names_emoji, names_background = said(committed, int(emoji), int(background), text)
        assert names_emoji or not text or f" {committed.kinds[emoji]} " in f" {text.replace(',', ' ,')} ", text
        assert names_background or not re.search(
            rf"\b({'|'.join(BACKGROUNDS)}) background|on ({'|'.join(BACKGROUNDS)})$", text
        )


def test_every_caption_is_made_of_the_vocabulary(committed: EmojiScenes) -> None:
    words = vocabulary(committed)
    assert words == sorted(set(words)) and {"a", "an", "apple", "background", "blue", "fruit"} <= set(words)
    for step in range(4):
        for caption in committed.batch(500, seed=4, step=step, split="all").captions:
            assert set(CLIP_WORD.findall(caption)) <= set(words), caption


def test_plain_captions_name_both(tiny: EmojiScenes) -> None:
    blue = torch.full((4,), list(BACKGROUNDS).index("blue"))
    scenes = tiny.captioned(torch.arange(4), blue, seed=0, plain=True)
    assert scenes.captions == [
        "a red apple on a blue background",
        "an owl on a blue background",
        "cherries on a blue background",
        "a t rex on a blue background",
    ]


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        ("red apple", "a red apple"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("hourglass", "an hourglass"),
        ("european castle", "a european castle"),
        ("cherries", "cherries"),
        ("cactus", "a cactus"),
        ("high heels", "high heels"),
        ("glass of milk", "a glass of milk"),
        ("smiling face with sunglasses", "a smiling face with sunglasses"),
        ("hot dog", "a hot dog"),
        ("popcorn", "popcorn"),
    ],
)
def test_with_article_chooses_a_an_or_none(thing: str, said: str) -> None:
    assert with_article(thing) == said


def test_spoken_names_are_plain() -> None:
    assert spoken("Pi\u00f1ata") == "pinata"
    assert spoken("rescue worker\u2019s T-Shirt: 8") == "rescue worker's t shirt 8"


def test_the_emoji_lies_inside_the_frame_on_its_background(tiny: EmojiScenes) -> None:
    scenes = tiny.batch(300, seed=7, step=1, split="all")
    table = torch.tensor(list(BACKGROUNDS.values()))[scenes.background][:, :, None, None]
    off = (scenes.images.int() - table).abs().amax(1)  # (B, H, W): how far from the background's colour
    corners = off[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.amin(1) <= JITTER).all(), "at least one corner shows the background"
    emoji = off > JITTER + 1
    share = emoji.float().mean((1, 2))
    assert (share > 0.25).all() and (share < 0.96).all()
    # A circle fills 0.785 of its bounding box, and a box is square, unless the frame cuts a piece off.
    for index in (scenes.emoji == 1).nonzero().flatten().tolist():
        rows, columns = emoji[index].any(1).sum().item(), emoji[index].any(0).sum().item()
        assert abs(rows - columns) <= 2 and 0.64 * 64 - 1 <= rows <= 0.96 * 64 + 2
        assert emoji[index].sum().item() / (rows * columns) == pytest.approx(0.785, abs=0.05)


def test_a_square_that_would_not_fit_once_turned_is_shrunk(tmp_path: Path) -> None:
    scenes = EmojiScenes(write_zip(tmp_path / "e.zip"))
    scenes.scale, scenes.rotation_degrees = (1.0, 1.0), 45.0
    white = torch.zeros(40, dtype=torch.int64)
    images = scenes.captioned(torch.zeros_like(white), white, seed=0).images.int()
    emoji = (images - 128).abs().amax(1) < 30
    inside = emoji[:, 1:-1, 1:-1].sum((1, 2)).float() / emoji.sum((1, 2))
    turned = emoji[:, 0, 0].logical_not()  # those turned so little that they fill the frame show no corner
    assert turned.sum() > 30 and (inside[turned] > 0.9).all()
    for image in emoji[turned]:
        width = image.any(0).sum().item()
        assert 62 <= width <= 64 and 62 <= image.any(1).sum().item() <= 64


@pytest.mark.parametrize("mirrored", [False, True])
def test_an_emoji_is_mirrored_half_of_the_time_or_never(tmp_path: Path, mirrored: bool) -> None:
    path = tmp_path / "wedge.zip"
    image = Image.new("RGBA", (SIDE, SIDE))
    ImageDraw.Draw(image).polygon([(0, 0), (95, 0), (0, 95)], fill=(128, 128, 128, 255))  # lower right is empty
    data = io.BytesIO()
    image.save(data, "PNG")
    with zipfile.ZipFile(path, "w") as archive:
        line = {"file_name": "emoji/1.png", "name": "wedge", "kind": "shape", "aliases": [], "group": "Food & Drink"}
        archive.writestr("metadata.jsonl", json.dumps(line))
        archive.writestr("emoji/1.png", data.getvalue())
        archive.writestr(SETTINGS, json.dumps({"mirrored": mirrored, "scale": [1, 1], "rotation_degrees": 0}))
    blue = torch.full((200,), list(BACKGROUNDS).index("blue"))
    fixed = EmojiScenes(path)
    grey = (fixed.captioned(torch.zeros_like(blue), blue, seed=0).images.int() - 128).abs().amax(1) < 20
    plain = grey[:, 4, 4] & grey[:, 50, 4] & ~grey[:, 50, 60]
    flipped = grey[:, 4, 59] & grey[:, 50, 59] & ~grey[:, 50, 3]
    assert (plain ^ flipped).all() and 60 < int(flipped.sum()) < 140 if mirrored else plain.all()
    still = fixed.captioned(torch.zeros_like(blue), blue, seed=0, freedom=0.0).images
    assert ((still[:, :, 50, 4].int() - 128).abs().amax(1) < 20).all(), "without freedom none is"


def test_a_zip_says_how_its_scenes_are_composed(tmp_path: Path) -> None:
    groups = ["Animals & Nature"]
    scenes = EmojiScenes(
        write_zip(tmp_path / "e.zip", size=128, scale=[0.6, 0.95], rotation_degrees=15, mirrored=True, groups=groups)
    )
    assert scenes.size == 128 and scenes.scale == (0.6, 0.95) and scenes.rotation_degrees == 15 and scenes.mirrored
    batch = scenes.batch(60, seed=0, step=0)
    assert batch.images.shape == (60, 3, 128, 128) and set(batch.emoji.tolist()) == {1, 3}
    wide = (batch.images.int() - 128).abs().amax(1).lt(20)[batch.emoji == 1].any(1).sum(1).float() / 128
    assert 0.58 < wide.min() < 0.68 and 0.87 < wide.max() < 0.97, "circles from 0.6 to 0.95 of the frame"
    assert EmojiScenes(write_zip(tmp_path / "f.zip", size=128), 64).size == 64, "a caller may ask for another size"
    with pytest.raises(ValueError, match=r"scenes.json: rotation_degrees: .* less than or equal to 180"):
        EmojiScenes(write_zip(tmp_path / "g.zip", rotation_degrees=200))
    with pytest.raises(ValueError, match=r"scenes.json: colour: "):
        EmojiScenes(write_zip(tmp_path / "h.zip", colour="red"))


def test_the_mirror_image_of_a_turned_emoji_fits_as_well(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "e.zip", mirrored=True, scale=[1, 1], rotation_degrees=45)
    scenes = EmojiScenes(path)
    white = torch.full((40,), list(BACKGROUNDS).index("white"))
    grey = (scenes.captioned(torch.zeros_like(white), white, seed=0).images.int() - 128).abs().amax(1) < 30
    assert (grey.any(1).sum(1) >= 61).all() and (grey.any(2).sum(1) >= 61).all(), "and fills the frame"


def test_backgrounds_are_nine_distinct_colours() -> None:
    assert len(BACKGROUNDS) == 9 and {"blue", "pink", "red", "yellow", "green", "white"} <= set(BACKGROUNDS)
    colours = torch.tensor(list(BACKGROUNDS.values())).float()
    distances = torch.cdist(colours, colours) + 1e3 * torch.eye(9)
    assert distances.min() > 80


def message(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        EmojiScenes(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and "scripts/build-emoji" in text
    return text


def test_damaged_zips_are_named_in_one_line(tmp_path: Path) -> None:
    whole = COMMITTED.read_bytes()
    truncated = tmp_path / "truncated.zip"
    truncated.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as a zip" in message(truncated)
    assert "cannot be read as a zip" in message(tmp_path / "absent.zip")
    broken = tmp_path / "broken.zip"
    middle = len(whole) // 2
    broken.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    message(broken)


def test_incomplete_zips_name_the_missing_file(tmp_path: Path) -> None:
    missing = message(write_zip(tmp_path / "a.zip", without="metadata.jsonl"))
    assert "metadata.jsonl is missing" in missing
    assert "emoji/3.png" in message(write_zip(tmp_path / "b.zip", without="emoji/3.png"))
    garbage = write_zip(tmp_path / "c.zip", without="emoji/3.png")
    with zipfile.ZipFile(garbage, "a") as archive:
        archive.writestr("emoji/3.png", b"no image")
    assert "emoji/3.png is not a readable image" in message(garbage)
    bad_line = write_zip(tmp_path / "d.zip", without="metadata.jsonl")
    with zipfile.ZipFile(bad_line, "a") as archive:
        archive.writestr("metadata.jsonl", '{"file_name": "emoji/1.png"}\n')
    assert "metadata.jsonl line 1" in message(bad_line)


def test_the_committed_zip_holds_single_things() -> None:
    assert COMMITTED.stat().st_size < 6_000_000
    with zipfile.ZipFile(COMMITTED) as archive:
        entries = [json.loads(line) for line in archive.read("metadata.jsonl").decode().splitlines()]
        assert "SIL Open Font License" in archive.read("LICENSE.txt").decode()
        images = {name for name in archive.namelist() if name.startswith("emoji/")}
    assert 400 <= len(entries) <= 1000 and {entry["file_name"] for entry in entries} == images
    names = [spoken(entry["name"]) for entry in entries]
    assert len(set(names)) == len(names)
    assert {"red apple", "dog face", "cat face", "pizza", "rocket", "car", "sun", "smiling face"} <= set(names)
    for entry, name in zip(entries, names, strict=True):
        assert not {spoken(alias) for alias in entry["aliases"]} & (set(names) - {name}), entry
    for entry in entries:
        assert len(entry["emoji"]) == 1, "no flag, keycap, skin tone, gender or family"
        assert entry["group"] not in {"Flags", "Symbols", "People & Body", "Component"}
        assert not re.search(r"flag|keycap|o.clock|button|arrow|skin tone", entry["name"])
        assert entry["text"] == entry["name"] and entry["kind"] and ":" not in entry["name"]


needs_font = pytest.mark.skipif(
    not (FONT.is_file() and EMOJI_TEST.is_file()),
    reason="needs Debian's fonts-noto-color-emoji and unicode-data",
)


def build(*arguments: object) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("emoji", reason="needs the PyPI package emoji")
    command = [sys.executable, BUILD, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


@needs_font
def test_the_build_is_deterministic_and_leaves_no_partial_file(tmp_path: Path) -> None:
    for name in ("one.zip", "two.zip"):
        done = build(tmp_path / "new" / name)
        assert done.returncode == 0, done.stderr
    one, two = (tmp_path / "new" / name for name in ("one.zip", "two.zip"))
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["one.zip", "two.zip"]
    scenes, committed = EmojiScenes(one), EmojiScenes(COMMITTED)
    assert 400 <= len(scenes) <= 1000 and scenes.size == 128 and scenes.names == committed.names
    for setting in ("scale", "rotation_degrees", "shift", "mirrored"):
        assert getattr(scenes, setting) == getattr(committed, setting), "what is learned is what the script makes"
    assert len(scenes.pairs("all")) == len(scenes) * len(BACKGROUNDS), "emoji of every group are learned"


@pytest.mark.parametrize(
    ("option", "package"), [("--font", "fonts-noto-color-emoji"), ("--emoji-test", "unicode-data")]
)
def test_the_build_names_the_missing_package(tmp_path: Path, option: str, package: str) -> None:
    present = tmp_path / "present"
    present.touch()
    other = "--emoji-test" if option == "--font" else "--font"
    done = build(tmp_path / "out.zip", option, tmp_path / "absent", other, present)
    assert done.returncode == 2 and package in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.zip").exists()


def test_only_the_learned_groups_are_drawn_from(tmp_path: Path) -> None:
    scenes = EmojiScenes(write_zip(tmp_path / "e.zip", groups=["Animals & Nature"]))
    assert len(scenes) == 4
    assert set(scenes.pairs("all")[:, 0].tolist()) == {1, 3}
    assert set(scenes.batch(200, seed=0, step=0, split="seen").emoji.tolist()) == {1, 3}
    assert set(scenes.pairs("every")[:, 0].tolist()) == {0, 1, 2, 3}


def test_without_freedom_an_emoji_sits_still_in_the_middle(tiny: EmojiScenes) -> None:
    square = torch.zeros(20, dtype=torch.int64)
    white = torch.full_like(square, list(BACKGROUNDS).index("white"))
    still = tiny.captioned(square, white, seed=0, freedom=0.0).images.float()
    grey = (still - 128).abs().amax(1) < 20  # (20, size, size)
    assert (grey == grey[0]).all()
    rows, columns = grey[0].nonzero().float().mean(0).tolist()
    assert rows == columns == (tiny.size - 1) / 2
    free = tiny.captioned(square, white, seed=0).images.float()
    assert not (((free - 128).abs().amax(1) < 20) == grey[0]).all()
