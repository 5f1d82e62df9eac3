"""Both trace formats: what is written is read, and what is malformed is named by its line."""

import json
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.benchmark.errors import TraceError
from kvfold.benchmark.trace import BLOCK_TOKENS, read_trace

TOKENS = st.integers(1, 200_000)
EPOCH = datetime(2023, 11, 16, 18, 17, 3)
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def write(folder: Path | str, name: str, text: str) -> Path:
    path = Path(folder) / name
    path.write_text(text)
    return path


@given(st.lists(st.tuples(st.integers(0, 10**9), TOKENS, TOKENS), min_size=1, max_size=20), st.booleans())
def test_azure_requests_come_back_in_order_of_time(rows: list[tuple[int, int, int]], windows: bool) -> None:
    end = "\r\n" if windows else "\n"
    # Azure writes seven digits of a second, one more than Python keeps.
    lines = [f"{EPOCH + timedelta(microseconds=at):%Y-%m-%d %H:%M:%S.%f}0,{i},{o}" for at, i, o in rows]
    with TemporaryDirectory() as folder:
        found = read_trace(write(folder, "t.csv", HEADER.strip() + end + end.join(lines)))
    expected = sorted(rows, key=lambda row: row[0])
    assert [(r.input_tokens, r.output_tokens) for r in found] == [(i, o) for _, i, o in expected]
    assert [r.at for r in found] == pytest.approx([(at - expected[0][0]) / 1e6 for at, _, _ in expected], abs=2e-6)


@given(st.lists(st.tuples(st.integers(0, 10**7), TOKENS, TOKENS), min_size=1, max_size=20), st.data())
def test_mooncake_requests_keep_their_blocks(rows: list[tuple[int, int, int]], data: st.DataObject) -> None:
    rows.sort(key=lambda row: row[0])
    ids = [data.draw(st.integers(0, 1000)) for _ in rows]
    lines = [
        json.dumps({"timestamp": at, "input_length": i, "output_length": o, "hash_ids": [n] * -(-i // BLOCK_TOKENS)})
        for (at, i, o), n in zip(rows, ids, strict=True)
    ]
    first = data.draw(st.integers(0, len(rows) - 1))
    count = data.draw(st.integers(1, len(rows)))
    with TemporaryDirectory() as folder:
        found = read_trace(write(folder, "t.jsonl", "\n".join(lines) + "\n\n"), first, count)
    wanted = rows[first : first + count]
    assert [(r.input_tokens, r.output_tokens) for r in found] == [(i, o) for _, i, o in wanted]
    assert [set(r.hash_ids) for r in found] == [{n} for n in ids[first : first + count]]
    assert [r.at for r in found] == pytest.approx([(at - wanted[0][0]) / 1000 for at, _, _ in wanted])


GOOD_CSV = HEADER + "2023-11-16 18:17:03.9799600,10,20\n"
GOOD_JSON = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "line 1: the header"),
        ("t.csv", "a,b,c\n", "line 1: the header"),
        ("t.csv", GOOD_CSV + "2023-11-16 18:17:04,10\n", "line 3: 2 columns"),
        ("t.csv", GOOD_CSV + "yesterday,10,20\n", "line 3: 'yesterday' is no time"),
        ("t.csv", GOOD_CSV + "2023-11-16 18:17:04,ten,20\n", "line 3: ContextTokens 'ten'"),
        ("t.csv", GOOD_CSV + "2023-11-16 18:17:04,10,-2\n", "line 3: GeneratedTokens '-2'"),
        ("t.csv", GOOD_CSV + "2023-11-16 18:17:04,10,1e3\n", "line 3: GeneratedTokens '1e3'"),
        ("t.csv", GOOD_CSV + f"2023-11-16 18:17:04,{'9' * 5000},1\n", "line 3: ContextTokens"),
        ("t.jsonl", GOOD_JSON + "{\n", "line 2: no JSON"),
        ("t.jsonl", GOOD_JSON + "[1]\n", "line 2: no JSON object"),
        ("t.jsonl", GOOD_JSON + "[" * 100_000, "line 2: no JSON"),
        ("t.jsonl", GOOD_JSON.replace("0,", "NaN,", 1), "line 1: 'timestamp'"),
        ("t.jsonl", GOOD_JSON.replace("0,", "true,", 1), "line 1: 'timestamp'"),
        ("t.jsonl", GOOD_JSON.replace("0,", "-5,", 1), "line 1: 'timestamp' -5 is negative"),
        ("t.jsonl", GOOD_JSON.replace('"output_length": 5, ', ""), "line 1: 'output_length' is missing"),
        ("t.jsonl", GOOD_JSON.replace('"timestamp": 0, ', ""), "line 1: 'timestamp' is missing"),
        ("t.jsonl", GOOD_JSON.replace("600", "600.5"), "line 1: input_length 600.5"),
        ("t.jsonl", GOOD_JSON.replace("[0, 1]", '["a"]'), "line 1: 'hash_ids'"),
        ("t.jsonl", GOOD_JSON.replace("[0, 1]", "[0]"), "line 1: 1 hash_ids for 600 tokens, which are 2 blocks"),
        ("t.jsonl", "\n", "has no request from number 0"),
    ],
)
def test_malformed_traces_are_refused_by_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError) as caught:
        read_trace(write(tmp_path, name, text))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 6000 + len(str(tmp_path))


def test_unreadable_traces_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (tmp_path / "none.csv", "cannot read"),
        (tmp_path, "cannot read"),
        (tmp_path / "t.csv", "UTF-8"),
    ):
        with pytest.raises(TraceError, match=message):
            read_trace(path)


def test_lines_after_the_wanted_part_do_not_matter(tmp_path: Path) -> None:
    assert len(read_trace(write(tmp_path, "t.csv", GOOD_CSV + "broken\n"), 0, 1)) == 1


def test_requests_of_no_tokens_become_one_token(tmp_path: Path) -> None:
    (request,) = read_trace(write(tmp_path, "t.csv", HEADER + "2023-11-16 18:17:03,0,0\n"))
    assert (request.input_tokens, request.output_tokens) == (1, 1)
