"""The mirror: whole at every moment, enough to go on from, and silent about passwords."""

import json
import os
import shutil
import sqlite3
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
from s3fs import S3FileSystem

from rlhf.disk import to_json, write_folder
from rlhf.errors import StoreError
from rlhf.mirror import Mirror, pull
from rlhf.mirror_remote import is_url, masked
from rlhf.records import Ranking
from rlhf.store import RunStore
from tests.rlhf.runs import flip_a_byte, group, recipe, role, same

NOBODY = 65534  # the user id that owns nothing
RANKING = Ranking("p1", ((1,), (0,)), "rules")


class Cut(Exception):
    """What a test makes a write die of."""


class Writes:
    """The writes that a file system was asked for, in order; the one numbered `dies_at` (from 0) is not done."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.dies_at: int | None = None
        self.before: Callable[[str, str], None] = lambda verb, path: None

    def begin(self, dies_at: int | None = None) -> None:
        self.done, self.dies_at = [], dies_at

    def add(self, verb: str, path: str) -> None:
        self.before(verb, path)
        if len(self.done) == self.dies_at:
            raise Cut
        self.done.append((verb, path))

    def paths(self, *verbs: str) -> list[str]:
        """Those written in the run, by their paths in it; what a push stages has no such path."""
        written = [path.partition("/run/")[2] for verb, path in self.done if not verbs or verb in verbs]
        return [path for path in written if not path.startswith(".mirror/")]


class FolderThatDies(LocalFileSystem):
    cachable = False
    writes = Writes()

    def put_file(self, path1: str, path2: str, **options: Any) -> None:  # type: ignore[override]
        try:
            self.writes.add("put", path2)
        except Cut:
            Path(path2).write_bytes(Path(path1).read_bytes()[:3])  # torn, as a copy is that dies
            raise
        super().put_file(path1, path2, **options)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:  # type: ignore[override]
        try:
            self.writes.add("put", path)
        except Cut:
            Path(path).write_bytes(value[:3])
            raise
        super().pipe_file(path, value, **options)

    def mv(self, path1: str, path2: str, **options: Any) -> None:  # type: ignore[override]
        self.writes.add("move", path2)
        super().mv(path1, path2, **options)

    def rm(self, path: str, **options: Any) -> None:  # type: ignore[override]
        self.writes.add("remove", path)
        super().rm(path, **options)


class StoreThatDies(S3FileSystem):
    cachable = False
    writes = Writes()

    async def _put_file(self, lpath: str, rpath: str, **options: Any) -> Any:
        self.writes.add("put", rpath)
        return await super()._put_file(lpath, rpath, **options)

    async def _pipe_file(self, path: str, data: bytes, **options: Any) -> Any:
        self.writes.add("put", path)
        return await super()._pipe_file(path, data, **options)

    async def _cp_file(self, path1: str, path2: str, **options: Any) -> Any:
        self.writes.add("move", path2)
        return await super()._cp_file(path1, path2, **options)

    async def _rm(self, path: Any, **options: Any) -> Any:
        self.writes.add("remove", path)
        return await super()._rm(path, **options)


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.engine)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the mirrors of runs are kept: a folder, or a bucket's prefix."""
    if request.param == "folder":
        return str(tmp_path / "mirrors")
    return f"{request.getfixturevalue('bucket')}/team/a"


@pytest.fixture
def writes(url: str, monkeypatch: pytest.MonkeyPatch) -> Writes:
    """What is written to the mirror, by a file system that can die."""
    kind = StoreThatDies if is_url(url) else FolderThatDies
    kind.writes = Writes()
    fs = kind()
    monkeypatch.setattr("rlhf.mirror_remote.url_to_fs", lambda url: (fs, kind._strip_protocol(url)))
    return kind.writes


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore.open(tmp_path / "runs", recipe()) as opened:
        fill(opened)
        yield opened


def fill(store: RunStore) -> None:
    store.append_groups("sample", 0, [group("a"), group("b")])
    store.add_rankings([RANKING])
    store.finish("sample", {"num": 2})
    store.log("ppo", 1, {"x": 1.5})
    store.save_role("policy", role(1))
    (store.folder / "journal").mkdir(exist_ok=True)
    (store.folder / "journal" / "ppo.jsonl").write_text('{"step": 2}\n')
    checkpoint(store, 2)


