"""Counting in several processes, reading as ``/metrics`` does, and what can go wrong."""

from __future__ import annotations

import ast
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_compile_ext import temporary
from vllm_compile_ext.record import events, metrics
from vllm_compile_ext.replace import replace

ROOT = Path(__file__).parents[3]
HITS = "vllm_compile_ext_store_hits_total"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    made = tmp_path / "run"
    made.mkdir(mode=0o700)
    monkeypatch.setenv(temporary.RUN, str(made))
    metrics.forget()
    yield made
    metrics.forget()


def child(code: str, *, wait: bool = True) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", f"from vllm_compile_ext.record import metrics\n{code}"],
        text=True,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    if wait:
        assert process.wait(60) == 0
        process.communicate()
    return process


def page() -> str:
    registry = CollectorRegistry()
    replace(registry, "collect", metrics.with_ours)
    return generate_latest(registry).decode()


def test_counters_are_added_up_over_processes() -> None:
    metrics.inc("store_hits_total")
    child("metrics.inc('store_hits_total', 2); metrics.inc('graphs_replayed_total', kind='FULL')")
    child("metrics.inc('store_hits_total', 3)")
    assert f"\n{HITS} 6.0\n" in page()
    assert '\nvllm_compile_ext_graphs_replayed_total{kind="FULL"} 1.0\n' in page()
    assert f"# TYPE {HITS} counter" in page()
    assert metrics.samples()[(HITS,)] == 6


def test_counters_without_labels_begin_at_0() -> None:
    assert f"\n{HITS} 0.0\n" in page()
    assert "graphs_captured" not in page()


def test_gauges_of_memory_are_those_of_living_processes() -> None:
    metrics.set("graph_bytes", 5)
    metrics.set("graph_bytes", 7)
    child("metrics.set('graph_bytes', 100)")
    process = child("metrics.set('graph_bytes', 1000); print('done', flush=True); input()", wait=False)
    assert process.stdout is not None
    process.stdout.readline()
    assert "\nvllm_compile_ext_graph_bytes 1007.0\n" in page()
    process.communicate("\n")
    assert "\nvllm_compile_ext_graph_bytes 7.0\n" in page()


def test_the_seconds_of_a_phase_are_those_that_were_set_last() -> None:
    child("metrics.set('startup_seconds', 2.5, phase='weights')")
    metrics.set("startup_seconds", 1.5, phase="weights")
    metrics.set("startup_seconds", 4, phase="load compiled code")
    assert '\nvllm_compile_ext_startup_seconds{phase="weights"} 1.5\n' in page()
    assert '\nvllm_compile_ext_startup_seconds{phase="load compiled code"} 4.0\n' in page()


def test_threads_do_not_lose_counts() -> None:
    def count() -> None:
        for _ in range(2000):
            metrics.inc("store_hits_total")
            metrics.inc("graphs_missed_total", kind="FULL")

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.samples()[(HITS,)] == 16000


def test_the_first_count_in_a_folder_keeps_the_others_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes the files; with a new lock meanwhile another thread's count would be lost."""
    lock = metrics._lock
    monkeypatch.setenv(temporary.RUN, str(tmp_path))
    metrics.inc("store_hits_total")
    assert metrics.samples()[(HITS,)] == 1
    assert metrics._lock is lock


def test_a_forked_child_counts_in_a_file_of_its_own(folder: Path) -> None:
    metrics.inc("store_hits_total")
    process = os.fork()
    if process == 0:
        metrics.inc("store_hits_total", 10)
        os._exit(0)
    os.waitpid(process, 0)
    metrics.inc("store_hits_total")
    assert metrics.samples()[(HITS,)] == 12
    assert len(list(folder.glob("counter_*.db"))) == 2


def test_labels_in_any_order_and_of_any_length_are_one_series() -> None:
    for kind in ("x" * 1000, "x" * 2000):
        metrics.inc("graphs_missed_total", kind=kind)
    assert metrics.samples()[("vllm_compile_ext_graphs_missed_total", "x" * metrics.LETTERS)] == 2


