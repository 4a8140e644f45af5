"""Video files, and folders of them with actions beside."""

import os
import pickle
import sys

import numpy as np
import pytest

av = pytest.importorskip("av")

from lewm.formats import opened, video
from recorded import episodes, psnr

LENGTHS = (12, 30, 7)
SIZE = 64
LEAST_PSNR = 30  # of a saturated square, whose colour is kept at half the resolution, on a smooth ground


@pytest.fixture(scope="module")
def made():
    return episodes(LENGTHS, size=SIZE)


@pytest.fixture
def folder(tmp_path, made):
    for number, (frames, actions, _) in zip((1, 2, 10), made, strict=True):
        video.write(tmp_path / f"take{number}.mp4", frames, 10)
        np.save(tmp_path / f"take{number}.npy", actions)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------ one video


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "avi"])
def test_a_video_is_what_was_written(tmp_path, made, suffix):
    frames = made[1][0]
    path = tmp_path / f"v.{suffix}"
    video.write(path, frames, 12.5)
    height, width, fps, count = video.size(path)
    assert (height, width, fps) == (SIZE, SIZE, 12.5)
    assert count in (30, None)
    assert video.count(path) == 30
    found = video.frames(path)
    assert (found.dtype, found.shape) == (np.uint8, frames.shape)
    assert psnr(found, frames) > LEAST_PSNR
    print(f"{suffix}: PSNR {psnr(found, frames):.1f} dB")


def test_more_colour_is_kept_where_it_is_asked_for(tmp_path, made):
    frames = made[1][0][:, :, :63]  # of odd width
    with pytest.raises(ValueError, match="frames in yuv420p must have even sides, got 64x63; yuv444p takes any"):
        video.write(tmp_path / "v.mp4", frames, 10)
    video.write(tmp_path / "v.mp4", frames, 10, pixel_format="yuv444p", crf=1)
    assert psnr(video.frames(tmp_path / "v.mp4"), frames) > 45


def test_frames_by_their_time(tmp_path, made):
    path = tmp_path / "v.mp4"
    video.write(path, np.concatenate([made[1][0]] * 4), 10)  # more than one key frame's worth
    everything = video.frames(path)
    for first, count in ((0, 120), (0, 1), (37, 20), (119, 1)):
        found = video.frames(path, count=count, first_time=first / 10, fps=10)
        np.testing.assert_array_equal(found, everything[first : first + count])
    # Times that are a little off, as those in a table of float32 are, and every second frame.
    np.testing.assert_array_equal(video.frames(path, count=5, first_time=1.0004, fps=10), everything[10:15])
    np.testing.assert_array_equal(video.frames(path, count=5, first_time=1, fps=5), everything[10:20:2])
    with pytest.raises(ValueError, match=r"v.mp4 has no frame 3 of 5, at 12.0000 s: none is within 0.0500 s of it"):
        video.frames(path, count=5, first_time=11.7, fps=10)
    with pytest.raises(ValueError, match="has no frame 1 of 5, at 0.0500 s"):
        video.frames(path, count=5, first_time=0, fps=20)
    with pytest.raises(ValueError, match="must go with first_time and fps"):
        video.frames(path, count=5)


def test_a_frame_that_is_missing_in_the_middle_is_named(tmp_path, made):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for t, picture in enumerate(made[1][0]):
            if t != 17:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = t
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"v.mp4 has no frame 7 of 20, at 1.7000 s"):
        video.frames(path, count=20, first_time=1, fps=10)
    assert len(video.frames(path, count=12, first_time=1.8, fps=10)) == 12


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_video_cut_short_is_refused(tmp_path, made, suffix):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    settings = {"movflags": "faststart"} if suffix == "mp4" else {}  # the index in front: what is cut is pictures
    with av.open(str(whole), "w", options=settings) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for picture in made[1][0]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    assert len(video.frames(whole)) == 30
    content = whole.read_bytes()
    for share in (0.01, 0.3, 0.6, 0.8):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=f"cut.{suffix} (is cut short|is no video|is damaged)"):
            video.frames(path)


def test_damaged_pictures_are_an_error_and_not_painted_over(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "v.mp4"
    video.write(path, rng.integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8), 10)  # most of the file is pictures
    content = path.read_bytes()
    for place in range(len(content) // 10, len(content) - 2000, len(content) // 10):
        damaged = bytearray(content)
        damaged[place : place + 1000] = rng.bytes(1000)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="v.mp4 is damaged after frame|v.mp4 is damaged: frame"):
            video.frames(path)


def test_a_playlist_is_no_video(tmp_path, made):
    video.write(tmp_path / "part.mp4", made[0][0], 10)
    (tmp_path / "v.mp4").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/part.mp4\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(ValueError, match="v.mp4 is no video, or a damaged one"):
        video.frames(tmp_path / "v.mp4")
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path}/part.mp4\n")
    with pytest.raises(ValueError, match="list.mp4 is no video, or a damaged one"):
        video.size(tmp_path / "list.mp4")


@pytest.mark.parametrize(
    ("frames", "fps", "text"),
    [
        (np.zeros((2, 8, 8, 3)), 10, r"frames must be uint8 of shape \(N, H, W, 3\), got float64"),
        (np.zeros((2, 8, 8), np.uint8), 10, "frames must be uint8 of shape"),
        (np.zeros((0, 8, 8, 3), np.uint8), 10, "frames must be uint8 of shape"),
        (np.zeros((2, 8, 8, 3), np.uint8), 0, "fps must be above 0, got 0"),
    ],
)
def test_what_is_no_video_is_not_written(tmp_path, frames, fps, text):
    with pytest.raises(ValueError, match=text):
        video.write(tmp_path / "v.mp4", frames, fps)
    assert not os.listdir(tmp_path)


