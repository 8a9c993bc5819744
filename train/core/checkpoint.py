"""The checkpoint: the folder of a trained classifier.

config.json  model.safetensors      weights, as transformers saves them
tokenizer.json                      the fast tokenizer
labels.json                         the categories, in the order of the logits
sample.jsonl                        some cleaned texts of each part, to calibrate and check engines
examples.jsonl                      the texts of added categories; only if categories were added
decisions.json                      the thresholds of decisions; not in checkpoints of Aisle 0.1
thresholds.json                     the threshold of each category; only of a multi-label model, which has no decisions
heads.json  heads.safetensors       the values and the weights of further heads; only if there are some
metrics.json                        the scores on the held-out part
training.json                       how it was made: settings, cleaning report, fingerprints of data and code
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

import aisle
from aisle.errors import InputError
from aisle.files import write_json
from aisle.preprocess.clean import LabelledTexts
from aisle.preprocess.encode import TextTokenizer
from aisle.preprocess.fields import columns_of
from aisle.preprocess.labels import Labelling
from aisle.preprocess.tables.table import fingerprint
from aisle.preprocess.windows import KEY as WINDOWS
from aisle.preprocess.windows import Windows
from aisle.train.core.decisions import Decisions
from aisle.train.core.families import check_family
from aisle.train.core.heads import FILE as HEADS
from aisle.train.core.heads import Heads, load_heads
from aisle.train.core.multi_label import FILE as THRESHOLDS
from aisle.train.core.multi_label import PROBLEM, Thresholds
from aisle.train.core.sample import Sample, read_examples, read_sample, write_examples, write_sample
from aisle.train.core.settings import DecisionTargets

if TYPE_CHECKING:
    from aisle.train.core.head_rows import HeadRows

FILES = ("config.json", "model.safetensors", "tokenizer.json", "labels.json")
HEAD_ROWS = "heads.safetensors"


class Checkpoint:
    """A checkpoint's parts. Each part is read when it is first used, and then kept.

    A missing or damaged file raises InputError at that moment.
    """

    def __init__(self, folder: Path, max_tokens: int | None = None) -> None:
        """Name the folder. `max_tokens`, if given, replaces the tokenizer's own limit."""
        self.folder = folder
        self._max_tokens = max_tokens

    @cached_property
    def labels(self) -> list[str]:
        """The categories, in the order of the logits."""
        return _read_labels(self.folder)

    @cached_property
    def labelling(self) -> Labelling:
        """How training changed the labels of its table. Another table with such labels needs the same changes."""
        return _read_labelling(self.folder, self.training)

    @cached_property
    def training(self) -> dict[str, Any]:
        """How it was made (training.json); empty if Aisle did not train it."""
        return _read_training(self.folder)

    @cached_property
    def prototypes(self) -> list[str]:
        """The categories that were added without training. They have too few texts to share a threshold."""
        return [str(name) for name in self.training.get("prototypes", [])]

    @cached_property
    def fields(self) -> list[str]:
        """The columns that it reads as one text, as in `aisle.preprocess.fields`; none if it reads one column."""
        _ = self.labels  # which checks that all files are there
        return list(_read_config(self.folder).get("text_fields", []))

    def check_fields(self, text_column: str) -> None:
        """Check that a table's text columns are those that the model reads.

        Raises:
            InputError: they are not.
        """
        if columns_of(text_column) != self.fields and (self.fields or len(columns_of(text_column)) > 1):
            options = " ".join(f"--text-column {name}" for name in self.fields) or "one --text-column"
            raise InputError(f"{self.folder} was trained on other columns; give {options}")

    @cached_property
    def multi_label(self) -> bool:
        """Whether it gives a text several categories."""
        _ = self.labels  # which checks that all files are there
        return bool(_read_config(self.folder).get("problem_type") == PROBLEM)

    @cached_property
    def thresholds(self) -> Thresholds | None:
        """The thresholds of a multi-label model; None if the model gives one category."""
        return Thresholds.load(self.folder, self.labels) if self.multi_label else None

    def check_one_category(self, work: str) -> None:
        """Check that it gives one category per text.

        Args:
            work: what needs this, for the message.

        Raises:
            InputError: it gives several.
        """
        if self.multi_label:
            raise InputError(f"{self.folder} is multi-label; {work} needs a model that gives a text one category")

    @cached_property
    def heads(self) -> Heads:
        """The further heads, in the order of their logits."""
        _ = self.labels  # which checks that all files are there
        heads = load_heads(self.folder)
        if heads and not (self.folder / HEAD_ROWS).is_file():
            raise InputError(f"{self.folder} lacks {HEAD_ROWS}, the weights of its further heads; put the file back")
        return heads

    @cached_property
    def head_rows(self) -> HeadRows | None:
        """The weights of the further heads; None if there are none."""
        from aisle.train.core.head_rows import load_rows

        _ = self.labels  # which checks that all files are there
        return load_rows(self.folder)

    def check_no_heads(self, work: str) -> None:
        """Check that it has no further heads, which some work would drop.

        Args:
            work: what would, for the message.

        Raises:
            InputError: it has some.
        """
        if self.heads:
            names = ", ".join(head.name for head in self.heads)
            raise InputError(f"{self.folder} has further heads ({names}), which {work} would drop; see train --also")

    @cached_property
    def windows(self) -> Windows | None:
        """How much of a long text it reads; None: as much as fits the token limit."""
        # A pretrained encoder, which has no labels, has a tokenizer too.
        config = _read_config(self.folder) if (self.folder / "config.json").is_file() else {}
        try:
            windows = Windows.of(config.get(WINDOWS))
        except TypeError as error:
            raise InputError(f"{self.folder}/config.json is damaged: {WINDOWS}: {error}") from None
        if windows and self._max_tokens not in (None, windows.tokens):
            raise InputError(f"{self.folder} has windows of {windows.tokens} tokens; leave --max-tokens out")
        return windows

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        windows = self.windows
        return TextTokenizer(self.folder / "tokenizer.json", self._max_tokens, windows.count if windows else 1)

    @cached_property
    def model(self) -> Any:
        """The classifier of transformers in fp32 on the CPU, in evaluation mode, without further heads."""
        return _load_model(self.folder, self.labels)

    @cached_property
    def whole_model(self) -> Any:
        """The same classifier; the logits of further heads follow those of the categories."""
        if self.head_rows is None:
            return self.model
        from aisle.train.core.head_rows import add_rows

        return add_rows(_load_model(self.folder, self.labels), self.head_rows)

    @cached_property
    def sample(self) -> Sample:
        """The sample of texts in the checkpoint."""
        return read_sample(self.folder)

    @cached_property
    def examples(self) -> LabelledTexts:
        """The texts of added categories, cleaned. The training table may lack them."""
        return read_examples(self.folder)

    @cached_property
    def decisions(self) -> Decisions | None:
        """The decisions of the checkpoint; None if they were never fitted."""
        return Decisions.load(self.folder, self.labels)

    @property
    def targets(self) -> DecisionTargets:
        """What its decisions were fitted to; the defaults if there are none."""
        return self.decisions.targets if self.decisions else DecisionTargets()

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over what decides the predictions: weights, configuration, tokenizer, labels and thresholds."""
        names = [*FILES, *([THRESHOLDS] if self.multi_label else []), *([HEADS, HEAD_ROWS] if self.heads else [])]
        return hashlib.sha256("".join(fingerprint(self.folder / name) for name in names).encode()).hexdigest()


def _read_labels(folder: Path) -> list[str]:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} is not a checkpoint: it lacks {', '.join(missing)}; make one with: aisle train")
    try:
        labels = json.loads((folder / "labels.json").read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{folder}/labels.json is damaged: {error}") from None
    if not (isinstance(labels, list) and len(labels) > 1 and all(isinstance(label, str) for label in labels)):
        raise InputError(f"{folder}/labels.json must be a list of two or more strings")
    return labels


def _read_training(folder: Path) -> dict[str, Any]:
    try:
        training = json.loads((folder / "training.json").read_text("utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise InputError(f"{folder}/training.json is damaged: {error}") from None
    if not isinstance(training, dict):
        raise InputError(f"{folder}/training.json is damaged: it holds no object")
    return training


def _read_labelling(folder: Path, training: dict[str, Any]) -> Labelling:
    try:
        return Labelling(**training.get("data", {}).get("labelling", {}))
    except (TypeError, AttributeError) as error:
        raise InputError(f"{folder}/training.json is damaged: {error}") from None


def _load_model(folder: Path, labels: Sequence[str]) -> Any:
    """Load the model.

    Raises:
        InputError: the folder holds another architecture, its labels, weights and tokenizer do not fit together, or a
            weight is not finite.
    """
    config = _read_config(folder)
    check_family(config.get("model_type"), folder)
    model = load_classifier(folder, folder)
    if model.config.num_labels != len(labels):
        raise InputError(f"{folder}: {len(labels)} labels for {model.config.num_labels} logits")
    check_names(folder, config, labels)
    check_pieces(folder, TextTokenizer(folder / "tokenizer.json").tokenizer, model)
    check_finite(folder, model)
    return model.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder}/config.json is damaged: {error}") from None


def load_classifier(folder: Path, name: Path | str) -> Any:
    """Load a classifier of transformers in fp32, whatever type the file has: the engine decides on smaller types.

    Raises:
        InputError: the weights cannot be read, or some are missing, which transformers would fill at random.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from aisle.train.core.added import load_added

    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # safetensors and transformers each raise their own
        raise InputError(f"{name}: the weights cannot be loaded: {error}".splitlines()[0]) from None
    check_complete(name, model, found["missing_keys"])
    load_added(model, folder)
    return model


