"""Readers of published benchmarks on small files in each format, what they refuse, and the command that writes a suite."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cobra_edge.errors import InputError
from cobra_edge.suite.benchmarks import READERS, Sources
from cobra_edge.suite.convert import command
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import flaw_of, read_suite
from cobra_edge.suite.scoring import METRICS
from cobra_edge.terminal.output import run_command

SHORT = "\nAnswer the question using a single word or phrase."
ANSWERS = ["red", "pink", "red", "pink", "dark red", "red", "pink", "", "rose", "rosé"]

POPE = [
    {"question_id": 1, "image": "COCO_val2014_000000000007.jpg", "text": "Is there a cup in the image?", "label": "yes"},
    {"question_id": 2, "image": "COCO_val2014_000000000007.jpg", "text": "Is there a dog in the image?", "label": "no"},
]
VSR = [
    {"image": "000000000001.jpg", "caption": "The cat is on the mat.", "label": 1, "relation": "on"},
    {"image": "000000000002.jpg", "caption": "The dog is under the car.", "label": 0, "relation": "under"},
]
VQA = {
    "info": {},
    "data_subtype": "val2014",
    "questions": [{"image_id": 7, "question": "What color is the cup?", "question_id": 7000}],
}
VQA_ANSWERS = {
    "annotations": [
        {
            "question_id": 7000,
            "image_id": 7,
            "answer_type": "other",
            "multiple_choice_answer": "pink",
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(ANSWERS)],
        },
        {"question_id": 9000, "image_id": 9, "answer_type": "yes/no", "answers": []},
    ]
}
GQA = {
    "201": {"question": "Is it hot?", "answer": "no", "imageId": "n1", "types": {"structural": "verify"}, "isBalanced": True},
    "202": {"question": "What is red?", "answer": "cup", "imageId": "n1", "types": {"structural": "query"}, "isBalanced": True},
    "203": {"question": "Who?", "answer": "man", "imageId": "n2", "types": {"structural": "query"}, "isBalanced": False},
}
VIZWIZ = [
    {
        "image": f"VizWiz_val_{number:08d}.jpg",
        "question": "What is this?",
        "answers": [{"answer": a, "answer_confidence": "yes"} for a in answers],
        "answer_type": "other",
        "answerable": answerable,
    }
    for number, answers, answerable in ((0, ANSWERS, 1), (1, ["unanswerable"] * 10, 0))
]
TEXT_VQA = {"data": [{"question_id": 3, "image_id": "0a", "question": "what is the brand?", "answers": ANSWERS}]}
OCR = {
    "data": [
        {"image_id": "0a", "ocr_tokens": ["ZEBRA", "apple", "ZEBRA", "10"], "ocr_info": []},
        {"image_id": "0b", "ocr_tokens": []},
    ]
}
REFCOCO = {
    "images": [
        {"id": 5, "file_name": "a.jpg", "width": 200, "height": 100, "caption": "the left cup", "dataset_name": "refcoco+"},
        {"id": 6, "file_name": "a.jpg", "width": 200, "height": 100, "caption": "all of it", "dataset_name": "refcoco+"},
    ],
    "annotations": [
        {"id": 1, "image_id": 6, "bbox": [0, 0, 200.01, 100.01], "category_id": 1},
        {"id": 2, "image_id": 5, "bbox": [20.0, 10.0, 47.5, 33.25], "category_id": 1},
    ],
}
QUESTIONS: dict[str, Any] = {
    "pope": POPE,
    "vsr": VSR,
    "vqa-v2": VQA,
    "gqa": GQA,
    "vizwiz": VIZWIZ,
    "textvqa": TEXT_VQA,
    "refcoco": REFCOCO,
}


def written(file: Path, content: Any) -> Path:
    jsonl = file.suffix == ".jsonl"
    file.write_text("\n".join(json.dumps(record) for record in content) + "\n\n" if jsonl else json.dumps(content))
    return file


def sources(directory: Path, benchmark: str, content: Any = None, annotations: Any = None, ocr: Any = None) -> Sources:
    ending = ".jsonl" if benchmark in ("pope", "vsr") else ".json"
    questions = written(directory / f"coco_pope_random{ending}", QUESTIONS[benchmark] if content is None else content)
    if benchmark == "vqa-v2" and annotations is None:
        annotations = VQA_ANSWERS
    return Sources(
        questions,
        None if annotations is None else written(directory / "annotations.json", annotations),
        None if ocr is None else written(directory / "ocr.json", ocr),
    )


def lines_of(directory: Path, benchmark: str, *contents: Any) -> list[Line]:
    return list(READERS[benchmark].read(sources(directory, benchmark, *contents)))


def test_every_reader_has_a_file_here_and_yields_what_its_metric_takes(tmp_path):
    assert list(READERS) == list(QUESTIONS)
    for name, reader in READERS.items():
        lines = lines_of(tmp_path, name)
        assert lines and name == reader.name and not any(flaw_of(line) for line in lines)
        assert len({line.id for line in lines}) == len(lines)


def test_pope(tmp_path):
    image = "COCO_val2014_000000000007.jpg"
    assert lines_of(tmp_path, "pope") == [
        Line("Is there a cup in the image?" + SHORT, "yes", "pope-random", image, (), "yes-no", "1"),
        Line("Is there a dog in the image?" + SHORT, "no", "pope-random", image, (), "yes-no", "2"),
    ]
    (line, _) = READERS["pope"].read(Sources(written(tmp_path / "mine.jsonl", POPE)))
    assert line.task == "pope"


def test_vsr(tmp_path):
    true, false = lines_of(tmp_path, "vsr")
    prompt = 'Based on the image, is this statement "True" or "False"? The cat is on the mat.\n'
    prompt += 'Respond with "True" or "False" directly.'
    assert true == Line(prompt, "True", "vsr", "000000000001.jpg", (), "vsr", "1")
    assert (false.answer, false.image, false.id) == ("False", "000000000002.jpg", "2")


def test_vqa(tmp_path):
    (line,) = lines_of(tmp_path, "vqa-v2")
    image = "COCO_val2014_000000000007.jpg"
    prompt = "What color is the cup?" + SHORT
    assert line == Line(prompt, "red", "vqa-v2-other", image, tuple(ANSWERS), "vqa", "7000")  # red and pink tie: the first
    assert METRICS["vqa"].score("pink", line) == pytest.approx(0.7 * 1 + 0.3 * 2 / 3)


def test_kinds_of_answers_are_tasks(tmp_path):
    annotations = copy.deepcopy(VQA_ANSWERS)
    annotations["annotations"][0]["answer_type"] = "yes/no"
    (line,) = lines_of(tmp_path, "vqa-v2", None, annotations)
    assert line.task == "vqa-v2-yes-no"


def test_gqa_takes_balanced_questions(tmp_path):
    assert lines_of(tmp_path, "gqa") == [
        Line("Is it hot?" + SHORT, "no", "gqa-binary", "n1.jpg", (), "gqa", "201"),
        Line("What is red?" + SHORT, "cup", "gqa-open", "n1.jpg", (), "gqa", "202"),
    ]


def test_vizwiz(tmp_path):
    line, unanswerable = lines_of(tmp_path, "vizwiz")
    prompt = "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
    image = "VizWiz_val_00000000.jpg"
    assert line == Line(prompt, "red", "vizwiz-answerable", image, tuple(ANSWERS), "vizwiz", image)
    assert (unanswerable.answer, unanswerable.task) == ("unanswerable", "vizwiz-unanswerable")


def test_textvqa_without_and_with_words(tmp_path):
    (line,) = lines_of(tmp_path, "textvqa")
    assert line == Line("What is the brand?" + SHORT, "red", "textvqa", "0a.jpg", tuple(ANSWERS), "textvqa", "3")
    (line,) = lines_of(tmp_path, "textvqa", None, None, OCR)
    assert line.prompt == "What is the brand?\nReference OCR token: ZEBRA, apple, ZEBRA, 10" + SHORT  # as in the file
    assert line.task == "textvqa-ocr"


def test_an_image_in_which_no_words_were_found(tmp_path):
    content = {"data": [TEXT_VQA["data"][0] | {"image_id": "0b"}]}
    (line,) = lines_of(tmp_path, "textvqa", content, None, OCR)
    assert line.prompt == "What is the brand?\nReference OCR token: " + SHORT


def test_refcoco(tmp_path):
    cup, everything = lines_of(tmp_path, "refcoco")
    prompt = 'Please provide the bounding box coordinate of the region this sentence describes: "the left cup"'
    assert cup == Line(prompt, "[0.1, 0.1, 0.34, 0.43]", "refcoco+", "a.jpg", ("[0.1, 0.1, 0.3375, 0.4325]",), "box-iou", "5")
    assert everything.answers == ("[0.0, 0.0, 1.0, 1.0]",)
    assert METRICS["box-iou"].score(cup.answer, cup) == 1 and METRICS["box-iou"].score("[0.5, 0.5, 1, 1]", cup) == 0


def changed(content: Any, change: Callable[[Any], object]) -> Any:
    content = copy.deepcopy(content)
    change(content)
    return content


@pytest.mark.parametrize(
    ("benchmark", "change", "says"),
    [
        ("pope", lambda c: c[1].pop("label"), "line 2: does not match the schema.*`label`"),
        ("pope", lambda c: c[1].update(label="maybe"), "line 2: does not match the schema.*maybe"),
        ("pope", lambda c: c[1].update(text=" "), r"line 2: .*\$.text"),
        ("pope", lambda c: c[1].update(question_id=1), "question_id 1 is repeated"),
        ("pope", lambda c: c[1].update(image="../secret.jpg"), r"line 2: .*\$.image"),
        ("pope", lambda c: c.append([]), "line 3: does not match the schema"),
        ("vsr", lambda c: c[0].update(label=2), "line 1: does not match the schema"),
        ("vsr", lambda c: c[0].update(caption=None), "line 1: does not match the schema.*caption"),
        ("vqa-v2", lambda c: c["questions"][0].pop("image_id"), "does not match the schema.*`image_id`"),
        ("vqa-v2", lambda c: c["questions"][0].update(image_id=-1), r"\$.questions\[0\].image_id"),
        ("vqa-v2", lambda c: c.update(data_subtype="../val"), r"\$.data_subtype"),
        ("vqa-v2", lambda c: c["questions"].append(c["questions"][0]), "question_id 7000 is repeated"),
        ("vqa-v2", lambda c: c["questions"][0].update(question_id=1), "annotations.json: no annotation for question 1 of"),
        ("vqa-v2", lambda c: c["questions"][0].update(image_id=8), "question 7000 is for image 7, the question for 8"),
        ("gqa", lambda c: c["202"].pop("answer"), r"coco_pope_random.json, '202': .*does not match the schema.*`answer`"),
        ("gqa", lambda c: c["202"].update(imageId="a/b"), r"coco_pope_random.json, '202': .*\$.imageId"),
        ("vizwiz", lambda c: c[1].update(answers=[{"answer": ""}]), "record VizWiz_val_00000001.jpg has no answer"),
        ("vizwiz", lambda c: c[1].update(image=c[0]["image"]), "image VizWiz_val_00000000.jpg is repeated"),
        ("vizwiz", lambda c: c[1].update(answerable=True), r"\$\[1\].answerable"),
        ("textvqa", lambda c: c["data"].append(c["data"][0]), "question_id 3 is repeated"),
        ("textvqa", lambda c: c["data"][0].update(answers="red"), "does not match the schema.*answers"),
        ("refcoco", lambda c: c["images"][1].update(id=5), "images id 5 is repeated"),
        ("refcoco", lambda c: c["annotations"][1].update(image_id=6), "annotation of image_id 6 is repeated"),
        ("refcoco", lambda c: c["annotations"].pop(), "no annotation for image 5"),
        ("refcoco", lambda c: c["annotations"][1]["bbox"].pop(), r"`array` of length 4 - at `\$.annotations\[1\].bbox`"),
        ("refcoco", lambda c: c["images"][0].update(width=0), r"\$.images\[0\].width"),
        ("refcoco", lambda c: c["annotations"][1].update(bbox=[180, 0, 20.1, 9]), "box .* of image 5 has no area in"),
        ("refcoco", lambda c: c["annotations"][1].update(bbox=[-1, 0, 20, 9]), "box .* of image 5 has no area in"),
        ("refcoco", lambda c: c["annotations"][1].update(bbox=[1, 1, 0, 9]), "box .* of image 5 has no area in"),
        ("refcoco", lambda c: c["annotations"][1].update(bbox=[1, 1, 9, 100]), "box .* of image 5 has no area in"),
    ],
)
def test_a_record_that_is_not_as_it_should_be(tmp_path, benchmark, change, says):
    with pytest.raises(InputError, match=says) as raised:
        lines_of(tmp_path, benchmark, changed(QUESTIONS[benchmark], change))
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["annotations"].append(c["annotations"][0]), "annotations.json: question_id 7000 is repeated"),
        (lambda c: c["annotations"][0].update(answers=[]), "annotations.json: record 7000 has no answer"),
        (lambda c: c["annotations"][0].update(answer_type="any"), r"annotations.json: .*\$.annotations\[0\].answer_type"),
    ],
)
def test_annotations_that_are_not_as_they_should_be(tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        lines_of(tmp_path, "vqa-v2", None, changed(VQA_ANSWERS, change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["data"].pop(0), "ocr.json: no words of image 0a, which question 3 is about"),
        (lambda c: c["data"][1].update(image_id="0a"), "ocr.json: image_id 0a is repeated"),
        (lambda c: c["data"][0].update(ocr_tokens="ZEBRA"), r"ocr.json: .*\$.data\[0\].ocr_tokens"),
    ],
)
def test_words_that_are_not_as_they_should_be(tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        lines_of(tmp_path, "textvqa", None, None, changed(OCR, change))


def test_a_question_that_comes_twice_under_one_key(tmp_path):
    file = tmp_path / "questions.json"
    one = json.dumps(GQA["201"])
    file.write_text(f'{{"201": {one}, "201": {one}}}')
    with pytest.raises(InputError, match="questions.json: key '201' is repeated"):
        list(READERS["gqa"].read(Sources(file)))


@pytest.mark.parametrize("benchmark", list(QUESTIONS))
@pytest.mark.parametrize("content", [b"not json", b"\xff\xfe", b'{"a": ' + b"[" * 100_000, b"3", None])
def test_a_file_that_is_something_else(tmp_path, benchmark, content):
    whole = sources(tmp_path, benchmark)
    if content is None:
        whole.questions.unlink()
    else:
        whole.questions.write_bytes(content)
    with pytest.raises(InputError, match="coco_pope_random"):
        list(READERS[benchmark].read(whole))


@pytest.mark.parametrize("name", ["refs(unc).p", "refs.PKL", "refs.pickle"])
def test_a_pickle_is_never_read(tmp_path, name):
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(ran),)

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match=r"is a pickle, .*finetune_refcoco_val\.json of mdetr_annotations\.tar\.gz"):
        list(READERS["refcoco"].read(Sources(tmp_path / name)))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("benchmark", "annotations", "ocr", "says"),
    [
        ("vqa-v2", False, False, "vqa-v2 has its answers in a separate file; give --annotations"),
        ("pope", True, False, "pope has its answers in the same file as the questions; omit --annotations"),
        ("gqa", False, True, "gqa has no OCR words in its prompts; omit --ocr"),
    ],
)
def test_files_that_a_reader_lacks_or_does_not_take(tmp_path, benchmark, annotations, ocr, says):
    whole = sources(tmp_path, benchmark)
    given = Sources(whole.questions, whole.questions if annotations else None, whole.questions if ocr else None)
    with pytest.raises(InputError, match=says):
        list(READERS[benchmark].read(given))


class Place:
    """A directory with a benchmark's file, its images and a way to run the command there."""

    def __init__(self, directory: Path, benchmark: str) -> None:
        self.benchmark, self.out, self.images = benchmark, directory / "suites" / "suite.jsonl", directory / "images"
        self.sources = sources(directory, benchmark)
        self.images.mkdir()
        for line in READERS[benchmark].read(self.sources):
            (self.images / str(line.image)).write_bytes(b"an image")

    def convert(self, *more: str) -> int:
        options = {"questions": self.sources.questions, "images": self.images, "out": self.out}
        if self.sources.annotations is not None:
            options["annotations"] = self.sources.annotations
        return run_command(command, [self.benchmark, *(f"--{name}={value}" for name, value in options.items()), *more])


