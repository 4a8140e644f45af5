import sys

import numpy as np
import pytest

from lewm.envs.rendering import LOOKS, choose_gl

choose_gl()
mujoco = pytest.importorskip("mujoco")
ogbench = pytest.importorskip("ogbench.manipspace.envs.cube_env")

from gymnasium.vector import AutoresetMode

from lewm.envs.cube import CUBE, CUBE_QUATERNION, Cube, CubeEnv, CubeVectorEnv, ExpertPolicy


@pytest.fixture(scope="module", autouse=True)
def task():
    """Kept for the whole module, and with it the engine of the light look, which takes a second to make."""
    task = Cube()
    yield task
    task.close()


@pytest.fixture(scope="module")
def official():
    task = Cube("official")
    yield task
    task.close()


@pytest.fixture(scope="module")
def theirs():
    """ogbench's own environment, drawing as stable-worldmodel has it draw."""
    env = ogbench.CubeEnv(
        "single",
        ob_type="pixels",
        pixel_transparent_arm=False,
        visualize_info=False,
        mode="data_collection",
        width=64,
        height=64,
    )
    env._mjcf_model = env.build_mjcf_model()
    env._ob_type = "states"  # a reset shall not draw
    env.reset(seed=0)
    yield env
    if env._renderer is not None:
        env._renderer.close()


@pytest.fixture(scope="module")
def episode(task):
    """States (121, 48) and actions (120, 5) of an expert that grasps, carries and places, and the goal."""
    rng = np.random.default_rng(3)
    policy = ExpertPolicy(action_noise=0)
    policy.begin(1)
    state = task.draw_state(rng)
    goal = task.draw_goal(rng, state)
    task.set_state(state)
    states, actions = [state], []
    for _ in range(120):
        action = policy(states[-1][None], goal[None], [rng])[0]
        task.step(action.astype(np.float64))
        actions.append(action)
        states.append(task.get_state())
    return np.array(states), np.array(actions), goal


def run(task, state, actions):
    """The states (T + 1, 48) from a state on."""
    task.set_state(state)
    states = [task.get_state()]
    for action in actions:
        task.step(action.astype(np.float64))
        states.append(task.get_state())
    return np.array(states)


def draw(task, size):
    """The picture, or skips where nothing can be drawn."""
    try:
        return task.render(size)
    except OSError as error:
        pytest.skip(str(error))


# ------------------------------------------------------------------------------------------------------------ dynamics


def test_a_state_that_is_set_is_there(task, episode):
    for state in episode[0][::10]:
        task.set_state(state)
        np.testing.assert_array_equal(task.get_state(), state)
        assert task.check_state(state) is None


def test_states_go_on_as_they_did(task, official, episode):
    states, actions, _ = episode
    lifted = int(states[:, CUBE.start + 2].argmax())  # in the gripper, the hardest to go on from
    for other in (task, official):  # to the bit; the coarse meshes of the light look are only seen
        for start in (0, lifted):
            again = run(other, states[start], actions[start : start + 15])
            np.testing.assert_array_equal(again, states[start : start + 16])


def test_tasks_that_share_an_engine_do_not_meet(task, episode):
    states, actions, _ = episode
    other = Cube()
    assert other._engine is task._engine
    task.set_state(states[40])
    other.set_state(states[80])
    for step in range(10):
        task.step(actions[40 + step].astype(np.float64))
        other.draw_state(np.random.default_rng(step))  # leaves no trace either
        other.step(actions[80 + step].astype(np.float64))
        np.testing.assert_array_equal(task.get_state(), states[41 + step])
        np.testing.assert_array_equal(other.get_state(), states[81 + step])


def test_a_step_from_a_state_is_ogbenchs(theirs, episode):
    states, actions, _ = episode
    for before, after, action in list(zip(states[:-1], states[1:], actions, strict=True))[::4]:
        mujoco.mj_resetData(theirs.model, theirs.data)
        theirs.data.ctrl[:] = before[41:]
        theirs.set_state(before[:21], before[21:41])
        theirs.step(action.astype(np.float64))
        np.testing.assert_array_equal([*theirs.data.qpos, *theirs.data.qvel, *theirs.data.ctrl], after)


def test_episodes_stay_near_ogbenchs(theirs, episode):
    states, actions, _ = episode
    mujoco.mj_resetData(theirs.model, theirs.data)
    theirs.set_state(states[0, :21], states[0, 21:41])
    apart = []
    for after, action in zip(states[1:], actions, strict=True):
        theirs.step(action.astype(np.float64))  # plans from where the arm was 2 ms ago, and keeps the solver's forces
        apart.append(np.linalg.norm(theirs.data.qpos[CUBE] - after[CUBE]))
    assert max(apart) < 0.04


