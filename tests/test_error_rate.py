"""`--max-error-rate`: the threshold comes from the table in the model's manifest."""

from pathlib import Path
from typing import Any

import pytest

from sorter.classifier.manifest import Coverage, ErrorRates, Manifest
from sorter.cli import preflight
from sorter.cli.main import main
from sorter.errors import ConfigurationError
from sorter.settings import Settings, load

RATES = (
    Coverage(error_rate=0.01, threshold=0.99, coverage=0.6),
    Coverage(error_rate=0.02, threshold=0.9, coverage=0.8),
    Coverage(error_rate=0.05, threshold=0.6, coverage=1.0),
)


def with_rates(model: Manifest, *tables: ErrorRates) -> Manifest:
    return model.model_copy(update={"error_rates": tables})


def threshold(model: Manifest, **settings: Any) -> float:
    measured = with_rates(model, ErrorRates(engine="openvino", catch_neither=False, rates=RATES))
    return preflight.decided(Settings(**settings), measured).min_confidence


@pytest.mark.parametrize(("rate", "expected"), [(0.01, 0.99), (0.015, 0.99), (0.02, 0.9), (0.5, 0.6)])
def test_as_many_photos_are_sorted_as_the_rate_allows(rate: float, expected: float, shipped: Manifest) -> None:
    assert threshold(shipped, max_error_rate=rate) == expected


def test_without_a_rate_the_threshold_is_min_confidence(shipped: Manifest) -> None:
    assert threshold(shipped, min_confidence=0.7) == 0.7
    assert threshold(shipped) == 0.0


def test_a_rate_that_the_model_cannot_keep_is_refused_with_the_lowest_it_can(shipped: Manifest) -> None:
    with pytest.raises(
        ConfigurationError, match=r"keeps an error rate of 0\.01 at best: raise or omit --max-error-rate 0\.005"
    ):
        threshold(shipped, max_error_rate=0.005)
    none = with_rates(shipped, ErrorRates(engine="openvino", catch_neither=False, rates=()))
    with pytest.raises(ConfigurationError, match="was shown to keep no error rate: raise or omit"):
        preflight.decided(Settings(max_error_rate=0.1), none)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"engine": "torch", "device": "cpu"},
            "not measured with PyTorch: use --engine openvino --device cpu, omit --max-error-rate, or recreate",
        ),
        ({"catch_neither": True}, "not measured with OpenVINO and --catch-neither: drop --catch-neither, omit"),
        ({"engine": "torch", "device": "cpu", "catch_neither": True}, "with PyTorch and --catch-neither: omit"),
    ],
)
def test_a_rate_is_refused_where_it_was_not_measured(
    settings: dict[str, Any], sentence: str, shipped: Manifest
) -> None:
    # The shipped model has the one table of format 1, of OpenVINO and its cascade.
    table = with_rates(shipped, *(e for e in shipped.error_rates if (e.engine, e.catch_neither) == ("openvino", False)))
    with pytest.raises(ConfigurationError, match=sentence):
        preflight.decided(Settings(max_error_rate=0.02, **settings), table)


def test_each_engine_has_thresholds_of_its_own(shipped: Manifest) -> None:
    tables, expected = [], {}
    for number, way in enumerate((engine, caught) for engine in ("openvino", "torch") for caught in (False, True)):
        expected[way] = 0.9 + number / 100
        rates = (Coverage(error_rate=0.02, threshold=expected[way], coverage=0.5),)
        tables.append(ErrorRates.model_validate({"engine": way[0], "catch_neither": way[1], "rates": rates}))
    measured = with_rates(shipped, *tables)
    for (engine, caught), wanted in expected.items():
        chosen: dict[str, Any] = {"engine": engine, "device": "cpu", "catch_neither": caught}
        assert preflight.decided(Settings(max_error_rate=0.02, **chosen), measured).min_confidence == wanted


def test_the_table_of_an_older_model_folder_is_openvino_s_without_catch_neither(shipped: Manifest) -> None:
    content = shipped.model_dump(mode="json")
    del content["error_rates"]
    older = Manifest.model_validate(content | {"risk_coverage": [entry.model_dump() for entry in RATES]})
    assert older.error_rates == (ErrorRates(engine="openvino", catch_neither=False, rates=RATES),)


def test_a_rate_and_a_threshold_together_are_refused(shipped: Manifest) -> None:
    with pytest.raises(ConfigurationError, match="use only one of them"):
        threshold(shipped, max_error_rate=0.02, min_confidence=0.9)


def test_a_value_that_is_not_a_rate_is_refused() -> None:
    for rate in ("0", "1", "-1", "nan", "much"):
        with pytest.raises(ConfigurationError, match="--max-error-rate: should be"):
            load({"max_error_rate": rate})


def test_the_check_says_what_goes_to_unsure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--max-error-rate", "0.02", "--inbox", str(tmp_path)]) == 0
    assert "photos with a confidence below 0.9" in capsys.readouterr().out
    assert main(["check", "--inbox", str(tmp_path)]) == 0
    assert "nothing; every photo is sorted" in capsys.readouterr().out
