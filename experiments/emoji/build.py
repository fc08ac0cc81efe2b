"""A folder of captioned emoji from a colour font: PNG files, and metadata.jsonl with their names.

    apt-get install fonts-noto-color-emoji unicode-data && pip install fonttools
    python experiments/emoji/build.py data/emoji

A line of metadata.jsonl has file_name, text, group and subgroup: the name in Unicode's emoji-test.txt, and where it
lists it. Pictures are the font's own, centred in a square, transparent around.
"""

import argparse
import io
import json
import sys
from pathlib import Path

from PIL import Image

FONT = Path('/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf')
NAMES = Path('/usr/share/unicode/emoji/emoji-test.txt')
VARIATION_SELECTOR = 0xFE0F


def read_names(path: Path) -> list[tuple[tuple[int, ...], str, str, str]]:
    """(code points, name, group, subgroup) of every emoji in Unicode's emoji-test.txt, in its order."""
    rows, group, subgroup = [], '', ''
    for line in path.read_text(encoding='utf-8').splitlines():
        if line.startswith('# group:'):
            group = line.removeprefix('# group:').strip()
        elif line.startswith('# subgroup:'):
            subgroup = line.removeprefix('# subgroup:').strip()
        elif line and not line.startswith('#'):
            points, _, rest = line.partition(';')
            status, _, comment = rest.partition('#')
            if status.strip() in ('fully-qualified', 'component'):
                name = comment.strip().split(' ', 2)[2]  # after the emoji itself and its version
                rows.append((tuple(int(point, 16) for point in points.split()), name, group, subgroup))
    return rows


class Glyphs:
    """The bitmaps of a colour font with a CBDT table, by code points."""

    def __init__(self, path: Path):
        try:
            from fontTools.ttLib import TTFont
        except ImportError:
            sys.exit('error: fontTools reads the font: pip install fonttools')
        font = TTFont(path)
        (self._bitmaps,) = font['CBDT'].strikeData
        self._glyph_of = font.getBestCmap()
        self._ligatures = {}
        for lookup in font['GSUB'].table.LookupList.Lookup:
            for table in lookup.SubTable:
                table = getattr(table, 'ExtSubTable', table)
                if table.LookupType == 4:
                    for first, ligatures in table.ligatures.items():
                        for ligature in ligatures:
                            self._ligatures[first, *ligature.Component] = ligature.LigGlyph

    def __call__(self, points: tuple[int, ...]) -> Image.Image | None:
        """The picture, RGBA; None if the font has none."""
        for kept in (points, tuple(point for point in points if point != VARIATION_SELECTOR)):
            if not all(point in self._glyph_of for point in kept):
                continue
            names = tuple(self._glyph_of[point] for point in kept)
            glyph = names[0] if len(names) == 1 else self._ligatures.get(names)
            if glyph in self._bitmaps:
                return Image.open(io.BytesIO(self._bitmaps[glyph].imageData)).convert('RGBA')
        return None


def squared(picture: Image.Image) -> Image.Image:
    """In the middle of a transparent square."""
    side = max(picture.size)
    square = Image.new('RGBA', (side, side), (255, 255, 255, 0))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='the folder to write')
    parser.add_argument('--font', type=Path, default=FONT, help='a font with a CBDT table (default: %(default)s)')
    parser.add_argument('--names', type=Path, default=NAMES, help="Unicode's emoji-test.txt (default: %(default)s)")
    options = parser.parse_args()
    for path, package in ((options.font, 'fonts-noto-color-emoji'), (options.names, 'unicode-data')):
        if not path.is_file():
            sys.exit(f'error: {path} is missing: apt-get install {package}, or name another file.')
    if (options.out / 'metadata.jsonl').exists():
        sys.exit(f'error: {options.out} holds captioned images already: name another folder.')
    glyphs = Glyphs(options.font)
    images = options.out / 'images'
    images.mkdir(parents=True, exist_ok=True)
    lines, missing = [], 0
    for points, name, group, subgroup in read_names(options.names):
        picture = glyphs(points)
        if picture is None:
            missing += 1
            continue
        file = f'images/{"_".join(f"{point:x}" for point in points)}.png'
        squared(picture).save(options.out / file)
        lines.append(json.dumps({'file_name': file, 'text': name, 'group': group, 'subgroup': subgroup}))
    # Last: with it the folder is whole.
    (options.out / 'metadata.jsonl').write_text('\n'.join(lines) + '\n')
    print(f'{len(lines)} emoji in {options.out}; of {missing} the font has no picture.')


if __name__ == '__main__':
    main()
