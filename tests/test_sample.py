import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, checkpoint, command, train_here

import prepare
import sample
from config import ConfigError, UserError
from model import GPT, open_model
from prepare import CharTokenizer


@pytest.fixture
def trained(dataset, capsys):
    """A folder with out/best.pt and out/ckpt.pt, and no data any more."""
    train_here()
    for path in dataset.iterdir():
        path.unlink()
    capsys.readouterr()
    return dataset.parent.parent


def say(capsys, *arguments):
    sample.main(["--max_new_tokens=40", *arguments])
    return capsys.readouterr().out


def test_a_sample_is_the_prompt_and_its_continuation(trained, capsys):
    text = say(capsys, "--start=the king")
    assert text.startswith("the king")
    assert len(text) == len("the king") + 40 + 1
    assert text.endswith("\n")
    assert set(text) <= set(checkpoint()["tokenizer"]["chars"]) | {"\n"}


def test_the_text_is_what_generate_says(trained, capsys):
    content = checkpoint("out/best.pt")
    model, tokenizer = open_model("out/best.pt")[0], CharTokenizer(content["tokenizer"]["chars"])
    idx = torch.tensor([tokenizer.encode("the king").tolist()])
    chance = torch.Generator().manual_seed(7)
    expected = model.generate(idx.repeat(3, 1), 40, temperature=0.9, top_k=5, top_p=0.95, generator=chance)
    text = say(
        capsys, "--start=the king", "--num_samples=3", "--temperature=0.9", "--top_k=5", "--top_p=0.95", "--seed=7"
    )
    assert text == "\n---------------\n".join(tokenizer.decode(row.numpy()) for row in expected) + "\n"


@pytest.mark.parametrize("choice", [{"top_p": 0.3}, {"top_k": 2}, {"temperature": 0.3}])
def test_each_choice_alone_changes_the_text_as_generate_does(trained, capsys, choice):
    model, tokenizer = sample.load("out")
    idx = torch.tensor([tokenizer.encode("the king").tolist()])
    texts = [
        tokenizer.decode(model.generate(idx, 40, **given, generator=torch.Generator().manual_seed(1337))[0].numpy())
        for given in ({"temperature": 0.8}, {"temperature": 0.8} | choice)
    ]
    assert texts[0] != texts[1]
    assert say(capsys, "--start=the king", *(f"--{name}={value}" for name, value in choice.items())) == texts[1] + "\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_samples_and_the_same_seed_gives_the_same_text(trained, capsys, monkeypatch, dtype):
    used, hidden = set(), GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda *inputs: used.add(str((x := hidden(*inputs)).dtype)) or x)
    texts = [say(capsys, "--start=the king", f"--dtype={dtype}") for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == len("the king") + 40 + 1
    assert used == {f"torch.{dtype}"}


def test_the_same_seed_gives_the_same_text(trained, capsys):
    assert (
        say(capsys, "--start=a", "--seed=1")
        == say(capsys, "--start=a", "--seed=1")
        != say(capsys, "--start=a", "--seed=2")
    )


def test_temperature_0_is_greedy_whatever_the_seed(trained, capsys):
    greedy = say(capsys, "--start=a", "--temperature=0", "--seed=1")
    assert greedy == say(capsys, "--start=a", "--temperature=0", "--seed=2")
    assert greedy == say(capsys, "--start=a", "--top_k=1", "--seed=3")


def test_all_samples_of_a_call_are_one_batch(trained, capsys, monkeypatch):
    batches = []
    original = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, *rest: batches.append(len(idx)) or original(self, idx, *rest))
    text = say(capsys, "--start=a", "--num_samples=4")
    assert set(batches) == {4}
    assert len(set(text.removesuffix("\n").split("\n---------------\n"))) == 4


