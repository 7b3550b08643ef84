"""How fast documents become token files: bimo beside the way of Hugging Face `datasets`, `map` over batches.

    python -m benchmarks.tokenise                       100 MB, 3 rounds, in turns
    python -m benchmarks.tokenise --megabytes 20 --rounds 1

Both read the same Parquet file of real sentences put together anew (see benchmarks.prepare), half of it Chinese, with
the same tokenizer of 16,384 words learned from it, on all cores: bimo into one memory-mapped token file (by `tiktoken`,
see bimo.tokenizer.bulk), datasets into its Arrow files by one process a core, which call the `tokenizers` library
directly. `datasets` runs in the environment that benchmarks.prepare sets up for datatrove.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.prepare import PEER, measure, set_up_peer, write_corpus

__all__ = ["main"]

VOCABULARY = 16_384


def tokenise_with_bimo(corpus: Path, tokenizer: Path, out: Path) -> int:
    """The number of tokens."""
    from bimo.data.documents import read_documents
    from bimo.data.shards import encode_documents, write_tokens
    from bimo.tokenizer.load import Tokenizer

    learned = Tokenizer.from_directory(tokenizer)
    encoded = encode_documents(read_documents([corpus]), learned)
    return len(write_tokens(out, encoded, vocab_size=learned.vocab_size, mark="").tokens)


def tokenise_with_datasets(corpus: Path, tokenizer: Path, out: Path, workers: int) -> int:
    """The number of tokens. The tokenizer is called directly, without transformers' wrapper around it."""
    import datasets
    from tokenizers import Tokenizer

    cut = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end = cut.token_to_id("<|endoftext|>")

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = cut.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [[end, *encoding.ids, end] for encoding in found]}

    rows = datasets.load_dataset("parquet", data_files=str(corpus), split="train", cache_dir=str(out / "cache"))
    rows = rows.map(encode, batched=True, num_proc=workers, remove_columns=rows.column_names)
    rows.save_to_disk(out / "rows", num_proc=workers)
    return sum(map(len, rows.with_format("arrow")["input_ids"]))


def make_corpus(folder: Path, megabytes: float) -> tuple[Path, int]:
    """One Parquet file of documents, and its characters' bytes; a tokenizer in folder/tokenizer."""
    from bimo.data.documents import DocumentWriter
    from bimo.data.records import Document
    from bimo.tokenizer.train import save_tokenizer, train_tokenizer

    (folder / "lines").mkdir()
    write_corpus(folder / "lines", megabytes)
    texts = [
        json.loads(line)["text"]
        for file in sorted((folder / "lines").glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    with DocumentWriter(folder / "corpus.parquet") as writer:
        for number, text in enumerate(texts):
            writer.write(Document(text, f"made#{number}", "made"))
    save_tokenizer(train_tokenizer(texts[:: max(1, len(texts) // 4000)], vocab_size=VOCABULARY), folder / "tokenizer")
    return folder / "corpus.parquet", sum(len(text.encode()) for text in texts)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; `--worker` is how it calls itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-install", action="store_true", help="measure the peer only if it is set up")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        engine, corpus, tokenizer, out, workers = arguments.worker
        begun = time.perf_counter()
        if engine == "bimo":
            count = tokenise_with_bimo(Path(corpus), Path(tokenizer), Path(out))
        else:
            count = tokenise_with_datasets(Path(corpus), Path(tokenizer), Path(out), int(workers))
        print("RESULT", count, time.perf_counter() - begun)
        return
    from benchmarks.peers import python_of
    from bimo.runtime import cpu_threads

    if missing := set_up_peer(not arguments.no_install):
        print(f"not measured: datasets: {missing}")
    pythons = {"bimo": Path(sys.executable)} | ({} if missing else {"datasets": python_of(PEER)})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, num_bytes = make_corpus(folder, arguments.megabytes)
        rates: dict[str, list[float]] = {engine: [] for engine in pythons}
        for turn in range(arguments.rounds):
            for engine, python in pythons.items():
                out, log = folder / f"{engine}-{turn}", folder / "log"
                worker = [engine, corpus, folder / "tokenizer", out, str(cpu_threads())]
                found = measure([python, "-m", "benchmarks.tokenise", "--worker", *worker], log)
                told = log.read_text(errors="replace").split("RESULT ")[-1].split()
                rates[engine].append(num_bytes / 1e6 / float(told[1]))
                cost = f"{found['processor']:6.1f} s of processors  peak {found['peak_mb']:,.0f} MB"
                print(f"{engine:9} {rates[engine][-1]:7.1f} MB/s  {int(told[0]):,} tokens  {cost}", flush=True)
    medians = {engine: statistics.median(values) for engine, values in rates.items()}
    for engine, values in rates.items():
        print(f"{engine:9} {medians[engine]:7.1f} MB/s ({min(values):.1f}-{max(values):.1f}), imports not counted")
    if len(medians) == 2:
        print(f"bimo / datasets = {medians['bimo'] / medians['datasets']:.2f}x")


if __name__ == "__main__":
    main()
