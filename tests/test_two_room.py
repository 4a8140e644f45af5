import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import lewm.envs
from lewm.envs.two_room import (
    DOOR,
    ExpertPolicy,
    TwoRoomEnv,
    TwoRoomVectorEnv,
    frame,
    render_states,
    step_states,
)

lewm.envs.register()  # gymnasium does it by itself where the package is installed


def step(state, action):
    return step_states(np.array([state], dtype=np.float64), np.array([action]))[0].tolist()


def official_picture(state):
    """The official 224-pixel picture, written per pixel: walls, border lines, a blended dot, rounded down."""
    y, x = np.mgrid[:224, :224].astype(np.float32)
    wall = (abs(x - 112) <= 5) & (abs(y - 49) > 14)
    for axis in (x, y):
        wall |= ((axis >= 10) & (axis < 14)) | ((axis >= 210) & (axis < 214))
    white = np.where(wall, np.float32(0), np.float32(255))
    dot = np.exp(-((x - np.float32(state[0])) ** 2 + (y - np.float32(state[1])) ** 2) / np.float32(98))
    dot /= dot.max()
    rest = white * (1 - dot)
    return np.stack([rest + 255 * dot, rest, rest], axis=-1).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------- dynamics


@pytest.mark.parametrize(
    ("state", "action", "after"),
    [
        ((50, 50), (1, -0.5), (55, 47.5)),  # 5 units per step and axis
        ((50, 50), (3, -7), (55, 45)),  # actions are clipped
        ((22, 202), (-1, 1), (21, 203)),  # the border
        ((14, 209), (0, 0), (21, 203)),  # a reset may start beyond what a step reaches
        ((96.25, 100), (0.75, 0), (100, 100)),  # up to the wall, not into it
        ((98, 100), (1, 0), (99.5, 100)),  # into the wall, from the left
        ((126, 100), (-1, 0), (124.5, 100)),  # and from the right
        ((127.75, 100), (-0.75, 0), (124, 100)),
        ((98, 49), (1, 0), (103, 49)),  # through the door
        ((110, 49), (1, 0), (115, 49)),
        ((115, 49), (-1, 0), (110, 49)),
        ((98, 64.75), (1, 0), (103, 64.75)),  # the door's last unit on either side
        ((98, 33.25), (1, 0), (103, 33.25)),
        ((98, 65), (1, -0.05), (103, 64.75)),  # decided by the y of arrival
        ((98, 64.75), (1, 0.25), (99.5, 66)),
        ((110, 64), (0, 1), (99.5, 69)),  # out of the door sideways: put back into the room it came from
        ((112, 64), (0, 1), (124.5, 69)),  # x = 112 counts as the right room
    ],
)
def test_step(state, action, after):
    assert step(state, action) == pytest.approx(after)


def test_step_leaves_its_input_alone():
    states = np.array([[98.0, 100.0]])
    step_states(states, np.array([[1.0, 0.0]]))
    assert states.tolist() == [[98.0, 100.0]]


@pytest.mark.parametrize(("x", "success"), [(66.0, False), (65.99, True), (66.01, False)])
def test_success_is_closer_than_16(x, success):
    env = TwoRoomEnv()
    env.reset(options={"state": [x, 100], "goal": [50, 100]})
    _, reward, terminated, truncated, info = env.step(np.zeros(2, np.float32))
    assert (terminated, info["success"], truncated, reward) == (success, success, False, 0.0)
    assert info["distance"] == pytest.approx(x - 50)


def test_thousand_random_steps_stay_in_reach():
    env = TwoRoomVectorEnv(100, obs_type="state", goal_rule="anywhere", autoreset_mode=AutoresetMode.DISABLED)
    _, before = env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        actions = rng.uniform(-1.5, 1.5, (100, 2))
        _, _, terminated, _, info = env.step(actions)
        x, y = info["state"].T
        assert ((info["state"] >= 21) & (info["state"] <= 203)).all()
        assert ((x <= 100) | (x >= 124) | ((y >= 33.25) & (y <= 64.75))).all()
        assert (terminated == (info["distance"] < 16)).all()
        crossed = (before["state"][:, 0] < 112) != (x < 112)
        assert (abs(y[crossed] - DOOR[1]) <= 15.75).all()
        before = info


