import gc
import sys

import gymnasium
import numpy as np
import pytest

from lewm.envs.rendering import LOOKS, _engines, choose_gl
from lewm.envs.task import clipped

choose_gl()
mujoco = pytest.importorskip("mujoco")

from gymnasium.vector import AutoresetMode

from lewm.envs.reacher import WRIST_LIMIT, ExpertPolicy, Reacher, ReacherEnv, ReacherVectorEnv


@pytest.fixture
def task():
    task = Reacher()
    yield task
    task.close()


@pytest.fixture
def picture():
    """Draws a state, or skips where nothing can be drawn."""

    def draw(look, state, size):
        task = Reacher(look)
        task.set_state(np.asarray(state, dtype=np.float64))
        try:
            return task.render(size)
        except OSError as error:
            pytest.skip(str(error))
        finally:
            task.close()

    return draw


def drawn(task, seed, moving=True):
    """A state (4,), usually one that moves."""
    rng = np.random.default_rng(seed)
    state = task.draw_state(rng)
    state[2:] = rng.normal(size=2) * 3 * moving
    return state


def run(task, state, actions):
    """The states (T + 1, 4) from a state on."""
    task.set_state(state)
    states = [task.get_state()]
    for action in actions:
        task.step(action)
        states.append(task.get_state())
    return np.array(states)


# ------------------------------------------------------------------------------------------------------------ dynamics


def test_a_state_that_is_set_is_there(task):
    for seed in range(20):
        state = drawn(task, seed)
        task.set_state(state)
        np.testing.assert_array_equal(task.get_state(), state)
        state[:] = 0  # the task keeps its own copy
        assert task.get_state().any()


def test_states_go_on_as_they_did(task):
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 2))
    states = run(task, drawn(task, 0), actions)
    for start in (0, 7, 30):
        again = run(Reacher("official"), states[start], actions[start:])
        np.testing.assert_array_equal(again, states[start:])  # to the bit, and whatever the look


def test_tasks_that_share_an_engine_do_not_meet(task):
    other = Reacher()
    assert other._engine is task._engine
    actions = np.random.default_rng(1).uniform(-1, 1, (2, 30, 2))
    starts = [np.array([0.3, 2.7, 1.0, 4.0]), drawn(task, 5)]  # the first one pushes the wrist's limit
    alone = [run(task, *each) for each in zip(starts, actions, strict=True)]
    task.set_state(starts[0])
    other.set_state(starts[1])
    for step in range(30):
        task.step(actions[0, step])
        other.step(actions[1, step])
        np.testing.assert_array_equal(task.get_state(), alone[0][step + 1])
        np.testing.assert_array_equal(other.get_state(), alone[1][step + 1])
    assert alone[0][:, 1].max() > WRIST_LIMIT


@pytest.fixture
def suite():
    """The physics of dm_control's reacher, without its target, as stable-worldmodel uses it."""
    choose_gl()
    physics = pytest.importorskip("dm_control.suite").load("reacher", "hard", task_kwargs={"random": 0}).physics
    physics.named.model.mat_rgba["target"] = [0.6, 0.3, 0.3, 0]
    yield physics
    physics.free()


def put(physics, state):
    with physics.reset_context():
        physics.data.qpos[:], physics.data.qvel[:] = state[:2], state[2:]


def test_states_are_those_of_dm_control(task, suite):
    rng = np.random.default_rng(2)
    pushed = 0.0
    for seed in range(8):
        state = drawn(task, seed, moving=seed % 2)
        held = np.repeat(rng.uniform(-1, 1, (20, 2)), 10, axis=0)  # long enough to reach the wrist's limit
        actions = rng.uniform(-1, 1, (200, 2)) if seed < 4 else held
        states = run(task, state, actions)
        put(suite, state)
        for after, action in zip(states[1:], actions, strict=True):
            suite.set_control(action)
            suite.step(2)
            np.testing.assert_allclose(after, [*suite.data.qpos, *suite.data.qvel], rtol=0, atol=1e-12)
        pushed = max(pushed, abs(states[:, 1]).max())
    assert WRIST_LIMIT < pushed < WRIST_LIMIT + 0.5  # which check_state allows


