from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.process import run
from vllm_compile_ext import jit_caches, settings
from vllm_compile_ext.store import kernels
from vllm_compile_ext.store.store import Store

VARIABLES = [cache.variable for cache in jit_caches.CACHES]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without caches and a store that does not exist yet; changes of the environment end with the test."""
    chosen = (*VARIABLES, "TRITON_HOME", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "VLLM_DISABLE_COMPILE_CACHE")
    for name in (*chosen, jit_caches.MARK):
        monkeypatch.setenv(name, "so that the value of now comes back after the test")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def seen() -> dict[str, str]:
    return {name: os.environ[name] for name in (*VARIABLES, jit_caches.MARK) if name in os.environ}


def test_each_cache_gets_a_private_folder_in_the_store(store: Path) -> None:
    undo = jit_caches.settle(active=True)
    assert seen().keys() == {*VARIABLES, jit_caches.MARK}
    for cache in jit_caches.CACHES:
        place = Path(os.environ[cache.variable])
        assert place.is_relative_to(store / "v1/jit" / cache.name)
        for level in (place, *place.parents):
            if level.is_relative_to(store):
                assert stat.S_IMODE(level.stat().st_mode) == 0o700
    assert jit_caches.folder() == store / "v1/jit"
    undo()
    assert seen() == {}


def test_the_folder_is_the_one_that_is_measured_and_trimmed() -> None:
    assert {cache.name for cache in jit_caches.CACHES} == kernels.LAYOUT.keys()


def test_a_private_folder_whatever_the_umask(store: Path) -> None:
    before = os.umask(0)
    try:
        jit_caches.settle(active=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path(os.environ["TRITON_CACHE_DIR"]).stat().st_mode) == 0o700


def test_entries_that_do_not_fit_together_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {}
    for libc in ("glibc 2.36", "glibc 2.39"):
        monkeypatch.setattr(os, "confstr", lambda _, libc=libc: libc)
        jit_caches.settle(active=True)
        names[libc] = seen()
    old, new = names.values()
    assert old["TRITON_CACHE_DIR"] != new["TRITON_CACHE_DIR"]
    assert old["DG_JIT_CACHE_DIR"] == new["DG_JIT_CACHE_DIR"], "device code only"


def test_the_cuda_toolkit_keeps_linked_libraries_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cuda-13.0").mkdir()
    (tmp_path / "cuda").symlink_to("cuda-13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    jit_caches.settle(active=True)
    assert os.environ["FLASHINFER_WORKSPACE_BASE"].endswith("-cuda-13.0")


@pytest.mark.parametrize("value", ["/theirs", ""])
@pytest.mark.parametrize("name", [*VARIABLES, "TRITON_HOME"])
def test_what_the_user_set_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    undo = jit_caches.settle(active=True)
    assert os.environ[name] == value
    variable = "TRITON_CACHE_DIR" if name == "TRITON_HOME" else name
    assert os.environ.get(variable) == (None if name == "TRITON_HOME" else value)
    assert len(seen()) == len(VARIABLES) + (name != "TRITON_HOME")
    assert not (jit_caches.folder() / "triton").exists() or variable != "TRITON_CACHE_DIR"
    undo()
    assert os.environ[name] == value
    assert seen().keys() <= {name}


def test_nothing_is_made_when_the_user_chose_all_places(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "/theirs")
    jit_caches.settle(active=True)
    assert jit_caches.MARK not in os.environ
    assert not store.exists()


def test_undo_leaves_what_somebody_changed_since(monkeypatch: pytest.MonkeyPatch) -> None:
    undo = jit_caches.settle(active=True)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/later")
    undo()
    assert seen() == {"TRITON_CACHE_DIR": "/later"}


@pytest.mark.parametrize(("value", "made"), [("1", False), ("0", True), ("", True)])
def test_vllms_own_switch(store: Path, monkeypatch: pytest.MonkeyPatch, value: str, made: bool) -> None:
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", value)
    jit_caches.settle(active=True)
    assert bool(seen()) is made
    assert store.exists() is made


def test_a_child_knows_that_its_parent_set_them_and_follows_its_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jit_caches.settle(active=True)
    inherited = seen()
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path / "other"))
    undo = jit_caches.settle(active=True)
    assert all(seen()[name].startswith(str(tmp_path / "other")) for name in VARIABLES)
    undo()
    assert seen() == inherited, "as the child found it"
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    undo = jit_caches.settle(active=True)
    assert seen() == {}
    undo()
    assert seen() == inherited


def test_what_was_set_on_the_way_to_a_child_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    jit_caches.settle(active=True)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/theirs")
    jit_caches.settle(active=True)
    assert os.environ["TRITON_CACHE_DIR"] == "/theirs"
    assert "TRITON" not in os.environ[jit_caches.MARK]
    jit_caches.settle(active=False)
    assert seen() == {"TRITON_CACHE_DIR": "/theirs"}


def test_where_the_plugin_is_off_an_inherited_value_goes_and_a_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    jit_caches.settle(active=True)
    inherited = seen()
    undo = jit_caches.settle(active=False)
    assert seen() == {}
    undo()
    assert seen() == inherited


@pytest.mark.parametrize("level", ["", "v1", "v1/jit", "v1/jit/triton"])
@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_can_write_is_refused(
    store: Path, level: str, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    jit_caches.settle(active=True)  # as a parent did
    (store / level).chmod(mode)
    jit_caches.settle(active=True)
    assert seen() == {}
    (record,) = caplog.records
    message = record.getMessage()
    assert (record.levelname, "\n" in message) == ("WARNING", False)
    assert f"chmod -R go-w {store}" in message
    assert f"{store / level} can be written by other users (mode {mode:04o}".replace("/ can", " can") in message


def test_a_folder_of_another_user_is_refused(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.mkdir(mode=0o700)
    if store.stat().st_uid == 0:
        os.chown(store, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    jit_caches.settle(active=True)
    assert seen() == {}
    assert "VLLM_COMPILE_STORE" in caplog.text
    assert "chown" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_kernels_are_not_kept_where_others_can_move_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The root of an emptyDir: what the store opens stays open, but libraries look for their kernels by name."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=777", "none", tmp_path]).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path / "store"))
        jit_caches.settle(active=True)
        assert seen() == {}
        assert f"{tmp_path} can be written by other users, who could put others in their place" in caplog.text
        Store.open(tmp_path / "store")
        tmp_path.chmod(0o1777)
        jit_caches.settle(active=True)
        assert seen().keys() == {*VARIABLES, jit_caches.MARK}
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_nobody_else_gets_into_the_folder(store: Path) -> None:
    """Libraries make folders there by the umask."""
    (store / "v1" / "jit").mkdir(parents=True)
    for path in (store, store / "v1", store / "v1" / "jit"):
        path.chmod(0o755)
    jit_caches.settle(active=True)
    assert (store / "v1" / "jit").stat().st_mode & 0o777 == 0o700


def test_users_of_a_shared_store_have_folders_of_their_own(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPILE_STORE_GROUP", "1")
    store.mkdir()
    os.chown(store, -1, os.getegid())
    store.chmod(0o2770)
    jit_caches.settle(active=True)
    mine = store / "v1" / f"jit-{os.geteuid()}"
    assert jit_caches.folder() == mine
    assert os.environ["TRITON_CACHE_DIR"].startswith(f"{mine}/triton/")
    assert Path(os.environ["TRITON_CACHE_DIR"]).is_dir()


@pytest.mark.parametrize("level", ["v1", "v1/jit", "v1/jit/triton"])
def test_a_link_in_the_store_is_refused(
    store: Path, tmp_path: Path, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (store / level).parent.mkdir(mode=0o700, parents=True)
    (store / level).symlink_to(tmp_path / "elsewhere")
    jit_caches.settle(active=True)
    assert seen() == {}
    assert f"{store / level} is not a folder" in caplog.text


def test_the_store_itself_may_be_a_link(store: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    store.symlink_to(tmp_path / "elsewhere")
    jit_caches.settle(active=True)
    assert seen().keys() == {*VARIABLES, jit_caches.MARK}


def test_a_place_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("VLLM_COMPILE_STORE", "/proc/none/store")
    jit_caches.settle(active=True)
    assert seen() == {}
    (record,) = caplog.records
    assert "/proc/none" in record.getMessage()
    assert "name another folder in VLLM_COMPILE_STORE" in record.getMessage()


def test_a_place_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # a read-only mount; root is let into all else
    jit_caches.settle(active=True)
    assert seen() == {}
    assert "cannot be written" in caplog.text


def test_a_place_that_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def exists(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", exists)
    jit_caches.settle(active=True)
    assert seen() == {}
    assert "Permission denied; name another folder in VLLM_COMPILE_STORE" in caplog.text


def test_a_place_without_room(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(jit_caches, "FREE", 2**70)
    jit_caches.settle(active=True)
    assert seen() == {}
    assert "MiB free" in caplog.text


@pytest.mark.parametrize(
    ("variable", "used"),
    [
        ("FLASHINFER_WORKSPACE_BASE", ".cache/flashinfer/0.7.0/90a/cached_ops/sampling"),
        ("FLASHINFER_WORKSPACE_BASE", ".cache/flashinfer/cubins/some"),
        ("DG_JIT_CACHE_DIR", ".cache/vllm/deep_gemm/cache/kernel.x"),
        ("TILELANG_CACHE_DIR", ".tilelang/cache/0.1.12/linux-x86_64/kernels/12ab"),
        ("HUMMING_CACHE_DIR", ".humming/cache/12ab"),
    ],
)
def test_a_cache_that_was_filled_at_its_usual_place_stays_there(variable: str, used: str, tmp_path: Path) -> None:
    (tmp_path / "home" / used).mkdir(parents=True)
    undo = jit_caches.settle(active=True)
    assert {*VARIABLES} - seen().keys() == {variable}
    undo()


def test_a_cache_in_the_store_is_kept_when_its_usual_place_is_filled_later(tmp_path: Path) -> None:
    jit_caches.settle(active=True)
    (tmp_path / "home/.humming/cache/12ab").mkdir(parents=True)
    jit_caches.settle(active=True)
    assert "HUMMING_CACHE_DIR" in seen()


def test_the_default_store_lies_in_vllms_cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_COMPILE_STORE")
    assert settings.store() == tmp_path / "home/.cache/vllm/compile_store"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert settings.store() == tmp_path / "xdg/vllm/compile_store"
    monkeypatch.setenv("VLLM_CACHE_ROOT", "~/root")
    assert settings.store() == tmp_path / "home/root/compile_store"
    monkeypatch.setenv("VLLM_COMPILE_STORE", "~/store")
    assert settings.store() == tmp_path / "home/store"
    monkeypatch.setenv("VLLM_COMPILE_STORE", "store")
    assert settings.store() == Path.cwd() / "store"


def test_only_the_standard_library_is_imported(tmp_path: Path) -> None:
    code = """
        before = set(sys.modules)
        from vllm_compile_ext import jit_caches
        jit_caches.settle(active=True)
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        report(sorted(name for name in new if name not in sys.stdlib_module_names))
    """
    outcome = run(code, VLLM_COMPILE_STORE=str(tmp_path / "store"))
    assert outcome.value == ["vllm_compile_ext"], outcome.output
