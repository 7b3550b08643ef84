"""`bimo plan`: what to train in the time, memory and text at hand, or what serving a model takes. `training.plan` has
the rules and their sources."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bimo import runtime
from bimo.cli.options import Overrides
from bimo.cli.terminal import human_bytes, human_count, progress_display
from bimo.errors import UsageError

if TYPE_CHECKING:
    from bimo.data.sources import SourceFile
    from bimo.models.config import DecoderConfig
    from bimo.recipe import Recipe, SourceRecipe
    from bimo.training.plan import Plan, Planner

__all__ = ["DataSize", "bytes_per_token", "data_size", "plan"]

HOURS = 2.0
VOCAB_SIZE, CONTEXT_LENGTH = 16_384, 512  # a recipe's defaults
ENGLISH, CHINESE = 3.5, 3.0  # bytes of UTF-8 a token, of vocabularies of some ten thousand tokens
COUNTABLE = ("txt", "md", "jsonl", "json", "csv", "tsv", "yaml")  # as large as their text, about
SAMPLES, SAMPLE_BYTES = 16, 1 << 15
CONTEXTS = (2048, 8192, 32_768)
SMALLEST_FITTED = 70_000_000  # parameters of the smallest models behind the law


def plan(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="A recipe: its text, vocabulary and rows are planned for."),
    ] = None,
    hours: Annotated[float | None, typer.Option(help="Time to train; 2 if nothing is said.")] = None,
    loss: Annotated[
        float | None, typer.Option(metavar="NATS", help="How long does it take to this loss (nats a token), instead?")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE|FOLDER", help="The text there is; its tokens are estimated.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="How many tokens of text there are.")] = None,
    overrides: Overrides = None,
    serve: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Memory and speed of serving: a name, a size (gpt2-xl), a directory."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what to train here: size, text, time, memory.

    The advice rests on this machine's speed, measured in some seconds, and on published laws. --serve MODEL says what
    serving takes.
    """
    if serve is not None:
        given = {"RECIPE": recipe, "hours": hours, "loss": loss, "data": data, "tokens": tokens, "set": overrides}
        if useless := [name for name, value in given.items() if value is not None and value != []]:
            raise UsageError(
                f"--serve is of a finished model, {useless[0]} has no effect on it: leave it out", useless[0]
            )
        _serve(serve, as_json)
        return
    _check(hours, loss, data, tokens)
    runtime.tame_openmp()  # before torch comes: what is measured shall wait as `bimo run` does
    if overrides and recipe is None:
        raise UsageError("--set changes a recipe, and none is given", "set")
    from bimo.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or []) if recipe else None
    if loaded and loaded.model.kind != "decoder":
        raise UsageError(
            f"the laws behind this advice were measured on decoders, {recipe} is of kind {loaded.model.kind}: "
            f"plan with a recipe of a decoder",
            "recipe",
        )
    size = _text(loaded, data, tokens)
    planner = _measured(loaded, size)
    own = planner.plan(loaded.model, loaded.training.steps * loaded.training.batch_tokens, loaded.training) if (
        loaded) else None  # fmt: skip
    if own:
        planner.require(own)
    plans = planner.to_loss(loss) if loss is not None else planner.in_time((hours or HOURS) * 3600)
    if own:
        plans["recipe"] = own
    notes = _notes(planner, plans["advised"], size)
    if as_json:
        typer.echo(json.dumps(_as_dict(planner, plans, size, notes, hours, loss), ensure_ascii=False))
    else:
        _show(planner, plans, size, notes)


def _check(hours: float | None, loss: float | None, data: Path | None, tokens: int | None) -> None:
    if hours is not None and loss is not None:
        raise UsageError("--hours says how long, --loss asks how long: give one of them", "loss")
    if data is not None and tokens is not None:
        raise UsageError("--data and --tokens both say how much text there is: give one of them", "tokens")
    if hours is not None and not 0 < hours < math.inf:
        raise UsageError(f"--hours takes a time above 0 such as 0.5 or 48, not {hours:g}", "hours")
    if loss is not None and not 0 < loss < math.inf:
        raise UsageError(f"--loss takes nats a token above 0 such as 4.5, not {loss:g}", "loss")
    if tokens is not None and tokens < 1:
        raise UsageError(f"--tokens takes a count above 0 such as 10000000, not {tokens}", "tokens")


