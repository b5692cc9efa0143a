"""What `serve` can be told: flags before environment (`STRACE_LLM_PORT`, ...) before defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.engine.request import Mode
from strace.checkpoint import EMBEDDED

Dtype = Literal["auto", "bf16", "fp32", "int8", "int4"]
RunnerKind = Literal["auto", "native", "torch"]
Compile = Literal["auto", "on", "off"]
ToolParser = Literal["auto", "hermes", "llama3_json", "mistral", "none"]
ReasoningParser = Literal["auto", "think", "none"]


class EngineConfig(BaseSettings):
    """Which model runs, and how."""

    model_config = SettingsConfigDict(env_prefix="STRACE_LLM_", env_ignore_empty=True, frozen=True)

    model: str = Field(EMBEDDED, min_length=1, description="`embedded`, a Hugging Face folder, or a hub name")
    subgraphs: Path | None = Field(None, description="folder of subgraphs; the embedded model brings its own")
    mode: Mode = Field(Mode.AUTO, description="mode of requests that name none")
    dtype: Dtype = Field("auto", description="format of the full model's weights")
    device: str = Field("cpu", pattern=r"^(cpu|auto|cuda(:\d+)?)$", description="cpu, cuda, cuda:N, or auto")
    context: int | None = Field(None, ge=1, description="most tokens of prompt and answer; default: the model's limit")
    kv_memory: ByteSize | None = Field(
        None, gt=0, description="memory of the KV cache, such as 2GiB; default: a share of what is free"
    )
    prefix_cache: bool = Field(True, description="whether prompts that begin alike share entries of the KV cache")
    runner: RunnerKind = Field("auto", description="what computes: native or torch; auto: native on the CPU if built")
    compile: Compile = Field("auto", description="capture whole steps as CUDA graphs; auto: wherever there is CUDA")
    tool_parser: ToolParser = Field("auto", description="format of the model's tool calls; auto: by its chat template")
    reasoning_parser: ReasoningParser = Field(
        "auto", description="marks of the model's thoughts; auto: think, if its chat template has <think>"
    )
    risk: float | None = Field(
        None, gt=0, lt=1, description="auto runs routed where this mean divergence is certified; default: exact"
    )
    max_running: int = Field(16, ge=1, le=256, description="requests that are decoded side by side")
    max_queue: int = Field(64, ge=1, description="requests that may wait before new ones are refused with 429")


class ServeConfig(EngineConfig):
    """The whole of `strace-llm serve`."""

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    served_model_name: str | None = Field(
        None, min_length=1, description="name that requests use; default: the model's own"
    )
    api_key: SecretStr | None = Field(
        None, min_length=1, description="key that requests must send; default: none needed"
    )
    api_key_file: Path | None = Field(None, description="file with more such keys, one per line")
    max_body_bytes: int = Field(4 * 2**20, ge=1, description="largest request body")
    request_timeout: float | None = Field(None, gt=0, description="seconds until a request is given up; default: none")
    step_timeout: float = Field(300, gt=0, description="seconds of one step after which the process gives up and exits")
    # Kubernetes kills 30 seconds after SIGTERM.
    drain_timeout: float = Field(25, ge=0, description="seconds that requests get to finish after SIGTERM")
    cors_origins: tuple[str, ...] = Field((), description="origins whose web pages may ask; * for any")
    tls_certificate: Path | None = Field(None, description="PEM file; with --tls-key serves HTTPS")
    tls_key: Path | None = Field(None, description="PEM file of the certificate's private key")

    @field_validator("served_model_name")
    @classmethod
    def refuse_colon(cls, name: str | None) -> str | None:
        """A colon would be taken for the beginning of a mode or class."""
        if name is not None and ":" in name:
            raise ValueError("must not contain a colon")
        return name

    @model_validator(mode="after")
    def check_tls(self) -> ServeConfig:
        """One half of a key pair is of no use."""
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key go together")
        return self

    def api_keys(self) -> list[str]:
        """Every key that is accepted.

        Raises:
            ValueError: the file cannot be read or holds no key.
        """
        keys = [] if self.api_key is None else [self.api_key.get_secret_value()]
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"--api-key-file {self.api_key_file}: {error}") from error
            more = [line.strip() for line in lines if line.strip()]
            if not more:
                raise ValueError(f"--api-key-file {self.api_key_file} holds no key")
            keys += more
        return keys

    @property
    def name(self) -> str:
        """The served name: as asked for, else a folder's own name, else the model as given."""
        return self.served_model_name or (Path(self.model).resolve().name if Path(self.model).is_dir() else self.model)
