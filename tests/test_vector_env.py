"""Environments of a task by the many: the same in this process and in workers as one at a time."""

import os
import signal

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from lewm.collector import generate
from lewm.envs.task import Task, TaskEnv
from lewm.envs.vector import TaskVectorEnv

OFF, NEXT = AutoresetMode.DISABLED, AutoresetMode.NEXT_STEP


class Walk(Task):
    """A number that actions move, and a memory of the last action that only a simulator has."""

    name, unit, state_dim, seconds = "Walk", "steps", 2, 1.0
    action_low, action_high = np.full(1, -1.0, np.float32), np.full(1, 1.0, np.float32)

    def __init__(self, drift: float = 0.0, fail: str = ""):
        self.drift, self.fail = drift, fail
        if fail == "make":
            raise ValueError("fail must not be make")

    def draw_state(self, rng):
        return rng.uniform(-3, 3, 2)

    def draw_goal(self, rng, state):
        return state + rng.choice([-4, 4])

    def check_state(self, state):
        return None if abs(state[0]) < 100 else "the first number must be below 100"

    def set_state(self, state):
        self.state = np.array(state)

    def get_state(self):
        return self.state.copy()

    def step(self, action):
        if self.fail == "step":
            print("what a simulator prints")
            raise RuntimeError("it broke")
        self.state[0] += action[0] + self.drift

    def render(self, size):
        return np.full((size, size, 3), int(abs(self.state[0]) * 10) % 256, np.uint8)

    def distance(self, state, goal):
        return abs(state[0] - goal[0])

    def success(self, state, goal):
        return self.distance(state, goal) < 0.5


class WalkEnv(TaskEnv):
    task_type = Walk


class WalkVectorEnv(TaskVectorEnv):
    task_type = Walk


def actions_of(steps, count):
    return np.random.default_rng(0).uniform(-1.3, 1.3, (steps, count, 1)).astype(np.float32)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_each_is_what_it_is_alone(workers):
    count, steps = 7, 12
    actions = actions_of(steps, count)
    env = WalkVectorEnv(count, size=8, autoreset_mode=OFF, workers=workers, drift=0.25, render_mode="rgb_array")
    obs, info = env.reset(seed=5)
    alone = [WalkEnv(size=8, obs_type="pixels", drift=0.25) for _ in range(count)]
    for i, one in enumerate(alone):
        want, there = one.reset(seed=5 + i)
        assert np.array_equal(want, obs[i])
        assert np.array_equal(there["goal_state"], info["goal_state"][i])
    for step in range(steps):
        obs, reward, terminated, truncated, info = env.step(actions[step])
        assert not truncated.any()
        assert not reward.any()
        for i, one in enumerate(alone):
            want, _, over, _, there = one.step(actions[step, i])
            assert np.array_equal(want, obs[i])
            assert over == terminated[i] == info["success"][i] == there["success"]
            assert np.array_equal(there["state"], info["state"][i])
            assert there["distance"] == info["distance"][i]
    assert np.array_equal(np.stack(env.render()), obs)
    assert info["success"].any()
    env.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_given_states_and_seeds(workers):
    env = WalkVectorEnv(4, obs_type="state", workers=workers, render_mode="rgb_array", size=9)
    states, goals = np.arange(8.0).reshape(4, 2), np.arange(8.0).reshape(4, 2) + 2
    obs, info = env.reset(options={"state": states, "goal": goals})
    assert np.array_equal(obs, np.hstack([states, goals]))
    assert np.array_equal(info["state"], states)
    assert info["distance"].tolist() == [2] * 4
    assert np.stack(env.render()).shape == (4, 9, 9, 3)
    _, one = env.reset(seed=[3, 4, 5, 6])
    _, other = env.reset(seed=3)
    assert np.array_equal(one["state"], other["state"])
    _, third = env.reset()
    assert not np.array_equal(third["state"], other["state"])
    env.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_follows_the_last_step(workers):
    env = WalkVectorEnv(4, obs_type="state", max_episode_steps=3, autoreset_mode=NEXT, workers=workers)
    goals = np.array([[0.9, 0], [50, 0], [50, 0], [50, 0]])
    env.reset(seed=0, options={"state": np.zeros((4, 2)), "goal": goals})
    push = np.ones((4, 1))
    *_, terminated, truncated, info = env.step(push)
    assert terminated.tolist() == [True, False, False, False]
    *_, terminated, truncated, info = env.step(push)  # the first starts anew and ignores the action
    assert info["state"][0, 0] != pytest.approx(2)
    assert not terminated.any()
    *_, truncated, info = env.step(push)
    assert truncated.tolist() == [False, True, True, True]
    env.close()


