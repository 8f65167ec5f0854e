"""Recipes: every mistake is one line that names what would be right; overrides; through TOML and back."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from clasp.config.recipe import Recipe, read_recipe, recipe_from_dict, recipe_keys
from clasp.config.recipe_files import builtin_recipes
from clasp.data.images import Augment
from clasp.data.pairs import ColumnNames
from clasp.types import UserError

SMALL = """
[image]
tower = "pip:efficientnet-lite0"
[text]
tower = "pip:multilingual-e5-small"
"""

# what is typed after the recipe, and what the line must say
WRONG_OVERRIDES = {
    # unknown keys, with the nearest
    "trian.batch=3": ["unknown key 'trian'", "did you mean train?"],
    "train.bacth=3": ["unknown key 'train.bacth'", "did you mean train.batch_size"],
    "train.val=x": ["unknown key 'train.val'", "did you mean data.val"],
    "train.learning_rate=3": ["unknown key 'train.learning_rate'", "valid keys", "train.lr,", "train.seed"],
    "zzz=1": ["unknown key 'zzz'", "image, text, share, tune, head, loss, data, train"],
    "data.columns.imgae=x": ["unknown key 'data.columns.imgae'", "did you mean data.columns.image"],
    "data.augment.flipp=0.5": ["unknown key 'data.augment.flipp'", "did you mean data.augment.flip"],
    "extend=lilt/clip": ["unknown key 'extend'", "did you mean extends?"],
    "extends=lilt/clip": ["extends stands at the beginning of a recipe file"],
    # wrong values
    "train.batch_size=big": ["train.batch_size = 'big'", "integer", "'auto'"],
    "train.batch_size=1": ["train.batch_size = 1", "greater than 1", "'auto'"],
    "train.clip_norm=-1": ["train.clip_norm = -1", "greater than 0", "'none'"],
    "train.lr=nan": ["train.lr = nan", "finite"],
    "train.betas=[0.9, 2]": ["train.betas = 2", "less than 1"],
    "image.background=[1, 2]": ["image.background", "too few"],
    "image.size=4": ["image.size = 4", "greater than or equal to 8"],
    "image.pool=middle": ["image.pool = 'middle'", "'cls'", "'attention'"],
    "image.mean=[0.5, 0.5]": ["image.mean", "too few"],
    "image.mean=[123.7, 116.3, 103.5]": ["image.mean = 123.7", "less than or equal to 1"],
    "image.std=[0, 1, 1]": ["image.std = 0", "greater than 0"],
    "loss.kind=triplet": ["loss.kind = 'triplet'", "'infonce'", "'sigmoid'"],
    "loss.negatives=1": ["loss.negatives = 1", "greater than 1", "'all'"],
    "loss.negatives=few": ["loss.negatives = 'few'", "integer", "'all'"],
    "loss.positives=all": ["loss.positives = 'all'", "'groups'", "'diagonal'"],
    "loss.scale=exp": ["loss.scale = 'exp'", "'log'", "'temperature'"],
    "loss.scale_range=[100, 1]": ["loss: scale_range = [100, 1] is not a least and a greatest"],
    "loss.init_logit_scale=101": ["loss: init_logit_scale = 101 is outside scale_range = [0, 100]"],
    "loss.init_logit_scale=inf": ["loss.init_logit_scale = inf", "finite"],
    "head.standardize=maybe": ["head.standardize = 'maybe'", "boolean"],
    "data.augment.flip=1.5": ["data.augment", "flip = 1.5", "between 0 and 1"],
    "tune.image=norms": ["tune.image = 'norms'", "['norms']"],
    "tune.image=[]": ["tune.image = []", "at least 1"],
    "image=hf:x": ["image = 'hf:x'", "section", "image.tower"],
    "data.columns=3": ["data.columns = 3", "section", "data.columns.caption"],
    # tuning specs
    'tune.image=["nroms"]': ["'nroms'", "did you mean 'norms'?", "adapters"],
    'tune.text=["adapters(reduktion=4)"]': ["adapters has no option 'reduktion'", "reduction"],
    'tune.text=["adapters(reduction=0)"]': ["reduction is a whole number from 1"],
    "tune.text=[\"adapters(place='roof')\"]": ["place is one of"],
    "tune.text=[\"norms(blocks='a:b')\"]": ["blocks='a:b'", "'6:'"],
    'tune.text=["norms("]': ["'norms('", "adapters(reduction=4)"],
    # what does not go together
    "data.class_weight=5": ["data.class_weight = 5", "head.init = 'cca'", "head.init = 'random'"],
    "data.class_weight=-1": ["class_weight"],
    "head.power=[0.5, 1.0]": ["power = [0.5, 1.0]", "standardize = true or 'layer'"],
    "head.power=2": ["head.power = 2", "should be a list"],
    "head.power=[0, 1]": ["head.power", "greater than 0"],
    "head.class_probabilities=true": ["class_probabilities = true", "standardize = 'layer'"],
    "head.correlation_power=[0.5, 1.5]": ["correlation_power = [0.5, 1.5]", "init = 'cca'", "init = 'random'"],
    "head.correlation_power=[0, 1]": ["head.correlation_power", "greater than or equal to 0.25"],
    "head.mean_shrinkage=0.5": ["mean_shrinkage = 0.5", "standardize = 'layer' and init = 'cca'", "init = 'random'"],
    "head.mean_shrinkage=2": ["head.mean_shrinkage", "less than or equal to 1"],
    "head.init=cca": ["head.init = 'cca'", "head.standardize = true"],
    # overrides that are none
    "nope": ["'nope'", "key=value", "train.batch_size=512"],
    "=3": ["'=3'", "key=value"],
    "image.tower.x=3": ["image.tower.x=3", "tower is a value, not a section"],
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return _written(tmp_path, SMALL)


@pytest.mark.parametrize("override", WRONG_OVERRIDES)
def test_a_mistake_is_one_line_with_the_way_out(small: Path, override: str) -> None:
    with pytest.raises(UserError) as error:
        read_recipe(small, [override])
    line = str(error.value)
    assert "\n" not in line and "pydantic" not in line
    for words in WRONG_OVERRIDES[override]:
        assert words in line, line


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("[image]\ntower = 'pip:x'\n", "text is missing"),
        ("[image]\nsize = 64\n[text]\ntower = 'pip:x'\n", "image.tower is missing"),
        ("image = {", "is not a TOML file"),
        ("[image]\ntower = 'a'\ntower = 'b'\n", "is not a TOML file"),
        (SMALL + "[tune]\nimage = ['nroms']\n", "did you mean 'norms'?"),
        (SMALL + "[head]\nstandardize = true\n[tune]\nhead = 'none'\n", "needs tune.head = 'full'"),
    ],
)
def test_mistakes_in_the_file_name_it(tmp_path: Path, text: str, wanted: str) -> None:
    with pytest.raises(UserError, match=r"one.toml|tuning") as error:
        read_recipe(_written(tmp_path, text))
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_not_toml(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a TOML file"):
        read_recipe(tmp_path / "one.toml")


# --- one file on another ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [f"x = {'9' * 5000}", f"x = {'[' * 5000}", f"extends = '{'x' * 5000}'"])
def test_values_beyond_all_measure_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match=r"mine.toml (is not a TOML file|extends)"):
        read_recipe(tmp_path / "mine.toml")


def test_a_file_says_only_what_it_has_otherwise(tmp_path: Path) -> None:
    """Sections are merged to any depth; values and lists are the file's own; overrides come last."""
    (tmp_path / "below").mkdir()
    bottom = SMALL + "[tune]\nimage = ['norms', 'biases']\n[train]\nbatch_size = 8\nlr = 0.1\n"
    _written(tmp_path / "below", bottom + "[data.augment]\nflip = 0.5\nrotate = 3.0\n")
    (tmp_path / "middle.toml").write_text("extends = 'below/one.toml'\n[train]\nbatch_size = 16\n[head]\nwidth = 7\n")
    top = "extends = 'middle.toml'\n[tune]\nimage = ['mlp']\n[data.augment]\nrotate = 4.0\n[text]\npool = 'cls'\n"
    made = read_recipe(_written(tmp_path, top), ["train.epochs=2", "head.width=9"])
    assert (made.train.batch_size, made.train.lr, made.train.epochs, made.head.width) == (16, 0.1, 2, 9)
    assert made.tune.image == ["mlp"] and made.data.augment == Augment(flip=0.5, rotate=4.0)
    assert (made.text.tower, made.text.pool) == ("pip:multilingual-e5-small", "cls")
    assert "extends" not in made.to_dict()
    _goes_round(made)


