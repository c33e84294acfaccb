"""Nothing comes out of a store that was not put in: each kind of damage to each file, and to what a manifest says."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.store import program
from vllm_compile_ext.store import evict, files
from vllm_compile_ext.store.store import (
    FORMAT,
    Blob,
    DamagedError,
    Manifest,
    ManifestError,
    MissingError,
    Store,
    digest,
    seal,
    unseal,
)

BAD_KEYS = ["", "ab", "AB" * 32, "ab" * 32 + "\n", "../" + "a" * 61, "ab" * 33]
BAD_SHARDS = ["", ".", "..", "../rank0", "a/b", "a\\b", ".hidden", "rank0\n", "rank0\0", "a..b", "é", "r" * 101]
BAD_MEMBERS = ["", ".", "..", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", "a\\b", "a\0b", "a\nb", "m" * 201]


def link(path: Path, to: Path) -> None:
    path.unlink()
    path.symlink_to(to)


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
    "pipe": lambda path, other: (path.unlink(), os.mkfifo(path)),
    "folder": lambda path, other: (path.unlink(), path.mkdir()),
    "missing": lambda path, other: path.unlink(),
    "newer": lambda path, other: path.write_bytes(b'{"format": 9, "everything": ["else"]}'),
}


@pytest.fixture
def written(store: Store) -> Manifest:
    return program.write(store, "model")


def test_gives_back_what_was_put(store: Store, written: Manifest) -> None:
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
def test_damage_to_any_blob_is_noticed_and_mended(store: Store, written: Manifest, damage: str) -> None:
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
    store: Store, written: Manifest, damage: str, caplog: pytest.LogCaptureFixture
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


def test_a_size_that_does_not_fit_is_refused_before_anything_is_read(store: Store, written: Manifest) -> None:
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


def test_names_that_lead_elsewhere_are_refused(store: Store, written: Manifest) -> None:
    for key, shard in [(key, "rank0") for key in BAD_KEYS] + [("0" * 64, shard) for shard in BAD_SHARDS]:
        with pytest.raises(ManifestError):
            store.find(key, shard)
    for key in BAD_KEYS:
        with pytest.raises(ManifestError), store.writer(key, 0):
            pass
        assert evict.remove(store, key).manifests == []
    assert store.find(written.key, "rank0") == written


def test_a_store_deleted_in_use(store: Store, written: Manifest) -> None:
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
    store: Store, written: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("not on the way of a hit")

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, fail)
    monkeypatch.setattr(files.fcntl, "flock", fail)
    found = store.find(written.key, "rank0")
    assert found is not None
    assert program.load(store, found) == program.members("model")


# --- whatever a manifest's file holds, decoding gives what was encoded or a ManifestError


BLOB = {"digest": "cd" * 32, "size": 7}
MANIFEST = Manifest(
    kind="program",
    key="ab" * 32,
    shard="rank0",
    model="Llama über",
    created=1.5,
    platform="linux-x86_64 cpu AVX512",
    factors={"torch": "2.13.0"},
    members={"bytecode": Blob(**BLOB), "piece/0/(1, 256)": Blob(**BLOB)},
)
GOOD = seal(MANIFEST)


def sealed(inner: bytes, outer: str = f'"format": {FORMAT}') -> bytes:
    """A file whose seal is right, whatever it seals."""
    return b'{%s, "seal": "%s", "record": %s}' % (outer.encode(), digest(inner).encode(), inner)


def inner(**changes: Any) -> bytes:
    """The sealed part of a good manifest, with `changes` that `Manifest` itself would not let through."""
    return json.dumps(json.loads(msgspec.json.encode(MANIFEST)) | changes).encode()


def test_gives_back_what_was_encoded() -> None:
    assert unseal(GOOD, Manifest) == MANIFEST
    assert unseal(sealed(inner()), Manifest) == MANIFEST
    assert json.loads(GOOD)["record"]["members"]["bytecode"] == BLOB, "JSON for others"


def test_every_cut_and_every_flipped_bit_is_noticed() -> None:
    for index in range(len(GOOD)):
        damaged = [GOOD[:index] + bytes([GOOD[index] ^ 1 << bit]) + GOOD[index + 1 :] for bit in range(8)]
        for data in (GOOD[:index], *damaged):
            with pytest.raises(ManifestError):
                unseal(data, Manifest)


NEWER = (seal(MANIFEST, 4), b'{"format": 4}', sealed(inner(new_field=1), '"format": 4'))
NONE = (
    *(b"", b"[]", b'{"format": "3"}', b'{"format": 3, "x": ' + b"[" * 100_000),
    *(sealed(b"[" * 100_000 + b"]" * 100_000), sealed(b"{}"), sealed(b'"\xff\xfe"')),
    *(sealed(inner(), '"format": 3, "more": 1'), sealed(inner(unknown=1))),
    *(sealed(inner(members={"a": BLOB | more})) for more in ({"size": -1}, {"path": "/etc"})),
)
REFUSED = [
    *(("format 4, this version reads 3", data) for data in NEWER),
    *((".", data) for data in NONE),
    *(("key", sealed(inner(key=key))) for key in BAD_KEYS),
    *(("shard", sealed(inner(shard=shard))) for shard in BAD_SHARDS),
    *(("member", sealed(inner(members={name: BLOB}))) for name in BAD_MEMBERS),
    *(("digest", sealed(inner(members={"a": BLOB | {"digest": key}}))) for key in BAD_KEYS),
]


@pytest.mark.parametrize(("problem", "data"), REFUSED)
def test_what_is_no_manifest_of_this_format_or_has_unsafe_names_is_refused(problem: str, data: bytes) -> None:
    with pytest.raises(ManifestError, match=problem):
        unseal(data, Manifest)


def only_manifest_error(data: bytes) -> None:
    try:
        found = unseal(data, Manifest)
    except ManifestError:
        return
    assert unseal(seal(found), Manifest) == found


@given(st.binary(max_size=300), st.integers(0, len(GOOD)), st.integers(0, 20), st.binary(max_size=20))
def test_fuzz_bytes(anything: bytes, start: int, removed: int, added: bytes) -> None:
    only_manifest_error(anything)
    for whole, wrap in ((GOOD, bytes), (inner(), sealed)):  # around the seal, and below one that is right
        only_manifest_error(wrap(whole[:start] + added + whole[start + removed :]))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=10), values, max_size=4),
    max_leaves=10,
)
fields = st.sampled_from(list(Manifest.__struct_fields__))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(fields, anything, max_size=4), st.sets(fields, max_size=2))
def test_fuzz_values(changes: dict[str, Any], dropped: set[str]) -> None:
    changed = json.loads(inner()) | changes
    only_manifest_error(sealed(json.dumps({k: v for k, v in changed.items() if k not in dropped}).encode()))
