"""OpenMP's helper threads, which belong to the thread that called for them."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

LIBRARY = re.compile(r"/\S*/lib(?:g|i)?omp[^/\s]*\.so\S*")
SOFT = 1  # of OpenMP 5: settings stay


def release(maps: Path = Path("/proc/self/maps")) -> None:
    """Let go of the calling thread's helpers; its next parallel loop starts new ones.

    Every Python thread that runs parallel loops has helpers of its own. Where all threads together are more than the
    cores, libgomp sends those that wait to sleep at once, and each loop has to wake them: a model's passes took 50 ms
    in place of 33, because the thread that had loaded the model kept its helpers. So a thread does this before another
    one begins to decode. It does nothing where there is no ``/proc``, or no library of OpenMP 5.
    """
    if not maps.exists():
        return
    for path in set(LIBRARY.findall(maps.read_text())):
        pause = getattr(ctypes.CDLL(path), "omp_pause_resource_all", None)
        if pause is not None:
            pause(SOFT)
