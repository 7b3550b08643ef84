"""bimo (笔墨): a team's own ChatGPT, trained, measured and served from one readable codebase.

    import bimo
    model = bimo.load("smollm2")
    print(model.chat([{"role": "user", "content": "Hi!"}]).text)

Names are imported on first use, so `import bimo` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bimo.backends.facade import Completion, Model, load
    from bimo.engine.request import SamplingParams
    from bimo.errors import BimoError

__version__ = "0.1.0"
__all__ = ["BimoError", "Completion", "Model", "SamplingParams", "__version__", "load"]

_HOMES = {
    "BimoError": "bimo.errors",
    "Completion": "bimo.backends.facade",
    "Model": "bimo.backends.facade",
    "SamplingParams": "bimo.engine.request",
    "load": "bimo.backends.facade",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bimo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
