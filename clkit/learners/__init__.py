"""Learning rules, one file each: what a step minimises and what is remembered."""

from clkit.learners.agem import AGEM
from clkit.learners.base import Criterion, Learner, Setting
from clkit.learners.bic import BiC
from clkit.learners.combined import Sum
from clkit.learners.data_buffer import DataBuffer
from clkit.learners.der import DER, DERpp
from clkit.learners.er import ER
from clkit.learners.er_ace import ERACE
from clkit.learners.ewc import EWC, OnlineEWC
from clkit.learners.gdumb import GDumb
from clkit.learners.gem import GEM
from clkit.learners.icarl import ICaRL
from clkit.learners.joint import Joint
from clkit.learners.l2 import L2, DecoupledL2
from clkit.learners.lwf import LwF
from clkit.learners.mas import MAS
from clkit.learners.memory_only import MemoryOnly
from clkit.learners.mir import MIR
from clkit.learners.per_task import PerTask
from clkit.learners.si import SI

LEARNERS: dict[str, type[Learner]] = {
    "fine-tuning": Learner,
    "joint": Joint,
    "data buffer": DataBuffer,
    "memory only": MemoryOnly,
    "ER": ER,
    "ER-ACE": ERACE,
    "A-GEM": AGEM,
    "GEM": GEM,
    "MIR": MIR,
    "DER": DER,
    "DER++": DERpp,
    "GDumb": GDumb,
    "iCaRL": ICaRL,
    "BiC": BiC,
    "L2": L2,
    "decoupled L2": DecoupledL2,
    "EWC": EWC,
    "online EWC": OnlineEWC,
    "SI": SI,
    "MAS": MAS,
    "LwF": LwF,
    "per task": PerTask,
}
