"""The decisions of a checkpoint whose categories changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from aisle.train.core.decisions import Category, Decisions, levels_of, within

Sources = Sequence[frozenset[int]]  # which old labels each new one is made of, by number; none for an added one


def carried(old: Decisions, fitted: Decisions, sources: Sources) -> Decisions:
    """Return the old thresholds where a category or level is made of the same labels, and the fitted ones elsewhere.

    So thresholds that were fitted on a whole table stay, although a change sees fewer texts. They stay valid beside an
    added label, which takes probability from the others: a text that reaches a threshold would have reached it before.
    """
    before = [dict(_by_labels(old, levels)) for levels in (old.levels[:1], old.levels[1:])]
    levels = [
        tuple(
            replace(before[depth > 0].get(_made_of(members, sources), category), name=category.name)
            for category, members in _members(level, fitted.labels)
        )
        for depth, level in enumerate(fitted.levels)
    ]
    least = min(old.least_probability, fitted.least_probability)
    return Decisions(old.targets, old.rows, old.largest_energy, least, tuple(levels))


def undecided(old: Decisions, labels: Sequence[str]) -> Decisions:
    """Return decisions on other labels, of which none is accepted."""
    levels = tuple(tuple(Category(name, None, 1, 0, 0.0) for name in names) for names in levels_of(labels))
    return replace(old, levels=levels)


def _by_labels(old: Decisions, levels: Sequence[tuple[Category, ...]]) -> Iterator[tuple[frozenset[int], Category]]:
    """Yield the categories with the numbers of their labels, from the highest level down."""
    for level in reversed(levels):
        for category, members in _members(level, old.labels):
            yield frozenset(members), category


def _members(level: Sequence[Category], labels: Sequence[str]) -> Iterator[tuple[Category, list[int]]]:
    """Yield each category of a level with the numbers of its labels."""
    names = [category.name for category in level]
    found: dict[str, list[int]] = {name: [] for name in names}
    for number, label in enumerate(labels):
        found[within(label, found)].append(number)
    for category in level:
        yield category, found[category.name]


def _made_of(members: Sequence[int], sources: Sources) -> frozenset[int]:
    """Return the old labels of a category; the empty set if one of its labels is new."""
    parts = [sources[number] for number in members]
    return frozenset[int]().union(*parts) if all(parts) else frozenset()
