"""Tiles so small that a text of a few tokens has several of them, and each query several steps of running softmax."""

from hf_selfattn import PATTERNS, tile_blocks, tile_roads, tiles
from hf_selfattn.patterns import Pattern

TILE = 5


def use_small_tiles(monkeypatch, tile: int = TILE) -> None:
    """Every pattern's tiles have `tile` tokens; two key blocks are one step, and few units are computed together."""
    for cls in (Pattern, *PATTERNS.values()):
        if "tile_size" in vars(cls):
            monkeypatch.setattr(cls, "tile_size", property(lambda self: tile))
    monkeypatch.setattr(tile_blocks, "KEYS_AT_ONCE", 2 * tile)
    monkeypatch.setattr(tile_roads, "SCORES_AT_ONCE", 1000)
    use_blocks(monkeypatch)


def use_blocks(monkeypatch) -> None:
    """Documents of any length go block by block."""
    monkeypatch.setattr(tiles, "WHOLE_BELOW", 0)
