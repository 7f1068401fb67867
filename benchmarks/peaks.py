"""The peak of memory of a piece of work, beyond what was in use before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int | None]]:
    """The most memory inside, beyond what was in use before, in bytes: of tensors on a CUDA device, else of the process; None
    where the system does not tell.
    """
    found: list[int | None] = [None]
    if cuda := device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else _mark()
    try:
        yield found
    finally:
        after = torch.cuda.max_memory_allocated(device) if cuda else _high_water()
        if before is not None and after is not None:
            found[0] = max(0, after - before)


def _mark() -> int | None:
    """Lower Linux's high-water mark of this process to what is resident now, and say how much that is."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as marks:
            marks.write("5")
    except OSError:
        return None
    return _high_water()


def _high_water() -> int | None:
    try:
        with open("/proc/self/status", encoding="utf-8", errors="replace") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), None)
    except OSError:
        return None
