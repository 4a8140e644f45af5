"""The table of systems: what each is, that a row is measured or says why not, that what is there is kept."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from typer.testing import CliRunner

import lewm
from lewm import cli, systems
from lewm.config import TERMS, configure
from lewm.evaluation import Result, wilson
from lewm.recipes import RECIPES, Trial
from lewm.systems import SYSTEMS, SystemRow, SystemsTable

ROOT = Path(__file__).parent.parent
OURS = [name for name, system in SYSTEMS.items() if system.overrides is not None]
SMALL = {"encoder_dim": 16, "encoder_depth": 1, "encoder_mlp": 32, "predictor_dim": 16, "predictor_depth": 1,
         "predictor_mlp": 32, "projector_hidden": 32, "embed_dim": 8, "image_size": 16, "batch_size": 8}  # fmt: skip


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The recipe of TwoRoom for a CPU, cut short, in a folder of its own; its data."""
    folder = tmp_path_factory.mktemp("systems")
    own = RECIPES["two-room"]["tiny"]
    trial = Trial("two-room-25-50", lewm.CEM(samples=8, iterations=1, elites=2), execute=5)
    overrides = {**own.overrides, **SMALL, "steps": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(systems, "_TIMED", 2)
        patch.setitem(RECIPES["two-room"], "tiny", replace(own, episodes=12, overrides=overrides, trials=(trial,)))
        yield RECIPES["two-room"]["tiny"].collect("data.lewm")


@pytest.fixture(scope="module")
def bench(short):
    """Measures some systems, as little as will do."""

    def bench(out, *names, **settings):
        settings = {"size": "tiny", "device": "cpu", "data": short, "pairs": 3, **settings}
        return lewm.bench_systems("two-room", systems=names or None, out=out, **settings)

    return bench


@pytest.fixture(scope="module")
def table(bench):
    return bench("all", *OURS, "dino-wm", "td-mpc2", "dreamerv3")


# ---------------------------------------------------------------------------------------------------- what they are


def test_each_system_is_lewm_but_for_what_it_says():
    base = configure("tiny", 2, {})
    want = {
        "lewm": {},
        "pldm": {"sigreg_weight": 0.0, "variance": 18.0, "covariance": 12.0, "time_similarity": 0.2,
                 "time_variance": 0.7},
        "pldm-vicreg": {"sigreg_weight": 0.0, "variance": 1.0, "covariance": 0.04, "time_similarity": 0.2},
        "no-regulariser": {"sigreg_weight": 0.0},
        "stop-gradient": {"target": "stop_gradient"},
        "ema": {"target": "ema"},
    }  # fmt: skip
    assert list(want) == OURS
    for name, changes in want.items():
        model, config = configure("tiny", 2, dict(SYSTEMS[name].overrides))
        assert model == base[0]
        assert {k: v for k, v in asdict(config).items() if v != asdict(base[1])[k]} == changes


def test_the_loss_terms_are_the_articles():
    """Two and one to tune; PLDM seven and six."""
    counts = {name: (len(system.terms), len(systems._tuned(system))) for name, system in SYSTEMS.items()}
    assert counts["lewm"] == (2, 1)
    assert counts["pldm"] == (7, 6)
    assert counts["pldm-vicreg"] == (7, 6)
    assert counts["no-regulariser"] == (1, 0)
    assert counts["stop-gradient"] == (2, 1)
    assert counts["ema"] == (2, 2)
    # Every weight of ours is a setting of training, and PLDM has all terms but the decoder's.
    _, config = configure("tiny", 2, {})
    assert all(hasattr(config, name) for own in OURS for name in systems._tuned(SYSTEMS[own]))
    assert set(systems._tuned(SYSTEMS["pldm"])) == set(TERMS) - {"reconstruction"}
    assert all(system.name == name and set(system.article) <= set(RECIPES) for name, system in SYSTEMS.items())


# -------------------------------------------------------------------------------------------------------- measuring


def test_every_row_is_measured_or_says_why_not(table):
    rows = {row.system: row for row in table.rows}
    assert list(rows) == [*OURS, "dino-wm", "td-mpc2", "dreamerv3"]
    for name in OURS:
        row, model = rows[name], lewm.load(f"all/{name}")
        assert (row.tokens, row.n, row.steps, row.width, row.missing) == (1, 3, 3, 8, None)
        assert row.plan_ms > 0
        assert row.plan_torch_ms > 0
        assert row.runs_on == f"{model.backend} {model.precision}"
        assert -1 <= row.straightness <= 1
        assert 1 <= row.effective_rank <= 8
        assert list(row.probe_r) == ["agent"]
        assert -1 <= row.probe_r["agent"] <= 1
        # As torch counts them.
        network = lewm.load(f"all/{name}", backend="torch").network
        assert row.parameters == sum(p.numel() for p in network.parameters())
        # Rows are the files beside them; heads of the recipe are left out.
        result = Result.load(f"all/{name}/two-room-25-50.json")
        assert (row.success_rate, row.random_floor) == (result.success_rate, result.random_floor)
        assert (result.model_hash, result.planner["samples"], result.planner["cost"]) == (model.hash(), 8, "latent")
        assert not model.config.distance_head
        assert not model.config.action_prior
        training = model.meta["training"]["config"]
        assert row.weights == {n: training[n] for n in systems._tuned(SYSTEMS[name])}
    assert len({lewm.load(f"all/{name}").hash() for name in OURS}) == len(OURS)
    assert rows["pldm"].weights["variance"] == 18
    assert rows["ema"].weights == {"sigreg_weight": 0.02, "ema_decay": 0.996}
    assert rows["dino-wm"].missing == {"row": "the weights of DINOv2 were not given (--dino-weights PATH)"}
    assert "learns from rewards" in rows["td-mpc2"].missing["row"]
    assert (table.protocol, table.planner["samples"], table.episodes) == ("two-room-25-50", 8, 12)


def test_what_is_there_is_kept(bench, table, monkeypatch):
    for name in ("lewm.trainer.train", "lewm.systems.evaluate", "lewm.probes.probe"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("done again"))
    again = bench("all", *OURS)
    for before, now in zip(table.rows, again.rows, strict=False):
        times = {"plan_ms": 0.0, "plan_torch_ms": 0.0}
        assert replace(before, **times) == replace(now, **times)


def test_other_pairs_are_solved_anew(bench):
    first = bench("pairs", "lewm")
    second = bench("pairs", "lewm", pairs=4)
    assert [t.rows[0].n for t in (first, second)] == [3, 4]
    assert Result.load("pairs/lewm/two-room-25-50.json").n == 4


def test_a_training_that_was_interrupted_goes_on(bench, table):
    def interrupt(what, done, total):
        if what == "pldm: train" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench("cut", "pldm", progress=interrupt)
    assert not Path("cut/pldm/model.safetensors").exists()
    seen = []
    bench("cut", "pldm", progress=lambda what, done, total: seen.append((what, done, total)))
    assert ("pldm: train", 3, 3) in seen
    assert ("pldm: train", 1, 3) not in seen
    assert ("pldm: evaluate", 3, 3) in seen
    assert lewm.load("cut/pldm").hash() == lewm.load("all/pldm").hash()


def test_a_folder_of_other_runs_is_refused(bench, table):
    for settings, text in (({"seed": 1}, "another seed"), ({"steps": 2}, "another train")):
        with pytest.raises(ValueError, match=rf"out must be a new folder, or one with runs like these; .* {text}"):
            bench("all", "lewm", **settings)


def test_a_collapse_is_in_the_row(bench, tmp_path, monkeypatch):
    """A run that warned, with latents that are all the same: its probes cannot be fitted."""

    def constant(model, data, **_):
        raise ValueError("the latents of 8 frames are all the same")

    monkeypatch.setattr("lewm.trainer._Run._warn_of_collapse", lambda self, row: self.metrics.update(warned=1.0))
    monkeypatch.setattr("lewm.probes.probe", constant)
    (row,) = bench(tmp_path / "collapsed", "no-regulariser").rows
    assert row.collapsed
    assert (row.probe_r, row.straightness, row.effective_rank) == (None, None, None)
    assert set(row.missing) == {"probe_r", "straightness", "effective_rank"}
    text = (tmp_path / "collapsed" / "systems.md").read_text()
    assert "probe r, straightness, effective rank not measured: the latents of 8 frames are all the same" in text
    assert "its training warned of collapse (`CollapseWarning`)" in text


def test_dino_wm_of_a_random_vit(bench, table, monkeypatch):
    dino_wm = pytest.importorskip("lewm.dino_wm")
    cut = {"image_size": 16, "encoder_size": 28, "encoder_dim": 64, "encoder_depth": 1, "predictor_depth": 1}
    preset = dino_wm.PRESETS["tiny"]
    monkeypatch.setitem(dino_wm.PRESETS, "tiny", replace(preset, model={**preset.model, **cut}, train={"steps": 3}))
    found = bench("all", "lewm", "dino-random")
    ours, row = found.rows
    assert (row.system, row.tokens, row.width, row.n, row.missing) == ("dino-random", 4, 256, 3, None)
    assert row.parameters == sum(dino_wm.DinoWM.load("all/dino-random").parameters().values())
    assert row.plan_ms == row.plan_torch_ms > 0
    assert f"{row.plan_ms / ours.plan_ms:.3g}x (torch float32)" in str(found)
    monkeypatch.setattr(dino_wm, "train_dino_wm", lambda *_, **__: pytest.fail("done again"))
    assert bench("all", "dino-random").rows[0].success_rate == row.success_rate
    with pytest.raises(ValueError, match="out must be a new folder.* another steps"):
        bench("all", "dino-random", steps=2)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"systems": ["lewm", "jepa"]}, ValueError, "systems must be of lewm, pldm, .*, got 'jepa'"),
        ({"systems": []}, ValueError, "systems must name at least one system, got none"),
        ({"task": "chess"}, ValueError, "recipe must be one of two-room, .* got 'chess'"),
        ({"size": "huge"}, ValueError, "size must be one of paper, tiny"),
        ({"pairs": 0}, ValueError, "pairs must be an integer of at least 1, got 0"),
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0"),
        ({"task": "reacher", "size": "tiny"}, ValueError, "data must be of lewm/Reacher-v0, as the task reacher, got"),
        ({"rows": ["none.json"]}, FileNotFoundError, "rows: no such file: none.json"),
    ],
)
def test_mistakes(short, settings, error, text):
    with pytest.raises(error, match=text):
        lewm.bench_systems(**{"size": "tiny", "data": short, "out": "bad", **settings})
    assert not Path("bad").exists()


