"""Probes against the mathematics written out, on encoders of which it is known what they hold."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

import lewm
from lewm import probes
from lewm._core import StoreWriter
from lewm.cli import app
from test_trainer import TINY, write_store

LENGTHS = (20, 31, 12, 25, 40, 17, 23, 36, 28, 14)


def write(path, columns, lengths=LENGTHS, env_id="own", frames=None):
    """Episodes whose frames hold, in their first pixels, what `columns` is given: `place` (2,), the time, the episode.

    `columns` makes from places (n, 2) and an episode's number what is recorded.
    """
    rng = np.random.default_rng(0)
    rows = [columns(np.zeros((2, 2)), 0)]
    widths = {name: np.atleast_2d(value.T).T.shape[1] for name, value in rows[0].items()}
    metadata = {"action_low": [-1], "action_high": [1], "env_id": env_id}
    with StoreWriter(
        str(path), height=8, width=8, action_dim=1, columns=widths, metadata=json.dumps(metadata)
    ) as writer:
        for episode, length in enumerate(lengths):
            places = rng.integers(0, 256, (length, 2))
            pictures = np.zeros((length, 8, 8, 3), np.uint8)
            pictures[:, 0, 0, :2] = places
            pictures[:, 0, 1, 0] = np.arange(length)
            pictures[:, 0, 1, 1] = episode
            recorded = {name: value.reshape(length, -1) for name, value in columns(places / 100, episode).items()}
            writer.append(pictures if frames is None else frames(pictures), np.zeros((length - 1, 1), "f4"), recorded)
    return lewm.Dataset(path)


def places(frames):
    """(N, 3): the place, and their sum again, so that latents are collinear."""
    z = frames[:, 0, 0, :2].astype(np.float32) / 50 - 2
    return np.c_[z, z.sum(1)]


def own(places, episode):
    rng = np.random.default_rng((7, episode))
    return {
        "place": places,
        "shift": 3 - 5 * places[:, 0],
        "bowl": (places**2).sum(1) - 2.56 * places.sum(1),  # least in the middle: hardly linear
        "noise": rng.normal(size=(len(places), 2)),
    }


@pytest.fixture(scope="module", autouse=True)
def small():
    """MLPs that take less time: there is little to learn here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "_HIDDEN", 48)
        patch.setattr(probes, "_EPOCHS", 40)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("store") / "d.lewm", own)


@pytest.fixture(scope="module")
def found(data):
    return lewm.probe(places, data, block=2)


# -------------------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize(("n", "d"), [(50, 7), (7, 50), (1, 3), (12, 1)])
def test_ridge_is_least_squares_with_a_penalty(n, d):
    rng = np.random.default_rng(n)
    z, y, test = (
        rng.normal(size=(n, d)) * 10 ** rng.normal(size=d) + 3,
        rng.normal(size=(n, 2)),
        rng.normal(size=(5, d)),
    )
    scale = z.std(0)
    scale[scale == 0] = 1
    a, b = (z - z.mean(0)) / scale, (test - z.mean(0)) / scale
    for penalty, predicted in zip(probes._PENALTIES, probes.ridge(z, y, test), strict=True):
        # Least squares with a row for each weight, whose condition is but the root of the normal equations'.
        rows = np.r_[a, np.sqrt(penalty * n) * np.eye(d)]
        weights = np.linalg.lstsq(rows, np.r_[y - y.mean(0), np.zeros((d, 2))], rcond=None)[0]
        # What float64 leaves of the normal equations' condition, at most d / penalty.
        np.testing.assert_allclose(predicted, b @ weights + y.mean(0), rtol=1e-6, atol=1e-6)


