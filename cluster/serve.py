"""`tenfold serve`: an OpenAI-compatible endpoint on Ray Serve LLM, for as long as a block lasts."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from cluster.api_key import digest_of, is_loopback
from cluster.served import BASE, Served
from configs.schema import Recipe
from rlhf.errors import PlacementError, ServeError
from rlhf.ports import Console

APP = "tenfold"  # the name of the Serve application
EVERYWHERE = ("0.0.0.0", "::")  # hosts that stand for all addresses of a machine
GIB = 1024**3
CPU_KV_CACHE_GIB = 1.0  # vLLM would take most of the machine's memory
MAX_SLOTS = 8  # adapters that answer in the same batch; further ones take turns
HEALTH_S, READY_S = 5.0, 60.0
GONE = "GONE"
OVER = (GONE, "DEPLOY_FAILED", "NOT_STARTED")  # states that an endpoint does not come back from
GRACE_S = 5.0  # that open answers have at the end


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

            from cluster.ingress import CPUS, build_endpoint
        check_alone(recipe.cluster.address)
        on_gpu = session.resources.gpus > 0 and recipe.cluster.gpus != 0
        check_fits(recipe, session.resources.cpus, session.resources.gpus if on_gpu else 0, CPUS)
        try:
            with console.task(f"start the endpoint: {', '.join(served.names)}"):
                serve.start(
                    proxy_location="HeadOnly",
                    http_options={"host": place.host, "port": place.port},
                    logging_config={"log_level": "WARNING", "enable_access_log": False},
                )
                endpoint = build_endpoint(
                    llm_config(served, recipe, on_gpu=on_gpu),
                    served.names,
                    served.eos_ids,
                    None if key is None else digest_of(key),
                )
                try:
                    serve.run(endpoint, name=APP, route_prefix="/")
                except RuntimeError as error:
                    raise _not_started(error) from error
                url = place.url(None if recipe.cluster.address is None else head_address())
                if recipe.cluster.address is None or not is_loopback(place.host):
                    check_answers(url, key)
            yield Endpoint(url, lambda: _state(serve))
        finally:
            with console.task("stop the endpoint"):
                _stop(serve, recipe.cluster.address, console)


def llm_config(served: Served, recipe: Recipe, *, on_gpu: bool) -> Any:
    """Ray Serve LLM's description of the engine."""
    from ray.serve.llm import LLMConfig

    width = recipe.generator.tensor_parallel if on_gpu else 1
    bundle = {"CPU": recipe.cluster.cpus_per_worker} | ({"GPU": 1} if on_gpu else {})
    return LLMConfig(
        model_loading_config={"model_id": BASE, "model_source": str(served.base)},
        engine_kwargs=engine_settings(served, recipe, on_gpu=on_gpu),
        accelerator_type=None,
        placement_group_config={"bundles": [bundle] * width},
        runtime_env={"env_vars": environment(recipe, on_gpu=on_gpu)},
        deployment_config={
            "num_replicas": 1,
            "max_constructor_retry_count": 1,  # what fails once fails again, and would be silent for minutes
            "health_check_timeout_s": READY_S,  # a CPU that computes is slow to say so
            "graceful_shutdown_timeout_s": GRACE_S,
            "graceful_shutdown_wait_loop_s": 1.0,
            "ray_actor_options": {"num_cpus": recipe.cluster.cpus_per_worker},
        },
        callback_config={"callback_class": "cluster.local_model.LocalModel"},  # pyright: ignore[reportArgumentType]
        log_engine_metrics=False,
    )


def engine_settings(served: Served, recipe: Recipe, *, on_gpu: bool) -> dict[str, Any]:
    """vLLM's arguments: those of the run's generator, but a GPU is the endpoint's alone."""
    config = recipe.generator
    kv_cache_gib = config.kv_cache_gib or (None if on_gpu else CPU_KV_CACHE_GIB)
    settings: dict[str, Any] = {
        "dtype": config.dtype or recipe.model.dtype,
        "max_model_len": -1,  # the model's own context, or as much of it as the KV cache can hold
        "block_size": config.block_tokens,
        "max_num_seqs": config.max_running,
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * GIB),
        "enable_prefix_caching": True,
        "enforce_eager": config.enforce_eager or not on_gpu,
        "tensor_parallel_size": config.tensor_parallel if on_gpu else 1,
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
    }
    if not on_gpu:
        # A prompt that is cut over two steps makes vLLM rewind its random generator, which those of CPUs cannot.
        settings |= {"distributed_executor_backend": "mp", "enable_chunked_prefill": False}
    if served.adapters:
        settings |= {
            "enable_lora": True,
            "max_loras": min(len(served.adapters), MAX_SLOTS),
            "max_cpu_loras": len(served.adapters),
            "max_lora_rank": served.rank,
            "lora_target_modules": list(served.targets),
            "lora_modules": [{"name": name, "path": str(path)} for name, path in served.adapters.items()],
        }
    return settings


def environment(recipe: Recipe, *, on_gpu: bool) -> dict[str, str]:
    """What the engine's processes find in their environment."""
    always = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if on_gpu:
        return always
    threads = recipe.cluster.threads or len(os.sched_getaffinity(0))
    # Compiling the sampler takes longer than it saves. Bound to cores, vLLM would leave one of them idle.
    return always | {
        "TORCH_COMPILE_DISABLE": "1",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


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
    """Raises ServeError unless the endpoint lists its models."""
    import httpx

    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        httpx.get(f"{url}/models", headers=headers, timeout=READY_S, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        raise ServeError(
            f"The endpoint at {url} does not answer: {error}.",
            remedy="See that this machine reaches that address; else look into the logs of Ray Serve.",
        ) from error


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
    try:
        # A Ray of our own ends as a whole; the end of Serve in it would be told as a failed task of Ray's.
        serve.delete(APP) if address is None else serve.shutdown()
    except Exception as error:  # it may not have begun, or what it stood on is gone
        console.warn(f"Ray Serve did not end by itself: {error}")


def _not_started(error: RuntimeError) -> ServeError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if ("Error:" in line or "Exception:" in line) and "RayTaskError" not in line]
    return ServeError(
        f"The model did not start: {(causes or lines or ['no reason given'])[-1]}",
        remedy="The logs tell the whole; check memory (generator.kv_cache_gib, generator.dtype) and adapters.",
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Imports what talks into the terminal in its own format, and sends all programs' records there."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    yield
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("ray.serve", "ray.llm", "vllm"):
        logging.getLogger(name).setLevel(logging.ERROR)
