"""stable-worldmodel's folder of videos: `<column>.npz` with all rows, `<camera>/ep_<i>.mp4` with an episode's frames.

Row t holds the frame and the action that leads to the frame of row t+1; the action of an episode's last row, mostly
NaN, leads nowhere. `ep_len.npz` (E,) and `ep_offset.npz` (E,) say which rows are an episode's. The rate of the videos
is the one of their encoding, not the one of the data, so there is no `fps`.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from lewm.formats import Source, actions_of, frames_of, numeric, video
from lewm.memory import check_fits

_ENDS = ("ep_len", "ep_offset")
_NUMBERS = ("ep_idx", "episode_idx", "step_idx")


def recognised(path: Path) -> bool:
    """Whether this is such a folder."""
    return path.is_dir() and (path / "ep_len.npz").is_file()


class Reader(Source):
    """See `lewm.formats.Source`. The numbers of all episodes are read when it is opened.

    Args:
        path: The folder.
        camera: Folder of videos; "pixels" where it is there, else the only one.
        action: Column of actions; "action" when not given.
    """

    def __init__(self, path: Path, *, camera: str | None = None, action: str | None = None) -> None:
        self.path, self.format, self.lossless, self.metadata = path, "swm_video", False, {}
        found = {file.relative_to(path).with_suffix("").as_posix(): file for file in sorted(path.rglob("*.npz"))}
        lengths, offsets = (self._ends(found, name) for name in _ENDS)
        wrong = lengths.shape != offsets.shape or not len(lengths) or (lengths < 0).any()
        if wrong or (offsets != np.cumsum(lengths) - lengths).any():
            raise ValueError(
                f"{path}: ep_len and ep_offset must be of the same episodes, one after the other, got {len(lengths)} "
                f"lengths and {len(offsets)} offsets"
            )
        action = action or "action"
        if action not in found:
            raise ValueError(f"{path} has no {action}.npz, a column of actions; it has {', '.join(found) or 'none'}")
        self._camera = self._folder(camera)

        self.left_out = {name: "another camera" for name in self._cameras() if name != self._camera.name}
        self.columns, self._columns = {}, {}
        rows, first, last = int(lengths.sum()), np.repeat(offsets, lengths), offsets + lengths - 1
        self._actions = self._array(found[action])
        if self._actions.ndim not in (1, 2) or self._actions.dtype.kind not in "fiu" or len(self._actions) != rows:
            raise ValueError(
                f"{found[action]} must be numbers of shape ({rows}, A), as ep_len says, got {self._actions.dtype} of "
                f"shape {self._actions.shape}"
            )
        for name, file in found.items():
            if name == action:
                continue
            if name in _NUMBERS:
                self.left_out[name] = "it numbers rows"
                continue
            data = self._array(file)
            why = numeric(data.dtype, data.shape[1:]) if data.ndim else "it has no rows"
            if why is None and len(data) != rows:
                raise ValueError(f"{file} has {len(data)} rows, ep_len says {rows}")
            if why is None:
                data = data.reshape(rows, -1)
                bad = np.flatnonzero(~np.isfinite(data).all(axis=1))
                if len(bad):
                    which = f"row {bad[0] - first[bad[0]]} of episode {np.searchsorted(last, bad[0])}"
                    why = f"{which} is not finite"
            if why is None:
                self.columns[name], self._columns[name] = data.shape[1], data
            else:
                self.left_out[name] = why

        kept = np.flatnonzero(lengths >= 2)
        if not len(kept):
            raise ValueError(f"{path} has no episode of at least 2 frames")
        if len(kept) < len(lengths):
            self.left_out["episodes"] = f"{len(lengths) - len(kept)} of {len(lengths)} have fewer than 2 frames"
        self.lengths, self._offsets, self._numbers = lengths[kept], offsets[kept], kept
        self._actions = self._actions.reshape(rows, -1)
        self.action_dim = self._actions.shape[1]
        for episode in range(len(self)):
            self.actions(episode)
            self._check_video(episode)
        self.bytes = sum(file.stat().st_size for file in (*found.values(), *map(self._video, range(len(self)))))

    def frames(self, episode: int) -> np.ndarray:
        shape = (int(self.lengths[episode]), self.height, self.width)
        return frames_of(video.frames(self._video(episode)), self._what(episode), shape)

    def actions(self, episode: int) -> np.ndarray:
        return actions_of(self._actions[self._rows(episode)], self._what(episode))

    def column(self, name: str, episode: int) -> np.ndarray:
        return self._columns[name][self._rows(episode)].astype(np.float64)

    def _what(self, episode: int) -> str:
        return f"{self.path} episode {self._numbers[episode]}"

    def _rows(self, episode: int) -> slice:
        return slice(int(self._offsets[episode]), int(self._offsets[episode] + self.lengths[episode]))

    def _video(self, episode: int) -> Path:
        return self._camera / f"ep_{self._numbers[episode]}.mp4"

    def _check_video(self, episode: int) -> None:
        file, length = self._video(episode), int(self.lengths[episode])
        if not file.is_file():
            raise ValueError(f"{self._what(episode)} has no video: {file} is missing")
        height, width, _, count = video.size(file)
        if episode == 0:
            self.height, self.width = height, width
        if (height, width) != (self.height, self.width):
            raise ValueError(f"{file} is {height}x{width}, the first video {self.height}x{self.width}")
        if count is not None and count != length:
            raise ValueError(f"{file} has {count} frames, ep_len says {length} for episode {self._numbers[episode]}")

    def _cameras(self) -> list[str]:
        return sorted(folder.name for folder in self.path.iterdir() if folder.is_dir() and any(folder.glob("*.mp4")))

    def _folder(self, camera: str | None) -> Path:
        cameras = self._cameras()
        if not cameras:
            raise ValueError(f"{self.path} has no folder of .mp4 files; stable-worldmodel's single images are not read")
        if camera is None:
            camera = "pixels" if "pixels" in cameras or len(cameras) != 1 else cameras[0]
        if camera not in cameras:
            raise ValueError(f"{self.path} has no camera {camera!r}; it has {', '.join(cameras)}")
        return self.path / camera

    def _ends(self, found: dict[str, Path], name: str) -> np.ndarray:
        if name not in found:
            raise ValueError(f"{self.path} has no {name}.npz, which says where episodes begin")
        file = found.pop(name)
        data = self._array(file)
        if data.dtype.kind not in "iu" or data.ndim != 1:
            raise ValueError(f"{file} must be integers (E,), got {data.dtype} of shape {data.shape}")
        return data.astype(np.int64)

    @staticmethod
    def _array(file: Path) -> np.ndarray:
        try:
            with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as member:
                version = np.lib.format.read_magic(member)
                header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(member)
            if dtype.hasobject:  # only pickle would read them; that they are no numbers is enough to know
                return np.broadcast_to(np.array(None, object), shape)
            check_fits(
                int(np.prod(shape, dtype=float)) * dtype.itemsize, f"reading {file}", "is that what it should hold?"
            )
            with np.load(file, allow_pickle=False) as arrays:
                return arrays["arr_0"]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise ValueError(f"{file} is no file of one NumPy array, or a damaged one: {error}") from error