# ------------------------------------------------------------------------------------------------------------- reset


def test_goals_lie_in_the_other_room_and_25_steps_away():
    env = TwoRoomVectorEnv(1000, obs_type="state")
    _, info = env.reset(seed=3)
    state, goal = info["state"], info["goal_state"]
    for place in (state, goal):
        assert ((place >= 14) & (place <= 209)).all()
        assert ((place[:, 0] < 100) | (place[:, 0] > 124)).all()
    assert ((state[:, 0] < 112) != (goal[:, 0] < 112)).all()
    path = np.linalg.norm(state - DOOR, axis=1) + np.linalg.norm(goal - DOOR, axis=1)
    assert path.min() >= 125
    assert path.min() < 130  # the bound is tight
    assert 0.4 < (state[:, 0] < 112).mean() < 0.6


def test_goals_anywhere():
    _, info = TwoRoomVectorEnv(2000, obs_type="state", goal_rule="anywhere").reset(seed=3)
    goal = info["goal_state"]
    assert 0.45 < ((info["state"][:, 0] < 112) == (goal[:, 0] < 112)).mean() < 0.55
    outside_reach = ((goal < 21) | (goal > 203)).any(axis=1).mean()
    assert 0.08 < outside_reach < 0.16  # measured on the official environment: 11.2 %


def test_options_set_state_and_goal():
    env = TwoRoomEnv(render_mode="rgb_array")
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(50):
        _, _, _, _, info = env.step(rng.uniform(-1, 1, 2))
        again = TwoRoomEnv()
        obs, there = again.reset(options={"state": info["state"], "goal": info["goal_state"]})
        assert (there["state"] == info["state"]).all()
        assert (there["goal_state"] == info["goal_state"]).all()
        np.testing.assert_array_equal(obs[:4], np.concatenate([info["state"], info["goal_state"]]).astype(np.float32))
    assert obs[4:].tolist() == [112, 49, 0, 0, 0, 0]
    _, info = env.reset(options={"state": [30, 40]})
    assert info["state"].tolist() == [30, 40]
    assert info["goal_state"][0] > 124  # drawn, in the other room


def test_options_of_the_vector_environment():
    env = TwoRoomVectorEnv(2, size=32)
    states, goals = np.array([[30.0, 40], [180, 90]]), np.array([[60.0, 70], [112, 100]])  # a goal may be in the wall
    obs, info = env.reset(options={"state": states, "goal": goals})
    np.testing.assert_array_equal(info["state"], states)
    np.testing.assert_array_equal(info["goal_state"], goals)
    np.testing.assert_array_equal(obs, render_states(states, 32))
    states[:] = 0  # the environment keeps its own copy
    assert (env.step(np.zeros((2, 2)))[4]["state"] == [[30, 40], [180, 90]]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": [1, 2, 3]}, r"'state'\] has shape \(3,\)"),
        ({"goal": [[1, 2]]}, r"'goal'\] has shape \(1, 2\)"),
        ({"state": [np.nan, 50]}, "between 14.0 and 210.0"),
        ({"goal": [50, 211]}, "between 14.0 and 210.0"),
        ({"state": [13, 50]}, "between 14.0 and 210.0"),
        ({"state": [112, 100]}, "in the wall"),
        ({"state": [100.5, 65]}, "in the wall"),
        ({"target": [50, 50]}, "unknown key 'target'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TwoRoomEnv().reset(options=options)
    batched = {key: [value] for key, value in options.items()}
    with pytest.raises(ValueError, match=message.replace("(3,)", "(1, 3)").split(" has shape")[0]):
        TwoRoomVectorEnv(1).reset(options=batched)


@pytest.mark.parametrize("action", [[0.0], [0, 0, 0], [[0, 0]], 0.0, [np.nan, 0], [0, np.inf]])
def test_bad_actions(action):
    env, vector = TwoRoomEnv(), TwoRoomVectorEnv(2)
    env.reset(seed=0)
    vector.reset(seed=0)
    with pytest.raises(ValueError, match="action"):
        env.step(action)
    with pytest.raises(ValueError, match="action"):
        vector.step([action, action])


def test_actions_of_another_number_of_environments():
    env = TwoRoomVectorEnv(2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 2\)"):
        env.step(np.zeros((3, 2)))


@pytest.mark.parametrize(
    "env", [TwoRoomEnv("rgb_array"), TwoRoomEnv("human"), TwoRoomVectorEnv(2, render_mode="rgb_array")]
)
def test_nothing_works_before_reset(env):
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(env.action_space.shape))
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.render()


