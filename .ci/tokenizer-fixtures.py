"""Writes what the reference libraries make of 10,000 strings into a folder: with vocabularies that it trains, and with
those of Mistral and Llama 3, which are in Python packages.

    python3 .ci/tokenizer-fixtures.py FOLDER

Needs the packages `sentencepiece`, `tokenizers`, `tiktoken`, `mistral-common` and `llama-models`; of the last two, only
their data. `examples/inference/tests/tokenizers.rs` compares.
"""

import base64
import importlib.util
import io
import json
import random
import sys
import sysconfig
import unicodedata
from pathlib import Path

import sentencepiece
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

STRINGS = 10_000
CONTROL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<s>", "</s>", "[INST]", "<start_of_turn>"]
USER_DEFINED = ["<tab>", "<tool_call>", "\n\n"]
# Ranges of letters, marks, digits and signs of many scripts.
SCRIPTS = [
    (0x20, 0x7E), (0xA0, 0xFF), (0x100, 0x17F), (0x250, 0x2AF), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF),
    (0x531, 0x556), (0x5D0, 0x5EA), (0x620, 0x669), (0x900, 0x97F), (0x980, 0x9FB), (0xE01, 0xE3A), (0xE40, 0xE5B),
    (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x2070, 0x209C), (0x20A0, 0x20BF),
    (0x2150, 0x2189), (0x2190, 0x21FF), (0x2460, 0x24FF), (0x2581, 0x2590), (0x3040, 0x30FF), (0x4E00, 0x4FFF),
    (0xAC00, 0xACFF), (0xFB00, 0xFB06), (0xFF00, 0xFFEF), (0x10330, 0x1034A), (0x1D400, 0x1D433), (0x1F300, 0x1F5FF),
    (0x1F600, 0x1F64F), (0x1F900, 0x1F9FF), (0x20000, 0x20020),
]
EMOJI = ["👨\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "👍🏽", "🇫🇷", "❤️", "1️⃣", "😀"]
ODD = ["\0", "\x01", "\x1b[0m", "\x7f", "\x85", "\u00a0", "\u200b", "\u2028", "\u3000", "\ufeff", "\ufffd", "\ufdd0", "▁"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}" + REST
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SUFFIX}|\p{{N}}{{1,3}}" + REST
)
# The name of the words, the regular expression, whether merges are ignored, whether text is composed.
BYTE_LEVEL = [
    ("gpt-2", None, False, False),
    ("smollm", "digits", False, False),
    ("llama-bpe", LLAMA3, True, False),
    ("dbrx", LLAMA3, False, False),
    ("qwen2", LLAMA3.replace("{1,3}", ""), False, True),
    ("tekken", TEKKEN, True, False),
    ("gpt-4o", GPT4O, False, False),
]


