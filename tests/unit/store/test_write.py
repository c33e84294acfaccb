"""Writers that are killed, race, hang, or find no room: readers see whole entries or none."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import process
from tests.unit.store import program
from vllm_compile_ext.store import evict
from vllm_compile_ext.store.store import Store

BIG = {"count": 4, "size": 1 << 19}

# Writes one entry after another for ever, each under the same key.
WRITER = """
from itertools import count
key = key_of(program.factors("model"))
for turn in count():
    with store.writer(key, 30) as mine:
        if turn == 0:
            say("begins")
        store.commit(program.manifest(store, "model", program.members(f"{sys.argv[2]} {turn}", 4, 1 << 19)))
"""


def whole(store: Store) -> int:
    """How many entries there are; each of them loads, and no other file is taken for one."""
    found = list(store.manifests())
    for manifest in found:
        program.load(store, manifest)
    assert store.verify() == []
    return len(found)


def test_a_writer_killed_at_any_moment_leaves_whole_entries(store: Store) -> None:
    moments = random.Random(4)
    for turn in range(20):
        with program.child(WRITER, store.root, turn) as writer:
            assert program.heard(writer) == "begins"
            time.sleep(moments.uniform(0, 0.06))
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        whole(store)
        with store.writer(program.key_of(program.factors("model")), 5) as mine:
            assert mine
    data = program.members("model", **BIG)
    store.commit(program.manifest(store, "model", data))
    assert whole(store) == 1


# Kills itself at the call of this number among those named.
DEADLY = """
import signal
left = int(sys.argv[2])
def deadly(call):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped
for name in sys.argv[3:]:
    setattr(os, name, deadly(getattr(os, name)))
"""
DIES = (
    DEADLY
    + """
with store.writer(key_of(program.factors("model")), 30) as mine:
    program.write(store, "model", count=2)
say("done")
"""
)


def test_a_writer_killed_at_each_step_leaves_whole_entries(tmp_path: Path) -> None:
    for step in range(40):
        store = Store.open(tmp_path / str(step))
        with program.child(DIES, store.root, step, "mkdir", "fsync", "replace") as writer:
            done = program.heard(writer) == "done"
        committed = whole(store)
        with store.writer(program.key_of(program.factors("model")), 5) as mine:
            assert mine
            program.write(store, "model", count=2)
        assert whole(store) == 1
        if done:
            assert committed == 1
            break
    assert done
    assert step > 10


def test_what_killed_writers_left_is_removed(store: Store) -> None:
    with program.child(DIES, store.root, 4, "fsync") as writer:
        writer.wait()
    for path in store.root.rglob("*"):
        os.utime(path, (0, 0))
    left = [path for path in store.root.rglob("*") if path.is_file()]
    assert [path for path in left if path.parent == (store.tree.path / "tmp")]
    evict.trim(store)
    assert [path for path in store.root.rglob("*") if path.is_file()] == [(store.tree.path / "locks" / "store.lock")]


def test_a_collector_killed_at_each_step_leaves_whole_entries(tmp_path: Path) -> None:
    code = DEADLY + 'evict.trim(store, max_bytes=0); say("done")'
    for step in range(40):
        store = Store.open(tmp_path / str(step))
        for name in ("one", "other"):
            program.leave(store, name, count=2)
        with program.child(code, store.root, step, "unlink", "rmdir") as collector:
            done = program.heard(collector) == "done"
        whole(store)
        if done:
            break
    assert done
    assert step == 7  # two manifests, three blobs, two folders


def test_bytes_are_durable_before_they_have_a_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, call=call, **kwargs: (calls.append(name), call(*args, **kwargs))[1]
        )
    program.write(store, "model", count=2)
    assert calls == ["fsync", "replace", "fsync"] * 3  # the file, its name, the name's folder


COLD = """
say("ready")
sys.stdin.readline()
name, wrote = "model", False
key = key_of(program.factors(name))
found = store.find(key, "rank0")
if found is None:
    with store.writer(key, 60) as mine:
        assert mine
        found = store.find(key, "rank0")
        if found is None:
            time.sleep(0.3)  # compiles
            found, wrote = program.write(store, name), True
