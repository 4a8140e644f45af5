"""What tables of Arrow hold, as arrays: rows of numbers, and encoded pictures."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from lewm.formats import needed


def rows_of(column: Any, what: str) -> np.ndarray:
    """The rows of a `pyarrow` column of numbers, or of lists of equally many: any type, of shape (N, C).

    Raises:
        ValueError: It holds something else, or has gaps; the text has `what`.
    """
    import pyarrow as pa

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    count, width = len(array), 1
    gaps = array.null_count
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        widths = np.unique(array.drop_null().value_lengths().to_numpy(zero_copy_only=False))
        if len(widths) > 1:
            raise ValueError(f"{what} must have equally many numbers in each row, got {widths[0]} to {widths[-1]}")
        width, array = int(widths[0]) if len(widths) else 1, array.flatten()
    kind = array.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"{what} must be numbers, got {column.type}")
    if gaps or array.null_count:
        raise ValueError(f"{what} must have a value in each row, {gaps or array.null_count} are missing")
    return array.to_numpy(zero_copy_only=False).reshape(count, width)


def picture_size(blob: Any, what: str) -> tuple[int, int, str]:
    """Height, width and format, "PNG" or "JPEG", of an encoded picture.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: It is none.
    """
    with _opened(blob, what) as image:
        return image.height, image.width, str(image.format)


def pictures_of(blobs: list[Any], what: str, height: int, width: int) -> np.ndarray:
    """Encoded pictures, decoded: uint8 RGB of shape (N, `height`, `width`, 3).

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: One is missing, damaged, or of another size; the text has `what` and its number.
    """
    out = np.empty((len(blobs), height, width, 3), np.uint8)
    for k, blob in enumerate(blobs):
        which = f"frame {k} of {what}"
        with _opened(blob, which) as image:
            if image.size != (width, height) or image.mode not in ("RGB", "L"):
                raise ValueError(
                    f"{which} must be {height}x{width} in RGB or grey, got {image.height}x{image.width} in {image.mode}"
                )
            try:
                out[k] = np.asarray(image.convert("RGB"))
            except Exception as error:  # decoders of damaged pictures raise what they like
                raise ValueError(f"{which} is damaged: {error}") from error
    return out


def png(frame: np.ndarray) -> bytes:
    """A frame, uint8 of shape (H, W, 3), as PNG."""
    file = io.BytesIO()
    needed("PIL.Image", "writing PNG").fromarray(frame).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _opened(blob: Any, what: str) -> Any:
    image = needed("PIL.Image", "reading pictures")
    if not isinstance(blob, bytes):
        raise ValueError(f"{what} is missing")
    try:
        return image.open(io.BytesIO(blob), formats=("PNG", "JPEG"))
    except Exception as error:
        raise ValueError(f"{what} is no picture in PNG or JPEG, or a damaged one: {error}") from error
