"""The search for lambda: its bisection, its two tests, and that a search which was stopped goes on."""

import json
import math
import sys
import warnings

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

import lewm
from lewm import cli, tuning
from lewm.tuning import Criterion, LambdaRun, Tuning
from test_trainer import TINY, write_store

SMALL = {**TINY, "device": "cpu"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "square.lewm")


def run(value, verdict, **numbers):
    return LambdaRun(value, verdict, "made up", {"sigreg_per_sample": 0.1, **numbers}, 1, 0.0, f"lambda-{value}")


def judged(verdict_of, low=1e-4, high=10.0, runs=8, refine=True):
    """A search whose runs are judged by a rule."""
    found = Tuning({"low": low, "high": high}, [])
    while len(found.runs) < runs and (value := found.next(refine)) is not None:
        found.runs.append(run(value, verdict_of(value)))
    return found


def plateau(low, high):
    return lambda value: "too low" if value < low else "too high" if value > high else "inside"


@pytest.mark.parametrize(
    ("low", "high"), [(0.01, 0.2), (2e-4, 4e-4), (3.0, 8.0), (1.1e-4, 9.0), (0.0315, 0.0318), (0.06, 0.12)]
)
def test_the_bisection_ends_inside_the_plateau_in_8_runs(low, high):
    found = judged(plateau(low, high))
    assert len(found.runs) <= 8
    assert low <= found.value <= high
    assert found.runs[0].value == pytest.approx(math.sqrt(1e-4 * 10))
    # What it says of the edges is true.
    (below, above), (first, last) = found.bracket, found.plateau
    assert 1e-4 <= below < low <= first <= found.value <= last <= high < above <= 10
    # The first run inside ends it when nothing is to be refined.
    short = judged(plateau(low, high), refine=False)
    assert [r.verdict == "inside" for r in short.runs] == [False] * (len(short.runs) - 1) + [True]
    assert short.value == short.runs[-1].value
    assert [r.value for r in found.runs[: len(short.runs)]] == [r.value for r in short.runs]


def test_each_run_halves_what_is_left():
    # Until a run is inside, the bracket's logarithm is halved: 9 halvings of 5 decades are below a factor of 1.03.
    values, bracket = [], math.log(10 / 1e-4)
    for count in range(6):
        found = judged(plateau(0.7, 0.7001), runs=count)
        low, high = found.bracket
        assert math.log(high / low) == pytest.approx(bracket / 2**count)
        assert low < 0.7 < high
        values = [r.value for r in found.runs]
    assert len(set(values)) == 5


def test_the_edges_are_narrowed_down_and_no_further_than_asked():
    found = judged(plateau(0.01, 0.2), runs=100)
    (below, above), (first, last) = found.bracket, found.plateau
    assert first / below <= 1.5
    assert above / last <= 1.5
    assert len(found.runs) < 14
    middle = math.sqrt(first * last)
    assert abs(math.log(found.value / middle)) == min(
        abs(math.log(r.value / middle)) for r in found.runs if r.verdict == "inside"
    )


@pytest.mark.parametrize(("verdict", "text"), [("too low", "above 10 was not looked"), ("too high", "below 0.0001")])
def test_without_a_plateau_it_says_so(verdict, text):
    found = judged(lambda value: verdict, runs=100)
    assert found.value is None
    assert found.plateau is None
    assert len(found.runs) < 9
    assert text in str(found)
    assert "nothing inside" in str(found)


def test_verdicts_that_are_not_monotone_do_not_make_it_loop():
    rng = np.random.default_rng(0)
    for _ in range(200):
        found = judged(lambda value: rng.choice(tuning.VERDICTS), runs=40)
        assert len({r.value for r in found.runs}) == len(found.runs) < 40
        assert (found.value is not None) == any(r.verdict == "inside" for r in found.runs)


