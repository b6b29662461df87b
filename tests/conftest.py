"""Shared fixtures, and the rule for tests that need real data: they skip where their packs are missing."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks gain nothing from more; kernels of notebooks inherit it
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import toys
from clkit import data

PACKS = Path(os.environ.get("CLKIT_DATA") or Path(__file__).parents[2] / "shared" / "data")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for marker in item.iter_markers("packs"):
        for name in marker.args or ("",):
            path = PACKS / f"{name}.zip" if name else PACKS
            if not path.exists():
                pytest.skip(f"needs {path}; CLKIT_DATA names the folder of the packs")


@pytest.fixture(scope="session")
def packs() -> Path:
    """The folder of the real data packs; a test says which it needs, as in `@pytest.mark.packs("mnist")`."""
    return PACKS


@pytest.fixture(scope="module")
def one_symmetry():
    """Runs derive the symmetry of an architecture once in a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clkit.training.loop.alignment.symmetry", toys.derived_once())
        yield


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    return data.digits()


@pytest.fixture
def displayed(monkeypatch):
    """The bundles that are displayed, those exchanged later behind them."""
    bundles = []

    def display(bundle, *, raw, display_id=False):
        bundles.append(bundle)
        return SimpleNamespace(update=display) if display_id else None

    monkeypatch.setattr("IPython.core.display_functions.display", display)
    return bundles
