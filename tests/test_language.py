"""Language models: what they are measured by, how they learn a stream of texts, and Hugging Face's in their place."""

import json
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import log

import numpy as np
import pytest
import torch
from torch import nn

from clkit import data, merging, models, run
from clkit.consolidation import CLeWI
from clkit.data import Examples, Stream, Task
from clkit.data.core import IGNORED
from clkit.evaluation import evaluate
from clkit.language import bits_per_byte, exact_match
from clkit.learners import ER, Learner
from clkit.training import Training
from clkit.weights import equal, get_weights, lerp

NAMES = ("math", "law", "code")
QUICK = Training(epochs=1, batch=16, optimizer="adamw", lr=2e-3)


@pytest.fixture(scope="module")
def texts() -> dict[str, data.Text]:
    return {name: data.texts(name, context=32, limit=160, test_limit=16) for name in NAMES}


@pytest.fixture(scope="module")
def stream(texts) -> Stream:
    return data.domains(texts)


class Uniform(nn.Module):
    def forward(self, x):
        return torch.zeros(*x.shape, 256)


class Oracle(nn.Module):
    """Goes on with the solution of the problem it is shown, changed by `distort`."""

    def __init__(self, problems, distort=lambda solution: solution):
        super().__init__()
        self.lines = [p.prompt + distort(p.solution) for p in problems]

    def forward(self, x):
        logits = torch.zeros(*x.shape, 256)
        for row, tokens in enumerate(x.tolist()):
            shown = bytes(tokens).decode()
            line = next((line for line in self.lines if line.startswith(shown)), "")
            logits[row, -1, ord((line[len(shown) :] or "!")[0])] = 1
        return logits


class TestEvaluate:
    def test_targets_without_a_loss_count_for_nothing(self):
        g = torch.Generator().manual_seed(0)
        x, y = (torch.randint(0, 6, (9, 5), generator=g) for _ in range(2))
        y[torch.rand(9, 5, generator=g) < 0.4] = IGNORED
        part = Examples(x, y)
        task = Task(0, "t", tuple(range(6)), part, part)
        table = nn.Embedding.from_pretrained(torch.randn(6, 6, generator=g))
        kept = y != IGNORED
        logits = table(x)[kept]
        for batch in (2, 100):
            found = evaluate(table, Stream("s", (task,), tuple("abcdef"), "domain"), batch=batch)
            assert found.accuracy[0] == pytest.approx(float((logits.argmax(-1) == y[kept]).double().mean()))
            assert found.masked[0] == found.accuracy[0]
            assert found.loss[0] == pytest.approx(float(nn.functional.cross_entropy(logits, y[kept])), rel=1e-6)

    def test_batches_of_long_rows_are_small_and_give_the_same(self, stream, monkeypatch):
        model = models.gpt(stream, 16, 1, 2)
        whole, sizes = evaluate(model, stream), []
        monkeypatch.setattr("clkit.evaluation.LOGITS", 5 * 32 * 256)
        model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        parts = evaluate(model, stream)
        assert max(sizes) in (5, 6)  # with a last row that would be alone
        for a, b in zip(whole, parts, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


class TestBitsPerByte:
    def test_knowing_nothing_of_bytes_is_eight(self, stream):
        np.testing.assert_allclose(bits_per_byte(evaluate(Uniform(), stream).loss), 8, rtol=1e-6)

    def test_longer_tokens_share_their_loss_among_their_bytes(self):
        losses = np.array([[log(2), log(4)], [0, log(16)]])
        np.testing.assert_allclose(bits_per_byte(losses), [[1, 2], [0, 4]])
        np.testing.assert_allclose(bits_per_byte(losses, [1, 4]), [[1, 0.5], [0, 1]])

    def test_a_text_without_bytes_is_refused(self):
        with pytest.raises(ValueError, match=r"bytes_per_token: \[1, 0\] must be positive"):
            bits_per_byte([1.0, 2.0], [1, 0])


class TestExactMatch:
    def test_who_knows_the_solutions_has_all(self, texts):
        math = texts["math"]
        assert exact_match(Oracle(math.problems), math, limit=40) == 1

    @pytest.mark.parametrize(
        ("distort", "share"),
        [
            (lambda s: s.replace("#", "#1"), 0),
            (lambda s: s.replace("\n", "0\n"), 0),
            (lambda s: s.replace("\n", ""), 0),
            (lambda s: "9" * s.index("#") + s[s.index("#") :], 1),  # wrong steps
        ],
    )
    def test_an_answer_is_judged_whole_and_its_steps_are_not(self, texts, distort, share):
        math = texts["math"]
        assert exact_match(Oracle(math.problems, distort), math, limit=40) == share

    def test_prompts_of_any_length_keep_their_own_solution(self, texts):
        lengths = {"a": 3, "b": 1, "c": 3, "d": 7, "e": 2}
        problems = tuple(data.Problem(s * n, f"{s * (n % 3)}#{n}\n", "#") for s, n in lengths.items())
        odd = data.Text("odd", texts["math"].train, texts["math"].test, texts["math"].classes, problems=problems)
        wrong = Oracle([p._replace(solution="#0\n") if len(p.prompt) == 3 else p for p in problems])
        assert [exact_match(wrong, odd, batch=batch) for batch in (1, 9)] == [3 / 5, 3 / 5]

    def test_the_model_sees_the_last_tokens_that_its_windows_hold(self):
        part = Examples(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))
        problem = data.Problem("abcdefgh", "#5\n", "#")
        text = data.Text("letters", part, part, data.texts("math").classes, problems=(problem,))
        table = torch.zeros(256, 256)
        for a, b in pairwise("h#5\n"):
            table[ord(a), ord(b)] = 1
        follows = nn.Embedding.from_pretrained(table)
        lengths: list[int] = []
        follows.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
        assert exact_match(follows, text) == 1 and lengths == [4, 4, 4]

    def test_other_weights_answer_in_the_models_place(self, stream, texts):
        math, model = texts["math"], models.gpt(stream, 16, 1, 2).train()
        before = get_weights(model)
        other = get_weights(models.gpt(stream, 16, 1, 2, seed=1))
        shown: list = []
        model.linear.register_forward_hook(lambda m, args, out: shown.append(out))
        exact_match(model, math, weights=other, limit=4)
        twin = models.gpt(stream, 16, 1, 2, seed=1)
        prompts = torch.tensor([math.encode(problem.prompt) for problem in math.problems[:4]])
        torch.testing.assert_close(shown[0], twin(prompts))
        assert model.training and equal(before, get_weights(model))

    def test_no_problems_no_share(self, texts):
        with pytest.raises(ValueError, match=r"'law' has no problems .* data.texts\('math'\)"):
            exact_match(Uniform(), texts["law"])

    def test_settings_that_do_not_fit_are_named(self, texts):
        with pytest.raises(ValueError, match="limit: 0"):
            exact_match(Uniform(), texts["math"], limit=0)
        with pytest.raises(ValueError, match=r"weights and the model have different names: .* unexpected"):
            exact_match(Uniform(), texts["math"], weights={"a": torch.zeros(1)})