assert program.load(store, found) == program.members(name)
say("wrote" if wrote else "loaded")
"""


def test_of_eight_processes_starting_cold_one_writes_and_the_others_load(store: Store) -> None:
    with ExitStack() as stack:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", program.PRELUDE + COLD, str(store.root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=process.environment(),
            )
            for _ in range(8)
        ]
        for one in started:
            stack.callback(one.communicate)
            stack.callback(one.kill)
        assert [program.heard(one) for one in started] == ["ready"] * 8
        for one in started:
            assert one.stdin is not None
            one.stdin.write("go\n")
            one.stdin.flush()
        assert sorted(program.heard(one) for one in started) == ["loaded"] * 7 + ["wrote"]
    assert whole(store) == 1


def test_threads_that_put_the_same_bytes(store: Store) -> None:
    data = list(program.members("model", **BIG).values()) * 4
    with ThreadPoolExecutor(8) as pool:
        blobs = list(pool.map(store.put, data))
    assert [store.get(blob) for blob in blobs] == data
    assert list((store.tree.path / "tmp").iterdir()) == []


def test_bytes_that_are_there_are_not_written_again(store: Store) -> None:
    first, second = program.write(store, "model"), program.write(store, "other")
    shared = first.members["piece/0/(1, 256)"]
    assert second.members["piece/0/(1, 256)"] == shared
    inode = store.path(shared).stat().st_ino
    store.put(store.get(shared))
    assert store.path(shared).stat().st_ino == inode
    assert len(list((store.tree.path / "blobs").glob("*/*"))) == 7  # 4 each, one of them shared


HANGS = """
with store.writer(key_of(program.factors("model")), 30) as mine:
    say("writes" if mine else "waits")
    time.sleep(600)
