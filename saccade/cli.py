"""The command. It parses words and prints results; everything else is in the library."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from saccade.cli_texts import OF_TEXTS, add_search, add_texts, predict_texts, said_of
from saccade.config import Config, RunConfig, TextConfig, build_config, closest, field_paths
from saccade.errors import UserError
from saccade.flags import ALIASES, add_alias, add_field, natural, nearest_flag, positive, read_changes, share
from saccade.words import counted

SMALLER = "--batch-size or --image-size, of texts --text.batch-tokens"
EPILOG = "`saccade COMMAND --help` shows the flags of a command. First look: `saccade demo`."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 (a fault was found), 2 (an error), 128 + signal (stopped)."""
    try:
        code = dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except UserError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return fail(f"out of memory; use a smaller {SMALLER}")
    except OSError as error:
        return fail(f"{error.filename or 'system'}: {error.strerror or error}")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return fail(f"out of memory on the device; use a smaller {SMALLER}")


def fail(message: str) -> int:
    print(f"saccade: error: {message}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as ours."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}\n({self.prog} --help shows what there is)")


def dispatch(arguments: list[str]) -> int:
    parser = Parser(
        "saccade", description="Transformers that learn from your pictures, and from your texts.", epilog=EPILOG
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    runners: dict[str, Callable[[argparse.Namespace], int]] = {}
    for name, add, runner in COMMANDS:
        help_text = (runner.__doc__ or "").strip()
        sub = commands.add_parser(
            name,
            help=help_text.splitlines()[0],
            description=help_text,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add(sub)
        runners[name] = runner
    known = list(runners)
    word = next((argument for argument in arguments if not argument.startswith("-")), None)
    if word is not None and word not in known and arguments[0] == word:
        raise UserError(f"unknown command {word!r}{closest(word, known)}\n(commands: {', '.join(known)})")
    options, extra = parser.parse_known_args(arguments)
    if options.version:
        from saccade import __version__

        print(f"saccade {__version__}")
        return 0
    if options.command is None:
        parser.print_help()
        return 0
    options.unknown = [word for word in extra if word.startswith("-")] or extra
    options.flags = [flag for action in commands.choices[options.command]._actions for flag in action.option_strings]
    if options.command != "train":
        refuse_unknown(options, [])
    return runners[options.command](options)


def refuse_unknown(options: argparse.Namespace, further: list[str]) -> None:
    """One error for all unknown flags and whatever else is wrong."""
    lines = []
    for word in options.unknown:
        flag = word.split("=")[0]
        near = nearest_flag(flag.replace("_", "-"), options.flags)
        lines.append(f"unknown {'flag' if flag.startswith('-') else 'argument'} {flag}{near}")
    lines += further
    if lines:
        raise UserError(f"{listed(lines)}\n(saccade {options.command} --help shows what there is)")


def listed(faults: Sequence[str]) -> str:
    return faults[0] if len(faults) == 1 else f"{len(faults)} faults:" + "".join(f"\n  {fault}" for fault in faults)


def as_flag(fault: str) -> str:
    """What is wrong with a setting, under the name that the command has for it."""
    place, colon, what = fault.partition(": ")
    name = re.sub(r"\.\d+$", "", place)  # without the place in a list
    return f"--{name.replace('_', '-')}: {what}" if colon and name in field_paths() else fault


# --- train -----------------------------------------------------------------------------------------------------------

SHORT = (
    "task",
    "recipe",
    "model",
    "weights",
    "epochs",
    "minutes",
    "steps",
    "batch_size",
    "lr",
    "seed",
    "workers",
    "device",
    "out",
)


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", help=RunConfig.model_fields["data"].description)
    main_group = parser.add_argument_group("what is asked most")
    main_group.add_argument("--resume", metavar="RUN", help="continue the run in this folder, exactly where it was")
    for name in ALIASES:
        add_alias(main_group, name)
    for name in SHORT:
        add_field(main_group, RunConfig, name, "")
    main_group.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    rest = parser.add_argument_group("the run")
    for name, field in RunConfig.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Config):
            group = parser.add_argument_group(f"{name}: {(inner.__doc__ or '').strip().splitlines()[0]}")
            for inner_name in inner.model_fields:
                add_field(group, inner, inner_name, f"{name}.")
        elif name not in (*SHORT, "data"):
            add_field(rest, RunConfig, name, "")


def run_train(options: argparse.Namespace) -> int:
    """Learn from pictures with labels or with boxes around the things in them, or from texts with their translations.

    saccade train photos/ --minutes 10                   everything else is chosen from the data
    saccade train photos/ --model vit_tiny --epochs 30   from scratch, with a named model
    saccade train photos/ --weights runs/other           fine-tune an earlier run
    saccade train --resume runs/photos                   continue, exactly
    """
    changes = read_changes(options)
    faults: list[str] = []
    if options.data is None and options.resume is None:
        faults.append("no data given: saccade train DATA, or saccade train --resume RUN")
    try:
        build_config({"data": "data", **changes})
    except UserError as error:
        faults += [as_flag(line.strip()) for line in str(error).removeprefix("settings: ").strip().splitlines()]
    refuse_unknown(options, faults)

    from saccade.api import train

    result = train(None, resume=options.resume, settings=changes, show=True)
    if int(os.environ.get("RANK", "0")) == 0:
        facts = {
            "run": str(result.folder),
            "finished": result.finished,
            "steps": result.steps,
            "metrics": result.metrics,
            "left_out": result.unreadable,
            "not_measured": list(result.unmeasured),
        }
        if options.json:
            print(json.dumps(facts))
        elif result.finished:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
            print(f"kept model on the validation split: {figures}")
            for count, done in ((len(result.unreadable), "left out"), (len(result.unmeasured), "not measured on")):
                if count:
                    print(f"{counted(count, 'picture')} could not be read and {'was' if count == 1 else 'were'} {done}")
            shown = '"A TEXT."' if "bleu" in result.metrics else "PICTURE"
            print(f"next: saccade predict {result.folder} {shown} --save out/")
    return 0 if result.finished else 128 + (result.signal or 2)


# --- the others ------------------------------------------------------------------------------------------------------


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run folder, model file, or weights of another library: hub name, folder, file")
    parser.add_argument("data", help="data with its truth: a split's folder, or a data set (then its val or --split)")
    parser.add_argument("--split", help="which split of the data set")
    parser.add_argument(
        "--out", help="new folder for figures and charts; also the pictures with most mistakes, or all translations"
    )
    add_common(parser)
    texts = parser.add_argument_group("texts")
    add_search(texts)
    for name in ("text.source", "text.target"):
        add_field(texts, TextConfig, name.removeprefix("text."), "text.")


def add_common(parser: argparse.ArgumentParser, batch_size: int | None = None) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    usual = "pictures or texts at a time (default: by their size)"
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=batch_size,
        metavar="N",
        help=usual if batch_size is None else f"pictures at a time (default {batch_size})",
    )
    parser.add_argument(
        "--workers", type=natural, default=0, metavar="N", help="processes that read pictures (default 0)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def run_evaluate(options: argparse.Namespace) -> int:
    """Measure a model on data with its truth.

    Of labels: top-1 and top-5, figures per class, confusion, calibration. Of boxes: COCO's average precision, per class
    and size, precision and recall at its threshold, and the kinds of mistakes. Of texts: BLEU and chrF by sacreBLEU,
    loss and speed.
    """
    from pathlib import Path

    from rich.console import Console

    from saccade.api import evaluate, save_report
    from saccade.engine.progress import counter
    from saccade.metrics.folder import refuse_folder

    if options.out is not None:
        refuse_folder(Path(options.out))  # before what takes long
    unreadable: list[str] = []
    notes: list[str] = []
    with counter("evaluating") as progress:
        report = evaluate(
            options.model,
            options.data,
            split=options.split,
            device=options.device,
            batch_size=options.batch_size,
            workers=options.workers,
            progress=progress,
            unreadable=unreadable,
            notes=notes,
            beams=options.beams,
            length_penalty=options.length_penalty,
            languages=tuple(getattr(options, name) for name in ("text.source", "text.target")),
        )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for what in unreadable:
        print(f"left out: {what}", file=sys.stderr)
    files: tuple[str, ...] = ()
    if options.out is not None:  # before it is printed, since a pipe may close
        files = save_report(report, Path(options.out), options.model, options.data, split=options.split)
    if options.json:
        print(json.dumps(report.to_dict()))
    else:
        report.render(Console(highlight=False))
    if files:
        print(f"{', '.join(files)} are in {options.out}", file=sys.stderr)
    return 0


def add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run folder, model file, or weights of another library: hub name, folder, file")
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="pictures and folders of pictures; or texts, for a model of texts"
    )
    parser.add_argument("--save", metavar="DIR", help="save a picture of each prediction, and of why, here")
    parser.add_argument(
        "--threshold",
        type=share,
        metavar="T",
        help="least score of a detection (default: what the model file says; with --coco 0)",
    )
    parser.add_argument(
        "--coco",
        metavar="FILE",
        help="print all detections as COCO results (JSON), by the ids of this annotation file",
    )
    add_common(parser)
    add_texts(parser)


