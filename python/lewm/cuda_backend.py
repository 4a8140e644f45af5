"""The `cuda` back end: rollout and planner in Triton, replayed as CUDA graphs, behind the array interface of a model.

Frames are encoded by the PyTorch network in float32. `self_check` says whether a GPU may be used at all.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from lewm import __version__, _core
from lewm.cache import remembered
from lewm.config import ModelConfig, configure
from lewm.cpu_backend import OVERLAP, SPEARMAN, agreement, to_numpy
from lewm.kernels.planner import CEM
from lewm.kernels.rollout import Distance, Rollout, Weights, captured, cost_launch, obstacle, on, pack
from lewm.network import LeWM
from lewm.torch_backend import TorchBackend, as_tensor, device_of

PRECISIONS = ("bfloat16", "tf32", "float32")
# Candidates that are rolled out at once: enough for any GPU, and 5 GB at preset paper.
ROWS = 1 << 15
# Models and planners of the check of a GPU: windows that grow, are full and slide; heads and hidden units in one share
# and in several; passes of prefixes, one program and two, then a shorter one.
_CHECKS: tuple[tuple[dict[str, Any], dict[str, int]], ...] = (
    ({"history": 3, "predictor_depth": 2}, {"samples": 40, "iterations": 2, "elites": 8, "horizon": 4}),
    (
        {"history": 1, "distance_head": True, "head_hidden": 48},
        {"samples": 24, "iterations": 2, "elites": 6, "horizon": 2},
    ),
    (
        {"history": 1, "action_prefix": True, "prefix_blocks": 4, "predictor_depth": 2},
        {"samples": 24, "iterations": 2, "elites": 6, "horizon": 5},
    ),
)
_KEPT = 4  # shapes whose memory and graphs are kept


class CudaBackend(TorchBackend):
    """The planner's costs and whole plans in Triton; weights, encoder and errors are those of the `torch` back end.

    `precision` is that of the rollout: "bfloat16" rounds the factors of matrix products and sums them in float32,
    "tf32" rounds them to 11 bits, "float32" to 22. "auto" is bfloat16 where the model ranks candidates in it as in
    float32 (`lewm.cpu_backend.agreement`), else float32.

    Attributes:
        loop: Where a `lewm.CEM` searches: on the "device", or on the "host", where the Rust loop sends candidates and
            gets costs in each iteration. Other planners search on the host.
    """

    name = "cuda"
    loop = "device"

    def __init__(self, config: ModelConfig, weights: dict[str, Any], precision: str, device: str | None) -> None:
        if precision not in ("auto", *PRECISIONS):
            known = ", ".join(PRECISIONS)
            raise ValueError(f'precision must be auto or one of {known} with backend "cuda", got {precision!r}')
        if (reason := unusable(config, device)) is not None:
            raise ValueError(f'backend "cuda" cannot run this here: {reason}')
        super().__init__(config, weights, "float32", device)
        self._encoders = _Recent()
        self._kernels = self._made("float32" if precision == "auto" else precision)
        if precision == "auto":
            fast = self._made("bfloat16")
            spearman, overlap = agreement(self._kernels, fast, config)
            if spearman >= SPEARMAN and overlap >= OVERLAP:
                self._kernels = fast
        self.precision = self._kernels.precision

    def _made(self, precision: str) -> Kernels:
        return Kernels(pack(self.network.config, self.network.state_dict(), precision, self.device))

    @torch.no_grad()
    def encode(self, frames: Any) -> Tensor:
        """(..., size, size, 3) uint8 -> (..., D)."""
        frames = as_tensor(frames)
        flat = frames.reshape(-1, *frames.shape[-3:])
        if self.device.type != "cuda" or len(flat) > 64:  # many frames hide what launching costs
            return super().encode(frames)
        encoder = self._encoders.get(len(flat), lambda: _Encoder(self.network, flat.shape, self.device))
        return encoder(flat).reshape(*frames.shape[:-3], -1)

    @torch.no_grad()
    def rollout(self, z: Any, candidates: Any, past_actions: Any | None) -> Tensor:
        """(E, T, D), (E, S, H, A), (E, T - 1, A) -> (E, S, T + H, D)."""
        z, candidates = self.tensor(z), self.tensor(candidates)
        past = None if past_actions is None else self.tensor(past_actions)
        imagined = self._kernels.rollout(z, candidates, past).unflatten(0, candidates.shape[:2])
        return torch.cat([z[:, None].expand(-1, candidates.shape[1], -1, -1), imagined], 2)

    @torch.no_grad()
    def costs(self, z: Any, goal: Any, candidates: Any, past_actions: Any | None, cost: str = "latent") -> Tensor:
        """Terminal costs (E, S) of candidates, without keeping the trajectories; `cost` is "latent" or "distance"."""
        past = None if past_actions is None else self.tensor(past_actions)
        return self._kernels.scored(self.tensor(z), self.tensor(goal), self.tensor(candidates), past, cost)

    def objective(self, z: Any, goal: Any, past_actions: Any | None, cost: str = "latent") -> Any:
        """The costs of candidates (E, S, H, A); with the loop on the device it can also `solve` by itself."""
        found = Objective(
            self._kernels, *(None if x is None else to_numpy(x) for x in (z, goal, past_actions)), cost=cost
        )
        return found if self.loop == "device" else found.__call__


class _Recent:
    """What was made for the shapes asked for last."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept = kept
        self._made: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key not in self._made:
                while len(self._made) >= self._kept:
                    self._made.popitem(last=False)
                self._made[key] = make()
            self._made.move_to_end(key)
            return self._made[key]


