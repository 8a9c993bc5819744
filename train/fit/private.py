"""Training with differential privacy: the weights tell almost nothing about any single text of the training part.

DP-SGD (Abadi et al. 2016, arXiv:1607.00133) with Opacus: each step draws its texts at random, each text on its own
(Poisson sampling), cuts the gradient of each text to a norm, and adds Gaussian noise to their sum. The accountant
(Gopi et al. 2021, arXiv:2106.02848) computes the noise that all steps together need for the wanted epsilon.

The embeddings stay as they are: their gradients are the largest part of the memory, and most of them would be noise.
Nothing else of the rows may reach the weights; `check_private` refuses what would.
"""

from __future__ import annotations

import json
import math
import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.accountants import PRVAccountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer

from aisle.errors import InputError
from aisle.preprocess.encode import TextTokenizer
from aisle.preprocess.labels import Labelling
from aisle.preprocess.tables.table import fingerprint
from aisle.train.core.families import EMBEDDINGS
from aisle.train.core.settings import Privacy, TrainingSettings
from aisle.train.core.split import Split, is_validation
from aisle.train.fit.classification import Classification
from aisle.train.fit.loop import Task
from aisle.train.fit.model import check_model

# Families of which each layer keeps the texts of a batch apart in the way that Opacus computes gradients. In DeBERTa it
# would compute wrong ones without a word, MPNet and ModernBERT it cannot read.
FAMILIES = ("albert", "bert", "camembert", "distilbert", "electra", "ernie", "roberta", "xlm-roberta")
CLIP = 0.1  # norm of a text's gradient; with AdamW a small one is best (Li et al. 2022, arXiv:2110.05679)


def check_private(
    data: Path, settings: TrainingSettings, labelling: Labelling, also: Sequence[str], log_dir: Path | None
) -> None:
    """Check that no setting lets a row reach the model by another way than its clipped and noisy gradient.

    Raises:
        InputError: some do, and the message names all of them; or the model was trained on the table, or is of a
            family that cannot be trained so.
    """
    breaking = {
        "--model scratch": (settings.from_scratch, "its vocabulary and word embeddings are made from the texts"),
        "--augment": (bool(settings.augment), "it can use other rows"),
        "--class-floor": (settings.class_floor, "it repeats rows"),
        "--mixup": (settings.mixup, "it mixes rows"),
        "--class-weight": (settings.class_weight, "it counts rows"),
        "--windows": (settings.windows > 1, "which part of a text is read depends on the rows before it"),
        "--contrastive": (settings.contrastive, "it compares rows"),
        "--folds": (settings.folds, "it trains on each row several times more"),
        "--fold-labels": (labelling.fold, "it counts rows"),
        "--min-rows": (labelling.min_rows, "it counts rows"),
        "--multi-label": (labelling.multi_label, "its thresholds are fitted to rows"),
        "--also": (bool(also), "it is not made private"),
        "--log-dir": (log_dir, "it shows exact losses"),
    }
    given = [f"{option} ({why})" for option, (used, why) in breaking.items() if used]
    if given:
        advice = "; give --model a pretrained encoder" if settings.from_scratch else ""
        raise InputError(f"--dp-epsilon does not go with {', '.join(given)}{advice}")
    kind = check_model(settings.model, settings.max_tokens).model_type
    if kind not in FAMILIES:
        raise InputError(f"--dp-epsilon cannot train a {kind!r} model; give one of these: {', '.join(FAMILIES)}")
    _check_public(Path(settings.model), data)


def check_rows(parts: Split, privacy: Privacy) -> None:
    """Check what the guarantee asks of the rows.

    Raises:
        InputError: delta is too large for the number of rows, or a category has only validation texts.
    """
    rows = len(parts.train.texts)
    if privacy.dp_delta * rows >= 1:
        raise InputError(
            f"--dp-delta {privacy.dp_delta:g} is too large for {rows} training texts, one of which it could give away "
            f"entirely; give less than {1 / rows:.1g}"
        )
    moved = next((i for i, text in enumerate(parts.train.texts) if is_validation(text)), None)
    if moved is not None:
        raise InputError(
            f"category {parts.train.labels[moved]!r} has too few texts for --dp-epsilon; add rows, or leave it out"
        )


