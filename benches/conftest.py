"""The ratio of every bench, printed after pytest-benchmark's table of times."""

import os
import sys
from pathlib import Path

# Read when torch and the Rust core start their threads, so before either is imported.
THREADS = os.environ.setdefault("BENCH_THREADS", "1")
os.environ.update(OMP_NUM_THREADS=THREADS, LEWM_NUM_THREADS=THREADS)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `benches.cpu_plan`


def pytest_configure(config):
    config.addinivalue_line("markers", "peer: needs packages that no extra brings; not a row of `make bench`")


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    for bench in session.benchmarks if session else []:
        info = bench.extra_info
        terminalreporter.write_line(
            f"{bench.name}: {info['ratio']:.2f}x the reference ({info['ours_ms']} ms against {info['reference_ms']} ms)"
        )
