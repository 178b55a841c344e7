"""Draws a command's output as an SVG terminal: `command | python3 docs/terminal_picture.py TITLE > picture.svg`."""

import sys
import textwrap
from html import escape

COLUMNS, LINE, LEFT, TOP = 104, 17, 16, 52

lines = [f"$ {sys.argv[1]}", ""]
for line in sys.stdin.read().rstrip().splitlines():
    lines += textwrap.wrap(line, COLUMNS, drop_whitespace=False, replace_whitespace=False) or [""]


def colour(line):
    return "#7ee787" if line.startswith("$") else "#79c0ff" if line.startswith("──") else "#e6edf3"


width, height = 2 * LEFT + int(COLUMNS * 7.85), TOP + LINE * len(lines)
print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">')
print(f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>')
for x, fill in zip((20, 40, 60), ("#ff5f56", "#ffbd2e", "#27c93f")):
    print(f'<circle cx="{x}" cy="20" r="6" fill="{fill}"/>')
print('<g font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13" xml:space="preserve">')
for i, line in enumerate(lines):
    if line:
        print(f'<text x="{LEFT}" y="{TOP + LINE * i}" fill="{colour(line)}">{escape(line)}</text>')
print("</g></svg>")
