"""Lance tables, read as stable-worldmodel 0.1.1 and its main wrote them (`fixtures/make.py`)."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lewm.formats import opened

lance = pytest.importorskip("lance")
pa = pytest.importorskip("pyarrow")
image = pytest.importorskip("PIL.Image")

from fixtures import rule
from lewm.formats import arrow

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def copy(tmp_path):
    def copied(name):
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return copied


def table():
    return lance.dataset(str(FIXTURES / "swm_lance/toy.lance")).to_table()


def written(path, change):
    """The fixture's table, after a change of it."""
    lance.write_dataset(change(table()), str(path / "toy.lance"))
    return path


def replaced(name, values):
    return lambda t: t.set_column(t.column_names.index(name), name, values)


# Least PSNR of an episode, measured (2026-11): 31.4 dB for JPEG of quality 95, 32.2 for x264; both halve colours.
@pytest.mark.parametrize(("name", "where"), [("swm_lance", ""), ("swm_lance", "toy.lance"), ("swm_lance_video", "")])
def test_reads_what_stable_worldmodel_wrote(name, where):
    if name == "swm_lance_video":
        pytest.importorskip("av")
    with opened(FIXTURES / name / where) as source:
        assert source.format == name.removeprefix("swm_")
        assert source.lengths.tolist() == list(rule.LENGTHS)
        assert source.lengths.dtype == np.int64
        assert (source.height, source.width, source.action_dim) == (rule.HEIGHT, rule.WIDTH, 2)
        assert source.columns == {"proprio": 3, "reward": 1}
        assert (source.left_out, source.metadata, source.lossless) == ({}, {}, False)
        assert 10_000 < source.bytes < 60_000
        for episode in (2, 0, 1):
            frames, wanted = source.frames(episode), rule.frames(episode)
            assert rule.psnr(frames, wanted) > 31
            assert rule.nearest(frames, wanted) == list(range(len(wanted)))
            actions = source.actions(episode)  # the last row is NaN, and leads nowhere
            assert actions.dtype == np.float32
            assert np.array_equal(actions, rule.actions(episode)[:-1])
            state = source.column("proprio", episode)
            assert state.dtype == np.float64
            assert np.array_equal(state, rule.states(episode))
            assert np.array_equal(source.column("reward", episode), rule.rewards(episode)[:, None])


def test_jpeg_is_decoded_as_pillow_does():
    blobs = table().column("pixels").to_pylist()
    with opened(FIXTURES / "swm_lance") as source:
        frames = np.concatenate([source.frames(k) for k in range(3)])
    assert np.array_equal(frames, [np.asarray(image.open(io.BytesIO(blob))) for blob in blobs])


def test_png_is_lossless(tmp_path):
    frames = np.concatenate([rule.frames(k) for k in range(3)])
    pixels = pa.array([arrow.png(frame) for frame in frames], pa.binary())
    with opened(written(tmp_path, replaced("pixels", pixels))) as source:
        assert source.lossless
        assert np.array_equal(source.frames(1), rule.frames(1))


def test_several_cameras_and_what_is_left_out(tmp_path):
    def change(t):
        t = t.append_column("pixels_side", t.column("pixels").combine_chunks())
        t = t.append_column("note", pa.array(["a"] * 21)).append_column("ragged", pa.array([[1.0]] * 21))
        return t.append_column("count", pa.array(range(21)))

    path = written(tmp_path, change)
    with opened(path) as source:
        assert source.columns == {"proprio": 3, "reward": 1, "count": 1}
        assert source.left_out.keys() == {"pixels_side", "note", "ragged"}
        assert source.left_out["pixels_side"] == "another camera"
        assert source.left_out["note"] == "string is no number"
        assert source.column("count", 1)[:, 0].tolist() == list(range(5, 14))
    with opened(path, camera="pixels_side", action="proprio") as source:
        assert (source.action_dim, source.left_out["pixels"]) == (3, "another camera")
        assert np.array_equal(source.actions(2), rule.states(2)[:-1])
    with pytest.raises(ValueError, match="no camera 'front'; it has pixels, pixels_side"):
        opened(path, camera="front")
    with pytest.raises(ValueError, match="no column of actions 'torque'; it has .*action"):
        opened(path, action="torque")
    with pytest.raises(ValueError, match="note of .* must be numbers: "):
        opened(path, action="note")


def test_rows_in_several_files_and_versions(tmp_path):
    whole = table()
    for rows in (whole.slice(0, 8), whole.slice(8, 13)):  # as sessions that append leave it
        lance.write_dataset(
            rows, str(tmp_path / "toy.lance"), mode="append" if rows["step_idx"][0].as_py() else "create"
        )
    with opened(tmp_path) as source:
        assert source.lengths.tolist() == list(rule.LENGTHS)
        assert rule.psnr(source.frames(1), rule.frames(1)) > 31
        assert np.array_equal(source.actions(1), rule.actions(1)[:-1])


