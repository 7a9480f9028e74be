"""The engine on a GPU: both mixed precisions, the cache, resuming. Bits are not promised there."""

import pytest
import torch
from tiny_recipes import Files, Stopped, stop_at, student, theseus, two_stages

from fastffn.distill import run

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("gpu") / "files")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("made", [two_stages, theseus])
def test_a_recipe_runs_and_resumes(files, tmp_path, made, precision):
    given = {"precision": precision} if made is two_stages else {}
    what = made(files, *(() if given else (f"precision={precision}",)), **given)
    name = what.enabled[-1].name
    with pytest.raises(Stopped):
        run(what, tmp_path, progress=stop_at(name, 4))
    report = run(what, tmp_path)
    assert report["device"] == torch.cuda.get_device_name()
    assert all(torch.isfinite(x).all() for x in student(tmp_path).values())
    seconds = report["stages"][name]["seconds_by_part"]
    assert {"student", "backward", "optimiser"} <= set(seconds)


def test_cached_outputs_give_the_losses_of_the_teacher(files, tmp_path):
    losses = []
    for cache in (False, True):
        mapping = two_stages(files).to_mapping()
        for stage in mapping["stages"]:
            stage["cache"] = cache
        report = run(type(two_stages(files)).from_mapping(mapping), tmp_path / str(cache))
        losses.append(torch.tensor([p[1] for s in report["stages"].values() for p in s["curve"]]))
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-2, atol=1e-3)
