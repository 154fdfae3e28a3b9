"""The transformer: equal to an independent one, cached or not; strict about its configuration."""

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, tiny

from mtp.decode.contract import chain
from mtp.model import ModelConfig, Transformer
from mtp.rotary import Rotary, rotate

N, SLOTS = 4, 24


def ids(rows, length, device, seed=0):
    return torch.randint(13, (rows, length), generator=torch.Generator().manual_seed(seed)).to(
        device
    )


def plain_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_rope(x, theta):
    """x (B, T, d): the pair (j, j + d/2) turns by t theta^(-2j/d); tables are fp32."""
    half = x.shape[-1] // 2
    turn = torch.arange(x.shape[1]).double()[:, None] * theta ** (
        -torch.arange(half).double() / half
    )
    turn = torch.complex(turn.cos().float().double(), turn.sin().float().double()).to(x.device)
    y = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn
    return torch.cat([y.real, y.imag], -1)


def plain_block(x, block, config):
    """One Llama block, head by head, from its weights."""
    d, h, g = config.head_dim, config.n_heads, config.kv_heads
    q, k, v = (
        plain_norm(x, block.attention_norm.weight, config.norm_eps) @ block.wqkv.weight.T
    ).split([h * d, g * d, g * d], -1)
    heads = []
    for i in range(h):
        j = i // (h // g)
        qi = plain_rope(q[..., i * d : (i + 1) * d], config.rope_theta)
        ki, vi = (
            plain_rope(k[..., j * d : (j + 1) * d], config.rope_theta),
            v[..., j * d : (j + 1) * d],
        )
        scores = (qi @ ki.mT / d**0.5).masked_fill(
            torch.ones(x.shape[1], x.shape[1], device=x.device).triu(1).bool(), -torch.inf
        )
        heads.append(scores.softmax(-1) @ vi)
    x = x + torch.cat(heads, -1) @ block.wo.weight.T
    gate, up = (plain_norm(x, block.ffn_norm.weight, config.norm_eps) @ block.w13.weight.T).chunk(
        2, -1
    )
    return x + (gate * gate.sigmoid() * up) @ block.w2.weight.T


def plain_trunk(model, tokens):
    z = model.embedding.weight[tokens]
    for block in model.trunk:
        z = plain_block(z, block, model.config)
    return z


def plain_model(model, tokens):
    """Logits (B, T, N, V) of a model with transformer heads."""
    config, z = model.config, plain_trunk(model, tokens)
    latents = [
        plain_norm(plain_block(z, head, config), model.norm.weight, config.norm_eps)
        for head in model.heads.heads
    ]
    return torch.stack(
        [x @ model.output.weights[i % len(model.output.weights)].T for i, x in enumerate(latents)],
        2,
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"n_kv_heads": None, "tie_embeddings": True},
        {
            "dim": 32,
            "n_heads": 4,
            "n_kv_heads": 2,
            "unembedding": "replicated",
            "rope_theta": 100.0,
            "norm_eps": 1e-2,
        },
        {"n_layers": 4, "hidden_dim": 20},
    ],
)
def test_logits_equal_an_independent_llama(overrides, device):
    model, tokens = tiny(**overrides).to(device), ids(2, 9, device)
    torch.testing.assert_close(
        model(tokens, return_all_heads=True), plain_model(model, tokens), rtol=0, atol=1e-10
    )


def test_sequential_heads_equal_ones_written_plainly(device):
    """DeepSeek-V3, section 2.2: each reads the token after those that the one before read."""
    model, tokens = tiny("sequential").to(device), ids(2, 9 + N - 1, device)
    eps = model.config.norm_eps
    hidden = plain_trunk(model, tokens)
    wanted = [hidden]
    for head in model.heads.heads[1:]:
        tokens, hidden = tokens[:, 1:], hidden[:, :-1]
        embedded = plain_norm(model.embedding.weight[tokens], head.enorm.weight, eps)
        both = torch.cat([embedded, plain_norm(hidden, head.hnorm.weight, eps)], -1)
        hidden = plain_block(both @ head.eh_proj.weight.T, head.block, model.config)
        wanted.append(hidden)
    wanted = [plain_norm(x[:, :9], model.norm.weight, eps) for x in wanted]
    wanted = torch.stack([x @ model.output.weights[0].T for x in wanted], 2)
    got = model(ids(2, 9 + N - 1, device), return_all_heads=True)[:, :9]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_grouped_queries_equal_repeated_keys_and_values(device):
    grouped = tiny(dim=32, n_heads=4, n_kv_heads=2).to(device)
    full = tiny(dim=32, n_heads=4, n_kv_heads=4).to(device)
    weights = grouped.state_dict()
    for name in [name for name in weights if name.endswith("wqkv.weight")]:
        q, k, v = weights[name].view(8, 8, 32).split([4, 2, 2])
        weights[name] = torch.cat(
            [q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)]
        ).flatten(0, 1)
    full.load_state_dict(weights)
    tokens = ids(2, 9, device)
    torch.testing.assert_close(grouped(tokens), full(tokens))


