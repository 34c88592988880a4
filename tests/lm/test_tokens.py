"""The rules about spaces, subjects, special tokens and chats, over the families of tokenizers there are."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from factpatch.errors import TokenizerError
from factpatch.lm.fetch import is_fetched
from factpatch.lm.tokens import Tokens
from factpatch.testing import tiny_lm, tiny_tokenizer

CORPUS = [
    "The capital of France is Paris, and France is in Europe.",
    "Who was born in Rome? What is the capital of Norway? It is Oslo.",
    "Rome lies in Italy; Oslo lies in Norway. The capital of Italy is Rome.",
    "Ingrīda Amantova was born in Cēsis. 東京 is the capital of Japan 🗼.",
] * 4
SPECIAL = ["<s>", "</s>", "<unk>", "[CLS]", "[SEP]"]
CHAT = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"


def wrap(tokenizer, **more):
    return Tokens(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **more))


def byte_level(*, trim=True, bos=False, eos=False):
    """GPT-2's kind: bytes, merges, a space belongs to the word behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT)


def sentencepiece(*, prepend):
    """Llama-2's kind (a space in front of the text) and Gemma's (none): BPE with byte fallback and a BOS."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prepend else []),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no piece spans two words
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    alphabet = sorted({c for text in CORPUS[:3] for c in text.replace(" ", "▁")})
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*SPECIAL, *fallback], initial_alphabet=alphabet, limit_alphabet=len(alphabet)
    )
    tokenizer.train_from_iterator(CORPUS[:3], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    # The trainer takes the bytes only as special tokens, which they are not.
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] in SPECIAL]
    return wrap(Tokenizer.from_str(json.dumps(described)), bos_token="<s>", eos_token="</s>")


def unigram():
    """T5's kind: pieces by likelihood, a space in front, an end token behind."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>")
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return wrap(tokenizer, eos_token="</s>")


