"""Embeddings and latents made once: what is in them, in parts, from every kind of archive; and a training on them."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import dmd2.training.preview
from dmd2.cli import main
from dmd2.data.captioned import CaptionedImages
from dmd2.data.embeddings import make_latents, make_prompts
from dmd2.data.shards import INDEX, Part, Shards
from dmd2.models.family import open_family
from dmd2.models.stable_diffusion.folder import load_text_to_image
from dmd2.runtime.errors import UserError
from dmd2.training.distil import distil
from dmd2.training.loop import LoopSettings, train
from dmd2.training.methods.dmd2 import Dmd2Recipe
from dmd2.training.sources import Inputs, LatentSource
from tests.tiny_sdxl import photograph

CPU = torch.device("cpu")
PROMPTS = ["a red apple", "an owl", "a green heart on a blue background", "an owl " * 60, "a blue book"]
CAPTIONS = {"b.png": "an owl", "a/c.jpg": "a red apple", "a.b/d.webp": "a green heart"}


def png(seed: int, size: tuple[int, int] = (64, 64), kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    photograph(seed, size).save(data, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return data.getvalue()


def files() -> dict[str, bytes]:
    """Three images; captions as text, as JSON, and in a list."""
    return {
        "b.png": png(1),
        "b.txt": b"an owl\n",
        "a/c.jpg": png(2, (96, 64), "JPEG"),
        "a/c.json": json.dumps({"caption": "a red apple"}).encode(),
        "a.b/d.webp": png(3, kind="WEBP"),
        "a.b/metadata.jsonl": json.dumps({"file_name": "d.webp", "text": "a green heart"}).encode() + b"\n",
        "__MACOSX/._b.png": b"junk",
        ".DS_Store": b"junk",
    }


def write_folder(path: Path, entries: dict[str, bytes]) -> Path:
    for name, data in entries.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, entries: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in entries.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zip(tmp_path_factory.mktemp("images") / "images.zip", files())


@pytest.fixture(scope="module")
def latents(weights: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: copy it."""
    out = tmp_path_factory.mktemp("latents") / "set"
    assert make_latents(weights, images, out, batch=2, shard=2)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_every_kind_of_archive_gives_the_same_images_and_captions(tmp_path: Path, images: Path) -> None:
    sets = [
        CaptionedImages(images),
        CaptionedImages(write_folder(tmp_path / "folder", files())),
        CaptionedImages(write_tar(tmp_path / "set.tar", files())),
    ]
    for found in sets:
        assert found.captions(range(3)) == [CAPTIONS[name] for name in sorted(CAPTIONS)]
        assert found.sha256 == sets[0].sha256
        assert torch.equal(found.images(range(3), (64, 64)), sets[0].images(range(3), (64, 64)))
    assert sets[0].images(range(3), (64, 64)).shape == (3, 3, 64, 64)


def test_a_web_data_set_of_many_tars_is_one_set(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for k in range(2):
        write_tar(tmp_path / "tars" / f"{k}.tar", {"x.png": png(k), "x.txt": f"an owl {k}".encode()})
    assert CaptionedImages(tmp_path / "tars").captions(range(2)) == ["an owl 0", "an owl 1"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "holds no images"),
        ({"a.png": b"x"}, r"a\.png has no caption; expected a\.txt, \.json or metadata\.jsonl"),
        ({"a.png": b"x", "a.txt": b"x" * 50_000}, "larger than 40 kB"),
        ({"a.png": b"x", "a.txt": b"x" * 10_001}, "a caption of 10001 characters"),
        ({"a.png": b"x", "a.json": b'{"url": "x"}'}, "no caption; expected a text as prompt, caption, text"),
        ({"a.png": b"x", "a.json": b'{"text": 3}'}, "no caption"),
        ({"a.png": b"x", "metadata.jsonl": b"["}, "metadata.jsonl: line 1: no JSON"),
        ({"a.png": b"x", "metadata.jsonl": b"[]"}, "line 1: of type list; expected an object"),
        ({"a.png": b"x", "a.txt": b"\xff\xff"}, "cannot be read as text in UTF-8"),
        ({"a.png": b"x", "a.txt": b"an owl"}, r"a\.png: no image; expected PNG"),
    ],
)
def test_what_is_wrong_with_images_is_one_line(tmp_path: Path, entries: dict[str, bytes], message: str) -> None:
    for path in (write_zip(tmp_path / "x.zip", entries), write_tar(tmp_path / "x.tar", entries)):
        with pytest.raises(UserError, match=message):
            found = CaptionedImages(path)
            found.captions(range(1))
            found.images(range(1), (64, 64))


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "nowhere"])
def test_what_is_no_archive_is_one_line(tmp_path: Path, name: str) -> None:
    if name != "nowhere":
        (tmp_path / name).write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match=f"{name}: (cannot be read|no such file)"):
        CaptionedImages(tmp_path / name)


