"""The command line: `clkit figures`, `clkit run`, `clkit bench`.

What a shell can choose from is derived from the library itself. The options of a learner, a consolidation or a training
are the fields of its dataclass; those of a stream or a model are the parameters of the function that makes it. Nothing
here names a method.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_type_hints

from pandas import DataFrame

from clkit import benchmarks, checks, data, experiments, models, training
from clkit.consolidation import CONSOLIDATIONS
from clkit.experiments import provenance
from clkit.experiments.pages import PROFILES
from clkit.learners import LEARNERS
from clkit.modulation import RULES, modulated

DEFAULTS = {"stream": "digits", "model": "convnet", "rule": "none", "learner": "fine-tuning", "consolidation": "none"}
GROUPS = ("training", *DEFAULTS)


class Parser(argparse.ArgumentParser):
    """argparse, with one-line errors that name the option that was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2 and one line."""
        raise SystemExit(_complain(message))

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Like parse_args, with a hint at the nearest option where one is unknown."""
        chosen, rest = self.parse_known_args(argv)
        if rest:
            known = [option for action in self._actions for option in action.option_strings]
            close = get_close_matches(rest[0].partition("=")[0], known, 1)
            self.error(f"unknown argument {rest[0]!r}; " + (f"did you mean {close[0]}?" if close else "see --help"))
        return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 if something that was run failed, 2 on bad arguments."""
    commands = {"figures": figures, "run": run, "bench": bench}
    parser = Parser(prog="clkit", description="Continual learning in weight space.", allow_abbrev=False)
    parser.add_argument("command", choices=commands, metavar="command", help="figures, run or bench")
    parser.epilog = "clkit <command> --help tells more."
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        parser.print_help()
        return 2
    try:
        command = parser.parse_args(argv[:1]).command
        return commands[command](argv[1:])
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _complain("interrupted", status=130)


def figures(argv: Sequence[str]) -> int:
    """Executes notebooks and tabulates what came of them."""
    parser = Parser(
        prog="clkit figures",
        allow_abbrev=False,
        description="Execute notebooks, which write figures and check their claims. The notebooks themselves stay as "
        "they are, unless --write is given.",
    )
    parser.add_argument("names", nargs="*", help="paths, or how names in the repository begin (03); default: all there")
    parser.add_argument("--profile", choices=PROFILES, default="fast", help="scale; default: %(default)s")
    place = {"dest": "figures", "type": Path, "metavar": "FOLDER"}
    parser.add_argument("--out", **place, help="where figures go; default: figures/")
    parser.add_argument("--write", action="store_true", help="store outputs and parameters, normalised")
    parser.add_argument(
        "--check", action="store_true", help="keep nothing; fail where claims and laws print other than what is stored"
    )
    stale = "execute nothing; list stored results that code or data no longer match, and which; fail if there are any"
    parser.add_argument("--stale", action="store_true", help=stale)
    parser.add_argument("--all", action="store_true", help="with --stale: list other versions and devices, too")
    keep = "keep stale results named so as they are, and write down why"
    parser.add_argument("--keep", metavar="REASON", help=keep)
    parser.add_argument("--jobs", type=_count, help="notebooks at once; default: one a core (fast), else one")
    parser.add_argument("--quiet", dest="progress", action="store_false", help="no progress bar")
    chosen = vars(parser.parse_all(argv))
    stale, environments, reason = (chosen.pop(option) for option in ("stale", "all", "keep"))
    try:
        if environments and not stale:
            raise ValueError("--all: it goes with --stale; alone it would execute notebooks")
        if stale or reason is not None:
            return _stale(chosen["names"], reason, environments)
        if chosen["write"] and chosen["profile"] == "paper":
            raise ValueError("--write: notebooks are committed as the fast profile leaves them; leave out --profile")
        outcomes = experiments.execute(experiments.find(chosen.pop("names")), **chosen)
    except (ValueError, OSError) as error:
        return _complain(error)
    rows = [
        (o.notebook, f"{o.seconds:.1f}", o.figures, o.holds, o.does_not_hold, o.open, "failed" if o.error else "ok")
        for o in outcomes
    ]
    _print_table(("seconds", "figures", "hold", "do not hold", "open", ""), rows)
    for outcome in outcomes:
        if outcome.error:
            _complain(f"{outcome.notebook}: {outcome.error}")
    return int(any(o.error for o in outcomes))


def _stale(names: Sequence[str], reason: str | None, environments: bool) -> int:
    """Lists stale results, or keeps them for a reason; 1 if some are listed."""
    root = experiments.repository()
    if reason is not None:
        print("\n".join(provenance.keep(reason, names, root)) or "nothing is stale")
        return 0
    found = provenance.stale(names, root, environments=environments)
    width = max(map(len, found), default=0)
    for name, reasons in found.items():
        more = f" and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        print(f"{name:<{width}}  {', '.join(reasons[:4])}{more}")
    remedy = (
        "compute them again with: clkit figures --write NAMES, or keep them with: clkit figures --keep REASON NAMES"
    )
    return _complain(remedy, 1) if found else 0


def run(argv: Sequence[str]) -> int:
    """Runs one configuration and prints its summary and accuracies."""
    first = Parser(add_help=False, allow_abbrev=False)
    _add_choices(first)
    try:
        chosen, _ = first.parse_known_args(argv)
        parts = {part: getattr(chosen, part) for part in DEFAULTS} | {"training": "training"}
        if chosen.data is not None:
            parts["stream"] = "folder"
        parser = Parser(
            prog="clkit run",
            allow_abbrev=False,
            usage="%(prog)s [--stream NAME] [--model NAME] [--rule NAME] [--learner NAME] [--consolidation NAME] [...]",
            description="Train one model on a stream of tasks and print how well it does. The options below are those "
            "of the parts chosen; name others to see theirs: clkit run --learner ER --consolidation CLeWI --help",
        )
        _add_choices(parser)
        destinations = _add_settings(parser, parts)
        parsed = parser.parse_all(argv)
        settings: dict[str, dict[str, Any]] = {part: {} for part in GROUPS}
        if parsed.data is not None:
            settings["stream"]["path"] = parsed.data
        for destination, (part, option) in destinations.items():
            text = getattr(parsed, destination)
            if text is not None:
                settings[part][option.name] = checks.parse(option.name, text, option.hint)
            elif option.required and option.name not in settings[part]:
                flag = destination.replace("_", "-")
                raise ValueError(f"{parts[part]} needs --{flag}, {checks.expects(option.hint)}")
        result = _run(parsed, parts, settings)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _complain(error)
    except (ArithmeticError, RuntimeError) as error:
        return _complain(error, status=1)
    accuracy = result.accuracy.tolist()
    if parsed.json:
        content = {"summary": result.summary(), "accuracy": accuracy, "seconds": result.seconds, **result.config}
        print(json.dumps(content, default=str))
        return 0
    for name, value in result.summary().items():
        print(f"{name:<12} {value:.4f}")
    tasks = range(len(accuracy))
    print("\naccuracy on each task (across) after each task (down)")
    _print_table(tasks, [(t, *(f"{a:.3f}" for a in row)) for t, row in enumerate(accuracy)])
    return 0


def _run(parsed: argparse.Namespace, parts: Mapping[str, str], settings: Mapping[str, Any]) -> training.Result:
    """Runs one configuration: `parts` names what is chosen, `settings` has what is not the default of each.

    With a rule (modulation, a mask, ...) the model is a frozen network whose weights it makes, as `PerTask` needs it.
    """
    makers = {part: _maker(part, name) for part, name in parts.items()}
    training.find_device(parsed.device)
    recipe, learner, consolidation, dataset = (
        makers[part](**settings[part]) for part in ("training", "learner", "consolidation", "stream")
    )
    stream = data.split(dataset, parsed.tasks, order=parsed.order, scenario=parsed.scenario)
    model = partial(makers["model"], **settings["model"])
    if parts["rule"] != "none":
        model = partial(modulated, model=model, rule=makers["rule"](**settings["rule"]))
    options: Any = {name: getattr(parsed, name) for name in ("seed", "device", "progress", "checkpoint")}
    return training.run(stream, model, learner, consolidation, recipe, keep=False, **options)


def bench(argv: Sequence[str]) -> int:
    """Runs the benchmarks and tabulates the ratios."""
    about = "Measure speed against the naive way, a floor and peers, as ratios."
    parser = Parser(prog="clkit bench", allow_abbrev=False, description=about)
    parser.add_argument("names", nargs="*", help=f"{', '.join(benchmarks.benchmarks())}; default: all")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--write", action="store_true", help="record rows in figures/bench.json and in README.md")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    chosen = parser.parse_all(argv)
    try:
        found = benchmarks.rows(chosen.names, progress=not chosen.quiet)
        rows = benchmarks.record(found) if chosen.write else list(found)
    except ValueError as error:
        return _complain(error)
    except (RuntimeError, OSError) as error:
        return _complain(error, status=1)
    if chosen.json:
        print(json.dumps(rows))
        return 0
    shown = DataFrame(rows).set_index("name")[["ours", "theirs", "ratio", "unit"]]
    print(shown.rename_axis(None).to_string(na_rep="not installed", float_format="%.4g"))
    return 0


def _add_choices(parser: argparse.ArgumentParser) -> None:
    """The parts of a run and what is not a part's own."""
    group = parser.add_argument_group("what to run")
    for part, default in DEFAULTS.items():
        names = ", ".join(choices(part))
        group.add_argument(f"--{part}", default=default, metavar="NAME", help=f"{names}; default: %(default)s")
    group.add_argument("--data", metavar="PATH", help="a folder or zip of images, a subfolder a class, for the stream")
    group.add_argument("--tasks", type=_count, default=5, help="tasks to split the classes into; default: %(default)s")
    group.add_argument("--scenario", default="class", help="class or task; default: %(default)s")
    group.add_argument("--order", type=int, metavar="SEED", help="shuffle the classes; default: their own order")
    group.add_argument("--seed", type=int, default=0, help="of weights, batches and memories; default: %(default)s")
    group.add_argument("--device", default="auto", help="cpu, cuda or auto; default: %(default)s")
    kept = "kept after every task; if there, gone on from; read by Result.load"
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help=kept)
    group.add_argument("--json", action="store_true", help="print everything as one JSON object")
    group.add_argument("--quiet", dest="progress", action="store_false", help="no progress bar")


