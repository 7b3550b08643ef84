"""Training throughput beside transformers' Trainer: same model, data, order, batch, precision and optimiser.

    python -m benchmarks.train                        # both shapes, 3 rounds, interleaved
    python -m benchmarks.train --shapes smollm2 --rounds 5

Each measurement is a process of its own: warm-up steps, then the median of the others. Both start from the same weights
and read the same rows, so their losses are compared as well. Needs the packages of `pip install bimo[bench]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    # hidden, layers, heads, kv heads, intermediate, vocabulary, length, rows of a step
    "smollm2": (576, 30, 9, 3, 1536, 49152, 512, 4),
    "gpt-10m": (320, 6, 5, 5, 896, 8192, 256, 16),
}
WARM_UP, STEPS = 2, 8


def make_model(shape: str, folder: Path) -> None:
    """The first weights, as a model directory that both read."""
    from bimo.formats.huggingface import save_directory
    from bimo.models.config import DecoderConfig
    from bimo.models.decoder import Decoder
    from bimo.models.initial import init_weights

    hidden, layers, heads, kv_heads, inner, vocab, length, _ = SHAPES[shape]
    config = DecoderConfig(
        family="llama", vocab_size=vocab, hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=hidden // heads, intermediate_size=inner, max_positions=length,
    )  # fmt: skip
    model = Decoder(config)
    init_weights(model, 0)
    save_directory(folder, config, model.named_parameters())


def make_rows(shape: str) -> list[list[int]]:
    """Rows of tokens, all different; real text would train no faster."""
    import numpy as np

    vocab, length, rows = SHAPES[shape][5:]
    random = np.random.default_rng(0)
    return random.integers(0, vocab, ((WARM_UP + STEPS) * rows, length + 1)).tolist()


def run_bimo(shape: str, folder: Path, dtype: str, optimizer: str) -> dict[str, object]:
    import torch

    from bimo.data.loader import PackedLoader
    from bimo.data.shards import write_tokens
    from bimo.formats.huggingface import load_weights, read_config
    from bimo.models.decoder import Decoder
    from bimo.objectives.causal import causal_loss
    from bimo.recipe import TrainingRecipe
    from bimo.training.loop import TrainingState, train
    from bimo.training.optim import make_optimizers

    config = read_config(folder)
    model = Decoder(config)
    for name, tensor in load_weights(folder, config):
        model.get_parameter(name).data.copy_(tensor)
    length, rows = SHAPES[shape][6:]
    stream = [token for row in make_rows(shape) for token in row[:-1]] + [0]
    file = write_tokens(folder / "tokens", [("all", stream)], vocab_size=config.vocab_size, mark="")
    recipe = TrainingRecipe(
        steps=WARM_UP + STEPS, batch_tokens=rows * length, micro_batch=rows, learning_rate=1e-4, schedule="constant",
        warmup=0, dtype=dtype, optimizer=optimizer, weight_decay=0.0, betas=(0.9, 0.999),
    )  # fmt: skip
    state = TrainingState(model, make_optimizers(model, recipe), PackedLoader([file], length=length, shuffle=False))
    torch.manual_seed(0)
    infos = list(train(state, causal_loss, recipe))
    return {"seconds": [info.seconds for info in infos], "losses": [info.loss for info in infos]}


def run_transformers(shape: str, folder: Path, dtype: str, optimizer: str) -> dict[str, object]:
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    length, rows = SHAPES[shape][6:]
    stream = [token for row in make_rows(shape) for token in row[:-1]]
    data = [stream[start : start + length] for start in range(0, len(stream), length)]
    dataset = [{"input_ids": row, "labels": row} for row in data]
    times, losses = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(time.perf_counter() - self.begun)

        def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(dataset)

    arguments = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=WARM_UP + STEPS, per_device_train_batch_size=rows, learning_rate=1e-4,
        lr_scheduler_type="constant", bf16=dtype == "bfloat16", use_cpu=True, report_to=[], logging_steps=1,
        save_strategy="no", disable_tqdm=True, optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    InOrder(model=model, args=arguments, train_dataset=dataset, callbacks=[Clock()]).train()
    return {"seconds": times, "losses": losses}


ENGINES = {"bimo": run_bimo, "transformers": run_transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        engine, shape, folder = arguments.worker
        print("RESULT", json.dumps(ENGINES[engine](shape, Path(folder), arguments.dtype, "adamw")))
        return
    for shape in arguments.shapes:
        length, rows = SHAPES[shape][6:]
        speeds: dict[str, list[float]] = {name: [] for name in ENGINES}
        losses: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            for engine in ENGINES:
                with tempfile.TemporaryDirectory() as folder:
                    make_model(shape, Path(folder) / "model")
                    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.train", "--dtype", arguments.dtype]
                    command += ["--worker", engine, shape, str(Path(folder) / "model")]
                    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                result = json.loads(told[told.index("RESULT") + 6 :])
                speeds[engine].append(rows * length / statistics.median(result["seconds"][WARM_UP:]))
                losses[engine] = result["losses"]
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        for name, values in speeds.items():
            print(f"{shape:8} {name:13} {medians[name]:8.0f} tokens/s ({min(values):.0f}-{max(values):.0f})  "
                  f"loss {losses[name][0]:.4f} -> {losses[name][-1]:.4f}")  # fmt: skip
        print(f"{shape:8} bimo / transformers = {medians['bimo'] / medians['transformers']:.2f}x", flush=True)


if __name__ == "__main__":
    main()
