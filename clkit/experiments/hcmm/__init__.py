"""The experiments of holistic continual model merging, HCMM (arXiv 2509.23592), at a laptop's scale and the paper's.

```python
grid = hcmm.table("glyphs")
table = page.results(grid.matrices, grid.config, "glyphs-runs", commit=True)
net = hcmm.model(stream, "glyphs", linearized=True)     # a pretrained encoder under a head that knows every class
```
"""

from clkit.experiments.hcmm import published
from clkit.experiments.hcmm.grids import (
    CHOSEN,
    GRIDS,
    MODES,
    TRAINING,
    alphas,
    baselines,
    corrections,
    grid,
    importances,
    joint,
    lengths,
    method,
    packs,
    paper,
    rates,
    stages,
    table,
    tuning,
)
from clkit.experiments.hcmm.settings import SETTINGS, Setting, alphabet, fonts, glyphs, model, rendered
from clkit.experiments.hcmm.studies import (
    CORRECTIONS,
    STUDIES,
    along,
    compared,
    corrected,
    courses,
    kept,
    mismatches,
    paths,
    steps,
    two_tasks,
)

__all__ = [
    "CHOSEN",
    "CORRECTIONS",
    "GRIDS",
    "MODES",
    "SETTINGS",
    "STUDIES",
    "TRAINING",
    "Setting",
    "along",
    "alphabet",
    "alphas",
    "baselines",
    "compared",
    "corrected",
    "corrections",
    "courses",
    "fonts",
    "glyphs",
    "grid",
    "importances",
    "joint",
    "kept",
    "lengths",
    "method",
    "mismatches",
    "model",
    "packs",
    "paper",
    "paths",
    "published",
    "rates",
    "rendered",
    "stages",
    "steps",
    "table",
    "tuning",
    "two_tasks",
]
