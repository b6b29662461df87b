"""A frozen network and the small tensors of one task that make its weights, which a small file holds."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from clkit import checks, store, weights
from clkit.data import Stream
from clkit.modulation.rules import RULES, Modulation, Own, Rule, Tensors
from clkit.modules import called, hooked, unwrapped
from clkit.weights import Weights, live_tensors, set_weights

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
DEFAULT = Modulation()


@dataclass(frozen=True)
class _Part:
    """A weight that a rule makes, or one third of it where q, k and v are packed into one."""

    name: str
    index: int
    of: int

    @property
    def key(self) -> str:
        return self.name.replace(".", "/") + (f"/{'qkv'[self.index]}" if self.of == 3 else "")

    def cut(self, weight: Tensor) -> Tensor:
        return weight.chunk(self.of)[self.index]


@dataclass(frozen=True, eq=False)
class TaskState:
    """What one task adds to a backbone, as it is stored: the ids of its classes, and tensors by name.

    "gains.*" are packed by the rule. "backbone.*" are BatchNorm's running statistics, and the norms' scale and shift
    where they are trained. The head's are rows (classes, ...), one for each of `classes` in their order.
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
    out. `folded` makes an ordinary network of it, as fast as the backbone. The learner `PerTask` does this in a run.

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

    Raises ValueError for layers or a head that the network has not, and where the rule changes no layer.
    """

    @checks.arguments
    def __init__(
        self,
        backbone: nn.Module,
        rule: Rule | None = DEFAULT,
        *,
        layers: str | Sequence[str] = "auto",
        statistics: Literal["own", "frozen"] = "own",
        affine: bool = False,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(unwrapped(backbone))
        nn.Module.requires_grad_(self.backbone, False)
        self.rule, self.layers, self.statistics, self.affine, self.seed = rule, layers, statistics, affine, seed
        self._rule = rule or DEFAULT  # without a rule there is no part that it makes
        self.head = _find_head(self.backbone, head)
        live = dict(self.backbone.named_parameters())
        of_head = [f"{self.head}.{name}" for name, _ in self.backbone.get_submodule(self.head).named_parameters()]
        if tied := sorted(set(of_head) - live.keys()):
            raise ValueError(f"head: {tied} belong to another layer, too; untie them, or name another head")
        self._own: dict[str, list[str]] = {"statistics": [], "affine": [], "head": of_head}
        self._norms: list[_NormBase] = []
        for name, norm in self.backbone.named_modules():
            if isinstance(norm, _NormBase) and norm.track_running_stats:
                self._norms.append(norm)
                if statistics == "own":
                    self._own["statistics"] += [f"{name}.running_mean", f"{name}.running_var"]
            if isinstance(norm, NORMS) and affine and not isinstance(rule, Own):
                self._own["affine"] += [f"{name}.{kind}" for kind, _ in norm.named_parameters()]
        self._fixed = [name for name, _ in self.backbone.named_buffers() if name not in self._own["statistics"]]
        for name in [*self._own["affine"], *of_head]:
            live[name].requires_grad_(True)
        for name, tensor in self._live([*self._names(), *self._fixed]).items():
            self.register_buffer(_start(name), tensor.detach().clone(), persistent=False)
        self._parts = _find_parts(self.backbone, rule, layers, of_head)
        drawn = self._drawn()
        self._parts = [part for part in self._parts if drawn[part.key]]
        if rule is not None and not self._parts:
            raise ValueError(f"rule: {rule!r} leaves every layer as it is; use smaller factors, or None")
        self.gains = nn.ParameterDict({name: nn.Parameter(t) for name, t in _flat(drawn).items()})
        self._matrices: dict[str, str] = {}
        for weight in map(self._weight, self._parts):
            for sizes, matrix in self._rule.matrices(weight.shape).items():
                self._matrices[sizes] = f"interpolation {sizes}"
                self.register_buffer(self._matrices[sizes], matrix.to(weight), persistent=False)
        self.train(self.training)

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the backbone computes with the live task's tensors in place."""
        return called(self.backbone, self._effective(self._by_part(self.gains)), inputs)

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
        for part in keep:
            checks.choice("keep", part, ["gains", *self._own])
        begun = [name for part, names in self._own.items() if part not in keep for name in names]
        sources = self._starts([*self._fixed, *begun])
        if state is not None:
            sources |= {name: state.tensors[f"backbone.{name}"] for name in begun if name not in self._own["head"]}
        for name, tensor in self._live(sources).items():
            tensor.copy_(sources[name])
        if "gains" not in keep:
            for name, tensor in _flat(self._drawn() if state is None else self._unpacked(state)).items():
                self.gains[name].copy_(tensor)

    @torch.no_grad()
    def initial(self) -> TaskState:
        """What every task starts with, as it would be stored, with all rows of the head."""
        return self._stored(range(self.outputs), self._drawn(), self._starts)

    @torch.no_grad()
    def state(self, classes: Sequence[int]) -> TaskState:
        """Copies of the live task's tensors, as they are stored; of the head the rows of `classes`.

        Raises ValueError for classes that the head has not.
        """
        ids = [int(label) for label in classes]
        if not ids or len(set(ids)) < len(ids) or not all(0 <= label < self.outputs for label in ids):
            raise ValueError(f"classes: {ids} for a head of {self.outputs}; give ids from 0 that it has, each once")
        return self._stored(ids, self._by_part(self.gains), self._live)

    @torch.no_grad()
    def weights(self, state: TaskState | None = None, *, shared: Collection[str] = ()) -> dict[str, Tensor]:
        """All of the backbone's tensors by its own names, with a task's in place: the live one's, or those of `state`.

        Gains are folded in. Rows of the head that a state has not are those that a task starts with. `shared` names
        parts that are taken from the live task all the same: "statistics", "affine" or "head".
        """
        for part in shared:
            checks.choice("shared", part, self._own)
        found = self._live()
        if state is None:
            found |= self._effective(self._by_part(self.gains))
        else:
            found |= self._starts(self._fixed) | self._effective(self._unpacked(state))
            for part in self._own.keys() - set(shared):
                for name in self._own[part]:
                    own = state.tensors[f"backbone.{name}"].to(found[name])
                    if part == "head":
                        rows = torch.tensor(state.classes, device=own.device)
                        own = self.get_buffer(_start(name)).index_copy(0, rows, own)
                    found[name] = own
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    @torch.no_grad()
    def call(self, x: Tensor, state: TaskState, *, shared: Collection[str] = ()) -> Tensor:
        """Logits (N, C) of prepared inputs in a stored task, in the mode that the network is in; nothing of it changes.

        `shared` is as in `weights`.
        """
        return called(self.backbone, self.weights(state, shared=shared), (x,))

    @torch.no_grad()
    def compared(self, x: Tensor, state: TaskState, *, shared: Collection[str] = ()) -> tuple[Tensor, Tensor]:
        """Logits, as of `call`, and how far the statistics of each prepared input are from a stored task's: (N,).

        It is the squared distance of a channel's mean over positions from the running mean, over the running variance:
        its mean over channels, summed over BatchNorm layers. Raises ValueError without statistics of the task's own.
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

        with hooked(((norm, compare) for norm in self._norms), before=True):
            return self.call(x, state, shared=shared), total

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
        nn.Module.requires_grad_(net).eval()
        return net

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
        return self.state(range(classes or self.outputs)).nbytes

    def _live(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The backbone's tensors of these names, by default all, as they are now and not copied."""
        everything = {**dict(self.backbone.named_parameters()), **dict(self.backbone.named_buffers())}
        return everything if names is None else {name: everything[name] for name in names}

    def _starts(self, names: Collection[str]) -> dict[str, Tensor]:
        """What the backbone's tensors of these names were when it was given."""
        return {name: self.get_buffer(_start(name)) for name in names}

    def _names(self) -> list[str]:
        """The names of the backbone's tensors that a task has of its own."""
        return [name for names in self._own.values() for name in names]

    @property
    def outputs(self) -> int:
        """The number of classes of the live head."""
        return len(self.get_buffer(_start(self._own["head"][0])))

    def fingerprint(self) -> str:
        """A hash of what tasks build on: all tensors of the backbone as it was given, but the head's."""
        starts = self._starts([*self._names(), *self._fixed])
        given = {n: t for n, t in (live_tensors(self.backbone) | starts).items() if n not in self._own["head"]}
        return store.digest({name: store.hash_tensor(t) for name, t in given.items() if t.is_floating_point()})

    def _weight(self, part: _Part) -> Tensor:
        return part.cut(reduce(getattr, part.name.split("."), self.backbone))

    def _drawn(self) -> dict[str, dict[str, Tensor]]:
        """The gains that every task starts with, by part."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = {}
        for part in self._parts:
            weight = self._weight(part)
            drawn[part.key] = {kind: t.to(weight) for kind, t in self._rule.start(weight, generator).items()}
        return drawn

    def _by_part(self, flat: Tensors | nn.ParameterDict) -> dict[str, dict[str, Tensor]]:
        """Gains by "key/kind", as they are, by part and kind."""
        found: dict[str, dict[str, Tensor]] = {part.key: {} for part in self._parts}
        for name, tensor in flat.items():
            key, _, kind = name.rpartition("/")
            found[key][kind] = tensor
        return found

    def _stored(
        self, classes: Sequence[int], gains: Mapping[str, Tensors], own: Callable[[list[str]], Tensors]
    ) -> TaskState:
        """Copies of gains, packed, and of what a task has of its own, by the function `own` of its names."""
        packed = _flat({key: self._rule.pack(kinds) for key, kinds in gains.items()})
        tensors = {f"gains.{name}": tensor for name, tensor in packed.items()}
        for part, names in self._own.items():
            for name, tensor in own(names).items():
                tensors[f"backbone.{name}"] = tensor[list(classes)] if part == "head" else tensor
        return TaskState(tuple(classes), {name: tensor.detach().clone() for name, tensor in tensors.items()})

    def _unpacked(self, state: TaskState) -> dict[str, dict[str, Tensor]]:
        """The gains of a stored task, by part."""
        gains = {n.removeprefix("gains."): t for n, t in state.tensors.items() if n.startswith("gains.")}
        packed = self._by_part(gains)
        return {part.key: self._rule.unpack(packed[part.key], self._weight(part)) for part in self._parts}

    def _effective(self, gains: Mapping[str, Tensors]) -> dict[str, Tensor]:
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


def _flat(gains: Mapping[str, Tensors]) -> dict[str, Tensor]:
    """Gains by part and kind, by "key/kind"."""
    return {f"{key}/{kind}": tensor for key, kinds in gains.items() for kind, tensor in kinds.items()}


def _find_head(net: nn.Module, name: str | None) -> str:
    """The name of the head: the one given, else the last linear layer, else the last convolution."""
    linear, convolutions = (
        [name for name, m in net.named_modules() if isinstance(m, kinds)] for kinds in (nn.Linear, CONVOLUTIONS)
    )
    if name is not None and name not in linear + convolutions:
        raise ValueError(f"head: {name!r} is no linear layer or convolution of the network; its last are {linear[-3:]}")
    if not linear and not convolutions:
        raise ValueError("backbone: it has no linear layer and no convolution, so no head; end it in nn.Linear")
    return (linear or convolutions)[-1] if name is None else name


def _find_parts(net: nn.Module, rule: Rule | None, layers: str | Sequence[str], of_head: Sequence[str]) -> list[_Part]:
    """The weights that a rule applies to, packed q, k and v apart."""
    live = dict(net.named_parameters())

    def named(kinds: Any, weight: str = "weight") -> set[str]:
        return {f"{name}.{weight}" for name, module in net.named_modules() if isinstance(module, kinds)}

    thirds = named(nn.MultiheadAttention, "in_proj_weight") & live.keys()
    linear, convolutions = named(nn.Linear) | thirds, named(CONVOLUTIONS)
    thirds |= {name for name in linear & live.keys() if name.endswith("qkv.weight") and len(live[name]) % 3 == 0}
    groups = {"convolutions": convolutions, "linear": linear, "all": linear | convolutions}
    groups["auto"] = groups["convolutions" if len(convolutions) > 1 else "all"]
    if isinstance(layers, str) and layers not in groups:
        raise checks.unknown("layers", layers, groups, others=["a list of patterns"])
    if rule is None:
        return []
    if isinstance(rule, Own):
        chosen, thirds = live.keys(), set()
    elif isinstance(layers, str):
        chosen = groups[layers]
    else:
        chosen, known = set(), sorted(groups["all"])
        for pattern in layers:
            if not (fits := [name for name in known if fnmatchcase(name, pattern)]):
                raise ValueError(f"layers: {pattern!r} fits no weight; they are named like {known[:3]}")
            chosen.update(fits)
    parts = []
    for name in live:
        if name in chosen and name not in of_head:
            of = 3 if name in thirds else 1
            parts += [_Part(name, i, of) for i in range(of)]
    if not parts:
        raise ValueError(f"layers: {layers!r} is no layer of the network; use 'all', or rule=None for the head alone")
    return parts


KIND = "a task's tensors"  # what a file says that it holds
OPTIONS = ("layers", "statistics", "affine", "head")


def save(
    path: Path | str, model: Modulated, state: TaskState, *, name: str = "", class_names: Sequence[str] = ()
) -> None:
    """Writes a task to a safetensors file, by rename: its tensors, and what they go with as the header.

    The header has the hash of the backbone, the rule, the ids of the classes and what else is given: the task's name
    and one name for each class. Raises ValueError on another number of names.
    """
    if class_names and len(class_names) != len(state.classes):
        raise ValueError(f"class_names: {len(class_names)} for {len(state.classes)} classes; give one for each")
    facts = {"name": name, "classes": list(state.classes), "class_names": list(class_names)}
    store.save_tensors(path, state.tensors, _made_by(model) | facts | {"bytes": state.nbytes})


def load(path: Path | str, model: Modulated) -> TaskState:
    """Reads a task from a file, for a model of the same backbone and rule; onto the device of the model.

    Raises ValueError on a file of another backbone or rule, with classes that the model has not, or that is damaged or
    no task.
    """
    state = _task(path, model)
    if max(state.classes) >= model.outputs:
        largest = max(state.classes)
        raise ValueError(f"path: {path} has class {largest}, the model {model.outputs}; give it a larger head")
    return state


def listed(folder: Path | str) -> list[dict[str, Any]]:
    """The tasks in a folder, by file name: the header of each, with "file"; what is no task is left out."""
    found = []
    for path in sorted(store.expand(folder).glob("*.safetensors")):
        with suppress(ValueError, FileNotFoundError):
            _, header = _read(path)
            found.append({"file": path.name} | {name: header[name] for name in header if name != "kind"})
    return found


def network(path: Path | str, backbone: nn.Module) -> nn.Module:
    """The ordinary network of a task in a file, in evaluation mode, for one who has the backbone.

    The backbone's own head does not matter. Raises ValueError if it is another network than the task was learned on.
    """
    _, header = _read(path)
    with checks.explained(f"path: {path} belongs to another network", "give the backbone it was learned on"):
        model = Modulated(backbone, _rule(header), **{name: header[name] for name in OPTIONS})
    return model.folded(_task(path, model))


def _made_by(model: Modulated) -> dict[str, Any]:
    """What a task's tensors depend on, as plain values."""
    rule = None if model.rule is None else [type(model.rule).__name__, asdict(model.rule)]
    options = {name: getattr(model, name) for name in OPTIONS}
    return store.plain({"kind": KIND, "backbone": model.fingerprint(), "rule": rule, **options})


