"""Tokens chosen from logits that are computed elsewhere: no engine, no model."""

import torch

from trtllm_core import SamplingConfig, StandaloneDecoder

vocab = 50
table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(1)) * 3  # stands for a model

decoder = StandaloneDecoder(vocab, max_batch_size=2, max_beam_width=3, max_seq_len=10)
beams = SamplingConfig(num_beams=3, repetition_penalty=1.3, end_id=0, max_new_tokens=8)
drawn = SamplingConfig(top_k=5, temperature=0.7, num_return_sequences=2, random_seed=7, end_id=0, max_new_tokens=9)
rows = decoder.begin([[7, 8], [9]], [beams, drawn])
while not decoder.over:
    rows = decoder.step(table[rows.tokens])  # a model would first reorder its cache by rows.parents
for prompt in range(2):
    for one in decoder.sequences(prompt).values():
        print(prompt, one.reason, list(one.tokens))
