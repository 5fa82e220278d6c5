# Copyright (c) mmseg_sats contributors. Licensed under the Apache License 2.0.
"""Region means of attention on a GPU, in four Triton kernels instead of about forty kernel launches.

This computes the same sums as ``attention_map._RegionMean``, whose kernels a GPU finishes faster than the
CPU can launch them. Forward computes for each foreground row the log of the sum of exponentials, which
is all that is saved of a row, and then the means. Backward computes the scores again, once for the
gradients of the queries and once for those of the keys. The order of all sums is fixed, so the results
are the same in every run.

With A = softmax(Q K^T * scale), rows m, keys n, share s_m of a row in its region's mean r(m) and G the
gradient of the means: dA_mn = s_m G_r(m)n, dS = A * (dA - sum_n A dA), dQ = scale dS K, dK = scale dS^T Q.
"""

import warnings
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmseg_sats.functional.attention.class_regions import ClassRegions, find_regions

# About as many programs as keep a large GPU busy. If there are few keys and images, the rows are split too.
PROGRAMS = 256
# The largest head dimension and number of slots that a program has memory for.
LARGEST_DIM, LARGEST_WIDTH = 128, 64
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Arguments whose values Triton must not specialise kernels for: rows and width change with every batch.
CHANGING = ['slots_b', 'items', 'heads', 'rows', 'length', 'width']


def can_fuse(query: Tensor, key: Tensor, regions: ClassRegions) -> bool:
    """Whether the kernels support these queries (B, heads, L, d) and keys (B, heads, S, d)."""
    return (
        query.dtype in DTYPES
        and key.dtype in DTYPES
        and query.shape[3] <= LARGEST_DIM
        and 0 < regions.width <= LARGEST_WIDTH
    )


def kernels_run(device: torch.device) -> bool:
    """Whether Triton can compile and run the kernels on the device; if not, a warning says why."""
    regions = find_regions(torch.ones(1, 4, 4, dtype=torch.long, device=device))
    query = torch.zeros(1, 1, 16, 16, device=device)
    try:
        FusedRegionMean.apply(query, query, 1.0, regions)
    except Exception as error:  # e.g. a missing compiler or driver
        warnings.warn(
            f'Triton makes no kernels for {device}, so attention is pooled in chunks, which takes '
            f'longer: {error}',
            stacklevel=2,
        )
        return False
    return True


@triton.jit
def _scores(query, key, scale, keys, num_keys, FLOAT: tl.constexpr):
    """The scaled dot products (BM, BN), -inf beyond the last key."""
    if FLOAT:
        query, key = query.to(tl.float32), key.to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision='tf32x3')
    else:  # the products of two half-precision numbers are exact
        scores = tl.dot(query, tl.trans(key))
    return tl.where(keys[None, :] < num_keys, scores * scale, float('-inf'))


