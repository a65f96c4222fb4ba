"""Settings to a file and back, and what a value may be."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from arrag_runtime.daid import DaidSettings
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.generation.settings import GenerateSettings
from arrag_runtime.settings import (
    Setting,
    make,
    read_toml,
    settings_of,
    to_toml,
    values_of,
)
from arrag_runtime.training.settings import TrainSettings
from schemas.settings.build import BuildSettings
from schemas.settings.download import DownloadSettings
from schemas.settings.evaluate import EvaluateSettings
from schemas.settings.index import IndexSettings
from schemas.settings.plan import DoctorSettings, ForecastSettings
from schemas.settings.query import QuerySettings
from schemas.settings.resources import RayResources
from schemas.settings.source import SourceSettings
from schemas.settings.trainset import TrainsetSettings

CLASSES: list[Any] = [
    BuildSettings,
    DaidSettings,
    DoctorSettings,
    DownloadSettings,
    EvaluateSettings,
    ForecastSettings,
    GenerateSettings,
    IndexSettings,
    QuerySettings,
    RayResources,
    SourceSettings,
    TrainSettings,
    TrainsetSettings,
]
NEEDED = {"source": "folder", "prompt": ("a hat",), "data": Path("set"), "out": Path("run")}
every_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


def smallest(kind: Any) -> Any:
    """Settings with nothing given but what must be."""
    needed = {s.key for s in settings_of(kind) if s.default is MISSING}
    return make(kind, {key: NEEDED[key] for key in needed})


def through_a_file(kind: Any, value: Any, path: Path) -> Any:
    path.write_text(to_toml(values_of(value)), encoding="utf-8")
    return make(kind, read_toml(kind, path))


@every_class
def test_defaults_come_back_from_a_file(kind: Any, tmp_path: Path) -> None:
    value = smallest(kind)
    assert through_a_file(kind, value, tmp_path / "a.toml") == value


def one(setting: Setting) -> st.SearchStrategy[Any]:
    """Values that a setting may have."""
    low, high = setting.option.minimum, setting.option.maximum
    if setting.choices:
        return st.sampled_from(setting.choices)
    if setting.type is bool:
        return st.booleans()
    if setting.type is int:
        return st.integers(int(low or 0), None if high is None else int(high))
    if setting.type is float:
        return st.floats(0.5 if low is None else low, 0.9 if high is None else high)
    text = st.text(st.characters(codec="utf-8"), min_size=1)
    return text if setting.type is str else st.sampled_from([Path("a b"), Path("/x/ü.toml")])


@every_class
@settings(max_examples=25)
@given(data=st.data())
def test_any_settings_come_back_from_a_file(
    kind: Any, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is given, of every type; what does not go together is refused when it is made."""
    values = {}
    for setting in settings_of(kind):
        if setting.default is MISSING or setting.key == "source" or data.draw(st.booleans()):
            value = one(setting)
            values[setting.key] = data.draw(
                st.lists(value, min_size=1, max_size=3).map(tuple) if setting.many else value
            )
    try:
        made = make(kind, values)
    except BadInputError:
        reject()
    path = tmp_path_factory.mktemp("toml") / "a.toml"
    assert through_a_file(kind, made, path) == made
    assert {key: values_of(made)[key] for key in values} == values


@every_class
def test_every_field_is_documented_and_named_once(kind: Any) -> None:
    offered = settings_of(kind)
    assert all(setting.help for setting in offered), [s.path for s in offered if not s.help]
    for names in ([s.key for s in offered], [f for s in offered for f in s.flags]):
        assert len(set(names)) == len(names)
    assert {s.path[0] for s in offered} <= {field.name for field in fields(kind)}


@every_class
def test_values_out_of_bounds_and_other_choices_are_refused(kind: Any) -> None:
    """In Python as on the command line; the option is named."""
    good = values_of(smallest(kind))
    for setting in settings_of(kind):
        option = setting.option
        wrong: list[Any] = ["nonsense"] if setting.choices else []
        wrong += [option.minimum - 1] if option.minimum is not None else []
        wrong += [option.maximum + 1] if option.maximum is not None else []
        wrong += [bound for bound in (option.above, option.below) if bound is not None]
        wrong += [float("nan")] if setting.type is float and wrong else []
        for value in wrong:
            with pytest.raises(BadInputError, match=f"{setting.key}.*{value}.*(give|choose)"):
                make(kind, good | {"source": "folder"} | {setting.key: value})


def test_bounds_are_told_in_words() -> None:
    with pytest.raises(BadInputError, match=r"^--hold-out is 2; give 0\.0 to 0\.99$"):
        BuildSettings(source=SourceSettings(name="sample"), hold_out=2)
    with pytest.raises(BadInputError, match=r"^--lora-dropout is 1; give 0 to below 1$"):
        TrainSettings(data=Path("d"), out=Path("o"), lora_dropout=1)
    with pytest.raises(BadInputError, match=r"^--epochs is 0; give more than 0$"):
        TrainSettings(data=Path("d"), out=Path("o"), epochs=0)
    with pytest.raises(BadInputError, match=r"^unknown --kind 'hnsw'; choose one of codebook, "):
        IndexSettings(kind="hnsw")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min-sidee = 3", "has an unknown name 'min-sidee'; did you mean min-side?"),
        ("zzz = 3", "has an unknown name 'zzz'; --help lists the names, less the dashes"),
        ("[source]\nlimit = 3", "source is {'limit': 3}; give a text in quotes"),
        ("min-side = 'many'", "min-side is 'many'; give a whole number"),
        ("min_side = 1.5", "min_side is 1.5; give a whole number"),
        ("min-side = true", "min-side is True; give a whole number"),
        ("timeout = 'long'", "timeout is 'long'; give a number"),
        ("compile = 1", "compile is 1; give true or false"),
        ("tokenizer = 3", "tokenizer is 3; give a text in quotes"),
        ("input = 'a'", """input is 'a'; give a list such as ["…"]"""),
        ("input = [1]", """input is [1]; give a list such as ["…"]"""),
        ("min-side = 0", "--min-side is 0; give 1 or more"),
        ("border = 'x'", "unknown --border 'x'; choose one of skip, zero"),
        ("min-side = = 3", "is no TOML: "),
        ("min-side = 3\nmin-side = 4", "is no TOML: "),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "build.toml"
    path.write_text(text)
    with pytest.raises(BadInputError) as error:
        read_toml(BuildSettings, path)
    assert str(error.value).startswith(f"--config '{path}'")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"^cannot read --config '.*gone': No such file"):
        read_toml(BuildSettings, tmp_path / "gone")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInputError, match="is no TOML"):
        read_toml(BuildSettings, tmp_path / "bytes")


def test_names_may_have_dashes_or_underscores(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("source = 'folder'\nmin_side = 5\nmax-pixels = 9\ntimeout = 3\ninput = ['x']\n")
    made = make(BuildSettings, read_toml(BuildSettings, path))
    assert (made.min_side, made.max_pixels, made.source.input) == (5, 9, ("x",))
    assert repr(made.download.timeout) == "3.0"
