"""The command line: `clkit figures`, `clkit run`, `clkit merge`, `clkit bench`, `clkit student`.

What a shell can choose from is derived from the library itself. The options of a learner, a consolidation or a training
are the fields of its dataclass; those of a stream, a model or a merge are the parameters of its function. Nothing here
names a method.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import torch
from pandas import DataFrame
from torch import Tensor

from clkit import benchmarks, checks, experiments, merging, store, training, weights
from clkit.experiments import parts, provenance
from clkit.experiments.pages import PROFILES
from clkit.weights import Weights


class Parser(argparse.ArgumentParser):
    """argparse, with one-line errors that name the option that was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2 and one line."""
        raise SystemExit(_complain(message))

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Like parse_args, with a hint at the nearest option where one is unknown."""
        chosen, rest = self.parse_known_args(argv)
        if rest:
            known = [option for action in self._actions for option in action.option_strings if action.dest != "help"]
            close = get_close_matches(rest[0].partition("=")[0], known, 1)
            all_known = f"give one of {', '.join(known)}" if len(known) < 12 else "see --help"
            self.error(f"unknown argument {rest[0]!r}; " + (f"did you mean {close[0]}?" if close else all_known))
        return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 if something that was run failed, 2 on bad arguments."""
    commands = {"figures": figures, "run": run, "merge": merge, "bench": bench, "student": student}
    parser = Parser(prog="clkit", description="Continual learning in weight space.", allow_abbrev=False)
    parser.add_argument("command", choices=commands, metavar="command", help=", ".join(commands))
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
        parsed, _ = first.parse_known_args(argv)
        chosen = {"training": "training"} | {part: getattr(parsed, part) for part in parts.DEFAULTS}
        if parsed.data is not None:
            chosen["stream"] = "folder"
        parser = Parser(
            prog="clkit run",
            allow_abbrev=False,
            usage="%(prog)s [--stream NAME] [--model NAME] [--rule NAME] [--learner NAME] [--consolidation NAME] [...]",
            description="Train one model on a stream of tasks and print how well it does. The options below are those "
            "of the parts chosen; name others to see theirs: clkit run --learner ER --consolidation CLeWI --help",
        )
        _add_choices(parser)
        makers = {part: parts.maker(part, name) for part, name in chosen.items()}
        destinations = _add_settings(parser, chosen, makers)
        parsed = parser.parse_all(argv)
        stream = {"path": parsed.data} if parsed.data is not None else {}
        result = _run(parsed, chosen, makers, _settings(parsed, chosen, destinations, stream=stream))
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


def _run(
    parsed: argparse.Namespace, chosen: Mapping[str, str], makers: Mapping[str, Any], settings: Mapping[str, Any]
) -> training.Result:
    """Runs one configuration: `chosen` names its parts, `settings` has what is not the default of each.

    With a rule (modulation, a mask, ...) the model is a frozen network whose weights it makes, as `PerTask` needs it.
    """
    training.find_device(parsed.device)
    settings = {**settings, "split": {name: getattr(parsed, name) for name in ("tasks", "order", "scenario")}}
    recipe = parts.Recipe(makers, chosen, settings, parsed.seed)
    options: Any = {name: getattr(parsed, name) for name in ("device", "progress", "checkpoint")}
    return recipe.run(keep=False, **options)


def merge(argv: Sequence[str]) -> int:
    """Merges files of weights into one and prints what came together."""
    name = argv[0] if argv and not argv[0].startswith("-") else None
    parser = Parser(
        prog=f"clkit merge {name or ''}".strip(),
        usage=f"clkit merge {name or 'NAME'} FILE [FILE ...] [--base FILE] --out FILE [...]",
        allow_abbrev=False,
        description="Merge files of weights of one architecture: safetensors, or what torch.save wrote of a "
        "state_dict(). Names, shapes and dtypes stay. BatchNorm's statistics are averaged; counters are taken from the "
        "base or, without one, from the first file.",
        epilog=None
        if name
        else f"NAME is one of {', '.join(_by_weights())}; clkit merge NAME --help tells its options.",
    )
    group = parser.add_argument_group("what to merge")
    place: Any = {"type": store.expand, "metavar": "FILE"}
    group.add_argument("files", nargs="+", **place, help="weights as trained")
    group.add_argument("--base", **place, help="weights that training began from, for a merge of task vectors")
    group.add_argument("--out", **place, required=True, help="what to write, by rename; it ends in .safetensors")
    group.add_argument("--force", action="store_true", help="overwrite it")
    if not name and not {"-h", "--help"}.isdisjoint(argv or ["--help"]):
        parser.print_help()
        return 0 if argv else 2
    try:
        if not name:
            raise ValueError(f"merge: {argv[0]} stands in the place of its name; give that first, as average")
        if name not in merging.MERGES:
            raise checks.unknown("merge", name, _by_weights())
        row = merging.MERGES[name]
        destinations = _add_settings(parser, {"merge": name}, {"merge": row.function}, elsewhere=())
        parsed = parser.parse_all(argv[1:])
        settings = _settings(parsed, {"merge": name}, destinations)["merge"]
        _merge(name, parsed.files, parsed.base, parsed.out, parsed.force, settings)
    except (ValueError, TypeError, OSError) as error:
        return _complain(error)
    return 0


def _merge(name: str, files: list[Path], base: Path | None, out: Path, force: bool, settings: dict[str, Any]) -> None:
    """Writes the merge of files of weights and prints a report. Raises before any work for what does not fit."""
    row, paths = merging.MERGES[name], [*([base] if base else []), *files]
    if row.needs:
        python = f"call clkit.merging.merge({name!r}, ws, {row.needs}=...), or run with Merging({name!r})"
        others = ", ".join(_by_weights())
        raise ValueError(f"merge: {name} needs {row.needs}, which files of weights lack; {python}, or take {others}")
    row.check(settings)
    if row.arity not in (None, len(files)):
        raise ValueError(f"files: {len(files)} were given and {name} merges {row.arity}; give {row.arity}")
    if row.base and not base:
        raise ValueError(f"base: {name} takes task vectors from one; give the weights before training as --base FILE")
    if base and not row.base:
        raise ValueError(f"base: {base} was given and {name} takes none; leave it out")
    if out.suffix != ".safetensors":
        raise ValueError(f"out: {out} is no name for safetensors; give one that ends in .safetensors")
    if out.exists() and not force:
        raise ValueError(f"out: {out} is there already; give another path, or --force to overwrite it")
    read = [_weights(path) for path in paths]
    tied = _tied(read)
    read = [dict(sorted(w.items())) for w in read]  # one order, and one lot, whatever the format
    own = [
        {entry: t for entry, t in w.items() if entry not in tied and weights.floating(f"{path}: {entry!r}", t)}
        for path, w in zip(paths, read, strict=True)
    ]
    _check_alike([str(path) for path in paths], own)
    store.writable(out)
    try:
        merged = row(own[bool(base) :], base=own[0], **settings)
    except ValueError as error:
        raise ValueError(re.sub(r"ws\[(\d+)\]", lambda found: str(files[int(found[1])]), str(error))) from error
    whole = {entry: tensor.clone() for entry, tensor in read[0].items() if entry not in tied} | merged
    whole |= {entry: whole[first].clone() for entry, first in tied.items() if entry in read[0]}
    store.save_tensors(out, whole, {"merge": name, "options": settings, "files": [str(path) for path in paths]})

    options = parts.options(row.function, elsewhere=())
    used = [f"{option.name} {settings.get(option.name, option.shown)}" for option in options]
    print(f"{out}: {', '.join([name, *used])}")
    moved = [entry for entry, t in merged.items() if not weights.is_statistic(entry) and t.isfinite().all()]
    print(f"{sum(merged[entry].numel() for entry in moved):,} parameters in {len(moved)} tensors are merged")
    if averaged := len(weights.statistics(merged)):
        print(f"{averaged} running statistics are averaged; re-estimate them by clkit.normalization.refresh")
    if counters := len(whole.keys() - merged.keys() - tied.keys()):
        print(f"{counters} counters are those of {paths[0]}")

    def distance(a: Weights, b: Weights) -> str:
        return f"{sum(float((a[entry].double() - b[entry]).square().sum()) for entry in moved) ** 0.5:.4g}"

    ends = {"from base": own[0], "from merged": merged} if base else {"from merged": merged}
    points = zip([*paths, out], [*own, merged], strict=True)
    _print_table([*ends], [(path, *(distance(point, end) for end in ends.values())) for path, point in points])


def _by_weights() -> list[str]:
    """The merges that need nothing but weights."""
    return [name for name, row in merging.MERGES.items() if not row.needs]


def _weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: safetensors, or a state dict that torch saved. Raises ValueError on anything else."""
    if path.suffix == ".safetensors":
        tensors, header = store.load_tensors(path)
        if "tree" in header:
            python = "store.save_tensors('a.safetensors', Result.load(path).weights[-1], {})"
            raise ValueError(f"{path} holds a saved run and no weights; write those of its last task: {python}")
        return tensors
    remedy = "give safetensors, or what torch.save(model.state_dict(), path) wrote"
    with store.regular(path, "file", remedy) as file:
        try:
            found = dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # whatever a file that is none leads to; torch advises to trust it
            raise ValueError(f"{path} holds no state dict, or something beside it; {remedy}") from error
    inner = [name for name, entry in found.items() if isinstance(entry, dict)]
    python = f"torch.save(torch.load({path.name!r})[{inner[0]!r}], 'weights.pt')" if inner else ""
    remedy += f"; where its weights are one entry: {python}" if inner else ""
    for name, tensor in found.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise ValueError(
                f"{path} holds {name!r:.60}, which is no {'tensor' if isinstance(name, str) else 'name'}; {remedy}"
            )
    return {name: tensor.detach() for name, tensor in found.items()}


