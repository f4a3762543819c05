import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model
from model import GPT, Bigram, GPTConfig, attention, dropout, sample_token

SMALL = {"vocab_size": 11, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
REFERENCE = {"vocab_size": 65, "block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "bias": False}
PARTS = [{}, {"feed_forward": False}, {"residual": False}, {"layer_norm": False}, {"n_layer": 0}, {"bias": False}]


def lively(model):
    """A model whose logits differ enough for a wrong one to show, as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    return lively(GPT(GPTConfig(**SMALL)))


@pytest.fixture
def idx():
    return torch.randint(11, (3, 16), generator=torch.Generator().manual_seed(1))


def written_out(model, idx):
    """The GPT of the papers, step by step, from the same weights: no fused call, no module of model.py is run."""
    w, config = model.state_dict(), model.config

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    T, head_size = idx.size(1), config.n_embd // config.n_head
    mask = torch.ones(T, T).tril() == 0
    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:T]
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(config.n_embd, dim=2)
        heads = []
        for head in range(config.n_head):
            at = slice(head * head_size, (head + 1) * head_size)
            scores = q[..., at] @ k[..., at].transpose(1, 2) / math.sqrt(head_size)
            heads.append(scores.masked_fill(mask, -math.inf).softmax(-1) @ v[..., at])
        x = x + linear(torch.cat(heads, -1), f"{block}.attn.c_proj")
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + linear(gelu, f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


def plain_loop(model, idx, n, pick=lambda logits: logits.argmax(-1, keepdim=True)):
    """The lecture's generate: crop, run, append."""
    for _ in range(n):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat((idx, pick(logits[:, -1])), dim=1)
    return idx


def test_forward_equals_the_transformer_written_out(gpt, idx):
    torch.testing.assert_close(gpt(idx)[0], written_out(gpt, idx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_stays_close_to_float32(training, gpt, idx):
    gpt.train(training)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = gpt(idx, idx)
    assert loss.dtype == torch.float32
    expected = gpt(idx)[0]
    assert (logits - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("parts", PARTS)
def test_a_token_changes_no_logit_before_it(parts, idx):
    model = lively(GPT(GPTConfig(**SMALL | parts)))
    for t in (1, 7, 15):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        before, after = model(idx)[0], model(changed)[0]
        torch.testing.assert_close(before[:, :t], after[:, :t], rtol=0, atol=1e-6)
        assert not torch.allclose(before[:, t], after[:, t], atol=1e-3)


def test_every_earlier_token_matters(gpt, idx):
    for t in range(15):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        assert not torch.equal(gpt(idx)[0][:, 15], gpt(changed)[0][:, 15])


@pytest.mark.parametrize("parts", PARTS)
def test_gradients_reach_every_parameter(parts, idx):
    model = GPT(GPTConfig(**SMALL | parts))
    model(idx, idx.roll(-1, 1))[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_left_out_parts_have_no_parameters():
    def names(**parts):
        return " ".join(GPT(GPTConfig(**SMALL | parts)).state_dict())

    assert "mlp" in names() and "mlp" not in names(feed_forward=False)
    assert "ln_" in names() and "ln_" not in names(layer_norm=False)
    assert "bias" in names() and "bias" not in names(bias=False)


def test_without_residual_connections_a_block_that_says_nothing_erases_its_input(idx):
    for residual in (True, False):
        model = lively(GPT(GPTConfig(**SMALL, residual=residual)))
        with torch.no_grad():
            for parameter in model.transformer.h[-1].mlp.c_proj.parameters():
                parameter.zero_()
        logits = model(idx)[0]
        assert torch.allclose(logits[0, 0], logits[2, 9]) is not residual


def test_reference_model_has_10_7_million_parameters():
    model = GPT(GPTConfig(**REFERENCE))
    tables, block, last_norm = (65 + 256) * 384, 12 * 384**2 + 2 * 384, 384
    assert sum(p.numel() for p in model.parameters()) == tables + 6 * block + last_norm == 10_745_088


def test_state_dict_has_gpt2s_names():
    names = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    names |= {f"transformer.ln_f.{part}" for part in ("weight", "bias")}
    for layer in range(2):
        for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            names |= {f"transformer.h.{layer}.{module}.{part}" for part in ("weight", "bias")}
    model = GPT(GPTConfig(**SMALL))
    assert set(model.state_dict()) == names
    assert model.lm_head.weight is model.transformer.wte.weight


def test_initial_loss_is_that_of_guessing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**REFERENCE))
    idx = torch.randint(65, (4, 257))
    assert model(idx[:, :-1], idx[:, 1:])[1].item() == pytest.approx(math.log(65), abs=0.1)


@pytest.mark.parametrize(("n_embd", "expected"), [(768, 0.02), (192, 0.04)])
def test_initial_weights_have_the_promised_spread(n_embd, expected):
    model = GPT(GPTConfig(vocab_size=65, block_size=64, n_layer=8, n_head=1, n_embd=n_embd))
    std = {name: tensor.std().item() for name, tensor in model.state_dict().items()}
    assert std["transformer.wte.weight"] == pytest.approx(0.02, rel=0.03)
    assert std["transformer.h.3.attn.c_attn.weight"] == pytest.approx(expected, rel=0.03)
    assert std["transformer.h.3.mlp.c_fc.weight"] == pytest.approx(expected, rel=0.03)
    for branch in ("attn", "mlp"):
        assert std[f"transformer.h.3.{branch}.c_proj.weight"] == pytest.approx(expected / 4, rel=0.03)  # sqrt(2 x 8)
    assert std["transformer.h.3.mlp.c_fc.bias"] == 0


def test_loss_is_the_cross_entropy_of_the_targets(gpt, idx):
    targets = idx.roll(-1, 1)
    logits, loss = gpt(idx, targets)
    picked = logits.log_softmax(-1).gather(2, targets[:, :, None])
    torch.testing.assert_close(loss, -picked.mean())
    assert logits.shape == (3, 16, 11)
    assert gpt(idx)[1] is None


def test_dropout_acts_in_training_only(idx):
    model = GPT(GPTConfig(**SMALL, dropout=0.5))
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_a_padded_head_gives_the_same_logits_and_gradients(monkeypatch, gpt, idx):
    found = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr("model.TENSOR_CORES", devices)
        logits, loss = gpt(idx, idx)
        found.append([logits, *torch.autograd.grad(loss, list(gpt.parameters()))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("build", [GPT, Bigram])
@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_the_loss_without_logits_is_the_same_with_the_same_gradients(monkeypatch, build, sequences):
    monkeypatch.setattr("model.MAX_LOGITS", sequences * 16 * 11)  # in memory at a time
    torch.manual_seed(0)
    model = build(GPTConfig(**SMALL))
    x, y = torch.randint(11, (2, 5, 16))
    losses, gradients = [], []
    for need_logits in (True, False):
        model.zero_grad()
        logits, loss = model(x, y, need_logits)
        assert (logits is not None) == need_logits
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_masked_targets_count_neither_in_the_whole_loss_nor_in_parts(monkeypatch, sequences):
    monkeypatch.setattr("model.MAX_LOGITS", sequences * 16 * 11)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL))
    x, y = torch.randint(11, (2, 5, 16))
    y[:, :3] = y[1] = y[3, 5:] = -100  # sequences with 13, 0, 13, 2 and 13 targets
    found = []
    for need_logits in (True, False):
        loss = model(x, y, need_logits)[1]
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert found[0][0].isfinite()
    torch.testing.assert_close(*found, atol=1e-7, rtol=1e-5)


def test_of_an_undivided_batch_the_loss_without_logits_has_the_same_bits():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL))
    x, y = torch.randint(11, (2, 7, 13))  # numbers that are no powers of two
    found = []
    for need_logits in (True, False):
        loss = model(x, y, need_logits)[1]
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(map(torch.equal, *found))


def test_of_a_divided_batch_no_float32_softmax_is_kept_and_the_bits_are_those_with_it(monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL))
    x, y = torch.randint(11, (2, 6, 16))

    def gradients(sequences):
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda it: it)
        monkeypatch.setattr("model.MAX_LOGITS", sequences * 16 * 11)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), hooks:
            loss = model(x, y, need_logits=False)[1]
        loss.backward()
        softmaxes = [tensor for tensor in kept if tensor.shape[-1:] == (11,) and tensor.dtype == torch.float32]
        return len(softmaxes), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    assert gradients(sequences=6)[0]  # an undivided batch is not computed twice
    n_kept, recomputed = gradients(sequences=2)
    assert n_kept == 0
    monkeypatch.setattr("model.checkpoint", lambda function, *arguments, **_: function(*arguments))
    n_kept, kept = gradients(sequences=2)
    assert n_kept
    assert torch.equal(recomputed, kept)


