"""The state of an unfinished run on disk: one file that is whole or not there, and that belongs to one run alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clkit import store


class Checkpoint:
    """The file of one computation's state. `identity`, a dict of JSON values, tells it apart from all others."""

    def __init__(self, path: Path | str, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = Path(path).expanduser(), dict(identity)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def save(self, state: Any) -> None:
        """Writes a state, a tree as `store.write_tree` takes it, over the last one."""
        store.write_tree(self.path, {"identity": self.identity, "state": state})

    def load(self, device: torch.device | str = "cpu") -> Any:
        """The state saved last, None if there is no file. Raises ValueError if it is damaged or of another run."""
        if not self.path.exists():
            return None
        try:
            found = store.read_tree(self.path, device)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"checkpoint: {self.path} is damaged or no checkpoint ({error}); put a whole copy in its place, or "
                "delete it to begin anew"
            ) from error
        if not isinstance(found, dict) or found.keys() != {"identity", "state"}:
            raise ValueError(f"checkpoint: {self.path} holds something else; give another path")
        differ = store.differences(found["identity"], self.identity)
        if differ:
            raise ValueError(
                f"checkpoint: {self.path} is of another run ({'; '.join(differ[:9])}); give another path, the settings "
                "it was made with, or delete it to begin anew"
            )
        return found["state"]


def model_state(model: nn.Module) -> dict[str, Any]:
    """Everything that a model trains on from: parameters, all buffers, and which parameters are frozen."""
    return {
        "state": model.state_dict(),
        "buffers": dict(model.named_buffers()),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
    }


@torch.no_grad()
def restore_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Writes what `model_state` gave into a model of the same kind, in place."""
    model.load_state_dict(state["state"])
    for name, buffer in model.named_buffers():
        buffer.copy_(state["buffers"][name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in state["frozen"])


def random_state(device: torch.device, *generators: torch.Generator) -> dict[str, Any]:
    """The states of generators, and of torch's global ones on the CPU and on `device`."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"own": [g.get_state() for g in generators], "cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random(state: Mapping[str, Any], device: torch.device, *generators: torch.Generator) -> None:
    """Sets the generators to what `random_state` gave."""
    for generator, own in zip(generators, state["own"], strict=True):
        generator.set_state(own)
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
