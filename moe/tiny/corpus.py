"""Training text that every Python installation carries, in four domains, with a fixed held-out share.

Used by `train.py` beside this file. Nothing is downloaded: the standard library's sources, the prose inside
them (docstrings, pydoc's topics, IDLE's news, the licence), the C headers and the library's own data tables.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
from dataclasses import dataclass
from pathlib import Path

DOMAINS = ("python", "english", "c", "tables")
SEEN_RUN = 64  # characters
HELD_OUT_SHARE = 16  # one document in this many is never trained on


@dataclass(frozen=True)
class Document:
    """One text with the name that decides which side of the held-out split it is on."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the model never sees this document in training (by a hash of its name)."""
        return hashlib.sha256(self.name.encode()).digest()[0] % HELD_OUT_SHARE == 0

    @property
    def side(self) -> int:
        """Which of two kinds of held-out prompts it may give, by its name too: a module and its docstrings agree."""
        return hashlib.sha256(self.name.encode()).digest()[1] % 2


class TrainingText:
    """Everything the model was trained on, to tell whether a held-out window is new: files repeat one another."""

    def __init__(self, corpus: dict[str, list[Document]]) -> None:
        self.text = "\0".join(d.text for documents in corpus.values() for d in documents if not d.held_out)

    def has_seen(self, window: str) -> bool:
        """Whether any run of SEEN_RUN characters of `window` (one in every half of that tried) was trained on."""
        starts = range(0, max(1, len(window) - SEEN_RUN + 1), SEEN_RUN // 2)
        return any(window[i : i + SEEN_RUN] in self.text for i in starts)


def read_corpus() -> dict[str, list[Document]]:
    """Every document by domain, in a fixed order.

    Raises FileNotFoundError naming the domain for which this Python installation carries no text.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    headers = Path(sysconfig.get_paths()["include"])
    sources = _read(library, "*.py", skip=("test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"))
    tables = _read(library / "encodings", "*.py") + _read(library / "html", "entities.py")
    corpus = {
        "python": sources,
        "english": _prose(library, sources),
        "c": _read(headers, "*.h"),
        "tables": [d for d in tables if "\\x" in d.text or "0x" in d.text or d.name == "entities.py"],
    }
    for domain, documents in corpus.items():
        if not documents:
            raise FileNotFoundError(f"domain {domain!r}: no text under {library} or {headers}; install Python's headers")
    return corpus


def digest(corpus: dict[str, list[Document]]) -> str:
    """SHA-256 over every document's name and text: two runs trained on the same text print the same."""
    h = hashlib.sha256()
    for domain in DOMAINS:
        for d in corpus[domain]:
            h.update(f"{domain}\0{d.name}\0{d.text}\0".encode())
    return h.hexdigest()


def _read(root: Path, pattern: str, skip: tuple[str, ...] = ()) -> list[Document]:
    paths = sorted(p for p in root.rglob(pattern) if not set(p.relative_to(root).parts) & set(skip))
    texts = ((p.relative_to(root).as_posix(), p.read_bytes()) for p in paths)
    return [Document(n, b.decode("utf-8")) for n, b in texts if len(b) > 64 and _is_utf8(b)]


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _prose(library: Path, sources: list[Document]) -> list[Document]:
    from pydoc_data import topics

    prose = [Document(f"topic/{name}", text) for name, text in sorted(topics.topics.items())]
    prose += _read(library / "idlelib", "*.txt") + _read(library, "LICENSE.txt")
    for source in sources:
        text = "\n\n".join(_docstrings(source.text))
        if len(text) > 200:
            prose.append(Document(source.name, text))  # same name as its module: both sides of the split agree
    return prose


def _docstrings(source: str) -> list[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # lib2to3 carries Python 2 samples
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [inspect.cleandoc(d) for d in found if d and len(d) > 60]
