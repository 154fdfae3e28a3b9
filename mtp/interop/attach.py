"""Heads for a model that is there already: one of ours, or any causal LM of transformers in its
adapter `mtp.interop.huggingface.CausalLM`.

    model = attach_heads(CausalLM(theirs), 4, "residual")
    train(model, batches, MultiTokenLoss(4), config)       only heads learn
    generate(model, requests, OwnHeads())                  the trunk's own text, in fewer steps
    save_heads(model, folder);  load_heads(CausalLM(theirs), folder)

Head 1 is the model itself, which stays as it is. Heads 2..n read what its unembedding reads and
share that matrix; each adds something to it that is zero at first, so that a fresh head repeats
head 1. Kinds:

    residual     h + SiLU(Wh)                        (Medusa, Cai et al. 2024)
    transformer  a block per head, all reading h
    causal       a block per head, reading head i - 1
    sequential   a block per head, reading head i - 1 and token t + i - 1 (DeepSeek-V3)

Letters: B rows, T positions, N future tokens (heads), D width, R rows of a pass, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtp.decode.contract import Layout, Sizes, chain
from mtp.files import PYTORCH, whole, write_tensors
from mtp.heads import (
    HEADS,
    CausalHeads,
    Future,
    Heads,
    IdentityHead,
    Make,
    ParallelHeads,
    SequentialHead,
    SequentialHeads,
)
from mtp.loss import Score
from mtp.model import Block, ModelConfig, Transformer, Unembedding
from mtp.packed import Matrix, project, refuse_packed, with_packed_linears
from mtp.rotary import Rotary
from mtp.versions import check_version

CONFIG, WEIGHTS = "heads.json", "heads.safetensors"
FORMAT_VERSION = 1
SAMPLED = 4096  # numbers of a parameter that tell it from another one


def _parallel(n: int, dim: int, block: Make, norm: Make) -> Heads:
    return ParallelHeads([IdentityHead(), *(block() for _ in range(n - 1))], layers_per_head=1)


def _causal(n: int, dim: int, block: Make, norm: Make) -> Heads:
    return CausalHeads([IdentityHead(), *(block() for _ in range(n - 1))])


def _sequential(n: int, dim: int, block: Make, norm: Make) -> Heads:
    return SequentialHeads([SequentialHead(dim, block, norm, norm) for _ in range(n - 1)])


KINDS: dict[str, Callable[[int, int, Make, Make], Heads]] = {
    "residual": HEADS["residual"].build,
    "transformer": _parallel,
    "causal": _causal,
    "sequential": _sequential,
}


class Trunk(NamedTuple):
    """A model that decodes, see `mtp.decode.contract.Target`, and its end: `output` reads
    norm(latent).
    """

    model: Any
    norm: Callable[[Tensor], Tensor]
    output: Unembedding

    @property
    def module(self) -> nn.Module:
        """What holds the parameters: the model, or the one in its adapter."""
        return self.model if isinstance(self.model, nn.Module) else self.model.model


class AttachedHeads(nn.Module):
    """Decodes and trains like a `Transformer`. The trunk is no submodule: parameters, gradients,
    optimizer states and files are those of the heads alone, and `to` moves or casts only them.

    tuned: parameters of the trunk that learn too, see `mtp.interop.tuning`, and are then treated
    like those of heads.
    """

    def __init__(self, trunk: Trunk, heads: Heads, kind: str, rotary: Rotary | None) -> None:
        super().__init__()
        self.trunk, self.heads, self.kind, self.rotary = trunk, heads, kind, rotary
        self.config: Sizes = trunk.model.config
        self.n_future_tokens = len(heads.heads)
        self.tuned = nn.ParameterDict()

    def forward(
        self,
        row: Tensor,
        score: Score | None = None,
        cut: str = "latents",
        states: Tensor | None = None,
    ) -> Any:
        """Without `score`: ids (B, T) -> the trunk's logits (B, T, V).

        With `score`: rows (B, T + n) -> what score(fns, inputs, weights, params) returns for the
        first T positions. The cut is at the latents, whatever `cut` says: of a trunk that does not
        learn, which is read without a graph, nothing is kept. `states`: what `self.states` gave for
        these positions earlier, and the trunk does not run.
        """
        if score is None:
            return self.trunk.model(row)
        n = self.n_future_tokens
        h = self.states(row[:, :-n]) if states is None else states.to(self.embedding.weight.dtype)
        rotation = self._rotation(torch.arange(h.shape[1], device=h.device))
        weight = self.embedding.weight  # packed heads may have no parameters
        dtype, embedded = next(self.parameters(), weight).dtype, self.embedding(row).detach()
        first, memo = self.heads.next(h.to(dtype), rotation, None, ())
        rest = self.heads.rest(
            memo, lambda j: embedded[:, j : j + h.shape[1]].to(dtype), rotation, None, (), n
        )
        latents = [x.to(h.dtype) for x in (first, *rest)]
        matrix = self.output.weights[0]
        return score([lambda x: x] * n, latents, [matrix if self.tuned else matrix.detach()], ())

    def states(self, tokens: Tensor) -> Tensor:
        """Ids (B, T) -> what the unembedding reads (B, T, D), with a graph if the trunk learns."""
        if tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"{tokens.shape[1]} tokens exceed max_seq_len={self.config.max_seq_len}"
            )
        if self.tuned and torch.is_grad_enabled():
            return self.trunk.norm(self.trunk.model.latent(tokens))
        return self._frozen_states(tokens)

    @torch.no_grad()
    def _frozen_states(self, tokens: Tensor) -> Tensor:
        """As decoding reads a prompt: in the trunk's own type, whatever its heads learn in."""
        (rows, length), model = tokens.shape, self.trunk.model
        cache = self._new_cache(self.next_layers, rows, length)
        layout = chain(0, [0] * rows, length, length, self.embedding.weight)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.trunk.norm(model.read(tokens, layout, cache)[0])

    def identity(self) -> dict[str, Any]:
        """What tells the trunk from others, see `describe`."""
        return describe(self.trunk)

    def _rotation(self, positions: Tensor) -> Any:
        return None if self.rotary is None else self.rotary(positions)

    def _new_cache(self, layers: int, rows: int, slots: int) -> Any:
        if self.rotary is not None and slots > len(self.rotary.table):
            self.rotary.reserve(slots)
        return self.trunk.model.new_cache(layers, rows, slots)

    # Decoding: what `mtp.decode` asks of a target.

    @property
    def embedding(self) -> Any:
        return self.trunk.model.embedding

    @property
    def output(self) -> Unembedding:
        return self.trunk.output

    @property
    def next_layers(self) -> int:
        return self.trunk.model.next_layers

    @property
    def rest_layers(self) -> int:
        return self.heads.rest_layers

    @property
    def extra_heads(self) -> int:
        return self.n_future_tokens - 1

    @property
    def reads_ahead(self) -> bool:
        return self.heads.reads_ahead

    @property
    def memo_dim(self) -> int:
        return self.output.weights[0].shape[1]

    def packed(self) -> AttachedHeads:
        """A copy for decoding on a CPU, see `mtp.packed`; itself where there is nothing to gain."""
        model = self.trunk.model.packed()
        if model is self.trunk.model:
            return self
        heads = with_packed_linears(self.heads)
        return AttachedHeads(_packed_end(self.trunk, model), heads, self.kind, self.rotary)

    def new_cache(self, layers: int, rows: int, slots: int) -> Any:
        """ValueError if heads are not of the trunk's type, as they may be while they train."""
        wanted = self.embedding.weight.dtype
        if other := {p.dtype for p in self.parameters()} - {wanted}:
            raise ValueError(f"the heads are {other.pop()}, decoding wants the trunk's {wanted}")
        return self._new_cache(layers, rows, slots)

    def read(self, tokens: Tensor, layout: Layout, cache: Any) -> tuple[Tensor, Tensor]:
        latent, _ = self.trunk.model.read(tokens, layout, cache)
        return latent, self.trunk.norm(latent)

    def logits(self, latent: Tensor) -> Tensor:
        return self.trunk.model.logits(latent)

    def guess(
        self, memo: Tensor, future: Future, layout: Layout, cache: Any, upto: int
    ) -> Iterable[Tensor]:
        """memo (R, T, D) -> latents (R, T, D) of heads 2..upto, see `Transformer.guess`."""
        rotation = self._rotation(layout.positions)
        return self.heads.rest(memo, future, rotation, layout, cache.layers, upto)

    def draft_logits(
        self, latents: Sequence[Tensor], matrices: Sequence[Matrix] = (), first: int = 2
    ) -> Tensor:
        """One latent (R, D) of each of heads first, first + 1, ... -> their logits (R, K, V)."""
        return project(torch.stack(list(latents), 1), (matrices or self.output.matrices)[0])


