import math
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

pytest.importorskip("pymunk")
pytest.importorskip("cv2")

import lewm.envs
from lewm.collector import generate
from lewm.envs.push_t import PushT, PushTEnv, PushTVectorEnv, picture, turned

lewm.envs.register()
STATE = np.array([100.0, 120, 300, 280, 1.0, 0, 0])
# Three episodes of stable-worldmodel 0.1.1's swm/PushT-v1 (default variation, pymunk 7.3.1): states, float32 actions of
# a policy that stays near the block, and the first picture of each.
OFFICIAL = np.load(Path(__file__).parent / "golden" / "push_t.npz")


@pytest.mark.parametrize("episode", range(3))
def test_dynamics_are_the_official_ones(episode):
    states, actions = OFFICIAL["states"][episode], OFFICIAL["actions"][episode]
    task = PushT()
    task.set_state(states[0])
    assert np.array_equal(task.get_state(), states[0])
    for action, after in zip(actions, states[1:], strict=True):
        task.step(action.astype(np.float64))
        np.testing.assert_allclose(task.get_state(), after, rtol=0, atol=1e-9)
    assert np.linalg.norm(states[-1, 2:4] - states[0, 2:4]) > 40  # the block was pushed


def test_pictures_are_the_official_ones_but_for_edges():
    for state, official in zip(OFFICIAL["states"][:, 0], OFFICIAL["pictures"], strict=True):
        off = np.abs(picture(state, 224).astype(int) - official)
        assert (off > 16).mean() < 0.006
        assert off.mean() < 0.4


@pytest.mark.parametrize("size", [8, 64, 96, 100, 224, 512])
def test_a_picture_is_a_function_of_the_state(size):
    """Drawing only where shapes are gives the whole canvas, scaled; also where shapes leave it."""
    cv2 = pytest.importorskip("cv2")
    for state in (STATE, [-20, 530, 20, 500, 3, 0, 0], [256, 256, 256, 256, 0.5, 0, 0], [-90, 0, 700, 700, 0, 0, 0]):
        state = np.array(state, float)
        found = picture(state, size)
        assert found.shape == (size, size, 3)
        how = cv2.INTER_LINEAR if size == 224 else cv2.INTER_AREA
        whole = cv2.resize(picture(state, 512), (size, size), interpolation=how)
        # The painted T is scaled apart from what lies on it: weights of shared pixels round differently.
        assert np.abs(found.astype(int) - whole).max() <= 1
        assert np.array_equal(found, picture(state, size))


def test_velocity_does_not_show():
    fast = STATE + np.array([0, 0, 0, 0, 0, 50, -20])
    assert np.array_equal(picture(STATE, 64), picture(fast, 64))
    assert not np.array_equal(picture(STATE, 64), picture(STATE + 0.2 * (np.arange(7) == 4), 64))


@pytest.mark.parametrize(
    ("off", "success"),
    [
        ([19.99, 0, 0, 0, 0], True),
        ([20.0, 0, 0, 0, 0], False),
        ([0, 0, 0, -19.99, 0], True),
        ([10, 10, 10, 9.99, 0], True),  # one distance over agent and block together
        ([10, 10, 10, 10, 0], False),
        ([0, 0, 0, 0, np.pi / 9 - 1e-6], True),
        ([0, 0, 0, 0, np.pi / 9 + 1e-6], False),
        ([0, 0, 0, 0, 2 * np.pi - 0.1], True),
    ],
)
def test_success(off, success):
    state = STATE + np.array([*off, 0, 0])
    env = PushTEnv()
    _, info = env.reset(options={"state": state, "goal": STATE + 300 * (np.arange(7) == 5)})  # velocity does not count
    assert info["success"] == success
    assert info["distance"] == pytest.approx(np.linalg.norm(off[:4]))


def test_turned_is_the_shorter_way():
    np.testing.assert_allclose(
        turned([0.1, 6.2, 0, 3], [6.2, 0.1, np.pi, -3]), [0.1832, 0.1832, np.pi, 0.2832], atol=1e-4
    )


def test_a_state_is_set_as_if_nothing_had_been_before():
    """Replaying actions from a state in the middle of an episode gives the same states twice, contacts or not."""
    rng = np.random.default_rng(0)
    task, again = PushT(), PushT()
    task.set_state(np.array([250, 200, 256, 256, 0.3, 0, 0.0]))
    actions = rng.uniform(-0.5, 0.5, (40, 2))
    for action in actions:
        task.step(action)
    middle = task.get_state()
    paths = []
    for one in (task, again):
        one.set_state(middle)
        assert np.array_equal(one.get_state(), middle)
        path = []
        for action in actions:
            one.step(action)
            path.append(one.get_state())
        paths.append(path)
    assert np.array_equal(*paths)


