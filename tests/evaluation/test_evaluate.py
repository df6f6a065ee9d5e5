"""`dmd2 evaluate` and `dmd2 ref-stats`: what is sampled, what is reported, one clear line for what does not fit."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import dmd2.evaluation.evaluate
from dmd2.cli import app
from dmd2.diffusion.noise import seeded_noise
from dmd2.diffusion.sampling import Churn, sample_heun, teacher_sigmas
from dmd2.evaluation.evaluate import CLASSIFIER, Place, Settings, collect, evaluate, reference_statistics
from dmd2.evaluation.frechet import frechet_distance, moments
from dmd2.evaluation.metrics import Inception, SmallFeatures, prdc, resized
from dmd2.evaluation.samples import DataSet, Samples, open_images
from dmd2.inference.engine import Engine
from dmd2.models.edm.folder import load_edm, save_edm
from dmd2.models.edm.network import ClassCondition, EdmConfig, EdmNetwork, RgbCodec
from dmd2.runtime.errors import UserError
from dmd2.runtime.files import sha256_file
from tests.evaluation.test_metrics import samples as some_images
from tests.evaluation.test_metrics import stand_in

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def edm_folder(folder: Path, classes: int = 10, sigmas: tuple[float, ...] = (), resolution: int = 32) -> Path:
    torch.manual_seed(1)
    network = EdmNetwork(
        EdmConfig(
            architecture="ddpmpp",
            resolution=resolution,
            classes=classes,
            model_channels=8,
            channel_mult=(1,),
            blocks=1,
            attention=(),
            sigmas=sigmas,
        )
    )
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save_edm(folder, network, name="tiny", licence="none", recipe={})
    return folder


def zipped(path: Path, images: Tensor, labels: list[int] | None = None) -> Path:
    """A data set as EDM's."""
    names = [f"00000/img{i:08d}.png" for i in range(len(images))]
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in zip(names, images, strict=True):
            data = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, "PNG")
            archive.writestr(name, data.getvalue())
        listed = None if labels is None else [list(pair) for pair in zip(names, labels, strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": listed}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student, a teacher without classes, and images."""
    folder = tmp_path_factory.mktemp("evaluate")
    edm_folder(folder / "teacher")
    edm_folder(folder / "student", sigmas=(80.0,))
    edm_folder(folder / "classless", classes=0)
    zipped(folder / "ref.zip", some_images(40, 32), [i % 10 for i in range(40)])
    zipped(folder / "unlabelled.zip", some_images(12, 32, seed=1))
    return folder


def small(folder: Path, name: str, *metrics: str, **changes: Any) -> Settings:
    reference = folder / "ref.zip" if set(metrics) & {"fid", "kid", "prdc"} else None
    settings = Settings(folder / name, metrics, reference, 20, "small", steps=None, batch=8, device="cpu")
    return replace(settings, **changes)


def scores(settings: Settings) -> dict[str, float]:
    result = evaluate(settings)
    assert result is not None
    found: dict[str, float] = result["scores"]
    return found


# What is sampled


def test_a_teacher_is_sampled_by_heun_with_its_seeds_and_classes(folder: Path) -> None:
    samples = Samples(folder / "teacher", 25, "3", 7, CPU)
    assert samples.labels == [i % 10 for i in range(25)] and samples.metadata["seeds"] == [7, 31]
    denoiser = load_edm(folder / "teacher", CPU)
    rows = [13, 2]
    cond = ClassCondition.of(torch.tensor([3, 2]), 10)
    sigmas = teacher_sigmas(denoiser, 3)
    start = 80 * seeded_noise([7 + 13, 7 + 2], (3, 32, 32))
    with torch.inference_mode():
        expected = RgbCodec().decode(sample_heun(lambda x, s: denoiser(x, s, cond), start, sigmas))
        assert torch.equal(samples.generate(rows), expected)
    alone = samples.generate([2])  # kernels for another batch size round in another way
    assert (alone.int() - expected[1:].int()).abs().max() <= 2
    assert samples.metadata["sampler"] == "heun" and samples.metadata["sigmas"] == sigmas
    assert len(Samples(folder / "teacher", 1, None, 0, CPU).sigmas) == 18


def test_a_teacher_may_be_sampled_with_churn(folder: Path) -> None:
    plain = Samples(folder / "teacher", 4, "3", 7, CPU)
    samples = Samples(folder / "teacher", 4, "3", 7, CPU, churn=Churn(2.0, 0.05, 50.0, 1.003))
    assert samples.metadata["churn"] == {"amount": 2.0, "lowest": 0.05, "highest": 50.0, "noise": 1.003}
    rows = [0, 1]
    assert not torch.equal(samples.generate(rows), plain.generate(rows)) and torch.equal(
        samples.generate(rows), samples.generate(rows)
    )
    none = Samples(folder / "teacher", 4, "3", 7, CPU, churn=Churn(0.0))
    assert (none.generate(rows).int() - plain.generate(rows).int()).abs().max() <= 2
    with pytest.raises(UserError, match="churn: only of a teacher's sampler"):
        Samples(folder / "student", 4, None, 7, CPU, churn=Churn(2.0))


def test_a_student_is_sampled_in_one_step_from_sigma_80(folder: Path) -> None:
    samples = Samples(folder / "student", 12, None, 5, CPU)
    denoiser = load_edm(folder / "student", CPU)
    noise = seeded_noise([5 + 11], (3, 32, 32))
    with torch.inference_mode():
        x0 = denoiser(80 * noise, torch.tensor([80.0]), ClassCondition.of(torch.tensor([1]), 10))
    assert torch.equal(samples.generate([11]), RgbCodec().decode(x0))
    assert torch.equal(
        samples.generate([11]), Engine(folder / "student", CPU, torch.float32).generate(["1"], [16], "1")
    )
    assert samples.metadata["sampler"] == "few-step" and samples.metadata["sigmas"] == [80.0]
    with pytest.raises(UserError, match="steps 4: these weights have 1"):
        Samples(folder / "student", 12, "4", 5, CPU)
    with pytest.raises(UserError, match="steps many: expected 2 to 10000"):
        Samples(folder / "teacher", 12, "many", 5, CPU)
    assert Samples(folder / "classless", 3, "2", 0, CPU).generate([0, 1]).shape == (2, 3, 32, 32)


def test_text_is_drawn_prompt_by_prompt(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\n\n  an owl \n")
    found = open_images(weights, 3, tmp_path / "prompts.txt", "1", 4, CPU)
    assert isinstance(found, Samples) and found.prompts == ["a red apple", "an owl", "a red apple"]
    expected = Engine(weights, CPU).generate(["an owl", "a red apple"], [5, 6], "1")
    assert torch.equal(found.generate([1, 2]), expected)
    assert open_images(weights, None, tmp_path / "prompts.txt", "1", 4, CPU).n == 2  # as many as there are prompts
    assert found.metadata["weights_sha256"] == sha256_file(
        weights / "unet_1step" / "diffusion_pytorch_model.safetensors"
    )


def test_a_data_set_is_what_is_in_it(folder: Path, tmp_path: Path) -> None:
    data = DataSet(folder / "ref.zip", 30)
    assert data.n == 30 and data.labels == [i % 10 for i in range(30)]
    assert torch.equal(data.generate([4, 0]), some_images(40, 32)[[4, 0]])
    with zipfile.ZipFile(folder / "ref.zip") as archive:
        archive.extractall(tmp_path)
    unpacked = DataSet(tmp_path)
    assert (
        torch.equal(unpacked.generate([39]), data.generate([39]))
        and unpacked.labels == DataSet(folder / "ref.zip").labels
    )
    before = unpacked.metadata["sha256"]
    (tmp_path / "00000" / "img00000000.png").unlink()
    assert DataSet(tmp_path).metadata["sha256"] != before

    Image.fromarray(np.full((40, 60, 3), 9, np.uint8)).save(tmp_path / "00000" / "wide.png")
    (tmp_path / "dataset.json").unlink()
    fitted = DataSet(tmp_path, side=20)
    assert fitted.generate([0, fitted.n - 1]).shape == (2, 3, 20, 20) and (fitted.generate([fitted.n - 1]) == 9).all()
    with pytest.raises(UserError, match=r"wide\.png is 60x40 pixels"):
        plain = DataSet(tmp_path)
        plain.generate([plain.n - 1])


# What comes out


def test_scores_are_those_of_the_samples(folder: Path) -> None:
    found = scores(small(folder, "student", "fid", "prdc", "accuracy"))
    unused = folder / "ref.zip"  # no metric here compares
    assert scores(small(folder, "student", "accuracy", reference=unused)) == {"accuracy": found["accuracy"]}
    classifier = SmallFeatures(CLASSIFIER)
    drawn = Samples(folder / "student", 20, None, 0, CPU).generate(list(range(20)))
    fake, answers = classifier(drawn, answers=True)
    real, _ = classifier(some_images(40, 32))
    assert answers is not None
    assert found.pop("fd_small") == pytest.approx(frechet_distance(*moments(fake), *moments(real)), rel=1e-3)
    assert found.pop("accuracy") == float((answers.argmax(1) == torch.arange(20) % 10).double().mean())
    assert found == {f"{name}_small": value for name, value in prdc(real, fake).items()}


def test_the_reference_scores_best_against_itself(folder: Path) -> None:
    found = scores(small(folder, "ref.zip", "fid", "kid", "is", "prdc", "accuracy", n=None))
    assert found["fd_small"] == pytest.approx(0, abs=1e-8) and found["precision_small"] == 1
    assert found["kid_small"] <= 0 and found["is_small"] >= 1
    worse = scores(small(folder, "student", "fid", "kid"))
    assert worse["fd_small"] > found["fd_small"] and worse["kid_small"] > found["kid_small"]


def test_inception_s_figures_have_the_names_that_everyone_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Inception, "width", 48)  # roots of 2048×2048 matrices take seconds
    inception = stand_in(tmp_path / "inception.pt", width=48)
    zipped(tmp_path / "large.zip", some_images(12, 300))
    settings = Settings(
        tmp_path / "large.zip",
        ("fid", "kid", "is", "prdc", "patch-fid"),
        tmp_path / "large.zip",
        inception=inception,
        resize=16,
        device="cpu",
    )
    result = evaluate(settings)
    assert result is not None
    found = result["scores"]
    known = {"fid", "kid", "kid_std", "is", "is_std", "precision", "recall", "density", "coverage", "patch_fid"}
    assert found.keys() == known
    assert found["fid"] == pytest.approx(0, abs=1e-6) and found["patch_fid"] == pytest.approx(0, abs=1e-6)
    assert result["features"] == {"path": str(inception), "sha256": sha256_file(inception), "name": "inception"}
    assert result["resize"] == {"side": 16, "filter": "lanczos"}


def test_the_result_holds_all_that_it_takes_to_repeat_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "result.json"
    arguments = ["evaluate", str(folder / "student"), "--metric", "fid,accuracy", "--features", "small", "-n", "20"]
    arguments += [
        "--ref",
        str(folder / "ref.zip"),
        "--seed",
        "3",
        "--batch",
        "8",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/dmd2", *arguments])
    app(arguments, standalone_mode=False)
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    network = {"path": str(CLASSIFIER), "sha256": sha256_file(CLASSIFIER)}
    expected = {
        "n": 20,
        "batch": 8,
        "resize": None,
        "images": {
            "path": str(folder / "student"),
            "family": "edm",
            "sampler": "few-step",
            "sigmas": [80.0],
            "classes": 10,
            "dtype": "float32",
            "seeds": [3, 22],
            "weights_sha256": sha256_file(folder / "student" / "model.safetensors"),
        },
        "prompts": None,
        "reference": {"path": str(folder / "ref.zip"), "n": 40, "sha256": sha256_file(folder / "ref.zip")},
        "features": {**network, "name": "small"},
        "classifier": network,
        "clip": None,
        "processes": 1,
        "torch": torch.__version__,
        "command": "dmd2 " + " ".join(arguments),
    }
    assert {key: result[key] for key in expected} == expected
    assert result.keys() == {*expected, "scores", "device", "dmd2", "date", "seconds"}
    assert scores(small(folder, "student", "fid", "accuracy", seed=3)) == result["scores"]


def test_reference_statistics_are_edm_s_and_do_as_well_as_the_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "small.npz"
    assert reference_statistics(folder / "ref.zip", out, "small", batch=8, device="cpu") == 40
    with np.load(out) as file:
        assert file["mu"].shape == (128,) and file["sigma"].shape == (128, 128) and file["mu"].dtype == np.float64
        features, _ = SmallFeatures(CLASSIFIER)(some_images(40, 32))
        np.testing.assert_allclose(file["mu"], features.double().numpy().mean(0), rtol=1e-4)
        np.testing.assert_allclose(file["sigma"], np.cov(features.double().numpy().T), rtol=1e-2, atol=1e-6)
    by_images = scores(small(folder, "student", "fid"))["fd_small"]
    assert scores(small(folder, "student", "fid", reference=out))["fd_small"] == pytest.approx(by_images, rel=1e-9)

    np.savez(tmp_path / "edm.npz", mu=np.zeros(48), sigma=np.eye(48))  # as EDM's: nothing but these two
    monkeypatch.setattr(Inception, "width", 48)
    inception = stand_in(tmp_path / "inception.pt", width=48)
    settings = small(folder, "student", "fid", features="inception", inception=inception)
    assert scores(replace(settings, reference=tmp_path / "edm.npz"))["fid"] > 0


def test_patches_are_compared_at_one_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference images of another size and shape are brought to that of the evaluated ones; the FID's to --resize."""
    monkeypatch.setattr(Inception, "width", 48)
    inception = stand_in(tmp_path / "inception.pt", width=48)
    smooth = resized(some_images(8, 5), 320)
    zipped(tmp_path / "square.zip", smooth)
    (tmp_path / "wide").mkdir()
    for i, image in enumerate(smooth):  # the same images at half size, with margins
        half = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((160, 160), Image.Resampling.BOX)
        wide = Image.new("RGB", (200, 160))
        wide.paste(half, (20, 0))
        wide.save(tmp_path / "wide" / f"{i}.png")
    settings = Settings(tmp_path / "square.zip", ("fid", "patch-fid"), tmp_path / "wide", inception=inception)
    near = scores(replace(settings, resize=8, device="cpu"))
    zipped(tmp_path / "other.zip", 255 - smooth // 2)
    far = scores(replace(settings, resize=8, device="cpu", reference=tmp_path / "other.zip"))
    assert near["fid"] < far["fid"] / 10 and near["patch_fid"] < far["patch_fid"] / 10


# Several processes


def test_two_processes_find_what_one_does(folder: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", str(folder / "student"), "--metric", "fid,kid,is,prdc,accuracy", "--features", "small"]
    arguments += ["--ref", str(folder / "ref.zip"), "-n", "21", "--batch", "8", "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dmd2.cli"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    together = json.loads(run.stdout)  # one result, from one of them
    alone = evaluate(small(folder, "student", "fid", "kid", "is", "prdc", "accuracy", n=21))
    assert alone is not None and alone["processes"] == 1 and together["processes"] == 2
    assert together["scores"] == alone["scores"]
    assert together["images"] == alone["images"]


def test_each_process_needs_an_image(folder: Path) -> None:
    samples = Samples(folder / "student", 21, None, 0, CPU)
    with pytest.raises(UserError, match="n 21: fewer images than processes"):
        collect(samples, lambda images, rows: {}, 8, Place(0, 22, CPU), "test")


# What does not fit


def refused(settings: Settings, *words: str) -> None:
    with pytest.raises(UserError) as error:
        evaluate(settings)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_options_that_do_not_fit_are_one_line(folder: Path) -> None:
    refused(small(folder, "student", "fid", "fvd"), "metric fvd", "patch-fid")
    refused(small(folder, "student"), "metric: empty")
    refused(small(folder, "student", "prdc", n=5), "n 5", "prdc", "at least 6")
    refused(small(folder, "student", "fid", reference=None), "ref: missing", "fid")
    refused(small(folder, "student", "fid", features="large"), "features large", "inception or small")
    refused(small(folder, "student", "patch-fid", reference=folder / "ref.zip"), "patch-fid", "features of inception")
    refused(small(folder, "student", "clip"), "clip: missing")
    refused(small(folder, "student", "fid", batch=0), "batch 0")
    refused(small(folder, "student", "fid", seed=-1), "seed -1")
    refused(small(folder, "student", "fid", resize=0), "resize 0")
    refused(small(folder, "student", "fid", prompts=folder / "x"), "prompts", "classes, not prompts")
    refused(small(folder, "ref.zip", "fid", steps="1"), "steps", "has no dmd2.json")
    refused(small(folder, "unlabelled.zip", "fid"), "n 20", "12 images")


def test_weights_that_do_not_fit_are_one_line(folder: Path, weights: Path, tmp_path: Path) -> None:
    refused(small(folder, "nothing", "fid"), "nothing: no such file or folder")
    refused(small(folder, "classless", "accuracy"), "classless has no labels")
    refused(small(folder, "unlabelled.zip", "accuracy", n=None), "unlabelled.zip has no labels")
    refused(small(folder, ".", "fid", weights=weights), "prompts: missing")
    (tmp_path / "empty.txt").write_text("\n \n")
    refused(small(folder, ".", "fid", weights=weights, prompts=tmp_path / "empty.txt"), "empty.txt: is empty")
    edm_folder(tmp_path / "many", classes=20)
    refused(small(folder, ".", "accuracy", weights=tmp_path / "many", steps="2"), "10 classes, not class 19")
    edm_folder(tmp_path / "tiny", resolution=8)
    refused(small(folder, ".", "fid", weights=tmp_path / "tiny", steps="2"), "32x32 pixels, not 8x8")
    manifest = json.loads((folder / "student" / "dmd2.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "dmd2.json").write_text(json.dumps(manifest | {"family": "stylegan", "files": {}}))
    refused(small(folder, ".", "fid", weights=other), "stylegan")


def test_references_that_do_not_fit_are_one_line(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "ref.npz"

    def written(**arrays: Any) -> Settings:
        np.savez(path, **arrays)
        return small(folder, "student", "fid", reference=path)

    refused(written(mu=np.zeros(64), sigma=np.eye(64)), "(64,)", "(128,) and (128, 128)")
    refused(written(mu=np.zeros(128), sigma=np.zeros((128, 64))), "(128, 64)")
    refused(written(mean=np.zeros(128)), "holds mean", "mu and sigma")
    refused(written(mu=np.zeros(128), sigma=np.eye(128), features_sha256="ab" * 32), "another network", "ab" * 32)
    refused(written(mu=np.full(128, np.nan), sigma=np.eye(128)), "not finite")
    refused(written(mu=np.array([{}]), sigma=np.eye(128)), "not a readable .npz")
    path.write_bytes(b"PK\x03\x04 cut")
    refused(small(folder, "student", "fid", reference=path), "not a readable .npz")
    refused(small(folder, "student", "fid", "prdc", "kid", reference=path), "prdc, kid", "need images")
    refused(small(folder, "student", "fid", reference=tmp_path / "none.npz"), "none.npz", "No such file")
    refused(
        small(folder, "student", "fid", reference=tmp_path / "none.zip"), "ref", "none.zip: no such file or folder"
    )
    zipped(tmp_path / "few.zip", some_images(5, 32))
    refused(small(folder, "student", "prdc", reference=tmp_path / "few.zip"), "5 images are too few for prdc")
    with pytest.raises(UserError, match=r"stats\.json: expected a name that ends in \.npz"):
        reference_statistics(folder / "ref.zip", tmp_path / "stats.json", "small")


def test_files_that_do_not_fit_are_one_line(folder: Path, tmp_path: Path) -> None:
    refused(small(folder, "student", "fid", features="inception", inception=tmp_path / "no.pt"), "no.pt", "small")
    refused(small(folder, "student", "accuracy", classifier=tmp_path / "no.safetensors"), "no.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(CLASSIFIER.read_bytes()[:1000])
    refused(small(folder, "student", "accuracy", classifier=broken), "broken.safetensors", "not a readable")
    refused(small(folder, "student", "accuracy", classifier=folder / "student" / "model.safetensors"), "not an image")


@pytest.mark.parametrize("verb", ["evaluate", "ref-stats"])
@pytest.mark.parametrize(
    ("where", "says"),
    [("taken.npz", "is a folder; expected the name of a file"), ("file/below.npz", "cannot be written (")],
)
def test_where_the_result_cannot_be_written_is_known_before_anything_is_computed(
    verb: str, where: str, says: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken.npz").mkdir()
    (tmp_path / "file").write_text("")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(dmd2.evaluation.evaluate, "collect", never)
    small = ["--features", "small"]
    reference = str(folder / "ref.zip")
    options = ["--ref", reference, "--out", str(tmp_path / where)] if verb == "evaluate" else [str(tmp_path / where)]
    with pytest.raises(UserError, match=re.escape(says)):
        app([verb, reference, *options, *small], standalone_mode=False)


def test_more_images_than_fit_anywhere_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="n 10000001: expected at most 10000000"):
        evaluate(small(folder, "student", "accuracy", n=10_000_001))
