"""What networks represent while they learn, task after task, and when they are merged: the studies of notebook 09.

All are on small images and several seeds; each study trains its own networks and gives a table with a row for each
thing measured. `correction` has a network of its own: an encoder pretrained on Latin letters, under a frozen head that
knows every Greek letter beforehand, as HCMM's text head does.
"""

from studies.representations.networks import (
    ENCODING, LAYERS, METHODS, SEEDS, SETTINGS, STRENGTHS, TASKS, TRAINING, TUNING, Pair, corrected, encoder, learned,
    letters, pair,
)  # fmt: skip
from studies.representations.readings import (
    against_none, along, clouds, counterparts, few_examples, forgotten, gap, halfway, moved, restored, stations,
    than_er,
)  # fmt: skip
from studies.representations.studies import STUDIES, config, correction, drift, merging, similarity
