"""transformers' own tests of models, with our experts implementation beside its eager one.

    python bench/transformers_tests.py TESTS [--families mixtral ...] [--out bench/results/transformers_tests.json]

TESTS: the folder `tests` of transformers' source at the installed version, for example from its source distribution
(`pip download --no-deps --no-binary :all: transformers==VERSION`). Its tests of generation and export are not in there; those
common to all models are run, and ours must pass wherever eager does: the exit status says so. Needs `parameterized`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "phimoe", "granitemoe", "glm4_moe", "lfm2_moe",
    "ernie4_5_moe",
)  # fmt: skip
IMPLEMENTATIONS = ("eager", "coterie")
STUBS = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
TESTED = """
import copy
import os
import sys
import unittest

sys.path.insert(0, {tests!r})
import torch
from tiny_models import COMMON, FAMILIES
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

import coterie.moe.layer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from .test_modeling_common import ModelTesterMixin, ids_tensor

ours, calls = ALL_EXPERTS_FUNCTIONS["coterie"], []
ALL_EXPERTS_FUNCTIONS.register("coterie", lambda *given, **named: calls.append(1) or ours(*given, **named))
before = PreTrainedModel.get_correct_experts_implementation
name = os.environ["IMPLEMENTATION"]
PreTrainedModel.get_correct_experts_implementation = lambda self, asked: before(self, name if asked is None else asked)


class Tester:
    batch_size, seq_length, is_training = 2, 7, True

    def __init__(self, family):
        self.settings = {{**COMMON, **FAMILIES[family]}}
        self.family = family
        self.hidden_size, self.num_hidden_layers = self.settings["hidden_size"], self.settings["num_hidden_layers"]
        self.num_attention_heads, self.vocab_size = self.settings["num_attention_heads"], self.settings["vocab_size"]

    def get_config(self):
        return AutoConfig.for_model(self.family, **copy.deepcopy(self.settings))

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {{"input_ids": ids, "attention_mask": torch.ones_like(ids)}}


class Common(ModelTesterMixin):
    test_resize_embeddings = False
    pipeline_model_mapping = {{}}

    def setUp(self):
        self.model_tester = Tester(self.family)
        calls.clear()

    def tearDown(self):
        with open("reached.txt", "a") as file:
            file.write("%s.%s %d\\n" % (type(self).__name__, self._testMethodName, len(calls)))

    def _is_moe(self):
        return True


for family in {families!r}:
    config = type(Tester(family).get_config())
    classes = tuple(mapping[config] for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING))
    title = "Test_" + family
    globals()[title] = type(title, (Common, unittest.TestCase), {{"family": family, "all_model_classes": classes}})
del family, title
"""


def outcomes(tests: Path, families: list[str], implementation: str) -> tuple[dict[str, str], dict[str, int]]:
    """By test: `passed`, `skipped`, or the first line of what went wrong; and how often our experts were called."""
    with tempfile.TemporaryDirectory(prefix="coterie-transformers-") as name:
        package = Path(name) / "common"
        package.mkdir()
        for file in tests.glob("*.py"):
            (package / file.name).symlink_to(file.resolve())
        for path, mixin in STUBS.items():
            if (tests / path).exists():
                continue
            (package / path).parent.mkdir()
            (package / path).parent.joinpath("__init__.py").touch()
            (package / path).write_text(f"class {mixin}:\n    pass\n")
        (package / "__init__.py").touch()
        (package / "test_families.py").write_text(TESTED.format(tests=str(ROOT / "tests"), families=families))
        environment = {**os.environ, "IMPLEMENTATION": implementation, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--junitxml=r.xml",
            "common/test_families.py",
        ]
        subprocess.run(command, cwd=name, env=environment, stdout=sys.stderr, check=False)
        found = ElementTree.parse(Path(name) / "r.xml").getroot()
        told = (line.rsplit(" ", 1) for line in (Path(name) / "reached.txt").read_text().splitlines())
        reached = {test: int(count) for test, count in told}
    made = {}
    for case in found.iter("testcase"):
        wrong = [child for child in case if child.tag in ("failure", "error", "skipped")]
        title = f"{case.get('classname', '').rsplit('.', 1)[-1]}.{case.get('name')}"
        if not wrong:
            made[title] = "passed"
        else:
            made[title] = (
                "skipped" if wrong[0].tag == "skipped" else (wrong[0].get("message") or "failed").splitlines()[0][:200]
            )
    return made, reached


def main() -> int:
    """Runs both; prints what passes with eager alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import transformers

    (eager, nothing), (ours, reached) = (outcomes(options.tests, options.families, name) for name in IMPLEMENTATIONS)
    passed = [name for name, outcome in eager.items() if outcome == "passed"]
    worse = {name: ours.get(name, "not run") for name in passed if ours.get(name) != "passed"}
    result = {
        "transformers": transformers.__version__, "families": options.families, "passed_with_eager": len(passed),
        "of_these_passed_with_coterie": len(passed) - len(worse), "worse": worse,
        "of_these_reached_our_experts": sum(bool(reached.get(name)) for name in passed),
        "failed_with_both": {n: o for n, o in eager.items() if o not in ("passed", "skipped")},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    through_us = result["of_these_reached_our_experts"] and not any(nothing.values())
    return 0 if passed and not worse and through_us else 1


if __name__ == "__main__":
    sys.exit(main())