class Kernels:
    """Packed weights, and memory and graphs for the shapes asked for last."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.precision = weights, weights.precision
        self.device = weights.positions.device
        self._rollouts, self._planners, self._heads, self._staged = _Recent(), _Recent(), _Recent(), _Recent(4 * _KEPT)
        self._lock = threading.RLock()

    def planner(self, environments: int, frames: int, settings: dict[str, Any]) -> CEM:
        """The planner for so many environments and frames."""
        key = (environments, frames, *settings.values())
        return self._planners.get(key, lambda: CEM(self.weights, environments, frames, **settings))

    def rollout(self, z: Tensor, candidates: Tensor, past: Tensor | None) -> Tensor:
        """Imagined latents (E S, H, D) of tensors (E, T, D), (E, S, H, A) and (E, T - 1, A) on the device."""
        with self._lock, on(self.device):
            return torch.cat([r.latents.transpose(0, 1).clone() for r, _ in self._parts(z, candidates, past, True)])

    def scored(self, z: Tensor, goal: Tensor, candidates: Tensor, past: Tensor | None, cost: str = "latent") -> Tensor:
        """Costs (E, S) of the same for goals (E, D)."""
        parts, root = [], cost == "distance"
        with self._lock, on(self.device):
            for rollout, some in self._parts(z, candidates, past, False):
                costs = torch.empty(rollout.rows, device=self.device)
                last, goals = rollout.latents[-1], goal[some].contiguous()
                if root:
                    exact = rollout.cut.exact
                    last, goals = (self._head(place, x, exact) for place, x in enumerate((last, goals)))
                cost_launch(last, goals, costs, root)()
                parts.append(costs)
            return torch.cat(parts).view(candidates.shape[:2])

    def _head(self, place: int, z: Tensor, exact: str) -> Tensor:
        """What the distance head makes of latents; good until the next of that place and number."""
        return self._heads.get((place, len(z)), lambda: Distance(self.weights, len(z), exact)).run(z)

    @torch.no_grad()
    def costs(
        self,
        z: np.ndarray,
        goal: np.ndarray,
        blocks: np.ndarray,
        past: np.ndarray | None = None,
        cost: str = "latent",
    ) -> np.ndarray:
        """The same in NumPy, through page-locked memory: what the planners of the CPU call in each iteration."""
        with self._lock:
            tensors = [None if x is None else self._upload(i, x) for i, x in enumerate((z, goal, blocks, past))]
            costs = self.scored(*tensors, cost=cost)
            host = self._memory("costs", costs.shape)
            host.copy_(costs, non_blocking=True)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            return host.numpy().copy()

    def _upload(self, place: int, array: np.ndarray) -> Tensor:
        host = self._memory(place, array.shape)
        host.numpy()[...] = array
        return host.to(self.device, non_blocking=True)

    def _memory(self, place: Any, shape: Any) -> Tensor:
        pinned = self.device.type == "cuda"
        return self._staged.get((place, *shape), lambda: torch.empty(tuple(shape), pin_memory=pinned))

    def _parts(
        self, z: Tensor, candidates: Tensor, past: Tensor | None, every: bool
    ) -> Iterator[tuple[Rollout, slice]]:
        """Rollouts of at most `ROWS` candidates at a time, in order, and the environments that each is of."""
        environments, samples, horizon = candidates.shape[:3]
        each, most = max(1, ROWS // samples), min(samples, ROWS)
        for e in range(0, environments, each):
            some = slice(e, min(e + each, environments))
            for s in range(0, samples, most):
                flat = candidates[some, s : s + most].flatten(0, 1)
                key = (len(flat), z.shape[1], horizon, every)
                rollout = self._rollouts.get(key, lambda key=key: Rollout(self.weights, *key[:3], every=key[3]))
                rollout.candidates.copy_(flat)
                rollout.observe(z[some], None if past is None else past[some])
                rollout.replay()
                yield rollout, some


class Objective:
    """Costs of candidates for given latents (E, T, D), goals (E, D) and past blocks (E, T - 1, A), all NumPy."""

    def __init__(
        self, kernels: Kernels, z: np.ndarray, goal: np.ndarray, past: np.ndarray | None, cost: str = "latent"
    ) -> None:
        self._kernels, self._z, self._goal, self._past, self._cost = kernels, z, goal, past, cost

    def __call__(self, candidates: np.ndarray) -> np.ndarray:
        """(E, S, H, A) -> (E, S)."""
        return self._kernels.costs(self._z, self._goal, candidates, self._past, self._cost)

    def solve(self, settings: dict[str, Any], mean: np.ndarray, *, deadline: float | None, **call: Any) -> Any:
        """Plans on the device with the fields of a `lewm.CEM`; gives what `lewm._core.Planner.solve` does."""
        environments, frames = self._z.shape[:2]
        settings = {"cost": self._cost, **settings}
        each = max(1, ROWS // settings["samples"])
        found = []
        for e in range(0, environments, each):
            some = slice(e, min(e + each, environments))
            planner = self._kernels.planner(some.stop - e, frames, settings)
            past = None if self._past is None else self._past[some]
            # Groups of environments share what time there is.
            share = None if deadline is None else deadline * (some.stop - e) / environments
            rest = call | {"env_ids": call["env_ids"][some], "deadline": share}
            found.append(planner.solve(self._z[some], self._goal[some], past, mean[some], **rest))
        return found[0] if len(found) == 1 else _joined(found)


def _joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of groups of environments; iterations that not all of them ran are left out."""
    iterations = min(part["iterations"] for part in found)
    names = [name for name, value in found[0].items() if isinstance(value, np.ndarray) and name != "trace"]
    joined = {name: np.concatenate([part[name] for part in found]) for name in names}
    joined["trace"] = np.concatenate([part["trace"][:iterations] for part in found], axis=1)
    return joined | {"iterations": iterations, "deadline_hit": any(part["deadline_hit"] for part in found)}


