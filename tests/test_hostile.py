"""Whatever a stranger's files say, a program reads them or refuses in one line. FUZZ=5000 looks longer."""

import contextlib
import copy
import json
import os
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
    max_examples=int(os.environ.get("FUZZ", 30)),
    deadline=None,
    derandomize="FUZZ" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["char", "gpt", "gpt2", "bigram", 10**9, -1, 0]),
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


def sample_and_resume():
    Path("out/best.pt").unlink(missing_ok=True)
    refused_or_done(lambda: sample.main(["--max_new_tokens=2"]), lambda: train_here(max_iters=21))


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


@pytest.fixture
def trained(dataset):
    train_here()
    Path("out/best.pt").unlink()
    return Path("out/ckpt.pt")


@fuzz
@given(data=st.data())
def test_a_checkpoint_with_other_bytes(trained, data):
    good = trained.with_name("good.pt")
    if not good.exists():
        good.write_bytes(trained.read_bytes())
    content = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    trained.write_bytes(content)
    sample_and_resume()


@fuzz
@given(data=st.data())
def test_a_checkpoint_with_another_content(trained, data):
    good = trained.with_name("good.pt")
    if not good.exists():
        good.write_bytes(trained.read_bytes())
    content = checkpoint(good)
    path = data.draw(st.sampled_from(list(places(content))))
    torch.save(changed(content, path, data.draw(values | tensors), data.draw(st.booleans())), trained)
    sample_and_resume()


@fuzz
@given(data=st.data())
def test_a_checkpoint_of_nanogpt_with_another_content(trained, data):
    ours = checkpoint(trained)
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    theirs = {
        "model": ours["model"],
        "model_args": {name: ours["model_config"][name] for name in names},
        "iter_num": 5,
        "best_val_loss": torch.tensor(2.0),
        "config": {"dataset": "shakespeare_char"},
    }
    path = data.draw(st.sampled_from(list(places(theirs))))
    torch.save(changed(theirs, path, data.draw(values | tensors), data.draw(st.booleans())), "their.pt")
    begin = {"init_from": "their.pt", "out_dir": "fine", "max_iters": 1}
    refused_or_done(lambda: sample.main(["--init_from=their.pt", "--max_new_tokens=2"]), lambda: train_here(**begin))
    shutil.rmtree("fine", ignore_errors=True)


@fuzz
@given(data=st.data())
def test_a_checkpoint_with_another_tokenizer_json(trained, data):
    content = checkpoint(trained)
    if "chars" in content["tokenizer"]:
        Path("tokenizer.json").write_text(prepare.tokenizer_of(content["tokenizer"]).to_library().to_str())
    facts = json.loads(Path("tokenizer.json").read_text())
    path = data.draw(st.sampled_from(list(places(facts))))
    facts = changed(facts, path, data.draw(values | st.floats(allow_nan=False)), data.draw(st.booleans()))
    tokenizer = {"tokenizer": "theirs", "vocab_size": 21, "json": json.dumps(facts)}
    torch.save(content | {"tokenizer": tokenizer}, "out/best.pt")
    refused_or_done(lambda: sample.main(["--max_new_tokens=2", "--start=the"]))


@fuzz
@given(data=st.data())
def test_a_folder_of_hugging_face_with_another_config(trained, data):
    if not Path("hf/config.json").exists():
        sample.main(["--save_pretrained=hf"])
        shutil.copy("hf/config.json", "good.json")
    facts = json.loads(Path("good.json").read_text())
    path = data.draw(st.sampled_from(list(places(facts))))
    facts = changed(facts, path, data.draw(values), data.draw(st.booleans()))
    Path("hf/config.json").write_text(json.dumps(facts), errors="surrogatepass")
    refused_or_done(lambda: sample.main(["--init_from=hf", "--max_new_tokens=2"]))


@fuzz
@given(data=st.data())
def test_a_dataset_with_another_meta_json(dataset, data):
    path = dataset / "meta.json"
    good = dataset / "good.json"
    if not good.exists():
        good.write_bytes(path.read_bytes())
    meta = json.loads(good.read_bytes())
    place = data.draw(st.sampled_from(list(places(meta))))
    meta = data.draw(values) if data.draw(st.integers(0, 9)) == 0 else changed(meta, place, data.draw(values), False)
    path.write_text(json.dumps(meta), errors="surrogatepass")
    refused_or_done(lambda: train_here(max_iters=1, init_from="scratch"))


