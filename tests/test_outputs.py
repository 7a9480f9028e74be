"""Outputs on disk: read back as given, never half made, continued after a kill, damage noticed."""

import errno
import itertools
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from patience import PATIENCE

from fastffn.distill import output_files
from fastffn.distill.outputs import OutputCache, model_fingerprint, padded
from fastffn.errors import UserError

LENGTHS = np.random.default_rng(0).integers(1, 12, 50)
OUTPUTS = {"hidden.3": (True, 6), "logits": (True, 2, "float32"), "vector": (False, 4)}
FILES = ("offsets", "ids", *OUTPUTS)
BUDGET = 30  # tokens per batch


def values(number: int, name: str) -> torch.Tensor:
    """What sequence `number` gives, float32 [length, width] or [width]."""
    by_token, width, *_ = OUTPUTS[name]
    generator = torch.Generator().manual_seed(1000 * int(number) + width)
    shape = (int(LENGTHS[number]), width) if by_token else (width,)
    return torch.randn(shape, generator=generator)


class Forward:
    """Gives `values`, padded with not-a-number, and remembers what it was asked for."""

    def __init__(self, fails_at=None):
        self.batches, self.fails_at = [], fails_at

    @property
    def numbers(self):
        return list(itertools.chain(*self.batches))

    def __call__(self, numbers):
        if len(self.batches) == self.fails_at:
            raise KeyboardInterrupt
        self.batches.append(numbers.tolist())
        results = {"unused": torch.zeros(1)}
        for name, (by_token, *_) in OUTPUTS.items():
            rows = [values(k, name) for k in numbers]
            if by_token:  # padded further than the longest
                rows = [*rows, torch.zeros(16, rows[0].shape[1])]
                nan = float("nan")
                stacked = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=nan)
                results[name] = stacked[:-1]
            else:
                results[name] = torch.stack(rows)
        return results


@pytest.fixture
def compute(tmp_path):
    def compute(forward=None, directory=tmp_path / "outputs", **changes):
        arguments = {
            "fingerprint": "a model",
            "lengths": LENGTHS,
            "outputs": OUTPUTS,
            "forward": forward or Forward(),
            "beside": {"ids": np.arange(LENGTHS.sum(), dtype=np.int32)},
            "tokens_per_batch": BUDGET,
            **changes,
        }
        return OutputCache.open_or_compute(directory, **arguments)

    return compute


def contents(directory):
    return {name: (directory / f"{name}.npy").read_bytes() for name in FILES}


def test_batches_hold_what_the_forward_gave(compute):
    cache = compute()
    assert len(cache) == 50 and cache.lengths.tolist() == LENGTHS.tolist()
    chosen = [7, 0, 7, 31]
    batch = cache.batch(chosen)
    assert list(batch) == list(OUTPUTS)
    length = LENGTHS[chosen].max()
    for name, (by_token, width, *_) in OUTPUTS.items():
        assert batch[name].dtype == torch.float32
        assert batch[name].shape == ((4, length, width) if by_token else (4, width))
        for row, number in zip(batch[name], chosen, strict=True):
            expected = values(number, name)
            expected = expected if name == "logits" else expected.half().float()
            if by_token:
                assert row[len(expected) :].eq(0).all()
                row = row[: len(expected)]
            assert torch.equal(row, expected)
    assert list(cache.batch(chosen, ["vector"])) == ["vector"]
    ids = padded(cache.beside["ids"], cache.offsets, np.array(chosen), fill=-1)
    assert ids[1].tolist() == [*range(LENGTHS[0]), *[-1] * (length - LENGTHS[0])]


def test_the_forward_sees_each_once_the_longest_first(compute):
    forward, seen = Forward(), []
    compute(forward, progress=lambda *numbers: seen.append(numbers))
    order = forward.numbers
    assert sorted(order) == list(range(50))
    assert LENGTHS[order].tolist() == sorted(LENGTHS, reverse=True)
    assert all(len(batch) * LENGTHS[batch].max() <= BUDGET for batch in forward.batches)
    total = LENGTHS.sum()
    assert seen[-1] == (total, total) and len(seen) == len(forward.batches)
    compute(forward := Forward(), fingerprint="one at a time", tokens_per_batch=1)
    assert len(forward.batches) == 50


def test_the_same_is_opened_anything_else_computed(compute, tmp_path):
    before = compute().fingerprint
    compute(forward := Forward())
    compute(forward, tokens_per_batch=7)
    assert not forward.batches
    changes = [
        {"fingerprint": "another model"},
        {"lengths": LENGTHS[:-1]},
        {"outputs": {**OUTPUTS, "logits": (True, 2)}},
        {"outputs": {"hidden.3": (True, 6)}},
        {"beside": {"ids": np.zeros(5)}},
        {"beside": None},
    ]
    for change in changes:
        cache = compute(forward := Forward(), **change)
        assert forward.batches and cache.fingerprint != before, change
    assert not (tmp_path / "outputs/ids.npy").exists()  # an older cache's files are removed


