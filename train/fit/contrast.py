"""Contrastive training: texts of one group, such as the offers of one product, get similar embeddings.

The embedding is the mean of a text's last hidden states. The loss is that of supervised contrastive learning (Khosla
et al. 2020, arXiv:2004.11362), with the other texts of the batch as negatives. It is computed for the whole embedding
and for its first half and quarter, so that shortened embeddings search well too (Kusupati et al. 2022, "Matryoshka
Representation Learning", arXiv:2205.13147).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aisle.console import say
from aisle.preprocess.clean import content_key
from aisle.preprocess.encode import TextTokenizer
from aisle.train.core.groups import is_held_out_group, is_learnt_group, is_validation_group
from aisle.train.core.predict import embeddings_of, last_hidden_states, pooled
from aisle.train.core.retrieval import Lookup, lookup, pairs_by_similarity, recall, tfidf_recall
from aisle.train.core.settings import TrainingSettings
from aisle.train.core.split import Split
from aisle.train.fit.classification import Classification
from aisle.train.fit.loop import Scalars

TEMPERATURE = 0.05
PREFIXES = (1, 2, 4)  # the whole embedding, its half and its quarter
LEAST = 30  # queries to measure a share
SEARCHED = 25_000  # texts in which held-out groups are looked for
VALIDATED = 5_000  # the same after each epoch
NONE = -1  # the group of a text without one, or with one that is not learnt


class ContrastiveClassification(Classification):
    """The task of classifying texts and of bringing the embeddings of each group together."""

    def __init__(
        self, parts: Split, tokenizer: TextTokenizer, settings: TrainingSettings, device: torch.device
    ) -> None:
        super().__init__(parts, tokenizer, settings, device)
        names = [parts.groups.get(content_key(text)) for text in self.texts]
        learnt = {name: number for number, name in enumerate(dict.fromkeys(names)) if name and is_learnt_group(name)}
        self.groups = torch.tensor([NONE if name is None else learnt.get(name, NONE) for name in names], device=device)
        known = [*parts.train.texts, *parts.validation.texts]
        self.lookup = lookup(known, parts.groups, is_validation_group, VALIDATED)
        self.searched = tokenizer.tokens(self.lookup.texts) if self.lookup.queries else []

    def units(self, shuffler: random.Random) -> list[tuple[int, ...]]:
        """Return pairs of texts of the same group, and single texts."""
        members: dict[int, list[int]] = defaultdict(list)
        for row, group in enumerate(self.groups.tolist()):
            members[group].append(row)
        units: list[tuple[int, ...]] = [(row,) for row in members.pop(NONE, [])]
        for rows in members.values():
            shuffler.shuffle(rows)
            units += [tuple(rows[place : place + 2]) for place in range(0, len(rows), 2)]
        return units

    def loss(self, model: Any, rows: Sequence[int]) -> Tensor:
        inner = getattr(model, "module", model)
        with last_hidden_states(inner) as hidden:
            loss = super().loss(model, rows)
        lengths = torch.tensor([len(self.plain_tokens[row]) for row in rows], device=self.device)
        vectors = pooled(inner.config, hidden[0][: len(rows)], lengths)
        return loss + contrastive_loss(vectors, self.groups[rows])

    def validate(self, model: Any) -> Scalars | None:
        scalars = super().validate(model)
        if scalars is None or not self.searched:
            return scalars
        found = recall(embeddings_of(model, self.searched, "validating the search"), self.lookup)
        return {**scalars, "score": (scalars["score"] + found) / 2, "accuracy": scalars["score"], "recall_at_10": found}


def contrastive_loss(vectors: Tensor, groups: Tensor) -> Tensor:
    """Return the sum of the losses of the texts with another one of their group in the batch.

    Args:
        vectors: embeddings [texts, hidden] of any length.
        groups: [texts]; texts of `NONE` are neither pairs nor negatives.
    """
    known = groups != NONE
    same = groups[known][:, None] == groups[known]
    same.fill_diagonal_(False)
    pairs = same.sum(dim=1)
    loss = vectors.sum() * 0.0  # without pairs, the gradient is zero
    if not same.any():
        return loss
    itself = torch.eye(len(same), dtype=torch.bool, device=vectors.device)
    for part in PREFIXES:
        unit = F.normalize(vectors[known, : vectors.shape[1] // part].float(), dim=1)
        logits = (unit @ unit.T / TEMPERATURE).masked_fill(itself, -torch.inf)
        likelihood = logits.log_softmax(dim=1).masked_fill(~same, 0.0).sum(dim=1)
        loss = loss - (likelihood / pairs.clamp(min=1)).sum() / len(PREFIXES)
    return loss


def measure_search(model: Any, tokenizer: TextTokenizer, parts: Split) -> dict[str, Any]:
    """Return how many texts of held-out groups find another one of their group among the ten nearest.

    No pair of these groups was learnt. All texts of the table are searched, at most `SEARCHED`. With fewer than `LEAST`
    such texts, nothing is measured.
    """
    texts = [text for part in parts[:3] for text in part.texts]
    asked = lookup(texts, parts.groups, is_held_out_group, SEARCHED)
    if len(asked.queries) < LEAST:
        say(f"the search is not measured: only {len(asked.queries)} texts of held-out groups have another text there")
        return {}
    vectors = embeddings_of(model, tokenizer.tokens(asked.texts), "measuring the search")
    return {
        "search": {
            "recall_at_10": recall(vectors, asked),
            "tfidf_recall_at_10": tfidf_recall(asked),
            "queries": len(asked.queries),
            "texts": len(asked.texts),
        },
        "duplicates": _duplicates(vectors, asked),
    }


def _duplicates(vectors: Any, asked: Lookup) -> list[dict[str, float]]:
    """Return how well a similarity tells pairs of one group, among the texts of held-out groups."""
    held_out = [i for i, group in enumerate(asked.groups) if group is not None and is_held_out_group(group)]
    return pairs_by_similarity(vectors[held_out], [str(asked.groups[i]) for i in held_out])
