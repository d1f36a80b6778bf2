"""Text of token streams: whole characters, and stop strings wherever the tokens are split."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from foveate.engine.common import TokenLogprob
from foveate.server.answer.logprobs import TokenTexts
from foveate.server.answer.text import Detokenizer, StopStrings, TextStream


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


def llama_tokenizer() -> Tokenizer:
    """SentencePiece's way: spaces as U+2581, unknown characters as bytes, the first space stripped."""
    pieces = ["<s>", "\u2581a", "\u2581b", "a", "b", "\u2581", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


BYTES, LLAMA = byte_tokenizer(), llama_tokenizer()
few = st.text(alphabet="abc", min_size=1, max_size=4)


def cut(text: str, stops: list[str]) -> str:
    """The definition: character by character, until some stop string is complete."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)]
    return text


@settings(max_examples=120, deadline=None)
@given(st.text(alphabet="abc", max_size=30), st.lists(few, min_size=1, max_size=4), st.data())
def test_stop_strings_do_not_depend_on_the_split(text: str, stops: list[str], data: st.DataObject) -> None:
    want = cut(text, stops)
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    stream = StopStrings(stops)
    sent = ""
    for start, end in zip([0, *places], [*places, len(text)], strict=True):
        sent += stream.push(text[start:end])
        assert want.startswith(sent), "nothing is sent that would have to be taken back"
    sent += stream.flush()
    assert sent == want and stream.stopped == (want != text or any(stop in text for stop in stops))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_pieces_joined_are_the_text(text: str) -> None:
    ids = BYTES.encode(text).ids
    stream = Detokenizer(TokenTexts(BYTES))
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == BYTES.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab é€", max_size=12), st.integers(0, 30))
def test_a_decoder_that_strips_the_first_space(text: str, n_tokens: int) -> None:
    ids = LLAMA.encode(text.replace(" ", "\u2581")).ids[:n_tokens]
    whole = b"".join(TokenTexts(LLAMA).raw(token) for token in ids).decode("utf-8", "ignore")
    stream = Detokenizer(TokenTexts(LLAMA))
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == whole.removeprefix(" ")
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_text_do_not_hold_the_stream_up() -> None:
    stream = Detokenizer(TokenTexts(BYTES))
    broken = [BYTES.token_to_id("ÿ")] * 40
    sent = "".join(stream.push(token) for token in broken)
    assert len(sent) >= 30 and set(sent) == {"\ufffd"}


def test_special_tokens_have_no_text() -> None:
    stream = TextStream(TokenTexts(BYTES), [], 0)
    text, n_read = stream.push([0, *BYTES.encode("ab").ids, 0])
    assert (text, n_read, stream.flush()) == ("ab", 4, "")


def test_stop_strings_across_tokens_and_characters() -> None:
    ids = BYTES.encode("größer als").ids
    for size in range(1, len(ids) + 1):
        stream = TextStream(TokenTexts(BYTES), ["ßer"], 0)
        text, n_read = "", 0
        for start in range(0, len(ids), size):
            new, n = stream.push(ids[start : start + size])
            text, n_read = text + new, n_read + n
            if stream.stopped:
                break
        assert text == "grö" and n_read == len("größer".encode()) and stream.flush() == ""


def test_a_stop_string_in_the_flushed_rest_counts() -> None:
    stream = TextStream(TokenTexts(BYTES), ["bc"], 0)
    assert stream.push(BYTES.encode("ab").ids)[0] == "a"
    assert stream.flush() == "b" and not stream.stopped


def test_bytes_of_tokens() -> None:
    for tokenizer, text in ((BYTES, "é a"), (LLAMA, "éab")):
        texts = TokenTexts(tokenizer)
        assert b"".join(texts.raw(token) for token in tokenizer.encode(text).ids) == text.encode()
    assert TokenTexts(BYTES).text(0) == "<s>" and TokenTexts(LLAMA).raw(1) == b" a"
    assert TokenTexts(BYTES).raw(10**6) == b""


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.inner, self.n_decoded = tokenizer, 0

    def id_to_token(self, token_id: int) -> str | None:
        return self.inner.id_to_token(token_id)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.n_decoded += len(ids)
        text: str = self.inner.decode(ids, skip_special_tokens=skip_special_tokens)
        return text


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA], ids=["bytes", "llama"])
@pytest.mark.parametrize(
    "repeated",
    ["<s>", "unknown", "\ufffd", b"\xe2", b"\xe2\x82", b"\x80", b"\xff", b"\xf0\x9f\x98", " ", "a", "\u20ac"],
    ids=repr,
)
def test_detokenizing_is_linear_whatever_tokens_come(tokenizer: Tokenizer, repeated: str | bytes) -> None:
    texts = TokenTexts(tokenizer)
    raws = {texts.raw(i): i for i in reversed(range(tokenizer.get_vocab_size()))}
    data = repeated.encode() if isinstance(repeated, str) else repeated
    if repeated in ("<s>", "unknown"):
        ids = [0 if repeated == "<s>" else 10**6]
    else:
        ids = [raws[data]] if data in raws else [raws[bytes([byte])] for byte in data]
    texts.tokenizer = counting = Counting(tokenizer)  # type: ignore[assignment]
    stream, n = Detokenizer(texts), 2000
    said = "".join([stream.push(token) for _ in range(n) for token in ids]) + stream.flush()
    assert counting.n_decoded <= 12 * n * len(ids)
    if isinstance(repeated, str):
        assert said == tokenizer.decode(ids * n, skip_special_tokens=True)


@given(st.lists(st.integers(0, 256), max_size=40))
def test_any_bytes_give_the_text_of_all_together(ids: list[int]) -> None:
    """Complete characters come at once, and U+FFFD of the answer itself is no incomplete character."""
    stream, sent = Detokenizer(TokenTexts(BYTES)), ""
    for number, token in enumerate(ids):
        sent += stream.push(token)
        whole = BYTES.decode(ids[: number + 1], skip_special_tokens=True)
        assert whole.startswith(sent) and len(whole) - len(sent) <= 3
    sent += stream.flush()
    assert BYTES.decode(ids, skip_special_tokens=True).rstrip("\ufffd") == sent.rstrip("\ufffd")


def test_a_replacement_character_of_the_answer_arrives_at_once() -> None:
    stream = Detokenizer(TokenTexts(BYTES))
    assert "".join(stream.push(token) for token in BYTES.encode("a\ufffd").ids) == "a\ufffd"


def test_offsets_of_a_long_completion_are_linear() -> None:
    texts = TokenTexts(BYTES)
    tokens = [TokenLogprob(token_id=BYTES.encode("a").ids[0], logprob=-1.0, top=[]) for _ in range(50_000)]
    started = time.perf_counter()
    offsets = texts.completion(tokens, 7).text_offset
    assert offsets == list(range(7, 50_007)) and time.perf_counter() - started < 3.0


def wordpiece() -> Tokenizer:
    pieces = ["[UNK]", "[CLS]", "a", "##b", ".", "##.", "é", "'", "##s", "n", "##'t", " ", "\ufffd"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def words(decoder: decoders.Decoder | None) -> Tokenizer:
    pieces = ["<pad>", "a", "b</w>", "|", "", "\u2581", "\u2581a", "\ufffd"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<pad>"))
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def bytes_in_a_sequence() -> Tokenizer:
    tokenizer = Tokenizer.from_str(BYTES.to_str())
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    tokenizer.add_tokens(["<tool>", "é€", "\ufffd", "Ġx"])
    return tokenizer


UNUSUAL = {
    "word pieces": wordpiece(),
    "no decoder": words(None),
    "metaspace": words(decoders.Metaspace()),
    "end of word": words(decoders.BPEDecoder()),
    "ctc": words(decoders.CTC()),
    "bytes in a sequence": bytes_in_a_sequence(),
}


@pytest.mark.parametrize("name", UNUSUAL)
@given(data=st.data())
def test_pieces_of_unusual_tokenizers_joined_are_the_text(name: str, data: st.DataObject) -> None:
    tokenizer = UNUSUAL[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 1), max_size=12))
    stream = Detokenizer(TokenTexts(tokenizer))
    pieces = [stream.push(token) for token in ids]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    said = "".join(pieces) + stream.flush()
    assert said == text or said.rstrip("\ufffd") == text.rstrip("\ufffd"), "all but an incomplete character at the end"


@given(st.text(max_size=12))
def test_byte_tokens_joined_are_the_text(text: str) -> None:
    """Only for sound UTF-8: `ByteFallback` makes U+FFFD of a whole run with a wrong byte, and a stream cannot wait."""
    ids = [LLAMA.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    stream = Detokenizer(TokenTexts(LLAMA))
    said = "".join([stream.push(token) for token in ids]) + stream.flush()
    assert said == text.removeprefix(" ") == LLAMA.decode(ids)