# --------------------------------------------------------------------------------------------- rows from elsewhere


def test_a_row_that_was_measured_elsewhere_is_in_the_table(bench, tmp_path):
    rows = [
        {"system": "td-mpc2", "success_rate": 0.25, "n": 200, "tokens": 1, "weights": {"rho": 0.5}, "plan_ms": 12.5,
         "runs_on": "torch float32", "missing": {"straightness": "no latents were kept"}, "note": "50,000 steps"},
        {"system": "dreamerv3", "missing": {"row": "its package does not run here"}},
    ]  # fmt: skip
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.json").write_text(json.dumps([row] if i else row))
    found = bench("elsewhere", "lewm", "td-mpc2", "dreamerv3", rows=[tmp_path / "0.json", tmp_path / "1.json"])
    ours, theirs, _ = found.rows
    assert asdict(theirs) == {**asdict(SystemRow("td-mpc2")), **rows[0]}
    text = str(found)
    assert "| TD-MPC2 | 4: consistency + reward + value + policy | 1 | 1 | not measured | 12.5, " in text
    assert f"{12.5 / ours.plan_ms:.3g}x (torch float32) | not measured | 25.0% [19.5%, 31.4%] of 200 |" in text
    assert "- TD-MPC2: straightness not measured: no latents were kept; 50,000 steps.\n" in text
    assert "- DreamerV3: not measured: its package does not run here.\n" in text
    low, high = wilson(50, 200)
    assert f"[{low:.1%}, {high:.1%}]" in text


