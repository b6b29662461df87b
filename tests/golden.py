"""The runs behind golden.json, every learner on two streams and CLeWI. To make it anew: `python tests/golden.py`."""

import functools
import json
import sys
from pathlib import Path

import torch

from clkit import data, models
from clkit.consolidation import CLeWI
from clkit.learners import ER, EWC, L2, LEARNERS, SI, DecoupledL2, GDumb, Learner, LwF, OnlineEWC, PerTask, Sum
from clkit.learners.anchored import Anchored
from clkit.modulation import Modulation, modulated
from clkit.training import Result, Training, run

FILE = Path(__file__).parent / "golden.json"
CLEWI = {"ER": None, "CLeWI 0.2": CLeWI(alpha=0.2, points=0), "CLeWI 0.4": CLeWI(alpha=0.4, points=0)}

OTHERS = {
    "GDumb": GDumb(memory=50, fit_epochs=31),
    "L2": L2(strength=1.0),
    "decoupled L2": DecoupledL2(strength=1.0),
    "SI": SI(strength=2.0),
    "online EWC": OnlineEWC(strength=5.0),
    "ER + EWC": Sum(ER(memory=50), EWC()),
}


def rule(name: str) -> Learner:
    """The learner of a name, with a memory of 50 if it keeps one, and a strength that matters on small streams."""
    if name in OTHERS:
        return OTHERS[name]
    made = LEARNERS[name]
    return made(memory=50) if issubclass(made, ER) else made()


def is_pulled(learner: Learner) -> bool:
    """Whether a learner adds a penalty to the loss, for which the learning rate is smaller."""
    return isinstance(learner, Anchored | LwF | Sum)


@functools.cache
def stream(name: str) -> data.Stream:
    characters = {"characters": "ABCDEFGHIJ", "per_class": 40, "size": 14}
    return data.split(data.glyphs(**characters) if name == "glyphs" else data.digits(), tasks=5)


@functools.cache
def result(case: str, name: str, seed: int = 0) -> Result:
    """One run: of a learner on "digits" (a convnet) or "glyphs" (a perceptron), or one of "CLeWI"."""
    common = {"seed": seed, "device": "cpu", "progress": False, "keep": False}
    if case == "CLeWI":
        training = Training(epochs=10, batch=32, lr=0.1)
        return run(stream("digits"), models.convnet, ER(memory=50), CLEWI[name], training, **common)
    learner = rule(name)
    training = Training(epochs=5 if case == "digits" else 10, batch=32, lr=0.03 if is_pulled(learner) else 0.1)
    model = functools.partial(models.convnet, widths=(16, 32, 32)) if case == "digits" else models.mlp
    if isinstance(learner, PerTask):
        model = functools.partial(modulated, model=model, rule=Modulation(2, 2))
        training = Training(epochs=5, batch=32, lr=0.01, optimizer="adamw")
    return run(stream(case), model, learner, None, training, **common)


def numbers(result: Result) -> dict[str, float]:
    """What is kept of a run: three accuracies, and the mean test loss over all tasks at the end."""
    kept = {name: result.summary()[name] for name in ("acc", "forgetting", "last")}
    return {name: round(float(value), 4) for name, value in (kept | {"loss": result.losses[-1].mean()}).items()}


CASES: dict[str, tuple[str, ...]] = {
    "digits": (*LEARNERS, "ER + EWC"),
    "glyphs": (*LEARNERS, "ER + EWC"),
    "CLeWI": tuple(CLEWI),
}


def main() -> None:
    """Runs everything, tells what has changed and writes the file."""
    torch.set_num_threads(1)
    old = json.loads(FILE.read_text())
    parts = []
    for case, names in CASES.items():
        lines = []
        for name in names:
            was, now = old.get(case, {}).get(name), numbers(result(case, name))
            if was != now:
                sys.stdout.write(f"{case}, {name}: {was} -> {now}\n")
            lines.append(f"  {json.dumps(name)}: {json.dumps(now)}")
        parts.append(f" {json.dumps(case)}: {{\n" + ",\n".join(lines) + "\n }")
    FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
