"""Vega-Lite's JavaScript, with which a page draws its charts, from the package vl-convert-python.

It is packed, so that a page is small and opens before it is read, and kept in the cache folder: to
bundle it takes some seconds.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import zlib
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from continual.io.atomic import write_atomically

VEGA_LITE = "6.4"  # among the versions of Vega-Lite that the package holds


@lru_cache(maxsize=1)
def load_vega_script() -> tuple[str, str]:
    """The script (gzip, base64), and the SHA-256 (base64) of what it unpacks to, by which a page's
    policy knows it.
    """
    import platformdirs

    kept = (
        Path(platformdirs.user_cache_dir("continual"))
        / f"vega-{VEGA_LITE}-{version('vl-convert-python')}.js.gz"
    )
    script = _load_cached(kept)
    if script is None:
        import vl_convert

        whole = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # type: ignore[call-arg]  # as its manual says
        script = gzip.compress(whole.encode(), mtime=0)
        with contextlib.suppress(
            OSError
        ):  # a cache folder that cannot be written to costs that at each report
            write_atomically(kept, script)
    return base64.b64encode(script).decode(), csp_digest(gzip.decompress(script))


def csp_digest(script: bytes) -> str:
    """What stands behind `sha256-` in a Content-Security-Policy."""
    return base64.b64encode(hashlib.sha256(script).digest()).decode()


def _load_cached(path: Path) -> bytes | None:
    """The packed script of an earlier report; None where there is none that can be unpacked."""
    try:
        script = path.read_bytes()
        gzip.decompress(script)
        return script
    except (OSError, EOFError, zlib.error):
        return None
