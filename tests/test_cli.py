"""The command line, called in this process and once as a program."""

import json
import subprocess
import sys
from functools import partial

import nbformat
import pytest
import torch
from PIL import Image

import merging_toys
import toys
from clkit import benchmarks, checks, cli, data, merging, models, store, training
from clkit.experiments import parts
from clkit.learners import LEARNERS, PerTask
from clkit.weights import equal, get_weights, set_weights

QUICK = [
    "--epochs",
    "1",
    "--batch",
    "128",
    "--tasks",
    "2",
    "--model",
    "mlp",
    "--hidden",
    "8",
    "--quiet",
    "--device",
    "cpu",
]
CHOSEN = {"training": "training", "stream": "digits", "model": "mlp"}


def call(capsys, *argv: str) -> tuple[int, str, str]:
    status = cli.main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def test_help_names_the_commands_and_the_options_of_what_is_chosen(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0 and "figures, run, merge, bench, student" in out
    assert call(capsys)[0] == 2
    status, out, _ = call(capsys, "run", "--learner", "ER", "--consolidation", "CLeWI", "--help")
    assert status == 0
    for option in ("--memory", "--alpha", "--epochs", "--widths", "--data", "--label-smoothing"):
        assert option in out
    assert "--alpha" not in call(capsys, "run", "--help")[1]
    for command in ("figures", "merge", "bench", "student"):
        assert call(capsys, command, "--help")[0] == 0


def test_run_prints_the_summary_and_the_accuracies(capsys):
    status, out, err = call(capsys, "run", *QUICK, "--learner", "ER", "--memory", "10")
    assert status == 0 and err == ""
    assert out.startswith("acc ") and "forgetting" in out
    assert len(out.split("after each task (down)\n")[1].splitlines()) == 3


def test_run_as_json_is_the_run_with_these_settings(capsys):
    argv = ["run", *QUICK, "--json", "--lr", "0.05", "--clip", "1", "--learner", "ER", "--memory", "10", "--seed", "3"]
    first, again = (json.loads(call(capsys, *argv)[1]) for _ in range(2))
    assert first["accuracy"] == again["accuracy"] and len(first["accuracy"]) == 2
    assert first["training"]["lr"] == 0.05 and first["training"]["clip"] == 1.0 and first["seed"] == 3
    assert "memory=10" in first["learner"]
    assert json.loads(call(capsys, *argv, "--augment", "false")[1])["training"]["augment"] is False
    other = json.loads(call(capsys, *argv, "--order", "1")[1])
    assert other["stream"]["data"] != first["stream"]["data"]


def test_where_two_parts_share_an_option_the_later_one_takes_its_parts_name(capsys):
    argv = ["run", *QUICK, "--json", "--learner", "ER", "--memory", "10", "--batch", "16", "--learner-batch", "4"]
    content = json.loads(call(capsys, *argv)[1])
    assert content["training"]["batch"] == 16 and "batch=4" in content["learner"]


@pytest.mark.parametrize("name", parts.makers("learner"))
def test_every_learner_runs_with_its_defaults_written_out(capsys, name):
    taken = {o.name for part in CHOSEN for o in parts.options(parts.maker(part, CHOSEN[part]))}
    options = parts.options(parts.maker("learner", name))
    brief = {option.name: 1 for option in options if option.name.endswith("epochs")}
    argv = ["run", *QUICK, "--json", "--learner", name]
    if LEARNERS[name] is PerTask:
        assert "--rule Modulation" in call(capsys, *argv)[2]
        argv += ["--rule", "Modulation", "--m1", "2", "--m2", "2"]
    for option in options:
        flag = f"learner-{option.name}" if option.name in taken else option.name
        argv += [f"--{flag.replace('_', '-')}", str(brief.get(option.name, option.shown))]
    status, out, err = call(capsys, *argv)
    assert (status, err) == (0, "")
    assert json.loads(out)["learner"] == repr(LEARNERS[name](**brief))


def test_a_run_goes_on_from_its_checkpoint(capsys, tmp_path):
    argv = ["run", *QUICK, "--json", "--checkpoint", str(tmp_path / "run.safetensors")]
    first, again = (json.loads(call(capsys, *argv)[1]) for _ in range(2))
    assert first | {"seconds": 0} == again | {"seconds": 0}
    status, _, err = call(capsys, *argv, "--lr", "0.2")
    assert status == 2 and "training lr: 0.1 there, 0.2 here" in err and len(err.splitlines()) == 1


def test_run_reads_a_folder_of_images(capsys, tmp_path):
    g = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(12):
            pixels = torch.randint(0, 256, (8, 8, 3), generator=g, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    status, out, err = call(capsys, "run", *QUICK, "--json", "--data", str(tmp_path))
    assert (status, err) == (0, "")
    assert len(json.loads(out)["accuracy"]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rum"], "invalid choice: 'rum'"),
        (["run", "--learner", "EWK"], "learner: 'EWK' is unknown"),
        (["run", "--stream", "digit"], "did you mean 'digits'"),
        (["run", "--learner", "ER", "--memroy", "5"], "did you mean --memory?"),
        (["run", "--lr", "fast"], "lr: 'fast'; give a number"),
        (["run", "--lr", "-1"], "lr"),
        (["run", "--tasks", "0"], "--tasks: '0' is not a whole number from 1 on"),
        (["run", "--tasks", "99"], "tasks: 99 for 10 classes"),
        (["run", "--scenario", "classs"], "scenario"),
        (["run", "--consolidation", "CLeWI", "--alpha", "2"], "alpha"),
        (["run", "--model", "torchvision"], "torchvision needs --name"),
        (["run", "--data", "nowhere"], "nowhere"),
        (["run", "--device", "abacus"], "abacus"),
        (["bench", "sleep"], "benchmark: 'sleep' is unknown"),
        (["figures", "--jobs", "many"], "'many' is not a whole number"),
        (["figures", "--profile", "paper", "--write"], "--write"),
    ],
)
def test_errors_are_one_line_and_status_2(capsys, argv, message):
    status, out, err = call(capsys, *argv)
    assert status == 2 and out == ""
    assert message in err and err.startswith("clkit: ") and err.count("\n") == 1


def test_a_diverging_run_is_one_line_and_status_1(capsys):
    status, _, err = call(capsys, "run", *QUICK, "--lr", "1e30")
    assert status == 1 and err.count("\n") == 1 and "smaller lr" in err


@pytest.mark.parametrize("part", ["stream", "model", "learner", "consolidation"])
def test_every_choice_has_options_that_take_their_own_defaults(part):
    known = parts.makers(part)
    assert known
    for name, maker in known.items():
        for option in parts.options(maker):
            if isinstance(option.default, int | float | str | None):
                assert checks.parse(option.name, option.shown, option.hint) == option.default, (name, option)


def test_bench_prints_ratios_and_names_what_is_not_installed(capsys, monkeypatch):
    row = {"name": "merge / plain code", "unit": "seconds", "ours": 2.0, "theirs": 5.0, "ratio": 2.5}
    peer = row | {"name": "merge / Peer", "theirs": None, "ratio": None}
    monkeypatch.setattr("clkit.benchmarks.apart", lambda name: [row, peer] if name == "merging" else [row])
    status, out, _ = call(capsys, "bench", "--quiet")
    assert status == 0 and out.count("2.5") == len(benchmarks.benchmarks()) and out.count("not installed") == 2
    found = json.loads(call(capsys, "bench", "merging", "--quiet", "--json")[1])
    assert found == [{"benchmark": "merging", **row}, {"benchmark": "merging", **peer}]


def test_bench_writes_only_where_there_is_a_place_for_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("clkit.benchmarks.apart", lambda name: pytest.fail("it ran"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    status, _, err = call(capsys, "bench", "merging", "--quiet", "--write")
    assert status == 2 and "README.md has no line" in err and not (tmp_path / "figures").exists()


BY_WEIGHTS = [name for name, row in merging.MERGES.items() if not row.needs]
IMAGES = data.split(data.digits(), 2)
COUNTER = {"norm.num_batches_tracked": torch.tensor(7)}


class Files:
    """Weights of a toy network in files, and `clkit merge` of them."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys

    def write(self, name, w, ending=".safetensors"):
        path = self.folder / f"{name}{ending}"
        store.save_tensors(path, w, {"by": "us"}) if ending == ".safetensors" else torch.save(w, path)
        return str(path)

    def toys(self, row, dtype=torch.float32, ending=".safetensors", seed=0):
        """Files, the base's option, and what they hold."""
        ws, base = merging_toys.several(row, seed, dtype)
        files = [self.write(f"w{i}", w | COUNTER, ending) for i, w in enumerate(ws)]
        given = ["--base", self.write("base", base | COUNTER, ending)] if row.base else []
        return files, given, ws, base

    def merge(self, name, *argv, out="merged.safetensors"):
        """What a merge that succeeds writes, and what it prints."""
        path = self.folder / out
        status, printed, err = call(self.capsys, "merge", name, *argv, "--out", str(path), "--force")
        assert (status, err) == (0, "")
        return store.load_tensors(path)[0], printed

    def refuse(self, *argv, status=2):
        found, out, err = call(self.capsys, "merge", *argv)
        assert found == status and out == "" and err.startswith("clkit: ") and err.count("\n") == 1
        return err


@pytest.fixture
def files(tmp_path, capsys):
    return Files(tmp_path, capsys)


def flags(options):
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value).lower())]