def change(store: RunStore) -> None:
    """Grows what grows, replaces what is replaced, drops the oldest checkpoint and adds one."""
    store.append_groups("sample", 0, [group("c")])
    store.add_rankings([RANKING])
    store.log("ppo", 2, {"x": 2.5})
    store.save_role("policy", role(2))
    store.save_role("reward", role(3))
    checkpoint(store, 4)
    shutil.rmtree(store.folder / "checkpoints" / "ppo" / "step-2")
    (store.folder / "journal" / "ppo.jsonl").write_text('{"step": 4}\n')
    store.finish("ppo", {"kl": 0.5})


def checkpoint(store: RunStore, step: int, seed: int = 0) -> Path:
    path = store.folder / "checkpoints" / "ppo" / f"step-{step}"
    files = {"policy.safetensors": role(step + seed).tensors, "values.json": to_json({"roles": {}, "values": {}})}
    write_folder(path, files, step=step)
    return path


def content(folder: Path) -> dict[str, object]:
    """All that a mirror brings, by path; the rankings as their rows."""
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in ("lock", "events.jsonl", "mirror.json") and not name.startswith(".mirror/"):
            found[name] = rows(path) if name == "rankings.db" else path.read_bytes()
    return found


def rows(path: Path) -> list[tuple[object, ...]]:
    database = sqlite3.connect(path)
    try:
        return database.execute("select * from rankings order by id").fetchall()
    finally:
        database.close()


def fetched(url: str, tmp_path: Path, warnings: list[str] | None = None) -> dict[str, object]:
    dest = pull(f"{url}/run", tmp_path / "fetched" / "run", (warnings if warnings is not None else []).append)
    try:
        return content(dest)
    finally:
        shutil.rmtree(dest)


# There and back


def test_a_pulled_run_is_the_run_that_was_pushed_and_goes_on(store: RunStore, url: str, tmp_path: Path):
    with ThreadPoolExecutor() as threads:  # as a run pushes, beside its work
        threads.submit(Mirror(url, store.folder).push).result()
    dest = pull(f"{url}/run", tmp_path / "fetched" / "run")
    assert content(dest) == content(store.folder)
    with RunStore.open(tmp_path / "fetched", recipe()) as again:
        assert again.groups("sample", 0) == [group("a"), group("b")] and again.rankings() == [RANKING]
        assert again.done("sample") and again.metrics("ppo") == [{"step": 1, "x": 1.5}]
        found = again.load_role("policy")
        assert found is not None and same(found, role(1))


