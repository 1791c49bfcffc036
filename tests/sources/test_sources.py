"""Packages are checked before they are used, and a source is in the cache whole or not at all."""

import dataclasses
import io
import itertools
import json
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from transformerfam.cli.app import app
from transformerfam.errors import CorruptFileError, MissingPackageError, TransformerFamError
from transformerfam.sources import books, package, questions, short, stories, theorems
from transformerfam.sources.overlap import LENGTH, Shingles
from transformerfam.sources.package import Package, fetch, sha256_of, unpack
from transformerfam.sources.registry import SOURCES
from transformerfam.sources.source import MANIFEST, Source, Written, fetch_source, find_source

FILES = {"notes/a.txt": b"one", "notes/b.txt": b"two", "other.py": b"raise SystemExit"}


def write_wheel(path: Path, files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def tar_of(files: Mapping[str, bytes], mode: Any) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return written.getvalue()


def write_deb(path: Path, files: Mapping[str, bytes]) -> None:
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",  # which is filled up to an even length
        "data.tar.xz": tar_of({f"./{name}": content for name, content in files.items()}, "w:xz"),
    }
    content = b"!<arch>\n"
    for name, member in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(member):<10}`\n"
        content += header.encode() + member + b"\n" * (len(member) % 2)
    path.write_bytes(content)


WRITERS = {
    "notes-1-py3-none-any.whl": write_wheel,
    "notes-1.tar.gz": lambda path, files: path.write_bytes(tar_of(files, "w:gz")),
    "notes_1_all.deb": write_deb,
}


def package_at(path: Path, members: tuple[str, ...] = ("notes/*.txt",)) -> Package:
    return Package(
        manager="apt" if path.suffix == ".deb" else "pip",
        name="notes",
        version="1",
        file=path.name,
        sha256=sha256_of(path),
        num_bytes=path.stat().st_size,
        licence="MIT",
        members=members,
    )


@pytest.fixture
def own(tmp_path: Path) -> Package:
    """Write a package and describe it."""
    path = tmp_path / "notes-1-py3-none-any.whl"
    write_wheel(path, FILES)
    return package_at(path)


def notes(unpacked: Mapping[str, Path]) -> Written:
    folder = unpacked["notes"] / "notes"
    return {"train": [("deep/a.txt", (folder / "a.txt").read_text())], "test": [("b.txt", "zwei")]}


def source_of(own: Package) -> Source:
    return Source(name="notes", about="two notes", packages=(own,), prepare=notes)


@pytest.mark.parametrize("name", WRITERS)
def test_members_alone_are_unpacked(name: str, tmp_path: Path) -> None:
    """Catches a package's code that lands in the cache, and a kind of archive that is misread."""
    path = tmp_path / name
    WRITERS[name](path, FILES)
    unpack(package_at(path), path, tmp_path / "there")
    found = {file.relative_to(tmp_path / "there").as_posix() for file in (tmp_path / "there").rglob("*.*")}
    assert found == {"notes/a.txt", "notes/b.txt"}
    assert (tmp_path / "there" / "notes" / "b.txt").read_bytes() == b"two"


@pytest.mark.parametrize("name", WRITERS)
def test_bad_archive_is_refused(name: str, tmp_path: Path) -> None:
    """Catches a member that is written elsewhere, one that is missing, and a file that is no archive."""
    path, folder = tmp_path / name, tmp_path / "there"
    WRITERS[name](path, {"notes/../../a.txt": b"away", **FILES})
    with pytest.raises(CorruptFileError, match=r"has a member 'notes/../../a.txt', which leads out of its folder"):
        unpack(package_at(path, ("*.txt",)), path, folder)
    assert not (tmp_path / "a.txt").exists()
    with pytest.raises(CorruptFileError, match=r"has no more/\*"):
        unpack(package_at(path, ("notes/b.txt", "more/*")), path, folder)
    path.write_bytes(b"!<arch>\n but nothing like one")
    with pytest.raises(CorruptFileError, match=f"{name} is no .* archive"):
        unpack(package_at(path), path, folder)


def test_source_is_fetched_once_and_checked(own: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second download, files that are not listed, and damage that goes unseen."""
    given, cache, source = {"notes": tmp_path / own.file}, tmp_path / "cache", source_of(own)
    with pytest.raises(TransformerFamError, match="notes is not in .*cache; run fam data fetch notes"):
        find_source(source, cache)
    steps: list[str] = []
    prepared = fetch_source(source, cache, given, steps.append)
    assert steps == ["notes 1 (0.0 MB, MIT)", "writing notes"]
    assert [path.read_text() for split in ("train", "test") for path in prepared.paths(split)] == ["one", "zwei"]
    (tmp_path / own.file).unlink()
    monkeypatch.setattr(package, "_download", lambda *arguments: pytest.fail("it is there already"))
    assert fetch_source(source, cache) == prepared
    (prepared.folder / "test" / "b.txt").write_text("drei")
    find_source(source, cache)
    with pytest.raises(CorruptFileError, match=r"b.txt has sha256 .*, required is"):
        find_source(source, cache, check=True)
    (prepared.folder / "test" / "b.txt").unlink()
    with pytest.raises(CorruptFileError, match=r"b.txt is missing or not of 4 bytes; remove .*notes and run fam data"):
        find_source(source, cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "is of 'notes' in format 2, required is 'notes' in format 1"),
        ({"source": "books"}, "is of 'books' in format 1, required is 'notes'"),
        ({"files": {"train/../../a": {"sha256": "", "num_bytes": 1}}}, "another form"),
        ({"files": ["a"]}, "another form"),
    ],
)
def test_folder_of_another_form_is_refused(own: Package, tmp_path: Path, changes: Any, message: str) -> None:
    """Catches a cache of another version, or of somebody else, that is read as ours."""
    cache, source = tmp_path / "cache", source_of(own)
    path = fetch_source(source, cache, {"notes": tmp_path / own.file}).folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CorruptFileError, match=message):
        fetch_source(source, cache)
    path.unlink()
    with pytest.raises(TransformerFamError, match=r"is no fetched source, it has no source.json; remove"):
        fetch_source(source, cache)


def test_changed_package_is_refused_with_both_checksums(own: Package, tmp_path: Path) -> None:
    """Catches a package that somebody changed, whose code or text would be taken for the one that was read."""
    other = dataclasses.replace(own, sha256="0" * 64)
    with pytest.raises(CorruptFileError, match=f"has sha256 {own.sha256}, required is {other.sha256}"):
        fetch(other, tmp_path / "packages", tmp_path / own.file)
    assert not (tmp_path / "packages" / own.file).exists()


@pytest.mark.parametrize("manager", ["pip", "apt"])
def test_package_that_cannot_be_downloaded_names_its_file(
    own: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manager: Any
) -> None:
    """Catches a traceback where there is no apt-get or no network, and a person who is left without a way."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    wanted = dataclasses.replace(own, manager=manager, name="no-such-notes")
    with pytest.raises(
        MissingPackageError, match=rf"download {own.file} \(sha256 {own.sha256}\) elsewhere and give it"
    ):
        fetch(wanted, tmp_path / "packages")
    assert not [path for path in (tmp_path / "packages").iterdir() if path.name == own.file]


def test_client_is_given_places_that_hold_in_its_own_folder(
    own: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a folder by a relative path, which the client would look for below itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "links").mkdir()
    wheel = tmp_path / "links" / own.file
    named = {"notes-1.dist-info/METADATA": b"Metadata-Version: 2.1\nName: notes\nVersion: 1\n"}
    kind = b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    write_wheel(wheel, FILES | named | {"notes-1.dist-info/WHEEL": kind, "notes-1.dist-info/RECORD": b""})
    own = package_at(wheel)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "data" / "packages" / ".notes-killed").mkdir(parents=True)
    prepared = fetch_source(source_of(own), Path("data"))
    assert len(prepared.files) == 2
    assert [path.name for path in (tmp_path / "data" / "packages").iterdir()] == [own.file]
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(TransformerFamError, match="cannot read '.*fifo': it is a named pipe"):
        sha256_of(tmp_path / "fifo")


def test_fetch_that_ends_early_leaves_nothing_half_written(own: Package, tmp_path: Path) -> None:
    """Catches a full disk, or a kill, after which half a source is taken for the whole."""
    cache, given = tmp_path / "cache", {"notes": tmp_path / own.file}

    def full(unpacked: Mapping[str, Path]) -> Written:
        raise OSError(28, "No space left on device")

    with pytest.raises(TransformerFamError, match="could not write notes below .*: No space left on device; make room"):
        fetch_source(dataclasses.replace(source_of(own), prepare=full), cache, given)
    assert {path.name for path in cache.iterdir()} <= {"packages", ".notes.lock"}
    (cache / ".notes-killed").mkdir()
    (tmp_path / own.file).unlink()
    assert len(fetch_source(source_of(own), cache).files) == 2
    assert not (cache / ".notes-killed").exists()


def test_novel_is_cleaned() -> None:
    """Catches remarks of an edition that would be learned as the author's."""
    remark = ["[At this point in the first", "edition.]"]
    lines = ["A Novel", "(1811)", "", "CHAPTER 1", "", "It began.", "", "", "", "", *remark]
    text = books.clean_novel([*lines, "", "It went on. ", "", "THE END", "", "A NOTE ON THE TEXT", "Signed"], "A Novel")
    assert text == "A NOVEL\n\nby Jane Austen\n\n\nCHAPTER 1\n\nIt began.\n\n\nIt went on.\n"


def test_play_and_bible_are_plain_text() -> None:
    """Catches marks of Markdown in what a model learns."""
    play = "# Macbeth\n\n_Enter three\nWitches_\n\n**First Witch**  \nWhen shall we  \nmeet_ing_up *again*  \n"
    assert (
        books.clean_play(play) == "Macbeth\n\nEnter three\nWitches\n\nFirst Witch\nWhen shall we\nmeet_ing_up again\n"
    )
    verses = [("Ruth", 1, "Now."), ("Ruth", 1, "And."), ("Ruth", 2, "Then.")]
    lines = "\n".join(json.dumps({"book": b, "chapter": c, "text": t}) for b, c, t in verses)
    assert books.bible(lines) == "Ruth 1\n\nNow.\nAnd.\n\nRuth 2\n\nThen.\n"


def test_no_theorem_is_in_both_splits(tmp_path: Path) -> None:
    """Catches a copy of a held-out file under another name in the training texts."""
    root = tmp_path / "usr/share/hol-light"
    (root / "Library").mkdir(parents=True)
    words = [f"word{idx}" for idx in range(6000)]
    for idx in range(40):
        text = " ".join(words[(idx * 131 + 7 * step) % 6000] for step in range(800))
        (root / "Library" / f"file{idx}.ml").write_text(text)
    (root / "short.ml").write_text("let x = 1;;")
    first = theorems.prepare({"hol-light": tmp_path})
    held_out, text = next(iter(first["test"]))
    (root / "copy_of_it.ml").write_text(f"(* a copy *) {text}")
    (root / "big_database.ml").write_text(text)
    written = {split: dict(files) for split, files in theorems.prepare({"hol-light": tmp_path}).items()}
    assert held_out in written["test"]
    assert not {"copy_of_it.ml.txt", "short.ml.txt", "big_database.ml.txt"} & {*written["train"], *written["test"]}
    assert not written["train"].keys() & written["test"].keys()
    trained = Shingles(written["train"].values())
    assert all(trained.share_of(text) <= theorems.MOST_SHARED for text in written["test"].values())


def test_questions_keep_their_articles_in_one_split() -> None:
    """Catches a passage that is trained on and asked about, and answers that are lost."""
    paragraph = {
        "context": " In 1066. ",
        "qas": [
            {"id": "a", "question": "When? ", "answers": [{"text": "1066"}, {"text": "1066"}, {"text": "in 1066"}]},
            {"id": "b", "question": "Why?", "answers": [], "is_impossible": True},
        ],
    }
    found = list(questions.squad({"data": [{"title": "Normans", "paragraphs": [paragraph]}]}))
    assert [item["answers"] for item in found] == [["1066", "in 1066"], []]
    assert [item["group"] for item in found] == ["squad", "squad, unanswerable"]
    assert found[0]["passages"] == [{"title": "Normans 0", "text": "In 1066."}]
    titles = [f"title {idx}" for idx in range(40)]
    context = [[title, [f"{title} is.", " It was."]] for title in titles]
    pairs = [
        {
            "_id": f"{one}-{two}",
            "question": "Which?",
            "answer": "yes",
            "supporting_facts": [[one, 0], [two, 1], [one, 1]],
            "context": context,
        }
        for one, two in itertools.pairwise(titles)
    ]
    items = list(questions.hotpotqa(pairs))
    assert items[0]["passages"][1] == {"title": "title 1", "text": "title 1 is. It was."}
    splits = [list(questions._of_split(items, is_test)) for is_test in (False, True)]
    used = [{passage["title"] for item in split for passage in item["passages"]} for split in splits]
    assert all(used)
    assert not used[0] & used[1]


def test_choices_and_short_tasks_name_the_right_answer() -> None:
    """Catches an answer that is off by one, and the head of a table that is asked as a question."""
    row = {"question": "q", "answer_a": "w", "answer_b": "x", "answer_c": "y", "answer_d": "z", "topic": "law"}
    head = dict(zip(row, row, strict=True)) | {"correct_answer": "answer"}
    twice = row | {"answer_b": "w", "correct_answer": "C"}
    (item,) = short.mmlu([row | {"correct_answer": "C"}, head, twice])
    cases = [{"id": f"t{idx}", "question": "q", "choices": list("abcd"), "expected_index": 0} for idx in range(20)]
    asked = list(short.truthfulqa(cases))
    assert {item["answers"][0] for item in asked} == {"a"}
    assert len({item["choices"].index("a") for item in asked}) > 2
    assert (item["choices"], item["answers"], item["group"]) == (["w", "x", "y", "z"], ["y"], "mmlu, law")
    (ending,) = short.hellaswag([{"id": "h", "ctx": "He", "endings": ["a", "b"], "expected_index": 1}])
    assert ending["answers"] == ["b"]
    mystery = {"input": " A theft. ", "target_scores": {"Ann": 0, "Bob": 1}}
    (story,) = stories.choices([mystery])
    assert (story["text"], story["choices"], story["answers"]) == ("A theft.", ["Ann", "Bob"], ["Bob"])
    with pytest.raises(CorruptFileError, match="minute mystery 0 has 0 right answers"):
        list(stories.choices([{"input": "A theft.", "target_scores": {"Ann": 0}}]))
    summaries = [{"input": "Long.", "target": "Short."}, {"input": "Long.", "target": ["a", "b"]}]
    assert [item["answers"] for item in stories.summaries(summaries, "xsum")] == [["Short."], ["a", "b"]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "C", "d,"]), max_size=40).map(" ".join), min_size=2, max_size=4))
def test_shared_runs_of_words_are_counted(texts: list[str]) -> None:
    """Catches runs that are missed, or found where there are none."""
    test, *train = texts

    def runs(text: str) -> list[tuple[str, ...]]:
        words = text.replace(",", "").lower().split()
        return [tuple(words[idx : idx + LENGTH]) for idx in range(len(words) - LENGTH + 1)]

    trained = {run for text in train for run in runs(text)}
    found, own = Shingles(train), runs(test)
    assert len(found) == len(trained)
    assert found.share_of(test) == pytest.approx(sum(run in trained for run in own) / max(1, len(own)))


def test_command_fetches_lists_and_checks(own: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command that shows something else than it did."""
    monkeypatch.setitem(SOURCES, "notes", source_of(own))
    monkeypatch.setenv("TRANSFORMERFAM_DATA", str(tmp_path / "cache"))
    runner = CliRunner()

    def done(*arguments: str, code: int = 0) -> str:
        result = runner.invoke(app, ["data", *arguments])
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    assert "notes (not fetched): two notes notes 1 by pip, 0.0 MB, MIT" in done("list")
    assert "there is no source 'note'; did you mean notes?" in done("fetch", "note", code=2)
    (tmp_path / "other.whl").write_bytes(b"other")
    assert f"required is one of {own.sha256} ({own.file})" in done(
        "fetch", "notes", "--from", str(tmp_path / "other.whl"), code=2
    )
    assert "notes: 1 in train, 1 in test" in done("fetch", "notes", "--from", str(tmp_path / own.file))
    assert "notes (fetched)" in done("list")
    assert "notes/test/b.txt │ 1 │ 0.00%" in done("check", "notes")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["books", "theorems", "questions", "short", "ruler"])
def test_real_packages_are_fetched(name: str, tmp_path: Path) -> None:
    """Catches a package that has changed or gone, and test texts that are in training texts; it needs the network."""
    prepared = fetch_source(SOURCES[name], tmp_path)
    train, test = ([path.read_text() for path in prepared.paths(split)] for split in ("train", "test"))
    assert test
    trained = Shingles(train)
    for text in test if name in ("books", "theorems") else []:
        assert trained.share_of(text) <= theorems.MOST_SHARED
