"""Finds the groups: which rollouts answer the same prompt of the same generation batch."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from ..errors import UsageError
from .formats import is_trl_table
from .reading import Rollouts


# A file counts as written batch by batch, each prompt's rollouts side by side, if this share of its rows stands in
# runs of exactly the most frequent length, and this share in runs of a multiple of it (the prompt drawn twice).
EXACT_RUNS = 0.8
MULTIPLE_RUNS = 0.95
# A larger share of rollouts in groups of another size than was given is a warning: evaluations leave some.
MISFITS = 0.05


@dataclass(frozen=True)
class Groups:
    """
    M groups of at least two rollouts.

    Args:
        order (`np.ndarray` of shape `(R,)`, int64): Indices of the grouped rollouts, by run and step, group by group.
        sizes (`np.ndarray` of shape `(M,)`, int64): Rollouts of each group; they sum to R.
        steps (`np.ndarray` of shape `(M,)`, int64): Training step of each group.
        notes (`list[str]`): Rows that were left out and other doubts, in plain language.
        warnings (`list[str]`): What may make the figures wrong.
    """

    order: np.ndarray
    sizes: np.ndarray
    steps: np.ndarray
    notes: list[str]
    warnings: list[str] = field(default_factory=list)

    @property
    def typical_size(self) -> int:
        """The size that most groups have."""
        return int(np.bincount(self.sizes).argmax())

    @cached_property
    def starts(self) -> np.ndarray:
        """Where in `order` each group begins."""
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def index(self) -> np.ndarray:
        """The group of each rollout in `order`, `(R,)` int64."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sums of `values` `(R, ...)` over each group, `(M, ...)`."""
        return np.add.reduceat(values * 1.0, self.starts)

    def any(self, values: np.ndarray) -> np.ndarray:
        """Whether any of `values` `(R, ...)` is true in each group, `(M, ...)`."""
        return np.logical_or.reduceat(values, self.starts)

    def centered(self, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Deviation of `values` `(R, C)` from the mean over those of their group that count; 0 for the others."""
        present = np.where(counts, values, 0.0)
        means = self.sum(present) / np.maximum(self.sum(counts), 1)
        return np.where(counts, present - means[self.index], 0.0)


def find_groups(rollouts: Rollouts, num_generations: int | None = None) -> Groups:
    """
    Group rollouts by run, step and prompt.

    A prompt may occur more than once in a step. Where a file has each prompt's rollouts side by side, as TRL writes
    them, such occurrences are told apart by the group size: `num_generations`, or else the most frequent number of
    equal prompts in a row. Rows in any other order form one group per prompt and step, unless `num_generations` says
    how to cut it. Groups may differ in size; a rollout that is alone with its prompt is left out, and so is the rest
    of a group at the head of one of TRL's tables.

    Raises:
        [`UsageError`]: if no prompt has two rollouts in the same step, or if only `num_generations` could tell the
            groups and it is missing or does not fit.
    """
    notes: list[str] = []
    warnings: list[str] = []
    rows = _without_repeated_tables(rollouts, notes)
    # By run and step, in file order within a step.
    rows = rows[np.lexsort((rollouts.step[rows], rollouts.run[rows]))]
    rows = _without_remnants(rollouts, rows, notes)
    if rollouts.layout.prompt is None:
        return _groups_by_order(rollouts, rows, num_generations, notes)
    keys = rollouts.prompt, rollouts.step, rollouts.run
    side_by_side = _sizes(_starts(rows, *keys))
    size = num_generations or _frequent_run_length(side_by_side)
    is_written_in_groups = _is_written_in_groups(side_by_side, size, is_guess=num_generations is None)
    if not is_written_in_groups:
        rows = rows[np.lexsort([key[rows] for key in keys])]  # stable: file order within a prompt
    is_start = _starts(rows, *keys)
    if is_written_in_groups or num_generations:
        # What is longer than a group is cut into groups; a shorter rest stays a group of its own.
        runs = _sizes(is_start)
        is_start |= (np.arange(len(rows)) - np.repeat(np.cumsum(runs) - runs, runs)) % size == 0
    sizes = _sizes(is_start)
    if not is_written_in_groups and not num_generations:
        _note_large_groups(sizes, notes)

    grouped: np.ndarray = np.repeat(sizes > 1, sizes)
    alone = int((~grouped).sum())
    if alone == len(rows):
        raise UsageError(
            "No prompt has two rollouts in the same step, so that there is no group to compare within. The rollouts "
            "of a prompt need the same text in `prompt` and the same `step`"
            + (" (without the column, prompts alone form the groups)." if rollouts.has_step else ".")
        )
    if alone:
        notes.append(f"{alone:,} rollouts are alone with their prompt and step (evaluation?), and are left out.")
    steps = rollouts.step[rows[is_start]][sizes > 1]
    sizes = sizes[sizes > 1]
    groups = Groups(order=rows[grouped], sizes=sizes, steps=steps, notes=notes, warnings=warnings)
    uneven = int(sizes[sizes != groups.typical_size].sum())
    misfits = int(sizes[sizes != num_generations].sum()) + alone
    if num_generations and misfits > MISFITS * len(rows):
        warnings.append(
            f"--num-generations {num_generations} does not fit: {misfits:,} of {len(rows):,} rollouts are in groups "
            "of another size, or alone. Without the option groups are found by prompt and step."
        )
    elif uneven:
        notes.append(
            f"Groups hold {groups.typical_size} rollouts; {uneven:,} rollouts ({uneven / sizes.sum():.0%}) are in "
            f"groups of another size ({sizes.min()} to {sizes.max()}), each compared within its own."
        )
    return groups


def _starts(rows: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Which of `rows` differ from the row before in any of `keys`; the first does. Bool, of the shape of `rows`."""
    is_start: np.ndarray = np.ones(len(rows), dtype=bool)
    is_start[1:] = np.any([key[rows[1:]] != key[rows[:-1]] for key in keys], axis=0)
    return is_start


def _sizes(is_start: np.ndarray) -> np.ndarray:
    """Lengths of the parts that begin where `is_start` is true."""
    return np.diff(np.append(np.flatnonzero(is_start), len(is_start)))


def _groups_by_order(rollouts: Rollouts, rows: np.ndarray, num_generations: int | None, notes: list[str]) -> Groups:
    """Groups of `num_generations` rows each, where only the order of the rows, sorted by run and step, tells them."""
    if not num_generations:
        raise UsageError(
            f"'{rollouts.files[0]}' holds prompt and completion as one text in `{rollouts.layout.completion}`, so "
            "that only their order tells which rollouts belong to one prompt. Give the rollouts per prompt: "
            "--num-generations G."
        )
    step, is_start = rollouts.step[rows], _starts(rows, rollouts.run, rollouts.step)
    counts = _sizes(is_start)
    if (counts % num_generations).any():
        wrong = int(np.flatnonzero(counts % num_generations)[0])
        where = f"step {step[is_start][wrong]}" if rollouts.has_step else f"'{rollouts.files[0]}'"
        raise UsageError(
            f"--num-generations {num_generations} does not fit: {where} has {counts[wrong]} rollouts, which is not a "
            "multiple of it."
        )
    sizes = np.full(len(rows) // num_generations, num_generations)
    notes.append(f"Groups are {num_generations} rows each, in the order of the file.")
    return Groups(order=rows, sizes=sizes, steps=step[::num_generations], notes=notes)


def _frequent_run_length(lengths: np.ndarray) -> int:
    """The length of run in which most rows stand."""
    return int(np.bincount(lengths, weights=lengths).argmax())


def _is_written_in_groups(lengths: np.ndarray, size: int, *, is_guess: bool) -> bool:
    rows = lengths.sum()
    exact, multiple = lengths[lengths == size].sum(), lengths[lengths % size == 0].sum()
    return size > 1 and multiple >= MULTIPLE_RUNS * rows and (not is_guess or exact >= EXACT_RUNS * rows)


def _note_large_groups(sizes: np.ndarray, notes: list[str]) -> None:
    typical = int(np.bincount(sizes).argmax())
    multiples = int(((sizes > typical) & (sizes % typical == 0)).sum()) if typical > 1 else 0
    if multiples:
        notes.append(
            f"The rollouts of a prompt do not stand side by side, and {multiples:,} prompts have a multiple of "
            f"{typical} rollouts in a step: each is taken as one group. If a prompt was drawn more than once, "
            f"--num-generations {typical} cuts it, in the order of the file."
        )


def _without_remnants(rollouts: Rollouts, rows: np.ndarray, notes: list[str]) -> np.ndarray:
    """
    `rows`, sorted by run and step, without the first group of each of TRL's tables that is a remnant.

    Such a table holds the last rows of its step, as many as one generation batch has. An evaluation adds rows of its
    own, so that the first ones fall out, and part of a group may stay: fewer rows than most of the others stand in.
    """
    trl_files = np.array([is_trl_table(file) for file in rollouts.files])
    kept: np.ndarray = np.ones(len(rows), dtype=bool)
    tables = np.flatnonzero(_starts(rows, rollouts.run, rollouts.step))[1:]
    for table in np.split(np.arange(len(rows)), tables):
        if trl_files[rollouts.file[rows[table]]].all():
            first, *others = _sizes(_starts(rows[table], rollouts.prompt))
            if others and first < _frequent_run_length(np.array(others)):
                kept[table[:first]] = False
    if not kept.all():
        notes.append(
            f"{(~kept).sum():,} rollouts at the head of logged tables are the rest of groups that TRL cut, and are "
            "left out."
        )
    return rows[kept]


def _without_repeated_tables(rollouts: Rollouts, notes: list[str]) -> np.ndarray:
    """Indices of the rows without the steps whose rows all equal those of the step before."""
    if not rollouts.has_step:
        return np.arange(len(rollouts))
    columns = {"prompt": rollouts.prompt, "completion": rollouts.completion}
    columns |= {"advantage": rollouts.extra["advantage"]} if "advantage" in rollouts.extra else {}
    rows = pd.DataFrame(columns | {str(k): values for k, values in enumerate(rollouts.rewards.T)})
    # Sums of hashes, so that the order of the rows within a step does not matter.
    hashes = pd.util.hash_pandas_object(rows, index=False)
    keys = pd.MultiIndex.from_arrays([rollouts.run, rollouts.step], names=["run", "step"])
    tables = pd.DataFrame({"hash": hashes.to_numpy(), "size": 1}, index=keys).groupby(["run", "step"]).sum()
    is_repeat = (tables == tables.groupby("run").shift(fill_value=0)).all(axis=1)
    repeats = tables.index[is_repeat]
    if len(repeats):
        notes.append(
            f"{len(repeats)} logging steps repeat the table of the step before, since the same generation batch was "
            "trained on again; each batch counts once, at the first step that logged it."
        )
    return np.flatnonzero(~keys.isin(repeats))
