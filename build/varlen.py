"""BERT over flat tokens: no padding, variable-length FlashAttention. This layout is for NVIDIA GPUs.

See Dao 2023, "FlashAttention-2" (arXiv:2307.08691). On a CPU the module uses a simple reference attention instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aisle.errors import InputError

MAX_FP8 = 448.0  # the largest number of float8_e4m3fn
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Shape:
    """Sizes of the encoder, saved in `module.json`."""

    vocabulary: int
    positions: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    labels: int
    activation: str  # a key of `ACTIVATIONS`
    eps: float  # of LayerNorm

    @staticmethod
    def of(model: Any) -> Shape:
        """Read the sizes of a `transformers.BertForSequenceClassification`.

        Raises:
            InputError: the architecture is not BERT, or FlashAttention cannot run it.
        """
        config = model.config
        if config.model_type != "bert" or getattr(config, "is_decoder", False) or not hasattr(model, "classifier"):
            raise InputError(f"cannot compile a {type(model).__name__}; give a BertForSequenceClassification")
        if config.hidden_act not in ACTIVATIONS:
            raise InputError(
                f"target cuda does not support activation {config.hidden_act!r}, only {', '.join(ACTIVATIONS)}"
            )
        width = config.hidden_size // config.num_attention_heads
        if width % 8 or width > 256:
            raise InputError(
                f"target cuda needs a head size that is a multiple of 8, up to 256, not {width}; use another target"
            )
        return Shape(
            config.vocab_size,
            config.max_position_embeddings,
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.intermediate_size,
            model.classifier.out_features,
            config.hidden_act,
            config.layer_norm_eps,
        )


class VarlenBert(nn.Module):
    """`BertForSequenceClassification` over texts laid end to end, without padding. Attention stays inside each text.

    With a 16-bit `dtype`, embeddings and matrix products use it; sums, LayerNorm and classifier use fp32.
    """

    def __init__(self, shape: Shape, max_tokens: int, dtype: torch.dtype, *, fuse_gelu: bool = True) -> None:
        """Make a module with uninitialized weights.

        Args:
            max_tokens: the number of tokens of the longest text.
            fuse_gelu: in 16 bits, compute GELU inside the matrix product, with its tanh approximation (Hendrycks and
                Gimpel 2016). The error is smaller than the rounding to 16 bits, and the widest tensor is not written
                and read again.
        """
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.word = nn.Embedding(shape.vocabulary, shape.hidden, dtype=dtype)
        self.position = nn.Embedding(shape.positions, shape.hidden, dtype=dtype)
        self.norm = SumNorm(shape, dtype)
        fused = fuse_gelu and shape.activation == "gelu" and dtype in (torch.float16, torch.bfloat16)
        self.layers = nn.ModuleList(VarlenLayer(shape, max_tokens, dtype, fused) for _ in range(shape.layers))
        self.pooler = nn.Linear(shape.hidden, shape.hidden)
        self.classifier = nn.Linear(shape.hidden, shape.labels)

    def forward(self, input_ids: Tensor, position_ids: Tensor, offsets: Tensor) -> Tensor:
        """Return logits [texts, labels] in fp32.

        Args:
            input_ids: [tokens], the texts end to end, int32.
            position_ids: [tokens], from 0 in each text, int32.
            offsets: [texts + 1], where each text starts and the last one ends, int32. Logits of empty texts are
                meaningless.
        """
        hidden = self.norm(self.word(input_ids), self.position(position_ids))  # [tokens, hidden]
        for layer in self.layers[:-1]:
            hidden = layer(hidden, offsets)
        # The classifier reads only [CLS], so the last layer, except its attention, runs on one token per text.
        first = offsets[:-1].clamp(max=input_ids.shape[0] - 1)
        cls = self.layers[-1](hidden, offsets, first)
        logits: Tensor = self.classifier(torch.tanh(self.pooler(cls.float())))
        return logits


class VarlenLayer(nn.Module):
    def __init__(self, shape: Shape, max_tokens: int, dtype: torch.dtype, fuse_gelu: bool) -> None:
        super().__init__()
        self.heads, self.max_tokens, self.fuse_gelu = shape.heads, max_tokens, fuse_gelu
        self.activation = ACTIVATIONS[shape.activation]
        self.qkv: nn.Module = nn.Linear(shape.hidden, 3 * shape.hidden, dtype=dtype)
        self.project: nn.Module = nn.Linear(shape.hidden, shape.hidden, dtype=dtype)
        self.norm = SumNorm(shape, dtype)
        self.up: nn.Module = nn.Linear(shape.hidden, shape.intermediate, dtype=dtype)
        self.down: nn.Module = nn.Linear(shape.intermediate, shape.hidden, dtype=dtype)
        self.norm_out = SumNorm(shape, dtype)

    def forward(self, hidden: Tensor, offsets: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the layer's output [tokens, hidden], or only [texts, hidden] for the tokens `keep`."""
        q, k, v = self.qkv(hidden).view(hidden.shape[0], 3, self.heads, -1).unbind(1)  # each [tokens, heads, width]
        context = attend(q, k, v, offsets, self.max_tokens).flatten(1)
        if keep is not None:
            hidden, context = hidden[keep], context[keep]
        hidden = self.norm(hidden, self.project(context))
        output: Tensor = self.norm_out(hidden, self.down(self._expand(hidden)))
        return output

    def _expand(self, hidden: Tensor) -> Tensor:
        if self.fuse_gelu and isinstance(self.up, nn.Linear):
            wide: Tensor = linear_gelu(hidden, self.up.weight, self.up.bias)
        else:
            wide = self.activation(self.up(hidden))
        return wide