@fuzz
@given(split=st.sampled_from(["train", "val"]), tokens=st.binary(max_size=200), promised=st.booleans())
def test_a_dataset_with_other_tokens(dataset, split, tokens, promised):
    (dataset / f"{split}.bin").write_bytes(tokens)
    if promised:
        meta = prepare.load_meta("shakespeare_char") | {f"{split}_tokens": len(tokens) // 2}
        (dataset / "meta.json").write_text(json.dumps(meta))
    refused_or_done(lambda: train_here(max_iters=1, init_from="scratch"))


@fuzz
@given(
    words=st.lists(
        st.text(max_size=12) | st.sampled_from(["config/shakespeare_char.py", "--n_layer", "x.py"]), max_size=3
    ),
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
@given(
    lines=st.lists(st.tuples(st.sampled_from(["n_layer", "dropout", "out_dir", "_x", "a b", ""]), values), max_size=4)
)
def test_a_recipe_with_other_lines(folder, lines):
    Path("recipe.py").write_text("\n".join(f"{name} = {value!r}" for name, value in lines), errors="surrogatepass")
    with pytest.raises(UserError):
        train.main(["recipe.py", "--dataset=none"])


def test_a_tokenizer_cannot_pretend_to_be_a_shape(trained):
    content = checkpoint(trained)
    content["tokenizer"] |= {"block_size": "x", "model": [1], "n_layer": 3}
    torch.save(content, trained)
    train_here(max_iters=21)
    assert (checkpoint()["config"]["model"], checkpoint()["config"]["n_layer"]) == ("gpt", 2)


def test_a_bigram_of_many_layers_costs_nothing(dataset, monkeypatch):
    train_here(model="bigram", max_iters=1)
    content = checkpoint("out/best.pt")
    content["model_config"]["n_layer"] = 10**12
    torch.save(content, "out/best.pt")
    monkeypatch.setattr("model.KVCache", lambda max_length: 1 / 0)
    sample.main(["--max_new_tokens=2"])


def test_sizes_that_no_memory_holds_are_refused_before_they_are_tried(trained):
    for name in ("n_layer", "n_embd", "vocab_size", "block_size"):
        content = checkpoint(trained)
        content["model_config"][name] = 2**40
        torch.save(content, trained.with_name("best.pt"))
        with pytest.raises(UserError, match=r"cannot open out/best.pt"):
            sample.main([])


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ("steps", torch.zeros(0)),  # a fused kernel would read past its end
        ("steps", torch.zeros(1)),
        ("mean", torch.zeros(2, 2)),
        ("mean", torch.zeros(())),
        ("square", torch.zeros(2, 2)),
        ("square", 1.0),
        ("square", None),
    ],
)
def test_an_optimizer_state_of_other_shapes_is_refused(trained, at, value):
    content = checkpoint(trained)
    content["optimizer"]["state"][f"transformer.wte.weight.{at}"] = value
    torch.save(content, trained)
    with pytest.raises(UserError, match=r"^cannot open out/ckpt.pt \("):
        train_here(max_iters=21)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", -1),
        ("step", 1.5),
        ("best_val_loss", float("nan")),
        ("config", {}),
        ("config", {"model": "gpt"}),
        ("tokenizer", []),
    ],
)
def test_a_checkpoint_with_impossible_figures_is_refused(trained, name, value):
    torch.save(checkpoint(trained) | {name: value}, trained)
    with pytest.raises(UserError, match=r"^out/ckpt.pt (holds another model|has no)|^cannot open out/ckpt.pt"):
        train_here(max_iters=21)


def test_a_run_without_its_optimizer_state_is_refused(trained):
    content = checkpoint(trained)
    content["optimizer"]["state"] = {}
    torch.save(content, trained)
    with pytest.raises(UserError, match=r"^cannot open out/ckpt.pt .* its optimizer state does not fit its weights"):
        train_here(max_iters=21)
