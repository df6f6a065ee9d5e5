"""The real Cog server as its clients see it: all ways to ask, all ways to go wrong, never another's image."""

from __future__ import annotations

import base64
import io
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import httpx
import numpy
import psutil
import pytest
from PIL import Image

from dmd2.inference.conditioning import ImageConditioning
from dmd2.inference.engine import Engine
from dmd2.inference.inputs import fitted
from dmd2.models.stable_diffusion.codec import vae_factor
from dmd2.models.stable_diffusion.configs import read_vae_config
from dmd2.weights.manifest import DEFAULT, read_manifest
from tests.service.cog.cog_server import (
    START,
    Answer,
    CogServer,
    Receiver,
    children,
    difference,
    events,
    pixels,
    unpacked,
    wait_for,
)
from tests.tiny_sdxl import photograph

pytestmark = pytest.mark.slow

SIDE = read_manifest(DEFAULT).native_size[0]
UNIT = vae_factor(read_vae_config(DEFAULT / "vae"))
"""pixels along a latent's side; images have at least four latents along a side"""

OWL: dict[str, Any] = {"prompt": "an owl", "seed": 5, "num_inference_steps": 1, "output_format": "png"}
LONG: dict[str, Any] = OWL | {"width": 6 * SIDE, "height": 6 * SIDE, "num_inference_steps": 4}
"""about a second on a CPU"""
HUGE: dict[str, Any] = LONG | {"width": 8 * SIDE, "height": 8 * SIDE, "num_outputs": 4}
"""ten times as long: only to be cancelled"""


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


PHOTOGRAPH = data_url(photograph())
ASYNC = {"Prefer": "respond-async"}
SLOTS = 32
STAGES = {"queue", "text", "denoise", "decode", "safety", "encode"}

