"""`fastffn bench model`: workloads, fair races, who is let in, tables, and what cannot be run."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from tiny_teacher import WORDS, save_teacher

from bench import serving
from fastffn import cli
from fastffn.errors import UserError
from fastffn.models import EfficientBertConfig, EfficientBertModel
from fastffn.runtimes import comparison, pictures, products, race, tables
from fastffn.runtimes import workloads as workloads_module
from fastffn.runtimes.contenders import RUNTIMES, Files, Runner, Runtime, Setting, Unavailable
from fastffn.runtimes.subjects import PRESETS, load_encoder, named, prepare
from fastffn.runtimes.workloads import Workload, fixed, padding, read_texts, real


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A BERT with a tokenizer, and a smaller EfficientBERT without one."""
    place = tmp_path_factory.mktemp("models")
    save_teacher(place / "big")
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    genes = ["2x1/2 down(gelu(up(x)))", "1x1 tanh(down(mul(swish(gate(x)), up(x))))"]
    config = EfficientBertConfig(
        vocab_size=30, embedding_size=8, genes=genes, max_position_embeddings=32, **sizes
    )
    EfficientBertModel(config).save_pretrained(place / "small")
    return place / "big", place / "small"


@pytest.fixture(scope="module")
def big(folders, tmp_path_factory):
    """The BERT as a subject, and its files."""
    place = tmp_path_factory.mktemp("work")
    subject = prepare(str(folders[0]), place / "model")
    return subject, Files(subject, place)


def options(folders, **changes):
    chosen = {
        "models": [str(folder) for folder in folders],
        "workloads": fixed([2], [8]),
        "threads": [1],
        "runtimes": ["eager"],
        "precisions": ["fp32"],
        "seconds": 0.0,
        "least": 2,
        "memory": False,
    }
    return comparison.Options(**(chosen | changes))


class Faulty(Runtime):
    """Eager torch, changed by `wrong`."""

    name = "faulty"

    def __init__(self, wrong):
        self.wrong = wrong

    def load(self, files, precision, setting):
        runner = RUNTIMES["eager"].load(files, precision, setting)
        return Runner(lambda batch: self.wrong(runner(batch)))


# -- models and workloads ------------------------------------------------------------------------


def test_a_subject_is_a_bare_encoder(big, folders):
    subject, _ = big
    assert subject.name == "big" and subject.positions == 32
    model = load_encoder(subject.folder)
    assert model.pooler is None and not model.training
    words = subject.vocab_size * 24
    assert subject.params - subject.params_without_word_embeddings == words
    loaded = transformers.AutoModel.from_pretrained(folders[0]).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded[name])


def test_names(tmp_path):
    assert named("mine=org/model") == ("mine", "org/model")
    assert named("org/model") == ("model", "org/model")
    (tmp_path / "a=b").mkdir()
    assert named(str(tmp_path / "a=b")) == ("a=b", str(tmp_path / "a=b"))


def test_a_model_that_is_not_there_names_the_presets(tmp_path):
    with pytest.raises(UserError, match=r"does not exist.*efficientbert, "):
        prepare(str(tmp_path / "absent"), tmp_path / "out")


def test_fixed_batches_are_full(big):
    subject, _ = big
    (batch,) = Workload("3 x 32", 3, 32).batches(subject)
    assert batch["input_ids"].shape == (3, 32) and batch["attention_mask"].all()
    assert (batch["input_ids"] != subject.pad_id).all()
    assert batch["input_ids"].max() < subject.vocab_size
    with pytest.raises(UserError, match="length 33: big has 32 positions"):
        Workload("1 x 33", 1, 33).batches(subject)


