"""The two terms of LeWorldModel's loss: prediction error and SIGReg (paper, equations 1 to 3 and appendix A).

    loss = prediction_loss + lambda * sigreg,   lambda = 0.09 in the official code

`sigreg` runs as one fused Triton kernel on CUDA (`lewm.kernels.sigreg`), in Rust on the CPU (`lewm._core`), and as the
PyTorch below for float64 and everywhere else: the same mathematics, derived in `kernels/README.md`, and none keeps a
tensor of size (T, B, P, K).
"""

import importlib.util
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from lewm import _core

LAST_KNOT = 3.0  # the official code integrates over [0, 3] (the paper's text says [0.2, 4])
_CHUNK = 1 << 18  # projections handled at once on the PyTorch path: about 8 MB of work space


def prediction_loss(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error over every entry (paper, equation 1 with teacher forcing); gradients flow to both arguments.

    Args:
        pred: Predicted embeddings of any shape, usually (B, T, D); float64, or anything else computed in float32.
        target: The embeddings that were to be predicted, of the same shape.

    Returns:
        A scalar, float32 (float64 if an argument is).

    Raises:
        ValueError: If the shapes differ (nothing is broadcast).
    """
    if pred.shape != target.shape:
        raise ValueError(f"pred and target must have the same shape, got {tuple(pred.shape)} and {tuple(target.shape)}")
    return (_at_least_float32(pred) - _at_least_float32(target)).square().mean()


@dataclass(frozen=True)
class Directions:
    """Random unit directions for one training step, made from a key wherever they are used (paper, appendix A).

    Direction p is the planners' noise (`rust/core/src/rng/mod.rs`) of `seed`, plan `step`, iteration 0, sample p and
    environment 2^32 - 1, D numbers, divided by its norm: uniform on the unit sphere, the same on every device whatever
    ran before, and never in memory where a kernel makes them.

    Attributes:
        count: Number of directions P (1024 in the paper).
        seed: Seed of the run, below 2^64.
        step: Training step, below 2^32: a number, or an int64 tensor of shape () on z's device. A tensor is read where
            it lies, so that a compiled or captured training step may count on the device (once `backward` is done).

    Raises:
        TypeError: If step is a tensor of another type.
        ValueError: If count is below 1, or seed or step outside its range.
    """

    count: int
    seed: int
    step: int | torch.Tensor

    def __post_init__(self) -> None:
        _check_range("count", self.count, 1, 2**32)
        _check_range("seed", self.seed, 0, 2**64 - 1)
        if not isinstance(self.step, torch.Tensor):
            _check_range("step", self.step, 0, 2**32 - 1)
        elif self.step.dtype != torch.int64 or self.step.dim():
            raise TypeError(
                f"step must be a number or an int64 tensor of shape (), got {self.step.dtype} {tuple(self.step.shape)}"
            )


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low} .. {high}, got {value}")


def sigreg_directions(
    dim: int,
    count: int,
    *,
    seed: int,
    step: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The directions of `Directions(count, seed, step)` as a tensor, the same bits on every machine.

    Args:
        dim: Embedding width D, at most 2^18.
        count: As in `Directions`.
        seed: As in `Directions`.
        step: As in `Directions`, a number.
        device: Where the result lives.
        dtype: Floating dtype of the result; its numbers are rounded to float32 first.

    Returns:
        Directions of shape (D, P); every column has norm 1.

    Raises:
        ValueError: If an argument is outside its range.
    """
    Directions(count, seed, step)
    _check_range("dim", dim, 1, 2**18)
    rows = torch.from_numpy(_core.sigreg_directions(seed, step, count, dim))
    return rows.T.to(device, dtype).contiguous()


def sigreg(
    z: torch.Tensor, directions: torch.Tensor | Directions, *, knots: int = 17, backend: str = "auto"
) -> torch.Tensor:
    """SIGReg: how far the embeddings of each time step are from a standard normal, along random directions.

    The Epps-Pulley statistic of every projection h = z[t] @ directions[:, p], averaged over directions and time (paper,
    appendix A):

        B * sum_k w_k [(mean_b cos(t_k h_b) - exp(-t_k^2 / 2))^2 + (mean_b sin(t_k h_b))^2]

    with the official code's quadrature, not the one of the paper's text: K knots t_k on [0, 3] and weights
    w_k = 2 dt exp(-t_k^2 / 2), half of that at both ends. The factor B makes it a test statistic: embeddings that are
    standard normal give about 1.05 at any batch size, embeddings that have collapsed to zero give 0.402 B, so watch
    `sigreg / B`.

    Args:
        z: Embeddings of shape (T, B, D). float64 is computed in float64, anything else in float32. The only argument
            that gets a gradient.
        directions: `Directions`, or unit directions of shape (D, P), which are used as they are: a caller with others
            normalises the columns first.
        knots: Number of knots K, at least 2 (17 in the official code).
        backend: "triton" (CUDA, or any device under TRITON_INTERPRET=1), "rust" (CPU), "torch" (anywhere), or "auto":
            the first of them that can run, Triton on CUDA only. The first two do not take float64. "torch" makes a
            tensor of `Directions`, and has to read a step that lies on another device.

    Returns:
        A scalar, float32 (float64 for float64 z).

    Raises:
        TypeError: If z or directions is not floating.
        ValueError: For wrong or empty shapes, devices that differ, fewer than 2 knots, an unknown backend, or one that
            cannot run here.
    """
    return _statistic(z, directions, knots, _resolve(z, directions, knots, backend))[0].mean()


def characteristic_function(
    z: torch.Tensor, directions: torch.Tensor | Directions, *, knots: int = 17, backend: str = "auto"
) -> torch.Tensor:
    """Empirical characteristic function of every projection, which is what several GPUs average.

    `epps_pulley(characteristic_function(z, u), B).mean()` is `sigreg(z, u)`. With a batch spread evenly over processes,
    average this result over them (differentiably) and give `epps_pulley` the whole batch size.

    Args:
        z: As in `sigreg`.
        directions: As in `sigreg`.
        knots: As in `sigreg`.
        backend: As in `sigreg`.

    Returns:
        Shape (T, 2, K - 1, P), float32 or float64 as in `sigreg`: mean over the batch of cos(t_k h) and sin(t_k h) at
        knots 1 .. K-1. Knot 0 is left out: there it is 1 whatever z is.

    Raises:
        TypeError: As `sigreg`.
        ValueError: As `sigreg`.
    """
    return _statistic(z, directions, knots, _resolve(z, directions, knots, backend))[1]


def epps_pulley(ecf: torch.Tensor, batch: int) -> torch.Tensor:
    """Epps-Pulley statistic from an empirical characteristic function (the formula in `sigreg`, before its last mean).

    Args:
        ecf: Shape (T, 2, K - 1, P), from `characteristic_function`.
        batch: Number of samples behind it, over all processes.

    Returns:
        Shape (T, P), ecf's dtype.
    """
    knots = ecf.shape[2] + 1
    dt = LAST_KNOT / (knots - 1)
    normal = torch.exp(-0.5 * (dt * torch.arange(1, knots, dtype=ecf.dtype, device=ecf.device)).square())
    weight = 2 * dt * normal
    weight[-1] /= 2
    distance = (ecf[:, 0] - normal[:, None]).square() + ecf[:, 1].square()  # (T, K - 1, P)
    return batch * (weight[:, None] * distance).sum(1)


def _statistic(
    z: torch.Tensor, directions: torch.Tensor | Directions, knots: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The statistic (T, P) and the characteristic function (T, 2, K - 1, P), from the backend that was chosen."""
    # Operators take a tensor: directions, or the step of those of a key.
    seed = count = 0
    if isinstance(directions, Directions):
        count, seed = directions.count, directions.seed
        seed -= (seed >> 63) << 64  # operators take signed numbers
        step = directions.step
        # Filled on the device: a copy to it would wait for the device.
        directions = step if isinstance(step, torch.Tensor) else z.new_full((), step, dtype=torch.int64)
    if backend == "triton":
        from lewm.kernels.sigreg import sigreg_forward

        return sigreg_forward(z, directions, knots, seed=seed, count=count)
    if backend == "rust":
        return _sigreg_cpu(z.float(), directions if count else directions.float(), knots, seed, count)
    if count:
        directions = _keyed_directions(directions, seed, count, z.shape[2])
    ecf = _CharacteristicFunction.apply(z, directions, knots)
    return epps_pulley(ecf, z.shape[1]), ecf


@torch.library.custom_op("lewm::sigreg_directions", mutates_args=())
def _keyed_directions(step: torch.Tensor, seed: int, count: int, dim: int) -> torch.Tensor:
    """`sigreg_directions` on the device of `step`."""
    return sigreg_directions(dim, count, seed=seed % 2**64, step=int(step), device=step.device)


@_keyed_directions.register_fake
def _(step, seed, count, dim):
    return step.new_empty((dim, count), dtype=torch.float32)


@torch.library.custom_op("lewm::sigreg_cpu", mutates_args=(), device_types="cpu")
def _sigreg_cpu(
    z: torch.Tensor, directions: torch.Tensor, knots: int, seed: int = 0, count: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_statistic` of float32 tensors, in Rust. Both results are differentiable with respect to z."""
    count = count or directions.shape[1]
    statistic = torch.empty((len(z), count))
    ecf = torch.empty((len(z), 2, knots - 1, count))
    _core.sigreg_forward(_array(z), _source(directions, seed), statistic.numpy(), ecf.numpy())
    return statistic, ecf


@_sigreg_cpu.register_fake
def _(z, directions, knots, seed=0, count=0):
    T, P = z.shape[0], count or directions.shape[1]
    return z.new_empty((T, P)), z.new_empty((T, 2, knots - 1, P))


@torch.library.custom_op("lewm::sigreg_cpu_backward", mutates_args=(), device_types="cpu")
def _sigreg_cpu_backward(
    z: torch.Tensor,
    directions: torch.Tensor,
    ecf: torch.Tensor,
    statistic_grad: torch.Tensor | None,
    ecf_grad: torch.Tensor | None,
    seed: int = 0,
) -> torch.Tensor:
    """Gradient for z from those of the two results of `_sigreg_cpu` (None is zero)."""
    z_grad = torch.empty(z.shape)
    of_statistic, of_ecf = (None if grad is None else _array(grad) for grad in (statistic_grad, ecf_grad))
    _core.sigreg_backward(_array(z), _source(directions, seed), _array(ecf), of_statistic, of_ecf, z_grad.numpy())
    return z_grad


@_sigreg_cpu_backward.register_fake
def _(z, directions, ecf, statistic_grad, ecf_grad, seed=0):
    return z.new_empty(z.shape)


def _setup_context(ctx, inputs, output):
    z, directions, _, ctx.seed, _ = inputs
    ctx.save_for_backward(z, directions, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, statistic_grad, ecf_grad):
    z_grad = None
    if statistic_grad is not None or ecf_grad is not None:
        z_grad = _sigreg_cpu_backward(*ctx.saved_tensors, statistic_grad, ecf_grad, ctx.seed)
    return z_grad, None, None, None, None


_sigreg_cpu.register_autograd(_backward, setup_context=_setup_context)


def _source(directions: torch.Tensor, seed: int) -> np.ndarray | tuple[int, int]:
    """What Rust takes: directions (D, P), or the key of some."""
    return _array(directions) if directions.dim() else (seed % 2**64, int(directions) % 2**32)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's own memory where it is contiguous, else a copy."""
    return tensor.contiguous().numpy(force=True)


class _CharacteristicFunction(torch.autograd.Function):
    """(T, B, D), (D, P) -> (T, 2, K - 1, P). Knots are multiples of dt, so rotations by exp(i dt h) reach them all.

    Projections are made for a few time steps at once and made again in the backward pass, so nothing large is kept.
    """

    @staticmethod
    def forward(ctx, z, directions, knots):
        ctx.save_for_backward(z, directions)
        ctx.knots = knots
        z, directions = _as_computed(z, directions)
        ecf = torch.empty(
            (len(z), knots - 1, directions.shape[1]),
            dtype=torch.promote_types(z.dtype, torch.complex64),
            device=z.device,
        )
        steps = _steps(z, directions)
        for rows, means in zip(z.split(steps), ecf.split(steps), strict=True):
            turn = _turn(rows, directions, knots)  # (t, B, P)
            power = turn.clone()
            means[:, 0] = power.mean(1)
            for k in range(1, knots - 1):
                means[:, k] = power.mul_(turn).mean(1)
        return torch.stack((ecf.real, ecf.imag), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs, knots = ctx.saved_tensors, ctx.knots
        z, directions = _as_computed(*inputs)
        knot = LAST_KNOT / (knots - 1) * torch.arange(1, knots, dtype=z.dtype, device=z.device)
        # dL/dh = Re sum_k (dL/dS_k + i dL/dC_k) t_k exp(i t_k h) / B, a polynomial in exp(i dt h): Horner's rule.
        coefficients = torch.complex(grad[:, 1], grad[:, 0]) * (knot / z.shape[1])[:, None]  # (T, K - 1, P)
        z_grad = torch.empty_like(z)
        steps = _steps(z, directions)
        for rows, c, out in zip(z.split(steps), coefficients.split(steps), z_grad.split(steps), strict=True):
            turn = _turn(rows, directions, knots)
            total = turn * c[:, -1, None]
            for k in reversed(range(knots - 2)):
                total.add_(c[:, k, None]).mul_(turn)
            with torch.autocast(z.device.type, enabled=False):
                out.copy_(total.real @ directions.T)
        return z_grad.to(inputs[0].dtype), None, None


def _turn(z: torch.Tensor, directions: torch.Tensor, knots: int) -> torch.Tensor:
    """exp(i dt h) of the projections h, complex (t, B, P)."""
    with torch.autocast(z.device.type, enabled=False):
        angle = (z @ directions).mul_(LAST_KNOT / (knots - 1))
    return torch.complex(angle.cos(), angle.sin_())


def _steps(z: torch.Tensor, directions: torch.Tensor) -> int:
    """How many time steps are projected at once."""
    return max(1, _CHUNK // (z.shape[1] * directions.shape[1]))


def _as_computed(z: torch.Tensor, directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = _at_least_float32(z)
    return z, directions.to(z.dtype)


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _resolve(z: torch.Tensor, directions: torch.Tensor | Directions, knots: int, backend: str) -> str:
    """Check the arguments of `sigreg` and say which backend computes it."""
    if not z.is_floating_point():
        raise TypeError(f"z must be floating, got {z.dtype}")
    if z.dim() != 3 or 0 in z.shape:
        raise ValueError(f"z must have shape (T, B, D) without a zero, got {tuple(z.shape)}")
    name, tensor = "directions", directions
    if isinstance(directions, Directions):
        name, tensor = "step", directions.step
        _check_range("the width of z", z.shape[2], 1, 2**18)
    elif not directions.is_floating_point():
        raise TypeError(f"directions must be floating, got {directions.dtype}")
    elif directions.dim() != 2 or directions.shape[0] != z.shape[2] or directions.shape[1] == 0:
        raise ValueError(
            f"directions must have shape ({z.shape[2]}, P) with P at least 1, got {tuple(directions.shape)}"
        )
    if isinstance(tensor, torch.Tensor) and tensor.device != z.device:
        raise ValueError(f"{name} must be on {z.device} like z, got {tensor.device}")
    if knots < 2:
        raise ValueError(f"knots must be at least 2, got {knots}")
    if backend not in ("auto", "rust", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'rust', 'torch' or 'triton', got {backend!r}")
    if backend == "auto":
        fitting = (name for name in ("triton", "rust") if z.device.type == _HOME[name] and not _obstacle(z, name))
        return next(fitting, "torch")
    obstacle = _obstacle(z, backend)
    if obstacle:
        raise ValueError(f"backend {backend!r} cannot run here: {obstacle}")
    return backend


_HOME = {"triton": "cuda", "rust": "cpu"}


def _obstacle(z: torch.Tensor, backend: str) -> str | None:
    """Why a backend cannot take z; None if it can."""
    if backend == "torch":
        return None
    anywhere = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if z.device.type != _HOME[backend] and not anywhere:
        return f"z is on {z.device}, not on a {_HOME[backend].upper()} device"
    if z.dtype == torch.float64:
        return "z is float64"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None
