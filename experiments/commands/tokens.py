"""`spikegate tokens build TEXT FOLDER`: text that outgrows memory as shards for `data=shards`; `tokens check FOLDER`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from experiments.runs.hydra_app import ConfigError
from experiments.runs.lock import exclusive
from experiments.runs.output import add_json_argument, finish

HELP = "text as token shards for data=shards: tokens build TEXT FOLDER, tokens check FOLDER"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("what", choices=("build", "check"), help="build: make shards, or go on; check: read every byte")
    parser.add_argument("text", help="build: a file, a folder or a glob; check: the folder of shards")
    parser.add_argument("folder", type=Path, nargs="?", default=None, help="build: where the shards go")
    parser.add_argument("--tokenizer", choices=("bytes", "bpe"), default="bytes", help="(default: bytes)")
    parser.add_argument("--vocab-size", type=int, default=None, help="bpe: tokens to learn (default: 2048)")
    parser.add_argument("--holdout", type=float, default=0.1, metavar="SHARE", help="documents held out (default: 0.1)")
    parser.add_argument("--shard-mib", type=int, default=128, metavar="MIB", help="text of one shard (default: 128)")
    parser.add_argument(
        "--processes", type=int, default=None, help="that make shards side by side (default: one for each core)"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit codes: 0 done; 1 a shard is damaged; 2 the command, the text or the folder is wrong."""
    from sparse_update.data.records import CorpusError

    try:
        return _check(args) if args.what == "check" else _build(args)
    except (CorpusError, ConfigError, OSError) as error:
        print(f"tokens: {error}", file=sys.stderr)
        return 2


def _build(args: argparse.Namespace) -> int:
    from sparse_update.data.records import CorpusError
    from sparse_update.data.shards.building import Recipe, build

    if args.folder is None:
        raise CorpusError("tokens build takes two: the text, and the folder that the shards go into")
    if args.shard_mib < 1 or (args.processes is not None and args.processes < 1):
        raise CorpusError(f"--shard-mib {args.shard_mib}, --processes {args.processes}: at least 1 each")
    vocabulary = args.vocab_size or (256 if args.tokenizer == "bytes" else 2048)
    recipe = Recipe(args.tokenizer, vocabulary, args.holdout, args.shard_mib * 2**20)
    processes = args.processes or len(os.sched_getaffinity(0))
    with exclusive(args.folder, "tokens build"):
        made = build(args.text, args.folder, recipe, processes, lambda text: print(text, file=sys.stderr, flush=True))
    sides = {side: sum(shard.tokens for shard in made.of(side)) for side in ("train", "val")}
    print(f"{args.folder}: {sides['train']:,} training and {sides['val']:,} held-out tokens in {len(made.shards)} shards")
    print(f"train on it: spikegate train data=shards data.path={args.folder}")
    finish({"folder": str(args.folder), "shards": len(made.shards), "tokens": sides, "sha256": made.sha256}, "tokens")
    return 0


def _check(args: argparse.Namespace) -> int:
    from sparse_update.data.records import CorpusError
    from sparse_update.data.shards.form import read_manifest
    from sparse_update.data.shards.reading import ShardedTokens, opened

    if args.folder is not None:
        raise CorpusError("tokens check takes one folder")
    folder = Path(args.text)
    manifest = read_manifest(folder)
    damaged: dict[str, str] = {}
    for record in manifest.shards:
        try:
            ShardedTokens([opened(folder, record, named=True)]).check()
        except CorpusError as error:
            damaged[record.name] = str(error)
            print(f"tokens: {error}", file=sys.stderr)
    print(f"{folder}: {len(manifest.shards) - len(damaged)} of {len(manifest.shards)} shards are whole")
    finish({"folder": str(folder), "shards": len(manifest.shards), "damaged": damaged}, "tokens")
    return 1 if damaged else 0
