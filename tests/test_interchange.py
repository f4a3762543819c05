"""Weights, tokenizers and datasets that come from elsewhere and go elsewhere, as design.md promises them.

In: a GPT-2 of transformers says the same here, one that is computed otherwise or lacks weights is refused, and what a
folder holds runs no code. Fine-tuning begins with its weights and goes on from its own. Out: transformers opens an
export and continues with our text; what cuts an export off leaves no folder that looks whole. nanoGPT's checkpoints
and tokens are read. A package that is not there is answered with its installation. No network is needed.
"""

import json
import logging
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import checkpoint, command, losses, same, train_here
from safetensors.torch import load_file, save_file

import prepare
import sample
import train
from config import ConfigError, UserError, run
from model import GPT, GPTConfig, open_model

transformers.utils.logging.disable_progress_bar()
SHAPE = {"vocab_size": 21, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}  # of `trained`'s characters
OTHER_SHAPE = {
    "vocab_size": 300, "n_positions": 24, "n_layer": 3, "n_head": 3, "n_embd": 48,
    "activation_function": "gelu_pytorch_tanh",  # another name of gelu_new
}  # fmt: skip


def gpt2(**shape):
    """A GPT-2 of transformers with weights that make its logits differ, as after training."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return theirs.eval()


@pytest.fixture
def gpt2_folder(trained):
    """gpt2/: a model in Hugging Face's format for the characters of the dataset."""
    gpt2(**SHAPE).save_pretrained("gpt2")
    characters().to_library().save("gpt2/tokenizer.json")
    return Path("gpt2")


def characters():
    return prepare.tokenizer_of(prepare.load_meta("shakespeare_char"))


def token_ids(shape):
    return torch.randint(shape["vocab_size"], (2, shape["n_positions"]), generator=torch.Generator().manual_seed(1))


def greedy(model, text, n):
    """What the model continues the text with, by itself."""
    idx = torch.tensor([characters().encode(text).tolist()])
    return characters().decode(model.generate(idx, n, temperature=0)[0].numpy())


def validation_blocks():
    """What an evaluation reads (blocks, block_size + 1): eval_iters times batch_size blocks."""
    ids = np.fromfile("data/shakespeare_char/val.bin", "<u2").astype(np.int64)
    return torch.from_numpy(ids)[: 4 * 8 * 16 + 1].unfold(0, 17, 16)


# In


@pytest.mark.parametrize("shape", [SHAPE, OTHER_SHAPE])
def test_a_gpt2_of_transformers_says_the_same_here_and_may_be_cropped(folder, shape):
    theirs = gpt2(**shape)
    theirs.save_pretrained("gpt2")
    ours = GPT.from_pretrained("gpt2", dropout=0.3).eval()
    sizes = [shape[name] for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")]
    assert ours.config == GPTConfig(*sizes, dropout=0.3, bias=True)
    assert ours.transformer.h[1].config.dropout == ours.transformer.h[1].attn.config.dropout == 0.3
    idx = token_ids(shape)
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=0, atol=1e-4)
    prompt, n = idx[:, :5], shape["n_positions"] - 5
    expected = theirs.generate(prompt, max_new_tokens=n, do_sample=False)
    assert torch.equal(ours.generate(prompt, n, temperature=0), expected)
    ours.crop(10)
    torch.testing.assert_close(ours(idx[:, :10])[0], theirs(idx[:, :10]).logits, rtol=0, atol=1e-4)
    positions = ours.transformer.wpe.weight
    assert positions.requires_grad
    assert positions.untyped_storage().nbytes() == 10 * shape["n_embd"] * 4  # a checkpoint has no room for the others
    with pytest.raises(ValueError, match="11 tokens are more than block_size"):
        ours(idx[:, :11])
    with pytest.raises(ValueError, match=r"^block_size \(16\) is more than the model's \(10\)$"):
        ours.crop(16)


