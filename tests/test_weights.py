import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clkit import modules, store, weights
from clkit.weights import add, combine, dot, equal, get_weights, lerp, norm, scale, set_weights, sub

laws = settings(max_examples=25, deadline=None)


def some(seed: int, *, dtype=torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g, dtype=dtype) for n, s in {"a": (3, 4), "b": (5,), "c": ()}.items()}


def close(a, b, tolerance=1e-12) -> bool:
    return all(torch.allclose(a[n], b[n], rtol=tolerance, atol=tolerance) for n in a)


class Tied(nn.Module):
    """Two names for one module, two for one parameter, a counter, a floating buffer and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 3)
        self.head.weight = self.first.weight
        self.register_buffer("none", torch.empty(0))
        self.register_buffer("nothing", torch.empty(0))


def test_every_storage_appears_once_and_counters_do_not():
    names = set(get_weights(Tied()))
    assert names == {
        "first.weight", "first.bias", "head.bias", "none", "nothing",
        *(f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
    }  # fmt: skip


class Curt(Tied):
    """Methods of `nn.Module` that take less, and give less, than those do."""

    def state_dict(self):
        return {"first": self.first.state_dict()}

    def requires_grad_(self, on):
        super().requires_grad_(on)

    def train(self, mode=True):
        super().train(mode)


def test_a_network_with_methods_of_its_own_has_the_same_weights():
    model = Curt()
    assert get_weights(model).keys() == get_weights(Tied()).keys()
    new = {n: torch.rand_like(t) for n, t in get_weights(model).items()}
    set_weights(model, new)
    assert equal(get_weights(model), new)


class Holds(nn.Module):
    """A network and a tensor beside it."""

    def __init__(self, tensor) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("held", tensor)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, dtype=torch.complex64), torch.ones(2).to_sparse(), torch.ones(2, device="meta"),
     torch.ones(2).to(torch.float8_e4m3fn)],
    ids=["complex", "sparse", "meta", "float8"],
)  # fmt: skip
def test_what_weights_cannot_carry_is_named_so_that_nothing_acts_on_a_part(tensor):
    for call in (get_weights, lambda net: set_weights(net, {})):
        with pytest.raises(ValueError, match=r"^held: torch\.\w+ is no dense tensor of real numbers"):
            call(Holds(tensor))
    with pytest.raises(ValueError, match=r"weight: torch\.float32 is no dense tensor .* meta device"):
        get_weights(nn.LazyLinear(2))


@pytest.mark.parametrize("mask", [torch.full((2, 2), -torch.inf).triu(1), torch.tensor(torch.inf)])
def test_a_buffer_that_holds_an_infinity_is_a_mask_and_no_weight(mask):
    assert (
        get_weights(Holds(mask)).keys()
        == get_weights(Holds(None)).keys()
        == get_weights(Holds(torch.ones(2).long())).keys()
    )
    assert "held" in get_weights(Holds(torch.tensor(torch.nan))) and "held" in get_weights(Holds(torch.zeros(2)))
    norm = nn.BatchNorm1d(1)
    norm.running_var.fill_(torch.inf)
    assert "running_var" in get_weights(norm)


@pytest.mark.parametrize("call", [lambda a, b: lerp(a, b, 0.25), lambda a, b: combine([a, b], [0.75, 0.25]), add, sub])
@pytest.mark.parametrize("first", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("second", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_result_has_the_first_dtype_and_is_rounded_once(call, first, second):
    a, b = ({n: t.to(d) for n, t in some(i).items()} for i, d in ((0, first), (1, second)))
    exact = call(*({n: t.double() for n, t in w.items()} for w in (a, b)))
    result = call(a, {n: t.requires_grad_() for n, t in b.items()})
    assert all(t.dtype == first for t in result.values())
    eps = max(torch.finfo(first).eps / 2, torch.finfo(torch.float32).eps)
    assert all(torch.allclose(result[n].double(), t, rtol=1.01 * eps, atol=1e-6) for n, t in exact.items())


def test_what_a_dtype_cannot_hold_is_named():
    big = {"w": torch.full((2,), 50_000.0, dtype=torch.float16)}
    far, calls = {"w": torch.full((2,), 1e6)}, [lambda: add(big, big), lambda: scale(big, 2)]
    calls += [lambda: lerp(big, scale(big, -1), -1.0), lambda: lerp(big, far, 1)]
    for call in calls:
        with pytest.raises(ValueError, match="w: too large for float16; give weights of a wider dtype"):
            call()


def test_get_after_set_is_what_was_set_and_parameters_stay_the_same_objects():
    model = Tied()
    parameters = list(model.parameters())
    new = {n: torch.rand_like(t) for n, t in get_weights(model).items()}
    set_weights(model, new)
    assert equal(get_weights(model), new)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert model.head.weight is model.first.weight


def test_copies_do_not_follow_the_model():
    model = nn.Linear(2, 2)
    before = get_weights(model)
    with torch.no_grad():
        model.weight.zero_()
    assert before["weight"].abs().sum() > 0


@laws
@given(st.integers(0, 99), st.integers(0, 99), st.floats(0, 1))
def test_lerp_has_its_ends_and_is_symmetric(i, j, t):
    a, b = some(i), some(j)
    assert equal(lerp(a, b, 0), a) and equal(lerp(a, b, 1), b)
    assert close(lerp(a, b, t), lerp(b, a, 1 - t))
    assert close(lerp(a, b, t), combine([a, b], [1 - t, t]))
    assert close(lerp(a, a, t), a)


@laws
@given(st.floats(0, 1))
def test_lerp_into_given_weights_writes_the_same_bits_there(t):
    a, b, out = some(0), some(1), some(2)
    before = {n: x.data_ptr() for n, x in out.items()}
    assert equal(lerp(a, b, t, out=out), lerp(a, b, t)) and equal(out, lerp(a, b, t))
    assert before == {n: x.data_ptr() for n, x in out.items()}


def test_lerp_returns_new_tensors_at_its_ends():
    a, b = some(0), some(1)
    lerp(a, b, 0)["a"].zero_()
    assert a["a"].abs().sum() > 0


@laws
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.integers(0, 99))
def test_combining_is_adding_scaled_weights(coefficients, seed):
    ws = [some(seed + i) for i in range(3)]
    expected = scale(ws[0], coefficients[0])
    for w, c in zip(ws[1:], coefficients[1:], strict=True):
        expected = add(expected, w, c)
    assert close(combine(ws, coefficients), expected)


@laws
@given(st.integers(0, 99), st.integers(0, 99))
def test_a_task_vector_leads_back(i, j):
    base, current = some(i), some(j)
    assert close(add(base, sub(current, base)), current)


@laws
@given(st.integers(0, 99), st.integers(0, 99), st.floats(-2, 2))
def test_the_inner_product_is_one(i, j, c):
    a, b = some(i), some(j)
    assert dot(a, b) == pytest.approx(dot(b, a))
    assert dot(scale(a, c), b) == pytest.approx(c * dot(a, b), abs=1e-12)
    assert norm(a) ** 2 == pytest.approx(dot(a, a))
    assert abs(dot(a, b)) <= norm(a) * norm(b) * (1 + 1e-12)


def test_inputs_are_not_changed():
    a, b = some(0), some(1)
    before = {n: t.clone() for n, t in a.items()}
    for result in (lerp(a, b, 0.5), combine([a, b], [1, 2]), add(a, b), sub(a, b), scale(a, 2)):
        assert result.keys() == a.keys()
    assert equal(a, before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, "missing \\['c'\\]"),
        ({**some(0), "d": torch.zeros(1)}, "unexpected \\['d'\\]"),
        ({**some(0), "b": torch.zeros(6)}, "shape of 'b': \\(6,\\) and \\(5,\\)"),
    ],
)
def test_unequal_weights_are_named(other, message):
    with pytest.raises(ValueError, match=message):
        lerp(some(0), other, 0.5)
    with pytest.raises(ValueError, match=message):
        combine([some(0), other], [1, 1])


def test_set_weights_writes_nothing_when_anything_is_wrong():
    model = nn.Linear(2, 2)
    before = get_weights(model)
    with pytest.raises(ValueError, match="shape of 'bias'"):
        set_weights(model, {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)})
    assert equal(get_weights(model), before)


def test_a_missing_coefficient_is_an_error():
    with pytest.raises(ValueError, match="1 for 2 weights"):
        combine([some(0), some(1)], [0.5])


def test_non_finite_weights_are_named():
    bad = {**some(0), "b": torch.tensor([0.0, float("nan")])}
    with pytest.raises(ValueError, match="current: 'b'"):
        weights.check_finite(bad, "current")
    weights.check_finite(some(0))


def test_saving_and_loading_give_the_same_bits(tmp_path):
    w = {n: t.to(d) for (n, t), d in zip(some(0).items(), (torch.float64, torch.float32, torch.bfloat16), strict=True)}
    store.save_tensors(tmp_path / "deep" / "w.safetensors", w, {"seed": 3, "name": "ü"})
    again, header = store.load_tensors(tmp_path / "deep" / "w.safetensors")
    assert equal(w, again) and header == {"seed": 3, "name": "ü"}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["w.safetensors"]


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "w.safetensors"
    store.save_tensors(path, some(0), {})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        store.load_tensors(path)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        store.load_tensors(tmp_path / "none")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "w.txt"
    path.write_text("old")

    def write(place):
        place.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk"):
        store.write_atomically(path, write)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_hooks_are_called_and_taken_away_even_after_an_error():
    net, seen = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), []
    with modules.hooked([(net[0], lambda _, __, out: seen.append(out.shape)), (net[1], lambda _, __, out: out + 1)]):
        doubled = net(torch.ones(4, 2))
    assert seen == [(4, 3)] and torch.equal(doubled, net(torch.ones(4, 2)) + 1)
    with pytest.raises(RuntimeError), modules.hooked([(net[0], lambda _, args: seen.append(args))], before=True):
        net(torch.ones(4, 5))
    assert len(seen) == 2 and not net[0]._forward_hooks and not net[0]._forward_pre_hooks
