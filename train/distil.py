"""Distil: a large classifier, or several, to a small one that answers alike.

The student learns the teachers' probabilities (Hinton et al. 2015, arXiv:1503.02531) beside the labels, and the first
teacher's hidden states, layer by layer (Jiao et al. 2020, "TinyBERT", arXiv:1909.10351). Where it is as wide as the
teacher, it starts from evenly spaced layers of it (Sanh et al. 2019, "DistilBERT", arXiv:1910.01108).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess.clean import clean_rows, content_key
from aisle.preprocess.encode import Encoder
from aisle.preprocess.table import fingerprint, read_labelled
from aisle.train.checkpoint import checkpoint_fingerprint, load_model, read_labels, write_checkpoint
from aisle.train.data import Split, split
from aisle.train.evaluate import logits_of, pad
from aisle.train.fit import Hooks, Scalars, fit
from aisle.train.linear import LinearTeacher
from aisle.train.metrics import score
from aisle.train.model import from_pretrained
from aisle.train.pretrain import unlabelled
from aisle.train.processes import Processes, processes
from aisle.train.prune import prune_vocabulary
from aisle.train.resume import STATE, check_replaceable, identity, put_in_place, working_folder
from aisle.train.sample import draw
from aisle.train.settings import SCRATCH, Settings
from aisle.train.train import Classification, Learnt, calibrate, measure


@dataclass(frozen=True)
class Plan:
    """What a distillation is told beside the settings of every training."""

    layers: int | None = None  # of the student; by default half of the teacher's
    hidden_size: int | None = None  # by default the teacher's
    temperature: float = 2.0  # softens the probabilities of teachers and student
    label_weight: float = 0.5  # of the labels' loss; the rest is that of the teachers' probabilities
    hidden_weight: float = 1.0  # of the hidden states' error, added to these
    linear_share: float = 0.0  # of a TF-IDF + linear SVM among the teachers
    prune: bool = True  # drop the pieces of the vocabulary that no text holds


def distil(
    teachers: Sequence[Path],
    data: Path,
    text_column: str,
    label_column: str,
    out: Path,
    settings: Settings,
    plan: Plan,
    *,
    extra: Sequence[Path] = (),
    save_every: int | None = None,
    log_dir: Path | None = None,
) -> dict[str, Any]:
    """Train a student of some teachers on a table and write its checkpoint folder `out`.

    The probabilities of several teachers are averaged; their tokenizers may differ. A student that `settings.model`
    names starts from that BERT, with its tokenizer, and not from the teacher. Goes on after a kill, and runs under
    torchrun, as `train` does.

    Args:
        extra: tables of further texts, learnt from without labels; what `train` holds out is left out.

    Returns metrics.json: the scores of student and teachers on the held-out fifth.

    Raises:
        InputError: the table cannot be learnt from, a teacher knows other categories, or there is no such student.
    """
    start = time.perf_counter()
    check_replaceable(out, "training.json")
    labels = read_labels(teachers[0])
    table, cleaning = clean_rows(read_labelled(data, text_column, label_column))
    parts = split(table)
    for folder in teachers:
        differing = sorted({*parts.labels, *labels} ^ set(read_labels(folder)))
        if differing:
            raise InputError(f"category {differing[0]!r} is not in both {folder} and {data}; teach with the same ones")
    parts = parts._replace(labels=labels)
    further = _unseen(parts, extra, text_column)
    made_from = {
        "file": data.name,
        "sha256": fingerprint(data),
        "columns": [text_column, label_column],
        "extra": [{"file": path.name, "sha256": fingerprint(path)} for path in extra],
        "teachers": [
            {"folder": folder.name, "checkpoint_sha256": checkpoint_fingerprint(folder)} for folder in teachers
        ],
        "plan": asdict(plan),
    }
    with processes() as team:
        linear = LinearTeacher(parts.train, labels) if plan.linear_share else None
        school = Teachers(teachers, labels, team.device, linear, plan.linear_share)
        settings = replace(settings, max_tokens=school.encoders[0].max_tokens)
        with working_folder(out, identity(settings, made_from, team), first=team.first) as work:
            say(f"{cleaning.rows_kept} labelled rows, {len(further)} texts without labels")
            learnt = _learn(
                parts, further, settings, plan, school, work, team, Hooks(work / STATE, save_every, log_dir)
            )
            metrics: dict[str, Any] = {}
            if team.first:
                temperature = calibrate(learnt)
                sizes: dict[str, Any] = {}
                if plan.prune:
                    texts = [*parts.train.texts, *parts.validation.texts, *further]
                    learnt.encoder, sizes = prune_vocabulary(learnt.model, learnt.encoder, texts, work)
                metrics = measure(learnt, parts)
                metrics["rows"]["extra"] = len(further)
                metrics["teachers"] = school.measure(parts)
                metrics["parameters"] = {
                    "student": learnt.model.num_parameters(),
                    "teacher": school.models[0].num_parameters(),
                }
                metrics["seconds"] = round(time.perf_counter() - start, 1)
                told = {
                    "settings": asdict(settings),
                    "data": {**made_from, "cleaning": asdict(cleaning)},
                    "pruning": sizes,
                    "epochs": learnt.history,
                    "temperature": temperature,
                    "processes": team.count,
                }
                write_checkpoint(work / "checkpoint", learnt.model, learnt.encoder, draw(parts), metrics, told)
                put_in_place(work / "checkpoint", out)
            return team.agree(metrics)


def _unseen(parts: Split, extra: Sequence[Path], text_column: str) -> list[str]:
    """Return the texts of further tables that are neither held out nor in the labelled table."""
    known = {content_key(text) for part in parts[:3] for text in part.texts}
    return [text for text in unlabelled(extra, text_column) if content_key(text) not in known]


def _learn(
    parts: Split,
    further: Sequence[str],
    settings: Settings,
    plan: Plan,
    school: Teachers,
    folder: Path,
    team: Processes,
    hooks: Hooks,
) -> Learnt:
    torch.manual_seed(settings.seed)
    teacher, file = school.models[0], folder / "tokenizer.json"
    if settings.model == SCRATCH:
        student, basis = student_of(teacher, plan, settings.dropout)
        school.encoders[0].save(file)
        # Layers of a teacher are fine-tuned; a narrower student learns them anew.
        settings = replace(settings, model=SCRATCH if basis is not None else str(school.folders[0]))
    else:
        student, tokenizer = from_pretrained(settings.model, parts.labels, settings.max_tokens, settings.dropout)
        tokenizer.save(str(file))
        basis = None
    encoder = Encoder(file)
    if plan.hidden_weight and encoder.tokens(parts.train.texts) != school.encoders[0].tokens(parts.train.texts):
        say("the student reads other tokens than the teacher: its hidden states are not compared")
        plan = replace(plan, hidden_weight=0.0)
    apprentice = Apprentice(student, teacher.config if plan.hidden_weight else None, basis)
    task = Distillation(parts, further, encoder, settings, plan, school, team)
    history = fit(apprentice, task, settings, team, hooks)
    return Learnt(student.eval(), encoder, task, history)


def spaced(layers: int, of: int) -> list[int]:
    """Return which of a teacher's layers each of a student's stands for, counted from 1; the last for the last."""
    return [round(layer * of / layers) for layer in range(1, layers + 1)]


def student_of(teacher: Any, plan: Plan, dropout: float) -> tuple[Any, Tensor | None]:
    """Return a student of the teacher's proportions, and the basis that its embeddings were projected on, if they were.

    One as wide as the teacher gets its weights, of the layers evenly spaced. A narrower one gets the embeddings on
    their first principal directions, [teacher's size, student's size]; the rest is random.

    Raises:
        InputError: it is larger than the teacher, or its size cannot be divided into attention heads.
    """
    config = copy.deepcopy(teacher.config)
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    layers, size = plan.layers or max(1, config.num_hidden_layers // 2), plan.hidden_size or width
    if layers > config.num_hidden_layers or size > width:
        deep, wide = config.num_hidden_layers, width
        raise InputError(f"a student of {layers} layers of {size} is no smaller than its teacher of {deep} of {wide}")
    if size % head:
        raise InputError(f"a hidden size of {size} cannot be divided into heads of {head}; give a multiple of {head}")
    config.num_hidden_layers, config.hidden_size, config.num_attention_heads = layers, size, size // head
    config.intermediate_size = config.intermediate_size * size // width
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    student = BertForSequenceClassification(config)
    if size == width:
        for own, number in zip(
            student.bert.encoder.layer, spaced(layers, teacher.config.num_hidden_layers), strict=True
        ):
            own.load_state_dict(teacher.bert.encoder.layer[number - 1].state_dict())
        for part in ("bert.embeddings", "bert.pooler", "classifier"):
            student.get_submodule(part).load_state_dict(teacher.get_submodule(part).state_dict())
        return student, None
    words = teacher.bert.embeddings.word_embeddings.weight.detach().cpu()
    basis = torch.linalg.eigh(words.T @ words).eigenvectors[:, -size:].contiguous()  # of the largest eigenvalues
    with torch.no_grad():
        for part in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
            source = getattr(teacher.bert.embeddings, part).weight.detach().cpu()
            getattr(student.bert.embeddings, part).weight.copy_(source @ basis)
    return student, basis


class Apprentice(nn.Module):
    """A student with what compares it to its teacher: linear maps to the teacher's size, left behind in the end."""

    def __init__(self, student: Any, teacher: Any | None, basis: Tensor | None) -> None:
        """Take a student and its teacher's configuration; without, hidden states are not compared."""
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
        """Return logits [texts, labels] and hidden states as `Teachers.hidden_states`, of fewer layers."""
        compared = len(self.projections) > 0
        output = self.student(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=compared)
        states = output.hidden_states if compared else ()
        return output.logits, [project(state) for project, state in zip(self.projections, states, strict=True)]


