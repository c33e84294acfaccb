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
from vllm_compile_ext.store.store import DamagedError, ManifestError, MissingError, Store, manifest_names


def link(path: Path, to: Path) -> None:
    path.unlink()
    path.symlink_to(to)


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def flip(path: Path, index: int) -> None:
    data = bytearray(path.read_bytes())
    data[index] ^= 1
    path.write_bytes(data)


Damage = Callable[[Path, Path], object]  # to a file; the second one is another
DAMAGE: dict[str, Damage] = {
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path, other: path.write_bytes(b""),
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b"\0"),
    "first bit": lambda path, other: flip(path, 0),
    "last byte": lambda path, other: flip(path, -1),
    "another": lambda path, other: path.write_bytes(other.read_bytes()),
    "link to another": link,
    # The right bytes, but at a place that others may change between the check and the use.
    "link to itself elsewhere": lambda path, other: path.symlink_to(path.rename(path.with_name("moved"))),
    "link to nothing": lambda path, other: link(path, Path("/nowhere")),
    "pipe": lambda path, other: replace(path, os.mkfifo),
    "folder": lambda path, other: replace(path, Path.mkdir),
    "missing": lambda path, other: path.unlink(),
    "newer": lambda path, other: path.write_bytes(b'{"format": 9, "everything": ["else"]}'),
}


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
    changed = program.manifest(store, "model", {"plan": b"another"})
    store.commit(changed)
    assert store.find(written.key, "rank0") == changed != written


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_blob_is_noticed_and_mended(store: Store, written: program.Manifest, damage: str) -> None:
    blobs = list(written.members.values())
    for index, blob in enumerate(blobs):
        path = store.path(blob)
        DAMAGE[damage](path, store.path(blobs[index - 1]))
        with pytest.raises(DamagedError, match=blob.digest) as caught:
            store.get(blob)
        assert caught.value.path == path
        assert isinstance(caught.value, MissingError) == (damage == "missing")
        assert [problem.path for problem in store.verify() if problem.path == path] == [path]
        if damage == "folder":  # nothing that a program leaves behind: for people
            with pytest.raises(OSError, match="directory"):
                store.put(program.members("model")[f"piece/{index}/(1, 256)"])
            path.rmdir()
        path.with_name("moved").unlink(missing_ok=True)
        assert program.write(store, "model").members == written.members
        assert program.load(store, written) == program.members("model")
    assert store.verify() == []


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_a_manifest_is_a_miss_with_one_warning(
    store: Store, written: program.Manifest, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = store.path(written)
    other = program.write(store, "other")
    DAMAGE[damage](path, store.path(other))
    assert store.find(written.key, "rank0") is None
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == (0 if damage == "missing" else 1)
    assert all(str(path) in line for line in warned)
    assert ("was written in format 9" in caplog.text) == (damage == "newer")
    assert list(store.manifests()) == [other]
    assert [problem.path for problem in store.verify()] == ([] if damage == "missing" else [path])
    if damage != "folder":
        program.write(store, "model")
        assert program.load(store, store.find(written.key, "rank0") or written) == program.members("model")


def test_a_link_is_replaced_and_what_it_leads_to_is_not_written(store: Store, written: program.Manifest) -> None:
    outside = store.root / "outside"
    outside.write_bytes(b"elsewhere")
    for blob in written.members.values():
        link(store.path(blob), outside)
    program.write(store, "model")
    assert program.load(store, written) == program.members("model")
    assert outside.read_bytes() == b"elsewhere"


def test_a_manifest_under_another_name_is_refused(
    store: Store, written: program.Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    path = store.path(written)
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
    store.path(written).chmod(0)
    assert store.find(written.key, "rank0") is None
    assert "cannot be read (Permission denied)" in caplog.text
    assert program.load(store, program.write(store, "model")) == program.members("model")


def test_names_that_lead_elsewhere_are_refused(store: Store, written: program.Manifest) -> None:
    for key, shard in [(key, "rank0") for key in BAD_KEYS] + [("0" * 64, shard) for shard in BAD_SHARDS]:
        with pytest.raises(ManifestError):
            store.find(key, shard)
    for key in BAD_KEYS:
        with pytest.raises(ManifestError), store.writer(key, 0):
            pass
    for prefix in ["", "..", "../", "*", "AB", "g", "0" * 65, "0\n"]:
        with pytest.raises(ManifestError):
            evict.remove(store, prefix)
    assert store.find(written.key, "rank0") == written


def test_a_store_deleted_in_use(store: Store, written: program.Manifest) -> None:
    shutil.rmtree(store.root)
    assert store.find(written.key, "rank0") is None
    with pytest.raises(MissingError):
        program.load(store, written)
    store.use(written)
    assert (list(store.manifests()), store.verify(), store.size()) == ([], [], 0)
    store.commit(written)  # without its blobs, as when it was deleted before the manifest was written
    with pytest.raises(MissingError):
        program.load(store, written)
    with store.writer(written.key, 5) as mine:
        assert mine
        program.write(store, "model")
    assert program.load(store, written) == program.members("model")
    assert store.root.stat().st_mode & 0o777 == 0o700


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