def test_scores_are_what_they_say():
    rng = np.random.default_rng(1)
    lengths = [4, 1, 9, 13]
    starts = np.cumsum([0, *lengths[:-1]])
    truth = rng.normal(size=(sum(lengths), 3)) * [1, 5, 0.1] + [0, 2, -3]
    predicted = truth + rng.normal(size=truth.shape) * [0.3, 3, 0.2]
    score = probes._score(predicted, truth, starts)
    parts = np.split(np.arange(len(truth)), starts[1:])
    each = [np.mean([(predicted[i, j] - truth[i, j]) ** 2 for i in part for j in range(3)]) for part in parts]
    assert score.mse == pytest.approx(np.mean(each))
    assert score.mse_std == pytest.approx(np.std(each))

    def r(rows):
        return np.mean([np.corrcoef(predicted[rows, j], truth[rows, j])[0, 1] for j in range(3)])

    assert score.r == pytest.approx(r(np.arange(len(truth))))
    without = [r(np.setdiff1d(np.arange(len(truth)), part)) for part in parts]
    n = len(parts)
    assert score.r_std == pytest.approx(np.sqrt((n - 1) / n * np.sum((without - np.mean(without)) ** 2)))
    explained = [
        1 - ((predicted - truth)[:, j] ** 2).sum() / ((truth[:, j] - truth[:, j].mean()) ** 2).sum() for j in range(3)
    ]
    assert score.r2 == pytest.approx(np.mean(explained))


def test_a_single_episode_has_no_spread():
    score = probes._score(np.arange(6.0)[:, None], 2 * np.arange(6.0)[:, None], np.array([0]))
    assert (score.mse_std, score.r_std) == (None, None)
    assert score.r == pytest.approx(1)


def test_a_prediction_that_does_not_vary_correlates_with_nothing():
    score = probes._score(np.zeros((6, 1)), np.arange(6.0)[:, None], np.array([0, 3]))
    assert score.r == score.r_std == 0


# -------------------------------------------------------------------------------------------------------- what it finds


def test_each_quantity_is_read_as_well_as_latents_hold_it(found):
    linear = {name: each.linear for name, each in found.properties.items()}
    mlp = {name: each.mlp for name, each in found.properties.items()}
    assert {name: each.dims for name, each in found.properties.items()} == {
        "place": 2,
        "shift": 1,
        "bowl": 1,
        "noise": 2,
    }
    for name in ("place", "shift"):
        assert linear[name].r > 0.99999
        assert linear[name].mse < 1e-5  # standardised: the shift's own scale does not matter
        assert linear[name].r2 > 0.99999
        assert mlp[name].r > 0.98
    assert abs(linear["bowl"].r) < 0.4
    assert mlp["bowl"].r > 0.9
    assert abs(linear["noise"].r) < 0.3
    assert 0.8 < linear["noise"].mse < 1.4
    assert linear["noise"].r2 < 0.1
    # A plane has two directions, however many numbers say so.
    assert 1.5 < found.effective_rank <= 2.01
    assert (found.width, found.block, found.split, found.notes) == (3, 2, "seed", [])
    # Places are drawn anew in each frame: steps of such a path turn back by half on average.
    assert found.straightness == pytest.approx(-0.5, abs=0.15)
    assert found.straightness_std > 0


def test_episodes_are_divided_and_walked_through_by_blocks(data):
    seen = []

    def encode(frames):
        seen.append(frames[:, 0, 1, :2].astype(int))
        return places(frames)

    steps = []
    result = lewm.probe(encode, data, block=3, frames=100, progress=lambda done, total: steps.append((done, total)))
    rows = np.concatenate(seen)
    tested = set(data.split(0.2, 0)[1])
    test = rows[np.isin(rows[:, 1], list(tested))]
    for episode in tested:
        assert test[test[:, 1] == episode][:, 0].tolist() == list(range(0, LENGTHS[episode], 3))
    assert len(test) == result.test_frames
    assert len(rows) - len(test) == result.fit_frames == 100
    assert result.test_episodes == 2
    assert result.fit_episodes <= 8
    assert steps[-1] == (len(rows), len(rows))

    given = lewm.probe(places, data, block=3, episodes=[4, 4, 1], columns="place")
    assert (given.split, given.test_episodes, given.fit_episodes) == ("given", 2, 8)
    assert list(given.properties) == ["place"]