def test_what_only_this_machine_needs_is_not_brought(store: RunStore, url: str, tmp_path: Path):
    wanted = content(store.folder)
    for name in ("wandb/log", "events.jsonl", ".tmp-x/a", "samples/.tmp-b.jsonl", "checkpoints/ppo/.old-step-1/a"):
        (store.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (store.folder / name).write_text("x")
    damaged = store.folder / "checkpoints" / "ppo" / "step-3.damaged"
    shutil.copytree(store.folder / "checkpoints" / "ppo" / "step-2", damaged)
    Mirror(url, store.folder).push()
    assert fetched(url, tmp_path) == wanted


def test_a_second_push_brings_the_changes_and_drops_the_checkpoints_that_are_gone(
    store: RunStore, url: str, tmp_path: Path
):
    mirror = Mirror(url, store.folder)
    mirror.push()
    change(store)
    mirror.push()
    assert fetched(url, tmp_path) == content(store.folder)
    fs, root = url_to_fs(f"{url}/run")
    assert {Path(path).name for path in fs.ls(f"{root}/checkpoints/ppo", detail=False)} == {"step-4"}


def test_a_finished_push_leaves_a_plain_copy_of_the_run(store: RunStore, tmp_path: Path):
    mirror = Mirror(str(tmp_path / "mirrors"), store.folder)
    mirror.push()
    change(store)
    mirror.push()
    assert content(tmp_path / "mirrors" / "run") == content(store.folder)
    assert [path.name for path in (tmp_path / "mirrors" / "run" / ".mirror").iterdir()] == ["index.json"]


# The order


def test_the_manifest_of_the_run_comes_last_and_only_then_checkpoints_go(store: RunStore, url: str, writes: Writes):
    mirror = Mirror(url, store.folder)
    for make in (lambda store: None, change):
        make(store)
        writes.begin()
        mirror.push()
        written = writes.paths("put", "move")
        assert written[-1] == "manifest.json" and written.count("manifest.json") == 1
        for folder in {path.rpartition("/")[0] for path in written if path.startswith(("checkpoints", "roles"))}:
            inside = [path for path in written if path.startswith(f"{folder}/")]
            assert inside[-1] == f"{folder}/manifest.json"
    order = [(verb, path.partition("/run/")[2]) for verb, path in writes.done]
    assert order.index(("remove", "checkpoints/ppo/step-2")) > order.index(("move", "manifest.json"))


def test_a_file_that_is_replaced_is_never_written_under_its_own_name(store: RunStore, url: str, writes: Writes):
    mirror = Mirror(url, store.folder)
    mirror.push()
    change(store)
    writes.begin()
    mirror.push()
    assert not set(writes.paths("put")) & {"metrics.jsonl", "rankings.db", "manifest.json", "roles/policy/role.json"}


def test_a_first_push_that_dies_at_any_write_leaves_no_run_or_the_whole_one(
    store: RunStore, url: str, writes: Writes, tmp_path: Path
):
    new, found = content(store.folder), []
    for mirror in deaths(store, url, writes, {}):
        if is_whole := any(path.endswith("/run/.mirror/index.json") for path in everything(url)):
            assert fetched(url, tmp_path) == new
        else:
            with pytest.raises(StoreError, match="There is no run at"):
                fetched(url, tmp_path)
        found.append(is_whole)
        check_next_push(mirror, new, url)
    assert len(found) > 10 // pace(url) and found == sorted(found) and found[0] is False


def test_a_push_that_dies_at_any_write_leaves_the_old_state_or_the_new_one(
    store: RunStore, url: str, writes: Writes, tmp_path: Path
):
    Mirror(url, store.folder).push()
    before, old = everything(url), content(store.folder)
    change(store)
    new, found = content(store.folder), []
    for mirror in deaths(store, url, writes, before):
        warnings: list[str] = []
        got = fetched(url, tmp_path, warnings)
        assert got in (old, new) and not warnings
        found.append(got == new)
        check_next_push(mirror, new, url)
    assert len(found) > 20 // pace(url) and found == sorted(found) and len(set(found)) == 2


def pace(url: str) -> int:
    """Every write of a folder, every third one of a store over HTTP, which is slower."""
    return 3 if url.startswith("s3") else 1


def deaths(store: RunStore, url: str, writes: Writes, before: dict[str, bytes]) -> Iterator[Mirror]:
    """Mirrors whose push died: at the first write, at the second one, and so on, each time on what was there before."""
    for k in range(0, 1000, pace(url)):
        restore(url, before)
        mirror = Mirror(url, store.folder)
        writes.begin(dies_at=k)
        try:
            mirror.push()
            return
        except StoreError:
            writes.begin()
        yield mirror


def check_next_push(mirror: Mirror, new: dict[str, object], url: str) -> None:
    """The push after one that died brings the new state and leaves nothing of the dead one."""
    mirror.push()
    there = {path.partition("/run/")[2]: data for path, data in everything(url).items()}
    assert there.keys() == {*new, ".mirror/index.json"}
    assert all(there[path] == data for path, data in new.items() if path != "rankings.db")


def everything(url: str) -> dict[str, bytes]:
    """All files of a mirror with their bytes."""
    fs, root = url_to_fs(url)
    fs.invalidate_cache()
    paths = fs.find(root)
    return fs.cat(paths) if paths else {}


def restore(url: str, files: dict[str, bytes]) -> None:
    """Makes the mirror hold these files only."""
    fs, root = url_to_fs(url)
    with suppress(FileNotFoundError):
        fs.rm(root, recursive=True)
    if not is_url(url):
        for path in files:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    fs.pipe(files)
    fs.invalidate_cache()


# What is sent


def test_what_is_unchanged_is_not_sent_again(store: RunStore, url: str, writes: Writes):
    mirror = Mirror(url, store.folder)
    assert mirror.push() == sum(path.stat().st_size for path in store.folder.rglob("*") if counts(path))
    writes.begin()
    assert mirror.push() == 0 and not writes.done
    assert Mirror(url, store.folder).push() == 0 and not writes.done  # as after a restart
    store.log("ppo", 2, {"x": 2})
    mirror.push()
    assert writes.paths("move") == ["metrics.jsonl"]


def counts(path: Path) -> bool:
    return path.is_file() and path.name not in ("lock", "events.jsonl", "mirror.json")


def test_a_change_of_the_same_size_is_sent(store: RunStore, url: str, tmp_path: Path):
    mirror = Mirror(url, store.folder)
    mirror.push()
    database = sqlite3.connect(store.folder / "rankings.db")
    database.execute("update rankings set prompt_id = 'p2'")
    database.commit()
    database.close()
    flip_a_byte(store.folder / "recipe.yaml")
    mirror.push()
    assert fetched(url, tmp_path) == content(store.folder)


def test_what_vanished_from_the_mirror_is_sent_again(store: RunStore, tmp_path: Path):
    url = str(tmp_path / "mirrors")
    Mirror(url, store.folder).push()
    (tmp_path / "mirrors" / "run" / "checkpoints" / "ppo" / "step-2" / "policy.safetensors").unlink()
    (tmp_path / "mirrors" / "run" / "metrics.jsonl").write_bytes(b"")
    Mirror(url, store.folder).push()
    assert fetched(url, tmp_path) == content(store.folder)


def test_a_torn_last_line_is_left_out(store: RunStore, tmp_path: Path):
    wanted = content(store.folder)
    for name in ("metrics.jsonl", "samples/sample-0.jsonl", "journal/ppo.jsonl"):
        with (store.folder / name).open("ab") as file:
            file.write(b'{"to')
    Mirror(str(tmp_path / "mirrors"), store.folder).push()
    assert fetched(str(tmp_path / "mirrors"), tmp_path) == wanted


def test_rankings_come_as_the_last_transaction_left_them(store: RunStore, tmp_path: Path):
    url = str(tmp_path / "mirrors")
    database = sqlite3.connect(store.folder / "rankings.db")
    before = rows(store.folder / "rankings.db")
    database.execute("update rankings set prompt_id = 'open'")
    Mirror(url, store.folder).push()
    assert fetched(url, tmp_path)["rankings.db"] == before
    database.close()


# The run goes on meanwhile


def test_a_role_that_is_replaced_while_it_is_sent_comes_as_the_new_one(
    store: RunStore, url: str, writes: Writes, tmp_path: Path
):
    once(writes, "roles/policy/role.json", lambda: store.save_role("policy", role(9)))
    Mirror(url, store.folder).push()
    assert fetched(url, tmp_path) == content(store.folder)


def test_a_checkpoint_that_is_dropped_while_it_is_sent_gives_way_to_the_next(
    store: RunStore, url: str, writes: Writes, tmp_path: Path
):
    def go_on() -> None:
        checkpoint(store, 4)
        shutil.rmtree(store.folder / "checkpoints" / "ppo" / "step-2")

    once(writes, "checkpoints/ppo/step-2/values.json", go_on)
    Mirror(url, store.folder).push()
    assert fetched(url, tmp_path) == content(store.folder)
    assert not [path for path in everything(url) if "step-2" in path]


def test_a_stage_that_is_finished_during_a_push_is_not_recorded_before_its_role_is_there(
    store: RunStore, url: str, writes: Writes, tmp_path: Path
):
    def finish() -> None:
        store.save_role("reward", role(3))
        store.finish("reward", {})

    once(writes, "recipe.yaml", finish)
    mirror = Mirror(url, store.folder)
    mirror.push()
    assert b'"reward"' not in bytes(fetched(url, tmp_path)["manifest.json"])  # type: ignore[arg-type]
    mirror.push()
    assert fetched(url, tmp_path) == content(store.folder)


def once(writes: Writes, path: str, act: Callable[[], None]) -> None:
    """Does something right before the first write of a path."""

    def before(verb: str, written: str) -> None:
        if str(written).endswith(path):
            writes.before = lambda verb, path: None
            act()

    writes.before = before


def test_a_checkpoint_that_was_cut_here_does_not_replace_the_whole_one_there(store: RunStore, tmp_path: Path):
    url, warnings = str(tmp_path / "mirrors"), []
    Mirror(url, store.folder).push()
    wanted = content(store.folder)
    (store.folder / "checkpoints" / "ppo" / "step-2" / "policy.safetensors").write_bytes(b"cut")
    manifest = store.folder / "checkpoints" / "ppo" / "step-2" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    Mirror(url, store.folder, warnings.append).push()
    assert "step-2 is damaged, so it is not mirrored" in warnings[0]
    assert fetched(url, tmp_path) == wanted


# Fetching


def test_a_run_that_is_there_is_not_fetched_over(store: RunStore, tmp_path: Path):
    url = str(tmp_path / "mirrors")
    Mirror(url, store.folder).push()
    with pytest.raises(StoreError, match="is there already"):
        pull(f"{url}/run", store.folder)


def test_a_run_that_is_not_there_is_told_with_those_that_are(store: RunStore, url: str, tmp_path: Path):
    Mirror(url, store.folder).push()
    with pytest.raises(StoreError, match=r"no run at .*/other\. There are run\."):
        pull(f"{url}/other", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_a_pull_that_died_is_finished_by_the_next(store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    url, dest = str(tmp_path / "mirrors"), tmp_path / "fetched" / "run"
    Mirror(url, store.folder).push()
    got: list[str] = []
    copy = LocalFileSystem.get_file

    def get_file(self: LocalFileSystem, path: str, to: str, **options: Any) -> None:
        got.append(path)
        if len(got) == 4:
            Path(to).write_bytes(b"torn")
            raise Cut("the line went dead")
        copy(self, path, to, **options)

    monkeypatch.setattr(LocalFileSystem, "get_file", get_file)
    with pytest.raises(StoreError, match="cannot be read: the line went dead"):
        pull(f"{url}/run", dest)
    assert not dest.exists()
    pull(f"{url}/run", dest)
    assert content(dest) == content(store.folder)
    assert len(got) == len(content(store.folder)) + 1  # the torn one only was fetched twice


def test_a_mirror_that_changes_while_it_is_fetched_gives_the_new_state(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url = str(tmp_path / "mirrors")
    mirror, copy, got = Mirror(url, store.folder), LocalFileSystem.get_file, []
    mirror.push()

    def get_file(self: LocalFileSystem, path: str, to: str, **options: Any) -> None:
        got.append(path)
        if len(got) == 4:
            change(store)
            mirror.push()
        copy(self, path, to, **options)

    monkeypatch.setattr(LocalFileSystem, "get_file", get_file)
    assert fetched(url, tmp_path) == content(store.folder)


def test_a_damaged_checkpoint_is_told_and_fetched_as_it_is(store: RunStore, tmp_path: Path):
    url, warnings = str(tmp_path / "mirrors"), []
    Mirror(url, store.folder).push()
    flip_a_byte(tmp_path / "mirrors" / "run" / "checkpoints" / "ppo" / "step-2" / "policy.safetensors")
    (tmp_path / "mirrors" / "run" / "metrics.jsonl").unlink()
    pull(f"{url}/run", tmp_path / "fetched" / "run", warnings.append)
    assert [warning.partition("/run/")[2].partition(":")[0] for warning in warnings] == [
        "checkpoints/ppo/step-2/policy.safetensors is damaged",
        "metrics.jsonl is missing",
    ]


@pytest.mark.parametrize("path", ["../outside", "/outside"])
def test_a_mirror_that_names_files_outside_the_run_is_refused(store: RunStore, tmp_path: Path, path: str):
    url = str(tmp_path / "mirrors")
    Mirror(url, store.folder).push()
    index = tmp_path / "mirrors" / "run" / ".mirror" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"files": {path: {"bytes": 1, "sha256": ""}}}))
    with pytest.raises(StoreError, match=r"index\.json cannot be read: it names files outside the run"):
        pull(f"{url}/run", tmp_path / "fetched" / "run")


# Errors


def test_another_run_of_the_same_name_is_not_overwritten(store: RunStore, url: str, tmp_path: Path):
    Mirror(url, store.folder).push()
    wanted = content(store.folder)
    manifest = store.folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"created": "2020-01-01T00:00:00+00:00"}))
    with pytest.raises(StoreError, match=r"another run of this name.*begun 2020.*name="):
        Mirror(url, store.folder).push()
    assert fetched(url, tmp_path) == wanted