Start = Callable[..., CogServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers of a test's own."""
    servers: list[CogServer] = []

    def start(*options: str, **variables: str) -> CogServer:
        folder = tmp_path / f"server-{len(servers)}"
        folder.mkdir()
        servers.append(CogServer(folder, options, **variables))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class Shared(CogServer):
    """The server of most tests. Its first requests are made at once: what they leave behind is looked at later."""

    def __init__(self, folder: Path) -> None:
        began = time.monotonic()
        super().__init__(folder)
        try:
            self.wait_until_ready()
            self.seconds_to_ready = time.monotonic() - began
            kinds = [OWL, OWL | {"num_inference_steps": 4}, OWL | {"num_outputs": 3}]
            kinds += [OWL | {"width": 80, "height": 48}, OWL | {"prompt": "an owl " * 60}]
            self.first = [(kind, self.generate(**kind)) for kind in kinds]
            self.first_files = self.outbox()
        except BaseException:
            self.close()
            raise


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    shared = Shared(tmp_path_factory.mktemp("server"))
    yield shared
    shared.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(DEFAULT, "cpu", modes=("1", "4"))


def drawn(engine: Engine, **inputs: Any) -> numpy.ndarray:
    """The reference: what the engine itself draws alone, int16 (H, W, 3)."""
    size = inputs.get("width", SIDE), inputs.get("height", SIDE)
    image = engine.generate([inputs["prompt"]], [inputs["seed"]], str(inputs["num_inference_steps"]), size)[0]
    return image.permute(1, 2, 0).numpy().astype(numpy.int16)


def begun(server: CogServer, name: str) -> int:
    """How often a prediction of this name has begun."""
    return server.log.count(f'"message":"Starting prediction","prediction_id":"{name}"')


def stopped_early(server: CogServer) -> int:
    """How many batches ended before their last step."""
    return server.log.count("nobody waits any more: stopped before the end of a batch")


def stops_a_batch(server: CogServer, leave: Callable[[int, float], None]) -> bool:
    """Whether `leave`, called with its number and seconds until it leaves, has a batch end before its last step.

    On a slow machine what is left too soon was still in the queue, and is dropped from there: hence some attempts.
    """
    before = stopped_early(server)
    for attempt, seconds in enumerate((1.0, 2.0, 4.0, 8.0)):
        leave(attempt, seconds)
        server.generate(**OWL)  # once the batch before it is gone
        until = time.monotonic() + 5  # the log may come a moment after the answer
        while time.monotonic() < until:
            if stopped_early(server) > before:
                return True
            time.sleep(0.05)
    return False


# Start


def test_first_requests_are_answered_like_later_ones(server: Shared) -> None:
    print(f"READY after {server.seconds_to_ready:.1f} s")
    for inputs, first in server.first:
        again = server.generate(**inputs)
        print(f"first {first.metrics['predict_time']:.3f} s, again {again.metrics['predict_time']:.3f} s")
        assert all(difference(a, b) <= 2 for a, b in zip(first.images, again.images, strict=True))


def test_a_tampered_weights_folder_ends_the_start_with_the_name_of_the_file(tmp_path: Path, start: Start) -> None:
    copy = Path(shutil.copytree(DEFAULT, tmp_path / "copy"))
    broken = copy / "unet_1step" / "diffusion_pytorch_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    server = start(DMD2_WEIGHTS=str(copy))
    assert server.process.wait(START) == 1
    assert "SETUP FAILED" in server.log
    assert "WeightsError" in server.log and f"{broken.relative_to(copy)}: sha256 is" in server.log


# Answers


def test_a_json_request_is_answered_with_its_images_and_metrics(server: CogServer, engine: Engine) -> None:
    inputs = OWL | {"num_inference_steps": 4, "num_outputs": 2, "width": 48, "height": 32}
    answer = server.generate(**inputs)
    assert answer.logs == "seed: 5\n"
    metrics = answer.metrics
    assert (metrics["seed"], metrics["image_count"]) == (5, 2)
    assert metrics["batch_size"] in (1, 2)  # 1 where the device was faster than the queue
    assert set(metrics["seconds"]) == STAGES
    assert 0 < sum(metrics["seconds"].values()) <= metrics["predict_time"] + 0.05
    for i, image in enumerate(answer.images):
        assert difference(pixels(image), drawn(engine, **inputs | {"seed": 5 + i})) <= 2


@pytest.mark.parametrize("steps", [1, 4])
def test_images_say_how_they_were_made(server: CogServer, steps: int) -> None:
    files = read_manifest(DEFAULT).files
    folder = "unet_1step" if steps == 1 else "unet"
    metadata = {
        "prompt": "eine Eule 🦉, très grande",
        "steps": str(steps),
        "weights_sha256": files[f"{folder}/diffusion_pytorch_model.safetensors"],
    }
    inputs = OWL | {"prompt": metadata["prompt"], "num_inference_steps": steps, "num_outputs": 2}
    for form, kind in (("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG")):
        for i, content in enumerate(server.generate(**inputs | {"output_format": form}).images):
            image = Image.open(io.BytesIO(content))
            assert (image.format, image.size) == (kind, (SIDE, SIDE))
            told = image.info if form == "png" else json.loads(image.getexif()[0x010E])
            assert {name: told[name] for name in [*metadata, "seed"]} == metadata | {"seed": str(5 + i)}


def test_output_quality_and_aspect_ratio_are_heeded(server: CogServer) -> None:
    sizes = [
        len(server.generate(**OWL | {"output_format": "jpg", "output_quality": q}).images[0]) for q in (1, 80, 100)
    ]
    assert sizes[0] < sizes[1] < sizes[2]
    assert pixels(server.generate(**OWL | {"aspect_ratio": "16:9"}).images[0]).shape == (
        SIDE * 3 // 4,
        SIDE * 5 // 4,
        3,
    )


def test_a_blank_seed_is_random_and_the_one_told_draws_the_same_again(server: CogServer) -> None:
    blank = {name: value for name, value in OWL.items() if name != "seed"}
    first, second = server.generate(**blank), server.generate(**blank)
    assert first.metrics["seed"] != second.metrics["seed"]
    assert first.logs == f"seed: {first.metrics['seed']}\n"
    assert difference(first.images[0], second.images[0]) > 2
    assert server.generate(**OWL | {"seed": first.metrics["seed"]}).images == first.images


def test_inert_inputs_change_nothing_and_the_log_says_so(server: CogServer) -> None:
    answer = server.generate(**OWL | {"negative_prompt": "a cat", "guidance_scale": 7.5})
    assert answer.images == server.generate(**OWL).images
    assert "negative_prompt and guidance_scale have no effect" in answer.logs


def test_each_image_is_a_server_sent_event_of_its_own(server: CogServer, engine: Engine) -> None:
    inputs = OWL | {"num_outputs": 2}
    headers = {"Accept": "text/event-stream"}
    with server.client.stream("POST", "/predictions", json={"input": inputs}, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["Content-Type"] == "text/event-stream"
        got = list(events(response))
    assert got[0][0] == "start" and got[-1][0] == "completed"
    outputs = [unpacked(data["chunk"]) for name, data in got if name == "output"]
    answer = Answer.parse(got[-1][1])
    assert list(answer.images) == outputs and len(outputs) == 2
    for i, image in enumerate(outputs):
        assert difference(pixels(image), drawn(engine, **OWL | {"seed": 5 + i})) <= 2
    assert [data["data"] for name, data in got if name == "log"] == ["seed: 5\n"]
    told = {data["name"]: data["value"] for name, data in got if name == "metric"}
    assert told == {name: answer.metrics[name] for name in ("seed", "image_count", "batch_size", "seconds")}
    assert (told["seed"], told["image_count"]) == (5, 2)


def test_previews_are_streamed_before_the_image(server: CogServer, engine: Engine) -> None:
    owl = OWL | {"num_inference_steps": 4}
    inputs, headers = owl | {"previews": True}, {"Accept": "text/event-stream"}
    with server.client.stream("POST", "/predictions", json={"input": inputs}, headers=headers) as response:
        got = list(events(response))
    *previews, image = [unpacked(data["chunk"]) for name, data in got if name == "output"]
    assert difference(pixels(image), drawn(engine, **owl)) <= 2
    steps = [Image.open(io.BytesIO(preview)).info["preview_of_step"] for preview in previews]
    assert steps == ["1", "2", "3"]
    assert Answer.parse(got[-1][1]).metrics["image_count"] == 1


def test_respond_async_with_a_webhook(server: CogServer, receiver: Receiver) -> None:
    request = {"id": "asynchronous", "input": OWL, "webhook": f"{receiver.url}/hook"}
    response = server.client.post("/predictions", json=request, headers=ASYNC)
    assert response.status_code == 202
    assert response.json() == {"id": "asynchronous", "status": "starting"}

    def finished() -> list[dict[str, Any]]:
        hooks = [json.loads(received.body) for received in receiver.requests]
        return [hook for hook in hooks if hook["status"] == "succeeded"]

    (hook,) = wait_for(finished, "the webhook")
    assert {(received.method, received.path) for received in receiver.requests} == {("POST", "/hook")}
    answer = Answer.parse(hook)
    assert (answer.id, answer.metrics["seed"]) == ("asynchronous", 5)
    assert answer.images == server.generate(**OWL).images


def test_put_of_a_running_prediction_does_not_run_it_twice(server: CogServer, receiver: Receiver) -> None:
    request = {"input": LONG, "webhook": receiver.url, "webhook_events_filter": ["completed"]}
    url = "/predictions/only-once"
    assert server.client.put(url, json=request, headers=ASYNC).json() == {"id": "only-once", "status": "starting"}
    for headers in (ASYNC, None):
        again = server.client.put(url, json=request, headers=headers)
        assert again.status_code == 202
        assert again.json()["id"] == "only-once" and again.json()["status"] in ("starting", "processing")
    wait_for(lambda: receiver.requests, "the webhook")
    hook = Answer.parse(json.loads(receiver.requests[0].body))
    assert (hook.id, hook.metrics["seed"]) == ("only-once", 5)
    assert begun(server, "only-once") == 1
    assert len(receiver.requests) == 1


def test_put_of_a_finished_prediction_draws_the_same_again(server: CogServer) -> None:
    first, second = Answer.of(server.put("finished", **OWL)), Answer.of(server.put("finished", **OWL))
    assert first.id == second.id == "finished"
    assert first.images == second.images


def test_output_files_are_uploaded_where_upload_url_says(start: Start, receiver: Receiver, engine: Engine) -> None:
    server = start(f"--upload-url={receiver.url}/images")
    server.wait_until_ready()
    answer = server.put("uploaded", **OWL | {"num_outputs": 4}).json()
    assert answer["status"] == "succeeded"
    # Cog lists them in the order in which the uploads ended; which is which is in the images.
    received = {f"{receiver.url}{request.path}": request for request in receiver.requests}
    assert sorted(received) == sorted(answer["output"])
    seeds = []
    for url, request in received.items():
        assert url.startswith(f"{receiver.url}/images/") and url.endswith(".png")
        assert (request.method, request.headers["content-type"]) == ("PUT", "image/png")
        assert request.headers["x-prediction-id"] == "uploaded"
        seeds.append(int(Image.open(io.BytesIO(request.body)).info["seed"]))
        assert difference(pixels(request.body), drawn(engine, **OWL | {"seed": seeds[-1]})) <= 2
    assert sorted(seeds) == [5, 6, 7, 8]

    receiver.put_status = 500
    refused = server.post(**OWL).json()
    assert refused["status"] == "failed" and "500" in refused["error"]
    receiver.put_status = 200
    assert server.post(**OWL).json()["status"] == "succeeded"


# Images from images


def test_an_image_to_begin_with_and_a_mask(server: CogServer, engine: Engine) -> None:
    given = fitted(photograph(), (SIDE, SIDE))
    kept = given.permute(1, 2, 0).numpy().astype(numpy.int16)
    mask, painted = Image.new("L", (SIDE, SIDE)), SIDE * 15 // 32
    mask.paste(255, (0, 0, SIDE, painted))
    inputs = OWL | {"num_inference_steps": 4, "num_outputs": 2, "image": PHOTOGRAPH}
    for strength in (0.5, 1.0):
        edit = ImageConditioning(image=given, strength=strength)
        for i, image in enumerate(server.generate(**inputs | {"prompt_strength": strength}).images):
            expected = engine.generate(["an owl"], [5 + i], "4", (SIDE, SIDE), edit)[0].permute(1, 2, 0).numpy()
            assert difference(pixels(image), expected.astype(numpy.int16)) <= 2
    for image in server.generate(**inputs | {"mask": data_url(mask)}).images:
        assert difference(pixels(image)[painted:], kept[painted:]) == 0
        assert difference(pixels(image)[:painted], kept[:painted]) > 5
    wide = server.generate(**OWL | {"image": data_url(photograph(size=(160, 90)))})
    assert pixels(wide.images[0]).shape == (SIDE * 3 // 4, SIDE * 5 // 4, 3)


# Wrong requests

WRONG: list[tuple[str, Any, str]] = [
    ("prompt", "", "shorter than 1"),
    ("prompt", "x" * 5001, "longer than 5000"),
    ("prompt", 5, "not of type"),
    ("negative_prompt", 5, "not of type"),
    ("width", 15, "less than the minimum of 16"),
    ("width", 2049, "greater than the maximum of 2048"),
    ("width", 64.5, "not of type"),
    ("width", "64", "not of type"),
    ("height", 15, "less than the minimum of 16"),
    ("height", 2049, "greater than the maximum of 2048"),
    ("aspect_ratio", "2:1", "not one of"),
    ("image", "/etc/hostname", "does not match"),
    ("image", "http://127.0.0.1/x.png", "does not match"),
    ("image", "file:///etc/hostname", "does not match"),
    ("image", "x https://a.b/c", "does not match"),
    ("mask", "/etc/hostname", "does not match"),
    ("prompt_strength", 0.0, "less than the minimum of 0.01"),
    ("prompt_strength", 1.1, "greater than the maximum of 1"),
    ("lora_weights", "x" * 2001, "longer than 2000"),
    ("lora_scale", -4.1, "less than the minimum of -4"),
    ("lora_scale", 4.1, "greater than the maximum of 4"),
    ("control_image", "weights/emoji/emoji.zip", "does not match"),
    ("control", "x" * 101, "longer than 100"),
    ("control_scale", -0.1, "less than the minimum of 0"),
    ("control_scale", 2.1, "greater than the maximum of 2"),
    ("num_outputs", 0, "less than the minimum of 1"),
    ("num_outputs", 5, "greater than the maximum of 4"),
    ("num_inference_steps", 2, "not one of"),
    ("num_inference_steps", "4", "not one of"),
    ("guidance_scale", -0.1, "less than the minimum of 0"),
    ("guidance_scale", 20.1, "greater than the maximum of 20"),
    ("seed", -1, "less than the minimum of 0"),
    ("seed", 2**32, "greater than the maximum of 4294967295"),
    ("output_format", "gif", "not one of"),
    ("output_quality", 0, "less than the minimum of 1"),
    ("output_quality", 101, "greater than the maximum of 100"),
    ("disable_safety_checker", "no", "not of type"),
    ("previews", 1, "not of type"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=[f"{w[0]}-{i}" for i, w in enumerate(WRONG)])
def test_an_input_out_of_bounds_is_named(server: CogServer, name: str, value: Any, message: str) -> None:
    response = server.post(**OWL | {name: value})
    assert response.status_code == 422
    details = response.json()["detail"]
    assert {tuple(detail["loc"]) for detail in details} == {("body", "input", name)}
    assert message in details[0]["msg"]


def test_every_input_has_bounds_that_are_tested(server: CogServer) -> None:
    schema = server.client.get("/openapi.json").json()["components"]["schemas"]["Input"]
    assert {name for name, _, _ in WRONG} == set(schema["properties"])
    assert schema["required"] == ["prompt"]


def test_a_missing_prompt_is_named(server: CogServer) -> None:
    response = server.post(seed=5)
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["body", "input", "prompt"]


@pytest.mark.parametrize(
    "inputs",
    [
        {"width": 4 * UNIT, "height": 4 * UNIT},
        {"width": 4 * UNIT, "height": 2048},
        {"prompt": "an owl " * 714},  # 4,998 characters, 1,428 tokens
        {"prompt": "?"},
        {"seed": 0},
        {"seed": 2**32 - 1, "num_outputs": 4},
        {"output_quality": 1, "guidance_scale": 20, "disable_safety_checker": True},
        {"image": PHOTOGRAPH, "mask": data_url(Image.new("L", (8, 8)))},  # is resized
    ],
)
def test_what_is_just_within_bounds_is_drawn(server: CogServer, inputs: dict[str, Any]) -> None:
    answer = server.generate(**OWL | inputs)
    assert len(answer.images) == inputs.get("num_outputs", 1)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt": " \n"}, "prompt: empty; expected some words"),
        ({"width": SIDE + 2}, f"width: {SIDE + 2} (size {SIDE + 2}x{SIDE}); expected a multiple of {UNIT} pixels"),
        ({"height": 63}, f"height: 63 (size {SIDE}x63); expected a multiple of {UNIT} pixels"),
        ({"aspect_ratio": "1:1", "width": 64}, "aspect_ratio: given beside width or height"),
        ({"mask": data_url(Image.new("L", (64, 64)))}, "mask: given without an image"),
        ({"image": "data:image/png;base64,aGVsbG8="}, "image: no image; expected PNG, JPEG, WEBP"),
        ({"prompt": "x" * 5000}, "prompt: 5000 tokens (of 5000 characters); expected at most 1500"),
        ({"control_image": PHOTOGRAPH}, "control: not given; expected one of none"),
        ({"control": "canny"}, "control: given without a control_image"),
        ({"lora_weights": "/etc/hostname"}, "LoRA /etc/hostname: expected an https URL"),
        ({"lora_weights": "http://169.254.169.254/x"}, "refused, because 169.254.169.254 is no public address"),
        ({"lora_weights": "data:,hello"}, "LoRA data URL: cannot be read as safetensors"),
    ],
)
def test_what_no_schema_can_say_fails_by_the_name_of_the_input(
    server: CogServer, inputs: dict[str, Any], message: str
) -> None:
    answer = server.post(**OWL | inputs).json()
    assert answer["status"] == "failed"
    assert message in answer["error"]


def test_whole_numbers_with_a_point_are_integers(server: CogServer) -> None:
    floats = {
        "seed": 5.0,
        "width": float(SIDE),
        "num_outputs": 1.0,
        "num_inference_steps": 1.0,
        "output_quality": 80.0,
    }
    assert server.generate(**OWL | floats).images == server.generate(**OWL).images


def test_what_is_not_json_is_refused(server: CogServer) -> None:
    response = server.client.post("/predictions", content=b"{", headers={"Content-Type": "application/json"})
    assert response.status_code == 400


# Everyone gets their own image


def test_same_seed_same_image_alone_in_a_batch_and_among_many(server: CogServer, engine: Engine) -> None:
    request = OWL | {"num_inference_steps": 4}
    alone = [server.generate(**request | {"seed": 5 + i}) for i in range(4)]
    for i, answer in enumerate(alone):
        assert answer.metrics["batch_size"] == 1
        assert answer.images == server.generate(**request | {"seed": 5 + i}).images  # to the bit
        assert difference(pixels(answer.images[0]), drawn(engine, **request | {"seed": 5 + i})) <= 2

    def batch() -> Answer | None:  # None where the device was faster than the queue
        answer = server.generate(**request | {"num_outputs": 4})
        return answer if answer.metrics["batch_size"] == 4 else None

    batches = [wait_for(batch, "a batch of four") for _ in range(2)]
    assert batches[0].images == batches[1].images  # to the bit
    for image, answer in zip(batches[0].images, alone, strict=True):
        assert difference(image, answer.images[0]) <= 2

    with ThreadPoolExecutor(8) as clients:
        among = list(clients.map(lambda i: server.generate(**request | {"seed": 5 + i % 4}), range(64)))
    for i, answer in enumerate(among):
        assert difference(answer.images[0], alone[i % 4].images[0]) <= 2
    assert max(answer.metrics["batch_size"] for answer in among) > 1


def test_no_request_gets_anothers_image(server: CogServer, engine: Engine) -> None:
    colours, things = ("red", "blue", "green", "yellow", "black"), ("apple", "heart", "owl", "house", "car")
    prompts = [f"a {colour} {thing}" for colour in colours for thing in things]
    kinds = [{**OWL, "prompt": prompt, "seed": 1000 * i} for i, prompt in enumerate(prompts)]
    kinds += [{**kind, "seed": kind["seed"] + 77} for kind in kinds]
    references = [drawn(engine, **kind) for kind in kinds]
    apart = [difference(a, b) for i, a in enumerate(references) for b in references[:i]]
    assert min(apart) > 50  # so a mix-up would be seen

    order = list(range(len(kinds))) * 10
    Random(0).shuffle(order)
    assert len(order) == 500
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda k: server.generate(**kinds[k]), order))
    for k, answer in zip(order, answers, strict=True):
        seed = kinds[k]["seed"]
        assert difference(pixels(answer.images[0]), references[k]) <= 2
        assert answer.metrics["seed"] == seed and answer.logs == f"seed: {seed}\n"
        info = Image.open(io.BytesIO(answer.images[0])).info
        assert (info["prompt"], info["seed"]) == (kinds[k]["prompt"], str(seed))
    batches = [answer.metrics["batch_size"] for answer in answers]
    print(f"batches of {min(batches)} to {max(batches)}, {numpy.mean(batches):.1f} on average")
    assert max(batches) > 1


