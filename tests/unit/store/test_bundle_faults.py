"""Bundles that are damaged or made to do harm: each is refused, and the store is as it was."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.store import bundles
from vllm_compile_ext.store import bundle, evict
from vllm_compile_ext.store.bundle import FOOTER, MAGIC, BundleError, pack, unpack
from vllm_compile_ext.store.store import FORMAT, Manifest, Store, key_of, seal, unseal

KEY = Ed25519PrivateKey.generate()
TRUST = [KEY.public_key()]


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
def good(source: Store) -> bytes:
    """A bundle that is in order, and not signed."""
    return _packed(source, None)


@pytest.fixture(scope="module")
def signed(source: Store) -> bytes:
    return _packed(source, KEY)


def _packed(source: Store, key: Ed25519PrivateKey | None) -> bytes:
    out = source.root.parent / "out.bundle"
    pack(source, out, key=key)
    return out.read_bytes()


@pytest.fixture
def target(tmp_path: Path) -> Store:
    """The store of a machine that already has something else."""
    store = Store.open(tmp_path / "target")
    bundles.entry(store, "of its own")
    return store


def refused(target: Store, data: bytes, **options: Any) -> str:
    """Why the bundle `data` is refused, after which the store is as it was."""
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


def test_every_length_that_is_too_short(target: Store, signed: bytes) -> None:
    for length in (*range(0, len(signed), 16), *range(len(signed) - 20, len(signed))):
        refused(target, signed[:length], trust=TRUST, allow_unsigned=False)


@pytest.mark.parametrize("more", [b"x", bytes(512), bundles.compress(b"x"), MAGIC + bytes(96)])
def test_bytes_behind_the_end(target: Store, signed: bytes, more: bytes) -> None:
    refused(target, signed + more, trust=TRUST, allow_unsigned=False)


def flipped(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1 << index % 8]) + data[index + 1 :]


def test_every_flipped_byte_of_the_file(target: Store, signed: bytes) -> None:
    for index in {*range(0, len(signed), 5), *range(len(signed) - FOOTER, len(signed))}:
        refused(target, flipped(signed, index), trust=TRUST, allow_unsigned=False)


def test_flipped_bytes_inside(target: Store, good: bytes, source: Store) -> None:
    """A forger's, who needs no signature: refused, or what a tar archive does not say differently."""
    inside = gzip.decompress(good[:-FOOTER])
    for index in range(0, len(inside), 17):
        survives(target, source, bundles.unsigned(bundles.compress(flipped(inside, index))))


def test_members_that_are_left_out(target: Store, good: bytes) -> None:
    """Of an entry; a kernel file, or the only name of an entry, is not missed."""
    parts = bundles.members(good)
    for index, (info, _) in enumerate(parts):
        if "/blobs/" in info.name:
            assert "is missing" in refused(target, bundles.forged(parts[:index] + parts[index + 1 :]))
    assert "for 0 platforms" in refused(target, bundles.forged([part for part in parts if "/jit/" in part[0].name]))


