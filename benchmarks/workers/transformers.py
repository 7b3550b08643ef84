"""Hugging Face transformers' `generate`, the model directory as it is."""

from __future__ import annotations

from benchmarks.workers.protocol import Generate, run


def load(model: str, threads: int, dtype: str) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)  # (B, T): the driver's batches have prompts of one length
        limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        mask = torch.ones_like(ids)
        out = loaded.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **limits)
        return out[:, ids.shape[1] :].tolist()

    return generate


if __name__ == "__main__":
    run(load)
