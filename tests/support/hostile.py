"""Strings that are somebody's markup, formula, control sequence or path."""

from __future__ import annotations

HOSTILE = (
    "[/]",
    "[/INST] [bold red]x[/bold red]",
    "[link=https://example.org]x",
    ":smile: \\[a] [a",
    "$x$",
    "$\\frac{",
    "a_b^c \\$ 100 % & ~",
    "_hidden",
    "<b>x</b><script>alert(1)</script>",
    "\x1b[31mred\x1b[2J\x1b]0;title\x07",
    "bell\x07 back\x08 nul\x00 delete\x7f \x9b31m",
    "two\nlines\r\nand\ttabs",
    "\u2028line\u2029paragraph\x0bpage\x0c",
    "\u202eright to left\u202c \u2066x\u2069",
    "שלום مرحبا",
    "👩\u200d🚀 🇫🇷 漢字 e\u0301",
    "\ud800 alone \udcff",
    "x" * 5000,
    "   ",
    "{name} %s ${facts.vocab_size} \\u0041 '\"",
)
