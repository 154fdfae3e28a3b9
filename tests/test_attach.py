"""Heads that are attached to a finished model learn alone, draft, and leave its text as it was."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from conftest import tiny  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_decode import (  # noqa: E402
    FEW,
    LEADS,
    SAMPLINGS,
    VOCAB,
    Compared,
    samples_of_one_prompt,
    some_prompts,
    some_requests,
    texts,
    truths,
)
from test_interop import tiny_of  # noqa: E402
from torch import nn  # noqa: E402

from mtp.decode.contract import Request  # noqa: E402
from mtp.decode.drafters import OwnHeads  # noqa: E402
from mtp.decode.loop import generate  # noqa: E402
from mtp.interop.attach import (  # noqa: E402
    CONFIG,
    KINDS,
    WEIGHTS,
    attach_heads,
    load_heads,
    save_heads,
)
from mtp.interop.huggingface import CausalLM  # noqa: E402
from mtp.interop.medusa import save_medusa  # noqa: E402
from mtp.loss import MultiTokenLoss, future_targets, mtp_loss, plain_batch  # noqa: E402
from mtp.optim import OptimConfig, Optimizer  # noqa: E402
from mtp.train import TrainConfig, train, validate  # noqa: E402

N = 4
TRUNKS = {  # name -> a fresh one
    "ours": lambda: tiny(n_future_tokens=1, n_layers=2, gain=1.4),
    "ours with heads": lambda: tiny("anticausal", n_layers=5, gain=1.4),
    "llama": lambda: CausalLM(tiny_of("llama")),
    "gpt2": lambda: CausalLM(tiny_of("gpt2")),
}


def attached(trunk, kind, spread=0.3):
    """Heads that guess this and that; spread=0 leaves them fresh."""
    model = attach_heads(TRUNKS[trunk]() if isinstance(trunk, str) else trunk, N, kind)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * spread)
    return model


def module_of(model):
    trunk = model.trunk.model
    return trunk if isinstance(trunk, nn.Module) else trunk.model


@cache
def usual_truths(trunk, sampling):
    return truths(TRUNKS[trunk](), some_requests(stop=False), SAMPLINGS[sampling])


class OwnTexts:
    """Rows of what a model itself writes: the same ones again and again."""

    def __init__(self, rows):
        self.rows = rows

    def __next__(self):
        return plain_batch(self.rows)


def own_texts(trunk, length=24):
    requests = [Request(prompt[:1], length) for prompt in some_prompts(6)]
    wrote = texts(generate(trunk, requests, batch_size=6))
    rows = [[*r.prompt, *new] for r, new in zip(requests, wrote, strict=True)]
    return OwnTexts(torch.tensor(rows))


def settings(steps, lr=0.01):
    return TrainConfig(steps=steps, log_every=steps, optim=OptimConfig(lr=lr, warmup_steps=1))


def trained(trunk, kind, steps=60, hooks=()):
    model = attach_heads(trunk, N, kind)
    train(model, own_texts(trunk), MultiTokenLoss(N), settings(steps), hooks=hooks)
    return model


@pytest.mark.parametrize("sampling", ["greedy", "top-k"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_text_is_that_of_the_trunk_alone(trunk, kind, sampling):
    model, requests = attached(trunk, kind), some_requests(stop=False)
    truth = usual_truths(trunk, sampling)
    tree = None if model.reads_ahead else 5
    for count, batch_size, drafter in (
        (2, 1, OwnHeads()),
        (7, 3, OwnHeads()),
        (4, 3, OwnHeads(2, tree=tree, vocabulary=FEW)),
    ):
        got = generate(model, requests[:count], drafter, SAMPLINGS[sampling], batch_size=batch_size)
        assert texts(got) == truth[:count]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trunk", ["ours", "gpt2"])
def test_proposals_are_those_of_fresh_heads_that_read_from_the_start(trunk, kind, batch_size):
    base = TRUNKS[trunk]()
    model = attached(base if trunk == "ours" else CausalLM(base.model.double()), kind)
    requests = [*samples_of_one_prompt(4), *some_requests(stop=False)[:3]]
    truth = truths(model, requests)
    drafter = Compared(LEADS["chains"](requests, truth), OwnHeads)
    assert texts(generate(model, requests, drafter, batch_size=batch_size)) == truth
    assert drafter.compared > 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_guesses_are_what_training_scored(trunk, kind):
    """Else heads would learn one thing and be asked another."""
    model, prompt = attached(trunk, kind), [1, 5, 2, 7, 7, 3]
    guessed, texts = [], []

    class Watched(OwnHeads):
        def propose(self, state, k):
            texts.append(state.text[0, : state.length[0] + 1])
            return super().propose(state, k)

        def _logits(self, latents, *skipped):
            guessed.append(super()._logits(latents, *skipped)[0])
            return guessed[-1][None]

    generate(model, [Request(prompt, N + 1)], Watched())
    guesses = torch.cat(guessed)[: N - 1]
    row = torch.cat([texts[0], guesses.argmax(-1)])[None]  # as the first step has it
    scored = []

    def score(fns, inputs, weights, params):
        latents = [fn(x)[0, -1] for fn, x in zip(fns, inputs, strict=True)]
        scored.extend(F.linear(latent, weights[0]) for latent in latents)

    model(row, score=score)
    torch.testing.assert_close(torch.stack(scored[1:]), guesses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scored[0], model(row[:, :-N])[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_fresh_heads_repeat_the_next_token_head(trunk, kind):
    model = attached(trunk, kind, spread=0)
    loss = MultiTokenLoss(N, score=lambda fns, inputs, *_: latents.extend(inputs) or (0, empty))
    latents, empty = [], torch.zeros(N, 2, 6)
    batch = plain_batch(torch.randint(VOCAB, (2, 6 + N)))
    loss(model, batch, loss.count(batch))
    if kind != "sequential":
        assert all(torch.equal(x, latents[0]) for x in latents[1:])
    for x in latents[1:]:  # norms have an epsilon; what is not known of the trunk's is its scale
        scale = (latents[0].norm(dim=-1) / x.norm(dim=-1))[..., None]
        torch.testing.assert_close(scale * x, latents[0], rtol=2e-3, atol=2e-3)
        assert "ours" not in trunk or (scale - 1).abs().max() < 2e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trunk", ["ours", "gpt2"])
def test_gradients_are_those_of_a_loss_written_plainly(trunk, kind):
    base = TRUNKS[trunk]()
    model = attached(base if trunk == "ours" else CausalLM(base.model.double()), kind)
    batch, objective = plain_batch(torch.randint(VOCAB, (3, 9 + N))), MultiTokenLoss(N)
    loss, metrics = objective(model, batch, objective.count(batch))
    (2 * loss).backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    tokens, (targets, _) = batch.row[:, :-N], future_targets(batch, N)
    if trunk == "ours":
        z = base.embedding(tokens)
        for block in (*base.trunk, base.heads.heads[0]):
            z = block(z, base.rotary(torch.arange(9)), None)
        x, matrix = base.norm(z).detach(), base.output.weights[0]
    else:
        theirs = base.model.transformer(tokens)
        x, matrix = theirs.last_hidden_state.detach(), base.model.lm_head.weight
    at = None if kind == "residual" else model.rotary(torch.arange(9))
    plain = F.cross_entropy((x @ matrix.T).flatten(0, 1), targets[0].flatten())
    embedded = model.embedding(batch.row).detach()
    scale = base.norm.weight.detach() if (trunk, kind) == ("ours", "sequential") else 1
    x = x / scale
    for i, head in enumerate(model.heads.heads[1:], 1):
        ahead = [embedded[:, i : i + 9]] if kind == "sequential" else []
        latent = head(x, *ahead, at, None)
        logits = (latent * scale) @ matrix.T
        plain = plain + F.cross_entropy(logits.flatten(0, 1), targets[i].flatten())
        x = latent if kind in ("causal", "sequential") else x
    (2 * plain).backward()
    torch.testing.assert_close(loss, plain.detach())
    for name, p in model.named_parameters():
        assert p.grad.any()
        torch.testing.assert_close(got[name], p.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trunk", ["ours", "llama"])
def test_training_learns_and_leaves_the_trunk_alone(trunk, kind, monkeypatch):
    base = TRUNKS[trunk]()
    fresh, data, prompt = attach_heads(base, N, kind), own_texts(base), torch.tensor([[1, 2, 3]])
    module, logits = module_of(fresh), base(prompt)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    read, graphs = base.read, []

    def watched(*words):
        latent, memo = read(*words)
        graphs.append(latent.requires_grad)
        return latent, memo

    monkeypatch.setattr(base, "read", watched)
    first = validate(fresh, [next(data)], N, 1.0)
    model = trained(base, kind)
    assert graphs and not any(graphs)
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    assert torch.equal(logits, base(prompt)) and torch.equal(logits, model(prompt))

    last = validate(model, [next(data)], N, 1.0)
    for i in range(2, N + 1):
        assert last[f"val_loss_{i}"] < 0.8 * first[f"val_loss_{i}"]
    assert last["val_loss_1"] == first["val_loss_1"]
    assert last["val_acceptance_length"] > first["val_acceptance_length"]
    requests = [Request(row[:1].tolist(), 24) for row in data.rows]
    steps = [sum(c.steps for c in generate(m, requests, OwnHeads())) for m in (model, fresh)]
    assert steps[0] < steps[1]


@pytest.mark.parametrize("trunk", ["ours", "llama"])
def test_the_loss_of_ones_own_loop_knows_how_many_heads_are_attached(trunk):
    _, means = mtp_loss(attached(trunk, "residual"), torch.arange(6)[None])
    assert means.shape == (N,)


def test_the_optimizer_knows_heads_alone():
    model = trained(TRUNKS["llama"](), "residual", steps=1)
    names = {name.rpartition(".")[0] for name in Optimizer(model, OptimConfig()).names.values()}
    assert names == {f"heads.heads.{i}.proj" for i in (1, 2, 3)}


@pytest.mark.parametrize("trunk", ["ours", "llama"])
def test_what_a_frozen_trunk_says_does_not_hang_on_the_precision_of_training(trunk):
    model = attach_heads(TRUNKS[trunk](), N, "transformer").float()
    tokens = torch.arange(24).view(2, 12) % VOCAB
    with torch.autocast("cpu", torch.bfloat16):
        states = model.states(tokens)
    assert torch.equal(states, model.states(tokens))
    train(
        model,
        own_texts(TRUNKS[trunk]()),
        MultiTokenLoss(N),
        replace(settings(2), precision="bfloat16"),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_a_half_precision_trunk_learn_in_full_precision(kind):
    base = CausalLM(tiny_of("llama").bfloat16())
    model = attach_heads(base, N, kind).float()
    data = own_texts(base)
    with pytest.raises(ValueError, match=r"heads are torch.float32.*torch.bfloat16"):
        generate(model, [Request([1], 3)], OwnHeads())
    first = validate(model, [next(data)], N, 1.0)
    train(model, data, MultiTokenLoss(N), settings(20))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert validate(model, [next(data)], N, 1.0)["val_loss_2"] < first["val_loss_2"]
    requests = some_requests(stop=False)
    assert texts(generate(model.bfloat16(), requests, OwnHeads())) == truths(base, requests)


@pytest.mark.parametrize("trunk", ["ours", "llama"])
def test_a_packed_copy_writes_the_same_text(trunk, tmp_path):
    """In fp32: there is no packed fp64."""
    base = TRUNKS[trunk]()
    base = base.float() if trunk == "ours" else base
    requests = some_requests(stop=False)[:3]
    truth = truths(base, requests)
    for kind in KINDS:
        packed = attached(base, kind).packed()
        assert packed.output.packed
        assert texts(generate(packed, requests, OwnHeads(), batch_size=3)) == truth
        some = OwnHeads(vocabulary=FEW)
        assert texts(generate(packed, requests, some, batch_size=3)) == truth
        with pytest.raises(ValueError, match="packed copy only decodes"):
            save_heads(packed, tmp_path / "heads")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_heads_are_saved_alone_and_come_back(trunk, kind, tmp_path):
    base = TRUNKS[trunk]()
    model = attached(base, kind)
    folder = save_heads(model, tmp_path / "heads")
    assert {file.name for file in folder.iterdir()} == {CONFIG, WEIGHTS}
    stored = sum(t.numel() for t in load_file(folder / WEIGHTS).values())
    assert stored == sum(p.numel() for p in model.parameters())
    loaded = load_heads(TRUNKS[trunk](), folder)
    parameters = dict(loaded.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, parameters[name])
    request = Request([1, 2, 3], 20)
    old, new = (generate(m, [request], OwnHeads())[0] for m in (model, loaded))
    assert old == new
    with pytest.raises(FileExistsError):
        save_heads(model, folder)


def test_heads_come_back_in_the_type_of_their_trunk(tmp_path):
    folder = save_heads(attached("llama", "residual"), tmp_path / "heads")
    half = load_heads(CausalLM(tiny_of("llama").bfloat16()), folder)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_heads_refuse_another_trunk(tmp_path):
    folder = save_heads(attached("llama", "residual"), tmp_path / "heads")
    with pytest.raises(
        ValueError, match=r"heads\.json: .*another trunk: architecture='Llama.*GPT2"
    ):
        load_heads(TRUNKS["gpt2"](), folder)
    retrained = tiny_of("llama", seed=1)
    with pytest.raises(ValueError, match=r"another trunk: fingerprint='\w+', here '\w+'"):
        load_heads(CausalLM(retrained), folder)
    assert load_heads(CausalLM(retrained), folder, realign=True).extra_heads == N - 1
    wider = CausalLM(tiny_of("llama", vocab_size=VOCAB + 1))
    with pytest.raises(ValueError, match=f"vocab_size={VOCAB}, here {VOCAB + 1}"):
        load_heads(wider, folder, realign=True)


def test_a_damaged_folder_is_refused_by_name(tmp_path):
    base = TRUNKS["llama"]()
    with pytest.raises(FileNotFoundError, match=r"heads\.json is missing"):
        load_heads(base, tmp_path)
    folder = save_heads(attached(base, "residual"), tmp_path / "heads")
    weights = load_file(folder / WEIGHTS)
    save_file({"surplus": torch.zeros(1), **weights}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"heads\.safetensors does not fit(?s:.*)surplus"):
        load_heads(base, folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"heads\.safetensors does not fit"):
        load_heads(base, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"format_version": 9}))
    with pytest.raises(ValueError, match="format version 9"):
        load_heads(base, folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"heads\.json is damaged"):
        load_heads(base, folder)


def test_what_cannot_be_attached_is_refused_by_name():
    base = TRUNKS["llama"]()
    with pytest.raises(ValueError, match="n=1 must be at least 2"):
        attach_heads(base, 1)
    with pytest.raises(ValueError, match=r"kind='linear' is unknown: allowed are residual"):
        attach_heads(base, 2, "linear")
    odd = CausalLM(tiny_of("qwen3", head_dim=12))
    with pytest.raises(ValueError, match="no block of width 16 has 1 key heads of 12"):
        attach_heads(odd, 2, "transformer")
    assert attach_heads(odd, 2, "residual").extra_heads == 1
    biased = tiny_of("llama")
    biased.lm_head.bias = nn.Parameter(torch.ones(VOCAB))
    with pytest.raises(ValueError, match="without bias"):
        attach_heads(CausalLM(biased), 2)
    with pytest.raises(ValueError, match="exceed max_seq_len=64"):
        attach_heads(base, 2)(torch.zeros(1, 70).long(), score=print)


def read_medusa(folder, hidden):
    """Logits (heads, ..., V) as the layout's definition has them: each block adds SiLU of its
    layers, all share lm_head, and token_map says which ids its rows stand for.
    """
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    assert config["model_type"] == "medusa" and config["architectures"] == ["MedusaModel"]
    assert config["original_lm_head"] and not config["medusa_fc_bias"]
    # Its reader takes any key with these two words for the number of heads.
    assert [key for key in config if "num" in key and "heads" in key] == ["num_heads"]
    lm_head = weights.pop("lm_head.weight")
    ids = weights.pop("token_map", torch.arange(config["vocab_size"]))
    assert lm_head.shape == (config["truncated_vocab_size"], config["hidden_size"])
    logits = torch.full((config["num_heads"], *hidden.shape[:-1], config["vocab_size"]), -torch.inf)
    for i in range(config["num_heads"]):
        x = hidden
        for layer in range(config["num_hidden_layers"]):
            x = x + F.silu(x @ weights.pop(f"blocks.{i}.layers.{layer}.weight").T)
        logits[i][..., ids] = x @ lm_head.T
    assert not weights
    return logits


@pytest.mark.parametrize("vocabulary", [None, FEW])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_medusa_heads_guess_the_same_elsewhere(family, vocabulary, tmp_path):
    model = attached(family, "residual")
    folder = save_medusa(model, tmp_path / "medusa", vocabulary)
    prompt = [1, 5, 2, 7, 3]
    hidden = module_of(model).base_model(torch.tensor([prompt])).last_hidden_state[0, -1]
    best = read_medusa(folder, hidden).argmax(-1)
    state = []

    class Watched(OwnHeads):
        def propose(self, *words):
            state.append(super().propose(*words))
            return state[-1]

    generate(model, [Request(prompt, 2 * N)], Watched(vocabulary=vocabulary))
    assert state[0].tokens[0].tolist() == best.tolist()


def test_medusa_has_heads_of_one_kind(tmp_path):
    with pytest.raises(ValueError, match="kind='causal' is no Medusa head: allowed is residual"):
        save_medusa(attached("llama", "causal"), tmp_path / "medusa")
    with pytest.raises(ValueError, match="vocabulary has token ids outside"):
        save_medusa(attached("llama", "residual"), tmp_path / "medusa", [VOCAB])
    assert not (tmp_path / "medusa").exists()


def test_the_command_writes_attached_heads_of_others_models(tmp_path):
    scripts = pytest.importorskip("scripts.convert")
    model, places = attached("gpt2", "residual"), [str(tmp_path / x) for x in ("trunk", "heads")]
    trunk, heads = places
    module_of(model).save_pretrained(trunk)
    save_heads(model, heads)
    (tmp_path / "few.json").write_text(json.dumps(FEW))
    given = scripts.ConvertConfig("causal_lm", trunk, "medusa", str(tmp_path / "out"), heads=heads)
    scripts.convert(replace(given, vocabulary=str(tmp_path / "few.json")))
    wrote = load_file(tmp_path / "out/model.safetensors")
    wanted = load_file(save_medusa(model, tmp_path / "direct", FEW) / "model.safetensors")
    assert wrote.keys() == wanted.keys()
    assert all(torch.equal(t, wanted[name]) for name, t in wrote.items())
    scripts.convert(replace(given, out_format="speculative", out=str(tmp_path / "with code")))
    assert (tmp_path / "with code/custom_generate/heads.safetensors").is_file()


def small_folder(folder):
    """A byte-level tokenizer and a random Llama of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
    theirs = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=theirs, eos_token="<end>").save_pretrained(folder)
    tiny_of("llama", vocab_size=len(pieces), spread=0.1).save_pretrained(folder)
    return folder
