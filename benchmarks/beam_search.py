"""Beam search on a target: what joint decoding is measured against when it seeks likely texts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mtp.decode.contract import Request, chain
from mtp.decode.sampling import Sampling


@torch.inference_mode()
def beam_search(model: Any, request: Request, width: int, sampling: Sampling) -> list[int]:
    """The text of most joint probability, under the law of `sampling`, that `width` beams come
    across: whole texts, ended or of full length, are set aside, and others take their places. It
    stops when no beam can overtake the best of those. Sums are not divided by length.
    """
    prompt, new = list(request.prompt), request.max_new_tokens
    slots = len(prompt) + new
    cache = model.new_cache(model.next_layers, width, slots)
    layout = chain(0, [0], len(prompt), slots, cache.k)
    latent, _ = model.read(torch.tensor([prompt], device=cache.k.device), layout, cache)
    for row in range(1, width):
        cache.copy(0, row, len(prompt))
    latent = latent[:, -1:].expand(width, -1, -1)
    joint = [0.0] + [-math.inf] * (width - 1)  # they are one beam still
    texts: list[list[int]] = [[] for _ in range(width)]
    best, found = -math.inf, texts[0]
    for length in range(len(prompt), slots):
        beams: list[tuple[float, int, list[int]]] = []
        for total, row, token in _grown(sampling.probs(model.logits(latent)[:, -1]).log(), joint):
            text = [*texts[row], token]
            if len(text) == new or (request.stop and request.stop(text)):
                best, found = max((best, found), (total, text))
            elif len(beams) < width:
                beams.append((total, row, text))
        if not beams or beams[0][0] <= best:
            return found
        beams += [(-math.inf, *beams[0][1:])] * (width - len(beams))
        joint, rows, texts = ([*x] for x in zip(*beams, strict=True))
        for x in (cache.k, cache.v):
            x[:, :, :length] = x[:, rows, :length]
        last = torch.tensor([text[-1:] for text in texts], device=cache.k.device)
        latent, _ = model.read(last, chain(0, [length] * width, 1, slots, cache.k), cache)
    return found


def _grown(logp: Tensor, joint: list[float]) -> list[tuple[float, int, int]]:
    """logp (W, V) after W beams -> joint log probability, beam and token of the 2 W best ways to go
    on: W remain, if of each beam one ends its text.
    """
    total = (torch.tensor(joint, device=logp.device)[:, None] + logp).flatten()
    best, at = total.topk(min(2 * len(joint), len(total)))
    vocabulary = logp.shape[-1]
    return [
        (x, i // vocabulary, i % vocabulary)
        for x, i in zip(best.tolist(), at.tolist(), strict=True)
        if x > -math.inf
    ]
