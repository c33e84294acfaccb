"""Entries that are packed in one store and unpacked in another."""

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

KEY = Ed25519PrivateKey.generate()
OTHER = Ed25519PrivateKey.generate()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return bundles.filled(tmp_path / "store")


@pytest.fixture
def target(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "elsewhere" / "target")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.bundle"


def test_everything_comes_through(store: Store, target: Store, out: Path) -> None:
    made = pack(store, out)
    assert unpack(target, out, allow_unsigned=True) == made
    assert list(target.manifests()) == list(store.manifests())
    for entry in target.manifests():
        for blob in entry.members.values():
            assert target.get(blob) == store.get(blob)
    assert target.verify() == []
    assert (target.jit / bundles.KERNEL).read_bytes() == (store.jit / bundles.KERNEL).read_bytes()
    assert not list((target.tree.path / "tmp").iterdir())


def test_what_is_unpacked_is_for_its_owner_only(store: Store, target: Store, out: Path) -> None:
    old = os.umask(0)
    try:
        pack(store, out)
        unpack(target, out, allow_unsigned=True)
    finally:
        os.umask(old)
    for place, folders, names in os.walk(target.root):
        assert all(Path(place, folder).stat().st_mode & 0o777 == 0o700 for folder in folders)
        assert all(Path(place, name).stat().st_mode & 0o777 == 0o600 for name in names)


def test_triton_finds_its_kernels_in_the_new_store(store: Store, target: Store, out: Path) -> None:
    pack(store, out)
    assert not any(str(store.root).encode() in data for data in bundles.contents(out.read_bytes()).values())
    unpack(target, out, allow_unsigned=True)
    group = json.loads((target.jit / bundles.GROUP).read_bytes())
    assert group == {"child_paths": {"kernel.cubin": str(target.jit / bundles.KERNEL)}}


def test_a_list_of_triton_cannot_lead_out_of_its_folder(store: Store, target: Store, out: Path) -> None:
    (store.jit / bundles.GROUP).write_text(json.dumps({"child_paths": {"../../../other": "/etc/passwd"}}))
    pack(store, out)
    unpack(target, out, allow_unsigned=True)
    place = target.jit / bundles.GROUP
    assert json.loads(place.read_bytes()) == {"child_paths": {"../../../other": str(place.parent / "other")}}


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


def test_the_same_content_gives_the_same_bytes(store: Store, target: Store, out: Path, tmp_path: Path) -> None:
    pack(store, out)
    unpack(target, out, allow_unsigned=True)
    pack(target, tmp_path / "again.bundle")
    assert (tmp_path / "again.bundle").read_bytes() == out.read_bytes()
    pack(store, tmp_path / "signed.bundle", key=KEY)
    assert (tmp_path / "signed.bundle").read_bytes()[:-FOOTER] == out.read_bytes()[:-FOOTER]


def test_other_tools_can_list_it(store: Store, out: Path) -> None:
    made = pack(store, out)
    listed = subprocess.run(
        ["tar", "-tzf", out], capture_output=True, text=True, check=False
    )  # gzip warns of the footer
    kinds = [name.split("/")[1] for name in listed.stdout.split()]
    assert [kinds.count(kind) for kind in ("manifests", "blobs", "jit")] == [4, made.blobs, made.jit_files]


def test_some_entries_only(store: Store, target: Store, out: Path) -> None:
    (wanted,) = {entry.key for entry in store.manifests() if entry.model == "llama"}
    made = pack(store, out, {wanted}, jit=False)
    assert (made.keys, made.jit_files) == ([wanted], 0)
    unpack(target, out, allow_unsigned=True)
    assert {entry.key for entry in target.manifests()} == {wanted}
    assert target.verify() == []
    assert not target.jit.exists()


def test_a_kernel_file_that_cannot_be_unpacked_stays_behind(store: Store, target: Store, out: Path) -> None:
    folder = (store.jit / bundles.KERNEL).parent
    (folder / "a\nb").write_bytes(b"")
    (folder / os.fsdecode(b"\xff")).write_bytes(b"")
    (folder / "/".join(["d"] * 16)).mkdir(parents=True)
    (folder / "/".join(["d"] * 16) / "deep").write_bytes(b"")
    assert pack(store, out).jit_files == 2
    unpack(target, out, allow_unsigned=True)


