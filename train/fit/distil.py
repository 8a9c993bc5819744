"""Distil: train a small student classifier to predict like one or several larger teachers.

The student learns the labels, the teachers' probabilities (Hinton et al. 2015, arXiv:1503.02531), and the first
teacher's hidden states, layer by layer (Jiao et al. 2020, "TinyBERT", arXiv:1909.10351). A student as wide as
the teacher starts from evenly spaced teacher layers (Sanh et al. 2019, "DistilBERT", arXiv:1910.01108).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess.clean import clean_rows, content_key
from aisle.preprocess.encode import TextTokenizer
from aisle.preprocess.tables.table import fingerprint, read_labelled
from aisle.preprocess.windows import Windows
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.families import LAYER, dropout_settings
from aisle.train.core.linear import LinearTeacher
from aisle.train.core.metrics import score
from aisle.train.core.predict import logits_of, pad
from aisle.train.core.processes import Processes, processes
from aisle.train.core.resume import STATE, check_replaceable, identity, working_folder
from aisle.train.core.sample import warn_of_few
from aisle.train.core.settings import SCRATCH, StudentSpec, TrainingSettings
from aisle.train.core.split import Split, is_learnt, split
from aisle.train.fit.classification import Classification
from aisle.train.fit.loop import Hooks, Scalars, fit
from aisle.train.fit.model import check_settings, from_pretrained
from aisle.train.fit.pretrain import unlabelled
from aisle.train.fit.prune import prune_vocabulary
from aisle.train.fit.train import Learnt, Origin, calibrate, measure, write_result


def distil(
    folders: Sequence[Path],
    data: Path,
    text_column: str,
    label_column: str,
    out: Path,
    settings: TrainingSettings,
    spec: StudentSpec,
    *,
    extra: Sequence[Path] = (),
    save_every: int | None = None,
    log_dir: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a student on a table and the answers of some teachers; write the student's checkpoint to `out`.

    The probabilities of several teachers are averaged; their tokenizers may differ. If `settings.model` names a model,
    the student starts from it, with its tokenizer, and not from the teacher. Resumes after a kill, and runs under
    torchrun, as `train` does.

    Args:
        extra: tables of further texts without labels. Texts that `train` would hold out are not used.

    Returns metrics.json: the scores of student and teachers on the held-out fifth.

    Raises:
        InputError: the table cannot be learnt from, a teacher has other categories, or the student's size is invalid.
    """
    start = time.perf_counter()
    check_replaceable(out, "training.json", overwrite)
    checkpoints = [Checkpoint(folder) for folder in folders]
    labels = checkpoints[0].labels
    read = checkpoints[0].tokenizer
    settings = replace(settings, max_tokens=read.max_tokens, windows=read.windows)
    check_settings(settings)
    if settings.from_scratch:
        check_student(AutoConfig.from_pretrained(folders[0], local_files_only=True), spec)
    for checkpoint in checkpoints:  # a bad checkpoint is refused before the table, which may be large, is read
        checkpoint.check_one_category("aisle distil")
        checkpoint.check_no_heads("aisle distil")
        checkpoint.check_fields(text_column)
    labelling = checkpoints[0].labelling
    table, cleaning = clean_rows(read_labelled(data, text_column, label_column), labelling, learnable=is_learnt)
    parts = split(table)
    _check_same_categories(parts, checkpoints, data)
    warn_of_few(parts)
    parts = parts._replace(labels=labels)
    further = _unseen(parts, extra, text_column)
    made_from = {
        **_files(data, extra, checkpoints),
        "columns": [text_column, label_column],
        "student": asdict(spec),
        **labelling.metadata(),
    }
    with processes() as world:
        linear = LinearTeacher(parts.train, labels) if spec.linear_share else None
        teachers = Teachers(checkpoints, labels, world.device, linear, spec.linear_share)
        with working_folder(out, identity(settings, made_from, world), is_main=world.is_main) as work:
            say(f"{cleaning.rows_kept} labelled rows, {len(further)} texts without labels")
            learnt = _learn(
                parts, further, settings, spec, teachers, work, world, Hooks(work / STATE, save_every, log_dir)
            )
            metrics: dict[str, Any] = {}
            if world.is_main:
                calibrate(learnt, checkpoints[0].targets)
                sizes: dict[str, Any] = {}
                if spec.prune:
                    texts = [*parts.train.texts, *parts.validation.texts, *further]
                    learnt.tokenizer, sizes = prune_vocabulary(learnt.model, learnt.tokenizer, texts, work)
                metrics = _measure(learnt, teachers, parts, further)
                metrics["seconds"] = round(time.perf_counter() - start, 1)
                origin = Origin(settings, made_from, cleaning, world.count)
                write_result(learnt, parts, origin, metrics, work / "checkpoint", out, pruning=sizes)
            return world.broadcast(metrics)


