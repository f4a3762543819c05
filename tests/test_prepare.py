import contextlib
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import REPOSITORY, SHAKESPEARE, SHARD_TOKENS, command, ok, shard, train_here
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
from config import ConfigError, UserError
from prepare import CharTokenizer, Tokens, decoded_stream, load_meta, tokenizer_of

TEXT = "Grüße, Jürgen ❤ 😀 Unicode!\r\nsecond line\n" * 50


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited between attempts."""
    seconds = []
    monkeypatch.setattr(prepare.time, "sleep", lambda pause: seconds.append(pause) if pause else None)
    return seconds


def files(folder):
    found = [path for path in (folder / "data").rglob("*") if path.is_file() and path.name != "lock"]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def load_all(dataset):
    meta = load_meta(dataset)
    return meta, np.concatenate(
        [Tokens(dataset, split, meta, 0).ids for split in ("train", "val") if meta[f"{split}_tokens"]]
    )


def decoded(dataset):
    meta, ids = load_all(dataset)
    return tokenizer_of(meta).decode(ids)


# Tokens and files


@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_any_utf8_text_comes_back_from_its_tokens(folder, monkeypatch, piece):
    monkeypatch.setattr(prepare, "PIECE", piece)
    (folder / "my.txt").write_bytes(TEXT.encode())
    prepare.main(["--dataset=mine", "--input=my.txt"])
    assert decoded("mine") == TEXT
    assert files(folder) == [f"data/mine/{name}" for name in ("input.txt", "meta.json", "train.bin", "val.bin")]
    assert (folder / "data/mine/input.txt").read_bytes() == TEXT.encode()


def test_files_have_the_promised_layout(folder):
    (folder / "my.txt").write_bytes(TEXT.encode())
    prepare.main(["--dataset=mine", "--input=my.txt"])
    chars = "".join(sorted(set(TEXT)))
    n_train = int(len(TEXT) * 0.9)
    assert json.loads((folder / "data/mine/meta.json").read_text()) == {
        "tokenizer": "char",
        "vocab_size": len(chars),
        "chars": chars,
        "train_tokens": n_train,
        "val_tokens": len(TEXT) - n_train,
        "val_bytes": len(TEXT[n_train:].encode()),
        "source": "my.txt",
        "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
    }
    ids = [chars.index(c) for c in TEXT]
    assert (folder / "data/mine/train.bin").read_bytes() == b"".join(i.to_bytes(2, "little") for i in ids[:n_train])
    assert (folder / "data/mine/val.bin").read_bytes() == b"".join(i.to_bytes(2, "little") for i in ids[n_train:])


def test_val_fraction_moves_the_split(folder):
    (folder / "my.txt").write_text("ab" * 500)
    prepare.main(["--dataset=mine", "--input=my.txt", "--val_fraction=0.25"])
    assert (load_meta("mine")["train_tokens"], load_meta("mine")["val_tokens"]) == (750, 250)


TOKENIZERS = {"char": ["--tokenizer=char"], "bpe": ["--tokenizer=bpe", "--vocab_size=260"]}
any_text = st.text(min_size=2) | st.text(" \n\tab\u0301.'s\u3000❤😀\r0", min_size=2)
any_text = any_text.filter(lambda text: text[0] != "\ufeff")  # a byte-order mark


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("piece", [3, 2**20])
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=any_text)
def test_any_unicode_text_comes_back(folder, tokenizer, piece, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PIECE", piece)
        Path("my.txt").write_bytes(text.encode())
        prepare.main(["--dataset=mine", "--input=my.txt", *TOKENIZERS[tokenizer]])
    assert decoded("mine") == text
    meta, ids = load_all("mine")
    assert "".join(decoded_stream(tokenizer_of(meta), ids.tolist())) == text
    n_train = int(0.9 * len(text))
    train_ids, val_ids = np.split(ids, [meta["train_tokens"]])
    assert tokenizer_of(meta).decode(train_ids) == text[:n_train]  # the text is split, not the tokens
    assert tokenizer_of(meta).decode(val_ids) == text[n_train:]
    assert meta["val_bytes"] == len(text[n_train:].encode())


def test_bpe_learns_frequent_pairs_of_the_text(folder):
    (folder / "my.txt").write_text("the cat the hat the mat. " * 100)
    prepare.main(["--dataset=mine", "--input=my.txt", "--tokenizer=bpe", "--vocab_size=262"])
    meta, ids = load_all("mine")
    tokenizer = tokenizer_of(meta)
    assert (meta["tokenizer"], meta["vocab_size"]) == ("bpe", 262)
    assert {tokenizer.decode(np.array([id])) for id in range(256, 262)} >= {"at", " the"}
    assert ids.max() < 262
    assert len(ids) < 0.6 * 2500


def test_pieces_and_threads_do_not_change_the_tokens(folder, monkeypatch):
    """A tokenizer.json of elsewhere: its tokens are those of the whole text at once."""
    text = "".join(np.random.default_rng(0).choice(list("abc d\n\n  .,'s09éß ❤"), size=50_000))
    (folder / "my.txt").write_text(text)
    prepare.main(["--dataset=mine", "--input=my.txt", "--tokenizer=bpe", "--vocab_size=400"])
    library = tokenizer_of(load_meta("mine")).library
    library.add_special_tokens(["<|endoftext|>"])
    library.save("theirs.json")
    monkeypatch.setattr(prepare, "PIECE", 5000)
    monkeypatch.setattr(prepare, "PART", 700)
    parts = rf"(?s).{{1,700}}\Z|.{{1,700}}{prepare.WORD_END}|.{{1,700}}"
    monkeypatch.setattr(prepare, "PARTS", re.compile(parts))
    (folder / "my.txt").write_text(text + "<|endoftext|>" + text)
    prepare.main(["--dataset=other", "--input=my.txt", "--tokenizer=theirs.json"])
    meta, ids = load_all("other")
    whole = text + "<|endoftext|>" + text
    n_train = int(0.9 * len(whole))
    assert ids.tolist() == library.encode(whole[:n_train]).ids + library.encode(whole[n_train:]).ids
    assert meta["vocab_size"] == 401
    assert decoded("other") == text + "<|endoftext|>" + text


def test_gpt2s_tokens_come_from_the_hub_and_by_the_name_of_the_dataset(folder, monkeypatch):
    (folder / "my.txt").write_text("the cat the hat the mat. " * 100)
    prepare.main(["--dataset=mine", "--input=my.txt", "--tokenizer=bpe"])
    library, asked = tokenizer_of(load_meta("mine")).library, []
    monkeypatch.setattr("tokenizers.Tokenizer.from_pretrained", lambda name: asked.append(name) or library)
    prepare.main(["--dataset=mine_gpt2", "--input=my.txt"])
    assert asked == ["gpt2"]
    assert load_meta("mine_gpt2")["tokenizer"] == "gpt2"
    assert load_all("mine_gpt2")[1].tolist() == load_all("mine")[1].tolist()
    monkeypatch.setattr("tokenizers.Tokenizer.from_pretrained", lambda name: 1 / 0)
    with pytest.raises(
        UserError, match=r"cannot get GPT-2's tokenizer .* \(ZeroDivisionError: .*\); .*--tokenizer=FILE"
    ):
        prepare.main(["--dataset=mine_gpt2", "--input=my.txt"])


def test_a_tokenizer_that_loses_text_is_refused(folder):
    library = CharTokenizer("abc ").to_library()
    library.normalizer = tokenizers.normalizers.Lowercase()
    library.save("lower.json")
    (folder / "my.txt").write_text("abc ABC " * 100)
    with pytest.raises(
        UserError, match=r"^my.txt cannot be written in these tokens: decoding them does not return it$"
    ):
        prepare.main(["--dataset=mine", "--input=my.txt", "--tokenizer=lower.json"])
    assert files(folder) == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "there is no tokenizer their.json"),
        ("{}", r"not usable \(Exception: "),
        ("not JSON", r"not usable \(JSONDecodeError: Expecting value"),
        ("5", r"not usable \(TypeError: "),
        ('{"tokenizer": "char", "vocab_size": 3, "chars": "ab"}', "chars must be as many different characters"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_used_is_named(folder, content, problem):
    if content:
        Path("their.json").write_text(content)
    (folder / "my.txt").write_text("abc")
    with pytest.raises(ConfigError, match=rf"^(--tokenizer=their.json is .*)?{problem}"):
        prepare.main(["--dataset=mine", "--input=my.txt", "--tokenizer=their.json"])


def test_a_stream_shows_characters_once_they_are_whole(folder):
    (folder / "my.txt").write_text("ab ❤ ab ❤ 😀 " * 100)
    prepare.main(["--dataset=mine", "--input=my.txt", "--tokenizer=bpe", "--vocab_size=256"])  # bytes
    tokenizer = tokenizer_of(load_meta("mine"))
    assert list(decoded_stream(tokenizer, tokenizer.encode("a❤😀b").tolist())) == ["a", "❤", "😀", "b"]
    torn = [*tokenizer.encode("❤").tolist()[1:], *tokenizer.encode("a❤").tolist()[:-1]]
    assert "".join(decoded_stream(tokenizer, torn)) == tokenizer.decode(np.array(torn))


@pytest.mark.skipif(not SHAKESPEARE, reason="needs the real text")
def test_tiny_shakespeare_has_the_known_figures(folder):
    prepare.main(["--dataset=shakespeare_char", f"--input={SHAKESPEARE}"])
    meta = load_meta("shakespeare_char")
    assert (meta["vocab_size"], meta["train_tokens"], meta["val_tokens"]) == (65, 1_003_854, 111_540)
    assert meta["sha256"] == prepare.SHAKESPEARE_SHA256
    assert decoded("shakespeare_char") == SHAKESPEARE.read_text()


def test_encode_names_the_character_outside_the_vocabulary_and_its_position():
    tokenizer = CharTokenizer("abc")
    assert tokenizer.encode("cab").tolist() == [2, 0, 1]
    assert tokenizer.encode("cab").dtype == np.uint16
    assert tokenizer.decode(np.array([2, 0, 1])) == "cab"
    with pytest.raises(ValueError, match="character 'é' at position 3 is not in the vocabulary"):
        tokenizer.encode("abcéd")


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs the system to tell a process's memory")
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_memory_does_not_grow_with_the_text(folder, tokenizer):
    words = ["".join(word) for word in np.random.default_rng(0).choice(list("abcdefghij"), (20_000, 8))]
    peaks = []
    for megabytes in (2, 8):
        (folder / "my.txt").write_text(" ".join(words * 12)[:2_000_000] * (megabytes // 2))
        argv = [sys.executable, REPOSITORY / "prepare.py", "--dataset=mine", "--input=my.txt", *TOKENIZERS[tokenizer]]
        running = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        _, running.returncode, usage = os.wait4(running.pid, 0)
        assert running.returncode == 0
        peaks.append(usage.ru_maxrss)
    assert peaks[1] < 1.15 * peaks[0]


def test_a_bpe_is_learned_from_pieces_of_a_long_text(folder, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 1000)
    monkeypatch.setattr(prepare, "LEARN_FROM", 4000)
    read = []
    (folder / "my.txt").write_text("the cat the hat the mat. " * 1000)
    islice = prepare.itertools.islice
    monkeypatch.setattr(prepare.itertools, "islice", lambda *a: (read.append(piece) or piece for piece in islice(*a)))
    prepare.main(["--dataset=mine", "--input=my.txt", "--tokenizer=bpe", "--vocab_size=262"])
    assert 2000 <= sum(map(len, read)) <= 6000


def test_a_tokenizer_that_marks_blanks_gives_the_tokens_of_the_whole_text(folder, monkeypatch):
    """As SentencePiece does: what begins with a letter gets a mark, which decoding takes away again."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=100, show_progress=False)
    text = "the cat sat\n on the mat. " * 2000
    library.train_from_iterator([text], trainer)
    library.save("marks.json")
    monkeypatch.setattr(prepare, "PIECE", 5000)
    (folder / "my.txt").write_text(text)
    prepare.main(["--dataset=mine", "--input=my.txt", "--tokenizer=marks.json"])
    meta, ids = load_all("mine")
    n_train = int(0.9 * len(text))
    assert ids.tolist() == library.encode(text[:n_train]).ids + library.encode(text[n_train:]).ids
    assert "".join(decoded_stream(tokenizer_of(meta), ids[:200].tolist())) == tokenizer_of(meta).decode(ids[:200])


