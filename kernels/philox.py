"""The planners' noise inside Triton kernels: Philox4x32-10 and Box-Muller, laid out as rust/core/src/rng/mod.rs says.

The words are the same everywhere. The normals are float32 numbers within 1e-6 of the formulas: polynomials and fused
multiply-adds in the order and with the coefficients of the Rust code, whose bits they have wherever a processor's
reciprocal square root is good to 1e-6.
"""

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four uint32 words of the counters (c0, c1, c2, c3) under the keys (k0, k1), uint32 tensors that broadcast.

    Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    for _ in tl.static_range(10):
        h0, h1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        c1, c3, c0, c2 = c2 * 0xCD9E8D57, c0 * 0xD2511F53, h1 ^ c1 ^ k0, h0 ^ c3 ^ k1
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(w0, w1):
    """(sqrt(-2 ln u) cos(2 pi v), sqrt(-2 ln u) sin(2 pi v)), u = ((w0 >> 8) + 1) 2^-24, v = (w1 >> 8) 2^-24."""
    # 2^24 u = 2^e m with m = 1 + f in [sqrt(1/2), sqrt(2)); the subtraction takes the 24 off e, too.
    whole = ((w0 >> 8) + 1).to(tl.int32).to(tl.float32)
    bits = whole.to(tl.int32, bitcast=True) - (0x3F3504F3 + (24 << 23))
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    log = _polynomial(f, (0.20164743, -0.32360995, 0.34486452, -0.39813766, 0.49942458, -0.6666943, 1.0000064))
    log = tl.fma(f * f, log, -2.0 * f)
    square = tl.fma((bits >> 23).to(tl.float32), tl.full(f.shape, -1.3862943611198906, tl.float32), log)  # -2 ln u
    # Newton's step after an approximate root rounds as a correct one does, without its branches. u = 1 gives 0.
    inverse = tl.rsqrt(tl.maximum(square, 1e-8))
    radius = square * inverse
    radius = tl.fma(tl.fma(-radius, radius, square), 0.5 * inverse, radius)
    # v in quarters of a turn from the nearest whole one, which is exact: x in [-1/2, 1/2).
    x = ((w1 << 2) & 0xFFFFFC00).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    y = x * x
    sin = x * _polynomial(y, (-0.004592289, 0.079675905, -0.64596295, 1.5707963))
    cos = _polynomial(y, (0.0009040217, -0.020860288, 0.25366923, -1.2337005, 1.0))
    # That whole one is in the upper two bits: odd ones swap sine and cosine; signs follow it, and the next one.
    quarter = w1 + (1 << 29)
    odd = (quarter & (1 << 30)) != 0
    n0 = radius * tl.where(odd, sin, cos)
    n1 = radius * tl.where(odd, cos, sin)
    return tl.where(((quarter + (1 << 30)) >> 31) == 1, -n0, n0), tl.where((quarter >> 31) == 1, -n1, n1)


@triton.jit
def _polynomial(x, coefficients: tl.constexpr):
    """Horner's rule; the highest power's coefficient is first."""
    value = tl.full(x.shape, coefficients[0], tl.float32)
    for i in tl.static_range(1, len(coefficients)):
        value = tl.fma(value, x, tl.full(x.shape, coefficients[i], tl.float32))
    return value


@triton.jit
def normals(seed, plan, iteration, env_id, sample, block):
    """Standard normals 4 block, 4 block + 1, 4 block + 2 and 4 block + 3 of a sample: four float32 tensors.

    seed is an int64 whose 64 bits count; the others are integers or tensors of them that broadcast, `plan`, `env_id`
    and `sample` below 2^32 (their low 32 bits count), `iteration` and `block` below 2^16.
    """
    c0 = tl.cast(iteration, tl.uint32) << 16 | tl.cast(block, tl.uint32)
    c1, c2, c3 = tl.cast(sample, tl.uint32), tl.cast(plan, tl.uint32), tl.cast(env_id, tl.uint32)
    seed = tl.cast(seed, tl.int64)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3