def test_a_step_is_40_ms(task):
    assert Reacher.seconds == 2 * task._engine.model.opt.timestep
    assert ReacherEnv.metadata["render_fps"] == 25
    state = np.array([0.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(run(task, state, np.zeros((5, 2)))[-1], state, atol=1e-12)  # no gravity in the plane


def test_actions_beyond_the_bounds_are_clipped():
    env = ReacherEnv()
    ends = []
    for action in ([3.0, -7.0], [1.0, -1.0]):
        env.reset(options={"state": [0, 0, 0, 0]})
        ends.append(env.step(action)[4]["state"])
    np.testing.assert_array_equal(*ends)
    assert clipped(env.task, [3.0, -7.0], (2,)).tolist() == [1, -1]
    env.close()


# ------------------------------------------------------------------------------------------------------------- success


@pytest.mark.parametrize(
    ("difference", "success"),
    [
        ((0, 0), True),
        ((0.0499, -0.0499), True),
        ((0.05, 0), False),  # less than, as the official test
        ((0, -0.0501), False),
        ((0.06, 0.01), False),
        ((2 * np.pi, 0), False),  # not wrapped
    ],
)
def test_success_is_both_joints_within_a_twentieth_rad(task, difference, success):
    state, goal = np.zeros(4), np.array([*difference, 9.0, -9.0])  # the goal's velocities do not count
    assert task.success(state, goal) is success
    assert task.distance(state, goal) == pytest.approx(max(np.abs(difference)))


def test_success_ends_an_episode():
    env = ReacherEnv()
    env.reset(options={"state": [1, 1, 0, 0], "goal": [1.04, 1, 0, 0]})
    _, reward, terminated, truncated, info = env.step([0, 0])
    assert (reward, terminated, truncated, info["success"]) == (0.0, True, False, True)
    assert info["distance"] == pytest.approx(0.04)
    env.close()


# --------------------------------------------------------------------------------------------------------- what starts


def test_starts_and_goals_are_the_suites(task):
    rng = np.random.default_rng(0)
    states = np.array([task.draw_state(rng) for _ in range(4000)])
    goals = np.array([task.draw_goal(rng, states[0]) for _ in range(4000)])
    for drawn in (states, goals):
        assert not drawn[:, 2:].any()
        low, high = drawn[:, :2].min(axis=0), drawn[:, :2].max(axis=0)
        np.testing.assert_allclose(low, [-np.pi, -WRIST_LIMIT], atol=0.02)
        np.testing.assert_allclose(high, [np.pi, WRIST_LIMIT], atol=0.02)
        np.testing.assert_allclose(drawn[:, :2].std(axis=0), np.array([np.pi, WRIST_LIMIT]) / 3**0.5, rtol=0.03)
    assert task.check_state(states[0]) is None


def test_seeds():
    env = ReacherEnv()
    first = env.reset(seed=3)[1]
    then = env.reset()[1]
    again = env.reset(seed=3)[1]
    np.testing.assert_array_equal(first["state"], again["state"])
    np.testing.assert_array_equal(first["goal_state"], again["goal_state"])
    assert (then["state"][:2] != first["state"][:2]).all()
    assert (env.reset(seed=4)[1]["state"][:2] != first["state"][:2]).all()
    env.close()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([0, 3.4, 0, 0], "wrist must be within 3.29 rad"),
        ([0, 0, 51, 0], "velocities must be within 50 rad/s"),
        ([0, 0, 0, np.nan], "not finite"),
        ([0, 0], r"shape \(4,\)"),
    ],
)
def test_bad_states(state, message):
    env = ReacherEnv()
    with pytest.raises(ValueError, match=message):
        env.reset(options={"state": state})
    env.close()


def test_unknown_look():
    with pytest.raises(ValueError, match=r"look must be one of light, official, got 'dark'"):
        Reacher(look="dark")


def test_a_missing_package_is_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ModuleNotFoundError, match=r'Reacher-v0 needs mujoco.*pip install "lewm-fast\[envs\]"$'):
        ReacherEnv()


