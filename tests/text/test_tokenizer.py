"""CLIP's tokenizer against ids of transformers' (fixtures/interop/make_text.py), and against damaged files."""

import gzip
import json
import logging
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from diffusion_jax.errors import UsageError
from diffusion_jax.text import ClipTokenizer
from diffusion_jax.text.tokenizer import SMALL

FIXTURE = json.loads((Path(__file__).parents[1] / 'fixtures/interop/text/tokens.json').read_text())
LONGEST = 2 + max(map(len, FIXTURE['ids']))


@pytest.fixture(scope='module')
def small():
    return ClipTokenizer.small()


@pytest.fixture(scope='module')
def saved(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizer')
    small.save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A tokenizer's folder to be changed."""
    return Path(shutil.copytree(saved, tmp_path / 'tokenizer'))


def change(path: Path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def as_one_file(folder: Path, pairs: bool) -> None:
    """Replaces vocab.json and merges.txt by a tokenizer.json, its merges as pairs (new) or as strings (old)."""
    merges = (folder / 'merges.txt').read_text().split('\n')[1:-1]
    model = {'type': 'BPE', 'end_of_word_suffix': '</w>', 'vocab': json.loads((folder / 'vocab.json').read_text())}
    model['merges'] = [line.split(' ') for line in merges] if pairs else merges
    flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
    added = [{'id': 4512, 'content': '<|startoftext|>', **flags}, {'id': 4513, 'content': '<|endoftext|>', **flags}]
    (folder / 'tokenizer.json').write_text(json.dumps({'version': '1.0', 'added_tokens': added, 'model': model}))
    for name in ('vocab.json', 'merges.txt', 'special_tokens_map.json'):
        (folder / name).unlink()


def check_ids(tokenizer, texts, wanted):
    for text, row, ids in zip(texts, tokenizer(texts, LONGEST), wanted, strict=True):
        assert row[: len(ids)].tolist() == ids, text[:80]
        assert (row[len(ids) :] == tokenizer.pad_id).all()


def test_ids_are_those_of_transformers(small):
    check_ids(small, FIXTURE['texts'], FIXTURE['ids'])
    assert len(FIXTURE['texts']) == 500


def test_ids_with_an_exclamation_mark_as_padding(small):
    wanted = [other or ids for other, ids in zip(FIXTURE['ids_pad'], FIXTURE['ids'], strict=True)]
    padded = small.with_pad('!')
    check_ids(padded, FIXTURE['texts'], wanted)
    assert padded.pad_id == 0
    check_ids(padded.with_pad('<|endoftext|>'), FIXTURE['texts'], FIXTURE['ids'])
    check_ids(small, ['hi!'], [small('hi!')[0, :4].tolist()])
    assert small.pad_id == small.end_id  # the copy left it as it was


def test_decoding_is_that_of_transformers(small):
    assert [small.decode(ids) for ids in FIXTURE['ids']] == FIXTURE['decoded']


def test_layout_of_the_small_vocabulary(small):
    assert (small.vocab_size, small.start_id, small.end_id, small.pad_id) == (4514, 4512, 4513, 4513)
    assert small.length == 77
    ids = small(['a photo of a cat', ''])
    assert ids.shape == (2, 77)
    assert ids.dtype == np.int32
    assert ids[1].tolist() == [4512] + [4513] * 76
    assert small('a', 5).tolist() == [[4512, ord('a') - 33 + 256, 4513, 4513, 4513]]
    assert small([]).shape == (0, 77)


def test_whole_file_of_merges(small, tmp_path):
    """OpenAI's file is gzipped, begins with its name, and has more merges than CLIP uses."""
    path = tmp_path / 'merges.txt.gz'
    text = SMALL.read_text(encoding='utf-8')
    path.write_bytes(gzip.compress(('"bpe_simple_vocab_16e6.txt' + text).encode()))
    assert (ClipTokenizer.from_merges(path)(FIXTURE['texts']) == small(FIXTURE['texts'])).all()


@pytest.mark.parametrize('form', ['vocabulary', 'pairs', 'strings'])
def test_forms_of_folders(folder, form):
    if form != 'vocabulary':
        as_one_file(folder, pairs=form == 'pairs')
    tokenizer = ClipTokenizer.from_folder(folder)
    check_ids(tokenizer, FIXTURE['texts'], FIXTURE['ids'])
    assert tokenizer.length == 77


@pytest.mark.parametrize('whole', [False, True])
def test_pad_token_of_a_folder(folder, whole):
    if whole:
        as_one_file(folder, pairs=True)
        path = folder / 'tokenizer.json'
        added = json.loads(path.read_text())['added_tokens']
        change(path, added_tokens=[{'id': 0, 'content': '!', 'normalized': False, 'special': True}, *added])
    else:
        change(folder / 'special_tokens_map.json', pad_token='!')
    change(folder / 'tokenizer_config.json', pad_token='!')
    tokenizer = ClipTokenizer.from_folder(folder)
    wanted = [other or ids for other, ids in zip(FIXTURE['ids_pad'], FIXTURE['ids'], strict=True)]
    check_ids(tokenizer, FIXTURE['texts'], wanted)
    check_ids(tokenizer.with_pad('<|endoftext|>'), FIXTURE['texts'], FIXTURE['ids'])


def test_old_form_of_markers(folder):
    """Stable Diffusion 1's files: markers are objects, and looked for in lower case, but for the end, which pads."""
    flags = {'lstrip': False, 'normalized': True, 'rstrip': False, 'single_word': False}
    start, end = {**flags, 'content': '<|startoftext|>'}, {**flags, 'content': '<|endoftext|>'}
    change(folder / 'special_tokens_map.json', bos_token=start, eos_token=end, unk_token=end, pad_token='<|endoftext|>')
    tokenizer = ClipTokenizer.from_folder(folder)
    ids = tokenizer('<|STARTOFTEXT|><|endoftext|>', 5)[0].tolist()
    assert ids == [4512, 4512, 4513, 4513, 4513]
    assert tokenizer('<|ENDOFTEXT|>', 5)[0].tolist()[1] != 4513


def test_added_tokens(folder):
    added = FIXTURE['added']
    change(folder / 'tokenizer_config.json', **added['config'])
    tokenizer = ClipTokenizer.from_folder(folder)
    check_ids(tokenizer, added['texts'], added['ids'])
    assert tokenizer.vocab_size == 4519
    assert tokenizer.decode(tokenizer('a <Cat-Toy> zorb')[0]) == 'a <Cat-Toy>zorb'
    again = folder.parent / 'again'
    tokenizer.save(again)
    check_ids(ClipTokenizer.from_folder(again), added['texts'], added['ids'])


def test_added_tokens_in_a_file_of_their_own(folder):
    (folder / 'added_tokens.json').write_text(json.dumps({'<Cat-Toy>': 4514}))
    tokenizer = ClipTokenizer.from_folder(folder)
    assert tokenizer('a <cat-TOY>!', 5)[0].tolist() == [4512, 320, 4514, 256, 4513]


@pytest.mark.parametrize(('said', 'length'), [(12, 12), (1e30, 77), (None, 77), (True, 77), (0, 77), ('9', 77)])
def test_length_of_a_folder(folder, said, length):
    change(folder / 'tokenizer_config.json', model_max_length=said)
    assert ClipTokenizer.from_folder(folder).length == length


def test_truncation_says_what_it_cuts(small, caplog):
    with caplog.at_level(logging.WARNING):
        ids = small(['one two three four five', 'one'], 5)
    assert ids.tolist() == [
        [4512, *small('one two three', 5)[0, 1:4], 4513],
        [4512, small('one')[0, 1], 4513, 4513, 4513],
    ]
    (record,) = caplog.records
    assert "'four five'" in record.getMessage()
    assert '5 tokens long' in record.getMessage()
    caplog.clear()
    small('one two three', 5)
    assert not caplog.records


@pytest.mark.parametrize(
    'text',
    [
        '',
        'a' * 10_000,
        '!' * 10_000,
        '\u0301' * 10_000,
        '漢' * 10_000,
        ' ' * 10_000,
        '\ud800',
        'a\udfff\x00b',
        '\ud83d\ude00',
    ],
    ids=['empty', 'word', 'symbols', 'combining', 'chinese', 'spaces', 'surrogate', 'surrogate and NUL', 'pair'],
)
def test_any_string_has_ids(small, text):
    start = time.monotonic()
    ids = small.with_pad('!')(text, 50_000)
    assert time.monotonic() - start < 5
    assert ids.min() >= 0
    assert ids.max() < small.vocab_size
    small.decode(ids[0])


def test_surrogates(small):
    assert (small('a\ud800b', 30) == small('a\ufffdb', 30)).all()
    assert (small('\ud83d\ude00', 30) == small('😀', 30)).all()


def test_many_prompts_are_fast(small):
    prompts = [f'a photo of a cat number {i}, in the style of a fox' for i in range(10_000)]
    start = time.monotonic()
    assert small(prompts).shape == (10_000, 77)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize('texts', [[1], [None], [b'bytes'], ['a', ['b']]])
def test_what_is_no_text(small, texts):
    with pytest.raises(UsageError, match='must be a str'):
        small(texts)


@pytest.mark.parametrize('length', [1, 0, -3, 2.5])
def test_lengths_that_cannot_be(small, length):
    with pytest.raises(UsageError, match='at least 2'):
        small('a', length)


def test_ids_that_are_none(small):
    with pytest.raises(UsageError, match='no token 4514'):
        small.decode([320, 4514])


def test_a_pad_token_that_is_none(small):
    with pytest.raises(UsageError, match=r"pad token '\[PAD\]'"):
        small.with_pad('[PAD]')


def test_symbols_outside_of_the_vocabulary(folder):
    """Tiny models of tests have no tokens for most bytes."""
    (folder / 'vocab.json').write_text(
        json.dumps({'l': 0, 'o': 1, 'lo</w>': 2, 'o</w>': 3, '<|startoftext|>': 4, '<|endoftext|>': 5})
    )
    (folder / 'merges.txt').write_text('l o</w>\n')
    assert ClipTokenizer.from_folder(folder)('lo ox', 7)[0].tolist() == [4, 2, 1, 5, 5, 5, 5]


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UsageError, match=r'tokenizer\.json.*vocab\.json'):
        ClipTokenizer.from_folder(tmp_path / 'none')
    (tmp_path / 'vocab.json').write_text('{}')
    with pytest.raises(UsageError, match=r'merges\.txt'):
        ClipTokenizer.from_folder(tmp_path)
    with pytest.raises(UsageError, match='no_merges'):
        ClipTokenizer.from_merges(tmp_path / 'no_merges')


@pytest.mark.parametrize(
    ('name', 'content', 'cause'),
    [
        ('vocab.json', b'{"a": ', 'no JSON'),
        ('vocab.json', b'[]', 'no JSON object'),
        ('vocab.json', b'\xff\xfe', 'no JSON'),
        ('vocab.json', b'[' * 100_000, 'no JSON'),
        ('vocab.json', b'{"a": ' + b'1' * 5000 + b'}', 'vocab.json'),
        ('vocab.json', b'{}', 'not in|do not fit'),
        ('vocab.json', b'{"a": -1}', 'ids are integers'),
        ('vocab.json', b'{"a": "1"}', 'ids are integers'),
        ('vocab.json', b'{"a": true}', 'ids are integers'),
        ('vocab.json', b'{"a": 1e3}', 'ids are integers'),
        ('vocab.json', b'{"a": 9999999999}', 'ids are integers'),
        ('vocab.json', b'{"a": 1, "b": 1}', 'same id'),
        ('merges.txt', b'#version: 0.2\na\n', 'line 2'),
        ('merges.txt', b'i n\nt h e\n', 'line 2'),
        ('merges.txt', b'i n\n t\n', 'line 2'),
        ('merges.txt', b'zq qz\n', 'do not fit'),
        ('merges.txt', b'\xff\xfe\n', 'damaged'),
        ('special_tokens_map.json', b'{"pad_token": 3}', 'special token'),
        ('special_tokens_map.json', b'{"pad_token": {}}', 'special token'),
        ('tokenizer_config.json', b'{"padding_side": "left"}', 'padding_side'),
        ('tokenizer_config.json', b'{"added_tokens_decoder": []}', 'added_tokens_decoder'),
        ('tokenizer_config.json', b'{"added_tokens_decoder": {"x": {"content": "y"}}}', 'ids are integers'),
        ('tokenizer_config.json', b'{"added_tokens_decoder": {"1": "y"}}', 'added token'),
        ('special_tokens_map.json', b'{"pad_token": "[PAD]"}', 'pad token'),
        ('special_tokens_map.json', b'{"bos_token": ""}', 'start token'),
        ('special_tokens_map.json', b'nonsense', 'no JSON'),
        ('added_tokens.json', b'{"x": "y"}', 'ids are integers'),
        ('tokenizer.json', b'{}', 'BPE'),
        ('tokenizer.json', b'{"model": {"type": "Unigram"}}', 'Unigram'),
        ('tokenizer.json', b'{"model": {"type": "BPE", "end_of_word_suffix": ""}}', 'no CLIP tokenizer'),
        ('tokenizer.json', b'{"model": {"type": "BPE", "vocab": [], "merges": []}}', 'damaged'),
        ('tokenizer.json', b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a"]]}}', 'two tokens'),
        ('tokenizer.json', b'{"model": {"type": "BPE", "vocab": {}, "merges": [[1, 2]]}}', 'two tokens'),
        (
            'tokenizer.json',
            b'{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [1]}',
            'added token',
        ),
    ],
)
def test_damaged_files(folder, name, content, cause):
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=cause) as caught:
        ClipTokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_file_that_never_ends(folder):
    (folder / 'merges.txt').write_bytes(b'a b\n' * 2**22 + b'a')
    with pytest.raises(UsageError, match='more than'):
        ClipTokenizer.from_folder(folder)


def test_a_damaged_gzip(tmp_path):
    path = tmp_path / 'merges.txt.gz'
    path.write_bytes(gzip.compress(b'i n\n' * 1000)[:20])
    with pytest.raises(UsageError, match='damaged'):
        ClipTokenizer.from_merges(path)
