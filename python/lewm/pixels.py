"""What a frame is: uint8 RGB, height x width x channel. The checks, and how another size becomes the model's."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

# Of ImageNet, in [0, 1] units: the official preprocessing subtracts the one and divides by the other.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def checked(frames: Any, size: int, name: str) -> Any:
    """`frames` as the model takes them, (..., size, size, 3) uint8; an array stays an array, a tensor a tensor.

    Raises:
        ValueError: Not uint8, not height x width x RGB, or a picture of another shape.
    """
    if not hasattr(frames, "dtype") or not hasattr(frames, "shape"):
        frames = np.asarray(frames)
    shape = tuple(frames.shape)
    kind = str(frames.dtype).removeprefix("torch.")
    if kind != "uint8":
        raise ValueError(
            f"{name} must be uint8 in [0, 255], got {kind} of shape {shape}; want (..., H, W, 3) uint8 RGB"
        )
    if len(shape) < 3 or shape[-1] != 3:
        chw = len(shape) >= 3 and shape[-3] == 3
        hint = "; this looks like channels first: move them last with np.moveaxis(x, -3, -1)" if chw else ""
        raise ValueError(f"{name} must be (..., H, W, 3) uint8 RGB, got shape {shape}{hint}")
    height, width = shape[-3:-1]
    if 0 in shape:
        raise ValueError(f"{name} must not be empty, got shape {shape}")
    if height != width:
        raise ValueError(
            f"{name} must be square like the pictures the model was trained on ({size}x{size}), got {height}x{width}; "
            "crop it or pad it first"
        )
    return frames if height == size else resize_area(frames, size)


def resize_area(frames: Any, size: int) -> Any:
    """Area-averaged square pictures: (..., H, H, 3) uint8 -> (..., size, size, 3) uint8, rounded half to even.

    Each output pixel is the mean of the input under it, weighted by overlap; enlarging repeats pixels likewise.
    """
    if not isinstance(frames, np.ndarray):  # a tensor
        return frames.new_tensor(resize_area(frames.cpu().numpy(), size))
    weights = _overlap(frames.shape[-2], size)
    flat = frames.reshape(-1, *frames.shape[-3:])
    out = np.empty((len(flat), size, size, 3), np.uint8)
    for i in range(0, len(flat), 256):  # bounds the float copy
        part = np.einsum("yh,nhwc->nywc", weights, flat[i : i + 256].astype(np.float32), optimize=True)
        out[i : i + 256] = np.rint(np.einsum("xw,nywc->nyxc", weights, part, optimize=True))
    return out.reshape(*frames.shape[:-3], size, size, 3)


@lru_cache(maxsize=16)
def _overlap(source: int, target: int) -> np.ndarray:
    """(target, source) rows of weights that sum to 1."""
    edges = np.arange(target + 1) * (source / target)
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(overlap, 0, None) * (target / source)).astype(np.float32)
