"""Bytes of a URL as a raw stream that goes on with a range request where the connection broke."""

from __future__ import annotations

import http.client
import io
import time
import urllib.error
import urllib.request
from typing import Any

from qbrec.errors import DataError

TIMEOUT_S = 30.0
RETRIES = 6  # in a row, without a byte in between
_LONGEST_PAUSE_S = 10.0
_FIX = "check the address, or download the file and import it from there"


def is_url(place: str) -> bool:
    """Whether a place is an http(s) address."""
    return place.startswith(("http://", "https://"))


def url_size(place: str) -> int:
    """Bytes behind a URL, 0 where the server does not say.

    Raises:
        DataError: The server cannot be reached, or has no such file.
    """
    with _connect(place, 0, None) as answer:
        return int(answer.headers.get("Content-Length") or 0)


class HttpBytes(io.RawIOBase):
    """A URL's bytes, from the first to the last, over as many connections as it takes.

    Args:
        place: http(s) address.

    Raises:
        DataError: The server fails again and again, or the file changed in between.
    """

    def __init__(self, place: str) -> None:
        self._place, self._position = place, 0
        self._answer = _connect(place, 0, None)
        headers = self._answer.headers
        etag = headers.get("ETag") or ""
        # If-Range takes strong marks only (RFC 9110, 13.1.5).
        self._mark = etag if etag.startswith('"') else headers.get("Last-Modified")
        length = headers.get("Content-Length")
        self._length = int(length) if length else None

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some bytes; 0 at the end of the file."""
        for attempt in range(RETRIES + 1):
            try:
                chunk = self._answer.read(min(len(buffer), 1 << 20))
                if chunk or self._length is None or self._position >= self._length:
                    buffer[: len(chunk)] = chunk
                    self._position += len(chunk)
                    return len(chunk)
                what = f"the connection ended after {self._position:,} of {self._length:,} bytes"
            except (OSError, http.client.HTTPException) as error:
                what = f"the connection broke after {self._position:,} bytes: {error}"
            if attempt < RETRIES:
                _pause(attempt)
                self._answer.close()
                self._answer = _connect(self._place, self._position, self._mark)
                self._check_range()
        raise DataError(what, where=self._place, fix=_FIX)

    def close(self) -> None:
        """Close the connection."""
        if not self.closed:
            self._answer.close()
        super().close()

    def _check_range(self) -> None:
        """The answer to a range request has to be the rest of the very file that was begun."""
        if not self._position:
            return
        said = self._answer.headers.get("Content-Range") or ""
        begin, _, rest = said.removeprefix("bytes ").partition("-")
        total = rest.partition("/")[2]
        same = self._length is None or total in ("*", str(self._length))
        if begin != str(self._position) or not same:
            raise DataError(
                f"the server went on with {said or 'another part'} instead of byte {self._position}",
                where=self._place,
                fix="download the file, and import it from there",
            )


def _connect(place: str, position: int, mark: str | None) -> Any:
    """An open answer from `position` on; several attempts."""
    headers = {"User-Agent": "qbrec", "Accept-Encoding": "identity"}
    if position:
        headers["Range"] = f"bytes={position}-"
        if mark:
            headers["If-Range"] = mark
    what = ""
    for attempt in range(RETRIES + 1):
        try:
            request = urllib.request.Request(place, headers=headers)  # noqa: S310 - http(s) only, see is_url
            answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
        except urllib.error.HTTPError as error:
            error.close()
            what = f"the server answers {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (ValueError, http.client.InvalidURL) as error:
            what = f"this is no address: {error}"
            break
        except (OSError, http.client.HTTPException) as error:
            what = f"the server cannot be reached: {error}"
        else:
            if not position or answer.status == http.HTTPStatus.PARTIAL_CONTENT:
                return answer
            answer.close()
            what = "the connection broke, and the server cannot go on in the middle of the file"
            break
        if attempt < RETRIES:
            _pause(attempt)
    raise DataError(what, where=place, fix=_FIX)


def _pause(attempt: int) -> None:
    time.sleep(min(0.2 * 2**attempt, _LONGEST_PAUSE_S))
