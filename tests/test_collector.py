import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import lewm.envs
from lewm.collector import collect, generate
from lewm.envs.two_room import ExpertPolicy, TwoRoomVectorEnv, render_states, step_states

lewm.envs.register()
ENV = "lewm/TwoRoom-v0"


def episodes_of(num_envs, episodes=range(10), policy=None, seed=0, max_steps=40):
    env = TwoRoomVectorEnv(num_envs, size=16, max_episode_steps=max_steps, autoreset_mode=AutoresetMode.DISABLED)
    return list(generate(env, policy or ExpertPolicy(), seed=seed, episodes=episodes, max_steps=max_steps))


def small(path, **changes):
    return collect(ENV, path, **{"episodes": 6, "size": 16, "max_steps": 30, **changes})


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return small(tmp_path_factory.mktemp("collected") / "reference.lewm")


# --------------------------------------------------------------------------------------------------------- episodes


def test_an_episode_is_what_the_environment_did():
    for episode in episodes_of(4):
        frames, actions, columns = episode
        count = len(frames)
        assert frames.shape == (count, 16, 16, 3)
        assert actions.shape == (count - 1, 2)
        assert (frames.dtype, actions.dtype, columns["state"].dtype) == (np.uint8, np.float32, np.float64)
        np.testing.assert_array_equal(frames, render_states(columns["state"], 16))
        np.testing.assert_array_equal(step_states(columns["state"][:-1], actions), columns["state"][1:])
        assert (columns["goal_state"] == columns["goal_state"][0]).all()
        close = np.linalg.norm(columns["state"] - columns["goal_state"], axis=1) < 16
        assert not close[1:-1].any()
        assert close[-1] or count == 41


def test_episodes_end_with_success():
    lengths = [len(episode.actions) for episode in episodes_of(8, range(40), ExpertPolicy(0.0), max_steps=100)]
    assert max(lengths) < 100  # without noise the expert arrives
    assert min(lengths) >= 21  # 25 steps by the rule, less 16 units


@pytest.mark.parametrize(
    "policy", [None, lambda states, goals, rngs: np.stack([rng.uniform(-1, 1, 2) for rng in rngs])]
)
def test_episodes_do_not_depend_on_the_batch(policy):
    expected = episodes_of(10, policy=policy)
    for num_envs, numbers in ((1, range(10)), (3, range(10)), (16, range(10)), (4, range(3, 7))):
        got = episodes_of(num_envs, numbers, policy)
        assert len(got) == len(numbers)
        for number, episode in zip(numbers, got, strict=True):
            np.testing.assert_array_equal(episode.frames, expected[number].frames)
            np.testing.assert_array_equal(episode.actions, expected[number].actions)
            for name in ("state", "goal_state"):
                np.testing.assert_array_equal(episode.columns[name], expected[number].columns[name])


def test_seeds_and_episodes_differ():
    starts = [episode.columns["state"][0, 0] for seed in (0, 1) for episode in episodes_of(5, seed=seed)]
    assert len(set(starts)) == 20


def test_actions_are_stored_as_executed():
    episode = episodes_of(1, range(1), lambda states, goals, rngs: np.full((1, 2), [3.0, -np.inf]))[0]
    assert (episode.actions == [1, -1]).all()


# ------------------------------------------------------------------------------------------------------------- store


def test_the_store_holds_the_episodes(reference):
    expected = episodes_of(6, range(6), max_steps=30)
    assert len(reference) == 6
    for got, episode in zip(reference, expected, strict=True):
        np.testing.assert_array_equal(got.frames, episode.frames)
        np.testing.assert_array_equal(got.actions, episode.actions)
        assert set(got.columns) == {"state", "goal_state"}
        np.testing.assert_array_equal(got.columns["state"], episode.columns["state"])
    about = dict(reference.metadata)
    assert about.pop("created_by").startswith("lewm-fast ")
    assert about == {
        "env_id": ENV,
        "env_kwargs": {},
        "seed": 0,
        "policy": "expert",
        "max_steps": 30,
        "pixels": {"size": 16},
        "action_low": [-1.0, -1.0],
        "action_high": [1.0, 1.0],
    }


@pytest.mark.parametrize("num_envs", [1, 4])
def test_same_arguments_same_store(reference, tmp_path, num_envs):
    assert small(tmp_path / "again.lewm", num_envs=num_envs).fingerprint() == reference.fingerprint()


@pytest.mark.parametrize("changes", [{"seed": 1}, {"policy": "random"}, {"env_kwargs": {"goal_rule": "anywhere"}}])
def test_other_arguments_other_store(reference, tmp_path, changes):
    assert small(tmp_path / "other.lewm", **changes).fingerprint() != reference.fingerprint()