def test_a_file_stands_on_one_of_clasps_own(tmp_path: Path) -> None:
    made = read_recipe(_written(tmp_path, "extends = 'lilt/lwa'\n[train]\nseed = 3\n"))
    assert made == read_recipe("lilt/lwa", ["train.seed=3"])


def test_a_file_beside_it_comes_before_clasps_own(tmp_path: Path) -> None:
    (tmp_path / "start").write_text(SMALL)
    assert read_recipe(_written(tmp_path, "extends = 'start'")) == read_recipe(_written(tmp_path, SMALL))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("extends = 'lilt/lwaa'", r"one.toml extends lilt/lwaa: no recipe 'lilt/lwaa'.*lilt/lwa"),
        ("extends = 'other.toml'", r"one.toml extends other.toml extends gone.toml: no recipe 'gone.toml'"),
        ("extends = 'one.toml'", r"one.toml extends one.toml: no recipe can extend itself"),
        ("extends = 'loop.toml'", r"one.toml extends loop.toml extends one.toml: no recipe can extend itself"),
        ("extends = ['lilt/lwa', 'start']", r"one.toml: extends = \['lilt/lwa', 'start'\] should be the name of one"),
        ("extends = 'broken.toml'", r"broken.toml is not a TOML file"),
        (
            "extends = 'lilt/lwa'\n[train]\nbacth = 3",
            r"lilt/lwa extends lilt/base: unknown key 'train.bacth'; did you",
        ),
        (
            "extends = 'odd.toml'",
            r"one.toml extends odd.toml: unknown key 'train.bacth'; did you mean train.batch_size",
        ),
        (SMALL + "extends = 'lilt/lwa'", r"unknown key 'text.extends'; did you mean extends\?"),
    ],
)
def test_mistakes_in_extending_name_the_chain(tmp_path: Path, text: str, wanted: str) -> None:
    (tmp_path / "other.toml").write_text("extends = 'gone.toml'")
    (tmp_path / "loop.toml").write_text("extends = 'one.toml'")
    (tmp_path / "broken.toml").write_text("extends = ")
    (tmp_path / "odd.toml").write_text(SMALL + "[train]\nbacth = 3")
    with pytest.raises(UserError, match=wanted) as error:
        read_recipe(_written(tmp_path, text))
    assert "\n" not in str(error.value)


