"""Barriers by parts: rows that may decide about each other are brought together, and each part is judged for itself.

A barrier that is not separable, or whose rows fit into one part, sees all rows at once: then only `solve` runs. Else

    guide     what must be known of all rows before any can be sent to its part (below)
    route     each piece's rows, sorted by part
    solve     each part's rows, from all pieces: the rule's own `judge_part`, and its answers sorted by piece

For near-duplicates the guide is which rows are linked, found by a join over columns of 8 to 200 bytes a row:

    home      each piece's distinct (hash, thumbnail), sorted by home: a part chosen by hash of the hash
    search    one block table over all hashes (stages.hamming): pairs within the radius, sorted by the first one's home
    join      the first one's thumbnails laid beside each pair, sorted by the second one's home
    confirm   the second look: what is left are links between (hash, thumbnail)s
    components  linked ones get one label, which picks the part

For semantic duplicates it is the centroids, fitted to a sample that depends on the rows alone (sample, fit).

Every task reads files and writes files, named by what went into them, whole or not at all; it may run twice or die and
run again. One task holds a part (PART_ROWS rows), or the share of a block table that it sorts (SEARCH_ROWS hashes), or,
for `components`, 16 bytes a confirmed link; nothing of it passes through the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.storage import Folder
from pipelines.judge import Answer, table_of, to_numpy
from stages.dedupe import HELD, NearDuplicates, mixed, nodes_of
from stages.hamming import Tables, choose_tables, cross_groups, spread, table_pairs, unspread
from stages.rules import OCCURRENCE, Guide, Rule
from stages.semantic import SemanticDuplicates

PART_ROWS = 1_000_000
SEARCH_ROWS = 1 << 25  # hashes of one table that a search task sorts at once: 512 MB with what is made of them

# An id of a row that holds in every file of a run: its piece above, its position in the piece below.
PIECE_SHIFT = 32

Runner = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
Finder = Callable[..., dict[str, Any]]


# --- the driver's side -----------------------------------------------------------------------------------------------


def run_barrier(rule: Rule, position: int, base: str, rows: Sequence[int], pieces: int, run: Runner) -> dict[str, Any]:
    """Have the barrier at `position` judged; its rows lie in `base`/alive-N.arrow, `rows` many in each file.

    pieces: how many of the files hold rows to be judged; the rest are held already. Returns the answers' paths and the
    barrier's cut.
    """
    total = sum(rows)
    parts = max(1, -(-total // PART_ROWS)) if rule.separable else 1
    common = {"position": position, "base": base, "files": len(rows), "pieces": pieces, "parts": parts}
    sources = f"{base}/alive"
    if parts > 1:
        if rule.guide == "neighbours":
            assert isinstance(rule, NearDuplicates)
            _find_neighbours(rule, total, common, run)
        elif rule.guide == "clusters":
            run([_task("sample", common, number, total=total) for number in range(len(rows))])
            run([_task("fit", common, 0, total=total)])
        run([_task("route", common, number) for number in range(len(rows))])
        sources = f"{base}/routed"
    results = run([_task("solve", common, part, sources=sources) for part in range(parts)])
    return {"paths": [f"{base}/answers-{part:06d}.arrow" for part in range(parts)], "cut": results[0]["cut"]}


def _find_neighbours(rule: NearDuplicates, total: int, common: dict[str, Any], run: Runner) -> None:
    run([_task("home", common, number) for number in range(common["files"])])
    searches = 0
    if rule.radius:
        tables = choose_tables(total, rule.radius)
        shares = 1 << max(0, (total - 1) // SEARCH_ROWS).bit_length()
        searches = tables.count * shares
        run(
            [
                _task("search", common, number, tables=asdict(tables), table=number // shares, shares=shares)
                for number in range(searches)
            ]
        )
    run([_task("join", common, home, searches=searches) for home in range(common["parts"])])
    run([_task("confirm", common, home) for home in range(common["parts"])])
    run([_task("components", common, 0)])


def _task(do: str, common: dict[str, Any], number: int, **more: Any) -> dict[str, Any]:
    return {"do": do, "number": number, "done": f"{common['base']}/{do}-{number:06d}.json", **common, **more}


# --- the workers' side -----------------------------------------------------------------------------------------------


def alive_table(
    columns: dict[str, pa.ChunkedArray], needs: Sequence[str], alive: np.ndarray, held: bool | None
) -> pa.Table:
    """What a barrier is given of a piece: the columns it needs, occurrence and position of its rows still alive.

    held: what to say in the column HELD; None leaves the column out.
    """
    rows = np.flatnonzero(alive)
    taken = {name: columns[name].take(pa.array(rows)) for name in sorted({*needs, *OCCURRENCE})}
    marks = {} if held is None else {HELD: pa.array(np.full(len(rows), held))}
    return pa.table({**taken, "row": pa.array(rows), **marks})


def route(store: Folder, rule: Rule, task: dict[str, Any]) -> dict[str, Any]:
    table = read_batch(store, _path(task, "alive"), 0)
    parts = rule.part_of(_columns(table, rule), task["parts"], _guide(store, rule, task))
    _write_sorted(store, _path(task, "routed"), table, parts, task["parts"])
    return {}


def solve(store: Folder, rule: Rule, task: dict[str, Any]) -> dict[str, Any]:
    """Judge one part and write its answers, a batch a piece."""
    batch = task["number"] if task["parts"] > 1 else 0
    tables = [read_batch(store, f"{task['sources']}-{file:06d}.arrow", batch) for file in range(task["files"])]
    pieces = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    # Files may differ in how they spell a type that is empty or left open; the first one's spelling holds.
    whole = pa.concat_tables(tables, promote_options="permissive")
    answer, cut = Answer.none(), None
    if whole.num_rows:
        rows = whole["row"].to_numpy()
        columns = _columns(whole, rule)
        guided = task["parts"] > 1
        found = rule.judge_part(columns, _guide(store, rule, task)) if guided else rule.judge(columns)
        answer = Answer.of(found, np.arange(len(rows)), (pieces << PIECE_SHIFT) | rows, columns["uid"])
        cut = found.cut
        own = pieces[answer.row]
        answer.row = rows[answer.row]
        table = answer.to_table()
    else:
        own, table = np.zeros(0, np.int64), answer.to_table()
    _write_sorted(store, _path(task, "answers"), table, own, task["pieces"])
    return {"cut": cut}


def answer_for(store: Folder, paths: Sequence[str], piece: int) -> Answer:
    """What all parts of a barrier said about one piece's rows."""
    return Answer.from_table(pa.concat_tables(read_batch(store, path, piece) for path in paths))


