"""The settings, grids and studies of HCMM: what is drawn anew, what is kept apart, and that they run end to end."""

import json
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pandas as pd
import pytest
import torch
from pytest import approx
from torch.nn import functional as F

from clkit import data, models
from clkit.consolidation import HCMM, Merging
from clkit.data import split
from clkit.evaluation import evaluate
from clkit.experiments import Comparison, grid, page, study
from clkit.tangent import Linearized
from clkit.training import run
from clkit.weights import equal, get_weights, lerp
from studies import hcmm
from studies import hcmm_streams as settings
from studies.pretraining import Recipe

TINY = Recipe(
    partial(models.encoder, widths=(8, 16), dim=16),
    replace(settings.PRETRAINING, epochs=6, batch=32),
    lambda seed: split(data.glyphs(characters="abcdefghkmnrstuw", per_class=24, seed=seed), 1),
)


def small(seed: int = 0, tasks: int = 3, classes: int = 9):
    full = data.glyphs(characters=settings.alphabet(seed, classes), per_class=12, seed=seed)
    return split(replace(full, normalize=TINY.source(seed)[0].normalize), min(tasks, 3))


def small_fonts(seed: int = 0):
    sets = {
        f: data.glyphs(characters=settings.alphabet(seed, 4), fonts=f, per_class=8, seed=seed) for f in ("sans", "mono")
    }
    return data.domains(sets)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setenv("CLKIT_CACHE", str(tmp_path))
    network = partial(settings.pretrained, recipe=TINY, support=settings.rendered)
    monkeypatch.setitem(settings.SETTINGS, "glyphs", settings.Setting(small, network))
    monkeypatch.setitem(settings.SETTINGS, "fonts", settings.Setting(small_fonts, network))
    for module in (hcmm, settings):
        monkeypatch.setattr(module, "glyphs", small)


