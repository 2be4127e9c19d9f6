"""What is looked at before an endpoint starts and while it lives, without one."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from cluster.cli_serve import ready_page
from cluster.serve import Place, check_fits, check_port, free_port, wait
from rlhf.errors import PlacementError, ServeError
from tests.recipes import tiny_recipe


def test_an_endpoint_that_gets_ill_is_told_and_one_that_is_gone_ends_the_command() -> None:
    states = ["RUNNING", "RUNNING", "UNHEALTHY", "UNHEALTHY", "RUNNING", "GONE"]
    warned: list[str] = []
    paused: list[float] = []
    with pytest.raises(ServeError, match="ended by itself: it is gone"):
        wait(lambda: states.pop(0), warned.append, pause=paused.append)
    assert warned == [
        "the endpoint is unhealthy; it was running",
        "the endpoint is running; it was unhealthy",
        "the endpoint is gone; it was running",
    ]
    assert len(paused) == 5


def test_a_port_that_is_taken_and_an_address_of_another_machine_are_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"Nothing can listen on 127\.0\.0\.1, port {port}: .*--port"):
            check_port(Place("127.0.0.1", port))
    check_port(Place("127.0.0.1", port))
    with pytest.raises(ServeError, match=re.escape("203.0.113.7")):
        check_port(Place("203.0.113.7", free_port()))
    with pytest.raises(ServeError, match="no-such-host"):
        check_port(Place("no-such-host.invalid", free_port()))


@pytest.mark.parametrize(
    ("host", "head", "url"),
    [
        ("127.0.0.1", None, "http://127.0.0.1:8000/v1"),
        ("0.0.0.0", None, "http://127.0.0.1:8000/v1"),
        ("::", None, "http://[::1]:8000/v1"),
        ("10.0.0.5", None, "http://10.0.0.5:8000/v1"),
        ("0.0.0.0", "10.0.0.1", "http://10.0.0.1:8000/v1"),
        ("127.0.0.1", "10.0.0.1", "http://127.0.0.1:8000/v1"),
    ],
)
def test_the_url_is_one_that_can_be_reached(host: str, head: str | None, url: str) -> None:
    assert Place(host, 8000).url(head) == url


def test_the_request_to_copy_names_the_file_of_the_key_and_never_the_key() -> None:
    page = ready_page("http://h:1/v1", ("base", "law"), Path("my keys/key"))
    assert """-H "Authorization: Bearer $(cat 'my keys/key')\"""" in page
    assert "tenfold chat http://h:1/v1 --api-key-file 'my keys/key'" in page
    body = json.loads(page.split("-d '")[1].split("'")[0])
    assert (body["model"], body["stream"]) == ("law", True)
    assert "Authorization" not in ready_page("http://h:1/v1", ("base",), None)


def test_an_endpoint_for_which_ray_counts_too_little_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    recipe = tiny_recipe("m", tmp_path, generator={"tensor_parallel": 2}, cluster={"cpus_per_worker": 1})
    check_fits(recipe, cpus=3, gpus=0, front_cpus=0.25)
    check_fits(recipe, cpus=4, gpus=2, front_cpus=0.25)
    with pytest.raises(PlacementError, match=r"takes 4 CPUs and 2 GPUs.*counts 8 CPUs and 1 GPUs"):
        check_fits(recipe, cpus=8, gpus=1, front_cpus=0.25)
    with pytest.raises(PlacementError, match="counts 2 CPUs"):
        check_fits(recipe, cpus=2, gpus=0, front_cpus=0.25)