def home(store: Folder, rule: NearDuplicates, task: dict[str, Any]) -> dict[str, Any]:
    columns = _columns(read_batch(store, _path(task, "alive"), 0), rule)
    hashes, looks = columns[rule.hash].astype(np.uint64), rule.looks(columns)
    _, first = np.unique(nodes_of(hashes, looks), return_index=True)
    table = pa.table({"hash": hashes[first], "look": _binary(looks[first])})
    _write_sorted(store, _path(task, "home"), table, _homes(hashes[first], task), task["parts"])
    return {}


def search(store: Folder, rule: NearDuplicates, task: dict[str, Any]) -> dict[str, Any]:
    found = [(np.empty(0, np.uint64),) * 2]
    chunks = (spread(chunk) for chunk in _all_hashes(store, task))
    share = task["number"] % task["shares"]
    for left, right in table_pairs(chunks, Tables(**task["tables"]), task["table"], share, task["shares"]):
        found.append((unspread(left), unspread(right)))
    one, other = (np.concatenate(column) for column in zip(*found, strict=True))
    table = pa.table({"one": one, "other": other})
    _write_sorted(store, _path(task, "search"), table, _homes(one, task), task["parts"])
    return {"pairs": len(one)}


def join(store: Folder, rule: NearDuplicates, task: dict[str, Any]) -> dict[str, Any]:
    groups = _HomeRows(store, rule, task)
    tables = [groups.empty_links()]
    for number in range(task["searches"]):
        pairs = read_batch(store, f"{task['base']}/search-{number:06d}.arrow", task["number"])
        one, other = pairs["one"].to_numpy(), pairs["other"].to_numpy()
        for row, pair in groups.rows_with(one):
            tables.append(pa.table({"hash": one[pair], "look": _binary(groups.looks[row]), "other": other[pair]}))
    table = pa.concat_tables(tables)
    _write_sorted(store, _path(task, "join"), table, _homes(table["other"].to_numpy(), task), task["parts"])
    return {}