def test_real_batches_keep_the_order_and_are_padded_to_their_longest(big):
    subject, _ = big
    texts = [" ".join(WORDS[: 1 + k % 7]) for k in range(100)]
    one, four = real("text", texts, [1, 4])
    assert len(one.texts) == len(four.texts) == 64
    assert all(len(batch["input_ids"]) == 1 for batch in one.batches(subject))
    assert padding(one.batches(subject)) == 0
    batches = four.batches(subject)
    expected = [len(text.split()) + 2 for text in four.texts]  # [CLS], [SEP]
    assert [n for b in batches for n in b["attention_mask"].sum(1).tolist()] == expected
    for batch in batches:
        assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max()
    assert 0 < padding(batches) < 1
    with pytest.raises(UserError, match="100 texts, a batch has 200"):
        real("text", texts, [200])


def test_texts_of_a_table_are_its_first_column(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text('sentence\tlabel\na "film" .\t1\n\nbad\t0\n', encoding="utf-8")
    assert read_texts(path) == ['a "film" .', "bad"]
    plain = tmp_path / "plain.txt"
    plain.write_text("One two three. Four five six seven.\n\nEight nine ten.", encoding="utf-8")
    assert len(read_texts(plain)) == 3


def test_products_are_those_of_all_layers(big, folders, tmp_path):
    _, files = big
    found = products.shapes(load_encoder(files.model()))
    layer = [(1, 24, 24)] * 4 + [(1, 24, 96), (1, 96, 24)]
    assert sorted(found) == sorted(4 * layer)
    small = load_encoder(prepare(str(folders[1]), tmp_path / "model").folder)
    attention, projection = 4 * 16 * 16, 3 * 8 * 16
    ffn = 2 * (2 * 16 * 8) + 3 * 16 * 16  # two units of half the width, a gated one
    macs = sum(rows * inner * columns for rows, inner, columns in products.shapes(small))
    assert macs == 2 * attention + ffn + projection
    for dtype in (torch.float32, torch.bfloat16):
        products.Products(found, dtype)(5)


# -- the race ------------------------------------------------------------------------------------


def test_a_race_runs_everyone_in_each_round():
    calls = {"one": 0, "two": 0}

    def work(name):
        calls[name] += 1

    found = race.race({name: lambda name=name: work(name) for name in calls}, 0.0, least=3)
    assert {name: len(times) for name, times in found.items()} == {"one": 3, "two": 3}
    assert min(calls.values()) >= 3


def test_a_slower_contender_has_the_longer_time():
    x = torch.randn(64, 64)
    found = race.race({"once": lambda: x @ x, "often": lambda: [x @ x for _ in range(50)]}, 0.2)
    once, often = (race.Timing(0.0, found[name]).summary()["ms"] for name in ("once", "often"))
    assert often > 3 * once


def test_disagreement_is_of_the_worst_text_at_real_tokens():
    truth = torch.randn(3, 5, 4)
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, 3:] = 0
    batch = {"attention_mask": mask}
    found = truth.clone()
    found[0, 3:] = torch.nan  # padding may hold anything
    assert race.disagreement(found, truth, batch) == 0
    found[2] = 0
    assert race.disagreement(found, truth, batch) == pytest.approx(1)
    found[1, 0, 0] = torch.nan
    assert race.disagreement(found, truth, batch) == float("inf")
    assert race.disagreement(truth[:2], truth, batch) == float("inf")


# -- the comparison ------------------------------------------------------------------------------


def test_models_race_and_the_wrong_are_left_out(folders, monkeypatch):
    monkeypatch.setitem(RUNTIMES, "faulty", Faulty(lambda hidden: hidden + 0.01))
    monkeypatch.setitem(RUNTIMES, "broken", Faulty(lambda hidden: hidden.no_such_thing()))
    names = ["eager", "faulty", "broken", "compile-graphs"]
    report = comparison.run(
        options(folders, runtimes=names, precisions=["fp32", "bf16"], models=[str(folders[0])])
    )
    (cell,) = report["cells"]
    ran = {(row["runtime"], row["precision"]) for row in cell["results"]}
    assert ran == {("eager", "fp32"), ("eager", "bf16"), ("products", "fp32"), ("products", "bf16"),
                   ("faulty", "bf16")}  # fmt: skip
    why = {(row["runtime"], row["precision"]): row["why"] for row in report["refused"]}
    assert why["faulty", "fp32"].startswith("disagrees with eager torch: 0.01")
    assert why["broken", "fp32"].startswith("fails: AttributeError: ")
    assert why["compile-graphs", "fp32"] == "is run on cuda only"
    for row in cell["results"]:
        assert 0 < row["low"] <= row["ms"] <= row["high"] and row["rounds"] == 2
        assert ("disagreement" in row) == (row["runtime"] != "products")


