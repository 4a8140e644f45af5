from types import SimpleNamespace

import numpy as np
import pytest

import lewm
from lewm import latents

BLOCK = 3


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    ends = np.cumsum([10, 2, 13])
    return lewm.Dataset.from_arrays(
        rng.integers(0, 255, (25, 16, 16, 3), dtype=np.uint8),
        rng.uniform(-1, 1, (25, 2)),
        ends,
        tmp_path / "d.lewm",
        low=-1,
        high=1,
    )


class Means:
    """Encodes a frame as the means of its channels."""

    def __init__(self, meta=None):
        self.meta, self.config = meta or {}, SimpleNamespace(action_block=BLOCK)

    def encode(self, frames):
        return frames.mean((-3, -2)).astype(np.float32)

    def normalise(self, raw):
        return 2.0 * np.asarray(raw)


def test_tracks_step_as_the_predictor_does(data):
    found = list(latents.tracks(Means(), data, range(3)))
    assert [t.episode for t in found] == [0, 2]  # the second is too short for a step
    track = found[1]
    assert track.steps.tolist() == [0, 3, 6, 9, 12]
    np.testing.assert_array_equal(track.z, Means().encode(data[2].frames[::3]))
    np.testing.assert_allclose(track.blocks, 2 * data.actions(2).reshape(4, 6), rtol=1e-6)
    later = next(latents.tracks(Means(), data, [2], start=2))
    assert later.steps.tolist() == [2, 5, 8, 11]
    np.testing.assert_allclose(later.blocks[0], 2 * data.actions(2)[2:5].ravel(), rtol=1e-6)


def test_tracks_that_are_too_short_are_left_out(data):
    assert [t.episode for t in latents.tracks(Means(), data, range(3), least=5)] == [2]
    assert [len(t.z) for t in latents.tracks(Means(), data, range(3), least=1)] == [4, 1, 5]


def test_scattered_frames_are_those_of_the_episodes(data):
    z, episodes, frames = latents.scattered(Means(), data, [0, 2], frames=9, per_episode=6, seed=1)
    assert len(z) == len(episodes) == len(frames) == 9
    assert set(episodes) == {0, 2}
    for row, episode, frame in zip(z, episodes, frames, strict=True):
        np.testing.assert_array_equal(row, Means().encode(data[int(episode)].frames[frame]))
    again = latents.scattered(Means(), data, [0, 2], frames=9, per_episode=6, seed=1)
    np.testing.assert_array_equal(again[2], frames)


def test_held_out_episodes_are_those_of_the_training_if_it_was_on_these_data(data):
    training = {"validation_episodes": [2]}
    own = {"data": {"fingerprint": data.fingerprint()}, "training": training}
    assert latents.held_out(Means(own), data).tolist() == [2]
    assert latents.held_out(Means({"data": {"fingerprint": "0"}, "training": training}), data).tolist() == [0, 1, 2]
    assert latents.held_out(Means(), data).tolist() == [0, 1, 2]
