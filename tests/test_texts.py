"""Texts as windows of tokens: what a window holds, how documents are parted, and where texts come from."""

import json
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit import data
from clkit.data import text as reading
from clkit.data.core import IGNORED
from clkit.data.text import _bytes, _windows

NAMES = ("math", "law", "code")


def pieces(part: data.Examples) -> list[bytes]:
    """What each window holds up to its last target, its first token included."""
    last = (part.y != IGNORED).sum(1)
    rows = zip(part.x, part.y, last, strict=True)
    return [bytes(x[: n + 1].tolist() + y[n - 1 : n].tolist() * (n == len(x))) for x, y, n in rows]


DOCUMENTS = st.lists(st.text("abcdé", min_size=1, max_size=30), min_size=1, max_size=12)


def cut(lines: list[bytes], context: int) -> list[bytes]:
    """The slow twin: windows with the byte that their last target is."""
    windows, window = [], b""
    for line in lines:
        if window and len(window) + len(line) > context + 1:
            windows.append(window)
            window = b""
        window += line
        while len(window) > context + 1:
            windows.append(window[: context + 1])
            window = window[context:]
    return [*windows, window]


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(1, 12), st.integers(1, 6))
def test_windows_are_those_of_the_slow_twin_and_cut_no_document_that_fits(documents, context, limit):
    part, width = _windows(documents, _bytes, context, None)
    lines = [f"{document}\n".encode() for document in documents]
    held = pieces(part)
    assert held == cut(lines, context) and width == 1
    assert all(len(line) > context + 1 or any(line in piece for piece in held) for line in lines)
    assert pieces(_windows(documents, _bytes, context, limit)[0]) == held[:limit]


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_the_next_bytes(name):
    text = data.texts(name, limit=300)
    for part in (text.train, text.test):
        counts = part.y != IGNORED
        assert part.x.dtype == part.y.dtype == torch.int64
        assert torch.equal(part.y[:, :-1][counts[:, 1:]], part.x[:, 1:][counts[:, 1:]])
        assert (counts[:, :-1] | ~counts[:, 1:]).all() and counts[:, 0].all()  # targets first, then none
    assert len(text.train) == 300 and len(text.test) <= 256 and len(text.classes) == 256
    assert text.bytes_per_token == 1 and text.tokenizer is None


@pytest.mark.parametrize("name", NAMES)
def test_training_and_test_windows_share_no_text(name):
    text = data.texts(name, context=100)
    train, test = (pieces(part) for part in (text.train, text.test))
    assert not {piece for piece in test if len(piece) > 60} & set(train)


def test_held_out_sums_are_not_trained_on_in_either_order():
    text = data.texts("math", context=40)
    trained = b"".join(pieces(text.train)).decode()
    assert len(text.problems) > 500
    for problem in text.problems:
        a, b = problem.prompt[:-1].split("+")
        assert f"\n{a}+{b}:" not in f"\n{trained}" and f"\n{b}+{a}:" not in f"\n{trained}"
        assert int(a) + int(b) == int(problem.answer)
    assert data.Problem("", "47+38:7+8=15,4+3+1=8#85\n", "#").answer == "85"
    assert "\n47+38:7+8=15,4+3+1=8#85\n" in trained


def test_an_answer_ends_with_its_line():
    problem = data.Problem("2+2=", "so #4\n", "#")
    assert problem.answer == "4"
    assert [problem.answer_in(t) for t in ("#4\n#5\n", "# 4 \n", "#4", "4\n", "#\n")] == ["4", "4", None, None, ""]


def test_embedded_texts_are_the_same_on_every_machine():
    """The texts themselves, and how they are parted and cut: other ones make the results of notebook 05 stale."""
    made = {name: data.domains({name: data.texts(name, context=32)}).fingerprint for name in NAMES}
    assert made == {"math": "bfce33fd9b964439", "law": "eb6ec8c2561fb92f", "code": "426441da925becd6"}
    content = Path(reading.__file__).with_name("texts.jsonl.xz").read_bytes()
    assert sha256(content).hexdigest().startswith("1b0ff445bbe4271f") and len(content) < 150_000


