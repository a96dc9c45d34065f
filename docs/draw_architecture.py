"""Draws the import rule, ROOMS of tests/test_architecture.py, as docs/architecture.svg.

python docs/draw_architecture.py
"""

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent
TARGET = FOLDER / "architecture.svg"
PER_ROW = 6
WIDTH, GAP, LINE, HEAD, MARGIN = 158, 26, 20, 34, 12  # px
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1b1f24 }
  .inner { font-size: 12px }
  .number { font-size: 10px; fill: #57606a }
  .package { fill: #dbe9fb; stroke: #4a78b5 }
  .room { fill: #ffffff; stroke: #9db8da }
  .arrow { stroke: #4a78b5; stroke-width: 1.5; fill: none; marker-end: url(#head) }
"""


def architecture_test() -> ModuleType:
    """Return the test that holds the import rule, as a module."""
    spec = importlib.util.spec_from_file_location("architecture", FOLDER.parent / "tests" / "test_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grouped_rooms(rooms: tuple[str, ...], roots: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the packages in the order of the rule, each with its inner packages in theirs."""
    groups: dict[str, list[str]] = {}
    for room in rooms:
        if room in roots or room.endswith("__main__"):
            continue  # an __init__.py alone
        package = max((root for root in roots if room.startswith(root + ".")), key=len)
        inner = room.removeprefix(package + ".")
        if package == "mmvit":
            groups[room] = []
        else:
            groups.setdefault(package, []).append(inner)
    return groups


def draw(groups: dict[str, list[str]]) -> str:
    """Return the SVG: a box per package, left to right and row by row, with its inner packages from top to bottom."""
    names = list(groups)
    rows = [names[start : start + PER_ROW] for start in range(0, len(names), PER_ROW)]
    width = 2 * MARGIN + PER_ROW * WIDTH + (PER_ROW - 1) * GAP
    shapes, y = [], MARGIN
    for row in rows:
        height = max(box_height(groups[name]) for name in row)
        for column, name in enumerate(row):
            x = MARGIN + column * (WIDTH + GAP)
            shapes += package_box(x, y, name, groups[name], names.index(name) + 1)
            if column:
                shapes.append(f'<path class="arrow" d="M{x - 2} {y + HEAD / 2} h{4 - GAP}"/>')
        y += height + 2 * MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y - MARGIN}" width="{width}" role="img" '
        f'aria-label="The packages of mmvit in the order of the import rule">'
    )
    marker = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#4a78b5"/></marker></defs>'
    )
    ground = '<rect width="100%" height="100%" rx="6" fill="#f6f8fa"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", marker, ground, *shapes, "</svg>"]) + "\n"


def box_height(inner: list[str]) -> int:
    """Return the height of the box of a package."""
    return HEAD + (len(inner) * (LINE + 4) + 6 if inner else 0)


def package_box(x: int, y: int, name: str, inner: list[str], number: int) -> list[str]:
    """Return the shapes of a package and its inner packages."""
    height = box_height(inner)
    shapes = [f'<rect class="package" x="{x}" y="{y}" width="{WIDTH}" height="{height}" rx="5"/>']
    shapes += label(x, y + HEAD // 2, name, number, "")
    for i, room in enumerate(inner):
        top = y + HEAD + i * (LINE + 4)
        shapes.append(f'<rect class="room" x="{x + 22}" y="{top}" width="{WIDTH - 32}" height="{LINE}" rx="3"/>')
        shapes += label(x + 22, top + LINE // 2, room, i + 1, ' class="inner"')
    return shapes


def label(x: int, middle: int, name: str, number: int, kind: str) -> list[str]:
    """Return the number and the name of a box that begins at `x`."""
    base = middle + 4  # the baseline of text of this size; not all programs know other ways to centre it
    return [
        f'<text class="number" x="{x + 8}" y="{base}">{number}</text>',
        f'<text{kind} x="{x + 28}" y="{base}">{name}</text>',
    ]


def main() -> None:
    """Write the drawing."""
    rule = architecture_test()
    TARGET.write_text(draw(grouped_rooms(rule.ROOMS, rule.ROOTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
