"""Surprise of clips, matched clips of all environments, and the paired t-test."""

import json
import math

import imageio.v3 as imageio
import numpy as np
import pytest
from typer.testing import CliRunner

import lewm
from fake_models import PointModel, RoomModel
from lewm import cli, envs, expectation
from lewm.envs.two_room import render_states, step_states
from lewm.expectation import KINDS, TASKS, PairedTest, student_p, student_quantile, surprise, voe

SMALL = {
    "image_size": 16, "patch_size": 8, "encoder_dim": 16, "encoder_depth": 1, "encoder_heads": 2, "encoder_mlp": 32,
    "embed_dim": 8, "projector_hidden": 16, "predictor_dim": 12, "predictor_depth": 2, "predictor_heads": 2,
    "predictor_head_dim": 8, "predictor_mlp": 24, "action_hidden": 16, "dropout": 0.0,
}  # fmt: skip
STATS = {"mean": [0.1, -0.2], "std": [0.5, 0.7], "low": [-1, -1], "high": [1, 1]}


def network_model(backend="cpu", precision="float32", **changes):
    """A small model of random weights, and its torch network."""
    torch = pytest.importorskip("torch")
    from lewm.config import ModelConfig
    from lewm.network import LeWM

    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = LeWM(ModelConfig(2, **{**SMALL, **changes}))
        for layer in network.predictor.transformer.layers:  # else actions change nothing
            torch.nn.init.normal_(layer.adaLN_modulation[1].weight, std=0.2)
    return lewm.Model(network.config, network.state_dict(), stats=STATS, backend=backend, precision=precision)


def clip(n, size=16, seed=0, lead=()):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 255, (*lead, n, size, size, 3), dtype=np.uint8)
    return frames, rng.uniform(-1, 1, (*lead, n - 1, 2))


# ---------------------------------------------------------------------------------------------------------- surprise