def test_the_criterion():
    judge = Criterion(sigreg=0.2, r2=0.8).judge
    assert judge({"sigreg_per_sample": 0.2, "prediction_r2": 0.8})[0] == "inside"
    assert judge({"sigreg_per_sample": 0.21, "prediction_r2": 0.9})[0] == "too low"
    assert judge({"sigreg_per_sample": 0.21, "prediction_r2": -9.0})[0] == "too low"  # collapsed: nothing moves
    assert judge({"sigreg_per_sample": 0.1, "prediction_r2": 0.79})[0] == "too high"
    assert judge({"sigreg_per_sample": 0.1})[0] == "too high"  # an R2 that is not finite is left out
    assert judge({"sigreg_per_sample": 0.1}, collapsed_at=160)[0] == "too low"
    line = {"sigreg_per_sample": 0.15, "effective_rank": 1.1, "prediction_r2": 0.97}  # along one direction
    assert judge(line) == ("too low", "effective rank 1.10, below 1.2")
    assert judge({**line, "effective_rank": 1.3})[0] == "inside"


class Linear:
    """z' = 0.9 z + what the block says, of frames that show their z; predicts from the last `history` frames."""

    def __init__(self, history, fingerprint=None, held_out=None):
        self.config = lewm.ModelConfig(action_dim=2, history=history, action_block=5, image_size=16, patch_size=8)
        self.meta = {"data": {"fingerprint": fingerprint}, "training": {"validation_episodes": held_out}}

    def encode(self, frames):
        return frames[..., 1].mean(1, dtype=np.float32)  # columns of the square's picture

    def normalise(self, actions):
        return np.asarray(actions)

    def rollout(self, z, candidates, past_actions=None):
        assert z.shape[1] == self.config.history
        assert candidates.shape[1:] == (1, 1, 10)
        assert (past_actions is None) == (z.shape[1] == 1)
        guess = 0.9 * z[:, -1] + candidates[:, 0, 0].sum(-1, keepdims=True)
        if past_actions is not None:
            assert past_actions.shape == (len(z), z.shape[1] - 1, 10)
            guess += z[:, 0] - past_actions.sum((1, 2))[:, None]
        return np.concatenate([z, guess[:, None]], 1)[:, None]


@pytest.mark.parametrize("history", [1, 3])
def test_the_scores_are_those_of_a_loop_in_float64(store, history):
    held = [2, 5]
    found = tuning.prediction_scores(Linear(history, store.fingerprint(), held), store)
    error = change = 0.0
    targets = []
    for episode in held:
        z = store.frames(episode, np.arange(store.lengths[episode]))[..., 1].astype(float).mean(1)
        actions = store.actions(episode).astype(float)
        for t in range(5 * (history - 1), len(z) - 5, 5):
            guess = 0.9 * z[t] + actions[t : t + 5].sum()
            if history > 1:
                guess += z[t - 5 * (history - 1)] - actions[t - 5 * (history - 1) : t].sum()
            error += np.square(guess - z[t + 5]).sum()
            change += np.square(z[t] - z[t + 5]).sum()
            targets.append(z[t + 5])
    assert change > 0
    assert found["skill"] == pytest.approx(1 - error / change, abs=1e-6)  # latents are float32
    spread = np.var(targets, axis=0).sum() * len(targets)
    assert found["prediction_r2"] == pytest.approx(1 - error / spread, abs=1e-6)


def test_the_scores_where_nothing_moves_or_nothing_is_long_enough(tmp_path, store):
    still = Linear(1)
    still.encode = lambda frames: np.ones((len(frames), 3), np.float32)
    assert tuning.prediction_scores(still, store) == {"prediction_r2": -math.inf, "skill": -math.inf}
    with pytest.raises(ValueError, match="data must hold a held-out episode of more than 30 steps of 5"):
        tuning.prediction_scores(Linear(30), store)


