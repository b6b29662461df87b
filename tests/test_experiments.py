"""Grids of runs: what is stored, when it is found again, and that interruptions change nothing."""

import dataclasses
import functools
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import joblib
import pandas as pd
import pytest
import torch
from filelock import FileLock

from clkit import data, models
from clkit.consolidation import SFA, CLeWI, Drift, Merging, NoConsolidation
from clkit.experiments import (
    Comparison,
    Method,
    SweepError,
    accuracies,
    contrasts,
    engines,
    stored_weights,
    study,
    sweep,
)
from clkit.experiments import grid as grid_of
from clkit.experiments import jobs as jobs_module
from clkit.learners import ER, EWC, DERpp, Joint, Learner, MemoryOnly, OnlineEWC, Sum
from clkit.store import Records, canonical, describe, digest, plain, source_digest
from clkit.training import Training

SHORT = Training(epochs=1, batch=16)
WIDTH = 3


def toy_stream(seed: int = 0, rows: int = 20) -> data.Stream:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(4).repeat_interleave(rows)
    x = torch.randint(0, 128, (4 * rows, 1, 4, 4), generator=g) + 32 * y[:, None, None, None]
    examples = data.Examples(x.to(torch.uint8), y)
    tasks = []
    for index, classes in enumerate([(0, 1), (2, 3)]):
        part = examples[(y // 2 == index).nonzero().flatten()]
        tasks.append(data.Task(index, str(classes), classes, part, part))
    return data.Stream("toy", tuple(tasks), ("a", "b", "c", "d"))


SMALL = functools.partial(models.mlp, hidden=(8,))


@pytest.fixture
def grid(tmp_path):
    """A sweep that is small, quiet and alone in its store."""
    fixed = {"training": SHORT, "store": tmp_path / "runs", "jobs": 1, "progress": False, "device": "cpu"}

    def call(methods, **options):
        streams, model = options.pop("streams", toy_stream()), options.pop("model", SMALL)
        return sweep(streams, model, methods, **{**fixed, **options})

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.json"))}


def last_accuracies(result):
    return {"row": result.accuracy[-1], "tensors": len(result.weights[-1])}


def failing_on_seed_1(stream, *, seed):
    if seed == 1:
        raise ArithmeticError("no luck")
    return SMALL(stream, seed=seed)


def test_table_is_tidy_and_in_the_order_of_the_grid(grid):
    table = grid({"ft": Learner(), "ER": (ER(10), NoConsolidation())}, seeds=range(2), measure=last_accuracies)
    assert list(table.columns[:6]) == ["stream", "model", "training", "method", "seed", "acc"]
    assert table.columns[-1] == "hash" and "seconds" not in table
    assert list(zip(table["method"], table["seed"], strict=True)) == [("ft", 0), ("ft", 1), ("ER", 0), ("ER", 1)]
    assert set(table["stream"]) == {"toy"} and set(table["model"]) == {"mlp"}
    assert table.attrs["seconds"].keys() == set(table["hash"])
    long = accuracies(table)
    last = long[(long["after_task"] == 1) & (long["method"] == "ER") & (long["seed"] == 1)]
    assert list(last["accuracy"]) == table["row"].iloc[3]
    assert last["accuracy"].mean() == pytest.approx(table["acc"].iloc[3])
    assert len(long) == len(table) * 3 * 2


def test_second_call_computes_nothing_and_gives_the_same_table(grid, tmp_path):
    first = grid({"ft": Learner()}, seeds=range(3))
    before = files(tmp_path / "runs")
    again = grid({"ft": Learner()}, seeds=range(3))
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert files(tmp_path / "runs") == before
    assert not list((tmp_path / "runs").glob("*.lock"))


def test_equal_configurations_run_once_under_every_name(grid, tmp_path):
    table = grid({"a": Learner(), "b": (Learner(), None), "c": Method(Learner(), training=SHORT)})
    assert len(table) == 3 and table["hash"].nunique() == 1
    assert len(files(tmp_path / "runs")) == 1


def test_streams_may_depend_on_the_seed(grid):
    table = grid({"ft": Learner()}, streams={"fixed": toy_stream(), "own": toy_stream}, seeds=range(2))
    fixed, own = (set(table[table["stream"] == name]["hash"]) for name in ("fixed", "own"))
    assert len(fixed | own) == 3 and len(fixed & own) == 1


def test_results_do_not_depend_on_the_number_of_jobs(tmp_path):
    methods = {"ft": Learner(), "ER": ER(10)}
    tables = [
        sweep(toy_stream(), models.convnet, methods, training=SHORT, seeds=range(2), store=tmp_path / str(jobs),
              jobs=jobs, progress=False, device="cpu", measure=last_accuracies)
        for jobs in (1, 2)
    ]  # fmt: skip
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_runs_leave_the_number_of_threads_alone(grid):
    before = torch.get_num_threads()
    grid({"ft": Learner()})
    assert torch.get_num_threads() == before


def test_kept_weights_come_back_and_are_asked_for_once(grid, tmp_path):
    without = grid({"ft": Learner()})
    with pytest.raises(KeyError, match="keep=True"):
        stored_weights(without["hash"][0], tmp_path / "runs")
    table = grid({"ft": Learner()}, keep=True)
    pd.testing.assert_frame_equal(without, table, check_exact=True)
    weights = stored_weights(table["hash"][0], tmp_path / "runs")
    assert len(weights) == 2
    assert weights[0].keys() == dict(SMALL(toy_stream()).state_dict()).keys()
    assert not torch.equal(weights[0]["linear.weight"], weights[1]["linear.weight"])
    stamp = next((tmp_path / "runs").glob("*.safetensors")).stat().st_mtime_ns
    grid({"ft": Learner()}, keep=True)
    grid({"ft": Learner()})
    assert next((tmp_path / "runs").glob("*.safetensors")).stat().st_mtime_ns == stamp


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def _empty(path):
    path.write_bytes(b"")


def _edit(path):
    content = json.loads(path.read_text())
    content["record"]["rows"][0]["acc"] = 0.99
    path.write_text(json.dumps(content))


def _swap(path):
    other = next(p for p in sorted(path.parent.glob("*.json")) if p != path)
    path.write_bytes(other.read_bytes())


def _garble(path):
    path.write_text("[1, 2]")


@pytest.mark.parametrize("damage", [_truncate, _empty, _edit, _swap, _garble])
def test_damaged_file_is_named_and_recomputed(grid, tmp_path, caplog, damage):
    table = grid({"ft": Learner()}, seeds=range(2))
    before = files(tmp_path / "runs")
    victim = tmp_path / "runs" / f"{table['hash'][0]}.json"
    damage(victim)
    with caplog.at_level(logging.WARNING, "clkit.store"):
        again = grid({"ft": Learner()}, seeds=range(2))
    assert [victim.name in message for message in caplog.messages] == [True]
    pd.testing.assert_frame_equal(table, again, check_exact=True)
    assert files(tmp_path / "runs").keys() == before.keys()


def test_damaged_weights_are_recomputed(grid, tmp_path, caplog):
    table = grid({"ft": Learner()}, keep=True)
    path = tmp_path / "runs" / f"{table['hash'][0]}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes(8))
    with caplog.at_level(logging.WARNING, "clkit.store"):
        grid({"ft": Learner()}, keep=True)
    assert "tensors" in caplog.text
    assert path.read_bytes() == whole


def test_failing_run_is_named_and_the_others_are_stored(grid, tmp_path):
    with pytest.raises(SweepError, match=r"1 of 3 runs failed.*\n.*seed 1: ArithmeticError: no luck") as caught:
        grid({"ft": Learner()}, model=failing_on_seed_1, seeds=range(3))
    assert list(caught.value.table["seed"]) == [0, 2]
    assert len(files(tmp_path / "runs")) == 2
    assert "failing_on_seed_1" in caught.value.failures[0][1]


def test_measure_may_not_shadow_a_column(grid):
    with pytest.raises(SweepError, match="columns of every table"):
        grid({"ft": Learner()}, measure=lambda result: {"acc": 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": {}}, "methods: give"),
        ({"methods": {"x": "ER"}}, "methods: 'x' is none .learner: 'ER'"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [0, 0]}, "seeds"),
        ({"streams": {"s": 3}}, "'s' gives a int"),
        ({"model": {}}, "model: the mapping is empty"),
        ({"device": "abacus"}, "device: 'abacus' is unknown"),
    ],
)
def test_bad_arguments_raise_before_any_run(grid, tmp_path, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        grid(**{"methods": {"ft": Learner()}, **options})
    assert not files(tmp_path / "runs")


def test_a_grid_makes_a_method_of_every_combination():
    swept = grid_of(SFA, "SFA p={p:g} β={beta:g}", p=(0.25, 1.0), beta=[0.2, 0.5], final=False)
    assert list(swept) == ["SFA p=0.25 β=0.2", "SFA p=0.25 β=0.5", "SFA p=1 β=0.2", "SFA p=1 β=0.5"]
    assert swept["SFA p=1 β=0.2"] == Method(Learner(), SFA(1.0, 0.2, final=False))
    named = grid_of(CLeWI, "α={alpha}, {align}", alpha=0.3, align={"by weights": "weights", "not": None}, learner=ER(9))
    assert named["α=0.3, not"] == Method(ER(9), CLeWI(0.3, align=None)) and next(iter(named)) == "α=0.3, by weights"
    rehearsed = grid_of(ER, memory=range(1, 3), consolidation=CLeWI(0.1), training=SHORT)
    assert rehearsed == {f"ER memory={m}": Method(ER(m), CLeWI(0.1), SHORT) for m in (1, 2)}
    assert grid_of(Joint) | grid_of(EWC, strength=3.0) == {"joint": Method(Joint()), "EWC": Method(EWC(3.0))}
    assert grid_of(SFA, own=[("linear.",)])["SFA own=('linear.',)"].consolidation == SFA(own=("linear.",))
    alone = functools.partial(Merging, training="independent")
    assert grid_of(alone, "{merge}", merge=("ties",)) == {"ties": Method(Learner(), Merging("ties", {}, "independent"))}

    def pulled(strength, lr):
        return Method(EWC(strength), None, dataclasses.replace(SHORT, lr=lr))

    whole = grid_of(pulled, "{strength:g} {lr:g}", strength=(1.0, 2.0), lr=(0.1, 0.2), model=SMALL)
    assert whole["2 0.1"].labels == {"strength": 2.0, "lr": 0.1}
    assert whole["2 0.1"] == Method(EWC(2.0), None, dataclasses.replace(SHORT, lr=0.1), SMALL)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((ER, "ER"), {"memory": (1, 2)}, "name: 'ER' gives 'ER' twice"),
        ((ER,), {"memory": ()}, "memory: .* is empty"),
        ((ER,), {"learner": Learner()}, "learner: ER is the learner itself"),
        ((CLeWI,), {"consolidation": SFA()}, "consolidation: CLeWI is the consolidation itself"),
        ((Merging,), {"training": "independent"}, r"training: 'independent'; .* partial\(merging, training=...\)"),
        ((SFA,), {"betta": 1}, "betta"),
    ],
)
def test_a_grid_refuses_what_it_cannot_name_or_make(arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        grid_of(*arguments, **options)


SET = {
    "ft": Method(Learner()),
    "pulled": Method(Sum(MemoryOnly(50), OnlineEWC(3.0))),
    "replayed": Method(DERpp(20, alpha=0.2, beta=0.3), None, dataclasses.replace(SHORT, lr=0.05)),
    "merged": Method(DERpp(20, alpha=0.2, beta=0.3), CLeWI(0.4, align=None)),
    "aligned": Method(DERpp(20, alpha=0.2, beta=0.3), CLeWI(0.4)),
    "triggered": Method(Learner(), SFA(Drift(30, 0.2), "equal")),
    "chosen": Method(Learner(), Merging("ties", {"density": 0.3}), labels={"line": "merges", "density": 9}),
}


def test_rows_carry_what_their_methods_are_set_to(grid, tmp_path):
    table = grid({name: SET[name] for name in ("ft", "pulled", "merged")}, seeds=[3], measure=lambda r: {"holdout": 7})
    results = ["acc", "forgetting", "bwt", "fwt", "last", "plasticity", "holdout"]
    settings = ["consolidation", "alpha", "consolidation_holdout"]
    settings += ["learner", "memory", "strength", "learner_alpha", "beta"]
    assert list(table.columns) == ["stream", "model", "training", "method", "seed", *results, *settings, "hash"]
    assert table.attrs["settings"] == settings
    by = table.set_index("method")
    assert by.learner.tolist() == ["fine-tuning", "memory only + online EWC", "DER++"]
    assert by.consolidation.tolist() == ["none", "none", "CLeWI"]
    assert by.memory.tolist()[1:] == [50, 20] and by.strength["pulled"] == 3
    assert (by.alpha["merged"], by.learner_alpha["merged"], by.beta["merged"]) == (0.4, 0.2, 0.3)
    assert by.loc["ft", ["memory", "strength", "alpha", "learner_alpha"]].isna().all()
    assert {*settings} < set(accuracies(table).columns)


def test_settings_of_a_kept_table_come_from_its_comparison():
    streams = {f"c={c}": functools.partial(toy_stream, rows=c) for c in (4, 5)}
    whole = Comparison(streams, {"mlp": SMALL}, SET, SHORT, range(2))
    rows = [(s, "mlp", "Training", m, 0.5) for s in streams for m in SET]
    full = whole.complete(pd.DataFrame(rows, columns=["stream", "model", "training", "method", "acc"]))
    by = full[full["stream"] == "c=5"].set_index("method")
    assert by.rows.tolist() == [5] * len(SET) and set(full.rows) == {4, 5}
    assert by.lr["replayed"] == 0.05 and by.lr["ft"] == 0.1 and "epochs" not in full
    assert (by.times["triggered"], by.limit["triggered"], by.beta["triggered"]) == (30, 0.2, "equal")
    assert (
        by["align"]["aligned"] == "activations"
        and by["align"][["merged", "ft"]].isna().all()
        and by.p["triggered"] == "Drift"
    )
    assert (by["merge"]["chosen"], by.density["chosen"], by.line["chosen"]) == ("ties", 0.3, "merges")
    assert whole.config["streams"] == ["c=4", "c=5"] and whole.config["methods"]["ft"] == ["Learner()"]


def squares(seed, base, power=2, *, log=None):
    if log is not None:
        with Path(log).open("a") as file:
            file.write(f"{seed} {base}\n")
    return [{"term": t, "value": seed + t * base**power} for t in range(2)]


def one_row(seed, kind):
    return {"seen": str(kind), "none": float("nan")}


def test_a_study_is_one_tidy_table_and_every_call_is_made_once(tmp_path):
    log, place = tmp_path / "log", {"store": tmp_path / "runs", "jobs": 1}
    made = study(squares, range(2), base=(1, 10), log=str(log))
    table = made.run(**place)
    assert list(table.columns) == ["base", "seed", "term", "value"]
    assert table["value"].tolist() == [0, 1, 1, 2, 0, 100, 1, 101] and table["base"].tolist() == [1] * 4 + [10] * 4
    more = study(squares, range(3), base=(1, 10), log=str(log)).run(**place)
    assert log.read_text().splitlines() == ["0 1", "1 1", "0 10", "1 10", "2 1", "2 10"]
    pd.testing.assert_frame_equal(more[more.seed < 2].reset_index(drop=True), table)
    assert len(study(squares, [0], base=1, power=3, log=str(log)).run(**place)) == 2
    assert len(log.read_text().splitlines()) == 7, "another argument is another call"
    assert made.config == {"study": "squares", "seeds": [0, 1], "base": (1, 10), "power": 2, "log": str(log)}


def test_a_study_takes_named_values_rows_and_tables(tmp_path):
    place = {"store": tmp_path, "jobs": 1}
    table = study(one_row, [0], kind={"short": SHORT, "small": SMALL}).run(**place)
    assert table.kind.tolist() == ["short", "small"] and table.none.isna().all() and "epochs=1" in table.seen[0]

    def frame(seed):
        return pd.DataFrame({"a": [0.1, seed]})

    assert study(frame, [4]).run(**place).a.tolist() == [0.1, 4]
    with pytest.raises(TypeError, match=r"kind: .* cannot stand in a column; give a mapping of names"):
        study(one_row, [0], kind=[SHORT]).run(**place)
    with pytest.raises(SweepError, match=r"1 of 1 runs failed.*\n.*seed 4: .*\['seed'\] are axes of the study"):
        study(lambda seed: {"seed": seed}, [4]).run(**place)
    with pytest.raises(ValueError, match="seeds"):
        study(frame, [])


@pytest.mark.parametrize(
    ("free", "peak", "jobs", "expected"),
    [(80, 9, None, [6]), (80, 1, None, [16]), (5, 9, None, []), (80, 9, 3, [3]), (80, 9, 1, [])],
)
def test_on_a_gpu_as_many_go_at_once_as_fit_beside_each_other(tmp_path, monkeypatch, free, peak, jobs, expected):
    at_once, calls = [], []

    def processes(backend, count, waiting):
        at_once.append(count)
        yield from ((number, engines.attempted(parcel.open(arrays))) for number, (parcel, arrays) in waiting.items())

    fakes = {"init": lambda: calls.append("init"), "empty_cache": lambda: calls.append("empty"),
             "reset_peak_memory_stats": lambda device: calls.append("reset"),
             "max_memory_reserved": lambda device: calls.append("peak") or peak * 2**30,
             "mem_get_info": lambda device: calls.append("free") or (free * 2**30, 80 * 2**30)}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(jobs_module, "find_device", lambda device, here: torch.device("cuda"))
    monkeypatch.setattr(engines, "_processes", processes)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 16)

    def square(seed):
        calls.append(seed)
        return {"square": seed**2}

    table = study(square, range(4)).run(store=tmp_path / "runs", jobs=jobs)
    assert table.square.tolist() == [0, 1, 4, 9] and at_once == expected
    assert calls[:6] == (["init", "reset", 0, "peak", "empty", "free"] if jobs is None else [0, 1, 2, 3][: len(calls)])