# --- members that do not belong into a store


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("link to a sibling", {"type": tarfile.SYMTYPE, "linkname": "x"}),
        ("hard link", {"type": tarfile.LNKTYPE, "linkname": "v1/blobs/x"}),
        ("hard link elsewhere", {"type": tarfile.LNKTYPE, "linkname": "../../../../etc/passwd"}),
        ("device", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}),
        ("block device", {"type": tarfile.BLKTYPE}),
        ("pipe", {"type": tarfile.FIFOTYPE}),
        ("folder", {"type": tarfile.DIRTYPE}),
        ("contiguous", {"type": tarfile.CONTTYPE}),
        ("sparse", {"type": tarfile.GNUTYPE_SPARSE}),
        ("unknown", {"type": b"Z"}),
    ],
)
def test_a_member_that_is_no_plain_file(target: Store, good: bytes, kind: str, changes: dict[str, Any]) -> None:
    parts = bundles.members(good)
    for index in (0, 1, len(parts)):
        strange = bundles.member("v1/jit/a/b/x", b"", **changes)
        refused(target, bundles.forged([*parts[:index], strange, *parts[index:]]))


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "/etc/x", "../x", "v1", "v1/x", "v2/jit/x", "v1/locks/store.lock", "v1/tmp/x", "v1/misses/x"),
        *("v1/jit/../x", "v1/jit/a/..", "v1/jit/a/./x", "v1/jit/a//x", "v1/jit/a\\x", "v1/jit/a\nx", "v1/jit/\x1b[31m"),
        *("v1/jit/a", "v1/jit/a/x", "v1/jit/" + "a/" * 20 + "x"),
        *("v1/jit/\u202e", "v1/jit/" + "n" * 256, "v1/jit/" + "ü" * 128, "v1/jit/" + "a/" * 600 + "x", "/v1/jit/a"),
        *("v1/manifests/x.json", "v1/manifests/a/b/c.json", "v1/blobs/x", "v1/blobs/a/b/c", "v1/manifests/../x.json"),
    ],
)
def test_a_name_that_leads_elsewhere(target: Store, good: bytes, name: str) -> None:
    text = refused(target, bundles.forged([*bundles.members(good), bundles.member(name, b"data")]))
    assert text.isprintable()


def test_a_file_that_is_the_folder_of_another(target: Store, good: bytes) -> None:
    for names in (("v1/jit/a/b/c", "v1/jit/a/b/c/d"), ("v1/jit/a/b/c/d", "v1/jit/a/b/c")):
        extra = [bundles.member(name, b"data") for name in names]
        refused(target, bundles.forged([*bundles.members(good), *extra]))


@pytest.mark.parametrize("size", [1, 1 << 20, (8 << 30) - 1, 1 << 40, -1, -(1 << 40)])
def test_a_member_that_says_another_size(target: Store, good: bytes, size: int) -> None:
    parts = bundles.members(good)
    for index in (0, 1, len(parts) - 1):
        header = bundles.member(parts[index][0].name, b"", size=size)[0].tobuf(tarfile.GNU_FORMAT)  # any number fits
        refused(target, bundles.unsigned(bundles.compress(bundles.tar(parts[:index])[:-10240] + header)))


# --- entries that say something else than they are


def with_first(good: bytes, data: bytes) -> bytes:
    (info, _), *others = bundles.members(good)
    return bundles.forged([bundles.member(info.name, data), *others])


def changed(good: bytes, **changes: Any) -> bytes:
    """The bundle with something changed in its first manifest, sealed as it has to be."""
    first = unseal(bundles.members(good)[0][1], Manifest)
    return with_first(good, seal(msgspec.structs.replace(first, **changes)))


def test_a_forger_who_changes_everything_that_has_to_agree_needs_the_signature(target: Store, good: bytes) -> None:
    data = changed(good, model="another")
    assert "is not signed" in refused(target, data, allow_unsigned=False)
    path = target.root / "forged"
    path.write_bytes(data)
    unpack(target, path, allow_unsigned=True)
    assert "another" in {entry.model for entry in target.manifests()}


def test_a_manifest_of_another_entry(target: Store, good: bytes) -> None:
    for changes in ({"key": key_of({"other": "1"})}, {"shard": "rank7"}):
        assert "is the manifest of another entry" in refused(target, changed(good, **changes))


def test_a_manifest_for_another_platform(target: Store, good: bytes) -> None:
    assert "has entries for 2 platforms" in refused(target, changed(good, platform="mars"))


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[" * 10000, b'{"format": 3, "seal": "", "record": {}}', b'{"format": 9, "anything": 1}', b"\xff"],
)
def test_what_is_no_manifest(target: Store, good: bytes, data: bytes) -> None:
    assert "is damaged: manifests/" in refused(target, with_first(good, data))


def test_a_manifest_of_a_newer_format_says_so(target: Store, good: bytes) -> None:
    text = refused(target, with_first(good, b'{"format": 9}'))
    assert f"was written in format 9, this version reads {FORMAT}" in text


