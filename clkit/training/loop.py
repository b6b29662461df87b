"""The only training loop: a learner goes through a stream, a consolidation combines weights on the way.

The order of events in one task:

1. `learner.begin_task`
2. every step: `loss`, backward, `adjust_gradients`, optimizer step, `after_step`; the consolidation, if due: load
   its `train`
3. `learner.after_training`
4. the consolidation, if due, gives two weights, `train` and `deploy`
5. load `train`: `learner.on_consolidated`
6. load `deploy`: `learner.calibrate`, then evaluate on the test data of every task
7. load `train`, from which the next task goes on

Weights are written into the live model in place, so an optimizer keeps its references. Its state is fresh in each task
and goes on through a consolidation within one, unless that asks for a fresh one. What is left between two tasks, the
state of model, learner and generators and some weights, makes a checkpoint.

Nothing waits for the device within an epoch, and an evaluation waits for it once. The data order, the augmentation, the
learner and the model (dropout) draw from generators of their own, all derived from `seed`. A consolidation's own draws,
and the learner's examples that it asks for, leave these as they are. So two runs that differ in the consolidation alone
see the same batches.
"""

import copy
import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from clkit import alignment, checks, store, weights
from clkit.checkpoint import check_same, identify, restore, snapshot, widened, write
from clkit.consolidation import Consolidation, Context, Merged, NoConsolidation, Progress
from clkit.data import Batch, Stream, Task, cuts
from clkit.evaluation import Evaluation, Score, evaluate, score
from clkit.learners import Criterion, Learner, Setting
from clkit.modules import dtype_of, frozen_modules, frozen_tensors, scratch_copy, training_mode, unwrapped
from clkit.training import computing, trial
from clkit.training.capture import CAPTURES, Captured, capturable, on_gpu
from clkit.training.settings import Result, Training
from clkit.weights import Weights, check_finite, get_weights, set_weights

ModelFactory = Callable[..., nn.Module]
Seed = Annotated[int, checks.Range(0, 2**63)]
BETWEEN = ("previous", "history", "memo")  # what the loop itself keeps from one task to the next


def label(model: nn.Module | ModelFactory) -> str:
    """A model in words, for the record: a factory and its settings, or a module's class and a hash of the rest."""
    if isinstance(model, nn.Module):
        content = {name: store.hash_tensor(tensor) for name, tensor in get_weights(model).items()}
        return f"{type(model).__name__}[{store.digest([repr(model), content])}]"
    if isinstance(model, functools.partial):
        options = {k: label(cast(Any, v)) if callable(v) else repr(v) for k, v in sorted(model.keywords.items())}
        parts = [repr(a) for a in model.args] + [f"{k}={v}" for k, v in options.items()]
        return f"{label(model.func)}({', '.join(parts)})"
    return f"{model.__module__}.{getattr(model, '__qualname__', type(model).__name__)}"


