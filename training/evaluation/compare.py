"""From what stages said of every drawing to figures: each with its interval, its protocol and how the models differ.

A metric is one JSON object:

    {"name": "right", "title": "Prompts drawn right", "better": "higher", "unit": "share", "protocol": "...",
     "judge": {"name": "...", "independent": {"student": true, ...}, "why": "..."} or null,
     "values": {"student": {"value": 0.71, "low": 0.64, "high": 0.77, "samples": 200, "method": "...", ...}, ...},
     "differences": [{"first": "student", "second": "teacher", "value": 0.05, "low": -0.01, "high": 0.11, ...}]}

Differences are of the same prompts and seeds, so they are told apart far sooner than two intervals would.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.evaluation import metrics
from training.evaluation.composition import ASPECTS
from training.evaluation.judgements import Standing, bradley_terry, pairs_by_score
from training.evaluation.statistics import Estimate, mean, paired_difference, rate
from training.evaluation.suites import categories, category_of
from training.evaluation.work import Drawing

FEWEST_DISTANCES = 50  # pictures below which distances between sets say nothing


@dataclass
class Seen:
    """What stages said of one set of pictures: column "look.name" -> a value a row, None where there is none."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)

    def of(self, column: str, places: Sequence[int]) -> list[Any]:
        values = self.columns.get(column)
        return [None] * len(places) if values is None else [values[place] for place in places]


@dataclass(frozen=True)
class Judge:
    """Who said it: a stage's name and weights, and for each model whether it had a hand in it."""

    name: str
    digest: str
    independent: Mapping[str, bool]
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "digest": self.digest, "independent": dict(self.independent), "why": self.why}


