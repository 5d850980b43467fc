#!/usr/bin/env python3
"""Rounds of random faults, then a look at memory: python3 tests/soak.py [--rounds 100] [--seed 2]

Each round is one of `tests/test_chaos.py`, with a seed of its own: real sockets, a virtual clock, 180 clients. It checks
that no answer is lost or mixed up and that nothing is left behind. Exits with 1 if memory grows from round to round.
"""

import argparse
import asyncio
import gc
import logging
import os
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import chatgpt_apiserver as app
from tests.conftest import VirtualLoop
from tests.test_chaos import Round

WARM_UP = 0.4  # of the rounds, before memory is measured for the first time
GROWTH_BYTES = 4_000_000  # above that memory is not flat


def memory_bytes() -> int:
    """Return the resident memory."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    """Read the command line, run the rounds, return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    app.log.setLevel(logging.CRITICAL)
    started, outcomes, problems, memory = time.monotonic(), Counter[str](), list[str](), 0
    for number in range(options.rounds):
        if number == int(options.rounds * WARM_UP):
            memory = memory_bytes()
        chaos = Round(options.seed + number)
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: problems.append(repr(context)))
            runner.run(chaos.run())
        outcomes += chaos.outcomes
        assert not problems, (chaos.seed, problems[:3])
    growth = memory_bytes() - memory
    print(f"{options.rounds} rounds in {time.monotonic() - started:.1f} s: {dict(outcomes)}")
    print(f"memory: {memory / 1e6:.1f} MB after {WARM_UP:.0%}, {growth / 1e6:+.1f} MB at the end")
    return int(growth > GROWTH_BYTES)


if __name__ == "__main__":
    sys.exit(main())
