"""What leaves the store: the least recently used, never what is in use or being written."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from tests.unit.store import program
from vllm_compile_ext.store import evict
from vllm_compile_ext.store.store import Store, manifest_names

HOUR = 3600.0


def age(path: Path, hours: float) -> None:
    """Make `path` look as if it was last used so many hours ago."""
    then = time.time() - hours * HOUR
    os.utime(path, (then, then))


def names(store: Store) -> set[str]:
    return {manifest.model for manifest in store.manifests()}


def blobs(store: Store) -> list[Path]:
    return list((store.tree.path / "blobs").glob("*/*"))


@pytest.fixture
def three(store: Store) -> dict[str, program.Manifest]:
    """Entries of 3 blobs of 1000 bytes each and one that they share, used 3, 2 and 1 hours ago."""
    found = {}
    for hours, name in [(3, "old"), (2, "middle"), (1, "new")]:
        found[name] = program.leave(store, name)
        age(store.path(found[name]), hours)
    manifests = sum(store.path(manifest).stat().st_size for manifest in found.values())
    assert store.size() == 10 * 1000 + manifests
    return found


@pytest.mark.parametrize(
    ("free", "hours", "gone"),
    [
        (0, None, []),
        (1, None, ["old"]),
        (4000, None, ["old", "middle"]),
        (100_000, None, ["old", "middle", "new"]),
        (None, 1.5, ["old", "middle"]),
        (1, 2.5, ["old"]),
    ],
)
def test_the_least_recently_used_go(
    store: Store, three: dict[str, program.Manifest], free: int | None, hours: float | None, gone: list[str]
) -> None:
    """Until so many bytes are free, and those that were not used for so many hours."""
    before = store.size()
    removed = evict.trim(store, None if free is None else max(0, before - free), hours and hours * HOUR)
    assert removed.manifests == [f"{three[name].key}/rank0" for name in gone]
    assert removed.in_use == []
    assert names(store) == three.keys() - gone
    assert removed.freed == before - store.size()
    assert len(blobs(store)) == (10 - 3 * len(gone) if len(gone) < 3 else 0)
    assert store.verify() == []


def test_use_makes_an_entry_the_last_to_go(store: Store, three: dict[str, program.Manifest]) -> None:
    assert program.ended(program.fork(lambda: store.use(three["old"]))) == 0
    evict.trim(store, max_bytes=store.size() - 1)
    assert names(store) == {"old", "new"}


def test_who_has_written_keeps_the_limit(store: Store, three: dict[str, program.Manifest]) -> None:
    limited = Store.open(store.root, max_bytes=store.size() + 1000)
    program.write(limited, "fresh")
    evict.keep_limit(limited)
    assert names(store) == {"middle", "new", "fresh"}
    evict.keep_limit(Store.open(store.root, max_bytes=0))
    assert names(store) == {"fresh"}, "this process runs it"


def test_what_another_process_uses_stays_until_that_is_killed(store: Store, three: dict[str, program.Manifest]) -> None:
    with program.meanwhile(lambda: [store.use(manifest) for manifest in three.values()]) as kill:
        for removed in (evict.trim(store, max_bytes=0, max_age=0), evict.remove(store, three["old"].key)):
            assert removed.manifests == []
            assert f"{three['old'].key}/rank0" in removed.in_use
        assert names(store) == set(three)
        kill()
    assert len(evict.trim(store, max_bytes=0).manifests) == 3
    assert store.size() == 0


def test_what_a_writer_has_put_but_not_yet_named_stays(store: Store, three: dict[str, program.Manifest]) -> None:
    with store.writer("0" * 64, 5):
        begun = program.manifest(store, "begun", program.members("begun"))
        again = program.manifest(store, "old", program.members("old"))
        for path in blobs(store):
            age(path, 99)
        assert len(evict.trim(store, max_bytes=0).manifests) == 3
        assert program.load(store, begun) == program.members("begun")
        assert program.load(store, again) == program.members("old")
    evict.trim(store)
    assert blobs(store) == []


def test_young_files_that_nothing_needs_stay(store: Store) -> None:
    """Who wrote them may be about to name them."""
    tmp = store.tree.path / "tmp"
    young = [store.path(store.put(b"young")), store.path(store.put(b"put again")), tmp / "young"]
    old = [store.path(store.put(b"old")), tmp / "old"]
    for path in (young[2], old[1]):
        path.write_bytes(b"")
    for path in (young[1], *old):
        age(path, 2)
    store.put(b"put again")
    evict.trim(store)
    assert [path.exists() for path in young + old] == [True] * 3 + [False] * 2


def test_a_clock_set_back_does_no_harm(store: Store, three: dict[str, program.Manifest]) -> None:
    for path in (store.path(three["new"]), *blobs(store)):
        age(path, -1000)
    store.put(b"unneeded")
    assert evict.trim(store, max_age=0.5 * HOUR).manifests == [f"{three[name].key}/rank0" for name in ("old", "middle")]
    assert program.load(store, three["new"]) == program.members("new")
    assert program.ended(program.fork(lambda: store.use(three["new"]))) == 0
    assert abs(store.used(three["new"]) - time.time()) < HOUR
    age(store.path(three["new"]), -1000)
    assert len(evict.trim(store, max_bytes=0).manifests) == 1, "for its size"


def test_remove_leaves_what_others_need(store: Store, three: dict[str, program.Manifest]) -> None:
    removed = evict.remove(store, three["old"].key)
    assert removed.manifests == [f"{three['old'].key}/rank0"]
    assert removed.freed > 3000
    assert names(store) == {"middle", "new"}
    assert len(blobs(store)) == 7
    assert store.verify() == []
    assert not store.path(three["old"]).parent.exists()
    assert evict.remove(store, "0" * 64).manifests == []


def test_damaged_manifests_and_strange_files_can_go(store: Store, three: dict[str, program.Manifest]) -> None:
    store.path(three["old"]).write_bytes(b"garbage")
    linked = store.path(three["middle"])
    linked.unlink()
    linked.symlink_to(store.path(three["new"]))
    (store.tree.path / "blobs" / "ab").mkdir(exist_ok=True)
    (store.tree.path / "blobs" / "ab" / "stranger").write_bytes(b"")
    (store.tree.path / "manifests" / "stranger").write_bytes(b"")
    (store.tree.path / "locks" / "stranger.lock").mkdir()
    for path in store.root.rglob("*"):
        os.utime(path, (0, 0), follow_symlinks=False)
    evict.trim(store)
    assert len(blobs(store)) == 4 + 1
    assert len(evict.remove(store, three["old"].key).manifests) == 1
    assert len(evict.remove(store, three["middle"].key).manifests) == 1
    assert program.load(store, three["new"]) == program.members("new")
    assert store.verify() == []


def test_a_manifest_of_a_newer_format_keeps_its_blobs(store: Store) -> None:
    blob = store.put(b"data of a newer version")
    path = store.tree.path.joinpath(*manifest_names("0" * 64, "rank0"))
    path.parent.mkdir()
    path.write_text('{"format": 9, "needs": ["%s"]}' % blob.digest)  # noqa: UP031 - braces
    age(store.path(blob), 99)
    evict.trim(store)
    assert store.get(blob)
    assert evict.trim(store, max_bytes=0).manifests == ["0" * 64 + "/rank0"]
    assert blobs(store) == []


def test_locks_of_entries_that_are_gone_go_too(store: Store, three: dict[str, program.Manifest]) -> None:
    for key, hours in ((three["new"].key, 99), ("0" * 64, 99), ("1" * 64, 0)):
        with store.writer(key, 5):
            pass
        age((store.tree.path / "locks" / f"{key}.lock"), hours)
    evict.trim(store)
    left = {path.stem for path in (store.tree.path / "locks").iterdir()}
    assert left == {"store", three["new"].key, "1" * 64}


# --- looking at what is in use without being in the way of those that use it


def test_what_is_used_is_in_use(store: Store) -> None:
    entry, other = program.leave(store, "llama"), program.leave(store, "qwen")
    store.use(entry)
    (store.tree.path / "tmp" / "link").symlink_to("/etc")
    files = (entry.names, other.names, ("tmp", "no"), ("tmp", "link"))
    assert [store.tree.in_use(*file) for file in files] == [True, False, False, False]


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_one_who_looks_does_not_keep_another_from_using(store: Store, seconds: float) -> None:
    path = store.tree.path / "tmp" / "manifest"
    path.write_bytes(b"")
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as `in_use` has it for a moment
    threading.Timer(seconds, os.close, [handle]).start()
    store.tree.hold("tmp", "manifest")
    assert store.tree.in_use("tmp", "manifest")