# Cancelled, hung up, too many


def test_a_prediction_cancelled_in_the_middle_ends_early_and_says_so(server: CogServer, receiver: Receiver) -> None:
    names = []

    def cancel(attempt: int, seconds: float) -> None:
        name = f"cancelled-{attempt}"
        names.append(name)
        request = {"input": HUGE, "webhook": receiver.url, "webhook_events_filter": ["completed"]}
        server.client.put(f"/predictions/{name}", json=request, headers=ASYNC)
        wait_for(lambda: begun(server, name), "its start")
        time.sleep(seconds)
        assert server.client.post(f"/predictions/{name}/cancel").status_code == 200

    assert stops_a_batch(server, cancel)
    hooks = wait_for(lambda: receiver.requests if len(receiver.requests) == len(names) else None, "the webhooks")
    assert {json.loads(received.body)["status"] for received in hooks} == {"canceled"}
    assert server.client.post(f"/predictions/{names[-1]}/cancel").status_code == 404  # there is none any more


def test_a_cancelled_client_that_waits_is_told(server: CogServer) -> None:
    with ThreadPoolExecutor(1) as client:
        waiting = client.submit(server.put, "told", **LONG)
        wait_for(lambda: begun(server, "told"), "its start")
        server.client.post("/predictions/told/cancel")
        assert waiting.result(300).json()["status"] == "canceled"


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_client_that_hangs_up_stops_its_images(server: CogServer, accept: str) -> None:
    def hang_up(attempt: int, seconds: float) -> None:
        name = f"hung-up-{accept.replace('/', '-')}-{attempt}"
        request, headers = {"id": name, "input": HUGE}, {"Accept": accept}
        with pytest.raises(httpx.ReadTimeout):  # which closes the connection
            httpx.post(f"{server.client.base_url}/predictions", json=request, headers=headers, timeout=seconds)
        cancelled = f'"message":"Prediction cancelled","prediction_id":"{name}"'
        wait_for(lambda: cancelled in server.log, "the end of it")
        assert begun(server, name) == 1

    assert stops_a_batch(server, hang_up)


