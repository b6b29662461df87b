"""Executing the repository's notebooks, several at once, and what came of it."""

import asyncio
import base64
import io
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import joblib

from clkit.checks import explained, unknown
from clkit.experiments.pages import repository, suffix
from clkit.experiments.statistics import Verdict
from clkit.store import content, expand, writable, write_text

WIDGET = "application/vnd.jupyter.widget-view+json"
COMPARED = "nbval-check-output"


@dataclass(frozen=True)
class Outcome:
    """What a notebook's execution gave: its figures, how many of its claims came out how, and the error, "" if none."""

    notebook: str
    seconds: float
    figures: int
    holds: int
    does_not_hold: int
    open: int
    error: str


def find(names: Sequence[str] = (), root: Path | None = None) -> list[Path]:
    """Notebooks in order: those at the paths `names`, wherever these lie, or of the repository, by how names begin.

    All of the repository's if there are no names. Raises ValueError for a name that none begins with,
    FileNotFoundError where there are no notebooks.
    """
    folder = (root or repository()) / "notebooks"
    known = {path.stem: path for path in folder.glob("*.ipynb")}
    chosen: list[Path] = []
    for name in names or [""]:
        stem = name.removesuffix(".ipynb").rpartition("/")[2]
        found = [path for known_name, path in known.items() if known_name.startswith(stem)]
        if name.endswith(".ipynb") and expand(name).is_file():
            found = [expand(name).resolve()]
        elif not known:
            raise FileNotFoundError(f"{folder} holds no notebooks; give the path of one, or go to clkit's repository")
        elif not found:
            raise unknown("names", name, known, cutoff=0.3)
        chosen += found
    return sorted(set(chosen))


