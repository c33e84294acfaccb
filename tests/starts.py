"""Recorded starts made up for tests: what `vllm_compile_ext/record/file.py` would have written, without an engine.

Times are seconds after the start's beginning.  `cold`, `warm` and `crashed` look like a 70B model's on two GPUs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_compile_ext.record import read

BEGIN = 1_795_000_000_000_000_000  # 2026-11-18, unix ns
FRONT, CORE, WORKERS = 4100, 4200, (4301, 4302)
MODEL = "meta-llama/Llama-3.3-70B-Instruct"
KEY = "b818f53c0d22e8b7" * 4
OLD_KEY = "07c1a4529fde6630" * 4
CRASH, KILL = 38.8405, 57.0  # seconds: `cold` reads its first shard, compiles its second piece
HOSTILE = (
    '</script><script>alert(1)</script><img src="https://example.invalid/x" onerror=alert(2)>'
    '{{script}}{% raw %}<!--" onfocus="alert(3)'
)


class Recorder:
    """Writes lines like the processes of a start do."""

    def __init__(self, begin: int = BEGIN) -> None:
        self.begin = begin
        self.lines: list[str] = []
        self._count = 0

    def at(self, seconds: float) -> int:
        return self.begin + round(seconds * 1e9)

    def line(self, k: str, t: float, **values: Any) -> None:
        self.lines.append(json.dumps({"k": k, "t": self.at(t), **values}))

    def start(self, t: float, model: str = MODEL, **values: Any) -> None:
        about: dict[str, Any] = {
            "version": 1,
            "trace": "4bf92f3577b34da6a3ce929d0e0e4736",
            "parent": None,
            "model": model,
            "options": {"tensor_parallel_size": 2, "max_model_len": 8192, "gpu_memory_utilization": 0.92},
            "versions": {"vllm": "0.32.0", "torch": "2.13.0+cu130", "plugin": "0.1.0", "python": "3.12.9"},
            "machine": {"host": "gpu-7", "device": "NVIDIA H100 80GB HBM3", "devices": 2, "cpus": 32},
        }
        self.line("start", t, **(about | values))

    def process(self, t: float, pid: int, ppid: int, kind: str, rank: int | None = None) -> None:
        argv = ["vllm", "serve", MODEL, "--tensor-parallel-size", "2"] if kind == "front end" else []
        name = {"front end": "APIServer", "engine core": "EngineCore"}.get(kind, f"Worker_TP{rank}")
        values: dict[str, Any] = {"pid": pid, "ppid": ppid, "kind": kind, "name": name, "argv": argv, "host": "gpu-7"}
        self.line("process", t, **values, rank=rank)

    def begin_span(self, parent: str | None, pid: int, name: str, t: float, phase: str | None = None) -> str:
        self._count += 1
        key = f"{self._count:016x}"
        attrs = {"phase": phase} if phase else {}
        self.line("span", t, id=key, parent=parent, pid=pid, name=name, attrs=attrs)
        return key

    def end_span(self, key: str, t: float, error: str | None = None, **attrs: Any) -> None:
        self.line("end", t, id=key, attrs=attrs, error=error)

    def span(
        self, parent: str | None, pid: int, name: str, t: float, end: float, phase: str | None = None, **attrs: Any
    ) -> str:
        key = self.begin_span(parent, pid, name, t, phase)
        self.end_span(key, end, **attrs)
        return key

    def note(self, t: float, pid: int, name: str, line: str | None = None, **attrs: Any) -> None:
        """line: as it was logged, None where it was not."""
        self.line("note", t, pid=pid, name=name, attrs=attrs if line is None else {"line": line, **attrs})

    def until(self, t: float) -> Recorder:
        """Drop what is written after `t`, as if all processes were killed then."""
        self.lines = [line for line in self.lines if json.loads(line).get("end", json.loads(line)["t"]) <= self.at(t)]
        return self

    def fail(self, pid: int, t: float, error: str) -> None:
        """End a process and its open spans with an error."""
        lines = [json.loads(line) for line in self.lines]
        ended = {line["id"] for line in lines if line["k"] == "end"}
        for line in reversed(lines):
            if line["k"] == "span" and line["pid"] == pid and line["id"] not in ended and "end" not in line:
                self.end_span(line["id"], t, error)
        self.line("exit", t + 0.1, pid=pid, error=error)

    def bytes(self) -> bytes:
        return "".join(line + "\n" for line in self.lines).encode()

    def read(self, name: str = "x") -> read.Start:
        return read.parse(self.bytes().splitlines(), name)

    def write(self, folder: Path, name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.jsonl"
        path.write_bytes(self.bytes())
        return path


class Lane:
    """One process of a start: its clock, and the spans that are open in it."""

    def __init__(
        self, to: Recorder, pid: int, kind: str, ppid: int, at: float = 0, parent: str | None = None, rank: int = 0
    ) -> None:
        self.to, self.pid, self.at, self.rank = to, pid, at, rank
        self.open = [parent]
        to.process(at, pid, ppid, kind, rank if kind == "worker" else None)

    def begin(self, name: str, phase: str | None = None) -> None:
        self.open.append(self.to.begin_span(self.open[-1], self.pid, name, self.at, phase))

    def end(self, at: float | None = None) -> None:
        self.at = self.at if at is None else at
        self.to.end_span(self.open.pop() or "", self.at)

    def step(self, seconds: float, name: str, phase: str, **attrs: Any) -> None:
        self.to.span(self.open[-1], self.pid, name, self.at, self.at + seconds, phase, **attrs)
        self.at += seconds

    def join(self, other: Lane) -> None:
        """Go on at the time of `other`, for its open span."""
        self.at, self.open = other.at, [other.open[-1]]

    def note(self, name: str, line: str, **attrs: Any) -> None:
        self.to.note(self.at, self.pid, name, line, **attrs)

    def known(self, seconds: float, name: str, phase: str) -> None:
        """A step that is known only after it ended: one line."""
        values = {"id": f"{self.pid} {self.at}", "parent": self.open[-1], "pid": self.pid, "name": name}
        end = self.to.at(self.at + seconds)
        self.to.line("span", self.at, **values, end=end, attrs={"phase": phase}, error=None)
        self.at += seconds

    def imports(self, scale: float) -> None:
        """The interpreter starts, and the packages are imported."""
        self.known(0.05 * scale, "interpreter", "interpreter")
        self.begin("imports", "imports")
        packages = {"numpy": 0.2, "torch": 5.1, "transformers": 3.4, "triton": 0.9, "fastapi": 0.8, "vllm": 4.2}
        for package, seconds in packages.items():
            self.known(seconds * scale, f"import {package}", "imports")
        self.end()


def cold(begin: int = BEGIN, model: str = MODEL) -> Recorder:
    """A first start: compiles, keeps, captures, serves a token."""
    return _served(Recorder(begin), model, is_warm=False)


def warm(begin: int = BEGIN + 3_600_000_000_000, model: str = MODEL) -> Recorder:
    """A second start: loads what the first kept."""
    return _served(Recorder(begin), model, is_warm=True)


def _served(to: Recorder, model: str, *, is_warm: bool) -> Recorder:
    scale = 0.8 if is_warm else 1.0
    to.start(0.4, model)
    front = Lane(to, FRONT, "front end", 1)
    front.begin("start")
    root = front.open[-1]
    front.imports(scale)
    front.step(0.03, "load plugin", "plugin")
    front.step(1.67, "resolve configuration", "config")
    front.begin("AsyncMPClient init", "spawn")
    core = Lane(to, CORE, "engine core", FRONT, front.at + 0.05, front.open[-1])
    core.begin("EngineCoreProc init")
    core.imports(0.6 * scale)
    core.step(0.03, "load plugin", "plugin")
    core.begin("Executor init", "spawn")
    workers = []
    for rank, pid in enumerate(WORKERS):
        worker = Lane(to, pid, "worker", CORE, core.at + 0.07, core.open[-1], rank)
        worker.begin("Worker init")
        worker.imports((0.55 + 0.02 * rank) * scale)
        workers.append(worker)
    loading = max(worker.at for worker in workers)
    for worker in workers:
        worker.at = loading
        _load_model(worker, is_warm=is_warm)
    core.end(loading + (15.5 if is_warm else 16.5))

    core.begin("determine available memory", "memory profiling")
    for worker in workers:
        worker.join(core)
        worker.begin("profile run", "memory profiling")
        worker.at += 0.1
        worker.note("key", f"rank_{worker.rank}: key {KEY[:12]}", key=KEY, shard=f"rank_{worker.rank}")
        if is_warm:
            worker.begin("load compiled code", "load compiled code")
            for step in ("read", "verify", "map", "bind"):
                worker.step(0.02, step, "load compiled code")
            worker.end()
            worker.note("loaded", f"loaded 81 pieces of {KEY[:12]} in 80 ms", key=KEY, pieces=81)
            worker.end(core.at + 2.3)
        else:
            _compile(worker)
            worker.step(2.2, "forward", "memory profiling")
            worker.end(core.at + 12)
    core.end(core.at + (2.35 if is_warm else 12.1))

    core.step(0.6, "Allocate KV cache", "kv cache", blocks=21_344)
    capture = 14.5 if is_warm else 14.8
    for worker in workers:
        worker.join(core)
        worker.step(2.2, "warm up kernels", "warm-up")
        worker.begin("Capture model", "graph capture")
        for number in range(102):
            kind, size = "PIECEWISE" if number < 51 else "FULL", (512 - 8 * (number % 51)) or 1
            worker.step(capture / 102 * 0.97, f"{kind} {size}", "graph capture")
            worker.at += capture / 102 * 0.03
        worker.end(core.at + 2.2 + capture)
        for kind, size in (("PIECEWISE", 210), ("FULL", 94)):
            line = f"captured 51 {kind} CUDA graphs, {size}.0 MB in {capture / 2:.1f} s"
            worker.note("graphs", line, kind=kind, captured=51)
    core.end(core.at + 2.3 + capture)
    front.end(core.at)
    front.at += 0.05
    front.step(1.35, "API server setup", "api server")
    front.end(front.at + 0.05)
    to.line("ready", front.at)
    to.span(root, FRONT, "first request", front.at + 1.65, front.at + 1.95, "first request")
    to.line("first_token", front.at + 1.93)
    return to


def _load_model(worker: Lane, *, is_warm: bool) -> None:
    worker.step(2.3 if is_warm else 2.4, "init distributed", "distributed", backend="nccl")
    worker.step(1.4 if is_warm else 1.5, "Initialize model", "model construction")
    if is_warm:
        worker.step(11.7, "Load model", "weights")
    else:
        worker.begin("Load model", "weights")
        worker.at += 0.1
        for shard in range(6):
            worker.step(1.95, f"shard {shard + 1}/6", "weights", bytes=11 << 30)
            worker.at += 0.05
        worker.end(worker.at + 0.2 + 0.3 * worker.rank)
    worker.end()


def _compile(worker: Lane) -> None:
    """Rank 0 compiles, the other waits and loads."""
    changes = [["torch", "2.13.0", "2.13.1"], ["vllm.source", "sha256:55ab01", "sha256:9c0e77"]]
    line = "cache miss: torch 2.13.0 -> 2.13.1, vllm.source sha256:55ab01 -> sha256:9c0e77"
    worker.note("miss", line, key=KEY, closest=OLD_KEY, changes=changes)
    worker.at += 0.1
    worker.begin("compile", "compile")
    if worker.rank == 0:
        worker.step(3.9, "trace", "compile", layers=80)
        worker.step(0.5, "split and fingerprint", "compile")
        for piece in range(3):
            worker.step(1.5, f"piece {piece + 1}/3", "compile")
        line = "traced 2 layers and copied 78; compiled 81 pieces, 3 of them distinct in 8.9 s"
        worker.note("compiled", line, key=KEY, traced=2, copied=78, pieces=81, distinct=3)
        worker.step(0.5, "save", "compile")
        worker.note("kept", f"kept as {KEY[:12]}, 312.0 kB", key=KEY, bytes=312_004)
        worker.at += 0.1
    else:
        worker.at += 0.1
        worker.step(9.3, "wait for the rank that compiles", "compile", wait=True)
        worker.at += 0.1
        worker.note("loaded", f"loaded 81 pieces of {KEY[:12]} in 20 ms", key=KEY, pieces=81)
    worker.end()


def crashed(begin: int = BEGIN + 7_200_000_000_000) -> Recorder:
    """Rank 1 runs out of memory while it loads weights; rank 0 is killed because of that."""
    to = cold(begin).until(CRASH)
    to.fail(WORKERS[1], CRASH, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    to.fail(CORE, CRASH + 0.7, "RuntimeError: Engine core initialization failed. See root cause above.")
    to.fail(FRONT, CRASH + 1, "RuntimeError: Engine core initialization failed. See root cause above.")
    return to


def killed(begin: int = BEGIN) -> Recorder:
    """The operating system ended all processes while rank 0 compiled its second piece."""
    return cold(begin).until(KILL)


def damaged(begin: int = BEGIN) -> bytes:
    """A cold start's file with a line cut in two, one of another format, noise, and no end."""
    lines = cold(begin).bytes().splitlines(keepends=True)
    lines[3:5] = [lines[3][:40] + b"\n", b"\x00\xff\xfe noise\n", b"[1, 2]\n", b'{"k": "new kind", "t": 5}\n']
    lines[9] = lines[9].replace(b'"t": ', b'"t": "x')
    return b"".join(lines[:60]) + lines[60][:25]


