"""Prompt files: text with a prompt a line, or JSONL (docs/formats.md)."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.routing.errors import InputError

if TYPE_CHECKING:
    from coterie.moe.text import Prompt

FIELDS = ("prompt", "token_ids", "max_new_tokens", "id")
ALIKE = 0.8  # share of letters: so like one of them that it was meant


def asked_prompts(options: argparse.Namespace) -> list[Prompt]:
    """What a verb that runs a model was given: `--prompts`, or else `--prompt`; with `--chat` what users say."""
    from coterie.moe.text import Prompt

    prompts = read_prompts(options.prompts) if options.prompts else [Prompt(text=options.prompt)]
    if options.chat and any(prompt.text is None for prompt in prompts):
        raise InputError(f"--chat: found token_ids in {options.prompts}, expected text, which a template is put around")
    return [replace(prompt, chat=True) for prompt in prompts] if options.chat else prompts


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in order. Raises InputError, naming line and field, for anything else."""
    from coterie.moe.text import Prompt

    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also split inside JSON strings
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start}: is not UTF-8") from error
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"{path}: found no prompt, expected one a line")
    if path.suffix != ".jsonl" and not _looks_like_jsonl(numbered[0][1]):
        return [Prompt(text=line) for _, line in numbered]
    prompts = [_prompt(f"{path}:{number}", line) for number, line in numbered]
    _check_names(path, [number for number, _ in numbered], prompts)
    return prompts


def _looks_like_jsonl(line: str) -> bool:
    """Whatever the file is called; a line of text that begins like an object of prompts is more likely a damaged one."""
    if line.lstrip().startswith(('{"prompt"', '{"token_ids"')):
        return True
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _check_names(path: Path, numbers: list[int], prompts: list[Prompt]) -> None:
    """Raises InputError if two outputs would be called the same; a prompt without an id is called by its number, from 0."""
    named: dict[str | int, int] = {}
    for place, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
        name = place if prompt.id is None else prompt.id
        if named.setdefault(name, number) != number:
            raise InputError(f"{path}:{number}: id: found {name!r}, as in line {named[name]}, expected one for each prompt")


def _prompt(where: str, line: str) -> Prompt:
    from coterie.moe.text import Prompt

    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON: {str(error)[:80]}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: found {type(value).__name__}, expected an object with prompt or token_ids")
    for key in value.keys() - set(FIELDS):  # others are the caller's own
        if meant := get_close_matches(key, FIELDS, 1, ALIKE):
            raise InputError(f"{where}: found {key!r}, expected {meant[0]!r}, or another name for what is yours")
    text, ids, limit, name = (value.get(k) for k in FIELDS)
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
