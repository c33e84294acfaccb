"""Bundles that are damaged or made to do harm: each is refused, and the store is as it was."""

from __future__ import annotations

import errno
import io
import os
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.artifacts import bundles
from vllm_compile_ext.artifacts import archive, bundle, files
from vllm_compile_ext.artifacts.bundle import BundleError, pack, unpack
from vllm_compile_ext.artifacts.key import key_of
from vllm_compile_ext.artifacts.manifest import Manifest, decode, digest, encode
from vllm_compile_ext.artifacts.store import Store

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


@pytest.mark.parametrize("more", [b"x", bytes(512), bundles.compress(b"x"), bundles.compress(b"")])
def test_bytes_behind_the_end(target: Store, signed: bytes, more: bytes) -> None:
    assert "has bytes behind its end" in refused(target, signed + more, trust=TRUST)


def flipped(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1 << index % 8]) + data[index + 1 :]


def test_every_flipped_byte_of_the_file(target: Store, signed: bytes) -> None:
    same = 0  # zstd has several ways to say some things
    for index in range(len(signed)):
        data = flipped(signed, index)
        try:
            same += bundles.decompress(data) == bundles.decompress(signed)
        except zstandard.ZstdError:
            refused(target, data, trust=TRUST, allow_unsigned=False)
    assert same < 20


def test_flipped_bytes_inside(target: Store, signed: bytes) -> None:
    """Damage that the compression does not notice, such as a forger's."""
    inside = bundles.decompress(signed)
    with tarfile.open(fileobj=io.BytesIO(inside)) as opened:
        # The checksum of a header is a number with any padding, in bytes 148 to 155.
        sums = {info.offset + place for info in opened for place in range(148, 156)}
    for index in set(range(0, len(inside), 17)) - sums:
        refused(target, bundles.compress(flipped(inside, index)), trust=TRUST, allow_unsigned=False)


def test_members_that_are_left_out_doubled_or_exchanged(target: Store, signed: bytes) -> None:
    parts = bundles.members(signed)
    for index in range(len(parts)):
        for changed in (
            parts[:index] + parts[index + 1 :],
            parts[: index + 1] + parts[index:],
            [*parts[:index], *parts[index + 1 : index + 2], parts[index], *parts[index + 2 :]],
            [*parts, parts[index]],
        ):
            if changed != parts:
                refused(target, bundles.compress(bundles.tar(changed)), trust=TRUST)


def test_every_content_exchanged_for_another(target: Store, signed: bytes) -> None:
    parts = bundles.members(signed)
    for index, (info, data) in enumerate(parts):
        for other in (b"", bytes(len(data)), data + b"x", parts[index - 1][1]):
            changed = [*parts[:index], bundles.member(info.name, other), *parts[index + 1 :]]
            refused(target, bundles.compress(bundles.tar(changed)), trust=TRUST)


@pytest.mark.parametrize(
    "data", [b"", b"x", b"PK\x03\x04", bytes(10000), bundles.compress(b""), bundles.compress(b"x")]
)
def test_what_is_no_bundle_at_all(target: Store, data: bytes) -> None:
    refused(target, data)


def test_a_plain_tar(target: Store, good: bytes) -> None:
    assert "or no bundle" in refused(target, bundles.decompress(good))


# --- members that a tar archive can have and a bundle cannot


@pytest.mark.parametrize(
    "name", ["../../../tmp/x", "/etc/cron.d/x", "blobs/../../x", "blobs/./x", "", ".", "index.json", "x" * 100]
)
def test_a_name_that_leads_elsewhere(target: Store, good: bytes, name: str) -> None:
    parts = bundles.members(good)
    for index in (0, 1, 2, len(parts) - 1):
        changed = [*parts]
        changed[index] = bundles.member(name, parts[index][1])
        if changed[index][0].name != parts[index][0].name:
            assert repr(name) in refused(target, bundles.compress(bundles.tar(changed)))


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.DIRTYPE, "a folder"),
        *((kind, "no plain file") for kind in (tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE)),
        *((kind, "no plain file") for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)),
        *((kind, "no plain file") for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, b"Z")),
    ],
)
def test_a_member_that_is_no_plain_file(target: Store, good: bytes, kind: bytes, what: str) -> None:
    parts = bundles.members(good)
    for index in (0, 1, 2, len(parts) - 1):
        changed = [*parts]
        info, data = parts[index]
        changed[index] = bundles.member(info.name, data, type=kind, linkname="/etc/passwd")
        assert what in refused(target, bundles.compress(bundles.tar(changed)))


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 8 << 30 - 1, 1 << 40, -1, -(1 << 40)])
def test_a_member_that_says_another_size(target: Store, good: bytes, size: int) -> None:
    parts = bundles.members(good)
    for index in (0, 1, 2, len(parts) - 1):
        info = bundles.member(parts[index][0].name, b"", size=size)[0]
        header = info.tobuf(tarfile.GNU_FORMAT)  # has room for any number
        data = bundles.tar(parts[:index])[:-1024] + header + bundles.tar([parts[index]])[512:]
        refused(target, bundles.compress(data))


