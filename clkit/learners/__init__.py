"""Learning rules, one file each: what a step minimises and what is remembered."""

from clkit.learners.agem import AGEM
from clkit.learners.base import Criterion, Learner, Setting
from clkit.learners.der import DER, DERpp
from clkit.learners.er import ER
from clkit.learners.er_ace import ERACE
from clkit.learners.gem import GEM
from clkit.learners.joint import Joint
from clkit.learners.mir import MIR

LEARNERS: dict[str, type[Learner]] = {
    "fine-tuning": Learner,
    "joint": Joint,
    "ER": ER,
    "ER-ACE": ERACE,
    "A-GEM": AGEM,
    "GEM": GEM,
    "MIR": MIR,
    "DER": DER,
    "DER++": DERpp,
}

__all__ = [
    "AGEM",
    "DER",
    "ER",
    "ERACE",
    "GEM",
    "LEARNERS",
    "MIR",
    "Criterion",
    "DERpp",
    "Joint",
    "Learner",
    "Setting",
]
