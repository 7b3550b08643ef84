"""OpenVINO GenAI: the continuous-batching pipeline with prefix caching.

The pipeline for single requests is used where the other cannot be: for prompt-lookup drafts (`lookup`) and .gguf files.
What is compiled for this processor is kept beside the model, so a later start is as fast as it can be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.workers.protocol import Generate, run

CACHE_GB = 1  # of keys and values; int8, OpenVINO's own choice on a CPU


def open_pipeline(model: str, threads: int) -> Any:
    """The pipeline that the worker and the server share."""
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.max_num_seqs = 64
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = True
    return genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties(model, threads))


def properties(model: str, threads: int) -> dict[str, Any]:
    found: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    return found | {"CACHE_DIR": str(Path(model) / "compiled")} if Path(model).is_dir() else found


def greedy(new_tokens: int, lookup: int = 0) -> Any:
    import openvino_genai as genai

    config = genai.GenerationConfig()
    config.max_new_tokens = new_tokens
    config.ignore_eos = True
    config.do_sample = False
    if lookup:
        config.num_assistant_tokens = lookup
        config.max_ngram_size = 3
    return config


def as_tensor(ids: list[int]) -> Any:
    import numpy
    import openvino

    return openvino.Tensor(numpy.array([ids], dtype=numpy.int64))


def load(model: str, threads: int, lookup: int = 0) -> Generate:
    """`lookup`: tokens drafted from the prompt at a time; 0: none."""
    if lookup or model.endswith(".gguf"):
        import openvino_genai as genai

        drafts = {"prompt_lookup": True} if lookup else {}
        single = genai.LLMPipeline(model, "CPU", **drafts, **properties(model, threads))
        return lambda prompts, new_tokens: [
            list(single.generate(as_tensor(prompt), greedy(new_tokens, lookup)).tokens[0]) for prompt in prompts
        ]
    pipeline = open_pipeline(model, threads)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        configs = [greedy(new_tokens)] * len(prompts)
        results = pipeline.generate([as_tensor(prompt) for prompt in prompts], configs)
        return [list(result.m_generation_ids[0]) for result in results]

    return generate


if __name__ == "__main__":
    run(load)
