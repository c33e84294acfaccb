from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vllm_compile_ext.report import formats


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (formats.duration, 0, "0 ms"),
        (formats.duration, 0.0123, "12 ms"),
        (formats.duration, 0.9996, "1.0 s"),
        (formats.duration, 83.62, "83.6 s"),
        (formats.duration, 700, "11.7 min"),
        (formats.cell, 12.3, "12.30"),
        (formats.cell, None, "-"),
        (formats.change, -0.9, "-0.90"),
        (formats.change, 0.1, "+0.10"),
        (formats.change, -0.004, "0.00"),
        (formats.change, None, "-"),
        (formats.verdict, -0.9, "better"),
        (formats.verdict, 0.1, "worse"),
        (formats.verdict, 0.004, ""),
        (formats.size, 312_004, "312.0 kB"),
        (formats.percent, 0.396, "39.6%"),
        (formats.date, 1e30, "?"),
    ],
)
def test_formats(function: Callable[[Any], str], value: Any, text: str) -> None:
    assert function(value) == text