def execute(
    notebooks: Sequence[Path],
    *,
    profile: str = "fast",
    figures: Path | str | None = None,
    write: bool = False,
    check: bool = False,
    jobs: int | None = None,
    progress: bool = True,
) -> list[Outcome]:
    """Executes notebooks, each in its own folder, and returns their outcomes in the order given.

    Figures go to the figures folder of the repository, of the notebook's own folder outside of any, or to `figures`.
    The notebooks on disk stay as they are, unless `write` stores the outputs of those that ran through, without what
    changes from run to run, and records their parameters. With `check` nothing is kept,
    and the cells tagged nbval-check-output must print what is stored in them. `jobs` notebooks run at once, by
    default as many as there are cores ("fast") or one ("real", "paper"), and share the cores among them.

    Raises ValueError for `check` with `write` or `figures`, for what is no notebook, and for `figures` that cannot be
    written, FileNotFoundError for a missing notebook. What a notebook raises is in its outcome.
    """
    from tqdm.auto import tqdm

    if check and (write or figures):
        raise ValueError("check: it keeps nothing; leave out write and figures")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(jobs or (cores if profile == "fast" else 1), len(notebooks) or 1)
    books = [opened(path) for path in notebooks]
    if figures:
        writable(expand(figures) / "figure.png")
    cells = sum(cell.cell_type == "code" for book in books for cell in book.cells)
    scratch = tempfile.TemporaryDirectory() if check else nullcontext(figures)
    with scratch as folder, tqdm(total=cells, disable=not progress, unit="cell") as bar:
        threads = "1" if profile != "paper" else str(max(1, cores // jobs))  # small networks lose by more
        env = os.environ | {"CLKIT_PROFILE": profile, "OMP_NUM_THREADS": threads, "LOKY_MAX_CPU_COUNT": str(cores)}
        if write:
            env["CLKIT_RECORD"] = "1"
        if folder:
            env["CLKIT_FIGURES"] = str(expand(folder).resolve())
        outcomes: Any = joblib.Parallel(jobs, prefer="threads")(
            joblib.delayed(_execute)(path, book, env, write, check, lambda: bar.update())
            for path, book in zip(notebooks, books, strict=True)
        )
        return outcomes


def opened(path: Path) -> Any:
    """A notebook as nbformat has it. Raises ValueError for what is none, FileNotFoundError where nothing is."""
    import nbformat

    text = content(path, "notebooks", "give one (.ipynb)")
    with explained(f"notebooks: {path} is no notebook", "save it anew in JupyterLab"):
        book: Any = nbformat.reads(text.decode(), as_version=4)
        nbformat.validate(book)
        return book


def _execute(path: Path, book: Any, env: dict[str, str], write: bool, check: bool, tick: Callable[[], Any]) -> Outcome:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    stored = [_printed(cell) for cell in book.cells]
    folder = expand(env.get("CLKIT_FIGURES") or repository(path.parent) / "figures")
    options: dict[str, Any] = {"timeout": None, "kernel_name": "python3", "store_widget_state": False}
    options |= {"record_timing": False, "resources": {"metadata": {"path": str(path.parent)}}}
    client = NotebookClient(book, on_cell_executed=lambda **_: tick(), **options)
    started, begun, error = time.perf_counter(), time.time(), ""
    try:
        with tempfile.TemporaryDirectory(prefix="clkit") as sockets:
            manager: Any = client.create_kernel_manager()
            if os.name == "posix":  # over TCP a kernel warns, in the midst of the progress bar, that others may listen
                manager.transport, manager.ip = "ipc", str(Path(sockets) / "kernel")
            asyncio.run(client.async_execute(env=env))
    except CellExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue}".splitlines()[0]
    except DeadKernelError:
        error = "the kernel died"
    seconds = time.perf_counter() - started
    if check and not error:
        pairs = zip(book.cells, stored, strict=True)
        tagged = [(i, cell, old) for i, (cell, old) in enumerate(pairs) if COMPARED in cell.metadata.get("tags", [])]
        changed = [i for i, cell, old in tagged if _printed(cell) != old]
        error = f"cells {changed} print other than what is stored" if changed else ""
    if write and not error:
        write_text(path, nbformat.writes(normalise(book)) + "\n")
    holds, does_not_hold, undecided = _verdicts(
        folder / f"{path.stem}-claims{suffix(env['CLKIT_PROFILE'])}.json", begun
    )
    figures = [file for file in folder.glob(f"{path.stem}-*.png") if file.stat().st_mtime >= begun - 1]
    return Outcome(path.stem, seconds, len(figures), holds, does_not_hold, undecided, error)


def normalise(book: Any) -> Any:
    """Takes out of an executed notebook what changes from run to run, times, widgets, progress bars and versions.

    Pictures are stored with a palette of 256 colours where that takes less room.
    """
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _passing(output)]
            for output in cell.outputs:
                shown = output.get("data", {})
                shown.pop(WIDGET, None)
                if "image/png" in shown:
                    shown["image/png"] = _with_palette(shown["image/png"])
    return book


def _with_palette(png: str) -> str:
    """A picture in base64, its colours reduced to the 256 that fit it best, or as it was if that is no smaller."""
    from PIL import Image

    picture, small = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    reduced = base64.b64encode(small.getvalue()).decode()
    return reduced if len(reduced) < len(png) else png


def _passing(output: Any) -> bool:
    if output.output_type == "stream":
        return output.name == "stderr"
    data = output.get("data", {})
    return WIDGET in data and bool(re.match(r"\s*([^|]*:\s*)?\d+%\|", data.get("text/plain", "")))


def _printed(cell: Any) -> str:
    outputs = cell.get("outputs", [])
    return "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs if not _passing(o))


def _verdicts(path: Path, since: float) -> list[int]:
    """How many claims hold, do not hold and are open, by the record if it was written since then."""
    fresh = path.is_file() and path.stat().st_mtime >= since - 1
    claims = json.loads(path.read_text(encoding="utf-8"))["claims"] if fresh else []
    return [sum(claim["verdict"] == verdict for claim in claims) for verdict in get_args(Verdict)]