def _task(path: Path | str, model: Modulated) -> TaskState:
    """A file's task, checked against a model but for the width of its head."""
    tensors, header = _read(path)
    ours = _made_by(model)
    if differ := store.differences({name: header.get(name) for name in ours}, ours):
        found = "; ".join(differ)
        raise ValueError(f"path: {path} belongs to another model ({found}); make the one that it was saved with")
    like, classes = model.state((0,)).tensors, header["classes"]
    rows = {name for name in like if name.startswith(f"backbone.{model.head}.")}
    found = {name: tensor[:1] if name in rows and tensor.ndim else tensor for name, tensor in tensors.items()}
    weights.check_same(like, found, names=("the model", f"path: {path}"))
    for name, tensor in tensors.items():
        if tensor.dtype != like[name].dtype or (name in rows and len(tensor) != len(classes)):
            kind = f"{tensor.dtype}, {tuple(tensor.shape)}"
            raise ValueError(f"path: {path} has a damaged {name!r} ({kind}); save it again")
    weights.check_finite(tensors, f"path: {path}")
    device = next(model.parameters()).device
    return TaskState(tuple(classes), {name: tensor.to(device) for name, tensor in tensors.items()})


def _read(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file's tensors and header, which is one that `save` writes."""
    tensors, header = store.load_tensors(path)
    if header.get("kind") != KIND:
        raise ValueError(f"path: {path} holds no task of a modulated network; give a file that modulation.save wrote")
    with checks.explained(f"path: {path} has a damaged header", "save the task again"):
        _rule(header)
        ids, *_ = [header[name] for name in ("classes", "backbone", "bytes", "name", "class_names", *OPTIONS)]
        if not ids or len({*ids}) < len(ids) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"classes {ids}")
    return tensors, header


def _rule(header: Mapping[str, Any]) -> Rule | None:
    """The rule that a header names."""
    kind, fields = header["rule"] or (None, {})
    return RULES[kind](**fields) if kind else None