@pytest.mark.parametrize(
    "change",
    [
        {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}},
        {"padding": {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 70_000,
                     "pad_type_id": 0, "pad_token": "x"}},
    ],
)  # fmt: skip
def test_padding_and_truncation_are_of_no_concern(folder, change):
    facts = json.loads(CharTokenizer("abc").to_library().to_str()) | change
    Path("their.json").write_text(json.dumps(facts))
    Path("my.txt").write_text("abcabc" * 10)
    prepare.main(["--dataset=mine", "--input=my.txt", "--tokenizer=their.json"])
    assert decoded("mine") == "abcabc" * 10


def test_a_panic_of_the_library_is_one_line(folder):
    facts = json.loads(CharTokenizer("abc").to_library().to_str())
    facts["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
    Path("their.json").write_text(json.dumps(facts))
    Path("my.txt").write_text("abc")
    with pytest.raises(UserError, match=r"the tokenizer cannot encode this text \(PanicException: "):
        prepare.main(["--dataset=mine", "--input=my.txt", "--tokenizer=their.json"])


def test_more_characters_than_uint16_can_hold_are_refused(folder):
    text = "".join(chr(0x10000 + i) for i in range(2**16 + 1))
    (folder / "my.txt").write_bytes(text.encode())
    CharTokenizer(text).to_library().save("their.json")
    for tokenizer in ("char", "their.json"):
        with pytest.raises(UserError, match=r"^65,537 different tokens: uint16 can tell 65,536 apart$"):
            prepare.main(["--dataset=mine", "--input=my.txt", f"--tokenizer={tokenizer}"])
    (folder / "my.txt").write_bytes(text[1:].encode())
    prepare.main(["--dataset=mine", "--input=my.txt"])
    assert decoded("mine") == text[1:]


@pytest.mark.parametrize("piece", [3, 2**20])
def test_a_text_that_is_not_utf8_is_refused_with_the_place(folder, monkeypatch, piece):
    monkeypatch.setattr(prepare, "PIECE", piece)
    (folder / "my.txt").write_bytes("Grüße".encode() + b"\xff and more")
    with pytest.raises(UserError, match=r"^my.txt is not UTF-8 text: byte 7 is 0xff"):
        prepare.main(["--dataset=mine", "--input=my.txt"])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-16", "cp1252", "gzip"])
def test_what_is_no_utf8_is_refused_in_a_line_with_the_program_that_converts_it(folder, encoding):
    text = "Gruesse aus Köln, to be or not to be. ".replace("ö", "ö" if encoding == "cp1252" else "oe") * 100
    content = gzip.compress(text.encode()) if encoding == "gzip" else text.encode(encoding)
    (folder / "my text.txt").write_bytes(content)
    iconv = r"convert it from its encoding, for instance: iconv -f WINDOWS-1252 -t UTF-8 'my text.txt' > utf8.txt$"
    with pytest.raises(UserError, match=rf"^my text.txt is not UTF-8 text: (byte|[\d,]+ of its [\d,]+) .*; {iconv}"):
        prepare.main(["--dataset=mine", "--input=my text.txt"])
    assert files(folder) == []


def test_a_few_nul_characters_are_text(folder):
    (folder / "my.txt").write_bytes(b"to be\0" + b"or not to be. \0" * 90)
    prepare.main(["--dataset=mine", "--input=my.txt"])
    assert decoded("mine").startswith("to be\0or")


def test_a_folder_is_its_texts_in_the_order_of_their_names(folder):
    Path("texts").mkdir()
    for name, text in (("b.txt", "second " * 300), ("a.txt", "\ufefffirst " * 300), ("c.md", "no"), ("._a.txt", "no")):
        Path("texts", name).write_text(text, encoding="utf-8")
    prepare.main(["--dataset=mine", "--input=texts"])
    assert decoded("mine") == "first " + "\ufefffirst " * 299 + "\n" + "second " * 300
    assert json.loads(Path("data/mine/meta.json").read_text())["source"] == "texts"
    Path("texts", "b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"^texts/b.txt is not UTF-8 text: byte 0 "):
        prepare.main(["--dataset=mine", "--input=texts"])
    Path("texts", "b.txt").write_text("# is no character of it " * 300)
    with pytest.raises(UserError, match=r"^texts has characters that the vocabulary lacks: 'a' \(600\), '#' \(300\), "):
        prepare.main(["--dataset=mine", "--input=texts", "--tokenizer=data/mine/meta.json"])
    assert Path("data/mine/input.txt").read_text(encoding="utf-8") == decoded("mine")  # still that of the dataset
    assert {path.name for path in Path("data/mine").iterdir()} == {
        "input.txt", "train.bin", "val.bin", "meta.json", "lock"
    }  # fmt: skip
    for name in ("a.txt", "b.txt"):
        Path("texts", name).unlink()
    with pytest.raises(ConfigError, match=r"^--input: there is no file, or folder with .txt files, texts$"):
        prepare.main(["--dataset=mine", "--input=texts"])


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", None])
@pytest.mark.parametrize("source", ["gpt2", "theirs", "theirs/tokenizer.json", "data/other/meta.json", "run/best.pt"])
def test_between_the_texts_of_a_folder_is_the_tokenizers_end_token(folder, monkeypatch, source, end):
    """A newline where it has none."""
    if (source, end) == ("gpt2", "</s>"):
        pytest.skip("GPT-2's is <|endoftext|>")
    Path("learn.txt").write_text("one two three " * 500)
    library = prepare.learned_bpe(prepare.Text(Path("learn.txt"), "me"), 280).library
    library.add_special_tokens([token for token in ("<pad>", end) if token])
    monkeypatch.setattr("tokenizers.Tokenizer.from_pretrained", lambda name: library)
    monkeypatch.setattr(prepare, "quiet_hub", lambda needed: None)
    Path("theirs").mkdir()
    library.save("theirs/tokenizer.json")
    Path("theirs/tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    prepare.main(["--dataset=other", "--input=learn.txt", "--tokenizer=theirs"])
    Path("run").mkdir()
    meta = load_meta("other")
    facts = {fact: meta[fact] for fact in prepare.TOKENIZER_FACTS if fact in meta}
    torch.save({"tokenizer": facts}, "run/best.pt")
    Path("texts").mkdir()
    for name in "abc":
        Path("texts", f"{name}.txt").write_text("one two three " * 100)
    prepare.main(["--dataset=mine", "--input=texts", f"--tokenizer={source}"])
    meta, ids = load_all("mine")
    assert (ids == library.token_to_id(end or "\u010a")).sum() == 2  # a newline, in the alphabet of bytes
    assert meta.get("end") == end


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_file(folder):
    os.mkfifo("pipe")
    with pytest.raises(ConfigError, match=r"^--input: there is no file, .* pipe$"):
        prepare.main(["--dataset=mine", "--input=pipe"])


def test_a_text_that_ends_inside_a_character_is_refused(folder):
    (folder / "my.txt").write_bytes("Grüße ❤".encode()[:-1])
    with pytest.raises(UserError, match="is not UTF-8 text: byte 8 is 0xe2"):
        prepare.main(["--dataset=mine", "--input=my.txt"])


def test_a_byte_order_mark_is_no_character(folder):
    (folder / "my.txt").write_bytes(b"\xef\xbb\xbf" + ("abc\ufeff" * 100).encode())
    prepare.main(["--dataset=mine", "--input=my.txt"])
    assert decoded("mine") == "abc\ufeff" * 100  # elsewhere it is one


@pytest.mark.parametrize(("text", "argv"), [("a", []), ("abc" * 1000, ["--val_fraction=0.9999"])])
def test_a_split_without_a_token_is_refused(folder, text, argv):
    (folder / "my.txt").write_text(text)
    with pytest.raises(UserError, match=r"^my.txt is too short for --val_fraction=0.\d+: a split has no token$"):
        prepare.main(["--dataset=mine", "--input=my.txt", *argv])
    assert files(folder) == []


def test_tokens_without_meta_json_say_what_is_missing(folder):
    (folder / "data/nano").mkdir(parents=True)
    (folder / "data/nano/train.bin").write_bytes(bytes(100))
    with pytest.raises(
        ConfigError, match=r'^data/nano has tokens but no meta.json.*{"tokenizer": "gpt2", "vocab_size"'
    ):
        prepare.main(["--dataset=nano"])


def test_the_folder_of_a_tokenizer_json_will_do(folder):
    (folder / "hf").mkdir()
    CharTokenizer("abc").to_library().save("hf/tokenizer.json")
    (folder / "my.txt").write_text("abc" * 100)
    prepare.main(["--dataset=mine", "--input=my.txt", "--tokenizer=hf"])
    assert decoded("mine") == "abc" * 100


def test_a_home_folder_is_meant_by_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "my.txt").write_text("abc" * 100)
    prepare.main(["--dataset=mine", "--input=~/my.txt"])
    assert decoded("mine") == "abc" * 100


def test_an_empty_text_is_refused(folder):
    (folder / "my.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"^my.txt is too short"):
        prepare.main(["--dataset=mine", "--input=my.txt"])


def test_preparing_again_replaces_all_and_a_bad_text_leaves_the_old_tokens(folder):
    (folder / "my.txt").write_text("abc" * 100)
    prepare.main(["--dataset=mine", "--input=my.txt"])
    (folder / "my.txt").write_text("xyz" * 50)
    prepare.main(["--dataset=mine", "--input=my.txt"])
    assert decoded("mine") == "xyz" * 50
    (folder / "my.txt").write_bytes(b"\xff")
    with pytest.raises(UserError):
        prepare.main(["--dataset=mine", "--input=my.txt"])
    assert decoded("mine") == "xyz" * 50


def test_a_text_that_cannot_be_prepared_leaves_the_dataset_as_it_was(folder):
    (folder / "my.txt").write_text("abc" * 100)
    prepare.main(["--dataset=mine", "--input=my.txt"])
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    (folder / "bad.txt").write_bytes(b"\xff")
    for mistake in ("--input=bad.txt", "--tokenizer=none.json"):
        with pytest.raises(UserError):
            prepare.main(["--dataset=mine", "--input=my.txt", mistake])
        assert {name: (folder / name).read_bytes() for name in files(folder)} == before


def test_bpe_of_a_text_without_blanks_still_has_many_tokens(folder):
    (folder / "my.txt").write_text("春眠不覺曉處處聞啼鳥" * 2000)
    prepare.main(["--dataset=mine", "--input=my.txt", "--tokenizer=bpe"])
    assert load_meta("mine")["train_tokens"] > 1500
    assert decoded("mine") == "春眠不覺曉處處聞啼鳥" * 2000


def test_a_folder_with_meta_json_is_complete(folder, monkeypatch):
    (folder / "my.txt").write_text("abc" * 100)
    prepare.main(["--dataset=mine", "--input=my.txt"])
    original = prepare.tokenize
    monkeypatch.setattr(prepare, "tokenize", lambda *_: original(*_) / 0)  # dies between the tokens and meta.json
    with pytest.raises(TypeError):
        prepare.main(["--dataset=mine", "--input=my.txt"])
    assert "data/mine/meta.json" not in files(folder)


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_never_leaves_tokens_of_one_text_beside_another(folder, monkeypatch, moment):
    """Four files take their names, input.txt first: killed before each of them."""
    (folder / "my.txt").write_text("abc" * 100)
    prepare.main(["--dataset=mine", "--input=my.txt"])
    (folder / "my.txt").write_text("cba" * 200)
    names, replace = [], os.replace

    def killed(beside, path):
        if len(names) == moment:
            raise KeyboardInterrupt
        names.append(path.name)
        replace(beside, path)

    monkeypatch.setattr(prepare.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare.main(["--dataset=mine", "--input=my.txt"])
    assert names == ["input.txt", "val.bin", "train.bin"][:moment]
    if moment == 0:
        assert decoded("mine") == "abc" * 100
    else:
        assert not (folder / "data/mine/meta.json").exists()  # from input.txt it is prepared anew
        assert (folder / "data/mine/input.txt").read_text() == "cba" * 200


def test_the_folders_own_text_may_be_the_input(folder):
    (folder / "data/mine").mkdir(parents=True)
    (folder / "data/mine/input.txt").write_text("abc" * 100)
    prepare.main(["--dataset=mine"])
    prepare.main(["--dataset=mine", "--input=data/mine/input.txt"])
    assert decoded("mine") == "abc" * 100


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(folder):
    (folder / "file").write_text("old")
    with contextlib.suppress(RuntimeError), prepare.replacing(folder / "file") as file:
        file.write(b"new")
        raise RuntimeError
    assert (folder / "file").read_text() == "old"
    assert not (folder / "file.tmp").exists()


def test_a_file_is_on_disk_before_it_takes_its_name(folder, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(prepare.os, "fsync", lambda fd: order.append((Path("file.tmp").read_bytes(), fsync(fd))))
    monkeypatch.setattr(prepare.os, "replace", lambda *paths: order.append(replace(*paths)))
    with prepare.replacing(Path("file")) as file:
        file.write(b"new")
    assert order == [(b"new", None), None]
    assert Path("file").read_bytes() == b"new"


def test_the_tokens_of_a_model_prepare_a_text_to_train_it_further(dataset):
    train_here(max_iters=1)
    vocabulary = load_meta("shakespeare_char")["chars"]
    Path("mine.txt").write_text(vocabulary[::-1] * 100)
    for source in ("out", "out/ckpt.pt", "data/shakespeare_char/meta.json"):
        prepare.main(["--dataset=mine", "--input=mine.txt", f"--tokenizer={source}"])
        assert load_meta("mine")["chars"] == vocabulary
        assert decoded("mine") == vocabulary[::-1] * 100
    train_here(dataset="mine", init_from="out", out_dir="fine", max_iters=1)
    lines = "import sys, prepare; prepare.main(['--dataset=mine']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", lines], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True)


class Hostile:
    def __reduce__(self):
        return (open, ("code_was_run", "w"))


@pytest.mark.parametrize("content", [b"no checkpoint", b"", {"model": 1}, {"tokenizer": Hostile()}])
def test_a_checkpoint_without_a_usable_tokenizer_is_named_and_runs_no_code(folder, content):
    if isinstance(content, bytes):
        Path("ckpt.pt").write_bytes(content)
    else:
        torch.save(content, "ckpt.pt")
    with pytest.raises(ConfigError, match=r"^--tokenizer=ckpt.pt is not usable \("):
        prepare.main(["--tokenizer=ckpt.pt"])
    assert not Path("code_was_run").exists()


@pytest.mark.parametrize("piece", [7, 2**20])
def test_characters_that_a_vocabulary_lacks_are_counted_and_can_be_left_out(folder, monkeypatch, capsys, piece):
    monkeypatch.setattr(prepare, "PIECE", piece)
    (folder / "known.txt").write_text("abc d" * 100)
    prepare.main(["--dataset=known", "--input=known.txt"])
    (folder / "my.txt").write_text("a😀b \u0301c" * 300 + "xyz")
    argv = ["--dataset=mine", "--input=my.txt", "--tokenizer=data/known/meta.json"]
    counts = "'\u0301' (300), '😀' (300), 'x' (1), 'y' (1), 'z' (1)"
    lacks = f"my.txt has characters that the vocabulary lacks: {counts}"
    with pytest.raises(UserError) as error:
        prepare.main(argv)
    assert str(error.value) == f"{lacks}; --drop_unknown leaves them out"
    capsys.readouterr()
    prepare.main([*argv, "--drop_unknown"])
    assert capsys.readouterr().out.startswith(f"{lacks}; left out\n")
    meta = load_meta("mine")
    assert decoded("mine") == "ab c" * 300
    assert (meta["train_tokens"], meta["val_tokens"], meta["val_bytes"]) == (1080, 120, 120)


def test_the_most_frequent_of_many_unknown_characters_are_named(folder):
    (folder / "known.txt").write_text("abc d" * 100)
    prepare.main(["--dataset=known", "--input=known.txt"])
    (folder / "my.txt").write_text("abc" + "".join(char * n for n, char in enumerate("efghijklmnop", 1)) + "q" * 382)
    names = ", ".join(f"'{char}' ({n})" for char, n in zip("qponmlkj", (382, *range(12, 5, -1)), strict=True))
    with pytest.raises(UserError, match=re.escape(f"lacks: {names} and 5 more; --drop_unknown leaves them out")):
        prepare.main(["--dataset=mine", "--input=my.txt", "--tokenizer=data/known/meta.json"])


@pytest.mark.parametrize("argument", ["--input=my.txt", "--url=http://127.0.0.1:9"])
def test_a_text_of_ones_own_wants_a_dataset_that_was_typed(folder, argument):
    (folder / "my.txt").write_text("abc" * 100)
    with pytest.raises(ConfigError, match=r"needs a name, --dataset=NAME: shakespeare_char is Tiny Shakespeare$"):
        prepare.main([argument])
    assert files(folder) == []


def test_a_text_in_the_place_of_shakespeare_is_told_with_where_it_came_from(folder, capsys):
    (folder / "my.txt").write_text("abc" * 100)
    for argv in (["--dataset=shakespeare_char", "--input=my.txt"], []):
        prepare.main(argv)
        assert capsys.readouterr().out == (
            "data/shakespeare_char, from my.txt: 3 different characters, 270 train tokens, 30 validation tokens\n"
        )


# Mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset=mine"], "there is no data/mine/input.txt: python prepare.py --dataset=mine --input=FILE"),
        (
            ["--dataset=mine", "--input=nowhere.txt"],
            "--input: there is no file, or folder with .txt files, nowhere.txt",
        ),
        (["--dataset=mine", "--input=config"], "--input: there is no file, or folder with .txt files, config"),
        (["--dataset=../up"], "dataset must be a plain folder name"),
        (["--dataset=/tmp"], "dataset must be a plain folder name"),
        (["--dataset=.."], "dataset must be a plain folder name"),
        (["--dataset="], "dataset must be a plain folder name"),
        (["--val_fraction=0"], "--val_fraction must be a number, above 0 and below 1, found '0'"),
        (["--val_fraction=1.5"], "--val_fraction must be a number, above 0 and below 1, found '1.5'"),
        (["--val_fraction=nan"], "--val_fraction must be a number, above 0 and below 1, found 'nan'"),
        (["--tokenizer=morse"], "there is no tokenizer morse: take char, bpe, gpt2, a tokenizer.json, its folder or"),
        (["--tokenizer=config"], "there is no tokenizer config: take char, bpe, gpt2, a tokenizer.json"),
        (["--vocab_size=300"], "vocab_size needs --tokenizer=bpe, found char"),
        (
            ["--tokenizer=bpe", "--vocab_size=255"],
            "--vocab_size must be a whole number or None, at least 256 and at most 65536, found",
        ),
        (["--input=a", "--url=b"], "give --input or --url, not both"),
    ],
)
def test_mistakes_in_the_command(folder, argv, message):
    with pytest.raises(ConfigError) as error:
        prepare.main(argv)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "train.bin",
            lambda data: data[:-1],
            "train.bin is damaged (ValueError: Size of available data is not a mult",
        ),
        (
            "val.bin",
            lambda data: data[:-2],
            "val.bin is damaged (ValueError: it holds 1999 tokens, meta.json promises 2000",
        ),
        ("meta.json", lambda data: data[:9], "meta.json is damaged (JSONDecodeError"),
        ("meta.json", lambda data: b"[]", "meta.json is damaged (TypeError"),
        ("meta.json", lambda data: b"{}", "meta.json is damaged (KeyError: 'tokenizer')"),
        (
            "meta.json",
            lambda data: data.replace(b'"chars": "', b'"chars": "?'),
            "meta.json is damaged (ValueError: chars",
        ),
        (
            "meta.json",
            lambda data: data.replace(b'"chars": " ', b'"chars": "\\ud800'),
            "meta.json is damaged (UnicodeEncodeError",
        ),
        (
            "meta.json",
            lambda data: b'{"tokenizer": "gpt2"}',
            "meta.json is damaged (KeyError: 'vocab_size')",
        ),
        (
            "meta.json",
            lambda data: b'{"tokenizer": "x", "vocab_size": 65537}',
            "meta.json is damaged (ValueError: vocab",
        ),
    ],
)
def test_damaged_datasets_are_refused_with_the_files_name(dataset, name, damage, message):
    path = dataset / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        load_all("shakespeare_char")
    assert message in str(error.value)