def test_the_block_stays_in_the_walls_and_the_agent_need_not():
    env = PushTEnv()
    env.reset(options={"state": [60, 60, 60, 60, 0, 0, 0], "goal": STATE})
    for _ in range(30):
        _, _, _, _, info = env.step(np.array([-1, -1], np.float32))
    assert (info["state"][:2] < 0).all()
    assert (info["state"][2:4] > -5).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"states": STATE}, "options must be among 'state' and 'goal', got 'states'"),
        ({"state": STATE[:5]}, r"options\['state'\] must be of shape \(7,\), got \(5,\)"),
        ({"goal": STATE * np.nan}, "it is not finite"),
        ({"state": STATE + 1000}, "positions must be within 256 units of the square"),
        ({"state": STATE * [1, 1, 1, 1, 1, 0, 0] + [0, 0, 0, 0, 0, 1e5, 0]}, "velocities must be at most"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        PushTEnv().reset(options=options)


def test_bad_calls():
    env = PushTEnv()
    with pytest.raises(gymnasium.error.ResetNeeded, match="lewm/PushT-v0 was stepped or drawn before its first reset"):
        env.step(np.zeros(2))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action must be of shape \(2,\), got \(3,\)"):
        env.step(np.zeros(3))
    with pytest.raises(ValueError, match="action must be finite"):
        env.step(np.array([np.nan, 0]))
    with pytest.raises(ValueError, match="render_mode must be one of None, rgb_array, human, got 'rgb'"):
        PushTEnv(render_mode="rgb")
    with pytest.raises(ValueError, match="size must be an integer of at least 8"):
        PushTEnv(size=2)


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "pymunk.py").write_text("raise ModuleNotFoundError('no', name='pymunk')")
    code = "import gymnasium, lewm; gymnasium.make('lewm/PushT-v0')"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert (
        'lewm/PushT-v0 needs pymunk, which is not installed: pip install "lewm-fast[envs]"'
        in run.stderr.splitlines()[-1]
    )


# ------------------------------------------------------------------------------------------------------------ pusher


@pytest.fixture(scope="module")
def episodes():
    mode = gymnasium.vector.AutoresetMode.DISABLED
    env = PushTVectorEnv(8, obs_type="state", max_episode_steps=100, autoreset_mode=mode, workers=0)
    return list(generate(env, env.expert_policy(), seed=0, episodes=range(16), max_steps=100))


def test_the_pusher_moves_the_block_gently(episodes):
    states = np.stack([episode.columns["state"] for episode in episodes])
    actions = np.stack([episode.actions for episode in episodes])
    assert 0.15 < actions.std() < 0.25
    speed = np.linalg.norm(np.diff(states[:, :, 2:4], axis=1), axis=2)
    assert 0.3 < (speed > 0.3).mean() < 0.6  # in contact half of the time
    assert np.percentile(speed, 99) < 25
    ahead = [PushT.moved(path[:-25], path[25:]).mean() for path in states]
    assert 0.75 < np.mean(ahead) < 0.98
    assert (np.abs(states[..., :4] - 256) < 256).all(axis=-1).mean() > 0.97  # agent and block stay in the picture
    assert all(turned(path[0, 4], path[:, 4]).max() > 0.3 for path in states)  # and it is turned


def test_play_begins_on_the_mark_and_walks_about(episodes, tmp_path):
    data = lewm.collect(
        "lewm/PushT-v0", tmp_path / "play.lewm", episodes=16, size=16, policy="play", env_kwargs={"start_rule": "mark"}
    )
    states = np.stack([data.column("state", i) for i in range(16)])
    assert (states[:, 0, 2:5] == (256, 256, math.pi / 4)).all()
    assert np.ptp(states[:, 0, :2], axis=0).min() > 100  # the pusher begins anywhere
    goals = np.stack([data.column("goal_state", i)[0] for i in range(16)])
    assert np.ptp(goals[:, 2:4], axis=0).min() > 100  # and so does the block of a goal
    apart = [np.linalg.norm(path[:, :2] - path[:, 2:4], axis=1).mean() for path in states]
    pushing = [np.linalg.norm(e.columns["state"][:, :2] - e.columns["state"][:, 2:4], axis=1).mean() for e in episodes]
    assert np.mean(apart) > 1.15 * np.mean(pushing)
    assert PushT.moved(states[:, 0], states[:, -1]).mean() > 0.8  # the block is pushed all the same
    with pytest.raises(ValueError, match="start_rule must be one of anywhere, mark, got 'here'"):
        PushT("here")
    with pytest.raises(ValueError, match="policy is 'play', but 'lewm/TwoRoom-v0' has none"):
        lewm.collect("lewm/TwoRoom-v0", tmp_path / "rooms.lewm", episodes=1, policy="play")


def test_what_was_collected_can_be_replayed(episodes):
    """The actions of 25 steps of an episode lead from its state to the one 25 steps later."""
    task, solved = PushT(), 0
    for episode in episodes:
        states = episode.columns["state"]
        task.set_state(states[40])
        for action in episode.actions[40:65]:
            task.step(np.clip(action, -1, 1).astype(np.float64))
        solved += task.success(task.get_state(), states[65])
    assert solved == len(episodes)