def word_piece():
    """BERT's kind: words and ##pieces between two special tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )
    return wrap(tokenizer, sep_token=AddedToken("[SEP]"), cls_token=AddedToken("[CLS]"))


FAMILIES = {
    "byte-level": byte_level,
    "byte-level, offsets not trimmed": lambda: byte_level(trim=False),
    "byte-level, BOS": lambda: byte_level(bos=True),
    "byte-level, BOS and EOS": lambda: byte_level(bos=True, eos=True),
    "bytes alone": lambda: Tokens(tiny_tokenizer()),
    "SentencePiece BPE, space in front": lambda: sentencepiece(prepend=True),
    "SentencePiece BPE": lambda: sentencepiece(prepend=False),
    "Unigram, EOS": unigram,
    "WordPiece, CLS and SEP": word_piece,
}


@pytest.fixture(scope="module", params=FAMILIES)
def tokens(request):
    return FAMILIES[request.param]()


def squeeze(text):
    return "".join(text.split())


@pytest.mark.parametrize(
    ("prompt", "subject", "target"),
    [
        ("The capital of France is", "France", "Paris"),
        ("France is what the capital of France is in", "France", "Europe"),
        ("The capital of", "The capital", "Italy"),
        ("Who was born in Cēsis? Ingrīda Amantova", "Ingrīda Amantova", "Cēsis"),
        ("Rome", "Rome", "lies in Italy"),
    ],
)
def test_target_and_subject_are_found(tokens, prompt, subject, target):
    found = tokens.encode(prompt, target, subject=subject)
    assert squeeze(tokens.decode(found.target_ids)) == squeeze(target)
    assert squeeze(tokens.decode(found.prompt_ids)) == squeeze(prompt)
    before_end = squeeze(prompt[: prompt.rindex(subject) + len(subject)])
    upto = squeeze(tokens.decode(found.ids[: found.subject + 1]))
    assert upto.startswith(before_end)
    assert not squeeze(tokens.decode(found.ids[: found.subject])).startswith(before_end)
    assert found.ids[-1] not in {1, 4} or found.ids[-1] == found.target_ids[-1] != 4
    assert squeeze(tokens.decode(found.ids[found.begin : found.subject + 1])).startswith(squeeze(subject))


def test_the_prompt_alone_is_the_beginning_of_the_whole(tokens):
    whole = tokens.encode("The capital of France is", "Paris")
    assert tokens.encode("The capital of France is").ids == whole.prompt_ids


def test_a_prefix_moves_the_subject(tokens):
    plain = tokens.encode("France is big", subject="France")
    moved = tokens.encode("France is big", subject="France", prefix="Rome lies in Italy. ")
    assert moved.subject > plain.subject
    assert squeeze(tokens.decode(moved.ids[: moved.subject + 1])) == "RomeliesinItaly.France"


def test_special_tokens_lead_once_and_never_follow():
    found = byte_level(bos=True, eos=True).encode("Rome lies in", "Italy")
    assert found.ids[0] == 0
    assert 1 not in found.ids
    assert byte_level().encode("Rome lies in", "Italy").ids == found.ids[1:]


def test_a_chat_template_brings_its_own_special_tokens_and_the_target_follows_without_a_space():
    tokens = byte_level(bos=True)
    found = tokens.encode("Where is Rome?", "Italy", subject="Rome", chat=True)
    assert tokens.render("Where is Rome?", chat=True) == "<s>user\nWhere is Rome?</s>\n<s>assistant\n"
    assert found.ids.count(0) == 2
    assert tokens.decode(found.target_ids) == "Italy"
    assert tokens.decode(found.ids[: found.subject + 1]).endswith("Where is Rome")


# Golden cases over vocabularies written down here, so that each token can be checked by eye.


def written_bytes(*merges, trim=True):
    """GPT-2's kind with these merges alone; "Ġ" is the space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(merge.split()) for merge in merges]
    vocabulary = [*alphabet, *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return wrap(tokenizer)


def written_metaspace(scheme):
    """Llama-2's kind, as newer tokenizers write it: "▁" is the space, bytes stand for what is unknown."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    letters = sorted(set("▁RomePru.é"))
    pairs = [("▁", "R"), ("o", "m"), ("▁R", "om"), ("▁Rom", "e"), ("▁", "P")]
    vocabulary = [*pieces, *letters, *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(vocabulary)}, pairs, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>")


def written_unigram():
    """T5's kind."""
    pieces = ["<unk>", "</s>", "▁Rome", "▁in", "▁", "Rome", "P", "e", "r", "u", "▁P", "."]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, byte_fallback=False)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return wrap(tokenizer, eos_token="</s>")


def written_word_piece():
    """BERT's kind."""
    pieces = ["<unk>", "[CLS]", "[SEP]", "rome", "in", "pe", "##ru", "san", "##rome", "'", "s", "."]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return wrap(tokenizer)


ROME = ("R o", "Ro m", "Rom e", "Ġ Rome", "i n", "Ġ in", "Ġ P", "e r", "er u", "ĠP eru")


