"""Whether a recorded start is still running, on this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

from vllm_compile_ext.record.read import Process, Start

_SLACK = 2 * 10**9  # ns between two ways of asking when a process began


def running(start: Start) -> bool:
    """Whether a process that recorded it is there, and has not said that it ends."""
    gone = {exit_.pid for exit_ in start.exits}
    return any(_is_there(process) for process in start.processes if process.pid not in gone)


def _is_there(process: Process) -> bool:
    """By its number and by when it began: numbers are used again."""
    if process.host != os.uname().nodename:
        return False
    try:
        # Fields 3 and 22 (`man 5 proc`); the second is a name in parentheses that may hold anything.
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - int(fields[19]) * 10**9 // os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return False
    return fields[0] != "Z" and abs(time.time_ns() - age - process.start) < _SLACK
