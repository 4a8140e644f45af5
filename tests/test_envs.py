"""What all environments have to do alike: gymnasium's checker finds nothing, and nothing is left behind."""

import gc
import os
import warnings

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from lewm import envs

envs.register()
LIMITS = {"lewm/TwoRoom-v0": 100, "lewm/PushT-v0": 100, "lewm/Reacher-v0": 200, "lewm/Cube-v0": 200}


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
