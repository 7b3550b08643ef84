"""vLLM's CPU build, eager: compiling costs a minute at every start."""

from __future__ import annotations

from benchmarks.workers.protocol import Generate, run


def load(model: str, threads: int) -> Generate:
    """Threads and the size of the KV cache come from the environment."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model, dtype="bfloat16", enforce_eager=True, max_model_len=8192, max_num_seqs=64, disable_log_stats=True
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(result.outputs[0].token_ids) for result in engine.generate(inputs, sampling, use_tqdm=False)]

    return generate


if __name__ == "__main__":
    run(load)
