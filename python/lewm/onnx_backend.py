"""The `onnx` back end: onnxruntime behind the array interface of `lewm.Model`. torch is never imported."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from lewm.config import ModelConfig
from lewm.cpu_backend import to_numpy
from lewm.model_file import check_values, check_weights
from lewm.onnx_graphs import graphs

# Rows of candidates per call: their activations stay in cache, and what a call costs by itself does not count.
_ROWS = 1024
_FRAMES = 64
_CPU = "CPUExecutionProvider"


class OnnxBackend:
    """The graphs of `lewm.onnx_graphs` in onnxruntime, and the four things planning asks of them.

    `device` is the execution provider that runs them, as "CUDAExecutionProvider"; operators that it lacks run on the
    CPU. Threads are those of `LEWM_NUM_THREADS`, by default one per core.
    """

    name = "onnx"

    def __init__(self, config: ModelConfig, weights: dict[str, Any], precision: str, device: str | None) -> None:
        import onnxruntime

        if precision not in ("auto", "float32"):
            raise ValueError(f'precision must be auto or float32 with backend "onnx", got {precision!r}')
        known = onnxruntime.get_available_providers()
        if device is not None and device not in known:
            raise ValueError(
                f'device must be an execution provider of onnxruntime with backend "onnx", here one of '
                f"{', '.join(known)}; got {device!r}"
            )
        self.precision = "float32"
        self.device = device or _CPU
        self.config = config
        self._weights = {name: to_numpy(value) for name, value in weights.items()}
        check_weights(config, self._weights)
        check_values(self._weights)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = _threads()
        options.log_severity_level = 3
        self._sessions = {
            name: onnxruntime.InferenceSession(
                graph.SerializeToString(), options, providers=list(dict.fromkeys([self.device, _CPU]))
            )
            for name, graph in graphs(config, self._weights).items()
        }

    def weights(self) -> dict[str, np.ndarray]:
        """The state dict, float32, in NumPy."""
        return dict(self._weights)

    def encode(self, frames: Any) -> np.ndarray:
        """(..., size, size, 3) uint8 -> (..., D)."""
        frames = np.ascontiguousarray(to_numpy(frames))
        flat = frames.reshape(-1, *frames.shape[-3:])
        parts = [self._run("encoder", frames=flat[i : i + _FRAMES]) for i in range(0, len(flat), _FRAMES)]
        return np.concatenate(parts).reshape(*frames.shape[:-3], -1)

    def rollout(self, z: Any, candidates: Any, past_actions: Any | None) -> np.ndarray:
        """(E, T, D), (E, S, H, A), (E, T - 1, A) -> (E, S, T + H, D)."""
        environments, samples, horizon, _ = np.shape(candidates)
        z, candidates = _floats(z), _floats(candidates)
        observed = z.shape[1]
        out = np.empty((environments, samples, observed + horizon, self.config.embed_dim), np.float32)
        out[:, :, :observed] = z[:, None]
        flat = out.reshape(-1, *out.shape[2:])
        blocks = candidates.reshape(-1, *candidates.shape[2:])
        if past_actions is not None:
            past = np.repeat(_floats(past_actions), samples, axis=0)
            blocks = np.concatenate([past, blocks], axis=1)
        for i in range(0, len(flat), _ROWS):
            self._imagine(flat[i : i + _ROWS], blocks[i : i + _ROWS], observed)
        return out

    def _imagine(self, zs: np.ndarray, blocks: np.ndarray, observed: int) -> None:
        """Fills in what follows the observed latents of `zs` (N, T + H, D)."""
        if self.config.action_prefix:
            for start in range(0, blocks.shape[1], self.config.prefix_blocks):
                part = blocks[:, start : start + self.config.prefix_blocks]
                at = observed + start
                reached = self._run("predictor", latents=zs[:, at - 1 : at], blocks=part)
                zs[:, at : at + part.shape[1]] = reached
            return
        for t in range(observed, zs.shape[1]):
            window = slice(max(0, t - self.config.history), t)
            zs[:, t] = self._run("predictor", latents=zs[:, window], blocks=blocks[:, window])

    def costs(self, z: Any, goal: Any, candidates: Any, past_actions: Any | None, cost: str = "latent") -> np.ndarray:
        """Terminal costs (E, S) of candidates; `cost` is "latent" or "distance"."""
        last = self.rollout(z, candidates, past_actions)[:, :, -1]
        goals = _floats(goal)[:, None]
        return self.distance(last, goals) if cost == "distance" else np.square(last - goals).sum(axis=-1)

    def distance(self, z: Any, goal: Any) -> np.ndarray:
        """The distance head's estimates (...) for latents (..., D) and goals that broadcast to them."""
        return np.linalg.norm(self._embedded(z) - self._embedded(goal), axis=-1)

    def prior(self, z: Any, goal: Any) -> np.ndarray:
        """The action prior's blocks (E, P, A), normalised, for latents and goals (E, D)."""
        return self._run("action_prior", latents=_floats(z), goals=_floats(goal))

    def _embedded(self, z: Any) -> np.ndarray:
        z = _floats(z)
        return self._run("distance_head", latents=z.reshape(-1, z.shape[-1])).reshape(z.shape)

    def _run(self, graph: str, **inputs: np.ndarray) -> np.ndarray:
        return self._sessions[graph].run(None, {name: np.ascontiguousarray(x) for name, x in inputs.items()})[0]


def _threads() -> int:
    """`LEWM_NUM_THREADS`, 0 for onnxruntime's own choice."""
    text = os.environ.get("LEWM_NUM_THREADS", "0")
    if not text.strip().isdecimal() or int(text) > 1024 or (int(text) < 1 and "LEWM_NUM_THREADS" in os.environ):
        raise ValueError(f"LEWM_NUM_THREADS must be a number from 1 to 1024, got {text!r}")
    return int(text)


def _floats(value: Any) -> np.ndarray:
    return np.ascontiguousarray(to_numpy(value), dtype=np.float32)
