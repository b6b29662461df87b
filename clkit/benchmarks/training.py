"""Training: the resident loop against loops that a DataLoader feeds, the memory's share of it, and a consolidation's.

The loop's work: a perceptron 784-100-100-10, plain SGD, replay of 64 rows from a reservoir of 500 beside every batch of
64, one epoch, one CPU thread. The DataLoader loops hold the memory as most replay code does, a list that is filled row
by row.
"""

import random
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from clkit import data, models
from clkit.benchmarks import Row, apart, interleaved, row
from clkit.consolidation import EMA, SFA, Consolidation, NoConsolidation
from clkit.learners import ER
from clkit.memory import Memory
from clkit.training import Training, run

ROWS, BATCH, MEMORY, OFFERED, REPEATS = 12_000, 64, 500, 4096, 5
MEAN, STD = 0.1307, 0.3081


def digits_like(rows: int) -> data.Stream:
    """One task of random bytes in MNIST's format."""
    g = torch.Generator().manual_seed(0)

    def examples(count: int) -> data.Examples:
        images = torch.randint(0, 256, (count, 1, 28, 28), generator=g, dtype=torch.uint8)
        return data.Examples(images, torch.randint(0, 10, (count,), generator=g))

    labels = tuple(range(10))
    task = data.Task(0, "bytes", labels, examples(rows), examples(10), data.Normalize((MEAN,), (STD,)))
    return data.Stream("bytes", (task,), tuple(map(str, labels)))


def resident(stream: data.Stream) -> None:
    """Our loop."""
    run(stream, models.mlp, ER(memory=MEMORY), None, Training(1, BATCH, 0.01), device="cpu", progress=False, keep=False)


def loaded(stream: data.Stream, dataset: torch.utils.data.Dataset) -> None:
    """The same training, fed by a DataLoader and with a list for a memory."""
    net, memory, seen = models.mlp(stream), [], 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for x, y in torch.utils.data.DataLoader(dataset, BATCH, shuffle=True):
        old = random.sample(memory, min(BATCH, len(memory)))
        inputs = torch.cat([x, torch.stack([m[0] for m in old])]) if old else x
        labels = torch.cat([y, torch.stack([m[1] for m in old])]) if old else y
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
        for pair in zip(x, y, strict=True):
            if len(memory) < MEMORY:
                memory.append(pair)
            elif (slot := random.randrange(seen + 1)) < MEMORY:
                memory[slot] = pair
            seen += 1


class Images(torch.utils.data.Dataset):
    """Images the way torchvision serves MNIST: a PIL image per row, then transforms."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        from torchvision import transforms

        self.x, self.y = x[:, 0], y
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple:
        from PIL import Image

        return self.transform(Image.fromarray(self.x[row].numpy())), self.y[row]


def rows_a_second() -> dict[str, float]:
    """Rows a second of each loop, interleaved, in this process as it stands."""
    stream = digits_like(ROWS)
    task = stream[0]
    tensors = torch.utils.data.TensorDataset(task.prepare(task.train.x), task.train.y)
    images = Images(task.train.x, task.train.y)
    loops: dict[str, Callable[[], None]] = {
        "resident": lambda: resident(stream),
        "DataLoader over tensors": lambda: loaded(stream, tensors),
        "DataLoader over images": lambda: loaded(stream, images),
    }
    resident(digits_like(BATCH))
    return {name: ROWS / seconds for name, seconds in interleaved(loops, REPEATS).items()}


def training() -> list[Row]:
    """Our rate over each other's."""
    rates = apart(rows_a_second)
    ours = rates.pop("resident")
    return [row(f"ER training, resident / {name}", "images a second", ours, rate) for name, rate in rates.items()]


def memory_writes() -> list[Row]:
    """Rows a second offered to a reservoir of bytes in the format of MNIST; then a write as a share of a step."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (OFFERED, 1, 28, 28), generator=g, dtype=torch.uint8)
    y = torch.randint(0, 10, (OFFERED,), generator=g)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def vectorised() -> None:
        memory = Memory(MEMORY)
        for start in range(0, OFFERED, BATCH):
            memory.offer(g, x=x[start : start + BATCH], y=y[start : start + BATCH])

    def one_by_one() -> None:
        xs, ys = torch.zeros((MEMORY, *x.shape[1:]), dtype=x.dtype), torch.zeros(MEMORY, dtype=y.dtype)
        for seen in range(OFFERED):
            slot = seen if seen < MEMORY else random.randrange(seen + 1)
            if slot < MEMORY:
                xs[slot], ys[slot] = x[seen], y[seen]

    def steps() -> None:
        for start in range(0, OFFERED, BATCH):
            inputs = torch.cat([x[start : start + BATCH]] * 2) / 255.0
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), torch.cat([y[start : start + BATCH]] * 2)).backward()
            optimizer.step()

    seconds = interleaved({"ours": vectorised, "theirs": one_by_one, "steps": steps}, REPEATS)
    ours, theirs, step = (OFFERED / s for s in seconds.values())
    return [
        row("memory write, a batch / a row at a time", "rows a second", ours, theirs),
        row("memory write / the perceptron's training step", "rows a second", ours, step),
    ]


def process_seconds() -> dict[str, float]:
    """Seconds of the CPU of a run with each consolidation, by its name, in this process as it stands."""
    one = digits_like(ROWS // 2)
    tasks = tuple(replace(one[0], index=index) for index in range(3))
    stream, training = data.Stream("bytes", tasks, one.classes, "domain"), Training(1, BATCH, 0.01)

    def learn(rule: Consolidation) -> None:
        run(stream, models.mlp, None, rule, training, device="cpu", progress=False, keep=False)

    learn(EMA())
    rules: list[Consolidation] = [NoConsolidation(), EMA(), SFA(p=0.02)]
    ways = {type(rule).__name__: lambda rule=rule: learn(rule) for rule in rules}
    return interleaved(ways, REPEATS, clock=time.process_time)


def consolidation() -> list[Row]:
    """The seconds of each consolidation over those of none."""
    none, ema, sfa = apart(process_seconds).values()
    rules = {"EMA()": ema, "SFA(p=0.02)": sfa}
    return [row(f"a run with {rule} / without", "seconds of CPU", seconds, none) for rule, seconds in rules.items()]


BENCHMARKS = {"training": training, "memory": memory_writes, "consolidation": consolidation}
