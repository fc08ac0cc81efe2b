"""CLIP's byte-pair tokenizer (Radford et al. 2021; byte pairs: Sennrich et al. 2016)."""

import functools
import gzip
import heapq
import json
import logging
import re
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.tensors import read_json

LOGGER = logging.getLogger(__name__)

START, END = '<|startoftext|>', '<|endoftext|>'
WORD_END = '</w>'
ROLES = (
    ('start', 'bos_token', START),
    ('end', 'eos_token', END),
    ('unknown', 'unk_token', END),
    ('pad', 'pad_token', END),
)
"""Of markers: what they are for, their name in files, and which they are where files do not say."""
LENGTH = 77
NUM_MERGES = 49_152 - 256 - 2
"""As many of the 262,144 merges of its file does CLIP use: 49,408 tokens with 512 bytes and two markers."""
SMALL = Path(__file__).with_name('clip_merges_4000.txt')

MAX_LENGTH = 100_000
"""A longer model_max_length is how files say that there is no limit."""
MAX_MERGES_BYTES = 2**24
SHOWN = 300
"""Characters of what was cut from a prompt that a warning repeats."""
CACHED_WORDS, CACHED_CHARACTERS = 2**16, 64
"""How many words a tokenizer remembers the ids of, and how long they may be."""

_CONTRACTIONS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d")
_MARKERS = re.compile(r'(<\|)(startoftext|endoftext)(\|>)')
_RUNS = re.compile('L+|N|O+|S+')
_SPACES = re.compile('[\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+')
_NOT_SPACE = '\x1c\x1d\x1e\x1f'
"""Python counts these four as white space, Unicode and CLIP do not."""


def _byte_symbols() -> list[str]:
    """The printable characters that stand for the 256 bytes in vocabularies, in CLIP's order of bytes, as GPT-2's."""
    return [_symbol(byte) for byte in (*_PRINTABLE, *(byte for byte in range(256) if byte not in _PRINTABLE))]


_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))


@functools.cache
def _symbol(byte: int) -> str:
    if byte in _PRINTABLE:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in _PRINTABLE].index(byte))


_SYMBOLS = [_symbol(byte) for byte in range(256)]
_BYTES = {symbol: byte for byte, symbol in enumerate(_SYMBOLS)}


@functools.cache
def _kind(character: str) -> str:
    """L(etter), N(umber), S(pace) or O(ther)."""
    kind = unicodedata.category(character)[0]
    if kind in 'LN':
        return kind
    return 'S' if character.isspace() and character not in _NOT_SPACE else 'O'


def _well_formed(text: str) -> str:
    """Text without lone surrogates, which have no bytes: they become U+FFFD, and pairs of them one character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return text


def _normalized(text: str) -> str:
    """NFC, one space for many, and lower case by character: without Greek's final sigma, which `str.lower` knows."""
    text = _SPACES.sub(' ', unicodedata.normalize('NFC', text))
    return text.lower() if 'Σ' not in text else ''.join(map(str.lower, text))


def _shortened(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f'{text[:SHOWN]}...')


def _words(text: str) -> list[str]:
    r"""What `'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+` finds, and markers written out in three."""
    kinds = ''.join(map(_kind, text))
    words, at = [], 0
    while at < len(text):
        if kinds[at] == 'O' and (match := _MARKERS.match(text, at)):
            words += match.groups()
        elif kinds[at] == 'O' and (match := _CONTRACTIONS.match(text, at)):
            words.append(match[0])
        else:
            match = _RUNS.match(kinds, at)
            if kinds[at] != 'S':
                words.append(text[at : match.end()])
        at = match.end()
    return words


@dataclass(frozen=True)
class AddedToken:
    """A string that is one token wherever it stands, whatever surrounds it.

    Attributes:
      normalized: it is looked for, itself in lower case, in the text in lower case; else as it is in the text as it is.
      single_word: not inside of a word.
      special: `decode` leaves it out.
    """

    id: int
    normalized: bool = False
    single_word: bool = False
    special: bool = True


class _Added:
    """Finds those of `tokens` that are or are not normalized."""

    def __init__(self, tokens: Mapping[str, AddedToken], normalized: bool):
        self._ids = {}
        patterns = {}
        for content, token in tokens.items():
            if token.normalized == normalized:
                content = _normalized(content) if normalized else content
                self._ids[content] = token.id
                literal = re.escape(content)
                patterns[content] = rf'(?<!\w){literal}(?!\w)' if token.single_word else literal
        longest_first = sorted(patterns, key=len, reverse=True)
        either = '|'.join(patterns[content] for content in longest_first)
        self._pattern = re.compile(f'({either})') if patterns else None

    def split(self, text: str) -> Iterable[tuple[str, int | None]]:
        """(token, id) and (text between tokens, None), in their order."""
        if self._pattern is None:
            return [(text, None)]
        parts = self._pattern.split(text)
        return [(part, self._ids[part] if i % 2 else None) for i, part in enumerate(parts) if part]