def _check_alike(names: Sequence[str], ws: Sequence[Weights]) -> None:
    """Raises ValueError unless all weights have the same names, shapes and dtypes, and there are some."""
    weights.check_same(*ws, names=names)
    if not ws[0]:
        raise ValueError(f"{names[0]} holds no weights; give files of floating tensors")
    for name, w in zip(names, ws, strict=True):
        for entry, tensor in ws[0].items():
            if w[entry].dtype != tensor.dtype:
                kinds = f"{w[entry].dtype} and {tensor.dtype}".replace("torch.", "")
                raise ValueError(
                    f"{name} and {names[0]} differ in the dtype of {entry!r}: {kinds}; convert one of them"
                )


def _tied(ws: Sequence[Weights]) -> dict[str, str]:
    """The further names of tensors that stand under several names, as tied weights do, each with its first.

    They are tied in every file that has them: one of ours holds the first name alone.
    """
    found = []
    for w in ws:
        first: dict[Any, str] = {}
        places = {n: (t.data_ptr(), t.shape, t.stride()) if t.numel() else n for n, t in w.items()}
        found.append({n: first.setdefault(place, n) for n, place in places.items()})
    pairs = {(n, owner) for names in found for n, owner in names.items() if n != owner}
    return {n: owner for n, owner in sorted(pairs) if all(names.get(n, owner) == owner in names for names in found)}