def _measured(recipe: Recipe | None, size: DataSize) -> Planner:
    """The planner for this machine and the recipe's vocabulary and rows."""
    from bimo.training.build import decoder_config
    from bimo.training.plan import Planner, measure_throughput

    vocab_size = recipe.tokenizer.vocab_size if recipe else VOCAB_SIZE
    length = recipe.model.context_length if recipe else CONTEXT_LENGTH
    dtype = recipe.training.dtype if recipe else "auto"
    with progress_display() as progress:
        speed = measure_throughput(
            decoder_config, vocab_size=vocab_size, context_length=length, dtype=dtype, progress=progress
        )
    return Planner(
        shape=decoder_config,
        speed=speed,
        vocab_size=vocab_size,
        context_length=length,
        memory=runtime.available_memory(),
        data_tokens=size.tokens,
        dtype=dtype,
    )


# --- how much text there is -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSize:
    """tokens: None if it is not known. how: what that rests on, in words."""

    tokens: int | None
    how: str


def _text(recipe: Recipe | None, data: Path | None, tokens: int | None) -> DataSize:
    from bimo.recipe import SourceRecipe
    from bimo.registries.packages import is_package

    if tokens is not None:
        return DataSize(tokens, "as --tokens says")
    if data is not None:
        return data_size([SourceRecipe(name="data", path=str(data))])
    if recipe is None:
        return DataSize(None, "none was named (--data, --tokens): as much as is needed is assumed")
    if (exact := _prepared(recipe)) is not None:
        return exact
    local = [source for source in recipe.data.sources if not is_package(source.path)]
    packages = [source.name for source in recipe.data.sources if is_package(source.path)]
    if not local:
        how = (
            f"not known before `bimo run` has read the packages {', '.join(packages)}: as much as is needed is assumed"
        )
        return DataSize(None, how)
    size = data_size(local)
    return DataSize(size.tokens, size.how + (f"; without the packages {', '.join(packages)}" if packages else ""))


def _prepared(recipe: Recipe) -> DataSize | None:
    """Exactly, where `bimo run` has been here before."""
    from bimo.data.shards import TokenFile
    from bimo.errors import DataError

    folder = Path("runs") / recipe.name / "tokens"
    try:
        files = [TokenFile.open(place) for place in sorted(folder.glob("train-*"))]
    except DataError:
        return None
    count = sum(len(file.tokens) for file in files)
    return DataSize(count, f"counted in {folder}") if count else None


def data_size(sources: list[SourceRecipe]) -> DataSize:
    """Tokens of files, from their sizes and a sample of their text; formats that hide their text are named, not
    counted. Raises UsageError when nothing can be counted."""
    from bimo.data.sources import files_of, is_backup, kind_of

    files, others = [], set()
    for source in sources:
        for file in files_of(source, lambda label, done, total: None):
            kind = kind_of(file, source)
            packed = file.name.lower().endswith((".gz", ".zip"))
            if kind in COUNTABLE and not packed and not is_backup(file):
                files.append(file)
            elif kind is not None or packed:
                others.add(".gz" if file.name.lower().endswith(".gz") else kind or ".zip")
    num_bytes = sum(file.num_bytes for file in files)
    uncounted = f"{', '.join(sorted(others))} not counted" if others else ""
    if not num_bytes:
        raise UsageError(
            f"{sources[0].path} holds no plain text whose size says how many tokens it has"
            f"{f' ({uncounted})' if uncounted else ''}: give --tokens",
            "data",
        )
    ratio = bytes_per_token(_samples(files))
    how = (
        f"estimated: {human_bytes(num_bytes)} at {ratio:.1f} bytes a token (English {ENGLISH}, Chinese {CHINESE}), "
        f"before cleaning"
    )
    return DataSize(max(1, int(num_bytes / ratio)), f"{how}; {uncounted}" if uncounted else how)


def bytes_per_token(samples: Iterator[bytes]) -> float:
    """By how much of the text is Chinese. What is not UTF-8 is taken for GB18030: two bytes a Chinese character."""
    raw, expected = 0, 0.0
    for sample in samples:
        text = sample.decode("utf-8", "replace")
        if text.count("\ufffd") > 3 + len(text) / 100:  # a character may be cut at the sample's end
            text = sample.decode("gb18030", "ignore")
        chinese = sum("\u3000" <= sign <= "\u9fff" or sign >= "\uff00" for sign in text)
        raw += len(sample)
        expected += 3 * chinese / CHINESE + (len(text.encode()) - 3 * chinese) / ENGLISH
    return raw / expected if expected > 0 else ENGLISH