class SumNorm(nn.Module):
    """LayerNorm of a sum, computed in fp32 for every input and output type."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden))
        self.bias = nn.Parameter(torch.zeros(shape.hidden))
        self.eps, self.dtype = shape.eps, dtype

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(a.float() + b.float(), self.weight.shape, self.weight, self.bias, self.eps).to(self.dtype)


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
        rounded = to_fp8(x, self.input_scale)
        if x.is_cuda:
            scales = self.input_scale, self.weight_scale
            return torch._scaled_mm(
                rounded, self.weight.t(), *scales, bias=self.bias, out_dtype=self.dtype, use_fast_accum=True
            )
        product = (rounded.float() @ self.weight.float().t()) * (self.input_scale * self.weight_scale)
        return (product + self.bias.float()).to(self.dtype)


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Return x / scale in float8_e4m3fn; values out of range saturate."""
    return (x.float() / scale).clamp(-MAX_FP8, MAX_FP8).to(torch.float8_e4m3fn)


def copy_weights(module: VarlenBert, model: Any) -> VarlenBert:
    """Copy the weights of a `transformers.BertForSequenceClassification` into a module of the same shape."""
    bert, embeddings = model.bert, model.bert.embeddings
    # Every token has type 0, so the embedding of type 0 is added to the position embeddings here.
    position = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
    pairs: list[tuple[Any, Any]] = [
        (module.norm, embeddings.LayerNorm),
        (module.pooler, bert.pooler.dense),
        (module.classifier, model.classifier),
    ]
    with torch.no_grad():
        module.word.weight.copy_(embeddings.word_embeddings.weight)
        module.position.weight.copy_(position)
        each: Any
        for each, source in zip(module.layers, bert.encoder.layer, strict=True):
            own = source.attention.self
            each.qkv.weight.copy_(torch.cat([own.query.weight, own.key.weight, own.value.weight]))
            each.qkv.bias.copy_(torch.cat([own.query.bias, own.key.bias, own.value.bias]))
            pairs += [
                (each.project, source.attention.output.dense),
                (each.norm, source.attention.output.LayerNorm),
                (each.up, source.intermediate.dense),
                (each.down, source.output.dense),
                (each.norm_out, source.output.LayerNorm),
            ]
        for target, source in pairs:
            target.weight.copy_(source.weight)
            target.bias.copy_(source.bias)
    return module.eval()


def attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Return the self-attention [tokens, heads, width] of each text.

    `torch.nn.attention.varlen` exists since PyTorch 2.10. Its keyword arguments have changed since then, but not the
    first seven positional arguments. Older versions have only the internal operator.
    """
    if not q.is_cuda:
        return _reference_attention(q, k, v, offsets)
    if _varlen_attn is not None:
        context: Tensor = _varlen_attn(q, k, v, offsets, offsets, longest, longest)
    else:
        flash = torch.ops.aten._flash_attention_forward
        context = flash(q, k, v, offsets, offsets, longest, longest, 0.0, False, False)[0]
    return context


def _reference_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Reference attention with a mask over all pairs of tokens: slow but simple."""
    text = torch.searchsorted(offsets, torch.arange(q.shape[0], dtype=offsets.dtype), right=True)
    same = text[:, None] == text[None]
    q, k, v = (each.transpose(0, 1) for each in (q, k, v))
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=same)[0].transpose(0, 1)


def _import_varlen_attn() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


_varlen_attn = _import_varlen_attn()


@torch.library.custom_op("aisle::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return GELU of a linear layer, in one kernel on a GPU. torch.compile does not split a custom operator."""
    if x.is_cuda:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
