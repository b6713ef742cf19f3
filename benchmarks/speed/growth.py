"""How does the time grow with the number of entries, and with the number of tensors?"""

from collections.abc import Sequence

from gradkeel.bench import Gradients, Race, race
from gradkeel.bench.contenders import FUNCTION, GUARD, TORCH, clips
from gradkeel.bench.workload import READ, Shapes

from benchmarks.speed.answer import Answer, Curve, bound

ENTRIES = tuple(4**power for power in range(5, 14))  # 1,024 to 67 million, in 16 tensors
TENSORS = tuple(4**power for power in range(7))  # 1 to 4,096, of 4 million entries together
TIMES = 20
"""As many rounds for one, where there is time for them: most are short, and interpreters learn from the first."""


def below(shapes: Shapes, rounds: int) -> Race:
    """Clip only, norm below the bound."""
    gradients = Gradients(shapes)
    contenders = clips(gradients, bound(gradients, active=False))
    return race(contenders, rounds=rounds * TIMES, seconds=5.0)


def curve(name: str, title: str, xlabel: str, races: Sequence[tuple[int, Race]]) -> Curve:
    """Medians of the same contenders at several sizes."""
    lines = {
        contender: [(float(size), found.time(contender).median * 1e3) for size, found in races]
        for contender in (TORCH, FUNCTION, GUARD, READ)
    }
    return Curve(name, title, xlabel, lines)


def ask(rounds: int) -> Answer:
    """Two curves."""
    by_entries = [(size, below([(size // 16,)] * 16, rounds)) for size in ENTRIES]
    by_tensors = [(count, below([(2**22 // count,)] * count, rounds)) for count in TENSORS]
    return Answer(
        curves=[
            curve("entries", "16 tensors", "entries", by_entries),
            curve("tensors", "4 million entries", "tensors", by_tensors),
        ]
    )
