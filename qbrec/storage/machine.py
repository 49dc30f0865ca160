"""Which machine this is, for names and notes on storage that several machines share."""

from __future__ import annotations

import hashlib
import os
import socket
from functools import cache
from pathlib import Path


@cache
def boot_id() -> str:
    """What tells this start of this machine's kernel from any other; empty where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


@cache
def host_name() -> str:
    """This machine's name, fit for a file name."""
    return "".join(c if c.isalnum() or c == "-" else "-" for c in socket.gethostname()) or "unnamed"


@cache
def machine_id() -> str:
    """This start of this machine, 12 hexadecimal digits: its processes see each other's locks."""
    return hashlib.blake2b(f"{host_name()}/{boot_id()}".encode(), digest_size=6).hexdigest()


def is_alive(process: int) -> bool:
    """Whether this machine runs a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
