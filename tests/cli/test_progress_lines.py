"""Progress where standard error is no terminal: lines, the first of which says how long a stage will take."""

from duo_mlx.cli.progress import EVERY, FIRST, Lines


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self):
        return self.now


def test_the_first_line_says_how_long_and_more_come_every_so_often(capsys):
    clock = Clock()
    lines = Lines(clock)
    for done in range(101):
        clock.now = done * 2.0
        lines("grafting", done, 100)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "duo-mlx: grafting: 3%, about 3 min left"
    assert len(said) == 1 + (200 - 6) // EVERY and said[-1].endswith(" s left")
    assert FIRST <= 6


def test_a_short_stage_says_nothing_and_a_stage_that_resumes_counts_from_there(capsys):
    clock = Clock()
    lines = Lines(clock)
    for done in range(5):
        clock.now += 1
        lines("writing", done * 1e9, 4e9)
    assert capsys.readouterr().err == ""
    lines("grafting", 80, 100)
    for done in range(81, 91):
        clock.now += 10
        lines("grafting", done, 100)
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "duo-mlx: grafting: 81%, about 3 min left"  # 19 steps of 10 s
