"""The explorer: what it offers, that it runs what it says, and that it stops, told from code as the page tells it."""

import asyncio
import re
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

mpl.use("agg")

from clkit import ER, Learner, data, evaluate, models, training
from clkit.consolidation import CONSOLIDATIONS
from clkit.experiments import parts
from clkit.experiments.notebooks import WIDGET
from clkit.interact import explorer
from clkit.learners import LEARNERS


@dataclass
class Mine(Learner):
    """A learner of one's own. It has two settings."""

    strength: float = 0.5
    kind: str = "soft"


class Plain(Learner):
    def __init__(self, decay=0.9, on=True):
        self.decay, self.on = decay, on


def quick(**own):
    """A page set to a run of a fraction of a second."""
    page = explorer(**own)
    page.choose("model", "mlp", hidden=(8,))
    page.choose("split", tasks=2)
    page.choose("training", epochs=1, batch=128)
    return page


def ran(page):
    page.run()
    page.wait()
    return page.runs[-1]


@pytest.fixture(scope="module")
def two():
    """A page with two runs: replay with a merge, and fine-tuning."""
    page = quick()
    page.choose("learner", "ER", memory=20)
    page.choose("consolidation", "CLeWI", alpha=0.4)
    ran(page)
    page.choose("learner", "fine-tuning")
    page.choose("consolidation", "none")
    ran(page)
    return page


def test_all_that_the_library_has_can_be_chosen_with_its_own_settings():
    page = explorer(learners={"mine": Mine, "plain": Plain})
    assert {*LEARNERS, "mine", "plain"} == page._choices["learner"].makers.keys()
    assert CONSOLIDATIONS.keys() == page._choices["consolidation"].makers.keys()
    for part in ("learner", "consolidation", "model", "rule", "stream", "training"):
        for name, maker in page._choices[part].makers.items():
            page.choose(part, name)
            choice = page._choices[part]
            assert [*choice.fields] == [option.name for option in parts.options(maker)] and choice.settings() == {}
    page.choose("learner", "mine", strength=2)
    assert page.recipe().made("learner") == Mine(2.0)
    page.choose("learner", "plain", decay=0.5, on=False)
    assert page._choices["learner"].settings() == {"decay": 0.5, "on": False}
    page.choose("consolidation", "CLeWI", alpha=(0.1, 0.3), align=None, refresh=False)
    assert page.recipe().code("consolidation") == "CLeWI(alpha=(0.1, 0.3), align=None, refresh=False)"


@pytest.mark.parametrize("number", [1, 2])
def test_the_code_makes_the_same_run_bit_for_bit(two, number):
    space, run = {}, two.runs[number - 1]
    exec(two.script(number).replace("seed=0)", "seed=0, progress=False)"), space)
    result = space["result"]
    assert (result.accuracy == run.result.accuracy).all() and (result.losses == run.result.losses).all()
    assert result.config == run.result.config
    assert len(two.script(number).split("\n\n")[1].splitlines()) == 2


def test_a_row_of_accuracies_comes_after_every_task(two):
    assert (np.stack(two.rows) == two.runs[-1].result.accuracy).all()


def test_the_table_tells_the_runs_apart_and_their_differences(two):
    table = two.table(against=1)
    assert table.method.tolist() == ["ER(memory=20) + CLeWI(alpha=0.4)", "Learner()"]
    assert table.loc[1, "acc − 1"] == 0 and table.loc[2, "acc − 1"] == table.acc[2] - table.acc[1]
    assert table.acc[1] == two.runs[0].result.summary()["acc"]
    two._against.value = 2
    assert "acc − 2" in two._bundles["table"]["text/html"]
    with pytest.raises(ValueError, match="against: 3 is unknown"):
        two.table(against=3)


def test_the_handle_measures_from_the_new_weights_to_the_old_ones(two):
    two._shown.value = 1
    run, line = two.runs[0], two.line
    result, net = run.result, run.result.model
    line.move({"line": "plain"})
    for alpha, weights in ((0.0, result.trained[1]), (1.0, result.weights[0])):
        before = line.png
        line.move({"α": 0.5})
        line.move({"α": alpha})
        assert line.error is None and line.png.startswith(b"\x89PNG")
        there = line._draw.__self__.measure(alpha, 2, "plain")
        live = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        training.loop.set_weights(net, weights)
        assert np.allclose(evaluate(net, run.stream).accuracy, there)
        net.load_state_dict(live)
    assert line.png != before
    line.move({"line": "aligned, re-estimated"})
    assert line.error is None
    assert two._code.value == f"<pre>{two.script(1)}</pre>"
    two._shown.value = 2
    assert two.line is not line and "Learner()" in two._code.value


@pytest.mark.parametrize("scenario", ["class", "domain", "task"])
def test_scenarios_are_run_and_written_as_they_are_chosen(scenario):
    page = quick()
    page.choose("split", scenario=scenario, order=3)
    run = ran(page)
    space = {}
    exec(page.script().rpartition("\n")[0], space)
    assert space["stream"].fingerprint == run.stream.fingerprint and run.stream.scenario == scenario