def test_unpacking_keeps_the_limit(store: Store, out: Path, tmp_path: Path) -> None:
    pack(store, out)
    target = Store.open(tmp_path / "small", 50_000)
    bundles.entry(target, "of its own", members={"plan": target.put(bytes(49_000))})
    for path in target.files():
        os.utime(target.tree.path.joinpath(*path), (0, 0))
    unpack(target, out, allow_unsigned=True)
    assert target.size() < 50_000
    assert {m.model for m in target.manifests()} == {"llama", "qwen"}


def test_the_longest_names_fit(target: Store, out: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "long")
    shard, path = "r" * 100, "/".join(["d" * 240] * 3 + ["ü" * 100])
    bundles.entry(store, "long", shard, members={"m" * 200: store.put(b"")})
    store.tree.write("jit", *path.split("/"), data=b"")
    pack(store, out)
    unpack(target, out, allow_unsigned=True)
    assert (bundles.content(target) == bundles.content(store)) is True  # pytest would print both


def test_large_blobs(target: Store, out: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "large")
    random = os.urandom(3 << 20)
    bundles.entry(store, "large", members={"random": store.put(random), "zeros": store.put(bytes(100 << 20))})
    pack(store, out)
    assert out.stat().st_size < 4 << 20
    unpack(target, out, allow_unsigned=True)
    assert (bundles.content(target) == bundles.content(store)) is True  # pytest would print both


def test_unpacking_twice_changes_nothing_and_keeps_what_is_in_use(store: Store, target: Store, out: Path) -> None:
    pack(store, out)
    unpack(target, out, allow_unsigned=True)
    entry = next(target.manifests())
    target.use(entry)
    before = bundles.content(target)
    unpack(target, out, allow_unsigned=True)
    assert bundles.content(target) == before
    assert evict.trim(target, max_bytes=0).in_use == [f"{entry.key}/{entry.shard}"]


def test_unpacking_mends_what_is_damaged(store: Store, target: Store, out: Path) -> None:
    pack(store, out)
    unpack(target, out, allow_unsigned=True)
    whole = bundles.content(target)
    for path in (*(target.tree.path / "blobs").glob("??/*"), *(target.tree.path / "manifests").glob("*/*")):
        path.write_bytes(b"damaged")
    assert target.verify()
    unpack(target, out, allow_unsigned=True)
    assert bundles.content(target) == whole


# --- signatures


