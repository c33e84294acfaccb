"""Bundles that are damaged or made to do harm: each is refused, and the store is as it was."""

from __future__ import annotations

import gzip
import itertools
import os
import tarfile
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import FULL
from tests.unit.store import bundles, program
from tests.unit.store.bundles import forged, member, members, unsigned
from vllm_compile_ext.store import bundle, evict
from vllm_compile_ext.store.bundle import FOOTER, MAGIC, BundleError, pack, unpack
from vllm_compile_ext.store.store import FORMAT, Manifest, Store, key_of, seal, unseal


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """What these tests write need not outlast a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return bundles.filled(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def good(source: Store, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A bundle that is in order, and not signed."""
    out = tmp_path_factory.mktemp("out") / "good.bundle"
    pack(source, out)
    return out.read_bytes()


@pytest.fixture
def target(tmp_path: Path) -> Store:
    """The store of a machine that already has something else."""
    store = Store.open(tmp_path / "target")
    bundles.entry(store, "of its own")
    return store


def refused(target: Store, data: bytes, **options: Any) -> str:
    """Why the bundle `data` is refused; after that the store is as it was."""
    path = target.root.parent / "bad.bundle"
    path.write_bytes(data)
    before = bundles.content(target)
    with pytest.raises(BundleError) as error:
        unpack(target, path, **({"allow_unsigned": True} | options))
    assert bundles.content(target) == before
    assert str(path) in str(error.value)
    assert "nothing of it was unpacked" in str(error.value)
    return str(error.value)


# --- damage


def flipped(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1 << index % 8]) + data[index + 1 :]


