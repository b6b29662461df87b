"""Experiments: grids of runs and studies as tables, statistics over them, and the pages that show them.

```python
methods = {"ER": ER(50)} | grid(CLeWI, "CLeWI α={alpha:g}", alpha=(0.1, 0.3, 0.5), learner=ER(50))
table = sweep(stream, models.convnet, methods, seeds=range(5))          # a row a run, with memory, alpha, ...
summarise(table)                                                        # mean, interval, std, n
contrasts(table, [("CLeWI α=0.3", "ER")])                               # how much better, with Student's interval
```

In a notebook, a table that takes long is named and kept beside the figures:

```python
whole = Comparison(stream, models.convnet, methods, Training(epochs=10), seeds=range(5))
table = page.table(whole, "main")
jumps = page.table(study(one_seed, range(5), p=(0.1, 0.25)), "jumps")   # any function of a seed
```
"""

from clkit.experiments.claims import Checks, Claims, Laws
from clkit.experiments.jobs import SweepError
from clkit.experiments.methods import Method, grid
from clkit.experiments.notebooks import Outcome, execute, find
from clkit.experiments.pages import Page, page, repository
from clkit.experiments.statistics import Difference, contrasts, difference, paired_difference, summarise
from clkit.experiments.sweep import Comparison, Study, accuracies, stored_weights, study, sweep
from clkit.experiments.teaching import Handout, student