@pytest.mark.parametrize(
    "settings",
    [{"size": 4}, {"size": 64.0}, {"obs_type": "rgb"}, {"goal_rule": "near"}, {"render_mode": "ansi"}],
)
def test_bad_settings(settings):
    for make in (TwoRoomEnv, TwoRoomVectorEnv):
        with pytest.raises(ValueError, match=next(iter(settings))):
            make(**settings)


@pytest.mark.parametrize(
    "settings", [{"num_envs": 0}, {"max_episode_steps": 0}, {"autoreset_mode": AutoresetMode.SAME_STEP}]
)
def test_bad_vector_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        TwoRoomVectorEnv(**settings)


# ----------------------------------------------------------------------------------------------------------- picture


def test_picture_is_the_official_one_at_224():
    states = np.random.default_rng(0).uniform(14, 210, (20, 2))
    difference = render_states(states).astype(int) - np.stack([official_picture(s) for s in states])
    assert abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.003


@pytest.mark.parametrize("size", [8, 32, 64, 112, 100])
def test_smaller_pictures_are_area_averages(size):
    states = np.random.default_rng(1).uniform(14, 210, (20, 2))
    big = render_states(states).astype(np.float64)
    edges = np.linspace(0, 224, size + 1)
    weights = np.clip(
        np.minimum(edges[1:, None], np.arange(224) + 1) - np.maximum(edges[:-1, None], np.arange(224)), 0, 1
    ) * (size / 224)
    averaged = (weights @ big.transpose(0, 3, 1, 2) @ weights.T).transpose(0, 2, 3, 1)
    difference = abs(render_states(states, size) - averaged)
    assert (difference < 2.5).mean() > 0.98  # the rest: pixels in which the dot touches a wall
    assert difference.mean() < 0.5


def test_pictures_do_not_depend_on_each_other():
    states = np.random.default_rng(2).uniform(0, 224, (70, 2))
    for size in (64, 65, 224):
        together = render_states(states, size)
        assert together.shape == (70, size, size, 3)
        assert together.dtype == np.uint8
        for i in range(0, 70, 9):
            np.testing.assert_array_equal(frame(states[i], size), together[i])
    assert render_states(states[:0], 64).shape == (0, 64, 64, 3)


def test_goal_is_not_drawn():
    env = TwoRoomEnv(render_mode="rgb_array", size=64)
    env.reset(options={"state": [50, 50], "goal": [150, 150]})
    np.testing.assert_array_equal(env.render(), frame([50, 50], 64))


@pytest.mark.parametrize("states", [[50, 50], [[50, 50, 1]], [[50, np.nan]], [[50, 225]], [[-1, 50]]])
def test_bad_states_to_draw(states):
    with pytest.raises(ValueError, match="states"):
        render_states(states, 64)


