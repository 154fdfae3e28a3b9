"""Why should several heads help? What a checkpoint's own losses say of the paper's arguments.

    python -m benchmarks.alignment checkpoint=RUN

Of a run with n parallel heads, on text that it held out, batch by batch:

Gradients. The cosine of what head i's loss alone asks of the trunk with what head 1's asks: at the
trunk's output, and over the parameters of its blocks. Above zero, learning to guess further ahead
is, to first order, learning to guess the next token too.

Choices (appendix L.3). A token is a fork where head 1 was unsure of it, by `bits` of entropy at
least. Of a choice that all that follows hangs on, n (n + 1) / 2 terms of the loss suffer: the n
that have it as target, and those of later targets, guessed from before it, for what they lose
against being guessed from behind it. Of an inconsequential token it is the n alone. `terms` is the
sum of all over that of the n: 1 for what is inconsequential, (n + 1) / 2 where each later term
loses as much as the token's own.

Information (section 5.2, lemma L.3). X is the next token and Y the one that head i guesses, both
given the text before. With cross-entropies for entropies, which makes I relative to the model,

    of the next token   H(X)   + H(Y|X) = H(X|Y) +   I(X;Y) + H(Y|X)
    of two tokens       H(X)   + H(Y)   = H(X|Y) + 2 I(X;Y) + H(Y|X)

H(X) is head 1's loss, H(Y) head i's, H(Y|X) that of head i - 1 one token later. In bits per token.

Intervals are percentiles of the bootstrap over batches, 90 %. The last line is JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import log
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mtp
from benchmarks.intervals import interval_panels
from benchmarks.pictures import drawn
from benchmarks.record import launch, record
from mtp.checkpoint import find, load_config
from mtp.data import Batches, load_corpus
from mtp.evaluate.scores import interval
from mtp.loss import Batch, future_targets, reference, wide
from mtp.model import Transformer
from mtp.run import data_of, find_device

Values = dict[str, Any]
HEADS = ("transformer", "linear", "residual")  # kinds that read the trunk's output and nothing else


@dataclass
class AlignmentConfig:
    """bits: of entropy, from which on a token is a fork."""

    checkpoint: str
    batches: int = 32
    batch_size: int = 4
    bits: float = 1.0
    device: str = "auto"
    name: str = "alignment"

    def __post_init__(self) -> None:
        for key, least in (("batches", 2), ("batch_size", 1)):
            if (value := getattr(self, key)) < least:
                raise SystemExit(f"error: {key}={value} must be at least {least}")
        if self.bits <= 0:
            raise SystemExit(f"error: bits={self.bits} must be above 0")


# Gradients.


def gradients(model: Transformer, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each head's own mean loss: at the trunk's output (B, T, D), and over the parameters of the
    trunk's blocks (P,).
    """
    targets, valid = future_targets(batch, model.config.n_future_tokens)
    count = valid.sum((1, 2), keepdim=True).clamp(min=1)
    scale = valid / count.to(wide(model.embedding.weight.dtype))

    def score(fns: Any, inputs: Any, weights: Any, params: Any) -> tuple[Tensor, list[Tensor]]:
        (z,), found = inputs, []
        for i, fn in enumerate(fns):
            x, own = z.detach().requires_grad_(), slice(i, i + 1)
            matrix = weights[i % len(weights)]
            loss, _ = reference([fn], [x], [matrix], targets[own], scale[own])
            found.append(torch.autograd.grad(loss, x)[0])
        return z, found

    z, at_output = model(batch.row, score=score, cut="trunk")
    blocks = list(model.trunk.parameters())
    for gradient in at_output:
        over = torch.autograd.grad(z, blocks, gradient, retain_graph=True)
        yield gradient, torch.cat([g.flatten() for g in over])


def cosines(model: Transformer, batch: Batch) -> Values:
    """Of heads 2..n with head 1."""
    heads = gradients(model, batch)
    first, found = next(heads), Values()
    for i, head in enumerate(heads, 2):
        at_output, over_parameters = (
            F.cosine_similarity(a.flatten(), b.flatten(), 0).item()
            for a, b in zip(first, head, strict=True)
        )
        found |= {f"output_{i}": at_output, f"parameters_{i}": over_parameters}
    return found


