"""`tenfold serve`: an OpenAI-compatible endpoint on Ray Serve LLM, for as long as a block lasts."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from cluster.api_key import digest_of
from cluster.serve_engine import llm_config
from cluster.served import Served
from configs.schema import Recipe
from rlhf.errors import PlacementError, ServeError
from rlhf.loopback import is_loopback
from rlhf.ports import Console

APP = "tenfold"  # the name of the Serve application
EVERYWHERE = ("0.0.0.0", "::")  # hosts that stand for all addresses of a machine
TELEMETRY = "llm_serve_telemetry"  # an actor of Ray Serve LLM's, and its namespace
HEALTH_S, READY_S = 5.0, 60.0
GONE = "GONE"
# Ray Serve ends a proxy that is not ready after three times 5 s, which is soon on a machine that has other work too.
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30"}
OVER = (GONE, "DEPLOY_FAILED", "NOT_STARTED")  # states that an endpoint does not come back from


@dataclass(frozen=True, slots=True)
class Place:
    """Where the endpoint listens."""

    host: str
    port: int

    def url(self, head: str | None = None) -> str:
        """The base URL for OpenAI's client; on all addresses it is that of the `head` node, or of loopback."""
        host = head or {"0.0.0.0": "127.0.0.1", "::": "::1"}[self.host] if self.host in EVERYWHERE else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint that is ready."""

    url: str  # the base URL for OpenAI's client
    state: Callable[[], str]  # how Ray Serve says it is now


@contextmanager
def serving(served: Served, recipe: Recipe, place: Place, key: str | None, console: Console) -> Iterator[Endpoint]:
    """The endpoint, once it is ready; nothing of it is left when the block ends.

    Ray is started on this machine, or reached at `cluster.address`; there, the endpoint listens on the head node.

    Raises PlacementError where Ray does not start or answer, ServeError where the port is taken, Serve runs on the
    cluster already, or the model does not start.
    """
    from cluster.workplace import own_ray

    if recipe.cluster.address is None:
        check_port(place)
    with own_ray(recipe, console) as session:
        with console.task("load Ray Serve LLM"), _quietly():
            from ray import serve
            from ray.exceptions import RayError

            from cluster.ingress import CPUS, build_endpoint
        check_alone(recipe.cluster.address)
        on_gpu = session.resources.gpus > 0 and recipe.cluster.gpus != 0
        check_fits(recipe, session.resources.cpus, session.resources.gpus if on_gpu else 0, CPUS)
        try:
            with console.task(f"start the endpoint: {', '.join(served.names)}"):
                endpoint = build_endpoint(
                    llm_config(served, recipe, on_gpu=on_gpu),
                    served.names,
                    served.eos_ids,
                    None if key is None else digest_of(key),
                )
                try:
                    with suppress(TimeoutError):  # of the proxy; whether it has come by the end is seen by asking it
                        serve.start(
                            proxy_location="HeadOnly",
                            http_options={"host": place.host, "port": place.port},
                            logging_config={"log_level": "WARNING", "enable_access_log": False},
                            controller_options={"runtime_env": {"env_vars": PATIENCE}},
                        )
                    serve.run(endpoint, name=APP, route_prefix="/")
                except (RuntimeError, RayError) as error:
                    raise _not_started(error) from error
                url = place.url(None if recipe.cluster.address is None else head_address())
                if recipe.cluster.address is None or not is_loopback(place.host):
                    check_answers(url, key)
            yield Endpoint(url, lambda: _state(serve))
        finally:
            with console.task("stop the endpoint"):
                _stop(serve, recipe.cluster.address, console)


def check_port(place: Place) -> None:
    """Raises ServeError where this machine has no such address, or something listens there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        raise ServeError(
            f"Nothing can listen on {place.host}, port {place.port}: {getattr(error, 'strerror', None) or error}.",
            remedy="Choose another --port, or an address of this machine as --host.",
        ) from error


