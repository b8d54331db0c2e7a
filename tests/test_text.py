"""Calibration and held-out text: never the same tokens, every domain in turn, spread over the whole text."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from edgeprune.errors import BadFile, UsageError
from edgeprune.measure.documents import SEPARATOR, Document, prepared_line, read_plain
from edgeprune.measure.text import (
    CHATS,
    CHOOSING,
    JSON_LINES,
    PREPARED,
    REPORTING,
    SHORTEST_WINDOW,
    LeftOut,
    TextFile,
    parse_texts,
    read_documents,
    shipped_texts,
    texts_digest,
    windows,
)

LENGTH = 20
PLENTY = 10**9


def numbers(document: Document) -> list[int]:
    """A token per number, so that every token of a text can be told from every other."""
    return [int(word) for word in document.text.split()]


def as_bytes(document: Document) -> list[int]:
    return list(document.text.encode())


def counted(path: Path, sizes: list[int], start: int = 0) -> TextFile:
    """A file with documents of so many tokens, all different, counted up from ``start``."""
    documents = []
    for size in sizes:
        documents.append(" ".join(map(str, range(start, start + size))))
        start += size
    path.write_text(f"\n{SEPARATOR}\n".join(documents), encoding="utf-8")
    return TextFile(path.stem, str(path))


def tokens(texts: list[TextFile], split: str, most: int = PLENTY) -> list[int]:
    return [token for window in windows(texts, split, LENGTH, most, numbers) for token in window.tokens]


def test_documents_are_separated_by_lines_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(f"one %%%% line\n\n{SEPARATOR}\n\n\n{SEPARATOR}\n  two\nlines\n", encoding="utf-8")
    assert read_plain(path) == ["one %%%% line", "  two\nlines"]
    assert read_documents(TextFile("a", str(path))) == [Document("one %%%% line"), Document("  two\nlines")]


@pytest.mark.parametrize("sizes", [[40] * 8, [25, 90, 33, 61, 20, 300, 47], [400], [100, 100], [17] * 9])
def test_held_out_text_is_never_calibrated_on(tmp_path: Path, sizes: list[int]) -> None:
    text = counted(tmp_path / "a.txt", sizes)
    calibration, held_out = tokens([text], "calibration"), tokens([text], "held_out")
    assert calibration
    assert held_out
    assert not set(calibration) & set(held_out)
    assert len(set(calibration)) == len(calibration)
    assert sorted(calibration) == calibration
    # Together all of the text but the ends of documents that are too short for a window.
    lost = sum(size % LENGTH for size in sizes if size % LENGTH < SHORTEST_WINDOW)
    assert len(calibration) + len(held_out) == sum(sizes) - lost


def test_every_fourth_document_is_held_out(tmp_path: Path) -> None:
    text = counted(tmp_path / "a.txt", [LENGTH] * 8)
    assert tokens([text], "held_out") == [*range(60, 80), *range(140, 160)]


def test_every_fourth_window_of_a_single_document_is_held_out(tmp_path: Path) -> None:
    text = counted(tmp_path / "a.txt", [LENGTH * 8])
    assert tokens([text], "held_out") == [*range(60, 80), *range(140, 160)]


@pytest.mark.parametrize("sizes", [[40] * 8, [25, 90, 33, 61, 20, 300, 47], [400], [17] * 12])
def test_held_out_text_has_two_halves_in_every_domain(tmp_path: Path, sizes: list[int]) -> None:
    """What chooses a file never reports of it, and both are of all domains and as long."""
    texts = [counted(tmp_path / f"{name}.txt", sizes, start) for name, start in (("a", 0), ("b", 1000))]
    halves = {part: windows(texts, part, LENGTH, PLENTY, numbers) for part in (CHOOSING, REPORTING)}
    ids = {part: [token for window in found for token in window.tokens] for part, found in halves.items()}
    assert not set(ids[CHOOSING]) & set(ids[REPORTING])
    assert sorted(ids[CHOOSING] + ids[REPORTING]) == sorted(tokens(texts, "held_out"))
    for name in "ab":
        chooses, reports = (sum(window.domain == name for window in found) for found in halves.values())
        assert 0 <= reports - chooses <= 1 <= chooses
    assert not any(window.undivided for found in halves.values() for window in found)


@pytest.mark.parametrize(("size", "reporting"), [(2 * SHORTEST_WINDOW - 1, 31), (2 * SHORTEST_WINDOW, 16), (41, 21)])
def test_a_single_held_out_window_is_cut_in_two_if_it_is_long_enough(
    tmp_path: Path, size: int, reporting: int
) -> None:
    texts = [replace(counted(tmp_path / "a.txt", [size]), split="held_out")]
    chooses, reports = (windows(texts, part, 64, PLENTY, numbers) for part in (CHOOSING, REPORTING))
    assert len(chooses) == len(reports) == 1
    assert len(reports[0].tokens) == reporting
    divided = size >= 2 * SHORTEST_WINDOW
    assert bool(set(chooses[0].tokens) & set(reports[0].tokens)) is not divided
    assert reports[0].undivided is chooses[0].undivided is not divided


def test_windows_are_runs_within_one_document(tmp_path: Path) -> None:
    text = counted(tmp_path / "a.txt", [47, 20, 16, 39, 33, 15])
    for split in ("calibration", "held_out"):
        for window in windows([text], split, LENGTH, PLENTY, numbers):
            assert SHORTEST_WINDOW <= len(window.tokens) <= LENGTH
            assert list(window.tokens) == list(range(window.tokens[0], window.tokens[-1] + 1))
            assert window.domain == "a"


def test_text_of_one_split_is_used_for_nothing_else(tmp_path: Path) -> None:
    first, second = counted(tmp_path / "a.txt", [100] * 5), counted(tmp_path / "b.txt", [200], start=1000)
    texts = [
        TextFile(first.domain, first.path, "calibration"),
        TextFile(second.domain, second.path, "held_out"),
    ]
    assert tokens(texts, "calibration") == list(range(500))
    assert tokens(texts, "held_out") == list(range(1000, 1200))


def test_domains_take_turns_until_the_tokens_are_used_up(tmp_path: Path) -> None:
    texts = [
        counted(tmp_path / "a.txt", [LENGTH] * 40),
        counted(tmp_path / "b.txt", [LENGTH] * 2, start=5000),
        counted(tmp_path / "c.txt", [LENGTH] * 40, start=9000),
    ]
    chosen = windows(texts, "calibration", LENGTH, 12 * LENGTH, numbers)
    # Two documents are windows of one split; the others fill up what the small domain leaves.
    assert "".join(window.domain for window in chosen) == "abcabcacacac"
    assert sum(len(window.tokens) for window in chosen) == 12 * LENGTH


@pytest.mark.parametrize("most", [20, 55, 100, 399, 400, 401])
def test_tokens_never_exceed_what_was_asked_for(tmp_path: Path, most: int) -> None:
    texts = [counted(tmp_path / "a.txt", [33] * 12), counted(tmp_path / "b.txt", [LENGTH] * 20, start=5000)]
    taken = tokens(texts, "calibration", most)
    assert most - LENGTH < len(taken) <= most


@pytest.mark.parametrize("most", [60, 137, 400, 1000])
def test_windows_of_unequal_length_do_not_exceed_it_either(tmp_path: Path, most: int) -> None:
    short_first = counted(tmp_path / "a.txt", [16] * 30 + [LENGTH] * 30)
    long_first = counted(tmp_path / "b.txt", [LENGTH] * 30 + [16] * 30, start=5000)
    taken = tokens([short_first, long_first], "calibration", most)
    assert most - LENGTH < len(taken) <= most


def test_fewer_tokens_than_a_window_are_a_short_window(tmp_path: Path) -> None:
    text = counted(tmp_path / "a.txt", [LENGTH] * 8)
    assert tokens([text], "calibration", 17) == list(range(17))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 30])
def test_windows_are_spread_over_the_whole_text(tmp_path: Path, count: int) -> None:
    text = counted(tmp_path / "a.txt", [LENGTH] * 40)
    chosen = [window.tokens[0] for window in windows([text], "calibration", LENGTH, count * LENGTH, numbers)]
    assert len(set(chosen)) == count
    steps = [later - earlier for earlier, later in zip(chosen, [*chosen[1:], 40 * LENGTH], strict=True)]
    assert max(steps) <= 40 * LENGTH / count + 3 * LENGTH


def test_shipped_text_gives_every_domain_in_both_splits() -> None:
    texts = shipped_texts()
    assert len(texts) >= 5
    taken = {}
    for split in ("calibration", "held_out"):
        chosen = windows(texts, split, 512, 40_000, as_bytes)
        first = [window.domain for window in chosen[: len(texts)]]
        assert sorted(first) == sorted(text.domain for text in texts)
        per_domain = Counter(window.domain for window in chosen)
        assert max(per_domain.values()) - min(per_domain.values()) <= 2
        taken[split] = {window.tokens for window in chosen if len(window.tokens) == 512}
    assert not taken["calibration"] & taken["held_out"]


def test_texts_are_named_by_file_or_by_hand(tmp_path: Path) -> None:
    path = counted(tmp_path / "my.notes.txt", [50]).path
    assert parse_texts([path]) == [TextFile("my.notes", path)]
    assert parse_texts([f"chat={path}"], "held_out") == [TextFile("chat", path, "held_out")]
    assert TextFile(**parse_texts([path])[0].to_json()) == parse_texts([path])[0]
    assert parse_texts([]) == []


def test_missing_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no text file .*none\.txt"):
        parse_texts([f"chat={tmp_path / 'none.txt'}"])


def test_two_texts_of_one_domain_are_refused(tmp_path: Path) -> None:
    path = counted(tmp_path / "a.txt", [50]).path
    with pytest.raises(UsageError, match="same domain") as raised:
        parse_texts([path, f"a={path}"])
    assert "NAME=FILE" in raised.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe broken", "as UTF-8 text"),
        (b"", "is empty"),
        (b"\n%%%%\n \n%%%%\n", "is empty"),
        (None, "cannot read"),
    ],
    ids=["not UTF-8", "empty", "separators only", "missing"],
)
def test_unreadable_text_is_a_bad_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadFile, match=message):
        read_documents(TextFile("a", str(path)))


@pytest.mark.parametrize(
    ("sizes", "split"),
    [([SHORTEST_WINDOW - 1], "calibration"), ([3 * LENGTH], "held_out"), ([5, 9, 15, 3, 2], "held_out")],
    ids=["shorter than a window", "too short to hold out", "short documents"],
)
def test_text_without_a_window_is_refused(tmp_path: Path, sizes: list[int], split: str) -> None:
    text = counted(tmp_path / "a.txt", sizes)
    with pytest.raises(BadFile, match=f"no {split.replace('_', '-')} windows of {SHORTEST_WINDOW} tokens"):
        windows([text], split, LENGTH, PLENTY, numbers)


def json_lines(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


CHAT = {"messages": [{"role": "user", "content": "1 2 3"}]}


def test_every_line_of_json_lines_is_a_document(tmp_path: Path) -> None:
    numbers_of = [" ".join(map(str, range(start, start + LENGTH))) for start in range(0, 8 * LENGTH, LENGTH)]
    path = json_lines(tmp_path / "a.JSONL", *({"text": text, "id": 7} for text in numbers_of))
    (text,) = parse_texts([str(path)])
    assert text == TextFile("a", str(path), form=JSON_LINES)
    assert tokens([text], "held_out") == [*range(60, 80), *range(140, 160)]
    assert sorted(tokens([text], "held_out") + tokens([text], "calibration")) == list(range(160))


def test_chats_are_no_text_before_a_template_made_them_one(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.ndjson", {"text": "1 2"}, CHAT)
    (text,) = parse_texts([f"talk={path}"], "calibration")
    assert text == TextFile("talk", str(path), "calibration", CHATS)
    with pytest.raises(BadFile, match=r"a\.ndjson, line 2: a chat, which is no text before"):
        read_documents(text)


def test_a_bad_line_is_found_when_the_text_is_named(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", CHAT, {"text": 5})
    with pytest.raises(BadFile, match=r"a\.jsonl, line 2: text is a number, not a text"):
        parse_texts([str(path)])


def test_prepared_documents_keep_their_tokens_and_their_special_ones(tmp_path: Path) -> None:
    documents = [Document("é <|im_end|>\n", special=True), Document("plain"), Document(tokens=tuple(range(LENGTH)))]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(map(prepared_line, documents)))
    assert read_documents(TextFile("a", str(path), form=PREPARED)) == documents
    path.write_bytes(path.read_bytes() + b'{"text": "x", "tokens": ["1"]}\n')
    with pytest.raises(BadFile, match="line 4 is not what edgeprune wrote"):
        read_documents(TextFile("a", str(path), form=PREPARED))


def test_digest_takes_the_template_in_where_there_are_chats(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", CHAT)
    plain, chats = TextFile("a", str(path)), TextFile("a", str(path), form=CHATS)
    lines = TextFile("a", str(path), form=JSON_LINES)
    assert texts_digest([plain], "one") == texts_digest([plain], "other") == texts_digest([plain])
    assert len({texts_digest([text], template) for text in (plain, lines, chats) for template in ("1", "2")}) == 4


def test_digest_tells_contents_domains_and_splits_apart(tmp_path: Path) -> None:
    one, other = counted(tmp_path / "a.txt", [50]), counted(tmp_path / "b.txt", [51])
    variants = [
        [one],
        [other],
        [one, other],
        [other, one],
        [TextFile("named", one.path)],
        [TextFile("a", one.path, "calibration")],
    ]
    assert len({texts_digest(variant) for variant in variants}) == len(variants)
    copy = tmp_path / "elsewhere" / "a.txt"
    copy.parent.mkdir()
    copy.write_bytes(Path(one.path).read_bytes())
    assert texts_digest([TextFile("a", str(copy))]) == texts_digest([one])


def test_a_domain_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "code.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match="a domain without a name"):
        parse_texts([f"={tmp_path / 'code.txt'}"])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(name: str, tmp_path: Path) -> None:
    content = "Some text." if name == "a.txt" else '{"text": "Some text."}'
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert [document.text for document in read_documents(*parse_texts([str(tmp_path / name)]))] == ["Some text."]


def test_documents_that_are_too_short_are_counted(tmp_path: Path) -> None:
    rows = [json.dumps({"text": "a" * length}) for length in (5, 40, 7, 40, 3, 40, 40, 40)]
    (tmp_path / "talk.jsonl").write_text("\n".join(rows), encoding="utf-8")
    left_out: dict[str, LeftOut] = {}
    texts = parse_texts([str(tmp_path / "talk.jsonl")])
    found = windows(texts, "calibration", 512, 10_000, lambda document: [1] * len(document.text), left_out)
    assert len(found) == 3 and left_out == {"talk": LeftOut(documents=3, of=6, tokens=15)}
