"""A vocabulary in the manner of CLIP's, learned from a few words, as open_clip and as transformers read it."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from edadm.metrics.clip import VOCABULARY

Merge = tuple[str, str]
HEADER = "#version: 0.2"
START, END = "<|startoftext|>", "<|endoftext|>"


def learn_merges(words: Iterable[str]) -> list[Merge]:
    """Merge the most frequent pair of symbols until every word is one token (Sennrich et al. 2016).

    words: of ASCII letters, each as often as it occurs. Of equally frequent pairs the first in the alphabet is merged.
    """
    counts = Counter(words)
    symbols = {word: (*word[:-1], f"{word[-1]}</w>") for word in counts}
    merges: list[Merge] = []
    while True:
        pairs: Counter[Merge] = Counter()
        for word, parts in symbols.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        symbols = {word: _merged(parts, best) for word, parts in symbols.items()}


def _merged(parts: Sequence[str], pair: Merge) -> tuple[str, ...]:
    found: list[str] = []
    for part in parts:
        if found and (found[-1], part) == pair:
            found[-1] += part
        else:
            found.append(part)
    return tuple(found)


def write_vocabulary(merges: Sequence[Merge], folder: Path) -> Path:
    """Write the file that open_clip's tokenizer reads, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join([HEADER, *(" ".join(pair) for pair in merges)])  # its reader takes a last empty line for a merge
    path = folder / VOCABULARY
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


def open_clip_tokenizer(vocabulary: Path, context_length: int) -> Any:
    """Return open_clip's tokenizer with this vocabulary."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(bpe_path=str(vocabulary), context_length=context_length)


def write_transformers_tokenizer(vocabulary: Path, context_length: int, folder: Path) -> None:
    """Write the folder that ``CLIPTokenizer`` reads, with the same numbers of the same tokens."""
    encoder = open_clip_tokenizer(vocabulary, context_length).encoder
    names = [*list(encoder)[:-2], START, END]
    merges = gzip.decompress(vocabulary.read_bytes()).decode()
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    facts = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, **special}
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "vocab.json": json.dumps({name: number for number, name in enumerate(names)}, ensure_ascii=False),
        "merges.txt": f"{merges}\n",
        "tokenizer_config.json": json.dumps(facts, indent=1),
        "special_tokens_map.json": json.dumps(special, indent=1),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
