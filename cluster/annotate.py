"""The page where people rank, served: by Ray Serve, on this machine alone or, with a certificate, to others."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.desk.desk import open_desk, read_guidelines
from rlhf.errors import PlacementError, TenfoldError
from rlhf.ports import Console

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

MOST_REQUESTS = 256  # under way at once; others wait in line
NAME = "annotate"


class AddressError(TenfoldError):
    """The page cannot be served there."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the page is served, and how it is reached.

    Raises AddressError: beyond this machine without TLS, a certificate without its key or the other way round, one that
    cannot be read.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None  # PEM, with its chain
    key: Path | None = None  # PEM, without a passphrase
    behind_proxy: bool = False  # whether a reverse proxy has the certificate
    url: str | None = None  # that people enter; None: host and port

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            given, missing = ("--key", "--certificate") if self.certificate is None else ("--certificate", "--key")
            raise AddressError(f"{given} was given without {missing}.", remedy=f"Give {missing} too.")
        if self.certificate is not None and self.key is not None:
            _check_certificate(self.certificate, self.key)
        elif not self.behind_proxy and not is_loopback(self.host):
            raise AddressError(
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


def invite(folder: Path, name: str, role: str, *, renew: bool = False) -> str:
    """The token of a new person or, with `renew`, a new one of a person who lost theirs. Raises DeskError."""
    if role not in ("annotator", "lead"):
        raise AddressError(f"--role {role} is not known.", limit="It is annotator or lead.")
    with open_desk(folder) as desk:
        return desk.renew_token(name) if renew else desk.invite(name, role)


def page_of(folder: str, language: str | None, secure: bool) -> FastAPI:
    """The application of the run in this folder, with a desk of its own; for any server of ASGI applications."""
    from cluster.page.app import make_app
    from configs.load import load_recipe

    recipe = load_recipe(Path(folder) / "recipe.yaml")
    return make_app(
        open_desk(Path(folder), recipe),
        run=Path(folder).resolve().name,
        guidelines=read_guidelines(recipe.desk.guidelines),
        language=language,
        secure=secure,
    )


def serve_page(folder: Path, address: Address, language: str | None, console: Console) -> None:
    """Serves the page until the process is told to stop; what people did is on the disk at every moment."""
    from configs.load import load_recipe

    recipe = load_recipe(folder / "recipe.yaml")
    read_guidelines(recipe.desk.guidelines)
    with open_desk(folder, recipe) as desk:  # what is wrong with it is told now
        people = desk.people()
        progress = desk.progress()
    _check_port(address)
    with served(folder, address, language, console):
        console.say(f"The page is at {address.shown} (Ctrl-C ends it). {progress.num_groups} prompts are on the desk.")
        if not people:
            console.say(f"Nobody is invited yet: tenfold annotate {folder} --invite NAME [--role lead]")
        threading.Event().wait()  # ends by Ctrl-C or SIGTERM, which raise


@contextmanager
def served(folder: Path, address: Address, language: str | None, console: Console) -> Iterator[None]:
    """The page on Ray Serve, on a Ray of its own, for as long as the block lasts."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    from cluster.ray_session import RaySession
    from configs.schema import ClusterConfig

    with RaySession(ClusterConfig()):
        with console.task("start the page"):
            options = HTTPOptions(
                host=address.host,
                port=address.port,
                ssl_certfile=str(address.certificate) if address.certificate else None,
                ssl_keyfile=str(address.key) if address.key else None,
            )
            serve.start(http_options=options, logging_config={"log_level": "WARNING", "enable_access_log": False})
        try:
            with console.task("open the desk"):
                serve.run(deployment(folder, language, address.secure), name=NAME, route_prefix="/")
            yield
        finally:
            serve.shutdown()


def deployment(folder: Path, language: str | None, secure: bool) -> Application:
    """The page as an application of Ray Serve: one replica, whose threads share a desk."""
    from ray import serve

    place = str(folder.resolve())
    page = serve.ingress(lambda: page_of(place, language, secure))()
    made = serve.deployment(page, name=NAME, max_ongoing_requests=MOST_REQUESTS, ray_actor_options={"num_cpus": 0.5})
    return made.bind()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_certificate(certificate: Path, key: Path) -> None:
    try:
        # No passphrase is asked for: nobody may be there to answer.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise AddressError(
            f"--certificate {certificate} with --key {key} cannot be used: {error}.",
            limit="Both are PEM files; the key belongs to the certificate and has no passphrase.",
        ) from error


def _check_port(address: Address) -> None:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((address.host, address.port))
        except (OSError, OverflowError) as error:
            raise PlacementError(
                f"Nothing can listen at --host {address.host} --port {address.port}: {error}.",
                remedy="Give another --port, or end what uses it.",
            ) from error