def test_a_gpt_learns_a_stream_of_texts_and_clewi_merges_it(stream):
    stream = replace(stream, tasks=tuple(replace(task, train=task.train[:96]) for task in stream))
    gpt = partial(models.gpt, width=16, depth=1, heads=2)
    result = run(stream, gpt, ER(memory=40), CLeWI(0.3, points=3), QUICK, device="cpu", progress=False)
    bits = bits_per_byte(result.losses)
    assert bits.shape == (3, 3) and bits[0, 0] < bits_per_byte(evaluate(gpt(stream), stream).loss)[0]
    assert result.reports[-1]["merged"] and 0 < result.reports[-1]["similarity"] <= 1


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request, transformers, tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp(request.param)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the law of the land, the code of the court, naïve"] * 3, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    size = {"vocab_size": tokenizer.get_vocab_size() + 5}
    if request.param == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **size)
    else:
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, tie_word_embeddings=False, **size,
        )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_code_of_a_folder_is_neither_run_nor_asked_about(transformers, tmp_path, monkeypatch):
    own = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own", "AutoTokenizer": ["code.Own", "code.Own"]}
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "own", "tokenizer_class": "Own", "auto_map": own}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    stream = data.domains({"math": data.texts("math", limit=2, test_limit=2)})
    with pytest.raises(ValueError, match=r"path: .* has no causal language model"):
        models.huggingface(stream, tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer: .* has no tokenizer"):
        data.texts("math", tokenizer=tmp_path)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_pickles_are_refused(transformers, tmp_path):
    class Canary:
        def __reduce__(self):
            return open, (str(tmp_path / "run"), "w")

    config = transformers.GPT2Config(n_embd=4, n_layer=1, n_head=1, n_positions=64, vocab_size=256)
    config.save_pretrained(tmp_path)
    torch.save({"wte.weight": Canary()}, tmp_path / "pytorch_model.bin")
    stream = data.domains({"math": data.texts("math", limit=2, test_limit=2)})
    with pytest.raises(ValueError, match=r"no causal language model .*as safetensors; code and pickles .* are not run"):
        models.huggingface(stream, tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_model_that_lacks_weights_is_refused_and_nothing_is_drawn_in_their_place(transformers, tmp_path):
    config = transformers.GPT2Config(n_embd=4, n_layer=1, n_head=1, n_positions=64, vocab_size=256)
    net = transformers.AutoModelForCausalLM.from_config(config)
    stream = data.domains({"math": data.texts("math", limit=2, test_limit=2)})
    net.save_pretrained(tmp_path)
    models.huggingface(stream, tmp_path)
    net.save_pretrained(tmp_path, state_dict={n: t for n, t in net.state_dict().items() if "ln_f" not in n})
    with pytest.raises(ValueError, match=r"it lacks 2 weights, \['transformer.ln_f.bias', 'transformer.ln_f.weight'\]"):
        models.huggingface(stream, tmp_path)


@pytest.fixture(scope="module")
def tokens(folder):
    return {n: data.texts(n, context=24, limit=60, test_limit=12, tokenizer=folder) for n in ("math", "law")}


class TestHuggingFace:
    """Tiny random models, saved to disk with a tokenizer of their own."""

    def test_learns_merges_and_is_measured_as_any_model(self, folder, tokens):
        stream = data.domains(tokens)
        factory = partial(models.huggingface, path=folder)
        result = run(stream, factory, Learner(), None, QUICK, device="cpu", progress=False)
        again = run(stream, factory, Learner(), None, QUICK, device="cpu", progress=False)
        assert all(map(equal, result.weights, again.weights)) and np.isfinite(result.losses).all()
        assert result.training_loss[0][-1] < result.training_loss[0][0]
        base = get_weights(factory(stream))
        shapes = [tuple(tensor.shape) for tensor in base.values()]
        assert shapes.count((len(stream.classes) + 5, 16)) == (1 if folder.name.startswith("gpt2") else 2)
        middle = lerp(result.weights[0], result.weights[1], 0.5)
        merged = merging.task_arithmetic(result.weights, base=base, scale=0.5)
        assert middle.keys() == merged.keys() == base.keys()
        bits = bits_per_byte(result.losses, [text.bytes_per_token for text in tokens.values()])
        plain = bits_per_byte(result.losses)
        assert np.array_equal(bits < plain, [[text.bytes_per_token > 1 for text in tokens.values()]] * 2)
        assert tokens["law"].bytes_per_token > 1
        assert 0 <= exact_match(result.model, tokens["math"], weights=merged, limit=3) <= 1

    def test_logits_are_the_models_without_the_padding_of_its_vocabulary(self, folder, tokens, transformers):
        stream, x = data.domains(tokens), tokens["law"].test.x[:3]
        state = torch.get_rng_state()
        model = models.huggingface(stream, folder).eval()
        assert torch.equal(state, torch.get_rng_state())
        source = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        with torch.no_grad():
            logits = model(x)
            torch.testing.assert_close(logits, source(x).logits[..., : len(stream.classes)])
        assert logits.shape == (3, 24, len(stream.classes))

    def test_tokens_stand_for_all_the_bytes(self, folder, tmp_path):
        words = "the land, naïve court\n"
        (tmp_path / "a.txt").write_text(words)
        text = data.text_file(tmp_path / "a.txt", tmp_path / "a.txt", context=30, tokenizer=folder)
        ids = text.encode(words)
        assert text.decode(ids) == words and len(ids) < len(words.encode())
        first = len(text.decode(ids[:1]).encode())
        assert text.bytes_per_token == (len(words.encode()) - first) / (len(ids) - 1)
        assert text.train.x[0, : len(ids) - 1].tolist() == ids[:-1] and text.tokenizer == str(folder)
        assert text.classes[ids[0]] == "the"

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (
                lambda s, bytes_, path, void: models.huggingface(bytes_, path),
                "windows of 64 tokens, the model takes 32",
            ),
            (lambda s, bytes_, path, void: models.huggingface(s, void), "has no causal language model"),
            (lambda s, bytes_, path, void: models.huggingface(s, void / "none"), "is no folder"),
            (lambda s, bytes_, path, void: data.texts("law", tokenizer=void), "has no tokenizer"),
            (lambda s, bytes_, path, void: models.huggingface(data.split(data.digits()), path), "no integer tokens"),
        ],
    )
    def test_bad_input_names_itself_and_the_remedy(self, folder, tokens, tmp_path, build, message):
        longer = data.domains({"law": data.texts("law", limit=5, test_limit=5)})
        with pytest.raises(ValueError, match=message):
            build(data.domains(tokens), longer, folder, tmp_path)

    def test_other_tokens_than_the_models_are_refused(self, folder, transformers, tmp_path):
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=100)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        stream = data.domains({"law": data.texts("law", limit=5, test_limit=5, context=8)})
        with pytest.raises(ValueError, match="it has 256 tokens, the model 100"):
            models.huggingface(stream, tmp_path)


def test_without_transformers_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for build in (
        lambda: data.texts("law", tokenizer=tmp_path),
        lambda: models.huggingface(data.domains({"m": data.texts("math")}), tmp_path),
    ):
        with pytest.raises(ImportError, match=r"pip install 'clkit\[huggingface\]'"):
            build()
