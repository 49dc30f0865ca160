"""The token of Ray clusters: is it there, and who else can read it?"""

from __future__ import annotations

import os
import stat

from qbrec.doctor.finding import Finding, of_error, ok, warning
from qbrec.errors import ConfigError
from qbrec.jobs.token import HOW_TO, MODE, find_token


def check_token() -> Finding:
    """Whether clusters are asked with a token that nobody else knows."""
    mode = os.environ.get(MODE, "")
    try:
        token = find_token()
    except ConfigError as error:
        return of_error("token", error)
    found = f"{MODE}={mode or 'unset'}, " + (f"token in {token.place}" if token else "no token")
    if mode.lower() == "token" and token is None:
        return of_error("token", ConfigError(f"{MODE} is token, but there is none", where=found, fix=HOW_TO))
    if token is not None and token.file is not None:
        permissions = stat.S_IMODE(token.file.stat().st_mode)
        if permissions & 0o077:
            return warning(
                "token",
                f"{found}, mode {permissions:o}",
                wrong="other users may read it: whoever has the token runs code on the cluster",
                fix=f"chmod 600 {token.file}",
            )
    if mode.lower() not in ("", "token"):
        return warning(
            "token",
            found,
            wrong="whoever reaches a cluster without a token runs code on it",
            fix=f"set {MODE}=token here and on every node",
        )
    return ok("token", found)
