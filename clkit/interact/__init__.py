"""What a notebook lets one move: handles on a picture."""

from clkit.interact.knobs import Handles, handles
from clkit.interact.slider import Slider, slider