@pytest.mark.parametrize("place", ["embeddings", "attention", "residual"])
def test_dropout_acts_on_embeddings_attention_and_residual_branches(place, idx):
    torch.manual_seed(0)
    model = lively(GPT(GPTConfig(**SMALL, dropout=0.5))).train()
    model.config.dropout = 0.5 if place == "embeddings" else 0.0  # leave it on at one place
    for block in model.transformer.h:
        block.config = replace(model.config, dropout=0.5 if place == "residual" else 0.0)
        block.attn.config = replace(model.config, dropout=0.5 if place == "attention" else 0.0)
    assert not torch.allclose(model(idx)[0], model(idx)[0])


def test_a_gpu_drops_as_much_at_every_place_in_training_only(monkeypatch, idx):
    """By torch's own dropout, and in the fused attention. No GPU is needed: a tensor on "meta" is not on the CPU."""

    def dropped(x, p=0.5, training=True, *, original=F.dropout):
        found.append(p * training)
        return original(x, p, training)

    def attended(q, k, v, dropout_p=0.0, original=F.scaled_dot_product_attention, **settings):
        attentions.append(dropout_p)
        return original(q, k, v, dropout_p=dropout_p, **settings)

    monkeypatch.setattr("torch.nn.functional.dropout", dropped)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attended)
    model = GPT(GPTConfig(**SMALL, dropout=0.3)).to("meta")
    for training in (True, False):
        found, attentions = [], []
        model.train(training)(idx.to("meta"))
        assert attentions == [0.3 * training] * 2
        assert found == [0.3] * 5 if training else not any(found)  # the embeddings and two branches of two blocks