def attach_heads(
    model: Any, n: int, kind: str = "residual", generator: torch.Generator | None = None
) -> AttachedHeads:
    """Fresh heads 2..n for a `Transformer` (whatever heads it has) or a `CausalLM`, on its device
    and in its type. For training, heads of a half-precision model want `.float()`; for decoding,
    the model's own type again.

    ValueError where the model's end is more than a matrix, or its attention has a shape that a
    block cannot share a cache with.
    """
    if n < 2:
        raise ValueError(f"n={n} must be at least 2: head 1 is the model itself")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown: allowed are {', '.join(KINDS)}")
    trunk, generator = _open(model), generator or torch.Generator().manual_seed(0)
    weight = trunk.output.weights[0]
    dim, rotary = weight.shape[1], None
    config = partial(_block_config, model.config, dim, kind)
    heads = KINDS[kind](n, dim, lambda: Block(config()), lambda: nn.RMSNorm(dim, config().norm_eps))
    if heads.rest_layers:
        rotary = config().rotary()
    _start(heads, generator)
    if isinstance(heads, SequentialHeads) and isinstance(trunk.norm, nn.RMSNorm):
        heads.scale = trunk.norm.weight.detach()
    return AttachedHeads(trunk, heads.to(weight), kind, rotary)


def _open(model: Any) -> Trunk:
    if isinstance(model, Transformer):
        return Trunk(model, model.norm, model.output)
    if type(model.head) is not nn.Linear or model.head.bias is not None:
        raise ValueError(
            f"{model.name} ends in {model.head}: heads can share a plain matrix without bias only"
        )
    vocab_size, dim = model.head.weight.shape
    with torch.device("meta"):  # its matrix is there
        output = Unembedding(ModelConfig(dim, 1, 1, n_future_tokens=1, vocab_size=vocab_size))
    output.register_parameter("0", model.head.weight)
    return Trunk(model, nn.Identity(), output)


