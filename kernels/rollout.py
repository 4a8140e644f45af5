"""The batched predictor rollout: two kernels a layer, one for each half of it.

What is computed, how it is cut into programs, and what it costs is in README.md beside this file; `lewm.network` is the
same mathematics in PyTorch and the reference of the tests.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_PLAIN_EPS = tl.constexpr(1e-6)  # of the norms without gain
_NORM_EPS = tl.constexpr(1e-5)  # of those with one
# The interpreter keeps bfloat16 numbers as integers, which its matrix product would multiply.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# ------------------------------------------------------------------------------------------------- inside the kernels
# A row of width N is a tuple of tiles of C columns: tiles have widths that are powers of two, rows need not.


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b, summed in float32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _load_rows(ptr, rows, stride, live, N: tl.constexpr, C: tl.constexpr):
    """Rows of a matrix in float32; dead ones are zero."""
    out = ()
    for c in tl.static_range(N // C):
        columns = c * C + tl.arange(0, C)
        out = out + (
            tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=live[:, None], other=0.0).to(tl.float32),
        )
    return out


@triton.jit
def _load_matrix(ptr, stride, first, N: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """Columns first .. first + WIDTH of a matrix of N rows, as tiles (C, WIDTH)."""
    columns = first + tl.arange(0, WIDTH)
    out = ()
    for c in tl.static_range(N // C):
        inputs = c * C + tl.arange(0, C)
        out = out + (tl.load(ptr + inputs[:, None] * stride + columns[None, :]),)
    return out


@triton.jit
def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros((ROWS, WIDTH), tl.float32),)
    return out


@triton.jit
def _product(a, FIRST: tl.constexpr, matrix, bias, COUNT: tl.constexpr, PRECISION: tl.constexpr):
    """bias + sum_c a[FIRST + c] matrix[c], bias of shape (1, WIDTH)."""
    total = tl.zeros((a[FIRST].shape[0], matrix[0].shape[1]), tl.float32) + bias
    for c in tl.static_range(COUNT):
        total = _dot(a[FIRST + c], matrix[c], total, PRECISION)
    return total


@triton.jit
def _normalised(x, N: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr):
    """(x - mean) / sqrt(variance + eps) of every row."""
    total = tl.sum(x[0], axis=1)
    for c in tl.static_range(1, N // C):
        total += tl.sum(x[c], axis=1)
    mean = total / N
    shifted = ()
    for c in tl.static_range(N // C):
        shifted = shifted + (x[c] - mean[:, None],)
    square = tl.sum(shifted[0] * shifted[0], axis=1)
    for c in tl.static_range(1, N // C):
        square += tl.sum(shifted[c] * shifted[c], axis=1)
    scale = 1.0 / tl.sqrt(square / N + EPS)
    out = ()
    for c in tl.static_range(N // C):
        out = out + (shifted[c] * scale[:, None],)
    return out


@triton.jit
def _modulated(x, shift_ptr, stride, rows, live, TYPE: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """The operand of half a layer: norm(norm(x) (1 + scale) + shift). Shift and scale lie one behind the other."""
    plain = _normalised(x, N, C, _PLAIN_EPS)
    shift = _load_rows(shift_ptr, rows, stride, live, N, C)
    scale = _load_rows(shift_ptr + N, rows, stride, live, N, C)
    moved = ()
    for c in tl.static_range(N // C):
        moved = moved + (plain[c] * (1.0 + scale[c]) + shift[c],)
    normed = _normalised(moved, N, C, _NORM_EPS)
    out = ()
    for c in tl.static_range(N // C):
        out = out + (normed[c].to(TYPE),)
    return out


@triton.jit
def _gelu(x, EXACT: tl.constexpr):
    """x (1 + erf(x / sqrt 2)) / 2; if not EXACT to 1.9e-4, for results that are rounded to bfloat16."""
    if EXACT:
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    c = tl.minimum(tl.maximum(x, -4.0), 4.0)
    t = c * c
    q = 2.2781510011782302e-08 * t - 1.5986082644303679e-06
    q = q * t + 4.79557020298671e-05
    q = q * t - 0.0008140180725604296
    q = q * t + 0.008772405795753002
    q = q * t - 0.06457316130399704
    q = q * t + 0.39788341522216797
    return x * (0.5 + c * q)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _add_rows(ptr, rows, live, columns, width, value, SPLITS: tl.constexpr):
    """Stores the value, or adds it to what the other splits add.

    Addends are rounded to multiples of 2^-16: sums of such numbers below 256 are exact in float32, so the order in
    which splits come does not show in the bits.
    """
    at = ptr + rows[:, None] * width + columns[None, :]
    if SPLITS == 1:
        tl.store(at, value, mask=live[:, None])
    else:
        rounded = tl.floor(value * 65536.0 + 0.5) * 0.0000152587890625
        tl.atomic_add(at, rounded, mask=live[:, None], sem="relaxed")


# ------------------------------------------------------------------------------------------------------- the kernels
# Numbers of rows are not specialised: one candidate, and any other number, take code that is compiled already.


@triton.jit(do_not_specialize=["R", "H", "sums"])
def _condition_kernel(action_ptr, up_ptr, up_bias_ptr, down_ptr, down_bias_ptr, out_ptr, token_ptr, sums_ptr, R, H,
                      sums, A: tl.constexpr, INPUTS: tl.constexpr, HIDDEN: tl.constexpr, CHUNK: tl.constexpr,
                      N: tl.constexpr, C: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """out[h R + r] = silu(down silu(up action[r, h])): the condition of every action block (R, H, A).

    Clears token (H R, N) and the first rows of sums, in STRIPS of H R: what the kernels of the rollout add to.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = rows < R * H
    inputs = tl.arange(0, INPUTS)
    source = (rows % R) * H + rows // R
    action = tl.load(action_ptr + source[:, None] * A + inputs[None, :], mask=live[:, None] & (inputs < A)[None, :],
                     other=0.0).to(up_ptr.dtype.element_ty)  # fmt: skip
    total = _zeros(N // C, ROWS, C)
    for first in range(0, HIDDEN, CHUNK):
        units = first + tl.arange(0, CHUNK)
        up = tl.load(up_ptr + inputs[:, None] * HIDDEN + units[None, :])
        hidden = _dot(action, up, tl.zeros((ROWS, CHUNK), tl.float32), PRECISION)
        hidden = _silu(hidden + tl.load(up_bias_ptr + units)[None, :]).to(up_ptr.dtype.element_ty)
        new = ()
        for c in tl.static_range(N // C):
            columns = c * C + tl.arange(0, C)
            new = new + (_dot(hidden, tl.load(down_ptr + units[:, None] * N + columns[None, :]), total[c], PRECISION),)
        total = new
    for c in tl.static_range(N // C):
        columns = c * C + tl.arange(0, C)
        value = _silu(total[c] + tl.load(down_bias_ptr + columns)[None, :])
        tl.store(out_ptr + rows[:, None] * N + columns[None, :], value, mask=live[:, None])
        zero = tl.zeros((ROWS, C), tl.float32)
        if STRIPS > 0:
            tl.store(token_ptr + rows[:, None] * N + columns[None, :], zero, mask=live[:, None])
        for strip in tl.static_range(STRIPS):
            more = strip * R * H + rows
            tl.store(sums_ptr + more[:, None] * N + columns[None, :], zero, mask=(live & (more < sums))[:, None])


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(x_ptr, matrix_ptr, bias_ptr, out_ptr, M, OUTPUTS, N: tl.constexpr, C: tl.constexpr,
                   WIDTH: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """out = x matrix + bias, x (M, N): the modulation of all layers by every action."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = rows < M
    first = tl.program_id(1) * WIDTH
    columns = first + tl.arange(0, WIDTH)
    matrix = _load_matrix(matrix_ptr, OUTPUTS, first, N, C, WIDTH)
    x = ()
    for c in tl.static_range(N // C):
        inputs = c * C + tl.arange(0, C)
        x = x + (tl.load(x_ptr + rows[:, None] * N + inputs[None, :], mask=live[:, None], other=0.0),)
    value = _product(x, 0, matrix, tl.load(bias_ptr + columns)[None, :], N // C, PRECISION)
    tl.store(out_ptr + rows[:, None] * OUTPUTS + columns[None, :], value, mask=live[:, None])


@triton.jit(do_not_specialize=["R"])
def _attention_kernel(x_ptr, position_ptr, modulation_ptr, qkv_ptr, qkv_bias_ptr, out_ptr, out_bias_ptr, alone_ptr,
                      alone_bias_ptr, key_ptr, value_ptr, operand_ptr, y_ptr, zero_ptr, R, STRIDE: tl.constexpr,
                      N: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, WINDOW: tl.constexpr,
                      FROM: tl.constexpr, ASKS: tl.constexpr, KEEP: tl.constexpr, CLEAR: tl.constexpr,
                      SAME: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """y = x + gate attention(operand(x)) at the positions ASKS .. WINDOW - 1 of every candidate.

    x is what is given plus position (WINDOW, N); x, y: (WINDOW, R, N), with SAME x: (R, N) at all positions. Positions
    below FROM have left their keys and values in key and value (., R, HEADS HEAD); KEEP leaves those of the others
    there. A program has some candidates and, of SPLITS, one share of the heads. CLEAR: zero (WINDOW, R, N) is cleared.
    """
    TYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    TILES: tl.constexpr = N // C
    LOOKS: tl.constexpr = ASKS if ASKS > 1 else 1  # position 0 sees only itself
    SHARE: tl.constexpr = HEADS // SPLITS
    first = tl.program_id(0).to(tl.int64) * ROWS  # in scalar registers, unlike the rows within a program
    rows = tl.arange(0, ROWS)
    live = rows < R - tl.program_id(0) * ROWS
    split = tl.program_id(1)
    inputs = tl.arange(0, C)
    within = tl.arange(0, HEAD)

    # The operand goes through memory: kept in registers through the loop over heads, it would leave too few for the
    # rest. All splits of the same candidates write the same numbers.
    for p in tl.static_range(FROM, WINDOW):
        at = p * R + first
        plain = _load_rows(x_ptr + (first if SAME else at) * N, rows, N, live, N, C)
        x = ()
        for c in tl.static_range(TILES):
            x = x + (plain[c] + tl.load(position_ptr + p * N + c * C + inputs)[None, :],)
        operand = _modulated(x, modulation_ptr + at * STRIDE, STRIDE, rows, live, TYPE, N, C)
        for c in tl.static_range(TILES):
            to = operand_ptr + at * N + rows[:, None] * N + (c * C + inputs)[None, :]
            tl.store(to, operand[c], mask=live[:, None])
    tl.debug_barrier()

    if ASKS == 0:
        for c in tl.static_range(TILES):
            if split == c % SPLITS if SPLITS > 1 else True:
                _alone(x_ptr, position_ptr, modulation_ptr, alone_ptr, alone_bias_ptr, operand_ptr, y_ptr, first, rows,
                       live, c * C, STRIDE, N, C, STAGES, PRECISION)  # fmt: skip

    total = _zeros((WINDOW - LOOKS) * TILES, ROWS, C)
    if KEEP or WINDOW > LOOKS:
        for g in range(SHARE):
            head = split * SHARE + g
            # Query, key and value of every position from FROM; a query only if the position looks at others.
            maps = ()
            for _ in tl.static_range(FROM, WINDOW):
                for part in tl.static_range(3):
                    bias = tl.load(qkv_bias_ptr + (part * HEADS + head) * HEAD + within)[None, :]
                    maps = maps + (tl.zeros((ROWS, HEAD), tl.float32) + bias,)
            for k in tl.range(0, TILES, num_stages=STAGES):
                matrices = ()
                for part in tl.static_range(3):
                    map_ptr = qkv_ptr + (part * HEADS + head) * (N * HEAD) + k * (C * HEAD)
                    matrices = matrices + (tl.load(map_ptr + inputs[:, None] * HEAD + within[None, :]),)
                new = ()
                for p in tl.static_range(FROM, WINDOW):
                    a_ptr = operand_ptr + (p * R + first) * N + k * C
                    a = tl.load(a_ptr + rows[:, None] * N + inputs[None, :], mask=live[:, None], other=0.0)
                    for part in tl.static_range(3):
                        total_of = maps[3 * (p - FROM) + part]
                        if part > 0 or p >= LOOKS:
                            total_of = _dot(a, matrices[part], total_of, PRECISION)
                        new = new + (total_of,)
                maps = new
            keys = ()
            values = ()
            for p in tl.static_range(WINDOW):
                tile = (p * R + first) * (HEADS * HEAD) + head * HEAD
                kept = rows[:, None] * (HEADS * HEAD) + within[None, :]
                if p < FROM:
                    key = tl.load(key_ptr + tile + kept, mask=live[:, None], other=0.0)
                    value = tl.load(value_ptr + tile + kept, mask=live[:, None], other=0.0)
                else:
                    key = maps[3 * (p - FROM) + 1].to(TYPE)
                    value = maps[3 * (p - FROM) + 2].to(TYPE)
                    if KEEP:
                        tl.store(key_ptr + tile + kept, key, mask=live[:, None])
                        tl.store(value_ptr + tile + kept, value, mask=live[:, None])
                keys = keys + (key,)
                values = values + (value,)
            if WINDOW > LOOKS:
                seen = ()
                for p in tl.static_range(LOOKS, WINDOW):
                    query = maps[3 * (p - FROM)]
                    top = tl.sum(query * keys[0].to(tl.float32), axis=1)
                    scores = (top,)
                    for u in tl.static_range(1, p + 1):
                        score = tl.sum(query * keys[u].to(tl.float32), axis=1)
                        top = tl.maximum(top, score)
                        scores = scores + (score,)
                    weight = tl.exp(scores[0] - top)
                    weights = weight
                    mixed = weight[:, None] * values[0].to(tl.float32)
                    for u in tl.static_range(1, p + 1):
                        weight = tl.exp(scores[u] - top)
                        weights += weight
                        mixed += weight[:, None] * values[u].to(tl.float32)
                    seen = seen + ((mixed / weights[:, None]).to(TYPE),)
                more = ()
                for c in tl.static_range(TILES):
                    tile_ptr = out_ptr + head * (HEAD * N) + c * C
                    out_matrix = tl.load(tile_ptr + within[:, None] * N + inputs[None, :])
                    for p in tl.static_range(LOOKS, WINDOW):
                        more = more + (_dot(seen[p - LOOKS], out_matrix, total[len(more)], PRECISION),)
                total = more

    for c in tl.static_range(TILES):
        columns = c * C + tl.arange(0, C)
        # What is not shared by heads is shared by columns.
        mine = split == c % SPLITS if SPLITS > 1 else True
        for p in tl.static_range(LOOKS, WINDOW):
            value = total[c * (WINDOW - LOOKS) + p - LOOKS]
            if mine:
                value += tl.load(out_bias_ptr + columns)[None, :]
            at = p * R + first
            _finish(x_ptr, position_ptr, modulation_ptr, y_ptr, first if SAME else at, at, p, rows, live, columns,
                    STRIDE, value, mine, N, SPLITS)  # fmt: skip
        if CLEAR:
            if mine:
                for p in tl.static_range(ASKS, WINDOW):
                    clear_ptr = zero_ptr + (p * R + first) * N + rows[:, None] * N + columns[None, :]
                    tl.store(clear_ptr, tl.zeros((ROWS, C), tl.float32), mask=live[:, None])


@triton.jit
def _alone(x_ptr, position_ptr, modulation_ptr, matrix_ptr, bias_ptr, operand_ptr, y_ptr, first, rows, live, column,
           STRIDE: tl.constexpr, N: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """One tile of y at position 0, which sees only itself: there attention is one linear map."""
    inputs = tl.arange(0, C)
    columns = column + inputs
    value = tl.zeros((rows.shape[0], C), tl.float32) + tl.load(bias_ptr + columns)[None, :]
    for i in tl.range(0, N // C, num_stages=STAGES):
        a_ptr = operand_ptr + first * N + i * C
        a = tl.load(a_ptr + rows[:, None] * N + inputs[None, :], mask=live[:, None], other=0.0)
        matrix = tl.load(matrix_ptr + i * (C * N) + inputs[:, None] * N + columns[None, :])
        value = _dot(a, matrix, value, PRECISION)
    _finish(x_ptr, position_ptr, modulation_ptr, y_ptr, first, first, 0, rows, live, columns, STRIDE, value, True, N, 1)


@triton.jit
def _finish(x_ptr, position_ptr, modulation_ptr, y_ptr, source, at, p, rows, live, columns, STRIDE, value, mine,
            N: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Adds gate value, and x for one of the splits, to one tile of y at position p.

    Their first rows are `source` of x and `at` of y.
    """
    gate_ptr = modulation_ptr + at * STRIDE + 2 * N
    gate = tl.load(gate_ptr + rows[:, None] * STRIDE + columns[None, :], mask=live[:, None], other=0.0)
    value = gate.to(tl.float32) * value
    if mine:
        value += tl.load(x_ptr + source * N + rows[:, None] * N + columns[None, :], mask=live[:, None], other=0.0)
        value += tl.load(position_ptr + p * N + columns)[None, :]
    _add_rows(y_ptr + at * N, rows, live, columns, N, value, SPLITS)


@triton.jit(do_not_specialize=["M"])
def _mlp_kernel(x_ptr, modulation_ptr, up_ptr, up_bias_ptr, down_ptr, down_bias_ptr, y_ptr, zero_ptr, M,
                STRIDE: tl.constexpr, N: tl.constexpr, C: tl.constexpr, HIDDEN: tl.constexpr, CHUNK: tl.constexpr,
                OUTPUTS: tl.constexpr, C_OUT: tl.constexpr, LAYER: tl.constexpr, STRIPS: tl.constexpr,
                SPLITS: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """LAYER: y = x + gate mlp(operand(x)), else y = mlp(norm(x)); mlp(a) = down gelu(up a). x (M, N), y (M, OUTPUTS).

    A program has some rows and, of SPLITS, one share of the hidden units. It clears zero, STRIPS times as long as x.
    """
    TYPE: tl.constexpr = up_ptr.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    live = rows < M - tl.program_id(0) * ROWS
    split = tl.program_id(1)
    x_ptr += at * N
    modulation_ptr += at * STRIDE
    x = _load_rows(x_ptr, rows, N, live, N, C)
    if LAYER:
        a = _modulated(x, modulation_ptr, STRIDE, rows, live, TYPE, N, C)
    else:
        normed = _normalised(x, N, C, _NORM_EPS)
        a = ()
        for c in tl.static_range(N // C):
            a = a + (normed[c].to(TYPE),)

    total = _zeros(OUTPUTS // C_OUT, ROWS, C_OUT)
    for step in tl.range(0, HIDDEN // SPLITS, CHUNK, num_stages=STAGES):
        first = split * (HIDDEN // SPLITS) + step
        units = first + tl.arange(0, CHUNK)
        up = _load_matrix(up_ptr, HIDDEN, first, N, C, CHUNK)
        hidden = _product(a, 0, up, tl.load(up_bias_ptr + units)[None, :], N // C, PRECISION)
        hidden = _gelu(hidden, EXACT).to(TYPE)
        new = ()
        for c in tl.static_range(OUTPUTS // C_OUT):
            columns = c * C_OUT + tl.arange(0, C_OUT)
            down = tl.load(down_ptr + units[:, None] * OUTPUTS + columns[None, :])
            new = new + (_dot(hidden, down, total[c], PRECISION),)
        total = new

    for c in tl.static_range(OUTPUTS // C_OUT):
        columns = c * C_OUT + tl.arange(0, C_OUT)
        value = total[c]
        mine = split == c % SPLITS if SPLITS > 1 else True
        if mine:
            value += tl.load(down_bias_ptr + columns)[None, :]
        if LAYER:
            gate = tl.load(modulation_ptr + 2 * N + rows[:, None] * STRIDE + columns[None, :],
                           mask=live[:, None], other=0.0).to(tl.float32)  # fmt: skip
            value = gate * value
            if mine:
                value += tl.load(x_ptr + rows[:, None] * N + columns[None, :], mask=live[:, None], other=0.0)
        _add_rows(y_ptr + at * OUTPUTS, rows, live, columns, OUTPUTS, value, SPLITS)
    if STRIPS > 0:
        for c in tl.static_range(N // C):
            if split == c % SPLITS:
                columns = c * C + tl.arange(0, C)
                for p in tl.static_range(STRIPS):
                    clear_ptr = zero_ptr + (p * M + at) * N + rows[:, None] * N + columns[None, :]
                    tl.store(clear_ptr, tl.zeros((ROWS, C), tl.float32), mask=live[:, None])


@triton.jit(do_not_specialize=["R", "S"])
def _cost_kernel(z_ptr, goal_ptr, cost_ptr, R, S, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
                 ROOT: tl.constexpr):  # fmt: skip
    """cost[r] = |z[r] - goal[r / S]|^2 (paper, section 3.3); with ROOT its square root."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, PADDED)
    mask = (rows < R)[:, None] & (columns < WIDTH)[None, :]
    z = tl.load(z_ptr + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
    goal = tl.load(goal_ptr + (rows // S)[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
    cost = tl.sum((z - goal) * (z - goal), axis=1)
    if ROOT:
        cost = tl.sqrt(cost)
    tl.store(cost_ptr + rows, cost, mask=rows < R)


@triton.jit(do_not_specialize=["M"])
def _dense_kernel(x_ptr, matrix_ptr, bias_ptr, out_ptr, M, INPUTS: tl.constexpr, CHUNK: tl.constexpr,
                  OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, GELU: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """out = x matrix + bias, with GELU the exact GELU of it; all float32, x (M, INPUTS): a layer of a head."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = rows < M
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32) + tl.load(bias_ptr + columns)[None, :]
    for first in range(0, INPUTS, CHUNK):
        inputs = first + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + rows[:, None] * INPUTS + inputs[None, :], mask=live[:, None], other=0.0)
        total = _dot(x, tl.load(matrix_ptr + inputs[:, None] * OUTPUTS + columns[None, :]), total, PRECISION)
    if GELU:
        total = _gelu(total, True)
    tl.store(out_ptr + rows[:, None] * OUTPUTS + columns[None, :], total, mask=live[:, None])


# ------------------------------------------------------------------------------------------------------------ weights

_TYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


def obstacle(config: Any) -> str | None:
    """Why the kernels cannot run a model of this `ModelConfig`; None if they can."""
    names = ("embed_dim", "predictor_dim", "predictor_mlp", "projector_hidden", "action_hidden")
    for name in (*names, "head_hidden") if config.distance_head else names:
        if getattr(config, name) % 16:
            return f"{name} {getattr(config, name)} is not a multiple of 16"
    if config.predictor_head_dim not in (16, 32, 64, 128):
        return f"predictor_head_dim {config.predictor_head_dim} is not 16, 32, 64 or 128"
    if config.history > 4:
        return f"history {config.history} is above 4"
    if config.action_prefix and config.prefix_blocks > 8:
        return f"prefix_blocks {config.prefix_blocks} is above 8"
    return None


@dataclass(frozen=True)
class Weights:
    """The predictor's weights as the kernels take them: inputs first, linear maps that follow each other made one.

    Matrices are in the type of the products, biases in float32. L layers, N predictor_dim, D embed_dim.
    """

    config: Any
    precision: str
    action: tuple[Tensor, ...]  # up (A padded, hidden), bias, down (hidden, N), bias
    modulation: tuple[Tensor, Tensor]  # (N, 6 L N): shift, scale and gate of attention, then of the MLP, of every layer
    positions: Tensor  # (config.positions, N)
    attention: tuple[Tensor, ...]  # (L, ...): qkv (3 heads, N, head), bias, out (inner, N), bias, alone (N, N), bias
    mlp: tuple[Tensor, ...]  # (L, ...): up (N, hidden), bias, down (hidden, N), bias
    output: tuple[Tensor, Tensor]  # up (N, hidden), bias
    to_token: tuple[Tensor, Tensor]  # (hidden, N), bias: the next latent as the predictor's input
    to_latent: tuple[Tensor, Tensor]  # (hidden, D), bias; the same object as to_token where they are one
    token: tuple[Tensor, Tensor] | None  # from a latent to a token, (D, N) float32, bias; None where they are one
    distance: tuple[tuple[Tensor, Tensor], ...]  # layers of the distance head, (inputs, outputs) float32 and bias


def pack(config: Any, state: Mapping[str, Any], precision: str, device: torch.device | str) -> Weights:
    """Folds a state dict in float64 and rounds once.

    Args:
        config: A `ModelConfig` without `obstacle`.
        state: Official names; arrays or tensors.
        precision: "float32" (exact), "tf32" (tensor cores round factors to 11 bits) or "bfloat16"; sums are float32.
        device: Where the kernels will run.
    """
    kind, depth, n = _TYPES[precision], config.predictor_depth, config.predictor_dim
    heads, head = config.predictor_heads, config.predictor_head_dim

    def get(name: str) -> Tensor:
        return torch.as_tensor(state[name]).to(torch.float64)

    def linear(name: str) -> tuple[Tensor, Tensor]:
        """(inputs, outputs) and bias."""
        return get(f"{name}.weight").flatten(1).T, get(f"{name}.bias")

    def then(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return first[0] @ second[0], first[1] @ second[0] + second[1]

    def after_norm(norm: str, weight: Tensor, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        return get(f"{norm}.weight")[:, None] * weight, get(f"{norm}.bias") @ weight + bias

    def done(*pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            tensor.to(device, to).contiguous()
            for pair in pairs
            for tensor, to in zip(pair, (kind, torch.float32), strict=True)
        )

    name = "predictor.transformer"
    same = config.embed_dim == n
    up = then(linear("action_encoder.patch_embed"), linear("action_encoder.embed.0"))
    up = torch.nn.functional.pad(up[0], (0, 0, 0, padded(config.block_dim) - config.block_dim)), up[1]
    down = linear("action_encoder.embed.2")
    if not same:
        down = then(down, linear(f"{name}.cond_proj"))
    modulation = [linear(f"{name}.layers.{layer}.adaLN_modulation.1") for layer in range(depth)]

    attention, mlp = [], []
    for layer in (f"{name}.layers.{i}" for i in range(depth)):
        qkv, bias = after_norm(f"{layer}.attn.norm", get(f"{layer}.attn.to_qkv.weight").T)
        qkv, bias = qkv.unflatten(1, (3, heads, head)), bias.unflatten(0, (3, heads, head)).clone()
        qkv = torch.cat([qkv[:, :1] * head**-0.5, qkv[:, 1:]], 1)
        bias[0] *= head**-0.5
        out = linear(f"{layer}.attn.to_out.0")
        alone = then((qkv[:, 2].flatten(1), bias[2].flatten()), out)
        attention.append(done((qkv.flatten(1, 2).transpose(0, 1), bias.flatten(0, 1)), out, alone))
        mlp.append(done(after_norm(f"{layer}.mlp.net.0", *linear(f"{layer}.mlp.net.1")), linear(f"{layer}.mlp.net.4")))

    first, second = projector(get, linear)
    token = None
    to_latent = to_token = done(second)
    if not same:
        first = then(linear(f"{name}.output_proj"), first)
        token = linear(f"{name}.input_proj")
        to_token = done(then(second, token))
    positions = get("predictor.pos_embedding")[0]
    return Weights(
        config,
        precision,
        action=done(up, down),
        modulation=done((torch.cat([m[0] for m in modulation], 1), torch.cat([m[1] for m in modulation]))),
        positions=(positions if token is None else positions @ token[0]).to(device, torch.float32),
        attention=tuple(torch.stack(tensors) for tensors in zip(*attention, strict=True)),
        mlp=tuple(torch.stack(tensors) for tensors in zip(*mlp, strict=True)),
        output=done(after_norm(f"{name}.norm", *first)),
        to_token=to_token,
        to_latent=to_latent,
        token=None if token is None else tuple(t.to(device, torch.float32) for t in token),
        distance=tuple(
            tuple(t.to(device, torch.float32).contiguous() for t in linear(f"distance_head.net.{place}"))
            for place in ((0, 2, 4) if config.distance_head else ())
        ),
    )


def projector(get: Callable[[str], Tensor], linear: Callable[[str], Any]) -> tuple[Any, Any]:
    """Both maps of pred_proj, BatchNorm folded into the first."""
    name = "pred_proj.net"
    gain = get(f"{name}.1.weight") / (get(f"{name}.1.running_var") + _NORM_EPS.value).sqrt()
    weight, bias = linear(f"{name}.0")
    offset = get(f"{name}.1.bias") - get(f"{name}.1.running_mean") * gain
    return (weight * gain, bias * gain + offset), linear(f"{name}.3")


def padded(width: int) -> int:
    """Inputs of a matrix product: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


def tile(width: int, most: int) -> int:
    """The widest tile, a power of two up to `most`, that a row can be cut into."""
    return min(most, width & -width)


# ------------------------------------------------------------------------------------------------------------ rollout


@dataclass(frozen=True)
class Tiles:
    """How the work of a rollout is cut into programs (README.md, "Tiles of the rollout").

    Attributes:
        attention: Candidates of a program, shares that the heads are cut into, warps.
        mlp: Rows of a program, shares that the hidden units are cut into, warps.
        chunk: Hidden units that a program has in registers.
        stages: Chunks of weights under way.
        width: Columns that a row is cut into, at most.
        positions: Prefixes that a program of attention computes, at most; the next program has the keys and values of
            those before from memory.
        exact: How Triton multiplies in precision "float32", and heads always; AMD's matrix units take float32 as it is.
    """

    attention: tuple[int, int, int]
    mlp: tuple[int, int, int]
    chunk: int
    stages: int
    width: int = 64
    exact: str = "tf32x3"
    positions: int = 3


@dataclass(frozen=True)
class Launch:
    """One kernel of a rollout with everything but the stream."""

    kernel: Any
    grid: tuple[int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.constants)


def tiles(config: Any, rows: int, precision: str, processors: int, target: int) -> Tiles:
    """Tiles for so many candidates on a GPU of so many processors (SMs); its target is 90 for sm_90, 0 for AMD.

    With few rows in bfloat16 the work is cut by heads and hidden units too, while every processor has at most one
    program; float32 sums of the parts are then added up in memory (`_add_rows`).
    """
    wide = rows >= 48 * processors

    def shares(block: int, most: int) -> int:
        share = 1
        while 2 * share * triton.cdiv(rows, block) <= processors and most % (2 * share) == 0:
            share *= 2
        return share

    # The largest for which nothing is spilled (code-table.md), of those the fastest by time-table.md.
    exact = "tf32x3" if target else "ieee"
    if precision != "bfloat16":
        return Tiles((16, 1, 8), (16, 1, 4), tile(config.predictor_mlp, 32), 2, 32, exact)
    if wide and target == 90:
        candidates = 16 if config.action_prefix else 32
        return Tiles((candidates, 1, 8), (128, 1, 8), tile(config.predictor_mlp, 64), stages=3)
    units, chunk, stages = (64, 64, 3) if target == 90 else (32, 32, 2)
    chunk = tile(config.predictor_mlp, chunk)
    heads, hidden = shares(16, config.predictor_heads), shares(units, config.predictor_mlp // chunk)
    return Tiles((16, heads, 8), (units, hidden, 4), chunk, stages, exact=exact)


class Rollout:
    """Memory and launches of a rollout of R candidates, T observed frames and H blocks each.

    Fill `candidates` and call `observe`, then every `run` computes `latents` from what `candidates` holds.

    Attributes:
        candidates: (R, H, A) float32, normalised blocks.
        latents: (H, R, D) float32; only the last is computed unless all were asked for.
    """

    def __init__(
        self, weights: Weights, rows: int, frames: int, horizon: int, *, every: bool = False, cut: Tiles | None = None
    ) -> None:
        w, c = weights, weights.config
        self.weights, self.rows, self.frames, self.horizon = w, rows, frames, horizon
        device = w.positions.device
        self.cut = cut or tiles(c, rows, w.precision, *gpu(device))
        n, kind = c.predictor_dim, w.modulation[0].dtype
        window = min(c.positions, horizon if c.action_prefix else frames + horizon - 1)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.candidates = empty(rows, horizon, c.block_dim)
        self._tokens = empty(frames + horizon, rows, n)
        self.latents = self._tokens[frames:] if w.token is None else empty(horizon, rows, c.embed_dim)
        self._modulation = empty(frames - 1 + horizon, rows, 6 * c.predictor_depth * n, dtype=kind)
        self._condition = empty((frames - 1 + horizon) * rows, n, dtype=kind)
        self._past = empty(rows, max(frames - 1, 1), c.block_dim)
        self._x = empty(3, window, rows, n)
        self._nowhere = torch.zeros_like(w.positions)  # tokens have positions; what a layer leaves has them in it
        self._operand = empty(window, rows, n, dtype=kind)
        # Keys and values of all layers while a window grows, and of one layer where prefixes take several programs.
        grows, parts = frames < c.history and horizon > 1, c.action_prefix and window > self.cut.positions
        kept = (c.predictor_depth if grows else 1, window if grows or parts else 0)
        self._cache = empty(2, *kept, rows, c.predictor_heads * c.predictor_head_dim, dtype=kind)
        self.launches = self._steps(every)
        self._replay: Callable[[], None] | None = None

    def observe(self, z: Tensor, past: Tensor | None) -> None:
        """Sets what all candidates of an environment share: latents (E, T, D) and the normalised blocks between them.

        R must be a multiple of E; candidates of an environment are next to each other.
        """
        w, samples = self.weights, self.rows // len(z)
        token = z.float() if w.token is None else z.float() @ w.token[0] + w.token[1]
        self._tokens[: self.frames].view(self.frames, len(z), samples, -1).copy_(token.transpose(0, 1)[:, :, None])
        if past is not None:
            self._past.view(len(z), samples, *past.shape[1:]).copy_(past[:, None])
            for launch in self._modulate(self._past, 0, self.frames - 1, strips=0):
                launch()

    def run(self) -> None:
        """Computes `latents` on the current stream."""
        for launch in self.launches:
            launch()

    def replay(self) -> None:
        """`run`, on CUDA as a graph that the first call captures."""
        if self._replay is None:
            self._replay = captured(self.run, self.candidates.device)
        self._replay()

    def _modulate(self, actions: Tensor, slot: int, count: int, strips: int) -> list[Launch]:
        """What the actions of slots `slot ..` do to each layer."""
        w, c, m = self.weights, self.weights.config, count * self.rows
        n, depth, sums = c.predictor_dim, c.predictor_depth, self._x[1]
        width = 6 * depth * n
        columns, rows = (tile(width, 128), 128) if w.precision == "bfloat16" else (tile(width, 64), 64)
        condition = self._condition[slot * self.rows :]
        block = 64 if w.precision == "bfloat16" and m >= 2**14 else 16
        constants = {
            "A": c.block_dim,
            "INPUTS": padded(c.block_dim),
            "HIDDEN": c.action_hidden,
            "CHUNK": tile(c.action_hidden, 64 if w.precision == "bfloat16" else 32),
            "STRIPS": strips,
            "ROWS": block,
            "num_warps": block // 8 if block > 16 else 4,
        }
        counts = (self.rows, count, sums.numel() // n)
        arguments = (actions, *w.action, condition, self._tokens[self.frames :], sums, *counts)
        first = self._launch(_condition_kernel, (triton.cdiv(m, block), 1), arguments, constants)
        constants = {"WIDTH": columns, "ROWS": rows, "num_warps": 8}
        arguments = (condition, *w.modulation, self._modulation[slot], m, width)
        return [first, self._launch(_linear_kernel, (triton.cdiv(m, rows), width // columns), arguments, constants)]

    def _steps(self, every: bool) -> list[Launch]:
        """All launches of a rollout."""
        c, cut = self.weights.config, self.cut
        shared = max(cut.attention[1], cut.mlp[1]) > 1
        strips = triton.cdiv(self._x.shape[1], self.horizon) if shared else 0
        launches = self._modulate(self.candidates, self.frames - 1, self.horizon, strips)

        def turn() -> None:
            """Shared sums are read, added to and cleared in turn; otherwise a program's rows are its own."""
            if shared:
                self._turn = self._turn[1:] + self._turn[:1]

        self._turn = list(self._x) if shared else [self._x[0]] * 3
        for start, size, first, keep in self._windows():
            # Only what is predicted leaves the last layer: the last position, and with prefixes those asked for.
            leaving = 0 if c.action_prefix and every else size - 1
            for layer in range(c.predictor_depth):
                asks = leaving if layer + 1 == c.predictor_depth else first
                step = self.cut.positions if c.action_prefix else size
                for low in range(first, size, step):
                    high = min(low + step, size)
                    shown = min(max(low, asks), high), keep or high < size
                    launches.append(self._attention(layer, start, high, low, *shown, shared))
                turn()
                launches.append(self._mlp(layer, start, size, asks, shared))
                turn()
            last = start + size + 1 == self.frames + self.horizon
            for asks, target, down in self._targets(start, size, leaving, last, every):
                launches.append(self._output(asks, size, target, down, shared and not last))
            turn()
        return launches

    def _windows(self) -> Iterator[tuple[int, int, int, bool]]:
        """For each time that the transformer is run: its first token, its tokens, the first of them that is not known
        to it, and whether keys and values are kept."""
        c, end = self.weights.config, self.frames + self.horizon
        if c.action_prefix:  # start is the token that a pass goes out from
            for start in range(self.frames - 1, end - 1, c.prefix_blocks):
                yield start, min(c.prefix_blocks, end - 1 - start), 0, False
            return
        for t in range(self.frames, end):
            start = max(0, t - c.history)
            # While the window grows, keys and values of earlier positions are kept. Positions are relative to the
            # window, so when it slides all are computed anew.
            first = t - 1 if start == 0 and t > self.frames else 0
            yield start, t - start, first, start == 0 and t < c.history and t + 1 < end

    def _attention(self, layer: int, start: int, size: int, first: int, asks: int, keep: bool, shared: bool) -> Launch:
        """First half of a layer, for the window of so many tokens from `start` on."""
        w, c, (x, y, zero) = self.weights, self.weights.config, self._turn
        rows, splits, warps = self.cut.attention
        modulation = self._modulation[start].flatten()[layer * 6 * c.predictor_dim :]
        constants = {
            "HEADS": c.predictor_heads,
            "HEAD": c.predictor_head_dim,
            "WINDOW": size,
            "FROM": first,
            "ASKS": asks,
            "KEEP": keep,
            "CLEAR": shared,
            "SAME": c.action_prefix and layer == 0,
            "SPLITS": splits,
            "ROWS": rows,
            # With heads one after the other a third stage would take more registers than there are.
            "STAGES": self.cut.stages if splits == c.predictor_heads else min(self.cut.stages, 2),
            "num_warps": warps,
        }
        weights = (tensor[layer] for tensor in w.attention)
        kept = (*self._cache[:, min(layer, self._cache.shape[1] - 1)], self._operand)
        source = (self._tokens[start], w.positions) if layer == 0 else (x, self._nowhere)
        arguments = (*source, modulation, *weights, *kept, y, zero, self.rows, self._modulation.shape[2])
        return self._launch(_attention_kernel, (triton.cdiv(self.rows, rows), splits), arguments, constants)

    def _mlp(self, layer: int, start: int, size: int, asks: int, shared: bool) -> Launch:
        """Second half of a layer, for the positions from `asks` on."""
        w, c, (x, y, zero) = self.weights, self.weights.config, self._turn
        modulation = self._modulation[start + asks].flatten()[(layer * 6 + 3) * c.predictor_dim :]
        weights = tuple(tensor[layer] for tensor in w.mlp)
        arguments = (x[asks], modulation, *weights, y[asks], zero[asks], (size - asks) * self.rows)
        return self._perceptron(arguments, self.cut.mlp[1], {"LAYER": True, "STRIPS": int(shared)})

    def _output(self, asks: int, size: int, target: Tensor, down: tuple[Tensor, Tensor], clear: bool) -> Launch:
        """The predictions of the positions from `asks` on."""
        w, (x, _, zero), count = self.weights, self._turn, size - asks
        # Latents that are not tokens are not cleared, so they are not shared either.
        splits = self.cut.mlp[1] if down is w.to_token else 1
        arguments = (x[asks], self._modulation, *w.output, *down, target, zero, count * self.rows)
        return self._perceptron(arguments, splits, {"LAYER": False, "STRIPS": len(zero) // count if clear else 0})

    def _perceptron(self, arguments: tuple[Any, ...], splits: int, constants: dict[str, Any]) -> Launch:
        (hidden, outputs), (rows, _, warps) = arguments[4].shape, self.cut.mlp
        chunk = tile(hidden, self.cut.chunk)
        # Shares are those for one row a candidate; for k positions there are as many more programs.
        splits = math.gcd(max(1, splits >> (triton.cdiv(arguments[-1], self.rows).bit_length() - 1)), hidden // chunk)
        constants = {
            "HIDDEN": hidden,
            "CHUNK": chunk,
            "OUTPUTS": outputs,
            "C_OUT": tile(outputs, self.cut.width),
            "SPLITS": splits,
            "ROWS": rows,
            "EXACT": self.weights.precision != "bfloat16",
            "STAGES": self.cut.stages,
            "num_warps": warps,
            **constants,
        }
        arguments = (*arguments, self._modulation.shape[2])
        return self._launch(_mlp_kernel, (triton.cdiv(arguments[-2], rows), splits), arguments, constants)

    def _launch(self, kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], constants: Any) -> Launch:
        n = self.weights.config.predictor_dim
        precision = {"float32": self.cut.exact, "tf32": "tf32"}.get(self.weights.precision, "ieee")
        common = {"N": n, "C": tile(n, self.cut.width), "PRECISION": precision, "enable_fp_fusion": True}
        return Launch(kernel, grid, arguments, constants | common)

    def _targets(
        self, start: int, size: int, leaving: int, last: bool, every: bool
    ) -> list[tuple[int, Tensor, tuple[Tensor, Tensor]]]:
        """Which predictions are made: of the positions from where on, to where, and by which map."""
        w, found = self.weights, []
        if w.token is None:
            found.append((leaving, self._tokens[start + leaving + 1], w.to_token))
        elif not last:  # what the next window or pass sees
            found.append((size - 1, self._tokens[start + size], w.to_token))
        if w.token is not None and (every or last):
            found.append((leaving, self.latents[start + leaving + 1 - self.frames], w.to_latent))
        return found


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it, kernels are launched on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def captured(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`work` as a CUDA graph, after a first run that compiles; elsewhere `work` itself."""
    if device.type != "cuda":
        return work
    with on(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    return graph.replay


def gpu(device: torch.device) -> tuple[int, int]:
    """Streaming multiprocessors and target (`tiles`) of a GPU; in the interpreter, those of an H100."""
    if device.type != "cuda":
        return 132, 90
    major, minor = torch.cuda.get_device_capability(device)
    target = 0 if torch.version.hip else 10 * major + minor
    return torch.cuda.get_device_properties(device).multi_processor_count, target


class Distance:
    """The distance head on the device: what it makes of latents, in memory of its own.

    Args:
        weights: What `pack` gave, of a model with that head.
        rows: Number of latents.
        exact: How Triton multiplies float32; see `Tiles`.

    Attributes:
        embedded: (rows, D) float32, the head's output for the latents of the last `run`.
    """

    def __init__(self, weights: Weights, rows: int, exact: str) -> None:
        self._layers, self._exact = weights.distance, exact
        device = weights.positions.device
        widths = [matrix.shape[1] for matrix, _ in weights.distance]
        *self._hidden, self.embedded = (torch.empty(rows, width, device=device) for width in widths)

    def run(self, z: Tensor) -> Tensor:
        """Computes `embedded` of latents (rows, D), contiguous, on the current stream."""
        for place, ((matrix, bias), out) in enumerate(zip(self._layers, (*self._hidden, self.embedded), strict=True)):
            (inputs, outputs), rows = matrix.shape, 16
            width = tile(outputs, 32)
            constants = {
                "INPUTS": inputs,
                "CHUNK": tile(inputs, 32),
                "OUTPUTS": outputs,
                "WIDTH": width,
                "ROWS": rows,
                "GELU": place + 1 < len(self._layers),
                "PRECISION": self._exact,
                "num_warps": 4,
                "enable_fp_fusion": True,
            }
            grid = (triton.cdiv(len(z), rows), outputs // width)
            Launch(_dense_kernel, grid, (z, matrix, bias, out, len(z)), constants)()
            z = out
        return self.embedded


def cost_launch(z: Tensor, goal: Tensor, costs: Tensor, root: bool = False) -> Launch:
    """costs (E S,) = squared distances of latents (E S, D) to their environment's goal (E, D), or their `root`."""
    (rows, width), block = z.shape, 8 if root else 16  # with a root, what 16 rows need does not fit sm_120's registers
    arguments = (z, goal, costs, rows, rows // len(goal))
    constants = {"WIDTH": width, "PADDED": triton.next_power_of_2(width), "ROWS": block, "ROOT": root, "num_warps": 4}
    return Launch(_cost_kernel, (triton.cdiv(rows, block), 1), arguments, constants | {"enable_fp_fusion": True})


def examples(target: int = 90) -> Iterator[tuple[str, Callable[[], None]]]:
    """What `lewm.kernels.code` compiles: rollouts of a plan for one environment and for fifty, 300 candidates each."""
    from lewm.config import configure
    from lewm.network import LeWM

    prefix = {"history": 1, "action_prefix": True}
    for preset, overrides, precision, rows in (
        ("paper", {}, "bfloat16", 300),
        ("paper", {}, "bfloat16", 15000),
        ("paper", {}, "float32", 300),
        ("tiny", {}, "bfloat16", 300),
        ("paper", prefix, "bfloat16", 300),
        ("paper", prefix, "bfloat16", 15000),
        ("paper", prefix, "float32", 300),
    ):
        config, _ = configure(preset, 2, overrides)
        with torch.device("meta"):
            weights = pack(config, LeWM(config).state_dict(), precision, "meta")
        cut = tiles(config, rows, precision, 132, target)
        kind = " prefixes" if overrides else ""
        yield f"{preset}{kind} {precision}, {rows} candidates", Rollout(weights, rows, 1, 5, cut=cut).run
    for preset in ("paper", "tiny"):
        config, _ = configure(preset, 2, {"distance_head": True})
        with torch.device("meta"):
            weights = pack(config, LeWM(config).state_dict(), "float32", "meta")
        head = Distance(weights, 300, "tf32x3" if target else "ieee")
        z, costs = torch.empty(300, config.embed_dim, device="meta"), torch.empty(300, device="meta")
        yield f"{preset}, distances of 300", functools.partial(_measured, head, z, costs)


def _measured(head: Distance, z: Tensor, costs: Tensor) -> None:
    """Distances (R,) of latents (R, D), of which the first is the goal."""
    embedded = head.run(z)
    cost_launch(embedded, embedded[:1], costs, root=True)()
