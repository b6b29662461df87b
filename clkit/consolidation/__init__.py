"""When and how the weights of a stream's tasks are combined.

A consolidation is a frozen dataclass, its repr is the record. It is asked after every step and at the end of every task
whether it is `due`; called with a `Context` it returns the weights that training goes on from and the weights that
are deployed. It knows no learner, no loss and no label.
"""

from clkit.consolidation.base import Consolidation, Context, Merged, NoConsolidation, Progress
from clkit.consolidation.clewi import CLeWI
from clkit.consolidation.hcmm import HCMM, correct, importance_merge
from clkit.consolidation.posthoc import EMA, Merging, WiSEFT
from clkit.consolidation.sfa import SFA, Cosine, Drift, Plateau, Trigger, Velocity, merge_steps

CONSOLIDATIONS: dict[str, type[Consolidation]] = {
    "none": NoConsolidation,
    "CLeWI": CLeWI,
    "SFA": SFA,
    "HCMM": HCMM,
    "WiSE-FT": WiSEFT,
    "merging": Merging,
    "EMA": EMA,
}