@pytest.mark.parametrize(("dtype", "ending"), [(torch.float32, ".safetensors"), (torch.bfloat16, ".pt")], ids=str)
@pytest.mark.parametrize("name", BY_WEIGHTS)
class TestEveryMerge:
    def test_it_gives_the_bits_and_dtypes_that_it_gives_in_python(self, files, name, dtype, ending):
        row = merging.MERGES[name]
        paths, given, ws, base = files.toys(row, dtype, ending)
        merged, printed = files.merge(name, *paths, *given)
        ordered = [dict(sorted(w.items())) for w in (*ws, base)]  # as lots are drawn
        assert equal(merged, row(ordered[:-1], base=ordered[-1]) | COUNTER)
        assert {key: t.dtype for key, t in merged.items()} == {key: t.dtype for key, t in (ws[0] | COUNTER).items()}
        assert f": {name}" in printed and "2 running statistics are averaged" in printed and "1 counters" in printed
        written = {option.name: option.shown for option in parts.options(row.function, elsewhere=())}
        assert equal(files.merge(name, *paths, *given, *flags(written))[0], merged)

    def test_copies_merge_to_the_copy_and_order_matters_only_where_it_is_said_to(self, files, name, dtype, ending):
        row = merging.MERGES[name]
        paths, given, ws, _ = files.toys(row, dtype, ending)
        if row.exact is not None:
            copies, _ = files.merge(name, *paths[:1] * len(paths), *given, *flags(row.exact))
            for key, tensor in ws[0].items():
                torch.testing.assert_close(
                    copies[key], tensor, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
                )
        if row.symmetric:
            forth, back = (files.merge(name, *order, *given)[0] for order in (paths, paths[::-1]))
            for key, tensor in forth.items():
                torch.testing.assert_close(back[key], tensor, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_file_of_a_network_with_tied_weights_and_counters_goes_back_into_it(files):
    for make, stream in ((models.gpt, toys.tokens()), (partial(models.resnet18, width=4), IMAGES)):
        nets = [make(stream, seed=seed) for seed in range(3)]
        a, b, base = (files.write(f"n{i}", net.state_dict(), ".pth") for i, net in enumerate(nets))
        merged, printed = files.merge("ties", a, b, "--base", base, "--density", "0.5")
        first, second, start = map(get_weights, nets)
        nets[0].load_state_dict(merged)
        assert equal(get_weights(nets[0]), merging.merge("ties", [first, second], base=start, density=0.5))
        count = sum(p.numel() for p in nets[0].parameters())
        assert f"{count:,} parameters in {len(list(nets[0].parameters()))} tensors are merged" in printed


def test_weights_of_a_run_and_of_torch_may_be_mixed_and_the_file_says_what_it_is(files):
    nets = [models.resnet18(IMAGES, width=2, seed=seed) for seed in range(2)]
    a = files.write("a", get_weights(nets[0]))
    b = files.write("b", nets[1].state_dict(), ".pt")
    merged, printed = files.merge("interpolate", a, b, "--t", "0.25")
    set_weights(nets[0], merged)
    assert "counters" not in printed and not [key for key in merged if key.endswith("num_batches_tracked")]
    header = store.load_tensors(files.folder / "merged.safetensors")[1]
    assert header == {"merge": "interpolate", "options": {"t": 0.25}, "files": [a, b]}
    rows = [line.split() for line in printed.splitlines()[-3:]]
    assert [row[-1] for row in rows][-1] == "0" and float(rows[1][-1]) == pytest.approx(
        3 * float(rows[0][-1]), rel=1e-3
    )


def test_what_merge_cannot_use_is_refused_by_name_before_any_work(files, monkeypatch):
    w = merging_toys.weights(0, torch.float32)
    a, b = files.write("a", w), files.write("b", w)
    out = ["--out", str(files.folder / "merged.safetensors")]
    monkeypatch.setattr(merging.Merge, "__call__", lambda *_, **__: pytest.fail("it worked"))

    def refused(message, *argv, out=out):
        assert message in files.refuse(*argv, *out)

    refused("merge: 'tiess' is unknown; choose one of average, interpolate,", "tiess", a, b)
    refused("greedy_soup needs score, which files of weights lack; call clkit.merging.merge('greedy_soup', ws, score=",
            "greedy_soup", a, b)  # fmt: skip
    refused("or take average, interpolate,", "regmean", a, b)
    refused("density: 1.5; give a number in (0, 1]", "ties", a, b, "--base", a, "--density", "1.5")
    refused("did you mean --density?", "ties", a, b, "--base", a, "--desity", "1")
    refused("'--alpha'; give one of --base, --out, --force, --t", "interpolate", a, b, "--alpha", "0.3")
    refused("base: ties takes task vectors from one; give the weights before training as --base FILE", "ties", a, b)
    refused(f"base: {a} was given and average takes none; leave it out", "average", a, b, "--base", a)
    refused("files: 3 were given and slerp merges 2; give 2", "slerp", a, b, b)
    refused("nowhere.pt cannot be read (there is no such file)", "average", a, "nowhere.pt")
    refused("--out", "average", a, b, out=[])
    refused("the following arguments are required: FILE", "average")
    refused("merged.pt is no name for safetensors", "average", a, b, out=["--out", str(files.folder / "merged.pt")])
    refused(f"out: {b} is there already; give another path, or --force", "average", a, b, out=["--out", b])
    less, whole = {key: t for key, t in w.items() if key != "scalar"}, dict(w)
    refused("b.pt and " + a + " have different names: missing ['scalar'], unexpected []", "average", a,
            files.write("b", less, ".pt"))  # fmt: skip
    shapes = whole | {"norm.weight": torch.zeros(5)}
    refused("differ in the shape of 'norm.weight': (5,) and (4,)", "average", a, files.write("c", shapes))
    halves = whole | {"norm.weight": torch.zeros(4, dtype=torch.float16)}
    refused("differ in the dtype of 'norm.weight': float16 and float32; convert one", "average", a,
            files.write("d", halves))  # fmt: skip
    complex_ = whole | {"norm.weight": torch.zeros(4, dtype=torch.complex64)}
    refused("'norm.weight': torch.complex64 is no dense tensor", "average", a, files.write("e", complex_, ".pt"))
    refused("holds 'epoch', which is no tensor; give safetensors, or what torch.save", "average", a,
            files.write("f", whole | {"epoch": 3}, ".pt"))  # fmt: skip
    nested = files.write("n", {"state_dict": whole}, ".pt")
    refused("where its weights are one entry: torch.save(torch.load('n.pt')['state_dict'],", "average", a, nested)
    refused("holds no state dict", "average", a, files.write("g", torch.nn.Linear(2, 2), ".pt"))
    run = files.folder / "run.safetensors"
    training.run(toys.stream(2), models.mlp, training=toys.QUICK, progress=False).save(run)
    refused(
        "holds a saved run and no weights; write those of its last task: store.save_tensors(", "average", a, str(run)
    )
    assert not (files.folder / "merged.safetensors").exists()


@pytest.mark.parametrize("ours", [False, True])
def test_tied_weights_of_torch_and_of_a_run_go_together(files, ours):
    nets = [torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in ("stem", "head")}) for _ in range(3)]
    for net in nets:
        net["head"].weight = net["stem"].weight
    run, base = (files.write(f"n{i}", get_weights(nets[i])) for i in (0, 2))
    state = files.write("state", nets[1].state_dict(), ".pt")
    merged, _ = files.merge("dare", *([run, state] if ours else [state, run]), "--base", base if ours else state)
    first, second, third = (dict(sorted(get_weights(net).items())) for net in nets)
    ws, start = ([first, second], third) if ours else ([second, first], second)
    tied = {} if ours else {"head.weight": merged["stem.weight"]}
    assert equal(merged, merging.merge("dare", ws, base=start) | tied)


