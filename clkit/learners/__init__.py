"""Learning rules, one family each file: what a step minimises and what is remembered."""

from clkit.learners.anchored import EWC, L2, MAS, SI, DecoupledL2, OnlineEWC, Sum
from clkit.learners.base import Criterion, LabelSpace, Learner, Setting
from clkit.learners.distillation import DER, DERpp, LwF
from clkit.learners.exemplars import BiC, GDumb, ICaRL
from clkit.learners.per_task import PerTask
from clkit.learners.projection import AGEM, GEM
from clkit.learners.joint import DataBuffer, Joint
from clkit.learners.rehearsal import ER, ERACE, MIR, MemoryOnly

LEARNERS: dict[str, type[Learner]] = {
    "fine-tuning": Learner, "joint": Joint, "data buffer": DataBuffer, "memory only": MemoryOnly,
    "ER": ER, "ER-ACE": ERACE, "A-GEM": AGEM, "GEM": GEM, "MIR": MIR, "DER": DER, "DER++": DERpp,
    "GDumb": GDumb, "iCaRL": ICaRL, "BiC": BiC,
    "L2": L2, "decoupled L2": DecoupledL2, "EWC": EWC, "online EWC": OnlineEWC, "SI": SI, "MAS": MAS,
    "LwF": LwF, "per task": PerTask,
}  # fmt: skip
