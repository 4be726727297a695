"""What a server measures about itself, for Prometheus; named after OpenTelemetry's conventions for generative AI where they have a name.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/
"""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from plumbline.safety.findings import Verdict

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class ServeMetrics:
    """Counters and histograms of one server, in a registry of their own. Labels never hold text of a request."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._first = Histogram(
            "gen_ai_server_time_to_first_token_seconds", "request received to first token", ["gen_ai_request_model"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._between = Histogram(
            "gen_ai_server_time_per_output_token_seconds", "between two tokens of an answer", ["gen_ai_request_model"],
            buckets=_TOKEN_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._duration = Histogram(
            "gen_ai_server_request_duration_seconds", "a whole request", ["route", "status"], buckets=_SECONDS, registry=self.registry
        )  # fmt: skip
        self._tokens = Counter(
            "gen_ai_client_token_usage", "tokens", ["gen_ai_request_model", "gen_ai_token_type"], registry=self.registry
        )  # fmt: skip
        self._verdicts = Counter(
            "plumbline_verdicts", "verdicts of the guard", ["layer", "action"], registry=self.registry
        )
        self._findings = Counter(
            "plumbline_findings", "findings of the guard", ["layer", "category"], registry=self.registry
        )
        self._scanner_failures = Counter(
            "plumbline_scanner_failures", "scanners that failed", ["scanner", "status"], registry=self.registry
        )

    def first_token(self, model: str, seconds: float) -> None:
        """From the request to its first token, before any check of the answer."""
        self._first.labels(model).observe(seconds)

    def between_tokens(self, model: str, seconds: float) -> None:
        """From one token to the next."""
        self._between.labels(model).observe(seconds)

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request that was answered; `route` is the path of the route, not of the request."""
        self._duration.labels(route, str(status)).observe(seconds)

    def usage(self, model: str, prompt: int, completion: int) -> None:
        """Tokens of a request."""
        self._tokens.labels(model, "input").inc(prompt)
        self._tokens.labels(model, "output").inc(completion)

    def verdict(self, layer: str, verdict: Verdict) -> None:
        """One verdict of the guard."""
        self._verdicts.labels(layer, verdict.action.name.lower()).inc()
        for category in {str(found.category) for found in verdict.findings}:
            self._findings.labels(layer, category).inc()
        for run in verdict.runs:
            if str(run.status) in ("error", "timeout"):
                self._scanner_failures.labels(run.scanner, str(run.status)).inc()

    def watch(self, stats: Callable[[], Mapping[str, float]]) -> None:
        """Gauges that are read when they are asked for."""
        for name in stats():
            gauge = Gauge(f"plumbline_engine_{name}", f"{name.replace('_', ' ')} in the engine", registry=self.registry)
            gauge.set_function(lambda name=name: stats()[name])  # type: ignore[misc]

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
