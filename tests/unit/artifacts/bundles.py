"""Stores with something to pack, and bundles made by hand: wrong in one way and right in all others."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from vllm_compile_ext.artifacts import files
from vllm_compile_ext.artifacts.key import key_of
from vllm_compile_ext.artifacts.manifest import Blob, Manifest, digest, encode
from vllm_compile_ext.artifacts.store import Store

PLATFORM = "linux-x86_64 cpu AVX2"
KERNEL = "triton/host/HASH/kernel.cubin"
GROUP = "triton/host/HASH/__grp__kernel.json"


def entry(store: Store, name: str, shard: str = "rank0", **changes: Any) -> Manifest:
    """Put the entry `name` into `store` as a process did that has ended since: nothing holds it."""
    if "members" not in changes:
        parts = {"plan": f"plan of {name}", "piece/0/(1, 256)": "that all share", "piece/1/(1, 256)": f"of {name}"}
        changes["members"] = {member: store.put(text.encode() * 20) for member, text in parts.items()}
    values: dict[str, Any] = {
        "kind": "program",
        "key": key_of({"model": name, "torch": "2.13.0"}),
        "shard": shard,
        "model": name,
        "created": 1_700_000_000.0,
        "platform": PLATFORM,
        "factors": {"model": name, "torch": "2.13.0"},
    }
    made = Manifest(**(values | changes))
    files.write(store.layout.manifest(made.key, made.shard), encode(made), store.layout.tmp)
    return made


def kernels(store: Store) -> None:
    """What Triton leaves: a kernel and the file with the places of its files."""
    place = store.layout.jit / KERNEL
    files.write(place, b"machine code" * 10, store.layout.tmp)
    group = f'{{"child_paths": {{"kernel.cubin": "{place}"}}}}'
    files.write(store.layout.jit / GROUP, group.encode(), store.layout.tmp)


def filled(root: Path) -> Store:
    """A store with two models, one of them on two ranks, a piece and a kernel."""
    store = Store.open(root)
    entry(store, "llama")
    entry(store, "llama", "rank1")
    entry(store, "qwen")
    entry(store, "qwen", "piece", kind="piece", key=key_of({"piece": "0"}), factors={"piece": "0"})
    kernels(store)
    return store


def content(store: Store) -> dict[str, bytes]:
    """Everything in a store that someone could read, and what is still in `tmp`."""
    found = (Path(place, name) for place, _, names in os.walk(store.layout.v1) for name in names)
    return {
        str(path.relative_to(store.layout.v1)): path.read_bytes()
        for path in found
        if not path.is_relative_to(store.layout.locks)
    }


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes, **changes: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in changes.items():
        setattr(info, field, value)
    return info, data


def tar(members: Iterable[Member]) -> bytes:
    """The archive of `members`, whatever their headers say."""
    written = b"".join(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512) for info, data in members)
    return written + bytes(1024)


def compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def decompress(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


def members(bundle: bytes) -> list[Member]:
    """The members of a good bundle, as `tar` takes them."""
    with tarfile.open(fileobj=io.BytesIO(decompress(bundle))) as opened:
        found = [(info, opened.extractfile(info)) for info in opened]
        return [member(info.name, file.read()) for info, file in found if file is not None]


def contents(bundle: bytes) -> dict[str, bytes]:
    """The members of a good bundle by name."""
    return {info.name: data for info, data in members(bundle)}


def index(bundle: bytes) -> Any:
    return msgspec.json.decode(members(bundle)[0][1])


def with_index(bundle: bytes, new: Any) -> bytes:
    """The bundle with another index, unsigned, and with the members that it had."""
    return rebuilt(members(bundle), new)


def rebuilt(parts: list[Member], new: Any) -> bytes:
    head = [member("index.json", msgspec.json.encode(new)), member("signature.json", b"null")]
    return compress(tar(head + parts[2:]))


def replaced(bundle: bytes, number: int, data: bytes) -> bytes:
    """The bundle with `data` as the content of its member `number`, and an index that says so: a careful forger's."""
    parts, new = members(bundle), index(bundle)
    blob = msgspec.to_builtins(Blob(digest(data), len(data)))
    name = parts[number][0].name
    kind, place = name.split("/", 1)
    if kind == "manifests":
        next(e for e in new["manifests"] if name.endswith(f"{e['key']}/{e['shard']}"))["file"] = blob
    elif kind == "blobs":
        new["blobs"] = [blob if b["digest"] == place else b for b in new["blobs"]]
        name = f"blobs/{blob['digest']}"
    else:
        new["jit"][list(new["jit"])[int(place)]]["file"] = blob
    parts[number] = member(name, data)
    return rebuilt(parts, new)