def test_a_comparison_goes_on_where_it_was(folders):
    saved = []

    def save(report):
        saved.append(json.loads(json.dumps(report)))

    workloads = fixed([1, 2], [8])
    report = comparison.run(options(folders[:1], workloads=workloads), {}, save)
    assert [len(each["cells"]) for each in saved] == [1, 2]
    kept = saved[0]
    first = json.dumps(kept["cells"][0])
    again = comparison.run(options(folders[:1], workloads=workloads), kept, save)
    assert json.dumps(again["cells"][0]) == first
    assert [cell["workload"] for cell in again["cells"]] == ["1 x 8", "2 x 8"]
    assert len(saved) == 3 and len(report["cells"]) == 2


def test_the_threads_are_given_back(folders):
    before = torch.get_num_threads()
    report = comparison.run(options(folders[:1], threads=[1, 2]))
    assert [cell["threads"] for cell in report["cells"]] == [1, 2]
    assert torch.get_num_threads() == before


def test_models_without_a_tokenizer_take_the_others(folders):
    texts = [" ".join(WORDS[:k]) for k in (2, 5, 3, 7)]
    report = comparison.run(options(folders, workloads=real("text", texts, [2])))
    (cell,) = report["cells"]
    assert (cell["texts"], cell["tokens"], cell["length"]) == (4, 2 + 5 + 3 + 7 + 8, None)
    assert cell["padding"] == round(1 - 25 / (2 * 7 + 2 * 9), 4)
    assert {row["model"] for row in cell["results"]} == {"big", "small"}
    with pytest.raises(UserError, match="small has no tokenizer"):
        comparison.run(options(folders[1:], workloads=real("text", texts, [2])))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"runtimes": ["tensorflow"]}, "runtimes: tensorflow is unknown: choose eager, "),
        ({"precisions": ["fp8"]}, "precisions: fp8 is unknown"),
        ({"threads": [0]}, "threads 0: give at least 1"),
        ({"workloads": []}, "nothing to compare"),
        ({"workloads": fixed([1], [33])}, "length 33: big has 32 positions"),
    ],
)
def test_what_cannot_be_compared(folders, changes, said):
    with pytest.raises(UserError, match=said):
        comparison.run(options(folders, **changes))


def test_two_models_of_one_name(folders):
    with pytest.raises(UserError, match="two models are called big: name one NAME="):
        comparison.run(options((folders[0], folders[0])))


def test_memory_is_measured_in_a_process_of_its_own(folders):
    report = comparison.run(options(folders[:1], memory=True))
    (row,) = report["memory"]
    assert (row["runtime"], row["workload"]) == ("eager", "2 x 8")
    assert 0 < row["resident"] <= row["peak"] < 1000 and row["disk"] > 0


# -- other runtimes ------------------------------------------------------------------------------


