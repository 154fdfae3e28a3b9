"""A real Llama (stories260K; skipped where it is absent) writes its known story here too."""

import hashlib
import json

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file

from mtp import ModelConfig, OwnHeads, Request, Transformer, generate

FOLDER = DATA / "stories260K" / "hf"
# Published with the model: sha256 of its 257 greedy ids from the id 1, joined by spaces.
STORY = "f21413726c22bdd07653e9fd959eb0ee4ddc03a2e4f5badd7412ab79cde1b190"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="MTP_TEST_DATA has no stories260K")


@pytest.fixture(scope="module")
def model() -> Transformer:
    c = json.loads((FOLDER / "config.json").read_text())
    config = ModelConfig(
        dim=c["hidden_size"],
        n_layers=c["num_hidden_layers"] + 3,
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        n_future_tokens=4,
        vocab_size=c["vocab_size"],
        hidden_dim=c["intermediate_size"],
        norm_eps=c["rms_norm_eps"],
        rope_theta=c["rope_parameters"]["rope_theta"],
        max_seq_len=c["max_position_embeddings"],
        tie_embeddings=c["tie_word_embeddings"],
    )
    model = Transformer(config, torch.Generator().manual_seed(0))
    theirs = load_file(FOLDER / "model.safetensors")
    ours = [*model.trunk, model.heads.heads[0]]  # the other heads stay random: drafts, not text
    with torch.no_grad():
        model.embedding.weight.copy_(theirs["model.embed_tokens.weight"])
        model.norm.weight.copy_(theirs["model.norm.weight"])
        for i, block in enumerate(ours):
            layer = {k.split(f"layers.{i}.")[1]: v for k, v in theirs.items() if f".{i}." in k}
            qkv = [layer[f"self_attn.{x}_proj.weight"] for x in "qkv"]
            block.wqkv.weight.copy_(torch.cat(qkv))
            block.wo.weight.copy_(layer["self_attn.o_proj.weight"])
            up = [layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]]
            block.w13.weight.copy_(torch.cat(up))
            block.w2.weight.copy_(layer["mlp.down_proj.weight"])
            block.attention_norm.weight.copy_(layer["input_layernorm.weight"])
            block.ffn_norm.weight.copy_(layer["post_attention_layernorm.weight"])
        if not c["tie_word_embeddings"]:
            model.output.weights[0].copy_(theirs["lm_head.weight"])
    return model


@pytest.mark.parametrize("drafter", [None, OwnHeads()], ids=["plain", "heads"])
def test_greedy_story_is_the_published_one(model: Transformer, drafter: OwnHeads | None) -> None:
    new = generate(model, [Request([1], max_new_tokens=256)], drafter)[0].tokens
    text = " ".join(map(str, [1, *new]))
    assert hashlib.sha256(text.encode()).hexdigest() == STORY
