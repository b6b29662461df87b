"""Results drawn on matplotlib axes: f(ax, results, ...). Nothing is trained, measured or saved here.

Accuracies come in [0, 1] and are shown in percent. Seeds are thin lines or dots, their mean is thick. A method has its
colour wherever it appears (`COLOURS`). Draw inside `with style():`.
"""

from clkit.plotting.curves import (
    alpha_sweep, bits_frontier, courses, frontier, interpolation, interpolation_by_task, sawtooth, stages, tradeoff,
)  # fmt: skip
from clkit.plotting.features import against, along_layers, before_after, embedding, similarities, spectra
from clkit.plotting.planes import examples_grid, plane
from clkit.plotting.style import (
    BLACK, BLUE, COLOURS, GREEN, GREY, INDIGO, LABELS, OLIVE, ORANGE, PALETTE, PURPLE, RC, RED, SKY, THIN, WINE,
    YELLOW, colours, style,
)  # fmt: skip
from clkit.plotting.tables import accuracy_matrix, bars, gains
