"""Values of parsed records as the types of the input contract; what does not fit is None."""

from __future__ import annotations

import html
import math
import re
from typing import Any

_SCRIPT = re.compile(r"<(script|style)\b[^>]*>.*?(</\1\s*>|$)", re.IGNORECASE | re.DOTALL)
# `<` and a letter: "a < b" and "<3" are text.
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<!--.*?(?:-->|$)", re.DOTALL)
_PRICE = re.compile(r"\s*\$?\s*(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?!\w)")


def identifier(value: Any) -> str | None:
    """An id: text as it is, a whole number written out."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) < 2**63 else None
    return value if isinstance(value, str) and _is_unicode(value) else None


def text(value: Any, *, clean: bool) -> str | None:
    """Text, or the texts of a list joined by spaces.

    Args:
        value: Anything.
        clean: Take HTML away: tags, entities, runs of white space.
    """
    if isinstance(value, list):
        value = " ".join(part for part in value if isinstance(part, str) and part)
    if not isinstance(value, str):
        return None
    if not _is_unicode(value):
        # JSON can write half a surrogate pair, UTF-8 cannot.
        value = value.encode("utf-8", "replace").decode("utf-8")
    return (_without_html(value) if clean else value) or None


def texts(value: Any, *, clean: bool) -> list[str] | None:
    """A list of texts without the empty ones; None where it is no list."""
    if not isinstance(value, list):
        return None
    found = (text(part, clean=clean) for part in value if isinstance(part, str))
    return [part for part in found if part]


def integer(value: Any) -> int | None:
    """A whole number within 64 bits, also one written as text or with a fraction of zero."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = int(value)
    except ValueError:
        parsed = number(value)
        found = int(parsed) if parsed is not None and parsed.is_integer() else 2**63
    except OverflowError:
        return None
    if isinstance(value, float) and found != value:
        return None
    return found if -(2**63) <= found < 2**63 else None


def number(value: Any) -> float | None:
    """A finite number, also one written as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def price(value: Any) -> float | None:
    """A price as number: `$1,299.00` is 1299, of a range the lower end; other text is None."""
    if not isinstance(value, str):
        return number(value)
    match = _PRICE.match(value)
    return float(match[1].replace(",", "") + (match[2] or "")) if match else None


def address(value: Any) -> str | None:
    """An http(s) address of a picture, or of the first one in a list."""
    if isinstance(value, list):
        return next((found for found in map(address, value) if found), None)
    fine = isinstance(value, str) and value.startswith(("http://", "https://")) and _is_unicode(value)
    return value if fine else None


def _is_unicode(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _without_html(value: str) -> str:
    # Entities first: pages hold tags that were escaped, too.
    if "&" in value:
        value = html.unescape(value)
    if "<" in value:
        value = _TAG.sub(" ", _SCRIPT.sub(" ", value))
    return " ".join(value.split())
