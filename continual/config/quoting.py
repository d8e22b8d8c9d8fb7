"""Quote values for Hydra's grammar."""

from __future__ import annotations

import re


def quote_value(text: str) -> str:
    """A text as a value on the command line: in the quotes of Hydra's grammar where it needs them
    to be that text.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        if OverridesParser.create().parse_override(f"key={text}").value() == text:
            return text
    except HydraException:
        pass
    return "'" + re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", r"\'") + "'"
