import json
from contextlib import suppress
from dataclasses import asdict, replace

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lewm
from fake_models import BlindModel, PointModel, RoomModel
from lewm.envs.two_room import render_states
from lewm.evaluation import PLANNERS, PROTOCOLS, Protocol, Result, _data_tasks, evaluate, make_tasks, wilson

TWO_ROOM = PROTOCOLS["two-room-25-50"]


# ------------------------------------------------------------------------- a task whose states are more than positions


class Line:
    """An agent on a line that pushes a block to the right; a state is (agent, block, steps so far)."""

    drawn = 0  # calls of render

    @staticmethod
    def moved(states, goals):
        return np.abs(states[:, 1] - goals[:, 1]) > 0.5

    @staticmethod
    def blind(states, goals):
        return goals[:, :1] - states[:, :1]


class LineEnv(gymnasium.Env):
    action_space = gymnasium.spaces.Box(-0.5, 0.5, (1,), np.float32)
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (6,), np.float64)


class LineVectorEnv(gymnasium.vector.VectorEnv):
    task_type = Line
    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(self, num_envs, *, size=8, obs_type="pixels", max_episode_steps=None, render_mode=None, **modes):
        assert modes == {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}
        self.num_envs, self.size, self.obs_type, self.limit = num_envs, size, obs_type, max_episode_steps
        self.single_action_space = LineEnv.action_space

    def reset(self, *, seed=None, options=None):
        rngs = [np.random.default_rng(key) for key in seed or [0] * self.num_envs]
        drawn = np.array([[start, start + rng.uniform(1, 9), 0] for rng in rngs for start in [rng.uniform(0, 2)]])
        options = options or {}
        self.state = np.array(options.get("state", drawn), dtype=float)
        self.goal = np.array(options.get("goal", drawn + 100), dtype=float)
        return self.observe(), self.info()

    def step(self, actions):
        self.state[:, 0] += np.clip(actions[:, 0], -0.5, 0.5)
        self.state[:, 1] = np.maximum(self.state[:, 1], self.state[:, 0])
        self.state[:, 2] += 1
        info = self.info()
        truncated = np.full(self.num_envs, self.limit is not None) & (self.state[:, 2] >= (self.limit or 0))
        return self.observe(), np.zeros(self.num_envs), info["success"], truncated, info

    def render(self):
        Line.drawn += 1
        return tuple(self.pictures())

    def expert_policy(self):
        return Wander()

    def pictures(self):
        frames = np.zeros((self.num_envs, self.size, self.size, 3), np.uint8)
        frames.reshape(self.num_envs, -1)[:, :2] = np.rint(self.state[:, :2] * 10 + 100).clip(0, 255)
        return frames

    def observe(self):
        return self.pictures() if self.obs_type == "pixels" else np.hstack([self.state, self.goal])

    def info(self):
        distance = np.abs(self.state - self.goal)[:, :2].max(axis=1)
        return {
            "state": self.state.copy(),
            "goal_state": self.goal.copy(),
            "success": distance < 0.5,
            "distance": distance,
        }


class Wander:
    """To the right, then back."""

    def __call__(self, states, goals, rngs):
        away = np.where(states[:, 2:] < 20, 1.0, -1.0)
        return 0.3 * away + 0.1 * np.stack([rng.standard_normal(1) for rng in rngs])


LINE = Protocol("line", "lewm-test/Line-v0")


def line_model(**settings):
    """It sees the agent alone."""
    stats = {"mean": np.zeros(1), "std": np.full(1, 0.3), "low": np.full(1, -0.5), "high": np.full(1, 0.5)}
    planner = {"samples": 32, "iterations": 4, "elites": 6, "horizon": 5}
    return PointModel(1, 5, size=8, stats=stats, planner=planner, **settings)


@pytest.fixture(autouse=True)
def line(monkeypatch):
    spec = gymnasium.envs.registration.EnvSpec(
        LINE.env_id, entry_point=LineEnv, vector_entry_point=LineVectorEnv, max_episode_steps=40
    )
    monkeypatch.setitem(gymnasium.registry, LINE.env_id, spec)


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
    with pytest.raises(
        ValueError, match=r"goal_offset must leave enough pairs, got 101: only 0 of 60 episodes are longer"
    ):
        make_tasks(replace(TWO_ROOM, goal_offset=101), 3, 16)