def run_predict(options: argparse.Namespace) -> int:
    """Name what is in pictures, or find it, or translate texts. With --save, draw why.

    saccade predict runs/photos photo.jpg --save out/
    saccade predict runs/cells images/ --threshold 0.3 --json
    saccade predict runs/cells images/ --coco test.json > results.json
    saccade predict runs/multi30k "A dog runs through the snow." --save out/
    saccade predict Helsinki-NLP/opus-mt-en-de --input lines.txt

    --json prints a list with an object for each picture: source, label, score and top; or source, width, height and
    detections, each with label, class, score and box (left, top, right, bottom in pixels); or for each text: source,
    translation, score (its logarithmic probability, divided by length ** penalty) and cut (it did not end by itself).
    """
    from pathlib import Path

    from saccade.engine.predict import list_inputs
    from saccade.engine.progress import counter
    from saccade.engine.translate import TextModel, open_model
    from saccade.predictions import CocoIds
    from saccade.predictions.cards import names_apart

    if not options.inputs and options.input is None:
        raise UserError("nothing given: saccade predict MODEL PICTURE ..., or texts, or a file of them by --input")
    notes: list[str] = []
    model = open_model(options.model, device=options.device, notes=notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if isinstance(model, TextModel):
        return predict_texts(model, options)
    for name in OF_TEXTS:
        if getattr(options, name) not in (None, False):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: is for translating, and {options.model} is a model of pictures")
    if options.coco is not None and model.task.usual_threshold is None:
        raise UserError(f"--coco {options.coco}: is for detections, and {options.model} gives classes")
    ids = None if options.coco is None else CocoIds.read(options.coco, model.class_names)
    saved: list[dict[str, Any]] = []
    pictures: list[Path] = []
    failed: list[str] = []
    names = {} if options.save is None else names_apart([name for name, _ in list_inputs(options.inputs)])
    with counter("predicting") as progress:
        for prediction in model.stream(
            options.inputs,
            batch_size=options.batch_size,
            attention=options.save is not None,
            # what compares results with the truth wants the unsure ones, too
            threshold=0.0 if ids is not None and options.threshold is None else options.threshold,
            failed=failed,
            progress=progress,
        ):
            facts = prediction.to_dict()
            if options.save is not None:
                pictures.append(prediction.save(Path(options.save) / f"{names[prediction.source]}.png"))
                facts["picture"] = str(pictures[-1])
            if ids is not None:
                saved += ids.rows(prediction)
            elif options.json:
                saved.append(facts)
            else:
                print(prediction)
    if options.json or ids is not None:
        print(json.dumps(saved))
    if pictures:
        print(said_of(pictures), file=sys.stderr)
    if failed:
        lines = "".join(f"\n  {line}" for line in failed)
        several = f"{len(failed)} pictures could not be read; the others are done:{lines}"
        raise UserError(failed[0] if len(failed) == 1 else several)
    return 0


def add_embed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run folder, model file, or weights of another library: hub name, folder, file")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="pictures and folders of pictures")
    parser.add_argument("--out", required=True, metavar="FILE", help=".parquet, .npz, .csv or .jsonl")
    parser.add_argument(
        "--what",
        choices=["summary", "map-mean"],
        default="summary",
        help="the picture's own vector, or the mean of the last map over all places (default summary)",
    )
    parser.add_argument("--image-size", type=positive, metavar="N", help="pixels per side, as far as squares go")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16", "auto"], default="float32", help="default float32"
    )
    add_common(parser, batch_size=64)


