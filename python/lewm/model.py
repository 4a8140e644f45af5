"""`lewm.Model`: a world model behind one array interface, whatever runs it; and `lewm.load`, `lewm.use`."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lewm import checkpoints, onnx_graphs, pixels
from lewm.config import PRESETS, ModelConfig, configure
from lewm.model_file import STATS, checked_stats, current_names, write_model


class Model:
    """A LeWorldModel ready to encode, imagine and plan. Make one with `lewm.load`, `lewm.train` or `from_state_dict`.

    Every method takes NumPy arrays and gives NumPy arrays; given a torch tensor it gives a tensor
    on that tensor's device.
    Action blocks (width A = `config.block_dim`) are normalised: (raw - mean) / std of the training data.

    Attributes:
        config: The architecture.
        stats: A dict of mean, std, low, high per raw action dimension, float64 in raw units; None: it cannot plan.
        meta: The rest of the model file's header: preset, planner, data, training.
        backend: What runs it.
        precision: What it computes in.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Any],
        *,
        stats: dict[str, Any] | None = None,
        meta: dict[str, Any] | None = None,
        backend: str = "auto",
        precision: str = "auto",
        device: str | None = None,
    ) -> None:
        self.config = config
        self.stats = None if stats is None else checked_stats(stats, config.action_dim)
        self.meta = dict(meta or {})
        self._engine = _engine(config, weights, backend, precision, device)

    @classmethod
    def from_state_dict(
        cls,
        weights: dict[str, Any],
        *,
        preset: str = "paper",
        stats: Any = None,
        backend: str = "auto",
        precision: str = "auto",
        device: str | None = None,
        **overrides: Any,
    ) -> Model:
        """A model from official weights.

        Args:
            weights: State dict under the official key names (transformers 4 or 5), arrays or tensors.
            preset: The architecture; the action width is read off the weights.
            stats: Needed to plan: a dict of mean, std, low and high per raw action dimension in raw units, a
                `lewm.Dataset`, or the path of a store.
            backend, precision, device: See `lewm.load`.
            **overrides: Fields of `ModelConfig` that differ from the preset.

        Raises:
            ValueError: Keys or shapes that do not fit the architecture, listed by group.
        """
        weights = current_names(weights)
        key = "action_encoder.patch_embed.weight"
        if key not in weights:
            raise ValueError(
                f"weights lack {key}: want the state dict of a LeWorldModel, got {len(weights)} other tensors"
            )
        block = overrides.get("action_block", configure(preset, 1, {})[0].action_block)
        config, _ = configure(preset, max(1, weights[key].shape[1] // block), overrides)
        meta = {"preset": preset, "planner": PRESETS[preset].planner}
        return cls(
            config, weights, stats=_statistics(stats), meta=meta, backend=backend, precision=precision, device=device
        )

    @property
    def backend(self) -> str:
        """The back end that runs this model."""
        return self._engine.name

    @property
    def precision(self) -> str:
        """The precision it computes in."""
        return self._engine.precision

    @property
    def network(self) -> Any:
        """The torch module; only `backend="torch"` has one."""
        if self.backend != "torch":
            raise AttributeError(
                f'a model on backend {self.backend!r} has no torch module: load it with backend="torch"'
            )
        return self._engine.network

    def encode(self, frames: Any, *, name: str = "frames") -> Any:
        """Latents of frames.

        Args:
            frames: (..., H, W, 3) uint8 RGB, square; another size than the model's is area-resized.
            name: What error messages call it.

        Returns:
            (..., D) float32.

        Raises:
            ValueError: Frames of another kind or shape, naming what they are and what is wanted.
        """
        pictures = pixels.fitted(pixels.checked(frames, name), self.config.image_size, name)
        return self._give(self._engine.encode(pictures), frames)

    def rollout(self, z: Any, candidates: Any, past_actions: Any = None) -> Any:
        """Imagined latents of every candidate.

        Args:
            z: Latents of the observed frames, oldest first, (E, T, D).
            candidates: Normalised action blocks, (E, S, H, A).
            past_actions: Normalised blocks between the observed frames, (E, T - 1, A); None when T is 1.

        Returns:
            (E, S, T + H, D): observed, then imagined.
        """
        self._check_rollout(z, candidates, past_actions)
        return self._give(self._engine.rollout(z, candidates, past_actions), z, candidates)

    def cost(self, zs: Any, goal: Any, cost: str | None = None) -> Any:
        """How far the last latent is from the goal.

        Args:
            zs: Trajectories, (E, S, T, D).
            goal: Latents, (E, D).
            cost: "latent", the squared distance, summed over D (paper section 3.3); "distance", the blocks that the
                model's distance head estimates (`lewm.heads`). By default the latter if the model has that head.

        Returns:
            (E, S).
        """
        if len(np.shape(zs)) != 4 or np.shape(goal) != (np.shape(zs)[0], np.shape(zs)[-1]):
            raise ValueError(f"want zs (E, S, T, D) and goal (E, D), got {np.shape(zs)} and {np.shape(goal)}")
        if self.cost_of(cost) == "distance":
            return self._give(self._engine.distance(zs[:, :, -1], goal[:, None]), zs)
        distance = zs[:, :, -1] - goal[:, None]
        return (distance * distance).sum(-1)

    def cost_of(self, cost: str | None) -> str:
        """What `cost=` means for this model: "latent" or "distance".

        Raises:
            ValueError: It is neither, or the model has no distance head.
        """
        has = self.config.distance_head
        if cost not in (None, "latent", "distance"):
            raise ValueError(f'cost must be "latent", "distance" or None, got {cost!r}')
        if cost == "distance" and not has:
            raise ValueError('cost is "distance", but the model has no distance head: train it with distance_head=True')
        return cost or ("distance" if has else "latent")

    def costs(self, z: Any, goal: Any, candidates: Any, past_actions: Any = None, cost: str | None = None) -> Any:
        """`cost(rollout(z, candidates, past_actions), goal, cost)` without keeping the trajectories, for planners."""
        self._check_rollout(z, candidates, past_actions)
        if np.shape(goal) != (np.shape(z)[0], self.config.embed_dim):
            raise ValueError(f"goal must be ({np.shape(z)[0]}, {self.config.embed_dim}), got {np.shape(goal)}")
        return self._give(self._engine.costs(z, goal, candidates, past_actions, self.cost_of(cost)), z, candidates)

    def objective(
        self, z: np.ndarray, goal: np.ndarray, past_actions: np.ndarray | None = None, cost: str | None = None
    ) -> Any:
        """What a planner scores candidates (E, S, H, A) with: `costs` with all but the candidates given.

        On "cpu" it is an object that the Rust planner drives without returning to Python, on "cuda" one that can search
        by itself (`solve`).
        """
        if hasattr(self._engine, "objective"):
            return self._engine.objective(z, goal, past_actions, self.cost_of(cost))
        return lambda candidates: self.costs(z, goal, candidates, past_actions, cost)

    def prior(self, z: Any, goal: Any) -> Any:
        """The actions that the model's action prior guesses (`lewm.heads`); what a search starts from.

        Args:
            z, goal: Latents of now and of the goal, (E, D).

        Returns:
            (E, P, A) normalised blocks, P being `config.prior_blocks`.

        Raises:
            ValueError: The model has no action prior, or a shape is not as described.
        """
        if not self.config.action_prior:
            raise ValueError("the model has no action prior: train it with action_prior=True")
        want = (len(z), self.config.embed_dim)
        if np.shape(z) != want or np.shape(goal) != want:
            raise ValueError(f"want z and goal (E, {want[1]}), got {np.shape(z)} and {np.shape(goal)}")
        return self._give(self._engine.prior(z, goal), z)

    def normalise(self, raw: Any) -> np.ndarray:
        """Raw actions (..., n * action_dim) -> normalised blocks of the same shape, float64."""
        stats, n = self._tiled_stats(raw, "raw")
        return (np.asarray(raw, np.float64) - np.tile(stats["mean"], n)) / np.tile(stats["std"], n)

    def denormalise(self, blocks: Any) -> np.ndarray:
        """Normalised blocks (..., n * action_dim) -> raw actions of the same shape, float64."""
        stats, n = self._tiled_stats(blocks, "blocks")
        return np.asarray(blocks, np.float64) * np.tile(stats["std"], n) + np.tile(stats["mean"], n)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The raw action bounds as bounds of a normalised block: low (A,), high (A,)."""
        stats = self.require_stats()
        block = self.config.action_block
        return self.normalise(np.tile(stats["low"], block)), self.normalise(np.tile(stats["high"], block))

    def require_stats(self) -> dict[str, np.ndarray]:
        """`stats`, or an error that says how to give them."""
        if self.stats is None:
            raise ValueError(
                "model has no action statistics, so its actions have no units (official checkpoints carry none): give "
                "stats=dict(mean=..., std=..., low=..., high=...), each of length "
                f"{self.config.action_dim} in raw units, or the data it learnt from, when loading it"
            )
        return self.stats

    def hash(self) -> str:
        """SHA-256 of the weights (names, shapes, float32 values), hexadecimal."""
        digest = hashlib.sha256()
        for name, value in sorted(self._engine.weights().items()):
            digest.update(f"{name} {value.dtype} {value.shape};".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model file, `.safetensors`; it is complete or absent.

        Raises:
            ValueError: `path` has another suffix.
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"path must end in .safetensors, got {os.fspath(path)!r}")
        write_model(path, self._engine.weights(), self.config, self.stats, self.meta)

    def export(self, form: str, path: str | os.PathLike[str], *, transformers: int = 5) -> None:
        """Writes this model for other programs.

        Args:
            form: "official": a folder of `weights.pt` and `config.json`, for stable-worldmodel's `load_pretrained` and
                for le-wm. Action statistics are not in it: that code takes them from the data again. "onnx": a new
                folder of `encoder.onnx`, `predictor.onnx` and `model.json`, see `lewm.onnx_graphs`.
            path: Where.
            transformers: For "official": 4 or 5, the major release of transformers that is to load it, which named the
                tensors of the ViT anew.

        Raises:
            ValueError: There is no such form, or it cannot hold this model.
            FileExistsError: An ONNX model is to be written where there is something.
            ModuleNotFoundError: What writes it is not installed.
        """
        if form not in ("official", "onnx"):
            raise ValueError(f'form must be "official" or "onnx", got {form!r}')
        if form == "onnx":
            onnx_graphs.write(path, self._engine.weights(), self.config, self.stats, self.meta)
        else:
            checkpoints.write(path, self._engine.weights(), self.config, transformers)

    def describe(self) -> str:
        """Units, bounds and origin in a few lines, to be read by a person."""
        c = self.config
        seen = f"prefixes of up to {c.prefix_blocks} blocks" if c.action_prefix else f"history {c.history}"
        lines = [
            f"LeWorldModel, preset {self.meta.get('preset', '?')}: {c.image_size}x{c.image_size} RGB -> "
            f"{c.embed_dim}-d, {seen}, blocks of {c.action_block} actions of width {c.action_dim}",
            f"runs on {self.backend} in {self.precision}; weights {self.hash()[:12]}",
        ]
        if self.stats is None:
            lines.append("no action statistics: it cannot plan")
        else:
            rows = zip(*(self.stats[k] for k in STATS), strict=True)
            lines += [
                f"action {i}: raw bounds [{low:g}, {high:g}], data mean {mean:.4g}, std {std:.4g}"
                for i, (mean, std, low, high) in enumerate(rows)
            ]
        data = self.meta.get("data") or {}
        if data:
            lines.append(
                f"learnt from {data.get('env_id', 'own data')}, fingerprint {str(data.get('fingerprint'))[:12]}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<lewm.Model {self.meta.get('preset', 'custom')}, {self.backend} {self.precision}>"

    def _tiled_stats(self, values: Any, name: str) -> tuple[dict[str, np.ndarray], int]:
        stats, dim = self.require_stats(), self.config.action_dim
        width = np.shape(values)[-1] if np.ndim(values) else 0
        if width == 0 or width % dim:
            raise ValueError(
                f"{name} must have a last axis of whole actions of width {dim}, got shape {np.shape(values)}"
            )
        return stats, width // dim

    def _check_rollout(self, z: Any, candidates: Any, past_actions: Any) -> None:
        zs, cs = np.shape(z), np.shape(candidates)
        dim, width = self.config.embed_dim, self.config.block_dim
        if len(zs) != 3 or zs[2] != dim or zs[1] < 1:
            raise ValueError(f"z must be (E, T, {dim}), got {zs}")
        if len(cs) != 4 or cs[0] != zs[0] or cs[3] != width or 0 in cs:
            raise ValueError(f"candidates must be ({zs[0]}, S, H, {width}), got {cs}")
        want = (zs[0], zs[1] - 1, width)
        if zs[1] > 1 and past_actions is None:
            raise ValueError(f"past_actions must be {want} when z holds {zs[1]} frames, got None")
        if past_actions is not None and np.shape(past_actions) != want:
            raise ValueError(f"past_actions must be {want}, got {np.shape(past_actions)}")

    @staticmethod
    def _give(result: Any, *inputs: Any) -> Any:
        for value in inputs:
            if hasattr(value, "new_tensor"):
                return sys.modules["torch"].as_tensor(result, device=value.device)
        return result if isinstance(result, np.ndarray) else result.cpu().numpy()


def _engine(config: ModelConfig, weights: dict[str, Any], backend: str, precision: str, device: str | None) -> Any:
    """What runs a model."""
    if backend not in ("auto", "cpu", "cuda", "torch", "onnx"):
        raise ValueError(f'backend must be "auto", "cpu", "cuda", "torch" or "onnx", got {backend!r}')
    if backend == "cpu" and device is not None:
        raise ValueError(
            f'device is for the backends "cuda", "torch" and "onnx"; backend "cpu" runs on this processor, got '
            f"{device!r}"
        )
    if backend == "auto":
        backend = _best(config, precision, device)
    if backend == "cpu":
        from lewm.cpu_backend import CpuBackend

        return CpuBackend(config, weights, precision)
    try:
        if backend == "onnx":
            from lewm.onnx_backend import OnnxBackend

            return OnnxBackend(config, weights, precision, device)
        if backend == "cuda":
            from lewm.cuda_backend import CudaBackend

            return CudaBackend(config, weights, precision, device)
        from lewm.torch_backend import TorchBackend
    except ModuleNotFoundError as error:
        extra = "onnx" if backend == "onnx" else "train"
        raise ModuleNotFoundError(
            f'backend "{backend}" needs {error.name}: pip install "lewm-fast[{extra}]"'
        ) from error
    return TorchBackend(config, weights, precision, device)


def _best(config: ModelConfig, precision: str, device: str | None) -> str:
    """The back end of "auto": cuda where torch sees a GPU that passes its check, else the CPU; torch for the rest."""
    on_gpu = device.startswith("cuda") if device is not None else _gpu()
    if precision == "float64" or (device is not None and not on_gpu):
        return "torch"
    if precision == "int8" or not on_gpu:
        return "cpu"
    if importlib.util.find_spec("triton") is None:
        return "torch"
    from lewm.cuda_backend import self_check, unusable

    return "cuda" if unusable(config, device) is None and self_check(device) else "torch"


def _gpu() -> bool:
    """Whether torch sees a CUDA device. torch is imported only where there is a driver: it takes seconds."""
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if not driver or importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def load(
    src: str | os.PathLike[str],
    *,
    stats: Any = None,
    revision: str | None = None,
    backend: str = "auto",
    precision: str = "auto",
    device: str | None = None,
) -> Model:
    """Reads a model; nothing in it is executed.

    Args:
        src: A `.safetensors` file that lewm wrote, which holds all that planning needs; an official checkpoint
            (`weights.pt`, `*_weight.ckpt`; needs torch), which lacks action statistics; a folder with one of them, a
            run's for example; the folder of an ONNX model that lewm wrote (needs the extra `onnx`); or a repository of
            the Hugging Face Hub, "owner/name", which is downloaded once, checked, and then taken from
            huggingface_hub's cache (needs the extra `data`).
        stats: Action statistics to use instead of the file's: a dict (see `Model`), a `lewm.Dataset`, or the path of a
            store. Official checkpoints need them to plan.
        revision: Branch, tag or commit of the repository.
        backend: "cpu" (the Rust engine), "cuda" (Triton kernels on a GPU), "torch" (PyTorch, the reference), "onnx"
            (onnxruntime), or "auto": cuda where torch sees a GPU that passes the check of
            `lewm.cuda_backend.self_check`, torch where it does not or where another device or float64 is asked for,
            else the CPU.
        precision: "float32"; "bfloat16"; "int8" with cpu; "tf32" with cuda; "float64" with torch; or "auto": on "cpu"
            the fastest of int8 (wide predictors only), bfloat16 and float32 that ranks candidates as float32 does; on
            "cuda" bfloat16 if it does, else float32; on "torch" and "onnx" float32.
        device: A torch device, for "cuda" and "torch"; CUDA where there is one, else the CPU, when not given. For
            "onnx" an execution provider of onnxruntime, as "CUDAExecutionProvider"; the CPU's when not given.

    Raises:
        FileNotFoundError: There is no such file, folder or repository.
        ConnectionError: The Hub cannot be reached, and its cache lacks the repository.
        ValueError: It is not a model, or a damaged one.
    """
    stats = _statistics(stats)
    action_dim = None if stats is None else len(np.atleast_1d(stats.get("mean", ())))
    weights, config, file_stats, meta = checkpoints.read(checkpoints.located(src, revision), action_dim or None)
    return Model(
        config,
        weights,
        stats=file_stats if stats is None else stats,
        meta=meta,
        backend=backend,
        precision=precision,
        device=device,
    )


def _statistics(stats: Any) -> Any:
    """What `stats=` stands for: a dict as it is, those of a data set or of a store at a path."""
    if stats is None or isinstance(stats, Mapping):
        return stats
    from lewm.data import Dataset

    if isinstance(stats, str | os.PathLike):
        stats = Dataset(stats)
    if not isinstance(stats, Dataset):
        raise ValueError(
            f"stats must be a dict of {', '.join(STATS)}, a lewm.Dataset or the path of a store, got {stats!r}"
        )
    return stats.action_statistics()


_current: Model | None = None


def use(model: Model | str | os.PathLike[str] | None) -> Model | None:
    """Makes `model` (or the model file at that path) the one that `lewm.plan` uses; None forgets it."""
    global _current
    _loaded.cache_clear()
    _current = model if model is None or isinstance(model, Model) else load(model)
    return _current


def current() -> Model:
    """The model set by `lewm.use`, or the one that `LEWM_MODEL` names.

    Raises:
        RuntimeError: Neither is set.
    """
    if _current is not None:
        return _current
    path = os.environ.get("LEWM_MODEL")
    if not path:
        raise RuntimeError("no model is set: pass model=, call lewm.use(model), or set LEWM_MODEL to a model file")
    return _loaded(path)


_loaded = functools.lru_cache(maxsize=1)(load)
