"""The weights that are served, by name, each behind its own queue; and the way of a request through one of them."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from dmd2.inference.request import ImageRequest, resolve_request
from dmd2.runtime.errors import shown
from dmd2.service.http.admission import Admission, Draining, Full, Ticket
from dmd2.service.http.metrics import Metrics
from dmd2.service.http.refusal import Refusal

if TYPE_CHECKING:
    from dmd2.service.images import ImageService, OutputImage

Take = Callable[["OutputImage"], Awaitable[None]]
T = TypeVar("T")

KEEP_ALIVE = 10.0
"""seconds after which a stream whose request waits is told its position again"""
OPENAIS = re.compile(r"(dall-e|gpt-image|chatgpt-image)[\w.-]{0,50}")
"""names that some clients cannot be talked out of: they get the first weights"""

logger = logging.getLogger(__name__)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Served:
    """A folder of weights that is loaded, and the queue before it. Lives in one event loop."""

    def __init__(self, name: str, service: ImageService, waiting: int, metrics: Metrics) -> None:
        self.name, self.service, self.metrics = name, service, metrics
        self.admission = Admission(2 * service.max_batch, waiting)
        self._runs: dict[Ticket, Run] = {}
        metrics.watch(
            name,
            queue_depth=lambda: self.admission.waiting,
            running_images=lambda: self.admission.running,
            compile_failures=lambda: self.compile_failures,
            unprepared_calls=lambda: self.unprepared_calls,
        )
        from dmd2.runtime.offload import peak_memory  # torch, which the service has loaded by now

        device = service.engine.model.device
        metrics.watch_memory(str(device), lambda: peak_memory(device))
        self.created = int(time.time())

    @property
    def steps(self) -> list[int]:
        """Numbers of steps that there are students for."""
        return sorted(self.service.engine.manifest.students)

    @property
    def compiled(self) -> bool:
        """Whether networks are compiled, or at least captured: on a GPU that all of them fit on."""
        return self.service.engine.model.placement.compiler is not None

    @property
    def compile_failures(self) -> int:
        compiler = self.service.engine.model.placement.compiler
        return 0 if compiler is None else compiler.failures

    @property
    def unprepared_calls(self) -> int:
        compiler = self.service.engine.model.placement.compiler
        return 0 if compiler is None else compiler.unprepared

    def offer(
        self,
        request: ImageRequest,
        *,
        bulk: bool = False,
        timeout: float = 600.0,
        n: int = 1,
        caller: str | None = None,
    ) -> Run:
        """A place in the queue for `n` images. Whoever has it must `close` it.

        Args:
            caller: whose request is known when it comes again, if it was refused; None: nobody comes again.

        Raises:
            Refusal: the request is wrong, or there is no room.
        """
        try:
            if not self.service.alive:
                raise Refusal(503, "device_lost", "the device is gone: the server must be restarted", retry_after=30)
            if request.is_plain:
                resolve_request(request, self.service.engine)  # before it waits for nothing
            # The same caller's same request, by a hash that is this process's own.
            who = None if caller is None else lambda: hash((caller, n, *request.model_dump().values()))
            ticket = self.admission.offer(n, bulk, timeout, who)
        except (Full, Draining, ValueError, Refusal) as error:
            refusal = Refusal.of(error)
            if refusal.status_code in (429, 503):
                self.metrics.rejections.labels(refusal.code).inc()
            raise refusal from None
        # The bound on a request's images is each door's own.
        seed = secrets.randbelow(2**32 - n) if request.seed is None else request.seed
        request = request.model_copy(update={"num_outputs": n, "seed": seed})
        run = self._runs[ticket] = Run(self, request, ticket, timeout)
        self.pump()
        run.position = self.admission.position(ticket)
        return run

    def leave(self, ticket: Ticket, served: bool) -> None:
        if self._runs.pop(ticket, None) is not None:
            self.admission.leave(ticket, served)
            self.pump()

    def pump(self) -> None:
        """Lets in whom there is room for."""
        for ticket in self.admission.admit():
            self._runs[ticket].admitted.set()

    def offer_for(self, state: Any, request: ImageRequest, n: int, prompt: str, **more: Any) -> Run:
        """As `offer`; the access log is told through the `state` of an HTTP request."""
        state.model, state.n, state.prompt = self.name, n, prompt
        run = self.offer(request, n=n, caller=state.caller, **more)
        state.seed, state.position = run.request.seed, run.position
        return run


class Run:
    """A request on its way: waits, is generated, leaves."""

    def __init__(self, served: Served, request: ImageRequest, ticket: Ticket, timeout: float) -> None:
        self.served, self.request, self._ticket, self._began = served, request, ticket, time.monotonic()
        self._until = self._began + timeout
        self.admitted = asyncio.Event()
        self.position = 0
        """in the queue when it came; 0: it was let in at once"""
        self._done = False

    async def each(self, take: Take, still_waiting: Callable[[int], Awaitable[None]] | None = None) -> None:
        """Generates, and has `take` see every preview and image.

        Args:
            still_waiting: is told the position in the queue now and then.

        Raises:
            Refusal: an error, every image was withheld, or the time is over; told in the metrics.
            ClientGone: from `take` or `still_waiting`.
        """
        metrics, name, withheld = self.served.metrics, self.served.name, True
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                while not self.admitted.is_set():
                    try:
                        await asyncio.wait_for(self.admitted.wait(), KEEP_ALIVE)
                    except TimeoutError:
                        if still_waiting is not None:
                            await still_waiting(self.served.admission.position(self._ticket))
                metrics.admission.labels(name).observe(time.monotonic() - self._began)
                async with aclosing(self.served.service.generate(self.request)) as images:
                    async for image in images:
                        self._count(image)
                        withheld &= image.step is not None or image.data is None
                        await take(image)
                self._done = True
            if withheld:
                raise Refusal(400, "moderation_blocked", "withheld by the safety checker; try another seed")
        except ClientGone:
            raise
        except Exception as error:
            refusal = Refusal.of(error)
            metrics.errors.labels(refusal.code).inc()
            if refusal.status_code >= 500:
                logger.error("%s: %s", name, refusal.detail, exc_info=error)
            raise refusal from None
        finally:
            self.close()

    async def unless_gone(self, receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
        """`work`, unless the client hangs up; then the place is given up. Raises Refusal if the client did."""
        try:
            return await unless_gone(receive, work)
        except ClientGone:
            self.served.metrics.cancelled.inc()
            raise Refusal(499, "client_gone", "the client has gone") from None
        finally:
            self.close()

    def close(self) -> None:
        """Gives up the place. May be called again."""
        self.served.leave(self._ticket, self._done)

    def _count(self, image: OutputImage) -> None:
        if image.step is not None:
            return
        metrics, name = self.served.metrics, self.served.name
        metrics.images.labels(name).inc()
        metrics.batches.labels(name).observe(image.batch_size)
        if image.data is None:
            metrics.withheld.labels(name).inc()
        for stage, seconds in image.seconds.items():
            metrics.stages.labels(name, stage).observe(seconds)


class Models:
    """All that are served. The first is what who names none gets.

    Args:
        loaders: what loads each; they are called one after another, in another thread.
        waiting: requests that wait for one of them, at most.
    """

    def __init__(self, loaders: Mapping[str, Callable[[], Any]], waiting: int, metrics: Metrics) -> None:
        self._loaders, self._waiting, self.metrics = dict(loaders), waiting, metrics
        self.served: dict[str, Served] = {}
        self.draining = False

    @property
    def alive(self) -> bool:
        """Whether no device is gone: then only a new process helps."""
        return all(served.service.alive for served in self.served.values())

    @property
    def ready(self) -> bool:
        return self.alive and len(self.served) == len(self._loaders) and not self.draining

    async def load(self) -> None:
        """Raises what a loader raises."""
        for name, loader in self._loaders.items():
            service = await asyncio.to_thread(loader)
            self.served[name] = Served(name, service, self._waiting, self.metrics)
            self.served[name].admission.draining = self.draining

    def warm(self) -> dict[str, dict[str, Any]]:
        """Of each model: is it loaded, and was everything compiled that should be."""
        found = {}
        for name in self._loaders:
            served = self.served.get(name)
            failures = 0 if served is None else served.compile_failures
            found[name] = {
                "loaded": served is not None,
                "warm": served is not None and served.service.alive and not failures,
                "compiled": served is not None and served.compiled,
                "compile_failures": failures,
            }
        return found

    def find(self, name: str | None) -> Served:
        """Raises Refusal if it is unknown, or not loaded yet."""
        first = next(iter(self._loaders))
        known = name if name in self._loaders else first if not name or OPENAIS.fullmatch(name) else None
        if known is None:
            raise Refusal(
                404,
                "model_not_found",
                f"model {shown(name, 100)}: expected one of {', '.join(self._loaders)}",
                "model",
            )
        if known not in self.served:
            self.metrics.rejections.labels("loading").inc()
            raise Refusal(503, "loading", f"{known} is being loaded; see /readyz", retry_after=5)
        return self.served[known]

    def drain(self) -> None:
        """Takes no more requests; those that were taken are finished."""
        self.draining = True
        for served in self.served.values():
            served.admission.draining = True

    async def close(self) -> None:
        """After the last answer."""
        for served in self.served.values():
            await asyncio.to_thread(served.service.close)


def timing(images: Iterable[OutputImage]) -> dict[str, str]:
    """The header that says how many milliseconds each stage took, of the image that took the longest in it."""
    longest: dict[str, float] = {}
    for image in images:
        longest |= {stage: max(seconds, longest.get(stage, 0.0)) for stage, seconds in image.seconds.items()}
    text = ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in longest.items())
    return {"Server-Timing": text} if text else {}


def request_of(steps: int | None, **fields: Any) -> ImageRequest:
    """A request of any number of steps: which there are is the weights' matter, see `resolve_request`.

    Raises:
        InvalidInput: one of the fields is wrong.
    """
    return ImageRequest(**fields).model_copy(update={"num_inference_steps": steps})


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """`work`, which is cancelled if the client of an HTTP request that was read to its end hangs up.

    Raises:
        ClientGone: it did.
    """

    async def hung_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
