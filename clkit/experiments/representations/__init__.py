"""What networks represent while they learn, task after task, and when they are merged: the studies of notebook 09.

All are on small images and several seeds; each study trains its own networks and gives a table with a row for each
thing measured. `correction` has a network of its own: an encoder pretrained on Latin letters, under a frozen head that
knows every Greek letter beforehand, as HCMM's text head does.
"""

from clkit.experiments.representations.networks import (
    ENCODING,
    LAYERS,
    METHODS,
    SEEDS,
    SETTINGS,
    STRENGTHS,
    TASKS,
    TRAINING,
    TUNING,
    Pair,
    corrected,
    encoder,
    learned,
    letters,
    pair,
)
from clkit.experiments.representations.readings import (
    against_none,
    along,
    clouds,
    counterparts,
    few_examples,
    forgotten,
    gap,
    halfway,
    moved,
    restored,
    stations,
    than_er,
)
from clkit.experiments.representations.studies import STUDIES, config, correction, drift, merging, similarity

__all__ = [
    "ENCODING",
    "LAYERS",
    "METHODS",
    "SEEDS",
    "SETTINGS",
    "STRENGTHS",
    "STUDIES",
    "TASKS",
    "TRAINING",
    "TUNING",
    "Pair",
    "against_none",
    "along",
    "clouds",
    "config",
    "corrected",
    "correction",
    "counterparts",
    "drift",
    "encoder",
    "few_examples",
    "forgotten",
    "gap",
    "halfway",
    "learned",
    "letters",
    "merging",
    "moved",
    "pair",
    "restored",
    "similarity",
    "stations",
    "than_er",
]
