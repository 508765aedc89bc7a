"""Train the byte-level BPE tokenizer of the pocket model and write its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mlxsteer.pocket.grammar import TOPICS, load_rules, load_tasks

from .corpus import TOKEN_SHARES, Sampler

VOCABULARY = 4096
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
BOS, EOS, PAD, END = 0, 1, 2, 6
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHARACTERS_PER_BEHAVIOUR = 1_500_000
# How often each word of the lexicons and tasks is shown on its own, so that most of them become one token.
WORD_REPEATS = 250


def lexicon_words() -> list[str]:
    """Words that behaviours are scored by, and all words of the word-pair tasks."""
    rules = load_rules()
    names = [name for name in rules if name.startswith(("adj.", "verb.pos", "verb.neg"))]
    names += [f"{part}.{topic}" for topic in TOPICS for part in ("who", "what", "like")]
    names += [
        f"verb.{side}.{kind}"
        for side in ("harm", "safe")
        for kind in ("place", "vehicle", "person", "paper", "account")
    ]
    words = {word for name in names for word in rules[name].words()}
    for pairs in load_tasks().values():
        words.update(pairs)
        words.update(pairs.values())
    return sorted(words)


def training_texts(seed: int) -> Iterator[str]:
    """The same number of characters of each behaviour, then the lexicons."""
    sampler = Sampler(seed)
    for kind in TOKEN_SHARES:
        characters = 0
        while characters < CHARACTERS_PER_BEHAVIOUR:
            text = sampler.draw(kind)
            characters += len(text)
            yield text
    for word in lexicon_words():
        for _ in range(WORD_REPEATS):
            yield f"a {word}"


def train_tokenizer(folder: Path, seed: int = 7) -> Tokenizer:
    """Train the tokenizer and write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "tokenizer.json.part"
    tokenizer.save(str(temporary))
    temporary.replace(folder / "tokenizer.json")
    config = {
        "backend": "tokenizers",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": SPECIAL_TOKENS[3:],
        "model_max_length": 512,
        "tokenizer_class": "TokenizersBackend",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer
