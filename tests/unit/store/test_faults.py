"""Many faults, one at a time, to a store with entries of several models: nothing crashes, lies, or is lost.

After each fault every entry is looked for.  One that is found is what was written, or, where a bundle was unpacked,
what that holds; one that needed a file that was damaged may be missing, and is there again once it was written again;
all others are there.
"""

from __future__ import annotations

import collections
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.unit.store import bundles, program
from vllm_compile_ext.store import evict
from vllm_compile_ext.store.bundle import BundleError, pack, unpack
from vllm_compile_ext.store.files import DamagedError
from vllm_compile_ext.store.store import Manifest, Store, UnsafeStoreError

NAMES = ("one", "two", "three")
EACH = 60
CALLS = ("open", "mkdir", "replace", "fsync", "unlink", "rmdir", "utime", "close", "fstat", "listdir")

Damaged = set[Path]


class Bench:
    """A store, a bundle with older entries of the same names, and what each entry may hold."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.chance = folder, chance
        self.root = folder / "store"
        self.made = folder / "made"
        old = Store.open(folder / "old")
        for name in NAMES:
            bundles.entry(old, name, created=1.0, members={"plan": old.put(f"older {name}".encode())})
        bundles.kernels(old)
        self.bundle = folder / "older.bundle"
        pack(old, self.bundle)
        store = Store.open(self.made)
        self.entries = {name: program.leave(store, name) for name in NAMES}
        bundles.kernels(store)
        self.older = {name: {"plan": f"older {name}".encode()} for name in NAMES}

    def fresh(self) -> Store:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.made, self.root)
        return Store.open(self.root)

    def files(self) -> list[Path]:
        return sorted(p for p in self.root.rglob("*") if p.is_file() and "/jit/" not in str(p))

    def pick(self) -> Path:
        return self.chance.choice([p for p in self.files() if "blobs" in str(p) or "manifests" in str(p)])

    def needs(self, name: str, damaged: Damaged) -> bool:
        entry = self.entries[name]
        store = Store(self.root, None, writable=False)
        places = {store.path(entry), *map(store.path, entry.members.values())}
        return bool(places & damaged) or any(place.is_relative_to(path) for place in places for path in damaged)

    def check(self, damaged: Damaged, *, older: bool = False) -> None:
        """Look for every entry as a start does, and write those again that are missing."""
        try:
            store = Store.open(self.root)
        except UnsafeStoreError:
            assert damaged
            return
        for name in NAMES:
            right = [program.members(name)] + ([self.older[name]] if older else [])
            entry = store.find(self.entries[name].key, "rank0")
            try:
                data = program.load(store, entry) if entry else None
            except DamagedError:
                data = None
            if data is None:
                assert self.needs(name, damaged), f"{name} is lost"
            else:
                assert data in right, f"{name} is another"
        for path in damaged:
            if path.is_dir() and (path.suffix or path.parent.parent.name == "blobs"):
                shutil.rmtree(path)  # for people to do: no program leaves a folder in the place of a file
        for name in NAMES:
            with store.writer(self.entries[name].key, 5) as mine:
                assert mine
                program.leave(store, name)
            assert program.load(store, store.find(self.entries[name].key, "rank0") or pytest.fail(name)) == (
                program.members(name)
            )


def changed(bench: Bench, how: Callable[[bytes], bytes]) -> Damaged:
    bench.fresh()
    path = bench.pick()
    path.write_bytes(how(path.read_bytes()))
    return {path}


def truncated(bench: Bench) -> Damaged:
    return changed(bench, lambda data: data[: bench.chance.randrange(len(data))])


def flipped(bench: Bench) -> Damaged:
    place, bit = bench.chance.random(), 1 << bench.chance.randrange(8)

    def flip(data: bytes) -> bytes:
        index = int(place * len(data))
        return data[:index] + bytes([data[index] ^ bit]) + data[index + 1 :]

    return changed(bench, flip)


def replaced(bench: Bench) -> Damaged:
    """A file by something that is none, another one, or one that others can write."""
    bench.fresh()
    path, other = bench.pick(), bench.pick()
    what = bench.chance.choice(["link", "pipe", "folder", "missing", "other", "open", "theirs"])
    data = other.read_bytes()
    if what == "open":
        path.chmod(bench.chance.choice([0o666, 0o620, 0o602]))
    elif what == "theirs" and os.geteuid() == 0:
        os.chown(path, 4242, -1)
    elif what == "other":
        path.write_bytes(data)
    else:
        path.unlink()
        if what == "link":
            path.symlink_to(other)
        elif what == "pipe":
            os.mkfifo(path)
        elif what == "folder":
            path.mkdir()
    return {path}


def swapped(bench: Bench) -> Damaged:
    """A folder for another one, while the store is open."""
    store = bench.fresh()
    victim = bench.chance.choice([p for p in bench.root.rglob("*") if p.is_dir() and "jit" not in str(p)])
    aside = bench.folder / f"aside-{time.monotonic_ns()}"
    victim.rename(aside)
    kind = bench.chance.choice(["copy", "empty", "link", "open", "theirs"])
    if kind == "link":
        victim.symlink_to(aside)
    elif kind == "empty":
        victim.mkdir(mode=0o700)
    else:
        shutil.copytree(aside, victim)
        for path in victim.rglob("*"):
            if kind != "copy" and path.is_file():
                path.write_bytes(b"evil" * 250)
        victim.chmod(0o777 if kind == "open" else 0o700)
        if kind == "theirs" and os.geteuid() == 0:
            os.chown(victim, 4242, -1)
    for name in NAMES:
        entry = store.find(bench.entries[name].key, "rank0")
        try:
            data = program.load(store, entry) if entry else None
        except DamagedError:
            data = None
        assert data in (None, program.members(name)), "others' bytes were read"
    if victim.is_symlink():
        victim.unlink()
        aside.rename(victim)
        return set()
    if kind in ("open", "theirs"):
        shutil.rmtree(victim)
        aside.rename(victim)
        return set()
    return set() if kind == "copy" else {victim}


def fork(work: Callable[[Store], object], root: Path, left: int | None = None) -> int:
    """A process that does `work` and kills itself at a system call, the number `left` of `CALLS`."""
    child = os.fork()
    if child:
        return child

    def deadly(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal left
            assert left is not None
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    code = 1
    try:
        store = Store.open(root)
        if left is not None:
            for name in CALLS:
                setattr(os, name, deadly(getattr(os, name)))
        work(store)
        code = 0
    except (BundleError, OSError, DamagedError):
        code = 0  # it was told
    finally:
        os._exit(code)


def write(store: Store) -> None:
    for name in NAMES:
        with store.writer(program.key_of(program.factors(name)), 5):
            program.write(store, name)


def clean(store: Store) -> None:
    evict.trim(store, max_bytes=store.size() - 1500)


WORK: dict[str, Callable[[Bench], Callable[[Store], object]]] = {
    "write": lambda bench: write,
    "unpack": lambda bench: lambda store: unpack(store, bench.bundle, allow_unsigned=True, replace=True),
    "pack": lambda bench: lambda store: pack(store, bench.folder / "out.bundle"),
    "clean": lambda bench: clean,
}


def evicted(bench: Bench) -> Damaged:
    """What a cleaning may have taken."""
    return {bench.root / "v1" / "manifests"}


def killed(bench: Bench) -> Damaged:
    bench.fresh()
    what = bench.chance.choice(list(WORK))
    child = fork(WORK[what](bench), bench.root, bench.chance.randrange(150))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), what
    assert Store.open(bench.root).verify() == [], what
    return evicted(bench) if what == "clean" else set()


def raced(bench: Bench) -> Damaged:
    bench.fresh()
    kinds = [bench.chance.choice(list(WORK)) for _ in range(bench.chance.choice([2, 3]))]
    children = [fork(WORK[kind](bench), bench.root) for kind in kinds]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(kinds), kinds
    assert Store.open(bench.root).verify() == [], kinds
    return evicted(bench) if "clean" in kinds else set()


def hostile(bench: Bench) -> Damaged:
    """A bundle with some of its bytes changed, inside or outside of its compression."""
    store = bench.fresh()
    data = bench.bundle.read_bytes()
    start = bench.chance.randrange(len(data))
    new = bench.chance.randbytes(bench.chance.randrange(1, 60))
    bad = bench.folder / "bad.bundle"
    if bench.chance.random() < 0.5:
        bad.write_bytes(data[:start] + new + data[start + len(new) :])
    else:
        parts = bundles.members(data)
        index = bench.chance.randrange(len(parts))
        info, inner = parts[index]
        parts[index] = bundles.member(bench.chance.choice([info.name, "v1/../x", "/x"]), inner[:-1] + new)
        bad.write_bytes(bundles.forged(parts))
    with suppress(BundleError):
        unpack(store, bad, allow_unsigned=bench.chance.random() < 0.8, replace=True)
    assert store.verify() == []
    assert not list((bench.root / "v1" / "tmp").iterdir())
    return set()


def full(bench: Bench) -> Damaged:
    """No room from some point on, as on a full disk: everything that writes fails."""
    store = bench.fresh()
    left = bench.chance.randrange(40)
    what = bench.chance.choice(list(WORK))

    def failing(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(28, "No space left on device")
            return call(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "fsync", "replace"):
            patch.setattr(os, name, failing(getattr(os, name)))
        with suppress(OSError, BundleError):
            WORK[what](bench)(store)
    assert Store.open(bench.root).verify() == []
    return evicted(bench) if what == "clean" else set()


FAULTS = {
    "files cut": truncated,
    "bits flipped": flipped,
    "files replaced": replaced,
    "folders swapped": swapped,
    "processes killed": killed,
    "processes at once": raced,
    "full disks": full,
    "hostile bundles": hostile,
}
PLAN = {"bits flipped": 2 * EACH, "processes killed": 3 * EACH}


def test_many_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power is cut here
    bench = Bench(tmp_path, random.Random(15))
    done: collections.Counter[str] = collections.Counter()
    for kind, fault in FAULTS.items():
        for _ in range(PLAN.get(kind, EACH)):
            damaged = fault(bench)
            bench.check(damaged, older=fault in (killed, raced, full, hostile))
            done[kind] += 1
    assert done.total() >= 600
    kinds = ", ".join(f"{count} {kind}" for kind, count in done.items())
    with capsys.disabled():
        print(f"\n{done.total()} faults: {kinds}; 0 crashes, 0 wrong answers, 0 lost entries")


def test_an_entry_that_is_lost_or_wrong_would_be_seen(tmp_path: Path) -> None:
    bench = Bench(tmp_path, random.Random(1))
    store = bench.fresh()
    store.path(bench.entries["one"]).unlink()
    with pytest.raises(AssertionError, match="one is lost"):
        bench.check(set())
    store = bench.fresh()
    other: Manifest = program.manifest(store, "one", {"plan": b"another"})
    store.add(other)
    with pytest.raises(AssertionError, match="one is another"):
        bench.check(set())
