"""Entries that are packed in one store and unpacked in another; more is in `tests/unit/cli/test_cache.py`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.unit.store import bundles
from vllm_compile_ext.store import bundle, evict
from vllm_compile_ext.store.bundle import FOOTER, BundleError, key_name, pack, private_key, public_key, unpack
from vllm_compile_ext.store.store import Store

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\1")
NAME = key_name(KEY.public_key())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return bundles.filled(tmp_path / "store")


@pytest.fixture
def target(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "elsewhere" / "target")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.bundle"


def carried(store: Store, target: Store, out: Path) -> set[str]:
    """Pack all of `store` without a signature, and unpack it in `target`; returns the names of what was packed."""
    pack(store, out)
    unpack(target, out, allow_unsigned=True)
    return {info.name for info, _ in bundles.members(out.read_bytes())}


def test_everything_comes_through_for_its_owner_only(store: Store, target: Store, out: Path, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        made = pack(store, out)
        assert unpack(target, out, allow_unsigned=True) == made
    finally:
        os.umask(old)
    assert list(target.manifests()) == list(store.manifests())
    assert target.verify() == []
    assert (target.jit / bundles.KERNEL).read_bytes() == (store.jit / bundles.KERNEL).read_bytes()
    assert not list((target.tree.path / "tmp").iterdir())
    for place, folders, names in os.walk(target.root):
        assert all(Path(place, folder).stat().st_mode & 0o777 == 0o700 for folder in folders)
        assert all(Path(place, name).stat().st_mode & 0o777 == 0o600 for name in names)
    pack(target, tmp_path / "again", key=KEY)
    assert (tmp_path / "again").read_bytes()[:-FOOTER] == out.read_bytes()[:-FOOTER], "equal content, equal bytes"


LISTS = [
    (b'{"child_paths": {"kernel.cubin": "/gone/kernel.cubin"}}', "kernel.cubin"),
    (b'{"child_paths": {"../../../other": "/etc/passwd"}}', "other"),  # cannot lead out of its folder
    # What only looks like a list of Triton's is carried as it is.
    *((data, None) for data in (b"", b"no json", b"[]", b'{"child_paths": 1}', b'{"other": {}}', b'{"a": ' * 5000)),
]


@pytest.mark.parametrize(("data", "name"), LISTS)
def test_triton_finds_its_kernels_in_the_new_store(
    store: Store, target: Store, out: Path, data: bytes, name: str | None
) -> None:
    (store.jit / bundles.GROUP).write_bytes(data)
    carried(store, target, out)
    place = target.jit / bundles.GROUP
    if name is None:
        assert place.read_bytes() == data
    else:
        assert [*json.loads(place.read_bytes())["child_paths"].values()] == [str(place.parent / name)]
        assert not any(b"/gone/" in packed for _, packed in bundles.members(out.read_bytes()))


def test_ninja_finds_its_kernels_up_to_date(store: Store, out: Path) -> None:
    folder = store.jit / "flashinfer/host/cached_ops/sampling"
    folder.mkdir(parents=True)
    (folder / "sampling.cu").write_text("kernel")
    (folder / "build.ninja").write_text("rule copy\n  command = cp $in $out\nbuild sampling.so: copy sampling.cu\n")

    def ninja() -> str:
        return subprocess.run(["ninja", "-C", folder], check=True, capture_output=True, text=True).stdout

    try:
        assert "no work to do" not in ninja()
    except FileNotFoundError:
        pytest.skip("there is no ninja")
    pack(store, out)
    shutil.rmtree(folder)
    unpack(store, out, allow_unsigned=True)
    assert "no work to do" in ninja()


def test_kernel_files_that_stay_behind(store: Store, target: Store, out: Path) -> None:
    """Those that cannot be unpacked, links, and what Triton has not finished."""
    folder = (store.jit / bundles.KERNEL).parent
    for path in (
        *(folder / "a\nb", folder / os.fsdecode(b"\xff"), folder / "/".join(["d"] * 17), folder / "tmp.pid_7_abc/half"),
        *(store.jit / ".started", store.jit / ".leaving-x/kernel"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "folder").symlink_to("/etc")
    os.mkfifo(folder / "pipe")
    names = {name for name in carried(store, target, out) if name.startswith("v1/jit/")}
    assert names == {f"v1/jit/{bundles.KERNEL}", f"v1/jit/{bundles.GROUP}"}


def test_unpacking_keeps_the_limit(store: Store, out: Path, tmp_path: Path) -> None:
    pack(store, out)
    target = Store.open(tmp_path / "small", 50_000)
    bundles.entry(target, "of its own", members={"plan": target.put(bytes(49_000))})
    for path in target.files():
        os.utime(target.tree.path.joinpath(*path), (0, 0))
    unpack(target, out, allow_unsigned=True)
    assert target.size() < 50_000
    assert {m.model for m in target.manifests()} == {"llama", "qwen"}


def test_the_longest_names_and_large_blobs_fit(target: Store, out: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "long")
    shard, path = "r" * 100, "/".join(["d" * 240] * 3 + ["ü" * 100])
    bundles.entry(store, "long", shard, members={"m" * 200: store.put(b"")})
    large = {"random": store.put(os.urandom(3 << 20)), "zeros": store.put(bytes(20 << 20))}
    bundles.entry(store, "large", members=large)
    store.tree.write("jit", *path.split("/"), data=b"")
    carried(store, target, out)
    assert out.stat().st_size < 4 << 20
    assert (bundles.content(target) == bundles.content(store)) is True  # pytest would print both


def test_unpacking_again_keeps_what_is_in_use_and_mends_what_is_damaged(store: Store, target: Store, out: Path) -> None:
    carried(store, target, out)
    entry = next(target.manifests())
    target.use(entry)
    whole = bundles.content(target)
    unpack(target, out, allow_unsigned=True)
    assert bundles.content(target) == whole
    assert evict.trim(target, max_bytes=0).in_use == [f"{entry.key}/{entry.shard}"]
    for path in (*target.tree.path.glob("blobs/*/*"), *target.tree.path.glob("manifests/*/*")):
        path.write_bytes(b"damaged")
    unpack(target, out, allow_unsigned=True)
    assert bundles.content(target) == whole


# --- signatures


Key = Ed25519PrivateKey
SIGNED: list[tuple[Key | None, list[Key], bool, str | None]] = [
    (None, [KEY], False, "is not signed"),
    (None, [], True, None),
    (KEY, [], False, rf"is signed by key {NAME}, which is not trusted \(trusted: none\)"),
    (KEY, [OTHER], False, r"is signed by key .*, which is not trusted \(trusted: [0-9a-f]{16}\)"),
    (KEY, [OTHER], True, None),
    (KEY, [OTHER, KEY], False, None),
]


@pytest.mark.parametrize(("key", "trust", "allow_unsigned", "refused"), SIGNED)
def test_who_signed_decides(
    store: Store, target: Store, out: Path, key: Key | None, trust: list[Key], allow_unsigned: bool, refused: str | None
) -> None:
    made = pack(store, out, key=key)
    assert made.signed_by == (key and key_name(key.public_key()))
    trusted = [one.public_key() for one in trust]
    if refused is None:
        assert unpack(target, out, trusted, allow_unsigned=allow_unsigned) == made
        return
    with pytest.raises(BundleError, match=f"out.bundle {refused}.*--allow-unsigned.*nothing of it was unpacked"):
        unpack(target, out, trusted, allow_unsigned=allow_unsigned)
    assert bundles.content(target) == {}


def test_nothing_is_opened_before_the_signature_holds(
    store: Store, target: Store, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(store, out, key=OTHER)
    for name in ("gzip", "tarfile"):
        monkeypatch.setattr(bundle, name, None)
    with pytest.raises(BundleError, match="which is not trusted"):
        unpack(target, out, [KEY.public_key()])
    out.write_bytes(b"x" + out.read_bytes()[1:])
    with pytest.raises(BundleError, match="was changed after it was signed"):
        unpack(target, out, [OTHER.public_key()])


# --- what the store has already


def test_an_older_entry_replaces_a_newer_one_only_when_told_or_where_that_is_damaged(
    store: Store, target: Store, out: Path
) -> None:
    made = pack(store, out)
    newer = bundles.entry(target, "llama", created=1_800_000_000.0, members={"plan": target.put(b"newer")})
    assert unpack(target, out, allow_unsigned=True).kept == [f"{newer.key}/rank0"]
    assert target.find(newer.key, "rank0") == newer
    assert len(list(target.manifests())) == 4
    assert unpack(target, out, allow_unsigned=True, replace=True) == made
    assert list(target.manifests()) == list(store.manifests())
    target.add(newer)
    target.path(newer.members["plan"]).write_bytes(b"other")
    assert unpack(target, out, allow_unsigned=True) == made
    assert list(target.manifests()) == list(store.manifests())


def test_a_newer_kernel_file_stays_and_one_that_is_mapped_is_never_written(
    store: Store, target: Store, out: Path
) -> None:
    pack(store, out)
    kernel = target.jit / bundles.KERNEL
    target.tree.write("jit", *bundles.KERNEL.split("/"), data=b"newer")
    unpack(target, out, allow_unsigned=True)
    assert kernel.read_bytes() == b"newer"
    with kernel.open("rb") as mapped:
        unpack(target, out, allow_unsigned=True, replace=True)
        assert kernel.read_bytes() == (store.jit / bundles.KERNEL).read_bytes()
        assert mapped.read() == b"newer"


@pytest.fixture(scope="session")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys that openssl made, as the docs say it."""
    folder = tmp_path_factory.mktemp("keys")
    for command in (
        "genpkey -algorithm ed25519 -out signing.pem",
        "pkey -in signing.pem -pubout -out signing.pub.pem",
        "pkey -in signing.pem -aes256 -passout pass:secret -out encrypted.pem",
        "genpkey -algorithm ed448 -out ed448.pem",
        "pkey -in ed448.pem -pubout -out ed448.pub.pem",
    ):
        try:
            subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("there is no openssl")
    (folder / "empty.pem").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("read", "file", "problem"),
    [
        (private_key, "signing.pub.pem", "holds no private key"),
        (private_key, "empty.pem", "holds no private key"),
        (private_key, "encrypted.pem", "is encrypted: decrypt it with openssl pkey"),
        (private_key, "ed448.pem", "holds a key of another kind"),
        (public_key, "signing.pem", "holds no public key in PEM form: openssl pkey"),
        (public_key, "empty.pem", "holds no public key"),
        (public_key, "ed448.pub.pem", "holds a key of another kind"),
    ],
)
def test_other_files_are_no_keys(pem: Path, read: Any, file: str, problem: str) -> None:
    with pytest.raises(BundleError, match=f"{file} {problem}"):
        read(pem / file)


