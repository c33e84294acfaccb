"""Where things are in a store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_compile_ext.artifacts.manifest import Blob, check_key, check_shard


@dataclass(frozen=True)
class Layout:
    """The paths below `root`; "v1" changes when an older version could no longer share the folder."""

    root: Path

    @property
    def v1(self) -> Path:
        return self.root / "v1"

    @property
    def blobs(self) -> Path:
        return self.v1 / "blobs"

    @property
    def manifests(self) -> Path:
        return self.v1 / "manifests"

    @property
    def locks(self) -> Path:
        return self.v1 / "locks"

    @property
    def tmp(self) -> Path:
        """Files before they are renamed into place."""
        return self.v1 / "tmp"

    @property
    def jit(self) -> Path:
        """The caches of kernel compilers; not blobs."""
        return self.v1 / "jit"

    @property
    def graphs(self) -> Path:
        """What CUDA graphs took in earlier starts (cudagraphs/record.py)."""
        return self.v1 / "graphs"

    @property
    def misses(self) -> Path:
        """What was looked for and not found, for people."""
        return self.v1 / "misses"

    @property
    def store_lock(self) -> Path:
        """Shared by all writers; who has it alone may remove blobs."""
        return self.locks / "store.lock"

    def lock(self, key: str) -> Path:
        """The lock of the one writer of `key`."""
        check_key(key)
        return self.locks / f"{key}.lock"

    def blob(self, blob: Blob) -> Path:
        return self.blobs / blob.digest[:2] / blob.digest

    def variants(self, key: str, shard: str) -> list[Path]:
        """The manifests of a key that are there, of shards that are `shard` and a suffix after a dot."""
        check_key(key)
        check_shard(shard)
        return list((self.manifests / key).glob(f"{shard}.*.json"))

    def manifest(self, key: str, shard: str) -> Path:
        check_key(key)
        check_shard(shard)
        return self.manifests / key / f"{shard}.json"
