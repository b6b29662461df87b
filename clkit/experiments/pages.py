"""A notebook's page: its profile, its results and figures with the numbers beside them, its claims, checks and laws."""

import ast
import inspect
import json
import logging
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from clkit import checks, store
from clkit.experiments import provenance
from clkit.experiments.claims import Checks, Claims, Laws
from clkit.experiments.provenance import Code
from clkit.experiments.sweep import Comparison, Study
from clkit.store import Records, cache_root, digest, plain, source_digest, write_atomically, write_json, write_text
from clkit.training.loop import label

PROFILES = ("fast", "real", "paper")
T = TypeVar("T")
DPI = 200
COLUMNS = 100  # of source that a page shows beside the list of files
SHORT = 20.0  # seconds of a run that are worth a look at whether a stored table is still what it was
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
        self._done = dict(self.recorded) if profile != "paper" and not self.changed else {}
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
        no plain value), the seeds and the hash of all that, too. The same figure gives the same bytes. Seeds are those
        of the table, where it has any; `seeds` tells them of other data.

        Raises ValueError for the name of a stored result, whose file it would replace.
        """
        _check_name("name", name)
        stem = f"{self.name}-{name}{suffix(self.profile)}"
        if "results" in self._read(f"{stem}.json"):
            raise ValueError(f"name: {stem}.json holds stored results; give the figure another name than {name!r}")
        with mpl.rc_context({"svg.hashsalt": stem}):
            for kind, facts in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                write_atomically(
                    self.figures / f"{stem}.{kind}",
                    lambda place, kind=kind, facts=facts: fig.savefig(place, format=kind, dpi=DPI, metadata=facts),
                )
        facts: dict[str, Any] = {"figure": stem, "profile": self.profile, "config": _legible(config)}
        if isinstance(data, pd.DataFrame) and "seed" in data:
            seeds = sorted(data["seed"].dropna().unique().tolist())
        facts["seeds"] = _legible(list(seeds) if seeds is not None else None)
        if isinstance(data, pd.DataFrame):
            write_text(self.figures / f"{stem}.csv", data.to_csv(index=False, lineterminator="\n"))
            facts["data"] = f"{stem}.csv"
        elif data is not None:
            facts["data"] = _legible(data)
        self._write(f"{stem}.json", facts | {"hash": digest([facts["config"], facts["seeds"], self.profile])})

    def results(
        self, compute: Callable[[], Any], config: Any, name: str = "results", *, commit: bool | None = None
    ) -> Any:
        """What `compute()` gives, a table or a JSON value; computed once for a configuration, then read.

        With `commit`, the default for the paper profile, the results lie with the figures, to be committed. They are
        computed again when `config` is not the one they were made with, and under `clkit figures --write` where they
        are stale, too. Without it they are a cache outside of the repository, and changed code of clkit makes them
        stale.
        """
        facts = self._facts(name, config)
        if not (self.profile == "paper" if commit is None else commit):
            facts, packed = facts | {"code": source_digest()}, lambda: ({"data": _packed(compute())}, None)
            return _unpacked(Records(cache_root() / "pages").remember(facts, packed)["data"])
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

        A table that is stale, `clkit figures --write` puts to the test: some of its runs, which use all definitions of
        the files that changed, are computed. Where these are what is stored, to the digit, the table stays. Else, where
        data changed, and where a run takes longer than `SHORT` seconds, all of it is computed again.
        """
        facts = self._facts(f"{name}-runs", whole.config)
        return self._kept(f"{self.name}-{name}-runs{suffix(self.profile)}.json", facts, compute or whole.run, whole)

    def real(
        self, whole: Comparison | Study, name: str, compute: Callable[[], pd.DataFrame] | None = None
    ) -> pd.DataFrame:
        """The table of a comparison or a study on real data, from `<notebook>-<name>-real.json` among the figures.

        It is computed under the profile "real" alone, where it is missing or of another configuration, and only read
        under the others: hours of computing are asked for, never met. Data are the packs of $CLKIT_DATA. `whole` should
        not depend on the notebook's parameters, or a changed one stops it. Arguments are those of `table`.

        Raises ValueError where there is no such table to read, and where $CLKIT_DATA is no folder to compute from.
        """
        facts, file = self._facts(name, whole.config), f"{self.name}-{name}-real.json"
        if not self._read(file, key=facts["hash"]):
            have = "has another configuration" if self._read(file) else "is not there"
            if self.profile != "real":
                remedy = f"compute it with: clkit figures --profile real {self.name}"
                raise ValueError(f"name: {self.committed / file} {have}; {remedy}")
            if not store.expand(packs := os.environ.get("CLKIT_DATA", "")).is_dir() or not packs:
                raise ValueError(f"CLKIT_DATA: {packs!r} is no folder; set it to that of the packs")
        return self._kept(file, facts, compute or whole.run, whole, real=True)

    def show(self, thing: Any) -> None:
        """Displays the library's own source of a class or function, its docstrings no wider than a page."""
        from IPython.core.display_functions import display
        from IPython.display import Markdown

        display(Markdown(f"```python\n{_narrow(textwrap.dedent(inspect.getsource(inspect.unwrap(thing))))}\n```"))

    def check(self, text: str, right: Any, hint: str) -> None:
        """Prints of the answer to an exercise whether it is right yet; where it is not, `hint`, what to try next.

        Raises TypeError for what is true whatever the answer: a function, a generator, a text, NaN.
        """
        kind, nan = type(right).__name__, isinstance(right, float) and math.isnan(right)
        if nan or callable(right) or (isinstance(right, str | Iterator) and right):
            raise TypeError(f"right: {right!r:.60} ({kind}) counts as true whatever it says; give True or False")
        print(f"right: {text}" if right else f"not yet: {text}; {hint}")

    def predict(self, text: str, guess: float | None, found: float, within: float) -> None:
        """Compares the number that the reader wrote down before with what was `found`, which it tells only then.

        It is right if it is off by at most `within`. Raises ValueError for a guess or a `within` that is no number.
        """
        within = checks.value("within", within, checks.Positive)
        if guess is None:
            self.check(text, False, "write a number down first, then run this cell")
            return
        said = float(checks.value("guess", guess, float))
        told = f"you said {said:.3g}, it is {float(found):.3g}"
        self.check(f"{text}: {told}", abs(said - found) <= within, "what did you not think of?")

    def _facts(self, name: str, config: Any) -> dict[str, Any]:
        """What results of a configuration are known by."""
        _check_name("name", name)
        config = _legible(config)
        return {"results": f"{self.name}-{name}", "config": config, "hash": digest([self.name, name, config])}

    def _kept(
        self, file: str, facts: Any, compute: Callable[[], Any], whole: Comparison | Study | None = None, **real: bool
    ) -> Any:
        """What a file among the figures holds under a hash, of a `whole` as its table; computed where there is none."""
        known, place = self._read(file, key=facts["hash"]), self.figures / file
        before = known.get("provenance")
        if os.environ.get("CLKIT_RECORD") and known and not self._fresh(known, compute, whole, **real):
            known = {}
        if not known:
            store.writable(place)  # before hours of computing
            data = compute()
            seconds = max([0.0, *getattr(data, "attrs", {}).get("seconds", {}).values()])
            origin = provenance.record([compute], Code(self.root), self.name) | {"seconds": round(seconds, 1)}
            profile = "paper" if self.profile == "paper" else "real" if real else "fast"
            known = {**facts, "profile": profile, "provenance": origin, "data": _packed(data)}
        if known.get("provenance") != before:
            write_json(place, known)
        with checks.explained(f"path: {place} is damaged", "delete it, and it is computed again"):
            rows = _unpacked(known["data"])
            return rows if whole is None else whole.complete(checks.value("data", rows, pd.DataFrame))

    def _fresh(
        self, known: Any, compute: Callable[[], Any], whole: Comparison | Study | None, real: bool = False
    ) -> bool:
        """Whether stored results may stay: nothing changed, or some runs come out alike, which renews their record."""
        before = known.get("provenance") or {}
        code = Code(self.root)
        changed = provenance.changes(before, code)
        if real and not before:
            known["provenance"] = provenance.record([compute], code, self.name) | {"code": None}
        if real or not changed:
            return True
        if whole is None or before.get("seconds", 0) > SHORT or before.get("data", {}).keys() & changed:
            return False
        rows = _rows(known["data"])
        way = getattr(compute, "__name__", "")
        for part in provenance.samples(whole, changed, code, self.name, int(known["hash"], 16)):
            again = getattr(part, way, None)
            if again is None or any(row not in rows for row in _rows(_packed(again()))):
                return False
        origin = provenance.record([compute], code, self.name)
        known["provenance"] = origin | {"seconds": before.get("seconds", 0.0)}
        return True

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


def _narrow(source: str) -> str:
    """Source with the lines of its docstrings broken where they are too long for a page; code stays as it is."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            for at in range(node.lineno - 1, node.end_lineno or node.lineno):
                indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
                lines[at] = textwrap.fill(lines[at], COLUMNS, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines)


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


def _packed(value: Any) -> Any:
    """Results as JSON; a table goes without its settings, which `complete` puts back."""
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        bare = value.drop(columns=value.attrs.get("settings", []))
        return {"table": plain(bare.to_dict(orient="split", index=False))}
    return plain(value)


def _rows(packed: Any) -> list[dict[str, Any]]:
    """The rows of a stored table but for what is no number of theirs, hashes and seconds, and for blanks."""
    table = json.loads(json.dumps(packed), parse_constant=lambda _: None)["table"]
    pairs = [zip(table["columns"], row, strict=True) for row in table["data"]]
    return [{n: value for n, value in row if n not in ("hash", "seconds") and value is not None} for row in pairs]


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"table"}:
        return pd.DataFrame(value["table"]["data"], columns=list(dict.fromkeys(value["table"]["columns"])))
    return value