def run_embed(options: argparse.Namespace) -> int:
    """Features of pictures, a vector each. The same command continues after a kill."""
    from saccade.engine.embed import embed_to_file
    from saccade.engine.progress import counter

    with counter("embedding") as progress:
        result = embed_to_file(
            options.model,
            options.pictures,
            options.out,
            what=options.what,
            batch_size=options.batch_size,
            image_size=options.image_size,
            device=options.device,
            precision=options.precision,
            workers=options.workers,
            progress=progress,
            say=lambda text: print(text, file=sys.stderr),
        )
    if options.json:
        print(json.dumps({**vars(result), "path": str(result.path)}))
    else:
        done = "finished already: " if result.finished_before else ""
        print(f"{done}{counted(result.count, 'picture')}, {result.channels} numbers each, in {result.path}")
    if result.unreadable:
        listed = "".join(f"\n  {line}" for line in result.unreadable)
        what = counted(len(result.unreadable), "picture")
        raise UserError(f"{what} could not be read; the others are done:{listed}")
    return 0


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="weights: a hub name, a folder in the hub's layout, a file; or a run of ours")
    parser.add_argument("out", help="a new .safetensors file; with --to timm or hf a new folder")
    parser.add_argument("--to", choices=["saccade", "timm", "hf"], default="saccade", help="for whom (default saccade)")
    parser.add_argument("--model", metavar="NAME", help="which model it is, where a bare file leaves that open")
    parser.add_argument("--branch", metavar="NAME", help="which part of a checkpoint: teacher, student, model_ema, ...")
    parser.add_argument("--drop-head", action="store_true", help="keep the backbone only")
    parser.add_argument("--merge-tokens", type=int, metavar="N", help="of a ViT: so many join others in each block")
    parser.add_argument("--merge-schedule", choices=["constant", "decreasing"], help="decreasing: most in the first")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def run_convert(options: argparse.Namespace) -> int:
    """Turn weights of other libraries into a model file, or write a model for timm or Hugging Face.

    saccade convert facebook/dinov2-small dinov2.safetensors
    saccade convert runs/photos photos-timm --to timm
    saccade convert runs/photos fast.safetensors --merge-tokens 13
    """
    from saccade.weights.export import convert

    result = convert(
        options.source,
        options.out,
        to=options.to,
        model=options.model,
        keep_head=not options.drop_head,
        branch=options.branch,
        merge_tokens=options.merge_tokens,
        merge_schedule=options.merge_schedule,
    )
    if options.json:
        print(json.dumps(vars(result)))
    else:
        print("\n".join(result.lines()))
    return 0


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="weights: a hub name, a folder in the hub's layout, a file")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="pictures, or texts in lines, to compare on (default: two photographs, sentences)",
    )
    parser.add_argument("--image-size", metavar="N", help="224, or height x width such as 224x160")
    parser.add_argument("--dtype", choices=["both", "float32", "float64"], default="both", help="default both")
    parser.add_argument("--out", metavar="FILE", help="write a certificate (JSON): versions, hashes, figures, answers")
    parser.add_argument(
        "--certificate", metavar="FILE", help="compare with what this one records, without the reference code"
    )
    parser.add_argument("--model", metavar="NAME", help="which model it is, where a bare file leaves that open")
    parser.add_argument("--branch", metavar="NAME", help="which part of a checkpoint: teacher, student, model_ema, ...")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def run_verify(options: argparse.Namespace) -> int:
    """Prove that weights of another library work here as there: every stage, the loss and all gradients.

    Exit code 0: agrees with the reference code; 1: departs, and where; 2: could not be compared.
    """
    from rich.console import Console

    from saccade.verification import refuse_other_file, verify

    if options.out is not None:
        refuse_other_file(options.out)  # before what takes long
    result = verify(
        options.source,
        data=options.data,
        image_size=options.image_size,
        dtype=options.dtype,
        certificate=options.certificate,
        model=options.model,
        branch=options.branch,
    )
    if options.json:
        print(json.dumps(result.to_dict()))
    else:
        result.render(Console(highlight=False))
    if options.out is not None:
        result.save(options.out)
        print(f"certificate: {options.out}", file=sys.stderr)
    return 0 if result.agrees else 1


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help=RunConfig.model_fields["data"].description)
    parser.add_argument("--val", help=RunConfig.model_fields["val"].description)
    for side in ("source", "target"):
        name = TextConfig.model_fields[side].description
        parser.add_argument(f"--text.{side}", dest=side, metavar="NAME", help=name)
    parser.add_argument("--json", action="store_true", help="print the report as JSON on standard output")


