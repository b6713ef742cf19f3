"""Explain: why a run blew up, what hardly learns, what a bound would do, from a record.

>>> print(gradkeel.explain.explain("run.keel"))                                        # doctest: +SKIP
"""

from gradkeel.explain.events import Reached
from gradkeel.explain.explanation import Explanation, explain
from gradkeel.explain.explosion import Explosion, find_explosions
from gradkeel.explain.fading import Faded, Fading
from gradkeel.explain.replay import Replay, replay
from gradkeel.explain.threshold import Candidate, Estimate, ThresholdAdvice, advise
from gradkeel.explain.verdict import Diagnosis, Verdict

__all__ = [
    "Candidate",
    "Diagnosis",
    "Estimate",
    "Explanation",
    "Explosion",
    "Faded",
    "Fading",
    "Reached",
    "Replay",
    "ThresholdAdvice",
    "Verdict",
    "advise",
    "explain",
    "find_explosions",
    "replay",
]
