"""From a checkpoint to text: run it beside ``SmolLM2-135M-Instruct.Q4_1.gguf``, which ``make weights`` fetches."""

from trtllm_core import BuildConfig, ModelRunner, SamplingConfig, build_engine

build_engine("SmolLM2-135M-Instruct.Q4_1.gguf", "engine", BuildConfig(dtype="float32", max_seq_len=512))
runner = ModelRunner.from_dir("engine")
prompt = runner.tokenizer.encode("The capital of France is")

result = runner.generate([prompt], SamplingConfig(max_new_tokens=8, return_dict=True), text=True)
print(result["outputs"][0].text, result["finish_reasons"])

sampled = SamplingConfig(top_k=0, top_p=0.9, temperature=0.8, random_seed=7, max_new_tokens=8)
for delta in runner.generate([prompt], sampled, streaming=True, text=True):
    print(delta.text, end="", flush=True)
runner.close()