GOLDEN = {
    "bytes: words": (
        lambda: written_bytes(*ROME),
        {"prompt": "Rome in", "target": "Peru", "subject": "Rome"},
        ("Rome Ġin", "ĠPeru", "Rome"),
    ),
    "bytes: the subject inside a token": (
        lambda: written_bytes(*ROME),
        {"prompt": "Rome in", "target": "Peru", "subject": "om"},
        ("Rome Ġin", "ĠPeru", "Rome"),
    ),
    "bytes: the subject ends in many bytes": (
        lambda: written_bytes(*ROME),
        {"prompt": "Romeé in", "target": "é", "subject": "Romeé"},
        ("Rome Ã © Ġin", "Ġ Ã ©", "Rome Ã ©"),
    ),
    "bytes: a space that stays alone is the target's": (
        lambda: written_bytes(*ROME),
        {"prompt": "Rome", "target": "xy", "subject": "Rome"},
        ("Rome", "Ġ x y", "Rome"),
    ),
    "bytes, offsets not trimmed: a space that stays alone": (
        lambda: written_bytes(*ROME, trim=False),
        {"prompt": "Rome", "target": "xy", "subject": "Rome"},
        ("Rome", "Ġ x y", "Rome"),
    ),
    "bytes: the subject after a space that stays alone": (
        lambda: written_bytes(*ROME),
        {"prompt": "in x in", "target": "Rome", "subject": "x"},
        ("in Ġ x Ġin", "ĠRome", "in Ġ x"),
    ),
    "bytes, offsets not trimmed: the subject's token holds the space before it": (
        lambda: written_bytes(*ROME, trim=False),
        {"prompt": "in Rome in", "target": "Rome", "subject": "Rome"},
        ("in ĠRome Ġin", "ĠRome", "in ĠRome"),
    ),
    "bytes, offsets not trimmed: the next token's space is not the subject's": (
        lambda: written_bytes(*ROME, trim=False),
        {"prompt": "in Rome", "target": "Rome", "subject": "in"},
        ("in ĠRome", "ĠRome", "in"),
    ),
    "bytes: a new line": (
        lambda: written_bytes(*ROME),
        {"prompt": "in\n", "target": "Rome", "subject": "in"},
        ("in Ċ", "Rome", "in"),
    ),
    "bytes: the prompt's last space merges into the target": (
        lambda: written_bytes(*ROME),
        {"prompt": "in ", "target": "Rome", "subject": "in"},
        ("in", "ĠRome", "in"),
    ),
    "bytes: prefix": (
        lambda: written_bytes(*ROME),
        {"prompt": "Rome in", "target": "Peru", "subject": "Rome", "prefix": "Rome in. "},
        ("Rome Ġin . ĠRome Ġin", "ĠPeru", "Rome Ġin . ĠRome"),
    ),
    "bytes: the subject twice": (
        lambda: written_bytes(*ROME),
        {"prompt": "Rome in Rome in", "target": "Peru", "subject": "Rome"},
        ("Rome Ġin ĠRome Ġin", "ĠPeru", "Rome Ġin ĠRome"),
    ),
    "Metaspace first": (
        lambda: written_metaspace("first"),
        {"prompt": "Rome", "target": "Peru", "subject": "Rome"},
        ("<s> ▁Rome", "▁P e r u", "<s> ▁Rome"),
    ),
    "Metaspace first: bytes in subject and target": (
        lambda: written_metaspace("first"),
        {"prompt": "Romeñ.", "target": "ñé", "subject": "Romeñ"},
        ("<s> ▁Rome <0xC3> <0xB1> .", "▁ <0xC3> <0xB1> é", "<s> ▁Rome <0xC3> <0xB1>"),
    ),
    "Metaspace never": (
        lambda: written_metaspace("never"),
        {"prompt": "Rome.", "target": "Rome", "subject": "Rome"},
        ("<s> R om e .", "▁Rome", "<s> R om e"),
    ),
    "Metaspace first: new line": (
        lambda: written_metaspace("first"),
        {"prompt": "Rome\n", "target": "Peru", "subject": "Rome"},
        ("<s> ▁Rome <0x0A>", "P e r u", "<s> ▁Rome"),
    ),
    "Unigram": (
        written_unigram,
        {"prompt": "Rome in", "target": "Peru", "subject": "Rome"},
        ("▁Rome ▁in", "▁P e r u", "▁Rome"),
    ),
    "WordPiece, in small letters": (
        written_word_piece,
        {"prompt": "SanRome's in", "target": "Peru", "subject": "SanRome"},
        ("[CLS] san ##rome ' s in", "pe ##ru", "[CLS] san ##rome"),
    ),
}


