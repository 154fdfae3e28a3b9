"""One contract for all head kinds: what each reads and costs; one head is a language model."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BLOCK_KINDS, KINDS, tiny

from mtp.loss import mtp_loss

N = 4
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])

# READS[kind][i][j]: head i's output depends on head j's parameters.
EYE = torch.eye(N, dtype=torch.bool)
READS = {
    "transformer": EYE,
    "linear": EYE,
    "residual": EYE
    & ~torch.eye(N, 1, dtype=torch.bool),  # head 1 is the trunk's output: it has no parameters
    "identity": torch.zeros(N, N, dtype=torch.bool),
    "causal": torch.ones(N, N, dtype=torch.bool).tril(),
    "anticausal": torch.ones(N, N, dtype=torch.bool).triu(),
    "sequential": torch.ones(N, N, dtype=torch.bool).tril() & ~torch.eye(N, 1, dtype=torch.bool),
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_each_head_reads_the_heads_of_its_kind_and_no_others(kind, device):
    model = tiny(kind).to(device)
    logits = model(TOKENS.to(device), return_all_heads=True)
    for i in range(N):
        for j, head in enumerate(model.heads.heads):
            ends = list(head.parameters())
            grads = (
                torch.autograd.grad(
                    logits[:, :, i].square().sum(), ends, allow_unused=True, retain_graph=True
                )
                if ends
                else []
            )
            read = [g is not None and bool(g.any()) for g in grads]
            assert read == [bool(READS[kind][i, j])] * len(ends)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", range(N))
def test_no_head_sees_later_tokens_and_all_see_every_earlier_one(kind, head, device):
    """Earlier than the one it predicts if it reads ahead, else up to its place."""
    model, row = tiny(kind).to(device), torch.tensor([7, 1, 12, 3, 0, 9, 4, 11, 5], device=device)
    logits = model(row[None], return_all_heads=True)
    for t in range(len(row) - N):
        score = logits[:, t, head].square().sum()
        (grad,) = torch.autograd.grad(score, model.embedding.weight, retain_graph=True)
        reached = grad[row].abs().sum(-1) > 0  # tokens differ: each has a row of its own
        end = t + 1 + (head if model.reads_ahead else 0)
        assert reached[:end].all() and not reached[end:].any()


def test_beyond_the_end_heads_that_read_ahead_find_their_own_choices(device):
    model = tiny("sequential", gain=1.4).to(device)
    text, length = TOKENS.to(device), TOKENS.shape[1]
    logits = model(text, return_all_heads=True)
    for head in range(N):
        chosen = logits[:, -1:, head].argmax(-1)
        text = torch.cat([text, chosen], 1)
    wanted = model(text, return_all_heads=True)[:, :length]
    torch.testing.assert_close(logits, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overrides", [{}, {"unembedding": "replicated"}, {"tie_embeddings": True}])
def test_all_heads_have_logits_and_the_first_is_the_default(kind, overrides, device):
    model, tokens = tiny(kind, **overrides).to(device), TOKENS.to(device)
    logits = model(tokens, return_all_heads=True)
    assert logits.shape == (*tokens.shape, N, model.config.vocab_size)
    torch.testing.assert_close(model(tokens), logits[:, :, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_replicated_unembedding_gives_each_head_its_own_matrix(kind, device):
    model = tiny(kind, unembedding="replicated").to(device)
    logits = model(TOKENS.to(device), return_all_heads=True)
    for i in range(N):
        grads = torch.autograd.grad(
            logits[:, :, i].square().sum(),
            list(model.output.weights),
            retain_graph=True,
            allow_unused=True,
        )
        assert [bool(g.any()) for g in grads] == [i == j for j in range(N)]


@pytest.mark.parametrize("kind", KINDS)
def test_one_future_token_is_next_token_training(kind, device):
    model, row = tiny(kind, n_future_tokens=1).to(device), TOKENS.to(device)
    loss, means = mtp_loss(model, row)
    wanted = F.cross_entropy(model(row[:, :-1]).flatten(0, 1), row[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(means, wanted.detach()[None])


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_one_future_token_is_a_plain_stack_of_blocks(kind, device):
    plain, model = (
        tiny("residual", n_future_tokens=1).to(device),
        tiny(kind, n_future_tokens=1).to(device),
    )
    weights = {
        name.replace("heads.heads.0", "trunk.4"): value
        for name, value in model.state_dict().items()
    }
    plain.load_state_dict(weights)
    torch.testing.assert_close(model(TOKENS.to(device)), plain(TOKENS.to(device)))


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_block_heads_are_taken_from_the_trunk_so_size_does_not_grow_with_n(kind):
    assert len({parameters(tiny(kind, n_future_tokens=n)) for n in (1, 2, 4)}) == 1


def test_sequential_heads_add_blocks_maps_and_norms_to_a_whole_trunk():
    model = tiny("sequential")
    dim, (trunk, *_, last) = model.config.dim, model.blocks
    assert len(model.trunk) == model.config.n_layers
    assert parameters(last) == parameters(trunk) + 2 * dim**2 + 2 * dim
    assert parameters(model) == parameters(tiny("transformer")) + (N - 1) * parameters(last)


@pytest.mark.parametrize(("kind", "maps"), [("linear", N), ("residual", N - 1)])
def test_map_heads_add_their_maps_to_a_whole_trunk(kind, maps):
    model = tiny(kind)
    assert len(model.trunk) == model.config.n_layers
    assert parameters(model) == parameters(tiny("transformer")) + maps * model.config.dim**2


def test_fresh_residual_heads_repeat_the_next_token_head(device):
    model = tiny("residual").to(device)
    model.init_weights(torch.Generator(device).manual_seed(0))
    logits = model(TOKENS.to(device), return_all_heads=True)
    torch.testing.assert_close(logits, logits[:, :, :1].expand_as(logits))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_the_next_token_and_of_drafts_are_all_attention_layers(kind):
    model = tiny(kind)
    attention = sum(name.endswith("wqkv") for name, _ in model.named_modules())
    assert model.next_layers + model.rest_layers == attention
    alone = kind in ("transformer", "causal", "sequential")
    assert model.rest_layers == (N - 1 if alone else 0)