def test_all_series_that_are_allowed_fit() -> None:
    for number in range(metrics.SERIES + 10):
        metrics.inc("graphs_missed_total", kind=f"{number:x>64}")
    assert sum(metrics.samples().values()) == metrics.SERIES
    file = metrics._files["counter"]
    assert file._capacity == metrics.SIZE, "a file that grows can meet a full disk"


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: metrics.inc("nonsense"),
        lambda: metrics.inc("graph_bytes"),
        lambda: metrics.set("store_hits_total", 1),
        lambda: metrics.inc("store_hits_total", kind="FULL"),
        lambda: metrics.inc("graphs_missed_total"),
        lambda: metrics.set("graph_bytes", "many"),  # type: ignore[arg-type]
    ],
)
def test_mistakes_cost_one_line(mistake: object, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        mistake()  # type: ignore[operator]
    assert [record.levelno for record in caplog.records if "metrics" in record.message] == [logging.WARNING]


def test_less_than_nothing_is_not_counted() -> None:
    for amount in (-1, float("nan"), 0):
        metrics.inc("store_hits_total", amount)
    assert metrics.samples()[(HITS,)] == 0


def test_a_folder_that_is_gone_or_full_costs_one_line(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.rmdir()
    metrics.inc("store_hits_total")
    assert metrics.samples() == {(f"vllm_compile_ext_{m.name}",): 0 for m in metrics.METRICS if m.name in ZERO}
    metrics.forget()
    folder.mkdir()

    def full(handle: int, begin: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    metrics.inc("store_hits_total")
    metrics.inc("pieces_loaded_total")
    assert [record.message.count("metrics are not complete") for record in caplog.records] == [1, 1]
    assert "No space left" in caplog.records[1].message


EXPOSED = """if True:
    import os, sys, tempfile
    from vllm_compile_ext import changes
    from vllm_compile_ext.record import metrics
    changes.TABLE = [row for row in changes.TABLE if row.by == "record.metrics:with_ours"]
    undos = changes.make(changes.ACTIVE)
    metrics.inc("store_hits_total")
    from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector
    registry = CollectorRegistry()
    MultiProcessCollector(registry, tempfile.mkdtemp())
    def shown():
        return [generate_latest(each).decode().count("\\n{hits} 1.0") for each in (REGISTRY, registry)]
    print(shown(), "vllm" in sys.modules)
    changes.undo(undos)
    print(shown())
""".replace("{hits}", HITS)


def test_pages_of_one_server_and_of_several_show_them_once() -> None:
    done = subprocess.run([sys.executable, "-c", EXPOSED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[1, 1] False", "[0, 0]"]


ZERO = {metric.name for metric in metrics.METRICS if metric.kind == "counter" and not metric.labels}


def test_a_damaged_file_hides_only_itself(folder: Path) -> None:
    metrics.inc("store_hits_total")
    (folder / "counter_1.db").write_bytes(b"\xff\x00\x01\x00" + b"\xff" * 500)
    (folder / "counter_2.db").write_bytes(b"")
    (folder / "gauge_livesum_x.db").write_bytes(b"")
    assert metrics.samples()[(HITS,)] == 1


def test_without_a_folder_nothing_happens(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv(temporary.RUN)
    metrics.inc("store_hits_total")
    assert metrics.samples() == {}
    assert not caplog.records


def test_importing_and_not_counting_is_the_standard_library() -> None:
    code = "import sys; from vllm_compile_ext.record import metrics; print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_docs_page_is_the_table() -> None:
    page = ROOT / "docs" / "metrics.md"
    assert page.read_text() == metrics.markdown(), "run: python -m vllm_compile_ext.record.metrics > docs/metrics.md"


def test_the_code_counts_only_what_the_table_has() -> None:
    used: dict[str, set[tuple[str, ...]]] = {name: {()} for row in events.COUNTS.values() for name in row}
    for path in (ROOT / "vllm_compile_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("metrics.inc", "metrics.set"):
                if not isinstance(node.args[0], ast.Constant):  # of `events.COUNTS`
                    continue
                name = str(node.args[0].value)
                used.setdefault(name, set()).add(tuple(sorted(str(k.arg) for k in node.keywords if k.arg != "amount")))
    known = {metric.name: {tuple(sorted(metric.labels))} for metric in metrics.METRICS}
    assert "store_hits_total" in used
    assert {name: labels for name, labels in used.items() if known.get(name) != labels} == {}


class TestFolder:
    """The folder that the processes share."""

    @pytest.fixture(autouse=True)
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(temporary.tempfile, "gettempdir", lambda: str(tmp_path))
        monkeypatch.delenv(temporary.RUN)
        return tmp_path

    def test_made_private_and_removed(self) -> None:
        undo = temporary.make_run_folder()
        made = temporary.run_folder()
        assert made is not None
        assert made.stat().st_mode & 0o777 == 0o700
        undo()
        assert not made.exists()
        assert temporary.run_folder() is None

    def test_a_program_that_inherits_the_variable_makes_its_own(self, folder: Path) -> None:
        os.environ[temporary.RUN] = str(folder)
        undo = temporary.make_run_folder()
        assert temporary.run_folder() != folder
        undo()
        assert temporary.run_folder() == folder

    def test_a_killed_owner_leaves_a_folder_that_the_next_removes(self, root: Path) -> None:
        code = "from vllm_compile_ext.temporary import *; make_run_folder(); print(run_folder(), flush=True); input()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        environ = {**os.environ, "TMPDIR": str(root)}
        process = subprocess.Popen([sys.executable, "-c", code], env=environ, **pipes)  # type: ignore[call-overload]
        left = Path(process.stdout.readline().strip())
        temporary.remove_abandoned(root, temporary.RUN_PREFIX)
        assert left.exists(), "its owner lives"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert left.exists()
        undo = temporary.make_run_folder()
        assert not left.exists()
        undo()

    def test_an_unwritable_place_costs_one_line(self, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
        temporary.tempfile.gettempdir = lambda: str(tmp_path / "gone")
        temporary.make_run_folder()()
        assert temporary.run_folder() is None
        metrics.inc("store_hits_total")
        assert len(caplog.records) == 1

    def test_a_fork_removes_nothing(self) -> None:
        undo = temporary.make_run_folder()
        made = temporary.run_folder()
        assert made is not None
        process = os.fork()
        if process == 0:
            undo()
            os._exit(0)
        os.waitpid(process, 0)
        assert made.exists()
        undo()
