"""The commands about the store, on made-up stores: what people and programs read."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests import process
from tests.unit.store import bundles
from vllm_compile_ext import platforms
from vllm_compile_ext.cli import app
from vllm_compile_ext.cuda_graphs import memory
from vllm_compile_ext.key import misses
from vllm_compile_ext.key.misses import difference
from vllm_compile_ext.report.formats import size
from vllm_compile_ext.store.store import Store, key_of, manifest_names

LLAMA = key_of({"model": "llama", "torch": "2.13.0"})
QWEN = key_of({"model": "qwen", "torch": "2.13.0"})
PIECE = key_of({"piece": "0"})


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(platforms, "possible", lambda: {bundles.PLATFORM})
    return bundles.filled(tmp_path / "store")


def cli(*args: object, code: int = 0) -> str:
    """What a command prints; for an error, its line on stderr, when it has nothing else to say."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.stdout or result.stderr


def data(*args: object, code: int = 0) -> Any:
    return json.loads(cli(*args, "--json", code=code))


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def aged(store: Store, days: float, key: str) -> None:
    moment = time.time() - days * 86400
    for path in ((store.tree.path / "manifests") / key).iterdir():
        os.utime(path, (moment, moment))


# --- ls, show, verify


def test_ls_lists_models_by_last_use_and_counts_pieces(store: Store) -> None:
    aged(store, 3, LLAMA)
    store.use(next(entry for entry in store.manifests() if entry.key == QWEN))
    head, qwen, llama, pieces, total = rows(cli("cache", "ls"))
    assert head == ["key", "model", "shards", "size", "created", "last", "use"]
    assert qwen == [QWEN[:12], "qwen", "1", "660", "bytes", "2023-11-14", "in", "use"]
    assert llama[:3] == [LLAMA[:12], "llama", "2"]
    assert llama[-3:] == ["3", "d", "ago"]
    assert pieces[:3] == ["1", "shared", "piece,"]
    assert total[:2] == size(store.size()).split()
    assert [PIECE[:12], "piece", "qwen"] in [row[:3] for row in rows(cli("cache", "ls", "--pieces"))]
    found = data("cache", "ls")
    assert (found["store"], found["size"], found["unreadable"]) == (str(store.root), store.size(), 0)
    assert found["jit_size"] == sum(path.stat().st_size for path in (store.jit / "triton/host/HASH").iterdir())
    entries = {entry["key"]: entry for entry in found["entries"]}
    assert entries.keys() == {LLAMA, QWEN, PIECE}
    assert (entries[LLAMA]["shards"], entries[LLAMA]["platform"]) == (["rank0", "rank1"], bundles.PLATFORM)
    assert (entries[PIECE]["kind"], entries[QWEN]["in_use"], entries[LLAMA]["in_use"]) == ("piece", True, False)


