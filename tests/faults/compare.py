"""Prints what mutated shards cost here and in webdataset: python tests/faults/compare.py [TRIALS] [FIRST]."""

import logging
import sys
import time
import warnings
from collections import Counter

from trials import run_trials

COLUMNS = {
    "trials": "trials",
    "samples": "samples",
    "index told": "index: reported",
    "index untold": "index: silent",
    "scan told": "scan: reported",
    "scan untold": "scan: silent",
    "wds torn": "wds: torn",
    "wds lost": "wds: lost",
    "wds silent": "wds: silent",
    "wds silent trials": "wds: silent trials",
    "wds hangs": "wds: hangs",
}


def main() -> int:
    """Run the trials and print one line a kind of fault; return 1 where a promise is broken."""
    trials, first = [int(word) for word in sys.argv[1:]] + [10_000, 0][len(sys.argv) - 1 :]
    logging.disable()
    warnings.simplefilter("ignore")
    start = time.monotonic()
    result = run_trials(range(first, first + trials), with_webdataset=True)
    print(f"{'':24}" + "".join(f"{title:>20}" for title in COLUMNS.values()))
    total: Counter[str] = Counter()
    for kind, counts in sorted(result.counts.items()):
        total += counts
        print(f"{kind:24}" + "".join(f"{counts[name]:20}" for name in COLUMNS))
    print(f"{'all':24}" + "".join(f"{total[name]:20}" for name in COLUMNS))
    print(f"{time.monotonic() - start:.0f} s; broken promises: {len(result.broken)}")
    print(*result.broken[:50], sep="\n")
    return int(bool(result.broken))


if __name__ == "__main__":
    sys.exit(main())
