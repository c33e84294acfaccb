"""Recorded starts made up for tests: what `vllm_compile_ext/record/file.py` would have written, without an engine.

Times are seconds after the start's beginning.  `cold`, `warm` and `crashed` look like a 70B model's on two GPUs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN = 1_795_000_000_000_000_000  # 2026-11-18, unix ns
FRONT, CORE, WORKERS = 4100, 4200, (4301, 4302)
MODEL = "meta-llama/Llama-3.3-70B-Instruct"
KEY = "b818f53c0d22e8b7" * 4
OLD_KEY = "07c1a4529fde6630" * 4


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
        }
        about["options"] = {"tensor_parallel_size": 2, "max_model_len": 8192, "gpu_memory_utilization": 0.92}
        about["versions"] = {"vllm": "0.32.0", "torch": "2.13.0+cu130", "plugin": "0.1.0", "python": "3.12.9"}
        about["machine"] = {"host": "gpu-7", "device": "NVIDIA H100 80GB HBM3", "devices": 2, "cpus": 32}
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
        self.line("begin", t, id=key, parent=parent, pid=pid, name=name, attrs=attrs)
        return key

    def end_span(self, key: str, t: float, error: str | None = None, **attrs: Any) -> None:
        self.line("end", t, id=key, attrs=attrs, error=error)

    def span(
        self, parent: str | None, pid: int, name: str, t: float, end: float, phase: str | None = None, **attrs: Any
    ) -> str:
        key = self.begin_span(parent, pid, name, t, phase)
        self.end_span(key, end, **attrs)
        return key

    def known(self, parent: str | None, pid: int, name: str, t: float, end: float, phase: str) -> str:
        """A span that is known only after it ended."""
        self._count += 1
        key = f"{self._count:016x}"
        attrs = {"phase": phase}
        self.line("span", t, id=key, parent=parent, pid=pid, name=name, end=self.at(end), attrs=attrs, error=None)
        return key

    def note(self, t: float, pid: int, name: str, **attrs: Any) -> None:
        self.line("note", t, pid=pid, name=name, attrs=attrs)

    def bytes(self) -> bytes:
        return "".join(line + "\n" for line in self.lines).encode()

    def write(self, folder: Path, name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.jsonl"
        path.write_bytes(self.bytes())
        return path


def _imports(to: Recorder, parent: str, pid: int, t: float, scale: float) -> float:
    """Interpreter and imports of a process from `t`; when they are over."""
    to.known(parent, pid, "interpreter", t, t + 0.05 * scale, "interpreter")
    outer = to.begin_span(parent, pid, "imports", t + 0.05 * scale, "imports")
    at = t + 0.05 * scale
    packages = {"numpy": 0.2, "torch": 5.1, "transformers": 3.4, "triton": 0.9, "fastapi": 0.8, "vllm": 4.2}
    for package, seconds in packages.items():
        to.known(outer, pid, f"import {package}", at, at + seconds * scale, "imports")
        at += seconds * scale
    to.end_span(outer, at)
    return at


def _until_workers(to: Recorder, scale: float = 1.0, **about: Any) -> tuple[str, str, str, list[str], float]:
    """Spans still open: root, the front end's wait, the core's, the workers'; and when these have imported all."""
    to.start(0.4, **about)
    to.process(0, FRONT, 1, "front end")
    root = to.begin_span(None, FRONT, "start", 0)
    at = _imports(to, root, FRONT, 0, scale)
    to.span(root, FRONT, "load plugin", at, at + 0.03, "plugin")
    to.span(root, FRONT, "resolve configuration", at + 0.03, at + 1.7, "config")
    at += 1.7
    wait = to.begin_span(root, FRONT, "AsyncMPClient init", at, "spawn")
    to.process(at + 0.05, CORE, FRONT, "engine core")
    core = to.begin_span(wait, CORE, "EngineCoreProc init", at + 0.05)
    at = _imports(to, core, CORE, at + 0.05, 0.6 * scale)
    to.span(core, CORE, "load plugin", at, at + 0.03, "plugin")
    executor = to.begin_span(core, CORE, "Executor init", at + 0.03, "spawn")
    workers, over = [], 0.0
    for rank, pid in enumerate(WORKERS):
        to.process(at + 0.1, pid, CORE, "worker", rank)
        worker = to.begin_span(executor, pid, "Worker init", at + 0.1)
        over = max(over, _imports(to, worker, pid, at + 0.1, (0.55 + 0.02 * rank) * scale))
        workers.append(worker)
    return root, wait, executor, [core, *workers], over


