"""Where runs are computed: one table whatever the engine, and what becomes of the others when a worker dies."""

import contextlib
import dataclasses
import functools
import importlib
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from clkit import run
from clkit.experiments import SweepError, engines, stored_weights, study, sweep
from clkit.experiments.engines import Post
from clkit.learners import ER, Learner
from clkit.store import describe
from clkit.training import Training, computing
from test_experiments import toy_stream

SHORT = Training(epochs=2, batch=16)
WIDTH = 32
CLUSTERS = ("dask", "ray")
DASK = {
    "distributed.scheduler.allowed-failures": 0,  # a worker's death tells at once
    "distributed.deploy.lost-worker-timeout": "1h",
    "distributed.comm.timeouts.connect": "1s",
}


class Killer(Learner):
    """Kills the process that it trains in."""

    def begin_task(self, *arguments):
        os.kill(os.getpid(), signal.SIGKILL)


def noisy(stream, *, seed=0):
    """A network that draws from torch's own generators, in training too."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, WIDTH), nn.Dropout(0.5), nn.ReLU(), nn.Linear(WIDTH, len(stream.classes))
    )


def weigh(result):
    """A column that tells any other bit of the weights."""
    return {"weights": sum(float(w.double().sum()) for w in result.weights[-1].values())}


def table(place: Path, methods=None, **options) -> pd.DataFrame:
    fixed = {"training": SHORT, "seeds": range(4), "measure": weigh, "progress": False, "device": "cpu"}
    return sweep(toy_stream(rows=20), noisy, methods or {"ft": Learner(), "ER": ER(10)}, store=place, **fixed | options)


@contextlib.contextmanager
def dask_of(workers: int, threads: int):
    distributed = pytest.importorskip("distributed", reason="needs dask's distributed, which is not installed")
    dask = importlib.import_module("dask")
    options = {"n_workers": workers, "threads_per_worker": threads, "dashboard_address": ":0"}
    with dask.config.set(DASK), distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        with joblib.parallel_config("dask"):
            yield client


@pytest.fixture(scope="module")
def ray():
    package = pytest.importorskip("ray", reason="needs ray, which is not installed")
    package.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    importlib.import_module("ray.util.joblib").register_ray()
    yield package
    package.shutdown()


@contextlib.contextmanager
def configured(engine: str, request):
    """How many jobs to ask for, with joblib configured for an engine."""
    if engine == "threads":
        with joblib.parallel_config("threading", n_jobs=3):
            yield None
    elif engine.startswith("dask"):
        workers, threads = map(int, engine.removeprefix("dask ").split("x"))
        with dask_of(workers, threads):
            yield None
    elif engine == "ray":
        request.getfixturevalue("ray")
        with joblib.parallel_config("ray"):
            yield None
    else:
        yield 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> pd.DataFrame:
    """The table of one run after another."""
    return table(tmp_path_factory.mktemp("runs"), jobs=1)


ONE_BY_TWO = pytest.param("dask 1x2", marks=pytest.mark.slow)  # starting a cluster takes seconds


@pytest.mark.parametrize("engine", ["processes", "threads", "dask 2x1", ONE_BY_TWO, "ray"])
def test_the_table_is_the_same_to_the_bit_whatever_the_engine(engine, undisturbed, request, tmp_path):
    with configured(engine, request) as jobs:
        pd.testing.assert_frame_equal(table(tmp_path, jobs=jobs), undisturbed, check_exact=True)


@pytest.mark.parametrize("engine", ["processes", pytest.param("dask 2x1", marks=pytest.mark.slow), "ray"])
def test_a_run_that_kills_its_worker_is_named_and_all_others_finish(engine, undisturbed, request, tmp_path):
    """It is the first, so that all others would wait for it."""
    methods = {"killer": Killer(), "ft": Learner(), "ER": ER(10)}
    with configured(engine, request) as jobs, pytest.raises(SweepError) as caught:
        table(tmp_path, methods, jobs=jobs, seeds=[0])
    [(name, error)] = caught.value.failures
    assert "method killer, seed 0" in name and "no worker lived to finish it, not even alone: " in error
    expected = undisturbed[undisturbed.seed == 0]
    pd.testing.assert_frame_equal(caught.value.table.reset_index(drop=True), expected.reset_index(drop=True))
    assert len(list(tmp_path.glob("*.json"))) == 2, "the others are not stored"


def exits(seed: int) -> dict[str, int]:
    """Ends the interpreter, as a script does by mistake."""
    sys.exit(3) if seed == 1 else None
    return {"seed_again": seed}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_exits_fails_alone(jobs, tmp_path):
    with pytest.raises(SweepError, match=r"1 of 3 runs failed.*\n.*seed 1: SystemExit: 3"):
        study(lambda seed: {"twice": exits(seed)["seed_again"] * 2}, range(3)).run(store=tmp_path, jobs=jobs)


def test_multiprocessing_gives_way_to_processes_whose_death_is_told(tmp_path):
    runs = study(lambda seed: {"loky": any("loky" in word for word in sys.orig_argv)}, range(2))
    with joblib.parallel_config("multiprocessing", n_jobs=2):
        assert runs.run(store=tmp_path).loky.all()


def by_hand(packed):
    """An engine that opens what was sent, here."""
    yield from ((number, engines._opened(parcel, *arrays)) for number, (parcel, arrays) in packed.items())


def test_what_cannot_be_packed_fails_alone():
    calls = {0: functools.partial(int, "7"), 1: functools.partial(print, threading.Lock())}
    found = dict(engines._sent(by_hand, calls))
    assert found[0] == (7, "") and "cannot pickle '_thread.lock'" in found[1].error


def test_runs_in_threads_are_those_that_run_alone():
    """Dropout draws from generators that all threads of a process share."""
    stream, results = toy_stream(rows=20), {}

    def go(seed):
        results[seed] = run(stream, noisy, ER(10), training=SHORT, seed=seed, device="cpu", progress=False).weights[-1]

    threads = [threading.Thread(target=go, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(results)
    for seed in range(6):
        go(seed)
    assert all(torch.equal(together[s][n], w) for s in range(6) for n, w in results[s].items())


def nested(seed: int, place: str) -> list[dict[str, float]]:
    """A study that sweeps itself."""
    rows = table(Path(place), seeds=[seed], jobs=2)
    return rows[["acc", "weights"]].to_dict(orient="records")


@pytest.mark.parametrize("engine", ["processes", "threads", ONE_BY_TWO])
def test_a_sweep_within_a_run_neither_waits_for_itself_nor_differs(engine, undisturbed, request, tmp_path):
    with configured(engine, request) as jobs:
        found = study(nested, range(2), place=str(tmp_path / "inner")).run(store=tmp_path / "outer", jobs=jobs)
    expected = undisturbed[undisturbed.seed < 2].sort_values("seed", kind="stable")
    assert found.weights.tolist() == expected.weights.tolist()


def test_a_parcel_holds_the_same_stream():
    stream = toy_stream(rows=4000)
    parcel, arrays = Post().pack(lambda: stream)
    opened = parcel.open(arrays)()
    assert opened.fingerprint == stream.fingerprint and opened.name == stream.name
    assert arrays and len(parcel.content) < 2**14
    opened[0].train.x.zero_()  # what arrives may be all workers' own
    assert stream[0].train.x.any()


def test_a_tensor_travels_once_whoever_holds_it():
    stream, net = toy_stream(rows=4000), nn.Linear(300, 300)
    post = Post()
    first, second = (post.pack(functools.partial(print, stream, net, number)).arrays for number in range(2))
    assert [id(array) for array in first] == [id(array) for array in second]
    assert len(first) == len(set(map(id, first))) and any(array.nbytes == net.weight.nbytes for array in first)


def test_a_cluster_is_sent_each_array_once():
    sent = []
    place = engines._once(lambda array: sent.append(array) or f"place {len(sent)}")
    first, second = np.zeros(3), np.zeros(3)
    assert [place(array) for array in (first, second, first)] == ["place 1", "place 2", "place 1"]
    assert len(sent) == 2 and sent[0] is first and sent[1] is second


@pytest.mark.parametrize("kind", ["torch", "clkit", "own", "state"])
def test_what_is_another_job_on_a_worker_is_computed_by_the_caller(kind, monkeypatch, tmp_path, caplog):
    """Where a worker has another torch, clkit, code of one's own or state of a module."""

    def elsewhere(packed):
        for number, (parcel, arrays) in packed.items():
            job = parcel.open(arrays)
            object.__setattr__(job.func, "origin", "another process")
            with monkeypatch.context() as patch:
                if kind == "torch":
                    patch.setattr(torch, "__version__", "0.1")
                elif kind == "clkit":
                    patch.setattr("clkit.experiments.jobs.source_digest", lambda: "another")
                elif kind == "own":
                    patch.setattr(job.func.arguments["model"], "__code__", (lambda stream, *, seed=0: None).__code__)
                else:
                    patch.setitem(job.func.arguments["model"].__globals__, "WIDTH", 5)
                yield number, engines.attempted(job)

    monkeypatch.setattr(engines, "_processes", lambda backend, count, packed: elsewhere(packed))
    monkeypatch.setattr(noisy, "__module__", "__main__")  # so that it is described by its content, and packed by it
    found = table(tmp_path / "two", jobs=2, seeds=[0])
    assert found.equals(table(tmp_path / "one", jobs=1, seeds=[0]))
    said = [record for record in caplog.records if "it is computed here" in record.message]
    assert len(said) == len(found)


