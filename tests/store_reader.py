"""A reader of the trajectory store, written from docs/store-format.md and nothing else; it checks every checksum."""

import json
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np


def lz4_block(block):
    """Unpacks one LZ4 block: literals, then a copy of what is already there, in turn."""
    out, at = bytearray(), 0

    def extended(length):
        nonlocal at
        while length >= 15:
            byte = block[at]
            at += 1
            length += byte
            if byte < 255:
                break
        return length

    while at < len(block):
        token = block[at]
        at += 1
        literals = extended(token >> 4)
        out += block[at : at + literals]
        at += literals
        if at == len(block):
            break
        offset = block[at] | block[at + 1] << 8
        at += 2
        for _ in range(extended(token & 15) + 4):
            out.append(out[-offset])
    return bytes(out)


def fnv(numbers):
    digest = 0xCBF29CE484222325
    for byte in b"".join(struct.pack("<Q", number) for number in numbers):
        digest = (digest ^ byte) * 0x100000001B3 % 2**64
    return digest


def picture(blob, height, width, key):
    if len(blob) == height * width * 3:
        return np.frombuffer(blob, np.uint8).reshape(height, width, 3)
    stream, at = lz4_block(blob), 0
    assert len(stream) <= height * width * 3

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = stream[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    pixels = number()
    colours = np.frombuffer(stream, np.uint8)[len(stream) - 3 * pixels :].reshape(3, pixels).T
    changed = np.zeros(height * width, bool)
    place = 0
    while at < len(stream) - 3 * pixels:
        place += number()
        count = number()
        changed[place : place + count] = True
        place += count
    if key is not None:
        out = key.reshape(-1, 3).copy()
        out[changed] = colours
        return out.reshape(height, width, 3)
    out = np.zeros((height + 1, width, 3), np.uint8)  # a black row above the first
    new = np.zeros((height, width, 3), np.uint8)
    changed = changed.reshape(height, width)
    new[changed] = colours
    for row in range(height):
        out[row + 1] = np.where(changed[row][:, None], new[row], out[row])
    return out[1:]


def read_store(folder):
    """(catalogue, episodes, fingerprint): each episode is (frames, actions, columns)."""
    text = (Path(folder) / "catalogue.json").read_text()
    catalogue = json.loads(text)
    assert (catalogue["format"], catalogue["version"]) == ("lewm-store", 1)
    schema = catalogue["schema"]
    columns = sorted(schema["columns"].items(), key=lambda column: column[0].encode())
    numbers = struct.pack("<QQQ", schema["height"], schema["width"], schema["action_dim"])
    for name, width in columns:
        numbers += struct.pack("<Q", len(name.encode())) + name.encode() + struct.pack("<Q", width)
    start = re.search(r'"metadata"\s*:\s*', text).end()
    metadata = text[start : json.JSONDecoder().raw_decode(text, start)[1]]
    assert catalogue["crc32"] == zlib.crc32(numbers + metadata.encode())

    shards = [re.fullmatch(r"shard-(\d{6,})\.index", file.name) for file in Path(folder).iterdir()]
    episodes, digests = [], []
    for shard in sorted((match for match in shards if match), key=lambda match: int(match[1])):
        index = (Path(folder) / shard[0]).read_bytes()
        data = (Path(folder) / f"shard-{shard[1]}.data").read_bytes()
        length, crc = struct.unpack_from("<II", data, 8)
        assert data[:8] == b"LEWM-SH1"
        assert data[16 : 16 + length] == text.encode()
        assert crc == zlib.crc32(text.encode())
        for at in range(0, len(index) // 64 * 64, 64):
            record = index[at : at + 64]
            magic, schema_crc, count, offset, size, digest, table_crc, codec, chunk, crc = struct.unpack(
                "<8sIIQQQIHH12xI", record
            )
            assert (magic, schema_crc, codec) == (b"LEWM-EP1", zlib.crc32(numbers), 1)
            assert crc == zlib.crc32(record[:60])
            assert data[offset : offset + 64] == record
            blobs = count + math.ceil(count / chunk) + 1 + len(columns)
            table = data[offset + 64 : offset + 64 + 8 * blobs]
            assert zlib.crc32(table) == table_crc
            parts, place = [], offset + 64 + 8 * blobs
            for length, crc in struct.iter_unpack("<II", table):
                parts.append(data[place : place + length])
                assert zlib.crc32(parts[-1]) == crc
                place += length
            assert place == offset + size
            shape = schema["height"], schema["width"]
            keys = [picture(parts[first], *shape, None) for first in range(0, blobs - 1 - len(columns), chunk + 1)]
            frames = np.stack([picture(parts[i + i // chunk + 1], *shape, keys[i // chunk]) for i in range(count)])
            arrays = parts[len(parts) - 1 - len(columns) :]
            assert digest == fnv([count, *map(zlib.crc32, map(np.ndarray.tobytes, frames)), *map(zlib.crc32, arrays)])
            actions = np.frombuffer(arrays[0], "<f4").reshape(count - 1, schema["action_dim"])
            values = {
                n: np.frombuffer(a, "<f8").reshape(count, w) for (n, w), a in zip(columns, arrays[1:], strict=True)
            }
            episodes.append((frames, actions, values))
            digests.append(digest)
    return catalogue, episodes, f"{fnv([zlib.crc32(numbers), *digests]):016x}"