def hostile() -> Recorder:
    """Every text of it tries to be markup."""
    to = cold(model=HOSTILE)
    for text in ("gpu-7", "max_model_len", "vllm", "NVIDIA H100 80GB HBM3"):
        to.lines = [line.replace(json.dumps(text), json.dumps(HOSTILE)) for line in to.lines]
    attrs = {"phase": HOSTILE, HOSTILE: HOSTILE}
    to.line("span", 1, id="e", parent=None, pid=9, name=HOSTILE, end=to.at(9), attrs=attrs, error=HOSTILE)
    to.line("process", 1, pid=9, ppid=1, kind=HOSTILE, name=HOSTILE, argv=[HOSTILE], host=HOSTILE, rank=None)
    to.note(1, 9, "miss", HOSTILE, closest=HOSTILE, changes=[[HOSTILE, HOSTILE, HOSTILE]])
    to.note(1, 9, "key", key=HOSTILE, shard=HOSTILE)
    to.note(1, 9, HOSTILE, **{HOSTILE: HOSTILE})
    to.note(1, 9, "fallback", HOSTILE)
    to.line("exit", 80, pid=9, error=HOSTILE)
    return to


def folder(where: Path) -> Path:
    """A folder with a cold, a warm and a crashed start, and a file that is none."""
    cold().write(where, "20261118-110640-4bf92f")
    warm().write(where, "20261118-120640-77a0c3")
    crashed().write(where, "20261118-130640-c0ffee")
    (where / "20261118-140640-dddddd.jsonl").write_text("nothing\n")
    return where
