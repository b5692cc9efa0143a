"""Train the embedded model's tokenizer: byte-level BPE over the training part, with a chat template.

Example: python models/embedded/tokenizer.py ../shared/corpus -o build/embedded
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from corpus import MIXTURE, read_units

VOCABULARY = 8192
END = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
# Digits one by one, so that arithmetic sees the same pieces everywhere; runs of spaces whole, for code.
SPLIT = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def training_text(corpus: Path) -> Iterator[str]:
    """Units of every class; small classes are read often enough to weigh as they do in the mixture."""
    for name, weight in MIXTURE.items():
        units = read_units(corpus, name, "train")
        budget, spent = weight * 1_000_000, 0
        while spent < budget:
            for unit in units:
                spent += len(unit)
                if spent >= budget:
                    break
                yield unit


def train_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 8,192 pieces, its special tokens and chat template, ready to save."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
    )
    bpe.train_from_iterator(training_text(corpus), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN_START, TURN_END]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 1024
    return tokenizer


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder of CLASS.PART.jsonl files")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the tokenizer's files")
    arguments = parser.parse_args()
    train_tokenizer(arguments.corpus).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
