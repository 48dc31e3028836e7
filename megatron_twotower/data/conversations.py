"""Conversations as text: their turns, the chat template that renders them, and what is scored.

A record is in one of the usual shapes:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}          # or two lists of messages
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

It may have `tools` and `chat_template_kwargs`, which the template receives.

Scored are the turns of the assistant, with the special token that ends each. Where the template
marks them (`{% generation %}`), the marks decide. Otherwise a turn is what the rendering up to and
including the turn has after the rendering of what is before it, with the begin of an answer that
generation adds. The rules:

- An earlier turn that the template changes later on (it removes its thinking) is context: the model
  reads it so, and never writes it so. The last turn must be found.
- Of prompt and completion, the turns of the completion alone are scored.
- An empty answer is its end-of-turn token. A conversation whose answers are all empty is left out.
- What follows the last scored token is not kept.
- Prompts and answers are encoded apart, as in generation: no token reaches from one into the other.
- A special token that a turn spells out is that token, as in `transformers`; the mask token is not.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.text import is_unicode
from megatron_twotower.config.special_tokens import read_special_tokens
from megatron_twotower.data.record_formats import Fault
from megatron_twotower.data.tokenizer import load_tokenizer

MESSAGE_FIELDS = ("messages", "conversations", "conversation")
PAIR_FIELDS = ("prompt", "completion")
# Columns of a parquet file that are read.
FIELDS = (*MESSAGE_FIELDS, *PAIR_FIELDS, "tools", "chat_template_kwargs")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # with `from` and `value`
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, Any]
# Texts that are encoded one by one, and whether each is scored.
Pieces = tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Conversation:
    """The turns of a record.

    Attributes:
        messages: Each with `role` and `content`, and what else the record has.
        first_scored: The index of the first turn that may be scored.
        tools: Descriptions of functions, for the template; None without any.
        arguments: Further values that the template reads.
    """

    messages: list[Message]
    first_scored: int = 0
    tools: list[Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


# --- records ---


def is_conversation(record: Mapping[str, Any]) -> bool:
    """Whether a record has one of the shapes, by its fields."""
    return any(isinstance(record.get(name), list) for name in MESSAGE_FIELDS) or all(
        isinstance(record.get(name), (str, list)) for name in PAIR_FIELDS
    )


def conversation_of_record(record: Mapping[str, Any]) -> Conversation | Fault:
    """The conversation of a record, or why it has none."""
    try:
        named = next((name for name in MESSAGE_FIELDS if record.get(name) is not None), None)
        if named is not None:
            messages, first = _messages(record[named], named, alone="user"), 0
        elif all(record.get(name) is not None for name in PAIR_FIELDS):
            prompt = _messages(record["prompt"], "prompt", alone="user")
            messages, first = [*prompt, *_messages(record["completion"], "completion", alone="assistant")], len(prompt)
        else:
            found = ", ".join(map(repr, record)) or "nothing"
            return Fault(f"fields {found[:80]}, expected messages, or prompt and completion", malformed=True)
        tools = _parsed(record.get("tools"), "tools", list)
        arguments = _parsed(record.get("chat_template_kwargs"), "chat_template_kwargs", dict)
    except _Malformed as error:
        return Fault(str(error), malformed=True)
    return Conversation(messages, first, tools or None, arguments or {})


class _Malformed(Exception):
    """Why a record is no conversation."""


def _messages(value: Any, where: str, *, alone: str) -> list[Message]:
    """The turns of a field. A string is one turn, of the role `alone`."""
    if isinstance(value, str) and where in PAIR_FIELDS:
        value = [{"role": alone, "content": value}]
    if not isinstance(value, list) or not value:
        raise _Malformed(f"field {where!r} holds {_shown(value)}, expected a list of turns")
    return [_message(each, f"turn {number} of {where!r}") for number, each in enumerate(value, start=1)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise _Malformed(f"{where} is {_shown(value)}, expected an object with role and content")
    found = {key: each for key, each in value.items() if each is not None}  # parquet fills in what other rows have
    if "from" in found and "role" not in found:
        role = found.pop("from")
        found = {"role": _ROLES.get(role, role), "content": found.pop("value", None), **found}
    if not isinstance(found.get("role"), str):
        raise _Malformed(f"{where} has the role {_shown(found.get('role'))}, expected a string")
    found["content"] = _content(found.get("content"), where)
    return found


def _content(value: Any, where: str) -> str:
    """The text of a turn: a string, or the texts of a list of parts. A call of a tool has none."""
    if value is None:
        return ""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise _Malformed(f"{where} has parts that are no text, expected text alone")
        value = "".join(part for part in parts if part is not None)
    if not isinstance(value, str):
        raise _Malformed(f"{where} has content of {type(value).__name__}, expected a string")
    if not is_unicode(value):
        raise _Malformed(f"{where} holds an unpaired surrogate")
    return value


def _parsed(value: Any, where: str, kind: type[Any]) -> Any:
    """A field that may be JSON in a string."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _Malformed(f"field {where!r} is not JSON") from error
    if value is not None and not isinstance(value, kind):
        raise _Malformed(f"field {where!r} holds {_shown(value)}, expected a {kind.__name__}")
    return value


