"""A study with people: one page for each rater, sides at random, known answers planted; and reading what comes back.

    write_study("evaluation-folder", "study", raters=3)      # study/rater-1.html ... and key.json, which stays here
    table, notes = judged("answers.jsonl", models, seed=0)   # Elo of the raters who look

Every pair of models on every prompt is shown to three raters, each with sides and order drawn anew. One pair in eight
is planted: a drawing beside noise, where there is a right answer. Each pair also asks for marks from 1 to 5, for either
side: quality, and how well it shows the prompt. The page is one file that fetches nothing; it hands its answers over
as a file of JSON lines that name drawings by position only, so a rater cannot tell who drew what.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.storage import Folder
from stages.contract import digest_of
from training.evaluation import work
from training.evaluation.judgements import Pair, Standing, audit_judges, bradley_terry, krippendorff, without_faulty
from training.evaluation.statistics import mean

RATERS = 3
PLANTED_EVERY = 8
ASPECTS = ("quality", "prompt")
NOISE = "noise"


class StudyError(ValueError):
    """Answers that cannot be read; the message names the file and line."""


def write_study(evaluation: str, output: str | Path, *, raters: int = RATERS, seed: int = 0) -> list[Path]:
    """Pages for `raters` raters over the drawings that an evaluation shows, and key.json beside them."""
    import jinja2

    store = Folder(evaluation)
    result = store.read_json("evaluation.json")
    names = [model["name"] for model in result["models"]]
    if len(names) < 2:
        raise StudyError(f"{store.url}: a study compares two models or more; this evaluation has {len(names)}")
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(store, result["samples"])
    questions = _questions(result["samples"], names, seed)
    environment = jinja2.Environment(
        autoescape=True, loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    )
    study, pages, key = digest_of("study", result["id"], questions, seed), [], {}
    for rater in range(1, raters + 1):
        rng = np.random.default_rng([seed, 53, rater])
        shown: list[dict[str, Any]] = []
        for place in rng.permutation(len(questions)).tolist():
            asked = questions[place]
            sides = [asked["first"], asked["second"]] if rng.random() < 0.5 else [asked["second"], asked["first"]]
            number = f"{rater}-{len(shown) + 1}"
            key[number] = {"left": sides[0], "right": sides[1], "group": asked["group"], "known": asked["known"]}
            images = [pictures.get((asked["sample"], side)) or _noise(rng) for side in sides]
            shown.append({"number": number, "prompt": asked["prompt"], "left": images[0], "right": images[1]})
        page = environment.get_template("study.html.j2").render(
            study=study, rater=rater, questions=shown, aspects=ASPECTS, marks=range(1, 6)
        )
        pages.append(target / f"rater-{rater}.html")
        pages[-1].write_text(page, encoding="utf-8")
    (target / "key.json").write_text(json.dumps({"schema_version": "1.0", "study": study, "models": names, "key": key}))
    return pages


def _questions(samples: Sequence[Mapping[str, Any]], names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Every pair of models on every sample, and planted ones: a drawing against noise."""
    rng = np.random.default_rng([seed, 59])
    found: list[dict[str, Any]] = []
    for place, sample in enumerate(samples):
        for first, second in itertools.combinations(names, 2):
            shared = {"sample": place, "prompt": sample["prompt"], "group": place}
            found.append({**shared, "first": first, "second": second, "known": None})
            if len(found) % PLANTED_EVERY == PLANTED_EVERY - 1:
                right = names[int(rng.integers(len(names)))]
                found.append({**shared, "first": right, "second": NOISE, "known": right})
    return found


def _pictures(store: Folder, samples: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], str]:
    units: dict[str, list[bytes]] = {}
    found = {}
    for place, sample in enumerate(samples):
        for model, drawn in sample["drawn"].items():
            unit = drawn["unit"]
            if unit not in units:
                units[unit] = work.read_drawings(store, work.drawings_path(unit))
            found[place, model] = _uri(units[unit][drawn["row"]])
    return found


def _noise(rng: np.random.Generator) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, "PNG")
    return _uri(stream.getvalue())


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


# --- answers ----------------------------------------------------------------------------------------------------------


