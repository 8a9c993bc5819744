"""A GPU kernel for attention within short texts, written in OpenAI's Triton, the compiler that PyTorch brings.

FlashAttention works on blocks of 128 tokens. Product texts are shorter, so most of such a block would be empty.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # tokens
LOG2_E = math.log2(math.e)  # powers of 2 are faster than those of e


def attend(qkv: Tensor, offsets: Tensor, heads: int, longest: int, scale: Tensor | None, most: float) -> Tensor:
    """Return the self-attention [tokens, hidden] of each text.

    Args:
        qkv: [tokens, 3 × hidden], queries, keys and values of each token, in 16 bits.
        offsets: [texts + 1], where each text starts and the last one ends, int32.
        longest: tokens of the longest text.
        scale: None, or the scale of outputs in float8_e4m3fn, which saturate at `most`.
    """
    tokens, hidden = qkv.shape[0], qkv.shape[1] // 3
    width = hidden // heads
    output = qkv.new_empty(tokens, hidden, dtype=qkv.dtype if scale is None else torch.float8_e4m3fn)
    grid = (len(offsets) - 1, heads, triton.cdiv(longest, BLOCK))
    _attend[grid](
        qkv,
        output,
        offsets,
        qkv if scale is None else scale,
        LOG2_E / width**0.5,
        heads,
        width=width,
        block=BLOCK,
        most=0.0 if scale is None else most,
        num_warps=4,
        num_stages=1,
    )
    return output


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]  # the compiler reads only the annotation constexpr
    qkv,
    output,
    offsets,
    scale,
    temperature,
    heads,
    width: tl.constexpr,
    block: tl.constexpr,
    most: tl.constexpr,
):
    """Compute a block of queries of one text and head, with FlashAttention's online softmax. `most` 0: no `scale`."""
    text, head, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * block
    start = tl.load(offsets + text)
    length = tl.load(offsets + text + 1) - start
    if first >= length:
        return
    row = 3 * heads * width  # numbers of one token in `qkv`
    own = qkv + start.to(tl.int64) * row + head * width
    places = tl.arange(0, block)
    columns = tl.arange(0, width)[None]
    queries = first + places[:, None]
    q = tl.load(own + queries * row + columns, mask=queries < length, other=0.0)
    highest = tl.full([block], float("-inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    context = tl.zeros([block, width], tl.float32)
    for begin in range(0, length, block):
        keys = begin + places[:, None]
        known = keys < length
        k = tl.load(own + heads * width + keys * row + columns, mask=known, other=0.0)
        v = tl.load(own + 2 * heads * width + keys * row + columns, mask=known, other=0.0)
        scores = tl.where((begin + places)[None] < length, tl.dot(q, tl.trans(k)) * temperature, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - higher)
        powers = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(powers, 1)
        context = tl.dot(powers.to(v.dtype), v, context * shrink[:, None])
        highest = higher
    context = context / total[:, None]
    if most > 0:
        context = tl.minimum(tl.maximum(context / tl.load(scale), -most), most)
    target = output + (start + queries).to(tl.int64) * (heads * width) + head * width + columns
    tl.store(target, context.to(output.dtype.element_ty), mask=queries < length)
