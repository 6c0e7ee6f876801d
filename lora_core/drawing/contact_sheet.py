"""A contact sheet: rows of small images with captions, readable at the size of a node.

ComfyUI shows a sheet of any size about as wide as a node, so letters grow with the sheet. Texts are
measured with the font before it is drawn; what does not fit is shortened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import BACKGROUND, BLUE, DIM, FOREGROUND, LAST_LETTER, PANEL, VERMILION

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

MIN_WIDTH_PX = 1024
MAX_COLUMNS = 8
#: Width over height from which one row of images wraps to a second line.
MAX_ASPECT = 4.0
#: Images with fewer pixels than this are enlarged, as captions need the room.
MAX_ENLARGED_PX = 512
LETTERS_PER_WIDTH = 46  # a letter's height is the sheet's width over this
DIM_TEXT = "#b4b8c0"  # DIM is for lines; letters need more contrast
SMALL = 0.8  # of the letters


@dataclass(frozen=True)
class Tile:
    """One small image and the text below it."""

    image: np.ndarray | None
    """uint8 (height, width, 3); None draws an empty frame."""
    caption: str
    notes: tuple[str, ...] = ()
    """Smaller lines below the caption."""
    is_marked: bool = False
    """Something is wrong with it; see the first note."""
    is_reference: bool = False


@dataclass(frozen=True)
class Row:
    """Images that belong together, in the order of an axis."""

    heading: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Layout:
    """Where things are, in pixels."""

    columns: int
    tile: tuple[int, int]
    """Width and height of an image."""
    gap: int
    width: int
    letter: int
    """Height of a letter of headings and captions; notes are SMALL of it."""

    @property
    def small(self) -> int:
        return round(self.letter * SMALL)

    @property
    def left(self) -> int:
        """Left edge of the first column: the columns are centred."""
        used = self.columns * (self.tile[0] + self.gap) - self.gap
        return (self.width - used) // 2


def draw_sheet(title: str, rows: Sequence[Row], footer: Sequence[str] = ()) -> np.ndarray:
    """uint8 (height, width, 3); rows longer than the sheet is wide wrap.

    Args:
        footer: sentences below the images.
    """
    from PIL import Image, ImageDraw

    layout = choose_layout(rows)
    margin = layout.gap
    text_width = layout.width - 2 * margin
    title_lines = wrap(title, load_font(round(layout.letter * 1.15), True), text_width)
    footer_lines = [
        line for text in footer for line in wrap(text, load_font(layout.small), text_width)
    ]
    title_height = round(1.5 * layout.letter) * len(title_lines) + margin + layout.letter // 2
    footer_height = round(1.35 * layout.small) * len(footer_lines) + (margin if footer else 0)
    body_height = sum(compute_row_height(row, layout) for row in rows)
    height = title_height + body_height + footer_height + margin
    sheet = Image.new("RGB", (layout.width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    y = margin
    for line in title_lines:
        font = load_font(round(layout.letter * 1.15), True)
        draw.text((margin, y), line, font=font, fill=FOREGROUND)
        y += round(1.5 * layout.letter)
    y = title_height
    for row in rows:
        draw_row(sheet, draw, row, layout, y)
        y += compute_row_height(row, layout)
    y += margin // 2
    for line in footer_lines:
        draw.text((margin, y), line, font=load_font(layout.small), fill=DIM_TEXT)
        y += round(1.35 * layout.small)
    return np.asarray(sheet).copy()


def choose_layout(rows: Sequence[Row]) -> Layout:
    tiles = [tile for row in rows for tile in row.tiles]
    images = [tile.image for tile in tiles if tile.image is not None]
    height, width = images[0].shape[:2] if images else (256, 256)
    longest = max((len(row.tiles) for row in rows), default=1)
    columns = choose_columns(longest, len(rows), width / height)
    gap = max(8, round(0.06 * max(width, height)))
    # Few or small images are enlarged to fill the least width.
    room = (MIN_WIDTH_PX - gap) // columns - gap
    scale = max(1.0, min(room / width, MAX_ENLARGED_PX / max(width, height)))
    tile = (round(width * scale), round(height * scale))
    sheet_width = max(MIN_WIDTH_PX, columns * (tile[0] + gap) + gap)
    letter = round(sheet_width / LETTERS_PER_WIDTH)
    return Layout(columns, tile, gap, sheet_width, letter)


def choose_columns(longest: int, num_rows: int, aspect: float) -> int:
    """As many as fit MAX_COLUMNS and MAX_ASPECT, the lines of a row about equally long."""
    for lines in range(1, longest + 1):
        columns = math.ceil(longest / lines)
        # A caption takes about a third of a square image's height.
        shape = columns * aspect / (num_rows * lines * (1 + 0.3 * aspect))
        if columns <= MAX_COLUMNS and (shape <= MAX_ASPECT or columns <= 2):
            return columns
    return 1


def compute_row_height(row: Row, layout: Layout) -> int:
    lines = math.ceil(len(row.tiles) / layout.columns)
    heading = round(1.6 * layout.letter) if row.heading else 0
    return heading + lines * compute_line_height(row, layout)


def compute_line_height(row: Row, layout: Layout) -> int:
    """Of an image with its caption and as many notes as the row has at most, and a gap."""
    num_notes = max((len(tile.notes) for tile in row.tiles), default=0)
    caption = round(1.65 * layout.letter + 1.3 * layout.small * num_notes)
    return layout.tile[1] + caption + layout.gap


def draw_row(sheet: Any, draw: ImageDraw.ImageDraw, row: Row, layout: Layout, y: int) -> None:
    margin = layout.left
    if row.heading:
        font = load_font(layout.letter, True)
        text = shorten(row.heading, font, layout.width - 2 * layout.gap)
        draw.text((layout.gap, y), text, font=font, fill=BLUE)
        y += round(1.6 * layout.letter)
    for number, tile in enumerate(row.tiles):
        line, column = divmod(number, layout.columns)
        x = margin + column * (layout.tile[0] + layout.gap)
        top = y + line * compute_line_height(row, layout)
        draw_tile(sheet, draw, tile, layout, x, top)


def draw_tile(
    sheet: Any, draw: ImageDraw.ImageDraw, tile: Tile, layout: Layout, x: int, y: int
) -> None:
    from PIL import Image

    width, height = layout.tile
    box = (x - 1, y - 1, x + width, y + height)
    if tile.image is None:
        draw.rectangle(box, fill=PANEL, outline=DIM)
    else:
        image = Image.fromarray(tile.image)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(image, (x, y))
        border = VERMILION if tile.is_marked else BLUE if tile.is_reference else None
        if border:
            draw.rectangle(
                grow(box, layout.letter // 8), outline=border, width=max(2, layout.letter // 7)
            )
    font, center = load_font(layout.letter, True), x + width // 2
    y += height + round(0.2 * layout.letter)
    colour = VERMILION if tile.is_marked else FOREGROUND
    draw.text((center, y), shorten(tile.caption, font, width), font=font, fill=colour, anchor="ma")
    y += round(1.35 * layout.letter)
    font = load_font(layout.small)
    for number, note in enumerate(tile.notes):
        colour = VERMILION if tile.is_marked and number == 0 else DIM_TEXT
        draw.text((center, y), shorten(note, font, width), font=font, fill=colour, anchor="ma")
        y += round(1.3 * layout.small)


def grow(box: tuple[int, int, int, int], by: int) -> tuple[int, int, int, int]:
    return (box[0] - by, box[1] - by, box[2] + by, box[3] + by)


@cache
def load_font(size: int, is_bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if is_bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", name), size)


def clean(text: str) -> str:
    """Without what the font lacks."""
    return "".join(c if 32 <= ord(c) < LAST_LETTER else "\u25a1" for c in text)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut in the middle until it fits."""
    text = clean(text)
    kept = len(text)
    shown = text
    while font.getlength(shown) > width and kept > 1:
        kept -= 1
        shown = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return shown


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in clean(text).split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = shorten(longer, font, width)
        else:
            lines.append(shorten(word, font, width))
    return lines