# Losses.


class Losses(NamedTuple):
    """Of every head in bits (N, B, T); the entropy of head 1's guess (B, T); which are targets."""

    nll: Tensor
    entropy: Tensor
    valid: Tensor


@torch.no_grad()
def losses(model: Transformer, batch: Batch) -> Losses:
    targets, valid = future_targets(batch, model.config.n_future_tokens)

    def score(fns: Any, inputs: Any, weights: Any, params: Any) -> Losses:
        nll = torch.empty(targets.shape, dtype=wide(inputs[0].dtype), device=targets.device)
        entropy = torch.empty_like(nll[0])
        for i, fn in enumerate(fns):
            for b, latent in enumerate(fn(inputs[0])):  # row by row: logits are large
                logits = F.linear(latent, weights[i % len(weights)])
                logp = logits.to(nll.dtype).log_softmax(-1)
                nll[i, b] = -logp.gather(-1, targets[i, b, :, None]).squeeze(-1) / log(2)
                if i == 0:
                    entropy[b] = -(logp.exp() * logp).sum(-1) / log(2)
        return Losses(nll, entropy, valid)

    return model(batch.row, score=score, cut="trunk")


class Terms(NamedTuple):
    """Of each token that has all its terms (M,). unsure: head 1's entropy before it. own: of the n
    terms that have it as target, first: head 1's. later: what later targets lose, guessed from
    before it. apart: for each head i = 2..n, rows of H(Y) and H(Y|X), where the token is X.
    """

    unsure: Tensor
    first: Tensor
    own: Tensor
    later: Tensor
    apart: Tensor


def terms(found: Losses) -> Terms:
    """Token s of a row, s = n..T-1, has terms at positions s - n .. s."""
    n, _, length = found.nll.shape

    def at(x: Tensor, back: int) -> Tensor:
        """At `back` positions before each token; position s itself has read it."""
        return x[..., n - back : length - back]

    pairs = [(m, j) for m in range(1, n) for j in range(1, n - m + 1)]
    wanted = [(m, m) for m in range(1, n + 1)] + [(m + j, m) for m, j in pairs]
    wanted += [(j, 0) for j in range(1, n)]
    usable = torch.stack([at(found.valid[head - 1], back) for head, back in wanted]).all(0)

    def loss(head: int, back: int) -> Tensor:
        return at(found.nll[head - 1], back)[usable]

    return Terms(
        at(found.entropy, 1)[usable],
        loss(1, 1),
        sum((loss(m, m) for m in range(2, n + 1)), loss(1, 1)),
        sum((loss(m + j, m) - loss(j, 0) for m, j in pairs), torch.zeros_like(loss(1, 1))),
        torch.stack([torch.stack([loss(i, 1), loss(i - 1, 0)]) for i in range(2, n + 1)]),
    )


def choices(of: Terms, bits: float) -> Values:
    """SystemExit where all tokens or none are forks."""
    fork, whole = of.unsure >= bits, of.own + of.later
    if fork.all() or not fork.any():
        raise SystemExit(
            f"error: bits={bits}: in a batch all tokens or none are that unsure; head 1's entropy "
            f"is {of.unsure.min():.2f} to {of.unsure.max():.2f} bits there"
        )
    return {
        "forks": fork.float().mean().item(),
        "loss_next": (of.first[fork].sum() / of.first.sum()).item(),
        "loss_all": (whole[fork].sum() / whole.sum()).item(),
        "terms_forks": (whole[fork].sum() / of.own[fork].sum()).item(),
        "terms_others": (whole[~fork].sum() / of.own[~fork].sum()).item(),
    }


def decomposition(x: float, y: float, y_given_x: float) -> Values:
    """Cross-entropies of X, of Y, and of Y given X -> the parts of the losses of one and of two
    tokens (lemma L.3), and the share that both tokens have in common in each.
    """
    shared = y - y_given_x
    return {
        "x_given_y": x - shared,
        "shared": shared,
        "y_given_x": y_given_x,
        "share_next": shared / (x + y_given_x),
        "share_two": 2 * shared / (x + y),
    }


