"""`bimo chat`: talk to a model in the terminal; or pipe messages in, one a line.

The conversation is the list of messages that the server and the library know; it is rendered by the one chat template.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bimo.cli import options
from bimo.errors import BimoError, UsageError

if TYPE_CHECKING:
    from bimo.backends.facade import Model

__all__ = ["Conversation", "chat"]

DEFAULT_MAX_TOKENS = 1024
HELP = """\
/help           this list
/reset          forget the conversation (the system message stays)
/system TEXT    set the system message and start afresh; without TEXT: show it
/save FILE      write the conversation as JSON
/exit           leave (Ctrl-D too); Ctrl-C stops an answer
\"\"\"             begins and ends a message of several lines"""


class Conversation:
    """The messages so far, and what the slash commands do to them.

    After every call `messages` is what the model should see: perhaps a system message, then user and assistant in turn.
    """

    def __init__(self, system: str | None = None) -> None:
        self.messages: list[dict[str, str]] = []
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system message in force, if any."""
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        """Start afresh under this system message; None or an empty text: under none."""
        self.messages = [{"role": "system", "content": text}] if text else []

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.set_system(self.system)

    def save(self, file: Path) -> None:
        """Write {"messages": [...]} as UTF-8 JSON."""
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2)
        try:
            file.expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"the conversation could not be written to {file}: {error.strerror}", "save") from None

    def command(self, line: str, say: Callable[[str], None]) -> bool:
        """Carry out a slash command; False when it was /exit."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit", "/bye"):
            return False
        if name == "/help":
            say(HELP)
        elif name == "/reset":
            self.reset()
            say("the conversation starts afresh")
        elif name == "/system" and not rest:
            say(self.system or "no system message; /system TEXT sets one")
        elif name == "/system":
            self.set_system(rest)
            say("the conversation starts afresh under this system message")
        elif name == "/save":
            if not rest:
                raise UsageError("/save needs a file name, e.g. /save chat.json", "save")
            self.save(Path(rest))
            say(f"saved {len(self.messages)} messages to {rest}")
        else:
            raise UsageError(f"no command {name}: /help lists them", "command")
        return True


def chat(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=options.MODEL_HELP)] = "smollm2",
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    max_tokens: options.MaxTokens = DEFAULT_MAX_TOKENS,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    truncate: options.Truncate = False,
    dtype: options.Dtype = None,
    quant: options.Quant = None,
    kv_cache_dtype: options.KvCacheDtype = None,
    speculation: options.Speculation = None,
    draft_model: options.DraftModel = None,
) -> None:
    """Chat with a model in the terminal."""
    conversation = Conversation(options.checked_text(system, "system") if system else None)
    sampling = options.given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        truncate_prompt=truncate,
    )
    options.check_sampling(sampling)

    loaded = options.load_model(
        model, dtype=dtype, quant=quant, kv_cache_dtype=kv_cache_dtype, speculation=speculation, draft_model=draft_model
    )
    info = loaded.backend.info()
    if info.reads_source:
        loaded.close()
        raise UsageError(
            f"{info.model} is an encoder-decoder ({info.architecture}), which answers one text and not a "
            f"conversation: bimo generate {model} --prompt TEXT",
            "model",
        )
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    say: Callable[[str], None] = typer.echo if interactive else lambda text: typer.echo(text, err=True)
    if interactive:
        say(f"{info.model}, {info.dtype}, context of {info.context_length} tokens. /help lists the commands.")
    try:
        for message in _messages(interactive):
            try:
                if message.startswith("/"):
                    if not conversation.command(message, say):
                        break
                else:
                    _answer(loaded, conversation, message, sampling)
            except BimoError as error:
                if not interactive:
                    raise
                typer.echo(f"error: {error}", err=True)
    finally:
        loaded.close()


def _answer(loaded: Model, conversation: Conversation, message: str, sampling: dict[str, Any]) -> None:
    """Ask, show the answer as it comes, and keep both; a message that failed is not kept.

    Ctrl-C stops the answer: what was said so far is kept, so that "go on" works.
    """
    conversation.messages.append({"role": "user", "content": message})
    pieces: list[str] = []
    stream = loaded.stream(conversation.messages, **sampling)
    try:
        for piece in stream:
            pieces.append(piece)
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        typer.echo(" [stopped]", nl=False)
    except BaseException:
        conversation.messages.pop()
        raise
    finally:
        if hasattr(stream, "close"):
            stream.close()  # leaving a stream early stops its computing
    typer.echo()
    conversation.messages.append({"role": "assistant", "content": "".join(pieces)})


def _messages(interactive: bool) -> Iterator[str]:
    """The user's messages, one a line, or several lines between triple quotes; blank ones are left out."""
    lines = _typed_lines() if interactive else _piped_lines()
    for line in lines:
        text = line.strip()
        if text.startswith('"""'):
            text = text[3:]
            while '"""' not in text:
                try:
                    text += "\n" + next(lines)
                except StopIteration:
                    break
            text = text.partition('"""')[0].strip("\n")
        if text.strip():
            yield options.checked_text(text, "message")


def _typed_lines() -> Iterator[str]:
    """Lines typed at a prompt, with editing and history where the system has readline."""
    try:
        import readline
    except ImportError:
        pass
    else:
        readline.set_history_length(1000)
    while True:
        try:
            yield input(">>> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return


def _piped_lines() -> Iterator[str]:
    """Lines of standard input; UsageError when one is not UTF-8."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise UsageError(f"line {number} of standard input is not valid UTF-8", "message") from None