def test_episodes_of_one_frame_are_left_out(tmp_path):
    with opened(written(tmp_path, lambda t: t.take(np.r_[0:5, 5, 14:21]))) as source:
        assert source.lengths.tolist() == [5, 7]
        assert source.left_out == {"episodes": "1 of 3 have fewer than 2 frames"}
        assert np.array_equal(source.actions(1), rule.actions(2)[:-1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.drop_columns(["step_idx"]), "toy.lance has no column 'step_idx', which numbers rows"),
        (lambda t: t.drop_columns(["pixels"]), "no camera 'pixels'; it has none"),
        (lambda t: t.drop_columns(["action"]), "no column of actions 'action'"),
        (lambda t: t.take(np.r_[1, 0, 2:21]), "steps of an episode in order from 0, row 0 is step 1 of episode 0"),
        (lambda t: t.take(np.r_[0:5, 5:14, 0:5]), "rows of an episode together"),
        (lambda t: t.take([0, 5, 14]), "no episode of at least 2 frames"),
        (lambda t: t.slice(0, 0), "no episode of at least 2 frames"),
        (replaced("step_idx", pa.array(["a"] * 21)), "step_idx of .*toy.lance must be numbers, got string"),
        (replaced("action", pa.array(["a"] * 21)), "action of .* must be numbers: "),
        (replaced("action", pa.array([[1.0]] * 21)), "action of .* must be numbers: list<"),
        (
            replaced("action", pa.array([[np.inf]] * 21, pa.list_(pa.float32(), 1))),
            "episode 0 must be finite, row 0 of 5",
        ),
        (replaced("action", pa.array([None] + [1.0] * 20)), "must have a value in each row, 1 are missing"),
        (replaced("pixels", pa.array([b"GIF89a"] * 21, pa.binary())), "frame 0 of .* episode 0 is no picture"),
    ],
)
def test_tables_that_cannot_be(tmp_path, change, text):
    with pytest.raises(ValueError, match=text) as error, opened(written(tmp_path, change)) as source:
        source.actions(0)
    assert str(tmp_path) in str(error.value)


def test_damaged_pictures(tmp_path):
    blobs = table().column("pixels").to_pylist()
    small = arrow.png(np.zeros((8, 8, 3), np.uint8))
    for k, (blob, text) in enumerate(
        (
            (None, "frame 1 of .* episode 1 is missing"),
            (blobs[6][: len(blobs[6]) // 2], "frame 1 of .* episode 1 is damaged"),
            (small, "frame 1 of .* episode 1 must be 48x64 in RGB or grey, got 8x8"),
        )
    ):
        pixels = pa.array([*blobs[:6], blob, *blobs[7:]], pa.binary())
        (tmp_path / str(k)).mkdir()
        with opened(written(tmp_path / str(k), replaced("pixels", pixels))) as source:
            assert source.frames(0).shape == (5, 48, 64, 3)
            with pytest.raises(ValueError, match=text):
                source.frames(1)


def test_damaged_tables(copy, capfd):
    for part in ("data", "_versions"):
        path = copy("swm_lance")
        file = next(file for file in (path / "toy.lance" / part).iterdir() if file.suffix != ".json")
        content = file.read_bytes()
        for damaged in (content[: len(content) // 2], content[: len(content) - 10], b""):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match="cannot be read, it is damaged") as error:
                opened(path)
            assert str(path) in str(error.value)
        shutil.rmtree(path)
    capfd.readouterr()  # where Lance panics it says so


def test_videos_that_do_not_fit(copy):
    video = pytest.importorskip("lewm.formats.video")
    pytest.importorskip("av")
    path = copy("swm_lance_video")
    videos = path / "toy_videos.lance"
    with opened(path) as source, source._video(1) as file:
        long = file.read_bytes()
        frames = video.frames(file)
        video.write(file, frames[:5], 10)
        short = file.read_bytes()
    for rows, text in (
        ([long, short, long], "video of .*swm_lance_video episode 1|frames of .* episode 1 must be uint8"),
        ([long, long[: len(long) // 2], long], "video of .*swm_lance_video episode 1: it"),
        ([long, b"", long], "video of .* episode 1: it is no video"),
        ([long, long], "swm_lance_video episode 2 has no video of 'pixels'"),
    ):
        shutil.rmtree(videos)
        columns = {
            "episode_idx": pa.array(range(len(rows)), pa.int32()),
            "video_key": pa.array(["pixels"] * len(rows)),
            "video_bytes": pa.array(rows, pa.large_binary()),
        }
        kept = pa.field("video_bytes", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
        schema = pa.schema([("episode_idx", pa.int32()), ("video_key", pa.string()), kept])
        lance.write_dataset(pa.table(columns, schema=schema), str(videos))
        with pytest.raises(ValueError, match=text), opened(path) as source:
            assert np.array_equal(source.frames(1), frames)
    shutil.rmtree(videos)
    with pytest.raises(ValueError, match="no camera 'pixels'; it has none"):
        opened(path)


def test_folders_of_tables(copy, tmp_path):
    path = copy("swm_lance")
    shutil.copytree(path / "toy.lance", path / "other.lance")
    with pytest.raises(ValueError, match=r"must be a table of Lance, or hold one; it has other.lance, toy.lance"):
        opened(path)
    with opened(path / "other.lance") as source:
        assert source.lengths.tolist() == list(rule.LENGTHS)
    side = copy("swm_lance_video") / "toy_videos.lance"
    with pytest.raises(ValueError, match="toy_videos.lance has no column 'step_idx'"):
        opened(side)


def test_lance_is_loaded_when_it_is_needed():
    code = "import sys, lewm.formats.lance; assert not {'lance', 'pyarrow', 'PIL', 'av'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