def check_complete(name: Path | str, model: Any, missing: Iterable[str]) -> None:
    """Check that no weight is missing in a model's file.

    Raises:
        InputError: one is; the message names the first.
    """
    if first := min(missing, default=None):
        raise InputError(f"{name}: the weights do not belong to a {model.config.model_type} model: {first} is missing")


def check_names(folder: Path | str, config: dict[str, Any], labels: Sequence[str]) -> None:
    """Check that labels.json and config.json give the logits the same names, unless config.json has none.

    Raises:
        InputError: two names differ; the first such logit is in the message.
    """
    names = {int(number): name for number, name in (config.get("id2label") or {}).items()}
    if all(name == f"LABEL_{number}" for number, name in names.items()):
        return
    for number, label in enumerate(labels):
        if names.get(number) != label:
            both = f"{label!r} in labels.json and {names.get(number)!r} in config.json (id2label)"
            raise InputError(f"{folder}: logit {number} is {both}; correct the one that is wrong")


def check_pieces(name: Path | str, tokenizer: Tokenizer, model: Any) -> None:
    """Check that a tokenizer has more than special tokens, and that the model has an embedding for each of its ids.

    Raises:
        InputError: one of these fails.
    """
    last = max(tokenizer.get_vocab().values(), default=-1)
    embeddings = len(model.get_input_embeddings().weight)
    if last >= embeddings:
        raise InputError(
            f"{name}: its tokenizer has ids up to {last}, its weights {embeddings} embeddings; they belong to "
            "different models: put the model's own tokenizer.json there"
        )
    special = sum(token.special for token in tokenizer.get_added_tokens_decoder().values())
    if tokenizer.get_vocab_size() <= special:
        raise InputError(f"{name} has no tokenizer: put the model's tokenizer.json or vocab.txt there")


