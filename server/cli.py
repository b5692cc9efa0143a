"""The command `strace-llm`: `serve`, `generate` and `chat` from here, the offline commands from `strace.cli`.

Exit codes: 0 done, 1 the model or the run failed, 2 wrong usage. Nothing the user did ends in a traceback.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from transformers.utils import logging as transformers_logging

from server import bench as benchmark
from server import certify as certifying
from server import console
from server.api.errors import ApiError
from server.api.protocol import ChatRequest, CompletionRequest, Message, StraceOptions
from server.config import Compile, Dtype, EngineConfig, ReasoningParser, RunnerKind, ServeConfig, ToolParser
from server.engine.build import Placement
from server.engine.engine import StepFailed
from server.engine.request import Mode, Overloaded
from server.load import load_served
from server.serve import serve as run_server
from strace import errors
from strace.classes import shipped_prompts
from strace.cli import app as offline
from strace.errors import WRONG_USAGE, fail

C = TypeVar("C", bound=EngineConfig)

app = typer.Typer(
    name="strace-llm",
    help="Serve a Hugging Face causal LM through compact subgraphs of it, checked by the full model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(offline)


def setting(name: str, *flags: str) -> Any:
    """The flag of a ServeConfig field, with the field's own description and default."""
    field = ServeConfig.model_fields[name]
    return typer.Option(
        *flags, help=field.description, show_default="" if field.default is None else str(field.default)
    )


ModelArgument = Annotated[
    str | None, typer.Argument(help=ServeConfig.model_fields["model"].description, show_default="embedded")
]
ModelFlag = Annotated[str | None, setting("model", "--model")]
Subgraphs = Annotated[Path | None, setting("subgraphs")]
ModeFlag = Annotated[Mode | None, setting("mode")]
DtypeFlag = Annotated[Dtype | None, setting("dtype")]
Device = Annotated[str | None, setting("device")]
RunnerFlag = Annotated[RunnerKind | None, setting("runner")]
CompileFlag = Annotated[Compile | None, setting("compile")]
Context = Annotated[int | None, setting("context")]
ClassFlag = Annotated[
    str | None, typer.Option("--class", help="prompt class; default: chosen by the prompt", show_default=False)
]
MaxTokens = Annotated[int, typer.Option(min=1, help="most tokens to generate")]
Temperature = Annotated[float, typer.Option(min=0, max=2, help="0: greedy")]
TopP = Annotated[float, typer.Option(min=1e-6, max=1, help="share of the probability to draw from")]
TopK = Annotated[int, typer.Option(min=0, help="number of tokens to draw from; 0: all")]
Seed = Annotated[
    int | None,
    typer.Option(min=-(2**63), max=2**63 - 1, help="makes a run repeatable in every verified mode", show_default=False),
]


@app.command(
    epilog="Every flag has an environment variable: STRACE_LLM_PORT for --port, STRACE_LLM_API_KEY for --api-key. "
    "SIGTERM lets requests in progress finish, SIGHUP reads the subgraphs again. "
    "Example: strace-llm serve HuggingFaceTB/SmolLM2-135M --port 8001 --mode exact"
)
def serve(
    model: ModelArgument = None,
    subgraphs: Subgraphs = None,
    host: Annotated[str | None, setting("host")] = None,
    port: Annotated[int | None, setting("port")] = None,
    mode: ModeFlag = None,
    dtype: DtypeFlag = None,
    device: Device = None,
    runner: RunnerFlag = None,
    compile: CompileFlag = None,
    context: Context = None,
    served_model_name: Annotated[str | None, setting("served_model_name")] = None,
    api_key: Annotated[str | None, setting("api_key")] = None,
    max_running: Annotated[int | None, setting("max_running")] = None,
    max_queue: Annotated[int | None, setting("max_queue")] = None,
    kv_memory: Annotated[str | None, setting("kv_memory")] = None,
    prefix_cache: Annotated[bool | None, setting("prefix_cache", "--prefix-cache/--no-prefix-cache")] = None,
    max_body_bytes: Annotated[int | None, setting("max_body_bytes")] = None,
    request_timeout: Annotated[float | None, setting("request_timeout")] = None,
    step_timeout: Annotated[float | None, setting("step_timeout")] = None,
    drain_timeout: Annotated[float | None, setting("drain_timeout")] = None,
    api_key_file: Annotated[Path | None, setting("api_key_file")] = None,
    cors_origins: Annotated[list[str] | None, setting("cors_origins", "--cors-origin")] = None,
    tls_certificate: Annotated[Path | None, setting("tls_certificate")] = None,
    tls_key: Annotated[Path | None, setting("tls_key")] = None,
    tool_parser: Annotated[ToolParser | None, setting("tool_parser")] = None,
    reasoning_parser: Annotated[ReasoningParser | None, setting("reasoning_parser")] = None,
    risk: Annotated[float | None, setting("risk")] = None,
) -> None:
    """Serve a model over an OpenAI-compatible API until interrupted."""
    config = configure(ServeConfig, **locals())
    with told():
        run_server(config)


