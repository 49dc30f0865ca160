"""Latency and throughput of a running `qbrec serve`: JSON with p50, p95, p99 and requests per second.

    python benchmarks/serving.py --url http://127.0.0.1:8000 --histories histories.json --clients 16

`histories.json` is a list of lists of item ids. Clients ask one after the other (closed loop), each on a
connection of its own that it keeps.
"""

from __future__ import annotations

import argparse
import http.client
import json
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np


def measure(
    url: str, histories: list[list[str]], *, clients: int, seconds: float, k: int = 10, per_request: int = 1
) -> dict[str, Any]:
    """Ask for `seconds` with so many clients at once.

    Args:
        url: Of the service.
        histories: Asked for in turn.
        clients: Connections.
        seconds: How long.
        k: Items of a list.
        per_request: Histories of one request.
    """
    split = urlsplit(url)
    assert split.hostname is not None
    taken: list[float] = []
    errors: list[int] = []
    lock = threading.Lock()
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(split.hostname or "", split.port, timeout=60)
        place, mine, wrong = number, [], []
        while (start := time.perf_counter()) < end:
            asked = [histories[(place + i) % len(histories)] for i in range(per_request)]
            place += clients
            connection.request("POST", "/v1/recommend", json.dumps({"histories": asked, "k": k}))
            answer = connection.getresponse()
            answer.read()
            mine.append(time.perf_counter() - start)
            if answer.status != 200:
                wrong.append(answer.status)
        connection.close()
        with lock:
            taken.extend(mine)
            errors.extend(wrong)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    passed = time.perf_counter() - start
    quantiles = np.quantile(taken, [0.5, 0.95, 0.99]) * 1000
    return {
        "clients": clients,
        "histories_per_request": per_request,
        "requests": len(taken),
        "errors": len(errors),
        "requests_per_second": round(len(taken) / passed, 1),
        **{f"p{q}_ms": round(float(v), 2) for q, v in zip((50, 95, 99), quantiles, strict=True)},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--histories", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--per-request", type=int, default=1)
    parser.add_argument("--k", type=int, default=10)
    options = parser.parse_args()
    histories = json.loads(options.histories.read_text())
    measure(options.url, histories, clients=options.clients, seconds=1.0, k=options.k)  # connections, caches
    figures = measure(
        options.url, histories, clients=options.clients, seconds=options.seconds, k=options.k,
        per_request=options.per_request,
    )  # fmt: skip
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
