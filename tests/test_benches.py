"""Benches that are run by hand must at least run, and count what they say they count."""

import dataclasses
import datetime
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lewm
from lewm.config import PRESETS, configure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benches import compare, cpu_plan


def rows_of(tmp_path, bench, *arguments):
    """The rows that `python -m benches.{bench} --quick` writes, and what it prints."""
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", f"benches.{bench}", "--quick", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()], done


@pytest.mark.skipif(sys.platform == "win32", reason="Windows runs no script by its first line")
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
    assert len(errors) == 3
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


KIND = "this processor, 1 thread"


def measured(folder, ratios, kind=KIND):
    """A file as pytest-benchmark writes it."""
    infos = {name: {"ratio": ratio, "kind": kind, "numpy": "2.4.6"} for name, ratio in ratios.items()}
    path = folder / "measured.json"
    path.write_text(json.dumps({"benchmarks": [{"fullname": n, "extra_info": i} for n, i in infos.items()]}))
    return path


def compared(folder, ratios, baseline, *, update=(), kind=KIND):
    """Exit status of `python -m benches.compare`; `baseline` is that of `KIND`, or the text of the file."""
    path = folder / "baseline.json"
    entry = {"date": "2026-11-23", "versions": {"numpy": "2.4.5"}, "ratios": baseline}
    path.write_text(baseline if isinstance(baseline, str) else json.dumps({KIND: entry}))
    return compare.main([str(measured(folder, ratios, kind)), "--baseline", str(path), *update])


def rows(capsys):
    """What the table says of each row."""
    return {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}


def test_a_ratio_may_fall_by_15_percent(tmp_path, capsys):
    assert compared(tmp_path, {"a": 8.6, "b": 3.0}, {"a": 10.0, "b": 2.0}) == 0
    assert rows(capsys)["a"] == ["10.00", "8.60", "-14%"]
    assert compared(tmp_path, {"a": 8.4, "b": 3.0}, {"a": 10.0, "b": 2.0}) == 1
    found = rows(capsys)
    assert found["a"] == ["10.00", "8.40", "-16%", "FELL"]
    assert found["b"] == ["2.00", "3.00", "+50%"]


def test_rows_that_are_missing_fail_and_new_ones_do_not(tmp_path, capsys):
    assert compared(tmp_path, {"a": 10.0, "b": 1.0}, {"a": 10.0}) == 0
    assert rows(capsys)["b"] == ["nan", "1.00", "new"]
    assert compared(tmp_path, {"a": 10.0}, {"a": 10.0, "b": 2.0}) == 1
    found = rows(capsys)
    assert found["b"] == ["2.00", "nan", "missing"]
    assert " ".join(found["other"]).endswith("numpy 2.4.5 -> 2.4.6")


def test_on_another_processor_nothing_is_compared(tmp_path, capsys):
    assert compared(tmp_path, {"a": 1.0}, {"a": 10.0}, kind="another, 1 thread") == 0
    out = capsys.readouterr().out
    assert "no baseline for another, 1 thread, nothing compared" in out
    assert KIND in out


@pytest.mark.parametrize("found", [9.0, 8.0])
def test_what_fell_is_measured_once_more(tmp_path, monkeypatch, capsys, found):
    asked = []
    monkeypatch.setattr(compare, "kind", lambda: KIND)
    monkeypatch.setattr(compare, "again", lambda names: asked.append(names) or dict.fromkeys(names, found))
    status = compared(tmp_path, {"a": 5.0, "b": 10.0}, {"a": 10.0, "b": 10.0})
    assert status == (0 if found == 9.0 else 1)
    assert asked == [["a"]]
    assert rows(capsys)["a"][1] == f"{found:.2f}"


@pytest.mark.parametrize(
    "baseline",
    ["", "{", "[]", '{"x": 1}', '{"x": {"date": "d", "versions": {}}}']
    + [f'{{"x": {{"date": "d", "versions": {{}}, "ratios": {{"a": {r}}}}}}}' for r in ("NaN", "-1.0", '"2"', "null")],
)
@pytest.mark.parametrize("update", [(), ("--update",)])
def test_a_damaged_baseline_is_one_clear_error(tmp_path, baseline, update):
    with pytest.raises(SystemExit, match=r"baseline\.json is damaged \(.*restore it"):
        compared(tmp_path, {"a": 1.0}, baseline, update=update)
    assert (tmp_path / "baseline.json").read_text() == baseline


@pytest.mark.parametrize(
    "text", ["", "{}", '{"benchmarks": [{"fullname": "a", "extra_info": {}}]}', '{"benchmarks": []}']
)
def test_a_measurement_that_is_none_is_one_clear_error(tmp_path, text):
    path = tmp_path / "measured.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"measured\.json"):
        compare.main([str(path)])
    with pytest.raises(SystemExit, match="run `make bench`"):
        compare.main([str(tmp_path / "none.json")])


def test_a_new_baseline_is_the_median_and_keeps_the_others(tmp_path):
    files = []
    for number, ratio in enumerate((1.0, 5.0, 2.0)):
        (folder := tmp_path / str(number)).mkdir()
        files.append(str(measured(folder, {"a": ratio}, kind="another")))
    path = tmp_path / "baseline.json"
    entry = {"date": "2026-11-23", "versions": {}, "ratios": {"a": 10.0}}
    path.write_text(json.dumps({KIND: entry}))
    assert compare.main([*files, "--baseline", str(path), "--update"]) == 0
    entries = json.loads(path.read_text())
    assert entries[KIND] == entry
    today = datetime.date.today().isoformat()
    assert entries["another"] == {"date": today, "versions": {"numpy": "2.4.6"}, "ratios": {"a": 2.0}}
    assert compare.main([files[1], "--baseline", str(path)]) == 0
    assert compare.main([files[0], "--baseline", str(path)]) == 1
    mixed = [files[0], str(measured(tmp_path, {"a": 1.0}))]
    with pytest.raises(SystemExit, match="one kind of processor"):
        compare.main([*mixed, "--baseline", str(path)])


def test_a_bench_goes_all_the_way(tmp_path):
    """One file of the set, as `make bench` and `make bench-compare` run it."""
    pytest.importorskip("torch")
    pytest.importorskip("pytest_benchmark")
    out, baseline = tmp_path / "cpu.json", tmp_path / "baseline.json"
    command = [sys.executable, "-m", "pytest", "benches/bench_cem.py", "-m", "not peer", f"--benchmark-json={out}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    baseline.write_text("{}")
    options = [str(out), "--baseline", str(baseline)]
    assert compare.main(options) == 0
    assert compare.main([*options, "--update"]) == 0
    entry = json.loads(baseline.read_text())[compare.kind()]
    (name,) = entry["ratios"]
    assert name.startswith("benches/bench_cem.py::test_")
    assert entry["versions"]["torch"]
    assert compare.main(options) == 0
    entry["ratios"][name] *= 100  # as if it had been much faster: it is measured once more and fails
    baseline.write_text(json.dumps({compare.kind(): entry}))
    assert compare.main(options) == 1


def test_the_committed_baseline_is_of_the_rows_there_are():
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "benches", "-m", "not peer", "--collect-only"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    ).stdout.splitlines()  # fmt: skip
    entries = compare.committed(compare.BASELINE)
    assert entries
    for kind, entry in entries.items():
        functions = {name.split("[")[0] for name in entry["ratios"]}
        assert functions <= {line.split("[")[0] for line in collected}, kind
