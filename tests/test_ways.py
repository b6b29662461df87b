"""The ways in and out, as people type them: every block of the page, as it stands, in its order."""

import importlib
import inspect
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clkit
from clkit import ER, cli, merging, run, store
from clkit.consolidation import CLeWI
from clkit.training import Training
from clkit.weights import equal, get_weights

PAGE = (Path(__file__).parent.parent / "notebooks" / "ways-in.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.S | re.M)
NAMES = "given images network rule merge consolidation table landscape files shell merged export onnx".split()
QUICK = Training(epochs=2, batch=8, lr=0.05)


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """What the page's blocks leave, executed in a folder with a few images of four classes."""
    folder, generator = tmp_path_factory.mktemp("ways"), np.random.default_rng(0)
    for name in "abcd":
        (folder / "my-images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(256, size=(36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "my-images" / name / f"{i}.png")
    found = {"__name__": __name__, "folder": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("matplotlib.pyplot.show", lambda: None)
        for name, (kind, block) in zip(NAMES, BLOCKS, strict=True):
            if name == "onnx":
                continue
            if kind == "python":
                exec(block, found)
            else:
                program, *argv = shlex.split(block)
                assert program == "clkit" and cli.main(argv) == 0
            found[f"after {name}"] = found.get("result")
        yield found


def test_every_block_has_at_most_ten_lines_of_code():
    lines = [sum(bool(line.strip()) for line in block.splitlines()) for _, block in BLOCKS]
    assert len(lines) == len(NAMES) and max(lines) <= 10


def test_images_and_a_network_of_ones_own(space):
    assert space["stream"].shape == (3, 32, 32) and len(space["stream"]) == 2
    for name in ("images", "network", "merge"):
        assert space[f"after {name}"].accuracy.shape == (2, 2)
    assert space["after network"].reports[1]  # it was aligned and merged


def test_a_rule_of_ones_own_is_held_to_where_it_was(space):
    def moved(strength):
        result = run(space["stream"], space["network"], space["Near"](strength), training=QUICK, progress=False)
        ends = result.trained
        return sum(float((ends[1][name] - ends[0][name]).square().sum()) for name in ends[0] if "running" not in name)

    assert moved(10.0) < 0.5 * moved(0.0)
    run(space["stream"], space["network"], space["Near"](0.01), CLeWI(0.3), QUICK, progress=False)


def test_the_rule_on_top_of_replay(space):
    found = space | {}
    exec(BLOCKS[NAMES.index("rule")][1].replace("Near(Learner)", "Near(ER)"), found)
    ends = [
        run(space["stream"], space["network"], rule, training=QUICK, progress=False).weights
        for rule in (ER(memory=50), found["Near"](memory=50, strength=0.0), found["Near"](memory=50, strength=1.0))
    ]
    assert equal(ends[0][1], ends[1][1]) and equal(ends[0][0], ends[2][0]) and not equal(ends[0][1], ends[2][1])


def test_a_merge_of_ones_own_is_what_the_run_deploys(space):
    result = space["after merge"]
    merged = {name: tensor for name, tensor in space["merged"].items() if "running" not in name}
    assert equal(merged, {name: result.weights[-1][name] for name in merged})


def test_a_consolidation_of_ones_own_goes_the_share_that_it_is_told(space):
    result = run(space["stream"], space["network"], consolidation=space["Halfway"](1.0), training=QUICK, progress=False)
    assert equal(result.weights[1], result.weights[0]) and not equal(result.weights[1], result.trained[1])


def test_a_table_of_ones_own(space):
    assert len(space["table"]) == 9 and set(space["table"].method) == {"ER", "ER + CLeWI", "ER + median"}


def test_a_landscape_of_ones_own(space):
    assert space["line"].accuracy.shape == (11, 2) and space["plane"].loss.shape == (5, 5)
    assert space["line"].accuracy[0] == pytest.approx(space["after landscape"].accuracy[-1])
    with Image.open(space["folder"] / "landscape.png") as picture:
        assert picture.size == (900, 400)


def test_files_merged_in_the_shell_are_merged_as_in_python(space):
    start, *ends = (dict(sorted(w.items())) for w in (space["start"], *space["after landscape"].trained))
    assert equal(space["tensors"], merging.merge("ties", ends, base=start, density=0.3))
    assert space["header"]["merge"] == "ties" and space["header"]["options"] == {"density": 0.3}


def test_the_command_of_the_page_is_installed(space):
    [line] = [block for kind, block in BLOCKS if kind == "bash"]
    _, *argv = shlex.split(line)
    command = [str(Path(sys.executable).parent / "clkit"), *argv]
    done = subprocess.run(command, cwd=space["folder"], capture_output=True, text=True)
    assert done.returncode == 2 and "give another path, or --force" in done.stderr
    before = store.load_tensors(space["folder"] / "merged.safetensors")
    subprocess.run([*command, "--force"], cwd=space["folder"], check=True, stdout=subprocess.DEVNULL)
    assert equal(store.load_tensors(space["folder"] / "merged.safetensors")[0], before[0])


def test_what_goes_out_is_the_deployed_network_to_the_bit(space):
    net, x = space["network"](space["stream"], seed=5), space["inputs"]
    net.load_state_dict(torch.load(space["folder"] / "model.pt", weights_only=True))
    assert equal(get_weights(net), space["after landscape"].weights[-1])
    wanted, more = net.eval()(x), torch.cat([x, x, x])
    loaded = torch.export.load(space["folder"] / "model.pt2").module()
    torch.testing.assert_close(loaded(x), wanted)
    torch.testing.assert_close(loaded(more), net(more))


def test_onnx_computes_the_same(space, monkeypatch):
    pytest.importorskip("onnxscript", reason="needs onnxscript, which is not installed")
    onnx = pytest.importorskip("onnx.reference", reason="needs onnx, which is not installed")
    monkeypatch.chdir(space["folder"])
    exec(BLOCKS[NAMES.index("onnx")][1], space)
    x = torch.cat([space["inputs"]] * 2)
    [found] = onnx.ReferenceEvaluator("model.onnx").run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), space["net"](x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_api_pages_have_every_public_name(tmp_path):
    pytest.importorskip("pdoc", reason="needs pdoc, which is not installed: pip install 'clkit[docs]'")
    command = [sys.executable, "-W", "error", "-m", "pdoc", "clkit", "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    missing = []
    for info in pkgutil.walk_packages(clkit.__path__, "clkit."):
        page = (tmp_path / info.name.replace(".", "/")).with_suffix(".html").read_text(encoding="utf-8")
        for name, thing in vars(importlib.import_module(info.name)).items():
            named = inspect.isroutine(thing) or isinstance(thing, type)
            if named and name[0] != "_" and thing.__module__ == info.name:
                missing += [f"{info.name}.{name}"] * (f'id="{name}"' not in page)
    assert not missing
