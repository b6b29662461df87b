"""Sweeps on clusters as people write them: the page's examples, and what a notebook and the files beside it define."""

import ast
import dataclasses
import functools
import importlib
import io
import json
import re
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import joblib
import nbformat
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient

import toys
from clkit import experiments, models
from clkit.consolidation import CLeWI
from clkit.experiments import engines
from clkit.learners import ER
from clkit.store import local_modules

PAGE = (Path(__file__).parent.parent / "notebooks" / "clusters.md").read_text(encoding="utf-8")
HERE, SLURM, RAY, GPUS, RAYS_GPUS = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
CUDA = torch.cuda.is_available()
METHODS = {"ER": ER(10), "ER + CLeWI": (ER(10), CLeWI(0.3))}


def given() -> dict[str, Any]:
    """What the page takes as given, and what its first example imports."""
    parts = {"stream": toys.stream(), "methods": METHODS, "training": toys.QUICK}
    return parts | {"joblib": joblib, "experiments": experiments, "models": models}


def needed(package: str) -> types.ModuleType:
    return pytest.importorskip(package, reason=f"needs {package}, which is not installed")


def executed(block: str, space: dict[str, Any]) -> pd.DataFrame:
    """The table that a block of the page makes, on GPUs where there are any."""
    exec(block if CUDA else block.replace('device="cuda"', 'device="cpu"'), space)
    return space["table"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """What the page's first example leaves: a cluster of two workers, its client, a table."""
    package, space = needed("dask.distributed"), given()
    waiting = {"distributed.deploy.lost-worker-timeout": "15s"}  # to be set back in the end
    with importlib.import_module("dask").config.set(waiting), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(package, "LocalCluster", functools.partial(package.LocalCluster, dashboard_address=":0"))
        executed(HERE, space)
        yield space
        space["client"].close()
        space["cluster"].close()


@pytest.fixture(scope="module")
def ray():
    """Ray, which is told of two GPUs, and started anew only if it has ended."""
    package = needed("ray")
    quiet = {"num_gpus": 2, "include_dashboard": False, "ignore_reinit_error": True}
    package.init(num_cpus=2, **quiet)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "init", functools.partial(package.init, **quiet))
        importlib.import_module("ray.util.joblib").register_ray()
        yield
    package.shutdown()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home and a folder to work in, both empty."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The table of the page's runs, one after another."""
    kept = {"store": tmp_path_factory.mktemp("runs"), "jobs": 1, "progress": False}
    return experiments.sweep(toys.stream(), models.mlp, METHODS, training=toys.QUICK, seeds=range(2), **kept)


class TestPage:
    def test_dask_here(self, here, alone):
        assert here["table"].equals(alone)
        [store] = {Path(here["table"].attrs["store"])}
        assert store.name == "runs" and len(list(store.glob("*.json"))) == 4

    def test_slurm(self, here, alone, home, monkeypatch):
        """The cluster of this machine stands in for SLURM's, which takes the same arguments."""
        jobqueue = needed("dask_jobqueue")
        asked = []

        def cluster(**options):
            with made(**options, scheduler_options={"dashboard_address": ":0"}) as real:
                asked.append(real.job_script())
            return here["cluster"]

        made = jobqueue.SLURMCluster
        monkeypatch.setattr(jobqueue, "SLURMCluster", cluster)
        monkeypatch.setattr(here["cluster"], "scale", lambda jobs: asked.append(jobs))
        space = here | {"table": None}
        assert executed(SLURM, space).equals(alone)
        space["client"].close()
        assert "#SBATCH -t 04:00:00" in asked[0] and "--nthreads 1 " in asked[0] and asked[1] == 20

    def test_dask_on_gpus(self, here, alone, home):
        (home / "scheduler.json").write_text(json.dumps({"address": here["cluster"].scheduler_address}))
        space = here | {"table": None}
        assert executed(GPUS, space).equals(alone)
        space["client"].close()

    def test_ray(self, ray, alone, home):
        assert executed(RAY, given()).equals(alone)

    @pytest.mark.slow
    def test_ray_on_gpus(self, ray, alone, home):
        assert executed(RAYS_GPUS, given()).equals(alone)

    def test_every_example_has_at_most_ten_lines(self):
        assert all(len(block.splitlines()) <= 10 for block in (HERE, SLURM, RAY, GPUS, RAYS_GPUS))


