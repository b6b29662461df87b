"""A notebook's page: its profile, its results and figures with the numbers beside them, its claims, checks and laws."""

import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from clkit import checks, store
from clkit.experiments.claims import Checks, Claims, Laws
from clkit.experiments.sweep import Comparison, Study
from clkit.store import Records, cache_root, digest, plain, source_digest, write_atomically, write_json, write_text
from clkit.training.loop import label

PROFILES = ("fast", "real", "paper")
T = TypeVar("T")
DPI = 200
log = logging.getLogger("clkit.experiments")


def page(name: str, profile: str | None = None, /, **parameters: Any) -> "Page":
    """Opens the page of the notebook `name`, with the values of its parameters.

    ```python
    page = experiments.page("03-clewi", SEEDS=SEEDS, ALPHAS=ALPHAS)
    SEEDS, ALPHAS = page.parameters.values()
    ```

    `profile` is "fast" (the laptop), "real" (the same page, and its tables of real data are computed) or "paper" (the
    paper's own scale), by default $CLKIT_PROFILE, else "fast".
    Figures go to the figures folder of the repository around the working folder, of the working folder itself outside
    of any, or to $CLKIT_FIGURES.

    The parameters that claims were recorded with stand beside them. Where others come, from an edited cell or from
    papermill, claims and laws only report, and nothing among the figures changes: files go to a folder in the cache,
    which is printed. `clkit figures --write` records the parameters anew. A number or a list comes as the recorded
    kind, 50 for 50.0, and what a list repeats once. What is of no such kind, an empty list or a number below 0, gives
    way to what is recorded.
    """
    chosen = checks.choice("profile", profile or os.environ.get("CLKIT_PROFILE") or "fast", PROFILES)
    _check_name("name", name)
    return Page(name, chosen, repository(), parameters)


def repository(start: Path | None = None) -> Path:
    """The nearest folder with a pyproject.toml from `start` (default: the working folder) upwards, else `start`."""
    start = (start or Path.cwd()).resolve()
    return next((f for f in (start, *start.parents) if (f / "pyproject.toml").is_file()), start)


def suffix(profile: str) -> str:
    """What the names of a profile's files end in: "-paper" for the paper's; the real one's page is the fast one's."""
    return "-paper" if profile == "paper" else ""


