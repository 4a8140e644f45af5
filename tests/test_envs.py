"""What all environments have to do alike: gymnasium's checker finds nothing, and nothing is left behind."""

import gc
import os
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from lewm import envs

envs.register()
LIMITS = {"lewm/TwoRoom-v0": 100, "lewm/PushT-v0": 100, "lewm/Reacher-v0": 200, "lewm/Cube-v0": 200}
# Of the simulators: where to start, which numbers of a state a teleport moves, bounds of actions, how far it may go.
START = {
    "lewm/TwoRoom-v0": (60, 90),
    "lewm/PushT-v0": (100, 120, 300, 280, 1, 20, -10),
    "lewm/Reacher-v0": (1, 2, 3, 4),
}
MOVES = {
    "lewm/TwoRoom-v0": np.arange(2),
    "lewm/PushT-v0": np.arange(4),
    "lewm/Reacher-v0": np.arange(2),
    "lewm/Cube-v0": np.array([*range(14, 21), *range(35, 41)]),
}
ACTIONS = {env_id: (-np.ones(5 if "Cube" in env_id else 2), np.ones(5 if "Cube" in env_id else 2)) for env_id in MOVES}
SPREAD = {"lewm/TwoRoom-v0": 195, "lewm/PushT-v0": 400, "lewm/Reacher-v0": 5.5, "lewm/Cube-v0": 0.25}


@pytest.fixture(params=LIMITS)
def make(request):
    """Makes one of the environments, or skips where it cannot draw."""

    def made(**settings):
        try:
            env = gymnasium.make(request.param, size=32, **settings)
            env.reset(seed=0)
            env.unwrapped.render()
        except (ModuleNotFoundError, OSError) as error:  # the extra or a GL library is not there
            pytest.skip(str(error))
        return env

    return made


@pytest.mark.parametrize("obs_type", ["state", "pixels"])
def test_gymnasium_has_no_complaint(make, obs_type, capsys):
    env = make(obs_type=obs_type, render_mode="rgb_array")
    assert env.spec.max_episode_steps == LIMITS[env.spec.id]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    env.close()
    assert "▀" in capsys.readouterr().out  # it draws in every mode, "human" too


def test_the_state_space_can_be_sampled_and_holds_what_is_far_out(make):
    env = make(render_mode="rgb_array")
    space = env.observation_space
    assert space.is_bounded()
    space.seed(0)
    assert space.contains(space.sample())
    for _ in range(300):  # PushT's agent leaves the picture, the reacher's shoulder turns on
        observation, *_ = env.unwrapped.step(env.action_space.high)
        assert space.contains(observation)
    env.close()


def test_a_thousand_resets_and_steps_keep_memory_flat(make):
    env = make(render_mode="rgb_array").unwrapped
    env.action_space.seed(0)

    def work(times):
        for i in range(times):
            env.reset(seed=i)
            env.step(env.action_space.sample())
            if i % 10 == 0:
                env.render()

    work(200)
    before = resident()
    work(1000)
    assert resident() - before < 4 * 2**20
    env.close()


def resident():
    """Bytes of memory of this process."""
    gc.collect()
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        pytest.skip("no /proc here")


@pytest.fixture(params=LIMITS, scope="module")
def simulator(request):
    """What moves and draws one of the environments, or skips where it cannot."""
    try:
        made = envs.simulator(request.param)
        made.start = np.array(START[request.param], float) if request.param in START else made.get_state()
        made.set_state(made.start)
        made.render(64)
    except (ModuleNotFoundError, OSError) as error:
        pytest.skip(str(error))
    made.env_id = request.param
    yield made
    made.close()


def test_a_recoloured_object_is_elsewhere_no_different(simulator):
    simulator.set_state(simulator.start)
    before = simulator.render(64)
    other = envs.simulator(simulator.env_id)
    simulator.recoloured = True
    recoloured = simulator.render(64)
    other.set_state(simulator.get_state())
    np.testing.assert_array_equal(other.render(64), before)  # also where both share an engine
    simulator.recoloured = False
    np.testing.assert_array_equal(simulator.render(64), before)
    changed = (recoloured != before).any(axis=-1)
    assert 0 < changed.mean() < 0.2
    dark, light = before[changed].astype(int), recoloured[changed].astype(int)
    assert np.abs(dark - light).max() > 60  # another hue, not another shade
    other.close()


def test_what_is_teleported_is_somewhere_valid_and_the_rest_stays(simulator):
    start, moves, places = simulator.start, MOVES[simulator.env_id], []
    for seed in range(20):
        state = simulator.teleported(start, np.random.default_rng(seed))
        np.testing.assert_array_equal(state, simulator.teleported(start, np.random.default_rng(seed)))
        stays = np.setdiff1d(np.arange(len(start)), moves)
        np.testing.assert_array_equal(state[stays], start[stays])
        if hasattr(simulator, "check_state"):
            assert simulator.check_state(state) is None
        else:
            gymnasium.make(simulator.env_id).reset(options={"state": state})  # refuses what is in the wall
        simulator.set_state(state)
        low, high = ACTIONS[simulator.env_id]
        simulator.step(np.random.default_rng(seed).uniform(low, high))
        assert np.isfinite(simulator.get_state()).all()
        assert np.abs(simulator.get_state()[moves[:2]] - state[moves[:2]]).max() < 30  # nothing explodes
        places.append(state[moves[:2]])
    assert np.ptp(places, axis=0).min() > 0.5 * SPREAD[simulator.env_id]


def test_a_teleported_cube_touches_the_floor_alone():
    pytest.importorskip("ogbench")
    cube = envs.simulator("lewm/Cube-v0")
    start = cube.draw_state(np.random.default_rng(3))
    for seed in range(20):
        state = cube.teleported(start, np.random.default_rng(seed))
        cube.set_state(state)
        for _ in range(3):
            cube.step(np.zeros(5))
        assert np.linalg.norm(cube.get_state()[14:17] - state[14:17]) < 0.01  # it lies where it was put


def test_there_are_simulators_of_these_environments_alone():
    with pytest.raises(ValueError, match=r"env_id must be one of lewm/TwoRoom-v0, .*, got 'lewm/No-v0'"):
        envs.simulator("lewm/No-v0")
