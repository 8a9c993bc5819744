"""Hyperparameter search with Optuna, scored on the validation part. The held-out part is not used."""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna

from aisle.console import say
from aisle.errors import InputError
from aisle.files import write_json
from aisle.preprocess.clean import clean_rows
from aisle.preprocess.tables.table import fingerprint, read_labelled
from aisle.train.core.processes import processes
from aisle.train.core.settings import TrainingSettings
from aisle.train.core.split import split
from aisle.train.fit.loop import Hooks, Scalars
from aisle.train.fit.model import check_settings
from aisle.train.fit.train import learn


def search(
    data: Path, text_column: str, label_column: str, out: Path, settings: TrainingSettings, trials: int
) -> dict[str, Any]:
    """Search until `trials` trials are complete, and write search.json to `out`, beside Optuna's study.db.

    The first trial uses `settings`, and all trials use those of its settings that are not searched. A stopped search
    resumes when it is started again, without the interrupted trial. Several processes may share one folder.

    Returns search.json: the settings and score of each trial, and the command that trains with the best settings.

    Raises:
        InputError: as `train`; also if the study in `out` has other data or settings.
    """
    check_settings(settings)
    table, _ = clean_rows(read_labelled(data, text_column, label_column))
    parts = split(table)
    if not parts.validation.texts:
        raise InputError(f"{len(table.texts)} rows are too few to compare settings; add rows")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
    study = _study(out, settings, {"sha256": fingerprint(data), "columns": [text_column, label_column]})
    with processes() as world, tempfile.TemporaryDirectory() as scratch:
        if world.count > 1:
            raise InputError("search does not support torchrun; start it several times on one folder instead")

        def score(trial: optuna.Trial) -> float:
            def after_epoch(epoch: int, scalars: Scalars) -> None:
                trial.report(scalars["score"], epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned

            chosen = suggest(trial, settings)
            say(f"trial {trial.number + 1}: " + " ".join(arguments(trial.params)))
            learnt = learn(parts, chosen, Path(scratch), world, Hooks(after_epoch=after_epoch))
            return max(scalars["score"] for scalars in learnt.history)

        while len(_finished(study)) < trials:
            study.optimize(score, n_trials=1)
    result = _result(study, settings)
    write_json(out / "search.json", result)
    return result


def _result(study: optuna.Study, settings: TrainingSettings) -> dict[str, Any]:
    return {
        "settings": asdict(settings),
        "trials": [
            {"settings": trial.params, "score": trial.value, "state": trial.state.name.lower()}
            for trial in _finished(study)
        ],
        "best": {"settings": study.best_params, "score": study.best_value},
        "train_with": shlex.join(["aisle", "train", *arguments({**_changed(settings), **study.best_params})]),
    }


def suggest(trial: optuna.Trial, settings: TrainingSettings) -> TrainingSettings:
    """Return a trial's settings, from the usual ranges for a BERT from scratch or a pretrained one."""
    low, high = (1e-4, 2e-3) if settings.from_scratch else (1e-5, 5e-4)
    chosen = replace(
        settings,
        learning_rate=trial.suggest_float("learning_rate", low, high, log=True),
        batch_size=trial.suggest_categorical("batch_size", [32, 64, 128]),
        dropout=trial.suggest_float("dropout", 0.0, 0.3),
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.2),
        weight_decay=trial.suggest_float("weight_decay", 1e-3, 0.3, log=True),
    )
    if settings.from_scratch:
        return chosen
    return replace(chosen, layer_decay=trial.suggest_float("layer_decay", 0.7, 1.0))


def arguments(settings: dict[str, Any]) -> list[str]:
    """Return settings as `aisle train` takes them."""
    options: list[str] = []
    for name, value in settings.items():
        for each in value if isinstance(value, tuple) else (value,):
            options += ["--" + name.replace("_", "-"), f"{each:.4g}" if isinstance(each, float) else str(each)]
    return options


def _changed(settings: TrainingSettings) -> dict[str, Any]:
    """Return the settings that differ from the defaults."""
    return {name: value for name, value in asdict(settings).items() if value != getattr(TrainingSettings(), name)}


def _study(out: Path, settings: TrainingSettings, data: dict[str, Any]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it warns of a trial that raises, with a traceback
    study = optuna.create_study(
        storage=f"sqlite:///{out / 'study.db'}",
        study_name="aisle",
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        load_if_exists=True,
    )
    about = json.loads(json.dumps({"data": data, "settings": asdict(settings)}))
    if not study.user_attrs:
        study.set_user_attr("about", about)
        searched = ("batch_size", "dropout", "label_smoothing", "weight_decay")
        study.enqueue_trial({name: getattr(settings, name) for name in searched})
    elif study.user_attrs["about"] != about:
        raise InputError(f"{out} holds a search with other data or settings; choose another folder")
    # A new seed at each resume; the same seed would repeat the same trials.
    study.sampler = optuna.samplers.TPESampler(seed=settings.seed + len(study.trials))
    return study


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return study.get_trials(deepcopy=False, states=states)
