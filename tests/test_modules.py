"""Networks as people bring them: frozen parts, wrappers, ways of their own, and what is tried before training."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import toys
from clkit import curvature, data, models
from clkit.alignment import align, permute, symmetry
from clkit.consolidation import EMA, HCMM, SFA, CLeWI, Merged, Merging, NoConsolidation, WiSEFT
from clkit.data import Examples
from clkit.evaluation import evaluate, outputs
from clkit.learners import ER as Replay
from clkit.learners import EWC, LEARNERS, MAS, ICaRL, Learner
from clkit.modules import frozen_modules, frozen_tensors, scratch_copy, side_pass, training_mode, unwrapped
from clkit.normalization import batchnorms, refresh, repair
from clkit.tangent import Linearized
from clkit.training import Training
from clkit.weights import equal, get_weights, lerp, set_weights
from toys import quick

LEARNER = pytest.mark.parametrize("name", [name for name in LEARNERS if name != "per task"])
MERGERS = [CLeWI(0.3, align="weights"), SFA(0.25), WiSEFT(), Merging("average"), Merging("ties"), EMA(),
           HCMM(importance="fisher", refresh=True)]  # fmt: skip


@pytest.fixture(scope="module")
def toy():
    return toys.stream(3, rows=9)


def made(name: str) -> Learner:
    kind = LEARNERS[name]
    if name == "data buffer":
        return kind(share=0.5)
    return kind(**({"memory": 9} if kind.remembers else {}), **({"fit_epochs": 2} if name == "GDumb" else {}))


class Net(nn.Module):
    """A body that is frozen in evaluation mode, under more BatchNorm that is not."""

    def __init__(self, classes: int = 6):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
            self.neck = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
            self.head = nn.Linear(8, classes)
        self.body.requires_grad_(False)
        self.body[1].running_mean.fill_(0.1)
        self.body.eval()

    def forward(self, x):
        return self.head(self.neck(self.body(x)))


class TestFrozen:
    def test_the_rule(self):
        net = Net()
        assert frozen_modules(net) == set(net.body.modules())
        assert frozen_modules(net.eval()) == set(net.body.modules())  # by its parameters, dropout within it too
        net.train()
        assert frozen_modules(net) == set()
        net.neck[1].eval()
        assert frozen_modules(net) == {net.neck[1]}
        assert frozen_modules(net.requires_grad_(False).eval()) == set() == frozen_tensors(net)

    def test_training_mode_asks_the_module_itself(self):
        class Own(Net):
            def train(self, mode=True):  # pyright: ignore
                super().train(mode)
                self.neck[1].eval()

        net = Own()
        training_mode(net, frozen_modules(net))
        assert net.training and net.neck.training and not (net.neck[1].training or net.body[3].training)

    @LEARNER
    @pytest.mark.parametrize("whole", [False, True], ids=["a part", "all"])
    def test_what_is_frozen_keeps_its_bits_through_every_learner(self, toy, name, whole):
        net = Net()
        if whole:
            net.eval()
        training = Training(2, 4, 0.05, momentum=0.9, weight_decay=0.1)
        result = quick(toy, made(name), SFA(0.25, refresh=True), model=net, training=training)
        start, end = get_weights(net), get_weights(result.model)
        for key, tensor in start.items():
            assert torch.equal(tensor, end[key]) == key.startswith("body"), key

    @pytest.mark.parametrize("rule", MERGERS, ids=lambda rule: type(rule).__name__)
    def test_and_through_every_merge(self, toy, rule):
        net, training = Net(), Training(2, 4, 0.05, optimizer="adamw")
        net.head.bias.requires_grad_(False).copy_(torch.linspace(0.1, 0.7, 6) / 3)
        result = quick(toy, Replay(9), rule, model=net, training=training)
        kept = {name: tensor for name, tensor in get_weights(net).items() if name in frozen_tensors(net)}
        assert len(kept) == 7
        for weights in (*result.weights, *result.trained):
            assert equal(kept, {name: weights[name] for name in kept})

    def test_re_estimation_leaves_frozen_statistics(self):
        net, x = Net(), torch.randn(20, 6) + 3
        before = get_weights(net)
        assert batchnorms(net) == ("neck.1",) == batchnorms(net.eval())
        after = refresh(net, before, x)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"neck.1.running_mean", "neck.1.running_var"}
        other = {n: t + 0.1 if n.startswith(("neck", "head")) else t for n, t in before.items()}
        repaired = repair(net, lerp(before, other, 0.5), ends=(before, other), t=0.5, inputs=x)
        assert all(torch.equal(repaired[n], before[n]) for n in before if n.startswith("body"))

    def test_a_scratch_copy_is_in_evaluation_mode_and_knows_what_is_frozen(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        net[2].eval()
        copied = copy.deepcopy(scratch_copy(net))
        assert not any(m.training for m in copied.modules()) and frozen_modules(copied) == {copied[2]}
        assert batchnorms(copied) == batchnorms(net) == ("1",)
        frozen = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).requires_grad_(False))  # in training mode: it moves
        assert batchnorms(scratch_copy(frozen)) == ("1",)

    def test_units_that_a_frozen_tensor_holds_stay_and_others_move(self):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 3))
        for by in ("weights", "activations"):
            for frozen in (False, True):
                net[0].requires_grad_(not frozen)
                group = symmetry(net, torch.zeros(2, 6))
                order = {g: torch.arange(part.units).flip(0) for g, part in group.groups.items()}
                moved = permute(group, order, get_weights(net))
                match = align(group, net, get_weights(net), moved, torch.randn(50, 6), by=by)
                first, second = (match.unmoved[g] for g in sorted(group.groups, key=lambda g: group.groups[g].units))
                assert second < 1 and (first == 1) == frozen

    def test_a_side_pass_moves_nothing(self):
        net = Net().train()
        training_mode(net, [])
        before = get_weights(net)
        side_pass(net, torch.randn(5, 6)).sum().backward()
        assert equal(before, get_weights(net))


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(2, 5, batch_first=True)

    def forward(self, x):
        return self.cell(x.unflatten(1, (3, 2)))[0][:, -1]


class Dropping(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


class TestOneByOne:
    """What vmap cannot do is done in a loop."""

    def importances(self, net, x):
        g = torch.Generator().manual_seed(0)
        yield curvature.fisher(net, x, generator=g)
        yield curvature.fisher(net, x, labels="exact", chunk=3)
        yield curvature.sensitivity(net, x)

    def test_it_equals_vmap_where_both_work(self, monkeypatch):
        net, x = models.mlp(toys.stream()), torch.randn(7, 6)
        fast = [*self.importances(net, x)]

        def fail(*_):
            raise RuntimeError("vmap: no batching rule")

        monkeypatch.setattr(torch.func, "vmap", lambda *_, **__: fail)
        for a, b in zip(fast, self.importances(net, x), strict=True):
            assert a.keys() == b.keys() and all(torch.allclose(t, b[n], atol=1e-6) for n, t in a.items())

    @pytest.mark.parametrize("middle", [Branching, lambda: Checkpointed(nn.Linear(5, 5)), Dropping, nn.Identity])
    def test_networks_that_cannot_be_batched(self, middle):
        net = nn.Sequential(Recurrent() if middle is nn.Identity else nn.Linear(6, 5), middle(), nn.Linear(5, 3))
        for found in self.importances(net, torch.randn(4, 6)):
            assert found.keys() == dict(net.named_parameters()).keys()
            assert all(t.isfinite().all() for t in found.values()) and found["2.weight"].any()

    def test_a_network_that_takes_no_single_row_is_named(self, toy):
        net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 6))
        for rule in (EWC(), MAS()):
            with pytest.raises(ValueError, match=r"model: Sequential has no gradients for one example alone .* '1'"):
                quick(toy, rule, model=net)


WRAPPERS = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled and parallel": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
    "within": lambda net: net.__setattr__("neck", torch.compile(nn.DataParallel(net.neck), backend="eager")) or net,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
class TestWrapped:
    def test_weights_have_plain_names(self, wrap):
        plain, wrapped = Net(), wrap(Net())
        assert list(get_weights(wrapped)) == list(get_weights(plain))
        other = {name: tensor + 1 for name, tensor in get_weights(plain).items()}
        set_weights(wrapped, other)
        assert equal(get_weights(wrapped), other) and not hasattr(unwrapped(wrapped).neck, "_orig_mod")

    @pytest.mark.parametrize("name", ["EWC", "LwF", "iCaRL", "BiC", "MIR", "GDumb"])
    def test_a_run_is_that_of_the_module(self, toy, wrap, name):
        plain, wrapped = (quick(toy, made(name), SFA(1.0, refresh=True), model=net) for net in (Net(), wrap(Net())))
        assert equal(plain.weights[-1], wrapped.weights[-1]) and plain.config == wrapped.config

    def test_diagnostics_work_on_it(self, toy, wrap):
        plain, wrapped, x = Net().eval(), wrap(Net()), torch.randn(9, 6)
        weights = get_weights(plain)
        assert np.array_equal(evaluate(plain, toy).loss, evaluate(wrapped, toy).loss)
        assert torch.equal(outputs(plain, weights, x), outputs(wrapped, weights, x))
        assert equal(refresh(plain, weights, x), refresh(wrapped, weights, x))
        assert equal(curvature.fisher(plain, x, labels="exact"), curvature.fisher(wrapped, x, labels="exact"))
        assert torch.equal(models.features(plain, x), models.features(wrapped, x))
        assert torch.equal(Linearized(plain)(x), Linearized(wrapped)(x))
        assert len(symmetry(wrapped, x).groups) == len(symmetry(plain, x).groups)


class Odd(nn.Module):
    def __init__(self, change, net=None):
        super().__init__()
        self.net, self.change = net or models.mlp(toys.stream()), change

    def forward(self, x):
        return self.change(self.net(x))


class Uncopied(Net):
    def __deepcopy__(self, memo):
        raise RuntimeError("a handle to hardware")


class TestTrial:
    """Before the first task."""

    @pytest.mark.parametrize(
        ("model", "error", "message"),
        [
            (Odd(lambda out: (out, out)), TypeError, "model: it returns a tuple; give a module .* logits alone"),
            (Odd(lambda out: {"logits": out}), TypeError, "model: it returns a dict"),
            (Odd(lambda out: out[:, None]), ValueError, r"model: it returns \(2, 1, 6\) .* of shape \(2, classes\)"),
            (Odd(lambda out: out.argmax(1)), ValueError, "model: it returns .*int64"),
            (Odd(lambda out: out[:, :3]), ValueError, "model: it has 3 outputs for 6 classes"),
            (Odd(lambda out: out.detach()), ValueError, "model: it fails in training mode .* does not require grad"),
            (Odd(lambda out: out / 0), FloatingPointError, "model: its logits in evaluation mode are not finite"),
            (nn.Linear(5, 6), ValueError, r"model: it fails in evaluation mode on 2 prepared rows, \(2, 6\)"),
            (Uncopied(), TypeError, "model: Uncopied cannot be copied .*a handle to hardware.*give a factory"),
            (lambda stream: Net(), TypeError, "model: the factory cannot be called as model"),
            (lambda stream, seed: None, TypeError, "model: the factory gave None"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit_is_named(self, toy, model, error, message):
        begun = []

        class Watching(Learner):
            def begin_task(self, model, task):
                begun.append(task)

        with pytest.raises(error, match=message):
            quick(toy, Watching(), model=model)
        assert not begun

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ((ICaRL(9),), "runs no nn.Linear"),
            ((Replay(9), CLeWI()), r"model: units of Bilinear cannot be permuted, as CLeWI.* does .*; use align=None"),
            ((Learner(), HCMM(importance="fisher")), "projection: no linear layer"),
        ],
    )
    def test_what_a_rule_needs_of_a_network_is_tried(self, toy, rules, message):
        class Bilinear(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(6, 6) / 6)

            def forward(self, x):
                return x @ self.w if x.sum() > -1e9 else x

        with pytest.raises(ValueError, match=message):
            quick(toy, *rules, model=Bilinear())
        quick(toy, rules[0] if len(rules) > 1 else None, CLeWI(align=None), model=Bilinear())

    def test_nothing_is_drawn_and_nothing_moves(self, toy):
        """Dropout and BatchNorm in the network; the result is that of a run without the trial."""
        net, more = Net().train(), {"training": Training(1, 4)}
        before = get_weights(net)
        tried = quick(toy, EWC(), model=net, **more)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("clkit.training.trial.attempt", lambda loop: None)
            untried = quick(toy, EWC(), model=net, **more)
        assert equal(tried.weights[-1], untried.weights[-1]) and equal(before, get_weights(net))

    @pytest.mark.parametrize("labels", ["all", "seen", "task"])
    @LEARNER
    def test_outputs_beyond_the_classes_never_count_and_never_win(self, toy, name, labels):
        wide, narrow = Net(9), Net(6)
        with torch.no_grad():
            wide.head.bias[6:] = 100.0
            for own, other in zip(narrow.head.parameters(), wide.head.parameters(), strict=True):
                own.copy_(other[:6])
        a, b = (quick(toy, made(name), model=net, training=Training(1, 4, labels=labels)) for net in (wide, narrow))
        assert np.allclose(a.losses, b.losses, atol=1e-5) and np.array_equal(a.accuracy, b.accuracy)
        assert np.allclose(evaluate(wide, toy).loss, evaluate(narrow, toy).loss)

    def test_ways_of_its_own(self, toy):
        class Own(Net):
            device = property(lambda self: next(self.parameters()).device)

            def to(self, where):  # pyright: ignore
                super().to(where)

            def train(self, mode=True):  # pyright: ignore
                super().train(mode)

            def eval(self):  # pyright: ignore
                super().eval()

            def forward(self, x, *, gain=1.0):
                return super().forward(x) * gain

        class Fixed(Own):
            def to(self):  # pyright: ignore
                raise AssertionError

        plain = quick(toy, EWC(), SFA(refresh=True), model=Net())
        for kind in (Own, Fixed):
            assert equal(quick(toy, EWC(), SFA(refresh=True), model=kind()).weights[-1], plain.weights[-1])


def test_a_memory_that_gives_batchnorm_one_row_is_named(toy):
    with pytest.raises(ValueError, match="memory: in task 0 one row of it alone went through BatchNorm"):
        quick(toy, LEARNERS["GDumb"](memory=1, fit_epochs=1), model=Net())
    with pytest.raises(ValueError, match="memory: in task 1 one row of it alone went through BatchNorm"):
        quick(toy, LEARNERS["GEM"](memory=1), model=Net())


class TestInputs:
    @pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32])
    @pytest.mark.parametrize("own", [torch.float32, torch.float64])
    def test_they_come_in_the_dtype_of_the_model(self, toy, given, own):
        def cast(part):
            return Examples(part.x.to(given), part.y)

        stream = replace(toy, tasks=tuple(data.core.changed(task, cast) for task in toy))
        net = Net().to(own)
        result = quick(stream, ICaRL(9), CLeWI(align=None), model=net)
        assert {tensor.dtype for tensor in result.weights[-1].values()} == {own}
        assert np.isfinite(evaluate(net, stream).loss).all()

    @pytest.mark.parametrize("part", ["train", "test"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_named(self, toy, part, value):
        x = getattr(toy[1], part).x.clone()
        x[[2, 5], 1] = value
        task = replace(toy[1], **{part: Examples(x, getattr(toy[1], part).y)})
        stream = replace(toy, tasks=(toy[0], task, toy[2]))
        with pytest.raises(
            ValueError, match=rf"stream: 2 of \d+ {part} rows of task 1 .* NaN or an infinity, row 2 the"
        ):
            quick(stream)

    def test_numbers_from_numpy(self, toy):
        training = Training(np.int64(1), np.int32(4), np.float32(0.05))
        a, b = (quick(toy, Replay(np.int64(9)), training=training, seed=s) for s in (np.uint8(3), 3))
        assert equal(a.weights[-1], b.weights[-1]) and a.config == b.config

    def test_seeds_have_an_end(self, toy):
        quick(toy, seed=2**63)
        with pytest.raises(ValueError, match="seed: 1180591620717411303424; give a whole number"):
            quick(toy, seed=2**70)


@pytest.mark.parametrize("loss", [None, 0.5, torch.zeros(3, requires_grad=True), torch.zeros(())])
def test_a_loss_that_no_step_can_go_down_along_is_refused(toy, loss):
    class Odd(Learner):
        def loss(self, model, batch):
            return loss

    with pytest.raises(TypeError, match=r"learner: the loss of .*give a tensor with one number"):
        quick(toy, Odd())


class TestConsolidations:
    @pytest.mark.parametrize(
        ("answer", "error", "message"),
        [
            (lambda w: w, TypeError, "consolidation: .* returned .*; let it return a Merged"),
            (lambda w: Merged({}, w), ValueError, "consolidation: train of .* different names"),
            (lambda w: Merged(w, {n: t[None] for n, t in w.items()}), ValueError, "deploy of .* the shape of"),
        ],
    )
    def test_what_is_no_merge_is_named(self, toy, answer, error, message):
        class Wrong(NoConsolidation):
            def due(self, progress):
                return progress.end

            def __call__(self, context):
                return answer(context.current)

        with pytest.raises(error, match=message):
            quick(toy, consolidation=Wrong(), model=Net())


class Twice(nn.Module):
    """One module under two names, and a weight that is tied."""

    def __init__(self, named: bool):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6))
            self.body[3].weight = self.body[0].weight
            self.head = nn.Linear(6, 6)
        if named:
            self.again, self.last = self.body, self.head

    def forward(self, x):
        return self.head(self.body(x))


@LEARNER
def test_a_module_under_two_names_is_one_module(toy, name):
    one, two = (quick(toy, made(name), WiSEFT(), model=Twice(named)) for named in (False, True))
    assert np.array_equal(one.accuracy, two.accuracy)
    assert all(equal(a, b) for a, b in zip(one.weights, two.weights, strict=True))


def test_what_a_module_under_two_names_is_called_with_is_not_left_behind():
    net, x = Twice(True), torch.randn(4, 6)
    before, own = get_weights(net), [*net.parameters(), *net.buffers()]
    changed = {name: tensor + 1 for name, tensor in before.items()}
    found = outputs(net, changed, x)
    side_pass(net.train(), x)
    assert all(a is b for a, b in zip(own, [*net.parameters(), *net.buffers()], strict=True))
    assert equal(get_weights(net), before)
    set_weights(net, changed)
    assert torch.equal(found, net.eval()(x))


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_network_is_refused_in_one_sentence(toy):
    net = torch.jit.trace(nn.Linear(6, 6), torch.zeros(2, 6))
    for given in (net, nn.Sequential(net)):
        with pytest.raises(TypeError, match=r"(?s)model: .*; give a module, .*, unscripted"):
            quick(toy, model=given)
