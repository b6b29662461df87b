"""Datasets as tensors, and streams of tasks made from them: class-, domain- and task-incremental."""

from clkit.data.augment import BYTES, NO_AUGMENT, Augment, Normalize
from clkit.data.characters import FONTS, SCRIPTS, glyphs
from clkit.data.core import IGNORED, Batch, Dataset, Examples, Rows, Scenario, Stream, Task, cuts
from clkit.data.images import TORCHVISION, digits, first_of_each, folder, folders, load
from clkit.data.streams import conflicting, domains, permutations, permuted, rotated, series, shared_head, split
from clkit.data.text import TEXTS, Problem, Text, text_file, texts