FLAGS = {
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "matmul": lambda: torch.set_float32_matmul_precision("medium"),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_torch_reach_workers_count_and_are_given_back(flag, tmp_path):
    with computing.with_flags({}):
        plain = table(tmp_path, jobs=1, seeds=[0])
        FLAGS[flag]()
        chosen = computing.flags()
        one = table(tmp_path, jobs=1, seeds=[0])
        two = table(tmp_path / "two", jobs=2, seeds=[0])
        assert computing.flags() == chosen and list(chosen) == [flag]
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert not set(plain.hash) & set(one.hash) and computing.flags() == {}


def careless(stream, *, seed=0):
    """Sets all that a factory can set, and draws from what it does not seed."""
    made = noisy(stream, seed=seed)
    with torch.no_grad():
        made[1].weight[0, 0] = random.random() + np.random.rand()  # noqa: NPY002
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    return made


def test_what_a_factory_sets_or_draws_ends_with_its_run():
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    options = {"training": SHORT, "device": "cpu", "progress": False}
    first, second = (run(toy_stream(rows=20), careless, ER(10), seed=3, **options) for _ in range(2))
    assert computing.flags() == {}
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    for name, weight in first.weights[-1].items():
        assert torch.equal(weight, second.weights[-1][name])


class Tied(nn.Module):
    """Tensors that are views, lie in the same memory, are conjugate, have gradients, attributes or odd strides."""

    def __init__(self, size: int) -> None:
        super().__init__()
        rows = torch.arange(2.0 * size)
        self.register_buffer("whole", rows)
        self.register_buffer("part", rows[size:])
        self.weight = nn.Parameter(torch.ones(size, 2).t())
        self.z = torch.full((size,), 1 + 2j)
        self.conjugate = self.z.conj()
        self.trained = rows.detach()[:size].requires_grad_()
        self.noted = torch.ones(size)
        self.noted.scale = 3.0


@pytest.mark.parametrize("size", [3, 3000])
def test_tensors_arrive_as_they_were(size):
    parcel, arrays = Post().pack(functools.partial(Tied(size).get_buffer, "whole"))
    sent, made = Tied(size), dataclasses.replace(parcel, origin="another process").open(arrays).func.__self__
    assert describe(made) == describe(sent)
    made.whole.add_(1)
    assert torch.equal(made.part, sent.part + 1) and torch.equal(made.trained, sent.trained + 1)
    assert made.conjugate.is_conj() and made.trained.requires_grad and made.noted.scale == 3.0
    assert made.weight.stride() == (1, 2) and len(arrays) == (4 if size > 100 else 0)


def grows(seed: int, rows: torch.Tensor) -> dict[str, float]:
    """Changes what others are given, too."""
    return {"total": float(rows.add_(1).sum())}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_that_changes_its_argument_in_place_is_refused(jobs, tmp_path):
    with pytest.raises(SweepError, match=r"(?s)2 of 2 runs failed.*rows: it was changed in place"):
        study(grows, range(2), rows=torch.ones(4)).run(store=tmp_path, jobs=jobs)


def threaded(seed: int) -> dict[str, float]:
    """Two runs in threads of its own."""
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(run, toy_stream(), noisy, seed=s, device="cpu", progress=False) for s in (seed, seed + 1)]
    return {"acc": sum(future.result().accuracy[-1].mean() for future in made)}


