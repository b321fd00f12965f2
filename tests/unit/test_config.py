"""The recipe: strict, with the nearest name for a typo, and every shipped one valid."""

import json
import re
from pathlib import Path

import pytest

from sft_dist import package_files
from sft_dist.config import ENGINES, Recipe, load_recipe, parse_recipe, recipe_schema
from sft_dist.engine.zero import read_zero_knobs
from sft_dist.errors import ConfigError

MINIMAL = """
run: {name: a}
model: {path: m}
data: {train: t.jsonl}
batch: {examples: 8}
optim: {lr: 1e-5}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    return path


def test_a_minimal_recipe_has_every_default(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert recipe.loss == "example_mean"
    assert recipe.optim.lr == 1e-5
    assert recipe.data.train[0].path == "t.jsonl"
    assert recipe.pack_tokens == recipe.data.max_tokens == 4096


def test_the_resolved_recipe_parses_to_itself(minimal: Path, tmp_path: Path) -> None:
    recipe = load_recipe(minimal)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe
    assert "\nwandb: null\n" in again.read_text()
    changed = load_recipe(again, ["wandb.project=x", "evaluate.tasks.a=json"])
    assert changed == load_recipe(minimal, ["wandb.project=x", "evaluate.tasks.a=json"])
    assert changed.wandb is not None
    assert changed.wandb.project == "x"


def test_overrides_are_yaml(minimal: Path) -> None:
    recipe = load_recipe(
        minimal,
        ["optim.lr=2e-4", "batch.packing=false", "data.train=[a.jsonl, {path: b, weight: 2}]", "train.epochs=3"],
    )
    assert (recipe.optim.lr, recipe.batch.packing, recipe.train.epochs) == (2e-4, False, 3)
    assert [source.weight for source in recipe.data.train] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"unknown key 'optim\.lrr' \(value 1\); did you mean 'optim\.lr'\?"),
        ("batch.pack_token=1024", r"did you mean 'batch\.pack_tokens'"),
        ("hub_token=s3cr3tvalue99", r"unknown key 'hub_token' \(value '\*\*\*'\)"),
        ("trian.steps=3", r"unknown key 'trian' .*did you mean 'train'"),
        ("optim.lr=-1", r"optim\.lr=-1: input should be greater than 0"),
        ("optim.lr=.nan", r"optim\.lr=nan"),
        ("loss=mean", r"loss='mean': input should be 'example_mean' or 'token_mean'"),
        ("run.name=../up", r"run\.name='\.\./up': .*use letters"),
        ("batch.tokens=100", r"either batch\.examples or batch\.tokens"),
        ("train={epochs: 1, steps: 2}", r"either train\.epochs or train\.steps"),
        ("optim.min_lr=1", r"optim\.min_lr=1 is above optim\.lr"),
        ("model.trust_remote_code=true", r"needs model\.revision"),
        ("data.train=[]", r"data\.train"),
        ("data.train=''", r"data\.train\.0\.path=''"),
        ("optim.lr=true", r"optim\.lr=True: true and false are no values of this key"),
        ("train.deepspeed=z.json", r"train\.deepspeed is a file for the zero engines"),
        ("oops", r"not of the form section\.key=value"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_with_key_value_and_mend(override: str, message: str, minimal: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_recipe(minimal, [override])
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named(minimal: Path) -> None:
    minimal.write_text(MINIMAL.replace("optim: {lr: 1e-5}", ""))
    with pytest.raises(ConfigError, match="'optim' is missing"):
        load_recipe(minimal)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("run: {name: a, name: b}", "key 'name' is given twice"),
        ("- 1", "mapping of sections"),
        ("", "mapping of sections"),
    ],
)
def test_what_is_not_a_recipe_is_said_to_be_none(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


@pytest.mark.parametrize("path", package_files.recipes(), ids=lambda path: path.stem)
def test_every_shipped_recipe_parses(path: Path) -> None:
    assert load_recipe(path).run.name


def test_the_schema_describes_every_section() -> None:
    schema = json.loads(recipe_schema())
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False


def test_the_schema_file_is_the_schema() -> None:
    """Editors read configs/recipe.schema.json; `sft-dist config --schema > configs/recipe.schema.json` renews it."""
    assert package_files.find("recipe.schema.json").read_text() == recipe_schema() + "\n"


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine.startswith("zero")])
def test_every_zero_engine_has_its_file_of_knobs(engine: str) -> None:
    knobs = read_zero_knobs(package_files.find(f"deepspeed/{engine}.json"), engine=engine)
    assert set(knobs) == {"zero_optimization"}
    assert ("offload_optimizer" in knobs["zero_optimization"]) is engine.endswith("offload")


def test_a_zero_file_that_says_what_the_recipe_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "z.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}))
    with pytest.raises(ConfigError, match=r"'gradient_clipping' belongs to the recipe, as optim\.max_grad_norm"):
        read_zero_knobs(path, engine="zero2")
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}))
    with pytest.raises(ConfigError, match="'data_types' is not a ZeRO knob"):
        read_zero_knobs(path, engine="zero2")
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    with pytest.raises(ConfigError, match=r"lacks offload_optimizer, which contradicts train\.engine=zero2_offload"):
        read_zero_knobs(path, engine="zero2_offload")
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage=2 contradicts train\.engine=zero3"):
        read_zero_knobs(path, engine="zero3")


def test_origin_is_named(minimal: Path) -> None:
    with pytest.raises(ConfigError, match="elsewhere: "):
        parse_recipe({}, origin="elsewhere")


def test_the_home_directory_is_meant_everywhere(minimal: Path) -> None:
    recipe = load_recipe(minimal, ["model.path=~/m", "run.dir=~/runs", "data.train=~/t.jsonl"])
    home = str(Path.home())
    assert recipe.model.path.startswith(home)
    assert str(recipe.run.dir).startswith(home)
    assert recipe.data.train[0].path.startswith(home)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.held_out=a.jsonl", {"held_out": ["a.jsonl"]}),
        ("data.held_out=[a.jsonl, {path: b.csv}]", {"held_out": ["a.jsonl", "b.csv"]}),
        ("data.held_out={path: a.jsonl, format: alpaca}", {"held_out": ["a.jsonl"]}),
        ("data.held_out={one: a.csv, two: [b.csv, {path: c.csv}]}", {"one": ["a.csv"], "two": ["b.csv", "c.csv"]}),
        ("data.held_out=[]", {}),
    ],
)  # fmt: skip
def test_held_out_sources_are_one_set_or_several_by_name(
    override: str, expected: dict[str, list[str]], minimal: Path
) -> None:
    recipe = load_recipe(minimal, [override])
    assert {name: [source.path for source in sources] for name, sources in recipe.data.held_out.items()} == expected
    assert recipe.set_names == tuple(expected)
    assert [source.path for source in recipe.data.held_out_sources] == [
        path for paths in expected.values() for path in paths
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.tasks.x={metric: numeric, day_first: true}"], "evaluate.tasks.x: day_first belongs to date"),
        (["evaluate.tasks.x={metric: numeric, relativ: 0.05}"], "did you mean 'evaluate.tasks.x.relative'"),
        (["evaluate.tasks.x=nummeric"], "evaluate.tasks.x.metric='nummeric'"),
        (["evaluate.keep_best_by=general/loss"], "names the set 'general'; data.held_out has none"),
        (["evaluate.keep_best_by=loss/"], "expected loss, score, SET/loss"),
        (["evaluate.generate_every=5"], "evaluate.generate_every needs data.held_out"),
        (["train.eval_every=5"], "train.eval_every needs data.held_out"),
        (["train.eval_every=5", "train.keep_best=1"], "train.eval_every needs data.held_out"),
        (
            ["data.held_out_share=0.1", "train.keep_best=1", "evaluate.keep_best_by=score"],
            "needs evaluate.generate_every",
        ),
        (["data.held_out={a b: x.jsonl}"], "the set 'a b': use letters"),
        (["data.held_out={a: []}"], "the set 'a' has no source"),
    ],
)  # fmt: skip
def test_an_evaluation_that_cannot_be_meant_is_refused(overrides: list[str], message: str, minimal: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(minimal, overrides)


def test_a_task_is_its_metric_or_a_section(minimal: Path) -> None:
    evaluate = load_recipe(
        minimal, ["evaluate={tasks: {a: json, b: {metric: date, day_first: true}}, default: choice}"]
    )
    assert evaluate.evaluate is not None
    metrics = [evaluate.evaluate.task(name).metric for name in ("a", "b", "c")]
    assert metrics == ["json", "date", "choice"]
