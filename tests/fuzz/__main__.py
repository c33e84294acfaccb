"""All that is fuzzed, for as long as it takes: `python -m tests.fuzz`, or `make fuzz`."""

from tests.fuzz import copies, loads, sizes
from tests.fuzz.test_decorated import INDUCTOR, bad, run

failed = copies.main([]) + loads.main([])
for result in bad(run([*copies.known.CASES, *sizes.DECORATED], INDUCTOR)):
    print(result)
    failed = 1
raise SystemExit(bool(failed))
