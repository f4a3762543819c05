"""What model.py promises to who builds on it, in the order of its rooms.

The parts: attention looks back and never ahead, dropout drops its share. The whole: the GPT of the papers under
GPT-2's names, its loss also where the logits have no room. Generation: the text of the lecture's loop, read once.
Drawing: as often as the settings say. The bigram table. And a changed attention that works or says what it lacks.
Devices are tested where a run chooses them, in test_train.py; weights in files in test_interchange.py.
"""

import math
import re
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import model
from model import GPT, Bigram, GPTConfig, attention, dropout, sample_token

SMALL = {"vocab_size": 11, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
PARTS = [{}, {"feed_forward": False}, {"residual": False}, {"layer_norm": False}, {"n_layer": 0}, {"bias": False}]
FUSED = F.scaled_dot_product_attention


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


# The parts


@pytest.mark.parametrize(("key", "value"), [
    ("vocab_size", 0), ("block_size", 0), ("n_layer", -1), ("n_head", 0), ("n_embd", 30), ("dropout", 1.0),
    ("dropout", math.nan),
])  # fmt: skip
def test_impossible_sizes_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"^{key} .*must be"):
        GPTConfig(**SMALL | {key: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_written_out_equals_the_fused_one_forward_and_backward(dtype):
    torch.manual_seed(0)
    qkv = (2 * torch.randn(3, 2, 4, 16, 8)).to(dtype).requires_grad_()
    results = []
    for call in (attention, partial(FUSED, is_causal=True)):
        y = call(*qkv)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), qkv)))
    for written, fused in zip(*results, strict=True):
        assert (written - fused).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * fused.norm()


@pytest.mark.parametrize(
    ("p", "compiling"), [(0.0, False), (0.1, False), (0.75, False), (1 - 2**-18, False), (0.2, True)]
)
def test_dropout_zeroes_its_share_and_keeps_the_mean(monkeypatch, p, compiling):
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiling)
    n = 1_000_003  # no multiple of the four values that share a random number
    torch.manual_seed(0)
    kept = dropout(torch.ones(n), p)
    assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - p)] if p else [1])
    error = 5 * math.sqrt(p * (1 - p) / n)  # five standard deviations
    for place in range(4):  # each of the four is as random
        assert (kept[place::4] == 0).double().mean().item() == pytest.approx(p, abs=2 * error + 2**-17)
    dropped = (kept == 0).double() - p
    assert abs(dropped.mean().item()) <= error + 2**-17
    for lag in (1, 2, 3, 4, 64):
        assert abs((dropped[lag:] * dropped[:-lag]).mean().item()) <= error


def test_dropout_drops_gradients_where_it_drops_values_and_repeats_with_the_seed():
    x = torch.randn(64, 64, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x, 0.5)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0) * 2.0)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), y)
    assert not torch.equal(dropout(x, 0.5), y)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dropout_acts_on_embeddings_attention_and_branches_in_training_only(device, idx):
    """On a GPU, inside of the fused attention. None is needed: a tensor on "meta" is not on the CPU."""
    model = GPT(GPTConfig(**SMALL, dropout=0.3)).to(device)
    for training in (True, False):
        with (
            mock.patch("model.dropout", wraps=dropout) as dropped,
            mock.patch("torch.nn.functional.scaled_dot_product_attention", wraps=FUSED) as fused,
        ):
            model.train(training)(idx.to(device))
        shares = [call.args[1] for call in dropped.mock_calls] + [call.kwargs["dropout_p"] for call in fused.mock_calls]
        assert shares == [0.3 * training] * 7  # the embeddings, then attention and two branches in each of two blocks


# The whole


