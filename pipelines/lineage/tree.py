"""Draw a part of the lineage graph as a tree, for a terminal, a plain file or a page.

The graph is no tree: what hangs below two branches is drawn once and then only named. Long lists of one kind (the raw
shards of a curation, the checkpoints of a training) are cut to a few and the number of the rest; `--json` has all.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.tree import Tree

    from pipelines.lineage.questions import ArtifactInfo, Lineage, RunInfo

SHOWN_OF_A_KIND = 6
DIGEST_DIGITS = 12


@dataclass
class Node:
    """One line of the tree. head: what it is; detail: the rest of the line; role: "artifact", "run" or "note"."""

    role: str
    head: str
    detail: str = ""
    children: list[Node] = field(default_factory=list)

    @property
    def text(self) -> str:
        return f"{self.head}  {self.detail}" if self.detail else self.head


def printable(text: Any) -> str:
    """One line that is safe on a terminal: control and direction characters are shown as escapes, not obeyed."""
    return "".join(
        character if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else _escape(character)
        for character in str(text)
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def build(lineage: Lineage, everything: bool = False) -> Node:
    """The tree of a lineage, from its start. everything: do not cut long runs of one kind."""
    return _Builder(lineage, everything).root()


class _Builder:
    def __init__(self, lineage: Lineage, everything: bool) -> None:
        self.lineage = lineage
        self.limit = 10**9 if everything else SHOWN_OF_A_KIND
        self.drawn: set[Any] = set()
        enter, leave = ("output", "input") if lineage.direction == "trace" else ("input", "output")
        self.runs_of: dict[int, list[str]] = defaultdict(list)
        self.artifacts_of: dict[str, list[int]] = defaultdict(list)
        for edge in lineage.edges:
            if edge.role == enter:
                self.runs_of[edge.artifact_id].append(edge.run_id)
            if edge.role == leave:
                self.artifacts_of[edge.run_id].append(edge.artifact_id)
        self.unknown = {one.id for one in lineage.unknown_origin()}

    def root(self) -> Node:
        from pipelines.lineage.questions import RunInfo

        # A graph may be thousands of runs deep; an explicit stack where recursion would give up.
        start = self.lineage.start
        root, pending = self._run(start) if isinstance(start, RunInfo) else self._artifact(start)
        stack: list[tuple[Node, Iterator[Any]]] = [(root, iter(pending))]
        while stack:
            node, rest = stack[-1]
            following = next(rest, None)
            if following is None:
                stack.pop()
                continue
            if isinstance(following, Node):
                node.children.append(following)
                continue
            child, below = self._run(following) if isinstance(following, RunInfo) else self._artifact(following)
            node.children.append(child)
            stack.append((child, iter(below)))
        return root

    def _artifact(self, one: ArtifactInfo) -> tuple[Node, list[Any]]:
        node = Node("artifact", artifact_head(one), artifact_detail(one))
        below = [self.lineage.runs[run] for run in self.runs_of[one.id]]
        if one.id in self.drawn and below:
            node.detail = "(shown above)"
            return node, []
        self.drawn.add(one.id)
        if one.id in self.unknown:
            node.detail = f"{node.detail}  origin unknown".strip()
        return node, below

    def _run(self, run: RunInfo) -> tuple[Node, list[Any]]:
        node = Node("run", f"{run.kind} run {printable(run.name)}".rstrip(), run_detail(run))
        if run.id in self.drawn:
            node.detail = "(shown above)"
            return node, []
        self.drawn.add(run.id)
        groups: dict[str, list[ArtifactInfo]] = defaultdict(list)
        for number in self.artifacts_of[run.id]:
            one = self.lineage.artifacts[number]
            groups[one.kind].append(one)
        below: list[Any] = []
        # What is deeper comes first: a teacher's own branch is drawn in full before anything refers to it.
        for kind in sorted(groups, key=lambda kind: (kind == "raw_shard", kind == "weights")):
            many = groups[kind]
            # Of checkpoints the last ones matter, and of everything else the first.
            shown = many[-self.limit :] if kind == "checkpoint" else many[: self.limit]
            below += shown
            if len(shown) < len(many):
                word = kind.replace("_", " ")
                below.append(Node("note", f"and {len(many) - len(shown)} more of {len(many)} {word}s"))
        return node, below


def artifact_head(one: ArtifactInfo) -> str:
    return f"{one.kind.replace('_', ' ')} {printable(one.name)}".rstrip()


def artifact_detail(one: ArtifactInfo) -> str:
    parts = [printable(one.digest[:DIGEST_DIGITS])]
    facts = facts_text(one.facts)
    if facts:
        parts.append(facts)
    if one.address:
        parts.append(printable(one.address))
    return "  ".join(parts)


def run_detail(run: RunInfo) -> str:
    parts = [run.status, f"{run.started.astimezone():%Y-%m-%d %H:%M}"]
    if run.finished:
        parts.append(duration((run.finished - run.started).total_seconds()))
    if run.attempts > 1:
        parts.append(f"{run.attempts} attempts")
    parts.append(f"id {printable(run.id[:DIGEST_DIGITS])}")
    return "  ".join(parts)


def facts_text(facts: Mapping[str, Any], most: int = 4) -> str:
    """The first few plain facts, as "160 rows, 4 steps"."""
    plain = [(name, value) for name, value in facts.items() if isinstance(value, str | int | float)]
    words = [
        f"{value:,} {name.replace('_', ' ')}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in plain[:most]
    ]
    return printable(", ".join(words))


def duration(seconds: float) -> str:
    """Seconds as people say them: "0.4 s", "12 min", "3 h 20 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def lines(root: Node, ascii_only: bool = False) -> Iterator[str]:
    """The tree as plain lines."""
    tee, corner, bar = ("|- ", "`- ", "|  ") if ascii_only else ("├─ ", "└─ ", "│  ")
    stack: list[tuple[Node, str, str]] = [(root, "", "")]
    while stack:
        node, lead, indent = stack.pop()
        yield lead + node.text
        last = len(node.children) - 1
        for place in range(last, -1, -1):
            mark, below = (corner, "   ") if place == last else (tee, bar)
            stack.append((node.children[place], indent + mark, indent + below))


def rich_tree(root: Node) -> Tree:
    """The tree for a terminal. Texts are plain: markup in a name stays text."""
    from rich.text import Text
    from rich.tree import Tree

    styles = {"artifact": "bold", "run": "cyan", "note": "dim"}

    def label(node: Node) -> Text:
        text = Text(node.head, style=styles[node.role])
        if node.detail:
            text.append("  " + node.detail, style="dim not bold")
        return text

    top = Tree(label(root), guide_style="dim")
    stack: list[tuple[Tree, Sequence[Node]]] = [(top, root.children)]
    while stack:
        branch, children = stack.pop()
        for child in children:
            below = branch.add(label(child))
            stack.append((below, child.children))
    return top


def when(moment: datetime | None) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S}" if moment else "-"
