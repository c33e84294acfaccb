"""What leaves the store: the least recently used, never what is in use or being written."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.unit.store import program
from vllm_compile_ext.store import evict
from vllm_compile_ext.store.evict import Removed
from vllm_compile_ext.store.store import MissingError, Store, manifest_names

HOUR = 3600.0


def age(path: Path, hours: float) -> None:
    """Make `path` look as if it was last used so many hours ago."""
    then = time.time() - hours * HOUR
    os.utime(path, (then, then))


def used(store: Store, manifest: program.Manifest, hours: float) -> None:
    age(store.path(manifest), hours)


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
        used(store, found[name], hours)
    return found


def test_size_counts_shared_blobs_once(store: Store, three: dict[str, program.Manifest]) -> None:
    manifests = sum(store.path(m).stat().st_size for m in three.values())
    assert store.size() == 10 * 1000 + manifests


def test_the_least_recently_used_go_until_the_rest_fits(store: Store, three: dict[str, program.Manifest]) -> None:
    before = store.size()
    removed = evict.trim(store, max_bytes=before - 1)
    assert removed.manifests == [f"{three['old'].key}/rank0"]
    assert names(store) == {"middle", "new"}
    assert before - store.size() == removed.freed > 3000
    assert len(blobs(store)) == 7
    assert store.verify() == []
    assert evict.trim(store, max_bytes=store.size()).manifests == []
    assert evict.trim(store, max_bytes=0).freed > 0
    assert (names(store), blobs(store), store.size()) == (set(), [], 0)


def test_use_makes_an_entry_the_last_to_go(store: Store, three: dict[str, program.Manifest]) -> None:
    with program.child('store.use(store.find(sys.argv[2], "rank0"))', store.root, three["old"].key) as other:
        other.wait()
    evict.trim(store, max_bytes=store.size() - 1)
    assert names(store) == {"old", "new"}


def test_what_was_not_used_for_long_goes(store: Store, three: dict[str, program.Manifest]) -> None:
    removed = evict.trim(store, max_age=1.5 * HOUR)
    assert removed.manifests == [f"{three[name].key}/rank0" for name in ("old", "middle")]
    assert program.load(store, three["new"]) == program.members("new")
    assert len(blobs(store)) == 4


def test_without_limits_nothing_goes(store: Store, three: dict[str, program.Manifest]) -> None:
    assert evict.trim(store) == Removed([], [], 0)
    assert names(store) == {"old", "middle", "new"}


def test_who_has_written_keeps_the_limit(store: Store, three: dict[str, program.Manifest]) -> None:
    limited = Store.open(store.root, max_bytes=store.size() + 1000)
    with limited.writer(program.key_of(program.factors("fresh")), 5):
        program.write(limited, "fresh")
    evict.keep_limit(limited)
    assert names(store) == {"middle", "new", "fresh"}
    tiny = Store.open(store.root, max_bytes=0)
    with tiny.writer(program.key_of(program.factors("huge")), 5):
        huge = program.write(tiny, "huge", size=100_000)
    evict.keep_limit(tiny)
    assert names(store) == {"fresh", "huge"}  # this process runs both
    assert program.load(tiny, huge) == program.members("huge", size=100_000)


USES = """
for manifest in store.manifests():
    store.use(manifest)