def test_math_is_the_same_on_every_machine():
    text = data.texts("math", context=32, limit=3, test_limit=1)
    assert text.decode(text.train.x[0].tolist()).rstrip("\0") == "90+99:0+9=9,9+9=18#189\n"


def test_a_stream_of_texts_passes_tokens_through():
    stream = data.domains({name: data.texts(name, limit=20, test_limit=10) for name in NAMES})
    assert stream.scenario == "domain" and [task.name for task in stream] == list(NAMES) and stream.shape == (64,)
    task = stream[1]
    batch = task.batch(torch.arange(4), torch.Generator().manual_seed(0))
    assert task.prepare(task.train.x) is task.train.x
    assert torch.equal(batch.x, task.train.x[:4]) and torch.equal(batch.y, task.train.y[:4])


def test_documents_are_parted_by_content_and_copies_count_once():
    documents = [f"text {i}" for i in range(40)]
    one, other = reading._parted(documents, ""), reading._parted([*documents[::-1], *documents], "")
    assert one == other and len(one.test) == 4 and {*one.train, *one.test} == {*documents}


def test_encoding_and_back():
    text = data.texts("code", limit=5, test_limit=2)
    parts = "train Examples(5 of (64,), int64, cpu), test Examples(2 of (64,), int64, cpu)"
    assert repr(text) == f"Text('code', {parts}, bytes, 0 problems)"
    assert text.encode("aé\n") == [97, 0xC3, 0xA9, 10] and text.decode(text.encode("aé\n")) == "aé\n"
    assert text.classes[97] == "a" and text.classes[10] == "0x0a"