def test_what_is_ones_own_stands_in_the_code_by_its_name():
    dataset = data.digits()
    page = quick(data={"mine": dataset}, learners={"own": Mine, "fifty": ER(50)})
    page.choose("stream", "mine")
    page.choose("learner", "own", strength=1.0)
    script = page.script()
    assert "split(mine, tasks=2)" in script and "Mine(strength=1.0)" in script
    assert f"from {__name__} import Mine" in script
    assert ran(page).stream.fingerprint == data.split(dataset, 2).fingerprint
    page.choose("learner", "fifty")
    assert ", fifty, " in page.recipe().script()
    page.choose("model", "convnet", widths=(4, 8))
    page.choose("rule", "Modulation", m1=2)
    assert "partial(modulated, model=partial(convnet, widths=(4, 8)), rule=Modulation(m1=2" in page.recipe().script()


def test_ones_own_folder_of_images(tmp_path):
    generator = np.random.default_rng(0)
    for domain, name in [(d, c) for d in ("ink", "pencil") for c in ("cat", "dog")]:
        for i in range(8):
            path = tmp_path / domain / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path)
    page = quick()
    page.choose("stream", "folder")
    page.run()
    with pytest.raises(ValueError, match="folder needs path, a text or a path"):
        page.wait()
    page.choose("stream", "folder", path=str(tmp_path / "ink"))
    assert len(ran(page).stream) == 2
    page.choose("stream", "folders", path=str(tmp_path))
    page.choose("split", scenario="domain")
    assert [task.name for task in ran(page).stream] == ["ink", "pencil"]


def test_stop_ends_the_run_at_its_next_step():
    page = quick()
    page.choose("training", epochs=10**6)
    page.run()
    with pytest.raises(ValueError, match="another one goes on"):
        page.run()
    while page._bar.value == 0:
        page._take(*page._events.get())
    assert page.running and page._run.disabled and not page._halt.disabled
    page.stop()
    page.wait()
    page._thread.join()
    assert not page.running and page.runs == [] and page._status.value == "stopped" and not page._run.disabled
    page.choose("training", epochs=1)
    assert ran(page).result.accuracy.shape == (2, 2)


def test_the_page_is_alive_meanwhile():
    """In an event loop, as a kernel has one, nobody needs to wait for the run."""
    page, turns = quick(), []

    async def look():
        page._run.click()
        while page.running:
            turns.append(page._bar.value)
            await asyncio.sleep(0.01)

    asyncio.run(look())
    assert len(page.runs) == 1 and len(turns) > 1 and "on average" in page._status.value


def test_a_bad_setting_stands_on_the_page_before_any_work(monkeypatch):
    page = quick()
    monkeypatch.setattr(page, "_work", lambda *_: pytest.fail("it ran"))
    for part, settings, message in (
        ("training", {"lr": "fast"}, "lr: 'fast'; give a number"),
        ("training", {"lr": "-1"}, "lr: -1.0; give"),
        ("model", {"hidden": "0"}, "hidden: (0,); give"),
        ("split", {"tasks": "two"}, "tasks: 'two'; give"),
    ):
        before = {name: page._choices[part].fields[name][1].value for name in settings}
        page.choose(part, **settings)
        page._run.click()
        assert re.search(re.escape(message).replace("'", ".+"), page._status.value) and not page.running
        with pytest.raises(ValueError, match=re.escape(message)):
            page.run()
        page.choose(part, **before)
    page.seed.value = "-1"
    with pytest.raises(ValueError, match="seed: -1"):
        page.run()
    with pytest.raises(ValueError, match="did you mean 'learner'"):
        page.choose("learners", "ER")
    with pytest.raises(ValueError, match="did you mean 'ER'"):
        page.choose("learner", "er")
    with pytest.raises(ValueError, match=r"settings: .memroy. is unknown.*memory"):
        page.choose("learner", "ER", memroy=5)


def test_what_a_run_raises_stands_on_the_page_and_comes_to_who_waits():
    page = quick()
    page.choose("split", tasks=99)
    page.run()
    with pytest.raises(ValueError, match="tasks: 99 for 10 classes"):
        page.wait()
    assert "tasks: 99 for 10 classes" in page._status.value and not page.running and page.runs == []


def test_one_task_has_no_line():
    page = quick()
    page.choose("split", tasks=1)
    ran(page)
    assert page._line.children == () and "image/png" in page._bundles["picture"]


def test_picture_and_table_are_outputs_of_their_own(displayed):
    shown = displayed
    page = quick()
    page._ipython_display_()
    assert WIDGET in shown[0] and len(shown) == 3
    ran(page)
    pictures = [bundle for bundle in shown[3:] if "image/png" in bundle]
    assert [bundle["text/plain"][:6] for bundle in pictures[:2]] == ["1 of 2", "2 of 2"]
    assert shown[-1]["text/html"].startswith("<table") and "Learner()" in shown[-1]["text/plain"]
    count = len(shown)
    page.line.move({"α": 0.5})
    assert len(shown) == count + 1 and shown[-1]["image/png"] == page.line.png
    page._ipython_display_()
    count = len(shown)
    page.line.move({"α": 0.1})
    assert [bundle["image/png"] for bundle in shown[count:]] == 2 * [page.line.png]  # in both places
    before = page.line
    ran(page)
    count = len(shown)
    before.move({"α": 0.9})  # a key that was pressed before the run ended
    assert len(shown) == count


