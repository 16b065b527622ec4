"""Prompt files: text with a prompt a line, or JSONL (docs/formats.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.routing.errors import InputError

if TYPE_CHECKING:
    from coterie.moe.text import Prompt


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in order. Raises InputError, naming line and field, for anything else."""
    from coterie.moe.text import Prompt

    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also split inside JSON strings
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start}: is not UTF-8") from error
    numbered = [(i, line.removesuffix("\r")) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"{path}: found no prompt, expected one a line")
    if path.suffix != ".jsonl" and not _looks_like_jsonl(numbered[0][1]):
        return [Prompt(text=line) for _, line in numbered]
    return [_prompt(f"{path}:{number}", line) for number, line in numbered]


def _looks_like_jsonl(line: str) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool({"prompt", "token_ids"} & set(value))


def _prompt(where: str, line: str) -> Prompt:
    from coterie.moe.text import Prompt

    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON: {str(error)[:80]}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: found {type(value).__name__}, expected an object with prompt or token_ids")
    text, ids, limit, name = (value.get(k) for k in ("prompt", "token_ids", "max_new_tokens", "id"))
    if (text is None) == (ids is None):
        raise InputError(f"{where}: found {sorted(value)}, expected one of prompt and token_ids")
    if text is not None and (not isinstance(text, str) or not text):
        raise InputError(f"{where}: prompt: found {text!r}, expected a text that is not empty")
    if ids is not None and not _is_ids(ids):
        raise InputError(f"{where}: token_ids: found {str(ids)[:60]}, expected a list of token ids, 0 or more")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InputError(f"{where}: max_new_tokens: found {limit!r}, expected an integer of at least 1")
    if name is not None and type(name) not in (str, int):
        raise InputError(f"{where}: id: found {name!r}, expected a string or an integer")
    return Prompt(text, None if ids is None else tuple(ids), limit, name)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and i >= 0 for i in value)
