"""The calibration, its p-values, and the controller that reports them."""

import json
import math

import numpy as np
import pytest

import lewm
from fake_models import PointModel
from lewm.controller import Controller
from lewm.monitor import Calibration, Surprise, calibrate, prediction_errors
from lewm.planner import CEM

SMALL = CEM(samples=32, iterations=4, elites=6, horizon=3)
GOAL = np.array([2.0, -1.0])
NOISE = 0.4


def wander(model, episodes, steps, seed=0):
    """Positions (episodes, steps + 1, 2) and raw actions of a point that PointModel predicts but for noise."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-0.5, 0.5, (episodes, steps, 2))
    positions = np.zeros((episodes, steps + 1, 2))
    positions[:, 0] = rng.uniform(-3, 3, (episodes, 2))
    for t in range(steps):
        positions[:, t + 1] = np.clip(positions[:, t] + actions[:, t] + rng.normal(0, NOISE, (episodes, 2)), -10, 10)
    return positions, actions.astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return PointModel()


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    positions, actions = wander(model, 60, 21)
    frames = np.stack([model.picture(p) for p in positions.reshape(-1, 2)])
    padded = np.concatenate([actions, np.full((60, 1, 2), np.nan, np.float32)], axis=1).reshape(-1, 2)
    ends = 22 * np.arange(1, 61)
    return lewm.Dataset.from_arrays(frames, padded, ends, tmp_path_factory.mktemp("monitor") / "d.lewm", low=-1, high=1)


# ---------------------------------------------------------------------------------------------------------- p-values


@pytest.mark.parametrize("n", [1, 2, 3, 17, 256])
def test_p_values_are_the_conformal_ones_where_all_scores_are_kept(n):
    rng = np.random.default_rng(n)
    scores = np.round(rng.exponential(size=n), 2)  # with ties
    calibration = Calibration.of(scores)
    for score in [*scores, *rng.exponential(size=50), 0.0, scores.max() + 1, math.inf]:
        assert calibration.p_value(float(score)) == (1 + (scores >= score).sum()) / (1 + n)
    batch = calibration.p_value(scores[:2])
    assert batch.shape == scores[:2].shape
    assert batch[0] == calibration.p_value(scores[0])
    assert math.isnan(calibration.p_value(math.nan))


def test_p_values_are_close_where_only_quantiles_are_kept():
    rng = np.random.default_rng(0)
    scores = rng.lognormal(size=5000)
    calibration = Calibration.of(scores)
    assert (calibration.count, len(calibration.quantiles)) == (5000, 256)
    new = rng.lognormal(size=2000)
    exact = np.array([(1 + (scores >= score).sum()) / 5001 for score in new])
    found = calibration.p_value(new)
    assert np.abs(found - exact).max() < 1 / 255
    assert (np.diff(found[np.argsort(new)]) <= 0).all()
    assert calibration.p_value(1e9) == 1 / 5001
    assert calibration.p_value(0.0) == 1


def test_a_calibration_survives_json():
    calibration = Calibration.of(np.random.default_rng(0).exponential(size=300))
    again = Calibration(**json.loads(json.dumps(calibration.to_dict())))
    assert again == calibration


@pytest.mark.parametrize(
    "found",
    [
        [],
        7,
        {"count": 3},
        {"count": 0, "quantiles": [1.0]},
        {"count": 2.5, "quantiles": [1.0]},
        {"count": 10**400, "quantiles": [1.0]},
        {"count": 1, "quantiles": [1.0, 2.0]},
        {"count": 9, "quantiles": []},
        {"count": 9, "quantiles": "123"},
        {"count": 9, "quantiles": [2.0, 1.0]},
        {"count": 9, "quantiles": [-1.0, 1.0]},
        {"count": 9, "quantiles": [1.0, math.nan]},
        {"count": 9, "quantiles": [1.0, math.inf]},
        {"count": 9, "quantiles": [1, 10**400]},
        {"count": 9, "quantiles": [True, 2.0]},
        {"count": 9, "quantiles": ["1", "2"]},
        {"count": 10**6, "quantiles": [1.0] * 257},
        {"count": 9, "quantiles": [1.0], "code": "import os"},
    ],
)
def test_a_malformed_calibration_is_refused(found):
    model = PointModel()
    model.meta = {"training": {"surprise": found}}
    with pytest.raises(ValueError, match=r"the calibration in the model's file is malformed"):
        Controller(model, GOAL, planner=SMALL, monitor=True)


def test_a_model_without_a_calibration_says_how_to_make_one():
    with pytest.raises(ValueError, match=r"monitor is True, but .* give monitor=lewm\.calibrate\(model, data\)"):
        Controller(PointModel(), GOAL, planner=SMALL, monitor=True)
    with pytest.raises(TypeError, match=r"monitor must be True, False or what lewm\.calibrate gives, got 0\.05"):
        Controller(PointModel(), GOAL, planner=SMALL, monitor=0.05)


# --------------------------------------------------------------------------------------------------------- calibrate


def test_calibration_counts_every_step_of_the_episodes(model, data):
    found = calibrate(model, data, episodes=range(20))
    assert found.count == 20 * 10
    want = []
    for episode in range(20):
        z = model.encode(data.frames(episode))[::2]
        moved = data.actions(episode)[:20].reshape(10, 2, 2).sum(1)
        want += np.square(z[:-1] + moved - z[1:]).mean(-1).tolist()  # PointModel's prediction, written out
    np.testing.assert_allclose(found.quantiles, sorted(want), rtol=1e-5)
    assert calibrate(model, data, episodes=range(20)) == found
    whole = PointModel()
    whole.meta = {"data": {"fingerprint": data.fingerprint()}, "training": {"validation_episodes": [3, 4]}}
    assert calibrate(whole, data).count == 20  # by default what was held out
    assert calibrate(model, data).count == 60 * 10


def test_normal_p_values_are_uniform(model, data):
    calibration = calibrate(model, data, episodes=range(30))
    errors = [
        prediction_errors(model, [track.z], [track.blocks])[0]
        for track in lewm.latents.tracks(model, data, range(30, 60))
    ]
    p = np.sort(calibration.p_value(np.concatenate(errors)))
    rank = np.arange(1, len(p) + 1) / len(p)
    distance = max(np.abs(p - rank).max(), np.abs(p - rank + 1 / len(p)).max())
    # Kolmogorov and Smirnov's bound at 1 % for two samples of 300.
    assert len(p) == 300
    assert distance < 1.63 * math.sqrt(2 / 300)


def test_calibration_refuses_what_says_nothing(model, tmp_path):
    def stored(frames, name, actions=None):
        n = len(frames)
        actions = np.random.default_rng(0).uniform(-1, 1, (n, 2)) if actions is None else actions
        return lewm.Dataset.from_arrays(frames, actions, [n], tmp_path / f"{name}.lewm", low=-1, high=1)

    with pytest.raises(ValueError, match=r"data must have an episode of at least 3 frames.*among the 1 to take"):
        calibrate(model, stored(np.stack([model.picture([0, 0])] * 2), "short"))
    with pytest.raises(ValueError, match=r"data must have frames that change"):
        calibrate(model, stored(np.stack([model.picture([0, 0])] * 9), "still"))
    broken = PointModel()
    broken.rollout = lambda *_, **__: np.full((4, 1, 2, 2), np.nan)
    with pytest.raises(ValueError, match=r"surprise must be finite, but is not for 4 steps"):
        calibrate(broken, stored(np.stack([model.picture([t / 9, 0]) for t in range(9)]), "moving"))


# -------------------------------------------------------------------------------------------------------- controller


def world(model, steps, seed, teleport=None, **settings):
    """A controller on the noisy point; gives what it reports at each step, and its actions."""
    rng = np.random.default_rng(seed)
    controller = Controller(model, GOAL, planner=SMALL, **settings)
    position, told, actions = np.array([-3.0, 3.0]), [], []
    for step in range(steps):
        if step == teleport:
            position = position + 6
        action = controller(model.picture(position))
        told.append(controller.surprise)
        actions.append(action)
        position = np.clip(position + action + rng.normal(0, NOISE, 2), -10, 10)
    return told, np.stack(actions)


@pytest.mark.parametrize("history", [1, 3])
@pytest.mark.parametrize("execute", [1, 3])
def test_the_monitor_reports_at_each_boundary_and_changes_no_action(data, history, execute):
    model = PointModel(history=history)
    calibration = calibrate(model, data)
    plain, actions = world(model, 9, 0, execute=execute)
    assert plain == [None] * 9
    told, same = world(model, 9, 0, execute=execute, monitor=calibration)
    np.testing.assert_array_equal(actions, same)
    assert told[:2] == [None, None]
    assert [now.step for now in told[2:]] == [2, 2, 4, 4, 6, 6, 8]
    assert isinstance(told[2].score, float)
    assert told[2].p_value == calibration.p_value(told[2].score)


@pytest.mark.parametrize("history", [1, 2, 4])
def test_the_score_is_that_of_the_clip(data, history):
    model = PointModel(history=history)
    calibration = calibrate(model, data)
    positions, _ = wander(model, 1, 14, seed=5)
    frames = np.stack([model.picture(p) for p in positions[0]])
    controller = Controller(model, GOAL, planner=SMALL, execute=2, monitor=calibration)
    told, actions = [], []
    for step, frame in enumerate(frames):
        actions.append(controller(frame))
        if step and step % 2 == 0:
            told.append(controller.surprise.score)
    np.testing.assert_allclose(told, lewm.surprise(model, frames, np.stack(actions[:-1])), rtol=1e-6)


def test_what_was_really_executed_is_what_the_prediction_is_of(data):
    model = PointModel()
    calibration = calibrate(model, data)
    start, really = np.array([-3.0, 3.0]), np.array([0.3, -0.2])
    controller = Controller(model, GOAL, planner=SMALL, monitor=calibration)
    controller(model.picture(start))
    controller(model.picture(start + really), executed=really)
    controller(model.picture(start + 2 * really), executed=really)
    assert controller.surprise.score < 1e-6
    assert controller.surprise.p_value == 1
    told = Controller(model, GOAL, planner=SMALL, monitor=calibration)
    for place in (0, 1, 2):
        told(model.picture(start + place * really))  # it takes its own actions for those executed
    assert told.surprise.score > 0.01


def test_a_teleport_is_told_and_normal_steps_hardly_ever(data):
    model = PointModel()
    calibration = calibrate(model, data)
    normal = [now.p_value for seed in range(20) for now in world(model, 15, seed, monitor=calibration)[0][2::2]]
    assert np.mean(np.array(normal) < 0.05) < 0.12
    for seed in range(5):
        told, _ = world(model, 9, seed, teleport=4, monitor=calibration)
        assert told[2].p_value > 0.01
        assert told[4].p_value == 1 / (1 + calibration.count)  # the least there is


def test_environments_in_a_batch_have_scores_of_their_own(data):
    model = PointModel(history=2)
    calibration = calibrate(model, data)
    positions, _ = wander(model, 3, 6, seed=2)
    frames = np.stack([model.picture(p) for p in positions.reshape(-1, 2)]).reshape(3, 7, 8, 8, 3)
    controller = Controller(model, GOAL, planner=SMALL, monitor=calibration)
    alone = [Controller(model, GOAL, planner=SMALL, monitor=calibration, env_id=e) for e in range(3)]
    for t in range(7):
        controller(frames[:, t])
        for e in range(3):
            alone[e](frames[e, t])
    found = controller.surprise
    assert found.score.shape == found.p_value.shape == (3,)
    np.testing.assert_allclose(found.score, [each.surprise.score for each in alone], rtol=1e-6)
    np.testing.assert_allclose(found.p_value, [each.surprise.p_value for each in alone])
    controller.keep([False, True, True])
    np.testing.assert_array_equal(controller.surprise.score, found.score[1:])


def test_a_reset_forgets_and_a_call_that_fails_leaves_it(data):
    model = PointModel()
    controller = Controller(model, GOAL, planner=SMALL, monitor=calibrate(model, data))
    for _ in range(3):
        controller(model.picture([0, 0]))
    before = controller.surprise
    assert isinstance(before, Surprise)
    with pytest.raises(ValueError, match="obs must be"):
        controller(np.zeros((8, 8, 3)))
    assert controller.surprise is before
    controller.reset()
    assert controller.surprise is None
    controller(model.picture([3, 3]))
    assert controller.surprise is None  # nothing was predicted yet


def test_training_stores_a_calibration(tmp_path):
    pytest.importorskip("torch")
    data = lewm.collect("lewm/TwoRoom-v0", tmp_path / "d.lewm", episodes=12, size=16)
    model = lewm.train(
        data, preset="tiny", out=tmp_path / "run", steps=4, device="cpu", image_size=16, patch_size=8, batch_size=8
    )
    loaded = lewm.load(tmp_path / "run", backend="cpu", precision="float32")
    stored = Calibration.of_model(loaded)
    _, held_out = data.split(0.1, 0)
    want = calibrate(loaded, data, episodes=held_out)
    assert stored.count == want.count == sum((int(n) - 1) // 5 for n in data.lengths[held_out])
    np.testing.assert_allclose(stored.quantiles, want.quantiles, rtol=0.05)  # that may be of bfloat16 predictions
    assert Calibration.of_model(model) == stored
    controller = Controller(loaded, data[0].frames[-1], planner=SMALL, monitor=True)
    for frame in data[0].frames[:6]:
        controller(frame)
    assert 0 < controller.surprise.p_value <= 1


def test_held_out_episodes_too_short_to_calibrate_are_no_reason_to_fail(tmp_path):
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    lengths = np.full(12, 21)
    held_out = lewm.Dataset.split(type("N", (), {"__len__": lambda _: 12})(), 0.1, 0)[1]
    lengths[held_out] = 4
    n = int(lengths.sum())
    data = lewm.Dataset.from_arrays(
        rng.integers(0, 255, (n, 16, 16, 3), dtype=np.uint8),
        rng.uniform(-1, 1, (n, 2)),
        np.cumsum(lengths),
        tmp_path / "d.lewm",
        low=-1,
        high=1,
    )
    settings = {"image_size": 16, "patch_size": 8, "batch_size": 8, "steps": 2}
    model = lewm.train(data, preset="tiny", out=tmp_path / "run", device="cpu", **settings)
    assert "surprise" not in model.meta["training"]


def test_the_bench_runs(capsys, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from blocks import ROOT, leave_the_tutorials_model

    monkeypatch.syspath_prepend(ROOT)
    from benches import monitor

    leave_the_tutorials_model(tmp_path)
    monitor.main(["--model", str(tmp_path / "runs/two-room/model.safetensors"), "--rounds", "1"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["execute"] for row in rows] == [1, 5]
    assert all(row["control_step_ms"] > 0 for row in rows)