class ClipTokenizer:
    """Text -> ids as transformers 5.23's CLIPTokenizer has them: NFC, lower case, words, byte pairs.

    As there, and unlike OpenAI's first code, HTML entities are not resolved and broken encodings not repaired (ftfy):
    '&amp;' is three words. Every string has ids; lone surrogates become U+FFFD.

    Where ids can differ: letters, numbers and capitals that Unicode got after Python's tables were made (14.0 in Python
    3.11) are symbols here; combining marks that it got from 10.0 on are brought into canonical order here, not there.

    Args:
      vocabulary: token -> id. Bytes are written as GPT-2 writes them; a word's last token ends in '</w>'.
      merges: pairs of tokens, the first to be merged first.
      start, end, pad: tokens around and after each text. An added token, hence one wherever a text contains it: with
        the pad '!', that Stable Diffusion 2 and the second encoder of XL have, each '!' of a prompt is padding's id.
      unknown: what a symbol outside of the vocabulary becomes.
      added: further tokens that are found before words are, and may have ids beyond the vocabulary's.
      length: ids per text where a call says no other.
      source: where all this is from, for errors.

    Attributes:
      length: as above.
      vocab_size: the greatest id + 1.
      start_id, end_id, pad_id: of the markers.

    Raises:
      UsageError: these do not make a tokenizer.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        start: str = START,
        end: str = END,
        pad: str = END,
        unknown: str = END,
        added: Mapping[str, AddedToken] | None = None,
        length: int = LENGTH,
        source: str = 'the vocabulary',
    ):
        self._source = source
        self._vocabulary = _checked_vocabulary(vocabulary, source)
        self._ranks = _checked_merges(merges, self._vocabulary, source)
        self._added = dict(added or {})
        self._markers = {'start': start, 'end': end, 'unknown': unknown}
        self._pad = pad
        self.length = _checked_length(length)
        self._finish()

    def _finish(self) -> None:
        tokens = {content: replace(token, id=self._id(content)) for content, token in self._added.items()}
        for role, content in (*self._markers.items(), ('pad', self._pad)):
            if not content or (content not in self._vocabulary and content not in self._added):
                raise UsageError(
                    f'the {role} token {content!r} is not in {self._source}: name one that is, as {END!r} or "!".'
                )
            tokens[content] = replace(tokens.get(content, AddedToken(self._id(content))), special=True)
        self.start_id, self.end_id = (self._id(self._markers[role]) for role in ('start', 'end'))
        self.pad_id = self._id(self._pad)
        self._unknown = self._markers['unknown']
        self._raw, self._normal = _Added(tokens, normalized=False), _Added(tokens, normalized=True)
        self._special = {token.id for token in tokens.values() if token.special}
        self._tokens = {id: token for token, id in self._vocabulary.items()}
        self._tokens |= {token.id: content for content, token in tokens.items()}
        self.vocab_size = max(self._tokens) + 1
        self._cache: dict[str, tuple[int, ...]] = {}

    def _id(self, token: str) -> int:
        return self._vocabulary[token] if token in self._vocabulary else self._added[token].id

    @classmethod
    def from_folder(cls, path: str | Path) -> 'ClipTokenizer':
        """The tokenizer in a folder of a published model, such as `tokenizer` or `tokenizer_2`.

        It holds tokenizer.json, or vocab.json and merges.txt; and mostly tokenizer_config.json, which says the length
        (model_max_length) and the pad token, special_tokens_map.json and added_tokens.json.

        Raises:
          UsageError: files are missing, damaged or of another kind of tokenizer.
        """
        folder = Path(path)
        whole, vocabulary, merges = (folder / name for name in ('tokenizer.json', 'vocab.json', 'merges.txt'))
        if not whole.is_file() and not (vocabulary.is_file() and merges.is_file()):
            raise UsageError(
                f'{folder} holds no CLIP tokenizer: that is a tokenizer.json, or a vocab.json with a merges.txt. '
                'Name the folder tokenizer (or tokenizer_2) of a model.'
            )
        config = _read_optional(folder / 'tokenizer_config.json')
        for key, only in (('padding_side', 'right'), ('truncation_side', 'right'), ('split_special_tokens', False)):
            if config.get(key, only) != only:
                raise UsageError(f'{folder / "tokenizer_config.json"}: {key} can only be {only}, not {config[key]!r}.')
        if whole.is_file():
            source = whole
            words, pairs, listed = _read_whole(whole)
        else:
            source = vocabulary
            words, pairs, listed = _read_json(vocabulary), _read_merges(merges), []

        if 'added_tokens_decoder' in config:
            where = folder / 'tokenizer_config.json'
            entries = config['added_tokens_decoder']
            if not isinstance(entries, dict):
                raise UsageError(f'added_tokens_decoder in {where} is no JSON object.')
            added = dict(_added_token(entry, id, where) for id, entry in entries.items())
        else:
            named = _read_optional(folder / 'special_tokens_map.json')
            config = config | named
            where = folder / 'added_tokens.json'
            markers = {_content(config.get(key), default, where) for _, key, default in ROLES}
            added = {
                content: AddedToken(_checked_id(id, where), normalized=content not in markers, special=False)
                for content, id in _read_optional(where).items()
            }
            for entry in listed:
                added |= [_added_token(entry, entry.get('id') if isinstance(entry, dict) else None, whole)]

        roles = {}
        seen: dict[str, AddedToken] = {}
        for role, key, default in ROLES:
            entry = config.get(key)
            content = roles[role] = _content(entry, default, folder / 'tokenizer_config.json')
            if content in words:
                flags = entry if isinstance(entry, dict) else {}
                seen[content] = AddedToken(0, flags.get('normalized') is True, flags.get('single_word') is True)
        added = {content: token for content, token in (seen | added).items() if content}
        if roles['pad'] in words and roles['pad'] not in (roles['start'], roles['end'], roles['unknown']):
            added.pop(roles['pad'], None)  # `with_pad` must be able to make it a word again
        length = config.get('model_max_length')
        sane = isinstance(length, int) and not isinstance(length, bool) and 2 <= length <= MAX_LENGTH
        return cls(words, pairs, **roles, added=added, length=length if sane else LENGTH, source=str(source))

    @classmethod
    def from_merges(cls, path: str | Path) -> 'ClipTokenizer':
        """The tokenizer that a file of merges alone makes: CLIP's bpe_simple_vocab_16e6.txt(.gz), or a merges.txt.

        Its vocabulary is laid out as CLIP lays it out: 256 bytes, the same at the end of a word, what each merge makes,
        start and end. Of more than 48,894 merges the rest is left out, as CLIP does.

        Raises:
          UsageError: the file is missing or damaged.
        """
        merges = _read_merges(Path(path))[:NUM_MERGES]
        symbols = _byte_symbols()
        made = [''.join(pair) for pair in merges]
        tokens = [*symbols, *(symbol + WORD_END for symbol in symbols), *made, START, END]
        return cls({token: id for id, token in enumerate(tokens)}, merges, source=str(path))

    @classmethod
    def small(cls) -> 'ClipTokenizer':
        """CLIP's first 4,000 merges, 4,514 tokens: for models trained here. Common English words are one token each."""
        return cls.from_merges(SMALL)

    def with_pad(self, token: str) -> 'ClipTokenizer':
        """The same with another pad token, which then is one wherever a text contains it; the old one is so no more.

        Raises:
          UsageError: it is not in the vocabulary.
        """
        other = object.__new__(ClipTokenizer)
        other.__dict__.update(self.__dict__, _pad=token)
        other._finish()
        return other

    def with_length(self, length: int) -> 'ClipTokenizer':
        """The same, for texts of that many tokens by default.

        Raises:
          UsageError: there is no room for a start and an end.
        """
        other = object.__new__(ClipTokenizer)
        other.__dict__.update(self.__dict__, length=_checked_length(length))
        return other

    def __call__(
        self, texts: Sequence[str] | str, length: int | None = None, warn: bool = True
    ) -> Int[np.ndarray, 'N L']:
        """Ids [N, length], int32: start, the text's, end, padding. What is too long is cut, and a warning logged.

        Args:
          texts: N texts, or one (N = 1).
          length: at least 2; the tokenizer's own by default.
          warn: of each text that is cut.

        Raises:
          UsageError: something is no text, or the length is too small.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = self.length if length is None else _checked_length(length)
        ids = np.full((len(texts), length), self.pad_id, np.int32)
        for row, text in zip(ids, texts, strict=True):
            if not isinstance(text, str):
                raise UsageError(f'a text to tokenize must be a str, got {type(text).__name__}: {text!r}.')
            found = self._encode(text)
            if warn and len(found) > length - 2:
                LOGGER.warning(
                    'a prompt is %d tokens long, of which the first %d are read. Cut off was: %s',
                    len(found),
                    length - 2,
                    _shortened(self.decode(found[length - 2 :])),
                )
            whole = [self.start_id, *found[: length - 2], self.end_id]
            row[: len(whole)] = whole
        return ids

    def decode(self, ids: Sequence[int] | Int[np.ndarray, 'L']) -> str:
        """The text of one row of ids, in lower case and with a space after each word; special tokens are left out.

        Raises:
          UsageError: an id is not in the vocabulary.
        """
        pieces = []
        for id in np.asarray(ids, dtype=np.int64).reshape(-1).tolist():
            if id not in self._tokens:
                raise UsageError(f'there is no token {id} in {self._source}: ids go from 0 to {self.vocab_size - 1}.')
            if id not in self._special:
                token = self._tokens[id]
                known = all(symbol in _BYTES for symbol in token)
                pieces.append(bytes(_BYTES[symbol] for symbol in token) if known else _well_formed(token).encode())
        return b''.join(pieces).decode(errors='replace').replace(WORD_END, ' ').strip()

    def pieces(self, text: str, length: int | None = None) -> list[str]:
        """What each of a text's ids stands for, from its start to its end and without the padding."""
        (ids,) = self(text, length, warn=False)
        end = 1 + int(np.argmax(ids[1:] == self.end_id))
        return [self._tokens[id].replace(WORD_END, '') for id in ids[: end + 1].tolist()]

    def save(self, folder: str | Path) -> None:
        """Writes vocab.json, merges.txt, special_tokens_map.json and tokenizer_config.json, for `from_folder`.

        transformers' CLIPTokenizer reads them, too.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        roles = self._markers | {'pad': self._pad}
        names = {key: roles[role] for role, key, _ in ROLES}
        config = {'tokenizer_class': 'CLIPTokenizer', 'model_max_length': self.length, **names}
        if self._added:
            contents = {**self._added, **{content: AddedToken(0) for content in names.values()}} | self._added
            config['added_tokens_decoder'] = {
                str(self._id(content)): {
                    'content': content,
                    'lstrip': False,
                    'normalized': token.normalized,
                    'rstrip': False,
                    'single_word': token.single_word,
                    'special': token.special,
                }
                for content, token in contents.items()
            }
        files = {'vocab.json': self._vocabulary, 'special_tokens_map.json': names, 'tokenizer_config.json': config}
        for name, value in files.items():
            (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding='utf-8')
        lines = ['#version: 0.2', *(' '.join(pair) for pair in sorted(self._ranks, key=self._ranks.get))]
        (folder / 'merges.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')

    def _encode(self, text: str) -> list[int]:
        """Ids of a text alone."""
        ids: list[int] = []
        for part, id in self._raw.split(_well_formed(text)):
            if id is not None:
                ids.append(id)
                continue
            for piece, id in self._normal.split(_normalized(part)):
                if id is not None:
                    ids.append(id)
                    continue
                for word in _words(piece):
                    ids += self._cache.get(word) or self._word(word)
        return ids

    def _word(self, word: str) -> tuple[int, ...]:
        symbols = [_SYMBOLS[byte] for byte in word.encode()]
        symbols[-1] += WORD_END
        known = [symbol if symbol in self._vocabulary else self._unknown for symbol in symbols]
        ids = tuple(map(self._id, self._merged(known)))
        if len(word) <= CACHED_CHARACTERS:
            if len(self._cache) >= CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = ids
        return ids

    def _merged(self, symbols: list[str]) -> list[str]:
        """Merges the neighbours of the lowest rank, the leftmost first, until none has one: n log n for n symbols."""
        count = len(symbols)
        left, right = list(range(-1, count - 1)), list(range(1, count + 1))
        waiting: list[tuple[int, int, tuple[str, str]]] = []

        def push(at: int) -> None:
            if at >= 0 and right[at] < count:
                pair = symbols[at], symbols[right[at]]
                if pair in self._ranks:
                    heapq.heappush(waiting, (self._ranks[pair], at, pair))

        for at in range(count):
            push(at)
        while waiting:
            _, at, pair = heapq.heappop(waiting)
            after = right[at]
            if after >= count or (symbols[at], symbols[after]) != pair:
                continue  # one of them was merged with another since
            symbols[at], symbols[after] = ''.join(pair), ''
            right[at] = right[after]
            if right[at] < count:
                left[right[at]] = at
            push(left[at])
            push(at)
        return [symbol for symbol in symbols if symbol]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except UsageError:
        raise
    except (ValueError, OSError) as error:  # numbers of thousands of digits, no permission
        raise UsageError(f'{path} cannot be read: {error}') from error


def _read_optional(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Pairs, one a line, plain or gzipped; a line with '#version' comes before them."""
    try:
        with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as file:
            content = file.read(MAX_MERGES_BYTES + 1)
        if len(content) > MAX_MERGES_BYTES:
            raise UsageError(f'{path} is no file of merges: it holds more than {MAX_MERGES_BYTES} bytes.')
        lines = content.decode().split('\n')
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UsageError(f'{path} is no file of merges, or is damaged: {error}') from error
    merges = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix('\r')
        if not line or (number == 1 and '#version' in line):
            continue
        pair = line.split(' ')
        if len(pair) != 2 or not all(pair):
            raise UsageError(f'{path}, line {number}: a merge is two tokens with a space between, not {line[:80]!r}.')
        merges.append((pair[0], pair[1]))
    return merges


