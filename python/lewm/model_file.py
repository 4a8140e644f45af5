"""The model file: one `.safetensors` that holds everything planning needs. No pickle, nothing executed.

Tensors carry the official names. The header's `lewm` entry is JSON:

    format_version  1
    architecture    every field of `ModelConfig`
    preset          the preset it started from
    stats           mean, std, low, high per raw action dimension (raw units), or null
    pixels          what a frame is: size, channel order, how another size gets there, mean and std
    planner         the planner settings it is meant to be used with
    data            fingerprint of the store it learnt from, environment, collection
    training        configuration, seed, steps, held-out episodes, last diagnostics, versions

A file from elsewhere is refused with one ValueError unless all of it fits: its header, of at most 16 MiB, declares the
size that the file has; the architecture is within the bounds of `ModelConfig`, and names and shapes of the tensors are
its; weights are finite in float32 (stored in 16, 32 or 64 bits) and counts int64; statistics are those of a model that
can plan; every other entry is of its kind. Reading takes as much memory as the file is large, and for the header some
25 times its size at most. Nothing is mapped: a file that is cut while it is read is refused too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lewm import _core
from lewm.config import ModelConfig

FORMAT_VERSION = 1
STATS = ("mean", "std", "low", "high")
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}

# transformers 4 name of each ViT key -> transformers 5 name (the rest of a checkpoint is named alike).
_V4_TO_V5 = (
    (r"^encoder\.encoder\.layer\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(encoder\.layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)

_V5_TO_V4 = (
    (r"^(encoder\.layers\.\d+)\.attention\.q_proj\.", r"\1.attention.attention.query."),
    (r"^(encoder\.layers\.\d+)\.attention\.k_proj\.", r"\1.attention.attention.key."),
    (r"^(encoder\.layers\.\d+)\.attention\.v_proj\.", r"\1.attention.attention.value."),
    (r"^(encoder\.layers\.\d+)\.attention\.o_proj\.", r"\1.attention.output.dense."),
    (r"^(encoder\.layers\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"^(encoder\.layers\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
    (r"^encoder\.layers\.", "encoder.encoder.layer."),
)


def current_names(weights: dict[str, Any]) -> dict[str, Any]:
    """`weights` under the names of this package, whichever transformers release named them."""
    return _renamed(weights, _V4_TO_V5)


def released_names(weights: dict[str, Any]) -> dict[str, Any]:
    """`weights` under the names that transformers 4 has, as the released checkpoints do; undoes `current_names`."""
    return _renamed(weights, _V5_TO_V4)


def _renamed(weights: dict[str, Any], patterns: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model of this architecture, in the order of the official state dict."""
    c = config
    d, p, inner = c.encoder_dim, c.predictor_dim, c.predictor_heads * c.predictor_head_dim
    side = c.image_size // c.patch_size
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, *inputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, *inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def projector(name: str, inputs: int) -> None:
        linear(f"{name}.net.0", c.projector_hidden, inputs)
        linear(f"{name}.net.1", c.projector_hidden)
        shapes[f"{name}.net.1.running_mean"] = shapes[f"{name}.net.1.running_var"] = (c.projector_hidden,)
        shapes[f"{name}.net.1.num_batches_tracked"] = ()
        linear(f"{name}.net.3", c.embed_dim, c.projector_hidden)

    def head(name: str, inputs: int, outputs: int) -> None:
        linear(f"{name}.net.0", c.head_hidden, inputs)
        linear(f"{name}.net.2", c.head_hidden, c.head_hidden)
        linear(f"{name}.net.4", outputs, c.head_hidden)

    embeddings = "encoder.embeddings"
    shapes[f"{embeddings}.cls_token"] = (1, 1, d)
    shapes[f"{embeddings}.position_embeddings"] = (1, side * side + 1, d)
    linear(f"{embeddings}.patch_embeddings.projection", d, 3, c.patch_size, c.patch_size)
    for i in range(c.encoder_depth):
        layer = f"encoder.layers.{i}"
        for part in ("q", "k", "v", "o"):
            linear(f"{layer}.attention.{part}_proj", d, d)
        linear(f"{layer}.mlp.fc1", c.encoder_mlp, d)
        linear(f"{layer}.mlp.fc2", d, c.encoder_mlp)
        linear(f"{layer}.layernorm_before", d)
        linear(f"{layer}.layernorm_after", d)
    linear("encoder.layernorm", d)

    shapes["predictor.pos_embedding"] = (1, c.positions, c.embed_dim)
    transformer = "predictor.transformer"
    if c.embed_dim != p:
        linear(f"{transformer}.input_proj", p, c.embed_dim)
        linear(f"{transformer}.cond_proj", p, c.embed_dim)
        linear(f"{transformer}.output_proj", c.embed_dim, p)
    for i in range(c.predictor_depth):
        layer = f"{transformer}.layers.{i}"
        linear(f"{layer}.attn.norm", p)
        linear(f"{layer}.attn.to_qkv", 3 * inner, p, bias=False)
        linear(f"{layer}.attn.to_out.0", p, inner)
        linear(f"{layer}.mlp.net.0", p)
        linear(f"{layer}.mlp.net.1", c.predictor_mlp, p)
        linear(f"{layer}.mlp.net.4", p, c.predictor_mlp)
        linear(f"{layer}.adaLN_modulation.1", 6 * p, p)
    linear(f"{transformer}.norm", p)

    linear("action_encoder.patch_embed", c.action_smoothed, c.block_dim, 1)
    linear("action_encoder.embed.0", c.action_hidden, c.action_smoothed)
    linear("action_encoder.embed.2", c.embed_dim, c.action_hidden)
    projector("projector", d)
    projector("pred_proj", c.embed_dim)
    if c.distance_head:
        head("distance_head", c.embed_dim, c.embed_dim)
    if c.action_prior:
        head("action_prior", 2 * c.embed_dim, c.prior_blocks * c.block_dim)
    return shapes


