"""Paired comparison against published numbers, and RESULTS.md, which a script writes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lewm
from fake_models import BlindModel, RoomModel
from lewm.evaluation import Moved, Result, Training, evaluate, wilson
from lewm.results import mcnemar, paired_interval, table

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results():
    return evaluate(RoomModel(), pairs=40), evaluate(BlindModel(), pairs=40, seed=1)


# ---------------------------------------------------------------------------------------------------------- comparison


def test_the_interval_against_published_values():
    # M. W. Fagerland, S. Lydersen, P. Laake, "Statistical analysis of contingency tables" (2017), chapter 8: the
    # responses before and after consolidation therapy of Cavo et al. (2012), Newcombe square-and-add, to 4 digits.
    assert paired_interval(59, 6, 16, 80) == pytest.approx((-0.1186, -0.0046), abs=5e-5)


def test_the_interval_is_that_of_independent_rates_where_nothing_correlates():
    # phi = 0, here because no pair was solved by b: sides of a right angle, by hand.
    (_, high_b), (low_a, high_a) = wilson(0, 20), wilson(8, 20)
    low, high = paired_interval(0, 8, 0, 12)
    assert low == pytest.approx(0.4 - math.hypot(0.4 - low_a, high_b))
    assert high == pytest.approx(0.4 + (high_a - 0.4))


@given(st.lists(st.integers(0, 300), min_size=4, max_size=4).filter(any))
def test_the_interval_holds_the_difference_and_mirrors(counts):
    both, only_a, only_b, neither = counts
    low, high = paired_interval(*counts)
    difference = (only_a - only_b) / sum(counts)
    assert -1 <= low <= difference + 1e-12
    assert difference - 1e-12 <= high <= 1
    # With a and b exchanged, and with failures counted instead, it is the other way round.
    for mirrored in (paired_interval(both, only_b, only_a, neither), paired_interval(neither, only_b, only_a, both)):
        assert mirrored == pytest.approx((-high, -low), abs=1e-12)


def test_mcnemar_is_the_exact_binomial_tail():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)
    for n in (1, 2, 9, 40, 301):
        for k in range(n + 1):
            tail = sum(math.comb(n, i) for i in range(min(k, n - k) + 1)) / 2**n
            assert mcnemar(k, n - k) == pytest.approx(min(1, 2 * tail))
    assert mcnemar(0, 100_000) == 0


def test_results_are_compared_pair_by_pair(results, tmp_path):
    a, b = results
    found = lewm.compare(a, b)
    assert found.n == 40 == found.both + found.only_a + found.only_b + found.neither
    assert found.only_a == sum(x and not y for x, y in zip(a.success, b.success, strict=True))
    assert found.neither == sum(not (x or y) for x, y in zip(a.success, b.success, strict=True))
    assert found.difference == pytest.approx((found.only_a - found.only_b) / 40)
    assert found.interval == paired_interval(found.both, found.only_a, found.only_b, found.neither)
    assert found.p_value == mcnemar(found.only_a, found.only_b) < 1e-4
    assert f"a - b: {100 * found.difference:+.1f} points [" in str(found)
    assert f"only a {found.only_a}, only b {found.only_b}" in str(found)
    for name, result in (("a.json", a), ("b.json", b)):
        result.save(tmp_path / name)
    assert lewm.compare(tmp_path / "a.json", str(tmp_path / "b.json")) == found


def test_how_many_pairs_a_protocol_has_by_default_does_not_matter(results):
    a, b = results
    assert lewm.compare(a, replace(b, protocol=replace(b.protocol, pairs=7))) == lewm.compare(a, b)


def test_results_on_other_pairs_are_refused(results):
    a, b = results
    fewer = evaluate(RoomModel(), pairs=39)
    for other, text in (
        (fewer, r"n \(40 and 39\)$"),
        (
            replace(b, protocol=replace(b.protocol, name="x", budget=60)),
            r"protocol \('two-room-25-50' and 'x'\), budget \(50",
        ),
        (replace(b, data="abc"), r"data \(None and abc\)$"),
        (replace(b, pairs=[*b.pairs[:-1], (99, 3)]), r"pairs \(pair 39 is \(\d+, \d+\) and \(99, 3\)\)$"),
    ):
        with pytest.raises(ValueError, match=r"same pairs of one protocol, but differ in " + text):
            lewm.compare(a, other)


# ----------------------------------------------------------------------------------------------------------- RESULTS.md


def test_the_committed_table_is_what_the_script_writes():
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == table(ROOT / "results")


def tables(text):
    """Both tables' rows as dicts."""
    found = []
    for part in text.split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        names, rule, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
        assert set(rule) == {"---"}
        found.append([dict(zip(names, row, strict=True)) for row in rows])
    return found


