"""Sentence vectors over HTTP: a FastAPI service that batches the texts of all its callers.

    pip install "fastffn[models]" fastapi uvicorn
    python embeddings_service.py MODEL [--int8 | --bf16] [--port 8080]
    curl localhost:8080/embed -H 'Content-Type: application/json' -d '{"inputs": ["One.", "Two."]}'

A request's texts join those that wait. A batch is taken when its tokens fill it, or when its first
text has waited some milliseconds; while it runs, the next one gathers. It is limited by tokens, not
by requests or texts: `fastffn.optimize` computes nothing for padding, so tokens are what it costs.

    200   vectors, in the order of the texts
    413   a text with more tokens than the model has positions, unless the request says
          "truncate": true; or a request that is too large to be taken at all
    429   too many tokens wait already: try again
    503   shutting down

Use one process for each copy of the model: its threads share every product.
"""

import argparse
import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import fastapi
import torch
import uvicorn
from fastapi.responses import JSONResponse
from pydantic import BaseModel

import fastffn
from fastffn.serve.interface import SENTENCE, Interface, Plain
from fastffn.serve.source import read


class Embedder:
    """A model that was made fast, with its tokenizer and its pooling.

    Args:
        name: a folder or hub name of an encoder; how it pools is read from its folder, else the
            mean is taken.
        dtype, quantize: as `fastffn.optimize` takes them.
    """

    def __init__(self, name: str, dtype: torch.dtype | None = None, quantize: str | None = None):
        found = read(name)
        if found.tokenizer is None:
            raise fastffn.UserError(f"{name} has no tokenizer: put tokenizer.json beside it")
        interface = Interface.of(found.model, found.pooling or "mean", found.normalize)
        optimized = fastffn.optimize(found.model, dtype=dtype, quantize=quantize)
        self.name, self.engine = name, str(optimized.report)
        self.tokenizer, self.pad = found.tokenizer, interface.pad
        self.model = Plain(optimized, interface).eval()
        limits = (found.max_length, interface.positions, self.tokenizer.model_max_length)
        self.longest = min(limit for limit in limits if limit is not None)

    def tokens(self, texts: list[str], truncate: bool) -> list[list[int]]:
        """Token ids of each text. A tokenizer may not be called by two threads at once."""
        options = {"max_length": self.longest, "truncation": truncate, "verbose": False}
        return self.tokenizer(texts, **options)["input_ids"]

    def vectors(self, batch: list[list[int]]) -> list[list[float]]:
        """The vectors of a batch of token ids."""
        longest = max(map(len, batch))
        ids = torch.tensor([text + [self.pad] * (longest - len(text)) for text in batch])
        lengths = torch.tensor([len(text) for text in batch])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        with torch.inference_mode():
            return self.model(ids, mask)[SENTENCE].float().tolist()


class Overloaded(Exception):
    """More tokens wait than may."""


class Closed(Exception):
    """Nothing is taken any more."""


@dataclass
class Waiting:
    ids: list[int]
    since: float
    vector: asyncio.Future = field(default_factory=asyncio.Future)


