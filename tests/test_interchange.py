"""Models that come from elsewhere and go elsewhere: Hugging Face's transformers and nanoGPT. No network is needed."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import REPOSITORY, checkpoint, command, losses, same, train_here
from safetensors.torch import load_file, save_file

import prepare
import sample
import train
from config import ConfigError, UserError, run
from model import GPT, GPTConfig, open_model

transformers.utils.logging.disable_progress_bar()
SHAPES = [
    {"vocab_size": 21, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 32},
    {"vocab_size": 300, "n_positions": 40, "n_layer": 1, "n_head": 3, "n_embd": 48},
    {"vocab_size": 65, "n_positions": 24, "n_layer": 3, "n_head": 4, "n_embd": 32,
     "activation_function": "gelu_pytorch_tanh"},  # another name of gelu_new
]  # fmt: skip


def gpt2(**shape):
    """A GPT-2 of transformers with weights that make its logits differ, as after training."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return theirs.eval()


@pytest.fixture
def gpt2_folder(dataset):
    """gpt2/: a model in Hugging Face's format for the characters of the dataset."""
    gpt2(**SHAPES[0]).save_pretrained("gpt2")
    tokenizer = prepare.tokenizer_of(prepare.load_meta("shakespeare_char")).to_library()
    tokenizer.save("gpt2/tokenizer.json")
    return Path("gpt2")


def token_ids(shape, rows=2):
    return torch.randint(shape["vocab_size"], (rows, shape["n_positions"]), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpt2_of_transformers_says_the_same_here(folder, shape):
    theirs = gpt2(**shape)
    theirs.save_pretrained("gpt2")
    ours = GPT.from_pretrained("gpt2").eval()
    idx = token_ids(shape)
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=0, atol=1e-4)
    prompt, n = idx[:, :5], shape["n_positions"] - 5
    expected = theirs.generate(prompt, max_new_tokens=n, do_sample=False)
    assert torch.equal(ours.generate(prompt, n, temperature=0), expected)


def test_a_step_of_adamw_moves_both_to_the_same_loss(folder):
    theirs = gpt2(**SHAPES[1], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0).train()
    theirs.save_pretrained("gpt2")
    ours = GPT.from_pretrained("gpt2").train()
    idx = token_ids(SHAPES[1])
    seen = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            loss = model(idx, labels=idx).loss if model is theirs else model(idx[:, :-1], idx[:, 1:])[1]
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
    before, after = seen[:2]
    assert after < before - 0.1
    assert seen[2:] == pytest.approx([before, after], abs=1e-4)


def test_the_context_may_be_cropped_and_dropout_set(folder):
    theirs = gpt2(**SHAPES[2])
    theirs.save_pretrained("gpt2")
    ours = GPT.from_pretrained("gpt2", dropout=0.3).eval()
    assert ours.config == GPTConfig(65, 24, 3, 4, 32, dropout=0.3, bias=True)
    assert ours.transformer.h[1].config.dropout == ours.transformer.h[1].attn.config.dropout == 0.3
    ours.crop(10)
    idx = token_ids(SHAPES[2])[:, :10]
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=0, atol=1e-4)
    assert ours.config.block_size == 10
    assert ours.transformer.wpe.weight.shape == (10, 32)
    assert ours.transformer.wpe.weight.requires_grad
    with pytest.raises(ValueError, match="11 tokens are more than block_size"):
        ours(token_ids(SHAPES[2])[:, :11])
    with pytest.raises(ValueError, match=r"^block_size \(24\) is more than the model's \(10\)$"):
        ours.crop(24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "gelu"}, "gpt2 is not like GPT-2: its activation_function is 'gelu', not 'gelu_new'"),
        ({"layer_norm_epsilon": 1e-6}, "gpt2 is not like GPT-2: its layer_norm_epsilon is 1e-06, not 1e-05"),
        ({"n_inner": 64}, "gpt2 is not like GPT-2: its n_inner is 64, not 4 n_embd"),
        ({"scale_attn_weights": False}, "its scale_attn_weights is False, not True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "its scale_attn_by_inverse_layer_idx is True, not False"),
        ({"add_cross_attention": True}, "its add_cross_attention is True, not False"),
        ({"tie_word_embeddings": False}, "its tie_word_embeddings is False, not True"),
    ],
)
def test_a_model_that_is_computed_otherwise_is_refused(folder, change, message):
    gpt2(**SHAPES[0], **change).save_pretrained("gpt2")
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained("gpt2")


def test_another_architecture_is_refused(folder):
    transformers.LlamaConfig(vocab_size=21, hidden_size=32, num_hidden_layers=1).save_pretrained("llama")
    with pytest.raises(
        UserError, match=r"cannot open llama \(ValueError: llama is not like GPT-2: its model_type is 'llama'"
    ):
        sample.load("llama")