@pytest.mark.parametrize("n", [6, 11, 28])
@pytest.mark.parametrize("changes", [{"history": 1}, {"history": 3}, {"history": 1, "action_prefix": True}])
def test_surprise_is_the_error_of_each_prediction_by_itself(n, changes):
    """Against a loop over the network in float64, a step at a time."""
    torch = pytest.importorskip("torch")
    exact = network_model("torch", "float64", **changes)
    frames, actions = clip(n)
    network, history, want = exact.network, exact.config.history, []
    with torch.no_grad():
        z = network.encode(torch.from_numpy(frames[::5]))
        blocks = (actions[: (n - 1) // 5 * 5].reshape(-1, 5, 2) - STATS["mean"]) / STATS["std"]
        embedded = network.action_encoder(torch.from_numpy(blocks.reshape(1, -1, 10)))
        for t in range((n - 1) // 5):
            seen = slice(max(0, t + 1 - history), t + 1)
            predicted = network.predict(z[None, seen], embedded[:, seen])[0, -1]
            want.append((predicted - z[t + 1]).square().mean().item())
    assert len(want) == (n - 1) // 5
    np.testing.assert_allclose(surprise(exact, frames, actions), want, rtol=1e-9)
    np.testing.assert_allclose(surprise(network_model(**changes), frames, actions), want, rtol=2e-3)  # float32


def test_surprise_calls_the_model_a_few_times_whatever_the_length():
    model = PointModel(history=3)
    frames, actions = clip(61, size=8)
    frames[..., :] = 100
    surprise(model, frames, actions)
    assert len(model.encoded) == 1
    assert len(model.asked) == 3  # one and two frames of history, then all the rest
    z, candidates, past = model.asked[2]
    assert (z.shape, candidates.shape, past.shape) == ((28, 3, 2), (28, 1, 1, 4), (28, 2, 4))


def test_clips_of_a_batch_are_scored_as_each_alone():
    model = network_model(history=2)
    frames, actions = clip(17, lead=(3,))
    found = surprise(model, frames, actions)
    assert found.shape == (3, 3)
    assert found.dtype == np.float64
    for i in range(3):
        np.testing.assert_allclose(found[i], surprise(model, frames[i], actions[i]), rtol=1e-5)


def test_a_tail_that_is_no_block_is_left_out():
    model = network_model()
    frames, actions = clip(15)
    np.testing.assert_array_equal(surprise(model, frames, actions), surprise(model, frames[:11], actions[:10]))


def test_a_clip_shorter_than_the_history_is_scored_with_what_there_is():
    model = PointModel(history=9)
    frames, actions = np.stack([model.picture([t, 0]) for t in range(5)]), np.tile([1.0, 0.0], (4, 1))
    assert surprise(model, frames, actions).shape == (2,)


def test_a_clip_that_stands_still_may_be_the_surprise():
    model = PointModel()
    still = np.stack([model.picture([1, 1])] * 5)
    assert surprise(model, still, np.zeros((4, 2))).max() < 1e-12
    frozen = surprise(model, still, np.tile([0.5, 0.0], (4, 1)))  # a camera that hangs
    np.testing.assert_allclose(frozen, [0.5, 0.5], rtol=1e-6)  # 1 along x was predicted, 0 came


@pytest.mark.parametrize(
    ("frames", "actions", "match"),
    [
        ((5, 16, 16, 3), (4, 2), r"frames must be at least 6, one block of 5 actions and what they lead to, got 5"),
        ((11, 16, 16, 3), (11, 2), r"actions must be of shape \(10, 2\), .* got \(11, 2\)"),
        ((11, 16, 16, 3), (10, 3), r"actions must be of shape \(10, 2\)"),
        ((2, 11, 16, 16, 3), (10, 2), r"actions must be of shape \(2, 10, 2\)"),
        ((16, 16, 3), (10, 2), r"frames must be of shape"),
        ((11, 16, 12, 3), (10, 2), r"frames must be square"),
    ],
)
def test_surprise_refuses_what_does_not_fit(frames, actions, match):
    with pytest.raises(ValueError, match=match):
        surprise(network_model(), np.zeros(frames, np.uint8), np.zeros(actions))


def test_surprise_refuses_numbers_and_models_that_cannot_be():
    model, (frames, actions) = network_model(), clip(11)
    with pytest.raises(ValueError, match=r"frames must be uint8"):
        surprise(model, frames / 255, actions)
    actions[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"actions must be finite, got 1 numbers that are not"):
        surprise(model, frames, actions)
    bare = lewm.Model(model.config, model._engine.weights(), backend="cpu", precision="float32")
    with pytest.raises(ValueError, match=r"model has no action statistics"):
        surprise(bare, frames, actions)
    for no_predictor in (object(), type("Encoder", (), {"encode": lambda *_: None})()):
        with pytest.raises(TypeError, match=r"model must be a lewm\.Model, which encodes and predicts"):
            surprise(no_predictor, frames, actions)
        with pytest.raises(TypeError, match=r"model must be a lewm\.Model, which encodes and predicts"):
            voe(no_predictor, "two-room")


# --------------------------------------------------------------------------------------------------------- statistics


def test_student_p_values_are_those_of_tables():
    for freedom, t, p in (  # two-sided critical values
        (1, 12.70620473617471, 0.05), (2, 4.302652729911275, 0.05), (5, 4.032142983557536, 0.01),
        (10, 2.2281388519649385, 0.05), (10, 4.586893858702636, 0.001), (30, 2.0422724563012373, 0.05),
        (99, 1.9842169515086827, 0.05), (99, 2.626405457066202, 0.01),
    ):  # fmt: skip
        assert student_p(t, freedom) == pytest.approx(p, rel=1e-9)
        assert student_p(-t, freedom) == student_p(t, freedom)
        assert student_quantile(p, freedom) == pytest.approx(t, rel=1e-9)
    for t in (1e-8, 0.3, 1.0, 40.0, 1e6):  # one degree of freedom is Cauchy's distribution
        assert student_p(t, 1) == pytest.approx(2 * math.atan2(1, t) / math.pi, rel=1e-12)
        assert student_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-12, abs=1e-15)
    assert student_p(0.0, 7) == 1
    assert student_p(math.inf, 7) == 0


def test_student_p_values_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 7, 30, 99, 400, 5000):
        for t in (0.01, 0.4, 1.0, 1.7, 2.0, 3.3, 8.0, 30.0):
            assert student_p(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-10)
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 40), rng.normal(0, 1, 40)
    want, found = stats.ttest_rel(a, b), PairedTest.of(a, b)
    assert (found.t, found.p) == pytest.approx((want.statistic, want.pvalue), rel=1e-10)
    interval = want.confidence_interval(0.95)
    assert found.interval == pytest.approx((interval.low, interval.high), rel=1e-10)
    assert found.difference == pytest.approx((a - b).mean())
    assert found.n == 40