def free_port() -> int:
    """A port of loopback that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def check_alone(address: str | None) -> None:
    """Raises ServeError where Serve runs on the cluster already: its port would be another one, its end ours."""
    from ray import serve

    status = serve.status()
    if status.proxies or status.applications:
        raise ServeError(
            f"Ray Serve runs already on {address}, with {', '.join(status.applications) or 'no application'}.",
            limit="An endpoint has Serve, and its port, for itself.",
            remedy="End it with `serve shutdown` on the head node, or leave cluster.address out.",
        )


def check_fits(recipe: Recipe, cpus: float, gpus: float, front_cpus: float) -> None:
    """Raises PlacementError where Ray counts less than the endpoint takes: it would wait for ever."""
    needs_gpus = recipe.generator.tensor_parallel if gpus else 0
    needs_cpus = math.ceil(recipe.cluster.cpus_per_worker * (1 + max(1, needs_gpus)) + front_cpus)
    if gpus < needs_gpus or cpus < needs_cpus:
        raise PlacementError(
            f"The endpoint takes {needs_cpus} CPUs and {needs_gpus} GPUs.",
            limit=f"Ray counts {cpus:g} CPUs and {gpus:g} GPUs.",
            remedy="Lower generator.tensor_parallel or cluster.cpus_per_worker, or add nodes.",
        )


def check_answers(url: str, key: str | None) -> None:
    """Raises ServeError unless the endpoint lists its models, soon."""
    import httpx

    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    deadline = time.monotonic() + READY_S
    while True:
        try:
            httpx.get(f"{url}/models", headers=headers, timeout=READY_S, trust_env=False).raise_for_status()
            return
        except httpx.HTTPError as error:
            if time.monotonic() > deadline:
                raise ServeError(
                    f"The endpoint at {url} does not answer: {error}.",
                    remedy="See that this machine reaches that address; else look into the logs of Ray Serve.",
                ) from error
        time.sleep(1.0)


def head_address() -> str:
    """The address of the cluster's head node."""
    import ray

    return next(
        str(node["NodeManagerAddress"]) for node in ray.nodes() if "node:__internal_head__" in node["Resources"]
    )


def wait(
    state: Callable[[], str], warn: Callable[[str], None], *, pause: Callable[[float], None] = time.sleep
) -> NoReturn:
    """Waits for as long as there is an endpoint; says when it gets ill, and when it is well again.

    Raises ServeError when it is gone, or does not come back.
    """
    before = state()
    while before not in OVER:
        pause(HEALTH_S)
        now = state()
        if now != before:
            warn(f"the endpoint is {now.lower()}; it was {before.lower()}")
        before = now
    raise ServeError(
        f"The endpoint has ended by itself: it is {before.lower()}.", remedy="The logs of Ray Serve say why."
    )


def _state(serve: Any) -> str:
    try:
        app = serve.status().applications.get(APP)
    except Exception:  # whatever is missing of Ray: without it there is no endpoint
        return GONE
    return GONE if app is None else str(getattr(app.status, "value", app.status))


def _stop(serve: Any, address: str | None, console: Console) -> None:
    import ray

    try:
        # A Ray of our own ends as a whole; the end of Serve in it would be told as a failed task of Ray's.
        serve.delete(APP) if address is None else serve.shutdown()
    except Exception as error:  # it may not have begun, or what it stood on is gone
        console.warn(f"Ray Serve did not end by itself: {error}")
    with suppress(ValueError):  # there is none: Ray Serve LLM starts it beside an engine, and leaves it there
        ray.kill(ray.get_actor(TELEMETRY, namespace=TELEMETRY))


def _not_started(error: Exception) -> ServeError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if ("Error:" in line or "Exception:" in line) and "RayTaskError" not in line]
    return ServeError(
        f"The endpoint did not start: {(causes or lines or ['no reason given'])[-1]}",
        remedy="The logs tell the whole; check memory (generator.kv_cache_gib, generator.dtype) and adapters.",
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Imports Ray Serve LLM and vLLM without what they say, and without the records that all programs then make."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("ray.serve", "ray.llm", "vllm"):
        logging.getLogger(name).setLevel(logging.ERROR)
