"""A script for tensorrt_llm 0.10, as it was."""

import torch
from tensorrt_llm.runtime import LogitsProcessor, ModelRunner, SamplingConfig


class NeverTwice(LogitsProcessor):
    def __init__(self, input_lengths):
        self.input_lengths = input_lengths

    def __call__(self, step, input_ids, scores):
        for row, start in enumerate(self.input_lengths):
            scores[row, input_ids[row, start : start + step].long()] = -float("inf")
        return scores


prompts = [torch.tensor([40, 41, 42], dtype=torch.int32).cuda(), torch.tensor([7], dtype=torch.int32).cuda()]
runner = ModelRunner.from_dir("engine", rank=0)
config = SamplingConfig(end_id=255, pad_id=255, max_new_tokens=8)
config.output_log_probs = True
config.update(return_dict=True, output_sequence_lengths=True)
processor = NeverTwice([len(prompt) for prompt in prompts])
outputs = runner.generate(prompts, config, logits_processor=processor)
for prompt, ids, length in zip(prompts, outputs["output_ids"], outputs["sequence_lengths"]):
    print(ids[0, len(prompt) : length[0]].tolist())
