"""What a notebook lets one move: handles on a picture, and the explorer of runs."""

from clkit.interact.explore import Explorer, explorer
from clkit.interact.knobs import Handles, handles