@pytest.mark.parametrize("batches", [0, 1, 5, -1])
def test_a_killed_run_is_continued_with_the_same_bits(compute, tmp_path, batches):
    compute(whole := Forward(), tmp_path / "whole")
    killed = Forward(fails_at=batches % len(whole.batches))
    with pytest.raises(KeyboardInterrupt):
        compute(killed, save_seconds=0)
    with pytest.raises(UserError, match="holds no teacher outputs"):
        OutputCache(tmp_path / "outputs")
    seen = []
    compute(rest := Forward(), progress=lambda done, _: seen.append(done))
    assert killed.batches + rest.batches == whole.batches
    assert seen[0] == LENGTHS[[*killed.numbers, *rest.batches[0]]].sum()
    assert contents(tmp_path / "outputs") == contents(tmp_path / "whole")


def test_what_was_begun_for_something_else_is_not_continued(compute, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compute(Forward(fails_at=3), save_seconds=0, fingerprint="another model")
    compute(forward := Forward())
    assert len(forward.numbers) == 50
    with pytest.raises(KeyboardInterrupt):
        compute(Forward(fails_at=3), save_seconds=0, fingerprint="another model")
    os.truncate(tmp_path / "outputs/hidden.3.npy", 300)
    compute(forward := Forward(), fingerprint="another model")
    assert len(forward.numbers) == 50


@pytest.mark.parametrize("call", range(5))
def test_a_kill_before_the_index_is_written_leaves_no_whole_cache(
    compute, tmp_path, monkeypatch, call
):
    """At the start (0), between batches, and at the end, over an older cache of something else."""
    compute(forward := Forward(), tmp_path / "whole", tokens_per_batch=200)
    assert len(forward.batches) == 3
    calls, write = [], output_files.write_text_atomic

    def killed(*arguments):
        calls.append(1)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        write(*arguments)

    compute(fingerprint="an older one")
    monkeypatch.setattr(output_files, "write_text_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        compute(tokens_per_batch=200, save_seconds=0)
    with pytest.raises(UserError):
        OutputCache(tmp_path / "outputs")
    monkeypatch.undo()
    compute(tokens_per_batch=200)
    assert contents(tmp_path / "outputs") == contents(tmp_path / "whole")


def test_a_process_killed_at_once_loses_only_what_was_not_saved(tmp_path):
    code = """
import os, sys
import numpy as np, torch
from fastffn.distill.outputs import OutputCache
calls = []
def forward(numbers):
    calls.append(1)
    if sys.argv[2] == "die" and len(calls) == 4:
        os.kill(os.getpid(), 9)
    return {"x": torch.from_numpy(numbers)[:, None] * torch.ones(3)}
cache = OutputCache.open_or_compute(
    sys.argv[1], "f", np.full(20, 5), {"x": (False, 3)}, forward,
    tokens_per_batch=10, save_seconds=0)
assert torch.equal(cache.batch(range(20))["x"][:, 0], torch.arange(20.0))
print(len(calls))
"""

    def run(what):
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), what], capture_output=True, text=True
        )

    assert run("die").returncode == -signal.SIGKILL
    assert run("live").stdout.strip() == "7"
    assert run("live").stdout.strip() == "0"


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_noticed(compute, tmp_path, caplog, name):
    compute()
    path = tmp_path / f"outputs/{name}.npy"
    whole = path.read_bytes()
    os.truncate(path, len(whole) - 1)
    with pytest.raises(UserError, match=rf"{name}\.npy was cut or altered"):
        OutputCache(tmp_path / "outputs")
    with caplog.at_level(logging.WARNING):
        compute(forward := Forward())
    assert forward.batches and path.read_bytes() == whole
    assert "cut or altered" in caplog.text
    path.unlink()
    compute(forward := Forward())
    assert forward.batches


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_is_noticed(compute, tmp_path, name):
    compute()
    path = tmp_path / f"outputs/{name}.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    compute(forward := Forward())
    assert forward.batches and path.read_bytes() == whole


def test_a_copied_directory_is_as_good(compute, tmp_path):
    compute()
    shutil.copytree(tmp_path / "outputs", tmp_path / "copy", copy_function=shutil.copyfile)
    compute(forward := Forward(), tmp_path / "copy")
    assert not forward.batches


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "sizes": {}}'])
def test_a_spoilt_index_is_no_cache(compute, tmp_path, text):
    compute()
    (tmp_path / "outputs/index.json").write_text(text)
    with pytest.raises(UserError, match="holds no teacher outputs"):
        OutputCache(tmp_path / "outputs")
    compute(forward := Forward())
    assert forward.batches


