"""`Serving`: who answers a run, the model and its adapters, and the workers, found or brought."""

from collections.abc import Callable, Iterable

from tokenmill.producer.client import Client
from tokenmill.producer.dataset import Row
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.journal import OutputError
from tokenmill.producer.local_worker import LocalWorker, is_alive, worker_options
from tokenmill.producer.plan import Plan
from tokenmill.producer.wire import WorkerInfo

DEFAULT_MODEL = "smollm2"


class Serving:
    """The model of a run, settled once, and the workers that serve it."""

    def __init__(self, plan: Plan, client: Client, *, embedded: bool) -> None:
        self.model = ""
        self.embedded = embedded
        self._plan = plan
        self._client = client
        self._worker: LocalWorker | None = None
        #: What rows may name as their model; empty as long as no worker has told.
        self._names: set[str] = set()
        #: What they may name as their adapter, as long as `_names` tells anything.
        self._adapters: set[str] = set()

    @property
    def has_brought(self) -> bool:
        """Whether `bring` was called: the worker may still be loading."""
        return self._worker is not None

    def settle(self, begun: str, named: str, check_model: Callable[[str], None]) -> bool:
        """Choose the model; returns whether a worker is live.

        `begun`: what the run was begun with. `named`: what its rows name. `check_model` raises for
        one that a worker of this machine cannot load.

        Raises:
            TokenmillError: no worker can serve it.
        """
        workers = self._workers()
        serving = sorted({name for worker in workers for name in worker.models})
        adapters = {text.partition("=")[0] for text in self._plan.lora}
        if self._plan.ignore_row_model or (named in adapters and not serving):
            named = ""
        if self._plan.model and begun not in ("", self._plan.model):
            raise OutputError(
                f"{self._plan.output} was begun with model {begun!r}, not {self._plan.model!r}; "
                "go on with that, or start anew with --overwrite"
            )
        wanted = self._plan.model or begun or named
        if serving and wanted and wanted not in serving:
            expected = f"one that queue {self._plan.queue} serves ({', '.join(serving)})"
            remedy = "or use another --queue, or stop the worker that serves it"
            raise InvalidRequest("model", expected, wanted, remedy)
        self.model = wanted or min((worker.model for worker in workers), default=DEFAULT_MODEL)
        self._learn(workers)
        if self.embedded and not serving:
            check_model(self.model)
            self._names, self._adapters = {self.model, *adapters}, adapters
        self._check_adapter(str(self._plan.sampling.get("adapter", "")))
        return bool(serving)

    def model_of(self, row: Row) -> str:
        """What answers a row."""
        return self.model if self._plan.ignore_row_model else row.model or self.model

    def check(self, row: Row) -> None:
        """Whether a worker serves what the row names.

        Raises:
            InvalidRequest: it does not.
        """
        model = self.model_of(row)
        if self._names and model not in self._names:
            expected = " or ".join(map(repr, sorted(self._names)))
            remedy = "or answer all rows alike: --ignore-row-model"
            raise InvalidRequest("model", expected, model, remedy)
        self._check_adapter(row.params.adapter)

    def is_live(self) -> bool:
        """Whether a worker serves the model.

        Raises:
            WorkerEnded: the one that was brought has ended.
            ServerUnreachable: nobody can tell.
        """
        if self._worker:
            self._worker.check()
        return self._learn(self._workers())

    def bring(self) -> None:
        """Start a worker; `stop` ends it."""
        self._worker = LocalWorker(
            self.model,
            url=self._client.url,
            queue=self._plan.queue,
            quantization=self._plan.quantization,
            kv_cache_dtype=self._plan.kv_cache_dtype,
            lora=self._plan.lora,
        )

    def missing(self) -> str:
        """What to start where no worker is live."""
        options = worker_options(
            self.model,
            quantization=self._plan.quantization,
            kv_cache_dtype=self._plan.kv_cache_dtype,
            lora=self._plan.lora,
        )
        text = f"a worker for {self.model} on queue {self._plan.queue}"
        return f"{text}; start one: tokenmill worker {' '.join(options)}"

    def stop(self) -> None:
        """End what was brought."""
        if self._worker:
            self._worker.stop()

    def _workers(self) -> list[WorkerInfo]:
        workers = self._client.workers()
        return [worker for worker in workers if not self.embedded or is_alive(worker)]

    def _learn(self, workers: Iterable[WorkerInfo]) -> bool:
        """Whether any serves the model; rows may name their adapters in its place."""
        serving = [worker for worker in workers if self.model in worker.models]
        for worker in serving:
            self._names.update(worker.models)
            self._adapters.update(worker.adapters)
        return bool(serving)

    def _check_adapter(self, name: str) -> None:
        if name and self._names and name not in self._adapters:
            self._learn(self._workers())  # one may have come since
        if name and self._names and name not in self._adapters:
            has = ", ".join(sorted(self._adapters)) or "none"
            expected = f"one that a worker of {self.model} has ({has})"
            raise InvalidRequest("adapter", expected, name, "load it with --lora NAME=DIRECTORY")
