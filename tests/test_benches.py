"""Benches that are run by hand must at least run, and count what they say they count."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lewm
from lewm.config import PRESETS, configure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benches import cpu_plan


def rows_of(tmp_path, bench, *arguments):
    """The rows that `python -m benches.{bench} --quick` writes, and what it prints."""
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", f"benches.{bench}", "--quick", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()], done


def test_the_cpu_bench_runs_without_the_peer(tmp_path):
    python = tmp_path / "python"  # one that runs the peer's script without stable-worldmodel, whatever this one has
    python.write_text(
        f"#!{sys.executable}\nimport runpy, sys\nsys.modules['stable_worldmodel'] = None\ndel sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    python.chmod(0o755)
    rows, done = rows_of(tmp_path, "cpu_plan", "--peer", str(python), "--tiny", str(tmp_path / "none"))
    assert "pip install stable-worldmodel" in done.stderr
    plans = [row for row in rows if row["name"].startswith("plan ")]
    kinds = {(row["name"].split()[1], row["precision"], row["environments"]) for row in plans}
    assert kinds == {(p, q, e) for p in ("paper", "tiny") for q in cpu_plan.precisions() for e in (1, 2)}
    for row in plans:
        assert row["threads"] == 2
        assert row["device"]
        assert row["share_of_peak"] > 0  # and below 1 where nothing else runs, which a test cannot ask for
        assert row["share_of_peak"] == pytest.approx(row["tflop_per_s"] / row["peak_tflop_per_s"], rel=1e-3)
        assert 0 < row["loop_share_at_most"] < 1
        assert f"{row['seconds_per_plan']:.4g}" in done.stdout
    agreements = [row for row in rows if row["name"].startswith("agreement ")]
    assert len(agreements) == 2 * (len(cpu_plan.precisions()) - 1)
    assert all(row["weights"] == "rule" and row["spearman"] > 0.9 for row in agreements)


def test_the_work_of_a_plan_is_counted_as_published():
    paper, _ = configure("paper", 2, {})
    assert cpu_plan.plan_flop(paper, lewm.CEM()) == pytest.approx(1.659e12, rel=1e-3)
    # By hand, of one candidate: a window of one token has no earlier ones to look at.
    tiny, _ = configure("tiny", 2, {})
    planner = lewm.CEM(**PRESETS["tiny"].planner)
    macs = 5 * (2 * (4 * 96 * 128 + 2 * 96 * 384 + 6 * 96 * 96 + 2 * 128) + 2 * 32 * 256)
    macs += 5 * (2 * 32 * 96 + 96 * 32 + 10 * 10 + 10 * 128 + 128 * 32)
    more = dataclasses.replace(planner, samples=101)
    per_candidate = (cpu_plan.plan_flop(tiny, more) - cpu_plan.plan_flop(tiny, planner)) / planner.iterations
    assert per_candidate == pytest.approx(2 * macs)


def test_the_gpu_bench_runs_on_a_cpu_when_asked_for_a_check(tmp_path):
    pytest.importorskip("torch")
    rows, _ = rows_of(tmp_path, "gpu")
    assert {row["name"].split(",")[0].split(" ")[0] for row in rows} == {
        "elites", "agreement", "sigreg", "plan", "training",
    }  # fmt: skip
    assert all(row["torch"] for row in rows)
    assert all(row["p50_ms"] > 0 for row in rows if row["name"].startswith(("sigreg", "plan")))
    assert {(row["backend"], row.get("loop")) for row in rows if row["name"].startswith("plan")} == {
        ("torch", None), ("cuda", "device"), ("cuda", "host"),
    }  # fmt: skip
    assert [row["moved"] for row in rows if row["name"] == "elites float32"] == [0]
    assert all(row["spearman"] > 0.9 for row in rows if row["name"].startswith("agreement"))
    errors = [row["gradient_error"] for row in rows if "gradient_error" in row]
    assert len(errors) == 2
    assert max(errors) < 1e-5
    (training,) = (row for row in rows if row["name"].startswith("training"))
    assert training["mfu"] > 0
    assert training["parts"]["encoder backward"] > 0


def test_committed_rows_say_where_they_were_measured():
    files = list((ROOT / "benches" / "results").glob("*.jsonl"))
    assert files
    for path in files:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert row["device"], path
            assert row["date"], path
            assert row.get("torch") or row["lewm"], path  # a row without torch ran nothing of it