def run_inspect(options: argparse.Namespace) -> int:
    """Say what is in this data, and what is wrong with it. Exit code 1 where something is wrong."""
    from pathlib import Path

    from rich.console import Console

    from saccade.data.inspect import inspect_data

    report = inspect_data(Path(options.data), options.val, languages=(options.source, options.target))
    if options.json:
        print(json.dumps(report.to_dict()))
    else:
        report.render(Console(highlight=False))
    return 0 if report.ok else 1


def add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="one model, with the published weights that fit it")
    parser.add_argument("--task", choices=["classify", "detect", "translate"], help="what for; without it, all")
    parser.add_argument("--json", action="store_true", help="print the list as JSON on standard output")


def run_models(options: argparse.Namespace) -> int:
    """List the models: parameters, FLOPs, size of pictures or texts, and where weights come from."""
    from saccade.catalog import describe_models, list_models, render_models

    names = tuple(model.name for model in list_models(options.task))
    if options.name is not None and options.name not in names:
        raise UserError(f"unknown model {options.name!r}{closest(options.name, names)} (`saccade models` lists all)")
    if options.json:
        print(json.dumps([model for model in describe_models(options.task) if options.name in (None, model["name"])]))
    else:
        render_models(options.name, options.task)
    return 0


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", help="folder for the run and its pictures (default demo)")
    parser.add_argument("--minutes", default="1.5", metavar="MINUTES", help="training time (default 1.5)")
    parser.add_argument("--seed", default="0", help="of everything that is random (default 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def run_demo(options: argparse.Namespace) -> int:
    """Train a small Vision Transformer on handwritten digits, now, without any download, and look at what it learnt."""
    config = build_config({"data": "digits", "minutes": options.minutes, "seed": options.seed})

    from saccade.demo import demo

    facts = demo(options.out, minutes=config.minutes or 1.5, seed=config.seed)
    if options.json:
        print(json.dumps(facts))
    return 0


COMMANDS: tuple[tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]], ...] = (
    ("demo", add_demo, run_demo),
    ("inspect", add_inspect, run_inspect),
    ("train", add_train, run_train),
    ("evaluate", add_evaluate, run_evaluate),
    ("predict", add_predict, run_predict),
    ("embed", add_embed, run_embed),
    ("convert", add_convert, run_convert),
    ("verify", add_verify, run_verify),
    ("models", add_models, run_models),
)


if __name__ == "__main__":
    sys.exit(main())