class TestOwnFiles:
    def test_text_between_blank_lines(self, tmp_path):
        (tmp_path / "own.txt").write_text("\n".join(f"number {i}\n" for i in range(30)))
        text = data.text_file(tmp_path / "own.txt", context=16)
        assert text.name == "own" and len(text.train) == 27 and len(text.test) == 3
        assert all(p.startswith(b"number") and p.endswith(b"\n") for p in pieces(text.train))

    def test_rows_of_named_fields_with_a_test_file(self, tmp_path):
        rows = [json.dumps({"q": f"say {i}", "a": f"é{i}"}) for i in range(4)]
        (tmp_path / "a.jsonl").write_text("\n".join(rows[:3]))
        (tmp_path / "b.jsonl").write_text(rows[3] + "\n")
        text = data.text_file(tmp_path / "a.jsonl", tmp_path / "b.jsonl", fields=("q", "a"), context=12)
        assert pieces(text.train)[0].decode() == "say 0\né0\n" and len(text.train) == 3
        assert pieces(text.test)[0].decode() == "say 3\né3\n"

    def test_a_row_ends_at_its_newline_alone(self, tmp_path):
        """Line and paragraph separators are ordinary characters within a string of JSON."""
        rows = [json.dumps({"text": f"{end} {i}"}, ensure_ascii=False) for i, end in enumerate("\u2028\u2029\x85")]
        (tmp_path / "a.jsonl").write_bytes("\r\n".join(rows).encode())
        text = data.text_file(tmp_path / "a.jsonl", tmp_path / "a.jsonl", context=8)
        assert [piece.decode() for piece in pieces(text.train)] == ["\u2028 0\n", "\u2029 1\n", "\x85 2\n"]

    def test_real_layouts_from_a_folder_and_a_zip(self, tmp_path):
        rows = {
            "gsm8k_train": [{"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}],
            "gsm8k_test": [{"question": "2+2?", "answer": "#### 4"}],
            "mbpp": [{"text": "Add.", "code": "a\r\nb"}],
            "humaneval": [{"prompt": "def f():\n", "canonical_solution": "    pass\n"}],
            "uscode_train": [{"heading": "Sec. 1", "text": "All."}],
            "uscode_test": [{"heading": "Sec. 2", "text": "None."}],
        }
        folder = tmp_path / "texts" / "deep"
        folder.mkdir(parents=True)
        with ZipFile(tmp_path / "texts.zip", "w") as archive:
            for name, content in rows.items():
                (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
                archive.write(folder / f"{name}.jsonl", f"deep/{name}.jsonl")
        expected = {
            "math": ("1+1?\nIt is 2.\n#### 2\n", "2+2?\n#### 4\n"),
            "law": ("Sec. 1\nAll.\n", "Sec. 2\nNone.\n"),
            "code": ('"""Add."""\na\nb\n', "def f():\n    pass\n"),
        }
        for path in (tmp_path / "texts", tmp_path / "texts.zip"):
            for name, (train, test) in expected.items():
                text = data.texts(name, path=path)
                assert (pieces(text.train)[0].decode(), pieces(text.test)[0].decode()) == (train, test)
        problem = data.texts("math", path=tmp_path / "texts").problems[0]
        assert (problem.prompt, problem.answer) == ("2+2?\n", "4")


@pytest.mark.packs("text")
def test_the_real_pack(packs):
    stream = data.domains({name: data.texts(name, path=packs / "text.zip", limit=1000) for name in NAMES})
    assert [len(task.train) for task in stream] == [1000] * 3 and [len(task.test) for task in stream] == [256] * 3
    problems = data.texts("math", path=packs / "text.zip", limit=1).problems
    assert len(problems) == 1319 and problems[0].answer == "18" and "<<" not in problems[0].solution
    assert all(problem.answer for problem in problems)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: data.texts("low"), "name: 'low' is unknown; choose one of math, law, code; did you mean 'law'"),
        (lambda path: data.texts("math", context=0), r"context: 0; give a whole number in \[1, 100000\]"),
        (lambda path: data.texts("math", limit=0), "limit: 0; give a whole number, at least 1"),
        (lambda path: data.texts("math", path=path), r"has no gsm8k_train.jsonl; .* text_file\(\)"),
        (lambda path: data.texts("math", path=path / "none"), "cannot be read .*; give a directory or zip that can be"),
        (lambda path: data.texts("math", tokenizer=path / "none"), "is no folder; .* nothing is downloaded"),
        (lambda path: data.text_file(path / "none"), r"path: .*none cannot be read \(there is no such file\); give"),
        (lambda path: data.text_file(path / "one.txt", path / "none"), "test: .*none cannot be read"),
        (lambda path: data.text_file(path / "one.txt"), "has 1 documents"),
        (
            lambda path: data.text_file(path / "row.jsonl", fields=("b",)),
            r"fields: \['b'\] are no texts in path: .*, line 1; its rows have a",
        ),
        (
            lambda path: data.text_file(path / "row.jsonl", path / "void.txt", fields=("a",)),
            "void.txt' has no text; give a file",
        ),
    ],
)
def test_bad_input_names_itself_and_the_remedy(make, message, tmp_path):
    (tmp_path / "one.txt").write_text("one\n")
    (tmp_path / "void.txt").write_text("\n\n")
    (tmp_path / "row.jsonl").write_text('{"a": "text"}\n')
    if "no folder" in message:
        pytest.importorskip("transformers")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(tmp_path)


