"""The commands on the paper's side: `analyze` models over prompts, `show` one trace."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from strace import errors
from strace.analyze import Analyst, BadAnalysis, BadOption, Options, read_parts, write_rows
from strace.extract import SIZES

app = typer.Typer()

# `strace.report` and `strace.show` are imported by the commands that need them: they bring matplotlib, which would slow
# the start of every other command.

_IMPORTANCE = (
    "What an edge weighs: `l1` (the paper's), `ifr` (Information Flow Routes), `flow` (path products) or `random`."
)
_FORMAT = "Of the weights and products: fp32 or bf16. Edge weights and the stream are float32 in both."


@contextmanager
def _told() -> Iterator[None]:
    """As `errors.told`; a bad option is wrong usage."""
    with errors.told():
        try:
            yield
        except BadOption as error:
            errors.fail(str(error), errors.WRONG_USAGE)


def name_folder(model: str) -> str:
    """The folder of a model inside an analysis: its path's last part, or its hub name."""
    name = Path(model).resolve().name if Path(model).is_dir() else model
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def parse_sizes(text: str) -> tuple[float, ...]:
    """Sizes separated by commas, in rising order; empty: the paper's grid.

    Raises:
        BadOption: for what is not a number.
    """
    try:
        return tuple(sorted({float(part) for part in text.split(",")})) if text.strip() else SIZES
    except ValueError as error:
        raise BadOption(f"--sizes {text!r}: {error}") from error


@app.command("analyze")
def analyze_command(
    models: Annotated[list[str], typer.Argument(help="`embedded`, Hugging Face folders, or hub names.")],
    prompts: Annotated[Path, typer.Option(help="JSONL with `text` or `prompt`, or a file of one text per line.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for rows, figures and the report.")],
    words: Annotated[int, typer.Option(help="Words taken from the start of every text.", min=1)] = 40,
    sizes: Annotated[
        str, typer.Option(help="Shares of a prompt's edges, separated by commas. Default: the paper's 27.")
    ] = "",
    limit: Annotated[int | None, typer.Option(help="Only the first prompts of the file.", min=1)] = None,
    importance: Annotated[str, typer.Option(help=_IMPORTANCE)] = "l1",
    ablation: Annotated[
        str, typer.Option(help="What an absent edge carries: `zero`, or its `mean` over prompts of the file.")
    ] = "zero",
    format: Annotated[str, typer.Option(help=_FORMAT)] = "fp32",
    unigrams: Annotated[
        Path | None, typer.Option(help="Corpus to count tokens in, as --prompts. Default: all of --prompts.")
    ] = None,
    skip_short: Annotated[bool, typer.Option(help="Leave out texts of too few words instead of ending.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random control.", min=0)] = 0,
) -> None:
    """Reproduce the paper's measurements on MODELS: traces of every size, masked runs, controls, a report.

    A run that was stopped goes on where it was when given again. `accelerate launch --no_python strace-llm analyze ...`
    splits the prompts over processes and devices.

    Examples:

        strace-llm analyze embedded --prompts texts.jsonl -o study

        strace-llm analyze ./one ./other --prompts texts.txt --words 30 --limit 200 --skip-short -o study

    Exit code 1: a model or the prompts cannot be used; 2: an option has no such value. The message says why. What is
    finished is kept.
    """
    with _told():
        folders = {name_folder(model): model for model in models}
        if len(folders) < len(models):
            raise BadAnalysis(f"two of the models would share one folder: {', '.join(map(name_folder, models))}")
        chosen = parse_sizes(sizes)
        main = False
        for name, model in folders.items():
            options = Options(
                model=model,
                prompts=prompts,
                output=output / name,
                words=words,
                sizes=chosen,
                limit=limit,
                importance=importance,
                ablation=ablation,
                format=format,
                unigrams=unigrams,
                skip_short=skip_short,
                seed=seed,
            )
            main = _analyze_one(name, options)
        if main:
            from strace.report import write_report

            typer.echo(f"report in {write_report(output)}")


def _analyze_one(name: str, options: Options) -> bool:
    """Run one model to its end with a progress bar; whether this is the main process."""
    analyst = Analyst(options)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    main = analyst.state.is_main_process
    with Progress(*columns, console=Console(stderr=True), disable=not main) as progress:
        task = progress.add_task(name, total=len(analyst.excerpts), completed=len(analyst.finished()))
        for _ in analyst.run():
            progress.update(task, completed=analyst.count_finished())
    if main:
        write_rows(options.output, read_parts(options.output))
    return main


@app.command("show")
def show_command(
    model: Annotated[str, typer.Argument(help="`embedded`, a Hugging Face folder, or a hub name.")],
    prompt: Annotated[str, typer.Argument(help="The text whose next token is traced.")],
    size: Annotated[float, typer.Option(help="Share of the prompt's edges, in (0, 1].")] = 1e-3,
    output: Annotated[Path, typer.Option("-o", "--output", help="Picture, .png or .svg; its JSON lies beside.")] = Path(
        "trace.png"
    ),
    importance: Annotated[str, typer.Option(help=_IMPORTANCE)] = "l1",
    format: Annotated[str, typer.Option(help=_FORMAT)] = "fp32",
) -> None:
    """Draw the trace of one PROMPT: tokens across, levels of the residual stream up, edges by weight.

    Examples:

        strace-llm show embedded "Once upon a time there was" --size 1e-2

        strace-llm show ./my-model "The capital of France is" --size 1e-3 -o france.svg

    Exit code 1: the model or the prompt cannot be used; 2: an option has no such value. The message says why.
    """
    from strace.show import save_trace, say_likeliest, trace_prompt

    with _told():
        shown = trace_prompt(model, prompt, size, importance, format)
        record = save_trace(shown, output)
        typer.echo("\n".join(say_likeliest(shown)))
        if len(shown.edges) < len(shown.layers):
            typer.echo(
                f"a path from the embeddings to the output has {len(shown.layers)} edges: this trace has no token"
            )
        typer.echo(f"{len(shown.edges):,} of {shown.all_edges:,} edges, TV {shown.tv:.3f}; {output}, {record}")
