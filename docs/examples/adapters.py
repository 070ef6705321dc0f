"""Two LoRA adapters, a prompt table and a plain request in one batch: ``python adapters.py ENGINE ADAPTER ADAPTER``."""

import sys

import torch

from trtllm_core import ModelRunner, SamplingConfig

engine, english, french = sys.argv[1:4]
config = SamplingConfig(max_new_tokens=8, end_id=(), return_dict=True)

with ModelRunner.from_dir(engine, lora_dir=[english]) as runner:  # its uid is "0"
    runner.add_lora("fr", french)  # at any time, also while others run

    # Two tasks of four learnt embeddings each. In a prompt, ids from the vocabulary's size on stand for them.
    table = torch.randn(2, 4, runner.config.model.hidden_size)
    first = runner.vocab_size
    virtual = [first, first + 1, first + 2, first + 3]

    result = runner.generate(
        [[5, 6, 7], [5, 6, 7], [*virtual, 5, 6, 7], [5, 6, 7]],
        config,
        lora_uids=["0", "fr", "fr", None],
        prompt_table=table,
        prompt_tasks="0,0,1,0",
    )
    for output in result["outputs"]:
        print(output.tokens)
    runner.drop_lora("fr")
