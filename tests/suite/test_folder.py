"""Calibration lines from a folder of images, their division, and what is refused."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from cobra_edge.errors import InputError
from cobra_edge.suite import folder as folder_module
from cobra_edge.suite.calibration_lines import read_calibration
from cobra_edge.suite.folder import ADVISABLE_IMAGES, read_folder, read_prompts
from cobra_edge.suite.line import Line
from cobra_edge.suite.line_set import LineSet
from cobra_edge.suite.reader import CALIBRATION, read_suite

IMAGES = sorted((CALIBRATION.parent / "calibration").glob("*.png"))


@pytest.fixture
def images(tmp_path):
    """Return a folder that images can be copied into by number, under any name."""

    class Images:
        path = tmp_path / "photos"

        def add(self, *names, image=0):
            for i, name in enumerate(names):
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(IMAGES[image + i], self.path / name)
            return self.path

    Images.path.mkdir()
    return Images()


def test_shipped_prompts_are_many_and_different():
    prompts = [prompt for of_kind in read_prompts().values() for prompt in of_kind]
    assert len(prompts) >= 250 and len(set(prompts)) == len(prompts)
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)


def test_each_image_gets_prompts_of_different_kinds(images):
    found = read_folder(images.add(*(f"{i}.png" for i in range(20))))
    per_image = Counter(line.image for line in found.lines)
    assert per_image.pop(None) == 3 and set(per_image.values()) == {4} and len(per_image) == 20
    asked = {image: [line for line in found.lines if line.image == image] for image in per_image}
    assert all(len({line.task for line in lines}) == 4 for lines in asked.values())
    assert len({tuple(line.prompt for line in lines) for lines in asked.values()}) == 20
    kinds = Counter(line.task for line in found.lines if line.image)
    assert set(kinds) == set(read_prompts()) - {"text"} and max(kinds.values()) - min(kinds.values()) <= 1
    assert read_folder(images.path).lines == found.lines


def test_subfolders_are_searched_and_hidden_files_are_not(images):
    images.add("b.png", "a/deep/c.PNG", ".trash/d.png", ".e.png", "notes.txt")
    assert [p.relative_to(images.path).as_posix() for p in read_folder(images.path).images()] == ["a/deep/c.PNG", "b.png"]


def test_links_out_of_the_folder_are_not_followed(images, tmp_path):
    images.add("a.png", "b.png")
    os.symlink(IMAGES[5], images.path / "outside.png")
    os.symlink(IMAGES[5].parent, images.path / "elsewhere")
    os.symlink("a.png", images.path / "inside.png")
    assert [p.name for p in read_folder(images.path).images()] == ["a.png", "b.png", "inside.png"]
    (tmp_path / "links").mkdir()
    os.symlink(IMAGES[5], tmp_path / "links" / "a.png")
    with pytest.raises(InputError, match=r"links: no images \(1 links lead out of it and are not followed; copy the images\)"):
        read_folder(tmp_path / "links")


def test_a_folder_without_images_is_refused(images):
    images.add("notes.txt")
    with pytest.raises(InputError, match=r"photos: no images; expected a folder with files such as \.jpg"):
        read_calibration(images.path)


def test_unreadable_images_are_named_and_counted(images, capfd):
    images.add(*(f"{i}.png" for i in range(3)))
    for i in range(7):
        (images.path / f"bad{i}.jpg").write_bytes(b"no image")
    (images.path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(
        InputError, match=r"8 of 11 images cannot be read: bad0\.jpg: .*bad4\.jpg: .*; …; remove them, or give --"
    ):
        read_calibration(images.path)
    assert len(read_calibration(images.path, skip_bad=True).images()) == 3
    assert "8 of 11 images cannot be read" in capfd.readouterr().err


def test_a_folder_of_nothing_but_unreadable_images_is_refused(images):
    (images.path / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="1 of 1 images cannot be read: a.png: .*; remove them$"):
        read_calibration(images.path, skip_bad=True)


@pytest.mark.parametrize(("n", "said"), [(ADVISABLE_IMAGES - 1, True), (ADVISABLE_IMAGES, False)])
def test_few_images_are_told(images, capfd, n, said):
    read_folder(images.add(*(f"{i}.png" for i in range(n))))
    assert (f"{n} images; at least 32 are advisable" in " ".join(capfd.readouterr().err.split())) is said


def test_of_many_images_some_are_used(images, capfd, monkeypatch):
    monkeypatch.setattr(folder_module, "MOST_IMAGES", 4)
    found = read_folder(images.add(*(f"{i}.png" for i in range(9)))).images()
    assert len(found) == 4 and found == sorted(found) and "4 of its 9 images are used" in capfd.readouterr().err
    assert read_folder(images.path).images() == found


@pytest.mark.parametrize(("n", "held"), [(1, 0), (15, 0), (16, 8), (40, 8)])
def test_one_image_in_five_is_held_out(images, n, held):
    lines = read_folder(images.add(*(f"{i}.png" for i in range(n))))
    kept, out = lines.divided()
    assert len(out.images()) == held and not set(kept.images()) & set(out.images())
    assert sorted((*kept.lines, *out.lines), key=lines.lines.index) == lines.lines
    assert all(line.image is not None for line in out.lines)


def test_at_most_sixteen_images_are_held_out(tmp_path):
    for i in range(100):
        (tmp_path / f"{i}").write_bytes(bytes([i]))
    lines = LineSet("many", [Line("What?", image=str(i)) for i in range(100)], tmp_path)
    assert len(lines.divided()[1].lines) == 16


def test_copies_of_an_image_are_on_one_side(images):
    images.add(*(f"{i:02}.png" for i in range(16)))
    images.add(*(f"copy{i:02}.png" for i in range(16)))
    kept, out = (Counter(path.name[-6:-4] for path in part.images()) for part in read_folder(images.path).divided())
    assert set(kept.values()) == set(out.values()) == {2} and len(out) == len(kept) == 8


def test_lines_without_answers_are_for_calibration_only(tmp_path):
    file = tmp_path / "s.jsonl"
    file.write_text(
        '{"prompt": "Who?"}\n{"prompt": "Who?", "answer": " "}\n{"prompt": "Who?", "answer": " I. ", "task": "t"}\n'
    )
    unanswered = Line("Who?", task="other")
    assert read_calibration(file).lines == [unanswered, unanswered, Line("Who?", "I.", "t")]
    with pytest.raises(InputError, match="line 1: answer is empty or missing"):
        read_suite(file)


def test_invalid_lines_are_refused_or_left_out(tmp_path, capfd):
    file = tmp_path / "s.jsonl"
    file.write_text('{"prompt": "Who?"}\n{"prompt": " "}\n{"prompt": "Who?", "image": "none.png"}\n')
    with pytest.raises(InputError, match="line 2: prompt is empty"):
        read_calibration(file)
    assert read_calibration(file, skip_bad=True).lines == [Line("Who?", task="other")]
    assert "2 lines are invalid and left out, the first is line 2: prompt is empty" in capfd.readouterr().err


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_calibration(tmp_path / Path("none"))