def _shown(value: Any) -> str:
    return "nothing" if value in (None, "", []) else repr(value)[:40]


# --- templates ---


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template.

    Attributes:
        tokenizer: Its tokenizer, which names special tokens.
        special: The special tokens whose spelling in a rendered text becomes their ids.
    """

    tokenizer: PreTrainedTokenizerFast
    special: frozenset[str]

    @property
    def digest(self) -> str:
        """The SHA-256 of the template."""
        return hashlib.sha256(json.dumps(self.tokenizer.chat_template).encode()).hexdigest()

    def text(self, messages: Sequence[Message], conversation: Conversation, *, begin_answer: bool = False) -> str:
        """Render turns. A template is a program of the folder, and may raise anything.

        Args:
            messages: The turns.
            conversation: What else the template receives.
            begin_answer: Add the begin of a turn of the assistant.
        """
        return self._render(messages, conversation, begin_answer=begin_answer, marks=False)[0]

    def marked(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]] | None]:
        """The whole text, and the parts that `{% generation %}` marks; None without such marks."""
        source = self.tokenizer.get_chat_template(tools=conversation.tools)
        marks = _GENERATION.search(source) is not None
        return self._render(conversation.messages, conversation, begin_answer=False, marks=marks)

    def _render(
        self, messages: Sequence[Message], conversation: Conversation, *, begin_answer: bool, marks: bool
    ) -> tuple[str, list[tuple[int, int]] | None]:
        texts, spans = render_jinja_template(
            [list(messages)],
            tools=conversation.tools,
            chat_template=self.tokenizer.get_chat_template(tools=conversation.tools),
            return_assistant_tokens_mask=marks,
            add_generation_prompt=begin_answer,
            **{**self.tokenizer.special_tokens_map, **conversation.arguments},
        )
        return texts[0], [tuple(each) for each in spans[0]] if marks else None


def open_template(folder: Path, chat_template: str | None = None) -> Template:
    """The chat template of the tokenizer in a folder, or the text of another one for it.

    Raises:
        UserError: The tokenizer cannot be opened, or there is no template.
    """
    tokenizer = load_tokenizer(folder)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    said = read_special_tokens(folder).mask_token_id
    return template_of(tokenizer, folder=folder, mask_id=tokenizer.mask_token_id if said is None else said)


def template_of(tokenizer: PreTrainedTokenizerFast, *, folder: Path | str, mask_id: int | None) -> Template:
    """The chat template of an open tokenizer.

    Args:
        tokenizer: It names the special tokens.
        folder: For the error.
        mask_id: The mask token. Its spelling is text: the context tower never reads it.

    Raises:
        UserError: There is no template.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{folder}: found no chat template, expected chat_template.jinja next to tokenizer.json")
    added = tokenizer.added_tokens_decoder.items()
    special = (token.content for token_id, token in added if token.special and token_id != mask_id)
    return Template(tokenizer, frozenset(special))


def reason_of(error: Exception, messages: Iterable[Message]) -> str:
    """Why a template does not take turns, in one line."""
    roles = ", ".join(dict.fromkeys(str(message.get("role")) for message in messages))
    return f"the chat template does not take turns of {roles} ({' '.join(str(error).split())[:200]})"


def prompt_text(template: Template, conversation: Conversation) -> str:
    """A conversation up to the begin of the next answer, as generation reads it.

    Raises:
        UserError: The template does not take it, in one line.
    """
    try:
        return template.text(conversation.messages, conversation, begin_answer=True)
    except Exception as error:
        raise UserError(reason_of(error, conversation.messages)) from error