def bench(argv: Sequence[str]) -> int:
    """Runs the benchmarks and tabulates the ratios."""
    about = "Measure speed against the naive way, a floor and peers, as ratios."
    parser = Parser(prog="clkit bench", allow_abbrev=False, description=about)
    parser.add_argument("names", nargs="*", help=f"{', '.join(benchmarks.benchmarks())}; default: all")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--write", action="store_true", help="record rows in figures/bench.json and in clkit/README.md")
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


def student(argv: Sequence[str]) -> int:
    """Writes notebooks for a class and tabulates them."""
    about = "Write notebooks without outputs and solutions into a folder that a class works in, with all they read."
    parser = Parser(prog="clkit student", allow_abbrev=False, description=about)
    parser.add_argument("names", nargs="*", help="paths, or how names in the repository begin (03); default: all there")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where to; new, or made by this command"
    )
    pasted = "with the solutions pasted into the exercises: the teacher's half"
    parser.add_argument("--solutions", action="store_true", help=pasted)
    chosen = parser.parse_all(argv)
    try:
        given = experiments.student(experiments.find(chosen.names), chosen.out, solutions=chosen.solutions)
    except (ValueError, OSError) as error:
        return _complain(error)
    _print_table(("exercises", "minutes", "for the machine"), given)
    print(f"{chosen.out}/README.md says how a class begins")
    return 0


