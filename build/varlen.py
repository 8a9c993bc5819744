"""The encoder over flat tokens: no padding, variable-length FlashAttention. This layout is for NVIDIA GPUs.

See Dao 2023, "FlashAttention-2" (arXiv:2307.08691). On a CPU the module uses a simple reference attention instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aisle.build.encoder import Encoder, Layer, Pooled, Shape, rotate
from aisle.build.families import shape_of_model, weights_of_model
from aisle.build.graph import mean
from aisle.errors import InputError

MAX_FP8 = 448.0  # the largest number of float8_e4m3fn
SHORT = 256  # tokens; for longer texts, FlashAttention is faster than `kernels.attend`
SHORT_WIDTHS = (32, 64, 128)  # sizes of an attention head that its kernel supports


def shape_of(model: Any) -> Shape:
    """Return the sizes of a classifier of transformers.

    Raises:
        InputError: its family is not supported, or FlashAttention cannot run it.
    """
    shape = shape_of_model(model)
    if shape.relative:
        raise InputError(
            f"target cuda cannot run a {model.config.model_type!r} model: FlashAttention has no relative positions; "
            "use --target tensorrt or openvino"
        )
    if shape.width % 8 or shape.width > 256:
        raise InputError(
            f"target cuda needs a head size that is a multiple of 8, up to 256, not {shape.width}; use another target"
        )
    return shape


class Batch(NamedTuple):
    """What every layer's attention reads of a batch."""

    offsets: Tensor  # [texts + 1]
    turns: dict[float, tuple[Tensor, Tensor]]  # by rotary base: cosine and sine, [tokens, 1, head size]


class VarlenEncoder(Encoder):
    """A classifier of transformers over texts laid end to end, without padding. Attention stays inside each text."""

    def __init__(self, shape: Shape, max_tokens: int, dtype: torch.dtype, *, fuse_gelu: bool = True) -> None:
        """Make a module with uninitialized weights.

        Args:
            max_tokens: the number of tokens of the longest text.
            fuse_gelu: in 16 bits, compute GELU inside the matrix product, with its tanh approximation (Hendrycks and
                Gimpel 2016). The error is smaller than the rounding to 16 bits, and the widest tensor is not written
                and read again. Gated layers need the exact product.
        """
        fused = fuse_gelu and shape.activation == "gelu" and dtype in (torch.float16, torch.bfloat16)
        layer = GeluLayer if fused else FlatLayer
        super().__init__(shape, dtype, lambda number: VarlenAttention(shape, number, max_tokens), layer)

    def forward(self, input_ids: Tensor, position_ids: Tensor, offsets: Tensor) -> Tensor:
        """Return [texts, outputs] in fp32: the logits and, if `shape.embeds`, the embeddings.

        Args:
            input_ids: [tokens], the texts end to end, int32.
            position_ids: [tokens], from 0 in each text, int32.
            offsets: [texts + 1], where each text starts and the last one ends, int32. Logits of empty texts are
                meaningless.
        """
        hidden = self.embed(input_ids, position_ids)  # [tokens, hidden]
        batch = Batch(offsets, self.turns(position_ids))
        for layer in self.layers[:-1]:
            hidden = layer(hidden, batch)
        first = offsets[:-1].clamp(max=input_ids.shape[0] - 1)
        below = mean(hidden, text_of(offsets, len(hidden)), first) if self.shape.reads_below else None
        if self.shape.averages:
            hidden = self.last(self.layers[-1](hidden, batch))
            pooled = self.choose(hidden[first], mean(hidden, text_of(offsets, len(hidden)), first), below)
        else:
            # Only [CLS] is read, so the last layer, except its attention, runs on one token per text.
            read = self.last(self.layers[-1](hidden, batch, first))
            pooled = Pooled(read, read, below)
        return self.outputs(pooled) if self.shape.embeds else self.classify(pooled)

    def use_flash_attention(self) -> None:
        """Use no kernel of our own, as it takes a C compiler."""
        for each in self.modules():
            if isinstance(each, VarlenAttention):
                each.short = False


class VarlenAttention(nn.Module):
    """Attention within the texts of a flat batch."""

    def __init__(self, shape: Shape, number: int, max_tokens: int) -> None:
        super().__init__()
        self.heads, self.max_tokens = shape.heads, max_tokens
        self.window = shape.windows[number] if shape.windows else 0
        self.theta = shape.thetas[number] if shape.thetas else 0.0
        self.short = max_tokens <= SHORT and shape.width in SHORT_WIDTHS and not (self.window or self.theta)

    def forward(self, qkv: Tensor, batch: Batch, scale: Tensor | None = None) -> Tensor:
        """Return the context [tokens, hidden] in the type of `qkv` or, with a `scale`, in float8_e4m3fn."""
        context: Tensor
        if self.short:
            context = attend_short(qkv, batch.offsets, self.heads, self.max_tokens, scale)
            return context
        q, k, v = split(qkv, self.heads)
        if self.theta:
            q, k = (rotate(each, *batch.turns[self.theta]) for each in (q, k))
        context = attend(q, k, v, batch.offsets, self.max_tokens, self.window).flatten(1)
        return context if scale is None else to_fp8(context, scale)


class FlatLayer(Layer):
    """A layer of BERT over flat tokens. In fp8, attention and GELU write the next product's input at once."""

    def attend(self, hidden: Tensor, batch: Batch) -> Tensor:
        scale = self.project.input_scale if isinstance(self.project, Fp8Linear) else None
        context: Tensor = self.attention(self.qkv(hidden), batch, scale)
        return context