class Teachers:
    """Checkpoints that teach together; the first one's hidden states are learnt as well."""

    def __init__(
        self,
        folders: Sequence[Path],
        labels: Sequence[str],
        device: torch.device,
        linear: LinearTeacher | None = None,
        linear_share: float = 0.0,
    ) -> None:
        self.folders = folders
        self.encoders = [Encoder(folder / "tokenizer.json") for folder in folders]
        self.models = [load_model(folder).to(device).requires_grad_(False) for folder in folders]
        names = [read_labels(folder) for folder in folders]
        self.order = [[known.index(label) for label in labels] for known in names]
        self.linear, self.linear_share = linear, linear_share

    def probabilities(self, texts: Sequence[str], temperature: float, originals: Sequence[str] = ()) -> Tensor:
        """Return the mean of the teachers' probabilities, [texts, labels].

        Args:
            originals: what the texts were before they were varied, which the SVM has to know them by.
        """
        shares = []
        for model, encoder, order in zip(self.models, self.encoders, self.order, strict=True):
            logits = torch.from_numpy(logits_of(model, encoder.varied_tokens(texts), "asking a teacher"))
            shares.append((logits[:, order] / temperature).softmax(dim=1))
        mean = torch.stack(shares).mean(dim=0)
        if self.linear is None:
            return mean
        logits = torch.from_numpy(self.linear.logits(originals or texts))
        return mean.lerp((logits / temperature).softmax(dim=1).to(mean), self.linear_share)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Return the first teacher's, each [texts, tokens, hidden size]: embeddings, then each layer."""
        with torch.no_grad():
            output = self.models[0].bert(input_ids, attention_mask, output_hidden_states=True)
        states: tuple[Tensor, ...] = output.hidden_states
        return states

    def measure(self, parts: Split) -> dict[str, float]:
        """Return their common accuracy and macro-F1 on the held-out part."""
        best = self.probabilities(parts.held_out.texts, 1.0).argmax(dim=1).tolist()
        scores = score(parts.held_out.labels, [parts.labels[i] for i in best])
        return {name: scores[name] for name in ("accuracy", "macro_f1")}


