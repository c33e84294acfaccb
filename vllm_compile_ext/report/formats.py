"""How seconds, bytes, dates and phases are written: on a terminal, in a page, and by every command."""

from __future__ import annotations

import time

from rich import filesize


def duration(seconds: float) -> str:
    """Such as "83.6 s", "12 ms", "11.7 min"."""
    if abs(seconds) < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if abs(seconds) < 599.5 else f"{seconds / 60:.1f} min"


def cell(seconds: float | None) -> str:
    """Seconds in a table, such as "12.30"."""
    return "-" if seconds is None else f"{seconds:.2f}"


def change(seconds: float | None) -> str:
    """A difference in a table, such as "-0.90"."""
    return f"{seconds:+.2f}" if verdict(seconds) else cell(None if seconds is None else 0.0)


def verdict(change: float | None) -> str:
    """ "better" or "worse"; "" where two decimals show no difference."""
    if change is None or abs(change) < 0.005:
        return ""
    return "better" if change < 0 else "worse"


def percent(share: float) -> str:
    return f"{share:.1%}"


def size(count: int) -> str:
    """Bytes, such as "5.1 MB"; a MB is 1000 kB."""
    return filesize.decimal(count)


def count(number: float, one: str, many: str = "") -> str:
    """Such as "1 piece" or "81 pieces"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def date(moment: float) -> str:
    """A unix time in local time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
    except (OverflowError, ValueError, OSError):
        return "?"


def ago(moment: float) -> str:
    """How long ago a unix time was, such as "3 h"."""
    minutes = int(max(0.0, time.time() - moment) // 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // 1440} d"
