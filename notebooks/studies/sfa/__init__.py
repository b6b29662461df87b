"""The experiments of SFA (Kleiman et al. 2025, arXiv 2501.05559), at a laptop's scale and at the paper's.

The paper's body gives no table of numbers that could be quoted; its statements are checked here as claims. A grid says
what is compared; `grid.run()` is its table, `knobs(table, grid)` adds what each method was set to:

```python
grid = sfa.frontier("digits", "shared")
table = sfa.knobs(page.results(grid.run, grid.config, "shared", commit=True), grid)
```
"""

from studies.sfa.grids import (
    BETAS, HEADS, PS, adaptive, advantage, checkpoints, conflict, course, ends, even_odd, frontier, knobs, lines,
    long, parts, pretrained, retained, similarity, small_mlp, stored, streams,
)  # fmt: skip
from studies.sfa.language import (
    ADAM, CONTEXT, DOMAINS, aligned, aligned_text, barriers, final_bits, from_base, orders, reading, real_texts, text,
    texts, three_domains, well_read, writes,
)  # fmt: skip
from studies.sfa.studies import against_l2, contradiction, costs, merges, sawtooth
from studies.sfa.theory import effective_strength, kept_l2, kept_sfa, matched_l2, measured_sfa, top_curvature
