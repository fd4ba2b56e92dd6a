"""A tokenizer and tiny encoders, made in memory, for tests of text."""

from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertTokenizer,
)

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the a an of in is was red green blue big small cat dog bird "
    "sat ran flew on mat tree house who what where ? . , ##s"
).split()


def tokenizer():
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, do_lower_case=True)


def config(**options):
    return BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        **options,
    )


def classifier(classes=3):
    return BertForSequenceClassification(config(num_labels=classes))


def masked_lm():
    return BertForMaskedLM(config())


def span_finder():
    return BertForQuestionAnswering(config())