say("uses")
time.sleep(600)
"""


def test_what_another_process_uses_stays_until_that_is_killed(store: Store, three: dict[str, program.Manifest]) -> None:
    with program.child(USES, store.root) as other:
        assert program.heard(other) == "uses"
        for removed in (evict.trim(store, max_bytes=0, max_age=0), evict.remove(store, three["old"].key)):
            assert removed.manifests == []
            assert f"{three['old'].key}/rank0" in removed.in_use
        assert names(store) == set(three)
        assert store.verify() == []
        other.kill()
        other.wait()
    assert len(evict.trim(store, max_bytes=0).manifests) == 3
    assert store.size() == 0


def test_what_a_writer_has_put_but_not_yet_named_stays(store: Store, three: dict[str, program.Manifest]) -> None:
    with store.writer("0" * 64, 5):
        begun = program.manifest(store, "begun", program.members("begun"))
        again = program.manifest(store, "old", program.members("old"))
        for path in blobs(store):
            age(path, 99)
        removed = evict.trim(store, max_bytes=0)
        assert len(removed.manifests) == 3
        assert program.load(store, begun) == program.members("begun")
        assert program.load(store, again) == program.members("old")
    evict.trim(store)
    assert blobs(store) == []
    with pytest.raises(MissingError):
        program.load(store, begun)


def test_a_writer_in_another_process_counts_too(store: Store) -> None:
    code = """
    with store.writer("0" * 64, 5):
        program.manifest(store, "begun", program.members("begun"))
        say("put")
        time.sleep(600)
    """
    with program.child(code, store.root) as other:
        assert program.heard(other) == "put"
        for path in blobs(store):
            age(path, 99)
        evict.trim(store, max_bytes=0)
        assert len(blobs(store)) == 4
        other.kill()
        other.wait()
    evict.trim(store, max_bytes=0)
    assert blobs(store) == []


def test_young_files_that_nothing_needs_stay(store: Store) -> None:
    blob = store.put(b"who wrote this may be about to name it")
    ((store.tree.path / "tmp") / "young").write_bytes(b"")
    ((store.tree.path / "tmp") / "old").write_bytes(b"")
    age((store.tree.path / "tmp") / "old", 2)
    evict.trim(store)
    assert store.get(blob)
    assert [path.name for path in (store.tree.path / "tmp").iterdir()] == ["young"]


def test_a_blob_that_is_put_again_is_young_again(store: Store) -> None:
    path = store.path(store.put(b"data"))
    age(path, 99)
    store.put(b"data")
    evict.trim(store)
    assert path.exists()


def test_a_clock_set_back_does_no_harm(store: Store, three: dict[str, program.Manifest]) -> None:
    used(store, three["new"], -1000)
    for path in blobs(store):
        age(path, -1000)
    store.put(b"unneeded")
    assert evict.trim(store, max_age=0.5 * HOUR).manifests == [f"{three[name].key}/rank0" for name in ("old", "middle")]
    assert program.load(store, three["new"]) == program.members("new")
    store.use(three["new"])
    path = store.tree.path.joinpath(*manifest_names(three["new"].key, "rank0"))
    assert abs(path.stat().st_mtime - time.time()) < HOUR


def test_everything_in_the_future_still_goes_for_its_size(store: Store, three: dict[str, program.Manifest]) -> None:
    for manifest in three.values():
        used(store, manifest, -1000)
    assert len(evict.trim(store, max_bytes=0).manifests) == 3


def test_remove_takes_a_prefix_and_leaves_what_others_need(store: Store, three: dict[str, program.Manifest]) -> None:
    removed = evict.remove(store, three["old"].key[:12])
    assert removed.manifests == [f"{three['old'].key}/rank0"]
    assert removed.freed > 3000
    assert names(store) == {"middle", "new"}
    assert len(blobs(store)) == 7
    assert store.verify() == []
    assert not store.tree.path.joinpath(*manifest_names(three["old"].key, "rank0")).parent.exists()
    assert evict.remove(store, "0" * 64).manifests == []


def test_damaged_manifests_and_strange_files_can_go(store: Store, three: dict[str, program.Manifest]) -> None:
    store.tree.path.joinpath(*manifest_names(three["old"].key, "rank0")).write_bytes(b"garbage")
    linked = store.tree.path.joinpath(*manifest_names(three["middle"].key, "rank0"))
    linked.unlink()
    linked.symlink_to(store.tree.path.joinpath(*manifest_names(three["new"].key, "rank0")))
    ((store.tree.path / "blobs") / "ab").mkdir(exist_ok=True)
    ((store.tree.path / "blobs") / "ab" / "stranger").write_bytes(b"")
    ((store.tree.path / "manifests") / "stranger").write_bytes(b"")
    ((store.tree.path / "locks") / "stranger.lock").mkdir()
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
    path.write_text('{"format": 2, "needs": ["%s"]}' % blob.digest)  # noqa: UP031 - braces
    age(store.path(blob), 99)
    evict.trim(store)
    assert store.get(blob)
    assert evict.trim(store, max_bytes=0).manifests == ["0" * 64 + "/rank0"]
    assert blobs(store) == []


def test_locks_of_entries_that_are_gone_go_too(store: Store, three: dict[str, program.Manifest]) -> None:
    for key in (three["new"].key, "0" * 64, "1" * 64):
        with store.writer(key, 5):
            pass
        age((store.tree.path / "locks" / f"{key}.lock"), 99)
    with store.writer("2" * 64, 5):
        pass
    evict.trim(store)
    left = {path.stem for path in (store.tree.path / "locks").iterdir()}
    assert left == {"store", three["new"].key, "2" * 64}
