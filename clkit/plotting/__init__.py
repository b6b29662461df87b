"""Results drawn on matplotlib axes, by seaborn: f(ax, results, ...). Nothing is trained, measured or saved here.

Accuracies come in [0, 1] and are shown in percent. Seeds are thin lines or dots, their mean is thick. A method has its
colour wherever it appears (`COLOURS`), and its variants are darker. Draw inside `with style():`.
"""

from clkit.plotting.curves import (
    along_layers, alpha_sweep, courses, frontier, interpolation, lines, sawtooth, spectra,
    stages, tradeoff,
)  # fmt: skip
from clkit.plotting.marks import (
    accuracy_matrix, against, bars, before_after, embedding, examples_grid, gains, heatmap, plane,
)  # fmt: skip
from clkit.plotting.common import (
    BLACK, BLUE, COLOURS, GREEN, GREY, INDIGO, LABELS, OLIVE, ORANGE, PALETTE, PURPLE, RC, RED, SKY, THIN, WINE,
    colours, family, legend, looks, shades, style,
)  # fmt: skip
