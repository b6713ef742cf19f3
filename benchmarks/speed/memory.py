"""How much memory does clipping take, beyond the gradients?"""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from gradkeel.bench import SHAPES, Contender, Gradients
from gradkeel.bench.contenders import clips
from gradkeel.bench.workload import READ

from benchmarks import peers
from benchmarks.speed.answer import Answer, bound

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(kind: str) -> int:
    """Bytes of this process in memory: now ("VmRSS") or at most since the last reset ("VmHWM")."""
    found = re.search(rf"{kind}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    assert found is not None, "Linux says so"
    return int(found[1]) * 1024


def contenders(gradients: Gradients) -> list[Contender]:
    """All that clip, above the bound."""
    limit = bound(gradients, active=True)
    own = [contender for contender in clips(gradients, limit) if contender.name != READ]
    return [*own, *peers.clips(gradients, limit)]


def extra(index: int) -> tuple[str, float]:
    """A contender's name, and what its first run takes at its peak, as a share of the gradients' own memory.

    To be called in a process of its own: later runs find memory that an allocator has kept.
    """
    gradients = Gradients(SHAPES["gpt2-small"])
    contender = contenders(gradients)[index]
    contender.prepare()
    RESET.write_text("5", encoding="ascii")
    before = resident("VmRSS")
    contender.run()
    return contender.name, (resident("VmHWM") - before) / (4 * gradients.entries)


def ask(rounds: int) -> Answer:
    """GPT-2 small's shapes, above the bound, as a share of the gradients' own memory."""
    if not RESET.exists():
        return Answer(rows=["Only Linux tells."])
    count = len(contenders(Gradients([(1,)])))
    rows = [
        "| GPT-2 small, norm above the bound, first run (optax compiles in it) | of the gradients' own memory |",
        "|---|---|",
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        rows += [f"| {name} | {share:.0%} |" for name, share in processes.map(extra, range(count))]
    return Answer(rows=rows)
