"""The training loop: AdamW, linear warm-up and decay, on any number of devices; it goes on where it was stopped."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel

from aisle.console import say, track
from aisle.train.processes import Processes
from aisle.train.resume import load_state, save_state
from aisle.train.settings import Settings

Tokens = Sequence[Sequence[int]]
Scalars = dict[str, float]


class Task(Protocol):
    """What is learnt."""

    def epoch(self, number: int) -> list[list[int]]:
        """Return the row numbers of each step's batch; every epoch has as many. May prepare the rows anew."""

    def loss(self, model: Any, rows: Sequence[int]) -> torch.Tensor:
        """Return the sum of the rows' losses. `model` may be wrapped; it draws from torch's generator only."""

    def validate(self, model: Any) -> Scalars | None:
        """Return `score`, the higher the better, `loss`, and what else shall be told; None without validation rows."""


@dataclass
class Hooks:
    """Where a run leaves its traces; none of it changes the outcome."""

    state: Path | None = None  # the file to go on from after a kill
    save_every: int | None = None  # steps; by default as often as costs less than 2 % of the time
    log_dir: Path | None = None  # for TensorBoard
    after_epoch: Callable[[int, Scalars], None] = field(default=lambda epoch, scalars: None)


def fit(model: Any, task: Task, settings: Settings, team: Processes, hooks: Hooks) -> list[Scalars]:
    """Train `model`, and leave it with the weights of its best epoch by the validation score.

    All randomness of a step is drawn from a seed of its own, and the order of an epoch likewise; so a run that goes on
    from a state ends with the weights of one that was never stopped.

    Returns the loss and the validation figures of each epoch.
    """
    model.to(team.device)
    groups = parameter_groups(model, settings)
    optimizer = torch.optim.AdamW(groups, lr=base_rate(model, settings))
    rates = [group["lr"] for group in optimizer.param_groups]

    step, total, best = 0, 0.0, None
    history: list[Scalars] = []
    state = team.agree(load_state(hooks.state) if hooks.state and team.first else None)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, total, history, best = state["step"], state["total"], state["history"], state["best"]
        say(f"going on after step {step}")
    parallel = DistributedDataParallel(model) if team.count > 1 else model
    log = _Log(hooks.log_dir if team.first else None, step)
    saver = _Saver(hooks)

    while len(history) < settings.epochs and not _exhausted(history, settings.patience):
        epoch = len(history)
        batches = task.epoch(epoch)
        steps, warmup = settings.epochs * len(batches), max(1, int(settings.warmup * settings.epochs * len(batches)))
        model.train()
        todo = batches[step - epoch * len(batches) :]
        for batch in track(todo, f"epoch {epoch + 1}/{settings.epochs}"):
            torch.manual_seed(random.Random(f"{settings.seed} {step} {team.rank}").getrandbits(63))
            factor = min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss = _backward(parallel, task, batch, settings, team)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss
            step += 1
            log({"loss": loss, "learning_rate": rates[-1] * factor}, step)
            if team.first and hooks.state and saver.due(step):
                saver.save(_state(model, optimizer, step, total, history, best))

        scalars = {"train_loss": total / len(batches)}
        if team.first:
            with torch.autocast(team.device.type, torch.bfloat16, enabled=team.bf16):
                scalars |= task.validate(model.eval()) or {}
        history.append(team.agree(scalars))
        total = 0.0
        log({f"epoch/{name}": value for name, value in history[-1].items()}, step)
        say(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value:.4f}" for name, value in history[-1].items()))
        if team.first and _best(history) == epoch:
            best = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        hooks.after_epoch(epoch, history[-1])
    log.close()
    if best is not None:
        model.load_state_dict(best)
    return history


