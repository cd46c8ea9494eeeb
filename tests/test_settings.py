"""Settings: flags > environment > TOML > defaults, and nothing is silently ignored."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from sorter.cli.main import build_parser
from sorter.cli.reference import reference
from sorter.errors import ConfigurationError
from sorter.settings import SHIPPED_MODEL, Settings, load

CONFIG = Path(__file__).resolve().parents[1] / "config" / "sorter.toml"
# Their defaults cannot be written as TOML.
PLACEHOLDERS = {"output", "state_dir", "model", "max_error_rate", "on_sorted"}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("SORTER_"):
            monkeypatch.delenv(name)


def toml(folder: Path, text: str) -> Path:
    path = folder / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusals(**flags: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load(flags)
    return str(caught.value).split("\n")


def refusal(**flags: Any) -> str:
    (sentence,) = refusals(**flags)
    return sentence


def test_the_defaults_apply_without_any_source() -> None:
    settings = load({})
    assert (settings.inbox, settings.output, settings.model) == (Path("inbox"), None, SHIPPED_MODEL)
    assert (settings.batch_size, settings.min_confidence, settings.once) == (32, 0.0, False)


def test_a_flag_overrides_a_variable_which_overrides_the_toml_file_which_overrides_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toml(tmp_path, "batch_size = 4")
    assert load({"config": path}).batch_size == 4
    monkeypatch.setenv("SORTER_BATCH_SIZE", "5")
    assert load({"config": path}).batch_size == 5
    assert load({"config": path, "batch_size": "6"}).batch_size == 6


def test_a_negative_flag_overrides_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTER_DRY_RUN", "true")
    assert load({"dry_run": False}).dry_run is False


def test_the_sources_complement_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTER_SETTLE_SECONDS", "5")
    settings = load({"config": toml(tmp_path, "batch_size = 4"), "once": True})
    assert (settings.batch_size, settings.settle_seconds, settings.once) == (4, 5.0, True)


def test_the_toml_file_is_named_by_a_flag_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(toml(tmp_path, "batch_size = 4"))
    monkeypatch.setenv("SORTER_CONFIG", path)
    assert load({}).batch_size == 4
    monkeypatch.setenv("SORTER_CONFIG", str(tmp_path / "missing.toml"))
    assert load({"config": path}).batch_size == 4


def test_variables_are_not_case_sensitive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("sorter_config", str(toml(tmp_path, "batch_size = 4")))
    assert load({}).batch_size == 4
    monkeypatch.setenv("sorter_batch_size", "5")
    assert load({}).batch_size == 5


def test_loading_does_not_remember_an_earlier_toml_file(tmp_path: Path) -> None:
    load({"config": toml(tmp_path, "batch_size = 4")})
    assert load({}).batch_size == 32


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load({"inbox": "~/in", "output": "~/out", "model": "~/model"})
    assert (settings.inbox, settings.output, settings.model) == (tmp_path / "in", tmp_path / "out", tmp_path / "model")


def test_a_path_that_begins_with_the_parent_folder_outlives_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = tmp_path / "here"
    current.mkdir()
    monkeypatch.chdir(current)
    settings = load({"inbox": "../in", "output": "../../a/../b", "model": f"{'../' * 99}m"})
    assert settings.inbox == tmp_path / "in"
    assert settings.output == tmp_path.parent / "a/../b"  # `a` may be a link
    assert settings.model == Path("/m")
    current.rmdir()
    assert load({"inbox": "/in"}).inbox == Path("/in")
    assert refusal(inbox="in") == "--inbox: should be an absolute path, as the current folder is gone, not 'in'"


def test_the_output_is_the_inbox_unless_it_is_given() -> None:
    assert load({"inbox": "in"}).output_folder == Path("in")
    assert load({"inbox": "in", "output": "out"}).output_folder == Path("out")


def test_settings_cannot_be_changed() -> None:
    settings = load({})
    with pytest.raises(ValueError, match="frozen"):
        settings.batch_size = 1


def test_an_unknown_key_or_table_is_refused_by_name(tmp_path: Path) -> None:
    for text, name in (("batchsize = 4", "batchsize"), ("[sorter]\nbatch_size = 4", "sorter")):
        path = toml(tmp_path, text)
        assert refusal(config=path).startswith(f"{name} in {path}: unknown setting; ")


def test_an_unknown_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTER_BATCHSIZE", "4")
    assert refusal().startswith("unknown environment variable SORTER_BATCHSIZE: ")


def test_a_list_is_a_list_in_the_file_commas_in_a_variable_and_a_flag_given_several_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load({}).exclude == ()
    path = toml(tmp_path, 'exclude = ["*.png", "a,b/"]')
    assert load({"config": path}).exclude == ("*.png", "a,b/")
    monkeypatch.setenv("SORTER_EXCLUDE", "*.png, scans/")
    assert load({"config": path}).exclude == ("*.png", "scans/")
    flags = vars(build_parser().parse_args(["run", "--exclude", "*.gif", "--exclude", "a,b/"]))
    assert load({"exclude": flags["exclude"]}).exclude == ("*.gif", "a,b/")
    monkeypatch.setenv("SORTER_EXCLUDE", "")
    assert load({"config": path}).exclude == ()


def test_a_pattern_that_cannot_be_one_is_refused_by_name(tmp_path: Path) -> None:
    path = toml(tmp_path, 'include = ["!"]')
    assert refusal(config=path).startswith(f"include in {path}: Invalid git pattern")
    path = toml(tmp_path, "temporary_names = [5]")
    assert refusal(config=path).startswith(f"temporary_names in {path}: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("include", ""),
        ("exclude", "../x"),
        ("ignored_folders", "a/b"),
        ("temporary_names", " "),
        ("sidecar_suffixes", "/x"),
    ],
)
def test_a_pattern_or_name_that_matches_nothing_is_refused(name: str, value: str) -> None:
    assert f"'{value}'" in refusal(**{name: [value]})


IMPOSSIBLE = {
    "batch_size": "many",
    "min_confidence": "1.5",
    "settle_seconds": "-1",
    "rescan_seconds": "0",
    "max_wait_ms": "0.5",
    "max_megapixels": "0",
    "max_megabytes": "inf",
    "decode_timeout_seconds": "nan",
    "once": "perhaps",
    "device": "toaster",
    "log_format": "xml",
    "log_level": "loud",
}


def test_an_impossible_value_is_refused_with_its_name_wherever_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for field, value in IMPOSSIBLE.items():
        path, flag, variable = toml(tmp_path, f'{field} = "{value}"'), field.replace("_", "-"), field.upper()
        said = {f"--{flag}: ": refusal(**{field: value}), f"{field} in {path}: ": refusal(config=path)}
        with monkeypatch.context() as environment:
            environment.setenv(f"SORTER_{variable}", value)
            said[f"SORTER_{variable}: "] = refusal()
        for place, sentence in said.items():
            assert sentence.startswith(place)
            assert value in sentence, (place, sentence)


def test_a_key_of_the_wrong_type_is_refused_by_name(tmp_path: Path) -> None:
    for text in ("inbox = 5", "once = []", "batch_size = 2.5", "log_level = 3"):
        path = toml(tmp_path, text)
        assert refusal(config=path).startswith(f"{text.split()[0]} in {path}: ")


def test_of_the_two_thresholds_the_stronger_source_sets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toml(tmp_path, "max_error_rate = 0.01")

    def thresholds(**flags: Any) -> tuple[float, float | None]:
        settings = load({"config": path, **flags})
        return settings.min_confidence, settings.max_error_rate

    assert thresholds() == (0, 0.01)
    assert thresholds(min_confidence="0.5") == (0.5, None)
    assert thresholds(min_confidence="0") == (0, None)
    monkeypatch.setenv("SORTER_MIN_CONFIDENCE", "0.7")
    assert thresholds() == (0.7, None)
    assert thresholds(max_error_rate="0.02") == (0, 0.02)
    assert thresholds(max_error_rate="none") == (0, None)
    assert thresholds(max_error_rate="0.02", min_confidence="0.5") == (0.5, 0.02)  # refused when the model is known


def test_none_unsets_what_a_weaker_source_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toml(tmp_path, "output = 'out'\nmax_error_rate = 0.01\non_sorted = 'true'\n")
    monkeypatch.setenv("SORTER_ON_SORTED", "false")
    settings = load({"config": path, "output": "none", "max_error_rate": "none", "on_sorted": "none"})
    assert (settings.output, settings.max_error_rate, settings.on_sorted) == (None, None, None)
    assert load({"on_sorted": ""}).on_sorted is None
    assert load({"output": "./none"}).output == Path("none")


def test_an_empty_path_is_refused_wherever_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for field in ("inbox", "output", "model"):
        path = toml(tmp_path, f'{field} = ""')
        assert refusal(config=path).startswith(f"{field} in {path}: must not be empty")
        assert refusal(**{field: ""}).startswith(f"--{field}: must not be empty")
        with monkeypatch.context() as environment:
            environment.setenv(f"SORTER_{field.upper()}", "")
            assert refusal().startswith(f"SORTER_{field.upper()}: must not be empty")


def test_everything_that_is_wrong_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toml(tmp_path, "colour = 1")
    monkeypatch.setenv("SORTER_MAX_WAIT_MS", "-1")
    sentences = refusals(config=path, batch_size="0")
    assert sorted(sentence.split(":")[0] for sentence in sentences) == sorted(
        ["--batch-size", "SORTER_MAX_WAIT_MS", f"colour in {path}"]
    )


def test_a_toml_file_that_is_missing_or_not_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "missing.toml"
    sentence = f"there is no configuration file {path}: "
    assert refusal(config=path).startswith(sentence)
    assert "no configuration file" in refusal(config=".")
    assert refusal(config="").startswith("--config is empty: ")
    monkeypatch.setenv("SORTER_CONFIG", str(path))
    assert refusal().startswith(sentence)
    monkeypatch.setenv("SORTER_CONFIG", "")
    assert refusal().startswith("SORTER_CONFIG is empty: ")


def test_an_invalid_toml_file_is_refused_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    for content, hint in {
        b"batch_size = ": "",
        b"batch_size: 4\n": "",
        b'inbox = "caf\xe9"\n': "save it as UTF-8",
        b"\xef\xbb\xbfbatch_size = 4\n": "save it as UTF-8 without a byte order mark",
    }.items():
        path.write_bytes(content)
        assert refusal(config=path).startswith(f"the configuration file {path} is not valid TOML: {hint}")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that exists and cannot be read")
def test_a_toml_file_that_cannot_be_read_is_refused_by_its_path() -> None:
    assert refusal(config="/proc/self/mem").startswith("the configuration file /proc/self/mem cannot be read")


def commented_settings() -> list[tuple[str, str]]:
    """The commented-out settings of `config/sorter.toml`: the comment above each, and the line itself."""
    return re.findall(r"^# (.+)\n# (\w+ = .+)$", CONFIG.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_shipped_toml_file_lists_every_setting_in_order_with_its_default_and_its_help() -> None:
    assert [line.split(" = ")[0] for _, line in commented_settings()] == list(Settings.model_fields)
    described = {line.split(" = ")[0]: comment for comment, line in commented_settings()}
    assert described == {name: field.description for name, field in Settings.model_fields.items()}
    shown = tomllib.loads("\n".join(line for _, line in commented_settings()))
    defaults = load({}).model_dump().items()
    wanted = {n: str(v) if isinstance(v, Path) else [*v] if isinstance(v, tuple) else v for n, v in defaults}
    assert {k: v for k, v in shown.items() if k not in PLACEHOLDERS} == {
        k: v for k, v in wanted.items() if k not in PLACEHOLDERS
    }


def test_the_shipped_toml_file_changes_nothing_unedited() -> None:
    assert load({"config": CONFIG}).model_dump() == load({}).model_dump()


def test_the_shipped_toml_file_uncommented_is_the_default_settings(tmp_path: Path) -> None:
    lines = [line for _, line in commented_settings() if line.split(" = ")[0] not in PLACEHOLDERS]
    assert load({"config": toml(tmp_path, "\n".join(lines))}).model_dump() == load({}).model_dump()


def test_the_reference_page_is_generated_from_the_settings() -> None:
    page = CONFIG.with_name("settings.md").read_text(encoding="utf-8")
    assert page == reference(), "run make reference"
