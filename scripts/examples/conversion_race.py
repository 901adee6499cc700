#!/usr/bin/env python3
"""A race: one vCPU converts a page again and again, while the other writes to it and counts.

In any interleaving, a counter that is always private loses no step, and the converted page holds a
whole word: zero right after a conversion, or what the second vCPU wrote.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from threading import Thread

from kvmpriv import Kvm, private
from kvmpriv.guest import Puppet

PAGE = 4096
GPA, SIZE = 4 << 30, 2 << 20
WORD = 0x5A5A_5A5A_5A5A_5A5A
SKIP = 77  # the exit status by which test harnesses know a skipped test


def race(guest: Puppet, rounds: int) -> bool:
    converter, writer = guest.cpus
    done = False

    def convert() -> None:
        nonlocal done
        try:
            for turn in range(rounds):
                converter.convert(GPA, PAGE, private=bool(turn % 2))
        finally:
            done = True

    seen: Counter[int] = Counter()
    steps = 0
    thread = Thread(target=convert)
    thread.start()
    while not done:
        writer.store(GPA, 8, WORD)
        seen[writer.load(GPA, 8)] += 1
        steps += 1
        if writer.increment(GPA + PAGE, 10) != steps * 10:
            print("the private counter lost a step")
            break
    thread.join()
    print(f"{rounds} conversions beside {steps} writes; read back:")
    for value, times in seen.items():
        print(f"  {value:#018x} {times} times")
    print(f"exits: {converter.exit_count} of the converter, {writer.exit_count} of the writer")
    counted = guest.load(GPA + PAGE, 8) == steps * 10
    return counted and steps > 0 and set(seen) <= {0, WORD} and converter.exit_count == rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="conversions to make (200)")
    rounds = parser.parse_args().rounds
    try:
        with Kvm() as kvm:
            vm = private.create_vm(kvm)
    except OSError as error:
        print(error.strerror, file=sys.stderr)
        return SKIP
    with vm, Puppet(vm, cpus=2) as guest:
        vm.add_private_memory(GPA, SIZE)
        right = race(guest, rounds)
    print("nothing lost, nothing torn" if right else "UNEXPECTED RESULT")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
