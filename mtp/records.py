"""What a document is, and how a record is read as one: text, a prompt and its completion, a chat.

Completions and chats train on their answers only: `Document` says which text is a target. A chat
has one header line per message, "<|user|>\\nHi\\n<|assistant|>\\nHello", unless its tokenizer
brings a template; targets are what an assistant says and the end token behind it. A text that a
model wrote has its ids beside it (`scripts/self_distill.py`).
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

WRITTEN = ("prompt_ids", "completion_ids", "tokenizer")  # keys beside a prompt and its completion
# Of messages, prompt, completion and text.
Keys = tuple[str | None, str | None, str | None, str | None]


class Ids(NamedTuple):
    """A document's segments as a model read and wrote them: their text, tokenised again, can be
    other ids. tokenizer: the fingerprint of theirs.
    """

    segments: tuple[list[int], ...]
    tokenizer: str


Messages = list[dict[str, Any]]  # each with a role and its content
Segments = tuple[tuple[str, bool], ...]


class Document(NamedTuple):
    """Segments of text, each with whether it is a target, tokenised one by one.

    messages: those of a chat, for templates; the segments are the chat as written without one.
    """

    segments: Segments
    name: str = ""  # the file's path below its folder
    ids: Ids | None = None
    messages: Messages | None = None

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.segments)


# Records.


def parsed(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: holds {type(record).__name__}, not a JSON object")
    return record


def document_of(record: dict[str, Any], keys: Keys, where: str) -> Document:
    """Ids before messages before prompt and completion before text; a key set to null is not looked
    for.
    """
    messages, prompt, completion, text = keys
    if record.keys() >= {*WRITTEN}:
        return _written(record, where)
    if messages in record:
        said = _messages(record[messages], where)
        return Document(chat_segments(said), messages=said)
    if prompt in record and completion in record:
        pair = (_string(record, prompt, where), False), (_string(record, completion, where), True)
        return Document(pair)
    if text in record:
        return Document(((_string(record, text, where), True),))
    raise ValueError(
        f"{where}: has the keys {sorted(record)}; needed is data.messages_key={messages!r}, "
        f"or data.prompt_key={prompt!r} and data.completion_key={completion!r}, "
        f"or data.text_key={text!r}"
    )


def _written(record: dict[str, Any], where: str) -> Document:
    prompt, completion, tokenizer = (
        _string(record, key, where) for key in ("prompt", "completion", "tokenizer")
    )
    ids = record["prompt_ids"], record["completion_ids"]
    for found in ids:
        if not isinstance(found, list) or not all(type(i) is int and i >= 0 for i in found):
            raise ValueError(f"{where}: ids must be a list of numbers from 0 on, are {found!r}")
    return Document(((prompt, False), (completion, True)), ids=Ids(ids, tokenizer))


def _messages(messages: Any, where: str) -> Messages:
    if not isinstance(messages, list):
        raise ValueError(f"{where}: messages must be a list, are {messages!r}")
    for message in messages:
        _string(message, "role", where), _string(message, "content", where)
    return messages


def _string(record: Any, key: str | None, where: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} must be a string, is {value!r}")
    try:
        value.encode("utf-8")  # JSON can carry half of a surrogate pair
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {key!r}: {error}") from error
    return value


# Chats.


class ChatTemplate(NamedTuple):
    """render(messages, open_answer): a chat as text, perhaps up to where the next answer begins.
    end: the text of the token that ends an answer; "": nothing in the text does.
    """

    render: Callable[[Messages, bool], str]
    end: str = ""


def _plain(messages: Messages, open_answer: bool) -> str:
    text = "".join(f"<|{message['role']}|>\n{message['content']}\n" for message in messages)
    if open_answer:
        return f"{text}<|assistant|>\n"
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    return text[: len(text) - answered]


PLAIN_CHAT = ChatTemplate(_plain)


def chat_segments(messages: Messages, template: ChatTemplate = PLAIN_CHAT) -> Segments:
    """Targets are an assistant's words up to the end of each answer. ValueError where a template
    writes a chat's beginning otherwise once the chat goes on.
    """
    segments: list[tuple[str, bool]] = []
    told = ""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = template.render(messages[:i], True)
            after = template.render(messages[: i + 1], False)
            if not before.startswith(told) or not after.startswith(before):
                raise ValueError(
                    f"the chat template does not write message {i + 1} of a chat behind those "
                    f"before it: {after[:200]!r}"
                )
            answer = after[len(before) :]
            if (at := answer.rfind(template.end)) >= 0:  # what is behind its end is the template's
                answer = answer[: at + len(template.end)]
            segments += [(before[len(told) :], False), (answer, True)]
            told = before + answer
    rest = template.render(messages, False)[len(told) :]
    return (*segments, (rest, False)) if rest.strip() else tuple(segments)
