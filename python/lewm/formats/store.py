"""Our own store, as a source: to take some of its episodes, in another size, or into another format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lewm.data import Dataset
from lewm.formats import Source


def recognised(path: Path) -> bool:
    """Whether this is the folder of a `.lewm` store."""
    return (path / "catalogue.json").is_file()


class Reader(Source):
    """See `lewm.formats.Source`.

    Attributes:
        data: The data set.
    """

    def __init__(self, path: Path) -> None:
        self.data = data = Dataset(path)
        self.path, self.format = path, "lewm store"
        self.lengths, self.columns, self.left_out = data.lengths, data.columns, {}
        self.height, self.width, self.action_dim = data.height, data.width, data.action_dim
        self.metadata = data.metadata
        self.lossless = bool((data.metadata.get("source") or {}).get("lossless", True))
        self.bytes = sum(file.stat().st_size for file in path.iterdir() if file.is_file())

    def frames(self, episode: int) -> np.ndarray:
        return self.data.frames(episode)

    def actions(self, episode: int) -> np.ndarray:
        return self.data.actions(episode)

    def column(self, name: str, episode: int) -> np.ndarray:
        return self.data.column(name, episode)
