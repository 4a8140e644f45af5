"""The task with a reward that other people's systems get, and their rows; the packages themselves are not needed."""

import json
import math
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import lewm
from lewm.envs.two_room import EXTENT, TwoRoomVectorEnv

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benches import systems_peers
from benches.systems_peers import Budget, RewardTwoRoom, labelled, reward, row


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("peers") / "data.lewm"
    return lewm.collect("lewm/TwoRoom-v0", path, episodes=3, size=8, seed=5)


def arrays(path, **columns):
    """A store of one episode of three frames."""
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    data = lewm.Dataset.from_arrays(frames, np.zeros((3, 2)), [3], path, low=[-1, -1], high=[1, 1], columns=columns)
    data.metadata["env_id"] = "lewm/TwoRoom-v0"
    return data


def test_the_reward_is_minus_the_distance_in_widths():
    found = reward(np.array([[0.0, 0.0], [3.0, 4.0]]), np.zeros((2, 2)))
    assert found.dtype == np.float32
    assert found == pytest.approx([0, -5 / EXTENT])


def test_labels_are_those_of_the_environment(data):
    """Recorded actions done again in the environment with a reward give the rewards of the labels."""
    rows = labelled(data, goals=2, seed=1)
    assert len(rows) == 2 * data.frame_count
    for begin in np.flatnonzero(rows.first):
        episode = int(rows.episode[begin])
        length = int(data.lengths[episode])
        part = slice(begin, begin + length)
        assert (rows.episode[part] == episode).all()
        np.testing.assert_array_equal(rows.row[part], np.arange(length))
        states, goal = data.column("state", episode), rows.goals[begin]
        assert (rows.goals[part] == goal).all()
        near = np.abs(states / EXTENT - goal).max(axis=1)
        assert near.min() < 1e-7  # a place that the episode gets to
        goal = states[near.argmin()]
        env = RewardTwoRoom(TwoRoomVectorEnv(1, autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED))
        with closing(env):
            env.reset(options={"state": states[:1], "goal": goal[None]})
            given = [env.step(action[None])[1][0] for action in rows.actions[part][:-1]]
        np.testing.assert_allclose(rows.rewards[part][:-1], given, rtol=0, atol=1e-6)
        assert rows.rewards[part][-1] == pytest.approx(reward(states[-1], goal))
        assert not rows.actions[part][-1].any()


def test_labels_are_seeded_and_every_goal_is_another(data):
    one, same, other = labelled(data, 4, 0), labelled(data, 4, 0), labelled(data, 4, 1)
    np.testing.assert_array_equal(one.goals, same.goals)
    assert not np.array_equal(one.goals, other.goals)
    assert len(np.unique(one.goals[one.first], axis=0)) > len(data)


@pytest.mark.parametrize("rows", [1, 6])
def test_windows_stay_within_an_episode_and_its_goal(data, rows):
    found = labelled(data, goals=2)
    starts = found.starts(rows)
    assert len(starts) == 2 * sum(data.lengths - rows + 1)
    for start in starts:
        window = slice(start, start + rows)
        assert not found.first[window][1:].any()
        assert len(np.unique(found.goals[window], axis=0)) == 1
    assert not len(found.starts(int(data.lengths.max()) + 1))


def test_frames_are_found_by_episode_and_row(data):
    frames, begins = systems_peers.pictures(data)
    rows = labelled(data)
    at = len(rows) - 5
    np.testing.assert_array_equal(
        frames[begins[rows.episode[at]] + rows.row[at]], data.frames(int(rows.episode[at]), [rows.row[at]])[0]
    )


def test_data_that_cannot_be_labelled(data, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"goals must be at least 1, got 0"):
        labelled(data, goals=0)
    with pytest.raises(ValueError, match=r"must have the column state, .* has none"):
        labelled(arrays(tmp_path / "a.lewm"))
    other = arrays(tmp_path / "b.lewm", state=np.ones((3, 2)))
    other.metadata["env_id"] = "lewm/PushT-v0"
    with pytest.raises(ValueError, match=r"must be of lewm/TwoRoom-v0, got lewm/PushT-v0"):
        labelled(other)
    monkeypatch.setattr(data, "column", lambda name, episode: np.full((int(data.lengths[episode]), 2), np.nan))
    with pytest.raises(ValueError, match=r"state of episode 0 .* must be finite"):
        labelled(data)