def test_a_search_leaves_its_files_and_goes_on(store, tmp_path):
    out, notes = tmp_path / "search", []
    settings = {"steps": 6, "out": out, "criterion": Criterion(sigreg=9, r2=-1e9), **SMALL}
    found = lewm.tune_lambda(store, runs=2, progress=lambda done, total, note: notes.append((done, note)), **settings)
    assert [r.verdict for r in found.runs] == ["inside", "inside"]
    assert notes[0] == (1, "run 1 of at most 2, lambda 0.03162")
    assert len(notes) == 12
    assert Tuning.load(out) == found == Tuning.load(out / "tuning.json")
    for r in found.runs:
        training = lewm.load(out / r.folder / "model.safetensors").meta["training"]
        assert training["config"]["sigreg_weight"] == r.value
        assert r.numbers["sigreg_per_sample"] == training["metrics"]["sigreg_per_sample"]
        assert r.steps == 6
    written = json.loads((out / "tuning.json").read_text())
    assert written["value"] == found.value
    assert written["plateau"] == list(found.plateau)
    import imageio.v3 as imageio

    picture = imageio.imread(out / "tuning.png")
    assert picture.shape[0] > 400
    assert picture.std() > 10

    again = lewm.tune_lambda(store, runs=2, progress=lambda *_: pytest.fail("there is nothing to do"), **settings)
    assert again == found
    more = lewm.tune_lambda(store, runs=3, **settings)
    assert more.runs[:2] == found.runs
    assert len(more.runs) == 3

    for change, text in (
        ({"steps": 7}, "steps 6, not 7"),
        ({"low": 1e-3}, "low 0.0001, not 0.001"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"embed_dim": 4}, "overrides .*'embed_dim': 8.*, not .*'embed_dim': 4"),
    ):
        with pytest.raises(ValueError, match=f"was made with {text}"):
            lewm.tune_lambda(store, **{**settings, **change})
    # Another criterion needs no other runs.
    strict = lewm.tune_lambda(store, runs=3, **{**settings, "criterion": Criterion(sigreg=9, r2=0.999)})
    assert [r.verdict for r in strict.runs] == ["too high"] * 3
    assert [r.numbers for r in strict.runs] == [r.numbers for r in more.runs]
    assert Tuning.load(out) == strict
    with pytest.raises(ValueError, match="points None, not 2"):
        lewm.sweep_lambda(store, points=2, pairs=0, **settings)


def test_a_run_that_was_interrupted_is_the_same_run(store, tmp_path):
    settings = {"steps": 8, "runs": 2, "criterion": Criterion(sigreg=9, r2=-1e9), **SMALL}
    whole = lewm.tune_lambda(store, out=tmp_path / "whole", **settings)

    def stop(done, total, note):
        if done == 5 and "run 2" in note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lewm.tune_lambda(store, out=tmp_path / "stopped", progress=stop, **settings)
    assert len(Tuning.load(tmp_path / "stopped").runs) == 1
    seen = []
    resumed = lewm.tune_lambda(
        store, out=tmp_path / "stopped", progress=lambda done, total, note: seen.append(done), **settings
    )
    assert seen == [6, 7, 8]
    assert [(r.value, r.verdict, r.numbers) for r in resumed.runs] == [
        (r.value, r.verdict, r.numbers) for r in whole.runs
    ]
    # Stopped before its first checkpoint, and after its last but before the search's file had it.
    folder = tmp_path / "stopped" / resumed.runs[1].folder
    Tuning(resumed.settings, resumed.runs[:1]).save(tmp_path / "stopped" / "tuning.json")
    assert lewm.tune_lambda(store, out=tmp_path / "stopped", **settings) == resumed
    Tuning(resumed.settings, resumed.runs[:1]).save(tmp_path / "stopped" / "tuning.json")
    for name in ("checkpoint.safetensors", "model.safetensors", "run.json"):
        (folder / name).unlink()
    redone = lewm.tune_lambda(store, out=tmp_path / "stopped", **settings)
    assert redone.runs[1].numbers == whole.runs[1].numbers


