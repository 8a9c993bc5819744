"""The bench: what is fast and by how much, measured in one run; the page and the .json that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aisle.errors import InputError
from aisle.loadtest import engines
from aisle.loadtest.machine import describe, machine
from aisle.loadtest.material import random_checkpoint, read_texts
from aisle.preprocess.encode import Encoder
from aisle.report import Page
from aisle.train.checkpoint import load_model, write_json

PARTS = ("engines",)
TEXTS = 20_000  # read of a table: more than a run sends, so that no text comes twice


@dataclass(frozen=True)
class Settings:
    """What a run measures with."""

    data: Path | None = None  # texts; the SYNTHETIC catalogue by default
    text_column: str = "text"
    model: Path | None = None  # a checkpoint; random weights by default
    size: str = "base"  # of the random weights
    rounds: int = 2
    quick: bool = False  # a tiny model and moments: shows that all runs, and measures nothing
    work: Path = Path("work/bench")

    @property
    def engine_texts(self) -> int:
        return 64 if self.quick else 128


def bench(parts: Sequence[str], settings: Settings, page: Path) -> dict[str, Any]:
    """Measure parts of `PARTS` and write the page and, beside it, the .json.

    Raises:
        InputError: there is no such part, or the data or the model cannot be used.
    """
    for part in parts:
        if part not in PARTS:
            raise InputError(f"no part {part!r} of the bench; choose from {', '.join(PARTS)}")
    texts = read_texts(settings.data, settings.text_column, TEXTS)
    size = "tiny" if settings.quick else settings.size
    checkpoint = settings.model or random_checkpoint(settings.work / size, texts, size)
    result: dict[str, Any] = {
        "machine": machine(),
        "quick": settings.quick,
        "data": settings.data.name if settings.data else "the SYNTHETIC sample catalogue",
        "model": settings.model.name if settings.model else f"BERT {size} with random weights",
        "checkpoint": str(checkpoint),
    }
    if "engines" in parts:
        encoder = Encoder(checkpoint / "tokenizer.json")
        tokens = encoder.tokens(texts[: settings.engine_texts])
        rounds = 1 if settings.quick else settings.rounds
        result["engines"] = engines.measure(load_model(checkpoint), tokens, encoder.max_tokens, rounds)
    try:
        _page(result).write(page)
        write_json(page.with_suffix(".json"), result)
    except OSError as error:
        raise InputError(f"cannot write {page}: {error.strerror}") from None
    return {**result, "report": str(page)}


def _page(result: dict[str, Any]) -> Page:
    quick = "A QUICK RUN of a tiny model: these figures mean nothing. " if result["quick"] else ""
    page = Page(
        "Bench", f"{quick}{result['model']}, texts of {result['data']}. Measured on {describe(result['machine'])}."
    )
    if "engines" in result:
        _engines(page, result["engines"])
    return page


def _engines(page: Page, found: dict[str, Any]) -> None:
    page.heading("Engines")
    page.text(
        f"{found['texts']} texts in order of arrival, {found['mean_tokens']:.1f} tokens on average; "
        f"{found['rounds']} rounds, interleaved; the sum of each batch's median time."
    )
    page.table(list(engines.COLUMNS.values()), [[row[key] for key in engines.COLUMNS] for row in found["rows"]])
    page.text(summary(found))
    names = list(dict.fromkeys(row["system"] for row in found["rows"]))
    figure = Figure(figsize=(9, 0.6 * len(names) + 1), layout="constrained")
    axis = figure.subplots()
    for number, size in enumerate(engines.BATCHES):
        speeds = {row["system"]: row["texts_per_second"] for row in found["rows"] if row["batch"] == size}
        places = [i + 0.4 * number - 0.2 for i in range(len(names))]
        axis.bar_label(axis.barh(places, [speeds[name] for name in names], 0.4, label=f"batches of {size}"), fmt="%.3g")
    axis.axvline(found["ceiling_texts_per_second"], color="black", linestyle=":", label="bare int8 matrix products")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("texts/s")
    axis.legend()
    page.plot(figure, "throughput of each engine")


def summary(found: dict[str, Any]) -> str:
    return (
        f"INT8 is {found['int8_to_pytorch']:.2f} × PyTorch fp32 padded in batches of {engines.BATCHES[0]}, "
        f"{found['int8_to_bf16']:.2f} × bf16, and reaches {found['share_of_ceiling']:.0%} of what the bare int8 matrix "
        f"products of the same sizes reach on these cores ({found['ceiling_texts_per_second']:.1f} texts/s, "
        f"{found['ceiling_gops']:.0f} Gop/s)."
    )
