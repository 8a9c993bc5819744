"""The training loop: AdamW with linear warm-up and decay, on any number of devices. A stopped run can resume."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel

from aisle.console import say, track
from aisle.errors import InputError
from aisle.train.core.checkpoint import check_finite
from aisle.train.core.families import EMBEDDINGS, LAYER
from aisle.train.core.processes import Processes
from aisle.train.core.resume import load_state, save_state
from aisle.train.core.settings import TrainingSettings

Tokens = Sequence[Sequence[int]]
Scalars = dict[str, float]


class Task(Protocol):
    """A training objective with its data."""

    def epoch(self, number: int) -> list[list[int]]:
        """Return the row numbers of each step's batch, and prepare the rows. All epochs have equally many."""

    def loss(self, model: Any, rows: Sequence[int]) -> torch.Tensor:
        """Return the sum of the rows' losses. `model` may be wrapped. Draws only from torch's generator."""

    def validate(self, model: Any) -> Scalars | None:
        """Return `score` (higher is better), `loss` and further figures to print; None without validation rows."""


class Mechanism(Protocol):
    """Does the steps of a training with differential privacy."""

    def attach(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Prepare the model."""

    def step(self, task: Task, batch: list[int]) -> None:
        """Change the weights by a private gradient."""

    def epsilon(self, steps: int) -> float:
        """Return what `steps` steps have spent."""

    def detach(self, model: Any) -> None:
        """Return the model to what it was."""


@dataclass
class Hooks:
    """Where and when a run saves its state and logs. None of this changes the result."""

    state: Path | None = None  # the file to resume from
    save_every: int | None = None  # steps; by default, saving takes less than 2 % of the time
    log_dir: Path | None = None  # for TensorBoard
    after_epoch: Callable[[int, Scalars], None] = field(default=lambda epoch, scalars: None)


def fit(
    model: Any,
    task: Task,
    settings: TrainingSettings,
    world: Processes,
    hooks: Hooks,
    mechanism: Mechanism | None = None,
) -> list[Scalars]:
    """Train `model` in place. It ends with the weights of the epoch with the best validation score.

    Each step and each epoch's order has its own random seed. So a resumed run ends with the same weights as one that
    was never stopped. With a `mechanism`, noise and samples are drawn anew, and no loss is kept.

    Returns the loss and the validation figures of each epoch.

    Raises:
        InputError: training diverged: a loss, gradient, weight or figure is not finite.
    """
    run = _Run(model, task, settings, world, hooks, mechanism)
    while len(run.history) < settings.epochs and not _exhausted(run.history, settings.patience):
        run.end_epoch(run.train_epoch())
    run.log.close()
    if mechanism:
        mechanism.detach(model)
    if run.best is not None:
        model.load_state_dict(run.best)
    check_finite("the trained model", model)
    return run.history


class _Run:
    """The progress of a training run. It resumes from the saved state, if there is one."""

    def __init__(
        self,
        model: Any,
        task: Task,
        settings: TrainingSettings,
        world: Processes,
        hooks: Hooks,
        mechanism: Mechanism | None,
    ) -> None:
        self.model, self.task, self.settings, self.world, self.hooks = model, task, settings, world, hooks
        self.mechanism = mechanism
        model.to(world.device)
        groups = parameter_groups(model, settings)
        fused = world.device.type == "cuda"  # one kernel for all parameters, instead of several for each
        self.optimizer = torch.optim.AdamW(groups, lr=base_rate(model, settings), fused=fused)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]  # peak learning rates
        self.step = 0
        self.total = 0.0  # sum of the losses of this epoch's steps
        self.history: list[Scalars] = []  # one entry for each finished epoch
        self.best: dict[str, Any] | None = None  # the weights of the best epoch
        self._resume()
        if mechanism:
            mechanism.attach(model, self.optimizer)
        self.parallel = DistributedDataParallel(model) if world.count > 1 else model
        self.log = _Log(hooks.log_dir if world.is_main else None, self.step)
        self.saver = _Saver(hooks)

    def _resume(self) -> None:
        hooks, world = self.hooks, self.world
        state = world.broadcast(load_state(hooks.state) if hooks.state and world.is_main else None)
        if state:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.total = state["step"], state["total"]
            self.history, self.best = state["history"], state["best"]
            say(f"resuming after step {self.step}")

    def train_epoch(self) -> float:
        """Train for the rest of an epoch, and return its mean loss."""
        epoch = len(self.history)
        batches = self.task.epoch(epoch)
        steps = self.settings.epochs * len(batches)
        self.model.train()
        remaining = batches[self.step - epoch * len(batches) :]
        for batch in track(remaining, f"epoch {epoch + 1}/{self.settings.epochs}"):
            self._train_step(batch, steps)
            if self.world.is_main and self.hooks.state and self.saver.due(self.step):
                self.saver.save(self._state())
        mean, self.total = self.total / len(batches), 0.0
        return mean

    def _train_step(self, batch: list[int], steps: int) -> None:
        """Do one of the run's `steps`."""
        torch.manual_seed(random.Random(f"{self.settings.seed} {self.step} {self.world.rank}").getrandbits(63))
        warmup = max(1, int(self.settings.warmup * steps))
        factor = min((self.step + 1) / warmup, (steps - self.step) / max(1, steps - warmup))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        if self.mechanism:
            self.mechanism.step(self.task, batch)
        else:
            self._change_weights(batch, steps, factor)
        self.step += 1

    def _change_weights(self, batch: list[int], steps: int, factor: float) -> None:
        loss = _backward(self.parallel, self.task, batch, self.settings, self.world)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _diverged(f"the loss or its gradient in step {self.step + 1} of {steps}", self.rates[-1])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.total += loss
        self.log({"loss": loss, "learning_rate": self.rates[-1] * factor}, self.step + 1)

    def end_epoch(self, train_loss: float) -> None:
        """Validate, and keep the weights if they are the best so far."""
        epoch = len(self.history)
        scalars = {"epsilon": self.mechanism.epsilon(self.step)} if self.mechanism else {"train_loss": train_loss}
        if self.world.is_main:
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.world.bf16):
                scalars |= self.task.validate(self.model.eval()) or {}
        scalars = self.world.broadcast(scalars)
        self.history.append(scalars)
        if not all(map(math.isfinite, scalars.values())):
            raise _diverged(f"a figure of epoch {epoch + 1}", self.rates[-1])
        self.log({f"epoch/{name}": value for name, value in scalars.items()}, self.step)
        say(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value:.4f}" for name, value in scalars.items()))
        if self.world.is_main and _best(self.history) == epoch:
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        self.hooks.after_epoch(epoch, scalars)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "total": self.total,
            "history": self.history,
            "best": self.best,
        }


