"""Which drafts of your own stand, where both models' logits are at hand."""

import torch

from trtllm_core import accept_likely_drafts

g = torch.Generator().manual_seed(1)
logits, draft_logits = torch.randn(2, 4, 50, generator=g), torch.randn(2, 3, 50, generator=g)
drafts = draft_logits.softmax(2).flatten(0, 1).multinomial(1, generator=g).view(2, 3)
tokens, sizes = accept_likely_drafts(
    logits, drafts, draft_logits, torch.tensor([3, 1]), positions=torch.tensor([9, 6]), seeds=[7, 8]
)
for row, size in zip(tokens, sizes, strict=True):
    print(row[:size].tolist())  # what follows each of the two texts
