"""Experiments: grids of runs as one table, statistics over it, and the pages that turn tables into figures and claims.

```python
table = sweep(stream, models.convnet, {"ER": ER(50), "CLeWI": (ER(50), CLeWI(0.3))}, seeds=range(3))
summarise(table)                               # mean, std, n by method
paired_difference(table, "CLeWI", "ER")        # how much better, with Student's interval
```
"""

from clkit.experiments.grid import SweepError, accuracies, stored_weights, sweep
from clkit.experiments.notebooks import Outcome, execute, find
from clkit.experiments.pages import Claims, Laws, Page, page, repository
from clkit.experiments.plan import Method
from clkit.experiments.single import Option, about, choices, options, run_single
from clkit.experiments.statistics import Difference, difference, paired_difference, summarise
