"""How much memory this process may still take, so that what cannot fit is refused before it is tried."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT = 2**60  # what cgroup v1 says where there is none is about 2**63


def check_fits(needed: int, what: str, instead: str) -> None:
    """Refuses what needs more than there is.

    Args:
        needed: Bytes.
        what: What needs them, as the beginning of a sentence.
        instead: What to do about it.

    Raises:
        MemoryError: It does not fit.
    """
    free = available()
    if free is not None and needed > free:
        raise MemoryError(
            f"{what} needs {needed / 2**30:.2f} GiB of memory, and {free / 2**30:.2f} are free; {instead}"
        )


def available(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still have: of the machine, and of every control group that it is in.

    Where the system does not say, all of the machine's memory; None where it does not say that either.

    Args:
        root: Where `proc` and `sys` are.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        free = []
    if not free:
        try:
            free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
        except (AttributeError, OSError, ValueError):
            return None
    return max(0, min([*free, *_groups(root)]))


def _groups(root: Path) -> Iterator[int]:
    """What is left of each limit: of the process's control groups and those above them, version 2 and 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version1 = bool(controllers)
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version1 else ("memory.max", "memory.current")
        top = root / "sys/fs/cgroup" / ("memory" if version1 else "")
        here = top / group.lstrip("/")
        # In a container its own group is often mounted at the top, and the path is that outside.
        for folder in {here, *here.parents, top}:
            if top != folder and top not in folder.parents:
                continue
            try:
                limit, used = ((folder / name).read_text().strip() for name in names)
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if limit != "max" and int(limit) < _NO_LIMIT:
                # Cached file pages count as used, but are given up when memory is asked for.
                cached = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
                yield int(limit) - int(used) + int(cached)
