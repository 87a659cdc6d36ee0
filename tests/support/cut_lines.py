"""Where in a test's own source a path is cut: the line that is marked, and what an explanation says of it."""

from __future__ import annotations

import inspect
from pathlib import Path


def line_of(function, mark="# cut"):
    """File and number of the line of a function that ends in a mark."""
    lines, first = inspect.getsourcelines(function)
    number = next(first + i for i, line in enumerate(lines) if line.rstrip().endswith(mark))
    return function.__code__.co_filename, number


def seen(cut):
    """What a cut is, and in which file and line."""
    return cut.operation.name, (cut.place.file, cut.place.line)


def shown(function, mark="# cut"):
    """The marked line as a text names it, less the folder."""
    file, line = line_of(function, mark)
    return f"{Path(file).name}:{line}"


def assert_cut(path, function, operation, where, of):
    """The one cut of a path is this operation, in that line and part, and the text says all of it."""
    assert path.status == "cut"
    assert path.routes == ()
    (cut,) = path.cuts
    assert seen(cut) == (operation, line_of(function))
    assert cut.where == where
    assert cut.of == {of}
    text = str(path)
    for part in (operation, shown(function), where, repr(of[1]), repr(path.meta_param)):
        assert part in text
    assert text.count("write instead: ") == 1
