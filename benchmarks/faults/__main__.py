"""Plants every fault in every program, and says who finds what: ``python -m benchmarks.faults``, or ``make faults``.

``--write`` writes docs/faults.md; ``--families mlp,gpt`` and ``--seeds 2`` choose.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.faults.judge import Score, score_one, tables
from benchmarks.faults.plant import PROGRAMS, scenarios

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=",".join(PROGRAMS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write docs/faults.md between its marks")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    jobs = [(*one, seed) for seed in seeds for one in scenarios(tuple(options.families.split(",")))]
    chosen = " ".join(word for word in sys.argv[1:] if word != "--write")
    command = f"make faults ARGS='{chosen}'" if chosen else "make faults"
    scores: list[Score] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for score in pool.map(score_one, jobs):
            scores.append(score)
            done = len(scores)
            is_whole = done == len(jobs) or jobs[done][0] != score.family
            if is_whole and (options.write or done == len(jobs)):
                how_many = (
                    f"{done} runs" if done == len(jobs) else f"the first {done} of its {len(jobs)} runs"
                )
                text = f"Given by `{command}`, {how_many}.\n\n{tables(scores)}"
                _show(text, write=options.write)


def _show(text: str, *, write: bool) -> None:
    """Print the figures, or write them into the page: after each program, for all of them take half an hour."""
    if not write:
        print(text)  # what was asked for
        return
    head, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- figures -->\n")
    _, _, tail = rest.partition("<!-- end of figures -->\n")
    figures = f"<!-- figures -->\n{text}\n<!-- end of figures -->\n"
    PAGE.write_text(head + figures + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
