"""A frozen network and the small tensors of one task that make its weights."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from clkit import store
from clkit.data import Stream
from clkit.modulation.layers import Part, find_head, find_parts
from clkit.modulation.rules import Modulation, Own, Rule
from clkit.weights import Weights, live_tensors, set_weights

PARTS = ("gains", "statistics", "affine", "head")
STATISTICS = ("own", "frozen")
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
DEFAULT = Modulation()


@dataclass(frozen=True, eq=False)
class TaskState:
    """What one task adds to a backbone, as it is stored: the ids of its classes, and tensors by name.

    "gains.*" are packed by the rule; "backbone.*" are BatchNorm's running statistics, the norms' scale and shift where
    they are trained, and the head's rows, one for each of `classes` in their order.
    """

    classes: tuple[int, ...]
    tensors: Weights

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Modulated(nn.Module):
    """A frozen copy of a network, whose weights the live task's small tensors modulate, mask or replace.

    Any network whose last layer is linear or a convolution. Trainable are the tensors of the rule (`gains`), the head,
    and with `affine` the norms' scale and shift; everything else stays as it was given, and BatchNorm's running
    statistics belong to the task. `begin` starts a task, `state` takes it out, `call` computes with one that was taken
    out, `folded` makes an ordinary network of it, as fast as the backbone. The learner `PerTask` does this in a run.

    - `rule`: `Modulation(m1, m2)`, `Mask()`, `LowRank(rank)`, `Own()`, or None for the head (and statistics) alone
    - `layers` that the rule applies to: "convolutions", "linear", "all" of these but the head, a list of patterns of
      parameter names, or "auto": the convolutions, and in a network with fewer than two of them (a transformer, a
      perceptron) the linear layers too; where most weights are linear all the same (ConvNeXt), say "all". Of packed
      q, k, v (`nn.MultiheadAttention`, a linear layer named *qkv) each has tensors of its own: interpolation across
      them would mix them. `Own` copies all parameters, whatever this says.
    - `statistics`: "own" lets BatchNorm normalise by the batch in training and collects running statistics anew for
      each task; "frozen" keeps to the backbone's
    - `head`: the name of the last layer, by default the last linear one, else the last convolution
    - `seed`: of what a rule draws; every task starts alike
    """

    def __init__(
        self,
        backbone: nn.Module,
        rule: Rule | None = DEFAULT,
        *,
        layers: str | Sequence[str] = "auto",
        statistics: str = "own",
        affine: bool = False,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if statistics not in STATISTICS:
            raise ValueError(f"statistics: {statistics!r} is unknown; choose one of {', '.join(STATISTICS)}")
        self.backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.rule, self.layers, self.statistics, self.affine, self.seed = rule, layers, statistics, affine, seed
        modules = dict(self.backbone.named_modules())
        self.head = find_head(modules, head)
        norms = {name: module for name, module in modules.items() if isinstance(module, NORMS)}
        self._norms = [m for m in norms.values() if isinstance(m, _NormBase) and m.track_running_stats]
        of_head = [f"{self.head}.{name}" for name, _ in modules[self.head].named_parameters()]
        live = dict(self.backbone.named_parameters())
        batch = [name for name, m in norms.items() if m in self._norms]
        self._own: dict[str, list[str]] = {"statistics": [], "affine": [], "head": of_head}
        if statistics == "own":
            self._own["statistics"] = [f"{name}.{kind}" for name in batch for kind in ("running_mean", "running_var")]
        if affine and not isinstance(rule, Own):
            self._own["affine"] = [f"{name}.{kind}" for name, m in norms.items() for kind, _ in m.named_parameters()]
        if tied := sorted(set(of_head) - live.keys()):
            raise ValueError(f"head: {tied} belong to another layer, too; untie them, or name another head")
        self._fixed = [name for name, _ in self.backbone.named_buffers() if name not in self._own["statistics"]]
        for name in [*self._own["affine"], *self._own["head"]]:
            live[name].requires_grad_(True)
        for name, tensor in self._live(
            [*self._own["statistics"], *self._own["affine"], *of_head, *self._fixed]
        ).items():
            self.register_buffer(_start(name), tensor.detach().clone(), persistent=False)
        self._parts = find_parts(modules, live, of_head, rule, layers)
        drawn = self._drawn()
        self._parts = [part for part in self._parts if drawn[part.key]]
        if rule is not None and not self._parts:
            raise ValueError(
                f"rule: {rule!r} leaves every layer as it is; use smaller factors, or None for the head alone"
            )
        self.gains = nn.ParameterDict(
            {f"{part.key}/{kind}": nn.Parameter(t) for part in self._parts for kind, t in drawn[part.key].items()}
        )
        self._matrices: dict[str, str] = {}
        if isinstance(rule, Modulation):
            for part in self._parts:
                for sizes, matrix in rule.matrices(part.cut(live[part.name]).shape).items():
                    if sizes not in self._matrices:
                        self._matrices[sizes] = f"interpolation {sizes}"
                        self.register_buffer(self._matrices[sizes], matrix.to(live[part.name]), persistent=False)
        self.train(self.training)

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the backbone computes with the live task's tensors in place."""
        return torch.func.functional_call(self.backbone, self._effective(self._live_gains()), inputs)

    def extra_repr(self) -> str:
        """What tells a model apart besides its tensors."""
        options = {name: getattr(self, name) for name in ("layers", "statistics", "affine", "head", "seed")}
        return ", ".join([repr(self.rule), *(f"{name}={value!r}" for name, value in options.items())])

    def train(self, mode: bool = True) -> "Modulated":
        """Training mode for all modules, but not for BatchNorm whose statistics are frozen."""
        super().train(mode)
        if self.statistics == "frozen":
            for norm in self._norms:
                norm.eval()
        return self

    @torch.no_grad()
    def begin(self, state: TaskState | None = None, keep: Collection[str] = ()) -> None:
        """Sets the live tensors, in place, to where every task starts: the backbone as it was given.

        With a `state`, gains, statistics, scale and shift are those of an earlier task; the head starts afresh.
        `keep` names parts that stay as they are: among "gains", "statistics", "affine", "head".
        """
        unknown = set(keep) - set(PARTS)
        if unknown:
            raise ValueError(f"keep: {sorted(unknown)} is unknown; choose among {', '.join(PARTS)}")
        for name, tensor in self._live(self._fixed).items():
            tensor.copy_(self.get_buffer(_start(name)))
        for part in self._own.keys() - set(keep):
            for name, tensor in self._live(self._own[part]).items():
                source = self.get_buffer(_start(name))
                if state is not None and part != "head":
                    source = state.tensors[f"backbone.{name}"]
                tensor.copy_(source)
        if "gains" not in keep:
            gains = self._drawn() if state is None else self._unpacked(state)
            for part in self._parts:
                for kind, tensor in gains[part.key].items():
                    self.gains[f"{part.key}/{kind}"].copy_(tensor)

    @torch.no_grad()
    def initial(self) -> TaskState:
        """What every task starts with, as it would be stored, with all rows of the head."""
        tensors: dict[str, Tensor] = {}
        for key, drawn in self._drawn().items():
            tensors |= {f"gains.{key}/{kind}": t for kind, t in self._rule.pack(drawn).items()}
        for name in [name for part in self._own.values() for name in part]:
            tensors[f"backbone.{name}"] = self.get_buffer(_start(name)).clone()
        return TaskState(tuple(range(self.outputs)), tensors)

    @torch.no_grad()
    def state(self, classes: Sequence[int]) -> TaskState:
        """Copies of the live task's tensors, as they are stored; of the head the rows of `classes`."""
        ids = [int(label) for label in classes]
        if not ids or len(set(ids)) < len(ids) or not all(0 <= label < self.outputs for label in ids):
            raise ValueError(f"classes: {ids} for a head of {self.outputs}; give ids from 0 that it has, each once")
        rows = torch.tensor(ids)
        tensors: dict[str, Tensor] = {}
        for part, live in zip(self._parts, self._live_gains().values(), strict=True):
            tensors |= {f"gains.{part.key}/{kind}": t.clone() for kind, t in self._rule.pack(live).items()}
        for part, names in self._own.items():
            for name, tensor in self._live(names).items():
                tensors[f"backbone.{name}"] = tensor[rows.to(tensor.device)] if part == "head" else tensor.clone()
        return TaskState(tuple(ids), {name: tensor.detach() for name, tensor in tensors.items()})

    @torch.no_grad()
    def weights(self, state: TaskState | None = None, *, shared: Collection[str] = ()) -> dict[str, Tensor]:
        """All of the backbone's tensors by its own names, with a task's in place: the live one's, or those of `state`.

        Gains are folded in. Rows of the head that a state has not are those that a task starts with. `shared` names
        parts that are taken from the live task all the same.
        """
        unknown = set(shared) - self._own.keys()
        if unknown:
            raise ValueError(f"shared: {sorted(unknown)} is unknown; choose among {', '.join(self._own)}")
        everything = self._live()
        if state is None:
            return {n: t.detach().clone() for n, t in (everything | self._effective(self._live_gains())).items()}
        found = everything | {name: self.get_buffer(_start(name)) for name in self._fixed}
        found |= self._effective(self._unpacked(state))
        for part in self._own.keys() - set(shared):
            for name in self._own[part]:
                kept = state.tensors[f"backbone.{name}"].to(everything[name])
                if part == "head":
                    rows = torch.tensor(state.classes, device=kept.device)
                    kept = self.get_buffer(_start(name)).index_copy(0, rows, kept)
                found[name] = kept
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    @torch.no_grad()
    def call(self, x: Tensor, state: TaskState, *, shared: Collection[str] = ()) -> Tensor:
        """Logits (N, C) of prepared inputs in a stored task, in the mode that the network is in; nothing of it changes.

        `shared` is as in `weights`.
        """
        return torch.func.functional_call(self.backbone, self.weights(state, shared=shared), (x,))

    @torch.no_grad()
    def distance(self, x: Tensor, state: TaskState) -> Tensor:
        """How far the statistics of each prepared input are from a stored task's: (N,).

        The squared distance of a channel's mean over positions from the running mean, over the running variance, as
        the mean over channels and the sum over BatchNorm layers.
        """
        if not self._norms:
            raise ValueError("backbone: it has no BatchNorm, so no statistics to compare; infer tasks by 'entropy'")
        if self.statistics == "frozen":
            raise ValueError("statistics: 'frozen' ones are all tasks' alike; infer tasks by 'entropy'")
        total = x.new_zeros(len(x), dtype=torch.float32)

        def compare(norm: _NormBase, inputs: tuple[Tensor, ...]) -> None:
            assert norm.running_mean is not None and norm.running_var is not None
            means = inputs[0].flatten(2).mean(2) if inputs[0].ndim > 2 else inputs[0]
            total.add_(((means - norm.running_mean).square() / (norm.running_var + norm.eps)).mean(1))

        hooks = [norm.register_forward_pre_hook(compare) for norm in self._norms]  # pyright: ignore[reportArgumentType]
        try:
            self.call(x, state)
        finally:
            for hook in hooks:
                hook.remove()
        return total

    def folded(self, state: TaskState) -> nn.Module:
        """An ordinary network, in evaluation mode, that computes what a stored task does, its classes alone."""
        net, weights = copy.deepcopy(self.backbone), self.weights(state, shared=("head",))
        head = net.get_submodule(self.head)
        for name in self._own["head"]:
            kind = name.rpartition(".")[2]
            weights[name] = state.tensors[f"backbone.{name}"].clone()
            setattr(head, kind, nn.Parameter(torch.empty_like(weights[name])))
        setattr(head, "out_features" if isinstance(head, nn.Linear) else "out_channels", len(state.classes))
        set_weights(net, {name: weights[name] for name in live_tensors(net)})
        return net.requires_grad_(True).eval()

    def parameters_per_task(self, classes: int | None = None) -> dict[str, int]:
        """How many numbers a task of so many classes (default: all) has in its gains, statistics, affine and head.

        The gains are counted as they are trained: a mask's scores are one bit each when they are stored.
        """
        counts = {"gains": sum(p.numel() for p in self.gains.values())}
        counts |= {part: sum(t.numel() for t in self._live(names).values()) for part, names in self._own.items()}
        if classes is not None:
            counts["head"] = counts["head"] // self.outputs * classes
        return counts

    def bytes_per_task(self, classes: int | None = None) -> int:
        """What a stored task of so many classes (default: all) takes."""
        counts = self.parameters_per_task(classes), self.parameters_per_task()
        size = next(self.parameters()).element_size()
        return self.initial().nbytes + size * (counts[0]["head"] - counts[1]["head"])

    def _live(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The backbone's tensors of these names, by default all, as they are now and not copied."""
        everything = {**dict(self.backbone.named_parameters()), **dict(self.backbone.named_buffers())}
        return everything if names is None else {name: everything[name] for name in names}

    @property
    def outputs(self) -> int:
        """The number of classes of the live head."""
        return len(self.get_buffer(_start(self._own["head"][0])))

    def fingerprint(self) -> str:
        """A hash of what tasks build on: all tensors of the backbone as it was given, but the head's."""
        names = [*self._own["statistics"], *self._own["affine"], *self._fixed]
        starts = {name: self.get_buffer(_start(name)) for name in names}
        given = {n: t for n, t in (live_tensors(self.backbone) | starts).items() if n not in self._own["head"]}
        return store.digest({name: store.hash_tensor(t) for name, t in given.items() if t.is_floating_point()})

    @property
    def _rule(self) -> Rule:
        assert self.rule is not None
        return self.rule

    def _weight(self, part: Part) -> Tensor:
        return part.cut(reduce(getattr, part.name.split("."), self.backbone))

    def _drawn(self) -> dict[str, dict[str, Tensor]]:
        """The gains that every task starts with, by part."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = {}
        for part in self._parts:
            weight = self._weight(part)
            drawn[part.key] = {kind: t.to(weight) for kind, t in self._rule.start(weight, generator).items()}
        return drawn

    def _unpacked(self, state: TaskState) -> dict[str, dict[str, Tensor]]:
        """The gains of a stored task, by part."""
        packed: dict[str, dict[str, Tensor]] = {part.key: {} for part in self._parts}
        for name, tensor in state.tensors.items():
            if name.startswith("gains."):
                key, _, kind = name.removeprefix("gains.").rpartition("/")
                packed[key][kind] = tensor
        return {part.key: self._rule.unpack(packed[part.key], self._weight(part)) for part in self._parts}

    def _live_gains(self) -> dict[str, dict[str, Tensor]]:
        """The live task's gains, not copied, by part."""
        found: dict[str, dict[str, Tensor]] = {part.key: {} for part in self._parts}
        for name, tensor in self.gains.items():
            key, _, kind = name.rpartition("/")
            found[key][kind] = tensor
        return found

    def _effective(self, gains: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The weights that the rule makes, by the backbone's names, in the backbone's own precision."""
        made: dict[str, list[Tensor]] = {}
        matrices = {sizes: getattr(self, name) for sizes, name in self._matrices.items()}
        device = next(self.backbone.parameters()).device.type
        with torch.autocast(device, enabled=False):
            for part in self._parts:
                weight = self._weight(part)
                made.setdefault(part.name, []).append(self._rule.effective(weight, gains[part.key], matrices))
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in made.items()}


def modulated(
    stream: Stream, model: Callable[..., nn.Module], rule: Rule | None = DEFAULT, *, seed: int = 0, **options: Any
) -> Modulated:
    """A network of the factory `model` as a `Modulated`: with `partial(modulated, model=..., rule=...)` a factory."""
    return Modulated(model(stream, seed=seed), rule, seed=seed, **options)


def _start(name: str) -> str:
    """The name of the buffer with what a task starts with."""
    return "start " + name.replace(".", "/")