def written_out(model, idx):
    """Logits and attention weights of the GPT of the papers, step by step, from the same weights, without model.py."""
    w, config = model.state_dict(), model.config

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    T, head_size = idx.size(1), config.n_embd // config.n_head
    mask = torch.ones(T, T).tril() == 0
    weights = []
    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:T]
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(config.n_embd, dim=2)
        heads = []
        for head in range(config.n_head):
            at = slice(head * head_size, (head + 1) * head_size)
            scores = q[..., at] @ k[..., at].transpose(1, 2) / math.sqrt(head_size)
            weights.append(scores.masked_fill(mask, -math.inf).softmax(-1))
            heads.append(weights[-1] @ v[..., at])
        x = x + linear(torch.cat(heads, -1), f"{block}.attn.c_proj")
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + linear(gelu, f"{block}.mlp.c_proj")
    logits = norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T
    return logits, torch.stack(weights, 1).view(len(idx), config.n_layer, config.n_head, T, T).transpose(0, 1)


@pytest.mark.parametrize("scale", [1, 0.01])  # where values are small, the norm's epsilon counts
def test_logits_and_attention_weights_are_those_of_the_transformer_written_out(gpt, idx, scale):
    with torch.no_grad():
        for table in (gpt.transformer.wte, gpt.transformer.wpe):
            table.weight.mul_(scale)
    logits, weights = written_out(gpt, idx)
    torch.testing.assert_close(gpt(idx)[0], logits, rtol=1e-4, atol=1e-4 * scale)
    gpt.config.dropout = 0.5  # which its blocks read, too
    found = gpt.train().attention_weights(idx)
    torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-5)
    assert gpt.training
    assert not found.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_stays_close_to_float32(training, gpt, idx):
    gpt.train(training)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = gpt(idx, idx)
    assert loss.dtype == torch.float32
    expected = gpt(idx)[0]
    assert (logits - expected).norm() / expected.norm() < 0.02
    assert gpt.bfloat16()(idx, idx)[1].dtype == torch.float32  # without autocast, too


@pytest.mark.parametrize("parts", PARTS)
def test_a_token_changes_its_own_logits_and_later_ones_and_every_parameter_learns(parts, idx):
    torch.manual_seed(0)
    model = lively(GPT(GPTConfig(**SMALL | parts)))
    texts = idx[0].repeat(16, 1)
    texts[range(16), range(16)] = (idx[0] + 1) % 11  # another token, in each row at another place
    change = (model(texts)[0] - model(idx[:1])[0]).abs().amax(-1)
    once_more = torch.ones(16, 16).triu() if model.config.n_layer else torch.eye(16)
    assert torch.equal(change > 1e-6, once_more.bool())
    assert change.diagonal().min() > 1e-3
    model(idx, idx.roll(-1, 1))[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_without_residual_connections_a_block_that_says_nothing_erases_its_input(idx):
    for residual in (True, False):
        model = lively(GPT(GPTConfig(**SMALL, residual=residual)))
        with torch.no_grad():
            for parameter in model.transformer.h[-1].mlp.c_proj.parameters():
                parameter.zero_()
        logits = model(idx)[0]
        assert torch.allclose(logits[0, 0], logits[2, 9]) is not residual


def test_text_longer_than_block_size_is_refused(gpt):
    with pytest.raises(ValueError, match="17 tokens are more than block_size"):
        gpt(torch.zeros(1, 17, dtype=torch.long))


def test_weights_have_gpt2s_names_and_one_table_reads_and_writes():
    names = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    names |= {f"transformer.ln_f.{part}" for part in ("weight", "bias")}
    for layer in range(2):
        for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            names |= {f"transformer.h.{layer}.{module}.{part}" for part in ("weight", "bias")}
    model = GPT(GPTConfig(**SMALL))
    assert set(model.state_dict()) == names
    assert model.lm_head.weight is model.transformer.wte.weight
    for left_out, word in (("feed_forward", "mlp"), ("layer_norm", "ln_"), ("bias", "bias")):
        assert word not in " ".join(GPT(GPTConfig(**SMALL | {left_out: False})).state_dict())


def test_the_reference_model_has_10_7_million_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False))
    tables, block, last_norm = (65 + 256) * 384, 12 * 384**2 + 2 * 384, 384
    assert sum(p.numel() for p in model.parameters()) == tables + 6 * block + last_norm == 10_745_088


