"""Write the packaged table of ImageNet's classes: their names, definitions and broader classes, from WordNet 3.0.

    python dev/wordnet_classes.py DICT SYNSETS src/clasp/models/zoo/files/imagenet-wordnet.json.gz

DICT: the folder with ``data.noun`` of WordNet 3.0 (Debian: wordnet-base). SYNSETS: the WordNet ids of the 1,000 classes
of ILSVRC 2012 in the order of a classifier's outputs, one a line (timm: data/_info/imagenet_synsets.txt). Output: the
ids of the classes, and for these and all broader ones names (lemmas in WordNet's order), definition without its example
sentences, and the ids one step up (hypernyms).
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import NamedTuple


class Synset(NamedTuple):
    """One sense of WordNet's noun file; see wndb(5WN)."""

    names: list[str]
    definition: str
    broader: list[str]


def read_nouns(path: Path) -> dict[str, Synset]:
    """Every noun synset by its id, ``n`` and eight digits."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        facts, _, gloss = line.partition(" | ")
        field = facts.split(" ")
        words = int(field[3], 16)
        names = [field[4 + 2 * word].replace("_", " ") for word in range(words)]
        first = 5 + 2 * words
        pointers = [field[first + 4 * n : first + 4 * n + 4] for n in range(int(field[first - 1]))]
        broader = [f"n{offset}" for symbol, offset, kind, _ in pointers if symbol in ("@", "@i") and kind == "n"]
        found[f"n{field[0]}"] = Synset(names, gloss.split('; "')[0].split(";")[0].strip(), broader)
    return found


def main(folder: str, synsets: str, out: str) -> None:
    """Write the table."""
    nouns, classes = read_nouns(Path(folder) / "data.noun"), Path(synsets).read_text().split()
    kept: dict[str, Synset] = {}
    todo = list(classes)
    while todo:
        synset = todo.pop()
        if synset not in kept:
            kept[synset] = nouns[synset]
            todo += nouns[synset].broader
    table = {"classes": classes, "synsets": {name: kept[name]._asdict() for name in sorted(kept)}}
    content = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    Path(out).write_bytes(gzip.compress(content, 9, mtime=0))
    print(f"{len(classes):,} classes, {len(kept):,} synsets")


if __name__ == "__main__":
    main(*sys.argv[1:])