class TestSettings:
    def test_glyphs_are_a_hundred_characters_in_tasks_that_a_seed_draws_anew(self, monkeypatch):
        monkeypatch.undo()
        one, other = settings.glyphs(0), settings.glyphs(1, 10)
        assert (len(one), len(other), len(one.classes)) == (20, 10, 100) and set(one.classes) != set(other.classes)
        assert sorted(c for task in one for c in task.classes) == list(range(100))
        assert all(task.train.y.bincount()[list(task.classes)].tolist() == [40] * 5 for task in one)
        assert sum(len(task.test) for task in one) == 1000
        assert not set(one.classes) & set(data.glyphs(("latin", "digits"), per_class=1).classes)

    def test_support_is_apart_from_every_task(self, monkeypatch):
        monkeypatch.undo()
        stream = settings.glyphs(0)
        shown = settings.rendered(stream, 0)
        assert shown.y.bincount().tolist() == [settings.SHOTS] * 100
        known = {row.numpy().tobytes() for task in stream for row in torch.cat([task.train.x, task.test.x])}
        assert not known & {row.numpy().tobytes() for row in shown.x}

    def test_fonts_have_fewer_images_from_task_to_task_and_equal_tests(self, monkeypatch):
        monkeypatch.undo()
        stream = settings.fonts(0)
        assert [task.name for task in stream] == list(settings.FONTS) and stream.scenario == "domain"
        assert [len(task.train) // 60 for task in stream] == [40, 20, 10, 5]
        assert [len(task.test) for task in stream] == [600] * 4
        assert len({row.numpy().tobytes() for task in stream for row in task.train.x}) == 60 * 75

    @pytest.mark.parametrize(("count", "skip"), [(1, 0), (2, 1), (9, 0)])
    def test_the_first_examples_of_every_class_in_their_order(self, count, skip):
        examples = data.Examples(torch.arange(12.0).unsqueeze(1), torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 0, 1, 1, 0]))
        by_hand = [r for c in range(3) for r in (examples.y == c).nonzero().flatten().tolist()[skip : skip + count]]
        assert settings.first(examples, count, skip).x.flatten().tolist() == sorted(by_hand)

    def test_both_networks_of_a_setting_are_one_function_at_first_and_share_names(self):
        stream = small()
        plain, tangent = (settings.model(stream, "glyphs", mode, seed=1) for mode in hcmm.MODES)
        x = stream[0].prepare(stream[0].test.x)
        assert isinstance(tangent.encoder, Linearized) and equal(get_weights(plain), get_weights(tangent))
        torch.testing.assert_close(plain.eval()(x), tangent.eval()(x))
        assert not any(p.requires_grad for p in plain.head.parameters())
        assert all(p.requires_grad for p in tangent.encoder.parameters())

    def test_the_head_has_the_mean_direction_of_the_support(self):
        stream = small()
        net = settings.model(stream, "glyphs", seed=2).eval()
        shown = settings.rendered(stream, 2)
        with torch.no_grad():
            features = F.normalize(net.encoder(stream[0].prepare(shown.x)))
        mean = F.normalize(torch.stack([features[shown.y == c].mean(0) for c in range(9)]))
        torch.testing.assert_close(net.head.weight.detach(), mean)

    def test_zero_shot_is_far_above_chance(self, monkeypatch):
        shown = settings.rendered(small(), 0)
        assert len(shown) == 27
        assert evaluate(settings.model(small(), "glyphs"), small()).accuracy.mean() > 2 / 9

    def test_an_unknown_setting_is_named_with_close_ones(self):
        with pytest.raises(ValueError, match=r"setting: 'glyph' is unknown; .*did you mean 'glyphs'"):
            settings.model(small(), "glyph")
        with pytest.raises(ValueError, match=r"mode: 'tangents' is unknown; .*did you mean 'tangent'"):
            settings.model(small(), "glyphs", "tangents")

    def test_packs_that_are_not_there_are_named(self, monkeypatch):
        monkeypatch.delenv("CLKIT_DATA", raising=False)
        with pytest.raises(ValueError, match=r"name: 'pacs48/photo' is unknown; .* or a pack in \$CLKIT_DATA"):
            settings.pacs()

    @pytest.fixture
    def real(self, packs, monkeypatch):
        """The packs, few images of each, and no larger than ImageNet's network needs them."""
        monkeypatch.setenv("CLKIT_DATA", str(packs))
        few = settings.Portions(32, 8, 2, 3, 2)
        monkeypatch.setattr(settings, "PORTIONS", dict.fromkeys(settings.PORTIONS, few))
        monkeypatch.setattr(settings, "seen", cache(settings.seen.__wrapped__))

    @pytest.mark.packs("pacs48")
    def test_real_images_are_drawn_by_the_seed_and_apart_from_those_of_prototypes_and_validation(self, real):
        rows = [list(map(bytes, part.x.numpy())) for part in (*_parts("pacs48/photo", 1), *_parts("pacs48/photo", 2))]
        train, valid, support, other = rows[0], rows[1], rows[2], rows[3]
        assert [len(part) for part in rows[:3]] == [21, 14, 14] and set(train) != set(other)
        assert not set(train) & {*valid, *support} and not set(valid) & set(support)

    @pytest.mark.packs("pacs48")
    def test_domains_of_real_images_are_in_the_seeds_order(self, real):
        orders = {tuple(task.name for task in settings.pacs(seed)) for seed in range(5)}
        assert len(orders) > 2 and all(set(order) == set(settings.DOMAINS) for order in orders)

    @pytest.mark.packs("pacs48")
    def test_what_is_trained_on_real_images_is_the_end_of_imagenets_network(self, real):
        """Before it is trained it gives the features that the whole network gives of the images."""
        stream = settings.pacs(0)
        net = settings.model(stream, "pacs", "ordinary")
        full = data.load("pacs48/photo", limit=60, augment=data.NO_AUGMENT)
        whole = models.efficientnet_lite0(split(full, 1), size=32).eval()
        shown = settings.seen("pacs48/photo").train.x[:4]
        with torch.no_grad():
            torch.testing.assert_close(net.encoder(shown), whole.encoder(full.normalize(full.train.x[:4])))
        assert all(p.requires_grad for p in net.encoder.parameters())
        assert not any(m.training for m in net.encoder.modules())


def _parts(name: str, seed: int):
    (drawn, support), (valid, _) = settings.drawn(name, seed), settings.drawn(name, seed, True)
    return drawn.train, valid.test, support


