"""The command line. Parsing and error handling only; what the verbs do is in `commands`."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from coterie.launch.distributed import complain, launched_rank
from coterie.launch.output import OutputGoneError, drop_output, watched_output
from coterie.launch.planning import check_launch
from coterie.placement.baselines import BASELINES
from coterie.placement.exports import EXPORTS
from coterie.placement.plan import OBJECTIVES, STRATEGIES
from coterie.routing.errors import DEFECT, CoterieError, InputError, first_line, missing_package, not_installed

DONE, FAILED, WRONG_INPUT = 0, 1, 2
NO_WAY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
MODEL_HELP = "a transformers checkpoint folder, a Hugging Face hub id, or coterie-tiny, the model inside"
TOPOLOGY_HELP = "NODESxRANKS_PER_NODE (2x4: two nodes of four), a preset's name, or a JSON file"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 wrong input or arguments."""
    arguments = _without_launcher(list(sys.argv[1:] if argv is None else argv))
    debug = "--debug" in arguments
    try:
        options = build_parser().parse_args(arguments)
        check_launch(options.verb)
        command = getattr(importlib.import_module(f"coterie.launch.{options.module}"), options.function)
        with watched_output():
            with _result_alone() if options.json else nullcontext():
                result = command(options)
            if options.json and result is not None and launched_rank() == 0:
                print(json.dumps(result))
            sys.stdout.flush()  # at exit Python would end with a code of its own where this fails
        return DONE
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        partial = getattr(error, "partial", None)
        if partial is not None and "--json" in arguments and launched_rank() == 0:  # what was found before is not lost
            print(json.dumps(partial), flush=True)
        return _told(error)


def _told(error: BaseException) -> int:
    """Says in a line what went wrong; returns the exit code."""
    if isinstance(error, CoterieError):
        complain(str(error), known_to_all=not error.alone)
        return WRONG_INPUT if isinstance(error, InputError) else FAILED
    if isinstance(error, KeyboardInterrupt):
        complain(str(error) or "interrupted; no output was written")
    elif isinstance(error, OutputGoneError):
        drop_output()
        if error.errno != errno.EPIPE:  # which `| head` is allowed
            complain(f"standard output: cannot be written: {error.strerror}")
    elif isinstance(error, OSError) and error.errno in NO_WAY and error.filename is not None:
        complain(f"{error.filename}: cannot be used: {error.strerror}")
        return WRONG_INPUT
    elif isinstance(error, MemoryError):
        complain(f"out of memory ({first_line(error, 200) or 'no more is said'}): give less to do at once, or more memory")
    elif package := missing_package(error):
        complain(not_installed(package))
    else:
        complain(f"{type(error).__name__}: {first_line(error, 300)}\n{DEFECT}")
    return FAILED