def information(of: Terms) -> Values:
    x, parts = of.first.mean().item(), of.apart.mean(-1).tolist()
    return {
        f"{key}_{i}": value
        for i, (y, y_given_x) in enumerate(parts, 2)
        for key, value in decomposition(x, y, y_given_x).items()
    }


# All of it.


def opened(config: AlignmentConfig) -> tuple[Transformer, list[Batch]]:
    """What cannot be is refused before weights are read."""
    sizes, data = load_config(find(config.checkpoint)), data_of(config.checkpoint)
    where = f"error: checkpoint={config.checkpoint}"
    if sizes.head not in HEADS or sizes.n_future_tokens < 2:
        raise SystemExit(
            f"{where}: n_future_tokens={sizes.n_future_tokens}, head={sizes.head}: "
            f"wanted are at least 2 heads, of {', '.join(HEADS)}"
        )
    if not sizes.trunk_layers:
        raise SystemExit(f"{where}: all its blocks are heads: there is no trunk to ask")
    if data.source == "task":
        raise SystemExit(f"{where}: it was trained on problems, not on text")
    device, n = find_device(config.device), sizes.n_future_tokens
    held_out = load_corpus(data, mtp.load_tokenizer(config.checkpoint), True)
    rows = Batches(held_out, data.seq_len, n, config.batch_size, epochs=1)
    if rows.n_rows < config.batches * config.batch_size:
        raise SystemExit(
            f"error: batches={config.batches} of batch_size={config.batch_size}: held out are "
            f"{rows.n_rows} rows of {data.seq_len} tokens"
        )
    batches = [batch.to(device) for batch in islice(rows, config.batches)]
    return mtp.load(config.checkpoint, device), batches


def measured(model: Transformer, batches: Sequence[Batch], bits: float) -> dict[str, Values]:
    """Every figure with its interval."""
    found = []
    for number, batch in enumerate(batches, 1):
        of = terms(losses(model, batch))
        found.append(
            {
                "gradients": cosines(model, batch),
                "choices": choices(of, bits),
                "information": information(of),
            }
        )
        print(f"batch {number} of {len(batches)}", file=sys.stderr, flush=True)
    return {
        part: {key: interval([values[part][key] for values in found])._asdict() for key in some}
        for part, some in found[0].items()
    }


def panels(values: Mapping[str, Any]) -> dict[str, dict[str, Values]]:
    """For `interval_panels`."""
    n, bits = values["n"], values["bits"]
    gradient, choice, shared = (values[k] for k in ("gradients", "choices", "information"))
    heads = range(2, n + 1)
    return {
        "cosine with head 1's gradient": {
            f"head {i}, {where}": gradient[f"{where}_{i}"]
            for where in ("output", "parameters")
            for i in heads
        },
        f"forks (from {bits:g} bits on), share": {
            "of tokens": choice["forks"],
            "of the next token's loss": choice["loss_next"],
            f"of all terms, n = {n}": choice["loss_all"],
        },
        f"terms ((n + 1) / 2 = {(n + 1) / 2:g})": {
            "of forks": choice["terms_forks"],
            "of others": choice["terms_others"],
        },
        "X and Y = the next two tokens, bits": {
            "H(X|Y)": shared["x_given_y_2"],
            "I(X;Y)": shared["shared_2"],
            "H(Y|X)": shared["y_given_x_2"],
        },
    }


def run(config: AlignmentConfig) -> Values:
    model, batches = opened(config)
    n = model.config.n_future_tokens
    values: Values = {"n": n, "bits": config.bits, **measured(model, batches, config.bits)}
    path = record(config.name, values, config)
    title = f"What {n} heads ask of their trunk, on held-out text"
    note = f"{config.batches} batches; lines are 90 % intervals"
    drawn(interval_panels, title, panels(values), note, path.with_suffix(".png"))
    return values


if __name__ == "__main__":
    launch(AlignmentConfig, run)
