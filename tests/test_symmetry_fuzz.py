"""Programs drawn at random: a random element of the derived symmetry keeps the function of every one.

A program draws some operations out of the table below, over a few tensors that are tied, copied, flipped and reshaped:
their hidden axes have the same sizes and meet often. A program that fails is shrunk and shown as source.
`CLKIT_DRAWS=3000 pytest tests/test_symmetry_fuzz.py` draws more. The slow test draws as many, each operation alone too,
and writes symmetry_operations.csv beside this file.
"""

import copy
import csv
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from clkit import alignment
from clkit.weights import get_weights

DRAWS = int(os.environ.get("CLKIT_DRAWS", "16"))
TABLE = Path(__file__).with_name("symmetry_operations.csv")
TOLERANCE = 1e-9
pytestmark = pytest.mark.filterwarnings("ignore")  # what is drawn may warn


@dataclass(frozen=True)
class Program:
    """A module as source: what it holds (name -> constructor), the lines of its forward, the values that it returns.

    `ends` are these values, and whether a weight of its own meets every element of one before the linear head.
    """

    held: dict[str, str]
    lines: tuple[str, ...]
    ends: tuple[tuple[str, bool], ...]
    example: str
    seed: int = 0
    operations: tuple[str, ...] = ()

    @cached_property
    def source(self) -> str:
        """The whole program: its values are flattened or weighed, and go through a linear head each."""
        with torch.no_grad():
            net, x = self._made(self._written(self.held, [v for v, _ in self.ends]))
            values = net(x)
        values = values if isinstance(values, tuple) else (values,)
        held, results = dict(self.held), []
        for k, ((v, weighed), value) in enumerate(zip(self.ends, values, strict=True)):
            made = v if value.is_floating_point() else f"{v}.double()"
            rows = int(value.shape[:1] == x.shape[:1] and value.ndim > 1)
            if weighed and value.ndim > 1 + rows:
                held[f"w{k}"] = f"nn.Parameter(torch.randn{tuple(value.shape[rows:])})"
                made, width = f"({made} * self.w{k}).flatten({1 + rows}).sum({1 + rows})", value.shape[rows]
            else:
                made = made if value.ndim == 1 + rows else f"{made}.flatten({rows})"
                width = value[0].numel() if rows else value.numel()
            held[f"head{k}"] = f"nn.Linear({width}, 3)"
            results.append(f"self.head{k}({made})")
        return self._written(held, results)

    def _written(self, held: dict[str, str], results: list[str]) -> str:
        body = [*self.lines, f"return {', '.join(results)}"]
        text = "\n".join([*body, *(value for name, value in held.items() if "." in name)])
        used = {k: value for k, value in held.items() if re.search(rf"self\.{k.partition('.')[0]}\b", text)}
        init = ["super().__init__()", *(f"self.{name} = {value}" for name, value in used.items())]
        head = ["class Net(nn.Module):", "    def __init__(self):", *(f"        {line}" for line in init), ""]
        return "\n".join([*head, "    def forward(self, x):", *(f"        {line}" for line in body)])

    def _made(self, source: str) -> tuple[nn.Module, Tensor]:
        scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            exec(source, scope)
            net = scope["Net"]().double().eval()
            generic(net)
            x = eval(self.example, scope)
        return net, x.double() if x.is_floating_point() else x

    def build(self) -> tuple[nn.Module, Tensor]:
        """The module in float64 with weights that are generic, and its input."""
        return self._made(self.source)

    def __str__(self) -> str:
        return f"{self.source}\n\nx = {self.example}"


@torch.no_grad()
def generic(net: nn.Module) -> None:
    """Random numbers for all that a module holds: no two alike, scales around one, statistics that are possible."""
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if tensor.is_floating_point():
            tensor.normal_(0.0, 1.0).mul_(0.6)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)


class Value(str):
    """A tensor in a program that is drawn: its name, and the shape it has."""

    shape: tuple[int, ...]

    def __new__(cls, name: str, shape: tuple[int, ...]) -> "Value":
        value = super().__new__(cls, name)
        value.shape = tuple(shape)
        return value


