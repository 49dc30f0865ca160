"""All checks at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from qbrec.config import RootConfig
from qbrec.doctor.clock import check_clock
from qbrec.doctor.cluster import check_cluster
from qbrec.doctor.collectives import check_gloo, check_nccl
from qbrec.doctor.devices import check_gpus
from qbrec.doctor.finding import Finding, failure
from qbrec.doctor.input import check_input
from qbrec.doctor.limits import check_disk, check_object_store, check_open_files
from qbrec.doctor.storage import check_storage
from qbrec.doctor.token import check_token
from qbrec.doctor.tracking import check_tracking
from qbrec.doctor.versions import check_versions
from qbrec.jobs.deadline import within

LIMIT_S = 90.0  # of one check; each has shorter ones of its own
Check = Callable[[], "Finding | list[Finding]"]


def examine(config: RootConfig) -> list[Finding]:
    """Everything that can be checked from here, for the run of a configuration."""
    checks: dict[str, Check] = {
        "versions": check_versions,
        "gpus": partial(check_gpus, config),
        "gloo": check_gloo,
        "nccl": check_nccl,
        "object store": check_object_store,
        "open files": check_open_files,
        "input": partial(check_input, config),
        "storage": partial(check_storage, config),
        "disk": partial(check_disk, config),
        "mlflow": partial(check_tracking, config),
        "token": check_token,
        "cluster": check_cluster,
        "clock": partial(check_clock, config),
    }
    with ThreadPoolExecutor(len(checks)) as pool:
        answers = [pool.submit(guarded, name, check) for name, check in checks.items()]
        return [finding for answer in answers for finding in answer.result()]


def guarded(name: str, check: Check, *, limit_s: float = LIMIT_S) -> list[Finding]:
    """What a check finds; one that breaks or takes too long is a finding itself."""
    try:
        found = within(limit_s, check)
    except TimeoutError as error:
        what = f"the check gave {error}"
    except Exception as error:  # the others shall still be seen
        what = f"the check itself failed: {type(error).__name__}: {error}"
    else:
        return found if isinstance(found, list) else [found]
    return [failure(name, "", wrong=what, fix="report it with this line, and try what it would have checked")]
