"""What it costs that a consolidation may look: runs with EMA, asked after every step, and with SFA, against none.

The work: the perceptron and the bytes of `training`, three tasks in batches of 64, one CPU thread. In seconds of the
CPU, of which the ratio says how many times as many a run needs.
"""

import time
from dataclasses import replace

from clkit import data, models
from clkit.benchmarks import Row, apart, interleaved, row
from clkit.benchmarks.training import BATCH, digits_like
from clkit.consolidation import EMA, SFA, Consolidation, NoConsolidation
from clkit.training import Training, run

ROWS, TASKS, REPEATS = 6_000, 3, 5


def measure() -> dict[str, float]:
    """Seconds of the CPU of a run with each consolidation, by its name, in this process as it stands."""
    one = digits_like(ROWS)
    tasks = tuple(replace(one[0], index=index) for index in range(TASKS))
    stream, training = data.Stream("bytes", tasks, one.classes, "domain"), Training(1, BATCH, 0.01)

    def learn(rule: Consolidation) -> None:
        run(stream, models.mlp, None, rule, training, device="cpu", progress=False, keep=False)

    learn(EMA())
    rules: list[Consolidation] = [NoConsolidation(), EMA(), SFA(p=0.02)]
    ways = {type(rule).__name__: lambda rule=rule: learn(rule) for rule in rules}
    return interleaved(ways, REPEATS, clock=time.process_time)


def bench() -> list[Row]:
    """The seconds of each consolidation over those of none."""
    none, ema, sfa = apart(measure).values()
    rules = {"EMA()": ema, "SFA(p=0.02)": sfa}
    return [row(f"a run with {rule} / without", "seconds of CPU", seconds, none) for rule, seconds in rules.items()]
