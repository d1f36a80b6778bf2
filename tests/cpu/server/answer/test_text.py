"""Text of token streams: whole characters, and stop strings wherever the tokens are split."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

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
    stream = Detokenizer(BYTES)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == BYTES.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab é€", max_size=12), st.integers(0, 30))
def test_a_decoder_that_strips_the_first_space(text: str, n_tokens: int) -> None:
    ids = LLAMA.encode(text.replace(" ", "\u2581")).ids[:n_tokens]
    whole = b"".join(TokenTexts(LLAMA).raw(token) for token in ids).decode("utf-8", "ignore")
    stream = Detokenizer(LLAMA)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == whole.removeprefix(" ")
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_text_do_not_hold_the_stream_up() -> None:
    stream = Detokenizer(BYTES)
    broken = [BYTES.token_to_id("ÿ")] * 40
    sent = "".join(stream.push(token) for token in broken)
    assert len(sent) >= 30 and set(sent) == {"\ufffd"}


def test_special_tokens_have_no_text() -> None:
    stream = TextStream(BYTES, [], 0)
    text, n_read = stream.push([0, *BYTES.encode("ab").ids, 0])
    assert (text, n_read, stream.flush()) == ("ab", 4, "")


def test_stop_strings_across_tokens_and_characters() -> None:
    ids = BYTES.encode("größer als").ids
    for size in range(1, len(ids) + 1):
        stream = TextStream(BYTES, ["ßer"], 0)
        text, n_read = "", 0
        for start in range(0, len(ids), size):
            new, n = stream.push(ids[start : start + size])
            text, n_read = text + new, n_read + n
            if stream.stopped:
                break
        assert text == "grö" and n_read == len("größer".encode()) and stream.flush() == ""


def test_a_stop_string_in_the_flushed_rest_counts() -> None:
    stream = TextStream(BYTES, ["bc"], 0)
    assert stream.push(BYTES.encode("ab").ids)[0] == "a"
    assert stream.flush() == "b" and not stream.stopped


def test_bytes_of_tokens() -> None:
    for tokenizer, text in ((BYTES, "é a"), (LLAMA, "éab")):
        texts = TokenTexts(tokenizer)
        assert b"".join(texts.raw(token) for token in tokenizer.encode(text).ids) == text.encode()
    assert TokenTexts(BYTES).text(0) == "<s>" and TokenTexts(LLAMA).raw(1) == b" a"
    assert TokenTexts(BYTES).raw(10**6) == b""
