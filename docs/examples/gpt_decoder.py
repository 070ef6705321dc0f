"""The same by the classic runtime's names and tensors."""

import torch

from trtllm_core.compat.tensorrt_llm.bindings import (
    DataType,
    DecodingInput,
    DecodingMode,
    DecodingOutput,
    GptDecoder,
    SamplingConfig,
)

batch, beams, vocab, length = 2, 3, 50, 10
table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(1)) * 3  # stands for a model

decoder = GptDecoder(DecodingMode.BEAM_SEARCH, DataType.FLOAT, batch, beams, vocab, vocab, length)
decoder.setup(SamplingConfig(beam_width=beams, repetition_penalty=[1.3], length_penalty=[1.0]), batch)
ids = torch.zeros(batch, beams, length, dtype=torch.int32)
ids[0, :, :2], ids[1, :, :1] = torch.tensor([7, 8]), 9  # two prompts, of two tokens and of one
output = DecodingOutput(ids, torch.tensor([[2] * beams, [1] * beams], dtype=torch.int32))
last, done = torch.tensor([[8] * beams, [9] * beams]), False
while not done:
    done = decoder.forward(output, DecodingInput(logits=table[last], end_ids=torch.tensor([0, 0])))
    last = output.new_tokens.long()  # a model would reorder its cache by output.parent_ids
for row, scores in zip(output.ids, output.cum_log_probs, strict=True):
    print([f"{score:.2f}" for score in scores.tolist()], row[0].tolist())
