"""Nothing comes out of a store that was not put in: each kind of damage to each file, then the same program again."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.store import program
from tests.unit.store.test_manifest import BAD_KEYS, BAD_SHARDS
from vllm_compile_ext.store import evict, files
from vllm_compile_ext.store.store import Blob, DamagedError, ManifestError, MissingError, Store, manifest_names, seal

SECRET = b"elsewhere"


def truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def append(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip_first(path: Path, other: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


def flip_last(path: Path, other: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 128]))


def replace_by_other(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def link_to_other(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def link_to_itself_elsewhere(path: Path, other: Path) -> None:
    """The right bytes, but at a place that others may change between the check and the use."""
    moved = path.with_name("moved")
    path.rename(moved)
    path.symlink_to(moved)


def link_to_nothing(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere")


def pipe(path: Path, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def missing(path: Path, other: Path) -> None:
    path.unlink()


DAMAGE = [
    truncate,
    empty,
    append,
    flip_first,
    flip_last,
    replace_by_other,
    link_to_other,
    link_to_itself_elsewhere,
    link_to_nothing,
    pipe,
    folder,
    missing,
]
Damage = Callable[[Path, Path], None]


@pytest.fixture
def written(store: Store) -> program.Manifest:
    return program.write(store, "model")


def test_gives_back_what_was_put(store: Store, written: program.Manifest) -> None:
    assert store.find(written.key, "rank0") == written
    assert program.load(store, written) == program.members("model")
    assert store.verify() == []
    assert list(store.manifests()) == [written]
    assert store.find(written.key, "rank1") is None
    assert store.find("0" * 64, "rank0") is None


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_blob_is_noticed_and_mended(store: Store, written: program.Manifest, damage: Damage) -> None:
    blobs = list(written.members.values())
    for index, blob in enumerate(blobs):
        path = store.path(blob)
        damage(path, store.path(blobs[index - 1]))
        with pytest.raises(DamagedError, match=blob.digest) as caught:
            store.get(blob)
        assert caught.value.path == path
        assert isinstance(caught.value, MissingError) == (damage is missing)
        assert [problem.path for problem in store.verify() if problem.path == path] == [path]
        if damage is folder:  # nothing that a program leaves behind: for people
            with pytest.raises(OSError, match="directory"):
                store.put(program.members("model")[f"piece/{index}/(1, 256)"])
            path.rmdir()
        path.with_name("moved").unlink(missing_ok=True)
        assert program.write(store, "model").members == written.members
        assert program.load(store, written) == program.members("model")
    assert store.verify() == []


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_a_manifest_is_a_miss_with_one_warning(
    store: Store, written: program.Manifest, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    path = store.tree.path.joinpath(*manifest_names(written.key, "rank0"))
    other = program.write(store, "other")
    damage(path, store.tree.path.joinpath(*manifest_names(other.key, "rank0")))
    assert store.find(written.key, "rank0") is None
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == (0 if damage is missing else 1)
    assert all(str(path) in line for line in warned)
    assert list(store.manifests()) == [other]
    assert [problem.path for problem in store.verify()] == ([] if damage is missing else [path])
    if damage is not folder:
        program.write(store, "model")
        assert program.load(store, store.find(written.key, "rank0") or written) == program.members("model")


def test_links_are_replaced_and_not_followed_when_writing(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(SECRET)
    data = program.members("model")
    for blob in program.write(store, "model").members.values():
        store.path(blob).unlink()
        store.path(blob).symlink_to(outside)
    written = program.write(store, "model")
    assert program.load(store, written) == data
    assert outside.read_bytes() == SECRET


@pytest.mark.parametrize(
    "data",
    [b'{"format": 4, "seal": "", "record": {}}', b'{"format": 2, "everything": ["else"]}'],
)
def test_a_manifest_of_a_newer_format_is_a_miss_that_says_so(
    store: Store, written: program.Manifest, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store.tree.path.joinpath(*manifest_names(written.key, "rank0")).write_bytes(data)
    assert store.find(written.key, "rank0") is None
    assert "was written in format" in caplog.text


def test_a_manifest_under_another_name_is_refused(
    store: Store, written: program.Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    path = store.tree.path.joinpath(*manifest_names(written.key, "rank0"))
    stranger = store.tree.path.joinpath(*manifest_names("0" * 64, "rank0"))
    stranger.parent.mkdir()
    shutil.copy(path, stranger)
    shutil.copy(path, store.tree.path.joinpath(*manifest_names(written.key, "rank1")))
    assert store.find("0" * 64, "rank0") is None
    assert store.find(written.key, "rank1") is None
    assert caplog.text.count("is the manifest of another entry") == 2
    assert list(store.manifests()) == [written]


def test_a_size_that_does_not_fit_is_refused_before_anything_is_read(store: Store, written: program.Manifest) -> None:
    blob = written.members["piece/0/(1, 256)"]
    os.truncate(store.path(blob), 1 << 40)  # takes no room, but nobody has the memory to read it
    with pytest.raises(DamagedError, match="bytes where 1000 were written"):
        store.get(blob)


def test_files_that_cannot_be_read(user: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store.open(user / "store")
    written = program.write(store, "model")
    for blob in written.members.values():
        store.path(blob).chmod(0)
        with pytest.raises(DamagedError, match="cannot be read"):
            store.get(blob)
    store.tree.path.joinpath(*manifest_names(written.key, "rank0")).chmod(0)
    assert store.find(written.key, "rank0") is None
    assert "cannot be read (Permission denied)" in caplog.text
    assert program.load(store, program.write(store, "model")) == program.members("model")


@pytest.mark.parametrize("key", BAD_KEYS)
def test_keys_that_lead_elsewhere_are_refused(store: Store, key: str) -> None:
    with pytest.raises(ManifestError):
        store.find(key, "rank0")
    with pytest.raises(ManifestError), store.writer(key, 0):
        pass


@pytest.mark.parametrize("shard", BAD_SHARDS)
def test_shards_that_lead_elsewhere_are_refused(store: Store, shard: str) -> None:
    with pytest.raises(ManifestError):
        store.find("0" * 64, shard)


@pytest.mark.parametrize("prefix", ["", "..", "../", "*", "AB", "g", "0" * 65, "0\n"])
def test_prefixes_that_lead_elsewhere_are_refused(store: Store, written: program.Manifest, prefix: str) -> None:
    with pytest.raises(ManifestError):
        evict.remove(store, prefix)
    assert store.find(written.key, "rank0") == written


def test_a_store_deleted_in_use(store: Store, written: program.Manifest) -> None:
    shutil.rmtree(store.root)
    assert store.find(written.key, "rank0") is None
    with pytest.raises(MissingError):
        store.get(Blob("0" * 64, 0))
    with pytest.raises(MissingError):
        program.load(store, written)
    store.use(written)
    assert list(store.manifests()) == []
    assert (store.verify(), store.size()) == ([], 0)
    with store.writer(written.key, 5) as mine:
        assert mine
        program.write(store, "model")
    assert program.load(store, written) == program.members("model")
    assert store.root.stat().st_mode & 0o777 == 0o700


def test_a_store_deleted_between_blobs_and_manifest_holds_nothing_that_loads(store: Store) -> None:
    begun = program.manifest(store, "model", program.members("model"))
    shutil.rmtree(store.root)
    store.commit(begun)
    with pytest.raises(MissingError):
        program.load(store, begun)
    assert program.load(store, program.write(store, "model")) == program.members("model")


def test_a_hit_scans_no_folder_and_takes_no_lock(
    store: Store, written: program.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("not on the way of a hit")

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, fail)
    monkeypatch.setattr(files.fcntl, "flock", fail)
    found = store.find(written.key, "rank0")
    assert found is not None
    assert program.load(store, found) == program.members("model")


def test_an_entry_is_replaced_as_a_whole(store: Store, written: program.Manifest) -> None:
    changed = program.manifest(store, "model", {"plan": b"another"})
    assert changed.key == written.key
    store.commit(changed)
    assert store.find(written.key, "rank0") == changed
    assert seal(changed) == store.tree.path.joinpath(*manifest_names(written.key, "rank0")).read_bytes()
