"""Recipes: each can be followed, those at paper size are the official ones, and what they promise was measured."""

import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from typer.testing import CliRunner

import lewm
from lewm import cli
from lewm.config import configure
from lewm.evaluation import PROTOCOLS, Result
from lewm.recipes import RECIPES, Expected, Recipe, Trial

RESULTS = Path(__file__).parent.parent / "results"
ALL = [recipe for sizes in RECIPES.values() for recipe in sizes.values()]
every = pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: f"{recipe.name}-{recipe.size}")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def short(monkeypatch):
    """The recipe of TwoRoom for a CPU, cut short."""
    own = RECIPES["two-room"]["tiny"]
    small = {"encoder_dim": 16, "encoder_depth": 1, "predictor_depth": 1, "image_size": 16, "batch_size": 8}
    trial = Trial("two-room-25-50", lewm.CEM(samples=8, iterations=1, elites=2), execute=2, pairs=3)
    cut = replace(own, episodes=8, overrides={**small, "steps": 3, "action_prior": True}, trials=(trial,))
    monkeypatch.setitem(RECIPES["two-room"], "tiny", cut)
    monkeypatch.setattr("lewm.heads.STEPS", 3)
    return cut


def run(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


# ------------------------------------------------------------------------------------------------------ what they say


def test_there_is_one_of_each_task_for_a_gpu_and_for_a_cpu():
    sizes = {name: list(of) for name, of in RECIPES.items()}
    assert sizes == {
        "two-room": ["paper", "tiny"],
        "pusht": ["paper", "small"],
        "pusht-terms": ["small"],
        "reacher": ["paper", "tiny"],
        "cube": ["paper", "tiny"],
    }
    assert all(RECIPES[recipe.name][recipe.size] is recipe for recipe in ALL)


@every
def test_a_recipe_fits_together(recipe):
    model, train = configure(recipe.size, 2, recipe.overrides)
    assert recipe.pixels == model.image_size
    assert train.frames > model.history
    assert recipe.trials
    for trial in recipe.trials:
        assert PROTOCOLS[trial.protocol].env_id == recipe.env_id
        assert 1 <= trial.execute <= trial.planner.horizon
        assert trial.pairs >= 100


@pytest.mark.parametrize("name", [name for name, sizes in RECIPES.items() if "paper" in sizes])
def test_paper_size_has_the_official_hyper_parameters(name):
    recipe = RECIPES[name]["paper"]
    model, train = configure(recipe.size, 2, recipe.overrides)
    official = {"learning_rate": 5e-5, "weight_decay": 1e-3, "batch_size": 128, "sigreg_weight": 0.09, "epochs": 10}
    official |= {"frames": 4, "directions": 1024, "clip": 1.0, "steps": None}
    assert {key: asdict(train)[key] for key in official} == official
    assert train.warmup * train.epochs == 1  # an epoch of warm-up
    assert train.schedule == 10  # ten of a hundred epochs of the cosine: the rate is still 98 % of its peak
    assert (model.image_size, model.patch_size, model.embed_dim, model.action_block) == (224, 14, 192, 5)
    assert model.history == (1 if name == "two-room" else 3)
    assert recipe.episodes == (20_000 if name == "pusht" else 10_000)
    planner = recipe.trials[0].planner
    assert (planner.samples, planner.iterations, planner.elites, planner.horizon) == (300, 30, 30, 5)


@every
def test_what_is_expected_is_what_the_results_say(recipe):
    for trial in recipe.trials:
        if trial.expected is None:
            assert "not measured yet" in str(trial)
            continue
        found = [Result.load(RESULTS / name) for name in trial.expected.results]
        for result in found:
            training = result.training
            assert result.protocol == PROTOCOLS[trial.protocol]
            assert (result.n, result.execute, result.shrink) == (trial.pairs, trial.execute, trial.shrink)
            assert result.data is None
            # Without a cost asked for, the model's own.
            cost = trial.planner.cost or ("distance" if recipe.overrides.get("distance_head") else "latent")
            assert result.planner == {**asdict(trial.planner), "name": result.planner["name"], "cost": cost}
            assert result.planner["name"] == type(trial.planner).__name__.lower()
            assert (training.preset, training.changes) == (recipe.size, recipe.overrides)
            assert training.episodes in (None, recipe.episodes)
            assert training.policy in (None, recipe.policy)
            assert result.versions["cpu"] in trial.expected.machine
        rates = [result.success_rate for result in found]
        assert trial.expected.solved == (min(rates), max(rates))
        assert trial.expected.seconds == max(result.training.seconds for result in found)
        assert len({result.training.seed for result in found}) == len(found)


def test_the_list_says_what_came_of_them():
    text = run("recipes").output
    assert text.count("--recipe ") == len(ALL)
    assert text.count("not measured yet") == sum(t.expected is None for recipe in ALL for t in recipe.trials)
    assert "  data              300 episodes of lewm/TwoRoom-v0, 64 px, policy expert\n" in text
    assert "  training          preset tiny, distance_head=true, action_prior=true\n" in text
    expected = Expected((0.5, 0.75), 60.4, "a laptop", ("0.json", "1.json"))
    assert str(expected) == "50.0% to 75.0% solved (2 training seeds), up to 60 s of training on a laptop"
    assert str(replace(expected, solved=(0.5, 0.5), results=("0.json",))).startswith("50.0% solved (1 training seed),")
    assert ', start_rule="mark", 200 steps\n' in str(RECIPES["pusht-terms"]["small"])
    light = Recipe("x", "small", "lewm/Cube-v0", 2, (), env_kwargs={"look": "light"})
    assert '2 episodes of lewm/Cube-v0, 64 px, policy expert, look="light"' in str(light)


def test_the_size_follows_the_device(monkeypatch):
    import torch

    for there, device, size in ((True, None, "paper"), (False, None, "small"), (True, "cpu", "small")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert lewm.recipe("pusht", device=device).size == size
    assert lewm.recipe("reacher", device="cuda:1").size == "paper"
    assert lewm.recipe("reacher", "tiny", device="cuda:1").size == "tiny"
    assert lewm.recipe("pusht-terms", device="cuda:1").size == "small"
    with pytest.raises(ValueError, match="recipe must be one of two-room, pusht, pusht-terms, reacher, cube, got"):
        lewm.recipe("push")
    with pytest.raises(ValueError, match="size must be one of paper, small for the recipe pusht, got 'tiny'"):
        lewm.recipe("pusht", "tiny")


# ------------------------------------------------------------------------------------------------------- following one


def test_a_recipe_is_followed_to_the_end(short):
    words = ["train", "--recipe", "two-room", "--size", "tiny", "--device", "cpu", "--seed", 2]
    done = run(*words)
    assert done.exit_code == 0, (done.output, done.exception)
    folder = Path("runs/two-room-tiny")
    data, model = lewm.Dataset(folder / "data.lewm"), lewm.load(folder / "seed-2")
    assert (len(data), data.height, data.metadata["policy"], data.metadata["seed"]) == (8, 16, "expert", 0)
    assert (folder / "data.card" / "card.json").exists()
    assert model.config.action_prior
    assert (model.meta["training"]["seed"], model.meta["training"]["steps"]) == (2, 3)

    (command,) = re.findall("^lewm evaluate .*", done.output, re.M)
    assert "two-room-25-50, 3 pairs, CEM 8 x 1: not measured yet\n" in done.output
    assert command.startswith("lewm evaluate runs/two-room-tiny/seed-2 --protocol two-room-25-50 --pairs 3 --planner")
    assert run(*shlex.split(command)[1:]).exit_code == 0
    result = Result.load(folder / "seed-2" / "two-room-25-50.json")
    assert (result.n, result.execute, result.planner["samples"], result.seed) == (3, 2, 8, 0)
    assert result.training.parts == {"action_prior": True}
    assert (result.training.episodes, result.training.policy) == (8, "expert")

    # Another seed learns from the same data, --set has the last word, and a run in the folder is not overwritten.
    card = (folder / "data.card" / "card.json").read_bytes()
    done = run(*words[:-1], 3, "--set", "steps=2")
    assert "8 episodes, " in done.output
    assert "a second" not in done.output
    assert lewm.load(folder / "seed-3").meta["training"]["steps"] == 2
    assert (folder / "data.card" / "card.json").read_bytes() == card
    assert "new or empty folder" in str(run(*words).exception)


def test_collecting_goes_on_where_it_stopped(short):
    replace(short, episodes=3).collect()
    whole = short.collect("whole.lewm")
    done = run("train", "--recipe", "two-room", "--size", "tiny", "--device", "cpu", "--set", "steps=1")
    assert done.exit_code == 0, (done.output, done.exception)
    assert lewm.Dataset(short.store).fingerprint() == whole.fingerprint()


def test_a_store_that_is_given_is_used(short):
    data = short.collect("own.lewm", episodes=6, env_kwargs={"goal_rule": "anywhere"})
    done = run("train", "own.lewm", "--recipe", "two-room", "--size", "tiny", "--device", "cpu", "--out", "here")
    assert done.exit_code == 0, (done.output, done.exception)
    assert lewm.load("here").meta["data"]["fingerprint"] == data.fingerprint()
    assert "lewm evaluate here --protocol" in done.output
    assert not Path("runs").exists()
    profile = short.train("own.lewm", profile=True, device="cpu")
    assert profile.batch_size == 8


def test_data_of_another_environment_are_refused(short):
    data = short.collect("own.lewm")
    with pytest.raises(ValueError, match="must be of lewm/PushT-v0, as the recipe pusht, got lewm/TwoRoom-v0"):
        RECIPES["pusht"]["small"].train(data)


@pytest.mark.parametrize("name", ["pusht", "reacher", "cube"])
def test_data_of_the_other_tasks(name):
    """Two short episodes of each, in the pictures that the model takes."""
    recipe = RECIPES[name][list(RECIPES[name])[1]]
    try:
        data = recipe.collect(episodes=2, max_steps=25)
    except (ModuleNotFoundError, OSError) as error:  # the extra or a GL library is not there
        pytest.skip(str(error))
    assert (data.metadata["env_id"], data.height, data.width) == (recipe.env_id, 64, 64)
    assert data.metadata["env_kwargs"] == recipe.env_kwargs
    model = recipe.train(data, steps=1, batch_size=2, device="cpu")
    assert model.meta["data"]["env_kwargs"] == recipe.env_kwargs
    assert model.meta["preset"] == recipe.size


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["train"], "data must be a store to learn from, or --recipe one that collects its own; got neither"),
        (["train", "x.lewm", "--size", "tiny"], "--size must go with --recipe, got 'tiny' alone"),
        (["train", "--recipe", "pusht", "--preset", "tiny"], "--preset must go without --recipe"),
        (["train", "--recipe", "chess"], "recipe must be one of two-room, pusht, pusht-terms, reacher, cube, got"),
    ],
)
def test_mistakes(words, text):
    assert text in str(run(*words).exception)
    assert not Path("runs").exists()


def test_the_list_needs_no_torch():
    code = "import sys; from lewm.cli import app; app(['recipes'], standalone_mode=False)"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