def test_success_is_measured_as_the_protocol_does():
    """The straight line solves what the protocol says it solves, doing nothing only what was solved at the start."""
    found = systems_peers.evaluated(systems_peers.straight_line, 8)
    still = systems_peers.evaluated(lambda env, info, active, step: np.zeros((8, 2), np.float32), 8)
    assert found["success"] > still["success"] == still["solved_at_start"] / 8
    assert found["n"] == 8
    assert found["interval"] == pytest.approx(lewm.evaluation.wilson(8 * found["success"], 8))
    assert found["random_floor"] == still["random_floor"]
    assert found["straight_line"] == still["straight_line"] == found["success"]


def test_a_budget_ends_by_steps_or_by_the_clock():
    by_steps = Budget(math.inf, 3)
    assert list(by_steps) == [0, 1, 2]
    assert by_steps.steps == 3
    by_clock = Budget(0.0)
    assert list(by_clock) == [0]
    said = by_clock.described(batch=4)
    assert said["steps"] == 1
    assert said["batch"] == 4
    assert systems_peers.CAVEAT in said["budget"]


@pytest.mark.parametrize(("one_thread", "counts"), [(True, "work_ms"), (False, "clock_ms")])
def test_with_one_thread_a_latency_is_of_work(one_thread, counts, monkeypatch):
    monkeypatch.setattr(systems_peers, "ONE_THREAD", one_thread)
    found = systems_peers.latency(lambda: time.sleep(0.02), 3)
    assert found["plans"] == 3
    assert found["plan_ms_is"] == counts
    assert found["plan_ms"] == found[counts]
    assert found["clock_ms"]["p95"] >= found["clock_ms"]["p50"] >= 20
    assert found["work_ms"]["p50"] < 20  # sleeping is none


def test_a_row_has_what_was_found_or_why_not():
    unmeasured = row("x", ("no-such-package",), None, "ImportError: no")
    assert tuple(unmeasured) == systems_peers.FIELDS
    assert not unmeasured["measured"]
    assert unmeasured["versions"]["no-such-package"] is None
    assert unmeasured["success"] is None
    own = ("system", "task", "measured", "why_not", "versions", "machine")
    values = {field: 1 for field in systems_peers.FIELDS if field not in own}
    whole = row("x", (), values | {"notes": []}, None)
    assert whole["measured"]
    assert whole["why_not"] is None
    assert tuple(whole) == (*systems_peers.FIELDS, "notes")
    with pytest.raises(ValueError, match=r"unknown \['speed'\]"):
        row("x", (), values | {"speed": 1}, None)
    with pytest.raises(ValueError, match=r"missing \['success'\]"):
        row("x", (), {k: v for k, v in values.items() if k != "success"}, None)
    for both in ((None, None), (None, ""), (values, "why")):
        with pytest.raises(ValueError, match="either what was found or why it was not"):
            row("x", (), *both)


def test_a_package_that_is_not_there_makes_a_row_that_says_so(tmp_path):
    block = "import runpy, sys\nsys.modules['dreamerv3'] = None\nsys.argv = sys.argv[1:]\n"
    code = f"{block}runpy.run_module('benches.systems_peers', run_name='__main__')"
    out = tmp_path / "rows.json"
    command = [sys.executable, "-c", code, "systems_peers", "dreamerv3", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    (found,) = json.loads(out.read_text())
    assert not found["measured"]
    assert "dreamerv3" in found["why_not"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benches" / "results").glob("systems-peers-*.json")), ids=lambda p: p.stem
)
def test_the_rows_that_are_kept_are_whole(path):
    for found in json.loads(path.read_text()):
        assert tuple(found)[: len(systems_peers.FIELDS)] == systems_peers.FIELDS
        assert set(found) <= {*systems_peers.FIELDS, *systems_peers.NOTES}
        assert found["measured"] == (found["why_not"] is None)
        if found["measured"]:
            assert systems_peers.CAVEAT in found["training"]["budget"]
            low, high = found["interval"]
            assert low <= found["success"] <= high