def _backward(model: Any, task: Task, batch: list[int], settings: Settings, team: Processes) -> float:
    """Add the gradient of the batch's mean loss to the parameters; return the loss of this process's share."""
    size = math.ceil(len(batch) / (settings.accumulate * team.count))
    parts = [batch[i * size : (i + 1) * size] for i in range(team.rank, settings.accumulate * team.count, team.count)]
    total = 0.0
    for i, part in enumerate(parts):
        # The processes meet at the last part; one whose share is empty brings a zero.
        meet = i == len(parts) - 1
        if not part and not (meet and team.count > 1):
            continue
        with nullcontext() if meet or team.count == 1 else model.no_sync():
            with torch.autocast(team.device.type, torch.bfloat16, enabled=team.bf16):
                loss = task.loss(model, part or batch[:1])
            # Gradients are averaged over the processes, hence the factor.
            loss = loss * (bool(part) * team.count / len(batch))
            torch.autograd.backward(loss)
        total += loss.item()
    return total


def base_rate(model: Any, settings: Settings) -> float:
    """Return the learning rate at its highest; a narrow pretrained BERT takes a higher one (Turc et al. 2019)."""
    if settings.learning_rate:
        return settings.learning_rate
    return 5e-4 if settings.from_scratch else min(5e-4, 3e-5 * (768 / model.config.hidden_size) ** 2)


def parameter_groups(model: Any, settings: Settings) -> list[dict[str, Any]]:
    """Return AdamW's groups: biases and LayerNorm are not decayed; a layer learns slower the deeper it lies.

    The learning rate falls by the factor `layer_decay` from the classifier to each layer below, to the embeddings last
    (Howard and Ruder 2018; for BERT, Sun et al. 2019).
    """
    decay = settings.layer_decay or (1.0 if settings.from_scratch else 0.95)
    layers = model.config.num_hidden_layers
    rate = base_rate(model, settings)
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if ".embeddings." in name:
            below = layers + 1
        elif ".encoder.layer." in name:
            below = layers - int(name.split(".encoder.layer.")[1].split(".")[0])
        else:
            below = 0
        groups.setdefault((below if decay != 1 else 0, parameter.dim() > 1), []).append(parameter)
    return [
        {"params": group, "lr": rate * decay**below, "weight_decay": settings.weight_decay if matrices else 0.0}
        for (below, matrices), group in sorted(groups.items(), reverse=True)
    ]


def _best(history: list[Scalars]) -> int | None:
    """Return the epoch with the best score, the lower loss deciding between equals; None without validation."""
    if "score" not in history[-1]:
        return None
    return max(range(len(history)), key=lambda epoch: (history[epoch]["score"], -history[epoch]["loss"]))


def _exhausted(history: list[Scalars], patience: int) -> bool:
    best = _best(history) if history else None
    if best is None or len(history) - 1 - best < patience:
        return False
    say(f"stopping early: epoch {best + 1} was the best")
    return True


def _state(model: Any, optimizer: Any, step: int, total: float, history: list[Scalars], best: Any) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "total": total,
        "history": history,
        "best": best,
    }


class _Saver:
    """Decides when a state is due."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks
        self.cost = 0.0
        self.last = time.monotonic()

    def due(self, step: int) -> bool:
        if self.hooks.save_every:
            return step % self.hooks.save_every == 0
        return time.monotonic() - self.last > max(20.0, 60 * self.cost)

    def save(self, state: dict[str, Any]) -> None:
        assert self.hooks.state
        start = time.monotonic()
        save_state(self.hooks.state, state)
        self.last = time.monotonic()
        self.cost = self.last - start


class _Log:
    """Writes figures for TensorBoard; steps after `step` that an earlier run wrote are hidden."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self.writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def __call__(self, scalars: Scalars, step: int) -> None:
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def like_lengths(tokens: Tokens, size: int, shuffler: random.Random) -> Iterator[list[int]]:
    """Yield shuffled batches whose texts are of like length, so that little of a batch is padding."""
    order = list(range(len(tokens)))
    shuffler.shuffle(order)
    batches = []
    for start in range(0, len(order), 50 * size):
        pool = sorted(order[start : start + 50 * size], key=lambda i: len(tokens[i]))
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    shuffler.shuffle(batches)
    yield from batches
