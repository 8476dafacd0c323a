"""Random damage to files and recipes, for the campaigns; `rng` is a random.Random, hypothesis' own or a seeded one."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

# What people and programs leave in place of a value: of another type, out of range, much too large.
NUMBERS = [0, -1, 1, 2, 3, 7, 0.5, -0.5, 1e-300, 1e308, 10**4, 10**6, 10**9, 10**12, 10**30, -(10**12)]
TEXTS = ["", " ", "x", "1e-3", "0x10", "é\u2028\x07", "\ud800", "a" * 10_000, "../..", "/dev/null", "s3://", "~", "no"]
LISTS = [[], [[]], [0], [-1], [1, 2], [None], ["x"], [1e308, 10**12], [10**5, 10**5], [16384, 16384], [64] * 300]
SECTIONS = [{}, {"kind": "x"}, {"kind": "mlp"}, {"kind": "digits"}, {"kind": None}, {"a": {"b": []}}, {"": 1}, {1: 2}]
VALUES: list[Any] = [None, True, False, float("nan"), float("inf"), *NUMBERS, *TEXTS, *LISTS, [10**12], *SECTIONS]


def changed(content: Any, rng: random.Random) -> Any:
    """A copy in which something is other: a value replaced, a field gone, added, renamed, or moved elsewhere."""
    content = json.loads(json.dumps(content))
    places = list(_places(content))
    if not places:
        return rng.choice(VALUES)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        holder, key = rng.choice(places)
        if isinstance(holder, dict) and key not in holder:  # gone already
            continue
        what = rng.choice(["replace", "replace", "replace", "drop", "add", "rename", "swap"])
        if what == "replace":
            holder[key] = _like(holder[key], rng) if rng.random() < 0.6 else rng.choice(VALUES)
        elif what == "drop" and isinstance(holder, dict):
            del holder[key]
        elif what == "add" and isinstance(holder, dict):
            holder[rng.choice(["", "kind", "extra", "é", "a.b", "__class__"])] = rng.choice(VALUES)
        elif what == "rename" and isinstance(holder, dict):
            holder[f"{key}{rng.choice('sx_ ')}"] = holder.pop(key)
        else:
            other, there = rng.choice(places)
            if there in other if isinstance(other, dict) else there < len(other):
                holder[key] = json.loads(json.dumps(other[there]))
    return content


def _like(value: Any, rng: random.Random) -> Any:
    """Another value of the same type: what a check of types lets pass."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([number for number in NUMBERS if isinstance(number, int)])
    if isinstance(value, float):
        return rng.choice(NUMBERS)
    if isinstance(value, list) and value:
        return [_like(one, rng) for one in value] * rng.choice([1, 1, 2, 50])
    return rng.choice(TEXTS) if isinstance(value, str) else rng.choice(VALUES)


def _places(content: Any) -> Any:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from _places(value)


INSERTED = [b"\xff\xfe", b"\x00", b"{", b"[[[[", b"NaN", b"\n- x: ["]


def spoiled(content: bytes, rng: random.Random) -> bytes:
    """Bytes of a file that a disk or a kill has spoiled."""
    what = rng.choice(["truncate", "empty", "flip", "flip", "zeros", "double", "noise", "insert"])
    place = rng.randrange(len(content) + 1)
    if what == "truncate":
        return content[:place]
    if what == "empty":
        return b""
    if what == "flip" and content:
        spoilt = bytearray(content)
        for _ in range(rng.choice([1, 8])):
            spoilt[rng.randrange(min(len(content), rng.choice([16, 400, 10**9])))] ^= 1 << rng.randrange(8)
        return bytes(spoilt)
    if what == "zeros":
        return bytes(len(content))
    if what == "double":
        return content + content
    if what == "insert":
        return content[:place] + rng.choice(INSERTED) + content[place:]
    return bytes(rng.randrange(256) for _ in range(rng.randrange(200)))


def damage(file: Path, rng: random.Random) -> str:
    """Damage one file as its format allows; returns how."""
    ways: dict[str, Callable[[], None]] = {
        "bytes": lambda: _put(file, spoiled(file.read_bytes(), rng)),
        "gone": file.unlink,
        "a directory": lambda: _instead(file, Path.mkdir),
        "a link to itself": lambda: _instead(file, lambda place: place.symlink_to(place)),
    }
    content = {
        ".json": lambda: _put(file, _json(changed(json.loads(file.read_text()), rng))),
        ".jsonl": lambda: _put(file, b"\n".join(_json(changed(json.loads(line), rng)) for line in file.open())),
        ".yaml": lambda: _put(file, _yaml(changed(yaml.safe_load(file.read_text()), rng))),
        ".safetensors": lambda: _put(file, _header(file.read_bytes(), rng)),
        ".pt": lambda: torch.save(_state(torch.load(file, weights_only=True), rng), file),
    }.get(file.suffix)
    if content:
        ways["content"] = content
    way = rng.choice([*ways, *["content"] * 6] if content else [*ways])
    ways[way]()
    return way


def _instead(file: Path, make: Callable[[Path], None]) -> None:
    file.unlink()
    make(file)


def _put(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _json(content: Any) -> bytes:
    return json.dumps(content).encode(errors="surrogatepass")


def _yaml(content: Any) -> bytes:
    return yaml.dump(content, allow_unicode=True).encode(errors="surrogatepass")


def _header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header, or what the header's metadata holds, says something else."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.get("__metadata__", {})
    if metadata and rng.random() < 0.7:
        name = rng.choice(sorted(metadata))
        try:
            metadata[name] = json.dumps(changed(json.loads(metadata[name]), rng))
        except ValueError:
            metadata[name] = "x"
    else:
        header = changed(header, rng)
    text = _json(header)
    return len(text).to_bytes(8, "little") + text + content[start:]


def _state(state: dict[str, Any], rng: random.Random) -> Any:
    """A checkpoint in which a field, at any depth, is other."""
    here = state
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        below = [key for key, value in here.items() if isinstance(value, dict) and value]
        if not below:
            break
        here = here[rng.choice(below)]
    key = rng.choice(list(here))
    what = rng.choice(["drop", "add", "replace", "tensor", "rename"])
    if what == "drop":
        del here[key]
    elif what == "add":
        here["of_a_later_version"] = 3
    elif what == "replace":
        here[key] = rng.choice([value for value in VALUES if not isinstance(value, dict)])
    elif what == "rename":
        here[f"{key}s"] = here.pop(key)
    else:
        here[key] = torch.zeros(rng.choice([(), (1,), (2, 3)]))
    return state


def replaced(folder: Path, by: Path) -> None:
    """Make the folder what the other one is."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(by, folder, symlinks=True)
