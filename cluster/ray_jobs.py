"""`Jobs` on Ray: its job server, spoken to with its token."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast

import requests

from cluster.jobs import Job, JobError, JobInfo, Parts, State
from rlhf.loopback import is_loopback

Access = Literal["open", "token", "unknown"]  # whether the job server asks who we are
ASK_S = 10.0  # for a first answer
TERMINATED = 143  # the exit code of a run that SIGTERM has ended
NUM_LISTED = 10_000  # the most that Ray lists of a kind
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray takes them in the place of the address that it is given
_Answer = TypeVar("_Answer")


class RayJobs:
    """The jobs of the Ray cluster at an address such as http://HEAD:8265, reached when made.

    The token is Ray's own: RAY_AUTH_TOKEN, the file in RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.

    Raises JobError: an address that is none, nobody there, no token (401) or a wrong one (403).
    """

    def __init__(self, address: str) -> None:
        self._address = checked(address)
        # A broken token file, or none where RAY_AUTH_MODE=token asks for one, is a mistake too.
        self._client = self._ask(self._connect)

    @property
    def address(self) -> str:
        return self._address

    @property
    def limit_bytes(self) -> int:
        from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE  # has no public name

        return GCS_STORAGE_MAX_SIZE

    def submit(self, job: Job) -> None:
        self._ask(
            lambda: self._client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=job.job_id,
                runtime_env=dict(job.runtime_env),
                metadata=dict(job.metadata),
            )
        )

    def list(self) -> Sequence[JobInfo]:
        return [_info(details) for details in self._ask(self._client.list_jobs) if details.submission_id]

    def info(self, job_id: str) -> JobInfo:
        return _info(self._ask(lambda: self._client.get_job_info(job_id)))

    def logs(self, job_id: str) -> str:
        return self._ask(lambda: self._client.get_job_logs(job_id))

    def tail(self, job_id: str) -> Iterator[str]:
        import aiohttp

        parts: AsyncIterator[str] = aiter(self._client.tail_job_logs(job_id))

        async def next_part() -> str | None:
            return await anext(parts, None)

        with asyncio.Runner() as loop:
            while True:
                try:
                    part = loop.run(next_part())
                except aiohttp.WSServerHandshakeError as error:
                    raise self._error(error, error.status) from error
                except (aiohttp.ClientError, RuntimeError, OSError) as error:
                    raise ConnectionError(str(error)) from error
                if part is None:
                    return
                yield part

    def terminate(self, info: JobInfo) -> bool:
        if not info.pid:
            return False
        # Ray has no call for this; a command on the node of the entry point does it.
        self._ask(
            lambda: self._client.submit_job(
                entrypoint=f"kill -TERM {info.pid}",
                submission_id=f"{info.job_id}-stop-{secrets.token_hex(4)}",
                entrypoint_label_selector={"ray.io/node-id": info.node},
            )
        )
        return True

    def stop(self, job_id: str) -> None:
        self._ask(lambda: self._client.stop_job(job_id))

    def parts(self, info: JobInfo) -> Parts:
        if not info.driver:
            return Parts()
        from ray.util.state import list_actors, list_placement_groups

        actors = [
            actor for actor in self._all(list_actors, filters=[("job_id", "=", info.driver)]) if actor.state != "DEAD"
        ]
        groups = self._all(list_placement_groups, filters=[("creator_job_id", "=", info.driver)])
        return Parts(
            frozenset(f"{actor.class_name} {actor.actor_id}" for actor in actors),
            frozenset(group.placement_group_id for group in groups if group.state != "REMOVED"),
            frozenset((actor.node_id or "", actor.pid) for actor in actors if actor.pid),
        )

    def alive(self, processes: frozenset[tuple[str, int]]) -> frozenset[tuple[str, int]]:
        if not processes:
            return frozenset()
        from ray.util.state import list_workers

        # No filter: Ray takes what a filter leaves out for lost, and raises.
        return processes & {(worker.node_id, worker.pid) for worker in self._all(list_workers) if worker.is_alive}

    def _all(self, listing: Callable[..., list[Any]], **keywords: Any) -> list[Any]:
        return self._ask(lambda: listing(self._address, limit=NUM_LISTED, raise_on_missing_output=False, **keywords))

    def _connect(self) -> Any:
        # What `ray job submit` does before it makes its client; without it no token is sent.
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)
        setup = logging.getLogger("ray._private.authentication.authentication_token_setup")
        setup.setLevel(logging.ERROR)  # it warns of a cluster that "is enabled for", which is elsewhere
        self._sent_token = maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        return JobSubmissionClient(self._address)

    def _ask(self, call: Callable[[], _Answer]) -> _Answer:
        from ray.exceptions import AuthenticationError
        from ray.util.state.exception import RayStateApiException

        try:
            with _no_overrides():
                return call()
        except AuthenticationError as error:
            # Two kinds: the server's answer, and a token that cannot be read here.
            status = 401 if "Authentication required" in str(error) else 403 if "failed" in str(error) else None
            raise self._error(error, status) from error
        except requests.HTTPError as error:
            raise self._error(error, error.response.status_code if error.response is not None else None) from error
        except (RuntimeError, OSError, ValueError, RayStateApiException) as error:
            raise self._error(error, None) from error

    def _error(self, error: Exception, status: int | None) -> JobError:
        if status == 401:
            return JobError(
                f"{self._address} wants a token (401), and none was sent.",
                remedy="Bring the cluster's token, which stands in ~/.ray/auth_token on its head node: set "
                "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it.",
            )
        if status == 403:
            return JobError(
                f"{self._address} does not take the token that was sent (403).",
                limit=f"It came from {token_source()}.",
                remedy="Bring that cluster's token: ~/.ray/auth_token of its head node.",
            )
        if isinstance(error, (requests.ConnectionError, ConnectionError)):
            return JobError(
                f"{self._address}: nobody answers there.",
                remedy="Give the address of the head node's dashboard (http://HEAD:8265). From outside its network: "
                "`ssh -L 8265:127.0.0.1:8265 HEAD`, or `kubectl port-forward service/NAME-head-svc 8265`.",
            )
        said = " ".join(str(error).split())
        return JobError(f"{self._address}: {said[:2000] or type(error).__name__}")


def checked(address: str) -> str:
    """The address of a job server without what is too much. Raises JobError for anything else."""
    try:
        parts = urllib.parse.urlsplit(address)
        _ = parts.port  # raises where it is none
    except ValueError:
        parts = None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise JobError(
            f"--address {address} is no address of a job server.",
            limit="It is that of the head node's dashboard, without user or password.",
            remedy="Give it as http://HEAD:8265.",
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def access(address: str) -> Access:
    """What the job server says to one who shows no token."""
    try:
        status = requests.get(f"{address}/api/jobs/", timeout=ASK_S, headers={"Accept": "application/json"}).status_code
    except requests.RequestException:
        return "unknown"
    return "open" if status == 200 else "token" if status in (401, 403) else "unknown"


def warnings_of(address: str, found: Access) -> list[str]:
    """What is to be said, loudly, of how a job server is reached."""
    said: list[str] = []
    host = urllib.parse.urlsplit(address).hostname or ""
    if found == "open" and not is_loopback(host):
        said.append(
            f"{address} ASKS FOR NO TOKEN: whoever reaches that port runs any code on the cluster and reads this "
            "job's secrets. Start Ray with a token (its default since 2.60: leave RAY_AUTH_MODE unset or set it to "
            "token), or close the port."
        )
    if address.startswith("http://") and not is_loopback(host):
        said.append(
            f"{address} is not encrypted: token and secrets can be read on the way. Over a network that is not yours "
            "alone use https, or a tunnel (`ssh -L 8265:127.0.0.1:8265 HEAD`)."
        )
    return said


def token_source() -> str:
    """Where the token comes from, for messages."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if os.environ.get(name):
            return name
    return "~/.ray/auth_token"


@contextmanager
def _no_overrides() -> Iterator[None]:
    """The address that was given is the one that is asked, whatever RAY_ADDRESS says."""
    kept = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _info(details: Any) -> JobInfo:
    state = cast(State, details.status.value)
    if state == "FAILED" and details.driver_exit_code == TERMINATED:
        state = "STOPPED"  # it was told to, and ended by itself
    return JobInfo(
        job_id=details.submission_id,
        state=state,
        metadata=details.metadata or {},
        started_ms=details.start_time,
        ended_ms=details.end_time,
        exit_code=details.driver_exit_code,
        message=details.message or "",
        driver=details.job_id or "",
        pid=int(details.driver_info.pid) if details.driver_info else 0,
        node=details.driver_node_id or "",
    )
