"""The one decoding loop: propose, read, decide, emit; rows that end make room for the next request.

A step feeds each row its pending token and the guesses after it, in one pass of the target. The
loop owns the cache of the layers that the next token needs; a drafter owns the rest. Rows of
different lengths share a pass: each writes to its own slots.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp.decode.contract import (
    Completion,
    Draft,
    Drafter,
    Layout,
    NoDraft,
    Place,
    Request,
    Rule,
    State,
    Target,
    Verdict,
    chain,
    tree,
)
from mtp.decode.depth import DepthPolicy
from mtp.decode.sampling import OnHost, Sampling, lacks_fp64, make_rule


def generate(
    model: Target,
    requests: Sequence[Request],
    drafter: Drafter | None = None,
    sampling: Sampling | None = None,
    *,
    batch_size: int = 8,
    rule: str = "match",
    threshold: float | None = None,
    logprobs: bool = False,
    depth: DepthPolicy | None = None,
) -> list[Completion]:
    """Continue every request; completions come back in the order of the requests.

    With rule="match" the text is the one that decoding without a drafter gives, token for token,
    whatever the drafter, batch size and order (fp32 and fp64; in bf16 up to near-ties); "exact" and
    "block" keep its law. "joint" is lossy: threshold, in (0, 1], says how much less probable a
    block may be under the target than under the drafter. logprobs fills `Completion.logprobs`.
    depth says how many guesses a step makes, see `mtp.decode.depth.AdaptiveDepth`; None: as many as
    the drafter can. ValueError: a prompt that is empty, not in the vocabulary or too long for the
    context, an unknown rule, a threshold out of range, or caches that do not fit in memory.
    """
    decoding = Decoding(
        model,
        requests,
        drafter,
        sampling,
        batch_size=batch_size,
        rule=rule,
        threshold=threshold,
        logprobs=logprobs,
        depth=depth,
    )
    with decoding.modes():
        while decoding.fill():
            decoding.step()
    return decoding.completions


def check_request(model: Any, i: int, request: Request) -> None:
    prompt, new = request.prompt, request.max_new_tokens
    if len(prompt) < 1:
        raise ValueError(
            f"request {i} has an empty prompt: give at least one token, "
            f"the end token of another document for instance"
        )
    if new < 1:
        raise ValueError(f"request {i} has max_new_tokens={new}: it must be at least 1")
    if not 0 <= request.seed < 2**63:
        raise ValueError(f"request {i} has seed={request.seed}: allowed are 0 to 2^63 - 1")
    if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
        raise ValueError(f"request {i} has token ids outside 0..{model.config.vocab_size - 1}")
    if len(prompt) + new > model.config.max_seq_len:
        raise ValueError(
            f"request {i} needs {len(prompt)} prompt tokens + {new} new ones, but the context "
            f"max_seq_len is {model.config.max_seq_len}: shorten the prompt or lower max_new_tokens"
        )


class Decoding:
    """What `generate` runs to its end, for whoever wants to see it happen. Iterating over it takes
    the steps and yields (number of a request, its newest tokens) as soon as they are decided; a new
    iteration goes on where the last was left. `completions` holds all so far.

    By hand, under `modes`: `fill` reads waiting prompts into free rows and must come before each
    `step`, one pass over all rows.
    """

    def __init__(
        self,
        model: Any,
        requests: Sequence[Request],
        drafter: Drafter | None = None,
        sampling: Sampling | None = None,
        *,
        batch_size: int = 8,
        rule: str = "match",
        threshold: float | None = None,
        logprobs: bool = False,
        depth: DepthPolicy | None = None,
    ) -> None:
        self.rule: Rule = make_rule(rule, sampling or Sampling(), threshold)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        for i, request in enumerate(requests):
            check_request(model, i, request)
        self.model, self.requests, rows = model, requests, min(batch_size, len(requests))
        self.drafter = drafter = drafter or NoDraft()
        self.completions = [Completion() for _ in requests]
        self.untold: dict[int, list[int]] = {}  # by request: what no iteration has yielded yet
        self.logprobs, self.depth = logprobs, depth
        self.waiting = list(range(len(requests)))[::-1]
        self.owner: list[int | None] = [None] * rows
        self.prompts: list[list[int] | None] = [None] * rows  # whose cache still stands
        self.prompt_end: list[Tensor | None] = [None] * rows
        drafter.attach(model)
        # Drafts may reach past the end of the longest text.
        longest = max((len(r.prompt) + r.max_new_tokens for r in requests), default=0)
        self.slots = longest + 1 + drafter.nodes
        require_memory(model, rows, self.slots, drafter.needs_memo)
        drafter.begin(rows, self.slots)
        self.cache = model.new_cache(model.next_layers, rows, self.slots)
        if lacks_fp64(self.cache.k.device):
            self.rule = OnHost(self.rule)
        device = self.cache.k.device
        text = torch.zeros(rows, self.slots, dtype=torch.long, device=device)
        self.nothing = Draft(text[:, :0])
        self.flat_text = text.flatten()  # a view: slots are written through it
        self.pending = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.place = Place([], [], 0)
        self.state = State(
            *(text, [1] * rows, [0] * rows, None, self._draw, self._scores), branches=self._branches
        )

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        busy = True
        while busy:
            with self.modes():  # and not around what is told: they are not for whoever listens
                busy = self.fill()
                if busy:
                    self.step()
            while self.untold:
                i = next(iter(self.untold))
                yield i, self.untold.pop(i)

    @contextmanager
    def modes(self) -> Iterator[None]:
        """What `fill` and `step` run under. The cache has one dtype: autocast must not reach it."""
        with torch.inference_mode(), torch.autocast(self.cache.k.device.type, enabled=False):
            yield

    def _draw(self, logits: Tensor, ahead: int = 0) -> Draft:
        return self.rule.draw(logits, self.place, ahead)

    def _scores(self, logits: Tensor, ahead: int = 0) -> Tensor:
        return self.rule.scores(logits, self.place, ahead)

    def _branches(self, logits: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
        return self.rule.branches(logits, self.place, ahead)

    def fill(self) -> bool:
        """Give free rows to waiting requests, or else take them out; False when none is left."""
        for row in range(len(self.owner)):
            while self.waiting and self.owner[row] is None:
                self._admit(row, self.waiting.pop())
        for row in reversed(range(len(self.owner))):
            if self.owner[row] is None:
                self._take_out(row)
        return bool(self.owner)

    def _take_out(self, row: int) -> None:
        """The last row moves to this one's place."""
        state, last = self.state, len(self.owner) - 1
        if row < last:
            self._copy_text(last, row, state.length[last])
            self.pending[row] = self.pending[last]
            if state.choices is not None:
                state.choices[row] = state.choices[last]
            for of_row in (self.owner, state.length, state.seed):
                of_row[row] = of_row[last]  # type: ignore[index,assignment]
            self.drafter.admit(state, row, last)
        for of_row in (self.owner, state.length, state.seed):
            of_row.pop()  # type: ignore[attr-defined]
        self.pending, state.text = self.pending[:last], state.text[:last]
        self.nothing = Draft(state.text[:, :0])
        if state.memo is not None:
            state.memo = state.memo[:last]
        if state.choices is not None:
            state.choices = state.choices[:last]

    def _admit(self, row: int, i: int) -> None:
        """Read the prompt in this row alone, or copy it from a row that holds the same one, and
        choose the first new token.
        """
        state, request = self.state, self.requests[i]
        prompt, length = list(request.prompt), len(request.prompt)
        source = next((r for r, p in enumerate(self.prompts) if p == prompt), None)
        self.owner[row], state.length[row], state.seed[row] = i, length, request.seed
        self.prompts[row] = prompt
        if source is None:
            self._read_prompt(row, torch.tensor([prompt], device=state.text.device))
        elif source != row:
            self._copy_text(source, row, length)
            self.prompt_end[row] = self.prompt_end[source]
        if state.choices is not None:
            state.choices[row] = -1
        self.drafter.admit(state, row, source)
        logits, nothing = self.model.logits(self.prompt_end[row]), Draft(self.nothing.tokens[:1])
        verdict = self.rule(logits, nothing, Place([request.seed], [length], 1))
        self.pending[row] = verdict.next
        self._settle(row, [], int(verdict.next), [0], logits[0])

    def _read_prompt(self, row: int, prompt: Tensor) -> None:
        layout = chain(row, [0], prompt.shape[1], self.slots, self.cache.k)
        latent, memo = self.model.read(prompt, layout, self.cache)
        self.state.text[row, : prompt.shape[1]] = prompt[0]
        self.prompt_end[row] = latent[:, -1:]
        self._keep(layout.where, memo)

    def _copy_text(self, source: int, row: int, length: int) -> None:
        self.cache.copy(source, row, length)
        for x in (self.state.text, self.state.memo):
            if x is not None:
                x[row, :length] = x[source, :length]

    def _keep(self, index: Tensor, memo: Tensor) -> None:
        if self.drafter.needs_memo:
            if self.state.memo is None:
                self.state.memo = memo.new_zeros(*self.state.text.shape, memo.shape[-1])
            self.state.memo.flatten(0, 1).index_copy_(0, index, memo.flatten(0, 1))

    def _keep_choices(self, layout: Layout, choice: Tensor) -> None:
        """Of a tree those of the columns whose slot is their place in the text."""
        assert self.state.choices is not None
        slots = layout.where.view_as(layout.positions) % self.slots
        choice = choice.masked_fill(slots != layout.positions, -1)
        self.state.choices.flatten().index_copy_(0, layout.where, choice.flatten())

    def _write_pending(self) -> None:
        at = [row * self.slots + length for row, length in enumerate(self.state.length)]
        self.flat_text[at] = self.pending[:, 0]

    def step(self) -> None:
        state, started = self.state, time.perf_counter()
        rows = range(len(self.owner))
        k = self.drafter.depth
        if not self.rule.lossy:  # else a row's last draft would depend on the room of others
            k = min(k, max(map(self._room, rows)) - 1)
        if self.depth is not None:
            k = self.depth.choose(k)
        self.place = Place(list(state.seed), [n + 1 for n in state.length], 1 + k)
        draft, feed = self.nothing, self.pending
        if k > 0:
            self._write_pending()
            draft = self.drafter.propose(state, k)
            feed = torch.cat([self.pending, draft.tokens.clamp(min=0)], 1)
        if draft.parents is None:
            layout = chain(0, state.length, feed.shape[1], self.slots, self.cache.k)
        else:
            layout = tree(state.length, draft.lineage, self.slots, self.cache.k)
        latent, memo = self.model.read(feed, layout, self.cache)
        logits = self.model.logits(latent)
        verdict = self.rule(logits, draft, self.place)
        self._keep(layout.where, memo)
        if state.choices is not None:
            choice = logits.argmax(-1) if verdict.choice is None else verdict.choice
            self._keep_choices(layout, choice)
        self.flat_text.index_copy_(0, layout.where, feed.flatten())
        self.pending = verdict.next[:, None]
        accepted, following = verdict.accepted.tolist(), verdict.next.tolist()
        paths = self._paths(verdict, accepted)
        offered, guesses = self._offered(draft), draft.tokens.tolist()
        for row in rows:
            state.length[row] += len(paths[row])
            self._count(row, offered[row], accepted[row])
            self._settle(row, guesses[row], following[row], paths[row], logits[row])
        if self.depth is not None:
            seconds = time.perf_counter() - started  # complete: the verdict was read
            self.depth.observe(k, accepted, seconds)

    def _paths(self, verdict: Verdict, accepted: list[int]) -> list[Sequence[int]]:
        """The columns that stand, per row. Those of a tree are moved behind one another first."""
        if verdict.path is None:
            return [range(1 + a) for a in accepted]
        paths: list[Sequence[int]] = [
            [column for column, stands in enumerate(row) if stands] for row in verdict.path.tolist()
        ]
        moves = [
            (row * self.slots + self.state.length[row] + column, i - column)
            for row, path in enumerate(paths)
            for i, column in enumerate(path)
            if i != column
        ]
        if moves:
            source, by = torch.tensor(moves, device=self.flat_text.device).unbind(1)
            self.cache.move(source, source + by)
            for x in (self.state.text, self.state.memo):
                if x is not None:
                    x.flatten(0, 1)[source + by] = x.flatten(0, 1)[source]
        return paths

    def _offered(self, draft: Draft) -> list[list[int]]:
        """Depths at which each row's draft offers a guess, ascending."""
        if draft.parents is None:
            return [
                [depth for depth, guess in enumerate(row, 1) if guess >= 0]
                for row in draft.tokens.tolist()
            ]
        depths = draft.lineage.sum(-1)[:, 1:] - 1
        return [sorted(set(row) - {0}) for row in (depths * (draft.tokens >= 0)).tolist()]

    def _settle(
        self, row: int, guesses: list[int], following: int, path: Sequence[int], logits: Tensor
    ) -> None:
        """Take what stands of a row's step: the guesses on the path after the pending token, and
        the target's own token. logits (1 + K, V) gave the token after each column.
        """
        tokens = [*(guesses[column - 1] for column in path[1:]), following]
        logprobs: list[float] = []
        if self.logprobs:
            law = logits[list(path)].float().log_softmax(-1)
            logprobs = law[range(len(tokens)), tokens].tolist()
        self._emit(row, tokens, logprobs)

    def _room(self, row: int) -> int:
        """New tokens that the row's request still takes."""
        owner = self.owner[row]
        assert owner is not None
        return self.requests[owner].max_new_tokens - len(self.completions[owner].tokens)

    def _count(self, row: int, depths: Sequence[int], accepted: int) -> None:
        """depths: of the guesses offered, 1 for those after the pending token. Guesses for
        which the request has no room are there for other rows: they do not count.
        """
        completion, k = self.completions[self.owner[row]], self.place.count - 1  # type: ignore[index]
        most = self._room(row) - 1
        completion.steps += 1
        completion.drafted += [0] * (k - len(completion.drafted))
        completion.accepted += [0] * (k - len(completion.accepted))
        for depth in depths:
            completion.drafted[depth - 1] += depth <= most
        for depth in range(min(accepted, most)):
            completion.accepted[depth] += 1

    def _emit(self, row: int, tokens: list[int], logprobs: list[float]) -> None:
        """Append what a step decided, cut at the request's end; an ended request leaves its row."""
        owner = self.owner[row]
        assert owner is not None
        request, completion = self.requests[owner], self.completions[owner]
        for depth, token in enumerate(tokens, 1):
            completion.tokens.append(token)
            self.untold.setdefault(owner, []).append(token)
            completion.heads.append(depth + 1 if depth < len(tokens) else 1)
            completion.logprobs += logprobs[depth - 1 : depth]
            if len(completion.tokens) == request.max_new_tokens or (
                request.stop and request.stop(completion.tokens)
            ):
                self.owner[row] = None
                return


def require_memory(model: Any, rows: int, slots: int, memo: bool) -> None:
    """Say that caches do not fit before they are allocated."""
    needed, free = (
        cache_bytes(model, rows, slots, memo),
        _free_memory(model.embedding.weight.device),
    )
    if free is not None and needed > free:
        raise ValueError(
            f"caches for batch_size={rows} and {slots} slots need {needed / 2**30:.2f} GiB, "
            f"but {free / 2**30:.2f} GiB are free: "
            f"lower batch_size or max_new_tokens"
        )


def cache_bytes(model: Any, rows: int, slots: int, memo: bool = True) -> int:
    """Bytes that keys, values and (where heads draft) their own cache and memo take."""
    config = model.config
    layers = model.next_layers + (model.rest_layers if memo else 0)
    per_slot = 2 * layers * config.kv_heads * config.head_dim + (model.memo_dim if memo else 0)
    return rows * slots * per_slot * model.embedding.weight.element_size()


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not every system says
        return None