def _read_whole(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[Any]]:
    """(vocabulary, merges, added tokens) of a tokenizer.json."""
    whole = _read_json(path)
    model = whole.get('model')
    if not isinstance(model, dict) or model.get('type', 'BPE') != 'BPE':
        kind = model.get('type') if isinstance(model, dict) else model
        raise UsageError(f'{path} is no CLIP tokenizer: its model is {str(kind)[:80]!r}, and that of CLIP is BPE.')
    if model.get('end_of_word_suffix', WORD_END) != WORD_END:
        suffix = model['end_of_word_suffix']
        raise UsageError(f'{path} is no CLIP tokenizer: its words end in {suffix!r}, and those of CLIP in {WORD_END}.')
    vocabulary, merges, listed = model.get('vocab'), model.get('merges'), whole.get('added_tokens', [])
    if not isinstance(vocabulary, dict) or not isinstance(merges, list) or not isinstance(listed, list):
        raise UsageError(f'{path} is damaged: it needs a vocab, a list of merges, and added_tokens as a list.')
    pairs = []
    for merge in merges:
        pair = merge.split(' ') if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise UsageError(f'{path} is damaged: a merge is two tokens, not {str(merge)[:80]!r}.')
        pairs.append((pair[0], pair[1]))
    return vocabulary, pairs, listed