def test_the_layout_of_gpt2_on_the_hub_is_read_too(folder):
    """Its file has no prefix "transformer.", no lm_head, and the masks of old attention."""
    theirs = gpt2(**SHAPES[0])
    theirs.save_pretrained("gpt2")
    weights = {name.removeprefix("transformer."): w.clone() for name, w in theirs.state_dict().items()}
    del weights["lm_head.weight"]
    weights |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)}
    weights |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    save_file(weights, "gpt2/model.safetensors", {"format": "pt"})
    idx = token_ids(SHAPES[0])
    torch.testing.assert_close(GPT.from_pretrained("gpt2").eval()(idx)[0], theirs(idx).logits, rtol=0, atol=1e-4)


def test_weights_that_a_folder_lacks_are_not_made_up(folder):
    gpt2(**SHAPES[0]).save_pretrained("gpt2")
    config = json.loads(Path("gpt2/config.json").read_text())
    Path("gpt2/config.json").write_text(json.dumps(config | {"n_layer": 3}))
    with pytest.raises(
        UserError, match=r"^cannot open gpt2 \(ValueError: gpt2 has not all the weights that its config.json"
    ):
        sample.load("gpt2")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["h.2.ln_1.bias"], r"h\.2\.ln_1\.bias"),
        (
            ["h.0.attn.lora_B.weight", "h.0.attn.lora_A.weight"],
            r"h\.0\.attn\.lora_A\.weight, h\.0\.attn\.lora_B\.weight",
        ),
        (
            [f"h.0.mlp.scale_{i}.bias" for i in range(7)],
            r"h\.0\.mlp\.scale_0\.bias, h\.0\.mlp\.scale_1\.bias and 5 more",
        ),
    ],
)
def test_weights_that_the_model_has_no_place_for_are_not_dropped(folder, names, told):
    gpt2(**SHAPES[0]).save_pretrained("gpt2")
    weights = load_file("gpt2/model.safetensors") | {name: torch.zeros(32) for name in names}
    save_file(weights, "gpt2/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"^cannot open gpt2 \(.* gpt2 has weights .* not promise: {told}\)"):
        sample.load("gpt2")


@pytest.mark.parametrize("config", [False, True])
def test_an_adapter_is_no_model_and_is_not_left_out_beside_one(gpt2_folder, config):
    (gpt2_folder / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
    if not config:
        (gpt2_folder / "config.json").unlink()
    for work in (lambda: sample.main(["--init_from=gpt2"]), lambda: train_here(init_from="gpt2")):
        with pytest.raises(ConfigError, match=r"^gpt2 holds an adapter: merge it into its model first, by peft"):
            work()


def test_a_strangers_folder_runs_no_code(folder):
    Path("evil").mkdir()
    Path("evil/evil.py").write_text("open('ran', 'w')\nfrom transformers import GPT2Config as Evil")
    Path("evil/config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    ended = command("sample.py", "--init_from=evil", input="y\n", env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert ended.returncode == 1
    assert "sample.py: cannot open evil (" in ended.stderr
    assert not Path("ran").exists()


def test_fine_tuning_begins_with_the_weights_and_goes_on_from_its_own(gpt2_folder, capsys):
    start = {"init_from": "gpt2"}  # the shape is that of the weights
    start |= {"dropout": 0.0, "lr_decay_iters": 20}
    train_here(**start, max_iters=10, out_dir="half")
    out = capsys.readouterr().out
    assert "starting from gpt2: model gpt, n_layer 2, n_head 2, n_embd 32, block_size 16, bias True, " in out
    config = checkpoint("half/ckpt.pt")["config"]
    assert (config["n_layer"], config["n_embd"], config["bias"]) == (2, 32, True)
    blocks = prepared_blocks("val")
    expected = gpt2(**SHAPES[0])(blocks[:, :-1]).logits.log_softmax(-1).gather(2, blocks[:, 1:, None]).mean()
    assert losses(out)[0][1] == pytest.approx(-expected.item(), abs=1e-3)
    assert losses(out)[10][1] < losses(out)[0][1] - 0.1
    train_here(**start, out_dir="whole")
    capsys.readouterr()
    for source in ("gpt2", "resume"):  # the same command, or without the folder
        shutil.copytree("half", f"{source} half")
        train_here(**start | {"init_from": source}, out_dir=f"{source} half")
        assert "half/ckpt.pt at step 10; changed since: out_dir 'half' ->" in capsys.readouterr().out
        assert same(checkpoint(f"{source} half/ckpt.pt")["model"], checkpoint("whole/ckpt.pt")["model"])
        assert checkpoint(f"{source} half/ckpt.pt")["config"]["init_from"] == "gpt2"


def prepared_ids(split):
    return torch.from_numpy(np.fromfile(f"data/shakespeare_char/{split}.bin", "<u2").astype(np.int64))


def prepared_blocks(split):
    """What an evaluation reads (blocks, block_size + 1): eval_iters times batch_size blocks."""
    return prepared_ids(split)[: 4 * 8 * 16 + 1].unfold(0, 17, 16)


def test_fine_tuning_has_the_dropout_that_is_asked_for(gpt2_folder):
    """Weights bring none."""
    for dropout in (0.0, 0.5):
        train_here(init_from="gpt2", dropout=dropout, max_iters=1, out_dir=f"{dropout}")
        assert checkpoint(f"{dropout}/ckpt.pt")["model_config"]["dropout"] == dropout
    assert not same(checkpoint("0.0/ckpt.pt")["model"], checkpoint("0.5/ckpt.pt")["model"])


def test_a_fine_tuned_run_goes_on_without_what_it_began_with(gpt2_folder):
    train_here(init_from="gpt2/", max_iters=5)
    shutil.rmtree("gpt2")
    train_here(init_from="./gpt2", max_iters=6)
    assert checkpoint()["step"] == 6
    with pytest.raises(ConfigError, match=r"^there is no checkpoint in nowhere; there is one in out$"):
        train_here(init_from="nowhere", out_dir="new")


def test_a_run_from_scratch_is_not_taken_for_a_fine_tuned_one(gpt2_folder):
    train_here(max_iters=1)
    difference = r"out/ckpt.pt holds another model .*\(init_from 'auto' -> 'gpt2'\)"
    advice = "; take another --out_dir, where --init_from=out/ckpt.pt fine-tunes these weights$"
    with pytest.raises(ConfigError, match=difference + advice):
        train_here(max_iters=2, init_from="gpt2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 17}, r"gpt2 holds another model .* \(block_size 16 -> 17\); leave out keys of the shape"),
        ({"model": "bigram"}, r"gpt2 holds another model .* \(model 'gpt' -> 'bigram'\); leave out keys of the shape"),
        (
            {"n_layer": 4, "bias": False},
            r"gpt2 holds another model .* \(n_layer 2 -> 4, bias True -> False\); leave out keys of the shape",
        ),
        (
            {"init_from": "other"},
            r"other holds another model .* \(n_layer 1 -> 2, .*vocab_size 300 -> 21\); .* --tokenizer=other makes ",
        ),
        ({"init_from": "empty"}, "there is no checkpoint in empty"),
        ({"init_from": "gpt2/config.json"}, r"cannot open gpt2/config.json \(BadZipFile: "),
    ],
)
def test_weights_that_do_not_fit_are_refused(gpt2_folder, changes, message):
    gpt2(**SHAPES[1]).save_pretrained("other")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message):
        train_here(**{"init_from": "gpt2"} | changes)
    assert not Path("out/ckpt.pt").exists()


def test_sampling_from_a_folder_of_transformers(gpt2_folder, capsys):
    sample.main(["--init_from=gpt2", "--start=the", "--temperature=0", "--max_new_tokens=10"])
    tokenizer = prepare.tokenizer_of(prepare.load_meta("shakespeare_char"))
    idx = torch.tensor([tokenizer.encode("the").tolist()])
    expected = gpt2(**SHAPES[0]).generate(idx, max_new_tokens=10, do_sample=False)
    assert capsys.readouterr().out == tokenizer.decode(expected[0].numpy()) + "\n"
    Path("gpt2/tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"^there is no tokenizer gpt2: take "):
        sample.main(["--init_from=gpt2"])


def test_without_the_hub_one_line_says_so_at_once(folder):
    """transformers alone tries five times, for 24 seconds, and says so each time."""
    away = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder)}
    ended = command("sample.py", "--init_from=gpt2", env=away)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith("sample.py: cannot open gpt2 (OSError: We couldn't connect to")


