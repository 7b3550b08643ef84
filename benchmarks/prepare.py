"""How fast, and in how much memory, documents are prepared: `bimo data prepare` beside datatrove, the field's own tool.

    python -m benchmarks.prepare                       10 MB and 2 GB
    python -m benchmarks.prepare --sizes 10 200        megabytes
    python -m benchmarks.prepare --peer-up-to 50       2 GB without the peer, which takes hours for it
    python -m benchmarks.prepare --no-install          without the peer, unless it is set up

The text is real: sentences of benchmarks/texts, and of LibreOffice's handbook where `bimo data prepare
recipes/quickstart.toml` has fetched it, put together anew at random, half of it Chinese; one document in 20 is an
earlier one with a word changed. Both read the same JSON lines, mend encodings, mask personal data, filter by quality,
find near copies by MinHash and write Parquet, with one process a core. Beside that bimo finds out languages, makes
traditional Chinese simplified, strips markup, divides off validation and looks for leaks; datatrove is told the
language, and drops more of these texts by Gopher's rules, which spares its later steps work.

MB/s a core: megabytes by seconds of processor time. Memory: the largest sum of what the run's processes held (RSS),
looked at every 50 ms. When it is flat, the figures for the two sizes are alike.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main", "measure", "write_corpus"]

ROOT = Path(__file__).parents[1]
FILE_BYTES = 8 << 20
COPIES = 20  # one document in so many
RECIPE = """name = "prepare"
[data]
leaks = "warn"
[[data.sources]]
name = "made"
path = "."
files = ["*.jsonl"]
"""
PEER = "datatrove"


def sentences_of(language: str) -> list[str]:
    """Real sentences."""
    from bimo.data.readers import read_file
    from bimo.data.records import Document
    from bimo.data.segment import sentences
    from bimo.data.sources import files_of
    from bimo.recipe import SourceRecipe
    from bimo.runtime import cache_home

    found = sentences((ROOT / "benchmarks" / "texts" / f"{language}.txt").read_text(encoding="utf-8"))
    folder = cache_home() / "data" / f"deb-libreoffice-help-{'zh-cn' if language == 'zh' else 'en-us'}"
    if folder.is_dir():
        source = SourceRecipe(name="help", path=str(folder), files=("**/text/**/*.html",))
        for file in files_of(source, lambda *_: None):
            for document in read_file(file, source):
                if isinstance(document, Document):
                    found += sentences(document.text)
    return [sentence.strip() + " " for sentence in found if len(sentence) > 8]


def write_corpus(folder: Path, megabytes: float) -> int:
    """Files of JSON lines, alternately English and Chinese; the bytes written."""
    pools = [("en", sentences_of("en")), ("zh", sentences_of("zh"))]
    chance = random.Random(20240601)
    total, number = 0, 0
    size = min(FILE_BYTES, int(megabytes * 500_000))
    while total < megabytes * 1e6:
        language, pool = pools[number % 2]
        with (folder / f"{language}-{number:05}.jsonl").open("wb") as file:
            earlier = "".join(chance.choices(pool, k=20))
            while file.tell() < size:
                text = "".join(chance.choices(pool, k=chance.randint(5, 40)))
                if chance.random() < 1 / COPIES:
                    text = earlier.replace(" ", " other ", 1)
                else:
                    earlier = text
                file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            total += file.tell()
        number += 1
    return total


def measure(command: Sequence[str | Path], log: Path) -> dict[str, float]:
    """Run it: wall and processor seconds, and the peak of its processes' memory in MB. RuntimeError if it fails."""
    import psutil

    before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    spent: dict[tuple[int, float], float] = {}  # of processes that the system counts for nobody: a server's that forks
    with log.open("w") as said:
        process = subprocess.Popen([str(part) for part in command], stdout=said, stderr=said, cwd=ROOT)
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            held = 0
            for one in (tree, *_children(tree)):
                try:
                    held += one.memory_info().rss
                    times = one.cpu_times()
                    spent[one.pid, one.create_time()] = times.user + times.system
                except psutil.Error:
                    continue
            peak = max(peak, held)
            time.sleep(0.05)
    if process.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    waited_for = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    processor = max(waited_for, sum(spent.values()))
    return {"seconds": time.perf_counter() - start, "processor": processor, "peak_mb": peak / 1e6}


def _children(process: Any) -> list[Any]:
    import psutil

    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def documents_in(folder: Path) -> int:
    """Rows of all Parquet files below a folder."""
    import pyarrow.parquet

    return sum(pyarrow.parquet.read_metadata(file).num_rows for file in folder.rglob("*.parquet"))


# --- the peer: runs in its own environment, by its own interpreter ----------------------------------------------------