@pytest.mark.parametrize(("family", "asked", "expected"), GOLDEN.values(), ids=GOLDEN)
def test_golden(family, asked, expected):
    tokens = family()
    found = tokens.encode(**asked)
    prompt, target, upto = (text.split(" ") for text in expected)

    def pieces(ids):
        return tokens.tokenizer.convert_ids_to_tokens(list(ids))

    assert pieces(found.ids) == prompt + target
    assert found.target == len(prompt)
    assert pieces(found.prompt_ids) == prompt
    assert pieces(found.target_ids) == target
    assert pieces(found.ids[: found.subject + 1]) == upto


WHOLE = {name: FAMILIES[name] for name in FAMILIES if "Unigram" not in name and "WordPiece" not in name}


@pytest.fixture(scope="module", params=WHOLE)
def lossless(request):
    """The families that can write every character."""
    return WHOLE[request.param]()


@pytest.mark.parametrize(
    ("prompt", "subject", "target"),
    [
        ("Café Zoë is in", "Zoë", "Bogotá"),
        ("é", "é", "é"),
        ("The tower 🗼 of 東京 is in", "東京", "日本"),
        ("The tower 🗼", "🗼", "🗼🗼"),
        ("👩‍👩‍👧 and 👩‍👩‍👧 live in", "👩‍👩‍👧", "中文 🗼"),
        ("中文中文", "中文", "中文"),
        ("a  b", "b", "c  d"),
        ("Rome's Rome", "Rome", "'s"),
        ("It is Rome.", "Rome", "..."),
        ("Rome\tOslo", "Oslo", "x"),
    ],
)
def test_characters_of_many_bytes_and_odd_spaces(lossless, prompt, subject, target):
    found = lossless.encode(prompt, target, subject=subject)
    assert lossless.decode(found.ids).strip() == f"{prompt} {target}"
    assert lossless.decode(found.target_ids).removeprefix(" ") == target
    assert lossless.decode(found.prompt_ids).removeprefix(" ") == prompt
    upto = lossless.decode(found.ids[: found.subject + 1]).removeprefix(" ")
    assert upto.startswith(prompt[: prompt.rindex(subject) + len(subject)])
    shorter = lossless.decode(found.ids[: found.subject]).removeprefix(" ")
    assert not shorter.startswith(prompt[: prompt.rindex(subject) + len(subject)])


@pytest.mark.parametrize("prompt", ["Say:\n", "Say:\n\n", "Say:\t", "Say: ", "Say:\u00a0"])
def test_after_white_space_no_space_is_put(lossless, prompt):
    found = lossless.encode(prompt, "Rome", subject="Say")
    assert lossless.decode(found.ids).strip() == f"{prompt}Rome"
    assert lossless.decode(found.target_ids).strip() == "Rome"


def test_the_whole_is_the_tokenizers_own_encoding_of_the_joined_text(lossless):
    for prompt, target in (("Rome lies in", "Italy"), ("Rome:\n", "Italy"), ("東京", "Japan")):
        found = lossless.encode(prompt, target)
        joined = prompt + target if prompt.endswith("\n") else f"{prompt} {target}"
        own = [i for i in lossless.tokenizer(joined)["input_ids"] if i != 1]  # 1 closes the text in one family
        assert list(found.ids) == own
        assert found.prompt_ids + found.target_ids == found.ids


def test_the_prompt_twice_in_what_is_given(lossless):
    prompt = "Rome is in"
    plain = lossless.encode(prompt, "Italy", subject="Rome")
    twice = lossless.encode(prompt, "Italy", subject="Rome", prefix="Rome is in Italy. ")
    assert twice.target > plain.target
    assert lossless.decode(twice.ids[: twice.subject + 1]).strip() == "Rome is in Italy. Rome"
    assert lossless.decode(twice.prompt_ids).strip() == "Rome is in Italy. Rome is in"
    assert twice.target_ids == plain.target_ids