def test_what_a_file_below_augments_can_be_taken_back() -> None:
    assert read_recipe("lilt/heads").data.augment is not None
    assert read_recipe("lilt/heads", ["data.augment={}"]).data.augment is None


def test_parts_of_a_batch_fit_into_it(small: Path) -> None:
    assert read_recipe(small, ["loss.negatives=32", "train.batch_size=32"]).loss.negatives == 32
    assert read_recipe(small, ["loss.negatives=32"]).train.batch_size == "auto", "then it is asked when there are pairs"
    with pytest.raises(
        UserError, match=r"loss.negatives = 33 is more than the 32 pairs of a batch \(train.batch_size\)"
    ):
        read_recipe(small, ["loss.negatives=33", "train.batch_size=32"])


# --- names, overrides, TOML ------------------------------------------------------------------------------------------


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no recipe 'lilt/lwaa'.*lilt/lwa"):
        read_recipe("lilt/lwaa")
    with pytest.raises(UserError, match=r"no recipe 'q'.*demo, .*start"):
        read_recipe("q")
    with pytest.raises(UserError, match=r"recipes/none.toml"):
        read_recipe("recipes/none.toml")


def test_overrides_read_as_toml_and_bare_words_as_strings(small: Path) -> None:
    changed = read_recipe(
        small,
        [
            "train.batch_size=512",
            "train.epochs=auto",
            "train.lr=3e-4",
            "head.standardize=true",
            'tune.image=["norms", "lora(rank=8)"]',
            "image.background=[0, 0, 0]",
            "text.prefix=query: ",
            "data.train=/pictures/a b=c.csv",
            'data.val="quoted"',
            "data.languages=['sw', 'yo']",
            "data.columns.caption=title",
            "data.augment.flip=0.5",
            "train.batch_size=256",
        ],
    )
    assert changed.train.batch_size == 256 and changed.train.epochs == "auto" and changed.train.lr == 3e-4
    assert changed.head.standardize is True and changed.tune.image == ["norms", "lora(rank=8)"]
    assert changed.image.background == (0, 0, 0) and changed.text.prefix == "query: "
    assert changed.data.train == "/pictures/a b=c.csv" and changed.data.val == "quoted"
    assert changed.data.languages == ["sw", "yo"]
    assert changed.data.columns == ColumnNames(caption="title") and changed.data.augment == Augment(flip=0.5)