def corpus():
    """The sources of Python's own library, and words of many scripts."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    lines = []
    for name in ["argparse.py", "datetime.py", "typing.py", "tarfile.py", "ast.py", "inspect.py", "subprocess.py"]:
        lines += (folder / name).read_text().splitlines()
    words = random.Random(1)
    for _ in range(4_000):
        lines.append(" ".join(word(words) for _ in range(6)))
    return lines


def word(words):
    low, high = words.choice(SCRIPTS)
    # Few letters of each script, so that pairs are frequent.
    letters = [chr(low + words.randrange(min(high - low + 1, 12))) for _ in range(words.randrange(1, 7))]
    return "".join(letter for letter in letters if unicodedata.category(letter) != "Cn")


def strings(lines):
    choice = random.Random(2)
    parts = [
        lambda: " ".join(choice.choice(lines).split()[: choice.randrange(1, 8)]),
        lambda: choice.choice(lines)[: choice.randrange(1, 60)],
        lambda: word(choice),
        lambda: chr(choice.choice([c for c in (choice.randrange(0x20, 0xD800), choice.randrange(0xE000, 0x30000))])),
        lambda: choice.choice(EMOJI),
        lambda: choice.choice(ODD),
        lambda: choice.choice(CONTROL),
        lambda: choice.choice(USER_DEFINED),
        lambda: choice.choice([" ", "  ", "    ", "\t", "\n", "\r\n", "\n\n\n", " \n ", "\u00a0 "]),
        lambda: str(choice.randrange(10 ** choice.randrange(1, 9))),
        lambda: choice.choice(["I'm", "they've", "DON'T", "it'LL", "we’re", "o'clock", "x's", "naïve", "cafe\u0301", "ﬁn"]),
        # Capital and small letters, marks and modifiers, where some tokenizers begin a new word.
        lambda: "".join(choice.choice("ABabÉé\u0301\u0327ʰǅªß'sT9 ") for _ in range(choice.randrange(2, 12))),
        lambda: choice.choice(["a", "ab", "-", "=", "▁", "é"]) * choice.randrange(2, 40),
    ]
    made = ["", " ", "  ", "▁", "\n"]
    while len(made) < STRINGS:
        made.append("".join(choice.choice(parts)() for _ in range(choice.randrange(1, 7))))
    return made


def byte_level(pre, pattern, ignore_merges, composes, lines, texts):
    def prepared(model):
        tokenizer = Tokenizer(model)
        if composes:
            tokenizer.normalizer = normalizers.NFC()
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in (None, "digits"))
        before = {None: [], "digits": [pre_tokenizers.Digits(individual_digits=True)]}
        split = before[pattern] if pattern in before else [pre_tokenizers.Split(Regex(pattern), "isolated")]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, plain])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    tokenizer = prepared(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=2_000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    # Words that no merges make: they are tokens only where merges are ignored.
    for whole in ["Ġthemselves", "zyzzyva", "Ġdatetime", "Ã©Ã©"]:
        vocabulary.setdefault(whole, len(vocabulary))
    tokenizer = prepared(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    first = len(vocabulary)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in USER_DEFINED])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    tokenizer.encode_special_tokens = True
    names = sorted(vocabulary, key=vocabulary.get)
    assert [vocabulary[name] for name in names] == list(range(first))
    added = [name for name in USER_DEFINED if tokenizer.token_to_id(name) >= first]
    assert added == USER_DEFINED and [tokenizer.token_to_id(name) for name in CONTROL] == [
        first + len(added) + i for i in range(len(CONTROL))
    ]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    decoded = [tokenizer.decode(some, skip_special_tokens=False) for some in ids]
    expected = [unicodedata.normalize("NFC", text) if composes else text for text in texts]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": names + USER_DEFINED + CONTROL,
        "kinds": [1] * first + [4] * len(USER_DEFINED) + [3] * len(CONTROL),
        "merges": [" ".join(merge) for merge in merges],
        "ids": ids,
        "decoded": decoded,
        "lost": sum(a != b for a, b in zip(decoded, expected)),
    }


def sentence_piece(prefix, fallback, lines, texts):
    written = io.BytesIO()
    user_defined = [*USER_DEFINED, "▁▁", "▁▁▁▁"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, model_type="bpe", vocab_size=2_400,
        character_coverage=0.9995, normalization_rule_name="identity", byte_fallback=fallback,
        add_dummy_prefix=prefix, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        user_defined_symbols=user_defined, control_symbols=[name for name in CONTROL if name not in ("<s>", "</s>")],
        minloglevel=2,
    )
    return encoded_pieces(written.getvalue(), prefix, user_defined, texts)


def encoded_pieces(proto, prefix, user_defined, texts):
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    every = range(model.vocab_size())

    def kind(i):
        if model.is_unknown(i):
            return 2
        if model.is_control(i):
            return 3
        return 6 if model.is_byte(i) else 5 if model.is_unused(i) else 4 if model.id_to_piece(i) in user_defined else 1

    ids = [model.encode(text) for text in texts]
    decoded = [model.decode(some) for some in ids]
    return {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in every],
        "kinds": [kind(i) for i in every],
        "scores": [model.get_score(i) for i in every],
        "add_space_prefix": prefix,
        "ids": ids,
        "decoded": decoded,
        # The sign for a space is read as a space.
        "lost": sum(a != b.replace("▁", " ") for a, b in zip(decoded, texts)),
    }


def data(package, path):
    """A file of an installed package, which is not imported: it would need others."""
    return Path(importlib.util.find_spec(package).submodule_search_locations[0]) / path


def letters():
    """The letter that stands for each byte: itself where it is printable."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def parts(token, ranks):
    """The two tokens that are merged last to make this one; none if merges make it only as a whole word."""
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        rank, at = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(pieces, pieces[1:])))
        if rank >= ranks[token]:
            return []
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def ranked(pre, pattern, ranks, first, texts):
    """A vocabulary in the format of tiktoken, whose ids begin at `first`, after as many control tokens."""
    letter = letters()
    names = {token: "".join(letter[byte] for byte in token) for token in sorted(ranks, key=ranks.get)}
    merges = [" ".join(names[part] for part in parts(token, ranks)) for token in names if len(token) > 1]
    merges = [merge for merge in merges if merge]
    encoding = tiktoken.Encoding(pre, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ids = [encoding.encode_ordinary(text) for text in texts]
    decoded = [encoding.decode(some) for some in ids]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": [f"<control {i}>" for i in range(first)] + list(names.values()),
        "kinds": [3] * first + [1] * len(names),
        "merges": merges,
        "ids": [[first + i for i in some] for some in ids],
        "decoded": decoded,
        "lost": sum(a != b for a, b in zip(decoded, texts)),
    }


def tekken(texts):
    file = json.loads(data("mistral_common", "data/tekken_240911.json").read_text())
    config = file["config"]
    first = config["default_num_special_tokens"]
    vocab = file["vocab"][: config["default_vocab_size"] - first]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in vocab}
    return ranked("tekken", config["pattern"], ranks, first, texts)


def llama3(texts):
    lines = data("llama_models", "llama3/tokenizer.model").read_text().split("\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    return ranked("llama-bpe", LLAMA3, ranks, 0, texts)


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    lines = corpus()
    texts = strings(lines)
    cases = {f"byte-level-{pre}": byte_level(pre, *rest, lines, texts) for pre, *rest in BYTE_LEVEL}
    cases["sentencepiece"] = sentence_piece(True, True, lines, texts)
    cases["sentencepiece-without-prefix"] = sentence_piece(False, True, lines, texts)
    cases["sentencepiece-without-bytes"] = sentence_piece(True, False, lines, texts)
    for version in ("tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"):
        proto = data("mistral_common", f"data/{version}").read_bytes()
        cases[f"mistral-{version[-2:]}"] = encoded_pieces(proto, True, [], texts)
    cases["mistral-tekken"] = tekken(texts)
    cases["llama-3"] = llama3(texts)
    for name, case in cases.items():
        print(f"{name}: {len(case['tokens'])} tokens, {case['lost']} of {len(texts)} strings are not restored")
        (folder / f"{name}.json").write_text(json.dumps({**case, "texts": texts}))


main()