def test_a_collapse_ends_a_run_and_is_too_low(store, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lewm.tune_lambda(store, low=1e-9, high=2e-9, runs=1, steps=400, out=tmp_path / "search", **SMALL)
    (only,) = found.runs
    assert only.verdict == "too low"
    assert 150 <= only.steps < 400
    assert only.reason.startswith(f"collapsing at step {only.steps}, SIGReg per sample 0.")
    assert only.numbers["sigreg_per_sample"] > 0.2
    assert "prediction_r2" not in only.numbers
    assert not (tmp_path / "search" / only.folder / "model.safetensors").exists()
    assert found.value is None


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"low": 1.0, "high": 1.0}, ValueError, "low must be below high, got 1 and 1"),
        ({"low": 0.0}, ValueError, "low must be positive and finite, got 0.0"),
        ({"high": math.inf}, ValueError, "high must be positive and finite, got inf"),
        ({"high": "10"}, ValueError, "high must be positive and finite, got '10'"),
        ({"runs": 0}, ValueError, "runs must be an integer of at least 1, got 0"),
        ({"runs": 2.5}, TypeError, "runs must be an integer"),
        ({"refine": 1}, ValueError, "refine must be True or False, got 1"),
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
        ({"pairs": -1}, ValueError, "pairs must be an integer of at least 0, got -1"),
        ({"pairs": 3}, ValueError, "pairs must be 0: 'square' has no protocol to measure by, got 3"),
        ({"sigreg_weight": 0.1}, ValueError, "sigreg_weight is what is searched, from low to high"),
        ({"criterion": 0.9}, TypeError, "criterion must be a Criterion, got 0.9"),
        ({"preset": "huge"}, ValueError, "preset must be one of"),
        ({"batch_sise": 4}, TypeError, "'batch_sise' is no setting"),
        ({"batch_size": 100000}, ValueError, "batch_size is 100000"),
        ({"seed": -1}, ValueError, "seed must be"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(store, tmp_path, change, error, text):
    with pytest.raises(error, match=text):
        lewm.tune_lambda(store, **{**SMALL, "out": tmp_path / "out", **change})
    assert not (tmp_path / "out").exists()


def test_bad_data_and_folders(tmp_path, store):
    few = write_store(tmp_path / "few.lewm", episodes=2, length=17)
    with pytest.raises(ValueError, match="batch_size is 16, but there are only 2 windows"):
        lewm.tune_lambda(few, out=tmp_path / "out", **SMALL)
    # 7 of 8 episodes can be trained on; the one that judges is too short.
    from lewm._core import StoreWriter

    held = lewm.Dataset(write_store(tmp_path / "all.lewm", episodes=8).path).split(0.1, 0)[1]
    path = tmp_path / "short.lewm"
    with StoreWriter(str(path), height=16, width=16, action_dim=2, columns={}, metadata=json.dumps(
        {"action_low": [-1, -1], "action_high": [1, 1]})) as writer:  # fmt: skip
        for episode in range(8):
            length = 5 if episode in held else 40
            frames = np.random.default_rng(episode).integers(0, 255, (length, 16, 16, 3)).astype(np.uint8)
            writer.append(frames, np.random.default_rng(episode).uniform(-1, 1, (length - 1, 2)).astype(np.float32), {})
    with pytest.raises(
        ValueError, match="data must hold a longer episode out: judging takes 6 frames, the longest has 5"
    ):
        lewm.tune_lambda(path, out=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="out must be a new or empty folder, or one of an earlier search"):
        lewm.tune_lambda(store, out=tmp_path / "used", **SMALL)
    with pytest.raises(FileNotFoundError):
        lewm.tune_lambda(tmp_path / "nothing.lewm", **SMALL)
    with pytest.raises(ValueError, match="points must be an integer of at least 2, got 1"):
        lewm.sweep_lambda(store, points=1, **SMALL)
    for bad in ({"sigreg": 0}, {"r2": 1.0}, {"r2": math.nan}, {"sigreg": True}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            Criterion(**bad)


def test_a_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "tuning.json"
    with pytest.raises(FileNotFoundError, match="tuning: no such file"):
        Tuning.load(path)
    settings = {"low": 1e-4, "high": 10.0}
    whole = Tuning(settings, [run(0.1, "inside", skill=0.5)]).to_dict()
    for text in (
        "{", "[]", "{}", "[" * 100000, '{"settings": {}, "runs": []}',
        json.dumps({**whole, "settings": {"low": 2, "high": 1}}),
        json.dumps({**whole, "settings": {"low": "a", "high": 1}}),
        json.dumps({**whole, "runs": [{**whole["runs"][0], "verdict": "fine"}]}),
        json.dumps({**whole, "runs": [{**whole["runs"][0], "value": -1}]}),
        json.dumps({**whole, "runs": [{**whole["runs"][0], "numbers": {}}]}),
        json.dumps({**whole, "runs": [{**whole["runs"][0], "numbers": {"sigreg_per_sample": "x"}}]}),
        json.dumps({**whole, "runs": [{"value": 1}]}),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match="is no tuning.json of lewm tune-lambda"):
            Tuning.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no tuning.json"):
        Tuning.load(path)
    path.write_text(json.dumps(whole))
    assert Tuning.load(path).value == 0.1


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return lewm.collect("lewm/TwoRoom-v0", tmp_path_factory.mktemp("rooms") / "rooms.lewm", episodes=8, size=16)


def test_a_sweep_measures_success(rooms, tmp_path):
    settings = {"low": 0.01, "high": 1.0, "steps": 3, "pairs": 4, "out": tmp_path / "sweep", **SMALL}
    assert tuning._Search(rooms, "tiny", 1e-4, 10, None, None, 0, None, None, "cpu", TINY).settings["pairs"] == 200
    found = lewm.sweep_lambda(rooms, points=3, **settings)
    np.testing.assert_allclose([r.value for r in found.runs], [0.01, 0.1, 1.0])
    for r in found.runs:
        assert set(r.success) == {"rate", "low", "high", "floor", "pairs"}
        assert r.success["low"] <= r.success["rate"] <= r.success["high"]
        model = lewm.load(tmp_path / "sweep" / r.folder)
        assert lewm.evaluate(model, "two-room-25-50", pairs=4).success_rate == r.success["rate"]
    assert "solved" in str(found)
    assert (tmp_path / "sweep" / "tuning.png").stat().st_size > 10000
    assert lewm.sweep_lambda(rooms, points=3, **settings) == found


def test_the_command(store, rooms, tmp_path):
    def lewm_(*words):
        return CliRunner().invoke(cli.app, ["tune-lambda", *map(str, words)])

    small = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
    out = tmp_path / "search"
    done = lewm_(
        store.path, "--runs", 1, "--steps", 3, "--out", out, "--device", "cpu", "--r2", -1e9, "--sigreg", 9, *small
    )
    assert done.exit_code == 0, done.output
    assert done.output.rstrip().endswith("sigreg_weight=0.03162")
    assert Tuning.load(out).settings["criterion"] == {"sigreg": 9.0, "r2": -1e9}
    swept = lewm_(store.path, "--sweep", 2, "--pairs", 0, "--steps", 2, "--out", tmp_path / "sweep", *small)
    assert swept.exit_code == 0, swept.output
    assert len(Tuning.load(tmp_path / "sweep").runs) == 2
    assert "--ray must go with --sweep" in str(lewm_(store.path, "--ray").exception)


def test_ray_that_is_missing_is_named(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lewm-fast\[cluster\]"'):
        lewm.sweep_lambda(store, points=2, ray=True, out=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ray_makes_the_same_runs(store, tmp_path):
    ray = pytest.importorskip("ray")
    settings = {"points": 2, "pairs": 0, "steps": 3, **SMALL}
    here = lewm.sweep_lambda(store, out=tmp_path / "here", **settings)
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        there = lewm.sweep_lambda(store, out=tmp_path / "there", ray=True, **settings)
    finally:
        ray.shutdown()
    assert [r.value for r in there.runs] == [r.value for r in here.runs]
    for one, other in zip(here.runs, there.runs, strict=True):
        assert one.numbers == pytest.approx(other.numbers, rel=1e-3)  # another number of threads
