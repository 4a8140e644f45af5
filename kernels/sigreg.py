"""SIGReg in one pass: projection, Epps-Pulley sums and their gradient, for Triton.

Neither the projections (T, B, P) nor anything of size (T, B, P, K) reaches memory, and of directions made from a key
nothing does. The derivation is in README.md beside this file; `lewm.losses` holds the same mathematics in PyTorch and
chooses between the two.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from lewm.kernels.philox import normals

ENV_ID = tl.constexpr(0xFFFFFFFF)  # the environment whose noise directions are made of, as in Rust
LAST_KNOT = 3.0  # knot k of K is k * LAST_KNOT / (K - 1), k = 0 .. K-1


@triton.jit
def _sincos(x):
    """(sin x, cos x): Cody-Waite reduction to [-pi/4, pi/4], then the minimax polynomials of Cephes."""
    # libdevice's sinf and cosf each carry a reduction of their own and a slow branch for huge arguments.
    n = tl.floor(x * 0.6366197723675814 + 0.5)
    r = ((x - n * 1.5703125) - n * 4.837512969970703125e-4) - n * 7.549789948768648e-8
    r2 = r * r
    s = r + r * r2 * ((-1.9515295891e-4 * r2 + 8.3321608736e-3) * r2 - 1.6666654611e-1)
    c = 1.0 - 0.5 * r2 + r2 * r2 * ((2.443315711809948e-5 * r2 - 1.388731625493765e-3) * r2 + 4.166664568298827e-2)
    quadrant = n.to(tl.int32)
    odd = (quadrant & 1) == 1
    sin = tl.where(odd, c, s)
    cos = tl.where(odd, s, c)
    return tl.where((quadrant & 2) == 2, -sin, sin), tl.where(((quadrant + 1) & 2) == 2, -cos, cos)


@triton.jit
def _project(z_ptr, u_ptr, rows, cols, B, D, P, z_stride_b, z_stride_d, u_stride_d, u_stride_p,
             BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """h[b, p] = sum_d z[b, d] u[d, p] for the rows and columns of one tile; zero outside (B, P)."""
    h = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = (d0 + tl.arange(0, BLOCK_D)).to(tl.int64)
        z = tl.load(z_ptr + rows[:, None] * z_stride_b + d[None, :] * z_stride_d,
                    mask=(rows[:, None] < B) & (d[None, :] < D), other=0.0).to(tl.float32)  # fmt: skip
        u = tl.load(u_ptr + d[:, None] * u_stride_d + cols[None, :] * u_stride_p,
                    mask=(d[:, None] < D) & (cols[None, :] < P), other=0.0).to(tl.float32)  # fmt: skip
        h = tl.dot(z, u, h, input_precision=PRECISION)
    return h


@triton.jit
def _project_keyed(z_ptr, seed, step, rows, cols, B, D, z_stride_b, z_stride_d, BLOCK_B: tl.constexpr,
                   BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(h, 1 / norm): h as in `_project`, along the directions of a key, which are noise divided by its norm."""
    h = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
    square = tl.zeros((BLOCK_P,), tl.float32)
    for d0 in range(0, D, 4 * BLOCK_D):
        block = d0 // 4 + tl.arange(0, BLOCK_D)
        u = normals(seed, step, 0, ENV_ID, cols[None, :], block[:, None])
        d = 4 * block[:, None]
        squares = tl.where(d < D, u[0] * u[0], 0.0) + tl.where(d + 1 < D, u[1] * u[1], 0.0)
        squares += tl.where(d + 2 < D, u[2] * u[2], 0.0) + tl.where(d + 3 < D, u[3] * u[3], 0.0)
        square += tl.sum(squares, axis=0)
        # One product for each of the four, so that they never have to be interleaved.
        for j in tl.static_range(4):
            column = (4 * block + j).to(tl.int64)[None, :]
            z = tl.load(z_ptr + rows[:, None] * z_stride_b + column * z_stride_d,
                        mask=(rows[:, None] < B) & (column < D), other=0.0).to(tl.float32)  # fmt: skip
            h = tl.dot(z, u[j], h, input_precision=PRECISION)
    # Where D is 1 a direction can be zero, and stays that.
    inverse = tl.rsqrt(tl.maximum(square, 1e-30))
    return h * inverse[None, :], inverse


