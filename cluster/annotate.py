"""The page where people rank, served: by Ray Serve, on this machine alone or, with a certificate, to others."""

from __future__ import annotations

import logging
import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.desk.desk import open_desk, read_guidelines
from rlhf.errors import ServeError
from rlhf.loopback import is_loopback
from rlhf.manifest import RECIPE
from rlhf.ports import Console

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

    from cluster.serve import Place

# What takes long to import is imported where it is used: an invitation needs none of it.
MOST_REQUESTS = 256  # under way at once; others wait in line
NAME = "annotate"
PORT_S = 10.0  # that the port of a page that was killed is waited for
GRACE_S = 5.0  # that requests under way have at the end


@dataclass(frozen=True, slots=True)
class Address:
    """Where the page is served, and how it is reached.

    Raises ServeError: beyond this machine without TLS, a certificate without its key or the other way round, one that
    cannot be read, a `url` that is none.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    certificate: Path | None = None  # PEM, with its chain
    key: Path | None = None  # PEM, without a passphrase
    behind_proxy: bool = False  # whether a reverse proxy has the certificate
    url: str | None = None  # that people enter; None: host and port

    def __post_init__(self) -> None:
        if self.url is not None and not re.match(r"https?://[^/\s]+(/\S*)?$", self.url):
            raise ServeError(f"--url {self.url} is no address.", limit="It begins with http:// or https://.")
        if (self.certificate is None) != (self.key is None):
            given, missing = ("--key", "--certificate") if self.certificate is None else ("--certificate", "--key")
            raise ServeError(f"{given} was given without {missing}.", remedy=f"Give {missing} too.")
        if self.certificate is not None and self.key is not None:
            _check_certificate(self.certificate, self.key)
        elif not self.behind_proxy and not is_loopback(self.host):
            raise ServeError(
                f"--host {self.host} reaches beyond this machine, and tokens would go over the network in the clear.",
                remedy="Give --certificate and --key, or leave --host out and put a reverse proxy with TLS before it "
                "(--behind-proxy; docs/annotate.md has its lines).",
            )

    @property
    def secure(self) -> bool:
        """Whether browsers reach it by TLS."""
        return self.certificate is not None or self.behind_proxy

    @property
    def shown(self) -> str:
        """The address that people enter."""
        if self.url:
            return self.url.rstrip("/")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.certificate else 'http'}://{host}:{self.port}"

    def link(self, token: str) -> str:
        """An invitation's link. The token is in its fragment, which no server and no log sees."""
        return f"{self.shown}/#{token}"


def page_of(folder: str, language: str | None, secure: bool) -> FastAPI:
    """The application of the run in this folder, with a desk of its own; for any server of ASGI applications."""
    from cluster.page.app import make_app
    from configs.load import load_recipe

    recipe = load_recipe(Path(folder) / RECIPE)
    return make_app(
        open_desk(Path(folder), recipe),
        run=Path(folder).resolve().name,
        guidelines=read_guidelines(recipe.desk.guidelines),
        language=language,
        secure=secure,
    )


@contextmanager
def serving_page(folder: Path, address: Address, language: str | None, console: Console) -> Iterator[Callable[[], str]]:
    """The page on Ray Serve, on a Ray of its own, as a function that says how it is; it ends with the block.

    Raises ServeError where the port is taken, StoreError where the desk cannot be opened, DataError where the
    guidelines cannot be read.
    """
    from cluster.ray_session import RaySession
    from cluster.serve import Place
    from configs.load import load_recipe
    from configs.schema import ClusterConfig

    recipe = load_recipe(folder / RECIPE)
    _wait_for_port(Place(address.host, address.port), console)
    read_guidelines(recipe.desk.guidelines)
    with open_desk(folder, recipe) as desk:  # what is wrong with it is told now
        if not desk.people():
            console.say(f"Nobody is invited yet: tenfold annotate {folder} --invite NAME [--role lead]")
    with RaySession(ClusterConfig()):
        from ray import serve
        from ray.serve.config import HTTPOptions

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what is ready where is told by us
        options = HTTPOptions(
            host=address.host,
            port=address.port,
            ssl_certfile=str(address.certificate) if address.certificate else None,
            ssl_keyfile=str(address.key) if address.key else None,
        )
        try:
            with console.task("start the page"):
                serve.start(http_options=options, logging_config={"log_level": "WARNING", "enable_access_log": False})
                try:
                    serve.run(deployment(folder, language, address.secure), name=NAME, route_prefix="/")
                except RuntimeError as error:
                    raise ServeError(f"The page did not start: {error}") from error
            yield lambda: _state(serve.status().applications.get(NAME))
        finally:
            with console.task("stop the page"):
                serve.shutdown()


def deployment(folder: Path, language: str | None, secure: bool) -> Application:
    """The page as an application of Ray Serve: one replica, whose threads share a desk."""
    from ray import serve

    from cluster.serve import READY_S

    place = str(folder.resolve())
    page = serve.ingress(lambda: page_of(place, language, secure))()
    made = serve.deployment(
        page,
        name=NAME,
        max_ongoing_requests=MOST_REQUESTS,
        ray_actor_options={"num_cpus": 0.5},
        health_check_timeout_s=READY_S,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=GRACE_S,
    )
    return made.bind()


def _check_certificate(certificate: Path, key: Path) -> None:
    try:
        # No passphrase is asked for: nobody may be there to answer.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise ServeError(
            f"--certificate {certificate} with --key {key} cannot be used: {error}.",
            limit="Both are PEM files; the key belongs to the certificate and has no passphrase.",
        ) from error


def _wait_for_port(place: Place, console: Console) -> None:
    """Returns once the port is free: what a page that was killed leaves takes a moment to end. Raises ServeError."""
    from cluster.serve import check_port

    until = time.monotonic() + PORT_S
    try:
        check_port(place)
    except ServeError:
        console.say(f"port {place.port} is in use; waiting for {PORT_S:.0f} s at most, lest a page was just killed")
        while time.monotonic() < until:
            time.sleep(0.2)
            try:
                return check_port(place)
            except ServeError:
                continue
        raise


def _state(application: Any) -> str:
    return "GONE" if application is None else str(application.status.value)