def test_few_frames_are_enough_to_ask_for(data):
    result = lewm.probe(places, data, block=1, frames=16, columns=["place"])
    assert (result.fit_frames, result.fit_episodes) == (16, 8)
    assert result.test_frames >= 16  # a whole episode
    assert result.test_episodes == 1
    assert result.straightness_std is None
    assert result.properties["place"].linear.mse_std is None


def test_the_same_seed_finds_the_same_and_leaves_torch_alone(data, found):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    assert lewm.probe(places, data, block=2) == found
    torch.testing.assert_close(torch.rand(3), want, rtol=0, atol=0)
    other = lewm.probe(places, data, block=2, seed=1)
    assert other.properties["noise"] != found.properties["noise"]


def test_more_latents_than_frames(data):
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(3, 300)).astype(np.float32)
    result = lewm.probe(lambda frames: places(frames) @ wide, data, block=2, frames=120, columns=["place"])
    assert result.fit_frames < result.width == 300
    assert result.properties["place"].linear.r > 0.999
    assert result.effective_rank <= 2.01


def test_straightness_is_that_of_paths_in_blocks(data):
    def there_and_back(frames):
        """Every other frame is back, so that in steps of two nothing but the line's own way is left."""
        t = frames[:, 0, 1, 0].astype(np.float32)
        return np.c_[t + 10 * (t % 2), frames[:, 0, 0, :1] / 1e4].astype(np.float32)

    assert lewm.probe(there_and_back, data, block=2, columns=["place"]).straightness == pytest.approx(1, abs=1e-3)
    assert lewm.probe(there_and_back, data, block=1, columns=["place"]).straightness == pytest.approx(-1, abs=1e-3)
    none = lewm.probe(places, data, block=35, columns=["place"])
    assert (none.straightness, none.straightness_std) == (None, None)
    assert "no straightness: no test episode has three different frames, 35 steps apart" in none.notes
    assert "straightness not measured" in str(none)


@pytest.mark.parametrize(
    ("env_id", "width", "want"),
    [
        ("lewm/TwoRoom-v0", 2, {"agent": 2}),
        ("lewm/PushT-v0", 7, {"agent": 2, "block": 2, "angle": 2}),
        ("lewm/Reacher-v0", 4, {"shoulder": 2, "wrist": 2, "finger": 2, "velocity": 2}),
        ("lewm/Cube-v0", 48, {"cube": 3, "arm": 12, "gripper": 1}),
    ],
)
def test_a_state_of_a_known_environment_is_what_it_means(tmp_path, env_id, width, want):
    rng = np.random.default_rng(0)

    def columns(places, episode):
        return {"state": np.c_[places, rng.normal(size=(len(places), width - 2))], "goal": places}

    known = write(tmp_path / "d.lewm", columns, env_id=env_id)
    result = lewm.probe(places, known, block=2)
    assert {name: each.dims for name, each in result.properties.items()} == want
    assert list(lewm.probe(places, known, block=2, columns=["goal"]).properties) == ["goal"]
    narrow = write(tmp_path / "n.lewm", lambda p, _: {"state": p[:, :1]}, env_id=env_id)
    if width > 2:
        with pytest.raises(ValueError, match=rf"states of {env_id} must be \(N, {width}\), got \(\d+, 1\)"):
            lewm.probe(places, narrow, block=2)


def test_constant_numbers_are_left_out_with_a_note(tmp_path):
    def columns(places, episode):
        return {"pose": np.c_[places, np.full(len(places), 1e3)], "still": np.ones((len(places), 2)), "place": places}

    result = lewm.probe(places, write(tmp_path / "d.lewm", columns), block=2)
    assert {name: each.dims for name, each in result.properties.items()} == {"pose": 2, "place": 2}
    assert result.notes == ["left out, for it is constant: pose 2", "left out, for it is constant: still"]
    assert "note: left out, for it is constant: still" in str(result)