def test_one_more_than_the_slots_waits_and_all_are_served(server: CogServer, receiver: Receiver) -> None:
    hook = {"webhook": receiver.url, "webhook_events_filter": ["completed"]}
    longest = [f"slot-{i}" for i in range(4)]  # long enough for the others to come meanwhile
    for i in range(SLOTS):
        request = {"id": f"slot-{i}", "input": (HUGE if i < len(longest) else OWL) | {"seed": i}, **hook}
        assert server.client.post("/predictions", json=request, headers=ASYNC).status_code == 202
    assert server.status == "BUSY"
    with ThreadPoolExecutor(1) as client:
        late = client.submit(server.post, **OWL)
        for name in longest:
            server.client.post(f"/predictions/{name}/cancel")
        assert Answer.of(late.result()).metrics["seed"] == OWL["seed"]
    wait_for(lambda: len(receiver.requests) == SLOTS, "the end of all that were accepted")
    ended = {answer["id"]: answer for answer in (json.loads(received.body) for received in receiver.requests)}
    assert {ended.pop(name)["status"] for name in longest} == {"canceled"}
    assert {name: Answer.parse(answer).metrics["seed"] for name, answer in ended.items()} == {
        f"slot-{i}": i for i in range(len(longest), SLOTS)
    }
    assert server.status == "READY"
    assert server.post(**OWL).status_code == 200


