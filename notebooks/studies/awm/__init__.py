"""The experiments of adaptive weight modulation, AWM (arXiv 2311.15276), at a laptop's scale and at the paper's.

```python
grid = awm.table()
table = page.results(grid.run, grid.config, "table", commit=True)
awm.costs(grid)                                # what a task of each method keeps
```
"""

from studies.awm import published
from studies.awm.backbones import BACKBONES, pretrained, pretrained_accuracy
from studies.awm.grids import (
    FACTORS, RATES, architectures, backbone, baselines, costs, factors, forgetting, inferred, long, modulations,
    per_task, sequential, table, transfer, tuning, variants, which_part,
)  # fmt: skip
from studies.awm.streams import SCRIPTS, characters, pictures, script, scripts
