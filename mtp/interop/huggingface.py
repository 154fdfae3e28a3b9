"""Any causal LM of transformers as a model that `mtp.decode` decodes, without conversion: as the
target of every drafter and rule that wants no heads, and as the model that drafts for another.

    model = CausalLM(AutoModelForCausalLM.from_pretrained(folder))
    generate(model, requests, PromptLookup())

Positions and masks go in as arguments; keys and values go to our slots through a cache of
transformers' interface. What cannot be read so (a state instead of keys, a window that drops slots)
is refused by name; that a model honours mask, positions and slots is tried once, on five tokens.

Letters: R rows of a pass, T new columns, S slots, V vocabulary, D width, G key/value heads, d head
width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from mtp.cache import Cache, CacheLayer
from mtp.decode.contract import Draft, Layout, chain, tree
from mtp.packed import can_pack, with_packed_linears

ATTENTION = ("sdpa", "eager")  # those that take any mask
LAYER_TYPES = ("full_attention", "sliding_attention")
LENGTH_DEPENDENT = ("dynamic", "longrope")  # keys in the cache would be those of a shorter text


@dataclass  # not frozen: a Trainer writes into the config of what it trains
class Sizes:
    """What decoding asks of a model's config."""

    vocab_size: int
    max_seq_len: int
    kv_heads: int
    head_dim: int


class CausalLM:
    """`model` decodes from where it is, in its own type, and is put into eval mode. ValueError
    where it cannot be read by slots.
    """

    extra_heads = rest_layers = 0

    def __init__(self, model: Any) -> None:
        self.model, self.name = model.eval(), type(model).__name__
        self.base, self.head = model.base_model, model.get_output_embeddings()
        self.embedding = model.get_input_embeddings()
        takes = signature(self.base.forward).parameters
        self.cache_word = "cache" if "cache" in takes else "past_key_values"  # from 5.24 on `cache`
        theirs = model.config.get_text_config()
        if problem := _unfit(model, theirs):
            raise ValueError(f"{self.name} cannot be decoded here: {problem}")
        self.config, self.window = _sizes(theirs), _window(theirs)
        self.next_layers, self.memo_dim = theirs.num_hidden_layers, theirs.hidden_size
        self._try_slots()

    def __call__(self, tokens: Tensor) -> Tensor:
        """Ids (R, T) -> logits (R, T, V), as the model itself reads a text."""
        return self.model(input_ids=tokens, use_cache=False).logits

    def latent(self, tokens: Tensor) -> Tensor:
        """Ids (R, T) -> last hidden state (R, T, D), for training: without a cache."""
        return self.base(input_ids=tokens, use_cache=False).last_hidden_state

    def packed(self) -> CausalLM:
        """A copy for decoding on a CPU, see `mtp.packed`; itself where there is nothing to gain."""
        weight = self.embedding.weight
        if not can_pack(weight.dtype, weight.device.type):
            return self
        return CausalLM(with_packed_linears(self.model))

    def new_cache(self, layers: int, rows: int, slots: int) -> SlotCache:
        if self.window is not None and slots > self.window:
            raise ValueError(
                f"{self.name} has sliding_window={self.window}, which would drop slots: the texts "
                f"and their drafts need {slots}. Shorten the prompts or lower max_new_tokens"
            )
        c = self.config
        return SlotCache(layers, rows, slots, c.kv_heads, c.head_dim, self.embedding.weight)

    def read(self, tokens: Tensor, layout: Layout, cache: SlotCache) -> tuple[Tensor, Tensor]:
        """Feed tokens (R, T) -> last hidden state (R, T, D), twice: it is also the memo."""
        cache.layout = layout
        latent = self.base(
            input_ids=tokens,
            position_ids=layout.positions.clamp(max=self.config.max_seq_len - 1),  # overhang
            attention_mask=layout.mask,
            use_cache=True,
            **{self.cache_word: cache.theirs},
        ).last_hidden_state
        return latent, latent

    def logits(self, latent: Tensor) -> Tensor:
        return self.head(latent)

    @torch.inference_mode()
    def _try_slots(self) -> None:
        """Read 0 1 2 and, beside each other, 3 and 4: the logits after 4 must be those of the text
        0 1 2 4, and far from those of 0 1 2 3 4, which a model gives that ignores what it is told.
        """
        try:
            got = self._after_siblings(torch.arange(5, device=self.embedding.weight.device)[None])
            wanted, blind = (
                self(torch.tensor([text], device=got.device))[0, -1]
                for text in ([0, 1, 2, 4], [0, 1, 2, 3, 4])
            )
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{self.name} cannot be read by slots: {error}") from error
        apart, allowed = (got - wanted).abs().max(), (blind - wanted).abs().max() / 10
        rounding = 8 * torch.finfo(got.dtype).eps * wanted.abs().max()
        if not apart <= torch.maximum(allowed, rounding):
            raise ValueError(
                f"{self.name} does not honour masks, positions and slots: its logits differ by "
                f"{float(apart):.1e} from those of the same text read plainly"
            )

    def _after_siblings(self, tokens: Tensor) -> Tensor:
        cache = self.new_cache(self.next_layers, 1, 5)
        like = self.embedding.weight
        self.read(tokens[:, :2], chain(0, [0], 2, cache.slots, like), cache)
        siblings = Draft(tokens[:, 3:], parents=torch.full_like(tokens[:, 3:], -1))
        latent, _ = self.read(tokens[:, 2:], tree([2], siblings.lineage, cache.slots, like), cache)
        return self.logits(latent)[0, -1]


