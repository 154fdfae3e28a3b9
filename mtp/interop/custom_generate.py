"""Decoding with this folder's heads: several tokens per pass, and the text that the model alone
would write, greedy or sampled.

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generate(ids, custom_generate=folder, trust_remote_code=True)

Heads guess what follows (Gloeckle et al. 2024; Cai et al. 2024), the model reads its last token and
the guesses at once, and a guess stays if it is the token that the model itself chooses there. One
text at a time; transformers alone is needed.

Letters: T new tokens of a pass, K guesses, D width, V vocabulary.
"""

import json
from functools import partial
from inspect import signature
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel
from transformers.utils import cached_file

OPENED: WeakKeyDictionary = WeakKeyDictionary()  # model -> its heads


def generate(inputs=None, *, model, streamer=None, assistant_model=None, **kwargs):
    """As `model.generate`, which prepares everything but the decoding."""
    if assistant_model is not None:
        raise ValueError("assistant_model: the heads draft, leave it out")
    return type(model).generate(
        model,
        inputs,
        custom_generate=partial(decode, streamer=streamer),
        streamer=streamer,
        **kwargs,
    )


def decode(
    model,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    streamer=None,
    **model_kwargs,
):
    """input_ids (1, T) -> the whole text (1, T')."""
    cache: DynamicCache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    refuse(input_ids, generation_config, cache, model_kwargs.get("attention_mask"))
    heads, text, guesses = heads_of(model), input_ids, input_ids[:, :0]
    heads.forget()
    while True:
        read = cache.get_seq_length()
        new = torch.cat([text[:, read:], guesses], 1)
        logits, hidden = heads.watch(model, new, cache, 1 + guesses.shape[1])
        for i in range(1 + guesses.shape[1]):
            scores = logits_processor(text, logits[:, i].float())
            token = choose(scores, generation_config.do_sample)
            text = torch.cat([text, token], 1)
            if streamer is not None:
                streamer.put(token[0].cpu())
            if stopping_criteria(text, scores).all():
                return end(text, streamer)
            if i < guesses.shape[1] and token != guesses[:, i]:
                break
        cache.crop(text.shape[1] - 1 - read - new.shape[1])  # refused guesses
        room = generation_config.max_length - text.shape[1] - 1
        guesses = heads.guess(model, hidden[:, : text.shape[1] - 1 - read])[:, : max(0, room)]


def refuse(input_ids, generation_config, cache, attention_mask):
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"{input_ids.shape[0]} texts at once (batch, num_beams or num_return_sequences): "
            f"decoding with heads takes one"
        )
    if attention_mask is not None:
        raise ValueError("attention_mask hides tokens: decoding with heads takes none that does")
    if type(cache) is not DynamicCache or cache.get_seq_length():
        raise ValueError(
            "decoding with heads takes an empty DynamicCache: leave cache, past_key_values, "
            "cache_implementation and use_cache unset"
        )
    if generation_config.return_dict_in_generate:
        raise ValueError("return_dict_in_generate=True: decoding with heads returns the text alone")


def choose(scores, sample):
    """Scores (1, V) -> a token (1, 1), as plain decoding chooses it from equal random numbers."""
    return torch.multinomial(scores.softmax(-1), 1) if sample else scores.argmax(-1, keepdim=True)


def end(text, streamer):
    if streamer is not None:
        streamer.end()
    return text


def cache_word(kind):
    """The keyword for the cache of a kind of model: `cache` from transformers 5.24 on."""
    return "cache" if "cache" in signature(kind.forward).parameters else "past_key_values"


class Residual(nn.Linear):
    def forward(self, x):
        return x + F.silu(super().forward(x))


class Block(nn.Module):
    """A Llama's layer with keys and values of its own."""

    def __init__(self, config):
        super().__init__()
        self.layer, self.cache = LlamaModel(config), DynamicCache()
        self.word = cache_word(LlamaModel)
        self.layer.embed_tokens, self.layer.norm = None, nn.Identity()

    def forward(self, x):
        return self.layer(inputs_embeds=x, **{self.word: self.cache}).last_hidden_state


class Heads(nn.Module):
    """Heads 2..n; head 1 is the model itself. `kind` and the rest are told by heads.json."""

    def __init__(self, kind, heads, reads, norm, width, block):
        super().__init__()
        self.chained, self.reads, self.norm = kind == "causal", reads, norm
        if kind == "residual":
            self.heads = nn.ModuleList(Residual(width, width, bias=False) for _ in range(heads))
        else:
            config = LlamaConfig(**block | {"num_hidden_layers": 1, "vocab_size": 1})
            self.heads = nn.ModuleList(Block(config) for _ in range(heads))

    def forget(self):
        """A new text begins."""
        for head in self.heads:
            head.cache = DynamicCache()  # a residual head needs none

    def watch(self, model, tokens, cache, last):
        """Tokens (1, T) -> logits (1, last, V) of the last ones, and what heads read (1, T, D)."""
        seen = []
        module = model.get_submodule(self.reads)
        hook = module.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            words = {cache_word(type(model)): cache}
            output = model(tokens, use_cache=True, logits_to_keep=last, **words)
        finally:
            hook.remove()
        return output.logits, seen[0] if torch.is_tensor(seen[0]) else seen[0][0]

    def guess(self, model, hidden):
        """What heads have not read yet of the text (1, T, D) -> what follows its end (1, K)."""
        latents, x = [], hidden
        for head in self.heads:
            latent = head(x)
            latents.append(latent[:, -1:])
            x = latent if self.chained else hidden
        latent = torch.cat(latents, 1)
        if self.norm:
            latent = model.get_submodule(self.norm)(latent)
        return model.get_output_embeddings()(latent).argmax(-1)


def heads_of(model):
    """From the folder or repository that the model itself was opened from."""
    if model not in OPENED:
        config, weights = (
            cached_file(model.name_or_path, f"custom_generate/heads.{kind}")
            for kind in ("json", "safetensors")
        )
        with open(config, encoding="utf-8") as file, torch.random.fork_rng(devices=[]):
            heads = Heads(**json.load(file))  # whose random beginnings are not to shift sampling
        heads.load_state_dict(load_file(weights))
        OPENED[model] = heads.eval()
    return OPENED[model].to(model.device, model.dtype)
