"""Merging: several weights of one architecture into one. Pure functions, and one table of them, `MERGES`.

Every function is called as f(ws, **options), or f(ws, base=base, **options) where task vectors are taken from a base.
All floating tensors count alike, BatchNorm statistics too: re-estimate them afterwards with `normalization.refresh`.
Names and shapes must agree; inputs are not modified; the result is new and has the dtypes and devices of the base, or
of the first weights. A NaN or an infinity in an input raises ValueError.
"""

from clkit.merging.elected import emr, magmax, pcb
from clkit.merging.sparse import breadcrumbs, dare, dare_ties, della, ties
from clkit.merging.spectral import iso_c, opcm, tsv
from clkit.merging.statistical import fisher, regmean
from clkit.merging.straight import average, greedy_soup, interpolate, model_stock, slerp, task_arithmetic, wise_ft
from clkit.merging.table import MERGES, Merge, merge