def test_rows_of_the_peers_bench_are_taken(bench, tmp_path):
    """As `benches.systems_peers` writes them: one that was measured, one that was not."""
    measured = {
        "system": "TD-MPC2 (stable-worldmodel)", "task": "with a reward", "measured": True, "why_not": None,
        "loss_terms": 2, "hyperparameters": 1, "tokens_per_frame": 1, "parameters": 1916002,
        "plan_ms": {"p50": 894.6, "p95": 924.8}, "success": 0.5, "n": 4, "interval": [0.15, 0.85],
        "random_floor": 0.25, "training": {"steps": 3, "seconds": 1.3, "budget": "Minutes."}, "versions": {},
        "machine": "", "planner": "its MPPI", "observation": "positions",
        "names": {"loss_terms": ["consistency", "value"], "hyperparameters": {"rho": 0.5}}, "notes": ["a note"],
    }  # fmt: skip
    none = {
        **dict.fromkeys(measured),
        "system": "DreamerV3 (dreamerv3 of PyPI)",
        "measured": False,
        "why_not": "no jax",
    }
    (tmp_path / "rows.json").write_text(json.dumps([measured, none]))
    found = bench("peers", "lewm", "td-mpc2", "dreamerv3", rows=[tmp_path / "rows.json"])
    _, row, other = found.rows
    assert (row.system, row.success_rate, row.n, row.random_floor, row.steps) == ("td-mpc2", 0.5, 4, 0.25, 3)
    assert (row.parameters, row.plan_ms, row.terms) == (1916002, 894.6, ["consistency", "value"])
    assert row.note == "TD-MPC2 (stable-worldmodel); positions; its MPPI; Minutes; a note"
    assert other.missing == {"row": "no jax"}
    assert "| TD-MPC2 | 2: consistency + value | 1 | 1 | 1,916,002 | 895, " in str(found)
    assert "plan torch ms, probe r, straightness, effective rank not measured: it was measured in another" in str(found)
    del measured["training"]
    (tmp_path / "rows.json").write_text(json.dumps(measured))
    with pytest.raises(ValueError, match=r"rows: .*rows\.json is no row of lewm bench systems \('training'"):
        bench("peers", "lewm", rows=[tmp_path / "rows.json"])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "Expecting property name"),
        ("[1]", "int"),
        ('{"system": "jepa"}', "system must be one of"),
        ('{"system": "td-mpc2", "speed": 1}', "row must have the fields"),
        ('{"system": "td-mpc2", "success_rate": 0.5}', "success_rate and n must be given together"),
        ('{"system": "td-mpc2", "success_rate": 1.5, "n": 2}', "success_rate must be from 0 to 1, got 1.5"),
        ('{"system": "td-mpc2", "success_rate": 0.5, "n": 0}', "n must be an integer of at least 1"),
        ('{"system": "td-mpc2", "plan_ms": NaN}', "plan_ms.* must be float"),
        ('{"system": "td-mpc2", "plan_ms": "fast"}', "plan_ms.* must be float"),
        ('{"system": "td-mpc2", "missing": {"row": 1}}', "missing.* must be str"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_rows_that_are_none(bench, tmp_path, content, text):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=rf"rows: .*rows\.json is no row of lewm bench systems \(.*{text}"):
        bench("bad", "lewm", rows=[tmp_path / "rows.json"])


