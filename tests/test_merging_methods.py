"""What is particular to single merges: slow twins from the formulas, exact counts, closed forms, laws of their own."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit import merging as M
from clkit import weights as W
from clkit.merging import MERGES, pieces
from clkit.merging.averages import stock_ratio
from clkit.merging.spectral import decompose, polar
from merging_toys import PARAMETERS, close, near, several
from merging_toys import weights as any_weights

law = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 2**20)


def weights(seed, dtype=torch.float64, shapes=PARAMETERS):
    return any_weights(seed, dtype, shapes)


def target(seed):
    return weights(seed + 500)


def flat(w):
    return torch.cat([t.flatten() for t in w.values()])


def taus(ws, base):
    """Task vectors as an array (n, entries)."""
    return np.stack([flat(W.sub(w, base)).numpy() for w in ws])


def same(merged, base, expected):
    """merged = base + expected, entry by entry."""
    np.testing.assert_allclose(flat(W.sub(merged, base)).numpy(), expected, rtol=1e-8, atol=1e-9)


def largest(values, keep):
    """The mask of the `keep` largest, the first of equals."""
    mask = np.zeros(len(values), bool)
    mask[np.argsort(-values, kind="stable")[:keep]] = True
    return mask


def agreed(rows):
    """Elect and disjoint mean, entry by entry."""
    out = []
    for entry in rows.T:
        sign = np.sign(entry.sum())
        chosen = [v for v in entry if v * sign > 0]
        out.append(np.mean(chosen) if chosen else 0.0)
    return np.array(out)


def by_tensor(function, ws, base):
    return np.concatenate([function(taus([{k: w[k]} for w in ws], {k: base[k]})) for k in base])


TASKS = [weights(i) for i in range(3)]
BASE = weights(99)
TAUS = taus(TASKS, BASE)


class TestStraight:
    def test_average_weights_by_coefficients(self):
        close(M.average(TASKS), W.combine(TASKS, [1 / 3] * 3))
        close(M.average(TASKS, coefficients=[2, 0, 6]), W.lerp(TASKS[0], TASKS[2], 0.75))
        for bad in ([1, 2], [0, 0, 0], [1, -1, 1], [1, math.nan, 1], [1, math.inf, 1]):
            with pytest.raises(ValueError, match="coefficients"):
                M.average(TASKS, coefficients=bad)

    def test_slerp_turns_evenly_and_keeps_length(self):
        a, b = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
        for t in (0.0, 0.25, 0.5, 1.0):
            angle = t * math.pi / 2
            expected = torch.tensor([2 * math.cos(angle), 2 * math.sin(angle)])
            torch.testing.assert_close(M.slerp([a, b], t=t)["w"], expected)

    def test_slerp_by_tensor_or_whole(self):
        a = {"x": torch.tensor([1.0, 0.0]), "y": torch.ones(2)}
        b = {"x": torch.tensor([0.0, 1.0]), "y": torch.ones(2)}
        assert torch.equal(M.slerp([a, b])["y"], torch.ones(2))
        whole, angle = M.slerp([a, b], whole=True), math.acos(2 / 3)
        torch.testing.assert_close(whole["y"], torch.ones(2) * 2 * math.sin(angle / 2) / math.sin(angle))

    def test_slerp_of_opposite_zero_and_parallel_tensors_is_linear(self):
        a = {"opposite": torch.ones(3), "zero": torch.zeros(2), "parallel": torch.ones(2), "empty": torch.zeros(0)}
        b = {"opposite": -torch.ones(3), "zero": torch.ones(2), "parallel": 3 * torch.ones(2), "empty": torch.zeros(0)}
        merged, linear = M.slerp([a, b], t=0.25), W.lerp(a, b, 0.25)
        close({k: v.double() for k, v in merged.items()}, {k: v.double() for k, v in linear.items()}, 1e-6)
        assert M.slerp([{}, {}], whole=True) == {}

    def test_task_arithmetic_adds_scaled_task_vectors(self):
        same(M.task_arithmetic(TASKS, base=BASE, scale=0.3), BASE, 0.3 * TAUS.sum(0))
        close(M.task_arithmetic(TASKS, base=BASE, scale=0), BASE)
        close(M.task_arithmetic(TASKS, base=BASE), M.average(TASKS))
        close(M.task_arithmetic(TASKS[:1], base=BASE), TASKS[0])

    def test_a_greedy_soup_never_scores_below_its_best_ingredient_and_takes_what_helps(self):
        score = near(target(0))
        soup = M.greedy_soup(TASKS, score=score)
        assert score(soup) >= max(map(score, TASKS))
        aim = W.lerp(TASKS[0], TASKS[2], 0.5)
        close(M.greedy_soup(TASKS, score=near(aim)), aim)
        close(M.greedy_soup(TASKS, score=near(TASKS[1])), TASKS[1])
        close(M.greedy_soup(TASKS, score=lambda w: 0.0), M.average(TASKS))
        with pytest.raises(ValueError, match="score: it gave"):
            M.greedy_soup(TASKS, score=lambda w: math.nan)

    def test_wise_ft_weights_the_fine_tuned_ones(self):
        close(M.wise_ft(TASKS[:1], base=BASE, alpha=0.75), W.lerp(BASE, TASKS[0], 0.75))

    @pytest.mark.parametrize("n", [2, 3, 7])
    @pytest.mark.parametrize("cosine", [0.0, 0.25, 1.0])
    def test_the_ratio_of_model_stock_is_its_closed_form(self, n, cosine):
        gram = torch.full((n, n), 4 * cosine, dtype=torch.float64).fill_diagonal_(4.0)
        assert stock_ratio(gram) == pytest.approx(n * cosine / (1 + (n - 1) * cosine))
        assert stock_ratio(-gram) == stock_ratio(gram * 0) == 0

    def test_of_two_orthogonal_to_what_they_share_model_stock_is_the_foot_of_the_perpendicular(self):
        """Equal lengths and angles: the point on the plane through the weights and the base's median nearest to it."""
        a, b = torch.tensor([1.0, 1.0, 0.0]).double(), torch.tensor([1.0, 0.0, 1.0]).double()
        merged = M.model_stock([{"w": a}, {"w": b}], base={"w": torch.zeros(3).double()})["w"]
        close({"w": merged}, {"w": (a + b) / 2 * 2 * 0.5 / 1.5})

    def test_model_stock_measures_by_tensor_or_whole(self):
        for whole in (False, True):
            for name in BASE:
                part = TAUS if whole else taus([{name: w[name]} for w in TASKS], {name: BASE[name]})
                ratio = stock_ratio(torch.from_numpy(part @ part.T))
                mean = W.sub(M.average(TASKS), BASE)[name]
                merged = M.model_stock(TASKS, base=BASE, whole=whole)[name]
                torch.testing.assert_close(merged, BASE[name] + ratio * mean)