def test_the_protocols_are_frozen():
    frozen = {
        "pusht-25-50": ("lewm/PushT-v0", 25, 50, False),
        "two-room-25-50": ("lewm/TwoRoom-v0", 25, 50, False),
        "two-room-100-150": ("lewm/TwoRoom-v0", 100, 150, True),
        "reacher-25-50": ("lewm/Reacher-v0", 25, 50, False),
        "cube-25-50": ("lewm/Cube-v0", 25, 50, False),
    }
    assert {*PROTOCOLS} == {*frozen, *(f"{name}-strict" for name in frozen)}
    for name, (env_id, ahead, budget, past) in frozen.items():
        protocol = Protocol(name, env_id, ahead, budget, pairs=200, seed=0, strict=False, past_success=past)
        assert PROTOCOLS[name] == protocol
        assert PROTOCOLS[f"{name}-strict"] == replace(protocol, name=f"{name}-strict", strict=True)


def test_the_goal_is_a_whole_state_exactly_25_steps_on():
    tasks = make_tasks(LINE, 50, 8)
    np.testing.assert_array_equal(tasks.goals[:, 2] - tasks.states[:, 2], 25)
    np.testing.assert_array_equal(tasks.states[:, 2], tasks.rows)
    np.testing.assert_array_equal(np.unique(tasks.rows), np.arange(16))  # episodes have 41 states
    np.testing.assert_array_equal(tasks.pictures[:, 0, 0, 0], np.rint(tasks.goals[:, 0] * 10 + 100))


@pytest.mark.parametrize("protocol", [TWO_ROOM, LINE], ids=["two-room", "line"])
def test_strict_takes_the_next_pairs_for_those_solved_at_the_start(protocol):
    def solved(tasks):
        if protocol is TWO_ROOM:
            return np.hypot(*(tasks.states - tasks.goals).T) < 16
        return np.abs(tasks.states - tasks.goals)[:, :2].max(axis=1) < 0.5

    every, strict = make_tasks(protocol, 60, 8), make_tasks(replace(protocol, strict=True), 40, 8)
    assert 0 < solved(every).sum() < 20
    assert not solved(strict).any()
    for name in ("states", "goals", "pictures", "episodes", "rows"):
        np.testing.assert_array_equal(getattr(strict, name), getattr(every, name)[~solved(every)][:40])
        np.testing.assert_array_equal(
            getattr(make_tasks(replace(protocol, strict=True), 7, 8), name), getattr(strict, name)[:7]
        )


def test_strict_that_can_find_no_pair_is_refused():
    class Still(LineVectorEnv):
        def info(self):
            return {**super().info(), "success": np.ones(self.num_envs, bool)}

    gymnasium.registry[LINE.env_id].vector_entry_point = Still
    with pytest.raises(ValueError, match=r"only 0 of 40 episodes are longer and not solved at their start"):
        make_tasks(replace(LINE, strict=True, past_success=True), 2, 8)


def test_100_steps_ahead_no_episode_is_left_out():
    far = PROTOCOLS["two-room-100-150"]
    tasks = make_tasks(far, 80, 16)
    np.testing.assert_array_equal(tasks.episodes, np.arange(80))
    assert not tasks.rows.any()
    # An end at success would leave those that had not got there, more of them in their first room.
    failed = make_tasks(replace(far, past_success=False), 80, 16)
    assert failed.episodes[-1] > 110
    kept = np.isin(tasks.episodes, failed.episodes)
    np.testing.assert_array_equal(tasks.goals[kept], failed.goals[: kept.sum()])


def test_arguments_for_the_environment_are_handed_on_and_recorded():
    anywhere = replace(TWO_ROOM, env_kwargs={"goal_rule": "anywhere"})
    assert not np.array_equal(make_tasks(anywhere, 5, 16).goals, make_tasks(TWO_ROOM, 5, 16).goals)
    result = evaluate(RoomModel(), anywhere, pairs=3)
    assert result.to_dict()["protocol"]["env_kwargs"] == {"goal_rule": "anywhere"}
    assert "--env 'goal_rule=\"anywhere\"'" in result.command