def test_embeddings_are_the_text_encoders_of_the_first_window(weights: Path, tmp_path: Path) -> None:
    assert make_prompts(weights, PROMPTS, tmp_path / "set", batch=2, shard=3)
    model = load_text_to_image(weights, [], CPU, torch.float32)
    window = model.encode_text.tokenizers[0].model_max_length
    rows = Shards(tmp_path / "set", "prompts").rows(torch.arange(len(PROMPTS)))
    for i, prompt in enumerate(PROMPTS):
        cond = model.encode_text([prompt], (64, 64))
        assert cond.pooled is not None
        torch.testing.assert_close(rows["context"][i].float(), cond.context[0, :window], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(rows["pooled"][i].float(), cond.pooled[0], atol=2e-3, rtol=2e-3)


def test_latents_are_the_vae_s(weights: Path, images: Path, latents: Path) -> None:
    model = load_text_to_image(weights, [], CPU, torch.float32)
    rows = Shards(latents, "latents").rows(torch.arange(3))
    expected = model.codec.encode(CaptionedImages(images).images(range(3), (64, 64)))
    torch.testing.assert_close(rows["latents"].float(), expected, atol=2e-3, rtol=2e-3)


def test_parts_make_what_one_process_makes(weights: Path, images: Path, latents: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert not make_latents(weights, images, out, batch=2, shard=2, part=Part(2, 2))
    assert make_latents(weights, images, out, batch=2, shard=2, part=Part(1, 2))
    assert content(out) == content(latents)


def inputs(weights: Path, data: Path) -> Inputs:
    return Inputs({"init": weights, "data": data}, CPU)


def test_a_student_is_trained_on_latents_as_on_images(weights: Path, latents: Path, tmp_path: Path) -> None:
    """A GAN and all: neither text encoders nor VAE are asked for anything while it learns."""
    loop = LoopSettings(iterations=2, batch_size=2, sample_every=100, log_every=1)
    recipe = Dmd2Recipe(
        loop,
        lr=1e-4,
        lr_critic=1e-4,
        generator_every=1,
        gan_generator=0.1,
        gan_critic=0.1,
        sigmas=(),
        timesteps=(399,),
        data="latents",
        precision="fp32",
    )
    method = distil(recipe, inputs(weights, latents))
    family = open_family(weights, CPU, "fp32")
    samples = method.data(0)
    assert samples.real is not None and samples.real.shape == (2, *family.shape)
    assert samples.cond.context.shape[0] == 2 and samples.cond.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    assert train(method, loop, tmp_path / "run")
    assert (tmp_path / "run" / "model" / "dmd2.json").is_file() and list((tmp_path / "run" / "samples").iterdir())


def test_batches_are_the_rows_of_every_epoch(weights: Path, latents: Path) -> None:
    family = open_family(weights, CPU, "fp32")
    source = LatentSource(inputs(weights, latents), family, True)
    rows = Shards(latents, "latents").rows(torch.arange(3))["latents"].float()
    lessons = [source.lesson(1, seed=3, step=step, freedom=1).latents for step in range(3)]
    found = [
        next(i for i in range(3) if lesson is not None and torch.equal(lesson[0], rows[i])) for lesson in lessons
    ]
    assert sorted(found) == [0, 1, 2]
    paired = source.batch(2, seed=0, step=0, images=True, paired=True)
    assert paired.labels is paired.image_labels


def test_prompts_of_their_own_are_what_is_generated(weights: Path, latents: Path, tmp_path: Path) -> None:
    """Beside images with captions, from which only the real ones of the GAN come then."""
    assert make_prompts(weights, ["a green heart"], tmp_path / "prompts")
    family = open_family(weights, CPU, "fp32")
    given = Inputs({"init": weights, "data": latents, "prompts": tmp_path / "prompts"}, CPU)
    source = LatentSource(given, family, True)
    batch = source.batch(2, seed=0, step=0, images=True, paired=False)
    expected = family.condition(["a green heart"] * 2)
    torch.testing.assert_close(batch.labels.context, expected.context, atol=2e-3, rtol=2e-3)
    assert batch.latents is not None and len(batch.latents) == 2
    assert not torch.equal(batch.image_labels.context, batch.labels.context)


def changed(folder: Path, out: Path, **change: Any) -> Path:
    shutil.copytree(folder, out)
    about = json.loads((out / INDEX).read_text())
    (out / INDEX).write_text(json.dumps(about | change))
    return out


def test_what_does_not_fit_the_teacher_is_one_line(weights: Path, latents: Path, tmp_path: Path) -> None:
    family = open_family(weights, CPU, "fp32")
    made = json.loads((latents / INDEX).read_text())["made"]
    other = changed(latents, tmp_path / "other", made=made | {"vae": "0" * 64})
    with pytest.raises(UserError, match=r"other: made with other networks \(vae\)"):
        LatentSource(inputs(weights, other), family, True)
    assert make_prompts(weights, PROMPTS[:1], tmp_path / "prompts")
    LatentSource(inputs(weights, tmp_path / "prompts"), family, False)
    with pytest.raises(UserError, match="holds prompts; expected latents"):
        LatentSource(inputs(weights, tmp_path / "prompts"), family, True)
    with pytest.raises(UserError, match="data: missing; a folder that `dmd2 data prompts`"):
        LatentSource(Inputs({"init": weights}, CPU), family, False)


def test_the_command_line(
    weights: Path, images: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("an owl\n")

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["dmd2", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert run("data", "prompts", weights, tmp_path / "p.txt", tmp_path / "p", "--device", "cpu") == 0
    assert len(Shards(tmp_path / "p", "prompts")) == 1
    arguments = (weights, images, tmp_path / "l", "--batch", 2, "--shard", 2, "--device", "cpu")
    assert run("data", "latents", *arguments, "--part", "1/2") == 0
    assert run("data", "latents", *arguments, "--part", "2/2") == 0
    assert content(tmp_path / "l") == content(latents)
    assert run("data", "latents", *arguments, "--part", "3/2") == 2


@pytest.mark.parametrize("own", [False, True])
def test_a_run_on_what_was_encoded_is_scored_by_texts_and_decoded_latents(
    own: bool, weights: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks that judge are in the tests' hands; images and texts come to them as they should."""
    judged: list[tuple[torch.Tensor, list[str]]] = []
    seen: list[torch.Tensor] = []

    class Clip:
        def __init__(self, *_: object) -> None: ...

        def __call__(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
            judged.append((images, texts))
            return torch.ones(len(images))

    class Features:
        def __init__(self, *_: object) -> None: ...

        def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
            seen.append(images)
            return images.float().mean((2, 3)), None

    monkeypatch.setattr(dmd2.training.preview, "ClipScore", Clip)
    monkeypatch.setattr(dmd2.training.preview, "Inception", Features)
    monkeypatch.setattr(dmd2.training.preview, "centre_crop", lambda images: images)
    paths = {"init": weights, "data": latents, "clip": tmp_path, "inception": tmp_path}
    if own:
        make_prompts(weights, PROMPTS, tmp_path / "prompts")
        paths |= {"prompts": tmp_path / "prompts"}
    family = open_family(weights, CPU, "fp32", CPU)
    preview = LatentSource(Inputs(paths, CPU), family, True).preview()
    assert preview.scores
    asked: list[Any] = []

    def generate(cond: Any, seeds: list[int]) -> torch.Tensor:
        asked.append(cond)
        return torch.full((len(cond), 3, 64, 64), 100, dtype=torch.uint8)

    for _ in range(2):
        scores = preview.score(generate)
        assert scores["clip_score"] == 1 and scores["patch_fid"] > 0
    texts = PROMPTS if own else list(CAPTIONS.values())
    assert sorted(judged[0][1]) == sorted(texts)
    torch.testing.assert_close(asked[0].context, family.condition(judged[0][1]).context, rtol=2e-3, atol=2e-3)
    assert len(seen) == 3  # the real ones once
    real = Shards(latents, "latents").rows(torch.arange(3))["latents"].float()
    expected = family.codec.decode(real)
    pixels = {image.numpy().tobytes() for image in expected}
    assert {image.numpy().tobytes() for image in seen[1]} == pixels


def test_a_score_that_cannot_be_on_what_was_encoded_is_refused(weights: Path, latents: Path, tmp_path: Path) -> None:
    family = open_family(weights, CPU, "fp32")
    make_prompts(weights, PROMPTS, tmp_path / "prompts")
    paths: dict[str, Path | None] = {"init": weights, "data": tmp_path / "prompts", "inception": tmp_path}
    with pytest.raises(UserError, match=r"inception .*: patch-FID compares with real images; expected `data` of"):
        LatentSource(Inputs(paths, CPU), family, False).preview()
    about = json.loads((latents / INDEX).read_text())["made"]
    del about["texts"]
    old = changed(latents, tmp_path / "old", made=about)
    with pytest.raises(UserError, match=r"clip .*: scores by texts, which .*old lacks; make it anew"):
        LatentSource(Inputs({"init": weights, "data": old, "clip": tmp_path}, CPU), family, True).preview()
    texts = Shards(tmp_path / "prompts", "prompts").index.made["texts"]
    assert texts == PROMPTS
    make_prompts(weights, ["a" * 2000] * 200, tmp_path / "many", shard=200, batch=50)
    texts = Shards(tmp_path / "many", "prompts").index.made["texts"]
    assert isinstance(texts, list) and len(texts) == 128 and set(map(len, map(str, texts))) == {1000}