def trained(result, seed=0, solved=None, cost="latent", **changed):
    """A result as of a training with that seed, with so many of the pairs solved."""
    fields = {"preset": "tiny", "changes": {}, "steps": 800, "seconds": 67.4, "device": "cpu", "parts": {}}
    if solved is not None:
        interval, success = wilson(solved, result.n), [i < solved for i in range(result.n)]
        result = replace(result, success_rate=solved / result.n, interval=interval, success=success)
    planner = {**result.planner, "cost": cost}
    return replace(result, planner=planner, training=Training(**{**fields, "seed": seed, **changed}))


def test_a_row_has_what_made_the_number(results, tmp_path):
    a, b = results
    a = trained(a, 3, changes={"steps": 800, "init": "scaled"}, episodes=3000, policy="expert")
    a = replace(a, moved=Moved(12, 0.25, wilson(3, 12), 0.0), plan_ms={"p50": 5.1234, "p95": 9.0})
    far = replace(b, protocol=replace(b.protocol, name="two-room-100-150", env_kwargs={"x": "y"}), data="d" * 64)
    for name, result in (("1.json", far), ("2.json", a), ("notes.txt", b)):
        result.save(tmp_path / name)
    summary, (first, second) = tables(table(tmp_path))
    low, high = a.interval
    both = {
        "task": "two-room-25-50",
        "method": 'tiny, two terms, latent cost, steps=800, init="scaled"',
        "solved": f"**{a.success_rate:.1%}** [{low:.1%}, {high:.1%}]",
        "n": "40",
        "random": f"{a.random_floor:.1%}; {a.solved_at_start} at the start",
        "moved": "25.0% [8.9%, 53.2%] of 12; random 0.0%",
        "training": "800 steps, 67 s, cpu; 3,000 episodes of expert",
        "plan": f"5.12 ms: CEM 64 x 8, 5 of 5 blocks executed; fake exact {a.versions['cpu']}",
    }
    more = {"method": both["method"] + ", seed 3", "model": "f" * 12, "command": f"`{a.command}`"}
    assert first == {**both, **more}
    assert summary[0] == {**both, "seeds": "3"}
    assert second["task"] == summary[1]["task"] == f'two-room-100-150, x="y", pairs from {"d" * 12}'
    assert (second["method"], second["training"], second["moved"]) == ("unknown", "", "")


def test_training_seeds_make_one_line(results, tmp_path):
    moved = [Moved(10, k / 10, wilson(k, 10), 0.1) for k in (2, 5, 3)]
    for seed, solved, seconds in ((2, 30, 70.0), (0, 36, 60.2), (1, 39, 65.0)):
        result = trained(results[0], seed, solved, seconds=seconds)
        replace(result, moved=moved[seed], plan_ms={"p50": 4.0 + seed, "p95": 9.0}).save(tmp_path / f"{seed}.json")
    (line,), rows = tables(table(tmp_path))
    assert [row["method"][-6:] for row in rows] == ["seed 0", "seed 1", "seed 2"]
    low, high = wilson(35, 40)  # the mean of 30, 36 and 39, of the pairs that all three met
    assert line["solved"] == f"**87.5%** [{low:.1%}, {high:.1%}]"
    assert line["seeds"] == "0, 1, 2: 75.0% to 97.5%"
    assert line["n"] == "3 x 40 = 120"
    low, high = wilson(10 / 3, 10)
    assert line["moved"] == f"33.3% [{low:.1%}, {high:.1%}] of 10; random 10.0%"
    assert line["training"] == "800 steps, 60 to 70 s, cpu"
    assert line["plan"].startswith("4 to 6 ms: CEM")


