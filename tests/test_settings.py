"""Settings: flags > environment > TOML > defaults, and nothing is passed over in silence."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from sorter.errors import ConfigurationError
from sorter.settings import SHIPPED_MODEL, Settings, load

CONFIG = Path(__file__).resolve().parents[1] / "config" / "sorter.toml"
PLACEHOLDERS = {"output", "model", "max_error_rate", "on_sorted"}  # have no default that one could write down


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


# --- precedence ---


def test_without_anything_the_defaults_hold() -> None:
    settings = load({})
    assert (settings.inbox, settings.output, settings.model) == (Path("inbox"), None, SHIPPED_MODEL)
    assert (settings.batch_size, settings.min_confidence, settings.once) == (32, 0.0, False)


def test_the_toml_file_wins_over_the_defaults(tmp_path: Path) -> None:
    assert load({"config": toml(tmp_path, "batch_size = 4")}).batch_size == 4


def test_the_environment_wins_over_the_toml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTER_BATCH_SIZE", "5")
    assert load({"config": toml(tmp_path, "batch_size = 4")}).batch_size == 5


def test_a_flag_wins_over_the_environment_and_the_toml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTER_BATCH_SIZE", "5")
    assert load({"config": toml(tmp_path, "batch_size = 4"), "batch_size": "6"}).batch_size == 6


def test_a_flag_that_says_no_wins_over_a_variable_that_says_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTER_DRY_RUN", "true")
    assert load({"dry_run": False}).dry_run is False


def test_each_source_adds_what_the_others_do_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTER_SETTLE_SECONDS", "5")
    settings = load({"config": toml(tmp_path, "batch_size = 4"), "once": True})
    assert (settings.batch_size, settings.settle_seconds, settings.once) == (4, 5.0, True)


def test_a_variable_names_the_toml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTER_CONFIG", str(toml(tmp_path, "batch_size = 4")))
    assert load({}).batch_size == 4


def test_the_flag_for_the_toml_file_wins_over_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTER_CONFIG", str(tmp_path / "missing.toml"))
    assert load({"config": toml(tmp_path, "batch_size = 4")}).batch_size == 4


def test_a_variable_counts_in_lower_case_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("sorter_batch_size", "5")
    assert load({}).batch_size == 5


def test_the_variable_for_the_toml_file_counts_in_lower_case_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("sorter_config", str(toml(tmp_path, "batch_size = 4")))
    assert load({}).batch_size == 4


def test_one_run_does_not_remember_the_toml_file_of_another(tmp_path: Path) -> None:
    load({"config": toml(tmp_path, "batch_size = 4")})
    assert load({}).batch_size == 32


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load({"inbox": "~/in", "output": "~/out", "model": "~/model"})
    assert (settings.inbox, settings.output, settings.model) == (tmp_path / "in", tmp_path / "out", tmp_path / "model")


def test_the_output_is_the_inbox_unless_it_is_named() -> None:
    assert load({"inbox": "in"}).output_folder == Path("in")


def test_the_output_is_where_it_was_named() -> None:
    assert load({"inbox": "in", "output": "out"}).output_folder == Path("out")


def test_settings_do_not_change_once_they_are_read() -> None:
    settings = load({})
    with pytest.raises(ValueError, match="frozen"):
        settings.batch_size = 1


# --- what is refused, and how it is said ---


def test_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    path = toml(tmp_path, "batchsize = 4")
    assert refusal(config=path).startswith(f"batchsize in {path}: there is no such setting")


def test_a_table_in_the_toml_file_is_refused_by_name(tmp_path: Path) -> None:
    path = toml(tmp_path, "[sorter]\nbatch_size = 4")
    assert refusal(config=path).startswith(f"sorter in {path}: there is no such setting")


def test_an_unknown_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTER_BATCHSIZE", "4")
    assert refusal().startswith("unknown environment variable SORTER_BATCHSIZE: ")


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


@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_an_impossible_flag_is_refused_by_name_and_value(field: str) -> None:
    sentence = refusal(**{field: IMPOSSIBLE[field]})
    assert sentence.startswith(f"--{field.replace('_', '-')}: ")
    assert IMPOSSIBLE[field] in sentence


@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_an_impossible_variable_is_refused_by_name_and_value(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"SORTER_{field.upper()}", IMPOSSIBLE[field])
    sentence = refusal()
    assert sentence.startswith(f"SORTER_{field.upper()}: ")
    assert IMPOSSIBLE[field] in sentence


@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_an_impossible_key_is_refused_by_name_and_value(field: str, tmp_path: Path) -> None:
    path = toml(tmp_path, f'{field} = "{IMPOSSIBLE[field]}"')
    sentence = refusal(config=path)
    assert sentence.startswith(f"{field} in {path}: ")
    assert IMPOSSIBLE[field] in sentence


@pytest.mark.parametrize("text", ["inbox = 5", "once = []", "batch_size = 2.5", "log_level = 3"])
def test_a_key_of_the_wrong_type_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = toml(tmp_path, text)
    assert refusal(config=path).startswith(f"{text.split()[0]} in {path}: ")


@pytest.mark.parametrize("field", ["inbox", "output", "model"])
def test_an_empty_path_in_a_flag_is_refused(field: str) -> None:
    assert refusal(**{field: ""}).startswith(f"--{field}: must not be empty")


@pytest.mark.parametrize("field", ["inbox", "output", "model"])
def test_an_empty_path_in_a_variable_is_refused(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"SORTER_{field.upper()}", "")
    assert refusal().startswith(f"SORTER_{field.upper()}: must not be empty")


@pytest.mark.parametrize("field", ["inbox", "output", "model"])
def test_an_empty_path_in_the_toml_file_is_refused(field: str, tmp_path: Path) -> None:
    path = toml(tmp_path, f'{field} = ""')
    assert refusal(config=path).startswith(f"{field} in {path}: must not be empty")


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toml(tmp_path, "colour = 1")
    monkeypatch.setenv("SORTER_MAX_WAIT_MS", "-1")
    sentences = refusals(config=path, batch_size="0")
    assert sorted(sentence.split(":")[0] for sentence in sentences) == sorted(
        ["--batch-size", "SORTER_MAX_WAIT_MS", f"colour in {path}"]
    )


def test_a_missing_toml_file_is_refused_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "missing.toml"
    assert refusal(config=path).startswith(f"there is no configuration file {path}: ")


def test_a_missing_toml_file_named_by_the_variable_is_refused_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "missing.toml"
    monkeypatch.setenv("SORTER_CONFIG", str(path))
    assert refusal().startswith(f"there is no configuration file {path}: ")


def test_a_toml_file_that_is_no_file_is_refused() -> None:
    assert "no configuration file" in refusal(config=".")
    assert refusal(config="").startswith("--config is empty: ")


def test_an_empty_variable_for_the_toml_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTER_CONFIG", "")
    assert refusal().startswith("SORTER_CONFIG is empty: ")


@pytest.mark.parametrize("content", [b"batch_size = ", b"batch_size: 4\n", b'inbox = "caf\xe9"\n'])
def test_an_invalid_toml_file_is_refused_by_its_path(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    assert refusal(config=path).startswith(f"the configuration file {path} is not valid TOML: ")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that exists and cannot be read")
def test_a_toml_file_that_cannot_be_read_is_refused_by_its_path() -> None:
    assert refusal(config="/proc/self/mem").startswith("the configuration file /proc/self/mem cannot be read")


# --- config/sorter.toml ---


def commented_settings() -> list[tuple[str, str]]:
    """The commented-out settings of `config/sorter.toml`: the comment above each, and the line itself."""
    return re.findall(r"^# (.+)\n# (\w+ = .+)$", CONFIG.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_shipped_toml_file_holds_every_setting_once_in_order() -> None:
    assert [line.split(" = ")[0] for _, line in commented_settings()] == list(Settings.model_fields)


def test_the_shipped_toml_file_shows_every_default() -> None:
    shown = tomllib.loads("\n".join(line for _, line in commented_settings()))
    wanted = {name: str(v) if isinstance(v, Path) else v for name, v in load({}).model_dump().items()}
    assert {k: v for k, v in shown.items() if k not in PLACEHOLDERS} == {
        k: v for k, v in wanted.items() if k not in PLACEHOLDERS
    }


def test_the_shipped_toml_file_describes_every_setting_as_the_help_does() -> None:
    described = {line.split(" = ")[0]: comment for comment, line in commented_settings()}
    assert described == {name: field.description for name, field in Settings.model_fields.items()}


def test_the_shipped_toml_file_changes_nothing_as_it_is() -> None:
    assert load({"config": CONFIG}).model_dump() == load({}).model_dump()


def test_the_shipped_toml_file_uncommented_is_the_default_settings(tmp_path: Path) -> None:
    lines = [line for _, line in commented_settings() if line.split(" = ")[0] not in PLACEHOLDERS]
    assert load({"config": toml(tmp_path, "\n".join(lines))}).model_dump() == load({}).model_dump()


# --- config/README.md ---


def test_the_reference_is_what_the_settings_say() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "sorter.cli.reference"], capture_output=True, text=True, timeout=60, check=True
    )
    assert CONFIG.with_name("README.md").read_text(encoding="utf-8") == said.stdout, "run make reference"
