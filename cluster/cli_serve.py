"""The commands `tenfold serve` and `tenfold chat`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.console import StreamConsole, make_console

if TYPE_CHECKING:
    from cluster.serve import Place
    from cluster.served import Served
    from configs.schema import Recipe

Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=FOLDER", help="A further adapter on the same base; repeatable."),
]
KeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="Holds the API key; needed beyond loopback.")
]


def register(app: typer.Typer) -> None:
    """Adds both commands."""
    app.command("serve")(serve)
    app.command("chat")(chat)


def serve(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the name of a run in ./runs.")],
    host: Annotated[str, typer.Option(help="The address to listen on. Others than loopback need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    api_key_file: KeyFile = None,
    adapter: Adapters = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster to serve on. Default: cluster.address of the run's recipe.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be served, and start nothing.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON when it is ready; the rest on standard error.")
    ] = False,
) -> None:
    """Serve a run's model and its adapters by name, as OpenAI's API. Ctrl-C ends it."""
    console = make_console(sys.stderr if as_json else sys.stdout)

    def work() -> None:
        from cluster.api_key import read_key
        from cluster.serve import Place

        key, place = read_key(api_key_file, host, console.warn), Place(host, port)
        recipe, what = _found(run, adapter)
        if address is not None:
            recipe = _on(recipe, address)
        if dry_run:
            _print_plan(console, what, recipe, place, key is not None, as_json)
        else:
            _serve(console, what, recipe, place, key, api_key_file, as_json)

    _exit(console, f"tenfold serve {run}", work)


def chat(
    target: Annotated[str, typer.Argument(metavar="RUN|URL", help="A run, or an endpoint (http://HOST:PORT).")],
    model: Annotated[str | None, typer.Option(help="Which of the models. Default: what was trained last.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    api_key_file: KeyFile = None,
    adapter: Adapters = None,
) -> None:
    """Talk to a model in the terminal. For a run, an endpoint on loopback is started, and ended afterwards."""
    console = make_console()

    def work() -> None:
        from cluster.api_key import read_key
        from cluster.chat import Chat, is_url, line_reader
        from cluster.serve import Place, free_port, serving

        with ExitStack() as stack:
            if is_url(target):
                url, key = target, read_key(api_key_file, "localhost", console.warn)
            else:
                recipe, what = _found(target, adapter)
                place, key = Place("127.0.0.1", free_port()), None
                with console:
                    url = stack.enter_context(serving(what, _on(recipe, None), place, key, console)).url
            talk = Chat(url, key=key, model=model, system=system, out=sys.stdout)
            stack.callback(talk.close)
            try:
                talk.run(line_reader(sys.stdin))
            except KeyboardInterrupt:
                typer.echo()

    _exit(console, f"tenfold chat {target}", work)


def _found(run: str, adapters: list[str] | None) -> tuple[Recipe, Served]:
    from cluster.runs import find_run
    from cluster.served import served
    from configs.load import load_recipe

    folder = find_run(run)
    recipe = load_recipe(folder / "recipe.yaml")
    return recipe, served(folder.resolve(), recipe, adapters or ())


def _on(recipe: Recipe, address: str | None) -> Recipe:
    """The recipe on another Ray; None: one of our own, on this machine."""
    return recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"address": address})})


def _serve(
    console: StreamConsole,
    what: Served,
    recipe: Recipe,
    place: Place,
    key: str | None,
    key_file: Path | None,
    as_json: bool,
) -> None:
    from cluster.serve import serving, wait

    with ExitStack() as stack:
        with console:  # it tells what goes on while there is something to tell, not all day
            endpoint = stack.enter_context(serving(what, recipe, place, key, console))
        if as_json:
            typer.echo(json.dumps({"url": endpoint.url, "models": list(what.names), "key": key is not None}))
            sys.stdout.flush()
        else:
            console.say(ready_page(endpoint.url, what.names, key_file))
        try:
            wait(endpoint.state, console.warn)
        except KeyboardInterrupt:
            console.say("stopping (once more to leave at once)")
        with console:
            stack.close()


def ready_page(url: str, names: Sequence[str], key_file: Path | None) -> str:
    """What is served where, with a request to copy."""
    quoted = None if key_file is None else shlex.quote(str(key_file))
    header = "" if quoted is None else f' -H "Authorization: Bearer $(cat {quoted})"'
    body = {"model": names[-1], "messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": True}
    return "\n".join(
        (
            f"ready: {url} serves {', '.join(names)}{'' if quoted is None else ', with an API key'}. For instance:",
            f"  curl -N {url}/chat/completions{header} -H 'Content-Type: application/json' -d '{json.dumps(body)}'",
            f"  tenfold chat {url}{'' if quoted is None else f' --api-key-file {quoted}'}",
            "Ctrl-C ends it.",
        )
    )


def _print_plan(
    console: StreamConsole, what: Served, recipe: Recipe, place: Place, has_key: bool, as_json: bool
) -> None:
    adapters = {name: str(path) for name, path in what.adapters.items()}
    generator = recipe.generator
    plan = {
        "url": place.url(),
        "cluster": recipe.cluster.address,
        "key": has_key,
        "base": str(what.base),
        "adapters": adapters,
        "rank": what.rank,
        "dtype": generator.dtype or recipe.model.dtype,
        "context_tokens": what.context_tokens,
        "tensor_parallel": generator.tensor_parallel,
    }
    if as_json:
        typer.echo(json.dumps(plan, ensure_ascii=False, indent=2))
        return
    lines = [f"{place.url()} would serve, {'with' if has_key else 'without'} an API key (nothing was started):"]
    lines += [f"  {name}: {path}" for name, path in {"base": plan["base"], **adapters}.items()]
    lines.append(f"{plan['dtype']}, a context of at most {what.context_tokens or 'unknown'} tokens")
    console.say("\n".join(lines))


def _exit(console: StreamConsole, again: str, work: Callable[[], None]) -> None:
    from cluster.run import exit_code

    if code := exit_code(console, again, work):
        raise typer.Exit(code)