@triton.jit
def _sigreg_fwd_kernel(z_ptr, u_ptr, statistic_ptr, ecf_ptr, seed, B, D, P,
                       z_stride_t, z_stride_b, z_stride_d, u_stride_d, u_stride_p,
                       KEYED: tl.constexpr, KNOTS: tl.constexpr, DT: tl.constexpr, BLOCK_B: tl.constexpr,
                       BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
                       PRECISION: tl.constexpr):  # fmt: skip
    """ecf[t, :, k-1, p] = mean_b (cos, sin)(t_k h[b, p]);  statistic[t, p] = B sum_k w_k |ecf_k - exp(-t_k^2/2)|^2."""
    t = tl.program_id(0).to(tl.int64)
    cols = (tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    step = tl.load(u_ptr) if KEYED else 0
    index = tl.arange(0, BLOCK_K)[:, None]
    cos_sum = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    sin_sum = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    for b0 in range(0, B, BLOCK_B):
        rows = (b0 + tl.arange(0, BLOCK_B)).to(tl.int64)
        if KEYED:
            h, _ = _project_keyed(z_ptr + t * z_stride_t, seed, step, rows, cols, B, D, z_stride_b,
                                  z_stride_d, BLOCK_B, BLOCK_P, BLOCK_D, PRECISION)  # fmt: skip
        else:
            h = _project(z_ptr + t * z_stride_t, u_ptr, rows, cols, B, D, P, z_stride_b, z_stride_d, u_stride_d,
                         u_stride_p, BLOCK_B, BLOCK_P, BLOCK_D, PRECISION)  # fmt: skip
        sin1, cos1 = _sincos(h * DT)
        # Padding rows start at 0 + 0i and stay there under rotation, so they add nothing to the sums.
        cos = tl.where(rows[:, None] < B, cos1, 0.0)
        sin = tl.where(rows[:, None] < B, sin1, 0.0)
        for k in range(KNOTS - 1):
            cos_sum += tl.where(index == k, tl.sum(cos, axis=0)[None, :], 0.0)
            sin_sum += tl.where(index == k, tl.sum(sin, axis=0)[None, :], 0.0)
            turned = cos * cos1 - sin * sin1
            sin = sin * cos1 + cos * sin1
            cos = turned
    cos_mean = cos_sum / B
    sin_mean = sin_sum / B

    knot = (index + 1).to(tl.float32) * DT
    normal = tl.exp(-0.5 * knot * knot)
    weight = tl.where(index < KNOTS - 2, 2.0 * DT, tl.where(index == KNOTS - 2, 1.0 * DT, 0.0)) * normal
    distance = (cos_mean - normal) * (cos_mean - normal) + sin_mean * sin_mean
    tl.store(statistic_ptr + t * P + cols, tl.sum(weight * distance, axis=0) * B, mask=cols < P)
    out = ecf_ptr + (t * 2 * (KNOTS - 1) + index) * P + cols[None, :]
    mask = (index < KNOTS - 1) & (cols[None, :] < P)
    tl.store(out, cos_mean, mask=mask)
    tl.store(out + (KNOTS - 1) * P, sin_mean, mask=mask)


@triton.jit
def _sigreg_bwd_kernel(z_ptr, u_ptr, ecf_ptr, statistic_grad_ptr, ecf_grad_ptr, out_ptr, seed, T, B, D, P,
                       columns_per_split, z_stride_t, z_stride_b, z_stride_d, u_stride_d, u_stride_p,
                       grad_stride_t, grad_stride_p, KEYED: tl.constexpr, KNOTS: tl.constexpr, DT: tl.constexpr,
                       HAS_STATISTIC_GRAD: tl.constexpr, HAS_ECF_GRAD: tl.constexpr, BLOCK_B: tl.constexpr,
                       BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
                       PRECISION: tl.constexpr):  # fmt: skip
    """out[split, t, b] = sum_p g[b, p] u[:, p] over the split; g = sum_k t_k (dL/dS_k cos - dL/dC_k sin)(t_k h) / B."""
    row_blocks = tl.cdiv(B, BLOCK_B)
    t = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = ((tl.program_id(0) % row_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    split = tl.program_id(1)
    out_cols = (tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)
    out_block = tl.program_id(2) * (BLOCK_OUT // 4) + tl.arange(0, BLOCK_OUT // 4)
    if KEYED:
        step = tl.load(u_ptr)
        # the sums over p of columns 4 out_block, 4 out_block + 1, ..
        acc0 = tl.zeros((BLOCK_B, BLOCK_OUT // 4), tl.float32)
        acc1, acc2, acc3 = acc0, acc0, acc0
    else:
        acc = tl.zeros((BLOCK_B, BLOCK_OUT), tl.float32)
    first = split * columns_per_split
    for p0 in range(first, tl.minimum(first + columns_per_split, P), BLOCK_P):
        cols = (p0 + tl.arange(0, BLOCK_P)).to(tl.int64)
        live = cols < P
        if KEYED:
            h, inverse = _project_keyed(z_ptr + t * z_stride_t, seed, step, rows, cols, B, D, z_stride_b,
                                        z_stride_d, BLOCK_B, BLOCK_P, BLOCK_D, PRECISION)  # fmt: skip
        else:
            h = _project(z_ptr + t * z_stride_t, u_ptr, rows, cols, B, D, P, z_stride_b, z_stride_d, u_stride_d,
                         u_stride_p, BLOCK_B, BLOCK_P, BLOCK_D, PRECISION)  # fmt: skip
        sin1, cos1 = _sincos(h * DT)
        if HAS_STATISTIC_GRAD:
            scale = (
                2.0 * B * tl.load(statistic_grad_ptr + t * grad_stride_t + cols * grad_stride_p, mask=live, other=0.0)
            )
        # Horner's rule for the real part of sum_k (dL/dS_k + i dL/dC_k) t_k e^(i k dt h): no power is ever formed.
        real = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
        imag = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
        for j in tl.static_range(KNOTS - 1):
            at = (t * 2 * (KNOTS - 1) + KNOTS - 2 - j) * P + cols
            knot = tl.full((), (KNOTS - 1 - j) * DT, tl.float32)
            cos_grad = tl.zeros((BLOCK_P,), tl.float32)
            sin_grad = tl.zeros((BLOCK_P,), tl.float32)
            if HAS_STATISTIC_GRAD:
                normal = tl.exp(-0.5 * knot * knot)
                weight = (DT if j == 0 else 2.0 * DT) * normal
                cos_grad += scale * weight * (tl.load(ecf_ptr + at, mask=live, other=0.0) - normal)
                sin_grad += scale * weight * tl.load(ecf_ptr + at + (KNOTS - 1) * P, mask=live, other=0.0)
            if HAS_ECF_GRAD:
                cos_grad += tl.load(ecf_grad_ptr + at, mask=live, other=0.0)
                sin_grad += tl.load(ecf_grad_ptr + at + (KNOTS - 1) * P, mask=live, other=0.0)
            x = real + (sin_grad * knot)[None, :]
            y = imag + (cos_grad * knot)[None, :]
            real = x * cos1 - y * sin1
            imag = x * sin1 + y * cos1
        if KEYED:
            real *= inverse[None, :]
            u0, u1, u2, u3 = normals(seed, step, 0, ENV_ID, cols[:, None], out_block[None, :])
            acc0 = tl.dot(real, u0, acc0, input_precision=PRECISION)
            acc1 = tl.dot(real, u1, acc1, input_precision=PRECISION)
            acc2 = tl.dot(real, u2, acc2, input_precision=PRECISION)
            acc3 = tl.dot(real, u3, acc3, input_precision=PRECISION)
        else:
            u = tl.load(u_ptr + out_cols[None, :] * u_stride_d + cols[:, None] * u_stride_p,
                        mask=(out_cols[None, :] < D) & live[:, None], other=0.0).to(tl.float32)  # fmt: skip
            acc = tl.dot(real, u, acc, input_precision=PRECISION)
    out = out_ptr + ((split.to(tl.int64) * T + t) * B + rows[:, None]) * D
    if KEYED:
        d = 4 * out_block[None, :]
        tl.store(out + d, acc0 / B, mask=(rows[:, None] < B) & (d < D))
        tl.store(out + d + 1, acc1 / B, mask=(rows[:, None] < B) & (d + 1 < D))
        tl.store(out + d + 2, acc2 / B, mask=(rows[:, None] < B) & (d + 2 < D))
        tl.store(out + d + 3, acc3 / B, mask=(rows[:, None] < B) & (d + 3 < D))
    else:
        tl.store(out + out_cols[None, :], acc / B, mask=(rows[:, None] < B) & (out_cols[None, :] < D))


def _blocks(n: int, low: int, high: int) -> int:
    """The smallest power of two that holds n, kept between low and high."""
    return min(max(triton.next_power_of_2(n), low), high)


# The largest tiles for which no register is spilled on sm_80 to sm_120 in "ieee" (README.md, "Tiles").
def forward_tiles(batch: int, knots: int, precision: str, keyed: bool = False) -> dict[str, int | str]:
    """Compile-time arguments and warps of the forward kernel."""
    return {"BLOCK_B": _blocks(batch, 16, 128), "BLOCK_P": 32, "BLOCK_D": 16, "num_warps": 8,
            "BLOCK_K": triton.next_power_of_2(knots - 1), **_constants(knots, precision, keyed)}  # fmt: skip


def backward_tiles(batch: int, dim: int, knots: int, precision: str, keyed: bool = False) -> dict[str, int | str]:
    """Compile-time arguments and warps of the backward kernel."""
    return {"BLOCK_B": _blocks(batch, 16, 32), "BLOCK_P": 16, "BLOCK_D": 16, "num_warps": 8,
            "BLOCK_OUT": _blocks(dim, 64 if keyed else 16, 256), **_constants(knots, precision, keyed)}  # fmt: skip


def _constants(knots: int, precision: str, keyed: bool) -> dict[str, int | float | str | bool]:
    # Fusion of a * b + c is asked for by name because Triton 3.10 turns it off unless told. With a key the arithmetic
    # of the noise hides the loads, and copies ahead of time would cost registers.
    return {"KEYED": keyed, "KNOTS": knots, "DT": LAST_KNOT / (knots - 1), "PRECISION": precision,
            "enable_fp_fusion": True, "num_stages": 1 if keyed else 3}  # fmt: skip


@torch.library.custom_op("lewm::sigreg", mutates_args=())
def sigreg_forward(
    z: torch.Tensor, directions: torch.Tensor, knots: int = 17, precision: str = "ieee", seed: int = 0, count: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Epps-Pulley statistic of every projection, and the empirical characteristic function that it is made from.

    Both results are differentiable with respect to `z`; `directions` gets no gradient.

    Args:
        z: Embeddings of shape (T, B, D), float32, bfloat16 or float16, any strides.
        directions: Unit directions of shape (D, P), any floating dtype (read as float32), any strides; or the step of
            those of a key (`lewm.losses.Directions`), int64 of shape (), which the kernel reads where it lies.
        knots: Number of knots K on [0, 3].
        precision: "ieee" for float32 products, "tf32" for tensor cores (relative error about 1e-3 in the projection).
        seed: Seed of a key; its 64 bits count, whatever the sign.
        count: Number of directions P of a key.

    Returns:
        `(statistic, ecf)`, float32. statistic is (T, P): B sum_k w_k |ecf_k - exp(-t_k^2 / 2)|^2. ecf is
        (T, 2, K - 1, P): mean cosine and mean sine over the batch at knots 1 .. K-1 (at knot 0 it is 1 for any z).

    Raises:
        TypeError: if z is float64, which would silently be computed in float32.
    """
    if z.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"z must be float32, bfloat16 or float16, got {z.dtype}")
    T, B, D = z.shape
    P, keyed = _count(directions, count), directions.dim() == 0
    statistic = torch.empty((T, P), dtype=torch.float32, device=z.device)
    ecf = torch.empty((T, 2, knots - 1, P), dtype=torch.float32, device=z.device)
    tiles = forward_tiles(B, knots, precision, keyed)
    with torch.cuda.device_of(z):
        _sigreg_fwd_kernel[T, triton.cdiv(P, tiles["BLOCK_P"])](
            z, directions, statistic, ecf, seed, B, D, P, *z.stride(), *_strides(directions), **tiles
        )  # fmt: skip
    return statistic, ecf


def _count(directions: torch.Tensor, count: int) -> int:
    return directions.shape[1] if directions.dim() else count


def _strides(directions: torch.Tensor) -> tuple[int, ...]:
    return directions.stride() or (0, 0)


@sigreg_forward.register_fake
def _(z, directions, knots=17, precision="ieee", seed=0, count=0):
    T, P = z.shape[0], _count(directions, count)
    return z.new_empty((T, P), dtype=torch.float32), z.new_empty((T, 2, knots - 1, P), dtype=torch.float32)


@torch.library.custom_op("lewm::sigreg_backward", mutates_args=())
def sigreg_backward(
    z: torch.Tensor,
    directions: torch.Tensor,
    ecf: torch.Tensor,
    statistic_grad: torch.Tensor | None,
    ecf_grad: torch.Tensor | None,
    knots: int,
    precision: str,
    seed: int = 0,
) -> torch.Tensor:
    """Gradient for z, (T, B, D) in z's dtype, from those of the two results of `sigreg_forward` (None is zero)."""
    T, B, D = z.shape
    P, keyed = ecf.shape[3], directions.dim() == 0
    tiles = backward_tiles(B, D, knots, precision, keyed)
    row_blocks, out_blocks = triton.cdiv(B, tiles["BLOCK_B"]), triton.cdiv(D, tiles["BLOCK_OUT"])
    # P is cut into a few sums when T and B give too few programs for a GPU: by shape alone and without atomics, so that
    # the result is the same bits in every run.
    splits = max(1, min(8, 128 // (T * row_blocks * out_blocks), triton.cdiv(P, tiles["BLOCK_P"])))
    columns = triton.cdiv(triton.cdiv(P, splits), tiles["BLOCK_P"]) * tiles["BLOCK_P"]
    parts = torch.empty((splits, T, B, D), dtype=torch.float32, device=z.device)
    # An expanded gradient (that of a mean) is read through its zero strides; one that is absent is never read.
    grad = ecf if statistic_grad is None else statistic_grad
    with torch.cuda.device_of(z):
        _sigreg_bwd_kernel[T * row_blocks, splits, out_blocks](
            z, directions, ecf, grad, ecf if ecf_grad is None else ecf_grad.contiguous(), parts, seed, T, B, D, P,
            columns, *z.stride(), *_strides(directions), grad.stride(0), grad.stride(1),
            HAS_STATISTIC_GRAD=statistic_grad is not None, HAS_ECF_GRAD=ecf_grad is not None, **tiles,
        )  # fmt: skip
    return (parts[0] if splits == 1 else parts.sum(0)).to(z.dtype)


@sigreg_backward.register_fake
def _(z, directions, ecf, statistic_grad, ecf_grad, knots, precision, seed=0):
    return z.new_empty(z.shape)


def _setup_context(ctx, inputs, output):
    z, directions, ctx.knots, ctx.precision, ctx.seed, _ = inputs
    ctx.save_for_backward(z, directions, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, statistic_grad, ecf_grad):
    z_grad = None
    if statistic_grad is not None or ecf_grad is not None:
        z_grad = sigreg_backward(*ctx.saved_tensors, statistic_grad, ecf_grad, ctx.knots, ctx.precision, ctx.seed)
    return z_grad, None, None, None, None, None


sigreg_forward.register_autograd(_backward, setup_context=_setup_context)


def examples(_target: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """What `lewm.kernels.code` compiles: the paper's size in the types that training gives it, and the smallest."""

    def forward(T, B, D, P, knots=17, dtype=torch.float32, precision="ieee", keyed=False):
        z = torch.empty(T, B, D, dtype=dtype, device="meta")
        u = torch.empty((), dtype=torch.int64, device="meta") if keyed else torch.empty(D, P, device="meta")
        return lambda: sigreg_forward._init_fn(z, u, knots, precision, 0, P if keyed else 0)

    def backward(T, B, D, P, knots=17, dtype=torch.float32, precision="ieee", keyed=False, of_ecf=False):
        z = torch.empty(T, B, D, dtype=dtype, device="meta")
        u = torch.empty((), dtype=torch.int64, device="meta") if keyed else torch.empty(D, P, device="meta")
        ecf, grad = torch.empty(T, 2, knots - 1, P, device="meta"), torch.empty(T, P, device="meta")
        grads = (None, ecf) if of_ecf else (grad, None)
        return lambda: sigreg_backward._init_fn(z, u, ecf, *grads, knots, precision)

    paper = 4, 128, 192, 1024
    for run in (forward, backward):
        yield "paper", run(*paper)
        yield "paper, from a key", run(*paper, keyed=True)
        yield "paper, bfloat16 input", run(*paper, dtype=torch.bfloat16)
        yield "paper, tf32", run(*paper, precision="tf32")
        yield "ones", run(1, 1, 1, 1, knots=2)
        yield "ones, from a key", run(1, 1, 1, 1, knots=2, keyed=True)
    yield "paper, gradient of the characteristic function", backward(*paper, of_ecf=True)
