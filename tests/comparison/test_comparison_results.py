"""A file that is not a complete result is refused in one line, by its name."""

import json

import pytest
from benchmarks.comparison.results import METRICS, read_bounds, read_result

POINT = {"step": 4, "FID": 3.5, "KID": 0.1, "precision": 0.7, "recall": 0.6, "recognised": None}
RESULT = {
    **{"comparison": "dtr", "name": "dit", "seed": 1, "settings": {}, "seconds": 9, "commit": "abc"},
    **{"points": [POINT], "fingerprint": {}, "losses": None, "parameters": 5, "gigaflops_per_image": 0.5},
    **{"milliseconds_per_image": 2.0, "hardware": "a machine"},
}
BOUND = dict.fromkeys(METRICS, 0.5) | {"fingerprint": {}}
BOUNDS = {
    **{"real": BOUND, "noise": BOUND | {"recognised": None}, "accuracy": {"extractor": 0.9, "judge": 0.8}},
    **{"settings": {}, "number": 9, "commit": "abc"},
}


def without(content: dict, *names: str) -> dict:
    return {name: value for name, value in content.items() if name not in names}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "dtr").mkdir()
    return tmp_path / "dtr" / "dit-1.json"


def test_complete_results_are_read(path):
    path.write_text(json.dumps(RESULT))
    assert read_result(path) == read_result(path, measured=True) == RESULT
    only_trained = without(RESULT, "points", "fingerprint", "losses", "parameters", "gigaflops_per_image", "hardware")
    path.write_text(json.dumps(only_trained))
    assert read_result(path) == only_trained
    path.write_text(json.dumps(BOUNDS))
    assert read_bounds(path) == BOUNDS


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps(RESULT)[:-40], "what is not JSON, or only a part of it"),
        ("", "what is not JSON, or only a part of it"),
        ([RESULT], "list in the place of an object"),
        (without(RESULT, "settings", "commit"), "one without settings, commit"),
        (without(RESULT, "fingerprint"), "one without fingerprint"),
        (without(RESULT, "points"), "one without points"),
        (RESULT | {"points": []}, "no list of points"),
        (RESULT | {"points": [without(POINT, "KID")]}, "one without KID"),
        (RESULT | {"points": [POINT, POINT | {"FID": "3.5"}]}, "one whose FID is '3.5'"),
        (RESULT | {"points": [POINT | {"recall": None}]}, "one whose recall is None"),
        (RESULT | {"seed": 2}, "that of dtr/dit-2"),
        (RESULT | {"comparison": "digits"}, "that of digits/dit-1"),
    ],
)
def test_others_are_refused(path, content, reason):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as error:
        read_result(path, measured=True)
    message = str(error.value)
    assert message.startswith(f"Expected {str(path)!r} to be a complete result, but got {reason}; delete it")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (without(BOUNDS, "noise"), "one without noise"),
        (BOUNDS | {"real": without(BOUND, "FID")}, "one without FID"),
        (BOUNDS | {"accuracy": {"judge": 0.8}}, "one without extractor"),
    ],
)
def test_incomplete_bounds_are_refused(path, content, reason):
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"to be a complete result, but got {reason};"):
        read_bounds(path)