@pytest.mark.parametrize("columns", [40, 200])
def test_ls_fits(store: Store, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    bundles.entry(store, "meta-llama/Llama-3.3-70B-Instruct-with-a-very-long-name-that-someone-chose")
    monkeypatch.setenv("COLUMNS", str(columns))
    table = cli("cache", "ls", "--pieces").splitlines()[:-1]
    assert all(len(line) <= columns for line in table)


def test_a_missing_store_is_an_empty_one_and_is_not_made(store: Store, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert cli("cache", "ls", "--store", nowhere).startswith("0 bytes in")
    assert data("cache", "ls", "--store", nowhere)["entries"] == []
    assert cli("cache", "verify", "--store", nowhere).startswith("0 entries")
    assert cli("cache", "gc", "--store", nowhere) == "0 bytes freed\n"
    assert "no miss is recorded" in cli("explain", "miss", "--store", nowhere)
    for args in (["show", "ab"], ["rm", "ab"], ["pack", tmp_path / "out"]):
        assert str(nowhere) in cli("cache", *args, "--store", nowhere, code=1)
    assert not nowhere.exists()


def test_what_a_terminal_would_act_on_is_not_printed(store: Store) -> None:
    entry = bundles.entry(store, "evil\x1b[2J", factors={"a": "\x1b[1m", "\x1b]0;x": "[bold]x[/bold] :smile:\n\x9b"})
    shown = cli("cache", "ls") + cli("cache", "show", entry.key)
    assert r"evil\x1b[2J" in shown
    assert "[bold]x[/bold] :smile:" in shown
    shown += cli("cache", "show", entry.key, "--json")
    assert "\x1b" not in shown
    assert "\x9b" not in shown


def test_show_takes_the_first_digits_of_a_key(store: Store) -> None:
    for prefix in (LLAMA, LLAMA[:12], LLAMA[:2]):
        text = cli("cache", "show", prefix)
        for words in (LLAMA, "factors", "torch", "2.13.0", "members of rank0", "members of rank1", "piece/0/(1, 256)"):
            assert words in text
    found = data("cache", "show", LLAMA)
    assert found["factors"] == {"model": "llama", "torch": "2.13.0"}
    assert found["shards"]["rank1"]["members"] == found["shards"]["rank0"]["members"]
    assert found["shards"]["rank0"]["members"]["plan"]["size"] == len("plan of llama") * 20


def test_an_unknown_and_an_ambiguous_key(store: Store) -> None:
    for command in ("show", "rm"):
        assert "has a key that begins with 'nonsense'" in cli("cache", command, "nonsense", code=1)
        text = cli("cache", command, "", code=1)
        assert text.startswith("vllm-compile-ext: 3 entries have keys that begin with ''")
        assert LLAMA in text
    assert len(list(store.manifests())) == 4


def test_what_cannot_be_read_is_said(store: Store) -> None:
    store.tree.path.joinpath(*manifest_names(QWEN, "rank0")).write_bytes(b'{"format": 2}')
    assert "1 entry cannot be read: see vllm-compile-ext cache verify" in cli("cache", "ls")
    assert data("cache", "ls")["unreadable"] == 1
    assert f"the entry {QWEN} cannot be read" in cli("cache", "show", QWEN[:8], code=1)


def test_verify_names_the_damage_and_the_way_out(store: Store) -> None:
    assert cli("cache", "verify").startswith("3 entries and ")
    assert data("cache", "verify") == {"store": str(store.root), "damaged": []}
    entry = next(entry for entry in store.manifests() if entry.key == LLAMA)
    blob = store.path(entry.members["plan"])
    blob.write_bytes(b"damaged")
    store.tree.path.joinpath(*manifest_names(QWEN, "rank0")).write_bytes(b"damaged")
    text = cli("cache", "verify", code=1)
    assert f"{blob} has 7 bytes" in text
    for key in (LLAMA, QWEN):
        assert f"  vllm-compile-ext cache rm {key[:12]}\n" in text
    assert "Nothing damaged is ever run" in text
    assert {key for problem in data("cache", "verify", code=1)["damaged"] for key in problem["keys"]} == {LLAMA, QWEN}
    cli("cache", "rm", LLAMA[:12])
    cli("cache", "rm", QWEN[:12])
    cli("cache", "verify")
    store.path(store.put(b"left")).write_bytes(b"lost")
    assert "No entry needs what is damaged" in cli("cache", "verify", code=1)


# --- gc and rm


def test_gc_by_size_and_by_age_keeps_what_is_in_use(store: Store) -> None:
    aged(store, 10, LLAMA)
    store.use(next(entry for entry in store.manifests() if entry.key == LLAMA and entry.shard == "rank0"))
    aged(store, 10, LLAMA)
    aged(store, 5, QWEN)
    found = data("cache", "gc", "--max-age", "7")
    assert (found["manifests"], found["in_use"]) == ([f"{LLAMA}/rank1"], [f"{LLAMA}/rank0"])
    assert found["freed"] > 0
    limit = (store.size() - 500) / 2**30
    assert f"removed {QWEN}/rank0\n" in cli("cache", "gc", "--max-gb", f"{limit:.12f}")
    assert {entry.key for entry in store.manifests()} == {LLAMA, PIECE}


def test_gc_of_kernels(store: Store) -> None:
    assert data("cache", "gc", "--max-gb", "1", "--max-age", "2")["kernels"] == 0
    for path in (*(store.jit / "triton/host/HASH").iterdir(), store.jit / "triton/host/HASH"):
        os.utime(path, (0, 0))
    assert data("cache", "gc", "--max-gb", "1")["kernels"] == 0
    assert "removed 1 kernel\n" in cli("cache", "gc", "--max-age", "2")
    assert not (store.jit / "triton/host/HASH").exists()
    assert len(list(store.manifests())) == 4


def test_gc_without_limits_removes_no_entry(store: Store) -> None:
    before = bundles.content(store)
    assert cli("cache", "gc") == "0 bytes freed\n"
    assert bundles.content(store) == before


@pytest.mark.parametrize(("option", "value"), [("--max-gb", "-1"), ("--max-age", "many")])
def test_gc_refuses_limits_that_are_none(
    store: Store, monkeypatch: pytest.MonkeyPatch, option: str, value: str
) -> None:
    assert option in cli("cache", "gc", option, value, code=2)
    monkeypatch.setenv("VLLM_COMPILE_STORE_MAX_GB", "many")
    assert "VLLM_COMPILE_STORE_MAX_GB='many' is not allowed" in cli("cache", "gc", code=1)


def test_rm_removes_what_is_not_in_use(store: Store) -> None:
    text = cli("cache", "rm", LLAMA[:12])
    assert f"removed {LLAMA}/rank0\nremoved {LLAMA}/rank1\n" in text
    assert {entry.key for entry in store.manifests()} == {QWEN, PIECE}
    assert data("cache", "rm", PIECE)["manifests"] == [f"{PIECE}/piece"]
    store.use(next(entry for entry in store.manifests() if entry.key == QWEN))
    assert f"kept {QWEN}/rank0: it is in use" in cli("cache", "rm", QWEN, code=1)
    assert store.find(QWEN, "rank0")


# --- pack and unpack


def test_pack_and_unpack(store: Store, tmp_path: Path) -> None:
    for command in ("genpkey -algorithm ed25519 -out a.pem", "pkey -in a.pem -pubout -out a.pub.pem"):
        subprocess.run(["openssl", *command.split()], cwd=tmp_path, check=True)
    out, there = tmp_path / "out.bundle", ["--store", tmp_path / "there"]
    text = cli("cache", "pack", out, "--sign", tmp_path / "a.pem")
    assert text.startswith("packed 3 entries, ")
    assert "signed by key" in text
    assert "with --trust" in cli("cache", "unpack", out, *there, code=1)
    assert cli("cache", "unpack", out, "--trust", tmp_path / "a.pub.pem", *there).startswith("unpacked 3 entries, ")
    assert Store.open(tmp_path / "there").verify() == []
    packed = data("cache", "pack", out, LLAMA[:8], "--no-jit")
    assert packed == data("cache", "unpack", out, "--allow-unsigned", "--store", tmp_path / "elsewhere")
    assert (packed["keys"], packed["jit_files"], packed["signed_by"]) == ([LLAMA], 0, None)
    assert (packed["platform"], packed["file_size"]) == (bundles.PLATFORM, out.stat().st_size)


def test_unpack_for_another_platform(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("cache", "pack", tmp_path / "out")
    there = Store.open(tmp_path / "there")
    unpack = ["cache", "unpack", tmp_path / "out", "--allow-unsigned", "--store", there.root]
    monkeypatch.setattr(platforms, "possible", lambda: {"mars"})
    assert "this machine is mars: for another one use --any-platform" in cli(*unpack, code=1)
    assert list(there.manifests()) == []
    cli(*unpack, "--any-platform")
    assert len(list(there.manifests())) == 4
    monkeypatch.setattr(platforms, "possible", lambda: None)  # unknown: nothing that is unpacked can be found there
    cli(*unpack)


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["unpack", "missing"], "No such file or directory: 'missing'"),
        (["unpack", "/dev/null"], "/dev/null is no bundle"),
        (["unpack", "/etc"], "Is a directory: '/etc'"),
        (["unpack", "/dev/null", "--trust", "/dev/null"], "/dev/null holds no public key"),
        (["unpack", "/dev/null", "--trust", "missing"], "No such file or directory: 'missing'"),
        (["pack", "/dev/null"], "/dev/null is not a regular file"),
        (["pack", "x", "nonsense"], "begins with 'nonsense'"),
        (["pack", "x", "--sign", "/dev/null"], "/dev/null holds no private key"),
    ],
)
def test_errors_are_one_line(store: Store, args: list[str], problem: str) -> None:
    text = cli("cache", *args, code=1)
    assert problem in text
    assert text.startswith("vllm-compile-ext: ")
    assert text.count("\n") == 1