class SlotCache(Cache):
    """Our cache and, as `theirs`, the view of it that a model of transformers writes to during the
    pass that `layout` describes.
    """

    layout: Layout

    def __init__(
        self, layers: int, rows: int, slots: int, heads: int, head_dim: int, like: Tensor
    ) -> None:
        from transformers import Cache as TheirCache

        super().__init__(layers, rows, slots, heads, head_dim, like)
        self.theirs = TheirCache([_slot_layer()(self, layer) for layer in self.layers])


@cache
def _slot_layer() -> Any:
    """A class, made when it is wanted: its base is not there without transformers."""
    from transformers.cache_utils import CacheLayerMixin

    class SlotLayer(CacheLayerMixin):
        is_sliding = False

        def __init__(self, cache: SlotCache, layer: CacheLayer) -> None:
            super().__init__()
            self.cache, self.layer = cache, layer

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            """(R, G, T, d) here, (R, T, G, d) with us."""
            kv = (x.transpose(1, 2).contiguous() for x in (key_states, value_states))
            k, v = self.layer.write(self.cache.layout, *kv)
            return k.transpose(1, 2), v.transpose(1, 2)

        def get_seq_length(self) -> int:
            """Where the new columns begin; asked for where the layout has no mask."""
            return self.cache.layout.span - self.cache.layout.positions.shape[1]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.cache.layout.span, 0

        def get_max_length(self) -> int:
            return self.cache.slots

    return SlotLayer


def _unfit(model: Any, config: Any) -> str | None:
    """Why a model is not one that attends to keys and values of every slot; None if it may be."""
    kinds = {*(getattr(config, "layer_types", None) or ())} - {*LAYER_TYPES}
    attention, rope = config._attn_implementation, _rope_types(config)
    if config.is_encoder_decoder or model.get_output_embeddings() is None:
        return "it is no causal language model"
    if model._is_stateful:
        return "it keeps a state, which cannot go back behind a rejected draft"
    if kinds:
        return f"it has layers of the kind {', '.join(sorted(kinds))}"
    if attention not in ATTENTION:
        return f"attn_implementation={attention!r} takes no mask: load it with 'sdpa' or 'eager'"
    if changing := rope & {*LENGTH_DEPENDENT}:
        return f"rope_type={changing.pop()!r} turns a token differently as the text grows"
    if not getattr(config, "max_position_embeddings", None):
        return "its config does not say max_position_embeddings"
    return None


def _rope_types(config: Any) -> set[str]:
    """One for all layers, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    every = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return {found["rope_type"] for found in every if "rope_type" in found}


def _sizes(config: Any) -> Sizes:
    heads, width = config.num_attention_heads, config.hidden_size
    return Sizes(
        vocab_size=config.vocab_size,
        max_seq_len=config.max_position_embeddings,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or width // heads,
    )


def _window(config: Any) -> int | None:
    """How many slots the layers with the shortest sight see; None: all of them."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or LAYER_TYPES):
        return None
    return getattr(config, "sliding_window", None)
