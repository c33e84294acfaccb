"""``vllm-compile-ext warm`` without an engine: its arguments, what it says, its exit status."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_compile_ext.cli import app, warm, warm_start
from vllm_compile_ext.compilation import outcomes
from vllm_compile_ext.compilation.outcomes import Outcome
from vllm_compile_ext.store.store import Manifest, Store

KEY = "ab" * 32
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with one entry of 5 bytes."""
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    made = Store.open(tmp_path / "store")
    common = dict(kind="program", model="m", created=1.0, platform="p", factors={})
    made.commit(Manifest(key=KEY, shard="rank0.0", members={"plan": made.put(b"12345")}, **common))
    return made


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command with a start that is made up; `seen` are the arguments that the start got."""
    seen: list[str] = []

    def call(*arguments: str, start: warm.Start | None = None) -> Any:
        def run(given: list[str], listen: Callable[[str], None]) -> warm.Start:
            seen.extend(given)
            for line in (start or warm.Start()).lines:
                listen(line)
            return start or warm.Start(0, [Outcome("kept", KEY, "rank0", "m")])

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
    assert invoke(*arguments).exit_code == 0
    assert invoke.seen == arguments


def test_own_options_are_taken_out_wherever_they_stand(invoke: Any) -> None:
    result = invoke("m", "--json", "-tp", "2", "--verbose", "--port", "80")
    assert invoke.seen == ["m", "-tp", "2", "--port", "80"]
    report = json.loads(result.stdout)
    assert (report["status"], report["bytes"]) == ("kept", 5)
    assert report["entries"] == [{"key": KEY, "shard": "rank0", "model": "m", "state": "kept", "bytes": 5}]


def test_no_model(invoke: Any) -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "name a model" in result.stderr


def test_what_was_kept_is_said(invoke: Any, store: Store) -> None:
    result = invoke("m")
    assert f"m, rank0: kept as {KEY[:12]}, 0.00 MB" in result.stdout
    assert f"kept: {store.root}" in result.stdout
    assert "importing vLLM" not in result.stdout, "progress is not part of the result"


def test_everything_already_there(invoke: Any) -> None:
    result = invoke("m", start=warm.Start(0, [Outcome("found", KEY, "rank0", "m")]))
    assert result.exit_code == 0
    assert f"already there as {KEY[:12]}" in result.stdout
    assert "everything was already there" in result.stdout


def test_entries_of_ranks_share_blobs(invoke: Any, store: Store) -> None:
    first = store.find(KEY, "rank0.0")
    assert first is not None
    common = dict(kind="program", model="m", created=1.0, platform="p", factors={})
    store.commit(Manifest(key=KEY, shard="rank1.0", members={**first.members, "head": store.put(b"123")}, **common))
    told = [Outcome("kept", KEY, "rank1", "m"), Outcome("found", KEY, "rank0", "m")]
    report = json.loads(invoke("m", "--json", start=warm.Start(0, told)).stdout)
    assert [(e["shard"], e["state"], e["bytes"]) for e in report["entries"]] == [
        ("rank0", "already there", 5),
        ("rank1", "kept", 8),
    ]
    assert (report["status"], report["bytes"]) == ("kept", 8)


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (warm.Start(0), "nothing was kept: no part of this model is compiled"),
        (warm.Start(1, [Outcome("refused", why="the plugin is off")]), "the plugin is off"),
        (warm.Start(-9), "the engine did not start (exit status -9)"),
        (
            warm.Start(0, [Outcome("kept"), Outcome("failed", KEY, "rank1", "m", "no space")]),
            "m (rank1) was not kept: no",
        ),
        (warm.Start(1, [Outcome("kept", KEY, "rank0", "m")]), "the engine did not start (exit status 1)"),
    ],
)
def test_failures_say_why(invoke: Any, start: warm.Start, why: str) -> None:
    result = invoke("m", start=start)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"error: {why}" in result.stderr
    result = invoke("m", "--json", start=start)
    assert result.exit_code == 1
    assert why in json.loads(result.stdout)["why"]


def test_a_bad_option_gives_what_vllm_says(invoke: Any) -> None:
    result = invoke("m", "--nonsense", start=warm.Start(2, [], ["usage: vllm serve", "vllm serve: error: --nonsense"]))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith("usage: vllm serve\nvllm serve: error: --nonsense\n")


def test_the_log_is_shown_from_the_process_that_failed_first(invoke: Any) -> None:
    worker = [f"(Worker pid=7) ERROR 11-24 [x.py] line {n}" for n in range(30)]
    log = ["(EngineCore pid=6) INFO hello", *worker, "(EngineCore pid=6) ERROR a worker failed", "Traceback"]
    assert warm.excerpt(log) == worker[-warm.TAIL :]
    assert warm.excerpt(log[:1]) == log[:1]
    shown = invoke("m", start=warm.Start(1, [], log))
    assert "line 29" in shown.stderr
    assert "--verbose" in shown.stderr
    verbose = invoke("m", "--verbose", start=warm.Start(1, [], log))
    assert verbose.stderr.count("line 29") == 1, "the log, and not its end once more"


def test_the_start_gets_the_arguments_and_its_children_end_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """if True:
        import os, subprocess, sys
        from vllm_compile_ext.compilation.outcomes import Outcome, tell
        tell(Outcome("kept", "k", "rank0", " ".join(sys.argv[1:])))
        child = subprocess.Popen(["sleep", "1000"])
        print("child", child.pid, flush=True)
        sys.exit(3)
    """
    monkeypatch.setattr(warm, "PROGRAM", [sys.executable, "-c", code])
    heard: list[str] = []
    start = warm.run(["m", "-tp", "2"], heard.append)
    assert start.status == 3
    assert start.told == [Outcome("kept", "k", "rank0", "m -tp 2")]
    assert start.lines == heard
    stat = Path(f"/proc/{heard[0].split()[1]}/stat")

    def ended() -> bool:
        with suppress(FileNotFoundError, ProcessLookupError):
            return stat.read_text().rpartition(")")[2].split()[0] == "Z"
        return True

    while not ended():  # killed, and about to end; for ever would be the test's timeout
        time.sleep(0.01)


def test_outcomes_of_many_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "told"
    path.touch()
    monkeypatch.setenv(outcomes.VARIABLE, str(path))
    told = [Outcome("kept", KEY, f"rank{n}", "m" * 1000) for n in range(50)]
    threads = [threading.Thread(target=outcomes.tell, args=(one,)) for one in told]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with path.open("ab") as file:
        file.write(b'{"what": "ke')  # a process was killed
    assert sorted(outcomes.read(path), key=lambda each: int(each.shard[4:])) == told


def test_nobody_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(outcomes.VARIABLE, raising=False)
    outcomes.tell(Outcome("kept"))
    monkeypatch.setenv(outcomes.VARIABLE, str(tmp_path / "gone"))
    outcomes.tell(Outcome("kept"))
    assert not (tmp_path / "gone").exists()


MIB = 2**20


class Caches:
    """Stands for `get_kv_cache_configs`: blocks of 1 MiB, one request needs `needed`; `tried` are the sizes in MiB."""

    def __init__(self, needed: int) -> None:
        self.needed = needed
        self.tried: list[int] = []

    def __call__(self, config: Any, specs: Any, available: list[int]) -> list[Any]:
        self.tried.append(min(available) // MIB)
        if self.tried[-1] < self.needed:
            raise ValueError("too small")
        return [SimpleNamespace(num_blocks=size // MIB, kv_cache_groups=[None]) for size in available]


def engine(max_model_len: int = 256, max_num_seqs: int = 8) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(original_max_model_len=max_model_len),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
    )


@pytest.mark.parametrize(("needed", "blocks"), [(1, 16), (17, 32), (100, 128)])
def test_on_cpu_the_kv_cache_holds_one_request(needed: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start, "on_cpu", lambda: True)
    found = warm_start.small_kv_cache(Caches(needed))(engine(), [{}, {}], [MIB, MIB])
    assert [each.num_blocks for each in found] == [blocks, blocks]


@pytest.mark.parametrize(
    ("needed", "sequences", "available", "blocks"),
    [
        (17, 1, 10_000, 64),  # two requests
        (17, 100, 10_000, 256),  # two blocks a sequence
        (17, 100, 200, 200),  # what there is
        (17, 1, 20, 20),
    ],
)
def test_on_gpus_it_has_room_for_the_warm_up(
    needed: int, sequences: int, available: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_start, "on_cpu", lambda: False)
    config = engine(max_num_seqs=sequences)
    found = warm_start.small_kv_cache(Caches(needed))(config, [{}, {}], [available * MIB, (available + 5) * MIB])
    assert min(each.num_blocks for each in found) == blocks


def test_a_kv_cache_that_does_not_fit_is_the_error_that_it_is_in_a_real_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in (True, False):
        monkeypatch.setattr(warm_start, "on_cpu", lambda cpu=cpu: cpu)
        with pytest.raises(ValueError, match="too small"):
            warm_start.small_kv_cache(Caches(2**40))(engine(), [{}], [100 * MIB])


def test_the_kv_cache_is_left_alone_where_it_decides_over_the_longest_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start, "on_cpu", lambda: False)
    caches = Caches(17)
    warm_start.small_kv_cache(caches)(engine(max_model_len=-1), [{}], [1000 * MIB])
    assert caches.tried == [1000]