def _diverged(what: str, rate: float) -> InputError:
    return InputError(
        f"training diverged: {what} is not finite; lower --learning-rate (it is {rate:g}), or start from another model"
    )


def _backward(model: Any, task: Task, batch: list[int], settings: TrainingSettings, world: Processes) -> float:
    """Add the gradient of the batch's mean loss to the parameters; return the loss of this process's share."""
    size = math.ceil(len(batch) / (settings.accumulate * world.count))
    parts = [
        batch[i * size : (i + 1) * size] for i in range(world.rank, settings.accumulate * world.count, world.count)
    ]
    total = 0.0
    for i, part in enumerate(parts):
        # Gradients are synchronized at the last part; a process without rows contributes zero.
        synchronize = i == len(parts) - 1
        if not part and not (synchronize and world.count > 1):
            continue
        with nullcontext() if synchronize or world.count == 1 else model.no_sync():
            with torch.autocast(world.device.type, torch.bfloat16, enabled=world.bf16):
                loss = task.loss(model, part or batch[:1])
            # Gradients are averaged over the processes, hence the factor.
            loss = loss * (bool(part) * world.count / len(batch))
            torch.autograd.backward(loss)
        total += loss.item()
    return total


def base_rate(model: Any, settings: TrainingSettings) -> float:
    """Return the peak learning rate. A narrow pretrained BERT takes a higher one (Turc et al. 2019)."""
    if settings.learning_rate:
        return settings.learning_rate
    return 5e-4 if settings.from_scratch else min(5e-4, 3e-5 * (768 / model.config.hidden_size) ** 2)


def parameter_groups(model: Any, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: no weight decay for biases and LayerNorm, lower learning rates for lower layers.

    The learning rate falls by the factor `layer_decay` from the classifier to each layer below, to the embeddings last
    (Howard and Ruder 2018; for BERT, Sun et al. 2019).
    """
    decay = settings.layer_decay or (1.0 if settings.from_scratch else 0.95)
    layers = model.config.num_hidden_layers
    rate = base_rate(model, settings)
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if found := LAYER.search(name):
            below = layers - int(found[1])
        else:
            below = layers + 1 if EMBEDDINGS.search(name) else 0
        groups.setdefault((below if decay != 1 else 0, parameter.dim() > 1), []).append(parameter)
    return [
        {"params": group, "lr": rate * decay**below, "weight_decay": settings.weight_decay if matrices else 0.0}
        for (below, matrices), group in sorted(groups.items(), reverse=True)
    ]


def _best(history: list[Scalars]) -> int | None:
    """Return the epoch with the best score and, among equal scores, the lowest loss; None without validation."""
    if "score" not in history[-1]:
        return None
    return max(range(len(history)), key=lambda epoch: (history[epoch]["score"], -history[epoch]["loss"]))


def _exhausted(history: list[Scalars], patience: int) -> bool:
    best = _best(history) if history else None
    if best is None or len(history) - 1 - best < patience:
        return False
    say(f"stopping early: epoch {best + 1} was the best")
    return True


class _Saver:
    """Decides when to save a state."""

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
    """Writes figures for TensorBoard, and hides the steps after `step` that an earlier run wrote."""

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


def like_lengths(
    tokens: Tokens, size: int, shuffler: random.Random, units: Iterable[Sequence[int]] | None = None
) -> Iterator[list[int]]:
    """Yield shuffled batches of texts of similar length, which need little padding.

    Args:
        units: texts to keep side by side, each text in one unit; by default each text is a unit.
    """
    order = [*units] if units else [(row,) for row in range(len(tokens))]
    shuffler.shuffle(order)
    longest = [(row, max(len(tokens[each]) for each in unit)) for unit in order for row in unit]
    batches = []
    for start in range(0, len(longest), 50 * size):
        pool = [row for row, _ in sorted(longest[start : start + 50 * size], key=lambda each: each[1])]
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    shuffler.shuffle(batches)
    yield from batches
