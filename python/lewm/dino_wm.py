"""DINO-WM (Zhou et al. 2024, arXiv 2411.04983) on this package's data, planner and harness, to compare LeWM with.

A frozen DINOv2 ViT turns a frame into one token for each patch. A causal transformer over all tokens of the last
frames, to each of which the embedded action block is appended, predicts the tokens of the next frame; it is trained by
their mean squared error, teacher-forced. Plans are scored by the mean squared error of all predicted tokens to the
goal's. There is no decoder and no proprioception. Written from the paper.

DINOv2's weights are read from a local file. Without them the ViT is a random one of the same sizes, and everything says
so: token counts and times are then those of DINO-WM, success is not.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import platform
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lewm import __version__
from lewm.checks import integer
from lewm.config import Preset
from lewm.data import Dataset
from lewm.memory import check_fits
from lewm.model import Model
from lewm.model_file import (
    FORMAT_VERSION,
    STATS,
    brief,
    check_shapes,
    check_values,
    checked_stats,
    read_safetensors,
    read_tensors,
    write_atomically,
    write_tensors,
)
from lewm.pixels import MEAN, STD, fitted
from lewm.torch_backend import TorchBackend, device_of

__all__ = ["PRESETS", "DinoConfig", "DinoWM", "read_dinov2", "train_dino_wm"]

KIND = "dino-wm"
# What the frozen ViT is, by `meta["encoder"]["source"]`.
LABELS = {
    "dinov2": "frozen DINOv2 ViT",
    "random": "random frozen ViT (no DINOv2 weights given)",
}
_LARGEST = {"image_size": 4096, "encoder_size": 4096, "encoder_depth": 256, "predictor_depth": 256, "history": 1024}
_EPS = 1e-6  # of DINOv2's LayerNorms
_HEAD = 64  # width of a head in every DINOv2 ViT
# Predictor tokens per pass: bounds memory at some 0.5 GB on a CPU, 6 GB on a GPU.
_TOKENS = {"cpu": 2**14, "cuda": 2**18}
_FRAMES = 32  # encoded together
_CACHE = 2**30  # bytes of latents that training keeps; beyond that every batch is encoded anew
_LOG_EVERY = 50
_VALIDATION = 256  # windows
_ORIGIN = ("env_id", "env_kwargs", "seed", "policy")  # of the store's metadata, what the model's file repeats


@dataclass(frozen=True)
class DinoConfig:
    """Architecture of a DINO-WM (the defaults are the paper's, with DINOv2's ViT-S/14).

    What `lewm.plan`, `Controller` and `evaluate` ask of a `ModelConfig` it has too.

    Attributes:
        action_dim: Width of one raw action.
        image_size: Side of the pictures it takes, in pixels.
        encoder_size: Side to which the encoder resizes them, in pixels; a multiple of `patch_size`.
        patch_size: Side of a ViT patch, in pixels.
        encoder_dim, encoder_depth, encoder_heads, encoder_mlp: The frozen ViT.
        action_embed: Width of an embedded action block.
        predictor_depth, predictor_heads, predictor_head_dim, predictor_mlp: The predictor, whose tokens are
            `encoder_dim + action_embed` wide.
        dropout: Of the predictor while training.
        history: Number of frames the predictor sees at most.
        action_block: Raw actions consumed by one predictor step (the paper's frame-skip).
    """

    action_dim: int
    image_size: int = 224
    encoder_size: int = 196
    patch_size: int = 14
    encoder_dim: int = 384
    encoder_depth: int = 12
    encoder_heads: int = 6
    encoder_mlp: int = 1536
    action_embed: int = 10
    predictor_depth: int = 6
    predictor_heads: int = 16
    predictor_head_dim: int = 64
    predictor_mlp: int = 2048
    dropout: float = 0.1
    history: int = 3
    action_block: int = 5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, most = getattr(self, field.name), _LARGEST.get(field.name, 65536)
            if field.name == "dropout":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{field.name} must be an integer from 1 to {most}, got {value!r}")
        if self.encoder_size % self.patch_size:
            raise ValueError(
                f"encoder_size must be a multiple of patch_size {self.patch_size}, got {self.encoder_size}"
            )
        if self.encoder_dim % self.encoder_heads:
            raise ValueError(f"encoder_heads must divide encoder_dim {self.encoder_dim}, got {self.encoder_heads}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}")

    @property
    def tokens(self) -> int:
        """Patch tokens P of a frame."""
        return (self.encoder_size // self.patch_size) ** 2

    @property
    def embed_dim(self) -> int:
        """Width D of a frame's latent: all its tokens, one after the other."""
        return self.tokens * self.encoder_dim

    @property
    def block_dim(self) -> int:
        """Width A of one action block: `action_block * action_dim`."""
        return self.action_block * self.action_dim

    @property
    def predictor_dim(self) -> int:
        """Width of a predictor token."""
        return self.encoder_dim + self.action_embed

    @property
    def positions(self) -> int:
        """Tokens that the predictor sees at most."""
        return self.history * self.tokens

    @property
    def distance_head(self) -> bool:
        """It has none."""
        return False

    @property
    def action_prior(self) -> bool:
        """It has none."""
        return False

    @property
    def action_prefix(self) -> bool:
        """It goes one block after the other."""
        return False


@dataclass(frozen=True)
class _Training:
    """How the predictor is trained: AdamW, linear warm-up (in steps), cosine to zero."""

    steps: int = 100_000
    batch_size: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup: int = 100
    clip: float = 1.0
    validation: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup", 0)):
            integer(name, getattr(self, name), least)
        for name in ("learning_rate", "weight_decay", "clip"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number, finite and not negative, got {value!r}")


PRESETS: dict[str, Preset] = {
    # DINO-WM resizes pictures of 224 to 196 pixels, 14 x 14 tokens: the article's "some 200 times fewer tokens".
    "paper": Preset(model={}, train={}, planner={"samples": 300, "iterations": 30, "elites": 30, "horizon": 5}),
    # With 112 pixels, 64 tokens, plans take four times as long and a random ViT's distances tell no more.
    # After 1,000 steps the predictor knows little more than the mean.
    "tiny": Preset(
        model={
            "image_size": 64,
            "encoder_size": 56,
            "encoder_dim": 64,
            "encoder_depth": 2,
            "encoder_heads": 1,
            "encoder_mlp": 256,
            "predictor_depth": 2,
            "predictor_heads": 4,
            "predictor_head_dim": 32,
            "predictor_mlp": 256,
            "dropout": 0.0,
            "history": 1,
        },
        train={"steps": 4000},
        planner={"samples": 100, "iterations": 10, "elites": 10, "horizon": 5},
    ),
}


# ------------------------------------------------------------------------------------------------------- the networks


class _LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _ViTAttention(nn.Module):
    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.heads = config.encoder_heads
        self.qkv = nn.Linear(config.encoder_dim, 3 * config.encoder_dim)
        self.proj = nn.Linear(config.encoder_dim, config.encoder_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _ViTBlock(nn.Module):
    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        dim, hidden = config.encoder_dim, config.encoder_mlp
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = _ViTAttention(config)
        self.ls1 = _LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim)),
        )
        self.ls2 = _LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class FrozenViT(nn.Module):
    """DINOv2's ViT; (N, S, S, 3) uint8 RGB -> (N, P, encoder_dim), the normalised patch tokens of the last layer.

    Names of tensors are those of the weights that were released. Positions are those of this grid, interpolated when
    the weights were read.
    """

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        dim = config.encoder_dim
        self.size = config.encoder_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.tokens, dim))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, config.patch_size, config.patch_size)))
        self.blocks = nn.ModuleList(_ViTBlock(config) for _ in range(config.encoder_depth))
        self.norm = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, frames: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, dtype=self.cls_token.dtype, device=frames.device) for v in (MEAN, STD))
        pixels = ((frames.to(mean.dtype) / 255 - mean) / std).permute(0, 3, 1, 2)
        if pixels.shape[-1] != self.size:
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1).to(patches.dtype), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]


