"""The effect of how long an idle OpenMP thread waits before it sleeps: pairs/s of a training step, by spin count.

python -m benchmarks.threads

Not in ``make bench``, since it compares clasp with itself. Low rank in both towers, batch 32, in the precision of the
machine, in a process alone and in two processes at once; four minutes. The choice is ``_SPIN_COUNT`` of
``clasp.commands.environment``; "default" is the runtime's own, which a Python program without it has.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

PROGRAM = """
import statistics, time
from benchmarks import bfloat16
step = bfloat16.our_step("lora", 32)
step(), step()
taken, ends = [], time.perf_counter() + 5
while time.perf_counter() < ends:
    began = time.perf_counter()
    step()
    taken.append(time.perf_counter() - began)
print(round(32 / statistics.median(taken), 1))
"""
SPIN_COUNTS = {"default": {}} | {f"{count:,}": {"GOMP_SPINCOUNT": str(count)} for count in (0, 1000, 3000, 10_000)}


def pairs_per_second(settings: dict[str, str], processes: int) -> list[str]:
    """The rate of each of some processes that run at once; each has a folder of its own for its sample pairs."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number in range(processes):
            own = os.path.join(folder, str(number))
            os.mkdir(own)
            environment = {**os.environ, **settings, "TMPDIR": own}
            running.append(
                subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True)
            )
        rates = [process.communicate()[0].strip() for process in running]
        assert not any(process.returncode for process in running), "a process failed; its error is above"
        return rates


def main() -> None:
    """Every spin count: alone, in turns, then two at once."""
    for processes in (1, 1, 1, 2):
        for name, settings in SPIN_COUNTS.items():
            rates = " and ".join(pairs_per_second(settings, processes))
            print(f"{processes} at once, spin count {name}: {rates} pairs/s", flush=True)


if __name__ == "__main__":
    main()