@checks.arguments
def run(
    stream: Stream,
    model: nn.Module | ModelFactory,
    learner: Learner | None = None,
    consolidation: Consolidation | None = None,
    training: Training | None = None,
    *,
    seed: Seed = 0,
    device: torch.device | str = "auto",
    progress: bool = True,
    keep: bool = True,
    watch: checks.Index | None = None,
    checkpoint: Path | str | None = None,
    resume: Result | Path | str | None = None,
    threads: checks.Count = 1,
) -> Result:
    """Trains a model on the tasks of a stream one after another and tests it on all of them after each.

    `model` is a module, which is copied, or a factory that is called as `model(stream, seed=seed)`. `learner` (default:
    fine-tuning) says what a step minimises, `consolidation` (default: none) when and how weights are combined. `keep`
    holds the deployed and the trained weights of every task in the result. `device` "auto" is the GPU if there is one.
    `watch` also tests on all tasks after every so many steps (0: after none) and before and after each consolidation,
    which changes nothing else: see `Result.watched`.

    `checkpoint` names a file for the whole state of the run, written after every task. If it is there already, the run
    goes on after the last task in it: an interruption costs the steps of one task and changes no bit of the result,
    whose `seconds` add up; of a finished run the result comes back. Where it cannot be written later, the disk being
    full, the log says so once and the run goes on.

    `resume` is a result, or the file of one (`Result.save`) or of a checkpoint, which the run goes on from: with its
    memory, generators and weights, and without changing it. The stream may have more tasks, and is else the same: cut
    short by `dataclasses.replace(stream, tasks=stream.tasks[:3])`, for example, so that the model has a head for all
    classes. The result is that of a run over the longer stream, bit for bit, but for what could not be measured then:
    NaN in `Result.accuracy`. `checkpoint` takes a longer stream too, and comes first where its file is there.

    Both are refused with ValueError, naming what differs, unless data, model, learner, consolidation, training, seed,
    kind of device, `keep`, `watch`, `threads` and, from a file, torch and clkit are those of the first run; and with
    TypeError for what has no stable description (`store.describe`): a lock or a Python generator, say.

    `threads` is how many of the CPU's threads torch computes with meanwhile, one on every machine: the last bits of a
    result depend on it. On cores with other work two threads wait for each other, and a step of a perceptron takes
    seventeen times as long as with one, of a ResNet-18 one to four times. More pay for large networks on idle cores;
    several runs at once use all cores better.

    The same seed gives the same bits on the same machine: on a CPU always, on a GPU with
    `Training(deterministic=True)`. Without it cuDNN takes the kernels that are fastest there and then, and the last
    bits of their sums may differ from run to run. Operations of torch itself that add up in no fixed order, which
    `torch.use_deterministic_algorithms` refuses, are the network's own affair.

    Raises before any work on settings that do not fit together, and FloatingPointError with task and step when a loss
    is not finite.
    """
    learner = copy.deepcopy(learner if learner is not None else Learner())
    rule: Consolidation = consolidation if consolidation is not None else NoConsolidation()
    training = training if training is not None else Training()
    started = time.perf_counter()
    with computing.alone(threads, seed):
        trial.check_arguments(model, learner, rule, training)
        trial.check_inputs(stream)
        place, model = computing.find_device(device), unwrapped(model) if isinstance(model, nn.Module) else model
        path = store.writable(checkpoint) if checkpoint is not None else None
        begun = path if path is not None and path.exists() else resume
        start = Result.load(begun) if isinstance(begun, Path | str) else begun
        facts = {"name": stream.name, "tasks": len(stream), "scenario": stream.scenario, "data": stream.fingerprint}
        record = {
            "stream": facts,
            "model": label(model),
            "learner": repr(learner),
            "consolidation": repr(rule),
            "training": json.loads(json.dumps(asdict(training))),
            "seed": seed,
            "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
            "threads": threads,
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
        }
        gpu = on_gpu(place, training.deterministic) if place.type == "cuda" else nullcontext()
        with gpu, computing.reproducible(seed, place):
            net = trial.made(model, stream, seed, place)
            parts = {"model": model, "learner": learner, "consolidation": rule, "training": training, "seed": seed}
            parts |= {"initial weights": net, "device": place.type, "keep": keep, "watch": watch, "threads": threads}
            identity = identify(stream, parts, needed=path is not None or start is not None)
            owner = f"{'resume' if begun is resume else 'checkpoint'}: {begun}"
            if start is not None:
                check_same(start.state, identity, owner)
            here = stream.to(place).given(dtype_of(net))
            rest = record, identity, progress, keep, watch, started
            return _Loop(here, net, learner, rule, training, seed, place, *rest).run(start, path, owner)


