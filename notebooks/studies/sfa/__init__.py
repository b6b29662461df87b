"""The experiments of SFA (Kleiman et al. 2025, arXiv 2501.05559), at a laptop's scale, on real data and at the paper's.

The paper's body gives no table of numbers that could be quoted; its statements are checked here as claims. Streams,
networks and measures are here; what is compared stands in notebooks 04 and 05:

```python
methods = grid(Learner) | grid(SFA, "SFA p={p:g} β={beta:g}", p=(0.05, 0.25, 1.0), beta=(0.2, 0.5))
table = page.table(sfa.plane(methods, head="shared"), "few")
```
"""

from studies.sfa.images import (
    PERCEPTRON, checkpoints, conflicting, conflicts, contradiction, course, elsewhere, ends, even_odd, hundred,
    long_streams, merges, parts, permuted, plane, pretrained, retained, rotated, sided, similarity, small_mlp, twenty,
)  # fmt: skip
from studies.sfa.language import (
    ADAM, CONTEXT, DOMAINS, ORDERS, barriers, by_domain, reading, real_texts, text, texts, well_read, writes,
)  # fmt: skip
from studies.sfa.real import real
from studies.sfa.theory import costs, effective_strength, kept_l2, kept_sfa, matched_l2, measured_sfa, top_curvature