def confirm(store: Folder, rule: NearDuplicates, task: dict[str, Any]) -> dict[str, Any]:
    groups = _HomeRows(store, rule, task)
    found = [np.empty((0, 2), np.uint64)]

    def look(left_hash: np.ndarray, left: np.ndarray, right_hash: np.ndarray, right: np.ndarray) -> None:
        # Which of the two comes first is not known yet, and the second look is not quite symmetric: either will do.
        same = rule.looks_same(left, right) | rule.looks_same(right, left)
        links = nodes_of(left_hash[same], left[same]), nodes_of(right_hash[same], right[same])
        found.append(np.stack(links, axis=1))

    for one, other in groups.equal_pairs():
        look(groups.hashes[one], groups.looks[one], groups.hashes[other], groups.looks[other])
    for number in range(task["parts"]):
        links = read_batch(store, f"{task['base']}/join-{number:06d}.arrow", task["number"])
        hashes, looks = links["hash"].to_numpy(), _looks(rule, links["look"])
        for row, link in groups.rows_with(links["other"].to_numpy()):
            look(hashes[link], looks[link], groups.hashes[row], groups.looks[row])
    _write_array(store, f"{task['base']}/links-{task['number']:06d}.npy", np.concatenate(found))
    return {}


def components(store: Folder, rule: NearDuplicates, task: dict[str, Any]) -> dict[str, Any]:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    links = np.concatenate([_read_array(store, f"{task['base']}/links-{n:06d}.npy") for n in range(task["parts"])])
    nodes, ends = np.unique(links, return_inverse=True)
    ends = ends.reshape(-1, 2)
    graph = coo_matrix((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes)))
    _, label = connected_components(graph, directed=False) if len(nodes) else (0, np.empty(0, np.int64))
    # A component is known by its least node: nodes are sorted, so by its first.
    _, first = np.unique(label, return_index=True)
    _write_guide(store, task, {"nodes": nodes, "labels": nodes[first][label]})
    return {"linked": len(nodes)}


def sample(store: Folder, rule: SemanticDuplicates, task: dict[str, Any]) -> dict[str, Any]:
    table = read_batch(store, _path(task, "alive"), 0)
    chosen = rule.sample(_columns(table, rule), task["total"])
    _write_sorted(store, _path(task, "sample"), table.take(chosen), np.zeros(len(chosen), np.int64), 1)
    return {}


def fit(store: Folder, rule: SemanticDuplicates, task: dict[str, Any]) -> dict[str, Any]:
    tables = [read_batch(store, f"{task['base']}/sample-{file:06d}.arrow", 0) for file in range(task["files"])]
    columns = _columns(pa.concat_tables(tables, promote_options="permissive"), rule)
    _write_guide(store, task, rule.fit(columns, task["total"]))
    return {}


TASKS: dict[str, Finder] = {
    function.__name__: function for function in (route, solve, home, search, join, confirm, components, sample, fit)
}


class _HomeRows:
    """The distinct (hash, thumbnail)s at one home, found by hash."""

    def __init__(self, store: Folder, rule: NearDuplicates, task: dict[str, Any]) -> None:
        paths = [f"{task['base']}/home-{file:06d}.arrow" for file in range(task["files"])]
        tables = [read_batch(store, path, task["number"]) for path in paths]
        table = pa.concat_tables(tables)
        hashes, looks = table["hash"].to_numpy(), _looks(rule, table["look"])
        _, first = np.unique(nodes_of(hashes, looks), return_index=True)
        order = first[np.argsort(hashes[first], kind="stable")]
        self.hashes, self.looks = hashes[order], looks[order]
        self.values, self.starts, self.lengths = np.unique(self.hashes, return_index=True, return_counts=True)

    def empty_links(self) -> pa.Table:
        none = np.empty(0, np.uint64)
        return pa.table({"hash": none, "look": _binary(self.looks[:0]), "other": none})

    def rows_with(self, hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row here, place in `hashes`) of every row with one of those hashes, in bounded pieces."""
        order = np.arange(max(len(self.hashes), len(hashes)))
        group = np.searchsorted(self.values, hashes)
        # Groups of one stand for the places; both kinds of groups then lie in one list.
        starts = np.concatenate([self.starts, np.arange(len(hashes))])
        lengths = np.concatenate([self.lengths, np.ones(len(hashes), np.int64)])
        yield from cross_groups(order, starts, lengths, group, len(self.starts) + np.arange(len(hashes)))

    def equal_pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of rows with one hash and different thumbnails."""
        several = np.flatnonzero(self.lengths > 1)
        order = np.arange(len(self.hashes))
        for one, other in cross_groups(order, self.starts, self.lengths, several, several):
            yield one[one < other], other[one < other]