def test_without_torch_there_are_linear_probes(data, found, monkeypatch):
    monkeypatch.setattr(probes, "find_spec", lambda name: None)
    result = lewm.probe(places, data, block=2)
    assert all(each.mlp is None for each in result.properties.values())
    assert result.properties["place"].linear == found.properties["place"].linear
    assert result.notes == ['MLP probes need torch, which is not installed: pip install "lewm-fast[train]"']
    assert re.search(r"\| place +\| 0\.000 ± 0\.000 \| 1\.000 ± 0\.000 +\| - +\| - +\|", str(result))


# --------------------------------------------------------------------------------------------------- files and command


def test_the_table_has_the_papers_shape(found):
    head, rule, *rows = str(found).splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["property", "lin MSE", "lin r", "MLP MSE", "MLP r"]
    assert set(rule) <= set("|- ")
    assert [row.split()[1] for row in rows[:4]] == ["bowl", "noise", "place", "shift"]
    assert len({len(line) for line in (head, rule, *rows[:4])}) == 1
    assert "straightness -0." in rows[4]
    assert "of 3" in rows[4]
    assert "2 episodes drawn by seed 0, fitted on" in rows[5]


def test_a_result_is_read_as_it_was_written(data, tmp_path):
    result = lewm.probe(places, data, block=2, columns=["place"], out=tmp_path / "sub" / "p.json")
    assert lewm.ProbeResult.load(tmp_path / "sub" / "p.json") == result
    with pytest.raises(FileNotFoundError, match="probes: no such file"):
        lewm.ProbeResult.load(tmp_path / "none.json")
    written = result.to_dict()
    for bad in (
        "", "[1]", "{}", "[" * 100_000, json.dumps({**written, "more": 1}), json.dumps({**written, "seed": "0"}),
        json.dumps({**written, "properties": {"place": {"dims": 1}}}), json.dumps({**written, "straightness": np.nan}),
    ):  # fmt: skip
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(ValueError, match=r"bad\.json is no result of lewm probe"):
            lewm.ProbeResult.load(tmp_path / "bad.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    store = write_store(folder / "square.lewm", episodes=12, length=24)
    lewm.train(store, preset="tiny", out=folder / "run", steps=12, validation=0.3, device="cpu", **TINY)
    return folder


def test_a_model_is_tested_on_what_it_has_not_learnt_from(trained):
    model = lewm.load(trained / "run")
    store = lewm.Dataset(trained / "square.lewm")
    result = lewm.probe(model, trained / "square.lewm")
    held_out = model.meta["training"]["validation_episodes"]
    assert (result.split, result.test_episodes, result.fit_episodes) == ("held out", len(held_out), 12 - len(held_out))
    assert result.test_frames == 5 * len(held_out)  # frames 0, 5, ... of 24
    assert (result.block, result.width) == (5, TINY["embed_dim"])
    assert (result.model_hash, result.data) == (model.hash(), store.fingerprint())
    # As a function it is an encoder like any other.
    same = lewm.probe(model.encode, store, block=5, episodes=held_out)
    assert same.properties == result.properties
    assert (same.split, same.model_hash, same.straightness) == ("given", None, result.straightness)


def test_the_command_prints_the_table(trained, tmp_path):
    words = ["probe", str(trained / "run"), str(trained / "square.lewm"), "--frames", "64", "--seed", "3"]
    done = CliRunner().invoke(app, [*words, "--columns", "state", "--out", str(tmp_path / "p.json")])
    assert done.exit_code == 0, done.output
    result = lewm.ProbeResult.load(tmp_path / "p.json")
    assert str(result) in done.output
    assert (result.seed, result.fit_frames, list(result.properties)) == (3, 64, ["state"])


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("encode", "settings", "text"),
    [
        (places, {}, "block must be given with an encoder that is no lewm.Model"),
        (places, {"block": 0}, "block must be an integer of at least 1, got 0"),
        (places, {"block": 2, "frames": 15}, "frames must be an integer of at least 16, got 15"),
        (places, {"block": 2, "seed": -1}, "seed must be an integer of at least 0"),
        (places, {"block": 2, "columns": ["pose"]}, r"which has bowl, noise, place, shift; got \['pose'\]"),
        (places, {"block": 2, "columns": []}, r"which has bowl, noise, place, shift; got \[\]"),
        (places, {"block": 2, "episodes": range(9)}, "at least 2 episodes to fit probes on .* got 1 and 9"),
        (places, {"block": 2, "episodes": []}, "at least .* 1 to test them on, got 10 and 0"),
        (lambda f: places(f)[:, None], {"block": 2}, r"latents \(N, D\) of floats, got float32 \(\d+, 1, 3\)"),
        (lambda f: f[:, 0, 0], {"block": 2}, r"must give latents \(N, D\) of floats, got uint8 "),
        (lambda f: places(f)[1:], {"block": 2}, r"must give latents \(N, D\) of floats"),
        (lambda f: places(f) * np.nan, {"block": 2}, "must give finite latents, got NaN or infinity"),
        (lambda f: np.ones((len(f), 4)), {"block": 2}, r"latents of \d+ frames of .* are all the same"),
    ],
)  # fmt: skip
def test_bad_input_is_named(data, encode, settings, text):
    with pytest.raises(ValueError, match=text):
        lewm.probe(encode, data, **settings)


