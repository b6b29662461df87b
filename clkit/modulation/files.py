"""A task as a small file, for everyone who has the backbone."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from clkit import store, weights
from clkit.modulation.modulated import Modulated, TaskState
from clkit.modulation.rules import RULES

KIND = "a task's tensors"
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
    weights.save(path, state.tensors, **_made_by(model), **facts, bytes=state.nbytes)


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
    """The tasks in a folder, by file name: the header of each, with "file"; other files are left out."""
    found = []
    for path in sorted(store.expand(folder).glob("*.safetensors")):
        try:
            _, header = _read(path)
        except (ValueError, FileNotFoundError):
            continue
        found.append({"file": path.name} | {name: header[name] for name in header if name != "kind"})
    return found


def network(path: Path | str, backbone: nn.Module) -> nn.Module:
    """The ordinary network of a task in a file, in evaluation mode, for one who has the backbone.

    The backbone's own head does not matter. Raises ValueError if it is another network than the task was learned on.
    """
    _, header = _read(path)
    kind, fields = header["rule"] or (None, {})
    rule = RULES[kind](**fields) if kind else None
    model = Modulated(backbone, rule, **{name: header[name] for name in OPTIONS})
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
    if differ := store.differences({name: header[name] for name in ours}, ours):
        found = "; ".join(differ)
        raise ValueError(f"path: {path} belongs to another model ({found}); make the one that it was saved with")
    like, classes = model.state((0,)).tensors, header["classes"]
    rows = {name for name in like if name.startswith(f"backbone.{model.head}.")}
    found = {name: tensor[:1] if name in rows else tensor for name, tensor in tensors.items()}
    weights.check_same(like, found, names=("the model", f"path: {path}"))
    weights.check_finite(tensors, f"path: {path}")
    for name, tensor in tensors.items():
        if tensor.dtype != like[name].dtype or (name in rows and len(tensor) != len(classes)):
            kind = f"{tensor.dtype}, {tuple(tensor.shape)}"
            raise ValueError(f"path: {path} has a damaged {name!r} ({kind}); save it again")
    device = next(model.parameters()).device
    return TaskState(tuple(classes), {name: tensor.to(device) for name, tensor in tensors.items()})


def _read(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file's tensors and header, which is one that `save` writes."""
    tensors, header = weights.load(path)
    if header.get("kind") != KIND:
        raise ValueError(f"path: {path} holds no task of a modulated network; give a file that modulation.save wrote")
    ids, rule = header.get("classes") or ["none"], header.get("rule") or [None]
    whole = header.keys() >= {"backbone", "rule", *OPTIONS} and rule[0] in (None, *RULES)
    if not whole or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"path: {path} has a damaged header; save the task again")
    return tensors, header
