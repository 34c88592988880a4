"""The rules about spaces, subjects, special tokens and chats, over the families of tokenizers there are."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from factpatch.errors import TokenizerError
from factpatch.lm.fetch import is_fetched
from factpatch.lm.tokens import Tokens
from factpatch.testing import tiny_tokenizer

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


def test_the_prompt_alone_is_the_beginning_of_the_whole(tokens):
    whole = tokens.encode("The capital of France is", "Paris")
    assert tokens.encode("The capital of France is").ids == whole.prompt_ids


def test_a_prefix_moves_the_subject(tokens):
    plain = tokens.encode("France is big", subject="France")
    moved = tokens.encode("France is big", subject="France", prefix="Rome lies in Italy. ")
    assert moved.subject > plain.subject
    assert squeeze(tokens.decode(moved.ids[: moved.subject + 1])) == "RomeliesinItaly.France"


def test_no_second_space_after_white_space():
    tokens = byte_level()
    assert tokens.encode("Say:\n", "Rome").ids == tuple(tokens.tokenizer("Say:\nRome")["input_ids"])
    assert tokens.encode("Say:", "Rome").ids == tuple(tokens.tokenizer("Say: Rome")["input_ids"])


def test_many_byte_characters():
    tokens = byte_level()
    found = tokens.encode("The tower 🗼 of 東京 is in", "日本", subject="東京")
    assert tokens.decode(found.target_ids).strip() == "日本"
    assert tokens.decode(found.ids[: found.subject + 1]) == "The tower 🗼 of 東京"


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


printable = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_categories=("C", "Z")), min_size=1, max_size=15
)


@given(printable, printable)
def test_nothing_is_lost_between_prompt_and_target(prompt, target):
    tokens = Tokens(tiny_tokenizer(bos=False))
    found = tokens.encode(prompt, target)
    assert tokens.decode(found.ids) == f"{prompt} {target}"
    assert tokens.decode(found.prompt_ids) == prompt


@given(printable, printable, printable)
def test_the_subject_ends_where_its_last_occurrence_ends(before, subject, after):
    tokens = Tokens(tiny_tokenizer(bos=False))
    prompt = f"{before} {subject} {after}"
    found = tokens.encode(prompt, subject=subject)
    assert tokens.decode(found.ids[: found.subject + 1]) == prompt[: prompt.rindex(subject) + len(subject)]


def test_what_cannot_be_encoded_is_refused_in_words():
    tokens = Tokens(tiny_tokenizer())
    with pytest.raises(TokenizerError, match='the subject "Oslo" is not in the prompt "Rome"'):
        tokens.encode("Rome", subject="Oslo")
    with pytest.raises(TokenizerError, match="no chat template"):
        tokens.encode("Rome", chat=True)

    class Slow:
        is_fast = False

    with pytest.raises(TokenizerError, match="Slow gives no character offsets"):
        Tokens(Slow())


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
