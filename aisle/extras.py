"""The names of the distribution and of its extras, from the package's metadata, for all messages."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import entry_points, requires

COMMAND = "aisle.cli:main"
# The project of a module, if its name differs.
PROJECTS = {
    "confluent_kafka": "confluent-kafka",
    "cuda": "cuda-bindings",
    "faiss": "faiss-cpu",
    "python_calamine": "python-calamine",
    "opentelemetry": "opentelemetry-api",
    "prometheus_client": "prometheus-client",
    "pytriton": "nvidia-pytriton",
    "sklearn": "scikit-learn",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
}
# The smallest extras for each command. Options may need one more, such as `report`.
EXTRAS = {
    "ablate": ("train", "report"),
    "bench": ("bench",),
    "build": ("build",),
    "clean": ("clean",),
    "compare": ("build", "report"),
    "demand": ("demand",),
    "demo": ("demo",),
    "decide": ("train",),
    "deploy": ("build",),
    "desk": ("desk",),
    "desk-user": ("desk",),
    "distil": ("train",),
    "drift": ("train",),
    "duplicates": ("index",),
    "evaluate": ("train",),
    "explain": ("explain",),
    "frontier": ("demo", "report"),
    "index": ("index",),
    "loadtest": ("loadtest",),
    "pretrain": ("train",),
    "prune": ("train",),
    "rest": ("rest",),
    "retrain": ("train", "clean"),
    "review": ("clean",),
    "search": ("train", "search"),
    "serve": ("serve",),
    "similar": ("index",),
    "stages": ("build", "report"),
    "stream": ("stream",),
    "study": ("build", "report"),
    "train": ("train",),
    "watch": ("evaluate",),
}
EXTRAS_WITH_URL = {"evaluate": ("evaluate",), "explain": ("evaluate",)}  # with --url, the server runs the model
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w,\s-]+)\])?.*?;.*?extra == ['\"]([\w-]+)['\"]")


@cache
def distribution() -> str:
    """Return the name of the installed distribution, or "." in a source tree that is not installed."""
    for entry in entry_points(group="console_scripts", name="aisle"):
        if entry.value == COMMAND and entry.dist is not None:
            return str(entry.dist.metadata["Name"])
    return "."


def install(*extras: str) -> str:
    """Return the command that installs extras."""
    return f"pip install '{distribution()}[{','.join(extras)}]'"


def install_for(command: str, module: str, *, served: bool = False) -> str | None:
    """Return the command that installs the extras of a command, or None if no extra contains `module`.

    Args:
        command: the command of `aisle`, such as `train`.
        module: the module that could not be imported, such as `torch.nn`.
        served: a server runs the model, because of --url.
    """
    top = module.partition(".")[0]
    project = PROJECTS.get(top, top)
    extras = _projects_of_extras()
    holders = [name for name, projects in extras.items() if project in projects]
    if not holders:
        return None
    wanted = (EXTRAS_WITH_URL.get(command) if served else None) or EXTRAS.get(command, ())
    if not any(name in holders for name in wanted):
        wanted = (*wanted, min(holders, key=lambda name: len(extras[name])))
    return install(*wanted)


def _projects_of_extras() -> dict[str, set[str]]:
    """Return the projects that each extra requires, including those of the extras that it includes."""
    if distribution() == ".":
        return {}
    direct: dict[str, set[str]] = {}
    included: dict[str, set[str]] = {}
    for line in requires(distribution()) or ():
        if match := _REQUIREMENT.match(line):
            project, extras, extra = match.groups()
            if project == distribution():
                included.setdefault(extra, set()).update(each.strip() for each in extras.split(","))
            else:
                direct.setdefault(extra, set()).add(project)

    def closure(extra: str) -> set[str]:
        return direct.get(extra, set()).union(*map(closure, included.get(extra, ())))

    return {extra: closure(extra) for extra in {*direct, *included}}
