"""The experiments of CLeWI (Kozal et al. 2024, arXiv 2404.04002), at a laptop's scale and at the paper's.

A grid says what is compared, on what and how often; `grid.run()` is its table and `grid.config` the record of it:

```python
grid = clewi.main("fast")
table = page.results(grid.run, grid.config, "main", commit=True)
clewi.gains(table)                             # what CLeWI adds to each learner, beside what was published
```
"""

from studies.clewi.grids import (
    alphas, equal_bytes, learners, main, memory_size, no_rehearsal, number_of_tasks, parts, plasticity, reduced, width,
)  # fmt: skip
from studies.clewi.published import ALPHA, DATASETS, PAIRS, RATE, gains, published, side_by_side
from studies.clewi.studies import curves, planted
from clkit.experiments import Comparison
from studies.named import stream