def test_a_paired_test_of_clips_that_do_not_differ():
    found = PairedTest.of([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (found.t, found.p, found.interval) == (0, 1, (0, 0))
    assert PairedTest.of([2.0, 3.0], [1.0, 2.0]).p == 0
    assert PairedTest.of([1.0, 2.0], [2.0, 3.0]).t == -math.inf


# -------------------------------------------------------------------------------------------------------------- clips


class ColourBlind(RoomModel):
    """Knows TwoRoom, whatever the agent's colour."""

    def encode(self, frames, *, name="frames"):
        shape = frames.max(-1).astype(np.float64) - frames.min(-1)
        return super().encode(np.stack([shape, 0 * shape, shape], axis=-1), name=name)


class Means(PointModel):
    """Latents are mean colours, and nothing ever changes."""

    def __init__(self, action_dim, meta=None, history=1):
        stats = {"mean": np.zeros(action_dim), "std": np.ones(action_dim)}
        stats |= {"low": -stats["std"], "high": stats["std"]}
        super().__init__(action_dim, block=5, stats=stats, size=32, history=history)
        self.meta = meta or {}

    def encode(self, frames, *, name="frames"):
        return frames.mean((-3, -2)).astype(np.float32)

    def rollout(self, z, candidates, past_actions=None):
        last = np.repeat(z[:, None, -1:], candidates.shape[2], axis=2)
        return np.concatenate([z[:, None], last], axis=2)


def test_a_model_that_knows_the_room_is_surprised_by_the_teleport_alone(tmp_path):
    done = []
    found = voe(
        ColourBlind(), "two-room", clips=18, blocks=4, out=tmp_path / "voe", progress=lambda *now: done.append(now)
    )
    assert done == [(16, 18), (18, 18)]
    assert (found.change, found.steps, found.history) == (10, [5, 10, 15, 20], 1)
    assert found.tests["physical"].p < 0.01
    assert found.tests["physical"].difference > 100
    assert found.tests["visual"].difference == pytest.approx(0, abs=1e-6)
    assert found.tests["physical"].n == 18
    scores = {kind: np.array(found.scores[kind]) for kind in KINDS}
    assert scores["normal"].shape == (18, 4)
    np.testing.assert_allclose(scores["physical"][:, :1], scores["normal"][:, :1])  # before the change
    assert scores["physical"][:, 2:].max() < 1  # where it was teleported to it goes on as it must
    for kind in KINDS:
        np.testing.assert_array_equal(scores[kind][:, 1], found.clip_scores[kind])
    assert "teleported" in str(found)

    written = json.loads((tmp_path / "voe" / "voe.json").read_text())
    assert written == json.loads(json.dumps(found.to_dict()))
    curve = written["curves"]["physical"]
    np.testing.assert_allclose(curve["mean"], scores["physical"].mean(0))
    spread = scores["physical"].std(0, ddof=1) / math.sqrt(18) * student_quantile(0.05, 17)
    np.testing.assert_allclose(curve["high"], scores["physical"].mean(0) + spread)
    assert imageio.imread(tmp_path / "voe" / "voe.png").shape[2] in (3, 4)
    film = imageio.imread(tmp_path / "voe" / "voe.gif", index=None)
    assert len(film) >= 21
    assert sorted(path.name for path in (tmp_path / "voe").iterdir()) == ["voe.gif", "voe.json", "voe.png"]


def test_a_model_that_sees_colours_is_surprised_by_them():
    class Coloured(ColourBlind):
        def encode(self, frames, *, name="frames"):
            z = super().encode(frames, name=name)
            return z + 50 * (frames[..., 2] > frames[..., 0]).any((-2, -1))[..., None]

    found = voe(Coloured(), "two-room", clips=8, blocks=4)
    assert found.tests["visual"].p < 0.01
    assert found.tests["visual"].difference == pytest.approx(2500, rel=0.1)


def test_clips_are_the_same_whatever_their_number_and_of_the_seed_alone():
    few, many = (voe(ColourBlind(), "two-room", clips=n, blocks=4, seed=1) for n in (3, 5))
    other = voe(ColourBlind(), "two-room", clips=3, blocks=4, seed=2)
    for kind in KINDS:
        np.testing.assert_allclose(few.scores[kind], many.scores[kind][:3], rtol=1e-9, atol=1e-9)
        assert not np.allclose(few.scores[kind], other.scores[kind])


def test_the_score_is_over_the_steps_that_see_both_sides_of_the_change():
    model = Means(2, history=3)
    found = voe(model, "two-room", clips=2, blocks=8)
    assert found.change == 20
    rows = np.array(found.scores["physical"])
    np.testing.assert_allclose(found.clip_scores["physical"], rows[:, 3:6].mean(1))  # frames at 20, 25 and 30


@pytest.mark.parametrize("task", TASKS)
def test_clips_of_all_environments_are_matched(task, monkeypatch):
    """States and pictures: the same before the change, one thing changed after it, the same actions throughout."""
    env_id, width = TASKS[task], 5 if task == "cube" else 2
    learnt = {"env_id": env_id, "policy": "random", "env_kwargs": {}}
    if task == "pusht":
        learnt["env_kwargs"] = {"start_rule": "mark"}  # how episodes start is not the clips' affair
    kept = []
    whole = expectation._Clip.of.__func__

    def keep(cls, *arguments):
        kept.append(whole(cls, *arguments))
        return kept[-1]

    monkeypatch.setattr(expectation._Clip, "of", classmethod(keep))
    try:
        found = voe(Means(width, {"data": learnt}), clips=2, blocks=2)
    except (ModuleNotFoundError, OSError) as error:
        pytest.skip(str(error))
    assert (found.env_id, found.policy, found.env_kwargs) == (env_id, "random", {})
    assert len(kept) == 2
    simulator = envs.simulator(env_id)
    for made in kept:
        assert made.change == 5
        np.testing.assert_array_equal(made.physical[:5], made.normal[:5])
        assert (made.physical[5] != made.normal[5]).any()
        simulator.set_state(made.physical[5])  # the physics that goes on is the environment's
        for t in range(5, 10):
            simulator.step(made.actions[t].astype(np.float64))
            np.testing.assert_array_equal(simulator.get_state(), made.physical[t + 1])
        normal, visual, physical = made.frames(simulator, 32, 1)
        for t, state in enumerate(made.normal):
            simulator.recoloured = False
            simulator.set_state(state)
            np.testing.assert_array_equal(simulator.render(32), normal[t])
            same = t < 5
            assert (visual[t] == normal[t]).all() == same
            assert (physical[t] == normal[t]).all() == same
        every = made.frames(simulator, 32, 5)
        np.testing.assert_array_equal(every, np.stack([normal, visual, physical])[:, ::5])
    simulator.close()


def test_a_clip_that_is_not_teleported_would_be_the_episode():
    """The simulator that goes on is the environment, step for step."""
    simulator = envs.simulator("lewm/TwoRoom-v0")
    episode = next(expectation._episodes("lewm/TwoRoom-v0", {}, "expert", 2, 20, 0, 2))
    simulator.teleported = lambda state, rng: state
    np.testing.assert_array_equal(expectation._Clip.of(simulator, episode, 10, 0).physical, episode.states)
    states = [episode.states[:1]]
    for action in episode.actions:
        states.append(step_states(states[-1], action[None]))
    np.testing.assert_array_equal(np.concatenate(states), episode.states)
    np.testing.assert_array_equal(expectation._drawn(simulator, episode.states, 48), render_states(episode.states, 48))


def test_the_episodes_are_those_of_no_collect(tmp_path):
    data = lewm.collect("lewm/TwoRoom-v0", tmp_path / "d.lewm", episodes=2, size=16, seed=0)
    episodes = expectation._episodes("lewm/TwoRoom-v0", {}, "expert", 2, 20, 0, 2)
    starts = {tuple(next(episodes).states[0]) for _ in range(2)}
    assert not starts & {tuple(data.column("state", i)[0]) for i in range(2)}


@pytest.mark.parametrize(
    ("model", "settings", "error", "match"),
    [
        (Means(2), {"task": "maze"}, ValueError, r"task must be one of two-room, pusht, reacher, cube, got 'maze'"),
        (Means(2), {}, ValueError, r"task must be given where the model's file does not say .*: one of two-room"),
        (Means(2), {"clips": 1}, ValueError, r"clips must be an integer of at least 2, got 1"),
        (Means(2), {"seed": -1}, ValueError, r"seed must be an integer of at least 0"),
        (Means(2), {"blocks": 1}, ValueError, r"blocks must be an integer of at least 2"),
        (Means(2, history=4), {"blocks": 7}, ValueError, r"blocks must be at least 8: clips are shorter than .* of 4"),
        (Means(2), {"blocks": 300}, ValueError, r"blocks must leave enough episodes that last 1500 steps, got 300"),
        (Means(3), {}, ValueError, r"task must have the model's actions of width 3"),
        (Means(2, {"data": {"env_id": "lewm/PushT-v0"}}), {}, ValueError, r"task must be that of the model, .*PushT"),
        (Means(2, {"data": {"env_id": ["x"]}}), {"task": None}, ValueError, r"task must be given .*got \['x'\]"),
    ],
)
def test_voe_refuses_what_does_not_fit(model, settings, error, match):
    if "model's file does not" not in match and "got \\['x" not in match:
        settings = {"task": "two-room", **settings}
    with pytest.raises(error, match=match):
        voe(model, **{"clips": 2, "blocks": 4, **settings})


def test_pictures_that_do_not_change_are_refused(monkeypatch, tmp_path):
    blank = np.zeros((32, 32, 3), np.uint8)
    monkeypatch.setattr("lewm.envs.two_room.TwoRoom.render", lambda self, size: blank)
    with pytest.raises(ValueError, match=r"frames must change over a clip, but .* episodes \[0, 1\] are constant"):
        voe(Means(2), "two-room", clips=2, blocks=2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    model = network_model(history=1)
    model.meta = {"preset": "tiny", "planner": {}}
    model.save(tmp_path / "model.safetensors")
    arguments = ["voe", "--task", "two-room", str(tmp_path / "model.safetensors"), "--clips", "2", "--blocks", "2"]
    result = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "teleported" in result.output
    assert json.loads((tmp_path / "out" / "voe.json").read_text())["clips"] == 2
