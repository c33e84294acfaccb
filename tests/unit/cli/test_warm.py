"""``vllm-compile-ext warm`` without an engine: its arguments, what it says, its exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_compile_ext.cli import app, warm, warm_start
from vllm_compile_ext.cli.program import Line
from vllm_compile_ext.cli.warm import Run
from vllm_compile_ext.record import read
from vllm_compile_ext.record.read import Note
from vllm_compile_ext.store.store import Manifest, Store

KEY = "ab" * 32


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with one entry of 5 bytes."""
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    made = Store.open(tmp_path / "store")
    common = dict(kind="program", model="m", created=1.0, platform="p", factors={})
    made.commit(Manifest(key=KEY, shard="rank0.0", members={"plan": made.put(b"12345")}, **common))
    return made


def note(name: str, shard: str = "rank0", model: str = "m", key: str = KEY, **attrs: str) -> Note:
    return Note(time=1, pid=1, name=name, attrs={"key": key, "shard": shard, "model": model, **attrs})


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command with a start that is made up; `seen` are the arguments that the start got."""
    seen: list[str] = []

    def call(*arguments: str, status: int = 0, notes: list[Note] | None = None, lines: tuple[str, ...] = ()) -> Any:
        def run(given: list[str], listen: Callable[[Line], None]) -> Run:
            seen[:] = given
            for line in lines:
                listen(Line(0.0, line))
            return Run(status, notes, list(lines))

        monkeypatch.setattr(warm, "run", run)
        return CliRunner().invoke(app, ["warm", *arguments])

    call.seen = seen  # type: ignore[attr-defined]
    return call


@pytest.mark.parametrize(
    "arguments",
    [
        ["org/model", "--dtype", "float32", "--port", "80"],
        ["--dtype", "float32", "org/model"],
        ["m", "-tp", "2", "-O3", "-O", "2", "-cc.mode=3", "-ac.backend=verbose_jv", "--no-enable-prefix-caching"],
        ["m", "--compilation-config", '{"cudagraph_mode": "NONE"}', "--hf-overrides.a", "-1"],
        ["--config", "serve.yaml"],
    ],
)
def test_options_of_serve_pass_through_unchanged(invoke: Any, arguments: list[str]) -> None:
    assert invoke(*arguments, notes=[note("kept")]).exit_code == 0
    assert invoke.seen == arguments


def test_own_options_are_taken_out_wherever_they_stand(invoke: Any) -> None:
    result = invoke("m", "--json", "-tp", "2", "--verbose", "--port", "80", notes=[note("kept")])
    assert invoke.seen == ["m", "-tp", "2", "--port", "80"]
    report = json.loads(result.stdout)
    assert (report["status"], report["bytes"]) == ("kept", 5)
    assert report["entries"] == [{"key": KEY, "shard": "rank0", "model": "m", "state": "kept", "bytes": 5}]


def test_no_model(invoke: Any) -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "name a model" in result.stderr


@pytest.mark.parametrize(
    ("notes", "state", "end"),
    [
        ([note("kept")], "kept", "kept"),
        ([note("loaded")], "already there", "everything was already there"),
        ([note("fallback", why="compiling again: damaged"), note("kept")], "kept", "kept"),
    ],
)
def test_what_became_of_the_code_is_said(invoke: Any, store: Store, notes: list[Note], state: str, end: str) -> None:
    result = invoke("m", notes=notes)
    assert result.exit_code == 0
    first, last = result.stdout.splitlines()
    assert first == f"m, rank0: {state} as {KEY[:12]}, 5 bytes"
    assert last.startswith(f"{end}: {store.root} (")
    assert "importing vLLM" in result.stderr, "progress is not part of the result"


def test_entries_of_ranks_share_blobs(invoke: Any, store: Store) -> None:
    first = store.find(KEY, "rank0.0")
    assert first is not None
    common = dict(kind="program", model="m", created=1.0, platform="p", factors={})
    store.commit(Manifest(key=KEY, shard="rank1.0", members={**first.members, "head": store.put(b"123")}, **common))
    report = json.loads(invoke("m", "--json", notes=[note("kept", "rank1"), note("loaded")]).stdout)
    assert [(e["shard"], e["state"], e["bytes"]) for e in report["entries"]] == [
        ("rank0", "already there", 5),
        ("rank1", "kept", 8),
    ]
    assert (report["status"], report["bytes"]) == ("kept", 8)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (dict(notes=[]), "nothing was kept: no part of this model is compiled"),
        (dict(notes=[Note(time=1, pid=1, name="fallback", attrs={})]), "nothing was kept: no part of this model"),
        (dict(), "what was kept is not known: the start could not be recorded in"),
        (dict(status=3, lines=("INFO", "refused: the plugin is off")), "the plugin is off"),
        (dict(status=-9), "the engine did not start (exit status -9)"),
        (dict(status=1, notes=[note("kept")]), "the engine did not start (exit status 1)"),
        (dict(notes=[note("kept"), note("not kept", "rank1", why="no space")]), "m (rank1) was not kept: no space"),
        (dict(notes=[note("kept"), note("fallback", model="x", why="theirs")]), "x (rank0) was not kept: theirs"),
    ],
)
def test_failures_say_why(invoke: Any, run: dict[str, Any], why: str) -> None:
    result = invoke("m", **run)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"vllm-compile-ext: {why}" in result.stderr


def test_a_bad_option_gives_what_vllm_says(invoke: Any) -> None:
    result = invoke("m", "--nonsense", status=2, lines=("usage: vllm serve", "vllm serve: error: --nonsense"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith("usage: vllm serve\nvllm serve: error: --nonsense\n")


def test_the_log_of_a_failure_is_shown_once(invoke: Any) -> None:
    log = ("(EngineCore pid=6) INFO hello", "(Worker pid=7) ERROR no such kernel")
    shown = invoke("m", status=1, lines=log)
    assert "ERROR no such kernel" in shown.stderr
    assert "--verbose" in shown.stderr
    verbose = invoke("m", "--verbose", status=1, lines=log)
    assert verbose.stderr.count("ERROR no such kernel") == 1


# Stands for `warm_start`: records a start as the plugin does, where its environment says.
RECORDER = """if True:
    import json, os, pathlib, sys
    sent = sorted(name for name in os.environ if name.startswith("OTEL_"))
    model = " ".join([*sys.argv[1:], os.environ["VLLM_COMPILE_STARTS"], *sent])
    lines = [dict(k="start", t=1, trace="a"), dict(k="note", t=2, pid=1, name="kept", attrs=dict(
        key="k", shard="rank0", model=model))]
    where = pathlib.Path(os.environ["_VLLM_COMPILE_EXT_STARTS"])
    (where / "20260101-000000-1.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


@pytest.mark.parametrize(("recorded", "sent", "left"), [("1", " OTEL_EXPORTER_OTLP_ENDPOINT", 1), ("0", "", 0)])
def test_a_start_is_recorded_apart(monkeypatch: pytest.MonkeyPatch, recorded: str, sent: str, left: int) -> None:
    """Also where the user wants no records: then it is sent nowhere, and nothing is left."""
    monkeypatch.setattr(warm, "PROGRAM", [sys.executable, "-c", RECORDER])
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:1")
    monkeypatch.setenv("VLLM_COMPILE_STARTS", recorded)
    run = warm.run(["m", "-tp", "2"], lambda line: None)
    assert run.status == 0, run.lines
    assert [found.attrs["model"] for found in run.notes or ()] == [f"m -tp 2 1{sent}"]
    assert len(read.recorded()) == left


def test_a_start_that_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "PROGRAM", [sys.executable, "-c", "print('hello'); raise SystemExit(3)"])
    assert warm.run([], lambda line: None) == Run(3, None, ["hello"])


