"""Whatever a stranger's files say, a program reads them or refuses in one line, and runs no code.

Checkpoints, ours, nanoGPT's and Hugging Face's; then datasets; then commands and recipes. FUZZ=5000 looks longer.
"""

import contextlib
import copy
import functools
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import checkpoint, train_here
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
import sample
import train
from config import UserError

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ", 25)),
    deadline=None,
    derandomize="FUZZ" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

plain = st.none() | st.booleans() | st.integers() | st.integers(-2, 70) | st.floats() | st.text(max_size=20)
values = st.recursive(
    plain | st.sampled_from(["char", "gpt", "gpt2", "bigram", 10**9, -1, 0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
tensors = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.integers(0, 40), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]),
)


def refused_or_done(*works):
    """Run them; only errors that end in one line may come."""
    for work in works:
        with contextlib.suppress(UserError, OSError):
            work()


# Checkpoints

SMALL = {"n_layer": 1, "n_embd": 8, "block_size": 8, "batch_size": 2, "max_iters": 2, "eval_interval": 2,
         "eval_iters": 1}  # fmt: skip


@functools.cache
def checkpoint_of_a_run():
    train_here(**SMALL)
    return Path("out/ckpt.pt").read_bytes()


@pytest.fixture
def trained(dataset):
    """Returns what out/ckpt.pt of a run of two steps holds, a new copy at each call; there is no best.pt."""
    content = checkpoint_of_a_run()
    Path("out").mkdir(exist_ok=True)
    Path("out/ckpt.pt").write_bytes(content)
    Path("out/best.pt").unlink(missing_ok=True)
    return lambda: torch.load(io.BytesIO(content), weights_only=True)


def resume():
    train_here(**SMALL | {"max_iters": 3})


def sample_and_resume():
    Path("out/best.pt").unlink(missing_ok=True)
    refused_or_done(lambda: sample.main(["--max_new_tokens=2"]), resume)


