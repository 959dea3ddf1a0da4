"""The tiny tokenizer of a task, as a Hugging Face folder has it."""

from transformers import PreTrainedTokenizerFast

from flame_ext.lab.tasks.task import EOS, UNKNOWN, Task
from flame_ext.lab.tasks.text import Text


def tokenizer_of(task: Task) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with a token for each of the task's words, which blanks separate; of a text, for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate([EOS, UNKNOWN, *task.words()])}
    if isinstance(task, Text):
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token=UNKNOWN)