def test_a_study_may_run_in_threads_of_its_own(tmp_path):
    assert len(study(threaded, range(2)).run(store=tmp_path, jobs=1)) == 2


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_cluster_may_have_a_device_that_its_head_lacks(kind, monkeypatch, tmp_path):
    """The runs then find out for themselves."""
    monkeypatch.setattr(engines, "on_cluster", lambda: lambda backend, packed: by_hand(packed))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if kind == "cpu":
        assert len(table(tmp_path)) == 8
    else:
        with pytest.raises(SweepError, match=r"(?s)8 of 8 runs failed.*torch sees no GPU"):
            table(tmp_path, device="cuda")


def test_workers_that_do_not_share_the_disk_send_back_what_they_computed(undisturbed, tmp_path, monkeypatch):
    """The store lies in the folder that a process works in, which is another one for workers."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    place = Path("/proc/self/cwd/runs")
    if not place.parent.exists():
        pytest.skip("needs /proc, to give two processes one path to two folders")
    with dask_of(1, 1) as client:
        client.run(os.chdir, tmp_path / "there")
        found = table(place, seeds=[0], keep=True)
    assert not list((tmp_path / "there").iterdir()) and len(list(place.glob("*.json"))) == 2
    assert [path.name for path in place.iterdir() if path.suffix not in (".json", ".safetensors")] == []
    for key, expected in zip(found.hash, undisturbed[undisturbed.seed == 0].weights, strict=True):
        assert sum(float(w.double().sum()) for w in stored_weights(key, place)[-1].values()) == expected
    assert table(place, seeds=[0], keep=True, jobs=1).equals(found)


SCHEDULER = """
import sys, time, dask
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        print(cluster.scheduler_address, flush=True)
        time.sleep(3600)
