"""Continue prompts: `python scripts/generate.py checkpoint=runs/demo prompt='"def main"'`.

`checkpoint` is a run, a checkpoint, or a Hugging Face folder of a causal LM or its name on the hub;
`heads` may name a folder of scripts/attach.py beside it. With drafter=heads the model drafts for
itself, with drafter=model another one (`draft`), with drafter=lookup the text itself; the text is
the same, in fewer steps. With drafter=beam rule=joint it is another text, by the joint probability
of blocks. Prompts come from `prompt` or, one per line, from the file `prompts`; the text of a
single one is shown as it comes. `--cfg job` prints every key.

With check=true it says instead whether the checkpoint's heads are sound, on the text that its run
held out or on given prompts; exit status 1 if they are not.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

import mtp
from mtp.data import Batches, load_corpus, read_vocabulary
from mtp.decode.contract import Drafter
from mtp.decode.drafters import make_drafter
from mtp.decode.health import health
from mtp.decode.probe import fastest
from mtp.encoding import chat_template
from mtp.interop.folder import FoundModel, find_model
from mtp.run import data_of, find_device
from mtp.tokenizer import Tokenizer
from mtp.train import PRECISIONS
from scripts.cli import launch, read_lines

CHECKED_ROWS, CHECKED_TOKENS, CHECKED_NEW = 8, 256, 96  # a minute's work for a model of 100M


@dataclass
class GenerateConfig:
    checkpoint: str = MISSING  # or a run directory, for its newest, or a Hugging Face folder
    heads: str | None = None  # folder of heads that were attached to it
    prompt: str | None = None
    prompts: str | None = None  # a file with one prompt per line
    chat: bool = False  # prompts are what a user says, the texts shown the answers
    max_new_tokens: int = 256
    samples: int = 1  # per prompt, with seeds seed, seed + 1, ...
    seed: int = 0
    drafter: str = "none"  # or heads, model, lookup, jacobi, beam
    draft: str | None = None  # run or checkpoint of a model that drafts, for drafter=model or beam
    depth: Any = None  # most guesses per step; null: what the drafter likes; auto: as many as pay
    tree: int | None = None  # for drafter=heads: that many guesses per step, as a tree
    vocabulary: str | None = None  # for drafter=heads: scripts/draft_vocabulary.py wrote it
    pool: int | None = None  # for drafter=jacobi: that many branches per step
    width: int | None = None  # for drafter=beam: that many paths of guesses
    whole: bool | None = None  # for drafter=beam: the target reads all of them, not the best alone
    rule: str = "match"
    threshold: float | None = None  # for rule=joint: the lower, the faster and the less faithful
    stop: list[str] = field(default_factory=list)  # strings that end a text, and are left out
    batch_size: int = 8
    precision: str = "float32"  # bfloat16; auto: the faster, and other text where tokens nearly tie
    threads: Any = "auto"  # of the CPU; auto: one or all, the faster
    device: str = "auto"
    check: bool = False
    sampling: mtp.Sampling = field(default_factory=mtp.Sampling)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1")
        given = [x for x in (self.prompt, self.prompts) if x is not None]
        if len(given) > 1 or not (given or self.check):
            raise ValueError("give either prompt=TEXT or prompts=FILE")
        if self.depth not in (None, "auto") and type(self.depth) is not int:
            raise ValueError(
                f"depth={self.depth!r}: allowed are a number of guesses, null and auto"
            )
        if self.threads != "auto" and (type(self.threads) is not int or self.threads < 1):
            raise ValueError(f"threads={self.threads!r}: allowed are auto and numbers from 1 on")
        if self.precision not in (allowed := (*PRECISIONS, "auto")):
            raise ValueError(f"precision={self.precision!r}: allowed are {', '.join(allowed)}")


def _settings(config: GenerateConfig) -> tuple[list[int], list[str]]:
    """Numbers of threads and precisions to choose from, the plainest first."""
    threads, precisions = sorted({1, torch.get_num_threads()}), list(PRECISIONS)
    if find_device(config.device).type == "cuda":  # where both are known without measuring
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        threads, precisions = [1], ["bfloat16" if native else "float32"]
    return (
        threads if config.threads == "auto" else [config.threads],
        precisions if config.precision == "auto" else [config.precision],
    )


def _find(config: GenerateConfig, where: str) -> FoundModel:
    return find_model(where, special=not config.chat)  # templates begin a text themselves


def _draft(config: GenerateConfig, tokenizer: Tokenizer, precision: str) -> Any:
    """The model that drafts, if there is one."""
    if config.draft is None:
        return None
    found = _find(config, config.draft)
    if found.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"draft={config.draft} has another tokenizer than {config.checkpoint}")
    return found.load(find_device(config.device), PRECISIONS[precision])


def _prompts(config: GenerateConfig, tokenizer: Tokenizer) -> list[list[int]]:
    texts = read_lines(Path(config.prompts)) if config.prompts else [str(config.prompt)]
    if config.chat:
        template = chat_template(tokenizer)
        texts = [template.render([{"role": "user", "content": text}], True) for text in texts]
    return [tokenizer.encode(text) for text in texts]


def _prepare(
    config: GenerateConfig, found: FoundModel, requests: Sequence[mtp.Request]
) -> tuple[Any, Drafter]:
    """The model and its drafter, in the settings that are fastest here. precision=auto holds both
    for a moment.
    """
    threads, precisions = _settings(config)
    loaded, decoders = {}, {}
    for precision in precisions:
        model = found.load(find_device(config.device), PRECISIONS[precision], config.heads)
        drafter = make_drafter(
            config.drafter,
            depth=None if config.depth == "auto" else config.depth,
            tree=config.tree,
            vocabulary=read_vocabulary(config.vocabulary),
            pool=config.pool,
            width=config.width,
            whole=config.whole,
            draft=_draft(config, found.tokenizer, precision),
        )
        loaded[precision] = model, drafter
        decoders[precision] = partial(
            mtp.Decoding,
            model,
            drafter=drafter,
            sampling=config.sampling,
            batch_size=config.batch_size,
            rule=config.rule,
            threshold=config.threshold,
        )
    probe = fastest(decoders, requests, threads)
    torch.set_num_threads(probe.chosen.threads)
    print(f"decoding with {probe}", file=sys.stderr)
    return loaded[probe.chosen.precision]


def complete(config: GenerateConfig) -> None:
    found = _find(config, config.checkpoint)
    tokenizer, stops = found.tokenizer, [mtp.stop_at(*found.ends)]
    if config.stop:
        stops.append(mtp.stop_at_text(tokenizer, *config.stop))
    requests = [
        mtp.Request(ids, config.max_new_tokens, seed, lambda new: any(stop(new) for stop in stops))
        for ids in _prompts(config, tokenizer)
        for seed in range(config.seed, config.seed + config.samples)
    ]
    model, drafter = _prepare(config, found, requests)
    started = time.perf_counter()
    decoding = mtp.Decoding(
        model,
        requests,
        drafter,
        config.sampling,
        batch_size=config.batch_size,
        rule=config.rule,
        threshold=config.threshold,
        depth=mtp.AdaptiveDepth() if config.depth == "auto" else None,
    )
    if len(requests) == 1:
        _show_as_it_comes(decoding, tokenizer, config)
    else:
        _show_all(decoding, tokenizer, config)
    seconds, done = time.perf_counter() - started, decoding.completions
    new, steps = sum(len(c.tokens) for c in done), sum(c.steps for c in done)
    accepted = sum(sum(c.accepted) for c in done)
    length = 1 + accepted / max(1, steps)
    print(
        f"{new} new tokens in {seconds:.2f} s, {new / seconds:,.0f} tokens/s, "
        f"mean acceptance length {length:.2f}"
        + f"; rule={config.rule} is lossy"
        * decoding.rule.lossy,
        file=sys.stderr,
    )


def _show_as_it_comes(decoding: mtp.Decoding, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    """What may be the beginning of a stop string waits until it is known."""
    stops = config.stop
    stream, waits = mtp.TextStream(tokenizer), max([1, *map(len, stops)]) - 1
    text, shown = "", 0
    prompt = stream.push(decoding.requests[0].prompt)
    print("" if config.chat else prompt, end="", flush=True)
    for _, tokens in decoding:
        text += stream.push(tokens)
        sure = mtp.cut_at(text, *stops)[: max(0, len(text) - waits)]
        print(sure[shown:], end="", flush=True)
        shown = max(shown, len(sure))
    print(mtp.cut_at(text + stream.close(), *stops)[shown:])


def _show_all(decoding: mtp.Decoding, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    for _ in decoding:
        pass
    for request, completion in zip(decoding.requests, decoding.completions, strict=True):
        prompt = tokenizer.decode(request.prompt)
        whole = tokenizer.decode([*request.prompt, *completion.tokens])
        new = mtp.cut_at(whole[len(prompt) :], *config.stop)
        print(new if config.chat else prompt + new)


def check(config: GenerateConfig) -> None:
    threads, precisions = _settings(config)
    torch.set_num_threads(threads[0])
    found = _find(config, config.checkpoint)
    if found.theirs:
        raise ValueError("check=true: is for checkpoints of ours")
    tokenizer = found.tokenizer
    model = found.load(find_device(config.device), PRECISIONS[precisions[0]])
    longest = min(CHECKED_TOKENS, model.config.max_seq_len)
    if config.prompt is None and config.prompts is None:
        texts = _held_out(config.checkpoint, tokenizer, model.config.n_future_tokens, longest)
        prompts = [text[: 1 + len(text) // 4] for text in texts]
    else:
        texts, prompts = None, [ids[: longest // 2] for ids in _prompts(config, tokenizer)]
    new = min(CHECKED_NEW, model.config.max_seq_len - max(map(len, prompts)))
    seen = health(model, prompts, texts, new)
    print(seen.table())
    print("\n".join(seen.findings) or "the heads are sound")
    if seen.findings:
        sys.exit(1)


def _held_out(where: str, tokenizer: Tokenizer, n: int, longest: int) -> list[list[int]]:
    """Rows of the text that a run was not trained on, without padding."""
    try:
        data = data_of(where)
    except ValueError as error:
        raise ValueError(f"check=true: {error}; give prompt=TEXT or prompts=FILE") from error
    corpus = load_corpus(data, tokenizer, held_out=True)
    batch = next(Batches(corpus, data.seq_len, n, CHECKED_ROWS))
    rows = [row[doc >= 0] for row, doc in zip(batch.row, batch.doc, strict=True)]
    return [row[:longest].tolist() for row in rows if len(row) > n + 1]


def main(config: GenerateConfig) -> None:
    (check if config.check else complete)(config)


if __name__ == "__main__":
    launch("generate", GenerateConfig, main)
