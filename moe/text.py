"""Prompts to token ids and token ids to text, by the checkpoint's tokenizer if it brings one."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from coterie.moe.batch import Request
from coterie.moe.families import ModelShape
from coterie.routing.errors import InputError, first_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class Prompt:
    """What to continue: `text`, or `token_ids` for checkpoints without a tokenizer; one of the two is set.

    id: the caller's name for it, echoed in the output; max_new_tokens: None takes the call's. chat: `text` is what a user says,
    and the checkpoint's chat template is put around it.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    max_new_tokens: int | None = None
    id: str | int | None = None
    chat: bool = False


@dataclass(frozen=True)
class Output:
    """A finished prompt. token_ids: new tokens only; finish_reason: `stop` (end token) or `length`."""

    id: str | int
    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


class Text:
    """A checkpoint's vocabulary. tokenizer: transformers' own, or None."""

    def __init__(self, shape: ModelShape) -> None:
        self.folder = shape.folder
        config = shape.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        self.tokenizer = _tokenizer(shape.folder)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt. Raises InputError if it is empty, no Unicode, out of the vocabulary, or has no tokenizer."""
        if prompt.token_ids is None and self.tokenizer is None:
            raise InputError(f"{self.folder}: has no tokenizer, expected prompts with token_ids")
        try:
            (prompt.text or "").encode()
        except UnicodeEncodeError as error:  # half of a pair of surrogates, or bytes of a command line
            found = f"found {error.object[error.start]!r} as character {error.start + 1}"
            raise InputError(f"prompt: {found}, expected text that can be written as UTF-8") from error
        ids = prompt.token_ids if prompt.token_ids is not None else self._tokens(prompt.text or "", prompt.chat)
        if not len(ids):
            raise InputError("found no token, expected at least one")
        known = [_integer(i) for i in ids]
        for given, number in zip(ids, known, strict=True):
            if number is None:
                raise InputError(f"token_ids: found {given!r}, expected integers")
            if not 0 <= number < self.vocabulary:
                raise InputError(f"token_ids: found {number}, expected 0 to {self.vocabulary - 1}")
        return tuple(number for number in known if number is not None)

    def _tokens(self, text: str, chat: bool) -> Sequence[int]:
        if not chat:
            return self._ids(text)
        if not self.tokenizer.chat_template:
            raise InputError(f"chat: {self.folder} has no chat template, expected prompts that are to be continued as they are")
        try:
            said = [{"role": "user", "content": text}]
            whole = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # of a template: jinja's, or what it raises itself
            raise InputError(f"chat: {self.folder}: the chat template cannot be used ({first_line(error)})") from error
        return self._ids(whole, add_special_tokens=False)  # a template writes them itself

    def _ids(self, text: str, **how: bool) -> list[int]:
        return list(self.tokenizer(text, **how)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; empty without a tokenizer."""
        return "" if self.tokenizer is None else str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def requests(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Request]:
        """The prompts as the generation loop takes them, in order. Raises InputError if there is none."""
        if not prompts:
            raise InputError("prompts: found none, expected at least one")
        for number, prompt in enumerate(prompts):
            if prompt.max_new_tokens is not None and prompt.max_new_tokens < 0:
                found = f"found {prompt.max_new_tokens}, expected 0 or more"
                raise InputError(f"prompt {_named(number, prompt)}: max_new_tokens: {found}")
        limits = [max_new_tokens if p.max_new_tokens is None else p.max_new_tokens for p in prompts]
        return [Request(i, self._of(i, p), n) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]

    def warn_of_length(self, requests: Sequence[Request]) -> None:
        """Says it of the longest request if it goes beyond what the model was made for: it runs, and its text may be poor."""
        longest = max(requests, key=lambda r: len(r.token_ids) + r.max_new_tokens)
        tokens = len(longest.token_ids), longest.max_new_tokens
        if self.positions is not None and sum(tokens) > self.positions:
            told = (
                f"prompt {longest.index} (counted from 0): {tokens[0]} tokens and {tokens[1]} new ones, more than the model's"
            )
            limit = f"{self.positions} positions (max_position_embeddings): what it makes of it may be poor"
            limit += "; shorten it, or ask for fewer"
            warnings.warn(f"{told} {limit}", RuntimeWarning, stacklevel=3)

    def _of(self, number: int, prompt: Prompt) -> tuple[int, ...]:
        """`encode`, with the prompt named in errors."""
        try:
            return self.encode(prompt)
        except InputError as error:
            if prompt.token_ids is None and self.tokenizer is None:
                raise  # it is not this prompt's fault
            raise InputError(f"prompt {_named(number, prompt)}: {error}") from error

    def output(self, prompt: Prompt, request: Request, token_ids: Sequence[int], finish_reason: str) -> Output:
        """What a finished request is told as."""
        text = prompt.text if prompt.text is not None else self.decode(request.token_ids)
        name = request.index if prompt.id is None else prompt.id
        return Output(name, text, self.decode(token_ids), tuple(token_ids), finish_reason)


def _integer(value: object) -> int | None:
    """An integer of any library; None of anything else."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _named(number: int, prompt: Prompt) -> str:
    return f"{number} (counted from 0)" if prompt.id is None else repr(prompt.id)


def _tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer, or None if it brings none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # many kinds; each means that the tokenizer's files are wrong
        raise InputError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)})") from error