def test_human_mode_prints_a_picture(capsys):
    env = TwoRoomEnv(render_mode="human")
    env.reset(options={"state": [50, 50], "goal": [150, 160]})
    assert env.step([1, 0])[1] == 0.0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) == 2 * 17  # 32 rows of half blocks and a caption, twice
    assert lines[0].count("▀") == 32
    assert lines[16] == "agent  50.0  50.0   goal 150.0 160.0"
    assert lines[-1].startswith("agent  55.0  50.0")
    top, bottom = frame([50, 50], 32)[:2, 0].tolist()
    assert lines[0].startswith("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*top, *bottom))
    assert env.render() is None
    assert capsys.readouterr().out.count("▀") == 32 * 16


# --------------------------------------------------------------------------------------------------------- gymnasium


def test_make():
    env = gymnasium.make("lewm/TwoRoom-v0", obs_type="pixels", size=48)
    obs, info = env.reset(seed=5)
    assert obs in env.observation_space
    assert set(info) == {"state", "goal_state", "success", "distance"}
    assert (info["state"].dtype, info["state"].shape) == (np.float64, (2,))
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]


def test_make_vec():
    env = gymnasium.make_vec("lewm/TwoRoom-v0", num_envs=3, size=48)
    assert isinstance(env, TwoRoomVectorEnv)
    obs, _ = env.reset(seed=5)
    assert obs in env.observation_space
    assert env.max_episode_steps == 100
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    env.action_space.seed(0)
    obs, rewards, terminated, truncated, _ = env.step(env.action_space.sample())
    assert obs in env.observation_space
    assert rewards.shape == terminated.shape == truncated.shape == (3,)
    env.close()


def test_registering_is_light_and_repeatable():
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "import gymnasium, lewm; assert 'lewm/TwoRoom-v0' in gymnasium.registry\n"
        "lewm.envs.register()\n"
        "assert 'lewm.envs.two_room' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------------------------------- the vector form


@pytest.mark.parametrize("obs_type", ["pixels", "state"])
def test_vector_environment_is_n_single_ones(obs_type):
    vector = TwoRoomVectorEnv(5, obs_type=obs_type, size=32, autoreset_mode=AutoresetMode.DISABLED)
    singles = [TwoRoomEnv(obs_type=obs_type, size=32) for _ in range(5)]
    rng = np.random.default_rng(0)
    for episode in range(2):
        seeds = [7 + i if episode == 0 else None for i in range(5)]  # the second draw goes on with the generators
        obs, info = vector.reset(seed=seeds[0])
        alone = [env.reset(seed=seed) for env, seed in zip(singles, seeds, strict=True)]
        for _ in range(40):
            for i, (one, its_info) in enumerate(alone):
                np.testing.assert_array_equal(obs[i], one)
                for key, value in its_info.items():
                    np.testing.assert_array_equal(info[key][i], value)
            actions = rng.uniform(-1.2, 1.2, (5, 2)).astype(np.float32)
            obs, _, terminated, _, info = vector.step(actions)
            stepped = [env.step(action) for env, action in zip(singles, actions, strict=True)]
            assert terminated.tolist() == [one[2] for one in stepped]
            alone = [(one[0], one[4]) for one in stepped]


def test_vector_seeds():
    env = TwoRoomVectorEnv(3, obs_type="state")
    first = env.reset(seed=4)[1]["state"]
    np.testing.assert_array_equal(env.reset(seed=[4, 5, 6])[1]["state"], first)
    assert (env.reset()[1]["state"] != first).all()
    with pytest.raises(ValueError, match="2 entries"):
        env.reset(seed=[1, 2])


def test_next_step_autoreset():
    env = TwoRoomVectorEnv(2, obs_type="state", max_episode_steps=3)
    env.reset(seed=0, options={"state": [[50, 50], [50, 50]], "goal": [[70, 50], [180, 180]]})
    right = np.tile([1.0, 0.0], (2, 1))
    ends = []
    for _ in range(6):
        _, _, terminated, truncated, info = env.step(right)
        ends.append((terminated.tolist(), truncated.tolist()))
        state = info["state"]
        if len(ends) == 2:
            assert state[0].tolist() != [60, 50]  # started anew, without a move
            assert info["goal_state"][0].tolist() != [70, 50]
        if len(ends) == 3:
            assert state[1].tolist() == [65, 50]
    assert ends[0] == ([True, False], [False, False])
    assert ends[1] == ([False, False], [False, False])
    assert ends[2][1] == [False, True]
    assert ends[3] == ([False, False], [False, False])  # no move of environment 1 in this step
    assert ends[4][1] == [True, False]  # three steps after its new start