# --------------------------------------------------------------------------------------------------------- the table


def test_the_table_is_read_again(table, tmp_path):
    assert SystemsTable.load("all/systems.json").rows
    table.save(tmp_path / "t.json")
    assert SystemsTable.load(tmp_path / "t.json") == table
    with pytest.raises(FileNotFoundError, match="systems: no such file"):
        SystemsTable.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="systems: .* is no table of lewm bench systems"):
        SystemsTable.load(tmp_path / "bad.json")


def test_the_table_says_what_was_measured(table):
    text = str(table)
    lines = text.splitlines()
    assert len({line.count("|") for line in lines[: 2 + len(table.rows)]}) == 1
    assert "| PLDM | 7: prediction + 18 variance + 12 covariance + 0.2 time similarity + 0.7 time variance + " in text
    assert "+ 0 time covariance + 0 inverse dynamics | 6 | 1 | " in text
    assert "| LeWM | 2: prediction + 0.02 SIGReg | 1 | 1 | " in text
    assert re.search(r"\| [\d.e+]+, 1x \(cpu \w+\) \| [\d.e+]+, 1x \|", text)
    assert "- LeWM: the article has 87 % at its own size, of 50 episodes.\n" in text
    assert text.count("not measured: it learns from rewards") == 2
    assert "CEM 8 x 1, horizon 5, 5 blocks executed" in text
    assert "trained for 3 steps" in text


def test_text_from_a_row_stays_in_its_place(table):
    bad = SystemRow("td-mpc2", runs_on="a | b\n| c", plan_ms=1.0, note="x\n| y |\n# z <script>")
    text = str(replace(table, rows=[table.rows[0], bad]))
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 4
    assert "a \\| b \\| c" in text
    assert "- TD-MPC2: x | y | # z &lt;script>." in text


# ---------------------------------------------------------------------------------------------------- command, page


def test_the_command(short, table):
    words = ["bench", "systems", "--size", "tiny", "--data", "data.lewm", "--out", "all", "--pairs", "3"]
    done = CliRunner().invoke(cli.app, [*words, "--system", "lewm", "--system", "dreamerv3", "--device", "cpu"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "| LeWM | 2: prediction + 0.02 SIGReg |" in done.output
    assert done.output.endswith(Path("all/systems.md").read_text())
    table.save("shown.json")
    shown = CliRunner().invoke(cli.app, ["bench", "systems", "--show", "shown.json"])
    assert shown.output == str(table)


def test_the_list_of_systems_needs_no_torch():
    code = "import sys, lewm; lewm.SYSTEMS; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_has_the_tables_that_were_measured():
    from benches.systems import RESULTS, tables

    page = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    named = re.findall(r"<!-- systems: (\S+) -->", page)
    assert "systems-two-room-tiny.json" in named
    assert all((RESULTS / name).is_file() for name in named)
    assert tables(page) == page