def agrees(files, name, precision, shapes=((2, 8), (3, 5))):
    """Disagreement of a runtime over batches of some shapes, the first alone and all of them."""
    runtime = RUNTIMES[name]
    runtime.check(precision, "cpu")
    runner = runtime.load(files, precision, Setting(1))
    eager = RUNTIMES["eager"].load(files, "fp32", Setting(1))
    worst = 0.0
    for some in (shapes[:1], shapes):
        runner.begin(some)
        for shape in some:
            (batch,) = Workload("", *shape).batches(files.subject)
            batch["attention_mask"][-1, shape[1] // 2 :] = 0
            with torch.inference_mode():
                far = race.disagreement(runner(batch), eager(batch), batch)
            worst = max(worst, far)
    return worst


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "ctranslate2"])
def test_rivals_agree_with_eager_torch(big, name):
    pytest.importorskip(name)
    if name != "ctranslate2":
        pytest.importorskip("onnxscript")
    assert agrees(big[1], name, "fp32") < race.LIMITS["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_torch_agrees(big, precision):
    assert agrees(big[1], "compile", precision) < race.limit(precision, 0.01)


def test_what_a_rival_cannot_do(big):
    with pytest.raises(Unavailable, match="no bf16 products"):
        RUNTIMES["onnxruntime"].check("bf16", "cpu")
    with pytest.raises(Unavailable, match="is run on cpu only"):
        RUNTIMES["openvino"].check("fp32", "cuda")


def test_an_absent_rival_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(RUNTIMES["openvino"], "module", "no_such_module", raising=False)
    with pytest.raises(Unavailable, match=r'no_such_module is not .* "fastffn\[peers\]"'):
        RUNTIMES["openvino"].check("fp32", "cpu")


def test_ctranslate2_takes_plain_encoders_only(folders, tmp_path):
    pytest.importorskip("ctranslate2")
    subject = prepare(str(folders[1]), tmp_path / "model")
    with pytest.raises(Unavailable, match="not efficientbert"):
        RUNTIMES["ctranslate2"].make(Files(subject, tmp_path), "fp32")


# -- tables and pictures -------------------------------------------------------------------------


def row(model, runtime, precision, ms):
    found = {"model": model, "runtime": runtime, "precision": precision, "ms": ms}
    return {**found, "low": ms, "high": ms, "first_ms": 5.0, "rounds": 3, "disagreement": 1e-6}


def example():
    """A report of two models."""
    cells = []
    for batch, scale in ((1, 1.0), (32, 10.0)):
        times = {
            ("big", "eager", "fp32"): 80,
            ("big", "openvino", "bf16"): 30,
            ("small", "eager", "fp32"): 16,
            ("small", "openvino", "fp32"): 12,
            ("small", "fastffn", "fp32"): 10,
            ("small", "fastffn", "bf16"): 5,
            ("big", "products", "fp32"): 70,
            ("small", "products", "fp32"): 9.5,
        }
        results = [row(*names, ms * scale) for names, ms in times.items()]
        about = {"workload": f"{batch} x 128", "batch_size": batch, "length": 128, "texts": batch}
        about |= {"tokens": 128 * batch, "padding": 0.0, "threads": 2}
        cells.append({**about, "results": results})
    names = {"model": "small", "runtime": "fastffn", "precision": "fp32"}
    refused = {"model": "small", "runtime": "onnxruntime", "precision": "bf16", "where": ""}
    conditions = {"device": "a CPU", "versions": {"torch": "2"}, "date": "2026-11-21"}
    return {
        "conditions": conditions,
        "models": [{"name": "big"}, {"name": "small"}],
        "cells": cells,
        "memory": [{**names, "workload": "32 x 128", "resident": 60, "peak": 90, "disk": 61}],
        "refused": [{**refused, "why": "has no bf16"}],
    }


def test_tables_relate_models_and_runtimes():
    text = tables.markdown(example())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| small fastffn | fp32 | 10.0 (100) | 100 (320) |" in lines
    assert "| small | 1 x 128 | 1.20x openvino | – | – |" in lines
    assert "## small against big, 2 threads" in lines
    # eager, openvino and fastffn in fp32, fastffn in bf16; best; products
    (found,) = (line for line in lines if line.startswith("| 1 x 128 | 5.00x"))
    assert "| 6.67x | 8.00x | 16.0x | 6.00x (openvino bf16 / fastffn bf16) | 7.37x | – |" in found
    assert "| small fastffn | fp32 | 60.0 | 90.0 | 61.0 | 1.0e-06 | 0.0050 |" in lines
    assert "- onnxruntime bf16 (small): has no bf16" in lines
    assert lines[-1] == "a CPU; torch 2; 2026-11-21"


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = pictures.draw(example(), tmp_path)
    assert [path.name for path in drawn] == ["milliseconds-2-threads.png", "ratios-2-threads.png"]
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_what_was_aimed_at():
    report = example()
    padded = example()
    padded["cells"][0]["padding"] = 0.25
    student = example()
    for cell in [*student["cells"], *padded["cells"]]:
        cell["results"] = [each for each in cell["results"] if each["model"] == "small"]
    result = {"parts": {"against-bert": report, "student": student, "real": padded}}
    lines = [" ".join(line.split()) for line in serving.reach(result).splitlines()]
    assert "| fp32 against big eager | 8.0x | 8.00x | 1 x 128 |" in lines
    assert "| fp32 against big eager | 6.5x | 8.00x | 32 x 128 |" in lines
    assert "| bare products, fp32 | 7.0x | 7.37x | 1 x 128 |" in lines
    assert "| student fp32 against openvino | 1.0x | 1.20x | 1 x 128 |" in lines
    assert "| real, one by one fp32 against openvino | 1.0x | 1.20x | 32 x 128 |" in lines
    assert "| real fp32 against openvino | 1.5x | 1.20x | 1 x 128 |" in lines


def test_the_bench_of_serving_has_a_plan_for_each_part(monkeypatch):
    monkeypatch.setattr(workloads_module, "read_texts", lambda path: ["a text"] * 64)
    for part in serving.PARTS:
        models, chosen = serving.plan(part, {"some": "file"})
        assert models and chosen
        assert all("efficientbert" in models or part == "plain" for _ in chosen)


def test_the_page_names_runtimes_presets_and_options(capsys):
    page = (Path(__file__).parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")
    page = page.partition("## Compare runtimes")[2]
    for name in (*RUNTIMES, *PRESETS):
        assert f"`{name}`" in page
    with pytest.raises(SystemExit):
        cli.main(["bench", "model", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert {*re.findall(r"--[a-z-]+(?=[ `])", page)} <= known


# -- the command ---------------------------------------------------------------------------------

SHORT = ["--batch", "2", "--length", "8", "--seconds", "0", "--rounds", "2", "--no-memory"]
SHORT += ["--runtimes", "eager", "--precisions", "fp32", "--threads", "1"]


@pytest.mark.usefixtures("loud_again")
def test_the_command_prints_tables_and_goes_on(folders, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, out = tmp_path / "report.json", tmp_path / "out"
    command = ["bench", "model", *map(str, folders), *SHORT, "--json", str(file)]
    assert cli.main([*command, "--out", str(out)]) == 0
    text, said = capsys.readouterr()
    assert "## small against big, 1 thread" in text and "parameters" in said
    assert (out / "table.md").read_text(encoding="utf-8") == text
    assert json.loads(file.read_text(encoding="utf-8"))["cells"]
    assert (out / "milliseconds-1-threads.png").is_file()
    assert cli.main(command) == 0
    assert capsys.readouterr().out == text  # measured once
    other = ["bench", "model", str(folders[0]), *SHORT, "--json", str(file)]
    assert cli.main(other) == 2
    assert "is of other models" in capsys.readouterr().err


@pytest.mark.usefixtures("loud_again")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "0"], "'0' is no count"),
        (["--runtimes", "tensorflow"], "tensorflow is unknown"),
        (["--text", "absent.txt"], "absent.txt does not exist"),
        (["--length", "64"], "has 32 positions"),
    ],
)
def test_the_command_refuses_in_one_line(folders, arguments, said, capsys):
    try:
        status = cli.main(["bench", "model", str(folders[0]), *arguments, "--no-memory"])
    except SystemExit as exit_:  # argparse
        status = exit_.code
    assert status == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