def test_disabled_autoreset_goes_on():
    env = TwoRoomVectorEnv(1, obs_type="state", max_episode_steps=2, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(options={"state": [[50, 50]], "goal": [[70, 50]]})
    seen = [env.step([[1, 0]])[2:] for _ in range(8)]
    assert [float(info["state"][0, 0]) for _, _, info in seen] == [55, 60, 65, 70, 75, 80, 85, 90]
    assert [bool(terminated[0]) for terminated, _, _ in seen] == [True] * 7 + [False]  # 5 to 35: until 16 away
    assert [bool(truncated[0]) for _, truncated, _ in seen] == [False] + [True] * 7


def test_vector_render():
    env = TwoRoomVectorEnv(2, size=32, obs_type="state", render_mode="rgb_array")
    _, info = env.reset(seed=0)
    pictures = env.render()
    assert isinstance(pictures, tuple)
    np.testing.assert_array_equal(np.stack(pictures), render_states(info["state"], 32))


# ------------------------------------------------------------------------------------------------------------ policy


def test_expert_goes_to_the_door_and_then_to_the_goal():
    states = np.array([[62.0, 49], [102, 49], [101, 49], [150, 100], [150, 100]])
    goals = np.array([[180.0, 120], [102, 180], [180, 49], [150, 180], [150, 100]])
    actions = ExpertPolicy(action_noise=0)(states, goals)
    assert actions.dtype == np.float32
    # to the door; in the same room to the goal; 11 away still to the door; to the goal; there
    np.testing.assert_allclose(actions, [[1, 0], [0, 1], [1, 0], [0, 1], [0, 0]], atol=1e-6)
    near = ExpertPolicy(action_noise=0)(np.array([[102.0, 49]]), np.array([[180.0, 153]]))  # 10 away: to the goal
    np.testing.assert_allclose(near, [[0.6, 0.8]], atol=1e-6)


def test_expert_noise():
    states, goals = np.full((4000, 2), 60.0), np.tile([60.0, 200.0], (4000, 1))
    actions = ExpertPolicy(seed=1)(states, goals)
    np.testing.assert_array_equal(actions, ExpertPolicy(seed=1)(states, goals))
    assert abs(actions).max() == 1
    # P(|N(0, 2)| >= 1) = .617 along x; P(N(1, 2) >= 1) = .5 along y
    assert (abs(actions[:, 0]) == 1).mean() == pytest.approx(0.617, abs=0.03)
    assert (actions[:, 1] == 1).mean() == pytest.approx(0.5, abs=0.03)
    alone = ExpertPolicy()(states[:1], goals[:1], [np.random.default_rng(9)])
    rngs = [np.random.default_rng(8), np.random.default_rng(9)]
    np.testing.assert_array_equal(ExpertPolicy()(states[:2], goals[:2], rngs)[1], alone[0])
    with pytest.raises(ValueError, match="action_noise"):
        ExpertPolicy(action_noise=-1)


def test_expert_episodes_are_like_the_papers():
    """Mean length 92 (paper); 90.9, success .42 and 89 % crossing were measured on the official environment."""
    count = 2000
    env = TwoRoomVectorEnv(count, obs_type="state", autoreset_mode=AutoresetMode.DISABLED)
    policy = ExpertPolicy(seed=0)
    _, info = env.reset(seed=0)
    home, lengths = info["state"][:, 0] < 112, np.full(count, 100)
    success, crossed = np.zeros(count, bool), np.zeros(count, bool)
    for step_number in range(1, 101):
        _, _, terminated, _, info = env.step(policy(info["state"], info["goal_state"]))
        crossed |= ~success & ((info["state"][:, 0] < 112) != home)
        lengths[terminated & ~success] = step_number
        success |= terminated
    assert 89 < lengths.mean() < 93
    assert 0.36 < success.mean() < 0.46
    assert 0.84 < crossed.mean() < 0.92
