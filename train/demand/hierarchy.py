"""The tree of categories: sums at every level, and forecasts that add up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, diags
from scipy.sparse.linalg import spsolve

from aisle.preprocess.labels import SEPARATOR
from aisle.train.demand.counts import Floats

ALL = "all"  # the name of the sum of all categories, at level 0
OWN = "(other)"  # the name of rows whose category has categories below it


@dataclass(frozen=True)
class Tree:
    """The categories of all levels. Each is the sum of some leaves."""

    names: tuple[str, ...]  # [nodes]; parents come before their children
    levels: tuple[int, ...]  # [nodes]; 0 is the sum of all, 1 the departments
    sums: csr_matrix  # [nodes, leaves] of 0 and 1

    def add_up(self, leaves: Floats) -> Floats:
        """Return the values of all nodes, [nodes, days], from those of the leaves, [leaves, days]."""
        total: Floats = self.sums @ leaves
        return total

    def reconcile(self, forecasts: Floats, variances: Floats) -> Floats:
        """Return the forecasts closest to the given ones that add up and are not negative.

        Weighted least squares with the variance of each node's errors: MinT with a diagonal covariance (Wickramasuriya,
        Athanasopoulos and Hyndman 2019). A negative leaf becomes 0 before the sums are taken.

        Args:
            forecasts: [nodes, days]
            variances: [nodes], above 0
        """
        weighted = self.sums.T @ diags(1 / variances)
        leaves = spsolve((weighted @ self.sums).tocsc(), weighted @ forecasts)
        return self.add_up(np.maximum(0, np.asarray(leaves).reshape(self.sums.shape[1], -1)))


def tree_of(by_category: Mapping[str, Floats]) -> tuple[Tree, Floats]:
    """Return the tree of some categories, and the counts of its nodes, [nodes, days]."""
    paths = {tuple(name.split(SEPARATOR)): counts for name, counts in by_category.items()}
    inner = {path[:depth] for path in paths for depth in range(len(path))}
    leaves: dict[tuple[str, ...], Floats] = {}
    for path, counts in paths.items():
        leaf = (*path, OWN) if path in inner else path
        leaves[leaf] = leaves[leaf] + counts if leaf in leaves else counts  # a category may be called as OWN is
    below: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, path in enumerate(leaves):
        for depth in range(len(path) + 1):
            below[path[:depth]].append(number)
    nodes = sorted(below, key=lambda path: (len(path), path))
    places = [(row, column) for row, path in enumerate(nodes) for column in below[path]]
    rows, columns = zip(*places, strict=True)
    sums = csr_matrix((np.ones(len(places)), (rows, columns)), (len(nodes), len(leaves)))
    names = tuple(SEPARATOR.join(path) or ALL for path in nodes)
    tree = Tree(names, tuple(len(path) for path in nodes), sums)
    return tree, tree.add_up(np.stack(list(leaves.values())))
