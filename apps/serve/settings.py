"""What a server is started with: flags of `plumbline serve`, or the same names in a YAML file."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from plumbline.apps.serve.engine.local_backend import EngineSettings
from plumbline.paths import resolve_config

GUARD_LAYERS = ("input", "output")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of one server. Checked when made; nothing is loaded here."""

    model: str = field(
        default="bundled:smollm2-135m-instruct",
        metadata={"help": "a model source, or with --backend openai the model's name there"},
    )
    name: str = field(default="", metadata={"help": "the name that requests use for it (default: the source)"})
    adapters: tuple[str, ...] = field(
        default=(), metadata={"help": "NAME=FOLDER of a PEFT adapter; requests name it as a model"}
    )
    backend: str = field(
        default="local",
        metadata={"help": "local, or openai: a server that speaks OpenAI's API, with the guard in front"},
    )
    url: str = field(default="", metadata={"help": "of the openai backend, such as http://localhost:8000/v1"})
    url_key: str = field(default="OPENAI_API_KEY", metadata={"help": "environment variable that holds the key for it"})

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=8000, metadata={"help": "port to listen on"})
    api_keys: str = field(
        default="", metadata={"help": "file of API keys, a line each; else $PLUMBLINE_API_KEYS, separated by commas"}
    )
    no_auth: bool = field(default=False, metadata={"help": "serve beyond this machine without any key"})
    requests_per_minute: int = field(default=0, metadata={"help": "of each key; 0 for no limit"})
    concurrent: int = field(default=0, metadata={"help": "requests of each key at a time; 0 for no limit"})
    cors: tuple[str, ...] = field(
        default=(), metadata={"help": "origin whose pages may call the server; none by default"}
    )
    max_body: int = field(default=2 * 2**20, metadata={"help": "bytes of a request"})
    deadline_s: float = field(default=300.0, metadata={"help": "seconds that an answer may take, queue included"})
    drain_s: float = field(default=30.0, metadata={"help": "seconds that running requests get after SIGTERM"})

    guard: str = field(default="default", metadata={"help": "a shipped policy, the path of a YAML file, or off"})
    guard_layers: tuple[str, ...] = field(default=GUARD_LAYERS, metadata={"help": "input, output, or both"})
    guard_log: str = field(
        default="", metadata={"help": "JSON Lines file for verdicts: hashes and categories, never text"}
    )
    guard_every: int = field(default=120, metadata={"help": "characters between two checks of a stream"})
    documents: str = field(default="", metadata={"help": "folder that answers are verified against"})
    index: str = field(default="", metadata={"help": "folder of an index made by `plumbline guard index`"})
    fact_action: str = field(default="annotate", metadata={"help": "annotate, correct, drop or abstain"})
    ban: tuple[str, ...] = field(default=(), metadata={"help": "phrase that no answer spells (local backend)"})
    expert: str = field(default="", metadata={"help": "folder of a safety adapter for SafeDecoding (local backend)"})
    reward_model: str = field(default="", metadata={"help": "model source of a reward model for best-of-n"})
    best_of: int = field(default=4, metadata={"help": "answers drawn for each one given, with --reward-model"})

    rows: int = field(default=16, metadata={"help": "answers at a time"})
    context: int = field(
        default=0, metadata={"help": "tokens of prompt and answer; 0: what the model knows, at most 4096"}
    )
    step_tokens: int = field(default=256, metadata={"help": "tokens that one step reads at most"})
    queue: int = field(default=64, metadata={"help": "requests that may wait; beyond: 429"})
    prefix_tokens: int = field(default=8192, metadata={"help": "tokens kept for requests that begin alike; 0 for none"})
    max_tokens: int = field(default=1024, metadata={"help": "of an answer whose request names no limit"})

    def __post_init__(self) -> None:
        self.engine()
        if self.backend not in ("local", "openai"):
            raise ValueError(f"backend={self.backend!r} must be local or openai")
        if (self.backend == "openai") != bool(self.url):
            raise ValueError("--backend openai and --url go together: the address of the server behind the guard")
        if self.backend == "openai" and (self.adapters or self.ban or self.expert):
            raise ValueError("--adapters, --ban and --expert need the weights: they do nothing with --backend openai")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port} must lie in [0, 65535]")
        for name in ("max_body", "best_of", "guard_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("deadline_s", "drain_s", "requests_per_minute", "concurrent"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if unknown := set(self.guard_layers) - set(GUARD_LAYERS):
            raise ValueError(f"guard_layers={sorted(unknown)}: must be of {', '.join(GUARD_LAYERS)}")
        if self.guard == "off" and (self.documents or self.index or self.guard_log):
            raise ValueError("--documents, --index and --guard-log do nothing with --guard off")
        if "*" in self.cors:
            raise ValueError("cors='*' would let any web page call the server; name the origins")
        self.named_adapters()

    def engine(self) -> EngineSettings:
        """The part that the engine reads."""
        names = [one.name for one in dataclasses.fields(EngineSettings)]
        return EngineSettings(**{name: getattr(self, name) for name in names})

    def named_adapters(self) -> dict[str, str]:
        """Adapters by name; ValueError for one without a name, or two of one name."""
        found: dict[str, str] = {}
        for one in self.adapters:
            name, equals, folder = one.partition("=")
            if not (name and equals and folder) or "." in name:
                raise ValueError(f"adapter {one!r}: write NAME=FOLDER, the name without dots")
            if name in found or name == self.served_name:
                raise ValueError(f"adapter {one!r}: the name is taken")
            found[name] = folder
        return found

    @property
    def served_name(self) -> str:
        """The name of the model in requests."""
        return self.name or self.model

    @property
    def local_only(self) -> bool:
        """Whether nothing but this machine can reach the server."""
        return self.host in LOOPBACK


def read_settings(path: str, given: dict[str, Any]) -> ServeSettings:
    """Settings of a YAML file (or the name of one that ships, or ""), with `given` in the place of its values."""
    values: dict[str, Any] = {}
    known = {one.name: one for one in dataclasses.fields(ServeSettings)}
    if path:
        file = resolve_config(path, "serve")
        read = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        if not isinstance(read, dict):
            raise ValueError(f"{file}: must be settings by name, a line each")
        if unknown := set(read) - set(known):
            raise ValueError(
                f"{file}: unknown settings {', '.join(sorted(map(str, unknown)))}; `plumbline serve --help` lists them"
            )
        for name, value in read.items():
            default = known[name].default
            if isinstance(default, tuple):
                value = tuple(value) if isinstance(value, list) else (value,)
            if isinstance(default, float) and type(value) is int:
                value = float(value)
            if type(value) is not type(default):
                raise ValueError(f"{file}: {name}={value!r} must be of the type of its default, {default!r}")
            values[name] = value
    return ServeSettings(**(values | given))