def test_a_step_is_50_ms(task):
    assert Cube.seconds == pytest.approx(task._engine.env.control_timestep())
    assert task._engine.model.opt.timestep * 25 == pytest.approx(Cube.seconds)
    assert CubeEnv.metadata["render_fps"] == 20


def test_actions_move_the_gripper(task):
    state = task.draw_state(np.random.default_rng(1))

    def gripper(states):
        return np.array([task.expert_info(each, np.zeros(3), 0.0)["proprio/effector_pos"] for each in states])

    for axis, sign in ((0, 1), (1, -1), (2, -1)):
        action = np.zeros((4, 5))
        action[:, axis] = sign
        moved = np.diff(gripper(run(task, state, action)[[0, -1]]), axis=0)[0]
        assert abs(moved).argmax() == axis
        assert np.sign(moved[axis]) == sign
    closed = run(task, state, np.tile([0.0, 0, 0, 0, 1], (8, 1)))[-1]
    assert closed[6] > state[6] + 0.3


def test_actions_beyond_the_bounds_are_clipped():
    env = CubeEnv()
    ends = []
    for action in ([3.0, -7.0, 2, 5, -2], [1.0, -1.0, 1, 1, -1]):
        env.reset(seed=0)
        ends.append(env.step(action)[4]["state"])
    np.testing.assert_array_equal(*ends)
    env.close()


# ------------------------------------------------------------------------------------------------------------- success


@pytest.mark.parametrize(
    ("offset", "success"),
    [
        ((0, 0, 0), True),
        ((0.0399, 0, 0), True),
        ((0.0401, 0, 0), False),
        ((0.03, 0.03, 0), False),
        ((0, 0, 0.05), False),
    ],
)
def test_success_is_the_cube_within_4_cm(task, offset, success):
    state, goal = task.draw_state(np.random.default_rng(0)), task.draw_state(np.random.default_rng(1))
    goal[CUBE] = state[CUBE] + offset
    goal[CUBE_QUATERNION] = [0, 0, 0, 1]  # how it is turned does not count, nor where the arm is
    assert task.success(state, goal) is success
    assert task.distance(state, goal) == pytest.approx(np.linalg.norm(offset))


def test_success_is_ogbenchs(task, theirs, episode):
    states, _, goal = episode
    found = []
    for state in states:
        theirs.data.qpos[:] = state[:21]
        theirs.data.mocap_pos[0] = goal[CUBE]
        found.append(theirs._compute_successes() == [True])
    assert found == [task.success(state, goal) for state in states]
    assert True in found
    assert False in found


# --------------------------------------------------------------------------------------------------------- what starts


def test_starts_and_goals_are_ogbenchs(task):
    rng = np.random.default_rng(0)
    states = np.array([task.draw_state(rng) for _ in range(60)])
    goals = np.array([task.draw_goal(rng, states[0]) for _ in range(20)])
    low, high = np.array([0.3, -0.3]), np.array([0.55, 0.3])
    for drawn in (states, goals):
        place = drawn[:, CUBE]
        assert ((place[:, :2] >= low) & (place[:, :2] <= high)).all()
        assert (place[:, :2].max(axis=0) - place[:, :2].min(axis=0) > 0.7 * (high - low)).all()
        np.testing.assert_allclose(place[:, 2], 0.02)
        assert not drawn[:, 21:41].any()
        assert len(np.unique(drawn[:, 0])) == len(drawn)  # the arm is somewhere else each time
    assert all(task.check_state(state) is None for state in states)


def test_seeds():
    env = CubeEnv()
    first, then, again = env.reset(seed=3)[1], env.reset()[1], env.reset(seed=3)[1]
    np.testing.assert_array_equal(first["state"], again["state"])
    np.testing.assert_array_equal(first["goal_state"], again["goal_state"])
    assert (then["state"][CUBE][:2] != first["state"][CUBE][:2]).all()
    env.close()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(0, 7.0, "joint"), (14, 2.0, "the cube must be between"), (17, 3.0, "norm 1"), (21, 101.0, "velocities")],
)
def test_bad_states(task, place, value, message):
    env = CubeEnv()
    state = task.draw_state(np.random.default_rng(0))
    state[place] = value
    with pytest.raises(ValueError, match=message):
        env.reset(options={"state": state})
    env.close()


