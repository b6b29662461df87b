"""What a run goes on from, in memory and on disk: a file that is whole or not there, and that belongs to one run alone.

A checkpoint is the result so far. Its file is that of a saved result: a tree of what a result has, by name. "state" is
all that the next task depends on, and the "identity" of the run: a dict of JSON values that tells it from all others.
A run over more tasks has the same identity but for those.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clkit import checks, store
from clkit.data import Stream
from clkit.learners.base import PLAIN, Learner

LIVE = {"model", "learner"}  # of a result, what no file can hold
BARE = vars(nn.Module()).keys()  # what every module has
KEPT = {"weights": dict, "trained": dict, "inputs": Tensor}  # of each task, or of none
LISTS = KEPT | {"reports": dict, "training_loss": np.ndarray}
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError)  # what it leads to


def write(path: Path | str, result: Mapping[str, Any]) -> None:
    """Writes what a result has, by rename, and with what code it was made.

    Raises TypeError on what a file cannot hold, OSError where it cannot be written.
    """
    state = result["state"]
    made = {"identity": _versions() | state["identity"]} if state else {}
    kept = {name: part for name, part in result.items() if name not in LIVE}
    store.write_tree(path, {**kept, "state": {**state, **made}})


def read(path: Path | str) -> dict[str, Any]:
    """What `write` wrote. What was on a GPU is there again if there is one.

    Raises ValueError on a file that is damaged or something else, FileNotFoundError where there is none.
    """
    remedy = "give another path, put a whole copy in its place, or delete it to begin anew"
    with checks.explained(f"path: {path} is damaged or no saved run", remedy, of=DAMAGE):
        found = store.read_tree(path, "cuda" if torch.cuda.is_available() else "cpu")
        if not isinstance(found, dict) or not {"config", "state"} <= found.keys():
            raise ValueError("it holds something else")
        _check(found)
    return found


def _check(found: Mapping[str, Any]) -> None:
    """Raises one of `DAMAGE` unless a tree has the parts of a result, of as many tasks each."""
    done, tasks = found["accuracy"].shape
    arrays = dict.fromkeys(("accuracy", "masked", "losses"), (done, tasks)) | {"initial": (tasks,)}
    looks = [(look["when"], look["step"] >= 0, look["learning"] < done, look["accuracy"]) for look in found["watched"]]
    fit = [
        0 < done <= tasks and found["seconds"] >= 0,
        isinstance(found["state"], dict) and "seed" in found["config"],
        all(found[name].shape == shape and found[name].dtype.kind == "f" for name, shape in arrays.items()),
        all(len(found[name]) in ({0, done} if name in KEPT else {done}) for name in LISTS),
        all(isinstance(part, kind) for name, kind in LISTS.items() for part in found[name]),
        all(right and there and accuracy.shape == (tasks,) for _, right, there, accuracy in looks),
    ]
    if not all(fit):
        raise ValueError("its parts do not fit together")
    if found["state"]:
        store.canonical({**found["state"]["identity"]})


def identify(stream: Stream, parts: Mapping[str, Any], *, needed: bool) -> dict[str, Any]:
    """The identity of a run: its data and all else, by name, that its result depends on.

    Empty where `store.describe` fails; but raises what it raises, TypeError for one, if the identity is `needed`.
    """
    try:
        tasks = {str(task.index): store.digest(task.facts) for task in stream}
        found = {"scenario": stream.scenario, "classes": list(stream.classes), "tasks": tasks}
        return found | {name: store.describe(part, name) for name, part in parts.items()}
    except Exception:
        if needed:
            raise
        return {}


def check_same(state: Mapping[str, Any], identity: Mapping[str, Any], owner: str) -> None:
    """Raises ValueError, naming what differs, unless a run of this identity can go on from the state of `owner`."""
    if not state:
        raise ValueError(f"{owner} has no state: it was taken out, or its learner's state_dict() fails")
    there, tasks = state["identity"], identity["tasks"]
    here = {**identity, "tasks": {number: tasks[number] for number in tasks if number in there.get("tasks", {})}}
    if differ := store.differences(there, here | (_versions() if "code" in there else {})):
        raise ValueError(
            f"{owner} is of another run ({'; '.join(differ[:9])}); give the settings that it was made with (a longer "
            "stream has the same first tasks, and the same classes), or begin anew without it"
        )


def widened(result: Mapping[str, Any], initial: np.ndarray) -> dict[str, Any]:
    """A copy of what a run measured and kept, for a stream of more tasks: NaN, not measured, for those it did not know.

    `initial` (tasks,) are the accuracies before any training on all tasks of the longer stream.
    """
    past = {name: part for name, part in result.items() if name not in LIVE | {"config", "state"}}

    def wide(rows: np.ndarray) -> np.ndarray:
        return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, len(initial) - rows.shape[-1])], constant_values=np.nan)

    found = {name: [*part] if isinstance(part, list) else part for name, part in past.items()}
    found |= {name: wide(past[name]) for name in ("accuracy", "masked", "losses")}
    watched = [look | {"accuracy": wide(look["accuracy"])} for look in past["watched"]]
    return found | {"watched": watched, "initial": initial}


def snapshot(model: nn.Module, learner: Learner, *generators: torch.Generator) -> dict[str, Any]:
    """A copy of the state of a model, a learner, generators, and torch's own generators on the CPU and their device.

    Of a model: parameters and all buffers, which parameters are frozen, and its modules' numbers, texts, flags and
    Nones, such as whether one is in evaluation mode, and BatchNorm's momentum. Of their other attributes that are data
    it has the hashes alone.
    """
    device = generators[0].device
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    live = {
        "model": model.state_dict(),
        "buffers": dict(model.named_buffers()),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "plain": {
            part: {name: value for name, value in vars(module).items() if value is None or type(value) in PLAIN}
            for part, module in model.named_modules()
        },
        "other": _other(model),
        "learner": learner.state_dict(),
        "random": {"own": [g.get_state() for g in generators], "cpu": torch.get_rng_state(), "cuda": cuda},
    }
    return _copied(live, device)


@torch.no_grad()
def restore(
    kept: Mapping[str, Any], model: nn.Module, learner: Learner, *generators: torch.Generator
) -> dict[str, Any]:
    """Puts everything to what `snapshot` found, in place; returns a copy of the state, its tensors on their device.

    Raises ValueError where a module's attribute is a tensor, an array or a list of its own that training changed.
    """
    device = generators[0].device
    state = _copied(kept, device)
    model.load_state_dict(state["model"])
    for name, buffer in model.named_buffers():
        buffer.copy_(state["buffers"][name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in state["frozen"])
    for part, module in model.named_modules():
        vars(module).update(state["plain"][part])
    if changed := [name for name, found in _other(model).items() if state["other"].get(name) != found]:
        raise ValueError(f"model: {changed[:3]} changed in training and are not kept; make them buffers or numbers")
    learner.load_state_dict(state["learner"])
    for generator, own in zip(generators, state["random"]["own"], strict=True):
        generator.set_state(own)
    torch.set_rng_state(state["random"]["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["random"]["cuda"], device)
    return state


def _other(model: nn.Module) -> dict[str, str]:
    """The hash of every attribute of a model's modules that is data of its own and no plain value, by name."""
    return {
        f"{part}.{name}".lstrip("."): store.digest(store.describe(value, name))
        for part, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in BARE and type(value) not in PLAIN and _is_data(value)
    }


def _is_data(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _is_data([*value.values()])
    if isinstance(value, list | tuple | set):
        return all(_is_data(item) for item in value)
    own = isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.layout == torch.strided
    return own or value is None or isinstance(value, (*PLAIN, np.ndarray, np.generic))


def _copied(tree: Any, device: torch.device) -> Any:
    """A copy of a tree of tensors; those on the CPU stay there, the others go to `device`."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu" if tree.device.type == "cpu" else device, copy=True)
    if isinstance(tree, Mapping):
        return {name: _copied(part, device) for name, part in tree.items()}
    return [_copied(part, device) for part in tree] if isinstance(tree, list | tuple) else tree


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "code": store.source_digest()}