def _add_choices(parser: argparse.ArgumentParser) -> None:
    """The parts of a run and what is not a part's own."""
    group = parser.add_argument_group("what to run")
    for part, default in parts.DEFAULTS.items():
        names = ", ".join(parts.makers(part))
        group.add_argument(f"--{part}", default=default, metavar="NAME", help=f"{names}; default: %(default)s")
    group.add_argument("--data", metavar="PATH", help="a folder or zip of images, a subfolder a class, for the stream")
    group.add_argument("--tasks", type=_count, default=5, help="tasks to split the classes into; default: %(default)s")
    group.add_argument("--scenario", default="class", help="class, domain or task; default: %(default)s")
    group.add_argument("--order", type=int, metavar="SEED", help="shuffle the classes; default: their own order")
    group.add_argument("--seed", type=int, default=0, help="of weights, batches and memories; default: %(default)s")
    group.add_argument("--device", default="auto", help="cpu, cuda or auto; default: %(default)s")
    kept = "kept after every task; if there, gone on from; read by Result.load"
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help=kept)
    group.add_argument("--json", action="store_true", help="print everything as one JSON object")
    group.add_argument("--quiet", dest="progress", action="store_false", help="no progress bar")


def _add_settings(
    parser: argparse.ArgumentParser,
    chosen: Mapping[str, str],
    makers: Mapping[str, Any],
    elsewhere: Sequence[str] = parts.ELSEWHERE,
) -> dict[str, tuple[str, parts.Option]]:
    """The options of the parts chosen; where two parts share a name, the later one's gets its part in front."""
    taken = {action.dest for action in parser._actions}
    destinations = {}
    for part, name in chosen.items():
        title = part if part == "training" else f"{part} {name}"
        group = parser.add_argument_group(title, parts.about(makers[part]).replace("%", "%%"))
        for option in parts.options(makers[part], elsewhere=elsewhere):
            destination = option.name if option.name not in taken else f"{part}_{option.name}"
            taken.add(destination)
            takes = f"{checks.expects(option.hint)}; " + ("required" if option.required else f"default: {option.shown}")
            group.add_argument(f"--{destination.replace('_', '-')}", metavar="VALUE", help=takes.replace("%", "%%"))
            destinations[destination] = (part, option)
    return destinations


def _settings(
    parsed: argparse.Namespace,
    chosen: Mapping[str, str],
    destinations: Mapping[str, tuple[str, parts.Option]],
    **given: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """The settings of every part that are not its defaults: those `given`, and those of the options parsed."""
    settings = {part: given.get(part, {}) for part in chosen}
    for destination, (part, option) in destinations.items():
        text = getattr(parsed, destination)
        if text is not None:
            settings[part][option.name] = checks.parse(option.name, text, option.hint)
        elif option.required and option.name not in settings[part]:
            flag = destination.replace("_", "-")
            raise ValueError(f"{chosen[part]} needs --{flag}, {checks.expects(option.hint)}")
    return settings


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
