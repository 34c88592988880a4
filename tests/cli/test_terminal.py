"""What the commands share when they print."""

from factpatch.cli.terminal import show_retained
from factpatch.scoring import Retained


def question(prompt, *, was, now):
    return Retained(
        prompt=prompt, answers=("x",) if was is not None else (), before="a", after="b", changed=True, was_right=was, is_right=now
    )  # fmt: skip


def test_changed_answers_say_whether_they_were_right_and_are(capsys):
    asked = [
        question("one", was=False, now=False),
        question("two", was=False, now=True),
        question("three", was=True, now=False),
    ]
    show_retained([*asked, question("four", was=None, now=None)])
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.strip() for line in out.splitlines()}
    assert lines["one"].endswith("wrong → wrong")
    assert lines["two"].endswith("wrong → right")
    assert lines["three"].endswith("right → wrong")
    assert lines["four"].endswith("b")
    assert list(lines)[2] == "three", "what was lost comes first"