# --- an index that says too much


def paths(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of everything in a JSON value."""
    yield place
    if isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*place, name))


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """`value` with `new` at a place."""
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = put(value[place[0]], place[1:], new)
    return copy


@pytest.mark.parametrize(
    "new", [None, True, -1, 1 << 80, 0.5, "", "../x", "x\x1b[31m", "é" * 300, [], {}, [[]], {"a": 1}]
)
def test_every_value_of_the_index_exchanged(target: Store, good: bytes, new: Any) -> None:
    found = bundles.index(good)
    for place in paths(found):
        changed = put(found, place, new)
        if changed not in (found, found | {"jit": {}}):
            refused(target, bundles.with_index(good, changed))


def test_every_field_of_the_index_left_out_or_added(target: Store, good: bytes) -> None:
    found = bundles.index(good)
    for place in paths(found):
        inner = found
        for step in place:
            inner = inner[step]
        if isinstance(inner, dict):
            refused(target, bundles.with_index(good, put(found, place, inner | {"more": 1})))
            for name in inner.keys() - {"format"}:
                less = {other: value for other, value in inner.items() if other != name}
                refused(target, bundles.with_index(good, put(found, place, less)))


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "/etc/x",
        "../x",
        "a/../x",
        "a/..",
        "a/./x",
        "a//x",
        "a/",
        "a\\x",
        "a\0x",
        "a\nx",
        "\x1b[31m",
        "\u202e",
        "n" * 256,
        "ü" * 128,
        "a/" * 600 + "x",
    ],
)
def test_a_kernel_file_that_leads_elsewhere(target: Store, good: bytes, path: str) -> None:
    found = bundles.index(good)
    first, *others = found["jit"].items()
    text = refused(target, bundles.with_index(good, found | {"jit": dict([(path, first[1]), *others])}))
    assert "has an index that is not allowed" in text
    assert text.isprintable()


def test_a_kernel_file_that_is_the_folder_of_another(target: Store, good: bytes) -> None:
    found = bundles.index(good)
    (one, blob), (_, other) = found["jit"].items()
    text = refused(target, bundles.with_index(good, found | {"jit": {one: blob, f"{one}/x": other}}))
    assert f"{one!r} is a file and a folder" in text


@pytest.mark.parametrize("key", ["../" * 21 + "x", "AB" * 32, "a" * 63, "", "a" * 64 + "\n"])
@pytest.mark.parametrize("name", ["key", "shard"])
def test_an_entry_that_leads_elsewhere(target: Store, good: bytes, name: str, key: str) -> None:
    found = bundles.index(good)
    value = key if name == "key" else f"../{key[:50]}"
    assert "not allowed" in refused(target, bundles.with_index(good, put(found, ("manifests", 0, name), value)))


def test_something_named_twice(target: Store, good: bytes) -> None:
    found = bundles.index(good)
    for name, what in (("manifests", "an entry is named twice"), ("blobs", "a blob is named twice")):
        assert what in refused(target, bundles.with_index(good, found | {name: found[name] + found[name][:1]}))


def test_nothing_in_it(target: Store, good: bytes) -> None:
    assert "no entry" in refused(target, bundles.with_index(good, bundles.index(good) | {"manifests": []}))


def test_more_bytes_than_are_allowed(target: Store, good: bytes) -> None:
    found = bundles.index(good)
    blobs = [{"digest": digest(str(number).encode()), "size": 1 << 30} for number in range(8)]
    assert "members of 85899" in refused(target, bundles.with_index(good, found | {"blobs": blobs}))
    big = put(found, ("manifests", 0, "file", "size"), bundle.WHOLE_MAX + 1)
    assert "16777217 bytes" in refused(target, bundles.with_index(good, big))
    big = put(found, ("jit", bundles.GROUP, "file", "size"), bundle.WHOLE_MAX + 1)
    assert "16777217 bytes" in refused(target, bundles.with_index(good, big))


def test_more_members_than_are_allowed(target: Store, good: bytes) -> None:
    blobs = [{"digest": f"{number:064x}", "size": 0} for number in range(bundle.MEMBERS_MAX)]
    text = refused(target, bundles.with_index(good, bundles.index(good) | {"blobs": blobs}))
    assert "at most 100000" in text


def test_a_newer_format_says_what_to_do(target: Store, good: bytes) -> None:
    for changed in (bundles.index(good) | {"format": 2, "new": 1}, {"format": 2}):
        text = refused(target, bundles.with_index(good, changed))
        assert "was written in format 2, this version reads 1: use the vllm-compile-ext it was made with" in text


# --- manifests that say something else than the index


def forged(good: bytes, **changes: Any) -> bytes:
    """The bundle with something changed in its first manifest, and an index that agrees."""
    first = decode(bundles.members(good)[2][1])
    return bundles.replaced(good, 2, encode(msgspec.structs.replace(first, **changes)))


def test_a_forger_who_changes_everything_that_has_to_agree_needs_the_signature(target: Store, good: bytes) -> None:
    data = forged(good, model="another")
    assert "is not signed" in refused(target, data, allow_unsigned=False)
    path = target.root / "forged"
    path.write_bytes(data)
    unpack(target, path, allow_unsigned=True)
    assert "another" in {entry.model for entry in target.manifests()}


def test_a_manifest_of_another_entry(target: Store, good: bytes) -> None:
    for changes in ({"key": key_of({"other": "1"})}, {"shard": "rank7"}):
        assert "has the manifest of another entry" in refused(target, forged(good, **changes))


def test_a_manifest_for_another_platform(target: Store, good: bytes) -> None:
    assert "for 'mars', but says it is for" in refused(target, forged(good, platform="mars"))
    changed = bundles.index(good) | {"platform": "mars"}
    assert "but says it is for 'mars'" in refused(target, bundles.with_index(good, changed), platforms={"mars"})


def test_a_manifest_whose_blobs_are_missing(target: Store, good: bytes) -> None:
    found = bundles.index(good)
    for index in range(len(found["blobs"])):
        less = found | {"blobs": found["blobs"][:index] + found["blobs"][index + 1 :]}
        assert "lacks 1 blobs of" in refused(target, bundles.with_index(good, less))


def test_a_manifest_of_a_newer_format(target: Store, good: bytes) -> None:
    data = bundles.replaced(good, 2, b'{"format": 3, "anything": 1}')
    assert "was written in format 3, this version reads 2" in refused(target, data)


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 10000, b'{"format": 2, "seal": "", "manifest": {}}'])
def test_what_is_no_manifest(target: Store, good: bytes, data: bytes) -> None:
    assert "has a member 'manifests/" in refused(target, bundles.replaced(good, 2, data))


# --- bombs


def memory(target: Store, data: bytes) -> int:
    """Bytes of memory that refusing the bundle takes at most."""
    tracemalloc.start()
    try:
        refused(target, data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bomb(head: bytes, gigabytes: int) -> bytes:
    """A frame of `head` and then zeros."""
    frame = zstandard.ZstdCompressor().compressobj()
    zeros = bytes(1 << 20)
    return frame.compress(head) + b"".join(frame.compress(zeros) for _ in range(gigabytes << 10)) + frame.flush()


def test_a_few_bytes_that_become_gigabytes(target: Store, good: bytes) -> None:
    whole = bundles.tar(bundles.members(good))
    tail = bundles.tar([bundles.member("index.json", b"", size=bundle.INDEX_MAX)])[:512]
    endless = bundles.tar([bundles.member("index.json", b"", size=(8 << 30) - 1)])[:512]
    for head in (b"", whole, whole[:-1024], endless, whole[:-100]):
        data = bomb(head, 2)
        assert len(data) < 300_000
        assert memory(target, data) < 50 << 20
    assert memory(target, bomb(tail, 2)) < 200 << 20  # an index may have 64 MB


def test_a_window_that_takes_much_memory(target: Store, good: bytes) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    data = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    large = data.compress(bundles.decompress(good)) + data.flush()
    assert "too much memory" in refused(target, large)


def test_a_json_bomb(target: Store, good: bytes) -> None:
    for text in (b"[" * 5_000_000, b'{"a":' * 1_000_000, b'{"format": 1, "more": ' + b"[" * 100_000):
        parts = [bundles.member("index.json", text), *bundles.members(good)[1:]]
        refused(target, bundles.compress(bundles.tar(parts)))
    parts = bundles.members(good)
    for text in (b"[" * 999, b"{}", b"nul", b'{"key": "", "value": ""}', b'{"key": "QQ==", "value": "QQ=="}'):
        changed = [parts[0], bundles.member("signature.json", text), *parts[2:]]
        refused(target, bundles.compress(bundles.tar(changed)))


# --- a disk that fails


class Failing:
    """A function that works `times` times, and then finds the disk full or does `then`."""

    def __init__(self, function: Callable[..., None], times: int, then: Callable[[], None] | None = None) -> None:
        self.function, self.left, self.then = function, times, then

    def __call__(self, *args: Any) -> None:
        self.left -= 1
        if self.left >= 0:
            self.function(*args)
        elif self.then:
            self.then()
        else:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_every_write_and_every_move_that_fails(target: Store, good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "good.bundle"
    path.write_bytes(good)
    before = bundles.content(target)
    steps = len(bundles.members(good)) - 2
    # Writing moves too: into `tmp` first.
    for name, total in (("write", steps), ("move", 2 * steps)):
        for times in range(total):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(files, name, Failing(getattr(files, name), times))
                with pytest.raises(OSError, match="No space left"):
                    unpack(target, path, allow_unsigned=True)
            left = bundles.content(target).keys() - before.keys()
            assert not [key for key in left if key.startswith(("manifests", "tmp"))]
            if times < steps:
                assert not left
    assert target.verify() == []
    unpack(target, path, allow_unsigned=True)
    assert len(list(target.manifests())) == 5


def test_an_unpack_that_is_killed_leaves_nothing_that_is_used(target: Store, good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "good.bundle"
    path.write_bytes(good)
    for times in range(len(bundles.members(good)) - 2):
        child = os.fork()
        if child == 0:
            files.write = Failing(files.write, times, lambda: os._exit(9))  # type: ignore[assignment]
            unpack(target, path, allow_unsigned=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert [entry.model for entry in target.manifests()] == ["of its own"]
    for left in target.layout.tmp.iterdir():
        os.utime(left, (0, 0))
    target.gc()
    assert not list(target.layout.tmp.iterdir())
    assert target.verify() == []


# --- fuzz: whatever the bytes are, a BundleError or the content as it was packed


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.open(tmp_path_factory.mktemp("fuzzed") / "store")


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
        assert all(entry == entries[entry.key, entry.shard] for entry in store.manifests())
    assert store.verify() == []
    assert not list(store.layout.tmp.iterdir())


@FUZZ
@given(data=st.binary(max_size=2000))
def test_any_bytes(fuzzed: Store, source: Store, data: bytes) -> None:
    survives(fuzzed, source, data)
    survives(fuzzed, source, bundles.compress(data))


@FUZZ
@given(data=st.data())
def test_a_bundle_with_some_bytes_changed(fuzzed: Store, source: Store, good: bytes, data: st.DataObject) -> None:
    for whole, wrap in ((good, bytes), (bundles.decompress(good), bundles.compress)):
        start = data.draw(st.integers(0, len(whole)))
        length = data.draw(st.integers(0, 600))
        new = data.draw(st.binary(max_size=600))
        survives(fuzzed, source, wrap(whole[:start] + new + whole[start + length :]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(data=st.data())
def test_an_index_with_something_else_in_it(fuzzed: Store, source: Store, good: bytes, data: st.DataObject) -> None:
    found = bundles.index(good)
    for _ in range(data.draw(st.integers(1, 3))):
        found = put(found, data.draw(st.sampled_from(list(paths(found)))), data.draw(JSON))
    survives(fuzzed, source, bundles.with_index(good, found))


@FUZZ
@given(block=st.binary(min_size=512, max_size=512), start=st.integers(0, 511))
def test_any_header(block: bytes, start: int) -> None:
    """Also ones whose checksum is right."""
    header = bytearray(bundles.member("index.json", b"")[0].tobuf(tarfile.USTAR_FORMAT))
    header[start:] = block[start:]
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    for data in (block, bytes(header)):
        path = bundles.compress(data + bytes(2048))
        reader = archive.Reader(io.BytesIO(path))
        try:
            _, size = reader.header()
            for _ in reader.parts(size):
                pass
        except archive.ArchiveError:
            pass
