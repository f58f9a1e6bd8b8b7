"""What a run is held against: earlier snapshots, whose kept rows are keepers already, and benchmarks.

Each becomes one Parquet file under units/held/ of the store, named by its content: the columns that the rules need,
of its rows. Judging takes these files with the run's own rows (pipelines.judging.Case), and their names are part of
what decides the verdicts. A benchmark (images, prompts, or both; anything that can be an input) is measured for it by
the recipe's own stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.storage import Folder
from pipelines.judge import JudgedShard, gather_columns
from pipelines.measure import READER_COLUMNS, arrow_type, write_table
from pipelines.recipe import Recipe, RecipeError
from pipelines.snapshot import Snapshot, SnapshotError, open_snapshot
from stages.contamination import Contamination
from stages.contract import digest_of
from stages.rules import Rule


@dataclass(frozen=True)
class Held:
    """Files of rows to hold a run's rows against, and what each is called in reasons."""

    snapshots: tuple[str, ...] = ()
    snapshot_names: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()
    benchmark_names: tuple[str, ...] = ()

    def identity(self) -> list[list[str]]:
        return [list(self.snapshots), list(self.benchmarks)]

    def to_json(self) -> dict[str, list[str]]:
        return {name: list(value) for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Sequence[str]]) -> Held:
        return cls(**{name: tuple(items) for name, items in value.items()})


def split_addresses(addresses: Sequence[str]) -> tuple[list[Snapshot], list[str]]:
    """Those of `addresses` that are snapshots, opened, and the others."""
    snapshots, others = [], []
    for address in addresses:
        try:
            snapshots.append(open_snapshot(address))
        except SnapshotError:
            others.append(address)
    return snapshots, others


def with_contamination(recipe: Recipe, addresses: Sequence[str]) -> Recipe:
    """The recipe with a contamination rule before its first barrier, if benchmarks are given and it has none."""
    _, benchmarks = split_addresses(addresses)
    if not benchmarks or any(rule.takes_benchmarks for rule in recipe.rules.values()):
        return recipe
    rules = list(recipe.rules.items())
    place = next((at for at, (_, rule) in enumerate(rules) if rule.barrier), len(rules))
    rule = Contamination(images=_can_compare_images(recipe))
    return replace(recipe, rules=dict([*rules[:place], ("contamination", rule), *rules[place:]]))


def _can_compare_images(recipe: Recipe) -> bool:
    added = {f"{name}.{column.name}" for name, stage in recipe.stages.items() for column in stage.adds}
    return {need for need in Contamination().needs if "." in need} <= added


def needed_columns(rules: Mapping[str, Rule], takes: Callable[[Rule], bool]) -> list[str]:
    """The columns that rules of a kind need of held rows."""
    return sorted({need for rule in rules.values() if takes(rule) for need in rule.needs} | {"uid", "index"})


def hold_snapshot(snapshot: Snapshot, recipe: Recipe, store: Folder) -> str:
    """Write the kept rows of an earlier snapshot, as the recipe's duplicate rules want them; the file's path.

    Raises RecipeError where the snapshot was measured otherwise, or by nothing that these rules could use.
    """
    needs = needed_columns(recipe.rules, lambda rule: rule.takes_held)
    if not any(rule.takes_held for rule in recipe.rules.values()):
        raise RecipeError("--against needs a rule on duplicates; add rules: exact: {type: exact_duplicates}")
    wanted = recipe.resolved()["stages"]
    for stage in sorted({need.partition(".")[0] for need in needs if "." in need}):
        theirs = snapshot.manifest["recipe"]["stages"].get(stage)
        if _measuring(theirs) != _measuring(wanted[stage]):
            raise RecipeError(
                f"--against {snapshot.folder.url}: its stage {stage!r} is {theirs or 'not there'}, here it is "
                f"{wanted[stage]}; curate that snapshot again with this recipe's stages"
            )
    path = f"units/held/{digest_of('held', snapshot.id, needs)}.parquet"
    if not store.exists(path):
        features = {column["name"] for column in snapshot.manifest["columns"] if column["feature"]}
        small = [need for need in needs if need not in features]
        tables = []
        wide = snapshot.tables("features", [need for need in needs if need in features])
        for table in snapshot.tables("ledger", [*small, "verdict"]):
            if features & set(needs):
                # Both files of a run of shards have its rows in one order.
                for name, column in zip(*(lambda part: (part.column_names, part.columns))(next(wide)), strict=True):
                    table = table.append_column(name, column)
            tables.append(table.filter(pc.equal(table["verdict"], "kept")).select(needs))
        write_table(store, path, pa.concat_tables(tables))
    return path


def _measuring(stage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A stage's options without what only says which rows it looks at."""
    return None if stage is None else {name: value for name, value in stage.items() if name != "after"}


def benchmark_recipe(recipe: Recipe) -> Recipe:
    """What is to be measured of a benchmark: the stages that contamination rules ask for, and those before them."""
    wanted = {need.partition(".")[0] for need in _benchmark_needs(recipe) if "." in need}
    for name, stage in reversed(list(recipe.stages.items())):
        if name in wanted:
            wanted |= {need.partition(".")[0] for need in stage.needs if "." in need}
    # Rows are written by a pass over some stage: where captions alone are compared, the first will do.
    wanted = wanted or set(list(recipe.stages)[:1])
    stages = {name: replace(stage, after=()) for name, stage in recipe.stages.items() if name in wanted}
    return replace(recipe, stages=stages, rules={})


def _benchmark_needs(recipe: Recipe) -> list[str]:
    return needed_columns(recipe.rules, lambda rule: rule.takes_benchmarks)


def hold_benchmark(shards: Sequence[JudgedShard], recipe: Recipe, store: Folder) -> str:
    """Write the rows of a measured benchmark, as contamination rules want them; the file's path.

    A row without a picture (a prompt) has a hash that says nothing and no pixels.
    """
    needs = _benchmark_needs(recipe)
    units = [[shard.digest, sorted(shard.units.items())] for shard in shards]
    path = f"units/held/{digest_of('benchmark', units, needs)}.parquet"
    if not store.exists(path):
        rules = {name: rule for name, rule in recipe.rules.items() if rule.takes_benchmarks}
        stages = [name for name in benchmark_recipe(recipe).stages if shards and name in shards[0].units]
        columns, _, _ = gather_columns(store, shards, rules, stages)
        write_table(store, path, pa.table({name: _filled(columns[name], name, recipe) for name in needs}))
    return path


def _filled(column: pa.ChunkedArray, name: str, recipe: Recipe) -> pa.ChunkedArray:
    if name in READER_COLUMNS:
        return column
    stage, _, short = name.partition(".")
    kind = arrow_type(next(item.type for item in recipe.stages[stage].adds if item.name == short))
    empty = bytes(kind.byte_width) if pa.types.is_fixed_size_binary(kind) else 0
    return pc.fill_null(column, pa.scalar(empty, kind))


def benchmark_name(address: str) -> str:
    return PurePosixPath(address.rstrip("/")).name[:60]
