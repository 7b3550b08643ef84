"""Messages -> text -> ids, and which of the ids are learned. The only chat renderer: training and serving share it.

    ids = encode_chat(tokenizer, [{"role": "user", "content": "你好"}])              # a prompt to answer
    ids, mask = encode_chat_with_mask(tokenizer, messages_with_answers)             # a training example

The model's own jinja2 template is rendered as transformers does, in a sandbox, since it comes with the model. A model
without one (a base model) gets `DEFAULT_TEMPLATE`, plain "User:" and "Assistant:" paragraphs, so that it can be
talked to; `chat_stop` gives the stop strings such a model needs.

**Control tokens belong to the template.** A user who types "<|im_end|>" writes ten characters, not the end of a turn.
Every control token in what the caller sent is broken up by a marker before rendering. When none was found, the ids are
those of the rendered text, plainly encoded. Else the text is encoded by a copy of the tokenizer whose control tokens
have secret names: the template's are renamed to those, the caller's are left as the ordinary text they are.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from bimo.errors import CorruptModelError, UsageError
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.messages import check_strings, strings, validate_messages
from bimo.tokenizer.tools import fold_messages, validate_tools

__all__ = [
    "DEFAULT_TEMPLATE",
    "chat_stop",
    "encode_chat",
    "encode_chat_with_mask",
    "preview_mask",
    "render_chat",
]

# For models without a template. The blank line between turns is what text of this kind looks like in pre-training.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}User: {{ message.content }}\n\n"
    "{% elif message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n\n"
    "{% else %}{{ message.content }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

# Markers are digits, which survive every filter a template may apply (trim, upper, tojson), and random, so that no
# caller can write one.
_GUARD = "7" + "".join(secrets.choice("0123456789") for _ in range(40))
_END = "8" + "".join(secrets.choice("0123456789") for _ in range(40))
_BLOCK_OPEN = "5" + "".join(secrets.choice("0123456789") for _ in range(40))
_BLOCK_CLOSE = "6" + "".join(secrets.choice("0123456789") for _ in range(40))
_SECRET = secrets.token_hex(16)


def chat_stop(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Stop strings a chat with this model needs: none with a template, the next speaker's line without one."""
    return () if tokenizer.chat_template else ("\nUser:",)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the text the model sees. For people to read: `encode_chat` is not this text re-encoded.

    continue_final: leave the last message, an assistant's, open, to be continued. variables: extra values for the
    template (`enable_thinking`, ...). Raises UsageError for messages or tools that are not OpenAI's or that the
    template refuses.
    """
    conversation = _Conversation(tokenizer, messages, tools, variables)
    text, _ = conversation.finish(conversation.render(add_generation_prompt, continue_final), plain=True)
    return text


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of the conversation; arguments and errors as for `render_chat`."""
    conversation = _Conversation(tokenizer, messages, tools, variables)
    rendered = conversation.render(add_generation_prompt, continue_final)
    return conversation.encode(rendered, []).ids


