"""What can stop a request, on a model without weights that writes one text over and over."""

import stop_when
import torch

from trtllm_core import ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.testing.markov import MarkovExecutable
from trtllm_core.testing.vocabulary import byte_tokenizer

tokenizer = byte_tokenizer(['{"a": {"n', '": 12}', "}, done. "])
circle = [257, 258, 259]  # ids 0 to 255 are bytes, 256 ends a text, and these are the pieces
table = torch.zeros(tokenizer.vocab_size, tokenizer.vocab_size)
for token, following in zip([0, *circle], [*circle, circle[0]], strict=True):
    table[token, following] = 9.0
engine = MarkovExecutable(tokenizer.vocab_size, table=table)
runner = ModelRunner.from_engine(engine, plugins=Plugins.load(extra=[stop_when]), tokenizer=tokenizer)

config = SamplingConfig(max_new_tokens=60, return_dict=True)
for wish in (
    {"stop_words_list": [[258, 259]]},
    {"stop_strings": [": 1", "done"]},
    {"stop_regexes": r"\d+\}"},
    {"stopping_criteria": use("repetition", count=3)},
    {"stopping_criteria": use("confidence", above=0.9, steps=2)},
    {"stopping_criteria": "braces_closed"},
    {"stopping_criteria": use("enough_of", token=258, times=2)},
):
    output = runner.generate([[0]], config.replace(**wish), text=True)["outputs"][0]
    print(f"{output.finish_reason:14} {len(output.tokens)} {output.text!r} {output.matched!r}")