def test_what_is_no_encoder_and_no_episode(data):
    with pytest.raises(TypeError, match=r"model must be a lewm\.Model or a function from frames to latents, got 'm'"):
        lewm.probe("m", data, block=2)
    with pytest.raises(IndexError, match="episodes must be from 0 to 9, got 3 to 10"):
        lewm.probe(places, data, block=2, episodes=[3, 10])


def test_states_that_cannot_be_probed(tmp_path):
    still = write(tmp_path / "still.lewm", lambda p, _: {"still": np.ones(len(p)), "place": p})
    with pytest.raises(ValueError, match="states must vary to be probed, but still are constant"):
        lewm.probe(places, still, block=2, columns=["still"])

    class Holed(lewm.Dataset):
        """A store that another program wrote: ours takes no NaN."""

        def column(self, name, episode):
            values = super().column(name, episode).copy()
            if (name, episode) == ("place", 3):
                values[2, 1] = np.nan
            return values

    with pytest.raises(ValueError, match="column 'place' of episode 3 of .* is not finite at row 2: leave the column"):
        lewm.probe(places, Holed(still.path), block=2)
    with pytest.raises(ValueError, match=r"columns must be state columns of .*, which has none; got \[\]"):
        lewm.probe(places, write(tmp_path / "none.lewm", lambda p, _: {}), block=2)
    two = write(tmp_path / "two.lewm", own, lengths=(9, 9))
    with pytest.raises(ValueError, match="at least 2 episodes to fit probes on and 1 to test them on, got 1 and 1"):
        lewm.probe(places, two, block=2)
    one = write(tmp_path / "one.lewm", own, lengths=(9,))
    with pytest.raises(ValueError, match="at least 2 episodes to fit probes on and 1 to test them on, got 0 and 1"):
        lewm.probe(places, one, block=2)


def test_frames_that_do_not_vary(tmp_path, trained):
    grey = write(tmp_path / "grey.lewm", own, frames=lambda pictures: np.full((len(pictures), 8, 8, 3), 90, np.uint8))
    with pytest.raises(ValueError, match="the frames do not vary, or the encoder has collapsed"):
        lewm.probe(lewm.load(trained / "run"), grey)
