"""Small tokenizers of the kinds that models have, each trained on the same few words."""

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

WORDS = ["the cat sat on the mat", "A dog, a Cat; and text? </s> s> im_end endoftext [SEP] unk"]
ALPHABET = sorted(set("".join(WORDS)) | set("abcdefghijklmnopqrstuvwxyz<|>/[]_▁ \n"))


def byte_level() -> PreTrainedTokenizerFast:
    """As in GPT-2 and Qwen: the end token is in the model's vocabulary too."""
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )


def unmerged_words() -> PreTrainedTokenizerFast:
    """As in Llama 3: a word in the vocabulary becomes one token, without merges."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"</s>": 256, "</": 257, "s>": 258, "<s>": 259}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s>")]
    tokenizer = Tokenizer(kinds.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def unigram() -> PreTrainedTokenizerFast:
    """As in T5: special tokens are pieces of the model, with the best score of all."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("<s>", 0.0)]
    pieces += [(c, -5.0 - i / 100) for i, c in enumerate(ALPHABET) if c not in " \n"]
    pieces += [("▁the", -3.0), ("▁c", -4.0), ("at", -3.5)]
    tokenizer = Tokenizer(kinds.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def word_piece() -> PreTrainedTokenizerFast:
    """As in BERT: special tokens are searched in the lower-cased text too."""
    tokenizer = Tokenizer(kinds.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(  # type: ignore[call-arg]
        vocab_size=120, special_tokens=special, initial_alphabet=ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True, normalized=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        pad_token="[PAD]",
        mask_token=AddedToken("[MASK]", lstrip=True, normalized=True),
    )


def word_level() -> PreTrainedTokenizerFast:
    """Words cut at white space: the name of a special token is a word."""
    words = dict.fromkeys(w for text in WORDS for w in text.split())
    vocab = {w: i for i, w in enumerate(["<unk>", "</s>", *(w for w in words if w != "</s>")])}
    tokenizer = Tokenizer(kinds.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=AddedToken("</s>", rstrip=True), unk_token="<unk>"
    )


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    make.__name__: make for make in (byte_level, unmerged_words, unigram, word_piece, word_level)
}
