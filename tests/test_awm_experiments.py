"""The experiments of adaptive weight modulation: their data, their grids, and real image sets where they are."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from clkit import data, models
from clkit.learners import PerTask
from clkit.modulation import LowRank, Mask, Modulated, Modulation, Own, modulated
from clkit.training import Training, run
from studies import awm

GRIDS = (
    "main",
    "main_tuning",
    "real",
    "tuning",
    "table",
    "forgetting",
    "factors",
    "variants",
    "which_part",
    "architectures",
)
LATIN = data.Normalize((0.2,), (0.3,))


@pytest.fixture
def untrained(monkeypatch):
    """Backbones as they are built, and Latin's normalisation without drawing all of it."""

    monkeypatch.setattr(awm, "pretrained", awm.untrained)
    monkeypatch.setattr(awm, "_latin", lambda: LATIN)


def thinned(stream: data.Stream, every: int) -> data.Stream:
    """The stream with one in so many of its examples."""
    parts = (replace(task, train=task.train[::every], test=task.test[::every]) for task in stream)
    return replace(stream, tasks=tuple(parts))


def rows(examples: data.Examples) -> set[bytes]:
    return {row.numpy().tobytes() for row in examples.x}


class TestStreams:
    def test_a_script_has_its_own_examples_to_train_to_choose_and_to_test_by(self):
        test, held_out = awm.script("greek"), awm.script("greek", "held out")
        assert rows(test.train) == rows(held_out.train)
        parts = [rows(test.train), rows(test.test), rows(held_out.test)]
        assert [len(part) for part in parts] == [20 * 24, 20 * 12, 20 * 12]
        assert len(set.union(*parts)) == sum(map(len, parts))
        for part, count in ((test.train, 24), (test.test, 12), (held_out.test, 12)):
            assert part.y.bincount().tolist() == [count] * 20
        with pytest.raises(ValueError, match="part: 'validation' is unknown; choose one of test, held out"):
            awm.script("greek", "validation")

    def test_scripts_are_tasks_with_classes_of_their_own_prepared_as_latin(self):
        stream = awm.scripts(("greek", "math"))
        latin = awm.latin()[0]
        assert (len(stream), len(stream.classes), stream.scenario) == (2, 40, "task")
        assert stream[0].normalize == latin.normalize and stream.shape == tuple(latin.train.x.shape[1:])
        assert stream.classes[0].startswith("greek/") and stream.classes[-1].startswith("math/")

    def test_the_seed_draws_characters_images_and_the_order(self, untrained):
        a, again, b = (awm.drawn_scripts(seed) for seed in (1, 1, 2))
        assert [task.name for task in a] == awm.order(1) != awm.order(2) == [task.name for task in b]
        assert sorted(awm.order(1)) == sorted(awm.SCRIPTS) and {len(task.classes) for task in a} == {10}
        assert set(a.classes) != set(b.classes)
        assert all(torch.equal(x.train.x, y.train.x) for x, y in zip(a, again, strict=True))
        held = awm.script("greek", "held out", 1)
        parts = [rows(held.train), rows(held.test), rows(awm.script("greek", seed=1).test)]
        assert len(set.union(*parts)) == sum(map(len, parts)) and rows(awm.script("greek", seed=1).train) == parts[0]

    def test_forty_tasks_of_characters_that_are_no_latin_ones(self, untrained):
        stream = awm.characters(40)
        assert len(stream) == 40 and {len(task.classes) for task in stream} <= {7, 8, 9, 10, 11, 12}
        assert not set(stream.classes) & set(data.glyphs("latin", per_class=1).classes)

    def test_the_same_tasks_backwards(self, untrained):
        there, back = awm.forty(0), awm.forty(0, backwards=True)
        assert [task.classes for task in there] == [task.classes for task in back][::-1]

    def test_a_set_that_is_nowhere_is_named(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CLKIT_DATA", str(tmp_path))
        with pytest.raises(ValueError, match=r"name: 'wikiart' is unknown; .* or a pack in"):
            awm.pictures(("wikiart",))


@pytest.mark.usefixtures("untrained")
class TestGrids:
    @pytest.mark.parametrize("name", GRIDS)
    def test_a_grids_record_is_plain_and_tells_its_methods_apart(self, name):
        config = getattr(awm, name)().config
        json.dumps(config)
        assert "0x" not in str(config)
        records = [str(record) for record in config["methods"].values()]
        assert len(set(records)) == len(records)

    def test_methods_are_what_their_names_say(self):
        methods = awm.table().methods
        stream = awm.scripts(("greek", "math"))
        nets = {name: method.model(stream, seed=0) for name, method in methods.items()}
        assert {name: type(net.rule) for name, net in nets.items()} == {
            "classifier, statistics frozen": type(None),
            "classifier": type(None),
            "norms": type(None),
            "low rank 2": LowRank,
            "mask": Mask,
            "full": Own,
            "AWM 4": Modulation,
            "AWM 2": Modulation,
            "mask, published rate": Mask,
            "AWM 4, two rates": awm.Scaled,
            "mask, two rates": Mask,
        }
        assert nets["classifier, statistics frozen"].statistics == "frozen" and nets["norms"].affine
        assert methods["mask, published rate"].training.lr == 1e-4 != methods["mask"].training.lr
        assert all(net.outputs == 40 for net in nets.values())

    @pytest.mark.parametrize("kind", ["gains", "masks"])
    def test_a_rate_for_the_head_alone_is_a_scale_of_the_rest(self, kind):
        """With Adam, tensors at k times the rate and of k times the scale make the same weights as without either."""
        stream, made = data.split(data.digits(), 5, scenario="task"), {}
        for name, head in {"one": 3e-3, "two": 3e-2}.items():
            method = getattr(awm, kind)(3e-3, head)
            net = Modulated(models.convnet(stream, widths=(8, 8)), method.model.keywords["rule"])
            task = stream[0]
            x, y = task.prepare(task.train.x[:64]), task.train.y[:64]
            optimizer = torch.optim.Adam(list(net.gains.values()), lr=head, eps=1e-30)
            for _ in range(3):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
            made[name] = net.weights()["conv2.weight"]
        assert torch.allclose(made["one"], made["two"], atol=1e-5)
        assert not torch.equal(made["one"], models.convnet(stream, widths=(8, 8)).conv2.weight)

    def test_heads_depend_on_the_seed_and_the_backbone_does_not(self):
        stream = awm.scripts(("greek", "math"))
        a, b, again = (awm.backbone(stream, "vit", seed=seed) for seed in (0, 1, 0))
        for name, tensor in a.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name])
            assert torch.equal(tensor, b.state_dict()[name]) != name.startswith("linear.")

    def test_costs_count_what_a_task_keeps(self):
        table = awm.costs(awm.table()).set_index("method")
        net = Modulated(awm.pretrained())
        assert table.loc["AWM 4", "gains"] == net.parameters_per_task()["gains"] == 23_860
        statistics = 4 * net.parameters_per_task()["statistics"]
        assert table.loc["AWM 4", "bytes"] == 4 * 23_860 + statistics
        assert table.loc["mask", "bytes"] == -(-table.loc["mask", "gains"] // 8) + statistics
        assert table.loc["classifier, statistics frozen", "bytes"] == 0
        assert ((table["bytes with head"] - table["bytes"]) == 4 * 1281 * 20).all()

    def test_costs_at_the_papers_scale_need_no_images(self):
        table = awm.costs(awm.table("paper")).set_index("method")
        assert table.loc["AWM 4", "gains"] == 136_860 and table.loc["mask", "bytes"] == 273_720 + 8 * 17_056

    def test_parts_of_the_network_are_all_of_it(self):
        counts = awm.costs(awm.which_part()).set_index("method")["gains"]
        stem = 9 * (16 // 16)
        assert counts["AWM 4, depthwise alone"] + counts["AWM 4, pointwise alone"] + stem == counts["AWM 4"]

    def test_the_weakest_set_is_chosen_by_other_seeds_and_a_knee_is_a_bend(self):
        gaps = {("greek", 0): 1.0, ("math", 0): 3.0, ("greek", 1): 5.0, ("math", 1): 4.0}
        table = [
            {"method": method, "seed": seed, "set": name, "acc": gap * (method == "AWM 4")}
            for (name, seed), gap in gaps.items()
            for method in ("AWM 4", "mask")
        ]
        assert awm.weakest(pd.DataFrame(table)) == {0: 3.0, 1: 5.0}
        bend = [{"method": f"AWM {m}", "seed": 0, "acc": acc} for m, acc in ((2, 0.9), (4, 0.8), (8, 0.5))]
        assert awm.knee(pd.DataFrame(bend)) == {0: pytest.approx(0.2)}

    def test_rows_of_sets_take_what_each_was_when_learned(self):
        matrix = (np.arange(36.0) / 36).reshape(6, 6)
        made = awm.sets(pd.DataFrame([{"method": "mask", "seed": 3, "matrix": matrix}]))
        assert list(made["set"]) == awm.order(3) and np.array_equal(made.acc, matrix.diagonal())

    def test_a_grid_runs(self, tmp_path):
        grid = awm.forgetting()
        small = replace(
            grid,
            streams={"two": lambda seed: thinned(awm.scripts(("greek", "math")), 6)},
            methods={name: replace(m, training=replace(m.training, epochs=1)) for name, m in grid.methods.items()},
            seeds=(0,),
        )
        table = small.run(store=tmp_path, jobs=1).set_index("method")
        assert table.loc["AWM 4", "forgetting"] == 0
        assert set(table.index) == {"AWM 4", "fine-tuning", "EWC", "LwF", "EWC, frozen", "LwF, frozen"}


@pytest.mark.packs("usps")
def test_a_real_set_is_drawn_by_the_seed_and_settings_are_chosen_on_other_images(packs, monkeypatch):
    monkeypatch.setenv("CLKIT_DATA", str(packs))
    test, held_out, other = (awm.few(*args)[0] for args in ((0, "usps"), (0, "usps", True), (1, "usps")))
    assert rows(test.train) == rows(held_out.train) != rows(other.train)
    assert not rows(held_out.train) & rows(held_out.test) and len(test.test) == awm.TEST_IMAGES
    assert test.train.y.bincount().tolist() == [awm.IMAGES // 10] * 10
    few = replace(test, train=test.train[::7], test=test.test[::40])
    method = awm.real().methods["mask"]
    training = replace(method.training, epochs=2, batch=4)
    stream = data.Stream("few", (few,), awm.few(0, "usps").classes, "task")
    result = run(stream, method.model, method.learner, None, training, device="cpu", progress=False)
    assert awm.kept(result)["bytes"] > 2_000_000 / 8


@pytest.mark.packs("mnist")
@pytest.mark.packs("usps")
@pytest.mark.packs("cifar10")
@pytest.mark.packs("pacs48")
def test_real_images_are_learned_and_none_is_forgotten(packs, monkeypatch):
    monkeypatch.setenv("CLKIT_DATA", str(packs))
    names = ("mnist", "usps", "cifar10", "pacs48/photo", "pacs48/art_painting", "pacs48/cartoon", "pacs48/sketch")
    stream = awm.pictures(names, size=24, limit=20)
    assert stream.shape == (3, 24, 24) and [len(task.classes) for task in stream] == [10, 10, 10, 7, 7, 7, 7]
    assert [task.augment.flip for task in stream] == [False, False, True, True, True, True, True]
    model = partial(modulated, model=partial(models.convnet, widths=(16, 32)), rule=Modulation(2, 2))
    training = Training(6, 16, 0.03, optimizer="adamw")
    result = run(stream, model, PerTask(), None, training, device="cpu", progress=False)
    for k in range(len(stream)):
        assert (result.accuracy[k:, k] == result.accuracy[k, k]).all()
    chance = np.array([1 / len(task.classes) for task in stream])
    assert (np.diag(result.accuracy) / chance).mean() > 2