def test_a_prompt_without_a_token_is_refused(gpt2_folder):
    library = prepare.tokenizer_of(prepare.load_meta("shakespeare_char")).to_library()
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save("gpt2/tokenizer.json")
    with pytest.raises(ConfigError, match=r"^--start: the model needs at least one token"):
        sample.main(["--init_from=gpt2", "--start= "])


def test_the_recipe_for_gpt2_starts_from_its_weights(gpt2_folder, capsys):
    small = ["--batch_size=4", "--block_size=8", "--gradient_accumulation_steps=2", "--max_iters=2", "--device=cpu"]
    names = ["--dataset=shakespeare_char", "--init_from=gpt2", "--out_dir=out", "--dropout=0.3"]
    train.main(["config/finetune_gpt2.py", *small, *names])
    assert checkpoint()["step"] == 2
    assert checkpoint()["model_config"]["dropout"] == 0.3


# Out


@pytest.fixture
def mine(folder):
    """A text with what a tokenizer could lose: blanks before points, quotes, tabs, characters of several bytes."""
    Path("mine.txt").write_text('Wär  ich ein Vöglein ,\tflög ich \' s zu dir !\n\n"Ja" ❤ . ' * 200)
    return Path("mine.txt")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_transformers_continues_with_our_greedy_text(mine, capsys, tokenizer, bias):
    prepare.main(["--dataset=shakespeare_char", f"--input={mine}", f"--tokenizer={tokenizer}"])
    train_here(max_iters=60, learning_rate=1e-2, block_size=64, bias=bias)
    capsys.readouterr()
    sample.main(["--save_pretrained=hf"])
    assert Path("hf/model.safetensors").exists()
    capsys.readouterr()
    sample.main(["--start=Wär  ich ,", "--temperature=0", "--max_new_tokens=40"])
    ours = capsys.readouterr().out.removesuffix("\n")
    write = transformers.pipeline("text-generation", model="hf")
    [theirs] = write("Wär  ich ,", max_new_tokens=40, do_sample=False)
    assert theirs["generated_text"] == ours
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf")
    text = mine.read_text()
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    model = transformers.AutoModelForCausalLM.from_pretrained("hf")
    assert model.config.n_positions == 64
    idx = prepared_ids("val")[None, :64]
    torch.testing.assert_close(model(idx).logits, open_model("out/best.pt")[0].eval()(idx)[0], rtol=0, atol=1e-4)


