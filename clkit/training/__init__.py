"""Training: the settings of a task's training, the one loop that trains, and what it gives."""

from clkit.evaluation import Evaluation, evaluate
from clkit.training.loop import ModelFactory, find_device, label, run
from clkit.training.settings import Result, Training
