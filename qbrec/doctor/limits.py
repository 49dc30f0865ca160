"""What the system lets a process do: open files, shared memory, room on disk."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from pathlib import Path

from qbrec.config import RootConfig
from qbrec.doctor.finding import Finding, failure, ok, warning
from qbrec.doctor.storage import existing_parent

_FEWEST_FILES = 8192  # Ray's own advice; it raises a lower soft limit as far as it may
_RAY_RAISES_TO = 65536
# Of Ray 2.60 (`ray._private.utils.resolve_object_store_memory`), which is not asked: importing it takes
# seconds, and on a node it may have been told otherwise.
_STORE_SHARE, _STORE_MOST, _STORE_ON_DISK = 0.3, 200 * 10**9, 10**10
_FEWEST_BYTES, _FEW_BYTES = 10**9, 10 * 10**9
_RAY_SPILLS_BELOW = 0.95  # of a disk in use; Ray then refuses to spill objects there
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_open_files() -> Finding:
    """How many files a process may open (`ulimit -n`)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reached = max(soft, min(hard, _RAY_RAISES_TO)) if hard != resource.RLIM_INFINITY else _RAY_RAISES_TO
    found = f"{soft:,}" + (f", raised to {reached:,} by Ray" if reached > soft else "")
    if reached >= _FEWEST_FILES:
        return ok("open files", found)
    return warning(
        "open files",
        found,
        wrong=f"Ray needs {_FEWEST_FILES:,} and more; connections fail without",
        fix="ulimit -n 65536; for good in /etc/security/limits.conf, LimitNOFILE= of the service, or "
        "`docker run --ulimit nofile=65536:65536`",
    )


def check_object_store(*, shared: str = "/dev/shm", memory: int | None = None) -> Finding:  # noqa: S108
    """Whether Ray's object store finds room in shared memory.

    Args:
        shared: Where shared memory is mounted.
        memory: Bytes of this machine, or of its container; None: look.
    """
    memory = memory or memory_limit()
    free = shutil.disk_usage(shared).free if os.path.isdir(shared) else 0
    share = int(memory * _STORE_SHARE)
    size = min(share, _STORE_MOST, max(_STORE_ON_DISK, int(free * 0.95)))
    found = f"{_gb(size)} GB; {shared} has {_gb(free)} GB free, the machine {_gb(memory)} GB of memory"
    if size <= free:
        return ok("object store", found)
    return warning(
        "object store",
        found,
        wrong="shared memory is too small, so that Ray keeps objects in files on disk: catalogues are built "
        "far slower",
        fix=f"give the container {_gb(share * 1.1)} GB: `docker run --shm-size={_gb(share * 1.1)}gb`, on "
        "Kubernetes an emptyDir with medium Memory at /dev/shm; or delete what lies there",
    )


def check_disk(config: RootConfig) -> list[Finding]:
    """Room in the storage, and where Ray keeps what it spills."""
    temporary = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return [
        _disk("disk", existing_parent(Path(config.run.storage)), full="checkpoints and artifacts"),
        _disk("temporary", existing_parent(Path(temporary)), full="objects that Ray spills"),
    ]


def memory_limit() -> int:
    """Bytes of memory of this machine, or of the container if that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            total = min(total, int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue  # no such cgroup, or no limit (`max`)
    return total


def _disk(check: str, folder: Path, *, full: str) -> Finding:
    usage = shutil.disk_usage(folder)
    found = f"{_gb(usage.free)} of {_gb(usage.total)} GB free in {folder}"
    fix = "free space there, or use another disk (run.storage, RAY_TMPDIR)"
    if usage.free < _FEWEST_BYTES:
        return failure(check, found, wrong=f"there is no room for {full}", fix=fix)
    if usage.free < _FEW_BYTES or usage.used > _RAY_SPILLS_BELOW * usage.total:
        return warning(check, found, wrong=f"there is little room for {full}", fix=fix)
    return ok(check, found)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"
