"""The vocabulary of the arithmetic language, one token a symbol, as a transformers fast tokenizer.

The whole vocabulary is here from the start, also for the operators that a given model was never trained on: ids
then mean the same in every checkpoint.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, SOS, EOS = "<pad>", "<sos>", "<eos>"
BIG, LITTLE = "<big>", "<little>"  # digits of a number: most significant first, or last
SCRATCHPAD, ANSWER = "<scratchpad>", "<answer>"
SPECIAL = (PAD, SOS, EOS)  # left out when a completion is decoded; the tags below are content
TAGS = (BIG, LITTLE, SCRATCHPAD, ANSWER)
DIGITS = tuple("0123456789")
OPERATORS = ("+", "-", "*", "/", "%", "max", "min", "next", "prev", "abs")
PUNCTUATION = ("(", ")", " ", ",", "=", ";")
VOCABULARY = SPECIAL + TAGS + DIGITS + OPERATORS + PUNCTUATION


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a symbol, nothing added around the text. A character outside the vocabulary raises an exception."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}))
    words = "|".join(TAGS + tuple(op for op in OPERATORS if len(op) > 1))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"{words}|."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=SOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