def test_one_sample_appears_as_it_is_made(trained, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("builtins.print", lambda *text, file=None, **_: file or shown.append("".join(text)))
    sample.main(["--start=the", "--max_new_tokens=5"])
    assert shown[:3] == ["t", "h", "e"]
    assert [len(text) for text in shown[3:]] == [1, 1, 1, 1, 1, 0]


def test_the_prompt_may_come_from_a_file_and_be_longer_than_the_context(trained, capsys):
    (trained / "prompt.txt").write_text("the king and queen of this fair land")
    text = say(capsys, "--start=FILE:prompt.txt")
    assert text == say(capsys, "--start=the king and queen of this fair land")
    assert text.startswith("the king and queen of this fair land")
    (trained / "prompt.txt").write_text("\ufeffthe king and queen of this fair land")  # as Windows' editors save it
    assert text == say(capsys, "--start=FILE:prompt.txt")


def test_a_line_break_may_be_typed_as_backslash_n(folder, capsys):
    Path("mine.txt").write_text("the king\n" * 500)
    prepare.main(["--dataset=mine", "--input=mine.txt"])
    train_here(dataset="mine", max_iters=1)
    capsys.readouterr()
    assert say(capsys, r"--start=the\nking").startswith("the\nking")
    for typed, meant in (
        (r"\n", "\n"),
        (r"\\n", r"\n"),
        (r"\\\n", "\\\n"),
        (r"\t \d", r"\t \d"),
        (r"\\alpha", r"\alpha"),
    ):
        assert [*sample.prompt(typed, CharTokenizer("\n \\adhlnpt"))[0]] == [*map("\n \\adhlnpt".index, meant)]
    Path("prompt.txt").write_text(r"the\nking")  # a file has line breaks of its own
    with pytest.raises(ConfigError, match=r"^--start: character '\\\\' at position 3 is not in the vocabulary$"):
        sample.main(["--start=FILE:prompt.txt"])


def test_the_file_and_the_step_that_are_read_are_told_on_stderr(trained, capsys):
    sample.main(["--max_new_tokens=1"])
    assert capsys.readouterr().err == "out/best.pt, step 20, on cpu, float32\n"
    Path("out/best.pt").unlink()
    sample.main(["--max_new_tokens=1"])
    assert capsys.readouterr().err == "out/ckpt.pt, step 20, on cpu, float32\n"


def test_the_readmes_lines_of_python_write(trained, capsys):
    [lines] = re.findall(r"^```python\n(from sample .*?)^```", (REPOSITORY / "README.md").read_text(), re.M | re.S)
    lines = lines.replace("out/shakespeare_char_cpu", "out").replace("ROMEO:", "the king").replace("200", "40")
    exec(lines)
    text = capsys.readouterr().out
    assert text.startswith("the king")
    assert len(text) == len("the king") + 40 + 1


def test_best_is_preferred_and_ckpt_will_do(trained, capsys):
    best = checkpoint("out/best.pt")
    best["model"] = {name: torch.zeros_like(tensor) for name, tensor in best["model"].items()}
    torch.save(best, "out/best.pt")
    from_zeros = say(capsys, "--start=a")
    (trained / "out" / "best.pt").unlink()
    assert say(capsys, "--start=a") != from_zeros


@pytest.mark.parametrize("model", ["gpt", "bigram"])
def test_samples_go_past_the_context(dataset, capsys, model):
    train_here(model=model, block_size=8, max_iters=1)
    capsys.readouterr()
    sample.main(["--max_new_tokens=100", "--start=a"])
    assert len(capsys.readouterr().out) == 102


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start=king#1"], "--start: character '#' at position 4 is not in the vocabulary"),
        (["--start="], "--start: the model needs at least one token to continue, found an empty text"),
        (["--start=FILE:nowhere"], "--start: [Errno 2] No such file or directory: 'nowhere'"),
        (
            ["--start=FILE:noise"],
            "--start: noise is not UTF-8 text: byte 0 is 0xff; convert it from its encoding, for instance: "
            "iconv -f WINDOWS-1252 -t UTF-8 noise > utf8.txt",
        ),
        (["--out_dir=nowhere"], "there is no checkpoint in nowhere; there is one in out"),
        (["--save_pretrained="], "save_pretrained is empty: it must name a folder"),
        (
            ["--init_from=gtp2"],
            "there is no checkpoint in gtp2; there is one in out",
        ),
        (["--num_samples=0"], "--num_samples must be a whole number, at least 1, found '0'"),
        (["--top_k=0"], "--top_k must be a whole number or None, at least 1, found '0'"),
        (["--top_p=0"], "--top_p must be a number or None, above 0 and at most 1, found '0'"),
        (["--temperature=-1"], "--temperature must be a number, at least 0, found '-1'"),
        (["--temperature=1e-39"], "temperature must be 0 or at least 0.001, found 1e-39"),
        (["--seed=-1"], "--seed must be a whole number, at least 0 and below 9.22337e+18, found '-1'"),
        (["--temprature=1"], "unknown key --temprature, did you mean --temperature?"),
    ],
)
def test_mistakes(trained, arguments, message):
    (trained / "noise").write_bytes(b"\xff")
    with pytest.raises(ConfigError) as error:
        sample.main(arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("tokenizer", "problem"),
    [
        (
            {"tokenizer": "char", "vocab_size": 2, "chars": "ab"},
            "has no usable tokenizer (ValueError: 2 tokens for a",
        ),
        (
            {"tokenizer": "char", "vocab_size": 21, "chars": "ab"},
            "has no usable tokenizer (ValueError: chars must",
        ),
        ({"tokenizer": "char"}, "has no usable tokenizer (KeyError: 'chars'"),
        (None, "has no usable tokenizer (TypeError: "),
    ],
)
def test_a_checkpoint_with_a_wrong_tokenizer_is_refused(trained, tokenizer, problem):
    torch.save(checkpoint("out/best.pt") | {"tokenizer": tokenizer}, "out/best.pt")
    with pytest.raises(UserError) as error:
        sample.main([])
    assert str(error.value).startswith(f"out/best.pt {problem}")


