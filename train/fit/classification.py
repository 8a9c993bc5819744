"""The task of classifying texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aisle.preprocess.encode import TextTokenizer
from aisle.preprocess.windows import one_of_each
from aisle.train.core.predict import logits_of, pad
from aisle.train.core.settings import TrainingSettings
from aisle.train.core.split import Split
from aisle.train.fit.heads import accuracies, loss_of_all, score_of_all, targets_of
from aisle.train.fit.loop import Scalars, like_lengths
from aisle.train.fit.loss import Loss, RowLoss
from aisle.train.fit.unknown import Unknowns, isolates


class Classification:
    """Cross-entropy over the categories and those of further heads, with augmentation, mixup and unknown characters."""

    def __init__(
        self, parts: Split, tokenizer: TextTokenizer, settings: TrainingSettings, device: torch.device
    ) -> None:
        if settings.augment or settings.class_floor:
            from aisle.preprocess.augment import Augmenter, floor_rows
        rows = range(len(parts.train.texts))
        chosen: Sequence[int] = floor_rows(parts.train.labels, settings.class_floor) if settings.class_floor else rows
        self.texts = [parts.train.texts[i] for i in chosen]
        self.targets = torch.tensor(self.encoded([parts.train.labels[i] for i in chosen], parts.labels), device=device)
        self.validation = tokenizer.tokens(parts.validation.texts) if parts.validation.texts else []
        self.validation_targets = self.encoded(parts.validation.labels, parts.labels)
        self.tokenizer = tokenizer
        self.settings = settings
        self.device = device
        self.augmenter = Augmenter(settings.augment, settings.seed, settings.augment_rate) if settings.augment else None
        self.augmented: Sequence[str] = self.texts  # this epoch's texts, before unknown characters are put in
        self.whole_tokens = tokenizer.tokens(self.texts)  # the token ids of `augmented`
        self.plain_tokens = self.whole_tokens  # of these, what this epoch reads: of a long text one window
        backend = tokenizer.tokenizer
        self.unknowns = Unknowns(backend, self.texts, settings.seed) if isolates(backend) else None
        self.tokens = self.plain_tokens  # this epoch's token ids
        self.loss_of = self.make_loss(parts.labels)
        self.heads, self.categories = parts.heads, len(parts.labels)
        if self.heads:
            own = targets_of(self.heads, self.targets.cpu().numpy(), self.texts)
            self.targets = torch.from_numpy(own).to(device)
            self.validation_targets = targets_of(self.heads, self.validation_targets, parts.validation.texts)
            self.loss_of = loss_of_all(self.loss_of, self.heads, self.categories, self.targets, settings)

    @property
    def validation_categories(self) -> npt.NDArray[Any]:
        """The category of each validation text, as `encoded` gives it."""
        return self.validation_targets[:, 0] if self.heads else self.validation_targets

    def encoded(self, labels: Sequence[str], names: Sequence[str]) -> npt.NDArray[Any]:
        """Return labels as the loss reads them: the number of each category among `names`, [rows]."""
        number = {name: i for i, name in enumerate(names)}
        return np.array([number[label] for label in labels], np.int64)

    def make_loss(self, names: Sequence[str]) -> RowLoss:
        """Return what computes the losses of rows."""
        return Loss(names, self.targets, self.settings, self.device)

    def epoch(self, number: int) -> list[list[int]]:
        if self.augmenter:
            self.augmented = self.augmenter.texts(self.texts, number)
            self.whole_tokens = self.tokenizer.varied_tokens(self.augmented)
        self.plain_tokens = self._read_in(number, self.whole_tokens)
        self.tokens = list(self.plain_tokens)
        if self.unknowns:
            changed = self.unknowns.put(self.augmented, self.plain_tokens, number)
            tokens = self._read_in(number, self.tokenizer.tokens(list(changed.values())), list(changed))
            for row, ids in zip(changed, tokens, strict=True):
                self.tokens[row] = ids
        shuffler = random.Random(f"{self.settings.seed} {number}")
        return list(like_lengths(self.tokens, self.settings.batch_size, shuffler, self.units(shuffler)))

    def _read_in(self, epoch: int, tokens: list[list[int]], rows: Sequence[int] | None = None) -> list[list[int]]:
        """Return what an epoch reads of the texts in these rows, by default all: one window of each, at random."""
        rows = range(len(tokens)) if rows is None else rows
        seeds = (f"{self.settings.seed} {epoch} {row}" for row in rows)
        return one_of_each(tokens, self.tokenizer.max_tokens, seeds)

    def units(self, shuffler: random.Random) -> list[tuple[int, ...]] | None:
        """Return the rows that a batch keeps side by side; None if there are none."""
        return None

    def loss(self, model: Any, rows: Sequence[int]) -> torch.Tensor:
        if not self.settings.mixup:
            return self._consistent_loss(model, rows)
        input_ids, attention_mask = (tensor.to(self.device) for tensor in pad([self.tokens[i] for i in rows]))
        targets = self.targets[rows]
        # Mixup: mix the embeddings and the losses of two texts (Guo et al. 2019, arXiv:1905.08941).
        embeddings = getattr(model, "module", model).get_input_embeddings()
        vectors = embeddings(input_ids) * attention_mask[:, :, None]
        other = torch.randperm(len(rows)).to(self.device)
        share = float(torch.distributions.Beta(self.settings.mixup, self.settings.mixup).sample())
        mixed = share * vectors + (1 - share) * vectors[other]
        logits = model(inputs_embeds=mixed, attention_mask=attention_mask | attention_mask[other]).logits
        return (share * self.loss_of(logits, targets) + (1 - share) * self.loss_of(logits, targets[other])).sum()

    def _consistent_loss(self, model: Any, rows: Sequence[int]) -> torch.Tensor:
        """Return the sum of the texts' losses and of the effect of unknown characters.

        The effect is the KL divergence between the predictions for a text without and with unknown characters. They
        must not change a prediction, even if a title says too little to decide on one category. The categories are
        learnt from the texts without them, so that unknown characters cost no accuracy.
        """
        changed = [place for place, row in enumerate(rows) if self.tokens[row] is not self.plain_tokens[row]]
        tokens = [self.plain_tokens[row] for row in rows] + [self.tokens[rows[place]] for place in changed]
        input_ids, attention_mask = (tensor.to(self.device) for tensor in pad(tokens))
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        loss = self.loss_of(logits[: len(rows)], self.targets[rows]).sum()
        if changed:
            loss = loss + self.loss_of.divergence(logits[len(rows) :], logits[changed].detach())
        return loss

    def validate(self, model: Any) -> Scalars | None:
        if not self.validation:
            return None
        found = logits_of(model, self.validation, "validating")
        logits = torch.from_numpy(found[:, : self.categories])
        targets = torch.from_numpy(self.validation_categories)
        scalars = {
            "score": float((logits.argmax(dim=1) == targets).float().mean()),
            "loss": float(torch.nn.functional.cross_entropy(logits, targets)),
        }
        if not self.heads:
            return scalars
        attributes = accuracies(self.heads, found, self.validation_targets)
        both = {"score": score_of_all(scalars["score"], attributes), "accuracy": scalars["score"]}
        return {**scalars, **both, **{f"{name} accuracy": value for name, value in attributes.items()}}
