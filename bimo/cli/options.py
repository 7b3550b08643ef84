"""Command-line options that several commands share, and how they become sampling settings.

An option that was not given is not passed on, so that each model's own defaults stay in force.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bimo.errors import UsageError

if TYPE_CHECKING:
    from bimo.backends.facade import Model

__all__ = [
    "MODEL_HELP",
    "BestOf",
    "DraftModel",
    "Dtype",
    "FrequencyPenalty",
    "KvCacheDtype",
    "MaxTokens",
    "MinP",
    "MinTokens",
    "ModelArgument",
    "Out",
    "Overrides",
    "PresencePenalty",
    "Quant",
    "RecipeArgument",
    "RepetitionPenalty",
    "Seed",
    "Speculation",
    "Stop",
    "Temperature",
    "TopK",
    "TopP",
    "Truncate",
    "TypicalP",
    "check_sampling",
    "checked_text",
    "given",
    "load_model",
    "named_folders",
    "read_stdin",
]

MODEL_HELP = "A name (see `bimo models`), a directory, a .gguf, hf:org/name, modelscope:org/name or pypi:name==version."

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, a TOML file (see recipes/).")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder; else runs/NAME.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Another value, e.g. training.steps=50; may be repeated."),
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Dtype = Annotated[
    str | None, typer.Option(help="auto, float32, bfloat16 or float16; auto is what this processor does fast.")
]
Quant = Annotated[
    str | None, typer.Option(help="int8, int4, file (as the GGUF file has them) or none; default: what is fastest.")
]
Speculation = Annotated[
    str | None, typer.Option(help="ngram: guess next tokens from the text so far, verified; off: one token a step.")
]
DraftModel = Annotated[
    str | None, typer.Option(metavar="MODEL", help="A smaller model of the same vocabulary that guesses instead.")
]
KvCacheDtype = Annotated[
    str | None, typer.Option(help="Keys and values: int8 (default beside quantised weights) or bfloat16.")
]
MinTokens = Annotated[int | None, typer.Option(help="No end before this many new tokens.")]
MaxTokens = Annotated[int | None, typer.Option(help="At most this many new tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0: always the most likely token; higher: more varied.")]
TopK = Annotated[int | None, typer.Option(help="Choose among the K most likely tokens (0: off).")]
TopP = Annotated[float | None, typer.Option(help="Choose among the likeliest tokens that sum to P (1: off).")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens less likely than P times the likeliest (0: off).")]
TypicalP = Annotated[float | None, typer.Option(help="Locally typical sampling (1: off).")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1: what was said becomes less likely.")]
PresencePenalty = Annotated[float | None, typer.Option(help="-2 to 2: once for every token already in the answer.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="-2 to 2: for each time a token is in the answer.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")]
BestOf = Annotated[int | None, typer.Option(help="Sample this many, keep the likeliest.")]
Truncate = Annotated[
    bool,
    typer.Option("--truncate", help="Cut the front of a prompt that is too long, instead of refusing."),
]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: not None, not an empty list, not a flag left off."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if value is not None and value is not False and value != []
    }


def named_folders(pairs: list[str], param: str) -> dict[str, str]:
    """NAME=DIR options as a dictionary; UsageError for one without a name or folder, or a name given twice."""
    folders: dict[str, str] = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        if not name or not folder:
            raise UsageError(f"--{param} takes NAME=DIR, e.g. support=runs/helper/chat/model, not {pair!r}", param)
        if name in folders:
            raise UsageError(f"--{param} names {name!r} twice: give each folder a name of its own", param)
        folders[name] = folder
    return folders


def load_model(model: str, **wishes: Any) -> Model:
    """`bimo.load` with the wishes that were given, and progress on standard error."""
    import bimo
    from bimo.cli.terminal import progress_display

    with progress_display() as progress:
        return bimo.load(model, progress=progress, **given(**wishes))


def check_sampling(settings: dict[str, Any]) -> None:
    """Refuse wrong sampling settings at once, before a model is fetched and loaded for them."""
    from bimo.engine.request import SamplingParams

    SamplingParams(**{name: value for name, value in settings.items() if name != "truncate_prompt"})
    for text in settings.get("stop", ()):
        checked_text(text, "stop")


def checked_text(text: str, param: str) -> str:
    """Text from the command line; UsageError when its bytes were not UTF-8 (Python hands those on as surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{param} is not valid UTF-8: convert it first, e.g. with iconv -t utf-8", param) from None
    return text


def read_stdin(param: str) -> str:
    """All of standard input as UTF-8 text, without one closing newline; UsageError when it is something else."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(f"no {param}: give --{param} TEXT, or pipe the text in", param)
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not valid UTF-8 (byte {error.start}): convert it first, e.g. with iconv -t utf-8", param
        ) from None
    return text.removesuffix("\n").removesuffix("\r")