class GeluLayer(FlatLayer):
    """A layer that computes GELU inside the matrix product."""

    def expand(self, hidden: Tensor) -> Tensor:
        if not isinstance(self.up, nn.Linear):  # in fp8
            return tanh_gelu(self.up(hidden))
        wide: Tensor = linear_gelu(hidden, self.up.weight, self.up.bias)
        return wide


class Fp8Linear(nn.Module):
    """A linear layer with weights and inputs in float8_e4m3fn, each with one static scale. It accumulates in fp32."""

    weight_scale: Tensor
    input_scale: Tensor

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        weight = torch.zeros(outputs, inputs, dtype=torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype), requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(()))
        self.register_buffer("input_scale", torch.ones(()))

    @staticmethod
    def of(source: nn.Linear, largest: float) -> Fp8Linear:
        """Quantize a layer; `largest` is the largest |input| that calibration saw."""
        layer = Fp8Linear(source.in_features, source.out_features, source.weight.dtype)
        weight = source.weight.detach().float()
        layer.weight_scale.copy_(weight.abs().max().clamp(min=1e-12) / MAX_FP8)
        layer.input_scale.fill_(max(largest, 1e-12) / MAX_FP8)
        layer.weight.data = to_fp8(weight, layer.weight_scale)
        layer.bias.data = source.bias.detach().to(layer.dtype)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        rounded = x if x.dtype == torch.float8_e4m3fn else to_fp8(x, self.input_scale)
        if x.is_cuda:
            scales = self.input_scale, self.weight_scale
            return torch._scaled_mm(
                rounded, self.weight.t(), *scales, bias=self.bias, out_dtype=self.dtype, use_fast_accum=True
            )
        product = (rounded.float() @ self.weight.float().t()) * (self.input_scale * self.weight_scale)
        return (product + self.bias.float()).to(self.dtype)


def tanh_gelu(x: Tensor) -> Tensor:
    """Return GELU in its tanh approximation, in fp32: x · sigmoid(2 · √(2/π) · (x + 0.044715 x³)), the fastest form."""
    x = x.float()
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Return x / scale in float8_e4m3fn; values out of range saturate."""
    return (x.float() / scale).clamp(-MAX_FP8, MAX_FP8).to(torch.float8_e4m3fn)


def copy_weights(module: VarlenEncoder, model: Any) -> VarlenEncoder:
    """Copy the weights of a classifier of transformers into a module of the same shape."""
    module.load(weights_of_model(model))
    return module.eval()


def attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, window: int = 0) -> Tensor:
    """Return the self-attention [tokens, heads, width] of each text.

    `torch.nn.attention.varlen` exists since PyTorch 2.10. Its keyword arguments have changed since then, but not the
    first seven positional arguments. Older versions, and those without windows, have the internal operator.

    Args:
        window: how many tokens each token sees to each side; 0: its whole text.
    """
    if not q.is_cuda:
        return _reference_attention(q, k, v, offsets, window)
    if _varlen_attn is not None and not window:
        context: Tensor = _varlen_attn(q, k, v, offsets, offsets, longest, longest)
    else:
        sides = {"window_size_left": window, "window_size_right": window} if window else {}
        flash = torch.ops.aten._flash_attention_forward
        context = flash(q, k, v, offsets, offsets, longest, longest, 0.0, False, False, **sides)[0]
    return context


def split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, each [tokens, heads, width], of [tokens, 3 × hidden]."""
    q, k, v = qkv.view(qkv.shape[0], 3, heads, -1).unbind(1)
    return q, k, v


def _reference_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, window: int) -> Tensor:
    """Reference attention with a mask over all pairs of tokens: slow but simple."""
    text, place = text_of(offsets, q.shape[0]), torch.arange(q.shape[0])
    seen = text[:, None] == text[None]
    if window:
        seen = seen & ((place[:, None] - place[None]).abs() <= window)
    q, k, v = (each.transpose(0, 1) for each in (q, k, v))
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen)[0].transpose(0, 1)


def text_of(offsets: Tensor, tokens: int) -> Tensor:
    """Return the number of each token's text, [tokens], from 1."""
    return torch.searchsorted(offsets, torch.arange(tokens, dtype=offsets.dtype, device=offsets.device), right=True)


def _import_varlen_attn() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


_varlen_attn = _import_varlen_attn()


def _import_kernels() -> Any:
    try:
        from aisle.build import kernels
    except ImportError:  # a PyTorch for CPUs brings no Triton compiler
        return None
    return kernels


_kernels = _import_kernels()


@torch.library.custom_op("aisle::attend_short", mutates_args=())
def attend_short(qkv: Tensor, offsets: Tensor, heads: int, longest: int, scale: Tensor | None) -> Tensor:
    """Return the self-attention [tokens, hidden] of each short text, in float8_e4m3fn if there is a `scale`."""
    if qkv.is_cuda and _kernels is not None:
        context: Tensor = _kernels.attend(qkv, offsets, heads, longest, scale, MAX_FP8)
        return context
    context = attend(*split(qkv, heads), offsets, longest).flatten(1)
    return context if scale is None else to_fp8(context, scale)


@attend_short.register_fake
def _(qkv: Tensor, offsets: Tensor, heads: int, longest: int, scale: Tensor | None) -> Tensor:
    dtype = qkv.dtype if scale is None else torch.float8_e4m3fn
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3, dtype=dtype)


@torch.library.custom_op("aisle::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return GELU of a linear layer, in one kernel on a GPU. torch.compile does not split a custom operator."""
    if x.is_cuda:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