def test_the_call_that_is_advertised_writes_up_to_block_size_without_a_warning(dataset, capsys):
    train_here(max_iters=2)
    sample.main(["--save_pretrained=hf"])
    [call] = re.findall(r"transformers\.pipeline\(.*\)", capsys.readouterr().out)
    code = f'import transformers; [answer] = {call}("the king"); print(answer["generated_text"])'
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout) == 16 + 1
    assert "[transformers]" not in ended.stderr


def test_an_export_has_the_rights_that_the_umask_gives(dataset):
    train_here(max_iters=1)
    before = os.umask(0o027)
    try:
        sample.main(["--save_pretrained=hf"])
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in Path("hf").iterdir()} == dict.fromkeys(
        ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        "0o640",
    )


@pytest.fixture
def with_end(folder):
    """gpt2/: a model whose tokenizer has <|endoftext|> as a special token; mine.txt, a text for it."""
    Path("mine.txt").write_text("the king and queen of this fair land did speak " * 200)
    library = prepare.learned_bpe(prepare.Text(Path("mine.txt"), "me"), 280).library
    library.add_special_tokens(["<|endoftext|>"])
    Path("gpt2").mkdir()
    library.save("gpt2/tokenizer.json")
    shape = SHAPES[0] | {"vocab_size": library.get_vocab_size()}
    gpt2(**shape).save_pretrained("gpt2")
    return library.token_to_id("<|endoftext|>")


def test_the_end_token_survives_fine_tuning_and_export(with_end):
    prepare.main(["--dataset=mine", "--input=mine.txt", "--tokenizer=gpt2/tokenizer.json"])
    train_here(dataset="mine", init_from="gpt2", max_iters=1)
    sample.main(["--save_pretrained=hf"])
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf")
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == transformers.AutoConfig.from_pretrained("hf").eos_token_id == with_end
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer(["the", "the king and"], padding=True).input_ids[0][-1] == with_end


