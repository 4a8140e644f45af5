"""The command as a user types it: from collecting to a plan, and what it says when something is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from typer.testing import CliRunner

import lewm
from lewm import cli


def run(*arguments):
    """Runs the command in this process; gives (exit code, stdout, stderr)."""
    return subprocess.run(
        [sys.executable, "-c", "from lewm.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_from_collecting_to_a_plan(tmp_path):
    import imageio.v3 as imageio

    store, folder = tmp_path / "two-room.lewm", tmp_path / "run"
    done = run("collect", "lewm/TwoRoom-v0", store, "--episodes", 20, "--seed", 1)
    assert done.returncode == 0, done.stderr
    data = lewm.Dataset(store)
    assert len(data) == 20
    assert data.fingerprint()[:12] in done.stdout

    settings = ["--preset", "tiny", "--out", folder, "--device", "cpu"]
    settings += [x for s in ("steps=12", "batch_size=16", "init=scaled") for x in ("--set", s)]
    done = run("train", store, *settings)
    assert done.returncode == 0, done.stderr
    assert "raw bounds [-1, 1]" in done.stdout
    model = lewm.load(folder)
    assert model.meta["training"]["steps"] == 12

    done = run("describe", folder)
    assert model.hash()[:12] in done.stdout

    result = tmp_path / "result.json"
    small = ["--planner", "samples=16", "--planner", "iterations=2", "--planner", "elites=4"]
    done = run("evaluate", folder, "--pairs", 4, "--out", result, *small)
    assert done.returncode == 0, done.stderr
    written = json.loads(result.read_text())
    assert written["n"] == 4
    assert written["planner"]["samples"] == 16
    assert "random" in done.stdout

    # The command in the result measures the same.
    command = "lewm evaluate MODEL --protocol two-room-25-50 --pairs 4 --planner paper --planner samples=16"
    assert written["command"] == f"{command} --planner iterations=2 --planner elites=4 --execute 5 --seed 0"
    invoke = CliRunner().invoke
    words = written["command"].replace("MODEL", str(folder)).split()[1:]
    assert invoke(cli.app, [*words, "--out", str(tmp_path / "again.json")]).exit_code == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert {k: again[k] for k in ("success", "distance", "pairs")} == {
        k: written[k] for k in ("success", "distance", "pairs")
    }
    strict = str(tmp_path / "strict.json")
    words = f"--protocol two-room-25-50-strict --pairs 4 --out {strict} --execute 2 --planner tiny".split()
    words += ["--planner", "samples=16", "--env", "goal_rule=anywhere"]
    assert invoke(cli.app, ["evaluate", str(folder), *words]).exit_code == 0
    found = json.loads(Path(strict).read_text())
    assert (found["execute"], found["planner"]["samples"], found["planner"]["iterations"]) == (2, 16, 10)
    assert found["protocol"]["env_kwargs"] == {"goal_rule": "anywhere"}
    assert found["training"]["changes"] == {"batch_size": 16, "steps": 12}
    assert "a - b: +0.0 points" in invoke(cli.app, ["compare", str(result), str(tmp_path / "again.json")]).output
    done = run("compare", result, strict)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "differ in protocol ('two-room-25-50' and 'two-room-25-50-strict'), strict" in done.stderr
    (tmp_path / "results").mkdir()
    shutil.copy(result, tmp_path / "results")
    table = tmp_path / "RESULTS.md"
    assert invoke(cli.app, ["results", str(tmp_path / "results"), "--out", str(table)]).exit_code == 0
    assert model.hash()[:12] in table.read_text()

    frames = data[0].frames
    for name, frame in (("obs.png", frames[0]), ("goal.png", frames[-1])):
        imageio.imwrite(tmp_path / name, frame)
    done = run("plan", folder, tmp_path / "obs.png", tmp_path / "goal.png", *small)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert np.shape(answer["actions"]) == (25, 2)
    assert np.abs(answer["actions"]).max() <= 1
    assert answer["cost"] >= 0
    assert answer["backend"] == "cpu"


def test_a_missing_package_is_the_line_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lewm", "train", "nowhere.lewm"])
    for module in ("lewm.trainer", "torch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.endswith(' pip install "lewm-fast[train]"\n'), said


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("describe", "nowhere.safetensors"), "error: model file: no such file: nowhere.safetensors"),
        (("train", "nowhere.lewm"), "nowhere.lewm"),
        (("collect", "lewm/Nowhere-v0", "x.lewm"), "lewm/Nowhere-v0"),
        (("collect", "lewm/TwoRoom-v0", "x.lewm", "--episodes", "0"), "episodes"),
        (("compare", "nowhere.json", "x.json"), "error: result: no such file: nowhere.json"),
        (("results", "nowhere"), "error: results must be a folder of result JSONs, got nowhere"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(arguments, text, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from lewm.cli import main; main()", *arguments],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.lewm").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    import typer

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lewm.trainer.train", interrupted)
    with pytest.raises(typer.Exit) as stop:
        cli.train(tmp_path / "x.lewm", preset="tiny", out=tmp_path / "run")
    assert stop.value.exit_code == 130
    assert f"--resume goes on from {tmp_path / 'run'}/checkpoint.safetensors" in capsys.readouterr().err


def test_a_profile_prints_a_table_or_json_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    lewm.collect("lewm/TwoRoom-v0", tmp_path / "rooms.lewm", episodes=8, size=16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lewm.profile._STEPS", 3)
    small = ["encoder_dim=16", "encoder_depth=1", "predictor_depth=1", "batch_size=8", "image_size=16"]
    arguments = {"data": tmp_path / "rooms.lewm", "preset": "tiny", "device": "cpu", "setting": small, "profile": True}
    cli.train(**arguments)
    text = capsys.readouterr().out
    cli.train(**arguments, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert "MFU" in text
    assert all(part in text for part in found["parts"])
    assert found["batch_size"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["rooms.lewm"]
    with pytest.raises(ValueError, match="--json must go with --profile"):
        cli.train(**{**arguments, "profile": False}, as_json=True)
    with pytest.raises(ValueError, match="compile has an option of its own"):
        cli.train(**{**arguments, "setting": ["compile=true"]})


def test_settings_are_json_where_they_parse():
    assert cli._settings(["steps=300", "dropout=0.1", "init=scaled", "reference=true"]) == {
        "steps": 300,
        "dropout": 0.1,
        "init": "scaled",
        "reference": True,
    }
    with pytest.raises(ValueError, match="must be NAME=VALUE, got 'steps'"):
        cli._settings(["steps"])
    with pytest.raises(ValueError, match="seed has an option of its own, --seed"):
        cli._settings(["seed=3"])


def test_planners_are_named_or_set_or_both():
    class Model:
        meta = {"planner": {"samples": 7, "elites": 3}}  # noqa: RUF012

    assert cli._planner(Model, None) is None
    assert cli._planner(Model, ["paper"]) == lewm.CEM()
    assert cli._planner(Model, ["icem", "samples=40"]) == lewm.ICEM(samples=40)
    assert cli._planner(Model, ["elites=2"]) == lewm.CEM(samples=7, elites=2)
    assert cli._planner(Model, ["name=mppi"]) == lewm.MPPI()
    for wrong in (["best"], ["paper", "tiny"]):
        with pytest.raises(ValueError, match=rf"planner must be NAME=VALUE or one of paper, .*got '{' '.join(wrong)}'"):
            cli._planner(Model, wrong)


def test_pictures_of_any_kind_become_rgb_and_others_are_refused(tmp_path):
    import imageio.v3 as imageio

    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    imageio.imwrite(tmp_path / "grey.png", grey)
    np.testing.assert_array_equal(cli._picture(tmp_path / "grey.png"), grey[..., None].repeat(3, 2))
    (tmp_path / "no.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="no.png must be a picture"):
        cli._picture(tmp_path / "no.png")
    with pytest.raises(FileNotFoundError):
        cli._picture(tmp_path / "none.png")