class Page:
    """What a notebook keeps beside itself: files named `<notebook>-<name>` in the folder of figures.

    `parameters` are the notebook's as they fit the record, `changed` the names of those that differ from it.
    """

    def __init__(self, name: str, profile: str, root: Path, parameters: Mapping[str, Any]) -> None:
        self.name, self.profile, self.root = name, profile, root
        self.committed = self.figures = root / "figures"
        self.recorded = {} if os.environ.get("CLKIT_RECORD") else self._read(f"{name}-claims.json")
        recorded = self.recorded.get("parameters")
        recorded = recorded if isinstance(recorded, dict) else {}
        self.parameters = {n: _fitting(value, recorded.get(n, value)) for n, value in parameters.items()}
        self.changed = [n for n in recorded if n in parameters and _legible(self.parameters[n]) != recorded[n]]
        self._done = dict(self.recorded) if profile == "fast" and not self.changed else {}
        for n, value in parameters.items():
            if n in recorded and _legible(value) != recorded[n]:
                print(f"{n}: {value!r}, recorded {recorded[n]!r}; taken as {self.parameters[n]!r}")
        self.figures = store.expand(os.environ.get("CLKIT_FIGURES") or self.committed)
        if self.changed and self.figures.resolve() == self.committed.resolve():
            self.figures = cache_root() / "pages" / f"{name}-{digest(_legible(self.parameters))}"
            print(f"claims and laws only report; files go to {self.figures}")

    def __repr__(self) -> str:
        return f"Page({self.name!r}, profile={self.profile!r})"

    def choose(self, *, fast: T, paper: T) -> T:
        """The value for this page's profile; the real one takes the fast value."""
        return paper if self.profile == "paper" else fast

    def claims(self) -> Claims:
        """The page's claims, begun afresh."""
        return Claims(self)

    def checks(self) -> Checks:
        """What keeps the page's text in step with its numbers, begun afresh."""
        return Checks(self)

    def laws(self) -> Laws:
        """The page's laws, begun afresh."""
        return Laws(self)

    def save(
        self,
        fig: Figure,
        name: str,
        data: pd.DataFrame | Mapping[str, Any] | None = None,
        *,
        config: Any = None,
        seeds: Any = None,
    ) -> None:
        """Writes a figure as .png (200 dpi) and .svg and the numbers it shows beside it.

        A table goes to a .csv, anything else into the .json. That has the profile, the configuration (text where it is
        no plain value), the seeds and the hash of all that, too. The same figure gives the same bytes.
        """

        _check_name("name", name)
        stem = f"{self.name}-{name}{suffix(self.profile)}"
        with mpl.rc_context({"svg.hashsalt": stem}):
            for kind, facts in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                write_atomically(
                    self.figures / f"{stem}.{kind}",
                    lambda place, kind=kind, facts=facts: fig.savefig(place, format=kind, dpi=DPI, metadata=facts),
                )
        facts: dict[str, Any] = {"figure": stem, "profile": self.profile, "config": _legible(config)}
        facts["seeds"] = _legible(list(seeds) if seeds is not None else None)
        if hasattr(data, "to_csv"):
            text = data.to_csv(index=False, lineterminator="\n")  # type: ignore[union-attr]
            write_text(self.figures / f"{stem}.csv", text)
            facts["data"] = f"{stem}.csv"
        elif data is not None:
            facts["data"] = _legible(data)
        self._write(f"{stem}.json", facts | {"hash": digest([facts["config"], facts["seeds"], self.profile])})

    def results(
        self, compute: Callable[[], Any], config: Any, name: str = "results", *, commit: bool | None = None
    ) -> Any:
        """What `compute()` gives, a table or a JSON value; computed once for a configuration, then read.

        With `commit`, the default for the paper profile, the results lie with the figures, to be committed. They are
        computed again when `config` is not the one they were made with. Without it they are a cache outside of the
        repository, and changed code of clkit makes them stale too.
        """
        _check_name("name", name)
        config = _legible(config)
        key = digest([self.name, name, config])
        facts = {"results": f"{self.name}-{name}", "config": config, "hash": key, "code": source_digest()}
        if not (self.profile == "paper" if commit is None else commit):
            record = Records(cache_root() / "pages").remember(facts, lambda: ({"data": _packed(compute())}, None))
            return _unpacked(record["data"])
        return self._kept(f"{self.name}-{name}{suffix(self.profile)}.json", facts, compute)

    def table(
        self, whole: Comparison | Study, name: str, compute: Callable[[], pd.DataFrame] | None = None
    ) -> pd.DataFrame:
        """The table of a comparison, its rows with their settings, or of a study: computed once, then read.

        ```python
        rows = page.table(Comparison(stream, models.convnet, methods, training, range(5)), "main")
        jumps = page.table(study(merged, range(5), p=(0.1, 0.25)), "jumps")
        ```

        It is `whole.run()`, or what `compute` gives: `whole.matrices`, for example. It is stored with the figures
        under the name `<name>-runs`, to be committed, and computed again when `whole.config` has changed.
        """

        rows = self.results(partial(_bare, compute or whole.run), whole.config, f"{name}-runs", commit=True)
        return self._complete(whole, rows, f"{name}-runs")

    def real(
        self, whole: Comparison | Study, name: str, compute: Callable[[], pd.DataFrame] | None = None
    ) -> pd.DataFrame:
        """The table of a comparison or a study on real data, from `<notebook>-<name>-real.json` among the figures.

        It is computed under the profile "real" alone, where it is missing or of another configuration, and only read
        under the others: hours of computing are asked for, never met. Data are the packs of $CLKIT_DATA. `whole` should
        not depend on the notebook's parameters, or a changed one stops it. Arguments are those of `table`.

        Raises ValueError where there is no such table to read, and where $CLKIT_DATA is no folder to compute from.
        """
        _check_name("name", name)
        config, file = _legible(whole.config), f"{self.name}-{name}-real.json"
        facts = {"results": f"{self.name}-{name}", "config": config, "hash": digest([self.name, name, config])}
        if not self._read(file, key=facts["hash"]):
            have = "has another configuration" if self._read(file) else "is not there"
            if self.profile != "real":
                remedy = f"compute it with: clkit figures --profile real {self.name}"
                raise ValueError(f"name: {self.committed / file} {have}; {remedy}")
            if not store.expand(os.environ.get("CLKIT_DATA") or "/dev/null").is_dir():
                raise ValueError("CLKIT_DATA: it names no folder; give that of the packs")
        rows = self._kept(file, facts | {"code": source_digest()}, partial(_bare, compute or whole.run))
        return self._complete(whole, rows, f"{name}-real")

    def show(self, thing: Any) -> None:
        """Displays the library's own source of a class or function."""
        from IPython.core.display_functions import display
        from IPython.display import Markdown

        display(Markdown(f"```python\n{inspect.getsource(inspect.unwrap(thing))}```"))

    def check(self, text: str, right: Any) -> None:
        """Prints of the answer to an exercise whether it is right yet."""
        print(f"{'right' if right else 'not yet'}: {text}")

    def _kept(self, file: str, facts: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """What a file among the figures holds under a hash; computed and written where there is none such."""
        if not self._read(file, key=facts["hash"]):
            place = store.writable(self.figures / file)  # before hours of computing
            write_json(place, {**facts, "profile": self.profile, "data": _packed(compute())})
        remedy = "delete it, and its results are computed again"
        with checks.explained(f"path: {self.figures / file} is damaged", remedy):
            return _unpacked(self._read(file, key=facts["hash"])["data"])

    def _complete(self, whole: Comparison | Study, rows: Any, name: str) -> pd.DataFrame:
        """Stored rows with the settings of what they are rows of."""
        with checks.explained(f"{name} of {self.figures} are damaged", "delete them to compute them again"):
            if not isinstance(rows, pd.DataFrame):
                raise TypeError(f"{rows!r:.60} is no table")
            return whole.complete(rows)

    def _read(self, file: str, key: str | None = None) -> dict[str, Any]:
        """What a JSON file holds where figures go, else among those committed; of one with `key` as hash, if given.

        Empty where there is none such; one that cannot be read is named in the log.
        """
        for folder in dict.fromkeys((self.figures, self.committed)):
            try:
                content = store.read_json(folder / file)
                if isinstance(content, dict) and (key is None or content.get("hash") == key):
                    return content
            except FileNotFoundError:
                continue
            except ValueError as error:
                log.warning("%s; it counts as missing", error)
        return {}

    def _write(self, file: str, content: Any) -> None:
        """Writes a JSON file; NaN and infinities as null, which every reader of JSON knows."""
        write_json(self.figures / file, json.loads(json.dumps(content), parse_constant=lambda _: None))

    def _record(self, part: str, rows: list[dict[str, Any]]) -> None:
        """Writes down the parameters, and the claims, checks or laws that are done beside the others."""
        self._done[part] = rows
        facts = {"profile": self.profile, "parameters": _legible(self.parameters)}
        facts |= {part: self._done.get(part, []) for part in ("claims", "checks", "laws")}
        self._write(f"{self.name}-claims{suffix(self.profile)}.json", facts)


def _check_name(argument: str, name: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise ValueError(f"{argument}: {name!r} becomes a file name; use small letters, digits and hyphens")


def _fitting(value: Any, recorded: Any) -> Any:
    """A value as the recorded kind, a number, a text or a list of these; what is recorded where it is of no such kind.

    An empty list is of none, nor is a number below 0. What a list repeats counts once.
    """

    def fit(value: Any, example: Any) -> Any:
        if isinstance(example, list):
            return list(dict.fromkeys(fit(item, example[0]) for item in value)) or example
        if (fitted := type(example)(value)) != value or fitted < type(example)():
            raise ValueError
        return fitted

    try:
        return fit(value, recorded)
    except (TypeError, ValueError, OverflowError, IndexError):
        return recorded


def _legible(value: Any) -> Any:
    """Plain JSON, with the repr of whatever else is in it: of learners and other settings it is the record."""

    def told(thing: Any) -> str:
        text = label(thing) if inspect.isroutine(thing) or isinstance(thing, partial) else repr(thing)
        if re.search(r" at 0x[0-9a-f]+>", text):
            raise TypeError(f"config: {text} says nothing that could be found again; give plain values")
        return text

    return plain(value, told)


def _bare(compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """A table without its settings, which `complete` puts back."""
    found = compute()
    return found.drop(columns=found.attrs.get("settings", []))


def _packed(value: Any) -> Any:
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return {"table": plain(value.to_dict(orient="split", index=False))}
    return plain(value)


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"table"}:
        return pd.DataFrame(value["table"]["data"], columns=list(dict.fromkeys(value["table"]["columns"])))
    return value
