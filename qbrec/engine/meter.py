"""Where the time of a training step goes, and what share of the device's arithmetic is used (MFU)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from qbrec.engine.hardware import peak_flops

PHASES = ("data", "prepare", "forward", "backward", "optimizer", "communication")
_COUNT_EVERY = 10  # windows: how often the arithmetic of a step is counted anew

Step = TypeVar("Step")


class CollectiveTimes:
    """Stands in for DeepSpeed's communication log and only adds up seconds, and only while `enabled`.

    The log itself keeps every call for ever, and ends the process at an operation it has no formula for.
    """

    def __init__(self) -> None:
        self.enabled, self.prof_all, self.verbose, self.debug = False, True, False, False
        self.prof_ops: list[str] = []
        self.seconds = 0.0
        self._totals: dict[str, float] = {}

    def append(self, raw_name: str, record_name: str, latency: float, msg_size: int) -> None:
        """Called by DeepSpeed after each collective; `latency`: ms of all calls of that name so far."""
        self.seconds += (latency - self._totals.get(record_name, 0.0)) / 1000
        self._totals[record_name] = latency


collectives = CollectiveTimes()


class StepMeter:
    """Measures one rank's steps.

    Only the last step of a window is split into phases: on a GPU that takes a synchronisation after each of
    them, which the other steps are spared. Waiting for data and the whole are measured always.

    Args:
        device: What computes.
        precision: `float32`, `bfloat16` or `float16`.
        window: Steps between two reports.
    """

    def __init__(self, device: torch.device, *, precision: str, window: int) -> None:
        self._device, self._precision, self._window = device, precision, window
        self._peak: float | None = None
        self._flops = 0.0  # of one step, as last counted
        self._windows = 0
        self._step = 0  # in the window
        self._begin = self._waited = 0.0
        self._split: dict[str, float] = {}

    def waiting(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The same steps; the time until each of them comes counts as waiting for data."""
        iterator = iter(steps)
        while True:
            asked = time.perf_counter()
            if not self._step:
                self._begin = asked
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            yield item

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each optimiser step."""
        self._step += 1
        counted = self._step == 1 and self._windows % _COUNT_EVERY == 0
        counter = _FlopCounter() if counted else nullcontext()
        with counter:
            yield
        if isinstance(counter, _FlopCounter):
            self._flops = counter.total

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Around what is no part of a step, such as an evaluation."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    @property
    def _exact(self) -> bool:
        return self._step == self._window

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around one of `PHASES`; collectives inside count as communication."""
        if not self._exact:
            yield
            return
        begin, before = self._now(), collectives.seconds
        collectives.enabled = True
        try:
            yield
        finally:
            collectives.enabled = False
        inside = collectives.seconds - before
        self._split[name] = self._split.get(name, 0.0) + self._now() - begin - inside
        if inside:
            self._split["communication"] = self._split.get("communication", 0.0) + inside

    def report(self) -> dict[str, float]:
        """What the window says, and begin the next one.

        Returns:
            `step_seconds`, `data_wait` (share of it) and `time/data`, means of the window; `time/<phase>` of
            the others, seconds of its last step; `mfu`, where the device's peak is known.
        """
        if not self._step:
            return {}
        seconds = (self._now() - self._begin) / self._step
        found = {"step_seconds": seconds, "data_wait": self._waited / self._step / seconds}
        found |= {f"time/{name}": value for name, value in self._split.items()}
        if self._split:
            found["time/data"] = self._waited / self._step
        if self._peak is None:
            self._peak = peak_flops(self._device, self._precision) or 0.0
        if self._peak and self._flops:
            found["mfu"] = self._flops / seconds / self._peak
        self._windows += 1
        self._step, self._waited, self._split = 0, 0.0, {}
        return found

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _FlopCounter(TorchDispatchMode):
    """Adds up the floating-point operations of matrix products and attention, forward and backward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out