def check_weights(config: ModelConfig, weights: dict[str, Any]) -> None:
    """Checks that these are the tensors of a model of this architecture.

    Raises:
        ValueError: Some are missing, unexpected or of another shape; listed by group.
    """
    check_shapes(tensor_shapes(config), weights, "weights do not fit the architecture")


def check_shapes(want: dict[str, tuple[int, ...]], tensors: dict[str, Any], problem: str) -> None:
    """Checks that `tensors` are those named in `want`, of these shapes; `problem` begins the error's text.

    Raises:
        ValueError: Some are missing, unexpected or of another shape; listed by group.
    """
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, want {shape}"
        for name, shape in want.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    groups = (
        (sorted(set(want) - set(tensors)), "missing"),
        (sorted(set(tensors) - set(want)), "unexpected"),
        (shapes, "of another shape"),
    )
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, kind in groups
        if names
    ]
    if problems:
        raise ValueError(f"{problem}: {'; '.join(problems)}; want {len(want)} tensors")


def checked_stats(stats: Any, action_dim: int) -> dict[str, np.ndarray]:
    """Action statistics that a model can plan with: mean, std, low, high, each float64 of shape (action_dim,).

    Raises:
        ValueError: One is missing, of another shape or not finite, std is not positive, or low is not below high.
    """
    missing = [name for name in STATS if not isinstance(stats, Mapping) or name not in stats]
    if missing:
        raise ValueError(f"stats must hold {', '.join(STATS)}; missing: {', '.join(missing)}")
    arrays = {}
    for name in STATS:
        try:
            values = np.asarray(stats[name])
        except ValueError as error:  # rows of different lengths
            raise ValueError(f"stats[{name!r}] must be numbers: {error}") from None
        if values.shape != (action_dim,):
            raise ValueError(
                f"stats[{name!r}] must have shape ({action_dim},), one per raw action dimension, got {values.shape}"
            )
        if values.dtype.kind not in "fiu":
            raise ValueError(f"stats[{name!r}] must be numbers, got {values}")
        arrays[name] = values.astype(np.float64)
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"stats[{name!r}] must be finite: unbounded actions cannot be planned, got {values}")
    if (arrays["std"] <= 0).any():
        raise ValueError(
            f"stats['std'] must be positive, got {arrays['std']}: a constant action column cannot be planned"
        )
    if (arrays["low"] >= arrays["high"]).any():
        raise ValueError(f"stats['low'] must be below stats['high'], got {arrays['low']} and {arrays['high']}")
    return arrays


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """`content` under `path`, or what was there before: never a part of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, np.ndarray], header: dict[str, Any]) -> None:
    """A safetensors file with `header` as its JSON `lewm` entry, written atomically."""
    from safetensors.numpy import save

    write_atomically(path, save(tensors, metadata={"lewm": json.dumps(header)}))


def read_tensors(path: str | os.PathLike[str], what: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and `lewm` header of a safetensors file that lewm wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a safetensors file, or has no `lewm` header; `what` says what was wanted.
    """
    tensors, description = read_safetensors(path, what)
    if description is None:
        raise ValueError(
            f"{what}: {path} is a safetensors file but carries no lewm description; want one that lewm wrote"
        )
    return tensors, description


