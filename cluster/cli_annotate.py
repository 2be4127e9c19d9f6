"""The command `tenfold annotate`."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.command import RunName, leave
from cluster.console import StreamConsole, make_console

if TYPE_CHECKING:
    from cluster.annotate import Address

Role = Literal["annotator", "lead"]


def annotate(
    run: RunName,
    host: Annotated[
        str, typer.Option(help="The address to listen on. Others than loopback need a certificate.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8080,
    certificate: Annotated[Path | None, typer.Option(help="A PEM file: the certificate with its chain.")] = None,
    key: Annotated[Path | None, typer.Option(help="A PEM file: the certificate's key.")] = None,
    behind_proxy: Annotated[
        bool, typer.Option("--behind-proxy", help="A reverse proxy has the certificate (docs/annotate.md).")
    ] = False,
    url: Annotated[
        str | None, typer.Option(help="The address that people enter, for the links of invitations.")
    ] = None,
    invite: Annotated[str | None, typer.Option(metavar="NAME", help="Print the link of a new person, and end.")] = None,
    renew: Annotated[
        str | None, typer.Option(metavar="NAME", help="Print a new link of a person who lost theirs, and end.")
    ] = None,
    role: Annotated[Role | None, typer.Option(help="Of who is invited. Default: annotator.")] = None,
    lang: Annotated[
        Literal["en", "zh"] | None, typer.Option(help="The page's first language. Default: the browser's.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the link, or where the page is, as a line of JSON.")
    ] = False,
) -> None:
    """Serve the page where people rank a run's answers, or invite somebody to it. Ctrl-C ends it."""
    console = make_console(sys.stderr if as_json else sys.stdout)

    def work() -> None:
        from cluster.annotate import Address
        from cluster.runs import find_run
        from rlhf.errors import ServeError

        if invite is not None and renew is not None:
            raise ServeError("--invite and --renew were both given.", remedy="Give one of them.")
        if role is not None and invite is None:
            raise ServeError(
                f"--role {role} is for --invite.", remedy="Leave it out: who gets a new link keeps their role."
            )
        address, folder = Address(host, port, certificate, key, behind_proxy, url), find_run(run)
        if invite is not None or renew is not None:
            _invite(folder, address, invite, renew, role or "annotator", as_json)
        else:
            _serve(console, folder, address, lang, as_json)

    leave(console, f"tenfold annotate {run}", work)


def _invite(folder: Path, address: Address, invite: str | None, renew: str | None, role: Role, as_json: bool) -> None:
    from rlhf.desk.desk import open_desk

    with open_desk(folder) as desk:
        token = desk.renew_token(renew) if renew is not None else desk.invite(invite or "", role)
        name = renew or invite
        person = next(one for one in desk.people() if one.name == name)
    if as_json:
        typer.echo(json.dumps({"name": name, "role": person.role, "link": address.link(token)}, ensure_ascii=False))
    else:
        # Not through the console, which hides what looks like a secret: this one is to be handed on.
        typer.echo(address.link(token))
        typer.echo(f"For {name} ({person.role}) alone, and shown this once: whoever has the link is {name}.")


def _serve(console: StreamConsole, folder: Path, address: Address, lang: str | None, as_json: bool) -> None:
    from cluster.annotate import serving_page
    from cluster.serve import wait

    with ExitStack() as stack:
        with console:  # it tells what goes on while there is something to tell, not all day
            state = stack.enter_context(serving_page(folder, address, lang, console))
        if as_json:
            typer.echo(json.dumps({"url": address.shown}))
            sys.stdout.flush()
        else:
            console.say(f"ready: people rank at {address.shown} with the links of their invitations. Ctrl-C ends it.")
        try:
            wait(state, console.warn)
        except KeyboardInterrupt:
            console.say("stopping (once more to leave at once); all that people did is kept")
        with console:
            stack.close()