@pytest.fixture
def shades():
    """What each Line environment that is made gets as `shade`."""
    seen = []

    class Shaded(LineVectorEnv):
        def __init__(self, *args, shade=0, **settings):
            seen.append(shade)
            super().__init__(*args, **settings)

    gymnasium.registry[LINE.env_id].vector_entry_point = Shaded
    return seen


def test_the_environment_is_the_one_that_the_model_learnt_from(shades):
    model = line_model()
    for learnt, asked, used in (
        ({}, {}, 0),
        ({"env_kwargs": {"shade": 3}}, {}, 3),
        ({"env_kwargs": {"shade": 3}}, {"shade": 5}, 5),
        ({"env_kwargs": "none"}, {}, 0),
    ):
        model.meta["data"] = {"env_id": LINE.env_id, **learnt}
        shades.clear()
        found = evaluate(model, replace(LINE, env_kwargs=asked), pairs=3)
        assert set(shades) == {used}
        assert found.protocol.env_kwargs.get("shade", 0) == used


def test_a_model_of_another_environment_is_refused():
    model = RoomModel()
    model.meta["data"] = {"env_id": "lewm/PushT-v0"}
    with pytest.raises(
        ValueError,
        match=r"same environment: the model learnt from lewm/PushT-v0, two-room-25-50 is of lewm/TwoRoom-v0",
    ):
        evaluate(model, pairs=2)
    model.meta["data"] = {"fingerprint": "own data"}
    assert evaluate(model, pairs=2).n == 2


def test_a_trained_model_knows_its_environment_and_the_pairs_stay_the_protocols(tmp_path):
    pytest.importorskip("torch")
    settings = {"goal_rule": "anywhere"}
    data = lewm.collect(TWO_ROOM.env_id, tmp_path / "rooms.lewm", episodes=6, size=16, env_kwargs=settings)
    lewm.train(data, preset="tiny", out=tmp_path / "run", steps=1, batch_size=4, image_size=16, device="cpu")
    model = lewm.load(tmp_path / "run")
    assert model.meta["data"]["env_id"] == TWO_ROOM.env_id
    assert model.meta["data"]["env_kwargs"] == settings
    found = evaluate(model, pairs=5, planner=lewm.CEM(samples=4, iterations=1, elites=2))
    assert found.protocol == TWO_ROOM
    assert found.random_success == evaluate(RoomModel(), pairs=5).random_success


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
    wanted |= {"moved", "training", "command"}
    assert wanted <= set(written)
    assert (written["moved"], written["training"]) == (None, None)
    assert written["n"] == 60
    assert written["protocol"] == {
        "name": "two-room-25-50",
        "env_id": "lewm/TwoRoom-v0",
        "goal_offset": 25,
        "budget": 50,
        "pairs": 200,
        "seed": 0,
        "strict": False,
        "past_success": False,
        "env_kwargs": {},
    }
    assert (written["planner"]["name"], written["planner"]["samples"]) == ("cem", 64)
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


def test_planners_have_names():
    assert PLANNERS["paper"] == lewm.CEM(samples=300, iterations=30, elites=30, horizon=5)
    for name, preset in lewm.PRESETS.items():
        assert {**asdict(PLANNERS[name]), **preset.planner} == asdict(PLANNERS[name])
    result = evaluate(RoomModel(), pairs=2, planner="tiny")
    assert result.planner == {"name": "cem", **asdict(PLANNERS["tiny"])}


@pytest.mark.parametrize(
    ("planner", "words"),
    [
        (lewm.CEM(), "--planner paper --execute 5"),
        (lewm.CEM(samples=100, iterations=10, elites=12), "--planner tiny --planner elites=12 --execute 5"),
        (lewm.CEM(reference=True), "--planner official --execute 5"),
        (lewm.MPPI(horizon=3), "--planner mppi --planner horizon=3 --execute 3"),
    ],
)
def test_the_command_names_the_nearest_planner(planner, words):
    command = evaluate(line_model(), replace(TWO_ROOM, env_id=LINE.env_id), pairs=1, planner=planner).command
    assert command.startswith("lewm.evaluate(MODEL, Protocol(name='two-room-25-50', env_id='lewm-test/Line-v0'")
    model = RoomModel()
    command = evaluate(model, "two-room-25-50-strict", pairs=1, planner=planner, seed=4).command
    assert command == f"lewm evaluate MODEL --protocol two-room-25-50-strict --pairs 1 {words} --seed 4"