class Draw:
    """A program under way: it runs every line as soon as it is drawn, and forgets those that fail."""

    def __init__(self, seed: int) -> None:
        self.r, self.seed = random.Random(seed), seed
        self.n = self.r.choice([4, 4, 4, 6])
        self.net = nn.Module()
        self.held: dict[str, str] = {}
        self.lines: list[str] = []
        self.pool: list[Value] = []
        self.operations: list[str] = []
        self.scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "self": self.net}

    def use(self, constructor: str) -> str:
        """A module or parameter of the network: a new one, or one that is there (tied)."""
        same = [name for name, value in self.held.items() if value == constructor]
        if same and self.r.random() < 0.4:
            return f"self.{self.r.choice(same)}"
        name = f"m{len(self.held)}"
        made = eval(constructor, self.scope)
        if same and constructor.startswith("nn.Linear") and self.r.random() < 0.3:
            made.weight = self.look(f"self.{same[0]}.weight")
            self.held |= {name: constructor, f"{name}.weight": f"self.{same[0]}.weight"}
        setattr(self.net, name, made)
        self.net.double().eval()
        generic(self.net)
        self.held[name] = constructor
        return f"self.{name}"

    def weight(self, *shape: int) -> str:
        """A parameter of a shape, maybe that of a module."""
        same = [n for n, p in self.net.named_parameters() if tuple(p.shape) == shape]
        turned = [n for n, p in self.net.named_parameters() if tuple(p.shape)[::-1] == shape and len(shape) == 2]
        if same and self.r.random() < 0.4:
            return f"self.{self.r.choice(same)}"
        if turned and self.r.random() < 0.3:
            return f"self.{self.r.choice(turned)}.t()"
        kind = self.r.choice(["Parameter", "Parameter", "Parameter", "Buffer"])
        return self.use(f"nn.{kind}(torch.randn({', '.join(map(str, shape))}))")

    def look(self, expression: str) -> Any:
        with torch.no_grad():
            return eval(expression, self.scope)

    def add(self, line: str) -> Value:
        """Adds an expression or a statement; the new value, or that which it wrote to."""
        if not line.startswith("!"):
            made = self.look(line)
            many = isinstance(made, (tuple, list))
            tensors = list(made) if many else [made]
            assert all(isinstance(t, Tensor) and 0 < t.numel() <= 3000 and t.ndim < 7 for t in tensors)
            names = [f"v{len(self.pool) + k}" for k in range(len(tensors))]
            line = f"{', '.join(names)}{',' if many and len(names) == 1 else ''} = {line}"
            values = [Value(name, t.shape) for name, t in zip(names, tensors, strict=True)]
        else:
            values, line = [], line[1:]
        with torch.no_grad():
            exec(line, self.scope)
        self.lines.append(line)
        self.pool += values
        for value in self.pool:
            t = self.scope[value]
            if t.is_floating_point():
                assert bool(t.isfinite().all()) and float(t.abs().max()) < 1e5
        return self.r.choice(values) if values else self.pool[-1]

    # what operations ask for

    def dim(self, a: Value) -> int:
        """A dimension, seldom that of the batch."""
        dims = [d for d in range(len(a.shape)) if a.shape[d] > 1] or [0]
        return self.r.choice(dims if self.r.random() < 0.1 else [d for d in dims if d] or dims)

    def a(self, rank: int = 1, most: int = 9) -> Value:
        """A value of floats, a recent one more often; made of another one if none has the rank."""
        floats = [v for v in self.pool if self.scope[v].is_floating_point()]
        fits = [v for v in floats if rank <= len(v.shape) <= most]
        recent = [v for v in floats[-3:] if v in fits]
        if recent and self.r.random() < 0.7:
            return self.r.choice(recent)
        if fits and self.r.random() < 0.9:
            return self.r.choice(fits)
        value = self.r.choice(floats[-3:])
        while len(value.shape) < rank:
            value = self.wider(value)
        while len(value.shape) > most:
            value = self.add(f"{value}.flatten({self.r.choice([1, -2])})")
        return value

    def wider(self, value: Value) -> Value:
        k = self.r.choice([k for k in (2, 3, 4) if value.shape[-1] % k == 0 and value.shape[-1] > k] or [1])
        kinds = [f"{value}.unflatten(-1, ({k}, -1))", f"{value}.unsqueeze(-1) * {self.weight(self.n)}"]
        kinds += [f"{value}.unsqueeze(-2) + {self.weight(self.n, value.shape[-1])}"]
        return self.add(self.r.choice(kinds))

    def like(self, a: Value) -> str:
        """Something that fits to a value elementwise: the value itself in another order, an earlier one, a weight."""
        d = self.dim(a)
        n, end = a.shape[d], a.shape[-1]
        same = [v for v in self.pool if v.shape == a.shape and v != a and self.scope[v].is_floating_point()]
        alike = [v for v in self.pool if sorted(v.shape) == sorted(a.shape) and len(a.shape) > 1]
        broad = [v for v in self.pool if v != a and fits(v.shape, a.shape) and self.scope[v].is_floating_point()]
        made = [f"{a}.flip({d})", f"{a}.roll({self.r.randint(1, 2)}, {d})", self.weight(end)]
        if len(a.shape) > 1:
            made += [self.weight(*a.shape[-2:]), self.weight(a.shape[-2], 1)]
        if len(a.shape) > 1 and a.shape[-1] == a.shape[-2]:
            made += [f"{a}.mT"] * 2
        choices = [same, same, broad, made, made, [f"{v}.transpose(-1, -2)" for v in alike], [f"{a}.mean({d}, True)"]]
        choices += [[f"torch.arange({end}, device=x.device)", f"torch.linspace(0.5, 1.5, {n})" if d else f"{a}"]]
        return self.r.choice(self.r.choice([c for c in choices if c]))

    def mask(self, a: Value) -> str:
        """Booleans for a value."""
        end = a.shape[-1]
        flags = ", ".join(self.r.choice(["True", "False"]) for _ in range(end - 1))
        bools = [v for v in self.pool if self.scope[v].dtype == torch.bool and fits(v.shape, a.shape)]
        kinds = [f"({a} > {self.like(a)})", f"({a} < 0.2)", f"(torch.arange({end}) < {max(end // 2, 1)})", *bools * 2]
        kinds += [f"torch.tensor([True{', ' + flags if flags else ''}])", f"({self.like(a)} > 0)"]
        if len(a.shape) > 1:
            kinds += [f"torch.ones({a.shape[-2]}, {end}, dtype=torch.bool).tril()"]
            kinds += [self.use(f"nn.Buffer(torch.ones({a.shape[-2]}, {end}).tril().bool())")] * (self.r.random() < 0.3)
        return self.r.choice(kinds)

    def indices(self, n: int, k: int | None = None) -> list[int]:
        """Indices below n: in order, in another one, some twice, some not at all."""
        order = list(range(n))
        self.r.shuffle(order)
        kinds = [order, [*order, order[0]], order[: max(n // 2, 1)], order[1:] + order[:1], [order[0]] * n]
        found = self.r.choice(kinds)
        return (found * n)[:k] if k else found

    def tokens(self, a: Value, n: int) -> str:
        """Whole numbers below n made of a value, or of nothing."""
        kinds = [f"({a} * 3).clamp(0, {n - 1}).long()", f"({a} > 0).long()", f"{a}.argmax({self.dim(a)}) % {n}"]
        kinds += [f"torch.tensor({self.indices(n)})", f"({a}.abs() * 2).long() % {n}"]
        kinds += [f"{v}.abs() % {n}" for v in self.pool if self.scope[v].dtype == torch.int64]
        return self.r.choice(kinds)

    def part(self, a: Value) -> str:
        """A view of a value: some of it."""
        d, m = self.dim(a), len(a.shape)
        n = a.shape[d]
        i, k = self.r.randrange(n), max(n // 2, 1)
        before = ":, " * d
        kinds = [f"{a}[{before}:{k}]", f"{a}[{before}{k}:]", f"{a}[{before}{i}]", f"{a}[{before}::2]", f"{a}"]
        kinds += [
            f"{a}.chunk(2, {d})[{self.r.randint(0, 1)}]",
            f"{a}.select({d}, {i})",
            f"{a}.narrow({d}, {n - k}, {k})",
        ]
        kinds += [
            f"{a}[..., {self.r.randrange(a.shape[-1])}]",
            f"{a}[0]",
            f"{a}.transpose(0, {d})",
            f"{a}.flatten()[:2]",
        ]
        if n % 2 == 0:
            kinds += [f"{a}.unflatten({d}, (2, -1)).select({d}, {self.r.randint(0, 1)})"]
        if m > 1:
            kinds += [f"{a}.diagonal(0, -2, -1)", f"{a}[..., :{k}].mT", f"{a}[..., 0, :1]"]
        if "f" in a:
            kinds += [f"{a}.view(-1)[::2]"]
        return self.r.choice(kinds)

    def number(self) -> float:
        return self.r.choice([0.0, 0.5, 1.0, 2.0, -1.0])

    def image(self) -> Value:
        """A value (batch, channels, height, width)."""
        fit = [v for v in self.pool if len(v.shape) == 4 and self.scope[v].is_floating_point() and min(v.shape[2:]) > 1]
        if fit and self.r.random() < 0.7:
            return self.r.choice(fit[-3:])
        a = self.a(2, 3)
        if len(a.shape) == 3 and a.shape[-1] == 4 and self.r.random() < 0.5:
            return self.add(f"{a}.unflatten(-1, (2, 2))")
        if len(a.shape) == 3 and a.shape[1] == 4 and self.r.random() < 0.5:
            return self.add(f"{a}.mT.unflatten(-1, (2, 2))")
        if len(a.shape) == 2 and self.r.random() < 0.5:
            return self.add(f"{a}[:, :, None, None] * {self.weight(a.shape[1], 2, 2)}")
        out = 2 * self.n
        return self.add(f"{self.use(f'nn.Linear({a.shape[-1]}, {4 * out})')}({a}).view(-1, {out}, 2, 2)")

    def groups(self, *widths: int) -> int:
        return self.r.choice([g for g in range(1, max(widths) + 1) if all(w % g == 0 for w in widths)])

    def same(self, a: Value) -> Value:
        """A value of the same shape, often another."""
        return self.r.choice([v for v in self.pool if v.shape == a.shape and self.scope[v].is_floating_point()])

    def operation(self, name: str, tries: int = 12) -> bool:
        """Draws arguments for an operation until one line goes through."""
        for _ in range(tries):
            kept = len(self.lines), len(self.pool)
            try:
                with torch.random.fork_rng([]):
                    self.add(OPERATIONS[name](self))
                self.operations.append(name)
                return True
            except Exception:
                self.lines, self.pool = self.lines[: kept[0]], self.pool[: kept[1]]
                self.rerun()
        return False

    def any(self) -> str:
        """An operation of the table; those that mostly pin come less often."""
        return self.r.choices([*OPERATIONS], [weight(name) for name in OPERATIONS])[0]

    def rerun(self) -> None:
        with torch.no_grad():
            for line in self.lines:
                exec(line, self.scope)

    def begin(self, tied: bool = True) -> None:
        """The input, and some values of it; in some programs their units are `tied` in pairs."""
        n, batch, kind = (
            self.n,
            self.r.choice([3, 3, 3, 3, 2, 1, self.n]),
            self.r.choice(["rows", "rows", "sequence", "image", "tokens"]),
        )
        t = self.r.choice([n, n, 2])
        shape = {"rows": (batch, 5), "sequence": (batch, t, 5), "image": (batch, 2, 4, 4), "tokens": (batch, t)}[kind]
        call = f"torch.randn{shape}" if kind != "tokens" else f"torch.randint(0, 9, {shape})"
        self.example = call
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            x = eval(call)
        self.scope["x"] = x.double() if x.is_floating_point() else x
        wide = self.r.choice([n, n, 2 * n])
        makers = {
            "rows": f"nn.Linear(5, {wide})",
            "sequence": f"nn.Linear(5, {wide})",
            "image": f"nn.Conv2d(2, {wide}, {self.r.choice([1, 3])}, stride=2)",
            "tokens": f"nn.Embedding(9, {wide})",
        }
        for _ in range(self.r.choice([1, 1, 2, 2, 3])):
            end = self.r.choice(["", ".relu()", ".tanh()", ".flatten(2).mean(2)" if kind == "image" else ""])
            a = self.add(f"{self.use(makers[kind])}(x){end}")
            if tied and self.r.random() < 0.4:
                d = self.r.choice([1, -1])
                turned = self.r.choice([f"{a}.flip({d})", f"{a}.roll(2, {d})", f"{a}.mT", f"{a}.roll(1, {d})"])
                if self.look(turned).shape == a.shape:
                    self.add(
                        f"{a} {self.r.choice('*+')} {turned}{self.r.choice(['', f' * {self.weight(a.shape[-1])}'])}"
                    )

    def program(self) -> Program:
        """Ends in a linear head for every value that nothing reads."""
        text = "\n".join(line.partition(" = ")[2] or line for line in self.lines)
        unread = [v for v in self.pool if not re.search(rf"\b{v}\b", text)] or self.pool[-1:]
        ends = tuple((v, self.r.random() < 0.7) for v in unread[-5:])
        return Program(dict(self.held), tuple(self.lines), ends, self.example, self.seed, tuple(self.operations))


def fits(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    """Is a shape broadcast to another one?"""
    try:
        return tuple(torch.broadcast_shapes(small, large)) == tuple(large)
    except RuntimeError:
        return False


Operation = Callable[[Draw], str]
OPERATIONS: dict[str, Operation] = {}  # a name -> an expression, or "!" and a statement


def operation(function: Operation) -> Operation:
    OPERATIONS[function.__name__.rstrip("_")] = function
    return function


def unary(*expressions: str) -> None:
    """Operations on one value `a` along a dimension `d` of size `n`."""
    for expression in expressions:
        name = expression.partition(":")[0]

        def draw(g: Draw, expression: str = expression) -> str:
            a = g.a()
            d = g.dim(a)
            n = a.shape[d]
            values = {"a": a, "d": d, "n": n, "i": g.r.randrange(n), "c": g.number(), "b": ""}
            body = expression.partition(":")[2].strip()
            if "{b}" in body:
                values["b"] = g.like(a)
            if "{m}" in body:
                values["m"] = g.mask(a)
            if "{s}" in body:
                values["s"] = g.same(a)
            return body.format(**values)

        OPERATIONS[name] = draw


unary(  # each element by itself, or with one that it meets
    "add: {a} + {b}",
    "sub: {a} - {b}",
    "mul: {a} * {b}",
    "mul of two: {a} * {s}",
    "square of a flip: {a} * {a}.flip({d})",
    "square of a transpose: {a} * {a}.transpose(-1, -2)",
    "div: {a} / (1 + {b}.abs())",
    "rsub: 1 - {a}",
    "maximum: torch.maximum({a}, {b} + 0 * {a})",
    "where: torch.where({m}, {a}, {b})",
    "where zero: torch.where({m}, {a}, 0.0)",
    "masked_fill: {a}.masked_fill({m}, {c})",
    "mask times: {a} * {m}",
    "greater: {a} > {b}",
    "equal: ({a} == {b}) + {a}",
    "lerp: torch.lerp({a}, {s}, 0.3)",
    "addcmul: torch.addcmul({a}, {s}, {a}.flip({d}))",
    "relu: F.relu({a})",
    "gelu: F.gelu({a})",
    "tanh: {a}.tanh()",
    "sin: {a}.sin()",
    "negative: -{a}",
    "clamp: {a}.clamp(-0.5, 0.5)",
    "round: {a}.round() + {a}",
    "add a position: {a} + torch.arange({a}.shape[-1])",
    "dropout: F.dropout({a}, 0.5, False)",
    "glu: F.glu({a}, {d})",
    "gated: {a}.chunk(2, {d})[0] * {a}.chunk(2, {d})[1].sigmoid()",
)
unary(  # elements at known places
    "flip: {a}.flip({d})",
    "roll: {a}.roll(1, {d})",
    "roll of all: {a}.roll(1)",
    "flip of all: {a}.flip(*range(1, {a}.ndim))",
    "tensor_split: torch.tensor_split({a}, [1], {d})",
    "squeeze: {a}.unsqueeze({d}).squeeze({d})",
    "block_diag: torch.block_diag({a}, {s})",
    "as_strided: {a}.contiguous().as_strided(({a}.shape[0], 2), (1, 1))",
    "halves: {a}.narrow({d}, 0, {n} // 2)",
    "rot90: {a}.rot90(1, (-2, -1))",
    "select: {a}.select({d}, {i})",
    "chunk: {a}.chunk(2, {d})",
    "unbind: {a}.unbind({d})",
    "split: {a}.split([1, {n} - 1], {d})",
    "swapped halves: torch.cat({a}.chunk(2, {d})[::-1], {d})",
    "odd and even: torch.cat([{a}[..., 1::2], {a}[..., ::2]], -1)",
    "cat with itself: torch.cat([{a}, {a}], {d})",
    "cat with its negative: torch.cat([{a}, -{a}], {d})",
    "cat with its flip: torch.cat([{a}, {a}.flip({d})], {d})",
    "cat: torch.cat([{a}, {s}], {d})",
    "stack: torch.stack([{a}, {s}], {d})",
    "stack last: torch.stack([{a}, {a}.flip({d})], -1)",
    "repeat: {a}.repeat(*[2 if k == {d} else 1 for k in range({a}.ndim)])",
    "repeat_interleave: {a}.repeat_interleave(2, {d})",
    "tile: {a}.tile(2)",
    "expand: {a}.unsqueeze({d}).expand(*[-1 if k != {d} else 2 for k in range({a}.ndim + 1)])",
    "expand a slice: {a}.narrow({d}, {i}, 1).expand_as({a})",
    "unflatten: {a}.unflatten({d}, (2, -1))",
    "unflatten inner: {a}.unflatten({d}, (-1, 2))",
    "flatten: {a}.flatten(1)",
    "flatten all: {a}.flatten()",
    "reshape: {a}.reshape({a}.shape[0], -1, 2)",
    "reshape around: {a}.reshape({a}.shape[0], -1, {a}.shape[1])",
    "transpose: {a}.transpose(-1, {d})",
    "mT: {a}.mT",
    "movedim: {a}.movedim({d}, 1)",
    "unsqueeze: {a}.unsqueeze({d})",
    "diagonal: {a}.diagonal(0, -2, -1)",
    "diag_embed: {a}.diag_embed()",
    "tril: {a}.tril()",
    "triu: {a}.triu(1)",
    "unfold: {a}.unfold({d}, 2, 1)",
    "unfold apart: {a}.unfold({d}, 2, 2)",
    "heads back and forth: {a}.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)",
    "rotary by halves: {a} * 0.6 + torch.cat([-{a}.chunk(2, -1)[1], {a}.chunk(2, -1)[0]], -1) * 0.8",
    "rotary by pairs: {a} * 0.6 + torch.stack([-{a}[..., 1::2], {a}[..., ::2]], -1).flatten(-2) * 0.8",
    "rotary by positions: {a} * torch.arange({a}.shape[-2]).cos()[:, None]"
    " + torch.stack([-{a}[..., 1::2], {a}[..., ::2]], -1).flatten(-2) * torch.arange({a}.shape[-2]).sin()[:, None]",
)
unary(  # one number everywhere, or along an axis
    "ones_like: torch.ones_like({a})",
    "zeros_like: torch.zeros_like({a}) + 0.5",
    "new_full: {a}.new_full({a}.shape, 0.7)",
    "new_zeros: {a}.new_zeros({a}.shape[-1])",
    "mean as it was: {a}.mean({d}, keepdim=True).expand_as({a})",
    "mean as it was, a copy: {a}.mean({d}, keepdim=True).expand_as({a}).clone()",
    "first as it was, repeated: {a}.narrow({d}, 0, 1).repeat_interleave({n}, {d})",
    "clone: {a}.clone()",
    "eye: torch.eye({n}).to({a}) + {a}",
    "arange: torch.arange({n}).to({a})",
)
unary(  # along a dimension
    "softmax: {a}.softmax({d})",
    "log_softmax: {a}.log_softmax({d})",
    "masked softmax: {a}.masked_fill({m}, -9.0).softmax({d})",
    "cumsum: {a}.cumsum({d})",
    "cumprod: {a}.tanh().cumprod({d})",
    "logcumsumexp: {a}.logcumsumexp({d})",
    "cummax: {a}.cummax({d})[0]",
    "sort: {a}.sort({d})[0]",
    "sort down: {a}.sort({d}, descending=True)",
    "argsort: {a}.argsort({d})",
    "topk: {a}.topk(2, {d})[0]",
    "topk indices: {a}.topk(2, {d})[1]",
    "argmax: {a}.argmax({d})",
    "argmax one hot: F.one_hot({a}.argmax({d}), {n}).to({a})",
    "median: {a}.contiguous().median({d})[0]",
    "sum: {a}.sum({d})",
    "sum of all: {a}.sum() + {a}",
    "mean kept: {a} - {a}.mean({d}, keepdim=True)",
    "std: {a}.std({d}, keepdim=True) + {a}",
    "var: {a}.var({d})",
    "prod: {a}.prod({d})",
    "amax: {a}.amax({d})",
    "max: {a}.max({d}, keepdim=True)[0]",
    "max and where: {a}.max({d})",
    "logsumexp: {a}.logsumexp({d})",
    "norm: {a}.norm(dim={d}, keepdim=True) * {a}",
    "normalize: F.normalize({a}, dim={d})",
    "any: {m}.any(-1)",
    "diff: {a}.diff(dim={d})",
    "fft: torch.fft.fft({a}, dim={d}).abs()",
    "cosine: F.cosine_similarity({a}, {s}, dim={d})",
    "std_mean: torch.std_mean({a}, {d}, keepdim=True)",
    "trace: {a}.flatten(1).trace() + {a}",
    "renorm: {a}.renorm(2, {d}, 1.0)",
    "nan_to_num: {a}.nan_to_num(0.5)",
    "cumsum of a mask: {a} * {m}.cumsum(-1)",
    "distance: F.pairwise_distance({a}, {s}, keepdim=True)",
    "cross_entropy: F.cross_entropy({a}, {s}.softmax(1), reduction='none')",
    "var_mean: torch.var_mean({a}, {d})",
    "aminmax: torch.aminmax({a}, dim={d})",
    "count: {a} * {m}.sum()",
)
unary(  # products
    "matmul itself: {a} @ {a}.mT",
    "matmul of two: {a} @ {s}.mT",
    "matmul turned: {a}.mT @ {s}",
    "matmul square: {a} @ {s}",
    "gram: torch.einsum('...i,...j->...ij', {a}, {s})",
    "gram of a flip: torch.einsum('...i,...j->...ij', {a}, {a}.flip(-1))",
    "inner: ({a} * {s}).sum({d})",
    "einsum trace: torch.einsum('...ii->...i', {a})",
    "cdist: torch.cdist({a}, {s})",
    "bmm: torch.bmm({a}, {s}.mT)",
    "outer: torch.outer({a}.flatten(), {s}.flatten()[:3])",
    "kron: torch.kron({a}, {s}[..., :2])",
    "baddbmm: torch.baddbmm({a}.mean(-1, True), {a}, {a}.mT)",
    "mv: {a}[0] @ {a}[0].flatten()[:{a}.shape[-1]]",
    "chained: {a} @ {a}.mT @ {s}",
    "softmax times: ({a} @ {s}.mT).softmax(-1) @ {a}",
    "causal softmax times: ({a} @ {s}.mT).masked_fill(torch.ones({a}.shape[-2], {a}.shape[-2]).triu(1).bool(),"
    " float('-inf')).softmax(-1) @ {a}",
    "tensordot: torch.tensordot({a}, {s}, dims=([-1], [-1]))",
    "addmm: torch.addmm({a}, {a} @ {a}.T, {s})",
    "inverse: torch.linalg.inv({a} @ {a}.mT + 3 * torch.eye({a}.shape[-2]).to({a}))",
    "matrix_exp: torch.linalg.matrix_exp(({a} @ {a}.mT).tanh() * 0.1)",
)


@operation
def linear(g: Draw) -> str:
    a = g.a()
    return f"{g.use(f'nn.Linear({a.shape[-1]}, {g.r.choice([g.n, g.n, 2 * g.n, a.shape[-1]])})')}({a})"


@operation
def linear_along(g: Draw) -> str:
    a = g.a(2)
    return f"{g.use(f'nn.Linear({a.shape[-2]}, {g.r.choice([g.n, a.shape[-2]])})')}({a}.mT).mT"


@operation
def residual(g: Draw) -> str:
    a = g.a()
    first = g.use(f"nn.Linear({a.shape[-1]}, {g.n})")
    return f"{a} + {g.use(f'nn.Linear({g.n}, {a.shape[-1]})')}({first}({a}).relu())"


@operation
def linear_tied(g: Draw) -> str:
    a = g.a()
    return f"F.linear({a}, {g.weight(g.n, a.shape[-1])})"


@operation
def linear_there_and_back(g: Draw) -> str:
    a = g.a()
    w = g.weight(g.n, a.shape[-1])
    return f"F.linear(F.linear({a}, {w}).relu(), {w}.t())"


@operation
def linear_by_a_value(g: Draw) -> str:
    a, b = g.a(), g.a(2, 2)
    return f"F.linear({a}, {b})"


@operation
def bilinear(g: Draw) -> str:
    a = g.a()
    return f"{g.use(f'nn.Bilinear({a.shape[-1]}, {a.shape[-1]}, {g.n})')}({a}, {g.same(a)})"


@operation
def matmul(g: Draw) -> str:
    a = g.a()
    return f"{a} @ {g.weight(a.shape[-1], g.n)}"


@operation
def einsum(g: Draw) -> str:
    a, n = g.a(2), g.n
    i, j = a.shape[-2:]
    return g.r.choice(
        [
            f"torch.einsum('...ij,jk->...ik', {a}, {g.weight(j, n)})",
            f"torch.einsum('...ij,ij->...i', {a}, {g.weight(i, j)})",
            f"torch.einsum('...ij,ijk->...ik', {a}, {g.weight(i, j, n)})",
            f"torch.einsum('...ij,ik->...kj', {a}, {g.weight(i, n)})",
            f"torch.einsum('...ij,...kj->...ik', {a}, {g.same(a)})",
            f"torch.einsum('...ij,jkl->...ikl', {a}, {g.weight(j, 2, n)})",
            f"torch.einsum('...ij,...ij->...ij', {a}, {g.same(a)})",
            f"torch.einsum('...ij->...ji', {a})",
            f"torch.einsum('b...j,b...k->bjk', {a}, {g.same(a)})",
        ]
    )


@operation
def weights(g: Draw) -> str:
    w = g.weight(g.n, g.n)
    kinds = [f"{w} * {w}.t()", f"{w} + {g.weight(g.n)}", f"{w}.relu()", f"{w}.softmax(-1)", f"{w} @ {w}"]
    kinds += [f"{g.weight(g.n)}.flip(0)", f"{w}.flip(0) * {w}", f"torch.cat([{w}, {g.weight(g.n, g.n)}], 1)"]
    return g.r.choice(kinds)


@operation
def by_a_value_of_weights(g: Draw) -> str:
    a = g.a()
    return f"{a} {g.r.choice('*+')} {g.add(OPERATIONS['weights'](g))}"


@operation
def prelu(g: Draw) -> str:
    a = g.a(2)
    return f"F.prelu({a}, {g.weight(a.shape[1])})"


@operation
def constants(g: Draw) -> str:
    a = g.a()
    n = a.shape[-1]
    numbers = g.r.choice([[1.5] * n, [g.number() for _ in range(n)], [2.0] * (n // 2) + [1.0] * (n - n // 2)])
    return f"{a} {g.r.choice('*+')} torch.tensor({numbers})"


@operation
def index_select(g: Draw) -> str:
    a = g.a()
    d = g.dim(a)
    held = g.r.choice(
        [f"torch.tensor({g.indices(a.shape[d])})", g.use(f"nn.Buffer(torch.tensor({g.indices(a.shape[d])}))")]
    )
    return g.r.choice([f"{a}.index_select({d}, {held})", f"{a}[{':, ' * d}{held}]"])


@operation
def advanced_index(g: Draw) -> str:
    a = g.a(2)
    d, n = g.dim(a), a.shape[-1]
    i, j = g.indices(n, 3), g.indices(a.shape[-2], 3)
    kinds = [f"{a}[{':, ' * d}{g.indices(a.shape[d])}]", f"{a}[..., {j}, {i}]", f"{a}[..., torch.tensor({i})]"]
    kinds += [f"{a}[..., [[0, 1], [1, 0]]]", f"{a}[:, {g.indices(a.shape[1], 2)}, ..., {g.indices(n, 2)}]"]
    kinds += [f"{a}[..., {a}.argmax(-1).flatten()[:2] % {n}]", f"{a}[torch.arange({a.shape[0]}), ..., {i[0]}]"]
    kinds += [f"{a}[..., None, {i[0]}]", f"{a}[..., {i}, None]", f"{a}[{g.tokens(g.a(), a.shape[0])}]"]
    return g.r.choice(kinds)


@operation
def boolean_index(g: Draw) -> str:
    a = g.a()
    d = g.dim(a)
    flags = [True, *(g.r.random() < 0.5 for _ in range(a.shape[d] - 1))]
    return f"{a}[{':, ' * d}torch.tensor({flags})]"


@operation
def gather(g: Draw) -> str:
    a = g.a()
    d = g.dim(a)
    n = a.shape[d]
    kinds = [f"{a}.gather({d}, {a}.argsort({d}))", f"torch.gather({a}, {d}, ({g.same(a)} > 0).long())"]
    kinds += [f"{a}.take_along_dim({g.same(a)}.argmax({d}, keepdim=True), {d})"]
    kinds += [f"{a}.take(torch.tensor({g.indices(n)}))"]
    kinds += [f"{a}.gather(-1, torch.tensor({g.indices(a.shape[-1])}).expand(*{a}.shape[:-1], -1))"]
    return g.r.choice(kinds)


@operation
def scatter(g: Draw) -> str:
    a = g.a()
    d = g.dim(a)
    n = a.shape[d]
    i = f"torch.tensor({g.indices(n, n)})"
    end = f"torch.tensor({g.indices(a.shape[-1], a.shape[-1])}).expand({a}.shape)"
    s = g.same(a)
    return g.r.choice(
        [
            f"{a}.scatter({d}, {s}.argsort({d}), {a})",
            f"{a}.scatter({d}, {s}.argmax({d}, keepdim=True), {g.number()})",
            f"{a}.scatter_add(-1, {end}, {s})",
            f"{a}.index_add({d}, {i}, {s})",
            f"{a}.index_copy({d}, torch.tensor({g.indices(n)[:1]}), {s}.narrow({d}, 0, 1))",
            f"{a}.index_fill({d}, torch.tensor({g.indices(n)[:2]}), {g.number()})",
            f"torch.zeros_like({a}).scatter_add({d}, ({s} > 0).long(), {a})",
            f"{a}.select_scatter({s}.select({d}, 0), {d}, {n - 1})",
            f"{a}.slice_scatter({s}.narrow({d}, 0, 1), {d}, {n - 1}, {n})",
            f"torch.scatter_reduce({a}, -1, {end}, {s}, 'amax')",
            f"{a}.masked_scatter({g.mask(a)}, {s})",
        ]
    )


@operation
def slices(g: Draw) -> str:
    return g.part(g.a())


@operation
def slices_together(g: Draw) -> str:
    a = g.a()
    d = g.dim(a)
    n = a.shape[d]
    k = n // 2
    op = g.r.choice("*+-")
    return f"{a}.narrow({d}, 0, {k}) {op} {g.same(a)}.narrow({d}, {n - k}, {k})"


@operation
def embedding(g: Draw) -> str:
    a, n = g.a(), g.r.choice([2, g.n])
    return f"{g.use(f'nn.Embedding({n}, {g.n})')}({g.tokens(a, n)})"


@operation
def embedding_of_a_value(g: Draw) -> str:
    table, a = g.a(2, 2), g.a()
    return f"F.embedding({g.tokens(a, table.shape[0])}, {table})"


@operation
def embedding_bag(g: Draw) -> str:
    a = g.a(2, 2)
    return f"{g.use(f'nn.EmbeddingBag(3, {g.n})')}({g.tokens(a, 3)})"


@operation
def one_hot(g: Draw) -> str:
    a, n = g.a(), g.r.choice([2, g.n])
    return f"F.one_hot({g.tokens(a, n)}, {n}).to({a})"


@operation
def bucketize(g: Draw) -> str:
    a = g.a()
    return f"torch.bucketize({a}, torch.tensor([-0.5, 0.0, 0.5]).to({a}))"


# writes in place, to a value, a copy, or a tensor of one number


def target(g: Draw) -> Value:
    a = g.a()
    if g.r.random() < 0.6:
        kinds = [f"{a}.clone()", f"torch.ones_like({a})", f"{a}.new_full({a}.shape, 0.5)", f"torch.zeros_like({a})"]
        kinds += [f"{a} + 0", f"torch.empty_like({a}).fill_(1.0)", f"{a}.mean({g.dim(a)}, True).repeat_interleave("
                  f"{a.shape[g.dim(a)]}, {g.dim(a)})", f"{a}.new_zeros({a}.shape)"]  # fmt: skip
        return g.add(g.r.choice(kinds))
    own = {t.untyped_storage().data_ptr() for t in [*g.net.parameters(), *g.net.buffers(), g.scope["x"]]}
    assert g.scope[a].untyped_storage().data_ptr() not in own
    return a


def in_place(name: str, *statements: str) -> None:
    """Writes to a part `p` of a value: `b` is something of the part's shape."""

    def draw(g: Draw) -> str:
        a = target(g)
        part = g.part(a)
        shape = tuple(g.look(part).shape)
        others = [v for v in g.pool if fits(v.shape, shape) and v != a and g.scope[v].is_floating_point()]
        fitting = [v for v in g.pool if v.shape == a.shape and g.scope[v].is_floating_point()]
        parts = [part.replace(a, v, 1) for v in fitting]
        b = g.r.choice(g.r.choice([c for c in (others, parts, [g.weight(*shape[-1:])], ["0.5"]) if c]))
        d = g.dim(a)
        values = {"p": part, "b": b, "c": g.number(), "a": a, "d": d, "n": a.shape[d], "m": f"({part} > 0.1)"}
        statement = g.r.choice(statements)
        if "{i}" in statement:
            values["i"] = str(g.indices(a.shape[d])[:2])
        if "{k}" in statement:
            values["k"] = g.mask(a)
        if "{s}" in statement:
            values["s"] = g.same(a)
        return "!" + statement.format(**values)

    OPERATIONS[name] = draw


in_place("mul_", "{p}.mul_({c})", "{p}.mul_({b})")
in_place("add_", "{p}.add_({c})", "{p}.add_({b})", "{a}.add_({s})")
in_place("clamp_", "{p}.clamp_(max=0.5)", "{p}.clamp_(min=0.2)")
in_place("copy_", "{p}.copy_({b})", "{p}.copy_({b} * 1)")
in_place("zero_", "{p}.zero_()", "{p}.fill_({c})", "{p}.relu_()", "{p}.tanh_()")
in_place("masked_fill_", "{p}.masked_fill_({m}, {c})", "{a}.masked_fill_({k}, {c})", "{a}[{m}] = {c}")
in_place("index_put", "{a}[{i}] = {c}", "{a}[:, {i}] = {c}", "{a}[:, {i}] *= 0.5", "{a}[..., {i}] += 1.0")
in_place("index_add_", "{a}.index_add_({d}, torch.arange({n}), {s})", "{a}.index_fill_({d}, torch.tensor({i}), {c})")
in_place("index_copy_", "{a}.index_copy_({d}, torch.arange({n}).flip(0), {s} * 1)")
in_place("assign", "{a}[:, 0] = {a}[:, 1]", "{a}[..., 0] = {s}[..., 1]", "{a}[:, :2] = {s}[:, -2:] * 1")
in_place(
    "assign a row", "{a}[..., -1:] = {a}[..., :1] * 2", "{a}[0] = {a}[1]", "{a}[..., ::2] = {a}[..., ::2].flip(-1)"
)
in_place(
    "scatter_",
    "{a}.scatter_({d}, {s}.argmax({d}, keepdim=True), {c})",
    "{a}.scatter_add_({d}, ({s} > 0).long(), {s} * 1)",
)
in_place("tril_", "{a}.tril_()", "{a}.fill_diagonal_({c})", "{a}.diagonal(0, -2, -1).mul_({c})")
in_place("out", "torch.add({s}, {s}, out={a})", "{p}.addcmul_({p}, {b})")


# layers


@operation
def conv1d(g: Draw) -> str:
    a = g.a(3, 3)
    c, out = a.shape[1], g.r.choice([g.n, a.shape[1], 2 * g.n])
    return f"{g.use(f'nn.Conv1d({c}, {out}, {g.r.choice([1, 3])}, padding=1, groups={g.groups(c, out)})')}({a})"


@operation
def conv2d(g: Draw) -> str:
    a = g.image()
    c, out = a.shape[1], g.r.choice([g.n, a.shape[1], 2 * g.n])
    return f"{g.use(f'nn.Conv2d({c}, {out}, {g.r.choice([1, 3])}, padding=1, groups={g.groups(c, out)})')}({a})"


@operation
def conv_transpose(g: Draw) -> str:
    one = g.r.random() < 0.5
    a = g.a(3, 3) if one else g.image()
    c, out = a.shape[1], g.r.choice([g.n, a.shape[1], 2 * g.n])
    kind = f"nn.ConvTranspose{1 if one else 2}d"
    return f"{g.use(f'{kind}({c}, {out}, 2, stride={g.r.choice([1, 2])}, groups={g.groups(c, out)})')}({a})"


@operation
def depthwise(g: Draw) -> str:
    a = g.image()
    return f"{g.use(f'nn.Conv2d({a.shape[1]}, {a.shape[1]}, 3, padding=1, groups={a.shape[1]})')}({a})"


@operation
def conv_tied(g: Draw) -> str:
    a = g.a(3, 3)
    groups = g.groups(a.shape[1], g.n)
    return f"F.conv1d({a}, {g.weight(g.n, a.shape[1] // groups, g.r.choice([1, 2]))}, groups={groups})"


@operation
def conv_by_a_value(g: Draw) -> str:
    a, w = g.a(3, 3), g.a(3, 3)
    return f"F.conv1d({a}, {w}, padding=1)"


@operation
def pixel_shuffle(g: Draw) -> str:
    return f"F.pixel_shuffle({g.image()}, 2)"


@operation
def pixel_unshuffle(g: Draw) -> str:
    return f"F.pixel_unshuffle({g.image()}, 2)"


@operation
def channel_shuffle(g: Draw) -> str:
    a = g.a(3)
    kinds = [f"F.channel_shuffle({a}, 2)", f"{a}.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)"]
    return g.r.choice(kinds)


@operation
def unfold_image(g: Draw) -> str:
    a = g.image()
    folded = f"F.unfold({a}, 2)"
    return g.r.choice([folded, folded, f"F.fold({folded}, {a.shape[2:]}, 2)"])


@operation
def pool(g: Draw) -> str:
    a = g.a(3, 3) if g.r.random() < 0.5 else g.image()
    k = len(a.shape) - 2
    kinds = [f"F.max_pool{k}d({a}, 2)", f"F.avg_pool{k}d({a}, 2)", f"F.adaptive_avg_pool{k}d({a}, 1)"]
    kinds += [f"F.adaptive_max_pool{k}d({a}, 2)", f"F.max_pool{k}d({a}, 2, return_indices=True)"]
    kinds += [f"F.avg_pool{k}d({a}, 3, 1, 1)", f"F.lp_pool{k}d({a}.abs() + 0.1, 2, 2)"]
    return g.r.choice(kinds)


@operation
def pad(g: Draw) -> str:
    a = g.a(2)
    sizes = g.r.choice([(1, 0), (1, 1), (0, 2), (1, 1, 1, 0), (0, 0, 1, 1), (-1, 0)])
    mode = g.r.choice(["", f", value={g.number()}", ", mode='reflect'", ", mode='replicate'", ", mode='circular'"])
    return f"F.pad({a}, {sizes}{mode})"


@operation
def upsample(g: Draw) -> str:
    if g.r.random() < 0.4:
        return f"F.interpolate({g.a(3, 3)}, scale_factor=2, mode='{g.r.choice(['nearest', 'linear', 'area'])}')"
    mode = g.r.choice(["nearest", "bilinear", "bicubic", "area", "nearest-exact"])
    return f"F.interpolate({g.image()}, scale_factor=2, mode='{mode}')"


@operation
def grid_sample(g: Draw) -> str:
    a = g.image()
    return f"F.grid_sample({a}, {a}.tanh().permute(0, 2, 3, 1)[..., :2], align_corners=False)"


@operation
def batch_norm(g: Draw) -> str:
    a = g.a(2, 4)
    return f"{g.use(f'nn.BatchNorm{max(len(a.shape) - 2, 1)}d({a.shape[1]})')}({a})"


@operation
def batch_norm_without_statistics(g: Draw) -> str:
    a = g.a(2, 3)
    return f"{g.use(f'nn.BatchNorm1d({a.shape[1]}, track_running_stats=False)')}({a})"


@operation
def instance_norm(g: Draw) -> str:
    a = g.a(3, 4)
    statistics = g.r.choice(["", ", track_running_stats=True"])
    return f"{g.use(f'nn.InstanceNorm{len(a.shape) - 2}d({a.shape[1]}, affine=True{statistics})')}({a})"


@operation
def layer_norm(g: Draw) -> str:
    a = g.a()
    shape = a.shape[-1:] if g.r.random() < 0.7 else a.shape[-2:]
    return f"{g.use(f'nn.LayerNorm({shape})')}({a})"


@operation
def rms_norm(g: Draw) -> str:
    a = g.a()
    return f"{g.use(f'nn.RMSNorm({a.shape[-1]})')}({a})"


@operation
def group_norm(g: Draw) -> str:
    a = g.a(2)
    return f"{g.use(f'nn.GroupNorm({g.groups(a.shape[1])}, {a.shape[1]})')}({a})"


@operation
def local_response_norm(g: Draw) -> str:
    return f"F.local_response_norm({g.a(3)}, 2)"


@operation
def in_training(g: Draw) -> str:
    a = g.a()
    c = a.shape[-1]
    other = g.r.choice([a, g.same(a), f"{a}.flip({g.dim(a)})"])
    return f"{a} + {g.use(f'nn.Linear({c}, {c})')}({other}) if self.training else {a} * 1"


@operation
def weight_norm(g: Draw) -> str:
    a = g.a()
    kind = g.r.choice(["weight_norm", "spectral_norm"])
    return f"{g.use(f'nn.utils.parametrizations.{kind}(nn.Linear({a.shape[-1]}, {g.n}))')}({a})"


@operation
def attention(g: Draw) -> str:
    a = g.a(3)
    q, k, v = a, g.same(a), g.same(a)
    if g.r.random() < 0.5 and a.shape[-1] % 2 == 0:
        q, k, v = (f"{t}.unflatten(-1, (2, -1)).transpose(-2, -3)" for t in (q, k, v))
    rows = g.look(q).shape[-2]
    masks = ["", "", ", is_causal=True", f", attn_mask={g.weight(rows, rows)}"]
    masks += [f", attn_mask=torch.ones({rows}, {rows}).tril().bool()", f", attn_mask=torch.arange({rows}) < {rows - 1}"]
    masks += [f", attn_mask=torch.arange({rows}).to({a})[:, None] - torch.arange({rows})", ", scale=0.3"]
    masks += [f", attn_mask={m}" for m in g.pool if fits(m.shape, (*g.look(q).shape[:-1], rows))]
    return f"F.scaled_dot_product_attention({q}, {k}, {v}{g.r.choice(masks)})"


@operation
def attention_to_one_number(g: Draw) -> str:
    a = g.a(3)
    v = g.r.choice(
        [f"torch.ones_like({a})", f"{a}.mean(-2, True).expand_as({a})", f"{a}.mean(-1, True).expand_as({a})"]
    )
    rows = a.shape[-2]
    mask = g.r.choice(["", ", is_causal=True", f", attn_mask=torch.ones({rows}, {rows}).tril()"])
    return f"F.scaled_dot_product_attention({a}, {g.same(a)}, {v}{mask})"


@operation
def grouped_attention(g: Draw) -> str:
    a = g.a(3, 3)
    c, n = a.shape[-1], g.n
    q, k, v = (g.use(f"nn.Linear({c}, {m})") for m in (4 * n, 2 * n, 2 * n))
    q, k, v = (f"{m}({a}).unflatten(-1, (-1, {n})).transpose(1, 2)" for m in (q, k, v))
    causal = g.r.choice(["", ", is_causal=True"])
    if g.r.random() < 0.5:
        k, v = (f"{t}.repeat_interleave(2, 1)" for t in (k, v))
        return f"F.scaled_dot_product_attention({q}, {k}, {v}{causal}).transpose(1, 2).flatten(2)"
    return f"F.scaled_dot_product_attention({q}, {k}, {v}{causal}, enable_gqa=True).transpose(1, 2).flatten(2)"


@operation
def multihead_attention(g: Draw) -> str:
    a = g.a(3, 3)
    net = g.use(f"nn.MultiheadAttention({a.shape[-1]}, {g.groups(a.shape[-1])}, batch_first=True)")
    return f"{net}({a}, {g.same(a)}, {a})[0]"


@operation
def transformer(g: Draw) -> str:
    a = g.a(3, 3)
    c = a.shape[-1]
    first = g.r.choice(["True", "False"])
    layer = f"nn.TransformerEncoderLayer({c}, {g.groups(c)}, {g.n}, 0.0, batch_first=True, norm_first={first})"
    return f"{g.use(layer)}({a})"


@operation
def recurrent(g: Draw) -> str:
    a = g.a(3, 3)
    kind = g.r.choice(["LSTM", "GRU", "RNN"])
    more = g.r.choice(["", ", bidirectional=True", ", num_layers=2"])
    end = g.r.choice(["[0]", "[0]", "[0][:, -1]", "[1]" if kind != "LSTM" else "[1][0]"])
    return f"{g.use(f'nn.{kind}({a.shape[-1]}, {g.n}, batch_first=True{more})')}({a}){end}"


@operation
def cell(g: Draw) -> str:
    a, h = g.a(2, 2), g.a(2, 2)
    kind = g.r.choice(["GRU", "RNN", "LSTM"])
    net = g.use(f"nn.{kind}Cell({a.shape[-1]}, {h.shape[-1]})")
    return f"{net}({a}, {h})" if kind != "LSTM" else f"{net}({a}, ({h}, {g.same(h)}))[{g.r.randint(0, 1)}]"


@operation
def recurrence(g: Draw) -> str:
    a = g.a(2, 2)
    c = a.shape[-1]
    return f"({g.use(f'nn.Linear({c}, {c})')}({a}) + {g.weight(c, c)} @ {g.weight(c)}).tanh() * {a}"


@operation
def experts(g: Draw) -> str:
    a = g.a()
    c = a.shape[-1]
    gates = f"{g.use(f'nn.Linear({c}, 3)')}({a}).softmax(-1)"
    return f"torch.einsum('...e,eoi,...i->...o', {gates}, {g.weight(3, g.n, c)}, {a})"


@operation
def routed(g: Draw) -> str:
    a = g.a()
    c = a.shape[-1]
    gate = f"F.one_hot({g.use(f'nn.Linear({c}, 2)')}({a}).argmax(-1), 2).to({a})"
    one, two = g.use(f"nn.Linear({c}, {g.n})"), g.use(f"nn.Linear({c}, {g.n})")
    return f"(torch.stack([{one}({a}), {two}({a})], -1) * {gate}[..., None, :]).sum(-1)"


SELDOM = set(
    "rot90 stack unfold split diagonal diag_embed tril triu cumsum cumprod logcumsumexp cummax sort argsort topk "
    "argmax median diff fft cosine aminmax var_mean max cdist outer kron tensordot inverse matrix_exp bilinear "
    "boolean_index gather scatter bucketize index_put index_copy_ scatter_ tril_ out grid_sample pixel_shuffle "
    "unfold_image upsample local_response_norm recurrent select unbind".split()
)  # what mostly pins: a program of many of these has nothing left that moves
PLAIN = set("relu gelu tanh sin negative clamp round dropout rsub clone new_zeros".split())


def weight(name: str) -> float:
    """How often an operation is drawn: those that tie and write more, those that pin or change nothing less."""
    if name.split()[0] in SELDOM:
        return 0.2
    if name.endswith("_") or name.startswith(("assign", "cat", "square", "repeat", "mul", "weights")):
        return 2.0
    return 0.4 if name.split()[0] in PLAIN else 1.0


def drawn(seed: int, only: str | None = None) -> Program:
    """A program of up to eight operations; of one, if it is named."""
    g = Draw(seed)
    g.begin(tied=only is None)
    count = 1 if only else g.r.choice([1, 2, 2, 3, 3, 4, 5, 8])
    while len(g.operations) < count:
        if not g.operation(only or g.any()) and only:
            raise ValueError(f"{only}: no line went through")
    return g.program()


def tame(program: Program) -> bool:
    """Whether a program runs, and numbers that are a little different make a result that is."""
    try:
        net, x = program.build()
        with torch.no_grad():
            first = flat(net(x))
            for _, p in net.named_parameters():
                p.mul_(1 + 1e-13 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
            again = flat(net(x))
    except Exception:
        return False
    whole = bool(first.isfinite().all()) and float(first.abs().max()) > 1e-3
    return whole and float((first - again).abs().max() / first.abs().max()) < 1e-11


def flat(result: Any) -> Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([p.flatten() / p.abs().max() for p in parts])


def fault(program: Program) -> tuple[str, float]:
    """What is wrong with a program's symmetry ("" if nothing is, "refused" if clkit says so), the share that moves."""
    net, x = program.build()
    try:
        symmetry = alignment.symmetry(net, x)
    except ValueError as error:
        return ("refused" if str(error).startswith("model: ") else f"ValueError: {error}"), 0.0
    except Exception as error:
        return f"{type(error).__name__}: {error}", 0.0
    for k in range(3):
        change = symmetry.verify(net, dtype=torch.float64, generator=torch.Generator().manual_seed(k)).change
        if not change < TOLERANCE:
            return f"change: {change:.1e}", symmetry.share
    if "self.training" in program.source:  # what only the training graph uses was derived from it
        for k in range(3):
            moved = alignment.random_permutations(symmetry, torch.Generator().manual_seed(k))
            with torch.no_grad():
                one, other = (flat(functional_call(copy.deepcopy(net).train(), w, (x,))) for w in
                              (get_weights(net), alignment.permute(symmetry, moved, get_weights(net))))  # fmt: skip
            if not float((one - other).abs().max()) < TOLERANCE:
                return "change in training", symmetry.share
    return "", symmetry.share


def kind(fault: str) -> str:
    return fault.partition(":")[0]


def shrunk(program: Program, fails: Callable[[Program], bool]) -> Program:
    """A program with fewer lines and results that still fails; a line that goes is replaced by an earlier value."""
    while smaller := next((c for c in _smaller(program) if tame(c) and fails(c)), None):
        program = smaller
    return program


def _smaller(program: Program) -> Iterator[Program]:
    for k in range(len(program.ends) if len(program.ends) > 1 else 0):
        yield replace(program, ends=(*program.ends[:k], *program.ends[k + 1 :]))
    for k in reversed(range(len(program.lines))):
        targets, body = re.fullmatch(r"((?:v\d+, )*v\d+)?,?(?: = )?(.*)", program.lines[k]).groups()  # pyright: ignore
        targets = re.findall(r"v\d+", targets or "") if " = " in program.lines[k] and targets else []
        earlier = [v for line in program.lines[:k] for v in re.findall(r"^v\d+", line)]
        for name in dict.fromkeys([*re.findall(r"v\d+", body), *earlier[::-1][:3]] if targets else [""]):
            there = re.compile(rf"\b({'|'.join(targets) or 'nothing'})\b")
            lines = (*program.lines[:k], *(there.sub(name, line) for line in program.lines[k + 1 :]))
            ends = dict.fromkeys((there.sub(name, v), weighed) for v, weighed in program.ends)
            yield replace(program, lines=lines, ends=tuple(ends))


def test_no_program_changes():
    shares, refused = [], 0
    for seed in range(DRAWS):
        if not tame(program := drawn(seed)):
            continue
        wrong, share = fault(program)
        refused += wrong == "refused"
        shares.append(share)
        if wrong and wrong != "refused":
            least = shrunk(program, lambda p, wrong=wrong: kind(fault(p)[0]) == kind(wrong))
            pytest.fail(f"seed {seed}: {wrong}\n\n{least}")
    assert len(shares) > 0.9 * DRAWS and refused <= 0.1 * DRAWS
    assert sum(shares) / len(shares) > 0.25  # a fault shows only where something moves


def test_a_fault_is_found_and_shrunk():
    """A network whose units may not move is caught: a symmetry that moves them anyway changes its function."""
    program = Program({"m0": "nn.Linear(5, 4)"}, ("v0 = self.m0(x)", "v1 = v0.relu()", "v2 = v1.cumsum(1)"),
                      (("v0", True), ("v2", True)), "torch.randn(3, 5)")  # fmt: skip
    assert fault(program)[0] == ""
    free = replace(program, lines=program.lines[:2], ends=(("v1", True),))
    symmetry = alignment.symmetry(*free.build())
    net, _ = replace(program, ends=(("v2", True),)).build()
    assert symmetry.verify(net, dtype=torch.float64).change > 1e-3
    least = shrunk(program, lambda p: "cumsum" in p.source)
    assert least.lines == ("v0 = self.m0(x)", "v2 = v0.cumsum(1)") and least.ends == (("v2", True),)


@pytest.mark.slow
def test_three_thousand_programs_and_the_share_moved_by_operation():
    """Writes symmetry_operations.csv: for each operation, the share moved in programs of it alone, and with others."""
    alone: dict[str, list[float]] = {name: [] for name in OPERATIONS}
    within: dict[str, list[float]] = {name: [] for name in OPERATIONS}
    wrong = {}
    for name in OPERATIONS:
        for seed in range(100):
            if len(alone[name]) < 3 and tame(program := drawn(seed, name)):
                found, share = fault(program)
                if found != "refused":
                    alone[name].append(share)
                if found not in ("", "refused"):
                    wrong[name, seed] = f"{found}\n{program}"
    for seed in range(max(DRAWS, 3000)):
        if tame(program := drawn(seed)):
            found, share = fault(program)
            for name in set(program.operations) if found != "refused" else ():
                within[name].append(share)
            if found not in ("", "refused"):
                wrong["", seed] = f"{found}\n{program}"
    with TABLE.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["operation", "share_alone", "programs", "share_within"])
        for name in sorted(OPERATIONS):
            means = [f"{sum(v) / len(v):.2f}" if v else "" for v in (alone[name], within[name])]
            table.writerow([name, means[0], len(within[name]), means[1]])
    assert not wrong, "\n\n".join(f"{name} {seed}: {text}" for (name, seed), text in wrong.items())
