"""Connect to Ray once: the configured cluster, the one of RAY_ADDRESS, or a small local one."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

from qbrec.config.sections import ComputeConfig
from qbrec.errors import LaunchError

# Ray ends idle workers after a second; starting one costs two seconds of a core, and a catalogue's steps
# follow one another with pauses of about that. Measured on two cores: 30 s with the default, 5 s with this.
LOCAL_SYSTEM_CONFIG = {"idle_worker_killing_time_threshold_ms": 120_000}


def ensure_ray(compute: ComputeConfig) -> bool:
    """Make sure this process is connected to Ray.

    Args:
        compute: `ray_address` names the cluster; without it the environment variable RAY_ADDRESS does;
            without either a local one is started on the cores of this process.

    Returns:
        Whether a local cluster was started here (the caller may shut it down).

    Raises:
        LaunchError: The named cluster cannot be reached.
    """
    # Ray 2.60 asks the terminal for usage statistics on first use unless it is told.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return False
    with _sigterm_kept():
        return _connect(compute)


def _connect(compute: ComputeConfig) -> bool:
    import ray

    address = compute.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        if address != "local":
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            return False
        ray.init(
            address="local",
            num_cpus=len(os.sched_getaffinity(0)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _system_config=LOCAL_SYSTEM_CONFIG,
        )
    except (ConnectionError, RuntimeError, OSError) as error:
        raise LaunchError(
            f"cannot connect to Ray: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=f"compute.ray_address or RAY_ADDRESS: {address}",
            fix="check the address and that the cluster is up, or leave both unset for a local one",
        ) from error
    return True


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """`ray.init` makes SIGTERM end the process with exit code 15; who handled it before keeps it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if earlier not in (None, signal.SIG_DFL):
            signal.signal(signal.SIGTERM, earlier)