def render(template: Template, conversation: Conversation) -> Pieces | Fault:
    """A conversation as the pieces that are encoded, up to its last scored token.

    Returns:
        The pieces, or why the conversation cannot be used.
    """
    messages = conversation.messages
    answers = [i for i, each in enumerate(messages) if each["role"] == "assistant" and i >= conversation.first_scored]
    if not answers:
        return Fault("found no turn of the assistant, expected one to score", malformed=True)
    if all(_is_empty(messages[i]) for i in answers):
        return Fault("empty")
    try:
        text, marks = template.marked(conversation)
        if ignored := _ignored_role(template, conversation, text):
            return Fault(f"the chat template leaves out turns of {ignored}, expected a role it knows", malformed=True)
    except Exception as error:  # a template is a program of the folder, and may raise anything
        return Fault(reason_of(error, messages), malformed=True)
    if marks is not None:
        spans = _marked_spans(template, conversation, text, marks)
    else:
        found = [_span_of_turn(template, conversation, text, turn) for turn in answers]
        if found[-1] is None:
            return Fault("cannot tell what the chat template makes of the last turn of the assistant", malformed=True)
        spans = [span for span in found if span is not None]
    return _checked(template, messages[answers[-1]], text, spans)


def _is_empty(message: Message) -> bool:
    return not (message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


def _ignored_role(template: Template, conversation: Conversation, text: str) -> str | None:
    """A role whose turns change nothing in the text."""
    messages = conversation.messages
    for role in dict.fromkeys(message["role"] for message in messages):
        others = [message for message in messages if message["role"] != role]
        if role not in ("user", "assistant") and template.text(others, conversation) == text:
            return str(role)
    return None


def _marked_spans(
    template: Template, conversation: Conversation, text: str, marks: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The marked parts of the text. Marks that leave out the end of a turn are completed.

    The end of a turn is the special token directly after the marks.
    """
    begin = 0
    if conversation.first_scored:
        before = template.text(conversation.messages[: conversation.first_scored], conversation)
        begin = _shared(before, text)  # the marks of the prompt are before it
    spans = [(first, last) for first, last in marks if first >= begin and last > first]
    return [(first, _with_end(template.special, text, first, last)) for first, last in spans]


def _with_end(special: Iterable[str], text: str, begin: int, end: int) -> int:
    """The end of a marked part: after its special token, or after the one that follows it."""
    if any(token and text.endswith(token, begin, end) for token in special):
        return end
    return end + max((len(token) for token in special if token and text.startswith(token, end)), default=0)


def _span_of_turn(template: Template, conversation: Conversation, text: str, turn: int) -> tuple[int, int] | None:
    """Where the text has what the model writes at a turn; None if it is in another form there."""
    messages = conversation.messages
    try:
        before = template.text(messages[:turn], conversation) if turn else ""
        prompt = template.text(messages[:turn], conversation, begin_answer=True)
        through = template.text(messages[: turn + 1], conversation)
    except Exception:
        return None
    begin, common = _shared(prompt, through), _shared(text, through)
    end = _last_special(template.special, through[:common])
    if common == len(through) and through[end:].strip():
        end = common  # no special token ends the turn
    # Generation may begin an answer otherwise than the record does (with a thought), but not before
    # what generation adds.
    if not _shared(before, prompt) <= begin <= end or _answer(messages[turn]) not in text[begin:end]:
        return None
    return begin, end


def _answer(message: Message) -> str:
    """The text of a turn that every template shows, without a thought before it."""
    return str(message["content"]).rpartition("</think>")[2].strip()


def _shared(first: str, second: str) -> int:
    """The number of characters at the begin that two texts share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _last_special(special: Iterable[str], text: str) -> int:
    """The end of the last special token of a text; 0 without one."""
    return max((found + len(token) for token in special if token and (found := text.rfind(token)) >= 0), default=0)


def _checked(template: Template, last: Message, text: str, spans: Sequence[tuple[int, int]]) -> Pieces | Fault:
    """Cut the text into pieces, after a look at the last answer."""
    if not spans:
        return Fault("the chat template marks no text of the assistant, expected some to score", malformed=True)
    begin, end = spans[-1]
    if _answer(last) not in text[begin:end]:
        return Fault("the chat template changes the last turn of the assistant, expected its text", malformed=True)
    if not any(token and text.endswith(token, begin, end) for token in template.special):
        return Fault(
            "the chat template ends the turn of the assistant with no special token, expected one that ends generation",
            malformed=True,
        )
    pieces, at = [], 0
    for begin, end in spans:
        pieces += [(text[at:begin], False)] if begin > at else []
        pieces.append((text[begin:end], True))
        at = end
    return tuple(pieces)