class _Encoder:
    """The network's encoder for one shape of frames, captured."""

    def __init__(self, network: LeWM, shape: torch.Size, device: torch.device) -> None:
        self._lock, self._device = threading.Lock(), device
        self._frames = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._staged = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        self._z = torch.zeros(shape[0], network.config.embed_dim, device=device)
        self._encode = captured(lambda: self._z.copy_(network.encode(self._frames)), device)

    def __call__(self, frames: Tensor) -> Tensor:
        with self._lock, on(self._device):
            if frames.device.type == "cpu":
                self._staged.copy_(frames)
                frames = self._staged
            self._frames.copy_(frames, non_blocking=True)
            self._encode()
            z = self._z.clone()
            torch.cuda.current_stream().synchronize()  # what is staged may be written again
            return z


# ------------------------------------------------------------------------------------------------ where it can run


def unusable(config: ModelConfig, device: str | None) -> str | None:
    """Why the kernels cannot run this model on this device; None if they can, as far as can be said without trying."""
    found = device_of(device)
    if found.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"device {found} is no CUDA device"
    if found.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(found) < (8, 0):
        return f"{torch.cuda.get_device_name(found)} has compute capability below 8.0"
    return obstacle(config)


def self_check(device: str | None = None) -> bool:
    """Whether plans of the kernels on this device are those of the Rust loop with the PyTorch network.

    The first time on a GPU it compiles and compares, which takes a minute; a yes is kept in the user's cache folder for
    this GPU and these versions. Warns if it is no.
    """
    return _self_check(str(device_of(device)))


