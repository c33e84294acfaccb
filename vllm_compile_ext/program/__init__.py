"""A compiled model as data: Dynamo's bytecode, the plan, and the distinct pieces with their kernels."""

from __future__ import annotations

import time
from collections.abc import Mapping

from vllm_compile_ext import platforms
from vllm_compile_ext.store.store import Blob, Manifest, Store


class NotKept(Exception):  # noqa: N818 - an answer, not an error
    """Something of a compiled model has no bytes that mean the same in another process; the message says what."""


def commit(
    store: Store,
    kind: str,
    key: str,
    shard: str,
    model: str,
    factors: Mapping[str, str],
    members: Mapping[str, Blob],
) -> None:
    """Write an entry (see `Manifest`) that this machine has made now.  Raises `OSError`."""
    store.commit(
        Manifest(
            kind=kind,
            key=key,
            shard=shard,
            model=model,
            created=time.time(),
            platform=platforms.name(),
            factors=dict(factors),
            members=dict(members),
        )
    )