@pytest.mark.parametrize("eos_token", ["</s>", {"content": "</s>", "special": True}])
def test_an_end_token_of_another_name_is_kept_on_every_way(folder, capsys, monkeypatch, eos_token):
    """Sampled from, fine-tuned and exported, each from the folder that the one before wrote."""
    Path("mine.txt").write_text("the king and queen of this fair land did speak " * 200)
    library = prepare.learned_bpe(prepare.Text(Path("mine.txt"), "me"), 280).library
    library.add_special_tokens(["<|endoftext|>", "</s>"])  # both: what the folder says counts
    end = library.token_to_id("</s>")
    gpt2(**SHAPES[0] | {"vocab_size": library.get_vocab_size()}).save_pretrained("theirs")
    library.save("theirs/tokenizer.json")
    Path("theirs/tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    prepare.main(["--dataset=mine", "--input=mine.txt", "--tokenizer=theirs"])
    train_here(dataset="mine", init_from="theirs", max_iters=1)
    assert checkpoint()["tokenizer"]["end"] == "</s>"
    sample.main(["--save_pretrained=tuned"])
    sample.main(["--init_from=theirs", "--save_pretrained=exported"])
    for folder in ("tuned", "exported"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", end)
        for settings in ("config.json", "generation_config.json"):
            assert json.loads(Path(folder, settings).read_text())["eos_token_id"] == end
    king = library.encode("king").ids[0]
    monkeypatch.setattr(GPT, "stream", lambda *_: iter(torch.tensor([king, end, king])[:, None, None]))
    for source in ("theirs", "out", "tuned", "exported"):
        capsys.readouterr()
        sample.main([f"--init_from={source}", "--start=the "])
        assert capsys.readouterr().out == f"the {library.decode([king])}\n"


@pytest.mark.parametrize("n", [1, 2])
def test_a_text_ends_at_the_end_token_each_at_its_own(with_end, capsys, monkeypatch, n):
    tokenizer = sample.load("gpt2")[1]
    the, king = tokenizer.encode("the king")[:2].tolist()
    drawn = torch.tensor([[king, king], [with_end, king], [king, with_end], [king, king]])
    monkeypatch.setattr(GPT, "stream", lambda *_: iter(drawn[:, :n, None]))
    word, start = (tokenizer.decode(np.array([id])) for id in (king, the))
    start += f"<|endoftext|>{start}"  # in a prompt it ends nothing
    for stop, texts in (
        (True, [start + word, start + 2 * word]),
        (False, [start + word + "<|endoftext|>" + 2 * word, start + 2 * word + "<|endoftext|>" + word]),
    ):
        sample.main(["--init_from=gpt2", f"--start={start}", f"--num_samples={n}", f"--stop_at_end={stop}"])
        assert capsys.readouterr().out == "\n---------------\n".join(texts[:n]) + "\n"


def test_a_padded_vocabulary_is_refused_with_the_reason(with_end):
    gpt2(**SHAPES[0] | {"vocab_size": 320}).save_pretrained("gpt2")
    with pytest.raises(
        UserError, match=r"^gpt2 has no usable tokenizer \(ValueError: 281 tokens for a vocabulary of 320"
    ):
        sample.load("gpt2")


def test_a_sharded_folder_opens(folder):
    theirs = gpt2(**SHAPES[1])
    theirs.save_pretrained("gpt2", max_shard_size="50KB")
    assert len([*Path("gpt2").glob("*.safetensors")]) > 1
    assert same(GPT.from_pretrained("gpt2").state_dict()["lm_head.weight"], theirs.transformer.wte.weight)


@pytest.mark.parametrize("of", ["train.py", "nanoGPT", "transformers"])
def test_weights_that_cannot_be_these_are_refused(dataset, gpt2_folder, of):
    """Two different tables where there is one; weights that are not finite."""

    def changed(name, value):
        if of == "transformers":
            gpt2(**SHAPES[0]).save_pretrained("gpt2")
            weights = load_file("gpt2/model.safetensors")
            weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
            weights[name][0, 0] = value
            save_file(weights, "gpt2/model.safetensors", {"format": "pt"})
        else:
            train_here(max_iters=1, init_from="scratch")
            content = checkpoint("out/best.pt")
            if of == "nanoGPT":
                nanogpt("out/best.pt")
                content = checkpoint("out/best.pt")
            content["model"][name] = content["model"][name].clone()
            content["model"][name][0, 0] = value
            torch.save(content, "out/best.pt")

    source = "gpt2" if of == "transformers" else "out"
    changed("lm_head.weight", 3.0)
    two = r"ValueError: transformer.wte.weight and lm_head.weight differ, but are one parameter"
    with pytest.raises(UserError, match=two):
        sample.main([f"--init_from={source}"])
    for value in (math.nan, math.inf):
        changed("transformer.h.1.mlp.c_fc.weight", value)
        with pytest.raises(UserError, match=r"ValueError: transformer.h.1.mlp.c_fc.weight holds NaN or infinity"):
            sample.main([f"--init_from={source}"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_that_wrappers_have_lengthened_are_theirs(dataset, prefix):
    train_here(max_iters=1)
    content = checkpoint("out/best.pt")
    content["model"] = {prefix + name: weight for name, weight in content["model"].items()}
    torch.save(content, "wrapped.pt")
    assert same(sample.load("wrapped.pt")[0].state_dict(), checkpoint("out/best.pt")["model"])


def test_an_export_that_fails_leaves_the_old_one(dataset, capsys, monkeypatch):
    train_here(max_iters=1)
    sample.main(["--save_pretrained=hf"])
    before = {path.name: path.read_bytes() for path in Path("hf").iterdir()}
    monkeypatch.setattr(prepare.CharTokenizer, "to_library", lambda self: 1 / 0)
    train_here(max_iters=2)
    with pytest.raises(UserError, match=r"^cannot write hf \(ZeroDivisionError: division by zero\)$"):
        sample.main(["--save_pretrained=hf"])
    assert {path.name: path.read_bytes() for path in Path("hf").iterdir()} == before
    Path("file").touch()
    with pytest.raises(FileExistsError):
        sample.main(["--save_pretrained=file"])


def test_an_export_does_not_mix_with_the_files_of_another(dataset):
    train_here(max_iters=1)
    for kept in ("README.md", ".gitattributes", ".git/config.json", "notes.txt", "ckpt.pt"):
        (Path("hf") / kept).parent.mkdir(parents=True, exist_ok=True)
        (Path("hf") / kept).touch()
    sample.main(["--save_pretrained=hf"])
    sample.main(["--save_pretrained=hf"])  # over an own one
    content = {path.name: path.read_bytes() for path in Path("hf").glob("*.*") if path.is_file()}
    for name in (
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "model-00001-of-00002.safetensors",
        "pytorch_model.bin", "model.safetensors.index.json", "adapter_config.json", "chat_template.jinja",
        "tokenizer.model",
    ):  # fmt: skip
        Path("hf", name).touch()
        Path("hf/config.json").write_text("of another")
        with pytest.raises(
            ConfigError, match=rf"^hf holds other files that transformers reads: {name}; take another one$"
        ):
            sample.main(["--save_pretrained=hf"])
        Path("hf", name).unlink()
        assert content | {"config.json": b"of another"} == {
            path.name: path.read_bytes() for path in Path("hf").glob("*.*") if path.is_file()
        }


def test_an_export_that_is_killed_leaves_nothing_beside_its_folder_and_is_not_taken_for_whole(dataset):
    train_here(max_iters=1)
    before = sorted(os.listdir())
    killed = """if True:
        import os, signal, safetensors.torch, sample
        original = safetensors.torch.save_file
        safetensors.torch.save_file = lambda *given: (original(*given), os.kill(os.getpid(), signal.SIGKILL))
        sample.main(["--save_pretrained=hf"])
    """
    argv = [sys.executable, "-c", killed]
    ended = subprocess.run(argv, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert sorted(os.listdir()) == sorted([*before, "hf"])
    with pytest.raises(ConfigError, match=r"^there is no checkpoint in hf"):
        sample.main(["--init_from=hf"])


def test_an_exported_tokenizer_prepares_another_text_for_fine_tuning(dataset, capsys):
    """Three ways to the same tokens: the export's tokenizer.json, the dataset's meta.json, the export brought back."""
    train_here(max_iters=2)
    sample.main(["--save_pretrained=hf"])
    Path("more.txt").write_text("did the queen speak? ".replace("?", "") * 100)
    for tokenizer in ("hf/tokenizer.json", "data/shakespeare_char/meta.json"):
        prepare.main(["--dataset=more", "--input=more.txt", f"--tokenizer={tokenizer}"])
        assert prepare.load_meta("more")["vocab_size"] == 21
        for source in ("out/best.pt", "out", "hf"):
            train_here(dataset="more", init_from=source, max_iters=1, out_dir="fine")
            shutil.rmtree("fine")
    prepare.main(["--dataset=other", "--input=more.txt"])  # other characters, other tokens
    with pytest.raises(ConfigError, match=r"out/best.pt holds another model .*\(vocab_size 21 -> "):
        train_here(dataset="other", init_from="out/best.pt", max_iters=1, out_dir="fine")


def test_the_name_of_a_tokenizer_does_not_matter_its_tokens_do(mine):
    prepare.main(["--dataset=shakespeare_char", f"--input={mine}", "--tokenizer=bpe", "--vocab_size=300"])
    tokenizer = prepare.tokenizer_of(prepare.load_meta("shakespeare_char"))
    tokenizer.library.save("same.json")
    train_here(max_iters=1)
    prepare.main(["--dataset=shakespeare_char", f"--input={mine}", "--tokenizer=same.json"])
    train_here(max_iters=2)
    assert checkpoint()["step"] == 2
    other = mine.with_name("other.txt")
    other.write_text(mine.read_text().replace("flög", "blau"))
    prepare.main(["--dataset=shakespeare_char", f"--input={other}", "--tokenizer=bpe", "--vocab_size=300"])
    with pytest.raises(ConfigError, match=r"out/ckpt.pt holds another model .*json '.*' -> '.*"):
        train_here(max_iters=3)


def test_what_went_out_comes_back(dataset, capsys):
    train_here(max_iters=5)
    sample.main(["--save_pretrained=hf"])
    ours = open_model("out/best.pt")[0].eval()
    back = GPT.from_pretrained("hf").eval()
    idx = token_ids(SHAPES[0])
    torch.testing.assert_close(back(idx)[0], ours(idx)[0], rtol=0, atol=1e-5)
    train_here(init_from="hf", out_dir="again", max_iters=5)


def test_an_export_that_is_interrupted_leaves_no_model_beside_the_tokenizer_of_another(dataset, monkeypatch):
    train_here(max_iters=1)
    sample.main(["--save_pretrained=hf"])
    assert Path("hf/config.json").exists()
    monkeypatch.setattr(GPT, "save_pretrained", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        sample.main(["--save_pretrained=hf"])
    assert not Path("hf/config.json").exists()  # without which nothing opens the folder


def test_a_model_that_is_saved_over_another_is_not_taken_for_whole_before_it_is(folder, monkeypatch):
    """GPT.save_pretrained by itself, as who copies model.py calls it."""
    ours = GPT(GPTConfig(65, 24, 3, 4, 32))
    ours.save_pretrained("hf")
    assert Path("hf/config.json").exists()
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ours.save_pretrained("hf")
    assert not Path("hf/config.json").exists()


def test_an_export_names_its_dropout_for_who_fine_tunes_it(folder):
    """Left out, they would be GPT-2's 0.1."""
    for dropout in (0.0, 0.3):
        GPT(GPTConfig(21, 16, 2, 2, 32, dropout=dropout)).save_pretrained("hf")
        theirs = json.loads(Path("hf/config.json").read_text())
        assert [theirs[name] for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")] == [dropout] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"feed_forward": False},
            r"cannot write hf \(ValueError: only a whole GPT can be saved as GPT-2, with feed_forward, .*\)",
        ),
        ({"model": "bigram"}, "only a GPT can be saved in Hugging Face's format, this is a bigram table"),
    ],
)
def test_what_is_no_gpt2_is_not_saved_as_one(dataset, changes, message):
    train_here(max_iters=1, **changes)
    with pytest.raises(UserError, match=f"^{message}$"):
        sample.main(["--save_pretrained=hf"])
    assert not Path("hf").exists()  # of a model that was there, nothing is replaced


# nanoGPT


def nanogpt(path, compiled=False, **changes):
    """Write a checkpoint as nanoGPT's train.py does; returns the model in it."""
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
    Path(path).parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_checkpoint_of_nanogpt_samples(dataset, capsys, compiled, bias):
    theirs = nanogpt("nano/ckpt.pt", compiled, bias=bias)
    sample.main(["--out_dir=nano", "--start=the", "--temperature=0", "--max_new_tokens=12"])
    tokenizer = prepare.tokenizer_of(prepare.load_meta("shakespeare_char"))
    idx = torch.tensor([tokenizer.encode("the").tolist()])
    assert capsys.readouterr().out == tokenizer.decode(theirs.generate(idx, 12, temperature=0)[0].numpy()) + "\n"


def test_a_checkpoint_of_nanogpt_is_fine_tuned_and_never_overwritten(dataset, capsys):
    nanogpt("nano/ckpt.pt")
    before = Path("nano/ckpt.pt").read_bytes()
    with pytest.raises(ConfigError, match=r"nano/ckpt.pt holds another .* optimizer .* --init_from=nano/ckpt.pt"):
        train_here(out_dir="nano")
    assert Path("nano/ckpt.pt").read_bytes() == before
    train_here(init_from="nano/ckpt.pt", max_iters=10)
    found = losses(capsys.readouterr().out)
    theirs = nanogpt("nano/ckpt.pt")
    tokens = prepared_blocks("val")
    assert found[0][1] == pytest.approx(theirs(tokens[:, :-1], tokens[:, 1:])[1].item(), abs=1e-4)
    assert found[10][1] < found[0][1]


def test_a_padded_vocabulary_of_nanogpt_is_cropped_to_gpt2s(dataset, monkeypatch):
    theirs = nanogpt("nano/ckpt.pt", vocab_size=50304)
    monkeypatch.chdir("nano")  # where there is no data/
    ours, content = open_model(Path("ckpt.pt"))
    assert prepare.checkpoint_facts(content, "ckpt.pt") == {"tokenizer": "gpt2", "vocab_size": 50257}
    ours.eval()
    idx = torch.randint(50257, (2, 16))
    torch.testing.assert_close(ours(idx)[0], theirs(idx)[0][..., :50257])


def test_a_checkpoint_of_nanogpt_whose_characters_are_not_known_is_refused(dataset, monkeypatch):
    nanogpt("nano/ckpt.pt")
    monkeypatch.chdir("nano")
    with pytest.raises(
        UserError, match=r"python prepare.py --dataset=shakespeare_char --input=FILE makes it from the text"
    ):
        sample.main(["--out_dir=."])


def test_a_checkpoint_of_nanogpt_gives_its_datasets_tokens_to_another_text(dataset):
    nanogpt("nano/ckpt.pt")
    Path("more.txt").write_text("the king " * 50)
    prepare.main(["--dataset=more", "--input=more.txt", "--tokenizer=nano"])
    assert prepare.load_meta("more")["chars"] == prepare.load_meta("shakespeare_char")["chars"]
    train_here(init_from="nano", dataset="more", max_iters=1)
    Path("data/shakespeare_char/meta.json").unlink()
    missing = r"^the checkpoint nano/ckpt.pt of nanoGPT has 21 tokens, but data/shakespeare_char/meta.json is missing: "
    with pytest.raises(UserError, match=missing):
        prepare.main(["--dataset=more", "--input=more.txt", "--tokenizer=nano"])


def test_a_checkpoint_of_nanogpt_of_another_text_is_refused(dataset):
    nanogpt("nano/ckpt.pt", vocab_size=65)
    with pytest.raises(UserError, match=r"of nanoGPT has 65 tokens, but data/shakespeare_char/meta.json has 21: "):
        sample.main(["--out_dir=nano"])


@pytest.mark.parametrize("name", ["mine/../../up", "a/b", "a\nb", "mine\n", "a b", "/tmp", "..", ".hidden", ""])
def test_a_dataset_has_a_plain_folder_name_so_it_is_in_data(dataset, name):
    nanogpt("nano/ckpt.pt")
    torch.save(checkpoint("nano/ckpt.pt") | {"config": {"dataset": name}}, "nano/ckpt.pt")
    for program, argv in (
        (prepare, [f"--dataset={name}", "--input=data/shakespeare_char/input.txt"]),
        (train, [f"--dataset={name}"]),
        (sample, ["--out_dir=nano"]),
        (train, ["--init_from=nano/ckpt.pt"]),
    ):
        with pytest.raises(ConfigError) as error:
            program.main(argv)
        assert str(error.value).startswith(
            f"dataset must be a plain folder name (letters, digits, _ - .), found {name!r}"
        )


def test_a_folder_of_nanogpts_tokens_trains(folder, capsys):
    """train.bin and val.bin as nanoGPT's prepare.py writes them, and the meta.json of the README."""
    Path("data/nano").mkdir(parents=True)
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 50257, 400).astype(np.uint16).tofile(f"data/nano/{split}.bin")
    Path("data/nano/meta.json").write_text(json.dumps({"tokenizer": "gpt2", "vocab_size": 50257}))
    train_here(dataset="nano", max_iters=1)
    assert checkpoint()["tokenizer"] == {"tokenizer": "gpt2", "vocab_size": 50257}
    assert "bits per byte" not in capsys.readouterr().out


# Packages that are not there


@pytest.mark.parametrize(
    ("package", "work"),
    [
        ("transformers", lambda: train_here(init_from="gpt2", out_dir="fine")),
        ("transformers", lambda: sample.main(["--init_from=gpt2"])),
        ("transformers", lambda: sample.main(["--save_pretrained=hf"])),
        ("tokenizers", lambda: sample.main(["--save_pretrained=hf"])),
        ("tokenizers", lambda: prepare.main(["--tokenizer=bpe"])),
        ("tokenizers", lambda: prepare.main(["--tokenizer=gpt2"])),
        ("tensorboard", lambda: train_here(tensorboard=True, out_dir="board")),
    ],
)
def test_a_missing_package_is_answered_with_its_installation(dataset, monkeypatch, capsys, package, work):
    train_here(max_iters=1)
    for name in list(sys.modules):
        if name.partition(".")[0] == package or name.startswith(f"torch.utils.{package}"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        run(lambda _: work())
    assert capsys.readouterr().err.endswith(f"this needs another package: pip install {package}\n")


def test_a_cropped_context_takes_no_room_in_the_checkpoint(dataset):
    train_here(block_size=1024, max_iters=1, batch_size=1)
    train_here(init_from="out/best.pt", out_dir="cropped", block_size=16, max_iters=1)
    train_here(out_dir="small", max_iters=1)
    sizes = {name: Path(f"{name}/best.pt").stat().st_size for name in ("out", "cropped", "small")}
    assert sizes["out"] > sizes["small"] + 1000 * 32 * 4
    assert sizes["cropped"] == pytest.approx(sizes["small"], abs=1000)


def test_weights_of_any_checkpoint_may_be_where_a_run_begins(dataset):
    train_here(max_iters=10)
    train_here(max_iters=1, init_from="out/best.pt", out_dir="more", learning_rate=0, min_lr=0)
    assert same(checkpoint("more/ckpt.pt")["model"], checkpoint("out/best.pt")["model"])