class Distillation(Classification):
    """The task of answering as the teachers do; the texts without labels come after those of `Classification`."""

    def __init__(
        self,
        parts: Split,
        further: Sequence[str],
        encoder: Encoder,
        settings: Settings,
        plan: Plan,
        school: Teachers,
        team: Processes,
    ) -> None:
        super().__init__(parts, encoder, settings, team.device)
        self.labelled = len(self.texts)
        self.texts = self.shown = [*self.texts, *further]
        if self.tokens:
            self.tokens = [*self.tokens, *encoder.tokens(further)]
        self.plan = plan
        self.school = school
        self.bf16 = team.bf16
        self.soft: Tensor | None = None

    def epoch(self, number: int) -> list[list[int]]:
        batches = super().epoch(number)
        if self.soft is None or self.augmenter:  # varied texts have other probabilities
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                self.soft = self.school.probabilities(self.shown, self.plan.temperature, self.texts)
                self.soft = self.soft.to(self.device)
        return batches

    def loss(self, model: Any, rows: Sequence[int]) -> Tensor:
        assert self.soft is not None
        input_ids, attention_mask = (tensor.to(self.device) for tensor in pad([self.tokens[i] for i in rows]))
        logits, states = model(input_ids, attention_mask)
        # Softened gradients are smaller by the square of the temperature, hence the factor.
        temperature = self.plan.temperature
        own = (logits.float() / temperature).log_softmax(dim=1)
        loss = (1 - self.plan.label_weight) * temperature**2 * F.kl_div(own, self.soft[rows], reduction="sum")
        labelled = [i for i, row in enumerate(rows) if row < self.labelled]
        if labelled:
            targets = self.targets[[rows[i] for i in labelled]]
            loss = loss + self.plan.label_weight * self.loss_of(logits[labelled], targets).sum()
        if states:
            loss = loss + self.plan.hidden_weight * self._distance(states, input_ids, attention_mask)
        return loss

    def _distance(self, states: Sequence[Tensor], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the mean squared error of the hidden states of each text, summed over the texts."""
        wanted = self.school.hidden_states(input_ids, attention_mask)
        layers = [0, *spaced(len(states) - 1, len(wanted) - 1)]
        share = attention_mask / attention_mask.sum(dim=1, keepdim=True)  # [texts, tokens]
        errors = [
            ((own.float() - wanted[layer].float()) ** 2).mean(dim=2) for own, layer in zip(states, layers, strict=True)
        ]
        return (torch.stack(errors).mean(dim=0) * share).sum()

    def validate(self, model: Any) -> Scalars | None:
        return super().validate(model.student)