def test_the_layout_of_gpt2_on_the_hub_is_read_too(folder):
    """Its file has no prefix "transformer.", no lm_head, and the masks of old attention."""
    theirs = gpt2(**SHAPE)
    theirs.save_pretrained("gpt2")
    weights = {name.removeprefix("transformer."): w.clone() for name, w in theirs.state_dict().items()}
    del weights["lm_head.weight"]
    weights |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)}
    weights |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    save_file(weights, "gpt2/model.safetensors", {"format": "pt"})
    idx = token_ids(SHAPE)
    torch.testing.assert_close(GPT.from_pretrained("gpt2").eval()(idx)[0], theirs(idx).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "unknown", "message"),
    [
        ({"model_type": "llama"}, [], "is not like GPT-2: its model_type is 'llama', not 'gpt2'"),
        ({"activation_function": "gelu"}, [], "its activation_function is 'gelu', not 'gelu_new'"),
        ({"layer_norm_epsilon": 1e-6}, [], "its layer_norm_epsilon is 1e-06, not 1e-05"),
        ({"n_inner": 64}, [], "its n_inner is 64, not 4 n_embd"),
        ({"scale_attn_weights": False}, [], "its scale_attn_weights is False, not True"),
        ({"scale_attn_by_inverse_layer_idx": True}, [], "its scale_attn_by_inverse_layer_idx is True, not False"),
        ({"add_cross_attention": True}, [], "its add_cross_attention is True, not False"),
        ({"tie_word_embeddings": False}, [], "its tie_word_embeddings is False, not True"),
        ({"n_layer": 3}, [], "has not all the weights that its config.json promises"),
        ({}, ["h.2.ln_1.bias"], "has weights that its config.json does not promise: h.2.ln_1.bias"),
        ({}, [f"h.0.lora_{i}.bias" for i in range(4)], "promise: h.0.lora_0.bias, h.0.lora_1.bias and 2 more"),
    ],
)
def test_weights_of_another_model_are_refused_and_none_made_up_or_dropped(gpt2_folder, change, unknown, message):
    config = json.loads(Path("gpt2/config.json").read_text())
    Path("gpt2/config.json").write_text(json.dumps(config | change))
    weights = load_file("gpt2/model.safetensors") | {name: torch.zeros(32) for name in unknown}
    save_file(weights, "gpt2/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"^cannot open gpt2 \(ValueError: gpt2 .*{re.escape(message)}"):
        sample.load("gpt2")


def test_weights_that_cannot_be_these_are_refused(gpt2_folder):
    """Two different tables where there is one; weights that are not finite, and of other names and shapes."""
    content = checkpoint("out/ckpt.pt")
    weights, name = content["model"], "transformer.h.1.mlp.c_fc.weight"
    two = "transformer.wte.weight and lm_head.weight differ, but are one parameter"
    others = "its weights have other names or shapes than its model_config says"
    for changed, message in (
        ({"lm_head.weight": weights["lm_head.weight"] + 1}, two),
        ({name: weights[name] * math.nan}, f"{name} holds NaN or infinity"),
        ({name: weights[name] + math.inf}, f"{name} holds NaN or infinity"),
        ({name: weights[name][1:]}, others),
        ({"more": torch.ones(1)}, others),
    ):
        torch.save(content | {"model": weights | changed}, "out/best.pt")
        with pytest.raises(UserError, match=message):
            sample.load("out")
    theirs = load_file("gpt2/model.safetensors")
    save_file(
        theirs | {"lm_head.weight": theirs["transformer.wte.weight"] + 1}, "gpt2/model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=two):
        sample.load("gpt2")


def test_names_that_wrappers_have_lengthened_are_theirs(trained):
    content = checkpoint("out/best.pt")
    for prefix in ("module.", "_orig_mod.module."):
        weights = {prefix + name: weight for name, weight in content["model"].items()}
        torch.save(content | {"model": weights}, "wrapped.pt")
        assert same(sample.load("wrapped.pt")[0].state_dict(), content["model"])


def test_an_adapter_is_no_model_and_is_not_left_out_beside_one(gpt2_folder):
    (gpt2_folder / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
    for _ in ("beside a model", "alone"):
        for work in (lambda: sample.main(["--init_from=gpt2"]), lambda: train_here(init_from="gpt2", out_dir="new")):
            with pytest.raises(ConfigError, match=r"^gpt2 holds an adapter: merge it into its model first, by peft"):
                work()
        (gpt2_folder / "config.json").unlink(missing_ok=True)


def test_a_strangers_folder_runs_no_code(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to the question whether it may
    Path("evil").mkdir()
    Path("evil/evil.py").write_text("open('ran', 'w')\nfrom transformers import GPT2Config as Evil")
    Path("evil/config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    with pytest.raises(UserError, match=r"^cannot open evil \("):
        sample.main(["--init_from=evil"])
    assert not Path("ran").exists()


def test_without_the_hub_one_line_says_so_at_once(folder):
    """transformers alone tries five times, for 24 seconds, and says so each time."""
    away = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder)}
    ended = command("sample.py", "--init_from=gpt2", env=away)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith("sample.py: cannot open gpt2 (OSError: We couldn't connect to")


def test_sampling_from_a_folder_of_transformers(gpt2_folder, capsys):
    sample.main(["--init_from=gpt2", "--start=the", "--temperature=0", "--max_new_tokens=10"])
    assert capsys.readouterr().out == greedy(GPT.from_pretrained("gpt2"), "the", 10) + "\n"
    Path("gpt2/tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"^there is no tokenizer gpt2: take "):
        sample.main(["--init_from=gpt2"])


# Fine-tuning


def test_fine_tuning_begins_with_the_weights_and_goes_on_from_its_own(gpt2_folder, capsys):
    start = {"init_from": "gpt2", "dropout": 0.0, "lr_decay_iters": 20}  # the shape is that of the weights
    train_here(**start, max_iters=10, out_dir="half")
    out = capsys.readouterr().out
    assert "starting from gpt2: model gpt, n_layer 2, n_head 2, n_embd 32, block_size 16, bias True, " in out
    blocks = validation_blocks()
    expected = gpt2(**SHAPE)(blocks[:, :-1]).logits.log_softmax(-1).gather(2, blocks[:, 1:, None]).mean()
    assert losses(out)[0][1] == pytest.approx(-expected.item(), abs=1e-3)
    assert losses(out)[10][1] < losses(out)[0][1] - 0.1
    train_here(**start, out_dir="whole")
    capsys.readouterr()
    shutil.rmtree("gpt2")  # it goes on without what it began with
    for source in ("./gpt2", "resume"):
        shutil.copytree("half", "resumed", dirs_exist_ok=True)
        train_here(**start | {"init_from": source}, out_dir="resumed")
        assert "resumed/ckpt.pt at step 10; changed since: out_dir 'half' ->" in capsys.readouterr().out
        assert same(checkpoint("resumed/ckpt.pt")["model"], checkpoint("whole/ckpt.pt")["model"])
        assert checkpoint("resumed/ckpt.pt")["config"]["init_from"] == "gpt2"


def test_fine_tuning_has_the_dropout_that_is_asked_for(gpt2_folder):
    """Weights bring none."""
    small = ["--batch_size=4", "--block_size=8", "--gradient_accumulation_steps=2", "--max_iters=2", "--device=cpu"]
    for dropout in (0.0, 0.5):
        names = ["--dataset=shakespeare_char", "--init_from=gpt2", f"--out_dir={dropout}", f"--dropout={dropout}"]
        train.main(["config/finetune_gpt2.py", *small, *names])
        assert checkpoint(f"{dropout}/ckpt.pt")["model_config"]["dropout"] == dropout
    assert not same(checkpoint("0.0/ckpt.pt")["model"], checkpoint("0.5/ckpt.pt")["model"])


def test_weights_of_any_checkpoint_may_be_where_a_run_begins(trained):
    train_here(max_iters=1, init_from="out/best.pt", out_dir="more", learning_rate=0, min_lr=0)
    assert same(checkpoint("more/ckpt.pt")["model"], checkpoint("out/best.pt")["model"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 17}, r"gpt2 holds another model .* \(block_size 16 -> 17\); leave out keys of the shape"),
        ({"model": "bigram"}, r"gpt2 holds another model .* \(model 'gpt' -> 'bigram'\); leave out keys of the shape"),
        ({"n_layer": 4, "bias": False}, r"gpt2 holds another model .* \(n_layer 2 -> 4, bias True -> False\); leave"),
        ({"init_from": "other"}, r"other holds .* \(n_layer 3 -> 2, .*vocab_size 300 -> 21\); .* --tokenizer=other"),
        ({"init_from": "empty"}, r"there is no checkpoint in empty; there is one in out$"),
        ({"init_from": "gpt2/config.json"}, r"cannot open gpt2/config.json \(BadZipFile: "),
        # A run from scratch is not taken for a fine-tuned one.
        (
            {"out_dir": "out"},
            r"out/ckpt.pt holds .*\(init_from 'auto' -> 'gpt2'\); .* --init_from=out/ckpt.pt fine-tunes",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(gpt2_folder, changes, message):
    gpt2(**OTHER_SHAPE).save_pretrained("other")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message):
        train_here(**{"init_from": "gpt2", "out_dir": "new"} | changes)
    assert not Path("new/ckpt.pt").exists()


# Out


def export(*arguments):
    sample.main(["--save_pretrained=hf", *arguments])


def contents(folder="hf"):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.fixture
def mine(folder):
    """A text with what a tokenizer could lose: blanks before points, quotes, tabs, characters of several bytes."""
    Path("mine.txt").write_text('Wär  ich ein Vöglein ,\tflög ich \' s zu dir !\n\n"Ja" ❤ . ' * 200)
    return Path("mine.txt")


@pytest.mark.parametrize(("tokenizer", "bias"), [("char", True), ("bpe", False)])
def test_transformers_continues_with_our_greedy_text_up_to_block_size(mine, capsys, tokenizer, bias):
    prepare.main(["--dataset=shakespeare_char", f"--input={mine}", f"--tokenizer={tokenizer}"])
    train_here(max_iters=40, learning_rate=1e-2, block_size=64, bias=bias, n_layer=1)
    capsys.readouterr()
    export()
    [call] = re.findall(r"transformers\.pipeline\(.*\)", capsys.readouterr().out)
    told = []
    handler = logging.Handler()
    handler.emit = told.append
    transformers.logging.get_logger().addHandler(handler)
    transformers.logging.warning_once.cache_clear()
    try:
        [theirs] = eval(call)("Wär  ich ,", do_sample=False)  # as it is advertised: without any length
    finally:
        transformers.logging.get_logger().removeHandler(handler)
    assert not [record.getMessage() for record in told]
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf")
    n = 64 - len(tokenizer("Wär  ich ,").input_ids)
    sample.main(["--start=Wär  ich ,", "--temperature=0", f"--max_new_tokens={n}"])
    assert theirs["generated_text"] == capsys.readouterr().out.removesuffix("\n")
    text = mine.read_text()
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    model = transformers.AutoModelForCausalLM.from_pretrained("hf")
    idx = torch.tensor([tokenizer(text).input_ids[:64]])
    torch.testing.assert_close(model(idx).logits, open_model("out/best.pt")[0].eval()(idx)[0], rtol=0, atol=1e-4)


def test_what_went_out_comes_back_with_the_rights_that_the_umask_gives(trained):
    before = os.umask(0o027)
    try:
        export()
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in Path("hf").iterdir()} == dict.fromkeys(
        ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        "0o640",
    )
    idx = token_ids(SHAPE)
    ours, back = open_model("out/best.pt")[0].eval(), GPT.from_pretrained("hf").eval()
    torch.testing.assert_close(back(idx)[0], ours(idx)[0], rtol=0, atol=1e-5)


def test_an_export_names_its_dropout_for_who_fine_tunes_it(folder):
    """Left out, they would be GPT-2's 0.1."""
    for dropout in (0.0, 0.3):
        GPT(GPTConfig(21, 16, 2, 2, 32, dropout=dropout)).save_pretrained("hf")
        theirs = json.loads(Path("hf/config.json").read_text())
        assert [theirs[name] for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")] == [dropout] * 3


def test_an_exported_tokenizer_prepares_another_text_for_fine_tuning(trained):
    """Three ways to the same tokens: the export's tokenizer.json, the dataset's meta.json, the export brought back."""
    export()
    Path("more.txt").write_text("did the queen speak" * 100)
    for tokenizer, source in (("hf/tokenizer.json", "out"), ("data/shakespeare_char/meta.json", "hf")):
        prepare.main(["--dataset=more", "--input=more.txt", f"--tokenizer={tokenizer}"])
        assert prepare.load_meta("more")["vocab_size"] == 21
        train_here(dataset="more", init_from=source, max_iters=1, out_dir=f"from {source}")
    prepare.main(["--dataset=other", "--input=more.txt"])  # other characters, other tokens
    with pytest.raises(ConfigError, match=r"out/best.pt holds another model .*\(vocab_size 21 -> "):
        train_here(dataset="other", init_from="out/best.pt", max_iters=1, out_dir="fine")


def test_the_name_of_a_tokenizer_does_not_matter_its_tokens_do(mine):
    prepare.main(["--dataset=shakespeare_char", f"--input={mine}", "--tokenizer=bpe", "--vocab_size=300"])
    prepare.tokenizer_of(prepare.load_meta("shakespeare_char")).library.save("same.json")
    train_here(max_iters=1)
    prepare.main(["--dataset=shakespeare_char", f"--input={mine}", "--tokenizer=same.json"])
    train_here(max_iters=2)
    assert checkpoint()["step"] == 2
    mine.write_text(mine.read_text().replace("flög", "blau"))
    prepare.main(["--dataset=shakespeare_char", f"--input={mine}", "--tokenizer=bpe", "--vocab_size=300"])
    with pytest.raises(ConfigError, match=r"out/ckpt.pt holds another model .*json '.*' -> '.*"):
        train_here(max_iters=3)


@pytest.fixture
def with_end(folder):
    """theirs/: a model whose tokenizer has two special tokens; mine.txt, a text for it."""
    Path("mine.txt").write_text("the king and queen of this fair land did speak " * 200)
    library = prepare.learned_bpe(prepare.Text(Path("mine.txt"), "me"), 280).library
    library.add_special_tokens(["<|endoftext|>", "</s>"])
    gpt2(**SHAPE | {"vocab_size": library.get_vocab_size()}).save_pretrained("theirs")
    library.save("theirs/tokenizer.json")
    return library


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({}, "<|endoftext|>"),
        ({"tokenizer_config.json": {"content": "</s>", "special": True}}, "</s>"),
        ({"special_tokens_map.json": "</s>", "tokenizer_config.json": None}, "</s>"),
        ({"tokenizer_config.json": "<a token that it lacks>"}, "<|endoftext|>"),
    ],
)
def test_the_end_token_is_kept_on_every_way(with_end, capsys, monkeypatch, said, name):
    """Sampled from, fine-tuned and exported, each from the folder that the one before wrote."""
    for file, eos_token in said.items():
        Path("theirs", file).write_text(json.dumps({"eos_token": eos_token}))
    end, king = with_end.token_to_id(name), with_end.encode("king").ids[0]
    prepare.main(["--dataset=mine", "--input=mine.txt", "--tokenizer=theirs"])
    train_here(dataset="mine", init_from="theirs", max_iters=1)
    sample.main(["--save_pretrained=tuned"])
    sample.main(["--init_from=theirs", "--save_pretrained=exported"])
    for folder in ("tuned", "exported"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == (name, name, end)
        for settings in ("config.json", "generation_config.json"):
            assert json.loads(Path(folder, settings).read_text())["eos_token_id"] == end
    monkeypatch.setattr(GPT, "stream", lambda *_: iter(torch.tensor([king, end, king])[:, None, None]))
    for source in ("theirs", "out", "tuned", "exported"):
        capsys.readouterr()
        sample.main([f"--init_from={source}", "--start=the "])
        assert capsys.readouterr().out == f"the {with_end.decode([king])}\n"


@pytest.mark.parametrize("n", [1, 2])
def test_a_text_ends_at_the_end_token_each_at_its_own(with_end, capsys, monkeypatch, n):
    the, king = with_end.encode("the king").ids[:2]
    end = with_end.token_to_id("<|endoftext|>")
    drawn = torch.tensor([[king, king], [end, king], [king, end], [king, king]])
    monkeypatch.setattr(GPT, "stream", lambda *_: iter(drawn[:, :n, None]))
    word, start = with_end.decode([king]), with_end.decode([the])
    start += f"<|endoftext|>{start}"  # in a prompt it ends nothing
    for stop, texts in (
        (True, [start + word, start + 2 * word]),
        (False, [start + word + "<|endoftext|>" + 2 * word, start + 2 * word + "<|endoftext|>" + word]),
    ):
        sample.main(["--init_from=theirs", f"--start={start}", f"--num_samples={n}", f"--stop_at_end={stop}"])
        assert capsys.readouterr().out == "\n---------------\n".join(texts[:n]) + "\n"


def test_an_export_does_not_mix_with_the_files_of_another(trained):
    others = ["README.md", ".gitattributes", ".git/config.json", "notes.txt", "ckpt.pt", "results.json", "train.bin"]
    for kept in others:
        (Path("hf") / kept).parent.mkdir(parents=True, exist_ok=True)
        (Path("hf") / kept).touch()
    export()
    export()  # over an own one
    Path("hf/config.json").write_text("of another")
    before = contents()
    for name in (
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
        "model-00001-of-00002.safetensors", "pytorch_model.bin", "adapter_config.json", "chat_template.jinja",
    ):  # fmt: skip
        Path("hf", name).touch()
        with pytest.raises(ConfigError, match=rf"^hf holds other files that transformers reads: {name}; take another"):
            export()
        Path("hf", name).unlink()
        assert contents() == before


def save_alone():
    """As who copies model.py calls it."""
    GPT(GPTConfig(65, 24, 3, 4, 32)).save_pretrained("hf")


@pytest.mark.parametrize(
    ("at", "work"),
    [
        ("prepare.CharTokenizer.to_library", export),
        ("model.GPT.save_pretrained", export),
        ("safetensors.torch.save_file", export),
        ("safetensors.torch.save_file", save_alone),
    ],
)
def test_an_export_that_is_cut_off_leaves_the_old_one_or_none_that_looks_whole(trained, monkeypatch, at, work):
    """Nothing is written beside the folder, so a kill leaves nothing there either."""
    save_alone()
    before, beside = contents(), sorted(os.listdir())

    def cut_off(*_):
        assert sorted(os.listdir()) == beside
        raise ZeroDivisionError

    monkeypatch.setattr(at, cut_off)
    with pytest.raises((UserError, ZeroDivisionError)) as error:
        work()
    assert work is save_alone or str(error.value) == "cannot write hf (ZeroDivisionError: )"
    if "to_library" in at:
        assert contents() == before
    else:  # without a config.json nothing opens the folder
        with pytest.raises(ConfigError, match=r"^there is no checkpoint in hf"):
            sample.load("hf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward": False}, r"cannot write hf \(ValueError: only a whole GPT can be saved as GPT-2, with .*\)"),
        ({"model": "bigram"}, "only a GPT can be saved in Hugging Face's format, this is a bigram table"),
    ],
)
def test_what_is_no_gpt2_is_not_saved_as_one(dataset, changes, message):
    train_here(max_iters=1, **changes)
    with pytest.raises(UserError, match=f"^{message}$"):
        export()
    assert not Path("hf").exists()  # of a model that was there, nothing is replaced


# nanoGPT


def nanogpt(compiled=False, **changes):
    """Write nano/ckpt.pt as nanoGPT's train.py does; returns the model in it."""
    config = GPTConfig(**{"vocab_size": 21, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32} | changes)
    torch.manual_seed(3)
    model = GPT(config).eval()
    prefix = "_orig_mod." if compiled else ""
    mask = {f"{prefix}transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16).tril()}  # of a torch without fused attention
    args = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    content = {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()} | mask,
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model_args": {name: getattr(config, name) for name in args},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.88),
        "config": {"dataset": "shakespeare_char", "out_dir": "out-shakespeare-char", "init_from": "scratch"},
    }
    Path("nano").mkdir(exist_ok=True)
    torch.save(content, "nano/ckpt.pt")
    return model


@pytest.mark.parametrize(("compiled", "bias"), [(True, False), (False, True)])
def test_a_checkpoint_of_nanogpt_samples(dataset, capsys, compiled, bias):
    theirs = nanogpt(compiled, bias=bias, dropout=0.5)
    sample.main(["--out_dir=nano", "--start=the", "--temperature=0", "--max_new_tokens=12"])
    assert capsys.readouterr().out == greedy(theirs, "the", 12) + "\n"
    assert open_model("nano")[0].config.dropout == 0  # weights bring none


def test_a_checkpoint_of_nanogpt_is_fine_tuned_and_never_overwritten(dataset, capsys):
    theirs = nanogpt()
    before = contents("nano")["ckpt.pt"]
    with pytest.raises(ConfigError, match=r"nano/ckpt.pt holds another .* optimizer .* --init_from=nano/ckpt.pt"):
        train_here(out_dir="nano")
    assert contents("nano")["ckpt.pt"] == before
    train_here(init_from="nano/ckpt.pt", max_iters=10)
    found = losses(capsys.readouterr().out)
    blocks = validation_blocks()
    assert found[0][1] == pytest.approx(theirs(blocks[:, :-1], blocks[:, 1:])[1].item(), abs=1e-4)
    assert found[10][1] < found[0][1]


def test_a_padded_vocabulary_of_nanogpt_is_cropped_to_gpt2s(folder):
    theirs = nanogpt(vocab_size=50304)
    ours, content = open_model(Path("nano/ckpt.pt"))
    assert prepare.checkpoint_facts(content, "ckpt.pt") == {"tokenizer": "gpt2", "vocab_size": 50257}
    idx = torch.randint(50257, (2, 16))
    torch.testing.assert_close(ours.eval()(idx)[0], theirs(idx)[0][..., :50257])


def test_a_checkpoint_of_nanogpt_has_its_datasets_tokens(dataset):
    nanogpt()
    Path("more.txt").write_text("the king " * 50)
    prepare.main(["--dataset=more", "--input=more.txt", "--tokenizer=nano"])
    assert prepare.load_meta("more")["chars"] == prepare.load_meta("shakespeare_char")["chars"]
    train_here(init_from="nano", dataset="more", max_iters=1)
    nanogpt(vocab_size=65)
    with pytest.raises(UserError, match=r"of nanoGPT has 65 tokens, but data/shakespeare_char/meta.json has 21: "):
        sample.main(["--out_dir=nano"])
    Path("data/shakespeare_char/meta.json").unlink()
    missing = r"nano/ckpt.pt of nanoGPT has 65 tokens, but data/shakespeare_char/meta.json is missing: .*--input=FILE"
    with pytest.raises(UserError, match=missing):
        sample.main(["--out_dir=nano"])


@pytest.mark.parametrize("name", ["mine/../../up", "a\nb", "mine\n", "a b", "..", ".hidden", ""])
def test_a_checkpoint_of_nanogpt_names_a_plain_folder_of_data(dataset, name):
    nanogpt()
    torch.save(checkpoint("nano/ckpt.pt") | {"config": {"dataset": name}}, "nano/ckpt.pt")
    for program, argv in ((train, ["--init_from=nano"]), (sample, ["--out_dir=nano"]), (train, [f"--dataset={name}"])):
        with pytest.raises(ConfigError) as error:
            program.main(argv)
        assert str(error.value).startswith("dataset must be a plain folder name")
        assert repr(name) in str(error.value)


def test_a_folder_of_nanogpts_tokens_trains(folder, capsys):
    """train.bin and val.bin as nanoGPT's prepare.py writes them, and the meta.json of the README."""
    Path("data/nano").mkdir(parents=True)
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 50257, 400).astype(np.uint16).tofile(f"data/nano/{split}.bin")
    Path("data/nano/meta.json").write_text(json.dumps({"tokenizer": "gpt2", "vocab_size": 50257}))
    train_here(dataset="nano", max_iters=1, batch_size=2, n_embd=8)
    assert checkpoint()["tokenizer"] == {"tokenizer": "gpt2", "vocab_size": 50257}
    assert "bits per byte" not in capsys.readouterr().out


# Packages that are not there


@pytest.mark.parametrize(
    ("package", "work"),
    [
        ("transformers", lambda: train_here(init_from="gpt2", out_dir="fine")),
        ("transformers", export),
        ("tokenizers", export),
        ("tokenizers", lambda: prepare.main(["--tokenizer=bpe"])),
        ("tensorboard", lambda: train_here(tensorboard=True, out_dir="board")),
    ],
)
def test_a_missing_package_is_answered_with_its_installation(trained, monkeypatch, capsys, package, work):
    for name in list(sys.modules):
        if name.partition(".")[0] == package or name.startswith(f"torch.utils.{package}"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        run(lambda _: work())
    assert capsys.readouterr().err.endswith(f"this needs another package: pip install {package}\n")