# Downloads


def test_a_download_is_prepared(folder, server):
    server.answers = [ok(TEXT.encode())]
    prepare.main(["--dataset=mine", f"--url={server.url}"])
    assert decoded("mine") == TEXT
    assert load_meta("mine")["source"] == server.url


def test_tiny_shakespeare_is_downloaded_once_and_its_hash_checked(folder, server, monkeypatch):
    server.answers = [ok(TEXT.encode())]
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", server.url)
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    prepare.main([])
    prepare.main([])
    assert server.requests == 1
    assert decoded("shakespeare_char") == TEXT


def slow_clock(monkeypatch):
    """Ten seconds pass between any two looks at the clock."""
    monkeypatch.setattr(prepare.time, "monotonic", itertools.count(0, 10).__next__)
    monkeypatch.setattr(prepare.progress, "shown", -math.inf)


def test_a_download_says_what_it_does_before_it_tries(folder, server, waits, capsys):
    server.server_close()
    with pytest.raises(UserError, match="cannot download"):
        prepare.main(["--dataset=mine", f"--url={server.url}"])
    assert capsys.readouterr().out == f"downloading {server.url}\n"


def test_long_work_shows_megabytes(folder, server, capsys, monkeypatch):
    """In a pipe a line every few seconds, on a terminal one that is rewritten."""
    server.answers = [ok(b"text" * 600_000)]
    prepare.main(["--dataset=mine", f"--url={server.url}"])
    assert capsys.readouterr().err == ""  # it was short
    monkeypatch.setattr(prepare, "LONG", 1000)
    slow_clock(monkeypatch)
    prepare.main(["--dataset=mine", f"--url={server.url}"])
    lines = capsys.readouterr().err.splitlines()
    assert {"downloading data/mine/input.txt: 2 of 2 MB", "reading data/mine/input.txt: 1 of 2 MB"} <= {*lines}
    server.answers = [(200, {}, b"text" * 600_000)]
    prepare.main(["--dataset=mine", f"--url={server.url}"])
    assert "downloading data/mine/input.txt: 2 MB" in capsys.readouterr().err.splitlines()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    prepare.main(["--dataset=mine", f"--url={server.url}"])
    err = capsys.readouterr().err
    assert "\r\033[Kdownloading data/mine/input.txt: 2 MB" in err
    assert "\n" not in err


