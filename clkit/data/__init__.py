"""Datasets as tensors, and streams of tasks made from them: class-, domain- and task-incremental."""

from clkit.data.augment import BYTES, NO_AUGMENT, Augment, Normalize
from clkit.data.characters import FONTS, SCRIPTS, glyphs
from clkit.data.core import Batch, Dataset, Examples, Scenario, Stream, Task
from clkit.data.corpora import TEXTS, Problem
from clkit.data.folders import folder, folders
from clkit.data.sets import TORCHVISION, digits, load
from clkit.data.streams import (
    conflicting, cumulative, domains, permutations, permuted, rotated, series, shared_head, split,
)  # fmt: skip
from clkit.data.texts import Text, text_file, texts
