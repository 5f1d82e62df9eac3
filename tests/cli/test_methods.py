import json
import re
from pathlib import Path

import pytest

from kvfold.cli.app import main
from kvfold.methods.registry import METHODS

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_table_in_the_docs_is_the_one_the_code_gives(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--markdown"]) == 0
    printed = capsys.readouterr().out
    written = re.search("<!-- methods -->\n(.*?)<!-- /methods -->", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert written is not None
    assert written[1] == printed, "run `kvfold methods --markdown` into docs/methods.md"


def test_every_method_is_listed_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["methods"]
    assert [each["name"] for each in listed] == list(METHODS)
    for each in listed:
        assert all(each[field] for field in ("kind", "saves", "needs", "prefixes", "prompt", "query_aware"))
        if each["kind"] != "codec" and each["name"] != "staged":
            assert each["paper"].startswith("https://arxiv.org/abs/")


def test_one_method_and_a_misspelt_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "snapkv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"].startswith("budget=1024")
    assert main(["methods", "snapvk"]) == 2
    assert "did you mean 'snapkv'" in capsys.readouterr().err