@pytest.mark.parametrize(
    ("key", "trust", "allow_unsigned", "refused"),
    [
        (None, [], False, "is not signed"),
        (None, [KEY], False, "is not signed"),
        (None, [], True, None),
        (KEY, [], False, rf"is signed by key {key_name(KEY.public_key())}, which is not trusted \(trusted: none\)"),
        (
            KEY,
            [OTHER],
            False,
            rf"is signed by key .*, which is not trusted \(trusted: {key_name(OTHER.public_key())}\)",
        ),
        (KEY, [OTHER], True, None),
        (KEY, [KEY], False, None),
        (KEY, [OTHER, KEY], False, None),
    ],
)
def test_who_signed_decides(
    store: Store,
    target: Store,
    out: Path,
    key: Ed25519PrivateKey | None,
    trust: list[Ed25519PrivateKey],
    allow_unsigned: bool,
    refused: str | None,
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


@pytest.mark.parametrize("allow_unsigned", [False, True])
def test_a_signature_of_something_else_is_refused(
    store: Store, target: Store, out: Path, tmp_path: Path, allow_unsigned: bool
) -> None:
    pack(store, out, key=KEY)
    pack(store, tmp_path / "other", jit=False, key=KEY)
    out.write_bytes(out.read_bytes()[:-FOOTER] + (tmp_path / "other").read_bytes()[-FOOTER:])
    with pytest.raises(BundleError, match="was changed after it was signed"):
        unpack(target, out, [KEY.public_key()], allow_unsigned=allow_unsigned)
    assert bundles.content(target) == {}


def test_a_signature_in_the_name_of_a_trusted_key_is_refused(store: Store, target: Store, out: Path) -> None:
    pack(store, out, key=OTHER)
    data = out.read_bytes()
    out.write_bytes(data[:-96] + KEY.public_key().public_bytes_raw() + data[-64:])
    with pytest.raises(BundleError, match="was changed after it was signed"):
        unpack(target, out, [KEY.public_key()])


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


def test_an_older_entry_replaces_a_newer_one_only_when_told(store: Store, target: Store, out: Path) -> None:
    made = pack(store, out, key=KEY)
    newer = bundles.entry(target, "llama", created=1_800_000_000.0, members={"plan": target.put(b"newer")})
    kept = unpack(target, out, [KEY.public_key()]).kept
    assert kept == [f"{newer.key}/rank0"]
    assert target.find(newer.key, "rank0") == newer
    assert len(list(target.manifests())) == 4
    assert unpack(target, out, [KEY.public_key()], replace=True).kept == made.kept == []
    assert list(target.manifests()) == list(store.manifests())


def test_a_newer_entry_that_is_damaged_is_replaced(store: Store, target: Store, out: Path) -> None:
    pack(store, out)
    newer = bundles.entry(target, "llama", created=1_800_000_000.0, members={"plan": target.put(b"newer")})
    target.path(newer.members["plan"]).write_bytes(b"other")
    assert unpack(target, out, allow_unsigned=True).kept == []
    assert list(target.manifests()) == list(store.manifests())


def test_a_newer_kernel_file_stays(store: Store, target: Store, out: Path) -> None:
    pack(store, out)
    target.tree.write("jit", *bundles.KERNEL.split("/"), data=b"newer")
    unpack(target, out, allow_unsigned=True)
    assert (target.jit / bundles.KERNEL).read_bytes() == b"newer"
    unpack(target, out, allow_unsigned=True, replace=True)
    assert (target.jit / bundles.KERNEL).read_bytes() == (store.jit / bundles.KERNEL).read_bytes()


def test_a_file_that_is_mapped_is_never_written(store: Store, target: Store, out: Path) -> None:
    pack(store, out)
    unpack(target, out, allow_unsigned=True)
    files_before = {path: path.stat().st_ino for path in target.root.rglob("*") if path.is_file()}
    opened = [path.open("rb") for path in files_before]
    before = [file.read() for file in opened]
    unpack(target, out, allow_unsigned=True, replace=True)
    for path in target.tree.path.glob("blobs/*/*"):
        path.write_bytes(b"damaged") if path.stat().st_ino not in files_before.values() else None
    for file in opened:
        file.seek(0)
    assert [file.read() for file in opened] == before


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


def test_keys_of_openssl_sign_and_are_trusted(store: Store, target: Store, out: Path, pem: Path) -> None:
    public = public_key(pem / "signing.pub.pem")
    made = pack(store, out, key=private_key(pem / "signing.pem"))
    assert unpack(target, out, [public]).signed_by == made.signed_by == key_name(public)


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("signing.pub.pem", "holds no private key"),
        ("empty.pem", "holds no private key"),
        ("encrypted.pem", "is encrypted: decrypt it with openssl pkey"),
        ("ed448.pem", "holds a key of another kind"),
    ],
)
def test_other_files_are_no_private_key(pem: Path, file: str, problem: str) -> None:
    with pytest.raises(BundleError, match=f"{file} {problem}"):
        private_key(pem / file)


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("signing.pem", "holds no public key in PEM form: openssl pkey"),
        ("empty.pem", "holds no public key"),
        ("ed448.pub.pem", "holds a key of another kind"),
    ],
)
def test_other_files_are_no_public_key(pem: Path, file: str, problem: str) -> None:
    with pytest.raises(BundleError, match=f"{file} {problem}"):
        public_key(pem / file)


# --- what cannot be packed


def test_an_empty_store(target: Store, out: Path) -> None:
    with pytest.raises(BundleError, match="nothing to pack"):
        pack(target, out)
    assert not out.exists()


def test_an_unknown_key(store: Store, out: Path) -> None:
    with pytest.raises(BundleError, match=f"no entry {'ab' * 32}"):
        pack(store, out, {"ab" * 32})


