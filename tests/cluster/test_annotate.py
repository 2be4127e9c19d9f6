"""`tenfold annotate`: invitations, addresses, and the page on Ray Serve."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import cluster.annotate
from cluster.annotate import Address
from cluster.serve import free_port
from rlhf.desk.desk import open_desk
from rlhf.errors import ServeError
from rlhf.store import RunStore
from tests.cluster.test_cli import HEAVY, tenfold
from tests.recipes import tiny_recipe
from tests.rlhf.desk.groups import groups

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose desk has two prompts. No model is needed."""
    (tmp_path / "guidelines.md").write_text("# Be just\n")
    recipe = tiny_recipe(
        tmp_path, tmp_path, rank={"judge": "people"}, desk={"guidelines": str(tmp_path / "guidelines.md")}
    )
    with RunStore.open(recipe.runs, recipe) as store, open_desk(store.folder, recipe) as desk:
        desk.add_groups(groups(2))
        return store.folder


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """(a certificate of 127.0.0.1 by itself, its key), in PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tenfold")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = (tmp_path / "certificate.pem", tmp_path / "key.pem")
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def test_an_invitation_is_a_link_with_the_token_in_its_fragment(run: Path) -> None:
    done = tenfold("annotate", run, "--invite", "Ann B", "--role", "lead", "--url", "https://rank.example/", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["name"], found["role"]) == ("Ann B", "lead")
    place, token = found["link"].split("/#")
    assert place == "https://rank.example"
    with open_desk(run) as desk:
        assert (person := desk.sign_in(token)) and person.name == "Ann B"
    assert token not in "".join(path.read_text(errors="replace") for path in run.rglob("*") if path.is_file())

    again = tenfold("annotate", run, "--renew", "Ann B")
    assert again.exit_code == 0 and "http://127.0.0.1:8080/#" in again.output and token not in again.output
    with open_desk(run) as desk:
        assert desk.sign_in(token) is None


def test_an_invitation_waits_for_no_engine_to_be_imported(run: Path) -> None:
    code = f"import sys, cluster.cli\nsys.argv = ['tenfold', 'annotate', {str(run)!r}, '--invite', 'ann']\n"
    code += "try:\n    cluster.cli.main()\nfinally:\n    print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "/#" in done.stdout and not (HEAVY | {"fastapi"}) & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--invite", "ann", "--renew", "ann"), "both given"),
        (("--invite", ""), "cannot be a person's name"),
        (("--invite", "a\nb"), "cannot be a person's name"),
        (("--renew", "nobody"), "There is no 'nobody'"),
        (("--renew", "ann", "--role", "lead"), "--role lead is for --invite"),
        (("--role", "lead"), "--role lead is for --invite"),
        (("--invite", "ann", "--url", "rank.example"), "begins with http:// or https://"),
        (("--host", "0.0.0.0"), "--certificate"),
        (("--host", "rank.example"), "--behind-proxy"),
        (("--certificate", "c.pem"), "--key"),
        (("--certificate", "c.pem", "--key", "k.pem"), "cannot be used"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(run: Path, words: tuple[str, ...], told: str) -> None:
    done = tenfold("annotate", run, *words)
    assert done.exit_code == 2
    assert told in " ".join(done.output.split()) and "Traceback" not in done.output


def test_a_port_that_stays_taken_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.annotate, "PORT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = tenfold("annotate", run, "--port", port)
    assert done.exit_code == 2 and f"port {port}" in " ".join(done.output.split())


def test_a_run_without_a_folder_is_told(tmp_path: Path) -> None:
    assert tenfold("annotate", tmp_path / "nothing").exit_code == 2


def test_guidelines_that_are_gone_are_told(run: Path) -> None:
    (run.parents[1] / "guidelines.md").unlink()
    done = tenfold("annotate", run, "--port", free_port())
    assert done.exit_code == 2 and "desk.guidelines" in done.output


def test_addresses_are_shown_as_people_enter_them(certificate: tuple[Path, Path]) -> None:
    assert Address().shown == "http://127.0.0.1:8080" and not Address().secure
    assert Address("::1", 80).link("x") == "http://[::1]:80/#x"
    there = Address("0.0.0.0", 443, *certificate)
    assert there.secure and there.shown == "https://0.0.0.0:443"
    assert (
        Address("10.0.0.1", behind_proxy=True, url="https://a.example/rank/").link("x") == "https://a.example/rank/#x"
    )


def test_a_key_of_another_certificate_is_refused(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    other.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
        )
    )
    with pytest.raises(ServeError, match="cannot be used"):
        Address("0.0.0.0", 443, certificate[0], other)


@contextmanager
def annotating(run: Path, *words: object) -> Iterator[subprocess.Popen[str]]:
    """`tenfold annotate`, ready; killed with all of its own if it is still there when the block ends."""
    command = [sys.executable, "-m", "cluster.cli", "annotate", str(run), "--json", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    try:
        assert process.stdout is not None
        assert "url" in json.loads(process.stdout.readline())
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_page_on_ray_serve_with_tls_outlives_its_server_and_ends_when_told(
    run: Path, certificate: tuple[Path, Path]
) -> None:
    with open_desk(run) as desk:
        token = desk.invite("ann")
    port = free_port()
    words = ("--port", port, "--certificate", certificate[0], "--key", certificate[1])
    trusted = ssl.create_default_context(cafile=str(certificate[0]))
    client = httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, timeout=60, trust_env=False)
    with annotating(run, *words) as process:
        assert client.get("/").status_code == 401
        signed_in = client.post("/api/session", json={"token": token})
        assert signed_in.status_code == 200 and "; Secure" in signed_in.headers["set-cookie"]
        assert "rank.js" in client.get("/").text and client.get("/api/guidelines").json()["html"]
        task = client.post("/api/tasks/next").json()["task"]
        draft = client.put(f"/api/tasks/{task['id']}/draft", json={"state": {"half": "done"}, "time_ms": 5})
        assert draft.status_code == 200
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with annotating(run, *words) as process:  # at once, on the same port
        again = client.post("/api/tasks/next").json()["task"]  # with the cookie of before
        assert again["id"] == task["id"] and again["draft"]["state"] == {"half": "done"}
        said = {"tiers": [["A"], ["B"]], "time_ms": 9}
        assert client.post(f"/api/tasks/{task['id']}/verdict", json=said).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    with open_desk(run) as desk:
        assert len(desk.submissions()) == 1