# --- what cannot be packed


def test_what_cannot_be_packed(store: Store, target: Store, out: Path) -> None:
    with pytest.raises(BundleError, match="nothing to pack"):
        pack(target, out)
    with pytest.raises(BundleError, match=f"no entry {'ab' * 32}"):
        pack(store, out, {"ab" * 32})
    with pytest.raises(OSError, match="Not a directory"):
        pack(store, Path("/dev/full/x"))
    with pytest.raises(BundleError, match="/dev/full is not a regular file"):
        pack(store, Path("/dev/full"))
    bundles.entry(store, "gpu", platform="linux-x86_64 cuda sm_90")
    with pytest.raises(BundleError, match="cpu AVX2 and linux-x86_64 cuda sm_90, a bundle is for one platform"):
        pack(store, out)
    assert not out.exists()


def test_every_damaged_blob_is_named_and_nothing_written(store: Store, out: Path) -> None:
    out.write_bytes(b"an older bundle")
    for path in store.tree.path.glob("blobs/*/*"):
        whole = path.read_bytes()
        path.write_bytes(bytes(len(whole)))
        with pytest.raises(BundleError, match=f"{path} .*cache verify says what to do"):
            pack(store, out)
        path.write_bytes(whole)
    assert out.read_bytes() == b"an older bundle"
    assert sorted(out.parent.iterdir()) == [out, store.root]


# --- where it cannot be unpacked


def test_a_store_that_is_read_only_or_being_cleaned(
    store: Store, target: Store, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(store, out)
    with pytest.raises(BundleError, match="target cannot be written"):
        unpack(Store(target.root, None, writable=False), out, allow_unsigned=True)
    monkeypatch.setattr(bundle, "_WAIT", 0.0)
    with target.tree.lock("store", exclusive=True, timeout=0), pytest.raises(BundleError, match="another process is"):
        unpack(target, out, allow_unsigned=True)


def test_no_blob_is_removed_while_a_bundle_is_unpacked(store: Store, target: Store, out: Path) -> None:
    pack(store, out)
    put = Store.put

    def cleaned(self: Store, data: bytes) -> Any:
        blob = put(self, data)
        for path in target.tree.path.glob("blobs/*/*"):
            os.utime(path, (0, 0))
        evict.trim(target, max_bytes=0)
        return blob

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "put", cleaned)
        unpack(target, out, allow_unsigned=True)
    assert target.verify() == []
    assert list(target.manifests()) == list(store.manifests())
