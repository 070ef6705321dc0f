"""A processor that changes nothing and prints what the core calls, so that the life of a slot can be seen."""

from trtllm_core import ModelRunner, SamplingConfig
from trtllm_core.plugin import DeviceLogitsProcessor
from trtllm_core.testing.markov import MarkovExecutable


class Trace(DeviceLogitsProcessor):
    def setup(self, context):
        print(f"setup, {context.slots} slots")

    def begin(self, slot, view):
        print(f"begin slot {slot}: request {view.request_id}, prompt {list(view.prompt)}")

    def apply(self, logits, batch):
        print(f"apply to slots {batch.slot[batch.active].tolist()}")

    def commit(self, batch):
        print(f"commit {batch.counts.tolist()} tokens to slots {batch.slot.tolist()}")

    def end(self, slot):
        print(f"end slot {slot}")


runner = ModelRunner.from_engine(MarkovExecutable())
lengths = [SamplingConfig(max_new_tokens=n, end_id=()) for n in (1, 2)]
runner.generate([[5, 6], [7]], lengths, logits_processor=Trace())
