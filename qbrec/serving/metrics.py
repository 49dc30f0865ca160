"""What the service counts, on the metrics port of every Ray node (Prometheus scrapes it)."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

# Quantiles are read off these bounds: `histogram_quantile(0.99, …)`.
_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
_SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]


class RayMetrics:
    """An `Observer` that tells Ray; every replica has a `ReplicaId` of its own there."""

    def __init__(self) -> None:
        self._requests = Counter(
            "qbrec_serving_requests", description="Requests for recommendations.", tag_keys=("status",)
        )
        self._seconds = Histogram(
            "qbrec_serving_latency_seconds",
            description="From the first byte of a request to its answer, queue included.",
            boundaries=_SECONDS,
            tag_keys=("status",),
        )
        self._batches = Histogram(
            "qbrec_serving_batch_histories", description="Histories ranked together.", boundaries=_SIZES
        )
        self._waiting = Gauge("qbrec_serving_waiting_histories", description="Histories without an answer.")

    def answered(self, status: int, seconds: float) -> None:
        """Count an answer and its latency."""
        tags = {"status": str(status)}
        self._requests.inc(tags=tags)
        self._seconds.observe(seconds, tags=tags)

    def batch(self, histories: int) -> None:
        """Note the size of a batch."""
        self._batches.observe(histories)

    def waiting(self, histories: int) -> None:
        """Note how long the queue is."""
        self._waiting.set(histories)
