"""Whatever a manifest's file holds, decoding gives what was encoded or a ManifestError."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_compile_ext.store.store import FORMAT, Blob, Manifest, ManifestError, digest, seal, unseal

KEY = "ab" * 32
BLOB = Blob("cd" * 32, 7)


def made(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "kind": "program",
        "key": KEY,
        "shard": "rank0",
        "model": "Llama über",
        "created": 1.5,
        "platform": "linux-x86_64 cpu AVX512",
        "factors": {"torch": "2.13.0"},
        "members": {"bytecode": BLOB, "piece/0/(1, 256)": BLOB},
    }
    return Manifest(**(values | changes))


def decode(data: bytes) -> Manifest:
    return unseal(data, Manifest)


GOOD = seal(made())


def sealed(inner: bytes, outer: str = f'"format": {FORMAT}') -> bytes:
    """A file whose seal is right, whatever it seals."""
    return b'{%s, "seal": "%s", "record": %s}' % (outer.encode(), digest(inner).encode(), inner)


def inner(**changes: Any) -> bytes:
    """The sealed part of a good manifest, with `changes` that `Manifest` itself would not let through."""
    return json.dumps(json.loads(msgspec.json.encode(made())) | changes).encode()


def test_gives_back_what_was_encoded() -> None:
    assert decode(GOOD) == made()
    assert decode(sealed(inner())) == made()
    assert json.loads(GOOD)["record"]["members"]["bytecode"] == {"digest": BLOB.digest, "size": 7}, "JSON for others"


def test_every_cut_and_every_flipped_bit_is_noticed() -> None:
    for index in range(len(GOOD)):
        damaged = [GOOD[:index] + bytes([GOOD[index] ^ 1 << bit]) + GOOD[index + 1 :] for bit in range(8)]
        for data in (GOOD[:index], *damaged):
            with pytest.raises(ManifestError):
                decode(data)


@pytest.mark.parametrize("data", [seal(made(), 4), b'{"format": 4}', sealed(inner(new_field=1), '"format": 4')])
def test_a_newer_format_says_so(data: bytes) -> None:
    with pytest.raises(ManifestError, match="format 4, this version reads 3"):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"[]",
        b"null",
        b'{"format": 1}',
        b'{"format": "1"}',
        b'{"format": true}',
        b'{"format": 1, "x": ' + b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        sealed(b"[" * 100_000 + b"]" * 100_000),
        sealed(b"{}"),
        sealed(b'"\xff\xfe"'),
        sealed(inner(), '"format": 1, "more": 1'),
        sealed(inner(unknown=1)),
        sealed(inner(factors={"a": 1})),
        sealed(inner(created="now")),
        sealed(inner(members={"a": {"digest": BLOB.digest, "size": -1}})),
        sealed(inner(members={"a": {"digest": BLOB.digest, "size": 1.5}})),
        sealed(inner(members={"a": {"digest": BLOB.digest, "size": 1, "path": "/etc"}})),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        decode(data)


BAD_KEYS = ["", "ab", "AB" * 32, "ab" * 32 + "\n", "../" + "a" * 61, "ab" * 33]
BAD_SHARDS = ["", ".", "..", "../rank0", "a/b", "a\\b", ".hidden", "rank0\n", "rank0\0", "a..b", "é", "r" * 101]
BAD_MEMBERS = ["", ".", "..", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", "a\\b", "a\0b", "a\nb", "m" * 201]


@pytest.mark.parametrize(
    ("problem", "changes"),
    [
        *(("key", {"key": key}) for key in BAD_KEYS),
        *(("shard", {"shard": shard}) for shard in BAD_SHARDS),
        *(("member", {"members": {name: {"digest": BLOB.digest, "size": 7}}}) for name in BAD_MEMBERS),
        *(("digest", {"members": {"a": {"digest": key, "size": 7}}}) for key in BAD_KEYS),
    ],
)
def test_names_that_are_not_safe_in_a_path_are_refused(problem: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match=problem):
        decode(sealed(inner(**changes)))
    with pytest.raises(ManifestError, match=problem):
        made(**changes | {"members": {name: Blob(**blob) for name, blob in changes.get("members", {}).items()}})


def only_manifest_error(data: bytes) -> None:
    try:
        found = decode(data)
    except ManifestError:
        return
    assert decode(seal(found)) == found


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
