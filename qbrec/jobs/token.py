"""The token that lets a client into a Ray cluster: where it lies, never what it is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qbrec.errors import ConfigError

MODE, VALUE, PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
DEFAULT_FILE = "~/.ray/auth_token"
HOW_TO = (
    "take the cluster's own token (`ray get-auth-token` on its head), put it into a file with mode 600 and "
    f"set {MODE}=token {PATH}=FILE"
)


@dataclass(frozen=True)
class Token:
    """Where a token was found.

    Attributes:
        place: Name of the variable, or path of the file.
        file: The file, if it is one.
    """

    place: str
    file: Path | None = None


def find_token() -> Token | None:
    """The token that Ray would use: of the variable, else of the file it names, else of Ray's own file.

    Raises:
        ConfigError: The file that is named cannot be read or is empty (Ray aborts the process on it).
    """
    if os.environ.get(VALUE):
        return Token(VALUE)
    named = os.environ.get(PATH)
    file = Path(named or DEFAULT_FILE).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if not named:
            return None
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"cannot read the token: {reason}", where=f"{PATH}: {file}", fix=HOW_TO) from None
    if text.strip():
        return Token(str(file), file)
    if named:
        raise ConfigError("the file of the token is empty", where=f"{PATH}: {file}", fix=HOW_TO)
    return None


def use_token() -> bool:
    """Let Ray's client send the token if there is one and nobody forbids it; before Ray is imported.

    Returns:
        Whether requests will carry a token.

    Raises:
        ConfigError: RAY_AUTH_MODE asks for one, and there is none.
    """
    mode = os.environ.get(MODE, "").lower()
    if mode not in ("", "token"):
        return False
    token = find_token()
    if token is not None:
        os.environ[MODE] = "token"
        return True
    if mode:
        raise ConfigError(
            f"{MODE} is token, but there is none", where=f"{VALUE}, {PATH}, {DEFAULT_FILE}", fix=HOW_TO
        )
    return False
