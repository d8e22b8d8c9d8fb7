"""Quote values for Hydra's grammar."""

from __future__ import annotations

import re


def quote_value(text: str) -> str:
    """Quote a text as a command-line value, if Hydra's grammar would read it as something else."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        if OverridesParser.create().parse_override(f"key={text}").value() == text:
            return text
    except HydraException:
        pass
    return "'" + re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", r"\'") + "'"
