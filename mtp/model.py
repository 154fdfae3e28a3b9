"""A Llama-like decoder whose last layers are n prediction heads: trunk -> heads -> shared norm ->
unembedding (paper, section 2).

Pre-norm blocks with RMSNorm, rotary positions (half-rotated, as in Hugging Face's Llama),
grouped-query attention and SwiGLU. The model knows no losses, files or ranks: an objective comes in
as a `score` (see `mtp.loss`), which is called inside the unembedding's own forward so that every
use of a parameter happens inside `model(...)`, whoever wraps it.

Letters: B rows, T positions, N future tokens, D width, H query heads, G key/value heads, d head
width, V vocabulary, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp.cache import Cache, CacheLayer
from mtp.decode.contract import Layout
from mtp.heads import HEADS, Future
from mtp.loss import CUTS, Score, is_sharded
from mtp.packed import Matrix, PackedLinear, can_pack, project, with_packed_linears
from mtp.rotary import Rotary, Rotation, rotate

UNEMBEDDINGS = ("shared", "replicated")
ROPE_SCALING = (
    *("factor", "low_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings",
)
Place = tuple[Rotation, Layout | None]  # of a forward pass, see `mtp.heads`


@dataclass
class ModelConfig:
    """Meta's names, so that a `params.json` reads as this. `n_layers` counts trunk blocks and block
    heads together.

    A trunk that keeps its L blocks beside n heads is `n_layers = L + n - 1`. Linear, residual,
    identity and sequential heads take no block from the trunk. hidden_dim: width of the
    feed-forward layer, by default 8/3 dim rounded up to `multiple_of`. rope_scaling: how Llama 3.1
    slows its rotary positions, by the names of its own config, see `mtp.rotary.slowed`.
    """

    dim: int = 256
    n_layers: int = 8
    n_heads: int = 4
    n_kv_heads: int | None = None
    n_future_tokens: int = 4
    vocab_size: int = 257
    head: str = "transformer"
    unembedding: str = "shared"
    tie_embeddings: bool = False
    hidden_dim: int | None = None
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, float] | None = None
    max_seq_len: int = 4096

    def __post_init__(self) -> None:
        for key in (
            "dim",
            "n_layers",
            "n_heads",
            "n_future_tokens",
            "vocab_size",
            "multiple_of",
            "max_seq_len",
        ):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        for key in ("norm_eps", "rope_theta"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}={getattr(self, key)} must be above 0")
        if self.hidden_dim is not None and self.hidden_dim < 1:
            raise ValueError(f"hidden_dim={self.hidden_dim} must be at least 1, or null")
        scaling = self.rope_scaling
        if scaling is not None and ({*scaling} != {*ROPE_SCALING} or min(scaling.values()) <= 0):
            raise ValueError(
                f"rope_scaling={scaling} must give {', '.join(ROPE_SCALING)} above 0, or be null"
            )
        for key, allowed in (("head", tuple(HEADS)), ("unembedding", UNEMBEDDINGS)):
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} is unknown: allowed are {', '.join(allowed)}"
                )
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(
                f"dim={self.dim} must split into n_heads={self.n_heads} heads of even width"
            )
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}"
            )
        if self.trunk_layers < 0:
            raise ValueError(
                f"n_layers={self.n_layers} must be at least "
                f"n_future_tokens={self.n_future_tokens}: heads are taken from them"
            )
        if self.tie_embeddings and self.unembedding == "replicated":
            raise ValueError(
                "tie_embeddings=true needs unembedding=shared: there is one embedding to tie to"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def trunk_layers(self) -> int:
        return self.n_layers - (self.n_future_tokens if HEADS[self.head].takes_blocks else 0)

    @property
    def ffn_dim(self) -> int:
        wanted = self.hidden_dim or 8 * self.dim // 3
        return wanted if self.hidden_dim else -(-wanted // self.multiple_of) * self.multiple_of

    def rotary(self) -> Rotary:
        return Rotary(self.head_dim, self.rope_theta, self.max_seq_len, self.rope_scaling)


class Block(nn.Module):
    """Attention and SwiGLU, each on a normed copy of the residual stream. Queries, keys and values
    are one map, gate and up another: fewer, larger products.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.kv_heads = config.n_heads, config.kv_heads
        self.head_dim = config.head_dim
        qkv_dim = (self.n_heads + 2 * self.kv_heads) * self.head_dim
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.wqkv = nn.Linear(config.dim, qkv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.w13 = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, rotation: Rotation, layout: Layout | None, layer: CacheLayer | None = None
    ) -> Tensor:
        (B, T, _), H, G = x.shape, self.n_heads, self.kv_heads
        qkv = self.wqkv(self.attention_norm(x)).view(B, T, H + 2 * G, self.head_dim)
        qk, v = rotate(qkv.narrow(2, 0, H + G), rotation), qkv.narrow(2, H + G, G)
        q, k = qk.narrow(2, 0, H), qk.narrow(2, H, G)
        mask = None if layout is None else layout.mask
        if layout is not None and layer is not None:
            k, v = layer.write(layout, k, v)
        # One query's heads that share a key are rows of one product, not products of one row each.
        one = T == 1
        y = F.scaled_dot_product_attention(
            q.view(B, G, H // G, self.head_dim) if one else q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None and not one,
            enable_gqa=G < H and not one,
        )
        y = y.reshape(B, 1, -1) if one else y.transpose(1, 2).flatten(2)
        x = x + self.wo(y)
        gate, up = self.w13(self.ffn_norm(x)).chunk(2, -1)
        return x + self.w2(F.silu(gate) * up)


class Unembedding(nn.Module):
    """One matrix (V, D) for all heads, or one per head, as parameters "0", "1", ... Training reads
    them inside its own forward and nowhere else.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        copies = config.n_future_tokens if config.unembedding == "replicated" else 1
        for i in range(copies):
            weight = nn.Parameter(torch.empty(config.vocab_size, config.dim))
            self.register_parameter(str(i), weight)

        self.packed: list[PackedLinear] = []

    @property
    def weights(self) -> list[nn.Parameter]:
        return [weight for weight in self._parameters.values() if weight is not None]

    @property
    def matrices(self) -> Sequence[Matrix]:
        """The weights as decoding reads them."""
        return self.packed or self.weights

    def rows(self, ids: Tensor) -> list[Matrix]:
        """A copy of some tokens' rows of each matrix: they lie apart, and a copy is read as fast
        as a smaller matrix.
        """
        rows = (weight.detach()[ids] for weight in self.weights)
        return [PackedLinear(some) if self.packed else some for some in rows]

    def forward(
        self,
        latents: Sequence[Tensor],
        score: Callable[[Sequence[Tensor], Sequence[Tensor]], Any],
    ) -> Any:
        return score(latents, self.weights)


def _unembed(head: int, latents: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return F.linear(latents[0], weights[head % len(weights)])


class Transformer(nn.Module):
    """Trunk and n heads. `model(tokens)` gives next-token logits; `model(row, score=...)` trains;
    `read` and `guess` decode.
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.trunk = nn.ModuleList([Block(config) for _ in range(config.trunk_layers)])
        self.heads = HEADS[config.head].build(
            config.n_future_tokens,
            config.dim,
            lambda: Block(config),
            lambda: nn.RMSNorm(config.dim, eps=config.norm_eps),
        )
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = Unembedding(config)
        if config.tie_embeddings:
            self.output.register_parameter("0", self.embedding.weight)  # type: ignore[arg-type]
        self.rotary = config.rotary()
        self.init_weights(generator)

    @property
    def blocks(self) -> list[nn.Module]:
        """Trunk blocks and heads in order: the units that are compiled, checkpointed or sharded."""
        return [*self.trunk, *self.heads.heads]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal with std width^-1/2, cut at 3 std; what is added to the residual stream is scaled
        by (2 n_layers)^-1/2.
        """

        def normal_(weight: Tensor, std: float) -> None:
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)

        normal_(self.embedding.weight, self.config.dim**-0.5)
        for name, module in self.named_modules():
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif getattr(module, "starts_at_zero", False):
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Linear):
                deep = name.endswith((".wo", ".w2"))
                normal_(
                    module.weight,
                    (module.in_features * (2 * self.config.n_layers if deep else 1)) ** -0.5,
                )
        if not self.config.tie_embeddings:
            for weight in self.output.weights:
                normal_(weight, self.config.dim**-0.5)

    def forward(
        self,
        tokens: Tensor,
        score: Score | None = None,
        cut: str = "auto",
        return_all_heads: bool = False,
        upto: int | None = None,
        layout: Layout | None = None,
    ) -> Any:
        """Without `score`: ids (B, T) -> logits (B, T, V), or (B, T, N, V) of all heads. Heads that
        read ahead find the heads' own choices beyond the end of `tokens`.

        With `score`: rows (B, T + n) -> whatever score(fns, inputs, weights, params) returns for
        the first T positions; with `upto`, of heads 1..upto alone, rows are (B, T + upto).

        `layout` gives T positions below max_seq_len, and a mask, to rows of several texts that
        share a beginning; without it rows are plain text.
        """
        n = upto or self.config.n_future_tokens
        length = tokens.shape[1] - (n if score else 0)
        place = self._place(length, layout)
        if score is None:
            logits = self._logits_of_heads(tokens, place, n if return_all_heads else 1)
            return torch.stack(logits, 2) if return_all_heads else logits[0]
        if cut not in CUTS:
            raise ValueError(f"cut={cut!r} is unknown: allowed are {', '.join(CUTS)}")
        z = self._trunk(tokens[:, :length], place)
        alone = self.heads.independent and not is_sharded(self._head_params())
        if cut == "trunk" or (cut == "auto" and alone):
            return self.output(
                [z], lambda x, w: score(self._head_fns(place)[:n], x, w, self._head_params())
            )
        heads = [*self._latents(z, place, lambda j: self._ahead(tokens, j, length), n)]
        latents = [self.norm(x) for x in heads]  # all at the end, as gradients are added up
        return self.output(latents, lambda x, w: score([lambda latent: latent] * n, x, w, ()))

    def _logits_of_heads(self, tokens: Tensor, place: Place, upto: int) -> list[Tensor]:
        text, length = tokens, tokens.shape[1]
        logits: list[Tensor] = []

        def future(j: int) -> Tensor:
            return self._ahead(text, j, length)

        for latent in self._latents(self._trunk(tokens, place), place, future, upto):
            logits.append(self.output([self.norm(latent)], partial(_unembed, len(logits))))
            text = torch.cat([text, logits[-1][:, -1:].argmax(-1)], 1)
        return logits

    def _ahead(self, text: Tensor, j: int, length: int) -> Tensor:
        return self.embedding(text[:, j : j + length])

    def latent(self, tokens: Tensor) -> Tensor:
        """Ids (B, T) -> head 1's latent (B, T, D) before the norm, without a cache."""
        place = self._place(tokens.shape[1], None)
        return self.heads.next(self._trunk(tokens, place), *place, ())[0]

    def _place(self, length: int, layout: Layout | None) -> Place:
        if layout is not None:
            return self.rotary(layout.positions), layout
        if length > self.config.max_seq_len:
            raise ValueError(f"{length} tokens exceed max_seq_len={self.config.max_seq_len}")
        return self.rotary(torch.arange(length, device=self.embedding.weight.device)), None

    def _trunk(self, tokens: Tensor, place: Place) -> Tensor:
        x = self.embedding(tokens)
        for block in self.trunk:
            x = block(x, *place)
        return x

    def _latents(self, z: Tensor, place: Place, future: Future, upto: int) -> Iterator[Tensor]:
        first, memo = self.heads.next(z, *place, ())
        yield first
        yield from self.heads.rest(memo, future, *place, (), upto)

    def _head_fns(self, place: Place) -> list[Callable[[Tensor], Tensor]]:
        if not self.heads.independent:
            raise ValueError(
                f"cut='trunk' needs heads that do not read each other, not "
                f"head={self.config.head!r}: use 'latents'"
            )

        def through(head: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda z: self.norm(head(z, *place))

        return [through(head) for head in self.heads.heads]

    def _head_params(self) -> list[nn.Parameter]:
        return [*self.heads.parameters(), *self.norm.parameters()]

    # Decoding: what `mtp.decode` asks of a target.

    def packed(self) -> Transformer:
        """A copy for decoding on a CPU, of the same output up to rounding, whose steps take about
        half the time: see `mtp.packed`. The model itself where there is nothing to gain.
        """
        weight = self.embedding.weight
        if self.output.packed or not can_pack(weight.dtype, weight.device.type):
            return self
        model = with_packed_linears(self)
        model.output.packed = [PackedLinear(weight) for weight in self.output.weights]
        return model

    @property
    def next_layers(self) -> int:
        """Attention layers that the next token needs."""
        return len(self.trunk) + self.heads.next_layers

    @property
    def rest_layers(self) -> int:
        """Attention layers that only drafts need."""
        return self.heads.rest_layers

    @property
    def extra_heads(self) -> int:
        """How many heads can draft."""
        return self.config.n_future_tokens - 1

    @property
    def reads_ahead(self) -> bool:
        """Whether a head reads the guesses of those before it."""
        return self.heads.reads_ahead

    @property
    def memo_dim(self) -> int:
        return self.config.dim * self.heads.memo_copies

    def new_cache(self, layers: int, rows: int, slots: int) -> Cache:
        if slots > len(self.rotary.table):  # drafts may overhang the end of the longest text
            self.rotary.reserve(slots)
        return Cache(
            layers, rows, slots, self.config.kv_heads, self.config.head_dim, self.embedding.weight
        )

    def read(self, tokens: Tensor, layout: Layout, cache: Cache) -> tuple[Tensor, Tensor]:
        """Under no_grad: feed tokens (R, T) -> latent of head 1 (R, T, D), memo (R, T, D'): what
        `guess` needs for the other heads.
        """
        rotation = self.rotary(layout.positions)
        x = self.embedding(tokens)
        for block, layer in zip(self.trunk, cache.layers, strict=False):
            # Not block(...): a step is too short for hooks, and no shape to compile for.
            x = block.forward(x, rotation, layout, layer)
        return self.heads.next(x, rotation, layout, cache.layers[len(self.trunk) :])

    def guess(
        self, memo: Tensor, future: Future, layout: Layout, cache: Cache, upto: int
    ) -> Iterable[Tensor]:
        """memo (R, T, D') -> latents (R, T, D) of heads 2..upto, one after another. future(j):
        embeddings (R, T, D) of the tokens j ahead, which only heads that read ahead ask for.
        """
        rotation = self.rotary(layout.positions)
        return self.heads.rest(memo, future, rotation, layout, cache.layers, upto)

    def logits(self, latent: Tensor) -> Tensor:
        """Latent of head 1 (..., D) -> its logits (..., V)."""
        return project(self.norm(latent), self.output.matrices[0])

    def draft_logits(
        self, latents: Sequence[Tensor], matrices: Sequence[Matrix] = (), first: int = 2
    ) -> Tensor:
        """One latent (R, D) of each of heads first, first + 1, ... -> their logits (R, K, V).

        matrices: used in place of the unembedding's own, such as some of their `rows`.
        """
        matrices = matrices or self.output.matrices
        latent = self.norm(torch.stack(list(latents), 1))
        if len(matrices) == 1:
            return project(latent, matrices[0])
        heads = enumerate(latent.unbind(1), first - 1)
        return torch.stack([project(x, matrices[i]) for i, x in heads], 1)
