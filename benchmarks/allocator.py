"""The effect of ``clasp.configure_environment`` and batch size: CPU time per image of EfficientNet-Lite0, in two
processes.

python -m benchmarks.allocator

Not in ``make bench``, since it compares clasp with itself. Prints milliseconds of CPU time per image at 192 px, and how
many of them are spent in the kernel, for batches of 8, 16 and 32.
"""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource, sys
if sys.argv[1] == "settled":
    import clasp
    clasp.configure_environment()
import torch
from clasp.models.zoo.pip_packages import load_pip_backbone
from clasp.models.tower import Tower
from clasp.types import Pixels
tower = Tower(load_pip_backbone("efficientnet-lite0", size=192))
def spent():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_stime
with torch.inference_mode():
    for batch in (8, 16, 32):
        pixels = Pixels(torch.randn(batch, 3, 192, 192))
        tower.pooled(pixels)
        before = spent()
        for _ in range(128 // batch):
            tower.pooled(pixels)
        whole, kernel = (1e3 * (b - a) / 128 for a, b in zip(before, spent()))
        print(f"{sys.argv[1]:8} batch {batch:2}: {whole:.1f} ms an image, {kernel:.1f} in the kernel", flush=True)
"""


def main() -> None:
    """Each mode twice, alternating."""
    for mode in ("plain", "settled") * 2:
        subprocess.run([sys.executable, "-c", PROGRAM, mode], check=True)


if __name__ == "__main__":
    main()
