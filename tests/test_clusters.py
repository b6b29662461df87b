"""Sweeps on clusters as people write them: the page's examples, and what a notebook and the files beside it define."""

import functools
import importlib
import re
import sys
import types
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import pytest
import torch

import toys
from clkit import experiments, models
from clkit.consolidation import CLeWI
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
        here["client"].write_scheduler_file(str(home / "scheduler.json"))
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


def test_what_a_script_is_to_its_children_is_no_module_of_ones_own(tmp_path, monkeypatch):
    """Workers that another script started have that script under this name, and it need not be the caller's."""
    script = types.ModuleType("__mp_main__")
    script.__file__ = str(tmp_path / "script.py")
    Path(script.__file__).write_text("")
    monkeypatch.setitem(sys.modules, "mine", script)
    assert "mine" in local_modules()
    monkeypatch.setitem(sys.modules, "__mp_main__", script)
    assert "__mp_main__" not in local_modules()
