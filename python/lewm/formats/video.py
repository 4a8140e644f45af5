"""Video files as arrays and back, by PyAV. Only the file itself is read; damage that its codec notices is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lewm.formats import needed

# No playlists, which name other files.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,asf,flv,ogg,gif"
_ODD = ("yuv420p", "yuvj420p", "nv12")  # need even sides


def size(path: Path) -> tuple[int, int, float, int | None]:
    """Height and width in pixels, frames a second (0 where the file does not say), and frames where it says.

    Raises:
        ModuleNotFoundError: PyAV is not installed.
        ValueError: It is no video, or a damaged one.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        return stream.height, stream.width, float(stream.average_rate or 0), stream.frames or None


def count(path: Path) -> int:
    """Frames of a video whose header does not say how many: what it holds is counted, not decoded."""
    with _opened(path) as container:
        packets = container.demux(container.streams.video[0])
        try:
            return sum(packet.size > 0 and not packet.is_discard for packet in packets)
        except needed("av", "reading video").error.FFmpegError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def frames(
    path: Path, *, count: int | None = None, first_time: float | None = None, fps: float | None = None
) -> np.ndarray:
    """Frames of a video as they are stored, uint8 RGB of shape (N, H, W, 3).

    Args:
        path: The file.
        count: Frames wanted, with `first_time` and `fps`; all of the video without the three.
        first_time: Timestamp of the first one, in seconds.
        fps: Frame k is the one nearest to `first_time + k / fps`, and within half of `1 / fps` of it.

    Raises:
        ModuleNotFoundError: PyAV is not installed.
        ValueError: It is no video, it is damaged or cut short, or a frame is missing; the text names the first one.
    """
    path = Path(path)
    if count is None:
        with _opened(path) as container:
            return np.stack([frame() for _, frame in _decoded(path, container, whole=True)])
    if first_time is None or fps is None or not fps > 0 or count < 1:
        raise ValueError(f"count above 0 must go with first_time and fps above 0, got {count}, {first_time}, {fps}")
    found: dict[int, np.ndarray] = {}
    for sought in (True, False):  # where seeking goes too far, or to a frame that needs others, from the beginning
        with _opened(path) as container:
            stream = container.streams.video[0]
            try:
                if sought:
                    container.seek(max(0, int((first_time - 0.5 / fps) / stream.time_base)), stream=stream)
                found = _timed(path, container, count, first_time, fps)
            except (ValueError, needed("av", "reading video").error.FFmpegError):  # of `seek`, in a damaged index
                if not sought:
                    raise
        if len(found) == count:
            return np.stack([found[k] for k in range(count)])
    missing = next(k for k in range(count) if k not in found)
    raise ValueError(
        f"{path} has no frame {missing} of {count}, at {first_time + missing / fps:.4f} s: none is within "
        f"{0.5 / fps:.4f} s of it"
    )


def write(
    path: Path,
    frames: np.ndarray,
    fps: float,
    *,
    crf: int = 18,
    pixel_format: str = "yuv420p",
    key_every: int | None = None,
) -> None:
    """Writes a video of H.264, which loses a little of each frame.

    Args:
        path: File to write, `.mp4` for example; not atomic.
        frames: uint8 of shape (N, H, W, 3).
        fps: Frames a second.
        crf: Quality of x264, 0 the best to 51.
        pixel_format: "yuv420p", which every player reads, needs even H and W; "yuv444p" keeps more of the colours.
        key_every: Frames from one key frame to the next: fewer make a random frame quicker to read and the file larger;
            x264's own choice when not given.

    Raises:
        ModuleNotFoundError: PyAV is not installed.
        ValueError: The frames cannot be written so.
    """
    from fractions import Fraction

    av = needed("av", "writing video")
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"frames must be uint8 of shape (N, H, W, 3), got {frames.dtype} of shape {frames.shape}")
    height, width = frames.shape[1:3]
    if pixel_format in _ODD and (height % 2 or width % 2):
        raise ValueError(f"frames in {pixel_format} must have even sides, got {height}x{width}; yuv444p takes any")
    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))
            stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
            stream.options = {"crf": str(crf), **({} if key_every is None else {"g": str(key_every)})}
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error


def _opened(path: Path) -> Any:
    av = needed("av", "reading video")
    if not Path(path).is_file():
        raise ValueError(f"{path} is no file")
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        container = av.open(str(Path(path).absolute()), container_options=options)
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no video, or a damaged one: {error}") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path} has no pictures")
    if container.streams.video[0].codec_context is None:
        container.close()
        raise ValueError(f"{path} is damaged, or of a coding that is not known here")
    return container


def _timed(path: Path, container: Any, count: int, first_time: float, fps: float) -> dict[int, np.ndarray]:
    """The frames nearest to the times wanted, as far as they are there."""
    found: dict[int, np.ndarray] = {}
    distance: dict[int, float] = {}
    for time, frame in _decoded(path, container, whole=False):
        place = (time - first_time) * fps
        k = round(place)
        if 0 <= k < count and abs(place - k) < distance.get(k, 0.5):
            found[k], distance[k] = frame(), abs(place - k)
        if place > count - 0.5:
            break
    return found


def _decoded(path: Path, container: Any, whole: bool) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
    """Time of each frame from where the container is, and what gives its pixels; `whole`: to the last that it has."""
    av, stream = needed("av", "reading video"), container.streams.video[0]
    stream.thread_type = "AUTO"
    stream.codec_context.options = {"err_detect": "explode"}  # else damage is painted over
    frames = time = 0
    try:
        for packet in container.demux(stream):
            frames += packet.is_discard
            for frame in packet.decode():
                if frame.is_corrupt or frame.time is None:
                    raise ValueError(f"{path} is damaged: frame {frames} cannot be decoded")
                frames, time = frames + 1, frame.time
                yield time, lambda frame=frame: frame.to_ndarray(format="rgb24")
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} is damaged after frame {frames}, at {time:.3f} s: {error}") from error
    if not whole:
        return
    duration = 0.0  # of the pictures, known where there is nothing else
    if container.duration and len(container.streams) == 1:
        duration = (container.duration + (container.start_time or 0)) / av.time_base
    step = 1 / float(stream.average_rate or 1)
    if frames < max(1, stream.frames) or (not stream.frames and time + 1.5 * step < duration):
        wanted = f"{stream.frames} frames" if stream.frames else f"{duration:.3f} s"
        raise ValueError(f"{path} is cut short: it ends after {frames} frames, at {time:.3f} s, of {wanted}")
