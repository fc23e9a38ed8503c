"""Counters and times for Prometheus, of the whole server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tinylm.serve.models import ModelStore
from tinylm.serve.responses import Record


class Metrics:
    """The content of GET /metrics."""

    def __init__(self, store: ModelStore):
        self.store = store
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tinylm_requests",
            "Requests by path and status",
            ("path", "status"),
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "tinylm_prompt_tokens", "Tokens of prompts", registry=self.registry
        )
        self.new_tokens = Counter(
            "tinylm_generated_tokens", "Tokens that were generated", registry=self.registry
        )
        self.seconds = Histogram(
            "tinylm_request_seconds", "Time of a request", ("path",), registry=self.registry
        )
        self.first_token = Histogram(
            "tinylm_first_token_seconds", "Time to the first token", registry=self.registry
        )
        texts = Gauge("tinylm_texts", "Texts that are generated or wait", registry=self.registry)
        texts.set_function(lambda: sum(m.worker.n_texts for m in store.in_memory.values()))
        models = Gauge("tinylm_models", "Models in memory", registry=self.registry)
        models.set_function(lambda: len(store.in_memory))

    def add(self, path: str, status: int, seconds: float, record: Record) -> None:
        """Count a request."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)
        self.prompt_tokens.inc(record.n_prompt_tokens)
        self.new_tokens.inc(record.n_new_tokens)
        if record.first_token is not None:
            self.first_token.observe(record.first_token)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
