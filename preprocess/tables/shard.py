"""Shards: several workers share one big table. Each takes a range of its rows and writes a part file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from aisle.errors import InputError
from aisle.preprocess.tables.opening import PACKED, STDIO

JOB = "JOB_COMPLETION_INDEX"  # set by an Indexed Job of Kubernetes, from 0


class Shard(NamedTuple):
    """One of `of` shards, numbered from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def rows(self, total: int) -> range:
        """Return the rows of this shard, from 0. Over all shards, each row occurs once."""
        return range(total * (self.number - 1) // self.of, total * self.number // self.of)

    def part_of(self, out: Path) -> Path:
        """Return the name of the part file: out-00003-of-00016.parquet for out.parquet.

        Raises:
            InputError: `out` is standard output.
        """
        if out == STDIO:
            raise InputError("--shard writes a part file; name it with -o, such as -o out.parquet")
        endings = out.suffixes[-2:] if out.suffix.lower() in PACKED else out.suffixes[-1:]
        stem = out.name[: len(out.name) - len("".join(endings))]
        return out.with_name(f"{stem}-{self.number:05}-of-{self.of:05}{''.join(endings)}")


def read_shard(text: str) -> Shard:
    """Read a shard such as 3/16; in `job/16` the number is that of a pod in an Indexed Job of Kubernetes.

    Raises:
        InputError: it is not a shard, or the number is not one of 1 to the count.
    """
    found = re.fullmatch(r"(job|[0-9]{1,5})/([0-9]{1,5})", text)
    if found is None:
        raise InputError(f"--shard {text}: write it as 3/16 for the third of 16 shards, or as job/16 in Kubernetes")
    number, count = found[1], int(found[2])
    if number == "job":
        index = os.environ.get(JOB, "")
        if not index.isdecimal():
            raise InputError(f"--shard {text}: {JOB} is not set; run it in an Indexed Job, or write 3/{count}")
        number = str(int(index) + 1)
    if not 1 <= int(number) <= count:
        given = f"--shard {text}" if found[1] != "job" else f"--shard {text}, pod {int(number) - 1}"
        raise InputError(f"{given}: shards are numbered from 1 to their count, such as 1/{max(count, 1)}")
    return Shard(int(number), count)
