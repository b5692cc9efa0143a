"""The offline commands: `trace`, `inspect` a folder of subgraphs, and those of `strace.paper`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from strace.checkpoint import BadCheckpoint
from strace.classes import BadPrompts
from strace.families import UnsupportedModel
from strace.paper import app as paper
from strace.subgraph import BadSubgraph, Manifest, find_subgraphs, read_manifest
from strace.trace import Options, trace

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", add_completion=False)
app.add_typer(paper)

FORMATS = ("int4", "int8", "bf16")
_SHADES = " ▁▂▃▄▅▆▇█"


FAILED, WRONG_USAGE = 1, 2  # exit codes


def _fail(message: str, code: int = FAILED) -> typer.Exit:
    Console(stderr=True, soft_wrap=True).print(Text(f"error: {message}"))
    return typer.Exit(code)


@app.command("trace")
def trace_command(
    model: Annotated[str, typer.Argument(help="`embedded`, a Hugging Face folder, or a hub name.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write a subgraph per class into.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Folder of CLASS.jsonl (text or prompt, optional source) or CLASS.txt. Default: those shipped."
        ),
    ] = None,
    size: Annotated[
        float | None,
        typer.Option(
            help="Bytes per step as a share of the full model's in bf16, such as 0.2. Default: the best of a few."
        ),
    ] = None,
    classes: Annotated[
        str, typer.Option(help="Only these classes, separated by commas; `pooled` is then of them alone.")
    ] = "",
    format: Annotated[str, typer.Option(help="Format of every matrix: int4, int8 or bf16.")] = "int4",
    seed: Annotated[int, typer.Option(help="Of the split, the order of texts and the draft blocks.", min=0)] = 0,
) -> None:
    """Cut a subgraph of MODEL for every prompt class, and one for all of them (`pooled`).

    A class that is already finished with the same model, prompts and options is not made again.

    Examples:

        strace-llm trace embedded -o subgraphs

        strace-llm trace ./my-model --prompts my-prompts -o subgraphs --size 0.2 --classes code,math

    Exit code 1: the model or the prompts cannot be used; 2: an option has no such value. The message says why.
    """
    if format not in FORMATS:
        raise _fail(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}", WRONG_USAGE)
    if size is not None and not 0 < size <= 1:
        raise _fail(f"--size {size} is not a share between 0 and 1", WRONG_USAGE)
    chosen = tuple(name.strip() for name in classes.split(",") if name.strip())
    options = Options(model, output, prompts, size, chosen, format, seed)
    console = Console(soft_wrap=True)
    try:
        with console.status("tracing") as status:

            def say(line: str) -> None:
                status.update(line)
                console.print(Text(line))

            trace(options, say)
    except (BadPrompts, BadCheckpoint, UnsupportedModel, ValueError, OSError) as error:
        raise _fail(str(error)) from error
    console.print(Text(f"subgraphs in {output}; next: strace-llm serve {model} --subgraphs {output}"))


@app.command("inspect")
def inspect_command(
    folder: Annotated[Path, typer.Argument(help="A folder that `trace` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifests as one JSON object by class.")] = False,
) -> None:
    """Show what the subgraphs in FOLDER keep, cost and reach.

    Examples:

        strace-llm inspect subgraphs

        strace-llm inspect subgraphs --json | jq .code.measured

    Exit code 1: there is no subgraph, or one cannot be read; the message names it.
    """
    try:
        manifests = {name: read_manifest(path) for name, path in find_subgraphs(folder).items()}
    except BadSubgraph as error:
        raise _fail(str(error)) from error
    if as_json:
        typer.echo(json.dumps({name: m.model_dump(mode="json", by_alias=True) for name, m in manifests.items()}))
        return
    console = Console()
    console.print(_tabulate(manifests))
    for name, manifest in manifests.items():
        console.print(Text.assemble("\n", (name, "bold"), f": {manifest.why}"), soft_wrap=True)
        for line in draw_layers(manifest):
            console.print(Text(line), soft_wrap=True)
        accepted = " ".join(f"{a:.3f}" for a in manifest.measured.accepted)
        console.print(Text(f"  accepted at draft positions 1..8: {accepted}"), soft_wrap=True)


def _tabulate(manifests: dict[str, Manifest]) -> Table:
    first = next(iter(manifests.values()))
    table = Table(title=f"Subgraphs of {first.base.model} (weights {first.base.weight_hash[:12]})", box=SIMPLE)
    for column in ("class", "format", "MB/step", "share", "head", "cover", "accept", "agree", "S"):
        table.add_column(column, justify="left" if column in ("class", "format") else "right", no_wrap=True)
    for name, m in manifests.items():
        chosen = next(c for c in m.candidates if c.plan == m.plan)
        table.add_row(
            name,
            m.plan.format,
            f"{m.measured.bytes_per_step / 1e6:.2f}",
            f"{m.measured.bytes_share:.3f}",
            str(m.head_rows),
            f"{m.measured.coverage:.3f}",
            f"{fmean(m.measured.accepted):.3f}",
            f"{fmean(m.measured.agreement):.3f}",
            f"{chosen.speedup:.2f}",
        )
    return table


def draw_layers(manifest: Manifest) -> list[str]:
    """Two lines, attention and MLP, with one bar per layer: the share of its units that is kept, blank where it
    vanished."""
    groups = [len(layer.groups) / manifest.base.kv_heads for layer in manifest.kept]
    neurons = [layer.neurons / manifest.base.neurons for layer in manifest.kept]
    bars = ("".join(_SHADES[min(8, int(share * 8 + 0.999))] for share in shares) for shares in (groups, neurons))
    return [
        f"  {kind:9} layer 0 |{bar}| {len(manifest.kept) - 1}"
        for kind, bar in zip(("attention", "MLP"), bars, strict=True)
    ]
