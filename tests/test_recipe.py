"""Recipes: reading with lines, overrides, every kind of mistake, and writing."""

import pytest

from fastffn import UserError
from fastffn.distill import recipe, recipe_yaml
from fastffn.distill.recipe import Recipe, read
from fastffn.distill.terms import TERMS

TEXT = """\
teacher:
  load: ???
student: {layers_of: teacher, layers: 3}
models:
  tuned: a_dir
data:
  general:
    text: [a.txt, b.txt]
  task:
    task: sst2
stages:
  - name: gd
    data: general
    losses:
      relations: {relation_heads: 12, relations: [qk, vv]}
      hidden: 2
    steps: 1e2
    learning_rate: 5e-4
  - name: tsd
    teacher: tuned
    data: task
    losses:
      soft_labels: {temperature: 2}
      hard: {kind: hard_labels, weight: 0.5}
    epochs: 3
    learning_rate: 2e-5
    warmup_steps: 10
"""


@pytest.fixture
def written(tmp_path):
    """Writes a recipe with `old` replaced by `new` and reads it."""

    def read_it(*overrides, old="", new="", text=TEXT):
        assert old in text
        path = tmp_path / "mine.yaml"
        path.write_text(text.replace(old, new, 1) if old else text)
        return read(path, overrides)

    return read_it