@dataclass
class Comparison:
    """Metrics of all models over the same drawings; what could not be measured, with the reason."""

    drawings: Sequence[Drawing]
    seen: Mapping[str, Seen]  # by model
    metrics: list[dict[str, Any]] = field(default_factory=list)
    not_measured: list[dict[str, str]] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        return list(self.seen)

    def places(self, *purposes: str) -> list[int]:
        return [place for place, one in enumerate(self.drawings) if one.purpose in purposes]

    def miss(self, what: str, why: str) -> None:
        self.not_measured.append({"what": what, "why": why})

    def add(self, name: str, title: str, better: str, unit: str, protocol: str, values: Mapping[str, Any],
            judge: Judge | None = None, differences: Sequence[Mapping[str, Any]] = ()) -> None:  # fmt: skip
        self.metrics.append(
            {
                "name": name,
                "title": title,
                "better": better,
                "unit": unit,
                "protocol": protocol,
                "judge": judge.to_json() if judge else None,
                "values": {model: one.to_json() for model, one in values.items()},
                "differences": list(differences),
            }
        )

    def average(
        self, name: str, title: str, column: str, places: Sequence[int], protocol: str, *, unit: str = "",
        better: str = "higher", judge: Judge | None = None, scale: float = 1.0,
    ) -> bool:  # fmt: skip
        """Add the mean (a rate, for booleans) of a column over the drawings that every model has a value for."""
        by_model = {model: seen.of(column, places) for model, seen in self.seen.items()}
        shared = [n for n in range(len(places)) if all(values[n] is not None for values in by_model.values())]
        if not shared:
            return False
        groups = [self.drawings[places[n]].prompt.text for n in shared]
        share = isinstance(next(iter(by_model.values()))[shared[0]], bool)
        estimate: Callable[..., Estimate] = rate if share else mean
        numbers = {model: [values[n] * (1 if share else scale) for n in shared] for model, values in by_model.items()}
        found = {model: estimate(values, groups) for model, values in numbers.items()}
        differences = [
            {"first": a, "second": b, **paired_difference(numbers[a], numbers[b], groups).to_json()}
            for a, b in itertools.combinations(self.models, 2)
        ]
        missing = len(places) - len(shared)
        said = protocol + (f"; {missing:,} drawings without a value left out for all models" if missing else "")
        self.add(name, title, better, unit, said, found, judge, differences)
        return True

    # --- prompts drawn right ------------------------------------------------------------------------------------------

    def composition(self, look: str, judge: Judge) -> dict[str, Any]:
        """Rates of prompts drawn right, by aspect and by category; returns the table of categories."""
        places = [place for place in self.places("suite") if self.drawings[place].prompt.checkable]
        protocol = f"checked by {judge.name}: objects, counts, colours and positions, as GenEval decides"
        if not self.average(
            "right", "Prompts drawn right", f"{look}.right", places, protocol, unit="share", judge=judge
        ):
            self.miss("prompts drawn right", "no prompt of these suites can be checked by the detector at hand")
            return {}
        for aspect in ASPECTS:
            self.average(
                aspect, f"  {aspect.capitalize()} right", f"{look}.{aspect}", places,
                f"of prompts that ask for a {aspect}", unit="share", judge=judge,
            )  # fmt: skip
        prompts = [self.drawings[place].prompt for place in places]
        several = len({prompt.suite for prompt in prompts}) > 1
        table: dict[str, Any] = {}
        for category in categories(prompts):
            mine = [place for place in places if category_of(self.drawings[place].prompt, several) == category]
            table[category] = {}
            for model, seen in self.seen.items():
                flags, reasons = seen.of(f"{look}.right", mine), seen.of(f"{look}.reasons", mine)
                known = [n for n, flag in enumerate(flags) if flag is not None]
                if known:
                    groups = [self.drawings[mine[n]].prompt.text for n in known]
                    wrong = [reasons[n] for n in known if reasons[n]]
                    common = sorted(set(wrong), key=lambda text: (-wrong.count(text), text))[:3]
                    estimate = rate([flags[n] for n in known], groups).to_json()
                    table[category][model] = {**estimate, "failures": [[text, wrong.count(text)] for text in common]}
        return {category: by_model for category, by_model in table.items() if by_model}

    # --- distances to real pictures -----------------------------------------------------------------------------------

    def distances(self, space: str, column: str, real: Sequence[Any], of_real: str, small_sample: bool) -> None:
        """FID, KID, precision, recall and diversity in one feature space."""
        places = self.places("distances")
        reference = np.asarray([row for row in real if row is not None], np.float64)
        drawn = {
            model: np.asarray([row for row in seen.of(column, places) if row is not None], np.float64)
            for model, seen in self.seen.items()
        }
        fewest = min([len(reference), *(len(rows) for rows in drawn.values())], default=0)
        if fewest < FEWEST_DISTANCES:
            why = f"{fewest} pictures on one side: at least {FEWEST_DISTANCES} are needed; pass --pictures N"
            self.miss(f"FID, KID, precision, recall and diversity ({space})", why)
            return
        told = f"in {space}, {len(reference):,} {of_real} against {min(map(len, drawn.values())):,} drawn"
        try:
            found = {m: metrics.fid_estimate(rows, reference, small_sample=small_sample) for m, rows in drawn.items()}
            values = {model: one.estimate for model, one in found.items()}
            self.add(f"fid {space}", f"FID ({space})", "lower", "", f"FID {told}", values)
        except metrics.TooFewError as problem:
            self.miss(f"FID ({space})", str(problem))
        values = {model: metrics.kid(rows, reference) for model, rows in drawn.items()}
        self.add(f"kid {space}", f"KID ({space})", "lower", "", f"unbiased KID {told}", values)
        # Precision, recall and diversity grow with the number of pictures: as many on either side.
        rng = np.random.default_rng(0)
        alike = {
            name: rows[np.sort(rng.permutation(len(rows))[:fewest])] for name, rows in {**drawn, "": reference}.items()
        }
        sides = {model: metrics.precision_recall(alike[model], alike[""]) for model in drawn}
        told = f"in {space}, k = {metrics.NEIGHBOURS}, {fewest:,} pictures on either side; neighbours held fixed"
        for name, title in (("precision", "Precision"), ("recall", "Recall")):
            flags = {m: one.precise if name == "precision" else one.recalled for m, one in sides.items()}
            self.add(f"{name} {space}", f"{title} ({space})", "higher", "share", f"{name} {told}",
                     {model: rate(one.tolist()) for model, one in flags.items()})  # fmt: skip
        spread = {model: metrics.diversity(rows) for model, rows in alike.items()}
        own = spread.pop("")
        self.add(
            f"diversity {space}", f"Diversity ({space})", "higher", "of the real ones'",
            f"effective pictures (Vendi score) over those of as many real ones, {own.effective:.4g} of {own.of:,}",
            {m: Estimate(d.effective / own.effective, None, None, d.of, "Vendi score", note="no interval: the score "
                         "grows with repeats") for m, d in spread.items()},
        )  # fmt: skip

    def inception_score(self, column: str, places: Sequence[int]) -> None:
        logits = {m: [row for row in seen.of(column, places) if row is not None] for m, seen in self.seen.items()}
        if min(map(len, logits.values())) < 2:
            self.miss("Inception Score", "no drawing has logits of the Inception network")
            return
        values = {model: metrics.inception_score(np.asarray(rows)) for model, rows in logits.items()}
        told = "10 parts; says nothing of diversity within classes"
        self.add("inception score", "Inception Score", "higher", "", told, values)

    def spread(self, space: str, column: str) -> None:
        """How much drawings of one prompt differ, where prompts are drawn several times."""
        places = self.places("suite")
        values = {}
        for model, seen in self.seen.items():
            rows = [(p, row) for p, row in zip(places, seen.of(column, places), strict=True) if row is not None]
            if rows:
                found, _ = metrics.within_prompts(
                    np.stack([row for _, row in rows]), [self.drawings[p].prompt.text for p, _ in rows]
                )
                if len(found):
                    values[model] = mean(found)
        if len(values) == len(self.seen):
            told = f"mean cosine distance of two drawings of one prompt, in {space}"
            self.add(f"spread {space}", f"Spread within prompts ({space})", "higher", "", told, values)

    # --- preference ---------------------------------------------------------------------------------------------------

    def preference(self, column: str, judge: Judge, seed: int) -> dict[str, Any] | None:
        """Elo from the scores of a learned judge, each pair of drawings of one prompt and seed being a game."""
        places = self.places("suite")
        scores: dict[str, dict[Any, float]] = {}
        for model, seen in self.seen.items():
            values = seen.of(column, places)
            scores[model] = {
                (self.drawings[p].prompt.text, self.drawings[p].seed): value
                for p, value in zip(places, values, strict=True)
                if value is not None
            }
        pairs = pairs_by_score(scores, judge.name, groups=lambda key: key[0])
        if len(scores) < 2 or not pairs:
            return None
        return elo_table(f"pairs decided by {judge.name}", bradley_terry(pairs, seed=seed), judge.to_json())