def read_safetensors(path: str | os.PathLike[str], what: str) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Tensors of any safetensors file, and its `lewm` header, None if it has none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a safetensors file; `what` says what was wanted.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no such file: {path}")
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise ValueError(f"{what}: {path} is a pickle, which can run code when opened; want a .safetensors file")
    try:
        header, stored = _core.read_tensors(path)
        tensors = {name: _array(name, *rest) for name, *rest in stored}
        description = json.loads(header or "null")
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{what}: {path} is not a safetensors file of lewm ({brief(error)})") from None
    return tensors, description if isinstance(description, dict) else None


def _array(name: str, dtype: str, shape: list[int], data: np.ndarray) -> np.ndarray:
    if dtype not in _DTYPES:
        raise ValueError(f"{name} is of type {dtype}, want one of {', '.join(_DTYPES)}")
    return data.view(_DTYPES[dtype]).reshape(shape)


def brief(error: Exception) -> str:
    """What an error says, cut where a file from elsewhere made it long."""
    text = str(error)
    return text if len(text) <= 500 else f"{text[:500]}..."


def write_model(
    path: str | os.PathLike[str],
    weights: dict[str, np.ndarray],
    config: ModelConfig,
    stats: dict[str, np.ndarray] | None,
    meta: dict[str, Any],
) -> None:
    """Writes the model file of the module's docstring."""
    write_tensors(path, weights, described(config, stats, meta))


def described(config: ModelConfig, stats: dict[str, np.ndarray] | None, meta: dict[str, Any]) -> dict[str, Any]:
    """The header of the module's docstring."""
    from lewm.pixels import MEAN, STD

    return {
        "format_version": FORMAT_VERSION,
        "architecture": dataclasses.asdict(config),
        "stats": None if stats is None else {name: list(map(float, values)) for name, values in stats.items()},
        "pixels": {
            "size": config.image_size,
            "layout": "HWC RGB uint8",
            "resize": "area",
            "scale": 255,
            "mean": MEAN,
            "std": STD,
        },
        **{name: meta[name] for name in ("preset", "planner", "data", "training") if name in meta},
    }


Read = tuple[dict[str, np.ndarray], ModelConfig, dict[str, np.ndarray] | None, dict[str, Any]]


def described_model(path: Path, weights: dict[str, np.ndarray], header: dict[str, Any]) -> Read:
    """Weights, configuration, action statistics and the rest of the header of the model file that has these.

    Raises:
        ValueError: It is not a model file of this package, or of a newer format.
    """
    try:
        config = _checked(weights, header)
        stats = header.get("stats")
        if stats is not None:
            stats = checked_stats(stats, config.action_dim)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"model file: {path} describes no model that this release reads ({brief(error)})") from None
    return weights, config, stats, {k: v for k, v in header.items() if k not in ("architecture", "stats")}


def _checked(weights: dict[str, np.ndarray], header: dict[str, Any]) -> ModelConfig:
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"it is of format version {version!r}, want {FORMAT_VERSION}")
    for name, kind in (("architecture", dict), ("preset", str), ("planner", dict), ("data", dict), ("training", dict)):
        if not isinstance(header.get(name), kind if name == "architecture" else kind | None):
            raise ValueError(f"its {name} must be a {kind.__name__}, got {header.get(name)!r}")
    config = ModelConfig(**header["architecture"])
    check_weights(config, weights)
    check_values(weights)
    return config


def check_values(weights: dict[str, np.ndarray]) -> None:
    """Checks that these numbers are a model's: finite in float32, counts whole, variances not negative.

    Raises:
        ValueError: One is not; the text names it.
    """
    for name, value in weights.items():
        if value.dtype.kind != ("i" if name.endswith(".num_batches_tracked") else "f"):
            raise ValueError(f"{name} is of type {value.dtype}")
        with np.errstate(over="ignore"):
            finite = np.isfinite(value.astype(np.float32, copy=False)).all()
        if not finite:
            raise ValueError(f"{name} holds values that are not finite in float32")
        if name.endswith(".running_var") and (value < 0).any():
            raise ValueError(f"{name} holds variances below zero")