def test_without_pyav_the_error_says_what_to_install(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r'reading video needs av: pip install "lewm-fast\[data\]"'):
        opened(folder)


# --------------------------------------------------------------------------------------------------- a folder of videos


def test_a_folder_of_videos_and_actions(folder, made):
    with opened(folder) as source:
        assert source.lengths.tolist() == list(LENGTHS)  # take10 after take2
        assert (source.format, source.lossless, source.height, source.width) == ("videos", False, SIZE, SIZE)
        assert (source.action_dim, source.columns, source.metadata, source.left_out) == (2, {}, {"fps": 10}, {})
        for episode, (frames, actions, _) in enumerate(made):
            np.testing.assert_array_equal(source.actions(episode), actions)
            assert psnr(source.frames(episode), frames) > LEAST_PSNR
        assert source.bytes == sum(file.stat().st_size for file in folder.iterdir())


def test_actions_in_other_files(tmp_path, made):
    for name, (frames, actions, columns) in zip("abc", made, strict=True):
        video.write(tmp_path / f"{name}.mkv", frames, 10)
        rows = np.concatenate([actions, np.full((1, 2), np.nan)])  # one for each frame
        lines = ["left,right"] * (name == "a") + [f"{float(a)!r}, {float(b)!r}" for a, b in rows]
        (tmp_path / f"{name}.csv").write_text("\r\n".join(lines) + "\n")
        if name == "b":
            (tmp_path / "b.csv").unlink()
            np.savez(tmp_path / "b.npz", action=rows.astype(np.float32), **columns)
    with opened(tmp_path) as source:
        for episode, (_, actions, _) in enumerate(made):
            np.testing.assert_array_equal(source.actions(episode), actions)
        assert source.left_out == {"state": "not in every episode"}


def test_further_arrays_are_columns(tmp_path, made):
    for name, (frames, actions, columns) in zip("abc", made, strict=True):
        video.write(tmp_path / f"{name}.mp4", frames, 10)
        more = {"task": np.array("push"), "t": np.arange(len(frames)), "dt": np.ones(len(frames) - 1)}
        np.savez(tmp_path / f"{name}.npz", joints=actions, action=-actions, **columns, **more)
    with opened(tmp_path, action="joints") as source:
        assert source.columns == {"state": 3, "t": 1}
        assert source.left_out == {
            "action": "not a row for each frame of a.mp4",
            "task": "not a row for each frame of a.mp4",
            "dt": "not a row for each frame of a.mp4",
        }
        np.testing.assert_array_equal(source.actions(1), made[1][1])
        np.testing.assert_array_equal(source.column("state", 2), made[2][2]["state"])
        np.testing.assert_array_equal(source.column("t", 0)[:, 0], np.arange(12))
    with pytest.raises(
        ValueError, match=r"a.npz must have actions of shape \(N, A\) as 'x', got joints, action, state"
    ):
        opened(tmp_path, action="x")
    with pytest.raises(ValueError, match="camera must not be given"):
        opened(tmp_path, camera="x")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: (p / "take2.npy").unlink(), "take2.mp4 has no actions beside it: take2.npy, take2.npz, take2.csv"),
        (lambda p: np.save(p / "take2.npy", np.zeros((40, 2))), "take2.mp4 has 30 frames and .* 40 rows .* cut short"),
        (lambda p: np.save(p / "take2.npy", np.zeros((28, 2))), "take2.mp4 has 30 frames and .* 28 rows"),
        (lambda p: np.save(p / "take2.npy", np.zeros((29, 3))), "take2.mp4 have 3 columns, of take1.mp4 2"),
        (lambda p: np.save(p / "take2.npy", np.full((29, 2), np.nan)), "actions of .*take2.mp4 must be finite, row 0"),
        (lambda p: np.save(p / "take2.npy", np.zeros(29, bool)), "actions of .*take2.mp4 must be numbers"),
        (lambda p: (p / "take2.npy").write_bytes(pickle.dumps(Trap())), "take2.npy cannot be read .* unpickled"),
        (lambda p: np.save(p / "take2.npy", np.array([Trap()] * 30)), "take2.npy cannot be read as numbers"),
        (lambda p: (p / "take2.npy").write_bytes(b""), "take2.npy cannot be read as numbers"),
        (lambda p: (p / "take2.mp4").write_bytes(b"no video"), "take2.mp4 is no video, or a damaged one"),
        (lambda p: video.write(p / "take2.mp4", np.zeros((30, 32, 64, 3), np.uint8), 10), "take2.mp4 is 32x64, take1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_when_it_is_opened(folder, monkeypatch, change, text):
    monkeypatch.chdir(folder)
    change(folder)
    with pytest.raises(ValueError, match=text):
        opened(folder)
    assert not (folder / "sprung").exists()


@pytest.mark.parametrize(
    ("text", "wanted"), [("1,2\n3\n", "inhomogeneous"), ("a,b\n", "no rows"), ("1,x\n2,3\n4,y", "float")]
)
def test_tables_that_are_none(folder, text, wanted):
    (folder / "take1.npy").unlink()
    (folder / "take1.csv").write_text(text)
    with pytest.raises(ValueError, match=f"take1.csv cannot be read as numbers.*{wanted}"):
        opened(folder)


def test_a_folder_without_videos_is_none(tmp_path):
    with pytest.raises(ValueError, match="is none of the formats"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"has no videos: files that end in \.mp4"):
        opened(tmp_path, "videos")
