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


def test_is_json_for_other_tools() -> None:
    assert json.loads(GOOD)["record"]["members"]["bytecode"] == {"digest": BLOB.digest, "size": 7}


def test_every_truncation_is_noticed() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(ManifestError):
            decode(GOOD[:length])


def test_every_flipped_bit_is_noticed() -> None:
    for index in range(len(GOOD)):
        for bit in range(8):
            with pytest.raises(ManifestError):
                decode(GOOD[:index] + bytes([GOOD[index] ^ 1 << bit]) + GOOD[index + 1 :])


@pytest.mark.parametrize(
    "data",
    [
        seal(made(), 4),
        b'{"format": 4}',
        b'{"format": 99, "entries": [{"anything": null}]}',
        sealed(inner(new_field=1), '"format": 4'),
    ],
)
def test_a_newer_format_says_so(data: bytes) -> None:
    with pytest.raises(ManifestError, match=r"format (4|99), this version reads 3"):
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
    ("field", "value"),
    [("key", key) for key in BAD_KEYS] + [("shard", shard) for shard in BAD_SHARDS],
)
def test_names_that_are_not_safe_in_a_path_are_refused(field: str, value: str) -> None:
    with pytest.raises(ManifestError, match=field):
        made(**{field: value})
    with pytest.raises(ManifestError, match=field):
        decode(sealed(inner(**{field: value})))


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_members_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ManifestError, match="member"):
        made(members={name: BLOB})
    with pytest.raises(ManifestError, match="member"):
        decode(sealed(inner(members={name: {"digest": BLOB.digest, "size": 7}})))


@pytest.mark.parametrize("value", BAD_KEYS)
def test_digests_that_lead_elsewhere_are_refused(value: str) -> None:
    with pytest.raises(ManifestError, match="digest"):
        Blob(value, 7)
    with pytest.raises(ManifestError, match="digest"):
        decode(sealed(inner(members={"a": {"digest": value, "size": 7}})))


def only_manifest_error(data: bytes) -> None:
    try:
        found = decode(data)
    except ManifestError:
        return
    assert decode(seal(found)) == found


@given(st.binary(max_size=300))
def test_fuzz_bytes(data: bytes) -> None:
    only_manifest_error(data)


@given(st.integers(0, len(GOOD)), st.integers(0, 20), st.binary(max_size=20))
def test_fuzz_damage(start: int, removed: int, added: bytes) -> None:
    damaged = GOOD[:start] + added + GOOD[start + removed :]
    if damaged == GOOD:
        assert decode(damaged) == made()
    else:
        only_manifest_error(damaged)


@given(st.integers(0, 400), st.integers(0, 20), st.binary(max_size=20))
def test_fuzz_damage_below_a_right_seal(start: int, removed: int, added: bytes) -> None:
    whole = inner()
    only_manifest_error(sealed(whole[:start] + added + whole[start + removed :]))


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
