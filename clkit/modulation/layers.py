"""Which layers of a network a rule applies to, and which of them is the head."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from clkit.modulation.rules import Own, Rule

LAYERS = ("auto", "convolutions", "linear", "all")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Part:
    """A weight that a rule makes, or one third of it where q, k and v are packed into one."""

    name: str
    index: int
    of: int
    key: str

    def cut(self, weight: Tensor) -> Tensor:
        """The part of the weight that this is."""
        return weight.chunk(self.of)[self.index]


def find_head(modules: Mapping[str, nn.Module], name: str | None) -> str:
    """The name of the head: the one given, else the last linear layer, else the last convolution."""
    if name is not None:
        if not isinstance(modules.get(name), (nn.Linear, *CONVOLUTIONS)):
            known = [n for n, m in modules.items() if isinstance(m, nn.Linear)][-3:]
            raise ValueError(f"head: {name!r} is no linear layer or convolution of the network; its last are {known}")
        return name
    for kinds in (nn.Linear, CONVOLUTIONS):
        found = [n for n, m in modules.items() if isinstance(m, kinds)]
        if found:
            return found[-1]
    raise ValueError("backbone: it has no linear layer and no convolution, so no head; end it in nn.Linear")


def find_parts(
    modules: Mapping[str, nn.Module],
    live: Mapping[str, nn.Parameter],
    of_head: Collection[str],
    rule: Rule | None,
    layers: str | Sequence[str],
) -> list[Part]:
    """The weights that a rule applies to, packed q, k and v apart."""
    if isinstance(layers, str) and layers not in LAYERS:
        raise ValueError(f"layers: {layers!r} is unknown; choose one of {', '.join(LAYERS)} or give a list of patterns")
    thirds = {f"{n}.in_proj_weight" for n, m in modules.items() if isinstance(m, nn.MultiheadAttention)}
    thirds &= live.keys()
    linear = {f"{n}.weight" for n, m in modules.items() if isinstance(m, nn.Linear)} | thirds
    thirds |= {n for n in linear if n.endswith("qkv.weight") and len(live[n]) % 3 == 0}
    convolutions = {f"{n}.weight" for n, m in modules.items() if isinstance(m, CONVOLUTIONS)}
    if rule is None:
        return []
    if isinstance(rule, Own):
        chosen = set(live)
    elif not isinstance(layers, str):
        for pattern in layers:
            if not any(fnmatchcase(name, pattern) for name in linear | convolutions):
                raise ValueError(
                    f"layers: {pattern!r} fits no weight; they are named like {sorted(linear | convolutions)[:3]}"
                )
        chosen = {name for name in linear | convolutions if any(fnmatchcase(name, p) for p in layers)}
    else:
        auto = convolutions if len(convolutions) > 1 else linear | convolutions
        chosen = {"auto": auto, "convolutions": convolutions, "linear": linear, "all": linear | convolutions}[layers]
    parts = []
    for name in live:
        if name in chosen and name not in of_head:
            count = 3 if name in thirds and not isinstance(rule, Own) else 1
            for i in range(count):
                key = name.replace(".", "/") + (f"/{'qkv'[i]}" if count == 3 else "")
                parts.append(Part(name, i, count, key))
    if not parts:
        raise ValueError(f"layers: {layers!r} is no layer of the network; use 'all', or rule=None for the head alone")
    return parts