def test_numbers_that_overflow_are_told():
    page = quick()
    page.choose("training", lr=1e30)
    page.run()
    with pytest.raises(FloatingPointError, match="smaller lr"):
        page.wait()
    assert "FloatingPointError" in page._status.value


def test_nothing_is_drawn_at_random_for_the_page(two):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    two._shown.value = 1
    two.line.move({"α": 0.35})
    assert (torch.random.get_rng_state() == before).all()
    assert models.mlp(two.runs[0].stream, hidden=(8,)) is not None


class Asking(Learner):
    """Two settings that it cannot be without."""

    def __init__(self, kind: Literal["soft", "hard"], on: bool):
        self.kind, self.on = kind, on


class Outer:
    class Inner(Learner):
        pass


def test_required_words_and_boxes_begin_somewhere_and_refuse_what_they_cannot_take():
    page = quick(learners={"asking": Asking})
    page.choose("learner", "asking")
    assert page._choices["learner"].settings() == {"kind": "soft", "on": False}
    page.choose("learner", kind="hard", on=True)
    assert page._choices["learner"].settings() == {"kind": "hard", "on": True}
    with pytest.raises(ValueError, match=r"kind: 'sort' is unknown; .* did you mean 'soft'"):
        page.choose("learner", kind="sort")
    with pytest.raises(ValueError, match="on: 'yes'; give True or False"):
        page.choose("learner", on="yes")


def test_what_has_no_name_of_its_own_goes_by_that_which_it_was_given():
    page = quick(learners={"fifty": lambda memory=50: ER(memory), "inner": Outer.Inner})
    page.choose("learner", "fifty", memory=20)
    assert ", fifty(memory=20), " in page.script()
    page.choose("learner", "inner")
    assert ", Outer.Inner(), " in page.script() and f"from {__name__} import Outer\n" in page.script()
    odd: list = [{"data": {"my data": data.digits()}}, {"learners": {"my learner": lambda: Learner()}}]
    for own in odd:
        with pytest.raises(ValueError, match=r"'my .*' is no name that code has for it"):
            explorer(**own)


class Exits(Learner):
    def loss(self, model, batch):
        raise SystemExit(3)


class Unseen(Learner):
    """It predicts while it is trained and not when it is looked into."""

    ended = False

    def predict(self, *args, **options):
        if Unseen.ended:
            raise RuntimeError("not any more")
        return super().predict(*args, **options)


def test_whatever_ends_a_run_it_does_not_go_on_without_end():
    page = quick(learners={"exits": Exits})
    page.choose("learner", "exits")
    page.run()
    with pytest.raises(SystemExit):
        page.wait()
    assert not page.running and "SystemExit" in page._status.value


def test_a_run_that_cannot_be_looked_into_stands_in_the_table(monkeypatch):
    page = quick(learners={"unseen": Unseen})
    page.choose("learner", "unseen")
    monkeypatch.setattr(page, "_look", lambda look=page._look: (setattr(Unseen, "ended", True), look()))
    ran(page)
    assert "RuntimeError: not any more" in page._status.value and page._line.children == ()
    assert "Unseen()" in page._bundles["table"]["text/plain"] and "image/png" in page._bundles["picture"]
    assert page._code.value and page._shown.value == 1


def test_a_page_outlives_the_loop_that_it_ran_in():
    page = quick()

    async def begin():
        page.run()

    asyncio.run(begin())
    page.wait()
    assert len({run.recipe.seed for run in [*page.runs, ran(page)]}) == 1 and len(page.runs) == 2


def test_a_further_run_is_looked_into_once_and_the_comparison_stays(monkeypatch):
    page, ways = quick(), []
    ran(page)
    page._against.value = 1
    monkeypatch.setattr(page, "_look", lambda look=page._look: (ways.append(page._shown.value), look()))
    ran(page)
    assert ways == [2] and page._against.value == 1 and "acc − 1" in page._bundles["table"]["text/plain"]
    page._shown.value = 1
    assert ways == [2, 1]
    with pytest.raises(ValueError, match="number: 0 is unknown; choose one of 1, 2"):
        page.script(0)


def test_a_run_stopped_while_data_are_read_trains_nothing(monkeypatch):
    page = quick()
    monkeypatch.setattr(parts.Recipe, "model", lambda *_: pytest.fail("it went on"))
    monkeypatch.setattr(parts.Recipe, "stream", lambda recipe, read=parts.Recipe.stream: (page.stop(), read(recipe))[1])
    page.run()
    page.wait()
    assert page._status.value == "stopped" and page.runs == []