def test_an_interrupted_collection_goes_on(reference, tmp_path):
    path = tmp_path / "interrupted.lewm"

    def interrupt(done, total, frames):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(path, progress=interrupt, num_envs=2)
    assert len(lewm.Dataset(path)) == 3
    calls = []
    data = small(path, progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(4, 6), (5, 6), (6, 6)]
    assert calls[-1][2] == data.lengths[3:].sum()
    assert data.fingerprint() == reference.fingerprint()
    assert data.metadata == reference.metadata
    small(path, progress=interrupt)  # complete: nothing to do, and nothing is called
    assert len(small(path, episodes=8)) == 8


def test_a_store_of_other_arguments_is_left_alone(tmp_path):
    path = tmp_path / "mine.lewm"
    before = small(path, episodes=2).fingerprint()
    for changes in ({"seed": 5}, {"size": 32}, {"policy": "random"}, {"max_steps": 31}):
        name = next(iter(changes)).replace("size", "pixels")
        with pytest.raises(ValueError, match=f"made with other arguments: {name} .* there, .* asked for"):
            small(path, **changes)
    with pytest.raises(ValueError, match="episodes is 1, but the store .* already holds 2"):
        small(path, episodes=1)
    assert lewm.Dataset(path).fingerprint() == before


def test_an_empty_folder_is_a_place_for_a_store(tmp_path):
    assert len(small(tmp_path, episodes=1)) == 1


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises((lewm.StoreError, OSError)):
        small(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


# ------------------------------------------------------------------------------------------------------------ policy


def test_a_callable_policy(tmp_path):
    seen = []

    def leftwards(states, goals, rngs):
        seen.append((states.shape, goals.shape, len(rngs)))
        return np.tile([-1.0, 0.0], (len(states), 1))

    data = small(tmp_path / "a.lewm", policy=leftwards)
    assert seen[0] == ((6, 2), (6, 2), 6)
    assert (data[0].actions == [-1, 0]).all()
    assert data.metadata["policy"].endswith("leftwards")
    assert small(tmp_path / "b.lewm", policy=ExpertPolicy(0.5)).metadata["policy"].endswith("two_room.ExpertPolicy")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda states, goals, rngs: np.zeros((len(states), 3)), r"shape \(6, 3\), but must give \(6, 2\)"),
        (lambda states, goals, rngs: np.full((len(states), 2), np.nan), "NaN"),
        ("clever", "policy is 'clever'"),
        (None, "policy is None"),
    ],
)
def test_bad_policies(tmp_path, policy, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path / "bad.lewm", policy=policy)
    assert not (tmp_path / "bad.lewm").exists()


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes",
    [
        {"episodes": 0},
        {"episodes": 2.0},
        {"size": 4},
        {"seed": -1},
        {"max_steps": 0},
        {"num_envs": 0},
        {"env_kwargs": {"goal_rule": "near"}},
        {"env_kwargs": {"colour": "red"}},
        {"env_kwargs": {"size": 32}},
    ],
)
def test_bad_arguments(tmp_path, changes):
    name = next(iter(changes.get("env_kwargs", changes)))
    with pytest.raises((TypeError, ValueError), match=name):
        small(tmp_path / "bad.lewm", **changes)
    assert not (tmp_path / "bad.lewm").exists()


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("lewm/ThreeRoom-v0", "ThreeRoom.*gymnasium does not know"),
        ("HalfCheetah-v5", "HalfCheetah.*gymnasium cannot make here.*MuJoCo|HalfCheetah.*no vector form"),
        ("CartPole-v1", r"action space is Discrete\(2\)"),
        ("Pendulum-v1", "no vector form"),
        ("test/Odd-v0", "does not take what collect passes"),
    ],
)
def test_bad_environments(tmp_path, env_id, message, monkeypatch):
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    gymnasium.register("test/Odd-v0", "lewm.envs.two_room:TwoRoomEnv", vector_entry_point=lambda num_envs: None)
    with pytest.raises(ValueError, match=message):
        collect(env_id, tmp_path / "bad.lewm", episodes=1)
    assert not (tmp_path / "bad.lewm").exists()


def test_an_environment_without_an_expert(tmp_path, monkeypatch):
    monkeypatch.delattr(TwoRoomVectorEnv, "expert_policy")
    with pytest.raises(ValueError, match="use 'random' or a callable"):
        small(tmp_path / "bad.lewm")
    assert small(tmp_path / "good.lewm", policy="random").metadata["policy"] == "random"
