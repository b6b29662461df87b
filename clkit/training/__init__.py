"""Training: the settings of a task's training, the one loop that trains, and what it gives."""

from clkit.evaluation import Evaluation, evaluate
from clkit.training.computing import find_device
from clkit.training.loop import ModelFactory, label, run
from clkit.training.settings import Result, Training