class TestComparisons:
    def test_every_comparison_is_plain_to_record_and_pairs_its_methods(self):
        made = [hcmm.tuning(), hcmm.tuning("fonts"), hcmm.paper(), *hcmm.comparisons().values(), *hcmm.real().values()]
        for one in made:
            methods = one.methods.values() if isinstance(one, Comparison) else ()
            assert json.dumps(one.config) and len({repr(m) for m in methods}) == len(methods)

    def test_the_stages_are_all_eight_combinations_and_fine_tuning_itself(self):
        made = hcmm.stages()
        assert len(made) == 10
        for name, row in made.items():
            rule = row.consolidation
            assert row.model.keywords["mode"] == name.split(" + ")[0]
            assert (rule is None) == ("+" not in name)
            if rule is not None:
                assert (rule.importance == "none") == ("linear" in name)
                assert (rule.correction == "none") == (not name.endswith("correction"))

    @pytest.mark.parametrize(
        ("setting", "name", "lr", "value"),
        [
            ("glyphs", "tangent + importance", 1e-3, 0.2),
            ("fonts", "tangent + importance", 3e-3, 0.5),
            ("glyphs", "LwF", 3e-4, 0.3),
            ("fonts", "EWC", 3e-3, 100.0),
            ("fonts", "TIES, independent", 3e-3, 1.0),
        ],
    )
    def test_methods_have_what_was_chosen_for_their_stream(self, setting, name, lr, value):
        row = (hcmm.stages(setting) | hcmm.baselines(setting))[name]
        assert row.training == replace(hcmm.TRAINING, lr=lr) and row.model.keywords["setting"] == setting
        rule = row.consolidation
        own = row.learner.strength if rule is None else getattr(rule, "alpha", None) or dict(rule.options)["scale"]
        assert own == value

    def test_a_merge_is_uncorrected_by_importance_unless_it_is_told_otherwise(self):
        assert hcmm.merged(alpha=0.3).consolidation == HCMM(alpha=0.3, correction="none")
        ridge = hcmm.merged("tangent", 1e-2, alpha=0.3, correction="ridge", ridge=10.0)
        assert ridge.consolidation == HCMM(alpha=0.3, correction="ridge", ridge=10.0) and ridge.training.lr == 1e-2
        assert hcmm.averaged("ties", "independent", 1e-3, scale=0.5).consolidation == Merging(
            "ties", {"scale": 0.5}, "independent"
        )

    def test_points_of_a_sweep_are_named_by_their_curve(self):
        made = grid(hcmm.merged, "{mode} + linear {alpha}", mode=hcmm.MODES, alpha=(0.1, 0.3), importance="none")
        made |= grid(hcmm.merged, "{alpha}, sum", mode="tangent", alpha=(0.1, 0.3), accumulate="sum")
        made |= grid(hcmm.fine_tuned, "{mode} at {lr}", mode="ordinary", lr=(1e-3, 1e-2))
        whole = hcmm.compare(made, (0,))
        bare = pd.DataFrame({"stream": "glyphs", "model": "zero-shot", "training": "Training", "method": list(made)})
        found = hcmm.curves(whole.complete(bare))
        lines = ["ordinary + linear", "tangent + linear", "tangent + importance, sum", "ordinary"]
        assert list(found.method) == [line for line in lines for _ in (0, 1)]
        assert found.alpha[:4].tolist() == [0.1, 0.3, 0.1, 0.3] and found.lr[6:].tolist() == [1e-3, 1e-2]

    def test_tuning_has_seeds_of_its_own(self):
        real = hcmm.real()
        chosen = {*hcmm.tuning().seeds, *real.pop("pacs-tuning").seeds}
        made = (hcmm.paper(), *hcmm.comparisons().values(), *real.values())
        assert not chosen & {seed for one in made for seed in one.seeds}

    def test_settings_on_real_images_are_the_best_of_their_grid(self):
        table = page("07-holistic-merging").real(hcmm.tuning("pacs"), "pacs-tuning")
        for name, best in hcmm.chosen("cifar100").items():
            rows = table[table.method.str.startswith(f"{name} lr=")]
            top = rows[rows.acc > rows.acc.max() - 1e-9]
            assert "independent" in name or best in top[list(best)].to_dict(orient="records"), name

    def test_the_published_numbers_are_percent(self):
        table = hcmm.listed().set_index(["dataset", "tasks", "method"]).acc
        assert table.between(60, 90).all() and table["CIFAR-100", 10, "HCMM"] == 77.72

    @pytest.mark.parametrize("setting", ["glyphs", "fonts"])
    def test_stages_run_and_learn(self, setting, monkeypatch):
        monkeypatch.setattr(hcmm, "TRAINING", replace(hcmm.TRAINING, epochs=1, batch=8))
        names = ("ordinary", "tangent + linear", "tangent + importance + correction")
        made = {name: row for name, row in hcmm.stages(setting).items() if name in names}
        table = hcmm.compare(made, (0, 1), setting).matrices(jobs=1)
        assert list(table.method) == [n for n in names for _ in (0, 1)] and table.acc.between(0.1, 1).all()
        assert list(table["mode"]) == ["ordinary"] * 2 + ["tangent"] * 4
        assert np.array(table.course.tolist()) == approx(np.array(table.matrix.tolist()).mean(2))
        for seed in (0, 1):
            stream = settings.known(setting).stream(seed)
            before = evaluate(settings.model(stream, setting, seed=seed), stream).accuracy.mean()
            assert table[table.seed == seed].zero_shot.to_numpy() == approx([before] * 3, abs=1e-6)

    def test_methods_at_the_papers_scale_run_on_a_few_images(self, monkeypatch):
        network = settings.SETTINGS["glyphs"].network
        monkeypatch.setitem(settings.SETTINGS, "cifar100, CLIP", settings.Setting(small, network))
        monkeypatch.setattr(hcmm, "PAPER", replace(hcmm.PAPER, epochs=1, batch=16))
        whole = hcmm.paper((0,))
        few = {name: whole.methods[name] for name in (f"{hcmm.FULL}, L1", "RandMix, sequential", "EWC")}
        assert replace(whole, methods=few).run(jobs=1).acc.between(0, 1).all()

    @pytest.mark.packs("pacs48")
    def test_the_grid_on_real_images_runs_on_a_few(self, packs, monkeypatch):
        monkeypatch.setenv("CLKIT_DATA", str(packs))
        monkeypatch.setattr(settings, "PORTIONS", {"pacs48": settings.Portions(32, 3, 1, 1, 1)})
        monkeypatch.setattr(settings, "seen", cache(settings.seen.__wrapped__))
        monkeypatch.setattr(hcmm, "FEW", replace(hcmm.FEW, epochs=1))
        whole = hcmm.real()["pacs"]
        few = {name: whole.methods[name] for name in (hcmm.FULL, "MagMax, sequential")}
        assert replace(whole, methods=few, seeds=(0,)).run(jobs=1).acc.between(0, 1).all()