def _files(data: Path, extra: Sequence[Path], teachers: Sequence[Checkpoint]) -> dict[str, Any]:
    """Return the names and fingerprints of a distillation's inputs."""
    return {
        "file": data.name,
        "sha256": fingerprint(data),
        "extra": [{"file": path.name, "sha256": fingerprint(path)} for path in extra],
        "teachers": [{"folder": each.folder.name, "checkpoint_sha256": each.fingerprint} for each in teachers],
    }


def _check_same_categories(parts: Split, teachers: Sequence[Checkpoint], data: Path) -> None:
    """Check that the table and all teachers have the same categories.

    Raises:
        InputError: they differ; a category that differs is in the message.
    """
    labels = {*parts.labels, *teachers[0].labels}
    for teacher in teachers:
        differing = sorted(labels ^ set(teacher.labels))
        if differing:
            raise InputError(
                f"category {differing[0]!r} is not in both {teacher.folder} and {data}; they need the same categories"
            )


def _measure(learnt: Learnt, teachers: Teachers, parts: Split, further: Sequence[str]) -> dict[str, Any]:
    """Return the scores and sizes of the student and the teachers."""
    metrics = measure(learnt, parts)
    metrics["rows"]["extra"] = len(further)
    metrics["teachers"] = teachers.measure(parts)
    metrics["parameters"] = {
        "student": learnt.model.num_parameters(),
        "teacher": teachers.models[0].num_parameters(),
    }
    return metrics


def _unseen(parts: Split, extra: Sequence[Path], text_column: str) -> list[str]:
    """Return the texts of further tables that are neither held out nor in the labelled table."""
    known = {content_key(text) for part in parts[:3] for text in part.texts}
    return [text for text in unlabelled(extra, text_column) if content_key(text) not in known]


def _learn(
    parts: Split,
    further: Sequence[str],
    settings: TrainingSettings,
    spec: StudentSpec,
    teachers: Teachers,
    folder: Path,
    world: Processes,
    hooks: Hooks,
) -> Learnt:
    torch.manual_seed(settings.seed)
    teacher, file = teachers.models[0], folder / "tokenizer.json"
    if settings.model == SCRATCH:
        student, basis = student_of(teacher, spec, settings.dropout)
        teachers.tokenizers[0].save(file)
        # Copied teacher layers are fine-tuned; a narrower student trains new layers.
        settings = replace(settings, model=SCRATCH if basis is not None else str(teachers.checkpoints[0].folder))
    else:
        student, backend = from_pretrained(settings.model, parts.labels, settings.max_tokens, settings.dropout)
        backend.save(str(file))
        basis = None
    tokenizer = TextTokenizer(file, windows=settings.windows)
    Windows(settings.windows, tokenizer.max_tokens).put_into(student.config)
    if spec.hidden_weight and tokenizer.tokens(parts.train.texts) != teachers.tokenizers[0].tokens(parts.train.texts):
        say("the student's tokens differ from the teacher's: hidden states are not compared")
        spec = replace(spec, hidden_weight=0.0)
    projected = ProjectedStudent(student, teacher.config if spec.hidden_weight else None, basis)
    task = Distillation(parts, further, tokenizer, settings, spec, teachers, world)
    history = fit(projected, task, settings, world, hooks)
    return Learnt(student.eval(), tokenizer, task, history)


def spaced(layers: int, of: int) -> list[int]:
    """Return the teacher layer, counted from 1, for each student layer, evenly spaced; the last for the last."""
    return [round(layer * of / layers) for layer in range(1, layers + 1)]


