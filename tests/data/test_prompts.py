"""Prompt templates and class names: built-in sets, files, and the errors that name the line."""

from pathlib import Path

import open_clip
import pytest

from data_tools.core.errors import UsageError
from mmvit.data.prompts import builtin_prompts, configs_folder, fill, load_class_names, load_templates

# "this is a photo of {}." with the genitive particle, escaped because source files are ASCII
KOREAN_SENTENCE = "\uc774\uac83\uc740 {}\uc758 \uc0ac\uc9c4\uc785\ub2c8\ub2e4."


def write(path: Path, text: str) -> str:
    """Write the text as UTF-8 and return the path as the command line would give it."""
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_builtin_sets_are_those_that_the_documentation_names():
    assert sorted(builtin_prompts()) == ["bare", "emoji", "emoji-korean", "imagenet", "imagenet7", "korean", "simple"]
    assert configs_folder().name == "configs"


@pytest.mark.parametrize(
    ("name", "reference", "count"),
    [
        ("imagenet", open_clip.OPENAI_IMAGENET_TEMPLATES, 80),
        ("imagenet7", open_clip.SIMPLE_IMAGENET_TEMPLATES, 7),
    ],
)
def test_imagenet_sets_equal_open_clip(name, reference, count):
    templates = load_templates(name)
    assert len(templates) == count
    assert [fill(template, "tabby cat") for template in templates] == [make("tabby cat") for make in reference]


def test_simple_and_korean_sets():
    assert load_templates("simple") == ["a photo of a {}."]
    assert KOREAN_SENTENCE in load_templates("korean")
    assert load_templates("emoji")[0] == load_templates("emoji-korean")[0] == "{}"


@pytest.mark.parametrize("name", ["korean", "emoji-korean"])
def test_no_korean_particle_follows_the_final_consonant_of_the_name(name):
    # subject, topic, object, "and", "with/to": each has two forms, chosen by the name's last letter
    two_forms = "\uc774\uac00\uc740\ub294\uc744\ub97c\uacfc\uc640\uc73c\ub85c"
    for template in load_templates(name):
        after = template.split("{}")[1]
        assert not (after and after[0] in two_forms), template


def test_fill_takes_both_placeholders_and_leaves_the_name_alone():
    assert fill("a {} here", "red {} \\1 {c}") == "a red {} \\1 {c} here"
    assert fill("{c}!", "dog") == "dog!"


def test_templates_from_a_file_skip_comments_blank_lines_and_byte_order_mark(tmp_path):
    spec = write(tmp_path / "mine.txt", "\ufeff# a comment with {} and {}\r\n\r\n  the {c} \r\n{}\n")
    assert load_templates(spec) == ["the {c}", "{}"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a photo", "0 placeholders"),
        ("{} and {c}", "2 placeholders"),
        ("{} of {name}", "a brace that is not a placeholder"),
        ("{{}}", "a brace that is not a placeholder"),
    ],
)
def test_template_without_exactly_one_placeholder_is_refused(tmp_path, line, message):
    spec = write(tmp_path / "bad.txt", f"# head\na {{}}\n{line}\n")
    with pytest.raises(UsageError, match=message) as caught:
        load_templates(spec)
    assert caught.value.where == f"{spec}, line 3"


def test_double_and_missing_templates_are_refused(tmp_path):
    with pytest.raises(UsageError, match="is duplicated") as caught:
        load_templates(write(tmp_path / "double.txt", "{}\na {}\n{}\n"))
    assert "lines 1 and 3" in str(caught.value)
    with pytest.raises(UsageError, match="no template"):
        load_templates(write(tmp_path / "empty.txt", "# only this\n"))


def test_unknown_set_gets_a_suggestion_and_the_list():
    with pytest.raises(UsageError, match="did you mean 'imagenet'") as caught:
        load_templates("imagnet")
    assert "bare, emoji, emoji-korean, imagenet, imagenet7, korean, simple" in str(caught.value)


def test_class_names_from_text_and_file(tmp_path):
    names = ["dog face", "cat face", "red apple"]
    assert load_class_names("dog face, cat face,red apple") == names
    assert load_class_names(write(tmp_path / "names.txt", "dog face\ncat face\r\n red apple\n\n")) == names
    assert load_class_names(write(tmp_path / "one.txt", "dog")) == ["dog"]
    many = [f"name {number}" for number in range(2000)]  # longer than any file name may be
    assert load_class_names(",".join(many)) == many


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dog\n\ncat\n  \nowl\n", ["blank line", "line 2, 4", "following classes"]),
        ("dog\ncat\nowl\ncat\ndog\n", ["duplicate class names", "'cat' at line 2 and 4", "'dog' at line 1 and 5"]),
        ("\n\n", ["no class name"]),
    ],
)
def test_bad_class_file_is_refused_with_its_lines(tmp_path, text, parts):
    spec = write(tmp_path / "names.txt", text)
    with pytest.raises(UsageError) as caught:
        load_class_names(spec)
    for part in [spec, *parts]:
        assert part in str(caught.value)


def test_bad_class_text_is_refused_with_its_entries():
    with pytest.raises(UsageError, match="entry 2"):
        load_class_names("dog,,cat")
    with pytest.raises(UsageError, match="'dog' at entry 1 and 3"):
        load_class_names("dog,cat,dog")
    with pytest.raises(UsageError, match="no file of class names"):
        load_class_names("names.txt")


def test_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(b"dog\n\xff\xfe\n")
    with pytest.raises(UsageError, match="not UTF-8") as caught:
        load_class_names(str(path))
    assert "byte 4" in str(caught.value)
