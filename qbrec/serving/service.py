"""`qbrec serve`: the HTTP side in replicas of Ray Serve, from start to SIGTERM."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qbrec.config import RootConfig, parse_config
from qbrec.engine.actor_pool import ActorPool, actor_pool
from qbrec.engine.ray_session import ensure_ray
from qbrec.errors import LaunchError
from qbrec.serving.live import LiveModel

if TYPE_CHECKING:
    from ray.serve import Application, Deployment
    from starlette.applications import Starlette

APP = "qbrec"
# Requests that a replica may have open beyond those that wait for lists: it answers them at once, health too.
_ROOM = 256
_LOOK_EVERY_S = 5.0


class Replica:
    """One replica: its own model, its own queue.

    Args:
        config: The configuration, as JSON.
        uri: The version or alias to serve.
        device: Where the encoder runs.
        threads: For ranking, on the CPU.
    """

    def __init__(self, config: dict[str, Any], uri: str, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        logging.getLogger("qbrec.serving").setLevel(logging.INFO)
        self._config = parse_config(config)
        self._live = LiveModel(self._config, uri, device=device)
        self._live.start()

    def __serve_build_asgi_app__(self) -> Starlette:
        """The application, once the replica's event loop runs."""
        from qbrec.serving.http import Api
        from qbrec.serving.metrics import RayMetrics

        return Api(self._live, limits=self._config.serving, observer=RayMetrics()).app()

    def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that raises."""
        assert self._live.is_alive, "nobody looks for new versions any more"


def application(config: RootConfig, uri: str, *, replicas: int, pool: ActorPool) -> Application:
    """The service as an application of Ray Serve.

    Args:
        config: Registry, limits.
        uri: `models:/name@alias` or `models:/name/3`.
        replicas: How many.
        pool: What one of them takes.
    """
    from ray import serve

    limits = config.serving
    deployed = serve.deployment(
        name="recommend",
        num_replicas=replicas,
        # The replica itself answers 503 before that; what is beyond gets a 503 of Ray Serve.
        max_ongoing_requests=limits.max_waiting + _ROOM,
        max_queued_requests=limits.max_waiting,
        graceful_shutdown_timeout_s=limits.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus},
        logging_config={"enable_access_log": False},
    )
    deployment: Deployment = deployed(serve.ingress()(Replica))
    return deployment.bind(config.model_dump(mode="json"), uri, pool.device, pool.num_cpus)


def run_service(
    config: RootConfig, uri: str, *, host: str, port: int, replicas: int, say: Callable[[str], None]
) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are answered before it returns.

    Args:
        config: Registry, limits, cluster.
        uri: `models:/name@alias`, followed as it moves, or `models:/name/3`.
        host: Address to listen on.
        port: Its port.
        replicas: Processes that rank, each with a model of its own.
        say: Told what happens.

    Raises:
        LaunchError: The port is taken, Ray cannot be reached, or has no room.
    """
    stop = threading.Event()
    earlier = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        _serve(config, uri, host=host, port=port, replicas=replicas, say=say, stop=stop)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _serve(
    config: RootConfig,
    uri: str,
    *,
    host: str,
    port: int,
    replicas: int,
    say: Callable[[str], None],
    stop: threading.Event,
) -> None:
    import ray
    from ray import serve

    started = ensure_ray(config.compute)
    try:
        if started:
            _check_port(host, port)
        threads = config.compute.threads_per_worker or 1
        pool = actor_pool(
            config.compute, resources=ray.cluster_resources(), actors=replicas, cpus_per_actor=threads
        )
        if pool.max_size < replicas:
            say(f"there is room for {pool.max_size} of {replicas} replicas: the others wait for nodes")
        _deploy(application(config, uri, replicas=replicas, pool=pool), host=host, port=port)
        say(f"http://{host}:{port}/v1/recommend serves {uri} (ready when /readyz says so)")
        _wait(stop, say)
        say("stopping: requests under way are answered")
        serve.delete(APP)
        serve.shutdown()
    finally:
        if started:
            ray.shutdown()


def _deploy(application: Application, *, host: str, port: int) -> None:
    import ray
    from ray import serve

    try:
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        serve.run(application, name=APP, route_prefix="/")
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        raise LaunchError(
            f"Ray Serve does not start the service: {_reasons() or error}",
            where=f"{host}:{port}",
            fix="look for room and memory on the nodes, and at logs/serve in Ray's session folder",
        ) from error


def _reasons() -> str:
    """What Ray Serve says of replicas that it cannot make; empty where there is no application yet."""
    from ray import serve

    found = serve.status().applications.get(APP)
    return "" if found is None else " ".join(one.message for one in found.deployments.values())


def _wait(stop: threading.Event, say: Callable[[str], None]) -> None:
    """Until told to stop; says when the application is in another state.

    Raises:
        LaunchError: Ray is gone.
    """
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    before = "RUNNING"
    while not stop.wait(_LOOK_EVERY_S):
        try:
            found = serve.status().applications.get(APP)
        except (ray.exceptions.RayError, RayServeException) as error:
            raise LaunchError(
                f"Ray Serve does not answer any more: {str(error).splitlines()[0]}",
                where=APP,
                fix="look at the cluster, then run the same command again",
            ) from error
        now = "gone" if found is None else str(found.status.value)
        if now != before:
            say(f"the application is {now}" + (f": {found.message}" if found and found.message else ""))
            before = now


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise LaunchError(
            f"cannot listen there: {error.strerror or error}",
            where=f"{host}:{port}",
            fix="choose another --port or --host",
        ) from error