@functools.cache
def _self_check(device: str) -> bool:
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "interpreter"
    versions = f"torch {torch.__version__}, triton {triton.__version__}, lewm {__version__}"

    def passes() -> bool | None:
        problem = _problem(device)
        if problem is None:
            return True
        warnings.warn(
            f'the kernels of backend "cuda" failed their check on {name} ({versions}): {problem}; '
            f'backend "torch" is used instead',
            RuntimeWarning,
            stacklevel=6,
        )
        return None  # with another driver it may pass

    return bool(remembered("gpu.json", f"{name}, {versions}", passes))


def _problem(device: str) -> str | None:
    """What is wrong with small rollouts and plans on this device, against float64 PyTorch and the Rust loop."""
    for overrides, settings in _CHECKS:
        try:
            config, weights = _small(overrides)
            wrong = _differs(config, weights, settings, device)
        except Exception as error:  # whatever a compiler or a driver raises, the answer is no
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            return wrong.splitlines()[0]
    return None


def _small(overrides: dict[str, Any]) -> tuple[ModelConfig, dict[str, Tensor]]:
    sizes = {"predictor_dim": 48, "embed_dim": 48, "predictor_heads": 2, "predictor_mlp": 96, "projector_hidden": 64}
    sizes |= {"encoder_dim": 32, "encoder_depth": 1, "encoder_mlp": 32, "image_size": 16, "action_hidden": 32}
    config, _ = configure("tiny", 2, {**sizes, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LeWM(config)
        for parameter in network.parameters():
            if parameter.dim() == 2 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)  # else no action would have an effect
        return config, network.state_dict()


def _differs(config: ModelConfig, weights: dict[str, Tensor], settings: dict[str, Any], device: str) -> str | None:
    exact = TorchBackend(config, weights, "float64", "cpu")
    samples, horizon, width = settings["samples"], settings["horizon"], config.block_dim
    latents = _core.noise(0, np.arange(2), 0, 0, 2, config.embed_dim)
    z, goal = np.ascontiguousarray(latents[:, :1]), np.ascontiguousarray(latents[:, 1])
    blocks = _core.noise(1, np.arange(2), 0, 0, samples, horizon * width).reshape(2, samples, horizon, width)
    cost = "distance" if config.distance_head else "latent"
    want = exact.costs(z, goal, blocks, None, cost).cpu().numpy()
    bounds = {"low": np.full(width, -1.5), "high": np.full(width, 1.5)}
    call = {**bounds, "seed": 3, "env_ids": np.arange(2, dtype=np.uint32), "plan": 1}
    for precision, tolerance in (("float32", 1e-4), ("bfloat16", 5e-2)):
        kernels = Kernels(pack(config, weights, precision, device))
        error = float(np.abs(kernels.costs(z, goal, blocks, None, cost) - want).max() / np.abs(want).max())
        if not error <= tolerance:
            return f"costs in {precision} differ by {error:.1e} from float64, more than {tolerance:.0e}"
        objective = Objective(kernels, z, goal, None, cost)
        cem = {**settings, "init_std": 1.0, "min_std": 0.05, "reference": False}
        mean = np.zeros((2, horizon, width))
        got = objective.solve(cem, mean, deadline=None, **call)
        del cem["horizon"]
        rust = _core.Planner("cem", dtype="float32", **cem).solve(objective, mean, **call)
        error = float(np.abs(got["mean"] - rust["mean"]).max())
        if not error <= 1e-3:
            return f"plans in {precision} differ by {error:.1e} from those of the Rust loop"
    return None
