"""File systems by path or URI, and how patiently an object store is asked.

What follows `scheme://` is the path as it is: nothing in it is decoded, so keys may hold `%`, `#`, `?` and
blanks. S3 takes its endpoint from `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, credentials from the places
that every AWS client looks at (environment, profile, instance); GCS from Google's.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TypeVar

import pyarrow.fs as pafs

from qbrec.errors import ConfigError, DataError

SCHEMES = ("s3", "gs", "file")
T = TypeVar("T")

_MISSING = re.compile("NO_SUCH_KEY|NO_SUCH_BUCKET|RESOURCE_NOT_FOUND|HTTP status 404|NOT_FOUND|Not found")
# Answers to HEAD have no body: of credentials that have expired only the 400 is left.
_DENIED = re.compile(
    "ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|EXPIRED|INVALID_CLIENT_TOKEN"
    r"|HTTP status 40[13]|HTTP status 400\) during Head|PERMISSION_DENIED|UNAUTHENTICATED"
)
_UNREACHABLE = re.compile("NETWORK_CONNECTION|curlCode|UNAVAILABLE")
_LOCAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class Patience:
    """How long an object store may take, and how often it is asked again.

    Attributes:
        connect_s: Seconds until a connection has to stand.
        silence_s: Seconds without a byte after which a connection counts as dead.
        requests: Requests that the client library makes in quick succession before it reports an error.
        attempts: How often that is repeated.
        pause_s: Seconds before the first repetition, twice as long before each further one.
    """

    connect_s: float = 10.0
    silence_s: float = 30.0
    requests: int = 3
    attempts: int = 4
    pause_s: float = 1.0


PATIENCE = Patience()


def is_remote(path: str) -> bool:
    """Whether a path names an object store."""
    return path.startswith(("s3://", "gs://"))


def filesystem(path: str, *, patience: Patience = PATIENCE) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path inside it.

    Raises:
        ConfigError: The scheme is not one of `SCHEMES`, or the URI names no bucket.
        DataError: The region of the bucket cannot be found out.
    """
    scheme, separator, inner = path.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), os.path.abspath(path)
    if scheme not in SCHEMES:
        raise ConfigError(
            f"cannot read from {scheme}://",
            where=path,
            fix=f"use a local path or one of {', '.join(SCHEMES)}://",
        )
    if scheme == "file":
        if not inner.startswith("/"):
            raise ConfigError("a file:// URI needs an absolute path", where=path, fix="write file:///folder")
        return pafs.LocalFileSystem(), os.path.abspath(inner)
    bucket = inner.partition("/")[0]
    if not bucket or "@" in bucket:
        raise ConfigError(
            "the URI has to begin with the name of a bucket",
            where=f"{scheme}://{bucket.rpartition('@')[2]}",
            fix=f"write {scheme}://bucket/path; credentials belong in the environment or a profile",
        )
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    # Connections do not outlive a fork.
    return _store(scheme, bucket, endpoint, patience, os.getpid()), inner.rstrip("/")


@lru_cache(maxsize=64)
def _store(
    scheme: str, bucket: str, endpoint: str | None, patience: Patience, process: int
) -> pafs.FileSystem:
    if scheme == "gs":
        seconds = patience.silence_s * patience.requests
        return pafs.GcsFileSystem(retry_time_limit=timedelta(seconds=seconds))
    region = None
    if endpoint is None:
        region = retried(
            lambda: pafs.resolve_s3_region(bucket),
            doing="find the region of the bucket",
            place=f"s3://{bucket}",
            patience=patience,
        )
    return pafs.S3FileSystem(
        region=region,
        endpoint_override=endpoint,
        connect_timeout=patience.connect_s,
        request_timeout=patience.silence_s,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=patience.requests),
    )


def retried(call: Callable[[], T], *, doing: str, place: str, patience: Patience = PATIENCE) -> T:
    """Call until it succeeds, with growing pauses; errors that time does not mend are raised at once.

    Args:
        call: May raise OSError.
        doing: What it does, such as `read the object`, for the error message.
        place: The object or folder concerned, as a URI.
        patience: How often, how long between.

    Raises:
        DataError: It failed for good.
    """
    attempt = 1
    while True:
        try:
            return call()
        except OSError as error:
            if is_final(error) or attempt >= patience.attempts:
                raise told(error, doing=doing, place=place) from error
        # Many workers that failed together must not come back together.
        time.sleep(patience.pause_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
        attempt += 1


def is_final(error: OSError) -> bool:
    """Whether asking again would bring the same error."""
    text = _message(error)
    return isinstance(error, _LOCAL) or bool(_MISSING.search(text) or _DENIED.search(text))


def is_missing(error: OSError) -> bool:
    """Whether the error says that there is no such object."""
    return isinstance(error, FileNotFoundError) or bool(_MISSING.search(_message(error)))


def told(error: OSError, *, doing: str, place: str) -> DataError:
    """The error as the user has to hear it."""
    text = (str(error).splitlines() or [""])[0][:300]
    if is_missing(error):
        what, fix = "it does not exist", "check the name; somebody may have deleted it"
    elif isinstance(error, PermissionError) or _DENIED.search(_message(error)):
        what = "access is denied"
        fix = "check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, …) and the policy of the bucket"
    elif _UNREACHABLE.search(_message(error)):
        what = "the store cannot be reached or breaks off"
        fix = "check the network and, for S3, AWS_ENDPOINT_URL; run the same command again: it goes on"
    else:
        what = "the store fails"
        fix = "try again later: the same command goes on from here"
    return DataError(f"cannot {doing}: {what} ({text})", where=place, fix=fix)


def _message(error: OSError) -> str:
    """The text without what stands in quotes: the name of an object may look like a message."""
    return re.sub("'[^']*'", "", str(error))
