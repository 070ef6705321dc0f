"""Processors and criteria written for other runtimes, in one request."""

from transformers import MaxLengthCriteria, NoRepeatNGramLogitsProcessor

from trtllm_core import ModelRunner, SamplingConfig
from trtllm_core.compat import TransformersLogitsProcessor, TransformersStoppingCriterion, VLLMRequestProcessor
from trtllm_core.testing.markov import MarkovExecutable


def only_even(prompt_tokens, generated_tokens, logits):  # as vLLM calls it
    logits[1::2] = -float("inf")
    return logits


runner = ModelRunner.from_engine(MarkovExecutable())
processors = [TransformersLogitsProcessor(NoRepeatNGramLogitsProcessor(1)), VLLMRequestProcessor(only_even)]
limit = TransformersStoppingCriterion(MaxLengthCriteria(9))
config = SamplingConfig(end_id=(), return_dict=True)
for output in runner.generate([[5], [6, 7]], config, stopping_criteria=limit, logits_processor=processors)["outputs"]:
    print(output.finish_reason, output.matched, output.tokens)