def test_the_last_step_may_also_succeed():
    env = WalkVectorEnv(3, size=8, obs_type="pixels", max_episode_steps=4, autoreset_mode=OFF, workers=0)
    env.reset(seed=0, options={"state": np.zeros((3, 2)), "goal": np.array([[4.0, 0], [50, 0], [2, 0]])})
    for _ in range(4):
        *_, terminated, truncated, _ = env.step(np.ones((3, 1)))
    assert terminated.tolist() == [True, False, False]
    assert truncated.tolist() == [True, True, True]
    # A goal is four steps away: every episode of this policy is at its goal when it ends.
    made = generate(
        env, lambda states, goals, _: np.sign(goals - states)[:, :1], seed=0, episodes=range(3), max_steps=4
    )
    assert [len(episode.frames) for episode in made] == [5, 5, 5]
    env.close()


def test_a_worker_that_fails_says_why(capfd):
    env = WalkVectorEnv(4, workers=2, fail="step")
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match="it broke"):
        env.step(np.zeros((4, 1)))
    assert "what a simulator prints" in capfd.readouterr().err
    env.close()
    with pytest.raises(ValueError, match="fail must not be make"):
        WalkVectorEnv(4, workers=2, fail="make")
    with pytest.raises(ValueError, match="fail must not be make"):
        WalkVectorEnv(4, workers=0, fail="make")


def test_a_worker_that_is_killed():
    env = WalkVectorEnv(4, workers=2)
    env.reset(seed=0)
    os.kill(env._groups[1]._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="a worker of the vector environment has ended with code -9"):
        env.step(np.zeros((4, 1)))
    env.close()


def test_workers_end_with_the_environment():
    env = WalkVectorEnv(4, workers=2)
    processes = [group._process for group in env._groups]
    env.close()
    assert [process.returncode for process in processes] == [0, 0]
    env = WalkVectorEnv(4, workers=1)
    process = env._groups[0]._process
    del env
    assert process.wait(timeout=10) == 0  # forgotten without close


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"workers": 5}, "workers must be an integer of at least 0 and below 5, got 5"),
        ({"num_envs": 0}, "num_envs must be an integer of at least 1, got 0"),
        ({"obs_type": "rgb"}, "obs_type must be one of pixels, state"),
        ({"autoreset_mode": AutoresetMode.SAME_STEP}, "autoreset_mode must be one of"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        WalkVectorEnv(**{"num_envs": 4, **arguments})


def test_bad_calls():
    env = WalkVectorEnv(2, workers=0)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros((2, 1)))
    with pytest.raises(ValueError, match="seed must have one entry for each of 2 environments, got 3"):
        env.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="the first number must be below 100"):
        env.reset(options={"state": [[0, 0], [200, 0]]})
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action must be of shape \(2, 1\), got \(2,\)"):
        env.step(np.zeros(2))


def test_memory_stays():
    """1,000 resets and steps in workers: no file, process or byte is left behind."""
    env = WalkVectorEnv(4, size=64, workers=2)
    resident = []
    for i in range(1000):
        env.reset(seed=i)
        env.step(np.zeros((4, 1)))
        if i % 500 == 499:
            resident.append(_resident())
    assert resident[1] - resident[0] < 2**20
    env.close()


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
