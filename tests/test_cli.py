"""The command line, called in this process and once as a program."""

import json
import subprocess
import sys

import nbformat
import pytest
import torch
from PIL import Image

from clkit import benchmarks, checks, cli
from clkit.experiments import parts
from clkit.learners import LEARNERS, PerTask

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
    assert status == 0 and "figures, run or bench" in out
    assert call(capsys)[0] == 2
    status, out, _ = call(capsys, "run", "--learner", "ER", "--consolidation", "CLeWI", "--help")
    assert status == 0
    for option in ("--memory", "--alpha", "--epochs", "--widths", "--data", "--label-smoothing"):
        assert option in out
    assert "--alpha" not in call(capsys, "run", "--help")[1]
    for command in ("figures", "bench"):
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
