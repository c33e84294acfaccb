"""What recording a start costs: seconds for a line and a span, and for a whole start that was recorded.

``python -m benchmarks.recording [FILE]``, FILE being a recorded start, ``compile_starts/*.jsonl`` in vLLM's cache root.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vllm_compile_ext import finder
from vllm_compile_ext.record import read, recorder
from vllm_compile_ext.record.events import event, span

TIMES = 2000


def each(work: Callable[[], None], times: int = TIMES) -> float:
    """Seconds that `work` takes, of many."""
    begin = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begin) / times


def one_span() -> None:
    with span("name", "compile", number=1):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path)
    args = parser.parse_args()
    nothing = each(one_span)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLLM_CACHE_ROOT"] = folder
        begin = time.perf_counter()
        to = recorder.begin()
        assert to is not None
        to.watch_imports()
        to.open({})
        first = time.perf_counter() - begin
        a_span = each(one_span)
        a_note = each(lambda: event("key", key="k" * 64))
        look = each(lambda: finder.finder.find_spec("no_such_module") and None)
        recorder.forget()
    print(f"a span: {a_span * 1e6:.0f} us (two lines; {nothing * 1e6:.1f} us where nothing is recorded)")
    print(f"a note: {a_note * 1e6:.0f} us")
    print(f"an outermost import: {look * 1e6:.0f} us at most")
    print(f"beginning a process: {first * 1e3:.1f} ms")
    if args.file is not None:
        start = read.read(args.file)
        lines = len(args.file.read_bytes().splitlines())
        cost = lines * a_span / 2 + len(start.processes) * first
        seconds = ((start.first_token or start.ready or start.last) - start.begin) / 1e9
        print(
            f"{start.id}: {lines} lines, {args.file.stat().st_size} bytes, {len(start.processes)} processes; "
            f"{cost * 1e3:.0f} ms of {seconds:.1f} s, {cost / seconds:.3%}"
        )


if __name__ == "__main__":
    main()