# Ends


def test_images_are_streamed_one_by_one_and_sigterm_lets_all_of_them_arrive(start: Start) -> None:
    server = start(DMD2_MAX_BATCH="1")
    server.wait_until_ready()
    family = children(server.process.pid)
    request, headers = {"id": "stream", "input": LONG | {"num_outputs": 3}}, {"Accept": "text/event-stream"}
    got = []
    with ThreadPoolExecutor(1) as client:
        with server.client.stream("POST", "/predictions", json=request, headers=headers) as response:
            stream = events(response)
            while not got or got[-1][0] != "output":
                got.append(next(stream))
            assert len(server.outbox()) < 3  # the first is here before the last is drawn
            waiting = client.submit(server.put, "json", **LONG)
            wait_for(lambda: begun(server, "json"), "its start")
            server.process.send_signal(signal.SIGTERM)
            got += list(stream)
        answer = Answer.of(waiting.result(300))
    assert [name for name, _ in got].count("output") == 3 and got[-1][0] == "completed"
    assert len(Answer.parse(got[-1][1]).images) == 3
    assert answer.metrics["seed"] == 5
    assert server.process.wait(300) == 0
    assert not server.outbox()
    assert len(family) >= 2 and not any(psutil.pid_exists(pid) for pid in family)
    assert server.status is None


