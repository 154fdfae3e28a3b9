"""Our models in lm-evaluation-harness, as `--model mtp`: ARC, HellaSwag, PIQA, GSM8K and the rest.

    python scripts/lm_eval.py --model mtp --model_args checkpoint=runs/demo,drafter=heads ...

Log-likelihoods are those of the next-token head. Texts are written by our decoding loop, so that a
drafter changes how long it takes and not what is written. How a request becomes ids is the
harness's own affair, and its own code: which special tokens come first, where context and
continuation meet, windows of long texts. What goes beyond its adapter for transformers:

    context without tokens     the prefix token stands before the continuation; there it is an error
    text of a generation       as its ids say: no space is dropped at its start or before a comma
    generation arguments       those that we do not serve are refused instead of passed on

Letters: R rows of a batch, T columns, V vocabulary, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from mtp import checkpoint as checkpoints
from mtp.decode.contract import Completion, Request, chain, cut_at, stop_at, stop_at_text
from mtp.decode.drafters import make_drafter
from mtp.decode.loop import generate
from mtp.decode.sampling import Sampling
from mtp.evaluate.code import completion_text
from mtp.interop.folder import find_model
from mtp.records import PLAIN_CHAT
from mtp.tokenizer import HuggingFaceTokenizer, Tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ImportError("the harness needs, in a checkout: pip install '.[lm-eval]'") from error

log = logging.getLogger("lm_eval.mtp")  # below the logger that the harness shows
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NEW_TOKENS = 256  # where a task does not say; the harness's own number
CHUNK = 8  # batches between two entries into the harness's cache of answers
Messages = list[dict[str, str]]


class OurText:
    """How a model's texts become ids. `TheirText` has the same names.

    theirs: the tokenizer of transformers, if it is one. ends: ids that end a text. prefix: what
    stands before a text that nothing stands before.
    """

    theirs = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.name = tokenizer, tokenizer.fingerprint
        self.ends, self.prefix = (tokenizer.end_id,), tokenizer.end_id
        self.decode = tokenizer.decode

    def encode(self, text: str, special: bool | None) -> list[int]:
        """special: whether to add what texts begin with; None: unless it is there already."""
        return self.tokenizer.encode(text)  # our documents begin with nothing

    def chat(self, messages: Messages, open_answer: bool) -> str:
        """As `mtp.records` writes chats."""
        return PLAIN_CHAT.render(messages, open_answer)


class TheirText:
    def __init__(self, tokenizer: HuggingFaceTokenizer, name: str, end: Any = None) -> None:
        """end: one more id that ends a text, or several."""
        self.theirs, self.name = tokenizer.theirs, name
        self.decode, begin = tokenizer.decode, tokenizer.theirs.bos_token_id
        found = (tokenizer.end_id, *(end if isinstance(end, list | tuple) else [end]))
        self.ends = tuple(dict.fromkeys(i for i in found if i is not None))
        self.prefix = tokenizer.end_id if begin is None else begin

    def encode(self, text: str, special: bool | None) -> list[int]:
        if special is None and text.startswith(self.theirs.decode(self.prefix)):
            special = False
        given = {} if special is None else {"add_special_tokens": special}
        return self.theirs.encode(text, **given)

    def chat(self, messages: Messages, open_answer: bool) -> str:
        return self.theirs.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=open_answer,
            continue_final_message=not open_answer,
        )


@dataclass(frozen=True)
class Plan:
    """A request in our words. stops: where its text is cut."""

    request: Request
    sampling: Sampling
    stops: list[str]


@register_model("mtp")
class HarnessModel(TemplateLM):
    """checkpoint: one of ours, or a run directory; pretrained: a Hugging Face folder or name of a
    causal LM. drafter: none, heads or lookup.

    ValueError names the argument and what is allowed.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        pretrained: str | None = None,
        drafter: str = "none",
        batch_size: int | str = 8,
        device: str = "cuda",
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if (checkpoint is None) == (pretrained is None):
            raise ValueError("model_args: give either checkpoint=RUN or pretrained=FOLDER_OR_NAME")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
        self.batch_size = _batch_size(batch_size)
        self.drafter = make_drafter(drafter)
        self._device = _device(device)
        load: Any = _theirs if checkpoint is None else _ours
        self.target, self.text = load(checkpoint or pretrained, self._device, DTYPES[dtype])
        self.tokenizer = self.text.theirs  # the harness asks it for its chat template
        self.max_length = self.target.config.max_seq_len
        self.drafter.attach(self.target)  # which says what cannot be drafted for

    @property
    def eot_token_id(self) -> int:
        return self.text.ends[0]

    @property
    def prefix_token_id(self) -> int:
        return self.text.prefix

    @property
    def tokenizer_name(self) -> str:
        return self.text.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self.text.encode(string, add_special_tokens)

    def apply_chat_template(
        self, chat_history: Messages, add_generation_prompt: bool = True
    ) -> str:
        return self.text.chat(chat_history, add_generation_prompt)

    # Log-likelihoods.

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [self._windows(request.args[0]) for request in requests]
        pairs = [(None, *window) for text in windows for window in text]
        answers = iter(self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm))
        totals = [sum(next(answers)[0] for _ in text) for text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
        )
        return [make_disjoint_window(window) for window in windows]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """requests: (key of the harness's cache or None, context ids, continuation ids)."""
        for key, _context, ids in requests:
            self._check_continuation(key, ids)
        pairs = [(context or [self.prefix_token_id], ids) for _, context, ids in requests]
        lengths = [len(context) + len(ids) for context, ids in pairs]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        with tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for batch in by_length(range(len(pairs)), lengths, self.batch_size):
                for i, answer in zip(batch, self._judge([pairs[i] for i in batch]), strict=True):
                    answers[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                bar.update(len(batch))
        return answers

    def _check_continuation(self, key: Any, ids: Sequence[int]) -> None:
        if not 0 < len(ids) <= self.max_length:
            raise ValueError(
                f"the continuation of {key!r} has {len(ids)} tokens of its own: a log-likelihood "
                f"needs 1 to {self.max_length}, the context of the model"
            )

    @torch.inference_mode()
    def _judge(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """log p(ids | context), and whether ids is what greedy decoding writes. Contexts too long
        lose their beginning; padding on the right is seen by nobody.
        """
        texts = [(context + ids)[-self.max_length - 1 :] for context, ids in pairs]
        width = max(map(len, texts)) - 1
        rows = [text[:-1] + [0] * (width + 1 - len(text)) for text in texts]
        latents_RTD = self._read(torch.tensor(rows, device=self._device))
        answers = []
        for (_, ids), text, latent_TD in zip(pairs, texts, latents_RTD, strict=True):
            scored = latent_TD[len(text) - 1 - len(ids) : len(text) - 1]
            logits_TV = self.target.logits(scored).float()
            wanted = torch.tensor(ids, device=self._device)
            logp = logits_TV.log_softmax(-1).gather(1, wanted[:, None])
            greedy = bool((logits_TV.argmax(-1) == wanted).all())
            answers.append((float(logp.cpu().double().sum()), greedy))
        return answers

    def _read(self, tokens_RT: Tensor) -> Tensor:
        """Latents (R, T, D): logits are made only where something is scored."""
        (R, T), target = tokens_RT.shape, self.target
        layout = chain(0, [0] * R, T, T, target.embedding.weight)
        return target.read(tokens_RT, layout, target.new_cache(target.next_layers, R, T))[0]

    # Texts.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Samples of one document differ by their places among the requests; the harness's `--seed`
        moves them all.
        """
        plans = [self._plan(i, *request.args) for i, request in enumerate(requests)]
        lengths = [len(plan.request.prompt) for plan in plans]
        texts, done = [""] * len(plans), list[Completion]()
        with tqdm(total=len(plans), desc="texts", disable=disable_tqdm) as bar:
            for members in _alike(plans):
                for chunk in by_length(members, lengths, CHUNK * self.batch_size):
                    done += (completions := self._write([plans[i] for i in chunk]))
                    for i, completion in zip(chunk, completions, strict=True):
                        texts[i] = self._cut(plans[i], completion)
                        self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    bar.update(len(chunk))
        _tell(done)
        return texts

    def _plan(self, i: int, context: str, settings: dict[str, Any]) -> Plan:
        given = dict(normalize_gen_kwargs(settings, NEW_TOKENS))
        new = int(given.pop("max_gen_toks"))
        if not 0 < new < self.max_length:
            raise ValueError(
                f"max_gen_toks={new}: allowed are 1 to {self.max_length - 1}, which leaves a token "
                f"of the model's context to the prompt; set it with --gen_kwargs max_gen_toks=..."
            )
        stops = [text for text in given.pop("until") if text]
        prompt = self.tok_encode(context)[new - self.max_length :] or [self.prefix_token_id]
        seed = (torch.initial_seed() + i) % 2**63
        request = Request(prompt, new, seed, self._stop(stops))
        return Plan(request, _sampling(given), stops)

    def _stop(self, texts: Sequence[str]) -> Callable[[list[int]], bool]:
        at_end = stop_at(*self.text.ends)
        if not texts:
            return at_end
        at_text = stop_at_text(self.text, *texts)
        return lambda new: at_end(new) or at_text(new)

    def _write(self, plans: Sequence[Plan]) -> list[Completion]:
        return generate(
            self.target,
            [plan.request for plan in plans],
            self.drafter,
            plans[0].sampling,
            batch_size=self.batch_size,
        )

    def _cut(self, plan: Plan, completion: Completion) -> str:
        return cut_at(
            completion_text(self.text, plan.request.prompt, completion.tokens), *plan.stops
        )


def by_length(members: Iterable[int], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Batches of members, the longest first: what does not fit in memory fails at once.

    >>> list(by_length([0, 1, 2], [3, 5, 4], size=2))
    [[1, 2], [0]]
    """
    ordered = sorted(members, key=lambda i: -lengths[i])
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]


def _alike(plans: Sequence[Plan]) -> Iterable[list[int]]:
    """The plans, by number, that share their settings of sampling."""
    members: dict[Any, list[int]] = {}
    for i, plan in enumerate(plans):
        members.setdefault(astuple(plan.sampling), []).append(i)
    return members.values()


def _sampling(given: dict[str, Any]) -> Sampling:
    """From what is left of a task's generation arguments."""
    warm = given.pop("do_sample")
    temperature = given.pop("temperature", 1.0) if warm else 0.0
    unknown = given.keys() - {"temperature", "top_k", "top_p", "num_beams"}
    if unknown or given.pop("num_beams", 1) != 1:
        raise ValueError(
            f"generation arguments {', '.join(sorted(unknown)) or 'num_beams'}: served are until, "
            f"max_gen_toks, do_sample, temperature, top_k, top_p, num_beams=1"
        )
    return Sampling(temperature, int(given.get("top_k", 0)), float(given.get("top_p", 1.0)))


def _tell(done: Sequence[Completion]) -> None:
    new, steps = sum(len(c.tokens) for c in done), sum(c.steps for c in done)
    accepted = sum(sum(c.accepted) for c in done)
    log.info("%d new tokens, mean acceptance length %.2f", new, 1 + accepted / max(1, steps))


def _ours(where: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    tokenizer = checkpoints.load_tokenizer(checkpoints.find(where))
    text: Any = OurText(tokenizer)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        text = TheirText(tokenizer, tokenizer.fingerprint)
    return checkpoints.load(where, device, dtype).packed(), text


def _theirs(where: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, TheirText]:
    found = find_model(where)
    if not isinstance(found.tokenizer, HuggingFaceTokenizer):
        raise ValueError(f"pretrained={where} is no Hugging Face folder: give checkpoint={where}")
    text = TheirText(found.tokenizer, where.replace("/", "__"), found.ends)
    return found.load(device, dtype), text


def _device(name: str) -> torch.device:
    """The harness says "cuda:0" where its user said nothing."""
    missing = name.startswith("cuda") and not torch.cuda.is_available()
    return torch.device("cpu" if missing else name)


def _batch_size(given: int | str) -> int:
    try:
        size = int(given)
    except ValueError:
        size = 0  # "auto"
    if size < 1:
        raise ValueError(f"batch_size={given!r}: allowed are numbers from 1 on")
    return size