def test_a_missing_package_is_the_line_that_installs_it(task, monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(ModuleNotFoundError, match=r'Cube-v0 needs ogbench.*pip install "lewm-fast\[envs\]"$'):
        type(task._engine).make("light")


def test_factors(episode):
    factors = Cube.factors(episode[0])
    assert {name: values.shape[1] for name, values in factors.items()} == {"cube": 3, "arm": 12, "gripper": 1}


# ------------------------------------------------------------------------------------------------------------ pictures


def test_official_pictures_are_ogbenchs(official, theirs, episode):
    state = episode[0][60]
    mujoco.mj_resetData(theirs.model, theirs.data)
    theirs.data.ctrl[:] = state[41:]
    theirs.set_state(state[:21], state[21:41])
    theirs._ob_type = "pixels"
    official.set_state(state)
    np.testing.assert_array_equal(draw(official, 64), theirs.render())
    theirs._ob_type = "states"


def test_light_pictures_show_the_same_scene(task, official, episode):
    assert LOOKS == ("light", "official")
    for at in (0, 60):
        task.set_state(episode[0][at])
        official.set_state(episode[0][at])
        light, full = draw(task, 64).astype(float), draw(official, 64).astype(float)
        assert light.std() > 20
        assert abs(light - full).mean() < 20
        assert np.corrcoef(light.ravel(), full.ravel())[0, 1] > 0.8
        red = [(look[..., 0] > 2 * look[..., 1]) & (look[..., 0] > 80) for look in (light, full)]
        assert red[0].sum() >= 4  # the cube can be seen
        assert abs(np.argwhere(red[0]).mean(axis=0) - np.argwhere(red[1]).mean(axis=0)).max() < 2
    assert draw(task, 224).shape == (224, 224, 3)


def test_a_light_look_has_fewer_faces(task, official):
    assert task._engine.model.mesh_facenum.sum() < 0.2 * official._engine.model.mesh_facenum.sum()


def test_the_goal_is_not_drawn(task, episode):
    states, _, goal = episode
    task.set_state(states[0])
    before = draw(task, 64)
    task.expert_info(states[0], goal[CUBE], 0.0)  # puts the engine's target somewhere else
    np.testing.assert_array_equal(draw(task, 64), before)


# ----------------------------------------------------------------------------------------------------------- gymnasium


def test_vector_is_single_ones():
    vector = CubeVectorEnv(2, obs_type="state", workers=0)
    _, info = vector.reset(seed=5)
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 2, 5)).astype(np.float32)
    after = [vector.step(action)[4]["state"] for action in actions]
    for i in range(2):
        env = CubeEnv()
        _, alone = env.reset(seed=5 + i)
        np.testing.assert_array_equal(alone["goal_state"], info["goal_state"][i])
        for step in range(3):
            np.testing.assert_array_equal(env.step(actions[step, i])[4]["state"], after[step][i])
        env.close()
    vector.close()


# -------------------------------------------------------------------------------------------------------------- expert


def test_expert_brings_the_cube_to_the_goal():
    env = CubeVectorEnv(4, obs_type="state", workers=0, autoreset_mode=AutoresetMode.DISABLED)
    _, info = env.reset(seed=0)
    policy = env.expert_policy()
    policy.begin(4)
    rngs = [np.random.default_rng(i) for i in range(4)]
    success, lifted = np.zeros(4, bool), np.zeros(4, bool)
    for _ in range(90):
        actions = policy(info["state"], info["goal_state"], rngs)
        assert actions.dtype == np.float32
        assert abs(actions).max() <= 1
        info = env.step(actions)[4]
        success |= info["success"]
        lifted |= info["state"][:, CUBE.start + 2] > 0.06
    assert success.mean() >= 0.75
    assert lifted.all()
    env.close()


def test_expert_takes_up_another_place_after_a_placement(task):
    """stable-worldmodel sets the same place again: after its first success the arm only wanders."""
    rng = np.random.default_rng(4)
    policy = ExpertPolicy(action_noise=0)
    policy.begin(1)
    state = task.draw_state(rng)
    goal = task.draw_goal(rng, state)
    task.set_state(state)
    places, moving = [], []
    for step in range(260):
        before = task.get_state()
        action = policy(before[None], goal[None], [rng])[0]
        task.step(action.astype(np.float64))
        if not places or (policy._jobs[0].place != places[-1]).any():
            places.append(policy._jobs[0].place.copy())
        moving.append(step > 130 and abs(task.get_state()[CUBE] - before[CUBE]).max() > 0.01)
    np.testing.assert_array_equal(places[0], goal[CUBE])
    assert len(places) >= 3
    assert any(moving)
    for place in places[1:]:
        assert (place >= [0.3, -0.3, 0.02]).all()
        assert (place <= [0.55, 0.3, 0.02]).all()


def test_expert_draws_from_each_rows_generator(task):
    states = np.array([task.draw_state(np.random.default_rng(i)) for i in range(3)])
    goals = states[::-1].copy()

    def actions(rows):
        np.random.seed(len(rows))  # noqa: NPY002 (what ogbench's oracle draws from, and this must not)
        policy = ExpertPolicy()
        rngs = [np.random.default_rng(10 + i) for i in rows]
        return np.array([policy(states[rows], goals[rows], rngs) for _ in range(3)])

    np.testing.assert_array_equal(actions([0, 1, 2])[:, 1:], actions([1, 2]))
    with pytest.raises(ValueError, match="action_noise must be at least 0, got -1"):
        ExpertPolicy(action_noise=-1)
