"""Several paths of guesses at once: beams that grow by a token at a time, and the best paths
through the guesses of heads that do not read each other.

Letters: B rows, W beams, K guesses, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtp.decode.contract import Draft


class Beams:
    """The `width` paths that go on, of all one-token continuations of those before. A path's weight
    is the product of its tokens' weights: to divide by the sum over beams, as the definition of a
    stochastic beam does at each depth, changes no choice, and is left out.

    By depth, each (B, W): tokens, -1 where fewer than W paths have any weight; parents, the beams
    of the depth before that they continue; logq, log weight after the parent; joint, of the path.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.tokens: list[Tensor] = []
        self.parents: list[Tensor] = []
        self.logq: list[Tensor] = []
        self.joint: list[Tensor] = []

    def grow(self, weight: Tensor, luck: Tensor) -> None:
        """Log weight of each token after each beam, (B, W, V); (B, 1, V) at first. Those of most
        weight and luck together go on, see `Rule.branches`.
        """
        joint = self.joint[-1][:, :, None] + weight if self.joint else weight
        at = (joint + luck).flatten(1).topk(self.width, -1).indices
        vocabulary = weight.shape[-1]
        self.joint.append(joint.flatten(1).gather(1, at))
        self.logq.append(weight.flatten(1).gather(1, at))
        self.parents.append(at // vocabulary)
        self.tokens.append((at % vocabulary).masked_fill(self.joint[-1] == -math.inf, -1))

    def tree(self) -> Draft:
        """All of them, depth by depth."""
        nodes = [
            parents + (depth - 1) * self.width if depth else torch.full_like(parents, -1)
            for depth, parents in enumerate(self.parents)
        ]
        return Draft(
            torch.cat(self.tokens, 1), parents=torch.cat(nodes, 1), logq=torch.cat(self.logq, 1)
        )

    def best(self) -> Draft:
        """The path of most weight."""
        beam, path = self.joint[-1].argmax(1, keepdim=True), []
        for each in zip(self.tokens[::-1], self.logq[::-1], self.parents[::-1], strict=True):
            token, logq, parent = (x.gather(1, beam) for x in each)
            path.append((token, logq))
            beam = parent
        tokens, logqs = (torch.cat(x, 1) for x in zip(*path[::-1], strict=True))
        return Draft(tokens, logq=logqs)


def best_tree(scores: Tensor, nodes: int) -> Draft:
    """The `nodes` most probable beginnings of paths, if scores (B, K, V) are logits of K tokens
    that do not depend on each other: a tree, since none is more probable than its own beginning.
    """
    logp, token = scores.float().log_softmax(-1).topk(min(nodes, scores.shape[-1]), -1)
    width = token.shape[-1]
    joint, tokens = [logp[:, 0]], [token[:, 0]]
    parents = [torch.full_like(token[:, 0], -1)]
    for depth in range(1, token.shape[1]):
        grown = (joint[-1][:, :, None] + logp[:, depth, None]).flatten(1)
        best, at = grown.topk(min(nodes, grown.shape[1]), -1)
        parents.append(sum(x.shape[1] for x in joint[:-1]) + at // width)
        tokens.append(token[:, depth].gather(1, at % width))
        joint.append(best)
    # Of equals the first: it lies nearer to the root. Then in order, so that parents come first.
    order = torch.cat(joint, 1).sort(dim=-1, descending=True, stable=True).indices
    kept = order[:, :nodes].sort(-1).values
    parent = torch.cat(parents, 1).gather(1, kept)
    place = torch.searchsorted(kept, parent.clamp(min=0))
    return Draft(torch.cat(tokens, 1).gather(1, kept), parents=torch.where(parent < 0, -1, place))
