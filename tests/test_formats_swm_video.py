"""stable-worldmodel's folder of videos, read as its 0.1.1 wrote it (`fixtures/make.py`)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from lewm.formats import opened

pytest.importorskip("av")

from fixtures import rule
from lewm.formats import video

FIXTURE = Path(__file__).parent / "fixtures/swm_video"


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(FIXTURE, tmp_path / "swm_video"))


def test_reads_what_stable_worldmodel_wrote():
    with opened(FIXTURE) as source:
        assert source.format == "swm_video"
        assert source.lengths.tolist() == list(rule.LENGTHS)
        assert source.lengths.dtype == np.int64
        assert (source.height, source.width, source.action_dim) == (rule.HEIGHT, rule.WIDTH, 2)
        assert source.columns == {"proprio": 3, "reward": 1}
        assert (source.left_out, source.metadata, source.lossless) == ({}, {}, False)
        assert source.bytes == sum(file.stat().st_size for file in FIXTURE.rglob("*") if file.is_file())
        for episode in (2, 0, 1):
            frames, wanted = source.frames(episode), rule.frames(episode)
            assert rule.psnr(frames, wanted) > 31  # measured (2026-11): 32.2, 33.6 and 34.4 dB
            assert rule.nearest(frames, wanted) == list(range(len(wanted)))
            actions = source.actions(episode)  # the last row is NaN, and leads nowhere
            assert actions.dtype == np.float32
            assert np.array_equal(actions, rule.actions(episode)[:-1])
            state = source.column("proprio", episode)
            assert state.dtype == np.float64
            assert np.array_equal(state, rule.states(episode))
            assert np.array_equal(source.column("reward", episode), rule.rewards(episode)[:, None])


def test_what_is_left_out(copy):
    np.savez(copy / "label.npz", np.array(["a"] * 21))
    np.savez(copy / "info.npz", np.array([{"a": 1}] * 21, dtype=object))
    np.savez(copy / "matrix.npz", np.zeros((21, 3, 3)))
    np.savez(copy / "step_idx.npz", np.zeros(21, np.int64))
    np.savez(copy / "scalar.npz", np.float32(1))
    (copy / "variation").mkdir()
    np.savez(copy / "variation/colour.npz", np.arange(21))
    shutil.copytree(copy / "pixels", copy / "side")
    with opened(copy) as source:
        assert source.columns == {"proprio": 3, "reward": 1, "variation/colour": 1}
        assert np.array_equal(source.column("variation/colour", 1)[:, 0], np.arange(5, 14))
        assert source.left_out == {
            "label": "<U1 is no number",
            "info": "object is no number",
            "matrix": "rows of shape (3, 3) are no vector of 1 to 4096 numbers",
            "step_idx": "it numbers rows",
            "scalar": "it has no rows",
            "side": "another camera",
        }
    with opened(copy, camera="side", action="proprio") as source:
        assert (source.action_dim, source.left_out["pixels"]) == (3, "another camera")


def test_objects_are_never_unpickled(copy):
    class Trap:
        def __reduce__(self):
            return (copy / "sprung").mkdir, ()

    for name in ("action", "ep_len", "info"):
        path = copy / name
        np.savez(path.with_suffix(".npz"), np.array([Trap()] * 21, dtype=object))
        if name == "info":
            with opened(copy) as source:
                assert source.left_out["info"] == "object is no number"
        else:
            with pytest.raises(ValueError, match=rf"{name}.npz must be (numbers|integers) .*got object"):
                opened(copy)
            shutil.copy(FIXTURE / f"{name}.npz", copy)
    assert not (copy / "sprung").exists()


def test_episodes_of_one_frame_are_left_out(copy):
    np.savez(copy / "ep_len.npz", np.array([1, 4, 9, 7], np.int32))
    np.savez(copy / "ep_offset.npz", np.array([0, 1, 5, 14], np.int64))
    for number, frames in {1: rule.frames(0)[1:], 2: rule.frames(1), 3: rule.frames(2)}.items():
        video.write(copy / f"pixels/ep_{number}.mp4", frames, 10)
    with opened(copy) as source:
        assert source.lengths.tolist() == [4, 9, 7]
        assert source.left_out == {"episodes": "1 of 4 have fewer than 2 frames"}
        assert rule.psnr(source.frames(2), rule.frames(2)) > 31
        assert np.array_equal(source.actions(2), rule.actions(2)[:-1])
    np.savez(copy / "ep_len.npz", np.ones(21, np.int32))
    np.savez(copy / "ep_offset.npz", np.arange(21))
    with pytest.raises(ValueError, match="swm_video has no episode of at least 2 frames"):
        opened(copy)


@pytest.mark.parametrize(
    ("name", "array", "text"),
    [
        ("ep_len", np.array([5, 9]), "of the same episodes, one after the other, got 2 lengths and 3 offsets"),
        ("ep_len", np.array([5, -1, 7]), "one after the other"),
        ("ep_len", np.array([5.0, 9.0, 7.0]), r"ep_len.npz must be integers \(E,\), got float64"),
        ("ep_offset", np.array([0, 5, 15]), "one after the other"),
        ("ep_offset", np.zeros((3, 1), int), r"ep_offset.npz must be integers \(E,\), got int64 of shape \(3, 1\)"),
        ("action", np.zeros((20, 2)), r"action.npz must be numbers of shape \(21, A\), as ep_len says"),
        ("action", np.zeros((21, 2), bool), "action.npz must be numbers .*got bool"),
        ("action", np.array(["a"] * 21), "action.npz must be numbers .*got <U1"),
        ("action", np.full((21, 2), np.nan, np.float32), "swm_video episode 0 must be finite, row 0 of 5"),
        ("reward", np.zeros(22), "reward.npz has 22 rows, ep_len says 21"),
    ],
)
def test_numbers_that_cannot_be(copy, name, array, text):
    np.savez(copy / f"{name}.npz", array)
    with pytest.raises(ValueError, match=text):
        opened(copy)


@pytest.mark.parametrize("name", ["ep_offset", "action"])
def test_files_that_are_needed(copy, name):
    (copy / f"{name}.npz").unlink()
    with pytest.raises(ValueError, match=f"swm_video has no {name}.npz"):
        opened(copy)


@pytest.mark.parametrize("name", ["ep_len", "action", "reward"])
@pytest.mark.parametrize("change", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b.replace(b"NUMPY", b"numpy")])
def test_damaged_files(copy, name, change):
    file = copy / f"{name}.npz"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{name}.npz is no file of one NumPy array, or a damaged one"):
        opened(copy)


def test_a_header_that_promises_too_much(copy):
    with open(copy / "reward.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    import zipfile

    with zipfile.ZipFile(copy / "reward.npz", "w") as archive:
        archive.write(copy / "reward.npy", "arr_0.npy")
    with pytest.raises(MemoryError, match=r"reading .*reward.npz needs"):
        opened(copy)


def test_videos_that_do_not_fit(copy):
    file = copy / "pixels/ep_1.mp4"
    content = file.read_bytes()
    shutil.copy(copy / "pixels/ep_0.mp4", file)
    with pytest.raises(ValueError, match="ep_1.mp4 has 5 frames, ep_len says 9 for episode 1"):
        opened(copy)
    video.write(file, rule.frames(1)[:, :32], 10)
    with pytest.raises(ValueError, match="ep_1.mp4 is 32x64, the first video 48x64"):
        opened(copy)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"ep_1.mp4"):
        opened(copy)
    file.unlink()
    with pytest.raises(ValueError, match="swm_video episode 1 has no video: .*ep_1.mp4 is missing"):
        opened(copy)
    with pytest.raises(ValueError, match="no camera 'front'; it has pixels"):
        opened(copy, camera="front")
    shutil.rmtree(copy / "pixels")
    with pytest.raises(ValueError, match="no folder of .mp4 files; stable-worldmodel's single images are not read"):
        opened(copy)