ROW = b'{"question": "1+1", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "Über\n\nalles".encode("latin-1"), "is no UTF-8 .*; save it as UTF-8"),
        ("a.txt", "one\n\ntwo".encode("utf-16"), "is no UTF-8"),
        ("a.txt", "one\n\ntwo".encode("utf-16-le"), "is no UTF-8 .*null bytes, as binary files have.*; save it"),
        ("a.bin", bytes(range(256)), "is no UTF-8"),
        ("a.txt", b"", "has no text"),
        ("a.txt", b" \n\n \n", "has no text"),
        ("a.jsonl", b"\n\n", "has no text"),
        ("a.json", b'[{"text": "one"}]', "is one JSON value; write its documents as rows of a .jsonl file"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', r"line 2 is no JSON object \(.*\); write one a line"),
        ("a.JSONL", b'[\n{"text": "one"},\n{"text": "two"}\n]', "line 1 is no JSON"),
        ("a.jsonl", b'{"text": "one"}\n["two"]\n', r"line 2 is no JSON object \(\[\"two\"\]\); write one a line"),
        ("a.jsonl", b'{"text": "one"}\n{"other": "two"}\n', r"line 2; its rows have other"),
        ("a.jsonl", b'{"text": "one"}\n{"text": null}\n', "line 2; its rows have text"),
        ("a.jsonl", b'{"text": ["one", "two"]}\n', "line 1; its rows have text"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\\ud800"}\n', "line 2 is no JSON object"),
        ("a.jsonl", b'{"text": ' + 10**5 * b"[", "line 1 is no JSON object"),
        ("a.ndjson", "{\"text\": \"Ü\"}".encode("latin-1"), "is no UTF-8"),
    ],
)  # fmt: skip
def test_files_that_are_no_text_are_named_with_the_remedy(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.* {message}"):
        data.text_file(tmp_path / name)
    (tmp_path / "good.txt").write_text("one\n\ntwo\n")
    with pytest.raises(ValueError, match=rf"{name}.* {message}"):
        data.text_file(tmp_path / "good.txt", tmp_path / name)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read \(it is a folder\); give a file of text"):
        data.text_file(tmp_path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_ends_of_lines_do_not_count(mark, end, tmp_path):
    lines = [f"line {i}{'' if i % 2 else end}" for i in range(8)]
    (tmp_path / "a.txt").write_bytes(mark + end.join(lines).encode())
    text = data.text_file(tmp_path / "a.txt", tmp_path / "a.txt", context=16)
    assert (
        b"".join(pieces(text.train)).replace(b"\n", b" ").split() == b" ".join(b"line %d" % i for i in range(8)).split()
    )
    assert not (text.train.x == 13).any() and not (text.train.x > 127).any()
    if end != "\r":
        rows = [json.dumps({"text": f"row {i}"}) for i in range(3)]
        (tmp_path / "a.jsonl").write_bytes(mark + end.join(rows).encode())
        assert data.text_file(tmp_path / "a.jsonl", tmp_path / "a.jsonl", context=5).decode([97]) == "a"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"gsm8k_train.jsonl": ROW}, "has no gsm8k_test.jsonl"),
        ({"gsm8k_train.jsonl": ROW, "x/gsm8k_test.jsonl": ROW, "y/gsm8k_test.jsonl": ROW},
         "has several, x/gsm8k_test.jsonl, y/gsm8k_test.jsonl; give one"),
        ({"gsm8k_train.jsonl": b'{"question": "1+1"}', "gsm8k_test.jsonl": ROW},
         r"fields: \['answer'\] are no texts in path: 'gsm8k_train.jsonl', line 1; its rows have question"),
        ({"gsm8k_train.jsonl": ROW, "gsm8k_test.jsonl": ROW + b'{"question": "\xff"}'}, "test.jsonl' is no UTF-8"),
    ],
)  # fmt: skip
def test_real_texts_of_another_kind_are_named(files, message, tmp_path):
    with ZipFile(tmp_path / "texts.zip", "w") as archive:
        for name, content in files.items():
            (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "texts" / name).write_bytes(content)
            archive.writestr(name, content)
    for place in (tmp_path / "texts", tmp_path / "texts.zip"):
        with pytest.raises(ValueError, match=message):
            data.texts("math", path=place)


def test_a_damaged_zip_of_texts_is_named(tmp_path):
    with ZipFile(tmp_path / "texts.zip", "w") as archive:
        for part in ("train", "test"):
            archive.writestr(f"gsm8k_{part}.jsonl", ROW)
    content = (tmp_path / "texts.zip").read_bytes()
    (tmp_path / "texts.zip").write_bytes(content.replace(b"1+1", b"1+2"))
    with pytest.raises(ValueError, match=r"path: 'gsm8k_train.jsonl' of .*texts.zip cannot be read \(Bad CRC"):
        data.texts("math", path=tmp_path / "texts.zip")
