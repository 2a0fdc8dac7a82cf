"""How much memory a call takes on top of what was there, and whether a form that builds its maps would fit.

On a card the caching allocator keeps the count. On CPU the profiler reports each allocation and each release of
PyTorch's allocator, and the peak is that of their running sum: exact, and free of what an allocator hoards or a system
rounds. What it does not see is what libraries take for themselves, packed operands of matrix products above all: the
resident size of a fresh process grew by up to 21 MB more than this count (M = 1152, every form tried).
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import torch

GB = 10**9


def peak(run: Callable[[], object], device: str) -> int:
    """Most bytes that a call holds at a time, beyond what there was before."""
    with _no_collection():
        return _peak(run, device)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing that an earlier call left behind is released now: it would count as this call's."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _peak(run: Callable[[], object], device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it says at every call that it starts and stops
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return max(accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0))


def available() -> int:
    """Bytes that a process here may still take: of the machine, or of the container that it runs in."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = next(int(line.split()[1]) * 1024 for line in info.read_text().splitlines() if line.startswith("MemAvail"))
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit: "max"
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


class Guard:
    """Tells beforehand what would not fit, from what a form took at the size before.

    A form that builds maps grows with their entries, and none grows faster. On a card nothing is told beforehand:
    there a call that does not fit ends in an error, and not with the machine.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._taken: dict[object, tuple[int, int]] = {}

    def saw(self, form: object, entries: int, taken: int) -> None:
        """A form took so many bytes where its maps have so many entries."""
        self._taken[form] = entries, taken

    def refusal(self, form: object, entries: int) -> str | None:
        """Why a form should not run at a size, or None."""
        if self.device == "cuda" or form not in self._taken:
            return None
        smaller, taken = self._taken[form]
        needed, free = taken * entries / smaller, available()
        if needed < 0.8 * free:
            return None
        return f"needs about {needed / GB:.1f} GB, {free / GB:.1f} GB are free"
