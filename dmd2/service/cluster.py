"""Many machines, on Ray: replicas of the application of `dmd2 serve`, and the shards of `dmd2 batch`.

Ray starts replicas anew that have gone, adds some when requests queue, and sends each request to one that has room.
Everything within a replica, the HTTP API included, is what one machine runs.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dmd2.data.shards import Index, read_index
from dmd2.runtime.errors import InvalidInput, UserError, shown

BOUNDS = {"replicas": (1, 10_000), "most": (1, 10_000), "cpus": (0, 1000), "gpus": (0, 64), "target": (1, 10_000)}
LORAS = 8
"""names that a replica is remembered to have had last, and gets the requests of, if it has room"""
LONGEST_LORA = 200
"""characters of the header `serve_multiplexed_model_id`; longer ones are not looked at"""
DEFAULTS = {"replicas": 1, "cpus": 1, "gpus": 0, "target": 16, "queue": 64}


def build(args: Mapping[str, str]) -> Any:
    """What `serve run dmd2.service.cluster:build NAME=VALUE …` deploys.

    Args:
        args: all optional. weights: folders, by commas, on every node; api_key_file: likewise; insecure_public:
            yes, to go without keys; replicas: at least (1); most: at most (as many); target: requests that a replica
            has at a time, on average, before another is added (16); queue: requests that wait in a replica (64);
            cpus, gpus: of a replica (1, 0).

    Raises:
        UserError: an argument is unknown or not valid; anybody could ask.
    """
    bounds = BOUNDS | {"queue": (0, 10_000)}
    valid = {*bounds, "weights", "api_key_file", "insecure_public"}
    for name in args:
        if name not in valid:
            raise InvalidInput(shown(name, 50), f"expected some of {', '.join(sorted(valid))}")
    numbers = {name: _number(args, name, *bound) for name, bound in bounds.items() if name in DEFAULTS | dict(args)}
    most = numbers.get("most", numbers["replicas"])
    if most < numbers["replicas"]:
        raise InvalidInput("most", f"expected at least replicas, which is {numbers['replicas']}", most)
    if not args.get("api_key_file") and args.get("insecure_public") != "yes":
        raise InvalidInput("api_key_file", "anybody could ask; expected a file of keys, or insecure_public=yes")
    serve = _ray("ray.serve")
    deployment = serve.deployment(
        name="dmd2",
        # Beyond what a replica lets in and has wait: then it is the replica that answers 429, and when to come back.
        max_ongoing_requests=2 * (numbers["queue"] + numbers["target"]),
        autoscaling_config={
            "min_replicas": numbers["replicas"],
            "max_replicas": most,
            "target_ongoing_requests": numbers["target"],
        },
        ray_actor_options={"num_cpus": numbers["cpus"], "num_gpus": numbers["gpus"]},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=300,
    )
    folders = [part.strip() for part in args.get("weights", "").split(",") if part.strip()]
    return deployment(serve.ingress()(Replica)).bind(folders, args.get("api_key_file"), numbers["queue"])


def _number(args: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = str(args.get(name, DEFAULTS.get(name)))
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not least <= int(text) <= most:
        raise InvalidInput(name, f"expected a number from {least} to {most}", shown(text, 50))
    return int(text)


class Replica:
    """The application of `dmd2 serve` with its weights loaded."""

    def __init__(self, weights: Sequence[str], keys: str | None, waiting: int) -> None:
        from dmd2.service.http.app import create_app
        from dmd2.service.http.guard import Rules, read_keys
        from dmd2.service.http.server import loaders, log

        log()
        # Loaded here, so that Ray sends nobody before it is done, and tells why if it cannot be.
        loaded = {name: loader() for name, loader in loaders([Path(folder) for folder in weights]).items()}
        rules = Rules(read_keys(Path(keys)) if keys else (), loopback=False)
        # Not `app`: Ray's wrapper, which this class becomes, has a property of that name.
        self._application = create_app(
            {name: partial(loaded.__getitem__, name) for name in loaded}, rules, waiting=waiting
        )
        serve = importlib.import_module("ray.serve")

        @serve.multiplexed(max_num_models_per_replica=LORAS)  # type: ignore[untyped-decorator]
        async def holds(lora: str) -> str:
            return lora  # the request itself says where its files are: they are read, and kept, on its way

        self._holds, self._wanted = holds, serve.get_multiplexed_model_id

    def __serve_build_asgi_app__(self) -> Any:
        async def multiplexed(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and 0 < len(lora := self._wanted()) <= LONGEST_LORA:
                await self._holds(lora)
            await self._application(scope, receive, send)

        return multiplexed

    async def check_health(self) -> None:
        """Ray asks this before the first request and then every few seconds; who raises is replaced."""
        models = self._application.state.models
        while not models.ready and models.alive and not models.draining:
            await asyncio.sleep(0.05)
        if not models.alive:
            raise RuntimeError("the device is gone")


def batch_on_ray(
    prompts: Path, defaults: Mapping[str, Any], weights: Path, device: str, out: Path, index: Index, retry: bool
) -> Index:
    """Makes what `out` lacks of the index's files, each file in one of Ray's workers, a GPU each where there are any.

    Paths are the same on every node. A worker that is lost is replaced, and its file begun anew. The cluster is the
    one of `RAY_ADDRESS`, or that runs on this machine; else one is started here, and ended.

    Raises:
        UserError: Ray is not installed, or a worker could not do it.
    """
    ray = _ray("ray")
    data = _ray("ray.data")
    if started := not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
    has = ray.cluster_resources()
    gpus = 0 if device == "cpu" else int(has.get("GPU", 0))
    names = list(index.shards())
    files = data.from_items([{"name": name} for name in names], override_num_blocks=len(names))
    job = {
        "prompts": prompts.absolute(),
        "defaults": dict(defaults),
        "weights": weights.absolute(),
        "device": device,
        "out": out.absolute(),
        "index": index.model_dump(),
        "retry": retry,
    }
    workers = max(1, min(len(names), gpus or int(has.get("CPU", 1))))
    made = files.map_batches(
        _Maker,
        fn_constructor_kwargs=job,
        batch_size=1,
        compute=data.ActorPoolStrategy(min_size=1, max_size=workers),
        num_gpus=1 if gpus else 0,
        num_cpus=1,
    )
    try:
        for _ in made.iter_batches(batch_size=None):
            pass
    except ray.exceptions.RayError as error:
        raise UserError(
            f"a worker failed: {shown(error, 400)}; the same command goes on with what is left"
        ) from error
    finally:
        if started:
            ray.shutdown()
    return read_index(out)


def _ray(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError("Ray is not installed; pip install 'dmd2[ray]'") from None


class _Maker:
    """A worker of Ray Data: takes names of files, makes them."""

    def __init__(
        self,
        prompts: Path,
        defaults: Mapping[str, Any],
        weights: Path,
        device: str,
        out: Path,
        index: Mapping[str, Any],
        retry: bool,
    ) -> None:
        from dmd2.service.batch import Requests

        self._requests, self._out, self._retry = Requests(prompts, defaults), out, retry
        self._index, self._weights, self._device = Index.model_validate(index), weights, device
        self._service: Any = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from dmd2.service.batch import make_images

        names = [str(name) for name in batch["name"]]
        make_images(self._requests, self._out, self._index, self._generate, retry=self._retry, only=names)
        return batch

    def _generate(self, rows: Any) -> Any:
        from dmd2.service.images import ImageService

        self._service = self._service or ImageService(self._weights, self._device, files=False)
        return self._service.generate_all(rows)