def test_one_run_on_a_gpu_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs_module, "find_device", lambda device, here: torch.device("cuda"))
    assert study(lambda seed: {"twice": 2 * seed}, [3]).run(store=tmp_path / "runs").twice.tolist() == [6]


LOCAL = """
from clkit import models

def local_mlp(stream, *, seed=0):
    return models.mlp(stream, hidden=(6,), seed=seed)

def double(seed):
    return {"twice": 2 * seed}
"""


@pytest.fixture
def local_module(tmp_path, monkeypatch):
    """A module that this process alone finds, beside workers that have started before."""
    joblib.Parallel(n_jobs=2)(joblib.delayed(os.getpid)() for _ in range(4))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "only_here.py").write_text(LOCAL)
    monkeypatch.syspath_prepend(tmp_path / "folder")
    yield importlib.import_module("only_here")
    del sys.modules["only_here"]


def test_workers_find_modules_that_the_caller_finds(grid, tmp_path, local_module):
    table = grid({"ft": Learner(), "ER": ER(10)}, model=local_module.local_mlp, jobs=2)
    assert table["hash"].nunique() == 2
    doubled = study(local_module.double, range(3)).run(store=tmp_path / "runs", jobs=2)
    assert doubled.twice.tolist() == [0, 2, 4]


BEFORE = 4  # runs that finish before a sweep is killed
INTERRUPTED = """
    import os, signal, sys, time
    from pathlib import Path
    import joblib, threadpoolctl, torch, tqdm.auto
    import pandas as pd
    sys.path.insert(0, sys.argv[1])
    from clkit.experiments import sweep
    from clkit.learners import ER, Learner
    from clkit.store import Records, source_digest
    from test_experiments import BEFORE, SHORT, SMALL, toy_stream

    place, jobs = Path(sys.argv[2]), int(sys.argv[3])
    (place / "log").touch()

    def measure(result):
        \"\"\"Writes the run down; once so many have been measured, it does not return.\"\"\"
        with open(place / "log", "a") as file:
            file.write(f"{result.config['learner']} {result.config['seed']}/{os.getpid()}\\n")
        while len(log()) > int(os.environ["RUNS"]):
            signal.pause()
        return {}

    def log():
        return [line.split("/") for line in (place / "log").read_text().splitlines()]

    def table(store, **options):
        return sweep(toy_stream(rows=40), SMALL, {"ft": Learner(), "ER": ER(10)}, training=SHORT, seeds=range(12),
                     measure=measure, store=place / store, progress=False, device="cpu", **options)

    def stored():
        records = [Records(place / "runs").read(path.stem) for path in (place / "runs").glob("[!.]*.json")]
        assert None not in records
        return {f"{r['config']['learner']} {r['config']['seed']}" for r in records}

    source_digest(), torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # what every child would do again
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    for stop in [signal.SIGKILL, signal.SIGINT, signal.SIGKILL][:3 if jobs == 1 else 1]:
        before, done = stored(), len(log())
        os.environ["RUNS"] = str(done + BEFORE)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                table("runs", jobs=jobs)
            finally:
                os._exit(0)
        while len(log()) < done + BEFORE + jobs:  # until every worker is held up
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the sweep ended by itself"
            time.sleep(0.01)
        os.kill(child, stop)
        os.waitpid(child, 0)
        for _, worker in log()[done:] if jobs > 1 else []:
            try:
                os.kill(int(worker), signal.SIGKILL)
            except ProcessLookupError:
                pass
        assert not before & {run for run, _ in log()[done:]}, "a stored run was run again"
        assert len(stored()) == len(before) + BEFORE
    before, done = stored(), len(log())
    os.environ["RUNS"] = "1000"
    final = table("runs", jobs=1)
    assert not before & {run for run, _ in log()[done:]}
    pd.testing.assert_frame_equal(final, table("undisturbed", jobs=1), check_exact=True)
    assert len(stored()) == 24
    assert not list((place / "runs").glob(".*")), "unfinished files were left behind"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to start many sweeps from one import")
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_sweep_ends_with_the_table_of_an_undisturbed_one(tmp_path, jobs):
    """Sweeps are killed when a run has been computed and not stored yet; how fast they come there does not matter."""
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(Path(__file__).parent), str(tmp_path)]
    with (tmp_path / "output").open("w") as file:
        script = subprocess.Popen([*command, str(jobs)], stdout=file, stderr=file, start_new_session=True)
    try:
        status = script.wait(timeout=1800)  # against a test that hangs
    finally:
        with suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
    assert status == 0, (tmp_path / "output").read_text()


def test_what_a_writer_left_that_died_is_cleared_away(tmp_path):
    store = Records(tmp_path)
    for key in ("key", "other"):
        (tmp_path / f".{key}.json.part-1").write_text("{")
    with store.lock("key"):
        assert [path.name for path in tmp_path.glob(".*")] == [".other.json.part-1"]


def test_lock_is_exclusive_and_leaves_nothing(tmp_path):
    store, order = Records(tmp_path), []
    from threading import Thread

    def second():
        with store.lock("key"):
            order.append("second")

    with store.lock("key"):
        thread = Thread(target=second)
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert not list(tmp_path.iterdir())


def test_an_interrupt_as_soon_as_a_lock_is_had_frees_it(tmp_path, monkeypatch):
    """Its traceback is kept, as notebooks do, and with it all that was at hand."""
    acquire = FileLock.acquire

    def interrupted(lock):
        acquire(lock)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FileLock, "acquire", interrupted)
        with pytest.raises(KeyboardInterrupt) as kept, Records(tmp_path).lock("key"):
            pass
    with Records(tmp_path).lock("key"):
        assert kept.traceback


def key(value) -> str:
    return digest(describe(value))


@pytest.mark.parametrize("value", [ER(10), CLeWI(0.3), SHORT], ids=lambda value: type(value).__name__)
def test_every_field_of_a_setting_is_in_the_hash(value):
    others = {
        "epochs": 2, "batch": 8, "lr": 0.2, "optimizer": "adamw", "momentum": 0.1, "weight_decay": 0.1,
        "schedule": "cosine", "milestones": (0.5,), "warmup": 0.1, "clip": 1.0, "label_smoothing": 0.1,
        "labels": "seen", "augment": False, "precision": "float32", "channels_last": True, "compile": True,
        "memory": 11, "policy": "balanced", "alpha": 0.4, "align": "weights", "statistic": "clewi2024",
        "refresh": False, "points": 5, "holdout": 0.1,
    }  # fmt: skip
    fields = [field.name for field in dataclasses.fields(value) if field.name in others]
    assert fields
    keys = {key(dataclasses.replace(value, **{name: others[name]})) for name in fields}
    assert len(keys | {key(value)}) == len(fields) + 1
    assert key(dataclasses.replace(value)) == key(value)


def test_the_content_of_stream_model_and_seed_is_in_the_hash_and_names_are_not(grid):
    stream = toy_stream()
    reference = grid({"ft": Learner()})["hash"][0]
    named = {"streams": {"n": dataclasses.replace(stream, name="other")}, "model": {"m": SMALL}}
    assert grid({"any": Learner()}, **named, training={"t": SHORT})["hash"][0] == reference
    module = SMALL(stream, seed=5)
    changed = [
        {"streams": toy_stream(1)},
        {"model": functools.partial(models.mlp, hidden=(9,))},
        {"model": module},
        {"model": SMALL(stream, seed=6)},
        {"seeds": [1]},
        {"measure": last_accuracies},
        {"training": Training(epochs=2, batch=16)},
    ]
    keys = [grid({"ft": Learner()}, **options)["hash"][0] for options in changed]
    assert len({*keys, reference}) == len(changed) + 1
    assert grid({"ft": Learner()}, model=SMALL(stream, seed=5))["hash"][0] == keys[2]


def captured(width):
    return lambda stream, *, seed: width


def using_a_global(stream, *, seed):
    return WIDTH


def test_own_code_is_described_by_what_it_does(monkeypatch):
    assert key(captured(1)) == key(captured(1)) != key(captured(2))
    assert key(lambda x: x.a) != key(lambda x: x.b)
    assert key(lambda x: x + 1) != key(lambda x: x + 2)
    before = key(using_a_global)
    monkeypatch.setitem(globals(), "WIDTH", 4)
    assert key(using_a_global) != before


def test_own_classes_are_described_by_their_methods():
    def make(rate):
        @dataclasses.dataclass
        class Own(Learner):
            memory: int = 3

            def loss(self, model, batch):
                return super().loss(model, batch) * rate

        return Own()

    assert key(make(2)) == key(make(2)) != key(make(3))


def test_values_are_told_apart_by_content():
    a = torch.arange(6.0)
    values = [
        a,
        a.double(),
        a.view(2, 3),
        a + 1,
        a.numpy(),
        [1, 2],
        [2, 1],
        {"a": 1},
        {"a": 2},
        1,
        1.0,
        True,
        "1",
        None,
    ]
    values += [Path("x"), {1, 2}, {1, 3}, range(3), functools.partial(max, 1), functools.partial(max, 2), max, min]
    assert len({key(value) for value in values}) == len(values)
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})


def test_description_is_the_same_in_another_process():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_experiments as t; "
        "print(t.key([t.last_accuracies, t.captured(2), t.SMALL, t.ER(3), t.toy_stream, {'b', 'a', 'c'}, t.SHORT]))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    other = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    assert other.stdout.strip() == key([last_accuracies, captured(2), SMALL, ER(3), toy_stream, {"b", "a", "c"}, SHORT])


def test_values_without_a_stable_description_are_refused():
    with pytest.raises(TypeError, match="no stable description"):
        describe(_ for _ in ())


def test_source_digest_is_a_hash_of_the_code():
    assert len(source_digest()) == 16


def test_plain_values_survive_json():
    value = {"a": torch.ones(2), "b": (1, 2.5), 3: Path("x/y"), "d": torch.tensor(1).numpy(), "e": float("nan")}
    content = plain(value)
    assert canonical(json.loads(json.dumps(content))) == canonical(content)
    assert content["a"] == [1.0, 1.0] and content["3"] == "x/y" and content["d"] == 1
    with pytest.raises(TypeError, match="cannot be stored"):
        plain(object())


def test_what_is_no_method_is_refused_before_any_run():
    for method in ((Learner(), Training()), (Learner(), CLeWI), (Learner(), None, CLeWI(0.3))):
        with pytest.raises(TypeError, match=r"methods: 'm' is none \((consolidation|training): "):
            sweep(toy_stream(), SMALL, {"m": method}, progress=False)
    with pytest.raises(ValueError, match="seeds"):
        sweep(toy_stream(), SMALL, {"m": Learner()}, seeds=[-1], progress=False)


def test_contrasts_keep_the_group_that_has_no_setting():
    table = pd.DataFrame(
        {"method": list("abab"), "memory": [50, 50, None, None], "seed": 0, "acc": [0.1, 0.2, 0.3, 0.5]}
    )
    found = contrasts(table, [("a", "b")], within="memory")
    assert found["mean"].tolist() == pytest.approx([-0.1, -0.2])