@triton.jit
def _load_rows(
    query, query_b, query_h, query_l, query_d, positions, slots, slots_b,
    image, head, start, rows, length, dim, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The queries (BM, BD), slots (BM,), -1 beyond the last row, and positions (BM,) of BM rows."""
    row = start + tl.arange(0, BM)
    slot = tl.load(slots + image * slots_b + row, mask=row < rows, other=-1)
    place = tl.load(positions + image * rows + row, mask=slot >= 0, other=0) - image * length
    place = tl.where(slot >= 0, place, 0)
    column = tl.arange(0, BD)
    pointers = query + image * query_b + head * query_h
    pointers = pointers + place[:, None] * query_l + column[None, :] * query_d
    values = tl.load(pointers, mask=(slot >= 0)[:, None] & (column < dim)[None, :], other=0.0)
    return values, slot, place


@triton.jit
def _load_keys(
    key, key_b, key_h, key_s, key_d, image, head, keys, num_keys, dim, BD: tl.constexpr
):
    """The keys (BN, BD), 0 beyond the last key."""
    column = tl.arange(0, BD)
    pointers = key + image * key_b + head * key_h + keys[:, None] * key_s + column[None, :] * key_d
    return tl.load(pointers, mask=(keys < num_keys)[:, None] & (column < dim)[None, :], other=0.0)


@triton.jit
def _shares(shares, slot, image, width, BW: tl.constexpr):
    """The weight of each row in each of the image's means, (BM, BW)."""
    number = tl.arange(0, BW)
    share = tl.load(shares + image * width + number, mask=number < width, other=0.0)
    return tl.where(slot[:, None] == number[None, :], share.to(tl.float32)[None, :], 0.0)


@triton.jit(do_not_specialize=CHANGING)
def _log_sums_kernel(
    query, query_b, query_h, query_l, query_d, key, key_b, key_h, key_s, key_d,
    positions, slots, slots_b, log_sums, scale, heads, rows, length, num_keys, dim,
    FLOAT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes log sum_n exp(score) of each row, (B, heads, rows)."""
    item = tl.program_id(1).to(tl.int64)
    image, head = item // heads, item % heads
    start = tl.program_id(0) * BM
    q, _, _ = _load_rows(
        query, query_b, query_h, query_l, query_d, positions, slots, slots_b,
        image, head, start, rows, length, dim, BM, BD,
    )  # fmt: skip
    largest = tl.full([BM], float('-inf'), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for first in range(0, num_keys, BN):
        keys = first + tl.arange(0, BN)
        k = _load_keys(key, key_b, key_h, key_s, key_d, image, head, keys, num_keys, dim, BD)
        scores = _scores(q, k, scale, keys, num_keys, FLOAT)
        higher = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(scores - higher[:, None]), 1)
        largest = higher
    row = start + tl.arange(0, BM)
    tl.store(log_sums + item * rows + row, largest + tl.log(total), mask=row < rows)


@triton.jit(do_not_specialize=CHANGING)
def _means_kernel(
    query, query_b, query_h, query_l, query_d, key, key_b, key_h, key_s, key_d,
    positions, slots, slots_b, shares, log_sums, means,
    scale, items, heads, rows, length, num_keys, dim, width,
    FLOAT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Writes the means for BN keys, summed over one split of the rows: (splits, B, heads, width, S)."""
    item = tl.program_id(2).to(tl.int64)
    image, head = item // heads, item % heads
    split, splits = tl.program_id(1), tl.num_programs(1)
    keys = tl.program_id(0) * BN + tl.arange(0, BN)
    k = _load_keys(key, key_b, key_h, key_s, key_d, image, head, keys, num_keys, dim, BD)
    sums = tl.zeros([BW, BN], tl.float32)
    for start in range(split * BM, rows, splits * BM):
        q, slot, _ = _load_rows(
            query, query_b, query_h, query_l, query_d, positions, slots, slots_b,
            image, head, start, rows, length, dim, BM, BD,
        )  # fmt: skip
        row = start + tl.arange(0, BM)
        log_sum = tl.load(log_sums + item * rows + row, mask=row < rows, other=0.0)
        attention = tl.exp(_scores(q, k, scale, keys, num_keys, FLOAT) - log_sum[:, None])
        share = _shares(shares, slot, image, width, BW)
        sums += tl.dot(tl.trans(share), attention, input_precision='tf32x3')
    number = tl.arange(0, BW)
    out = means + ((split * items + item) * width + number[:, None]) * num_keys + keys[None, :]
    tl.store(out, sums, mask=(number < width)[:, None] & (keys < num_keys)[None, :])


@triton.jit
def _load_gradient(grad, item, width, keys, num_keys, BW: tl.constexpr):
    """The gradient of the means for BN keys, (BW, BN)."""
    number = tl.arange(0, BW)
    pointers = grad + (item * width + number[:, None]) * num_keys + keys[None, :]
    mask = (number < width)[:, None] & (keys < num_keys)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit(do_not_specialize=CHANGING)
def _grad_query_kernel(
    query, query_b, query_h, query_l, query_d, key, key_b, key_h, key_s, key_d,
    positions, slots, slots_b, shares, log_sums, grad, grad_query, dots,
    scale, heads, rows, length, num_keys, dim, width,
    FLOAT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the queries, (B, L, heads, d), and sum_n A dA of each row, (B, heads, rows)."""
    item = tl.program_id(1).to(tl.int64)
    image, head = item // heads, item % heads
    start = tl.program_id(0) * BM
    q, slot, place = _load_rows(
        query, query_b, query_h, query_l, query_d, positions, slots, slots_b,
        image, head, start, rows, length, dim, BM, BD,
    )  # fmt: skip
    row = start + tl.arange(0, BM)
    log_sum = tl.load(log_sums + item * rows + row, mask=row < rows, other=0.0)
    share = _shares(shares, slot, image, width, BW)
    dot = tl.zeros([BM], tl.float32)
    for first in range(0, num_keys, BN):
        keys = first + tl.arange(0, BN)
        k = _load_keys(key, key_b, key_h, key_s, key_d, image, head, keys, num_keys, dim, BD)
        attention = tl.exp(_scores(q, k, scale, keys, num_keys, FLOAT) - log_sum[:, None])
        own = _load_gradient(grad, item, width, keys, num_keys, BW)
        dot += tl.sum(attention * tl.dot(share, own, input_precision='tf32x3'), 1)
    tl.store(dots + item * rows + row, dot, mask=row < rows)
    result = tl.zeros([BM, BD], tl.float32)
    for first in range(0, num_keys, BN):
        keys = first + tl.arange(0, BN)
        k = _load_keys(key, key_b, key_h, key_s, key_d, image, head, keys, num_keys, dim, BD)
        attention = tl.exp(_scores(q, k, scale, keys, num_keys, FLOAT) - log_sum[:, None])
        own = _load_gradient(grad, item, width, keys, num_keys, BW)
        change = attention * (tl.dot(share, own, input_precision='tf32x3') - dot[:, None])
        result += tl.dot(change, k.to(tl.float32), input_precision='tf32x3')
    column = tl.arange(0, BD)
    out = grad_query + ((image * length + place[:, None]) * heads + head) * dim + column[None, :]
    mask = (slot >= 0)[:, None] & (column < dim)[None, :]
    tl.store(out, (result * scale).to(grad_query.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=CHANGING)
def _grad_key_kernel(
    query, query_b, query_h, query_l, query_d, key, key_b, key_h, key_s, key_d,
    positions, slots, slots_b, shares, log_sums, grad, dots, grad_key,
    scale, items, heads, rows, length, num_keys, dim, width,
    FLOAT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of BN keys, summed over one split of the rows: (splits, B, heads, S, d)."""
    item = tl.program_id(2).to(tl.int64)
    image, head = item // heads, item % heads
    split, splits = tl.program_id(1), tl.num_programs(1)
    keys = tl.program_id(0) * BN + tl.arange(0, BN)
    k = _load_keys(key, key_b, key_h, key_s, key_d, image, head, keys, num_keys, dim, BD)
    own = _load_gradient(grad, item, width, keys, num_keys, BW)
    result = tl.zeros([BN, BD], tl.float32)
    for start in range(split * BM, rows, splits * BM):
        q, slot, _ = _load_rows(
            query, query_b, query_h, query_l, query_d, positions, slots, slots_b,
            image, head, start, rows, length, dim, BM, BD,
        )  # fmt: skip
        row = start + tl.arange(0, BM)
        log_sum = tl.load(log_sums + item * rows + row, mask=row < rows, other=0.0)
        dot = tl.load(dots + item * rows + row, mask=row < rows, other=0.0)
        share = _shares(shares, slot, image, width, BW)
        attention = tl.exp(_scores(q, k, scale, keys, num_keys, FLOAT) - log_sum[:, None])
        change = attention * (tl.dot(share, own, input_precision='tf32x3') - dot[:, None])
        result += tl.dot(tl.trans(change), q.to(tl.float32), input_precision='tf32x3')
    column = tl.arange(0, BD)
    out = grad_key + ((split * items + item) * num_keys + keys[:, None]) * dim + column[None, :]
    tl.store(out, result * scale, mask=(keys < num_keys)[:, None] & (column < dim)[None, :])


class _Call:
    """The sizes and arguments that all kernels get."""

    def __init__(self, query: Tensor, key: Tensor, scale: float, regions: ClassRegions) -> None:
        self.batch, self.heads, self.length, self.dim = query.shape
        self.keys, self.width = key.shape[2], regions.width
        self.rows = regions.positions.shape[1]
        self.items = self.batch * self.heads
        columns = max(16, triton.next_power_of_2(self.dim))
        itemsize = max(query.element_size(), key.element_size())
        # Rows of at most 128 bytes in blocks of 64 also fit into the shared memory of smaller GPUs.
        block = 64 if columns * itemsize <= 128 else 32
        self.blocks = triton.cdiv(self.rows, block), triton.cdiv(self.keys, block)
        self.splits = max(1, min(self.blocks[0], PROGRAMS // max(1, self.items * self.blocks[1])))
        slots = regions.ordered_slots
        self.inputs = (query, *query.stride(), key, *key.stride())
        self.places = (regions.positions, slots, slots.stride(0))
        self.sizes = (self.heads, self.rows, self.length, self.keys, self.dim)
        self.scale, self.shares = scale, regions.shares
        self.options = dict(
            FLOAT=query.dtype == torch.float32 or key.dtype != query.dtype,
            BM=block,
            BN=block,
            BD=columns,
            num_warps=4,
            num_stages=2,
        )
        self.wide = self.options | dict(BW=max(16, triton.next_power_of_2(self.width)))

    @property
    def by_rows(self) -> tuple[int, int]:
        """The launch grid of kernels in which each program has some of the rows."""
        return self.blocks[0], self.items

    @property
    def by_keys(self) -> tuple[int, int, int]:
        """The launch grid of kernels in which each program has some of the keys."""
        return self.blocks[1], self.splits, self.items


class FusedRegionMean(torch.autograd.Function):
    """Region means of the attention. Saves queries, keys, positions and one number per row for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, scale: float, regions: ClassRegions
    ) -> Tensor:
        """Computes means (B, heads, width, S) from queries (B, heads, L, d) and keys (B, heads, S, d)."""
        call = _Call(query, key, scale, regions)
        log_sums = query.new_empty(call.items, call.rows, dtype=torch.float32)
        means = query.new_empty(
            call.splits, call.batch, call.heads, call.width, call.keys, dtype=torch.float32
        )
        with torch.cuda.device_of(query):
            _log_sums_kernel[call.by_rows](
                *call.inputs, *call.places, log_sums, scale, *call.sizes, **call.options
            )
            _means_kernel[call.by_keys](
                *call.inputs, *call.places, call.shares, log_sums, means,
                scale, call.items, *call.sizes, call.width, **call.wide,
            )  # fmt: skip
        ctx.save_for_backward(query, key, log_sums)
        ctx.scale, ctx.regions = scale, regions
        return means.sum(0) if call.splits > 1 else means[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Computes the gradients of queries and keys from that of the means (B, heads, width, S)."""
        query, key, log_sums = ctx.saved_tensors
        call = _Call(query, key, ctx.scale, ctx.regions)
        grad = grad.contiguous()
        grad_query = query.new_zeros(call.batch, call.length, call.heads, call.dim)
        dots = torch.empty_like(log_sums)
        grad_key = log_sums.new_empty(call.splits, call.batch, call.heads, call.keys, call.dim)
        with torch.cuda.device_of(query):
            _grad_query_kernel[call.by_rows](
                *call.inputs, *call.places, call.shares, log_sums, grad, grad_query, dots,
                ctx.scale, *call.sizes, call.width, **call.wide,
            )  # fmt: skip
            _grad_key_kernel[call.by_keys](
                *call.inputs, *call.places, call.shares, log_sums, grad, dots, grad_key,
                ctx.scale, call.items, *call.sizes, call.width, **call.wide,
            )  # fmt: skip
        whole = grad_key.sum(0) if call.splits > 1 else grad_key[0]
        return grad_query.transpose(1, 2), whole.to(key.dtype), None, None