class _Attention(nn.Module):
    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        inner = config.predictor_heads * config.predictor_head_dim
        self.heads, self.dropout = config.predictor_heads, config.dropout
        self.norm = nn.LayerNorm(config.predictor_dim)
        self.to_qkv = nn.Linear(config.predictor_dim, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, config.predictor_dim), nn.Dropout(config.dropout))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.to_out(out.transpose(1, 2).flatten(2))


def _feed_forward(config: DinoConfig) -> nn.Sequential:
    dim, hidden = config.predictor_dim, config.predictor_mlp
    drop = nn.Dropout(config.dropout)
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), drop, nn.Linear(hidden, dim), drop)


class Predictor(nn.Module):
    """Transformer over all tokens of at most `history` frames; (N, W, P, d) -> (N, W, P, d), d being `predictor_dim`.

    A token sees those of its own frame and of earlier ones (the paper's frame-level causal mask).
    """

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, config.positions, config.predictor_dim))
        self.attention = nn.ModuleList(_Attention(config) for _ in range(config.predictor_depth))
        self.mlp = nn.ModuleList(_feed_forward(config) for _ in range(config.predictor_depth))
        self.norm = nn.LayerNorm(config.predictor_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        frames, each = tokens.shape[1:3]
        x = tokens.flatten(1, 2)
        x = x + self.pos_embedding[:, : x.shape[1]]
        frame = torch.arange(frames, device=x.device).repeat_interleave(each)
        mask = frame[:, None] >= frame if frames > 1 else None
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(x, mask)
            x = x + mlp(x)
        return self.norm(x).unflatten(1, (frames, each))


class DinoNetwork(nn.Module):
    """The whole model: frozen encoder, action encoder, predictor. Latents are all tokens of a frame, flat."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = FrozenViT(config)
        self.action_encoder = nn.Linear(config.block_dim, config.action_embed)
        self.predictor = Predictor(config)

    def encode(self, frames: Tensor) -> Tensor:
        """Latents of frames: (N, S, S, 3) uint8 RGB -> (N, D)."""
        return self.encoder(frames).flatten(1)

    def predict(self, z: Tensor, actions: Tensor) -> Tensor:
        """Teacher-forced predictions.

        Args:
            z: Latents, (N, W, D) with W <= `config.history`.
            actions: Embedded action blocks, (N, W, `action_embed`); block t leads from z[t] to z[t + 1].

        Returns:
            (N, W, D): entry t is the prediction of z[t + 1] from z[: t + 1].
        """
        tokens = z.unflatten(-1, (self.config.tokens, -1))
        appended = actions[:, :, None].expand(-1, -1, self.config.tokens, -1)
        predicted = self.predictor(torch.cat([tokens, appended.to(tokens.dtype)], -1))
        return predicted[..., : self.config.encoder_dim].flatten(2)

    def imagine(self, z: Tensor, candidates: Tensor, past_actions: Tensor | None = None) -> Iterator[Tensor]:
        """The imagined latents (N, D), one after the other, for `z` (N, T, D), blocks (N, H, A) and (N, T - 1, A)."""
        blocks = candidates if past_actions is None else torch.cat([past_actions, candidates], 1)
        actions = self.action_encoder(blocks)
        for t in range(z.shape[1], blocks.shape[1] + 1):
            z = z[:, -self.config.history :]
            following = self.predict(z, actions[:, t - z.shape[1] : t])[:, -1]
            yield following
            z = torch.cat([z, following[:, None].to(z.dtype)], 1)


# ---------------------------------------------------------------------------------------------------- frozen weights


def random_vit(config: DinoConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of a random ViT of these sizes, by the names of `FrozenViT`: scaled by fan-in, float32."""
    integer("seed", seed, 0, 2**63)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in FrozenViT(config).state_dict().items():
        if name in ("cls_token", "pos_embed"):
            value.normal_(0, 0.02, generator=generator)
        elif value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        else:  # biases, and the scales of norms and layers
            value.fill_(0.0 if name.endswith("bias") else 1.0)
        weights[name] = value.numpy()
    return weights


def read_dinov2(path: str | os.PathLike[str], size: int = 196) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Weights of a DINOv2 ViT without registers from a local file; nothing in it is executed.

    Positions are interpolated to the grid as transformers does (bicubic, to the grid's size). The code in torch.hub
    adds 0.1 to the grid's sides there, which moves them by up to a tenth of a patch.

    Args:
        path: A state dict that torch wrote (`dinov2_vits14_pretrain.pth`), a safetensors file, or a folder with the
            `model.safetensors` (and `config.json`) of transformers' `Dinov2Model`; named either way.
        size: Side of the pictures that the ViT is to take, in pixels.

    Returns:
        The tensors by the names of `FrozenViT`, float32; and the fields of `DinoConfig` that describe the ViT.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else; the text names the tensors that do not fit, with their shapes.
    """
    path = Path(path)
    source, heads = path, None
    if path.is_dir():
        source, heads = path / "model.safetensors", _heads(path / "config.json")
    if not source.is_file():
        raise FileNotFoundError(f"weights: no such file: {source}")
    if source.suffix in (".pt", ".pth", ".bin"):
        tensors = _unpickled(source)
    else:
        tensors, _ = read_safetensors(source, "weights")
    try:
        tensors = _released_names(tensors)
        check_values(tensors)
        sizes = _sizes(tensors, heads)
        with torch.device("meta"):
            vit = FrozenViT(DinoConfig(action_dim=1, encoder_size=size, **sizes))
        grid = math.isqrt(tensors["pos_embed"].shape[1] - 1)
        want = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
        stored = {**want, "pos_embed": (1, 1 + grid * grid, sizes["encoder_dim"])}
        check_shapes(stored, tensors, "its tensors are those of another architecture")
    except ValueError as error:
        raise ValueError(f"weights: {source} is no DINOv2 ViT that this reads ({brief(error)})") from None
    tensors = {name: value.astype(np.float32, copy=False) for name, value in tensors.items()}
    tensors["pos_embed"] = _interpolated(tensors["pos_embed"], size // sizes["patch_size"])
    return tensors, sizes


def _heads(path: Path) -> int | None:
    """Attention heads by a `config.json`; None where there is none or it does not say."""
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        heads = config.get("num_attention_heads")
        return None if heads is None else integer("num_attention_heads", heads, 1, 65536)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"weights: {path} does not describe a ViT ({brief(error)})") from None


def _unpickled(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict that torch wrote. Only tensors and containers are made of what is in the file."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of an unpickler
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {named[1]}" if named else (brief(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"weights: {path} holds more than tensors, or is damaged, and what a pickle says is not run here; want a "
            f"state dict, as dinov2_vits14_pretrain.pth is one ({reason})"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"weights: {path} holds a {type(found).__name__} of other things, want a dict of tensors")
    arrays = {}
    for name, value in found.items():
        plain = value.layout is torch.strided and not (value.is_meta or value.is_complex() or value.is_quantized)
        # One that repeats what is stored would take as much memory as its shape asks for.
        if not plain or not value.is_floating_point() or value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"weights: {name} in {path} is no plain tensor of floating-point numbers")
        arrays[str(name)] = value.detach().float().contiguous().numpy()
    return arrays


# transformers' name of each tensor (releases 4 and 5) -> the released one.
_TO_RELEASED = (
    (r"^dinov2\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(?:attention\.)?(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)


def _released_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors by the released names, queries, keys and values in one; without the mask token of the training."""
    named: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        for pattern, replacement in _TO_RELEASED:
            name = re.sub(pattern, replacement, name)
        named[name] = value
    named.pop("mask_token", None)
    for name in [n for n in named if re.search(r"\.attn\.(q|query)\.", n)]:
        head, letter, last = re.split(r"\.(q|query)\.", name)
        parts = [f"{head}.{p}.{last}" for p in (("q", "k", "v") if letter == "q" else ("query", "key", "value"))]
        if all(p in named and named[p].shape == named[name].shape for p in parts):
            named[f"{head}.qkv.{last}"] = np.concatenate([named.pop(p) for p in parts])
    return named


def _sizes(tensors: dict[str, np.ndarray], heads: int | None) -> dict[str, int]:
    """What the shapes tell of the ViT; the fields of `DinoConfig`."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != rank:
            got = tensors[name].shape if name in tensors else f"none among {len(tensors)} tensors"
            raise ValueError(f"want {name} with {rank} axes, got {got}")
        return tensors[name].shape

    dim, channels, patch, other = shape("patch_embed.proj.weight", 4)
    if channels != 3 or patch != other:
        raise ValueError(
            f"patch_embed.proj.weight must be (width, 3, patch, patch), got {(dim, channels, patch, other)}"
        )
    _, positions, _ = shape("pos_embed", 3)
    if positions < 2 or math.isqrt(positions - 1) ** 2 != positions - 1:
        raise ValueError(f"pos_embed must be of [CLS] and a square grid, got {positions} positions")
    return {
        "patch_size": patch,
        "encoder_dim": dim,
        "encoder_depth": len({found[1] for n in tensors if (found := re.match(r"blocks\.(\d+)\.", n))}),
        "encoder_heads": heads or max(1, dim // _HEAD),
        "encoder_mlp": shape("blocks.0.mlp.fc1.weight", 2)[0],
    }


def _interpolated(positions: np.ndarray, side: int) -> np.ndarray:
    """(1, 1 + g * g, d) -> (1, 1 + side * side, d); [CLS] keeps its own."""
    grid = math.isqrt(positions.shape[1] - 1)
    if grid == side:
        return positions
    patches = torch.from_numpy(positions[:, 1:]).unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, (side, side), mode="bicubic", align_corners=False)
    return np.concatenate([positions[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2).numpy()], 1)


# ------------------------------------------------------------------------------------------------------- the model


def _built(config: DinoConfig, weights: dict[str, Any]) -> DinoNetwork:
    """A network of these weights, on the CPU."""
    with torch.device("meta"):
        network = DinoNetwork(config)
    want = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    check_shapes(want, weights, "weights do not fit the architecture")
    network = network.to_empty(device="cpu")
    network.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()}, strict=True)
    return network


class DinoBackend(TorchBackend):
    """The network on a device, and what planning asks of it; candidates in parts that bound memory."""

    def __init__(self, config: DinoConfig, weights: dict[str, Any], precision: str, device: str | None) -> None:
        if precision not in ("auto", "float32", "float64", "bfloat16"):
            raise ValueError(f"precision must be auto, float32, float64 or bfloat16, got {precision!r}")
        self.precision = "float32" if precision == "auto" else precision
        self.device = device_of(device)
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.network: Any = _built(config, weights).to(self.device, self.dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, frames: Any) -> Tensor:
        """(..., S, S, 3) uint8 -> (..., D)."""
        frames = torch.as_tensor(np.ascontiguousarray(frames) if isinstance(frames, np.ndarray) else frames)
        flat = frames.reshape(-1, *frames.shape[-3:])
        with self._autocast():
            z = torch.cat([self.network.encode(part.to(self.device)) for part in flat.split(_FRAMES)])
        return z.to(self.dtype).reshape(*frames.shape[:-3], -1)

    @torch.no_grad()
    def rollout(self, z: Any, candidates: Any, past_actions: Any | None) -> Tensor:
        """(E, T, D), (E, S, H, A), (E, T - 1, A) -> (E, S, T + H, D)."""
        z, candidates = self.tensor(z), self.tensor(candidates)
        parts = [
            torch.cat([z[whose], *(step[:, None].to(self.dtype) for step in steps)], 1)
            for whose, steps in self._parts(z, candidates, past_actions)
        ]
        return torch.cat(parts).unflatten(0, candidates.shape[:2])

    @torch.no_grad()
    def costs(self, z: Any, goal: Any, candidates: Any, past_actions: Any | None, cost: str = "latent") -> Tensor:
        """Terminal costs (E, S) of candidates, without keeping the trajectories."""
        z, candidates, goal = self.tensor(z), self.tensor(candidates), self.tensor(goal)
        costs = []
        for whose, steps in self._parts(z, candidates, past_actions):
            for step in steps:
                last = step
            costs.append((last.to(self.dtype) - goal[whose]).square().mean(-1))
        return torch.cat(costs).unflatten(0, candidates.shape[:2])

    def _parts(
        self, z: Tensor, candidates: Tensor, past_actions: Any | None
    ) -> Iterator[tuple[Tensor, Iterator[Tensor]]]:
        """For some candidates at a time, whose they are and what they lead to, step by step."""
        environments, samples = candidates.shape[:2]
        flat, past = candidates.flatten(0, 1), None if past_actions is None else self.tensor(past_actions)
        owner = torch.arange(environments, device=self.device).repeat_interleave(samples)
        rows = max(1, _TOKENS.get(self.device.type, _TOKENS["cpu"]) // self.network.config.positions)
        for i in range(0, len(flat), rows):
            whose = owner[i : i + rows]
            with self._autocast():
                yield whose, self.network.imagine(z[whose], flat[i : i + rows], None if past is None else past[whose])


class DinoWM(Model):
    """A DINO-WM behind the interface of `lewm.Model`: `lewm.plan`, `Controller` and `lewm.evaluate` take it.

    A latent is all P patch tokens of a frame, flat: D = P * `encoder_dim`. Make one with `train_dino_wm` or `load`.

    Attributes:
        config: A `DinoConfig`.
        stats, meta, backend, precision: As those of `lewm.Model`; `meta["encoder"]` says where the frozen ViT is from.
    """

    config: DinoConfig

    def __init__(
        self,
        config: DinoConfig,
        weights: dict[str, Any],
        *,
        stats: dict[str, Any] | None = None,
        meta: dict[str, Any] | None = None,
        precision: str = "auto",
        device: str | None = None,
    ) -> None:
        self.config = config
        self.stats = None if stats is None else checked_stats(stats, config.action_dim)
        self.meta = dict(meta or {})
        self._engine = DinoBackend(config, weights, precision, device)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        stats: dict[str, Any] | None = None,
        precision: str = "auto",
        device: str | None = None,
    ) -> DinoWM:
        """Reads a file that `save` wrote, or the one in a run's folder; nothing in it is executed.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is none, or a damaged one.
        """
        path = Path(path)
        path = path / "model.safetensors" if path.is_dir() else path
        weights, header = read_tensors(path, "DINO-WM")
        try:
            if header.get("kind") != KIND or header.get("format_version") != FORMAT_VERSION:
                raise ValueError(
                    f"it is of kind {header.get('kind')!r} and format version {header.get('format_version')!r}, want "
                    f"{KIND!r} and {FORMAT_VERSION}"
                )
            for name, kind in (
                ("preset", str),
                ("planner", dict),
                ("encoder", dict),
                ("data", dict),
                ("training", dict),
            ):
                if not isinstance(header.get(name), kind | None):
                    raise ValueError(f"its {name} must be a {kind.__name__}, got {header.get(name)!r}")
            if not isinstance(header.get("architecture"), dict):
                raise ValueError(f"its architecture must be a dict, got {header.get('architecture')!r}")
            config = DinoConfig(**header["architecture"])
            check_values(weights)
            meta = {name: header[name] for name in _META if header.get(name) is not None}
            stats = header.get("stats") if stats is None else stats
            return cls(config, weights, stats=stats, meta=meta, precision=precision, device=device)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"DINO-WM: {path} is no model that this release reads ({brief(error)})") from None

    @classmethod
    def from_state_dict(cls, weights: dict[str, Any], **_: Any) -> NoReturn:
        """There are no official weights of this form: raises ValueError."""
        raise ValueError(
            "weights must be those of a LeWorldModel, which lewm.Model reads; DinoWM.load reads its own file"
        )

    def export(self, form: str, path: str | os.PathLike[str], *, transformers: int = 5) -> NoReturn:
        """Other programs read none: raises ValueError."""
        raise ValueError(f"form {form!r} holds a LeWorldModel; a DINO-WM is only saved as its own file (save)")

    @property
    def label(self) -> str:
        """What the frozen ViT is; belongs wherever a result of this model is shown."""
        source = (self.meta.get("encoder") or {}).get("source")
        return LABELS.get(source if isinstance(source, str) else "", "frozen ViT of unknown origin")

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters: "frozen" of the ViT, "trained" of predictor and action encoder."""
        counts = {"frozen": 0, "trained": 0}
        for name, value in self._engine.network.named_parameters():
            counts["frozen" if name.startswith("encoder.") else "trained"] += value.numel()
        return counts

    def cost(self, zs: Any, goal: Any, cost: str | None = None) -> Any:
        """Mean squared error of all tokens of the last latent to the goal's: of (E, S, T, D) to (E, D), (E, S)."""
        return super().cost(zs, goal, cost) / self.config.embed_dim

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model with its frozen ViT as one `.safetensors`; it is complete or absent.

        Raises:
            ValueError: `path` has another suffix.
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"path must end in .safetensors, got {os.fspath(path)!r}")
        header = {
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            "architecture": dataclasses.asdict(self.config),
            "stats": None if self.stats is None else {k: list(map(float, v)) for k, v in self.stats.items()},
            **{name: self.meta[name] for name in _META if name in self.meta},
        }
        write_tensors(path, self._engine.weights(), header)

    def describe(self) -> str:
        """What it is, in a few lines, to be read by a person."""
        c, counts = self.config, self.parameters()
        lines = [
            f"DINO-WM, preset {self.meta.get('preset', '?')}: {c.image_size}x{c.image_size} RGB -> {c.tokens} tokens "
            f"of {c.encoder_dim}, history {c.history}, blocks of {c.action_block} actions of width {c.action_dim}",
            f"encoder: {self.label}; {counts['frozen']:,} parameters frozen, {counts['trained']:,} trained",
            f"runs on {self.backend} in {self.precision}; weights {self.hash()[:12]}",
        ]
        if self.stats is None:
            return "\n".join([*lines, "no action statistics: it cannot plan"])
        for i, (mean, std, low, high) in enumerate(zip(*(self.stats[k] for k in STATS), strict=True)):
            lines.append(f"action {i}: raw bounds [{low:g}, {high:g}], data mean {mean:.4g}, std {std:.4g}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        preset = self.meta.get("preset", "custom")
        return f"<lewm.dino_wm.DinoWM {preset}, {self.label}, {self.backend} {self.precision}>"


_META = ("preset", "planner", "encoder", "data", "training")


# ------------------------------------------------------------------------------------------------------- training


def train_dino_wm(
    data: Dataset | str | os.PathLike[str],
    *,
    preset: str = "tiny",
    weights: str | os.PathLike[str] | None = None,
    seed: int = 0,
    steps: int | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    **overrides: Any,
) -> DinoWM:
    """Trains the predictor and the action encoder of a DINO-WM; the encoder stays as it is.

    The loss is the mean squared error of the next frame's tokens, teacher-forced (the paper's section 3). The latents
    of all frames are computed once and kept in 16 bits where they take 1 GiB at most; else each batch is encoded.
    AdamW with DINO-WM's learning rate, 5e-4, for both parts, and its batch of 32; the warm-up and the cosine to zero
    are ours. A function of its arguments on one machine with one number of threads.

    Args:
        data: A store or its path. Frames of another size than the preset's are area-resized.
        preset: "tiny" (16 tokens; a CPU trains it in minutes) or "paper" (196 tokens of ViT-S/14).
        weights: DINOv2's, a local path, see `read_dinov2`; the ViT's sizes are then theirs. Without them the ViT is
            random (`DinoWM.label`).
        seed: Of everything random, a random ViT included.
        steps: Optimiser steps; by default the preset's.
        out: A new or empty folder, which gets `model.safetensors` and `metrics.csv` when all is done.
        device: A torch device; CUDA where there is one, else the CPU, when not given.
        progress: Called after every step with (steps done, steps in all, latest metrics).
        **overrides: Any field of `DinoConfig`, and `batch_size`, `learning_rate`, `weight_decay`, `warmup` (steps),
            `clip` (of the gradient's norm) and `validation` (share of the episodes).

    Raises:
        FileNotFoundError: There are no such weights.
        ValueError: Data that cannot be trained on, weights of another kind, a setting out of its domain, or a folder
            in use.
        TypeError: An unknown setting.
        FloatingPointError: The loss is not finite any more.
    """
    data = data if isinstance(data, Dataset) else Dataset(data)
    integer("seed", seed, 0, 2**63)
    if data.height != data.width:
        raise ValueError(f"data must hold square frames, got {data.height}x{data.width}")
    folder = None if out is None else Path(out)
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out must be a new or empty folder, got {folder}, which holds files or is one")
    if steps is not None:
        overrides["steps"] = steps
    fields, training = _configured(preset, overrides)
    encoder: dict[str, Any] = {"source": "random", "seed": seed}
    if weights is None:
        config = DinoConfig(action_dim=data.action_dim, **fields)
        vit = random_vit(config, seed)
    else:
        given = [name for name in overrides if name.startswith("encoder_") and name != "encoder_size"]
        if given or "patch_size" in overrides:
            raise ValueError(f"{(*given, 'patch_size')[0]} must not be given with weights, whose it is")
        vit, sizes = read_dinov2(weights, fields.get("encoder_size", DinoConfig.encoder_size))
        config = DinoConfig(action_dim=data.action_dim, **{**fields, **sizes})
        encoder = {"source": "dinov2", "file": Path(weights).name}

    place = device_of(device)
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.no_grad():
            network = DinoNetwork(config)
            network.encoder.load_state_dict({name: torch.from_numpy(value) for name, value in vit.items()})
        network.encoder.requires_grad_(False)
        run = _TrainingRun(network.to(place), data, training, seed)
        rows = run.train(progress)
    meta = {
        "preset": f"{KIND}-{preset}",
        "planner": PRESETS[preset].planner,
        "encoder": encoder,
        "data": {
            "fingerprint": data.fingerprint(),
            "episodes": len(data),
            **{k: data.metadata[k] for k in _ORIGIN if k in data.metadata},
        },
        "training": {
            "config": dataclasses.asdict(training),
            "seed": seed,
            "steps": training.steps,
            "seconds": round(run.seconds, 1),
            "validation_episodes": [int(e) for e in run.validation_episodes],
            "metrics": run.measured(),
            "versions": {"lewm": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "device": str(place),
        },
    }
    model = DinoWM(config, network.state_dict(), stats=run.stats, meta=meta, device=device)
    if folder is not None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ("step", "loss", "learning_rate", "seconds"), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        model.save(folder / "model.safetensors")
        write_atomically(folder / "metrics.csv", text.getvalue().encode())
    return model


def _configured(preset: str, overrides: dict[str, Any]) -> tuple[dict[str, Any], _Training]:
    """Fields of the `DinoConfig` and the training of a preset with `overrides`."""
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    model = {f.name for f in dataclasses.fields(DinoConfig)} - {"action_dim"}
    training = {f.name for f in dataclasses.fields(_Training)}
    unknown = sorted(set(overrides) - model - training)
    if unknown:
        raise TypeError(
            f"{unknown[0]!r} is no setting of DINO-WM; the settings are {', '.join(sorted(model | training))}"
        )
    base = PRESETS[preset]
    fields = {**base.model, **{k: v for k, v in overrides.items() if k in model}}
    return fields, _Training(**{**base.train, **{k: v for k, v in overrides.items() if k in training}})


class _TrainingRun:
    """Windows, latents, and the steps."""

    def __init__(self, network: DinoNetwork, data: Dataset, training: _Training, seed: int) -> None:
        config = self.config = network.config
        self.network, self.data, self.training, self.seed = network, data, training, seed
        self.device = next(network.parameters()).device
        self.train_episodes, self.validation_episodes = data.split(training.validation, seed)
        self.stats = checked_stats(data.action_statistics(self.train_episodes), data.action_dim)
        self.frames = config.history + 1
        self.windows = data.windows(self.train_episodes, self.frames, config.action_block)
        try:
            held_out = data.windows(self.validation_episodes, self.frames, config.action_block)
            self.held_out = held_out[np.random.default_rng((seed, 1)).permutation(len(held_out))[:_VALIDATION]]
        except ValueError:  # every held-out episode is shorter than a window
            self.held_out = np.empty((0, 2), np.int64)
        self.starts = np.cumsum(data.lengths) - data.lengths
        self.actions = np.zeros((int(data.lengths.sum()), data.action_dim), np.float32)
        for episode, start in enumerate(self.starts):
            raw = data.actions(episode)
            self.actions[start : start + len(raw)] = (raw - self.stats["mean"]) / self.stats["std"]
        self.seconds = 0.0
        self.latents = self._all_latents()

    def train(self, progress: Callable[[int, int, dict[str, float]], None] | None) -> list[dict[str, Any]]:
        """All steps; rows of the log."""
        t, started = self.training, time.perf_counter()
        trained = [p for p in self.network.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=t.learning_rate, weight_decay=t.weight_decay)
        rng = np.random.default_rng((self.seed, 0))
        order, at = np.empty(0, np.int64), 0
        rows: list[dict[str, Any]] = []
        self.network.train()
        for step in range(t.steps):
            while len(order) - at < t.batch_size:  # windows of an epoch before any of the next
                order, at = np.concatenate([order[at:], rng.permutation(len(self.windows))]), 0
            batch, at = self.windows[order[at : at + t.batch_size]], at + t.batch_size
            for group in optimiser.param_groups:
                group["lr"] = self._learning_rate(step)
            loss = self._loss(*self._read(batch))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, t.clip)
            optimiser.step()
            done = step + 1
            if done % _LOG_EVERY == 0 or done in (1, t.steps):
                value, self.seconds = loss.item(), time.perf_counter() - started
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"at step {done} the loss is {value}: lower learning_rate (now {t.learning_rate:g})"
                    )
                row = {"step": done, "loss": value, "learning_rate": self._learning_rate(step)}
                rows.append({**row, "seconds": round(self.seconds, 3)})
            if progress:
                progress(done, t.steps, rows[-1])
        self.network.eval()
        return rows

    @torch.no_grad()
    def measured(self) -> dict[str, float]:
        """Held-out loss of the prediction, and of the guess that nothing changes; empty where nothing is held out."""
        if not len(self.held_out):
            return {}
        losses = []
        for i in range(0, len(self.held_out), self.training.batch_size):
            z, actions = self._read(self.held_out[i : i + self.training.batch_size])
            losses.append([len(z), self._loss(z, actions).item(), (z[:, 1:] - z[:, :-1]).square().mean().item()])
        counts, *means = np.array(losses).T
        names = ("validation_prediction", "validation_unchanged")
        return {name: float(np.average(v, weights=counts)) for name, v in zip(names, means, strict=True)}

    def _loss(self, z: Tensor, actions: Tensor) -> Tensor:
        """Of windows (B, history + 1, D) with blocks (B, history, A): of every frame after the first, from those
        before it."""
        return (self.network.predict(z[:, :-1], self.network.action_encoder(actions)) - z[:, 1:]).square().mean()

    def _learning_rate(self, step: int) -> float:
        t = self.training
        cosine = 0.5 * (1 + math.cos(math.pi * step / t.steps))
        return t.learning_rate * cosine * min(1.0, (step + 1) / max(1, t.warmup))

    def _read(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Latents (B, T, D) and normalised blocks (B, T - 1, A) of windows (B, 2) of episode and first row."""
        block = self.config.action_block
        first = self.starts[windows[:, 0]] + windows[:, 1]
        done = self.actions[first[:, None] + np.arange((self.frames - 1) * block)]
        actions = torch.from_numpy(done.reshape(len(windows), self.frames - 1, -1)).to(self.device)
        if self.latents is not None:
            kept = self.latents[first[:, None] + block * np.arange(self.frames)]
            return torch.from_numpy(kept).to(self.device).float(), actions
        frames, _ = self.data.batch(windows, self.frames, block)
        return self._encoded(frames.reshape(-1, *frames.shape[2:])).unflatten(0, frames.shape[:2]), actions

    def _all_latents(self) -> np.ndarray | None:
        """(frames, D) float16 of all frames; None where they would take too much memory."""
        size = 2 * len(self.actions) * self.config.embed_dim
        if size > _CACHE:
            return None
        check_fits(size, "the latents of all frames", "lower encoder_size or encoder_dim")
        kept = np.empty((len(self.actions), self.config.embed_dim), np.float16)
        for episode, start in enumerate(self.starts):
            frames = self.data.frames(episode)
            kept[start : start + len(frames)] = self._encoded(frames).cpu().numpy()
        return kept

    @torch.no_grad()
    def _encoded(self, frames: np.ndarray) -> Tensor:
        """(n, D) float32 latents of frames (n, H, H, 3)."""
        pictures = torch.from_numpy(fitted(frames, self.config.image_size, "data"))
        return torch.cat([self.network.encode(part.to(self.device)) for part in pictures.split(_FRAMES)])
