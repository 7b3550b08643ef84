"""A model trained here, served by vLLM: its greedy tokens in float32 are bimo's and transformers'. zh and en.

vLLM lives in an environment of its own (`bimo bench`'s peer, benchmarks/peers.py); without it the test is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bimo
from benchmarks.peers import is_ready, python_of
from bimo.objectives.causal import causal_loss
from bimo.training.session import Job, train_run
from tests.training.tiny import build, make_recipe, make_texts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_ready("vllm"), reason="the peer vllm is not set up: bimo bench --peers vllm"),
]

PROMPTS = ["语言", "今天天气很好，", "中国的", "the", "Once upon a time", "In the beginning, 语言"]
NEW_TOKENS = 24
TIE = 1e-4  # between the two best logits: below it rounding decides, and what follows proves nothing

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    work = json.loads(open(sys.argv[1]).read())
    llm = LLM(model=work["model"], dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=8, seed=0)
    sampling = SamplingParams(temperature=0, max_tokens=work["new_tokens"], ignore_eos=True)
    texts = llm.generate(work["prompts"], sampling, use_tqdm=False)
    found = [[list(text.prompt_token_ids), list(text.outputs[0].token_ids)] for text in texts]
    open(sys.argv[2], "w").write(json.dumps(found))

if __name__ == "__main__":  # its engine is a process that imports this file
    main()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    texts = make_texts(folder / "texts")
    recipe = make_recipe(steps=60, learning_rate=5e-3, checkpoint_minutes=60, eval_every=60)
    shape = {"hidden_size": 64, "context_length": 64}  # vLLM's attention on a CPU has heads of 32 and more
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=shape)})
    for _ in train_run(Job.of(recipe), folder, build(recipe, texts), causal_loss, texts, print):
        pass
    return folder / "model"


@pytest.fixture(scope="module")
def from_vllm(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[int], list[int]]]:
    """Of each prompt vLLM's ids and its answer's."""
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    work = {"model": str(trained), "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment = {**os.environ, **small, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [python_of("vllm"), folder / "script.py", folder / "work.json", folder / "found.json"]
    result = subprocess.run(
        list(map(str, command)), env=environment, cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return [(prompt, answer) for prompt, answer in json.loads((folder / "found.json").read_text())]


def test_greedy_tokens_are_the_same_in_all_three(trained: Path, from_vllm: list[tuple[list[int], list[int]]]) -> None:
    reference = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    num_ties = 0
    with bimo.load(trained, quant="none", dtype="float32") as model:
        for text, (prompt, theirs) in zip(PROMPTS, from_vllm, strict=True):
            assert model.tokenizer.encode(text) == prompt
            ours = model.generate(prompt, max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True).tokens
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + theirs])).logits[0, len(prompt) - 1 : -1]
            best = logits.topk(2).values
            ties = (best[:, 0] - best[:, 1] < TIE).nonzero().flatten().tolist()
            num_ties += len(ties)
            end = ties[0] if ties else NEW_TOKENS
            assert ours[:end] == theirs[:end] == logits.argmax(-1).tolist()[:end]
            assert len(theirs) == NEW_TOKENS
    assert num_ties <= 1  # else little was compared