def test_attention_weights_are_those_that_the_model_computes_with(gpt, monkeypatch):
    idx = torch.randint(11, (3, 16))
    calls = []

    def attend(q, k, v, original=torch.nn.functional.scaled_dot_product_attention, **settings):
        calls.append((v, original(q, k, v, **settings)))
        return calls[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", attend)
        gpt(idx)
    gpt.config.dropout = 0.5  # which its blocks read, too
    gpt.train()
    found = gpt.attention_weights(idx)
    assert gpt.training
    assert not found.requires_grad
    assert found.shape == (2, 3, 4, 16, 16)
    assert len(calls) == 2
    for weights, (v, y) in zip(found, calls, strict=True):
        torch.testing.assert_close(weights @ v, y)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 16))
        assert not weights.triu(1).any()  # nobody looks ahead


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.2, 0.75])
def test_dropout_zeroes_its_share_and_keeps_the_mean(monkeypatch, p, compiling):
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiling)
    n = 4_000_003  # no multiple of the four values that share a random number
    torch.manual_seed(0)
    kept = dropout(torch.ones(n), p)
    assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - p)] if p else [1])
    error = 5 * math.sqrt(p * (1 - p) / n)  # five standard deviations
    assert (kept == 0).double().mean().item() == pytest.approx(p, abs=error + 2**-17)
    for place in range(4):  # each of the four is as random
        assert (kept[place::4] == 0).double().mean().item() == pytest.approx(p, abs=2 * error + 2**-17)
    dropped = (kept == 0).double() - p
    for lag in (1, 2, 3, 4, 64):
        assert abs((dropped[lag:] * dropped[:-lag]).mean().item()) <= error


