"""Results of one machine in one JSON file, rewritten after every measurement, so that runs resume.

    {"schema": 1, "quick": bool, "device": {...},
     "parts": {part: {"status", "reason", "seconds", "started", "commit"}},
     "rows":  {"part/name": {"part", "name", "status", "reason", "attempts", ...}}}

Status of a row: `done`; `skipped`, when the machine lacks what it needs; `postponed`, when no time
was left; `failed`; `running`, when the process ended inside it. All but `done` are tried again by
the next run, those that failed or hung at most `ATTEMPTS` times.
"""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

SCHEMA = 1
ATTEMPTS = 2


class Results:
    """The file of results; one process writes it at a time, any number of its threads."""

    def __init__(self, path: Path, quick: bool = False) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.data: dict[str, Any] = {"schema": SCHEMA, "quick": quick, "device": {}}
        self.data |= {"parts": {}, "rows": {}}
        if path.exists():
            self.data = json.loads(path.read_text())
            if self.data.get("schema") != SCHEMA:
                raise SystemExit(
                    f"{path}: schema {self.data.get('schema')!r}, expected {SCHEMA}: move the "
                    "file away or choose another --out"
                )

    def save(self) -> None:
        """Replace the file in one step: a reader or a killed process never sees half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(plain(self.data), indent=1, allow_nan=False)
        new = self.path.with_suffix(".new")
        new.write_text(text + "\n")
        os.replace(new, self.path)

    # rows

    def settled(self, part: str, name: str) -> bool:
        """Whether a row needs no further try."""
        row = self.data["rows"].get(f"{part}/{name}", {})
        return row.get("status") == "done" or row.get("attempts", 0) >= ATTEMPTS

    def begin(self, part: str, name: str) -> None:
        """Note that a row is being measured: what kills the process shows in the file."""
        with self._lock:
            before = self.data["rows"].get(f"{part}/{name}", {})
            self.data["rows"][f"{part}/{name}"] = {
                **{"part": part, "name": name, "status": "running"},
                "attempts": before.get("attempts", 0) + 1,
            }
            self.save()

    def put(self, part: str, name: str, status: str, **found: Any) -> dict[str, Any]:
        """Write a row; what was skipped or postponed does not count as an attempt."""
        with self._lock:
            before = self.data["rows"].get(f"{part}/{name}", {})
            counts = status in ("done", "failed")
            row = {"part": part, "name": name, "status": status, **found}
            row["attempts"] = before.get("attempts", 0) if counts else 0
            self.data["rows"][f"{part}/{name}"] = row
            self.save()
        return row

    def rows(self, part: str) -> list[dict[str, Any]]:
        return [row for row in self.data["rows"].values() if row["part"] == part]

    # parts

    def end_part(self, part: str, **entry: Any) -> None:
        """Close a part; a row left `running` is what the process died in."""
        for row in self.rows(part):
            if row["status"] == "running":
                row |= {"status": "failed", "reason": f"the part ended here: {entry['reason']}"}
        self.data["parts"][part] = entry
        self.save()

    def part_done(self, part: str) -> bool:
        return self.data["parts"].get(part, {}).get("status") == "done"

    def forget(self, part: str) -> None:
        """Drop everything known of a part, so that it is measured anew."""
        self.data["parts"].pop(part, None)
        kept = {key: row for key, row in self.data["rows"].items() if row["part"] != part}
        self.data["rows"] = kept
        self.save()

    def verdict(self, part: str) -> str:
        """Status of a part whose process ran to its end, from its rows."""
        found = {row["status"] for row in self.rows(part)}
        if found & {"failed", "running"}:
            return "failed"
        return "incomplete" if "postponed" in found else "done"


def plain(value: Any) -> Any:
    """JSON types only: NaN and infinities, which JSON lacks, become text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
