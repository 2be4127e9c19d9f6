"""The command `tenfold annotate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.console import make_console


def annotate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the name of a run in ./runs.")],
    host: Annotated[str, typer.Option(help="The address to listen at; beyond this machine with a certificate.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 8000,
    certificate: Annotated[Path | None, typer.Option(help="A PEM file: the certificate with its chain.")] = None,
    key: Annotated[Path | None, typer.Option(help="A PEM file: the certificate's key.")] = None,
    behind_proxy: Annotated[
        bool, typer.Option("--behind-proxy", help="A reverse proxy has the certificate (docs/annotate.md).")
    ] = False,
    url: Annotated[str | None, typer.Option(help="The address that people enter, for the links of invitations.")] = (
        None
    ),
    invite: Annotated[str | None, typer.Option(metavar="NAME", help="Print the link of a new person, and end.")] = None,
    renew: Annotated[
        str | None, typer.Option(metavar="NAME", help="Print a new link of a person who lost theirs, and end.")
    ] = None,
    role: Annotated[Literal["annotator", "lead"], typer.Option(help="Of who is invited.")] = "annotator",
    lang: Annotated[
        Literal["en", "zh"] | None, typer.Option(help="The page's first language. Default: the browser's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the invitation as JSON.")] = False,
) -> None:
    """Serve the page where people rank a run's answers, or invite somebody to it."""
    console = make_console(sys.stderr if as_json else sys.stdout)

    def work() -> None:
        from cluster.annotate import Address, AddressError, serve_page
        from cluster.annotate import invite as ask_in
        from cluster.runs import find_run

        if invite and renew:
            raise AddressError("--invite and --renew were both given.", remedy="Give one of them.")
        address = Address(host, port, certificate, key, behind_proxy, url)
        folder = find_run(run)
        name = invite or renew
        if name is None:
            serve_page(folder, address, lang, console)
            return
        link = address.link(ask_in(folder, name, role, renew=renew is not None))
        if as_json:
            about = {"name": name, "link": link} | ({} if renew else {"role": role})
            typer.echo(json.dumps(about, ensure_ascii=False))
        else:
            # Not through the console, which cuts lines and hides what looks like a secret: this one is to be handed on.
            typer.echo(f"{link}\nIt is {name}'s alone, and is shown this once: whoever has it is {name}.")

    with console:
        from cluster.run import exit_code

        code = exit_code(console, f"tenfold annotate {run}", work)
    if code:
        raise typer.Exit(code)