def test_a_bundle_cannot_speak_to_the_terminal(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cli("cache", "pack", out)
    out.write_bytes(bundles.forged([*bundles.members(out.read_bytes()), bundles.member("v1/\x1b[2J", b"")]))
    text = cli("cache", "unpack", out, "--allow-unsigned", code=1)
    assert "belongs into no store" in text
    assert "\x1b" not in text


# --- explain miss


def missed(store: Store, old: dict[str, str], new: dict[str, str]) -> str:
    misses.record(store.tree, misses.Miss(key_of(new), "rank0", "llama", new, key_of(old), difference(old, new)))
    return key_of(new)


def test_the_last_miss_and_that_of_a_key(store: Store) -> None:
    assert cli("explain", "miss") == f"no miss is recorded in {store.root}\n"
    assert data("explain", "miss")["miss"] is None
    first = missed(store, {"torch": "2.13.0"}, {"torch": "2.13.1", "new": "1"})
    missed(store, {"torch": "2.13.0"}, {"torch": "2.14.0"})
    assert "no miss of a key that begins with 'nonsense' is recorded" in cli("explain", "miss", "nonsense")
    assert cli("explain", "miss").startswith("cache miss: torch 2.13.0 -> 2.14.0\n")
    text = cli("explain", "miss", first[:10])
    assert text.startswith("cache miss: torch 2.13.0 -> 2.13.1, new unset -> 1\n")
    assert ["│", "torch", "│", "2.13.0", "│", "2.13.1", "│"] in rows(text)
    assert ["│", "new", "│", "unset", "│", "1", "│"] in rows(text)
    found = data("explain", "miss", first)["miss"]
    assert found["key"] == first
    assert found["changes"] == [["torch", "2.13.0", "2.13.1"], ["new", None, "1"]]
    misses.record(store.tree, misses.Miss(LLAMA, "rank0", "llama", {}, None, None))
    assert "nothing is stored yet" in cli("explain", "miss")


def test_long_values_are_shown_where_they_differ(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "800")
    same = ", ".join(map(str, range(400)))
    missed(store, {"config": f"{same} size=1 {same}"}, {"config": f"{same} size=2048 {same}"})
    text = cli("explain", "miss")
    assert "… 399 size=1 0, 1, 2" in text
    assert "… 399 size=2048 0, 1, 2" in text
    assert max(len(line.strip("│ ")) for line in text.splitlines() if "│" in line) < 700
    assert data("explain", "miss")["miss"]["changes"][0][2] == f"{same} size=2048 {same}"


# --- what is remembered of CUDA graphs


def test_what_is_remembered_of_graphs_is_no_entry_and_nothing_touches_it(store: Store, tmp_path: Path) -> None:
    def shown() -> list[str]:
        return [cli("cache", *args) for args in (("ls",), ("verify",))]

    before = shown()
    cli("cache", "pack", tmp_path / "without.bundle")
    made = memory.History(key="a" * 32, base=0, held=1, graphs=2, each={}, needed=3, used={0: 1}, times={})
    memory.write(store.root, made)
    assert shown() == before
    cli("cache", "pack", tmp_path / "with.bundle")
    assert (tmp_path / "with.bundle").read_bytes() == (tmp_path / "without.bundle").read_bytes()
    # One that was damaged is not the store's damage: nothing of it is ever run.
    (path,) = (store.tree.path / "graphs").iterdir()
    path.write_bytes(b"damaged")
    assert shown() == before
    memory.write(store.root, made)
    old = time.time() - 10 * 86400
    os.utime(path, (old, old))
    cli("cache", "gc", "--max-gb", "0", "--max-age", "1")
    assert data("cache", "ls")["entries"] == []
    assert memory.read(store.root, "a" * 32) == made


# --- all of them


COMMANDS = [
    ["cache", "ls"],
    ["cache", "show", LLAMA],
    ["cache", "verify"],
    ["cache", "gc"],
    ["cache", "rm", LLAMA],
    ["cache", "pack", "out"],
    ["cache", "unpack", "in"],
    ["explain", "miss"],
]


@pytest.mark.parametrize("args", COMMANDS)
def test_a_store_that_others_can_write_is_refused(store: Store, args: list[str]) -> None:
    before = bundles.content(store)
    store.root.chmod(0o777)
    text = cli(*args, code=1)
    assert text.startswith(f"vllm-compile-ext: {store.root} can be written by other users")
    assert text.endswith(f"Run: chmod -R go-w {store.root}\n")
    assert bundles.content(store) == before


def test_none_of_them_imports_vllm_or_torch(store: Store, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    commands = [
        ["cache", "pack", out],
        ["cache", "unpack", out, "--allow-unsigned"],
        *COMMANDS[:5],
        ["explain", "miss"],
    ]
    code = """
        from vllm_compile_ext.cli import app
        for args in json.loads(sys.argv[1]):
            app(args, standalone_mode=False)
        report([name for name in ("vllm", "torch") if name in sys.modules])
    """
    outcome = process.run(code, json.dumps(commands), VLLM_COMPILE_STORE=str(store.root))
    assert outcome.value == [], outcome.output
