"""Imagined clips and fans of plans, on models whose dynamics are known, and by the command."""

import dataclasses
import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
imageio = pytest.importorskip("imageio.v3")
from typer.testing import CliRunner

import lewm
from fake_models import PointModel
from lewm import cli, imagination
from lewm.decoder import psnr
from lewm.imagination import draw_fan, draw_imagination, fan, imagine, imagine_episodes, table
from test_decoder import small_model
from test_trainer import write_store


class Point(PointModel):
    """As the planner asks it: with the kind of cost; and it notes the candidates."""

    def costs(self, z, goal, candidates, past_actions=None, cost=None):
        return super().costs(z, goal, candidates, past_actions)


class Painter:
    """Paints the position that a latent is, as `PointModel.picture` does."""

    model = "f" * 64

    def __init__(self, model, meta=None):
        self.picture, self.meta = model.picture, meta or {}

    def __call__(self, z):
        return np.stack([self.picture(row) for row in z.reshape(-1, z.shape[-1])]).reshape(*z.shape[:-1], 8, 8, 3)


def clip_of(model, steps=9, seed=0):
    """Frames and whole-numbered actions of a clip that goes exactly as the model thinks; in between nobody looks."""
    actions = np.random.default_rng(seed).integers(-1, 2, (steps, 2)).astype(np.float32)
    block = model.config.action_block
    blocks = model.normalise(actions[: steps // block * block].reshape(1, 1, -1, block * 2))
    positions = model.rollout(np.array([[[0.5, -0.3]]]), blocks)[0, 0]
    frames = np.zeros((steps + 1, 8, 8, 3), np.uint8)
    for i, position in enumerate(positions):
        frames[i * block] = model.picture(position)
    return frames, actions, positions


def store_of(model, path, lengths=(10, 4, 2, 12, 7)):
    clips = [clip_of(model, length - 1, seed) for seed, length in enumerate(lengths)]
    actions = [np.concatenate([a, np.zeros((1, 2), np.float32)]) for _, a, _ in clips]
    frames = np.concatenate([f for f, _, _ in clips])
    return lewm.Dataset.from_arrays(frames, np.concatenate(actions), np.cumsum(lengths), path, low=-1, high=1)


@pytest.mark.parametrize("history", [1, 2, 3])
def test_a_model_that_is_right_imagines_what_happens(history):
    model = Point(history=history)
    frames, actions, positions = clip_of(model)
    found = imagine(model, frames, actions, Painter(model))
    assert (found.context, len(found.z)) == (history, 5)
    np.testing.assert_array_equal(found.frames, frames[::2])
    np.testing.assert_allclose(found.z, positions, atol=1e-5)
    np.testing.assert_allclose(found.error, 0, atol=1e-9)
    np.testing.assert_array_equal(found.reconstructed, frames[::2])
    np.testing.assert_array_equal(found.imagined, frames[::2])
    still = np.square(positions - positions[history - 1]).sum(-1)
    still[:history] = 0
    np.testing.assert_allclose(found.error_still, still, atol=1e-5)
    z, candidates, past = model.asked[-1]
    assert z.shape == (1, history, 2)
    assert candidates.shape == (1, 1, 5 - history, 4)
    assert (past is None) == (history == 1)
    if history > 1:
        np.testing.assert_allclose(past[0], model.normalise(actions[: 2 * (history - 1)].reshape(-1, 4)), rtol=1e-6)


def test_it_sees_nothing_after_the_context():
    model = Point(history=2)
    frames, actions, positions = clip_of(model)
    changed = frames.copy()
    changed[3:] = 77
    found, before = imagine(model, changed, actions), imagine(model, frames, actions)
    np.testing.assert_array_equal(found.imagined_z, before.imagined_z)
    assert found.imagined is None
    np.testing.assert_allclose(found.error[2:], np.square(positions[2:] + 2.3).sum(-1), rtol=1e-4)
    np.testing.assert_array_equal(found.error[:2], 0)


def test_steps_cut_the_clip():
    model = Point(history=2)
    frames, actions, _ = clip_of(model)
    whole, short = imagine(model, frames, actions), imagine(model, frames, actions, steps=1)
    assert len(short.z) == 3
    np.testing.assert_array_equal(short.imagined_z, whole.imagined_z[:3])


@pytest.mark.parametrize(
    ("length", "settings", "problem"),
    [
        (3, {}, "frames must hold at least 5 frames, 2 of context and one to imagine"),
        (4, {}, "got 4"),
        (10, {"steps": 4}, "steps must be at most 3, the blocks after the context in frames, got 4"),
        (10, {"steps": 0}, "steps must be an integer of at least 1"),
    ],
)
def test_a_clip_that_is_too_short_is_refused(length, settings, problem):
    model = Point(history=2)
    frames, actions, _ = clip_of(model)
    with pytest.raises(ValueError, match=problem):
        imagine(model, frames[:length], actions[: length - 1], **settings)


def test_bad_clips_are_named():
    model = Point()
    frames, actions, _ = clip_of(model)
    with pytest.raises(ValueError, match=r"actions must be of shape \(9, 2\), one between each two of 10 frames"):
        imagine(model, frames, actions[:-1])
    with pytest.raises(ValueError, match="actions must be finite"):
        imagine(model, frames, np.where(np.arange(9)[:, None] == 3, np.nan, actions))
    with pytest.raises(ValueError, match="frames must be uint8"):
        imagine(model, frames / 255, actions)
    with pytest.raises(ValueError, match="frames must be of shape"):
        imagine(model, frames[0], actions)
    painter = Painter(model)
    painter.model = "e" * 64
    with pytest.raises(ValueError, match="decoder must be of this model .ffff.*, got one of eeee"):
        imagine(model, frames, actions, painter)
    blind = small_model()
    blind.stats = None
    with pytest.raises(ValueError, match="no action statistics"):
        imagine(blind, np.zeros((20, 16, 16, 3), np.uint8), np.zeros((19, 2)))


def test_episodes_are_held_out_and_long_enough(tmp_path):
    model = Point()
    data = store_of(model, tmp_path / "d.lewm")
    assert [clip.episode for clip in imagine_episodes(model, data, episodes=9)] == [0, 1, 3, 4]
    assert [clip.episode for clip in imagine_episodes(model, data, episodes=9, steps=4)] == [0, 3]
    assert {len(clip.z) for clip in imagine_episodes(model, data, steps=3)} == {4}
    own = {"fingerprint": data.fingerprint()}
    model.meta = {"data": own, "training": {"validation_episodes": [2, 3, 4]}}
    assert [clip.episode for clip in imagine_episodes(model, data)] == [3, 4]
    painter = Painter(model, {"data": own, "training": {"validation_episodes": [0, 4]}})
    [clip] = imagine_episodes(model, data, painter)
    assert clip.episode == 4
    want = imagine(model, data.frames(4), data.actions(4), painter)
    for field in dataclasses.fields(clip):
        if field.name != "episode":
            np.testing.assert_array_equal(getattr(clip, field.name), getattr(want, field.name))


def test_episodes_are_chosen_by_the_seed(tmp_path):
    model = Point()
    data = store_of(model, tmp_path / "d.lewm", lengths=[5] * 20)
    chosen = [[c.episode for c in imagine_episodes(model, data, seed=seed)] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] == sorted(chosen[0])


def test_no_episode_to_show_is_an_error(tmp_path):
    model = Point()
    data = store_of(model, tmp_path / "d.lewm")
    with pytest.raises(ValueError, match="at least 15 frames, for 1 of context and 7 blocks of 2 .* longest has 12"):
        imagine_episodes(model, data, steps=7)
    with pytest.raises(ValueError, match="episodes must be an integer of at least 1"):
        imagine_episodes(model, data, episodes=0)
    with pytest.raises(ValueError, match="data must have actions of width 3, got 2"):
        imagine_episodes(Point(action_dim=3), data)


def test_the_table_is_of_means_over_clips_that_go_so_far():
    model = Point()
    short, long = (imagine(model, *clip_of(model, steps, seed)[:2], Painter(model)) for steps, seed in ((5, 1), (9, 2)))
    off = dataclasses.replace(long, imagined_z=long.imagined_z + np.arange(5, dtype=np.float32)[:, None])
    off = dataclasses.replace(off, imagined=off.imagined ^ 1)
    rows = table([short, off])
    assert [(row["blocks"], row["clips"]) for row in rows] == [(1, 2), (2, 2), (3, 1), (4, 1)]
    np.testing.assert_allclose([row["error"] for row in rows], [1, 4, 18, 32], rtol=1e-5)
    assert rows[0]["error_still"] == pytest.approx((short.error_still[1] + off.error_still[1]) / 2)
    assert [row["psnr_reconstructed"] for row in rows] == [100] * 4
    assert rows[3]["psnr_imagined"] == pytest.approx(20 * np.log10(255))
    assert psnr(np.zeros(3, np.uint8), np.full(3, 255, np.uint8)) == 0
    assert "psnr_imagined" not in table([imagine(model, *clip_of(model)[:2])])[0]


def test_the_gif_shows_every_block_and_rests_on_the_end(tmp_path):
    model = Point(history=2)
    clips = [imagine(model, *clip_of(model, steps, seed)[:2], Painter(model)) for steps, seed in ((5, 1), (9, 2))]
    draw_imagination(clips, tmp_path / "x.gif", fps=2)
    frames = imageio.imread(tmp_path / "x.gif").astype(int)
    meta = imageio.immeta(tmp_path / "x.gif")
    assert meta["duration"] in (500, 1500)  # a rest may be one long frame
    assert len(frames) in (5, 7)
    green, red = (np.abs(frames - colour).sum(-1) < 60 for colour in ([63, 143, 79], [200, 64, 47]))
    assert green[1].sum() > 500
    assert green[2].sum() < green[1].sum() / 10
    assert red[2].sum() > 500
    assert red[1].sum() < red[2].sum() / 10
    assert list(tmp_path.iterdir()) == [tmp_path / "x.gif"]


def test_what_cannot_be_drawn_is_named(tmp_path):
    model = Point()
    clip = imagine(model, *clip_of(model)[:2])
    for found in ([], [clip]):
        with pytest.raises(ValueError, match="found must be clips with pictures"):
            draw_imagination(found, tmp_path / "x.gif")
    with pytest.raises(ValueError, match="path must end in .gif"):
        draw_imagination([clip], tmp_path / "x.mp4")
    painted = imagine(model, *clip_of(model)[:2], Painter(model))
    with pytest.raises(ValueError, match="fps must be a positive number"):
        draw_imagination([painted], tmp_path / "x.gif", fps=0)


PLANNERS = [
    lewm.CEM(samples=20, iterations=4, elites=5, horizon=3),
    lewm.CEM(samples=20, iterations=1, elites=5, horizon=3, reference=True),
    lewm.ICEM(samples=20, iterations=3, elites=4, horizon=3),
    lewm.MPPI(samples=20, iterations=2, elites=6, horizon=2),
]


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda p: f"{type(p).__name__}-{p.iterations}")
def test_a_fan_is_of_the_search_of_the_plan(planner):
    model = Point()
    obs, goal = model.picture([0, 0]), model.picture([3, -2])
    found = fan(model, obs, goal, planner=planner, seed=7)
    plain = lewm.plan(obs, goal, model=model, planner=planner, seed=7)
    np.testing.assert_array_equal(found.plan.actions, plain.actions)
    assert found.plan.cost == plain.cost
    np.testing.assert_allclose(found.goal, [3, -2])
    wanted = [1] if planner.iterations == 1 else [1, planner.iterations]
    assert [shown.iteration for shown in found.rounds] == wanted
    for shown in found.rounds:
        samples = len(shown.costs)
        assert shown.paths.shape == (samples, planner.horizon + 1, 2)
        np.testing.assert_array_equal(shown.paths[:, 0], np.zeros((samples, 2)))
        np.testing.assert_allclose(np.square(shown.paths[:, -1] - found.goal).sum(-1), shown.costs, rtol=1e-5)
        assert shown.elites.sum() == planner.elites
        assert shown.costs[shown.elites].max() <= shown.costs[~shown.elites].min()
        trace = found.plan.trace[shown.iteration - 1]
        if not isinstance(planner, lewm.ICEM):  # whose kept elites are in its mean too
            assert shown.costs[shown.elites].mean() == pytest.approx(trace, rel=1e-5)
    assert len(found.rounds[0].costs) == planner.samples


def test_a_fan_of_a_real_model_is_that_of_its_plan():
    model = small_model()
    obs, goal = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    found = fan(model, obs, goal, planner=PLANNERS[0])
    plain = lewm.plan(obs, goal, model=model, planner=PLANNERS[0], return_rollout=True)
    np.testing.assert_allclose(found.plan.actions, plain.actions, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.plan.imagined, plain.imagined, rtol=1e-5, atol=1e-6)
    for shown in found.rounds:
        cost = model.cost(shown.paths[None], found.goal[None])[0]
        np.testing.assert_allclose(shown.costs, cost, rtol=1e-4)


def test_a_fan_begins_now_whatever_the_history():
    model = Point(history=2)
    past, now = model.picture([1, 1]), model.picture([2, 2])
    found = fan(model, np.stack([past, now]), now, planner=PLANNERS[0], past_actions=np.full((1, 4), 0.5))
    np.testing.assert_allclose(found.rounds[0].paths[:, 0], np.full((20, 2), 2.0))
    assert found.rounds[0].paths.shape == (20, 4, 2)
    with pytest.raises(ValueError, match=r"obs must be of one environment, with 3 axes, got shape \(2, 8, 8, 3\)"):
        fan(model, np.stack([past, now]), now, planner=PLANNERS[0])


def test_the_plane_is_that_of_the_principal_components():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((400, 5)) * [9, 4, 1, 0.5, 0.1] + 3
    project, share = imagination._plane(z)
    values, vectors = np.linalg.eigh(np.cov(z, rowvar=False))
    np.testing.assert_allclose(share, values[::-1][:2] / values.sum())
    want = (z - z.mean(0)) @ vectors[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(project(z)), np.abs(want), atol=1e-9)
    line, share = imagination._plane(z[:, :1])  # of one dimension
    assert line(z[:, :1]).shape == (400, 2)
    assert share.tolist() == [1, 0]


@pytest.mark.parametrize("painted", [False, True])
@pytest.mark.parametrize("planner", PLANNERS[:3], ids=lambda p: f"{type(p).__name__}-{p.iterations}")
def test_a_fan_is_drawn(tmp_path, painted, planner):
    model = Point()
    obs, goal = model.picture([0, 0]), model.picture([3, -2])
    file = tmp_path / "fan.png"
    found = draw_fan(model, obs, goal, file, planner=planner, decoder=Painter(model) if painted else None)
    np.testing.assert_array_equal(found.plan.actions, fan(model, obs, goal, planner=planner).plan.actions)
    picture = imageio.imread(file)
    assert picture.shape[0] > 500
    assert (np.abs(picture[..., :3].astype(int) - [200, 64, 47]).sum(-1) < 30).sum() > 50  # the plan
    assert list(tmp_path.iterdir()) == [file]


def test_a_fan_that_cannot_be_drawn_is_named(tmp_path):
    model, painter = Point(), None
    obs = model.picture([0, 0])
    with pytest.raises(ValueError, match="path must end in .png"):
        draw_fan(model, obs, obs, tmp_path / "fan.gif", planner=PLANNERS[0])
    painter = Painter(model)
    painter.model = "e" * 64
    with pytest.raises(ValueError, match="decoder must be of this model"):
        draw_fan(model, obs, obs, tmp_path / "fan.png", planner=PLANNERS[0], decoder=painter)


def test_the_commands(tmp_path):
    data = write_store(tmp_path / "square.lewm", episodes=4, length=12)
    model = small_model()
    (tmp_path / "run").mkdir()
    model.save(tmp_path / "run" / "model.safetensors")
    run, out = tmp_path / "run", tmp_path / "imagined.gif"
    words = ["imagine", str(run), str(data.path), "--out", str(out), "--decoder-steps", "3", "--episodes", "2"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    assert f"no decoder yet: training one, {run / 'decoder.safetensors'}" in result.output
    rows = re.findall(r"^ +(\d) +(\d) +\S+ \(\S+\) +[\d.]+ \([\d.]+\)$", result.output, re.M)
    assert rows[0] == ("1", "1")  # of four episodes one is the decoder's to be measured on
    assert len(imageio.imread(out)) >= 3
    before = (run / "decoder.safetensors").read_bytes()
    result = CliRunner().invoke(cli.app, [*words[:-2], "--steps", "1"])
    assert "no decoder yet" not in result.output
    assert (run / "decoder.safetensors").read_bytes() == before

    for name, frame in (("now", data.frames(0)[0]), ("goal", data.frames(0)[8])):
        imageio.imwrite(tmp_path / f"{name}.png", frame)
    words = ["plan", str(run), str(tmp_path / "now.png"), str(tmp_path / "goal.png"), "--planner", "samples=12"]
    words += ["--planner", "elites=4", "--planner", "name=cem"]
    plain = CliRunner().invoke(cli.app, words)
    drawn = CliRunner().invoke(cli.app, [*words, "--fan", str(tmp_path / "fan.png")])
    assert (plain.exit_code, drawn.exit_code) == (0, 0), drawn.output
    assert json.loads(drawn.stdout)["actions"] == json.loads(plain.stdout)["actions"]
    assert imageio.imread(tmp_path / "fan.png").std() > 10

    small_model(seed=1).save(run / "model.safetensors")  # trained anew
    result = CliRunner().invoke(cli.app, ["imagine", str(run), str(data.path), "--out", str(out)])
    assert isinstance(result.exception, ValueError)
    assert "is of another model" in str(result.exception)
    assert CliRunner().invoke(cli.app, ["imagine", str(run), str(data.path), "--steps", "9"]).exit_code == 1
    assert (tmp_path / "run" / "decoder.safetensors").read_bytes() == before