def test_pairs_whose_block_moved_are_told_apart():
    result, tasks = evaluate(line_model(), LINE, pairs=60), make_tasks(LINE, 60, 8)
    moved = Line.moved(tasks.states, tasks.goals)
    assert 10 < moved.sum() < 50
    solved, by_chance = np.array(result.success)[moved], np.array(result.random_success)[moved]
    assert result.moved.n == moved.sum()
    assert result.moved.success_rate == solved.mean()
    assert result.moved.interval == wilson(int(solved.sum()), int(moved.sum()))
    assert result.moved.random_floor == by_chance.mean()
    # The control: a model that sees the agent alone.
    assert result.moved.success_rate < 0.5 < np.array(result.success)[~moved].mean()
    assert f"more than the agent moved: {solved.mean():.1%}" in str(result)
    # Another control, without a model: the agent goes straight to its place, and pushes what is on the way.
    starts, goals = tasks.states, tasks.goals
    block = np.maximum(starts[:, 1], goals[:, 0])
    near = np.abs(block - goals[:, 1]) < 0.5
    assert result.blind_floor == near.mean()
    assert result.moved.blind_floor == near[moved].mean()
    assert f"blind to the rest: {near.mean():.1%}, of those pairs {near[moved].mean():.1%}" in str(result)


@pytest.mark.parametrize(("history", "execute", "most"), [(1, 5, 2), (1, 2, 5), (2, 5, 10)])
def test_no_picture_is_drawn_that_the_controller_would_not_look_at(history, execute, most):
    strict = replace(LINE, strict=True)
    before = Line.drawn
    few = evaluate(line_model(history=history), strict, pairs=8, execute=execute)
    assert 0 < Line.drawn - before <= most

    class Drawing(LineVectorEnv):
        def step(self, actions):
            self.render()
            return super().step(actions)

    gymnasium.registry[LINE.env_id].vector_entry_point = Drawing
    assert evaluate(line_model(history=history), strict, pairs=8, execute=execute).distance == few.distance


@pytest.mark.parametrize("workers", [0, 1])
def test_to_draw_environments_of_a_task_does_not_move_them(workers):
    pytest.importorskip("pymunk")
    states = []
    for drawn in (False, True):
        env = gymnasium.make_vec(
            "lewm/PushT-v0",
            3,
            vectorization_mode="vector_entry_point",
            obs_type="state",
            render_mode="rgb_array",
            workers=workers,
        )
        env.reset(seed=0)
        for _ in range(4):
            if drawn:
                assert len(env.render()) == 3
            *_, info = env.step(np.full((3, 2), 0.3, np.float32))
        states.append(info["state"])
        env.close()
    np.testing.assert_array_equal(*states)


def test_what_the_model_file_says_of_its_training_is_kept():
    model = RoomModel()
    own, train = asdict(model.config), asdict(lewm.TrainConfig(**lewm.PRESETS["tiny"].train))
    record = {"config": {**train, "steps": 800}, "seed": 3, "steps": 800, "seconds": 67, "device": "cpu", "metrics": {}}
    model.meta.update(preset="tiny", training=record)
    training = evaluate(model, pairs=2).training
    assert (training.preset, training.seed, training.steps, training.seconds) == ("tiny", 3, 800, 67.0)
    assert training.changes.pop("steps") == 800
    assert training.changes["embed_dim"] == 2
    assert all(own[name] == value for name, value in training.changes.items())
    assert (training.parts, training.episodes, training.policy) == ({}, None, None)
    model.config = replace(model.config, distance_head=True)
    model.meta.update(data={"episodes": 300, "policy": "expert"})
    record["config"] |= {"reconstruction": 0.5}
    training = evaluate(model, pairs=2).training
    assert training.parts == {"reconstruction": 0.5, "distance_head": True}
    assert (training.episodes, training.policy) == (300, "expert")
    for wrong in ({"preset": "mine"}, {"training": {}}, {"training": {**record, "seconds": "long"}}):
        model.meta = {**model.meta, **wrong}
        assert evaluate(model, pairs=1).training is None


# ---------------------------------------------------------------------------------------------------- results read back