@pytest.mark.parametrize("benchmark", list(QUESTIONS))
def test_a_suite_is_written_and_read(tmp_path, capsys, benchmark):
    place = Place(tmp_path, benchmark)
    lines = list(READERS[benchmark].read(place.sources))
    assert place.convert("--json") == 0
    shown = json.loads(capsys.readouterr().out)
    tasks = [line.task for line in lines]
    assert shown == {
        "suite": str(place.out),
        "lines": len(lines),
        "tasks": {task: tasks.count(task) for task in tasks},
        "images": len({line.image for line in lines}),
        "skipped": 0,
    }
    found = read_suite(place.out)
    assert [line.image for line in found] == [f"../images/{line.image}" for line in lines]
    assert [(line.prompt, line.answers, line.id) for line in found] == [(line.prompt, line.answers, line.id) for line in lines]


def test_paths_hold_through_linked_directories(tmp_path, monkeypatch):
    place = Place(tmp_path, "pope")
    deep = tmp_path / "one" / "two" / "three"
    deep.mkdir(parents=True)
    (tmp_path / "suites").symlink_to(deep)
    monkeypatch.chdir(tmp_path)
    place.images, place.out = Path("images"), Path("suites/suite.jsonl")
    assert place.convert() == 0
    assert [line.image for line in read_suite(place.out)] == [f"../../../images/{POPE[0]['image']}"] * 2


