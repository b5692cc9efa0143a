"""The offline commands: `trace`, `inspect` subgraphs, `measure` this machine, and those of
`strace.paper`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from strace.checkpoint import EMBEDDED
from strace.controls import UNITS
from strace.costs import (
    SETTLE,
    TYPICAL,
    CostTable,
    count_blocks,
    describe_setting,
    draw_curve,
    dump_table,
    list_cases,
    load_table,
    measure_table,
    save_table,
)
from strace.errors import WRONG_USAGE, fail, told
from strace.files import write_beside
from strace.gguf import convert
from strace.graphs import RUNNERS, make_runner, open_graphs
from strace.linear import FORMATS as FULL_FORMATS
from strace.material import BUDGETS, SOME_TOKENS
from strace.overview import as_record, open_overview, render_page, show
from strace.paper import app as paper
from strace.runner import FULL
from strace.trace import AUTO, Options, trace

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", add_completion=False)
app.add_typer(paper)

FORMATS = ("int4", "int8", "bf16")


@app.command("trace")
def trace_command(
    model: Annotated[str, typer.Argument(help="`embedded`, a Hugging Face folder, or a hub name.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write a subgraph per class into.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file (text, prompt or messages; class; optional source), text file, or folder with a file or "
            "folder for each class. Default: those shipped."
        ),
    ] = None,
    class_name: Annotated[
        str | None, typer.Option("--class", help="Class of prompts that name none, in a JSONL or text file.")
    ] = None,
    size: Annotated[
        float | None,
        typer.Option(
            help="Bytes per step as a share of the full model's in bf16, such as 0.2. Default: the best of a few."
        ),
    ] = None,
    classes: Annotated[
        str,
        typer.Option(
            help="Only these, separated by commas; `pooled` is then of them alone. `auto`: find them in --prompts."
        ),
    ] = "",
    clusters: Annotated[
        int | None, typer.Option(help="How many classes `--classes auto` finds. Default: as many as part best.", min=2)
    ] = None,
    format: Annotated[str, typer.Option(help="Format of every matrix: int4, int8 or bf16.")] = "int4",
    seed: Annotated[int, typer.Option(help="Of the split, the order of texts and the draft blocks.", min=0)] = 0,
    units: Annotated[str, typer.Option(help=f"How units are scored: {', '.join(UNITS)}.")] = "refit",
    runner: Annotated[str, typer.Option(help=f"What is timed: {', '.join(RUNNERS)}.")] = "auto",
    distill: Annotated[
        float, typer.Option(help="Minutes to train each class's subgraph on the full model's own text.", min=0)
    ] = 0.0,
    fit_tokens: Annotated[
        int, typer.Option(help="Most tokens of a class to fit on; fewer of wide models, for memory.", min=SOME_TOKENS)
    ] = BUDGETS["fit"],
    costs: Annotated[
        list[Path] | None,
        typer.Option(help="What `measure --json` printed on another machine: what it would gain there is told too."),
    ] = None,
) -> None:
    """Cut a subgraph of MODEL for every prompt class, and one for all of them (`pooled`).

    A class that is already finished with the same model, prompts, options and machine is not made again; one that was
    cut off goes on where it was. Where no subgraph is predicted to pay, none is served for the class.

    Examples:

        strace-llm trace embedded -o subgraphs

        strace-llm trace ./my-model --prompts my-prompts -o subgraphs --size 0.2 --classes code,math

        strace-llm trace ./my-model --prompts labelled.jsonl -o subgraphs

        strace-llm trace ./my-model --prompts log.jsonl --classes auto -o subgraphs

        strace-llm trace embedded -o subgraphs --costs other-machine.json

        strace-llm trace ./my-model --prompts my-prompts -o subgraphs --fit-tokens 250000

    Exit code 1: the model or the prompts cannot be used; 2: an option has no such value. The message says why.
    """
    if format not in FORMATS:
        fail(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}", WRONG_USAGE)
    for option, value, known in (("units", units, UNITS), ("runner", runner, RUNNERS)):
        if value not in known:
            fail(f"unknown {option} {value!r}; choose one of {', '.join(known)}", WRONG_USAGE)
    if distill and format == "bf16":
        fail("--distill trains quantised weights; --format bf16 leaves none", WRONG_USAGE)
    if size is not None and not 0 < size <= 1:
        fail(f"--size {size} is not a share between 0 and 1", WRONG_USAGE)
    chosen = tuple(name.strip() for name in classes.split(",") if name.strip())
    if clusters is not None and chosen != AUTO:
        fail("--clusters is for --classes auto", WRONG_USAGE)
    others = tuple(costs or ())
    options = Options(
        model,
        output,
        prompts,
        size,
        chosen,
        format,
        seed,
        units,
        runner,
        distill,
        class_name,
        clusters,
        others,
        fit_tokens,
    )
    console = Console(soft_wrap=True)
    with told(), Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tracing", total=1.0)
        trace(options, lambda line: console.print(Text(line)), lambda share: bar.update(task, completed=share))
    console.print(Text(f"subgraphs in {output}; next: strace-llm serve {model} --subgraphs {output}"))


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help="The model, or a folder that `trace` wrote.")],
    subgraphs: Annotated[
        Path | None, typer.Option(help="Folder of its subgraphs; the embedded model brings its own.")
    ] = None,
    class_name: Annotated[
        str | None, typer.Option("--class", help="Only this class, layer by layer, with all that was tried.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifests as one JSON object.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write all of it to this file, a page of its own.")] = None,
) -> None:
    """Show what the subgraphs of MODEL keep, cost and reach, whether each pays and why, and how classes are told apart.

    Examples:

        strace-llm inspect embedded

        strace-llm inspect subgraphs --class code

        strace-llm inspect ./my-model --subgraphs subgraphs --html subgraphs.html

        strace-llm inspect subgraphs --json | jq .subgraphs.code.measured

    Exit code 1: there is no subgraph, one cannot be read, or it is of another model; the message names it.
    """
    with told():
        overview = open_overview(model, subgraphs, class_name)
        if html is not None:
            write_beside(html, render_page(overview))
    if as_json:
        typer.echo(json.dumps(as_record(overview)))
        return
    console = Console()
    console.print(show(overview, whole=class_name is not None))
    if html is not None:
        console.print(Text(f"\npage: {html}"), soft_wrap=True)


@app.command("measure")
def measure_command(
    model: Annotated[str, typer.Argument(help="`embedded`, a Hugging Face folder, or a hub name.")] = EMBEDDED,
    subgraphs: Annotated[
        Path | None, typer.Option(help="Folder of subgraphs; the embedded model brings its own.")
    ] = None,
    runner: Annotated[str, typer.Option(help=f"What runs them: {', '.join(RUNNERS)}.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"Format of the full model: auto, {', '.join(FULL_FORMATS)}.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:N.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as one JSON object.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again what was measured before.")] = False,
) -> None:
    """Measure what the steps of MODEL and its drafts cost on this machine, as they alternate in serving.

    The table is kept; `serve` starts from it wherever hardware, threads, runner, versions and model are the same. Other
    load on the machine spoils it.

    Examples:

        strace-llm measure

        strace-llm measure ./my-model --subgraphs subgraphs --json | jq .bandwidth

    Exit code 1: the model or its subgraphs cannot be used; 2: an option has no such value. The message says why.
    """
    for name, value, known in (("runner", runner, RUNNERS), ("dtype", dtype, ("auto", *FULL_FORMATS))):
        if value not in known:
            fail(f"unknown {name} {value!r}; choose one of {', '.join(known)}", WRONG_USAGE)
    with told():
        checkpoint, graphs = open_graphs(model, subgraphs, device, dtype, runner)
        served = make_runner(graphs, count_blocks(list_cases(graphs[FULL].spec.context)), runner)
        setting = describe_setting(served, checkpoint.weight_hash)
        table = None if refresh else load_table(setting)
        if table is None:
            with Progress(console=Console(stderr=True), transient=True) as progress:
                task = progress.add_task("measuring", total=1.0)
                table = measure_table(served, setting, lambda share: progress.update(task, completed=share))
            save_table(table)
    if as_json:
        typer.echo(dump_table(table))
    else:
        _show_costs(table, Console())


def _show_costs(table: CostTable, console: Console) -> None:
    setting = table.setting
    versions = ", ".join(f"{name} {number}" for name, number in setting.versions.items())
    console.print(
        Text(
            f"{setting.processor}, {setting.device}, {setting.threads} threads, {setting.runner} runner "
            f"({setting.isa}), {versions}; measured {table.date}; memory is read at {table.bandwidth / 1e9:.1f} GB/s"
        ),
        soft_wrap=True,
    )
    console.print(_tabulate_steps(table), _tabulate_full(table), _tabulate_drafts(table))
    console.print(Text(f"  prefill: {_tell_prefill(table)}"), soft_wrap=True)


def _tell_prefill(table: CostTable) -> str:
    """Tokens/s, and multiplications/s beside those of a large product."""
    rates = []
    for tokens, pass_ in table.prefill.items():
        macs = pass_.macs / pass_.seconds
        share = f" ({macs / table.peak:.0%} of bf16's {table.peak / 1e9:.0f})" if table.peak else ""
        rates.append(f"{tokens / pass_.seconds:,.0f} tokens/s over {tokens} tokens, {macs / 1e9:.1f} GMAC/s{share}")
    return "; ".join(rates)


def _make_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, collapse_padding=True, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("graph", "formats") else "right", no_wrap=True)
    return table


def _compare(seconds: float, unit: float) -> str:
    """ms to three digits, and the ratio to `unit`."""
    ms = seconds * 1e3
    return f"{ms:.{2 if ms < 10 else 1 if ms < 100 else 0}f} {seconds / unit:.2f}"


def _tabulate_steps(table: CostTable) -> Table:
    shown = _make_table(
        f"One token of one text after {TYPICAL} tokens", "graph", "formats", "MB", "ms", "GB/s", "of reads", "c"
    )
    full = draw_curve(table.costs, FULL)[1]
    for name, graph in table.setting.graphs.items():
        seconds = draw_curve(table.costs, name)[1]
        rate = graph.bytes_per_step / seconds
        shown.add_row(
            name,
            graph.formats,
            f"{graph.bytes_per_step / 1e6:.1f}",
            f"{seconds * 1e3:.2f}",
            f"{rate / 1e9:.1f}",
            f"{rate / table.bandwidth:.0%}",
            f"{seconds / full:.3f}",
        )
    return shown


def _tabulate_full(table: CostTable) -> Table:
    """ms of every full pass and v(n) over one token of the same texts."""
    costs = [cost for cost in table.costs if cost.graph == FULL]
    seconds = {(c.context, c.sequences, c.tokens): c.seconds for c in costs}
    lengths = sorted({c.tokens for c in costs})
    shown = _make_table("Full pass, ms and v(n), by tokens of each text", "after", "texts", *map(str, lengths))
    for context, texts in sorted({(c.context, c.sequences) for c in costs}):
        one = seconds[context, texts, 1]
        row = [seconds.get((context, texts, n)) for n in lengths]
        cells = ("" if s is None else _compare(s, one) for s in row)
        shown.add_row(str(context), str(texts), *cells)
    return shown


def _tabulate_drafts(table: CostTable) -> Table:
    """ms of every draft step, and c, over the full step of the same texts."""
    passes = [cost for cost in table.costs if cost.tokens == 1 and cost.graph != SETTLE]
    seconds = {(c.graph, c.context, c.sequences): c.seconds for c in passes}
    texts = sorted({sequences for _, _, sequences in seconds})
    shown = _make_table("Draft step, ms and c, by texts", "graph", "after", *map(str, texts))
    for graph, context in sorted({(graph, context) for graph, context, _ in seconds if graph != FULL}):
        row = [(seconds[graph, context, n], seconds[FULL, context, n]) for n in texts]
        shown.add_row(graph, str(context), *(_compare(s, full) for s, full in row))
    return shown


@app.command("convert")
def convert_command(
    model: Annotated[str, typer.Argument(help="`embedded`, a Hugging Face folder, or a hub name.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="GGUF file to write.")],
) -> None:
    """Write MODEL, of a Llama type, as one GGUF file for llama.cpp: weights as stored, and the tokenizer.

    Needs the package `gguf`: pip install 'strace-llm[gguf]'.

    Examples:

        strace-llm convert embedded -o embedded.gguf

        strace-llm convert ./my-model -o my-model.gguf

    Exit code 1: the model cannot be read or llama.cpp would not run it as we do; the message says why.
    """
    with told():
        done = convert(model, output)
    console = Console(soft_wrap=True)
    console.print(Text(f"{done.path}: {done.architecture}, {done.tensors} tensors, {done.bytes / 1e6:.1f} MB"))
    if not done.same_words:
        console.print(
            Text(
                f"note: llama.cpp has no rule that cuts text into words just as this tokenizer does; the nearest, "
                f"{done.pre_tokenizer}, gives other ids to some text"
            )
        )
