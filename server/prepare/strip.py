"""What decoding and orienting need of an encoded picture, and nothing else of the file.

Files carry profiles, texts, previews and comments that nobody here reads, but for which a decoder spends memory and
time, or refuses the file: Pillow inflates every text of a PNG, joins segments of a JPEG in quadratic time, and keeps a
copy of whatever each entry of an EXIF directory points at. So they are dropped before the decoder. All functions are
linear in the file's bytes and allocate no more than a copy of it.
"""

import contextlib
import re
import struct
import zlib
from dataclasses import dataclass

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_TEXT_BYTES = 2**20  # of a text that may hold the orientation, inflated
_GREY, _RGB, _PALETTE = 0, 2, 3  # colour types of a PNG
_ORIENTATION = 0x0112  # tag of EXIF
_UPRIGHT = 1
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_XMP_PNG, _EXIF_PNG = b"XML:com.adobe.xmp", b"Raw profile type exif"  # keywords of texts
_SEGMENT = re.compile(rb"\xff([\x02-\xcf\xda-\xfe])")  # of a JPEG; others are filling, or have no length
_EXIF_JPEG, _XMP_JPEG = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


@dataclass(slots=True)
class Stripped:
    """An encoded picture without its ballast."""

    data: bytes = b""
    orientation: int = _UPRIGHT  # 1 to 8, as in EXIF
    # The transparent colour of a PNG of 16 bits, one level or three. The decoder gives 8 bits and would mistake others.
    key: tuple[int, ...] = ()
    n_scans: int = 1  # of a JPEG: passes over its pixels
    held_bytes: int = 0  # of a JPEG in several scans: coefficients that are in memory together


def read_orientation(exif: bytes, xmp: bytes = b"") -> int:
    """Return the orientation, 1 to 8, of EXIF bytes, or else of XMP. Unreadable data leaves a picture as it is.

    Own code, because Pillow copies everything that the entries point at: 64 kB of EXIF can take 350 MB.
    """
    tiff = exif.removeprefix(_EXIF_JPEG)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    with contextlib.suppress(struct.error):  # cut off: as without
        if order is not None:
            (start,) = struct.unpack_from(f"{order}I", tiff, 4)
            (n_entries,) = struct.unpack_from(f"{order}H", tiff, start)
            for at in range(start + 2, start + 2 + 12 * n_entries, 12):
                tag, kind = struct.unpack_from(f"{order}HH", tiff, at)
                if tag == _ORIENTATION:
                    (value,) = struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", tiff, at + 8)
                    return int(value) if 1 <= value <= 8 else _UPRIGHT
    found = _XMP_ORIENTATION.search(xmp)
    return _UPRIGHT if found is None else int(found[1])


def strip_png(encoded: bytes) -> Stripped:
    """Keep the header, the palette, the transparency and the pixels of a PNG, of an animated one the still picture.

    As in browsers, an ancillary chunk with a wrong checksum counts as absent. All pixels end up in one chunk, because
    Pillow takes a microsecond for each.
    """
    header, pixels, kept, texts = b"", bytearray(), dict[bytes, bytes](), dict[bytes, bytes]()
    at = len(PNG_MAGIC)
    while at + 8 <= len(encoded):
        length, name = struct.unpack_from(">I4s", encoded, at)
        body = slice(at + 8, at + 8 + length)
        at = body.stop + 4
        if name == b"IDAT":
            pixels += memoryview(encoded)[body]
        elif name == b"IHDR" and not header:
            header = encoded[body.start - 8 : at]  # with its checksum, which the decoder checks
        elif name == b"PLTE" and name not in kept:
            kept[name] = encoded[body.start - 8 : at]
        elif name in (b"tRNS", b"eXIf") and name not in kept and _is_intact(encoded, name, body):
            kept[name] = encoded[body]
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            _keep_text(texts, name, encoded, body)
        elif name == b"IEND":
            break
    exif = kept.get(b"eXIf") or _hex_profile(texts.get(_EXIF_PNG, b""))
    key, transparency = _transparency(header, kept.get(b"tRNS"))
    parts = [PNG_MAGIC, header]
    if header[17:18] == bytes((_PALETTE,)):  # elsewhere a palette is a suggestion
        parts.append(kept.get(b"PLTE", b""))
    parts += [transparency, _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")]
    return Stripped(b"".join(parts), read_orientation(exif, texts.get(_XMP_PNG, b"")), key)


def _is_intact(encoded: bytes, name: bytes, body: slice) -> bool:
    checksum = zlib.crc32(memoryview(encoded)[body], zlib.crc32(name))
    return encoded[body.stop : body.stop + 4] == checksum.to_bytes(4)


def _chunk(name: bytes, body: bytes | bytearray) -> bytes:
    return b"".join((struct.pack(">I4s", len(body), name), body, struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))))