def said(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


def line(text: str, part: str) -> int:
    (number,) = [k for k, line in enumerate(text.splitlines(), 1) if part in line]
    return number


# -- what a recipe says --------------------------------------------------------------------------


def test_values_defaults_and_shorthands(written):
    found = written("teacher=DIR")
    assert found.name == "mine" and found.precision == "fp32" and found.seed == 0
    assert found.models["teacher"].load == "DIR" and found.models["tuned"].load == "a_dir"
    assert (found.models["student"].parent, found.models["student"].layers) == ("teacher", 3)
    gd, tsd = found.stages
    assert gd.teacher == "teacher" and tsd.teacher == "tuned" and gd.student == ("student",)
    assert gd.losses["relations"].options == TERMS["relations"](("qk", "vv"), 12)
    assert gd.losses["hidden"].weight == 2 and gd.losses["hidden"].kind == "hidden"
    assert tsd.losses["hard"].kind == "hard_labels" and tsd.losses["hard"].weight == 0.5
    assert (gd.steps, gd.epochs, gd.learning_rate, gd.warmup) == (100, None, 5e-4, 0.1)
    assert (tsd.epochs, tsd.warmup, tsd.warmup_steps) == (3, None, 10)
    assert isinstance(gd.steps, int) and isinstance(tsd.epochs, float)


def test_a_teacher_is_named_only_where_something_needs_it(written):
    plain = written("teacher=DIR", "stages.tsd.losses.soft_labels=null", "stages.tsd.teacher=null")
    assert plain.stages[1].teacher is None
    text = TEXT.replace("    teacher: tuned\n", "").replace("soft_labels: {temperature: 2}", "")
    assert written("teacher=DIR", text=text).stages[1].teacher is None


def test_a_copy_on_disk_is_equal(written, tmp_path):
    found = written(
        "teacher='1e-4'", "description='a: b\n- 1:30 is no, [x]'", "teacher.dtype=float16"
    )
    assert found.models["teacher"].load == "1e-4"
    text = found.to_yaml()
    copy = tmp_path / "copy.yaml"
    copy.write_text(text)
    assert read(copy) == found
    assert read(copy).to_yaml() == text
    assert Recipe.from_mapping(found.to_mapping()) == found


def test_other_readers_of_yaml_agree_with_what_is_written(written):
    import yaml

    values = written("teacher=DIR", "description='no'").to_mapping()
    assert yaml.safe_load(recipe_yaml.dump(values)) == values


def test_theseus_and_supernets(written):
    found = written(
        "teacher=DIR",
        "stages.gd.replacing={schedule: constant, rate: 0.7, steps: 20}",
        "models.super={supernet: {from: teacher, max_stack: 2, max_width: 64}}",
        "stages.tsd.student=[super, student]",
    )
    assert found.stages[0].replacing.probability(3, 100) == 0.7
    assert found.models["super"].parent == "teacher"
    assert found.stages[1].student == ("super", "student")


# -- overrides -----------------------------------------------------------------------------------


def test_overrides_change_single_values(written):
    found = written(
        "teacher=DIR",
        "teacher.dtype=bfloat16",
        "teacher=OTHER",
        "student.layers=[0,2]",
        "stages.gd.enabled=false",
        "stages.gd.losses.hidden.layer_map=[[0,1],[1,3]]",
        "stages.gd.losses.relations=3",
        "stages.gd.losses.vector={}",
        "stages.gd.epochs=1.5",
        "stages.tsd.losses.hard=null",
        "stages.tsd.warmup=0",
        "data.general.text=one.txt",
        "seed=7",
    )
    assert found.models["teacher"] == recipe.ModelSpec(load="OTHER", dtype="bfloat16")
    assert found.models["student"].layers == (0, 2)
    gd, tsd = found.stages
    assert found.enabled == (tsd,)
    assert gd.losses["hidden"].weight == 2  # the number that the options were short for
    assert gd.losses["hidden"].options.layer_map == ((0, 1), (1, 3))
    assert gd.losses["relations"].weight == 3
    assert gd.losses["relations"].options.relation_heads == 12
    assert (gd.epochs, gd.steps) == (1.5, None)
    assert list(tsd.losses) == ["soft_labels"] and (tsd.warmup, tsd.warmup_steps) == (0, None)
    assert found.data["general"].text == ("one.txt",) and found.seed == 7


def test_a_model_is_replaced_by_files(written):
    found = written("teacher=DIR", "student=FILES")
    assert found.models["student"] == recipe.ModelSpec(load="FILES")


def test_what_is_not_given_is_named_with_its_remedy(written):
    text = TEXT.replace("[a.txt, b.txt]", "\n      ???")
    message = said(written, text=text)
    assert ":2: teacher.load and data.general.text are not set: give teacher.load=DIR " in message
    assert message.endswith("data.general.text=FILE")
    assert said(written, "teacher=DIR", text=text).endswith(
        "is not set: give data.general.text=FILE"
    )
    found = written("teacher=DIR", "stages.gd.enabled=false", text=text)
    assert found.data["general"].text == ("???",)  # what no stage uses need not be given
    assert Recipe.from_mapping(found.to_mapping()) == found


# -- mistakes ------------------------------------------------------------------------------------

WRONG = {  # what is replaced, by what, where the line of the mistake is, what is said
    "unknown key": (
        "    steps",
        "    stepps",
        "stepps",
        "stages.gd.stepps is unknown: did you mean",
    ),
    "unknown loss": (
        "hidden: 2",
        "hiden: 2",
        "hiden",
        "losses.hiden is unknown: did you mean hidden",
    ),
    "unknown option": ("temperature", "temperatur", "temperatur:", "did you mean temperature?"),
    "unknown kind": ("kind: hard_labels", "kind: hard", "kind: hard", "did you mean hard_labels"),
    "unknown top": ("models:", "model:", "model:", "model is unknown: did you mean models?"),
    "type": ("steps: 1e2", "steps: many", "many", "is 'many': expected a whole number or null"),
    "fraction": ("steps: 1e2", "steps: 1.5", "1.5", "is 1.5: expected a whole number"),
    "no number": ("5e-4", ".nan", ".nan", "expected a number"),
    "range": ("5e-4", "-1", "rate: -1", "stages.gd.learning_rate -1 is not positive"),
    "loss range": (
        "temperature: 2",
        "temperature: 0",
        "temperature: 0",
        "soft_labels.temperature 0",
    ),
    "weight": ("weight: 0.5", "weight: 0", "weight: 0", "weight 0 is not positive"),
    "choice": ("warmup_steps: 10", "schedule: line", "line", "expected linear, cosine,"),
    "two lengths": ("epochs: 3", "{epochs: 3, steps: 4}", "", "no YAML"),
    "both": (
        "epochs: 3",
        "steps: 5\n    epochs: 3",
        "name: tsd",
        "exactly one of epochs and steps",
    ),
    "warm-ups": ("warmup_steps: 10", "warmup_steps: 9\n    warmup: 0.2", "warmup: 0.2", "give one"),
    "missing": ("    learning_rate: 5e-4\n", "", "name: gd", "gd.learning_rate is missing"),
    "no data": ("    data: general\n", "", "name: gd", "stages.gd.data is missing"),
    "unknown data": (
        "data: task",
        "data: tasks",
        "data: tasks",
        "did you mean task? (known: general",
    ),
    "unknown task": ("task: sst2", "task: sst", "task: sst", "data.task.task is sst: did you mean"),
    "unknown teacher": ("teacher: tuned", "teacher: tune", "teacher: tune", "did you mean tuned?"),
    "unknown parent": (
        "_of: teacher",
        "_of: techer",
        "_of: techer",
        "student.layers_of is techer: did",
    ),
    "own parent": ("_of: teacher", "_of: student", "_of: student", "circle: student from student"),
    "unnamed stage": ("name: tsd", "warmup: 0", "warmup: 0", "needs a name"),
    "twin stage": ("name: tsd", "name: gd", "", "name gd that another stage has"),
    "twin key": ("steps: 1e2", "steps: 1\n    steps: 2", "steps: 2", "steps is there twice"),
    "text and task": (
        "task: sst2",
        "task: sst2\n    text: x",
        "  task:\n",
        "exactly one of task and text",
    ),
    "labels of text": (
        "hidden: 2",
        "hard_labels: 1",
        "hard_labels: 1",
        "needs a task, and general is",
    ),
    "teacher is student": (
        "teacher: tuned",
        "teacher: student",
        "teacher: student",
        "the stage trains",
    ),
    "model with a key": ("tuned: a_dir", "teacher: x", "  teacher: x", "has a key of its own"),
    "two sources": ("layers: 3}", "layers: 3, load: x}", "load: x", "exactly one of load"),
    "layers alone": ("load: ???", "load: x\n  layers: 3", "layers: 3\n", "belongs to layers_of"),
    "layer order": ("layers: 3", "layers: [2, 1]", "[2, 1]", "in rising order"),
    "learner's type": (
        "{layers_of: teacher, layers: 3}",
        "{load: a, dtype: float16}",
        "float16",
        "float32",
    ),
    "alias": ("hidden: 2", "hidden: *x", "*x", "an alias: write the value out"),
    "object": ("sst2", "!!python/object/apply:os.getcwd []", "apply", "is not allowed"),
    "alien tag": ("epochs: 3", "epochs: !!int three", "three", "is no int"),
    "no yaml": ("data:\n", "data: [\n", "", "no YAML"),
    "list": ("  hidden: 2", "  - hidden", "", "no YAML"),
    "losses": ("hidden: 2", "hidden: much", "much", "expected options or a number, the weight"),
    "supernet": ("steps: 1e2", "steps: 1e2\n    subnetworks: 3", "subnetworks", "is a supernet"),
    "theseus": ("epochs: 3", "epochs: 3\n    replacing: {}", "name: tsd", "layers_of: tuned"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_names_key_and_line(case, written, tmp_path):
    old, new, part, expected = WRONG[case]
    message = said(written, "teacher=DIR", old=old, new=new)
    text = (tmp_path / "mine.yaml").read_text()
    assert message.startswith(f"{tmp_path / 'mine.yaml'}:")
    assert expected in message
    if part:
        found = [k for k, row in enumerate(f"{text}".splitlines(True), 1) if part in row]
        assert message.split(":")[1] in map(str, found)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.gd.stepps=5", "stages.gd.stepps is unknown: did you mean steps?"),
        ("stages.ged.steps=5", "stages.ged is unknown: did you mean gd? (known: gd, tsd)"),
        ("stages.gd.steps.x=5", "is 100.0 and has no keys"),
        ("seed.x=5", "expected a whole number"),
        ("name.x=5", "expected text"),
        ("stages.tsd.name.x=5", "is 'tsd' and has no keys"),
        ("stages.gd.steps=[", "no YAML"),
        ("stages.gd.steps=0", "stages.gd.steps 0 is not positive"),
        ("stages.gd.teacher=null", "is null, and the loss relations needs one"),
        ("stages.gd.cache=yes", "is 'yes': expected true or false"),
        ("stages.gd.losses=null", "losses are missing"),
        ("stages.gd.name=x", "is 'x': a stage keeps its name"),
        ("stages.gd=5", "stages.gd is 5: expected a mapping"),
        ("stages=[]", "stages go by their names"),
        ("stages.gd.losses.hidden={kind: [x]}", "kind is ['x']: choose from "),
        ("student={efficientbert: {from: [teacher]}}", "is no name of a model"),
        ("seed=1e999", "expected a whole number"),
        ("nonsense", "give key.sub=value"),
        ("=3", "give key.sub=value"),
    ],
)
def test_a_mistake_in_an_override_names_the_override(override, expected, written):
    message = said(written, "teacher=DIR", override)
    assert expected in message and override in message


def test_a_clash_of_file_and_override_names_the_file(written, tmp_path):
    message = said(written, "teacher=DIR", "student.like=teacher")
    assert "mine.yaml:3: student.layers_of and like given: a model has exactly one of" in message
    message = said(written, "teacher=DIR", "data.general=null")
    assert "mine.yaml:13: stages.gd.data is general: choose from task" in message


def test_a_task_may_be_a_file_beside_its_data(written, tmp_path):
    (tmp_path / "own").mkdir()
    file = tmp_path / "own" / "reviews.yaml"
    file.write_text("texts: [body]\ntrain: a.csv\nvalidation: b.csv\n")
    data = written("teacher=t", f"data.task.task={file}").data["task"]
    assert data.task == {
        "name": "reviews",
        "texts": ["body"],
        "train": "a.csv",
        "validation": "b.csv",
    }
    assert data.dir == str(file.parent)
    there = written("teacher=t", f"data.task.task={file}", "data.task.dir=there")
    assert there.data["task"].dir == "there"
    assert "absent.yaml cannot be read" in said(written, "teacher=t", "data.task.task=absent.yaml")
    file.write_text("- no mapping\n")
    assert "is no task" in said(written, "teacher=t", f"data.task.task={file}")


def test_a_teacher_must_have_been_trained(written):
    assistant = "models.ta={like: teacher, config: {hidden_size: 64}}"
    first = ["stages.gd.student=ta", "stages.tsd.teacher=ta"]
    assert written("teacher=DIR", assistant, *first).stages[1].teacher == "ta"
    message = said(written, "teacher=DIR", assistant, *first, "stages.gd.enabled=false")
    assert "stages.tsd.teacher is ta, which no enabled stage before has trained" in message
    assert "enable stage gd" in message
    later = ["stages.gd.teacher=ta", "stages.tsd.student=ta"]
    assert "put it first" in said(written, "teacher=DIR", assistant, *later)
    assert "name another teacher" in said(written, "teacher=DIR", assistant, later[0])


def test_something_must_run(written):
    off = ["stages.gd.enabled=false", "stages.tsd.enabled=false"]
    assert "all switched off" in said(written, "teacher=DIR", *off)
    assert "all switched off" in said(written, "teacher=DIR", "stages.gd=null", off[1])
    assert "stages are missing" in said(Recipe.from_mapping, {"data": {}})
    assert "is no mapping" in said(written, text="- a")
    assert "is no mapping" in said(written, text="")


def test_files_that_are_no_recipes(tmp_path):
    assert "did you mean minilm?" in said(read, "minlm")
    assert "does not exist" in said(read, tmp_path / "absent.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in said(read, binary)
    binary.write_bytes(b"a: \x00")
    assert "no YAML" in said(read, binary)
    binary.write_text("[" * 10_000)
    assert "nested too deeply" in said(read, binary)
    binary.write_text("a: 1\n---\nb: 2")
    assert "no YAML" in said(read, binary)


def test_scalars_follow_the_core_schema():
    text = "[no, 1:30, 1e-4, 010, 2001-01-01, true, null, ~, .5, -3, 0x1F, '7', 1_000, <<]"
    values, places = recipe_yaml.parse(f"a:\n  b:\n    {text}", "x")
    expected = ["no", "1:30", 1e-4, 10, "2001-01-01", True, None, None, 0.5, -3, "0x1F", "7"]
    assert values == {"a": {"b": [*expected, "1_000", "<<"]}}
    assert places.of(("a", "b", 3)) == "x:3" and places.of(("a", "c")) == "x:1"
    assert recipe_yaml.parse(recipe_yaml.dump(values), "x")[0] == values