@pytest.mark.parametrize(("n_embd", "expected"), [(1024, 0.02), (192, 0.04)])
def test_initial_weights_have_the_promised_spread_and_the_loss_of_guessing(n_embd, expected):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, block_size=64, n_layer=2, n_head=1, n_embd=n_embd))
    std = {name: tensor.std().item() for name, tensor in model.state_dict().items()}
    assert std["transformer.wte.weight"] == pytest.approx(0.02, rel=0.03)
    assert std["transformer.h.1.attn.c_attn.weight"] == pytest.approx(expected, rel=0.03)
    assert std["transformer.h.1.mlp.c_fc.weight"] == pytest.approx(expected, rel=0.03)
    for branch in ("attn", "mlp"):
        assert std[f"transformer.h.1.{branch}.c_proj.weight"] == pytest.approx(expected / 2, rel=0.03)  # sqrt(2 x 2)
    assert std["transformer.h.1.mlp.c_fc.bias"] == 0
    idx = torch.randint(65, (8, 65))
    assert model(idx[:, :-1], idx[:, 1:])[1].item() == pytest.approx(math.log(65), abs=0.3)


def test_loss_is_the_cross_entropy_of_the_targets(gpt, idx):
    targets = idx.roll(-1, 1)
    logits, loss = gpt(idx, targets)
    picked = logits.log_softmax(-1).gather(2, targets[:, :, None])
    torch.testing.assert_close(loss, -picked.mean())
    assert logits.shape == (3, 16, 11)
    assert gpt(idx)[1] is None


@pytest.mark.parametrize("build", [GPT, Bigram])
@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_the_loss_without_logits_is_the_same_with_the_same_gradients(monkeypatch, build, sequences):
    """In parts, too, of which one has fewer targets than another, or none; of an undivided batch to the bit."""
    monkeypatch.setattr("model.MAX_LOGITS", sequences * 13 * 11)  # in memory at a time
    torch.manual_seed(0)
    model = build(GPTConfig(**SMALL))
    x, y = torch.randint(11, (2, 5, 13))
    y[:, :3] = y[1] = y[3, 5:] = -100  # sequences with 10, 0, 10, 2 and 10 targets
    found = []
    for need_logits in (True, False):
        logits, loss = model(x, y, need_logits)
        assert (logits is not None) == need_logits
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert found[0][0].isfinite()
    torch.testing.assert_close(*found, atol=1e-7, rtol=1e-5)
    assert sequences < 5 or all(map(torch.equal, *found))


def test_of_a_divided_batch_no_float32_softmax_is_kept_for_the_backward_pass(monkeypatch, gpt, idx):
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda it: it)
    for sequences in (3, 1):  # an undivided batch is not computed twice
        monkeypatch.setattr("model.MAX_LOGITS", sequences * 16 * 11)
        kept.clear()
        with torch.autocast("cpu", torch.bfloat16), hooks:
            gpt(idx, idx, need_logits=False)
        found = any(tensor.shape[-1:] == (11,) and tensor.dtype == torch.float32 for tensor in kept)
        assert found == (sequences == 3)


def test_a_head_that_is_padded_for_tensor_cores_gives_the_same_logits_and_gradients(monkeypatch, gpt, idx):
    widths, found, linear = [], [], F.linear
    monkeypatch.setattr("torch.nn.functional.linear", lambda *inputs: widths.append(len(inputs[1])) or linear(*inputs))
    for devices in ((), ("cpu",)):
        monkeypatch.setattr("model.TENSOR_CORES", devices)
        logits, loss = gpt(idx, idx)
        found.append([logits, *torch.autograd.grad(loss, list(gpt.parameters()))])
    torch.testing.assert_close(*found)
    gpt.lm_head(gpt.hidden(idx)[:, -1])  # of one token each, as in generation: not worth a copy
    assert widths[8::9] == [11, 64, 11]  # after four of each block


def test_the_model_needs_nothing_but_torch():
    source = Path(sys.modules["model"].__file__).read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"torch"}


# Generation


def plain_loop(model, idx, n, stride=1, pick=lambda logits: logits.argmax(-1, keepdim=True)):
    """The lecture's generate: crop, run, append. Of a full window, the oldest `stride` tokens go."""
    window = idx[:, -model.config.block_size :]
    for _ in range(n):
        if window.size(1) > model.config.block_size:
            window = window[:, stride:]
        token = pick(model(window)[0][:, -1])
        window, idx = torch.cat((window, token), dim=1), torch.cat((idx, token), dim=1)
    return idx


