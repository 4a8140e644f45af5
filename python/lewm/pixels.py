"""What a frame is: uint8 RGB, height x width x channel. The checks, and how another size becomes the model's."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

# Of ImageNet, in [0, 1] units: the official preprocessing subtracts the one and divides by the other.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def checked(frames: Any, name: str, leading: tuple[int, ...] | None = None) -> Any:
    """`frames` if they are pictures, (..., H, W, 3) uint8; an array stays an array, a tensor a tensor.

    Args:
        frames: An array, a tensor, or anything that NumPy makes a uint8 array of (a PIL picture, a list of arrays).
        name: What error messages call it.
        leading: Numbers of leading axes that are allowed, of E environments and T frames; None: any.

    Raises:
        ValueError: Not uint8, not height x width x RGB, or empty.
    """
    if not hasattr(frames, "dtype") or not hasattr(frames, "shape"):
        frames = np.asarray(frames)
    shape, kind = tuple(frames.shape), str(frames.dtype).removeprefix("torch.")
    if kind != "uint8":
        hint = "; float pixels in [0, 1] must be multiplied by 255 and rounded first" if "float" in kind else ""
        raise ValueError(f"{name} must be uint8 in [0, 255], got {kind} of shape {shape}{hint}")
    if leading is None:
        forms = "(..., H, W, 3)"
    else:
        axes = ("E", "T")[: max(leading)]
        forms = " or ".join(f"({', '.join((*axes[len(axes) - n :], 'H', 'W', '3'))})" for n in leading)
    wish = f"{name} must be of shape {forms}, got {shape}"
    if len(shape) >= 3 and shape[-1] != 3 and shape[-3] == 3:
        raise ValueError(f"{wish}, which looks like channels first: use np.moveaxis({name}, -3, -1)")
    if len(shape) < 3 or shape[-1] != 3 or 0 in shape or (leading is not None and len(shape) - 3 not in leading):
        raise ValueError(wish)
    return frames


def fitted(frames: Any, size: int, name: str) -> Any:
    """Pictures (..., H, H, 3) uint8 as the model takes them, (..., size, size, 3); see `resize_area`.

    Raises:
        ValueError: They are not square.
    """
    height, width = frames.shape[-3:-1]
    if height != width:
        raise ValueError(
            f"{name} must be square like the pictures the model was trained on ({size}x{size}), got {height}x{width}; "
            "crop it or pad it first"
        )
    return frames if height == size else resize_area(frames, size)


def resize_area(frames: Any, size: int) -> Any:
    """Area-averaged square pictures: (..., H, H, 3) uint8 -> (..., size, size, 3) uint8, rounded half to even.

    Each output pixel is the mean of the input under it, weighted by overlap; enlarging repeats pixels likewise. One
    product per picture: what becomes of a picture does not depend on the others beside it.
    """
    if not isinstance(frames, np.ndarray):  # a tensor
        return frames.new_tensor(resize_area(frames.cpu().numpy(), size))
    height = frames.shape[-2]
    weights = _overlap(height, size)
    flat = frames.reshape(-1, *frames.shape[-3:])
    out = np.empty((len(flat), size, size, 3), np.uint8)
    count = max(1, 2**18 // height**2)  # as many as keep the float copies in cache
    for i in range(0, len(flat), count):
        rows = weights @ flat[i : i + count].reshape(-1, height, 3 * height).astype(np.float32)  # (n, size, 3 * height)
        # Colours before columns: a product with three columns at a time is slow.
        lines = np.moveaxis(rows.reshape(-1, size, height, 3), 3, 2).reshape(-1, 3 * size, height)
        both = np.rint(lines @ weights.T).reshape(-1, size, 3, size)
        out[i : i + count] = np.moveaxis(both, 2, 3)
    return out.reshape(*frames.shape[:-3], size, size, 3)


@lru_cache(maxsize=16)
def _overlap(source: int, target: int) -> np.ndarray:
    """(target, source) rows of weights that sum to 1."""
    edges = np.arange(target + 1) * (source / target)
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(overlap, 0, None) * (target / source)).astype(np.float32)