def prepare_with_peer(corpus: Path, out: Path, workers: int) -> None:
    """datatrove's example pipelines: formatters and filters, then its four steps of MinHash, for each language."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from datatrove.pipeline.writers import ParquetWriter
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        """spaCy's Chinese one, which is jieba, holds a module, and the signature step must be copied."""

        def word_tokenize(self, text: str) -> list[str]:
            import jieba

            return [word for word in jieba.lcut(text) if word.strip()]

        sent_tokenize = span_tokenize = word_tokenize  # not called

    # words of Chinese are short: FineWeb-2's way is to put the language's own figures in the place of English ones
    quality: dict[str, dict[str, Any]] = {
        "en": {"min_doc_words": 5},
        "zh": {
            "min_doc_words": 5,
            "min_avg_word_length": 1,
            "stop_words": list("的是了不在有我他这个"),
            "max_non_alpha_words_ratio": 0.5,
        },
    }
    config = MinhashConfig(n_grams=5, num_buckets=18, hashes_per_bucket=7, hash_config=HashConfig(precision=64))
    for language, code in (("en", "eng_Latn"), ("zh", "cmn_Hani")):
        home = out / language
        tasks = len(list(corpus.glob(f"{language}-*.jsonl")))

        def run(pipeline: list[Any], name: str, count: int, home: Path = home) -> None:
            LocalPipelineExecutor(
                pipeline, tasks=count, workers=min(workers, count), logging_dir=str(home / "logs" / name)
            ).run()

        run(
            [
                JsonlReader(str(corpus), glob_pattern=f"{language}-*.jsonl"),
                FTFYFormatter(),
                PIIFormatter(),
                GopherRepetitionFilter(language=code),
                GopherQualityFilter(language=code, **quality[language]),
                ParquetWriter(str(home / "clean")),
            ],
            "clean", tasks,
        )  # fmt: skip
        reader = ParquetReader(str(home / "clean"))
        signatures = MinhashDedupSignature(
            str(home / "signatures"), config=config, language=Words() if language == "zh" else code
        )
        run([reader, signatures], "signatures", tasks)
        buckets = MinhashDedupBuckets(str(home / "signatures"), str(home / "buckets"), config=config)
        run([buckets], "buckets", config.num_buckets)
        run([MinhashDedupCluster(str(home / "buckets"), str(home / "remove"), config=config)], "cluster", 1)
        run([reader, MinhashDedupFilter(str(home / "remove")), ParquetWriter(str(home / "documents"))], "filter", tasks)


# --- the driver -------------------------------------------------------------------------------------------------------


def set_up_peer(install: bool) -> str:
    """Why the peer cannot be measured, or nothing."""
    from benchmarks.peers import set_up

    return set_up([PEER], say=print, install=install).get(PEER, "")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; `--peer` is how the driver calls this file in the peer's environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[10, 2000], metavar="MB")
    parser.add_argument("--workers", type=int, help="processes; one a core unless given")
    parser.add_argument("--no-install", action="store_true", help="measure the peer only if it is set up")
    parser.add_argument("--peer-up-to", type=float, metavar="MB", help="larger sizes without the peer")
    parser.add_argument("--folder", type=Path, help="where to work; some four times the largest size is needed")
    parser.add_argument("--peer", nargs=3, metavar=("CORPUS", "OUT", "WORKERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.peer:
        corpus, out, workers = arguments.peer
        return prepare_with_peer(Path(corpus), Path(out), int(workers))
    from benchmarks.peers import python_of
    from bimo.runtime import cpu_info, cpu_threads

    workers = arguments.workers or cpu_threads()
    missing = set_up_peer(not arguments.no_install)
    if missing:
        print(f"not measured: {PEER}: {missing}")
    print(f"{cpu_info().name}, {workers} processes")
    print(f"{'MB':>6} {'':10} {'seconds':>8} {'processor s':>12} {'MB/s a core':>12} {'peak MB':>8} {'documents':>10}")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder = Path(name)
            corpus = folder / "corpus"
            corpus.mkdir()
            written = write_corpus(corpus, size)
            recipe = corpus / "recipe.toml"
            recipe.write_text(RECIPE)
            bimo = [
                sys.executable,
                "-m",
                "bimo.cli.main",
                "data",
                "prepare",
                recipe,
                "--workers",
                str(workers),
                "--out",
            ]
            commands = {"bimo": [*bimo, folder / "bimo"]}
            if not missing and size <= (arguments.peer_up_to or size):
                commands[PEER] = [python_of(PEER), __file__, "--peer", corpus, folder / PEER, str(workers)]
            for engine, command in commands.items():
                for line in _measured(engine, command, folder, written):
                    print(line, flush=True)


def _measured(engine: str, command: Sequence[str | Path], folder: Path, written: int) -> Iterator[str]:
    out = folder / engine
    try:
        found = measure(command, folder / f"{engine}.log")
    except RuntimeError as error:
        yield f"not measured: {engine}: {error}"
        return
    parts = [out / "data" / "documents"] if engine == "bimo" else sorted(out.glob("*/documents"))
    rate = written / 1e6 / found["processor"]
    yield (
        f"{written / 1e6:6.0f} {engine:10} {found['seconds']:8.1f} {found['processor']:12.1f} {rate:12.2f} "
        f"{found['peak_mb']:8.0f} {sum(map(documents_in, parts)):10,}"
    )
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