def _add_settings(parser: argparse.ArgumentParser, parts: dict[str, str]) -> dict[str, tuple[str, "Option"]]:
    """The options of the parts chosen; where two parts share a name, the later one's gets its part in front."""
    taken = {action.dest for action in parser._actions}
    destinations = {}
    for part in GROUPS:
        title = part if part == "training" else f"{part} {parts[part]}"
        group = parser.add_argument_group(title, about(part, parts[part]).replace("%", "%%"))
        for option in options(part, parts[part]):
            destination = option.name if option.name not in taken else f"{part}_{option.name}"
            taken.add(destination)
            takes = f"{checks.expects(option.hint)}; " + ("required" if option.required else f"default: {option.shown}")
            group.add_argument(f"--{destination.replace('_', '-')}", metavar="VALUE", help=takes.replace("%", "%%"))
            destinations[destination] = (part, option)
    return destinations


class Option(NamedTuple):
    """A setting of a part: its name, its default and the annotation that says which values it takes."""

    name: str
    default: Any
    hint: Any

    @property
    def shown(self) -> str:
        """The default, as one would write it in a shell."""
        if isinstance(self.default, tuple | list):
            return ",".join(map(str, self.default))
        return str(self.default).lower() if self.default in (None, True, False) else str(self.default)

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is inspect.Parameter.empty