def test_rotation_depends_on_distance_only(device):
    rotary = Rotary(head_dim=8, theta=10000.0, positions=64)
    q, k = torch.randn(
        2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(device)

    def score(i, j):
        at = [rotary(torch.tensor([[p]], device=device)) for p in (i, j)]
        return float((rotate(q, at[0]) * rotate(k, at[1])).sum())

    assert score(7, 3) == pytest.approx(score(54, 50), abs=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


class Reader:
    """Feeds pieces of text through caches -> logits of every head (rows, columns, N, V). text: with
    the tokens that heads find ahead.
    """

    def __init__(self, model, text):
        self.model, self.text = model, text
        self.cache = model.new_cache(model.next_layers, len(text), SLOTS)
        self.rest = model.new_cache(model.rest_layers, len(text), SLOTS)

    @torch.no_grad()
    def __call__(self, tokens, starts, first_row=0):
        layout = chain(first_row, starts, tokens.shape[1], SLOTS, self.cache.k)
        first, memo = self.model.read(tokens, layout, self.cache)
        assert memo.shape[-1] == self.model.memo_dim

        def future(j):
            return self.model.embedding(self.text[layout.rows].gather(1, layout.positions + j))

        guessed = self.model.guess(memo, future, layout, self.rest, N)
        latents = [x.flatten(0, 1) for x in guessed]
        drafts = self.model.draft_logits(latents).unflatten(0, tokens.shape)
        return torch.cat([self.model.logits(first)[:, :, None], drafts], 2)


OVERRIDES = [{}, {"unembedding": "replicated"}]


@pytest.mark.parametrize("overrides", OVERRIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_reading_in_pieces_gives_the_uncached_logits(kind, overrides, device):
    model, text = tiny(kind, **overrides).to(device), ids(2, 14 + N, device)
    read, logits, at = Reader(model, text), [], 0
    for piece in (3, 1, 1, 4, 2, 3):
        logits.append(read(text[:, at : at + piece], [at, at]))
        at += piece
    truth = model(text, return_all_heads=True)[:, :14]
    torch.testing.assert_close(torch.cat(logits, 1), truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_share_a_pass(kind, device):
    model, text, lengths = tiny(kind).to(device), ids(3, 14 + N, device), [5, 1, 8]
    truth, read = model(text, return_all_heads=True), Reader(model, text)
    for row, length in enumerate(lengths):
        read(text[row : row + 1, :length], [0], first_row=row)
    for columns in (1, 4):
        piece = torch.stack(
            [text[row, length : length + columns] for row, length in enumerate(lengths)]
        )
        wanted = torch.stack(
            [truth[row, length : length + columns] for row, length in enumerate(lengths)]
        )
        torch.testing.assert_close(read(piece, lengths), wanted, rtol=0, atol=1e-10)
        lengths = [length + columns for length in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_rejected_columns_leave_no_trace(kind, device):
    model, text = tiny(kind).to(device), ids(2, 14 + N, device)
    wrong, read = (text + 1) % 13, Reader(model, text)
    truth = model(text, return_all_heads=True)
    read(text[:, :4], [0, 0])
    read(torch.cat([text[:, 4:5], wrong[:, 5:9]], 1), [4, 4])
    for row, columns in (
        (0, 2),
        (1, 1),
    ):  # shorter than what was rejected, so that rejected slots remain behind
        got = read(text[row : row + 1, 5 : 5 + columns], [5], first_row=row)
        torch.testing.assert_close(got, truth[row : row + 1, 5 : 5 + columns], rtol=0, atol=1e-10)
    got = read(torch.stack([text[0, 7:9], text[1, 6:8]]), [7, 6])
    torch.testing.assert_close(got, torch.stack([truth[0, 7:9], truth[1, 6:8]]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_row_continues_like_its_source(kind, device):
    model, text = tiny(kind).to(device), ids(1, 9 + N, device)
    read = Reader(model, text.expand(3, -1))
    read(text[:, :6], [0], first_row=0)
    for cache in (read.cache, read.rest):
        cache.copy(0, 2, 6)
    got = read(text[:, 6:9], [6], first_row=2)
    truth = model(text, return_all_heads=True)[:, 6:9]
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-10)


def test_more_columns_than_slots_are_refused():
    with pytest.raises(ValueError, match="9 slots are needed but the cache has 8"):
        chain(0, [7, 0], 2, 8, torch.zeros(()))


def test_rotary_table_stays_fp32_in_a_bf16_model(device):
    model, tokens = tiny().float().to(device), ids(2, 60, device)
    wanted = model(tokens)
    logits = model.to(torch.bfloat16)(tokens)
    assert logits.dtype == torch.bfloat16
    assert model.rotary.table.dtype == torch.float32
    assert (
        logits.float() - wanted
    ).norm() < 0.05 * wanted.norm()  # a few of bf16's roundings of 2^-8


def test_tokens_beyond_the_context_are_refused(device):
    model = tiny(max_seq_len=8).to(device)
    assert model(ids(1, 8, device)).shape == (1, 8, 13)
    with pytest.raises(ValueError, match="9 tokens exceed max_seq_len=8"):
        model(ids(1, 9, device))


def test_slots_beyond_the_context_have_positions_of_their_own(device):
    short, long = tiny(max_seq_len=8).to(device), tiny(max_seq_len=96).to(device)
    tokens = ids(1, 12, device)
    read = Reader(short, tokens)(tokens, [0])
    torch.testing.assert_close(read, long(tokens, return_all_heads=True))


def test_weights_are_a_function_of_the_generator():
    config = tiny().config
    first, again, other = (
        Transformer(config, torch.Generator().manual_seed(seed)).state_dict() for seed in (5, 5, 6)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].ndim > 1)


def test_weights_have_the_documented_scale():
    config = ModelConfig(dim=64, n_layers=8, n_heads=4, multiple_of=64, vocab_size=500)
    for name, weight in Transformer(config, torch.Generator().manual_seed(0)).state_dict().items():
        if weight.ndim == 1:
            assert (weight == 1).all()
            continue
        wanted = weight.shape[1] ** -0.5 / (
            4 if name.endswith(("wo.weight", "w2.weight")) else 1
        )  # (2 n_layers)^1/2 = 4
        assert weight.abs().max() <= 3 * wanted
        assert float(weight.std()) == pytest.approx(
            wanted, rel=0.08
        )  # 4096 numbers or more: 1 % each side, 1.3 % cut off


def test_tied_embedding_is_one_parameter():
    model = tiny(tie_embeddings=True)
    assert model.output.weights[0] is model.embedding.weight
    untied = sum(p.numel() for p in tiny().parameters())
    assert sum(p.numel() for p in model.parameters()) == untied - 13 * 16


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        *(
            ({key: 0}, f"{key}=0 must be at least 1")
            for key in ("dim", "n_layers", "n_heads", "vocab_size", "max_seq_len")
        ),
        *(
            ({key: -1}, f"{key}=-1 must be at least 1")
            for key in ("n_future_tokens", "multiple_of")
        ),
        (
            {"head": "medusa"},
            "head='medusa' is unknown: allowed are " + ", ".join(KINDS),
        ),
        ({"unembedding": "own"}, "unembedding='own' is unknown: allowed are shared, replicated"),
        ({"dim": 18, "n_heads": 4}, "dim=18 must split into n_heads=4 heads of even width"),
        ({"dim": 12, "n_heads": 4}, "dim=12 must split into n_heads=4 heads of even width"),
        ({"n_kv_heads": 3}, "n_heads=4 must be a multiple of n_kv_heads=3"),
        ({"n_layers": 3}, "n_layers=3 must be at least n_future_tokens=4"),
        (
            {"tie_embeddings": True, "unembedding": "replicated"},
            "tie_embeddings=true needs unembedding=shared",
        ),
    ],
)
def test_impossible_configurations_are_refused_by_name(overrides, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**overrides)


def test_feed_forward_width_is_rounded_up_unless_given():
    assert ModelConfig(dim=96, multiple_of=100).ffn_dim == 300
    assert ModelConfig(dim=96, multiple_of=128).ffn_dim == 256
    assert ModelConfig(dim=96, hidden_dim=77).ffn_dim == 77


def test_attention_works_under_autocast(device):
    model, tokens = tiny().float().to(device), ids(2, 9, device)
    wanted = model(tokens)
    with torch.autocast(device.type, torch.bfloat16):
        loss = F.mse_loss(model(tokens).float(), wanted)
    assert loss < 1e-3 * wanted.square().mean()
