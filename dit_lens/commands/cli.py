"""The command line: dit-lens COMMAND, which main lists.

demo, findings, training, study, merge, board, atlas, info, doctor, run, serve, train-toy.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_lens.arguments.paths import expand_user
from dit_lens.errors import DitLensError, OpError
from dit_lens.toys.kinds import KINDS

if TYPE_CHECKING:
    from dit_lens.lens import DiTLens


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; a mistake of the user is one line on standard error and exit code 2."""
    # Waiting threads must not spin: beside another busy program torch would take ten times as long, or more.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.command(options)
    except DitLensError as problem:
        print(f"dit-lens: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"dit-lens: {stop or 'interrupted.'}", file=sys.stderr)
        return 130


def _path(text: str) -> Path:
    return Path(expand_user(text))  # a shell leaves the ~ of --out=~/page alone


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dit-lens", description="Look inside Diffusion Transformers.")
    parser.add_argument("--version", action="version", version=f"dit-lens {version('dit-lens')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_pages(commands)
    _add_work(commands)
    return parser


def _add_pages(commands: Any) -> None:
    """The commands that write a page."""
    demo = commands.add_parser("demo", help="find the massive channels of the toy, run the three studies, write a page")
    demo.add_argument("--out", type=_path, default=Path("dit-lens-demo"), help="folder for index.html, images and data")
    demo.add_argument("--prompt", help="the scene to draw and to edit")
    demo.add_argument("--source", help="the scene whose channels are moved into it")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("-k", type=int, default=None, help="how many channels count as massive")
    demo.set_defaults(command=_demo)

    found = commands.add_parser("findings", help="run every study on toys, and write pages of what they found")
    found.add_argument(
        "--out", type=_path, default=Path("dit-lens-findings"), help="folder for index.md and a folder for each toy"
    )
    found.add_argument("--cells", type=_path, help="folder for finished cells, from which the command goes on")
    found.add_argument("--toys", nargs="+", metavar="TOY", default=["flux"], help="such as flux, flux-seed1, sana")
    found.add_argument("--prompts", type=int, default=None, help="held-out prompts")
    found.add_argument("--seeds", type=int, default=None, help="seeds of each prompt")
    found.add_argument("--draws", type=int, default=None, help="draws of the random controls")
    found.add_argument("--plan", action="store_true", help="only say how many images and hours it would take")
    found.set_defaults(command=_findings)

    grown = commands.add_parser("training", help="follow massive channels through trainings, and write a page of it")
    grown.add_argument("folders", nargs="+", type=_path, metavar="DIR", help="what train-toy --keep-every wrote")
    grown.add_argument("--out", type=_path, default=Path("dit-lens-training"), help="folder for index.md and the table")
    grown.add_argument("--cells", type=_path, help="folder for finished cells, from which the command goes on")
    grown.add_argument("--prompts", type=int, default=16, help="held-out prompts at every point")
    grown.set_defaults(command=_training)

    _add_study(commands)

    atlas = commands.add_parser("atlas", help="write an explorer of some prompts as one file to share")
    atlas.add_argument("pipeline", help="a folder written by save_pretrained, a repository, or toy:flux")
    atlas.add_argument("--out", type=_path, default=Path("atlas.html"), help="the file")
    atlas.add_argument("--prompts", type=_path, help="a .csv or .jsonl of prompts; a few by default")
    atlas.add_argument("-k", type=int, default=8, help="how many channels of a block count as massive")
    atlas.add_argument("--seed", type=int, default=0)
    atlas.add_argument("--steps", type=int, default=None, help="denoising steps")
    atlas.add_argument("--megabytes", type=float, default=10.0, help="how large the file may become")
    atlas.add_argument("--device", help="cuda, cuda:1, cpu ...; the GPU where there is one")
    atlas.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16 on a GPU, else float32")
    atlas.set_defaults(command=_atlas)


def _add_study(commands: Any) -> None:
    """The commands that compare models by one protocol."""
    study = commands.add_parser(
        "study", help="run a protocol's studies on a pipeline; a page, and result.json to compare"
    )
    study.add_argument("pipeline", help="a folder written by save_pretrained, a repository, or toy:flux")
    study.add_argument(
        "--protocol", default="turri2026", help="what sets every free choice: turri2026, fig3-reproduction"
    )
    study.add_argument("--prompts", type=_path, help="a .csv or .jsonl of prompts; those of the library by default")
    study.add_argument("--masks", help="birefnet, FILE.py with masks(image, prompt), or a folder of PROMPT-ID.png")
    study.add_argument("--judge", help="clip, vqa, or FILE.py with judge(image, prompt)")
    study.add_argument("--device", help="cuda, cuda:1, cpu ...; the GPU where there is one")
    study.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16 on a GPU, else float32")
    study.add_argument("-k", "--k", type=int, default=None, help="how many channels count as massive")
    study.add_argument("--steps", type=int, default=None, help="denoising steps")
    study.add_argument("--call", nargs="+", metavar="NAME=VALUE", default=(), help="other arguments of the pipeline")
    study.add_argument("--seeds", type=int, default=1, help="seeds of each prompt; two decide less than one or three")
    study.add_argument("--draws", type=int, default=None, help="draws of the random controls")
    study.add_argument("--trust-remote-code", action="store_true", help="code that comes with a segmenter may run")
    study.add_argument(
        "--out", type=_path, default=Path("dit-lens-study"), help="folder, from which the command goes on"
    )
    study.add_argument("--plan", action="store_true", help="only say rules, power and cost")
    study.add_argument("--shard", metavar="I/N", help="only part I of N, from 0, of the cells; all can share --out")
    study.add_argument("--workers", type=int, metavar="N", help="let N workers of a Ray cluster make the cells")
    study.add_argument("--ray", metavar="ADDRESS", help="of the Ray cluster, such as auto; one is started by default")
    study.set_defaults(command=_study)

    merged = commands.add_parser("merge", help="put the cells of shards that did not share a folder into one")
    merged.add_argument("folders", nargs="+", type=_path, metavar="DIR", help="what --out or out= was")
    merged.add_argument("--out", type=_path, required=True, help="the folder for all cells")
    merged.set_defaults(command=_merge)

    board = commands.add_parser("board", help="lay the results of dit-lens study side by side, in one table that sorts")
    board.add_argument("folders", nargs="+", type=_path, metavar="DIR", help="folders that dit-lens study wrote")
    board.add_argument(
        "--out", type=_path, default=Path("dit-lens-board"), help="folder for board.html, .csv and .json"
    )
    board.set_defaults(command=_board)


def _add_work(commands: Any) -> None:
    """The commands that look at a pipeline, run it or train one."""
    info = commands.add_parser("info", help="say what a pipeline folder holds: family, sites, checks")
    info.add_argument("pipeline", help="a folder written by save_pretrained, or toy:flux")
    info.set_defaults(command=_info)

    doctor = commands.add_parser("doctor", help="say what works on this machine with this pipeline, within a minute")
    doctor.add_argument("pipeline", help="a folder written by save_pretrained, a repository, or toy:flux")
    doctor.add_argument("--device", help="cuda, cuda:1, cpu ...; the GPU where there is one")
    doctor.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16 on a GPU, else float32")
    doctor.add_argument("--json", action="store_true", help="the findings as JSON")
    doctor.set_defaults(command=_doctor)

    run = commands.add_parser("run", help="draw one prompt under ops from a JSON file, and save the run")
    run.add_argument("pipeline", help="a folder written by save_pretrained, or toy:flux")
    run.add_argument("prompt")
    run.add_argument("--ops", type=_path, help="a JSON list of ops, as in a run's spec")
    run.add_argument("--out", type=_path, required=True, help="a new folder for the run")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--steps", type=int, default=None)
    run.set_defaults(command=_run)

    serve = commands.add_parser("serve", help="serve a pipeline to DiTLens.remote and nnsight on other machines")
    serve.add_argument("pipeline", help="a folder written by save_pretrained, a repository, or toy:flux")
    serve.add_argument("--host", default="127.0.0.1", help="where to listen; by default only this machine reaches it")
    serve.add_argument("--port", type=int, default=8001, help="0 takes one that is free")
    serve.add_argument(
        "--token",
        default=os.environ.get("DIT_LENS_TOKEN"),
        help="who may come in; made and printed by default. Other users of the machine see it among its processes, but "
        "not DIT_LENS_TOKEN in the environment",
    )
    serve.add_argument("--device", help="cuda, cuda:1, cpu ...; the GPU where there is one")
    serve.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16 on a GPU, else float32")
    serve.add_argument("--results", type=_path, help="folder for results, which a later server finds again")
    serve.add_argument("--keep", type=float, default=24.0, help="hours for which results are kept")
    serve.add_argument("--timeout", type=float, default=3600.0, help="seconds that one job may take")
    serve.add_argument("--largest", type=float, default=1024.0, help="MiB that one request may have")
    serve.set_defaults(command=_serve)

    train = commands.add_parser("train-toy", help="train a toy from nothing, or evaluate one")
    train.add_argument("name", choices=KINDS)
    train.add_argument("--out", type=_path, help="folder for checkpoints, samples and the finished pipeline")
    train.add_argument("--device", default="cpu")
    train.add_argument("--iterations", type=int, default=8000, help="of the transformer; the other stages have theirs")
    train.add_argument(
        "--until",
        type=float,
        help="end when this share of images is right in the attribute that is worst, such as 0.95",
    )
    train.add_argument("--keep-every", type=int, default=0, help="keep the transformer after every so many iterations")
    train.add_argument("--batch", type=int, default=16)
    train.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    train.add_argument(
        "--evaluate", action="store_true", help="only measure: the pipeline in --out, or the toy that is installed"
    )
    train.set_defaults(command=_train_toy)


def _demo(options: argparse.Namespace) -> int:
    from dit_lens.commands.demo import demo

    outcome = demo(options.out, prompt=options.prompt, source=options.source, seed=options.seed, k=options.k)
    print(outcome.headline.to_string(index=False, float_format="{:.3g}".format))
    print(f"\n{outcome.page}")
    return 0


def _findings(options: argparse.Namespace) -> int:
    from dit_lens.commands.chapters import Size
    from dit_lens.commands.findings import check_places, findings
    from dit_lens.commands.findings_cost import describe_cost

    given = {name: getattr(options, name) for name in ("prompts", "seeds", "draws")}
    size = Size(**{name: value for name, value in given.items() if value is not None})
    if not options.plan:
        check_places(options.out, options.toys, options.cells)
    print(describe_cost(options.toys, size), flush=True)
    if not options.plan:
        print(findings(options.out, toys=options.toys, size=size, cells=options.cells))
    return 0


def _training(options: argparse.Namespace) -> int:
    from dit_lens.commands.chapters import Size
    from dit_lens.commands.training import training

    print(
        training(
            options.folders, options.out, size=Size(prompts=options.prompts, seeds=1, draws=1), cells=options.cells
        )
    )
    return 0


def _study(options: argparse.Namespace) -> int:
    from dit_lens.commands.study import check_out, make_plan, run_plan
    from dit_lens.commands.study_inputs import StudyOptions, choose_share

    given: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(StudyOptions)}
    given["call"] = tuple(options.call)
    asked = StudyOptions(**given)
    device, dtype = _choose_placement(options)
    # A worker sees its own GPU alone.
    load = partial(_load_on, options.pipeline, device.partition(":")[0], dtype)
    share = choose_share(options.shard, load, options.workers, options.ray)
    if not options.plan:
        check_out(options.out)
    plan = make_plan(_load_on(options.pipeline, device, dtype), options.pipeline, asked)
    print(plan.describe(), flush=True)
    if not options.plan:
        found = run_plan(plan, options.out, share)
        print(f"\n{found}" if isinstance(found, str) else f"\n{found}\n{options.out / 'index.md'}")
    return 0


def _merge(options: argparse.Namespace) -> int:
    from dit_lens.studies import merge

    print("\n".join(merge(options.folders, options.out)))
    return 0


def _board(options: argparse.Namespace) -> int:
    from dit_lens.commands.board import DATA, board
    from dit_lens.core.runs.files import read_json

    page = board(options.folders, options.out)
    for warning in read_json(options.out / DATA, "a board")["warnings"]:
        print(f"dit-lens: {warning}", file=sys.stderr)
    print(page)
    return 0


def _atlas(options: argparse.Namespace) -> int:
    from dit_lens.explorer import atlas
    from dit_lens.studies.shared import prompts

    device, dtype = _choose_placement(options)
    lens = _load(options.pipeline, dtype=dtype).to(device)
    if options.prompts is not None:
        texts = prompts.load(options.prompts).texts
    else:
        texts = (prompts.bundled()[:4] if lens.vocabulary is None else prompts.scenes(6, 0, held_out=True)).texts
    call = {} if options.steps is None else {"num_inference_steps": options.steps}
    print(atlas(lens, options.out, texts, k=options.k, seed=options.seed, megabytes=options.megabytes, **call))
    return 0


def _info(options: argparse.Namespace) -> int:
    lens = _load(options.pipeline)
    print(lens)
    print("\n".join(f"  {check.name:<10}{check.says}" for check in lens.checks))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    """Exit code 1 where something does not work."""
    from dit_lens.commands.doctor import examine

    device, dtype = _choose_placement(options)
    diagnosis = examine(_load(options.pipeline, dtype=dtype), device=device)
    print(json.dumps(diagnosis.to_json(), indent=1) if options.json else diagnosis)
    return 0 if diagnosis.ok else 1


def _run(options: argparse.Namespace) -> int:
    from dit_lens.core.request.ops import from_json
    from dit_lens.core.runs.files import check_folder, read_json

    check_folder(options.out, "run.json", overwrite=False)
    listed = read_json(options.ops, "a list of ops") if options.ops else []
    if not isinstance(listed, list):
        raise OpError(f"{options.ops} must hold a JSON list of ops, not a {type(listed).__name__}.")
    ops = [from_json(op) for op in listed]
    run = _load(options.pipeline).run(options.prompt, ops, seed=options.seed, num_inference_steps=options.steps)
    print(run.receipt)
    print(run.save(options.out))
    return 0


def _serve(options: argparse.Namespace) -> int:
    from dit_lens.server.serve import ServeOptions, prepare, serve

    prepare()
    names = ("host", "port", "token", "results", "keep", "timeout", "largest")
    device, dtype = _choose_placement(options)
    asked = ServeOptions(device=device, dtype=dtype, **{name: getattr(options, name) for name in names})
    serve(options.pipeline, asked, lambda line: print(line, flush=True))
    return 0


def _train_toy(options: argparse.Namespace) -> int:
    from dit_lens.commands.evaluate_toy import CARD, evaluate, report, write_card
    from dit_lens.core.runs.files import check_place
    from dit_lens.errors import StoreError
    from dit_lens.toys import path

    if not options.evaluate:
        from dit_lens.toys.train import Settings, train

        if options.out is None:
            raise StoreError("training needs a folder for its checkpoints. Pass --out DIR.")
        settings = Settings(
            seed=options.seed,
            iterations=options.iterations,
            until=options.until,
            keep_every=options.keep_every,
            device=options.device,
            batch=options.batch,
            rate=options.rate,
            toy=options.name,
        )
        train(options.out, settings, resume=options.resume)
    folder = path(options.name) if options.out is None else options.out / "pipeline"
    if options.out is not None:
        check_place(folder / CARD)
    quality = evaluate(folder)
    if options.out is not None:
        write_card(folder, quality)
    print(report(quality))
    return 0


def _choose_placement(options: argparse.Namespace) -> tuple[str, Any]:
    """The device and precision that were asked for, or the defaults of this machine."""
    import torch

    from dit_lens.commands.doctor import default_device
    from dit_lens.core.request.values import check_device

    device = default_device() if options.device is None else check_device(options.device)
    return device, getattr(torch, options.dtype or ("float32" if device == "cpu" else "bfloat16"))


def _load_on(pipeline: str, device: str, dtype: Any) -> DiTLens:
    return _load(pipeline, dtype=dtype).to(device)


def _load(pipeline: str, **options: Any) -> DiTLens:
    from dit_lens.lens import DiTLens

    if pipeline.startswith("toy:"):
        return DiTLens.toy(pipeline.removeprefix("toy:"), **options)
    return DiTLens.from_pretrained(pipeline, **options)


if __name__ == "__main__":
    sys.exit(main())