MINE = """
import torch
from torch import nn

VERSION = 1

def weigh(result):
    weights = result.weights[-1].values()
    return {"version": VERSION, "bits": sum(float(w.double().sum()) for w in weights)}

def network(stream, *, seed=0):
    torch.manual_seed(seed + VERSION)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, len(stream.classes)))
"""

CELLS = [
    """
    import contextlib, enum, functools, importlib, sys, tempfile
    from collections.abc import Callable
    from dataclasses import dataclass
    from pathlib import Path
    from typing import NamedTuple

    import joblib, torch
    import torch.nn.functional as F
    from joblib.externals.loky import reusable_executor
    from torch import Tensor, classes, nn, ops

    from clkit import Training, experiments
    from clkit.consolidation import CLeWI, Merged, Merging
    from clkit.learners import ER, Learner
    from clkit.store import describe, digest
    from clkit.weights import lerp

    sys.path.append(tests)
    import mine, toys
    """,
    """
    WIDTH = 4

    class Act(enum.Enum):
        RELU = "relu"
        TANH = "tanh"

    class Shape(NamedTuple):
        hidden: int
        act: Act = Act.TANH

    @dataclass(frozen=True)
    class Net:
        shape: Shape = Shape(WIDTH)
        drop: float = 0.25

    class Block(nn.Module):
        def __init__(self, rows, columns):
            super().__init__()
            self.linear = nn.Linear(rows, columns)

        def forward(self, x):
            return self.linear(x)

    class Active(Block):
        def __init__(self, rows, columns, act):
            super().__init__(rows, columns)
            self.act = act

        def forward(self, x):
            x = super().forward(x)
            return F.relu(x) if self.act is Act.RELU else torch.tanh(x)

    class Marks(enum.Flag):
        A = enum.auto()
        B = enum.auto()

    @functools.cache
    def sized(count: int) -> int:
        return sized(count - 1) + 1 if count else WIDTH

    def width(stream) -> int:
        return sized(len(stream.classes))

    def factory(stream: "toys.Stream", *, seed: int = 0, net: Net = Net()) -> nn.Module:
        torch.manual_seed(seed)
        layers = Active(6, width(stream), net.shape.act), nn.Dropout(net.drop)
        return nn.Sequential(*layers, nn.Linear(width(stream), len(stream.classes)))
    """,
    """
    class Pulled(Learner):
        def __init__(self, strength: float = 0.1):
            self.strength = strength

        def loss(self, model, batch):
            return super().loss(model, batch) + self.strength * sum((p**2).sum() for p in model.parameters())

    class Rules:
        class Harder(Pulled):
            @functools.cached_property
            def factor(self):
                return 2.0

            def loss(self, model, batch):
                return self.factor * super().loss(model, batch)

    @dataclass(frozen=True)
    class Halved:
        share: float = 0.5

        def due(self, progress):
            return progress.end

        def __call__(self, context):
            merged = lerp(context.previous, context.current, self.share)
            return Merged(merged, merged)

    def scaled(factor: float) -> Callable:
        def merge(weights):
            return {name: factor * sum(w[name] for w in weights) / len(weights) for name in weights[0]}

        return merge
    """,
    """
    def looked(result, scale):
        def total(weights: dict[str, Tensor]) -> float:
            return scale * sum(float(w.double().sum()) for w in weights.values())

        sums = [total(weights) for weights in result.weights]
        return {**mine.weigh(result), "sums": sums, "rule": result.config["learner"]}

    methods = {"pulled": Pulled(), "harder": (Rules.Harder(0.2), Halved()), "merged": (ER(5), Merging(scaled(0.9)))}
    nets = {"here": factory, "relu": functools.partial(factory, net=Net(Shape(3, Act.RELU))), "file": mine.network}
    nets["as it is"] = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    parts = [Net(), Halved(), Rules.Harder(), scaled(0.9), Marks.A | Marks.B, b"a", nets["as it is"]]
    fixed = {"training": Training(epochs=1, batch=8), "device": "cpu", "progress": False}

    def table(**options):
        measure = functools.partial(looked, scale=3)
        return experiments.sweep(toys.stream(2), nets, methods, measure=measure, **fixed, **options)

    def noisy(seed: int, make, act) -> dict[str, float]:
        outputs = make(toys.stream(2), seed=seed)(torch.ones(1, 6)).detach()
        described = digest(describe([parts, Marks.A]))
        return {"norm": float(ops.aten.norm(outputs)), "name": act.name, "named": str(classes), "known": described}

    def studied(**options):
        plan = experiments.study(noisy, range(2), make={"here": factory, "file": mine.network}, act={"relu": Act.RELU})
        return plan.run(**options)
    """,
    """
    def configured(engine):
        if engine == "dask":
            from dask.distributed import Client
            return Client(address)
        if engine == "ray":
            import ray
            from ray.util.joblib import register_ray
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
            register_ray()
        return contextlib.nullcontext()

    def everywhere(go):
        found = {}
        for engine in engines:
            jobs, backend = {"one": (1, "loky"), "processes": (2, "loky")}.get(engine, (None, engine))
            with configured(engine), joblib.parallel_config(backend):
                found[engine] = go(jobs=jobs, store=tempfile.mkdtemp(dir=".")).to_csv()
        return found

    def pool():
        return sorted(getattr(reusable_executor._executor, "_processes", ()))

    results = {"sweep": everywhere(table), "study": everywhere(studied), "pool": pool()}
    """,
    """
    path = Path("mine.py")
    path.write_text(path.read_text().replace("VERSION = 1", "VERSION = 22"))
    importlib.reload(mine)
    nets = {"file": mine.network}
    results |= {"edited": everywhere(table), "pool then": pool()}
    results
    """,
]