class TestStudies:
    def test_a_path_begins_and_ends_at_the_two_networks(self):
        stream, result, importances = hcmm.two_tasks("tangent", 3e-3, epochs=1)
        curves = hcmm.along(stream, result, importances, points=5)
        for end, weights in ((0, result.weights[0]), (-1, result.weights[1])):
            result.model.load_state_dict({**result.model.state_dict(), **weights})
            at = evaluate(result.model, stream)
            for curve in curves.values():
                assert curve.loss[end] == approx(at.loss, rel=1e-5) and (curve.accuracy[end] == at.accuracy).all()
        assert not np.allclose(curves["linear"].loss[2], curves["importance"].loss[2])
        assert len(importances) == 2 and all((v >= 0).all() for part in importances for v in part.values())

    def test_paths_have_a_row_for_every_position(self, monkeypatch):
        monkeypatch.setattr(hcmm, "TRAINING", replace(hcmm.TRAINING, batch=16))
        table = study(hcmm.paths, mode=hcmm.MODES, lr=[1e-3], epochs=1).run(jobs=1)
        assert list(table.columns[:3]) == ["mode", "lr", "seed"]
        assert len(table) == 2 * 2 * 21 and table.groupby(["mode", "merge"]).barrier.nunique().max() == 1
        sagging = table.groupby(["mode", "merge"]).gap.first()
        chord = table[table["alpha"].isin([0, 1])].groupby(["mode", "merge"]).loss.mean()
        assert (table.groupby(["mode", "merge"]).loss.mean() - chord).to_numpy() == approx(sagging.to_numpy(), abs=1e-9)

    def test_corrections_bring_features_closer_in_the_order_of_their_strength(self):
        table = hcmm.mismatches(0, "ordinary", 3e-3, every=1).set_index(["on", "weights"])
        here = table.loc["this task"].l2
        assert here["previous"] == 0 and table.loc["this task"].cka["previous"] == approx(1)
        order = ["merged", "ridge 1000", "ridge 100", "ridge 10", "ridge 1"]
        assert list(here[order]) == sorted(here[order], reverse=True) and here["released"] == approx(
            here["merged"], rel=0.01
        )
        assert set(table.index.get_level_values("weights")) == {"previous", "trained", "merged", *hcmm.CORRECTIONS}

    def test_every_correction_changes_the_projection_alone(self):
        for _, _, scratch, found in hcmm.corrected("tangent", 3e-3, every=1):
            assert isinstance(scratch.encoder, Linearized)
            for name in hcmm.CORRECTIONS:
                changed = [k for k, v in found[name].items() if not torch.equal(v, found["merged"][k])]
                assert changed == ["encoder.projection.weight"]
            assert not equal(found["merged"], lerp(found["previous"], found["trained"], 0.5))

    def test_what_is_kept_counts_the_first_network_and_what_is_there_twice_once(self):
        """By hand, in networks: weights, importances (no head), a merge, the first network, all networks."""
        counts = {name: (2, 3) if name in ("MagMax, sequential", "TIES, sequential") else (3,) for name in hcmm.KEPT}
        found = {name: [row["networks"] for row in hcmm.kept(0, name, counts[name])] for name in hcmm.KEPT}
        body = found["ordinary + importance"][0] - 1  # a number of importance for each trained one
        assert 0.8 < body < 1
        flat = {"ordinary": 1, "ordinary + linear": 1, "LwF": 1, "tangent": 1 + body, "tangent + linear": 1 + body}
        flat |= {"EWC": 1 + 2 * body, "ordinary + importance": 1 + body, hcmm.FULL: 1 + 2 * body}
        flat |= {"MagMax, running": 1 + 2 * body}
        for name, size in flat.items():
            assert found[name] == approx([size], abs=1e-6), name
        assert found["MagMax, sequential"] == found["TIES, sequential"]
        assert found["TIES, sequential"] == approx([1 + 2 * body, 1 + 3 * body], abs=1e-6)

    def test_a_running_maximum_deploys_magmax_of_all_networks(self):
        stream = small()
        ends = [
            run(stream, settings.model(stream, "glyphs"), None, rule, hcmm.FEW, progress=False).weights
            for rule in (hcmm.RunningMagMax(), Merging("magmax", {"scale": 0.5}))
        ]
        for one, other in zip(*ends, strict=True):
            for key, tensor in one.items():
                torch.testing.assert_close(tensor, other[key], atol=1e-6, rtol=1e-5)

    def test_random_mixing_takes_every_number_from_one_of_the_networks(self):
        ws = [{"w": torch.full((400,), float(i))} for i in range(4)]
        mixed = hcmm.randmix(ws)["w"]
        assert set(mixed.tolist()) == {0.0, 1.0, 2.0, 3.0} and mixed.mean() == approx(1.5, abs=0.2)

    def test_disentanglement_is_measured_on_tasks_learned_apart(self):
        table = pd.DataFrame(hcmm.disentangled(0, lr=1e-2, alphas=(1e-6, 1.0)))
        assert table.error[0] == 0 < table.error[1] <= 2 and table.own.nunique() == 1 and table.own[0] > 0.4

    def test_steps_are_what_each_stage_adds_seed_by_seed(self):
        names = [*hcmm.stages(), *hcmm.BASELINES]
        rows = [
            {"method": n, "seed": seed, "acc": 0.1 * seed + 0.01 * k} for k, n in enumerate(names) for seed in (0, 1, 2)
        ]
        found = hcmm.steps(pd.DataFrame(rows)).droplevel("stage")
        assert len(found) == 3 * 2 + 3 + len(hcmm.BASELINES)
        for step, a, b in (
            ("importance, tangent", "tangent + importance", "tangent + linear"),
            ("correction, ordinary", "ordinary + importance + correction", "ordinary + importance"),
            ("tangent space, no merge", "tangent", "ordinary"),
            ("HCMM over EWC", "tangent + importance + correction", "EWC"),
        ):
            gap = 0.01 * (names.index(a) - names.index(b))
            assert found.gain[step] == approx(gap) == approx(found.lower[step]) == approx(found.upper[step])
            assert found.verdict[step] == ("gains" if gap > 0 else "loses")