def places(tree, path=()):
    """Every path into nested dicts."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield (*path, name)
            yield from places(value, (*path, name))


def changed(tree, path, value, remove):
    tree = copy.deepcopy(tree)
    inner = tree
    for name in path[:-1]:
        inner = inner[name]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return tree


def drawn_change(data, tree, others):
    """The tree with another value, or none, at one of its places."""
    path = data.draw(st.sampled_from(list(places(tree))))
    return changed(tree, path, data.draw(others), data.draw(st.booleans()))


@fuzz
@given(data=st.data())
def test_a_checkpoint_with_other_bytes(trained, data):
    content = bytearray(checkpoint_of_a_run())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    Path("out/ckpt.pt").write_bytes(content)
    sample_and_resume()


@fuzz
@given(data=st.data())
def test_a_checkpoint_with_another_content(trained, data):
    torch.save(drawn_change(data, trained(), values | tensors), "out/ckpt.pt")
    sample_and_resume()


@fuzz
@given(data=st.data())
def test_a_checkpoint_of_nanogpt_with_another_content(trained, data):
    ours = trained()
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    theirs = {
        "model": ours["model"],
        "model_args": {name: ours["model_config"][name] for name in names},
        "iter_num": 5,
        "best_val_loss": torch.tensor(2.0),
        "config": {"dataset": "shakespeare_char"},
    }
    torch.save(drawn_change(data, theirs, values | tensors), "their.pt")
    begin = SMALL | {"init_from": "their.pt", "out_dir": "fine", "max_iters": 1}
    refused_or_done(lambda: sample.main(["--init_from=their.pt", "--max_new_tokens=2"]), lambda: train_here(**begin))
    shutil.rmtree("fine", ignore_errors=True)


@fuzz
@given(data=st.data())
def test_a_checkpoint_with_another_tokenizer_json(trained, data):
    content = trained()
    facts = json.loads(prepare.tokenizer_of(content["tokenizer"]).to_library().to_str())
    facts = drawn_change(data, facts, values | st.floats(allow_nan=False))
    tokenizer = {"tokenizer": "theirs", "vocab_size": 21, "json": json.dumps(facts)}
    torch.save(content | {"tokenizer": tokenizer}, "out/best.pt")
    refused_or_done(lambda: sample.main(["--max_new_tokens=2", "--start=the"]))


@fuzz
@given(data=st.data())
def test_a_folder_of_hugging_face_with_another_config(trained, data):
    if not Path("good.json").exists():
        sample.main(["--save_pretrained=hf"])
        shutil.copy("hf/config.json", "good.json")
    facts = drawn_change(data, json.loads(Path("good.json").read_text()), values)
    Path("hf/config.json").write_text(json.dumps(facts), errors="surrogatepass")
    refused_or_done(lambda: sample.main(["--init_from=hf", "--max_new_tokens=2"]))


def test_a_tokenizer_cannot_pretend_to_be_a_shape(trained):
    content = trained()
    content["tokenizer"] |= {"block_size": "x", "model": [1], "n_layer": 3}
    torch.save(content, "out/ckpt.pt")
    resume()
    assert (checkpoint()["config"]["model"], checkpoint()["config"]["n_layer"]) == ("gpt", 1)


def test_a_bigram_of_many_layers_costs_nothing(dataset, monkeypatch):
    train_here(model="bigram", max_iters=1)
    content = checkpoint("out/best.pt")
    content["model_config"]["n_layer"] = 10**12
    torch.save(content, "out/best.pt")
    monkeypatch.setattr("model.KVCache", lambda max_length: 1 / 0)
    sample.main(["--max_new_tokens=2"])


def test_sizes_that_no_memory_holds_are_refused_before_they_are_tried(trained):
    for name in ("n_layer", "n_embd", "vocab_size", "block_size"):
        torch.save(changed(trained(), ("model_config", name), 2**40, False), "out/best.pt")
        with pytest.raises(UserError, match=r"cannot open out/best.pt"):
            sample.main([])


WTE = "optimizer state transformer.wte.weight"
UNFIT = "(ValueError: its optimizer state does not fit its weights)"


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (f"{WTE}.steps", torch.zeros(1), UNFIT),
        (f"{WTE}.mean", torch.zeros(2, 2), UNFIT),  # a fused kernel would read past its end
        (f"{WTE}.mean", torch.zeros(()), UNFIT),
        (f"{WTE}.square", 1.0, "(AttributeError: "),
        ("optimizer state", {}, UNFIT),
        ("step", -1, "(ValueError: step -1, "),
        ("step", 1.5, "(ValueError: step 1.5, "),
        ("best_val_loss", float("nan"), "(ValueError: step 2, best_val_loss nan"),
        ("config", {}, "(KeyError: 'model')"),
        ("config", {"model": "gpt"}, "holds another model"),
        ("config dataset", "../data/shakespeare_char", "dataset must be a plain folder name"),
        ("tokenizer", [], "(AttributeError: "),
    ],
)
def test_a_checkpoint_that_no_run_has_written_is_refused(trained, place, value, problem):
    torch.save(changed(trained(), place.split(), value, False), "out/ckpt.pt")
    before = Path("out/ckpt.pt").read_bytes()
    with pytest.raises(UserError, match=re.escape(problem)):
        resume()
    assert Path("out/ckpt.pt").read_bytes() == before


# Datasets


@fuzz
@given(data=st.data())
def test_a_dataset_with_another_meta_json(dataset, data):
    path = dataset / "meta.json"
    if not Path("good.json").exists():
        shutil.copy(path, "good.json")
    meta = json.loads(Path("good.json").read_bytes())
    meta = data.draw(values) if data.draw(st.integers(0, 9)) == 0 else drawn_change(data, meta, values)
    path.write_text(json.dumps(meta), errors="surrogatepass")
    refused_or_done(lambda: train_here(**SMALL | {"init_from": "scratch"}))


@fuzz
@given(split=st.sampled_from(["train", "val"]), tokens=st.binary(max_size=200), promised=st.booleans())
def test_a_dataset_with_other_tokens(dataset, split, tokens, promised):
    (dataset / f"{split}.bin").write_bytes(tokens)
    if promised:
        meta = prepare.load_meta("shakespeare_char") | {f"{split}_tokens": len(tokens) // 2}
        (dataset / "meta.json").write_text(json.dumps(meta))
    refused_or_done(lambda: train_here(**SMALL | {"init_from": "scratch"}))


# Commands and recipes


@fuzz
@given(
    words=st.lists(st.text(max_size=12) | st.sampled_from(["config/shakespeare_char.py", "--n_layer"]), max_size=3),
    key=st.sampled_from([*train.TrainConfig.__dataclass_fields__, "nonsense"]),
    value=values,
)
def test_a_command_with_other_words(folder, words, key, value):
    argv = [*words, f"--{key}={value}", "--dataset=none"]
    if any(word.startswith("-h") or word == "--help" for word in words):
        return
    with pytest.raises(UserError):
        train.main(argv)


@fuzz
@given(lines=st.lists(st.tuples(st.sampled_from(["n_layer", "out_dir", "_x", "a b", ""]), values), max_size=4))
def test_a_recipe_with_other_lines(folder, lines):
    Path("recipe.py").write_text("\n".join(f"{name} = {value!r}" for name, value in lines), errors="surrogatepass")
    with pytest.raises(UserError):
        train.main(["recipe.py", "--dataset=none"])