def test_the_subject_is_looked_for_in_the_prompt_alone():
    tokens = byte_level()
    with pytest.raises(TokenizerError, match='the subject "Oslo" is not in the prompt "Rome is in" as the model'):
        tokens.encode("Rome is in", "Oslo", subject="Oslo", prefix="Oslo is in Norway. ")


# Without "<": a text that spells out a special token is read as that token.
any_text = st.text(
    st.characters(exclude_categories=("C",), max_codepoint=0x1FAFF, exclude_characters="<"), min_size=1, max_size=12
)


@pytest.mark.parametrize("name", ["byte-level", "byte-level, offsets not trimmed", "bytes alone"])
@given(data=st.data())
def test_prompt_and_target_join_without_loss(name, data):
    tokens = CACHED.setdefault(name, FAMILIES[name]())
    prompt, target = data.draw(any_text), data.draw(any_text.filter(lambda text: not text[0].isspace()))
    found = tokens.encode(prompt, target)
    joined = prompt + ("" if prompt[-1].isspace() else " ") + target
    assert list(found.prompt_ids + found.target_ids) == tokens.tokenizer(joined)["input_ids"]
    assert tokens.decode(found.ids) == joined
    assert 0 <= found.target < len(found.ids)
    # What is predicted holds the whole target, and of the prompt no more than white space at its end.
    predicted = tokens.decode(found.target_ids)
    assert predicted.endswith(target)
    assert predicted.removesuffix(target).strip() == ""


def word(character):
    return bool(re.match(r"\w", character))


@given(prompt=any_text, data=st.data())
def test_the_subjects_last_token_holds_its_last_character(prompt, data):
    tokens = CACHED.setdefault("byte-level", byte_level())
    start = data.draw(st.integers(0, len(prompt) - 1))
    subject = prompt[start : data.draw(st.integers(start + 1, len(prompt)))]
    # A token that ends within a character is decoded to U+FFFD, which a text with that character would be taken for.
    if not subject.strip() or "\ufffd" in prompt:
        return
    found = tokens.encode(prompt, "x", subject=subject)
    at = [i for i in range(len(prompt)) if prompt.startswith(subject, i)]
    whole = [i for i in at if not (word(prompt[i - 1 : i]) or word(prompt[i + len(subject) : i + len(subject) + 1]))]
    upto = prompt[: (whole or at)[-1] + len(subject)].rstrip()
    assert tokens.decode(found.ids[: found.subject + 1]).startswith(upto)
    assert not tokens.decode(found.ids[: found.subject]).startswith(upto)


CACHED = {}


def test_encoding_leaves_the_tokenizer_as_it_was():
    tokens = byte_level(bos=True, eos=True)
    tokenizer = tokens.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", "<unk>"
    before = tokenizer.backend_tokenizer.to_str()
    tokens.encode("Rome lies in", "Italy", subject="Rome")
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<unk>")
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_tokenizer_that_cuts_long_texts_is_not_asked_to():
    tokens = Tokens(tiny_tokenizer())
    tokens.tokenizer.model_max_length = 8
    found = tokens.encode("Rome lies in a far country", "Italy")
    assert tokens.decode(found.ids) == "Rome lies in a far country Italy"


def test_decoding_leaves_special_tokens_out_and_spaces_alone():
    tokens = byte_level(bos=True)
    assert tokens.decode([0, *tokens.tokenizer("Rome , is it ?", add_special_tokens=False)["input_ids"], 1]) == (
        "Rome , is it ?"
    )
    assert tokens.decode([]) == ""


# Chats.


def chatting(template):
    tokens = byte_level(bos=True)
    tokens.tokenizer.chat_template = template
    return tokens


