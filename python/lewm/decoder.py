"""The diagnostic decoder: paints a picture from one latent, so that people can see what a model imagines.

It is trained on latents that are there already. Nothing flows back into the model, no plan uses it, and what it cannot
paint the latent may still hold: it shows what is in a latent, not what is missing (paper section 4.2 and appendix; its
input is the embedding after the projector).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lewm import latents, pixels
from lewm.checks import integer
from lewm.data import Dataset
from lewm.memory import check_fits
from lewm.model import Model
from lewm.model_file import brief, check_shapes, check_values, read_tensors, write_tensors
from lewm.network import _sincos_2d

FORMAT_VERSION = 1
# Frames that it learns from, at most: as many are held in memory, within as many bytes.
FRAMES, BYTES = 10_000, 2**30
STEPS, BATCH, LEARNING_RATE, WARMUP = 3000, 32, 2e-3, 50
HIDDEN, LAYERS = 96, 3
_SIZES = {"embed_dim": 65536, "image_size": 4096, "hidden": 65536, "layers": 256}
_AT_ONCE = 256  # pictures painted together
_SHOWN_EVERY = 20  # steps between losses in a progress bar


def patch_side(image_size: int) -> int:
    """Side of the patches that a picture is painted in: the paper's 16 at 224 pixels, 8 at 64.

    The largest divisor of `image_size` up to 16 that leaves at least 8 x 8 patches; 1 for pictures below 16 pixels.
    """
    fitting = (side for side in range(16, 0, -1) if image_size % side == 0 and image_size // side >= 8)
    return next(fitting, 1)


class _Layer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.value = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        x = x + self.value(latent)
        return x + self.mlp(self.norm(x))


class DecoderNetwork(nn.Module):
    """Latents (N, D) -> pictures (N, S, S, 3), normalised as the encoder's (paper, appendix on the decoder).

    Learnt queries, one for each patch, attend to one token, the latent brought to `hidden`. The softmax over a single
    key is 1 whatever query and key are, so a cross-attention layer is exactly its value projection, the same for all
    queries, and is written as that; the product of value and output projection is one matrix. Query and latent meet in
    the residual MLPs.

    It starts where it learns fast: queries are sin-cos positions, and `mean`, which is added to what the patches say,
    the mean picture of the data. (With random queries and none, small things that move take many times the steps.)
    """

    def __init__(self, embed_dim: int, image_size: int, hidden: int = HIDDEN, layers: int = LAYERS) -> None:
        super().__init__()
        self.patch = patch_side(image_size)
        self.side = image_size // self.patch
        self.latent = nn.Linear(embed_dim, hidden)
        self.queries = nn.Parameter(math.sqrt(2) * _sincos_2d(self.side, hidden))
        self.layers = nn.ModuleList(_Layer(hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.patches = nn.Linear(hidden, 3 * self.patch**2)
        self.mean = nn.Parameter(torch.zeros(image_size, image_size, 3))

    @torch.no_grad()
    def start_at(self, z: Tensor, mean: Tensor) -> None:
        """Starts at `mean`, a normalised picture (S, S, 3), with latents such as `z` (N, D) taken at unit scale."""
        scale = 1 / z.std(0, correction=0).clamp(min=1e-6)
        self.latent.weight *= scale
        self.latent.bias -= self.latent.weight @ z.mean(0)
        self.mean.copy_(mean)
        nn.init.zeros_(self.patches.weight)
        nn.init.zeros_(self.patches.bias)

    def forward(self, z: Tensor) -> Tensor:
        latent = self.latent(z)[:, None]  # (N, 1, hidden)
        x = self.queries.expand(len(z), -1, -1)
        for layer in self.layers:
            x = layer(x, latent)
        patches = self.patches(self.norm(x)).unflatten(2, (self.patch, self.patch, 3))
        grid = patches.unflatten(1, (self.side, self.side)).transpose(2, 3)  # (N, side, patch, side, patch, 3)
        return grid.reshape(len(z), *self.mean.shape) + self.mean


class Decoder:
    """A trained decoder of one model. Make one with `lewm.train_decoder` or `lewm.load_decoder`.

    Attributes:
        network: The torch module.
        sizes: Its embed_dim, image_size, hidden and layers.
        model: Hash of the model whose latents it reads.
        meta: `data`, with the fingerprint of the store it learnt from, and `training`: seed, steps, frames,
            validation_episodes, and on frames of these `mse` (of normalised pixels), `psnr` (dB, of pixels of 8 bits)
            and `psnr_mean`, that of the mean training picture: a decoder that is no better reads nothing.
    """

    def __init__(self, network: DecoderNetwork, sizes: dict[str, int], model: str, meta: dict[str, Any]) -> None:
        self.network, self.sizes, self.model, self.meta = network.eval(), sizes, model, meta

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Pictures of latents: (..., D) -> (..., S, S, 3) uint8 RGB.

        Raises:
            ValueError: The latents are of another width, or not finite.
        """
        z = np.asarray(z, np.float32)
        width, side = self.sizes["embed_dim"], self.sizes["image_size"]
        if z.ndim < 1 or z.shape[-1] != width:
            raise ValueError(f"z must be latents (..., {width}), got shape {z.shape}")
        if not np.isfinite(z).all():
            raise ValueError("z must be finite, got NaN or infinity")
        device = self.network.queries.device
        rows, pictures = z.reshape(-1, width), np.empty((z.size // width, side, side, 3), np.uint8)
        with torch.no_grad():
            for i in range(0, len(rows), _AT_ONCE):
                painted = self.network(torch.from_numpy(rows[i : i + _AT_ONCE]).to(device))
                pictures[i : i + _AT_ONCE] = _as_bytes(painted).cpu().numpy()
        return pictures.reshape(*z.shape[:-1], side, side, 3)

    def __repr__(self) -> str:
        training = self.meta["training"]
        return (
            f"<lewm.Decoder of model {self.model[:12]}: held-out frames at {training['psnr']:.1f} dB, "
            f"{training['psnr_mean']:.1f} dB for their mean>"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the decoder, `.safetensors`; it is complete or absent.

        Raises:
            ValueError: `path` has another suffix.
        """
        header = {"format_version": FORMAT_VERSION, "kind": "decoder", "sizes": self.sizes, "model": self.model}
        weights = {name: value.cpu().numpy() for name, value in self.network.state_dict().items()}
        write_tensors(_checked_path(path), weights, {**header, **self.meta})


def load_decoder(path: str | os.PathLike[str], model: Model) -> Decoder:
    """Reads a decoder of `model`; nothing in the file is executed.

    Args:
        path: A `.safetensors` file that `Decoder.save` or `lewm.train_decoder` wrote.
        model: The model whose latents it is to read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a decoder, a damaged one, or one of another model.
    """
    tensors, header = read_tensors(path, "decoder")
    try:
        if header.get("kind") != "decoder" or header.get("format_version") != FORMAT_VERSION:
            kind, version = header.get("kind", "model"), header.get("format_version")
            raise ValueError(f"it is a {kind!r} of format version {version!r}, want a decoder of {FORMAT_VERSION}")
        sizes, meta = _checked_sizes(header.get("sizes")), _checked_meta(header)
        # Shapes first: what is allocated is then no larger than what the file holds.
        with torch.device("meta"):
            network = DecoderNetwork(**sizes)
        check_shapes({k: tuple(v.shape) for k, v in network.state_dict().items()}, tensors, "weights do not fit")
        check_values(tensors)
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"decoder: {path} is not a decoder that this release reads ({brief(error)})") from None
    if header.get("model") != model.hash():
        raise ValueError(
            f"decoder: {path} is of another model ({str(header.get('model'))[:12]}, this is {model.hash()[:12]}): "
            "train one of this model, or delete it"
        )
    weights = {name: torch.from_numpy(value.astype(np.float32)) for name, value in tensors.items()}
    network.load_state_dict(weights, assign=True)
    return Decoder(network.requires_grad_(False), sizes, header["model"], meta)


def _checked_sizes(sizes: Any) -> dict[str, int]:
    if not isinstance(sizes, dict) or sizes.keys() != _SIZES.keys():
        raise ValueError(f"its sizes must be {', '.join(_SIZES)}, got {sizes!r}")
    for name, most in _SIZES.items():
        if isinstance(sizes[name], bool):
            raise ValueError(f"{name} must be an integer, got {sizes[name]}")
        integer(name, sizes[name], 1, most + 1)
    return sizes


def _checked_meta(header: dict[str, Any]) -> dict[str, Any]:
    data, training = header.get("data"), header.get("training")
    if not isinstance(data, dict) or not isinstance(training, dict):
        raise ValueError("its data and training must be objects")
    for name in ("psnr", "psnr_mean"):
        if not isinstance(training.get(name), float | int):
            raise ValueError(f"its {name} must be a number, got {training.get(name)!r}")
    episodes = training.get("validation_episodes")
    if not isinstance(episodes, list) or not all(type(episode) is int for episode in episodes):
        raise ValueError("its validation_episodes must be a list of integers")
    return {"data": data, "training": training}


def train_decoder(
    model: Model,
    data: Dataset | str | os.PathLike[str],
    *,
    steps: int | None = None,
    frames: int = FRAMES,
    hidden: int = HIDDEN,
    layers: int = LAYERS,
    seed: int = 0,
    device: str | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, str], object] | None = None,
) -> Decoder:
    """Trains a decoder on the latents of a model, which stays as it is (paper, appendix on the decoder).

    The loss is the mean squared error of normalised pixels. Frames are drawn from the episodes that the model learnt
    from; if it learnt from other data, a tenth of the episodes is held out here. They are encoded once and kept in
    memory, so a step costs the decoder alone. On one device the result is a function of model, data, settings and seed.

    Args:
        model: Whose latents are painted.
        data: A store of pictures as the model's, or its path.
        steps: Optimiser steps, of 32 frames each; 3000 when not given.
        frames: How many different frames to learn from at most; they are held in 1 GiB at most.
        hidden: Width of a query.
        layers: Cross-attention layers.
        seed: Of everything random.
        device: A torch device; CUDA where there is one, else the CPU, when not given.
        out: File to write, `NAME.safetensors`; for `lewm imagine` it is `decoder.safetensors` beside the model.
        progress: Called with the step, how many there are, and the loss in words.

    Raises:
        TypeError: A setting is not an integer.
        ValueError: A setting is out of range, there are fewer than 2 episodes, or all frames are alike.
        FloatingPointError: The loss is not finite.
    """
    if out is not None:
        _checked_path(out)
    data = data if isinstance(data, Dataset) else Dataset(data)
    steps = integer("steps", STEPS if steps is None else steps, 1)
    integer("frames", frames, 1)
    integer("seed", seed, 0, 2**63)
    c = model.config
    sizes = _checked_sizes({"embed_dim": c.embed_dim, "image_size": c.image_size, "hidden": hidden, "layers": layers})
    held = latents.held_out(model, data)
    learnt = np.setdiff1d(np.arange(len(data)), held)
    if not len(learnt):
        learnt, held = data.split(0.1, seed)
    size = 3 * c.image_size**2
    most = max(1, min(frames, BYTES // size))
    check_fits(size * most, f"a decoder's {most} frames", "give fewer frames")
    pictures, z = _drawn(model, data, learnt, most, seed)
    if (pictures == pictures[0]).all():
        raise ValueError(f"data must hold frames that differ, got {len(pictures)} equal ones from {data.path}")

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = DecoderNetwork(**sizes)
    mean = pictures.mean(0, dtype=np.float64)
    network.start_at(torch.from_numpy(z), _normalised(torch.from_numpy(mean)))
    network.to(where)
    known, targets = torch.from_numpy(z).to(where), torch.from_numpy(pictures).to(where)
    _fit(network, known, targets, steps, np.random.default_rng((seed, 1)), progress)

    held_pictures, held_z = _drawn(model, data, held, min(most, 2000), seed)
    decoder = Decoder(network.requires_grad_(False), sizes, model.hash(), {})
    painted = decoder(held_z)
    scale = 255 * np.asarray(pixels.STD)
    error = (painted.astype(np.float64) - held_pictures) / scale
    decoder.meta = {
        "data": {"fingerprint": data.fingerprint()},
        "training": {
            "seed": seed,
            "steps": steps,
            "frames": len(pictures),
            "validation_episodes": held.tolist(),
            "mse": float(np.square(error).mean()),
            "psnr": psnr(painted, held_pictures),
            "psnr_mean": psnr(np.broadcast_to(mean, held_pictures.shape), held_pictures),
        },
    }
    if out is not None:
        decoder.save(out)
    return decoder


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of pictures of 8 bits, in dB; 100 of equal ones."""
    error = float(np.square(np.asarray(a, np.float64) - b).mean())
    return 10 * math.log10(255**2 / max(error, 255**2 * 1e-10))


def _checked_path(path: str | os.PathLike[str]) -> Path:
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {os.fspath(path)!r}")
    return Path(path)


def _drawn(model: Model, data: Dataset, episodes: np.ndarray, frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random frames of these episodes as the model takes them, (N, S, S, 3) uint8, and their latents (N, D) float32."""
    rng = np.random.default_rng((seed, 0))
    each, taken, z, count = -(-frames // len(episodes)), [], [], 0
    for episode in map(int, rng.permutation(episodes)):
        length = int(data.lengths[episode])
        index = np.sort(rng.choice(length, min(length, each, frames - count), replace=False))
        taken.append(pixels.fitted(data.frames(episode, index), model.config.image_size, "data"))
        z.append(np.asarray(model.encode(taken[-1]), np.float32))
        count += len(index)
        if count >= frames:
            break
    return np.concatenate(taken), np.concatenate(z)


def _normalised(frames: Tensor) -> Tensor:
    mean, std = (frames.new_tensor(values, dtype=torch.float32) for values in (pixels.MEAN, pixels.STD))
    return (frames.float() / 255 - mean) / std


def _as_bytes(pictures: Tensor) -> Tensor:
    """Undoes `_normalised`."""
    mean, std = (pictures.new_tensor(values) for values in (pixels.MEAN, pixels.STD))
    return (255 * (pictures * std + mean)).round().clamp(0, 255).to(torch.uint8)


def _fit(
    network: DecoderNetwork,
    z: Tensor,
    pictures: Tensor,
    steps: int,
    rng: np.random.Generator,
    progress: Callable[[int, int, str], object] | None,
) -> None:
    """AdamW with a short warm-up and a cosine to zero."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * cosine * min(1.0, (step + 1) / WARMUP)
        batch = torch.from_numpy(rng.integers(0, len(z), BATCH)).to(z.device)
        loss = (network(z[batch]) - _normalised(pictures[batch])).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if (step + 1) % _SHOWN_EVERY == 0 or step + 1 == steps:
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"at step {step + 1} the decoder's loss is {value}")
            if progress is not None:
                progress(step + 1, steps, f"mse {value:.4f}")