def test_a_table_for_people(tmp_path, capsys):
    assert Place(tmp_path, "pope").convert() == 0
    shown = capsys.readouterr().out
    assert "pope-random" in shown and "2 lines, 1 images, 0 skipped" in shown


def test_missing_images_are_counted(tmp_path, capsys):
    place = Place(tmp_path, "vsr")
    (place.images / "000000000002.jpg").unlink()
    assert place.convert() == 2
    assert "1 of 2 images do not exist, such as 000000000002.jpg" in " ".join(capsys.readouterr().err.split())
    assert not place.out.exists()
    assert place.convert("--skip-bad", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["lines"], shown["skipped"]) == (1, 1) and [line.id for line in read_suite(place.out)] == ["1"]


def test_records_that_cannot_be_scored_are_named_or_skipped(tmp_path, capsys):
    place = Place(tmp_path, "vizwiz")
    written(place.sources.questions, changed(VIZWIZ, lambda c: c[0].update(answers=[{"answer": "cup"}])))
    assert place.convert() == 2
    assert "record VizWiz_val_00000000.jpg: 1 answers; metric vizwiz takes 4 or more" in capsys.readouterr().err
    assert place.convert("--skip-bad", "--json") == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 1


def test_nothing_left_is_no_suite(tmp_path, capsys):
    place = Place(tmp_path, "pope")
    (place.images / str(POPE[0]["image"])).unlink()
    assert place.convert("--skip-bad") == 2
    assert "none of 2 records is left" in capsys.readouterr().err and not place.out.exists()


