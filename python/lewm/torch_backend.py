"""The `torch` back end: the network on any device torch has, behind the array interface of `lewm.Model`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lewm.config import ModelConfig
from lewm.model_file import check_weights
from lewm.network import LeWM

_PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# Rows of candidates per pass: enough to fill two cores or a GPU, small enough to stay in cache on the former.
_ROWS = {"cpu": 4096, "cuda": 65536}
_FRAMES = 256


class TorchBackend:
    """Weights on a device, and the four things planning asks of them.

    `bfloat16` computes matrix products in bfloat16 under autocast and everything else in float32.
    """

    name = "torch"

    def __init__(self, config: ModelConfig, weights: dict[str, Any], precision: str, device: str | None) -> None:
        if precision not in ("auto", *_PRECISIONS):
            known = ", ".join(_PRECISIONS)
            raise ValueError(f"precision must be auto or one of {known} on the torch back end, got {precision!r}")
        self.precision = "float32" if precision == "auto" else precision
        self.device = device_of(device)
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        check_weights(config, weights)
        with torch.device("meta"):
            self.network = LeWM(config)
        self.network = self.network.to_empty(device=self.device).to(self.dtype)
        self.network.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()}, strict=True)
        self.network.eval().requires_grad_(False)

    def weights(self) -> dict[str, np.ndarray]:
        """The state dict, float32, in NumPy."""
        return {
            name: (value.float() if value.is_floating_point() else value).cpu().numpy()
            for name, value in self.network.state_dict().items()
        }

    def tensor(self, values: Any) -> Tensor:
        """`values` on this device in this precision's storage type; uint8 stays uint8."""
        values = as_tensor(values).to(self.device)
        return values if values.dtype == torch.uint8 else values.to(self.dtype)

    @torch.no_grad()
    def encode(self, frames: Any) -> Tensor:
        """(..., size, size, 3) uint8 -> (..., D)."""
        frames = as_tensor(frames)
        flat = frames.reshape(-1, *frames.shape[-3:])
        with self._autocast():
            z = torch.cat([self.network.encode(part.to(self.device)) for part in flat.split(_FRAMES)])
        return z.to(self.dtype).reshape(*frames.shape[:-3], -1)

    @torch.no_grad()
    def rollout(self, z: Any, candidates: Any, past_actions: Any | None) -> Tensor:
        """(E, T, D), (E, S, H, A), (E, T - 1, A) -> (E, S, T + H, D)."""
        z, candidates = self.tensor(z), self.tensor(candidates)
        return torch.cat(list(self._rollouts(z, candidates, past_actions))).unflatten(0, candidates.shape[:2])

    @torch.no_grad()
    def costs(self, z: Any, goal: Any, candidates: Any, past_actions: Any | None, cost: str = "latent") -> Tensor:
        """Terminal costs (E, S) of candidates, without keeping the trajectories; `cost` is "latent" or "distance"."""
        z, candidates, goal = self.tensor(z), self.tensor(candidates), self.tensor(goal)
        goals = goal.repeat_interleave(candidates.shape[1], 0)
        costs, done = [], 0
        for part in self._rollouts(z, candidates, past_actions):
            last = part[:, -1]
            target = goals[done : done + len(last)]
            costs.append(
                self.network.distance(last, target) if cost == "distance" else (last - target).square().sum(-1)
            )
            done += len(last)
        return torch.cat(costs).unflatten(0, candidates.shape[:2])

    @torch.no_grad()
    def distance(self, z: Any, goal: Any) -> Tensor:
        """The distance head's estimates (...) for latents (..., D) and goals that broadcast to them."""
        return self.network.distance(self.tensor(z), self.tensor(goal))

    @torch.no_grad()
    def prior(self, z: Any, goal: Any) -> Tensor:
        """The action prior's blocks (E, P, A), normalised, for latents and goals (E, D)."""
        return self.network.prior(self.tensor(z), self.tensor(goal))

    def _rollouts(self, z: Tensor, candidates: Tensor, past_actions: Any | None) -> Any:
        environments, samples = candidates.shape[:2]
        flat = candidates.flatten(0, 1)
        owner = torch.arange(environments, device=self.device).repeat_interleave(samples)
        past = None if past_actions is None else self.tensor(past_actions)
        rows = _ROWS.get(self.device.type, 4096)
        for i in range(0, len(flat), rows):
            whose = owner[i : i + rows]
            with self._autocast():
                out = self.network.rollout(z[whose], flat[i : i + rows], None if past is None else past[whose])
            yield out.to(self.dtype)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def device_of(name: str | None) -> torch.device:
    """The torch device of that name; when None, CUDA where there is one, else the CPU.

    Raises:
        ValueError: There is no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ValueError(f"device must be one that torch has here, got {name!r}: {error}") from None
    return device


def as_tensor(values: Any) -> Tensor:
    """A tensor over an array's memory where torch can take it, else of a copy."""
    # A flipped view (BGR to RGB) has strides that torch does not take, and a read-only array makes it warn.
    return values if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements=("C", "W")))