def test_a_checkpoint_from_a_gpu_samples_on_a_cpu(trained, capsys, monkeypatch):
    expected, content = say(capsys, "--start=the"), checkpoint("out/best.pt")
    monkeypatch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")  # as if its tensors lay there
    torch.save(content, "out/best.pt")
    assert say(capsys, "--start=the", "--device=cpu") == expected


def test_samples_alone_are_on_stdout(trained):
    ended = command("sample.py", "--start=the", "--max_new_tokens=10")
    assert ended.returncode == 0
    assert len(ended.stdout) == 14
    assert ended.stderr == "out/best.pt, step 20, on cpu, float32\n"


def test_a_tokenizer_that_is_not_supported_is_named(trained):
    tokenizer = {"tokenizer": "morse", "vocab_size": 21}
    torch.save(checkpoint("out/best.pt") | {"tokenizer": tokenizer}, "out/best.pt")
    with pytest.raises(UserError, match=r"^tokenizer 'morse' is not supported; there are 'char', 'gpt2' and any with"):
        sample.main([])


def test_without_a_prompt_a_vocabulary_without_line_breaks_will_do(trained, capsys):
    assert "\n" not in checkpoint()["tokenizer"]["chars"]
    assert len(say(capsys)) == 1 + 40 + 1


def test_without_any_checkpoint_training_is_named(folder):
    with pytest.raises(ConfigError, match=r"^there is no checkpoint in out; python train\.py makes one$"):
        sample.main([])


def test_any_character_can_be_printed_and_a_closed_pipe_is_quiet(folder):
    (folder / "mine.txt").write_text("❤😀" * 3000)
    prepare.main(["--dataset=mine", "--input=mine.txt"])
    train_here(dataset="mine", max_iters=1)
    ended = command(
        "sample.py",
        "--start=❤",
        "--max_new_tokens=20",
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        encoding="utf-8",
    )
    assert ended.returncode == 0
    assert ended.stdout.startswith("❤")
    argv = [sys.executable, str(REPOSITORY / "sample.py"), "--start=❤", "--max_new_tokens=2000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.read(1)
        running.stdout.close()
        assert running.stderr.read() == b"out/best.pt, step 1, on cpu, float32\n"
        assert running.wait(60) == 141


def test_a_prompt_in_a_home_that_is_unknown_is_one_line(trained, monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(ConfigError, match=r"^--start: Could not determine home directory\.$"):
        sample.main(["--start=FILE:~/p.txt"])
