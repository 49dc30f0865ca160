"""The cluster of RAY_API_SERVER_ADDRESS or RAY_ADDRESS: does it answer, and with our version of Ray?"""

from __future__ import annotations

import os
from importlib import metadata

from qbrec.doctor.finding import Finding, of_error, ok, warning
from qbrec.errors import QbrecError
from qbrec.jobs.cluster import VARIABLES, connect

_CONNECT_S, _ANSWER_S = 3.0, 5.0


def check_cluster() -> list[Finding]:
    """Nothing where no cluster is named."""
    if not any(os.environ.get(name) for name in VARIABLES):
        return []
    try:
        client = connect(None, submitting=True, connect_s=_CONNECT_S, answer_s=_ANSWER_S)
    except QbrecError as error:
        return [of_error("cluster", error)]
    theirs, ours = client.ray_version, metadata.version("ray")
    found = f"{client.get_address()}: Ray {theirs}, ours {ours}"
    if theirs != ours:
        return [
            warning(
                "cluster",
                found,
                wrong="Ray wants the same version everywhere",
                fix=f"pip install 'ray[data,default,train]=={theirs}', or bring the nodes to {ours}",
            )
        ]
    return [ok("cluster", found)]
