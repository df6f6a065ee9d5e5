"""What `/metrics` says. Labels are of fixed sets: nothing that a client writes becomes one."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)


class Metrics:
    """One registry for each application."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("dmd2_requests", "Answers by route and status.", ["route", "status"], registry=r)
        self.seconds = Histogram(
            "dmd2_request_seconds", "From a request to the end of its answer.", ["route"], registry=r, buckets=SECONDS
        )
        self.images = Counter("dmd2_images", "Images that were generated.", ["model"], registry=r)
        self.withheld = Counter("dmd2_images_withheld", "Withheld by the safety checker.", ["model"], registry=r)
        self.stages = Histogram(
            "dmd2_stage_seconds",
            "Of an image: queue (for the device), text, denoise, decode, safety, encode.",
            ["model", "stage"],
            registry=r,
            buckets=SECONDS,
        )
        self.batches = Histogram(
            "dmd2_batch_size", "Images in one batch, by image.", ["model"], registry=r, buckets=BATCHES
        )
        self.admission = Histogram(
            "dmd2_admission_seconds", "From the door to the device's queue.", ["model"], registry=r, buckets=SECONDS
        )
        self.errors = Counter("dmd2_errors", "Errors by kind.", ["code"], registry=r)
        self.rejections = Counter("dmd2_rejections", "Requests that were not let in.", ["reason"], registry=r)
        self.cancelled = Counter("dmd2_cancelled", "Requests whose client had gone.", registry=r)
        self._gauges = {
            name: Gauge(f"dmd2_{name}", text, ["model"], registry=r)
            for name, text in (
                ("queue_depth", "Requests that wait."),
                ("running_images", "Images that are generated or about to be."),
                ("compile_failures", "Shapes that could not be compiled: they run as they are."),
                ("unprepared_calls", "Calls of networks in a shape that warm-up did not prepare: they are slow."),
            )
        }
        self._memory = Gauge(
            "dmd2_device_memory_bytes",
            "Peak: tensors on a GPU, the resident set on a CPU.",
            ["device"],
            registry=r,
        )

    def watch(self, model: str, **values: Callable[[], float]) -> None:
        """Gauges of a model: queue_depth, running_images, compile_failures, unprepared_calls."""
        for name, value in values.items():
            self._gauges[name].labels(model).set_function(value)

    def watch_memory(self, device: str, value: Callable[[], float]) -> None:
        self._memory.labels(device).set_function(value)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
