"""The `bimo` command: the list of its subcommands, and how every error becomes one line.

Exit codes: 0 done, 1 failed, 2 used wrongly, 130 stopped with Ctrl-C. Each subcommand is one file beside this one and
imports what it works with inside its function, so that `bimo --help` needs no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from bimo.cli import bench, chat, convert, data, doctor, generate, models, plan, serve, tokenizer
from bimo.cli.classify import classify
from bimo.cli.compare import compare
from bimo.cli.eval import evaluate
from bimo.cli.run import run
from bimo.cli.train import train
from bimo.cli.tune import tune
from bimo.errors import BimoError, UsageError

__all__ = ["app", "main"]

app = typer.Typer(
    name="bimo",
    help="Your own ChatGPT: run, serve and measure language models on your own machine. 笔墨",
    epilog="Start with: bimo chat. Models are kept in $BIMO_HOME (~/.cache/bimo). Something wrong? bimo doctor",
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(chat.chat)
app.command()(generate.generate)
app.command()(classify)
app.command()(serve.serve)
app.command()(models.models)
app.command()(convert.convert)
app.command()(doctor.doctor)
app.command()(bench.bench)
app.command("eval")(evaluate)
app.command()(run)
app.command()(train)
app.command()(tune)
app.command()(compare)
app.command()(plan.plan)
app.add_typer(data.app, name="data")
app.add_typer(tokenizer.app, name="tokenizer")


def _print_version(wanted: bool) -> None:
    if wanted:
        from bimo import __version__

        typer.echo(f"bimo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (any command).")] = False,
) -> None:
    """Print the help when no command was given."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. `argv` without the program's name, None for the process's own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug, arguments = _take_debug(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Chinese must not crash a terminal whose encoding lacks it
            stream.reconfigure(errors="replace")
    try:
        code = app(args=arguments, prog_name="bimo", standalone_mode=False)
        sys.stdout.flush()  # here, where a closed pipe can still be handled
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader left (`bimo models | head -1`): nothing to say, and nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        return _explain(error)


def _take_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """Take `--debug` out of wherever it stands before a `--`, so that it works after the command too."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    head = [argument for argument in arguments[:end] if argument != "--debug"]
    return len(head) < end, head + arguments[end:]


def _explain(error: Exception) -> int:
    """Print one line for an error; the exit code."""
    if isinstance(error, BimoError):
        message, code = str(error), 2 if isinstance(error, UsageError) else 1
    elif isinstance(error, typer.Abort):
        return 130
    elif hasattr(error, "format_message"):  # the command line itself is wrong
        command = getattr(getattr(error, "ctx", None), "command_path", "bimo")
        message, code = (
            f"{error.format_message().rstrip('.')} (`{command} --help` explains)",
            getattr(error, "exit_code", 2),
        )
    else:
        kind = type(error).__name__
        message, code = f"{kind}: {error} (this is a bug in bimo or a damaged installation; --debug shows where)", 1
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
