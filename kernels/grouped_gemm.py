"""The three Triton kernels of a layer's experts, for decode and prefill alike.

`first_product`: gathered rows times gate and up, with the activation, to one row per pick, in the order of experts.
`second_product`: those rows times down, to the place of each pick. `weighted_sum`: each token's picks, in the order of slots.
Nothing is added atomically and every sum has a fixed order: a repeat run is bit-identical. All arithmetic is float32; products
of float32 are exact ones (`ieee`), those of bfloat16 and float16 go to the tensor cores. Where few tokens would leave
multiprocessors idle the second product cuts its inputs into SPLITS parts, each to rows of its own; the weighted sum adds them.

A program computes a tile of BM rows of one expert by BN outputs. With few rows the operands change sides (SWAP): weights are
then the left one, whose 64 rows a tensor core of Hopper wants at least, and the tokens the right one, of which 8 will do.
Weights in 8 or 4 bits are widened in registers; scales multiply the accumulator, not the weights (formats.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

# of formats.py, as constants that a kernel may read
PLAIN = tl.constexpr(0)
INT8 = tl.constexpr(1)
INT4 = tl.constexpr(2)
FP8 = tl.constexpr(3)
GROUP = tl.constexpr(128)
HALF = tl.constexpr(64)
CODES = {"plain": 0, "int8": 1, "int4": 2, "fp8": 3}
FUNCTION_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "none": 5}


@triton.jit
def _tile_of(blocks, columns, BN: tl.constexpr, TOGETHER: tl.constexpr):
    """(block, tile of columns) of this program: TOGETHER blocks go over the columns side by side, so that L2 keeps both."""
    tiles = tl.cdiv(columns, BN)
    number = tl.program_id(0)
    wave = number // (TOGETHER * tiles)
    size = tl.minimum(blocks - wave * TOGETHER, TOGETHER)
    within = number % (TOGETHER * tiles)
    return wave * TOGETHER + within % size, within // size


@triton.jit
def _multiply(a, w, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a w^T, a `[BM, BK]`, w `[BN, BK]`; `[BN, BM]` if SWAP, else `[BM, BN]`."""
    if SWAP:
        acc = tl.dot(w, tl.trans(a), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _load_rows(a, k, K, real, BK: tl.constexpr, EVEN: tl.constexpr):
    """`[BM, BK]` from column k on. a: pointers to rows `[BM]`; real: which rows there are."""
    at = k + tl.arange(0, BK)
    if EVEN:
        x = tl.load(a[:, None] + at[None, :], mask=real[:, None], other=0.0)
    else:
        x = tl.load(a[:, None] + at[None, :], mask=real[:, None] & (at < K)[None, :], other=0.0)
    return x


@triton.jit
def _load_weights(w, stride, k, K, real, BK: tl.constexpr, EVEN: tl.constexpr):
    """`[BN, BK]` from column k on. w: pointers to rows `[BN]`."""
    at = k + tl.arange(0, BK)
    if EVEN:
        values = tl.load(w[:, None] + (at * stride)[None, :], mask=real[:, None], other=0.0)
    else:
        values = tl.load(w[:, None] + (at * stride)[None, :], mask=real[:, None] & (at < K)[None, :], other=0.0)
    return values


@triton.jit
def _described(descriptor, expert, row, k, BN: tl.constexpr, BK: tl.constexpr):
    """`[BN, BK]` of an expert's weights from (row, k) on, fetched by the tensor memory accelerator; 0 beyond the last row."""
    return tl.reshape(descriptor.load([expert, row, k]), (BN, BK))


@triton.jit
def _scaled(part, scale, real, acc, SWAP: tl.constexpr):
    """acc + part * scale, a scale for each output."""
    s = tl.load(scale, mask=real, other=0.0)
    if SWAP:
        acc += part * s[:, None]
    else:
        acc += part * s[None, :]
    return acc


@triton.jit
def _product(
    a, real_rows, w, descriptor, expert, row, scale, real, acc, stride, stride_scale, k, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """acc plus the products of BK columns from k on. Rows are loaded anew for gate and up: the second time from cache.

    Weights that are widened in registers on the left side (SWAP) get a sum of their own at each step, which waits for the
    tensor cores: in sums that run on, Triton 3.6 writes to these registers while Hopper's still read them (triton#9433).

    TMA: weights come as tiles from (expert, row, k), by the descriptor of all experts' `[S, N, K]`, not by pointers.
    """
    kind = a.dtype.element_ty
    if TMA:
        x = _load_rows(a, k, K, real_rows, BK, EVEN)
        acc = _multiply(x, _described(descriptor, expert, row, k, BN, BK).to(kind), acc, SWAP, PRECISION)
    elif FORMAT == PLAIN or (FORMAT == INT8 and not SWAP):
        x = _load_rows(a, k, K, real_rows, BK, EVEN)
        acc = _multiply(x, _load_weights(w, stride, k, K, real, BK, EVEN).to(kind), acc, SWAP, PRECISION)
    else:
        if SWAP:
            part = tl.zeros((BN, BM), tl.float32)
        else:
            part = tl.zeros((BM, BN), tl.float32)
        if FORMAT == INT4:
            pair = _load_weights(w, stride, k // 2, K, real, HALF, True)
            low = ((pair & 15).to(tl.int32) - 8).to(tl.float32).to(kind)
            high = ((pair >> 4).to(tl.int32) - 8).to(tl.float32).to(kind)
            part = _multiply(_load_rows(a, k, K, real_rows, HALF, EVEN), low, part, SWAP, PRECISION)
            part = _multiply(_load_rows(a, k + HALF, K, real_rows, HALF, EVEN), high, part, SWAP, PRECISION)
        else:
            values = _load_weights(w, stride, k, K, real, BK, EVEN)
            if FORMAT == FP8:
                values = values.to(tl.float32)
            values = values.to(kind)
            part = _multiply(_load_rows(a, k, K, real_rows, BK, EVEN), values, part, SWAP, PRECISION)
        acc = _scaled(part, scale + k // GROUP * stride_scale, real, acc, SWAP)
    return acc


@triton.jit
def _finished(acc, scale, bias, outputs, real, biased, FORMAT: tl.constexpr, SWAP: tl.constexpr, BIAS: tl.constexpr):
    """`[BM, BN]`: the accumulator the right way round, with each output's scale, and its bias where `biased`."""
    if SWAP:
        acc = tl.trans(acc)
    if FORMAT == INT8 and not SWAP:  # else it was multiplied at each step
        acc = acc * tl.load(scale, mask=real, other=0.0)[None, :]
    if BIAS:
        acc = acc + tl.load(bias + outputs, mask=biased, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _activate(z, FUNCTION: tl.constexpr):
    """One of activations.FUNCTIONS, of float32."""
    if FUNCTION == 0:
        z = z * tl.sigmoid(z)
    elif FUNCTION == 1:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif FUNCTION == 2:
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif FUNCTION == 3:
        z = _at_least(z, 0.0)
    elif FUNCTION == 4:
        z = _at_least(z, 0.0)
        z = z * z
    return z


@triton.jit
def _at_least(z, least):
    """NaN stays NaN, as torch has it: what overflowed before is to be seen behind."""
    return tl.maximum(z, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _at_most(z, most):
    return tl.minimum(z, most, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["blocks"])
def first_product(
    x, w, descriptor, scale, bias, h, picks, block_expert, block_start, block_count, table,
    blocks, hidden, inner, stride_x, stride_e, stride_n, stride_k, scale_e, scale_n, scale_k, bias_e, stride_h,
    limit, alpha, offset,
    SLOTS: tl.constexpr, GATED: tl.constexpr, TURNS: tl.constexpr, FOLD: tl.constexpr, FUNCTION: tl.constexpr,
    LIMIT: tl.constexpr, BIAS: tl.constexpr, TABLE: tl.constexpr, FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, SWAP: tl.constexpr,
    TOGETHER: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """h `[N, I]`, in the order of picks, from x `[T, H]` and w `[S, 2I or I, H]`; blocks without an expert do nothing.

    TURNS: gate and up alternate, and one tile of 2 BN outputs holds both. FOLD: they do not, but such a tile takes them in
    turns all the same, so that few of each fill a tensor core's 64 rows. table: where each expert's weights are, if TABLE.
    descriptor: of w, for tiles of as many rows as one product has, if TMA.
    """
    block, tile = _tile_of(blocks, inner, BN, TOGETHER)
    expert = tl.load(block_expert + block)
    if expert < 0:
        return
    if TABLE:
        expert = tl.load(table + expert)
    place, expert = expert, expert.to(tl.int64)
    rows = tl.load(block_start + block) + tl.arange(0, BM)
    real_rows = tl.arange(0, BM) < tl.load(block_count + block)
    token = tl.load(picks + rows, mask=real_rows, other=0) // SLOTS
    a = x + token.to(tl.int64) * stride_x
    columns = tile * BN + tl.arange(0, BN)
    w += expert * stride_e
    scale += expert * scale_e
    bias += expert * bias_e
    if TURNS or FOLD:
        within = tl.arange(0, 2 * BN)
        if TURNS:
            outputs = 2 * tile * BN + within
        else:
            outputs = within % 2 * inner + tile * BN + within // 2
        real = tile * BN + within // 2 < inner
        if SWAP:
            acc = tl.zeros((2 * BN, BM), tl.float32)
        else:
            acc = tl.zeros((BM, 2 * BN), tl.float32)
        scales = scale + outputs // SCALE_ROWS * scale_n
        for k in range(0, hidden, BK):
            acc = _product(
                a, real_rows, w + outputs * stride_n, descriptor, place, 2 * tile * BN,
                scales, real, acc, stride_k, scale_k, k, hidden,
                BM, 2 * BN, BK, FORMAT, SWAP, EVEN, PRECISION, TMA,
            )  # fmt: skip
        both = _finished(acc, scales, bias, outputs, real, real, FORMAT, SWAP, BIAS)
        gate, up = tl.split(tl.reshape(both, (BM, BN, 2)))
    else:
        real = columns < inner
        if SWAP:
            acc = tl.zeros((BN, BM), tl.float32)
        else:
            acc = tl.zeros((BM, BN), tl.float32)
        scales = scale + columns // SCALE_ROWS * scale_n
        if GATED:
            second = columns + inner
            more = acc
            scales_up = scale + second // SCALE_ROWS * scale_n
            for k in range(0, hidden, BK):
                acc = _product(
                    a, real_rows, w + columns * stride_n, descriptor, place, tile * BN,
                    scales, real, acc, stride_k, scale_k, k, hidden,
                    BM, BN, BK, FORMAT, SWAP, EVEN, PRECISION, TMA,
                )  # fmt: skip
                more = _product(
                    a, real_rows, w + second * stride_n, descriptor, place, tile * BN + inner,
                    scales_up, real, more, stride_k, scale_k, k, hidden,
                    BM, BN, BK, FORMAT, SWAP, EVEN, PRECISION, TMA,
                )  # fmt: skip
            gate = _finished(acc, scales, bias, columns, real, real, FORMAT, SWAP, BIAS)
            up = _finished(more, scales_up, bias, second, real, real, FORMAT, SWAP, BIAS)
        else:
            for k in range(0, hidden, BK):
                acc = _product(
                    a, real_rows, w + columns * stride_n, descriptor, place, tile * BN,
                    scales, real, acc, stride_k, scale_k, k, hidden,
                    BM, BN, BK, FORMAT, SWAP, EVEN, PRECISION, TMA,
                )  # fmt: skip
            gate = _finished(acc, scales, bias, columns, real, real, FORMAT, SWAP, BIAS)
    if GATED:
        if LIMIT:
            gate = _at_most(gate, limit)
            up = _at_most(_at_least(up, -limit), limit)
        made = _activate(gate * alpha, FUNCTION) / alpha * (up + offset)
    else:
        made = _activate(gate, FUNCTION)
    to = h + rows.to(tl.int64)[:, None] * stride_h + columns[None, :]
    tl.store(to, made.to(h.dtype.element_ty), mask=real_rows[:, None] & (columns < inner)[None, :])


@triton.jit(do_not_specialize=["blocks"])
def second_product(
    h, w, descriptor, scale, bias, y, picks, block_expert, block_start, block_count, table,
    blocks, inner, hidden, stride_h, stride_e, stride_n, stride_k, scale_e, scale_n, scale_k, bias_e, stride_y, stride_part,
    SPLITS: tl.constexpr, BIAS: tl.constexpr, TABLE: tl.constexpr, FORMAT: tl.constexpr, SCALE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, SWAP: tl.constexpr,
    TOGETHER: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """y `[SPLITS, N, H]`, each pick's output at its own number, from h `[N, I]` in the order of picks and w `[S, H, I]`.

    The outputs are the sums of the parts; part p is of the p-th run of the inputs, whole steps of BK. The bias is in the first.
    """
    block, tile = _tile_of(blocks, hidden, BN, TOGETHER)
    expert = tl.load(block_expert + block)
    if expert < 0:
        return
    if TABLE:
        expert = tl.load(table + expert)
    place, expert = expert, expert.to(tl.int64)
    rows = tl.load(block_start + block) + tl.arange(0, BM)
    real_rows = tl.arange(0, BM) < tl.load(block_count + block)
    pick = tl.load(picks + rows, mask=real_rows, other=0)
    a = h + rows.to(tl.int64) * stride_h
    outputs = tile * BN + tl.arange(0, BN)
    real = outputs < hidden
    w += expert * stride_e
    scales = scale + expert * scale_e + outputs // SCALE_ROWS * scale_n
    bias += expert * bias_e
    if SWAP:
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    if SPLITS == 1:
        begin, end, biased = 0, inner, real
    else:
        part = tl.program_id(1)
        y += part.to(tl.int64) * stride_part
        run = tl.cdiv(tl.cdiv(inner, BK), SPLITS) * BK
        begin, end = part * run, tl.minimum(inner, (part + 1) * run)
        biased = outputs < tl.where(part == 0, hidden, 0)
    for k in range(begin, end, BK):
        acc = _product(
            a, real_rows, w + outputs * stride_n, descriptor, place, tile * BN,
            scales, real, acc, stride_k, scale_k, k, inner,
            BM, BN, BK, FORMAT, SWAP, EVEN, PRECISION, TMA,
        )  # fmt: skip
    made = _finished(acc, scales, bias, outputs, real, biased, FORMAT, SWAP, BIAS)
    to = y + pick.to(tl.int64)[:, None] * stride_y + outputs[None, :]
    tl.store(to, made.to(y.dtype.element_ty), mask=real_rows[:, None] & real[None, :])


@triton.jit
def weighted_sum(
    y, ids, weights, out, hidden, experts, stride_y, stride_part, stride_ids, stride_weights, stride_out,
    SLOTS: tl.constexpr, SPLITS: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """out `[T, H]`: the sum over slots j, in their order, of weights[t, j] * y[:, t * SLOTS + j], empty slots left out.

    y: `[SPLITS, T * SLOTS, H]`, whose parts are added first, in their order.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BH + tl.arange(0, BH)
    total = tl.zeros((BH,), tl.float32)
    for slot in tl.static_range(SLOTS):
        expert = tl.load(ids + token * stride_ids + slot)
        wide = tl.where((expert >= 0) & (expert < experts), hidden, 0)
        pick = y + (token * SLOTS + slot) * stride_y + columns
        value = tl.zeros((BH,), tl.float32)
        for _ in range(SPLITS):  # not unrolled: all parts of all slots at once are more than the registers hold
            value += tl.load(pick, mask=columns < wide, other=0.0).to(tl.float32)
            pick += stride_part
        weight = tl.load(weights + token * stride_weights + slot).to(tl.float32)
        total += tl.where(columns < wide, weight * value, 0.0)
    tl.store(out + token * stride_out + columns, total.to(out.dtype.element_ty), mask=columns < hidden)
