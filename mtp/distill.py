"""Distillation of a draft: a small model learns to stand in for a finished one, its target, which
is held constant.

    loss = mean over positions of KL(target || draft), of what both say next

Both read the target's own text, sampled while the draft learns. The mean over such text is the KL
divergence between the laws of whole texts, token by token (the chain rule), so at temperature 1 the
loss is that of the draft as a model of the target: word-level distillation (Kim & Rush 2016,
arXiv 1606.07947) on text of the teacher, as DistillSpec has it for drafts (Zhou et al. 2024,
arXiv 2310.08461). Each text is read once. Making it takes longer than learning from it, so where
several drafts are wanted, `scripts/self_distill.py` can write it once, for `text="data"` to read.

Letters: B rows, T positions, M positions that count, D width of the target, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp import checkpoint
from mtp.consistency.on_policy import OnPolicy
from mtp.consistency.trajectories import Trajectory
from mtp.data import Batches, check_identity, load_corpus
from mtp.decode.contract import stop_at
from mtp.decode.sampling import Sampling
from mtp.distributed import rank, sum_on_host, world_size
from mtp.divergence import distil, forward_kl
from mtp.documents import DataConfig, iter_documents
from mtp.encoding import prompt_of
from mtp.loss import Batch, Metrics, chunk_size, future_targets, wide
from mtp.model import ModelConfig, Transformer
from mtp.records import Document
from mtp.tokenizer import Tokenizer
from mtp.train import PRECISIONS
from mtp.train import Batches as Source

log = logging.getLogger("mtp")
TEXTS = ("target", "data")


@dataclass
class DistillConfig:
    """target: the run or checkpoint of the model to stand in for. text: what both models read, the
    target's own (target) or the corpus as it is (data), of which targets count alone.

    Of the target's own text: prompt_tokens, at most, begin it, and it fills up data.seq_len;
    temperature of its sampling; batch_size texts are made at once. precision: of the target.
    """

    target: str | None = None
    text: str = "target"
    prompt_tokens: int = 64
    temperature: float = 1.0
    batch_size: int = 32
    precision: str = "float32"  # or bfloat16

    def __post_init__(self) -> None:
        for key in ("prompt_tokens", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"distill.{key}={getattr(self, key)} must be at least 1")
        for key, allowed in (("text", TEXTS), ("precision", PRECISIONS)):
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"distill.{key}={getattr(self, key)!r}: allowed are {', '.join(allowed)}"
                )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"distill.temperature={self.temperature} must be at least 0, and finite"
            )


def check_draft(
    config: DistillConfig, data: DataConfig, tokenizer: Tokenizer, draft: ModelConfig
) -> None:
    """Refuse, by ValueError, what the target cannot teach or the draft not learn. A draft that is
    larger than its target gets a warning.
    """
    folder = checkpoint.find(str(config.target))
    target, own = checkpoint.load_config(folder), checkpoint.load_tokenizer(folder)
    if tokenizer.fingerprint != own.fingerprint or draft.vocab_size != target.vocab_size:
        raise ValueError(
            f"distill.target={config.target} has vocab_size={target.vocab_size} and the tokenizer "
            f"of fingerprint {own.fingerprint}, the draft {draft.vocab_size} and "
            f"{tokenizer.fingerprint}: they must be the same"
        )
    if draft.n_future_tokens != 1:
        raise ValueError(
            f"model.n_future_tokens={draft.n_future_tokens}: a draft learns the next token: say 1"
        )
    if data.streaming:
        raise ValueError("data.streaming: prompts and corpora are read whole")
    longest = min(draft.max_seq_len, target.max_seq_len)
    if data.seq_len > longest:
        raise ValueError(
            f"data.seq_len={data.seq_len} exceeds max_seq_len={longest} of draft or target"
        )
    if config.text == "target" and config.prompt_tokens >= data.seq_len:
        raise ValueError(
            f"distill.prompt_tokens={config.prompt_tokens} leaves no token of "
            f"data.seq_len={data.seq_len} to the target"
        )
    ratio = _parameters(draft) / _parameters(target)
    if ratio > 1 and rank() == 0:
        log.warning(
            "the draft has %.1f times the target's parameters: each token that it guesses costs "
            "about that many times a step without drafts",
            ratio,
        )


def _parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def load_target(config: DistillConfig, device: torch.device) -> Transformer:
    """Held constant, and packed where that is faster."""
    model = checkpoint.load(str(config.target), device, PRECISIONS[config.precision])
    return model.requires_grad_(False).eval().packed()


# What both models read.


class Taught(NamedTuple):
    """row (B, T+1): ids. places (M,): which of the B * T positions count. latent (M, D): what the
    target makes of them; unembedded by weight (V, D), it says what comes next.
    """

    row: Tensor
    places: Tensor
    latent: Tensor
    weight: Tensor

    def to(self, device: torch.device | str) -> Taught:
        return Taught(*(x.to(device, non_blocking=True) for x in self))


class TaughtBatches:
    """Batches of one-token rows as the target sees them. Positions count that predict a target in
    their own document. identity: what says the target and the kind of texts; a state of others is
    refused.
    """

    def __init__(self, target: Transformer, identity: dict[str, Any], texts: Source) -> None:
        self.target, self.texts, self._identity = target, texts, identity

    def __iter__(self) -> TaughtBatches:
        return self

    @torch.no_grad()
    def __next__(self) -> Taught:
        batch: Batch = next(self.texts)
        places, weight = future_targets(batch, 1)[1].flatten().nonzero().flatten(), self._weight
        z = self.target.latent(batch.row[:, :-1].to(weight.device)).flatten(0, 1)
        return Taught(batch.row, places, self.target.norm(z[places.to(weight.device)]), weight)

    @property
    def _weight(self) -> Tensor:
        return self.target.output.weights[0].detach()

    def state_dict(self) -> dict[str, Any]:
        return {**self.texts.state_dict(), **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_identity(state, self._identity)
        self.texts.load_state_dict(state)


class OwnTexts:
    """Batches of texts that a constant model writes, `at_once` together; what it wrote are the
    targets. Text i depends on `identity` and i alone, so the state is how many were read, on each
    rank. identity: of all ranks' prompts, and how they go on.
    """

    def __init__(
        self, source: OnPolicy, batch_size: int, at_once: int, identity: dict[str, Any]
    ) -> None:
        self.source, self.batch_size, self.at_once = source, batch_size, at_once
        self.read, self.waiting = 0, list[Trajectory]()
        self._identity = identity

    def __next__(self) -> Batch:
        while len(self.waiting) < self.batch_size:
            self.waiting += self.source.draw(self.at_once)
        texts = [(t.prompt, t.response) for t in self.waiting[: self.batch_size]]
        del self.waiting[: self.batch_size]
        self.read += len(texts)
        shape = len(texts), max(len(prompt) + len(response) for prompt, response in texts)
        batch = Batch(torch.zeros(shape).long(), torch.full(shape, -1), torch.zeros(shape).bool())
        for b, (prompt, response) in enumerate(texts):
            end = len(prompt) + len(response)
            batch.row[b, :end] = torch.tensor(prompt + response)
            batch.doc[b, :end] = 0
            batch.keep[b, len(prompt) : end] = True
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_identity(state, self._identity)
        self.read = state["read"]
        begun = self.read % self.at_once  # of a group that is made again
        self.source.drawn = self.read - begun
        self.waiting = self.source.draw(self.at_once)[begun:] if begun else []


def beginnings(document: Document, tokenizer: Tokenizer, limit: int, every: int) -> list[list[int]]:
    """Prompts: what an answer follows, whole; of other text the first `limit` of each `every`
    tokens, since a file's first lines are not like the rest.
    """
    ids = prompt_of(document, tokenizer)
    if document.messages or not document.segments[0][1]:
        return [ids]
    return [ids[start : start + limit] for start in range(0, len(ids), every)]


def make_prompts(
    config: DistillConfig, data: DataConfig, tokenizer: Tokenizer, held_out: bool
) -> list[list[int]]:
    """In an order of their own. ValueError if all are too long."""
    limit = config.prompt_tokens
    documents = iter_documents(data, held_out)
    prompts = [p for d in documents for p in beginnings(d, tokenizer, limit, data.seq_len)]
    fitting = [prompt for prompt in prompts if 0 < len(prompt) <= limit]
    if not fitting:
        raise ValueError(
            f"of {len(prompts)} prompts none has distill.prompt_tokens={limit} or less"
        )
    if rank() == 0 and len(fitting) < len(prompts):
        log.info("%d of %d prompts are too long", len(prompts) - len(fitting), len(prompts))
    random.Random(data.seed).shuffle(fitting)
    return fitting


def make_texts(
    config: DistillConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    target: Transformer,
    batch_size: int,
    held_out: bool,
) -> Source:
    if config.text == "data":
        corpus = load_corpus(data, tokenizer, held_out)
        return Batches(corpus, data.seq_len, 1, batch_size, data.seed, rank(), world_size())
    prompts = make_prompts(config, data, tokenizer, held_out)
    source = OnPolicy(
        target,
        prompts[rank() :: world_size()],
        window=1,  # plain decoding
        max_new_tokens=data.seq_len - config.prompt_tokens,
        seed=data.seed,
        stop=stop_at(tokenizer.end_id),
        sampling=Sampling(config.temperature),
    )
    identity = {
        "prompts": hashlib.sha256(json.dumps(prompts).encode("ascii")).hexdigest()[:16],
        "seed": data.seed,
        "seq_len": data.seq_len,
        "prompt_tokens": config.prompt_tokens,
        "temperature": config.temperature,
    }
    return OwnTexts(source, batch_size, config.batch_size, identity)


# The loss, and how good a draft is.


class DistillLoss:
    """The mean of KL(target || draft) over the positions that count; only head 1 learns."""

    def count(self, batch: Taught) -> Tensor:
        return torch.tensor([len(batch.places)], device=batch.row.device)

    def __call__(
        self, model: nn.Module, batch: Taught, denominator: Tensor
    ) -> tuple[Tensor, Metrics]:
        dtype = wide(next(model.parameters()).dtype)
        scale = 1 / denominator[0].to(dtype).clamp(min=1e-30)

        def score(fns, inputs, weights, params):
            latent = fns[0](inputs[0]).flatten(0, 1)[batch.places]
            return distil(
                forward_kl,
                latent,
                batch.latent,
                weights[0],
                scale,
                teacher_weight_VD=batch.weight,
            )

        loss, kl = model(batch.row, score=score, cut="latents", upto=1)
        return loss, {"loss_kl": (kl, self.count(batch)[0])}


def evaluator(batches: TaughtBatches, count: int) -> Callable[[nn.Module], dict[str, float]]:
    """A draft on `count` held-out batches, the same each time, shared among ranks. val_kl: as in
    training. val_acceptance: the mean of sum_v min(p, q), the share of its guesses that rejection
    sampling keeps at temperature 1 (Leviathan et al. 2023). val_agreement: how often its most
    probable token is the target's.
    """
    chosen: list[Taught] = []

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        if not chosen:
            chosen.extend(islice(batches, -(-count // world_size())))
        device = next(model.parameters()).device
        sums = torch.zeros(4, dtype=torch.double)
        for batch in (b.to(device) for b in chosen):
            found = model(batch.row, score=_comparison(batch), cut="latents", upto=1)
            sums += torch.tensor([*found, len(batch.places)], dtype=torch.double)
        *totals, places = sum_on_host(sums.tolist(), device)
        names = ("val_kl", "val_acceptance", "val_agreement")
        return {name: x / max(places, 1) for name, x in zip(names, totals, strict=True)}

    return evaluate


def _comparison(batch: Taught) -> Callable[..., list[float]]:
    """A score: the sums over positions of what `evaluator` says."""

    def score(fns, inputs, weights, params):
        latent, sums = fns[0](inputs[0]).flatten(0, 1)[batch.places], torch.zeros(3).double()
        for draft, target in zip(
            *(x.split(chunk_size(batch.weight)) for x in (latent, batch.latent)), strict=True
        ):
            q, p = (F.linear(draft, weights[0]), F.linear(target, batch.weight))
            q, p = (x.to(wide(x.dtype)) for x in (q, p))
            same = q.argmax(-1) == p.argmax(-1)
            shared = torch.minimum(q.softmax(-1), p.softmax(-1))
            found = forward_kl(q, p).sum(), shared.sum(), same.sum()
            sums += torch.stack([x.cpu().double() for x in found])
        return sums.tolist()

    return score
