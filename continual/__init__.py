"""continual: continual instruction learning of language models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas


def load_runs(*paths: str | Path, what: str = "cells") -> pandas.DataFrame:
    """These run and comparison folders as one table in long form, for pandas.

    `what` is "cells", a row for each stage and task of every matrix; "summaries", one for each
    summary and cost; "settings", one for each key of the configuration; "examples", one for each
    answer; or "steps", one for each optimizer step that was logged. Every row also says which run
    it is of; docs/data.md lists the columns.

    A run that has scored nothing yet has no rows, and a warning names it. Raises MissingError for a
    folder without runs, DataError for a broken file or a link out of the folder, ConfigError for
    another `what`.
    """
    from continual.results.tables import load_table

    return load_table(paths, what)