"""


def test_a_sweep_goes_on_where_it_was_when_its_scheduler_died(undisturbed, tmp_path):
    distributed = pytest.importorskip("distributed", reason="needs dask's distributed, which is not installed")
    dask = importlib.import_module("dask")
    (tmp_path / "scheduler.py").write_text(SCHEDULER)
    command = [sys.executable, str(tmp_path / "scheduler.py")]
    began = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, text=True
    )
    assert began.stdout is not None

    class Stops(ER):
        """Ends the whole cluster, by hand of a run."""

        def begin_task(self, *arguments):
            os.killpg(os.getpgid(0), signal.SIGKILL)

    try:
        methods = {"ft": Learner(), "ER": ER(10), "stops": Stops(10)}
        with dask.config.set(DASK), distributed.Client(began.stdout.readline().strip()) as client:
            with joblib.parallel_config("dask"), pytest.raises(ConnectionError, match="sweep again to go on"):
                table(tmp_path / "runs", methods)
            assert client.status != "running"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(began.pid, signal.SIGKILL)
        began.wait()
        began.stdout.close()
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
    assert len(stored) == 8, "what had finished is not stored"
    again = table(tmp_path / "runs", jobs=1)
    pd.testing.assert_frame_equal(again, undisturbed, check_exact=True)
    assert stored == {path: path.stat().st_mtime_ns for path in stored}


def test_progress_says_what_is_done_what_failed_and_what_is_left(tmp_path, capsys):
    def fails(seed):
        return {"inverse": 1 / seed}

    with pytest.raises(SweepError):
        study(fails, range(3)).run(store=tmp_path, jobs=1, progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "3/3" in last and "failed=1" in last
