"""For users of stable-worldmodel: our planner in their `WorldModelPolicy`, our models in their solvers.

`Solver` has the interface of their solvers, `as_cost_model` that of their world models, in release 0.1.1 as in the main
branch of August 2026. Both work in the space that the policy plans in: it has normalised the actions, and turns plans
back into raw ones by itself, so no action statistics are needed. stable-worldmodel is never imported, and torch not
before something is solved or a checkpoint of torch's is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from lewm.checkpoints import architecture
from lewm.checks import integer
from lewm.model import Model, load
from lewm.model_file import current_names
from lewm.pixels import MEAN, STD
from lewm.planner import CEM, core_of, to_numpy

__all__ = ["Solver", "as_cost_model"]

_WISH = "a lewm.Model, the path of one, or a LeWM of stable-worldmodel"


class Solver:
    """Plans for stable-worldmodel's `WorldModelPolicy`, in the place of its `CEMSolver`.

    The search is that of `lewm.CEM`, and the noise a function of the seed, the row of an environment in the call, and
    the number of the call. Nothing bounds the actions unless `scaler` is given: the environment clips, as it does with
    `CEMSolver`.

    With `reference=True` the search is that of `CEMSolver`: its noise (of a `torch.Generator` with this seed, in the
    same order), its update, no bounds, the last mean as the plan. In float64 the actions are then the same to rounding.
    In float32 costs differ in the last digits, so candidates that are nearly alike may change places.

    Args:
        model: A `lewm.Model`; a path or repository for `lewm.load`; their `LeWM`, whose weights are copied now; or the
            `ShootingCostEvaluator` of one with `GoalMSE()`.
        cost: The same, by the name that their main branch has for it.
        samples, iterations, elites, init_std: As in `lewm.CEM`; there num_samples, n_steps, topk, var_scale.
        min_std: As in `lewm.CEM`; `reference` has no floor.
        seed: Of the noise.
        reference: Do what `CEMSolver` does, by default in float32, or in float64 if the LeWM is.
        batch_size: Environments that `CEMSolver` draws noise for at once; it has no meaning without `reference`.
        scaler: What the policy's `process["action"]` is. Candidates then stay within the environment's action space.
        backend, precision, device: As in `lewm.load`, for a model that is not loaded yet. With `reference`, `device` is
            also where the noise is drawn; the CPU by default, as theirs.

    Raises:
        TypeError: The model is none of these, or a number is none.
        ValueError: A number is out of range, or arguments do not go together.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        cost: Any = None,
        samples: int = 300,
        iterations: int = 30,
        elites: int = 30,
        init_std: float = 1.0,
        min_std: float = 0.05,
        seed: int = 1234,
        reference: bool = False,
        batch_size: int = 1,
        scaler: Any = None,
        backend: str = "auto",
        precision: str = "auto",
        device: str | None = None,
    ) -> None:
        if (model is None) == (cost is None):
            raise ValueError("give one of model and cost: they are two names for what plans")
        if reference and scaler is not None:
            raise ValueError("scaler must be None with reference=True: CEMSolver has no bounds")
        self.planner = CEM(
            samples, iterations, elites, init_std=init_std, min_std=min_std, reference=bool(reference), cost="latent"
        )
        self.seed = integer("seed", seed, 0, 2**63)
        self.batch_size = integer("batch_size", batch_size, 1)
        self.scaler = scaler
        self.model = _model(cost if model is None else model, backend, precision, device, bool(reference))
        if not reference:
            self.planner = replace(self.planner, cost=self.model.cost_of(None))
        self._low: np.ndarray | None = None
        self._high: np.ndarray | None = None
        self._noise_device, self._calls = device or "cpu", 0
        self._generator: Any = None

    def configure(self, *, action_space: Any, n_envs: int, config: Any) -> None:
        """What `WorldModelPolicy` calls once it knows the environment.

        Args:
            action_space: Box of the vector environment, (E, A_raw).
            n_envs: E.
            config: Their `PlanConfig`: `horizon` in blocks, `action_block`.

        Raises:
            ValueError: The model's action blocks are of another width, or the scaler makes no bounds.
        """
        raw, block = int(np.prod(action_space.shape[1:])), int(config.action_block)
        if raw * block != self.model.config.block_dim:
            raise ValueError(
                f"the model's action blocks are {self.model.config.block_dim} wide, but this environment's actions are "
                f"{raw} wide and config has action_block={block}, which makes {raw * block}"
            )
        self.planner = replace(self.planner, horizon=config.horizon)
        if self.scaler is not None:
            raws = (np.reshape(bound, (-1, raw))[:1] for bound in (action_space.low, action_space.high))
            low, high = (np.tile(np.asarray(self.scaler.transform(bound), np.float64)[0], block) for bound in raws)
            if low.shape != (raw * block,) or not (low < high).all():
                raise ValueError(f"scaler must make bounds of those of the action space, got {low} and {high}")
            self._low, self._high = low, high
        self._action_dim, self._n_envs, self._horizon = raw * block, n_envs, config.horizon

    @property
    def action_dim(self) -> int:
        """Width A of an action block."""
        return self._configured("_action_dim")

    @property
    def n_envs(self) -> int:
        """Environments of the policy; a call may be for fewer."""
        return self._configured("_n_envs")

    @property
    def horizon(self) -> int:
        """Length of a plan in action blocks."""
        return self._configured("_horizon")

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The same as `solve`."""
        return self.solve(*args, **kwargs)

    def solve(self, info_dict: dict[str, Any], init_action: Any = None) -> dict[str, Any]:
        """Plans for E environments.

        Args:
            info_dict: What the policy passes: `pixels` and `goal`, pictures normalised with ImageNet's mean and
                standard deviation (E, T, 3, S, S), or uint8 (E, T, H, W, 3); of `goal` the last one counts. Where T is
                above 1, `action_history` (E, T - 1, A), the blocks between the frames. All else is left alone.
            init_action: First mean of the first blocks, (E, t, A); zeros, or what the model's action prior guesses
                if there is none.

        Returns:
            What `CEMSolver` gives, tensors on the CPU: `actions` (E, H, A); `costs`, a list of E numbers, those of the
            plans, with `reference` the mean of the last elites'; `mean` and `var`, each a list of one tensor
            (E, H, A), mean and standard deviation of the last iteration.

        Raises:
            AttributeError: It is not configured.
            ValueError: The dict lacks something or has it in another shape, naming it.
        """
        import torch

        width, horizon, reference = self.action_dim, self.horizon, self.planner.reference
        z, past, goal = _context(self.model, info_dict, reference)
        mean = self._first_mean(init_action, z, goal, horizon, width)
        found = (self._reference if reference else self._fast)(z, past, goal, mean)
        dtype = torch.float64 if z.dtype == np.float64 else torch.float32
        actions, mean, std = (torch.from_numpy(found[name]).to(dtype) for name in ("actions", "mean", "std"))
        return {"costs": found["cost"].tolist(), "mean": [mean], "var": [std], "actions": actions}

    def _fast(self, z: np.ndarray, past: np.ndarray | None, goal: np.ndarray, mean: np.ndarray) -> Any:
        objective = self.model.objective(z, goal, past, self.planner.cost)
        ids = np.arange(len(z), dtype=np.uint32)
        call = {"low": self._low, "high": self._high, "seed": self.seed, "env_ids": ids, "plan": self._calls % 2**32}
        self._calls += 1
        if hasattr(objective, "solve"):  # the same search, where the model is
            settings = {name: value for name, value in asdict(self.planner).items() if name != "cost"}
            return objective.solve(settings, mean, deadline=None, **call)
        return core_of(self.planner, z.dtype).solve(objective, mean, **call)

    def _reference(self, z: np.ndarray, past: np.ndarray | None, goal: np.ndarray, mean: np.ndarray) -> Any:
        import torch

        if self._generator is None:
            self._generator = torch.Generator(self._noise_device).manual_seed(self.seed)
        core, dtype = core_of(self.planner, z.dtype), torch.float64 if z.dtype == np.float64 else torch.float32
        found = []
        for first in range(0, len(z), self.batch_size):
            some = slice(first, first + self.batch_size)
            shape = (len(mean[some]), self.planner.samples, *mean.shape[1:])
            made = {"generator": self._generator, "device": self._generator.device, "dtype": dtype}
            noise = torch.stack([torch.randn(shape, **made) for _ in range(self.planner.iterations)])
            blocks = None if past is None else past[some]
            objective = self.model.objective(z[some], goal[some], blocks, self.planner.cost)
            found.append(core.solve(objective, mean[some], noise=noise.double().cpu().numpy()))
        return {name: np.concatenate([part[name] for part in found]) for name in ("actions", "cost", "mean", "std")}

    def _first_mean(self, init: Any, z: np.ndarray, goal: np.ndarray, horizon: int, width: int) -> np.ndarray:
        blocks = np.zeros((len(z), 0, width))
        if init is not None:
            blocks = np.asarray(to_numpy(init), np.float64)
            if blocks.ndim != 3 or (len(blocks), blocks.shape[2]) != (len(z), width):
                raise ValueError(f"init_action must be of shape ({len(z)}, t, {width}), got {blocks.shape}")
            if not np.isfinite(blocks).all():
                raise ValueError("init_action must be finite, got NaN or infinity")
        elif self.model.config.action_prior and not self.planner.reference:
            blocks = np.asarray(self.model.prior(z[:, -1], goal), np.float64)
            blocks = blocks if self._low is None else np.clip(blocks, self._low, self._high)
        blocks = blocks[:, :horizon]
        return np.pad(blocks, ((0, 0), (0, horizon - blocks.shape[1]), (0, 0)))

    def _configured(self, name: str) -> Any:
        if name not in self.__dict__:
            raise AttributeError("the solver is not configured: WorldModelPolicy.set_env does it, or call configure")
        return self.__dict__[name]


def as_cost_model(
    model: Any, *, cost: str | None = None, backend: str = "auto", precision: str = "auto", device: str | None = None
) -> CostModel:
    """One of our models as stable-worldmodel's solvers take them.

    `CEMSolver(as_cost_model(model))`, and so with iCEM, MPPI and predictive sampling; what follows gradients
    (`GradientSolver`, `LagrangianSolver`) needs `backend="torch"`. In their main branch it is either the cost itself or
    the model of a `ShootingCostEvaluator`.

    Args:
        model: As in `Solver`.
        cost: As in `lewm.CEM`.
        backend, precision, device: As in `lewm.load`, for a model that is not loaded yet.

    Raises:
        TypeError, ValueError: As `Solver`.
    """
    return CostModel(_model(model, backend, precision, device, False), cost)


class CostModel:
    """A `lewm.Model` with the methods that their solvers and evaluators call; made by `as_cost_model`.

    The dicts are theirs: `pixels`, `goal` and `action_history` as in `Solver.solve`, repeated for S candidates in a
    second axis. A dict is encoded when it is first seen, and the latents are kept in it.
    """

    def __init__(self, model: Model, cost: str | None) -> None:
        self.model, self.cost = model, model.cost_of(cost)

    def parameters(self) -> Iterator[Any]:
        """Those of the torch module, whose dtype their solvers draw candidates in; none on other back ends."""
        return self.model.network.parameters() if self.model.backend == "torch" else iter(())

    def get_cost(self, info_dict: dict[str, Any], action_candidates: Any) -> Any:
        """Costs (B, S) of candidates (B, S, H, A), a tensor beside them.

        Raises:
            ValueError: The dict lacks something, or gradients are asked of a model that is not on backend "torch".
        """
        z, past = _recent(self.model, *self._observed(info_dict))
        if "lewm_goal" not in info_dict:
            info_dict["lewm_goal"] = _latents(self.model, _first(info_dict), "goal")[:, -1]
        goal = info_dict["lewm_goal"]
        if not _differentiable(action_candidates):
            costs = self.model.costs(z, goal, action_candidates.detach(), past, self.cost)
            return costs.to(action_candidates.dtype)
        last = self._imagined(z, past, action_candidates)[:, :, -1]
        target = last.new_tensor(goal)[:, None]
        if self.cost == "distance":
            return self.model.network.distance(last, target)
        return (last - target).square().sum(-1)

    def encode(self, info: dict[str, Any]) -> dict[str, Any]:
        """Adds `emb` (B, T, D), the latents of `pixels` (B, T, 3, H, W)."""
        import torch

        info["emb"] = torch.as_tensor(_latents(self.model, info, "pixels"), device=info["pixels"].device)
        return info

    def rollout(self, info: dict[str, Any], action_sequence: Any) -> dict[str, Any]:
        """Adds `predicted_emb` (B, S, T + H, D): the observed latents, then those that the candidates lead to."""
        import torch

        observed, past = self._observed(info)
        z, past = _recent(self.model, observed, past)
        if _differentiable(action_sequence):
            zs = self._imagined(z, past, action_sequence)
        else:
            zs = self.model.rollout(z, action_sequence.detach(), past).to(action_sequence.dtype)
        earlier = zs.new_tensor(observed[:, None, : observed.shape[1] - z.shape[1]])
        info["predicted_emb"] = torch.cat([earlier.expand(-1, zs.shape[1], -1, -1), zs], 2)
        return info

    def criterion(self, info_dict: dict[str, Any], action_candidates: Any = None) -> Any:
        """Costs (B, S) of what is in the dict: `predicted_emb` (B, S, T, D) and `goal_emb` (B, T, D)."""
        return self.model.cost(info_dict["predicted_emb"], info_dict["goal_emb"][:, -1], self.cost)

    def _observed(self, info: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
        if "lewm_observed" not in info:
            first = _first(info)
            z = _latents(self.model, first, "pixels")
            info["lewm_observed"] = z, _past(self.model, first, *z.shape[:2])
        return info["lewm_observed"]

    def _imagined(self, z: np.ndarray, past: np.ndarray | None, candidates: Any) -> Any:
        """`Model.rollout` with gradients for the candidates."""
        if self.model.backend != "torch":
            raise ValueError(
                f'gradients need a model on backend "torch", this one is on "{self.model.backend}": '
                'as_cost_model(path, backend="torch")'
            )
        flat = candidates.to(next(self.parameters())).flatten(0, 1)

        def repeated(values: np.ndarray) -> Any:
            return flat.new_tensor(values).repeat_interleave(candidates.shape[1], 0)

        zs = self.model.network.rollout(repeated(z), flat, None if past is None else repeated(past))
        return zs.unflatten(0, candidates.shape[:2]).to(candidates)


def _first(info: dict[str, Any]) -> dict[str, Any]:
    """What a planner reads of a dict whose entries are repeated for candidates, once."""
    return {name: info[name][:, 0] for name in ("pixels", "goal", "action_history") if name in info}


def _differentiable(candidates: Any) -> bool:
    import torch

    return candidates.requires_grad and torch.is_grad_enabled()


def _model(src: Any, backend: str, precision: str, device: str | None, reference: bool) -> Model:
    """The `lewm.Model` of whatever stands for one."""
    if isinstance(src, Model):
        if (backend, precision) != ("auto", "auto") or (device is not None and not reference):
            raise ValueError("backend, precision and device are for a model that is not loaded yet")
        return src
    if isinstance(src, str | os.PathLike):
        precision = "float32" if reference and precision == "auto" else precision
        return load(src, backend=backend, precision=precision, device=device)
    if hasattr(src, "objective") and hasattr(src, "encode_goal"):
        src = _evaluated(src)
    if not all(hasattr(src, name) for name in ("state_dict", "encoder", "predictor", "action_encoder")):
        raise TypeError(f"model must be {_WISH}, got {type(src).__name__}")
    return _copied(src, backend, precision, device, reference)


def _evaluated(evaluator: Any) -> Any:
    """The model of a ShootingCostEvaluator, if it is the distance of latents that it evaluates."""
    objective = evaluator.objective
    plain = all(
        getattr(objective, name, None) == value
        for name, value in (("pred_key", "predicted_emb"), ("goal_key", "goal_emb"), ("reduction", "sum"))
    )
    encoder = getattr(evaluator.encode_goal, "__name__", "None")
    if not plain or evaluator.constraints or encoder not in ("default_goal_encode", "flat_goal_encode"):
        raise ValueError(
            "cost must be ShootingCostEvaluator(model, GoalMSE()), without constraints or a goal encoder of its own, "
            f"got one of {type(objective).__name__}: for other costs give lewm.swm.as_cost_model(model) to a solver of "
            "stable-worldmodel"
        )
    return evaluator.model


def _copied(module: Any, backend: str, precision: str, device: str | None, reference: bool) -> Model:
    """A model with the weights of their LeWM."""
    settings: Any = getattr(module.encoder, "config", None)
    for name, want in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-12)):
        if getattr(settings, name, want) != want:
            raise ValueError(f"model must have an encoder with {name}={want!r}, got {getattr(settings, name)!r}")
    # What torch.compile wraps has another name.
    state = {name.replace("_orig_mod.", ""): value.detach().cpu() for name, value in module.state_dict().items()}
    double = any(str(value.dtype) == "torch.float64" for value in state.values())
    if precision == "auto" and reference:
        precision = "float64" if double else "float32"
    if precision != "float64":
        state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    try:
        weights = current_names({name: np.array(value.numpy()) for name, value in state.items()})
        heads = int(module.predictor.transformer.layers[0].attn.heads)
        inner = len(weights["predictor.transformer.layers.0.attn.to_qkv.weight"]) // 3
        numbers = {"heads": heads, "dim_head": inner // heads}
        if hasattr(settings, "num_attention_heads"):
            numbers["encoder_heads"] = int(settings.num_attention_heads)
        config = architecture(weights, numbers, None)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TypeError(f"model must be {_WISH}, got a {type(module).__name__} with other parts ({error})") from error
    return Model(config, weights, backend=backend, precision=precision, device=device)


def _context(model: Any, info: dict[str, Any], exact: bool = False) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Latents (E, T, D) of as many frames as count, the blocks (E, T - 1, A) between them, and the goal's (E, D)."""
    z, goal = _latents(model, info, "pixels", exact), _latents(model, info, "goal", exact)[:, -1]
    if len(goal) != len(z):
        raise ValueError(f"info_dict has {len(z)} environments in pixels and {len(goal)} in goal")
    z, past = _recent(model, z, _past(model, info, *z.shape[:2]))
    return z, past, goal


