"""`serve` as a program of its own, for tests of signals and exit codes: `python served.py TOKENIZER_DIRECTORY GATE`.

Prints the address when the socket is open and again when the "model" (scripted: no torch to wait for) is loaded, which
is when the file GATE exists. A GATE named "broken" is a model that cannot be loaded.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from bimo.errors import BimoError, CorruptModelError
from bimo.serving.app import serve
from bimo.tokenizer.load import Tokenizer
from tests.serving.scripted import ScriptedBackend


def main(directory: str, gate: str) -> int:
    def load() -> ScriptedBackend:
        if gate == "broken":
            raise CorruptModelError("model.safetensors is half of a file: fetch it again")
        while not Path(gate).exists():
            time.sleep(0.01)
        backend = ScriptedBackend(Tokenizer.from_directory(directory), lambda _: "从前 🦊 " * 20, gated=True)
        backend.gate = _Steps()
        return backend

    try:
        return serve(load, port=0, on_listen=say, on_ready=say, grace=2)
    except BimoError as error:
        print(error, file=sys.stderr)
        return 1


class _Steps:
    """A gate through which a token comes every few milliseconds, so that an answer takes a moment."""

    def wait(self, timeout: float) -> bool:
        time.sleep(timeout)
        return True


def say(address: str) -> None:
    # one write: `print` writes the line's end apart, and two threads tell the address
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