@dataclass(eq=False)
class _Loop:
    """The state of one run; `run` is the story, told in the order of the module's docstring."""

    stream: Stream
    model: nn.Module
    learner: Learner
    consolidation: Consolidation
    training: Training
    seed: int
    device: torch.device
    record: dict[str, Any]
    identity: dict[str, Any]
    progress: bool
    keep: bool
    watch: int | None
    started: float

    def __post_init__(self) -> None:
        model, training, device = self.model, self.training, self.device
        self.result = Result(self.record, model, self.learner)
        seeds = np.random.SeedSequence(self.seed).generate_state(3).tolist()
        self.order, self.augmenter, self.own = (torch.Generator(device).manual_seed(s) for s in seeds)
        self.criterion = Criterion(self.stream, training.labels, training.label_smoothing, device)
        self.holdout = getattr(self.consolidation, "holdout", None) or 0.0
        setting = Setting(self.own, self.criterion, len(self.stream.classes), training.batch, self.holdout)
        self.learner.start(setting)
        self.layout = computing.layout(model, self.stream, training.channels_last)
        if self.layout and device.type != "cpu":
            computing.lay_out(model, self.layout)
        self.optimizer = training.make_optimizer(model.parameters())
        self.frozen = frozen_modules(model)
        training_mode(model, self.frozen)
        self.autocast = computing.autocast(training.precision, device)
        self.base = self.previous = get_weights(model)
        self.kept = [name for name in self.base if name in frozen_tensors(model)]
        self.history: list[Weights] = []
        self.memo: Any = None
        self.report: dict[str, Any] = {}
        self.answers: dict[int, dict[str, Any]] = {}  # what the learner keeps from test to test
        self.trace = torch.zeros(0, device=device)
        self.scratch = scratch_copy(model) if not isinstance(self.consolidation, NoConsolidation) else model
        with computing.reproducible(self.seed, device), self.autocast():
            trial.attempt(self)
        if training.compile:
            model.compile()  # copies are not compiled
        wanted = capturable(self.learner, device) and training.capture and not training.compile
        self.captured = Captured(self.joined_update, model, CAPTURES[device.type]) if wanted else None

    def run(self, start: Result | None, path: Path | None, owner: str) -> Result:
        """The tasks that are not in the result to start from, which `owner` names, one after another."""
        from tqdm.auto import tqdm

        result = self.result
        result.initial = self.evaluate().accuracy
        if start is not None:
            self.restore(start, owner)
        done, steps = len(result.accuracy), [self.steps(task) for task in self.stream]
        with tqdm(
            total=sum(steps), initial=sum(steps[:done]), disable=not self.progress, unit="step", leave=False
        ) as bar:
            for task in self.stream.tasks[done:]:
                bar.set_description(f"task {task.index + 1} of {len(self.stream)}")
                with trial.explained(task):
                    self.learn(task, bar.update)
                result.seconds = time.perf_counter() - self.started
                if path is not None:
                    result.state = self.state()
                    store.attempt(functools.partial(write, path, vars(result)), path.parent)
        if not result.state:  # a checkpoint has just had it
            with suppress(TypeError):  # a learner's state that no file can hold
                result.state = self.state()
        if self.training.compile:
            result.model = copy.deepcopy(self.model)
        return result

    def learn(self, task: Task, tick: Callable[[int], Any]) -> None:
        """One task, from its first step to its evaluation."""
        result = self.result
        result.training_loss.append(self.train(task, tick))
        self.learner.after_training(self.model, task)
        current = get_weights(self.model)
        check_finite(current, f"weights after task {task.index}")
        progress = Progress(task.index, self.steps(task), self.steps(task), True)
        train = deploy = current
        if due := self.consolidation.due(progress):
            self.look("before", progress)
            train, deploy, *_ = self.consolidate(task, progress, current)
            for part in {id(w): w for w in (train, deploy)}.values():
                check_finite(part, f"consolidated weights after task {task.index}")
        if train is not current:
            set_weights(self.model, train)
        self.learner.on_consolidated(self.model, task)
        if deploy is not train:
            set_weights(self.model, deploy)
        self.learner.calibrate(self.model, task)
        for name, row in zip(("accuracy", "masked", "losses"), self.evaluate(), strict=True):
            setattr(result, name, np.stack([*getattr(result, name), row]))
        self.look("after" if due else "step", progress, result.accuracy[-1])
        if deploy is not train:
            set_weights(self.model, train)
        self.previous = deploy
        if getattr(self.consolidation, "uses_history", False):
            self.history.append(current)
        result.reports.append(self.report)
        if self.keep:
            result.inputs.append(self.aside(self.learner.examples, task).x.cpu())
            result.trained.append({name: tensor.cpu() for name, tensor in current.items()})
            result.weights.append({name: tensor.cpu() for name, tensor in deploy.items()})

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on between two tasks; optimizers begin anew in each."""
        kept = {name: getattr(self, name) for name in BETWEEN}
        kept |= snapshot(self.model, self.learner, self.order, self.augmenter)
        return kept | {"identity": self.identity}

    def restore(self, start: Result, owner: str) -> None:
        """Puts everything to where it was at the end of a result, and tests that on tasks that it did not know."""
        result, known = self.result, len(start.initial)
        with checks.explained(f"{owner} has a state that does not fit", "begin anew without it"):
            vars(result).update(widened(vars(start), result.initial))
            self.criterion.begin_task(self.stream[len(result.accuracy) - 1])
            state = restore(start.state, self.model, self.learner, self.order, self.augmenter)
            vars(self).update({name: state[name] for name in BETWEEN})
            weights.check_same(self.base, self.previous, *self.history)
        if known < len(self.stream):
            train = get_weights(self.model)
            set_weights(self.model, self.previous)
            for name, row in zip(("accuracy", "masked", "losses"), self.evaluate(), strict=True):
                getattr(result, name)[-1, known:] = row[known:]
            set_weights(self.model, train)
            if result.watched:
                result.watched[-1]["accuracy"] = result.accuracy[-1]
        self.started -= result.seconds

    def train(self, task: Task, tick: Callable[[int], Any]) -> np.ndarray:
        """The steps on one task; returns the loss of each."""
        self.report = {}
        self.criterion.begin_task(task)
        self.learner.begin_task(self.model, task)
        self.begin_optimizer()
        steps = self.steps(task)
        trace = self.trace = torch.zeros(steps, device=self.device)
        augmenter = self.augmenter if self.training.augment else None
        step = 0
        training_mode(self.model, self.frozen)
        for epoch in range(self.training.epochs):
            begun = step
            for rows in self.batches(task):
                lr = self.training.lr * self.training.rate(step, steps)
                self.training.set_rate(self.optimizer, lr)
                batch = task.batch(rows, augmenter, device=self.device, layout=self.layout, epoch=epoch, lr=lr)
                trace[step] = self.step(batch)
                step += 1
                self.within(task, Progress(task.index, step, steps, False))
            tick(step - begun)
            self.check_trace(trace[begun:step], task, begun)
        if self.captured is not None:
            self.captured.steps.clear()  # for the memory that they hold
        return trace.cpu().numpy()

    def begin_optimizer(self) -> None:
        """A fresh optimizer, and with it no captured step."""
        self.optimizer = self.training.make_optimizer(self.model.parameters())
        if self.captured is not None:
            self.captured.begin(self.optimizer)

    def step(self, batch: Batch) -> Tensor:
        """One step on a batch, at the learning rate that the optimizer has; returns its loss, on the device."""
        if self.captured is None:
            loss = self.update(lambda: self.learner.loss(self.model, batch), batch)
        else:
            with self.autocast():
                joined = self.learner.replayed(self.model, batch)
            loss = self.captured(joined.x, joined.y)
        self.learner.after_step(self.model, batch)
        return loss

    def update(self, compute: Callable[[], Tensor], batch: Any = None) -> Tensor:
        """What a step does to the weights: it goes down along the loss that `compute` gives, and returns it."""
        for parameter in self.optimizer.param_groups[0]["params"]:
            parameter.grad = None
        with self.autocast():
            loss = compute()
        trial.check_loss(loss, self.learner)
        loss.backward()
        self.learner.adjust_gradients(self.model, batch)
        if self.training.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip)
        computing.descend(self.optimizer)
        return loss.detach()

    def joined_update(self, x: Tensor, y: Tensor) -> Tensor:
        """The step of a learner whose loss is `Learner.loss`, on joined inputs and labels: what is captured."""
        return self.update(lambda: self.learner.setting.criterion(self.model(x), y))

    def within(self, task: Task, progress: Progress) -> None:
        """What may follow a step: a consolidation, whose weights training goes on from, and a look at all tasks."""
        if self.consolidation.due(progress):
            current = get_weights(self.model)
            merged = self.consolidate(task, progress, current)
            if merged.train is not current:
                self.look("before", progress)
                set_weights(self.model, merged.train)
                if merged.fresh:
                    self.begin_optimizer()
                self.look("after", progress)
                return
        if self.watch and progress.step % self.watch == 0 and progress.step < progress.steps:
            self.look("step", progress)

    def look(self, when: str, progress: Progress, accuracy: np.ndarray | None = None) -> None:
        """Puts accuracies on record if the run is watched: those given, else of the live model on every task."""
        if self.watch is not None:
            accuracy = self.evaluate().accuracy if accuracy is None else accuracy
            at = {"learning": progress.task, "step": progress.step, "when": when}
            self.result.watched.append(at | {"accuracy": accuracy})

    def consolidate(self, task: Task, progress: Progress, current: Weights) -> Merged:
        """Asks the consolidation, with generators of its own, so that training draws the same numbers as without it."""
        examples = functools.cache(lambda: self.aside(self.learner.examples, task))
        held_out = functools.cache(lambda: self.aside(self.learner.held_out, task) if self.holdout else None)

        def judge() -> Callable[[Weights], Score] | None:
            judged = held_out()
            judged = examples() if judged is None else judged
            return functools.partial(score, self.scratch, judged) if len(judged) else None

        context = Context(
            later={
                "inputs": lambda: examples().x,
                "score": judge,
                "held_out": lambda: held_out() is not None,
                "second_moment": lambda: {name: moment for name, (moment, _) in self.moments().items()} or None,
                "moment_scale": lambda: {name: scale for name, (_, scale) in self.moments().items()},
            },
            model=self.scratch,
            base=self.base,
            previous=self.previous,
            current=current,
            history=tuple(self.history),
            progress=progress,
            losses=self.trace[: progress.step],
            gradients=lambda: {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None},
            symmetry=lambda: self.symmetry,
            memo=self.memo,
        )
        with computing.reproducible(self.seed + progress.task, self.device):
            merged = trial.checked(self.consolidation(context), current, self.consolidation)
        context.later.clear()  # what was not asked for would be made of a later state
        self.memo, self.report = merged.memo, dict(merged.report)
        if not self.kept:
            return merged
        still = {name: current[name] for name in self.kept}
        moved = {id(w): w if w is current else {**w, **still} for w in (merged.train, merged.deploy)}
        return merged._replace(train=moved[id(merged.train)], deploy=moved[id(merged.deploy)])

    @functools.cached_property
    def symmetry(self) -> alignment.Symmetry:
        """The permutation symmetry of the model, derived when first asked for."""
        return alignment.symmetry(self.scratch, self.stream[0].batch(slice(0, 2), device=self.device).x)

    def moments(self) -> dict[str, tuple[Tensor, float]]:
        """Adam's running mean of squared gradients by parameter name, and 1 - beta2^n for the n steps in it."""
        found = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            if "exp_avg_sq" in state:
                beta2 = self.optimizer.param_groups[0]["betas"][1]
                found[name] = state["exp_avg_sq"], 1 - beta2 ** float(state["step"])
        return found

    def aside(self, ask: Callable[[Task], Any], task: Task) -> Any:
        """What the learner answers; all generators are put back, so that training is the same if nobody asks."""
        state = self.own.get_state()
        with computing.reproducible(self.seed + task.index, self.device):
            found = ask(task)
        self.own.set_state(state)
        return found

    def steps(self, task: Task) -> int:
        """How many optimizer steps a task takes."""
        return self.training.epochs * (len(cuts(len(task.train), self.training.batch)) + 1)

    def batches(self, task: Task) -> Iterator[Tensor]:
        """Row numbers of one epoch's batches, in random order."""
        rows = torch.randperm(len(task.train), generator=self.order, device=self.device).to(task.train.x.device)
        yield from rows.tensor_split([*cuts(len(rows), self.training.batch)])

    def check_trace(self, losses: Tensor, task: Task, first: int) -> None:
        """Raises FloatingPointError, naming task and step, if a loss of an epoch is not finite."""
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            where = f"step {first + int(bad[0, 0])} of task {task.index} ({task.name!r})"
            remedy = f"try a smaller lr than {self.training.lr} or Training(clip=1.0)"
            raise FloatingPointError(f"the loss is {losses[bad[0, 0]].item()} in {where}; {remedy}")

    def evaluate(self) -> Evaluation:
        """Tests the live model on every task, the way the learner predicts."""
        with self.autocast():
            try:
                return evaluate(self.model, self.stream, predict=self.learner.predict, kept=self.answers)
            except FloatingPointError as error:
                raise FloatingPointError(f"{self.learner!r} with {self.consolidation!r}, {error}") from error