def test_entries_for_several_platforms(store: Store, out: Path) -> None:
    bundles.entry(store, "gpu", platform="linux-x86_64 cuda sm_90")
    with pytest.raises(BundleError, match="cpu AVX2 and linux-x86_64 cuda sm_90, a bundle is for one platform"):
        pack(store, out)


@pytest.mark.parametrize("damage", [b"", b"damaged", None])
def test_every_damaged_blob_is_named_and_nothing_written(store: Store, out: Path, damage: bytes | None) -> None:
    out.write_bytes(b"an older bundle")
    for path in (store.tree.path / "blobs").glob("??/*"):
        whole = path.read_bytes()
        path.unlink() if damage is None else path.write_bytes(damage or bytes(len(whole)))
        with pytest.raises(BundleError, match=f"{path} .*cache verify says what to do"):
            pack(store, out)
        path.write_bytes(whole)
    assert out.read_bytes() == b"an older bundle"
    assert sorted(out.parent.iterdir()) == [out, store.root]
    pack(store, out)


def test_places_where_no_bundle_can_be(store: Store) -> None:
    with pytest.raises(OSError, match="Not a directory"):
        pack(store, Path("/dev/full/x"))
    with pytest.raises(BundleError, match="/dev/full is not a regular file"):
        pack(store, Path("/dev/full"))


def jit(out: Path) -> list[str]:
    return [name.removeprefix("v1/jit/") for name in bundles.contents(out.read_bytes()) if name.startswith("v1/jit/")]


def test_links_and_what_triton_has_not_finished_stay_behind(store: Store, out: Path) -> None:
    pack(store, out)
    names = jit(out)
    folder = (store.jit / bundles.KERNEL).parent
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "folder").symlink_to("/etc")
    os.mkfifo(folder / "pipe")
    (store.jit / ".started").touch()
    (store.jit / ".leaving-x").mkdir()
    (store.jit / ".leaving-x/kernel").touch()
    (folder / "tmp.pid_7_abc").mkdir()
    (folder / "tmp.pid_7_abc" / "half").write_bytes(b"x")
    pack(store, out)
    assert jit(out) == names == sorted([bundles.KERNEL, bundles.GROUP])


@pytest.mark.parametrize("data", [b"", b"no json", b"[]", b'{"child_paths": 1}', b'{"other": {}}', b'{"a": ' * 5000])
def test_what_only_looks_like_a_group_is_carried_as_it_is(store: Store, target: Store, out: Path, data: bytes) -> None:
    (store.jit / bundles.GROUP).write_bytes(data)
    pack(store, out)
    unpack(target, out, allow_unsigned=True)
    assert (target.jit / bundles.GROUP).read_bytes() == data


# --- where it cannot be unpacked


def test_another_platform(store: Store, target: Store, out: Path) -> None:
    made = pack(store, out)
    with pytest.raises(
        BundleError,
        match="is for linux-x86_64 cpu AVX2, this machine is mars or moon: for another one use --any-platform",
    ):
        unpack(target, out, allow_unsigned=True, platforms={"mars", "moon"})
    assert bundles.content(target) == {}
    assert unpack(target, out, allow_unsigned=True, platforms={"mars", bundles.PLATFORM}) == made


def test_a_store_that_cannot_be_written(store: Store, target: Store, out: Path) -> None:
    pack(store, out)
    with pytest.raises(BundleError, match="target cannot be written"):
        unpack(Store(target.root, None, writable=False), out, allow_unsigned=True)


def test_a_disk_that_is_too_small(disk: Path, out: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "large")
    for number in range(8):
        bundles.entry(store, f"model {number}", members={"plan": store.put(os.urandom(200_000))})
    pack(store, out)
    target = Store.open(disk / "target")
    with pytest.raises(OSError, match="No space left"):
        unpack(target, out, allow_unsigned=True)
    assert bundles.content(target) == {}
    pack(store, out, {next(store.manifests()).key})
    unpack(target, out, allow_unsigned=True)
    assert target.verify() == []


def test_a_store_that_is_being_cleaned(store: Store, target: Store, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(store, out)
    monkeypatch.setattr(bundle, "_WAIT", 0.0)
    with (
        target.tree.lock("store", exclusive=True, timeout=0),
        pytest.raises(BundleError, match="another process is removing"),
    ):
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
