"""How much is fuzzed: a sample in the test suite (about a minute in all), and what `make fuzz` runs."""

from __future__ import annotations

# Seeds of stacks (copies.py), seeds of stacks behind vLLM's decorator (decorated.py).
SUITE_STACKS = range(60)
SUITE_DECORATED = range(1000, 1010)
STACKS = range(2000)
DECORATED = range(1000, 1100)
# Of known cases behind the decorator, and of changes between starts (loads.py), the suite takes every n-th.
EVERY_KNOWN = 5
EVERY_CHANGE = 6
