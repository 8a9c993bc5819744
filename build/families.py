"""The encoder families that can be compiled: where each keeps its sizes and weights in transformers.

A family is a small class with what differs from BERT. `Shape` and weights have the same form for all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from aisle.build.encoder import ACTIVATIONS, Shape
from aisle.errors import InputError
from aisle.train.core.added import added_weight
from aisle.train.core.families import SUPPORTED, classifier_pooling, embedding_pooling, first_position, token_limit
from aisle.train.core.head_rows import NAME as HEADS
from aisle.train.core.head_rows import values_of

Weights = dict[str, Tensor]  # by the names of the parameters in `encoder.Encoder`


class Bert:
    """BERT: absolute positions, LayerNorm after each part, a tanh layer under the classifier."""

    base = "bert"
    layer = "encoder.layer.{}"
    query, key, value = "attention.self.query", "attention.self.key", "attention.self.value"
    project, norm = "attention.output.dense", "attention.output.LayerNorm"
    up, down, norm_out = "intermediate.dense", "output.dense", "output.LayerNorm"
    pooler, classifier, head = "bert.pooler.dense", "classifier", "tanh"
    intermediate, activation = "intermediate_size", "hidden_act"  # settings of the configuration

    def shape(self, model: Any) -> Shape:
        """Return the sizes of a classifier of transformers."""
        config, embeddings = model.config, self._encoder(model).embeddings
        size = embeddings.word_embeddings.embedding_dim
        shape = Shape(
            vocabulary=embeddings.word_embeddings.num_embeddings,
            positions=token_limit(config),
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            intermediate=getattr(config, self.intermediate),
            labels=config.num_labels,
            activation=getattr(config, self.activation),
            eps=embeddings.LayerNorm.eps,
            word_size=0 if size == config.hidden_size else size,
            head=self.head,
            embedding_pooling=embedding_pooling(config),
        )
        return replace(shape, **self.differences(config))

    def differences(self, config: Any) -> dict[str, Any]:
        """Return the fields of `Shape` that BERT leaves at their defaults."""
        return {}

    def weights(self, model: Any) -> Weights:
        """Return the weights; queries are not scaled yet."""
        encoder = self._encoder(model)
        found = self._embeddings(encoder)
        for number in range(model.config.num_hidden_layers):
            layer = self._layer(encoder, number)
            query, key, value = (layer.get_submodule(name) for name in (self.query, self.key, self.value))
            own = {
                "qkv.weight": torch.cat([query.weight, key.weight, value.weight]),
                "qkv.bias": torch.cat([query.bias, key.bias, value.bias]),
                **_copy("project", layer.get_submodule(self.project)),
                **_copy("norm", layer.get_submodule(self.norm)),
                **_copy("up", layer.get_submodule(self.up)),
                **_copy("down", layer.get_submodule(self.down)),
                **_copy("norm_out", layer.get_submodule(self.norm_out)),
                **self.positions_of(encoder, layer),
            }
            found |= {f"layers.{number}.{name}": tensor for name, tensor in own.items()}
        found |= _copy("pooler", model.get_submodule(self.pooler))
        found |= _copy("classifier", model.get_submodule(self.classifier))
        return found

    def positions_of(self, encoder: Any, layer: Any) -> Weights:
        """Return what a layer's attention knows of relative positions."""
        return {}

    def _encoder(self, model: Any) -> Any:
        return model.get_submodule(self.base)

    def _layer(self, encoder: Any, number: int) -> Any:
        return encoder.get_submodule(self.layer.format(number))

    def _embeddings(self, encoder: Any) -> Weights:
        embeddings = encoder.embeddings
        found = {"word.weight": embeddings.word_embeddings.weight, **_copy("norm", embeddings.LayerNorm)}
        # Every token has type 0 and task 0, so their embeddings are added to those of the positions here.
        same = sum(
            getattr(embeddings, name).weight[0]
            for name in ("token_type_embeddings", "task_type_embeddings")
            if getattr(embeddings, name, None) is not None
        )
        if getattr(embeddings, "position_embeddings", None) is not None:
            table = embeddings.position_embeddings.weight[first_position(encoder.config) :]
            found["position.weight"] = table + same
        elif isinstance(same, Tensor):
            found["word.weight"] = found["word.weight"] + same
        return found


class Ernie(Bert):
    """ERNIE 3.0: BERT with task embeddings."""

    base, pooler = "ernie", "ernie.pooler.dense"


class Roberta(Bert):
    """RoBERTa, XLM-RoBERTa and CamemBERT: positions are counted from `pad_token_id` + 1."""

    base, pooler, classifier = "roberta", "classifier.dense", "classifier.out_proj"


