"""What every bench shares: a ratio against a reference that ran in the same process, and where it ran."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import lewm
from lewm._core import Engine

# Of ours and of the reference's. With more than one the machine must do nothing else.
THREADS = int(os.environ.get("BENCH_THREADS", "1"))
SETTLE = 0.0 if THREADS == 1 else 0.02  # seconds before ours: torch's other threads spin for 10 ms after their work


def precisions() -> list[str]:
    """Those that the CPU engine has on this processor."""
    return [name for name in ("float32", "bfloat16", "int8") if Engine.instruction_sets(name)]


def cpu() -> str:
    """The processor's own name, and how many of its cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor()}, {cores} cores"


def processor() -> str:
    """The kind of processor."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().split("\n\n")[0].splitlines())
        facts = {key.strip(): value.strip() for key, _, value in lines}
        name = facts.get("model name", name)
        if "cpu family" in facts:  # virtual machines call several generations "AMD EPYC"
            name += f" family {facts['cpu family']}"
        flags = facts.get("flags", "").split()
        name += "".join(f" +{flag}" for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    return name


def kind() -> str:
    """What a ratio depends on beside the code: it holds for no other processor and no other number of threads."""
    return f"{processor()}, {THREADS} {'thread' if THREADS == 1 else 'threads'}"


def compare(
    benchmark: Any,
    ours: Callable[..., Any],
    reference: Callable[[], Any],
    *,
    prepare: Callable[[], Any] | None = None,
    work: float = 1.0,
    seconds: float = 2.0,
    **circumstances: Any,
) -> float:
    """Measures both in turn, so that a drifting machine drifts for both; records the ratio of the least of either.

    Whatever else goes on only adds, so the least is steadier than a median. With one thread what counts is the seconds
    of work of this process (all its threads, the system's on its behalf included), which other programs hardly change;
    with more it is the time by the clock.

    Args:
        benchmark: pytest-benchmark's fixture, which times a few rounds of `ours` by the clock for its own table.
        ours, reference: The two ways to the same result.
        prepare: Called before each round of `ours`, which is then given what it returns.
        work: How many times the work of one call of the reference one call of `ours` does.
        seconds: How long to go on, but for at least 9 pairs.
        **circumstances: Kept in the row.

    Returns:
        How many times as fast as the reference.
    """
    clock = time.process_time if THREADS == 1 else time.perf_counter

    def measured(run: Callable[..., Any], *arguments: Any) -> float:
        start = clock()
        run(*arguments)
        return clock() - start

    def prepared() -> tuple[Any, ...]:
        return (prepare(),) if prepare else ()

    def pair() -> tuple[float, float]:
        theirs, settled = work * measured(reference), time.perf_counter() + SETTLE
        while time.perf_counter() < settled:
            pass
        return theirs, measured(ours, *prepared())

    pair()
    pairs, start = [], time.perf_counter()
    while len(pairs) < 9 or time.perf_counter() - start < seconds:
        pairs.append(pair())
    benchmark.pedantic(ours, setup=lambda: (prepared(), {}), rounds=5)
    theirs, mine = (min(each) for each in zip(*pairs, strict=True))
    ratio = theirs / mine
    benchmark.extra_info.update(
        ratio=round(ratio, 3),
        reference_ms=round(1e3 * theirs, 3),
        ours_ms=round(1e3 * mine, 3),
        pairs=len(pairs),
        kind=kind(),
        lewm=lewm.__version__,
        numpy=np.__version__,
        python=platform.python_version(),
        **circumstances,
    )
    return ratio
