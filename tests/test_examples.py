"""examples/: the service of sentence vectors, called as its users call it."""

import asyncio
import contextlib
import importlib.util
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from patience import PATIENCE, wait_for
from tiny_teacher import save_teacher

from fastffn.serve import load

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
FILE = Path(__file__).parents[1] / "examples" / "embeddings_service.py"
TEXTS = ["bara doti", "", "kisu " * 20, "luvo.", "mera noti kira"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("embeddings_service", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks annotations up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("service") / "model")


@pytest.fixture(scope="module")
def embedder(example, folder):
    return example.Embedder(str(folder))


@contextlib.asynccontextmanager
async def client(app):
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield http


async def embed(http, inputs, **more):
    return await http.post("/embed", json={"inputs": inputs, **more})


def expected(folder, texts):
    return load(folder).encode(texts, pooling="mean")


def is_close(found, want):
    torch.testing.assert_close(torch.tensor(found), want, rtol=1e-4, atol=1e-4)


class Held:
    """An embedder whose model waits until it is let go, and notes its batches."""

    longest = 32

    def __init__(self):
        self.go, self.batches = threading.Event(), []
        self.name = self.engine = "held"

    def tokens(self, texts, truncate):
        return [[ord(letter) for letter in text] for text in texts]

    def vectors(self, batch):
        self.batches.append([len(ids) for ids in batch])
        assert self.go.wait(60)
        if any(ord("!") in ids for ids in batch):
            raise RuntimeError("this text cannot be run")
        return [[float(len(ids)), float(sum(ids))] for ids in batch]

    async def is_running(self):
        while not self.batches:
            await asyncio.sleep(0.001)


def test_vectors_are_the_models(example, embedder, folder):
    async def run():
        async with client(example.service(embedder)) as http:
            several = await embed(http, TEXTS)
            one = await embed(http, TEXTS[0])
            none = await embed(http, [])
            return several, one, none

    several, one, none = asyncio.run(run())
    assert several.status_code == 200
    is_close(several.json(), expected(folder, TEXTS))
    is_close(one.json(), expected(folder, TEXTS[:1]))
    assert none.json() == []


def test_callers_share_batches_that_are_as_full_as_tokens_allow(example):
    held = Held()
    requests = [["a" * 3], ["b" * 4, "c" * 5], ["d" * 6], ["e" * 7]]

    async def run():
        async with client(example.service(held, max_batch_tokens=18)) as http:
            first = asyncio.create_task(embed(http, "first"))
            await held.is_running()
            rest = []
            for texts in requests:  # in this order
                rest.append(asyncio.create_task(embed(http, texts)))
                await asyncio.sleep(0.1)
            held.go.set()
            return await asyncio.gather(first, *rest)

    _, *answers = asyncio.run(run())
    assert held.batches == [[5], [3, 4, 5, 6], [7]]
    for texts, answer in zip(requests, answers, strict=True):
        assert answer.json() == [[len(x), sum(map(ord, x))] for x in texts]


def test_texts_that_come_together_wait_for_one_another(example):
    held = Held()
    held.go.set()

    async def run():
        async with client(example.service(held, max_delay=2)) as http:
            await asyncio.gather(*(embed(http, "x" * k) for k in range(1, 5)))

    asyncio.run(run())
    assert [sorted(batch) for batch in held.batches] == [[1, 2, 3, 4]]


def test_a_long_text_does_not_pad_many_short_ones(example):
    async def run():
        batcher = example.Batcher(None, max_batch_tokens=40)
        lengths = [20, *[1] * 12]
        batcher.waiting.extend(example.Waiting([0] * k, 0.0) for k in lengths)
        batcher.waiting_tokens = sum(lengths)
        return [len(batcher._take()), len(batcher._take()), batcher.waiting_tokens]

    assert asyncio.run(run()) == [8, 5, 0]


def test_texts_beyond_the_positions_are_refused_or_cut(example, embedder, folder):
    long = "bara " * 50

    async def run():
        async with client(example.service(embedder)) as http:
            return await embed(http, ["bara", long]), await embed(http, long, truncate=True)

    refused, cut = asyncio.run(run())
    assert refused.status_code == 413
    assert refused.json()["detail"].startswith("inputs[1]: 52 tokens, at most 32")
    is_close(cut.json(), expected(folder, [long]))


@pytest.mark.parametrize(
    "body, status",
    [
        ({"inputs": ["a"] * 5}, 413),
        ({"inputs": ["a" * 20, "b" * 20]}, 413),
        ({"inputs": [1]}, 422),
        ({}, 422),
    ],
)
def test_requests_that_are_wrong_or_too_large(example, body, status):
    async def run():
        app = example.service(Held(), max_texts=4, max_wait_tokens=30)
        async with client(app) as http:
            return await http.post("/embed", json=body)

    answer = asyncio.run(run())
    assert answer.status_code == status and answer.json()["detail"]


def test_an_overload_is_answered_at_once_and_passes(example):
    held = Held()

    async def run():
        async with client(example.service(held, max_wait_tokens=30)) as http:
            first = asyncio.create_task(embed(http, "first"))
            await held.is_running()
            second = asyncio.create_task(embed(http, "a" * 25))
            await asyncio.sleep(0.1)
            refused = await embed(http, "b" * 10)
            held.go.set()
            await asyncio.gather(first, second)
            return refused, await embed(http, "b" * 10)

    refused, later = asyncio.run(run())
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert later.status_code == 200


def test_a_batch_that_fails_takes_no_other_with_it(example):
    held = Held()
    held.go.set()

    async def run():
        async with client(example.service(held)) as http:
            return await embed(http, "no!"), await embed(http, "yes"), await http.get("/health")

    failed, after, health = asyncio.run(run())
    assert [failed.status_code, after.status_code, health.status_code] == [500, 200, 200]


def test_callers_that_have_gone_are_not_served(example):
    held = Held()

    async def run():
        batcher = example.Batcher(held.vectors)
        work = asyncio.create_task(batcher.work())
        first = asyncio.create_task(batcher.vectors([[1]]))
        await held.is_running()
        gone = asyncio.create_task(batcher.vectors([[1, 2]]))
        stays = asyncio.create_task(batcher.vectors([[1, 2, 3]]))
        await asyncio.sleep(0.05)
        gone.cancel()
        held.go.set()
        found = [await first, await stays]
        await batcher.close()
        await work
        return found, batcher.waiting_tokens

    assert asyncio.run(run()) == ([[[1.0, 1.0]], [[3.0, 6.0]]], 0)
    assert held.batches == [[1], [3]]


def test_what_waits_at_shutdown_is_served_and_nothing_more_is_taken(example):
    held = Held()

    async def run():
        app = example.service(held)
        transport = httpx.ASGITransport(app)
        http = httpx.AsyncClient(transport=transport, base_url="http://test")
        lifespan = app.router.lifespan_context(app)
        await lifespan.__aenter__()
        before = (await http.get("/health")).status_code
        first = asyncio.create_task(embed(http, "first"))
        await held.is_running()
        second = asyncio.create_task(embed(http, "second"))
        await asyncio.sleep(0.1)
        end = asyncio.create_task(lifespan.__aexit__(None, None, None))
        await asyncio.sleep(0.1)
        refused, after = await embed(http, "third"), (await http.get("/health")).status_code
        held.go.set()
        answers = [(await task).status_code for task in (first, second)]
        await end
        return before, answers, refused.status_code, after

    assert asyncio.run(run()) == (200, [200, 200], 503, 503)


def test_many_callers_at_once(example, embedder, folder):
    texts = [" ".join(["bara", "doti", "kisu"][: k % 3 + 1]) for k in range(60)]

    async def run():
        async with client(example.service(embedder, max_batch_tokens=20)) as http:
            return await asyncio.gather(*(embed(http, [text]) for text in texts))

    answers = asyncio.run(run())
    is_close([answer.json()[0] for answer in answers], expected(folder, texts))


def test_the_program_ends_only_after_its_answers(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Texts wait three seconds for others, so they still do when the signal comes.
    command = [sys.executable, FILE, folder, "--port", str(port), "--max-delay", "3000"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"

    def is_up():
        assert server.poll() is None, server.stdout.read()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health").status_code == 200

    try:
        wait_for(is_up)
        with ThreadPoolExecutor(1) as caller:
            body = {"inputs": TEXTS}
            answer = caller.submit(httpx.post, f"{url}/embed", json=body, timeout=PATIENCE)
            wait_for(lambda: answer.done() or httpx.get(f"{url}/info").json()["waiting_tokens"])
            server.send_signal(signal.SIGTERM)
            assert answer.result().status_code == 200
        said, _ = server.communicate(timeout=PATIENCE)
    finally:
        server.kill()
        server.wait()
    assert "csrc, float32" in said and server.returncode in (0, -signal.SIGTERM)


def test_a_folder_that_is_no_model_is_one_line(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["embeddings_service.py", str(tmp_path / "absent")])
    with pytest.raises(SystemExit) as end:
        example.main()
    assert end.value.code == 2 and "does not exist" in capsys.readouterr().err