def lab(folder: Path, engines: list[str], address: str = "") -> dict[str, Any]:
    """What a notebook gives that a kernel executes in a folder with a module beside it."""
    (folder / "mine.py").write_text(MINE)
    given = f"tests, engines, address = {str(Path(__file__).parent)!r}, {engines!r}, {address!r}"
    cells = [nbformat.v4.new_code_cell(textwrap.dedent(cell).strip()) for cell in (given, *CELLS)]
    book = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(book, kernel_name="python3", timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return ast.literal_eval(book.cells[-1].outputs[-1]["data"]["text/plain"])


@pytest.fixture(scope="module", params=["processes and dask", pytest.param("ray", marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    if request.param == "ray":
        needed("ray")
        return lab(folder, ["one", "ray"])
    here = request.getfixturevalue("here")
    return lab(folder, ["one", "processes", "dask"], here["cluster"].scheduler_address)


class TestNotebook:
    """What its cells and a file beside it define gives one table, bit for bit, wherever it is computed."""

    @pytest.mark.parametrize("what", ["sweep", "study", "edited"])
    def test_its_definitions_reach_the_workers(self, results, what):
        tables = dict(results[what])
        alone = tables.pop("one")
        assert len(alone.splitlines()) == 1 + {"sweep": 12, "study": 4, "edited": 3}[what]
        assert tables and {engine: table for engine, table in tables.items() if table != alone} == {}

    def test_a_reload_reaches_workers_that_go_on(self, results):
        assert results["pool"] == results["pool then"]
        versions = [pd.read_csv(io.StringIO(results[what]["one"])).version.unique() for what in ("sweep", "edited")]
        assert versions == [[1], [22]]


def test_what_a_script_is_to_its_children_is_no_module_of_ones_own(tmp_path, monkeypatch):
    """Workers that another script started have that script under this name, and it need not be the caller's."""
    script = types.ModuleType("__mp_main__")
    script.__file__ = str(tmp_path / "script.py")
    Path(script.__file__).write_text("")
    monkeypatch.setitem(sys.modules, "mine", script)
    assert "mine" in local_modules()
    monkeypatch.setitem(sys.modules, "__mp_main__", script)
    assert "__mp_main__" not in local_modules()


def test_a_module_that_a_call_does_not_need_may_be_another(monkeypatch):
    """It was edited after a worker met it, and what is sent now does not import it."""
    packed = engines.Post().pack(dict).parcel
    parcel = dataclasses.replace(packed, origin="elsewhere", versions=packed.versions | {"gone": "new"})
    monkeypatch.setattr(engines, "MET", {"gone": "old"})
    assert parcel.open([]) is dict