def test_every_cut_every_flipped_byte_and_bytes_behind_the_end(target: Store, source: Store, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    pack(source, tmp_path / "signed", key=key)
    signed = (tmp_path / "signed").read_bytes()
    end, step = len(signed), 5 if FULL else 67
    bad = [signed + more for more in (b"x", bytes(512), gzip.compress(b"x"), MAGIC + bytes(96))]
    for index in {*range(0, end, step), *range(end - FOOTER, end, 1 if FULL else 9)}:
        bad += [signed[:index], flipped(signed, index)]
    for number, data in enumerate(bad):
        refused(target, data, trust=[key.public_key()], allow_unsigned=number % 3 == 0)


KINDS: list[dict[str, Any]] = [
    {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    {"type": tarfile.SYMTYPE, "linkname": "x"},
    {"type": tarfile.LNKTYPE, "linkname": "v1/blobs/x"},
    {"type": tarfile.LNKTYPE, "linkname": "../../../../etc/passwd"},
    {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
    *({"type": kind} for kind in (tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE)),
    *({"type": kind} for kind in (tarfile.GNUTYPE_SPARSE, b"Z")),
]
NAMES = [
    *("", ".", "..", "/etc/x", "../x", "v1", "v1/x", "v2/jit/x", "v1/locks/store.lock", "v1/tmp/x", "v1/misses/x"),
    *("v1/jit/../x", "v1/jit/a/..", "v1/jit/a/./x", "v1/jit/a//x", "v1/jit/a\\x", "v1/jit/a\nx", "v1/jit/\x1b[31m"),
    *("v1/jit/a", "v1/jit/a/x", "v1/jit/" + "a/" * 20 + "x"),
    *("v1/jit/\u202e", "v1/jit/" + "n" * 256, "v1/jit/" + "ü" * 128, "v1/jit/" + "a/" * 600 + "x", "/v1/jit/a"),
    *("v1/manifests/x.json", "v1/manifests/a/b/c.json", "v1/blobs/x", "v1/blobs/a/b/c", "v1/manifests/../x.json"),
]
PAIRS = (("v1/jit/a/b/c", "v1/jit/a/b/c/d"), ("v1/jit/a/b/c/d", "v1/jit/a/b/c"))  # a file that is another's folder
STRANGE = [
    *([member("v1/jit/a/b/x", b"", **changes)] for changes in KINDS),
    *([member(name, b"data")] for name in NAMES),
    *([member(name, b"data") for name in pair] for pair in PAIRS),
]


@pytest.mark.parametrize("strange", STRANGE, ids=lambda strange: repr(strange[-1][0].name[:40]))
def test_members_that_belong_into_no_store(target: Store, good: bytes, strange: list[bundles.Member]) -> None:
    parts = members(good)
    for index in (0, 1, len(parts)):
        text = refused(target, forged([*parts[:index], *strange, *parts[index:]]))
        assert text.isprintable()


@pytest.mark.parametrize("size", [1, 1 << 20, (8 << 30) - 1, 1 << 40, -1, -(1 << 40)])
def test_a_member_that_says_another_size(target: Store, good: bytes, size: int) -> None:
    parts = members(good)
    for index in (0, 1, len(parts) - 1):
        header = member(parts[index][0].name, b"", size=size)[0].tobuf(tarfile.GNU_FORMAT)  # any number fits
        refused(target, unsigned(gzip.compress(bundles.tar(parts[:index])[:-10240] + header)))


# --- entries that say something else than they are


def with_first(good: bytes, data: bytes) -> bytes:
    (info, _), *others = members(good)
    return forged([member(info.name, data), *others])


def test_manifests_that_are_not_what_they_say(target: Store, good: bytes) -> None:
    first = unseal(members(good)[0][1], Manifest)
    changes: dict[str, dict[str, Any]] = {
        f"is the manifest of another entry, {key_of({'other': '1'})}": {"key": key_of({"other": "1"})},
        "is the manifest of another entry": {"shard": "rank7"},
        "has entries for 2 platforms": {"platform": "mars"},
        "bytes, more than": {"model": "x" * (5 << 20)},
    }
    for said, change in changes.items():  # sealed as it has to be
        assert said in refused(target, with_first(good, seal(msgspec.structs.replace(first, **change))))
    newer = refused(target, with_first(good, b'{"format": 9}'))
    assert f"was written in format 9, this version reads {FORMAT}" in newer
    for data in (b"", b"{}", b"[" * 10000, b'{"format": 3, "seal": "", "record": {}}', b"\xff"):
        assert "is damaged: manifests/" in refused(target, with_first(good, data))
    kernels = [part for part in members(good) if "/jit/" in part[0].name]
    assert "for 0 platforms" in refused(target, forged(kernels))


def test_a_blob_that_is_missing_or_another(target: Store, good: bytes) -> None:
    parts = members(good)
    for index, (info, data) in enumerate(parts):
        if "/blobs/" in info.name:
            assert "is missing" in refused(target, forged(parts[:index] + parts[index + 1 :]))
            for other in (b"", data[:-1], data + b"x", flipped(data, 0)):
                strange = [*parts[:index], member(info.name, other), *parts[index + 1 :]]
                assert "is damaged: blobs/" in refused(target, forged(strange))


# --- bombs


def memory(target: Store, data: bytes) -> int:
    """Bytes of memory that refusing the bundle takes at most."""
    tracemalloc.start()
    try:
        refused(target, data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bomb(head: bytes, megabytes: int) -> bytes:
    """An archive of `head` and then zeros."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    data = compressor.compress(head) + b"".join(compressor.compress(zeros) for _ in range(megabytes))
    return unsigned(data + compressor.flush())


HEADERS = (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def test_a_few_bytes_that_become_many(tmp_path: Path, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "FILES_MAX", 1000)
    target = Store.open(tmp_path / "target", 8 << 20)
    whole = bundles.tar(members(good))[:-10240]
    for kind in HEADERS:
        header = member("v1/jit/a/b/x", b"", type=kind, size=30 << 20)[0].tobuf(tarfile.USTAR_FORMAT)
        assert memory(target, bomb(whole + header, 40)) < 8 << 20
    assert memory(target, bomb(whole, 40)) < 8 << 20  # behind the end


def test_more_than_the_store_may_take(tmp_path: Path, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "VLLM_COMPILE_STORE_MAX_GB" in refused(Store.open(tmp_path / "target", 100), good)
    many = [*members(good), *(member(f"v1/jit/a/b/{number}", b"x" * 1000) for number in range(20))]
    assert "holds more than the store may take" in refused(Store.open(tmp_path / "target", 10_000), forged(many))
    monkeypatch.setattr(bundle, "FILES_MAX", 5)
    assert "in 5 files" in refused(Store.open(tmp_path / "target"), good)


def test_bombs_in_manifests_and_headers(target: Store, good: bytes) -> None:
    for text in (b"[" * 5_000_000, b'{"a":' * 1_000_000, b'{"format": 3, "more": ' + b"[" * 100_000):
        refused(target, with_first(good, text))
    deep = member("x", b"", type=tarfile.GNUTYPE_LONGNAME)[0].tobuf(tarfile.GNU_FORMAT) * 5000
    refused(target, unsigned(gzip.compress(deep + bytes(10240))))
    many = [member(f"v1/jit/a/b/{n}", b"", pax_headers={"comment": "x" * 500_000}) for n in range(40)]
    assert memory(target, forged(many)) < 10 << 20  # tarfile would keep the headers


# --- a disk that fails


class Unpacking:
    """A bundle that is unpacked into a store with an older entry of the same name, and one of its own."""

    def __init__(self, folder: Path, good: bytes, source: Store) -> None:
        self.source, self.path = source, folder.parent / "good.bundle"
        self.path.write_bytes(good)
        self.store = Store.open(folder)
        older = {"plan": self.store.put(b"older")}
        self.entries = [bundles.entry(self.store, "llama", created=1.0, members=older)]
        self.entries.append(bundles.entry(self.store, "of its own"))

    def run(self) -> None:
        unpack(self.store, self.path, allow_unsigned=True)

    def check(self) -> None:
        """Each entry is the old or the new one, and whole."""
        assert self.store.verify() == []
        for entry in self.entries:
            found = self.store.find(entry.key, entry.shard)
            assert found is not None
            assert found in (entry, self.source.find(entry.key, entry.shard))


@pytest.mark.parametrize("call", ["replace", "fsync", "mkdir", "open"])
def test_every_write_that_fails(tmp_path: Path, good: bytes, source: Store, call: str) -> None:
    for times in itertools.count(0, (7 if call == "open" else 1) * (1 if FULL else 5)):
        unpacking = Unpacking(tmp_path / str(times), good, source)
        try:
            with program.failing([call], times):
                unpacking.run()
        except (OSError, BundleError):
            unpacking.check()
        else:
            break
    unpacking.check()
    assert times > 0


def test_an_unpack_that_is_killed(tmp_path: Path, good: bytes, source: Store) -> None:
    for times in itertools.count(0, 1 if FULL else 3):
        unpacking = Unpacking(tmp_path / str(times), good, source)
        status = program.ended(program.fork(unpacking.run, ["replace"], times))
        unpacking.check()
        left = unpacking.store.tree.path / "tmp"
        for path in left.iterdir():
            os.utime(path, (0, 0))
        evict.trim(unpacking.store)
        assert not list(left.iterdir())
        if status == 0:
            break
        assert status == 9
    assert times > 10


# --- fuzz: whatever the bytes are, a BundleError or the content as it was packed


def survives(store: Store, source: Store, data: bytes) -> None:
    path = store.root.parent / "fuzz.bundle"
    path.write_bytes(data)
    with suppress(BundleError):
        unpack(store, path, allow_unsigned=True)
        entries = {(entry.key, entry.shard): entry for entry in source.manifests()}
        assert all(entry == entries.get((entry.key, entry.shard), entry) for entry in store.manifests())
    assert store.verify() == []
    assert not list((store.tree.path / "tmp").iterdir())


@settings(deadline=None, max_examples=300 if FULL else 25, suppress_health_check=list(HealthCheck))
@given(
    noise=st.binary(max_size=2000),
    place=st.floats(0, 1),
    length=st.integers(0, 600),
    block=st.binary(min_size=512, max_size=512),
    start=st.integers(0, 511),
)
def test_any_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    source: Store,
    good: bytes,
    noise: bytes,
    place: float,
    length: int,
    block: bytes,
    start: int,
) -> None:
    store = Store.open(tmp_path_factory.mktemp("fuzzed") / "store", 100 << 20)
    inside = gzip.decompress(good[:-FOOTER])
    header = bytearray(member("v1/jit/a/b/x", b"")[0].tobuf(tarfile.USTAR_FORMAT))
    header[start:] = block[start:]
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)  # its checksum is right

    def changed(whole: bytes) -> bytes:
        index = int(place * len(whole))
        return whole[:index] + noise[:600] + whole[index + length :]

    for data in (noise, unsigned(noise), changed(good)):
        survives(store, source, data)
    for archive in (noise, changed(inside), block + inside, bytes(header) + inside):
        survives(store, source, unsigned(gzip.compress(archive)))