def _homes(hashes: np.ndarray, task: dict[str, Any]) -> np.ndarray:
    return (mixed(hashes) % np.uint64(task["parts"])).astype(np.int64)


def _all_hashes(store: Folder, task: dict[str, Any]) -> Iterator[np.ndarray]:
    for file in range(task["files"]):
        for number in range(task["parts"]):
            yield read_batch(store, f"{task['base']}/home-{file:06d}.arrow", number, ["hash"])["hash"].to_numpy()


def _columns(table: pa.Table, rule: Rule) -> dict[str, np.ndarray]:
    held = (HELD,) if HELD in table.column_names else ()
    return table_of({name: table[name] for name in table.column_names}, (*rule.needs, *held))


# --- files -----------------------------------------------------------------------------------------------------------


def _path(task: dict[str, Any], kind: str) -> str:
    return f"{task['base']}/{kind}-{task['number']:06d}.arrow"


def _binary(looks: np.ndarray) -> pa.Array:
    """(N, C) bytes as a column, C bytes a row; one empty byte where C is 0."""
    width = looks.shape[1]
    if not width:
        looks, width = np.zeros((len(looks), 1), np.uint8), 1
    data = pa.py_buffer(np.ascontiguousarray(looks))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(looks), [None, data])


def _looks(rule: NearDuplicates, column: pa.ChunkedArray) -> np.ndarray:
    """(N, C) uint8 thumbnails of a column that `_binary` made."""
    looks = to_numpy(column)
    return looks if rule.second_look is not None else looks[:, :0]


def _write_sorted(store: Folder, path: str, table: pa.Table, group: np.ndarray, groups: int) -> None:
    """Write rows as `groups` record batches, each with the rows of its group in their order."""
    order = np.argsort(group, kind="stable")
    table = table.take(order)
    ends = np.searchsorted(group[order], np.arange(groups), side="right")
    write_batches(
        store, path, table.schema, (table.slice(a, b - a) for a, b in zip((0, *ends[:-1]), ends, strict=True))
    )


def write_batches(store: Folder, path: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """One Arrow file with one record batch a table, so that a reader can take any one of them alone."""

    def fill(stream: Any) -> None:
        with pa.ipc.new_file(stream, schema) as writer:
            for table in tables:
                columns = [_one_chunk(table[name]) for name in schema.names]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))

    store.write_with(path, fill)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def read_batch(store: Folder, path: str, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """One record batch of an Arrow file as a table; of it only `columns` are read, where they are given."""
    with store.open(path) as stream:
        reader = pa.ipc.open_file(stream)
        if columns is not None:
            fields = [reader.schema.get_field_index(name) for name in columns]
            reader = pa.ipc.open_file(stream, options=pa.ipc.IpcReadOptions(included_fields=fields))
        return pa.Table.from_batches([reader.get_batch(number)])


def _guide(store: Folder, rule: Rule, task: dict[str, Any]) -> Guide:
    if not rule.guide:
        return {}
    with store.open(f"{task['base']}/guide.npz") as stream, np.load(stream, allow_pickle=False) as arrays:
        return dict(arrays)


def _write_guide(store: Folder, task: dict[str, Any], guide: Guide) -> None:
    store.write_with(f"{task['base']}/guide.npz", lambda stream: np.savez(stream, **guide))  # type: ignore[arg-type]


def _write_array(store: Folder, path: str, array: np.ndarray) -> None:
    store.write_with(path, lambda stream: np.save(stream, array))


def _read_array(store: Folder, path: str) -> np.ndarray:
    with store.open(path) as stream:
        return np.load(stream, allow_pickle=False)
