"""Flat rows as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as CSV; mappings within a row become columns of their own."""
    flat = [_flat(row) for row in rows]
    stream = io.StringIO()
    columns = list(dict.fromkeys(name for row in flat for name in row))
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()


def _flat(row: Mapping[str, object]) -> dict[str, object]:
    flat = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}_{name}" if name != "bytes" else key: each for key, each in value.items()}
        else:
            flat[name] = value
    return flat