def _check_public(model: Path, data: Path) -> None:
    """Check that a local model was not itself trained on the table, as far as its files tell.

    Raises:
        InputError: it was.
    """
    for file in (model / "training.json", model / "pretraining.json"):
        made_from = json.loads(file.read_text("utf-8")).get("data", []) if file.is_file() else []
        tables = made_from if isinstance(made_from, list) else [made_from]
        if any(each.get("sha256") == fingerprint(data) for each in tables):
            raise InputError(f"--model {model} was trained on {data}; give a model that has not seen these texts")


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out warnings that say nothing here.

    The accountant's first guess is loose, but its result is not. Layers above frozen ones have no gradient below them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order|Full backward hook")
        yield


class PrivateClassification(Classification):
    """Classification in which each batch is a Poisson sample. Validation texts stay unread, so they decide nothing."""

    def __init__(
        self, parts: Split, tokenizer: TextTokenizer, settings: TrainingSettings, device: torch.device
    ) -> None:
        super().__init__(parts._replace(validation=parts.validation.like([], [])), tokenizer, settings, device)
        self.unknowns = None  # they are counted from the texts
        self._rng = np.random.default_rng()  # not seeded: who knows the sample knows more than the accountant assumes

    @property
    def rate(self) -> float:
        """The probability that a step draws a text."""
        return min(1.0, self.settings.batch_size / len(self.texts))

    @property
    def steps(self) -> int:
        """The number of steps in an epoch."""
        return math.ceil(1 / self.rate)

    def epoch(self, number: int) -> list[list[int]]:
        drawn = (self._rng.random(len(self.texts)) < self.rate for _ in range(self.steps))
        return [np.flatnonzero(each).tolist() for each in drawn]


class Mechanism:
    """Clips the gradient of each text, and adds noise to their sum."""

    def __init__(self, task: PrivateClassification, privacy: Privacy, settings: TrainingSettings) -> None:
        """Find the noise that all steps together need."""
        assert privacy.dp_epsilon is not None
        self.privacy, self.settings, self.rate = privacy, settings, task.rate
        self.steps = settings.epochs * task.steps
        with _quiet():
            self.noise: float = get_noise_multiplier(
                target_epsilon=privacy.dp_epsilon,
                target_delta=privacy.dp_delta,
                sample_rate=self.rate,
                steps=self.steps,
                accountant="prv",
            )

    def attach(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Make `model` compute the gradient of each text, until `detach`."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not EMBEDDINGS.search(name))
        self._model = GradSampleModule(model, loss_reduction="sum")
        self._optimizer = DPOptimizer(
            optimizer,
            noise_multiplier=self.noise,
            max_grad_norm=CLIP,
            expected_batch_size=self.settings.batch_size,
            generator=torch.Generator(model.device).manual_seed(secrets.randbits(63)),  # who knows it removes the noise
        )

    def step(self, task: Task, batch: list[int]) -> None:
        """Do a step, also with an empty batch."""
        # With a known seed, a text would decide by its place in the batch what dropout does to the texts after it.
        torch.manual_seed(secrets.randbits(63))
        size = math.ceil(self.settings.batch_size / self.settings.accumulate)
        parts = [batch[i : i + size] for i in range(0, len(batch), size)] or [[]]
        for number, part in enumerate(parts, start=1):
            if part:
                with _quiet():
                    torch.autograd.backward(task.loss(self._model, part))
            else:
                for parameter in self._optimizer.params:
                    parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)
            self._optimizer.signal_skip_step(number < len(parts))
            self._optimizer.step()
            self._optimizer.zero_grad()

    def epsilon(self, steps: int) -> float:
        """Return what `steps` steps have spent."""
        accountant = PRVAccountant()
        accountant.history = [(self.noise, self.rate, steps)]
        with _quiet():
            return float(accountant.get_epsilon(self.privacy.dp_delta))

    def detach(self, model: Any) -> None:
        """Return the model to what it was."""
        self._model.to_standard_module()
        model.requires_grad_(True)

    def note(self) -> str:
        """Return a line about the guarantee."""
        return (
            f"differential privacy: epsilon {self.privacy.dp_epsilon:g} at delta {self.privacy.dp_delta:g}, by noise "
            f"of {self.noise:.2f} times the clipping norm in each of {self.steps} steps, which draw a text with "
            f"probability {self.rate:.4f}; validation texts are not used, and no decisions are fitted"
        )

    def figures(self) -> dict[str, Any]:
        """Return the entry of metrics.json."""
        return {
            "epsilon": self.epsilon(self.steps),
            "delta": self.privacy.dp_delta,
            "noise_multiplier": self.noise,
            "clipping_norm": CLIP,
            "sampling_rate": self.rate,
            "steps": self.steps,
            "accountant": "prv",
        }