def test_a_blob_that_is_another(target: Store, good: bytes) -> None:
    parts = bundles.members(good)
    for index, (info, data) in enumerate(parts):
        if "/blobs/" in info.name:
            for other in (b"", data[:-1], data + b"x", flipped(data, 0)):
                strange = bundles.member(info.name, other)
                assert "is damaged: blobs/" in refused(
                    target, bundles.forged([*parts[:index], strange, *parts[index + 1 :]])
                )


def test_a_bundle_of_an_older_version(target: Store, good: bytes) -> None:
    old = b"\x28\xb5\x2f\xfd" + good
    assert "is no bundle" in refused(target, old[:-FOOTER])


# --- bombs


def memory(target: Store, data: bytes, **options: Any) -> int:
    """Bytes of memory that refusing the bundle takes at most."""
    tracemalloc.start()
    try:
        refused(target, data, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bomb(head: bytes, megabytes: int) -> bytes:
    """An archive of `head` and then zeros."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    data = compressor.compress(head) + b"".join(compressor.compress(zeros) for _ in range(megabytes))
    return bundles.unsigned(data + compressor.flush())


def test_a_few_bytes_that_become_many(tmp_path: Path, good: bytes) -> None:
    target = Store.open(tmp_path / "target", 64 << 20)
    whole = bundles.tar(bundles.members(good))[:-10240]
    for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        for head in (b"", whole):
            header = bundles.member("v1/jit/a/b/x", b"", type=kind, size=300 << 20)[0].tobuf(tarfile.USTAR_FORMAT)
            data = bomb(head + header, 400)
            assert len(data) < 4 << 20
            assert memory(target, data) < 50 << 20
    assert memory(target, bomb(whole, 400)) < 50 << 20  # behind the end
    assert not list((target.tree.path / "tmp").iterdir())


def test_more_bytes_than_the_store_may_take(tmp_path: Path, good: bytes) -> None:
    target = Store.open(tmp_path / "target", 100)
    assert "VLLM_COMPILE_STORE_MAX_GB" in refused(target, good)
    extra = [bundles.member(f"v1/jit/a/b/{number}", b"x" * 1000) for number in range(20)]
    target = Store.open(tmp_path / "target", 10_000)
    assert "holds more than the store may take" in refused(target, bundles.forged([*bundles.members(good), *extra]))


def test_more_members_than_are_allowed(target: Store, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "FILES_MAX", 5)
    assert "in 5 files" in refused(target, good)


def test_headers_that_are_kept_take_no_memory(tmp_path: Path, good: bytes) -> None:
    target = Store.open(tmp_path / "target", 1 << 30)
    many = [bundles.member(f"v1/jit/a/b/{n}", b"", pax_headers={"comment": "x" * 500_000}) for n in range(200)]
    assert memory(target, bundles.forged(many)) < 50 << 20


def test_a_manifest_has_a_bound(target: Store, good: bytes) -> None:
    assert "bytes, more than" in refused(target, changed(good, model="x" * (5 << 20)))


def test_a_json_bomb(target: Store, good: bytes) -> None:
    for text in (b"[" * 5_000_000, b'{"a":' * 1_000_000, b'{"format": 3, "more": ' + b"[" * 100_000):
        refused(target, with_first(good, text))


def test_headers_within_headers(target: Store) -> None:
    deep = bundles.member("x", b"", type=tarfile.GNUTYPE_LONGNAME)[0].tobuf(tarfile.GNU_FORMAT) * 5000
    refused(target, bundles.unsigned(bundles.compress(deep + bytes(10240))))


# --- a disk that fails


class Failing:
    """A function that works `times` times, and then finds the disk full or does `then`."""

    def __init__(self, function: Callable[..., Any], times: int, then: Callable[[], None] | None = None) -> None:
        self.function, self.left, self.then = function, times, then

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left >= 0:
            return self.function(*args, **kwargs)
        if self.then:
            return self.then()
        raise OSError(errno.ENOSPC, "No space left on device")


def test_every_write_that_fails_leaves_the_old_or_the_new_entry(tmp_path: Path, good: bytes, source: Store) -> None:
    path = tmp_path / "good.bundle"
    path.write_bytes(good)
    for call in ("replace", "fchmod", "fsync", "mkdir", "open"):
        times = 0
        while True:
            target = Store.open(tmp_path / f"{call} {times}")
            mine = bundles.entry(target, "llama", created=1.0, members={"plan": target.put(b"older")})
            own = bundles.entry(target, "of its own")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, call, Failing(getattr(os, call), times))
                done = False
                with suppress(OSError, BundleError):
                    unpack(target, path, allow_unsigned=True)
                    done = True
            assert target.verify() == []
            found = target.find(mine.key, "rank0")
            assert found in (mine, source.find(mine.key, "rank0"))
            assert target.find(own.key, "rank0") == own
            for entry in target.manifests():
                for blob in entry.members.values():
                    target.get(blob)
            shutil.rmtree(target.root)
            if done:
                break
            times += 7 if call == "open" else 1


def test_an_unpack_that_is_killed_leaves_the_old_or_the_new_entry(tmp_path: Path, good: bytes, source: Store) -> None:
    path = tmp_path / "good.bundle"
    path.write_bytes(good)
    for times in range(100):
        target = Store.open(tmp_path / str(times))
        mine = bundles.entry(target, "llama", created=1.0, members={"plan": target.put(b"older")})
        child = os.fork()
        if child == 0:
            os.replace = Failing(os.replace, times, lambda: os._exit(9))
            unpack(target, path, allow_unsigned=True)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert target.verify() == []
        assert target.find(mine.key, "rank0") in (mine, source.find(mine.key, "rank0"))
        for left in (target.tree.path / "tmp").iterdir():
            os.utime(left, (0, 0))
        evict.trim(target)
        assert not list((target.tree.path / "tmp").iterdir())
        if status == 0:
            break
        assert status == 9
    assert times > 10
    assert list(target.manifests()) == list(source.manifests())


# --- fuzz: whatever the bytes are, a BundleError or the content as it was packed


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.open(tmp_path_factory.mktemp("fuzzed") / "store", 100 << 20)


FUZZ = settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))


def survives(store: Store, source: Store, data: bytes) -> None:
    path = store.root.parent / "fuzz.bundle"
    path.write_bytes(data)
    try:
        unpack(store, path, allow_unsigned=True)
    except BundleError:
        pass
    else:
        entries: dict[tuple[str, str], Manifest] = {(e.key, e.shard): e for e in source.manifests()}
        assert all(entry == entries.get((entry.key, entry.shard), entry) for entry in store.manifests())
    assert store.verify() == []
    assert not list((store.tree.path / "tmp").iterdir())


@FUZZ
@given(data=st.binary(max_size=2000))
def test_any_bytes(fuzzed: Store, source: Store, data: bytes) -> None:
    survives(fuzzed, source, data)
    survives(fuzzed, source, bundles.unsigned(data))
    survives(fuzzed, source, bundles.unsigned(bundles.compress(data)))


@FUZZ
@given(data=st.data())
def test_a_bundle_with_some_bytes_changed(fuzzed: Store, source: Store, good: bytes, data: st.DataObject) -> None:
    inside = gzip.decompress(good[:-FOOTER])
    for whole, wrap in ((good, bytes), (inside, lambda changed: bundles.unsigned(bundles.compress(changed)))):
        start = data.draw(st.integers(0, len(whole)))
        length = data.draw(st.integers(0, 600))
        new = data.draw(st.binary(max_size=600))
        survives(fuzzed, source, wrap(whole[:start] + new + whole[start + length :]))


@FUZZ
@given(block=st.binary(min_size=512, max_size=512), start=st.integers(0, 511))
def test_any_header(fuzzed: Store, source: Store, good: bytes, block: bytes, start: int) -> None:
    """Also ones whose checksum is right."""
    header = bytearray(bundles.member("v1/jit/a/b/x", b"")[0].tobuf(tarfile.USTAR_FORMAT))
    header[start:] = block[start:]
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    whole = bundles.tar(bundles.members(good))
    for data in (block, bytes(header)):
        survives(fuzzed, source, bundles.unsigned(bundles.compress(data + whole)))
