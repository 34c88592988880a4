"""Where an answer ends as a reader sees it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factpatch.lm.sentences import first_sentence, has_ended

# What is written so far, its first sentence, and whether writing on could change that.
CASES = {
    "a sentence": (" Paris. It is", "Paris.", True),
    "no end yet": ("Paris and", "Paris and", False),
    "a full stop with nothing after it": ("Paris.", "Paris.", False),
    "question": ("Is it Paris? No", "Is it Paris?", True),
    "exclamation": ("Paris! Yes", "Paris!", True),
    "both": ("Paris?! Yes", "Paris?!", True),
    "three dots": ("Paris... and", "Paris...", True),
    "closing quote": ('he said "yes." Then', 'he said "yes."', True),
    "closing bracket": ("(in Paris.) Then", "(in Paris.)", True),
    "bracket before the stop": ("Oslo (Norway). It", "Oslo (Norway).", True),
    "a line": ("Paris\nand more", "Paris", True),
    "a line that ends later than the sentence": ("Paris. It is\nbig", "Paris.", True),
    "a sentence that ends with its line": ("Paris.\nIt is", "Paris.", True),
    "new lines first": ("\n\nParis\nand more", "Paris", True),
    "new lines alone": ("\n\n", "", False),
    "blanks first": ("  \t Paris. It", "Paris.", True),
    "empty": ("", "", False),
    "blanks alone": ("   ", "", False),
    "abbreviation": ("St. Louis, Missouri. Next", "St. Louis, Missouri.", True),
    "abbreviation in capitals": ("MR. SMITH. Next", "MR. SMITH.", True),
    "abbreviation in brackets": ("(Dr. Who) is. Next", "(Dr. Who) is.", True),
    "two abbreviations": ("Mr. and Mrs. Smith. Next", "Mr. and Mrs. Smith.", True),
    "abbreviation inside": ("a city, e.g. Paris. Next", "a city, e.g. Paris.", True),
    "abbreviation with dots": ("the U.S. state of Missouri. Next", "the U.S. state of Missouri.", True),
    "company": ("Apple Inc. of Cupertino. Next", "Apple Inc. of Cupertino.", True),
    "an abbreviation still ends a line": ("Apple Inc.\nNext", "Apple Inc.", True),
    "initial": ("J. Smith. Next", "J. Smith.", True),
    "initials": ("J. R. R. Tolkien! Yes", "J. R. R. Tolkien!", True),
    "initials without blanks": ("J.R.R. Tolkien. Next", "J.R.R. Tolkien.", True),
    "half a day": ("at 5 p.m. in Rome. Next", "at 5 p.m. in Rome.", True),
    "an initial beyond ASCII": ("É. Zola wrote it. Next", "É. Zola wrote it.", True),
    "curly quotes": ("he said “yes.” Then", "he said “yes.”", True),
    "a Chinese sentence": ("东京。它是", "东京。", True),
    "a Chinese sentence with nothing after it": ("东京。", "东京。", False),
    "a Chinese quotation": ("「东京。」它", "「东京。」", True),
    "the answer no": ("No. It is in Rome.", "No.", True),
    "the answer no, perhaps": ("No. ", "No.", False),
    "number so and so": ("No. 5 is the best. Next", "No. 5 is the best.", True),
    "decimal": ("about 3.5 metres. Next", "about 3.5 metres.", True),
    "year": ("in 1912. Then", "in 1912.", True),
    "number in a list": ("1. Paris is big. Yes", "1. Paris is big.", True),
    "number in a list, two digits": ("12. Paris is big. Yes", "12. Paris is big.", True),
    "number in a list with a bracket": ("1) Paris is big. Yes", "1) Paris is big.", True),
    "a number that ends the sentence": ("It has 12. Yes", "It has 12.", True),
    "address": ("See example.com for more. Then", "See example.com for more.", True),
}


@pytest.mark.parametrize(("text", "first", "ended"), CASES.values(), ids=CASES)
def test_first_sentence(text, first, ended):
    assert (first_sentence(text), has_ended(text)) == (first, ended)


@given(
    st.text(st.sampled_from("aB1.!?\n \"')éNo。”"), max_size=30), st.text(st.sampled_from("aB1.!?\n 。”"), max_size=10)
)
def test_once_ended_nothing_written_later_changes_the_sentence(text, more):
    if has_ended(text):
        assert has_ended(text + more)
        assert first_sentence(text + more) == first_sentence(text)


@given(st.text(max_size=40))
def test_the_first_sentence_is_where_the_text_begins_and_is_one_line(text):
    first = first_sentence(text)
    assert text.lstrip().startswith(first)
    assert "\n" not in first
    assert first == first.strip()
