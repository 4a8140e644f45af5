"""What every bench shares: a ratio against a reference that ran in the same process, and where it ran."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lewm._core import Engine


def precisions() -> list[str]:
    """Those that the CPU engine has on this processor."""
    return [name for name in ("float32", "bfloat16", "int8") if Engine.instruction_sets(name)]


def cpu() -> str:
    """The processor's own name, and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        flags = info.read_text()
        name = (found or [name])[0]
        name += "".join(f" +{flag}" for flag in ("avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def compare(
    benchmark: Any, ours: Callable[[], Any], reference: Callable[[], Any], rounds: int = 7, **circumstances: Any
) -> float:
    """Times both in turn, so that a drifting machine drifts for both; records the median of the pairwise ratios.

    Args:
        benchmark: pytest-benchmark's fixture; it times `ours`.
        ours, reference: The two ways to the same result.
        rounds: Pairs timed, after one warm-up of each.
        **circumstances: Kept in the row.

    Returns:
        How many times as fast as the reference.
    """
    reference()
    ours()
    times = []
    for _ in range(rounds):
        pair = []
        for run in (ours, reference):
            start = time.perf_counter()
            run()
            pair.append(time.perf_counter() - start)
        times.append(pair)
    benchmark.pedantic(ours, rounds=rounds, warmup_rounds=1)
    ratio = statistics.median(theirs / mine for mine, theirs in times)
    benchmark.extra_info.update(
        ratio=round(ratio, 3),
        reference_ms=round(1e3 * statistics.median(theirs for _, theirs in times), 3),
        ours_ms=round(1e3 * statistics.median(mine for mine, _ in times), 3),
        cpu=cpu(),
        numpy=np.__version__,
        python=platform.python_version(),
        **circumstances,
    )
    return ratio