@pytest.mark.parametrize("status", [429, 500, 503])
def test_overload_is_tried_again_with_growing_pauses(folder, server, waits, status):
    server.answers = [(status, {}, b""), (status, {}, b""), ok(b"text" * 100)]
    prepare.main(["--dataset=mine", f"--url={server.url}"])
    assert waits == [1, 2]
    assert decoded("mine") == "text" * 100


def test_a_redirect_is_followed(folder, server):
    server.answers = [(302, {"Location": server.url + "/elsewhere", "Content-Length": "0"}, b""), ok(TEXT.encode())]
    prepare.main(["--dataset=mine", f"--url={server.url}"])
    assert decoded("mine") == TEXT
    assert server.requests == 2


def test_no_more_than_the_promised_bytes_are_taken(folder, server):
    server.answers = [(200, {"Content-Length": "400"}, b"a" * 400 + b"b" * 400)]
    prepare.main(["--dataset=mine", f"--url={server.url}"])
    assert decoded("mine") == "a" * 400


def test_a_server_that_sends_half_and_hangs_is_tried_again(folder, server, waits, monkeypatch):
    monkeypatch.setattr(prepare, "TIMEOUT", (1, 0.2))
    released = threading.Event()

    def half(handler):
        server.requests += 1
        handler.send_response(200)
        handler.send_header("Content-Length", "400")
        handler.end_headers()
        handler.wfile.write(b"a" * 200)
        if server.requests > 1:
            handler.wfile.write(b"a" * 200)
        else:
            released.wait(10)

    server.RequestHandlerClass.do_GET = half
    prepare.main(["--dataset=mine", f"--url={server.url}"])
    released.set()
    assert (server.requests, waits) == (2, [1])
    assert decoded("mine") == "a" * 400


