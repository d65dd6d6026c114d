"""The band of a success rate that may be looked at after every episode: the same e-value that promotes and rejects.

Belongs here: turning counts into a band. Does not belong here: deciding (`gates.py`).
"""

from __future__ import annotations

from flywheel_pipeline.promotion import evalue

ALPHA = 0.05  # both sides together
_HALVINGS = 30  # 1e-9: below what a page can show


def band(successes: int, failures: int, alpha: float = ALPHA) -> tuple[float, float]:
    """Return (lower, upper), fractions, that hold the rate at all times together with probability 1 - alpha.

    The lower end is the highest floor at which the mixture e-value of these counts reaches 2/alpha, the upper end
    mirrors it. Over nothing: (0, 1).
    """
    needed = evalue.threshold(alpha / 2)
    rate = successes / (successes + failures) if successes + failures else 0.5
    return _edge(successes, failures, needed, rate), 1.0 - _edge(failures, successes, needed, 1.0 - rate)


def _edge(successes: int, failures: int, needed: float, rate: float) -> float:
    low, high = 0.0, rate
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle <= 0.0 or middle >= 1.0:
            break
        if evalue.log_e(successes, failures, middle) >= needed:
            low = middle
        else:
            high = middle
    return low
