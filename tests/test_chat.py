"""`--chat`: prompts are what a user says; transformers' own rendering of the checkpoint's template is what the model reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import coterie
from coterie.launch.cli import main
from coterie.moe.families import resolve_model
from coterie.routing.errors import InputError

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """coterie-tiny with a chat template."""
    made = tmp_path / "tiny"
    shutil.copytree(resolve_model("coterie-tiny")[1], made)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


def test_the_template_is_put_around_what_a_user_says(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = coterie.load(folder)
    whole = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True)
    assert whole == "<user>hello\n<assistant>"
    (said, plain), _ = model.generate([coterie.Prompt("hello", chat=True), coterie.Prompt(whole)], 8)
    assert said.token_ids == plain.token_ids and said.prompt == "hello"


def test_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("hello\nwhere is it\n")
    (tmp_path / "whole.jsonl").write_text(
        "".join(json.dumps({"prompt": f"<user>{said}\n<assistant>"}) + "\n" for said in ("hello", "where is it"))
    )
    texts = []
    for name, chat in (("p.txt", ["--chat"]), ("whole.jsonl", [])):
        arguments = ["generate", str(folder), "--prompts", str(tmp_path / name), "--max-new-tokens", "6", "--json", *chat]
        assert main(arguments) == 0
        texts.append([row["text"] for row in json.loads(capsys.readouterr().out)["outputs"]])
    assert texts[0] == texts[1]
    trace = ["trace", str(folder), "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "t"), "--chat", "--token-ids"]
    assert main(trace) == 0
    read = coterie.read_trace(tmp_path / "t")
    assert read.token_ids is not None
    first = read.token_ids[read.sequence_ids == 0]
    assert AutoTokenizer.from_pretrained(folder).decode(first.tolist()) == "<user>hello\n<assistant>"


def test_what_has_no_template_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "coterie-tiny", "--prompt", "x", "--chat"]) == 2
    assert "has no chat template, expected prompts that are to be continued as they are" in capsys.readouterr().err
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only systems may speak') }}")
    with pytest.raises(InputError, match=r"chat: .*the chat template cannot be used \(.*only systems may speak"):
        coterie.load(folder).generate([coterie.Prompt("hello", chat=True)], 2)
    (tmp_path / "p.jsonl").write_text('{"token_ids": [1, 2]}\n')
    assert main(["generate", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--chat"]) == 2
    assert "--chat: found token_ids in" in capsys.readouterr().err


def test_what_the_checkpoint_says_of_sampling_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.95}))
    arguments = ["generate", str(folder), "--prompt", "def f(", "--max-new-tokens", "2", "--temperature", "0.6", "--top-k", "5"]
    assert main(arguments) == 0
    assert "sampling: as the command line says; the checkpoint's own generation_config.json has top_k 20, top_p 0.95" in (
        capsys.readouterr().err
    )
    assert main(arguments[:-4]) == 0
    assert "sampling:" not in capsys.readouterr().err, "greedy text has nothing to do with it"
