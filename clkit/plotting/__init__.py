"""Results drawn on matplotlib axes: f(ax, results, ...). Nothing is trained, measured or saved here.

Accuracies come in [0, 1] and are shown in percent. Seeds are thin lines or dots, their mean is thick. A method has its
colour wherever it appears (`COLOURS`). Draw inside `with style():`.
"""

from clkit.plotting.curves import (
    alpha_sweep,
    bits_frontier,
    courses,
    frontier,
    interpolation,
    interpolation_by_task,
    sawtooth,
    stages,
    tradeoff,
)
from clkit.plotting.features import against, along_layers, before_after, embedding, similarities, spectra
from clkit.plotting.planes import examples_grid, plane
from clkit.plotting.style import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    INDIGO,
    LABELS,
    OLIVE,
    ORANGE,
    PALETTE,
    PURPLE,
    RC,
    RED,
    SKY,
    THIN,
    WINE,
    YELLOW,
    colours,
    style,
)
from clkit.plotting.tables import accuracy_matrix, bars, gains

__all__ = [
    "BLACK",
    "BLUE",
    "COLOURS",
    "GREEN",
    "GREY",
    "INDIGO",
    "LABELS",
    "OLIVE",
    "ORANGE",
    "PALETTE",
    "PURPLE",
    "RC",
    "RED",
    "SKY",
    "THIN",
    "WINE",
    "YELLOW",
    "accuracy_matrix",
    "against",
    "along_layers",
    "alpha_sweep",
    "bars",
    "before_after",
    "bits_frontier",
    "colours",
    "courses",
    "embedding",
    "examples_grid",
    "frontier",
    "gains",
    "interpolation",
    "interpolation_by_task",
    "plane",
    "sawtooth",
    "similarities",
    "spectra",
    "stages",
    "style",
    "tradeoff",
]