SABOTAGE = """
import sys

if "_run_worker" in " ".join(sys.orig_argv):
    from dmd2.inference.engine import Engine

    generate_timed = Engine.generate_timed

    def breaks(self, prompts, *rest, **named):
        if "break the device" in prompts:
            raise RuntimeError("it fell off the bus")
        return generate_timed(self, prompts, *rest, **named)

    def gone(self):
        raise RuntimeError("no device")

    Engine.generate_timed, Engine.recover = breaks, gone
"""


def test_a_killed_worker_and_a_dead_device_are_replaced(tmp_path: Path, start: Start) -> None:
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    server = start(PYTHONPATH=str(tmp_path))
    server.wait_until_ready()
    expected = server.generate(**OWL).images
    left = server.outbox()
    assert left

    def answers_again() -> bool:
        try:
            answer = server.post(**OWL)
        except httpx.TransportError:
            return False
        # Until it is replaced, a server without a worker fails what it is asked or says 503.
        return answer.status_code == 200 and answer.json()["status"] == "succeeded"

    with ThreadPoolExecutor(1) as client:
        waiting = client.submit(server.put, "in-flight", **LONG)
        wait_for(lambda: begun(server, "in-flight"), "its start")
        worker = server.worker()
        assert worker is not None
        began = time.monotonic()
        psutil.Process(worker).kill()
        lost = waiting.result(300).json()
    assert (lost["status"], lost["error"]) == ("failed", "Worker crashed")
    wait_for(answers_again, "an answer", START)
    print(f"kill -9 of the worker: answers again after {time.monotonic() - began:.1f} s")
    assert server.generate(**OWL).images == expected
    assert not any(path.exists() for path in left)  # the dead one's

    broken = server.post(**OWL | {"prompt": "break the device"}).json()
    assert broken["status"] == "failed"
    assert "Stopped: the device is gone: RuntimeError: no device" in broken["error"]
    wait_for(lambda: "is unhealthy" in server.log.rpartition("entrypoint: ")[2], "the health check's word", START)
    wait_for(answers_again, "an answer", START)
    assert server.generate(**OWL).images == expected


# What is left


def test_files_are_deleted_soon(server: Shared) -> None:
    assert len(server.first_files) == 1 + 1 + 3 + 1 + 1
    wait_for(lambda: not any(path.exists() for path in server.first_files), "their deletion")