def test_factors(task):
    states = np.array([drawn(task, seed) for seed in range(5)])
    factors = Reacher.factors(states)
    assert {name: values.shape for name, values in factors.items()} == {
        "shoulder": (5, 2),
        "wrist": (5, 2),
        "finger": (5, 2),
        "velocity": (5, 2),
    }
    np.testing.assert_allclose(np.arctan2(*factors["wrist"].T), states[:, 1])
    for state, finger in zip(states, factors["finger"], strict=True):
        task.set_state(state)
        task._place()
        np.testing.assert_allclose(finger, task._engine.data.geom("finger").xpos[:2], atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("size", [64, 224])
def test_official_pictures_are_those_of_dm_control(picture, suite, size):
    states = [drawn(Reacher(), seed) for seed in range(2)]
    theirs = []  # all of theirs first: dm_control does not notice when another context has become the current one
    for state in states:
        put(suite, state)
        theirs.append(suite.render(size, size, camera_id=0))
    for state, their in zip(states, theirs, strict=True):
        np.testing.assert_array_equal(picture("official", state, size), their)


@pytest.mark.parametrize("look", LOOKS)
def test_pictures_show_the_arm(picture, look):
    here, there = (picture(look, state, 64) for state in ([0.5, 0.5, 0, 0], [-2, 1, 0, 0]))
    assert here.std() > 10
    assert (here != there).any(axis=-1).mean() > 0.02
    np.testing.assert_array_equal(picture(look, [0.5, 0.5, 3, -3], 64), here)  # velocities cannot be seen
    np.testing.assert_array_equal(picture(look, [0.5, 0.5, 0, 0], 64), here)
    # The arm is brown where the finger is, in a top view of 0.62 m; the floor is blue.
    x, y = Reacher.factors(np.array([[0.5, 0.5, 0, 0]]))["finger"][0] / 0.62
    finger = here[int((0.5 - y) * 64), int((0.5 + x) * 64)].astype(int)
    assert finger[0] > finger[2]


def test_a_light_picture_shows_the_same_scene(picture):
    state = [0.5, 0.5, 0, 0]
    light, official = (picture(look, state, 64).astype(float) for look in LOOKS)
    assert (light != official).any()
    brown = [look[..., 0] > look[..., 2] for look in (light, official)]
    assert (brown[0] & brown[1]).sum() > 0.8 * max(b.sum() for b in brown)


# ----------------------------------------------------------------------------------------------------------- gymnasium


def test_make_vec(picture):
    picture("light", [0, 0, 0, 0], 32)
    vector = gymnasium.make_vec("lewm/Reacher-v0", num_envs=3, size=32, workers=0)
    assert isinstance(vector, ReacherVectorEnv)
    frames, info = vector.reset(seed=5)
    assert frames.shape == (3, 32, 32, 3)
    for i in range(3):
        env = ReacherEnv(obs_type="pixels", size=32)
        frame, alone = env.reset(seed=5 + i)
        np.testing.assert_array_equal(frame, frames[i])
        np.testing.assert_array_equal(alone["state"], info["state"][i])
        env.close()
    vector.close()


def test_engines_go_with_the_last_task():
    tasks = [Reacher(), Reacher()]
    key = (type(tasks[0]._engine), "light")
    gc.collect()
    tasks[0].close()
    assert key in _engines
    tasks[1].close()
    assert key not in _engines


# -------------------------------------------------------------------------------------------------------------- expert


def follow(policy, count, steps, seed=0):
    """States (steps + 1, N, 4) and actions under the expert, which goes on after success, and the goals."""
    env = ReacherVectorEnv(count, obs_type="state", workers=0, autoreset_mode=AutoresetMode.DISABLED)
    _, info = env.reset(seed=seed)
    policy.begin(count)
    rngs = [np.random.default_rng([seed, i]) for i in range(count)]
    states, actions = [info["state"]], []
    for _ in range(steps):
        actions.append(policy(info["state"], info["goal_state"], rngs))
        info = env.step(actions[-1])[4]
        states.append(info["state"])
    env.close()
    return np.array(states), np.array(actions), info["goal_state"]


def test_expert_reaches_the_goal():
    states, actions, goals = follow(ExpertPolicy(action_noise=0), 40, 60)
    reached = (abs(states[..., :2] - goals[:, :2]) < 0.05).all(axis=-1)
    assert reached.any(axis=0).mean() > 0.9
    assert np.median(reached.argmax(axis=0)) < 25
    assert actions.dtype == np.float32
    assert abs(actions).max() <= 1


def test_expert_goes_on_from_posture_to_posture():
    moves = {}
    for name, policy in (("expert", ExpertPolicy()), ("random", ExpertPolicy(action_noise=100))):
        states, _, _ = follow(policy, 20, 150)
        late = states[60:]  # an expert that rests at its goal would be there by now
        moves[name] = np.median(abs(late[25:, :, :2] - late[:-25, :, :2]), axis=(0, 1))
    assert (moves["expert"] > 0.8).all()
    assert (moves["expert"] > 1.5 * moves["random"]).all()


def test_expert_draws_from_each_rows_generator():
    states, actions, _ = follow(ExpertPolicy(), 6, 80)
    again = follow(ExpertPolicy(), 6, 80)
    np.testing.assert_array_equal(again[0], states)
    fewer = follow(ExpertPolicy(), 3, 80)
    np.testing.assert_array_equal(fewer[1], actions[:, :3])
    with pytest.raises(ValueError, match="action_noise must be at least 0, got -1"):
        ExpertPolicy(action_noise=-1)


def test_expert_forgets_with_begin():
    policy = ExpertPolicy(action_noise=0)
    goals = np.array([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    first = policy(np.zeros((1, 4)), goals[:1])
    assert first[0, 0] == 1
    assert policy(np.zeros((1, 4)), goals[1:])[0, 0] == 1  # still at the first goal of its episode
    policy.begin(1)
    assert policy(np.zeros((1, 4)), goals[1:])[0, 0] == -1