class Batcher:
    """Gathers texts of several callers into batches, and runs one batch after another.

    Args:
        run: makes vectors of a batch of token ids; called on one thread of its own.
        max_batch_tokens: of a batch; a longer text is a batch alone.
        max_wait_tokens: beyond them callers are turned away.
        max_delay: seconds that a text waits for others at most, if nothing runs.
    """

    def __init__(
        self,
        run: Callable[[list[list[int]]], list[list[float]]],
        max_batch_tokens: int = 4096,
        max_wait_tokens: int = 65536,
        max_delay: float = 0.003,
    ):
        self.run, self.max_delay = run, max_delay
        self.max_batch_tokens, self.max_wait_tokens = max_batch_tokens, max_wait_tokens
        self.waiting: deque[Waiting] = deque()
        self.waiting_tokens, self.closed = 0, False
        self.changed = asyncio.Condition()

    async def vectors(self, texts: list[list[int]]) -> list[list[float]]:
        """The vectors of a caller's texts, when they have had their turn."""
        tokens = sum(map(len, texts))
        async with self.changed:
            if self.closed:
                raise Closed
            if self.waiting_tokens + tokens > self.max_wait_tokens:
                raise Overloaded
            now = asyncio.get_running_loop().time()
            mine = [Waiting(ids, now) for ids in texts]
            self.waiting.extend(mine)
            self.waiting_tokens += tokens
            self.changed.notify_all()
        return await asyncio.gather(*(text.vector for text in mine))

    async def work(self) -> None:
        """Runs batches until `close`, and then those that still wait."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "model") as thread:
            while batch := await self._next():
                texts = [text.ids for text in batch]
                try:
                    found = await loop.run_in_executor(thread, self.run, texts)
                except Exception as error:  # of this batch; the next one may do
                    for text in batch:
                        if not text.vector.done():
                            text.vector.set_exception(error)
                else:
                    for text, vector in zip(batch, found, strict=True):
                        if not text.vector.done():  # its caller may have gone meanwhile
                            text.vector.set_result(vector)

    async def close(self) -> None:
        async with self.changed:
            self.closed = True
            self.changed.notify_all()

    async def _next(self) -> list[Waiting]:
        """The next batch; empty when there will be none."""
        async with self.changed:
            while self.waiting or not self.closed:
                await self.changed.wait_for(lambda: self.waiting or self.closed)
                if self.waiting:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout_at(self.waiting[0].since + self.max_delay):
                            await self.changed.wait_for(self._is_full)
                if batch := self._take():
                    return batch
        return []

    def _is_full(self) -> bool:
        return self.closed or self.waiting_tokens >= self.max_batch_tokens

    def _take(self) -> list[Waiting]:
        """First come, first served, without those whose callers have gone."""
        batch, tokens, longest = [], 0, 0
        while self.waiting:
            text = self.waiting[0]
            tokens, longest = tokens + len(text.ids), max(longest, len(text.ids))
            # One long text among many short ones would still make a large tensor of padding.
            area = longest * (len(batch) + 1)
            if batch and (tokens > self.max_batch_tokens or area > 4 * self.max_batch_tokens):
                break
            self.waiting.popleft()
            self.waiting_tokens -= len(text.ids)
            if text.vector.done():
                tokens -= len(text.ids)
            else:
                batch.append(text)
        return batch


class Texts(BaseModel):
    """What /embed takes."""

    inputs: str | list[str]
    truncate: bool = False


def service(embedder: Embedder, max_texts: int = 1024, **limits: float) -> fastapi.FastAPI:
    """The application; `limits` are those of `Batcher`."""
    batcher = Batcher(embedder.vectors, **limits)
    tokenizing = ThreadPoolExecutor(1, "tokenizer")

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI):
        app.state.work = asyncio.create_task(batcher.work())
        yield
        await batcher.close()
        await app.state.work
        tokenizing.shutdown()

    app = fastapi.FastAPI(title="Sentence vectors", lifespan=lifespan)

    @app.post("/embed")
    async def embed(request: Texts) -> JSONResponse:
        texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        if len(texts) > max_texts:
            raise fastapi.HTTPException(413, f"{len(texts)} texts, at most {max_texts}: split them")
        if not texts:
            return JSONResponse([])
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(tokenizing, embedder.tokens, texts, request.truncate)
        for k, ids in enumerate(tokens):
            if len(ids) > embedder.longest:
                raise fastapi.HTTPException(
                    413,
                    f"inputs[{k}]: {len(ids)} tokens, at most {embedder.longest}: shorten it, or "
                    'send "truncate": true',
                )
        if sum(map(len, tokens)) > batcher.max_wait_tokens:
            raise fastapi.HTTPException(
                413, f"more than {batcher.max_wait_tokens} tokens in one request: split it"
            )
        try:
            return JSONResponse(await batcher.vectors(tokens))
        except Overloaded:
            raise fastapi.HTTPException(
                429, "too many texts wait: try again", {"Retry-After": "1"}
            ) from None
        except Closed:
            raise fastapi.HTTPException(503, "shutting down") from None

    @app.get("/health")
    async def health() -> dict[str, str]:
        if batcher.closed or app.state.work.done():
            raise fastapi.HTTPException(503, "no more batches are run")
        return {"status": "ok"}

    @app.get("/info")
    async def info() -> dict[str, str | int]:
        return {
            "model": embedder.name,
            "engine": embedder.engine,
            "longest": embedder.longest,
            "waiting_tokens": batcher.waiting_tokens,
        }

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves sentence vectors over HTTP.")
    add = parser.add_argument
    add("model", help="a folder or hub name of an encoder")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--bf16", action="store_true", help="weights in bfloat16")
    kind.add_argument("--int8", action="store_true", help="weights in 8 bits")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8080)
    add("--max-batch-tokens", type=int, default=4096, metavar="N", help="(default: %(default)s)")
    add("--max-wait-tokens", type=int, default=65536, metavar="N", help="(default: %(default)s)")
    add("--max-delay", type=float, default=3, metavar="MS", help="(default: %(default)s)")
    options = parser.parse_args()
    try:
        embedder = Embedder(
            options.model,
            torch.bfloat16 if options.bf16 else None,
            "int8" if options.int8 else None,
        )
    except fastffn.UserError as error:
        parser.error(str(error))
    print(f"{options.model}: {embedder.engine}", flush=True)
    app = service(
        embedder,
        max_batch_tokens=options.max_batch_tokens,
        max_wait_tokens=options.max_wait_tokens,
        max_delay=options.max_delay / 1000,
    )
    uvicorn.run(app, host=options.host, port=options.port, timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()
