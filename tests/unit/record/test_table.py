"""The table that the log gets when a start is ready."""

from __future__ import annotations

from typing import Any

from vllm_compile_ext.record import read, table
from vllm_compile_ext.record.file import encode

S = 10**9


def start(name: str, *rows: tuple[str, float, float], note: str = "compiled") -> read.Start:
    lines: list[dict[str, Any]] = [{"k": "start", "trace": "t", "model": "m", "t": S}]
    lines += [
        {"k": "span", "id": f"{n:016}", "parent": None, "pid": 1, "name": phase, "t": int((1 + at) * S)}
        | {"end": int((1 + end) * S), "attrs": {"phase": phase}}
        for n, (phase, at, end) in enumerate(rows)
    ]
    lines += [{"k": "note", "name": note, "pid": 1, "t": S, "attrs": {}}]
    lines += [{"k": "ready", "t": int((1 + max(end for *_, end in rows)) * S)}]
    return read.parse(map(encode, lines), name)


def test_a_first_start() -> None:
    said = table.text(start("a", ("imports", 0, 5), ("compile", 5, 20)), None)
    assert said.splitlines() == [
        "ready 20.0 s after the process began (vllm-compile-ext report a)",
        "  phase                 seconds  share",
        "  imports                  5.00  25.0%",
        "  compile                 15.00  75.0%",
    ]


def test_compared_with_the_one_before() -> None:
    before = start("a", ("imports", 0, 5), ("compile", 5, 20))
    now = start("b", ("imports", 0, 4), ("load compiled code", 4, 4.5), note="loaded")
    assert table.text(now, before).splitlines() == [
        "ready 4.5 s after the process began; cold before (a): 20.0 s (vllm-compile-ext report b)",
        "  phase                 seconds  share   before   change",
        "  imports                  4.00  88.9%     5.00    -1.00",
        "  compile                  0.00   0.0%    15.00   -15.00",
        "  load compiled code       0.50  11.1%     0.00    +0.50",
    ]
