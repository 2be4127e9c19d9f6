"""Fixtures that every test may use."""

from __future__ import annotations

import os
import subprocess
import sys

# Before any import that reads them: no test may reach for a hub, and W&B keeps its runs on the disk.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from tests.tiny import make_tiny_model

# A server on a free port; it says its address and ends with its input.
OBJECT_STORE = """
import logging, sys
logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line per request
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
server.stop()
"""

torch.set_num_threads(1)  # a tiny model loses more by waiting for a second thread than it gains


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model; tests only read it."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The address of a server that speaks S3, in a process of its own: vLLM looks at all that is imported in ours."""
    with subprocess.Popen(
        [sys.executable, "-c", OBJECT_STORE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        yield server.stdout.readline().strip()
        server.stdin.close()  # it ends


@pytest.fixture
def bucket(object_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket."""
    from fsspec.core import url_to_fs
    from s3fs import S3FileSystem

    for name, value in {
        "AWS_ENDPOINT_URL": object_store,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    S3FileSystem.clear_instance_cache()
    fs, _ = url_to_fs("s3://runs")
    fs.mkdir("runs")
    yield "s3://runs"
    fs.rm("runs", recursive=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests where there is no GPU; puts those that start vLLM in this process at the end."""
    # vLLM leaves its process without a process group, and with an environment in which nothing is compiled.
    items.sort(key=lambda item: bool(item.get_closest_marker("vllm")) and not item.get_closest_marker("ray"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


USE_ENGINES_HERE = (
    *(
        f"tests/cluster/test_{name}.py"
        for name in (
            *("crew", "end_to_end", "group", "model_stages", "reserve", "resume", "scale_on_ray", "serve", "team"),
        )
    ),
    "tests/actors/test_generator.py",
)


class TwoQueues(LoadScopeScheduling):
    """With `-n 2`: the tests that use Ray or vLLM in their own process, one after the other; the others beside them.

    The former share one Ray. (Marks of xdist_group would say which they are, but xdist 3.8 loses them under pytest 9.)
    """

    def _split_scope(self, nodeid: str) -> str:
        return "here" if nodeid.startswith(USE_ENGINES_HERE) else "elsewhere"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TwoQueues:
    """What `-n` distributes the tests by."""
    return TwoQueues(config, log)
