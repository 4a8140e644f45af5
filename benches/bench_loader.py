"""Training batches out of the loader, against h5py reading the official layout as the reference does."""

from __future__ import annotations

import itertools

import h5py
import numpy as np
import pytest
from common import compare

import lewm

BATCH, FRAMES, STRIDE = 128, 4, 5
FIRST = 3  # batches of an epoch that are not timed


@pytest.mark.parametrize("in_memory", [False, True], ids=["store", "memory"])
@pytest.mark.parametrize("size", [64, 224])
def test_loader(benchmark, tmp_path, size, in_memory):
    """Shuffled batches of uint8 frames and float32 actions, into memory that is used again; h5py has one thread."""
    path, episodes = tmp_path / "two-room.lewm", 40 if size == 64 else 15
    lewm.collect("lewm/TwoRoom-v0", path, episodes=episodes, size=size, seed=0)
    data = lewm.Dataset(path, in_memory=in_memory)
    h5 = tmp_path / "two-room.h5"
    with h5py.File(h5, "w") as file:  # one chunk a frame, uncompressed: what stable-worldmodel writes
        pixels = file.create_dataset("pixels", (data.frame_count, size, size, 3), "u1", chunks=(1, size, size, 3))
        actions = file.create_dataset("action", (data.frame_count, data.action_dim), "f4")
        offsets = np.concatenate([[0], np.cumsum(data.lengths)])
        for first, episode in zip(offsets, data, strict=False):
            pixels[first : first + len(episode)] = episode.frames
            actions[first : first + len(episode) - 1] = episode.actions
    loader = data.loader(BATCH, FRAMES, STRIDE, tensors=False, prefetch=0)
    # The reference reads one step more than the window spans, so it has no windows that end with the episode.
    span = FRAMES * STRIDE
    index = data.windows(range(len(data)), span)
    rng = np.random.default_rng(0)
    memory = np.zeros((BATCH, FRAMES, size, size, 3), np.uint8)

    with h5py.File(h5, "r") as file:
        pixels, actions = file["pixels"], file["action"]

        def reference(windows=None):
            """Every frame of the span is read, and one in five kept."""
            windows = index[rng.integers(0, len(index), BATCH)] if windows is None else windows
            rows = [offsets[e] + s for e, s in windows]
            blocks = np.stack([actions[r : r + span - STRIDE] for r in rows])
            frames = memory[: len(rows)]
            np.stack([pixels[r : r + span][::STRIDE] for r in rows], out=frames)
            return frames, blocks.reshape(len(rows), FRAMES - 1, -1)

        for got, want in zip(data.batch(index[::97], FRAMES, STRIDE), reference(index[::97]), strict=True):
            np.testing.assert_array_equal(got, want)

        def under_way():
            """An epoch whose first batches, which take new memory, are out: the others use it again."""
            batches = iter(loader)
            for frames, _ in itertools.islice(batches, FIRST):
                assert frames.shape == (BATCH, FRAMES, size, size, 3)
            return batches

        def ours(batches):
            """What is left of the epoch: as much as is not decoded ahead, which is less than one batch of it."""
            for frames, _ in batches:
                assert frames.shape == (BATCH, FRAMES, size, size, 3)

        compare(
            benchmark,
            ours,
            reference,
            prepare=under_way,
            work=len(loader) - FIRST,
            shape=f"batches of {BATCH} windows of {FRAMES} frames, stride {STRIDE}, {size}x{size}",
            in_memory=in_memory,
            h5py=h5py.__version__,
        )
        batches = len(loader) - FIRST
        benchmark.extra_info["samples_per_s"] = round(1e3 * batches * BATCH / benchmark.extra_info["ours_ms"])