def test_names_that_are_tied_in_one_file_alone_are_merged_each_for_itself(files):
    one, two = torch.ones(2), torch.zeros(2)
    paths = [files.write("a", {"x": one, "y": one}, ".pt"), files.write("b", {"x": two, "y": two + 4}, ".pt")]
    merged, _ = files.merge("average", *paths)
    assert equal(merged, {"x": one / 2, "y": one * 2.5})


def test_counters_that_share_memory_and_parameters_with_gradients_are_merged(files):
    lot = torch.arange(6)
    w = {"a": torch.nn.Parameter(torch.ones(2)), "i": lot[:4], "j": lot[2:], "k": lot[:4]}
    merged, printed = files.merge("average", *[files.write("w", w, ".pt")] * 2)
    assert equal(merged, {name: tensor.detach() for name, tensor in w.items()}) and "2 counters are those" in printed


def test_what_is_no_file_of_weights_is_refused_and_leaves_no_folder(files):
    numbers, both = {0: torch.ones(2), 1: torch.ones(2)}, {0: torch.ones(2), "a": torch.ones(2)}
    out = ["--out", str(files.folder / "new" / "merged.safetensors")]
    for content, message in (
        (numbers, "holds 0, which is no name; give safetensors"),
        (both, "holds 0, which is no name; give safetensors"),
        (torch.ones(3, 2), "which is no name"),
        ({}, "holds no weights; give files of floating tensors"),
        ({"i": torch.arange(3)}, "holds no weights; give files of floating tensors"),
    ):
        path = files.write("odd", content, ".pt")
        assert message in files.refuse("average", path, path, *out)
    assert not (files.folder / "new").exists()


