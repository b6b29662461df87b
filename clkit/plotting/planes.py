"""Pictures: a stream's examples, and planes through weight space."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clkit.plotting.common import one_of, scaled
from clkit.plotting.style import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from clkit.landscape import Plane


def examples_grid(ax: "Axes", stream: Any, columns: int = 10) -> None:
    """Training images as they are stored: a row for each task of the stream, its classes taking turns."""
    tiles = []
    for task in stream.tasks:
        labels = task.train.y.cpu().numpy()
        if task.train.x.ndim != 4:
            raise ValueError(f"stream: inputs of shape {stream.shape} are no images; only (C, H, W) can be shown")
        turns = [np.flatnonzero(labels == c)[i : i + 1] for i in range(columns) for c in task.classes]
        rows = np.concatenate(turns)[:columns]
        images = _images(task.train.x[rows.tolist()].cpu().numpy())
        tiles.append(np.concatenate([images, np.ones((columns - len(images), *images.shape[1:]))]))
    grid = np.pad(np.stack(tiles), [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], constant_values=1.0)
    tasks, _, height, width, channels = grid.shape
    sheet = grid.transpose(0, 2, 1, 3, 4).reshape(tasks * height, columns * width, channels)
    ax.imshow(sheet.squeeze(-1) if channels == 1 else sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_yticks(height * (np.arange(tasks) + 0.5), [_task_label(stream, task) for task in stream.tasks])
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def plane(ax: "Axes", plane: "Plane", *, value: str = "accuracy", names: Sequence[str] = ("a", "b", "c")) -> None:
    """Contours of accuracy (or `value="loss"`) over a plane as `landscape.plane` gives it, its three corners named."""
    one_of("value", value, ("accuracy", "loss"))
    shading = ax.contourf(plane.xs, plane.ys, scaled(value, getattr(plane, value)), levels=15, cmap="viridis")
    ax.figure.colorbar(shading, ax=ax, label=LABELS[value], shrink=0.9)
    for (x, y), name in zip(plane.corners, names, strict=True):
        ax.plot(x, y, "o", color="white", markeredgecolor="black")
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        ax.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8, bbox=box)
    ax.set_aspect("equal")
    ax.grid(False)
    ax.set_xlabel("distance in weight space")


def _images(x: np.ndarray) -> np.ndarray:
    """(N, C, H, W), bytes or floats, to (N, H, W, 1 or 3) from 0 to 1."""
    if x.shape[1] not in (1, 3):
        x = x[:, :1]
    if x.dtype == np.uint8:
        return x.transpose(0, 2, 3, 1) / 255
    low, high = x.min(), x.max()
    return (x.transpose(0, 2, 3, 1) - low) / (high - low or 1)


def _task_label(stream: Any, task: Any) -> str:
    names = [stream.classes[c] for c in task.classes]
    text = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return f"{task.index + 1}: {text}" if stream.scenario != "domain" else f"{task.index + 1}: {task.name}"
