"""`spikegate tokens build TEXT FOLDER`: text that outgrows memory as shards for `data=shards`; `tokens check FOLDER`.

`tokens packages DEBS FOLDER`: the text of a fixed list of Debian packages, for `data=packages`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from experiments.runs.hydra_app import ConfigError
from experiments.runs.lock import exclusive
from experiments.runs.output import add_json_argument, finish

HELP = "text as token shards: tokens build TEXT FOLDER, tokens check FOLDER; text of packages: tokens packages DEBS FOLDER"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "what", choices=("build", "check", "packages"),
        help="build: make shards, or go on; check: read every byte; packages: unpack the listed Debian packages",
    )  # fmt: skip
    parser.add_argument("text", help="build: a file, a folder or a glob; check: the folder of shards; packages: .deb files")
    parser.add_argument("folder", type=Path, nargs="?", default=None, help="build, packages: where it goes")
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
        return {"build": _build, "check": _check, "packages": _packages}[args.what](args)
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


def _packages(args: argparse.Namespace) -> int:
    from sparse_update.data.packages.building import build
    from sparse_update.data.packages.listing import fetch, read_listing
    from sparse_update.data.records import CorpusError

    if args.folder is None:
        raise CorpusError(
            "tokens packages takes two: the folder of the .deb files, which may be empty, and where the text goes"
        )
    listing, debs = read_listing(), Path(args.text)
    with exclusive(args.folder, "tokens packages"):
        brought = fetch(listing, debs)
        made = build(listing, debs, args.folder)
    for side, kinds in made["bytes"].items():
        parts = ", ".join(f"{kind} {size:,}" for kind, size in sorted(kinds.items(), key=lambda part: -part[1]))
        print(f"{side}: {sum(kinds.values()):,} bytes ({parts})")
    whole = sum(made["bytes"]["training"].values())
    for name, seconds in made["filter_cpu_s"].items():
        print(f"keep={name}: {made['filter_bytes'][name] / whole:.3f} of the training text, {seconds:.1f} s of CPU")
    print(f"train on it: spikegate train data=packages data.path={args.folder}")
    shown = {key: value for key, value in made.items() if key not in ("training", "judged", "near_copies")}
    finish({"folder": str(args.folder), "brought": brought, "near_copies": len(made["near_copies"]), **shown}, "tokens")
    return 0