class TestSelection:
    """Exactly so many are kept, of any number, without sorting them."""

    @law
    @given(seed=seeds, size=st.integers(1, 3000), density=st.floats(0.001, 1), levels=st.sampled_from([3, 50, 10**9]))
    def test_the_largest_are_kept_and_of_equals_the_first(self, seed, size, density, levels):
        values = torch.randint(-levels, levels + 1, (2, size), generator=torch.Generator().manual_seed(seed)).double()
        ws, keep = [{"a": v[: size // 3], "b": v[size // 3 :]} for v in values], pieces.count(density, size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "ENTRIES", 37)
            read = pieces.TaskVectors(ws, W.scale(ws[0], 0))
            kept = pieces.largest(read, partial(pieces.count, density), whole=True)
            found = torch.cat([kept(piece, part.abs()) for piece, part in read], 1)
        for mask, value in zip(found.numpy(), values.abs().numpy(), strict=True):
            assert mask.sum() == keep and (mask == largest(value, keep)).all()

    @pytest.mark.parametrize(("density", "size", "kept"), [(0.07, 100, 7), (0.2, 1, 1), (0.201, 10, 3), (1.0, 5, 5)])
    def test_a_density_counts_rounded_up(self, density, size, kept):
        assert pieces.count(density, size) == kept

    @law
    @given(seed=seeds, row=st.integers(1, 300), levels=st.sampled_from([0, 20, 10**9]))
    def test_ranks_are_stable_on_both_paths(self, seed, row, levels):
        values = torch.randint(levels + 1, (2, 3, row), generator=torch.Generator().manual_seed(seed)) / 7
        for magnitudes in (values, values.double()):
            assert (pieces.ascending(magnitudes).numpy() == magnitudes.numpy().argsort(-1, kind="stable")).all()

    def test_what_is_no_number_ends_the_search_for_the_largest(self):
        read = pieces.TaskVectors([{"a": torch.ones(9)}], {"a": torch.zeros(9)})
        with pytest.raises(ValueError, match="is not a number"):
            pieces.largest(read, lambda n: 3, True, lambda piece, i: read.read(piece, i) * math.nan)


class TestSparse:
    @pytest.mark.parametrize("whole", [True, False])
    @pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
    def test_ties_is_its_twin(self, density, whole):
        def twin(rows):
            keep = pieces.count(density, rows.shape[1])
            return agreed(np.stack([row * largest(abs(row), keep) for row in rows]))

        merged = M.ties(TASKS, base=BASE, density=density, scale=0.7, whole=whole)
        same(merged, BASE, 0.7 * (twin(TAUS) if whole else by_tensor(twin, TASKS, BASE)))

    @pytest.mark.parametrize("density", [0.01, 0.2, 0.5])
    def test_one_task_trimmed_has_exactly_so_many_entries_left(self, density):
        n = TAUS.shape[1]
        for w in (TASKS[0], {k: torch.ones_like(t) for k, t in BASE.items()}):
            zero = W.scale(BASE, 0)
            moved = flat(M.ties([w], base=zero, density=density))
            assert int((moved != 0).sum()) == math.ceil(density * n)

    def test_ties_in_special_cases(self):
        tau, zero = W.sub(TASKS[0], BASE), W.scale(BASE, 0)
        for density in (0.2, 1.0):
            close(M.ties([tau, W.scale(tau, -1)], base=zero, density=density), zero)
        close(M.ties(TASKS[:1], base=BASE, density=1), TASKS[0])
        same_signs = [W.add(BASE, {k: t.abs() * f for k, t in tau.items()}) for f in (1, 2, 6)]
        close(M.ties(same_signs, base=BASE, density=1), M.average(same_signs))

    @pytest.mark.parametrize("whole", [True, False])
    def test_breadcrumbs_is_its_twin_with_exact_counts(self, whole):
        density, outliers, kept = 0.3, 0.12, []

        def twin(rows):
            n = rows.shape[1]
            top, keep = math.floor(outliers * n), pieces.count(density, n)
            masks = [largest(abs(r), min(n, top + keep)) & ~largest(abs(r), top) for r in rows]
            kept.extend(m.sum() for m in masks)
            return np.stack([r * m for r, m in zip(rows, masks, strict=True)]).sum(0) / 3

        merged = M.breadcrumbs(TASKS, base=BASE, density=density, outliers=outliers, whole=whole)
        same(merged, BASE, twin(TAUS) if whole else by_tensor(twin, TASKS, BASE))
        assert kept[0] == pieces.count(density, TAUS.shape[1] if whole else 108)

    @pytest.mark.parametrize("density", [0.1, 0.5])
    def test_dare_keeps_entries_or_drops_them_and_is_right_on_average(self, density):
        """Chernoff: at 12 standard errors, summed over all entries, chance fails once in 1e30 runs."""
        w, runs = {"a": torch.linspace(0.5, 1.5, 1000).double()}, 400
        base = {"a": torch.zeros(1000).double()}
        moved = torch.stack([M.dare([w], base=base, density=density, seed=seed)["a"] for seed in range(runs)])
        ratio = moved / w["a"]
        assert torch.all((ratio.abs() < 1e-12) | ((ratio - 1 / density).abs() < 1e-9))
        error = math.sqrt((1 - density) / density / runs)
        assert (ratio.mean(0) - 1).abs().max() < 12 * error / math.sqrt(1) / 2
        assert abs(float(ratio.mean()) - 1) < 6 * error / math.sqrt(1000)
        assert abs(float(torch.corrcoef(ratio[:2])[0, 1])) < 0.3

    def test_lots_do_not_depend_on_the_pieces_or_on_other_tasks(self, monkeypatch):
        expected = [MERGES[name](TASKS, base=BASE, seed=3) for name in ("dare", "dare_ties", "della")]
        first = M.dare(TASKS[:1], base=BASE, seed=3)
        monkeypatch.setattr(pieces, "ENTRIES", 7)
        for name, result in zip(("dare", "dare_ties", "della"), expected, strict=True):
            close(MERGES[name](TASKS, base=BASE, seed=3), result, 1e-12)
        alone = W.sub(M.dare([TASKS[0], BASE, BASE], base=BASE, seed=3, scale=1), BASE)
        close(alone, W.sub(first, BASE), 1e-12)

    def test_dare_ties_is_a_drop_and_then_ties(self):
        dropped = [M.dare([BASE] * i + [w] + [BASE] * (2 - i), base=BASE, scale=1, seed=5) for i, w in enumerate(TASKS)]
        close(M.dare_ties(TASKS, base=BASE, seed=5), M.ties(dropped, base=BASE, density=1))
        close(M.dare_ties(TASKS, base=BASE, density=1), M.ties(TASKS, base=BASE, density=1))

    def test_della_keeps_large_entries_more_often_and_is_right_on_average(self):
        """Rows of four entries: kept with probability 0.3, 0.43, 0.57, 0.7 by rank; 4,000 rows: errors below 0.008."""
        row = torch.tensor([2.0, -1.0, 4.0, 3.0]).double()
        w = {"a": row.expand(4000, 4)}
        moved = M.della([w], base=W.scale(w, 0), density=0.5, epsilon=0.4)["a"]
        expected = torch.tensor([0.3 + 0.4 / 3, 0.3, 0.7, 0.3 + 0.8 / 3]).double()
        assert ((moved != 0).double().mean(0) - expected).abs().max() < 6 * 0.008
        kept = torch.where(moved != 0, moved, (row / expected))
        torch.testing.assert_close(kept, (row / expected).expand(4000, 4))
        close(M.della(TASKS, base=BASE, density=1, epsilon=0), M.ties(TASKS, base=BASE, density=1))


class TestElected:
    def test_magmax_takes_the_largest_entry(self):
        expected = np.array([entry[np.argmax(abs(entry))] for entry in TAUS.T])
        same(M.magmax(TASKS, base=BASE, scale=0.5), BASE, 0.5 * expected)
        zero = W.scale(BASE, 0)
        close(M.magmax([TASKS[0], W.scale(TASKS[0], -1)], base=zero), zero)

    def test_emr_is_its_twin(self):
        sign = np.sign(TAUS.sum(0))
        unified = np.array(
            [s * max((abs(v) for v in e if v * s > 0), default=0) for s, e in zip(sign, TAUS.T, strict=True)]
        )
        same(M.emr(TASKS, base=BASE), BASE, unified)
        for i, tau in enumerate(TAUS):
            masked = unified * (unified * tau > 0)
            same(M.emr(TASKS, base=BASE, task=i), BASE, masked * abs(tau).sum() / abs(masked).sum())
        close(M.emr(TASKS[:1], base=BASE, task=0), TASKS[0])

    @pytest.mark.parametrize("whole", [True, False])
    @pytest.mark.parametrize("density", [0.3, 1.0])
    def test_pcb_is_its_twin(self, whole, density):
        def softmax(x):
            e = np.exp(x - x.max())
            return e / e.sum()

        def norm(x):
            return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else x * 0

        def twin(rows):
            n, scores = len(rows), []
            for a in rows:
                scores.append(softmax(n * norm(a * a)) * sum(softmax(norm(a * b)) for b in rows))
            keep = pieces.count(density, rows.shape[1])
            kept = np.stack([s * largest(s, keep) for s in scores])
            return (kept * rows).sum(0) / np.where(kept.sum(0) > 0, kept.sum(0), 1)

        merged = M.pcb(TASKS, base=BASE, density=density, whole=whole)
        same(merged, BASE, twin(TAUS) if whole else by_tensor(twin, TASKS, BASE))

    def test_pcb_of_a_hundred_tasks_does_not_overflow(self):
        """exp(N norm) is infinite in single precision from N = 89 on."""
        ws, base = [weights(i, torch.float32) for i in range(100)], weights(999, torch.float32)
        exact = M.pcb(
            [{k: v.double() for k, v in w.items()} for w in ws], base={k: v.double() for k, v in base.items()}
        )
        close({k: v.double() for k, v in M.pcb(ws, base=base).items()}, exact, 1e-4)
        one = {k: torch.full_like(v, 0.5) for k, v in BASE.items()}
        close(M.pcb([one] * 1000, base=W.scale(BASE, 0), density=1), one)

    @pytest.mark.parametrize("density", [0.2, 1.0])
    def test_task_vectors_too_long_to_multiply_are_named(self, density):
        ws = [{"w": torch.linspace(-1, 1, 50) * f} for f in (1e20, 2e20)]
        with pytest.raises(ValueError, match=r"ws: products .* in \('w',\)"):
            M.pcb(ws, base={"w": torch.zeros(50)}, density=density)


class TestStatistical:
    def test_fisher_is_the_weighted_mean_and_the_plain_one_without_importance(self):
        known = [{k: v.square() for k, v in weights(50 + i).items()} for i in range(3)]
        for k in known:
            k["norm.weight"] = k["norm.weight"] * torch.tensor([1.0, 0.0, 1.0, 0.0]).double()
        merged = M.fisher_merge(TASKS, importances=known, coefficients=[1, 2, 3])
        for name in BASE:
            total = sum(c * k[name] for c, k in zip((1, 2, 3), known, strict=True))
            wanted = sum(c * k[name] * w[name] for c, k, w in zip((1, 2, 3), known, TASKS, strict=True))
            mean = sum(w[name] for w in TASKS) / 3
            torch.testing.assert_close(merged[name], torch.where(total > 0, wanted / total, mean))
        close(M.fisher_merge(TASKS, importances=[{}] * 3), M.average(TASKS))

    def test_fisher_does_not_mind_tiny_importances_and_takes_equal_ones_as_none(self):
        tiny = [{k: torch.full_like(v, 1e-300) for k, v in BASE.items()} for _ in TASKS]
        close(M.fisher_merge(TASKS, importances=tiny), M.average(TASKS))
        only = [{k: torch.full_like(v, float(i == 1)) for k, v in BASE.items()} for i in range(3)]
        close(M.fisher_merge(TASKS, importances=only), TASKS[1])
        wanting = [{k: v.clone().requires_grad_() for k, v in known.items()} for known in only]
        close(M.fisher_merge(TASKS, importances=wanting), TASKS[1])

    def test_regmean_is_least_squares(self):
        x = [torch.randn(9, 4, generator=torch.Generator().manual_seed(i)).double() for i in range(3)]
        merged = M.regmean(TASKS, grams=[{"linear.weight": p.T @ p} for p in x], shrink=1)
        y = torch.cat([p @ w["linear.weight"].T for p, w in zip(x, TASKS, strict=True)])
        expected = torch.linalg.lstsq(torch.cat(x), y).solution.T
        torch.testing.assert_close(merged["linear.weight"], expected)
        mean = M.average(TASKS)
        close({**merged, "linear.weight": mean["linear.weight"]}, mean)

    def test_regmean_shrinks_off_diagonal_entries(self):
        grams = [{"linear.weight": (lambda p: p.T @ p)(weights(i, shapes={"x": (9, 4)})["x"])} for i in range(3)]
        shrunk = [{k: 0.9 * g + 0.1 * torch.diag(g.diagonal()) for k, g in gram.items()} for gram in grams]
        close(M.regmean(TASKS, grams=grams), M.regmean(TASKS, grams=shrunk, shrink=1))
        diagonal = [{k: g.diagonal().expand(2, 4) for k, g in gram.items()} for gram in grams]
        close(M.regmean(TASKS, grams=grams, shrink=0), M.fisher_merge(TASKS, importances=diagonal))

    def test_inputs_that_were_always_zero_are_averaged(self):
        x = [torch.randn(9, 4, generator=torch.Generator().manual_seed(i)).double() for i in range(3)]
        for p in x:
            p[:, 2] = 0
        merged = M.regmean(TASKS, grams=[{"linear.weight": p.T @ p} for p in x])["linear.weight"]
        torch.testing.assert_close(merged[:, 2], M.average(TASKS)["linear.weight"][:, 2])
        kept = [{**w, "linear.weight": w["linear.weight"][:, [0, 1, 3]]} for w in TASKS]
        narrow = M.regmean(kept, grams=[{"linear.weight": p[:, [0, 1, 3]].T @ p[:, [0, 1, 3]]} for p in x])
        torch.testing.assert_close(merged[:, [0, 1, 3]], narrow["linear.weight"])

    def test_bad_knowledge_is_named(self):
        good = {k: v.square() for k, v in BASE.items()}
        for bad, message in (
            ([good] * 2, "importances: 2 for 3"),
            ([good, good, {"x": torch.ones(2)}], r"importances\[2\]: 'x'"),
            ([good, {**good, "scalar": torch.tensor(-1.0)}, good], r"importances\[1\]: 'scalar' has negative"),
            ([good, {**good, "scalar": torch.tensor(math.nan)}, good], r"importances\[1\]: 'scalar' holds a NaN"),
        ):
            with pytest.raises(ValueError, match=message):
                M.fisher_merge(TASKS, importances=bad)
        for bad in ({"linear.weight": torch.eye(3)}, {"norm.weight": torch.eye(4)}, {"x": torch.eye(4)}):
            with pytest.raises(ValueError, match=r"grams\[0\]"):
                M.regmean(TASKS, grams=[bad] * 3)


class TestSpectral:
    @pytest.mark.parametrize("shape", [(6, 40), (40, 6), (9, 9), (1, 5)])
    def test_the_gram_path_of_float32_is_the_direct_one_of_float64(self, shape):
        matrix = weights(3, torch.float32, {"m": shape})["m"]
        (u, s, v), (_, t, _) = decompose(matrix), decompose(matrix.double())
        torch.testing.assert_close(s, t, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close((u * s) @ v.T, matrix.double(), rtol=1e-6, atol=1e-6)
        for side in (u, v):
            torch.testing.assert_close(side.T @ side, torch.eye(len(s)).double(), rtol=1e-6, atol=1e-6)
        for found, exact in zip(polar(matrix), polar(matrix.double()), strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(polar(matrix)[0], u @ v.T)

    def test_directions_that_a_matrix_lacks_are_cut_off_on_both_paths(self):
        exact = weights(1, torch.float64, {"m": (8, 3)})["m"] @ weights(2, torch.float64, {"m": (3, 50)})["m"]
        low, eps = exact.float(), torch.finfo(torch.float32).eps
        for found in (decompose(low), decompose(exact), decompose(low.double(), eps)):
            assert [f.shape for f in found] == [(8, 3), (3,), (50, 3)]
        torch.testing.assert_close(polar(low)[0], polar(exact)[0], rtol=1e-5, atol=1e-5)
        assert decompose(low, most=2)[0].shape == decompose(exact, most=2)[0].shape == (8, 2)
        assert decompose(low * 0)[1].numel() == decompose(exact * 0)[1].numel() == 0

    def test_iso_c_has_equal_singular_values_and_is_its_twin(self):
        merged = M.iso_c(TASKS, base=BASE, scale=0.4)
        for name in ("conv.weight", "linear.weight"):
            total = sum(w[name] - BASE[name] for w in TASKS).flatten(1)
            u, s, vt = np.linalg.svd(total.numpy(), full_matrices=False)
            moved = (merged[name] - BASE[name]).flatten(1)
            np.testing.assert_allclose(moved, 0.4 * s.mean() * (u @ vt), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(
            merged["scalar"], BASE["scalar"] + 0.4 * sum(w["scalar"] - BASE["scalar"] for w in TASKS) / 3
        )

    def test_tsv_is_its_twin(self):
        ws = TASKS[:2]
        merged = M.tsv(ws, base=BASE)
        for name, rank in (("conv.weight", 2), ("linear.weight", 1)):
            parts = [np.linalg.svd((w[name] - BASE[name]).flatten(1).numpy(), full_matrices=False) for w in ws]
            us, vs = (
                np.concatenate([cut[:, :rank] for cut in side], 1)
                for side in zip(*[(u, vt.T) for u, _, vt in parts], strict=True)
            )
            s = np.concatenate([p[1][:rank] for p in parts])
            (pu, _, qu), (pv, _, qv) = (np.linalg.svd(m, full_matrices=False) for m in (us, vs))
            moved = (merged[name] - BASE[name]).flatten(1).numpy()
            np.testing.assert_allclose(moved, (pu @ qu) * s @ (pv @ qv).T, rtol=1e-7, atol=1e-8)
        close(M.tsv(TASKS[:1], base=BASE), TASKS[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_tsv_of_tasks_on_one_line_goes_on_along_it(self, dtype):
        """Directions that are the same but for rounding are shared, and no basis is made of their difference."""
        base, tau = weights(1, dtype, {"m": (20, 30)}), weights(2, dtype, {"m": (20, 30)})
        u, s, vt = np.linalg.svd(tau["m"].double().numpy(), full_matrices=False)
        merged = M.tsv([W.add(base, tau, factor) for factor in (1.0, 3.0, 0.7)], base=base)
        expected = 4.7 / 3 * (u[:, :6] * s[:6]) @ vt[:6]
        np.testing.assert_allclose((merged["m"] - base["m"]).double().numpy(), expected, rtol=1e-4, atol=1e-5)

    def test_tsv_of_tasks_that_share_nothing_is_their_sum(self):
        a, b = torch.zeros(2, 4, 6).double()
        a[0, 1], b[2, 3] = 2.0, 5.0
        close(M.tsv([{"w": a}, {"w": b}], base={"w": a * 0}), {"w": a + b})

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
    @pytest.mark.parametrize("projection", ["paper", "released"])
    def test_opcm_is_its_twin(self, projection, alpha):
        """With full bases, entry by entry of the projected coefficients."""
        merged, factor, lengths = {k: BASE[k] * 0 for k in BASE}, 0.0, []
        for t, w in enumerate(TASKS):
            tau = W.sub(w, BASE)
            lengths.append(W.norm(tau))
            for name, new in tau.items():
                if t and new.ndim > 1 and (projection == "paper" or new.ndim == 2):
                    u, s, vt = np.linalg.svd(merged[name].flatten(1).numpy())
                    c = u.T @ new.flatten(1).numpy() @ vt.T
                    r = int((np.cumsum(s) <= alpha * s.sum()).sum())
                    if projection == "released":
                        c[:r, :r] = 0
                    else:
                        c[:r], c[:, :r] = 0, 0
                        for i in range(len(s)):
                            c[i, i] = 0
                    new = torch.from_numpy(u @ c @ vt).view_as(new)
                merged[name] = factor * merged[name] + new
            factor = W.norm(merged) / np.mean(lengths)
            merged = W.scale(merged, 1 / factor)
        options = {"alpha": alpha, "projection": projection}
        close(M.opcm(TASKS, base=BASE, **options), W.add(BASE, merged))
        assert W.norm(merged) == pytest.approx(np.mean(lengths))
        close(M.opcm(TASKS[:1], base=BASE, **options), TASKS[0])

    def test_float32_and_float64_weights_take_different_paths_to_one_result(self):
        ws, base = several(MERGES["iso_c"], 4, torch.float32)
        for name in ("iso_c", "tsv", "opcm"):
            exact = MERGES[name](
                [{k: v.double() for k, v in w.items()} for w in ws], base={k: v.double() for k, v in base.items()}
            )
            close({k: v.double() for k, v in MERGES[name](ws, base=base).items()}, exact, 2e-5)