def test_a_result_comes_back_as_it_was(seeing):
    result, out, _ = seeing
    assert Result.load(out) == result


def test_a_result_with_all_its_parts_comes_back(tmp_path):
    model = line_model()
    train = asdict(lewm.TrainConfig())
    model.meta.update(
        preset="paper", training={"config": train, "seed": 0, "steps": 9, "seconds": 1.5, "device": "cuda:0"}
    )
    result = evaluate(model, LINE, pairs=20, out=tmp_path / "result.json")
    assert None not in (result.moved, result.training)
    assert Result.load(tmp_path / "result.json") == result


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"n": 61}, "success must have one entry for each of n = 61 pairs"),
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"success_rate": 1.5}, "success_rate and its interval must be those of the 60 pairs"),
        ({"random_interval": [0.0, 0.1]}, "random_floor and its interval must be"),
        ({"interval": [0.0]}, "interval must be tuple"),
        ({"success": [1] * 60}, "success must be bool, got 1"),
        ({"seconds": float("nan")}, "seconds must be float, got nan"),
        ({"seconds": 10**400}, "too large"),
        ({"seed": True}, "seed must be int, got True"),
        ({"plan_ms": {}}, "plan_ms must have p50 and p95"),
        ({"planner": {"samples": 5}}, "elites must be at most samples"),
        ({"planner": {"name": "cem"}}, "planner must have all fields"),
        ({"planner": {"name": "dream"}}, "planner's name must be one of"),
        ({"protocol": {"name": "x"}}, "protocol must have the fields name, env_id"),
        ({"moved": 3}, "moved must be Moved"),
        ({"versions": {"cpu": 3}}, "must be str, got 3"),
        ({"more": 1}, "the file must have the fields success_rate"),
    ],
)
def test_a_damaged_result_is_one_error(seeing, tmp_path, change, text):
    written = seeing[0].to_dict() | change
    (tmp_path / "bad.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"result: .*bad\.json is no result of lewm evaluate") as error:
        Result.load(tmp_path / "bad.json")
    assert text in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b"9" * 10_000])
def test_what_is_no_result_is_one_error(tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json is no result of lewm evaluate"):
        Result.load(tmp_path / "bad.json")


def test_a_file_without_end_is_not_read(tmp_path):
    with (tmp_path / "bad.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"larger than \d+ bytes"):
        Result.load(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError, match="result: no such file"):
        Result.load(tmp_path / "none.json")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
def test_any_field_may_be_anything(seeing, tmp_path_factory, data):
    written = seeing[0].to_dict()
    part = data.draw(st.sampled_from([written, written["protocol"], written["planner"], written["plan_ms"]]))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(_JSON)
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(written))
    with suppress(ValueError):
        Result.load(path)


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
    assert "--data STORE" in result.command
    tasks = _data_tasks(TWO_ROOM, data, RoomModel(), 4)
    for i, (episode, row) in enumerate(result.pairs):
        np.testing.assert_array_equal(tasks.states[i], data.column("state", episode)[row])
        np.testing.assert_array_equal(tasks.goals[i], data.column("state", episode)[row + 25])
        np.testing.assert_array_equal(tasks.pictures[i], data.frames(episode, np.array([row + 25]))[0])


def test_strict_pairs_of_a_data_set(data):
    every, strict = evaluate(RoomModel(), data=data), evaluate(RoomModel(), "two-room-25-50-strict", data=data)
    assert strict.solved_at_start == 0 < every.solved_at_start
    assert strict.n == every.n - every.solved_at_start
    with pytest.raises(
        ValueError, match=rf"pairs must be at most {strict.n}, .*, not solved at its start, got {every.n}"
    ):
        evaluate(RoomModel(), "two-room-25-50-strict", data=data, pairs=every.n)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_evaluate_refuses(data, monkeypatch):
    model = RoomModel()
    with pytest.raises(ValueError, match=r"protocol must be one of pusht-25-50, .*cube-25-50-strict, got 'push'"):
        evaluate(model, "push")
    with pytest.raises(TypeError, match=r"protocol must be a Protocol or the name of one, got 3"):
        evaluate(model, 3)
    with pytest.raises(ValueError, match=r"planner must be one of paper, .*mppi, got 'best'"):
        evaluate(model, planner="best")
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