def test_a_suite_is_replaced_only_where_asked(tmp_path, capsys):
    place = Place(tmp_path, "pope")
    assert place.convert() == 0 and place.convert() == 2
    assert "give --force" in capsys.readouterr().err
    assert place.convert("--force") == 0


def test_what_the_command_refuses_before_it_reads(tmp_path, capsys):
    place = Place(tmp_path, "pope")
    place.images = tmp_path / "nowhere"
    assert place.convert() == 2
    assert "is not a directory" in capsys.readouterr().err
    assert run_command(command, ["popes", "--questions=a", "--images=b", "--out=c"]) == 2
    assert "'pope'" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    assert run_command(command, ["--help"]) == 0
    assert "cobra-edge regress convert pope --questions" in capsys.readouterr().out


def test_the_page_about_suites_knows_every_field_metric_and_benchmark():
    page = (Path(__file__).parents[2] / "docs" / "suites.md").read_text()
    names = [*Line.__struct_fields__, *METRICS, *READERS]
    assert [name for name in names if f"| `{name}` |" not in page] == []
    (example,) = (line for line in page.splitlines() if line.startswith("{"))
    assert flaw_of(msgspec.json.decode(example, type=Line)) is None
    assert [name for name in READERS if f"regress convert {name} " not in page] == []