def _past(model: Any, info: dict[str, Any], environments: int, frames: int) -> np.ndarray | None:
    """The blocks (E, T - 1, A) between the frames."""
    want, past = (environments, frames - 1, model.config.block_dim), info.get("action_history")
    if past is None and frames > 1:
        raise ValueError(
            f"info_dict has {frames} frames in pixels and no action_history {want}, the action blocks between them"
        )
    if past is not None and past.shape != want:
        raise ValueError(f"info_dict's action_history must be of shape {want}, got {tuple(past.shape)}")
    return None if past is None or frames == 1 else to_numpy(past)


def _recent(model: Any, z: np.ndarray, past: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """As many of the last latents as the predictor sees, and the blocks between those."""
    z = z[:, -model.config.history :]
    return z, None if past is None or z.shape[1] == 1 else past[:, 1 - z.shape[1] :].astype(z.dtype)


def _latents(model: Any, info: dict[str, Any], name: str, exact: bool = False) -> np.ndarray:
    """Latents (E, T, D) of pictures as a policy passes them; if `exact`, without rounding those to whole levels."""
    if name not in info:
        raise ValueError(f"info_dict must have {name}, it has {', '.join(map(str, info)) or 'nothing'}")
    pictures, size, what = info[name], model.config.image_size, f"info_dict's {name}"
    if str(pictures.dtype).endswith("uint8"):
        if pictures.ndim != 5:
            raise ValueError(f"{what} must be of shape (E, T, H, W, 3), got uint8 of shape {tuple(pictures.shape)}")
        return model.encode(to_numpy(pictures), name=what)
    if pictures.ndim != 5 or tuple(pictures.shape[2:]) != (3, size, size) or 0 in pictures.shape:
        raise ValueError(
            f"{what} must be of shape (E, T, 3, {size}, {size}), as the model takes them, got {tuple(pictures.shape)}"
        )
    # NumPy has no bfloat16.
    pictures = to_numpy(pictures.double() if hasattr(pictures, "detach") else pictures)
    levels = 255 * (np.moveaxis(pictures, 2, -1) * np.array(STD) + np.array(MEAN))
    if not (levels.min() > -2 and levels.max() < 257):
        raise ValueError(
            f"{what} must be normalised with ImageNet's mean and standard deviation: undone, its pixels are from "
            f"{levels.min():.4g} to {levels.max():.4g}, which is not within 0 to 255"
        )
    if model.backend == "torch":
        import torch

        first = next(model.network.parameters())
        with torch.no_grad():
            return model.network.encode(torch.from_numpy(levels).to(first.device, first.dtype)).cpu().numpy()
    frames = np.rint(levels).clip(0, 255)
    if exact and np.abs(frames - levels).max() > 0.01:
        raise ValueError(
            f'{what} must be whole levels with reference=True and backend "{model.backend}", which encodes uint8: '
            'resize pictures before they become floats, or give backend="torch"'
        )
    return model.encode(frames.astype(np.uint8), name=what)