def test_the_largest_share_that_dropout_may_drop_is_not_taken_for_none():
    assert (dropout(torch.ones(100_000), 1 - 2**-18) == 0).float().mean() > 0.999


def test_dropout_drops_gradients_where_it_drops_values_and_repeats_with_the_seed():
    x = torch.randn(64, 64, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x, 0.5)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0) * 2.0)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), y)
    assert not torch.equal(dropout(x, 0.5), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_written_out_equals_the_fused_one_forward_and_backward(dtype):
    torch.manual_seed(0)
    qkv = (2 * torch.randn(3, 2, 4, 16, 8)).to(dtype).requires_grad_()
    results = []
    for call in (attention, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)):
        y = call(*qkv)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), qkv)))
    for written, fused in zip(*results, strict=True):
        assert (written - fused).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * fused.norm()


def test_text_longer_than_block_size_is_refused(gpt):
    with pytest.raises(ValueError, match="17 tokens are more than block_size"):
        gpt(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_embd": 30}, r"n_embd \(30\) must be divisible by n_head \(4\)"),
        ({"n_head": 0}, "n_head must be at least 1, found 0"),
        ({"n_layer": -1}, "n_layer must be at least 0"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"dropout": math.nan}, "dropout must be"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**SMALL | sizes)


# Generating


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("prompt", [1, 5, 15])
def test_cached_text_equals_the_plain_loop_while_it_fits(parts, prompt, idx):
    model = lively(GPT(GPTConfig(**SMALL | parts)))
    n = 16 - prompt + 1  # the last token is predicted from a full context
    assert torch.equal(model.generate(idx[:, :prompt], n, temperature=0), plain_loop(model, idx[:, :prompt], n))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("prompt", [1, 16, 30])
def test_stride_1_equals_the_plain_loop_past_block_size(parts, prompt):
    model = lively(GPT(GPTConfig(**SMALL | parts)))
    idx = torch.randint(11, (2, prompt), generator=torch.Generator().manual_seed(2))
    assert torch.equal(model.generate(idx, 40, temperature=0, stride=1), plain_loop(model, idx, 40))


def test_sampled_text_equals_the_plain_loop_too(gpt, idx):
    chance = torch.Generator().manual_seed(5)
    expected = plain_loop(gpt, idx[:, :4], 12, lambda logits: sample_token(logits, 1.0, 5, 0.9, chance))
    text = gpt.generate(idx[:, :4], 12, top_k=5, top_p=0.9, generator=torch.Generator().manual_seed(5))
    assert torch.equal(text, expected)


@pytest.mark.parametrize("stride", [None, 1, 3, 16])
def test_each_slide_drops_the_oldest_stride_tokens(gpt, idx, stride):
    expected = window = idx  # 16 tokens: full from the start
    for _ in range(50):
        if window.size(1) > 16:
            window = window[:, stride or 4 :]
        token = gpt(window)[0][:, -1].argmax(-1, keepdim=True)
        window, expected = torch.cat((window, token), 1), torch.cat((expected, token), 1)
    assert torch.equal(gpt.generate(idx, 50, temperature=0, stride=stride), expected)


def test_rows_of_a_batch_do_not_influence_each_other(gpt, idx):
    together = gpt.generate(idx, 30, temperature=0)
    for row in range(3):
        assert torch.equal(together[row : row + 1], gpt.generate(idx[row : row + 1], 30, temperature=0))


def test_generating_reads_each_token_once(gpt, idx, monkeypatch):
    lengths, hidden = [], gpt.hidden
    monkeypatch.setattr(gpt, "hidden", lambda idx, *rest: lengths.append(idx.size(1)) or hidden(idx, *rest))
    gpt.generate(idx[:, :4], 14)
    assert lengths == [4] + 12 * [1] + [13]  # the prompt, one by one, and anew without the oldest 4