def _samples(files: list[SourceFile]) -> Iterator[bytes]:
    """The beginnings of some files, evenly chosen; what cannot be read is said when it is read for training."""
    import contextlib
    import zipfile

    from bimo.data.sources import open_file

    for file in files[:: max(1, len(files) // SAMPLES)]:
        with contextlib.suppress(OSError, zipfile.BadZipFile, KeyError, RuntimeError), open_file(file) as stream:
            stream.seek(file.start)
            yield stream.read(SAMPLE_BYTES)


# --- what is said ---------------------------------------------------------------------------------------------------


def _notes(planner: Planner, advised: Plan, size: DataSize) -> list[str]:
    """What the advice rests on, and where it is weak."""
    from bimo.training.plan import MOST_EPOCHS, TOKENS_PER_PARAMETER, optimal_ratio

    per_parameter = advised.tokens / advised.num_parameters
    notes = [
        f"size: Chinchilla's {TOKENS_PER_PARAMETER} tokens a parameter, embeddings counted in (arXiv:2203.15556), here "
        f"{per_parameter:.0f}; the corrected fit itself would take {optimal_ratio(advised.flops):.0f} at this cost",
        "loss: the corrected fit (arXiv:2404.10102), nats a token. It was made with English web text, another "
        "tokenizer and models of 70M parameters and more"
        + ("; it is stretched far below that here: compare the rows by it, expect no such figure"
           if advised.num_parameters < SMALLEST_FITTED else ": a rough guide for other text"),
        "time: training alone, as fast as the machine was just now",
        "batch and learning rate: 0.2920 C^0.3271 and 0.3118 C^-0.1250, at most 0.003, of C operations "
        "(arXiv:2401.02954), for AdamW",
        "memory: weights, gradients and AdamW in float32, and the activations of micro_batch rows",
    ]  # fmt: skip
    if advised.expected_loss is None:
        notes.append("loss -: the law gives more than guessing would, so it says nothing of so short a training")
    if advised.epochs is not None and advised.epochs > 1:
        notes.append(f"epochs: text read again, up to {MOST_EPOCHS} times, is nearly as good as new (arXiv:2305.16264)")
    if per_parameter < 0.98 * TOKENS_PER_PARAMETER:
        short = size.tokens is not None and advised.tokens > 0.9 * MOST_EPOCHS * size.tokens
        notes.append(f"too {'little text' if short else 'short'}: even this model should see "
                     f"{TOKENS_PER_PARAMETER * advised.num_parameters / 1e6:,.0f}M tokens: "
                     f"{'add text' if short else 'give it more hours'}, or make the vocabulary smaller")  # fmt: skip
    if advised.num_embedding > advised.num_parameters / 2:
        notes.append(f"vocabulary: {advised.num_embedding / advised.num_parameters:.0%} of the parameters are "
                     f"embeddings of {planner.vocab_size:,} tokens; a smaller tokenizer.vocab_size leaves more for the "
                     f"layers")  # fmt: skip
    return notes


def _as_dict(
    planner: Planner, plans: dict[str, Plan], size: DataSize, notes: list[str], hours: float | None, loss: float | None
) -> dict[str, Any]:
    return {
        "machine": {
            "threads": runtime.cpu_threads(),
            "free_memory": planner.memory,
            "dtype": runtime.dtype_name(planner.dtype),
            "measured": [{"num_parameters": count, "flops_per_second": rate} for count, rate in planner.speed.points],
        },
        "vocab_size": planner.vocab_size,
        "context_length": planner.context_length,
        "hours": None if loss is not None else hours or HOURS,
        "loss": loss,
        "data": asdict(size),
        "plans": {
            name: {
                **{key: value for key, value in asdict(plan).items() if key not in ("model", "training")},
                **{key: getattr(plan.model, key) for key in ("hidden_size", "num_layers")},
                **{key: getattr(plan.training, key) for key in
                   ("steps", "batch_tokens", "micro_batch", "learning_rate", "activation_checkpointing")},
            }
            for name, plan in plans.items()
        },
        "fragment": plans["advised"].fragment(),
        "notes": notes,
    }  # fmt: skip


def _show(planner: Planner, plans: dict[str, Plan], size: DataSize, notes: list[str]) -> None:
    rates = ", ".join(f"{rate / 1e9:.0f} at {_count(count)}" for count, rate in planner.speed.points)
    typer.echo(f"measured   training in {runtime.dtype_name(planner.dtype)}, {runtime.cpu_threads()} cores: "
               f"billion operations a second {rates} parameters")  # fmt: skip
    typer.echo(
        f"memory     {'not told by this system' if planner.memory is None else human_bytes(planner.memory)} free"
    )
    counted = "" if size.tokens is None else f"{_count(size.tokens)} tokens, "
    typer.echo(f"text       {counted}{size.how}")
    typer.echo(f"rows       {planner.context_length} tokens, vocabulary of {planner.vocab_size:,}\n")
    head = ("", "PARAMETERS", "WIDTH", "LAYERS", "TOKENS", "EPOCHS", "TIME", "LOSS", "MEMORY")
    _table([head, *(_row(name, plan) for name, plan in plans.items())])
    typer.echo("")
    for note in notes:
        typer.echo(note)
    typer.echo("\nThe advised one, for a recipe (in place of its own [model] and [training]):\n")
    typer.echo(plans["advised"].fragment(), nl=False)


def _row(name: str, plan: Plan) -> tuple[str, ...]:
    loss = "-" if plan.expected_loss is None else f"{plan.expected_loss:.2f}"
    memory = human_bytes(plan.memory) + ("" if plan.fits else " (more than is free)")
    epochs = "-" if plan.epochs is None else f"{plan.epochs:.1f}"
    shape = (str(plan.model.hidden_size), str(plan.model.num_layers))
    return (name, _count(plan.num_parameters), *shape, _count(plan.tokens), epochs, _time(plan.seconds), loss, memory)


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        typer.echo("  ".join([row[0].ljust(widths[0]), *cells, row[-1]]).rstrip())


def _count(count: float) -> str:
    return human_count(count) if count >= 1e7 else f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,.0f}"


def _time(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or (unit == "h" and seconds >= length):
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"


# --- serving --------------------------------------------------------------------------------------------------------


def _serve(model: str, as_json: bool) -> None:
    from bimo.models.catalog import serving

    config = _config(model)
    number = runtime.dtype_name(None)
    free = runtime.available_memory()
    with progress_display() as progress:
        progress("measuring how fast memory is read", 0, 0)
        bandwidth = runtime.measure_read_bandwidth()
    contexts = sorted({min(context, config.max_positions) for context in CONTEXTS})
    rows = [
        serving(config, quant, context, bytes_per_number=4 if number == "float32" else 2)
        for quant in ("none", "int8", "int4")
        for context in contexts
    ]
    if as_json:
        listed = [
            {"quant": row.quant, "context": row.context, "weights": row.fit.weights, "kv_cache": row.fit.kv_cache,
             "memory": row.fit.total, "read": row.read, "fits": free is None or row.fit.total <= free,
             "tokens_per_second": round(row.tokens_per_second(bandwidth), 2)}
            for row in rows
        ]  # fmt: skip
        about = {"model": model, "num_parameters": config.num_parameters, "dtype": number, "free_memory": free}
        typer.echo(json.dumps({**about, "read_bandwidth": bandwidth, "serving": listed}, ensure_ascii=False))
        return
    told = "not told by this system" if free is None else human_bytes(free)
    typer.echo(f"{model}, {_count(config.num_parameters)} parameters; {told} free, read at {human_bytes(bandwidth)} a "
               f"second, measured\n")  # fmt: skip
    head = ("QUANT", "CONTEXT", "WEIGHTS", "CACHE", "MEMORY", "TOKENS/S", "")
    shown = [
        (
            f"none ({number})" if row.quant == "none" else row.quant,
            str(row.context),
            *(human_bytes(count) for count in (row.fit.weights, row.fit.kv_cache, row.fit.total)),
            f"< {row.tokens_per_second(bandwidth):,.1f}",
            "" if free is None or row.fit.total <= free else "more than is free",
        )
        for row in rows
    ]
    _table([head, *shown])
    typer.echo(
        "\ntokens/s: of one request whose context is full. An upper bound: each new token reads all weights and the "
        "cache once, and no processor reads faster; `bimo bench` measures what is reached"
    )


def _config(model: str) -> DecoderConfig:
    """A name's or a directory's; nothing is fetched."""
    from bimo.formats.hub import resolve
    from bimo.formats.huggingface import read_config
    from bimo.models.catalog import CATALOG, SIZES, near_names

    if model in CATALOG and not CATALOG[model].size:
        raise UsageError(f"a plan is for what writes text, {model} makes embeddings: name another model", "serve")
    if model in CATALOG:
        return SIZES[CATALOG[model].size]
    if model in SIZES:
        return SIZES[model]
    if (Path(model).expanduser() / "config.json").is_file():
        return read_config(Path(model).expanduser())  # its weights may still be on their way
    if ":" in model and not Path(model).exists():
        raise UsageError(
            f"a plan fetches nothing, and {model} is elsewhere: give a name (`bimo models`), a size such as gpt2-xl, "
            f"or fetch it first (`bimo models --fetch {model}`) and give the folder that it prints",
            "serve",
        )
    if not Path(model).exists() and (near := near_names(model, [*CATALOG, *SIZES])):
        from bimo.errors import ModelNotFoundError

        raise ModelNotFoundError(model, near)
    return read_config(resolve(model))