@pytest.mark.parametrize(
    ("parts", "prompt", "stride"),
    [(parts, 5, None) for parts in PARTS]
    + [({}, 1, 1), ({}, 16, 1), ({}, 30, 1), ({}, 16, 3), ({}, 16, 16), ({}, 30, None)],
)
def test_cached_text_equals_that_of_the_plain_loop(parts, prompt, stride):
    torch.manual_seed(0)
    model = lively(GPT(GPTConfig(**SMALL | parts)))
    idx = torch.randint(11, (2, prompt), generator=torch.Generator().manual_seed(2))
    text = model.generate(idx, 40, temperature=0, stride=stride)
    assert torch.equal(text, plain_loop(model, idx, 40, stride or 4))


def test_sampled_text_equals_that_of_the_plain_loop_with_the_same_generator(gpt, idx):
    chance = torch.Generator().manual_seed(5)
    expected = plain_loop(gpt, idx[:, :4], 12, pick=lambda logits: sample_token(logits, 1.0, 5, 0.9, chance))
    same, other = (
        gpt.generate(idx[:, :4], 12, top_k=5, top_p=0.9, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 6)
    )
    assert torch.equal(same, expected)
    assert not torch.equal(other, expected)


def test_generating_reads_each_token_once_and_keeps_no_graph(gpt, idx, monkeypatch):
    """With a graph for a backward pass, memory would grow with every token."""
    read, hidden = [], gpt.hidden
    monkeypatch.setattr(
        gpt, "hidden", lambda idx, *rest: read.append((idx.size(1), torch.is_grad_enabled())) or hidden(idx, *rest)
    )
    gpt.train().generate(idx[:, :4], 14)
    assert [n for n, _ in read] == [4] + 12 * [1] + [13]  # the prompt, one by one, and anew without the oldest 4
    assert not any(graph for _, graph in read)
    assert torch.is_grad_enabled()


def test_a_model_in_training_writes_without_dropout_stays_in_it_and_may_learn_from_its_text(idx):
    torch.manual_seed(0)
    gpt = lively(GPT(GPTConfig(**SMALL, dropout=0.5)))
    expected = gpt.generate(idx, 20, temperature=0)
    assert torch.equal(expected[:, :16], idx)
    assert gpt.generate(idx, 0).equal(idx)
    stream = gpt.train().stream(idx, 20, None, 0, None, None, None)
    first = next(stream)
    assert all(module.training for module in gpt.modules())
    gpt(expected[:, -16:].clone(), idx)[1].backward()
    assert gpt.transformer.wte.weight.grad.abs().sum() > 0
    assert torch.equal(torch.cat((idx, first, *stream), dim=1), expected)
    gpt(gpt.generate(idx, 60)[:, -16:], idx)[1].backward()


def test_writing_takes_the_models_own_parameters_and_calls_its_hooks(gpt, idx):
    layer, called = gpt.transformer.h[0].mlp.c_fc, []
    layer.register_forward_hook(lambda module, *_: called.append(module.weight is layer.weight))
    gpt.generate(idx[:, :1], 50)
    assert called == [True] * 50


