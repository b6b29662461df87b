"""Training throughput: the resident loop of `training.run` against loops that a DataLoader feeds, with the same work.

The work: a perceptron 784-100-100-10, plain SGD, replay of 64 rows from a reservoir of 500 beside every batch of 64,
one epoch, one CPU thread. The DataLoader loops hold the memory as most replay code does, a list that is filled row by
row.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from clkit import data, models
from clkit.benchmarks import Row, apart, interleaved, row
from clkit.learners import ER
from clkit.training import Training, run

ROWS, BATCH, MEMORY, REPEATS = 12_000, 64, 500, 5
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


def measure() -> dict[str, float]:
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


def bench() -> list[Row]:
    """Our rate over each other's."""
    rates = apart(measure)
    ours = rates.pop("resident")
    return [row(f"ER training, resident / {name}", "images a second", ours, rate) for name, rate in rates.items()]
