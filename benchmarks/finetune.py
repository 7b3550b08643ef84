"""Fine-tuning beside peft and transformers' Trainer: same model, examples, masks, batch, rank, precision, optimiser.

    python -m benchmarks.finetune recipes/helpdesk.toml                     # full and LoRA, 3 rounds, in turns
    python -m benchmarks.finetune recipes/helpdesk.toml --kinds lora --rounds 1 --examples 128

Both read the same examples of the recipe's first stage, encoded once, as often: the peer in batches of `--batch`
examples, padded to the longest of each; bimo in rows of whole examples, so many whole rows a step as come nearest to
such a batch's tokens, and all rows once; each round with a seed of its own. Counted are tokens of examples, never
padding. Afterwards both are scored alike on examples that neither has seen, and each process's largest memory is
told. Needs `pip install bimo[bench]`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANK, ALPHA, LENGTH = 16, 32, 512
RATES = {"full": 2e-5, "lora": 2e-4}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Example = tuple[list[int], list[int]]  # ids, and 1 for those that are learned


def prepare_examples(recipe: str, folder: Path, count: int) -> None:
    """Real examples of the recipe's first stage, `count` to learn from and a fifth of that held out."""
    from bimo.cli.tuning import open_stage_base, prepare_stage, task_documents
    from bimo.data.example_tokens import encode_examples
    from bimo.recipe import load_recipe

    loaded = load_recipe(Path(recipe))
    stage = loaded.stage[0]

    def quiet(label: str, done: int, total: int) -> None:
        pass

    base = open_stage_base(loaded, stage, folder, quiet)
    prepared = prepare_stage(stage, folder, workers=None, progress=quiet)
    documents = [document for task in stage.task for document in task_documents(prepared, "train", task)]
    random.Random(0).shuffle(documents)
    encoded = encode_examples(documents, base.tokenizer, max_tokens=LENGTH + 1, refuse=lambda name, reason: None)
    examples = [(list(ids), list(mask)) for _, ids, mask in encoded][: count + count // 5]
    about = {"base": str(base.directory), "train": examples[:count], "held_out": examples[count:]}
    (folder / "examples.json").write_text(json.dumps(about), encoding="utf-8")


def run_bimo(kind: str, folder: Path, batch: int, dtype: str, seed: int) -> dict[str, Any]:
    import torch

    from bimo.data.example_loader import ExampleLoader
    from bimo.data.shards import write_tokens
    from bimo.formats.huggingface import read_model_config
    from bimo.objectives.answers import answer_loss
    from bimo.recipe import AdapterRecipe, TrainingRecipe
    from bimo.training.finetune import load_trainable
    from bimo.training.loop import TrainingState, train
    from bimo.training.optim import make_optimizers

    about = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    directory = Path(about["base"])
    config = read_model_config(directory)
    model = load_trainable(directory, config)
    if kind == "lora":
        from bimo.adapters.kinds import attach

        attach(model, AdapterRecipe(rank=RANK, alpha=ALPHA), seed, base="base", dtype=dtype)
    files = {
        name: write_tokens(
            folder / f"tokens-{name}",
            [(str(number), ids, mask) for number, (ids, mask) in enumerate(about[name])],
            vocab_size=config.vocab_size,
            mark="",
        )
        for name in ("train", "held_out")
    }
    loader = ExampleLoader([files["train"]], length=LENGTH, seed=seed)
    a_step = max(1, round(loader.num_rows[0] * batch / len(about["train"])))
    recipe = TrainingRecipe(  # all rows once, as the peer reads all examples once
        steps=math.ceil(loader.num_rows[0] / a_step), batch_tokens=a_step * loader.row_tokens, micro_batch=batch,
        learning_rate=RATES[kind],
        schedule="constant", warmup=0, dtype=dtype, weight_decay=0.0, betas=(0.9, 0.999),
    )  # fmt: skip
    torch.manual_seed(seed)
    state = TrainingState(model, make_optimizers(model, recipe), loader)
    infos = list(train(state, answer_loss, recipe))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held_out = ExampleLoader([files["held_out"]], length=LENGTH, shuffle=False)
    model.eval()
    total = count = 0.0
    for _ in range(held_out.num_rows[0]):
        with torch.no_grad():
            loss = answer_loss(model, held_out.next_batch(1))
        total, count = total + float(loss.total), count + loss.num_targets
    seen = sum(info.num_tokens for info in infos)
    return {"tokens": seen, "seconds": sum(info.seconds for info in infos), "peak": peak, "held_out": total / count}


def run_peer(kind: str, folder: Path, batch: int, dtype: str, seed: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    about = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    torch.manual_seed(seed)  # of the adapter
    model: Any = AutoModelForCausalLM.from_pretrained(about["base"], dtype=torch.float32)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        )
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(time.perf_counter() - self.begun)

    def rows(name: str) -> list[dict[str, list[int]]]:
        return [
            {"input_ids": ids, "labels": [token if learned else -100 for token, learned in zip(ids, mask, strict=True)]}
            for ids, mask in about[name]
        ]

    def padded(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        whole = [example | {"attention_mask": [1] * len(example["input_ids"])} for example in examples]
        return {
            name: torch.tensor([example[name] + [value] * (longest - len(example[name])) for example in whole])
            for name, value in fill.items()
        }

    arguments = TrainingArguments(
        output_dir=str(folder / "out"), num_train_epochs=1, per_device_train_batch_size=batch, seed=seed,
        learning_rate=RATES[kind], lr_scheduler_type="constant", bf16=dtype == "bfloat16", use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0,
        dataloader_drop_last=True, remove_unused_columns=False, logging_steps=1000,
    )  # fmt: skip
    data = rows("train")
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=padded, callbacks=[Clock()]).train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = sum(len(row["input_ids"]) - 1 for row in data) * (len(times) * batch) / len(data)
    model.eval()
    total = count = 0.0
    for row in rows("held_out"):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        learned = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * learned
        count += learned
    return {"tokens": tokens, "seconds": sum(times), "peak": peak, "held_out": total / count}


ENGINES = {"bimo": run_bimo, "peft + Trainer": run_peer}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--kinds", nargs="+", default=list(RATES), choices=RATES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=160)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        engine, kind, folder = arguments.worker
        figures = ENGINES[engine](kind, Path(folder), arguments.batch, arguments.dtype, arguments.seed)
        print("RESULT", json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as place:
        prepare_examples(arguments.recipe, Path(place), arguments.examples)
        for kind in arguments.kinds:
            results: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
            for seed in range(arguments.rounds):
                for engine in ENGINES:
                    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.finetune", arguments.recipe]
                    command += ["--dtype", arguments.dtype, "--batch", str(arguments.batch)]
                    command += ["--seed", str(seed), "--worker", engine, kind, place]
                    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                    results[engine].append(json.loads(told[told.index("RESULT") + 6 :]))
            _show(kind, results)


def _show(kind: str, results: dict[str, list[dict[str, float]]]) -> None:
    medians = {}
    for name, runs in results.items():
        speeds = [run["tokens"] / run["seconds"] for run in runs]
        medians[name] = statistics.median(speeds)
        peak, losses = max(run["peak"] for run in runs) / 1e3, [run["held_out"] for run in runs]
        print(f"{kind:5} {name:15} {medians[name]:7.0f} tokens/s ({min(speeds):.0f}-{max(speeds):.0f})  "
              f"{peak:6.0f} MB  held-out loss {statistics.median(losses):.4f} "
              f"({min(losses):.4f}-{max(losses):.4f})")  # fmt: skip
    ours, theirs = medians.values()
    print(f"{kind:5} bimo / peft + Trainer = {ours / theirs:.2f}x", flush=True)


if __name__ == "__main__":
    main()