def test_a_run_folder_is_not_taken_for_a_mirror(store: RunStore, tmp_path: Path):
    with pytest.raises(StoreError, match="is the run folder itself"):
        Mirror(f"file://{store.folder.parent}", store.folder)
    shutil.copytree(store.folder, tmp_path / "mirrors" / "run")
    with pytest.raises(StoreError, match="holds a run that no mirror wrote"):
        Mirror(str(tmp_path / "mirrors"), store.folder).push()


@pytest.mark.engine
def test_a_bucket_that_is_not_there_is_told(store: RunStore, bucket: str, tmp_path: Path):
    with pytest.raises(StoreError, match=r"s3://elsewhere/run cannot be written: .*bucket does not exist.*Make the"):
        Mirror("s3://elsewhere", store.folder).push()
    with pytest.raises(StoreError, match="There is no run at s3://elsewhere/run"):
        pull("s3://elsewhere/run", tmp_path / "fetched")


@pytest.mark.engine
def test_a_server_that_does_not_answer_is_told(store: RunStore, bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(StoreError, match=r"s3://runs/run cannot be written: .*See that it can be reached"):
            Mirror(bucket, store.folder).push()
    finally:
        monkeypatch.undo()
        S3FileSystem.clear_instance_cache()


def test_an_unknown_protocol_and_a_missing_package_are_told(store: RunStore, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(StoreError, match=r"nowhere://x/run cannot be used: Protocol not known.*folder such as"):
        Mirror("nowhere://x", store.folder)
    monkeypatch.setitem(known_implementations, "lacking", {"class": "no_such_package.FS", "err": "Install lacking"})
    with pytest.raises(StoreError, match=r"lacking://x/run cannot be used: Install lacking\. .*pip install s3fs"):
        Mirror("lacking://x", store.folder)


def test_a_mirror_that_may_not_be_written_is_told():
    with tempfile.TemporaryDirectory() as parent:  # not under tmp_path, whose parents only its owner may enter
        with RunStore.open(parent, recipe()) as store:
            fill(store)
        mirrors = Path(parent) / "mirrors"
        mirrors.mkdir(mode=0o555)
        Path(parent).chmod(0o755)
        store.folder.chmod(0o777)
        is_root = os.geteuid() == 0
        try:
            if is_root:  # who may write anywhere
                os.seteuid(NOBODY)
            with pytest.raises(StoreError, match=r"mirrors/run cannot be written: .*See that you may write there"):
                Mirror(str(mirrors), store.folder).push()
        finally:
            if is_root:
                os.seteuid(0)


@pytest.mark.parametrize("password", ["s3cr3t", "s3cr%213t", "s3/cr3t", "s3@cr3t"])
def test_a_password_in_the_url_is_never_shown(store: RunStore, password: str):
    url = f"ftp://ann:{password}@127.0.0.1:1/runs"  # where nobody listens
    with pytest.raises(StoreError) as caught:
        Mirror(url, store.folder).push()
    shown = "".join(traceback.format_exception(caught.value)[-1:]) + str(caught.value)
    assert "cr3t" not in shown and "s3cr" not in shown and "ftp://***@127.0.0.1:1/runs/run" in shown
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_nothing_but_user_and_password_is_masked():
    assert masked("see s3://key:secret@bucket/a and s3://bucket/b:c@d") == "see s3://***@bucket/a and s3://bucket/b:c@d"
    assert masked("/mnt/nfs/a@b:c") == "/mnt/nfs/a@b:c"


def test_urls_are_told_from_paths():
    assert all(map(is_url, ["s3://bucket/run", "file:///mnt/run", "simplecache::s3://bucket/run"]))
    assert not any(map(is_url, ["runs/run", "/mnt/nfs/run", "run", "a:b", "c:/run"]))