def check_finite(name: Path | str, model: Any) -> None:
    """Check that all weights are finite numbers.

    Raises:
        InputError: a weight is not; the first one is in the message.
    """
    import torch

    for weight, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{name}: {weight} is not finite: training diverged; train again with a lower --learning-rate"
            )


def write_checkpoint(
    folder: Path,
    model: Any,
    tokenizer: TextTokenizer,
    sample: Sample,
    metrics: dict[str, Any],
    training: dict[str, Any],
    decisions: Decisions | None,
    thresholds: Thresholds | None = None,
    examples: LabelledTexts | None = None,
    heads: HeadRows | None = None,
) -> None:
    """Write all files of a checkpoint; `training` goes into training.json. The rows of `heads` are not in the model.

    Raises:
        InputError: a weight is not finite.
    """
    import torch

    check_finite("the trained model", model)
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "labels.json", [model.config.id2label[i] for i in range(model.config.num_labels)])
    if any(part.texts for part in sample):
        write_sample(folder, sample)
    if examples and examples.texts:
        write_examples(folder, examples)
    if decisions:
        decisions.save(folder)
    if thresholds:
        thresholds.save(folder)
    if heads:
        from aisle.train.core.head_rows import save_rows

        save_rows(folder, heads)
    write_json(folder / "metrics.json", metrics)
    made_by = {
        "code_sha256": code_fingerprint(),
        "checkpoint_sha256": Checkpoint(folder).fingerprint,
        "versions": {"aisle": aisle.__version__, "torch": torch.__version__},
    }
    write_json(folder / "training.json", {**training, **made_by})


def code_fingerprint() -> str:
    """Return a SHA-256 over the source that makes a checkpoint."""
    root = Path(__file__).parents[2]
    sources = sorted(path for part in ("preprocess", "train") for path in (root / part).rglob("*.py"))
    return hashlib.sha256("".join(fingerprint(path) for path in sources).encode()).hexdigest()