"""


def test_a_hanging_writer_is_waited_for_with_a_bound(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    key = program.key_of(program.factors("model"))
    with program.child(HANGS, store.root) as hanging:
        assert program.heard(hanging) == "writes"
        for timeout in (0, 0.2, -1):
            with store.writer(key, timeout) as mine:
                assert not mine
        assert "not waiting for it" in caplog.text
        with store.writer("0" * 64, 5) as mine:  # another key is free
            assert mine
        hanging.kill()
        with store.writer(key, 5) as mine:
            assert mine


def test_threads_of_one_process_write_one_at_a_time(store: Store) -> None:
    def attempt() -> bool:
        with store.writer("0" * 64, 0.1) as mine:
            return mine

    with ThreadPoolExecutor(1) as other:
        with store.writer("0" * 64, 5) as mine:
            assert mine
            assert not other.submit(attempt).result()
        assert other.submit(attempt).result()


def test_the_lock_is_given_back_when_the_writer_fails(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.writer("0" * 64, 5):
        raise ZeroDivisionError
    with program.child('with store.writer("0" * 64, 5) as mine: say(mine)', store.root) as other:
        assert program.heard(other) == "True"


def test_a_forked_child_of_a_writer_does_not_keep_the_lock(store: Store) -> None:
    with store.writer("0" * 64, 5):
        forked = os.fork()
        if forked == 0:
            time.sleep(600)
            os._exit(0)
    try:
        with store.writer("0" * 64, 1) as mine:
            assert mine
        program.leave(store, "model")
        assert len(evict.trim(store, max_bytes=0).manifests) == 1
        assert store.size() == 0
    finally:
        os.kill(forked, signal.SIGKILL)
        os.waitpid(forked, 0)


def no_room(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(store: Store, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = program.write(store, "kept")
    before = sorted(path for path in store.root.rglob("*") if path.is_file())
    again = program.manifest(store, "kept", {})
    new = {f"{index}": os.urandom(100) for index in range(200)}  # some of them need a new folder
    with monkeypatch.context() as patched:
        patched.setattr(os, call, no_room)
        with pytest.raises(OSError, match="No space left"):
            program.manifest(store, "new", new)
        if call != "mkdir":
            with pytest.raises(OSError, match="No space left"):
                store.commit(again)
    written = {path for path in store.root.rglob("*") if path.is_file()} - set(before)
    assert call == "mkdir" or written == set()
    assert list((store.tree.path / "tmp").iterdir()) == []
    assert store.find(kept.key, "rank0") == kept
    assert whole(store) == 1


def test_a_full_disk(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store.open(disk / "store")
    kept = program.write(store, "kept", size=1000)
    with store.writer(program.key_of(program.factors("new")), 5), pytest.raises(OSError, match="No space left"):
        program.write(store, "new", count=100, size=50_000)
    assert list((store.tree.path / "tmp").iterdir()) == []
    fill(disk)
    with pytest.raises(OSError, match="No space left"):
        store.commit(program.manifest(store, "kept", {}))
    assert store.find(kept.key, "rank0") == kept
    assert program.load(store, kept) == program.members("kept")
    assert whole(store) == 1
    with store.writer("0" * 64, 5):
        pass  # either answer will do: an empty lock may still find room
    assert evict.trim(store, max_bytes=0).in_use == [f"{kept.key}/rank0"]
    for path in (store.tree.path / "blobs").glob("*/*"):
        os.utime(path, (0, 0))
    (disk / "filler").unlink()
    evict.trim(store)
    assert program.load(store, kept) == program.members("kept")
    assert len(list((store.tree.path / "blobs").glob("*/*"))) == 4
    program.write(store, "new")
    assert whole(store) == 2


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def test_a_disk_full_from_the_start(disk: Path) -> None:
    fill(disk)
    store = Store.open(disk / "store")
    assert store.find("0" * 64, "rank0") is None
    with store.writer("0" * 64, 1):
        pass
    with pytest.raises(OSError, match="No space left"):
        store.put(b"x" * 10_000)
    assert (store.verify(), list(store.manifests())) == ([], [])


def test_a_read_only_mount(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = program.write(Store.open(disk / "store"), "model")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    caplog.set_level("INFO")
    store = Store.open(disk / "store", max_bytes=0)
    assert not store.writable
    assert f"{store.root} cannot be written" in caplog.text
    found = store.find(written.key, "rank0")
    assert found == written
    store.use(written)
    assert program.load(store, written) == program.members("model")
    with store.writer(written.key, 5) as mine:
        assert not mine
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    refused: list[Callable[[], object]] = [
        lambda: store.put(b"new"),
        lambda: store.commit(written),
        lambda: evict.trim(store),
        lambda: evict.remove(store, written.key),
    ]
    for change in refused:
        with pytest.raises(OSError, match="Read-only"):
            change()
    assert whole(store) == 1


def test_a_root_that_cannot_be_made(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    store = Store.open(disk / "cache" / "store")
    assert not store.writable
    assert store.find("0" * 64, "rank0") is None
    assert (store.verify(), list(store.manifests()), store.size()) == ([], [], 0)
    with pytest.raises(OSError, match="Read-only"):
        store.put(b"new")


def test_a_root_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = Store.open(tmp_path / "file" / "store")
    assert not store.writable
    assert store.find("0" * 64, "rank0") is None


def test_a_folder_of_another_user_is_only_read(user: Path) -> None:
    written = program.write(Store.open(user / "store"), "model")
    for path in (user / "store").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    store = Store.open(user / "store")
    assert not store.writable
    assert store.find(written.key, "rank0") == written
    assert program.load(store, written) == program.members("model")
    with store.writer(written.key, 5) as mine:
        assert not mine
    with pytest.raises(PermissionError):
        store.put(b"new")
    for path in (store.tree.path, *store.tree.path.rglob("*")):
        path.chmod(0o700)


def test_the_store_needs_neither_vllm_nor_torch(tmp_path: Path) -> None:
    code = """
    import vllm_compile_ext.key.miss, vllm_compile_ext.store.bundle
    say([name for name in ("torch", "vllm", "numpy") if name in sys.modules])
    """
    with program.child(code, tmp_path / "store") as other:
        assert program.heard(other) == "[]"
