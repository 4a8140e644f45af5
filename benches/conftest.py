"""The ratio of every bench, printed after pytest-benchmark's table of times."""


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    for bench in session.benchmarks if session else []:
        info = bench.extra_info
        terminalreporter.write_line(
            f"{bench.name}: {info['ratio']:.2f}x the reference ({info['ours_ms']} ms against {info['reference_ms']} ms)"
        )