@contextmanager
def _result_alone() -> Iterator[None]:
    """What is written to standard output inside goes to standard error, also by what is not Python, such as NCCL."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _without_launcher(arguments: list[str]) -> list[str]:
    """deepspeed puts --local_rank=N before the verb; the environment says the same."""
    while arguments and arguments[0].replace("-", "_").startswith("__local_rank"):
        arguments = arguments[1:] if "=" in arguments[0] else arguments[2:]
    return arguments


class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line like every other of this program, and no other names for options than their own."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **more})

    def error(self, message: str) -> Any:
        """Raise instead of printing the usage."""
        raise InputError(f"{message} ({self.prog} --help tells what is expected)")


def build_parser() -> Parser:
    """The parser of all verbs."""
    parser = Parser("coterie", description="Mixture-of-Experts inference that knows which experts keep company.")
    parser.add_argument("--version", action="version", version=f"coterie {_version()}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for add in (_demo, _trace, _import, _plan, _evaluate, _show, _export, _generate, _pack, _cache_sim, _bench, _doctor):
        add(verbs)
    return parser


def _version() -> str:
    from coterie import __version__

    return __version__


def _verb(verbs: Any, name: str, module: str, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=help_text, description=help_text[0].upper() + help_text[1:] + "."
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output, all else on standard error"
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    parser.set_defaults(module=module, function=name.replace("-", "_"))
    return parser


def _demo(verbs: Any) -> None:
    p = _verb(verbs, "demo", "demo", "the whole tour on the model inside, in one to two minutes")
    p.add_argument("--out", type=Path, default=Path("coterie-demo"), help="folder for its files (default: %(default)s)")
    p.add_argument("--ranks", type=int, default=4, help="processes to run on (default: %(default)s)")


def _trace(verbs: Any) -> None:
    p = _verb(verbs, "trace", "tracing", "run a model and record its routing, on one process or as many as generate runs on")
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="text, one prompt a line, or JSONL")
    p.add_argument("--out", type=Path, required=True, metavar="T", help="the trace file to write")
    p.add_argument("--max-tokens", type=int, metavar="N", help="stop after recording N tokens")
    p.add_argument(
        "--max-new-tokens",
        type=int,
        default=0,
        metavar="N",
        help="also generate N tokens a prompt, greedily (default: 0)",
    )
    p.add_argument("--phase", choices=("prefill", "decode", "mixed"), help="what to record (default: whatever is run)")
    p.add_argument("--scenario", default="", help="a name for the traffic, kept in the trace")
    p.add_argument(
        "--token-ids",
        action="store_true",
        help="store token ids, too, from which cache-sim predicts: the trace then holds the text",
    )
    _running(p)
    p.set_defaults(plan=None, replan=None, prior=None, eviction=None, misses="fetch", dry_run=False)  # as generate without them


def _import(verbs: Any) -> None:
    p = _verb(
        verbs,
        "import",
        "commands",
        "bring in routing that was recorded elsewhere (npz, SGLang .pt dumps, JSON logical_count), or an engine's placement",
    )
    p.add_argument("files", type=Path, nargs="+", metavar="FILE", help="the recording; of SGLang's dumps one of each rank")
    p.add_argument("--out", type=Path, required=True, metavar="T", help="the trace or load-statistics file to write")
    p.add_argument("--model", default="", help="the model's name, kept in the file")
    p.add_argument(
        "--num-experts", type=int, metavar="E", help="experts a layer (default: the file's, or the largest id seen + 1)"
    )
    p.add_argument("--scenario", default="", help="a name for the traffic")
    p.add_argument(
        "--phase", choices=("prefill", "decode", "mixed"), help="of single tokens (default: what the recording says)"
    )
    p.add_argument(
        "--placement",
        metavar="ENGINE",
        help="FILE is the map that sglang, vllm, trtllm or ascend runs with, or an SGLang dump: write it as a plan",
    )
    p.add_argument("--like", type=Path, metavar="T", help="with --placement: routing of the model, which says its layers")
    p.add_argument("--topology", metavar="TOPOLOGY", help=f"with --placement: {TOPOLOGY_HELP}")
    p.set_defaults(function="import_")


def _plan(verbs: Any) -> None:
    p = _verb(verbs, "plan", "planning", "place the experts of a traced model on ranks")
    p.add_argument("traces", type=Path, nargs="+", metavar="T", help="trace or load-statistics files; several are scenarios")
    p.add_argument("--topology", required=True, metavar="TOPOLOGY", help=TOPOLOGY_HELP)
    p.add_argument("--out", type=Path, required=True, metavar="P", help="the plan file to write")
    add = _adder(p)
    told = f"how tokens will be dispatched: {', '.join(STRATEGIES)} (default: %(default)s)"
    add("--strategy", "S", told, default="all_to_all")
    add("--objective", "O", f"{', '.join(OBJECTIVES)} (default: what the strategy pays for)")
    add("--method", "M", f"auto, {', '.join((*BASELINES, 'exflow', 'moetuner'))} (default: %(default)s)", default="auto")
    add("--robust", "R", "of several scenarios, minimise the worst or the mean (default: %(default)s)", default="mean")
    add("--max-load", "X", "busiest rank over mean, in every layer (default: docs/planning.md)", type=float)
    add("--slots-per-rank", "N", "expert slots of a rank in a layer (default: experts/ranks); more are for copies", type=int)
    add("--time-limit", "S", "seconds to search and to prove (default: %(default)g)", type=float, default=60.0)
    add(
        "--iterations",
        "N",
        "of the search, instead of as many as fit: a repeat with the same --seed and --workers then finds the same placement",
        type=int,
    )
    add("--workers", "N", "processes that search and prove (default: one per core, at most 8; under mpirun 1)", type=int)
    add("--max-moves", "N", "with --from: how many experts may move", type=int)
    p.add_argument("--from", dest="previous", type=Path, metavar="OLD", help="re-plan: the best plan within --max-moves of OLD")
    p.add_argument("--homes", action="store_true", help="also plan which sequences are at home on which rank")
    p.add_argument("--exact", action="store_true", help="minimise the evaluated number itself, these traces' homes included")
    p.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def _adder(parser: argparse.ArgumentParser) -> Callable[..., None]:
    def add(name: str, metavar: str, help_text: str, **settings: Any) -> None:
        parser.add_argument(name, metavar=metavar, help=help_text, **settings)

    return add


def _evaluate(verbs: Any) -> None:
    p = _verb(verbs, "evaluate", "commands", "what a plan does to traces, beside the plans that need no planning")
    p.add_argument("plan", type=Path, metavar="P", help="a plan file")
    p.add_argument("traces", type=Path, nargs="+", metavar="T", help="trace or load-statistics files")


def _show(verbs: Any) -> None:
    p = _verb(verbs, "show", "commands", "a page of pictures: affinity, load, links, the plan")
    p.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="T|P",
        help="a trace, a plan, or both (the plan is drawn on the trace); or a timeline",
    )
    p.add_argument("--out", type=Path, required=True, metavar="HTML", help="the page to write")


def _export(verbs: Any) -> None:
    p = _verb(verbs, "export", "exporting", "a plan in another engine's format, checked by reading it back")
    p.add_argument("plan", type=Path, metavar="P", help="a plan file")
    p.add_argument(
        "--to", required=True, choices=tuple(EXPORTS), help="the engine (docs/formats.md tells how it takes the file)"
    )
    p.add_argument("--out", type=Path, required=True, metavar="F", help="the file to write")
    p.add_argument(
        "--num-layers", type=int, metavar="N", help="decoder layers of the model, for sglang (default: up to the plan's last)"
    )


def _generate(verbs: Any) -> None:
    p = _verb(verbs, "generate", "generating", "continue prompts, on one process or under torchrun, deepspeed, mpirun or srun")
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    given = p.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="one prompt; its text is streamed")
    given.add_argument("--prompts", type=Path, metavar="FILE", help="text, one prompt a line, or JSONL")
    p.add_argument("--plan", type=Path, metavar="P", help="where the experts live (default: in order over the processes)")
    p.add_argument(
        "--strategy",
        metavar="S",
        help="how tokens get to their experts (default: the fastest by prediction; docs/running.md)",
    )
    p.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    p.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)")
    p.add_argument("--top-k", type=int, metavar="N", help="sample among the N likeliest tokens only")
    p.add_argument("--top-p", type=float, metavar="X", help="sample among the likeliest tokens that hold this probability")
    p.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    p.add_argument(
        "--out",
        type=Path,
        metavar="F.jsonl",
        help="write the outputs there, one JSON object a line, in the order of the prompts",
    )
    p.add_argument(
        "--resume", action="store_true", help="continue what a stopped run with the same --out left, or begin; on any processes"
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="print the memory that each rank of the plan needs and stop; one process is enough",
    )
    p.add_argument(
        "--misses",
        default="fetch",
        metavar="HOW",
        help="on a GPU: fetch, or compute on the host's cpu, which rounds differently; auto",
    )
    p.add_argument(
        "--prior", type=Path, metavar="TRACE", help="recorded routing of the model, for what is read from disk and when"
    )
    p.add_argument(
        "--eviction",
        metavar="E",
        help="which experts give way where not all fit: lru or another of cache-sim's (default: coterie)",
    )
    p.add_argument(
        "--batch-invariant", action="store_true", help="text that does not depend on the batch or the rank, to the last bit"
    )
    p.add_argument("--replan", metavar="R", help="while generating: auto follows the load; or a plan to take over")
    p.add_argument("--trace-events", type=Path, metavar="F", help="write a timeline of all ranks, for chrome://tracing")
    _running(p)


def _running(p: argparse.ArgumentParser) -> None:
    """What every verb that runs a model takes."""
    p.add_argument(
        "--dtype",
        default="auto",
        help="float32, bfloat16, float16, or auto: float32 on a CPU, else the checkpoint's own",
    )
    p.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="prompts at once on each process (default: %(default)s)"
    )
    p.add_argument(
        "--chat", action="store_true", help="prompts are what a user says: put the checkpoint's chat template around each"
    )
    p.add_argument(
        "--memory", metavar="SIZE", help="of each process, such as 2GiB: experts that do not fit are read from disk when needed"
    )
    p.add_argument(
        "--host-memory", metavar="SIZE", help="behind a GPU: for experts that were read (default: most of what is free)"
    )
    p.add_argument("--packed", type=Path, metavar="DIR", help="with --memory: read experts from what coterie pack wrote there")
    p.add_argument(
        "--quantise", metavar="FORMAT", help="round the experts to int8, int4 or fp8; fp8 that is published so stays"
    )
    p.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="give up a process that does not answer (default: %(default)g s)",
    )
    p.add_argument(
        "--transport", metavar="T", help="nccl, mpi, tcp or gloo (default: nccl with GPUs, mpi under mpirun, tcp elsewhere)"
    )


def _pack(verbs: Any) -> None:
    p = _verb(verbs, "pack", "packing", "copy the experts of a model so that each is read in one go, with checksums")
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write, or to go on with after a stop")
    p.add_argument("--verify", action="store_true", help="write nothing: read what is in DIR and check all of it")
    p.add_argument("--quantise", metavar="FORMAT", help="round them to int8, int4 or fp8, for generate with the same option")


def _cache_sim(verbs: Any) -> None:
    p = _verb(verbs, "cache-sim", "cache_sim", "eviction policies and predictors on a trace, beside Belady's optimum")
    p.add_argument("trace", type=Path, metavar="T", help="a trace file, played in its order, one token at a time")
    p.add_argument(
        "--slots", type=float, default=0.125, metavar="F", help="share of all experts that fit (default: %(default)s)"
    )
    p.add_argument("--max-tokens", type=int, metavar="N", help="the first N tokens alone")
    p.add_argument("--prior", type=Path, metavar="TRACE", help="a trace of the same model that `transition` knows beforehand")


def _bench(verbs: Any) -> None:
    p = _verb(verbs, "bench", "bench", "this program beside its peers, one table and one JSON object")
    p.add_argument(
        "what",
        metavar="WHAT",
        help="plan, kernels (GPU), experts (CPU), offload, cluster (shaped links; root)",
    )
    p.add_argument("--quick", action="store_true", help="a part of the cases, in about three minutes")
    p.add_argument(
        "--traces",
        type=Path,
        metavar="DIR",
        help="recorded traces (default: ../shared/traces; missing ones are not measured)",
    )
    p.add_argument("--only", default="", metavar="NAME", help="plan, cluster: cases whose name contains NAME; kernels: models")
    p.add_argument("--tune", type=Path, metavar="F", help="kernels: make a table of the fastest tiles on this GPU")
    p.add_argument("--peers", type=Path, metavar="DIR", help="kernels: wheels of vllm and sglang, to be timed beside ours")
    p.add_argument("--compile", type=Path, metavar="F", help="kernels: compile for three generations of GPUs, and look inside")


def _doctor(verbs: Any) -> None:
    _verb(verbs, "doctor", "doctor", "what this machine has, what will be used, what is missing and how to get it")
