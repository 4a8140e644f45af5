import json
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lewm
from fake_models import BlindModel, PointModel, RoomModel
from lewm.envs.two_room import render_states
from lewm.evaluation import PROTOCOLS, Protocol, _data_tasks, evaluate, make_tasks, wilson

TWO_ROOM = PROTOCOLS["two-room-25-50"]


# ------------------------------------------------------------------------------------------------------------ interval


def test_wilson_against_published_values():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    np.testing.assert_allclose(wilson(81, 263), (0.2553, 0.3662), atol=5e-5)
    np.testing.assert_allclose(wilson(15, 148), (0.0624, 0.1605), atol=5e-5)
    np.testing.assert_allclose(wilson(0, 20), (0.0, 0.1611), atol=5e-5)
    np.testing.assert_allclose(wilson(1, 29), (0.0061, 0.1718), atol=5e-5)


@given(n=st.integers(1, 10_000), data=st.data())
def test_wilson_holds_the_rate_and_mirrors(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    assert 0 <= low <= k / n + 1e-12
    assert k / n - 1e-12 <= high <= 1
    np.testing.assert_allclose(wilson(n - k, n), (1 - high, 1 - low), atol=1e-12)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(k, n):
    with pytest.raises(ValueError, match=rf"successes must be from 0 to n, and n at least 1, got {k} of {n}"):
        wilson(k, n)


# --------------------------------------------------------------------------------------------------------------- pairs


def test_pairs_are_frames_of_one_episode_25_steps_apart():
    tasks = make_tasks(TWO_ROOM, 40, 32)
    assert tasks.states.shape == tasks.goals.shape == (40, 2)
    assert tasks.pictures.shape == (40, 32, 32, 3)
    assert tasks.pictures.dtype == np.uint8
    assert len(set(tasks.episodes)) == 40
    np.testing.assert_array_equal(tasks.pictures, render_states(tasks.goals, 32))
    far = np.abs(tasks.goals - tasks.states).max(axis=1)
    assert (far <= 25 * 5).all()
    assert np.median(far) > 20
    assert tasks.rows.min() >= 0
    assert tasks.rows.max() > 20


def test_pairs_do_not_depend_on_how_many_are_asked_for():
    few, many = make_tasks(TWO_ROOM, 5, 16), make_tasks(TWO_ROOM, 90, 16)
    for name in ("states", "goals", "pictures", "episodes", "rows"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[:5])
    assert not np.array_equal(few.states, make_tasks(replace(TWO_ROOM, seed=1), 5, 16).states)


def test_no_seed_of_collect_can_make_the_held_out_episodes():
    # NumPy mixes a whole number's words without leading zeros, padded to four; five that end in zero are of none.
    def state(seed):
        return np.random.SeedSequence(seed, spawn_key=(3,)).generate_state(4).tolist()

    assert state(7) == state((7, 0, 0, 0))
    for seed in (7, 2**32 - 1, 2**64 + 7, 2**128 - 1, 2**128 + 7, 2**160 + 7):
        assert state(seed) != state((7, 0, 0, 0, 0))


def test_a_goal_that_no_episode_reaches_is_refused():
    with pytest.raises(ValueError, match=r"goal_offset must leave enough episodes that are longer, got 101"):
        make_tasks(replace(TWO_ROOM, goal_offset=101), 3, 16)


# ------------------------------------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "new" / "result.json"
    calls = []
    result = evaluate(RoomModel(), pairs=60, batch=25, out=out, progress=lambda *done: calls.append(done))
    return result, out, calls


def test_a_model_that_knows_the_rooms_solves_them(seeing):
    result, _, calls = seeing
    assert result.success_rate >= 0.95
    assert result.interval == wilson(sum(result.success), 60)
    assert result.success_rate == sum(result.success) / 60
    assert calls == [(25, 60), (50, 60), (60, 60)]
    assert all((d < 16) == s for d, s in zip(result.distance, result.success, strict=True))


def test_the_floor_and_the_pairs_solved_at_the_start_are_counted(seeing):
    result, _, _ = seeing
    tasks = make_tasks(TWO_ROOM, 60, 32)
    at_start = np.hypot(*(tasks.states - tasks.goals).T) < 16
    assert result.solved_at_start == at_start.sum() > 0
    assert np.array(result.random_success)[at_start].all()
    assert np.array(result.success)[at_start].all()
    # 28.6 % of 1000 pairs
    assert 0.12 <= result.random_floor <= 0.48
    assert result.random_interval == wilson(sum(result.random_success), 60)


def test_a_model_that_sees_nothing_stays_near_the_floor():
    result = evaluate(BlindModel(), pairs=60)
    assert result.solved_at_start / 60 <= result.success_rate <= 0.4


def test_the_json_says_what_made_the_number(seeing):
    result, out, _ = seeing
    written = json.loads(out.read_text())
    assert [p.name for p in out.parent.iterdir()] == ["result.json"]
    assert written == json.loads(json.dumps(result.to_dict()))
    wanted = {
        "success_rate",
        "interval",
        "random_floor",
        "random_interval",
        "n",
        "solved_at_start",
        "plan_ms",
        "execute",
    }
    wanted |= {"protocol", "planner", "seed", "model_hash", "backend", "precision", "versions", "seconds", "success"}
    assert wanted <= set(written)
    assert written["n"] == 60
    assert written["protocol"] == {
        "name": "two-room-25-50",
        "env_id": "lewm/TwoRoom-v0",
        "goal_offset": 25,
        "budget": 50,
        "pairs": 200,
        "seed": 0,
    }
    assert written["planner"]["samples"] == 64
    assert written["execute"] == 5
    assert (written["backend"], written["precision"], written["model_hash"]) == ("fake", "exact", "f" * 64)
    assert 0 < written["plan_ms"]["p50"] <= written["plan_ms"]["p95"]
    assert written["seconds"] > 0
    assert {"lewm", "numpy", "python", "platform", "cpu"} <= set(written["versions"])
    assert all(written["versions"].values())
    text = str(result)
    assert "two-room-25-50" in text
    assert f"{result.success_rate:.1%}" in text
    assert f"random actions: {result.random_floor:.1%}" in text


def test_the_result_does_not_depend_on_the_batch(seeing):
    result, _, _ = seeing
    again = evaluate(RoomModel(), pairs=12, batch=1)
    assert again.success == result.success[:12]
    assert again.random_success == result.random_success[:12]
    np.testing.assert_allclose(again.distance, result.distance[:12], atol=1e-6)


def test_planner_and_execute_can_be_chosen():
    planner = lewm.CEM(samples=16, iterations=2, elites=4, horizon=3)
    result = evaluate(RoomModel(), pairs=5, planner=planner, execute=1)
    assert result.planner["horizon"] == 3
    assert result.execute == 1


# ------------------------------------------------------------------------------------------------ pairs from a data set


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return lewm.collect(TWO_ROOM.env_id, tmp_path_factory.mktemp("data") / "rooms.lewm", episodes=30, size=32)


def trained_on(data, validation, **changed):
    model = RoomModel()
    recipe = {key: data.metadata[key] for key in ("env_id", "seed", "policy")}
    model.meta["data"] = {"fingerprint": data.fingerprint(), "episodes": len(data), **recipe, **changed}
    model.meta["training"] = {"validation_episodes": validation}
    return model


def test_pairs_come_from_the_episodes_that_training_held_out(data):
    long = [e for e in range(30) if data.lengths[e] > 25]
    result = evaluate(trained_on(data, long[3:9]), data=data)
    assert sorted(episode for episode, _ in result.pairs) == long[3:9]
    assert result.data == data.fingerprint()
    assert result.n == 6
    result = evaluate(trained_on(data, long[3:9]), data=data, pairs=2)
    assert {episode for episode, _ in result.pairs} <= set(long[3:9])


def test_a_foreign_data_set_is_used_whole(data):
    model = trained_on(data, [0], fingerprint="other", seed=1)
    result = evaluate(model, data=data)
    assert sorted(episode for episode, _ in result.pairs) == [e for e in range(30) if data.lengths[e] > 25]


def test_a_store_that_grew_still_holds_the_episodes_of_training(data):
    long = [e for e in range(30) if data.lengths[e] > 25]
    model = trained_on(data, long[:2], fingerprint="of the first 20", episodes=20)
    result = evaluate(model, data=data)
    assert sorted(episode for episode, _ in result.pairs) == [*long[:2], *(e for e in long if e >= 20)]


def test_the_goal_is_the_frame_25_rows_on(data):
    result = evaluate(RoomModel(), data=data, pairs=4)
    tasks = _data_tasks(TWO_ROOM, data, RoomModel(), 4)
    for i, (episode, row) in enumerate(result.pairs):
        np.testing.assert_array_equal(tasks.states[i], data.column("state", episode)[row])
        np.testing.assert_array_equal(tasks.goals[i], data.column("state", episode)[row + 25])
        np.testing.assert_array_equal(tasks.pictures[i], data.frames(episode, np.array([row + 25]))[0])


# ----------------------------------------------------------------------------------------------------------- bad input


def test_evaluate_refuses(data, monkeypatch):
    model = RoomModel()
    with pytest.raises(ValueError, match=r"protocol must be a Protocol or one of two-room-25-50, got 'push'"):
        evaluate(model, "push")
    with pytest.raises(ValueError, match=r"pairs must be an integer of at least 1, got 0"):
        evaluate(model, pairs=0)
    with pytest.raises(ValueError, match=r"batch must be an integer of at least 1, got 0"):
        evaluate(model, pairs=2, batch=0)
    with pytest.raises(ValueError, match=r"execute must be .*got 6"):
        evaluate(model, pairs=2, execute=6)
    with pytest.raises(ValueError, match=r"pairs must be at most \d+, one for each episode.*got 31"):
        evaluate(model, pairs=31, data=data)
    with pytest.raises(ValueError, match=r"pairs must be at most 0, .*held out from training"):
        evaluate(trained_on(data, []), data=data)
    monkeypatch.setitem(gymnasium.registry, "lewm/Other-v0", gymnasium.spec(TWO_ROOM.env_id))
    with pytest.raises(ValueError, match=r"data must be of lewm/Other-v0, as the protocol, got lewm/TwoRoom-v0"):
        evaluate(model, Protocol("other", "lewm/Other-v0"), data=data)
    with pytest.raises(ValueError, match=r"same actions: lewm/TwoRoom-v0 has Box.*the model 3 numbers"):
        evaluate(PointModel(3, 5, size=32), pairs=2)
    for env_id, text in (
        ("CartPole-v1", r"action space is Discrete\(2\); lewm wants continuous, bounded actions"),
        ("Pendulum-v1", r"no vector form"),
        ("lewm/Nowhere-v0", r"gymnasium does not know"),
    ):
        with pytest.raises(ValueError, match=text):
            evaluate(model, Protocol("other", env_id), pairs=2)
    with pytest.raises(TypeError, match=r"model must be a lewm\.Model, got 'm\.safetensors'; lewm\.load reads one"):
        evaluate("m.safetensors", pairs=2)
    model.stats = None
    with pytest.raises(ValueError, match=r"no action statistics"):
        evaluate(model, pairs=2)


@pytest.mark.parametrize("setting", ["goal_offset", "budget", "pairs"])
def test_protocol_refuses(setting):
    with pytest.raises(ValueError, match=rf"{setting} must be an integer of at least 1, got 0"):
        Protocol("mine", "lewm/TwoRoom-v0", **{setting: 0})