def test_an_index_cannot_name_files_elsewhere(compute, tmp_path):
    compute()
    path = tmp_path / "outputs/index.json"
    index = json.loads(path.read_text())
    index["sizes"]["../precious"] = 1
    path.write_text(json.dumps(index))
    (tmp_path / "precious.npy").write_text("!")
    compute(fingerprint="another model")
    assert (tmp_path / "precious.npy").exists()


def test_values_that_cannot_be_kept_are_refused(compute, tmp_path):
    def forward(value):
        return lambda numbers: {"x": torch.full((len(numbers), 1), value)}

    def one(value, dtype):
        return compute(forward(value), outputs={"x": (False, 1, dtype)}, fingerprint=str(value))

    with pytest.raises(UserError, match="teacher's x does not fit half precision"):
        one(1e5, "float16")
    with pytest.raises(UserError):
        OutputCache(tmp_path / "outputs")
    assert one(1e5, "float32").batch([3])["x"].item() == 1e5
    for dtype in ("float16", "float32"):
        with pytest.raises(UserError, match="teacher's x"):
            one(float("nan"), dtype)
    assert one(torch.tensor(0.1, dtype=torch.bfloat16), "float32").batch([0])["x"] == 0.10009765625


def test_wrong_calls(compute, tmp_path):
    with pytest.raises(UserError, match="no sequences"):
        compute(lengths=[])
    for outputs in (
        {"../x": (True, 1)},
        {"offsets": (True, 1)},
        {"ids": (True, 1)},
        {"": (True, 1)},
    ):
        with pytest.raises(ValueError, match="no name for a file"):
            compute(outputs=outputs)
    with pytest.raises(ValueError, match="width 0"):
        compute(outputs={"x": (True, 0)})
    with pytest.raises(ValueError, match="type int8"):
        compute(outputs={"x": (True, 1, "int8")})
    for name, shape in {"x": (True, 7), "vector": (False, 1)}.items():
        wrong = {"hidden.3": torch.zeros(2, 11, 1)}
        with pytest.raises((ValueError, KeyError)):
            compute(lambda numbers, wrong=wrong: wrong, outputs={name: shape})
    with pytest.raises(
        ValueError, match=r"forward gave hidden\.3 as \(2, 5, 6\), expected \(2, 11"
    ):
        compute(lambda numbers: {"hidden.3": torch.zeros(2, 5, 6)})
    cache = compute()
    with pytest.raises(UserError, match=r"no \['q'\]: it holds hidden\.3, logits, vector"):
        cache.batch([1], ["q"])
    for number in (-1, 50):
        with pytest.raises(IndexError):
            cache.batch([number])


def test_a_place_that_cannot_be_written_to(compute, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written to .*file"):
        compute(directory=tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot be written to .*Not a directory"):
        compute(directory=tmp_path / "file/below")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 10}))
    with pytest.raises(UserError, match="make room"):
        compute()
    monkeypatch.undo()

    def quota(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", quota)
    with pytest.raises(UserError, match=r"cannot be written to .*Disk quota exceeded"):
        compute(forward := Forward())
    assert not forward.batches


def test_one_computes_while_others_wait(compute):
    inside, go_on = threading.Event(), threading.Event()

    class Slow(Forward):
        def __call__(self, numbers):
            inside.set()
            assert go_on.wait(PATIENCE)
            return super().__call__(numbers)

    slow, other, opened = Slow(), Forward(), []
    first = threading.Thread(target=lambda: opened.append(compute(slow)))
    first.start()
    assert inside.wait(PATIENCE)
    second = threading.Thread(target=lambda: opened.append(compute(other)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go_on.set()
    first.join(PATIENCE)
    second.join(PATIENCE)
    assert slow.batches and not other.batches
    assert torch.equal(opened[0].batch([3])["logits"], opened[1].batch([3])["logits"])


def test_it_pickles_by_directory(compute):
    cache = compute()
    data = pickle.dumps(cache)
    assert len(data) < 500
    assert torch.equal(pickle.loads(data).batch([4])["vector"], cache.batch([4])["vector"])


def test_a_model_is_known_by_configuration_and_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "intermediate_size": 4}
    config = transformers.BertConfig(**options, num_attention_heads=2)
    model = transformers.BertModel(config).eval()
    first = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    again = transformers.BertModel.from_pretrained(tmp_path)
    assert model_fingerprint(again) == first
    with torch.no_grad():
        again.encoder.layer[0].output.dense.bias[0] += 1e-3
    assert model_fingerprint(again) != first
    assert model_fingerprint(model.half()) != first
    model = transformers.BertModel.from_pretrained(tmp_path, layer_norm_eps=1e-6)
    assert model_fingerprint(model) != first