def test_generate_keeps_the_prompt_and_the_mode(gpt, idx):
    gpt.train()
    text = gpt.generate(idx, 5)
    assert text.shape == (3, 21) and torch.equal(text[:, :16], idx)
    assert gpt.training
    assert gpt.generate(idx, 0).equal(idx)


def test_a_model_stays_in_training_while_it_writes_and_may_be_trained_on_its_text(gpt, idx):
    stream = gpt.train().stream(idx, 60, None, 0, None, None, None)
    next(stream)
    assert all(module.training for module in gpt.modules())
    gpt(gpt.generate(idx, 60)[:, -16:], idx)[1].backward()
    assert gpt.transformer.wte.weight.grad.abs().sum() > 0
    next(stream)


def test_writing_takes_the_models_own_parameters_and_calls_its_hooks(gpt, idx):
    layer, called = gpt.transformer.h[0].mlp.c_fc, []
    layer.register_forward_hook(lambda module, *_: called.append(module.weight is layer.weight))
    gpt.generate(idx[:, :1], 50)
    assert called == [True] * 50


def test_writing_keeps_no_graph_for_a_backward_pass(gpt, idx, monkeypatch):
    """Or memory would grow with every token."""
    found, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda *inputs: found.append(torch.is_grad_enabled()) or hidden(*inputs))
    gpt.train().generate(idx, 5)
    stream = gpt.stream(idx, 5, None, 0, None, None, None)
    assert not any(token.requires_grad for token in stream)
    assert found == [False] * 10
    assert torch.is_grad_enabled()


def test_a_model_in_training_writes_without_dropout(idx):
    model = lively(GPT(GPTConfig(**SMALL, dropout=0.5)))
    expected = model.generate(idx, 20, temperature=0)
    assert torch.equal(model.train().generate(idx, 20, temperature=0), expected)


def test_the_same_generator_gives_the_same_text(gpt, idx):
    texts = [gpt.generate(idx, 30, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_an_empty_prompt_is_refused(gpt, idx):
    with pytest.raises(ValueError, match="at least one token"):
        gpt.generate(idx[:, :0], 1)


@pytest.mark.parametrize("choice", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": -0.1}, {"top_p": 1.1}])
def test_a_choice_of_tokens_without_meaning_is_refused(gpt, idx, choice):
    with pytest.raises(ValueError, match=r"^temperature must be at least 0, top_k at least 1, top_p from 0 to 1$"):
        gpt.generate(idx, 1, **choice)


def test_the_model_needs_nothing_but_torch():
    source = Path(sys.modules["model"].__file__).read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("stride", [0, 17, -1])
def test_a_stride_outside_the_window_is_refused(gpt, idx, stride):
    with pytest.raises(ValueError, match="stride must be from 1 to block_size"):
        gpt.generate(idx, 1, stride=stride)


LOGITS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()[torch.tensor([3, 0, 4, 1, 2])]  # shuffled


def shares(**choices):
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, "generator": torch.Generator().manual_seed(0)}
    drawn = sample_token(LOGITS.repeat(100_000, 1), **settings | choices)
    return (torch.bincount(drawn.flatten(), minlength=5) / 100_000).tolist()


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({}, [0.1, 0.5, 0.05, 0.2, 0.15]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.0308, 0.7692, 0.0077, 0.1231, 0.0692]),
        ({"top_k": 2}, [0, 5 / 7, 0, 2 / 7, 0]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 99}, [0.1, 0.5, 0.05, 0.2, 0.15]),
        ({"top_p": 0.6}, [0, 5 / 7, 0, 2 / 7, 0]),
        ({"top_p": 0.75}, [0, 10 / 17, 0, 4 / 17, 3 / 17]),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.0}, [0, 1, 0, 0, 0]),
        ({"top_p": 1e-300}, [0, 1, 0, 0, 0]),  # 0 in float32
        ({"top_p": 1.0}, [0.1, 0.5, 0.05, 0.2, 0.15]),
        ({"top_k": 3, "top_p": 0.8}, [0, 5 / 7, 0, 2 / 7, 0]),  # 0.5 + 0.2 of 0.85 already hold 0.82
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(choices, expected):
    assert shares(**choices) == pytest.approx(expected, abs=0.006)
    assert [share > 0 for share in shares(**choices)] == [share > 0 for share in expected]


