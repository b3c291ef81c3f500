# SPDX-License-Identifier: Apache-2.0
"""The table of commands: what each is for, its options, and where the function is that does it.

To add one, add a line. The function is loaded when the command is called; nothing here may import JAX.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from typing import NamedTuple

EXIT_CODES = """\
exit codes: 0 done; 1 a threshold was missed, or the result is negative; 2 the command is wrong;
            3 the program failed; 130 interrupted (143 by SIGTERM)"""


class Command(NamedTuple):
    """One command; `run` is where the function `args -> exit code` is, as "module:function"."""

    summary: str
    options: Callable[[ArgumentParser], None]
    run: str


def of_program(parser: ArgumentParser) -> None:
    parser.add_argument(
        "program", nargs="?", metavar="PROGRAM.py:NAME", help="a function from settings to an Experiment"
    )
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="change a setting; repeatable"
    )


def of_evaluation(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--require", action="append", default=[], metavar="METRIC=VALUE", help="a threshold; missed, the exit code is 1"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")


def of_train(parser: ArgumentParser) -> None:
    of_program(parser)
    of_evaluation(parser)
    parser.add_argument("--folder", help="where the run lives; a second run goes on from there")
    parser.add_argument("--fast-dev-run", action="store_true", help="three steps: does the program run at all?")
    parser.add_argument(
        "--overfit-batches", type=int, default=0, metavar="N", help="only so many batches, over and over"
    )


def of_evaluate(parser: ArgumentParser) -> None:
    of_program(parser)
    of_evaluation(parser)
    parser.add_argument("--from", dest="checkpoint", metavar="CHECKPOINT", help="a checkpoint, or the folder of a run")


def of_key(parser: ArgumentParser) -> None:
    parser.add_argument("--key-file", metavar="FILE", help="the key that bundles are signed with, as bytes of a file")


def of_export(parser: ArgumentParser) -> None:
    of_program(parser)
    of_key(parser)
    parser.add_argument("--out", metavar="BUNDLE", help="the folder to write")
    parser.add_argument("--from", dest="checkpoint", metavar="CHECKPOINT", help="a checkpoint, or the folder of a run")


def of_verify(parser: ArgumentParser) -> None:
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="the folder that export wrote")
    parser.add_argument("--allow-unsigned", action="store_true", help="with a key, take unsigned bundles too")
    of_key(parser)


def of_reexport(parser: ArgumentParser) -> None:
    of_verify(parser)
    parser.add_argument("--out", metavar="BUNDLE", help="the folder to write")
    parser.add_argument(
        "--builder", metavar="MODULE:FUNCTION", help="what makes the model, if not what a signature names"
    )


def of_compare(parser: ArgumentParser) -> None:
    of_program(parser)
    parser.add_argument("before", nargs="?", metavar="BEFORE", help="a checkpoint, or the folder of a run")
    parser.add_argument("after", nargs="?", metavar="AFTER", help="another one")
    parser.add_argument("--json", metavar="FILE", help="write the changes to this file")


def of_models(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions")
    actions.add_parser("list", help="published configurations")
    show = actions.add_parser("show", help="a configuration with its parameters and their names, or a file's tensors")
    show.add_argument("name", metavar="NAME", help="of a configuration; or a file, or a folder")
    convert = actions.add_parser("convert", help="safetensors, PyTorch or GGUF into a folder of safetensors")
    convert.add_argument("source", metavar="IN", help="a file, or a folder with config.json")
    convert.add_argument("target", metavar="OUT", help="a new folder")
    convert.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the values; theirs if left out"
    )
    convert.add_argument("--shard-bytes", type=int, default=5_000_000_000, metavar="N", help="the most of one file")
    verify = actions.add_parser("verify", help="are the files whole and finite; do two models compute the same")
    verify.add_argument("path", metavar="PATH", help="a folder with config.json, or a GGUF file")
    verify.add_argument("--against", metavar="PATH", help="compare each layer with that of this one")
    verify.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="as a part of the largest number")
    generate = actions.add_parser("generate", help="goes on with a text")
    generate.add_argument("path", metavar="PATH", help="a folder with config.json and tokenizer.json, or a GGUF file")
    generate.add_argument("prompt", metavar="TEXT")
    generate.add_argument("--tokens", type=int, default=64, metavar="N", help="how many at most")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest only")
    generate.add_argument("--seed", type=int, default=0, metavar="N")


def of_serve(parser: ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="[NAME=]PATH", help="bundles; folders or GGUF files of decoders")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="(8000)")
    of_key(parser)
    parser.add_argument("--allow-unsigned", action="store_true", help="serve bundles that nobody signed")
    parser.add_argument("--api-keys", metavar="FILE", help="a key on each line; clients show one")
    parser.add_argument("--buckets", action="append", default=[], metavar="SIZE=N,N", help="such as batch=1,8,32")
    parser.add_argument("--engine", default="thread", choices=("thread", "process"),
                        help="process: of its own for each bundle, started again when it dies (thread)")  # fmt: skip
    parser.add_argument("--executables", metavar="FOLDER", help="keep compiled programs here for the next start")
    parser.add_argument("--waiting", type=int, default=256, metavar="ROWS", help="the most rows that wait (256)")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="that an answer may take (30)")
    parser.add_argument("--grace", type=float, default=30.0, metavar="S", help="for begun answers at the end (30)")
    parser.add_argument("--most-bytes", type=int, default=16 << 20, metavar="N", help="of a request (16 MiB)")
    parser.add_argument("--admin", action="store_true", help="let whoever has a key reload models")
    parser.add_argument("--record", metavar="FOLDER", help="keep a part of the requests and answers here")
    parser.add_argument("--share", type=float, default=0.01, metavar="X", help="the part that is kept (0.01)")
    parser.add_argument("--reference", metavar="FILE", help="measure drift against this file")
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="answers at a time of a decoder (8)")
    parser.add_argument("--length", type=int, default=1024, metavar="N", help="of a prompt with its answer (1024)")
    parser.add_argument("--log", default="info", choices=("debug", "info", "warning", "error"), help="(info)")


def of_replay(parser: ArgumentParser) -> None:
    parser.add_argument("samples", nargs="?", metavar="SAMPLES", help="the folder that serve --record wrote")
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="the model to try them on")
    parser.add_argument("--tolerance", type=float, default=1e-5, metavar="X", help="of an output's numbers (1e-5)")
    parser.add_argument("--show", type=int, default=20, metavar="N", help="the most differences shown (20)")
    parser.add_argument("--allow-unsigned", action="store_true", help="with a key, take unsigned bundles too")
    of_key(parser)


COMMANDS = {
    "train": Command("train a model, evaluate it, check thresholds", of_train, "batiste.cli.train:run"),
    "evaluate": Command("measure a model on held-out data, check thresholds", of_evaluate, "batiste.cli.evaluate:run"),
    "compare": Command("what got better and worse between two checkpoints", of_compare, "batiste.cli.compare:run"),
    "export": Command("write the model as a bundle that runs without its code", of_export, "batiste.cli.export:export"),
    "verify": Command("check a bundle: digests, signature, golden outputs", of_verify, "batiste.cli.export:verify"),
    "reexport": Command("write a bundle anew for this JAX", of_reexport, "batiste.cli.export:reexport"),
    "serve": Command("answer requests over HTTP until a signal", of_serve, "batiste.cli.serve:run"),
    "replay": Command("recorded requests against another model: what differs", of_replay, "batiste.cli.serve:replay"),
    "inspect": Command("tables of a model: parts, parameters, places, dtypes", of_program, "batiste.cli.inspect:run"),
    "models": Command("published architectures and files of weights", of_models, "batiste.cli.models:run"),
}
