"""What benchmarks of decoding learn from texts alone: held-out rows, where two texts part and
whether the model cared, and what heads would get accepted under teacher forcing.

Letters: T positions, N future tokens, V vocabulary; P positions in a row, K guesses at each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.bare import logits_in_passes
from mtp.decode.beam import best_tree
from mtp.decode.contract import Draft
from mtp.loss import agreements
from mtp.model import Transformer
from mtp.records import Document
from mtp.tokenizer import Tokenizer


def rows_of(
    documents: Iterable[Document], tokenizer: Tokenizer, count: int, length: int
) -> list[list[int]]:
    """`count` rows of `length` tokens, evenly from all that the documents hold."""
    encoded = [tokenizer.encode(d.text) for d in documents]
    rows = [
        ids[at : at + length] for ids in encoded for at in range(0, len(ids) - length + 1, length)
    ]
    if len(rows) < count:
        raise ValueError(f"{count} rows of {length} tokens were asked for: there are {len(rows)}")
    return [rows[i * len(rows) // count] for i in range(count)]


class Judge:
    """Keeps the first text of every prompt as the reference and says where others leave it. near:
    how far apart two logits may be that rounding puts in another order.
    """

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], near: float) -> None:
        self.model, self.prompts, self.near = model, prompts, near
        self.reference: list[list[int]] = []

    def __call__(self, texts: Sequence[list[int]]) -> dict[str, int]:
        """Texts after the first prompts: how many are the same, and of the others, how many part
        from the reference at a near-tie.
        """
        self.reference += texts[len(self.reference) :]
        margins = [self._margin(i, text) for i, text in enumerate(texts)]
        apart = [margin for margin in margins if margin is not None]
        ties = sum(margin <= self.near for margin in apart)
        same = len(texts) - len(apart)
        return {"same_texts": same, "near_ties": ties, "other_texts": len(apart) - ties}

    @torch.inference_mode()
    def _margin(self, i: int, text: list[int]) -> float | None:
        reference = self.reference[i]
        if text == reference:
            return None
        at = next(
            j for j, pair in enumerate(zip(reference, text, strict=True)) if pair[0] != pair[1]
        )
        known = torch.tensor([[*self.prompts[i], *reference[:at]]])
        logits = self.model(known.to(self.model.embedding.weight.device))[0, -1]
        best, second = logits.float().topk(2).values.tolist()
        return best - second


@torch.inference_mode()
def movement(
    model: Transformer, prompts: Sequence[Sequence[int]], texts: Sequence[list[int]], width: int
) -> float:
    """How far the number of tokens in a pass, by rounding alone, moves the two best logits after
    any token of these texts against each other: the largest difference between passes over one
    token, over `width`, and over all. No decoder takes part.
    """
    found = 0.0
    packed, device = model.packed(), model.embedding.weight.device
    for prompt, text in zip(prompts, texts, strict=True):
        tokens, begin = torch.tensor([[*prompt, *text]], device=device), len(prompt)
        one, some = (logits_in_passes(packed, tokens, begin, w).float() for w in (1, width))
        best = one.topk(2).indices
        read = [one, some, model(tokens)[0, begin:].float()]
        margins = [logits.gather(-1, best).diff(dim=-1) for logits in read]
        found = max(found, *((a - b).abs().max().item() for a, b in combinations(margins, 2)))
    return found


class OnText(NamedTuple):
    """Teacher-forced: how often guesses 1..d all are head 1's own choice, for each d; the same for
    a path in the tree.
    """

    chain: list[float]
    tree: list[float]


@torch.inference_mode()
def on_text(
    model: Any,
    rows: Sequence[Sequence[int]],
    nodes: int,
    vocabulary: Tensor | None = None,
    begins: Iterable[int] = repeat(0),
) -> OnText:
    """model: a `Transformer`, or `AttachedHeads`. vocabulary: the only ids that are guessed, as in
    `OwnHeads`. begins: the first position of each row that counts.
    """
    n, positions = 1 + model.extra_heads, 0
    in_chain, in_tree = torch.zeros(2, n - 1)
    for row, begin in zip(rows, begins, strict=False):  # one by one: all heads' logits are large
        padded = [*row, *[0] * n]  # scores are of all but the last n tokens
        tokens = torch.tensor([padded], device=model.embedding.weight.device)
        logits_TNV = model(tokens, score=_all_logits)[0, begin:]
        if vocabulary is not None:
            kept = logits_TNV[:, 1:, vocabulary]
            logits_TNV[:, 1:] = float("-inf")
            logits_TNV[:, 1:, vocabulary] = kept
        best_NBT = logits_TNV.argmax(-1).T[:, None]
        agree, usable = agreements(best_NBT, torch.ones_like(best_NBT, dtype=torch.bool))
        span = usable.shape[1]
        wanted = best_NBT[0, 0].unfold(0, n, 1)[:, 1:]  # head 1's own next n - 1 choices
        draft = best_tree(logits_TNV[:span, 1:].float(), nodes)
        depth = torch.arange(1, n, device=tokens.device)
        in_chain += agree.cumprod(0).sum((1, 2)).cpu()
        in_tree += (path_length(draft, wanted)[:, None] >= depth).sum(0).cpu()
        positions += span
    return OnText((in_chain / positions).tolist(), (in_tree / positions).tolist())


def _all_logits(
    fns: Sequence[Any], inputs: Sequence[Tensor], weights: Sequence[Tensor], params: Any
) -> Tensor:
    """A score: (B, T, N, V)."""
    latents = [fn(inputs[i % len(inputs)]) for i, fn in enumerate(fns)]
    return torch.stack([x @ weights[i % len(weights)].T for i, x in enumerate(latents)], 2)


@torch.inference_mode()
def draft_on_text(
    model: Any, draft: Any, rows: Sequence[Sequence[int]], depth: int, begins: Iterable[int]
) -> list[float]:
    """As `OnText.chain`, of a draft model that makes `depth` guesses. models: ids (1, T) -> logits
    (1, T, V).
    """
    stand, positions = torch.zeros(depth), 0
    for row, begin in zip(rows, begins, strict=False):
        tokens = torch.tensor([list(row)], device=model.embedding.weight.device)
        own, guess = (m(tokens)[0, begin:].argmax(-1) for m in (model, draft))
        found = (own == guess)[1:].double().unfold(0, depth, 1).cumprod(-1)
        stand += found.sum(0).cpu()
        positions += len(found)
    return (stand / positions).tolist()


def coverage(rows: Sequence[Sequence[int]], ids: Tensor, ahead: int) -> list[float]:
    """At how many places the next 1, 2, ... `ahead` tokens all are among ids.

    >>> coverage([[1, 2, 1, 3, 1]], torch.tensor([1, 2]), ahead=2)
    [0.75, 0.5]
    """
    known = torch.isin(torch.tensor(rows), ids).double().unfold(1, ahead, 1)
    return known.cumprod(-1).mean((0, 1)).tolist()


def path_length(draft: Draft, wanted: Tensor) -> Tensor:
    """How many of the tokens wanted (P, K), from the first on, are a path of each row's tree, (P,).

    >>> draft = Draft(torch.tensor([[5, 6, 7]]), parents=torch.tensor([[-1, -1, 1]]))
    >>> path_length(draft, torch.tensor([[6, 7, 7]])).tolist()
    [2]
    """
    assert draft.parents is not None
    node = torch.full_like(wanted[:, 0], -1)
    length = torch.zeros_like(node)
    for token in wanted.unbind(1):
        children = (draft.parents == node[:, None]) & (draft.tokens == token[:, None])
        found = children.any(1)
        node = torch.where(found, children.long().argmax(1), -2)  # nobody's parent
        length += found
    return length