@pytest.mark.parametrize(
    "other",
    [
        lambda r: replace(r, protocol=replace(r.protocol, seed=1)),
        lambda r: replace(r, protocol=replace(r.protocol, env_kwargs={"look": "official"})),
        lambda r: replace(r, pairs=[(0, 1), *r.pairs[1:]]),
        lambda r: replace(r, execute=2),
        lambda r: replace(r, precision="int8"),
        lambda r: replace(r, planner={**r.planner, "samples": 65}),
        lambda r: trained(r, 1, cost="distance"),
        lambda r: trained(r, 1, parts={"inverse_dynamics": 0.1}),
        lambda r: trained(r, 1, changes={"history": 2}),
        lambda r: trained(r, 1, preset="small"),
        lambda r: trained(r, 1, episodes=300),
        lambda r: replace(r, training=None),
    ],
)
def test_what_differs_in_more_than_the_seed_is_another_line(results, tmp_path, other):
    result = trained(results[0], 1)
    trained(results[0], 0).save(tmp_path / "0.json")
    result.save(tmp_path / "1.json")
    assert len(tables(table(tmp_path))[0]) == 1
    other(result).save(tmp_path / "1.json")
    assert len(tables(table(tmp_path))[0]) == 2


def test_methods_are_told_apart(results, tmp_path):
    """By the file alone; one of an older release has the parts among the changes."""
    heads = {"distance_head": True, "action_prior": True}
    terms = {"inverse_dynamics": 0.1, "reconstruction": 0.5}
    methods = {
        "tiny, two terms, latent cost": trained(results[0]),
        "tiny, two terms + inverse dynamics 0.1 + reconstruction 0.5, latent cost, sigreg_weight=0.1": trained(
            results[0], changes={**terms, "sigreg_weight": 0.1}, parts=terms
        ),
        "tiny, two terms, distance cost, action prior": trained(
            results[0], cost="distance", changes=heads, parts=heads
        ),
        "tiny, two terms, latent cost, action prior": trained(results[0], changes=heads, parts=None),
        "tiny, two terms, latent cost, action prefix, history=1": trained(
            results[0], changes={"history": 1, "action_prefix": True}, parts={"action_prefix": True}
        ),
        "tiny, two terms + reconstruction 0.5": trained(results[0], parts={"reconstruction": 0.5}, cost=None),
    }
    for i, result in enumerate(methods.values()):
        result.save(tmp_path / f"{i}.json")
        assert Result.load(tmp_path / f"{i}.json") == result
    summary, rows = tables(table(tmp_path))
    assert {row["method"] for row in summary} == set(methods)
    assert {row["method"] for row in rows} == {f"{method}, seed 0" for method in methods}


def test_a_result_of_an_older_release_is_read(results, tmp_path):
    written = trained(results[0], parts=None).to_dict()
    for name in ("parts", "episodes", "policy"):
        del written["training"][name]
    (tmp_path / "old.json").write_text(json.dumps(written))
    assert Result.load(tmp_path / "old.json") == trained(results[0], parts=None)


def test_an_empty_folder_has_no_table(tmp_path):
    assert table(tmp_path).endswith("\n\nNo results yet.\n")
    with pytest.raises(NotADirectoryError, match="results must be a folder of result JSONs"):
        table(tmp_path / "none")


def test_text_from_elsewhere_stays_in_its_cell(results, tmp_path):
    bad = "a | b\n| c <script> \ud800 `d`"
    replace(results[0], command=bad, model_hash=bad, versions={"cpu": bad}).save(tmp_path / "1.json")
    text = table(tmp_path)
    (line,), (row,) = tables(text)
    assert row["command"] == "`a \\| b \\| c &lt;script> ? d`"
    assert line["plan"].endswith("a \\| b \\| c &lt;script> ? `d`")
    assert "<script" not in text
    text.encode()


def test_a_damaged_result_is_named(results, tmp_path):
    results[1].save(tmp_path / "1.json")
    written = json.loads((tmp_path / "1.json").read_text())
    (tmp_path / "2.json").write_text(json.dumps({**written, "success": [True] * 40, "success_rate": 1.0}))
    with pytest.raises(ValueError, match=r"2\.json is no result of lewm evaluate \(success_rate and its interval"):
        table(tmp_path)
    assert Result.load(tmp_path / "1.json") == results[1]