@pytest.mark.parametrize(
    ("prompt", "choice", "message"),
    [
        (0, {}, "at least one token"),
        *((4, {"stride": stride}, r"stride must be from 1 to block_size \(16\)") for stride in (0, 17, -1)),
        *((4, choice, r"temperature must be at least 0, top_k at least 1, top_p from 0 to 1$")
          for choice in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": -0.1}, {"top_p": 1.1})),
    ],
)  # fmt: skip
def test_what_cannot_be_generated_is_refused(gpt, idx, prompt, choice, message):
    with pytest.raises(ValueError, match=message):
        gpt.generate(idx[:, :prompt], 1, **choice)


# Drawing


LOGITS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()[torch.tensor([3, 0, 4, 1, 2])]  # shuffled


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({}, [0.1, 0.5, 0.05, 0.2, 0.15]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.0308, 0.7692, 0.0077, 0.1231, 0.0692]),
        ({"top_k": 2}, [0, 5 / 7, 0, 2 / 7, 0]),
        ({"top_k": 99}, [0.1, 0.5, 0.05, 0.2, 0.15]),
        ({"top_p": 0.6}, [0, 5 / 7, 0, 2 / 7, 0]),
        ({"top_p": 0.75}, [0, 10 / 17, 0, 4 / 17, 3 / 17]),
        ({"top_p": 0.0}, [0, 1, 0, 0, 0]),
        ({"top_p": 1e-300}, [0, 1, 0, 0, 0]),  # 0 in float32
        ({"top_p": 1.0}, [0.1, 0.5, 0.05, 0.2, 0.15]),
        ({"top_k": 3, "top_p": 0.8}, [0, 5 / 7, 0, 2 / 7, 0]),  # 0.5 + 0.2 of 0.85 already hold 0.82
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(choices, expected):
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, "generator": torch.Generator().manual_seed(0)}
    drawn = sample_token(LOGITS.repeat(100_000, 1), **settings | choices)
    shares = (torch.bincount(drawn.flatten(), minlength=5) / 100_000).tolist()
    assert shares == pytest.approx(expected, abs=0.006)
    assert [share > 0 for share in shares] == [share > 0 for share in expected]


def test_logits_that_float16_cannot_hold_divided_still_name_the_likeliest_token():
    logits = torch.tensor([[60, 70, 69, 0]], dtype=torch.float16)  # by 0.001: above the largest number, 65,504
    for choice in ((None, None), (3, None), (None, 0.9)):
        assert sample_token(logits, 0.001, *choice, None).tolist() == [[1]]


def test_top_k_keeps_k_tokens_even_when_they_tie():
    drawn = sample_token(torch.zeros(1000, 5), 1.0, 2, None, torch.Generator().manual_seed(0))
    assert len(drawn.unique()) == 2


# The bigram table


def test_bigram_is_one_table_that_writes_past_block_size(idx):
    model = Bigram(GPTConfig(**SMALL))
    assert [p.shape for p in model.parameters()] == [(11, 11)]
    logits, loss = model(idx, idx.roll(-1, 1))
    assert torch.equal(logits, model.lm_head.weight[idx])
    assert loss.item() == pytest.approx(math.log(11), abs=0.1)
    with torch.no_grad():
        model.lm_head.weight.copy_(F.one_hot((torch.arange(11) + 1) % 11, 11).float() * 100)  # counts
    assert model.generate(torch.tensor([[4]]), 30)[0].tolist() == [(4 + i) % 11 for i in range(31)]


# A changed attention


class Rotary(model.CausalSelfAttention):
    """Rotary embeddings in a few lines (Su et al., 2021): q and k turn with the position."""

    def forward(self, x, position, cache=None):
        q, k, v = self.qkv(x)
        angles = position[:, None] / 100 ** torch.linspace(0, 1, q.size(-1) // 2)
        cos, sin = angles.cos(), angles.sin()
        q, k = (torch.cat((a * cos - b * sin, a * sin + b * cos), -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        if cache is not None:
            k, v = cache.extend(k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.size(1) > 1)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class WithoutCache(Rotary):
    def forward(self, x, position, cache=None):
        return super().forward(x, position)


def test_another_attention_samples_as_the_plain_loop_does_or_says_what_it_lacks(monkeypatch, idx):
    """It has another name, and rotary embeddings: the position reaches it."""
    torch.manual_seed(0)
    monkeypatch.setattr(model, "CausalSelfAttention", Rotary)
    gpt = lively(GPT(GPTConfig(**SMALL)))
    assert torch.equal(gpt.generate(idx[:, :3], 10, temperature=0), plain_loop(gpt, idx[:, :3], 10))
    monkeypatch.setattr(model, "CausalSelfAttention", WithoutCache)
    with pytest.raises(ValueError, match=r"^WithoutCache must extend its cache by the tokens that it reads$"):
        GPT(GPTConfig(**SMALL)).generate(idx, 2)
    with pytest.raises(ValueError, match="zip"):
        gpt.hidden(idx, caches=[])  # one for each block, not none
