"""The encoder as every target computes it: embeddings, layers and classifier of any family, without attention.

The graphs in `graph.py` (packed rows) and `varlen.py` (flat tokens) add attention for their layout of the tokens.
`families.py` reads the sizes and the weights from a model of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}

ROTARY = "rotary_"  # the names of the rotary frequencies start with it


@dataclass(frozen=True)
class Shape:
    """What a graph needs to know of an encoder besides its weights. Target `cuda` saves it in `module.json`."""

    vocabulary: int
    positions: int  # tokens of the longest text that the encoder can read
    hidden: int
    layers: int
    heads: int
    intermediate: int
    labels: int
    activation: str  # a key of `ACTIVATIONS`
    eps: float  # of LayerNorm
    word_size: int = 0  # of the word embeddings, if they are projected to the hidden size
    norms_embedding: bool = False  # the embeddings' LayerNorm has the hidden size, after the projection
    learned_positions: bool = True  # a table of position embeddings
    head: str = "tanh"  # the activation between the classifier's two layers
    norm_first: bool = False  # LayerNorm before attention and before the feed-forward part, as in ModernBERT
    pooling: str = "first"  # the classifier reads the first token, or the "mean" of all tokens
    windows: tuple[
        int, ...
    ] = ()  # of each layer, how many tokens it sees to each side; 0: all. Empty: all layers see all
    thetas: tuple[float, ...] = ()  # of each layer, the base of its rotary positions; empty: no rotary positions
    relative: str = ""  # "bias" (MPNet) or "disentangled" (DeBERTa) relative positions
    buckets: int = 0  # of the disentangled distances
    # The embedding is the "first" token's hidden state or the "mean" of all; "" means as `pooling`.
    embedding_pooling: str = ""
    reads_below: bool = False  # rows of added categories read the mean hidden state before the last layer
    embeds: bool = False  # the module returns, after the logits, the embedding of each text
    attributes: int = 0  # values of further heads, whose logits follow those of the categories

    @property
    def width(self) -> int:
        """The size of an attention head."""
        return self.hidden // self.heads

    @property
    def averages(self) -> bool:
        """Whether the hidden states of all tokens are averaged."""
        return "mean" in (self.pooling, self.embedding_pooling)

    @property
    def outputs(self) -> int:
        """The number of values that the module returns for a text."""
        return self.labels + self.attributes + self.hidden * self.embeds

    def __post_init__(self) -> None:
        # JSON has lists only.
        object.__setattr__(self, "windows", tuple(self.windows))
        object.__setattr__(self, "thetas", tuple(self.thetas))


class Pooled(NamedTuple):
    """What is read of the hidden states, each [texts, hidden]."""

    read: Tensor  # by the classifier
    embedding: Tensor
    below: Tensor | None  # the means before the last layer, if `Shape.reads_below`


class Encoder(nn.Module):
    """Embeddings, layers, pooling and classifier. A subclass says where texts are, and how its layers attend.

    With a 16-bit `dtype`, embeddings and matrix products use it; sums, LayerNorm and classifier use fp32.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, attention: Callable[[int], nn.Module], layer: type[Layer]
    ) -> None:
        """Make a module with uninitialized weights.

        Args:
            attention: makes the attention of a layer, given its number. It maps the layer's queries, keys and values,
                […, 3 × hidden], and what the subclass prepared for the batch, to […, hidden].
            layer: the class of the layers, unless the family has `NormFirstLayer`.
        """
        super().__init__()
        self.shape, self.dtype = shape, dtype
        size = shape.word_size or shape.hidden
        self.word = nn.Embedding(shape.vocabulary, size, dtype=dtype)
        self.position = nn.Embedding(shape.positions, size, dtype=dtype) if shape.learned_positions else None
        self.norm = SumNorm(shape.hidden if shape.norms_embedding else size, shape.eps, dtype)
        self.widen = nn.Linear(size, shape.hidden, dtype=dtype) if shape.word_size else None
        kind = NormFirstLayer if shape.norm_first else layer
        self.layers = nn.ModuleList(kind(shape, dtype, number, attention(number)) for number in range(shape.layers))
        self.last_norm = SumNorm(shape.hidden, shape.eps, torch.float32) if shape.norm_first else None
        self.pooler = nn.Linear(shape.hidden, shape.hidden)
        self.head_norm = SumNorm(shape.hidden, shape.eps, torch.float32) if shape.norm_first else None
        self.classifier = nn.Linear(shape.hidden, shape.labels)
        self.added = nn.Linear(shape.hidden, shape.labels, bias=False) if shape.reads_below else None
        self.attributes = nn.Linear(shape.hidden, shape.attributes) if shape.attributes else None
        for theta in {*shape.thetas}:
            self.register_buffer(_rotary(theta), _inverse_frequencies(theta, shape.width))

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return the first layer's input […, hidden], for token ids and positions of any shape."""
        words = self.word(input_ids)
        positions = None if self.position is None else self.position(position_ids)
        if self.widen is None:
            hidden: Tensor = self.norm(words, positions)
        elif self.shape.norms_embedding:
            hidden = self.norm(self.widen(words if positions is None else words + positions))
        else:
            hidden = self.widen(self.norm(words, positions))
        return hidden

    def turns(self, position_ids: Tensor) -> dict[float, tuple[Tensor, Tensor]]:
        """Return the cosine and sine of each rotary base, [rows, 1, width, head size] or [tokens, 1, head size]."""
        found = {}
        for theta in {*self.shape.thetas}:
            angles = (position_ids[..., None].float() * self.get_buffer(_rotary(theta)))[:, None]
            angles = torch.cat((angles, angles), dim=-1)
            found[theta] = angles.cos(), angles.sin()
        return found

    def classify(self, pooled: Pooled) -> Tensor:
        """Return logits [texts, labels + attributes] in fp32."""
        features = ACTIVATIONS[self.shape.head](self.pooler(pooled.read.float()))
        if self.head_norm is not None:
            features = self.head_norm(features)
        logits: Tensor = self.classifier(features)
        if self.added is not None and pooled.below is not None:
            logits = logits + self.added(pooled.below)
        return logits if self.attributes is None else torch.cat([logits, self.attributes(pooled.read.float())], dim=1)

    def choose(self, first: Tensor, average: Tensor, below: Tensor | None) -> Pooled:
        """Return what is read of the last hidden states, given those of the first tokens and the means."""
        of = {"first": first, "mean": average}
        return Pooled(of[self.shape.pooling], of[self.shape.embedding_pooling or self.shape.pooling], below)

    def outputs(self, pooled: Pooled) -> Tensor:
        """Return logits and, after them, the embeddings: [texts, labels + attributes + hidden] in fp32."""
        return torch.cat([self.classify(pooled), pooled.embedding.float()], dim=1)

    def last(self, hidden: Tensor) -> Tensor:
        """Apply the LayerNorm after the last layer, in families that have one."""
        return hidden if self.last_norm is None else self.last_norm(hidden)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights that `families.Family.weights` returns, and convert them to the types used here."""
        with torch.no_grad():
            for name, own in [*self.named_parameters(), *self.named_buffers()]:
                if not name.startswith(ROTARY):  # which is computed
                    own.copy_(weights[name].detach())


class Layer(nn.Module):
    """A layer with LayerNorm after attention and after the feed-forward part, as in BERT."""

    def __init__(self, shape: Shape, dtype: torch.dtype, number: int, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.activation = attention, ACTIVATIONS[shape.activation]
        self.qkv: nn.Module = nn.Linear(shape.hidden, 3 * shape.hidden, dtype=dtype)
        self.project: nn.Module = nn.Linear(shape.hidden, shape.hidden, dtype=dtype)
        self.norm = SumNorm(shape.hidden, shape.eps, dtype)
        self.up: nn.Module = nn.Linear(shape.hidden, shape.intermediate, dtype=dtype)
        self.down: nn.Module = nn.Linear(shape.intermediate, shape.hidden, dtype=dtype)
        self.norm_out = SumNorm(shape.hidden, shape.eps, dtype)

    def forward(self, hidden: Tensor, batch: Any, keep: Tensor | None = None) -> Tensor:
        """Return the layer's output […, hidden], or only [texts, hidden] for the flattened tokens `keep`."""
        context = self.attend(hidden, batch)
        if keep is not None:
            hidden, context = hidden.flatten(0, -2)[keep], context.flatten(0, -2)[keep]
        hidden = self.norm(hidden, self.project(context))
        output: Tensor = self.norm_out(hidden, self.down(self.expand(hidden)))
        return output

    def attend(self, hidden: Tensor, batch: Any) -> Tensor:
        """Return what attention reads of the other tokens, […, hidden]."""
        context: Tensor = self.attention(self.qkv(hidden), batch)
        return context

    def expand(self, hidden: Tensor) -> Tensor:
        """Return the feed-forward part's wide activations."""
        return self.activation(self.up(hidden))