def test_a_body_that_breaks_off_is_tried_again(folder, server, waits):
    server.answers = [(200, {"Content-Length": "400"}, b"text" * 50), ok(b"text" * 100)]
    prepare.main(["--dataset=mine", f"--url={server.url}"])
    assert decoded("mine") == "text" * 100


def answer(*answers):
    return lambda server: setattr(server, "answers", list(answers))


@pytest.mark.parametrize(
    ("behaviour", "problem", "attempts"),
    [
        (answer((404, {}, b"")), "the server answered 404 Not Found", 1),
        (answer((503, {}, b"")), "the server answered 503 Service Unavailable", 4),
        (answer((200, {"Content-Length": "400"}, b"half")), "the connection failed (Chunked", 4),
        (answer(ok(b"another text")), "wrong content, 12 bytes of sha256 ", 1),
    ],
)
def test_a_failed_download_says_why_and_what_to_do_and_leaves_nothing(
    folder, server, waits, monkeypatch, behaviour, problem, attempts
):
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", server.url)
    behaviour(server)
    with pytest.raises(UserError) as error:
        prepare.main([])
    message = str(error.value)
    assert message.startswith(f"cannot download {server.url}: {problem}")
    assert message.endswith(
        "; put the text at data/shakespeare_char/input.txt, or train without a network: "
        "python train.py config/stdlib_char.py"
    )
    assert server.requests == attempts
    assert files(folder) == []