def check_student(teacher: Any, spec: StudentSpec) -> tuple[int, int]:
    """Return a student's layers and hidden size.

    Raises:
        InputError: it is larger than the teacher, its size cannot be divided into attention heads, or it is narrower
            than a teacher whose embeddings have a size of their own.
    """
    deep, wide, head = (
        teacher.num_hidden_layers,
        teacher.hidden_size,
        teacher.hidden_size // teacher.num_attention_heads,
    )
    layers, size = spec.layers or max(1, deep // 2), spec.hidden_size or wide
    if layers > deep or size > wide:
        raise InputError(
            f"a student of {layers} layers and hidden size {size} is not smaller than its teacher of {deep} and {wide}"
        )
    if size % head:
        raise InputError(f"a hidden size of {size} cannot be divided into heads of {head}; give a multiple of {head}")
    if size != wide and (getattr(teacher, "embedding_size", wide) != wide or teacher.model_type == "albert"):
        raise InputError(
            f"the embeddings of a {teacher.model_type!r} teacher have a size of their own; give its student the same "
            f"hidden size, {wide}"
        )
    return layers, size


def student_of(teacher: Any, spec: StudentSpec, dropout: float) -> tuple[Any, Tensor | None]:
    """Return a student with the teacher's proportions, and the basis that its embeddings were projected on, or None.

    A student as wide as the teacher gets the weights of evenly spaced layers. A narrower one gets the embeddings
    projected on their first principal directions, [teacher's size, student's size]; its other weights are random.
    Raises as `check_student`.
    """
    config = copy.deepcopy(teacher.config)
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    layers, size = check_student(config, spec)
    chosen = spaced(layers, config.num_hidden_layers)
    if getattr(config, "layer_types", None):  # ModernBERT's local and global layers
        config.layer_types = [config.layer_types[number - 1] for number in chosen]
    if config.model_type == "deberta-v2":
        config.pooler_hidden_size = size
    if getattr(config, "embedding_size", size) == width:
        config.embedding_size = size
    config.num_hidden_layers, config.hidden_size, config.num_attention_heads = layers, size, size // head
    between = "hidden_dim" if config.model_type == "distilbert" else "intermediate_size"
    setattr(config, between, getattr(config, between) * size // width)
    config.update(dropout_settings(config.model_type, dropout))
    student = AutoModelForSequenceClassification.from_config(config).float()
    if size == width:
        _copy_layers(student, teacher, chosen)
        return student, None
    words = teacher.get_input_embeddings().weight.detach().cpu()
    basis = torch.linalg.eigh(words.T @ words).eigenvectors[:, -size:].contiguous()  # of the largest eigenvalues
    with torch.no_grad():
        for name, table in student.named_modules():
            if isinstance(table, nn.Embedding) and table.embedding_dim == size:
                table.weight.copy_(teacher.get_submodule(name).weight.detach().cpu() @ basis)
    return student, basis


def _copy_layers(student: Any, teacher: Any, chosen: Sequence[int]) -> None:
    """Copy the teacher's weights into a student of the same width, from the chosen layers, counted from 1."""
    weights = teacher.state_dict()

    def source(name: str) -> str:
        return LAYER.sub(lambda found: found[0].replace(found[1], str(chosen[int(found[1])] - 1)), name, count=1)

    # ALBERT's layers have the same weights, whatever their number.
    student.load_state_dict({name: weights[source(name)] for name in student.state_dict()})


class ProjectedStudent(nn.Module):
    """A student with linear projections of its hidden states to the teacher's size. Only training uses them."""

    def __init__(self, student: Any, teacher: Any | None, basis: Tensor | None) -> None:
        """Take a student and its teacher's configuration; without one, hidden states are not compared."""
        super().__init__()
        self.config = student.config
        self.student = student
        self.projections = nn.ModuleList()
        if teacher is None:
            return
        size, width = student.config.hidden_size, teacher.hidden_size
        for _ in range(student.config.num_hidden_layers + 1):
            self.projections.append(nn.Identity() if size == width else nn.Linear(size, width, bias=False))
        if basis is not None:
            self.projections[0].load_state_dict({"weight": basis})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits [texts, labels] and projected hidden states, like `Teachers.hidden_states` of fewer layers."""
        compared = len(self.projections) > 0
        output = self.student(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=compared)
        states = output.hidden_states if compared else ()
        return output.logits, [project(state) for project, state in zip(self.projections, states, strict=True)]


class Teachers:
    """The teacher checkpoints. The first one's hidden states are learnt as well."""

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        labels: Sequence[str],
        device: torch.device,
        linear: LinearTeacher | None = None,
        linear_share: float = 0.0,
    ) -> None:
        self.checkpoints = checkpoints
        self.tokenizers = [checkpoint.tokenizer for checkpoint in checkpoints]
        self.models = [checkpoint.model.to(device).requires_grad_(False) for checkpoint in checkpoints]
        self.order = [[checkpoint.labels.index(label) for label in labels] for checkpoint in checkpoints]
        self.linear, self.linear_share = linear, linear_share

    def probabilities(self, texts: Sequence[str], temperature: float, originals: Sequence[str] = ()) -> Tensor:
        """Return the mean of the teachers' probabilities, [texts, labels].

        Args:
            originals: the texts before augmentation, by which the SVM looks them up.
        """
        shares = []
        for model, tokenizer, order in zip(self.models, self.tokenizers, self.order, strict=True):
            logits = torch.from_numpy(logits_of(model, tokenizer.varied_tokens(texts), "running a teacher"))
            shares.append((logits[:, order] / temperature).softmax(dim=1))
        mean = torch.stack(shares).mean(dim=0)
        if self.linear is None:
            return mean
        logits = torch.from_numpy(self.linear.logits(originals or texts))
        return mean.lerp((logits / temperature).softmax(dim=1).to(mean), self.linear_share)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Return the first teacher's hidden states, each [texts, tokens, hidden size]: embeddings, then each layer."""
        with torch.no_grad():
            output = self.models[0].base_model(input_ids, attention_mask, output_hidden_states=True)
        states: tuple[Tensor, ...] = output.hidden_states
        return states

    def measure(self, parts: Split) -> dict[str, float]:
        """Return the averaged teachers' accuracy and macro-F1 on the held-out part."""
        best = self.probabilities(parts.held_out.texts, 1.0).argmax(dim=1).tolist()
        scores = score(parts.held_out.labels, [parts.labels[i] for i in best])
        return {name: scores[name] for name in ("accuracy", "macro_f1")}


class Distillation(Classification):
    """The task of predicting like the teachers. Texts without labels come after the labelled ones."""

    def __init__(
        self,
        parts: Split,
        further: Sequence[str],
        tokenizer: TextTokenizer,
        settings: TrainingSettings,
        spec: StudentSpec,
        teachers: Teachers,
        world: Processes,
    ) -> None:
        super().__init__(parts, tokenizer, settings, world.device)
        self.labelled = len(self.texts)
        self.texts = self.augmented = [*self.texts, *further]
        if not self.augmenter:
            self.whole_tokens = [*self.whole_tokens, *tokenizer.tokens(further)]
        self.spec = spec
        self.teachers = teachers
        self.bf16 = world.bf16
        self.soft: Tensor | None = None

    def epoch(self, number: int) -> list[list[int]]:
        batches = super().epoch(number)
        if self.soft is None or self.augmenter:  # augmented texts have other probabilities
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                self.soft = self.teachers.probabilities(self.augmented, self.spec.temperature, self.texts)
                self.soft = self.soft.to(self.device)
        return batches

    def loss(self, model: Any, rows: Sequence[int]) -> Tensor:
        assert self.soft is not None
        input_ids, attention_mask = (tensor.to(self.device) for tensor in pad([self.tokens[i] for i in rows]))
        logits, states = model(input_ids, attention_mask)
        # Softened gradients are smaller by the square of the temperature, hence the factor.
        temperature = self.spec.temperature
        own = (logits.float() / temperature).log_softmax(dim=1)
        loss = (1 - self.spec.label_weight) * temperature**2 * F.kl_div(own, self.soft[rows], reduction="sum")
        labelled = [i for i, row in enumerate(rows) if row < self.labelled]
        if labelled:
            targets = self.targets[[rows[i] for i in labelled]]
            loss = loss + self.spec.label_weight * self.loss_of(logits[labelled], targets).sum()
        if states:
            loss = loss + self.spec.hidden_weight * self._distance(states, input_ids, attention_mask)
        return loss

    def _distance(self, states: Sequence[Tensor], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the mean squared error of the hidden states of each text, summed over the texts."""
        wanted = self.teachers.hidden_states(input_ids, attention_mask)
        layers = [0, *spaced(len(states) - 1, len(wanted) - 1)]
        share = attention_mask / attention_mask.sum(dim=1, keepdim=True)  # [texts, tokens]
        errors = [
            ((own.float() - wanted[layer].float()) ** 2).mean(dim=2) for own, layer in zip(states, layers, strict=True)
        ]
        return (torch.stack(errors).mean(dim=0) * share).sum()

    def validate(self, model: Any) -> Scalars | None:
        return super().validate(model.student)
