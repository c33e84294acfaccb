"""Stores with something to pack, and bundles made by hand: wrong in one way and right in all others."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.unit.store import program
from vllm_compile_ext.store.bundle import FOOTER, MAGIC
from vllm_compile_ext.store.store import Manifest, Store, key_of

PLATFORM = "linux-x86_64 cpu AVX2"
KERNEL = "triton/host/HASH/kernel.cubin"
GROUP = "triton/host/HASH/__grp__kernel.json"


def entry(store: Store, name: str, shard: str = "rank0", **changes: Any) -> Manifest:
    """Put the entry `name` into `store` as a process did that has ended since: nothing holds it."""
    parts = {"plan": f"plan of {name}", "piece/0/(1, 256)": "that all share", "piece/1/(1, 256)": f"of {name}"}
    data = {member: text.encode() * 20 for member, text in parts.items()} if "members" not in changes else {}
    made = program.manifest(store, name, data, shard, **{"platform": PLATFORM, "created": 1_700_000_000.0} | changes)
    store.add(made)
    return made


def filled(root: Path) -> Store:
    """A store with two models, one of them on two ranks, a piece, and what Triton leaves: a kernel and a list of it."""
    store = Store.open(root)
    entry(store, "llama")
    entry(store, "llama", "rank1")
    entry(store, "qwen")
    entry(store, "qwen", "piece", kind="piece", key=key_of({"piece": "0"}), factors={"piece": "0"})
    group = f'{{"child_paths": {{"kernel.cubin": "{store.jit / KERNEL}"}}}}'
    for path, data in ((KERNEL, b"machine code" * 10), (GROUP, group.encode())):
        store.tree.write(store.jit.name, *path.split("/"), data=data)
    return store


def content(store: Store) -> dict[str, bytes]:
    """Everything in a store that someone could read, and what is still in `tmp`."""
    top = store.tree.path
    found = (Path(place, name).relative_to(top) for place, _, names in os.walk(top) for name in names)
    return {str(path): (top / path).read_bytes() for path in found if path.parts[0] != "locks"}


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes, **changes: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in changes.items():
        setattr(info, field, value)
    return info, data


def tar(members: Iterable[Member], made: int = tarfile.PAX_FORMAT) -> bytes:
    """The archive of `members`, whatever their headers say."""
    written = b"".join(info.tobuf(made) + data + bytes(-len(data) % 512) for info, data in members)
    return written + bytes(10240)


def unsigned(archive: bytes) -> bytes:
    """The unsigned bundle with these bytes before its footer."""
    return archive + MAGIC + bytes(FOOTER - len(MAGIC))


def forged(parts: Iterable[Member]) -> bytes:
    """The unsigned bundle with these members."""
    return unsigned(gzip.compress(tar(parts)))


def members(bundle: bytes) -> list[Member]:
    """The members of a good bundle, as `tar` takes them."""
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(bundle[:-FOOTER]))) as opened:
        found = [(info, opened.extractfile(info)) for info in opened]
        return [member(info.name, file.read(), mtime=info.mtime) for info, file in found if file is not None]