def _transparency(header: bytes, body: bytes | None) -> tuple[tuple[int, ...], bytes]:
    """Return the transparent colour of a PNG of 16 bits, or the chunk for the decoder; both empty if there is none.

    Pillow compares a level of a grey PNG of 2 or 4 bits with the level of 8 bits that it decodes to, hence the factor.
    """
    if body is None or len(header) < 21:
        return (), b""
    bits, kind = header[16], header[17]
    if kind == _PALETTE:
        return (), _chunk(b"tRNS", body[:256])
    n_levels = {_GREY: 1, _RGB: 3}.get(kind, 0)
    if not n_levels or len(body) < 2 * n_levels:
        return (), b""
    most = 2**bits - 1
    levels = [level & most for level in struct.unpack_from(f">{n_levels}H", body)]
    if bits == 16:
        return tuple(levels), b""
    scale = 255 // most if 1 < bits < 8 else 1
    return (), _chunk(b"tRNS", struct.pack(f">{n_levels}H", *(level * scale for level in levels)))


def _keep_text(texts: dict[bytes, bytes], name: bytes, encoded: bytes, body: slice) -> None:
    """Keep the first text of each of the two keywords that may hold an orientation, unless inflated it is too long."""
    keyword, _, text = encoded[body.start : min(body.start + 80, body.stop)].partition(b"\0")
    if keyword not in (_XMP_PNG, _EXIF_PNG) or keyword in texts:
        return
    text = encoded[body.start + len(keyword) + 1 : min(body.stop, body.start + 2 * _TEXT_BYTES)]
    is_packed = name == b"zTXt"
    if name == b"iTXt":
        is_packed, text = text[:1] == b"\1", text[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif is_packed:
        text = text[1:]
    texts[keyword] = _inflated(text) if is_packed else text


def _inflated(packed: bytes) -> bytes:
    """Inflate up to a limit; what lies beyond the limit, or behind an error, is not there."""
    try:
        return zlib.decompressobj().decompress(packed, _TEXT_BYTES)
    except zlib.error:
        return b""


def _hex_profile(text: bytes) -> bytes:
    """Return the EXIF bytes that ImageMagick writes into a text: three lines of heading, then hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def strip_jpeg(encoded: bytes) -> Stripped:
    """Keep the tables, the frame and the scans of a JPEG, and the two segments that say how its colours are coded."""
    parts, exif, xmp = [b"\xff\xd8"], b"", b""
    stripped = Stripped()
    frame, at = b"", 2
    while found := _SEGMENT.search(encoded, at):
        marker, at = found[1], found.start()
        length = int.from_bytes(encoded[at + 2 : at + 4])
        body = encoded[at + 4 : at + 2 + length]
        if marker == b"\xda":  # the first scan: its data follows, then other scans and tables
            stripped.n_scans = _n_scans(encoded, at)
            stripped.held_bytes = _held_bytes(frame, body)
            parts.append(encoded[at:])
            break
        if marker == b"\xe1":
            exif = exif or (body if body.startswith(_EXIF_JPEG) else b"")
            xmp = xmp or (body if body.startswith(_XMP_JPEG) else b"")
        elif not b"\xe0" <= marker <= b"\xef" and marker != b"\xfe" or _codes_colour(marker, body):
            parts.append(encoded[at : at + 2 + length])
        if b"\xc0" <= marker <= b"\xcf" and marker not in b"\xc4\xc8\xcc":
            frame = marker + body
        at += 2 + max(length, 2)
    stripped.data = b"".join(parts)
    stripped.orientation = read_orientation(exif, xmp)
    return stripped


def _codes_colour(marker: bytes, body: bytes) -> bool:
    return (marker == b"\xe0" and body.startswith(b"JFIF")) or (marker == b"\xee" and body.startswith(b"Adobe"))


def _n_scans(encoded: bytes, first: int) -> int:
    """Count the scans up to the end of the picture. The bytes of a scan hold no marker; those of a table hardly do."""
    end = encoded.find(b"\xff\xd9", first)
    return encoded.count(b"\xff\xda", first, end if end >= 0 else len(encoded))


def _held_bytes(frame: bytes, scan: bytes) -> int:
    """Bytes of coefficients that the decoder holds: two for each sample, unless one scan holds all components."""
    if len(frame) < 7 or not scan:
        return 0
    n_components = frame[6]
    is_progressive = frame[0] & 3 == 2
    if not is_progressive and scan[0] == n_components:
        return 0
    height, width = struct.unpack_from(">HH", frame, 2)
    factors = [(f >> 4, f & 15) for f in frame[8 : 7 + 3 * n_components : 3]]
    across, down = (max((max(1, pair[i]) for pair in factors), default=1) for i in (0, 1))
    shares = sum(max(1, x) * max(1, y) for x, y in factors) / (across * down)
    return int(2 * height * width * shares)
