"""The bench that nobody can run here but whoever has a GPU: on a CPU it must at least run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parent.parent


def test_the_gpu_bench_runs_on_a_cpu_when_asked_for_a_check(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benches.gpu", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["name"].split(",")[0].split(" ")[0] for row in rows} == {"sigreg", "plan", "training"}
    assert all(row["p50_ms"] > 0 and row["torch"] for row in rows)
    errors = [row["gradient_error"] for row in rows if "gradient_error" in row]
    assert len(errors) == 2
    assert max(errors) < 1e-5


def test_committed_rows_say_where_they_were_measured():
    files = list((ROOT / "benches" / "results").glob("*.jsonl"))
    assert files
    for path in files:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert row["device"], path
            assert row["date"], path
            assert row["torch"], path