def test_nobody_at_the_address_is_tried_again(folder, server, waits):
    server.server_close()
    with pytest.raises(UserError, match=r"the connection failed \(ConnectionError\)"):
        prepare.main(["--dataset=mine", f"--url={server.url}"])
    assert waits == [1, 2, 4]


def test_a_failed_download_is_one_line_and_status_1(folder, server):
    server.answers = [(404, {}, b"")]
    ended = command("prepare.py", "--dataset=mine", f"--url={server.url}")
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"prepare.py: cannot download {server.url}: the server answered 404 Not Found")
    assert ended.stderr.count("\n") == 1


def test_a_silent_server_is_given_up(folder, server, waits, monkeypatch):
    monkeypatch.setattr(prepare, "TIMEOUT", (1, 0.2))
    released = threading.Event()
    server.RequestHandlerClass.do_GET = lambda handler: released.wait(10)
    with pytest.raises(UserError, match=r"the connection failed \(ReadTimeout\)"):
        prepare.main(["--dataset=mine", f"--url={server.url}"])
    released.set()


@pytest.mark.parametrize("url", ["nonsense", "http://[x", "http://a..b/", "ftp://127.0.0.1/text"])
def test_an_invalid_url_is_refused_at_once(folder, waits, url):
    with pytest.raises(UserError, match=re.escape(f"cannot download {url}: ")):
        prepare.main(["--dataset=mine", f"--url={url}"])
    assert waits == []


