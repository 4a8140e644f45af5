"""Random training windows out of the trajectory store, against h5py reading the official layout as its loader does."""

import h5py
import numpy as np
import pytest
from common import compare

import lewm

BATCH, FRAMES, STRIDE, EPISODES = 64, 4, 5, 20


@pytest.mark.parametrize("size", [64, 224])
def test_windows(benchmark, tmp_path, size):
    store = lewm.collect("lewm/TwoRoom-v0", tmp_path / "two-room.lewm", episodes=EPISODES, size=size, seed=0)
    frames = np.concatenate([store[i].frames for i in range(len(store))])
    offsets = np.concatenate([[0], np.cumsum(store.lengths)[:-1]])
    path = tmp_path / "two-room.h5"
    with h5py.File(path, "w") as file:  # one chunk a frame, uncompressed: what stable-worldmodel writes
        file.create_dataset("pixels", data=frames, chunks=(1, size, size, 3))
    index = store.windows(range(len(store)), FRAMES, STRIDE)
    rng = np.random.default_rng(0)

    with h5py.File(path, "r") as file:
        pixels = file["pixels"]

        def reference(windows=None):
            windows = index[rng.integers(0, len(index), BATCH)] if windows is None else windows
            span = FRAMES * STRIDE  # the reference reads every frame of the span and keeps one in five
            rows = [offsets[e] + s for e, s in windows]
            return np.stack([pixels[r : r + span][::STRIDE][:FRAMES] for r in rows])

        def ours(windows=None):
            windows = index[rng.integers(0, len(index), BATCH)] if windows is None else windows
            return store.batch(windows, FRAMES, STRIDE)[0]

        early = index[index[:, 1] < 5][:BATCH]
        np.testing.assert_array_equal(ours(early), reference(early))
        on_disk = sum(f.stat().st_size for f in (tmp_path / "two-room.lewm").iterdir())
        compare(
            benchmark,
            ours,
            reference,
            shape=f"{BATCH} windows of {FRAMES} frames, stride {STRIDE}, {size}x{size}",
            h5py=h5py.__version__,
            raw_over_stored=round(frames.nbytes / on_disk, 1),
        )
