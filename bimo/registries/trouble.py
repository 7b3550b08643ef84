"""What all downloads share: how progress is told, and what trouble with disk and network is called.

with storage_errors(folder): ...        # "disk full" and "not allowed" become one sentence with the mend
need_space(folder, 270_000_000)
if UNREACHABLE.search(client_output): ...
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from bimo.errors import DownloadError

__all__ = ["FULL", "UNREACHABLE", "Progress", "need_space", "storage_errors"]

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, bytes done, bytes in total); a total of 0 means it is not known."""

# What pip, npm and apt say, each in its own words.
UNREACHABLE = re.compile(
    r"NewConnectionError|NameResolutionError|Connection ?(?:Error|refused|reset|aborted|broken|timed out|failed)|"
    r"ConnectionResetError|Failed to establish|Max retries exceeded|Temporary failure|getaddrinfo|Could not resolve|"
    r"Network is unreachable|timed out|Timeout|ProxyError|SSLError|CERTIFICATE_VERIFY|Could not fetch URL|"
    r"incomplete-download|IncompleteRead|HTTP error 5\d\d|ENOTFOUND|ECONNREFUSED|ECONNRESET|ETIMEDOUT|EAI_AGAIN|"
    r"ENETUNREACH|EHOSTUNREACH|Unable to connect|Failed to fetch|Could not connect"
)
FULL = re.compile(r"No space left on device|ENOSPC|enough free space", re.IGNORECASE)


@contextlib.contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn "disk full" and "not allowed to write" below `folder` into one sentence with the mend."""
    try:
        yield
    except Exception as error:
        code = _system_error(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"no space left on the disk of {folder}, nothing half-written was kept: free some, or point BIMO_HOME "
                f"to a folder on a larger disk"
            ) from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DownloadError(f"the folder {folder} cannot be written to: set BIMO_HOME to one that can") from error
        raise


def _system_error(error: BaseException | None) -> int | None:
    """The system's error number behind an exception, through whatever a library wrapped around it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if number := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors and tokenizers hand it on as text
            return int(number[1])
        error = error.__cause__
    return None


def need_space(folder: Path, num_bytes: int) -> None:
    """Raise DownloadError when the disk of `folder` has less than `num_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DownloadError(
            f"{num_bytes / 1e6:.0f} MB are needed on the disk of {folder}, which has {free / 1e6:.0f} MB free: "
            f"free some, or point BIMO_HOME to a folder on a larger disk"
        )
