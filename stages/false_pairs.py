"""How many different pictures a duplicate rule would take for copies in a large corpus: a bound, with its assumptions.

False pairs grow with the square of the corpus: a rule without one among ten thousand pictures may still have millions
among a hundred million. So a figure measured on a small corpus is turned into a bound a pair, and that into a bound for
the corpus at hand. It assumes that

    - the pairs looked at are of different pictures, drawn as those of the large corpus are: a corpus with more plain,
      alike or templated pictures has a higher rate, and this bound says nothing about it;
    - pairs count as independent draws. Pairs that share a picture are not quite, so treat the confidence as nominal.

A radius that this bound does not allow needs a second look that does (a thumbnail, a finer signature).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FalsePairs:
    """`found` of `looked_at` pairs of different pictures were taken for copies."""

    found: int
    looked_at: int

    def rate_at_most(self, confidence: float = 0.95) -> float:
        """The largest rate a pair under which so few would be found with probability 1 - confidence (Poisson, exact).

        None found of n at 0.95: 3.0 / n, the rule of three.
        """
        from scipy.stats import chi2

        if not self.looked_at:
            return 1.0
        return min(1.0, float(chi2.ppf(confidence, 2 * (self.found + 1))) / 2 / self.looked_at)

    def expected_at_most(self, rows: int, confidence: float = 0.95) -> float:
        """At most so many false pairs are expected among `rows` pictures."""
        return self.rate_at_most(confidence) * rows * (rows - 1) / 2

    def precision_at_least(self, rows: int, copies_a_row: float, confidence: float = 0.95) -> float:
        """At least this share of the pairs found among `rows` pictures is true, with `copies_a_row` true ones a row."""
        true = copies_a_row * rows
        return true / (true + self.expected_at_most(rows, confidence)) if true else 0.0

    def rows_with_precision(self, precision: float, copies_a_row: float, confidence: float = 0.95) -> float:
        """How many pictures a corpus may have before the bound falls below `precision`."""
        return 1 + 2 * copies_a_row * (1 / precision - 1) / self.rate_at_most(confidence)