def elo_table(
    source: str, standings: Sequence[Standing], judge: Mapping[str, Any] | None = None, note: str = ""
) -> dict[str, Any]:
    rows = [{**vars(one)} for one in standings]
    return {"source": source, "judge": judge, "standings": rows, "note": note}


def verdict(found: Sequence[Mapping[str, Any]], speed: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[str]:
    """Sentences that say which model to take, and how sure one can be."""
    ruling = next((one for name in ("right", "clip") for one in found if one["name"].partition(" ")[0] == name), None)
    if ruling is None or len(models) < 2:
        return []
    sign = 1 if ruling["better"] == "higher" else -1
    ranked = sorted(models, key=lambda model: -sign * ruling["values"][model]["value"])
    best = ranked[0]
    top = ruling["values"][best]
    said = [f"{best} leads on {ruling['title'].strip().lower()}: {_shown(top, ruling['unit'])}."]
    tied = []
    for other in ranked[1:]:
        gap = next(d for d in ruling["differences"] if {d["first"], d["second"]} == {best, other})
        way = 1 if gap["first"] == best else -1
        if gap["low"] is None or gap["low"] <= 0 <= gap["high"]:
            tied.append(other)
        else:
            ends = sorted((way * gap["low"], way * gap["high"]))
            many = f"{_gap(ends[0], ruling['unit'])} to {_gap(ends[1], ruling['unit'])}"
            said.append(f"It is ahead of {other} by {many} on the same prompts and seeds (95 % sure).")
    if tied:
        said.append(
            f"{', '.join(tied)} cannot be told from it with {top['samples']:,} drawings each: only more prompts or "
            "seeds could."
        )
    seconds = {one["painter"]: one["own"]["seconds"] for one in speed}
    quickest = min([*tied, best], key=lambda model: seconds.get(model, float("inf")))
    if seconds and quickest != best:
        said[0] = f"Take {quickest}: as good as can be told, and the quickest. " + said[0]
        said.append(
            f"Of those, {quickest} is quickest, {seconds[best] / seconds[quickest]:.1f} times as quick as {best}."
        )
    elif seconds:
        said[0] = f"Take {best}. " + said[0]
        slower = [model for model in models if seconds.get(model, 0) > 1.05 * seconds[best]]
        faster = [model for model in models if seconds.get(model, float("inf")) < 0.95 * seconds[best]]
        if faster:
            times = ", ".join(f"{model} {seconds[best] / seconds[model]:.1f} times" for model in faster)
            said.append(f"Quicker than {best}: {times}.")
        elif slower:
            said.append(f"It is the quickest too: {seconds[best]:.3g} s a picture.")
    if ruling["judge"] and not all(ruling["judge"]["independent"].values()):
        said.append(f"Mind that the judge is not independent: it {ruling['judge']['why']}.")
    return said


def _shown(one: Mapping[str, Any], unit: str) -> str:
    middle = _number(one["value"], unit)
    return middle if one["low"] is None else f"{middle} ({_number(one['low'], unit)} to {_number(one['high'], unit)})"


def _gap(value: float, unit: str) -> str:
    return f"{100 * abs(value):.1f} points" if unit == "share" else f"{abs(value):.4g}"


def _number(value: float, unit: str) -> str:
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.4g}"