@pytest.mark.parametrize("name", ["2024", "2024-01-01", "1e5", "true", "[a]", "{x}", "nan"])
def test_a_folder_may_be_called_like_a_number(small: Path, name: str) -> None:
    assert read_recipe(small, [f"data.train={name}"]).data.train == name


def test_changed_leaves_the_recipe_alone(small: Path) -> None:
    recipe = read_recipe(small, ["data.columns.image=a"])
    changed = recipe.with_overrides(["data.columns.image=b", "train.seed=7"])
    assert (recipe.data.columns.image, recipe.train.seed) == ("a", 0)
    assert (changed.data.columns.image, changed.train.seed) == ("b", 7)
    with pytest.raises(UserError, match="the overrides: unknown key"):
        recipe.with_overrides(["train.sede=1"])


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_shipped_recipes_read_and_go_through_toml_unchanged(name: str) -> None:
    recipe = read_recipe(name)
    _goes_round(recipe)
    assert read_recipe(f"recipes/{name}.toml") == read_recipe(builtin_recipes()[name]) == recipe


def test_a_trunk_shares_its_blocks_where_nothing_else_is_said_of_them() -> None:
    def kept(*said: str) -> tuple:
        recipe = read_recipe("peft/adapters", ["share.trunk=text", *said])
        assert recipe.to_dict()["share"]["attention"] == recipe.share.attention
        return recipe.share.policy.attention, recipe.share.policy.ffn, recipe.share.policy.layers

    assert kept() == ("shared", "shared", None)
    assert kept("share.norm1=shared", "share.layers=2:") == ("shared", "shared", "2:")
    assert kept("share.attention=separate") == ("separate", "shared", None)
    assert read_recipe("peft/adapters").share is None


def test_every_kind_of_value_goes_through_toml_unchanged(small: Path) -> None:
    extra = [
        "data.train=Ünïcode '\"\\ path",
        "data.augment.crop_scale=[0.5, 1.0]",
        "data.columns.id=key",
        "data.languages=['日本']",
        "train.clip_norm=none",
        "train.betas=[0.8, 0.99]",
        "text.layer=-2",
        "image.pool=mean",
        "tune.text=[\"match('a.*')\"]",
        "loss.scale_range=[0, inf]",
        "loss.negatives=4",
        "image.std=[0.5, 0.5, 1]",
    ]
    _goes_round(read_recipe(small, extra))


def test_there_are_the_recipes_that_the_documents_name() -> None:
    lilt = {f"lilt/{name}" for name in ("base", "clip", "lit", "heads", "layernorm", "bitfit", "last", "da", "lwa")}
    assert {"start", "demo", *lilt} <= set(builtin_recipes())


def test_every_key_has_a_place() -> None:
    keys = recipe_keys()
    assert keys["data"] is None and keys["data.train"] == str | None and keys["data.columns.image"] is str
    assert all("." not in key or key.rpartition(".")[0] in keys for key in keys)


def _goes_round(recipe: Recipe) -> None:
    text = recipe.to_toml()
    again = recipe_from_dict(tomllib.loads(text), "again")
    assert again == recipe and again.to_toml() == text and again.to_dict() == tomllib.loads(text)


def _written(folder: Path, text: str) -> Path:
    (folder / "one.toml").write_text(text, encoding="utf-8")
    return folder / "one.toml"
