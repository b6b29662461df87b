"""L2 regularisation towards the previous weights."""

from dataclasses import dataclass

from clkit.learners.anchored import Anchored
from clkit.learners.base import Setting


@dataclass
class L2(Anchored):
    """Pulls all parameters alike to the weights at the end of the previous task.

    The baseline of Kirkpatrick et al. 2017 (arXiv 1612.00796): loss + strength / 2 ||theta - theta_previous||^2.
    """

    strength: float = 0.1

    def start(self, setting: Setting) -> None:
        """Begins without an anchor; every parameter is as important as any other."""
        super().start(setting)
        self.importance = None
