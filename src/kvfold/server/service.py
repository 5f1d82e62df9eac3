"""From checked requests to their updates: the queue, the clocks, the time limit, cancellation."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from kvfold.config.method import choose_method
from kvfold.errors import KvfoldError
from kvfold.server.engine_client import EngineClient
from kvfold.server.http_errors import APIError, as_api_error
from kvfold.server.limits import Queue
from kvfold.server.messages import Add, EngineOptions, Ready, Update
from kvfold.server.metrics import Metrics, RequestTimer
from kvfold.server.options import ServerOptions
from kvfold.server.text import Text

log = logging.getLogger("kvfold.server")


class Service:
    """What the routes share. `draining`: finish what runs, take nothing new."""

    def __init__(self, client: EngineClient, engine: EngineOptions, options: ServerOptions) -> None:
        self.client = client
        self.methods = engine.kv
        self.options = options
        self.metrics = Metrics(client)
        self.draining = False
        self.running = 0  # requests being answered
        self._queue = Queue(options.max_queue, options.max_queue_tokens)
        self._text: Text | None = None
        self._loading = asyncio.Lock()

    async def track(self) -> AsyncGenerator[None, None]:
        """A route's dependency: its requests count as running from their arrival to the last byte of the answer."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    @property
    def ready(self) -> Ready:
        """What the engine said of itself. Raises APIError (503) where it is not ready for requests."""
        if self.draining:
            raise APIError(503, "the server is shutting down; try another one", headers={"Retry-After": "5"})
        if self.client.status != "ready" or self.client.ready is None:
            message = f"the engine is not ready ({self.client.status}): {self.client.reason}"
            raise APIError(503, message, code="engine_not_ready", headers={"Retry-After": "5"})
        return self.client.ready

    async def text(self) -> Text:
        """The tokenizer, loaded when the model's directory is known. Raises APIError (503) before that."""
        ready = self.ready
        async with self._loading:
            if self._text is None:
                self._text = await asyncio.to_thread(Text, ready)
        return self._text

    def log_prompts(self, prompts: object) -> None:
        """Prompts are in the log only where the operator asked for it."""
        if self.options.log_prompts:
            log.info("prompt: %r", prompts)

    def check_model(self, name: str | None) -> str:
        """The model's name. Raises APIError (404) for another one."""
        served = self.options.served_model
        if name is not None and name != served:
            raise APIError(
                404,
                f"the model {name[:100]!r} does not exist; this server has {served!r}",
                param="model",
                code="model_not_found",
            )
        return served

    def lane(self, kv: str | None) -> int:
        """The lane of a method. Raises APIError (400) for one that the server was not started with."""
        try:
            return choose_method(self.methods, kv)
        except KvfoldError as error:
            raise APIError(400, str(error), param="kv", code="unknown_kv_method") from error

    def check_queue(self) -> None:
        """Raises APIError (429) where the queue is full: before the work of preparing a request."""
        self._queue.check(self.metrics.prompt_rate())

    def check_length(self, tokens: int, max_tokens: int | None, lane: int, param: str) -> None:
        """Raises APIError (400) for a request that the model or the memory can never hold. param: the prompt's."""
        ready = self.ready
        if tokens + (max_tokens or 1) > ready.max_positions:
            wanted = f"{tokens} prompt tokens" + (f" and max_tokens={max_tokens}" if max_tokens else "")
            message = f"the model takes {ready.max_positions} tokens, the request has {wanted}; shorten it"
            raise APIError(400, message, param=param, code="context_length_exceeded")
        if tokens + 1 > ready.longest[lane]:
            message = (
                f"the prompt has {tokens} tokens, the server's KV memory holds {ready.longest[lane] - 1} with "
                f"{self.methods[lane]}; shorten it or choose another kv"
            )
            raise APIError(400, message, param="kv", code="kv_memory_exceeded")

    async def run(self, adds: list[Add]) -> AsyncGenerator[tuple[int, Update], None]:
        """Updates of one or several requests as they come, with the index of the request each belongs to.

        Closing the iterator cancels what has not ended. Raises APIError: 429 for a full queue, 504 after the time
        limit, 500 where the engine is lost, 400 where a request turns out to be impossible.
        """
        deadline = asyncio.get_running_loop().time() + self.options.request_timeout
        merged: asyncio.Queue[tuple[int, Update | BaseException]] = asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []
        try:
            with self._queue.places([len(a.prompt_token_ids) for a in adds], self.metrics.prompt_rate()) as places:
                left = len(adds)
                for index, add in enumerate(adds):
                    tasks.append(asyncio.create_task(self._forward(index, add, merged), name=f"request {add.id}"))
                while left:
                    try:
                        async with asyncio.timeout_at(deadline):
                            index, update = await merged.get()
                    except TimeoutError:
                        for task in tasks:
                            task.cancel("timeout")
                        message = f"the request took longer than {self.options.request_timeout:g} s and was cancelled"
                        raise APIError(504, message, code="timeout") from None
                    if isinstance(update, BaseException):
                        raise update
                    places[index].leave()
                    left -= update.finished
                    yield index, update
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, index: int, add: Add, merged: "asyncio.Queue[tuple[int, Update | BaseException]]") -> None:
        timer = self.metrics.request(self.methods[add.lane], len(add.prompt_token_ids))
        try:
            async with aclosing(self._updates(add, timer)) as updates:
                async for update in updates:
                    merged.put_nowait((index, update))
        except asyncio.CancelledError as error:
            timer.fail("timeout" if error.args == ("timeout",) else "cancelled")
            raise
        except APIError as error:
            timer.fail(str(error.body["error"]["code"] or error.status))
            merged.put_nowait((index, error))
        except Exception as error:  # a defect: whoever waits for updates must hear of it
            timer.fail("defect")
            merged.put_nowait((index, error))

    async def _updates(self, add: Add, timer: RequestTimer) -> AsyncGenerator[Update, None]:
        reasons: dict[int, str] = {}
        try:
            async with aclosing(self.client.stream(add)) as stream:
                async for update in stream:
                    timer.tokens(sum(len(piece.token_ids) for piece in update.pieces))
                    for piece in update.pieces:
                        if piece.finish_reason == "error":
                            raise APIError(500, str(piece.stop_reason), code="generation_failed")
                        if piece.finish_reason is not None:
                            reasons[piece.index] = piece.finish_reason
                    if update.finished:
                        timer.end(list(reasons.values()))
                    yield update
        except KvfoldError as error:
            raise as_api_error(error) from error
