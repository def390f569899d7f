"""What the letters of a case's shape mean: one table, for axes and captions."""

from collections.abc import Sequence

SIZES = {  # stem, or stem and kind where it differs -> letters in the order of a case's name
    "divergence": {"N": "tokens", "V": "words", "K": "words kept"},
    "linear_divergence": {"R": "tokens", "V": "words", "Ds": "student width", "Dt": "teacher width"},
    "gram": {"B": "examples", "N": "tokens", "Ds": "student width", "Dt": "teacher width"},
    "relation": {"B": "examples", "H": "heads", "L": "tokens", "d": "head width", "R": "relations"},
    "layer_cost": {"N": "student layers", "M": "teacher layers", "B": "examples", "S": "tokens", "D": "width"},
    "layer_cost attention": {
        "N": "student layers", "M": "teacher layers", "B": "examples", "H": "heads", "S": "tokens", "d": "head width",
    },
    "transport": {"P": "problems", "N": "student layers", "M": "teacher layers"},
    "contrast": {"B": "examples", "K": "negatives", "D": "width", "n": "bank rows", "S": "input width"},
    "contrast in_batch": {"B": "examples", "D": "width"},
}  # fmt: skip
PER_SIDE = {"student layers": "layers per side"}  # where both sides grow together


def short(size: int) -> str:
    """131072 as 128k, where it divides."""
    if size >= 1 << 20 and size % (1 << 20) == 0:
        return f"{size >> 20}M"
    return f"{size >> 10}k" if size >= 1024 and size % 1024 == 0 else f"{size:,}"


def counted(word: str, size: int) -> str:
    """32 examples, 1 example, width 256."""
    if word.endswith("width"):
        return f"{word} {short(size)}"
    return f"{short(size)} {word.removesuffix('s') if size == 1 else word}"


def letters(row: dict) -> dict[str, str]:
    return SIZES.get(f"{row['stem']} {row['kind']}") or SIZES.get(row["stem"], {})


def sizes_of(row: dict) -> dict[str, int]:
    """The letters of a row's shape and what they are."""
    return dict(zip(letters(row), map(int, row["shape"].split("x")), strict=False))


def axis_label(points: Sequence[dict]) -> str:
    """negatives K, tokens N, layers per side N."""
    letter = points[0]["sweep"].split("=")[0]
    word = letters(points[0]).get(letter, "")
    word = PER_SIDE.get(word, word) if len(moving(points)) > 1 else word
    return f"{word} {letter}".strip()


def moving(points: Sequence[dict]) -> list[str]:
    """The letters whose size changes along a curve."""
    found = [sizes_of(row) for row in points]
    return [letter for letter in found[0] if len({sizes.get(letter) for sizes in found}) > 1]


def fixed(points: Sequence[dict]) -> str:
    """What stays the same along a curve: 32 examples, width 256."""
    known, moves = letters(points[0]), moving(points)
    sizes = sizes_of(points[0]).items()
    return ", ".join(counted(known[letter], size) for letter, size in sizes if letter not in moves)