class Electra(Bert):
    """ELECTRA: narrower embeddings, and GELU under the classifier."""

    base, pooler, classifier, head = "electra", "classifier.dense", "classifier.out_proj", "gelu"

    def _embeddings(self, encoder: Any) -> Weights:
        found = super()._embeddings(encoder)
        if hasattr(encoder, "embeddings_project"):
            found |= _copy("widen", encoder.embeddings_project)
        return found


class DistilBert(Bert):
    """DistilBERT: no token types, and ReLU under the classifier."""

    base, layer = "distilbert", "transformer.layer.{}"
    query, key, value = "attention.q_lin", "attention.k_lin", "attention.v_lin"
    project, norm = "attention.out_lin", "sa_layer_norm"
    up, down, norm_out = "ffn.lin1", "ffn.lin2", "output_layer_norm"
    pooler, head = "pre_classifier", "relu"
    intermediate, activation = "hidden_dim", "activation"


class Albert(Bert):
    """ALBERT: narrower embeddings, and layers that share their weights. Each gets its own copy, for its own ranges."""

    base, pooler = "albert", "albert.pooler"
    query, key, value = "attention.query", "attention.key", "attention.value"
    project, norm = "attention.dense", "attention.LayerNorm"
    up, down, norm_out = "ffn", "ffn_output", "full_layer_layer_norm"

    def shape(self, model: Any) -> Shape:
        if model.config.inner_group_num != 1:
            raise InputError("an ALBERT with inner_group_num other than 1 cannot be compiled")
        return super().shape(model)

    def differences(self, config: Any) -> dict[str, Any]:
        return {"word_size": config.embedding_size}  # it is projected even to the same size

    def _layer(self, encoder: Any, number: int) -> Any:
        config = encoder.config
        group = int(number / (config.num_hidden_layers / config.num_hidden_groups))
        return encoder.encoder.albert_layer_groups[group].albert_layers[0]

    def _embeddings(self, encoder: Any) -> Weights:
        return super()._embeddings(encoder) | _copy("widen", encoder.encoder.embedding_hidden_mapping_in)


class MPNet(Bert):
    """MPNet: learned positions, and a bias for each distance between two tokens, the same in all layers."""

    base, pooler, classifier = "mpnet", "classifier.dense", "classifier.out_proj"
    query, key, value = "attention.attn.q", "attention.attn.k", "attention.attn.v"
    project, norm = "attention.attn.o", "attention.LayerNorm"

    def differences(self, config: Any) -> dict[str, Any]:
        return {"relative": "bias"}

    def weights(self, model: Any) -> Weights:
        encoder = model.mpnet.encoder
        bucket = encoder.relative_position_bucket(distances(token_limit(model.config)))
        return super().weights(model) | {"distance_bias": encoder.relative_attention_bias.weight[bucket].t()}


class Deberta(Bert):
    """DeBERTa v2 and v3: attention compares contents with distances (He et al. 2021, arXiv:2006.03654)."""

    base, pooler = "deberta", "pooler.dense"
    query, key, value = "attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"

    def shape(self, model: Any) -> Shape:
        config = model.config
        both = {"c2p", "p2c"} == {*(config.pos_att_type or [])}
        if not config.relative_attention or not both:
            raise InputError("a DeBERTa without relative positions of both kinds (c2p and p2c) cannot be compiled")
        if getattr(config, "conv_kernel_size", 0):
            raise InputError("a DeBERTa with a convolution (v2-xlarge and xxlarge) cannot be compiled")
        return super().shape(model)

    def differences(self, config: Any) -> dict[str, Any]:
        return {
            "relative": "disentangled",
            "buckets": 2 * _span(config),
            "learned_positions": config.position_biased_input,
            "norms_embedding": True,
            "head": config.pooler_hidden_act,
        }

    def weights(self, model: Any) -> Weights:
        from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

        config, found = model.config, super().weights(model)
        away = -distances(token_limit(config))  # from the query to the key, as DeBERTa counts them
        if _buckets(config) > 0:
            away = make_log_bucket_position(away, _buckets(config), _most_relative(config)).long()
        span = _span(config)
        found["distance_bucket"] = (away + span).clamp(0, 2 * span - 1)
        if (widen := model.deberta.embeddings.embed_proj) is not None:
            found |= _copy("widen", widen)
        return found

    def positions_of(self, encoder: Any, layer: Any) -> Weights:
        own, table = layer.attention.self, encoder.encoder.get_rel_embedding()
        shared = own.share_att_key
        key, query = (own.key_proj, own.query_proj) if shared else (own.pos_key_proj, own.pos_query_proj)
        # Distances are the same for every text, so their keys and queries are constants.
        heads = own.num_attention_heads
        with torch.no_grad():
            return {
                f"attention.{name}": project(table).unflatten(1, (heads, -1)).transpose(0, 1)
                for name, project in (("distance_key", key), ("distance_query", query))
            }