def test_a_merge_whose_name_is_not_in_front_is_refused_and_not_passed_over(files):
    path = files.write("a", {"x": torch.ones(2)})
    out = str(files.folder / "merged.safetensors")
    assert "merge: --out stands in the place of its name; give that first" in files.refuse(
        "--out", out, "average", path
    )
    assert "merge: --force stands" in files.refuse("--force")


def test_a_file_that_is_not_finite_is_named_and_what_was_there_stays(files):
    w = merging_toys.weights(0, torch.float32)
    a, b = files.write("a", w), files.write("b", w | {"scalar": torch.tensor(torch.nan)})
    kept = files.folder / "merged.safetensors"
    kept.write_bytes(b"kept")
    assert f"{b}: 'scalar' holds a NaN" in files.refuse("average", a, b, "--out", str(kept), "--force")
    assert kept.read_bytes() == b"kept"


def write_notebook(path, source):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)


def test_figures_tabulates_notebooks_and_fails_with_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    status, _, err = call(capsys, "figures")
    assert status == 2 and "give the path of one" in err
    write_notebook(tmp_path / "mine.ipynb", "1 + 1")
    status, out, err = call(capsys, "figures", str(tmp_path / "mine.ipynb"), "--quiet")
    assert (status, err) == (0, "") and out.splitlines()[1].split()[0] == "mine"
    status, _, err = call(capsys, "figures", "nowhere/mine.ipynb")
    assert status == 2 and "holds no notebooks" in err
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks" / "01-good.ipynb", "import os; assert os.environ['CLKIT_PROFILE'] == 'fast'")
    write_notebook(tmp_path / "notebooks" / "02-bad.ipynb", "raise RuntimeError('broken')")
    status, out, err = call(capsys, "figures", "01", "--quiet")
    assert (status, err) == (0, "") and out.splitlines()[1].split()[0] == "01-good" and out.rstrip().endswith("ok")
    status, out, err = call(capsys, "figures", "--quiet", "--out", str(tmp_path / "out"))
    assert status == 1 and "failed" in out and err == "clkit: 02-bad: RuntimeError: broken\n"


def test_the_program_itself(tmp_path):
    command = [sys.executable, "-m", "clkit.cli", "run", *QUICK, "--learner", "nothing-like-it"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("clkit: learner: 'nothing-like-it' is unknown") and "Traceback" not in done.stderr