@app.command(epilog='Example: strace-llm generate "def fib(n):" --max-tokens 64 --temperature 0 --class code')
def generate(
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    model: ModelFlag = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    mode: ModeFlag = None,
    class_name: ClassFlag = None,
    subgraphs: Subgraphs = None,
    dtype: DtypeFlag = None,
    device: Device = None,
    runner: RunnerFlag = None,
    compile: CompileFlag = None,
    context: Context = None,
) -> None:
    """Continue a prompt; the subgraph's and the full model's tokens in two colours, the speedup at the end."""
    config = configure(EngineConfig, **locals())
    with told(), console.running(load_served(config)) as served:
        body = CompletionRequest(
            model=served.name,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            strace=StraceOptions.model_validate({"class": class_name}),
        )
        console.generate(served, body, Console(), Console(stderr=True))


@app.command(epilog="Ctrl-D ends the conversation, Ctrl-C an answer. Example: strace-llm chat --temperature 0.7")
def chat(
    model: ModelArgument = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="most tokens per answer", show_default="rest of the context")
    ] = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    mode: ModeFlag = None,
    class_name: ClassFlag = None,
    subgraphs: Subgraphs = None,
    dtype: DtypeFlag = None,
    device: Device = None,
    runner: RunnerFlag = None,
    compile: CompileFlag = None,
    context: Context = None,
) -> None:
    """Talk with a model, line by line."""
    config = configure(EngineConfig, **locals())
    with told(), console.running(load_served(config)) as served:

        def ask(messages: list[Message]) -> ChatRequest:
            return ChatRequest(
                model=served.name,
                messages=messages,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                strace=StraceOptions.model_validate({"class": class_name}),
            )

        console.converse(served, ask, Console(), Console(stderr=True))


@app.command(epilog="Example: strace-llm bench ./my-model --rounds 12 --temperature 0 --json")
def bench(
    model: ModelArgument = None,
    subgraphs: Subgraphs = None,
    prompts: Annotated[
        Path | None, typer.Option(help="folder of prompts by class, as `trace` reads it", show_default="those shipped")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="measured rounds, each of one prompt of every class")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="most tokens per text")] = 64,
    temperature: Temperature = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
    dtype: DtypeFlag = None,
    device: Device = None,
    runner: RunnerFlag = None,
    compile: CompileFlag = None,
    context: Context = None,
) -> None:
    """Measure full, exact and routed in one run, interleaved, on an otherwise idle machine."""
    config = configure(EngineConfig, **locals())
    with told():
        found = benchmark.measure(config, prompts or shipped_prompts(), rounds, tokens, temperature)
        if as_json:
            typer.echo(json.dumps(found))
        else:
            benchmark.show(found, Console())


@app.command(
    epilog="Example: strace-llm certify ./my-model --subgraphs subgraphs --prompts texts --temperature 0 --time-limit 9"
)
def certify(
    model: ModelArgument = None,
    subgraphs: Subgraphs = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="folder of prompts by class, as `trace` reads it, that tracing has not seen",
            show_default="of those shipped, the part that `trace` only reports on",
        ),
    ] = None,
    classes: Annotated[str, typer.Option(help="only these, separated by commas", show_default="all")] = "",
    temperature: Annotated[list[float], typer.Option(min=0, max=2, help="may be repeated")] = [1.0, 0.0],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=2, help="most tokens per text; shorter requests are served exact")] = 128,
    time_limit: Annotated[
        float | None, typer.Option(min=0, help="minutes after which to stop", show_default="none")
    ] = None,
    dtype: DtypeFlag = None,
    device: Device = None,
    runner: RunnerFlag = None,
    compile: CompileFlag = None,
    context: Context = None,
) -> None:
    """Certify at which confidence `routed` keeps which risk, by running the prompts of every class at each threshold.

    A risk is the mean share of tokens that the full model would not have chosen. What was measured is kept beside the
    subgraphs: typed again, the command goes on where it stopped.
    """
    config = configure(EngineConfig, **locals())
    chosen = tuple(name.strip() for name in classes.split(",") if name.strip())
    placement = Placement(config.device, config.dtype, config.context, runner=config.runner, compile=config.compile)
    seconds = None if time_limit is None else 60 * time_limit
    temperatures = tuple(dict.fromkeys(temperature))
    asked = certifying.Asked(config.model, config.subgraphs, prompts, chosen, temperatures, tokens, seconds, placement)
    notes = Console(stderr=True)
    with told(), Progress(console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("loading", total=1.0)
        found, whole = certifying.certify(
            asked, lambda doing, share: bar.update(task, description=doing, completed=share)
        )
    certifying.show(found, Console())
    if not whole:
        typer.echo("time was up; type the same command again to go on", err=True)


def configure(kind: type[C], **flags: Any) -> C:
    """The configuration: flags that were given before environment before defaults. Exits when it is wrong."""
    given = {name: value for name, value in flags.items() if name in kind.model_fields and value is not None}
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # flags that do not go together
            fail(first["msg"].removeprefix("Value error, "), WRONG_USAGE)
        name = str(first["loc"][0])
        flag = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
        fail(f"{flag} (or STRACE_LLM_{name.upper()}): {first['msg']}", WRONG_USAGE)


@contextmanager
def told() -> Iterator[None]:
    """End with one line instead of a traceback for what a user can put right."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    transformers_logging.set_verbosity_error()
    with errors.told():
        try:
            yield
        except ApiError as error:
            fail(str(error), WRONG_USAGE)
        except (StepFailed, Overloaded, benchmark.Busy) as error:
            fail(str(error))


def main() -> None:
    """The console command."""
    app()