def _packed_end(trunk: Trunk, packed: Any) -> Trunk:
    if isinstance(packed, Transformer):
        return _open(packed)
    output = copy.copy(trunk.output)
    output.packed = [packed.head]
    return Trunk(packed, trunk.norm, output)


def _block_config(sizes: Sizes, dim: int, kind: str) -> ModelConfig:
    """Keys and values as wide as the trunk's, so that its kind of cache serves both. Servers of
    sequential heads make them of blocks that are the trunk's own in every size.
    """
    if kind == "sequential" and isinstance(sizes, ModelConfig):
        return replace(sizes, head="transformer", n_layers=1, n_future_tokens=1)
    if dim % sizes.head_dim or (dim // sizes.head_dim) % sizes.kv_heads:
        raise ValueError(
            f"kind: no block of width {dim} has {sizes.kv_heads} key heads of "
            f"{sizes.head_dim} each, as the trunk has: use residual"
        )
    return ModelConfig(
        dim=dim,
        n_layers=1,
        n_heads=dim // sizes.head_dim,
        n_kv_heads=sizes.kv_heads,
        n_future_tokens=1,
        vocab_size=sizes.vocab_size,
        max_seq_len=sizes.max_seq_len,
    )


@torch.no_grad()
def _start(heads: nn.Module, generator: torch.Generator) -> None:
    """Normal with std width^-1/2; zero where a map writes to the residual stream, which in
    sequential heads is the hidden state alone at first.
    """
    for name, module in heads.named_modules():
        if getattr(module, "starts_at_zero", False) or name.endswith((".wo", ".w2")):
            nn.init.zeros_(module.weight)
        elif name.endswith(".eh_proj"):
            embedded, hidden = module.get_parameter("weight").chunk(2, 1)
            nn.init.zeros_(embedded)
            nn.init.eye_(hidden)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)


def save_heads(model: AttachedHeads, folder: str | Path) -> Path:
    """Write the heads alone, with what tells their trunk from others: `heads.json` and
    `heads.safetensors`, both or neither. FileExistsError, OSError: see `mtp.files.whole`.
    """
    refuse_packed(model)
    folder = Path(folder)
    weights = {name: t.contiguous() for name, t in model.heads.state_dict().items()}
    config = {
        "format_version": FORMAT_VERSION,
        "kind": model.kind,
        "n_future_tokens": model.n_future_tokens,
        "trunk": describe(model.trunk),
    }
    with whole(folder, sum(t.nbytes for t in weights.values())) as temporary:
        write_tensors(weights, temporary / WEIGHTS, PYTORCH)
        (temporary / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return folder


def load_heads(model: Any, folder: str | Path, realign: bool = False) -> AttachedHeads:
    """The heads of a folder on their trunk, as `attach_heads` takes it, in its type.

    realign: the trunk was trained further since, and the heads are to learn to follow it. Without
    it another trunk is refused. ValueError names file and key of what does not fit.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    fresh = attach_heads(model, config["n_future_tokens"], config["kind"])
    found, wanted = describe(fresh.trunk), config["trunk"]
    differs = [key for key in found if found[key] != wanted.get(key)]
    if differs and not (realign and differs == ["fingerprint"]):
        raise ValueError(
            f"{folder / CONFIG}: the heads belong to another trunk: "
            + ", ".join(f"{key}={wanted.get(key)!r}, here {found[key]!r}" for key in differs)
        )
    _fill(fresh.heads, folder / WEIGHTS)
    return fresh


def describe(trunk: Trunk) -> dict[str, Any]:
    """What tells a trunk from others, in whatever type it is loaded: a hash of some numbers of
    every parameter, rounded to bfloat16.
    """
    digest = hashlib.sha256()
    for p in trunk.module.parameters():
        some = p.detach().flatten()[:: max(1, p.numel() // SAMPLED)].cpu()
        digest.update(some.bfloat16().view(torch.int16).numpy().tobytes())
    vocab_size, dim = trunk.output.weights[0].shape
    return {
        "architecture": type(trunk.module).__name__,
        "vocab_size": vocab_size,
        "dim": dim,
        "fingerprint": digest.hexdigest()[:16],
    }


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the folder holds no heads")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["format_version"] == FORMAT_VERSION:
            int(config["n_future_tokens"]), str(config["kind"]), {**config["trunk"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    check_version(config, FORMAT_VERSION, file)
    return config


def _fill(heads: nn.Module, file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        heads.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError) as error:  # damaged; missing, surplus or misshapen
        raise ValueError(f"{file} does not fit {CONFIG}: {error}") from error