def test_a_chat_is_not_given_the_special_tokens_twice():
    tokens = chatting("{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    found = tokens.encode("Rome", "Italy", chat=True)
    assert found.ids.count(0) == 1
    assert tokens.decode(found.ids) == "[Rome] Italy", "a template that ends without white space gets a space"
    assert tokens.encode("Rome").ids.count(0) == 1


@pytest.mark.parametrize("prompt", ["a", "assistant", "user", "Where is the assistant"])
def test_the_subject_in_a_chat_is_in_what_the_user_says(prompt):
    tokens = byte_level(bos=True)
    found = tokens.encode(prompt, "Italy", subject=prompt, chat=True)
    assert tokens.decode(found.ids[: found.subject + 1]) == f"user\n{prompt}"


def test_a_prefix_in_a_chat_is_part_of_what_the_user_says():
    tokens = byte_level(bos=True)
    found = tokens.encode("Rome is in", "Italy", subject="Rome", prefix="Rome. ", chat=True)
    assert tokens.decode(found.ids[: found.subject + 1]) == "user\nRome. Rome"


@pytest.mark.parametrize("prompt", ["Where is Rome?", "Where is Rome?\n", " Where is Rome? "])
def test_a_template_that_trims_what_the_user_says(prompt):
    tokens = chatting("{% for m in messages %}<s>{{ m['content'] | trim }}</s>\n{% endfor %}")
    found = tokens.encode(prompt, "Italy", subject="Rome", chat=True)
    assert tokens.decode(found.ids[: found.subject + 1]) == "Where is Rome"


def test_the_words_of_what_is_refused():
    tokens = Tokens(tiny_tokenizer())
    with pytest.raises(TokenizerError) as caught:
        tokens.encode("Rome is in", subject="rome")
    assert str(caught.value) == (
        'the subject "rome" is not in the prompt "Rome is in" as the model is given it.\n'
        "  Write the subject letter for letter as it stands in the prompt."
    )
    with pytest.raises(TokenizerError) as caught:
        tokens.render("Rome", chat=True)
    assert str(caught.value) == "this model has no chat template.\n  Ask it plainly: leave out --chat (chat=False)."
    assert (tokens.has_chat, byte_level().has_chat) == (False, True)
    with pytest.raises(TokenizerError, match='the target "\n" leaves no tokens after the prompt "Rome"'):
        written_word_piece().encode("Rome", "\n")
    with pytest.raises(TokenizerError, match='the subject " " leaves no token of its own in "rome in"'):
        written_word_piece().encode("rome in", subject=" ")


def test_a_slow_tokenizer_is_refused_by_its_kind():
    from transformers import BertTokenizer, PythonBackend

    class Slow(PythonBackend):
        vocab_size = 0

        def get_vocab(self):
            return {}

    assert Tokens(BertTokenizer()).has_chat is False
    with pytest.raises(TokenizerError) as caught:
        Tokens(Slow.__new__(Slow))
    assert str(caught.value) == (
        "Slow gives no character offsets, which finding a subject needs.\n"
        "  Load the model with its fast tokenizer (a tokenizer.json beside the weights)."
    )


@pytest.mark.real
def test_smollms_own_tokenizer(smollm):
    tokens = smollm.tokens
    found = tokens.encode("The capital of France is", "Paris", subject="France")
    assert found.ids == (504, 3575, 282, 4649, 314, 7042)
    assert (found.target, found.subject) == (5, 3)
    assert tokens.render("Hi", chat=True).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.real
def test_gemmas_own_tokenizer():
    if not is_fetched("gemma3-270m"):
        pytest.skip("gemma3-270m is not fetched; fetch it once with: factpatch ask -m gemma3-270m hello")
    from transformers import AutoTokenizer

    from factpatch.lm.fetch import checkpoint_folder

    tokens = Tokens(AutoTokenizer.from_pretrained(checkpoint_folder("gemma3-270m")))
    found = tokens.encode("The capital of France is", "Paris", subject="France")
    assert found.ids == (2, 818, 5279, 529, 7001, 563, 9079)
    assert (found.target, found.subject) == (6, 4)


@pytest.mark.real
@pytest.mark.parametrize(
    ("asked", "prompt", "target", "upto"),
    [
        (
            {"prompt": "The capital of France is", "target": "Paris", "subject": "France"},
            "The Ġcapital Ġof ĠFrance Ġis",
            "ĠParis",
            "The Ġcapital Ġof ĠFrance",
        ),
        ({"prompt": "Ann Lee", "target": "a pilot", "subject": "Ann Lee"}, "Ann ĠLee", "Ġa Ġpilot", "Ann ĠLee"),
        ({"prompt": "Q: Rome?\n", "target": "Italy", "subject": "Rome"}, "Q : ĠRome ? Ċ", "Italy", "Q : ĠRome"),
        (
            {"prompt": "France", "target": "Paris", "subject": "France", "prefix": "France. "},
            "France . ĠFrance",
            "ĠParis",
            "France . ĠFrance",
        ),
    ],
)
def test_smollms_own_tokens(smollm, asked, prompt, target, upto):
    found = smollm.tokens.encode(**asked)

    def pieces(ids):
        return smollm.tokenizer.convert_ids_to_tokens(list(ids))

    assert pieces(found.prompt_ids) == prompt.split()
    assert pieces(found.target_ids) == target.split()
    assert pieces(found.ids[: found.subject + 1]) == upto.split()


@pytest.mark.real
@pytest.mark.parametrize(
    ("prompt", "subject", "target"),
    [("The tower 🗼 of 東京 is in", "東京", "日本"), ("Café Zoë is in", "Zoë", "Bogotá"), ("The 🗼", "🗼", "🗼")],
)
def test_smollms_characters_of_many_bytes(smollm, prompt, subject, target):
    found = smollm.tokens.encode(prompt, target, subject=subject)
    assert smollm.tokens.decode(found.prompt_ids) == prompt
    assert smollm.tokens.decode(found.target_ids) == f" {target}"
    upto = smollm.tokens.decode(found.ids[: found.subject + 1])
    assert upto == prompt[: prompt.rindex(subject) + len(subject)]


@pytest.mark.real
def test_smollms_chat(smollm):
    tokens = smollm.tokens
    found = tokens.encode("Where is Rome?", "In Italy", subject="Rome", chat=True)
    assert tokens.decode(found.target_ids) == "In Italy"
    assert tokens.decode(found.ids[: found.subject + 1]).endswith("user\nWhere is Rome")
    rendered = tokens.render("Where is Rome?", chat=True)
    assert smollm.tokenizer.decode(list(found.prompt_ids)) == rendered


@pytest.mark.parametrize(
    ("prompt", "subject", "end"),
    [
        ("Ann was seen in Annville", "Ann", "Ann"),
        ("Ann and Ann lie in Annville", "Ann", "Ann and Ann"),
        ("In Annville", "Ann", "In Ann"),
        ("Is C++ a language, or ++C", "C++", "Is C++"),
        ("Wien, Wiener", "Wien", "Wien"),
    ],
)
def test_a_subject_is_found_as_a_whole_word_where_it_is_one(prompt, subject, end):
    tokens = Tokens(tiny_tokenizer())
    found = tokens.encode(prompt, subject=subject)
    assert tokens.decode(found.ids[: found.subject + 1]) == end
    assert tokens.decode(found.ids[found.begin : found.subject + 1]) == subject
    assert tokens.encode(prompt).begin is None


def test_a_text_longer_than_the_model_reads_is_refused():
    lm = tiny_lm("gpt2")
    lm.tokens.encode("x" * 255)
    with pytest.raises(TokenizerError, match=r'text beginning "x+" has 257 tokens; this model reads 256 at most'):
        lm.tokens.encode("x" * 256)
    assert Tokens(lm.tokenizer).encode("x" * 400).target == 401


def test_nothing_at_all_is_refused():
    with pytest.raises(TokenizerError, match="the prompt is empty"):
        Tokens(tiny_tokenizer(bos=False)).encode("")
    assert Tokens(tiny_tokenizer()).encode("").ids == (256,)