class NormFirstLayer(nn.Module):
    """A layer of ModernBERT: LayerNorm before each part, and a gated feed-forward part (GeGLU, Shazeer 2020).

    The sums over the layers grow, so they stay in fp32.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, number: int, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.activation = attention, ACTIVATIONS[shape.activation]
        # The embeddings are normalized already.
        self.norm: nn.Module = SumNorm(shape.hidden, shape.eps, dtype) if number else nn.Identity()
        self.qkv: nn.Module = nn.Linear(shape.hidden, 3 * shape.hidden, dtype=dtype)
        self.project: nn.Module = nn.Linear(shape.hidden, shape.hidden, dtype=dtype)
        self.norm_out = SumNorm(shape.hidden, shape.eps, dtype)
        self.up: nn.Module = nn.Linear(shape.hidden, 2 * shape.intermediate, dtype=dtype)
        self.down: nn.Module = nn.Linear(shape.intermediate, shape.hidden, dtype=dtype)

    def forward(self, hidden: Tensor, batch: Any, keep: Tensor | None = None) -> Tensor:
        """Return the layer's output […, hidden] in fp32, or only [texts, hidden] for the flattened tokens `keep`."""
        context = self.attention(self.qkv(self.norm(hidden)), batch)
        if keep is not None:
            hidden, context = hidden.flatten(0, -2)[keep], context.flatten(0, -2)[keep]
        hidden = hidden.float() + self.project(context).float()
        wide, gate = self.up(self.norm_out(hidden)).chunk(2, dim=-1)
        output: Tensor = hidden + self.down(self.activation(wide) * gate).float()
        return output


class SumNorm(nn.Module):
    """LayerNorm of a sum, computed in fp32 for every input and output type."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps, self.dtype = eps, dtype

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        total = a.float() if b is None else a.float() + b.float()
        return F.layer_norm(total, self.weight.shape, self.weight, self.bias, self.eps).to(self.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys by their positions (Su et al. 2021, "RoFormer", arXiv:2104.09864), in fp32.

    Args:
        cos: as `sin`, […, width], broadcast against `x`.
    """
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


def _rotary(theta: float) -> str:
    return f"{ROTARY}{theta:g}".replace(".", "_").replace("+", "")


def _inverse_frequencies(theta: float, width: int) -> Tensor:
    """Return the rotary frequencies [width / 2] of a base."""
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float) / width)