# FineWeb


def fineweb(n_shards):
    prepare.main(["--dataset=fineweb", f"--shards={n_shards}"])


def check_fineweb(n_shards):
    """The dataset is that of so many shards."""
    meta = load_meta("fineweb")
    assert meta["shards"] == n_shards
    train, val = (Tokens("fineweb", split, meta, 8).ids for split in ("train", "val"))
    assert np.array_equal(train, np.concatenate([SHARD_TOKENS[number] for number in range(1, n_shards + 1)]))
    assert np.array_equal(val, SHARD_TOKENS[0])
    return meta


def test_an_empty_address_of_the_hub_is_none(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert prepare.hub() == "https://huggingface.co"


def test_fineweb_is_its_shards_one_after_another(hub, capsys):
    fineweb(3)
    meta = check_fineweb(3)
    assert (meta["tokenizer"], meta["vocab_size"], meta["train_tokens"]) == ("gpt2", 50257, 501 + 502 + 503)
    assert hub.asked == [0, 1, 2, 3]
    assert files(Path.cwd()) == [
        f"data/fineweb/{name}" for name in ("meta.json", "shards.json", "train.bin", "val.bin")
    ]
    first, *downloads, last = capsys.readouterr().out.splitlines()
    assert first == "data/fineweb: 3 of FineWeb's 103 shards, 0.8 GB to download"
    assert [line.rpartition("_")[2] for line in downloads] == [f"00000{number}.bin" for number in range(4)]
    source = "huggingface.co/datasets/kjj0/fineweb10B-gpt2"
    assert last == f"data/fineweb, from {source}: 50,257 different tokens, 1,506 train tokens, 500 validation tokens"


def test_all_shards_of_fineweb_are_the_default_and_their_size_is_said_first(hub, capsys):
    hub.bodies |= {number: shard(SHARD_TOKENS[1]) for number in range(5, 104)}
    prepare.main(["--dataset=fineweb"])
    assert hub.asked == [*range(104)]
    assert load_meta("fineweb")["shards"] == 103
    assert capsys.readouterr().out.startswith("data/fineweb: 103 of FineWeb's 103 shards, 20.8 GB to download\n")


def test_a_shard_that_breaks_off_is_downloaded_again(hub, waits, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 100)
    hub.broken = (1, 2)
    fineweb(2)
    check_fineweb(2)
    assert waits == [1, 2] * 3


def test_an_interrupted_download_of_fineweb_resumes_after_the_last_whole_shard(hub, waits):
    hub.bodies[3] = b""
    with pytest.raises(UserError, match=r"000003.bin: the server answered 500 .*; the same command tries again, from"):
        fineweb(4)
    assert not Path("data/fineweb/meta.json").exists()
    hub.bodies[3] = shard(SHARD_TOKENS[3])
    hub.asked.clear()
    fineweb(4)
    check_fineweb(4)
    assert hub.asked == [3, 4]


@pytest.mark.parametrize("moment", range(16))
def test_a_kill_while_fineweb_grows_leaves_the_smaller_dataset_whole(hub, monkeypatch, moment):
    """The process ends at a write to disk, whichever it is; `os.fsync` and `os.replace` come in turn."""
    fineweb(1)
    inode = Path("data/fineweb/train.bin").stat().st_ino
    steps = itertools.count()

    def dying(original):
        def step(*arguments):
            if next(steps) == moment:
                raise SystemExit
            return original(*arguments)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(prepare.Path, "unlink", lambda *_, **__: None)  # nobody tidies up after a kill
        patch.setattr(prepare.os, "fsync", dying(os.fsync))
        patch.setattr(prepare.os, "replace", dying(os.replace))
        with contextlib.suppress(SystemExit):
            fineweb(3)
    died = next(steps) > moment
    assert died == (moment < 14)
    check_fineweb(1 if died else 3)
    hub.asked.clear()
    fineweb(3)
    check_fineweb(3)
    assert len(hub.asked) <= 2
    assert 1 not in hub.asked
    assert Path("data/fineweb/train.bin").stat().st_ino == inode  # no second copy


def test_a_train_bin_that_is_shorter_than_its_shards_is_refused(hub):
    fineweb(3)
    os.truncate("data/fineweb/train.bin", 2 * 501 + 7)
    with pytest.raises(
        UserError, match=r"shards.json is damaged \(ValueError: .*; remove it and data/fineweb/train.bin$"
    ):
        fineweb(3)
    Path("data/fineweb/train.bin").unlink()
    fineweb(3)
    check_fineweb(3)


def test_what_a_killed_download_has_left_of_a_shard_is_dropped(hub):
    fineweb(1)
    with open("data/fineweb/train.bin", "ab") as file:
        file.write(b"half a token an" * 7)
    check_fineweb(1)
    fineweb(2)
    check_fineweb(2)


def test_fewer_shards_of_fineweb_need_no_download(hub):
    fineweb(3)
    hub.asked.clear()
    fineweb(2)
    check_fineweb(2)
    fineweb(3)
    check_fineweb(3)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (shard(SHARD_TOKENS[2], magic=20240801), "its header says 20240801, 1, 502; expected (20240520, 1, 502.0)"),
        (shard(SHARD_TOKENS[2], version=2), "its header says 20240520, 2, 502; expected (20240520, 1, 502.0)"),
        (shard(SHARD_TOKENS[2], n_tokens=501), "its header says 20240520, 1, 501; expected (20240520, 1, 502.0)"),
        (shard(SHARD_TOKENS[2])[:-1], "its header says 20240520, 1, 502; expected (20240520, 1, 501.5)"),
        (shard(SHARD_TOKENS[2])[:1023], "ValueError: "),
        (shard(np.array([1, 50257], "<u2")), "it has token id 50257"),
    ],
)
def test_a_damaged_shard_is_refused_and_never_trained_on(hub, body, problem):
    hub.bodies[2] = body
    with pytest.raises(UserError) as error:
        fineweb(2)
    assert re.match(r"http://127.*/fineweb_train_000002.bin is damaged \(ValueError: ", str(error.value))
    assert problem in str(error.value)
    assert files(Path.cwd()) == [f"data/fineweb/{name}" for name in ("shards.json", "train.bin", "val.bin")]
    hub.bodies[2] = shard(SHARD_TOKENS[2])
    fineweb(2)
    check_fineweb(2)


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the system")
def test_a_disk_that_fills_while_fineweb_grows_is_one_line_and_costs_nothing(hub):
    import resource

    fineweb(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))  # bytes of the largest file
    try:
        with pytest.raises(OSError, match=r"File too large"):
            fineweb(4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_fineweb(1)
    fineweb(4)
    check_fineweb(4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the system to tell a process's memory")
def test_a_shard_of_400_mb_takes_little_memory(hub):
    hub.bodies[1] = shard(np.tile(np.arange(50_000, dtype="<u2"), 4000))
    lines = "import prepare; prepare.main(['--dataset=fineweb', '--shards=1'])"
    lines += "; print(open('/proc/self/status').read())"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run([sys.executable, "-c", lines], env=environment, capture_output=True, text=True, check=True)
    assert load_meta("fineweb")["train_tokens"] == 200_000_000
    [peak] = re.findall(r"VmHWM:\s*(\d+) kB", ended.stdout)
    assert int(peak) < 200_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset=fineweb", "--input=mine.txt"], "fineweb is ready made: only --shards can be chosen"),
        (["--dataset=fineweb", "--tokenizer=char"], "fineweb is ready made"),
        (["--dataset=fineweb", "--val_fraction=0.2"], "fineweb is ready made"),
        (["--dataset=mine", "--shards=2"], "shards needs --dataset=fineweb, found mine"),
        (
            ["--dataset=fineweb", "--shards=104"],
            "--shards must be a whole number or None, at least 1 and at most 103, found '104'",
        ),
    ],
)
def test_what_fineweb_does_not_take_is_refused(folder, argv, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepare.main(argv)


def test_tokens_of_another_origin_are_not_overwritten_by_fineweb(hub):
    Path("data/fineweb").mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        path = Path("data/fineweb", name)
        path.write_bytes(b"mine")
        with pytest.raises(
            UserError, match=r"data/fineweb has tokens but no shards.json, .* move .*train.bin and .*val"
        ):
            fineweb(1)
        assert path.read_bytes() == b"mine"
        path.unlink()


@pytest.mark.parametrize("content", ["[5", "{}", "[-5]", "[1.5]", "[0, 0]", "[true]"])
def test_a_damaged_record_of_shards_is_named(hub, content):
    fineweb(1)
    before = Path("data/fineweb/train.bin").read_bytes()
    Path("data/fineweb/shards.json").write_text(content)
    with pytest.raises(UserError, match=r"data/fineweb/shards.json is damaged \(\w+Error: .*; remove it and "):
        fineweb(1)
    assert Path("data/fineweb/train.bin").read_bytes() == before


@pytest.mark.parametrize(("name", "asked"), [("val.bin", [0]), ("train.bin", [1, 2])])
def test_a_damaged_split_of_fineweb_that_is_removed_is_downloaded_again(hub, name, asked):
    fineweb(2)
    os.truncate(f"data/fineweb/{name}", 400)
    with pytest.raises(UserError, match=rf"{name} is damaged .*; remove it, and prepare.py makes it anew$"):
        check_fineweb(2)
    Path("data/fineweb", name).unlink()
    hub.asked.clear()
    fineweb(2)
    check_fineweb(2)
    assert hub.asked == asked


# The standard library


@pytest.fixture(scope="session")
def stdlib_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("stdlib") / "input.txt"
    prepare.collect_stdlib(path)
    return path.read_bytes()


def test_the_standard_library_is_a_text_without_network(stdlib_text):
    early, late = (Path(module.__file__).read_bytes() for module in (json, os))
    assert stdlib_text.isascii()
    assert 0 < stdlib_text.index(early) < stdlib_text.index(late)  # sorted by name
    assert b"class PytestPluginManager" not in stdlib_text  # no site-packages
    assert stdlib_text.count(b"(unittest.TestCase)") < 20  # no tests


def test_the_same_interpreter_gives_the_same_text(stdlib_text, tmp_path):
    prepare.collect_stdlib(tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_bytes() == stdlib_text


def test_stdlib_char_is_prepared_by_its_name(folder):
    prepare.main(["--dataset=stdlib_char"])
    meta = load_meta("stdlib_char")
    assert meta["source"] == f"the standard library of Python {sys.version.split()[0]}"
    assert meta["vocab_size"] < 128
