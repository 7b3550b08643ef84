"""Every error bimo raises on purpose, as one tree.

    BimoError                     one sentence a user can act on
     ├─ UsageError                an argument or a request is wrong (CLI exit 2, HTTP 400); `.param` names it
     │   └─ ContextLengthError    prompt longer than the model's context; carries both numbers
     ├─ ModelError                something about the model's files
     │   ├─ ModelNotFoundError    no such name; `.near` lists similar ones (HTTP 404)
     │   ├─ UnsupportedModelError the architecture is not one bimo implements
     │   └─ CorruptModelError     a file is half-fetched, truncated or tampered with
     ├─ DownloadError             a registry could not be reached or refused
     │   └─ PackageNotFoundError  it has no such package; `.versions` lists what it has of that name
     ├─ MissingDependencyError    an optional package is needed; the message has the install command
     ├─ DataError                documents, tokens or checkpoints cannot be read or written
     ├─ TrainingError            the loss is not a number, or exploded
     ├─ CapacityError             the queue is full, try later (HTTP 429); `.retry_after` in seconds
     └─ EngineError               generation failed for a reason that is ours (HTTP 500)

Messages follow one pattern: what was expected, what came, how to mend it.
"""

from __future__ import annotations

__all__ = [
    "BimoError",
    "CapacityError",
    "ContextLengthError",
    "CorruptModelError",
    "DataError",
    "DownloadError",
    "EngineError",
    "MissingDependencyError",
    "ModelError",
    "ModelNotFoundError",
    "PackageNotFoundError",
    "TrainingError",
    "UnsupportedModelError",
    "UsageError",
]


class BimoError(Exception):
    """Base of all errors meant for users; `str(error)` is the sentence to show."""


class UsageError(BimoError):
    """An argument has a value that cannot be used; `param` is its public name, if one is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(UsageError):
    """The prompt does not fit into the model's context, together with an answer unless that has its own
    (`for_answer=False`, an encoder-decoder)."""

    def __init__(self, prompt_tokens: int, context_length: int, *, for_answer: bool = True) -> None:
        room = " and needs room for at least one new token" if for_answer else ""
        super().__init__(
            f"the prompt has {prompt_tokens} tokens, the context holds {context_length}{room}: shorten the prompt, or "
            "ask for truncation (truncate_prompt=true)",
            param="prompt",
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class ModelError(BimoError):
    """The model's files cannot be used."""


class ModelNotFoundError(ModelError):
    """A reference names nothing; `near` holds similar names that exist."""

    def __init__(self, reference: str, near: list[str], detail: str = "") -> None:
        hint = f"did you mean {' or '.join(near)}?" if near else "`bimo models` lists the names."
        super().__init__(f"no model {reference!r}{': ' + detail if detail else ''}; {hint}")
        self.reference = reference
        self.near = near


class UnsupportedModelError(ModelError):
    """The architecture is not one bimo implements."""


class CorruptModelError(ModelError):
    """A file is incomplete or its content is not what was pinned."""


class DownloadError(BimoError):
    """A registry could not be reached, or refused."""


class PackageNotFoundError(DownloadError):
    """A registry has no package of that name, or not that version of it; `versions` are those it has."""

    def __init__(self, requirement: str, versions: list[str]) -> None:
        there = f", there are {', '.join(versions[-5:])}" if versions else ""
        super().__init__(f"the package index has no {requirement} for this Python{there}: check name and version")
        self.versions = versions


class DataError(BimoError):
    """Documents, tokens or checkpoints cannot be read or written."""


class TrainingError(BimoError):
    """Training cannot go on."""


class MissingDependencyError(BimoError):
    """An optional package is missing."""

    def __init__(self, package: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install {package}")
        self.package, self.purpose = package, purpose

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Errors of worker processes arrive pickled, which by itself knows of one argument only."""
        return type(self), (self.package, self.purpose)


class CapacityError(BimoError):
    """Too much work is queued; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(BimoError):
    """Generation failed inside the engine."""