def read_answers(path: Path) -> tuple[list[Pair], list[dict[str, Any]]]:
    """Pairs and marks from a file of answers (JSON lines), by the key.json beside it or answers that name models.

    A line is {"judge", "number", "winner": "left"|"right"|"draw", "marks": {"left": {"quality": 4, ...}, ...}} or, from
    other tools and models as judges, {"judge", "left", "right", "group", "winner": a model or null}. Raises StudyError.
    """
    beside = path.parent / "key.json"
    key = json.loads(beside.read_text(encoding="utf-8"))["key"] if beside.is_file() else {}
    pairs, marks = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
            if "number" in said:
                asked = key[said["number"]]
                winner = {"left": asked["left"], "right": asked["right"], "draw": None}[said["winner"]]
            else:
                asked, winner = said, said["winner"]
            left, right = str(asked["left"]), str(asked["right"])
            if winner is not None and winner not in (left, right):
                raise ValueError(f"winner {winner!r} is neither side")
            judge = str(said["judge"])
            pairs.append(Pair(left, right, asked["group"], winner, judge, asked.get("known")))
            for side in ("left", "right"):
                for aspect, mark in (said.get("marks", {}).get(side) or {}).items():
                    if aspect not in ASPECTS or mark not in (1, 2, 3, 4, 5):
                        raise ValueError(f"mark {aspect}={mark!r} is not {' or '.join(ASPECTS)} from 1 to 5")
                    who = {"judge": judge, "model": str(asked[side]), "group": asked["group"]}
                    marks.append({**who, "aspect": aspect, "mark": mark})
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as problem:
            raise StudyError(f"{path}, line {number}: not an answer ({type(problem).__name__}: {problem})") from None
    if not pairs:
        raise StudyError(f"{path}: there is no answer in it")
    return pairs, marks


def judged(path: Path, models: Sequence[str], seed: int) -> tuple[list[Standing], str]:
    """Elo of `models` by the raters who look, and in words how far those agree and who was left out."""
    pairs, marks = read_answers(path)
    audits = audit_judges(pairs)
    kept = [pair for pair in without_faulty(pairs, audits) if {pair.left, pair.right} <= set(models)]
    if not kept:
        raise StudyError(f"{path}: no pair about {', '.join(models)} is left once raters who do not look are out")
    notes = [f"{len(kept):,} pairs of {len({pair.judge for pair in kept})} raters", _agreement(kept)]
    notes += [f"{audit.judge} left out: {'; '.join(audit.faults)}" for audit in audits if audit.faults]
    faulty = {audit.judge for audit in audits if audit.faults}
    for aspect in ASPECTS:
        of = [one for one in marks if one["aspect"] == aspect and one["judge"] not in faulty and one["model"] in models]
        said = []
        for model in models:
            mine = [one for one in of if one["model"] == model]
            if mine:
                middle = mean([one["mark"] for one in mine], [one["group"] for one in mine])
                ends = "" if middle.low is None else f" ({middle.low:.2f} to {middle.high:.2f})"
                said.append(f"{model} {middle.value:.2f}{ends}")
        if said:
            notes.append(f"{aspect}, 1 to 5: {', '.join(said)}; alpha {_marks_alpha(of):.2f}")
    return bradley_terry(kept, seed=seed), "; ".join(notes)


def _agreement(pairs: Sequence[Pair]) -> str:
    judges = sorted({pair.judge for pair in pairs})
    questions = {(pair.group, *sorted((pair.left, pair.right))): 0 for pair in pairs}
    table: dict[str, dict[Any, Any]] = defaultdict(dict)
    for pair in pairs:
        table[pair.judge][(pair.group, *sorted((pair.left, pair.right)))] = pair.winner or "draw"
    return f"Krippendorff's alpha {krippendorff([[table[j].get(q) for q in questions] for j in judges]):.2f}"


def _marks_alpha(marks: Sequence[Mapping[str, Any]]) -> float:
    """Ordinal alpha over drawings; a drawing that a rater marked several times has his middle mark."""
    given: dict[str, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    for one in marks:
        given[one["judge"]][one["model"], one["group"]].append(one["mark"])
    things = sorted({thing for mine in given.values() for thing in mine}, key=str)
    rows = [[int(np.median(mine[t])) if t in mine else None for t in things] for mine in given.values()]
    return krippendorff(rows, "ordinal")