def choices(part: str) -> list[str]:
    """The names to choose from for a part: stream, model, rule, learner, consolidation or training."""
    return list(_makers(part))


def about(part: str, name: str) -> str:
    """The first sentence of a choice's documentation."""
    text = inspect.getdoc(checks.innermost(_maker(part, name))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def options(part: str, name: str) -> list[Option]:
    """The options of a part's choice, in order; those that no text can express are left out."""
    maker = _maker(part, name)
    function = checks.innermost(maker)
    hints = get_type_hints(function.__init__ if isinstance(function, type) else function, include_extras=True)
    found = []
    for parameter in inspect.signature(maker).parameters.values():
        hint = checks.readable(hints.get(parameter.name, str))
        if parameter.name not in ("stream", "seed", "progress") and hint and parameter.kind != parameter.VAR_KEYWORD:
            found.append(Option(parameter.name, parameter.default, hint))
    return found


def _makers(part: str) -> Mapping[str, Callable[..., Any]]:
    """What makes each choice of a part: all that the library has, by name."""
    known = {"learner": LEARNERS, "consolidation": CONSOLIDATIONS, "training": {"training": training.Training}}
    known["rule"] = {"none": _no_rule, **RULES}
    if part in known:
        return known[part]
    public = vars(models if part == "model" else data).items()
    functions = {n: f for n, f in public if n[0] != "_" and inspect.isfunction(inspect.unwrap(f) if callable(f) else f)}
    if part == "model":
        return {n: f for n, f in functions.items() if next(iter(inspect.signature(f).parameters), "") == "stream"}
    made = {name: f for name, f in functions.items() if get_type_hints(f).get("return") is data.Dataset}
    loader = made.pop("load")
    return {**made, **{name: partial(loader, name) for name in data.TORCHVISION}}


def _maker(part: str, name: str) -> Callable[..., Any]:
    makers = _makers(part)
    return makers[checks.choice(part, name, makers)]


def _no_rule() -> None:
    """The model computes with its own weights."""


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _print_table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> None:
    """Columns as wide as they need to be, the first to the left and without its head, the others to the right."""
    names, *columns = zip(*rows, strict=True)
    print(DataFrame(dict(zip(head, columns, strict=True)), names).to_string())


def _complain(problem: object, status: int = 2) -> int:
    """One line on the standard error."""
    print("clkit: " + " ".join(str(problem).split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
