"""The experiments of holistic continual model merging, HCMM (arXiv 2509.23592), at a laptop's scale and the paper's.

```python
grid = hcmm.table("glyphs")
table = page.results(grid.matrices, grid.config, "glyphs-runs", commit=True)
net = hcmm.model(stream, "glyphs", linearized=True)     # a pretrained encoder under a head that knows every class
```
"""

from studies.hcmm import published
from studies.hcmm.grids import (
    CHOSEN, GRIDS, MODES, TRAINING, alphas, baselines, corrections, grid, importances, joint, lengths, method, packs,
    paper, rates, stages, table, tuning,
)  # fmt: skip
from studies.hcmm.settings import SETTINGS, Setting, alphabet, fonts, glyphs, model, rendered
from studies.hcmm.studies import (
    CORRECTIONS, STUDIES, along, compared, corrected, courses, kept, mismatches, paths, steps, two_tasks,
)  # fmt: skip