class ModernBert(Bert):
    """ModernBERT and mmBERT: rotary positions, local and global attention, GeGLU, LayerNorm before each part."""

    base, layer = "model", "layers.{}"
    project, norm, up, down, norm_out = "attn.Wo", "attn_norm", "mlp.Wi", "mlp.Wo", "mlp_norm"
    pooler = "head.dense"

    def shape(self, model: Any) -> Shape:
        config = model.config
        rotary = [config.rope_parameters[kind] for kind in config.layer_types]
        if any(each["rope_type"] != "default" for each in rotary):
            raise InputError(f"a ModernBERT with {rotary[0]['rope_type']!r} rotary positions cannot be compiled")
        return Shape(
            vocabulary=model.model.embeddings.tok_embeddings.num_embeddings,
            positions=token_limit(config),
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            intermediate=config.intermediate_size,
            labels=config.num_labels,
            activation=config.hidden_activation,
            eps=config.norm_eps,
            learned_positions=False,
            head=config.classifier_activation,
            norm_first=True,
            pooling=classifier_pooling(config),
            embedding_pooling=embedding_pooling(config),
            windows=tuple(config.local_attention // 2 * (kind == "sliding_attention") for kind in config.layer_types),
            thetas=tuple(each["rope_theta"] for each in rotary),
        )

    def weights(self, model: Any) -> Weights:
        encoder = model.model
        embeddings = encoder.embeddings
        found = {"word.weight": embeddings.tok_embeddings.weight, **_copy("norm", embeddings.norm)}
        for number, layer in enumerate(encoder.layers):
            own = {**_copy("qkv", layer.attn.Wqkv), **_copy("norm", layer.attn_norm)}
            for name in ("project", "up", "down", "norm_out"):
                own |= _copy(name, layer.get_submodule(getattr(self, name)))
            found |= {f"layers.{number}.{name}": tensor for name, tensor in own.items()}
        found |= _copy("last_norm", encoder.final_norm) | _copy("head_norm", model.head.norm)
        return found | _copy("pooler", model.head.dense) | _copy("classifier", model.classifier)


FAMILIES: dict[str, Bert] = {
    "albert": Albert(),
    "bert": Bert(),
    "camembert": Roberta(),
    "deberta-v2": Deberta(),
    "distilbert": DistilBert(),
    "electra": Electra(),
    "ernie": Ernie(),
    "modernbert": ModernBert(),
    "mpnet": MPNet(),
    "roberta": Roberta(),
    "xlm-roberta": Roberta(),
}


def family_of(model: Any) -> Bert:
    """Return the family of a classifier of transformers.

    Raises:
        InputError: it is no classifier of a supported family, or it has an activation that the graph does not know.
    """
    config = model.config
    family = FAMILIES.get(config.model_type)
    if family is None or type(model).__name__ != SUPPORTED[config.model_type] or getattr(config, "is_decoder", False):
        raise InputError(f"cannot compile a {type(model).__name__}; give a classifier: {', '.join(SUPPORTED.values())}")
    shape = family.shape(model)
    for activation in {shape.activation, shape.head} - {*ACTIVATIONS}:
        raise InputError(f"cannot compile the activation {activation!r}, only {', '.join(ACTIVATIONS)}")
    return family


def shape_of_model(model: Any) -> Shape:
    """Return the sizes of a classifier of transformers, which may have rows of added categories and further heads.

    Raises:
        InputError: as `family_of`.
    """
    below = added_weight(model) is not None
    return replace(family_of(model).shape(model), reads_below=below, attributes=values_of(model))


def weights_of_model(model: Any) -> Weights:
    """Return the weights of a classifier of transformers; queries are not scaled yet."""
    added, found = added_weight(model), family_of(model).weights(model)
    if values_of(model):
        found |= _copy("attributes", getattr(model, HEADS))
    return found | ({} if added is None else {"added.weight": added})


def distances(positions: int) -> Tensor:
    """Return the distances from a token to another: -(positions - 1) … positions - 1, by `graph.Distances`' index."""
    return torch.arange(1 - positions, positions)


def _most_relative(config: Any) -> int:
    most: int = config.max_relative_positions
    return most if most > 0 else config.max_position_embeddings


def _buckets(config: Any) -> int:
    return int(getattr(config, "position_buckets", -1))


def _span(config: Any) -> int:
    return _buckets(config) if _buckets(config) > 0 else _most_relative(config)


def _copy(name: str, source: nn.Module) -> Weights:
    """Return a layer's weight and bias under a name. A missing bias becomes zeros, which cost nothing."""
    if isinstance(source, nn.Identity):
        return {}
    weight: Any = source.weight
    bias: Any = source.bias
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(len(weight)) if bias is None else bias}
