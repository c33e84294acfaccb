"""When a process began, on the clock that all processes of a machine share (`time.time_ns`)."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path

now = time.time_ns


def process_start() -> int | None:
    """Unix ns at which the operating system started this process; None where it does not say (not Linux)."""
    return _process_start(os.getpid())


@functools.cache
def _process_start(pid: int) -> int | None:
    # Field 22 of /proc/self/stat counts ticks since the machine booted, sleep included (`man 5 proc`): exact to a tick,
    # 10 ms.  /proc/stat has the time of the boot in whole seconds only, so that is taken from two clocks.
    try:
        # The second field is a name in parentheses that may hold anything.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - int(fields[19]) * 10**9 // os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return time.time_ns() - age if age >= 0 else None
