"""An OpenAI-style chat endpoint over OpenVINO GenAI, because its own model server is not on the package index.

Only what the measurement sends is understood, so nothing is spent on the rest: one thread steps the pipeline and hands
each request its new ids, which are decoded and streamed as they come.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator
from itertools import count
from queue import SimpleQueue
from typing import Any

from benchmarks.workers.openvino import as_tensor, greedy, open_pipeline

__all__ = ["Stepper", "main"]


class Stepper(threading.Thread):
    """Runs the pipeline; `submit` is called from the event loop, `deliver` is called there with each step's new ids."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(daemon=True)
        self.pipeline = pipeline
        self.arrivals: SimpleQueue[tuple[list[int], int, Any]] = SimpleQueue()
        self.numbers = count()

    def submit(self, ids: list[int], new_tokens: int, deliver: Any) -> None:
        self.arrivals.put((ids, new_tokens, deliver))

    def run(self) -> None:
        running: list[tuple[Any, Any]] = []
        while True:
            while not running or not self.arrivals.empty():
                ids, new_tokens, deliver = self.arrivals.get()
                handle = self.pipeline.add_request(next(self.numbers), as_tensor(ids), greedy(new_tokens))
                running.append((handle, deliver))
            self.pipeline.step()
            for handle, deliver in running:
                while handle.can_read():
                    for output in handle.read().values():
                        deliver(list(output.generated_ids))
            running = [(handle, deliver) for handle, deliver in running if is_running(handle)]


def is_running(handle: Any) -> bool:
    import openvino_genai as genai

    return handle.get_status() == genai.GenerationStatus.RUNNING


def main() -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import StreamingResponse
    from starlette.routing import Route
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream

    settings = json.loads(sys.argv[1])
    pipeline = open_pipeline(settings["model"], settings["threads"])
    templates = pipeline.get_tokenizer()
    tokenizer = Tokenizer.from_file(f"{settings['model']}/tokenizer.json")
    stepper = Stepper(pipeline)
    stepper.start()

    async def chat(request: Any) -> StreamingResponse:
        body = await request.json()
        text = templates.apply_chat_template(body["messages"], add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        arrived: asyncio.Queue[list[int]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        stepper.submit(ids, body["max_tokens"], lambda new: loop.call_soon_threadsafe(arrived.put_nowait, new))
        return StreamingResponse(events(arrived, body["max_tokens"]), media_type="text/event-stream")

    async def events(arrived: asyncio.Queue[list[int]], wanted: int) -> AsyncIterator[str]:
        decoder, made = DecodeStream(skip_special_tokens=False), 0
        while made < wanted:
            new = await arrived.get()
            made += len(new)
            pieces = (decoder.step(tokenizer, token) for token in new)
            yield event({"choices": [{"index": 0, "delta": {"content": "".join(p for p in pieces if p)}}]})
        yield event({"choices": [], "usage": {"completion_tokens": made}})
        yield "data: [DONE]\n\n"

    def event(message: dict[str, Any]) -> str:
        return f"data: {json.dumps(message)}\n\n"

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=settings["port"], log_level="warning")


if __name__ == "__main__":
    main()