def _content(entry: Any, default: str, path: Path) -> str:
    """Of a special token, which files have as a string or as an object."""
    if entry is None:
        return default
    content = entry.get('content') if isinstance(entry, dict) else entry
    if not isinstance(content, str):
        raise UsageError(f'{path} is damaged: a special token is a string or has a content, not {str(entry)[:80]!r}.')
    return content


def _added_token(entry: Any, id: Any, path: Path) -> tuple[str, AddedToken]:
    if not isinstance(entry, dict) or not isinstance(entry.get('content'), str):
        raise UsageError(f'{path} is damaged: an added token is an object with its content, not {str(entry)[:80]!r}.')
    if isinstance(id, str) and re.fullmatch('[0-9]{1,10}', id):
        id = int(id)
    flags = {key: entry.get(key) is True for key in ('normalized', 'single_word', 'special')}
    return entry['content'], AddedToken(_checked_id(id, path), **flags)


def _checked_id(id: Any, source: Any) -> int:
    if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < 2**31 - 1:
        raise UsageError(f'{source} is damaged: ids are integers from 0 to 2^31 - 2, not {str(id)[:80]!r}.')
    return id


def _checked_vocabulary(vocabulary: Mapping[str, int], source: str) -> dict[str, int]:
    vocabulary = dict(vocabulary)
    for id in vocabulary.values():
        _checked_id(id, source)
    if len(set(vocabulary.values())) != len(vocabulary):
        raise UsageError(f'{source} is damaged: two tokens of its vocabulary have the same id.')
    return vocabulary


def _checked_merges(
    merges: Sequence[tuple[str, str]], vocabulary: Mapping[str, int], source: str
) -> dict[tuple[str, str], int]:
    for pair in merges:
        for token in (*pair, ''.join(pair)):
            if token not in vocabulary:
                raise UsageError(
                    f'the merges beside or in {source} do not fit its vocabulary: {token!r}, of the merge '
                    f'{" ".join(pair)!r}, is not in it. They are of two tokenizers, or one of them is damaged.'
                )
    return {pair: rank for rank, pair in enumerate(merges)}


def _checked_length(length: int) -> int:
    if not isinstance(length, int | np.integer) or length < 2:
        raise UsageError(f'a text needs a length of at least 2, for start and end, got {length!r}.')
    return int(length)