def encode_chat_with_mask(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation and, for each, 1 where the model is trained: all it would have had to write.

    That is what follows each generation prompt up to and with the end of the turn. Templates with `{% generation %}`
    blocks say it themselves. Raises UsageError when nothing or everything would be trained: that is always a mistake.
    """
    conversation = _Conversation(tokenizer, messages, tools, variables)
    rendered, spans = conversation.trained_spans()
    encoding = conversation.encode(rendered, [place for span in spans for place in span])
    starts, ends = encoding.cuts[0::2], encoding.cuts[1::2]
    mask = [0] * len(encoding.ids)
    span = 0
    for index, (start, end) in enumerate(encoding.offsets):
        while span < len(ends) and ends[span] <= start:
            span += 1
        mask[index] = int(span < len(ends) and start < ends[span] and end > starts[span])
    if not any(mask):
        raise UsageError("no token of the conversation would be trained: it needs an assistant message", "messages")
    if all(mask):
        raise UsageError("every token of the conversation would be trained: it needs a prompt to answer", "messages")
    return encoding.ids, mask


def preview_mask(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int], *, marks: bool = False) -> Any:
    """A `rich.text.Text` of the example: trained tokens green, the others dim, with the share trained underneath.

    marks: what is trained stands in «», too, for where there are no colours.
    """
    from rich.text import Text

    text = Text()
    for trained, group in _runs(mask):
        piece = b"".join(tokenizer.token_bytes(i, skip_special_tokens=False) for i in ids[group])
        shown = piece.decode("utf-8", "replace")
        shown = f"«{shown}»" if trained and marks else shown
        text.append(shown, style="bold green" if trained else "dim")
    return text.append(f"\n{sum(mask)} of {len(mask)} tokens are trained ({sum(mask) / max(len(mask), 1):.0%})")


def _runs(mask: Sequence[int]) -> Iterable[tuple[int, slice]]:
    """Maximal runs of equal values."""
    start = 0
    for place in range(1, len(mask) + 1):
        if place == len(mask) or mask[place] != mask[start]:
            yield mask[start], slice(start, place)
            start = place


# --- templates -----------------------------------------------------------------------------------------------------


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant writes. Marked only when asked for."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: Any, caller: Any) -> str:
        return f"{_BLOCK_OPEN}{caller()}{_BLOCK_CLOSE}" if context.get("_mark_blocks") else caller()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja2's own filter escapes HTML, which is not what models were trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Template:
    """A compiled template and what it knows about."""

    def __init__(self, source: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            self.compiled = environment.from_string(source)
            tree = environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise CorruptModelError(f"the model's chat template is not valid jinja2: {error}") from error
        self.source = source
        self.knows_tools = "tools" in jinja2.meta.find_undeclared_variables(tree)
        self.knows_calls = "tool_calls" in source
        self.knows_results = "'tool'" in source or '"tool"' in source
        self.knows_developer = "developer" in source
        self.marks_blocks = bool(re.search(r"\{%-?\s*generation\b", source))


_template = lru_cache(maxsize=32)(_Template)


class _Encoding:
    """Ids, their places in the text, and the places asked about."""

    def __init__(self, ids: list[int], offsets: list[tuple[int, int]], cuts: list[int]) -> None:
        self.ids, self.offsets, self.cuts = ids, offsets, cuts


class _Conversation:
    """One conversation on its way from messages to ids: guarded messages, template, variables."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> None:
        plain = validate_messages(messages)
        offered = validate_tools(tools)
        check_strings(offered, "tools", "tools")
        self.tokenizer = tokenizer
        self.template = template = _template(tokenizer.chat_template or DEFAULT_TEMPLATE)
        self.control = _Control.of(tokenizer, template.source)
        if not template.knows_developer:
            plain = [m | {"role": "system"} if m["role"] == "developer" else m for m in plain]
        folded_tools = [] if template.knows_tools else offered
        plain = fold_messages(plain, folded_tools, calls=not template.knows_calls, results=not template.knows_results)
        guard = self.control.guard
        self.messages = [
            {key: value if key == "role" else guard(value, m["role"] in ("user", "tool")) for key, value in m.items()}
            for m in plain
        ]
        self.variables: dict[str, Any] = dict(tokenizer.special_tokens)
        if not tokenizer.chat_template:
            begins = tokenizer.backend.encode("").ids[:1] == [tokenizer.bos_token_id]
            self.variables["bos_token"] = tokenizer.special_text(tokenizer.bos_token_id) if begins else ""
            self.variables.setdefault("eos_token", tokenizer.special_text(next(iter(tokenizer.eos_token_ids), None)))
        self.variables["documents"] = None
        self.variables |= dict(variables or {})
        self.variables["tools"] = guard(offered, True) if offered and template.knows_tools else None

    def render(
        self,
        add_generation_prompt: bool,
        continue_final: bool = False,
        *,
        messages: list[dict[str, Any]] | None = None,
        mark_blocks: bool = False,
    ) -> str:
        """Rendered text with markers still in it."""
        chosen = self.messages if messages is None else messages
        if continue_final:
            last = chosen[-1]
            if last["role"] != "assistant" or not isinstance(last.get("content"), str):
                raise UsageError("to be continued, the last message must be an assistant's, with text", "messages")
            # the space shows whether the template trims messages, in which case the cut is trimmed too
            chosen = [*chosen[:-1], last | {"content": last["content"] + _END + " "}]
        try:
            rendered = self.template.compiled.render(
                **self.variables,
                messages=chosen,
                add_generation_prompt=add_generation_prompt and not continue_final,
                _mark_blocks=mark_blocks,
            )
        except jinja2.TemplateError as error:
            raise UsageError(f"the model's chat template refuses these messages: {error}", "messages") from error
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise UsageError(
                f"the model's chat template cannot render these messages ({type(error).__name__}: {error})", "messages"
            ) from error
        if not continue_final:
            return rendered
        place = rendered.rfind(_END)
        if place < 0:
            raise UsageError("the model's chat template leaves out the message that is to be continued", "messages")
        kept = rendered[:place]
        return kept if rendered.startswith(_END + " ", place) else kept.rstrip()

    def trained_spans(self) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation and the [start, end) of what the assistant wrote in it."""
        if self.template.marks_blocks:
            rendered = self.render(False, mark_blocks=True)
            blocks = re.finditer(f"{_BLOCK_OPEN}(.*?){_BLOCK_CLOSE}", rendered, re.DOTALL)
            return rendered, [block.span() for block in blocks]
        rendered = self.render(False)
        spans = []
        for place, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            spans.append(self._turn(rendered, place))
        return rendered, spans

    def _turn(self, rendered: str, place: int) -> tuple[int, int]:
        """The [start, end) of the assistant's message in the rendered conversation, its end-of-turn token included."""
        if place == 0:
            raise UsageError("the first message is the assistant's: there is no prompt to answer", "messages")
        start = self._prefix(rendered, self.messages[:place], prompt=True)
        after = self._prefix(rendered, self.messages[: place + 1], prompt=False)
        if start is not None and after is not None and after > start:
            end = self.control.end_token(rendered, start, after)
            return start, start + len(rendered[start:after].rstrip()) if end is None else end
        # The template changes earlier messages when later ones come (Mistral moves the system message to the last
        # user's, Qwen3 drops old thoughts), so the text of that time is not in this one; the content is.
        opened, closed = self._content(rendered, place)
        start = opened if start is None else start
        end = closed
        if closed is not None:
            called = "tool_calls" in self.messages[place]  # calls follow the content
            end = self.control.end_token(rendered, closed, len(rendered) if called else closed)
            end = closed if end is None and not called else end
        if start is None or end is None:
            raise UsageError(
                f"messages[{place}] cannot be found in the rendered conversation: this chat template changes earlier "
                "messages when later ones come; mark the assistant's part with {% generation %} in the template",
                "messages",
            )
        return start, end

    def _content(self, rendered: str, place: int) -> tuple[int | None, int | None]:
        """Where the first and the last character of a message's content are, as far as they can be found."""
        message = self.messages[place]
        text = message.get("content") or ""
        core = text.strip()
        if not core:
            return None, None
        marked = message | {"content": text.replace(core, _BLOCK_OPEN + core + _BLOCK_CLOSE, 1)}
        trial = self.render(False, messages=[*self.messages[:place], marked, *self.messages[place + 1 :]])
        if trial.replace(_BLOCK_OPEN, "").replace(_BLOCK_CLOSE, "") != rendered:
            return None, None
        opened = trial.find(_BLOCK_OPEN)
        closed = trial.replace(_BLOCK_OPEN, "").find(_BLOCK_CLOSE)
        return opened if opened >= 0 else None, closed if closed >= 0 else None

    def _prefix(self, rendered: str, messages: list[dict[str, Any]], *, prompt: bool) -> int | None:
        """Where `messages` end in `rendered`, if it begins with them."""
        try:
            beginning = self.render(prompt, messages=messages)
        except UsageError:
            return None
        return len(beginning) if rendered.startswith(beginning) else None

    def finish(self, rendered: str, *, plain: bool, cuts: Sequence[int] = ()) -> tuple[str, list[int]]:
        """Take the markers out; unless `plain`, give the template's control tokens their secret names.

        `cuts` are ascending places in `rendered`; returned are their places in the result.
        """
        pieces: list[str] = []
        moved: list[int] = []
        length = done = 0
        waiting = list(cuts)

        def keep(text: str, start: int) -> None:
            nonlocal length
            while len(moved) < len(waiting) and waiting[len(moved)] <= start + len(text):
                moved.append(length + max(0, waiting[len(moved)] - start))
            pieces.append(text)
            length += len(text)

        for match in self.control.pattern.finditer(rendered):
            keep(rendered[done : match.start()], done)
            text, done = match.group(), match.end()
            if text in (_GUARD, _BLOCK_OPEN, _BLOCK_CLOSE):
                continue
            piece = text if plain else self.control.names[text]
            pieces.append(piece)
            length += len(piece)
        keep(rendered[done:], done)
        return "".join(pieces), moved

    def encode(self, rendered: str, cuts: Sequence[int]) -> _Encoding:
        """Ids of rendered text: control tokens where the template wrote them, and nowhere else."""
        guarded = _GUARD in rendered or self.control.fuzzy
        text, moved = self.finish(rendered, plain=not guarded, cuts=cuts)
        backend = self.control.renamed() if guarded else self.tokenizer.backend
        encoding = backend.encode(text, add_special_tokens=False)
        return _Encoding(encoding.ids, encoding.offsets, moved)


class _Control:
    """The tokens of one tokenizer that only its template may write.

    Control tokens proper always; added tokens that are none (`<think>`, `<tool_call>`) when the template uses them,
    and then only against users and tools: an assistant's or a system's message may well contain them.
    """

    _cache: ClassVar[WeakKeyDictionary[Tokenizer, _Control]] = WeakKeyDictionary()

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str) -> _Control:
        if tokenizer not in cls._cache:
            cls._cache[tokenizer] = cls(tokenizer, source)
        return cls._cache[tokenizer]

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        added = tokenizer.backend.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special and len(token.content) > 1]
        markup = [token.content for token in added if not token.special and len(token.content) > 1]
        markup = [text for text in markup if text in source and not text.isspace()]
        self.names = {text: f"\ufdd0{_SECRET}{place}\ufdd1" for place, text in enumerate(special + markup)}
        self._special = _any_of(special)
        self._all = _any_of(special + markup)
        self.pattern = _any_of([_GUARD, _BLOCK_OPEN, _BLOCK_CLOSE, *special, *markup])
        # Tokens matched after normalisation have more spellings than their own, so their text is never trusted.
        self.fuzzy = tokenizer.backend.normalizer is not None and any(t.special and t.normalized for t in added)
        ends = [tokenizer.special_text(i) for i in tokenizer.eos_token_ids]
        self._ends = _any_of([text for text in ends if text in self.names])
        self._state = tokenizer.backend.to_str
        self._renamed: tokenizers.Tokenizer | None = None

    def guard(self, value: Any, untrusted: bool) -> Any:
        """A copy of a JSON value with a marker inside every control token in its texts."""
        pattern = self._all if untrusted else self._special
        if not any(pattern.search(text) for text in strings(value)):
            return value
        if isinstance(value, str):
            return pattern.sub(lambda match: match.group()[0] + _GUARD + match.group()[1:], value)
        if isinstance(value, Mapping):
            return {self.guard(key, untrusted): self.guard(entry, untrusted) for key, entry in value.items()}
        return [self.guard(entry, untrusted) for entry in value]

    def end_token(self, rendered: str, start: int, limit: int) -> int | None:
        """The end of the first end-of-turn token between `start` and `limit`, or right behind `limit`."""
        match = self._ends.search(rendered, start, limit) or self._ends.match(rendered, limit)
        return match.end() if match else None

    def renamed(self) -> tokenizers.Tokenizer:
        """A copy of the tokenizer in which control tokens have their secret names and all else is equal."""
        if self._renamed is None:
            state = json.loads(self._state())
            for token in state["added_tokens"]:
                token["content"] = self.names.get(token["content"], token["content"])
            model = state["model"]
            if isinstance(model["vocab"], dict):
                model["vocab"] = {self.names.get(text, text): i for text, i in model["vocab"].items()}
            else:  # Unigram: [text, score]
                model["vocab"] = [[self.names.get(text, text), score] for text, score in model["vocab"]]
            if model.get("unk_token"):
                model["unk_token"] = self.names.get(model["unk_token"], model["unk_token"])
            self._renamed = tokenizers.Tokenizer.from_str(json.dumps(state))
        return self._renamed


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing for none."""
    return re.compile("|".join(re.escape(text) for text in sorted(set(texts), key=len, reverse=True)) or r"(?!)")