def cold(begin: int = BEGIN, model: str = MODEL) -> Recorder:
    """A first start: compiles, keeps, captures, serves a token."""
    to = Recorder(begin)
    root, wait, executor, (core, *workers), at = _until_workers(to, model=model)
    changes = [["torch", "2.13.0", "2.13.1"], ["vllm.source", "sha256:55ab01", "sha256:9c0e77"]]
    for rank, (pid, worker) in enumerate(zip(WORKERS, workers, strict=True)):
        lag = 0.3 * rank
        to.span(worker, pid, "init distributed", at, at + 2.4, "distributed", backend="nccl")
        to.span(worker, pid, "Initialize model", at + 2.4, at + 3.9, "model construction")
        load = to.begin_span(worker, pid, "Load model", at + 3.9, "weights")
        for shard in range(6):
            to.span(
                load,
                pid,
                f"shard {shard + 1}/6",
                at + 4 + 2 * shard,
                at + 6 + 2 * shard - 0.05,
                "weights",
                bytes=11 << 30,
            )
        to.end_span(load, at + 16.2 + lag)
        to.end_span(worker, at + 16.2 + lag)
    at += 16.5
    to.end_span(executor, at)
    profiling = to.begin_span(core, CORE, "determine available memory", at, "memory profiling")
    for rank, pid in enumerate(WORKERS):
        own = to.begin_span(profiling, pid, "profile run", at, "memory profiling")
        to.note(at + 0.1, pid, "key", key=KEY, shard=f"rank_{rank}")
        to.note(
            at + 0.1,
            pid,
            "miss",
            key=KEY,
            closest=OLD_KEY,
            summary="cache miss: torch 2.13.0 -> 2.13.1",
            changes=changes,
        )
        compiling = to.begin_span(own, pid, "compile", at + 0.2, "compile")
        if rank == 0:
            to.span(compiling, pid, "trace", at + 0.2, at + 4.1, "compile", layers=80)
            to.span(compiling, pid, "split and fingerprint", at + 4.1, at + 4.6, "compile")
            for piece in range(3):
                to.span(
                    compiling, pid, f"piece {piece + 1}/3", at + 4.6 + 1.5 * piece, at + 6.1 + 1.5 * piece, "compile"
                )
            to.span(compiling, pid, "save", at + 9.1, at + 9.6, "compile")
            to.note(at + 9.1, pid, "compiled", key=KEY, traced=2, copied=78, pieces=81, distinct=3, seconds=8.9)
            to.note(at + 9.6, pid, "kept", key=KEY, bytes=312_004)
        else:
            to.span(compiling, pid, "wait for the rank that compiles", at + 0.3, at + 9.6, "compile", wait=True)
            to.note(at + 9.7, pid, "loaded", key=KEY, bytes=312_004, pieces=81, seconds=0.02)
        to.end_span(compiling, at + 9.7)
        to.span(own, pid, "forward", at + 9.7, at + 11.9, "memory profiling")
        to.end_span(own, at + 12)
    to.end_span(profiling, at + 12.1)
    at += 12.1
    return _rest(to, root, wait, core, at, capture=14.8)


def _rest(to: Recorder, root: str, wait: str, core: str, at: float, capture: float) -> Recorder:
    """From the KV cache to the first token."""
    to.span(core, CORE, "Allocate KV cache", at, at + 0.6, "kv cache", blocks=21_344)
    for pid in WORKERS:
        to.span(core, pid, "warm up kernels", at + 0.6, at + 2.8, "warm-up")
        outer = to.begin_span(core, pid, "Capture model", at + 2.8, "graph capture")
        each = capture / 102
        for number in range(102):
            kind = "PIECEWISE" if number < 51 else "FULL"
            size = (512 - 8 * (number % 51)) or 1
            begin = at + 2.8 + number * each
            to.span(outer, pid, f"{kind} {size}", begin, begin + each * 0.97, "graph capture")
        to.end_span(outer, at + 2.8 + capture)
        to.note(
            at + 2.8 + capture, pid, "graphs", kind="PIECEWISE", captured=51, seconds=capture / 2, bytes=210_000_000
        )
        to.note(at + 2.8 + capture, pid, "graphs", kind="FULL", captured=51, seconds=capture / 2, bytes=94_000_000)
    at += 2.9 + capture
    to.end_span(core, at)
    to.end_span(wait, at)
    to.span(root, FRONT, "API server setup", at + 0.05, at + 1.4, "api server")
    to.end_span(root, at + 1.45)
    to.line("ready", at + 1.45)
    to.span(root, FRONT, "first request", at + 3.1, at + 3.4, "first request")
    to.line("first_token", at + 3.38)
    return to