MIB = 2**20


@pytest.mark.parametrize(
    ("cpu", "needed", "sequences", "available", "blocks", "longest"),
    [
        (True, 1, 8, 1, 16, 256),  # one request, whatever there is
        (True, 17, 8, 1, 32, 256),
        (True, 100, 8, 1, 128, 256),
        (False, 17, 1, 10_000, 64, 256),  # two requests
        (False, 17, 100, 10_000, 256, 256),  # two blocks a sequence
        (False, 17, 100, 200, 200, 256),  # what there is
        (False, 17, 1, 20, 20, 256),
        (False, 17, 8, 1000, 1000, -1),  # left alone: it decides over the longest request
        (True, 2**40, 8, 100, None, 256),  # never fits: the error of a real start
        (False, 2**40, 8, 100, None, 256),
    ],
)
def test_the_kv_cache_is_as_small_as_the_engine_can_do_with(
    cpu: bool,
    needed: int,
    sequences: int,
    available: int,
    blocks: int | None,
    longest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def upstream(config: Any, specs: Any, sizes: list[int]) -> list[Any]:
        """Blocks of 1 MiB; one request needs `needed`."""
        if min(sizes) < needed * MIB:
            raise ValueError("too small")
        return [SimpleNamespace(num_blocks=size // MIB, kv_cache_groups=[None]) for size in sizes]

    monkeypatch.setattr(warm_start, "on_cpu", lambda: cpu)
    config = SimpleNamespace(
        model_config=SimpleNamespace(original_max_model_len=longest),
        scheduler_config=SimpleNamespace(max_num_seqs=sequences),
    )
    arguments = config, [{}, {}], [available * MIB, (available + 5) * MIB]
    if blocks is None:
        with pytest.raises(ValueError, match="too small"):
            warm_start.small_kv_cache(upstream)(*arguments)
    else:
        assert min(each.num_blocks for each in warm_start.small_kv_cache(upstream)(*arguments)) == blocks