@pytest.mark.parametrize("choice", [(None, None), (3, None), (None, 0.9)])
def test_logits_that_float16_cannot_hold_divided_still_name_the_likeliest_token(choice):
    logits = torch.tensor([[60, 70, 69, 0]], dtype=torch.float16)  # by 0.001: above the largest number, 65,504
    assert sample_token(logits, 0.001, *choice, None).tolist() == [[1]]


def test_the_vocabulary_is_not_sorted_unless_asked_for(monkeypatch):
    for sorting in ("topk", "sort", "argsort"):
        monkeypatch.setattr(f"torch.Tensor.{sorting}", lambda *_: 1 / 0)
    assert sample_token(torch.zeros(3, 5), 1.0, None, None, None).shape == (3, 1)
    for top_k, top_p in ((2, None), (None, 0.5)):
        with pytest.raises(ZeroDivisionError):
            sample_token(torch.zeros(3, 5), 1.0, top_k, top_p, None)


def test_top_k_keeps_k_tokens_even_when_they_tie():
    drawn = sample_token(torch.zeros(1000, 5), 1.0, 2, None, torch.Generator().manual_seed(0))
    assert len(drawn.unique()) == 2


# Bigram


def test_bigram_is_one_table(idx):
    model = Bigram(GPTConfig(**SMALL))
    assert [p.shape for p in model.parameters()] == [(11, 11)]
    logits, loss = model(idx, idx.roll(-1, 1))
    assert torch.equal(logits, model.lm_head.weight[idx])
    assert loss.item() == pytest.approx(math.log(11), abs=0.1)


def test_bigram_generates_past_block_size():
    model = Bigram(GPTConfig(**SMALL))
    with torch.no_grad():
        model.lm_head.weight.copy_(F.one_hot((torch.arange(11) + 1) % 11, 11).float() * 100)  # counts
    assert model.generate(torch.tensor([[4]]), 30)[0].tolist() == [(4 + i) % 11 for i in range(31)]


class Rotary(model.CausalSelfAttention):
    """Rotary embeddings in a few lines (Su et al., 2021): q and k turn with the position."""

    def qkv_at(self, x, position):
        q, k, v = self.qkv(x)
        angles = position[:, None] / 100 ** torch.linspace(0, 1, q.size(-1) // 2)
        cos, sin = angles.cos(), angles.sin()
        turned = [torch.cat((a * cos - b * sin, a * sin + b * cos), -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1))]
        return *turned, v

    def forward(self, x, position, cache=None):
        q, k, v = self.qkv_at(x, position)
        if cache is not None:
            k, v = cache.extend(k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.size(1) > 1)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class WithoutCache(Rotary):
    def forward(self, x, position, cache=None):
        return super().forward(x, position)


def test_another_attention_samples_as_the_plain_loop_does_or_says_what_it_lacks(monkeypatch):
    """It has another name, and rotary embeddings: the position reaches it."""
    torch.manual_seed(0)
    monkeypatch.setattr(model, "CausalSelfAttention", Rotary)
    gpt = lively(GPT(GPTConfig(**SMALL))).eval()
    idx = torch.randint(11, (2, 3))
    assert torch.equal(gpt.generate(idx, 10, temperature=0), plain_loop(gpt, idx, 10))
    monkeypatch.setattr(model, "CausalSelfAttention", WithoutCache)
    with pytest.raises(ValueError, match=r"^WithoutCache must extend its cache by the tokens that it reads$"):
        GPT(GPTConfig(**SMALL)).generate(idx, 2)
    with pytest.raises(ValueError, match="zip"):
        gpt.hidden(idx, caches=[])  # one for each block, not none