def warm(begin: int = BEGIN + 3_600_000_000_000, model: str = MODEL) -> Recorder:
    """A second start: loads what the first kept."""
    to = Recorder(begin)
    root, wait, executor, (core, *workers), at = _until_workers(to, 0.8, model=model)
    for pid, worker in zip(WORKERS, workers, strict=True):
        to.span(worker, pid, "init distributed", at, at + 2.3, "distributed", backend="nccl")
        to.span(worker, pid, "Initialize model", at + 2.3, at + 3.7, "model construction")
        to.span(worker, pid, "Load model", at + 3.7, at + 15.4, "weights")
        to.end_span(worker, at + 15.4)
    at += 15.5
    to.end_span(executor, at)
    profiling = to.begin_span(core, CORE, "determine available memory", at, "memory profiling")
    for rank, pid in enumerate(WORKERS):
        own = to.begin_span(profiling, pid, "profile run", at, "memory profiling")
        to.note(at + 0.1, pid, "key", key=KEY, shard=f"rank_{rank}")
        outer = to.begin_span(own, pid, "load compiled code", at + 0.1, "load compiled code")
        for number, step in enumerate(("read", "verify", "map", "bind")):
            to.span(outer, pid, step, at + 0.1 + 0.02 * number, at + 0.12 + 0.02 * number, "load compiled code")
        to.end_span(outer, at + 0.18)
        to.note(at + 0.18, pid, "loaded", key=KEY, bytes=312_004, pieces=81, seconds=0.08)
        to.end_span(own, at + 2.3)
    to.end_span(profiling, at + 2.35)
    return _rest(to, root, wait, core, at + 2.35, capture=14.5)


def crashed(begin: int = BEGIN + 7_200_000_000_000) -> Recorder:
    """Rank 1 runs out of memory while it loads weights; rank 0 is killed because of that."""
    to = Recorder(begin)
    root, wait, executor, (core, *workers), at = _until_workers(to)
    error = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    for pid, worker in zip(WORKERS, workers, strict=True):
        to.span(worker, pid, "init distributed", at, at + 2.4, "distributed")
        to.span(worker, pid, "Initialize model", at + 2.4, at + 3.9, "model construction")
        load = to.begin_span(worker, pid, "Load model", at + 3.9, "weights")
        shard = to.begin_span(load, pid, "shard 1/6", at + 4, "weights")
        if pid == WORKERS[1]:
            to.end_span(shard, at + 5.2, error)
            to.end_span(load, at + 5.2, error)
            to.end_span(worker, at + 5.2, error)
            to.line("exit", at + 5.3, pid=pid, error=error)
    outer = "RuntimeError: Engine core initialization failed. See root cause above."
    to.end_span(executor, at + 5.9, outer)
    to.end_span(core, at + 5.9, outer)
    to.line("exit", at + 6.0, pid=CORE, error=outer)
    to.end_span(wait, at + 6.2, outer)
    to.end_span(root, at + 6.2, outer)
    to.line("exit", at + 6.3, pid=FRONT, error=outer)
    return to


def killed(begin: int = BEGIN) -> Recorder:
    """The operating system ended all processes while rank 0 compiled its second piece."""
    to = cold(begin)
    last = next(n for n, line in enumerate(to.lines) if '"name": "piece 2/3"' in line)
    del to.lines[last + 1 :]
    return to


def damaged(begin: int = BEGIN) -> bytes:
    """A cold start's file with a line cut in two, one of another format, noise, and no end."""
    lines = cold(begin).bytes().splitlines(keepends=True)
    lines[3:5] = [lines[3][:40] + b"\n", b"\x00\xff\xfe noise\n", b"[1, 2]\n", b'{"k": "new kind", "t": 5}\n']
    lines[9] = lines[9].replace(b'"t": ', b'"t": "x')
    return b"".join(lines[:60]) + lines[60][:25]


def folder(where: Path) -> Path:
    """A folder with a cold, a warm and a crashed start, and a file that is none."""
    cold().write(where, "20261118-110640-4bf92f")
    warm().write(where, "20261118-120640-77a0c3")
    crashed().write(where, "20261118-130640-c0ffee")
    (where / "20261118-140640-dddddd.jsonl").write_text("nothing\n")
    return where
